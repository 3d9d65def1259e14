"""How long training waits for pictures that are decoded and scaled in every step, with 0, 1, 2 and 4 workers.

Ours (:class:`plait.data.loader.Loader`) beside ``torch.utils.data.DataLoader`` over a plain map data set with its
defaults: the same files, the same decoding and scaling, the same batch size. Two kinds of training stand behind it: an
accelerator that leaves the processor free (a sleep), and training on one core of this processor (matrix products). Both
take about as long as making a batch. Configurations are run in turn, figures are medians over rounds.

Run: ``python benchmarks/loader.py [--rounds 5] [--steps 24]``; writes ``benchmarks/results/loader.json``.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import io
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from plait import __version__
from plait.core.device import cpu_name, usable_cores
from plait.core.files import write_json
from plait.core.tensors import Batch, Patches
from plait.data.loader import Loader
from plait.data.order import Order

RESULTS = Path(__file__).parent / "results" / "loader.json"
PICTURES, WIDTH, HEIGHT, SIDE, BATCH = 192, 640, 480, 224, 16
WORKERS = (0, 1, 2, 4)


def write_pictures(folder: Path) -> list[Path]:
    """JPEG and PNG in turn: soft colors with grain, so that they cost about what photographs cost."""
    paths: list[Path] = []
    for number in range(PICTURES):
        rng = np.random.default_rng(number)
        small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((WIDTH, HEIGHT))
        grain = rng.integers(-6, 7, (HEIGHT, WIDTH, 3))
        picture = Image.fromarray(np.clip(np.asarray(small) + grain, 0, 255).astype(np.uint8))
        path = folder / f"{number}.{'png' if number % 2 else 'jpg'}"
        picture.save(path)
        paths.append(path)
    return paths


def pixels(path: Path) -> torch.Tensor:
    """``SIDE SIDE 3``, 0 to 1."""
    picture = Image.open(io.BytesIO(path.read_bytes())).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(picture)).float() / 255


class Ours:
    """A pure function of the step."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self.order = Order(number=len(paths), batch_size=BATCH, seed=0)

    def step_batches(self, step: int) -> list[Batch]:
        """The pictures of a step."""
        rows: list[int] = self.order.batch(step).tolist()
        values = torch.cat([pixels(self.paths[row]).view(-1, 3) for row in rows])
        ones = torch.ones(len(rows), 1, dtype=torch.long)
        return [
            Batch(
                token_ids=ones,
                labels=ones,
                segment_ids=ones,
                media={"image": Patches(values=values, grid=torch.tensor([[1, SIDE, SIDE]] * len(rows)))},
                item_row={"image": torch.arange(len(rows))},
                sample_ids=tuple(map(str, rows)),
            )
        ]


class Theirs(Dataset[torch.Tensor]):
    """A plain map data set."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return 1_000_000  # so that no epoch ends within a measurement

    def __getitem__(self, item: int) -> torch.Tensor:
        return pixels(self.paths[item % len(self.paths)])


def ours(paths: list[Path], workers: int, steps: int) -> Iterator[Any]:
    """Batches of our loader."""
    with Loader(Ours(paths), steps=steps, workers=workers) as loader:
        for step in range(steps):
            yield loader.step_batches(step)


def theirs(paths: list[Path], workers: int, steps: int) -> Iterator[Any]:
    """Batches of torch's."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        batches = iter(DataLoader(Theirs(paths), batch_size=BATCH, num_workers=workers))
    for _ in range(steps):
        yield next(batches)


SIDES: dict[str, Callable[[list[Path], int, int], Iterator[Any]]] = {"plait": ours, "torch": theirs}


def on_accelerator(seconds: float) -> None:
    """As if a GPU were at work."""
    time.sleep(seconds)


_FACTOR = torch.randn(384, 384)


def on_processor(seconds: float) -> None:
    """So many matrix products as take that long on a core of one's own."""
    for _ in range(round(seconds / _seconds_a_product())):
        _FACTOR @ _FACTOR


@functools.cache
def _seconds_a_product() -> float:
    times: list[float] = []
    for _ in range(40):
        begun = time.perf_counter()
        _FACTOR @ _FACTOR
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


CASES: dict[str, Callable[[float], None]] = {"accelerator": on_accelerator, "processor": on_processor}


def measure(batches: Iterator[Any], train: Callable[[float], None], busy_s: float) -> dict[str, float]:
    """Seconds to the first batch; after it the share of waiting, and samples a second."""
    begun = time.perf_counter()
    next(batches)
    first = time.perf_counter() - begun
    waited, steps, begun = 0.0, 0, time.perf_counter()
    while True:
        train(busy_s)
        at = time.perf_counter()
        if next(batches, None) is None:
            break
        waited += time.perf_counter() - at
        steps += 1
    total = at - begun
    return {"first_s": first, "wait_share": waited / total, "samples_per_s": steps * BATCH / total}


def main() -> None:
    """Measure, print the table, write the result."""
    parser = argparse.ArgumentParser(description="How long training waits for its batches.")
    parser.add_argument("--rounds", type=int, default=5, help="rounds over all configurations (default 5)")
    parser.add_argument("--steps", type=int, default=24, help="steps of each (default 24)")
    given = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    found: dict[tuple[str, str, int], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = write_pictures(Path(folder))
        source = Ours(paths)
        source.step_batches(0)
        times: list[float] = []
        for step in range(5):
            begun = time.perf_counter()
            source.step_batches(step)
            times.append(time.perf_counter() - begun)
        busy = statistics.median(times)
        for _ in range(given.rounds):
            for case, train in CASES.items():
                for workers in WORKERS:
                    for side, make in SIDES.items():
                        once = measure(make(paths, workers, given.steps), train, busy)
                        found.setdefault((case, side, workers), []).append(once)
    rows = [
        {"case": case, "side": side, "workers": workers}
        | {name: round(statistics.median(run[name] for run in runs), 4) for name in runs[0]}
        | {f"wait_share_{end}": round(of(run["wait_share"] for run in runs), 4) for end, of in _ENDS.items()}
        for (case, side, workers), runs in found.items()
    ]
    print(f"{'case':<12} {'side':<6} {'workers':>7} {'wait':>7} {'samples/s':>10} {'first, s':>9}")
    for row in rows:
        text = f"{row['case']:<12} {row['side']:<6} {row['workers']:>7} {row['wait_share']:>7.1%}"
        print(f"{text} {row['samples_per_s']:>10.1f} {row['first_s']:>9.2f}")
    print(f"a batch takes {busy * 1000:.0f} ms to make; load average before: {load:.1f}")
    write_json(
        RESULTS,
        {
            "benchmark": "loader",
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "machine": {
                "cpu": cpu_name(),
                "cores": usable_cores(),
                "system": f"{platform.system()} {platform.machine()}",
            },
            "versions": {
                "plait": __version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "pillow": Image.__version__,
            },
            "pictures": {"width": WIDTH, "height": HEIGHT, "side": SIDE, "batch": BATCH, "batch_s": round(busy, 4)},
            "rounds": given.rounds,
            "steps": given.steps,
            "load_average_before": round(load, 2),
            "rows": rows,
        },
    )


_ENDS: dict[str, Callable[..., float]] = {"least": min, "most": max}

if __name__ == "__main__":
    main()
