"""A small reader of two domains and gradients of a step, for tests; ``python domain_ranks.py`` takes them in several
processes, prints JSON.

torch is imported once; every rank is forked from there, before any torch operation.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from benchmarks.sides.several import together
from torch import Tensor, nn

from plait.core import mesh
from plait.core.tensors import IGNORE, Batch
from plait.objectives.domain import Adversarial, Aligned, coral, mmd
from plait.training.gradient import accumulate

D, CLASSES = 5, 3
KINDS = ("coral", "mmd", "dann")


class Reader(nn.Module):
    """Vectors in ``token_ids`` to features, and scores."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.tower = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D))
        self.classify = nn.Linear(D, CLASSES)
        self.to(torch.float64)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        found = self.tower(batch.token_ids.double() / 10)
        return found, self.classify(found)


def batch(labels: Sequence[int], *, seed: int = 0) -> Batch:
    token_ids = torch.randint(-20, 20, (len(labels), D), generator=torch.Generator().manual_seed(seed))
    return Batch(
        token_ids=token_ids,
        labels=nn.functional.pad(torch.tensor(labels)[:, None], (0, D - 1), value=IGNORE),
        segment_ids=torch.ones_like(token_ids),
        media={},
        item_row={},
        sample_ids=tuple(f"s{i}" for i in range(len(labels))),
    )


def pieces(whole: Batch, cuts: Sequence[int]) -> list[Batch]:
    found: list[Batch] = []
    for begin, end in zip([0, *cuts], [*cuts, len(whole.labels)], strict=True):
        part = slice(begin, end)
        found.append(
            Batch(
                token_ids=whole.token_ids[part],
                labels=whole.labels[part],
                segment_ids=whole.segment_ids[part],
                media={},
                item_row={},
                sample_ids=whole.sample_ids[part],
            )
        )
    return found


LABELS = [0, 1, 2, 1, 0, 2, 2, IGNORE, IGNORE, IGNORE, IGNORE, IGNORE, IGNORE]


def gradients(objective: Any, micro: Sequence[Batch], **weights: float) -> tuple[dict[str, Tensor], Any]:
    model = Reader()
    sums = accumulate(model, objective, micro, weights=weights)
    named = [*model.named_parameters(), *(objective.named_parameters() if isinstance(objective, nn.Module) else ())]
    found = {name: torch.zeros_like(w) if w.grad is None else w.grad.clone() for name, w in named}
    for _, weight in named:
        weight.grad = None
    return found, sums


def judge() -> nn.Module:
    torch.manual_seed(4)
    return nn.Linear(D, 1).double()


def objective(kind: str) -> Any:
    return Adversarial(judge(), strength=0.7) if kind == "dann" else Aligned({"coral": coral, "mmd": mmd}[kind])


def weights(kind: str) -> dict[str, float]:
    return {} if kind == "dann" else {"align": 3.0}


def share(cuts: Sequence[int]) -> dict[str, Any]:
    """What this process finds by kind, of every piece that is its own."""
    found: dict[str, Any] = {}
    for kind in KINDS:
        own = pieces(batch(LABELS), cuts)[mesh.rank() :: mesh.world()]
        gradient, sums = gradients(objective(kind), own, **weights(kind))
        found[kind] = {"gradient": {n: g.tolist() for n, g in gradient.items()}, "terms": dict(sums.terms)}
    return found


def main() -> dict[str, Any]:
    return {"2": together(2, partial(share, (7,))), "3": together(3, partial(share, (1, 5, 7, 9)))}


if __name__ == "__main__":
    print(json.dumps(main()))
