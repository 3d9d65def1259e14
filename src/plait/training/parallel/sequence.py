"""Sequence parallelism beside tensor parallelism: between the matrices that processes divide, each has its positions.

Norms, sums of the stream and dropout are done position by position, so that each of the processes that divide the
matrices needs its own piece of a row alone. Before an attention and a feed-forward network the pieces are gathered;
behind their last matrix, which is cut by its inputs, the sums are scattered. Both together send what the one sum of
:mod:`.pairs` sends. What a matrix that learns was given is not kept but gathered once more in the backward pass.

Korthikanti et al., Reducing activation recomputation in large Transformer models, https://arxiv.org/abs/2205.05198,
section 4.2.
"""

# torch's annotations are partial: its members count as partially unknown.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn import functional

from plait.core import collectives, dtensors
from plait.core.errors import ConfigError
from plait.models.crossattend import ReadingLayer
from plait.training.parallel.pairs import Pairs


@dataclass(frozen=True, slots=True, kw_only=True)
class Pieces:
    """Rows cut by their positions: one piece after the other, all of one length; the last ends in padding, or is it.

    Attributes:
        length: Of the whole rows.
        group: The processes, in order.
    """

    length: int
    group: dist.ProcessGroup

    @property
    def each(self) -> int:
        """Positions of a piece."""
        return -(-self.length // self.group.size())

    def own(self, whole: Shaped[Tensor, "b t *rest"]) -> Shaped[Tensor, "b p *rest"]:
        """This process's piece; zeros at padding."""
        start = min(self.group.rank() * self.each, self.length)
        piece = whole[:, start : start + self.each]
        if missing := self.each - piece.shape[1]:
            return torch.cat([piece, piece.new_zeros(len(piece), missing, *piece.shape[2:])], dim=1)
        return piece.clone()  # so that nothing keeps the whole row

    def placed(self, piece: Shaped[Tensor, "b p *rest"]) -> Shaped[Tensor, "b t *rest"]:
        """This process's piece at its place in whole rows; zeros elsewhere."""
        start = min(self.group.rank() * self.each, self.length)
        whole = piece.new_zeros(len(piece), self.length, *piece.shape[2:])
        mine = whole[:, start : start + self.each]
        mine.copy_(piece[:, : mine.shape[1]])
        return whole

    def gathered(self, piece: Shaped[Tensor, "b p *rest"]) -> Shaped[Tensor, "b t *rest"]:
        """Whole rows of every process's piece."""
        whole = collectives.gather_equal(piece, self.group).transpose(0, 1).flatten(1, 2)
        return whole[:, : self.length].contiguous()

    def summed(self, whole: Shaped[Tensor, "b t *rest"]) -> Shaped[Tensor, "b p *rest"]:
        """This process's piece of the sum of all processes' rows; zeros at padding."""
        if missing := self.each * self.group.size() - self.length:
            whole = torch.cat([whole, whole.new_zeros(len(whole), missing, *whole.shape[2:])], dim=1)
        return collectives.sum_scattered(whole.unflatten(1, (-1, self.each)).transpose(0, 1), self.group)


class _Cut(torch.autograd.Function):
    """Rows that all processes have → this one's piece; the gradient is gathered."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, pieces: Pieces) -> Tensor:
        ctx.pieces = pieces
        return pieces.own(whole)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.pieces.gathered(gradients[0]), None


class _Own(torch.autograd.Function):
    """Rows that all processes have → this one's piece, where the gradients of all are summed further back."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, pieces: Pieces) -> Tensor:
        ctx.pieces = pieces
        return pieces.own(whole)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.pieces.placed(gradients[0]), None


class _Joined(torch.autograd.Function):
    """Pieces → rows that all processes go on with alike, so that a piece's gradient is there."""

    @staticmethod
    def forward(ctx: Any, piece: Tensor, pieces: Pieces) -> Tensor:
        ctx.pieces = pieces
        return pieces.gathered(piece).clone()  # no view: FSDP warns of one that a model gives

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.pieces.own(gradients[0]), None


class _Gathered(torch.autograd.Function):
    """Pieces → rows of which each process computes another part, so that gradients are summed, and scattered."""

    @staticmethod
    def forward(ctx: Any, piece: Tensor, pieces: Pieces) -> Tensor:
        ctx.pieces = pieces
        return pieces.gathered(piece)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.pieces.summed(gradients[0]), None


class _Summed(torch.autograd.Function):
    """Rows of which each process has a part of the sum → this one's piece of the sum; the gradient is gathered."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, pieces: Pieces) -> Tensor:
        ctx.pieces = pieces
        return pieces.summed(part)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.pieces.gathered(gradients[0]), None


class _Again:
    """Whole rows once more in the backward pass: gathered by the first matrix that was given them, gone with the last.

    Args:
        pieces: How they are cut.
    """

    def __init__(self, pieces: Pieces) -> None:
        self.pieces, self.wanted = pieces, 0
        self._known: Tensor | None = None

    def rows(self, piece: Tensor) -> Tensor:
        """Of this process's piece."""
        found = self.pieces.gathered(piece) if self._known is None else self._known
        self.wanted -= 1
        self._known = found if self.wanted > 0 else None
        return found


class _Learned(torch.autograd.Function):
    """A linear layer that learns, which keeps of its input this process's piece alone."""

    @staticmethod
    def forward(  # noqa: PLR0917 (the form that autograd calls)
        ctx: Any, x: Tensor, piece: Tensor, weight: Tensor, bias: Tensor | None, again: _Again
    ) -> Tensor:
        ctx.save_for_backward(piece, weight)
        ctx.again = again
        again.wanted += 1
        return functional.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        piece, weight = ctx.saved_tensors
        of_x, _, _, of_bias, _ = ctx.needs_input_grad
        gradient = gradients[0].flatten(0, -2)
        rows = ctx.again.rows(piece).flatten(0, -2)
        return (
            (gradient @ weight).view(*gradients[0].shape[:-1], -1) if of_x else None,
            None,
            gradient.T @ rows,
            gradient.sum(0) if of_bias else None,
            None,
        )


class _Given(NamedTuple):
    """What matrices are given that are cut by their outputs.

    Attributes:
        piece: This process's.
        rows: Whole ones.
        again: These in the backward pass.
    """

    piece: Tensor
    rows: Tensor
    again: _Again


class SequencePairs(Pairs):
    """Cut matrices, between which each process has a piece of every row.

    Args:
        ranks: The processes.
    """

    def __init__(self, ranks: DeviceMesh) -> None:
        super().__init__(ranks)
        self._length = 0  # of the rows of a forward pass
        self._pieces: Pieces | None = None  # of the block that is computed, which may be one of the backward pass
        self._given: _Given | None = None  # of the attention, or feed-forward network, that is computed
        self._own: tuple[Tensor, Tensor] | None = None  # its rows, and of them what adapters compute

    def divide(self, base: Any) -> Iterator[nn.Parameter]:
        """Let the blocks of a language model compute pieces, after its matrices are cut.

        Of a stage of a pipeline, hidden states stay cut where they come from another one, or go to one.

        Args:
            base: Has ``layers``; other stages' have no weights.

        Yields:
            Weights that all processes have whole and use for their positions alone.
        """
        layers: list[nn.Module] = list(base.layers)
        here = [layer for layer in layers if any(True for _ in layer.parameters())]
        layers[0].register_forward_pre_hook(partial(self._begin, cuts=layers[0] in here), with_kwargs=True)
        for layer in here:
            layer.register_forward_pre_hook(self._tell, with_kwargs=True)
            layer.__dict__["forward"] = partial(self._block, layer.forward)
            self._gather_before(layer)
            for dropout in (part for part in layer.children() if type(part) is nn.Dropout):
                dropout.__dict__["forward"] = partial(self._drop, dropout)
        if layers[-1] in here:
            norm = last_norm(base)
            assert norm is not None, "looked for before anything is cut"
            norm.register_forward_hook(self._join)
            here.append(norm)
        for module in (part for layer in here for part in layer.modules()):
            if getattr(module.__dict__.get("forward"), "func", None) != self.of_heads:
                yield from (w for w in module.parameters(recurse=False) if _is_whole(w))

    def columns(self, linear: nn.Linear, x: Tensor) -> Tensor:
        """This process's outputs of a linear layer at all positions."""
        given = self._given
        if given is None or given.rows is not x:  # of an adapter, whose other matrix computes pieces
            given = self._gathered(x)
        weight, bias = dtensors.local(linear.weight), None if linear.bias is None else dtensors.local(linear.bias)
        if not (weight.requires_grad and torch.is_grad_enabled()):
            return functional.linear(given.rows, weight, bias)
        weight, bias = _as_products(weight), None if bias is None else _as_products(bias)
        found = _Learned.apply(given.rows, given.piece, weight, bias, given.again)
        assert isinstance(found, Tensor)
        return found

    def rows(self, linear: nn.Linear, x: Tensor) -> Tensor:
        """All outputs of a linear layer of which each process has its inputs, at this process's positions."""
        found = _Summed.apply(functional.linear(x, dtensors.local(linear.weight)), self._cutting)
        assert isinstance(found, Tensor)
        return found if linear.bias is None else found + dtensors.local(linear.bias)

    @property
    def _cutting(self) -> Pieces:
        assert self._pieces is not None, "a matrix of a block, outside of it"
        return self._pieces

    def _gathered(self, x: Tensor) -> _Given:
        piece = _as_products(x)
        rows = _Gathered.apply(piece, self._cutting)
        assert isinstance(rows, Tensor)
        return _Given(piece.detach(), rows, _Again(self._cutting))

    # --- blocks ----------------------------------------------------------------------------------------------------

    def _begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, cuts: bool) -> Any:
        """Cut the rows that the first block gets."""
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        self._length = hidden.shape[1]
        if not cuts:
            return None
        piece = _Cut.apply(hidden, self._of(self._length))
        return ((piece, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": piece})

    def _tell(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """How long rows are goes with the call: a block that is computed again is not of the latest pass."""
        return args, kwargs | {"row_length": self._length}

    def _block(self, forward: Callable[..., Any], *args: Any, row_length: int, **kwargs: Any) -> Any:
        self._pieces = self._of(row_length)
        return forward(*args, **kwargs)

    def _drop(self, module: nn.Dropout, piece: Tensor) -> Tensor:
        """Dropout of hidden states: of one mask for whole rows, the same in all processes, this one's piece."""
        if not (module.training and module.p):
            return piece
        whole = piece.new_ones(len(piece), self._cutting.length, *piece.shape[2:])
        return piece * self._cutting.own(functional.dropout(whole, module.p))

    def _gather_before(self, block: nn.Module) -> None:
        """Give whole rows to the parts of a block whose matrices are cut by their outputs."""
        for part in [*block.modules()]:
            children = [getattr(child, "base_layer", child) for child in part.children()]
            if not any(self._is_cut_by_outputs(child) for child in children) or isinstance(part, nn.ModuleDict):
                continue
            if not hasattr(part, "base_layer"):
                part.__dict__["forward"] = partial(self._whole, part.forward)
                continue
            for matrix in part.lora_A.children():  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
                matrix.__dict__["forward"] = partial(self._beside, matrix.forward)

    def _is_cut_by_outputs(self, module: nn.Module) -> bool:
        return getattr(module.__dict__.get("forward"), "func", None) == self.columns

    def _whole(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """An attention, or a feed-forward network, on whole rows."""
        self._given = given = self._gathered(args[0] if args else kwargs["hidden_states"])
        try:
            if args:
                return forward(given.rows, *args[1:], **kwargs)
            return forward(**kwargs | {"hidden_states": given.rows})
        finally:
            self._given = self._own = None

    def _beside(self, forward: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        """The whole matrix of an adapter beside one that is cut by its outputs: of this process's positions."""
        if self._own is None or self._own[0] is not rows:
            piece = _Own.apply(rows, self._cutting)
            assert isinstance(piece, Tensor)
            self._own = rows, piece
        return forward(self._own[1])

    def _join(self, _: nn.Module, __: Any, output: Tensor) -> Any:
        """Whole rows behind the last norm."""
        return _Joined.apply(output, self._of(self._length))

    def _of(self, length: int) -> Pieces:
        return Pieces(length=length, group=self.ranks.get_group())


def check_pieces(base: Any, cut: set[int]) -> None:
    """See that between cut matrices all is done position by position.

    Args:
        base: A language model with ``layers``, of which nothing is cut yet.
        cut: Modules that are cut, or work on the heads of one that is, by ``id``.

    Raises:
        ConfigError: It is not known to be.
    """
    for number, block in enumerate(base.layers):
        if isinstance(block, ReadingLayer):
            raise _refused(f"{type(base).__name__} reads media inside its blocks, at all positions of a row")
        for name, module in block.named_modules():
            weights = any(True for _ in module.parameters(recurse=False))
            known = id(module) in cut or (".lora_" in name) or ("." not in name and _is_norm(module))
            if weights and not known:
                kind = f"{type(base).__name__} has at layers.{number}.{name} a {type(module).__name__}"
                raise _refused(f"{kind}, of which it is not known whether it works position by position")
            if type(module) is nn.Dropout and module.p and "." in name and ".lora_" not in name:
                kind = f"{type(base).__name__} has at layers.{number}.{name} dropout of {module.p:g}"
                raise _refused(f"{kind}, of which it is not known whether it sees pieces or whole rows")
    if any(True for _ in base.layers[-1].parameters()) and last_norm(base) is None:
        raise _refused(f"{type(base).__name__} has not one norm behind its blocks, but none or several")


def last_norm(base: Any) -> nn.Module | None:
    """The norm behind the blocks of a language model; None where there is not just one."""
    norms = [module for module in base.children() if _is_norm(module)]
    return norms[0] if len(norms) == 1 else None


def _is_norm(module: nn.Module | None) -> bool:
    return "norm" in type(module).__name__.lower()


def _is_whole(weight: Tensor) -> bool:
    """Whether every process has all of a weight, as DTensor or not."""
    return not isinstance(weight, DTensor) or all(placement.is_replicate() for placement in weight.placements)


def _as_products(tensor: Tensor) -> Tensor:
    """In the format in which autocast computes products: it is sent and kept so, too."""
    kind = tensor.device.type
    if not torch.is_autocast_enabled(kind) or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(kind))


def _refused(cause: str) -> ConfigError:
    return ConfigError(cause, place="trainer.parallel.sequence", remedy="set trainer.parallel.sequence to false")
