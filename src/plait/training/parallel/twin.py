"""Models of which each process holds a part: pieces of all weights (ZeRO, torch's FSDP2), or parts of matrices.

A twin of the caller's model trains: the same modules, whose weights are pieces. The caller's own model is empty
meanwhile and gets its weights back where somebody looks at it, and at the end.

Rajbhandari et al., ZeRO: memory optimizations toward training trillion parameter models,
https://arxiv.org/abs/1910.02054; Zhao et al., PyTorch FSDP, https://arxiv.org/abs/2304.11277.
"""

# torch's annotations are partial: its members count as partially unknown.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from plait.core import collectives, dtensors, mesh
from plait.core.errors import ConfigError
from plait.core.grid import Grid
from plait.core.protocols import Objective, Pairwise
from plait.core.tensors import Batch
from plait.models.crossattend import GatedCrossAttention, ReadingLayer
from plait.models.recompute import blocks_of
from plait.training.average import MovingAverage
from plait.training.parallel.context import Rows, check_rows
from plait.training.parallel.expert import ExpertGroups
from plait.training.parallel.layout import Whole
from plait.training.parallel.pipeline import Staged
from plait.training.parallel.tensor import divide
from plait.training.trainer import Parallel


class Sharded(Whole):
    """A twin of the model, whose weights, gradients and optimizer state lie in pieces on all processes.

    Transformer blocks are gathered one after the other while they are computed; all that is in none is gathered
    together. Gradients are sums, not means, over processes: counts are global already.
    Parts that only media reach are gathered with the rest, and scalars and channels-last filters stay whole. The
    objective is copied, too: of what it holds, weights and buffers come back, plain attributes do not.

    Args:
        model: Of the caller; empty until :meth:`finish`, but in :meth:`shown`.
        objective: Copied with it, as it may hold weights of the model.
        parallel: How much is spread.
        grid: Where this process is among the others.
        device: ``cpu`` or ``cuda``.

    Raises:
        ConfigError: Blocks are left out by chance.
    """

    in_pieces = True

    def __init__(self, model: nn.Module, objective: Objective, parallel: Parallel, *, grid: Grid, device: str) -> None:
        if parallel.zero and any(_drops_layers(part) for part in model.modules()):
            raise ConfigError(
                "layer_drop leaves blocks out by chance, in each process others, which would wait for each other",
                place="trainer.parallel.zero",
                remedy="set layer_drop (layerdrop in a decoder's config.json) or parallel.zero to 0",
            )
        self._plain = _named(model, objective)
        self._owners = _owners(model, objective)
        tensors = [*self._plain.values(), *(owner.get_buffer(name) for owner, name in self._owners.values())]
        pair = copy.deepcopy((model, objective), {id(tensor): tensor for tensor in tensors})  # no weight is copied
        super().__init__(*pair, grid=grid)
        self.in_step = bool(parallel.zero) or parallel.expert > 1
        self._optional = _optional(self.model) if parallel.zero else {}
        self._outer: set[str] = set()
        self._root: FSDPModule | None = None
        self._routed = any("experts" in name for name, _ in self.model.named_modules())
        self._reach = False
        devices = grid.devices(device)
        if parallel.tensor > 1:
            self.in_part = divide(self.model, devices["tensor"], sequence=parallel.sequence)
            if parallel.sequence:
                grid.group("tensor")  # made here, where all processes are
        if parallel.expert > 1:
            self.experts = ExpertGroups(grid, parallel.expert, device=device)
            self.experts.deal_out(self.model)
        if parallel.zero:
            self._cut(parallel, devices, device=device)
        # As pieces, which a step puts back where it took them from.
        self._spread = {n: w for n, w in _named(self.model, self.objective).items() if isinstance(w, DTensor)}
        self._accumulates = parallel.zero == 1
        self._found: list[Tensor] = []
        self._ran: set[str] = set()
        for name, module in self._optional.items():
            module.register_forward_hook(partial(self._note, name))
        if self.in_step:
            self.model.register_forward_hook(self._remember)
        self._empty()

    def _cut(self, parallel: Parallel, devices: DeviceMesh, *, device: str) -> None:
        """Cut every weight into pieces for the processes that see other tokens (FSDP2)."""
        ranks = devices["data", "context"]._flatten() if self.grid.context > 1 else devices["data"]
        # What cannot be cut stays whole in every process: scalars, and filters that lie channels-last.
        whole = {weight for weight in self.model.parameters() if not (weight.ndim and weight.is_contiguous())}
        policy = CPUOffloadPolicy(pin_memory=device == "cuda") if parallel.offload else OffloadPolicy()
        common: dict[str, Any] = {"mesh": ranks, "offload_policy": policy, "ignored_params": whole}
        apart = {id(part) for module in self._optional.values() for part in module.modules()}
        blocks = [b for b in blocks_of(self.model) if id(b) not in apart and any(True for _ in b.parameters())]
        for block in blocks:
            block.register_forward_hook(self._reached)
            fully_shard(block, reshard_after_forward=parallel.zero == 3, **common)
            block.register_forward_pre_hook(_learning, prepend=True, with_kwargs=True)
        inside = {id(weight) for block in blocks for weight in block.parameters()}
        outer = [(n, w) for n, w in self.model.named_parameters() if id(w) not in inside and w not in whole]
        self._outer = {name for name, weight in outer if weight.requires_grad}
        self._root = cast(FSDPModule, fully_shard(self.model, **common))
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(enable=True)

    # --- a step ----------------------------------------------------------------------------------------------------

    def begin(self, batch: Batch, *, last: bool) -> None:
        """Tell which micro-batch is computed now, and whether it is the step's last.

        Stage 1 keeps weights and gradients whole until then; the others send each micro-batch's gradient on.
        """
        super().begin(batch, last=last)
        self._reach = self._routed or not bool((batch.segment_ids != 0).any())
        if self._accumulates and self._root is not None:
            self._root.set_requires_gradient_sync(last)
            self._root.set_reshard_after_backward(last)

    def touched(self, loss: Tensor) -> Tensor:
        """The loss, as a function of every weight: all processes must send gradients of the same ones.

        Without this a process whose micro-batch has no picture has none for the connector, one without a trained token
        none at all, and the others would wait for it.
        """
        found, self._found = self._found, []
        weights = [weight for name, weight in self.model.named_parameters() if name in self._outer]
        for tensor in (*found, *weights):
            loss = loss + (dtensors.local(tensor) * 0).sum().to(loss.dtype)
        return loss

    def _reached(self, block: nn.Module, _: Any, output: Any) -> Any:
        """A block's output as a function of all its weights, where attention may have met no token, or an expert none.

        It costs a gradient of zeros for each weight, so it is done only there.
        """
        if not ((self._reach or isinstance(block, ReadingLayer)) and torch.is_grad_enabled()):
            return output
        first, *rest = output if isinstance(output, tuple) else (output,)
        for weight in block.parameters():
            if weight.requires_grad:
                first = first + (dtensors.local(weight) * 0).sum().to(first.dtype)
        return (first, *rest) if isinstance(output, tuple) else first

    def settle(self) -> None:
        """After a step: what no process used has no gradient, as in one process, and not one of zeros."""
        super().settle()
        names = list(self._optional)
        used = collectives.all_reduce_sum(
            torch.tensor([name in self._ran for name in names], dtype=torch.int64)
        ).tolist()
        idle = tuple(f"{name}." for name, count in zip(names, used, strict=True) if not count)
        if names and not any(used):
            idle += _WITH_MEDIA
        self._ran.clear()
        for name, piece in self._spread.items():
            if name.startswith(idle):
                piece.grad = None

    def _note(self, name: str, *_: Any) -> None:
        if torch.is_grad_enabled():
            self._ran.add(name)

    def _remember(self, _: nn.Module, __: Any, output: Any) -> None:
        """What the model gave, through which all of its blocks are reached."""
        self._found = [value for value in _held(output) if isinstance(value, Tensor) and value.requires_grad]

    # --- the caller's model ----------------------------------------------------------------------------------------

    @contextmanager
    def shown(self, average: MovingAverage | None = None) -> Iterator[None]:
        """Inside, the caller's model of process 0 has its weights, or their average. Every process takes part."""
        means = average.tensors() if average is not None else {}
        whole = {name: mean for name, mean in means.items() if name not in self._spread}
        self._fill(means, everywhere=False)
        kept = {name: self._plain[name].data for name in whole}
        for name, mean in whole.items():  # whole in every process
            self._plain[name].data = mean.clone()
        try:
            yield
        finally:
            for name, data in kept.items():
                self._plain[name].data = data
            self._empty()

    def finish(self) -> None:
        """Give the caller's model its weights back, in every process."""
        self._fill({}, everywhere=True)
        super().finish()

    @torch.no_grad()
    def _fill(self, values: Mapping[str, Tensor], *, everywhere: bool) -> None:
        for name, piece in self._spread.items():
            value = values.get(name, piece.detach())
            with mesh.explained():
                full = dtensors.whole(value)
            if everywhere or mesh.rank() == 0:
                weight = self._plain[name]
                weight.data = full.to(weight.device, copy=True)
        for path, (owner, name) in _owners(self.model, self.objective).items():  # a module may put another in its place
            here, there = self._owners[path]
            here._buffers[there] = owner.get_buffer(name)

    def _empty(self) -> None:
        for name in self._spread:
            self._plain[name].data = self._plain[name].data.new_empty(0)


