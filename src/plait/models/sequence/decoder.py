"""A decoder of Hugging Face over shared rows: its blocks compute this process's positions, attention goes over all.

Whatever else a block does (norms, projections, feed-forward, experts) is done position by position, so that it needs
nothing of the other processes, and keeps only its own positions for the backward pass.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn

from plait.core.errors import ConfigError
from plait.models.crossattend import ReadingLayer
from plait.models.documents import Documents, attend_documents
from plait.models.recompute import blocks_of
from plait.models.sequence.placement import Placement
from plait.models.sequence.ring import TILE, View, ring_attention
from plait.models.sequence.ulysses import repeats_of, ulysses

NAME = "plait_shared_rows"
"""What transformers calls this attention. No masks are registered under it: it is told segments instead."""

Exchange = Literal["ring", "ulysses"]
"""``ring`` passes keys and values on, ``ulysses`` deals out heads."""

_KNOWN = frozenset({"scaling", "dropout", "sliding_window", "position_ids", "cache_position", "use_cache", "is_causal"})
_SEES = frozenset({"full_attention", "sliding_attention"})
_PLACE = "trainer.parallel.context"


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedRows:
    """Rows of one batch, of which each process has a part.

    Attributes:
        segment_ids: Documents of the whole rows; 0 is padding.
        placement: Which positions each process has.
        group: The processes.
        exchange: How attention reaches the positions of others.
    """

    segment_ids: Int[Tensor, "b t"]
    placement: Placement
    group: dist.ProcessGroup | None
    exchange: Exchange
    _made: dict[Any, Any] = field(default_factory=dict[Any, Any])

    @classmethod
    def of(cls, segment_ids: Int[Tensor, "b t"], exchange: Exchange, *, group: dist.ProcessGroup | None) -> SharedRows:
        """Share rows so that all have the same to do: a ring in zigzag; heads are dealt out evenly anyway."""
        world, rank = (group.size(), group.rank()) if group is not None else (1, 0)
        order = "zigzag" if exchange == "ring" else "contiguous"
        placement = Placement.of(segment_ids.shape[1], order, world=world, rank=rank).to(segment_ids.device)
        return cls(segment_ids=segment_ids, placement=placement, group=group, exchange=exchange)

    def attend(
        self,
        query: Float[Tensor, "b h p d"],
        key: Float[Tensor, "b k p d"],
        value: Float[Tensor, "b k p e"],
        *,
        scaling: float,
        window: int = 0,
    ) -> Float[Tensor, "b p h e"]:
        """``softmax(scaling * q k^T) v`` over all positions of a document up to the query's own; zero at padding.

        Args:
            query: Of all heads, this process's positions.
            key: Of as many heads or fewer (grouped queries).
            value: Likewise; may be of another width.
            scaling: Of the scores.
            window: How far back a query looks; 0: to the start of its document.
        """
        # Under autocast, positions have turned queries and keys to another format than values have.
        kind = query.device.type
        same = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
        query, key, value = query.to(same), key.to(same), value.to(same)
        if self.exchange == "ring":
            view = self._once(("ring", window), lambda: self._view(window, whole=False))
            return ring_attention(query, key, value, view=view, scaling=scaling).transpose(1, 2)
        inner = partial(self._whole, scaling=scaling, window=window)
        return ulysses(query, key, value, attention=inner, group=self.group).transpose(1, 2)

    def _whole(self, query: Tensor, key: Tensor, value: Tensor, *, scaling: float, window: int) -> Tensor:
        """Over whole rows, of some heads; scores of long documents are not kept, as in a ring."""
        documents = self._once("documents", lambda: Documents.of(self.placement.pad(self.segment_ids, 1)))
        if documents.longest <= (min(window, TILE) if window else TILE):
            return attend_documents(query, key, value, documents=documents, scaling=scaling).transpose(1, 2)
        view = self._once(("whole", window), lambda: self._view(window, whole=True))
        return ring_attention(query, key, value, view=view, scaling=scaling)

    def _view(self, window: int, *, whole: bool) -> View:
        if not whole:
            return View(self.segment_ids, self.placement, group=self.group, window=window)
        padded = self.placement.pad(self.segment_ids, 1)
        return View(padded, Placement.of(padded.shape[1]), group=None, window=window)

    def _once(self, name: Any, make: Callable[[], Any]) -> Any:
        """Made for the first layer, used by all."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]


