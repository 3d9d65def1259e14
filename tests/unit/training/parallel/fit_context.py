"""What ``test_context.py`` starts: ``python fit_context.py FOLDER`` trains with shared rows, prints JSON.

torch is imported once; every rank is forked from there, before any torch operation.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarks import exactness
from benchmarks.context import kept, sharing_rows
from benchmarks.layouts import Way, apart, compared, tower, trained, weights
from benchmarks.sides.several import together
from torch import Tensor, nn

from plait.core import mesh
from plait.core.errors import ConfigError
from plait.core.tensors import IGNORE, Batch, Patches
from plait.models.connectors.projection import Mlp
from plait.models.crossattend import GatedCrossAttention
from plait.models.multimodal import MultimodalLM
from plait.models.transformer import TransformerSizes
from plait.objectives.language import NextToken
from plait.training.settings import Hooks, Stopping
from plait.training.trainer import Parallel

TRIED = {
    "context 2, ring": ((2, 2),),
    "context 2, ring, float32 SGD": ((2, 1),),
    "context 2, ulysses, some recomputed": ((2, 1),),
    "context 2, ring, ZeRO-3, all learns": ((4, 1),),
    "context 2, ring, tensor 2, all learns": ((4, 1),),
}
"""Of the ways of the benchmark, and the numbers of processes and micro-batches; all of them take five minutes."""

LENGTH = 41


def equal(root: Path) -> dict[str, Any]:
    """How far 2 and 4 processes end from one."""
    known = {way.name: way for way in sharing_rows()}
    return {
        f"{name}, {known[name].dtype}, {world} processes, {pieces} micro-batches": compared(
            known[name], root / f"{name} {world} {pieces}", world=world, pieces=pieces
        )
        for name, cases in TRIED.items()
        for world, pieces in cases
    }


class Lopsided:
    """Rows of which some process's part has no trained token, nothing but padding, or half of a picture.

    Each row is a micro-batch; the fourth one is empty.
    """

    def __init__(self, parallel: Parallel) -> None:
        self.share, self.shares = parallel.grid(mesh.rank(), mesh.world()).share

    def step_batches(self, step: int) -> list[Batch]:
        """The same in every step."""
        rows = [([30, 11], range(1, 4)), ([5], range(1, 5)), ([20, 1, 20], range(23, 41)), ([], ())]
        return [self._row(number, *row) for number, row in enumerate(rows)][self.share :: self.shares]

    def _row(self, number: int, documents: list[int], trained: Any) -> Batch:
        draw = torch.Generator().manual_seed(number)
        ids = torch.randint(exactness.WORDS, (1, LENGTH), generator=draw)
        picture = number == 2
        if picture:
            ids[0, 22:26] = exactness.PLACE
        labels = torch.full_like(ids, IGNORE)
        at = [place for place in trained if not 22 <= place < 26]
        labels[0, at] = ids[0, at]
        segments = [segment for segment, size in enumerate(documents, 1) for _ in range(size)]
        found = Patches(
            values=torch.randn(4, exactness.WIDTH, generator=draw, dtype=torch.float64), grid=torch.tensor([[1, 2, 2]])
        )
        return Batch(
            token_ids=ids,
            labels=labels,
            segment_ids=torch.tensor([segments + [0] * (LENGTH - len(segments))]),
            media={"image": found} if picture else {},
            item_row={"image": torch.tensor([0])} if picture else {},
            sample_ids=tuple(f"r{number}.{document}" for document in range(len(documents))),
            encoded=True,
        )


def lopsided(root: Path) -> dict[str, Any]:
    """How far processes end from one, where some of them have nothing to learn from."""
    kept = together(1, partial(leans, root, {}))
    assert kept == ["kept"], kept
    found: dict[str, Any] = {}
    for exchange, zero, degree in (("ring", 3, 2), ("ulysses", 0, 4)):
        setting = {"zero": zero, "context": degree, "context_attention": exchange}
        found[f"{exchange} {degree} of 4, ZeRO-{zero}"] = together(4, partial(leans, root, setting))
    return found


def leans(root: Path, setting: dict[str, Any]) -> Any:
    parallel = Parallel.model_validate(setting)
    model = Way(name="", whole=True).model()
    name = "-".join(map(str, setting.values()))
    trained(model, root / f"{mesh.world()}-{name}", batches=Lopsided(parallel), parallel=parallel)
    if not mesh.active():
        torch.save(weights(model), root / "alone.pt")
        return "kept"
    return apart(
        weights(model), torch.load(root / "alone.pt", weights_only=True), weights(Way(name="", whole=True).model())
    )


def connector(root: Path) -> dict[str, Any]:
    """How far two processes end from one where the connector alone learns, and most rows have no picture."""

    def work(setting: dict[str, Any]) -> Any:
        def built() -> nn.Module:
            model = Way(name="").model()
            assert isinstance(model, MultimodalLM)
            model.decoder.requires_grad_(requires_grad=False)
            return model

        parallel = Parallel.model_validate(setting)
        model = trained(built(), root / f"connector {mesh.world()}", batches=Lopsided(parallel), parallel=parallel)
        if not mesh.active():
            torch.save(weights(model), root / "connector.pt")
            return "kept"
        return apart(weights(model), torch.load(root / "connector.pt", weights_only=True), weights(built()))

    assert together(1, partial(work, {})) == ["kept"]
    return {"apart": together(2, partial(work, {"context": 2}))}


def shown(root: Path) -> dict[str, Any]:
    """What hooks compute in the first process alone while rows are shared; what is left on the model."""
    settings: list[dict[str, Any]] = [{}, {"context": 2}, {"context": 2, "context_attention": "ulysses", "zero": 3}]
    return {
        str(setting): together(2 if setting else 1, partial(looking, root / str(number), setting))
        for number, setting in enumerate(settings)
    }


def looking(folder: Path, setting: dict[str, Any]) -> Any:
    parallel = Parallel.model_validate(setting)
    model = Way(name="", whole=True).model()
    assert isinstance(model, MultimodalLM)
    batch = Lopsided(Parallel()).step_batches(0)[0]
    seen: list[float] = []

    def look(*_: Any) -> float:
        with torch.no_grad():
            seen.append(float(model(batch).hidden[batch.segment_ids != 0].norm()))
        return -float(len(seen))

    how = model.decoder.config._attn_implementation
    trained(
        model,
        folder,
        batches=Lopsided(parallel),
        hooks=Hooks(evaluate=look, on_step=look),
        stopping=Stopping(every=2),
        parallel=parallel,
    )
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    return {"seen": seen, "hooks": len(hooks), "attention": model.decoder.config._attn_implementation == how}


def memory(root: Path) -> dict[str, Any]:
    """Bytes kept for backward, and sent, at two numbers of processes."""
    assert root.is_dir()
    ring = {"context": 2, "context_attention": "ring"}
    settings = {"fused": {}, "ring": ring, "ulysses": ring | {"context_attention": "ulysses"}}
    return {
        name: together(setting.get("context", 1), partial(kept, 600, setting, fused=name == "fused"))
        for name, setting in settings.items()
    }


class Other(NextToken):
    """Of which nobody knows whether it adds up over tokens."""


def gated() -> nn.Module:
    decoder = exactness.model(by_document=False).decoder
    reads = [GatedCrossAttention(TransformerSizes(d=32, depth=1, heads=4, d_source=16)), None, None]
    parts = {"image": Mlp(exactness.WIDTH, 8, 16)}
    return MultimodalLM({}, parts, decoder, placeholder=exactness.PLACE, reading=reads, inside="image").double()


def refused(root: Path) -> dict[str, Any]:
    """What is said of what cannot share rows, in each of two processes."""

    def said(model: nn.Module, objective: Any, **more: Any) -> str:
        parallel = Parallel.model_validate({"context": 2} | more)
        before = {name: weight.clone() for name, weight in model.named_parameters()}
        try:
            trained(model, root / "x", batches=Lopsided(parallel), objective=objective, parallel=parallel)
        except ConfigError as error:
            same: list[Tensor] = [weight for name, weight in model.named_parameters() if weight.equal(before[name])]
            assert len(same) == len(before), "its weights are as they were"
            return error.cause
        return "trained"

    def work() -> dict[str, str]:
        return {
            "objective": said(Way(name="").model(), Other()),
            "model": said(tower(), NextToken()),
            "gated": said(gated(), NextToken()),
            "heads": said(three_heads(), NextToken(), context_attention="ulysses", zero=3),
        }

    return {"said": together(2, work)}


def three_heads() -> nn.Module:
    model = exactness.model(by_document=True)
    model.decoder.config.num_attention_heads = 3
    return model


CASES = {
    "equal": equal,
    "lopsided": lopsided,
    "connector": connector,
    "shown": shown,
    "memory": memory,
    "refused": refused,
}


if __name__ == "__main__":
    root = Path(sys.argv[1])
    for name in CASES:
        (root / name).mkdir()
    print(json.dumps({name: CASES[name](root / name) for name in CASES}))
