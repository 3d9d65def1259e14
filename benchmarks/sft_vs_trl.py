"""The tune stage beside TRL, LLaMA-Factory's settings and transformers' Trainer: samples a second, memory, loss curve.

All sides train the same LLaVA model (random weights; CLIP-ViT-B/32's shape, SmolLM2-135M's shape) on the same
pictures, questions and answers in the same order, with the same LoRA from the same start, trainable connector,
optimizer and number of updates; the loss is on answers only. Each run is a process of its own; Plait and the peer take
turns, so that a busy moment of the machine hits both alike, and figures are medians. The clock runs from the loaded
model to the last update: for Plait that includes encoding every picture once and writing its last checkpoint; for the
peers, making the trainer, and nothing is saved there.

First all sides say how many tokens an epoch trains and what the loss on them is before any update: if these differ,
nothing is measured. After each pair the two loss curves are compared, update by update. Then each of the peers'
settings is tried on one update; the fastest is measured, and the two other programs beside it. Plait takes as many
samples at once as the peer does. Last, Plait runs with one of its ways to be fast switched off at a time.
Aim: at least 2.5 times the samples a second, in at most half the memory above the loaded model.

The peers get an environment of their own:
    python -m venv .venv-trl
    .venv-trl/bin/pip install torch==2.13.0                  (the same build as Plait's environment has)
    .venv-trl/bin/pip install trl==1.16.0 transformers==5.23.0 peft==0.21.2 accelerate datasets==5.2.0 pillow

Run: ``python benchmarks/sft_vs_trl.py [--peer-python .venv-trl/bin/python]``, about 15 minutes on 2 cores; ``--quick``,
about two, is for trying and keeps no result. Writes ``benchmarks/results/sft_vs_trl.json``. Needs the package
``smollm2`` for its tokenizer.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait.core.device import cpu_name, usable_cores
from plait.core.files import write_json

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "sft_vs_trl.json"
SPEED_AIM, MEMORY_AIM = 2.5, 0.5
LOSS_TOLERANCE = 0.002
"""Share by which the two losses before training may differ: both are computed in bfloat16 (here but for the head).

Seen: up to 0.0003. With each picture's features in the place of the next one's it is 0.015, with zeros for them 0.05.
"""

SETTINGS: dict[str, Any] = {
    "batch_size": 16,
    "lr": 2e-4,
    "rank": 16,
    "alpha": 32,
    "targets": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "seed": 0,
    "dtype": "bfloat16",
}
PEER: dict[str, dict[str, Any]] = {
    "TRL, bf16 sdpa": {"program": "trl", "weights": "bfloat16", "attention": "sdpa"},
    "TRL, bf16 eager": {"program": "trl", "weights": "bfloat16", "attention": "eager"},
    "TRL, fp32+autocast sdpa": {"program": "trl", "weights": "float32", "attention": "sdpa"},
    "TRL, bf16 sdpa, 4 x 4": {"program": "trl", "weights": "bfloat16", "attention": "sdpa", "micro_batch": 4},
    "TRL, bf16 sdpa, recomputing": {"program": "trl", "weights": "bfloat16", "attention": "sdpa", "recompute": True},
    "transformers' Trainer": {"program": "hf", "weights": "bfloat16", "attention": "sdpa"},
    "LLaMA-Factory's settings": {
        "program": "hf",
        "weights": "bfloat16",
        "attention": "sdpa",
        "recompute": True,
        "multiple": 8,
    },
}
"""The peers' settings that are tried; all under bfloat16 autocast, 16 samples at once but where it says 4 x 4.

LLaMA-Factory's: its defaults for LoRA on a vision-language model are recomputed activations, bf16, sdpa, rows padded to
a multiple of 8, on transformers' Trainer; it is not installed here, since it asks for older versions of transformers,
peft and trl.
"""
PEER = {name: {"micro_batch": 16, "autocast": True} | peer for name, peer in PEER.items()}
LEAN = "TRL, bf16 sdpa, 4 x 4"
"""The one with 4 samples at once."""
OTHERS = ("transformers' Trainer", "LLaMA-Factory's settings")
"""Programs that are measured beside the fastest setting."""

SWITCHES: dict[str, dict[str, Any]] = {
    "nothing off": {},
    "features not cached": {"cache": False},
    "rows not packed": {"packing": False},
    "head apart from the loss": {"head": "full"},
    "float32": {"dtype": "float32"},
    "products kept, the rest recomputed": {"recompute": "selective"},
    "blocks compiled": {"compile": True},
}
"""Plait's ways to be fast or lean, each switched from what it is in the pairs."""
CURVE_TOLERANCE = 0.01
"""Share by which the loss of an update may differ: both sides round to bfloat16 at other places, and steps add up."""

