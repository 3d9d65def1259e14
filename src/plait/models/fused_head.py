"""Log-probabilities of given tokens, the output head and the loss in one: no scores of a vocabulary are kept.

Scores go through a room of a fixed size, some positions at a time. What their gradient needs is computed while they are
there: ``d log p(y) / d h = W[y] - sum_v p(v) W[v]``, a row of the width of the hidden states for each position. The
idea is that of Liger's fused linear cross-entropy (Hsu et al., https://arxiv.org/abs/2410.10989, section 3.2) and of
Wijmans et al., https://arxiv.org/abs/2411.09009, who recompute the scores in the backward pass instead.

Where several processes have the words of a vocabulary divided between them, each computes the scores of its own, and
they exchange three numbers for each position (Megatron-LM, https://arxiv.org/abs/1909.08053, section 3).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from plait.core import collectives, mesh
from plait.models.head_room import scores_held
from plait.models.output_head import Widened


def fuses(head: nn.Module) -> bool:
    """Whether :func:`token_logprobs` knows this head: a plain linear layer."""
    return type(head) is nn.Linear


def token_logprobs(
    head: nn.Module, hidden: Float[Tensor, "n d"], targets: Int[Tensor, " n"], *, scores: int = 0
) -> Float[Tensor, " n"]:
    """``log softmax(head(hidden_i))[target_i]`` for each position ``i``, in float32 (float64 where the head is).

    Values are those of :func:`plait.models.output_head.float32_scores` and ``log_softmax``. With gradients, hidden
    states get theirs from ``n d`` numbers kept. A head that learns gets its own from ``v d`` numbers kept, where every
    position has the same share in the loss, as in a sum; otherwise its scores are computed once more in the backward
    pass.

    Args:
        head: A plain linear layer, of any format; its bias counts.
        hidden: Hidden states of the positions that predict.
        targets: The token that came after each.
        scores: Scores held at once; 0 takes :func:`plait.models.head_room.scores_held`.

    Raises:
        TypeError: The head is none of :func:`fuses`.
    """
    if not isinstance(head, nn.Linear) or not fuses(head):
        raise TypeError(f"the head is a {type(head).__name__}, not a plain linear layer")
    wide = torch.promote_types(head.weight.dtype, torch.float32)
    bias = None if head.bias is None else head.bias.to(wide)
    # A head that learns in 16 bits is widened whole, so that its gradient arrives; a frozen one piece by piece.
    weight = head.weight.to(wide) if head.weight.requires_grad else head.weight
    room = scores or scores_held(hidden.device.type)
    rows = max(1, room // len(weight))
    words = None
    if isinstance(weight, DTensor):
        words, weight = _Words.of(weight), weight.to_local()
        rows = max(1, room // words.each)
        bias = bias.to_local() if isinstance(bias, DTensor) else bias
    with torch.autocast(hidden.device.type, enabled=False):
        learns = torch.is_grad_enabled()
        return _LogProbs.apply(hidden.to(wide), weight, bias, targets, (rows, words), learns)  # pyright: ignore[reportReturnType]


class _Words(NamedTuple):
    """Which words of a vocabulary are this process's.

    Attributes:
        first: Of them.
        each: How many a process has at most.
        group: The processes that have all of them.
    """

    first: int
    each: int
    group: dist.ProcessGroup

    @classmethod
    def of(cls, weight: DTensor) -> _Words:
        """Of a table that is cut by its rows."""
        ranks = weight.device_mesh
        each = -(-len(weight) // ranks.size())
        return cls(first=ranks.get_local_rank() * each, each=each, group=ranks.get_group())

    def mine(self, goal: Int[Tensor, "r 1"], scores: Float[Tensor, "r v"]) -> tuple[Tensor, Tensor]:
        """Numbers of tokens among this process's words, and 1 where they are, else 0; no column if it has no word."""
        goal = goal - self.first
        here = ((goal >= 0) & (goal < scores.shape[1])).to(scores.dtype)
        own = slice(0, min(scores.shape[1], 1))
        return goal.clamp(0, max(scores.shape[1] - 1, 0))[:, own], here[:, own]

    def of_all(self, scores: Float[Tensor, "r v"], goal: Int[Tensor, "r 1"]) -> _Found:
        """See :func:`_found`, over the words of all processes."""
        goal, here = self.mine(goal, scores)
        lowest = torch.finfo(scores.dtype).min
        peak = scores.amax(1) if scores.shape[1] else scores.new_full((len(scores),), lowest)
        with mesh.explained():
            dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=self.group)
        picked = (scores.gather(1, goal) * here).sum(1)
        total = scores.sub_(peak[:, None]).exp_().sum(1)
        picked, total = collectives.all_reduce_sum(torch.stack([picked, total]), self.group)
        return _Found(picked=picked, peak=peak, total=total, goal=goal, here=here)


class _Found(NamedTuple):
    """Of some positions: the score of the token that came, the highest score, the sum of ``exp(score - highest)``.

    Attributes:
        picked: Score of the token that came.
        peak: Highest score.
        total: Sum over all words.
        goal: Number of the token that came among the words at hand.
        here: 1 where it is among them, else 0; no column where there is no word.
    """

    picked: Float[Tensor, " r"]
    peak: Float[Tensor, " r"]
    total: Float[Tensor, " r"]
    goal: Int[Tensor, "r _"]
    here: Float[Tensor, "r _"]


