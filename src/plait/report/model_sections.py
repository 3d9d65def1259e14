"""What only tune, align, compress and evaluate show: first batch, phases, sizes, answers beside baselines."""

from __future__ import annotations

import base64
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from plait.core.yamltext import is_mapping
from plait.report import pictures
from plait.report.charts import Charts, draw_metrics, read_metrics
from plait.report.folder import RunFolder, StageFolder, number_of
from plait.report.markup import Html, alert, el, join, mebibytes, number, origin, table
from plait.report.samples import same
from plait.report.scores import Score, read_scores
from plait.report.timeline import draw_timeline

_PICTURE_LIMIT = 2 * 2**20  # bytes of first.png that are put into the page
_PHASES = ("words", "connector", "decoder")
_SHOWN = 12
_WHOLE, _PARTS = "bytes", "parts."  # keys of compress.json
_KNOWN = frozenset({"id", "split", "task", "uri", "question", "target", "answer"})


def first_batch(run: RunFolder, stage: StageFolder, charts: Charts) -> Html | None:
    """First batch."""
    path = stage.path / "batches" / "first.png"
    if not path.is_file():
        return None
    name = run.relative(path)
    if path.stat().st_size > _PICTURE_LIMIT:
        return join(el("h3", "The first batch"), origin(name))
    uri = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    alt = "The tokens of the first batch in reading order, with image tokens and trained tokens marked"
    picture = el("a", el("img", attrs={"src": uri, "alt": alt, "loading": "lazy"}), attrs={"href": quote(name)})
    told = (
        "What the decoder was given, token by token. A loss is taken only on the dark boxes with a bar below; dashed "
        "boxes are runs of image tokens; the rest is context."
    )
    return join(
        el("h3", "The first batch"),
        el("p", told),
        el("div", picture, cls="scroll wide", attrs={"role": "region", "aria-label": "First batch", "tabindex": "0"}),
        origin(name),
    )


def phases(run: RunFolder, stage: StageFolder, charts: Charts) -> Html | None:
    """Curves by phase."""
    found = {path.parent.name: path for path in sorted(stage.path.glob("*/metrics.jsonl"))}
    order = [name for name in _PHASES if name in found] + [name for name in found if name not in _PHASES]
    parts: list[Html] = []
    for name in order:
        metrics = read_metrics(run, found[name])
        if metrics.curves:
            title = el("h4", f"Phase {name}", el("span", f" – {number(metrics.records)} steps", cls="quiet"))
            parts += [title, draw_metrics(charts, metrics, level=5), origin(run.relative(found[name]))]
            if (drawn := draw_timeline(run, found[name].with_name("timeline.json"), charts)) is not None:
                parts.append(drawn)
    return join(el("h3", "How it learned, phase by phase"), parts) if parts else None


def sizes(run: RunFolder, stage: StageFolder, charts: Charts) -> Html | None:
    """Sizes before and after."""
    path = stage.path / "compress.json"
    record = run.mapping(path)
    before, after = record.get("before"), record.get("after")
    if not is_mapping(before) or not is_mapping(after):
        return None
    old, new = _numbers(before), _numbers(after)
    keys = sorted(old | new, key=lambda key: key == _WHOLE)  # the sum comes last
    names = ["all but the tower" if key == _WHOLE else key.removeprefix(_PARTS) for key in keys]
    rows = [
        [name, _size(old.get(key)), _size(new.get(key)), _ratio(old.get(key), new.get(key))]
        for name, key in zip(names, keys, strict=True)
    ]
    drawn = table(["", "before", "after", "of what it was"], rows, label="Sizes before and after")
    return join(el("h3", "How much smaller it is"), drawn, origin(run.relative(path)))


def gates(run: RunFolder, stage: StageFolder, charts: Charts) -> Html | None:
    """Gates."""
    said = stage.summary.get("gates")
    if not is_mapping(said) or not said:
        return None
    rows = [["✓ passed" if passed is True else "✗ not passed", name] for name, passed in said.items()]
    return join(
        el("h3", "What it had to reach"),
        table(["", "gate"], rows, label="Gates", left=2),
        origin(f"{stage.path.name}/done.json"),
    )


def bars(run: RunFolder, stage: StageFolder, charts: Charts) -> Html | None:
    """Scores by split and task."""
    path = stage.path / "scores.json"
    found = [score for score in read_scores(run, path) if is_answer_score(score)]
    parts: list[Html] = []
    for split, its in itertools.groupby(found, key=lambda score: score.name.split("/")[0]):
        parts += [el("h4", split), _score_table(split, list(its))]
    if not parts:
        return None
    # Metrics of one task count the same answers.
    failures = {score.name.rpartition("/")[0]: score.failures for score in found if score.failures}
    told = ", ".join(f"{name} {count:,}" for name, count in failures.items())
    legend = "Bars reach from 0 to 100 %: the band is the 95 % interval, the line in it the score."
    return join(
        el("h3", "How good it is"),
        alert(f"answers that could not be parsed count as wrong: {told}") if told else None,
        el("p", legend, cls="note"),
        parts,
        origin(run.relative(path)),
    )


