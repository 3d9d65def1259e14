"""What is in the layers of a ViT: how far attention looks, and what a linear layer can read."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from plait.models.towers.vit import VisionTransformer
from plait.studies.seeing.scenes import CELL, COLORS, FINE, SIDE, SKIP, Scenes
from plait.studies.seeing.towers import GRID

READ: tuple[str, ...] = ("color", "count", "far", "left")
"""``color`` of the object in a cell of 8 pixels, from that cell; ``count`` of squares and whether red is ``left`` of
green, from the mean of all cells; ``far``: the color of the other corner, from the lower right cell."""


def pixel_distances() -> Float[Tensor, "n n"]:
    """Pixels between the middles of the patches of a picture."""
    at = torch.cartesian_prod(torch.arange(GRID), torch.arange(GRID)).double() * FINE
    return torch.cdist(at, at)


@torch.inference_mode()
def attention_distances(tower: VisionTransformer, pixels: Float[Tensor, "b 3 h w"]) -> list[float]:
    """Mean distance in pixels from a patch to where it looks, of every layer; section 4.5 of the ViT paper.

    Uniform attention gives the mean of :func:`pixel_distances`, attention to itself gives 0.
    """
    weights: list[Tensor] = []
    tower.eval().tokens(pixels, weights=weights)
    apart = pixel_distances()
    return [float((found.double() * apart).sum(-1).mean()) for found in weights]


@torch.inference_mode()
def layer_scores(tower: VisionTransformer, scenes: Scenes) -> list[dict[str, float]]:
    """What a linear layer reads of what goes into each block, and of what the last one gives.

    It is fitted on two thirds of the scenes; the shares are of right answers to the rest.
    """
    tower.eval()
    parts: list[list[Tensor]] = []
    for rows in torch.arange(len(scenes)).split(500):
        hidden: list[Tensor] = []
        last = tower.tokens(scenes.pixels[rows], hidden=hidden)
        parts.append([*hidden, last])
    layers = [torch.cat(found) for found in zip(*parts, strict=True)]
    return [_read(tokens, scenes) for tokens in layers]


def _read(tokens: Float[Tensor, "b n d"], scenes: Scenes) -> dict[str, float]:
    join = CELL // FINE
    side = SIDE // CELL
    cells = tokens.unflatten(1, (side, join, side, join)).mean((2, 4)).flatten(1, 2)
    whole = tokens.mean(1)
    left = scenes.targets["left"][:, 0, 1]
    asked: dict[str, tuple[Tensor, Tensor, int]] = {
        "color": (cells, scenes.cells, COLORS + 1),
        "count": (whole, scenes.targets["count"], COLORS + 1),
        "far": (cells[:, -1], scenes.targets["far"], COLORS),
        "left": (whole, left, 2),
    }
    found: dict[str, float] = {}
    split = 2 * len(tokens) // 3
    for name in READ:
        features, target, classes = asked[name]
        if name == "color":  # most cells are empty: only those that hold something are asked
            target = target.masked_fill(target == COLORS, SKIP)
        fit, test = (
            (features[part][target[part] != SKIP], target[part][target[part] != SKIP])
            for part in (slice(split), slice(split, None))
        )
        found[name] = linear_probe(fit, test, classes=classes)
    return found


def linear_probe(
    fit: tuple[Float[Tensor, "n d"], Int[Tensor, " n"]],
    test: tuple[Float[Tensor, "m d"], Int[Tensor, " m"]],
    *,
    classes: int,
    ridge: float = 1e-3,
) -> float:
    """Share of right answers of least squares to one-hot targets, with standardized features and a bias.

    Args:
        fit: Features and classes to fit.
        test: Those to ask.
        classes: How many there are.
        ridge: Added to the diagonal, in shares of the number of rows.
    """
    mean, deviation = fit[0].double().mean(0), fit[0].double().std(0).clamp(min=1e-6)

    def rows(features: Tensor) -> Tensor:
        scaled = (features.double() - mean) / deviation
        return torch.cat([scaled, torch.ones(len(scaled), 1, dtype=torch.float64)], dim=1)

    x, y = rows(fit[0]), torch.nn.functional.one_hot(fit[1], classes).double()
    weights = torch.linalg.solve(x.mT @ x + ridge * len(x) * torch.eye(x.shape[1], dtype=torch.float64), x.mT @ y)
    return float(((rows(test[0]) @ weights).argmax(1) == test[1]).double().mean())
