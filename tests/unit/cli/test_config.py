"""``plait config``: schema, explain, show."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from plait.cli.main import main
from plait.recipes.recipe import load_recipe, recipe_schema

pytestmark = pytest.mark.light


@pytest.fixture
def mine(tmp_path: Path) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nseed: 7\ndata: {source: {max_test: 10}}\nstages:\n  pretrain: {}\n")
    return str(path)


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(["config", *words])
    out, err = capsys.readouterr()
    return code, out, err


def test_schema_prints_the_schema_with_and_without_json(capsys: pytest.CaptureFixture[str]) -> None:
    plain, as_json = run(capsys, "schema"), run(capsys, "schema", "--json")
    assert plain == as_json
    assert json.loads(plain[1]) == recipe_schema()


def test_explain_says_value_source_type_range_default_and_meaning(
    capsys: pytest.CaptureFixture[str], mine: str
) -> None:
    code, out, _ = run(capsys, "explain", "data.source.max_test", "--recipe", mine, "data.source.max_test=9")
    rows = dict(line.split(maxsplit=1) for line in out.splitlines()[1:])
    assert code == 0
    assert out.startswith("data.source.max_test\n")
    assert rows["value"] == "9"
    assert rows["from"] == "override 'data.source.max_test=9'"
    assert rows["type"] == "integer or null"
    assert rows["range"] == "≥ 1"
    assert rows["default"] == "200"
    assert rows["meaning"].startswith("At most this many pictures")


@pytest.mark.parametrize(
    ("key", "value", "source"),
    [
        ("data.source.max_test", 10, "mine.yaml:3"),
        ("stages.pretrain.seed", 7, "from seed"),
        ("data.source.size", 72, "default"),
    ],
)
def test_explain_tells_every_kind_of_source(
    capsys: pytest.CaptureFixture[str], mine: str, key: str, value: int, source: str
) -> None:
    _, out, _ = run(capsys, "explain", key, "--json", "--recipe", mine)
    (record,) = json.loads(out)["settings"]
    assert (record["value"], record["from"]) == (value, source)


def test_explain_without_a_recipe_lists_each_choice(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "explain", "data.source.max_test")
    assert "data.source.kind = emoji" in out
    assert "data.source.kind = pairs" in out


def test_explain_of_a_group_lists_what_is_below(capsys: pytest.CaptureFixture[str], mine: str) -> None:
    _, out, _ = run(capsys, "explain", "data", "--json", "--recipe", mine)
    assert {"data.source", "data.seed"} <= set(json.loads(out)["below"])


def test_explain_knows_the_trainers_choices(capsys: pytest.CaptureFixture[str], mine: str) -> None:
    _, out, _ = run(capsys, "explain", "stages.pretrain.trainer.optimizer.weight_decay", "--json", "--recipe", mine)
    (record,) = json.loads(out)["settings"]
    assert (record["value"], record["from"]) == (0.1, "default")
    _, out, _ = run(capsys, "explain", "stages.tune.trainer.optimizer.momentum")
    assert "stages.tune.trainer.optimizer.kind = sgd" in out


def test_explain_of_an_unknown_key_suggests_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "explain", "pretrain.seed")
    assert (code, out) == (3, "")
    assert "did you mean 'stages.pretrain.seed'?" in err


def test_show_prints_a_recipe_that_loads_to_the_same(
    capsys: pytest.CaptureFixture[str], mine: str, tmp_path: Path
) -> None:
    code, out, _ = run(capsys, "show", mine, "data.source.max_test=9")
    again = tmp_path / "again.yaml"
    again.write_text(out)
    assert code == 0
    assert load_recipe(str(again)).spec == load_recipe(mine, ["data.source.max_test=9"]).spec
    assert "# override 'data.source.max_test=9'" in out
    assert "# from seed" in out


def test_show_as_json_gives_values_and_sources(capsys: pytest.CaptureFixture[str], mine: str) -> None:
    _, out, _ = run(capsys, "show", mine, "--json")
    shown = json.loads(out)
    assert shown["recipe"] == load_recipe(mine).spec.model_dump(mode="json")
    assert shown["sources"]["seed"] == "mine.yaml:2"


def test_a_fault_exits_with_the_code_of_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "show", "lost.yaml")
    assert code == 3
    assert "no such recipe file" in err


def test_import_prints_a_recipe_and_says_on_stderr_where_every_key_went(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"gradient_clipping": 0.5, "steps_per_print": 9, "wandb": {"project": "x"}, "typo": 1}')
    code, out, err = run(capsys, "import", str(path), "--extends", "quickstart")
    assert code == 0
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(out)
    assert load_recipe(str(recipe)).spec.stages["tune"].model_dump()["trainer"]["clip_norm"] == 0.5
    keys = ["gradient_clipping", "steps_per_print", "wandb.project", "typo"]
    lines = err.splitlines()
    assert [sum(f"{key} =" in line for line in lines) for key in keys] == [1, 1, 1, 1]
    assert lines[-1] == "4 keys: 1 mapped, 1 as it is, 1 not mapped, 1 unknown"


def test_import_writes_a_file_once_and_tells_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path, target = tmp_path / "args.txt", tmp_path / "mine.yaml"
    path.write_text("--train-iters $N --lr 1e-4")
    words = ("import", str(path), "--stage", "align", "--set", "N=30", "--out", str(target), "--json")
    code, out, _ = run(capsys, *words)
    told = json.loads(out)
    assert (code, told["tool"], told["recipe"]) == (0, "megatron", target.read_text())
    assert {"key": "--train-iters", "outcome": "mapped", "settings": {"steps": 30}}.items() <= told["keys"][0].items()
    assert load_recipe(str(target)).spec.stages["align"].model_dump()["steps"] == 30
    code, _, err = run(capsys, *words)
    assert code == 3
    assert "there is a file already" in err


@pytest.mark.parametrize(
    ("words", "code", "cause"),
    [
        (["--set", "N"], 2, "NAME=VALUE"),
        (["--processes", "-1"], 2, "--processes is -1"),
        (["--stage", "data"], 3, "no stage 'data'"),
        (["--extends", "quikstart"], 3, "did you mean 'quickstart'?"),
        (["--out", "/no/such/folder/x.yaml"], 5, "/no/such/folder/x.yaml"),
    ],
)
def test_import_refuses(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, words: list[str], code: int, cause: str
) -> None:
    path = tmp_path / "args.txt"
    path.write_text("--lr 1e-4")
    found, out, err = run(capsys, "import", str(path), *words)
    assert (found, out) == (code, "")
    assert cause in err
