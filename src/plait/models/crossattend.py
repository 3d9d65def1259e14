"""Gated cross-attention inside a decoder: text reads media in between the decoder's own, frozen layers.

Alayrac et al., Flamingo, https://arxiv.org/abs/2204.14198, section 2.2 and figure 4.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from plait.core.errors import ConfigError, DataError
from plait.core.tensors import Patches
from plait.models.attention import Attention, Places
from plait.models.ragged import rows_by
from plait.models.transformer import FeedForward, TransformerSizes, norm_of


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaView:
    """What the cross-attention layers of one forward look at.

    Attributes:
        source: Media tokens of each row of the batch.
        mask: Which of them each text position sees.
        readers: Filled by the layers that did look, so that a decoder that keeps its arguments from its layers is seen.
    """

    source: Float[Tensor, "b s d"]
    mask: Bool[Tensor, "b 1 t s"]
    readers: set[int] = field(default_factory=set)


class GatedCrossAttention(nn.Module):
    """``x + tanh(a) cross(norm(x), media)``, then ``x + tanh(b) ff(norm(x))``, with a = b = 0 at the start.

    At the start it therefore changes nothing. A position that sees no media passes both steps unchanged, so that text
    without media is what the plain decoder makes of it, whatever else is in the batch; Flamingo and Idefics send such
    positions through the second step.

    Args:
        sizes: Width, heads and kind of norms and feed-forward network; ``d_source`` is the width of the media.

    Raises:
        ConfigError: The sizes have no ``d_source``.
    """

    def __init__(self, sizes: TransformerSizes) -> None:
        super().__init__()
        if not sizes.d_source:
            raise ConfigError("cross-attention needs the width of the media", remedy="set d_source")
        self.norm, self.feed_forward_norm = norm_of(sizes), norm_of(sizes)
        self.attention = Attention(sizes.attention(d_source=sizes.d_source))
        self.feed_forward = FeedForward(
            sizes.d,
            sizes.d_ff or 4 * sizes.d,
            activation=sizes.activation,
            gated=sizes.gated,
            bias=sizes.bias,
            dropout=sizes.dropout,
        )
        self.gate, self.feed_forward_gate = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def forward(
        self, x: Float[Tensor, "b t d"], media: MediaView, *, weights: list[Tensor] | None = None
    ) -> Float[Tensor, "b t d"]:
        """Read media.

        Args:
            x: Text; with a cache, its last positions.
            media: What it sees.
            weights: If given, attention weights are appended.
        """
        media.readers.add(id(self))
        wide = self.gate.dtype  # the decoder may be frozen in 16 bits while these learn in 32
        y = x.to(wide)
        source = media.source.to(wide)
        mask = media.mask[:, :, media.mask.shape[2] - x.shape[1] :]  # with a cache, text comes in pieces
        found = self.attention(self.norm(y), Places(mask=mask), source=source, need_weights=weights is not None)
        if weights is not None:
            weights.append(found.weights)
        y = y + self.gate.tanh() * found.values
        y = y + self.feed_forward_gate.tanh() * self.feed_forward(self.feed_forward_norm(y))
        return torch.where(mask.any(-1)[:, 0, :, None], y.to(x.dtype), x)


class ReadingLayer(nn.Module):
    """A decoder's layer behind a gated cross-attention; without media, the layer alone.

    Args:
        layer: The decoder's own.
        reads: What comes before it; None: nothing, the layer only takes the argument ``media`` away.
    """

    def __init__(self, layer: nn.Module, reads: GatedCrossAttention | None) -> None:
        super().__init__()
        self.layer, self.reads = layer, reads

    def forward(self, hidden_states: Tensor, *args: Any, media: MediaView | None = None, **kwargs: Any) -> Any:
        """Called by Hugging Face decoders, which hand all further arguments of theirs to every layer."""
        if media is not None and self.reads is not None:
            hidden_states = self.reads(hidden_states, media)
        return self.layer(hidden_states, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """What decoders ask of their layers, such as ``attention_type``."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)


def layers_of(decoder: nn.Module) -> nn.ModuleList:
    """The stack of a Hugging Face decoder: ``model.layers`` of LLaMA and its kin, ``transformer.h`` of GPT-2.

    Raises:
        ConfigError: Neither is there.
    """
    for path in ("model.layers", "transformer.h", "model.decoder.layers", "gpt_neox.layers"):
        try:
            found = decoder.get_submodule(path)
        except AttributeError:
            continue
        if isinstance(found, nn.ModuleList):
            return found
    raise ConfigError(
        f"{type(decoder).__name__} keeps its layers in no place that is known",
        remedy="use a decoder whose layers are model.layers or transformer.h",
    )


