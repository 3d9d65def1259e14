"""Typed settings: layers, provenance, faults with their place, and one truth for loader, editor and catalogue."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import jsonschema
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from plait.core.catalogue import file_schema, nearest
from plait.core.errors import ConfigError
from plait.core.spec import Derived, Resolved, Spec, catalogue, load, resolve, to_yaml
from plait.core.yamltext import Keys, leaves, read_text, write_text

pytestmark = pytest.mark.light


class Csv(Spec):
    kind: Literal["csv"] = "csv"
    path: Path
    """The table."""
    separator: str = Field(default=",", min_length=1, max_length=2)
    """Between the columns."""


class Pictures(Spec):
    kind: Literal["pictures"] = "pictures"
    size: tuple[int, int] = (32, 32)
    """Height and width, in pixels."""
    styles: tuple[str, ...] = ("flat",)
    """Which styles to take."""


AnySource = Annotated[Csv | Pictures, Field(discriminator="kind")]


class Part(Spec):
    rank: int = Field(default=4, ge=1, le=64)
    """Rank."""
    name: str = "all"
    """Which weights."""


class Train(Spec):
    kind: Literal["train"] = "train"
    seed: int = 0
    """Seed."""
    steps: int = Field(default=100, ge=1)
    """Updates."""
    rate: float = Field(default=1e-3, gt=0, lt=1)
    """Learning rate."""
    limit: int | None = Field(default=5, ge=0)
    """At most so many samples; null is all."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Number format."""
    warm: bool = False
    """Start warm."""
    threads: int | Literal["auto"] = "auto"
    """Threads."""
    source: AnySource = Pictures(size=(9, 9))
    """Where samples come from."""
    adapter: Part = Part(rank=7)
    """The main part."""
    parts: tuple[Part, ...] = ()
    """More parts."""
    weights: Mapping[str, float] = Field(default_factory=dict)
    """Weight of each term."""
    anything: Any = None
    """Passed on."""

    @field_validator("weights")
    @classmethod
    def _some_weight(cls, weights: Mapping[str, float]) -> Mapping[str, float]:
        if weights and sum(weights.values()) <= 0:
            raise ValueError("the weights must have a positive sum")
        return weights

    @model_validator(mode="after")
    def _warm_needs_steps(self) -> Train:
        if self.warm and self.steps < 10:
            raise ValueError("a warm start needs 10 steps")
        return self


class Score(Spec):
    kind: Literal["score"] = "score"
    metric: str = "f1"
    """What is measured."""
    seed: int = 0
    """Seed."""


def _by_path(given: Any) -> Any:
    return {"kind": "csv", "path": given} if isinstance(given, str) else given


class Read(Spec):
    """A stage whose source may be given as a path alone."""

    source: Annotated[AnySource, BeforeValidator(_by_path, json_schema_input_type=AnySource | str)] = Pictures()
    """Where samples come from."""


class Life(Spec):
    """A whole run."""

    name: str
    """What it is called."""
    seed: int = 0
    """Seed of all stages."""
    stages: Mapping[str, Annotated[Train | Score, Field(discriminator="kind")]] = Field(default_factory=dict)
    """The stages."""

    @classmethod
    def derive(cls, given: Mapping[str, Any]) -> Mapping[Keys, Derived]:
        found: dict[Keys, Derived] = {}
        stages = given.get("stages")
        for name in stages if isinstance(stages, Mapping) else ():
            found["stages", name, "seed"] = Derived(given.get("seed", 0), "seed")
            if name in ("train", "score"):
                found["stages", name, "kind"] = Derived(name, "the name")
        return found


BASE = """\
name: base
stages:
  train:
    steps: 50
    rate: 1e-4
  last:
    kind: score
    seed: 3
"""


def life(text: str = BASE, *overrides: str) -> Resolved[Life]:
    return resolve(Life, read_text(text, "life.yaml"), overrides)


