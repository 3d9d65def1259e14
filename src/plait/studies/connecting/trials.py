"""Every seed's decoder and tower, every connector between them at every rate, and the scores of all of them."""

from __future__ import annotations

import math
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from plait.assembly.towers import scratch_tower
from plait.core.events import Events
from plait.evaluation.statistics import seeds_score
from plait.studies.connecting import scenes, training
from plait.studies.connecting.claims import claims, differences
from plait.studies.connecting.costs import costs, prefill_ms
from plait.studies.connecting.parts import (
    PREPARED,
    draws,
    fingerprint,
    learning,
    make_batch,
    make_model,
    make_tower,
    reader,
    save_language,
    tokenizer_folder,
    tower_spec,
)
from plait.studies.connecting.scenes import Question, Scene
from plait.studies.connecting.training import KINDS
from plait.studies.connectors import Arm, ConnectorStudy, Kind
from plait.studies.workers import finished, one_thread

_T = TypeVar("_T")
Use = Literal["tune", "test"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What came of a decoder or a tower before it was frozen.

    Attributes:
        part: Which.
        seed: Its seed.
        loss: Mean of the last tenth of its steps.
        cpu_s: Processor seconds it took.
        right: Share of right answers by kind of question; of a decoder from words, of a tower by cell.
    """

    part: Literal["language", "sight"]
    seed: int
    loss: float
    cpu_s: float
    right: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One training of a connector.

    Attributes:
        arm: Which.
        lr: Peak learning rate.
        seed: Of decoder, tower, scenes, questions and weights.
    """

    arm: Arm
    lr: float
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a connector.

    Attributes:
        job: Which training.
        loss: Mean of the last tenth of the steps.
        cpu_s: Processor seconds it took.
        trainable: Weights that learned.
        tuned: Mean share of right answers over kinds, to questions that choose the rate.
        right: Share of right answers by kind.
        blank: Likewise with the picture of nothing.
        same_decoder: Whether every byte of the decoder is as it was.
        same_tower: Likewise of the tower.
        same_text: Whether scores without a picture equal those of the decoder alone, bit for bit.
    """

    job: Job
    loss: float
    cpu_s: float
    trainable: int
    tuned: float
    right: Mapping[Kind, float]
    blank: Mapping[Kind, float]
    same_decoder: bool
    same_tower: bool
    same_text: bool


def _alone(call: Any, *given: Any) -> Any:
    """With one thread of torch, so that a training is the same in any process."""
    with one_thread():
        return call(*given)


def prepare(study: ConnectorStudy, folder: Path, work: tuple[Literal["language", "sight"], int]) -> Prepared:
    """Train a decoder or a tower, and write it into the folder."""
    part, seed = work
    return _alone(_language if part == "language" else _sight, study, folder / f"{part}-{seed}", seed)


def _language(study: ConnectorStudy, folder: Path, seed: int) -> Prepared:
    begun, settings = time.process_time(), study.language
    torch.manual_seed(seed)
    model, language = reader(settings, tokenizer_folder(folder / "words"))
    loss = training.train_language(model, settings, draws("language", seed), batch=study.batch)
    right = {
        kind: training.share_right(
            model, [(training.in_words(scene), [q]) for scene, q in _exam(study, "test", kind, seed=seed)], None
        )
        for kind in KINDS
    }
    save_language(language, folder / "trained")
    return Prepared(
        part="language",
        seed=seed,
        loss=loss,
        cpu_s=time.process_time() - begun,
        right={str(kind): share for kind, share in right.items()},
    )


def _sight(study: ConnectorStudy, folder: Path, seed: int) -> Prepared:
    begun, settings = time.process_time(), study.sight
    torch.manual_seed(seed)
    tower = scratch_tower(tower_spec(settings)).encoder
    assert isinstance(tower, nn.Module)
    head, loss = training.train_tower(tower, settings, draws("sight", seed), batch=study.batch)
    tower.eval().requires_grad_(requires_grad=False)
    rng = draws("pool", seed)
    pool = [scenes.draw_scene(rng) for _ in range(study.pool)]
    fresh = [scene for scene, _ in _exam(study, "test", "count", seed=seed)]
    with torch.inference_mode():
        guess = head(training.features_of(tower, fresh, seed=seed))[..., : scenes.CLASSES].argmax(-1)
    told = {"cells": float((guess == scenes.labels(fresh)).double().mean())}
    features = {
        "pool": training.features_of(tower, pool, seed=draws("pixels", seed).getrandbits(32)),
        "blank": training.features_of(tower, [(None,) * scenes.SIDE**2], seed=seed),
    }
    for use in ("tune", "test"):
        for kind in KINDS:
            drawn = [scene for scene, _ in _exam(study, use, kind, seed=seed)]
            key = draws("pixels", use, kind, seed).getrandbits(32)
            features[f"{use}-{kind}"] = training.features_of(tower, drawn, seed=key)
    folder.mkdir(parents=True)
    torch.save({"weights": tower.state_dict(), "features": features}, folder / PREPARED)
    return Prepared(part="sight", seed=seed, loss=loss, cpu_s=time.process_time() - begun, right=told)


def trial(study: ConnectorStudy, folder: Path, job: Job) -> Outcome:
    """Train a connector between the frozen parts of its seed, and ask."""
    return _alone(_trial, study, folder, job)


def _trial(study: ConnectorStudy, folder: Path, job: Job) -> Outcome:
    begun, seed = time.process_time(), job.seed
    kept = torch.load(folder / f"sight-{seed}" / PREPARED, weights_only=True)
    features = kept["features"]
    rng = draws("pool", seed)
    pool = [scenes.draw_scene(rng) for _ in range(study.pool)]
    torch.manual_seed(seed)
    tower = make_tower(study.sight, kept["weights"])
    built = make_model(job.arm, tower, folder / f"language-{seed}" / "trained")
    model = built.model
    before = [fingerprint(part) for part in (model.decoder, model.encoders)]
    alone = _text_scores(make_model("linear", tower, folder / f"language-{seed}" / "trained").model, seed)
    loss = training.train_connector(model, (pool, features["pool"]), study, rng=draws("questions", seed), lr=job.lr)
    model.eval()
    slots = training.slots_of(model)

    def asked(use: Use, kind: Kind, seen: torch.Tensor) -> float:
        return training.share_right(model, [(slots, [q]) for _, q in _exam(study, use, kind, seed=seed)], seen)

    after = [fingerprint(part) for part in (model.decoder, model.encoders)]
    tuned = [asked("tune", kind, features[f"tune-{kind}"]) for kind in KINDS]
    blank = features["blank"].expand(study.rows, -1, -1)
    return Outcome(
        job=job,
        loss=loss,
        trainable=sum(weight.numel() for weight in learning(model).values()),
        tuned=math.fsum(tuned) / len(tuned),
        right={kind: asked("test", kind, features[f"test-{kind}"]) for kind in KINDS},
        blank={kind: asked("test", kind, blank) for kind in KINDS},
        same_decoder=before[0] == after[0],
        same_tower=before[1] == after[1],
        same_text=torch.equal(alone, _text_scores(model, seed)),
        cpu_s=time.process_time() - begun,
    )


@torch.inference_mode()
def _text_scores(model: Any, seed: int) -> torch.Tensor:
    """Of scenes in words, without a picture."""
    rng = draws("text", seed)
    drawn = [scenes.draw_scene(rng) for _ in range(16)]
    rows = [(training.in_words(scene), training.several(scene, 4, rng)) for scene in drawn]
    return model.eval()(make_batch(rows)).logits


def _exam(study: ConnectorStudy, use: Use, kind: Kind, *, seed: int) -> list[tuple[Scene, Question]]:
    return training.exam(draws(use, kind, seed), kind, study.rows)


def collect(study: ConnectorStudy, *, events: Events) -> dict[str, Any]:
    """All trainings, scored: plain data."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="plait-connectors-") as name:
        folder = Path(name)
        parts: list[tuple[Literal["language", "sight"], int]] = [
            (part, seed) for part in ("language", "sight") for seed in range(study.seeds)
        ]
        prepared = list(finished(partial(prepare, study, folder), parts, workers=study.workers, events=events))
        tries = [Job(arm=arm, lr=lr, seed=0) for arm in study.arms for lr in study.lrs]
        done = _trained(study, folder, tries, events=events)
        best: dict[Arm, float] = {
            arm: max(study.lrs, key=lambda lr: done[Job(arm=arm, lr=lr, seed=0)].tuned) for arm in study.arms
        }
        rest = [Job(arm=arm, lr=best[arm], seed=seed) for seed in range(1, study.seeds) for arm in study.arms]
        done |= _trained(study, folder, rest, events=events)
        times = _alone(prefill_ms, study, folder)
    chosen: dict[Arm, list[Outcome]] = {
        arm: [done[Job(arm=arm, lr=best[arm], seed=seed)] for seed in range(study.seeds)] for arm in study.arms
    }
    for arm, outcomes in chosen.items():
        for outcome in outcomes:
            if not math.isfinite(outcome.loss):
                events.warning(f"{arm} diverged with seed {outcome.job.seed}: its answers count as they are")
    scores = _scores(study, chosen)
    rates = [
        {"arm": job.arm, "lr": job.lr, "tuned": done[job].tuned, "chosen": job.lr == best[job.arm]} for job in tries
    ]
    counted = costs(study)
    compared, unchanged = differences(scores), _unchanged(done.values())
    return {
        "study": study.name,
        "spec": study.model_dump(mode="json"),
        "costs": counted,
        "prefill_ms": times,
        "prepared": [asdict(one) for one in sorted(prepared, key=lambda one: (one.part, one.seed))],
        "rates": rates,
        "scores": scores,
        "baselines": _baselines(study, prepared),
        "unchanged": unchanged,
        "differences": compared,
        "claims": claims(study, costs=counted, compared=compared, unchanged=unchanged),
        "trained": len(prepared) + len(done),
        "seconds": round(time.monotonic() - begun, 1),
        "cpu_seconds": round(sum(one.cpu_s for one in (*prepared, *done.values())), 1),
        "torch": str(torch.__version__),
    }


def _trained(study: ConnectorStudy, folder: Path, jobs: Sequence[Job], *, events: Events) -> dict[Job, Outcome]:
    found = finished(partial(trial, study, folder), jobs, workers=study.workers, events=events)
    return {outcome.job: outcome for outcome in found}


def _unchanged(done: Any) -> dict[str, int]:
    """How many trainings left what was frozen as it was."""
    outcomes = list(done)
    names = ("same_decoder", "same_tower", "same_text")
    return {"trainings": len(outcomes)} | {name: sum(getattr(o, name) for o in outcomes) for name in names}


def _scores(study: ConnectorStudy, chosen: Mapping[Arm, Sequence[Outcome]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for arm, outcomes in chosen.items():
        for seen in ("right", "blank"):
            by_kind: dict[str, list[float]] = {kind: [getattr(o, seen)[kind] for o in outcomes] for kind in KINDS}
            by_kind["mean"] = [math.fsum(shares) / len(KINDS) for shares in zip(*by_kind.values(), strict=True)]
            for kind, shares in by_kind.items():
                n = study.rows * study.seeds * (len(KINDS) if kind == "mean" else 1)
                score = seeds_score(shares, name=f"{arm}/{kind}", rule="accuracy", n=n)
                about = {"arm": arm, "kind": kind, "picture": seen == "right", "trainable": outcomes[0].trainable}
                found.append({**about, **asdict(score), "seeds": shares})
    return found


def _baselines(study: ConnectorStudy, prepared: Sequence[Prepared]) -> list[dict[str, Any]]:
    """The best constant answer to the test questions, and the decoder's answers to the same scenes in words."""
    found: list[dict[str, Any]] = []
    words = {one.seed: one.right for one in prepared if one.part == "language"}
    for kind in KINDS:
        shares: list[float] = []
        for seed in range(study.seeds):
            answers = Counter(question.answer for _, question in _exam(study, "test", kind, seed=seed))
            shares.append(max(answers.values()) / study.rows)
        told = [words[seed][kind] for seed in range(study.seeds)]
        for name, values in (("constant", shares), ("words", told)):
            score = seeds_score(values, name=f"{name}/{kind}", rule="accuracy", n=study.rows * study.seeds)
            found.append({"baseline": name, "kind": kind, **asdict(score), "seeds": values})
    return found
