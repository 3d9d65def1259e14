"""Typed settings: YAML recipes with one ``extends`` parent, dotted overrides, and the place every value came from.

A :class:`Spec` says what may be set; :func:`load` lays the layers over each other (defaults, parents, the file,
overrides), checks them, and reports every fault at once, each with its line and the nearest valid path.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar, cast, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic.json_schema import GenerateJsonSchema, NoDefault
from pydantic_core import core_schema, to_jsonable_python

from plait.core.catalogue import Catalogue
from plait.core.check import Check
from plait.core.errors import ConfigError
from plait.core.yamltext import Keys, Node, Source, came, leaves, merge, put, read_file, read_override, write_text


@dataclass(frozen=True, slots=True)
class Derived:
    """A value that follows from another setting when nobody gives it.

    Attributes:
        value: The value.
        origin: Dotted path (or words) of what it follows from.
    """

    value: Any
    origin: str


class Spec(BaseModel):
    """Base of all settings: frozen, unknown keys are errors, numbers are finite, a field's docstring describes it.

    A mapping given for a field whose default is a spec joins that default key by key, so that setting one thing in it
    changes nothing else; a mapping of another ``kind`` stands alone.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    moved: ClassVar[Mapping[str, Keys]] = {}
    """Settings that once stood here: old name -> path, from here, of where they stand now. Recipes and runs from before
    the move go on."""

    @classmethod
    def renew(cls, tree: Node) -> Node:
        """Settings as given, those of :attr:`moved` put where they stand now; one given in both places is a fault."""
        for name, keys in cls.moved.items():
            node = tree.get(name)
            if node is not None and tree.nearest(keys)[1] < len(keys):
                tree = put(tree.without(name), keys, node)
        return tree

    @classmethod
    def derive(cls, given: Mapping[str, Any]) -> Mapping[Keys, Derived]:
        """Settings that follow from others; each is used only where nobody gives one.

        :class:`Resolved` tells these origins for the type that was loaded, not for specs inside it.

        Args:
            given: Settings as given, not yet checked: plain data, or specs when called from Python.
        """
        return {}

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        filled = cast("Mapping[str, Any]", given)
        for name, keys in cls.moved.items():
            if name in filled and keys[0] not in given:
                filled = _with({key: value for key, value in filled.items() if key != name}, keys, filled[name])
        for keys, derived in cls.derive(filled).items():
            filled = _with(filled, keys, derived.value)
        for name, field in cls.model_fields.items():
            if isinstance(filled.get(name), Mapping) and not field.default_factory_takes_validated_data:
                default = field.get_default(call_default_factory=True)
                if isinstance(default, Spec):
                    filled = {**filled, name: _over(default, filled[name])}
        return filled


S = TypeVar("S", bound=Spec)


@dataclass(frozen=True)
class Resolved(Generic[S]):
    """Checked settings and where each came from.

    Attributes:
        spec: The settings.
        sources: Dotted path of every value → its source.
    """

    spec: S
    sources: Mapping[str, Source]

    def to_yaml(self) -> str:
        """The whole settings as YAML that loads to the same spec, with each value's source as a comment."""
        plain = self.spec.model_dump(mode="json")
        return write_text(plain, {keys: str(self.sources[".".join(keys)]) for keys, _ in leaves(plain)})


def to_yaml(spec: Spec) -> str:
    """A spec as YAML that loads to the same spec."""
    return write_text(spec.model_dump(mode="json"))


def defaults(spec: Spec) -> dict[str, Any]:
    """What stands where nobody sets anything, as plain data, by dotted path.

    Within a spec that holds another one, the inner defaults are those of its own type, also where the outer default
    differs from them: what an inner setting was before there was one, whoever holds it.

    Example:
        >>> class Inner(Spec):
        ...     rate: float = 0.1
        >>> class Outer(Spec):
        ...     inner: Inner = Inner(rate=0.5)
        >>> defaults(Outer())
        {'inner': {'rate': 0.5}, 'inner.rate': 0.1}
    """
    found: dict[str, Any] = {}
    for name, field in type(spec).model_fields.items():
        if not field.is_required() and not field.default_factory_takes_validated_data:
            found[name] = to_jsonable_python(field.get_default(call_default_factory=True))
        value = getattr(spec, name)
        if isinstance(value, Spec):
            found |= {f"{name}.{inner}": default for inner, default in defaults(value).items()}
    return found


@cache
def catalogue(kind: type[Spec]) -> Catalogue:
    """All settings a type of spec accepts."""
    return Catalogue(kind.model_json_schema(schema_generator=_Generate))


def load(
    kind: type[S],
    path: Path,
    overrides: Iterable[str] = (),
    *,
    find: Callable[[str, Path], Path] | None = None,
    paths: Collection[Keys] = (),
    names: Collection[str] = (),
) -> Resolved[S]:
    """Read a YAML file with its chain of parents, lay the overrides over it, and check it.

    Mappings join key by key and later layers win: parents, the file, the overrides from left to right. ``null`` takes
    an earlier layer's key away; where the setting may be null, it is null.

    Args:
        kind: The type of spec.
        path: The file.
        overrides: Dotted settings, such as ``stages.pretrain.steps=50``.
        find: Turns what ``extends`` says, and the folder of the file that says it, into a path; by default a path
            relative to that folder.
        paths: Settings that hold a path: a relative one is meant from the folder of the file that gives it, and from
            the working directory when an override does.
        names: Words that are no paths there.

    Raises:
        ConfigError: Anything is wrong; names all faults, with the first as the cause.
    """

    def read(file: Path) -> Node:
        return from_folder(read_file(file), file.parent, paths, names=names)

    tree = _read_chain(path, find or (lambda name, folder: folder / name), (), read=read)
    return resolve(kind, tree, overrides)


