"""A section for each stage: what every kind has in common, and what only one kind shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from plait.core.yamltext import is_list, is_mapping
from plait.report import model_sections as model
from plait.report import pictures
from plait.report.charts import Charts, draw_metrics, read_metrics
from plait.report.folder import RunFolder, StageFolder
from plait.report.markdown import render
from plait.report.markup import Html, alert, duration, el, fold, join, number, origin, table
from plait.report.names import tower_name
from plait.report.samples import draw_predictions, draw_samples
from plait.report.scores import draw_scores, read_scores

Part = Callable[[RunFolder, StageFolder, Charts], Html | None]
"""Draws one thing of a stage; nothing where its files are not there."""

_STRIP = 12
_STATES = {
    "done": "done",
    "stopped": "stopped",
    "unfinished": "not finished",
    "waiting": "not begun",
}
_NAMES = {"test-concept": "new things", "test-style": "new drawing style", "test-both": "new things in a new style"}


def draw_stage(run: RunFolder, stage: StageFolder, charts: Charts) -> Html:
    """The section of one stage; a part that cannot be drawn is named in its place, and the others stand."""
    parts = [_guard(run, stage, part, charts=charts) for part in (_state, *SPECIAL.get(stage.kind, ()), *COMMON)]
    state = el("span", _STATES[stage.state], cls=f"tag {stage.state}")
    title = el("h2", stage.name.capitalize(), " ", state)
    return el("section", title, *parts, attrs={"id": f"stage-{stage.path.name}"})


def sentences(run: RunFolder, stage: StageFolder) -> list[str]:
    """What the stage did and how well, in the words of its seal; where there is none, how far it is."""
    if stage.state != "done":
        said = {"stopped": "stopped before its end", "unfinished": "begun, not finished", "waiting": "not begun"}
        return [stage.stop or said[stage.state]]
    lines = stage.summary.get("lines")
    own = [str(line) for line in lines] if is_list(lines) else []
    return [*_made(run, stage), *own] or [f"done in {duration(stage.seconds)}"]


def _made(run: RunFolder, stage: StageFolder) -> list[str]:
    """What was made, where the seal's own lines say only how good it is."""
    summary = stage.summary
    splits, ledger = summary.get("splits"), summary.get("ledger")
    if stage.kind == "data" and is_mapping(splits):
        counts = ", ".join(f"{number(count)} {split}" for split, count in splits.items())
        asked = sum(sum(its.values()) for its in _mappings(summary.get("instruct")))
        rows = f", made from {number(ledger.get('rows'))} source rows" if is_mapping(ledger) else ""
        return [f"pictures: {counts}; {asked:,} questions{rows}"]
    if stage.kind == "pretrain" and is_mapping(summary.get("pictures")):
        objective, tower = stage.spec.get("objective"), stage.spec.get("image_tower")
        kind = objective.get("kind") if is_mapping(objective) else "views"
        done = f"{number(summary.get('steps'))} steps on {number(summary['pictures'].get('train'))} pictures"
        return [f"{tower_name(tower)}, from scratch, by views of pictures alone ({kind}): {done}"]
    if stage.kind == "pretrain" and is_mapping(summary.get("pairs")):
        image, text = stage.spec.get("image_tower"), stage.spec.get("text_tower")
        done = f"{number(summary.get('steps'))} steps on {number(summary['pairs'].get('train'))} pairs"
        if is_mapping(stage.spec.get("qformer")):
            return [f"Q-Former on {image} (kept as it is), words as {text} cuts them: {done}"]
        spoken = stage.spec.get("spoken")
        heard = f", names said aloud to {spoken.get('audio_tower')}" if is_mapping(spoken) else ""
        if not is_mapping(image) and not is_mapping(text):
            return [f"heads between {image} and {text} (both kept as they are){heard}: {done}"]
        learn, still = "from scratch", "kept as it is"
        sides = " beside ".join(f"{tower_name(t)} ({learn if is_mapping(t) else still})" for t in (image, text))
        return [f"{sides}{heard}: {done}"]
    return []


