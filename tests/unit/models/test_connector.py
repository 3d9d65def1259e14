"""Connectors: shapes by the token account, order of cells, gradients to every weight."""

import pytest
import torch

from plait.core.protocols import Encoder
from plait.core.tensors import Patches
from plait.models.connector import Chain, Mlp, PixelShuffle


def media(*grids: tuple[int, int, int], d: int = 2) -> Patches:
    rows = sum(f * r * c for f, r, c in grids)
    return Patches(values=torch.arange(rows * d, dtype=torch.float32).view(rows, d), grid=torch.tensor(grids))


def test_pixel_shuffle_joins_neighbors_in_raster_order() -> None:
    out = PixelShuffle(2, 2)(media((1, 4, 4)))
    assert out.grid.tolist() == [[1, 2, 2]]
    # Cell (r, c) holds 2*(4r+c), 2*(4r+c)+1; the second joined cell covers columns 2..3 of rows 0..1.
    assert out.values[1].tolist() == [4, 5, 6, 7, 12, 13, 14, 15]


def test_pixel_shuffle_equals_torch_pixel_unshuffle() -> None:
    values = torch.randn(36, 5)
    ours = PixelShuffle(5, 3)(Patches(values=values, grid=torch.tensor([[1, 6, 6]])))
    theirs = torch.nn.functional.pixel_unshuffle(values.T.reshape(1, 5, 6, 6), 3)[0]  # channel-major: 5, then 3 x 3
    expected = theirs.view(5, 9, 4).permute(2, 1, 0).reshape(4, 45)
    assert torch.equal(ours.values, expected)


def test_grids_that_do_not_divide_are_padded_with_zeros_not_cut() -> None:
    out = PixelShuffle(2, 2)(media((1, 3, 5)))
    assert out.grid.tolist() == [[1, 2, 3]]
    assert float(out.values.sum()) == float(media((1, 3, 5)).values.sum())


@pytest.mark.parametrize("grids", [((1, 4, 4),), ((1, 2, 3), (2, 4, 1), (1, 1, 1))])
@pytest.mark.row("S2-07")
def test_every_connector_keeps_the_token_account(grids: tuple[tuple[int, int, int], ...]) -> None:
    chain = Chain(PixelShuffle(2, 2), Mlp(8, 16, 4))
    for connector in (PixelShuffle(2, 2), Mlp(2, 16, 4), chain):
        assert isinstance(connector, Encoder)
        given = media(*grids)
        out = connector(given)
        assert torch.equal(out.grid, connector.grid_out(given.grid))
        assert out.values.shape == (int(out.grid.prod(1).sum()), connector.d_out)


def test_every_weight_gets_a_gradient() -> None:
    chain = Chain(PixelShuffle(2, 2), Mlp(8, 16, 4))
    chain(media((1, 4, 4))).values.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in chain.parameters())
