"""What a sweep is: a recipe, settings to search, how, and the number that judges. Read, checked, nothing is run."""

from __future__ import annotations

import difflib
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from plait.core.errors import ConfigError
from plait.core.spec import Derived, Resolved, Spec, load, resolve
from plait.core.yamltext import Keys, Node, Source, read_file, read_override
from plait.recipes.recipe import Recipe, find_recipe, load_recipe, rooted, shipped
from plait.recipes.search.measures import EVALUATION, ON_TRAINING, Judge, check_measure, check_reference
from plait.stages.stage import Stage

PHASES = ("words", "connector", "decoder")
"""Of a tune stage, each with its own metrics; the last one is meant where none is named."""

_TRAINS = ("pretrain", "tune", "align")
_MORE_IS_BETTER = ("accuracy", "margin", "chosen")
_NO_TESTS = (EVALUATION, ON_TRAINING, "loss")
_OF_TESTS = ("test", "retrieval", "recall", "r@", "score", "accuracy", "f1", "exact")


class Range(Spec):
    """Numbers between two ends; whole ones, if both ends are."""

    low: int | float
    """The least."""
    high: int | float
    """The greatest."""
    log: bool = False
    """Drawn evenly in the logarithm, as suits rates."""
    step: int | float | None = Field(default=None, gt=0)
    """Only `low` and so many steps from it."""

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if self.low >= self.high:
            raise ValueError(f"low {self.low} is not below high {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"low is {self.low}, which has no logarithm: set log to false, or low above 0")
        if self.log and self.step:
            raise ValueError("log and step do not go together: list the values instead")
        return self

    @property
    def whole(self) -> bool:
        """Whether only whole numbers are meant."""
        return isinstance(self.low, int) and isinstance(self.high, int) and not isinstance(self.step, float)


class Halving(Spec):
    """Trials are stopped early: asynchronous successive halving (Li et al., arXiv:1810.05934).

    After `least` steps, and after `reduction` times as many, and so on, a trial goes on only if it is among the best
    1 / `reduction` of those that came so far.
    """

    least: int = Field(ge=1)
    """Steps after which a trial is compared for the first time."""
    reduction: int = Field(default=3, ge=2)
    """One of so many goes on."""


class Sweep(Spec):
    """All settings of one search."""

    name: str = Field(default="", pattern=r"^([a-z0-9][a-z0-9._-]*)?$")
    """What the folder is called: `sweeps/<name>-0001`; by default as the recipe."""
    recipe: str
    """Name of a shipped recipe, or path of a YAML file (from the folder of this file)."""
    set: Mapping[str, Any] = Field(default_factory=dict)
    """Settings of the recipe that are the same in all trials, by dotted path."""
    search: Mapping[str, Range | tuple[Any, ...]] = Field(min_length=1)
    """What is searched, by dotted path: a list of values, or `{low: 1e-4, high: 1e-2, log: true}`."""
    method: Literal["grid", "random", "tpe"] = "tpe"
    """`grid` tries every combination of lists; `random` draws; `tpe` (tree-structured Parzen estimators, Bergstra et
    al. 2011) draws where good trials lie more densely than others, after ten random ones."""
    trials: int | None = Field(default=None, ge=1)
    """How many; by default 20, or all combinations of a grid. Lists have no more than their combinations."""
    metric: str
    """`STAGE.FIELD`, or `STAGE.PHASE.FIELD` in tune: a field of that `metrics.jsonl`, such as `pretrain.evaluation`."""
    direction: Literal["minimize", "maximize"] = "minimize"
    """What is better; `maximize` for the terms `accuracy`, `margin` and `chosen` of align."""
    take: Literal["best", "last"] = "last"
    """Which value of a trial counts; of an `evaluation` the best, since that checkpoint is kept."""
    halving: Halving | None = None
    """Stop trials early; by default none is."""
    seed: int = Field(default=0, ge=0)
    """Of what is drawn."""
    final: bool = True
    """Run the best settings to the end of the recipe, with test scores, when all trials are done."""

    @classmethod
    def derive(cls, given: Mapping[str, Any]) -> Mapping[Keys, Derived]:
        """The best evaluation of a trial counts; of some terms of align, and of speed, more is better."""
        metric = given.get("metric")
        if isinstance(metric, str) and metric.endswith(f".{EVALUATION}"):
            return {("take",): Derived("best", "metric")}
        if isinstance(metric, str) and (metric.rpartition("/")[2] in _MORE_IS_BETTER or metric.endswith("_per_s")):
            return {("direction",): Derived("maximize", "metric")}
        return {}

    @model_validator(mode="after")
    def _searchable(self) -> Sweep:
        for key, given in self.search.items():
            if isinstance(given, Range):
                if self.method == "grid":
                    raise ValueError(f"search.{key} is a range, and a grid has no end of values: list them")
                continue
            if not given:
                raise ValueError(f"search.{key} has no values: list two or more")
            texts = [json.dumps(value, sort_keys=True) for value in given]
            if double := next((text for text in texts if texts.count(text) > 1), None):
                raise ValueError(f"search.{key} has {double} twice")
            if "null" in texts:
                raise ValueError(f"search.{key} has null, which takes a setting away: write the value it stands for")
        if both := sorted(set(self.set) & set(self.search)):
            raise ValueError(f"{', '.join(both)}: set and searched; take one of the two out")
        return self

    @property
    def number(self) -> int:
        """How many trials there are to be."""
        if any(isinstance(given, Range) for given in self.search.values()):
            return self.trials or 20
        there = math.prod(len(given) for given in self.search.values() if not isinstance(given, Range))
        return min(self.trials or (there if self.method == "grid" else 20), there)

    def grid(self) -> list[dict[str, Any]]:
        """Every combination of listed values, the last setting changing fastest."""
        lists = [given for given in self.search.values() if not isinstance(given, Range)]
        return [dict(zip(self.search, values, strict=True)) for values in itertools.product(*lists)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A sweep that was checked against its recipe.

    Attributes:
        sweep: Its settings.
        base: The recipe with what is set in all trials.
        stage: Of the metric; trials end after it.
        phase: Of the metric; empty where the stage has none.
        field: Of ``metrics.jsonl``.
        shared: Names of the stages before the first searched setting, the data stage first: made once for all.
        later: Names of the stages after that of the metric: only in the last run.
        middle: Names of the stages that each trial makes.
    """

    sweep: Sweep
    base: Resolved[Recipe]
    stage: str
    phase: str
    field: str
    shared: tuple[str, ...]
    middle: tuple[str, ...]
    later: tuple[str, ...]

    def overrides(self, values: Mapping[str, Any], *, without: Sequence[str] = ()) -> list[str]:
        """The recipe's overrides for these values, without some stages."""
        listed = [assignment(key, value) for key, value in {**self.sweep.set, **values}.items()]
        return [*listed, *(f"stages.{name}=null" for name in without)]

    def trial(self, values: Mapping[str, Any]) -> Resolved[Recipe]:
        """The recipe of a trial: it ends with the stage that is judged."""
        return load_recipe(self.sweep.recipe, self.overrides(values, without=self.later))

    def begin(self) -> Resolved[Recipe]:
        """The recipe of what all trials share."""
        return load_recipe(self.sweep.recipe, self.overrides({}, without=(*self.middle, *self.later)))

    def whole(self, values: Mapping[str, Any]) -> Resolved[Recipe]:
        """The recipe of the last run."""
        return load_recipe(self.sweep.recipe, self.overrides(values))


def assignment(key: str, value: Any) -> str:
    """A setting as an override."""
    return f"{key}={json.dumps(value, ensure_ascii=False)}"


def load_sweep(target: str, words: Sequence[str] = ()) -> Sweep:
    """Read a sweep.

    Args:
        target: A YAML file of a sweep, or a recipe, of which ``words`` say all.
        words: ``key=value``: settings of the sweep (``trials=20``), or, of the recipe, a list or range to search
            (``stages.pretrain.lr=[1e-4, 1e-3]``) or a value to set.

    Raises:
        ConfigError: Anything is wrong; names the nearest setting.
    """
    path = Path(target)
    is_sweep = path.is_file() and target not in shipped() and read_file(path).get("search") is not None
    mine, tree = [], Node({}, Source("default"))
    for word in words:
        keys, node = read_override(word)
        if keys[0] in Sweep.model_fields and not (keys[0] == "name" and not is_sweep):
            mine.append(word)
            continue
        near = difflib.get_close_matches(keys[0], Sweep.model_fields, n=1)
        if near and keys[0] not in Recipe.model_fields:
            remedy = f"did you mean {near[0]!r}? settings of the recipe begin with data or stages"
            raise ConfigError(f"neither the sweep nor the recipe has {keys[0]!r}", place=word, remedy=remedy)
        part = "search" if isinstance(node.value, list | dict) else "set"
        held = tree.get(part) or Node({}, node.source)
        assert isinstance(tree.value, dict)
        assert isinstance(held.value, dict)
        below = Node({**held.value, ".".join(keys): node}, node.source)
        tree = Node({**tree.value, part: below}, tree.source)
    if is_sweep:
        read = load(Sweep, path, mine, paths=(("recipe",),), names=tuple(shipped()))
        found = from_folders(read.spec, lambda part, key: _folder(read, f"{part}.{key}"))
        if isinstance(tree.value, dict) and tree.value:
            more = resolve(Sweep, _over(found, tree)).spec
            found = more
        return found if found.name else found.model_copy(update={"name": path.stem.lower()})
    find_recipe(target)
    assert isinstance(tree.value, dict)
    source = Source("override", target)
    return resolve(Sweep, Node({**tree.value, "recipe": Node(target, source)}, source), mine).spec


def from_folders(sweep: Sweep, folder: Callable[[str, str], Path]) -> Sweep:
    """A sweep whose paths of own data are absolute, so that it means the same wherever it is read.

    Args:
        sweep: Any.
        folder: Of ``set`` or ``search``, and a setting there: what its relative paths are relative to.
    """
    fixed = {key: rooted(assignment(key, value), folder("set", key)) for key, value in sweep.set.items()}
    tried = {
        key: given
        if isinstance(given, Range)
        else tuple(rooted(assignment(key, value), folder("search", key)) for value in given)
        for key, given in sweep.search.items()
    }
    return sweep.model_copy(update={"set": fixed, "search": tried})


def _folder(read: Resolved[Sweep], at: str) -> Path:
    """Folder of the file that gives a setting; the working directory if the command line does."""
    for path, source in read.sources.items():
        if source.kind == "file" and (path == at or path.startswith(f"{at}.")):
            return Path(source.place).parent
    return Path()


def _over(found: Sweep, tree: Node) -> Node:
    """A sweep with more that is searched or set; a setting leaves the part where it stood before."""
    source = Source("override", "the command line")
    plain = {
        key: Node(value, source) for key, value in found.model_dump(mode="json", exclude={"search", "set"}).items()
    }
    parts: dict[str, dict[str, Any]] = {"search": dict(found.model_dump(mode="json")["search"]), "set": dict(found.set)}
    given = tree.plain()
    for name, part in parts.items():
        for other in ("search", "set"):
            for key in given.get(other, {}):
                part.pop(key, None)
        part.update(given.get(name, {}))
    nodes = {key: _node(value, source) for key, value in parts.items()}
    nodes["halving"] = _node(found.model_dump(mode="json")["halving"], source)
    return Node({**plain, **nodes}, source)


def _node(value: Any, source: Source) -> Node:
    if isinstance(value, dict):
        return Node({str(key): _node(below, source) for key, below in value.items()}, source)
    return Node([_node(item, source) for item in value], source) if isinstance(value, list) else Node(value, source)


def check(sweep: Sweep) -> Plan:
    """See that the sweep fits its recipe: every setting and value is known, the metric is one that may judge.

    Raises:
        ConfigError: It does not; the remedy names what would.
    """
    fixed = [assignment(key, value) for key, value in sweep.set.items()]
    base = load_recipe(sweep.recipe, fixed)
    names = list(base.spec.stages)
    stage, phase, field = _metric(sweep.metric, base.spec)
    order = ["data", *names]
    _check_before(names[: names.index(stage)], base.spec, stage)
    judge = Judge(stage=stage, phase=phase, field=field)
    firsts: list[int] = []
    for key, given in sweep.search.items():
        at = _place(key, order)
        if at > order.index(stage):
            raise ConfigError(
                f"{key} is searched, but {sweep.metric} is known before that stage: it cannot judge it",
                place="metric",
                remedy=f"judge by a number of {order[at]} or of a later stage",
            )
        firsts.append(at)
        found: list[Recipe] = []
        for value in (given.low, given.high) if isinstance(given, Range) else given:
            try:
                found.append(load_recipe(sweep.recipe, [*fixed, assignment(key, value)]).spec)
            except ConfigError as fault:
                if any(word in fault.cause for word in ("unknown setting", "expected", "cannot set")):
                    raise ConfigError(f"search: {fault.cause}", place=fault.place, remedy=fault.remedy) from fault
                # Settings that do not go together may do so with another one of the same trial.
        check_measure(key, found, judge)
        if at < order.index(stage):
            check_reference(key, base.spec, judge)
    cut = min(firsts)
    return Plan(
        sweep=sweep if sweep.name else sweep.model_copy(update={"name": base.spec.name}),
        base=base,
        stage=stage,
        phase=phase,
        field=field,
        shared=tuple(order[:cut]),
        middle=tuple(order[cut : order.index(stage) + 1]),
        later=tuple(order[order.index(stage) + 1 :]),
    )


def _check_before(names: Sequence[str], recipe: Recipe, stage: str) -> None:
    """See that no stage before the one that is judged reads test splits: they are shut in trials, and it would fail.

    Raises:
        ConfigError: One does.
    """
    tests = [name for name in names if recipe.stages[name].kind not in _TRAINS]
    if tests:
        which = " and ".join(tests)
        raise ConfigError(
            f"every trial would make {which} before {stage}, and ask the test splits there, which are shut in trials",
            place=", ".join(f"stages.{name}" for name in tests),
            remedy=f"put {which} behind {stage} in the recipe, so that only the last run makes it; or take it out: "
            + " ".join(f"stages.{name}=null" for name in tests),
        )


def metrics_file(plan: Plan, folder: Path) -> Path:
    """Where the metric of a trial is written, in the folder of its stage."""
    return (folder / plan.phase if plan.phase else folder) / "metrics.jsonl"


def _place(key: str, order: Sequence[str]) -> int:
    """Number of the stage that a setting belongs to: what is of no stage is of the first."""
    if key in ("name", "extends"):
        raise ConfigError(f"{key} cannot be searched", place="search", remedy="take it out")
    parts = key.split(".")
    return order.index(parts[1]) if parts[0] == "stages" and len(parts) > 2 and parts[1] in order else 0


def _metric(metric: str, recipe: Recipe) -> tuple[str, str, str]:
    """Stage, phase and field of a metric."""
    name, *rest = metric.split(".")
    trains = {key: stage for key, stage in recipe.stages.items() if stage.kind in _TRAINS}
    stage: Stage | None = recipe.stages.get(name)
    of_training = bool(rest) and rest[-1].partition("/")[0] in _NO_TESTS
    of_test = not of_training and any(word in metric.lower() for word in _OF_TESTS)
    if (stage is not None and stage.kind == "evaluate") or of_test:
        raise ConfigError(
            f"{metric}: a score of a test split cannot judge trials: the best of many looks at the test is no test",
            place="metric",
            remedy="use the loss on the validation split: STAGE.evaluation, with trainer.validation of the stage set",
        )
    if rest and rest[-1].partition("/")[0] == ON_TRAINING:
        raise ConfigError(
            f"{metric}: how well a model knows samples that it was trained on does not say how good it is, and which "
            "samples these are depends on what is searched",
            place="metric",
            remedy=f"judge by {name}.{EVALUATION}, of the validation split",
        )
    if name not in trains or not rest:
        near = difflib.get_close_matches(name, trains, n=1)
        hint = f"did you mean {'.'.join([near[0], *(rest or ['evaluation'])])!r}? " if near else ""
        remedy = f"{hint}write STAGE.FIELD, such as {next(iter(trains), 'pretrain')}.evaluation"
        raise ConfigError(
            f"{metric}: no stage of the recipe that trains is called {name!r}", place="metric", remedy=remedy
        )
    if trains[name].kind != "tune":
        return name, "", ".".join(rest)
    if rest[0] == PHASES[0] and rest[-1].partition("/")[0] == EVALUATION:
        raise ConfigError(
            f"{metric}: the first phase, which learns words, is not judged",
            place="metric",
            remedy=f"judge by {name}.{EVALUATION}, of the last phase, or by {name}.{PHASES[0]}.loss",
        )
    if rest[0] in PHASES and len(rest) > 1:
        return name, rest[0], ".".join(rest[1:])
    return name, PHASES[-1], ".".join(rest)


def is_number(value: object) -> bool:
    """Whether a field of a record is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
