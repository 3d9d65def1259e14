"""Contrastive losses against pytorch-metric-learning through goldens: values and gradients.

Its cosines normalize the vectors, whose gradient then lies in the tangent of the sphere; ours take unit vectors, and
the same tangent part is compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from plait.objectives.triplets import active_triplets, all_triplets, triplet
from plait.objectives.views import n_pair, nt_xent, supervised_contrastive

Golden = Callable[[str], tuple[dict[str, Tensor], dict[str, Any]]]
MARGIN = 0.5


def ours(name: str, x: Tensor, classes: Tensor) -> Tensor:
    """The same mean."""
    unit = functional.normalize(x, dim=1)
    if name == "nt_xent":
        return nt_xent(unit[:6], unit[6:], temperature=0.3) / 12
    if name == "supcon":
        return supervised_contrastive(unit, classes, temperature=0.2) / 12
    if name == "n_pair":
        return n_pair(x[:6], x[6:]) / 6
    kind: Any = "hard" if name == "triplet_hard" else "all"
    number = all_triplets(classes, mining=kind)
    if name == "triplet_active":
        number = active_triplets(x, classes, margin=MARGIN)
    return triplet(x, classes, margin=MARGIN, mining=kind) / number


@pytest.mark.row("S2-18")
@pytest.mark.row("S2-21")
@pytest.mark.row("S2-24")
@pytest.mark.parametrize("name", ["nt_xent", "supcon", "n_pair", "triplet_active", "triplet_all", "triplet_hard"])
def test_values_and_gradients_are_theirs(name: str, golden: Golden) -> None:
    tensors, _ = golden("contrast")
    x = tensors["vectors"].clone().requires_grad_()
    value = ours(name, x, tensors["classes"])
    torch.testing.assert_close(value, tensors[name], rtol=1e-10, atol=1e-12)
    (gradient,) = torch.autograd.grad(value, x)
    torch.testing.assert_close(gradient, tensors[f"{name}_d_vectors"], rtol=1e-8, atol=1e-10)
