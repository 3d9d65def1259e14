"""Finds all faults of a recipe at once: each says what was expected, what came, where it stands, and what to do."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pydantic_core import ErrorDetails

from plait.core.catalogue import Catalogue, Schema, any_of, nearest
from plait.core.errors import ConfigError
from plait.core.yamltext import Keys, Node, came

_SHOWN = 5  # faults listed after the first; the rest are counted


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing wrong with a recipe; the fields are those of :class:`~plait.core.errors.PlaitError`."""

    keys: Keys
    cause: str
    place: str
    remedy: str


class Check:
    """Compares a tree with the catalogue, and puts into words what pydantic says of it.

    Pydantic converts as it validates (``true`` becomes 1, ``"12"`` becomes 12); a recipe must mean what it says, so
    plain values of another type than the catalogue names are faults here.

    Args:
        catalogue: What may be set.
        tree: What is set.

    Attributes:
        clean: The tree without unknown keys (they are faults) and without what null takes away.
        faults: What is wrong, so far.
    """

    def __init__(self, catalogue: Catalogue, tree: Node) -> None:
        self.catalogue = catalogue
        self.faults: list[Fault] = []
        self._given = tree.plain()
        self.clean = self._clean(catalogue.schema, tree, ())
        self._plain = self.clean.plain()

    def add(self, errors: Iterable[ErrorDetails]) -> None:
        """Note what pydantic found in :attr:`clean`, unless that value has a fault already."""
        for error in errors:
            keys = self.catalogue.path_of(error["loc"], self._plain)
            if self._of_another_shape(error, keys):
                continue
            fault = self._translate(error, keys)
            if all(known.keys != fault.keys for known in self.faults):
                self.faults.append(fault)

    def error(self) -> ConfigError:
        """All faults as one error: the first in full, the others after its remedy."""
        first, *others = self.faults
        if not others:
            return ConfigError(first.cause, place=first.place, remedy=first.remedy)
        listed = [f"({n}) {f.cause} | at {f.place} | fix: {f.remedy}" for n, f in enumerate(others[:_SHOWN], 2)]
        if len(others) > len(listed):
            listed.append(f"and {len(others) - len(listed)} more")
        cause = f"{len(self.faults)} faults; (1) {first.cause}"
        return ConfigError(cause, place=first.place, remedy="\n    ".join([first.remedy, *listed]))

    @cached_property
    def _paths(self) -> list[str]:
        return [setting.path for setting in self.catalogue.settings(self._given)]

    # --- what pydantic would let pass ------------------------------------------------------------------------------

    def _clean(self, schema: Schema, node: Node, keys: Keys) -> Node:
        choices = self.catalogue.choices(schema, node.plain())
        if isinstance(node.value, dict) and choices:
            kept: dict[str, Node] = {}
            for key, below in node.value.items():
                known = [part for option in choices if (part := self.catalogue.below(option, key)) is not None]
                if self._keeps(known, below, (*keys, key)):
                    kept[key] = self._clean(any_of(known), below, (*keys, key))
            return Node(kept, node.source)
        if isinstance(node.value, list) and choices:
            items: list[Node] = []
            for number, item in enumerate(node.value):
                known = [self.catalogue.below(option, str(number)) or {} for option in choices]
                items.append(self._clean(any_of(known), item, (*keys, str(number))))
            return Node(items, node.source)
        if self._would_convert(schema, node.value):
            self.faults.append(self._wrong(schema, node, keys))
        return node

    def _keeps(self, known: list[Schema], node: Node, keys: Keys) -> bool:
        """Whether an entry stays: not if it is unknown, nor if it is a null that only takes away."""
        if known and (node.value is not None or self._takes(any_of(known), "null")):
            return True
        if not node.removes:
            self.faults.append(self._wrong(any_of(known), node, keys) if known else self._unknown(node, keys))
        return False

    def _would_convert(self, schema: Schema, value: Any) -> bool:
        options = self.catalogue.choices(schema, value)  # without mappings and lists: pydantic makes none from a scalar
        words = [word for option in options for word in _words(option)]
        if not options or any(value == word and type(value) is type(word) for word in words):
            return False
        if isinstance(value, bool):
            return not self._takes(schema, "boolean")
        if isinstance(value, (int, float)):
            return not self._takes(schema, "number", "integer")
        return isinstance(value, str) and not self._takes(schema, "string")

    def _takes(self, schema: Schema, *types: str) -> bool:
        """Whether a schema takes any plain value of one of these JSON types."""
        options = [option for option in self.catalogue.options(schema) if not _words(option)]
        return any(option.get("type", types[0]) in types for option in options)

    def _of_another_shape(self, error: ErrorDetails, keys: Keys) -> bool:
        """Whether pydantic tried a mapping (or a list) as text, where an alternative takes mappings and says more."""
        node, depth = self.clean.nearest(keys)
        if not isinstance(node.value, (dict, list)) or depth < len(keys) or not error["type"].endswith("_type"):
            return False
        return bool(self.catalogue.choices(self.catalogue.at(keys, self._plain), node.plain()))

    # --- wording ---------------------------------------------------------------------------------------------------

    def _wrong(self, schema: Schema, node: Node, keys: Keys) -> Fault:
        path = ".".join(keys)
        if node.value is None and all(option.get("type") == "object" for option in self.catalogue.options(schema)):
            cause = f"{path}: null takes away what an earlier layer gave, but none gave it"
            return Fault(keys, cause, node.source.where, did_you_mean(path, (p for p in self._paths if p != path)))
        cause = f"{path}: expected {self.catalogue.expected(schema)}, came {came(node.plain())}"
        return Fault(keys, cause, node.source.where, _see(path))

    def _unknown(self, node: Node, keys: Keys) -> Fault:
        name, homes = keys[-1], self.catalogue.homes(keys, self._given)
        while isinstance(node.value, dict) and len(node.value) == 1:  # pretrain.steps=50 is about pretrain.steps
            below, node = next(iter(node.value.items()))
            keys = (*keys, below)
        path = ".".join(keys)
        if path in self._paths:
            remedy = f"nest it: write `{name.partition('.')[0]}:` and the rest indented on the lines below"
        elif path == "extends":
            remedy = "write `extends` into the recipe file; it cannot be overridden"
        elif homes:
            remedy = f"it goes with {' or '.join(homes)}; null takes away what an earlier layer gave"
        else:
            remedy = did_you_mean(path, self._paths)
        return Fault(keys, f"unknown setting {path!r}", node.source.where, remedy)

    def _translate(self, error: ErrorDetails, keys: Keys) -> Fault:
        kind = error["type"]
        path = ".".join(keys)
        node, depth = self.clean.nearest(keys)
        if kind == "extra_forbidden" and depth == len(keys):
            return self._unknown(node, keys)
        schema = self.catalogue.at(keys, self._plain)
        if kind.startswith("union_tag"):
            return self._wrong_kind(schema, node, keys, tag=str(error.get("ctx", {})["discriminator"]).strip("'"))
        place = node.source.where
        if "[key]" in error["loc"]:
            names = self.catalogue.at(keys[:-1], self._plain).get("propertyNames", {})
            return Fault(
                keys, f"{path}: expected a name {self.catalogue.range_of(names)}", place, "choose another name"
            )
        expected = self.catalogue.expected(schema)
        if kind == "missing":
            return Fault(keys, f"{path} is missing: expected {expected}", place, f"give {path}")
        if kind in ("value_error", "assertion_error"):
            problem = error["msg"].partition(", ")[2] or error["msg"]
        else:
            problem = error["msg"] if expected == "anything" else f"expected {expected}"
        if isinstance(node.value, dict) and depth == len(keys):
            place = _places(node.value, problem) or place
        if not keys:
            return Fault(keys, problem, place, "change the settings it names")
        if kind in ("value_error", "assertion_error") and isinstance(node.value, dict):  # of settings that it names
            return Fault(keys, f"{path}: {problem}", place, _see(path))
        return Fault(keys, f"{path}: {problem}, came {came(error['input'])}", place, _see(path))

    def _wrong_kind(self, schema: Schema, node: Node, keys: Keys, *, tag: str) -> Fault:
        path = ".".join(keys)
        words = [option["properties"][tag] for option in self.catalogue.options(schema) if "properties" in option]
        expected = self.catalogue.expected({"anyOf": words})
        near = () if path in self._paths else nearest(path, self._paths)  # a setting of that name lacks only its kind
        remedy = f"did you mean {near[0]!r}?" if near else f"give {path}.{tag}"
        given = node.get(tag)
        if given is None:
            return Fault((*keys, tag), f"{path}.{tag} is missing: expected {expected}", node.source.where, remedy)
        cause = f"{path}.{tag}: expected {expected}, came {came(given.plain())}"
        return Fault((*keys, tag), cause, given.source.where, _see(f"{path}.{tag}"))


def did_you_mean(path: str, paths: Iterable[str]) -> str:
    """The remedy for an unknown path."""
    near = nearest(path, paths)
    if near:
        return f"did you mean {' or '.join(map(repr, near))}?"
    return "`plait config show RECIPE` prints all settings"


def _places(settings: Mapping[str, Node], problem: str) -> str:
    """Where the settings of a mapping stand that a problem names: the mapping itself may be a parent's."""
    named = [name for name in settings if re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", problem)]
    places: dict[str, list[str]] = {}
    for name in named:
        node = settings[name].get("kind") or settings[name]
        places.setdefault(node.source.where, []).append(name)
    if len(places) == 1:
        return next(iter(places))
    return "; ".join(f"{place} ({', '.join(names)})" for place, names in places.items())


def _see(path: str) -> str:
    return f"see `plait config explain {path}`"


def _words(option: Schema) -> list[Any]:
    """The fixed values an alternative allows; none if it allows more."""
    return [option["const"]] if "const" in option else option.get("enum", [])
