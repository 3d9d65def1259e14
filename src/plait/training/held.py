"""A model held still, so that gradients of one step can be computed in many ways and compared.

Everything that would make two passes differ for a good reason is taken away and put back: dropout, another number
format than wanted, buffers that a forward pass moves, trained tensors that begin at zero (LoRA's second factor, closed
gates), behind which no gradient could be seen.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from plait.core import dtensors
from plait.core.device import seed_everything
from plait.core.protocols import Objective
from plait.core.tensors import Batch, Patches
from plait.training.generators import rng_kept
from plait.training.gradient import Sums, accumulate
from plait.training.parallel.layout import Whole
from plait.training.precision import autocast
from plait.training.settings import Settings
from plait.training.state import TrainState

_WOKEN = 0.02  # standard deviation that a tensor of zeros gets


@dataclass(frozen=True, slots=True, kw_only=True)
class Gradient:
    """The gradient of one step.

    Attributes:
        sums: Loss, terms and counts.
        of: Gradient by the name of each trained weight; None where none came.
    """

    sums: Sums
    of: Mapping[str, Tensor | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """How far a gradient is from another one.

    Attributes:
        parts: Norm of the difference over the norm of the first, by part of the model.
        tensor: The tensor that is furthest off, in the part that is.
        own: The same for that tensor alone.
        mean_z: Mean of all differences, in its own standard errors: beyond some, they do not scatter about zero.
        along: Share of the gradient that the difference has along it: 1 is a gradient counted twice, -0.5 half of it.
    """

    parts: Mapping[str, float]
    tensor: str
    own: float
    mean_z: float
    along: float

    @property
    def part(self) -> str:
        """The part that is furthest off."""
        return max(self.parts, key=lambda name: _rank(self.parts[name]))

    @property
    def largest(self) -> float:
        """Of all parts."""
        return self.parts[self.part]


def part_of(name: str) -> str:
    """The part of a model that a weight belongs to: the beginning of its name, two words of a container.

    Example:
        >>> part_of("decoder.layers.0.weight"), part_of("connectors.image.0.weight"), part_of("scale")
        ('decoder', 'connectors.image', 'scale')
    """
    words = name.split(".")
    return ".".join(words[: 2 if words[0] in ("connectors", "encoders", "objective", "heads") else 1])


@torch.no_grad()
def compare(reference: Mapping[str, Tensor | None], other: Mapping[str, Tensor | None]) -> Gap:
    """Compare two gradients; one that is missing counts as zero.

    Args:
        reference: What is taken as right.
        other: Of the same weights, or of some of them.
    """
    squares: dict[str, list[float]] = {}
    worst: dict[str, tuple[float, str, float]] = {}
    total = square = along = norm = 0.0
    count = 0
    for name, found in other.items():
        right = reference[name]
        if right is None and found is None:
            continue
        like = right if right is not None else found
        assert like is not None
        one, two = (torch.zeros_like(like) if g is None else g.to(like.device) for g in (right, found))
        one, two = one.double(), two.double()
        gap = two - one
        off, size = float(gap.square().sum()), float(one.square().sum())
        held = squares.setdefault(part_of(name), [0.0, 0.0])
        held[0] += off
        held[1] += size
        if part_of(name) not in worst or _rank(off) > _rank(worst[part_of(name)][0]):
            worst[part_of(name)] = (off, name, _ratio(off, size))
        total, square, count = total + float(gap.sum()), square + off, count + gap.numel()
        along, norm = along + float((gap * one).sum()), norm + size
    parts = {part: _ratio(off, size) for part, (off, size) in squares.items()} or {"nothing": 0.0}
    furthest = max(parts, key=lambda name: _rank(parts[name]))
    _, tensor, own = worst.get(furthest, (0.0, "", 0.0))
    mean = total / max(count, 1)
    spread = max(square / max(count, 1) - mean**2, 0.0) ** 0.5
    return Gap(
        parts=parts,
        tensor=tensor,
        own=own,
        mean_z=mean / (spread / count**0.5) if spread else 0.0,
        along=along / norm if norm else 0.0,
    )


def _ratio(off: float, size: float) -> float:
    return (off / size) ** 0.5 if size else (float("inf") if off else 0.0) if off == off else float("nan")


def _rank(value: float) -> float:
    return float("inf") if value != value else value  # what is not a number is furthest off


class Held:
    """A model and an objective, held still in a number format.

    Args:
        model: As it is about to train; put back by :meth:`release`.
        objective: What it minimizes.
        settings: How it trains: weights of terms, seed, number format.
        dtype: In which all is computed; None leaves the recipe's own, under autocast.

    Attributes:
        woken: Names of trained tensors that were all zeros.
        quiet: How many modules had their dropout taken off.
        weights: What trains, by name.
        frozen: What of the model does not.
    """

    def __init__(
        self, model: nn.Module, objective: Objective, settings: Settings, *, dtype: torch.dtype | None
    ) -> None:
        self.model, self.objective, self.settings, self.dtype = model, objective, settings, dtype
        self._roots = [model, *([objective] if isinstance(objective, nn.Module) else [])]
        self._own: dict[int, tuple[nn.Parameter, Tensor]] = {
            id(p): (p, p.data) for root in self._roots for p in root.parameters()
        }
        self._buffers = [
            (module, name, buffer, buffer.clone())
            for root in self._roots
            for module in root.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        self._grads = [(p, p.grad) for p, _ in self._own.values()]
        self._dropping = list(_dropping(self._roots))
        self.quiet = len({id(module) for module, *_ in self._dropping})
        for module, name, _, quiet in self._dropping:
            setattr(module, name, quiet)
        self.weights = TrainState(model, objective).weights
        self.frozen = {name: weight for name, weight in model.named_parameters() if not weight.requires_grad}
        zero = [name for name, weight in self.weights.items() if weight.numel() and not bool(weight.data.any())]
        keys = torch.Generator().manual_seed(settings.seed + 1)
        self._woken = {
            name: (_WOKEN * torch.randn(self.weights[name].shape, generator=keys)).to(self.weights[name].device)
            for name in zero
        }
        self.woken = tuple(zero)
        self.move()

    @torch.no_grad()
    def move(self, *, noise: float = 0.0, seed: int = 0) -> None:
        """Set all weights and buffers as they were, in the number format, each number times ``1 +- noise``."""
        by_id = {id(weight): self._woken[name] for name, weight in self.weights.items() if name in self._woken}
        keys = torch.Generator().manual_seed(seed)
        for weight, own in self._own.values():
            data: Tensor = by_id.get(id(weight), own)
            if data.is_floating_point():
                data = data.to(self.dtype or own.dtype, copy=True)
                if noise:
                    data *= 1 + noise * (2 * torch.rand(data.shape, generator=keys).to(data) - 1)
            weight.data = data
            weight.grad = None
        self._set_buffers()

    def _set_buffers(self) -> None:
        for module, name, _, kept in self._buffers:
            wanted = self.dtype if self.dtype is not None and kept.is_floating_point() else kept.dtype
            module._buffers[name] = kept.to(wanted, copy=True)

    def batch(self, batch: Batch, *, noise: float = 0.0) -> Batch:
        """A batch in the number format, its media times ``1 +- noise``."""
        keys = torch.Generator().manual_seed(1)

        def turned(values: Tensor) -> Tensor:
            values = values.to(self.dtype or values.dtype)
            if noise:
                values = values * (1 + noise * (2 * torch.rand(values.shape, generator=keys).to(values) - 1))
            return values

        media = {m: Patches(values=turned(p.values), grid=p.grid) for m, p in batch.media.items()}
        return replace(batch, media=media)

    def gradient(
        self, micro: Sequence[Batch], *, seed: int = 0, noise: float = 0.0, layout: Whole | None = None
    ) -> Gradient:
        """The gradient of a step that comes in these micro-batches, as the training loop computes it.

        Args:
            micro: Of this process.
            seed: Of the random numbers that are drawn in the passes.
            noise: See :meth:`batch`.
            layout: How several processes hold the model.

        Raises:
            PlaitError: As :func:`plait.training.gradient.accumulate`.
        """
        compute = self.settings.compute
        weights = self.weights if layout is None else TrainState(layout.model, layout.objective).weights
        with rng_kept():
            seed_everything(self.settings.seed + 7919 * seed)
            sums = accumulate(
                self.model if layout is None else layout.model,
                self.objective if layout is None else layout.objective,
                [self.batch(batch, noise=noise) for batch in micro],
                weights=self.settings.weights,
                around=lambda: (
                    contextlib.nullcontext() if self.dtype is not None else autocast(compute.device, compute.dtype)
                ),
                layout=layout,
            )
        # Pieces of a weight are put together by all processes, in one order.
        found = {
            name: None if weights[name].grad is None else dtensors.whole(weights[name].grad).detach().clone()  # pyright: ignore[reportArgumentType]
            for name in sorted(weights)
        }
        for weight in weights.values():
            weight.grad = None
        if layout is None:
            self._set_buffers()
        return Gradient(sums=sums, of=found)

    def release(self) -> None:
        """Put everything back."""
        for weight, own in self._own.values():
            weight.data = own
        for weight, grad in self._grads:
            weight.grad = grad
        for weight in self.frozen.values():
            weight.requires_grad_(False)
        for module, name, buffer, kept in self._buffers:
            buffer.copy_(kept)
            module._buffers[name] = buffer
        for module, name, value, _ in self._dropping:
            setattr(module, name, value)


@contextlib.contextmanager
def held(model: nn.Module, objective: Objective, settings: Settings, *, dtype: torch.dtype | None) -> Iterator[Held]:
    """A model held still inside the block; see :class:`Held`."""
    found = Held(model, objective, settings, dtype=dtype)
    try:
        yield found
    finally:
        found.release()


def _dropping(roots: Sequence[nn.Module]) -> Iterator[tuple[nn.Module, str, Any, Any]]:
    """Module, attribute, value and quiet value of everything that drops by chance.

    These are torch's modules, rates (of transformers), and sizes that have rates among them (of Plait's own models).
    """
    for root in roots:
        for module in root.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                yield module, "p", module.p, 0.0
                continue
            for name, value in vars(module).items():
                if (quiet := _without(name, value)) is not value:
                    yield module, name, value, quiet


def _without(name: str, value: Any) -> Any:
    """0 instead of a rate of dropping; sizes with every such rate in them 0; anything else as it is."""
    if "drop" in name and isinstance(value, float) and 0 < value < 1:
        return 0.0
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    found = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
    changed = {inner: quiet for inner, old in found.items() if (quiet := _without(inner, old)) is not old}
    return replace(value, **changed) if changed else value
