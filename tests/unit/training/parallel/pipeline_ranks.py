"""What ``test_pipeline.py`` starts: ``python pipeline_ranks.py FOLDER CASE ...`` trains in stages, prints JSON."""

from __future__ import annotations

import hashlib
import json
import sys
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
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor
from transformers import GPT2Config, GPT2LMHeadModel

from plait.core import dtensors, mesh
from plait.core.errors import DataError
from plait.core.events import Event
from plait.core.files import read_json
from plait.core.tensors import Batch, Patches
from plait.models.connectors.projection import Mlp
from plait.models.multimodal import MultimodalLM
from plait.objectives.language import NextToken
from plait.training.parallel.order import Span, idle_share
from plait.training.parallel.updates import RowPieces
from plait.training.schedule import Constant
from plait.training.settings import Hooks, Rates, Stopping
from plait.training.trainer import Average, Parallel

WHOLE = Way(name="all learns", whole=True)
TRIED = {
    "pipeline 2, ZeRO-1": ((4, 2),),
    "pipeline 2, GPipe": ((2, 2),),
    "pipeline 4, all learns": ((4, 3),),
    "pipeline 2, float32 SGD": ((2, 2),),
    "tensor 2, pipeline 2": ((4, 2),),
    "tensor 2, pipeline 2, GPipe, clipped, all recomputed": ((4, 2),),
}


def staged(stages: int, **more: Any) -> dict[str, Any]:
    return {"parallel": Parallel.model_validate({"pipeline": stages, **more})}


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


# --- what is cut otherwise ------------------------------------------------------------------------------------------


def untied() -> MultimodalLM:
    """A head of its own."""
    model = WHOLE.model()
    assert isinstance(model, MultimodalLM)
    draw = torch.Generator().manual_seed(5)
    head = nn.Linear(32, exactness.WORDS, bias=False, dtype=torch.float64)
    head.weight.data = torch.randn(head.weight.shape, generator=draw, dtype=torch.float64) / 6
    model.decoder.lm_head = head
    return model


def only(*beginnings: str) -> MultimodalLM:
    """Of all weights those learn whose names begin so."""
    model = WHOLE.model()
    assert isinstance(model, MultimodalLM)
    for name, weight in model.named_parameters():
        weight.requires_grad_(requires_grad=name.startswith(beginnings))
    return model


def gpt2() -> MultimodalLM:
    """A decoder of another family, with learned positions; all of it learns."""
    torch.manual_seed(0)
    sizes = {"vocab_size": exactness.WORDS, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
    decoder = GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    parts = {"image": Mlp(exactness.WIDTH, 16, 32)}
    return MultimodalLM({}, parts, decoder, placeholder=exactness.PLACE).double().train()


CUTS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], dict[str, Any]]] = {
    "a head of its own": (untied, {}, {}),
    "a head of its own, divided, clipped": (untied, {"tensor": 2}, {"clip_norm": 1e-2}),
    "GPT-2": (gpt2, {}, {}),
    "the connector learns": (partial(only, "connectors"), {}, {}),
    "the connector learns, averaged": (partial(only, "connectors"), {}, {"average": Average(decay=0.5)}),
    "the last block learns": (partial(only, "decoder.model.layers.2"), {}, {}),
    "the table learns, clipped": (partial(only, "decoder.model.embed_tokens"), {}, {"clip_norm": 1e-2}),
    "rates of parts, blocks as given": (
        WHOLE.model,
        {"pipeline_blocks": (2, 1)},
        {"rates": Rates(lr=1e-3, parts={"connectors": 3e-3}, no_decay=("decoder.model.norm",), layer_decay=0.7)},
    ),
}


def cuts(root: Path) -> dict[str, Any]:
    """How far two stages end from one process; and whether the copies of a tied table stay equal."""
    found: dict[str, Any] = {}
    for name, (model, parallel, settings) in CUTS.items():
        folder = root / name
        kept = together(1, partial(ends, folder, model, **settings))
        world = 2 * parallel.get("tensor", 1)
        said = together(world, partial(ends, folder, model, **settings, **staged(2, **parallel)))
        found[name] = said if kept == ["kept"] else kept
    return found


class Scaled(Mlp):
    """Has a buffer beside weights of its own, as a connector to words."""

    def __init__(self) -> None:
        super().__init__(exactness.WIDTH, 16, 32)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("words", torch.ones(3))

    def forward(self, media: Patches) -> Patches:
        out = super().forward(media)
        return replace(out, values=out.values * self.scale)


def buffered() -> MultimodalLM:
    model = WHOLE.model()
    assert isinstance(model, MultimodalLM)
    torch.manual_seed(0)
    model.connectors["image"] = Scaled().double()
    return model


def buffers(root: Path) -> dict[str, Any]:
    """A run with a buffer on one stage goes on: its steps."""

    def work(steps: int) -> str:
        how = staged(2)
        trained(
            buffered(),
            root / "buffers",
            batches=source(pieces=2, parallel=how["parallel"]),
            steps=steps,
            save_every=1,
            **how,
        )
        return "done"

    return {"said": [together(2, partial(work, steps)) for steps in (1, 2)]}


