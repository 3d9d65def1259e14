"""The pretrain stage as BLIP-2's first: a Q-Former learns on a frozen tower's features to compare, judge and write."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from plait.assembly.pairs import Texts, read_pictures
from plait.assembly.queries import QueryModel, Sizes, build_queries, load_tokens, save_queries
from plait.assembly.towers import load_image_tower
from plait.core import mesh
from plait.core.device import seed_everything, setup
from plait.core.events import Events
from plait.core.files import sha256_file, write_json, write_jsonl
from plait.core.held_out import opened
from plait.core.packages import home
from plait.core.types import Score
from plait.data.caption_batches import CaptionBatches
from plait.evaluation.picture_names import RetrievalResult, compare
from plait.evaluation.query_names import QueryTask
from plait.models.blip2 import Blip2Stage1
from plait.models.specs import QFormerShape
from plait.objectives.matching import QueryTasks
from plait.stages.fitting import fit_ahead
from plait.stages.pretrain import TESTS, Pretrain
from plait.stages.pretraining.outcome import SHOWN, check_pairs, milestones, show, summarize
from plait.stages.pretraining.validating import judge_queries
from plait.stages.validating import check_judged, judged_splits
from plait.training.settings import FitResult, Hooks, Settings
from plait.training.validate import Validation


def learn_queries(spec: Pretrain, shape: QFormerShape, data: Path, *, folder: Path, events: Events) -> dict[str, Any]:
    """Train, score, and say how it went.

    Args:
        spec: How.
        shape: Sizes of the Q-Former.
        data: Folder of the data stage.
        folder: Of this stage.
        events: Told what happens.

    Returns:
        Summary for the seal.
    """
    compute = setup(device=spec.device, dtype="float32")
    assert isinstance(spec.image_tower, str)
    assert isinstance(spec.text_tower, str)
    image = load_image_tower(spec.image_tower, size=spec.resolution, dtype=spec.tower_dtype, events=events)
    words = load_tokens(spec.text_tower)
    wanted = ("train", *judged_splits(spec.trainer), *opened(TESTS))
    samples, store = read_pictures(data / "shards", wanted, image, cache=home() / "features", events=events)
    check_judged(samples, spec.trainer, place=data)
    splits = {name: Texts.of(found, keywords=spec.keywords and name == "train") for name, found in samples.items()}
    for found in splits.values():
        found.check_lengths([len(ids) for ids in words.ids(found.texts)], most=spec.max_tokens)
    train = splits["train"]
    check_pairs(len(train.ids), folder)
    seed_everything(spec.seed)
    sizes = Sizes(shape=shape, d_shared=spec.d_shared, max_tokens=spec.max_tokens)
    built = build_queries(image, words, sizes, scale=spec.scale)
    built.model.to(compute.device)
    learning = sum(weight.numel() for weight in built.model.parameters() if weight.requires_grad)
    events.note(f"Q-Former with {shape.queries} queries on {spec.tower_name}: {learning:,} weights learn")

    tasks = [
        QueryTask(found, store, words, name=name, seed=spec.seed) for name, found in splits.items() if name in TESTS
    ]
    before: list[RetrievalResult] = []

    def look() -> None:
        before.extend(_look(built.model, tasks, folder, step=0, events=events))

    mesh.first(look)  # of several processes, the first one judges
    batches = CaptionBatches(
        store=store,
        sha256s=train.sha256s,
        texts=words.ids(train.texts),
        texts_of=train.texts_of,
        ids=train.ids,
        batch_size=min(spec.batch_size, len(train.ids)),
        seed=spec.seed,
        pad=words.pad,
        rank=mesh.rank(),
        world=mesh.world(),
    )
    towers = [image.key, sha256_file(data / "done.json")]
    settings = spec.settings(compute, spec.steps_for(len(train.ids)), towers=towers[:1], data=towers[1])
    objective = QueryTasks(seed=spec.seed, classes=dict(zip(train.ids, train.classes, strict=True)))
    fitted = _fit(
        built,
        objective,
        batches,
        settings=settings,
        hooks=_hooks(
            built,
            tasks,
            evaluate=judge_queries(spec, built, splits, store=store, words=words, compute=compute),
            steps=settings.steps,
            folder=folder,
            events=events,
        ),
        workers=spec.trainer.workers,
        folder=folder,
        events=events,
    )
    counts = {name: len(found.ids) for name, found in splits.items()}
    result = partial(summarize, fitted, pairs=counts, folder=folder, steps=settings.steps)
    return mesh.first(lambda: result(_score(built, tasks, before, folder=folder)))


def _hooks(
    built: QueryModel,
    tasks: Sequence[QueryTask],
    *,
    evaluate: Validation | None,
    steps: int,
    folder: Path,
    events: Events,
) -> Hooks:
    """What is saved, judged and shown while training."""

    def on_step(step: int, _: Mapping[str, Any]) -> None:
        _look(built.model, tasks, folder, step=step, events=events)

    return Hooks(
        save_model=lambda target: save_queries(built, target),
        evaluate=evaluate,
        on_step=on_step,
        tells=milestones(steps).__contains__,
        task="pretrain",
    )


def _fit(
    built: QueryModel,
    objective: QueryTasks,
    batches: CaptionBatches,
    *,
    settings: Settings,
    hooks: Hooks,
    workers: int,
    folder: Path,
    events: Events,
) -> FitResult:
    built.model.train()
    built.model.tower.eval()
    return fit_ahead(
        built.model,
        objective,
        batches,
        workers=workers,
        settings=settings,
        folder=folder,
        events=events,
        hooks=hooks,
    )


def _look(
    model: Blip2Stage1, tasks: Sequence[QueryTask], folder: Path, *, step: int, events: Events
) -> list[RetrievalResult]:
    """Retrieval on every split, and what is shown of it."""
    with _still(model):
        results = [task.evaluate(model) for task in tasks]
        written = [task.write(model, limit=SHOWN) for task in tasks]
    show(folder, step, tasks, results=results, written=written, events=events)
    return results


def _score(
    built: QueryModel,
    tasks: Sequence[QueryTask],
    before: Sequence[RetrievalResult],
    *,
    folder: Path,
) -> list[Score]:
    """Of all tests, also in files."""
    with _still(built.model):
        after = [task.evaluate(built.model) for task in tasks]
        scores = [
            score
            for task, trained, raw in zip(tasks, after, before, strict=True)
            for score in (*compare(task, trained, raw), *task.further_scores(built.model, trained))
        ]
    write_json(folder / "scores.json", [asdict(score) for score in scores])
    write_jsonl(
        folder / "predictions.jsonl",
        [r for task, result in zip(tasks, after, strict=True) for r in task.answers(result)],
    )
    return scores


@contextmanager
def _still(model: Blip2Stage1) -> Iterator[None]:
    """Without dropout; every part's mode is put back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
