"""A recipe: one YAML file that says how raw files become a model, from data to evaluation."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from pydantic import Field, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema

from plait.core.catalogue import file_schema
from plait.core.errors import ConfigError
from plait.core.spec import Derived, Resolved, Spec, catalogue, from_folder, load
from plait.core.yamltext import Keys, Node, Source, put, read_override
from plait.models.specs import QFormer
from plait.recipes.trackers import AnyTracker
from plait.stages.align import Align
from plait.stages.compress import Compress
from plait.stages.data import Data
from plait.stages.evaluate import Evaluate
from plait.stages.pretrain import Pretrain
from plait.stages.tune import Tune

AnyStage: TypeAlias = Annotated[Pretrain | Tune | Align | Compress | Evaluate, Field(discriminator="kind")]
"""Every stage kind that may follow the data: ``Pretrain | Tune | …``. This union is the catalogue."""

_MOVED_FROM: Mapping[str, type[Spec]] = {"pretrain": Pretrain, "align": Align}
"""Kinds of stages of which a setting has moved."""

_FOLDER = Path(__file__).parent
_PATHS = (("data", "source"), ("data", "source", "path"), ("data", "source", "root"))
_NO_PATHS = ("emoji",)
_NAME = r"^[a-z0-9][a-z0-9._-]*$"


class _Named:
    """Schema of the stages: one called after a kind is of that kind and need not say so; any other says its kind."""

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        schema = handler(core)
        entry = schema["additionalProperties"]
        kinds: dict[str, str] = entry["discriminator"]["mapping"]
        schema["properties"] = {
            kind: {"oneOf": [{"$ref": ref}], "discriminator": {"mapping": {kind: ref}, "propertyName": "kind"}}
            for kind, ref in kinds.items()
        }
        schema["additionalProperties"] = {**entry, "required": ["kind"]}
        return schema


class Recipe(Spec):
    """All settings of one run."""

    name: str = Field(pattern=_NAME)
    """What the run folder is called: `runs/<name>-0001`."""

    seed: int = Field(default=0, ge=0)
    """Seed of every stage that gives none of its own."""

    data: Data = Data()
    """The first stage: where the samples come from and how they are split."""

    stages: Annotated[Mapping[Annotated[str, Field(pattern=_NAME)], AnyStage], _Named()] = Field(default_factory=dict)
    """The stages after the data, in order; a name that is a kind needs no `kind`."""

    trackers: tuple[AnyTracker, ...] = ()
    """Where else the records of `metrics.jsonl` go while it runs, such as `[{kind: tensorboard}]`. What a tracker does
    never costs the run; what was not sent is said, and `plait track RUN` sends it later."""

    @model_validator(mode="after")
    def _each_once(self) -> Recipe:
        """One tracker of a kind: what it was sent is kept by kind."""
        kinds = [tracker.kind for tracker in self.trackers]
        if twice := [kind for kind in kinds if kinds.count(kind) > 1]:
            raise ValueError(f"trackers: {twice[0]} is there twice; take one out")
        return self

    @model_validator(mode="after")
    def _begun(self) -> Recipe:
        """A connector that starts from the pretrain stage's Q-Former: the two must be one, seen before either runs."""
        before: Pretrain | None = None
        for name, stage in self.stages.items():
            if isinstance(stage, Pretrain):
                before = stage
            elif isinstance(stage, Tune) and isinstance(stage.connector, QFormer) and stage.connector.start != "drawn":
                _check_start(f"stages.{name}", stage, stage.connector, before=before)
        return self

    @model_validator(mode="after")
    def _judged(self) -> Recipe:
        """Validation while training needs a split of the data; seen before anything runs."""
        asks = [
            f"stages.{name}.trainer.validation"
            for name, stage in self.stages.items()
            if isinstance(stage, Pretrain | Tune | Align) and stage.trainer.validation
        ]
        if asks and not self.data.source.validation:
            raise ValueError(
                f"{', '.join(asks)} is set, and data.source.validation is 0: there is nothing "
                "to judge by; hold some data out for it, or take trainer.validation out"
            )
        return self

    @classmethod
    def renew(cls, tree: Node) -> Node:
        """Settings of every stage under their present names; see :meth:`plait.core.spec.Spec.renew`."""
        stages = tree.get("stages")
        if stages is None or not isinstance(stages.value, dict) or not isinstance(tree.value, dict):
            return tree
        found: dict[str, Node] = {}
        for name, node in stages.value.items():
            word = node.get("kind")
            kind = _MOVED_FROM.get(str(word.value) if word else name)
            found[name] = kind.renew(node) if kind else node
        return Node({**tree.value, "stages": Node(found, stages.source)}, tree.source)

    @classmethod
    def derive(cls, given: Mapping[str, Any]) -> Mapping[Keys, Derived]:
        """The kind of a stage follows from its name, its seed from the recipe's."""
        seed = Derived(given.get("seed", cls.model_fields["seed"].default), "seed")
        found: dict[Keys, Derived] = {("data", "seed"): seed}
        stages = given.get("stages")
        for name in stages if isinstance(stages, Mapping) else ():
            if name in stage_kinds():
                found["stages", name, "kind"] = Derived(name, "the stage's name")
            found["stages", name, "seed"] = seed
        return found


