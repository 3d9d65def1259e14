"""Trackers read back: TensorBoard for real; the others where they are installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from plait.cli.main import main
from plait.core.errors import ConfigError, ResourceError
from plait.core.files import read_json
from plait.recipes import trackers as module
from plait.recipes.follower import Follower
from plait.recipes.recipe import load_recipe
from plait.recipes.records import Sent, sent_file, waiting
from plait.recipes.trackers import READS, TensorBoard


def make_run(root: Path, steps: int = 5) -> Path:
    """A run of two phases and a stage with scores."""
    run = root / "tiny-0001"
    for phase in ("words", "decoder"):
        (run / "03-tune" / phase).mkdir(parents=True)
        write(run, phase, range(1, steps + 1))
    (run / "recipe.yaml").write_text("name: tiny\nseed: 3\ntrackers:\n- kind: tensorboard\n")
    (run / "03-tune" / "scores.json").write_text(json.dumps([{"name": "test/name/EM", "value": 0.5}]))
    return run


def write(run: Path, phase: str, steps: range, *, end: str = "\n") -> None:
    lines = [json.dumps({"step": s, "loss": 10.0 / s, "grad_norm": None, "tokens": 8, "mfu": 0.25}) for s in steps]
    with (run / "03-tune" / phase / "metrics.jsonl").open("a") as file:
        file.write("\n".join(lines) + end)


def board(run: Path, stage: str) -> dict[str, list[tuple[int, float]]]:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = reader.EventAccumulator(str(run / "tensorboard" / stage))
    found.Reload()
    return {tag: [(e.step, round(e.value, 5)) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def send(run: Path) -> int:
    spec = TensorBoard()
    follower = Follower(run, spec.name, spec.open, purges=True)
    try:
        return follower.send()
    finally:
        follower.finish()


@pytest.mark.row("S4-58")
def test_tensorboard_has_every_record_and_score_once_also_when_the_run_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run = make_run(tmp_path)
    assert send(run) == 10
    assert send(run) == 0
    expected = [(s, round(10.0 / s, 5)) for s in range(1, 6)]
    assert board(run, "tune/words") == {
        "loss": expected,
        "tokens": [(s, 8.0) for s in range(1, 6)],
        "mfu": [(s, 0.25) for s in range(1, 6)],
    }
    (run / "03-tune" / "done.json").write_text("{}")
    write(run, "decoder", range(6, 8), end='\n{"step": 8, "lo')  # the last one is being written
    assert send(run) == 2
    assert board(run, "tune/decoder")["loss"] == [(s, round(10.0 / s, 5)) for s in range(1, 8)]
    assert board(run, "tune/scores") == {"test/name/EM": [(0, 0.5)]}
    assert send(run) == 0


def test_records_on_their_way_when_it_was_killed_stand_there_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run = make_run(tmp_path)
    send(run)
    state = read_json(sent_file(run, "tensorboard"))
    state |= {"upto": state["upto"] | {"tune/words": 2}, "sending": ["tune/words", 3, 5]}  # as after SIGKILL
    sent_file(run, "tensorboard").write_text(json.dumps(state))
    assert send(run) == 3
    assert [step for step, _ in board(run, "tune/words")["loss"]] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("content", ["", "[]", '{"upto": 3}', '{"sending": [1]}'])
def test_a_damaged_note_of_what_was_sent_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "sent.json").write_text(content)
    assert Sent.read(tmp_path / "sent.json") == Sent()


def test_records_made_again_after_a_checkpoint_are_not_new(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    sent = Sent(upto={"tune/words": 5, "tune/decoder": 4})
    assert [(stage, [step for step, _ in its]) for stage, its in waiting(run, sent)] == [("tune/decoder", [5])]
    (run / "ranks" / "1" / "03-tune" / "words").mkdir(parents=True)
    (run / "ranks" / "1" / "03-tune" / "words" / "metrics.jsonl").write_text('{"step": 9}\n')
    assert len(list(waiting(run, sent))) == 1  # of the first process alone


def test_only_one_process_sends_at_a_time(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    first = Follower(run, "tensorboard", TensorBoard().open)
    with pytest.raises(ResourceError, match="another process is sending to tensorboard"):
        Follower(run, "tensorboard", TensorBoard().open)
    first.finish()
    Follower(run, "tensorboard", TensorBoard().open).finish()


def test_a_missing_package_is_refused_with_the_line_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ResourceError, match="needs the package mlflow") as error:
        READS.validate_python({"kind": "mlflow"}).check(place="trackers.0")
    assert error.value.remedy.startswith("pip install 'plait[mlflow]'")


def test_trackers_are_off_by_default_and_one_of_a_kind() -> None:
    assert load_recipe("quickstart").spec.trackers == ()
    found = load_recipe("quickstart", ["trackers=[{kind: wandb, project: x}, {kind: trackio}]"]).spec.trackers
    assert [tracker.kind for tracker in found] == ["wandb", "trackio"]
    with pytest.raises(ConfigError, match="wandb is there twice"):
        load_recipe("quickstart", ["trackers=[{kind: wandb}, {kind: wandb}]"])


def test_track_sends_what_was_not_sent_and_says_how_much(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard")
    run = make_run(tmp_path)
    assert main(["track", str(run), "--json"]) == 0
    sent = {"sent": 10, "in_all": 10, "damaged": []}
    assert json.loads(capsys.readouterr().out)["trackers"] == {"tensorboard": sent}
    (run / "recipe.yaml").write_text("name: tiny\n")
    assert main(["track", str(run)]) == 2
    assert "--to tensorboard" in capsys.readouterr().err
    assert main(["track", str(run), "--to", "tensorboard"]) == 0
    assert "tensorboard: 0 records sent, 10 in all" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["wandb", "mlflow", "trackio"])
def test_other_trackers_take_every_record_and_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    pytest.importorskip(kind)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    run = make_run(tmp_path)
    spec: Any = READS.validate_python({"kind": kind})
    ids = set()
    for sent in (10, 2):
        follower = Follower(run, spec.name, spec.open, purges=spec.purges)
        assert follower.send() == sent
        follower.finish()
        ids.add(read_json(sent_file(run, kind))["id"])
        write(run, "decoder", range(6, 8))
    assert len(ids) == 1
    if kind == "mlflow":
        from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]

        client = MlflowClient(tracking_uri=f"sqlite:///{run / 'mlflow.db'}")
        history = client.get_metric_history(ids.pop(), "tune/decoder/loss")
        assert [metric.step for metric in history] == [1, 2, 3, 4, 5, 6, 7]
