"""How near `plait plan` comes: each stage of recipes that differ, planned, then run in a process of its own.

Measured of each training stage: the highest RSS of a process that runs this stage alone, by section (before the first
step, each phase, what is shown or scored meanwhile, after the last step); bytes in its folder; seconds. Caches go to a
new ``PLAIT_HOME`` with the packages of the present one, so that they are filled as in a first run.

Run: ``python benchmarks/plan.py [--keep] [--only NAME ...]``, half an hour; ``--keep`` writes
``benchmarks/results/plan.json``. ``--table`` prints what is there as Markdown.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from plait.core.device import cpu_name
from plait.core.estimate import Estimate, Machine
from plait.core.files import new_run, read_json, write_json
from plait.core.packages import home
from plait.recipes.probe import highest
from plait.recipes.recipe import load_recipe
from plait.training.plan import estimate_all, survey

RESULTS = Path(__file__).parent / "results" / "plan.json"
AIM = 0.15
TRAINS = ("pretrain", "tune", "align")
SMALL = ("data.source.max_train=160", "data.source.max_test=40", "data.questions.canvases=16")
SHORT = ("stages.pretrain.steps=6", "stages.pretrain.epochs=null")
TUNED = (
    "stages.tune.views=1",
    "stages.tune.words.steps=2",
    "stages.tune.frozen.steps=2",
    "stages.tune.adapt.steps=2",
)


@dataclass(frozen=True)
class Case:
    """A recipe: a shipped one with other settings, and the stages that stay in it."""

    name: str
    settings: Sequence[str] = ()
    stages: Sequence[str] = ("tune",)
    recipe: str = "quickstart-ci"
    own: bool = False

    def overrides(self, folder: Path) -> list[str]:
        """All settings, as `plait plan` takes them."""
        gone = [f"stages.{name}=null" for name in (*TRAINS, "evaluate", "compress") if name not in self.stages]
        return [*(write_pairs(folder) if self.own else ()), *self.settings, *gone]


VIT = "{kind: vit, size: 64, patch: 8, d: 192, depth: 6, heads: 3}"
NEW = "{kind: new, model_type: llama, d: 256, depth: 4, heads: 4, d_ff: 1024}"
MLP = (
    "stages.tune.connector={kind: mlp}",
    "stages.tune.words=null",
    "stages.tune.new_pictures=null",
    "stages.tune.new_from=null",
)
QFORMER = "{queries: 16, d: 128, depth: 2, heads: 4}"
CASES = (
    Case("quickstart-ci", stages=TRAINS),
    Case("ViT from scratch", (*SMALL, *SHORT, f"stages.pretrain.image_tower={VIT}"), ("pretrain",)),
    Case(
        "ViT from scratch, micro_batch 16",
        (*SMALL, *SHORT, f"stages.pretrain.image_tower={VIT}", "stages.pretrain.trainer.micro_batch=16"),
        ("pretrain",),
    ),
    Case(
        "Q-Former",
        (*SMALL, *SHORT, f"stages.pretrain.qformer={QFORMER}", "stages.pretrain.batch_size=64"),
        ("pretrain",),
    ),
    Case("LoRA in float32, batch 32", (*SMALL, *TUNED, "stages.tune.dtype=float32", "stages.tune.batch_size=32")),
    Case("LoRA, batch 32", (*SMALL, *TUNED, "stages.tune.batch_size=32")),
    Case(
        "LoRA, batch 32, micro_batch 8",
        (*SMALL, *TUNED, "stages.tune.batch_size=32", "stages.tune.trainer.micro_batch=8"),
    ),
    Case(
        "LoRA, batch 32, recompute full",
        (*SMALL, *TUNED, "stages.tune.batch_size=32", "stages.tune.trainer.recompute=full"),
    ),
    Case(
        "LoRA, batch 32, recompute selective",
        (*SMALL, *TUNED, "stages.tune.batch_size=32", "stages.tune.trainer.recompute=selective"),
    ),
    Case("LoRA, batch 32, head full", (*SMALL, *TUNED, "stages.tune.batch_size=32", "stages.tune.trainer.head=full")),
    Case("whole decoder", (*SMALL, *TUNED, "stages.tune.adapt.rank=0", "stages.tune.adapt.lr=1e-5")),
    Case(
        "new decoder, mlp",
        (
            *SMALL,
            *TUNED,
            *MLP,
            f"stages.tune.decoder={NEW}",
            "stages.tune.adapt.rank=0",
            "stages.tune.frozen.steps=0",
            "stages.tune.adapt.lr_connector=1e-3",
        ),
    ),
    Case(
        "own pairs, mlp", (*TUNED, *MLP, "data.questions.canvases=null", "data.questions.test_canvases=null"), own=True
    ),
    Case(
        "resampler, float32, recompute full",
        (
            *SMALL,
            *TUNED,
            "stages.tune.connector={kind: resampler, queries: 16, depth: 1}",
            "stages.tune.words=null",
            "stages.tune.new_pictures=null",
            "stages.tune.new_from=null",
            "stages.tune.dtype=float32",
            "stages.tune.trainer.recompute=full",
        ),
    ),
    Case(
        "ResNet-18 from scratch",
        (
            *SMALL,
            *SHORT,
            "stages.pretrain.image_tower={kind: resnet, depth: 18, size: 64}",
            "stages.pretrain.batch_size=64",
        ),
        ("pretrain",),
    ),
)


def write_pairs(folder: Path) -> list[str]:
    """Own pictures with texts: 120 photographs' worth of noise, 256 pixels a side."""
    lines = ["image,text"]
    for number in range(120):
        noise = np.random.default_rng(number).integers(0, 256, (256, 256, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.jpg")
        lines.append(f"{number}.jpg,a picture of thing {number} beside another")
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    return [f"data.source={{kind: pairs, path: {folder / 'pairs.csv'}, test_fraction: 0.2}}"]


def measure(run: Path, number: int, own: Path) -> dict[str, Any]:
    """A stage in a process of its own."""
    command = [sys.executable, "-m", "plait.recipes.probe_stage", str(run), str(number), "0"]
    environment = {**os.environ, "PLAIT_HOME": str(own), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    last = json.loads(done.stdout.splitlines()[-1]) if done.stdout else {}
    if "result" not in last:
        raise SystemExit(f"{run} stage {number}: {last.get('error')}\n{done.stderr[-3000:]}")
    return last["result"]


def held(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def rows(case: Case, machine: Machine) -> Iterator[dict[str, Any]]:
    """A record for each training stage: planned beside measured."""
    with tempfile.TemporaryDirectory() as temp:
        folder, own = Path(temp), Path(temp) / "home"
        own.mkdir()
        for name in ("packages", "converted"):
            (own / name).symlink_to(home() / name)
        resolved = load_recipe(case.recipe, case.overrides(folder))
        recipe = resolved.spec
        named = [("data", recipe.data), *recipe.stages.items()]
        planned = estimate_all(named, machine)
        run = new_run("plan", folder / "runs", contents={"recipe.yaml": resolved.to_yaml()})
        for number, ((_, stage), estimate) in enumerate(zip(named, planned, strict=True), 1):
            before = held(own / "features") if (own / "features").is_dir() else 0
            found = measure(run, number, own)
            cached = (held(own / "features") if (own / "features").is_dir() else 0) - before
            if stage.kind in TRAINS:
                yield record(case, estimate, found, cached=cached)


def record(case: Case, estimate: Estimate, found: dict[str, Any], *, cached: int) -> dict[str, Any]:
    """Planned and measured."""
    peak = max(found["peaks"].values())
    return {
        "recipe": case.name,
        "settings": list(case.settings),
        "stage": estimate.stage,
        "planned_bytes": sum(estimate.memory.values()),
        "planned_parts": dict(estimate.memory),
        "planned_moments": dict(estimate.moments),
        "measured_bytes": peak,
        "measured_sections": found["peaks"],
        "error": round(sum(estimate.memory.values()) / peak - 1, 4),
        "planned_s": [round(seconds, 1) for seconds in estimate.seconds],
        "measured_s": round(found["seconds"], 1),
        "step_s": {phase["phase"]: round(phase["step_s"], 4) for phase in found["phases"]},
        "planned_disk": estimate.disk_bytes,
        "measured_disk": found["disk_bytes"],
        "planned_home": estimate.home_bytes,
        "measured_home": cached,
    }


def line(one: dict[str, Any]) -> str:
    """For a person who waits."""
    mib = 2**20
    parts = " ".join(f"{name} {size / mib:.0f}" for name, size in one["planned_parts"].items() if size)
    seen = " ".join(f"{name} {size / mib:.0f}" for name, size in one["measured_sections"].items())
    return (
        f"{one['recipe']} / {one['stage']}: {one['planned_bytes'] / mib:.0f} planned, "
        f"{one['measured_bytes'] / mib:.0f} measured ({one['error']:+.1%})\n    [{parts}]\n    [{seen}]\n"
        f"    {one['planned_s']} s, {one['measured_s']} s {one['step_s']}; disk {one['planned_disk'] / mib:.2f}, "
        f"{one['measured_disk'] / mib:.2f}; caches {one['planned_home'] / mib:.1f}, {one['measured_home'] / mib:.1f}"
    )


def table(found: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| recipe | stage | planned, MiB | measured | off | highest | time planned | took | disk planned | is |"]
    lines.append("|---" * 10 + "|")
    for one in found:
        sections = one["measured_sections"]
        low, high = one["planned_s"]
        disk = [one[name] / 2**20 for name in ("planned_disk", "measured_disk")]
        lines.append(
            f"| {one['recipe']} | {one['stage']} | {one['planned_bytes'] / 2**20:,.0f} | "
            f"{one['measured_bytes'] / 2**20:,.0f} | {one['error']:+.0%} | {highest(sections)} | "
            f"{low:.0f} to {high:.0f} s | {one['measured_s']:.0f} s | {disk[0]:.1f} MiB | {disk[1]:.1f} MiB |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="`plait plan` beside what is measured.")
    parser.add_argument("--keep", action="store_true", help="write the figures")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="recipes whose name has this in it")
    parser.add_argument("--table", action="store_true", help="print the figures that are there")
    args = parser.parse_args()
    if args.table:
        print(table(read_json(RESULTS)["rows"]))
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    machine = survey(Path.cwd())
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "peft")}
    about = {"date": str(datetime.date.today()), "cpu": cpu_name(), "python": platform.python_version()}
    found: list[dict[str, Any]] = []
    for case in CASES:
        if not args.only or any(part in case.name for part in args.only):
            for one in rows(case, machine):
                print(line(one), flush=True)
                found.append(one)
                if args.keep:
                    write_json(RESULTS, {**about, "threads": 1, "versions": versions, "rows": found})
    print(table(found))


if __name__ == "__main__":
    main()