HOW_TO = "make it as the head of benchmarks/sft_vs_trl.py says, or name it with --peer-python"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is measured: so many pairs of runs of so many epochs, beside one of the peer's settings."""

    name: str
    epochs: int
    pairs: int
    peer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Runs the sides, each in a process of its own.

    Attributes:
        work: Folder with model and data.
        python: Interpreter of each side.
        threads: Of both sides.
    """

    work: Path
    python: Mapping[str, str]
    threads: int

    def __call__(self, side: str, **job: Any) -> dict[str, Any]:
        """Run one side's script on a job and return its result; a side that fails ends the benchmark."""
        path, result = self.work / "job.json", self.work / "result.json"
        result.unlink(missing_ok=True)
        content = SETTINGS | {"check": False, "work": str(self.work), "result": str(result)} | job
        path.write_text(json.dumps(content), encoding="utf-8")
        env = os.environ | {
            "OMP_NUM_THREADS": str(self.threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        script = str(HERE / "sides" / f"sft_{side}.py")
        done = subprocess.run(
            [self.python.get(side, sys.executable), script, str(path)],
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            sys.exit(f"{script} failed with code {done.returncode}:\n{done.stderr[-4000:]}")
        return json.loads(result.read_text(encoding="utf-8"))


def run_once(bench: Bench, side: str, *, samples: int, epochs: int, **job: Any) -> dict[str, Any]:
    """One measured run: what the side says, with samples a second and the load average before."""
    load = os.getloadavg()[0]
    found = bench(side, samples=samples, epochs=epochs, **job)
    found |= {"samples_per_s": samples * epochs / found["seconds"], "load_average_before": round(load, 2)}
    print(
        f"  {side:<6} {epochs} epoch(s): {found['samples_per_s']:6.2f} samples/s, {found['seconds']:6.1f} s, "
        f"{found['above'] / 2**20:6,.0f} MiB above {found['loaded'] / 2**20:,.0f}, loss {found['losses'][-1]:.3f}, "
        f"load {load:.1f}",
        flush=True,
    )
    return found


def unequal(ours: Mapping[str, float], theirs: Mapping[str, float]) -> list[str]:
    """Why the two sides do not do the same work; empty if they do.

    Args:
        ours: ``tokens`` and ``trained`` tokens of an epoch, mean ``loss`` over the trained ones.
        theirs: The same.
    """
    why = [
        f"{what}: {ours[what]:,} here, {theirs[what]:,} there"
        for what in ("tokens", "trained")
        if ours[what] != theirs[what]
    ]
    if not abs(ours["loss"] - theirs["loss"]) <= LOSS_TOLERANCE * theirs["loss"]:
        why.append(f"loss before training: {ours['loss']:.4f} here, {theirs['loss']:.4f} there")
    return why


def apart(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The largest share by which the losses of an update differ; infinite if the updates are not as many."""
    if len(ours) != len(theirs):
        return math.inf
    return max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))


def summarize(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    """Medians of each side with the least and the most memory of its runs, and Plait's medians over the peer's.

    Args:
        runs: Runs of ``plait`` and of ``peer``.
    """
    fields = ("samples_per_s", "seconds", "above", "peak", "loaded")
    medians = {
        side: {field: statistics.median(run[field] for run in found) for field in fields}
        for side, found in runs.items()
    }
    spread = {side: [min(r["above"] for r in found), max(r["above"] for r in found)] for side, found in runs.items()}
    ours, theirs = medians["plait"], medians["peer"]
    ratios = {field: round(ours[field] / theirs[field], 3) for field in ("samples_per_s", "above", "peak")}
    return {"medians": medians, "above_range": spread, "ratios": ratios}


def kept(summary: Mapping[str, Any]) -> bool:
    """Whether both aims are."""
    return summary["ratios"]["samples_per_s"] >= SPEED_AIM and summary["ratios"]["above"] <= MEMORY_AIM


def fastest(tried: Mapping[str, Mapping[str, float]]) -> str:
    """Name of the peer's setting with most samples a second."""
    return max(tried, key=lambda name: tried[name]["samples_per_s"])


def table(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: a row for each case and side, and one with the ratios."""
    lines = [
        "| case | program | samples/s | seconds | peak above the model, MiB (least to most) | peak in all, MiB |",
        "|---|---|---|---|---|---|",
    ]
    for case, summary in summaries.items():
        for side, m in summary["medians"].items():
            above, peak = m["above"] / 2**20, m["peak"] / 2**20
            least, most = (value / 2**20 for value in summary["above_range"][side])
            name = summary["peer"] if side == "peer" else side
            lines.append(
                f"| {case} | {name} | {m['samples_per_s']:.2f} | {m['seconds']:.1f} | "
                f"{above:,.0f} ({least:,.0f} to {most:,.0f}) | {peak:,.0f} |"
            )
        r = summary["ratios"]
        lines.append(
            f"| {case} | plait / peer | **{r['samples_per_s']:.2f}** | | **{r['above']:.2f}** | {r['peak']:.2f} |"
        )
    return "\n".join(lines)


def compare(bench: Bench, case: Case, *, samples: int, order: Sequence[int]) -> dict[str, Any]:
    """Runs of both sides in turn; ends the benchmark if they did not do the same work."""
    print(f"{case.name}, {case.pairs} pair(s) beside {case.peer}", flush=True)
    runs: dict[str, list[dict[str, Any]]] = {"plait": [], "peer": []}
    peer, done = PEER[case.peer], order[: samples * case.epochs]
    for _ in range(case.pairs):
        runs["plait"].append(run_once(bench, "plait", samples=samples, epochs=case.epochs, peer=peer))
        runs["peer"].append(run_once(bench, "peer", samples=samples, epochs=case.epochs, peer=peer, order=done))
    every = [run for taken in runs.values() for run in taken]
    for field in ("steps", "trainable", "threads"):
        if len(values := {run[field] for run in every}) > 1:
            sys.exit(f"not the same work: {field} is {sorted(values)}")
    expected = samples * case.epochs // SETTINGS["batch_size"]
    if every[0]["steps"] != expected or any(run.get("skipped") for run in every):
        sys.exit(f"not all of the {expected} updates were done")
    curve = max(
        apart(ours["losses"], theirs["losses"]) for ours, theirs in zip(runs["plait"], runs["peer"], strict=True)
    )
    print(f"  loss curves: at most {curve:.2%} apart", flush=True)
    if curve > CURVE_TOLERANCE:
        sys.exit(f"not the same work: the losses of an update differ by {curve:.2%}, {CURVE_TOLERANCE:.0%} is allowed")
    return {"peer": case.peer, "curves_apart": curve, "runs": runs} | summarize(runs)


def check(bench: Bench, samples: int, *, epochs: int) -> dict[str, Any]:
    """See that all programs do the same work, and say so; ends the benchmark if they do not.

    Returns:
        What each counted; Plait's with the order of all epochs.
    """
    plain = PEER[next(iter(PEER))]
    sides = {"plait": bench("plait", check=True, samples=samples, epochs=epochs, peer=plain)}
    programs = {peer["program"]: peer for peer in reversed(PEER.values())}
    for program, peer in programs.items():
        sides[program] = bench("peer", check=True, samples=samples, epochs=1, peer=peer)
    for side, found in sides.items():
        print(
            f"  {side:<6} {found['tokens']:,} tokens, {found['trained']:,} trained; "
            f"loss before training {found['loss']:.4f}"
        )
        if why := unequal(sides["plait"], found):
            sys.exit(f"{side}: not the same work: " + "; ".join(why))
    return sides


def switch(bench: Bench, *, samples: int, epochs: int, peer: Mapping[str, Any]) -> dict[str, Any]:
    """Plait with one of its ways switched at a time."""
    print(f"Plait's switches, {epochs} epochs", flush=True)
    found: dict[str, Any] = {}
    for name, changed in SWITCHES.items():
        print(f"  {name}:", end="", flush=True)
        found[name] = run_once(bench, "plait", samples=samples, epochs=epochs, peer=peer, plait=changed)
    return found


def switches_table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: what each switch costs or saves."""
    lines = ["| switched | samples/s | ratio | peak above the model, MiB | ratio |", "|---|---|---|---|---|"]
    base = next(iter(found.values()))
    for name, run in found.items():
        speed, above = run["samples_per_s"], run["above"]
        lines.append(
            f"| {name} | {speed:.2f} | {speed / base['samples_per_s']:.2f} | {above / 2**20:,.0f} | "
            f"{above / base['above']:.2f} |"
        )
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The tune stage beside TRL and others.")
    parser.add_argument("--peer-python", default=".venv-trl/bin/python", help="Python of an environment with TRL")
    parser.add_argument("--samples", type=int, default=32, help="samples an epoch, in batches of 16 (default 32)")
    parser.add_argument("--pairs", type=int, default=3, help="pairs of runs at 1 epoch (default 3)")
    parser.add_argument("--long-pairs", type=int, default=2, help="pairs of runs at --epochs (default 2)")
    parser.add_argument("--lean-pairs", type=int, default=1, help="pairs of runs with 4 samples at once (default 1)")
    parser.add_argument("--other-pairs", type=int, default=1, help="pairs beside the other programs (default 1)")
    parser.add_argument("--switch-epochs", type=int, default=2, help="runs with a switch turned (default 2)")
    parser.add_argument("--epochs", type=int, default=5, help="the longer runs (default 5)")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="of both sides (default: all cores)")
    parser.add_argument("--peer", choices=sorted(PEER), help="only this setting of the peer")
    parser.add_argument("--quick", action="store_true", help="one pair on 16 samples, to try; keeps no result")
    args = parser.parse_args()
    if args.quick:
        args.samples, args.pairs = SETTINGS["batch_size"], 1
        args.long_pairs = args.other_pairs = args.lean_pairs = 0
        args.peer = args.peer or next(iter(PEER))
    if args.samples % SETTINGS["batch_size"]:
        parser.error(f"--samples is {args.samples}, not a multiple of {SETTINGS['batch_size']}")
    return args


def cases(args: argparse.Namespace, chosen: str) -> list[Case]:
    """One epoch and several beside the fastest setting, one epoch beside the others and with 4 samples at once."""
    found = [
        Case(name="1 epoch", epochs=1, pairs=args.pairs, peer=chosen),
        Case(name=f"{args.epochs} epochs", epochs=args.epochs, pairs=args.long_pairs, peer=chosen),
        *(Case(name=f"1 epoch, {name}", epochs=1, pairs=args.other_pairs, peer=name) for name in OTHERS),
        Case(name="1 epoch, 4 at once", epochs=1, pairs=args.lean_pairs, peer=LEAN),
    ]
    return [case for n, case in enumerate(found) if case.pairs and (n < 2 or case.peer != chosen)]


def main() -> int:
    """Check, choose the peer's setting, measure, print the tables, write the result; exit 1 when an aim is missed."""
    args = arguments()
    if not Path(args.peer_python).is_file():
        sys.exit(f"no Python with TRL at {args.peer_python}: {HOW_TO}")
    with tempfile.TemporaryDirectory(prefix="sft-vs-trl-") as folder:
        bench = Bench(work=Path(folder), python={"peer": args.peer_python}, threads=args.threads)
        print("model and data", flush=True)
        weights = bench("work", samples=args.samples)
        print(f"  {weights}; the same work?", flush=True)
        sides = check(bench, args.samples, epochs=args.epochs)
        order = sides["plait"].pop("order")
        tried: dict[str, Any] = {}
        if not args.peer:
            print("settings of the peers", flush=True)
            first = order[: SETTINGS["batch_size"]]
            for name, peer in PEER.items():
                print(f"  {name}:", end="", flush=True)
                tried[name] = run_once(bench, "peer", samples=len(first), epochs=1, peer=peer, order=first)
        chosen = args.peer or fastest(tried)
        found = {case.name: compare(bench, case, samples=args.samples, order=order) for case in cases(args, chosen)}
        switched = {}
        if not args.quick:
            switched = switch(bench, samples=args.samples, epochs=args.switch_epochs, peer=PEER[chosen])
    print(f"\npeer: {chosen}\n\n{table(found)}\n")
    if switched:
        print(switches_table(switched) + "\n")
    reached = all(kept(summary) for summary in found.values() if summary["peer"] == chosen)
    verdict = "reached" if reached else "MISSED"
    print(f"aim, beside {chosen}: {SPEED_AIM} x the samples/s in {MEMORY_AIM} x the memory: {verdict}")
    if args.quick:
        return 0
    one = found[next(iter(found))]["runs"]
    write_json(
        RESULTS,
        {
            "benchmark": "sft_vs_trl",
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "machine": {
                "cpu": cpu_name(),
                "cores": usable_cores(),
                "system": f"{platform.system()} {platform.machine()}",
            },
            "versions": {"python": platform.python_version()}
            | one["plait"][0]["versions"]
            | one["peer"][0]["versions"],
            "settings": SETTINGS | {"samples": args.samples, "threads": args.threads, "weights": weights},
            "same_work": sides,
            "aim": {"samples_per_s": SPEED_AIM, "above": MEMORY_AIM, "reached": reached},
            "peer": {"chosen": chosen, "settings": PEER, "tried": tried},
            "cases": found,
            "switches": switched,
        },
    )
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
