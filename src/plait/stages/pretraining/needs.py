"""What the pretrain stage will need, from its settings alone: nothing is written and no weight loaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from plait.core.estimate import Estimate, Machine, Peaks
from plait.data.order import check_enough
from plait.data.sources import VALIDATION
from plait.objectives.specs import OverViews
from plait.stages.pretraining.text_needs import TEXT_TOKENS, TEXT_WEIGHTS, Words
from plait.stages.stage import named_setting
from plait.stages.validating import judged_samples
from plait.training.cost import BYTES, linear_flops, time_range
from plait.training.parallel.messages import data_messages
from plait.training.parallel.share import Held, Member, by_process
from plait.training.peak import LEFT_BYTES, checkpoint_bytes, checkpoints_left, in_turn, peak_memory

if TYPE_CHECKING:
    from plait.models.measure import Account
    from plait.models.specs import QFormerShape, ScratchImage
    from plait.stages.pretrain import Pretrain

# Sizes of the default towers; tests compare them with the weights.
IMAGE_WEIGHTS, IMAGE_WIDTH = 4_652_008, 1280
VOCABULARY = 30_523  # minilm's tokens, and the one that begins a text to be written
_IMAGE_FLOPS_224 = 0.77e9  # a picture of 224 pixels
_WRITTEN = 5  # of them trained where a text is written
# Measured on one core, features in bfloat16 at 160 pixels: 61 to 92 pictures a second.
_SECONDS_PER_PICTURE_160 = (0.010, 0.025)
SECONDS_START = (1.0, 15.0)  # imports and loading the towers
_HEAD_EFFICIENCY = (0.15, 0.7)

SECONDS_PREPARED = (0.0005, 0.004)  # a picture decoded, scaled and kept as pixels, up to 224 of them a side
# Of a tower that learns, float32, by CPU time: EfficientNet-Lite 0.13, Swin 0.29, ViT 0.40, ResNet 0.42 at 64 pixels.
TOWER_EFFICIENCY = (0.12, 0.7)
_AT_ONCE, _MAP = 16, 96  # pictures encoded at once, and channels of the tower's largest map, of half their side
_QUERY_EFFICIENCY = (0.15, 0.8)  # 0.5 was measured, 20 steps of 128 pairs at width 128
_JUDGED = 16  # nearest names of a picture that are judged again
SCORES = 2**22  # of a batch with itself, in a block; a test compares it with the objective's
_EVALUATIONS = 7  # untrained, five times while training, at the end


def tower_account(spec: ScratchImage) -> Account:
    """What a tower from scratch costs; imports torch.

    Raises:
        ConfigError: Its sizes do not fit together.
    """
    from plait.assembly.scratch import build_tower
    from plait.models.measure import account

    with named_setting("stages.pretrain.image_tower"):
        return account(lambda: build_tower(spec), spec.size)


def estimate(spec: Pretrain, machine: Machine, samples: Mapping[str, int]) -> Estimate:
    """Needs of the stage.

    Args:
        spec: Its settings.
        machine: What this machine can do.
        samples: Pictures of each split that it uses.

    Raises:
        ConfigError: It cannot be run so: there are fewer pictures than processes, or its parts do not fit together.
    """
    if "train" in samples:
        number, place = samples["train"], f"stages.{spec.kind}"
        check_enough(
            number, machine.processes, what="training pictures", place=place, remedy="give the data stage more"
        )
    if spec.qformer is not None:
        return _queries(spec, spec.qformer, machine, samples=samples)
    if isinstance(spec.objective, OverViews):
        from plait.stages.pretraining.view_needs import of_views

        return of_views(spec, machine, samples)
    if isinstance(spec.image_tower, str):
        found = _frozen(spec, machine, samples)
    else:
        tower = tower_account(spec.image_tower)
        found = _learning(spec, machine, samples, tower=tower, pixels=3 * spec.image_tower.size**2)
    if spec.spoken is None:
        return found
    from plait.stages.pretraining.hearing_needs import with_sounds

    return with_sounds(spec, spec.spoken, machine, found=found, samples=samples)


def checkpoints_kept(spec: Pretrain, train: int) -> int:
    """Checkpoints that stay."""
    return checkpoints_left(spec.steps_for(max(train, 1)), spec.save_every, judged=spec.trainer.judged_every)


def _encoding(spec: Pretrain, machine: Machine, *, image: bool, encodes: bool = True) -> dict[str, int]:
    """Parts of memory before the first step: the text tower comes from a file in float32, then pictures are encoded.

    Of several processes the first one encodes.
    """
    dtype = machine.dtype if spec.tower_dtype == "auto" else spec.tower_dtype
    text = TEXT_WEIGHTS if isinstance(spec.text_tower, str) else 0
    side = spec.resolution or 224
    maps = 3 * _AT_ONCE * _MAP * (side // 2) ** 2 * BYTES[dtype] if image and encodes else 0
    parts = peak_memory(
        machine,
        frozen=text + (IMAGE_WEIGHTS if image else 0),
        frozen_dtype=dtype,
        activations=maps,
    )
    file = 0 if dtype == "float32" else 4 * text  # is given back before pictures are encoded
    more = max(0, file - parts["activations"])
    return parts | ({"files": more} if more else {})


def query_weights(spec: Pretrain, shape: QFormerShape, *, d_image: int, vocabulary: int) -> int:
    """Weights of a Q-Former that reads text, with its three heads and the scale.

    Args:
        spec: Settings of the stage.
        shape: Of the Q-Former.
        d_image: Width of the tower's features.
        vocabulary: Token ids, the one that begins a text to be written included.
    """
    d, looks = shape.d, math.ceil(shape.depth / shape.every)
    norm, square = 2 * d, d * d + d
    feed_forward = 8 * d * d + 5 * d + norm
    blocks = shape.depth * (4 * square + norm + 2 * feed_forward)
    cross = looks * (2 * square + 2 * (d_image * d + d) + norm)
    table = (vocabulary + spec.max_tokens + shape.queries) * d + norm
    heads = 2 * (d * spec.d_shared + spec.d_shared) + (2 * d + 2) + (square + norm + vocabulary) + 1
    return blocks + cross + table + heads


def _queries(spec: Pretrain, shape: QFormerShape, machine: Machine, *, samples: Mapping[str, int]) -> Estimate:
    """BLIP-2's first stage on features of a frozen tower."""
    pictures, train = sum(samples.values()), max(samples.get("train", 0), 1)
    batch, steps = min(spec.batch_size, train), spec.steps_for(train)
    side = (spec.resolution or 224) / 224
    cells = math.ceil((spec.resolution or 224) / 32) ** 2
    state = spec.trainer.state_bytes()
    d, looks = shape.d, math.ceil(shape.depth / shape.every)
    weights = query_weights(spec, shape, d_image=IMAGE_WIDTH, vocabulary=VOCABULARY)
    # Forward passes of a pair: queries alone, text alone, three judgements, writing.
    tokens = 5 * shape.queries + 5 * TEXT_TOKENS
    passes = 2.0 * (12 * shape.depth * d * d * tokens + 2 * looks * d * d * 5 * shape.queries)
    passes += 2.0 * 2 * looks * IMAGE_WIDTH * d * 5 * cells + 2.0 * (TEXT_TOKENS - 1) * d * VOCABULARY
    tests = pictures - samples.get("train", 0)
    judged = 2 * _JUDGED * tests * passes  # each direction, in the end
    flops = 3.0 * passes * batch * steps + (_EVALUATIONS * tests * passes + judged) / 5
    low, high = time_range(flops, machine, dtype="float32", efficiency=_QUERY_EFFICIENCY)
    area = side**2 / (160 / 224) ** 2
    seconds = [SECONDS_START[i] + pictures * _SECONDS_PER_PICTURE_160[i] * area for i in (0, 1)]
    features = pictures * cells * IMAGE_WIDTH * 2
    seen = 4 * batch * (shape.depth * 40 * d * tokens + 5 * cells * (IMAGE_WIDTH + 2 * looks * d))
    memory = peak_memory(
        machine,
        frozen=IMAGE_WEIGHTS,
        frozen_dtype=machine.dtype if spec.tower_dtype == "auto" else spec.tower_dtype,
        trainable=weights,
        state=state,
        async_save=spec.trainer.async_save,
        activations=seen + 3 * 4 * batch * _WRITTEN * VOCABULARY,
        caches=features,
    )
    memory = in_turn(memory, early=4 * VOCABULARY * d)
    memory["caches"] += LEFT_BYTES
    one = checkpoint_bytes(weights=4 * weights, trainable=weights, state=state)
    return Estimate(
        stage=spec.kind,
        samples=samples,
        params_trainable=weights,
        params_frozen=IMAGE_WEIGHTS,
        tokens=steps * batch * (tokens + 5 * cells),
        image_tokens=steps * batch * 5 * cells,
        flops=flops + pictures * _IMAGE_FLOPS_224 * side**2,
        **by_process(
            spec.trainer.parallel,
            machine.processes,
            lambda _: {"before": _encoding(spec, machine, image=True), "training": memory},
        ),
        disk_bytes=checkpoints_kept(spec, train) * one + pictures * 600,
        spare_bytes=one,
        home_bytes=features + 4 * IMAGE_WEIGHTS,
        seconds=(low + seconds[0], high + seconds[1]),
        notes=(
            f"{steps:,} steps of {batch:,} pairs; a Q-Former with {shape.queries} queries learns on features that are "
            f"made once and kept in the cache ({features / 2**20:,.0f} MiB outside the run folder)",
            f"of its {weights:,} weights {VOCABULARY * d:,} are a table of {VOCABULARY:,} tokens; a pair passes it six "
            "times a step: queries, text, three judgements, writing",
            "sizes and speeds are those of efficientnet-lite0, the tokens those of minilm",
        ),
    )


