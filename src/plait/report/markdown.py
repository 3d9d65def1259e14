"""The Markdown our own cards use (headings, paragraphs, lists, tables, code), and no more: no links, no raw HTML."""

from __future__ import annotations

import re

from plait.report.markup import Html, el, join, table

_INLINE = re.compile(r"\*\*(?P<strong>[^*]+)\*\*|`(?P<code>[^`]+)`")
_HEADING = re.compile(r"(#{1,6}) +(.+)")
_RULE = re.compile(r"\|( *:?-{3,}:? *\|)+")
_CELL = re.compile(r"(?<!\\)\|")


def render(text: str, *, level: int) -> Html:
    r"""Markdown as markup; whatever is not understood is shown as it was written.

    Args:
        text: The Markdown.
        level: What a first-level heading becomes: 3 makes ``#`` an ``h3``.

    Example:
        >>> render("# A <b>\n\nSome `code`.", level=3)
        '<h3>A &lt;b&gt;</h3><p>Some <code>code</code>.</p>'
    """
    found: list[Html] = []
    lines = text.splitlines()
    at, deepest = 0, level - 1
    while at < len(lines):
        line = lines[at]
        if not line.strip():
            at += 1
            continue
        if heading := _HEADING.fullmatch(line):
            # A level is never skipped, however the card was written.
            deepest = min(level + len(heading[1]) - 1, deepest + 1, 6)
            found.append(el(f"h{deepest}", inline(heading[2])))
            at += 1
            continue
        end = _end_of_block(lines, at)
        found.append(_block(lines[at:end]))
        at = end
    return join(found)


def inline(text: str) -> Html:
    """Strong words and code; the rest is text."""
    parts: list[str] = []
    at = 0
    for match in _INLINE.finditer(text):
        kind = match.lastgroup or "strong"
        parts += [text[at : match.start()], el(kind, match[kind])]
        at = match.end()
    return join(parts, text[at:])


def _end_of_block(lines: list[str], at: int) -> int:
    """One past the last line of the block that begins here: a fence, or lines up to an empty one or a heading."""
    fence = lines[at].startswith("```")
    end = at + 1
    while end < len(lines):
        if fence and lines[end].startswith("```"):
            return end + 1
        if not fence and (not lines[end].strip() or _HEADING.fullmatch(lines[end]) or lines[end].startswith("```")):
            return end
        end += 1
    return end


def _block(lines: list[str]) -> Html:
    if lines[0].startswith("```"):
        body = lines[1:-1] if len(lines) > 1 and lines[-1].startswith("```") else lines[1:]
        return el("pre", "\n".join(body), attrs={"tabindex": "0"})
    if lines[0].startswith("- "):
        items: list[str] = []
        for line in lines:
            if line.startswith("- "):
                items.append(line[2:])
            else:
                items[-1] += f" {line.strip()}"
        return el("ul", [el("li", inline(item)) for item in items])
    if len(lines) > 1 and lines[0].startswith("|") and _RULE.fullmatch(lines[1].strip()):
        head, *rows = [_cells(line) for line in (lines[0], *lines[2:])]
        return table(head, rows, label=", ".join(head), left=len(head))
    return el("p", inline(" ".join(lines)))


def _cells(line: str) -> list[Html]:
    cells = _CELL.split(line.strip().strip("|"))
    return [inline(cell.strip().replace("\\|", "|")) for cell in cells]
