"""What ``test_sequence.py`` starts: ``python sequence_ranks.py FOLDER CASE ...`` works in several processes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarks.layouts import Way, apart, compared, source, trained, ways, weights
from benchmarks.sides.several import together
from tests.unit.training.parallel.tensor_ranks import FAMILIES, SIZES, built, whole
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from plait.adapters.lora import Lora, attach
from plait.core import collectives, mesh
from plait.core.events import Event
from plait.models.fused_head import token_logprobs
from plait.models.recompute import Recompute, recomputed
from plait.training.norm import clip
from plait.training.parallel.tensor import divide
from plait.training.schedule import Constant
from plait.training.trainer import Parallel

WHOLE = Way(name="all learns", whole=True, kv_heads=4)
TARGETS = {"none": ("q_proj", "o_proj", "down_proj"), "full": ("q_proj", "o_proj")}
"""Matrices that have adapters, where blocks are recomputed so."""
PIECES: dict[str, Any] = {"tensor": 2, "sequence": True}
BESIDE = [
    Way(name="ZeRO-3, all kept", zero=3, grid=PIECES, whole=True, kv_heads=4),
    Way(
        name="pipeline 2, some recomputed",
        grid=PIECES | {"pipeline": 2},
        whole=True,
        kv_heads=4,
        more={"recompute": "selective"},
    ),
]
"""Layouts beside those of the benchmark."""
TRIED = {
    "ZeRO-3, all kept": ((4, 2),),
    "pipeline 2, some recomputed": ((4, 2),),
    "tensor 2, sequence, one conversation a row": ((4, 2),),
    "tensor 2, sequence, SGD, clipped": ((2, 2),),
    "tensor 2, sequence, ZeRO-3, all recomputed": ((4, 2),),
    "tensor 2, sequence, pipeline 2, one conversation a row, all recomputed": ((4, 2),),
}


def loss_of(model: Any, length: int) -> Tensor:
    ids = torch.randint(0, 37, (2, length), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)  # of dropout
    hidden = model.base_model(ids, use_cache=False).last_hidden_state
    head = model.get_output_embeddings()
    return -token_logprobs(head, hidden[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), scores=74).sum()


def compare(family: str, length: int, *, lora: bool) -> list[float]:
    """Distance of loss, of the farthest gradient, and of the norm of all, from the undivided model's."""
    one = built(family, lora=lora)
    loss_of(one, length).backward()
    expected = {name: weight.grad for name, weight in one.named_parameters() if weight.grad is not None}
    model = built(family, lora=lora)
    ranks = init_device_mesh("cpu", (mesh.world(),), mesh_dim_names=("tensor",))
    partly = divide(model, ranks, sequence=True)
    loss = loss_of(model, length)
    loss.backward()
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    assert found.keys() == expected.keys()
    for name in found.keys() & partly:
        collectives.all_reduce_sum(getattr(found[name], "_local_tensor", found[name]))
    far = max(float((whole(found[n]) - g).norm() / g.norm().clamp(min=1e-9)) for n, g in expected.items())
    norm = float(torch.nn.utils.get_total_norm(expected.values()))
    return [abs(loss.item() - loss_of(one, length).item()), far, abs(clip(found, None).total - norm) / norm]


def families(_: Path) -> dict[str, Any]:
    """Every family, and rows of 9 positions, of 8, and of fewer than there are processes."""
    four = [(family, 9, False) for family in FAMILIES]
    four += [("Llama, tied, with biases", 9, True), ("Llama", 2, True), ("Qwen3, norms of heads", 5, True)]
    two = [("Llama, tied, with biases", 9, True), ("Llama", 8, False)]

    def work(cases: list[tuple[str, int, bool]]) -> dict[str, list[float]]:
        return {f"{family}, {length}, {lora}": compare(family, length, lora=lora) for family, length, lora in cases}

    return {"2": together(2, partial(work, two)), "4": together(4, partial(work, four))}


