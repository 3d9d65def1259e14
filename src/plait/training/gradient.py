"""The gradient of one step, exact however the batch is split: over micro-batches and over ranks."""

from __future__ import annotations

import contextlib
import functools
import json
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from plait.core import collectives, mesh
from plait.core.errors import ConfigError, DataError
from plait.core.grid import Grid
from plait.core.protocols import Objective, Pairwise
from plait.core.tensors import Batch
from plait.training.contrast import Share, backward_pairwise
from plait.training.parallel.layout import Whole
from plait.training.parallel.pipeline import Staged
from plait.training.smaller import Exhausted, first_line, out_of_memory
from plait.training.trainer import only_in_one_process


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """What :func:`accumulate` found; the gradients are in the weights' ``.grad``.

    Attributes:
        loss: Weighted sum of the terms.
        terms: Each term over its global count; a term without units in this step is left out.
        counts: Global count of each term.
        complete: Whether the gradients are those of the whole step. They are not where the loss of a micro-batch,
            times the scale, was not finite on any rank: the step was broken off there.
        not_finite: Sample ids of the micro-batches it was broken off at.
    """

    loss: float
    terms: Mapping[str, float]
    counts: Mapping[str, float]
    complete: bool = True
    not_finite: tuple[str, ...] = ()


def accumulate(
    model: nn.Module,
    objective: Objective,
    micro: Sequence[Batch],
    *,
    weights: Mapping[str, float],
    around: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
    scale: float = 1.0,
    layout: Whole | None = None,
) -> Sums:
    """Add ``d loss / d w`` of a step to the weights' ``.grad``, for ``loss = sum_t weight_t * sum_t / count_t``.

    Sums and counts run over all micro-batches of all ranks, so the result is the gradient of the whole batch in one
    piece: 8 trained tokens in one micro-batch and 500 in the next weigh as 508 equal tokens. (A mean of micro-batch
    means weighs them 250 to 4 instead.) A pairwise loss in several pieces takes cached gradients
    (:mod:`plait.training.contrast`).

    Args:
        model: What the objective runs.
        objective: Gives counts and sums.
        micro: Micro-batches of this rank.
        weights: Weight of each term; 1 where none is given, 0 only reports.
        around: Entered around each forward, such as autocast.
        scale: The gradients are so many times those of the loss; what is returned is not scaled.
        layout: How processes hold the model; by default each has all of it.

    Raises:
        ConfigError: A weight names no term, a counted term has no sum, or the loss reaches no trainable weight.
        DataError: No term has any unit in this step.
        Exhausted: Memory ran out in a pass, in some process; where processes pass in step, torch's error says so.
    """
    layout = layout or Whole(model, objective)
    micro = [layout.part(batch) for batch in micro]
    counts = _counts(objective, micro, layout.grid)
    if unknown := weights.keys() - counts.keys():
        raise ConfigError(
            f"weight for {min(unknown)!r}, but the objective has {', '.join(sorted(counts))}",
            place="weights",
            remedy="name one of its terms",
        )
    used = {name: count for name, count in counts.items() if count > 0}
    if not used:
        raise DataError(
            f"nothing to train on: {', '.join(f'{n} counts {c:g}' for n, c in counts.items())}",
            place=f"samples {named(tuple(i for b in micro for i in b.sample_ids))}",
            remedy="check that these samples have trained turns that fit the context",
        )
    weigh = functools.partial(_weighted, used=used, weights=weights, place=type(objective).__name__, scale=scale)
    if isinstance(objective, Pairwise) and (len(micro) > 1 or layout.grid.data > 1):
        share = _pairwise(model, objective, micro, weigh=weigh, around=around, layout=layout)
    else:
        run = _Pass(model, objective, weigh=weigh, used=used, around=around)
        if isinstance(layout, Staged):
            share = run.staged(micro, layout)
        else:
            apart = layout.grid.size("tensor") == 1
            share = run.in_step(micro, layout) if layout.in_step else run.each(micro, apart=apart)
    totals = {name: _wide(share.sums[name]) for name in used}
    reached, broken_off, exhausted = collectives.all_reduce_sum(
        torch.tensor([int(share.reached), int(not share.complete), int(bool(share.exhausted))])
    ).tolist()
    if exhausted:
        raise Exhausted(share.exhausted or "in another process")
    if not (reached or broken_off):  # a rank without one trained token reaches none; the others wait for it
        raise ConfigError(
            "the loss reaches no trainable weight",
            place=type(objective).__name__,
            remedy="unfreeze a part that the objective uses",
        )
    layout.sum_gradients()
    layout.settle()
    values = torch.tensor([float(total) for total in totals.values()], dtype=torch.float64)
    sums = collectives.all_reduce_sum(values, layout.grid.group("pipeline", "data", "context"))
    terms = {name: value / used[name] for name, value in zip(totals, sums.tolist(), strict=True)}
    loss_value = sum(weights.get(name, 1.0) * term for name, term in terms.items() if weights.get(name, 1.0))
    broken = tuple(dict.fromkeys(i for ids in mesh.gather(share.broken) for i in ids)) if broken_off else ()
    return Sums(loss=loss_value, terms=terms, counts=counts, complete=not broken_off, not_finite=broken)


