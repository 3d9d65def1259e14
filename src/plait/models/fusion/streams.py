"""What goes into a fusion and what comes out: one stream of tokens a modality, any of which may be absent.

A modality that a sample lacks has ``present`` False there, and padding has ``real`` False. What stands at such places
has no influence on any fusion of this package, be it NaN, and receives no gradient.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from plait.core.errors import ConfigError, DataError
from plait.core.tensors import Patches
from plait.models.ragged import rows_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """Tokens of one modality; one token where the modality is a pooled vector.

    Attributes:
        tokens: Of each sample.
        real: Which of them are no padding; None: all.
        present: Which samples have this modality; None: all.
    """

    tokens: Float[Tensor, "b n d"]
    real: Bool[Tensor, "b n"] | None = None
    present: Bool[Tensor, " b"] | None = None

    @property
    def there(self) -> Bool[Tensor, "b n"]:
        """Tokens that count: real ones of samples that have this modality."""
        there = torch.ones(self.tokens.shape[:2], dtype=torch.bool, device=self.tokens.device)
        there = there if self.real is None else there & self.real
        return there if self.present is None else there & self.present[:, None]

    @property
    def here(self) -> Bool[Tensor, " b"]:
        """Samples that have at least one token that counts."""
        return self.there.any(1)

    def clean(self) -> "Stream":
        """The same with zeros where nothing counts, and both masks."""
        there = self.there
        tokens = self.tokens.masked_fill(~there[..., None], 0.0)
        return Stream(tokens=tokens, real=there, present=there.any(1))

    def mean(self) -> Float[Tensor, "b d"]:
        """Mean of the tokens that count; zeros where there are none.

        Example:
            >>> padded = Stream(tokens=torch.tensor([[[2.0], [4.0], [9.0]]]), real=torch.tensor([[True, True, False]]))
            >>> padded.mean().tolist()
            [[3.0]]
        """
        there = self.there[..., None]
        return self.tokens.masked_fill(~there, 0.0).sum(1) / there.sum(1).clamp(min=1)


Inputs = Mapping[str, Stream]
"""Streams by the name of their modality. All have the same samples in the same order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fused:
    """What a fusion returns.

    Attributes:
        values: A vector a sample, or tokens.
        present: Samples that had any modality at all; the others are what the fusion makes of nothing.
        real: Which tokens are no padding, where there are tokens.
        weights: Attention weights or gates by name, where they were asked for or cost nothing.
    """

    values: Float[Tensor, "b *n d"]
    present: Bool[Tensor, " b"]
    real: Bool[Tensor, "b n"] | None = None
    weights: Mapping[str, Tensor] = field(default_factory=dict)

    def stream(self) -> Stream:
        """As input of the next fusion."""
        tokens = self.values if self.values.ndim == 3 else self.values[:, None]
        return Stream(tokens=tokens, real=self.real, present=self.present)

    def vector(self) -> Float[Tensor, "b d"]:
        """The vector, or the mean of the tokens that count."""
        if self.values.ndim == 2:
            return self.values
        return Stream(tokens=self.values, real=self.real).mean()


@runtime_checkable
class Fusion(Protocol):
    """Any number of modalities in, one vector or one sequence of tokens a sample out."""

    d_out: int

    def __call__(self, inputs: Inputs, *, need_weights: bool = False) -> Fused:
        """Fuse; ``need_weights`` asks for attention weights that would not be kept otherwise."""
        ...


def vector(values: Float[Tensor, "b d"], present: Bool[Tensor, " b"] | None = None) -> Stream:
    """A pooled feature as a stream of one token."""
    return Stream(tokens=values[:, None], present=present)


def stream_of(media: Patches, present: Bool[Tensor, " item"] | None = None) -> Stream:
    """What a tower makes of one item a sample, as a stream."""
    rows = rows_of(media)
    return Stream(tokens=rows.values, real=rows.real, present=present)


def take(inputs: Inputs, names: Sequence[str], *, widths: Mapping[str, int] | None = None) -> dict[str, Stream]:
    """The streams that a fusion was built for, in its own order and cleaned.

    Args:
        inputs: What came.
        names: What it was built for.
        widths: Width it expects; of those that are not named it is not looked at.

    Raises:
        DataError: A modality is not in the mapping or not known, batches differ, or a width does.
    """
    missing, strange = [n for n in names if n not in inputs], [n for n in inputs if n not in names]
    if missing or strange:
        raise DataError(
            f"this fusion was built for {', '.join(names)}; came {', '.join(inputs) or 'nothing'}",
            place=", ".join([f"no {n}" for n in missing] + [f"unknown {n}" for n in strange]),
            remedy="give every modality; where samples lack one, say present=False, and its tokens are not read",
        )
    taken = {name: inputs[name] for name in names}
    batches = {name: len(stream.tokens) for name, stream in taken.items()}
    if len(set(batches.values())) > 1:
        raise DataError(
            f"modalities have different numbers of samples: {', '.join(f'{n} {b}' for n, b in batches.items())}",
            remedy="give the same samples of each; present=False where one lacks it",
        )
    for name, stream in taken.items():
        came, wanted = stream.tokens.shape[-1], None if widths is None else widths.get(name)
        if wanted is not None and came != wanted:
            raise DataError(
                f"{name} has tokens of width {came}, this fusion was built for {wanted}",
                place=name,
                remedy="build the fusion with the width of the tower, or project first",
            )
    return {name: stream.clean() for name, stream in taken.items()}


class Pooled(NamedTuple):
    """One vector a modality, and which sample has which."""

    means: dict[str, Tensor]
    there: Bool[Tensor, "b m"]


def pooled(inputs: Inputs, widths: Mapping[str, int]) -> Pooled:
    """Mean of each modality's tokens, zeros where it is absent; errors are those of :func:`take`."""
    streams = take(inputs, list(widths), widths=widths)
    return Pooled({name: stream.mean() for name, stream in streams.items()}, presence(streams, list(widths)))


def presence(inputs: Inputs, names: Sequence[str]) -> Bool[Tensor, "b m"]:
    """Which sample has which modality."""
    return torch.stack([inputs[name].here for name in names], dim=1)


def only(inputs: Inputs, names: Sequence[str]) -> dict[str, Stream]:
    """The same samples as if they had none but these modalities.

    Raises:
        DataError: A name is not among the inputs.
    """
    strange = [n for n in names if n not in inputs]
    if strange:
        raise DataError(f"no modality {', '.join(strange)}; there are {', '.join(inputs)}", remedy="choose among those")
    return {name: s if name in names else replace(s, present=torch.zeros_like(s.here)) for name, s in inputs.items()}


def at_least(count: int, names: Sequence[str], *, kind: str, most: int | None = None) -> tuple[str, ...]:
    """The names, if they are as many as this kind of fusion takes.

    Raises:
        ConfigError: They are not.
    """
    if len(names) < count or (most is not None and len(names) > most):
        bound = f"{count}" if most == count else f"at least {count}"
        raise ConfigError(
            f"{kind} takes {bound} modalities, came {len(names)}: {', '.join(names) or 'none'}",
            remedy="give as many as it takes, or fuse two first and the rest after",
        )
    return tuple(names)
