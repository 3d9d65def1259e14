"""What an encoder costs, against published figures and closed forms; counted without any weight."""

from typing import Any

import pytest
import torch
from torch import nn

from plait.core.errors import ConfigError
from plait.core.tensors import Patches
from plait.models import specs
from plait.models.build import build_encoder
from plait.models.measure import Account, account, peak_bytes


def measured(spec: Any) -> Account:
    return account(lambda: build_encoder(spec), spec.size)


def test_a_vision_transformer_costs_what_its_shape_says() -> None:
    d, depth, n, patch = 768, 12, 196, 16
    found = measured(specs.ViT(d=d, depth=depth, heads=12, patch=patch))
    t = n + 1  # the class token
    linear = 12 * d * d * t  # queries, keys, values, output, and two layers four times as wide
    attention = 2 * t * t * d
    assert found.flops == 2 * (n * 3 * patch * patch * d + depth * (linear + attention))
    assert found.flops / 2 == pytest.approx(17.6e9, rel=0.003)  # as published, multiply-adds
    assert (found.tokens, found.d_out) == (n, d)
    assert found.parameters == found.trainable == 85_798_656  # 86,567,656 with the classifier of 1,000


@pytest.mark.parametrize(
    ("spec", "gmac"),
    [
        (specs.ResNet(depth=18), 1.8),  # He et al., table 1
        (specs.ResNet(depth=50), 4.1),  # torchvision; the paper's 3.8 has the stride in another layer
        (specs.Swin(), 4.5),  # Liu et al., table 7
        (specs.EfficientNetLite(), 0.39),  # the authors' 407 MFLOPs with norms and activations
    ],
    ids=lambda value: value.kind if isinstance(value, specs.Part) else "",
)
def test_towers_cost_what_their_papers_say(spec: Any, gmac: float) -> None:
    # Measured: 1.814, 4.087, 4.490, 0.384.
    assert measured(spec).flops / 2e9 == pytest.approx(gmac, rel=0.02)


@pytest.mark.parametrize(
    "spec",
    [
        specs.ViT(size=32, patch=8, d=64, depth=2, heads=2, dropout=0.1),
        specs.ResNet(size=32, width=8),
        specs.Swin(size=32, patch=2, d=8, depths=(1, 2), heads=(2, 2), window=4),
    ],
    ids=lambda spec: spec.kind,
)
def test_what_is_kept_for_backward_is_what_autograd_keeps(spec: Any) -> None:
    torch.manual_seed(0)
    tower = build_encoder(spec)
    own = {tensor.untyped_storage() for tensor in (*tower.parameters(), *tower.buffers())}

    def kept(pictures: int) -> int:
        storages: set[torch.UntypedStorage] = set()

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storages.add(tensor.untyped_storage())
            return tensor

        pixels = torch.rand(pictures * 32 * 32, 3)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            tower(Patches(values=pixels, grid=torch.tensor([[1, 32, 32]] * pictures)))
        return sum(storage.nbytes() for storage in storages - own)

    # Equal but for the vision transformer, 2.1 % more: meta's attention keeps a little more than the CPU's.
    expected = kept(10) - kept(2)
    assert 8 * measured(spec).kept_bytes == pytest.approx(expected, rel=0.03)


def test_what_does_not_learn_is_told_apart() -> None:
    def build() -> nn.Module:
        tower = build_encoder(specs.EfficientNetLite())
        assert isinstance(tower.classifier, nn.Module)
        tower.classifier.requires_grad_(False)
        return tower

    found = account(build, 64)
    assert (found.parameters, found.parameters - found.trainable) == (4_652_008, 1280 * 1000 + 1000)
    assert found.tokens == 4


def test_only_encoders_are_measured() -> None:
    with pytest.raises(ConfigError, match="Linear is no encoder"):
        account(lambda: nn.Linear(3, 3), 32)


class TwoLayers(nn.Module):
    """An encoder whose memory can be told: pixels, one hidden layer, the result."""

    d_out = 6

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(3, 8), nn.Linear(8, 40), nn.Linear(40, 6)

    def forward(self, media: Patches) -> Patches:
        hidden = self.second(self.first(media.values))
        return Patches(values=self.third(hidden), grid=media.grid)

    def grid_out(self, grid: torch.Tensor) -> torch.Tensor:
        return grid


def test_the_peak_is_what_lives_at_once() -> None:
    rows = 3 * 16 * 16
    # Pixels are the caller's and stay; 8 and 40 numbers live together, 40 and 6 after that. Weights are not counted.
    assert peak_bytes(TwoLayers, 16, pictures=3) == 4 * rows * (3 + 8 + 40)


def test_the_peak_grows_with_pictures_and_not_with_depth() -> None:
    shallow, deep = (specs.ViT(size=32, patch=8, d=32, depth=depth, heads=2) for depth in (2, 8))
    found = [peak_bytes(lambda spec=spec: build_encoder(spec), 32) for spec in (shallow, deep)]
    assert found[0] == found[1]
    two, eight = (peak_bytes(lambda: build_encoder(shallow), 32, pictures=count) for count in (2, 8))
    each = two - found[0]
    assert eight == found[0] + 7 * each
    # What no picture adds to: the patch embedding's weight, laid out anew for rows of patches.
    assert found[0] - each == pytest.approx(4 * 32 * 3 * 8 * 8, abs=64)
