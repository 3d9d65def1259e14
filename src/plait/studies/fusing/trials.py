"""Every fusion in every setting with every seed, and the scores of all of them."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from plait.core.events import Events
from plait.evaluation.statistics import seeds_mean, seeds_score
from plait.studies.fusing.findings import differences, variance
from plait.studies.fusing.students import cost, size_for, student
from plait.studies.fusing.tasks import A, Signals, TaskName, draw_truth
from plait.studies.fusing.training import Training, dropped_at, gradient_shares, right, train, with_noise
from plait.studies.fusion import FusionName, FusionStudy, Norm
from plait.studies.workers import finished, one_thread

_FIRST = 1_000_003
"""Seeds of truths and samples begin here, far from those of weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """In what a fusion is tried.

    Attributes:
        task: Where samples come from.
        factor: How large the noise beside ``small`` is.
        norm: Of each modality.
        trained: Probability of dropping each modality in training.
        lr: Peak learning rate.
    """

    task: TaskName
    factor: float = 1.0
    norm: Norm = "none"
    trained: float = 0.0
    lr: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One training.

    Attributes:
        fusion: Which.
        setting: In what.
        seed: Of truth, samples and weights.
    """

    fusion: FusionName
    setting: Setting
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a training.

    Attributes:
        job: Which.
        loss: Mean of the last tenth of the steps.
        cpu_s: Processor seconds it took.
        accuracy: Share of test samples that have lost modality b → share of right answers.
        noisy: Share of right answers where none has, but b is noisy.
        gradients: Share of the gradient that modality a gets at the start and at the end.
    """

    job: Job
    loss: float
    cpu_s: float
    accuracy: Mapping[float, float]
    noisy: float
    gradients: Mapping[str, float]


def trial(study: FusionStudy, job: Job) -> Outcome:
    """Train once and ask."""
    begun = time.process_time()
    with one_thread():
        size = size_for(job.fusion, study.d, study.weights)
        setting, first = job.setting, _FIRST + 3 * job.seed
        truth = draw_truth(setting.task, study.d, signals(study, setting), seed=first)
        generator = torch.Generator().manual_seed(first + 1)
        test = truth.draw(study.rows, generator)
        draws = torch.rand(study.rows, generator=generator)
        noisy = with_noise(test, study.missing.noise, generator=generator)
        torch.manual_seed(job.seed)
        model = student(job.fusion, study.d, size=size, norm=setting.norm)
        training = Training(steps=study.steps, batch=study.batch, lr=setting.lr, dropped=setting.trained)
        gradients = {"start": gradient_shares(model, test)[A]}
        loss = train(model, truth, training, generator=torch.Generator().manual_seed(first + 2))
        gradients["end"] = gradient_shares(model, test)[A]
        whole, alone = right(model, test), right(model, test, lost=True)
        accuracy = {rate: dropped_at(rate, draws, whole=whole, alone=alone) for rate in {0.0, *study.missing.drops}}
    return Outcome(
        job=job,
        loss=loss,
        cpu_s=time.process_time() - begun,
        accuracy=accuracy,
        noisy=float(right(model, noisy).double().mean()),
        gradients=gradients,
    )


def signals(study: FusionStudy, setting: Setting) -> Signals:
    """How loud things are."""
    missing = study.missing
    return Signals(factor=setting.factor, strengths=missing.strengths, offset=missing.offset)


def collect(study: FusionStudy, *, events: Events) -> dict[str, Any]:
    """All trainings, scored: plain data."""
    begun = time.monotonic()
    jobs = _jobs(study)
    done: dict[Job, Outcome] = {
        outcome.job: outcome for outcome in finished(partial(trial, study), jobs, workers=study.workers, events=events)
    }
    for job in jobs:
        if not math.isfinite(done[job].loss):
            events.warning(
                f"{job.fusion} on {job.setting.task} at rate {job.setting.lr:g} diverged with seed {job.seed}: "
                "its answers count as they are"
            )
    scores = _scores(study, done)
    return {
        "study": study.name,
        "spec": study.model_dump(mode="json"),
        "costs": _costs(study),
        "scores": scores,
        "gradients": _gradients(study, done),
        "differences": differences(scores),
        "variance": variance(scores),
        "diverged": sum(not math.isfinite(outcome.loss) for outcome in done.values()),
        "trained": len(done),
        "seconds": round(time.monotonic() - begun, 1),
        "cpu_seconds": round(sum(outcome.cpu_s for outcome in done.values()), 1),
        "torch": str(torch.__version__),
    }