class Sent(TorchDispatchMode):
    """Numbers that this process sends, where messages go around rings."""

    def __init__(self, world: int) -> None:
        super().__init__()
        self.numbers = 0.0
        self.shares = {
            "all_reduce": 2 * (world - 1) / world,
            "allreduce": 2 * (world - 1) / world,
            "allgather": world - 1,
            "alltoall": (world - 1) / world,
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        share = next((share for kind, share in self.shares.items() if kind in name), None)
        if share is not None:
            tensor = args[1] if name.endswith("base_.default") else args[0]  # what is received comes first
            tensor = tensor if isinstance(tensor, Tensor) else tensor[0]
            self.numbers += share * tensor.numel()
        return func(*args, **(kwargs or {}))


def counted(how: Recompute, *, lora: bool, sequence: bool) -> list[float]:
    """Numbers that a process sends forward, backward, and to sum gradients of weights that all have whole."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    if lora:
        attach(model, Lora(rank=2, alpha=4.0, targets=TARGETS[how]))
        model.model.embed_tokens.register_forward_hook(lambda *said: said[-1].requires_grad_())  # as with media
    ranks = init_device_mesh("cpu", (mesh.world(),), mesh_dim_names=("tensor",))
    partly = divide(model, ranks, sequence=sequence)
    ids = torch.arange(16).view(2, 8)
    with recomputed(model, how):
        with Sent(mesh.world()) as forward:
            out = model.model(ids, use_cache=False).last_hidden_state.square().sum()
        with Sent(mesh.world()) as backward:
            out.backward()
    with Sent(mesh.world()) as after:
        for name, weight in model.named_parameters():
            if name in partly and weight.grad is not None:
                collectives.all_reduce_sum(weight.grad)
    return [forward.numbers, backward.numbers, after.numbers]


def sent(_: Path) -> dict[str, Any]:
    """Messages of adapters and of all weights, with activations kept and computed again."""

    def work(*whether: bool) -> dict[str, list[float]]:
        return {
            f"{how} {lora} {sequence}": counted(how, lora=lora, sequence=sequence)
            for how in ("none", "full")
            for lora in (False, True)
            for sequence in whether
        }

    return {"2": together(2, partial(work, False, True)), "4": together(4, partial(work, True))}


def equal(root: Path) -> dict[str, Any]:
    """How far several processes end from one."""
    known = {way.name: way for way in [*ways(), *BESIDE]}
    return {
        f"{name}, {world} processes": compared(known[name], root / f"{name} {world}", world=world, pieces=pieces)
        for name, cases in TRIED.items()
        for world, pieces in cases
    }


def scattered(_: Path) -> dict[str, Any]:
    """Both ways to sum and scatter, of numbers that are drawn; and what is gathered."""

    def work() -> list[bool]:
        drawn = [torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(rank)).double() for rank in range(3)]
        mine, rank = drawn[mesh.rank()], mesh.rank()
        expected = torch.stack(drawn).sum(0)[rank]
        theirs = torch.empty_like(expected)
        collectives._reduce_scatter(theirs, mine.flatten(0, 1))
        return [
            torch.equal(collectives.sum_scattered(mine), expected),
            bool((theirs - expected).abs().max() <= 1e-15),
            torch.equal(collectives.gather_equal(mine[0].T), torch.stack([one[0].T for one in drawn])),
        ]

    return {"same": together(3, work)}


def resumed(root: Path) -> dict[str, Any]:
    """A run goes on in another layout after every step: from where, and how far it ends from one that ran through."""
    two: dict[str, Any] = {"tensor": 2, "sequence": True}
    layouts: tuple[tuple[int, dict[str, Any]], ...] = (
        (4, two | {"zero": 1}),
        (1, {}),
        (4, two | {"pipeline": 2}),
        (4, two | {"zero": 2}),
        (2, {"tensor": 2}),
    )
    common: dict[str, Any] = {"save_every": 1, "schedule": Constant()}

    def through() -> str:
        torch.save(weights(trained(WHOLE.model(), root / "through", **common)), root / "through.pt")
        return "kept"

    def gone_on(steps: int, settings: dict[str, Any]) -> Any:
        said: list[Event] = []
        parallel = Parallel.model_validate(settings)
        batches = source(pieces=2 if mesh.active() else 1, parallel=parallel)
        how = {"parallel": parallel, **common}
        model = trained(WHOLE.model(), root / "run", batches=batches, said=said, steps=steps, **how)
        found = [event.text.split(":")[0] for event in said if event.text.startswith("resumed")]
        if steps < len(layouts):
            return found
        return found, apart(weights(model), torch.load(root / "through.pt", weights_only=True), weights(WHOLE.model()))

    kept = {"through": together(1, through)}
    return kept | {
        str(steps): together(world, partial(gone_on, steps, settings))
        for steps, (world, settings) in enumerate(layouts, start=1)
    }


CASES: dict[str, Callable[[Path], Any]] = {
    "families": families,
    "sent": sent,
    "scattered": scattered,
    "equal": equal,
    "resumed": resumed,
}


def main(root: Path, names: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in names or CASES:
        (root / name).mkdir(parents=True)
        found[name] = CASES[name](root / name)
    return found


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2:])))
