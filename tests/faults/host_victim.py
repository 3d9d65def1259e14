"""What ``test_hosts.py`` starts under torchrun on each host: ``python host_victim.py FOLDER ZERO``.

In its first life the last process is killed before step 4, from which there are three checkpoints.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from benchmarks.layouts import Way, source, trained, weights

from plait.core import mesh


class Deadly:
    """The conversations; the last process dies on the way to the fourth step, once."""

    def __init__(self) -> None:
        self.source = source()

    def step_batches(self, step: int) -> Any:
        first_life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if mesh.active() and first_life and step == 3 and mesh.rank() == mesh.world() - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.source.step_batches(step)


def main(folder: Path, zero: int) -> None:
    way = Way(name="hosts", zero=zero, whole=True)
    with mesh.joined():
        said: list[Any] = []
        model = trained(way.model(), folder / "run", batches=Deadly(), said=said, save_every=1, **way.settings)
        for event in said:
            print(f"{mesh.rank()}: {event.text}", flush=True)
        if mesh.rank() == 0:
            torch.save(weights(model), folder / f"weights-{mesh.world()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
