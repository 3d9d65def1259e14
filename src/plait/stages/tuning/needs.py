"""What the tune stage will need, from its settings alone: nothing is written and no weight loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from plait.core.errors import ConfigError
from plait.core.estimate import Estimate, Machine
from plait.models import specs
from plait.stages.stage import named_setting
from plait.stages.validating import judged_samples
from plait.training.cost import (
    SMOLLM2_135M,
    DecoderShape,
    Lora,
    checkpoint_bytes,
    decoder_activations,
    decoder_flops,
    head_bytes,
    linear_flops,
    peak_memory,
    time_range,
)

if TYPE_CHECKING:
    from plait.models.connectors.measure import ConnectorAccount
    from plait.stages.tune import Tune

# Sizes of the default parts; tests compare them with the weights.
IMAGE_WEIGHTS, IMAGE_WIDTH = 4_652_008, 1280
_IMAGE_FLOPS_224 = 0.77e9
_IMAGE_REDUCTION = 32  # pixels a side of a cell
_SECONDS_PER_PICTURE_128 = (0.005, 0.02)
_WORDS = 1_500
_CANVASES = 0.3  # canvases for each training picture
_TEXT_TOKENS, _TRAINED_TOKENS = 24, 4  # of a sample
_ROW, _FILLED = 64, 0.9  # what packing makes of them
_SECONDS_START = (4.0, 20.0)
_DECODER_EFFICIENCY = (0.12, 0.45)
_WHISPER_WIDTH, _SOUND_TOKENS = 384, 140  # of tiny.en; a spoken question takes 2.8 s, 50 tokens a second
_VOCABULARY = 49_152  # of a new decoder: the packaged tokenizer's


class _Picture(NamedTuple):
    """Features of one picture."""

    width: int
    side: int
    known: bool


def estimate(spec: Tune, machine: Machine, before: Mapping[str, Estimate]) -> Estimate:
    """Needs of the stage; imports torch.

    Args:
        spec: Its settings.
        machine: What this machine can do.
        before: Estimates of earlier stages.
    """
    from plait.models.connectors.measure import connector_account

    known = before["data"].samples if "data" in before else {}
    train = known.get("train", 0)
    kept = train * (1 + spec.views) + round(train * _CANVASES) * 2
    pictures = kept if spec.cache else _encoded_anew(spec)
    picture, shape = _picture(spec, before), decoder_shape(spec)
    with named_setting(f"stages.{spec.kind}.connector"):
        of = connector_account(
            spec.connector,
            cells=(picture.side, picture.side),
            d_in=picture.width,
            d_out=shape.d_model,
            layers=shape.layers,
        )
    _check_context(spec, of)
    sounds = _sounds(spec, shape)
    whole = spec.adapt.rank == 0
    lora = None if whole else Lora(rank=spec.adapt.rank, targets=tuple(spec.adapt.targets))
    adapter = shape.params if whole else _adapter(shape, lora)
    learns = of.parameters if spec.adapt.lr_connector else 0  # beside the adapter, in the phase that needs most
    rows, row = _rows(spec, of.slots)
    flops, words, trained = _work(spec, shape, of, rows=rows, row=row, adapter=0 if whole else adapter)
    dtype = machine.dtype if spec.dtype == "auto" else spec.dtype
    low, high = time_range(flops, machine, dtype=machine.dtype, efficiency=_DECODER_EFFICIENCY)
    spare = time_range(words, machine, dtype="float32", efficiency=(0.15, 0.7))
    side = (spec.resolution or 224) / 224
    area = side**2 / (128 / 224) ** 2
    seconds = [_SECONDS_START[i] + pictures * _SECONDS_PER_PICTURE_128[i] * area + spare[i] for i in (0, 1)]
    tables = shape.vocab * shape.d_model * (1 if shape.tied else 2) if whole else 0
    state = spec.trainer.state_bytes(tables=tables / max(1, adapter + learns))
    memory = peak_memory(
        machine,
        frozen=IMAGE_WEIGHTS + (0 if whole else shape.params),
        frozen_dtype=dtype,
        trainable=adapter + learns,
        state=state,
        async_save=spec.trainer.async_save,
        activations=_activations(spec, machine, shape, lora=lora, rows=rows, row=row, trained=trained),
        caches=4 * _WORDS * shape.d_model,
    )
    memory["weights"] += 4 * (of.parameters - learns + sounds.parameters)
    trainable = adapter + of.parameters + sounds.parameters
    steps = spec.frozen.steps + spec.adapt.steps
    return Estimate(
        stage=spec.kind,
        samples=dict(known),
        params_trainable=trainable,
        params_frozen=IMAGE_WEIGHTS + (0 if whole else shape.params),
        tokens=steps * rows * row,
        image_tokens=steps * spec.batch_size * of.slots,
        flops=flops + words + pictures * _IMAGE_FLOPS_224 * side**2,
        memory=memory,
        disk_bytes=checkpoint_bytes(weights=4 * trainable, trainable=trainable, keep=2, state=state) * 2,
        home_bytes=2 * picture.side**2 * picture.width * kept if spec.cache else 0,
        seconds=(low + seconds[0], high + seconds[1]),
        notes=(*_notes(spec, of, picture, steps=steps, whole=whole), *sounds.notes),
        slots=of.slots,
    )


def _rows(spec: Tune, slots: int) -> tuple[int, int]:
    """Rows of a batch, and places of a row."""
    sample = _TEXT_TOKENS + slots
    if not spec.packing:
        return spec.batch_size, math.ceil(sample / _FILLED)
    row = spec.row or max(_ROW, 2 * sample)
    return math.ceil(spec.batch_size * sample / (_FILLED * row)), row


def _activations(
    spec: Tune, machine: Machine, shape: DecoderShape, *, lora: Lora | None, rows: int, row: int, trained: int
) -> int:
    """Live bytes of a micro-batch, with what head and loss need."""
    pieces, gradients = spec.trainer.pieces(spec.batch_size), "through" if lora else "full"
    kept = decoder_activations(
        shape,
        rows=math.ceil(rows / pieces),
        length=row,
        dtype=machine.dtype,
        gradients=gradients,
        attention="eager",
        lora=lora,
        recompute=spec.trainer.recompute,
    )
    at_once = math.ceil(trained / pieces)
    head = spec.trainer.head
    return kept + head_bytes(shape, at_once, dtype=machine.dtype, gradients=gradients, head=head, device=machine.device)


def _work(
    spec: Tune, shape: DecoderShape, of: ConnectorAccount, *, rows: int, row: int, adapter: int
) -> tuple[float, float, int]:
    """Operations of the decoder's phases and of the first one, and positions whose scores a step computes."""
    trained = spec.batch_size * _TRAINED_TOKENS
    whole = spec.adapt.rank == 0
    steps = spec.frozen.steps + spec.adapt.steps
    gradients = "full" if whole else "through"
    again = spec.trainer.recompute
    flops = steps * decoder_flops(
        shape, rows=rows, length=row, gradients=gradients, head_positions=trained, recompute=again
    )
    flops += linear_flops(adapter, steps * rows * row, "full") + linear_flops(of.inside, steps * rows * row, "full")
    judged = judged_samples(spec.trainer, spec.frozen.steps, spec.adapt.steps) / spec.batch_size
    flops += judged * decoder_flops(shape, rows=rows, length=row, gradients="none", head_positions=trained)
    if isinstance(spec.connector, specs.Words):
        return flops, 3.0 * of.flops * spec.words.steps * spec.words.batch_size, trained
    return flops + 3.0 * of.flops * steps * spec.batch_size, 0.0, trained