def _guard(run: RunFolder, stage: StageFolder, part: Part, *, charts: Charts) -> Html | None:
    """Files may be of another version or edited by hand: a part they break must not take the page with it."""
    try:
        return part(run, stage, charts)
    except (LookupError, TypeError, ValueError, AttributeError, OSError) as error:
        what = (part.__doc__ or "a part").split(".")[0].lower()
        return alert(f"{what}: cannot be shown ({type(error).__name__}: {error})", origin_file=stage.path.name)


# --- what every stage may have ---------------------------------------------------------------------------------------


def _state(run: RunFolder, stage: StageFolder, charts: Charts) -> Html | None:
    """How far an unsealed stage is; of a sealed one the head of the page tells."""
    if stage.state == "done":
        return None
    return join([el("p", line) for line in sentences(run, stage)], origin("events.jsonl"))


def _scores(run: RunFolder, stage: StageFolder, charts: Charts) -> Html | None:
    """Scores."""
    path = stage.path / "scores.json"
    scores = [score for score in read_scores(run, path) if not model.is_answer_score(score)]
    if not scores:
        return None
    return join(el("h3", "How good it is"), draw_scores(charts, scores), origin(run.relative(path)))


def _samples(run: RunFolder, stage: StageFolder, charts: Charts) -> Html | None:
    """Samples."""
    drawn = draw_samples(run, stage, _card_of(run, stage))
    if drawn is None:
        return None
    return join(el("h3", "What it answers"), drawn, origin(f"{stage.path.name}/samples"))


def _predictions(run: RunFolder, stage: StageFolder, charts: Charts) -> Html | None:
    """Predictions."""
    path = stage.path / "predictions.jsonl"
    drawn = draw_predictions(run, stage, _card_of(run, stage))
    return join(el("h3", "All answers"), drawn, origin(run.relative(path))) if drawn else None