def _heads(spec: Pretrain, widths: int) -> int:
    """Weights of both heads and the scale."""
    return (widths + 2 * spec.d_shared) * spec.d_hidden + 2 * (spec.d_hidden + spec.d_shared) + 1


def _head_flops(spec: Pretrain, heads: int, *, batch: int, steps: int) -> float:
    found = linear_flops(heads, batch * steps, "full") + 6.0 * batch * batch * spec.d_shared * steps
    return found + 2.0 * heads * again(spec, batch) * batch * steps


def _looks(spec: Pretrain, samples: Mapping[str, int], *, steps: int) -> int:
    """Pairs that are looked at beside training: test splits as often as answers are shown, and what judges."""
    tests = _EVALUATIONS * sum(count for split, count in samples.items() if split not in ("train", VALIDATION))
    return tests + judged_samples(spec.trainer, steps)


def at_once(spec: Pretrain, batch: int) -> int:
    """Pairs that go through the model together."""
    return min(spec.trainer.micro_batch or batch, batch)


def again(spec: Pretrain, batch: int) -> float:
    """Which part of a batch is embedded twice: all but the last micro-batch."""
    once = batch % at_once(spec, batch) or at_once(spec, batch)
    return (batch - once) / batch


def _head_activations(spec: Pretrain, widths: int, *, batch: int, own: int) -> int:
    """Of the heads for what goes through them together; vectors of the whole batch, and a block of its scores.

    Args:
        spec: Settings of the stage.
        widths: Of all features together.
        batch: Pairs of a batch.
        own: Of them those of this process.
    """
    micro = at_once(spec, own)
    vectors = 2 * 2 * spec.d_shared * batch if micro < batch else 0  # with their gradients
    return 4 * micro * (widths + 4 * spec.d_hidden + 3 * spec.d_shared) + 4 * vectors + 20 * min(batch * batch, SCORES)


