"""What ``test_fit_ranks.py`` starts: ``python fit_ranks.py FOLDER CASE ...`` trains in several processes, prints JSON.

torch is imported once; every rank is forked from there, before any torch operation.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarks import exactness
from benchmarks.layouts import STEPS, Way, apart, compared, source, trained, ways, weights
from benchmarks.sides.several import together
from torch import Tensor, nn

from plait.core import mesh
from plait.core.errors import DataError
from plait.core.events import Event
from plait.core.tensors import Batch
from plait.data.conversations import Conversation, ConversationBatches
from plait.data.template import Rendered
from plait.models.connectors.projection import Mlp
from plait.models.connectors.query import QFormer, QFormerSizes
from plait.models.crossattend import GatedCrossAttention
from plait.models.multimodal import MultimodalLM
from plait.models.transformer import TransformerSizes
from plait.objectives.language import NextToken
from plait.training.guard import Guard
from plait.training.schedule import Constant
from plait.training.settings import Hooks, Stopping
from plait.training.trainer import Average, Parallel

WHOLE = Way(name="all learns", whole=True, kv_heads=4)
TRIED = {
    "DDP": ((4, 2),),
    "DDP, float32 SGD": ((2, 2),),
    "ZeRO-2": ((4, 2),),
    "ZeRO-1, all learns": ((2, 2),),
    "ZeRO-3, all learns": ((4, 2),),
    "ZeRO-3, LARS": ((2, 1),),
    "ZeRO-3, average, all recomputed": ((2, 2),),
    "tensor 2": ((2, 2),),
    "tensor 2, ZeRO-3, all learns": ((4, 2),),
    "DDP, InfoNCE": ((2, 2),),
    "ZeRO-3, sigmoid loss": ((2, 2),),
}
"""Of the ways of the benchmark, and the numbers of processes and micro-batches; all of them take five minutes."""


def spread(zero: int, **degrees: int) -> dict[str, Any]:
    return {"parallel": Parallel.model_validate({"zero": zero, **degrees})}


def equal(root: Path) -> dict[str, Any]:
    """How far 2 and 4 processes end from one."""
    known = {way.name: way for way in ways()}
    return {
        f"{name}, {known[name].dtype}, {world} processes, {pieces} micro-batches": compared(
            known[name], root / f"{name} {world} {pieces}", world=world, pieces=pieces
        )
        for name, cases in TRIED.items()
        for world, pieces in cases
    }


def resumed(root: Path) -> dict[str, Any]:
    """A run goes on with another number of processes, in another layout: how far it ends from one that ran through."""
    ways: dict[str, tuple[tuple[int, dict[str, int]], ...]] = {
        "one, then ZeRO-3 on 4": ((1, {}), (4, {"zero": 3})),
        "ZeRO-3 on 4, then ZeRO-1 on 2": ((4, {"zero": 3}), (2, {"zero": 1})),
        "ZeRO-2 on 2, then DDP on 4": ((2, {"zero": 2}), (4, {})),
        "ZeRO-3 on 2, then tensor 4": ((2, {"zero": 3}), (4, {"tensor": 4})),
        "tensor 2 and ZeRO-1 on 4, then one": ((4, {"tensor": 2, "zero": 1}), (1, {})),
    }
    common: dict[str, Any] = {"average": Average(decay=0.5), "save_every": 1, "schedule": Constant()}

    def through() -> str:
        torch.save(weights(trained(WHOLE.model(), root / "through", **common)), root / "through.pt")
        return "kept"

    found: dict[str, Any] = {"through": together(1, through)}
    for name, ((world, how), (later, then)) in ways.items():
        part = partial(gone_on, root / name, steps=3, **common, **spread(**{"zero": 0, **how}))
        rest = partial(gone_on, root / name, expected=root / "through.pt", **common, **spread(**{"zero": 0, **then}))
        found[name] = [together(world, part), together(later, rest)]
    return found


def gone_on(folder: Path, *, expected: Path | None = None, **settings: Any) -> Any:
    """Where a run went on from, and how far it is from another."""
    said: list[Event] = []
    model = trained(WHOLE.model(), folder, said=said, **settings)
    if expected is None:
        return "part"
    resumed = [event.text.split(":")[0] for event in said if event.text.startswith("resumed")]
    return [resumed, apart(weights(model), torch.load(expected, weights_only=True), weights(WHOLE.model()))]


class Failing:
    """The conversations, whose source goes wrong in one process at one step."""

    def __init__(self, fault: Callable[[], Any], *, rank: int = 1, step: int = 2) -> None:
        self.source, self.fault, self.rank, self.step = source(), fault, rank, step

    def step_batches(self, step: int) -> Any:
        if step == self.step and mesh.rank() == self.rank:
            self.fault()
        return self.source.step_batches(step)


class Empty(Failing):
    """The conversations, of which one process gets none in the first step, before it has met the others."""

    def __init__(self) -> None:
        super().__init__(refuse)

    def step_batches(self, step: int) -> Any:
        return [] if mesh.rank() == self.rank else self.source.step_batches(step)


def begun(root: Path) -> dict[str, Any]:
    """What each of two says when one fails before they have made their groups; and how long that took."""

    def work() -> str:
        trained(WHOLE.model(), root / "begun", batches=Empty())
        return "done"

    began = time.monotonic()
    return {"said": together(2, work), "s": time.monotonic() - began}


def refuse() -> None:
    raise DataError("the picture is cut off", place="sample c3", remedy="take it out")


def bug() -> None:
    raise AttributeError("no such thing")


def signaled(number: int) -> None:
    os.kill(os.getpid(), number)


def faults(root: Path) -> dict[str, Any]:
    """What each process says when one of two meets something; and how long that took."""
    ways: dict[str, tuple[int, Callable[[], None]]] = {
        "refused": (0, refuse),
        "refused in pieces": (3, refuse),
        "killed": (0, partial(signaled, signal.SIGKILL)),
        "killed in pieces": (3, partial(signaled, signal.SIGKILL)),
        "bug": (0, bug),
        "stopped": (3, partial(signaled, signal.SIGTERM)),
    }
    found: dict[str, Any] = {}
    for name, (zero, fault) in ways.items():
        folder = root / name
        began = time.monotonic()
        said = together(2, partial(failing, folder, fault, zero=zero))
        saved = sorted(path.name for path in (folder / "checkpoints").iterdir() if path.name.isdigit())
        found[name] = {"said": said, "s": time.monotonic() - began, "saved": saved}
    return found


def failing(folder: Path, fault: Callable[[], None], *, zero: int) -> str:
    trained(WHOLE.model(), folder, batches=Failing(fault), save_every=1, **spread(zero))
    return "done"


class NotFinite(NextToken):
    """Its loss is not finite in one process, in one step."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def __call__(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        sums = super().__call__(model, batch)
        self.steps += 1
        bad = self.steps == 3 and mesh.rank() == 1
        return {name: value * float("nan") if bad else value for name, value in sums.items()}


