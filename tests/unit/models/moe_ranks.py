"""What several processes, each with a part of the experts, find of values, gradients and bytes. Prints it as JSON."""

from __future__ import annotations

import json
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from benchmarks.sides.several import together
from torch import Tensor, nn

from plait.core import collectives, mesh
from plait.models.moe import MixtureOfExperts, Routed
from plait.models.moe_parallel import Dispatch
from plait.models.transformer import TransformerSizes

SIZES = TransformerSizes(d=8, depth=1, heads=2, d_ff=12, activation="silu", gated=True, bias=True)
TOKENS = 23


def layer(experts: int, *, top_k: int, capacity: float | None, lonely: bool) -> MixtureOfExperts:
    """The same weights each time; ``lonely``: nobody chooses the last expert."""
    torch.manual_seed(0)
    made = MixtureOfExperts(SIZES, experts=experts, top_k=top_k, capacity=capacity).double()
    if lonely:  # tokens are positive
        made.gate.weight.data[-1] = -5.0
    return made


def shares(world: int, *, empty: bool) -> list[slice]:
    """Unequal parts of the rows; ``empty``: the first process has none."""
    bounds = [0, *[3 + round((TOKENS - 3) * part / (world - 1)) for part in range(world)]]
    if empty:
        bounds[1] = 0
    return [slice(a, b) for a, b in pairwise(bounds)]


def apart(found: Tensor, wanted: Tensor) -> float:
    if not wanted.any():
        return float(found.abs().sum())
    return float((found - wanted).detach().abs().max() / wanted.abs().max())


def compare(
    experts: int, *, top_k: int, capacity: float | None = None, lonely: bool = False, empty: bool = False
) -> Any:
    """Largest relative distances from one process, choices counted, bytes sent and what the formula says."""
    world, rank = mesh.world(), mesh.rank()
    group = dist.group.WORLD
    assert group is not None
    torch.manual_seed(1)
    rows = torch.rand(TOKENS, 2, 8, dtype=torch.float64)
    pull = torch.randn(TOKENS, 2, 8, dtype=torch.float64)
    alone = layer(experts, top_k=top_k, capacity=capacity, lonely=lonely)
    whole = rows.clone().requires_grad_()
    once: list[Routed] = []
    wanted = alone(whole, routed=once)
    (wanted * pull).sum().backward()

    mine = shares(world, empty=empty)[rank]
    spread = layer(experts, top_k=top_k, capacity=capacity, lonely=lonely)
    each = experts // world
    part = slice(rank * each, (rank + 1) * each)
    for name, weight in list(spread.experts.named_parameters()):
        setattr(spread.experts, name, nn.Parameter(weight.detach()[part].clone()))
    dispatch = Dispatch(group, experts=experts)
    spread.through = dispatch
    here = rows[mine].clone().requires_grad_()
    routed: list[Routed] = []
    found = spread(here, routed=routed)
    forward = dispatch.sent
    (found * pull[mine]).sum().backward()
    sent = [forward, dispatch.sent - forward]

    got = {"values": apart(found, wanted[mine]), "inputs": apart(here.grad, whole.grad[mine])}
    for name, weight in spread.experts.named_parameters():
        assert weight.grad is not None, name
        got[name] = apart(weight.grad, alone.experts.get_parameter(name).grad[part])
    got["gate"] = apart(collectives.all_reduce_sum(spread.gate.weight.grad.clone()), alone.gate.weight.grad)
    sums = [collectives.all_reduce_sum(value.detach().clone()) for value in routed[0]]
    conserved = all(torch.allclose(a, b) for a, b in zip(sums, once[0], strict=True))
    # To others: 8 numbers of each kept choice there, and of what came from them back; both again backward. And counts.
    spread.choices = []
    with torch.no_grad():
        spread(here)
    choices = spread.choices[0]
    owners = (choices.chosen // each)[choices.kept]
    away = torch.bincount(owners, minlength=world)
    away[rank] = 0
    table = torch.stack(collectives.all_gather(away[None])).view(world, world)
    rows_sent = int(table[rank].sum() + table[:, rank].sum())
    counts = 8 * each * (world - 1)
    return {
        "apart": max(got.values()),
        "conserved": conserved,
        "dropped": float(sums[3]),
        "idle": int((sums[0] == 0).sum()),
        "tokens": len(here),
        "sent": sent,
        "formula": [rows_sent * 8 * 8 + counts, rows_sent * 8 * 8],
    }


def frozen() -> Any:
    """Nothing before the layer learns in one process, something does in the other: both still go backward."""
    group = dist.group.WORLD
    assert group is not None
    spread = layer(4, top_k=2, capacity=None, lonely=False).requires_grad_(requires_grad=False)
    for name, weight in list(spread.experts.named_parameters()):
        part = weight.detach()[2 * mesh.rank() : 2 * mesh.rank() + 2].clone()
        setattr(spread.experts, name, nn.Parameter(part, requires_grad=False))
    spread.through = Dispatch(group, experts=4)
    torch.manual_seed(1)
    x = torch.rand(3, 2, 8, dtype=torch.float64).requires_grad_(mesh.rank() == 0)
    spread(x).sum().backward()
    alone = layer(4, top_k=2, capacity=None, lonely=False).requires_grad_(requires_grad=False)
    y = x.detach().clone().requires_grad_()
    alone(y).sum().backward()
    return apart(x.grad, y.grad) if x.grad is not None else 0.0


def main() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for world in (2, 4):
        ways: dict[str, dict[str, Any]] = {
            "one expert each": {"experts": world, "top_k": 2},
            "more experts": {"experts": 8, "top_k": 3},
            "no token here": {"experts": 8, "top_k": 2, "empty": True},
            "nobody's expert": {"experts": 8, "top_k": 2, "lonely": True},
            "capacity": {"experts": 8, "top_k": 2, "capacity": 0.5},
        }
        found |= {f"{name}, {world}": together(world, partial(compare, **way)) for name, way in ways.items()}
    return found | {"frozen": together(2, frozen)}


if __name__ == "__main__":
    print(json.dumps(main()))
