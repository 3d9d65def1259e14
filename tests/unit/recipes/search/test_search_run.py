"""A sweep from begin to end: shared stages, trials that fail or end early, kills, the last run, test splits shut."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.tiny_recipe import write_recipe

from plait.cli.main import main
from plait.core import held_out
from plait.core.errors import ConfigError, DataError, ResourceError, Stopped, UsageError
from plait.core.events import Event
from plait.core.files import mark_done, read_json
from plait.data.shards import ShardReader
from plait.recipes import run as runner
from plait.recipes.recipe import load_recipe
from plait.recipes.search import run as sweeping
from plait.recipes.search.sweep import load_sweep
from plait.recipes.search.work import Ended, Watcher
from plait.training import plan

LR = "stages.pretrain.lr"
STEPS = 8


class Said:
    """Listens for warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def __call__(self, event: Event) -> None:
        if event.kind == "warning":
            self.warnings.append(event.text)


class Killed(BaseException):
    """As a process that is gone."""


class Fake:
    """Does what a run would leave, in no time: a loss that follows from the rate, step by step.

    Args:
        kill: Die in the trial of this number, after so many steps.
        ends: How the process of a trial ends, by its number.
        fail: Rates at which a trial fails.
        field: What is reported.
    """

    def __init__(
        self,
        *,
        kill: tuple[int, int] | None = None,
        fail: tuple[float, ...] = (),
        field: str = "loss",
        ends: Mapping[int, Ended] | None = None,
    ) -> None:
        self.kill, self.fail, self.field = kill, fail, field
        self.ends = {f"trial-{number:04d}": ended for number, ended in (ends or {}).items()}
        self.worked: list[str] = []

    def __call__(self, run: Path, watch: Watcher | None) -> Ended:
        self.worked.append(run.name)
        previous: Path | None = None
        recipe = load_recipe(str(run / "recipe.yaml")).spec
        for name, stage, folder in runner.stages(recipe, run):
            folder.mkdir(exist_ok=True)
            if not (folder / "done.json").is_file():
                if name == "pretrain" and (ended := self.pretrain(stage.model_dump()["lr"], folder, watch)):
                    return ended
                if name == "tune":
                    (folder / "decoder").mkdir(exist_ok=True)
                    (folder / "decoder" / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0, "evaluation": 1.0}\n')
                splits = {"train": 8, "validation": 2, "test-concept": 4}
                mark_done(
                    folder, kind=stage.kind, previous=previous, summary={"splits": splits} if name == "data" else {}
                )
            previous = folder
        return Ended(code=0, stopped=watch is not None and not watch(True))

    def pretrain(self, lr: float, folder: Path, watch: Watcher | None) -> Ended | None:
        path = folder / "metrics.jsonl"
        begun = len(path.read_text().splitlines()) if path.is_file() else 0
        for step in range(begun + 1, STEPS + 1):
            with path.open("a") as file:
                value = abs(math.log10(lr) + 2.5) + 1 / step
                file.write(json.dumps({"step": step, self.field: value, "lr": lr}) + "\n")
            if self.kill and (folder.parent.name, step) == (f"trial-{self.kill[0]:04d}", self.kill[1]):
                raise Killed
            if watch is not None and not watch(False):
                return Ended(code=143, stopped=True)
            if step == 3 and folder.parent.name in self.ends:
                return self.ends[folder.parent.name]
        return Ended(code=5, error="out of memory") if lr in self.fail else None


@pytest.fixture
def target(tmp_path: Path, tiny_folders: dict[str, Path]) -> Callable[..., Any]:
    (tmp_path / "data").mkdir()
    recipe = write_recipe(tmp_path / "data", tiny_folders, steps=2)

    def read(*words: str) -> Any:
        rates = f"{LR}=[1e-4, 1e-3, 3e-3, 1e-2, 3e-2]"
        return load_sweep(str(recipe), [*(() if any(w.startswith(LR) for w in words) else (rates,)), *words])

    return read


def table(folder: Path) -> str:
    return (folder / "sweep.csv").read_text()


