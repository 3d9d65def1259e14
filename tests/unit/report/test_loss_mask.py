"""The loss-mask picture: every token is in a box or counted, and the same batch gives the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from plait.report.loss_mask import HEIGHT, WIDTH, Cell, Counts, byte_level_text, cells, draw_batch, lay_out
from plait.report.token_boxes import pieces

pytestmark = pytest.mark.light

CELL = st.builds(
    Cell,
    text=st.text(max_size=12),
    trained=st.booleans(),
    image=st.booleans(),
    segment=st.integers(0, 3),
)


@settings(deadline=None)
@given(st.lists(st.lists(CELL, max_size=40), max_size=6), st.integers(60, 2_000))
def test_every_token_is_in_a_box_or_counted(rows: list[list[Cell]], room: int) -> None:
    sheet = lay_out(rows, room=room)
    boxes = [box for block in sheet.blocks for line in block.lines for box in line]
    drawn = sum(box.tokens for box in boxes) + sum(block.hidden for block in sheet.blocks)
    counts = Counts.of(rows)
    assert drawn + sheet.more_tokens == counts.tokens
    if not sheet.more_samples and not any(block.hidden for block in sheet.blocks):
        assert sum(box.tokens for box in boxes if box.trained) == counts.trained
        assert sum(box.tokens for box in boxes if box.image) == counts.image
        assert sum(box.image for box in boxes) >= counts.spans
    assert sum(block.height for block in sheet.blocks) <= max(room, 120)


def test_a_batch_becomes_cells() -> None:
    texts = {1: "<|im_start|>", 4: "\ufffd"}
    (row,) = cells([[1, 9, 9, 4, 0]], [[0, 0, 0, 1, 0]], [[1, 1, 1, 1, 0]], placeholders=[9], decode=lambda i: texts[i])
    assert [c.text for c in row] == ["<|im_start|>", "", "", "\ufffd#4", ""], "a part of a character tells its id"
    assert [c.image for c in row] == [False, True, True, False, False]
    assert [c.trained for c in row] == [False, False, False, True, False]
    with pytest.raises(ValueError, match="shorter"):
        cells([[1, 2]], [[0]], [[1, 1]], placeholders=[9], decode=str)


@given(st.binary(max_size=20))
def test_bytes_survive_the_way_through_a_vocabulary(data: bytes) -> None:
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(0x100) if byte not in plain]
    piece = "".join(chr(byte) if byte in plain else chr(0x100 + rest.index(byte)) for byte in data)
    assert byte_level_text(piece).encode("utf-8", "surrogateescape") == data


@given(st.text(max_size=20))
def test_no_character_of_a_token_is_lost(text: str) -> None:
    stretches = pieces(text)
    written = sum(len(said) if kind == "text" else 1 for kind, said in stretches)
    assert written == max(len(text), 1)


def test_the_same_batch_gives_the_same_bytes_within_the_size(tmp_path: Path) -> None:
    sample = [Cell("", trained=False, image=True, segment=1)] * 4
    sample += [Cell(" dog\n狗\udce8", trained=True, image=False, segment=1)] * 20
    rows = [[*sample, Cell("", trained=False, image=False, segment=0)]] * 80
    pictures = [Image.new("RGBA", (72, 72), (200, at, 0, 90)) for at in range(3)]
    for name in ("a.png", "b.png"):
        draw_batch(rows, pictures, tmp_path / name, title="First batch", notes=["a note " * 60])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as drawn:
        assert drawn.width == WIDTH
        assert drawn.height <= HEIGHT


def test_an_empty_batch_and_a_token_of_a_thousand_spaces_are_drawn(tmp_path: Path) -> None:
    draw_batch([], [], tmp_path / "empty.png", title="nothing", notes=[])
    draw_batch([[Cell(" " * 1000, trained=True, image=False, segment=1)]], [], tmp_path / "x.png", title="", notes=[])
    assert (tmp_path / "x.png").stat().st_size > 0
