"""Sections of tune, align, compress and evaluate: what their files say is in the page, and as text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.unit.report.test_page import EVIL, Walk

from plait.report.page import write_report

pytestmark = pytest.mark.light


def stage(run: Path, name: str, summary: dict[str, Any]) -> Path:
    folder = run / name
    folder.mkdir()
    done = {"kind": name[3:], "previous": None, "summary": {"lines": [f"line of {name[3:]}"]} | summary}
    (folder / "done.json").write_text(json.dumps(done))
    return folder


def answers() -> list[dict[str, Any]]:
    whole = {"n": 200, "rule": "f1/squad", "failures": 0}
    name = "test-style/name.en/f1"
    found = [{"name": name, "value": 0.5, "low": 0.4, "high": 0.6} | whole]
    found += [{"name": f"{name}/{b}", "value": 0.1, "low": 0.05, "high": 0.2} | whole for b in ("blank", "untuned")]
    found += [{"name": f"{name}/chance", "value": 0.01, "low": 0.01, "high": 0.01} | whole]
    found += [{"name": f"{name}/gain-over-blank", "value": 0.4, "low": 0.3, "high": 0.5} | whole]
    yes = {"name": "test-style/yesno/accuracy", "value": 0.8, "low": 0.7, "high": 0.9, "n": 100, "failures": 3}
    return [*found, yes | {"rule": "accuracy/first-word"}]


@pytest.fixture
def whole(run: Path) -> Path:
    """The run with all stages."""
    asked = {"id": "s0", "split": "test-both", "task": "name.en", "uri": "test-both-000.tar#s0.png"}
    asked |= {"question": f"What? {EVIL}", "target": "cyclone", "answer": "Cyclone.", "blank": "crayon"}
    tune = stage(run, "03-tune", {"model": "checkpoints/000040"})
    from PIL import Image

    (tune / "batches").mkdir()
    Image.new("RGB", (1400, 300), "white").save(tune / "batches" / "first.png")
    for phase in ("decoder", "words", "connector"):
        (tune / phase).mkdir()
        (tune / phase / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    for folder in (tune, stage(run, "04-align", {"model": "checkpoints/000040"})):
        (folder / "samples").mkdir()
        for step, said in ((0, "nothing"), (40, "cyclone")):
            samples = {"step": step, "phase": "decoder", "samples": [asked | {"answer": said}]}
            (folder / "samples" / f"{step:06d}.json").write_text(json.dumps(samples))
    compress = stage(run, "05-compress", {"model": "model"})
    sizes = {"before": {"bytes": 4 * 2**20, "parts": {"decoder": 4 * 2**20}}, "after": {"bytes": 2**20}}
    (compress / "compress.json").write_text(json.dumps(sizes))
    evaluate = stage(run, "06-evaluate", {"gates": {"name.en f1 over blank": True, "yes-rate": False}})
    (evaluate / "scores.json").write_text(json.dumps(answers()))
    (evaluate / "predictions.jsonl").write_text(json.dumps(asked) + "\n")
    return run


def test_every_stage_tells_what_it_left(whole: Path) -> None:
    text = write_report(whole).read_text(encoding="utf-8")
    found = Walk(text)
    for words in (
        "plait chat runs/tiny-0001",
        "The first batch",
        "Phase words – 2 steps",
        "✗ nothing",
        "✓ cyclone",
        "25.0 %",
        "4.0 MiB",
        "✓ passed",
        "✗ not passed",
        "50.0 % 40.0 to 60.0",
        "+40.0 % +30.0 to +50.0",
        "test-style/yesno 3",
        "✓ Cyclone.",
        "✗ crayon",
    ):
        assert words in found.text, words
    assert found.text.index("Phase words") < found.text.index("Phase connector") < found.text.index("Phase decoder")
    assert EVIL not in text


@pytest.mark.parametrize("content", ["", "3", "[3]", '{"before": 3, "after": {}}', '{"split": 3, "question": 1}'])
def test_damaged_files_do_not_take_the_page(whole: Path, content: str) -> None:
    names = ("05-compress/compress.json", "06-evaluate/scores.json", "06-evaluate/predictions.jsonl")
    for name in (*names, "03-tune/words/metrics.jsonl", "03-tune/samples/000040.json", "03-tune/batches/first.png"):
        (whole / name).write_text(content)
    assert "line of evaluate" in Walk(write_report(whole).read_text(encoding="utf-8")).text
