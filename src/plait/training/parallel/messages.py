"""Bytes that a process sends in a step, by what is divided, where messages go around rings: closed forms.

Narayanan et al., https://arxiv.org/abs/2104.04473, section 3; ZeRO's by :func:`plait.training.zero.zero_traffic`.
``benchmarks/scaling.py`` measures them.
"""

from __future__ import annotations

import math

from plait.training.parallel.share import Held, Member, Model
from plait.training.zero import zero_traffic

_BY_INPUTS = frozenset({"o_proj", "down_proj"})
"""Matrices whose inputs tensor parallelism divides."""


def messages(
    member: Member,
    model: Model,
    *,
    positions: int,
    micro: int,
    width: int,
    stream: int,
    again: bool = False,
) -> dict[str, int]:
    """What a process sends in a step.

    Args:
        member: The process.
        model: What trains.
        positions: Of its share of a batch, padding included, as far as they go through blocks here.
        micro: Micro-batches.
        width: Bytes of a number that a matrix product gives.
        stream: And of one that goes from block to block.
        again: Blocks are computed once more in the backward pass.
    """
    held, shape = member.held(model), model.shape
    parallel, layers = member.parallel, held.layers
    tensor, stages, context, expert = parallel.tensor, parallel.pipeline, parallel.context, parallel.expert
    hidden = positions * shape.d_model
    first, last = member.ends
    found: dict[str, int] = {}
    if tensor > 1:
        found["tensor"] = _of_tensor(member, model, held, numbers=positions * width, again=again)
    if context > 1:
        found["context"] = layers * _attention(member, model, positions=positions, width=width, again=again)
    if stages > 1:
        found["pipeline"] = math.ceil(hidden / member.pieces) * stream * (2 - first - last) + 4 * held.twice
    if expert > 1:
        # Tokens go to their experts and come back, forward and backward.
        ways = 6 if again else 4
        found["expert"] = round(ways * layers * shape.top_k * hidden * width * (expert - 1) / expert)
    if member.spread > 1:
        found["data"] = data_messages(member, held, micro=micro, experts=_experts(member, model, held))
    return found


def _of_tensor(member: Member, model: Model, held: Held, *, numbers: int, again: bool) -> int:
    """What processes that divide matrices send: a sum is two halves, a scatter and a gather.

    A block computed again ends where nothing that is kept follows: before its last sum, unless an adapter comes then.
    With pieces, what matrices that learn are given is gathered again in the backward pass; rows are cut before the
    first block and joined behind the last; and gradients of weights that all have whole are summed.

    Args:
        member: The process.
        model: What trains.
        held: What of it is its.
        numbers: Bytes of one number at all positions.
        again: Blocks are computed once more.
    """
    shape, pieces, (first, last) = model.shape, member.pieces > 1, member.ends
    targets = model.lora.targets if model.lora is not None and model.adapter else ()
    behind = [name for name in targets if name in _BY_INPUTS]
    block = 8 + again * (4 if "down_proj" in targets else 2 + pieces) + (2 if pieces and model.learns else 0)
    halves = held.layers * block + 2 * (first + last)  # table and head
    rank, whole = 0, 0
    if pieces:
        halves += last + (first and (model.learns or model.beside > 0))
        rank = 3 * len(targets) - len(behind) + again * len(targets)
        whole = (2 * held.layers + last) * shape.d_model if model.learns else 0
    else:
        rank = 2 * len(targets) + again * 2 * len(behind)
    found = numbers * halves * shape.d_model
    if model.lora is not None:
        found += numbers * held.layers * model.lora.rank * rank
        sizes = shape.matrices()
        sides = sum(sizes[name][name in behind] for name in targets)
        whole += held.layers * model.lora.rank * sides
    share = (member.parallel.tensor - 1) / member.parallel.tensor
    return round(share * (found + pieces * 2 * 4 * whole))


def data_messages(member: Member, held: Held, *, micro: int, experts: int = 0) -> int:
    """Bytes a step for sums of gradients and, with ZeRO, gathers of weights, also of those that do not learn.

    Args:
        member: The process.
        held: What of the model is its, before ZeRO divides it.
        micro: Micro-batches.
        experts: Of its learning weights in blocks, those that only some of the other processes hold.
    """
    zero, world = member.parallel.zero, member.spread
    sent = sum(zero_traffic(held.blocks - experts, held.rest, world=world, stage=zero, passes=micro).values())
    if zero and member.parallel.pipeline > 1:  # gradients stay whole there
        sent += zero_traffic(held.blocks, held.rest, world=world, stage=zero, passes=micro)["sums"]
    if experts:
        sent += sum(zero_traffic(experts, 0, world=world // member.parallel.expert, stage=0).values())
    if zero and held.still and member.parallel.pipeline == 1:
        kind = {"world": world, "stage": zero, "passes": micro, "bytes_number": 1}
        sent += zero_traffic(held.still_blocks, held.still_rest, **kind)["gathers"]
    return sent


def _attention(member: Member, model: Model, *, positions: int, width: int, again: bool) -> int:
    """Bytes of one attention, forward (twice with ``again``) and backward, over positions of which others have more."""
    from plait.models.sequence.ring import ring_bytes  # imports torch
    from plait.models.sequence.ulysses import ulysses_bytes

    own, world = member.decoder(model.shape, loads=model), member.parallel.context
    size = own.d_head or own.d_model // own.heads
    kind = {"groups": own.kv_heads, "width": size, "value_width": size, "world": world, "size": width}
    if member.parallel.context_attention == "ulysses":
        sent = ulysses_bytes((1, positions), heads=own.heads, **kind)
        return sent * 3 // 2 if again else sent
    forward = positions * own.kv_heads * 2 * size * width * (world - 1)
    return ring_bytes((1, positions), wide=max(4, width), **kind) + (forward if again else 0)


def _experts(member: Member, model: Model, held: Held) -> int:
    if member.parallel.expert == 1 or not model.learns:
        return 0
    return held.layers * (model.shape.experts // member.parallel.expert) * model.shape.expert_params