def lay_out(model: nn.Module, objective: Objective, parallel: Parallel, *, device: str) -> Whole:
    """Hold the model as the settings say; one process holds all of it in any case.

    Raises:
        ConfigError: CPU offload, where weights are on the CPU anyway; the processes cannot be divided so; or see
            :class:`Sharded` and :func:`plait.training.parallel.context.check_rows`.
    """
    if not mesh.active():
        return Whole(model, objective)
    grid = parallel.grid(mesh.rank(), mesh.world())
    if parallel.divides and isinstance(objective, Pairwise):
        raise ConfigError(
            f"{type(objective).__name__} compares all rows of a batch, and trainer.parallel divides a language model",
            place="trainer.parallel",
            remedy="leave zero alone of its settings",
        )
    if parallel.context > 1:
        check_rows(model, objective, parallel)
    layout = _held_as(model, objective, parallel, grid=grid, device=device)
    if parallel.context > 1:
        layout.share(Rows(layout.model, layout.objective, parallel, grid=grid))
    return layout


def _held_as(model: nn.Module, objective: Objective, parallel: Parallel, *, grid: Grid, device: str) -> Whole:
    if parallel.pipeline > 1:
        return Staged(model, objective, parallel, grid=grid, device=device)
    if not parallel.spreads:
        return Whole(model, objective, grid=grid)
    parallel.check_device(device)
    return Sharded(model, objective, parallel, grid=grid, device=device)


