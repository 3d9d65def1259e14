"""Events: durable ones on disk, progress only on the screen."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from plait.cli.panel import Lines
from plait.core.events import Event, Events

pytestmark = pytest.mark.light


def test_notes_are_kept_and_progress_is_not(tmp_path: Path) -> None:
    seen: list[Event] = []
    events = Events(tmp_path / "events.jsonl", listeners=(seen.append,))
    events.note("三 pictures", count=3)
    events.progress("render", 1, 3)
    events.warning("look")
    records = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(r["kind"], r["text"]) for r in records] == [("note", "三 pictures"), ("warning", "look")]
    assert records[0]["count"] == 3
    assert [e.kind for e in seen] == ["note", "progress", "warning"]


def test_a_pipe_gets_plain_lines_at_most_every_ten_seconds_and_the_last_one() -> None:
    screen, now = io.StringIO(), [0.0]
    events = Events(None, listeners=(Lines(screen, clock=lambda: now[0]),))
    for done in range(1, 31):
        now[0] += 1.0
        events.progress("train", done, 30, loss=1.23456, eta_s=75.0)
    lines = screen.getvalue().splitlines()
    assert [line.split()[2] for line in lines] == ["11/30", "21/30", "30/30"]
    assert "loss 1.235" in lines[0]
    assert "eta 1:15" in lines[0]
    assert "\r" not in screen.getvalue()
    assert "\033" not in screen.getvalue()
