"""The YAML of recipes: a safe subset, read so that every value knows its line, merged, and written back.

Plain words follow YAML 1.2 (https://yaml.org/spec/1.2.2/#103-core-schema): ``no`` and ``on`` are text, ``010`` is ten
and ``1e-4`` is a number. What differs: ``1e6`` is a whole number, so that it can stand for a count. Tags, anchors and
aliases are refused, a key given twice is an error, size and nesting have limits: a stranger's recipe is safe to read.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (the stubs of PyYAML leave types out)
from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, TypeGuard

import yaml

from plait.core.errors import ConfigError

SIZE_LIMIT = 1_000_000
"""Largest file read, in bytes."""

DEPTH_LIMIT = 50
"""Deepest nesting read."""

Keys = tuple[str, ...]
"""A dotted path, taken apart; items of a list are counted from ``"0"``."""

Scalar = str | int | float | None
"""What a plain value may be; bool is an int."""

_MEND = "mend the YAML"


@dataclass(frozen=True, slots=True)
class Source:
    """Where a value came from.

    Attributes:
        kind: Nobody gave it, a file did, the command line did, or it follows from another setting.
        place: The file, the override as typed, or the setting it follows from.
        line: Line in the file, from 1.
    """

    kind: Literal["default", "file", "override", "derived"]
    place: str = ""
    line: int = 0

    def __str__(self) -> str:
        if self.kind == "file":
            return f"{Path(self.place).name}:{self.line}"
        if self.kind == "derived":
            return f"from {self.place}"
        return f"override {self.place!r}" if self.kind == "override" else "default"

    @property
    def where(self) -> str:
        """As the place of an error: the file with its folder."""
        return f"{self.place}:{self.line}" if self.kind == "file" else str(self)


@dataclass(frozen=True, slots=True)
class Node:
    """A value that knows where it was written.

    Attributes:
        value: Plain scalar, or mapping or list of nodes.
        source: Where its key (or list item) stands.
        removes: A null that took away what an earlier layer had.
    """

    value: dict[str, Node] | list[Node] | Scalar
    source: Source
    removes: bool = False

    def plain(self) -> Any:
        """The value without the places."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        return [node.plain() for node in self.value] if isinstance(self.value, list) else self.value

    def get(self, key: str) -> Node | None:
        """The node under a key, or under an item number; None where there is none."""
        if isinstance(self.value, dict):
            return self.value.get(key)
        if isinstance(self.value, list) and key.isascii() and key.isdigit() and int(key) < len(self.value):
            return self.value[int(key)]
        return None

    def without(self, key: str) -> Node:
        """A copy of a mapping that lacks one key."""
        kept = {name: node for name, node in self.value.items() if name != key} if isinstance(self.value, dict) else {}
        return Node(kept, self.source)

    def nearest(self, keys: Sequence[str]) -> tuple[Node, int]:
        """Follow a path as far as it goes: the last node and how many keys led there."""
        node: Node = self
        for number, key in enumerate(keys):
            below = node.get(key)
            if below is None:
                return node, number
            node = below
        return node, len(keys)


# --- reading -------------------------------------------------------------------------------------------------------


def read_file(path: Path) -> Node:
    """Read one YAML file whose top is a mapping.

    Raises:
        ConfigError: It is missing, a folder, too big, empty, not UTF-8, not YAML, not a mapping, or beyond the subset.
    """
    try:
        with path.open("rb") as file:
            data = file.read(SIZE_LIMIT + 1)
    except FileNotFoundError as error:
        raise ConfigError("no such file", place=str(path), remedy="check the path") from error
    except OSError as error:
        remedy = "give the path of a YAML file that can be read"
        raise ConfigError(f"cannot read it: {error.strerror}", place=str(path), remedy=remedy) from error
    if len(data) > SIZE_LIMIT:
        remedy = "a recipe holds settings; put data in files of its own"
        raise ConfigError(f"larger than {SIZE_LIMIT:,} bytes", place=str(path), remedy=remedy)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        cause = f"not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start:,}"
        raise ConfigError(cause, place=f"{path}:{line}", remedy="save the file as UTF-8") from error
    return read_text(text, str(path))


def read_text(text: str, place: str) -> Node:
    """Read YAML whose top is a mapping.

    Args:
        text: The YAML.
        place: What to call it: usually the path of its file.

    Raises:
        ConfigError: As for :func:`read_file`.
    """
    node = _parse(text, lambda line: Source("file", place, line))
    if node is None or node.value is None:
        raise ConfigError("the file is empty", place=place, remedy="write at least `name:` and one setting")
    if not isinstance(node.value, dict):
        cause = f"expected a mapping of settings, came {came(node.plain())}"
        raise ConfigError(cause, place=node.source.where, remedy="write `key: value` lines")
    return node


