"""What training costs with 1, 2 and 4 processes: data parallel and ZeRO-1, 2, 3, decoders of 5, 25 and 100 M weights.

All weights of a Llama-shaped decoder from scratch learn by AdamW in float32, through the one training loop. A step has
512 tokens for all processes together, 4 rows of which one is in a process at a time, so the work is the same however
many there are and activations do not hide the states. One process with a thread for each core is the baseline of them
all; on two cores, 4 processes share them. Each process is a fresh one. Rounds go over all configurations in turn.

*Waits* is the share of a step in which the cores (at most one a process) did not run the training threads. *Sent* is
what a process gave to its sockets; beside it what the closed form says (:mod:`plait.training.zero`), where gloo has no
reduce-scatter of its own and sums all of it in every process. *Peak* is the most memory of a process, above what it had
before the model was built, while the steps ran; *live* is the same with ``MALLOC_MMAP_THRESHOLD_=65536``, where the C
library keeps nothing that is freed (slower, and so not timed). *States* are weights, gradients and moments by formula.

Run: ``python benchmarks/scaling.py [--rounds 3] [--quick]``, on a quiet machine, as the loopback device counts for all
programs; three quarters of an hour; writes ``benchmarks/results/scaling.json``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.sides.measure import loopback

from plait import __version__
from plait.core.device import cpu_name, usable_cores
from plait.core.files import write_json
from plait.core.launch import free_port
from plait.training.parallel.deal import divided
from plait.training.zero import zero_bytes, zero_traffic

RESULTS = Path(__file__).parent / "results" / "scaling.json"
RANK = Path(__file__).parent / "sides" / "scaling_rank.py"
ROWS, LENGTH, WARM = 4, 128, 2
LIVE = {"MALLOC_MMAP_THRESHOLD_": "65536"}
MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A decoder, and how many of its steps are measured."""

    width: int
    inner: int
    layers: int
    heads: int
    steps: int

    @property
    def model(self) -> dict[str, Any]:
        """Of transformers' Llama."""
        return {
            "hidden_size": self.width,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "vocab_size": 8192,
            "tie_word_embeddings": True,
        }


