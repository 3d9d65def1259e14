"""How much of the differences between accuracies the fusion explains, and how much the seed."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from plait.core.errors import DataError
from plait.core.types import Score
from plait.evaluation.statistics import block_jackknife, to_score


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """Eta squared: sums of squares as shares of all, of one table of fusions by seeds; the three sum to 1.

    Attributes:
        fusion: Between means of fusions.
        seed: Between means of seeds.
        rest: What neither explains.
    """

    fusion: float
    seed: float
    rest: float


def shares(scores: Float[np.ndarray, "fusion seed"]) -> Shares | None:
    """Two-way analysis of variance, one value a cell; None where all values are equal.

    Example:
        >>> shares(np.array([[0.5, 0.6], [0.9, 1.0]]))
        Shares(fusion=0.941, seed=0.059, rest=0.0)
    """
    fusions, seeds = scores.shape
    mean = scores.mean()
    total = float(((scores - mean) ** 2).sum())
    if total <= 1e-18:
        return None
    fusion = float(seeds * ((scores.mean(1) - mean) ** 2).sum()) / total
    seed = float(fusions * ((scores.mean(0) - mean) ** 2).sum()) / total
    return Shares(fusion=round(fusion, 3), seed=round(seed, 3), rest=round(abs(1 - fusion - seed), 3))


def fusion_share(scores: Float[np.ndarray, "fusion seed"]) -> Score | None:
    """The share of the fusion, with an interval from leaving out each seed in turn, kept within 0 and 1.

    None where all values are equal, with all seeds or without one of them.

    Raises:
        DataError: There are fewer than three seeds.
    """
    _, seeds = scores.shape
    if any(shares(np.delete(scores, seed, axis=1)) is None for seed in range(seeds)):
        return None

    def share(kept: np.ndarray) -> float:
        found = shares(scores[:, kept])
        assert found is not None
        return found.fusion

    interval = block_jackknife(share, groups=[str(seed) for seed in range(seeds)])
    found = to_score(interval, name="eta squared of fusion", rule="two-way sums of squares", n=scores.size)
    return Score(
        name=found.name,
        value=found.value,
        low=max(0.0, found.low),
        high=min(1.0, found.high),
        n=found.n,
        rule=found.rule,
    )


def by_chance(fusions: int, seeds: int) -> float:
    """What the share of the fusion is on average where it makes no difference.

    Example:
        >>> round(by_chance(9, 5), 3)
        0.182
    """
    return (fusions - 1) / (fusions * seeds - 1)


def with_conditions(scores: Float[np.ndarray, "condition fusion seed"]) -> dict[str, float]:
    """Over several conditions: shares of the condition, of the fusion in all of them, of both together, and the rest.

    What ``together`` explains no choice of one fusion for all conditions can have.

    Raises:
        DataError: All values are equal.
    """
    conditions, fusions, seeds = scores.shape
    mean = scores.mean()
    total = float(((scores - mean) ** 2).sum())
    if total <= 1e-18:
        raise DataError("all accuracies are equal: nothing explains differences", remedy="try harder tasks")
    cells = scores.mean(2)
    condition = float(fusions * seeds * ((cells.mean(1) - mean) ** 2).sum()) / total
    fusion = float(conditions * seeds * ((cells.mean(0) - mean) ** 2).sum()) / total
    both = float(seeds * ((cells - mean) ** 2).sum()) / total - condition - fusion
    found = {"condition": condition, "fusion": fusion, "together": both, "rest": 1 - condition - fusion - both}
    return {name: round(abs(share), 3) for name, share in found.items()}
