"""What pretraining a language model of a size takes, from its number of weights and tokens alone.

Operations are ``6 N D`` (Kaplan et al. 2020, https://arxiv.org/abs/2001.08361, section 2.1): two a weight and token
forward, four backward. Attention is not in it; :func:`plait.training.cost.decoder_flops` counts it.
"""

from __future__ import annotations

from dataclasses import dataclass

from plait.training.cost import DecoderShape

_PER_LAYER = 128
"""Width over depth of a usual decoder (GPT-3 175B: 12,288 over 96 layers), and the width of its heads."""

_DAY = 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """What a training takes.

    Attributes:
        flops: Operations in all.
        petaflop_days: The same, in the unit of papers.
        seconds: On all devices together.
        device_hours: Over all devices.
        tokens_per_s: Of each device.
        state_bytes: Weights, gradients and Adam's moments in float32, over all devices once.
        tokens_per_weight: About 20 was best for a given number of operations (Hoffmann et al. 2022,
            https://arxiv.org/abs/2203.15556).
    """

    flops: float
    petaflop_days: float
    seconds: float
    device_hours: float
    tokens_per_s: float
    state_bytes: float
    tokens_per_weight: float


def scale(*, weights: float, tokens: float, devices: int, peak: float, mfu: float) -> Scale:
    """What so many weights and tokens take.

    Args:
        weights: N, those in matrix products.
        tokens: D, seen in training.
        devices: How many work on it.
        peak: Operations a second of each.
        mfu: Share of the peak that is reached.

    Example:
        >>> gpt3 = scale(weights=174.6e9, tokens=300e9, devices=1, peak=1e15, mfu=1.0)
        >>> f"{gpt3.flops:.3g} operations, {gpt3.petaflop_days:,.0f} petaFLOP/s-days"
        '3.14e+23 operations, 3,637 petaFLOP/s-days'
    """
    flops = 6 * weights * tokens
    seconds = flops / (devices * peak * mfu)
    return Scale(
        flops=flops,
        petaflop_days=flops / 1e15 / _DAY,
        seconds=seconds,
        device_hours=seconds * devices / 3_600,
        tokens_per_s=tokens / seconds / devices,
        state_bytes=16 * weights,
        tokens_per_weight=tokens / weights,
    )


def usual_shape(weights: float, *, vocab: int = 50_304) -> DecoderShape:
    """A decoder of about so many weights with usual proportions: ``12 L d^2`` in L layers of width d = 128 L.

    The feed-forward network is 8/3 as wide as the model, rounded to 128, with three matrices; heads are 128 wide. The
    vocabulary comes on top.

    Example:
        >>> shape = usual_shape(175e9)
        >>> shape.layers, shape.d_model, shape.heads
        (96, 12288, 96)
    """
    layers = max(1, round((weights / 12 / _PER_LAYER**2) ** (1 / 3)))
    d = _PER_LAYER * layers
    d_ff = _PER_LAYER * round(8 * d / 3 / _PER_LAYER)
    return DecoderShape(layers=layers, d_model=d, d_ff=d_ff, heads=layers, kv_heads=layers, vocab=vocab, tied=False)