def _encoded_anew(spec: Tune) -> int:
    """Pictures that go through the tower where no features are kept: those of every step."""
    words = spec.words.steps * spec.words.batch_size if isinstance(spec.connector, specs.Words) else 0
    return words + (spec.frozen.steps + spec.adapt.steps) * spec.batch_size


def _picture(spec: Tune, before: Mapping[str, Estimate]) -> _Picture:
    tower = before.get("pretrain") if spec.image_tower == "pretrain" else None
    if tower is not None and tower.d_image:
        return _Picture(tower.d_image, max(1, math.isqrt(tower.cells)), known=True)
    if isinstance(spec.connector, specs.Words):  # a map is averaged to what is joined
        return _Picture(IMAGE_WIDTH, spec.connector.shuffle, known=spec.image_tower == "efficientnet-lite0")
    side = math.ceil((spec.resolution or 224) / _IMAGE_REDUCTION)
    return _Picture(IMAGE_WIDTH, side, known=spec.image_tower == "efficientnet-lite0")


def _check_context(spec: Tune, of: ConnectorAccount) -> None:
    """Refuse a new decoder that is too short for a picture and a question."""
    if isinstance(spec.decoder, str) or of.slots + _TEXT_TOKENS <= spec.decoder.context:
        return
    raise ConfigError(
        f"a picture takes {of.slots} places and a question with its answer about {_TEXT_TOKENS}, the decoder has "
        f"{spec.decoder.context}",
        place=f"stages.{spec.kind}.decoder.context",
        remedy=f"set {of.slots + _TEXT_TOKENS} or more, or a connector that makes fewer tokens",
    )


