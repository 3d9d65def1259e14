"""Every encoder in every part of the study with every seed, and the scores of all of them."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch

from plait.core.events import Events
from plait.core.speed import interleaved
from plait.evaluation.statistics import seeds_mean, seeds_score
from plait.models.towers.vit import VisionTransformer
from plait.studies.encoders import ENCODERS, EncoderName, Encoders
from plait.studies.seeing.aligning import Pair, align, aligned
from plait.studies.seeing.findings import findings
from plait.studies.seeing.layers import READ, attention_distances, layer_scores, pixel_distances
from plait.studies.seeing.moving import equivariances
from plait.studies.seeing.scenes import QUESTIONS, SIDE, draw_scenes
from plait.studies.seeing.students import Student
from plait.studies.seeing.towers import growing_costs, published_costs, tower_cost
from plait.studies.seeing.training import Training, ask, train
from plait.studies.workers import finished, one_thread

Part = Literal["main", "data", "shift", "align"]
TASKS: tuple[str, ...] = (*QUESTIONS, "marks")
"""What every student learns at once; marks are scored by average precision."""

_FIRST = 1_000_003
"""Seeds of pictures begin here, far from those of weights."""

_TUNING = 10_000
"""The seed with which learning rates are chosen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One training.

    Attributes:
        part: What for.
        encoder: Which.
        seed: Of pictures and weights.
        pictures: Different training pictures; 0: every update has new ones.
        lr: Peak learning rate; 0: not chosen yet.
    """

    part: Part
    encoder: EncoderName
    seed: int
    pictures: int = 0
    lr: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a training.

    Attributes:
        job: Which.
        loss: Mean of the last tenth of the steps.
        cpu_s: Processor seconds it took.
        scores: Of each task; of a shift, where objects stand as in training.
        moved: Of a shift: where they stand in the other half.
        layers: Of the ViT in the main part, at the ``start`` and at the ``end``: what its layers hold.
    """

    job: Job
    loss: float
    cpu_s: float
    scores: Mapping[str, float]
    moved: Mapping[str, float] = field(default_factory=dict)
    layers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def trial(study: Encoders, job: Job) -> Outcome:
    """Train once and ask."""
    begun = time.process_time()
    with one_thread():
        if job.part == "align":
            return _aligned(study, job)
        first = _FIRST + 3 * job.seed
        shifted = job.part == "shift"
        torch.manual_seed(job.seed)
        student = Student(job.encoder, places=not shifted)
        training = Training(
            steps=study.shift.steps if shifted else study.steps,
            batch=study.batch,
            lr=job.lr,
            pictures=job.pictures,
            region="left" if shifted else "anywhere",
        )
        looked = job.part == "main" and job.seed != _TUNING
        layers = {"start": _layers(study, student, first)} if looked else {}
        loss = train(student, training, generator=torch.Generator().manual_seed(first))
        tests = torch.Generator().manual_seed(first + 1)
        scores = ask(student, draw_scenes(study.rows, tests, region=training.region))
        moved = ask(student, draw_scenes(study.rows, tests, region="right")) if shifted else {}
        if layers:
            layers["end"] = _layers(study, student, first)
    cpu_s = time.process_time() - begun
    return Outcome(job=job, loss=loss, cpu_s=cpu_s, scores=scores, moved=moved, layers=layers)


def _aligned(study: Encoders, job: Job) -> Outcome:
    begun, first = time.process_time(), _FIRST + 3 * job.seed
    torch.manual_seed(job.seed)
    pair = Pair(job.encoder)
    training = Training(steps=study.align.steps, batch=study.align.batch, lr=job.lr)
    loss = align(pair, training, generator=torch.Generator().manual_seed(first))
    scores = aligned(pair, draw_scenes(study.align.rows, torch.Generator().manual_seed(first + 1)))
    return Outcome(job=job, loss=loss, cpu_s=time.process_time() - begun, scores=scores)


