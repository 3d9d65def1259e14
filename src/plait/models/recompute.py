"""Activations recomputed in the backward pass instead of kept: all of a block, or all but its matrix products.

Chen et al., Training deep nets with sublinear memory cost, https://arxiv.org/abs/1604.06174; selectively: Korthikanti
et al., https://arxiv.org/abs/2205.05198, section 5. torch does the work; random numbers are drawn anew as they were, so
that dropout drops the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from plait.core.errors import ConfigError
from plait.models.connectors.query import PerceiverBlock, QFormerBlock
from plait.models.crossattend import MediaView, ReadingLayer
from plait.models.transformer import Block

Recompute = Literal["none", "full", "selective"]

_OURS = (Block, ReadingLayer, QFormerBlock, PerceiverBlock)
_THEIRS = "GradientCheckpointingLayer"  # of transformers: every layer that may be recomputed
_PRODUCTS = {"mm": 0, "addmm": 1}  # which argument is the left factor
_KEPT = ("convolution",)
WIDE = 64
"""Products over so many numbers or more are kept by ``selective``."""


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The outermost Transformer blocks, of Plait or of transformers, in the order of their names."""
    found: list[nn.Module] = []

    def look(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, _OURS) or any(kind.__name__ == _THEIRS for kind in type(child).__mro__):
                found.append(child)
            else:
                look(child)

    look(model)
    return found


@contextmanager
def recomputed(model: nn.Module, how: Recompute) -> Iterator[int]:
    """Inside, training passes of the model's blocks keep only their inputs (and their matrix products).

    Values, gradients and random numbers are those without it. Answering with a cache, passes without gradients, and
    passes that collect attention weights or hidden states go as before.

    Args:
        model: Its blocks (:func:`blocks_of`) get another ``forward``; taken back at the end.
        how: ``none`` changes nothing.

    Yields:
        The number of blocks.

    Raises:
        ConfigError: There are no such blocks; or one has a batch norm, which would count every batch twice.
    """
    blocks = blocks_of(model) if how != "none" else []
    if how != "none" and not blocks:
        raise ConfigError(
            f"{type(model).__name__} has no Transformer blocks to recompute",
            place="trainer.recompute",
            remedy="set none",
        )
    for block in blocks:
        if any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in block.modules()):
            raise ConfigError(
                f"{type(block).__name__} has a batch norm, whose running mean would count every batch twice",
                place="trainer.recompute",
                remedy="set none",
            )
    with forwards(blocks, lambda block, plain: _Again(block, plain, how)):
        yield len(blocks)


@contextmanager
def forwards(
    blocks: Sequence[nn.Module], other: Callable[[nn.Module, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Inside, blocks run another forward.

    Args:
        blocks: Their names and weights stay.
        other: Makes it of a block and its forward so far.
    """
    before = [block.__dict__.get("forward") for block in blocks]
    for block in blocks:
        block.forward = other(block, block.forward)
    try:
        yield
    finally:
        for block, own in zip(blocks, before, strict=True):
            if own is None:
                del block.forward
            else:
                block.forward = own


class _Again:
    """The forward of a block, run again when its gradient is wanted."""

    def __init__(self, block: nn.Module, plain: Callable[..., Any], how: Recompute) -> None:
        self.block, self.plain = block, plain
        self.contexts = functools.partial(create_selective_checkpoint_contexts, _policy)
        self.how = how

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._wanted(args, kwargs):
            return self.plain(*args, **kwargs)
        more = {"context_fn": self.contexts} if self.how == "selective" else {}
        return checkpoint(self.plain, *args, use_reentrant=False, **more, **kwargs)

    def _wanted(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether there is a gradient, and nothing that a second run would write to again: a cache, or lists."""
        if not torch.is_grad_enabled():
            return False
        given = [*args, *kwargs.values()]
        if kwargs.get("past_key_values") is not None or any(isinstance(value, list) for value in given):
            return False
        tensors = [value.source if isinstance(value, MediaView) else value for value in given]
        learns = any(isinstance(value, Tensor) and value.requires_grad for value in tensors)
        return learns or any(weight.requires_grad for weight in self.block.parameters())


def _policy(_: Any, operation: Any, *args: Any, **__: Any) -> CheckpointPolicy:
    """Keep what costs most to do again for each number that is kept: wide products, convolutions, fused attention.

    Attention in steps has products over a head alone, and many numbers: they are recomputed, as section 5 says; so are
    an adapter's, which are over its rank.
    """
    name = str(getattr(operation, "_opname", ""))
    keep = name in _KEPT or name.startswith("_scaled_dot_product_")
    if name in _PRODUCTS:
        keep = args[_PRODUCTS[name]].shape[1] >= WIDE
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
