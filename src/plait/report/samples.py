"""What a model says to a few pictures while it learns, and to all of them in the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plait.core.yamltext import is_mapping
from plait.report import pictures
from plait.report.folder import RunFolder, StageFolder, number_of, records
from plait.report.markup import Html, el, join, number, table

_SHOWN = 12  # samples, and pictures far off
_STEPS = 8
_SAID = ("answer", "said", "reply", "output", "text")
_TARGET = ("truth", "target", "expected", "reference")
_ASKED = ("question", "prompt")

Record = dict[str, Any]


def draw_samples(run: RunFolder, stage: StageFolder, card: str) -> Html | None:
    """One card a sample: its picture, what is right, and the answers at several steps."""
    folder = stage.path / "samples"
    files = sorted(folder.glob("*.json")) if folder.is_dir() else []
    if not files:
        return None
    chosen = _evenly(files, _STEPS)
    by_sample: dict[str, dict[str, Record]] = {}
    for path in chosen:
        value = run.json(path)
        step = number(value.get("step", path.stem)) if is_mapping(value) else path.stem
        if is_mapping(value) and isinstance(value.get("phase"), str):
            step = f"{step} {value['phase']}"
        for at, record in enumerate(records(value.get("samples") if is_mapping(value) else value)):
            by_sample.setdefault(str(record.get("id", at)), {})[step] = record
    shown = dict(list(by_sample.items())[:_SHOWN])
    uris = [uri for its in shown.values() if (uri := _first(list(its.values())[-1], ("uri",)))]
    found = pictures.at(run, run.shards(stage), uris)
    told = [f"{len(files)} steps were looked at; {len(chosen)} are shown." if len(chosen) < len(files) else ""]
    told += [f"{len(by_sample)} samples were looked at; {len(shown)} are shown." if len(shown) < len(by_sample) else ""]
    return join(
        el("p", " ".join(filter(None, told)), cls="note") if any(told) else None,
        el("div", [_card(its, found) for its in shown.values()], cls="samples"),
        pictures.attribution(found.values(), card),
    )


def draw_predictions(run: RunFolder, stage: StageFolder, card: str) -> Html | None:
    """How many pictures were named rightly at first, by split, and those the model was furthest from."""
    total: Counter[str] = Counter()
    right: Counter[str] = Counter()
    far: list[tuple[float, Record]] = []
    for record in run.lines(stage.path / "predictions.jsonl"):
        rank, split = number_of(record.get("rank")), str(record.get("split", ""))
        if rank is None:
            continue
        total[split] += 1
        right[split] += rank == 1
        if rank > 1:
            far.append((rank, record))
        if len(far) > 1_000:
            far = sorted(far, key=lambda item: -item[0])[:_SHOWN]
    if not total:
        return None
    far = sorted(far, key=lambda item: -item[0])[: _SHOWN // 2]
    found = pictures.at(run, run.shards(stage), [uri for _, record in far if (uri := _first(record, ("uri",)))])
    rows = [(split, f"{right[split]:,}", f"{count:,}") for split, count in total.items()]
    counts = table(["split", "right at first", "of"], rows, label="Right answers by split")
    if not far:
        return counts
    return join(
        counts,
        el("h4", "Furthest off"),
        el("p", "The pictures whose right answer came last of all.", cls="note"),
        el("div", [_card({"": record}, found) for _, record in far], cls="samples"),
        pictures.attribution(found.values(), card),
    )


def _card(by_step: Mapping[str, Record], found: Mapping[str, pictures.Picture]) -> Html:
    record = list(by_step.values())[-1]
    target, asked = _first(record, _TARGET), _first(record, _ASKED)
    uri = _first(record, ("uri",))
    picture = found.get(uri) if uri else None
    names = [
        el("span", name, attrs={"lang": key.removeprefix("name.")})
        for key in ("name.en", "name.zh")
        if picture and (name := picture.names.get(key)) and name != target
    ]
    alt = f"picture of {target}" if target else "picture of this sample"
    caption = join(
        el("b", target) if target else None,
        names,
        el("span", str(record["split"]), cls="tag") if record.get("split") else None,
    )
    ranked = any("rank" in its for its in by_step.values())
    stepped = any(by_step)
    head = [
        *(["step"] if stepped else []),
        *(["rank"] if ranked else []),
        "answer, best first" if "top" in record else "answer",
    ]
    rows = [
        [
            el("td", step) if stepped else None,
            el("td", number(its.get("rank"))) if ranked else None,
            el("td", _answer(its, target)),
        ]
        for step, its in by_step.items()
    ]
    body = el("tbody", [el("tr", *row) for row in rows])
    top = el("thead", el("tr", [el("th", word, attrs={"scope": "col"}) for word in head]))
    return el(
        "article",
        el("figure", picture.show(alt) if picture else None, el("figcaption", caption)),
        el("div", el("p", asked) if asked else None, el("table", top, body)),
        cls="sample",
    )


def _answer(record: Record, target: str) -> Html:
    """The ranked answers with the right one marked, or the one answer given."""
    if ranked := records(record.get("top")):
        words = [str(answer.get("text", "")) for answer in ranked]
        # The mark is a sign and not a color alone, for those who see no color.
        marked = [el("b", f"✓\u00a0{word}", cls="right") if word == target else el("span", word) for word in words]
        return el("span", marked, cls="ranked")
    if any(isinstance(record.get(key), str) for key in _SAID):
        said = _first(record, _SAID) or "(nothing)"
        if not target:
            return join(said)
        return el("b", f"✓\u00a0{said}", cls="right") if same(said, target) else el("span", f"✗\u00a0{said}")
    known = {"id", "uri", "split", "concept", "rank", *_TARGET, *_ASKED}
    rest = [f"{key}: {number(value)}" for key, value in record.items() if key not in known]
    return join(" · ".join(rest))


def same(said: str, target: str) -> bool:
    """Whether an answer is the target but for case and a full stop: a mark for the eye; scores have their own rules."""
    return said.strip().rstrip(".。").casefold() == target.strip().rstrip(".。").casefold()


def _first(record: Record, keys: Sequence[str]) -> str:
    return next((value for key in keys if isinstance(value := record.get(key), str)), "")


def _evenly(files: Sequence[Path], count: int) -> list[Path]:
    """At most so many, evenly spaced, the first and the last among them."""
    last = len(files) - 1
    return [files[at] for at in sorted({round(i * last / (count - 1)) for i in range(count)})]
