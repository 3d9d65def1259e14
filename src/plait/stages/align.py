"""The align stage: direct preference optimization of the tuned model's adapter, right answers against wrong ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from plait.core.errors import DataError
from plait.core.estimate import Estimate, Machine
from plait.core.events import Events
from plait.core.packages import home
from plait.core.spec import defaults
from plait.core.yamltext import Keys
from plait.data.choice import HELD_OUT
from plait.data.sources import JUDGED_SEED, VALIDATION
from plait.stages.fitting import fit_ahead
from plait.stages.stage import Stage, Task, named_setting
from plait.stages.validating import check_judged, judged_splits, outcome, said
from plait.training.schedule import Cosine
from plait.training.trainer import Trainer

if TYPE_CHECKING:
    from plait.assembly.multimodal import Multimodal
    from plait.assembly.questions import Questions
    from plait.core.device import Compute
    from plait.core.types import Sample, Score
    from plait.data.preference_batches import PreferenceBatches
    from plait.objectives.preference import DirectPreference
    from plait.training.settings import FitResult, Settings
    from plait.training.validate import Validation

REFERENCE = "reference.json"
"""Log-probabilities under the model that training starts from, in the stage's folder."""

_SHOWN = 6  # held-out questions whose answers are kept before and after
_SHOWN_TOKENS = 12


