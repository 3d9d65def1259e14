"""What a pretrain stage over views will need, from its settings alone; and what is refused before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING

from plait.core.errors import ConfigError
from plait.core.estimate import Estimate, Machine
from plait.data.sources import VALIDATION
from plait.objectives.specs import MoCo
from plait.stages.pretraining import needs
from plait.stages.validating import judged_samples
from plait.training.cost import linear_flops, time_range
from plait.training.parallel.share import Held, Member
from plait.training.peak import LEFT_BYTES, checkpoint_bytes, peak_memory

if TYPE_CHECKING:
    from plait.models.measure import Account
    from plait.stages.pretrain import Pretrain

_SECONDS_PER_VIEW = (0.0005, 0.006)
"""A picture decoded, cropped, recolored and blurred, up to 224 pixels a side."""
_EVALUATIONS = 7  # untrained, five times while training, at the end


def check_views(spec: Pretrain) -> None:
    """See that a tower can learn from views as asked; imports torch.

    Raises:
        ConfigError: MoCo, and a tower whose batch norms would give a query and its key away.
    """
    if not isinstance(spec.objective, MoCo) or isinstance(spec.image_tower, str):
        return
    import torch

    from plait.assembly.scratch import build_tower
    from plait.objectives.momentum import batch_norms

    with torch.device("meta"):
        found = batch_norms(build_tower(spec.image_tower))
    if found:
        raise ConfigError(
            f"a {spec.image_tower.kind} has {len(found)} batch norms, which take the statistics of a batch, in which a "
            "query of moco and its key give each other away",
            place="stages.pretrain.image_tower",
            remedy="take a tower with layer norms (vit, swin), or an objective that has no queue (nt-xent)",
        )


def of_views(spec: Pretrain, machine: Machine, samples: Mapping[str, int]) -> Estimate:
    """Needs of the stage.

    Args:
        spec: Its settings; the tower is one from scratch.
        machine: What this machine can do.
        samples: Pictures of each split that it uses.
    """
    assert not isinstance(spec.image_tower, str)
    tower, pixels = needs.tower_account(spec.image_tower), 3 * spec.image_tower.size**2
    number, queued = _views(spec), spec.objective if isinstance(spec.objective, MoCo) else None
    pictures, train = sum(samples.values()), max(samples.get("train", 0), 1)
    batch, steps = min(spec.batch_size, train), spec.steps_for(train)
    head = _head(spec, tower.d_out)
    trained, still = head + tower.trainable, tower.parameters - tower.trainable
    tests = _EVALUATIONS * sum(count for split, count in samples.items() if split != VALIDATION)
    tests += number * judged_samples(spec.trainer, steps)
    again = needs.again(spec, batch)
    passes = number * (3.0 + again) if queued is None else 4.0 + 2 * again
    tower_flops = tower.flops * (passes * batch * steps + tests)
    head_flops = linear_flops(head, round(passes / 3 * batch * steps), "full")
    head_flops += 6.0 * (number * batch) ** 2 * spec.d_shared * steps
    low, high = time_range(tower_flops + head_flops, machine, dtype="float32", efficiency=needs.TOWER_EFFICIENCY)
    made = number * batch * steps
    seconds = [
        needs.SECONDS_START[i]
        + made * _SECONDS_PER_VIEW[i] / max(1, spec.trainer.workers)
        + pictures * needs.SECONDS_PREPARED[i]
        for i in (0, 1)
    ]
    state = spec.trainer.state_bytes()
    depth = getattr(spec.image_tower, "depth", 0) if needs.tower_has_blocks(spec) else 0
    rest = head + (0 if depth else tower.trainable)
    held = Held(blocks=trained - rest, rest=rest, still_blocks=0, still_rest=0, layers=depth)
    queue = 4 * (trained + queued.queue * (spec.d_shared + 2)) if queued is not None else 0

    def moments(member: Member) -> dict[str, dict[str, int]]:
        own = member.rows(batch)
        memory = peak_memory(
            machine,
            trainable=trained,
            state=state,
            async_save=spec.trainer.async_save,
            activations=_activations(spec, tower, batch=batch, own=own),
            # Pixels of a step in 32 bits, there and on their way; those of tests on disk are mapped.
            caches=LEFT_BYTES + 2 * pixels * pictures + 8 * number * pixels * own + queue,
        )
        memory["weights"] += 4 * still
        early = 4 * head if needs.at_once(spec, own) == own else None
        return needs.moments_of(spec, member, memory, held=held, early=early)

    one = checkpoint_bytes(weights=4 * (trained + still), trainable=trained, state=state) + queue
    seen = made + tests
    return Estimate(
        stage=spec.kind,
        samples=samples,
        params_trainable=trained,
        params_frozen=still,
        tokens=seen * tower.tokens,
        image_tokens=seen * tower.tokens,
        flops=tower_flops + head_flops,
        **needs.by_member(spec, machine, moments, held=held, batch=batch),
        disk_bytes=needs.checkpoints_kept(spec, train) * one + pictures * 1_200,
        spare_bytes=one,
        home_bytes=2 * pixels * pictures,
        d_image=tower.d_out,
        cells=tower.tokens,
        seconds=(low + seconds[0], high + seconds[1]),
        notes=(
            f"{steps:,} steps of {number} views of {batch:,} pictures; the picture tower learns from scratch, without "
            f"texts: {spec.tower_name}, {tower.trainable:,} weights, {tower.tokens:,} tokens a view",
            f"a step is {passes:.3g} forward passes of {tower.flops / 1e9:,.2f} GFLOP for each of its pictures",
            f"{made:,} views are made, by {spec.trainer.workers or 'no'} workers beside training",
            *([_kept(queued, queue, train)] if queued is not None else []),
        ),
    )


def _views(spec: Pretrain) -> int:
    return spec.views.number if spec.views else 2


def _head(spec: Pretrain, width: int) -> int:
    """Weights of the head."""
    layers = spec.views.layers if spec.views else 2
    return sum((a + 1) * b for a, b in pairwise([width, *[spec.d_hidden] * (layers - 1), spec.d_shared]))


def _activations(spec: Pretrain, tower: Account, *, batch: int, own: int) -> int:
    """Of what goes through tower and head together; vectors of the whole batch, and a block of its scores.

    A query of MoCo's and its key go one after the other, the key without a graph.
    """
    queued = spec.objective if isinstance(spec.objective, MoCo) else None
    views = _views(spec)
    at_once = (1 if queued is not None else views) * needs.at_once(spec, own)
    layers = spec.views.layers if spec.views else 2
    inside = tower.d_out + 3 * spec.d_hidden * (layers - 1) + spec.d_shared
    scores = (views * batch) ** 2 if queued is None else batch * (queued.queue + 1)
    vectors = 2 * views * spec.d_shared * batch  # with their gradients
    return tower.kept_bytes * at_once + 4 * at_once * inside + 4 * vectors + 20 * min(scores, needs.SCORES)


def _kept(queued: MoCo, size: int, train: int) -> str:
    """What MoCo keeps, and whether that is too much."""
    said = f"a copy of the weights and {queued.queue:,} keys take {size / 2**20:,.0f} MiB"
    if queued.classes or queued.queue < train:
        return said
    return f"{said}; they are as many as there are pictures, so that an older key of a picture is its negative"
