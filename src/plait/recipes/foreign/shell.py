"""Arguments in a shell script or a file of arguments, with their lines; nothing is run.

What is read: words that begin with ``--``, wherever they stand (a command, an array, quoted text given to a variable),
and plain variables in their values. What only a shell can know (``$(...)``, ``$1``, a variable that is given twice)
stays as it is and is said.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from plait.core.errors import ConfigError
from plait.recipes.foreign.account import FromShell, Leaf

_ASSIGNS = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(\+?)=(.*)", re.DOTALL)
_OPTION = re.compile(r"--[A-Za-z][A-Za-z0-9_.-]*(=.*)?", re.DOTALL)
_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)(?::?-([^{}$]*))?\})")
_DEPTH = 10


@dataclass(frozen=True, slots=True)
class Word:
    """A word of a script.

    Attributes:
        text: Without quotes.
        line: Where it begins, from 1.
        literal: Whether single quotes keep the shell from replacing variables in it.
        sign: Whether it is an operator, such as ``;`` or the end of a line.
    """

    text: str
    line: int
    literal: bool = False
    sign: bool = False


@dataclass(slots=True)
class _Read:
    """What a script holds."""

    options: list[tuple[Word, list[Word]]] = field(default_factory=list[tuple[Word, list[Word]]])
    values: dict[str, list[Word]] = field(default_factory=dict[str, list[Word]])


def read_arguments(
    text: str, path: Path, *, several: Iterable[str] = (), variables: Mapping[str, str] | None = None
) -> list[Leaf]:
    """Every argument of a script.

    Args:
        text: Of the file.
        path: Of the file.
        several: Arguments that take more than one word, without dashes.
        variables: What the shell would know, by name.

    Raises:
        ConfigError: A quote or bracket is not closed, or there is no argument.
    """
    read = _Read()
    _collect(list(_words(text, path)), read)
    many = frozenset(several)
    leaves = [_leaf(option, given, read, path=path, many=many, known=variables or {}) for option, given in read.options]
    if not leaves:
        raise ConfigError(
            "no argument such as --lr 1e-4 in it", place=str(path), remedy="give the script that starts the training"
        )
    return leaves


# --- words ---------------------------------------------------------------------------------------------------------


def _words(text: str, path: Path) -> Iterator[Word]:
    """Words, as a shell tells them apart."""
    place, line, size = 0, 1, len(text)
    held: list[str] = []
    begun, literal = 0, False
    while place < size:
        letter = text[place]
        if letter == "\\" and place + 1 < size:
            if text[place + 1] == "\n":
                line += 1
            else:
                held.append(text[place + 1])
                begun = begun or line
            place += 2
            continue
        if letter in "'\"" or text.startswith("$(", place) or letter == "`":
            begun = begun or line
            end = _closing(text, place, path, line=line)
            inner = text[place + 1 : end - 1] if letter in "'\"" else text[place:end]
            literal = literal or letter == "'"
            held.append(inner)
            line += text.count("\n", place, end)
            place = end
            continue
        if letter == "#" and not begun:
            place = text.find("\n", place) if "\n" in text[place:] else size
            continue
        if letter.isspace() or letter in ";&|()<>":
            if begun:
                yield Word("".join(held), begun, literal)
                held, begun, literal = [], 0, False
            if letter == "\n" or not letter.isspace():
                yield Word(letter, line, sign=True)
            line += letter == "\n"
            place += 1
            continue
        begun = begun or line
        held.append(letter)
        place += 1
    if begun:
        yield Word("".join(held), begun, literal)


def _closing(text: str, place: int, path: Path, *, line: int) -> int:
    """Where a quote, or a command within the text, ends."""
    if text[place] in "'\"`":
        mark, at = text[place], place + 1
        while at < len(text) and text[at] != mark:
            at += 2 if text[at] == "\\" and mark != "'" else 1
        if at < len(text):
            return at + 1
        raise ConfigError(f"the quote {mark} is not closed", place=f"{path}:{line}", remedy="close it")
    depth, at = 0, place + 1
    while at < len(text):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        at += 1
        if not depth:
            return at
    raise ConfigError("the bracket $( is not closed", place=f"{path}:{line}", remedy="close it")


# --- what they say -------------------------------------------------------------------------------------------------


def _collect(words: list[Word], read: _Read) -> None:
    """Sort words into variables and options."""
    place = 0
    while place < len(words):
        word = words[place]
        assigned = None if word.sign else _ASSIGNS.fullmatch(word.text)
        if assigned and not word.text.startswith("-"):
            name, value = assigned[1], assigned[3]
            opens = not value and place + 1 < len(words) and words[place + 1].sign and words[place + 1].text == "("
            if opens:
                end = next((n for n in range(place + 2, len(words)) if words[n].sign and words[n].text == ")"), None)
                stop = len(words) if end is None else end
                _options([inner for inner in words[place + 2 : stop] if not inner.sign], read)
                place = stop + 1
                continue
            if "--" in value:
                inside = [w for w in _words(value, Path()) if not w.sign]
                _options([Word(w.text, word.line + w.line - 1, word.literal) for w in inside], read)
            else:
                read.values.setdefault(name, []).append(Word(value, word.line, word.literal))
            place += 1
            continue
        stop = next((n for n in range(place, len(words)) if words[n].sign), len(words))
        _options(words[place:stop], read)
        place = max(stop, place) + 1


def _options(words: list[Word], read: _Read) -> None:
    """Options among the words of one command; what a script is given after its own name counts, too."""
    current: list[Word] | None = None
    for word in words:
        if _OPTION.fullmatch(word.text):
            name, equals, value = word.text.partition("=")
            current = [Word(value, word.line, word.literal)] if equals else []
            read.options.append((Word(name, word.line), current))
        elif word.text.startswith("-") and not _number(word.text):
            current = None  # such as python -m
        elif re.fullmatch(r"\$\{?\w+\[[@*]\]\}?", word.text):
            current = None
        elif current is not None:
            current.append(word)


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _leaf(
    option: Word, given: list[Word], read: _Read, *, path: Path, many: frozenset[str], known: Mapping[str, str]
) -> Leaf:
    name = option.text.removeprefix("--").replace("-", "_")
    values = [_value(word, read.values, known) for word in given]
    kept: object = True
    if name in many:
        kept = values
    elif values:
        kept = values[0]
    return Leaf(option.text, kept, f"{path}:{option.line}", name)


def _value(word: Word, values: Mapping[str, list[Word]], known: Mapping[str, str]) -> str | FromShell:
    """A word with its variables replaced."""
    if word.literal or not ("$" in word.text or "`" in word.text):
        return word.text
    text, why = word.text, ""
    for _ in range(_DEPTH):
        found = _VARIABLE.search(text)
        if found is None:
            break
        name = found[1] or found[2]
        given = values.get(name, [])
        if name in known:
            text = text.replace(found[0], known[name])
        elif len({one.text for one in given}) == 1:
            text = text.replace(found[0], given[0].text)
        elif given:
            why = f"{name} is given on lines {', '.join(str(one.line) for one in given)}"
            break
        elif found[3] is not None:
            text = text.replace(found[0], found[3])
        else:
            why = f"{name} is given nowhere in the file"
            break
    if "$" in text or "`" in text:
        return FromShell(word.text, why or "only a shell knows it")
    return text
