"""A whole recipe in two processes: the model of one, one run folder, one voice, one exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from plait.core.files import find_run, read_jsonl
from plait.recipes.run import summary


class Outcome:
    def __init__(self, root: Path, ended: dict[str, Any]) -> None:
        self.root, self.ended = root, ended

    def run(self, case: str) -> Path:
        return find_run("latest", self.root / case / "runs")

    def said(self, case: str, number: int, stream: str, *, verb: str = "run") -> str:
        return (self.root / case / f"{verb}-{number}.{stream}").read_text()


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory, tiny_folders: dict[str, Path]) -> Outcome:
    root = tmp_path_factory.mktemp("ranks")
    folders = json.dumps({name: str(path) for name, path in tiny_folders.items()})
    top = Path(__file__).parents[3]
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("run_ranks.py")), str(root), folders],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "PLAIT_HOME": str(root / "home"), "PYTHONPATH": f"{top}:{top / 'src'}"},
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return Outcome(root, json.loads(result.stdout.splitlines()[-1]))


def weights(run: Path, stage: str) -> dict[str, Any]:
    last = max((run / stage).rglob("checkpoints/[0-9]*/resume/weights.safetensors"), key=lambda p: p.stat().st_mtime)
    return load_file(last)


@pytest.mark.row("S2-28")
@pytest.mark.parametrize("stage", ["02-pretrain", "03-tune/words", "03-tune/connector", "03-tune/decoder", "04-align"])
def test_two_processes_make_the_model_of_one(outcome: Outcome, stage: str) -> None:
    assert outcome.ended["one"] == [0], outcome.said("one", 0, "err")
    assert outcome.ended["two"] == [0, 0], outcome.said("two", 0, "err") + outcome.said("two", 1, "err")
    one, two = weights(outcome.run("one"), stage), weights(outcome.run("two"), stage)
    assert one.keys() == two.keys()
    assert max(float((one[name] - two[name]).abs().max() / (1e-3 + one[name].abs().max())) for name in one) < 1e-4
    losses = [[r["loss"] for r in read_jsonl(outcome.run(case) / stage / "metrics.jsonl")] for case in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.row("S4-63")
@pytest.mark.parametrize("stage", ["02-pretrain", "03-tune/connector", "03-tune/decoder", "04-align"])
def test_two_processes_are_judged_as_one_is(outcome: Outcome, stage: str) -> None:
    found: list[list[dict[str, float]]] = []
    for case, processes in (("judged by one", 1), ("judged by two", 2)):
        assert outcome.ended[case] == [0] * processes, outcome.said(case, 0, "err")
        records = read_jsonl(outcome.run(case) / stage / "metrics.jsonl")
        values = [{k: v for k, v in record.items() if k.startswith("evaluation")} for record in records]
        found.append([one for one in values if one])
    assert len(found[0]) == len(found[1]) > 0
    for one, two in zip(*found, strict=True):
        assert one == pytest.approx(two, rel=1e-4)
    kept = [summary(outcome.run(case))["stages"] for case in ("judged by one", "judged by two")]
    models = [[stage["summary"].get("model", "") for stage in stages] for stages in kept]
    assert models[0] == models[1], "the same steps are the best ones"


def test_the_first_process_has_the_run_and_the_others_a_folder_in_it(outcome: Outcome) -> None:
    run = outcome.run("two")
    others = {path.relative_to(run / "ranks").as_posix() for path in (run / "ranks").rglob("*") if path.is_dir()}
    phases = {f"1/03-tune/{phase}" for phase in ("words", "connector", "decoder")}
    assert others == {"1", "1/02-pretrain", "1/03-tune", "1/04-align"} | phases
    assert {path.name for path in (run / "ranks" / "1" / "04-align").iterdir()} == {
        *("spec.json", "done.json", "metrics.jsonl", "results.csv")
    }
    assert len(list((outcome.root / "two" / "runs").glob("*/recipe.yaml"))) == 2  # the run, and the link to it
    assert json.loads((run / "env.json").read_text())["processes"] == 2
    assert [stage["state"] for stage in summary(run)["stages"]] == ["done"] * 4
    assert not (outcome.run("one") / "ranks").exists()


def test_what_runs_in_one_process_is_said_and_features_are_made_once(outcome: Outcome) -> None:
    first = [event["text"] for event in read_jsonl(outcome.run("two") / "events.jsonl")]
    other = [event["text"] for event in read_jsonl(outcome.run("two") / "ranks" / "1" / "events.jsonl")]
    alone = [text for text in first if text.endswith("started by process 0 alone, the others wait")]
    assert [text.split(":")[0] for text in alone] == ["01-data"]
    assert [text.split(":")[0] for text in other if text.endswith("started")] == ["02-pretrain", "03-tune", "04-align"]
    assert {text.split()[1] for text in other if text.startswith("features:")} == {"0"}


def test_only_the_first_process_speaks(outcome: Outcome) -> None:
    assert "run folder  runs/tiny-0001" in outcome.said("two", 0, "out")
    assert outcome.said("two", 1, "out") == outcome.said("two", 1, "err") == ""
    assert outcome.ended["two, resumed"] == [0, 0]
    assert json.loads(outcome.said("two", 0, "out", verb="resume"))["name"] == "tiny-0001"
    assert outcome.said("two", 1, "out", verb="resume") == outcome.said("two", 1, "err", verb="resume") == ""


def test_a_fault_of_another_process_ends_all_with_its_code_and_one_process_goes_on(outcome: Outcome) -> None:
    assert outcome.ended["faulty"] == [4, 4]
    assert "error [data]: process 1 of 2: half of a picture is missing" in outcome.said("faulty", 0, "err")
    assert outcome.said("faulty", 1, "err").startswith("process 1: error [data]: half of a picture is missing\n")
    record = read_jsonl(outcome.run("faulty") / "events.jsonl")
    assert [event["cause"] for event in record if event["kind"] == "error"] == [
        "process 1 of 2: half of a picture is missing"
    ]
    assert outcome.ended["faulty, resumed by one"] == [0]


def test_a_batch_smaller_than_the_processes_names_its_setting_before_anything_is_created(outcome: Outcome) -> None:
    assert outcome.ended["too many"] == [3, 3]
    assert "where: stages.tune.words.batch_size" in outcome.said("too many", 0, "err")
    assert outcome.said("too many", 1, "err") == ""
    assert not (outcome.root / "too many" / "runs").exists()


def test_a_fault_of_the_recipe_is_said_once(outcome: Outcome) -> None:
    assert outcome.ended["misspelt"] == [3, 3]
    assert "stages.pretrain.batch_sizes" in outcome.said("misspelt", 0, "err")
    assert outcome.said("misspelt", 1, "err") == ""
