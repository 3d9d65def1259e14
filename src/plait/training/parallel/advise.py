"""Which layout for a decoder and so many processes: what fits their memory, and of that what costs least time.

Closed forms alone: what a process holds by :mod:`.share`, activations by :mod:`plait.training.cost`, bytes of every
message (:mod:`.messages`), and the idle share of a pipeline. Narayanan et al., Efficient large-scale language model
training on GPU clusters using Megatron-LM,
https://arxiv.org/abs/2104.04473, sections 3 and 4.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from plait.training.cost import BYTES, DecoderShape, Gradients, Lora, decoder_activations, decoder_flops
from plait.training.parallel.messages import messages
from plait.training.parallel.order import bubble
from plait.training.parallel.share import Member, Model
from plait.training.trainer import Parallel
from plait.training.zero import zero_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """The processes.

    Attributes:
        processes: How many.
        per_host: Of them on one machine.
        memory_bytes: Of each.
        flops: Operations a second of each, as they are really reached.
        near: Bytes a second between two of one machine.
        far: Bytes a second between two of different machines.
    """

    processes: int
    per_host: int
    memory_bytes: int
    flops: float
    near: float
    far: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A step.

    Attributes:
        shape: Of the decoder.
        rows: Of a batch, over all processes.
        length: Positions of a row.
        micro_rows: Rows that go through the model at once.
        lora: Adapters; None: all weights learn.
        dtype: Of products.
        recompute: Whether blocks keep their inputs alone.
    """

    shape: DecoderShape
    rows: int
    length: int
    micro_rows: int = 1
    lora: Lora | None = None
    dtype: str = "bfloat16"
    recompute: bool = False

    @property
    def gradients(self) -> Gradients:
        """What backward does in the decoder."""
        return "full" if self.lora is None else "through"


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What a layout takes.

    Attributes:
        parallel: The settings.
        data: Shares of each batch.
        memory: Bytes of a process by part, of the one that has most.
        fits: Whether that is within the memory.
        sent: Bytes that a process sends in a step, by dimension.
        compute_s: Seconds of products.
        idle: Share of a step in which a pipeline's stages wait.
        step_s: Seconds of a step if nothing overlaps.
    """

    parallel: Parallel
    data: int
    memory: dict[str, int]
    fits: bool
    sent: dict[str, int]
    compute_s: float
    idle: float
    step_s: float

    @property
    def peak(self) -> int:
        """Bytes in all."""
        return sum(self.memory.values())


def layouts(work: Work, cluster: Cluster) -> list[Judged]:
    """Every layout that can be set: what fits first, by time, and of equals the simpler."""
    found = [_judge(parallel, work, cluster) for parallel in _settable(work, cluster)]
    return sorted(found, key=lambda one: (not one.fits, one.step_s if one.fits else one.peak, _parts(one.parallel)))


def _parts(parallel: Parallel) -> int:
    degrees = parallel.zero + parallel.tensor + parallel.pipeline + parallel.context + parallel.expert
    return degrees + parallel.sequence


def _settable(work: Work, cluster: Cluster) -> Iterator[Parallel]:
    """What the shape, the batch and the settings' own rules allow."""
    shape, n = work.shape, cluster.processes
    degrees = [d for d in range(1, n + 1) if n % d == 0]
    for tensor, pipeline, context in itertools.product(degrees, degrees, degrees):
        each = tensor * pipeline * context
        if n % each or pipeline > shape.layers or shape.heads % tensor or shape.kv_heads % tensor:
            continue
        data = n // each
        if work.rows < data or shape.d_ff % tensor or (shape.experts and each > 1):
            continue
        experts = [d for d in degrees if shape.experts and data % d == 0 and shape.experts % d == 0] or [1]
        for zero, expert, sequence in itertools.product((0, 1, 2, 3), experts, (False, True)):
            if (zero and data * context == 1) or (sequence and (tensor == 1 or work.length < tensor)):
                continue
            degree = {"tensor": tensor, "pipeline": pipeline, "context": context, "expert": expert}
            try:
                yield Parallel.model_validate({**degree, "zero": zero, "sequence": sequence})
            except ValueError:  # not together
                continue


def _judge(parallel: Parallel, work: Work, cluster: Cluster) -> Judged:
    shape, stages = work.shape, parallel.pipeline
    first = Member.of(parallel, rank=0, world=cluster.processes)
    # A stage with the head or the table has more than its part of the blocks; one between sends to both sides.
    starts = {0, cluster.processes // stages * min(1, stages - 1), cluster.processes - 1}
    kinds = [replace(first, rank=rank) for rank in sorted(starts)]
    rows = first.rows(work.rows)
    at_once = min(work.micro_rows, rows)
    micro = -(-rows // at_once)
    found = [_share(one, work, at_once=at_once, micro=micro) for one in kinds]
    memory = max((memory for memory, _ in found), key=lambda parts: sum(parts.values()))
    # A step waits for the one that sends most.
    sent = {
        name: max(one.get(name, 0) for _, one in found) for name in dict.fromkeys(n for _, one in found for n in one)
    }
    flops = decoder_flops(
        shape,
        rows=work.rows,
        length=work.length,
        gradients=work.gradients,
        lora=work.lora,
        recompute="full" if work.recompute else "none",
    )
    idle = bubble(stages, micro)
    compute_s = flops / cluster.processes / cluster.flops
    inner = parallel.tensor * parallel.context
    spans = {
        "tensor": parallel.tensor,
        "context": inner,
        "expert": inner * parallel.expert,
        "data": inner * first.grid.data,
        "pipeline": cluster.processes,
    }
    wires = {name: cluster.near if spans[name] <= cluster.per_host else cluster.far for name in sent}
    talk = sum(count / wires[name] for name, count in sent.items())
    return Judged(
        parallel=parallel,
        data=first.grid.data,
        memory=memory,
        fits=sum(memory.values()) <= cluster.memory_bytes,
        sent=sent,
        compute_s=compute_s,
        idle=idle,
        step_s=compute_s / (1 - idle) + talk,
    )


def _share(member: Member, work: Work, *, at_once: int, micro: int) -> tuple[dict[str, int], dict[str, int]]:
    """Memory and messages of a process."""
    whole = work.lora is None
    model = Model(
        shape=work.shape,
        width=4 if whole else BYTES[work.dtype],
        learns=whole,
        lora=work.lora,
        adapter=0 if work.lora is None else work.lora.params(work.shape),
    )
    held = member.held(model)
    zero = member.parallel.zero
    states = zero_bytes(held.learn, world=member.spread, stage=zero)
    kept = decoder_activations(
        member.decoder(work.shape, loads=model),
        rows=at_once,
        length=member.length(work.length),
        dtype=work.dtype,
        gradients=work.gradients,
        lora=work.lora,
        recompute="full" if work.recompute else "none",
    )
    memory = {
        **states,
        "frozen": held.still // (member.spread if zero == 3 else 1),
        "activations": kept * member.kept(micro),
    }
    sent = messages(
        member,
        model,
        positions=member.rows(work.rows) * member.length(work.length),
        micro=micro,
        width=BYTES[work.dtype],
        stream=BYTES[work.dtype],
        again=work.recompute,
    )
    return memory, sent
