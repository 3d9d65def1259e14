"""The tune stage: a frozen picture tower, a connector of any kind and a decoder become one model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from plait.core.errors import DataError
from plait.core.estimate import Estimate, Machine
from plait.core.events import Events
from plait.core.spec import Derived, Spec
from plait.core.yamltext import Keys
from plait.models import specs
from plait.models.composition import NewDecoder
from plait.models.specs import Connector
from plait.stages.stage import Stage, Task, named_setting
from plait.training.schedule import Cosine
from plait.training.trainer import Trainer

PRETRAIN = "pretrain"
"""Name of what this run's own pretrain stage trained: a picture tower from scratch, the start of a Q-Former."""
_WORDS_ONLY = ("words", "new_pictures", "new_from")
"""Settings that need a connector that speaks in words."""


class Words(Spec):
    """First phase, of a connector that speaks in words.

    It alone learns to hit the word embeddings of names; the decoder is not run.
    """

    steps: int = Field(default=150, ge=1)
    """Updates."""
    share: float = Field(default=0.85, gt=0.0, le=1.0)
    """Share of the pictures it sees. From the others the decoder learns later how uncertain tokens look: of pictures
    that the connector knows by heart, every "no" is obvious, and new ones would hardly ever get a "yes"."""
    batch_size: int = Field(default=256, ge=1)
    """Pictures a step."""
    lr: float = Field(default=2e-3, gt=0.0)
    """Peak learning rate."""
    weight_decay: float = Field(default=0.1, ge=0.0)
    """Decay in this phase, instead of that of `trainer.optimizer`."""


class Frozen(Spec):
    """Second phase: the connector learns from the answers through the decoder, which stays as it is."""

    steps: int = Field(default=5, ge=0)
    """Updates; the rate of the first one is 0. 0 leaves the phase out."""
    lr: float = Field(default=5e-4, gt=0.0)
    """Peak learning rate."""


class Drop(Spec):
    """Part of the pictures' features, dropped late in the third phase.

    Of a picture that the connector knows by heart, the decoder gets a sharp word; of a new one, a faint mixture of
    many, and from these it must be able to answer, too. It first learns to compare words and pictures where they are
    sharp, then where they are not.
    """

    least: float = Field(default=0.3, ge=0.0, lt=1.0)
    """Share dropped of a picture at least."""
    most: float = Field(default=0.9, ge=0.0, lt=1.0)
    """And at most; each picture of a step has its own share. 0 drops nothing."""
    start: float = Field(default=0.45, ge=0.0, le=1.0)
    """Share of the phase after which it begins."""
    full: float = Field(default=0.6, ge=0.0, le=1.0)
    """Share of the phase after which it is complete."""

    @model_validator(mode="after")
    def _ordered(self) -> Drop:
        if self.most and self.least > self.most:
            raise ValueError(f"least {self.least} is above most {self.most}")
        if self.start >= self.full:
            raise ValueError(f"start {self.start} is not before full {self.full}")
        return self


class Adapt(Spec):
    """Third phase: LoRA on the decoder, or all of the decoder."""

    steps: int = Field(default=120, ge=1)
    """Updates."""
    lr: float = Field(default=1e-3, gt=0.0)
    """Peak learning rate of the adapter, or of the decoder where it is trained as a whole."""
    lr_connector: float = Field(default=0.0, ge=0.0)
    """Peak learning rate of the connector; 0 leaves it as it is. Its gradient is longer than the adapter's, so that
    clipping the two together holds the adapter back, and it soon undoes what `drop` is for."""
    drop: Drop = Field(default_factory=Drop)
    """Features dropped in the course of the phase."""
    rank: int = Field(default=16, ge=0)
    """Rank of the adapter; 0 trains the decoder itself, which a new one needs."""
    alpha: float = Field(default=32.0, gt=0.0)
    """The adapter is scaled by alpha / rank."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Last names of the linear layers that get one."""


