"""How near `plait plan --processes 2` comes: memory of each process of real runs over gloo, planned and measured.

One recipe: a language model of 75 million weights from scratch learns, with a connector; a step is cut into four
micro-batches. It runs in one process, in two that hold all of it, in pieces (ZeRO 1 to 3), with divided matrices, and
in two stages. Each process's highest RSS, by section, is compared with what was planned of it. *Tight* is with
``MALLOC_MMAP_THRESHOLD_=65536``, where glibc gives back what is freed; *usual* is as `plait run` is started.

Run: ``python benchmarks/plan_processes.py [--keep] [--only NAME ...] [--heap tight]``, a minute for each layout and
heap; ``--keep`` writes ``benchmarks/results/plan_processes.json``. ``--table`` prints what is there as Markdown.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.plan import MLP, SMALL, measure
from benchmarks.scaling import LIVE

from plait.core.device import cpu_name
from plait.core.estimate import Estimate, Machine, Share
from plait.core.files import new_run, read_json, write_json
from plait.core.launch import free_port
from plait.core.packages import home
from plait.recipes.recipe import load_recipe
from plait.training.plan import estimate_all, survey

RESULTS = Path(__file__).parent / "results" / "plan_processes.json"
AIM = 0.15
RECIPE = "quickstart-ci"
DECODER = "{kind: new, model_type: llama, d: 512, depth: 12, heads: 8, d_ff: 2048}"
SETTINGS = (
    *SMALL,
    *MLP,
    "stages.pretrain=null",
    "stages.align=null",
    "stages.evaluate=null",
    "stages.compress=null",
    "stages.tune.views=1",
    f"stages.tune.decoder={DECODER}",
    "stages.tune.frozen.steps=0",
    "stages.tune.adapt.rank=0",
    "stages.tune.adapt.steps=2",
    "stages.tune.adapt.lr_connector=1e-3",
    "stages.tune.batch_size=8",
    "stages.tune.trainer.micro_batch=2",
)
LAYOUTS: Mapping[str, tuple[int, str]] = {
    "one process": (1, "{}"),
    "DDP": (2, "{}"),
    "ZeRO-1": (2, "{zero: 1}"),
    "ZeRO-2": (2, "{zero: 2}"),
    "ZeRO-3": (2, "{zero: 3}"),
    "tensor": (2, "{tensor: 2}"),
    "pipeline": (2, "{pipeline: 2}"),
}
HEAPS: Mapping[str, Mapping[str, str]] = {"tight": LIVE, "usual": {}}
MIB = 2**20


def run_all(run: Path, own: Path, count: int, *, more: Mapping[str, str]) -> list[dict[str, Any]]:
    """The stage after the data, in so many processes; what each measured, in the order of ranks."""
    port = free_port()
    common = {"PLAIT_HOME": own, "OMP_NUM_THREADS": 1, **more}
    if count > 1:
        common |= {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-m", "plait.recipes.probe_stage", str(run), "2", "0"]
    started: list[subprocess.Popen[str]] = []
    try:
        for rank in range(count):
            place = {"RANK": rank, "LOCAL_RANK": rank} if count > 1 else {}
            env = {**os.environ, **{name: str(value) for name, value in (common | place).items()}}
            pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            started.append(subprocess.Popen(command, env=env, text=True, **pipes))
        said = [process.communicate(timeout=900) for process in started]
    finally:
        for process in started:
            process.kill()
    found: list[dict[str, Any]] = []
    for out, errors in said:
        last = json.loads(out.splitlines()[-1]) if out else {}
        if "result" not in last:
            raise SystemExit(f"{run}: {last.get('error')}\n{errors[-3000:]}")
        found.append(last["result"])
    return found


def planned_of(estimate: Estimate, rank: int) -> Estimate | Share:
    """What one process needs by the plan."""
    return next((share for share in estimate.shares if rank in share.ranks), estimate)


def prepared(folder: Path) -> tuple[Path, Path]:
    """The data stage, once for all layouts, and a ``PLAIT_HOME`` whose features the first of them makes."""
    own = folder / "home"
    own.mkdir()
    for part in ("packages", "converted"):
        (own / part).symlink_to(home() / part)
    run = new_run("data", folder, contents={"recipe.yaml": load_recipe(RECIPE, SETTINGS).to_yaml()})
    measure(run, 1, own)
    return next(run.glob("01-*")), own


def rows(name: str, machine: Machine, *, heaps: Sequence[str], data: Path, own: Path) -> Iterator[dict[str, Any]]:
    """A record for each process and heap.

    Args:
        name: Of the layout.
        machine: As it was surveyed.
        heaps: Which of :data:`HEAPS`.
        data: The finished data stage.
        own: ``PLAIT_HOME``.
    """
    count, parallel = LAYOUTS[name]
    settings = [*SETTINGS, f"stages.tune.trainer.parallel={parallel}"]
    resolved = load_recipe(RECIPE, settings)
    recipe = resolved.spec
    here = replace(machine, processes=count, local=count)
    _, estimate = estimate_all([("data", recipe.data), *recipe.stages.items()], here)
    for heap in heaps:
        with tempfile.TemporaryDirectory() as temp:
            run = new_run("plan", Path(temp), contents={"recipe.yaml": resolved.to_yaml()})
            shutil.copytree(data, run / data.name)
            for rank, found in enumerate(run_all(run, own, count, more=HEAPS[heap])):
                yield record(name, rank, heap, planned=planned_of(estimate, rank), found=found, machine=machine)


def record(
    name: str, rank: int, heap: str, *, planned: Estimate | Share, found: dict[str, Any], machine: Machine
) -> dict[str, Any]:
    """Planned and measured, of one process."""
    total, peak = sum(planned.memory.values()), max(found["peaks"].values())
    base = machine.runtime_bytes
    return {
        "layout": name,
        "process": rank,
        "heap": heap,
        "planned_bytes": total,
        "planned_parts": dict(planned.memory),
        "planned_moments": dict(planned.moments),
        "measured_bytes": peak,
        "measured_sections": found["peaks"],
        "error": round(total / peak - 1, 4),
        "error_beside_runtime": round((total - base) / (peak - base) - 1, 4),
        "runtime_bytes": base,
        "seconds": round(found["seconds"], 1),
    }


def line(one: dict[str, Any]) -> str:
    """For a person who waits."""
    parts = " ".join(f"{name} {size / MIB:.0f}" for name, size in one["planned_parts"].items() if size)
    moments = " ".join(f"{name} {size / MIB:.0f}" for name, size in one["planned_moments"].items() if size)
    seen = " ".join(f"{name} {size / MIB:.0f}" for name, size in one["measured_sections"].items())
    return (
        f"{one['layout']} / {one['process']} / {one['heap']}: {one['planned_bytes'] / MIB:.0f} planned, "
        f"{one['measured_bytes'] / MIB:.0f} measured ({one['error']:+.1%}; beside the runtime "
        f"{one['error_beside_runtime']:+.1%}), {one['seconds']} s\n    [{parts}]\n    [{moments}]\n    [{seen}]"
    )


def table(found: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line for each process and heap."""
    lines = ["| layout | process | heap | in training | highest planned | when | measured | off | beside the runtime |"]
    lines.append("|---" * 9 + "|")
    for one in found:
        moments = one["planned_moments"]
        cells = [one["layout"], str(one["process"]), one["heap"], f"{moments['decoder'] / MIB:,.0f}"]
        cells += [f"{one['planned_bytes'] / MIB:,.0f}", max(moments, key=moments.__getitem__)]
        cells += [f"{one['measured_bytes'] / MIB:,.0f}", f"{one['error']:+.0%}", f"{one['error_beside_runtime']:+.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="`plait plan --processes` beside what is measured.")
    parser.add_argument("--keep", action="store_true", help="write the figures")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="layouts")
    parser.add_argument("--heap", choices=[*HEAPS], help="one way of keeping what is freed")
    parser.add_argument("--table", action="store_true", help="print the figures that are there")
    args = parser.parse_args()
    if args.table:
        print(table(read_json(RESULTS)["rows"]))
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    machine = survey(Path.cwd())
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "peft")}
    about = {"date": str(datetime.date.today()), "cpu": cpu_name(), "python": platform.python_version()}
    about |= {"settings": list(SETTINGS)}
    names = [name for name in LAYOUTS if not args.only or name in args.only]
    heaps = [args.heap] if args.heap else [*HEAPS]
    kept = read_json(RESULTS)["rows"] if args.keep and RESULTS.is_file() else []
    found = [one for one in kept if one["layout"] not in names or one["heap"] not in heaps]
    with tempfile.TemporaryDirectory() as temp:
        data, own = prepared(Path(temp))
        for name in names:
            for one in rows(name, machine, heaps=heaps, data=data, own=own):
                print(line(one), flush=True)
                found.append(one)
            if args.keep:
                found.sort(key=lambda one: [*LAYOUTS].index(one["layout"]))
                write_json(RESULTS, {**about, "threads": 1, "versions": versions, "rows": found})
    print(table(found))


if __name__ == "__main__":
    main()
