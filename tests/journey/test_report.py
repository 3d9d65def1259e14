"""The page of a real run: written after each stage by the runner, complete in itself, never the end of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from plait.core.errors import DataError
from plait.core.files import find_run, read_jsonl
from plait.recipes import run as runner
from plait.report.page import write_report


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """The data stage alone, on pictures of our own, one caption an attack."""
    rows = ["image,text", "0.png,<script>alert(1)</script>"]
    for number in range(20):
        Image.new("RGB", (8, 8), (number * 12, 90, 40)).save(tmp_path / f"{number}.png")
        rows.append(f"{number}.png,thing {number}")
    (tmp_path / "pairs.csv").write_text("\n".join(rows) + "\n")
    path = tmp_path / "mine.yaml"
    path.write_text(f"name: mine\nseed: 3\ndata:\n  source: {tmp_path / 'pairs.csv'}\n")
    return path


def test_a_run_leaves_its_page(recipe: Path, tmp_path: Path) -> None:
    run = runner.start(str(recipe), root=tmp_path / "runs")
    text = (run / "report.html").read_text()
    assert "mine-0001" in text
    assert ">finished<" in text
    assert "data:image/png;base64," in text
    assert "<script>alert" not in text


def test_a_stopped_run_has_a_page_too(recipe: Path, tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"{number}.png").write_bytes(b"")
    with pytest.raises(DataError):
        runner.start(str(recipe), root=tmp_path / "runs")
    text = (find_run("latest", tmp_path / "runs") / "report.html").read_text()
    assert ">stopped<" in text
    assert "stopped by DataError" in text
    assert "plait resume mine-0001" in text


def test_a_page_that_cannot_be_written_is_a_warning(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(run: Path) -> Path:
        raise OSError(28, "No space left on device", str(run))

    monkeypatch.setattr(runner, "write_report", fail)
    run = runner.start(str(recipe), root=tmp_path / "runs")
    assert runner.summary(run)["stages"][0]["state"] == "done"
    warnings = [event["text"] for event in read_jsonl(run / "events.jsonl") if event["kind"] == "warning"]
    assert any("report.html was not written" in text and "No space left" in text for text in warnings)


def test_charts_bring_plotly_along(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    stage = tmp_path / "tiny-0001" / "01-learn"
    stage.mkdir(parents=True)
    (stage / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    text = write_report(stage.parent).read_text()
    assert text.count("Plotly.react(") >= 1
    assert 4_000_000 < len(text) < 8_000_000, "once, and only once"
