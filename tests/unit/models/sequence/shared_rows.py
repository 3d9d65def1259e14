"""What ``test_shared_rows.py`` starts: ``python shared_rows.py`` shares rows among 2 and 4 processes, prints JSON.

torch is imported once; every rank is forked from there, before any torch operation.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import torch
import torch.distributed as dist
from benchmarks.sides.several import together
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor

from plait.core import mesh
from plait.models.attention import attend
from plait.models.sequence.placement import Order, Placement
from plait.models.sequence.ring import View, ring_attention, ring_bytes
from plait.models.sequence.ulysses import ulysses, ulysses_bytes

WIDTH, VALUE_WIDTH, SCALING = 3, 2, 0.7
EXAMPLES = 60


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    """Packed rows of any length, with padding, and how they are shared."""
    length = draw(st.integers(1, 23))
    rows: list[list[int]] = []
    for _ in range(draw(st.integers(1, 2))):
        ids: list[int] = []
        for segment, size in enumerate(draw(st.lists(st.integers(1, 12), max_size=4)), 1):
            ids += [segment] * size
        rows.append((ids + [0] * length)[:length])
    heads, groups = draw(st.sampled_from([(4, 4), (4, 2), (4, 1), (8, 2), (12, 3)]))
    return {
        "segments": rows,
        "heads": heads,
        "groups": groups,
        "order": draw(st.sampled_from(["contiguous", "zigzag", "striped"])),
        "window": draw(st.sampled_from([0, 0, 3])),
        "causal": draw(st.sampled_from([True, True, False])),
        "tile": draw(st.sampled_from([1, 3, 512])),
        "seed": draw(st.integers(0, 99)),
    }


def shared() -> dict[str, Any]:
    """Largest distances of values and gradients from those of whole rows, over many cases, the same in each process."""
    found: dict[str, Any] = {"cases": [], "ring": [], "ulysses": []}

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases())
    def run(case: dict[str, Any]) -> None:  # it never fails in one process alone
        found["cases"].append(case)
        for name in ("ring", "ulysses"):
            found[name].append(apart(name, case))

    run()
    return found


def apart(name: str, case: dict[str, Any]) -> float:
    """How far a process's part of the output and of the three gradients is from that of whole rows."""
    segments = torch.tensor(case["segments"])
    rows, length = segments.shape
    placement = Placement.of(length, case["order"], world=mesh.world(), rank=mesh.rank())
    parts = drawn(rows, length, case)
    mask = seen(segments, causal=case["causal"], window=case["window"])
    whole = [part.clone().requires_grad_() for part in parts[:3]]
    expected = attend(*whole, mask=mask[:, None], scale=SCALING, backend="reference").values
    expected.backward(parts[3])
    mine = [placement.cut(part, 2).requires_grad_() for part in parts[:3]]
    view = View(
        segments, placement, group=dist.group.WORLD, causal=case["causal"], window=case["window"], tile=case["tile"]
    )
    if name == "ring":
        out = ring_attention(*mine, view=view, scaling=SCALING)
    else:
        at = placement.ranks
        order = torch.cat(at)
        ids = placement.pad(segments, 1)[:, order]
        masks = seen(ids, causal=case["causal"], window=case["window"], at=order)[:, None]

        def inner(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(q, k, v, mask=masks, scale=SCALING, backend="reference").values

        out = ulysses(*mine, attention=inner, group=dist.group.WORLD)
    out.backward(placement.cut(parts[3], 2))
    pairs = [(out, expected), *((a.grad, b.grad) for a, b in zip(mine, whole, strict=True))]
    return max(float((a - placement.cut(b, 2)).abs().max()) for a, b in pairs if a is not None and b is not None)


def drawn(rows: int, length: int, case: dict[str, Any]) -> list[Tensor]:
    """Queries, keys, values, and a slope of the result, the same in all processes."""
    draw = torch.Generator().manual_seed(case["seed"])
    sizes = ((case["heads"], WIDTH), (case["groups"], WIDTH), (case["groups"], VALUE_WIDTH))
    sizes = (*sizes, (case["heads"], VALUE_WIDTH))
    return [torch.randn(rows, h, length, w, dtype=torch.float64, generator=draw) for h, w in sizes]


def seen(segments: Tensor, *, causal: bool, window: int, at: Tensor | None = None) -> Tensor:
    """By the definition: who sees whom."""
    at = torch.arange(segments.shape[1]) if at is None else at
    gap = at[:, None] - at
    found = (segments[:, :, None] == segments[:, None]) & (segments != 0)[:, :, None]
    if causal:
        found = found & (gap >= 0)
    return found & (gap < window) if window else found


def sent() -> dict[str, Any]:
    """Bytes that a process gives to others in one forward and backward pass, counted and by the closed form."""
    counted = [0]
    plain, plain_all = dist.batch_isend_irecv, dist.all_to_all_single

    def count(operations: list[dist.P2POp]) -> Any:
        counted[0] += sum(one.tensor.nbytes for one in operations if one.op is dist.isend)
        return plain(operations)

    def count_all(out: Tensor, given: Tensor, **options: Any) -> Any:
        counted[0] += given.nbytes * (mesh.world() - 1) // mesh.world()
        return plain_all(out, given, **options)

    dist.batch_isend_irecv, dist.all_to_all_single = count, count_all
    found: dict[str, Any] = {}
    for dtype in (torch.float64, torch.bfloat16):
        for heads, groups in ((8, 2), (4, 4)):
            here, size = (2, 6), dtype.itemsize
            case = {"heads": heads, "groups": groups, "seed": 0}
            parts = [part.to(dtype).requires_grad_() for part in drawn(*here, case)]
            placement = Placement.of(here[1] * mesh.world(), "zigzag", world=mesh.world(), rank=mesh.rank())
            view = View(torch.ones(2, placement.length, dtype=torch.long), placement, group=dist.group.WORLD)
            common = {"groups": groups, "width": WIDTH, "value_width": VALUE_WIDTH, "world": mesh.world()}
            ways: dict[str, tuple[Callable[[], Tensor], int]] = {
                "ring": (
                    lambda parts=parts, view=view: ring_attention(*parts[:3], view=view, scaling=SCALING),
                    ring_bytes(here, size=size, wide=max(size, 4), **common),
                ),
                "ulysses": (
                    lambda parts=parts: ulysses(
                        *parts[:3], attention=lambda q, k, v: attend(q, k, v).values, group=dist.group.WORLD
                    ),
                    ulysses_bytes(here, size=size, heads=heads, **common),
                ),
            }
            for name, (run, formula) in ways.items():
                counted[0] = 0
                run().backward(parts[3].detach())
                found[f"{name}, {heads} heads, {groups} of keys, {dtype}"] = [counted[0], formula]
    return found


def work() -> dict[str, Any]:
    return {"shared": shared(), "sent": sent(), "scores": balance()}


def balance() -> dict[str, int]:
    """Scores that this process computes under a causal mask, by how positions are placed."""
    orders: list[Order] = ["contiguous", "zigzag", "striped"]
    ones = torch.ones(1, 64, dtype=torch.long)
    return {
        order: View(
            ones,
            Placement.of(64, order, world=mesh.world(), rank=mesh.rank()),
            group=None,
            tile=1,
        ).scores
        for order in orders
    }


if __name__ == "__main__":
    print(json.dumps({str(world): together(world, work) for world in (2, 4)}))