def _layers(study: Encoders, student: Student, first: int) -> dict[str, Any]:
    if not isinstance(student.tower, VisionTransformer):
        return {}
    scenes = draw_scenes(study.probes.rows, torch.Generator().manual_seed(first + 2))
    distances = attention_distances(student.tower, scenes.pixels[:200])
    return {"distances": distances, "read": layer_scores(student.tower, scenes)}


def jobs_of(study: Encoders) -> list[Job]:
    """All trainings, the longest ones not last."""
    found: list[Job] = []
    for seed in range(study.seeds):
        found += [Job(part="main", encoder=encoder, seed=seed) for encoder in ENCODERS]
        found += [
            Job(part="data", encoder=encoder, seed=seed, pictures=pictures)
            for pictures in study.data.pictures
            for encoder in ("vit", "cnn")
        ]
        found += [Job(part="shift", encoder=encoder, seed=seed) for encoder in study.shift.encoders]
        found += [Job(part="align", encoder=encoder, seed=seed) for encoder in study.align.encoders]
    return found


def tries_of(study: Encoders) -> list[Job]:
    """Trainings that choose learning rates."""
    several: tuple[tuple[Part, tuple[EncoderName, ...]], ...] = (("main", ENCODERS), ("align", study.align.encoders))
    return [
        Job(part=part, encoder=encoder, seed=_TUNING, lr=lr)
        for part, encoders in several
        for encoder in encoders
        for lr in study.lrs
    ]