def skipped(root: Path) -> dict[str, Any]:
    """A loss of one process is not finite: all leave the update out, and name the samples."""
    return {f"ZeRO-{zero}": together(2, partial(skipping, root / str(zero), zero=zero)) for zero in (0, 2)}


def skipping(folder: Path, *, zero: int) -> Any:
    said: list[Event] = []
    model = trained(WHOLE.model(), folder, objective=NotFinite(), said=said, **spread(zero))
    mine = [i for batch in source().step_batches(2) for i in batch.sample_ids]
    return [digest(weights(model)), mine, [event.text for event in said if event.kind == "warning"]]


class Tight(NextToken):
    """Has room for one row in one process, from the third step on."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def __call__(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        self.steps += 1
        if self.steps >= 3 and mesh.rank() == 1 and len(batch.token_ids) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().__call__(model, batch)


class High(NextToken):
    """Its loss is a hundred times as high in one share of the data, in one step."""

    def __call__(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        sums = super().__call__(model, batch)
        bad = "24:c10" in batch.sample_ids
        return {name: value * 100 if bad else value for name, value in sums.items()}


class Again:
    """The same five steps over and over; samples are named with their step."""

    def __init__(self, parallel: Mapping[str, int]) -> None:
        self.source = source(packed=False, parallel=Parallel.model_validate(parallel))

    def step_batches(self, step: int) -> list[Batch]:
        batches = self.source.step_batches(step % STEPS)
        return [replace(b, sample_ids=tuple(f"{step}:{name}" for name in b.sample_ids)) for b in batches]


def guarded(root: Path) -> dict[str, Any]:
    """Memory of one process runs out; a spike of one process: all do the same."""

    def exhausted(folder: Path, **parallel: int) -> Any:
        said: list[Event] = []
        batches = source(packed=False, parallel=Parallel.model_validate(parallel))
        model = trained(
            WHOLE.model(),
            folder,
            batches=batches,
            objective=Tight(),
            said=said,
            **spread(parallel.pop("zero", 0), **parallel),
        )
        alone = torch.load(root / "alone.pt", weights_only=True)
        told = [event.text for event in said if event.kind == "warning"]
        return [digest(weights(model)), told, apart(weights(model), alone, weights(WHOLE.model()))]

    def spiked(folder: Path, action: str, **parallel: int) -> Any:
        said: list[Event] = []
        guard = Guard.model_validate({"spike": action})
        model = trained(
            WHOLE.model(),
            folder,
            batches=Again(parallel),
            objective=High(),
            said=said,
            steps=26,
            save_every=8,
            guard=guard,
            **spread(0, **parallel),
        )
        return [digest(weights(model)), [event.text for event in said if event.kind == "warning"]]

    def alone() -> str:
        model = trained(WHOLE.model(), root / "alone", batches=source(packed=False))
        torch.save(weights(model), root / "alone.pt")
        return "kept"

    root.mkdir(parents=True)
    together(1, alone)
    found: dict[str, Any] = {
        f"memory, ZeRO-{zero}": together(2, partial(exhausted, root / f"m{zero}", zero=zero)) for zero in (0, 2)
    }
    found["memory, tensor 2"] = together(2, partial(exhausted, root / "t", tensor=2))
    found["rewind, tensor 2"] = together(2, partial(spiked, root / "rt", "rewind", tensor=2))
    return found | {name: together(2, partial(spiked, root / name, name)) for name in ("skip", "rewind")}


def shown(root: Path) -> dict[str, Any]:
    """What the caller's hooks see: the whole model, in process 0 alone, while it trains in pieces."""
    average = {"average": Average(decay=0.5)}
    ways = {"DDP": spread(0), "ZeRO-3, average": spread(3) | average}
    found = {name: together(2, partial(looking, root / name, WHOLE, **how)) for name, how in ways.items()}
    pairs = Way(name="pairs", loss="nce")  # with a temperature, a scalar that stays whole
    return found | {
        "ZeRO-3, average of a scalar": together(2, partial(looking, root / "s", pairs, **ways["ZeRO-3, average"]))
    }


