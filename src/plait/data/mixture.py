"""Several sources mixed by weight: which sample comes when is a pure function of seed and position.

So a position is all that has to be kept to go on, and a longer plan begins like a shorter one. Each source is gone
through in a new random order each epoch, without a gap between epochs.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from plait.core.errors import ConfigError

_ROUNDING = 1e-9  # of shares of a sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """Samples of several sources in the order in which they are trained.

    A weight is a source's share of the samples; weights need not add up to 1. Next comes a source that is drawn; or, if
    ``even``, the one whose turn it is, so that after any number of samples each source has had its share to within
    one sample (Tijdeman, "The chairman assignment problem", Discrete Mathematics 32, 1980: no order does better).
    Samples of a group stay together; then shares are exact to within the largest group.

    Attributes:
        sources: Groups of each source; a group is samples (any numbers) that come one after the other.
        weights: Share of each source; one that is not named is left out.
        late: The first position that has other weights, and these; None keeps the weights to the end.
        seed: Of orders and draws.
        even: Whether sources take turns rather than being drawn.

    Raises:
        ConfigError: A weight is negative, or no source with a weight has samples.

    Example:
        >>> mixed = Mixture(sources={"a": alone([1]), "b": alone([2])}, weights={"a": 2, "b": 1}, seed=0, even=True)
        >>> mixed.first(9)
        [1, 2, 1, 1, 2, 1, 1, 2, 1]
    """

    sources: Mapping[str, Sequence[Sequence[int]]]
    weights: Mapping[str, float]
    seed: int
    late: tuple[int, Mapping[str, float]] | None = None
    even: bool = False
    _parts: list[tuple[int, Mapping[str, float]]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_parts", [(0, self.weights), *([self.late] if self.late else [])])
        for _, weights in self._parts:
            if negative := [name for name, weight in weights.items() if not weight >= 0]:
                raise ConfigError(
                    f"the weight of {negative[0]} is {weights[negative[0]]}",
                    place="weights",
                    remedy="set it to 0 or more",
                )
            if not self._taken(weights):
                raise ConfigError(
                    f"no source with a weight has samples: {', '.join(weights)}",
                    place="weights",
                    remedy=f"give one of {', '.join(self.sources) or 'several sources'} a weight",
                )

    def first(self, number: int) -> list[int]:
        """The first ``number`` samples."""
        rng = random.Random(f"{self.seed} tasks")
        piles: dict[str, list[Sequence[int]]] = {name: [] for name in self.sources}
        size = {name: sum(map(len, groups)) / max(len(groups), 1) for name, groups in self.sources.items()}
        plan: list[int] = []
        for (_, weights), end in zip(self._parts, [*(begin for begin, _ in self._parts[1:]), number], strict=True):
            names = self._taken(weights)
            turns = _Turns({name: weights[name] for name in names})
            drawn = [weights[name] / size[name] for name in names]
            while len(plan) < min(end, number):
                name = turns.next() if self.even else rng.choices(names, drawn)[0]
                if not piles[name]:
                    piles[name] = rng.sample(self.sources[name], len(self.sources[name]))
                group = piles[name].pop()
                turns.had(name, len(group))
                plan += group
        return plan[:number]

    def _taken(self, weights: Mapping[str, float]) -> list[str]:
        """Sources that have a weight and samples."""
        return sorted(name for name, groups in self.sources.items() if groups and weights.get(name, 0.0) > 0)


def alone(samples: Sequence[int]) -> list[tuple[int]]:
    """Each sample as a group of its own."""
    return [(sample,) for sample in samples]


def tempered(sizes: Mapping[str, int], temperature: float) -> dict[str, float]:
    """Weights that grow less than sizes do: share ~ size ** (1 / temperature); they add up to 1.

    1 takes every sample equally often, a high temperature every source (as for the languages of multilingual BERT and
    T5, arXiv 2010.11934).

    Args:
        sizes: Samples of each source.
        temperature: At least 1, usually.

    Raises:
        ConfigError: The temperature is not above 0, or there is no sample.

    Example:
        >>> tempered({"large": 400, "small": 100}, 2)
        {'large': 0.6666666666666666, 'small': 0.3333333333333333}
    """
    if not temperature > 0:
        raise ConfigError(f"temperature is {temperature}", place="temperature", remedy="set it above 0")
    largest = max(sizes.values(), default=0)
    if largest <= 0:
        raise ConfigError("no source has samples", place="sizes", remedy="give at least one source with samples")
    grown = {name: (size / largest) ** (1 / temperature) for name, size in sizes.items()}
    return {name: part / sum(grown.values()) for name, part in grown.items()}


class _Turns:
    """Whose turn it is: of the sources that may have one more without having too much, the one that is due first."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        total = sum(weights.values())
        self._shares = {name: weight / total for name, weight in weights.items()}
        self._slack = 1 / (2 * len(weights) - 2) if len(weights) > 1 else 0.0
        self._had = dict.fromkeys(weights, 0)
        self._number = 0

    def next(self) -> str:
        """Tijdeman's rule for the next sample."""
        after = self._number + 1
        open_ = [n for n, share in self._shares.items() if after * share - self._had[n] >= self._slack - _ROUNDING]
        # Only where groups are larger than one sample may all have had too much.
        return min(open_ or self._shares, key=lambda n: (1 - self._slack + self._had[n]) / self._shares[n])

    def had(self, name: str, samples: int) -> None:
        """A group of ``name`` was taken."""
        self._had[name] += samples
        self._number += samples