class Tune(Stage):
    """Teach a language model to see: answer questions about pictures.

    Phases, each with its own ``metrics.jsonl`` and checkpoints: ``words`` (only of a connector that speaks in words),
    ``connector``, ``decoder``. The picture tower stays frozen and runs once over each picture and each of its views.
    Writes ``batches/first.png`` (the first batch with what is trained in it), ``samples/<step>.json`` (answers to a few
    test questions at several steps) and the model: ``decoder/checkpoints/<step>/``.

    Example:
        >>> Tune(batch_size=16).decoder
        'smollm2'
    """

    together: ClassVar[bool] = True
    # The checker cannot know that specs are frozen, so that narrowing a field is safe.
    kind: Literal["tune"] = "tune"  # pyright: ignore[reportIncompatibleVariableOverride]
    """Which stage this is."""
    image_tower: str = "efficientnet-lite0"
    """Frozen picture tower: `efficientnet-lite0`; a local Hugging Face folder with a picture tower; or `pretrain`, the
    one that this run's pretrain stage trained from scratch."""
    resolution: Literal[0] | int = 128
    """Pixels a side that pictures are scaled to; 0 takes the tower's own."""
    fit: specs.Fit = specs.Square()
    """How pictures are fitted: into one square; at their own resolution (`{kind: native}`); or in tiles with an
    overview (`{kind: tiles}`)."""
    audio_tower: str = ""
    """Frozen tower for questions that are asked aloud (`data.questions.spoken`): `whisper-tiny-en`, or a local Hugging
    Face folder; "" hears nothing."""
    audio_window_s: float = Field(default=0.0, ge=0.0, le=30.0)
    """Of Whisper: seconds that it hears at once; 0 is the 30 s that it was trained on, less takes less time."""
    audio_connector: Connector = specs.Resampler(queries=16, depth=1, heads=6)
    """What turns the audio tower's features into what the decoder reads."""
    views: int = Field(default=4, ge=0)
    """Changed copies of each training picture (color, outline, angle, size), encoded and kept like the picture."""
    cache: bool = True
    """Keep the features of pictures (and of their views) and of sounds, so that each is encoded once; how soon that
    pays is said when the cache is filled. Without, the towers run in every step."""
    decoder: str | NewDecoder = "smollm2"
    """Language model: `smollm2`; a local Hugging Face folder with a chat template; or one from scratch, such as
    `{kind: new, model_type: qwen2, d: 256}`, which is then trained as a whole."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Number format of the frozen weights and of the heavy mathematics; what trains is always float32. `float16` is for
    devices without bfloat16: the loss is scaled, and steps that overflow are left out and counted."""
    tasks: Mapping[Task, float] = Field(default_factory=lambda: {"name.en": 1.0, "yesno": 1.0})
    """Share of each kind of question."""
    new_pictures: float = Field(default=0.6, ge=0.0, lt=1.0)
    """Share of the questions that are about pictures which the first phase did not see (see `words.share`), late in the
    third phase."""
    new_from: float = Field(default=0.75, ge=0.0, le=1.0)
    """Share of the third phase after which there are such questions: comparing picture and word is learned much sooner
    from pictures that the connector knows; how sure to be is learned from others."""
    connector: Connector = specs.Words(dropout=0.3)
    """What turns the tower's features into what the decoder reads; `plait list connectors` shows all. Without `kind`
    the settings are those of `words`."""
    lr_gates: float = Field(default=0.0, ge=0.0)
    """Peak learning rate of the gates of `gated-cross-attention`; 0: that of the layers behind them. Gates start
    closed, and Adam moves each by its rate a step: at 1e-3 a hundred steps open it by a tenth."""
    words: Words = Field(default_factory=Words)
    """First phase."""
    frozen: Frozen = Field(default_factory=Frozen)
    """Second phase."""
    adapt: Adapt = Field(default_factory=Adapt)
    """Third phase."""
    trainer: Trainer = Trainer(schedule=Cosine(warmup=0.08))
    """Optimizer, schedule and what else is common to all training; the phases say how long and how fast. `micro_batch`
    is of the second and third phase: the packed rows of a step are dealt into `batch_size / micro_batch` parts, of one
    row at least; the first one takes its pictures whole, and has nothing to recompute or compile."""
    batch_size: int = Field(default=24, ge=1)
    """Questions a step, in the second and third phase."""
    row: int = Field(default=0, ge=0)
    """Tokens a packed row holds; 0 weighs padding against longer attention
    (:func:`plait.data.packing.row_length`)."""
    packing: bool = True
    """Put several questions into a row, which do not see each other; without, each has a row of its own, as long as the
    longest of its batch."""
    group_by_length: int = Field(default=0, ge=0)
    """Within windows of so many batches, put questions of like length into one batch, whose rows are as long as suits
    them: less padding and shorter attention where lengths differ much. 1 only fits the rows to each batch; 0 gives all
    batches the same rows."""
    save_every: int = Field(default=40, ge=0)
    """Steps between checkpoints; 0 saves only the last step of each phase, as the short phase `words` always does."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where it is trained: `auto`, `cpu`, `cuda` or `mps`."""

    @classmethod
    def derive(cls, given: Mapping[str, Any]) -> Mapping[Keys, Derived]:
        """A new decoder is trained as a whole, and no connector can learn through it before."""
        found: dict[Keys, Derived] = {}
        if isinstance(given.get("decoder"), (Mapping, NewDecoder)):
            found |= {("adapt", "rank"): Derived(0, "decoder"), ("frozen", "steps"): Derived(0, "decoder")}
            if _kind(given.get("connector")) != "words":
                found[("adapt", "lr_connector")] = Derived(1e-3, "decoder")
        if given.get("image_tower") == PRETRAIN:
            found[("resolution",)] = Derived(0, "image_tower")
        return found

    @model_validator(mode="after")
    def _fits(self) -> Tune:
        if not isinstance(self.connector, specs.Words):
            fields = type(self).model_fields
            given = [n for n in _WORDS_ONLY if getattr(self, n) != fields[n].get_default(call_default_factory=True)]
            if given:
                raise ValueError(
                    f"{', '.join(given)}: only the connector `words` has a first phase, this one is "
                    f"`{self.connector.kind}`; take them out (set them to null where a parent recipe gives them)"
                )
        if self.lr_gates and not isinstance(self.connector, specs.GatedCrossAttention):
            raise ValueError(
                f"lr_gates is {self.lr_gates:g}: the connector `{self.connector.kind}` has no gates; set 0"
            )
        learns = isinstance(self.connector, specs.Words) or self.frozen.steps or self.adapt.lr_connector
        if not learns or (self.audio_tower and not (self.frozen.steps or self.adapt.lr_connector)):
            raise ValueError(
                "frozen.steps and adapt.lr_connector are both 0: the connector would stay as it was drawn, and the "
                "model would be blind or deaf; give one of them more"
            )
        if isinstance(self.audio_connector, specs.Words | specs.GatedCrossAttention):
            raise ValueError(
                f"audio_connector is `{self.audio_connector.kind}`: sounds are spliced in; use linear, mlp, qformer or "
                "resampler"
            )
        if isinstance(self.connector, specs.Words) and not isinstance(self.fit, specs.Square):
            raise ValueError(
                f"fit is `{self.fit.kind}`: the first phase of the connector `words` reads one square a picture; use "
                "another connector, or {kind: square}"
            )
        if isinstance(self.decoder, NewDecoder) and self.adapt.rank:
            raise ValueError(
                f"adapt.rank is {self.adapt.rank}: an adapter on a new decoder would leave its weights as they were "
                "drawn; set 0"
            )
        if self.image_tower == PRETRAIN and self.resolution:
            raise ValueError(f"resolution is {self.resolution}: a tower of the pretrain stage has its own size; set 0")
        return self

    @model_validator(mode="after")
    def _experts(self) -> Tune:
        mixture = self.decoder.mixture if isinstance(self.decoder, NewDecoder) else None
        if mixture is not None and self.trainer.compile:
            raise ValueError(
                "trainer.compile is true: layers with experts cannot be compiled, since what each expert gets has "
                "another size in every step; set false"
            )
        among = self.trainer.parallel.expert
        if among == 1 or (isinstance(self.decoder, str) and self.decoder != "smollm2"):
            return self
        if mixture is None:
            raise ValueError(
                f"trainer.parallel.expert is {among}: the decoder has no experts; set 1, or a new decoder of mixtral"
            )
        if mixture.experts % among:
            raise ValueError(
                f"trainer.parallel.expert is {among}, which does not divide {mixture.experts} experts evenly; set a "
                "divisor"
            )
        return self

    @model_validator(mode="after")
    def _encodes_where_it_trains(self) -> Tune:
        if self.trainer.workers and not self.cache:
            raise ValueError(
                f"trainer.workers is {self.trainer.workers}, but cache is false: the towers that encode in every step "
                "are not in these processes; set workers to 0, or cache to true"
            )
        return self

    @model_validator(mode="after")
    def _shares_rows(self) -> Tune:
        how = self.trainer.parallel
        if how.context > 1 and isinstance(self.connector, specs.GatedCrossAttention):
            raise ValueError(
                f"trainer.parallel.context is {how.context}, and the connector `{self.connector.kind}` reads pictures "
                "inside the decoder, which shared rows do not; set context to 1, or take another connector"
            )
        if how.sequence and isinstance(self.connector, specs.GatedCrossAttention):
            raise ValueError(
                f"trainer.parallel.sequence is true, and the connector `{self.connector.kind}` reads pictures inside "
                "the decoder, where each process would have a piece of a row; set sequence to false, or take another "
                "connector"
            )
        return self

    @model_validator(mode="after")
    def _starts(self) -> Tune:
        if isinstance(self.audio_connector, specs.QFormer) and self.audio_connector.start == PRETRAIN:
            raise ValueError("audio_connector.start is pretrain: that Q-Former reads pictures; set drawn")
        begun = isinstance(self.connector, specs.QFormer) and self.connector.start == PRETRAIN
        if begun and not isinstance(self.fit, specs.Square):
            raise ValueError(
                f"fit is `{self.fit.kind}`: the pretrain stage's Q-Former learns on squares; set {{kind: square}}, or "
                "connector.start to drawn"
            )
        return self

    @property
    def decoder_name(self) -> str:
        """For people."""
        return self.decoder if isinstance(self.decoder, str) else f"new {self.decoder.model_type}"

    def run(self, previous: Path | None, folder: Path, *, events: Events) -> Path:
        """Do the work; see :meth:`plait.stages.stage.Stage.run`.

        Raises:
            DataError: There is no data stage before this one, its shards are damaged, or no question is left.
            ResourceError: A package is not fetched, or the disk is full.
            NumericsError: Training went wrong.
        """
        from plait.core.files import find_stage, mark_done
        from plait.stages.tuning.phases import tune

        tower = self.image_tower if self.image_tower != PRETRAIN else str(_pretrained(previous))
        queries = None
        if isinstance(self.connector, specs.QFormer) and self.connector.start == PRETRAIN:
            queries = _queries(previous)
        summary = tune(self, find_stage(previous, "data"), folder, tower=tower, queries=queries, events=events)
        for line in summary["lines"]:
            events.note(line)
        mark_done(folder, kind=self.kind, previous=previous, summary=summary)
        return folder

    def dealt(self) -> Mapping[str, int]:
        """Samples a step; see :meth:`plait.stages.stage.Stage.dealt`."""
        first = {"words.batch_size": self.words.batch_size} if isinstance(self.connector, specs.Words) else {}
        return first | {"batch_size": self.batch_size}

    def shares(self, processes: int, *, setting: str = "") -> int:
        """See :meth:`plait.stages.stage.Stage.shares`."""
        shares = self.trainer.parallel.grid(0, processes).data
        return processes if setting.startswith("words.") else shares

    def check(self, machine: Machine) -> None:
        """See that tower, decoder and device are here; see :meth:`plait.stages.stage.Stage.check`."""
        from plait.assembly.local import IMAGE_TOWER, find_audio_tower, find_decoder, find_tower

        if self.image_tower != PRETRAIN:
            with named_setting(f"stages.{self.kind}.image_tower"):
                find_tower(self.image_tower, IMAGE_TOWER)
        if self.audio_tower:
            with named_setting(f"stages.{self.kind}.audio_tower"):
                find_audio_tower(self.audio_tower)
        with named_setting(f"stages.{self.kind}.decoder"):
            decoder = find_decoder(self.decoder if isinstance(self.decoder, str) else self.decoder.tokenizer)
        if self.trainer.parallel.divides:
            self._check_divided(decoder)
        if self.device not in ("auto", "cpu", machine.device):
            from plait.core.device import choose_device  # imports torch

            with named_setting(f"stages.{self.kind}.device"):
                choose_device(self.device)

    def _check_divided(self, decoder: Path) -> None:
        """See that processes can divide this decoder as the settings say; what only its weights tell comes later."""
        from plait.stages.tuning.needs import decoder_shape
        from plait.training.cost import DecoderShape

        own = isinstance(self.decoder, str) and self.decoder != "smollm2"
        shape = DecoderShape.of_folder(decoder) if own else decoder_shape(self)
        if shape is not None:
            sizes = {"heads": shape.heads, "kv_heads": shape.kv_heads, "layers": shape.layers, "experts": shape.experts}
            with named_setting(f"stages.{self.kind}.trainer.parallel"):
                self.trainer.parallel.check_decoder(**sizes)

    def estimate(self, machine: Machine, before: Mapping[str, Estimate]) -> Estimate:
        """What the stage will need; see :meth:`plait.stages.stage.Stage.estimate`."""
        from plait.stages.tuning.needs import estimate

        return estimate(self, machine, before)


