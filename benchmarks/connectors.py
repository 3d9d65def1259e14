"""What a connector costs beside the tokens that it saves the decoder: weights, FLOPs, time.

A picture of 24 x 24 tokens of width 1,024 (CLIP ViT-L/14 at 336 pixels) goes through each connector into a decoder of
SmolLM2-135M's shape (random weights) with 32 text tokens. FLOPs are counted; times are medians of interleaved rounds.
There is no peer: the peers have one connector each. What counts is the sum of connector and prefill.

Run: ``python benchmarks/connectors.py [--rounds 7]``; writes ``benchmarks/results/connectors.json``.
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from plait import __version__
from plait.core.device import cpu_name, usable_cores
from plait.core.files import write_json
from plait.core.tensors import IGNORE, Batch, Patches
from plait.models import specs
from plait.models.build import build_connector, build_reading
from plait.models.multimodal import MultimodalLM

RESULTS = Path(__file__).parent / "results" / "connectors.json"
CASES: dict[str, specs.Part] = {
    "linear": specs.Linear(),
    "mlp": specs.Mlp(norm=False),
    "mlp, 2 x 2 joined": specs.Mlp(shuffle=2, norm=False),
    "mlp, 3 x 3 joined": specs.Mlp(shuffle=3, norm=False),
    "qformer, 32 queries (BLIP-2's size)": specs.QFormer(),
    "resampler, 64 latents (Flamingo's)": specs.Resampler(),
    "gated cross-attention, every 4th layer, 64 latents": specs.GatedCrossAttention(),
    "gated cross-attention, every 4th layer, all tokens": specs.GatedCrossAttention(resampler=None),
}
GRID, WIDTH, TEXT = (1, 24, 24), 1024, 32
DECODER = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}


def build(spec: specs.Part) -> tuple[MultimodalLM, Batch]:
    """A model with this connector, and a picture with some text."""
    torch.manual_seed(0)
    decoder = LlamaForCausalLM(
        LlamaConfig(**DECODER, num_key_value_heads=3, vocab_size=49_152, tie_word_embeddings=True)
    )
    connector = build_connector(spec, d_in=WIDTH, d_out=576)
    inside = isinstance(spec, specs.GatedCrossAttention)
    reading = build_reading(spec, d_in=WIDTH, d=576, layers=30) if isinstance(spec, specs.GatedCrossAttention) else None
    model = MultimodalLM(
        {}, {"image": connector}, decoder, placeholder=49_152, reading=reading, inside="image" if inside else ""
    )
    grid = torch.tensor([GRID])
    slots = int(model.slots("image", grid)[0])
    ids = torch.tensor([[49_152] * slots + list(range(TEXT))])
    batch = Batch(
        token_ids=ids,
        labels=torch.full_like(ids, IGNORE),
        segment_ids=torch.ones_like(ids),
        media={"image": Patches(values=torch.rand(576, WIDTH), grid=grid)},
        item_row={"image": torch.zeros(1, dtype=torch.long)},
        sample_ids=("picture",),
        encoded=True,
    )
    return model.eval(), batch


def flops(call: Callable[[], Any]) -> int:
    """Counted, of one call."""
    counter = FlopCounterMode(display=False)
    with counter:
        call()
    return counter.get_total_flops()


def main() -> None:
    """Measure every connector and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    warnings.filterwarnings("ignore")
    built = {name: build(spec) for name, spec in CASES.items()}
    times: dict[str, list[float]] = {name: [] for name in CASES}
    load = os.getloadavg()[0]
    for number in range(rounds + 1):
        for name, (model, batch) in built.items():
            started = time.perf_counter()
            with torch.inference_mode():
                model.hidden(batch)
            if number:
                times[name].append(time.perf_counter() - started)
    rows = []
    for name, (model, batch) in built.items():
        parts = [model.connectors, *(m for m in model.modules() if type(m).__name__ == "GatedCrossAttention")]
        connecting = flops(lambda model=model, batch=batch: model.connectors["image"](batch.media["image"]))
        whole = flops(lambda model=model, batch=batch: model.hidden(batch))
        rows.append(
            {
                "connector": name,
                "slots": int(model.slots("image", batch.media["image"].grid)[0]),
                "tokens_read": len(model.connectors["image"](batch.media["image"]).values),
                "parameters": sum(p.numel() for part in parts for p in part.parameters()),
                "gflops_connector": connecting / 1e9,
                "gflops_whole": whole / 1e9,
                "seconds": statistics.median(times[name]),
                "seconds_least": min(times[name]),
                "seconds_most": max(times[name]),
            }
        )
        r = rows[-1]
        print(
            f"| {name} | {r['slots']} | {r['parameters'] / 1e6:,.1f} | {r['gflops_connector']:,.1f} "
            f"| {r['gflops_whole']:,.1f} | {r['seconds'] * 1e3:,.0f} ({r['seconds_least'] * 1e3:,.0f} to "
            f"{r['seconds_most'] * 1e3:,.0f}) |",
            flush=True,
        )
    machine = {"cpu": cpu_name(), "cores": usable_cores(), "load_before": load, "rounds": rounds}
    versions = {"plait": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    write_json(RESULTS, {"date": str(datetime.date.today()), **machine, **versions, "rows": rows})


if __name__ == "__main__":
    main()
