"""Answers at work: what a model keeps between one token and the next. The engine knows no more of a model than this."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from plait.core.tensors import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """Where the answers of a batch stand.

    Attributes:
        hidden: Last hidden state of each row's last token.
        cache: Keys and values, as Hugging Face decoders keep them; changed in place by the next token.
        seen: 1 for every token so far, 0 for padding, which is in front.
        kept: What else the model needs again, such as the media that layers inside the decoder look at.
    """

    hidden: Float[Tensor, "b d"]
    cache: Any
    seen: Int[Tensor, "b t"]
    kept: Any = None


@runtime_checkable
class Decodes(Protocol):
    """A model that answers token by token."""

    training: bool

    @property
    def placeholder(self) -> int:
        """Id that stands for one token of a picture."""
        ...

    @property
    def device(self) -> torch.device:
        """Where batches go."""
        ...

    def prefill(self, batch: Batch) -> Decoding:
        """Read prompts, padded in front (segment 0)."""
        ...

    def extend(self, decoding: Decoding, token_ids: Int[Tensor, " b"], *, last: int) -> Decoding:
        """Read one more token a row; positions go no further than ``last``."""
        ...

    def logits(self, hidden: Float[Tensor, "n d"]) -> Float[Tensor, "n v"]:
        """Scores of the next token."""
        ...
