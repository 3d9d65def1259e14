"""``plait plan``: the table holds the estimates, nothing is written, nothing is measured unless wanted."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from plait.cli import plan
from plait.cli.output import Out
from plait.core import device
from plait.core.errors import ConfigError, PlaitError, ResourceError, UsageError
from plait.core.estimate import Estimate, Machine, Share
from plait.recipes.trackers import AnyTracker, TensorBoard
from plait.training.trainer import Trainer

pytestmark = pytest.mark.light

GIB = 2**30
several = False
trackers: list[AnyTracker] = []


class Step:
    """A stage with a known estimate."""

    def __init__(self, kind: str, estimate: Estimate) -> None:
        self.kind = kind
        self.known = estimate

    def estimate(self, machine: Machine, before: Mapping[str, Estimate]) -> Estimate:
        return self.known

    def check(self, machine: Machine) -> None:
        """Nothing stands in the way."""

    @property
    def together(self) -> bool:
        """Whether processes share it."""
        return self.kind == "tune"

    def dealt(self) -> dict[str, int]:
        """A batch of four."""
        return {"batch_size": 4} if self.together else {}

    def shares(self, processes: int, *, setting: str = "") -> int:
        """To each process one."""
        return processes


DATA = Estimate(
    stage="data",
    samples={"train": 3200, "test": 600},
    disk_bytes=60 * 2**20,
    memory={"runtime": GIB, "pictures": 7 * 2**20},
    seconds=(20.0, 40.0),
)
TUNE = Estimate(
    stage="tune",
    params_trainable=1_200_000,
    params_frozen=134_515_008,
    tokens=256_000,
    image_tokens=51_200,
    flops=1.35e14,
    memory={"weights": GIB // 4, "activations": GIB, "runtime": GIB},
    disk_bytes=GIB,
    spare_bytes=GIB // 4,
    seconds=(60.0, 300.0),
    notes=("256 rows a step",),
)
SHARED = replace(
    TUNE,
    shares=(
        Share(ranks=(0,), memory={"weights": GIB, "runtime": GIB}, moments={"training": 2 * GIB}, sent={"data": GIB}),
        Share(ranks=(1, 2, 3), memory={"weights": GIB // 2, "runtime": GIB}, moments={"training": 3 * GIB // 2}),
    ),
)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, Sequence[str]]]:
    """A recipe of two stages stands in for the shipped ones; returns what was asked for."""
    calls: list[tuple[str, Sequence[str]]] = []
    monkeypatch.setattr(sys.modules[__name__], "several", False)
    monkeypatch.setattr(sys.modules[__name__], "trackers", [])

    def load_recipe(name: str, overrides: Sequence[str] = ()) -> SimpleNamespace:
        calls.append((name, overrides))
        known = SHARED if several else TUNE
        stages = {"tune": Step("tune", known)}
        spec = SimpleNamespace(name="demo", data=Step("data", DATA), stages=stages, trackers=tuple(trackers))
        return SimpleNamespace(spec=spec)

    module = ModuleType("plait.recipes.recipe")
    module.load_recipe = load_recipe  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "plait.recipes.recipe", module)
    monkeypatch.setenv("PLAIT_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return calls


def arguments(*overrides: str) -> argparse.Namespace:
    return parsed("demo", *overrides, "--no-probe")


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    plan.add(parser)
    return parser.parse_args(words)


def test_the_table_holds_every_number(
    asked: list[tuple[str, Sequence[str]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan.main(arguments("stages.tune.steps=50"), Out()) == 0
    assert asked == [("demo", ["stages.tune.steps=50"])]
    said = capsys.readouterr().out
    rows = {line.split()[0]: line for line in said.splitlines() if line}
    for part in ("1.20 M", "135 M", "256,000", "51,200", "135 T", "2.2 GiB", "1.0 GiB", "1.0-5.0 min"):
        assert part in next(line for line in said.splitlines() if line.startswith("tune ") and "min" in line)
    assert "3,800" in said
    assert "60 MiB" in said
    assert "256 MiB" in said  # weights, by part
    assert "7 MiB" in said  # a part of a stage's own naming has a column too
    assert "2.2 GiB" in rows["total"]
    assert "1.3-5.7 min" in rows["total"]
    assert "256 rows a step" in said
    assert "guessed" in said
    assert list(tmp_path.iterdir()) == []  # no run folder, no cache, nothing


def test_columns_are_aligned(asked: list[tuple[str, Sequence[str]]], capsys: pytest.CaptureFixture[str]) -> None:
    plan.main(arguments(), Out())
    lines = capsys.readouterr().out.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("stage"))
    table = lines[head : head + 5]
    assert {len(line) for line in table} == {len(lines[head])}


def test_json_has_the_same_and_the_machine(
    asked: list[tuple[str, Sequence[str]]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan.main(arguments(), Out(json=True)) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["recipe"] == "demo"
    assert said["peak_bytes"] == 2 * GIB + GIB // 4
    assert said["stages"][1]["flops"] == 1.35e14
    assert said["machine"]["measured"] is False
    assert said["refused"] is None


def test_too_little_disk_is_refused_after_the_table(
    asked: list[tuple[str, Sequence[str]]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(device, "free_disk", lambda path: GIB)
    with pytest.raises(ResourceError, match=r"needs 1\.3 GiB of disk \(tune alone 1\.2 GiB\), but 1\.0 GiB is free"):
        plan.main(arguments(), Out())
    assert "the run is refused" in capsys.readouterr().out
    assert plan.main(arguments(), Out(json=True)) == 5
    assert json.loads(capsys.readouterr().out)["refused"]["exit_code"] == 5


@pytest.mark.parametrize("fault", [ConfigError, ResourceError])
def test_a_wrong_setting_is_refused_before_the_table_and_what_is_missing_after_it(
    fault: type[PlaitError],
    asked: list[tuple[str, Sequence[str]]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(self: Step, machine: Machine) -> None:
        if self.kind == "tune":
            raise fault("no tower called 'foo'", place="stages.tune.image_tower")

    monkeypatch.setattr(Step, "check", fail)
    with pytest.raises(fault, match="no tower called"):
        plan.main(arguments(), Out())
    # The sizes of another tower than the one that is meant would mislead; those of one yet to be fetched are right.
    assert ("total" in capsys.readouterr().out) == (fault is ResourceError)
    assert plan.main(arguments(), Out(json=True)) == fault.exit_code
    assert json.loads(capsys.readouterr().out)["refused"]["place"] == "stages.tune.image_tower"


def test_settings_of_several_processes_are_said_to_be_left_out(
    asked: list[tuple[str, Sequence[str]]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan.main(arguments(), Out())
    assert "trainer.parallel" not in capsys.readouterr().out
    monkeypatch.setattr(Step, "trainer", Trainer.model_validate({"parallel": {"pipeline": 2}}), raising=False)
    plan.main(arguments(), Out())
    said = "note     tune: trainer.parallel is for several processes, and this is for one; plan with --processes N"
    assert said in capsys.readouterr().out.splitlines()


def test_several_processes_have_a_line_each_and_a_sum(
    asked: list[tuple[str, Sequence[str]]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "several", True)
    monkeypatch.setattr(device, "memory", lambda: SimpleNamespace(free=6 * GIB))
    assert plan.main(parsed("demo", "--no-probe", "--processes", "4"), Out()) == 0
    lines = capsys.readouterr().out.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("stage  process"))
    found = [line.split() for line in lines[first + 1 : first + 3]]
    assert found[0] == ["tune", "0", "training", "1.0", "GiB", "1.0", "GiB", "2.0", "GiB", "1.0", "GiB", "data"]
    assert found[1] == ["tune", "1", "to", "3", "training", "512", "MiB", "1.0", "GiB", "1.5", "GiB", "-"]
    assert any("6.5 GiB of 6.0 GiB free, 108%, all 4 processes of this machine together" in line for line in lines)
    warned = next(
        line for line in lines if line.startswith("warning  memory: 4 processes on this machine have 6.5 GiB")
    )
    assert "in tune, 6.0 GiB free; process 0 has 2.0 GiB in training, 1.0 GiB of it weights: divide more" in warned
    assert "note     data: by process 0 alone, the others wait" in lines
    assert plan.main(parsed("demo", "--no-probe", "--processes", "4"), Out(json=True)) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["processes"], said["together_bytes"]) == (4, 13 * GIB // 2)
    assert said["stages"][1]["shares"][1]["ranks"] == [1, 2, 3]


def test_under_torchrun_the_first_process_plans_for_all(
    asked: list[tuple[str, Sequence[str]]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert plan.main(arguments(), Out()) == 0
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "0")
    assert plan.main(arguments(), Out(json=True)) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["machine"]["processes"], said["machine"]["local"]) == (4, 2)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--processes", "-1"], "--processes is -1"),
        (["--processes", "0"], "--processes is 0"),
        (["--processes", "2", "--probe"], "--probe runs steps in one process, and 2 are planned"),
    ],
)
def test_numbers_of_processes_that_mean_nothing(
    asked: list[tuple[str, Sequence[str]]], words: list[str], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        plan.main(parsed("demo", *words), Out())


@pytest.mark.parametrize("words", [["--processes", "2"], ["--processes", "-1"], ["--probe"], ["--no-probe"]])
def test_what_only_a_run_has_is_refused_of_a_model(tmp_path: Path, words: list[str]) -> None:
    path = tmp_path / "model.yaml"
    path.write_text("encoders: {image: {kind: vit}}\n")
    with pytest.raises(UsageError, match=f"{words[0]} and a model are both given") as caught:
        plan.main(parsed(str(path), *words), Out())
    assert "leave" in caught.value.remedy


def test_what_run_refuses_in_so_many_processes_plan_refuses_in_its_words(
    asked: list[tuple[str, Sequence[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="a batch of 4 samples for 5 processes"):
        plan.main(parsed("demo", "--no-probe", "--processes", "5"), Out())
    offloads = Trainer.model_validate({"parallel": {"zero": 3, "offload": True}})
    monkeypatch.setattr(Step, "trainer", offloads, raising=False)
    monkeypatch.setattr(Step, "device", "cpu", raising=False)
    with pytest.raises(ConfigError, match="weights are in this processor's memory anyway"):
        plan.main(parsed("demo", "--no-probe", "--processes", "2"), Out())


def test_a_tracker_whose_package_is_missing_is_refused(
    asked: list[tuple[str, Sequence[str]]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "trackers", [TensorBoard()])
    monkeypatch.setattr(TensorBoard, "package", "no_such_package")
    with pytest.raises(ResourceError, match="needs the package no_such_package, which is not installed"):
        plan.main(arguments(), Out())
    assert "total" in capsys.readouterr().out


def test_columns_that_do_not_say_what_they_count_are_explained(
    asked: list[tuple[str, Sequence[str]]], capsys: pytest.CaptureFixture[str]
) -> None:
    plan.main(arguments(), Out())
    said = capsys.readouterr().out
    assert "tokens: places of rows that pass a model, padding included, over all steps" in said
    assert "disk: the total has 256 MiB more, for a checkpoint that is being written" in said
    total = next(line for line in said.splitlines() if line.startswith("total"))
    assert "1.3 GiB" in total  # 60 MiB, 1 GiB and a quarter
    assert "256 MiB only while a checkpoint is written" in said


@pytest.mark.parametrize(
    ("amount", "text"),
    [(0, "0 "), (27, "27 "), (1234, "1.23 K"), (99_950, "100 K"), (134_515_008, "135 M"), (5e17, "500 P")],
)
def test_numbers_for_people(amount: float, text: str) -> None:
    assert plan.si(float(amount)) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [((0.0, 3.0), "0-3 s"), ((20.0, 240.0), "0.3-4.0 min"), ((3600.0, 9000.0), "1.0-2.5 h")]
)
def test_durations_for_people(seconds: tuple[float, float], text: str) -> None:
    assert plan.duration(seconds) == text


@pytest.mark.row("S4-59")
def test_a_size_alone_is_planned_without_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--params", "175e9", "--tokens", "300e9", "--gpus", "64", "--memory-gib", "80"]
    assert plan.main(parsed(*words), Out()) == 0
    said = capsys.readouterr().out
    assert "175 G weights, 300 G tokens: 1.71 tokens a weight" in said
    assert "3.15e+23 = 6 N D" in said
    assert "on 64 devices at 40% of 312 TFLOP/s" in said
    assert "96 layers of 12,288" in said
    assert "layouts fit 80 GiB" in said
    assert "{tensor: 8, pipeline: 8}" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "nothing to plan"),
        (["--params", "7e9"], "--tokens is missing"),
        (["--params", "7e9", "--tokens", "-1"], "--tokens is -1, expected more than 0"),
        (["--params", "7e9", "--tokens", "inf"], "--tokens is inf"),
        (["--params", "7e9", "--tokens", "1e9", "--mfu", "3"], "at most 1"),
        (["--params", "7e9", "--tokens", "1e9", "--gpus", "1.5"], "expected a whole number"),
        (["quickstart", "--gpus", "3"], "quickstart and a size are both given"),
        (["--processes", "3", "--params", "7e9", "--tokens", "1e9"], "--processes and a size are both given"),
    ],
)
def test_a_size_that_cannot_be_planned_is_said(words: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        plan.main(parsed(*words), Out())
