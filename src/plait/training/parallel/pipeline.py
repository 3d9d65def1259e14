"""Pipeline parallelism: each process has some blocks of a language model, and micro-batches go from one to the next.

Towers, connectors and embeddings are on the first stage, norm, head and loss on the last (:mod:`.cut`); GPipe or 1F1B
say who computes what when (:mod:`.order`, :mod:`.runner`). All processes of a pipeline have the same batches, and each
keeps weights, gradients and optimizer state of its own blocks only. Where the head is the table of embeddings, first
and last stage have a copy each, whose gradients are added: they stay equal bit for bit. Several processes may divide
the matrices of a stage between them (:mod:`.tensor`): each has a pipeline of its own, with its parts of all stages.
"""

# torch's annotations are partial: its members count as partially unknown.
# pyright: reportUnknownMemberType=false, reportPrivateImportUsage=false

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from plait.core import dtensors, mesh
from plait.core.errors import ConfigError
from plait.core.grid import Grid
from plait.core.protocols import Objective
from plait.core.tensors import Batch
from plait.models.crossattend import layers_of
from plait.models.multimodal import MultimodalLM
from plait.training.average import MovingAverage
from plait.training.norm import Norm, clip, parts_of
from plait.training.parallel.cut import check, keep_only, owners, stages_of
from plait.training.parallel.layout import Whole
from plait.training.parallel.order import SCHEDULES, Span
from plait.training.parallel.runner import Link, Timeline, run
from plait.training.parallel.tensor import divide
from plait.training.parallel.updates import RowPieces
from plait.training.trainer import Parallel

_RECORDED = 2  # which step: in the first one, connections are made


