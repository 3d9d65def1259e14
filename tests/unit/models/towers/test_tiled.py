"""Tiles: cutting and stitching undo each other, each tile is encoded as it would be alone, gradients flow."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.core.errors import ConfigError, DataError
from plait.core.protocols import Encoder
from plait.core.tensors import Patches
from plait.models.connectors.projection import Chain, Linear, PixelShuffle, RowEnds
from plait.models.towers.tiled import TiledEncoder, cut_tiles, stitch_tiles
from plait.models.towers.vit import VisionTransformer, vit

TILE, PATCH, D = 8, 4, 8


def tower() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(vit(D, 1, 2, patch=PATCH, size=TILE)).double()


def media(*shapes: tuple[int, int, int]) -> Patches:
    torch.manual_seed(1)
    grid = torch.tensor(shapes)
    return Patches(values=torch.rand(int(grid.prod(1).sum()), 3, dtype=torch.float64), grid=grid)


@settings(max_examples=50, deadline=None)
@given(frames=st.integers(1, 2), rows=st.integers(1, 3), columns=st.integers(1, 3), tile=st.integers(1, 4))
def test_stitching_undoes_cutting(frames: int, rows: int, columns: int, tile: int) -> None:
    item = torch.arange(frames * rows * columns * tile * tile * 2.0).view(frames, rows * tile, columns * tile, 2)
    shape = [frames, rows * tile, columns * tile]
    assert torch.equal(stitch_tiles(cut_tiles(item, tile), shape, rows=tile, columns=tile), item.flatten(0, 2))
    # tile by tile: the second tile of the first row of tiles stands right of the first
    if columns > 1:
        assert torch.equal(cut_tiles(item, tile)[tile * tile : 2 * tile * tile].view(tile, tile, 2),
                           item[0, :tile, tile : 2 * tile])  # fmt: skip


def test_each_tile_is_encoded_as_it_would_be_alone_and_stands_where_it_was() -> None:
    inner = tower()
    tiled = TiledEncoder(inner, TILE)
    assert isinstance(tiled, Encoder)
    pictures = media((1, TILE, TILE), (1, 2 * TILE, 3 * TILE), (1, 5, 3), (2, TILE, 2 * TILE))
    found = tiled(pictures)
    assert found.grid.tolist() == [[1, 2, 2], [1, 4, 6], [1, 2, 1], [2, 2, 4]]
    assert torch.equal(found.grid, tiled.grid_out(pictures.grid))
    raw = pictures.values.split(pictures.grid.prod(1).tolist())
    out = found.values.split(found.grid.prod(1).tolist())
    for number in (0, 2):  # of a tile or less: unchanged
        alone = inner(Patches(values=raw[number], grid=pictures.grid[number : number + 1]))
        torch.testing.assert_close(out[number], alone.values, atol=1e-12, rtol=0)
    whole, stitched = raw[1].view(2 * TILE, 3 * TILE, 3), out[1].view(4, 6, D)
    for row in range(2):
        for column in range(3):
            tile = whole[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE]
            alone = inner(Patches(values=tile.reshape(-1, 3), grid=torch.tensor([[1, TILE, TILE]])))
            cells = stitched[row * 2 : (row + 1) * 2, column * 2 : (column + 1) * 2]
            torch.testing.assert_close(cells.reshape(-1, D), alone.values, atol=1e-12, rtol=0)


def test_gradients_are_those_of_the_tiles_one_by_one() -> None:
    inner = tower()
    pictures = media((1, 2 * TILE, 2 * TILE), (1, TILE, TILE))
    pictures.values.requires_grad_()
    weights = torch.rand(20, D, dtype=torch.float64)
    (TiledEncoder(inner, TILE)(pictures).values * weights).sum().backward()
    assert pictures.values.grad is not None
    found = [pictures.values.grad.clone(), *(p.grad.clone() for p in inner.parameters() if p.grad is not None)]
    inner.zero_grad()
    pictures.values.grad = None
    whole = pictures.values[: 4 * TILE * TILE].view(2 * TILE, 2 * TILE, 3)
    square = weights[:16].view(4, 4, D)
    for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
        tile = whole[down * TILE : (down + 1) * TILE, right * TILE : (right + 1) * TILE].reshape(-1, 3)
        part = square[down * 2 : (down + 1) * 2, right * 2 : (right + 1) * 2].reshape(-1, D)
        (inner(Patches(values=tile, grid=torch.tensor([[1, TILE, TILE]]))).values * part).sum().backward()
    last = inner(Patches(values=pictures.values[-TILE * TILE :], grid=torch.tensor([[1, TILE, TILE]])))
    (last.values * weights[16:]).sum().backward()
    wanted = [pictures.values.grad, *(p.grad for p in inner.parameters() if p.grad is not None)]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)


def test_what_tiles_do_not_fill_is_refused_with_its_size() -> None:
    with pytest.raises(DataError, match="item 1 has 8 x 20 pixels, which tiles of 8 x 8 do not fill"):
        TiledEncoder(tower(), TILE)(media((1, TILE, TILE), (1, TILE, 20)))
    wrong = Patches(values=torch.rand(5, 3, dtype=torch.float64), grid=torch.tensor([[1, TILE, 2 * TILE]]))
    with pytest.raises(DataError, match="counts 128 rows, came 5"):
        TiledEncoder(tower(), TILE)(wrong)
    with pytest.raises(ConfigError, match="0 x 0"):
        TiledEncoder(tower(), 0)


def test_no_pictures_and_many() -> None:
    tiled = TiledEncoder(tower(), TILE)
    none = tiled(Patches(values=torch.zeros(0, 3, dtype=torch.float64), grid=torch.zeros(0, 3, dtype=torch.long)))
    assert none.values.shape == (0, D)
    assert none.grid.shape == (0, 3)
    many = tiled(media(*[(1, TILE, TILE), (1, 2 * TILE, TILE)] * 25))
    assert many.grid.tolist() == [[1, 2, 2], [1, 4, 2]] * 25


def test_rows_end_with_a_learned_token() -> None:
    ends = RowEnds(2)
    grid = torch.tensor([[1, 2, 3], [2, 1, 1]])
    values = torch.arange(16.0).view(8, 2)
    found = ends(Patches(values=values, grid=grid))
    assert found.grid.tolist() == ends.grid_out(grid).tolist() == [[1, 2, 4], [2, 1, 2]]
    e = ends.token
    wanted = [*values[:3], e, *values[3:6], e, values[6], e, values[7], e]
    assert torch.equal(found.values, torch.stack(wanted))
    found.values.sum().backward()
    assert e.grad is not None
    assert e.grad.tolist() == [4, 4]
    small = RowEnds(2, above=2)
    assert small.grid_out(grid).tolist() == [[1, 2, 4], [2, 1, 1]]
    assert len(small(Patches(values=values, grid=grid)).values) == 10
    empty = Patches(values=torch.zeros(0, 2), grid=torch.zeros(0, 3, dtype=torch.long))
    assert ends(empty).values.shape == (0, 2)


def test_ends_of_rows_in_a_chain() -> None:
    chain = Chain(PixelShuffle(D, 2), Linear(4 * D, 6), RowEnds(6)).double()
    tiled = TiledEncoder(tower(), TILE)
    found = chain(tiled(media((1, TILE, TILE), (1, 2 * TILE, 3 * TILE))))
    assert found.grid.tolist() == [[1, 1, 2], [1, 2, 4]]
    assert found.values.shape == (10, 6)
