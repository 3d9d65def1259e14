"""How long ``plait --help`` takes, beside a bare interpreter, so that a heavy import cannot creep in unseen.

Every round runs each command once, in turn, so that a busy moment of the machine hits all alike; figures are medians.
Claim: ``plait --help`` within 0.15 s (warm file cache, compiled modules).

Run: ``python benchmarks/startup.py [--rounds 15]``; writes ``benchmarks/results/startup.json``.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from plait import __version__
from plait.core.device import cpu_name, usable_cores
from plait.core.files import write_json

RESULTS = Path(__file__).parent / "results" / "startup.json"
BUDGET_S = 0.15
PLAIT = str(Path(sys.executable).parent / "plait")
COMMANDS: dict[str, list[str]] = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "plait --help": [PLAIT, "--help"],
    "plait run --help": [PLAIT, "run", "--help"],
    "plait data --help": [PLAIT, "data", "--help"],
    "plait rows --help": [PLAIT, "rows", "--help"],
    "plait completion bash": [PLAIT, "completion", "bash"],
}


def wall_time(command: list[str]) -> float:
    """Seconds from start to exit; a command that fails ends the benchmark."""
    start = time.perf_counter()
    subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def measure(rounds: int) -> dict[str, list[float]]:
    """Wall times of every command, interleaved; one round before them compiles modules and warms the file cache."""
    for command in COMMANDS.values():
        wall_time(command)
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(rounds):
        for name, command in COMMANDS.items():
            times[name].append(wall_time(command))
    return times


def summarize(times: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Median, extremes, and what a command costs above the bare interpreter, in seconds."""
    bare = statistics.median(times["python -c pass"])
    return [
        {
            "command": name,
            "median_s": round(statistics.median(seconds), 4),
            "above_python_s": round(statistics.median(seconds) - bare, 4),
            "min_s": round(min(seconds), 4),
            "max_s": round(max(seconds), 4),
        }
        for name, seconds in times.items()
    ]


def main() -> int:
    """Measure, print the table, write the result; exit 1 when the budget is broken."""
    parser = argparse.ArgumentParser(description="Start-up time of the command line.")
    parser.add_argument("--rounds", type=int, default=15, help="runs of each command (default 15)")
    rounds = parser.parse_args().rounds
    load = os.getloadavg()[0]
    rows = summarize(measure(rounds))
    print(f"{'command':<24} {'median':>9} {'- python':>9} {'min':>9} {'max':>9}   (ms, {rounds} rounds)")
    for row in rows:
        shown = (row[key] * 1000 for key in ("median_s", "above_python_s", "min_s", "max_s"))
        print(f"{row['command']:<24} " + " ".join(f"{value:9.1f}" for value in shown))
    seconds = next(row["median_s"] for row in rows if row["command"] == "plait --help")
    kept = seconds <= BUDGET_S
    print(f"plait --help: {seconds * 1000:.0f} ms, budget {BUDGET_S * 1000:.0f} ms: {'kept' if kept else 'BROKEN'}")
    print(f"load average before: {load:.1f} (above 0.5 other processes disturb the figures)")
    machine = {"cpu": cpu_name(), "cores": usable_cores(), "system": f"{platform.system()} {platform.machine()}"}
    write_json(
        RESULTS,
        {
            "benchmark": "startup",
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "machine": machine,
            "versions": {"plait": __version__, "python": platform.python_version()},
            "rounds": rounds,
            "load_average_before": round(load, 2),
            "budget_s": BUDGET_S,
            "kept": kept,
            "rows": rows,
        },
    )
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
