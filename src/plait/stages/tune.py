"""The tune stage: a LLaVA-style model from a frozen picture tower, a connector and a decoder with LoRA."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from plait.core.errors import ConfigError
from plait.core.estimate import Estimate, Machine
from plait.core.events import Events
from plait.core.spec import Spec
from plait.stages.stage import Stage, Task, named_setting

# Sizes of the default parts, for the estimate; tests compare them with the weights.
_IMAGE_WEIGHTS, _IMAGE_WIDTH = 4_652_008, 1280
_IMAGE_FLOPS_224 = 0.77e9
_SECONDS_PER_PICTURE_128 = (0.005, 0.02)
_DECODER_WEIGHTS = 134_515_008
_WORDS = 1_500
_CANVASES = 0.3  # canvases for each training picture
_SAMPLE_TOKENS, _TRAINED_TOKENS = 30, 4
_ROW, _FILLED = 64, 0.9  # what packing makes of them
_SECONDS_START = (4.0, 20.0)
_DECODER_EFFICIENCY = (0.12, 0.45)


class Connect(Spec):
    """Shape of the connector."""

    d_hidden: int = Field(default=1024, ge=1)
    """Width between its two layers."""
    dropout: float = Field(default=0.3, ge=0.0, lt=1.0)
    """Share of features and hidden units dropped in the first phase. Later the connector itself drops nothing: a
    decoder learns to compare word and picture from clear tokens first (and then from others, see `adapt.drop`)."""
    tokens: int = Field(default=6, ge=1)
    """Tokens a picture becomes."""
    free: int = Field(default=2, ge=1)
    """How many of these may point anywhere; the others are mixtures of words."""


class Words(Spec):
    """First phase: the connector alone learns to hit the word embeddings of names; the decoder is not run."""

    steps: int = Field(default=150, ge=1)
    """Updates."""
    share: float = Field(default=0.85, gt=0.0, le=1.0)
    """Share of the pictures it sees. From the others the decoder learns later how uncertain tokens look: of pictures
    that the connector knows by heart, every "no" is obvious, and new ones would hardly ever get a "yes"."""
    batch_size: int = Field(default=256, ge=1)
    """Pictures a step."""
    lr: float = Field(default=2e-3, gt=0.0)
    """Peak learning rate."""


class Frozen(Spec):
    """Second phase: the connector learns from the answers through the decoder, which stays as it is."""

    steps: int = Field(default=5, ge=1)
    """Updates; the rate of the first one is 0."""
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
    """Third phase: LoRA on the decoder."""

    steps: int = Field(default=120, ge=1)
    """Updates."""
    lr: float = Field(default=1e-3, gt=0.0)
    """Peak learning rate of the adapter."""
    lr_connector: float = Field(default=0.0, ge=0.0)
    """Peak learning rate of the connector; 0 leaves it as it is. Its gradient is longer than the adapter's, so that
    clipping the two together holds the adapter back, and it soon undoes what `drop` is for."""
    drop: Drop = Field(default_factory=Drop)
    """Features dropped in the course of the phase."""
    rank: int = Field(default=16, ge=1)
    """Rank of the adapter."""
    alpha: float = Field(default=32.0, gt=0.0)
    """The adapter is scaled by alpha / rank."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Last names of the linear layers that get one."""


