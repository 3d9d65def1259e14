"""Text and token boxes on a picture, in Pillow's own font: what that font cannot write is written in another way."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from PIL import Image, ImageDraw, ImageFont, ImageOps

# Blue and amber of Okabe and Ito (2008), which people with any kind of color vision tell apart; in gray they still
# differ by lightness, and each kind of box has a form of its own: a bar below, a dashed frame, a thin frame.
_COLORS = {
    "paper": "#ffffff",
    "ink": "#1b1f24",
    "soft": "#59636e",
    "line": "#c4cad1",
    "context": "#f1f3f5",
    "trained": "#0072b2",
    "bar": "#00304d",
    "image": "#fbe9c0",
    "frame": "#8a5a00",
}

_SIZE = 17
_SMALL = 12
_PAD = 6
_HIGH = 28
_BAR = 4
_DASH = 5
_MARK = 13  # width of a sign drawn by hand
_BEYOND_ASCII = "«»‘’“”‹›…°±©™"  # what the font writes beside ASCII

Kind = Literal["text", "small", "space", "newline"]
Piece = tuple[Kind, str]
"""How a stretch of a token is written, and its letters."""


@dataclass(frozen=True, slots=True)
class Box:
    """What stands in one box: a token, or a run of image tokens.

    Attributes:
        text: As the token says it.
        tokens: How many tokens it stands for.
    """

    text: str
    tokens: int
    trained: bool
    image: bool


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


@functools.lru_cache(maxsize=4_096)
def _length(text: str, size: int) -> int:
    return round(_font(size).getlength(text))


def pieces(text: str) -> list[Piece]:
    r"""A token's text as what can be drawn: nothing in it is left out.

    Spaces become dots and newlines arrows; bytes that are no whole character (lone surrogates, as ``surrogateescape``
    makes them) are written in hex, other characters that are not ASCII as code points, control characters escaped.

    Example:
        >>> pieces(" a\n"), pieces("狗")
        ([('space', ' '), ('text', 'a'), ('newline', '\n')], [('small', 'U+72D7')])
        >>> pieces("\udce8"), pieces("")
        ([('small', 'xE8')], [('small', 'empty')])
    """
    found: list[Piece] = []
    for character in text:
        kind, said = _piece(character)
        if kind == "text" and found and found[-1][0] == "text":
            found[-1] = ("text", found[-1][1] + said)
        else:
            found.append((kind, said))
    return found or [("small", "empty")]


def _piece(character: str) -> Piece:
    code = ord(character)
    if character == " ":
        return "space", character
    if character == "\n":
        return "newline", character
    if character in _BEYOND_ASCII or 0x20 < code < 0x7F:
        return "text", character
    if code < 0x20 or code == 0x7F:
        return "small", character.encode("unicode_escape").decode()
    if 0xDC80 <= code <= 0xDCFF:
        return "small", f"x{code - 0xDC00:02X}"
    return "small", f"U+{code:04X}"


def _piece_width(piece: Piece) -> int:
    kind, said = piece
    if kind == "text":
        return _length(said, _SIZE)
    if kind == "small":
        return _length(said, _SMALL) + 4
    return 6 if kind == "space" else _MARK


def box_width(box: Box) -> int:
    """Pixels across."""
    sign = _MARK + 6 if box.image else 0
    words = _length(box.text, _SIZE) if box.image else sum(map(_piece_width, pieces(box.text)))
    return max(words + sign, 6) + 2 * _PAD


def wrap(boxes: Sequence[Box], *, width: int, gap: int) -> list[list[Box]]:
    """Boxes in lines no wider than ``width``; a box wider than that has a line of its own."""
    lines: list[list[Box]] = []
    used = 0
    for box in boxes:
        own = box_width(box) + gap
        if not lines or used + own - gap > width:
            lines.append([])
            used = 0
        lines[-1].append(box)
        used += own
    return lines


class Canvas:
    """A white picture to draw on.

    Args:
        width: Pixels.
        height: Pixels.
    """

    def __init__(self, width: int, height: int) -> None:
        self.image = Image.new("RGB", (width, height), _COLORS["paper"])
        self._draw = ImageDraw.Draw(self.image)

    def say(self, at: tuple[int, int], text: str, *, size: int, color: Literal["ink", "soft"]) -> None:
        """A line of text; what the font cannot write is escaped."""
        self._draw.text(at, plain(text), font=_font(size), fill=_COLORS[color])

    def thumbnail(self, at: tuple[int, int], picture: Image.Image | None, *, side: int) -> None:
        """A picture fitted into a framed square; None leaves the frame empty, with a cross."""
        x, y = at
        right, bottom = x + side - 1, y + side - 1
        if picture is None:
            self._draw.line((x, y, right, bottom), fill=_COLORS["line"])
            self._draw.line((x, bottom, right, y), fill=_COLORS["line"])
        else:
            small = ImageOps.contain(_on_white(picture), (side, side), Image.Resampling.LANCZOS)
            self.image.paste(small, (x + (side - small.width) // 2, y + (side - small.height) // 2))
        self._draw.rectangle((x, y, right, bottom), outline=_COLORS["line"])

    def box(self, at: tuple[int, int], box: Box) -> None:
        """A token: trained ones dark, with a bar below; runs of image tokens in a dashed frame, with a sign."""
        x, y = at
        right, bottom = x + box_width(box) - 1, y + _HIGH - 1
        fill = "trained" if box.trained else "image" if box.image else "context"
        self._draw.rectangle((x, y, right, bottom), fill=_COLORS[fill])
        if box.image:
            self._dashed((x, y, right, bottom))
        else:
            frame = "bar" if box.trained else "line"
            self._draw.rectangle((x, y, right, bottom), outline=_COLORS[frame])
        if box.trained:
            self._draw.rectangle((x, bottom - _BAR + 1, right, bottom), fill=_COLORS["bar"])
        color = _COLORS["paper" if box.trained else "ink"]
        faint = _COLORS["paper" if box.trained else "soft"]
        left = x + _PAD
        if box.image:
            self._draw.rectangle((left, y + 8, left + _MARK - 2, y + 8 + _MARK - 2), outline=color, width=2)
            self._text((left + _MARK + 6, y), box.text, _SIZE, fill=color)
            return
        for piece in pieces(box.text):
            self._write((left, y), piece, color=color, faint=faint)
            left += _piece_width(piece)

    def legend(self, at: tuple[int, int], right: int, items: Sequence[tuple[str, Box | None]]) -> int:
        """Words, each behind the box it explains, wrapped before ``right``; gives where the next thing may stand."""
        x, y = at
        for words, box in items:
            own = (box_width(box) + 8 if box else 0) + _length(plain(words), 15)
            if x + own > right and x > at[0]:
                x, y = at[0], y + _HIGH + 8
            if box:
                self.box((x, y), box)
            self.say((x + own - _length(plain(words), 15), y + 5), words, size=15, color="ink")
            x += own + 28
        return y + _HIGH + 8

    def fold(self, text: str, *, size: int, width: int) -> list[str]:
        """Text in lines no wider than ``width``, broken between words."""
        lines: list[str] = []
        for word in plain(text).split():
            if lines and _length(f"{lines[-1]} {word}", size) <= width:
                lines[-1] += f" {word}"
            else:
                lines.append(word)
        return lines

    def _write(self, at: tuple[int, int], piece: Piece, *, color: str, faint: str) -> None:
        x, y = at
        kind, said = piece
        middle = y + _HIGH // 2
        if kind == "text":
            self._text(at, said, _SIZE, fill=color)
        elif kind == "small":
            self._text((x + 2, y), said, _SMALL, fill=color)
        elif kind == "space":
            self._draw.rectangle((x + 2, middle, x + 3, middle + 1), fill=faint)
        else:  # down, then to the left: the font has no such arrow
            end = x + _MARK - 3
            self._draw.line((end, middle - 6, end, middle + 3, x + 1, middle + 3), fill=color, width=2)
            self._draw.polygon([(x, middle + 3), (x + 5, middle - 1), (x + 5, middle + 7)], fill=color)

    def _text(self, at: tuple[int, int], text: str, size: int, *, fill: str) -> None:
        """On the baseline that all boxes share."""
        self._draw.text((at[0], at[1] + 19), text, font=_font(size), fill=fill, anchor="ls")

    def _dashed(self, around: tuple[int, int, int, int]) -> None:
        left, top, right, bottom = around
        for x in range(left, right, 2 * _DASH):
            for y in (top, bottom):
                self._draw.line((x, y, min(x + _DASH - 1, right), y), fill=_COLORS["frame"])
        for y in range(top, bottom, 2 * _DASH):
            for x in (left, right):
                self._draw.line((x, y, x, min(y + _DASH - 1, bottom)), fill=_COLORS["frame"])


def _on_white(picture: Image.Image) -> Image.Image:
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    ground = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(ground, picture.convert("RGBA")).convert("RGB")


def plain(text: str) -> str:
    r"""A line of text as the font can write it.

    Example:
        >>> plain("an … 狗"), plain("a\tb")
        ('an … U+72D7', 'a b')
    """
    return "".join(said if kind != "newline" else " " for kind, said in map(_piece, text.replace("\t", " ")))
