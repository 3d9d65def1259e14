"""The evaluate stage over a small data stage and a tiny model: files, baselines, counts, and the same bytes again."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from plait.adapters.lora import Lora, attach
from plait.assembly.multimodal import Multimodal, save_multimodal
from plait.core.errors import DataError
from plait.core.events import Event, Events
from plait.core.files import mark_done, read_done, read_json, read_jsonl
from plait.core.types import Completion, MediaRef, Request
from plait.data.shards import ShardReader
from plait.evaluation.text import f1_value, parse_yes_no
from plait.inference.engine import Engine
from plait.stages.data import Data
from plait.stages.evaluate import TESTS, Evaluate

SMALL: dict[str, Any] = {
    "source": {"kind": "emoji", "held_out": 5},
    "questions": {"canvases": 10, "test_canvases": 5},
}
FEW: dict[str, Any] = {"max_new_tokens": 3}


@dataclass(frozen=True)
class Run:
    """Folders of a run whose tune stage is finished."""

    data: Path
    tune: Path

    def evaluate(self, folder: Path, **settings: Any) -> list[Event]:
        said: list[Event] = []
        folder.mkdir(exist_ok=True)
        stage = Evaluate.model_validate(FEW | settings)
        assert stage.run(self.tune, folder, events=Events(listeners=(said.append,))) == folder
        return said


def make_data(folder: Path, **settings: Any) -> Path:
    folder.mkdir()
    return Data.model_validate(SMALL | settings).run(None, folder, events=Events())


def make_tune(built: Multimodal, data: Path, folder: Path) -> Path:
    attach(built.language.model, Lora(rank=2, alpha=4.0, targets=("q_proj",)))
    (folder / "model").mkdir(parents=True)
    save_multimodal(built.with_lora(Lora(rank=2, alpha=4.0, targets=("q_proj",))), folder / "model")
    mark_done(folder, kind="tune", previous=data, summary={"model": "model", "lines": []})
    return folder


@pytest.fixture
def sealed_home(emoji_home: Callable[[str], Path], tmp_path: Path) -> Path:
    """The small home, with the digests of what lies in it."""
    for package in (tmp_path / "home/packages").iterdir():
        files = sorted(path for path in package.rglob("*") if path.suffix in (".png", ".svg"))
        lines = (f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(package)}\n" for path in files)
        (package / "SHA256SUMS").write_text("".join(lines))
    return tmp_path / "home"


@pytest.fixture
def run(sealed_home: Path, tiny_model: Multimodal, tmp_path: Path) -> Run:
    data = make_data(tmp_path / "01-data")
    return Run(data, make_tune(tiny_model, data, tmp_path / "02-tune"))


def notes(said: Sequence[Event]) -> list[str]:
    return [event.text for event in said if event.kind == "note"]


def test_every_question_is_answered_by_every_system_and_the_scores_are_those_of_the_answers(run: Run, tmp_path: Path):
    folder = tmp_path / "03-evaluate"
    said = run.evaluate(folder)
    rows = read_jsonl(folder / "predictions.jsonl")
    for split in TESTS:
        with ShardReader(run.data / "shards", f"instruct-{split}") as reader:
            made = {s.id: (s.meta["task"], s.media()[0].uri, s.text("user")) for s in reader}
        found = {r["id"]: (r["task"], r["uri"], r["question"]) for r in rows if r["split"] == split}
        assert found == made
    for row in rows:
        systems = set(row) - {"id", "split", "task", "uri", "question", "target", "answer"}
        asked = {"blank", "untuned"} if row["task"] in ("name.en", "yesno") else set()
        assert systems == asked | (set() if row["task"] == "yesno" else {"chance"})
    scores = {score["name"]: score for score in read_json(folder / "scores.json")}
    for split in TESTS:
        named = [r for r in rows if (r["split"], r["task"]) == (split, "name.en")]
        mean = {
            s: sum(f1_value(r[s], [r["target"]]) for r in named) / len(named) for s in ("answer", "blank", "untuned")
        }
        key = f"{split}/name.en/f1"
        assert scores[key]["value"] == pytest.approx(mean["answer"])
        assert scores[key]["n"] == len(named)
        asked = [r for r in rows if (r["split"], r["task"]) == (split, "yesno")]
        unread = sum(parse_yes_no(r["answer"]) is None for r in asked)
        assert scores[f"{split}/yesno/accuracy"]["failures"] == unread
        for baseline in ("blank", "untuned"):
            assert scores[f"{key}/{baseline}"]["value"] == pytest.approx(mean[baseline])
            gain = scores[f"{key}/gain-over-{baseline}"]["value"]
            assert gain == pytest.approx(mean["answer"] - mean[baseline])
    done = read_done(folder)
    assert done is not None
    assert done["kind"] == "evaluate"
    assert "model" not in done["summary"], "this stage makes no model: find_model must walk past it"
    assert len(done["summary"]["gates"]) == 8
    assert done["summary"]["lines"] == notes(said)[-len(done["summary"]["lines"]) :]
    assert {event.text for event in said if event.kind == "progress"} >= {
        "answers",
        "answers, blank picture",
        "answers, untuned model",
    }


def test_the_same_settings_give_the_same_bytes_also_after_a_kill(run: Run, tmp_path: Path):
    settings = {"tasks": ["name.en", "yesno", "count"], "max_names": 6, "max_yes_no": 6, "max_items": 2}
    run.evaluate(tmp_path / "a", **settings)

    def stop(event: Event) -> None:
        if event.text.startswith("answers, blank"):
            raise KeyboardInterrupt

    (tmp_path / "b").mkdir()
    stage = Evaluate.model_validate(FEW | settings)
    with pytest.raises(KeyboardInterrupt):
        stage.run(run.tune, tmp_path / "b", events=Events(listeners=(stop,)))
    assert read_done(tmp_path / "b") is None
    stage.run(run.tune, tmp_path / "b", events=Events())
    for name in ("scores.json", "predictions.jsonl", "done.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


# --- numbers, with answers that are known --------------------------------------------------------------------------


class Scripted(Engine):
    """Gives the answers it was given, by picture and question, and else one that is always the same."""

    def __init__(self, answers: dict[tuple[str, str], str], media: Any, *, rows: int) -> None:
        self.answers, self.media, self.rows, self.sizes = answers, media, rows, list[int]()

    def __call__(self, requests: Sequence[Request]) -> list[Completion]:
        self.sizes.append(len(requests))
        return [self.answer(request) for request in requests]

    def answer(self, request: Request) -> Completion:
        picture, question = request.turns[0].parts
        text = self.answers.get((picture.sha256, question.text), "yes cat")
        return Completion(id=request.id, text=f" {text}\n", token_ids=(), finish="stop")


def test_scores_of_a_model_that_knows_everything(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    known: dict[tuple[str, str], str] = {}
    for split in TESTS:
        with ShardReader(run.data / "shards", f"instruct-{split}") as reader:
            known |= {(s.media()[0].sha256, s.text("user")): s.answer(s.meta["task"]) or "" for s in reader}
    engines: list[Scripted] = []

    def engine(built: Multimodal, media: Any, *, rows: int) -> Scripted:
        engines.append(Scripted(known if not engines else {}, media, rows=rows))
        return engines[-1]

    monkeypatch.setattr("plait.inference.build.build_engine", engine)
    mark_pretrain(run)
    run.evaluate(tmp_path / "03-evaluate", rows=7)
    rows = read_jsonl(tmp_path / "03-evaluate" / "predictions.jsonl")
    assert all(row["answer"] == row["target"] for row in rows)
    scores = {score["name"]: score for score in read_json(tmp_path / "03-evaluate" / "scores.json")}
    for split in TESTS:
        assert scores[f"{split}/name.en/exact-match"]["value"] == 1.0
        assert scores[f"{split}/name.zh/f1"]["value"] == 1.0
        assert scores[f"{split}/count/exact-match"]["value"] == 1.0
        assert scores[f"{split}/yesno/accuracy"]["value"] == 1.0
        assert scores[f"{split}/yesno/yes-rate"]["value"] == 0.5
        assert scores[f"{split}/yesno/yes-rate/blank"]["value"] == 1.0
        assert scores[f"{split}/yesno/accuracy/gain-over-blank"]["value"] == 0.5
        expected = [f1_value("yes cat", [r["target"]]) for r in rows if (r["split"], r["task"]) == (split, "name.en")]
        assert scores[f"{split}/name.en/f1/untuned"]["value"] == pytest.approx(sum(expected) / len(expected))
    done = read_done(tmp_path / "03-evaluate")
    assert done is not None
    assert set(done["summary"]["gates"].values()) == {True}
    assert "the pretrain stage retrieves 25.0%" in done["summary"]["lines"][0]
    assert done["summary"]["lines"][-1].startswith("gates: all 8 passed")
    model, blank, untuned = engines
    assert sum(model.sizes) == len(rows)
    assert max(model.sizes) == 7
    pairs = [r for r in rows if r["task"] in ("name.en", "yesno")]
    assert sum(untuned.sizes) == len({(r["uri"].partition("#")[2], r["question"]) for r in pairs})
    assert sum(blank.sizes) == len({r["question"] for r in pairs}), "a blank picture is asked each question once"
    refs = [MediaRef(modality="image", sha256=sha256, uri="") for sha256, _ in known][:2]
    assert torch.equal(model.media(refs).values, untuned.media(refs).values)
    seen, white = model.media(refs), blank.media(refs)
    assert torch.equal(seen.grid, white.grid)
    assert seen.values.dtype == white.values.dtype
    assert torch.equal(*white.values.chunk(2))
    assert not torch.equal(seen.values, white.values)


def mark_pretrain(run: Run) -> None:
    """Put a finished pretrain stage between data and tune."""
    folder = run.tune.parent / "015-pretrain"
    folder.mkdir()
    mark_done(folder, kind="pretrain", previous=run.data, summary={"recall_at_1": {"test-concept": 0.25}})
    mark_done(run.tune, kind="tune", previous=folder, summary={"model": "model", "lines": []})


# --- what is asked -------------------------------------------------------------------------------------------------


def test_limits_keep_yes_and_no_even_and_say_what_they_leave_out(run: Run, tmp_path: Path):
    said = run.evaluate(
        tmp_path / "03", tasks=["name.en", "yesno", "group"], max_names=3, max_yes_no=6, max_items=2, baselines=[]
    )
    rows = read_jsonl(tmp_path / "03" / "predictions.jsonl")
    counts = Counter((row["split"], row["task"]) for row in rows)
    assert {counts[split, "name.en"] for split in TESTS} == {3}
    assert max(counts.values()) <= 6
    for split in TESTS:
        asked = [row for row in rows if (row["split"], row["task"]) == (split, "yesno")]
        assert Counter(row["target"] for row in asked) == {"yes": len(asked) // 2, "no": len(asked) // 2}
    made = read_json(run.data / "done.json")["summary"]["instruct"]
    (left,) = [event for event in said if event.text.startswith("left out by max_names, max_yes_no, max_items")]
    assert left.fields["left_out"]["test-style/name.en"] == made["test-style"]["name.en"] - 3
    scores = [score["name"] for score in read_json(tmp_path / "03" / "scores.json")]
    assert not [name for name in scores if "blank" in name or "untuned" in name]
    named = [gate for gate in read_json(tmp_path / "03" / "done.json")["summary"]["gates"] if "name" in gate]
    assert named == [f"name.en f1 over chance on test-{what}" for what in ("concept", "style")]


def test_answers_that_cannot_fit_or_are_cut_are_counted(run: Run, tmp_path: Path):
    said = run.evaluate(tmp_path / "03", tasks=["name.en"], baselines=[], max_new_tokens=3)
    rows = read_jsonl(tmp_path / "03" / "predictions.jsonl")
    (long,) = [event for event in said if event.text.startswith("right answers longer than max_new_tokens=3")]
    assert long.fields["too_long"] == {"name.en": sum(len(row["target"].encode()) > 3 for row in rows)}
    # The tiny model talks on and on.
    assert any("reached their longest length and end there" in text for text in notes(said))


def test_splits_and_tasks_that_are_not_there_are_said(sealed_home: Path, tiny_model: Multimodal, tmp_path: Path):
    questions = {"canvases": 0, "test_canvases": 0, "chinese": False}
    data = make_data(tmp_path / "01-data", questions=questions)
    done = read_json(data / "done.json")
    del done["summary"]["instruct"]["test-both"]
    (data / "done.json").write_text(json.dumps(done))
    for path in (data / "shards").glob("instruct-test-both*"):
        path.unlink()
    run = Run(data, make_tune(tiny_model, data, tmp_path / "02-tune"))
    said = run.evaluate(tmp_path / "03", tasks=["name.en", "count"], baselines=["blank"])
    (missing,) = [event for event in said if event.text.startswith("not asked")]
    assert missing.fields["missing"] == [
        "test-concept/count",
        "test-style/count",
        "test-both/name.en",
        "test-both/count",
    ]
    assert {row["split"] for row in read_jsonl(tmp_path / "03" / "predictions.jsonl")} == {"test-concept", "test-style"}
    with pytest.raises(DataError, match="no test split has a question of the tasks count, left"):
        run.evaluate(tmp_path / "04", tasks=["count", "left"])


# --- what is missing -----------------------------------------------------------------------------------------------


def test_without_a_model_or_a_tune_stage_it_is_said_what_to_do(run: Run, tmp_path: Path):
    with pytest.raises(DataError, match="no finished stage before this one made a multimodal model") as caught:
        Run(run.data, run.data).evaluate(tmp_path / "03")
    assert "'tune'" in caught.value.remedy
    mark_done(run.tune, kind="compress", previous=run.data, summary={"model": "model", "lines": []})
    with pytest.raises(DataError, match="no finished 'tune' stage"):
        run.evaluate(tmp_path / "03")
    run.evaluate(tmp_path / "03", baselines=["blank"], tasks=["name.en"])


def test_untuned_is_what_tune_left_without_its_training_also_after_compressing(run: Run, tmp_path: Path):
    run.evaluate(tmp_path / "a", tasks=["name.en"], max_names=2)
    later = tmp_path / "03-compress"
    (later / "model").mkdir(parents=True)
    for path in (run.tune / "model").iterdir():
        if path.is_file():
            (later / "model" / path.name).write_bytes(path.read_bytes())
    record = read_json(later / "model/plait.json")
    record["composition"]["adapter"] = None
    (later / "model/plait.json").write_text(json.dumps(record))
    mark_done(later, kind="compress", previous=run.tune, summary={"model": "model", "lines": []})
    Run(run.data, later).evaluate(tmp_path / "b", tasks=["name.en"], max_names=2)
    said = [[row["untuned"] for row in read_jsonl(tmp_path / x / "predictions.jsonl")] for x in "ab"]
    assert said[0] == said[1]