def ends(folder: Path, model: Callable[[], nn.Module], **settings: Any) -> Any:
    built = model()
    several = mesh.active()
    batches = source(pieces=2, parallel=settings.get("parallel"))
    trained(built, folder / str(mesh.world()), batches=batches, **settings)
    if not several:
        torch.save(weights(built), folder / "alone.pt")
        return "kept"
    return apart(weights(built), torch.load(folder / "alone.pt", weights_only=True), weights(model()))


# --- the life of a run ----------------------------------------------------------------------------------------------


def resumed(root: Path) -> dict[str, Any]:
    """A run goes on in another layout after every step: from where, and how far it ends from one that ran through."""
    ways: tuple[tuple[str, int, dict[str, Any]], ...] = (
        ("one", 1, {}),
        ("tensor 2 x pipeline 2", 4, staged(2, tensor=2)),
        ("one again", 1, {}),
        ("ZeRO-1 in data 2 x pipeline 2", 4, staged(2, zero=1)),
        ("pipeline 3", 3, staged(3)),
    )
    common: dict[str, Any] = {"average": Average(decay=0.5), "save_every": 1, "schedule": Constant()}

    def through() -> str:
        torch.save(weights(trained(WHOLE.model(), root / "through", **common)), root / "through.pt")
        return "kept"

    def gone_on(steps: int, how: Mapping[str, Any]) -> Any:
        said: list[Event] = []
        batches = source(pieces=2 if mesh.active() else 1, parallel=how.get("parallel"))
        model = trained(WHOLE.model(), root / "run", batches=batches, said=said, steps=steps, **common, **how)
        resumed = [event.text.split(":")[0] for event in said if event.text.startswith("resumed")]
        if steps < STEPS:
            return resumed
        return resumed, apart(
            weights(model), torch.load(root / "through.pt", weights_only=True), weights(WHOLE.model())
        )

    found: dict[str, Any] = {"through": together(1, through)}
    for steps, (name, world, how) in enumerate(ways, start=1):
        found[name] = together(world, partial(gone_on, steps, how))
    return found


class NotFinite(NextToken):
    """Its loss is not finite for one micro-batch of the third step, in one share of the data."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def __call__(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        sums = super().__call__(model, batch)
        self.passes += 1
        bad = self.passes == 5 and mesh.rank() == mesh.world() - 1
        return {name: value * float("nan") if bad else value for name, value in sums.items()}


def skipped(root: Path) -> dict[str, Any]:
    """A loss of one last stage is not finite: all leave the update out, and name the samples."""

    def work() -> Any:
        said: list[Event] = []
        how = staged(2)
        batches = source(pieces=2, parallel=how["parallel"])
        model = trained(WHOLE.model(), root / "skipped", batches=batches, objective=NotFinite(), said=said, **how)
        micro = list(source(pieces=2, parallel=how["parallel"]).step_batches(2)[0].sample_ids)
        return [digest(weights(model)), micro, [event.text for event in said if event.kind == "warning"]]

    return {"said": together(4, work)}


def shown(root: Path) -> dict[str, Any]:
    """What the caller's hooks see: the whole model, in process 0 alone."""
    average = {"average": Average(decay=0.5)}
    return {
        "plain": together(2, partial(looking, root / "plain", **staged(2))),
        "average, divided": together(4, partial(looking, root / "average", **staged(2, tensor=2), **average)),
    }


def looking(folder: Path, **settings: Any) -> Any:
    model = WHOLE.model()
    seen: list[dict[str, Tensor]] = []

    def look(*_: Any) -> float:
        seen.append({name: weight.detach().clone() for name, weight in model.named_parameters()})
        return -float(len(seen))

    batches = source(parallel=settings["parallel"])
    hooks = Hooks(evaluate=look, on_step=look, save_model=look)
    stopping = Stopping(every=2)
    trained(model, folder, batches=batches, hooks=hooks, save_every=2, stopping=stopping, **settings)
    last = {name: weight.detach() for name, weight in model.named_parameters()}
    return {
        "seen": len(seen),
        "whole": all(weight.numel() for one in seen for weight in one.values()),
        "last": [all(torch.equal(one[name], last[name]) for name in last) for one in seen[-1:]],
        "left": digest(last),
    }


def digest(tensors: Mapping[str, Tensor]) -> str:
    return hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in tensors.values())).hexdigest()[:12]


class Failing:
    """The conversations, whose source goes wrong in one process at one step."""

    def __init__(self, fault: Callable[[], Any], parallel: Parallel) -> None:
        self.source, self.fault = source(parallel=parallel), fault

    def step_batches(self, step: int) -> Any:
        if step == 2 and mesh.rank() == 1:
            self.fault()
        return self.source.step_batches(step)


def faults(root: Path) -> dict[str, Any]:
    """What each process says when one of two meets something."""

    def refuse() -> None:
        raise DataError("the picture is cut off", place="sample c3", remedy="take it out")

    def work() -> str:
        how = staged(2)
        trained(WHOLE.model(), root / "faults", batches=Failing(refuse, how["parallel"]), save_every=1, **how)
        return "done"

    said = together(2, work)
    saved = sorted(path.name for path in (root / "faults" / "checkpoints").iterdir() if path.name.isdigit())
    return {"said": said, "saved": saved}


