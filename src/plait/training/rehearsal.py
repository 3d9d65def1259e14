"""Something else in the place of training: what ``plait plan --probe`` and ``plait doctor gradients`` do with a stage.

A stage that runs inside :func:`rehearsing` gets as far as :func:`plait.training.loop.fit` with its true model,
objective and batches; there the caller takes over.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from plait.core.events import Events

if TYPE_CHECKING:
    from torch import nn

    from plait.core.protocols import Batches, Objective
    from plait.training.settings import FitResult, Hooks, Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a stage asked :func:`plait.training.loop.fit` for; attributes as its arguments."""

    model: nn.Module
    objective: Objective
    batches: Batches
    settings: Settings
    folder: Path
    events: Events
    hooks: Hooks


Instead = Callable[[Asked], "FitResult"]
"""Takes the place of training. It may train after all, with other settings, or raise what ends the stage."""

_INSTEAD: contextvars.ContextVar[Instead | None] = contextvars.ContextVar("rehearsal", default=None)


@contextlib.contextmanager
def rehearsing(instead: Instead | None) -> Generator[None]:
    """Let every training in the block be ``instead`` of it; None trains. What ``instead`` itself trains is trained."""
    token = _INSTEAD.set(instead)
    try:
        yield
    finally:
        _INSTEAD.reset(token)


def rehearsal() -> Instead | None:
    """What is to be done in the place of training, if anything."""
    return _INSTEAD.get()
