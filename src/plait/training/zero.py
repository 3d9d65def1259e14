"""What each of N processes holds and sends in training, from counts alone: data parallel and ZeRO, in closed form.

Rajbhandari et al., ZeRO: memory optimizations toward training trillion parameter models,
https://arxiv.org/abs/1910.02054, sections 5 (memory) and 7 (communication).

Example:
    >>> for stage in (0, 1, 2, 3):  # figure 1 of the paper: 7.5 billion weights, 64 GPUs, Adam in mixed precision
    ...     held = zero_bytes(7_500_000_000, world=64, stage=stage, bytes_weight=2, bytes_gradient=2, bytes_state=12)
    ...     print(f"{sum(held.values()) / 1e9:.1f} GB")
    120.0 GB
    31.4 GB
    16.6 GB
    1.9 GB
"""

from __future__ import annotations

import math

STAGES = (0, 1, 2, 3)


def zero_bytes(
    weights: int,
    *,
    world: int,
    stage: int,
    bytes_weight: float | int = 4,
    bytes_gradient: float | int = 4,
    bytes_state: float | int = 8,
) -> dict[str, int]:
    """What a process holds of the model between two steps, by part (:data:`plait.training.peak.PARTS`).

    What is gathered for a moment, activations and buffers of messages come on top.

    Args:
        weights: Number of trained weights.
        world: Processes.
        stage: What is divided among them: 0 nothing (data parallel), 1 the optimizer's state, 2 gradients, too,
            3 weights, too.
        bytes_weight: Of a weight, in the format it is computed with.
        bytes_gradient: Of a weight's gradient.
        bytes_state: Of a weight's state in the optimizer, its float32 master included where there is one: 8 for Adam
            in float32, 12 in mixed precision.

    Raises:
        ValueError: There is no such stage, or no process.
    """
    _check(world, stage)
    each = {"weights": (bytes_weight, 3), "gradients": (bytes_gradient, 2), "optimizer": (bytes_state, 1)}
    return {
        part: math.ceil(size * (weights / world if stage >= divided else weights))
        for part, (size, divided) in each.items()
    }


def zero_traffic(
    blocks: int, rest: int, *, world: int, stage: int, passes: int = 1, bytes_number: int = 4
) -> dict[str, int]:
    """Bytes that a process sends in one step, by kind, where messages go around a ring (each gets as many, too).

    Data parallel sums the step's gradient, which is a reduce-scatter and an all-gather. Stage 1 gathers the weights
    once a step and sums their gradients once; stage 2 does both in every pass. Stage 3 gathers a block twice in every
    pass, forward and backward; what is in no block stays in between. That is how :mod:`plait.training.parallel` lays
    the stages out.

    Args:
        blocks: Number of trained weights in Transformer blocks.
        rest: And in the rest of the model.
        world: Processes.
        stage: See :func:`zero_bytes`.
        passes: Micro-batches a step.
        bytes_number: Of a weight and of its gradient in messages.

    Raises:
        ValueError: There is no such stage, or no process.
    """
    _check(world, stage)
    ring = bytes_number * (world - 1) / world  # a number's bytes, all-gathered or reduce-scattered
    every = passes if stage >= 2 else 1
    gathers = (2 if stage == 3 else 1) * blocks + rest
    return {"gathers": round(ring * every * gathers), "sums": round(ring * every * (blocks + rest))}


def _check(world: int, stage: int) -> None:
    if stage not in STAGES or world < 1:
        raise ValueError(f"stage {stage} in {world} processes; expected a stage of {STAGES} and one process or more")
