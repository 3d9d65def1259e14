"""Exact gradients of pairwise losses over a batch in pieces: GradCache (Gao et al., https://arxiv.org/abs/2101.06983).

A contrastive loss compares all rows of a batch, so the losses of its parts do not add up. But the loss sees only the
vectors, and those are small: (1) embed every micro-batch without keeping its graph; (2) put the vectors of all
micro-batches and ranks together, take the loss and its gradient by them; (3) embed every micro-batch again, with its
graph, and send its part of that gradient back. The result is the gradient of the whole batch in one piece, in the
memory of one micro-batch, for at most one forward pass more.

What has to hold, and how it is held:

- A micro-batch gives the same vectors twice: random numbers (dropout) are put back for the second time. Vectors that
  differ are an error.
- A factor of the loss, such as the temperature, gets its gradient once: each rank sums the loss over its own rows
  alone, each compared with the rows of all ranks.
- Buffers that move in a forward pass (running means of batch norm) move once a micro-batch, not twice.

One thing cannot hold: batch norm in training mode takes its statistics from the rows of a micro-batch, so its output
is not that of the whole batch. Freeze it (eval mode), or use a model with layer norms.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from plait.core import collectives, mesh
from plait.core.errors import ConfigError
from plait.core.protocols import Pairwise
from plait.core.tensors import Batch, Embedded
from plait.training.generators import rng_state, set_rng_state
from plait.training.parallel.layout import Whole

_AGREE = 0.02
"""Largest difference of the vectors of both passes, as part of the largest component: kernels may round otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What :func:`backward_pairwise` found; gradients are in the weights' ``.grad``, not yet summed over ranks.

    Attributes:
        sums: Of each term over this rank's rows.
        reached: Whether the loss depends on anything that learns.
        complete: Whether the gradients are those of all micro-batches. They are not where the loss that was to be
            differentiated was not finite.
        broken: Sample ids of the micro-batches that are the reason, as far as that is known.
        exhausted: Why memory ran out here; empty if it did not.
    """

    sums: Mapping[str, Tensor]
    reached: bool
    complete: bool = True
    broken: tuple[str, ...] = ()
    exhausted: str = ""


@dataclass(slots=True, kw_only=True)
class _Part:
    """A micro-batch between the two passes."""

    batch: Batch
    rng: Any
    found: Embedded
    graph: Embedded | None = None
    """What ``found`` was before it was detached; only of the last micro-batch, which is not embedded again."""
    gradients: dict[str, Tensor] = field(default_factory=dict)


def backward_pairwise(
    model: nn.Module,
    objective: Pairwise,
    micro: Sequence[Batch],
    *,
    weigh: Callable[[Mapping[str, Tensor]], Tensor],
    around: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
    layout: Whole | None = None,
) -> Share:
    """Add the gradient of the loss of all micro-batches of all ranks, as far as it goes through this rank's rows.

    The last micro-batch keeps its graph and is embedded once: with one micro-batch a rank nothing is computed twice.

    Args:
        model: What embeds.
        objective: Gives vectors and sums.
        micro: Micro-batches of this rank.
        weigh: The loss from the sums over this rank's rows; it is added up over ranks.
        around: Entered around each forward, such as autocast.
        layout: How processes hold the model; by default each has all of it.

    Raises:
        ConfigError: A micro-batch embedded again gave other vectors; or processes in step have not as many each.
    """
    last = len(micro) - 1
    layout = layout or Whole(model, objective)
    if layout.in_step:
        _check_in_step(len(micro))
        layout.begin(micro[last], last=False)
    parts = [_embed(model, objective, batch, around=around, keep=at == last) for at, batch in enumerate(micro)]
    whole, first = _gather([part.found for part in parts])
    rows = range(first, first + sum(part.found.rows for part in parts))
    with torch.enable_grad(), around():
        sums = objective.loss(whole, rows=rows)
    loss = weigh(sums)
    after = rng_state()
    total = collectives.all_reduce_sum(loss.detach().clone())
    detached = {name: value.detach() for name, value in sums.items()}
    if not bool(total.isfinite()):
        return Share(sums=detached, reached=False, complete=False, broken=_not_finite(parts))
    loss.backward()
    _hand_out(whole, parts, first=first)
    kept, reached = {name: buffer.clone() for name, buffer in _live_buffers(model).items()}, _learns(objective)
    for part in reversed(parts):
        if layout.in_step:
            layout.begin(part.batch, last=part is parts[0])
        reached |= _send_back(model, objective, part, around=around, layout=layout)
    for name, buffer in _live_buffers(model).items():
        buffer.copy_(kept[name])
    set_rng_state(*after)
    return Share(sums=detached, reached=reached)


def _embed(
    model: nn.Module,
    objective: Pairwise,
    batch: Batch,
    *,
    around: Callable[[], contextlib.AbstractContextManager[object]],
    keep: bool,
) -> _Part:
    rng = rng_state()
    with torch.set_grad_enabled(keep), around(), mesh.explained():
        found = objective.embed(model, batch)
    bare = replace(
        found,
        vectors={name: value.detach() for name, value in found.vectors.items()},
        factors={name: value.detach() for name, value in found.factors.items()},
    )
    return _Part(batch=batch, rng=rng, found=bare, graph=found if keep else None)


def _send_back(
    model: nn.Module,
    objective: Pairwise,
    part: _Part,
    *,
    around: Callable[[], contextlib.AbstractContextManager[object]],
    layout: Whole,
) -> bool:
    """Embed again, unless the graph is still there, and go back through it; whether anything learns."""
    found, part.graph = part.graph, None
    if found is None:
        set_rng_state(*part.rng)
        with torch.enable_grad(), around(), mesh.explained():
            found = objective.embed(model, part.batch)
        _check_agreement(part, found)
    tensors = {**found.vectors, **{f"factor {name}": value for name, value in found.factors.items()}}
    learned = [name for name in part.gradients if tensors[name].requires_grad]
    outputs, gradients = [tensors[name] for name in learned], [part.gradients[name] for name in learned]
    if layout.in_step:
        outputs.append(layout.touched(torch.zeros((), device=part.batch.token_ids.device)))
        gradients.append(outputs[-1].new_ones(()))
    if outputs:
        with mesh.explained():
            torch.autograd.backward(outputs, gradients)
    return bool(learned)


def _check_in_step(micro: int) -> None:
    counts = mesh.gather(micro)
    if len(set(counts)) > 1:
        raise ConfigError(
            f"{min(counts)} micro-batches in one process and {max(counts)} in another, which hold the model in pieces",
            place="micro_batch",
            remedy="set batch_size to a multiple of micro_batch times the processes, or parallel.zero to 0",
        )


def _hand_out(whole: Embedded, parts: Sequence[_Part], *, first: int) -> None:
    """Give each micro-batch the gradient of its vectors, summed over ranks; one of them also that of the factors."""
    for name, value in whole.vectors.items():
        gradient = collectives.all_reduce_sum(value.grad if value.grad is not None else torch.zeros_like(value))
        start = int((whole.row_of[name] < first).sum())  # those of the ranks before
        for part in parts:
            if name in part.found.vectors:
                count = len(part.found.vectors[name])
                part.gradients[name] = gradient[start : start + count]
                start += count
    for name, value in whole.factors.items():
        if value.grad is not None:  # of this rank's rows alone: the sum over ranks comes with the weights'
            parts[-1].gradients[f"factor {name}"] = value.grad


def _learns(objective: Pairwise) -> bool:
    """Whether the objective has weights of its own that got a gradient."""
    return isinstance(objective, nn.Module) and any(weight.grad is not None for weight in objective.parameters())


def _not_finite(parts: Sequence[_Part]) -> tuple[str, ...]:
    broken = [p for p in parts if not all(bool(v.isfinite().all()) for v in p.found.vectors.values())]
    return tuple(i for part in broken for i in part.batch.sample_ids)


def _check_agreement(part: _Part, again: Embedded) -> None:
    for name, before in part.found.vectors.items():
        if not before.numel():
            continue
        gap = (again.vectors[name].detach() - before).abs().max()
        if not bool(gap <= _AGREE * before.abs().max()):
            raise ConfigError(
                f"a micro-batch embedded again gave other {name} vectors, by up to {float(gap):.2g}",
                place=f"samples {', '.join(part.batch.sample_ids[:3])} ...",
                remedy="the model must be a function of its weights, the batch and torch's random numbers; else set "
                "micro_batch to 0",
            )


# --- micro-batches and ranks together ------------------------------------------------------------------------------


def _gather(parts: Sequence[Embedded]) -> tuple[Embedded, int]:
    """All micro-batches of all ranks as leaves of a new graph, and the number of this rank's first row."""
    own, rank = join(parts), mesh.rank()
    if mesh.world() == 1:
        return _as_leaves(own), 0
    here = {
        "rows": own.rows,
        "vectors": {n: [*v.shape[1:], str(v.dtype).removeprefix("torch.")] for n, v in own.vectors.items()},
    }
    told = [json.loads(text) for text in collectives.all_gather_text(json.dumps(here))]
    kinds = {name: kind for one in told for name, kind in one["vectors"].items()}
    pieces = [
        Embedded(vectors={}, row_of={}, classes=c, factors=own.factors) for c in collectives.all_gather(own.classes)
    ]
    vectors: list[dict[str, Tensor]] = [{} for _ in pieces]
    row_of: list[dict[str, Tensor]] = [{} for _ in pieces]
    for name in sorted(kinds):
        *shape, dtype = kinds[name]
        none = own.classes.new_zeros(0, *shape, dtype=getattr(torch, dtype))
        values = collectives.all_gather(own.vectors.get(name, none))
        belongs = collectives.all_gather(own.row_of.get(name, own.classes[:0]))
        for at, (value, row) in enumerate(zip(values, belongs, strict=True)):
            if len(value):
                vectors[at][name], row_of[at][name] = value, row
    whole = join([replace(p, vectors=v, row_of=r) for p, v, r in zip(pieces, vectors, row_of, strict=True)])
    return _as_leaves(whole), sum(one["rows"] for one in told[:rank])


def join(parts: Sequence[Embedded]) -> Embedded:
    """One after the other; rows are numbered through. A name that a part lacks has none of its items."""
    starts = [sum(part.rows for part in parts[:at]) for at in range(len(parts))]
    names = list(dict.fromkeys(name for part in parts for name in part.vectors))
    return Embedded(
        vectors={name: torch.cat([p.vectors[name] for p in parts if name in p.vectors]) for name in names},
        row_of={
            name: torch.cat([p.row_of[name] + at for p, at in zip(parts, starts, strict=True) if name in p.vectors])
            for name in names
        },
        classes=torch.cat([part.classes for part in parts]),
        factors=parts[0].factors,
    )


def _as_leaves(found: Embedded) -> Embedded:
    return replace(
        found,
        vectors={name: value.detach().clone().requires_grad_() for name, value in found.vectors.items()},
        factors={name: value.detach().clone().requires_grad_() for name, value in found.factors.items()},
    )


def _live_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers of modules in training mode: those that a forward pass may change."""
    return {
        f"{path}.{name}": buffer
        for path, module in model.named_modules()
        if module.training
        for name, buffer in module.named_buffers(recurse=False)
    }
