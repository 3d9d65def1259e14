"""What the tune stage will need, from its settings alone: nothing is written and no weight loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from plait.core.errors import ConfigError
from plait.core.estimate import Estimate, Machine
from plait.data.order import check_enough
from plait.models import specs
from plait.stages.stage import named_setting
from plait.stages.validating import judged_samples
from plait.training.cost import (
    BYTES,
    SMOLLM2_135M,
    DecoderShape,
    Gradients,
    Lora,
    decoder_activations,
    decoder_flops,
    head_bytes,
    linear_flops,
    time_range,
)
from plait.training.parallel.messages import messages
from plait.training.parallel.share import Held, Member, Model, by_process
from plait.training.peak import LEFT_BYTES, TOKENIZER_BYTES, checkpoint_bytes, checkpoints_left, in_turn, peak_memory

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
_TEXT_TOKENS, _TRAINED_TOKENS = 27, 3  # of a sample
_QUESTIONS, _QUESTION_BYTES = 5, 6_000  # of each picture, and what one takes in memory
_PACKED, _PADDED = 0.95, 0.9  # share of a row's places that are tokens
_SECONDS_START = (2.0, 20.0)
# Share of the measured matrix rate: where 16 bits are no more than a few times as fast, products take most of a step,
# as in float32; AMX makes them so fast that everything else does.
_DECODER_EFFICIENCY, _AMX_EFFICIENCY, _AMX = (0.12, 0.85), (0.12, 0.45), 4.0
_WHISPER_WIDTH, _SOUND_TOKENS = 384, 140  # of tiny.en; a spoken question takes 2.8 s, 50 tokens a second
_VOCABULARY = 49_152  # of a new decoder: the packaged tokenizer's
_TOKENIZER_FILES = 3_600_000  # in each checkpoint
_AT_ONCE, _MAP = 16, 96  # pictures encoded at once, and channels of the tower's largest map, of half their side


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
    if "train" in known and isinstance(spec.connector, specs.Words):
        _check_named(spec, train, processes=machine.processes)
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
    dtype = machine.dtype if spec.dtype == "auto" else spec.dtype
    flops, words, trained = _work(spec, shape, of, rows=rows, row=row, adapter=0 if whole else adapter)
    fast = dtype != "float32" and machine.gemm_bf16 > _AMX * machine.gemm_fp32
    low, high = time_range(flops, machine, dtype=dtype, efficiency=_AMX_EFFICIENCY if fast else _DECODER_EFFICIENCY)
    spare = time_range(words, machine, dtype="float32", efficiency=(0.15, 0.7))
    side = (spec.resolution or 224) / 224
    area = side**2 / (128 / 224) ** 2
    seconds = [_SECONDS_START[i] + pictures * _SECONDS_PER_PICTURE_128[i] * area + spare[i] for i in (0, 1)]
    parts = _Parts(
        shape=shape,
        lora=lora,
        adapter=adapter,
        connectors=of.parameters + sounds.parameters,
        learn=learns,
        pictures=kept * picture.side**2 * picture.width * 2 if spec.cache else 0,
        questions=train * _QUESTIONS,
    )
    sizes = _Sizes(rows=rows, row=row, trained=trained)
    peaks = by_process(
        spec.trainer.parallel,
        machine.processes,
        lambda member: _moments(spec, machine, parts, sizes=sizes, member=member),
        sent=lambda member: _sent(spec, machine, parts, sizes=sizes, member=member),
    )
    disk, spare = _disk(spec, parts)
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
        **peaks,
        disk_bytes=disk,
        spare_bytes=spare,
        home_bytes=2 * picture.side**2 * picture.width * kept if spec.cache else 0,
        seconds=(low + seconds[0], high + seconds[1]),
        notes=(*_notes(spec, of, picture, steps=steps, whole=whole), *sounds.notes),
        slots=of.slots,
        decoder=asdict(shape),
        decoder_dtype=dtype if isinstance(spec.decoder, str) and not whole else "float32",
        adapter=0 if whole else adapter,
        connectors=of.parameters + sounds.parameters,
        words=_WORDS * shape.d_model if isinstance(spec.connector, specs.Words) else 0,
    )


def _check_named(spec: Tune, pictures: int, *, processes: int) -> None:
    named, more = max(1, round(pictures * spec.words.share)), f"raise words.share above {spec.words.share:g}"
    what, place = "named pictures in the first phase", f"stages.{spec.kind}.words"
    check_enough(named, processes, what=what, place=place, remedy=more)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parts:
    """What a tune stage holds.

    Attributes:
        shape: Of the decoder.
        lora: Its adapter; None where it learns as a whole.
        adapter: Weights of the adapter, or of the decoder that learns as a whole.
        connectors: Weights of all connectors.
        learn: Those of them that learn beside the adapter.
        pictures: Bytes of the features of pictures.
        questions: How many there are.
    """

    shape: DecoderShape
    lora: Lora | None
    adapter: int
    connectors: int
    learn: int
    pictures: int
    questions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sizes:
    """A step, of all processes together: rows, places of each, and positions whose scores are computed."""

    rows: int
    row: int
    trained: int


def _dtype(spec: Tune, machine: Machine) -> str:
    return machine.dtype if spec.dtype == "auto" else spec.dtype


def _model(spec: Tune, machine: Machine, parts: _Parts, *, adapts: bool) -> Model:
    """What trains in the second phase, or, with an adapter or all of the decoder, in the third."""
    dtype, whole = _dtype(spec, machine), parts.lora is None
    learn = parts.learn if adapts else parts.connectors
    return Model(
        shape=parts.shape,
        # A decoder from scratch is float32 from the beginning; the tower has its own format.
        width=BYTES[dtype] if isinstance(spec.decoder, str) else 4,
        learns=adapts and whole,
        lora=parts.lora if adapts else None,
        adapter=parts.adapter if adapts and not whole else 0,
        beside=learn,
        media=parts.connectors,
        still=BYTES[dtype] * IMAGE_WEIGHTS + 4 * (parts.connectors - learn),
    )


def _moments(
    spec: Tune, machine: Machine, parts: _Parts, *, sizes: _Sizes, member: Member
) -> dict[str, dict[str, int]]:
    """Parts of memory before the first step, and in each phase, of one process."""
    shape, dtype = parts.shape, _dtype(spec, machine)
    held = TOKENIZER_BYTES * shape.vocab + parts.questions * _QUESTION_BYTES + parts.pictures
    words = 4 * _WORDS * shape.d_model if isinstance(spec.connector, specs.Words) else 0
    pieces = spec.trainer.pieces(spec.batch_size)
    frozen = _model(spec, machine, parts, adapts=False)

    def phase(own: Held, *, member: Member = member, activations: int = 0, tables: int = 0) -> dict[str, int]:
        state = spec.trainer.state_bytes(tables=tables / max(1, own.learn))
        found = peak_memory(
            machine,
            trainable=own.learn,
            state=state,
            async_save=spec.trainer.async_save,
            activations=activations,
            caches=held + words + (LEFT_BYTES if own.learn else 0),
        )
        found |= member.states(own, state=state, pieces=pieces, activations=found["activations"])
        # A table of words learns from the head on, before any block.
        return in_turn(found, early=4 * tables) if pieces == 1 else found

    maps = 3 * _AT_ONCE * _MAP * ((spec.resolution or 224) // 2) ** 2 * BYTES[dtype]
    still = frozen.bytes if not frozen.learns else 0
    everything = Held(blocks=0, rest=0, still_blocks=0, still_rest=still, layers=0)
    before = phase(everything, member=Member(), activations=0 if member.rank else maps)
    if dtype == "float32" and isinstance(spec.decoder, str):
        # The file's 16 bits are mapped until all weights are widened, which is before pictures are encoded.
        before["files"] = max(0, 2 * shape.params - before["activations"])
    moments = {"before": before}
    if isinstance(spec.connector, specs.Words):
        batch = member.data_only().rows(spec.words.batch_size)
        seen = 4 * batch * spec.connector.tokens * (3 * shape.d_model + _WORDS)
        reader = Held(blocks=0, rest=parts.connectors, still_blocks=0, still_rest=0, layers=0)
        first = phase(reader, member=member.data_only(), activations=seen)
        moments["words"] = first | {"weights": first["weights"] + still - 4 * parts.connectors}
    for name, adapts in (("connector", False), ("decoder", True)):
        if not (adapts or spec.frozen.steps):
            continue
        model = _model(spec, machine, parts, adapts=adapts)
        own = member.held(model)
        tables = min(own.rest, shape.vocab * shape.d_model * (1 if shape.tied else 2)) if model.learns else 0
        activations = _activations(spec, machine, model, sizes=sizes, member=member)
        moments[name] = phase(own, activations=activations, tables=tables)
        moments |= member.apart(name, own, moments[name], model=model.bytes)
    return moments


def _sent(spec: Tune, machine: Machine, parts: _Parts, *, sizes: _Sizes, member: Member) -> dict[str, int]:
    """Bytes that a process sends in a step of the third phase."""
    model = _model(spec, machine, parts, adapts=True)
    width = BYTES[_dtype(spec, machine)]
    return messages(
        member,
        model,
        positions=member.rows(sizes.rows) * member.length(sizes.row),
        micro=spec.trainer.pieces(spec.batch_size),
        width=width,
        stream=4 if model.learns else width,
        again=spec.trainer.recompute == "full",
    )


def _disk(spec: Tune, parts: _Parts) -> tuple[int, int]:
    """Bytes that the checkpoints of all phases leave, and those of the largest one, being written."""
    whole, drawn = parts.lora is None, not isinstance(spec.decoder, str)
    words = 4 * _WORDS * parts.shape.d_model if isinstance(spec.connector, specs.Words) else 0
    own = 4 * parts.connectors + words + _TOKENIZER_FILES * parts.shape.vocab // _VOCABULARY
    state = spec.trainer.state_bytes()
    early = own + (parts.shape.params * (4 if drawn else 2) if whole else 0)
    judged = spec.trainer.judged_every
    phases = {"words": (spec.words.steps, 0, 0), "connector": (spec.frozen.steps, spec.save_every, judged)}
    if not words:
        del phases["words"]
    sizes = [
        (
            checkpoint_bytes(weights=early, trainable=parts.connectors, state=state),
            checkpoints_left(steps, every, judged=looks),
        )
        for steps, every, looks in phases.values()
        if steps
    ]
    last = checkpoint_bytes(weights=own + 4 * parts.adapter, trainable=parts.adapter + parts.learn, state=state)
    sizes.append((last, checkpoints_left(spec.adapt.steps, spec.save_every, judged=judged)))
    return sum(size * left for size, left in sizes), max(size for size, _ in sizes)


def _rows(spec: Tune, slots: int) -> tuple[int, int]:
    """Questions of a batch, and the places that each takes of a row, whether it has one of its own or not."""
    sample = _TEXT_TOKENS + slots
    return spec.batch_size, math.ceil(sample / (_PACKED if spec.packing else _PADDED))


def _activations(spec: Tune, machine: Machine, model: Model, *, sizes: _Sizes, member: Member) -> int:
    """Live bytes of a process, of the micro-batches that it holds at once, with what head and loss need."""
    pieces = spec.trainer.pieces(spec.batch_size)
    dtype, shape = _dtype(spec, machine), member.decoder(model.shape, loads=model)
    gradients: Gradients = "full" if model.learns else "through"
    kept = member.kept(pieces) * decoder_activations(
        shape,
        rows=math.ceil(member.rows(sizes.rows) / pieces),
        length=member.length(sizes.row),
        dtype=dtype,
        gradients=gradients,
        attention=sizes.row,
        lora=model.lora,
        recompute=spec.trainer.recompute,
    )
    if not member.ends[1]:
        return kept
    at_once = math.ceil(sizes.trained / (member.spread * pieces))
    head = spec.trainer.head
    return kept + head_bytes(shape, at_once, dtype=dtype, gradients=gradients, head=head, device=machine.device)


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
    """Sizes of the decoder; of a folder whose sizes have other names than Llama's, those of SmolLM2 are taken."""
    if isinstance(spec.decoder, str):
        folder = Path(spec.decoder)
        return (DecoderShape.of_folder(folder) if (folder / "config.json").is_file() else None) or SMOLLM2_135M
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
    decoder = isinstance(spec.decoder, str) and spec.decoder != "smollm2" and decoder_shape(spec) == SMOLLM2_135M
    sizes = [name for name, guessed in (("the tower's", not picture.known), ("the decoder's", decoder)) if guessed]
    guessed = f"{' and '.join(sizes)} sizes and all " if sizes else ""
    notes.append(f"{guessed}speeds are those of efficientnet-lite0 and SmolLM2-135M")
    return tuple(notes)