def is_answer_score(score: Score) -> bool:
    """Whether a score is of answers to questions: ``<split>/<task>/<metric>``."""
    parts = score.name.split("/")
    return len(parts) == 3 and (parts[0] == "train" or parts[0].startswith("test"))


def _score_table(split: str, scores: Sequence[Score]) -> Html:
    columns = list(dict.fromkeys(key for score in scores for key in score.beside))
    plain = [key for key in columns if not key.startswith("gain-over-")]
    gains = [key for key in columns if key not in plain]
    rows: list[list[str]] = []
    for score in scores:
        beside = [score.beside[k].show(share=score.is_share) if k in score.beside else "" for k in plain]
        more = [_gain(score.beside[k], score) if k in score.beside else "" for k in gains]
        name = " ".join(score.name.split("/")[1:])
        rows.append([name, _bar(score) if score.is_share else "", score.show(), *beside, *more, f"{score.n:,}"])
    head = ["", "0 to 100 %", "model, 95 % interval", *plain, *(key.replace("-", " ") for key in gains), "n"]
    return table(head, rows, label=f"Scores on {split}", left=2)


def _bar(score: Score) -> Html:
    low, high, value = 100 * score.low, 100 * score.high, 100 * score.value
    band = el("span", cls="band", attrs={"style": f"left:{low:.1f}%;width:{max(high - low, 0.5):.1f}%"})
    return el("div", band, el("span", cls="point", attrs={"style": f"left:{value:.1f}%"}), cls="interval-bar")


def _gain(gain: Score, of: Score) -> Html:
    """A difference, and in a sign whether its interval leaves out 0."""
    sign = "✓ " if gain.low > 0 else "✗ " if gain.high < 0 else "~ "
    return join(el("b", sign), gain.show(signed=True, share=of.is_share))


def asked(run: RunFolder, stage: StageFolder, charts: Charts) -> Html | None:
    """Some questions with all answers."""
    path = stage.path / "predictions.jsonl"
    by_part: dict[str, list[dict[str, Any]]] = {}
    total = 0
    for record in run.lines(path):
        if "question" in record and "target" in record:
            total += 1
            its = by_part.setdefault(f"{record.get('split')}/{record.get('task')}", [])
            if len(its) < _SHOWN:
                its.append(record)
    turns = itertools.chain.from_iterable(itertools.zip_longest(*by_part.values()))
    shown = list(itertools.islice((record for record in turns if record), _SHOWN))
    if not shown:
        return None
    found = pictures.at(run, run.shards(stage), [str(record.get("uri", "")) for record in shown])
    told = f"{len(shown)} of {total:,}: the first of each split and task in turn, not chosen by their answers."
    return join(
        el("h3", "Some questions and answers"),
        el("p", told, cls="note"),
        el("div", [_question(record, found) for record in shown], cls="samples"),
        pictures.attribution(found.values(), _card(run, stage)),
        origin(run.relative(path)),
    )


def _question(record: Mapping[str, Any], found: Mapping[str, pictures.Picture]) -> Html:
    target = str(record["target"])
    said = {"answer": record.get("answer")} | {k: v for k, v in record.items() if k not in _KNOWN}
    rows = [[name, _marked(str(text), target)] for name, text in said.items() if isinstance(text, str)]
    picture = found.get(str(record.get("uri", "")))
    tags = [el("span", str(record.get(key)), cls="tag") for key in ("split", "task")]
    shown = picture.show(f"picture of {target}") if picture else None
    return el(
        "article",
        el("figure", shown, el("figcaption", el("b", target), tags)),
        el("div", el("p", str(record["question"])), table(["of", "answer"], rows, label="Answers", left=2)),
        cls="sample",
    )


def _marked(said: str, target: str) -> Html:
    words = said or "(nothing)"
    return el("b", f"✓\u00a0{words}", cls="right") if same(said, target) else el("span", f"✗\u00a0{words}")


def _card(run: RunFolder, stage: StageFolder) -> str:
    shards = run.shards(stage)
    return run.text(shards.parent / "card.md") if shards else ""


def _numbers(value: Mapping[str, Any], before: str = "") -> dict[str, float]:
    found: dict[str, float] = {}
    for key, inner in value.items():
        if is_mapping(inner):
            found |= _numbers(inner, f"{before}{key}.")
        elif (size := number_of(inner)) is not None:
            found[f"{before}{key}"] = size
    return found


def _size(size: float | None) -> str:
    return "–" if size is None else mebibytes(size)


def _ratio(old: float | None, new: float | None) -> str:
    return f"{100 * new / old:.1f} %" if old and new is not None else "–"


def chat_command(run: RunFolder) -> str | None:
    """How to talk with the newest model of the run; None where no stage made one."""
    made = any(stage.state == "done" and isinstance(stage.summary.get("model"), str) for stage in run.stages)
    return f"plait chat {Path('runs') / run.path.name}" if made else None