class _Pass:
    """Forward and backward of micro-batches, one after the other."""

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        *,
        weigh: Callable[[Mapping[str, Tensor]], Tensor],
        used: Mapping[str, float],
        around: Callable[[], contextlib.AbstractContextManager[object]],
    ) -> None:
        self.model, self.objective, self.weigh, self.used, self.around = model, objective, weigh, used, around
        self.totals: dict[str, Tensor] = {}

    def each(self, micro: Sequence[Batch], *, apart: bool) -> Share:
        """Up to the first whose loss is not finite, or that does not fit the memory.

        Args:
            micro: Micro-batches of this rank.
            apart: Whether a pass needs no other process, which would wait for one that gave up.
        """
        reached = False
        for batch in micro:
            try:
                loss = self._forward(batch)
                if not loss.isfinite():
                    return Share(sums=self.totals, reached=reached, complete=False, broken=tuple(batch.sample_ids))
                if loss.requires_grad:  # a micro-batch without one trained token may give plain zeros
                    reached = True
                    loss.backward()
            except Exception as error:
                if not (apart and out_of_memory(error)):
                    raise
                sums = {name: torch.zeros(()) for name in self.used}
                return Share(sums=sums, reached=reached, complete=False, exhausted=first_line(error))
        return Share(sums=self.totals, reached=reached)

    def in_step(self, micro: Sequence[Batch], layout: Whole) -> Share:
        """As many passes as any process makes; who has fewer micro-batches repeats one, with no weight."""
        passes: int = max(mesh.gather(len(micro)))
        reached, broken = False, ()
        for at in range(passes):
            batch = micro[min(at, len(micro) - 1)]
            layout.begin(batch, last=at == passes - 1)
            loss = self._forward(batch, counts=at < len(micro))
            if not loss.isfinite() and not broken:
                broken = tuple(batch.sample_ids)
            reached = reached or loss.requires_grad
            loss = layout.touched(loss if at < len(micro) else loss * 0)
            if loss.requires_grad:  # not where rows are shared, a connector alone learns, and there is no picture
                with mesh.explained():
                    loss.backward()
        return Share(sums=self.totals, reached=reached, complete=not broken, broken=broken)

    def staged(self, micro: Sequence[Batch], layout: Staged) -> Share:
        """This stage's part of all passes; the last stage has the sums, the others zeros."""
        broken: list[str] = []
        reached = False

        def passed(batch: Batch) -> Tensor:
            nonlocal reached
            loss = self._forward(batch)
            if not loss.isfinite() and not broken:
                broken.extend(batch.sample_ids)
            reached = reached or loss.requires_grad
            return loss

        layout.run(micro, passed)
        sums = {name: torch.zeros(()) for name in self.used} | self.totals
        return Share(sums=sums, reached=reached, complete=not broken, broken=tuple(broken))

    def _forward(self, batch: Batch, *, counts: bool = True) -> Tensor:
        with self.around(), mesh.explained():
            sums = self.objective(self.model, batch)
        loss = self.weigh(sums)
        for name in self.used if counts else ():
            term = _wide(sums[name].detach())
            self.totals[name] = self.totals[name] + term if name in self.totals else term
        return loss


