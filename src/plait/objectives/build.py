"""From the settings of an objective to the objective."""

from __future__ import annotations

from torch import nn

from plait.objectives import specs
from plait.objectives.contrastive import Contrastive, SigmoidContrastive
from plait.objectives.hardness import HardContrastive, HardNTXent
from plait.objectives.margins import MarginContrastive
from plait.objectives.momentum import MomentumContrast
from plait.objectives.triplets import Triplet
from plait.objectives.views import NPair, NTXent, SupervisedContrastive

OfPairs = Contrastive | SigmoidContrastive
"""Objectives over pairs."""

OfViews = NTXent | SupervisedContrastive | NPair | MarginContrastive | Triplet | HardNTXent | MomentumContrast
"""Objectives over views."""


def over_pairs(spec: specs.Objective, *, batch: int) -> OfPairs:
    """An objective over pairs of a picture and a text.

    Args:
        spec: Its settings.
        batch: Pairs of a step, of all processes together.

    Raises:
        TypeError: It is none over pairs.
    """
    match spec:
        case specs.Contrastive():
            return Contrastive()
        case specs.Sigmoid():
            return SigmoidContrastive(bias=spec.bias_for(batch))
        case specs.HardContrastive():
            return HardContrastive(hardness=spec.hardness, prior=spec.prior)
        case _:
            raise TypeError(f"{spec.kind} compares views")


def over_views(spec: specs.Objective, model: nn.Module, *, width: int, seed: int) -> OfViews:
    """An objective over views of pictures.

    Args:
        spec: Its settings.
        model: What will be trained, on its device; MoCo's copy begins as it is now.
        width: Of its vectors.
        seed: Of the first keys of MoCo's queue.

    Raises:
        TypeError: It is none over views.
    """
    settings = spec.model_dump(exclude={"kind", "classes"})
    match spec:
        case specs.NTXent():
            return NTXent(**settings)
        case specs.SupCon():
            return SupervisedContrastive(**settings)
        case specs.NPair():
            return NPair(**settings)
        case specs.Margin():
            return MarginContrastive(**settings)
        case specs.Triplet():
            return Triplet(**settings)
        case specs.HardNTXent():
            return HardNTXent(**settings)
        case specs.MoCo():
            return MomentumContrast(model, width=width, seed=seed, **settings)
        case _:
            raise TypeError(f"{spec.kind} compares pairs")