def attention(  # noqa: PLR0917 (transformers calls it so)
    module: nn.Module,
    query: Float[Tensor, "b h p d"],
    key: Float[Tensor, "b k p d"],
    value: Float[Tensor, "b k p e"],
    attention_mask: Tensor | None,
    *,
    shared_rows: SharedRows | None = None,
    **options: Any,
) -> tuple[Float[Tensor, "b p h e"], None]:
    """What transformers calls in each layer.

    Raises:
        ConfigError: The layer wants something that this attention does not do.
    """
    rows, config = shared_rows, getattr(module, "config", None)
    kinds = getattr(config, "layer_types", None) or ()
    window = options.get("sliding_window")
    why = ""
    if rows is None:
        why = "does not hand its arguments on to its attention"
    elif attention_mask is not None:
        why = "makes a mask of its own"
    elif options.get("dropout"):
        why = f"drops out {options['dropout']:g} of its attention's weights"
    elif unknown := [n for n, v in options.items() if n not in _KNOWN and v is not None and v is not False]:
        why = f"wants {unknown[0]!r} of its attention"
    elif options.get("is_causal") is False:
        why = "looks ahead"
    elif kinds and kinds[getattr(module, "layer_idx", 0)] == "sliding_attention" and not window:
        why = "does not tell its attention how far it looks back"
    if why or rows is None:
        raise _refused(f"{type(module).__name__} {why}")
    scaling = options.get("scaling")
    return rows.attend(
        query, key, value, scaling=query.shape[-1] ** -0.5 if scaling is None else scaling, window=window or 0
    ), None