def fault(text: str = BASE, *overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        life(text, *overrides)
    return caught.value


PATHS = [s.path for s in catalogue(Life).settings(life().spec.model_dump(mode="json"))]
SCHEMA = jsonschema.Draft202012Validator(file_schema(catalogue(Life).schema, extends=""))


# --- layers and provenance -----------------------------------------------------------------------------------------


def test_layers_win_in_order_and_every_value_says_where_it_came_from(tmp_path: Path) -> None:
    (tmp_path / "grand.yaml").write_text("name: grand\nseed: 1\nstages:\n  train: {steps: 1, rate: 0.1, limit: 9}\n")
    (tmp_path / "parent.yaml").write_text("extends: grand.yaml\nstages: {train: {steps: 2, rate: 0.2}, score: {}}\n")
    (tmp_path / "child.yaml").write_text("extends: parent.yaml\nname: child\nstages:\n  train:\n    steps: 3\n")
    found = load(Life, tmp_path / "child.yaml", ["stages.score.metric=x", "stages.score.metric=em"])
    train, score = found.spec.stages.values()
    assert isinstance(train, Train)
    assert isinstance(score, Score)
    assert (found.spec.name, train.steps, train.rate, train.limit, score.metric) == ("child", 3, 0.2, 9, "em")
    shown = {path: str(source) for path, source in found.sources.items()}
    assert shown["name"] == "child.yaml:2"
    assert shown["stages.train.steps"] == "child.yaml:5"
    assert shown["stages.train.rate"] == "parent.yaml:2"
    assert shown["stages.train.limit"] == "grand.yaml:4"
    assert shown["stages.train.precision"] == "default"
    assert shown["stages.train.seed"] == "from seed"
    assert shown["stages.train.kind"] == "from the name"
    assert shown["stages.score.metric"] == "override 'stages.score.metric=em'"
    assert found.sources["seed"].where == f"{tmp_path}/grand.yaml:2"


def test_sources_cover_exactly_the_leaves() -> None:
    found = life(BASE, "stages.train.parts=[{rank: 2}, {name: x}]", "stages.train.weights={a.b: 1}")
    assert list(found.sources) == [".".join(keys) for keys, _ in leaves(found.spec.model_dump(mode="json"))]


def test_derived_values_give_way_to_given_ones() -> None:
    stages = life("name: x\nseed: 7\nstages: {train: {}, last: {kind: score, seed: 3}}").spec.stages
    assert [stage.seed for stage in stages.values()] == [7, 3]


def test_derived_values_reach_specs_made_in_python() -> None:
    found = Life(name="x", seed=7, stages={"train": Train(), "b": Score(seed=3), "score": {}})  # pyright: ignore
    assert [stage.seed for stage in found.stages.values()] == [7, 3, 7]


def test_null_takes_away_what_a_parent_gave_or_is_null_where_null_is_allowed() -> None:
    found = life(BASE, "stages.last=null", "stages.train.steps=null", "stages.train.limit=null")
    train = found.spec.stages["train"]
    assert list(found.spec.stages) == ["train"]
    assert isinstance(train, Train)
    assert (train.steps, train.limit) == (100, None)
    assert str(found.sources["stages.train.steps"]) == "default"
    assert str(found.sources["stages.train.limit"]) == "override 'stages.train.limit=null'"


def test_null_that_takes_away_nothing_is_a_fault() -> None:
    typo = fault(BASE, "stages.lst=null")
    assert "none gave it" in typo.cause
    assert "'stages.last'" in typo.remedy
    assert "expected number > 0 and < 1, came null" in fault("name: x\nstages: {train: {rate: }}").cause


def test_a_mapping_joins_the_default_it_changes() -> None:
    train = life(BASE, "stages.train.adapter.name=head", "stages.train.source.styles=[a]").spec.stages["train"]
    assert isinstance(train, Train)
    assert train.adapter == Part(rank=7, name="head")
    assert train.source == Pictures(size=(9, 9), styles=("a",))
    other = life(BASE, "stages.train.source={kind: csv, path: a.csv}").spec.stages["train"]
    assert isinstance(other, Train)
    assert other.source == Csv(path=Path("a.csv"))


def test_a_short_form_is_the_source_of_all_it_stands_for() -> None:
    found = resolve(Read, read_text("source: {size: [1, 1]}", "read.yaml"), ["source=./a.csv"])
    assert found.spec.source == Csv(path=Path("a.csv"))
    assert {str(source) for source in found.sources.values()} == {"override 'source=./a.csv'"}
    assert resolve(Read, read_text(to_yaml(found.spec), "read.yaml")).spec == found.spec
    with pytest.raises(ConfigError, match=r"source\.size: expected list of 2: integer, integer, came text 'x'"):
        resolve(Read, read_text("source: {kind: pictures, size: x}", "read.yaml"))
    with pytest.raises(ConfigError, match=r"source: expected mapping \(Csv\) or mapping \(Pictures\) or text, came 3"):
        resolve(Read, read_text("source: 3", "read.yaml"))


def test_an_item_of_a_list_can_be_overridden() -> None:
    found = life(BASE, "stages.train.parts=[{rank: 2}, {rank: 3}]", "stages.train.parts.1.rank=9")
    train = found.spec.stages["train"]
    assert isinstance(train, Train)
    assert [part.rank for part in train.parts] == [2, 9]
    assert str(found.sources["stages.train.parts.1.rank"]) == "override 'stages.train.parts.1.rank=9'"


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (
            {"a": "extends: b.yaml", "b": "extends: c.yaml", "c": "\nextends: b.yaml"},
            "circle: b.yaml → c.yaml → b.yaml",
        ),
        ({"a": "extends: a.yaml"}, "circle: a.yaml → a.yaml"),
        ({"a": "extends: [b.yaml, c.yaml]"}, "names one parent, came a list"),
        ({"a": "extends: z.yaml"}, "no such file"),
        ({"a": "extends: null"}, "names one parent, came null"),
        ({"a": "extends: b.yaml", "b": "# nothing"}, "the file is empty"),
    ],
)
def test_a_wrong_parent_is_named(tmp_path: Path, files: dict[str, str], says: str) -> None:
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(Life, tmp_path / "a.yaml")
    assert says in caught.value.cause
    assert str(tmp_path) in caught.value.place


