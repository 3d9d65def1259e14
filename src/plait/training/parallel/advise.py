"""Which layout for a decoder and so many processes: what fits their memory, and of that what costs least time.

Closed forms alone, without torch: states by ZeRO's formula (:mod:`plait.training.zero`) over what tensor and pipeline
leave to a process, activations by :mod:`plait.training.cost`, bytes of every message around rings, and the idle share
of a pipeline. Narayanan et al., Efficient large-scale language model training on GPU clusters using Megatron-LM,
https://arxiv.org/abs/2104.04473, sections 3 and 4.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from plait.training.cost import BYTES, DecoderShape, Lora, decoder_activations, decoder_flops
from plait.training.trainer import Parallel
from plait.training.zero import zero_bytes, zero_traffic


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
    """Every layout that can be set, but ``expert``: what fits first, by time, and of equals the simpler."""
    found = [_judge(parallel, work, cluster) for parallel in _settable(work, cluster)]
    return sorted(found, key=lambda one: (not one.fits, one.step_s if one.fits else one.peak, _parts(one.parallel)))


def _parts(parallel: Parallel) -> int:
    return parallel.zero + parallel.tensor + parallel.pipeline + parallel.context


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
        for zero in (0, 1, 2, 3):
            if zero and data * context == 1:
                continue
            try:
                yield Parallel.model_validate(
                    {"tensor": tensor, "pipeline": pipeline, "context": context, "zero": zero}
                )
            except ValueError:  # not together
                continue


def _judge(parallel: Parallel, work: Work, cluster: Cluster) -> Judged:
    shape = work.shape
    tensor, stages, context = parallel.tensor, parallel.pipeline, parallel.context
    data = cluster.processes // (tensor * stages * context)
    rows = -(-work.rows // data)
    micro = -(-rows // min(work.micro_rows, rows))
    learn = shape.params if work.lora is None else work.lora.params(shape)
    frozen = 0 if work.lora is None else shape.params
    width = BYTES[work.dtype]
    # A stage with the head or the table has more than its part of the blocks.
    blocks, words = shape.params - shape.vocab * shape.d_model, shape.vocab * shape.d_model
    share = 1 if stages == 1 else (blocks / stages + words) / shape.params
    states = zero_bytes(round(learn * share / tensor), world=data * context, stage=parallel.zero)
    kept = decoder_activations(
        shape,
        rows=min(work.micro_rows, rows),
        length=-(-work.length // context),
        dtype=work.dtype,
        gradients="full" if work.lora is None else "through",
        lora=work.lora,
        recompute="full" if work.recompute else "none",
    )
    memory = {
        **states,
        "frozen": round(frozen * share / tensor / (data * context if parallel.zero == 3 else 1) * width),
        # Norms and what goes from block to block are whole in each process: no less than the inputs of blocks.
        "activations": round(kept / stages / tensor * min(micro, stages)),
    }
    sent = _sent(parallel, work, data=data, micro=micro, learn=round(learn * share / tensor))
    flops = decoder_flops(
        shape,
        rows=work.rows,
        length=work.length,
        gradients="full" if work.lora is None else "through",
        lora=work.lora,
        recompute="full" if work.recompute else "none",
    )
    idle = (stages - 1) / (micro + stages - 1)
    compute_s = flops / cluster.processes / cluster.flops
    spans = {
        "tensor": tensor,
        "context": tensor * context,
        "data": tensor * context * data,
        "pipeline": cluster.processes,
    }
    wires = {name: cluster.near if spans[name] <= cluster.per_host else cluster.far for name in sent}
    talk = sum(count / wires[name] for name, count in sent.items())
    return Judged(
        parallel=parallel,
        data=data,
        memory=memory,
        fits=sum(memory.values()) <= cluster.memory_bytes,
        sent=sent,
        compute_s=compute_s,
        idle=idle,
        step_s=compute_s / (1 - idle) + talk,
    )


def _sent(parallel: Parallel, work: Work, *, data: int, micro: int, learn: int) -> dict[str, int]:
    """Bytes that a process sends in a step, by dimension."""
    shape, width = work.shape, BYTES[work.dtype]
    tensor, stages, context = parallel.tensor, parallel.pipeline, parallel.context
    rows = -(-work.rows // data)
    positions = rows * -(-work.length // context)
    hidden = positions * shape.d_model * width
    found: dict[str, int] = {}
    if tensor > 1:
        again = 2 if work.recompute else 0
        sums = shape.layers // stages * (4 + again) + (2 if stages == 1 else 1)  # table and head are on two stages
        found["tensor"] = round(sums * hidden * 2 * (tensor - 1) / tensor)
    if context > 1:
        heads = shape.d_kv // tensor * 2
        found["context"] = (3 * context - 2) * positions * heads * width * (shape.layers // stages)
    if stages > 1:
        table = 4 * shape.vocab * shape.d_model // tensor if shape.tied and work.lora is None else 0
        found["pipeline"] = max(2 * hidden if stages > 2 else 0, hidden + table)
    if data * context > 1:
        words = min(learn, shape.vocab * shape.d_model // tensor) if work.lora is None else 0
        traffic = zero_traffic(learn - words, words, world=data * context, stage=parallel.zero, passes=micro)
        again = traffic["sums"] if stages > 1 and parallel.zero else 0  # gradients stay whole there
        found["data"] = sum(traffic.values()) + again
    return found