def _kind(connector: Any) -> str:
    """Of a connector as given: a spec, a mapping, or nothing."""
    if isinstance(connector, Mapping):
        return str(connector.get("kind", "words"))  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
    return str(getattr(connector, "kind", "words"))


def _pretrained(previous: Path | None) -> Path:
    """Checkpoint of the pretrain stage before this one, whose tower learned.

    Raises:
        DataError: There is no such stage, or its tower is a frozen one.
    """
    from plait.assembly.scratch import holds_tower

    stage, folder = _checkpoint(previous)
    if not holds_tower(folder):
        raise DataError(
            "the pretrain stage trained no picture tower: its own is frozen",
            place=str(stage),
            remedy="give stages.pretrain.image_tower a tower from scratch, such as {kind: vit}, or name the same "
            "tower in both stages",
        )
    return folder


def _queries(previous: Path | None) -> Path:
    """Checkpoint of the pretrain stage before this one, in which a Q-Former learned.

    Raises:
        DataError: There is no such stage, or it trained a dual encoder.
    """
    from plait.assembly.queries import holds_queries

    stage, folder = _checkpoint(previous)
    if not holds_queries(folder):
        raise DataError(
            "connector.start is pretrain, but the pretrain stage trained no Q-Former: it trained a dual encoder",
            place=str(stage),
            remedy="give stages.pretrain.qformer the sizes of the connector, or set connector.start to drawn",
        )
    return folder


def _checkpoint(previous: Path | None) -> tuple[Path, Path]:
    """The pretrain stage before this one, and its last checkpoint."""
    from plait.core.files import find_stage, read_done

    stage = find_stage(previous, PRETRAIN)
    done = read_done(stage)
    assert done is not None
    return stage, stage / str(done["summary"]["checkpoint"])