def _settings(study: FusionStudy) -> dict[str, list[Setting]]:
    """Of each part of the study. What two parts share is trained once."""
    plain = Setting(task="xor", lr=study.lr)
    small = replace(plain, task="small")
    return {
        "interaction": [replace(plain, task=task) for task in study.interaction.tasks],
        "scale": [small, *(replace(small, factor=study.scale.factor, norm=norm) for norm in study.scale.norms)],
        "missing": [
            replace(plain, task=task, trained=trained)
            for task in study.missing.tasks
            for trained in study.missing.trained
        ],
        "rates": [replace(plain, lr=lr) for lr in study.rates.lrs],
    }


def _fusions(study: FusionStudy, part: str) -> Sequence[FusionName]:
    return study.rates.fusions if part == "rates" else study.fusions


def _jobs(study: FusionStudy) -> list[Job]:
    wanted = [
        Job(fusion=fusion, setting=setting, seed=seed)
        for seed in range(study.seeds)
        for part, settings in _settings(study).items()
        for setting in settings
        for fusion in _fusions(study, part)
    ]
    return list(dict.fromkeys(wanted))


def _scores(study: FusionStudy, done: Mapping[Job, Outcome]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for part, settings in _settings(study).items():
        drops = study.missing.drops if part == "missing" else (0.0,)
        for setting in settings:
            truth = draw_truth(setting.task, study.d, signals(study, setting), seed=0)
            for fusion in _fusions(study, part):
                outcomes = [done[Job(fusion=fusion, setting=setting, seed=seed)] for seed in range(study.seeds)]
                asked = [(drop, 0.0, [outcome.accuracy[drop] for outcome in outcomes]) for drop in drops]
                if part == "missing":
                    asked.append((0.0, study.missing.noise, [outcome.noisy for outcome in outcomes]))
                for drop, noise, shares in asked:
                    # Every seed is asked its own samples.
                    score = seeds_score(
                        shares, name=f"{part}/{setting.task}", rule="accuracy", n=study.rows * study.seeds
                    )
                    about = {"part": part, "fusion": fusion, **asdict(setting), "drop": drop, "noise": noise}
                    ceiling = truth.ceiling(lost=drop, noise=noise)
                    found.append({**about, **asdict(score), "seeds": shares, "ceiling": ceiling})
    return found


def _gradients(study: FusionStudy, done: Mapping[Job, Outcome]) -> list[dict[str, Any]]:
    """Shares of the small modality."""
    found: list[dict[str, Any]] = []
    for setting in _settings(study)["scale"]:
        for fusion in study.fusions:
            outcomes = [done[Job(fusion=fusion, setting=setting, seed=seed)] for seed in range(study.seeds)]
            for when in ("start", "end"):
                shares = [outcome.gradients[when] for outcome in outcomes]
                score = seeds_mean(shares, name=f"gradient/{when}", rule="share of Frobenius norms")
                score = replace(score, low=max(0.0, score.low), high=min(1.0, score.high))
                about = {"fusion": fusion, "factor": setting.factor, "norm": setting.norm, "when": when}
                found.append({**about, **asdict(score), "seeds": shares})
    return found


def _costs(study: FusionStudy) -> list[dict[str, Any]]:
    """At the size of the study, where all have about the same weights; and at that of towers, with one width of all."""
    width, d_out = study.wide
    small = [cost(name, study.d, size=size_for(name, study.d, study.weights)) for name in study.fusions]
    wide = [cost(name, width, size=d_out) for name in study.fusions]
    return [asdict(one) for one in (*small, *wide)]
