"""The phases of the tune stage: connector to words, connector through the decoder, adapter or decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from plait.adapters.lora import Lora, attach, cast_inputs, check_targets
from plait.assembly.audio_towers import load_audio_tower
from plait.assembly.language import language_of
from plait.assembly.multimodal import Tower, build_multimodal, holds_media, save_multimodal
from plait.assembly.queries import start_connector
from plait.assembly.questions import Questions, read_questions
from plait.assembly.splits import PREFIX, splits_of
from plait.assembly.towers import ImageTower, load_image_tower
from plait.core import mesh
from plait.core.device import Compute, seed_everything, setup
from plait.core.errors import ConfigError
from plait.core.events import Events
from plait.core.files import read_jsonl, sha256_file
from plait.core.held_out import opened
from plait.core.packages import home
from plait.core.protocols import Batches, Objective
from plait.core.spec import defaults
from plait.core.types import Modality, Sample
from plait.data.augment.feature_dropout import FeatureDropout
from plait.data.augment.views import View
from plait.data.choice import HELD_OUT, spread
from plait.data.conversations import Conversation, ConversationBatches, check_lengths
from plait.data.packing import row_length
from plait.data.sources import VALIDATION
from plait.data.word_batches import WordBatches
from plait.evaluation.asking import show_answers
from plait.inference.build import build_engine
from plait.models import specs
from plait.models.composition import Connectors, PretrainedDecoder
from plait.models.connectors.projection import Chain
from plait.models.connectors.words import WordReader
from plait.models.crossattend import plain
from plait.objectives.language import NextToken
from plait.objectives.words import WordTargets
from plait.stages.fitting import fit_ahead
from plait.stages.pretraining.outcome import milestones
from plait.stages.stage import named_setting
from plait.stages.tune import Adapt, Frozen, Tune, Words
from plait.stages.tuning.first_batch import draw_first_questions
from plait.stages.tuning.learning import ExpertTerms, connector_trains, dropout_of, gate_rates, let_media_learn
from plait.stages.tuning.validating import judge_questions, judged_conversations, judged_questions
from plait.stages.tuning.vocabulary import learned_pictures, named_pictures, read_vocabulary
from plait.stages.validating import check_judged, judged_splits, outcome, said
from plait.training.computed import computed
from plait.training.model_flops import MediaFlops, multimodal_flops
from plait.training.monitor import METRICS
from plait.training.precision import autocast
from plait.training.settings import FitResult, Hooks, Settings

_SHOWN_SPLITS = 2  # held-out splits from which a few questions are asked again and again while training
_SHOWN_EACH = 3
_SHOWN_TOKENS = 10
_NEW = " of new pictures"  # marks questions about pictures that the first phase did not see


def tune(
    spec: Tune, data: Path, folder: Path, *, tower: str, queries: Path | None = None, events: Events
) -> dict[str, Any]:
    """Run the phases; each continues where it was stopped.

    Args:
        spec: How.
        data: Folder of the data stage.
        folder: Of this stage.
        tower: Name or folder of the picture tower.
        queries: Checkpoint of the Q-Former that the connector starts from.
        events: Told what happens.

    Returns:
        Summary for the seal.
    """
    work = _Tuning(spec, data, folder, tower=tower, events=events)
    if queries is not None:
        work.start_from(queries)
    mesh.first(partial(work.show, 0, "untuned"))
    phases = {"connector": work.frozen} if spec.frozen.steps else {}
    if work.vocabulary:
        phases = {"words": work.words, **phases}
    results = {name: run() for name, run in {**phases, "decoder": work.adapt}.items()}
    return mesh.first(partial(work.summary, results))


class _Tuning:
    """Model, questions and features, from phase to phase."""

    def __init__(self, spec: Tune, data: Path, folder: Path, *, tower: str, events: Events) -> None:
        self.spec, self.folder, self.events = spec, folder, events
        self.data = sha256_file(data / "done.json")
        self.compute: Compute = setup(device=spec.device, dtype=spec.dtype)
        frozen = self.compute.dtype
        size = spec.resolution
        image = load_image_tower(
            tower, size=size, max_cells=_cells(spec), fit=spec.fit, dtype=spec.dtype, events=events
        )
        towers: dict[Modality, Tower] = {"image": image}
        self.audio = None
        if spec.audio_tower:
            self.audio = load_audio_tower(
                spec.audio_tower, window_s=spec.audio_window_s, dtype=spec.dtype, events=events
            )
            towers["audio"] = self.audio
        decoder = PretrainedDecoder(name=spec.decoder) if isinstance(spec.decoder, str) else spec.decoder
        seed_everything(spec.seed)
        language = language_of(decoder, dtype=frozen, events=events)
        self.lora = None
        if spec.adapt.rank:
            self.lora = Lora(rank=spec.adapt.rank, alpha=spec.adapt.alpha, targets=spec.adapt.targets)
            with named_setting(f"stages.{spec.kind}.adapt.targets"):
                check_targets(language.model, self.lora)  # now, and not after two phases
        self.shards = data / "shards"
        there = splits_of(self.shards, prefix=PREFIX)
        self.shown = [split for split in opened(HELD_OUT) if split in there][:_SHOWN_SPLITS]
        self.questions = self._read(image)
        self.vocabulary = None
        if isinstance(spec.connector, specs.Words):
            self.vocabulary = read_vocabulary(self._train(), language, place=data)
        seed_everything(spec.seed)
        with named_setting(f"stages.{spec.kind}.connector"):
            self.built = build_multimodal(
                towers,
                language,
                Connectors(image=spec.connector, audio=spec.audio_connector if self.audio else None),
                decoder=decoder,
                whole=not spec.adapt.rank,
                words=self.vocabulary.embeddings if self.vocabulary else None,
            )
        self.built.model.requires_grad_(requires_grad=False)
        self.built.model.to(self.compute.device)
        self.built.model.eval()
        template = self.built.template
        self.learned = learned_pictures(spec, self._train())
        self.conversations = [
            Conversation(
                id=sample.id,
                task=str(sample.meta["task"]) + ("" if sample.media()[0].sha256 in self.learned else _NEW),
                rendered=template.sample(sample),
                pair=str(sample.meta.get("pair", "")),
            )
            for sample in self._train()
        ]
        check_judged(self.questions.samples, spec.trainer, place=data)
        self.judged = judged_conversations(spec, self.questions.samples, template)
        new = sum(conversation.task.endswith(_NEW) for conversation in self.conversations)
        if self.vocabulary and not new and spec.new_pictures > 0:
            events.note("no question is about a picture that the first phase does not see: new_pictures has no effect")
        check_lengths([*self.conversations, *self.judged.get(VALIDATION, ())], most=self.built.context)
        # What does not fit a row, or has no samples, is said before the first phase.
        self.row = spec.row or self.built.context
        try:
            last = self._batches(spec.adapt.steps, late=round(spec.adapt.steps * spec.new_from))
        except ConfigError as error:
            error.place = f"stages.{spec.kind}.{error.place}"
            raise
        longest = max(len(c.rendered) for c in self.conversations)  # which may be one that no step draws
        self.row = spec.row or row_length([*last.lengths(), [longest]])
        self.steps = 0
        with computed(self.built.model, self._settings(spec.adapt), events=Events()):
            pass  # a decoder without blocks, a compiler that is not there: said before the first phase, too

    def start_from(self, queries: Path) -> None:
        """Let the connector begin where the pretrain stage's Q-Former ended."""
        onto = self.spec.connector
        assert isinstance(onto, specs.QFormer)
        with named_setting(f"stages.{self.spec.kind}.connector"):
            taken = start_connector(self.built.connector, onto, self.built.image, folder=queries)
        self.events.note(f"the connector starts from the pretrain stage's Q-Former: {taken:,} weights of {queries}")

    # --- phases ----------------------------------------------------------------------------------------------------

    def words(self) -> FitResult:
        """The connector learns which words a picture's name has; only tower features and embeddings are needed."""
        spec, onto, names = self.spec.words, self.spec.connector, self.vocabulary
        connector = self.built.connector
        assert names is not None
        assert isinstance(onto, specs.Words)
        assert isinstance(connector, Chain)
        samples = named_pictures(self.spec, self._train(), processes=mesh.world())
        row = {name: number for number, name in enumerate(names.names)}
        first = onto.tokens - onto.free
        long = sum(len(ids) > first for ids in names.ids)
        if long:
            self.events.note(
                f"{long:,} of {len(names.ids):,} names have more than {first} tokens: of these the connector "
                f"learns the first {first} and the mean of all",
                long=long,
            )
        batches = WordBatches(
            [s.media()[0].sha256 for s in samples],
            torch.tensor([row[s.text("assistant")] for s in samples]),
            targets=names.words.targets(names.ids, count=first),
            stores=self.questions.stores,
            batch_size=spec.batch_size,
            seed=self.spec.seed,
            rank=mesh.rank(),
            world=mesh.world(),
        )
        reader = WordReader(connector.requires_grad_(requires_grad=True), names.vectors.to(self.compute.device))
        reader.train()
        result = self._fit(
            "words",
            reader,
            objective=WordTargets(),
            batches=batches,
            settings=self._settings(spec),
        )
        reader.eval()
        mesh.first(partial(self.show, self._done(result), "words"))
        return result

    def frozen(self) -> FitResult:
        """The connector learns from answers, through a decoder that does not move."""
        spec = self.spec.frozen
        batches = self._batches(spec.steps)
        mesh.first(partial(self._draw, batches))
        let_media_learn(self.built.model)
        connector_trains(self.built.connector, drops=self.vocabulary is None)
        before = self.steps

        def on_step(step: int, _: Mapping[str, Any]) -> None:
            self.show(before + step, "connector")

        result = self._fit(
            "connector",
            self.built.model,
            objective=NextToken(),
            batches=batches,
            settings=self._settings(spec, parts=gate_rates(self.built.model, self.spec.lr_gates)),
            on_step=on_step,
            tells=(milestones(spec.steps) - {spec.steps}).__contains__,  # after the last one they are asked below
        )
        self.built.model.eval()
        mesh.first(partial(self.show, self._done(result), "connector"))
        return result

    def adapt(self) -> FitResult:
        """LoRA on the decoder, or all of it; the connector learns on if it has a rate."""
        spec, decoder = self.spec.adapt, self.built.language.model
        if not self.spec.frozen.steps:
            mesh.first(partial(self._draw, self._batches(1)))
        seed_everything(self.spec.seed)
        self.built.model.requires_grad_(requires_grad=False)
        with plain(decoder):
            if self.lora is not None:
                attach(decoder, self.lora)
                cast_inputs(decoder, enabled=self.compute.dtype == "float32")
                self.built = self.built.with_lora(self.lora)
            else:
                decoder.float().requires_grad_(requires_grad=True)
        self.built.model.to(self.compute.device)
        connector_trains(self.built.connector, drops=self.vocabulary is None)
        decoder.train()
        parts = dict.fromkeys(let_media_learn(self.built.model), spec.lr_connector) if spec.lr_connector else {}
        parts |= gate_rates(self.built.model, self.spec.lr_gates) if parts else {}
        of_experts = ExpertTerms.of(self.spec.decoder)
        before, shown = self.steps, milestones(spec.steps)

        def on_step(step: int, _: Mapping[str, Any]) -> None:
            self.show(before + step, "decoder")

        result = self._fit(
            "decoder",
            self.built.model,
            objective=NextToken(choices=of_experts.choices),
            batches=self._batches(
                spec.steps, late=round(spec.steps * self.spec.new_from), dropout=dropout_of(spec, seed=self.spec.seed)
            ),
            settings=replace(self._settings(spec, parts=parts), weights=of_experts.weights),
            on_step=on_step,
            tells=shown.__contains__,
        )
        self.built.model.eval()
        if result.step not in shown:  # stopped early
            mesh.first(partial(self.show, before + result.step, "decoder"))
        return result

    # --- what is shown ---------------------------------------------------------------------------------------------

    def show(self, step: int, phase: str) -> None:
        """Ask a few test questions, keep the answers and say one; written as a whole, so a repeat repeats it."""
        model = self.built.model
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        shown = {
            split: spread(self.questions.samples[split], ("name.en", "yesno"), limit=_SHOWN_EACH, seed=self.spec.seed)
            for split in self.shown
        }
        with autocast(self.compute.device, self.compute.dtype):  # as in training
            show_answers(
                build_engine(self.built, self.questions.features),
                shown,
                step=step,
                phase=phase,
                longest=_SHOWN_TOKENS,
                folder=self.folder,
                events=self.events,
            )
        for module, training in modes:
            module.train(training)

    def summary(self, results: Mapping[str, FitResult]) -> dict[str, Any]:
        """For the seal and the closing lines."""
        model = self.built.model  # of which the connector may have stopped learning
        trained = sum(w.numel() for name, w in model.named_parameters() if w.requires_grad or holds_media(name))
        total = sum(weight.numel() for weight in self.built.model.parameters())
        # From the file: a phase that was complete when the stage was resumed has no values of a last step.
        loss = read_jsonl(self.folder / "decoder" / METRICS)[-1]["loss"]
        at_last = "not finite" if loss is None else f"{loss:.3f} nats a token"
        line = (
            f"{' + '.join(self._parts())}: "
            f"{trained:,} of {total:,} weights trained, "
            f"{len(self._train()):,} questions, loss {at_last}"
        )
        judged = {
            phase: found
            for phase, steps in (("connector", self.spec.frozen.steps), ("decoder", self.spec.adapt.steps))
            if phase in results and (found := outcome(self.folder / phase, results[phase], steps=steps))
        }
        return {
            "lines": [line, *(said(found, what=phase) for phase, found in judged.items())],
            "model": results["decoder"].checkpoint.relative_to(self.folder).as_posix(),
            "steps": {name: result.step for name, result in results.items()},
            "skipped_steps": sum(result.skipped for result in results.values()),
            "overflowed_steps": sum(result.overflowed for result in results.values()),
            "questions": len(self._train()),
            **({"validation": judged} if judged else {}),
        }

    # --- inside ----------------------------------------------------------------------------------------------------

    def _draw(self, batches: ConversationBatches) -> None:
        draw_first_questions(batches, self._train(), shards=self.shards, built=self.built, folder=self.folder)

    def _read(self, image: ImageTower) -> Questions:
        wanted = {task for task, share in self.spec.tasks.items() if share > 0}
        if isinstance(self.spec.connector, specs.Words):
            wanted.add("name.en")

        def choose(split: str, samples: Sequence[Sample]) -> Sequence[Sample]:
            if split == "train":
                kept = [sample for sample in samples if sample.meta["task"] in wanted]
                if isinstance(self.spec.connector, specs.Words):  # too few: said before they are encoded
                    named_pictures(self.spec, kept, processes=mesh.world())
                return kept
            if split == VALIDATION:
                return judged_questions(self.spec, samples)
            return spread(samples, ("name.en", "yesno"), limit=_SHOWN_EACH, seed=self.spec.seed)

        found = read_questions(
            self.shards,
            ("train", *self.shown, *judged_splits(self.spec.trainer)),
            image,
            choose=choose,
            cache=home() / "features" if self.spec.cache else None,
            events=self.events,
            views=[View(number) for number in range(1, self.spec.views + 1)],
            audio=self.audio,
        )
        lacking = sorted(wanted - {str(sample.meta["task"]) for sample in found.samples["train"]})
        if lacking:
            self.events.note(f"left out, as the data stage made no such questions: {', '.join(lacking)}", tasks=lacking)
        if not self.shown:
            self.events.note("there is no test split: no answers are shown while training")
        return found

    def _parts(self) -> list[str]:
        spec = self.spec
        hears = [spec.audio_tower, spec.audio_connector.kind] if self.audio else []
        return [spec.image_tower, spec.connector.kind, *hears, spec.decoder_name]

    def _train(self) -> Sequence[Sample]:
        return self.questions.samples["train"]

    def _weights(self, new_pictures: float) -> dict[str, float]:
        """Share of each task, divided between pictures of the first phase and others; canvases count as others."""
        there = {conversation.task for conversation in self.conversations}
        found: dict[str, float] = {}
        for task, share in self.spec.tasks.items():
            old, new = str(task) in there, str(task) + _NEW in there
            if not new:
                found[str(task)] = share
                continue
            part = new_pictures if old else 1.0
            found |= {str(task): share * (1 - part), str(task) + _NEW: share * part}
        return found

    def _batches(
        self, steps: int, *, late: int | None = None, dropout: FeatureDropout | None = None
    ) -> ConversationBatches:
        """Questions about pictures of the first phase; from step ``late`` on, about others, too."""
        rank, world = self.spec.trainer.parallel.grid(mesh.rank(), mesh.world()).share
        return ConversationBatches(
            conversations=self.conversations,
            weights=self._weights(0.0),
            late=None if late is None else (late, self._weights(self.spec.new_pictures)),
            stores=self.questions.stores,
            grid_out=self.built.accounts,
            others=self.questions.others,
            batch_size=self.spec.batch_size,
            row=self.row,
            pad=self.built.stop,
            steps=steps,
            seed=self.spec.seed,
            dropout=dropout,
            pieces=self.spec.trainer.pieces(self.spec.batch_size),
            group_by_length=self.spec.group_by_length,
            packed=self.spec.packing,
            rank=rank,
            world=world,
        )

    def _settings(self, phase: Words | Frozen | Adapt, *, parts: Mapping[str, float] | None = None) -> Settings:
        # What the trainer says, the loop itself records.
        context = self.spec.model_dump(mode="json", exclude={"save_every", "device", "trainer"})
        context["words"].pop("weight_decay")
        keys = [*(tower.key for tower in self.built.towers.values()), self.built.language.key]
        first = isinstance(phase, Words)  # short and small: in float32, and without checkpoints on the way
        settings = Settings(
            steps=phase.steps,
            compute=replace(self.compute, dtype="float32") if first else self.compute,
            seed=self.spec.seed,
            save_every=0 if first else self.spec.save_every,
            context=context | {"row": self.row, "parts": keys, "data": self.data},
            context_defaults=defaults(self.spec),
        )
        decay = phase.weight_decay if first else None
        trainer = self.spec.trainer
        if first:  # no Transformer learns
            off = {"recompute": "none", "compile": False, "parallel": trainer.parallel.data_only()}
            # Nothing judges it: it learns the names of its pictures, and no others.
            trainer = trainer.model_copy(update=off | {"validation": None})
        return settings.with_trainer(trainer, lr=phase.lr, parts=parts, weight_decay=decay)

    def _fit(
        self,
        phase: str,
        model: nn.Module,
        *,
        objective: Objective,
        batches: Batches,
        settings: Settings,
        on_step: Any = None,
        tells: Callable[[int], bool] = bool,
    ) -> FitResult:
        place = self.folder / phase
        place.mkdir(exist_ok=True)
        evaluate = None
        if settings.stopping is not None:
            evaluate = judge_questions(
                self.spec, self.built, self.judged, features=self.questions.features, compute=settings.compute
            )
        hooks = Hooks(
            save_model=partial(save_multimodal, self.built),
            evaluate=evaluate,
            on_step=on_step,
            tells=tells,
            task=f"tune: {phase}",
            tokenizer=self.built.language.tokenizer,
            flops=MediaFlops({"image": model}) if phase == "words" else multimodal_flops(self.built.model),
        )
        workers, events = self.spec.trainer.workers, self.events
        return fit_ahead(
            model, objective, batches, workers=workers, settings=settings, folder=place, events=events, hooks=hooks
        )

    def _done(self, result: FitResult) -> int:
        self.steps += result.step
        return self.steps


def _cells(spec: Tune) -> int:
    """Feature maps are averaged down to what a connector to words joins; transformers' towers keep their own grid."""
    from plait.assembly.local import IMAGE_TOWER

    if spec.image_tower == IMAGE_TOWER and isinstance(spec.connector, specs.Words):
        return spec.connector.shuffle
    return 0