def _pairwise(
    model: nn.Module,
    objective: Pairwise,
    micro: Sequence[Batch],
    *,
    weigh: Callable[[Mapping[str, Tensor]], Tensor],
    around: Callable[[], contextlib.AbstractContextManager[object]],
    layout: Whole,
) -> Share:
    """As :func:`plait.training.contrast.backward_pairwise`; several processes cannot go on without one's vectors."""
    try:
        return backward_pairwise(model, objective, micro, weigh=weigh, around=around, layout=layout)
    except Exception as error:
        if mesh.world() > 1 or not out_of_memory(error):
            raise
        why = first_line(error)
    raise Exhausted(why)


def check_batches(micro: Sequence[Batch], objective: Objective, *, step: int) -> None:
    """Refuse what cannot be added up.

    Raises:
        DataError: There is no batch at all.
        ConfigError: The objective compares rows of the whole batch, which comes in several pieces, and cannot say how
            (:class:`plait.core.protocols.Pairwise`).
    """
    if not micro:
        raise DataError(
            "no batch",
            place=f"step {step}",
            remedy="check that the data set is not empty and the batch not larger than it",
        )
    if not objective.needs_global_batch or isinstance(objective, Pairwise):
        return
    if mesh.world() > 1:
        raise only_in_one_process(type(objective).__name__, mesh.world())
    if len(micro) > 1:
        rows = [len(batch.sample_ids) for batch in micro]
        raise ConfigError(
            f"{type(objective).__name__} compares all rows of a batch with each other, but the batch comes in "
            f"{len(micro)} micro-batches of {rows[0]} rows: their sums are not the loss of {sum(rows)} rows",
            place="micro_batch",
            remedy=f"set the micro-batch to the whole batch ({sum(rows)}), or the batch to {rows[0]}",
        )


def named(ids: Sequence[str], *, limit: int = 8) -> str:
    """Sample ids for a message; how many more there are beyond ``limit``."""
    return ", ".join(ids[:limit]) + (f" and {len(ids) - limit} more" if len(ids) > limit else "")


def _counts(objective: Objective, micro: Sequence[Batch], grid: Grid) -> dict[str, float]:
    counts: dict[str, Tensor] = {}
    for batch in micro:
        for name, count in objective.count(batch).items():
            exact = count.double() if count.is_floating_point() else count  # float32 stops counting at 2**24
            counts[name] = counts[name] + exact if name in counts else exact.clone()
    if grid.data * grid.context == 1:
        return {name: float(count) for name, count in counts.items()}
    group = grid.group("data", "context")
    # A rank may lack a term, such as that of sounds: all sum the same names in the same order.
    told = [json.loads(text) for text in collectives.all_gather_text(json.dumps([*counts]), group)]
    names: list[str] = list(dict.fromkeys(name for one in told for name in one))
    here = [float(counts.get(name, 0)) for name in names]
    sums: Tensor = collectives.all_reduce_sum(torch.tensor(here, dtype=torch.float64), group)
    return dict(zip(names, sums.tolist(), strict=True))


def _weighted(
    sums: Mapping[str, Tensor],
    used: Mapping[str, float],
    weights: Mapping[str, float],
    *,
    place: str,
    scale: float,
) -> Tensor:
    """This micro-batch's share of the step's loss, times ``scale``."""
    if missing := used.keys() - sums.keys():
        raise ConfigError(
            f"the objective counts {min(missing)!r} but gives no sum of it",
            place=place,
            remedy="return a sum for each count",
        )
    shares = [
        weights.get(name, 1.0) * (_wide(sums[name]) / count) for name, count in used.items() if weights.get(name, 1.0)
    ]
    if not shares:
        raise ConfigError("every term has weight 0", place="weights", remedy="give at least one term a weight")
    loss = functools.reduce(operator.add, shares)
    return loss * scale if scale != 1 else loss


def _wide(value: Tensor) -> Tensor:
    """At least float32: a loss in float16 times the first scale, 65,536, would be infinite."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
