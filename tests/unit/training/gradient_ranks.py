"""What ``test_gradient_check.py`` starts: processes that sum the gradient of a step, rightly and wrongly."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from benchmarks.sides.several import together
from tests.tiny_run import CPU, Counted
from tests.unit.training.test_gradient_check import MeanOfMeans, Model, Rows

from plait.core import mesh
from plait.core.tensors import Batch
from plait.data.collate import take_rows
from plait.training.finding import judged, units_differ
from plait.training.gradient_check import check_gradients
from plait.training.held import compare, held
from plait.training.parallel.layout import Whole
from plait.training.parallel.twin import lay_out
from plait.training.settings import Settings
from plait.training.trainer import Parallel


def found(
    objective: Any = None,
    *,
    share: Callable[[Batch], Batch] | None = None,
    parallel: Parallel | None = None,
    fault: Callable[[Callable[[Whole], None], Whole], None] | None = None,
) -> dict[str, Any]:
    """What this process finds of its share of a step."""
    model, objective = Model(), objective or Counted()
    settings = Settings(steps=1, compute=CPU, parallel=parallel or Parallel())
    kept: list[Any] = []
    with mesh.alone():
        list(check_gradients(model, objective, Rows(), settings=settings, keep=kept.append))
    (batch,) = Rows().step_batches(0)
    own = share(batch) if share else dealt(batch)
    right = Whole.sum_gradients
    if fault is not None:
        Whole.sum_gradients = lambda self: fault(right, self)
    with held(model, objective, settings, dtype=kept[0].dtype) as still:
        layout = lay_out(model, objective, settings.parallel, device="cpu")
        gradient = still.gradient([own], layout=layout)
        layout.finish()
    gap = compare(kept[0].gradient.of, gradient.of)
    counts = units_differ(kept[0].gradient.sums.counts, gradient.sums.counts)
    finding = judged("processes", gap, kept[0].bounds, fix="", counts=counts)
    return {"status": finding.status, "value": finding.value, "gap": asdict(gap)}


def dealt(batch: Batch) -> Batch:
    """Rows of this process: one, and the rest."""
    each = len(batch.token_ids) // mesh.world()
    stop = (mesh.rank() + 1) * each if mesh.rank() < mesh.world() - 1 else len(batch.token_ids)
    return take_rows(batch, mesh.rank() * each, stop)


def twice(right: Callable[[Whole], None], layout: Whole) -> None:
    right(layout)
    right(layout)


if __name__ == "__main__":
    cases: dict[str, tuple[int, Callable[[], dict[str, Any]]]] = {
        "two": (2, found),
        "four": (4, found),
        "zero": (2, lambda: found(parallel=Parallel(zero=2))),
        "summed twice": (2, lambda: found(fault=twice)),
        "not summed": (2, lambda: found(fault=lambda right, layout: None)),
        "averaged": (2, lambda: found(MeanOfMeans())),
        "dealt twice": (2, lambda: found(share=lambda batch: batch)),
    }
    print(json.dumps({name: together(world, work) for name, (world, work) in cases.items()}))
