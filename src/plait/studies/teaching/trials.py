"""Every arm of every part with every seed at its best rate, and what came of it as plain data."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from plait.core.events import Events
from plait.studies.teaching import few, memory, mixing
from plait.studies.teaching.few import TUNING
from plait.studies.teaching.findings import findings
from plait.studies.training import Dtype, Method, Order, PartName, TrainingStudy
from plait.studies.workers import finished

Row = dict[str, Any]
_Job = TypeVar("_Job", few.Job, mixing.Job)
_Arm = TypeVar("_Arm")


def collect(study: TrainingStudy, *, events: Events) -> dict[str, Any]:
    """All parts that are wanted: plain data."""
    begun = time.monotonic()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="plait-study-") as folder:
        for name in dict.fromkeys(study.parts):
            found[name] = _PARTS[name](study, Path(folder), events)
    return {
        "study": study.name,
        "spec": study.model_dump(mode="json"),
        **found,
        "findings": findings(study, found),
        "trained": sum(part["trained"] for part in found.values()),
        "seconds": round(time.monotonic() - begun, 1),
        "torch": str(torch.__version__),
    }


def _memory(study: TrainingStudy, _: Path, events: Events) -> Row:
    """Each kind of step in so many processes, one after another where ``workers`` is 1."""
    kinds = memory.kinds(study.memory)
    work = [kind for _ in range(study.memory.repeats) for kind in kinds]
    done: dict[str, list[dict[str, float]]] = {}
    for kind, one in finished(memory.measured, work, workers=study.workers, events=events):
        done.setdefault(_key(kind), []).append(one)
    steps = [{**{name: kind[name] for name in ("size", "micro", "dtype")}, "seeds": done[_key(kind)]} for kind in kinds]
    return {"trained": len(work), "steps": steps, "gradients": memory.gradient_gaps(study.memory)}


def _key(kind: Mapping[str, Any]) -> str:
    return f"{kind['size']} {kind['micro']} {kind['dtype']}"


def _precision(study: TrainingStudy, _: Path, events: Events) -> Row:
    work: list[tuple[int, Dtype]] = [(s, dtype) for s in range(study.seeds) for dtype in study.precision.dtypes]
    done = list(finished(partial(few.before, study, None), work, workers=study.workers, events=events))
    rows: list[Row] = []
    for dtype in study.precision.dtypes:
        seeds = sorted((one for one in done if one.dtype == dtype), key=lambda one: one.seed)
        rows.append({"dtype": dtype, "seeds": [asdict(one) for one in seeds]})
    return {"trained": len(done), "scores": rows}


def _towers(study: TrainingStudy, folder: Path, events: Events) -> list[float]:
    """Towers of all seeds and of the one that chooses, once for all parts; shares of cells that are right."""
    seeds = [seed for seed in (*range(study.seeds), TUNING) if not (folder / f"tower-{seed}.safetensors").exists()]
    work: list[tuple[int, Dtype]] = [(seed, "float32") for seed in seeds]
    done = finished(partial(few.before, study, folder), work, workers=study.workers, events=events)
    return [one.right for one in sorted(done, key=lambda one: one.seed)]


def _few(study: TrainingStudy, folder: Path, events: Events) -> Row:
    towers = _towers(study, folder, events)
    arms: list[tuple[Method, int]] = [(m, pictures) for pictures in study.few.pictures for m in study.few.methods]
    tries = {
        (method, pictures): [few.Job(method=method, pictures=pictures, seed=TUNING, lr=lr) for lr in study.few.lrs]
        for method, pictures in arms
    }
    rates, scores, trained = _best(study, tries, partial(few.tuned, study, folder), events=events)
    return {"trained": len(towers) + trained, "towers": towers, "rates": rates, "scores": scores}


def _layers(study: TrainingStudy, folder: Path, events: Events) -> Row:
    towers, settings = _towers(study, folder, events), study.layers
    tries: dict[tuple[str, int], list[few.Job]] = {}
    for pictures in settings.pictures:
        about = partial(few.Job, method="full", pictures=pictures, seed=TUNING)
        tries["uniform", pictures] = [about(lr=lr) for lr in settings.uniform]
        tries["decayed", pictures] = [about(lr=lr, decay=decay) for lr in settings.lrs for decay in settings.decays]
    rates, scores, trained = _best(study, tries, partial(few.tuned, study, folder), events=events)
    return {"trained": len(towers) + trained, "towers": towers, "rates": rates, "scores": scores}


def _mixing(study: TrainingStudy, _: Path, events: Events) -> Row:
    costs = mixing.costs_of(study)
    orders: Sequence[Order] = study.mixing.orders
    tries = {
        (order, balanced): [mixing.Job(order=order, balanced=balanced, seed=TUNING, lr=lr) for lr in study.mixing.lrs]
        for order in orders
        for balanced in (False, True)
    }
    rates, scores, trained = _best(study, tries, partial(mixing.mixed, study, costs), events=events)
    return {"trained": trained, "costs": costs, "rates": rates, "scores": scores}


def _best(
    study: TrainingStudy,
    tries: Mapping[_Arm, Sequence[_Job]],
    run: Callable[[_Job], few.Outcome | mixing.Outcome],
    *,
    events: Events,
) -> tuple[list[Row], list[Row], int]:
    """Choose each arm's job by the seed that does not count, and run that with all that do.

    Returns:
        Every try with its score (``chosen``: the best, the first of equals); every arm with what came of its seeds; how
        many trainings.
    """
    work = [job for jobs in tries.values() for job in jobs]
    tried = {one.job: one for one in finished(run, work, workers=study.workers, events=events)}
    chosen = {arm: max(jobs, key=lambda job: _score(tried[job])) for arm, jobs in tries.items()}
    again = [_seeded(job, seed) for job in chosen.values() for seed in range(study.seeds)]
    done = {one.job: one for one in finished(run, again, workers=study.workers, events=events)}
    rates = [
        {"arm": _named(arm), **_plain(job), "score": _score(tried[job]), "chosen": job is chosen[arm]}
        for arm, jobs in tries.items()
        for job in jobs
    ]
    scores = [
        {
            "arm": _named(arm),
            **_plain(job),
            "seeds": [_outcome(done[_seeded(job, seed)]) for seed in range(study.seeds)],
        }
        for arm, job in chosen.items()
    ]
    return rates, scores, len(work) + len(again)


def _seeded(job: _Job, seed: int) -> _Job:
    return type(job)(**{**asdict(job), "seed": seed})


def _plain(job: few.Job | mixing.Job) -> Row:
    return {name: value for name, value in asdict(job).items() if name != "seed"}


def _outcome(one: few.Outcome | mixing.Outcome) -> Row:
    return {name: value for name, value in asdict(one).items() if name != "job"}


def _named(arm: object) -> list[Any]:
    return list(arm) if isinstance(arm, tuple) else [arm]


def _score(one: few.Outcome | mixing.Outcome) -> float:
    """What rates are chosen by; a training that came to nothing is the worst."""
    found = one.unseen.right if isinstance(one, few.Outcome) else one.right["both"]
    return found if math.isfinite(found) else 0.0


_PARTS: Mapping[PartName, Callable[[TrainingStudy, Path, Events], Row]] = {
    "memory": _memory,
    "precision": _precision,
    "few": _few,
    "layers": _layers,
    "mixing": _mixing,
}
