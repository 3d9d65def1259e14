"""All settings a spec accepts, read from its JSON Schema.

One truth for the editor, ``config explain``, completion and error messages.
"""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from plait.core.yamltext import Keys, is_list, is_mapping

Schema = Mapping[str, Any]
"""A JSON Schema, or a part of one."""

_UNSET = object()
_REQUIRED = object()
_NAMES = {"string": "text", "boolean": "true or false", "object": "mapping", "array": "list"}
_BOUNDS = {
    "minimum": "≥ {}",
    "exclusiveMinimum": "> {}",
    "maximum": "≤ {}",
    "exclusiveMaximum": "< {}",
    "multipleOf": "a multiple of {}",
    "minLength": "at least {} characters",
    "maxLength": "at most {} characters",
    "pattern": "matching {}",
    "minItems": "at least {} items",
    "maxItems": "at most {} items",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One dotted path a recipe may set.

    Attributes:
        path: ``stages.pretrain.steps``.
        type: What it holds, in words: ``integer``, ``one of a, b``, ``list of text``.
        range: Bounds in words, empty where there are none.
        default: Plain value it has when nobody gives one.
        required: Whether it must be given.
        description: What it means; may be empty.
        when: Which choice it belongs to (``data.source.kind = csv``), where several share the path's parent.
        leaf: False for a group of settings.
    """

    path: str
    type: str
    range: str
    default: Any
    required: bool
    description: str
    when: str
    leaf: bool


@dataclass(frozen=True)
class Catalogue:
    """What a type of settings accepts.

    Attributes:
        schema: Its whole JSON Schema.
    """

    schema: Schema

    # --- moving about ----------------------------------------------------------------------------------------------

    def options(self, schema: Schema) -> list[Schema]:
        """The alternatives a schema allows, references followed; each keeps the schema's description and default."""
        if "$ref" in schema:
            target = self.schema["$defs"][schema["$ref"].rpartition("/")[2]]
            own = {key: schema[key] for key in ("description", "default") if key in schema}
            return [{**option, **own} for option in self.options(target)]
        for word in ("anyOf", "oneOf"):
            if word in schema:
                return [option for part in schema[word] for option in self.options(part)]
        return [schema]

    def choices(self, schema: Schema, value: Any) -> list[Schema]:
        """The alternatives a plain value may be meant for: those of its shape and, for a mapping, of its ``kind``.

        A mapping that gives no kind is of the default's.
        """
        options = self.options(schema)
        if is_mapping(value):
            mappings = [option for option in options if option.get("type") == "object"]
            meant = {**_part(schema.get("default")), **value}
            return [option for option in mappings if _fits(option, meant)] or mappings
        if is_list(value):
            return [option for option in options if option.get("type") == "array"]
        return [option for option in options if option.get("type") not in ("object", "array")]

    def below(self, option: Schema, key: str) -> Schema | None:
        """The schema under a key (or item number) of one alternative; None where that key is unknown."""
        if option.get("type") == "array":
            first: list[Schema] = option.get("prefixItems", [])
            return first[int(key)] if key.isdigit() and int(key) < len(first) else _part(option.get("items"))
        if key in option.get("properties", {}):
            return option["properties"][key]
        more = option.get("additionalProperties", option.get("type") in ("object", None))
        return None if more is False else _part(more)

    def at(self, keys: Keys, given: Any) -> Schema:
        """The schema at a path, choosing alternatives by the plain values given; ``{}`` where the path is unknown."""
        schema = self.schema
        for key in keys:
            schema, given = self._step(schema, key, given), _value(given, key)
        return schema

    def homes(self, keys: Keys, given: Any) -> list[str]:
        """The alternatives (``source.kind = csv``) that know the last key of a path, among those at its parent."""
        options = self.options(self.at(keys[:-1], given))
        return [_label(option, keys[:-1]) for option in options if keys[-1] in option.get("properties", {})]

    def path_of(self, loc: Sequence[int | str], given: Any) -> Keys:
        """A pydantic error location as a path: without the labels that pydantic adds for the alternative it tried."""
        keys: Keys = ()
        schema, labelled = self.schema, False
        for part in map(str, loc):
            if labelled or part == "[key]":
                labelled = part.startswith("tagged-union[")  # inside another union: its own label comes next
                continue
            keys = (*keys, part)
            schema, given = self._step(schema, part, given), _value(given, part)
            labelled = self._has_label(schema)
        return keys

    def _step(self, schema: Schema, key: str, given: Any) -> Schema:
        found = [below for option in self.choices(schema, given) if (below := self.below(option, key)) is not None]
        return any_of(found)

    def _has_label(self, schema: Schema) -> bool:
        """Whether pydantic names the alternative next: it does in a union, but not for ``X | None``."""
        if "discriminator" in schema:
            return True
        parts = [part for part in schema.get("anyOf", schema.get("oneOf", ())) if part.get("type") != "null"]
        return len(parts) > 1 or (len(parts) == 1 and self._has_label(parts[0]))

    # --- words for people ------------------------------------------------------------------------------------------

    def type_of(self, schema: Schema) -> str:
        """What a schema accepts, in words."""
        return " or ".join(dict.fromkeys(self._type(option) for option in self.options(schema)))

    def range_of(self, schema: Schema) -> str:
        """Bounds of a schema, in words."""
        return "; ".join(dict.fromkeys(text for option in self.options(schema) if (text := _bounds(option))))

    def expected(self, schema: Schema) -> str:
        """Type and bounds together, as an error says them."""
        parts = [f"{self._type(option)} {_bounds(option)}".strip() for option in self.options(schema)]
        return " or ".join(dict.fromkeys(parts))

    def _type(self, option: Schema) -> str:
        if "const" in option:
            return _plain(option["const"])
        if "enum" in option:
            return f"one of {', '.join(map(_plain, option['enum']))}"
        kind = option.get("type")
        if kind == "array":
            first = option.get("prefixItems")
            if first:
                return f"list of {len(first)}: {', '.join(self.type_of(item) for item in first)}"
            return f"list of {self.type_of(option.get('items', {}))}"
        if kind == "object" and "properties" not in option and isinstance(option.get("additionalProperties"), Mapping):
            return f"mapping of names to {self.type_of(option['additionalProperties'])}"
        if kind == "object" and "title" in option:
            return f"mapping ({option['title']})"
        if option.get("format") == "path":
            return "path"
        return _NAMES.get(kind, kind) if isinstance(kind, str) else "anything"

    # --- the list --------------------------------------------------------------------------------------------------

    def settings(self, given: Mapping[str, Any] | None = None) -> tuple[Setting, ...]:
        """Every path in order, groups included.

        Args:
            given: Plain settings; names they use in mappings, and items of their lists, are listed too.
        """
        found = self._walk(self.schema, (), {} if given is None else given)
        unique = {(setting.path, setting.when): setting for setting in found}
        return tuple(unique.values())

    def _walk(
        self,
        schema: Schema,
        keys: Keys,
        given: Any,
        *,
        default: Any = _UNSET,
        when: str = "",
        inside: frozenset[str] = frozenset(),
    ) -> Iterator[Setting]:
        options = self.options(schema)
        if default is _UNSET:
            default = next((part["default"] for part in (schema, *options) if "default" in part), None)
        groups = [option for option in options if "properties" in option]
        if keys:
            yield Setting(
                path=".".join(keys),
                type=self.type_of(schema),
                range=self.range_of(schema),
                default=None if default is _REQUIRED else default,
                required=default is _REQUIRED,
                description=next((part["description"] for part in (schema, *options) if "description" in part), ""),
                when=when,
                leaf=not groups,
            )
        if given is not None:
            groups = [option for option in self.choices(schema, given) if "properties" in option]
        for group in groups:
            title = group.get("title", "")
            if given is None and title in inside:  # a spec may hold itself; list it once more only where it is used
                continue
            defaults = default if is_mapping(default) and _fits(group, default) else {}
            for key, below in group["properties"].items():
                yield from self._walk(
                    below,
                    (*keys, key),
                    _value(given, key),
                    default=defaults.get(key, _REQUIRED if key in group.get("required", ()) else _UNSET),
                    when=_label(group, keys) if len(groups) > 1 else when,
                    inside=inside | {title},
                )
        for option in options:
            yield from self._walk_free(option, keys, given, when=when, inside=inside)

    def _walk_free(
        self, option: Schema, keys: Keys, given: Any, *, when: str, inside: frozenset[str]
    ) -> Iterator[Setting]:
        """Entries whose names the recipe chooses, and items of lists."""
        more = option.get("additionalProperties")
        if is_mapping(more) and is_mapping(given):
            for name, value in given.items():
                complete = all(key in value for key in more.get("required", ())) if is_mapping(value) else True
                if name not in option.get("properties", {}) and complete:
                    chosen = any_of(self.choices(more, value) or [more])
                    yield from self._walk(chosen, (*keys, name), value, when=when, inside=inside)
        if option.get("type") == "array":
            items: list[Any] = given if is_list(given) and given else [None]
            for number, value in enumerate(items):
                below = self.below(option, str(number))
                if below and any("properties" in part for part in self.options(below)):
                    yield from self._walk(below, (*keys, str(number)), value, when=when, inside=inside)


def any_of(options: Sequence[Schema]) -> Schema:
    """One schema that allows any of several; ``{}``, which allows all, for none."""
    return {"anyOf": options} if len(options) > 1 else options[0] if options else {}


def nearest(typed: str, paths: Iterable[str], limit: int = 3) -> tuple[str, ...]:
    """Valid paths most like what was typed, best first.

    A path that ends in what was typed wins (``pretrain.steps`` → ``stages.pretrain.steps``); else likeness of the whole
    path and of its last word count (difflib's ratio, each at least 0.6).
    """
    scored: list[tuple[float, str]] = []
    last = typed.rpartition(".")[2]
    for path in dict.fromkeys(paths):
        if path.endswith(f".{typed}"):
            scored.append((3.0 - 0.01 * path.count("."), path))
            continue
        whole = difflib.SequenceMatcher(None, typed, path).ratio()
        word = difflib.SequenceMatcher(None, last, path.rpartition(".")[2]).ratio()
        if whole >= 0.6 and word >= 0.6:
            scored.append((whole + word, path))
        elif word >= 0.8:
            scored.append((word, path))
    scored.sort(key=lambda pair: (-pair[0], pair[1]))
    best = scored[0][0] if scored else 0.0
    return tuple(path for score, path in scored[:limit] if score >= best - 0.15)


def file_schema(schema: Schema, *, extends: str) -> dict[str, Any]:
    """JSON Schema of a recipe *file*: what a parent may have given is not required, null may remove a named entry.

    Args:
        schema: Schema of the whole spec.
        extends: What to say of the key ``extends``.
    """
    result = copy.deepcopy(dict(schema))
    needed = result.pop("required", [])
    result["properties"] = {"extends": {"type": "string", "description": extends}, **result["properties"]}
    for part in (result, *result.get("$defs", {}).values()):
        part.pop("required", None)
        for value in part.get("properties", {}).values():
            _allow_removal(value)
    if needed:
        result["anyOf"] = [{"required": needed}, {"required": ["extends"]}]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **result}