class Twice(NextToken):
    """Runs the model twice for a micro-batch."""

    def __call__(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        super().__call__(model, batch)
        return super().__call__(model, batch)


class Weighted(NextToken, nn.Module):
    """Has a weight."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.weight = nn.Parameter(torch.ones(()))


def refused(root: Path) -> dict[str, Any]:
    """What does not go with stages."""

    def work(name: str, model: Callable[[], nn.Module], how: Mapping[str, Any], objective: Any) -> str:
        trained(model(), root / name, batches=source(parallel=how["parallel"]), objective=objective(), **how)
        return "trained"

    cases: dict[str, tuple[Callable[[], nn.Module], Mapping[str, Any], Any]] = {
        "too many": (WHOLE.model, staged(4), NextToken),
        "odd": (WHOLE.model, staged(3), NextToken),
        "blocks": (WHOLE.model, staged(2, pipeline_blocks=(2, 2)), NextToken),
        "weights": (WHOLE.model, staged(2), Weighted),
        "twice": (WHOLE.model, staged(2), Twice),
        "pairs": (Way(name="pairs", loss="nce").model, staged(2), NextToken),
        "no plan": (gpt2, staged(2, tensor=2), NextToken),
    }
    four = {"too many", "no plan"}
    return {name: together(4 if name in four else 2, partial(work, name, *case)) for name, case in cases.items()}


def timeline(root: Path) -> dict[str, Any]:
    """The measured step of a run, as its folder has it: two stages, two micro-batches."""

    def work() -> Any:
        said: list[Event] = []
        how = staged(2)
        batches = source(pieces=3, parallel=how["parallel"])
        trained(WHOLE.model(), root / "timeline", batches=batches, said=said, **how)
        return [event.text for event in said if "pipeline" in event.text]

    said = together(2, work)
    record = read_json(root / "timeline" / "timeline.json")
    spans = [Span(**span) for span in record.pop("spans")]
    return {"said": said, "record": record, "spans": len(spans), "idle": idle_share(spans)}


def rows(root: Path) -> dict[str, Any]:
    """AdamW on rows of weights and on the whole ones: whether they end at the same bits, and numbers of its state."""
    cuts: dict[str, tuple[tuple[int, ...], Placement | None]] = {
        "whole": ((5, 3), None),
        "short": ((1, 2), None),
        "scalar": ((), None),
        "channels last": ((2, 3, 2, 2), None),
        "by outputs": ((8, 3), Shard(0)),
        "by inputs": ((3, 8), Shard(1)),
        "uneven words": ((6, 2), Shard(0)),
        "bias": ((3,), Replicate()),
    }

    def work() -> dict[str, Any]:
        draw = torch.Generator().manual_seed(0)
        devices = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))

        def drawn(name: str) -> Tensor:
            found = torch.randn(cuts[name][0], generator=draw, dtype=torch.float64)
            return found.to(memory_format=torch.channels_last) if found.ndim == 4 else found

        def spread(tensor: Tensor, cut: Placement | None) -> Tensor:
            return tensor.clone() if cut is None else distribute_tensor(tensor, devices["tensor"], [cut])

        one = {name: nn.Parameter(drawn(name)) for name in cuts}
        own = {name: nn.Parameter(spread(weight.detach(), cuts[name][1])) for name, weight in one.items()}
        pieces = RowPieces(own, devices)
        ours, theirs = torch.optim.AdamW(pieces.moved.values(), lr=0.1), torch.optim.AdamW(one.values(), lr=0.1)
        for step in range(3):
            for name, (_, cut) in cuts.items():
                grad = None if step == 1 and name == "short" else drawn(name)
                one[name].grad, own[name].grad = grad, None if grad is None else spread(grad, cut)
            pieces.take_gradients()
            ours.step()
            pieces.exchange(bucket=64)
            theirs.step()
        found: dict[str, Any] = {}
        for name, weight in one.items():
            mine, whole = (opt.state[w]["exp_avg"] for opt, w in ((ours, pieces.moved[name]), (theirs, weight)))
            same = [torch.equal(dtensors.whole(own[name].detach()), weight), torch.equal(dtensors.whole(mine), whole)]
            same += [torch.equal(dtensors.local(dtensors.spread_like(whole, mine)), dtensors.local(mine))]  # as read
            found[name] = [all(same), dtensors.local(mine).numel(), whole.numel()]
        return found

    return {"said": together(4, work)}


CASES: dict[str, Callable[[Path], Any]] = {
    "equal": equal,
    "cuts": cuts,
    "buffers": buffers,
    "resumed": resumed,
    "skipped": skipped,
    "shown": shown,
    "faults": faults,
    "refused": refused,
    "timeline": timeline,
    "rows": rows,
}


def main(root: Path, names: list[str]) -> dict[str, Any]:
    assert STEPS == 5
    found: dict[str, Any] = {}
    for name in names or CASES:
        (root / name).mkdir(parents=True)
        found[name] = CASES[name](root / name)
    return found


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2:])))