def _check_start(place: str, tune: Tune, connector: QFormer, *, before: Pretrain | None) -> None:
    """See that a connector can start from what the pretrain stage before it trains."""
    if before is None or before.qformer is None:
        what = "there is no pretrain stage before it" if before is None else "the one before it trains a dual encoder"
        raise ValueError(
            f"{place}.connector.start is pretrain, but {what}; give stages.pretrain.qformer the sizes of the connector"
        )
    pairs = [(f"connector.{n}", f"qformer.{n}") for n in ("queries", "d", "depth", "heads", "every")]
    pairs += [(n, n) for n in ("image_tower", "resolution")]
    for ours, theirs in pairs:
        here, there = (_at(stage, path) for stage, path in ((tune, ours), (before, theirs)))
        if here != there:
            raise ValueError(
                f"{place}.{ours} is {here}, stages.pretrain.{theirs} is {there}: a connector that starts from the "
                "pretrain stage's Q-Former has its sizes and reads the same tower; set them equal"
            )


def _at(holder: Any, path: str) -> object:
    for name in path.split("."):
        holder = getattr(holder, name)
    return holder


def stage_kinds() -> tuple[str, ...]:
    """Names of all stage kinds a recipe may list after its data."""
    return tuple(catalogue(Recipe).schema["properties"]["stages"]["properties"])


def recipe_schema() -> dict[str, Any]:
    """JSON Schema of recipe files, for editors; committed as ``docs/recipe.schema.json``."""
    extends = "The one parent: name of a shipped recipe, or a path relative to this file. Mappings join key by key."
    return {**file_schema(catalogue(Recipe).schema, extends=extends), "title": "Plait recipe"}


def shipped() -> dict[str, Path]:
    """Recipes that come with Plait, by name."""
    return {path.stem: path for path in sorted(_FOLDER.glob("*.yaml"))}


def find_recipe(name: str, folder: Path = Path()) -> Path:
    """Path of a recipe.

    Args:
        name: Name of a shipped recipe, path of a YAML file, or a run folder.
        folder: What paths are relative to.

    Raises:
        ConfigError: There is none; lists the shipped ones and the nearest name.
    """
    known = shipped()
    if name in known:
        return known[name]
    path = folder / name
    if path.is_dir() and (path / "recipe.yaml").is_file():
        return path / "recipe.yaml"
    if path.is_file():
        return path
    if "/" in name or name.endswith((".yaml", ".yml")):
        raise ConfigError(
            "no such recipe file", place=str(path), remedy=f"check the path, or use one of: {_list(known)}"
        )
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    remedy = f"{hint}shipped recipes: {_list(known)}; or give the path of a YAML file"
    raise ConfigError(f"no recipe called {name!r}", place="the command line", remedy=remedy)


def load_recipe(name: str, overrides: Iterable[str] = ()) -> Resolved[Recipe]:
    """Find, read and check a recipe; see :func:`plait.core.spec.load`.

    A relative path of own data in a recipe file is seen from the folder of that file. A file that extends another and
    gives no name of its own is called after itself, not after its parent.

    Args:
        name: As for :func:`find_recipe`.
        overrides: Dotted settings, such as ``data.source=./pairs.csv``.

    Raises:
        ConfigError: Anything about it is wrong.
    """
    path = find_recipe(name)
    resolved = load(Recipe, path, overrides, find=find_recipe, paths=_PATHS, names=_NO_PATHS)
    given = resolved.sources["name"]
    own = re.sub(r"[^a-z0-9._-]+", "-", path.stem.lower()).strip("-._")
    if given.kind != "file" or Path(given.place) == path or not own:
        return resolved
    spec = resolved.spec.model_copy(update={"name": own})
    return Resolved(spec, {**resolved.sources, "name": Source("derived", "the file's name")})


def rooted(override: str, folder: Path) -> Any:
    """The value of an override, its relative paths of own data seen from a folder.

    Args:
        override: Such as ``data.source=pairs.csv``.
        folder: What they are relative to.
    """
    keys, node = read_override(override)
    if keys[0] != "data":
        return node.plain()
    tree = from_folder(put(Node({}, node.source), keys, node), folder.absolute(), _PATHS, names=_NO_PATHS)
    return tree.nearest(keys)[0].plain()


def _list(known: Iterable[str]) -> str:
    return ", ".join(known)