# --- faults --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "remedy"),
    [
        ("nme=x", "'name'"),
        ("stages.train.stepz=3", "'stages.train.steps'"),
        ("train.steps=3", "'stages.train.steps'"),
        ("steps=3", "'stages.train.steps'"),
        ("metric=f1", "'stages.last.metric'"),
        ("stages.last.metrik=f1", "'stages.last.metric'"),
        ("stages.train.source.stiles=[a]", "'stages.train.source.styles'"),
        ("stages.train.source.path=a.csv", "goes with stages.train.source.kind = csv"),
        ("stages.train.parts=[{rnk: 3}]", "'stages.train.parts.0.rank'"),
        ("stages.train.adapter.rang=3", "'stages.train.adapter.rank'"),
        ("extends=other", "write `extends` into the recipe file"),
        ("zzzzzz=3", "plait config show"),
    ],
)
def test_an_unknown_key_gets_the_nearest_valid_path(override: str, remedy: str) -> None:
    error = fault(BASE, override)
    assert error.cause.startswith("unknown setting")
    assert remedy in error.remedy
    assert error.place == f"override {override!r}"


def test_an_unknown_key_in_a_file_gets_its_line() -> None:
    error = fault("name: x\nstages:\n  train:\n    rate: 0.1\n    stepz: 3\n")
    assert (error.cause, error.place) == ("unknown setting 'stages.train.stepz'", "life.yaml:5")
    assert error.remedy == "did you mean 'stages.train.steps'?"


