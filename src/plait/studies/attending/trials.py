"""Every arm with every seed at its best rate, and what came of it."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import fmean
from typing import Any

import torch

from plait.core.events import Events
from plait.evaluation.statistics import seeds_mean, seeds_score
from plait.studies.attending.findings import findings
from plait.studies.attending.maps import Looked, look
from plait.studies.attending.scenes import KINDS, Kind, draw_world
from plait.studies.attending.students import GRAPHS, Shape, Size, cost, shape_of, size_for, student
from plait.studies.attending.training import Arm, Training, right, train
from plait.studies.attention import ArmName, AttentionStudy
from plait.studies.workers import finished, one_thread

_FIRST = 2_000_003
"""Seeds of codes and samples begin here, far from those of weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One training.

    Attributes:
        arm: Which.
        lr: Peak learning rate.
        seed: Of codes, samples and weights; the one after the last that counts chooses rates and layers.
    """

    arm: ArmName
    lr: float
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a training.

    Attributes:
        job: Which.
        loss: Mean of the last tenth of the steps.
        cpu_s: Processor seconds it took.
        accuracy: Share of right answers by kind of question.
        best: That of the rule that knows all codes.
        counting: That of the rule that names the most frequent colour, and else guesses.
        looked: What its maps say by kind; of graphs nothing.
    """

    job: Job
    loss: float
    cpu_s: float
    accuracy: Mapping[str, float]
    best: Mapping[str, float]
    counting: Mapping[str, float]
    looked: Mapping[str, Looked]


def kinds_of(arm: ArmName) -> tuple[Kind, ...]:
    """Questions that an arm learns and is asked: graphs are tried where an edge is what is asked for."""
    return ("attribute", "chain") if arm in GRAPHS else ("attribute", "relation", "detail")


def trial(study: AttentionStudy, job: Job) -> Outcome:
    """Train once and ask."""
    begun = time.process_time()
    with one_thread():
        first = _FIRST + 3 * job.seed
        world, ends = draw_world(study.scenes, seed=first), shape_of(study.scenes)
        generator = torch.Generator().manual_seed(first + 1)
        tests = {kind: world.draw(study.rows, generator, kinds=[kind]) for kind in KINDS}
        torch.manual_seed(job.seed)
        model = student(job.arm, ends, size_for(job.arm, ends, study.weights))
        arm, kinds = Arm(name=job.arm, student=model, world=world), kinds_of(job.arm)
        training = Training(steps=study.steps, batch=study.batch, lr=job.lr, kinds=kinds)
        loss = train(arm, training, generator=torch.Generator().manual_seed(first + 2))
        accuracy = {kind: right(arm, tests[kind], generator=generator) for kind in kinds}
        mapped = () if job.arm in GRAPHS else kinds
        looked = {kind: look(arm, tests[kind], deleted=study.deleted, generator=generator) for kind in mapped}
    return Outcome(
        job=job,
        loss=loss,
        cpu_s=time.process_time() - begun,
        accuracy=accuracy,
        best={kind: float((world.best(tests[kind]) == tests[kind].labels).double().mean()) for kind in kinds},
        counting={kind: float((world.counting(tests[kind]) == tests[kind].labels).double().mean()) for kind in kinds},
        looked=looked,
    )