class Tune(Stage):
    """Teach a language model to see: answer questions about pictures.

    Three phases, each with its own ``metrics.jsonl`` and checkpoints: ``words``, ``connector``, ``decoder``. The
    picture tower stays frozen and runs once over each picture and each of its views. Writes ``batches/first.png`` (the
    first batch with what is trained in it), ``samples/<step>.json`` (answers to a few test questions at several steps)
    and the model: ``decoder/checkpoints/<step>/``.

    Example:
        >>> Tune(batch_size=16).decoder
        'smollm2'
    """

    # The checker cannot know that specs are frozen, so that narrowing a field is safe.
    kind: Literal["tune"] = "tune"  # pyright: ignore[reportIncompatibleVariableOverride]
    """Which stage this is."""
    image_tower: str = "efficientnet-lite0"
    """Frozen picture tower: `efficientnet-lite0`, or a local Hugging Face folder with a picture tower."""
    resolution: Literal[0] | int = 128
    """Pixels a side that pictures are scaled to; 0 takes the tower's own."""
    views: int = Field(default=4, ge=0)
    """Changed copies of each training picture (color, outline, angle, size), encoded and kept like the picture."""
    decoder: str = "smollm2"
    """Language model: `smollm2`, or a local Hugging Face folder with a chat template."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Number format of the frozen weights; what trains is always float32."""
    tasks: Mapping[Task, float] = Field(default_factory=lambda: {"name.en": 1.0, "yesno": 1.0})
    """Share of each kind of question."""
    new_pictures: float = Field(default=0.6, ge=0.0, lt=1.0)
    """Share of the questions that are about pictures which the first phase did not see (see `words.share`), late in the
    third phase."""
    new_from: float = Field(default=0.75, ge=0.0, le=1.0)
    """Share of the third phase after which there are such questions: comparing picture and word is learned much sooner
    from pictures that the connector knows; how sure to be is learned from others."""
    connector: Connect = Field(default_factory=Connect)
    """Shape of the connector."""
    words: Words = Field(default_factory=Words)
    """First phase."""
    frozen: Frozen = Field(default_factory=Frozen)
    """Second phase."""
    adapt: Adapt = Field(default_factory=Adapt)
    """Third phase."""
    batch_size: int = Field(default=24, ge=1)
    """Questions a step, in the second and third phase."""
    row: int = Field(default=0, ge=0)
    """Tokens a packed row holds; 0 weighs padding against longer attention
    (:func:`plait.data.packing.row_length`)."""
    save_every: int = Field(default=40, ge=0)
    """Steps between checkpoints; 0 saves only the last step of each phase."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where it is trained: `auto`, `cpu`, `cuda` or `mps`."""

    def run(self, previous: Path | None, folder: Path, *, events: Events) -> Path:
        """Do the work; see :meth:`plait.stages.stage.Stage.run`.

        Raises:
            DataError: There is no data stage before this one, its shards are damaged, or no question is left.
            ResourceError: A package is not fetched, or the disk is full.
            NumericsError: Training went wrong.
        """
        from plait.core.files import find_stage, mark_done
        from plait.stages.tuning.phases import tune

        summary = tune(self, find_stage(previous, "data"), folder, events=events)
        for line in summary["lines"]:
            events.note(line)
        mark_done(folder, kind=self.kind, previous=previous, summary=summary)
        return folder

    def check(self, machine: Machine) -> None:
        """See that tower, decoder and device are here; see :meth:`plait.stages.stage.Stage.check`."""
        from plait.assembly.local import IMAGE_TOWER, find_decoder, find_tower

        with named_setting(f"stages.{self.kind}.image_tower"):
            find_tower(self.image_tower, IMAGE_TOWER)
        with named_setting(f"stages.{self.kind}.decoder"):
            find_decoder(self.decoder)
        with named_setting(f"stages.{self.kind}.connector.free"):
            if self.connector.free >= self.connector.tokens:
                raise ConfigError(
                    f"{self.connector.free} of {self.connector.tokens} tokens are free",
                    remedy="leave at least one token that is a mixture of words",
                )
        if self.device not in ("auto", "cpu", machine.device):
            from plait.core.device import choose_device  # imports torch

            with named_setting(f"stages.{self.kind}.device"):
                choose_device(self.device)

    def estimate(self, machine: Machine, before: Mapping[str, Estimate]) -> Estimate:
        """What the stage will need; see :meth:`plait.stages.stage.Stage.estimate`."""
        from plait.training.cost import (
            SMOLLM2_135M,
            Lora,
            checkpoint_bytes,
            decoder_activations,
            decoder_flops,
            linear_flops,
            logits_bytes,
            peak_memory,
            time_range,
        )

        known = before["data"].samples if "data" in before else {}
        train = known.get("train", 0)
        canvases = round(train * _CANVASES)
        pictures = train * (1 + self.views) + canvases * 2
        side = (self.resolution or 224) / 224
        wide = self.connector.tokens * SMOLLM2_135M.d_model
        connector = _IMAGE_WIDTH * 4 * (2 + self.connector.d_hidden) + self.connector.d_hidden * (wide + 1) + wide
        adapter = _lora_weights(self.adapt.rank, self.adapt.targets)
        learns = connector if self.adapt.lr_connector else 0  # beside the adapter, in the phase that needs most
        row = self.row or _ROW
        rows = math.ceil(self.batch_size * _SAMPLE_TOKENS / (_FILLED * row))
        steps = self.frozen.steps + self.adapt.steps
        trained = self.batch_size * _TRAINED_TOKENS
        flops = steps * decoder_flops(SMOLLM2_135M, rows=rows, length=row, gradients="through", head_positions=trained)
        flops += linear_flops(adapter, steps * rows * row, "full")
        words = linear_flops(connector, self.words.steps * self.words.batch_size, "full")
        low, high = time_range(flops, machine, dtype=machine.dtype, efficiency=_DECODER_EFFICIENCY)
        spare = time_range(words, machine, dtype="float32", efficiency=(0.15, 0.7))
        area = side**2 / (128 / 224) ** 2
        seconds = [_SECONDS_START[i] + pictures * _SECONDS_PER_PICTURE_128[i] * area + spare[i] for i in (0, 1)]
        cells = 4 * pictures
        activations = decoder_activations(
            SMOLLM2_135M,
            rows=rows,
            length=row,
            dtype=machine.dtype,
            gradients="through",
            attention="eager",
            lora=Lora(rank=self.adapt.rank, targets=self.adapt.targets),
        ) + logits_bytes(SMOLLM2_135M, trained)
        dtype = machine.dtype if self.dtype == "auto" else self.dtype
        memory = peak_memory(
            machine,
            frozen=_IMAGE_WEIGHTS + _DECODER_WEIGHTS,
            frozen_dtype=dtype,
            trainable=adapter + learns,
            activations=activations,
            caches=4 * _WORDS * SMOLLM2_135M.d_model,
        )
        memory["weights"] += 4 * (connector - learns)
        return Estimate(
            stage=self.kind,
            samples=dict(known),
            params_trainable=adapter + connector,
            params_frozen=_IMAGE_WEIGHTS + _DECODER_WEIGHTS,
            tokens=steps * rows * row,
            image_tokens=steps * self.batch_size * self.connector.tokens,
            flops=flops + words + pictures * _IMAGE_FLOPS_224 * side**2,
            memory=memory,
            disk_bytes=checkpoint_bytes(weights=4 * (adapter + connector), trainable=adapter + connector, keep=2) * 2,
            home_bytes=cells * _IMAGE_WIDTH * 2,
            seconds=(low + seconds[0], high + seconds[1]),
            notes=(
                f"{self.words.steps:,} steps on words, then {steps:,} steps of {self.batch_size} questions",
                "sizes and speeds are those of efficientnet-lite0 and SmolLM2-135M",
            ),
        )


def _lora_weights(rank: int, targets: Sequence[str]) -> int:
    """Weights of the adapters on SmolLM2-135M."""
    d, f, kv = 576, 1536, 192
    shapes = {
        "q_proj": (d, d),
        "k_proj": (d, kv),
        "v_proj": (d, kv),
        "o_proj": (d, d),
        "gate_proj": (d, f),
        "up_proj": (d, f),
        "down_proj": (f, d),
    }
    return 30 * rank * sum(sum(shapes[target]) for target in targets if target in shapes)
