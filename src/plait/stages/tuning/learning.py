"""What learns in a phase of tune: the weights that make media readable, how fast their gates do, terms of experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from plait.assembly.multimodal import holds_media
from plait.data.augment.feature_dropout import FeatureDropout
from plait.models.composition import NewDecoder
from plait.stages.tune import Adapt


def connector_trains(connector: nn.Module, *, drops: bool) -> None:
    """Training mode.

    Args:
        connector: Of the composition.
        drops: Whether its dropout goes on; one that speaks in words drops nothing once the words are learned.
    """
    connector.train()
    for part in () if drops else connector.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0


def let_media_learn(model: nn.Module) -> list[str]:
    """Let the weights learn that make pictures readable; returns the beginnings of their names."""
    found: set[str] = set()
    for name, weight in model.named_parameters():
        if holds_media(name):
            weight.requires_grad = True
            layer, inside, _ = name.partition(".reads.")
            found.add(f"{layer}.reads" if inside else name.split(".")[0])
    return sorted(found)


def gate_rates(model: nn.Module, lr: float) -> dict[str, float]:
    """The rate of each gate of layers that read inside the decoder; none where ``lr`` is 0: that of their layers."""
    gates = (name for name, _ in model.named_parameters() if ".reads." in name and name.endswith("gate"))
    return dict.fromkeys(gates, lr) if lr else {}


def dropout_of(adapt: Adapt, *, seed: int) -> FeatureDropout | None:
    """What the third phase drops of pictures' features; None where nothing."""
    drop, steps = adapt.drop, adapt.steps
    if drop.most == 0.0:
        return None
    first, full = round(steps * drop.start), round(steps * drop.full)
    return FeatureDropout(least=drop.least, most=drop.most, first=first, full=full, seed=seed)


class ExpertTerms(NamedTuple):
    """What a decoder with experts adds to the loss.

    Attributes:
        choices: See :class:`plait.objectives.language.NextToken`.
        weights: Of the terms.
    """

    choices: int
    weights: Mapping[str, float]

    @classmethod
    def of(cls, decoder: str | NewDecoder) -> ExpertTerms:
        """Of a decoder from scratch; any other one adds nothing."""
        if isinstance(decoder, str) or decoder.mixture is None:
            return cls(0, {})
        return cls(decoder.mixture.top_k * decoder.depth, {"balance": decoder.mixture.balance, "dropped": 0.0})