def test_a_dotted_key_in_a_file_is_told_to_nest() -> None:
    assert "nest it: write `stages:`" in fault("name: x\nstages.train.steps: 3\nstages: {train: {}}").remedy


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_one_wrong_letter_finds_the_way_back(data: st.DataObject) -> None:
    path = data.draw(st.sampled_from([path for path in PATHS if len(path.rpartition(".")[2]) > 3]))
    parent, _, word = path.rpartition(".")
    place = data.draw(st.integers(0, len(word) - 1))
    letter = data.draw(st.sampled_from(["", *string.ascii_lowercase]))
    typed = ".".join(filter(None, [parent, word[:place] + letter + word[place + 1 :]]))
    assume(typed not in PATHS)
    assert path in nearest(typed, PATHS)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("steps=ten", "expected integer ≥ 1, came text 'ten'"),
        ("steps=0", "expected integer ≥ 1, came 0"),
        ("steps=2.5", "expected integer ≥ 1, came 2.5"),
        ("steps=true", "expected integer ≥ 1, came true"),
        ("steps='12'", "expected integer ≥ 1, came text '12'"),
        ("steps=[1]", "expected integer ≥ 1, came a list (1)"),
        ("steps={a: 1}", "expected integer ≥ 1, came a mapping (a)"),
        ("rate=.nan", "expected number > 0 and < 1, came NaN"),
        ("rate=1", "expected number > 0 and < 1, came 1"),
        ("limit=-1", "expected integer ≥ 0 or null, came -1"),
        ("precision=fp64", "expected one of auto, fp32, bf16, came text 'fp64'"),
        ("warm=1", "expected true or false, came 1"),
        ("warm=yes", "expected true or false, came text 'yes'"),
        ("threads=all", "expected integer or auto, came text 'all'"),
        ("threads=1.5", "expected integer or auto, came 1.5"),
        ("source.size=[1, 2, 3]", "expected list of 2: integer, integer, came a list (1, 2, 3)"),
        ("source.size=[1, x]", "source.size.1: expected integer, came text 'x'"),
        ("source.styles=flat", "expected list of text, came text 'flat'"),
        ("source.kind=web", "expected csv or pictures, came text 'web'"),
        ("source={kind: csv}", "source.path is missing: expected path"),
        ("source={kind: csv, path: 3}", "source.path: expected path, came 3"),
        ("adapter=3", "expected mapping (Part), came 3"),
        ("parts=[{rank: 99}]", "parts.0.rank: expected integer ≥ 1 and ≤ 64, came 99"),
        ("weights={a: x}", "weights.a: expected number, came text 'x'"),
        ("weights={a: -1}", "weights: the weights must have a positive sum"),
    ],
)
def test_a_wrong_value_says_what_was_expected_and_what_came(setting: str, says: str) -> None:
    override = f"stages.train.{setting}"
    error = fault("name: x\nstages: {train: {}}", override)
    assert says in error.cause
    assert error.cause.startswith("stages.train.")
    assert error.place == f"override {override!r}"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("seed: 1", "name is missing: expected text"),
        ("name: x\nstages: {other: {steps: 3}}", "stages.other.kind is missing: expected train or score"),
        ("name: x\nstages: {trian: {steps: 3}}", "stages.trian.kind is missing: expected train or score"),
        ("name: x\nstages: {a: {kind: trane}}", "stages.a.kind: expected train or score, came text 'trane'"),
        ("name: x\nstages: {train: {warm: true, steps: 3}}", "stages.train: a warm start needs 10 steps"),
        (
            "name: x\nstages: [train]",
            "stages: expected mapping of names to mapping (Train) or mapping (Score), came a list",
        ),
    ],
)
def test_faults_of_the_whole(text: str, says: str) -> None:
    assert says in fault(text).cause


def test_all_faults_come_at_once_and_many_are_counted() -> None:
    error = fault("nam: x\nstages:\n  train:\n    steps: no\n    rate: 7\n  last: {kind: csv}\n")
    text = str(error)
    assert error.cause.startswith("5 faults; (1) ")
    for part in ("'nam'", "name is missing", "life.yaml:4", "life.yaml:5", "life.yaml:6"):
        assert part in text
    many = fault("name: x\n" + "".join(f"key{n}: 1\n" for n in range(20)))
    assert many.cause.startswith("20 faults")
    assert many.remedy.endswith("and 14 more")


def test_specs_are_frozen_and_closed() -> None:
    part = Part()
    with pytest.raises(ValidationError, match="frozen"):
        part.rank = 3  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValidationError, match="Extra inputs"):
        Part(rnk=3)  # pyright: ignore[reportCallIssue]


# --- round trip, catalogue, schema ---------------------------------------------------------------------------------

TEXT = st.text(max_size=12)
PLAIN = st.recursive(st.none() | st.booleans() | st.integers() | TEXT, st.lists, max_leaves=4)
SIZES = st.tuples(st.integers(), st.integers())
CSV = {"kind": st.just("csv"), "path": TEXT, "separator": st.text(min_size=1, max_size=2)}
PICTURES = {"kind": st.just("pictures"), "size": SIZES, "styles": st.lists(TEXT, max_size=3)}
PART = st.fixed_dictionaries({}, optional={"rank": st.integers(1, 64), "name": TEXT})
TRAIN: dict[str, st.SearchStrategy[Any]] = {
    "seed": st.integers(),
    "steps": st.integers(10),
    "rate": st.floats(0, 1, exclude_min=True, exclude_max=True),
    "limit": st.none() | st.integers(0),
    "precision": st.sampled_from(["auto", "fp32", "bf16"]),
    "warm": st.booleans(),
    "threads": st.integers() | st.just("auto"),
    "source": st.fixed_dictionaries(CSV) | st.fixed_dictionaries(PICTURES),
    "adapter": PART,
    "parts": st.lists(PART, max_size=2),
    "weights": st.dictionaries(TEXT, st.floats(0.1, 1e300), max_size=2),
    "anything": PLAIN,
}
SCORE: dict[str, st.SearchStrategy[Any]] = {"metric": TEXT, "seed": st.integers()}
STAGE = st.fixed_dictionaries({"kind": st.just("train")}, optional=TRAIN)
STAGE |= st.fixed_dictionaries({"kind": st.just("score")}, optional=SCORE)
LIFE = st.fixed_dictionaries(
    {"name": TEXT}, optional={"seed": st.integers(), "stages": st.dictionaries(TEXT, STAGE, max_size=2)}
)


