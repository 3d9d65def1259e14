"""Results of the position study as Markdown tables that also read well on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from plait.studies.text import percent, table


def markdown(results: Mapping[str, Any]) -> str:
    """Three tables: sequences, grids, topology.

    Args:
        results: As :meth:`plait.studies.positions.Positions.run` gives them.
    """
    parts = [_scores(results, family) for family in ("sequence", "grid")]
    return "\n\n".join([*(part for part in parts if part), _topology(results["topology"])]) + "\n"


def _scores(results: Mapping[str, Any], family: str) -> str:
    scores = [score for score in results["scores"] if score["family"] == family]
    if not scores:
        return ""
    columns = list(dict.fromkeys((s["question"], s["times"]) for s in scores))
    columns.sort(key=lambda column: [s["question"] for s in scores].index(column[0]))
    cells = {(s["code"], s["question"], s["times"]): s for s in scores}
    head = ["code"]
    chance = ["chance"]
    for question, times in columns:
        one = next(s for s in scores if (s["question"], s["times"]) == (question, times))
        head.append(f"{question}, {'x'.join(map(str, one['sides']))}")
        chance.append(f"{100 * one['chance']:.0f}")
    rows = [
        [code, *(percent(cells[code, question, times]) for question, times in columns)]
        for code in dict.fromkeys(s["code"] for s in scores)
    ]
    seeds = len(scores[0]["seeds"])
    about = f"{family}: % right, mean of {seeds} seeds (95 % interval); sizes above the first were never seen"
    return f"{about}\n\n{table([head, chance, *rows])}"


def _topology(found: Sequence[Mapping[str, Any]]) -> str:
    rows = [["vectors of cells", "grid", "Spearman", "R² row", "R² column", "direction, %"]]
    for one in found:
        numbers = (f"{one[key]:.2f}" for key in ("spearman", "row", "column"))
        rows.append([one["table"], f"{one['side']}x{one['side']}", *numbers, f"{100 * one['direction']:.0f}"])
    return f"topology: distances of vectors against distances in the grid, and linear probes\n\n{table(rows)}"