def install(decoder: nn.Module, reading: Sequence[GatedCrossAttention | None]) -> None:
    """Put cross-attentions before the layers of a decoder, in place.

    The decoder's weights keep their tensors; their names get a ``layer.`` in between, so save it, and attach adapters
    to it, inside :func:`plain`. Undone by :func:`remove`.

    Args:
        decoder: A causal language model of Hugging Face.
        reading: One entry a layer; None where nothing comes before it.

    Raises:
        ConfigError: The numbers differ, or there are cross-attentions already.
    """
    layers = layers_of(decoder)
    if len(reading) != len(layers):
        raise ConfigError(
            f"{len(reading)} entries for {len(layers)} layers", remedy="give one entry a layer, None for no reading"
        )
    if any(isinstance(layer, ReadingLayer) for layer in layers):
        raise ConfigError("this decoder reads media already", remedy="call remove first")
    if not any(reads is not None for reads in reading):
        raise ConfigError("no layer reads media", remedy="give at least one cross-attention")
    for i, reads in enumerate(reading):
        layers[i] = ReadingLayer(layers[i], reads)


def remove(decoder: nn.Module) -> list[GatedCrossAttention | None]:
    """Take the cross-attentions out again and return them; the decoder is as it was."""
    layers = layers_of(decoder)
    taken: list[GatedCrossAttention | None] = []
    for i, layer in enumerate(layers):
        if isinstance(layer, ReadingLayer):
            taken.append(layer.reads)
            layers[i] = layer.layer
    return taken


@contextmanager
def plain(decoder: nn.Module) -> Iterator[None]:
    """The decoder without its cross-attentions, in this block only: for whatever goes by names.

    Saving a Hugging Face folder, attaching or saving an adapter.
    """
    reading = remove(decoder)
    try:
        yield
    finally:
        if reading:
            install(decoder, reading)


def latest_item(
    media: Patches,
    *,
    item_row: Int[Tensor, " item"],
    marks: Bool[Tensor, "b t"],
    segment_ids: Int[Tensor, "b t"],
) -> MediaView:
    """Each text position sees the tokens of the last item before it in its own sample, and of no other (section 2.3).

    Args:
        media: Tokens of all items, in the order of their marks.
        item_row: Row of each item.
        marks: Where an item stands in the text, one mark an item.
        segment_ids: Samples of a row; 0 is padding.

    Raises:
        DataError: Marks and items are not the same number in a row.
    """
    rows = len(marks)
    tokens = media.grid.prod(1)
    listed: list[int] = item_row.tolist()
    if listed != sorted(listed) or any(not 0 <= row < rows for row in listed):
        raise DataError(
            f"media items are not in the order of the {rows} rows: {listed}",
            place="Batch.item_row",
            remedy="put media in the order in which their marks stand, row by row",
        )
    items = torch.bincount(item_row, minlength=rows)
    if not torch.equal(items, marks.sum(1)):
        row = int((items != marks.sum(1)).int().argmax())
        raise DataError(
            f"row {row} has {int(marks[row].sum())} marks and {int(items[row])} media items",
            place=f"row {row}",
            remedy="render one mark for each item, and give Batch.item_row",
        )
    per_row = torch.zeros(rows, dtype=tokens.dtype, device=tokens.device).index_add(0, item_row, tokens)
    source = rows_by(media.values, per_row).values
    # Number of the item inside its row, of every media token and of the last mark before every text position.
    first = items.cumsum(0) - items
    number = (torch.arange(len(tokens), device=tokens.device) - first[item_row]).repeat_interleave(tokens)
    of_token = rows_by(number[:, None] + 1, per_row).values[..., 0]  # 0: no token
    of_text = marks.long().cumsum(1)  # 0: nothing yet
    at = torch.where(marks, torch.arange(marks.shape[1], device=marks.device), 0).cummax(1).values
    same = segment_ids.gather(1, at) == segment_ids
    of_text = torch.where(same & (segment_ids != 0), of_text, -1)
    mask = (of_text[:, :, None] == of_token[:, None, :]) & (of_token != 0)[:, None, :]
    return MediaView(source=source, mask=mask[:, None])
