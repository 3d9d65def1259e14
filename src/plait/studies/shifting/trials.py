"""Candidates of every arm chosen without a label of the target, then every arm with every seed, scored."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from plait.core.device import cpu_name
from plait.core.events import Events
from plait.evaluation.statistics import seeds_score
from plait.studies.domains import Arm, Case, DomainShift
from plait.studies.shifting.digits import LOOKS, Digits, class_shares, draw_digits
from plait.studies.shifting.findings import claims, differences
from plait.studies.shifting.training import Training, answers, right, train
from plait.studies.workers import finished, one_thread

_FIRST = 1_000_003
"""Seeds of pictures begin here, far from those of weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One training, or two.

    Attributes:
        case: Which target.
        arm: Which way to align.
        lr: Peak learning rate.
        strength: Of the arm.
        seed: Of pictures and weights.
        judged: Whether it is a candidate, judged by a second training the other way round.
        told: Whether it learns from the target's labels instead of the source's: how far one could get.
    """

    case: Case
    arm: Arm
    lr: float
    strength: float
    seed: int
    judged: bool = False
    told: bool = False


Chosen = dict[tuple[Case, Arm], Job]
"""By case and arm."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a job.

    Attributes:
        job: Which.
        source: Share of right answers for test pictures of the source, which do not pass a layer set for the target.
        target: For those of the target.
        reverse: For held pictures of the source, by a student that learned from the answers for the target; NaN where
            nobody asked.
        trained: How many trainings it took.
        diverged: How many of them ended early, as numbers stopped being finite.
        cpu_s: Processor seconds.
    """

    job: Job
    source: float
    target: float
    reverse: float
    trained: int
    diverged: int
    cpu_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """Pictures of one seed, all different.

    Attributes:
        source: Labeled, to learn from.
        target: To learn from; labels are for :attr:`Job.told` alone.
        held: Of the source, to choose by.
        source_test: To ask about.
        target_test: To ask about.
    """

    source: Digits
    target: Digits
    held: Digits
    source_test: Digits
    target_test: Digits


def drawn(study: DomainShift, case: Case, seed: int) -> Drawn:
    """The same for all arms; pictures of the source are the same for all cases."""
    generator = torch.Generator().manual_seed(_FIRST + 2 * seed)
    look, equal = LOOKS["none"], class_shares(False, generator)
    source, held, source_test = (
        draw_digits(rows, generator, look=look, shares=equal) for rows in (study.pool, study.held, study.rows)
    )
    generator = torch.Generator().manual_seed(_FIRST + 2 * seed + 1)
    look, shares = LOOKS[case.shift], class_shares(case.skewed, generator)
    target, target_test = (draw_digits(rows, generator, look=look, shares=shares) for rows in (study.pool, study.rows))
    return Drawn(source=source, target=target, held=held, source_test=source_test, target_test=target_test)


def trial(study: DomainShift, job: Job) -> Outcome:
    """Train and ask; a candidate's answers are then learned from, the other way round."""
    begun = time.process_time()
    with one_thread():
        of = drawn(study, job.case, job.seed)
        training = Training(
            arm=job.arm, lr=job.lr, strength=job.strength, steps=study.steps, batch=study.batch, seed=job.seed
        )
        learn = partial(train, training=training, d_hidden=study.d_hidden, d=study.d)
        trained = [learn(of.target if job.told else of.source, of.target)]
        student, reverse = trained[0].student, float("nan")
        if job.judged:
            said = Digits(pixels=of.target.pixels, classes=answers(student, of.target))
            trained.append(learn(said, of.source))
            reverse = right(trained[1].student, of.held)
        return Outcome(
            job=job,
            source=right(student, of.source_test, aligned=False),
            target=right(student, of.target_test),
            reverse=reverse,
            trained=len(trained),
            diverged=sum(one.diverged for one in trained),
            cpu_s=time.process_time() - begun,
        )