def resolve(kind: type[S], tree: Node, overrides: Iterable[str] = ()) -> Resolved[S]:
    """Lay overrides over settings already read, and check them; see :func:`load`."""
    for text in overrides:
        tree = put(tree, *read_override(text))
    tree = kind.renew(tree)
    check = Check(catalogue(kind), tree)
    plain = check.clean.plain()
    try:
        spec = kind.model_validate(plain)
    except ValidationError as error:
        check.add(error.errors(include_url=False))
        raise check.error() from error
    if check.faults:
        raise check.error()
    return Resolved(spec, _sources(spec, check.clean, kind.derive(plain)))


# --- layers --------------------------------------------------------------------------------------------------------


def from_folder(tree: Node, folder: Path, paths: Collection[Keys], *, names: Collection[str]) -> Node:
    """Settings of a file with its relative paths seen from its folder."""
    for keys in paths:
        node, depth = tree.nearest(keys)
        text = node.value
        if depth == len(keys) and isinstance(text, str) and text not in names and not text.startswith("~"):
            tree = put(tree, keys, Node(str(folder / text), node.source))
    return tree


def _read_chain(
    path: Path, find: Callable[[str, Path], Path], seen: tuple[Path, ...], *, read: Callable[[Path], Node]
) -> Node:
    tree = read(path)
    seen = (*seen, path.resolve())
    parent = tree.get("extends")
    if parent is None:
        return tree
    place = parent.source.where
    if not isinstance(parent.value, str):
        cause = f"`extends` names one parent, came {came(parent.plain())}"
        raise ConfigError(cause, place=place, remedy="write one recipe name or path; that parent may extend another")
    try:
        target = find(parent.value, path.parent)
    except ConfigError as error:
        raise ConfigError(f"extends: {error.cause}", place=place, remedy=error.remedy) from error
    if not target.exists():
        raise ConfigError(f"extends: no such file {str(target)!r}", place=place, remedy="check the path")
    if target.resolve() in seen:
        circle = " → ".join(p.name for p in (*seen[seen.index(target.resolve()) :], target))
        raise ConfigError(f"`extends` runs in a circle: {circle}", place=place, remedy="take one `extends` out")
    return merge(_read_chain(target, find, seen, read=read), tree.without("extends"))


def _with(holder: Any, keys: Keys, value: Any) -> Any:
    """A copy of settings with ``value`` at a path, unless something is given there."""
    key, rest = keys[0], keys[1:]
    if isinstance(holder, Mapping):
        given = dict(cast("Mapping[str, Any]", holder))
        if rest:
            return given | {key: _with(given.get(key, {}), rest, value)}
        return given if key in given else given | {key: value}
    if isinstance(holder, Spec) and key in type(holder).model_fields and (rest or key not in holder.model_fields_set):
        return holder.model_copy(update={key: _with(getattr(holder, key), rest, value) if rest else value})
    return holder


def _over(default: Spec, given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Settings laid over those of a default of the same kind."""
    joined: dict[str, Any] = {}
    for name, field in type(default).model_fields.items():
        joined[name] = getattr(default, name)
        one_word = get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1
        if one_word and given.get(name, joined[name]) != joined[name]:
            return given
    for name, value in given.items():
        below = joined.get(name)
        if isinstance(below, Spec) and isinstance(value, Mapping):
            joined[name] = _over(below, cast("Mapping[str, Any]", value))
        else:
            joined[name] = value
    return joined


def _sources(spec: Spec, tree: Node, derived: Mapping[Keys, Derived]) -> dict[str, Source]:
    found: dict[str, Source] = {}
    for keys, _ in leaves(spec.model_dump(mode="json")):
        node, depth = tree.nearest(keys)
        if depth == len(keys) or not isinstance(node.value, (dict, list)):
            source = node.source
        elif keys in derived:
            source = Source("derived", derived[keys].origin)
        else:
            source = Source("default")
        found[".".join(keys)] = source
    return found


class _Generate(GenerateJsonSchema):
    """JSON Schema without the empty titles, and with the defaults that factories make."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def dict_schema(self, schema: core_schema.DictSchema) -> dict[str, Any]:
        result = super().dict_schema(schema)
        for pattern, values in result.pop("patternProperties", {}).items():  # one way to say it: names and values apart
            result |= {"propertyNames": {"type": "string", "pattern": pattern}, "additionalProperties": values}
        return result

    def get_default_value(self, schema: core_schema.WithDefaultSchema) -> Any:
        factory = schema.get("default_factory")
        if factory is not None and not schema.get("default_factory_takes_data"):
            return factory()  # pyright: ignore[reportCallIssue]
        return schema.get("default", NoDefault)
