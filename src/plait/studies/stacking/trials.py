"""Every arm at every learning rate on seeds that do not count, then at its best one on those that do."""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch

from plait.core.events import Events
from plait.evaluation.statistics import seeds_mean, seeds_score
from plait.models.transformer import TransformerSizes
from plait.studies.stacking.findings import claims
from plait.studies.stacking.probes import gradient_norms, head_distance, influence, overlap, without_heads
from plait.studies.stacking.students import (
    DEPTH,
    Attending,
    Beside,
    Reader,
    hops,
    reader,
    weights_of,
    width_for,
)
from plait.studies.stacking.tasks import SKIP, Task
from plait.studies.stacking.training import Training, accuracy, train
from plait.studies.transformer import NormPlace, ReaderName, TransformerStudy
from plait.studies.workers import finished, one_thread

Part = Literal["copy", "keep", "ablation", "three", "one"]

_FIRST = 1_000_003
"""Seeds of sequences begin here, far from those of weights."""

_TUNING = 10_000
"""Seeds on which learning rates are chosen begin here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One training.

    Attributes:
        part: Of the study.
        arm: What is compared: a reader; place of the norm and ``+`` or ``-`` for the residual; a number of heads.
        level: Lag of ``copy``, depth of ``ablation``; 0 elsewhere.
        lr: Peak learning rate.
        seed: Of weights and sequences.
    """

    part: Part
    arm: str
    level: int
    lr: float
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a training.

    Attributes:
        job: Which.
        loss: Mean of the last ten updates.
        steps: Updates until the wanted loss; None: not reached, or none was wanted.
        cpu_s: Processor seconds it took.
        accuracy: Question → share of right answers.
        heads: What heads do, at the start and the end; and accuracies without each.
    """

    job: Job
    loss: float
    steps: int | None
    cpu_s: float
    accuracy: Mapping[str, float]
    heads: Mapping[str, Any] = field(default_factory=dict)


# --- what is tried ---------------------------------------------------------------------------------------------------


def task_of(study: TransformerStudy, job: Job) -> Task:
    """What a job reads."""
    far, ablation, several = study.distance, study.ablation, study.several
    match job.part:
        case "copy":  # the same positions are asked at every distance
            return Task(words=far.words, length=far.length, begin=max(far.lags), lags=(job.level,))
        case "keep":
            return Task(words=far.words, length=far.length, begin=0, mark=True)
        case "ablation":
            return Task(words=ablation.words, length=ablation.length, begin=ablation.lag, lags=(ablation.lag,))
        case "three" | "one":
            three = job.part == "three"
            lags = several.lags if three else several.lags[1:]
            return Task(words=several.words, length=several.length, begin=max(several.lags) + 1, lags=lags, mark=three)


def made(study: TransformerStudy, job: Job) -> Reader:
    """The reader of a job, weights drawn from its seed."""
    task = task_of(study, job)
    torch.manual_seed(job.seed)
    if job.part in ("copy", "keep"):
        name, both = _reader_name(job.arm), beside(study, task)
        return reader(name, width_for(name, both), both)
    sizes = TransformerSizes(d=study.d, depth=1, heads=study.attention_heads, d_ff=2 * study.d)
    if job.part == "ablation":
        sizes = replace(sizes, depth=job.level, norm_place=_place(job.arm), residual=job.arm.endswith("+"))
    else:
        sizes = replace(sizes, heads=int(job.arm))
    return Reader(Attending(sizes, study.code, task.length), study.d, task)


def beside(study: TransformerStudy, task: Task) -> Beside:
    """What the readers of a task have in common."""
    return Beside(task=task, code=study.code, heads=study.attention_heads, weights=study.distance.weights)


def trial(study: TransformerStudy, job: Job) -> Outcome:
    """Train once and ask."""
    begun = time.process_time()
    with one_thread():
        task, first = task_of(study, job), _FIRST + 2 * job.seed
        model = made(study, job)
        test = torch.Generator().manual_seed(first + 1)
        heads = _heads(model, task, job, rows=study.rows, seed=first + 1)
        done = train(model, task, _training(study, job), generator=torch.Generator().manual_seed(first))
        if job.part == "keep":
            last = {lag: task.draw(study.rows, test, mark_at=task.length - 1 - lag) for lag in study.distance.lags}
            for batch in last.values():
                batch.targets[:, :-1] = SKIP
            shares = {f"{lag}": accuracy(model, batch)[0] for lag, batch in last.items()}
        else:
            shares = dict(zip(task.questions, accuracy(model, task.draw(study.rows, test)), strict=True))
        if heads:
            batch = task.draw(study.rows, torch.Generator().manual_seed(first + 1))
            heads = {
                "start": heads,
                "end": _heads(model, task, job, rows=study.rows, seed=first + 1),
                "without": without_heads(model, batch),
            }
    return Outcome(
        job=job, loss=done.loss, steps=done.steps, cpu_s=time.process_time() - begun, accuracy=shares, heads=heads
    )


def _heads(model: Reader, task: Task, job: Job, *, rows: int, seed: int) -> dict[str, Any]:
    if job.part != "three" or int(job.arm) < 2:
        return {}
    ids = task.draw(rows, torch.Generator().manual_seed(seed)).ids
    return {
        "distance": head_distance(model, ids, begin=task.begin),
        "keys": overlap(model, "keys"),
        "values": overlap(model, "values"),
    }


def _training(study: TransformerStudy, job: Job) -> Training:
    match job.part:
        case "copy" | "keep":
            return Training(steps=study.distance.steps, batch=study.distance.batch, lr=job.lr)
        case "ablation":
            part = study.ablation
            return Training(steps=part.steps, batch=part.batch, lr=job.lr, until=part.loss)
        case "three" | "one":
            return Training(steps=study.several.steps, batch=study.several.batch, lr=job.lr)


def _reader_name(arm: str) -> ReaderName:
    names: tuple[ReaderName, ...] = ("transformer", "gru", "cnn", "dilated")
    return next(name for name in names if name == arm)


def _place(arm: str) -> NormPlace:
    places: tuple[NormPlace, ...] = ("pre", "post", "none")
    return next(place for place in places if place == arm[:-1])


def ablation_arms(study: TransformerStudy) -> list[str]:
    """Place of the norm, and ``+`` or ``-`` for the residual."""
    return [f"{place}{sign}" for place in study.ablation.places for sign in "+-"]


# --- all of it -------------------------------------------------------------------------------------------------------


def collect(study: TransformerStudy, *, events: Events) -> dict[str, Any]:
    """All trainings, scored: plain data."""
    begun = time.monotonic()
    cells = _cells(study)
    tuned = dict.fromkeys(_tuned(study, cell) for cell in cells)
    seeds = range(_TUNING, _TUNING + study.tuning)
    tries = [replace(cell, lr=lr, seed=seed) for cell in tuned for lr in study.lrs for seed in seeds]
    run = partial(trial, study)
    tried = {o.job: o for o in finished(run, tries, workers=study.workers, events=events)}
    best = {
        cell: _best(study, [[tried[replace(cell, lr=lr, seed=s)] for s in seeds] for lr in study.lrs]) for cell in tuned
    }
    chosen = [replace(cell, lr=best[_tuned(study, cell)]) for cell in cells]
    jobs = [replace(cell, seed=seed) for seed in range(study.seeds) for cell in chosen]
    done = {o.job: o for o in finished(run, jobs, workers=study.workers, events=events)}
    for job in jobs:
        if not math.isfinite(done[job].loss):
            events.warning(f"{job.arm} on {job.part} {job.level} diverged with seed {job.seed}: it counts as it is")
    grouped = {cell: [done[replace(cell, seed=seed)] for seed in range(study.seeds)] for cell in chosen}
    results: dict[str, Any] = {
        "study": study.name,
        "spec": study.model_dump(mode="json"),
        "rates": [{**_about(cell), "lr": lr} for cell, lr in best.items()],
        "costs": _costs(study),
        "scores": _scores(study, grouped),
        "steps": _steps(study, grouped),
        "gradients": _gradients(study),
        "influence": _influence(study),
        "heads": _head_scores(study, grouped),
    }
    results["claims"] = claims(results)
    return {
        **rounded(results),
        "diverged": sum(not math.isfinite(outcome.loss) for outcome in done.values()),
        "trained": len(tried) + len(done),
        "seconds": round(time.monotonic() - begun, 1),
        "cpu_seconds": round(sum(outcome.cpu_s for outcome in (*tried.values(), *done.values())), 1),
        "torch": str(torch.__version__),
    }


def rounded(found: Any) -> Any:
    """Floats of six digits, so that what is published is short.

    Example:
        >>> rounded({"a": [1 / 3, 2, "x"]})
        {'a': [0.333333, 2, 'x']}
    """
    if isinstance(found, float):
        return float(f"{found:.6g}")
    if isinstance(found, Mapping):
        return {key: rounded(value) for key, value in found.items()}
    if isinstance(found, list | tuple):
        return [rounded(value) for value in found]
    return found


def _cells(study: TransformerStudy) -> list[Job]:
    far = study.distance
    wanted: list[tuple[Part, str, int]] = []
    parts: tuple[Part, Part] = ("three", "one")
    for name in far.readers:
        wanted.extend(("copy", name, lag) for lag in far.lags)
        wanted.append(("keep", name, 0))
    wanted.extend(("ablation", arm, depth) for depth in study.ablation.depths for arm in ablation_arms(study))
    wanted.extend((part, f"{n}", 0) for n in study.several.heads for part in parts)
    return [Job(part=part, arm=arm, level=level, lr=0.0, seed=0) for part, arm, level in dict.fromkeys(wanted)]


def _tuned(study: TransformerStudy, cell: Job) -> Job:
    """Where the rate of a cell is chosen: at one distance for all."""
    return replace(cell, level=study.distance.tuned) if cell.part == "copy" else cell


def _best(study: TransformerStudy, tried: Sequence[Sequence[Outcome]]) -> float:
    """The rate of most right answers, or of fewest steps; among equals the one of least loss."""

    def merit(outcomes: Sequence[Outcome]) -> tuple[float, float]:
        loss = sum(outcome.loss for outcome in outcomes)
        loss = loss if math.isfinite(loss) else math.inf
        if outcomes[0].job.part == "ablation":
            return -sum(_counted(study, outcome) for outcome in outcomes), -loss
        return sum(sum(outcome.accuracy.values()) for outcome in outcomes), -loss

    return max(tried, key=merit)[0].job.lr


def _counted(study: TransformerStudy, outcome: Outcome) -> float:
    """Steps, no more than were allowed."""
    return float(study.ablation.steps if outcome.steps is None else outcome.steps)


def _about(cell: Job) -> dict[str, Any]:
    return {"part": cell.part, "arm": cell.arm, "level": cell.level}


def _scores(study: TransformerStudy, grouped: Mapping[Job, Sequence[Outcome]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for cell, outcomes in grouped.items():
        if cell.part == "ablation":
            continue
        for question in outcomes[0].accuracy:
            shares = [outcome.accuracy[question] for outcome in outcomes]
            # Every seed is asked its own sequences; the words of one are not independent questions.
            score = seeds_score(shares, name=f"{cell.part}/{question}", rule="accuracy", n=study.rows * study.seeds)
            found.append({**_about(cell), "question": question, **asdict(score), "seeds": shares})
    return found


def _steps(study: TransformerStudy, grouped: Mapping[Job, Sequence[Outcome]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for cell, outcomes in grouped.items():
        if cell.part == "ablation":
            counted = [_counted(study, outcome) for outcome in outcomes]
            score = seeds_mean(counted, name="steps", rule=f"steps to the loss, at most {study.ablation.steps}")
            reached = sum(outcome.steps is not None for outcome in outcomes)
            loss = [outcome.loss for outcome in outcomes]
            found.append({**_about(cell), **asdict(score), "seeds": counted, "reached": reached, "losses": loss})
    return found


def _gradients(study: TransformerStudy) -> list[dict[str, Any]]:
    """Of untrained Transformers, block by block, and how much smaller it is at the first than at the last block."""
    found: list[dict[str, Any]] = []
    for depth in study.ablation.gradients:
        for arm in ablation_arms(study):
            norms: list[list[float]] = []
            for seed in range(study.seeds):
                job = Job(part="ablation", arm=arm, level=depth, lr=0.0, seed=seed)
                batch = task_of(study, job).draw(64, torch.Generator().manual_seed(_FIRST + 2 * seed))
                norms.append(gradient_norms(made(study, job), batch))
            logs = [[math.log10(max(norm, 1e-300)) for norm in one] for one in norms]
            falls = [one[0] - one[-1] for one in logs]
            score = seeds_mean(falls, name="gradient", rule="log10 of its norm at the first block less at the last")
            blocks = [sum(at) / len(at) for at in zip(*logs, strict=True)]
            found.append({"arm": arm, "level": depth, **asdict(score), "seeds": falls, "blocks": blocks})
    return found


def _influence(study: TransformerStudy) -> list[dict[str, Any]]:
    """Of untrained readers: gradients over distance, as shares of that at the nearest distance."""
    found: list[dict[str, Any]] = []
    for name in study.distance.readers:
        rows: list[torch.Tensor] = []
        for seed in range(study.seeds):
            job = Job(part="copy", arm=name, level=study.distance.lags[0], lr=0.0, seed=seed)
            ids = task_of(study, job).draw(64, torch.Generator().manual_seed(_FIRST + 2 * seed)).ids
            rows.append(influence(made(study, job), ids).double())
        for lag in study.distance.lags:
            shares = [float(row[lag] / row[study.distance.lags[0]]) for row in rows]
            score = seeds_mean(shares, name=f"influence/{lag}", rule="norm of gradients, of that of the nearest")
            about = {"arm": name, "distance": lag, "hops": hops(name, lag)}
            found.append({**about, **asdict(score), "seeds": shares})
    return found


def _head_scores(study: TransformerStudy, grouped: Mapping[Job, Sequence[Outcome]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for cell, outcomes in grouped.items():
        if cell.part == "three" and outcomes[0].heads:
            measures = {
                f"{what} {when}": [outcome.heads[when][what] for outcome in outcomes]
                for what in ("distance", "keys", "values")
                for when in ("start", "end")
            }
            whole = [list(outcome.accuracy.values()) for outcome in outcomes]
            without = [outcome.heads["without"] for outcome in outcomes]
            found.append({"arm": cell.arm, **measures, "whole": whole, "without": without})
    return found


def _costs(study: TransformerStudy) -> list[dict[str, Any]]:
    """Weights of everything that is trained; where readers stand beside each other, how wide they are."""
    far, found = study.distance, list[dict[str, Any]]()
    for part in ("copy", "keep"):
        for name in far.readers:
            both = beside(study, task_of(study, Job(part=part, arm=name, level=far.lags[0], lr=0.0, seed=0)))
            d = width_for(name, both)
            depth = DEPTH if name == "transformer" else None
            found.append({"part": part, "arm": name, "d": d, "depth": depth, "weights": weights_of(name, d, both)})
    others: Iterable[tuple[Part, str, int]] = [
        *(("ablation", arm, depth) for depth in study.ablation.depths for arm in ablation_arms(study)),
        *((part, f"{n}", 0) for part in ("three", "one") for n in study.several.heads),
    ]
    for part, arm, level in others:
        with torch.device("meta"):
            model = made(study, Job(part=part, arm=arm, level=level, lr=0.0, seed=0))
        weights = sum(weight.numel() for weight in model.parameters())
        found.append({"part": part, "arm": arm, "d": study.d, "depth": level or 1, "weights": weights})
    return found