def tower_has_blocks(spec: Pretrain) -> bool:
    """Whether a picture tower from scratch is a Transformer, whose blocks ZeRO gathers one after the other."""
    return getattr(spec.image_tower, "kind", "") in ("vit", "swin")


def moments_of(
    spec: Pretrain, member: Member, memory: dict[str, int], *, held: Held, early: int | None = None
) -> dict[str, dict[str, int]]:
    """Moments of one of several processes while heads, or a tower, learn.

    Args:
        spec: Settings of the stage.
        member: The process.
        memory: Parts, were it alone with its share of a batch.
        held: What learns.
        early: Bytes of the gradients that come first; None: activations and gradients are there together.
    """
    found = memory | member.states(held, state=spec.trainer.state_bytes(), activations=memory["activations"])
    still = memory["weights"] - 4 * held.learn  # in no piece
    found["weights"] += still
    found = found if early is None else in_turn(found, early=early)
    apart = member.apart("", held, found, model=4 * held.learn)
    for parts in apart.values():
        parts["weights"] += still
    return {"training": found, **apart}


def by_member(
    spec: Pretrain,
    machine: Machine,
    moments: Callable[[Member], dict[str, dict[str, int]]],
    *,
    held: Held,
    batch: int,
) -> Peaks:
    """What each process needs."""

    def sent(member: Member) -> dict[str, int]:
        own = member.rows(batch)
        return {"data": data_messages(member, held, micro=math.ceil(own / at_once(spec, own)))}

    return by_process(spec.trainer.parallel, machine.processes, moments, sent=sent)