def _curves(run: RunFolder, stage: StageFolder, charts: Charts) -> Html | None:
    """Curves."""
    path = stage.path / "metrics.jsonl"
    metrics = read_metrics(run, path)
    if not metrics.curves:
        return None
    facts = {"steps recorded": number(metrics.records)}
    if rates := sorted(metrics.curves["samples_per_s"].values) if "samples_per_s" in metrics.curves else []:
        facts["samples a second, median"] = number(round(rates[len(rates) // 2]))
    if "memory_bytes" in metrics.curves:
        facts["memory at its highest"] = f"{max(metrics.curves['memory_bytes'].values) / 2**20:,.0f} MiB"
    return join(
        el("h3", "How it learned"), facts_list(facts), draw_metrics(charts, metrics), origin(run.relative(path))
    )


def _summary(run: RunFolder, stage: StageFolder, charts: Charts) -> Html | None:
    """Summary and settings."""
    rows = [(key, value) for key, value in _flat(stage.summary) if not key.startswith("lines")]
    settings = list(_flat(stage.spec))
    folder = stage.path.name
    return join(
        fold("Summary", table(["", "value"], rows, label="Summary"), origin(f"{folder}/done.json")) if rows else None,
        fold("Settings", table(["setting", "value"], settings, label="Settings"), origin(f"{folder}/spec.json"))
        if settings
        else None,
    )


# --- what the data stage has -----------------------------------------------------------------------------------------


def _strips(run: RunFolder, stage: StageFolder, charts: Charts) -> Html | None:
    """Some pictures of each split."""
    shards = stage.path / "shards"
    if not shards.is_dir():
        return None
    parts: list[Html] = []
    everything: list[pictures.Picture] = []
    known = stage.summary.get("splits")
    for split in pictures.splits(shards, known if is_mapping(known) else ()):
        some = pictures.first(run, shards, split, count=_STRIP)
        everything += some
        more = f" – {_NAMES[split]}" if split in _NAMES else ""
        parts += [el("h4", split, el("span", more, cls="quiet")), el("ul", [_tile(one) for one in some], cls="strip")]
    return join(
        el("h3", "Some of the pictures"),
        *parts,
        pictures.attribution(everything, _card_of(run, stage)),
        origin(f"{stage.path.name}/shards"),
    )


def _tile(picture: pictures.Picture) -> Html:
    english, chinese = picture.names.get("name.en", ""), picture.names.get("name.zh", "")
    others = [text for name, text in picture.names.items() if name not in ("name.en", "name.zh")][:1]
    name = english or next(iter(others), "")
    return el(
        "li",
        picture.show(name or chinese or "picture without a name"),
        el("span", name) if name else None,
        el("span", chinese, attrs={"lang": "zh"}) if chinese else None,
    )


def _counts(run: RunFolder, stage: StageFolder, charts: Charts) -> Html | None:
    """Counts by split, task and fate."""
    parts: list[Html] = []
    splits, asked = stage.summary.get("splits"), stage.summary.get("instruct")
    if is_mapping(splits):
        every: Mapping[str, Mapping[str, Any]] = asked if is_mapping(asked) else {}
        names = list(dict.fromkeys([*splits, *every]))
        tasks = list(dict.fromkeys(task for its in _mappings(every) for task in its))
        rows = [["pictures", *(number(splits.get(name, 0)) for name in names)]]
        rows += [[f"questions: {task}", *(number(every.get(n, {}).get(task, 0)) for n in names)] for task in tasks]
        parts += [table(["", *names], rows, label="Counts by split"), origin(f"{stage.path.name}/done.json")]
    fates: Counter[tuple[str, ...]] = Counter()
    for line in run.lines(stage.path / "ledger.jsonl"):
        fates[tuple(str(line.get(key, "")) for key in ("source", "fate", "reason"))] += 1
    if fates:
        rows = [[*keys, number(count)] for keys, count in sorted(fates.items())]
        total = sum(fates.values())
        ledger = table(["source", "fate", "reason", "rows"], rows, label="Fate of source rows", left=3)
        parts.append(fold(f"Fate of all {total:,} source rows", ledger, origin(f"{stage.path.name}/ledger.jsonl")))
    return join(el("h3", "How much there is"), parts) if parts else None


def _card(run: RunFolder, stage: StageFolder, charts: Charts) -> Html | None:
    """Data card."""
    text = run.text(stage.path / "card.md")
    if not text:
        return None
    return fold("Data card", el("div", render(text, level=3), cls="card"), origin(f"{stage.path.name}/card.md"))


COMMON: tuple[Part, ...] = (_scores, _samples, _curves, _predictions, _summary)
"""Drawn for every kind of stage, where its files are there."""

SPECIAL: dict[str, tuple[Part, ...]] = {
    "data": (_strips, _counts, _card),
    "tune": (model.bars, model.first_batch, model.phases),
    "align": (model.bars, model.phases),
    "compress": (model.sizes, model.bars, model.asked),
    "evaluate": (model.gates, model.bars, model.asked),
}
"""Drawn before those, for one kind."""


def facts_list(facts: Mapping[str, str]) -> Html:
    """Names and values side by side."""
    return el("dl", [el("div", el("dt", name), el("dd", value)) for name, value in facts.items()], cls="facts")


def _card_of(run: RunFolder, stage: StageFolder) -> str:
    shards = run.shards(stage)
    return run.text(shards.parent / "card.md") if shards else ""


def _mappings(value: object) -> list[dict[str, Any]]:
    return [its for its in value.values() if is_mapping(its)] if is_mapping(value) else []


def _flat(value: Mapping[str, Any], before: str = "") -> list[tuple[str, str]]:
    """Nested settings as dotted keys."""
    found: list[tuple[str, str]] = []
    for key, inner in value.items():
        name = f"{before}{key}"
        found += _flat(inner, f"{name}.") if is_mapping(inner) else [(name, number(inner))]
    return found
