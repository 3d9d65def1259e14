"""Which sample, which module: looked for once a step went wrong, by running it again a part at a time.

Nothing here changes weights, gradients, buffers or random generators, and nothing waits for another process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from plait.core import dtensors
from plait.core.protocols import Objective, Pairwise
from plait.core.tensors import IGNORE, Batch, Patches
from plait.training.contrast import join
from plait.training.generators import rng_kept
from plait.training.smaller import rows_apart, samples_of_rows

_LARGE = 1e4
"""A weight beyond this has run away: those of trained models stay below some hundreds."""

_PARTED = 3
"""Rows whose samples are told apart, where a loss is looked into."""

Around = Callable[[], contextlib.AbstractContextManager[object]]


@dataclass(frozen=True, slots=True, kw_only=True)
class NotFinite:
    """Where a number stopped being finite.

    Attributes:
        module: The first module with an output that is not finite; empty where none has (the loss itself is not).
        given: Whether it was given numbers that are not finite.
        samples: The samples whose part of a pass is not finite, as far as they can be told apart.
        grown: A weight that learns and has grown out of all proportion, with its largest number; "" if none has.
    """

    module: str
    given: bool
    samples: tuple[str, ...]
    grown: str = ""

    def __str__(self) -> str:
        if not self.module:
            return "every module's output is finite: the loss itself is not"
        if self.grown:
            return f"first in {self.module}; {self.grown}: lower the learning rate"
        return f"first in {self.module}" + (", which was given such numbers: look at the data" if self.given else "")


def not_finite(model: nn.Module, objective: Objective, micro: Sequence[Batch], *, around: Around) -> NotFinite:
    """Run micro-batches row by row, and find the first module that makes a number that is not finite.

    Args:
        model: What the objective runs.
        objective: The loss.
        micro: Micro-batches of the step.
        around: Entered around each forward, such as autocast.
    """
    first: tuple[str, bool] | None = None
    samples: list[str] = []
    with _aside(model, objective):
        for batch in micro:
            for part in _apart(objective, batch):
                seen: list[tuple[str, bool]] = []
                with _watched(model, seen), around():
                    sums = _sums(objective, model, part)
                if seen or not all(bool(value.isfinite().all()) for value in sums.values()):
                    first = first or next(iter(seen), None)
                    samples += part.sample_ids
    module, given = first or ("", False)
    return NotFinite(module=module, given=given, samples=tuple(samples), grown=_grown(model))


def losses(
    model: nn.Module,
    objective: Objective,
    micro: Sequence[Batch],
    *,
    weights: Mapping[str, float],
    counts: Mapping[str, float],
    around: Around,
) -> list[tuple[str, float]]:
    """Each sample's part of the step's loss, highest first; samples that were not told apart are one.

    One pass goes over all rows, then one over each sample of the three rows with the highest loss.

    Args:
        model: What the objective runs.
        objective: The loss.
        micro: Micro-batches of the step.
        weights: Of its terms; 1 where none is given.
        counts: Units of each term in the whole step.
        around: Entered around each forward, such as autocast.
    """

    def weighed(sums: Mapping[str, Tensor]) -> float:
        return sum(weights.get(n, 1.0) * float(v) / counts[n] for n, v in sums.items() if counts.get(n))

    found: list[tuple[str, float]] = []
    with _aside(model, objective), around():
        if isinstance(objective, Pairwise):
            whole = join([objective.embed(model, batch) for batch in micro])
            ids = [name for batch in micro for name in batch.sample_ids]
            each = [weighed(objective.loss(whole, rows=range(row, row + 1))) for row in range(whole.rows)]
            found += zip(ids, each, strict=True)
        else:
            rows = [part for batch in micro for part in _apart(objective, batch) if part.sample_ids]
            whole = [weighed(objective(model, part)) for part in rows]
            for rank, at in enumerate(sorted(range(len(rows)), key=lambda at: -whole[at])):
                names = [*_documents(rows[at])] if rank < _PARTED else []
                if len(names) > 1:
                    found += [(name, weighed(objective(model, alone))) for name, alone in names]
                else:
                    found.append((", ".join(rows[at].sample_ids), whole[at]))
    return sorted(found, key=lambda one: -one[1])


def gradients(
    model: nn.Module,
    objective: Objective,
    micro: Sequence[Batch],
    *,
    weights: Mapping[str, nn.Parameter],
    around: Around,
) -> tuple[list[str], list[str]]:
    """Weights whose gradient is not finite though the loss is, and samples that make it so.

    Args:
        model: What the objective runs.
        objective: The loss.
        micro: Micro-batches of the step.
        weights: What learns, with the step's gradient.
        around: Entered around each forward, such as autocast.

    Returns:
        Their names, and the samples; of a loss that compares rows, no samples.
    """
    names = [name for name, weight in weights.items() if weight.grad is not None and not _all_finite([weight.grad])]
    samples: list[str] = []
    if not names or objective.needs_global_batch:
        return names, samples
    broken = [weights[name] for name in names]
    with _aside(model, objective):
        for batch in micro:
            for part in rows_apart(batch):
                with torch.enable_grad(), around():
                    sums = [value.float() for value in objective(model, part).values() if value.requires_grad]
                    grads = torch.autograd.grad(torch.stack(sums).sum(), broken, allow_unused=True) if sums else ()
                if not _all_finite(grads):
                    samples += part.sample_ids
    return names, samples


def _grown(model: nn.Module) -> str:
    worst, where = _LARGE, ""
    for name, weight in model.named_parameters():
        held = dtensors.local(weight).detach()
        if weight.requires_grad and held.numel():
            largest = float(held.abs().max())
            if not largest <= worst:  # also where it is no number
                worst, where = largest, name
                if largest != largest:
                    break
    return f"{where} has grown to {worst:.1e}" if where else ""


def _all_finite(grads: Iterable[Tensor | None]) -> bool:
    return all(grad is None or bool(dtensors.local(grad).isfinite().all()) for grad in grads)


# --- running again -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _aside(model: nn.Module, objective: Objective) -> Generator[None]:
    """Without gradients; buffers, also of an objective, and generators are put back."""
    roots = [model, *([objective] if isinstance(objective, nn.Module) else [])]
    kept = [(buffer, buffer.clone()) for root in roots for buffer in root.buffers()]
    with rng_kept(), torch.no_grad():
        try:
            yield
        finally:
            for buffer, before in kept:
                buffer.copy_(before)


def _apart(objective: Objective, batch: Batch) -> list[Batch]:
    """Row by row, where rows do not need each other."""
    alone = objective.needs_global_batch and not isinstance(objective, Pairwise)
    return [batch] if alone else rows_apart(batch)


def _sums(objective: Objective, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
    if isinstance(objective, Pairwise):
        return objective.embed(model, batch).vectors
    return objective(model, batch)


def _documents(batch: Batch) -> Iterable[tuple[str, Batch]]:
    """A row once for each sample in it, with the labels of that sample alone; preference pairs stay together."""
    owners = samples_of_rows(batch)
    packed = owners is not None and len(owners) == 1 and len(owners[0]) > 1
    if not packed or any(name.endswith(("#chosen", "#rejected")) for name in batch.sample_ids):
        return [(", ".join(batch.sample_ids), batch)]
    return [
        (name, replace(batch, labels=batch.labels.masked_fill(batch.segment_ids != at, IGNORE)))
        for at, name in enumerate(batch.sample_ids, 1)
    ]


@contextlib.contextmanager
def _watched(model: nn.Module, seen: list[tuple[str, bool]]) -> Generator[None]:
    """Note the first module, in the order in which they end, that makes NaN or infinity, and what it was given."""

    def note(name: str) -> Callable[[nn.Module, Any, Any, Any], None]:
        def hook(_: nn.Module, inputs: Any, named: Any, output: Any) -> None:
            if not seen and _broken(output):
                seen.append((name, _broken(inputs) or _broken(named)))

        return hook

    modules = [(name, module) for name, module in model.named_modules() if name]
    hooks = [module.register_forward_hook(note(name), with_kwargs=True) for name, module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _broken(value: Any) -> bool:
    """Whether any tensor in it has NaN or infinity; minus infinity stands for what a mask hides."""
    if isinstance(value, Patches):
        return _broken(value.values)
    if isinstance(value, Tensor):
        return value.is_floating_point() and bool((value.isnan() | value.isposinf()).any())
    if isinstance(value, Mapping):
        return any(_broken(one) for one in value.values())
    return isinstance(value, (tuple, list)) and any(_broken(one) for one in value)