def read_override(text: str) -> tuple[Keys, Node]:
    """Read one dotted override, such as ``stages.pretrain.steps=50``.

    The value is a YAML scalar, or a flow list or mapping (``[1, 2]``, ``{a: 1}``). A value without quotes or brackets
    is taken whole, so ``prompt=Look: # this`` keeps every letter.

    Raises:
        ConfigError: There is no ``=``, the key or the value is empty, or the value is not YAML.
    """
    source = Source("override", text)
    name, equals, value = text.partition("=")
    value = value.strip()
    keys = tuple(key.strip() for key in name.split("."))
    if not equals or not all(keys):
        raise ConfigError(f"not a key=value override: {text!r}", place=source.where, remedy="write key.below=value")
    if not value:
        remedy = f"write {name}='' for empty text, {name}=null to remove it or set it to nothing"
        raise ConfigError(f"no value for {name!r}", place=source.where, remedy=remedy)
    if value[0] not in "[{\"'":
        return keys, Node(_word(value), source)
    node = _parse(value, lambda line: source)
    return keys, node or Node(None, source)


class _Reader(yaml.SafeLoader):
    """Composes nodes; refuses what recipes do not use before anything is built from it."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            remedy = "write the value out, or use `extends`"
            raise _Refused("anchors and aliases (& and *) are refused", event.start_mark, remedy)
        if getattr(event, "tag", None) is not None:
            raise _Refused(f"the tag {event.tag!r} is refused", event.start_mark, "write the plain value")
        if self.depth >= DEPTH_LIMIT:
            raise _Refused(f"nested deeper than {DEPTH_LIMIT} levels", event.start_mark, "flatten it")
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


class _Refused(Exception):
    def __init__(self, cause: str, mark: Any, remedy: str) -> None:
        super().__init__(cause)
        self.line: int = mark.line + 1
        self.remedy = remedy


def _parse(text: str, at: Callable[[int], Source]) -> Node | None:
    try:
        reader = _Reader(text)
        node = reader.get_single_node()
        return None if node is None else _build(node, at, at(node.start_mark.line + 1))
    except _Refused as refused:
        raise ConfigError(str(refused), place=at(refused.line).where, remedy=refused.remedy) from refused
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        cause = f"the character U+{ord(text[error.position]):04X} is not allowed in YAML"
        raise ConfigError(cause, place=at(line).where, remedy="remove it, or escape it in double quotes") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = at(mark.line + 1).where if mark else at(1).where
        remedy = _MEND
        if "\t" in (error.problem or "") or "'\\t'" in (error.problem or ""):
            remedy = "indent with spaces, not tabs"
        raise ConfigError(f"not valid YAML: {error.problem or error.context}", place=place, remedy=remedy) from error
    except (ValueError, OverflowError) as error:  # PyYAML passes an impossible escape such as "\UFFFFFFFF" to chr()
        raise ConfigError(f"not valid YAML: {error}", place=at(1).where, remedy=_MEND) from error


def _build(node: yaml.Node, at: Callable[[int], Source], source: Source) -> Node:
    if isinstance(node, yaml.MappingNode):
        found: dict[str, Node] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise _Refused("a key must be a word", key.start_mark, "write `key: value`")
            name = _text(key)
            if name in found:
                first = found[name].source
                seen = f" (first on line {first.line})" if first.line else ""
                raise _Refused(f"the key {name!r} is given twice{seen}", key.start_mark, "keep one of the two")
            found[name] = _build(value, at, at(line))
        return Node(found, source)
    if isinstance(node, yaml.SequenceNode):
        return Node([_build(item, at, at(item.start_mark.line + 1)) for item in node.value], source)
    quoted = isinstance(node, yaml.ScalarNode) and node.style is not None
    return Node(_text(node) if quoted else _word(node.value), source)


def _text(node: yaml.Node) -> str:
    try:
        node.value.encode()
    except UnicodeEncodeError as error:
        remedy = r"write the character itself, or \U and eight digits"
        raise _Refused("half of a surrogate pair is not a character", node.start_mark, remedy) from error
    return node.value


_WORDS = {"null": None, "true": True, "false": False}
_INTEGER = re.compile(r"[-+]?[0-9]{1,4000}|0x[0-9a-fA-F]{1,1000}|0o[0-7]{1,1000}")
_ROUND = re.compile(r"[-+]?[0-9]{1,20}[eE]\+?[0-9]{1,2}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


def _word(text: str) -> Any:
    """What a plain scalar means."""
    if text in ("", "~"):
        return None
    if text.lower() in _WORDS and text in (text.lower(), text.upper(), text.capitalize()):
        return _WORDS[text.lower()]
    if _INTEGER.fullmatch(text):
        return int(text, 0) if text[:2] in ("0x", "0o") else int(text)
    if _ROUND.fullmatch(text):
        return int(Decimal(text))
    if _FLOAT.fullmatch(text):
        return float(text)
    return float(text.replace(".", "", 1)) if _SPECIAL.fullmatch(text) else text


# --- merging -------------------------------------------------------------------------------------------------------


def merge(base: Node, over: Node) -> Node:
    """Lay one tree over another: mappings join key by key, anything else is replaced whole, null marks a removal."""
    if isinstance(base.value, dict) and isinstance(over.value, dict):
        joined = dict(base.value)
        for key, node in over.value.items():
            joined[key] = merge(joined[key], node) if key in joined else node
        return Node(joined, base.source)
    return Node(None, over.source, removes=True) if over.value is None else over


def put(base: Node, keys: Sequence[str], node: Node) -> Node:
    """Lay a node over the place that ``keys`` lead to; an item of a list is reached by its number.

    Raises:
        ConfigError: The list has no such item, or the way leads through a single value.
    """
    if not keys:
        return merge(base, node)
    key, rest = keys[0], keys[1:]
    if isinstance(base.value, list):
        below = base.get(key)
        if below is None:
            cause = f"no item {key!r}: the list has {len(base.value)}, counted from 0"
            remedy = "give the number of an item, or the whole list as [a, b]"
            raise ConfigError(cause, place=node.source.where, remedy=remedy)
        items = list(base.value)
        items[int(key)] = put(below, rest, node)
        return Node(items, base.source)
    if not isinstance(base.value, dict) and base.value is not None:
        cause = f"cannot set {'.'.join(keys)!r} inside the single value {came(base.value)} (from {base.source})"
        remedy = "give the whole as one mapping, {key: value, …}, or each part by its own path"
        raise ConfigError(cause, place=node.source.where, remedy=remedy)
    if isinstance(base.value, dict) and key in base.value:
        return Node(base.value | {key: put(base.value[key], rest, node)}, base.source)
    for name in reversed(keys):
        node = Node({name: node}, node.source)
    return merge(base, node)


# --- writing -------------------------------------------------------------------------------------------------------


def leaves(value: Any, keys: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """Every value of plain data with its path; a list of plain scalars is one value, so is anything empty."""
    if is_mapping(value) and value:
        for key, below in value.items():
            yield from leaves(below, (*keys, key))
    elif is_list(value) and not _is_flat(value):
        for number, below in enumerate(value):
            yield from leaves(below, (*keys, str(number)))
    else:
        yield keys, value


def _is_flat(items: Sequence[Any]) -> bool:
    return not any(isinstance(item, (dict, list)) for item in items)


def write_text(value: Mapping[str, Any], comments: Mapping[Keys, str] | None = None) -> str:
    """Write plain data as YAML that :func:`read_text` reads back unchanged, one line a value.

    Args:
        value: Plain data: mappings with text keys, lists, scalars.
        comments: What to note at the end of a value's line, by path.
    """
    text = yaml.dump(dict(value), Dumper=_Writer, sort_keys=False, allow_unicode=True, width=sys.maxsize)
    if not comments:
        return text
    lines = text.split("\n")
    tree = read_text(text, "the recipe")
    notes = [(tree.nearest(keys)[0].source.line - 1, comments[keys]) for keys, _ in leaves(value) if keys in comments]
    column = max((min(len(lines[line]), 48) for line, _ in notes), default=0)
    for line, note in notes:
        lines[line] = f"{lines[line]:<{column}}  # {note}"
    return "\n".join(lines)


class _Writer(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        style = None
        if not text.isprintable():
            style = '"'  # one line, line breaks escaped
        elif not isinstance(_word(text), str):
            style = "'"  # PyYAML itself quotes the words of YAML 1.1
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)

    def represent_items(self, items: Sequence[Any]) -> yaml.SequenceNode:
        return self.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=_is_flat(items))


_Writer.add_representer(str, _Writer.represent_text)
_Writer.add_representer(list, _Writer.represent_items)


def came(value: Any) -> str:
    """A value as an error shows it: what it is, shortened to 60 letters."""
    if is_mapping(value):
        return f"a mapping ({_short(', '.join(value))})" if value else "an empty mapping"
    if is_list(value):
        return f"a list ({_short(', '.join(map(str, value)))})" if value else "an empty list"
    if isinstance(value, str):
        return f"text {_short(repr(value))}"
    return _short(json.dumps(value))


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:59]}…"


def is_mapping(value: Any) -> TypeGuard[dict[str, Any]]:
    """Whether plain data is a mapping."""
    return isinstance(value, dict)


def is_list(value: Any) -> TypeGuard[list[Any]]:
    """Whether plain data is a list."""
    return isinstance(value, list)
