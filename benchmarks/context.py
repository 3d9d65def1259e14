"""Rows shared among processes (context parallelism): how far from one process, what is kept for backward, what is sent.

*Apart* is as in ``benchmarks/layouts.py``. *Kept* counts the bytes of all tensors that one forward pass of a decoder
from scratch keeps for its backward pass, weights apart: 4 layers of width 256, 8 heads, 4 of keys, float32, one
document of 2,048 tokens of which a third is trained. One process attends document by document, which keeps the scores,
or by torch's fused attention under a mask, which does not. *Sent* counts what a process gives to others in attention,
forward and backward; beside it the closed form.

Run: ``python benchmarks/context.py [--keep]``, five minutes on two cores; writes ``benchmarks/results/context.json``.
Tests hold bounds.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.layouts import BOUNDS, STEPS, Way, measure, table
from benchmarks.sides.several import together

from plait import __version__
from plait.core import dtensors
from plait.core.device import cpu_name
from plait.core.files import write_json
from plait.core.tensors import IGNORE, Batch
from plait.models.connectors.projection import Mlp
from plait.models.documents import read_by_document
from plait.models.multimodal import MultimodalLM
from plait.models.recompute import Recompute, recomputed
from plait.models.sequence.ring import ring_bytes
from plait.models.sequence.ulysses import ulysses_bytes
from plait.objectives.language import NextToken
from plait.training.gradient import accumulate
from plait.training.optim import SGD, Rates
from plait.training.parallel.twin import lay_out
from plait.training.trainer import Parallel

RESULTS = Path(__file__).parent / "results" / "context.json"
LENGTH, WIDTH, LAYERS, HEADS, KEYS, WORDS = 2048, 256, 4, 8, 4, 512


def sharing_rows() -> list[Way]:
    """Rows shared among processes, by both ways of attention, alone and together with other layouts."""
    ring: dict[str, Any] = {"context": 2, "context_attention": "ring"}
    deal: dict[str, Any] = {"context": 2, "context_attention": "ulysses"}
    way = partial(Way, kv_heads=4)
    found: list[Way] = []
    for degree in (2, 4):
        for grid in (ring, deal):
            here = grid | {"context": degree}
            name = f"context {degree}, {grid['context_attention']}"
            found += [way(name=name, grid=here), way(name=f"{name}, all learns", grid=here, whole=True)]
    fast = {"rates": Rates(lr=0.1)}  # weights that hardly move end one rounding apart
    return [
        *found,
        way(name="context 2, ring, one conversation a row", grid=ring, packed=False),
        way(name="context 2, ring, float32 SGD", grid=ring, dtype="float32", optimizer=SGD(momentum=0.9), more=fast),
        way(name="context 2, ring, bfloat16 SGD", grid=ring, dtype="bfloat16", optimizer=SGD(momentum=0.9)),
        way(name="context 2, ring, all recomputed", grid=ring, whole=True, more={"recompute": "full"}),
        way(name="context 2, ulysses, some recomputed", grid=deal, whole=True, more={"recompute": "selective"}),
        way(name="context 2, ring, ZeRO-3, all learns", zero=3, grid=ring, whole=True),
        way(name="context 2, ulysses, ZeRO-2", zero=2, grid=deal),
        way(name="context 2, ring, tensor 2, all learns", grid=ring | {"tensor": 2}, whole=True),
        way(name="context 2, ulysses, tensor 2", grid=deal | {"tensor": 2}),
    ]


# --- memory and bytes ----------------------------------------------------------------------------------------------


def kept(length: int, setting: dict[str, Any], *, fused: bool = False, recompute: Recompute = "none") -> dict[str, int]:
    """Bytes that this process keeps for the backward pass and sends in attention, in one step over one row."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        intermediate_size=688,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEYS,
        tie_word_embeddings=True,
    )
    decoder = LlamaForCausalLM(config)
    if fused:
        decoder.set_attn_implementation("sdpa")
    else:
        read_by_document(decoder)
    model = MultimodalLM({}, {"image": Mlp(4, 4, WIDTH)}, decoder, placeholder=WORDS).train()
    parallel = Parallel.model_validate(setting)
    layout = lay_out(model, NextToken(), parallel, device="cpu")
    ids = torch.randint(WORDS, (1, length), generator=torch.Generator().manual_seed(0))
    labels = torch.where(torch.arange(length) % 3 == 0, ids, IGNORE)
    batch = Batch(
        token_ids=ids, labels=labels, segment_ids=torch.ones_like(ids), media={}, item_row={}, sample_ids=("row",)
    )
    weights = {dtensors.local(weight).untyped_storage().data_ptr() for weight in layout.model.parameters()}
    storages: dict[int, Tensor] = {}  # held, so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with sending() as sent, recomputed(layout.model, recompute):
        accumulate(
            layout.model,
            layout.objective,
            [batch],
            weights={},
            around=lambda: torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            layout=layout,
        )
    return {"kept": sum(one.untyped_storage().nbytes() for one in storages.values()), "sent": sent[0]}