def collect(study: DomainShift, *, events: Events) -> dict[str, Any]:
    """Choose, train, score: plain data."""
    begun = time.monotonic()
    run = partial(finished, partial(trial, study), workers=study.workers, events=events)
    tried = {outcome.job: outcome for outcome in run(_candidates(study))}
    chosen: Chosen = {(c, a): _choose(study, tried, case=c, arm=a) for c in study.cases for a in _arms(study)}
    done = {outcome.job: outcome for outcome in run(_jobs(study, chosen))}
    scores = [_scored(study, done, chosen[case, arm], told=False) for case, arm in chosen]
    scores += [_scored(study, done, chosen[case, "none"], told=True) for case in study.cases]
    compared = differences(scores)
    outcomes = [*tried.values(), *done.values()]
    for outcome in outcomes:
        if outcome.diverged:
            events.warning(
                f"{outcome.job.arm} on {outcome.job.case.title} at rate {outcome.job.lr:g} and strength "
                f"{outcome.job.strength:g} diverged with seed {outcome.job.seed}: its answers count as they are"
            )
    return {
        "study": study.name,
        "spec": study.model_dump(mode="json"),
        "candidates": [_candidate(outcome, chosen) for outcome in tried.values()],
        "scores": scores,
        "differences": compared,
        "claims": claims(compared),
        "trained": sum(outcome.trained for outcome in outcomes),
        "diverged": sum(outcome.diverged for outcome in outcomes),
        "seconds": round(time.monotonic() - begun, 1),
        "cpu_seconds": round(sum(outcome.cpu_s for outcome in outcomes), 1),
        "machine": cpu_name(),
        "torch": str(torch.__version__),
    }


def _arms(study: DomainShift) -> tuple[Arm, ...]:
    return tuple(dict.fromkeys(("none", *study.arms)))


def _candidates(study: DomainShift) -> list[Job]:
    """As many for each arm in each case, with a seed that no score has."""
    return [
        Job(case=case, arm=arm, lr=lr, strength=strength, seed=0, judged=True)
        for case in study.cases
        for arm in _arms(study)
        for lr in study.lrs
        for strength in getattr(study.strengths, arm)
    ]


def _choose(study: DomainShift, tried: Mapping[Job, Outcome], *, case: Case, arm: Arm) -> Job:
    """The candidate with most right in reverse; the first of equals. Labels of the target have no part in it."""
    of = [outcome for outcome in tried.values() if (outcome.job.case, outcome.job.arm) == (case, arm)]
    order = {job: at for at, job in enumerate(_candidates(study))}
    return min(of, key=lambda outcome: (-outcome.reverse, order[outcome.job])).job


def _jobs(study: DomainShift, chosen: Chosen) -> list[Job]:
    return [
        _final(job, seed=seed, told=told)
        for seed in _seeds(study)
        for (_, arm), job in chosen.items()
        for told in ((False, True) if arm == "none" else (False,))
    ]


def _final(job: Job, *, seed: int, told: bool) -> Job:
    return Job(case=job.case, arm=job.arm, lr=job.lr, strength=job.strength, seed=seed, told=told)


def _seeds(study: DomainShift) -> Sequence[int]:
    return range(1, study.seeds + 1)


def _scored(study: DomainShift, done: Mapping[Job, Outcome], job: Job, *, told: bool) -> dict[str, Any]:
    """One arm in one case: right answers in both domains."""
    outcomes = [done[_final(job, seed=seed, told=told)] for seed in _seeds(study)]
    found: dict[str, Any] = {
        "case": job.case.title,
        **job.case.model_dump(mode="json"),
        "arm": "target's labels" if told else job.arm,
        "lr": job.lr,
        "strength": job.strength,
    }
    for domain in ("source", "target"):
        shares = [float(getattr(outcome, domain)) for outcome in outcomes]
        name = f"{job.case.title}/{found['arm']}/{domain}"
        score = seeds_score(shares, name=name, rule="accuracy", n=study.rows * study.seeds)
        found[domain] = {**asdict(score), "seeds": shares}
    return found


def _candidate(outcome: Outcome, chosen: Chosen) -> dict[str, Any]:
    job = outcome.job
    return {
        "case": job.case.title,
        "arm": job.arm,
        "lr": job.lr,
        "strength": job.strength,
        "reverse": outcome.reverse,
        "target": outcome.target,
        "chosen": chosen[job.case, job.arm] == job,
    }