@settings(max_examples=60, deadline=None)
@given(LIFE)
def test_what_is_dumped_loads_to_the_same(plain: dict[str, Any]) -> None:
    spec = Life.model_validate(plain)
    found = resolve(Life, read_text(to_yaml(spec), "life.yaml"))
    assert found.spec == spec
    assert resolve(Life, read_text(found.to_yaml(), "life.yaml")).spec == spec


def test_every_listed_setting_can_be_set_to_the_value_it_has() -> None:
    found = life(BASE, "stages.train.parts=[{rank: 2}]", "stages.train.weights={a: 1}")
    given = found.spec.model_dump(mode="json")
    listed = [setting for setting in catalogue(Life).settings(given) if setting.leaf]
    assert {path.partition(".weights")[0] for path in found.sources} <= {
        s.path.partition(".weights")[0] for s in listed
    }
    for setting in listed:
        value: Any = given
        for key in setting.path.split("."):
            value = value[int(key)] if isinstance(value, list) else value[key]
        assert (
            resolve(Life, read_text(to_yaml(found.spec), "f"), [f"{setting.path}={json.dumps(value)}"]).spec
            == found.spec
        )


def test_settings_tell_type_range_default_and_meaning() -> None:
    known = {setting.path: setting for setting in catalogue(Life).settings({"stages": {"a": {"kind": "train"}}})}
    assert (known["name"].required, known["seed"].required) == (True, False)
    steps, limit = known["stages.a.steps"], known["stages.a.limit"]
    assert (steps.type, steps.range, steps.default, steps.description) == ("integer", "≥ 1", 100, "Updates.")
    assert (limit.type, limit.range, limit.default) == ("integer or null", "≥ 0", 5)
    assert known["stages.a.precision"].type == "one of auto, fp32, bf16"
    assert known["stages.a.adapter.rank"].default == 7  # that of Train, not that of Part
    assert known["stages.a.source.size"].default == [9, 9]
    assert known["stages.a.source.path"].when == "stages.a.source.kind = csv"
    assert known["stages.a.source.path"].required
    assert not known["stages.a.source"].leaf


VALUES = PLAIN | st.floats(-1e6, 1e6) | st.sampled_from(["auto", "csv", "bf16"])
VALUES |= st.lists(st.integers(), min_size=2, max_size=2) | st.fixed_dictionaries({"rank": st.integers(0, 70)})
FIELDS = sorted(set(Train.model_fields) - {"weights", "warm", "kind"})  # the first two have rules in Python


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(FIELDS), VALUES)
def test_editor_and_loader_agree(field: str, value: Any) -> None:
    assume(value is not None)  # null may take away, which no schema can know
    plain = {"name": "x", "stages": {"a": {"kind": "train", field: value}}}
    valid = SCHEMA.is_valid(plain)
    try:
        resolve(Life, read_text(write_text(plain), "life.yaml"))
        loads = True
    except ConfigError:
        loads = False
    assert loads == valid


WORDS = [*Train.model_fields, *Score.model_fields, "path", "size", "rank", "stages", "name", "zzz", "0"]
WILD = st.recursive(
    VALUES | st.none(), lambda below: st.dictionaries(st.sampled_from(WORDS), below, max_size=2), max_leaves=5
)


@settings(max_examples=80, deadline=None)
@given(
    st.dictionaries(st.sampled_from(WORDS), WILD, max_size=2), st.dictionaries(st.sampled_from(WORDS), WILD, max_size=2)
)
def test_wild_settings_load_or_are_refused_with_a_place(top: dict[str, Any], stages: dict[str, Any]) -> None:
    plain = {"name": "x", **top, "stages": stages}
    try:
        found = resolve(Life, read_text(write_text(plain), "life.yaml"))
    except ConfigError as error:
        refused = error
    else:
        assert resolve(Life, read_text(to_yaml(found.spec), "life.yaml")).spec == found.spec
        return
    assert refused.place.startswith("life.yaml:")
    assert refused.remedy
