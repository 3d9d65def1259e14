"""How a picture tower is called."""

from __future__ import annotations

import pytest

from plait.models import specs
from plait.report.names import tower_name

pytestmark = pytest.mark.light


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        (specs.ViT(size=64, patch=8, d=96, depth=4, heads=3), "vit d96 x4 /8 at 64 px"),
        (specs.ResNet(depth=50), "resnet x50 w64 at 224 px"),
        (specs.EfficientNetLite(size=96), "efficientnet-lite at 96 px"),
        (specs.Swin(), "swin d96 x2-2-6-2 /4 at 224 px"),
        (specs.Hybrid(size=64), "hybrid d384 x11 w48-96-192-384 at 64 px"),
    ],
    ids=lambda value: value.kind if isinstance(value, specs.Part) else "",
)
def test_a_tower_from_scratch_is_called_by_kind_and_sizes(spec: specs.Part, name: str) -> None:
    assert tower_name(spec.model_dump(mode="json")) == name


def test_a_frozen_tower_is_called_by_its_name() -> None:
    assert tower_name("efficientnet-lite0") == "efficientnet-lite0"
    assert tower_name(None) == "None"