def _allow_removal(schema: dict[str, Any]) -> None:
    more = schema.get("additionalProperties")
    if isinstance(more, dict):
        schema["additionalProperties"] = {"anyOf": [more, {"type": "null"}]}
        for name, entry in schema.get("properties", {}).items():
            schema["properties"][name] = {"anyOf": [entry, {"type": "null"}]}


def _fits(option: Schema, value: Mapping[str, Any]) -> bool:
    """Whether the fixed words of an alternative (``kind: csv``) are those of the value; one not given fits."""
    fixed = {key: part["const"] for key, part in option.get("properties", {}).items() if "const" in part}
    return all(value.get(key, word) == word for key, word in fixed.items())


def _label(option: Schema, keys: Keys) -> str:
    fixed = [(key, part["const"]) for key, part in option["properties"].items() if "const" in part]
    return f"{'.'.join((*keys, fixed[0][0]))} = {fixed[0][1]}" if fixed else str(option.get("title", ""))


def _part(schema: Any) -> Schema:
    return schema if is_mapping(schema) else {}


def _value(given: Any, key: str) -> Any:
    if is_mapping(given):
        return given.get(key)
    return given[int(key)] if is_list(given) and key.isdigit() and int(key) < len(given) else None


def _bounds(option: Schema) -> str:
    if "prefixItems" in option:
        return ""
    return " and ".join(text.format(option[word]) for word, text in _BOUNDS.items() if word in option)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