_MEDIA = ("encoders", "connector", "vision", "visual", "audio", "image", "video", "multi_modal", "resampler", "qformer")


_WITH_MEDIA = ("mark",)  # weights of the model itself that only media need


def _optional(model: nn.Module) -> dict[str, nn.Module]:
    """Parts that a batch without some kind of media does not run, by name; not those inside each other.

    They are gathered with the rest of the model, not block by block: a process that does not run them would not take
    part.
    """
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        media = path.rpartition(".")[2].startswith(_MEDIA) or isinstance(module, GatedCrossAttention)
        if media and path and not path.startswith(tuple(f"{name}." for name in found)):
            found[path] = module
    for path in [name for name, module in found.items() if isinstance(module, nn.ModuleDict | nn.ModuleList)]:
        container = found.pop(path)
        found |= {f"{path}.{name}": child for name, child in container.named_children()}
    return found


def _drops_layers(part: nn.Module) -> bool:
    """Ours, and those of transformers."""
    return bool(getattr(getattr(part, "sizes", None), "layer_drop", 0) or getattr(part, "layerdrop", 0))


def _owners(model: nn.Module, objective: object) -> dict[str, tuple[nn.Module, str]]:
    """Module and own name of every buffer, by path."""
    roots = [("", model), *([("objective.", objective)] if isinstance(objective, nn.Module) else [])]
    return {
        f"{prefix}{path}.{name}": (module, name)
        for prefix, root in roots
        for path, module in root.named_modules()
        for name in module._buffers
        if module._buffers[name] is not None
    }


def _learning(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Let a block's input have a gradient in every process.

    That is where FSDP sends the block's own gradients on. Without it the first block of a frozen embedding sends them
    last in a process that has no picture, but in its turn in the others, and two messages of different weights meet.
    """
    if not torch.is_grad_enabled():
        return args, kwargs

    def with_gradient(value: Any) -> Any:
        wants = isinstance(value, Tensor) and value.is_floating_point() and not value.requires_grad
        return value.detach().requires_grad_() if wants else value

    if args:
        return (with_gradient(args[0]), *args[1:]), kwargs
    return args, {name: with_gradient(v) if name == "hidden_states" else v for name, v in kwargs.items()}


def _held(output: Any) -> list[Any]:
    """What a record, a mapping, a sequence or a tensor holds."""
    if isinstance(output, Mapping):
        return list(output.values())
    if isinstance(output, list | tuple):
        return list(output)
    return [getattr(output, name) for name in getattr(output, "__slots__", ())] or [output]


def _named(model: nn.Module, objective: object) -> dict[str, nn.Parameter]:
    """Every weight once; an objective's as :class:`plait.training.state.TrainState` calls them."""
    found = dict(model.named_parameters())
    known = {id(weight) for weight in found.values()}
    if isinstance(objective, nn.Module):
        found |= {f"objective.{n}": w for n, w in objective.named_parameters() if id(w) not in known}
    return found