def looking(folder: Path, way: Way, **settings: Any) -> Any:
    model = way.model()
    seen: list[dict[str, Tensor]] = []

    def look(*_: Any) -> float:
        seen.append({name: weight.detach().clone() for name, weight in model.named_parameters()})
        return -float(len(seen))

    hooks = Hooks(evaluate=look, on_step=look, save_model=look)
    trained(
        model,
        folder,
        objective=way.objective(),
        batches=way.batches(1),
        hooks=hooks,
        save_every=2,
        stopping=Stopping(every=2),
        **settings,
    )
    last = {name: weight.detach() for name, weight in model.named_parameters()}
    return {
        "seen": len(seen),
        "whole": all(weight.numel() for one in seen for weight in one.values()),
        "last": [all(torch.equal(one[name], last[name]) for name in last) for one in seen[-1:]],
        "left": digest(last),
    }


def digest(tensors: Mapping[str, Tensor]) -> str:
    return hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in tensors.values())).hexdigest()[:12]


def unlike(root: Path) -> dict[str, Any]:
    """Processes that begin with other weights, or other settings."""

    def weights_differ() -> Any:
        said: list[Event] = []
        model = WHOLE.model()
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(mesh.rank() * 1e-3)
        trained(model, root / "weights", said=said)
        return [digest(weights(model)), [event.text for event in said if event.kind == "warning"]]

    def frozen_differ() -> Any:
        model = Way(name="LoRA").model()
        with torch.no_grad():
            model.get_submodule("decoder").get_input_embeddings().weight.add_(mesh.rank())
        return trained(model, root / "frozen")

    def settings_differ() -> Any:
        return trained(WHOLE.model(), root / "settings", clip_norm=1.0 + mesh.rank())

    work = {"weights": weights_differ, "frozen": frozen_differ, "settings": settings_differ}
    return {name: together(2, one) for name, one in work.items()}


