"""The loss-mask picture: a batch as the model gets it, token by token, and which tokens a loss is taken on.

It is drawn with Pillow and Pillow's own font alone, so that it looks the same on every machine. That font knows ASCII:
other characters are written as their code points, bytes that are no whole character in hex, and the legend says so.
"""

from __future__ import annotations

import functools
import io
import itertools
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from plait.core.files import write_atomic
from plait.report.token_boxes import Box, Canvas, box_width, wrap

WIDTH = 1_400
"""Pixels across."""
HEIGHT = 2_400
"""Most pixels down; what does not fit is counted in words."""

_EDGE = 24
_THUMB = 64
_THUMBS = 3
_GAP = 3  # between boxes
_LINE = 34  # a row of boxes with the space below it
_LABEL = 20
_BETWEEN = 14
_FOOT = 44
_LONGEST = 48  # characters of one token that are drawn


@dataclass(frozen=True, slots=True)
class Cell:
    """One position of a row.

    Attributes:
        text: What the token says; bytes that are no whole character as lone surrogates (``surrogateescape``).
        trained: Whether a loss is taken on predicting this token.
        image: Whether an image feature stands here.
        segment: Which sample of the row it belongs to, from 1; 0 is padding.
    """

    text: str
    trained: bool
    image: bool
    segment: int


@dataclass(frozen=True, slots=True)
class Block:
    """One sample as it is drawn.

    Attributes:
        label: Where it stands and how many tokens it has.
        lines: Boxes in reading order, wrapped.
        pictures: Numbers of its pictures, counted over the whole batch.
        hidden: Tokens left out because the sample alone is higher than the picture.
    """

    label: str
    lines: Sequence[Sequence[Box]]
    pictures: Sequence[int]
    hidden: int = 0

    @property
    def height(self) -> int:
        """Pixels down, with the space to the next."""
        return max(_THUMB, _LABEL + _LINE * len(self.lines) + (_LABEL if self.hidden else 0)) + _BETWEEN


@dataclass(frozen=True, slots=True)
class Sheet:
    """Samples laid out.

    Attributes:
        blocks: Samples drawn, in reading order.
        more_samples: Samples that did not fit.
        more_tokens: Their tokens.
    """

    blocks: Sequence[Block]
    more_samples: int
    more_tokens: int


@dataclass(frozen=True, slots=True)
class Counts:
    """What a batch holds, drawn or not.

    Attributes:
        places: All positions.
        tokens: Those that are no padding.
        spans: Runs of image tokens: as many as there are pictures, if text stands between them.
    """

    places: int
    tokens: int
    trained: int
    context: int
    image: int
    spans: int

    @staticmethod
    def of(rows: Sequence[Sequence[Cell]]) -> Counts:
        """Count a batch."""
        real = [cell for row in rows for cell in row if cell.segment]
        return Counts(
            places=sum(map(len, rows)),
            tokens=len(real),
            trained=sum(cell.trained for cell in real),
            context=sum(not cell.trained and not cell.image for cell in real),
            image=sum(cell.image for cell in real),
            spans=sum(_spans(sample) for *_, sample in _samples(rows)),
        )


# --- batches to cells ------------------------------------------------------------------------------------------------


def cells(
    token_ids: Sequence[Sequence[int]],
    trained: Sequence[Sequence[bool | int]],
    segments: Sequence[Sequence[int]],
    *,
    placeholders: Collection[int],
    decode: Callable[[int], str],
) -> list[list[Cell]]:
    """A batch as cells.

    Args:
        token_ids: Rows of ids.
        trained: Same shape: whether this very id is predicted under a loss (its label is not ignored).
        segments: Same shape: sample of the row from 1, padding 0.
        placeholders: Ids that stand for a token of a picture or sound.
        decode: Text of one id, asked once for each; for byte-level tokenizers :func:`byte_level_text` of its piece.
            Where it gives U+FFFD, a part of a character, the id is told beside it.

    Raises:
        ValueError: The three differ in shape.

    Example:
        >>> (row,) = cells([[5, 9, 0]], [[0, 1, 0]], [[1, 1, 0]], placeholders=[5], decode=str)
        >>> [(cell.text, cell.image, cell.trained, cell.segment) for cell in row]
        [('', True, False, 1), ('9', False, True, 1), ('', False, False, 0)]
    """

    @functools.cache
    def text(token: int) -> str:
        said = decode(token)
        return f"\ufffd#{token}" if "\ufffd" in said else said

    def cell(token: int, is_trained: bool | int, segment: int) -> Cell:
        image = segment != 0 and token in placeholders
        words = "" if image or segment == 0 else text(token)
        return Cell(words, trained=bool(is_trained), image=image, segment=segment)

    return [
        [cell(*position) for position in zip(*row, strict=True)]
        for row in zip(token_ids, trained, segments, strict=True)
    ]