class _Left(Exception):
    """No error: a pass ends where the next stage begins, with what the last block of this one gave."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class Staged(Whole):
    """A twin of the model that has the blocks of one stage.

    Weights of other stages are empty in the caller's model until :meth:`finish`, but in :meth:`shown`.

    Args:
        model: Of the caller.
        objective: Copied with it; must have no weights.
        parallel: How many stages, which schedule, the blocks of each, and how many processes divide one.
        grid: Where this process is among the others.
        device: ``cpu`` or ``cuda``.

    Attributes:
        most_kept: The most micro-batches whose activations this stage held at a time.

    Raises:
        ConfigError: The model cannot be cut so.
    """

    in_pieces = True

    def __init__(self, model: nn.Module, objective: Objective, parallel: Parallel, *, grid: Grid, device: str) -> None:
        whole = check(model, objective)
        parts = stages_of(whole, parallel.pipeline, parallel.pipeline_blocks)
        self._plain: dict[str, nn.Parameter] = dict(whole.named_parameters())
        self._holders = owners(whole, parts)
        self._forms = {name: (weight.shape, weight.dtype, weight.device) for name, weight in self._plain.items()}
        self._buffers = _buffers(whole)
        tensors = [*self._plain.values(), *whole.buffers()]
        twin, copied = copy.deepcopy((whole, objective), {id(tensor): tensor for tensor in tensors})  # no weight is
        super().__init__(twin, copied, grid=grid)
        self.link = Link(grid.group("pipeline"), grid.group("pipeline", again=True), device=device)
        self._schedule, self._device, self._steps = SCHEDULES[parallel.schedule], device, 0
        self._measured: list[Span] = []
        self.most_kept = 0
        self._received: Tensor | None = None
        self._blank = _blank_inputs(whole)
        part = parts[self.link.stage]
        layers = layers_of(twin.decoder)
        if not self.link.first:
            layers[part[0]].register_forward_pre_hook(self._enter, with_kwargs=True)
            twin.__dict__["inputs"] = self._blank
        if not self.link.last:
            layers[part[-1]].register_forward_hook(_leave)
        self._own = {name for name, stages in self._holders.items() if self.link.stage in stages}
        self.elsewhere = frozenset(self._holders.keys() - self._own)
        keep_only(twin, part, {id(self._plain[name]) for name in self._own})
        self.elsewhere |= self._buffers.keys() - _buffers(twin).keys()  # gone with modules of other stages
        devices = grid.devices(device) if parallel.tensor > 1 or parallel.zero else None
        if parallel.tensor > 1 and devices is not None:
            self.in_part = divide(twin, devices["tensor"], sequence=parallel.sequence)
            if parallel.sequence:
                grid.group("tensor")  # made here, where all processes are
        self._shares = devices if parallel.zero and grid.data > 1 else None
        self._pieces: RowPieces | None = None
        self._held = dict(twin.named_parameters())
        # Of these, what is the caller's weight itself, not a piece of it.
        self._kept = {name for name in self._own if not isinstance(self._held[name], DTensor)}
        self._empty()

    # --- a step ----------------------------------------------------------------------------------------------------

    def run(self, micro: Sequence[Batch], passed: Callable[[Batch], Tensor]) -> None:
        """Forward and backward of a step's micro-batches, as far as they are this stage's.

        Args:
            micro: The same in all stages.
            passed: A micro-batch through objective and model; gives its loss, where it gets that far.
        """

        def compute(number: int, received: Tensor | None) -> Tensor:
            self._received = received
            try:
                loss = passed(micro[number])
            except _Left as left:
                return left.hidden
            if self._received is not None or not self.link.last:
                raise ConfigError(
                    "the objective does not run the model's decoder",
                    place="trainer.parallel.pipeline",
                    remedy="set it to 1 for this objective",
                )
            return loss

        self._steps += 1
        timeline = Timeline(self.link.stage, device=self._device) if self._steps == _RECORDED else None
        order = self._schedule(self.link.stage, self.link.stages, len(micro))
        self.most_kept = max(self.most_kept, run(order, compute, self.link, timeline=timeline))
        if timeline is not None:
            told = mesh.gather([astuple(span) for span in timeline.spans] if 0 in self.grid.ranks("pipeline") else [])
            self._measured = [Span(*span) for spans in told for span in spans]

    def take_timeline(self) -> list[Span]:
        """Of the first pipeline, after the second step."""
        measured, self._measured = self._measured, []
        return measured

    def sum_gradients(self) -> None:
        """Over the processes that hold the same weights; then of the two copies of a table that is the head, too."""
        super().sum_gradients()
        if not (self.link.first or self.link.last):
            return
        twice = [self._held[name] for name, stages in sorted(self._holders.items()) if len(stages) > 1]
        twice = [weight for weight in twice if weight.requires_grad]
        if not twice:
            return
        here = torch.tensor([weight.grad is not None for weight in twice], dtype=torch.int64, device=self._device)
        for weight, found in zip(twice, (here + self._exchanged(here)).tolist(), strict=True):
            if found:
                weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
                mine = dtensors.local(weight.grad)
                mine += self._exchanged(mine)  # a + b there, b + a here: the same bits

    def clip(self, weights: Mapping[str, nn.Parameter], largest: float | None) -> Norm:
        """Of all stages together; a copy of the head's table counts once."""
        grads = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
        counted = {name: grad for name, grad in grads.items() if self._holders[name][0] == self.link.stage}
        copies = [grad for name, grad in grads.items() if self._holders[name][0] != self.link.stage]
        parts = parts_of(name for name, weight in self._plain.items() if weight.requires_grad)
        return clip(counted, largest, parts=parts, copies=copies, stages=self.link.stages)

    def moved(self, weights: Mapping[str, nn.Parameter]) -> Mapping[str, nn.Parameter]:
        """All of this stage's; with ``zero`` the rows of this process's share of the data."""
        if self._shares is None:
            return weights
        self._pieces = RowPieces(weights, self._shares)
        return self._pieces.moved

    def update(self, optimizer: torch.optim.Optimizer) -> None:
        """Move the weights; where processes move rows of them, they exchange these."""
        if self._pieces is not None:
            self._pieces.take_gradients()
        optimizer.step()
        if self._pieces is not None:
            self._pieces.exchange()

    def _exchanged(self, mine: Tensor) -> Tensor:
        """What the last stage has, on the first one, and the other way round."""
        group, theirs = self.link.onward, torch.empty_like(mine)
        peer = self.link.stages - 1 if self.link.first else 0
        ends = [
            dist.P2POp(dist.isend, mine, group=group, group_peer=peer),
            dist.P2POp(dist.irecv, theirs, group=group, group_peer=peer),
        ]
        with mesh.explained():
            for work in dist.batch_isend_irecv(ends):
                work.wait()
        return theirs

    def _enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Give the first block what came from the stage before, instead of what was computed here."""
        received, self._received = self._received, None
        if received is None:
            raise ConfigError(
                "the objective runs the model more than once for a micro-batch",
                place="trainer.parallel.pipeline",
                remedy="set it to 1 for this objective",
            )
        if args:
            return (received, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": received}

    # --- the caller's model ----------------------------------------------------------------------------------------

    @contextmanager
    def shown(self, average: MovingAverage | None = None) -> Iterator[None]:
        """Inside, the caller's model of process 0 has its weights, or their average. Every process takes part."""
        means = average.tensors() if average is not None else {}
        self._fill(means, everywhere=False)
        kept = {name: self._plain[name].data for name in means.keys() & self._kept}
        for name in kept:  # nothing is copied: a checkpoint being written has both as they are
            self._plain[name].data = means[name]
        try:
            yield
        finally:
            for name, weight in kept.items():
                self._plain[name].data = weight
            self._empty()

    def finish(self) -> None:
        """Give the caller's model its weights back, in every process."""
        self._fill({}, everywhere=True)

    @torch.no_grad()
    def _fill(self, values: Mapping[str, Tensor], *, everywhere: bool) -> None:
        mine = everywhere or 0 in self.grid.ranks("pipeline")
        if mine or self.grid.place("data") == 0:  # pieces are gathered by all that have one
            for name, (holder, *_) in self._holders.items():
                tensor = None
                if holder == self.link.stage and (everywhere or holder or name not in self._kept):
                    with mesh.explained():
                        tensor = dtensors.whole(values.get(name, self._held[name].detach())).contiguous()
                tensor = self._handed(name, tensor, holder, everywhere=everywhere) if mine else None
                if tensor is not None and name not in self._kept:
                    self._plain[name].data = tensor
        for path, (owner, name) in _buffers(self.model).items():  # a module may put another in its place
            here, there = self._buffers[path]
            here._buffers[there] = owner.get_buffer(name)

    def _handed(self, name: str, tensor: Tensor | None, holder: int, *, everywhere: bool) -> Tensor | None:
        """A whole weight of the stage that holds it, given to all stages, or to the first; None in the others."""
        group = self.link.onward
        wanted = everywhere or self.link.first
        if tensor is None and wanted and holder != self.link.stage:
            shape, dtype, device = self._forms[name]
            tensor = torch.empty(shape, dtype=dtype, device=device)
        with mesh.explained():
            if everywhere and tensor is not None:
                dist.broadcast(tensor, group=group, group_src=holder)
            elif tensor is not None and holder:
                if self.link.first:
                    dist.recv(tensor, group=group, group_src=holder)
                else:
                    dist.send(tensor, group=group, group_dst=0)
        return tensor if wanted else None

    def _empty(self) -> None:
        for name in self._plain.keys() - self._kept:
            self._plain[name].data = self._plain[name].data.new_empty(0)


def _leave(_: nn.Module, __: Any, output: Any) -> None:
    """End the pass behind the last block of a stage."""
    raise _Left(output[0] if isinstance(output, tuple) else output)


def _blank_inputs(model: MultimodalLM) -> Callable[[Batch], tuple[Tensor, None]]:
    """In the place of :meth:`MultimodalLM.inputs` where no embeddings are: their shape and number format."""
    table: Tensor = model.decoder.get_input_embeddings().weight  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue, reportAssignmentType]
    nothing, width = torch.zeros((), dtype=table.dtype, device=table.device), table.shape[1]
    return lambda batch: (nothing.expand(*batch.token_ids.shape, width), None)


def _buffers(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Module and own name of every buffer, by path."""
    return {
        f"{path}.{name}": (module, name)
        for path, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    }