class Lacking:
    """Two conversations a step: the second process has the one with a picture, and in every other step neither has."""

    def __init__(self, slots: int) -> None:
        self.slots = slots

    def step_batches(self, step: int) -> Any:
        chosen = [exactness.conversations()[number] for number in ((0, 3) if step % 2 else (0, 1))]
        batches = ConversationBatches(
            conversations=[self._fitted(one) for one in chosen],
            weights={"any": 1.0},
            stores=[exactness.features()],
            grid_out=lambda grid: grid if self.slots == 4 else torch.ones_like(grid),
            batch_size=2,
            row=64,
            pad=0,
            steps=STEPS,
            seed=0,
            packed=False,
            rank=mesh.rank(),
            world=mesh.world(),
        )
        return batches.step_batches(step)

    def _fitted(self, one: Conversation) -> Conversation:
        """With as many placeholders as the connector needs, instead of four."""
        old = one.rendered
        if not old.media:
            return one
        ids = (old.token_ids[0], *[exactness.PLACE] * self.slots, *old.token_ids[5:])
        trained = (False, *[False] * self.slots, *old.trained[5:])
        return replace(one, rendered=Rendered(token_ids=ids, trained=trained, media=old.media, slots=(self.slots,)))


def seeing(connector: str) -> MultimodalLM:
    """A decoder that sees through a connector; all of it learns."""
    torch.manual_seed(0)
    decoder = exactness.model(by_document=False).decoder.requires_grad_(requires_grad=True)
    if connector == "gated":
        sizes = TransformerSizes(d=32, depth=1, heads=4, d_source=16)
        reads = [GatedCrossAttention(sizes), None, GatedCrossAttention(sizes)]
        for one in reads:
            if one is not None:
                nn.init.constant_(one.gate, 0.5)
                nn.init.constant_(one.feed_forward_gate, 0.5)
        parts = {"image": Mlp(exactness.WIDTH, 8, 16)}
        model = MultimodalLM({}, parts, decoder, placeholder=exactness.PLACE, reading=reads, inside="image")
    elif connector == "qformer":
        sizes = QFormerSizes(d_source=exactness.WIDTH, d=16, depth=2, heads=2, queries=4, every=1, dropout=0.0)
        model = MultimodalLM({}, {"image": QFormer(sizes, d_out=32)}, decoder, placeholder=exactness.PLACE)
    else:
        model = MultimodalLM({}, {"image": Mlp(exactness.WIDTH, 8, 32)}, decoder, placeholder=exactness.PLACE)
        filters = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # a frozen tower may lie so; FSDP takes none
        model.add_module("filters", filters.requires_grad_(requires_grad=False))
    return model.double().train()


def lacking(root: Path) -> dict[str, Any]:
    """How far two processes end from one, where one of them, or both, have no picture."""
    found: dict[str, Any] = {}
    for connector, zeros in {"mlp": (3,), "qformer": (1,), "gated": (0, 2)}.items():
        folder, slots = root / connector, 1 if connector == "gated" else 4
        kept = together(1, partial(lacks, folder, connector, slots))
        assert kept == ["kept"], kept
        for zero in zeros:
            found[f"{connector}, ZeRO-{zero}"] = together(2, partial(lacks, folder, connector, slots, zero=zero))
    return found


def lacks(folder: Path, connector: str, slots: int, *, zero: int = 0) -> Any:
    model = seeing(connector)
    trained(model, folder / f"{mesh.world()}-{zero}", batches=Lacking(slots), **spread(zero))
    if not mesh.active():
        torch.save(weights(model), folder / "alone.pt")
        return "kept"
    return apart(weights(model), torch.load(folder / "alone.pt", weights_only=True), weights(seeing(connector)))


CASES: dict[str, Callable[[Path], Any]] = {
    "equal": equal,
    "resumed": resumed,
    "faults": faults,
    "begun": begun,
    "skipped": skipped,
    "guarded": guarded,
    "shown": shown,
    "unlike": unlike,
    "lacking": lacking,
}


def main(root: Path, names: list[str]) -> dict[str, Any]:
    return {name: CASES[name](root / name) for name in names or CASES}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2:])))
