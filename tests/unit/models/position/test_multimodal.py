"""Coordinates of text and media: the golden of the report, and properties."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from plait.models.position.multimodal import multimodal_coordinates


@pytest.mark.row("S0-10")
def test_three_words_a_picture_of_2_x_2_and_words() -> None:
    found = multimodal_coordinates([3, (1, 2, 2), 2]).T
    assert found[0].tolist() == [0, 1, 2, 3, 3, 3, 3, 5, 6]
    assert found[1].tolist() == [0, 1, 2, 3, 3, 4, 4, 5, 6]
    assert found[2].tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 6]


def test_nothing() -> None:
    assert multimodal_coordinates([]).shape == (0, 3)


media = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5))


@pytest.mark.row("S0-10")
@given(parts=st.lists(st.integers(0, 6) | media, max_size=6))
def test_places_are_distinct_and_parts_never_overlap(parts: list[int | tuple[int, int, int]]) -> None:
    found = multimodal_coordinates(parts)
    sizes = [part if isinstance(part, int) else part[0] * part[1] * part[2] for part in parts]
    assert len(found) == sum(sizes)
    assert len({tuple(at) for at in found.tolist()}) == len(found)
    highest = -1
    for piece in torch.split(found, sizes):
        if len(piece):
            assert int(piece.min()) == highest + 1
            highest = int(piece.max())
    if parts and all(isinstance(part, int) for part in parts):
        assert torch.equal(found, torch.arange(len(found))[:, None].expand(-1, 3))
