"""The pretrain stage without texts: a picture tower from scratch learns from changed views of pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from plait.assembly.pairs import read_pictures
from plait.assembly.views import ViewModel, ViewSizes, build_views, save_views
from plait.core import mesh
from plait.core.device import Compute, seed_everything, setup
from plait.core.events import Events
from plait.core.files import sha256_file, write_json, write_jsonl
from plait.core.held_out import opened
from plait.core.packages import home
from plait.core.types import Sample, Score
from plait.data.order import check_enough
from plait.data.pair_batches import StoredPixels
from plait.data.view_batches import ShardPictures, ViewBatches
from plait.evaluation.picture_neighbors import NeighborResult, NeighborTask, Shown, compare, neighbor_tasks, said
from plait.objectives.build import OfViews, over_views
from plait.objectives.specs import MoCo, OverViews
from plait.stages.fitting import fit_ahead
from plait.stages.pretrain import TESTS, Pretrain
from plait.stages.pretraining import outcome
from plait.stages.pretraining.validating import judge_views
from plait.stages.validating import check_judged, judged_splits
from plait.stages.validating import outcome as judged_outcome
from plait.stages.validating import said as said_judged
from plait.training.model_flops import view_flops
from plait.training.settings import FitResult, Hooks, Settings

_AT_ONCE = 32  # pictures that a tower encodes together: their activations, not their pixels, take the memory


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """What a run of the stage holds.

    Attributes:
        spec: How.
        data: Folder of the data stage.
        folder: Of this stage.
        events: Told what happens.
        built: What learns.
        samples: Of each split.
        pixels: Of all their pictures, unchanged.
        tasks: By which it is scored.
        before: What the untrained tower reached.
    """

    spec: Pretrain
    data: Path
    folder: Path
    events: Events
    built: ViewModel
    samples: Mapping[str, Sequence[Sample]]
    pixels: StoredPixels
    tasks: Sequence[NeighborTask]
    before: list[NeighborResult] = field(default_factory=list)

    def batches_of(self, split: str, batch_size: int, seed: int, *, rank: int = 0, world: int = 1) -> ViewBatches:
        """Batches of views of a split."""
        spec, listed = self.spec, self.samples[split]
        assert spec.views is not None
        assert isinstance(spec.objective, OverViews)
        ids = [sample.id for sample in listed]
        refs = [sample.media()[0] for sample in listed]
        contract = self.built.image.contract
        return ViewBatches(
            pictures=ShardPictures(self.data / "shards", split, refs=refs, ids=ids),
            ids=ids,
            classes=self._classes(listed) if spec.objective.knows_classes else None,
            prepare=contract.prepare,
            size=contract.size,
            changes=spec.views.changes,
            views=spec.views.number,
            batch_size=batch_size,
            seed=seed,
            micro_batch=spec.trainer.micro_batch,
            rank=rank,
            world=world,
        )

    @staticmethod
    def _classes(listed: Sequence[Sample]) -> list[int]:
        concepts = [concept_of(sample) for sample in listed]
        number = {concept: at for at, concept in enumerate(sorted(set(concepts)))}
        return [number[concept] for concept in concepts]

    def look(self, step: int) -> list[NeighborResult]:
        """Look up all test pictures, and show some of them."""
        vectors = _vectors(self.built.model, self.pixels)
        results = [task.evaluate(vectors) for task in self.tasks]
        outcome.show(self.folder, step, self.tasks, results=results, events=self.events, says="is nearest to one of")
        return results


def concept_of(sample: Sample) -> str:
    """What a picture shows; itself alone where nobody says."""
    return str(sample.meta.get("concept") or sample.id)


def learn_views(spec: Pretrain, data: Path, *, folder: Path, events: Events) -> dict[str, Any]:
    """Train, score, and say how it went.

    Args:
        spec: How.
        data: Folder of the data stage.
        folder: Of this stage.
        events: Told what happens.

    Returns:
        Summary for the seal.
    """
    compute = setup(device=spec.device, dtype="float32")
    run = _begin(spec, data, folder=folder, events=events, compute=compute)
    model, train = run.built.model, run.samples["train"]

    def look() -> None:
        run.before.extend(run.look(0))

    mesh.first(look)  # of several processes, the first one judges
    batches = run.batches_of("train", min(spec.batch_size, len(train)), spec.seed, rank=mesh.rank(), world=mesh.world())
    settings = spec.settings(
        compute,
        spec.steps_for(len(train)),
        towers=[run.built.image.key],
        data=sha256_file(data / "done.json"),
    )
    objective = over_views(spec.objective, model, width=spec.d_shared, seed=spec.seed)
    if isinstance(objective, nn.Module):
        objective.to(compute.device)
    outcome.say_pieces(model, batches.batch_size, batches.micro_batch, events=events, what="pictures")
    fitted = _fit(run, objective, batches, settings=settings)
    return mesh.first(partial(_summary, run, fitted, settings.steps))


def _begin(spec: Pretrain, data: Path, *, folder: Path, events: Events, compute: Compute) -> _Run:
    """Read what there is, and draw the tower."""
    assert not isinstance(spec.image_tower, str)
    assert spec.views is not None
    seed_everything(spec.seed)
    sizes = ViewSizes(d_hidden=spec.d_hidden, d_shared=spec.d_shared, layers=spec.views.layers, dropout=spec.dropout)
    built = build_views(spec.image_tower, sizes)
    built.model.to(compute.device)
    wanted = ("train", *judged_splits(spec.trainer), *opened(TESTS))
    samples, store = read_pictures(data / "shards", wanted, built.image, cache=home() / "features", events=events)
    check_judged(samples, spec.trainer, place=data)
    there = len(samples["train"])
    outcome.check_pairs(there, folder, what="training")
    check_enough(there, mesh.world(), what="training pictures", place=str(data), remedy="give the data stage more")
    weights = sum(weight.numel() for weight in built.model.tower.parameters() if weight.requires_grad)
    events.note(f"picture tower from scratch, by views alone: {spec.tower_name}, {weights:,} weights learn")
    if isinstance(spec.objective, MoCo) and not spec.objective.classes and spec.objective.queue >= there:
        events.warning(
            f"moco keeps {spec.objective.queue:,} keys of {there:,} training pictures: an older key of the same "
            "picture is a negative; set objective.queue lower, or objective.classes to true"
        )
    looked = [(split, one) for split, listed in samples.items() if split in ("train", *TESTS) for one in listed]
    shown = [
        Shown(
            id=one.id,
            split=split,
            concept=concept_of(one),
            name=one.answer("name.en") or one.id,
            uri=one.media()[0].uri,
        )
        for split, one in looked
    ]
    pixels = StoredPixels(
        store=store,
        sha256s=tuple(one.media()[0].sha256 for _, one in looked),
        device=torch.device(compute.device),
    )
    tasks = neighbor_tasks(shown, [split for split in TESTS if split in samples], seed=spec.seed)
    return _Run(
        spec=spec,
        data=data,
        folder=folder,
        events=events,
        built=built,
        samples=samples,
        pixels=pixels,
        tasks=tasks,
    )


def _fit(run: _Run, objective: OfViews, batches: ViewBatches, *, settings: Settings) -> FitResult:
    spec, built = run.spec, run.built
    shown = outcome.milestones(settings.steps)

    def on_step(step: int, _: Mapping[str, Any]) -> None:
        run.look(step)

    hooks = Hooks(
        save_model=lambda target: save_views(built, target),
        evaluate=judge_views(
            spec,
            built.model,
            objective,
            batches_of=run.batches_of,
            sizes={split: len(listed) for split, listed in run.samples.items()},
            compute=settings.compute,
        ),
        on_step=on_step,
        tells=shown.__contains__,
        task=spec.kind,
        flops=view_flops(built.model, share=2 / 3 if isinstance(spec.objective, MoCo) else 1.0),
    )
    built.model.train()
    return fit_ahead(
        built.model,
        objective,
        batches,
        workers=spec.trainer.workers,
        settings=settings,
        folder=run.folder,
        events=run.events,
        hooks=hooks,
    )


def _summary(run: _Run, fitted: FitResult, steps: int) -> dict[str, Any]:
    """Scores, also in files; what the seal keeps."""
    vectors = _vectors(run.built.model, run.pixels)
    after = [task.evaluate(vectors) for task in run.tasks]
    found = [compare(task, trained, raw) for task, trained, raw in zip(run.tasks, after, run.before, strict=True)]
    scores: list[Score] = [score for listed in found for score in listed]
    write_json(run.folder / "scores.json", [asdict(score) for score in scores])
    answers = [r for task, result in zip(run.tasks, after, strict=True) for r in task.answers(result)]
    write_jsonl(run.folder / "predictions.jsonl", answers)
    named = {score.name: score for score in scores}
    lines = [said(task, named) for task in run.tasks]
    lines = lines or ["no test picture has another one of its concept: nothing was scored"]
    judged = judged_outcome(run.folder, fitted, steps=steps)
    return {
        "lines": [said_judged(judged, what="pretrain"), *lines] if judged else lines,
        "checkpoint": str(fitted.checkpoint.relative_to(run.folder)),
        "steps": fitted.step,
        "skipped_steps": fitted.skipped,
        "pictures": {split: len(listed) for split, listed in run.samples.items()},
        **({"validation": judged} if judged else {}),
        "nearest_at_1": {task.name: named[f"neighbors/{task.name}/R@1"].value for task in run.tasks},
    }


@torch.no_grad()
def _vectors(model: Any, pixels: StoredPixels) -> Float[np.ndarray, "picture d"]:
    """Unit vectors of all pictures in front of the head, in float64; the model's mode is put back."""
    training = model.training
    model.eval()
    parts = [
        model.embed_image(pixels(range(at, min(at + _AT_ONCE, len(pixels))))) for at in range(0, len(pixels), _AT_ONCE)
    ]
    model.train(training)
    return torch.cat(parts).double().cpu().numpy()
