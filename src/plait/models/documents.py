"""Attention of packed rows, document by document: scores between documents of one row are never computed.

A row of length t that holds documents of lengths l needs ``sum l**2`` scores a head, not ``t**2``. On a GPU kernels for
ragged rows do this (FlashAttention's "varlen", arXiv 2307.08691); torch has none for CPUs. Here documents are gathered
into a few batches of nearly equal length, and each batch is one ordinary causal attention. Values are those of the
family's own eager attention under a block-diagonal mask.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

NAME = "plait_documents"
"""What transformers calls this attention."""

_KNOWN = frozenset({"scaling", "dropout", "sliding_window", "position_ids", "cache_position", "use_cache", "is_causal"})
"""Options of an attention that change nothing here, or that are looked at."""

_WASTE = 0.75  # a document shorter than this share of the longest of its batch begins a new batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Documents:
    """Where the documents of packed rows are.

    Attributes:
        places: Of each batch of documents (``doc l``), the places of their tokens in the flattened ``b t``; what is
            beyond a document's end repeats its first place.
        real: Which of these are tokens.
        longest: Tokens of the longest document.
        masks: Masks that say the same. A layer that is given another one has changed it, and attends under that.
    """

    places: Sequence[Int[Tensor, "_ _"]]
    real: Sequence[Bool[Tensor, "_ _"]]
    longest: int
    masks: Sequence[Tensor] = ()

    @classmethod
    def of(cls, segment_ids: Int[Tensor, "b t"], masks: Sequence[Tensor] = ()) -> Documents:
        """Find them: runs of one segment in a row; segment 0 is padding.

        Args:
            segment_ids: Documents of each row.
            masks: See :class:`Documents`.

        Example:
            >>> found = Documents.of(torch.tensor([[1, 1, 1, 2, 2, 2, 0], [1, 0, 0, 0, 0, 0, 0]]))
            >>> [places.tolist() for places in found.places]
            [[[0, 1, 2], [3, 4, 5]], [[7]]]
        """
        rows, t = segment_ids.shape
        number = (torch.arange(rows, device=segment_ids.device)[:, None] * (t + 1) + segment_ids).flatten()
        at = segment_ids.flatten().nonzero()[:, 0]
        _, lengths = number[at].unique_consecutive(return_counts=True)
        starts = at[lengths.cumsum(0) - lengths]
        order = lengths.argsort(descending=True, stable=True)
        sizes: list[int] = lengths[order].tolist()
        bounds: list[int] = []
        for place, size in enumerate(sizes):
            if not bounds or size < _WASTE * sizes[bounds[-1]]:
                bounds.append(place)
        places, real = [], []
        for begin, end in pairwise([*bounds, len(sizes)]):
            chosen = order[begin:end]
            offsets = torch.arange(sizes[begin], device=segment_ids.device)
            inside = offsets < lengths[chosen, None]
            places.append(starts[chosen, None] + offsets * inside)
            real.append(inside)
        return cls(places=places, real=real, longest=max(sizes, default=0), masks=masks)


def read_by_document(decoder: nn.Module) -> bool:
    """Let a Hugging Face decoder attend document by document where it is told the documents, eagerly elsewhere.

    (Torch's fused attention for CPUs is slower on documents of some hundred tokens, in the backward pass.)

    Args:
        decoder: Any causal language model.

    Returns:
        Whether it can: its attention goes through transformers' interface. If not, it is always eager.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    able = hasattr(sys.modules[type(decoder).__module__], "eager_attention_forward")
    if able:
        AttentionInterface.register(NAME, attention)
        AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    decoder.set_attn_implementation(NAME if able else "eager")  # pyright: ignore[reportCallIssue]
    return able


def documents_for(
    decoder: nn.Module, segment_ids: Int[Tensor, "b t"], masks: Tensor | Mapping[str, Tensor]
) -> dict[str, Documents]:
    """What to call a decoder with besides its masks: the documents, if :func:`read_by_document` was done.

    Args:
        decoder: Any causal language model.
        segment_ids: Documents of each row; 0 is padding.
        masks: What it is called with, for all layers or by their kind.
    """
    if getattr(getattr(decoder, "config", None), "_attn_implementation", "") != NAME:
        return {}
    given = [masks] if isinstance(masks, Tensor) else list(masks.values())
    return {"documents": Documents.of(segment_ids, given)}


def attention(  # noqa: PLR0917 (transformers calls it so)
    module: nn.Module,
    query: Float[Tensor, "b h t d"],
    key: Float[Tensor, "b k s d"],
    value: Float[Tensor, "b k s e"],
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Float[Tensor, "b t h e"], Tensor | None]:
    """What transformers calls in each layer.

    Without ``documents`` among the options, under a mask that is none of theirs, or with an option that this attention
    does not know, the family's own eager attention runs under the mask.
    """
    documents: Documents | None = options.pop("documents", None)
    if documents is not None and _says_all(documents, attention_mask, options):
        return attend_documents(query, key, value, documents=documents, scaling=options["scaling"]), None
    eager = sys.modules[type(module).__module__].eager_attention_forward
    return eager(module, query, key, value, attention_mask, **options)


def _says_all(documents: Documents, mask: Tensor | None, options: Mapping[str, Any]) -> bool:
    """Whether the documents say all that a layer wants."""
    if mask is None or all(mask.data_ptr() != known.data_ptr() for known in documents.masks):
        return False
    if options.get("scaling") is None or options.get("dropout"):
        return False
    window = options.get("sliding_window")
    if window is not None and window < documents.longest:
        return False
    return all(value is None or value is False or name in _KNOWN for name, value in options.items())


def attend_documents(
    query: Float[Tensor, "b h t d"],
    key: Float[Tensor, "b k t d"],
    value: Float[Tensor, "b k t e"],
    *,
    documents: Documents,
    scaling: float,
) -> Float[Tensor, "b t h e"]:
    """``softmax(scaling * q k^T) v``, causal within each document; zero at padding.

    Args:
        query: Of all heads.
        key: Of as many heads or fewer: each serves ``h / k`` query heads in turn (grouped queries).
        value: Likewise; of another width in some families.
        documents: Of these very rows.
        scaling: Of the scores.
    """
    rows, heads, t, width = query.shape
    groups, shared = key.shape[1], heads // key.shape[1]
    flat_q, flat_k, flat_v = (x.transpose(1, 2).reshape(rows * t, -1) for x in (query, key, value))
    wide = value.shape[-1]
    out = query.new_zeros(rows * t, heads * wide)
    for places, real in zip(documents.places, documents.real, strict=True):
        count, length = places.shape
        index = places.flatten()
        q = flat_q.index_select(0, index).view(count, length, groups, shared, width)
        k = flat_k.index_select(0, index).view(count, length, groups, width)
        v = flat_v.index_select(0, index).view(count, length, groups, wide)
        q = q.permute(0, 2, 3, 1, 4).reshape(count * groups, shared * length, width)
        k = k.permute(0, 2, 3, 1).reshape(count * groups, width, length)
        v = v.transpose(1, 2).reshape(count * groups, length, wide)
        # Tokens beyond a document's end come last, so that the causal mask alone hides them.
        later = torch.full((length, length), torch.finfo(q.dtype).min, dtype=q.dtype, device=q.device).triu(1)
        scores = torch.baddbmm(later.repeat(shared, 1), q, k, alpha=scaling)
        # Of 16-bit scores, torch takes the softmax in float32 and rounds once; backward keeps that one result.
        found = torch.bmm(scores.softmax(-1), v).view(count, groups, shared, length, wide)
        found = found.permute(0, 3, 1, 2, 4).reshape(count * length, heads * wide)
        kept = real.flatten()
        out = out.index_copy(0, index[kept], found[kept])
    return out.view(rows, t, heads, wide)
