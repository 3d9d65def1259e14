"""Sizes of pictures: Qwen2-VL's and LLaVA-NeXT's arithmetic as transformers has it."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers.image_processing_utils import select_best_resolution
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as published

from plait.assembly.fit import Native, Tiles, best_arrangement, smart_resize

SIDES = st.integers(1, 5000)


@settings(max_examples=300, deadline=None)
@given(height=SIDES, width=SIDES, cell=st.sampled_from([14, 16, 28, 32]), least=st.integers(1, 100_000))
@example(height=1, width=1, cell=28, least=3136)
@example(height=4000, width=20, cell=28, least=3136)
def test_native_sizes_are_qwens(height: int, width: int, cell: int, least: int) -> None:
    most = 1_003_520
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(ValueError, match="aspect ratio"):
            published(height, width, cell, least, most)
        return
    wanted = published(height, width, cell, least, most)
    assert smart_resize(height, width, cell=cell, least=least, most=most) == wanted
    item = Native(cell=cell, min_pixels=least, max_pixels=most).items(width, height, size=0)[0]
    if wanted[0] * wanted[1] <= most:  # theirs is larger only for strips less than a cell wide
        assert item == (*wanted, True)


@settings(max_examples=300, deadline=None)
@given(height=SIDES, width=SIDES, most=st.integers(2, 12))
def test_the_arrangement_is_the_best_resolution_of_llava(height: int, width: int, most: int) -> None:
    size = 336
    all_of_them = [(r * size, c * size) for r in range(1, most + 1) for c in range(1, most // r + 1)]
    wanted = select_best_resolution((height, width), all_of_them)
    rows, columns = best_arrangement(height, width, size=size, most=most)
    if wanted is None:  # theirs finds none for a line that is scaled to less than a pixel
        assert max(height, width) > size * most * min(height, width) / 2
    elif min(height, width) * size * most > max(height, width):  # no side is ever scaled to less than a pixel
        assert (rows * size, columns * size) == wanted
    sizes = Tiles(max_tiles=most).items(width, height, size=size)
    assert sizes[0] == (size, size, False)
    assert sizes[1:] == (() if rows * columns == 1 else ((rows * size, columns * size, False),))
