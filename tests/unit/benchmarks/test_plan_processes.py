"""The published memory of processes: what `plait plan` says of them now, beside what was measured."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from benchmarks import plan_processes

from plait.core.estimate import Machine
from plait.recipes.recipe import load_recipe
from plait.training.cost import DecoderShape
from plait.training.parallel.share import Member, Model
from plait.training.plan import estimate_all
from plait.training.trainer import Parallel

MEASURED = Model(
    shape=DecoderShape(layers=6, d_model=512, d_ff=1536, heads=8, kv_heads=8, vocab=8192), width=4, learns=True
)
MACHINE = Machine(
    cores=2,
    memory_bytes=8 * 2**30,
    disk_bytes=50 * 2**30,
    gemm_fp32=1e11,
    gemm_bf16=2e11,
    measured=True,
    dtype="bfloat16",
)


@pytest.fixture(scope="module")
def published() -> dict[str, Any]:
    return json.loads(plan_processes.RESULTS.read_text(encoding="utf-8"))


def planned(layout: str, *, runtime: int) -> list[Any]:
    count, parallel = plan_processes.LAYOUTS[layout]
    settings = [*plan_processes.SETTINGS, f"stages.tune.trainer.parallel={parallel}"]
    recipe = load_recipe(plan_processes.RECIPE, settings).spec
    machine = replace(MACHINE, processes=count, local=count, runtime_bytes=runtime)
    _, estimate = estimate_all([("data", recipe.data), *recipe.stages.items()], machine)
    return [plan_processes.planned_of(estimate, rank) for rank in range(count)]


@pytest.mark.row("S2-C12")
def test_each_process_is_planned_within_the_aim_and_data_parallel_has_a_replica_in_each(
    published: dict[str, Any],
) -> None:
    rows = published["rows"]
    assert {"DDP", "ZeRO-3", "tensor", "pipeline"} <= {one["layout"] for one in rows}
    assert tuple(published["settings"]) == plan_processes.SETTINGS
    states: dict[str, list[int]] = {}
    for layout in dict.fromkeys(one["layout"] for one in rows):
        mine = [one for one in rows if one["layout"] == layout]
        now = planned(layout, runtime=mine[0]["runtime_bytes"])
        for one in mine:
            of = now[one["process"]]
            assert sum(of.memory.values()) == one["planned_bytes"], "published figures are those of another plan"
            if one["heap"] == "tight":
                assert abs(one["planned_bytes"] / one["measured_bytes"] - 1) <= plan_processes.AIM, one
        states[layout] = [of.moments["decoder"] for of in now]
    replica = 16 * 75_510_272  # weights, gradients, both moments, float32
    for one in rows:
        if one["layout"] == "DDP":
            assert one["measured_bytes"] - one["runtime_bytes"] > replica
    for layout in ("ZeRO-3", "tensor", "pipeline"):
        assert max(states[layout]) < min(states["DDP"]), layout


@pytest.mark.row("S2-C12")
def test_in_steps_each_process_of_data_parallel_has_most() -> None:
    """Measured while steps ran, above what a process has before the model (``benchmarks/scaling.py``)."""
    measured: dict[str, list[dict[str, Any]]] = {}
    states: dict[str, int] = {}
    for name in ("scaling.json", "scaling_some.json"):
        found = json.loads(plan_processes.RESULTS.with_name(name).read_text(encoding="utf-8"))
        for row in found["rows"]:
            if (row["size"], row["processes"]) == ("25 M", 2):
                measured[row["layout"]], states[row["layout"]] = row["ranks"], row["states"]
    settings = {"data parallel": {}, "ZeRO-3": {"zero": 3}, "tensor 2": {"tensor": 2}, "pipeline 2": {"pipeline": 2}}
    least = min(rank["live_above"] for rank in measured["data parallel"])
    for layout, of in settings.items():
        members = [Member.of(Parallel.model_validate(of), rank=rank, world=2) for rank in (0, 1)]
        held = [one.states(one.held(MEASURED), state=8.0) for one in members]
        planned = max(sum(parts[name] for name in ("weights", "gradients", "optimizer")) for parts in held)
        assert planned == pytest.approx(states[layout], rel=1e-3), layout
        for parts, rank in zip(held, measured[layout], strict=True):
            known = sum(parts[name] for name in ("weights", "gradients", "optimizer"))
            assert known < rank["live_above"], layout
            assert layout == "data parallel" or rank["live_above"] < least, layout
