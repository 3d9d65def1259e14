"""Models that do not fit one process's memory: the same training under a limit of the operating system.

A decoder of 98 million weights that all learn takes 1,500 MiB of weights, gradients and AdamW's moments. Each process
may have so much more than before it builds the model (``RLIMIT_DATA``: heap and private memory), and no more.

Run: ``python benchmarks/capped.py [--keep]``, some minutes; writes ``benchmarks/results/capped.json``.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.scaling import LIVE, SIZES, Way, run

from plait.core.device import cpu_name
from plait.core.files import write_json

RESULTS = Path(__file__).parent / "results" / "capped.json"
SIZE = "98 M"
CAPS_MIB = (1400, 1200, 1000)


def ways() -> list[Way]:
    """One process; two that hold all of it each, and two that divide it."""
    return [
        Way(),
        Way(processes=2),
        Way(processes=2, zero=3),
        Way(processes=2, grid={"tensor": 2}),
        Way(processes=2, grid={"pipeline": 2}),
    ]


def measure() -> Iterator[dict[str, Any]]:
    """A record for each layout and limit: that it ran, or what the first process that failed said."""
    for way in ways():
        for cap in CAPS_MIB:
            record: dict[str, Any] = {"layout": str(way), "processes": way.processes, "cap_mib": cap}
            try:
                ranks = run(SIZES[SIZE], way, steps=1, warm=1, more=LIVE, cap=cap * 2**20)
            except SystemExit as error:
                yield record | {"ran": False, "said": str(error).strip().splitlines()[-1][:300]}
            else:
                yield record | {"ran": True, "held": max(rank["held"] for rank in ranks)}


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: a line each layout."""
    lines = [f"| layout | {' | '.join(f'{cap:,} MiB' for cap in CAPS_MIB)} |", "|---" * (len(CAPS_MIB) + 1) + "|"]
    for name in dict.fromkeys((record["layout"], record["processes"]) for record in records):
        mine = [r for r in records if (r["layout"], r["processes"]) == name]
        lines.append(f"| {name[0]}, {name[1]} | {' | '.join('runs' if r['ran'] else 'fails' for r in mine)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="The same training under limits of memory.")
    parser.add_argument("--keep", action="store_true", help="write the figures")
    args = parser.parse_args()
    records: list[dict[str, Any]] = []
    for record in measure():
        print(record, flush=True)
        records.append(record)
    print(table(records))
    if args.keep:
        write_json(RESULTS, {"date": str(datetime.date.today()), "cpu": cpu_name(), "size": SIZE, "rows": records})


if __name__ == "__main__":
    main()
