"""Maps over regions: where attention looks, where the answer's gradient points, and what it costs to take both away."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from plait.models.fusion.streams import Inputs, Stream
from plait.studies.attending.scenes import REGIONS, WORDS, Batch
from plait.studies.attending.training import Arm

Map = Float[Tensor, "b n"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Looked:
    """What maps say of one batch.

    Attributes:
        pointed: Share of samples whose map is largest on a region that is asked for, by map.
        mass: Mean share of the map that lies on regions that are asked for, by map.
        fell: Loss of the probability of the answer that was given before, where regions are taken away, by map and
            which: ``top``, ``least``, and ``random``.
    """

    pointed: Mapping[str, float]
    mass: Mapping[str, float]
    fell: Mapping[str, float]


def look(arm: Arm, batch: Batch, *, deleted: int, generator: torch.Generator) -> Looked:
    """Every map of an arm: ``gradient``, which all have, and ``layer 1`` and so on, where it attends.

    Args:
        arm: Trained.
        batch: Samples.
        deleted: How many regions are taken away.
        generator: Of the regions that are taken away at random, the same for all maps.
    """
    maps = {f"layer {i}": found.detach() for i, found in enumerate(_attended(arm, batch, generator), 1)}
    maps["gradient"] = gradient_map(arm, batch.inputs, generator=generator)
    dice = torch.rand(batch.asked.shape, generator=generator)
    fell = {"random": fall(arm, batch.inputs, chosen(dice, deleted), generator=generator)}
    for name, values in maps.items():
        fell[f"{name} top"] = fall(arm, batch.inputs, chosen(values, deleted), generator=generator)
        fell[f"{name} least"] = fall(arm, batch.inputs, chosen(-values, deleted), generator=generator)
    return Looked(
        pointed={name: pointing(values, batch.asked) for name, values in maps.items()},
        mass={name: mass(values, batch.asked) for name, values in maps.items()},
        fell=fell,
    )


@torch.inference_mode()
def _attended(arm: Arm, batch: Batch, generator: torch.Generator) -> list[Map]:
    return arm(batch.inputs, generator=generator, need_weights=True).maps


def gradient_map(arm: Arm, inputs: Inputs, *, generator: torch.Generator) -> Map:
    """Size of gradient times input of each region, for the score of the answer that is given."""
    regions = inputs[REGIONS].tokens.clone().requires_grad_()
    scores = arm({WORDS: inputs[WORDS], REGIONS: Stream(tokens=regions)}, generator=generator).scores
    (found,) = torch.autograd.grad(scores.amax(1).sum(), regions)
    return (found * regions.detach()).sum(-1).abs()


def pointing(values: Map, asked: Bool[Tensor, "b n"]) -> float:
    """Share of maps that are largest on a region that is asked for (the pointing game).

    Example:
        >>> pointing(torch.tensor([[0.2, 0.8], [0.9, 0.1]]), torch.tensor([[False, True], [False, True]]))
        0.5
    """
    return float(asked.gather(1, values.argmax(1, keepdim=True)).double().mean())


def mass(values: Map, asked: Bool[Tensor, "b n"]) -> float:
    """Mean share of the map that lies on regions that are asked for.

    Example:
        >>> round(mass(torch.tensor([[0.2, 0.6], [0.9, 0.3]]), torch.tensor([[False, True], [False, True]])), 3)
        0.5
    """
    share = values / values.sum(1, keepdim=True).clamp(min=1e-12)
    return float((share * asked).sum(1).double().mean())


def chosen(values: Map, number: int) -> Bool[Tensor, "b n"]:
    """The largest of each row.

    Example:
        >>> chosen(torch.tensor([[0.2, 0.5, 0.3]]), 2).tolist()
        [[False, True, True]]
    """
    return torch.zeros_like(values, dtype=torch.bool).scatter(1, values.topk(number, dim=1).indices, True)


@torch.inference_mode()
def fall(arm: Arm, inputs: Inputs, gone: Bool[Tensor, "b n"], *, generator: torch.Generator) -> float:
    """How much less probable the answer becomes, which is given with all regions, when some are masked as padding."""
    before = arm(inputs, generator=generator).scores.softmax(-1)
    regions = Stream(tokens=inputs[REGIONS].tokens, real=~gone)
    after = arm({**inputs, REGIONS: regions}, generator=generator).scores.softmax(-1)
    answer = before.argmax(1, keepdim=True)
    return float((before.gather(1, answer) - after.gather(1, answer)).double().mean())