@contextmanager
def sending() -> Iterator[list[int]]:
    """Counts the bytes that this process gives to others, in messages of attention."""
    counted = [0]
    plain, plain_all = dist.batch_isend_irecv, dist.all_to_all_single

    def count(operations: list[dist.P2POp]) -> Any:
        counted[0] += sum(one.tensor.nbytes for one in operations if one.op is dist.isend)
        return plain(operations)

    def count_all(out: Tensor, given: Tensor, **options: Any) -> Any:
        world = dist.get_world_size(options.get("group"))
        counted[0] += given.nbytes * (world - 1) // world
        return plain_all(out, given, **options)

    dist.batch_isend_irecv, dist.all_to_all_single = count, count_all
    try:
        yield counted
    finally:
        dist.batch_isend_irecv, dist.all_to_all_single = plain, plain_all


def formula(length: int, setting: dict[str, Any]) -> int:
    """Bytes sent by the closed form, without recomputation."""
    world = setting.get("context", 1)
    each = WIDTH // HEADS
    common = {"groups": KEYS, "width": each, "value_width": each, "world": world, "size": 4}
    here = (1, length // world)
    if setting.get("context_attention") == "ulysses":
        return LAYERS * ulysses_bytes(here, heads=HEADS, **common)
    return LAYERS * ring_bytes(here, **common)


def memory(length: int = LENGTH) -> Iterator[dict[str, Any]]:
    """A record for each way to attend, number of processes and recomputation; the largest of all processes."""
    alone = [("one process, by document", {}, False), ("one process, fused", {}, True)]
    several = [
        (f"context {world}, {exchange}", {"context": world, "context_attention": exchange}, False)
        for world in (2, 4)
        for exchange in ("ring", "ulysses")
    ]
    for name, setting, fused in (*alone, *several):
        for recompute in ("none", "full"):
            work = partial(kept, length, setting, fused=fused, recompute=recompute)
            found = together(setting.get("context", 1), work)
            assert all(isinstance(one, dict) for one in found), found
            yield {
                "way": name,
                "recompute": recompute,
                "length": length,
                "kept": max(one["kept"] for one in found),
                "sent": max(one["sent"] for one in found),
                "formula": formula(length, setting),
            }


def table_of_memory(records: list[dict[str, Any]]) -> str:
    """Markdown: MiB kept and sent by each process."""
    lines = ["| way | kept, MiB | recomputed | sent, MiB | formula |", "|---|---|---|---|---|"]
    for plain, again in zip(records[::2], records[1::2], strict=True):
        sizes = (plain["kept"], again["kept"], plain["sent"], plain["formula"])
        lines.append(f"| {plain['way']} | {' | '.join(f'{size / 2**20:.1f}' for size in sizes)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Rows shared among processes: distance, memory, bytes sent.")
    parser.add_argument("--keep", action="store_true", help="write the figures")
    args = parser.parse_args()
    sizes = list(memory())
    print(table_of_memory(sizes), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        records: list[dict[str, Any]] = []
        for record in measure(Path(folder), sharing_rows()):
            print(record, flush=True)
            records.append(record)
    print(table(records))
    if args.keep:
        versions = {"plait": __version__, "torch": torch.__version__}
        about = {"date": str(datetime.date.today()), "cpu": cpu_name(), **versions, "steps": STEPS}
        write_json(RESULTS, about | {"bounds": dict(BOUNDS), "memory": sizes, "rows": records})


if __name__ == "__main__":
    main()
