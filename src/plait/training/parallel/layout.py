"""How the processes that train together hold the model: all of it in each. See :mod:`plait.training.parallel.twin`."""

# torch's annotations are partial: its members count as partially unknown.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from plait.core import collectives, dtensors, mesh
from plait.core.grid import Grid
from plait.core.protocols import Objective
from plait.core.tensors import Batch
from plait.training.average import MovingAverage
from plait.training.norm import Norm, clip, parts_of
from plait.training.parallel.context import Rows
from plait.training.parallel.expert import EXPERT, ExpertGroups, of_expert
from plait.training.parallel.order import Span


class Whole:
    """Every process has the whole model; gradients are summed over all of them. In one process, nothing is special.

    Attributes:
        model: What trains.
        objective: What it minimizes.
        grid: Where this process is among the others.
        in_step: Whether a pass of one process waits for the others, so that all make equally many of them.
        in_pieces: Whether processes hold different weights, so that a checkpoint is written by all of them.
        elsewhere: Names of weights that train, or not, in other processes alone.
        experts: Which processes divide experts between them, where they do.
        rows: How processes share rows, where they do.
        in_part: Names of weights that the processes of ``tensor`` have whole and use for their own positions alone.
    """

    in_step = False
    in_pieces = False
    elsewhere: frozenset[str] = frozenset()
    experts: ExpertGroups | None = None
    rows: Rows | None = None
    in_part: frozenset[str] = frozenset()

    def __init__(self, model: nn.Module, objective: Objective, *, grid: Grid | None = None) -> None:
        self.model, self.objective = model, objective
        self.grid = grid or Grid.of(mesh.rank(), mesh.world())

    # --- a step ----------------------------------------------------------------------------------------------------

    def share(self, rows: Rows) -> None:
        """Let processes share rows from now on."""
        self.rows, self.in_step = rows, True

    def part(self, batch: Batch) -> Batch:
        """What of a batch this process trains on, if it shares rows with others."""
        return batch if self.rows is None else self.rows.part(batch)

    def begin(self, batch: Batch, *, last: bool) -> None:
        """Tell which micro-batch is computed now, and whether it is the step's last."""
        if self.rows is not None:
            self.rows.begin(batch)

    def touched(self, loss: Tensor) -> Tensor:
        """The loss, as a function of all that a backward pass must reach in every process."""
        return loss

    def sum_gradients(self) -> None:
        """Add up the gradients of the processes that hold the same weights and saw other tokens.

        A process in which a weight got none still takes part in its sum.
        """
        if self.in_part:
            named = self.model.named_parameters()
            own = [weight for name, weight in named if name in self.in_part and weight.requires_grad]
            if own:
                self._sum(own, self.grid.group("tensor"))
        if self.grid.data * self.grid.context == 1:
            return
        weights = [weight for weight in self._learning() if not _summed_on_the_way(weight)]
        self._sum([w for w in weights if not of_expert(w)], self.grid.group("data", "context"))
        if self.experts is not None and self.experts.copies is not None:
            self._sum([w for w in weights if of_expert(w)], self.experts.copies)

    def _sum(self, weights: Sequence[nn.Parameter], group: collectives.Group) -> None:
        # What got no gradient in any process has none, as in one process: an optimizer leaves it alone.
        here = torch.tensor([weight.grad is not None for weight in weights], dtype=torch.int64)
        counts = collectives.all_reduce_sum(here, group).tolist()
        weights = [weight for weight, count in zip(weights, counts, strict=True) if count]
        for weight in weights:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        grads = [dtensors.local(weight.grad) for weight in weights if weight.grad is not None]
        collectives.all_reduce_many(grads, group)

    def settle(self) -> None:
        """After a step's gradients are there."""
        if self.rows is not None:
            self.rows.end()

    def take_timeline(self) -> list[Span]:
        """What the stages of a pipeline did in a step that they measured, once, in process 0; mostly nothing."""
        return []

    def clip(self, weights: Mapping[str, nn.Parameter], largest: float | None) -> Norm:
        """Scale the whole gradient to a norm if it is longer; see :func:`plait.training.norm.clip`."""
        grads = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
        return clip(grads, largest, parts=parts_of(weights))

    def moved(self, weights: Mapping[str, nn.Parameter]) -> Mapping[str, nn.Parameter]:
        """What this process's optimizer moves of the weights that train here, by name."""
        return weights

    def update(self, optimizer: torch.optim.Optimizer) -> None:
        """Move the weights."""
        optimizer.step()

    def _learning(self) -> Iterator[nn.Parameter]:
        """Every trained weight once."""
        modules = [self.model, *([self.objective] if isinstance(self.objective, nn.Module) else [])]
        yield from {id(w): w for module in modules for w in module.parameters() if w.requires_grad}.values()

    # --- the caller's model ----------------------------------------------------------------------------------------

    def shown(self, average: MovingAverage | None = None) -> AbstractContextManager[None]:
        """Inside, the caller's model has its weights, or their average."""
        return average.in_place() if average is not None else nullcontext()

    def finish(self) -> None:
        """Leave the caller's model with its weights."""
        if self.rows is not None:
            self.rows.finish()


def _summed_on_the_way(weight: Tensor) -> bool:
    """Whether a weight lies in pieces on the processes that see other tokens: its gradient has been summed."""
    return isinstance(weight, DTensor) and weight.device_mesh.mesh_dim_names not in {("tensor",), (EXPERT,)}
