"""Small safe HTML: every piece of text is escaped unless it was made here; elements are closed by construction."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from urllib.parse import quote


class Html(str):
    """Markup that may stand in the page as it is; only this module and constants make it."""

    __slots__ = ()


Child = str | Iterable[str] | None
"""What an element may hold: markup, text (escaped), several of them, or nothing."""

_VOID = frozenset({"img", "br", "hr", "meta"})


def escape(text: str) -> Html:
    """Text as it shall be read; lone surrogates and NUL, which no page can hold, become U+FFFD.

    Example:
        >>> escape("<b> & 'c'")
        '&lt;b&gt; &amp; &#x27;c&#x27;'
    """
    if isinstance(text, Html):
        return text
    sound = text.encode("utf-8", "replace").decode() if not text.isascii() else text
    return Html(html.escape(sound.replace("\0", "\ufffd")))


def join(*children: Child) -> Html:
    """Pieces one after the other."""
    parts: list[str] = []
    for child in children:
        if isinstance(child, str):
            parts.append(escape(child))
        elif child is not None:
            parts += [escape(part) for part in child]
    return Html("".join(parts))


def el(name: str, *children: Child, cls: str = "", attrs: Mapping[str, str] | None = None) -> Html:
    """An element.

    Args:
        name: Tag.
        *children: What is in it; plain text is escaped.
        cls: Classes.
        attrs: Other attributes; values are escaped.

    Example:
        >>> el("p", "1 < 2", cls="note")
        '<p class="note">1 &lt; 2</p>'
    """
    every = ({"class": cls} if cls else {}) | dict(attrs or {})
    head = "".join(f' {key}="{escape(value)}"' for key, value in every.items())
    return Html(f"<{name}{head}>" if name in _VOID else f"<{name}{head}>{join(*children)}</{name}>")


def origin(*files: str) -> Html:
    """In small type: the files that numbers come from, as links relative to the run folder, where the page lies."""
    links = [el("a", name, attrs={"href": quote(name)}) for name in files]
    return el("p", "from ", Html(", ".join(links)), cls="origin")


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, label: str, left: int = 1) -> Html:
    """A table that scrolls by itself where the screen is narrow.

    Args:
        head: Names of the columns.
        rows: Cells, text or markup.
        label: What it is, for those who do not see it.
        left: How many columns hold words; those after them hold numbers.
    """

    def cell(tag: str, at: int, text: str) -> Html:
        return el(tag, text, cls="" if at < left else "num", attrs={"scope": "col"} if tag == "th" else None)

    top = el("thead", el("tr", [cell("th", at, text) for at, text in enumerate(head)]))
    body = el("tbody", [el("tr", [cell("td", at, text) for at, text in enumerate(row)]) for row in rows])
    attrs = {"role": "region", "aria-label": label, "tabindex": "0"}
    return el("div", el("table", top, body), cls="scroll", attrs=attrs)


def fold(summary: Child, *children: Child, shown: bool = False) -> Html:
    """A part that opens when asked to."""
    return el("details", el("summary", summary), *children, attrs={"open": ""} if shown else None)


def alert(text: str, *, kind: str = "warning", origin_file: str = "") -> Html:
    """A line nobody should miss."""
    word = el("strong", f"{kind.capitalize()}: ")
    return el("p", word, text, origin_file and el("span", f" ({origin_file})", cls="origin"), cls=f"alert {kind}")


# --- numbers -------------------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """Time as people say it.

    Example:
        >>> duration(37.58), duration(245), duration(7322)
        ('37.6 s', '4 min 05 s', '2 h 02 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def mebibytes(size: int | float) -> str:
    """Bytes as people say them.

    Example:
        >>> mebibytes(312_701_952), mebibytes(52_000)
        ('298.2 MiB', '0.05 MiB')
    """
    shown = size / 2**20
    return f"{shown:,.1f} MiB" if shown >= 1 else f"{shown:.2f} MiB"


def number(value: object) -> str:
    """A number or word for a cell: thousands apart, four digits that count.

    Example:
        >>> number(8504), number(0.19554980), number(3.4e-7), number(True), number("x")
        ('8,504', '0.1955', '3.4e-07', 'yes', 'x')
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if 10_000 <= abs(value) < 1e15 else f"{value:.4g}"
    return "–" if value is None else str(value)
