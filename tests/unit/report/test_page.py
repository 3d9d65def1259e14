"""The page: well-formed, complete in itself, safe, and there for runs that are half done or damaged."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
import shutil
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

from plait.core.files import write_atomic
from plait.report import page
from plait.report.page import write_report

pytestmark = pytest.mark.light

VOID = {"img", "br", "hr", "meta", "link", "input"}
EVIL = "<script>alert(1)</script>"


class Walk(HTMLParser):
    """Reads a page strictly: every element closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], "elements left open"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        else:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(autouse=True)
def small_plotly(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in of a few bytes; the real one is met in the journey."""
    monkeypatch.setattr(page, "plotly_source", lambda: "var Plotly = {react() {}};")


def read(run: Path) -> Walk:
    return Walk(write_report(run).read_text(encoding="utf-8"))


def test_a_finished_run_is_told_from_head_to_foot(run: Path) -> None:
    found = read(run)
    for words in (
        "tiny-0001 finished",
        "pictures: 2 train, 2 test-both; 4 questions, made from 5 source rows",
        "heads between lite0 and minilm",
        "test-both: found first for 20.0%",
        "plait runs show tiny-0001",
        "40.0 s",
        "seed 7",
        "torch 2.13",
        "violin 名0",
        "Pictures: twemoji (CC-BY-4.0): Twemoji, copyright X.",
        "Fate of all 5 source rows",
        "20.0 % 15.0 to 26.0",
        "✓ cyclone",
    ):
        assert words in found.text, words
    assert found.tags["h1"] == 1


def test_several_processes_and_how_they_were_started_are_told(run: Path) -> None:
    env = json.loads((run / "env.json").read_text())
    assert "processes" not in Walk(write_report(run).read_text()).text
    (run / "env.json").write_text(
        json.dumps(env | {"processes": 2, "command": ["/x/lib/plait/__main__.py", "run", "tiny"]})
    )
    text = Walk(write_report(run).read_text()).text
    assert "processes 2" in text
    assert "python -m plait run tiny" in text


def test_headings_are_in_order_and_pictures_have_words(run: Path) -> None:
    text = write_report(run).read_text()
    levels = [int(level) for level in re.findall(r"<h([1-6])", text)]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels)), levels
    images = re.findall(r"<img [^>]*>", text)
    assert len(images) == 4 + 1 + 1  # four in the strips, one sample, one answer that was not right at first
    assert all(re.search(r'alt="[^"]+"', image) for image in images)


def test_nothing_is_asked_of_the_network(run: Path) -> None:
    found = read(run)
    asked = [
        value for _, name, value in found.attributes if name in ("src", "href", "srcset", "action", "data", "poster")
    ]
    assert asked
    assert [value for value in asked if not value.startswith(("data:image/png;base64,", "#")) and ":" in value] == []
    assert [value for value in asked if value.startswith("//")] == []
    # What the links in small type name lies beside the page.
    links = [value for tag, name, value in found.attributes if (tag, name) == ("a", "href") and value[0] != "#"]
    assert links
    assert [link for link in links if not (run / link).exists()] == []
    assert "@import" not in write_report(run).read_text()
    assert "url(" not in write_report(run).read_text()


def test_only_our_own_scripts_may_run(run: Path) -> None:
    text = write_report(run).read_text()
    policy = next(value for tag, name, value in Walk(text).attributes if (tag, name) == ("meta", "content"))
    assert policy.startswith("default-src 'none'")
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    allowed = [f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts]
    assert f"script-src {' '.join(allowed)};" in policy
    assert "unsafe-eval" not in policy
    assert not [name for _, name, _ in Walk(text).attributes if name.startswith("on")], "handlers in attributes"


def test_what_data_says_is_text(run: Path) -> None:
    """The attack is in a caption, a ledger, an event, the card, an answer, and here in a score and a figure too."""
    path = run / "02-pretrain" / "scores.json"
    path.write_text(path.read_text().replace("test-both", json.dumps(f"</script>{EVIL}")[1:-1].replace("/", "")))
    metrics = run / "02-pretrain" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace("loss/c", f"reward<{EVIL[1:]}"))
    text = write_report(run).read_text()
    found = Walk(text)
    assert found.text.count(EVIL) >= 5
    assert len(found.scripts) == found.tags["script"] == 3
    assert "alert(1)" not in "".join(found.scripts[1:])
    assert EVIL not in text


@pytest.mark.parametrize("missing", ["recipe.yaml", "env.json", "events.jsonl", "01-data/done.json", "01-data/shards"])
def test_a_missing_part_costs_only_itself(run: Path, missing: str) -> None:
    path = run / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    found = read(run)
    assert "test-both: found first for 20.0%" in found.text


def test_a_run_just_begun_has_a_page(run: Path) -> None:
    shutil.rmtree(run / "01-data")
    shutil.rmtree(run / "02-pretrain")
    (run / "events.jsonl").unlink()
    found = read(run)
    assert "tiny-0001 unfinished" in found.text
    assert "plait resume tiny-0001" in found.text
    assert found.text.count("not begun") >= 2


def test_a_run_that_stopped_says_where_and_why(run: Path) -> None:
    (run / "02-pretrain" / "done.json").unlink()
    events = (run / "events.jsonl").read_text().splitlines()[:-1]
    fault = {"kind": "error", "time": 1020.5, "text": "02-pretrain: stopped by DataError", "trace": "Traceback: here"}
    events.append(json.dumps(fault | {"cause": "no pairs", "remedy": "add some"}))
    (run / "events.jsonl").write_text("\n".join(events) + "\n")
    found = read(run)
    assert "tiny-0001 stopped" in found.text
    assert "02-pretrain: stopped by DataError | cause: no pairs | remedy: add some" in found.text
    assert found.text.count("stopped by DataError: no pairs") == 2, "in the head and in its section"
    assert "Traceback: here" in found.text
    assert "20.0 s" in found.text, "time of all stages until the stop"
    assert "Loss" in found.text, "curves so far"


def test_damage_is_told_and_the_rest_is_shown(run: Path) -> None:
    pretrain = run / "02-pretrain"
    rows = (pretrain / "metrics.jsonl").read_text().splitlines()
    rows[4:9] = ['{"step": 5, "lo', "[]", '{"step": 7, "loss": NaN}', '{"step": 8, "loss": null}', "\x00"]
    (pretrain / "metrics.jsonl").write_text("\n".join(rows))
    (pretrain / "scores.json").write_text(json.dumps([{"name": "a/b/c", "value": 0.5}, {"name": "x"}, 3]))
    (pretrain / "samples" / "000040.json").write_text('{"step": 40, "sam')
    (run / "01-data" / "shards" / "train-000.tar").write_bytes(b"no tar at all" * 100)
    (run / "env.json").write_text("[1]")
    found = read(run)
    for words in (
        "02-pretrain/metrics.jsonl:5 is not a JSON object and was left out",
        "02-pretrain/metrics.jsonl:6 is not",
        "loss: 2 values are not finite and not drawn",
        "02-pretrain/scores.json: record 2 is not a score",
        "02-pretrain/scores.json: record 3 is not a score",
        "02-pretrain/samples/000040.json: not valid JSON",
        "01-data/shards/train-000.tar: pictures cannot be read",
        "env.json: expected an object, came list",
        "steps recorded 37",
    ):
        assert words in found.text, words


@pytest.mark.parametrize(
    "content", ["null", "3", '{"summary": 3}', '{"summary": {"lines": 3, "splits": {"train": "x"}}}']
)
def test_a_seal_of_another_shape_does_not_take_the_page(run: Path, content: str) -> None:
    (run / "01-data" / "done.json").write_text(content)
    assert "test-both: found first for 20.0%" in read(run).text


def test_a_kind_nobody_knew_gets_a_section(run: Path) -> None:
    folder = run / "03-polish"
    folder.mkdir()
    (folder / "done.json").write_text(json.dumps({"kind": "polish", "previous": None, "summary": {"shine": 0.25}}))
    (folder / "metrics.jsonl").write_text('{"step": 1, "reward/mean": 0.5}\n{"step": 2, "reward/mean": 0.75}\n')
    found = read(run)
    assert "Polish done" in found.text
    assert "shine 0.25" in found.text
    assert "reward/mean" in found.text


def test_without_plotly_there_are_tables(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for name in [name for name in sys.modules if name.partition(".")[0] == "plotly"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "plotly", None)
    text = write_report(run).read_text()
    found = Walk(text)
    assert "pip install 'plait[report]'" in found.text
    assert found.tags["script"] == 0
    assert any("script-src 'none';" in value for _, _, value in found.attributes)
    assert "20.0 % 15.0 to 26.0" in found.text
    assert 'class="chart"' not in text
    assert len(text) < 100_000


def test_the_same_files_give_the_same_page_and_only_the_page_is_written(run: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "report.html"}
    assert after == before


def test_text_no_page_can_hold_is_replaced(run: Path) -> None:
    write_atomic(run / "01-data" / "card.md", "# A\x00B\n")
    with (run / "events.jsonl").open("a") as file:
        file.write('{"time": 1e999, "kind": "warning", "text": "lone \\ud800 surrogate"}\n')
    assert "lone � surrogate" in read(run).text or "lone ? surrogate" in read(run).text
