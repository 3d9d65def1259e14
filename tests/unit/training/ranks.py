"""What ``test_sharded.py`` starts: ``python ranks.py FOLDER`` saves and loads with 1, 2 and 4 processes, prints JSON.

torch is imported once; every rank is forked from there, before any torch operation.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarks.sides.several import together
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

from plait.core import mesh
from plait.core.events import Events
from plait.core.snapshot import save_tensors
from plait.training import sharded
from plait.training.checkpoint import Checkpoints
from plait.training.sharded import load_together, read_whole, save_together


def whole() -> dict[str, torch.Tensor]:
    """Tensors of many forms; what is said of each is how it lies on the ranks."""
    torch.manual_seed(5)
    return {
        "rows": torch.randn(5, 6),  # unevenly on two and on four
        "columns": torch.randn(3, 8).bfloat16(),
        "one": torch.randn(1, 4),  # fewer rows than ranks
        "same": torch.arange(7),
        "plain": torch.randn(3, 3),
        "step": torch.tensor(41.0),
        "empty": torch.empty(0, 3),
    }


PLACES = {"rows": Shard(0), "columns": Shard(1), "one": Shard(0), "same": Replicate(), "empty": Shard(0)}


def placed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Spread over the ranks; "plain" and "step" are the same everywhere."""
    if not mesh.active():
        return tensors
    ranks = init_device_mesh("cpu", (mesh.world(),))
    return {n: distribute_tensor(t, ranks, [PLACES[n]]) if n in PLACES else t for n, t in tensors.items()}


def checkpoints(root: Path) -> Checkpoints:
    return Checkpoints(root / "checkpoints", keep_last=2, events=Events())


def save(root: Path, *, step: int = 3, write: Callable[[Path], None] | None = None) -> str:
    def rest(folder: Path) -> None:
        assert mesh.rank() == 0
        (folder / "note.json").write_text("{}")

    return str(save_together(checkpoints(root), step, placed(whole()), write=write or rest))


def load(checkpoint: Path, **others: torch.Tensor) -> list[str]:
    """Names of the tensors that are not what was saved."""
    blank = {name: torch.full_like(tensor, 7) for name, tensor in (whole() | others).items()}
    into = placed(blank)
    load_together(checkpoint, into)
    full = {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in into.items()}
    return [name for name, tensor in whole().items() if not torch.equal(full[name], tensor)]


def full_disk(_: Path) -> None:
    with open("/dev/full", "wb") as file:
        file.write(b"x")


def rank_one(fault: Callable[[], None]) -> Callable[..., None]:
    """The writer of pieces, whose second rank meets a fault afterwards."""
    real = sharded._write_pieces

    def patched(*args: Any) -> None:
        real(*args)
        if mesh.rank() == 1:
            fault()

    return patched


def with_fault(root: Path, fault: Callable[[], None]) -> list[Any]:
    def work() -> str:
        sharded._write_pieces = rank_one(fault)
        return save(root, step=4)

    return together(2, work)


def damaged(root: Path, damage: Callable[[Path], None]) -> list[Any]:
    """Loading a checkpoint whose second shard something happened to."""
    copy = root / f"copy-{damage.__name__}" / "000003"
    shutil.copytree(root / "checkpoints/000003", copy)
    (shard,) = (copy / "shards").glob("shard-00002*")
    damage(shard)
    return together(2, lambda: load(copy))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)


def unlisted(path: Path) -> None:
    """Gone, and the manifest says nothing of it: as if another tool had copied what it took for needed."""
    manifest = path.parents[1] / "manifest.json"
    record = json.loads(manifest.read_text())
    del record["files"][f"shards/{path.name}"]
    manifest.write_text(json.dumps(record))
    path.unlink()


def main(root: Path) -> dict[str, Any]:
    three = root / "checkpoints/000003"
    out: dict[str, Any] = {"saved": together(2, lambda: save(root))}
    out["files"] = sorted(p.relative_to(three).as_posix() for p in three.rglob("*") if p.is_file())
    out["loaded"] = {world: together(world, lambda: load(three)) for world in (1, 2, 4)}
    out["other shape"] = together(2, lambda: load(three, rows=torch.zeros(6, 5)))
    out["other dtype"] = together(1, lambda: load(three, plain=torch.zeros(3, 3).double()))
    for damage in (flip, Path.unlink, unlisted):
        out[damage.__name__] = damaged(root, damage)
    out["rank 0 full"] = together(2, lambda: save(root, step=4, write=full_disk))
    out["rank 1 full"] = with_fault(root, lambda: full_disk(root))
    out["rank 1 killed"] = with_fault(root, lambda: os.kill(os.getpid(), signal.SIGKILL))
    out["left"] = sorted(p.name for p in (root / "checkpoints").iterdir())
    out["from four"] = [
        together(4, lambda: save(root / "four")),
        together(2, lambda: load(root / "four/checkpoints/000003")),
    ]
    out["from one"] = [
        together(1, lambda: save(root / "one")),
        together(2, lambda: load(root / "one/checkpoints/000003")),
    ]
    out["rotated"] = [together(2, lambda step=step: save(root / "many", step=step)) for step in (1, 2, 3)]
    out["kept"] = sorted(p.name for p in (root / "many/checkpoints").iterdir())

    def export() -> list[str]:
        tensors = read_whole(three)
        save_tensors(tensors, root / "model.safetensors", metadata={"format": "pt"})
        return [n for n, t in whole().items() if not torch.equal(tensors[n], t)]

    out["whole"] = together(1, export)
    return out


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
