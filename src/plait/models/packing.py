"""Packed rows in a decoder of Hugging Face: who sees whom, for each kind of its layers, or why it cannot be told.

A row holds several samples; each must be what it is in a row of its own. That takes positions that begin anew with each
sample (:func:`plait.models.attention.positions`), and attention in blocks along the diagonal. The masks of
transformers, made from a row of ones, would know neither.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from plait.core.errors import ConfigError
from plait.models.attention import causal_mask, positions
from plait.models.documents import NAME as BY_DOCUMENT
from plait.models.sequence.decoder import NAME as SHARED

_SEES = frozenset({"full_attention", "sliding_attention"})
_STANDARD = frozenset({"eager", "sdpa", BY_DOCUMENT})


def packed_masks(
    decoder: nn.Module, segment_ids: Int[Tensor, "b t"], dtype: torch.dtype
) -> Float[Tensor, "b 1 t t"] | Bool[Tensor, "b t"] | dict[str, Tensor]:
    """Additive masks: each position sees what stands before it in its sample, as far back as the layer looks.

    Args:
        decoder: Its configuration says the kinds of its layers and how far those of a window look back.
        segment_ids: Samples of each row; 0 is padding, which sees itself.
        dtype: Of the masks.

    Returns:
        One mask for all layers, or one for each kind, as transformers takes them. Where rows are shared among
        processes, attention is told the samples themselves: then only which positions are none.

    Raises:
        ConfigError: Rows hold several samples, and layers hand on a state (convolution, recurrence), which no mask
            keeps inside a sample; or the attention takes no such masks.
    """
    config: Any = getattr(decoder, "config", None)
    if getattr(config, "_attn_implementation", "") == SHARED:
        return segment_ids != 0
    mask = causal_mask(segment_ids, dtype)
    if config is None:
        return mask
    kinds = frozenset(getattr(config, "layer_types", None) or ())
    if int(segment_ids.max()) > 1:
        _check(decoder, config, kinds)
    window = getattr(config, "sliding_window", None)
    place = positions(segment_ids)
    if not window or int(place.max()) < window or (kinds and "sliding_attention" not in kinds):
        return mask
    far = (place[:, :, None] - place[:, None, :] >= window)[:, None]
    near = mask.masked_fill(far, torch.finfo(dtype).min)
    return {"full_attention": mask, "sliding_attention": near} if kinds else near


def _check(decoder: nn.Module, config: Any, kinds: frozenset[str]) -> None:
    place, name = "decoder", str(config.model_type)
    if getattr(decoder, "_is_stateful", False) or not kinds <= _SEES:
        other = ", ".join(sorted(kinds - _SEES)) or "a recurrent state"
        raise ConfigError(
            f"rows hold several samples, and {name} has layers ({other}) that hand on from one sample to the next",
            place=place,
            remedy="put one sample into a row, or use a decoder that only has attention",
        )
    how = getattr(config, "_attn_implementation", None) or "eager"
    if how not in _STANDARD:
        raise ConfigError(
            f"rows hold several samples, and {name} has attention {how!r}, which takes no masks of samples",
            place=place,
            remedy="load the decoder with attention 'sdpa' or 'eager'",
        )