def _found(scores: Float[Tensor, "r v"], goal: Int[Tensor, "r 1"]) -> _Found:
    """What follows from scores, which become ``exp(score - highest)``."""
    picked = scores.gather(1, goal)[:, 0]
    peak = scores.amax(1)
    total = scores.sub_(peak[:, None]).exp_().sum(1)
    return _Found(picked=picked, peak=peak, total=total, goal=goal, here=torch.ones_like(goal, dtype=scores.dtype))


class _LogProbs(torch.autograd.Function):
    """See :func:`token_logprobs`; ``hidden`` and ``bias`` are wide already, ``weight`` is if it learns."""

    @staticmethod
    def forward(  # noqa: PLR0917 (the form that autograd calls)
        ctx: Any,
        hidden: Float[Tensor, "n d"],
        weight: Float[Tensor, "v d"],
        bias: Float[Tensor, " v"] | None,
        targets: Int[Tensor, " n"],
        how: tuple[int, _Words | None],
        learns: bool,
    ) -> Float[Tensor, " n"]:
        rows, own = how
        wanted = ctx.needs_input_grad[:3] if learns else (False, False, False)
        found = hidden.new_empty(len(hidden))
        peaks = hidden.new_empty(len(hidden))  # log sum exp of each position's scores
        of_hidden, of_weight, of_bias = _empty(wanted, hidden, weight)
        words = Widened(weight, like=hidden)
        for part, scores in _scores(hidden, words, bias, rows=rows):
            goal = targets[part, None]
            said = own.of_all(scores, goal) if own else _found(scores, goal)
            found[part] = said.picked - said.peak - said.total.log()
            peaks[part] = said.peak + said.total.log()
            if any(wanted):
                slopes = scores.div_(-said.total[:, None])
                slopes.scatter_add_(1, said.goal, said.here)
                if of_hidden is not None:
                    for which, wide in words:
                        of_hidden[part].addmm_(slopes[:, which], wide)
                if of_weight is not None:
                    of_weight.addmm_(slopes.T, hidden[part])
                if of_bias is not None:
                    of_bias += slopes.sum(0)
        if own and of_hidden is not None:
            collectives.all_reduce_sum(of_hidden, own.group)
        ctx.rows, ctx.own = rows, own
        again = (hidden, weight, bias, targets, peaks) if any(wanted[1:]) else (None,) * 5
        ctx.save_for_backward(of_hidden, of_weight, of_bias, *again)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        of_hidden, of_weight, of_bias, *_ = ctx.saved_tensors
        (shares,) = gradients
        nothing = (None, None, None)
        if of_hidden is not None:
            of_hidden = of_hidden * shares[:, None]
        if of_weight is None and of_bias is None:
            return of_hidden, None, None, *nothing
        if not len(shares) or bool((shares == shares[0]).all()):
            share = shares[0] if len(shares) else 0.0
            return (
                of_hidden,
                None if of_weight is None else of_weight * share,
                None if of_bias is None else of_bias * share,
                *nothing,
            )
        return of_hidden, *_weighed(ctx, shares), *nothing


def _weighed(ctx: Any, shares: Float[Tensor, " n"]) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of weight and bias where positions have different shares in the loss: once more through the scores."""
    *_, hidden, weight, bias, targets, peaks = ctx.saved_tensors
    _, of_weight, of_bias = _empty((False, *ctx.needs_input_grad[1:3]), hidden, weight)
    with torch.autocast(hidden.device.type, enabled=False):
        for part, scores in _scores(hidden, Widened(weight, like=hidden), bias, rows=ctx.rows):
            share, goal = shares[part, None], targets[part, None]
            here = torch.ones_like(share)
            if ctx.own:
                goal, here = ctx.own.mine(goal, scores)
            slopes = scores.sub_(peaks[part, None]).exp_().mul_(-share)
            slopes.scatter_add_(1, goal, share * here)
            if of_weight is not None:
                of_weight.addmm_(slopes.T, hidden[part])
            if of_bias is not None:
                of_bias += slopes.sum(0)
    return of_weight, of_bias


def _empty(wanted: tuple[bool, ...], hidden: Tensor, weight: Tensor) -> tuple[Tensor | None, ...]:
    """Zeros for the gradients of hidden states, weight and bias, as far as they are wanted."""
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    return tuple(hidden.new_zeros(shape) if want else None for want, shape in zip(wanted, shapes, strict=True))


def _scores(
    hidden: Float[Tensor, "n d"], words: Widened, bias: Float[Tensor, " v"] | None, *, rows: int
) -> Iterator[tuple[slice, Float[Tensor, "r v"]]]:
    """Scores of some positions after the others, all in the same memory, which may be written to."""
    room = hidden.new_empty(min(rows, len(hidden)), len(words.weight))
    for start in range(0, len(hidden), rows):
        part = slice(start, min(start + rows, len(hidden)))
        scores = room[: part.stop - start]
        for which, wide in words:
            torch.mm(hidden[part], wide.T, out=scores[:, which])
        if bias is not None:
            scores += bias
        yield part, scores