def _frozen(spec: Pretrain, machine: Machine, samples: Mapping[str, int]) -> Estimate:
    pictures, train = sum(samples.values()), max(samples.get("train", 0), 1)
    texts = pictures + 2 * train * spec.keywords
    batch, steps = min(spec.batch_size, train), spec.steps_for(train)
    side = (spec.resolution or 224) / 224
    words = Words.of(spec.text_tower)
    widths = IMAGE_WIDTH + words.d_out
    heads = _heads(spec, widths)
    trained = heads + words.learn
    tests = _looks(spec, samples, steps=steps)
    word_flops = words.flops * ((3.0 + again(spec, batch)) * batch * steps + tests)
    head_flops = _head_flops(spec, heads, batch=batch, steps=steps)
    low, high = time_range(head_flops, machine, dtype="float32", efficiency=_HEAD_EFFICIENCY)
    slow, fast = time_range(word_flops, machine, dtype="float32", efficiency=TOWER_EFFICIENCY)
    text_flops, *text_s = words.once(texts)
    area = side**2 / (160 / 224) ** 2
    seconds = [SECONDS_START[i] + pictures * _SECONDS_PER_PICTURE_160[i] * area + text_s[i] for i in (0, 1)]
    cells = math.ceil((spec.resolution or 224) / 32) ** 2
    features = pictures * cells * IMAGE_WIDTH * 2
    state = spec.trainer.state_bytes()
    held = Held(blocks=words.blocks, rest=trained - words.blocks, still_blocks=0, still_rest=0, layers=words.layers)

    def moments(member: Member) -> dict[str, dict[str, int]]:
        memory = peak_memory(
            machine,
            frozen=IMAGE_WEIGHTS + words.frozen,
            frozen_dtype=machine.dtype if spec.tower_dtype == "auto" else spec.tower_dtype,
            trainable=trained,
            state=state,
            async_save=spec.trainer.async_save,
            activations=words.kept_bytes * at_once(spec, member.rows(batch))
            + _head_activations(spec, widths, batch=batch, own=member.rows(batch)),
            caches=pictures * (2 * cells + 4) * IMAGE_WIDTH + words.cached(texts),
        )
        before = _encoding(spec, machine, image=True, encodes=not member.rank)
        before["caches"] += features
        return {"before": before, **moments_of(spec, member, memory, held=held)}

    one = checkpoint_bytes(weights=4 * trained, trainable=trained, state=state)
    return Estimate(
        stage=spec.kind,
        samples=samples,
        params_trainable=trained,
        params_frozen=IMAGE_WEIGHTS + words.frozen,
        tokens=pictures * cells + texts * TEXT_TOKENS,
        image_tokens=pictures * cells,
        flops=pictures * _IMAGE_FLOPS_224 * side**2 + text_flops + word_flops + head_flops,
        **by_member(spec, machine, moments, held=held, batch=batch),
        disk_bytes=checkpoints_kept(spec, train) * one + pictures * 600,
        spare_bytes=one,
        home_bytes=features + 4 * IMAGE_WEIGHTS,
        seconds=(low + slow + seconds[0], high + fast + seconds[1]),
        notes=(
            f"{steps:,} steps of {batch:,} pairs; picture features are made once and kept in the cache "
            f"({features / 2**20:,.0f} MiB outside the run folder)",
            "sizes and speeds are those of efficientnet-lite0",
            words.note,
        ),
    )


