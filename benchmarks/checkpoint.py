"""What checkpoints cost training: written within the step, written beside it (``async_save``), and not at all.

A Llama-shaped decoder from scratch trains as a whole with AdamW through the one training loop, at the default distance
of checkpoints (25 steps, as in pretrain); each holds weights, moments, generators and the model's own file, is hashed,
synced, verified and rotated. The three sides run in turn. *Stall* is the time for which training waited for checkpoints
(``save_s`` of ``metrics.jsonl``); *all* is the time of the steps with it, so that what a writing thread takes from the
cores is counted too. Every checkpoint written beside training was compared with the one written within the step.
Aim: stall below 2 % of the time.

Run: ``python benchmarks/checkpoint.py [--rounds 3]``; writes ``benchmarks/results/checkpoint.json``.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from plait import __version__
from plait.core.device import cpu_name, setup, usable_cores
from plait.core.events import Events
from plait.core.files import read_jsonl, sha256_file, write_json
from plait.core.snapshot import save_tensors
from plait.core.tensors import Batch
from plait.training.loop import fit
from plait.training.settings import Hooks, Settings

RESULTS = Path(__file__).parent / "results" / "checkpoint.json"
AIM = 0.02
SAVE_EVERY, STEPS = 25, 51  # two checkpoints in between; the last step is saved in any case and waited for at the end
SIDES = {
    "none": {"save_every": 0},
    "within": {"save_every": SAVE_EVERY},
    "beside": {"save_every": SAVE_EVERY, "async_save": True},
}
CASES = {
    "10 M": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 8, "num_attention_heads": 4},
    "27 M": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 6, "num_attention_heads": 8},
}
ROWS, LENGTH, VOCABULARY = 2, 64, 16_000


class NextToken:
    """Cross-entropy of the next token."""

    needs_global_batch = False

    def count(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Labelled positions."""
        return {"text": torch.tensor(batch.labels.numel())}

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """Its sum."""
        logits = model(batch.token_ids).logits
        return {"text": nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum")}


class Stream:
    """Random tokens."""

    def step_batches(self, step: int) -> list[Batch]:
        """One batch a step."""
        ids = torch.randint(VOCABULARY, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(step))
        return [
            Batch(
                token_ids=ids[:, :-1],
                labels=ids[:, 1:].contiguous(),
                segment_ids=torch.ones_like(ids[:, 1:]),
                media={},
                item_row={},
                sample_ids=tuple(f"{step}-{row}" for row in range(ROWS)),
            )
        ]


def run(case: str, side: str, folder: Path) -> dict[str, Any]:
    """One training run; what its records say."""
    torch.manual_seed(0)
    config = LlamaConfig(**CASES[case], vocab_size=VOCABULARY, tie_word_embeddings=True)
    model = LlamaForCausalLM(config).train()

    def save(temp: Path) -> None:
        save_tensors(dict(model.named_parameters()), temp / "model.safetensors")

    settings = Settings(
        steps=STEPS,
        compute=setup(device="cpu", dtype="float32", threads=usable_cores()),
        **SIDES[side],
    )
    fit(
        model,
        NextToken(),
        Stream(),
        settings=settings,
        folder=folder,
        events=Events(),
        hooks=Hooks(save_model=save),
    )
    records = read_jsonl(folder / "metrics.jsonl")[1:]  # the first step plans kernels
    work, stall = sum(r["seconds"] for r in records), sum(r["save_s"] for r in records)
    saved = folder / "checkpoints" / f"{STEPS:06d}"
    return {
        "step_s": statistics.median(r["seconds"] for r in records),
        "stall_s": stall / 2,
        "share": stall / (work + stall),
        "all_s": work + stall,
        "mib": sum(p.stat().st_size for p in saved.rglob("*") if p.is_file()) / 2**20,
        "digest": [sha256_file(p) for p in sorted((folder / "checkpoints").rglob("*.safetensors"))],
        "parameters": sum(w.numel() for w in model.parameters()),
    }


def measure(case: str, rounds: int) -> list[dict[str, Any]]:
    """Medians of every side, interleaved; one run of each before them warms what is warmed once."""
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for number in range(rounds):
        for side in SIDES:
            with tempfile.TemporaryDirectory() as folder:
                found[side].append(run(case, side, Path(folder)))
        if found["within"][number]["digest"] != found["beside"][number]["digest"]:
            raise SystemExit("checkpoints written beside training have other bits than those written within the step")
    rows = []
    for side, runs in found.items():
        row: dict[str, Any] = {"case": case, "side": side, "parameters": runs[0]["parameters"]}
        for key, digits in (("mib", 1), ("step_s", 4), ("stall_s", 4), ("share", 5), ("all_s", 3)):
            values = [r[key] for r in runs]
            row |= {key: round(statistics.median(values), digits)}
            row |= {f"{key}_range": [round(min(values), digits), round(max(values), digits)]}
        rows.append(row)
    return rows


def main() -> int:
    """Measure, print the table, write the result; exit 1 when the aim is missed."""
    parser = argparse.ArgumentParser(description="What checkpoints cost training.")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side (default 3)")
    rounds = parser.parse_args().rounds
    load = os.getloadavg()[0]
    rows = [row for case in CASES for row in measure(case, rounds)]
    print(f"{'weights':<8} {'side':<8} {'MiB':>7} {'step, s':>9} {'stall, s':>9} {'share, %':>9} {'all, s':>8}")
    for row in rows:
        print(
            f"{row['case']:<8} {row['side']:<8} {row['mib']:7.0f} {row['step_s']:9.3f} {row['stall_s']:9.3f}"
            f" {100 * row['share']:9.2f} {row['all_s']:8.1f}"
        )
    kept = all(row["share"] <= AIM for row in rows if row["side"] == "beside")
    print(
        f"aim: a stall below {100 * AIM:.0f} % beside training: {'kept' if kept else 'MISSED'}; load before {load:.1f}"
    )
    write_json(
        RESULTS,
        {
            "benchmark": "checkpoint",
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "machine": {"cpu": cpu_name(), "cores": usable_cores(), "system": f"{platform.system()}"},
            "versions": {"plait": __version__, "python": platform.python_version(), "torch": torch.__version__},
            "rounds": rounds,
            "save_every": SAVE_EVERY,
            "load_average_before": round(load, 2),
            "aim": AIM,
            "kept": kept,
            "rows": rows,
        },
    )
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
