"""Transformer blocks compiled by torch: one region for all layers, compiled once for each shape that comes.

The layers of a stack run the same code with other weights, so the first one's compilation serves all. Batches of a
phase have one shape; where shapes vary, the second one is compiled with the sizes left open, and serves the rest.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from plait.core.errors import ConfigError, ResourceError
from plait.models.crossattend import ReadingLayer
from plait.models.recompute import blocks_of, forwards


@contextmanager
def compiled(model: nn.Module, *, backend: str = "inductor") -> Iterator[int]:
    """Inside, training passes of the model's blocks run compiled; answering with a cache goes as before.

    Nothing falls back in silence: a block that cannot be compiled as a whole ends the first step with an error.

    Args:
        model: Its blocks (:func:`plait.models.recompute.blocks_of`) get another ``forward``; taken back at the end.
            Of a layer that reads media, only the decoder's own part is compiled.
        backend: Of torch.compile; ``inductor`` needs a C++ compiler, or triton on an accelerator.

    Yields:
        The number of blocks.

    Raises:
        ConfigError: There are no Transformer blocks; or, at the first step, one of them cannot be compiled whole.
        ResourceError: There is no compiler.
    """
    blocks = [block.layer if isinstance(block, ReadingLayer) else block for block in blocks_of(model)]
    if not blocks:
        raise ConfigError(
            f"{type(model).__name__} has no Transformer blocks to compile", place="trainer.compile", remedy="set false"
        )
    if backend == "inductor":
        _require_compiler(next(model.parameters()).device.type)
    with forwards(blocks, lambda block, plain: _Compiled(block, plain, backend)):
        yield len(blocks)


class _Compiled:
    """The forward of a block: compiled where it learns, as it is elsewhere."""

    def __init__(self, block: nn.Module, plain: Callable[..., Any], backend: str) -> None:
        self.block, self.plain = block, plain
        self.fast = torch.compile(plain, fullgraph=True, backend=backend)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        collects = any(isinstance(value, list) for value in (*args, *kwargs.values()))
        if not torch.is_grad_enabled() or kwargs.get("past_key_values") is not None or collects:
            return self.plain(*args, **kwargs)
        try:
            with warnings.catch_warnings():  # it looks at .grad of whatever goes into a region
                warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor that is not a leaf")
                return self.fast(*args, **kwargs)
        except TorchDynamoException as error:
            said = " ".join(str(error).strip().splitlines()[:2]) or type(error).__name__  # who raised, and what
            raise ConfigError(
                f"{type(self.block).__name__} cannot be compiled as a whole: {said}",
                place="trainer.compile",
                remedy="set trainer.compile to false",
            ) from error


def _require_compiler(device: str) -> None:
    """Refuse before the first step what would end it."""
    if device != "cpu":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise ResourceError(
                f"torch.compile needs triton for {device}, which is not installed",
                place="trainer.compile",
                remedy="install triton, or set trainer.compile to false",
            )
        return
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except (RuntimeError, OSError) as error:
        raise ResourceError(
            "torch.compile needs a C++ compiler, and none is found",
            place="trainer.compile",
            remedy="install g++ or clang++ (or name one in CXX), or set trainer.compile to false",
        ) from error
