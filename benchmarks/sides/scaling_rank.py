"""One of the processes of ``scaling.py``: trains its share of some steps, and says what they cost it.

Each is a fresh process, started by the benchmark with torchrun's variables, so no page of its memory is another's but
those of libraries. Every figure is taken between two moments that all processes reach together: the beginning of the
first step that counts and the end of the last one. What comes before (building the model, laying it out, the first
steps) has a peak of its own.
"""

from __future__ import annotations

import gc
import os
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.sides.measure import PROC, Start, loopback, read_job, rss, write_result

from plait.core import dtensors, mesh
from plait.core.device import Compute
from plait.core.events import Events
from plait.core.speed import gemm_rate
from plait.core.tensors import Batch
from plait.data.conversations import Conversation, ConversationBatches
from plait.data.template import Rendered
from plait.models.connectors.projection import Mlp
from plait.models.multimodal import MultimodalLM
from plait.models.recompute import blocks_of
from plait.objectives.language import NextToken
from plait.training.cost import DecoderShape, decoder_flops
from plait.training.loop import fit
from plait.training.settings import Settings
from plait.training.trainer import Parallel


class _Enough(Exception):
    """All steps that count are done: no checkpoint is to be written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """What a process has used up at a moment.

    Attributes:
        wall: Seconds of the performance counter.
        busy: Seconds for which its training thread computed.
        cpu: Seconds of all of its threads.
        written: Bytes that it gave to sockets and files.
        loopback: Bytes that went over the loopback device, of all programs of this machine.
    """

    wall: float
    busy: float
    cpu: float
    written: int
    loopback: int

    @classmethod
    def now(cls) -> Mark:
        """This one."""
        return cls(
            wall=time.perf_counter(),
            busy=time.thread_time(),
            cpu=time.process_time(),
            written=_written(),
            loopback=loopback(),
        )


def _written() -> int:
    lines = (PROC / "io").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("wchar:"))


class Timed:
    """Batches of another source; takes the figures when the first step that counts begins, and after the last."""

    def __init__(self, batches: ConversationBatches, *, first: int, last: int) -> None:
        self.batches, self.first, self.last = batches, first, last
        self.marks: list[Mark] = []
        self.peak_before = self.peak = self.held = 0

    def step_batches(self, step: int) -> Sequence[Batch]:
        """Those of the step."""
        if step in (self.first, self.last):
            mesh.barrier()
            self.marks.append(Mark.now())
            peak = rss("VmHWM")
            if step == self.last:
                self.peak = peak
                self.held = held()
                raise _Enough
            self.peak_before = peak
            (PROC / "clear_refs").write_text("5", encoding="ascii")
        return self.batches.step_batches(step)


def held() -> int:
    """Trained numbers that lie in this process, whatever holds them."""
    found: dict[int, int] = {}
    for one in gc.get_objects():
        if isinstance(one, nn.Parameter) and one.requires_grad and (own := dtensors.local(one)).numel():
            found[own.data_ptr()] = own.numel()
    return sum(found.values())


def limit(room: int) -> None:
    """Let this process have so many bytes more than it has now, and no other."""
    size = rss("VmData") + room
    resource.setrlimit(resource.RLIMIT_DATA, (size, size))


def parallel_of(job: dict[str, Any]) -> Parallel:
    """How processes share the work."""
    return Parallel.model_validate(job["parallel"])


def source(job: dict[str, Any]) -> ConversationBatches:
    """Conversations that fill a row each, every token trained; this process's share of the same steps."""
    rank, world = parallel_of(job).grid(mesh.rank(), mesh.world()).share
    length, steps, words = job["length"], job["warm"] + job["steps"], job["model"]["vocab_size"]
    drawn = torch.randint(words, (job["rows"] * steps, length), generator=torch.Generator().manual_seed(0)).tolist()
    conversations = [
        Conversation(
            id=f"c{number}",
            task="any",
            rendered=Rendered(token_ids=tuple(ids), trained=(False, *[True] * (length - 1)), media=(), slots=()),
        )
        for number, ids in enumerate(drawn)
    ]
    return ConversationBatches(
        conversations=conversations,
        weights={"any": 1.0},
        stores=[],
        grid_out={},
        batch_size=job["rows"],
        row=length,
        pad=0,
        steps=steps,
        seed=0,
        pieces=job["rows"] // world // job["rows_at_once"],
        rank=rank,
        world=world,
    )


def build(job: dict[str, Any]) -> MultimodalLM:
    """A decoder from scratch; the same weights in every process."""
    torch.manual_seed(0)
    config = LlamaConfig(**job["model"])
    config._attn_implementation = "sdpa"
    no_pictures = Mlp(1, 1, config.hidden_size).requires_grad_(requires_grad=False)
    return MultimodalLM({}, {"image": no_pictures}, LlamaForCausalLM(config), placeholder=config.vocab_size).train()


def train(job: dict[str, Any]) -> dict[str, Any]:
    """Train as the job says; what it cost this process."""
    world = mesh.world()
    rate = gemm_rate("float32") if world == 1 else 0.0
    batches = source(job)
    timed = Timed(batches, first=job["warm"], last=job["warm"] + job["steps"])
    start = Start.now(())
    if job["cap"]:
        limit(job["cap"])
    model = build(job)
    config = model.decoder.config
    weights = sum(w.numel() for w in model.parameters() if w.requires_grad)
    blocks = sum(w.numel() for block in blocks_of(model) for w in block.parameters())
    settings = Settings(
        steps=timed.last + 1,
        compute=Compute(device="cpu", dtype="float32", threads=job["threads"], why=()),
        parallel=parallel_of(job),
    )
    with tempfile.TemporaryDirectory() as folder:
        try:
            fit(model, NextToken(), timed, settings=settings, folder=Path(folder), events=Events())
        except _Enough:
            pass
        else:
            raise SystemExit("training ended before all steps were measured")
    first, last = timed.marks
    steps = job["steps"]
    flops = decoder_flops(
        DecoderShape.from_config(config),
        rows=job["rows"],
        length=job["length"],
        gradients="full",
        head_positions=job["rows"] * (job["length"] - 1),
    )
    return {
        "step_s": (last.wall - first.wall) / steps,
        "busy_s": (last.busy - first.busy) / steps,
        "cpu_s": (last.cpu - first.cpu) / steps,
        "written": (last.written - first.written) / steps,
        "loopback": (last.loopback - first.loopback) / steps,
        "before": start.loaded,
        "peak_start": timed.peak_before,
        "peak": timed.peak,
        "weights": weights,
        "held": timed.held,
        "width": config.hidden_size,
        "layers": config.num_hidden_layers,
        "positions": job["rows_at_once"] * job["length"],
        "weights_in_blocks": blocks,
        "flops": flops,
        "gemm_rate": rate,
        "micro_batches": batches.pieces,
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    job = read_job()
    torch.set_num_threads(job["threads"])
    with mesh.joined():
        found = train(job)
    write_result(job | {"result": f"{job['result']}.{os.environ.get('RANK', '0')}"}, found)


if __name__ == "__main__":
    main()
