"""How a step is computed, which changes its memory and time and not its results: head, recomputation, compilation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from plait.core.errors import ConfigError
from plait.core.events import Events
from plait.models.compiled import compiled
from plait.models.documents import NAME as BY_DOCUMENT
from plait.models.multimodal import MultimodalLM
from plait.models.recompute import recomputed
from plait.models.wrapped.vlm import WrappedVLM
from plait.training.settings import Settings


@contextmanager
def computed(model: nn.Module, settings: Settings, *, events: Events) -> Iterator[None]:
    """Inside, the model computes its training steps as the settings say; then again as before.

    Args:
        model: Models of a vocabulary have ``fused``; recomputation and compilation need Transformer blocks.
        settings: ``head``, ``recompute`` and ``compile``.
        events: Told what was compiled.

    Raises:
        ConfigError: The model has no Transformer blocks, or selective recomputation was asked of compiled ones.
        ResourceError: There is no compiler.
    """
    if settings.compile and settings.recompute == "selective":
        raise ConfigError(
            "selective recomputation chooses among operations, of which a compiled block has one",
            place="trainer.recompute",
            remedy="set full or none, or trainer.compile to false",
        )
    with ExitStack() as stack:
        if settings.compile:
            stack.enter_context(under_masks(model))
            count = stack.enter_context(compiled(model))
            events.note(f"{count} blocks run compiled; the first step takes longer", blocks=count)
        if settings.recompute != "none":
            count = stack.enter_context(recomputed(model, settings.recompute))
            events.note(f"{count} blocks are recomputed in the backward pass ({settings.recompute})", blocks=count)
        stack.enter_context(head(model, settings.head))
        yield


@contextmanager
def under_masks(model: nn.Module) -> Iterator[None]:
    """Inside, a decoder that attends document by document does so under a mask: every batch has one shape then."""
    decoder = model.decoder if isinstance(model, MultimodalLM) else None
    if decoder is None or getattr(getattr(decoder, "config", None), "_attn_implementation", "") != BY_DOCUMENT:
        yield
        return
    decoder.set_attn_implementation("eager")  # pyright: ignore[reportCallIssue]
    try:
        yield
    finally:
        decoder.set_attn_implementation(BY_DOCUMENT)  # pyright: ignore[reportCallIssue]


@contextmanager
def head(model: nn.Module, how: str) -> Iterator[None]:
    """Inside, log-probabilities are computed ``fused`` with the head, or left to all scores at once (``full``)."""
    if not isinstance(model, MultimodalLM | WrappedVLM):
        yield
        return
    before, model.fused = model.fused, how == "fused"
    try:
        yield
    finally:
        model.fused = before
