"""Recipes: found by name or path, resolved, saved, and in step with the committed schema."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from plait.core.errors import ConfigError
from plait.core.spec import catalogue
from plait.recipes import recipe as module
from plait.recipes.recipe import Recipe, find_recipe, load_recipe, recipe_schema, shipped, stage_kinds
from plait.stages.data import Data
from plait.stages.pretrain import Pretrain

pytestmark = pytest.mark.light

ROOT = Path(__file__).parents[3]
SCHEMA = ROOT / "docs" / "recipe.schema.json"
MODELINE = "# yaml-language-server: $schema=../../../docs/recipe.schema.json"


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "name: mine\nseed: 7\ndata: {source: {max_test: 10}}\n"
        "stages:\n  pretrain: {}\n  again: {kind: pretrain, seed: 3}\n"
    )
    return path


def test_the_seed_goes_to_every_stage_that_gives_none(mine: Path) -> None:
    found = load_recipe(str(mine))
    assert [found.spec.data.seed, *(stage.seed for stage in found.spec.stages.values())] == [7, 7, 3]
    assert str(found.sources["data.seed"]) == str(found.sources["stages.pretrain.seed"]) == "from seed"
    assert str(found.sources["stages.again.seed"]) == "mine.yaml:6"
    assert str(found.sources["stages.pretrain.kind"]) == "from the stage's name"
    other = load_recipe(str(mine), ["seed=8", "data.seed=1"])
    assert [other.spec.data.seed, *(stage.seed for stage in other.spec.stages.values())] == [1, 8, 3]


def test_a_recipe_made_in_python_hands_its_seed_down_too() -> None:
    made = Recipe(name="x", seed=7, data=Data(), stages={"pretrain": Pretrain(), "b": Pretrain(seed=3)})
    assert [made.data.seed, *(stage.seed for stage in made.stages.values())] == [7, 7, 3]


def test_a_bare_recipe_is_the_data_stage_alone(tmp_path: Path) -> None:
    path = tmp_path / "bare.yaml"
    path.write_text("name: bare\n")
    found = load_recipe(str(path))
    assert found.spec == Recipe(name="bare")
    assert not found.spec.stages


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("pretrain.seed=5", "did you mean 'stages.pretrain.seed'?"),
        ("stages.pretrain.sead=5", "did you mean 'stages.pretrain.seed'?"),
        ("stages.pretrian.seed=5", "stages.pretrian.kind is missing"),
        ("data.sourse=x", "did you mean 'data.source'?"),
        ("stages.agian=null", "none gave it | at override 'stages.agian=null' | fix: did you mean 'stages.again'"),
        ("seed=-1", "seed: expected integer ≥ 0, came -1"),
        ("name=../../etc", "name: expected text matching"),
        ("stages.A/b={kind: pretrain}", "stages.A/b: expected a name matching"),
        ("stages.pretrain.kind=data", "stages.pretrain.kind: expected pretrain, came text 'data'"),
        ("stages=[pretrain]", "stages: expected mapping"),
        ("data.source.path=x.csv", "it goes with data.source.kind = pairs"),
    ],
)
def test_typos_are_answered(mine: Path, override: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(str(mine), [override])
    assert says in str(caught.value)


def test_a_saved_recipe_loads_by_path_alone(mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = tmp_path / "child.yaml"
    child.write_text("extends: mine.yaml\nname: child\nstages: {again: null}\n")
    found = load_recipe(str(child), ["data.source.max_test=5"])
    assert list(found.spec.stages) == ["pretrain"]
    run = tmp_path / "runs" / "child-0001"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(found.to_yaml(), encoding="utf-8")
    mine.unlink()
    child.unlink()
    monkeypatch.chdir(run)
    for name in ("recipe.yaml", str(run), "../child-0001"):
        assert load_recipe(name).spec == found.spec
    assert "override 'data.source.max_test=5'" in (run / "recipe.yaml").read_text()


def test_a_recipe_that_extends_another_is_called_after_its_own_file(mine: Path, tmp_path: Path) -> None:
    for file, name in (("child.yaml", "child"), ("My Own.yaml", "my-own")):
        (tmp_path / file).write_text("extends: mine.yaml\nseed: 3\n")
        found = load_recipe(str(tmp_path / file))
        assert found.spec.name == name
        assert str(found.sources["name"]) == "from the file's name"
        assert load_recipe(str(tmp_path / file), ["name=given"]).spec.name == "given"
        (tmp_path / "again.yaml").write_text(found.to_yaml())  # as a run keeps it
        assert load_recipe(str(tmp_path / "again.yaml")).spec == found.spec
    assert load_recipe(str(mine)).spec.name == "mine"


def test_a_fault_between_settings_says_where_each_stands(tmp_path: Path) -> None:
    path = tmp_path / "child.yaml"
    path.write_text("extends: quickstart\n\nstages:\n  tune:\n    connector: {kind: qformer}\n")
    with pytest.raises(ConfigError, match="only the connector `words` has a first phase") as caught:
        load_recipe(str(path))
    parent = shipped()["quickstart"].read_text().splitlines()
    line = next(n for n, text in enumerate(parent, 1) if text.strip().startswith("new_pictures:"))
    assert f"quickstart.yaml:{line} (new_pictures)" in caught.value.place
    assert f"{path}:5 (connector)" in caught.value.place
    with pytest.raises(ConfigError) as caught:
        load_recipe("quickstart", ["stages.tune.connector.kind=qformer"])
    assert "override 'stages.tune.connector.kind=qformer' (connector)" in caught.value.place


def test_recipes_are_found_by_name_or_path(mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "shipped"
    folder.mkdir()
    (folder / "quickstart.yaml").write_text("name: quickstart\n")
    monkeypatch.setattr(module, "_FOLDER", folder)
    assert find_recipe("quickstart") == folder / "quickstart.yaml"
    assert find_recipe(str(mine)) == mine
    assert find_recipe("mine.yaml", tmp_path) == mine
    with pytest.raises(ConfigError) as unknown:
        find_recipe("quickstrat")
    assert unknown.value.remedy.startswith("did you mean 'quickstart'? shipped recipes: quickstart")
    with pytest.raises(ConfigError, match="no such recipe file") as missing:
        find_recipe("lost/recipe.yaml")
    assert missing.value.place == "lost/recipe.yaml"
    mine.write_text("extends: quickstart\nseed: 4\n")
    assert load_recipe(str(mine)).spec == Recipe(name="mine", seed=4)
    mine.write_text("seed: 4\nextends: quikstart\n")
    with pytest.raises(ConfigError, match="did you mean 'quickstart'") as parent:
        load_recipe(str(mine))
    assert parent.value.place == f"{mine}:2"


def test_loading_imports_neither_torch_nor_transformers(mine: Path) -> None:
    code = (
        "import sys; from plait.recipes.recipe import load_recipe; load_recipe(sys.argv[1]);"
        "print(sorted({'torch', 'transformers', 'numpy', 'PIL', 'rich'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code, str(mine)], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# --- schema --------------------------------------------------------------------------------------------------------


def test_the_committed_schema_is_the_generated_one() -> None:
    committed = json.loads(SCHEMA.read_text(encoding="utf-8"))
    assert committed == json.loads(json.dumps(recipe_schema())), "run `plait config schema > docs/recipe.schema.json`"


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ("name: x", True),
        ("seed: 3", False),
        ("extends: y", True),
        ("extends: y\nstages: {pretrain: null, other: null}", True),
        ("name: x\nstages: {pretrain: {}}", True),
        ("name: x\nstages: {pretrain: {kind: pretrain}}", True),
        ("name: x\nstages: {pretrain: {kind: data}}", False),
        ("name: x\nstages: {other: {}}", False),
        ("name: x\nstages: {other: {kind: pretrain}}", True),
        ("name: x\nstages: {other: {kind: pretrain, sead: 3}}", False),
        ("name: x\nstages: {pretrain: {sead: 3}}", False),
        ("name: x\nstages: {Other: {kind: pretrain}}", False),
        ("name: x\ndata: {kind: pretrain}", False),
    ],
)
def test_the_schema_says_what_the_loader_says(tmp_path: Path, text: str, valid: bool) -> None:
    assert jsonschema.Draft202012Validator(recipe_schema()).is_valid(yaml.safe_load(text)) == valid
    if "extends" not in text:
        (tmp_path / "r.yaml").write_text(text)
        if valid:
            load_recipe(str(tmp_path / "r.yaml"))
        else:
            with pytest.raises(ConfigError):
                load_recipe(str(tmp_path / "r.yaml"))


def test_the_schema_is_a_valid_schema_that_offers_every_kind() -> None:
    schema = recipe_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    assert tuple(schema["properties"]["stages"]["properties"]) == stage_kinds()
    assert "pretrain" in stage_kinds()
    assert schema["properties"].keys() == {"extends", *Recipe.model_fields}
    assert catalogue(Recipe).schema["required"] == ["name"], "the file schema must not change the spec's own"


def test_shipped_recipes_load_validate_and_carry_the_modeline() -> None:
    for name, path in shipped().items():
        text = path.read_text(encoding="utf-8")
        first, second = text.splitlines()[:2]
        assert first.startswith("# "), f"{name} must begin with one line on what it does, for completion"
        assert second == MODELINE, name
        jsonschema.validate(yaml.safe_load(text), recipe_schema(), jsonschema.Draft202012Validator)
        assert load_recipe(name).spec.name == name
    assert (shipped_folder() / MODELINE.partition("=")[2]).resolve() == SCHEMA


def shipped_folder() -> Path:
    return Path(module.__file__).parent


def test_every_setting_says_what_it_means() -> None:
    mute = [setting.path for setting in catalogue(Recipe).settings() if not setting.description]
    assert not mute, f"write a docstring below these fields: {mute}"


def test_a_connector_that_starts_from_the_first_stage_must_be_the_one_it_trains():
    both = load_recipe("compose-blip2").spec
    connector = both.stages["tune"].connector
    shape = both.stages["pretrain"].qformer
    assert connector.start == "pretrain"
    assert {name: getattr(connector, name) for name in type(shape).model_fields} == shape.model_dump()
    for change, match in (
        ("stages.pretrain=null", "there is no pretrain stage before it"),
        ("stages.pretrain.qformer=null", "trains a dual encoder"),
        ("stages.tune.connector.d=64", "connector.d is 64, stages.pretrain.qformer.d is 128"),
        ("stages.tune.resolution=160", "resolution is 160, stages.pretrain.resolution is 128"),
    ):
        with pytest.raises(ConfigError, match=match):
            load_recipe("compose-blip2", [change])
    assert load_recipe("compose-blip2", ["stages.pretrain=null", "stages.tune.connector.start=drawn"])