GRID = ("method=grid", "metric=pretrain.loss")
HALVED = (*GRID, "halving={least: 2, reduction: 2}")


def test_a_grid_is_tried_and_the_best_goes_on(target: Any, tmp_path: Path) -> None:
    worker = Fake()
    found = sweeping.start(target(*GRID), root=tmp_path / "sweeps", worker=worker)
    assert found.best is not None
    assert found.best.values == {LR: 3e-3}
    assert worker.worked == ["shared", *(f"trial-{n:04d}" for n in range(5)), "final-0001"]
    rows = table(found.folder).splitlines()
    assert rows[0] == f"trial,state,value,step,{LR},error"
    assert [row.split(",")[1] for row in rows[1:]] == ["complete"] * 5
    best = load_recipe(str(found.folder / "best.yaml"))
    assert best.spec.stages["pretrain"].model_dump()["lr"] == 3e-3
    assert found.final is not None
    whole = load_recipe(str(found.final / "recipe.yaml")).spec
    assert list(whole.stages) == ["pretrain", "tune", "align"]
    assert whole.model_copy(update={"name": "x"}) == best.spec.model_copy(update={"name": "x"})
    page = (found.folder / "sweep.html").read_text()
    assert "optimistic" in page
    assert "Trial 2" in page


@pytest.mark.row("S3-28")
def test_paths_mean_the_same_wherever_the_sweep_is_read(
    target: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("data.source.path=data/pairs.csv", "data.source.root=data", "trials=1")
    found = sweeping.start(target(*GRID, *words), root=tmp_path / "s", worker=Fake())
    best = load_recipe(str(found.folder / "best.yaml")).spec
    assert best.data == found.plan.trial({}).spec.data
    assert best.data.model_dump()["source"]["path"] == tmp_path / "data" / "pairs.csv"
    monkeypatch.chdir(tmp_path / "data")
    assert len(sweeping.resume(found.folder, trials=2, worker=Fake()).trials) == 2


@pytest.mark.parametrize(
    "words",
    [
        ("stages.tune.adapt.drop.least=0.2", "stages.tune.adapt.drop=[{most: 0.4}, {most: 0.5}]", f"{LR}=1e-3"),
        ("stages.align.tasks.1=group",),  # an item of a list
        ("stages.align=null",),
    ],
)
def test_the_best_recipe_is_that_of_the_best_trial(target: Any, tmp_path: Path, words: tuple[str, ...]) -> None:
    metric = "metric=tune.evaluation" if "drop" in words[0] else "metric=pretrain.loss"
    found = sweeping.start(target("method=grid", metric, *words), root=tmp_path / "s", worker=Fake())
    assert found.best is not None
    best = load_recipe(str(found.folder / "best.yaml")).spec
    assert best == found.plan.whole(found.best.values).spec.model_copy(update={"name": "tiny-best"})


@pytest.mark.row("S3-28")
def test_poor_trials_end_early_and_are_no_failures(target: Any, tmp_path: Path) -> None:
    worker = Fake()
    rates = f"{LR}=[3e-3, 1e-4, 1e-3, 3e-2, 2e-3]"
    found = sweeping.start(target(*HALVED, rates), root=tmp_path / "sweeps", worker=worker)
    assert [(t.state, t.step) for t in found.trials] == [
        ("complete", 8),
        ("pruned", 2),
        ("pruned", 2),
        ("pruned", 2),
        ("pruned", 4),  # second of 5, two go on; at 4 steps second of 2
    ]
    assert found.best is not None
    assert found.best.number == 0


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_the_step_beside_a_value_is_that_of_the_value(target: Any, tmp_path: Path, direction: str) -> None:
    losses = {1e-4: [3.0, 1.0, 2.0, 4.0], 1e-3: [math.nan, 5.0, 4.5, 4.5]}

    class Told(Fake):
        def pretrain(self, lr: float, folder: Path, watch: Watcher | None) -> Ended | None:
            lines = [json.dumps({"step": at, "loss": value}) for at, value in enumerate(losses[lr], 1)]
            (folder / "metrics.jsonl").write_text("\n".join(lines).replace("NaN", "null") + "\n")
            return None

    words = ("method=grid", "metric=pretrain.loss", f"direction={direction}", f"{LR}=[1e-4, 1e-3]")
    found = {
        take: sweeping.start(target(*words, f"take={take}"), root=tmp_path / take, worker=Told()).trials
        for take in ("best", "last")
    }
    best = [(1.0, 2), (4.5, 3)] if direction == "minimize" else [(4.0, 4), (5.0, 2)]
    assert [(t.value, t.step) for t in found["best"]] == best
    assert [(t.value, t.step) for t in found["last"]] == [(4.0, 4), (4.5, 4)]
    assert all(t.reached == 4 for trials in found.values() for t in trials)


def test_a_trial_at_its_last_step_is_done_however_soon_anybody_looks(target: Any, tmp_path: Path) -> None:
    found = sweeping.start(
        target(*GRID, f"{LR}=[3e-3, 1e-4]", "halving={least: 8, reduction: 2}"), root=tmp_path / "s", worker=Fake()
    )
    assert [(t.state, t.step) for t in found.trials] == [("complete", 8), ("complete", 8)]


@pytest.mark.row("S3-28")
@pytest.mark.parametrize("at", [(0, 1), (3, 2)])
@pytest.mark.parametrize("words", [HALVED, (*HALVED[1:], "method=tpe", "trials=5")])
def test_killed_in_a_trial_the_table_is_the_same(
    target: Any, tmp_path: Path, at: tuple[int, int], words: tuple[str, ...]
) -> None:
    if "method=tpe" in words:
        words = (*words, f"{LR}={{low: 1e-4, high: 1e-1, log: true}}")
    whole = sweeping.start(target(*words), root=tmp_path / "whole", worker=Fake())
    killed = Fake(kill=at)
    try:
        sweeping.start(target(*words), root=tmp_path / "killed", worker=killed)
    except Killed:
        folder = sweeping.find_sweep("latest", tmp_path / "killed")
        again = Fake()
        found = sweeping.resume(folder, worker=again)
        assert again.worked[0] == f"trial-{at[0]:04d}", "a finished trial, or what is shared, ran again"
    else:  # that trial ended before
        folder, found = sweeping.find_sweep("latest", tmp_path / "killed"), whole
    assert table(folder) == table(whole.folder)
    assert found.best == whole.best
    assert read_json(folder / "test_access.json") == read_json(whole.folder / "test_access.json")


@pytest.mark.row("S3-28")
def test_the_test_splits_are_read_once_and_that_is_written_down(target: Any, tmp_path: Path) -> None:
    found = sweeping.start(target(*GRID), root=tmp_path / "sweeps", worker=Fake())
    access = read_json(found.folder / "test_access.json")
    assert access == [{"run": "final/final-0001", "trial": 2, "settings": {LR: 3e-3}, "splits": ["test-concept"]}]
    assert all(held_out.shut_in(found.folder / "trials" / f"trial-{n:04d}") for n in range(5))
    assert held_out.shut_in(found.folder / "shared")
    assert found.final is not None
    assert not held_out.shut_in(found.final)
    again = Fake()
    same = sweeping.resume(found.folder, worker=again)
    assert again.worked == []
    assert same.final == found.final
    assert read_json(found.folder / "test_access.json") == access
    asked = sweeping.resume(found.folder, worker=again, again=True)
    assert again.worked == ["final-0002"]
    assert [look["run"] for look in read_json(found.folder / "test_access.json")] == [
        "final/final-0001",
        "final/final-0002",
    ]
    assert asked.final is not None
    assert asked.final.name == "final-0002"


def test_a_last_run_that_was_killed_goes_on_and_is_one_look(target: Any, tmp_path: Path) -> None:
    class Dies(Fake):
        def __call__(self, run: Path, watch: Watcher | None) -> Ended:
            if run.name.startswith("final"):
                raise Killed
            return super().__call__(run, watch)

    with pytest.raises(Killed):
        sweeping.start(target(*GRID), root=tmp_path / "s", worker=Dies())
    folder = sweeping.find_sweep("latest", tmp_path / "s")
    assert len(read_json(folder / "test_access.json")) == 1
    worker = Fake()
    sweeping.resume(folder, worker=worker)
    assert worker.worked == ["final-0001"]
    assert len(read_json(folder / "test_access.json")) == 1


def test_more_trials_may_follow_but_the_test_is_not_read_again(target: Any, tmp_path: Path) -> None:
    words = (*GRID, f"{LR}=[1e-4, 1e-3, 3e-3]", "trials=2")
    found = sweeping.start(target(*words), root=tmp_path / "s", worker=Fake())
    said: list[str] = []
    more = sweeping.resume(found.folder, trials=3, worker=Fake(), listeners=(lambda event: said.append(event.text),))
    assert len(more.trials) == 3
    assert more.best is not None
    assert more.best.number == 2
    assert any("a second look chooses by the test" in text for text in said)
    assert len(read_json(found.folder / "test_access.json")) == 1


@pytest.mark.row("S3-28")
def test_a_last_run_that_goes_on_with_what_is_the_best_no_more_says_so(target: Any, tmp_path: Path) -> None:
    class Dies(Fake):
        def __call__(self, run: Path, watch: Watcher | None) -> Ended:
            if run.name.startswith("final"):
                raise Killed
            return super().__call__(run, watch)

    words = (*GRID, f"{LR}=[1e-4, 1e-3, 3e-3]", "trials=2")
    with pytest.raises(Killed):
        sweeping.start(target(*words), root=tmp_path / "s", worker=Dies())
    folder = sweeping.find_sweep("latest", tmp_path / "s")
    with pytest.raises(Killed):
        sweeping.resume(folder, worker=Dies(), listeners=(said := Said(),))
    assert not said.warnings, "it is the best still"
    more = sweeping.resume(folder, trials=3, worker=Fake(), listeners=(said := Said(),))
    assert more.best is not None
    assert more.best.number == 2
    assert [look["trial"] for look in read_json(folder / "test_access.json")] == [1]
    assert load_recipe(str(folder / "best.yaml")).spec.stages["pretrain"].model_dump()["lr"] == 3e-3
    (warning,) = said.warnings
    assert "trial 2 is the best now" in warning
    assert "the last run goes on with trial 1" in warning


def test_a_trial_that_fails_is_told_and_the_sweep_goes_on(target: Any, tmp_path: Path) -> None:
    found = sweeping.start(target(*GRID), root=tmp_path / "s", worker=Fake(fail=(1e-4, 3e-3)))
    assert [t.state for t in found.trials] == ["failed", "complete", "failed", "complete", "complete"]
    assert found.trials[0].error == "out of memory"
    assert found.best is not None
    assert found.best.number == 1


@pytest.mark.row("S3-28")
@pytest.mark.parametrize(
    ("ended", "said"),
    [
        (Ended(code=143), "trial 1 was ended by SIGTERM"),
        (Ended(code=130), "trial 1 was ended by SIGINT"),
        (Ended(code=-15, error="its process was killed by signal 15"), "trial 1 was ended by SIGTERM"),
        (Ended(code=5, error="cannot write: No space left on device (0 MiB free)"), "No space left"),
        (Ended(code=1, error="OSError(28, 'No space left on device')"), "No space left"),
        (Ended(code=5, error="device 'cuda' was asked for, but torch finds none"), "device 'cuda'"),
    ],
)
def test_a_trial_that_the_machine_ended_is_gone_on_with(target: Any, tmp_path: Path, ended: Ended, said: str) -> None:
    whole = sweeping.start(target(*HALVED), root=tmp_path / "whole", worker=Fake())
    kind = Stopped if ended.signal else ResourceError
    with pytest.raises(kind, match=said):
        sweeping.start(target(*HALVED), root=tmp_path / "s", worker=Fake(ends={1: ended}))
    folder = sweeping.find_sweep("latest", tmp_path / "s")
    assert not (folder / "trials" / "trial-0001" / "result.json").exists()
    worker = Fake()
    sweeping.resume(folder, worker=worker)
    assert worker.worked[0] == "trial-0001"
    assert table(folder) == table(whole.folder)


@pytest.mark.parametrize(
    "ended",
    [
        Ended(code=5, error="memory ran out (CUDA out of memory): a micro-batch of 8 rows; it cannot be cut further"),
        Ended(code=-9, error="its process was killed by signal 9 (out of memory?)"),
        Ended(code=6, error="the loss is not finite"),
        Ended(code=1, error="KeyError('x')"),
    ],
)
def test_a_fault_that_settings_may_make_fails_the_trial_alone(target: Any, tmp_path: Path, ended: Ended) -> None:
    found = sweeping.start(target(*GRID), root=tmp_path / "s", worker=Fake(ends={1: ended}))
    assert [t.state for t in found.trials] == ["complete", "failed", "complete", "complete", "complete"]
    assert found.trials[1].error == ended.error


def test_a_disk_that_holds_one_trial_and_not_all_is_refused(
    target: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = target(*GRID, "final=false")
    machine = plan.survey(tmp_path, probe=False)
    named = [(name, stage) for name, stage, _ in runner.stages(load_recipe(sweep.recipe).spec, tmp_path)]
    disk = plan.disks(plan.total(plan.estimate_all(named, machine), machine), machine)[0]
    room = replace(machine, disk_bytes=math.ceil(disk.needed / plan.DISK_LIMIT) + 1)  # for one run
    monkeypatch.setattr(plan, "survey", lambda *args, **kwargs: room)
    with pytest.raises(ResourceError, match=r"5 trials, of which all checkpoints are kept"):
        sweeping.start(sweep, root=tmp_path / "s", worker=Fake())
    assert not (tmp_path / "s").exists()


def test_settings_that_do_not_go_together_are_a_failed_trial(target: Any, tmp_path: Path) -> None:
    drop = "stages.tune.adapt.drop"
    words = (
        "method=grid",
        "metric=tune.evaluation",
        f"{drop}.least=[0.2, 0.5]",
        f"{drop}.most=[0.4, 0.9]",
        f"{LR}=1e-3",
    )
    found = sweeping.start(target(*words), root=tmp_path / "s", worker=Fake())
    assert [t.state for t in found.trials] == ["complete", "complete", "failed", "complete"]
    assert "least 0.5 is above most 0.4" in found.trials[2].error


def test_all_failed_is_an_error_that_says_why(target: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none of 2 trials ran to its end; trial 0: out of memory"):
        sweeping.start(target(*GRID, f"{LR}=[1e-4, 3e-3]"), root=tmp_path / "s", worker=Fake(fail=(1e-4, 3e-3)))
    folder = sweeping.find_sweep("latest", tmp_path / "s")
    assert not (folder / "test_access.json").exists()
    assert "failed" in table(folder)


def test_a_metric_that_nobody_reports_is_said_after_the_first_trial(target: Any, tmp_path: Path) -> None:
    worker = Fake()
    with pytest.raises(
        ConfigError, match=r"reported no pretrain.evaluation: it reports: pretrain.loss, pretrain.lr"
    ) as caught:
        sweeping.start(target("method=grid", "metric=pretrain.evaluation"), root=tmp_path / "s", worker=worker)
    assert "trainer.validation" in caught.value.remedy
    assert worker.worked == ["shared", "trial-0000"]


def test_more_trials_than_there_are_combinations_is_said(target: Any, tmp_path: Path) -> None:
    said: list[str] = []
    words = ("method=random", "metric=pretrain.loss", "trials=9")
    found = sweeping.start(
        target(*words), root=tmp_path / "s", worker=Fake(), listeners=(lambda event: said.append(event.text),)
    )
    assert sorted(t.values[LR] for t in found.trials) == [1e-4, 1e-3, 3e-3, 1e-2, 3e-2]
    assert "the lists have 5 combinations: as many trials, not 9" in said


def test_a_recipe_that_changed_since_is_refused(target: Any, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        sweeping.start(target(*GRID), root=tmp_path / "s", worker=Fake(kill=(1, 2)))
    recipe = tmp_path / "data" / "tiny.yaml"
    recipe.write_text(recipe.read_text().replace("seed: 3", "seed: 4"))
    with pytest.raises(ConfigError, match="not what it was when the sweep began"):
        sweeping.resume(sweeping.find_sweep("latest", tmp_path / "s"), worker=Fake())


def test_what_a_kill_left_of_a_trial_is_cleared_away(target: Any, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        sweeping.start(target(*GRID), root=tmp_path / "s", worker=Fake(kill=(1, 2)))
    folder = sweeping.find_sweep("latest", tmp_path / "s")
    left = [folder / "trials" / f".trial-{number}.4711.tmp" / "01-data" for number in ("0001", "0002")]
    for each in (*left, folder / ".shared.4711.tmp" / "01-data", folder / "final" / ".final-0001.4711.tmp"):
        each.mkdir(parents=True)
    sweeping.resume(folder, worker=Fake())
    assert sorted(folder.rglob("*.tmp")) == []


def test_a_sweep_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="no sweep called 'x'"):
        sweeping.find_sweep("x", tmp_path)
    assert main(["sweep", "--sweeps", str(tmp_path)]) == 2
    assert main(["sweep", "x", "--resume", "--sweeps", str(tmp_path)]) == 2
    assert main(["sweep", "x", "--again"]) == 2


# --- with real stages, in this process -------------------------------------------------------------------------------


def in_process(run: Path, watch: Watcher | None) -> Ended:
    """As :func:`plait.recipes.search.work.work`, without the process."""
    runner.resume(run)
    return Ended(code=0, stopped=watch is not None and not watch(True))


@pytest.mark.row("S3-28")
def test_the_last_run_is_that_of_the_best_recipe_and_trials_saw_no_test(target: Any, tmp_path: Path) -> None:
    words = ("method=grid", "metric=tune.loss", "stages.align=null", f"{LR}=1e-3", "stages.tune.adapt.lr=[1e-3, 3e-3]")
    found = sweeping.start(target(*words, "stages.tune.frozen.steps=1"), root=tmp_path / "s", worker=in_process)
    shared = found.folder / "shared" / "02-pretrain"
    assert read_json(shared / "scores.json") == []
    assert (shared / "predictions.jsonl").read_text() == ""
    first = found.folder / "trials" / "trial-0000"
    same = [(at / "02-pretrain" / "done.json").stat().st_ino for at in (found.folder / "shared", first)]
    assert same[0] == same[1], "made once, and linked"
    shown = [read_json(path)["samples"] for path in sorted((first / "03-tune" / "samples").glob("*.json"))]
    assert all(samples == [] for samples in shown)
    assert found.final is not None
    scores = read_json(found.final / "02-pretrain" / "scores.json")
    assert any(score["name"].startswith("retrieval/test-concept") for score in scores)
    alone = runner.start(str(found.folder / "best.yaml"), root=tmp_path / "runs")
    assert read_json(alone / "02-pretrain" / "scores.json") == scores
    for name in ("decoder", "connector", "words"):
        both = [max((at / "03-tune" / name / "checkpoints").glob("[0-9]*")) for at in (alone, found.final)]
        assert _weights(both[0]) == _weights(both[1])


def _weights(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.safetensors") if "rng" not in p.name
    }


@pytest.mark.row("S3-28")
def test_a_shut_split_cannot_be_opened(tmp_path: Path) -> None:
    for split in ("test-concept", "instruct-test-style", "test"):
        with held_out.shut(), pytest.raises(DataError, match=f"the split '{split}' is shut"):
            ShardReader(tmp_path, split)
    with held_out.shut(), pytest.raises(DataError, match="no split called"):
        ShardReader(tmp_path, "validation")
    with pytest.raises(DataError, match="no split called"):
        ShardReader(tmp_path, "test-concept")
    with held_out.shut(), held_out.shut(when=False):
        assert held_out.opened(("train", "test-style")) == ("train",)
