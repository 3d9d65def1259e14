"""One of several processes that compute the steps of a rehearsed stage together.

``python -m plait.recipes.rehearsed.rank RUN STAGE OUT``, started by :func:`plait.recipes.rehearse.in_processes`. It
runs the stage as training would, with its share of each batch and the recipe's `trainer.parallel`. What one process
kept before it trained (the reference of preferences) is taken: computed over shares of a batch it is rounded otherwise,
which is no fault of the sum. Where a phase is about to train, it takes the weights that one process had there, and
compares the summed gradient with that one's.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from plait.core import mesh
from plait.core.errors import PlaitError
from plait.core.events import Events
from plait.core.files import write_json
from plait.recipes.recipe import load_recipe
from plait.recipes.rehearse import read_reference, reference_folder
from plait.recipes.run import stages
from plait.stages.align import REFERENCE
from plait.training.gradient import check_batches
from plait.training.held import compare, held
from plait.training.parallel.twin import lay_out
from plait.training.rehearsal import Asked, rehearsing
from plait.training.settings import FitResult
from plait.training.state import TrainState


class _Enough(Exception):
    """The last phase has been looked at."""


def compared(asked: Asked, reference: Path) -> dict[str, Any]:
    """How far the gradient that all processes sum is from that of one: of what this process holds.

    Args:
        asked: What this process is about to train, its weights those of the other one.
        reference: Folder of what that one kept.

    Raises:
        ConfigError: The trainer would refuse to divide the batch: the loss is no sum over its rows.
    """
    micro = asked.batches.step_batches(0)
    check_batches(micro, asked.objective, step=0)  # as the loop does before every step
    record = read_reference(reference)
    right: dict[str, Tensor | None] = {**load_file(reference / "gradient.safetensors")}
    right |= dict.fromkeys(record["without"])
    dtype = getattr(torch, record["dtype"]) if record["dtype"] else None
    settings = asked.settings
    with held(asked.model, asked.objective, settings, dtype=dtype) as still:
        layout = lay_out(asked.model, asked.objective, settings.parallel, device=settings.compute.device)
        try:
            found = still.gradient(micro, layout=layout)
        finally:
            layout.finish()
    gap = compare(right, found.of)
    return {**asdict(gap), "bounds": record["bounds"], "counts": [record["counts"], dict(found.sums.counts)]}


def main(run: Path, name: str, out: Path, *, threads: int) -> None:
    """Look at every phase of a stage that was kept, and let the first process write what all found.

    Args:
        run: The rehearsal.
        name: Of the stage.
        out: Where processes may write.
        threads: Of this process while it computes. What a stage prepares is prepared with the threads of the one
            process, since roundings depend on them.
    """
    recipe = load_recipe(str(run / "recipe.yaml")).spec
    named = {at: (stage, folder) for at, stage, folder in stages(recipe, run)}
    stage, folder = named[name]
    before = [at for _, at in named.values() if at.name < folder.name]
    kept = list(reference_folder(run, name, "").parent.iterdir())
    found: dict[str, Any] = {}

    def instead(asked: Asked) -> FitResult:
        phase = "" if asked.folder == own else asked.folder.name
        reference = reference_folder(run, name, phase)
        state = TrainState(asked.model, asked.objective).tensors()
        _take(state, load_file(reference / "before.safetensors"))
        if (reference / "reference.json").is_file():
            before_it = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                said = compared(asked, reference)
            except PlaitError as error:
                said = {"refused": error.as_dict()}
            finally:
                torch.set_num_threads(before_it)
            found[phase] = mesh.gather(said)
        _take(state, load_file(reference / "after.safetensors"))
        seen.append(phase)
        if len(seen) == len(kept):
            raise _Enough
        result = asked.folder / "checkpoints" / "000001"
        return FitResult(checkpoint=result, step=1, skipped=0, resumed_from=0, values={})

    seen: list[str] = []
    own = out / str(mesh.rank()) / folder.name
    own.mkdir(parents=True)
    if (folder / REFERENCE).is_file():
        shutil.copy(folder / REFERENCE, own)
    try:
        with rehearsing(instead):
            stage.run(before[-1], own, events=Events(None))
    except _Enough:
        pass
    mesh.first(lambda: write_json(out / "found.json", found))


@torch.no_grad()
def _take(state: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        state[name].copy_(tensor)


if __name__ == "__main__":
    with mesh.joined("cuda" if torch.cuda.is_available() else "cpu"):
        main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), threads=int(sys.argv[4]))