def collect(study: AttentionStudy, *, events: Events) -> dict[str, Any]:
    """All trainings, scored: plain data."""
    begun = time.monotonic()
    tried = [Job(arm=arm, lr=lr, seed=study.seeds) for arm in study.arms for lr in study.lrs]
    tuning = _all(study, tried, events)
    rates = {
        arm: max(study.lrs, key=lambda lr, arm=arm: _mean(tuning[Job(arm=arm, lr=lr, seed=study.seeds)]))
        for arm in study.arms
    }
    jobs = [Job(arm=arm, lr=rates[arm], seed=seed) for seed in range(study.seeds) for arm in study.arms]
    done = {**tuning, **_all(study, jobs, events)}
    for job, outcome in done.items():
        if not math.isfinite(outcome.loss):
            events.warning(f"{job.arm} at rate {job.lr:g} diverged with seed {job.seed}: its answers count as they are")
    chosen = {arm: tuning[Job(arm=arm, lr=rates[arm], seed=study.seeds)] for arm in study.arms}
    of = {arm: [done[Job(arm=arm, lr=rates[arm], seed=seed)] for seed in range(study.seeds)] for arm in study.arms}
    scores, maps, costs = _scores(study, of), _maps(of), _costs(study)
    found = {
        "study": study.name,
        "spec": study.model_dump(mode="json"),
        "rates": [
            {"arm": job.arm, "lr": job.lr, "accuracy": dict(outcome.accuracy), "taken": rates[job.arm] == job.lr}
            for job, outcome in tuning.items()
        ],
        "costs": costs,
        "scores": scores,
        "maps": maps,
        "layers": {
            arm: {kind: _best_layer(looked) for kind, looked in outcome.looked.items()}
            for arm, outcome in chosen.items()
            if any("layer 1" in looked.pointed for looked in outcome.looked.values())
        },
    }
    tuned = {arm: dict(outcome.accuracy) for arm, outcome in chosen.items()}
    found, tuned = _rounded(found), _rounded(tuned)  # so that what is published leads to the same verdicts
    return _rounded(
        {
            **found,
            "findings": findings(found, tuned),
            "diverged": sum(not math.isfinite(outcome.loss) for outcome in done.values()),
            "trained": len(done),
            "seconds": round(time.monotonic() - begun, 1),
            "cpu_seconds": round(sum(outcome.cpu_s for outcome in done.values()), 1),
            "torch": str(torch.__version__),
        }
    )


def _all(study: AttentionStudy, jobs: Sequence[Job], events: Events) -> dict[Job, Outcome]:
    found = {o.job: o for o in finished(partial(trial, study), jobs, workers=study.workers, events=events)}
    return {job: found[job] for job in jobs}


def _mean(outcome: Outcome) -> float:
    return fmean(outcome.accuracy.values())


def _best_layer(looked: Looked) -> str:
    """The layer that points best with the seed that chooses."""
    return max((name for name in looked.pointed if name != "gradient"), key=lambda name: looked.pointed[name])


def _scores(study: AttentionStudy, of: Mapping[Any, Sequence[Outcome]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for arm, outcomes in of.items():
        for kind in kinds_of(arm):
            shares = [outcome.accuracy[kind] for outcome in outcomes]
            score = seeds_score(shares, name=kind, rule="accuracy", n=study.rows * study.seeds)
            about = {"arm": arm, "kind": kind, "lr": outcomes[0].job.lr}
            rules = {
                "best": fmean(outcome.best[kind] for outcome in outcomes),
                "counting": fmean(outcome.counting[kind] for outcome in outcomes),
            }
            found.append({**about, **asdict(score), "seeds": shares, **rules})
    return found


def _maps(of: Mapping[Any, Sequence[Outcome]]) -> list[dict[str, Any]]:
    """Pointing, mass and what deleting costs, each for every arm, kind and map."""
    found: list[dict[str, Any]] = []
    for arm, outcomes in of.items():
        for kind in outcomes[0].looked:
            looked = [outcome.looked[kind] for outcome in outcomes]
            for measure in ("pointed", "mass", "fell"):
                each: list[Mapping[str, float]] = [getattr(one, measure) for one in looked]
                for name in each[0]:
                    values = [one[name] for one in each]
                    score = seeds_mean(values, name=measure, rule="mean over samples")
                    about = {"arm": arm, "kind": kind, "measure": measure, "map": name}
                    found.append({**about, "value": score.value, "low": score.low, "high": score.high, "seeds": values})
    return found


def _costs(study: AttentionStudy) -> list[dict[str, Any]]:
    """At the size of the study, where all have about the same weights; and at that of towers, with one width of all."""
    ends, cells = shape_of(study.scenes), study.scenes.rows * study.scenes.columns
    small = [cost(arm, ends, size_for(arm, ends, study.weights), regions=cells) for arm in study.arms]
    width, regions, words = study.wide
    large = Shape(width, width, words, ends.answers)
    wide = [cost(arm, large, Size(width, width), regions=regions) for arm in study.arms]
    return [asdict(one) for one in (*small, *wide)]


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 5)
    if isinstance(value, Mapping):
        return {key: _rounded(inner) for key, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, list | tuple) else value