SIZES = {
    "5 M": Size(width=256, inner=688, layers=4, heads=4, steps=20),
    "25 M": Size(width=512, inner=1536, layers=6, heads=8, steps=8),
    "98 M": Size(width=768, inner=2304, layers=12, heads=12, steps=4),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How the steps are shared out."""

    processes: int = 1
    threads: int = 1
    zero: int = 0
    grid: Mapping[str, int] = field(default_factory=dict[str, int], hash=False)

    def __str__(self) -> str:
        if self.processes == 1:
            return "alone"
        if self.grid:
            return " x ".join(name if degree is True else f"{name} {degree}" for name, degree in self.grid.items())
        return f"ZeRO-{self.zero}" if self.zero else "data parallel"


def ways(cores: int) -> list[Way]:
    """One process with one thread and with one a core; two and four processes with one, in every layout."""
    alone = [Way(threads=threads) for threads in sorted({1, cores})]
    spread = [Way(processes=processes, zero=zero) for processes in (2, 4) for zero in (0, 1, 2, 3)]
    dimensions = ("tensor", "pipeline", "context")
    apart = [Way(processes=processes, grid={name: processes}) for processes in (2, 4) for name in dimensions]
    both = [Way(processes=4, grid={"tensor": 2, "pipeline": 2}), Way(processes=2, grid={"tensor": 2, "sequence": True})]
    return [*alone, *spread, *apart, *both]


# --- running -------------------------------------------------------------------------------------------------------


def run(
    size: Size, way: Way, *, steps: int, warm: int = WARM, more: Mapping[str, str] | None = None, cap: int = 0
) -> list[Any]:
    """What the steps cost each process, in the order of ranks.

    Args:
        size: Of the model.
        way: How.
        steps: That are measured.
        warm: Before them.
        more: Environment variables.
        cap: Bytes that each process may have beyond what it has before the model; 0: as many as there are.
    """
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        result = Path(folder) / "result.json"
        job = {
            "model": size.model,
            "rows": ROWS,
            "length": LENGTH,
            "rows_at_once": 1,
            "warm": warm,
            "steps": steps,
            "cap": cap,
        }
        job |= {"parallel": {"zero": way.zero, **way.grid}, "threads": way.threads, "result": str(result)}
        (Path(folder) / "job.json").write_text(json.dumps(job), encoding="utf-8")
        common = {"WORLD_SIZE": way.processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        common |= {"OMP_NUM_THREADS": way.threads}
        started: list[subprocess.Popen[str]] = []
        for rank in range(way.processes):
            own = {name: str(value) for name, value in (common | {"RANK": rank, "LOCAL_RANK": rank}).items()}
            started.append(
                subprocess.Popen(
                    [sys.executable, str(RANK), str(Path(folder) / "job.json")],
                    env=os.environ | own | (more or {}),
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        _wait(started)
        return [
            json.loads(result.with_name(f"{result.name}.{rank}").read_text(encoding="utf-8"))
            for rank in range(way.processes)
        ]


def _wait(started: Sequence[subprocess.Popen[str]]) -> None:
    """Until all have ended; none is left behind when one fails."""
    try:
        said = [process.communicate(timeout=1800)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    if failed := [text for process, text in zip(started, said, strict=True) if process.returncode]:
        raise SystemExit(f"{len(failed)} of {len(started)} processes failed; the first said:\n{failed[0][-3000:]}")


# --- what it says --------------------------------------------------------------------------------------------------


def sent_by_formula(rank: Mapping[str, Any], way: Way) -> dict[str, int]:
    """Bytes a process sends in a step: where a sum that leaves each its part sends that part alone, and with gloo."""
    blocks = rank["weights_in_blocks"]
    if way.grid:
        found = divided_traffic(way, rank)
        return {"ring": found, "gloo": found}
    found = zero_traffic(
        blocks,
        rank["weights"] - blocks,
        world=way.processes,
        stage=way.zero,
        passes=rank["micro_batches"],
    )
    gloo = found["gathers"] + (2 if way.zero else 1) * found["sums"]
    return {"ring": sum(found.values()), "gloo": gloo}


def divided_traffic(way: Way, rank: Mapping[str, Any]) -> int:
    """Bytes that the process which sends most sends in a step, where other dimensions than data divide the work.

    Tensor: hidden states are summed twice in a block, forward and backward, and once for the embeddings and once for
    the head. With pieces of rows a gather and a scatter are one such sum; what a block's two parts were given is
    gathered once more, rows are cut and joined, and gradients of norms are summed. Pipeline: the first stage hands
    hidden states on, and its copy of the table of words, of which the last has another, sends its gradient. Context:
    keys and values go round the ring, as many heads of them as of queries; gradients are summed as in data parallel.
    Tensor and pipeline: those of the stage that has most blocks, with one of table and head, and a part of the table.
    """
    n, passes = way.processes, rank["micro_batches"]
    hidden = 4 * rank["positions"] * rank["width"]
    ring = 2 * (n - 1) / n
    if {"tensor", "pipeline"} <= way.grid.keys():
        parts, words = way.grid["tensor"], rank["weights"] - rank["weights_in_blocks"]
        block = rank["weights_in_blocks"] / rank["layers"]
        blocks = max(map(len, divided([block] * rank["layers"], way.grid["pipeline"], after=words)))
        return round(passes * hidden * (2 * (parts - 1) / parts * (4 * blocks + 1) + 1) + 4 * words / parts)
    if "tensor" in way.grid:
        sums = 4 * rank["layers"] + 2
        if not way.grid.get("sequence"):
            return round(passes * hidden * ring * sums)
        norms = 4 * rank["width"] * (2 * rank["layers"] + 1)
        return round(passes * hidden * ring * (sums + rank["layers"] + 1) + norms * ring)
    if "pipeline" in way.grid:
        return round(passes * hidden + 4 * (rank["weights"] - rank["weights_in_blocks"]))
    travels = (3 * n - 2) * 2 * passes * hidden / n * rank["layers"]
    return round(travels + 4 * ring * rank["weights"])


def summary(name: str, way: Way, *, runs: Sequence[Sequence[Any]], live: Sequence[Any], cores: int) -> dict[str, Any]:
    """Medians over rounds; memory of each process.

    Args:
        name: Of the size.
        way: How it ran.
        runs: A round each: its processes.
        live: Processes of the run that shows what is live.
        cores: Of the machine.
    """
    steps = [max(rank["step_s"] for rank in ranks) for ranks in runs]
    side = min(way.processes, cores)
    waits = [1 - sum(rank["busy_s"] for rank in ranks) / (side * step) for ranks, step in zip(runs, steps, strict=True)]
    first = runs[0][0]
    each = [[ranks[rank] for ranks in runs] for rank in range(way.processes)]
    held = first["weights"]
    if way.grid:  # not cut evenly (a stage has the head, norms stay whole): what each has is counted
        held = max(one["held"] for ranks in runs for one in ranks)
    states = zero_bytes(held, world=1 if way.grid else way.processes, stage=way.zero)
    return {
        "size": name,
        "layout": str(way),
        **asdict(way),
        "weights": first["weights"],
        "micro_batches": first["micro_batches"],
        "step_s": statistics.median(steps),
        "step_s_range": [min(steps), max(steps)],
        "tokens_per_s": ROWS * LENGTH / statistics.median(steps),
        "waits": statistics.median(waits) if way.processes > 1 else None,
        "cpu_s": statistics.median(sum(rank["cpu_s"] for rank in ranks) for ranks in runs),
        "ranks": [
            {
                "before": statistics.median(found["before"] for found in mine),
                "peak": statistics.median(found["peak"] for found in mine),
                "above": statistics.median(found["peak"] - found["before"] for found in mine),
                "above_at_start": statistics.median(found["peak_start"] - found["before"] for found in mine),
                "live_above": alive["peak"] - alive["before"],
                "sent": statistics.median(found["written"] for found in mine),
            }
            for mine, alive in zip(each, live, strict=True)
        ],
        "states": sum(states.values()),
        "held": held,
        "sent_by_formula": sent_by_formula(first, way) if way.processes > 1 else None,
        "loopback": statistics.median(ranks[0]["loopback"] for ranks in runs) if way.processes > 1 else None,
        **(_utilization([ranks[0] for ranks in runs]) if way.processes == 1 else {}),
    }


def _utilization(runs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Share of the rate of matrix products that was measured in the same process, just before."""
    return {
        "flops": runs[0]["flops"],
        "gemm_rate": statistics.median(one["gemm_rate"] for one in runs),
        "mfu": statistics.median(one["flops"] / one["step_s"] / one["gemm_rate"] for one in runs),
    }


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Markdown: a line each configuration; memory is that of the process that has most."""
    heads = ("weights", "layout", "processes x threads", "tokens/s", "a step, s (least to most)", "waits")
    heads += ("peak of a process, MiB", "live", "states", "in all", "sent by each, MiB", "formula", "ideal ring")
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in rows:
        least, most = row["step_s_range"]
        ranks = row["ranks"]
        above, live, peak = (max(rank[key] for rank in ranks) / MIB for key in ("above", "live_above", "peak"))
        sent = "| | | |"
        waits = ""
        if formula := row["sent_by_formula"]:
            given = max(rank["sent"] for rank in ranks) / MIB
            sent = f"| {given:,.1f} | {formula['gloo'] / MIB:,.1f} | {formula['ring'] / MIB:,.1f} |"
            waits = f"{row['waits']:.0%}"
        lines.append(
            f"| {row['size']} | {row['layout']} | {row['processes']} x {row['threads']} | {row['tokens_per_s']:,.0f} "
            f"| {row['step_s']:.2f} ({least:.2f} to {most:.2f}) | {waits} | {above:,.0f} | {live:,.0f} "
            f"| {row['states'] / MIB:,.0f} | {peak:,.0f} {sent}"
        )
    return "\n".join(lines)


def utilization_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Markdown: what one process makes of the processor."""
    lines = ["| weights | threads | TFLOP a step | matrix products, GFLOP/s | MFU |", "|---|---|---|---|---|"]
    lines += [
        f"| {row['weights'] / 1e6:.1f} M | {row['threads']} | {row['flops'] / 1e12:.3f} "
        f"| {row['gemm_rate'] / 1e9:.0f} | {row['mfu']:.2f} |"
        for row in rows
        if row["processes"] == 1
    ]
    return "\n".join(lines)


# --- all of it -----------------------------------------------------------------------------------------------------


def measure(
    names: Sequence[str], *, rounds: int, cores: int, steps: int = 0, only: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """A record for each size and way.

    Args:
        names: Of the sizes.
        rounds: Over all of them.
        cores: Of the machine.
        steps: That are measured; 0: the size's.
        only: Layouts; none: all.
    """
    chosen = [(name, way) for name in names for way in ways(cores) if not only or str(way) in only]
    live: dict[tuple[str, Way], list[Any]] = {}
    runs: dict[tuple[str, Way], list[list[Any]]] = {one: [] for one in chosen}
    for name, way in chosen:
        live[name, way] = run(SIZES[name], way, steps=1, more=LIVE)
    for number in range(rounds):
        for name, way in chosen:
            found = run(SIZES[name], way, steps=steps or SIZES[name].steps)
            runs[name, way].append(found)
            said = f"round {number + 1}: {name}, {way}, {way.processes} x {way.threads}"
            print(f"{said}: {found[0]['step_s']:.3f} s a step", file=sys.stderr, flush=True)
    return [summary(name, way, runs=found, live=live[name, way], cores=cores) for (name, way), found in runs.items()]


def idle(seconds: float = 2.0) -> float:
    """Bytes a second that other programs send over the loopback device now."""
    before = loopback()
    time.sleep(seconds)
    return (loopback() - before) / seconds


def _kept(path: Path, *, without: Sequence[str]) -> list[Any]:
    """Rows of an earlier run: of the sizes that were not measured now. Each says its date and rounds."""
    known = json.loads(path.read_text("utf-8"))["rows"] if path.is_file() else []
    return [row for row in known if row["size"] not in without]


def main() -> None:
    """Measure, print the tables, write the result."""
    parser = argparse.ArgumentParser(description="What training costs with 1, 2 and 4 processes.")
    parser.add_argument("--rounds", type=int, default=3, help="over all configurations (default 3)")
    parser.add_argument(
        "--sizes",
        nargs="+",
        default=[*SIZES],
        choices=[*SIZES],
        help="default all; rows of others stay",
    )
    parser.add_argument("--quick", action="store_true", help="the smallest model, one round, to try; keeps no result")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="LAYOUT", help="such as 'tensor 2'; keeps scaling_some.json"
    )
    args = parser.parse_args()
    load, others, cores = os.getloadavg()[0], idle(), usable_cores()
    names = [*SIZES][:1] if args.quick else args.sizes
    rows = measure(
        names, rounds=1 if args.quick else args.rounds, cores=cores, steps=3 if args.quick else 0, only=args.only
    )
    print(f"{table(rows)}\n\n{utilization_table(rows)}")
    print(f"\nload average before: {load:.2f}; loopback before: {others:,.0f} bytes a second")
    if args.quick:
        return
    path = RESULTS.with_name("scaling_some.json") if args.only else RESULTS
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    how = {"date": today, "rounds": args.rounds, "load_average_before": round(load, 2)}
    write_json(
        path,
        {
            "benchmark": "scaling",
            "machine": {"cpu": cpu_name(), "cores": cores, "system": f"{platform.system()} {platform.machine()}"},
            "versions": {
                "plait": __version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "sizes": {name: asdict(size) for name, size in SIZES.items()},
            "tokens_a_step": ROWS * LENGTH,
            "rows_at_once": 1,
            "warm_steps": WARM,
            "live": LIVE,
            "loopback_before_bytes_per_s": others,
            "rows": [*_kept(path, without=names), *(how | row for row in rows)],
        },
    )


if __name__ == "__main__":
    main()
