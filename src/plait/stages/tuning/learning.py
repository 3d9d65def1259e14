"""What learns in a phase of tune: the weights that make media readable, and how fast their gates do."""

from __future__ import annotations

from torch import nn

from plait.assembly.multimodal import holds_media


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