def chosen(tried: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Every rate that was tried, with its score, and whether it is the best of its encoder; ties go to the lower."""
    found: list[dict[str, Any]] = []
    for one in sorted(tried, key=lambda one: (one.job.part != "main", one.job.encoder, one.job.lr)):
        # Of an alignment R@1 alone: CKA is high whatever was learned.
        score = one.scores["r@1"] if one.job.part == "align" else sum(one.scores.values()) / len(one.scores)
        score = score if math.isfinite(score) else 0.0
        found.append({"part": one.job.part, "encoder": one.job.encoder, "lr": one.job.lr, "score": score})
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for row in found:
        known = best.setdefault((row["part"], row["encoder"]), row)
        if row["score"] > known["score"]:
            best[row["part"], row["encoder"]] = row
    return [{**row, "taken": best[row["part"], row["encoder"]] is row} for row in found]


def collect(study: Encoders, *, events: Events) -> dict[str, Any]:
    """All trainings, scored: plain data."""
    begun = time.monotonic()
    run = partial(trial, study)
    tried = list(finished(run, tries_of(study), workers=study.workers, events=events))
    rates = chosen(tried)
    rate = {(row["part"], row["encoder"]): row["lr"] for row in rates if row["taken"]}
    jobs = jobs_of(study)
    wanted = [replace(j, lr=rate["align" if j.part == "align" else "main", j.encoder]) for j in jobs]
    done: dict[Job, Outcome] = {
        replace(outcome.job, lr=0.0): outcome for outcome in finished(run, wanted, workers=study.workers, events=events)
    }
    for job in jobs:
        if not math.isfinite(done[job].loss):
            events.warning(f"{job.encoder} ({job.part}) diverged with seed {job.seed}: its answers count as they are")
    found: dict[str, Any] = {
        "study": study.name,
        "spec": study.model_dump(mode="json"),
        "costs": [asdict(tower_cost(name)) for name in ENCODERS],
        "latency": _latency(),
        "published": published_costs(),
        "growth": growing_costs(study.sizes),
        "moving": equivariances(),
        "chance": _chance(study),
        "rates": rates,
        "scores": _scores(study, done),
        "layers": _of_layers(study, done),
        "uniform_distance": float(pixel_distances().mean()),
    }
    return {
        **found,
        "findings": findings(found),
        "diverged": sum(not math.isfinite(outcome.loss) for outcome in done.values()),
        "trained": len(done) + len(tried),
        "seconds": round(time.monotonic() - begun, 1),
        "cpu_seconds": round(sum(outcome.cpu_s for outcome in (*tried, *done.values())), 1),
        "torch": str(torch.__version__),
    }


def _latency() -> list[dict[str, Any]]:
    """Milliseconds of one picture through each student, on one thread, all in turn; these depend on the machine."""
    with one_thread():
        students = {name: Student(name).eval() for name in ENCODERS}
        picture = torch.rand(1, 3, SIDE, SIDE)

        def call(name: EncoderName) -> None:
            with torch.inference_mode():
                students[name](picture)

        times = interleaved({name: partial(call, name) for name in ENCODERS}, seconds=2.0, rounds=50)
    return [{"encoder": name, "ms": 1e3 * found.median, "rounds": found.rounds} for name, found in times.items()]


def _chance(study: Encoders) -> dict[str, float]:
    """What the most frequent answer gets right, over the test pictures of all seeds; of marks, their share of cells."""
    counts: dict[str, torch.Tensor] = {}
    marks: list[float] = []
    for seed in range(study.seeds):
        scenes = draw_scenes(study.rows, torch.Generator().manual_seed(_FIRST + 3 * seed + 1))
        marks.append(float(scenes.marks.mean()))
        for question, target in scenes.targets.items():
            found = torch.bincount(target[target >= 0], minlength=10)
            counts[question] = counts.get(question, torch.zeros_like(found)) + found
    shares = {question: float(found.max() / found.sum()) for question, found in counts.items()}
    return {**shares, "marks": sum(marks) / len(marks)}


def _scores(study: Encoders, done: Mapping[Job, Outcome]) -> list[dict[str, Any]]:
    """One entry an encoder, part, size, place and task."""
    first = [job for job in jobs_of(study) if job.seed == 0]
    found: list[dict[str, Any]] = []
    for job in first:
        outcomes = [
            done[Job(part=job.part, encoder=job.encoder, seed=seed, pictures=job.pictures)]
            for seed in range(study.seeds)
        ]
        rows = study.align.rows if job.part == "align" else study.rows
        places = ("as trained", "moved") if job.part == "shift" else ("as trained",)
        for place in places:
            for task in ("r@1", "cka") if job.part == "align" else TASKS:
                values = [(one.moved if place == "moved" else one.scores)[task] for one in outcomes]
                rule = {"marks": "average precision", "cka": "linear CKA"}.get(task, "accuracy")
                # Several colors and pairs of a picture are asked, which are not independent: pictures are counted.
                score = seeds_score(values, name=task, rule=rule, n=rows * study.seeds)
                about = {"part": job.part, "encoder": job.encoder, "pictures": job.pictures, "place": place}
                found.append({**about, "task": task, **asdict(score), "seeds": values})
    return found


def _of_layers(study: Encoders, done: Mapping[Job, Outcome]) -> list[dict[str, Any]]:
    """Of each layer of the ViT, at the start and at the end: attention distances and what can be read."""
    outcomes = [done[Job(part="main", encoder="vit", seed=seed)] for seed in range(study.seeds)]
    found: list[dict[str, Any]] = []

    def add(when: str, what: str, columns: Sequence[Sequence[float]]) -> None:
        for layer, values in enumerate(zip(*columns, strict=True)):
            rule = "mean over heads and patches" if what == "distance" else "accuracy of a linear layer"
            score = seeds_mean(values, name=what, rule=rule)
            if what != "distance":
                score = replace(score, low=max(0.0, score.low), high=min(1.0, score.high))
            found.append({"when": when, "what": what, "layer": layer, **asdict(score), "seeds": list(values)})

    for when in ("start", "end"):
        held = [outcome.layers[when] for outcome in outcomes]
        add(when, "distance", [one["distances"] for one in held])
        for task in READ:
            add(when, task, [[layer[task] for layer in one["read"]] for one in held])
    return found