class SharedDecoder:
    """Makes a decoder's blocks compute a part of each row, between :meth:`begin` and :meth:`end`.

    Before the first block each process cuts its positions out of the hidden states; behind the last one they are put
    back among zeros. Every process of the group calls the decoder with the same whole rows.

    Args:
        decoder: A causal language model of Hugging Face; it has hooks until :meth:`remove`.
        exchange: How attention reaches the positions of others.
        group: The processes that share rows.

    Raises:
        ConfigError: See :func:`check_shared`.
    """

    def __init__(self, decoder: nn.Module, exchange: Exchange, *, group: dist.ProcessGroup | None) -> None:
        from transformers import AttentionInterface

        check_shared(decoder, exchange, world=group.size() if group is not None else 1)
        self.decoder: Any = decoder
        self.exchange: Exchange = exchange
        self.group = group
        self.rows: SharedRows | None = None
        self._before = ""
        self._parts: dict[int, tuple[Tensor, Tensor]] = {}
        AttentionInterface.register(NAME, attention)
        blocks = blocks_of(decoder)
        self._hooks = [
            block.register_forward_pre_hook(partial(self._cut, first=number == 0), with_kwargs=True)
            for number, block in enumerate(blocks)
        ]
        self._hooks.append(blocks[-1].register_forward_hook(self._put))

    def begin(self, segment_ids: Int[Tensor, "b t"]) -> None:
        """The next passes, forward and backward, are over these rows.

        Args:
            segment_ids: Documents of the whole rows; 0 is padding.
        """
        if self.rows is None:
            self._before = self.decoder.config._attn_implementation
            self.decoder.set_attn_implementation(NAME)
        self.rows = SharedRows.of(segment_ids, self.exchange, group=self.group)
        self._parts.clear()

    def end(self) -> None:
        """The decoder is as before."""
        if self.rows is not None:
            self.decoder.set_attn_implementation(self._before)
            self.rows = None
            self._parts.clear()

    def remove(self) -> None:
        """Leave the decoder as it was found."""
        self.end()
        for hook in self._hooks:
            hook.remove()

    def _cut(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, first: bool
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """What a block gets: this process's positions of everything, and the rows for its attention."""
        if self.rows is None:
            return None
        given = dict(kwargs)
        hidden, *others = args or (given.pop("hidden_states"),)
        for name, value in [*given.items(), *(("an argument", other) for other in others)]:
            dim = next((dim for start, dim in _POSITIONS.items() if name.startswith(start)), None)
            if dim is not None:
                given[name] = self._of(value, dim)
            elif isinstance(value, Tensor) and not name.endswith("mask"):  # attention refuses masks
                raise _refused(f"{type(block).__name__} is given {name}, of which the positions are not known")
        hidden = self.rows.placement.cut(hidden, 1) if first else hidden
        if hidden.shape[1] != len(self.rows.placement.ranks[0]):
            raise _refused(f"{type(block).__name__} is given {hidden.shape[1]} positions, not its part of a row")
        return (hidden, *others), given | {"shared_rows": self.rows}

    def _of(self, value: Any, dim: int) -> Any:
        """Its part, cut once for all blocks."""
        assert self.rows is not None
        if isinstance(value, tuple | list):
            return tuple(self._of(one, dim) for one in value)
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self._parts:
            self._parts[id(value)] = value, self.rows.placement.cut(value, dim)
        return self._parts[id(value)][1]

    def _put(self, _: nn.Module, __: Any, output: Any) -> Any:
        """Hidden states of whole rows, zeros at the positions of others."""
        if self.rows is None:
            return output
        first, *rest = output if isinstance(output, tuple) else (output,)
        whole = self.rows.placement.put(first, 1)
        self._parts.clear()
        return (whole, *rest) if isinstance(output, tuple) else whole


_POSITIONS = {"position_embeddings": -2, "position_ids": -1, "cache_position": -1}
"""Arguments of a block that hold something for each position, by the start of their names, and in which dimension."""


def check_shared(decoder: nn.Module, exchange: Exchange, *, world: int) -> None:
    """See that a decoder's rows can be shared.

    Raises:
        ConfigError: Its attention cannot be replaced, or something else goes across positions or drops out by chance.
    """
    config: Any = getattr(decoder, "config", None)
    blocks = blocks_of(decoder)
    kinds = frozenset(getattr(config, "layer_types", None) or ())
    module = sys.modules[type(decoder).__module__]
    why = ""
    if config is None or not blocks or not hasattr(module, "eager_attention_forward"):
        why = "has no attention that can be replaced"
    elif getattr(decoder, "_is_stateful", False) or not kinds <= _SEES:
        why = f"has layers ({', '.join(sorted(kinds - _SEES)) or 'a recurrent state'}) that hand on a state"
    elif any(isinstance(part, nn.modules.conv._ConvNd) for block in blocks for part in block.modules()):
        why = "has convolutions over positions"
    elif any(isinstance(block, ReadingLayer) for block in blocks):
        why = "reads media inside, by cross-attention"
    elif dropped := [n for n in ("attention_dropout", "attn_pdrop", "layerdrop") if getattr(config, n, 0)]:
        why = f"has {dropped[0]} {getattr(config, dropped[0]):g}: attention over shared rows drops nothing"
    elif getattr(config, "attn_logit_softcapping", None) is not None:
        why = "caps the scores of its attention"
    if why:
        raise _refused(f"{type(decoder).__name__} {why}")
    if exchange == "ulysses":
        repeats_of(int(getattr(config, "num_attention_heads", 0)), 1, world=world)


def _refused(why: str) -> ConfigError:
    return ConfigError(
        f"rows cannot be shared among processes: {why}",
        place=_PLACE,
        remedy="set context to 1, or take a decoder of LLaMA's kin",
    )