@functools.cache
def _byte_of() -> dict[str, int]:
    """Bytes by the characters that stand for them in byte-level BPE.

    Bytes that print in Latin-1 stand for themselves, the others for U+0100 and up (GPT-2, Radford et al. 2019).
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(0x100) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + at): byte for at, byte in enumerate(rest)}


def byte_level_text(piece: str) -> str:
    r"""Text of a piece of a byte-level vocabulary; bytes that are no whole character become lone surrogates.

    Example:
        >>> byte_level_text("Ġthe"), byte_level_text("<|im_start|>"), byte_level_text("è¿")
        (' the', '<|im_start|>', '\udce8\udcbf')
    """
    table = _byte_of()
    if not all(character in table for character in piece):
        return piece  # an added token is written as it is
    return bytes(table[character] for character in piece).decode("utf-8", "surrogateescape")


# --- cells to a picture ----------------------------------------------------------------------------------------------


def lay_out(rows: Sequence[Sequence[Cell]], *, room: int = HEIGHT) -> Sheet:
    """Samples in reading order while there is room: every token that is no padding is in a box, or counted as left out.

    Args:
        rows: Of :func:`cells`.
        room: Pixels down for the samples; of a first sample higher than that, as many lines as fit.
    """
    samples = _samples(rows)
    blocks: list[Block] = []
    first_picture = used = 0
    for row, segment, sample in samples:
        block = _block(sample, label=f"row {row}, sample {segment}", first_picture=first_picture)
        if not blocks and block.height > room:
            block = _cut(block, room)
        elif used + block.height > room:
            break
        blocks.append(block)
        used += block.height
        first_picture += len(block.pictures)
    left = samples[len(blocks) :]
    return Sheet(blocks, more_samples=len(left), more_tokens=sum(len(sample) for *_, sample in left))


def draw_batch(
    rows: Sequence[Sequence[Cell]],
    pictures: Sequence[Image.Image],
    path: Path,
    *,
    title: str,
    notes: Sequence[str],
) -> None:
    """Draw a batch as a PNG; the same input gives the same bytes.

    Args:
        rows: Of :func:`cells`.
        pictures: One for each run of image tokens, in reading order; fewer will do, from the first on.
        path: Where the PNG goes; its folder must be there.
        title: Said above.
        notes: Said below the title, a line each; a line that is too long is wrapped.

    Raises:
        ResourceError: The disk is full or not writable.
    """
    canvas, counts = Canvas(WIDTH, HEIGHT), Counts.of(rows)
    top = _head(canvas, title, notes)
    top = canvas.legend((_EDGE, top), WIDTH - _EDGE, _legend(counts)) + _BETWEEN
    sheet = lay_out(rows, room=HEIGHT - top - _FOOT)
    for block in sheet.blocks:
        _draw_block(canvas, block, pictures, top=top)
        top += block.height
    for line in _rest(sheet, counts, len(pictures)):
        canvas.say((_EDGE, top), line, size=15, color="ink")
        top += _LABEL
    data = io.BytesIO()
    canvas.image.crop((0, 0, WIDTH, min(top + _BETWEEN, HEIGHT))).save(data, "PNG", optimize=True)
    write_atomic(path, data.getvalue())


def _head(canvas: Canvas, title: str, notes: Sequence[str]) -> int:
    top = _EDGE
    canvas.say((_EDGE, top), title, size=26, color="ink")
    top += 38
    for note in notes:
        for line in canvas.fold(note, size=15, width=WIDTH - 2 * _EDGE):
            canvas.say((_EDGE, top), line, size=15, color="soft")
            top += _LABEL
    return top + 8


def _legend(counts: Counts) -> list[tuple[str, Box | None]]:
    """What each kind of box is and how many there are, and how odd characters are written."""

    def box(text: str, *, trained: bool = False, image: bool = False) -> Box:
        return Box(text, 1, trained=trained, image=image)

    padding = counts.places - counts.tokens
    places = f"{_percent(padding, counts.places)} of {counts.places:,} places"
    pictures = "picture" if counts.spans == 1 else "pictures"
    return [
        (f"trained: {counts.trained:,} of {counts.tokens:,} tokens", box("token", trained=True)),
        (f"context, not trained: {counts.context:,}", box("token")),
        (f"image tokens: {counts.image:,} in {counts.spans:,} {pictures}", box("x 4", image=True)),
        (f"padding, not drawn: {padding:,} ({places})", None),
        ("space", box(" ")),
        ("newline", box("\n")),
        ("a character this font does not write, by its code point", box("\u72d7")),
        ("a byte that is no whole character, in hex", box("\udce8")),
    ]


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "0 %"


def _rest(sheet: Sheet, counts: Counts, pictures: int) -> list[str]:
    """What is not in the picture, in words."""
    lines: list[str] = []
    if sheet.more_samples:
        noun = "sample" if sheet.more_samples == 1 else "samples"
        lines.append(f"and {sheet.more_samples:,} more {noun} with {sheet.more_tokens:,} tokens")
    if pictures > counts.spans:
        lines.append(f"{pictures:,} pictures were given for {counts.spans:,} runs of image tokens")
    return lines


def _samples(rows: Sequence[Sequence[Cell]]) -> list[tuple[int, int, list[Cell]]]:
    """Row from 1, segment and cells of each sample, in reading order, without padding."""
    return [
        (number, segment, list(sample))
        for number, row in enumerate(rows, 1)
        for segment, sample in itertools.groupby(row, key=lambda cell: cell.segment)
        if segment
    ]


def _spans(sample: Sequence[Cell]) -> int:
    return sum(image for image, _ in itertools.groupby(sample, key=lambda cell: cell.image))


def _block(sample: Sequence[Cell], *, label: str, first_picture: int) -> Block:
    spans, trained = _spans(sample), sum(cell.trained for cell in sample)
    said = f"{label}: {len(sample):,} {'token' if len(sample) == 1 else 'tokens'}, {trained:,} trained"
    lines = wrap(_boxes(sample), width=WIDTH - _EDGE - _left(spans), gap=_GAP)
    return Block(said, lines, range(first_picture, first_picture + spans))


def _left(pictures: int) -> int:
    """Where boxes begin: for samples with one picture and with none at the same place, so that they stand in line."""
    return _EDGE + max(1, min(pictures, _THUMBS)) * (_THUMB + 8) + 8


def _boxes(sample: Iterable[Cell]) -> list[Box]:
    """One box a token, one for a whole run of image tokens."""
    boxes: list[Box] = []
    for (image, trained), run in itertools.groupby(sample, key=lambda cell: (cell.image, cell.trained)):
        its = list(run)
        if image:
            noun = "image token" if len(its) == 1 else "image tokens"
            boxes.append(Box(f"x {len(its):,} {noun}", len(its), trained=trained, image=True))
        else:
            boxes += [Box(_short(cell.text), 1, trained=trained, image=False) for cell in its]
    return boxes


def _short(text: str) -> str:
    """A very long token, such as a hundred spaces, by its beginning and its length."""
    cut = text[:_LONGEST]
    while box_width(Box(cut, 1, trained=False, image=False)) > WIDTH // 2:
        cut = cut[: len(cut) // 2]
    return text if cut == text else f"{cut}… ({len(text):,} characters)"


def _cut(block: Block, room: int) -> Block:
    """As many lines of a sample as there is room for."""
    lines = max(1, (room - 2 * _LABEL - _BETWEEN) // _LINE)
    hidden = sum(box.tokens for line in block.lines[lines:] for box in line)
    return Block(block.label, block.lines[:lines], block.pictures, hidden)


def _draw_block(canvas: Canvas, block: Block, pictures: Sequence[Image.Image], *, top: int) -> None:
    for place, at in enumerate(block.pictures[:_THUMBS]):
        corner = (_EDGE + place * (_THUMB + 8), top)
        canvas.thumbnail(corner, pictures[at] if at < len(pictures) else None, side=_THUMB)
    left = _left(len(block.pictures))
    more = len(block.pictures) - _THUMBS
    canvas.say((left, top), block.label + (f", {more} more pictures" if more > 0 else ""), size=13, color="soft")
    y = top + _LABEL
    for line in block.lines:
        x = left
        for box in line:
            canvas.box((x, y), box)
            x += box_width(box) + _GAP
        y += _LINE
    if block.hidden:
        canvas.say((left, y), f"and {block.hidden:,} more tokens of this sample", size=15, color="ink")