class _Sounds(NamedTuple):
    """What hearing adds."""

    parameters: int = 0
    notes: tuple[str, ...] = ()


def _sounds(spec: Tune, shape: DecoderShape) -> _Sounds:
    from plait.models.connectors.measure import connector_account

    if not spec.audio_tower:
        return _Sounds()
    with named_setting(f"stages.{spec.kind}.audio_connector"):
        of = connector_account(
            spec.audio_connector,
            cells=(1, _SOUND_TOKENS),
            d_in=_WHISPER_WIDTH,
            d_out=shape.d_model,
            layers=shape.layers,
        )
    return _Sounds(
        of.parameters,
        (
            f"audio connector {spec.audio_connector.kind}: {of.parameters:,} weights, {of.tokens} tokens a question of "
            f"{_SOUND_TOKENS / 50:.1f} s",
            "sounds are encoded once, 0.1 to 2 s each; neither that nor the audio tower is counted here",
        ),
    )


def decoder_shape(spec: Tune) -> DecoderShape:
    """Sizes of the decoder; of a folder, those of SmolLM2 are taken."""
    if isinstance(spec.decoder, str):
        return SMOLLM2_135M
    new = spec.decoder
    return DecoderShape(
        layers=new.depth,
        d_model=new.d,
        d_ff=new.d_ff or 4 * new.d,
        heads=new.heads,
        kv_heads=new.kv_heads or new.heads,
        vocab=_VOCABULARY,
        tied=new.tied,
        experts=new.mixture.experts if new.mixture else 0,
        top_k=new.mixture.top_k if new.mixture else 1,
    )


def _adapter(shape: DecoderShape, lora: Lora | None) -> int:
    """Weights of adapters on the layers that are known by name."""
    assert lora is not None
    there = tuple(target for target in lora.targets if target in shape.matrices())
    return Lora(rank=lora.rank, targets=there).params(shape)


def _notes(spec: Tune, of: ConnectorAccount, picture: _Picture, *, steps: int, whole: bool) -> tuple[str, ...]:
    first = f"{spec.words.steps:,} steps on words, then " if isinstance(spec.connector, specs.Words) else ""
    places = f"{of.slots} of the text" if of.slots == of.tokens else f"{of.slots} place, read inside the decoder"
    notes = [
        f"{first}{steps:,} steps of {spec.batch_size} questions",
        f"connector {spec.connector.kind}: {of.parameters:,} weights, {of.tokens} tokens a picture ({places}), "
        f"{of.flops / 1e6:,.1f} MFLOP",
    ]
    if whole:
        notes.append("the decoder is trained as a whole")
    decoder = isinstance(spec.decoder, str) and spec.decoder != "smollm2"
    sizes = [name for name, guessed in (("the tower's", not picture.known), ("the decoder's", decoder)) if guessed]
    guessed = f"{' and '.join(sizes)} sizes and all " if sizes else ""
    notes.append(f"{guessed}speeds are those of efficientnet-lite0 and SmolLM2-135M")
    return tuple(notes)