class Align(Stage):
    """Prefer the right answer to a plausible wrong one: DPO on the adapter of the newest model before this stage.

    The reference is that model itself. Its log-probabilities are computed once, before the first step, over the very
    batches that then train, and kept in ``reference.json``: no second model is held, and the margin at step 0 is 0.
    Writes ``metrics.jsonl``, ``results.csv``, ``samples/<step>.json``, ``checkpoints/<step>/`` and ``scores.json``.

    Example:
        >>> Align(beta=0.2).batch_size
        16
    """

    together: ClassVar[bool] = True
    moved: ClassVar[Mapping[str, Keys]] = {"warmup": ("trainer", "schedule", "warmup")}
    # The checker cannot know that specs are frozen, so that narrowing a field is safe.
    kind: Literal["align"] = "align"  # pyright: ignore[reportIncompatibleVariableOverride]
    """Which stage this is."""
    tasks: tuple[Task, ...] = Field(default=("yesno", "name.en"), min_length=1)
    """Questions whose answers are compared, as many of each as there are; those without a wrong answer are left out.
    Yes/no questions have been seen to teach a liking for no (docs/results.md); the shipped recipes leave them out."""
    max_pairs: int | None = Field(default=None, ge=1)
    """Most pairs to learn from; by default what the steps need. Fewer are gone through again."""
    beta: float = Field(default=0.1, gt=0.0)
    """How strongly the model is held to where it began."""
    lr: float = Field(default=1e-4, gt=0.0)
    """Peak learning rate."""
    trainer: Trainer = Trainer(schedule=Cosine(warmup=0.1))
    """Optimizer, schedule and what else is common to all training."""
    steps: int = Field(default=12, ge=1)
    """Updates in all."""
    batch_size: int = Field(default=16, ge=1)
    """Pairs in a step."""
    row: int = Field(default=0, ge=0)
    """Tokens a packed row holds; 0 weighs padding against longer attention
    (:func:`plait.data.packing.row_length`)."""
    connector: bool = False
    """Train the connector, too."""
    test_split: Literal["test-concept", "test-style", "test-both"] = "test-style"
    """Split whose pairs are scored before and after; where it is missing, another held-out one is."""
    test_pairs: int = Field(default=64, ge=1)
    """Most pairs that are scored."""
    save_every: int = Field(default=0, ge=0)
    """Steps between checkpoints; 0 saves only the last step."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where the model is trained: `auto`, `cpu`, `cuda` or `mps`."""

    @model_validator(mode="after")
    def _whole(self) -> Align:
        self.trainer.check_whole(stage="the align stage")
        if self.trainer.parallel.expert > 1:
            raise ValueError("trainer.parallel.expert: align does not divide experts between processes; take it out")
        if self.trainer.parallel.context > 1:
            raise ValueError(
                f"trainer.parallel.context is {self.trainer.parallel.context}: this loss compares whole answers, and "
                "each process would have a part of them; set it to 1"
            )
        return self

    def run(self, previous: Path | None, folder: Path, *, events: Events) -> Path:
        """Do the work; see :meth:`plait.stages.stage.Stage.run`.

        Raises:
            DataError: There is no data stage or no model before this one, the model has no adapter, or no question has
                a wrong answer.
            CheckpointError: The model is damaged.
            ResourceError: A package is not fetched, or the disk is full.
            NumericsError: Training went wrong.
        """
        import torch

        from plait.assembly.local import fingerprint
        from plait.assembly.multimodal import load_multimodal
        from plait.core import mesh
        from plait.core.device import setup
        from plait.core.files import find_model, find_stage, mark_done, seal, write_json
        from plait.objectives.preference import DirectPreference
        from plait.stages.aligning.outcome import lines
        from plait.stages.aligning.validating import judge_pairs, judged_pairs

        data, tuned = find_stage(previous, "data"), find_model(previous)
        built = load_multimodal(tuned, events=events)
        # A model that was tuned in float32 is aligned in float32.
        compute = setup(device=self.device, dtype="float32" if built.language.model.dtype == torch.float32 else "auto")
        questions, without = self._questions(built, data / "shards", events)
        check_judged(questions.samples, self.trainer, place=data)
        self._unfreeze(built, place=tuned)
        built.model.to(compute.device)
        built.model.fused = self.trainer.head == "fused"  # the reference, too
        rank, world = self.trainer.parallel.grid(mesh.rank(), mesh.world()).share
        batches = {
            split: self.batches(built, questions, samples, rank=rank, world=world)
            for split, samples in questions.samples.items()
            if samples and split != VALIDATION
        }
        judged = judged_pairs(self, built, questions)
        origin = {"model": fingerprint(tuned), "data": seal(data), "row": batches["train"].row}
        settings = self._settings(compute, origin)
        reference = self._reference(built, batches, settings, held=judged.get(VALIDATION), folder=folder, events=events)
        objective = DirectPreference(reference, beta=self.beta)
        fitted = self._fit(
            built,
            questions,
            batches["train"],
            objective=objective,
            evaluate=judge_pairs(built.model, judged, objective, settings=settings),
            settings=settings,
            folder=folder,
            events=events,
        )
        scores = self._scores(built, questions, batches, reference=reference, compute=compute)
        mesh.first(lambda: write_json(folder / "scores.json", [asdict(score) for score in scores]))
        pairs = {split: len(samples) for split, samples in questions.samples.items()}
        validation = outcome(folder, fitted, steps=self.steps)
        summary = {
            "lines": [
                *lines(self, fitted, scores, pairs=pairs),
                *([said(validation, what=self.kind)] if validation else []),
            ],
            "model": str(fitted.checkpoint.relative_to(folder)),
            "steps": fitted.step,
            "skipped_steps": fitted.skipped,
            "pairs": pairs,
            "without_wrong_answer": without,
            "reference": origin["model"],
            **({"validation": validation} if validation else {}),
        }
        for line in summary["lines"]:
            events.note(line)
        mark_done(folder, kind=self.kind, previous=previous, summary=summary)
        return folder

    def dealt(self) -> Mapping[str, int]:
        """Pairs a step; see :meth:`plait.stages.stage.Stage.dealt`."""
        return {"batch_size": self.batch_size}

    def shares(self, processes: int, *, setting: str = "") -> int:
        """See :meth:`plait.stages.stage.Stage.shares`."""
        return self.trainer.parallel.grid(0, processes).data

    def check(self, machine: Machine) -> None:
        """See that the device is here; see :meth:`plait.stages.stage.Stage.check`."""
        if self.device not in ("auto", "cpu", machine.device):
            from plait.core.device import choose_device  # imports torch

            with named_setting(f"stages.{self.kind}.device"):
                choose_device(self.device)

    def estimate(self, machine: Machine, before: Mapping[str, Estimate]) -> Estimate:
        """What the stage will need; see :meth:`plait.stages.stage.Stage.estimate`."""
        from plait.stages.aligning.needs import estimate

        return estimate(self, machine, before, pairs=self._pairs())

    # --- inside ----------------------------------------------------------------------------------------------------

    def _pairs(self) -> int:
        """Most pairs that are learned from."""
        all_steps = self.steps * self.batch_size
        return min(all_steps, self.max_pairs or all_steps)

    def _limit(self, split: str) -> int:
        """Most pairs of a split."""
        if split == VALIDATION and self.trainer.validation:
            return self.trainer.validation.samples
        return self._pairs() if split == "train" else self.test_pairs

    def _questions(self, built: Multimodal, shards: Path, events: Events) -> tuple[Questions, int]:
        """Questions that have both answers, of the training split and the scored one; how many have no wrong one."""
        from plait.assembly.questions import read_questions
        from plait.assembly.splits import PREFIX, splits_of
        from plait.core.held_out import opened
        from plait.data.choice import held_out, spread
        from plait.data.preference_batches import questions_with_both

        there = splits_of(shards, prefix=PREFIX)
        test = held_out(opened(there), self.test_split)
        if test != self.test_split and opened(there) == tuple(there):
            instead = f"those of {test} are scored" if test else "nothing is scored"
            events.note(f"there are no questions of {self.test_split}: {instead}")
        missing: dict[str, int] = {}

        def choose(split: str, samples: Sequence[Sample]) -> Sequence[Sample]:
            found, missing[split] = questions_with_both(samples, self.tasks)
            if split == "train" and not found:
                raise DataError(
                    f"no question of 'train' is left: {missing[split]:,} of the tasks {', '.join(self.tasks)} have a "
                    "right answer, none has a wrong one",
                    place=str(shards),
                    remedy="ask for tasks that have wrong answers, give the pictures texts that differ more, or do "
                    f"without the stage: stages.{self.kind}=null",
                )
            limit = self._limit(split)
            chosen = spread(found, self.tasks, limit=limit, seed=JUDGED_SEED if split == VALIDATION else self.seed)
            events.note(
                f"{split}: {len(chosen):,} of {len(found):,} questions with a right and a wrong answer; "
                f"{missing[split]:,} have no wrong one"
            )
            return chosen

        questions = read_questions(
            shards,
            ("train", *([test] if test else []), *judged_splits(self.trainer)),
            built.image,
            choose=choose,
            cache=home() / "features",
            events=events,
            audio=built.audio,
        )
        return questions, sum(missing.values())

    def _unfreeze(self, built: Multimodal, *, place: Path) -> None:
        from plait.assembly.multimodal import holds_media
        from plait.training.precision import hold_masters

        if built.lora is None:
            raise DataError(
                "the model has no adapter to train: it is compressed, or was tuned without one",
                place=str(place),
                remedy="put 'align' right after a 'tune' stage with LoRA, before 'compress'",
            )
        for name, weight in built.model.named_parameters():
            weight.requires_grad_("lora_" in name or (self.connector and holds_media(name)))
        # The reference is computed in the very numbers that train.
        hold_masters(weight for weight in built.model.parameters() if weight.requires_grad)

    def batches(
        self, built: Multimodal, questions: Questions, samples: Sequence[Sample], *, rank: int, world: int
    ) -> PreferenceBatches:
        """Pairs of right and wrong answers, those of one of several processes."""
        from plait.data.conversations import tabled
        from plait.data.preference_batches import PreferenceBatches, PreferencePair

        template = built.template
        return PreferenceBatches(
            [PreferencePair.of(sample, template) for sample in samples],
            features=questions.features,
            grid_out=tabled(
                built.accounts,
                [*questions.stores, *questions.others.values()],
                [ref for sample in samples for ref in sample.media()],
            ),
            batch_size=self.batch_size,
            row=self.row,
            pad=built.stop,
            rank=rank,
            world=world,
        )

    def _reference(
        self,
        built: Multimodal,
        batches: Mapping[str, PreferenceBatches],
        settings: Settings,
        *,
        held: PreferenceBatches | None,
        folder: Path,
        events: Events,
    ) -> dict[str, float]:
        """Log-probability of every answer before the first step: from the folder, or computed and kept there."""
        from plait.core import mesh
        from plait.core.files import read_json, write_json
        from plait.stages.aligning.logprobs import logprobs_of

        path, key = folder / REFERENCE, dict(settings.context) | {"dtype": settings.compute.dtype}
        parts = [*batches.values(), *([held] if held else [])]
        own = {name for part in parts for pairs in part.parts for p in pairs for name, _ in p.answers()}
        needed = {name for names in mesh.gather(own) for name in names}

        def read() -> dict[str, float]:
            kept = read_json(path) if path.is_file() else {}
            return kept["logprobs"] if kept and kept["key"] == key and kept["logprobs"].keys() == needed else {}

        if found := mesh.first(read):
            return found
        for part in batches.values():
            found |= logprobs_of(built, part, settings.compute)
            events.progress("reference", len(found), len(needed))
        if held:  # judged by the first process alone, so over the same tensors
            found |= mesh.first(lambda: logprobs_of(built, held, settings.compute))
        mesh.first(lambda: write_json(path, {"key": key, "logprobs": found}))
        return found

    def _fit(
        self,
        built: Multimodal,
        questions: Questions,
        batches: PreferenceBatches,
        *,
        objective: DirectPreference,
        evaluate: Validation | None,
        settings: Settings,
        folder: Path,
        events: Events,
    ) -> FitResult:
        from plait.assembly.multimodal import save_multimodal
        from plait.core import mesh
        from plait.evaluation.asking import show_answers
        from plait.inference.build import build_engine
        from plait.stages.pretraining.outcome import milestones
        from plait.training.model_flops import multimodal_flops
        from plait.training.settings import Hooks

        tests = {split: samples for split, samples in questions.samples.items() if split in HELD_OUT}
        shown = {split: samples[:_SHOWN] for split, samples in tests.items()}

        def show(step: int) -> None:
            built.model.eval()
            show_answers(
                build_engine(built, questions.features),
                shown,
                step=step,
                phase=self.kind,
                longest=_SHOWN_TOKENS,
                folder=folder,
                events=events,
            )

        def on_step(step: int, _: Mapping[str, Any]) -> None:
            show(step)

        mesh.first(lambda: show(0))
        hooks = Hooks(
            save_model=lambda target: save_multimodal(built, target),
            evaluate=evaluate,
            on_step=on_step,
            tells=milestones(settings.steps).__contains__,
            task=self.kind,
            tokenizer=built.language.tokenizer,
            flops=multimodal_flops(built.model),
        )
        # The loop asks for training mode. No part is in it, only the whole: dropout stays off, as in the reference.
        built.model.eval()
        built.model.training = True
        fitted = fit_ahead(
            built.model,
            objective,
            batches,
            workers=self.trainer.workers,
            settings=settings,
            folder=folder,
            events=events,
            hooks=hooks,
        )
        if fitted.step < settings.steps:  # stopped early
            mesh.first(lambda: show(fitted.step))
        return fitted

    def _scores(
        self,
        built: Multimodal,
        questions: Questions,
        batches: Mapping[str, PreferenceBatches],
        *,
        reference: Mapping[str, float],
        compute: Compute,
    ) -> list[Score]:
        """How often the right answer is the likelier one, before and after, over all pairs and by task."""
        from plait.evaluation.preferences import Preferred, score_preferences
        from plait.stages.aligning.logprobs import logprobs_of

        test = next((split for split in batches if split != "train"), None)
        if test is None:
            return []
        after = logprobs_of(built, batches[test], compute)

        def gap(logprobs: Mapping[str, float], sample: Sample) -> float:
            return logprobs[f"{sample.id}#chosen"] - logprobs[f"{sample.id}#rejected"]

        pairs = [
            Preferred(
                task=str(sample.meta["task"]),
                group=" ".join(sorted(map(str, sample.meta["concepts"]))),
                before=gap(reference, sample),
                after=gap(after, sample),
            )
            for sample in questions.samples[test]
        ]
        return score_preferences(pairs, split=test, beta=self.beta)

    def _settings(self, compute: Compute, origin: Mapping[str, Any]) -> Settings:
        from plait.objectives.preference import DirectPreference
        from plait.training.settings import Settings

        # How long to train and how often to save may change when a run is resumed; the loop sees to them itself, and
        # records what the trainer says.
        mutable = {"steps", "save_every", "device", "test_split", "test_pairs", "trainer"}
        context = self.model_dump(mode="json", exclude=mutable)
        context |= {"warmup": self.trainer.schedule.warmup}  # under this name older runs recorded it
        return Settings(
            steps=self.steps,
            compute=compute,
            seed=self.seed,
            weights=dict.fromkeys(DirectPreference.REPORTED, 0.0),
            save_every=self.save_every,
            context={**context, **origin},
            context_defaults=defaults(self),
        ).with_trainer(self.trainer, lr=self.lr)
