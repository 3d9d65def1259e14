"""The pretrain stage: a dual encoder (CLIP), a tower from views (SimCLR, MoCo), or a Q-Former's first stage (BLIP-2).

Small trained heads stand on frozen towers; or a picture tower from scratch learns, with them or alone; or a Q-Former.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from plait.core.estimate import Estimate, Machine
from plait.core.events import Events
from plait.core.packages import home
from plait.core.spec import Derived, defaults
from plait.core.yamltext import Keys
from plait.models.specs import EfficientNetLite, Part, QFormerShape, ResNet, ScratchImage
from plait.models.text_specs import ScratchTextTower
from plait.objectives.specs import OVER_VIEWS, Contrastive, Objective, OverViews
from plait.report import names
from plait.stages.fitting import fit_ahead
from plait.stages.pretraining.settings import SpokenNames, Views, check_form
from plait.stages.stage import Stage, named_setting
from plait.stages.validating import check_judged, judged_splits
from plait.training.optim import AdamW
from plait.training.schedule import Cosine
from plait.training.trainer import Trainer, only_in_one_process

if TYPE_CHECKING:
    from plait.assembly.dual import Dual
    from plait.assembly.pairs import Pairs
    from plait.core.device import Compute
    from plait.core.types import Score
    from plait.data.pair_batches import PairBatches
    from plait.evaluation.picture_names import RetrievalResult, RetrievalTask
    from plait.training.settings import FitResult, Settings

TESTS = ("test-concept", "test-style", "test-both")
"""Splits that are scored, as far as the data stage made them."""

_HEADS_ONLY = ("d_hidden", "dropout", "objective", "views")
"""Settings of a dual encoder, which a Q-Former has not."""


class Pretrain(Stage):
    """Train a dual encoder on the pictures and names of the data stage.

    Both towers stay frozen and run once over each picture and text; two heads and a temperature learn from the features
    by symmetric InfoNCE, in which pictures of one concept are never negatives of each other. A picture tower from
    scratch (``image_tower: {kind: vit, ...}``) learns too, and sees all pictures of a batch in every step. Writes
    ``metrics.jsonl``, ``results.csv``, ``samples/<step>.json`` (answers for a few test pictures),
    ``checkpoints/<step>/``, ``scores.json`` and ``predictions.jsonl``.

    With an objective over views (``objective: {kind: nt-xent}``) such a tower learns by itself, without texts: changed
    views of a picture are told from those of others. It is scored by what its nearest neighbors show.

    With ``qformer`` it is BLIP-2's first stage instead: a Q-Former learns on the cached features of the frozen picture
    tower, and the tokens of the names, to compare pictures and names, to judge pairs, and to write names.

    Example:
        >>> Pretrain(epochs=20).batch_size
        512
    """

    moved: ClassVar[Mapping[str, Keys]] = {
        "weight_decay": ("trainer", "optimizer", "weight_decay"),
        "warmup": ("trainer", "schedule", "warmup"),
    }
    together: ClassVar[bool] = True
    # The checker cannot know that specs are frozen, so that narrowing a field is safe.
    kind: Literal["pretrain"] = "pretrain"  # pyright: ignore[reportIncompatibleVariableOverride]
    """Which stage this is."""
    image_tower: str | ScratchImage = "efficientnet-lite0"
    """Frozen picture tower: `efficientnet-lite0`, or a local folder in Hugging Face's layout. A mapping such as
    `{kind: vit, size: 64}` is a tower from scratch, which learns."""
    objective: Objective = Contrastive()
    """What is minimized; `plait list objectives` tells them all. Not used with `qformer`, which has its own."""
    views: Views | None = None
    """How many views of each picture an objective over views compares, and how they come about; derived as `{}` for
    one of these."""
    resolution: Literal[0] | Annotated[int, Field(ge=32)] = 160
    """Pixels a side that pictures are scaled to; 0 takes the tower's own, as a tower from scratch always does."""
    qformer: QFormerShape | None = None
    """Sizes of a Q-Former that learns instead of a dual encoder: BLIP-2's first stage. Of the text tower only the
    tokenizer is used, of the settings of heads only `d_shared` and `scale`. See `stages.tune.connector.start`."""
    spoken: SpokenNames | None = None
    """Say the names aloud, and let a third head put the sounds into the same space; by default it does not hear."""
    text_tower: str | ScratchTextTower = "minilm"
    """Frozen text tower: `minilm` (English), or a local Hugging Face folder with a BERT-like encoder. A mapping such as
    `{kind: gpt, vocabulary: 2048, d: 128, depth: 4, heads: 4}` is a tower from scratch, which learns; its vocabulary of
    bytes and pairs of them is learned from the texts of training."""
    max_tokens: int = Field(default=128, ge=8)
    """Longest text; a longer one is an error, never cut."""
    tower_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Number format of the towers; the heads are always float32."""
    keywords: bool = True
    """In training, put other English words for the concept in place of its name now and then."""
    d_hidden: int = Field(default=1024, ge=1)
    """Width between the two layers of a head."""
    d_shared: int = Field(default=512, ge=1)
    """Width of the space that pictures and texts share."""
    dropout: float = Field(default=0.3, ge=0.0, lt=1.0)
    """Share of hidden units dropped while training."""
    scale: float = Field(default=14.3, gt=0.0, le=100.0)
    """Factor on the cosine (1 / temperature) at the start; it is learned."""
    epochs: float = Field(default=30.0, gt=0.0)
    """How often each pair is seen; not used when `steps` is given."""
    steps: int | None = Field(default=None, ge=1)
    """Updates in all, instead of `epochs`."""
    batch_size: int = Field(default=512, ge=2)
    """Pairs that are told apart from each other in a step; with fewer pairs than this, all of them."""
    lr: float = Field(default=1e-3, gt=0.0)
    """Peak learning rate."""
    trainer: Trainer = Trainer(optimizer=AdamW(weight_decay=0.1), schedule=Cosine(warmup=0.05))
    """Optimizer, schedule and what else is common to all training."""
    save_every: int = Field(default=25, ge=0)
    """Steps between checkpoints; 0 saves only the last step."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where what learns is trained: `auto`, `cpu`, `cuda` or `mps`."""

    @classmethod
    def derive(cls, given: Mapping[str, Any]) -> Mapping[tuple[str, ...], Derived]:
        """A tower from scratch has its own size, of pictures or of texts; views are compared without dropout."""
        scratch = isinstance(given.get("image_tower"), (Mapping, Part))
        found = {("resolution",): Derived(0, "image_tower.size")} if scratch else {}
        words = given.get("text_tower")
        own = words.get("max_tokens") if isinstance(words, Mapping) else getattr(words, "max_tokens", None)
        if isinstance(own, int):
            found |= {("max_tokens",): Derived(own, "text_tower.max_tokens")}
        objective = given.get("objective")
        kind = objective.get("kind") if isinstance(objective, Mapping) else getattr(objective, "kind", None)
        if kind in OVER_VIEWS:
            found |= {("views",): Derived({}, "objective.kind"), ("dropout",): Derived(0.0, "objective.kind")}
        return found

    @model_validator(mode="after")
    def _one_size(self) -> Pretrain:
        tower = self.image_tower
        if not isinstance(tower, str) and self.resolution not in (0, tower.size):
            raise ValueError(
                f"resolution is {self.resolution}, image_tower.size is {tower.size}: pictures of a tower from scratch "
                "have its own size; stages.pretrain.resolution=null takes the other away"
            )
        words = self.text_tower
        if not isinstance(words, str) and self.max_tokens > getattr(words, "max_tokens", self.max_tokens):
            raise ValueError(
                f"max_tokens is {self.max_tokens}, text_tower.max_tokens is {getattr(words, 'max_tokens', 0)}: "
                "positions of a tower from scratch are its own; take max_tokens out, or raise the tower's"
            )
        return self

    @model_validator(mode="after")
    def _one_form(self) -> Pretrain:
        if self.qformer is not None:
            if not isinstance(self.image_tower, str):
                raise ValueError(
                    f"image_tower is a {self.image_tower.kind} from scratch: a Q-Former learns on a frozen tower; name "
                    "one, or train the tower in a pretrain stage of its own"
                )
            if not isinstance(self.text_tower, str):
                raise ValueError(
                    f"text_tower is a {self.text_tower.kind} from scratch: a Q-Former reads texts itself, and of "
                    "text_tower only the tokenizer is used; name one (minilm)"
                )
            if self.spoken is not None:
                raise ValueError(
                    "spoken: sounds are for a dual encoder, here a Q-Former learns; take one of the two out"
                )
            fields = type(self).model_fields
            if given := [name for name in _HEADS_ONLY if getattr(self, name) != fields[name].default]:
                raise ValueError(
                    f"{', '.join(given)}: settings of a dual encoder, here a Q-Former learns (it has a dropout "
                    "of its own); take them out (set them to null where a parent recipe gives them)"
                )
            self.trainer.check_whole(stage="a Q-Former, which judges pairs of the whole batch,")
        return self

    @model_validator(mode="after")
    def _comparable(self) -> Pretrain:
        check_form(self)
        return self

    @model_validator(mode="after")
    def _computable(self) -> Pretrain:
        self.trainer.check_no_head(stage="the pretrain stage")
        self.trainer.check_data_only(stage="the pretrain stage")
        tower = self.image_tower
        learns = not isinstance(self.text_tower, str)
        if self.qformer is None and not learns and isinstance(tower, str | ResNet | EfficientNetLite):
            heads = "a pair of heads on frozen towers" if isinstance(tower, str) else f"a {tower.kind}"
            self.trainer.check_no_blocks(learns=heads)
        return self

    @property
    def tower_name(self) -> str:
        """The picture tower as a person reads it."""
        return names.tower_name(self.model_dump(mode="json", include={"image_tower"})["image_tower"])

    def run(self, previous: Path | None, folder: Path, *, events: Events) -> Path:
        """Do the work; see :meth:`plait.stages.stage.Stage.run`.

        Raises:
            DataError: There is no data stage before this one, its shards are damaged, or it has too few pairs.
            ResourceError: A tower's package is not fetched, or the disk is full.
            NumericsError: Training went wrong.
        """
        from plait.core.files import find_stage, mark_done

        data = find_stage(previous, "data")
        if isinstance(self.objective, OverViews):
            from plait.stages.pretraining.views import learn_views

            summary = learn_views(self, data, folder=folder, events=events)
        elif self.qformer is None:
            summary = self._dual(data, folder, events=events)
        else:
            from plait.stages.pretraining.queries import learn_queries

            summary = learn_queries(self, self.qformer, data, folder=folder, events=events)
        for line in summary["lines"]:
            events.note(line)
        mark_done(folder, kind=self.kind, previous=previous, summary=summary)
        return folder

    def dealt(self) -> Mapping[str, int]:
        """Pairs a step; see :meth:`plait.stages.stage.Stage.dealt`."""
        return {"batch_size": self.batch_size}

    def shares(self, processes: int, *, setting: str = "") -> int:
        """See :meth:`plait.stages.stage.Stage.shares`.

        Raises:
            ConfigError: A Q-Former learns, which judges pairs of a whole batch.
        """
        if processes > 1 and self.qformer is not None:
            raise only_in_one_process("QueryTasks", processes)
        return processes

    def check(self, machine: Machine) -> None:
        """See that the towers and the device are here; see :meth:`plait.stages.stage.Stage.check`."""
        from plait.assembly.local import IMAGE_TOWER, TEXT_TOWER, find_audio_tower, find_tower

        if isinstance(self.image_tower, str):
            with named_setting(f"stages.{self.kind}.image_tower"):
                find_tower(self.image_tower, IMAGE_TOWER)
        else:
            from plait.stages.pretraining.needs import tower_account  # imports torch
            from plait.stages.pretraining.view_needs import check_views

            tower_account(self.image_tower)
            check_views(self)
        if not isinstance(self.objective, OverViews):
            with named_setting(f"stages.{self.kind}.text_tower"):
                if isinstance(self.text_tower, str):
                    find_tower(self.text_tower, TEXT_TOWER)
                else:
                    from plait.stages.pretraining.text_needs import text_account

                    text_account(self.text_tower)
        if self.spoken is not None:
            from plait.data.speech import check_voice
            from plait.stages.pretraining.hearing_needs import check_hearing

            with named_setting(f"stages.{self.kind}.spoken.audio_tower"):
                check_hearing(find_audio_tower(self.spoken.audio_tower), window_s=self.spoken.window_s)
            for name in ("voices", "test_voices"):
                with named_setting(f"stages.{self.kind}.spoken.{name}"):
                    for voice in getattr(self.spoken, name):
                        check_voice(voice)
        if self.device not in ("auto", "cpu", machine.device):
            from plait.core.device import choose_device  # imports torch

            with named_setting(f"stages.{self.kind}.device"):
                choose_device(self.device)

    def estimate(self, machine: Machine, before: Mapping[str, Estimate]) -> Estimate:
        """What the stage will need; see :meth:`plait.stages.stage.Stage.estimate`."""
        from plait.stages.pretraining.needs import estimate

        known = before["data"].samples if "data" in before else {}
        splits = ("train", *judged_splits(self.trainer), *TESTS)
        return estimate(self, machine, {split: known[split] for split in splits if split in known})

    def settings(self, compute: Compute, steps: int, *, towers: Sequence[str], data: str) -> Settings:
        """How it is trained.

        Args:
            compute: Where.
            steps: Updates in all.
            towers: Digests of what is frozen.
            data: Digest of the data stage's seal.
        """
        from plait.training.settings import Settings

        # How long to train and how often to save may change when a run is resumed; the loop sees to them itself, and
        # records what the trainer says.
        mutable = {"steps", "epochs", "save_every", "device", "trainer"}
        context = self.model_dump(mode="json", exclude=mutable)
        # Under these names older runs recorded them.
        context |= {"weight_decay": self.trainer.optimizer.weight_decay, "warmup": self.trainer.schedule.warmup}
        return Settings(
            steps=steps,
            compute=compute,
            seed=self.seed,
            save_every=self.save_every,
            context=context | {"towers": list(towers), "data": data},
            context_defaults=defaults(self),
        ).with_trainer(self.trainer, lr=self.lr)

    def steps_for(self, pairs: int) -> int:
        """Updates in all over so many training pairs."""
        return self.steps or max(1, math.ceil(self.epochs * pairs / max(1, min(self.batch_size, pairs))))

    # --- inside ----------------------------------------------------------------------------------------------------

    def _dual(self, data: Path, folder: Path, *, events: Events) -> dict[str, Any]:
        """Train a dual encoder; returns the summary for the seal."""
        from plait.assembly.pairs import read_pairs
        from plait.core import mesh
        from plait.core.device import setup
        from plait.core.files import sha256_file, write_json, write_jsonl
        from plait.core.held_out import opened
        from plait.data.order import check_enough
        from plait.evaluation.picture_names import RetrievalTask, beside, compare
        from plait.stages.pretraining.outcome import shapes, show, summarize

        compute = setup(device=self.device, dtype="float32")
        dual = self._build(data, compute, events)
        pairs = read_pairs(
            data / "shards",
            ("train", *judged_splits(self.trainer), *opened(TESTS)),
            dual,
            cache=home() / "features",
            keywords=self.keywords,
            events=events,
        )
        check_judged(pairs, self.trainer, place=data)
        there = len(pairs["train"].ids)
        check_enough(there, mesh.world(), what="training pairs", place=str(data), remedy="give the data stage more")
        pairs = self._said(pairs, dual, events)
        counts = {split: len(found.ids) for split, found in pairs.items()}
        tasks = [RetrievalTask(found, name=split, seed=self.seed) for split, found in pairs.items() if split in TESTS]
        before: list[RetrievalResult] = []
        shape: list[Score] = []

        def look() -> None:
            before.extend(task.evaluate(dual.model) for task in tasks)
            shape.extend(beside(score, "untrained") for score in shapes(tasks, dual.model, events=events))
            show(folder, 0, tasks, results=before, events=events)

        mesh.first(look)  # of several processes, the first one judges
        settings = self.settings(
            compute,
            self.steps_for(len(pairs["train"].ids)),
            towers=[dual.image.key, dual.text.key, *([dual.audio.key] if dual.audio else [])],
            data=sha256_file(data / "done.json"),
        )
        fitted = self._fit(dual, pairs, tasks, settings=settings, folder=folder, events=events)

        def judge() -> dict[str, Any]:
            after = [task.evaluate(dual.model) for task in tasks]
            scores = [
                s for task, trained, raw in zip(tasks, after, before, strict=True) for s in compare(task, trained, raw)
            ]
            scores += [*shapes(tasks, dual.model, events=events, again=True), *shape]
            write_json(folder / "scores.json", [asdict(score) for score in scores])
            answers = [r for task, result in zip(tasks, after, strict=True) for r in task.answers(result)]
            write_jsonl(folder / "predictions.jsonl", answers)
            return summarize(fitted, scores, pairs=counts, folder=folder, steps=settings.steps)

        return mesh.first(judge)

    def _build(self, data: Path, compute: Compute, events: Events) -> Dual:
        from plait.assembly.audio_towers import load_audio_tower
        from plait.assembly.dual import HeadSizes, build_dual
        from plait.assembly.towers import load_image_tower, load_text_tower
        from plait.core.device import seed_everything
        from plait.stages.pretraining.words import learned_words

        image = self.image_tower
        if isinstance(image, str):
            image = load_image_tower(image, size=self.resolution, dtype=self.tower_dtype, events=events)
        if isinstance(self.text_tower, str):
            text = load_text_tower(self.text_tower, max_tokens=self.max_tokens, dtype=self.tower_dtype)
        else:
            text = learned_words(self, self.text_tower, data)
        seed_everything(self.seed)
        sizes = HeadSizes(d_hidden=self.d_hidden, d_shared=self.d_shared, dropout=self.dropout)
        audio = None
        if self.spoken is not None:
            audio = load_audio_tower(
                self.spoken.audio_tower, window_s=self.spoken.window_s, dtype=self.tower_dtype, events=events
            )
        dual = build_dual(image, text, sizes, scale=self.scale, audio=audio)
        if dual.model.tower is not None:
            weights = sum(weight.numel() for weight in dual.model.tower.parameters() if weight.requires_grad)
            events.note(f"picture tower from scratch: {self.tower_name}, {weights:,} weights learn")
        if dual.model.text_tower is not None:
            weights = sum(weight.numel() for weight in dual.model.text_tower.parameters())
            ids = dual.text.settings["scratch"]["vocabulary"]
            events.note(f"text tower from scratch: {weights:,} weights learn; a vocabulary of {ids:,} ids was learned")
        dual.model.to(compute.device)
        return dual

    def _said(self, pairs: dict[str, Pairs], dual: Dual, events: Events) -> dict[str, Pairs]:
        """The names said aloud, where the model hears."""
        if self.spoken is None or dual.audio is None:
            return pairs
        from plait.assembly.said import say_names
        from plait.data.spoken import Saying

        saying = Saying(**self.spoken.model_dump(exclude={"audio_tower", "window_s"}), seed=self.seed)
        return say_names(pairs, dual.audio, saying, cache=home() / "features", events=events)

    def _fit(
        self,
        dual: Dual,
        splits: Mapping[str, Pairs],
        tasks: Sequence[RetrievalTask],
        *,
        settings: Settings,
        folder: Path,
        events: Events,
    ) -> FitResult:
        import torch

        from plait.assembly.dual import save_dual
        from plait.objectives.build import over_pairs
        from plait.stages.pretraining.outcome import check_pairs, milestones, say_pieces, show
        from plait.stages.pretraining.validating import judge_pairs
        from plait.training.model_flops import dual_flops
        from plait.training.settings import Hooks

        pairs = splits["train"]
        check_pairs(len(pairs.ids), folder)
        batches = self._batches(pairs)
        objective = over_pairs(self.objective, batch=batches.batch_size)
        if isinstance(objective, torch.nn.Module):
            objective.to(settings.compute.device)
        say_pieces(dual.model, batches.batch_size, batches.micro_batch, events=events)
        shown = milestones(settings.steps)

        def on_step(step: int, _: Mapping[str, Any]) -> None:
            show(folder, step, tasks, results=[task.evaluate(dual.model) for task in tasks], events=events)

        hooks = Hooks(
            save_model=lambda target: save_dual(dual, target),
            evaluate=judge_pairs(self, dual.model, objective, splits=splits, compute=settings.compute),
            on_step=on_step,
            tells=shown.__contains__,
            task=self.kind,
            flops=dual_flops(dual.model, pairs=batches.batch_size, width=self.d_shared),
        )
        dual.model.train()
        workers = self.trainer.workers
        if workers:  # which have no GPU
            batches = batches.to(torch.device("cpu"))
        return fit_ahead(
            dual.model,
            objective,
            batches,
            workers=workers,
            settings=settings,
            folder=folder,
            events=events,
            hooks=hooks,
        )

    def _batches(self, pairs: Pairs) -> PairBatches:
        from plait.core import mesh
        from plait.data.pair_batches import PairBatches

        return PairBatches(
            image=pairs.image,
            text=pairs.text,
            texts_of=pairs.texts_of,
            classes=pairs.classes,
            ids=pairs.ids,
            batch_size=min(self.batch_size, len(pairs.ids)),
            seed=self.seed,
            audio=pairs.audio,
            sounds_of=pairs.sounds_of,
            micro_batch=self.trainer.micro_batch,
            rank=mesh.rank(),
            world=mesh.world(),
        )
