"""Every part that ``plait list`` names can be built from its settings, keeps its token account, and learns."""

import importlib
from typing import get_args

import pytest
import torch
from torch import nn

from plait.core.errors import ConfigError, DataError
from plait.core.protocols import Encoder
from plait.core.tensors import Patches
from plait.models import specs
from plait.models.build import build_connector, build_encoder, build_reading

SMALL: dict[str, specs.Part] = {
    "vit": specs.ViT(size=32, patch=8, d=16, depth=2, heads=2),
    "resnet": specs.ResNet(size=32, depth=18, width=8),
    "efficientnet-lite": specs.EfficientNetLite(size=32),
    "swin": specs.Swin(size=32, patch=2, d=8, depths=(1, 2), heads=(2, 2), window=4),
    "hybrid": specs.Hybrid(size=32, widths=(4, 8, 8), d=16, depth=1, heads=2),
    "coatnet": specs.CoAtNet(size=32, widths=(4, 8, 8, 16), depths=(1, 1, 1, 1), attention=2, d_head=8),
}
CONNECTORS: dict[str, specs.Part] = {
    "linear": specs.Linear(shuffle=2),
    "mlp": specs.Mlp(),
    "words": specs.Words(d_hidden=8, tokens=3, free=1),
    "qformer": specs.QFormer(queries=3, d=8, depth=2, heads=2),
    "resampler": specs.Resampler(queries=3, depth=1, heads=2),
    "gated-cross-attention": specs.GatedCrossAttention(
        heads=2, every=2, resampler=specs.Resampler(queries=3, depth=1, heads=2)
    ),
}


def connector_of(kind: str) -> nn.Module:
    """From 12 to 20."""
    words = (torch.rand(7, 20), torch.eye(20)) if kind == "words" else None
    return build_connector(CONNECTORS[kind], d_in=12, d_out=20, words=words)


def kinds(union: object) -> set[str]:
    return {part.model_fields["kind"].default for part in get_args(get_args(union)[0])}


def test_all_parts_are_tried_here() -> None:
    assert kinds(specs.ImageEncoder) == {"pretrained", *SMALL}
    assert kinds(specs.Connector) == set(CONNECTORS)
    for part in (*get_args(get_args(specs.ImageEncoder)[0]), *get_args(get_args(specs.Connector)[0])):
        assert part.source.startswith("https://")
        assert part.__doc__.endswith(".")


@pytest.mark.row("S0-01")
@pytest.mark.row("S0-04")
@pytest.mark.row("S2-05")
@pytest.mark.parametrize("kind", SMALL)
def test_an_encoder_keeps_its_account_and_learns(kind: str) -> None:
    torch.manual_seed(0)
    tower = build_encoder(SMALL[kind])
    assert isinstance(tower, Encoder)
    grid = torch.tensor([[1, 32, 32], [1, 32, 32]])
    found = tower(Patches(values=torch.rand(2 * 32 * 32, 3), grid=grid))
    assert torch.equal(found.grid, tower.grid_out(grid))
    assert found.values.shape == (int(found.grid.prod(1).sum()), tower.d_out)
    found.values.square().sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in tower.parameters())


@pytest.mark.row("S2-06")
@pytest.mark.parametrize("kind", CONNECTORS)
def test_a_connector_joins_any_widths(kind: str) -> None:
    connector = connector_of(kind)
    assert isinstance(connector, Encoder)
    grid = torch.tensor([[1, 3, 4], [1, 2, 2]])
    found = connector(Patches(values=torch.rand(16, 12), grid=grid))
    inside = kind == "gated-cross-attention"
    assert found.values.shape == (int(connector.grid_out(grid).prod(1).sum()), 12 if inside else 20)
    if inside:
        spec = CONNECTORS[kind]
        assert isinstance(spec, specs.GatedCrossAttention)
        reading = build_reading(spec, d_in=12, d=20, layers=5)
        assert [layer is not None for layer in reading] == [True, False, True, False, True]


@pytest.mark.parametrize("kind", CONNECTORS)
@pytest.mark.parametrize("grids", [[], [(1, 0, 3)], [(1, 2, 2), (1, 0, 3)]], ids=str)
def test_a_connector_takes_nothing(kind: str, grids: list[tuple[int, int, int]]) -> None:
    connector = connector_of(kind).eval()
    grid = torch.tensor(grids, dtype=torch.long).view(-1, 3)
    found = connector(Patches(values=torch.rand(int(grid.prod(1).sum()), 12), grid=grid))
    assert torch.equal(found.grid, connector.grid_out(grid))
    assert len(found.values) == int(found.grid.prod(1).sum())
    assert found.values.isfinite().all()


def test_rows_that_are_not_those_of_the_grid_are_refused() -> None:
    grid = torch.tensor([[1, 1, 2], [1, 2, 2]])
    for kind in ("qformer", "resampler"):
        with pytest.raises(DataError, match="9 tokens came for items of 6 tokens"):
            connector_of(kind)(Patches(values=torch.rand(9, 12), grid=grid))


@pytest.mark.parametrize("name", specs.POSITIONS)
def test_every_position_code_is_where_the_list_says(name: str) -> None:
    path = specs.POSITIONS[name][2].split(".")
    found = importlib.import_module(".".join(path[:4]))
    for part in path[4:]:
        found = getattr(found, part)
    assert callable(found)


def test_what_is_not_built_here_is_refused() -> None:
    with pytest.raises(ConfigError, match="PretrainedImage is not built from scratch"):
        build_encoder(specs.PretrainedImage())
    with pytest.raises(ConfigError, match="ViT is no connector"):
        build_connector(specs.ViT(), d_in=1, d_out=1)