def _held(spec: Pretrain, tower: Account, words: Words, *, heads: int) -> Held:
    """What ZeRO divides: towers that are Transformers block by block, the rest at once."""
    depth = getattr(spec.image_tower, "depth", 0) if tower_has_blocks(spec) else 0
    blocks = words.blocks + (tower.trainable if depth else 0)
    learn = heads + tower.trainable + words.learn
    return Held(blocks=blocks, rest=learn - blocks, still_blocks=0, still_rest=0, layers=depth + words.layers)


def _learning(spec: Pretrain, machine: Machine, samples: Mapping[str, int], *, tower: Account, pixels: int) -> Estimate:
    """With a picture tower from scratch: it runs forward and backward over each picture of each step.

    ``pixels`` counts the three channels of a picture.
    """
    pictures, train = sum(samples.values()), max(samples.get("train", 0), 1)
    texts = pictures + 2 * train * spec.keywords
    batch, steps = min(spec.batch_size, train), spec.steps_for(train)
    words = Words.of(spec.text_tower)
    widths = tower.d_out + words.d_out
    heads = _heads(spec, widths)
    trained, still = heads + tower.trainable + words.learn, tower.parameters - tower.trainable
    tests = _looks(spec, samples, steps=steps)
    passes = 3.0 + again(spec, batch)
    tower_flops = (tower.flops + words.flops) * (passes * batch * steps + tests)
    head_flops = _head_flops(spec, heads, batch=batch, steps=steps)
    low, high = time_range(tower_flops + head_flops, machine, dtype="float32", efficiency=TOWER_EFFICIENCY)
    text_flops, *text_s = words.once(texts)
    seconds = [SECONDS_START[i] + pictures * SECONDS_PREPARED[i] + text_s[i] for i in (0, 1)]
    micro = at_once(spec, batch)
    kept = (tower.kept_bytes + words.kept_bytes) * micro
    together = f"{micro:,} of which" if micro < batch else "all of which"
    text_dtype = machine.dtype if spec.tower_dtype == "auto" else spec.tower_dtype
    state = spec.trainer.state_bytes()
    held = _held(spec, tower, words, heads=heads)

    def moments(member: Member) -> dict[str, dict[str, int]]:
        own = member.rows(batch)
        memory = peak_memory(
            machine,
            frozen=words.frozen,
            frozen_dtype=text_dtype,
            trainable=trained,
            state=state,
            async_save=spec.trainer.async_save,
            activations=(tower.kept_bytes + words.kept_bytes) * at_once(spec, own)
            + _head_activations(spec, widths, batch=batch, own=own),
            # Pixels on disk are mapped, and a batch of them is there in 16 and in 32 bits.
            caches=LEFT_BYTES + 2 * pixels * pictures + 6 * pixels * own + words.cached(texts),
        )
        memory["weights"] += 4 * still
        before = _encoding(spec, machine, image=False)
        before["weights"] += 4 * (trained + still)
        early = 4 * heads if at_once(spec, own) == own else None
        return {"before": before, **moments_of(spec, member, memory, held=held, early=early)}

    one = checkpoint_bytes(weights=4 * (trained + still), trainable=trained, state=state)
    seen = batch * steps + tests
    return Estimate(
        stage=spec.kind,
        samples=samples,
        params_trainable=trained,
        params_frozen=words.frozen + still,
        tokens=seen * tower.tokens + texts * TEXT_TOKENS,
        image_tokens=seen * tower.tokens,
        flops=tower_flops + text_flops + head_flops,
        **by_member(spec, machine, moments, held=held, batch=batch),
        disk_bytes=checkpoints_kept(spec, train) * one + pictures * 600,
        spare_bytes=one,
        home_bytes=2 * pixels * pictures,
        d_image=tower.d_out,
        cells=tower.tokens,
        seconds=(low + seconds[0], high + seconds[1]),
        notes=(
            f"{steps:,} steps of {batch:,} pairs; the picture tower learns from scratch: "
            f"{spec.tower_name}, {tower.trainable:,} weights, "
            f"{tower.tokens:,} tokens a picture",
            f"a step is {passes:.3g} forward passes of {tower.flops / 1e9:,.2f} GFLOP for each of its pictures, "
            f"{together} are held at once: {kept / 2**20:,.0f} MiB of activations; a smaller trainer.micro_batch takes "
            "less",
            f"pixels are made once and kept in the cache ({2 * pixels * pictures / 2**20:,.0f} MiB outside the run "
            "folder)",
            words.note,
        ),
    )
