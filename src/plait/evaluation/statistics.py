"""How sure a score is: bootstrap (plain, paired, clustered), jackknife, Student over seeds, Wilson; rank correlation.

What is resampled is a function of column sums over items: a mean is sum(value) / sum(1), F1 is 2 tp / (2 tp + fp +
fn). Resampling items then means reweighting a small table, and resampling whole clusters (all pictures of one concept)
means summing the rows of a cluster first. Items that share a concept are not independent: an interval that ignores this
is too narrow.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from plait.core.errors import DataError
from plait.core.types import Score

RESAMPLES = 2000
"""Bootstrap resamples. At 2,000 the ends of a 95 % interval move by about 0.06 standard errors from seed to seed."""

_Z95 = 1.959963984540054
_CHUNK_DRAWS = 2**21
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's t at 97.5 % for 1 to 10 degrees of freedom; with more, that of 10, which is a little too wide."""

Table = Float[np.ndarray, "item column"]
Statistic = Callable[[Float[np.ndarray, "row column"]], Float[np.ndarray, " row"]]
"""Column sums of many resamples in, one value each out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A point estimate and its 95 % interval; ``rule`` names how the interval was made."""

    value: float
    low: float
    high: float
    rule: str


def bootstrap(
    table: Table,
    statistic: Statistic,
    *,
    groups: Sequence[str] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap of a statistic of column sums (Efron 1979).

    Args:
        table: One row an item, one column a summand.
        statistic: Maps column sums, ``row column``, to values, ``row``; must be defined for every resample.
        groups: Cluster of each item; whole clusters are then resampled instead of items.
        resamples: How many resamples.
        seed: Seed of the resampling; equal seeds give equal intervals.

    Raises:
        DataError: No items, a value that is not finite, or another number of groups than of items.

    Example:
        >>> table = np.array([[1.0, 1.0], [0.0, 1.0], [1.0, 1.0], [1.0, 1.0]])
        >>> bootstrap(table, lambda sums: sums[:, 0] / sums[:, 1]).value
        0.75
    """
    _check(table, groups)
    value = float(statistic(table.sum(0, keepdims=True))[0])
    if groups is not None:
        table = _sum_by_group(table, groups)
    rng = np.random.default_rng(seed)
    chunk = max(1, _CHUNK_DRAWS // len(table))
    values = [
        statistic(_weights(rng, min(chunk, resamples - done), len(table)) @ table)
        for done in range(0, resamples, chunk)
    ]
    low, high = np.percentile(np.concatenate(values), [2.5, 97.5])
    kind = "bootstrap" if groups is None else "cluster-bootstrap"
    return Interval(value=value, low=float(low), high=float(high), rule=f"ci={kind}-percentile-{resamples}")


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Wilson 95 % score interval of a proportion (Wilson 1927); has a width even at 0 of n and n of n.

    Raises:
        DataError: ``n`` is 0 or ``successes`` is not within 0 to n.

    Example:
        >>> [round(end, 3) for end in wilson(0, 10)]
        [0.0, 0.278]
    """
    if n < 1 or not 0 <= successes <= n:
        raise DataError(
            f"a proportion needs 0 <= successes <= n and n >= 1; came {successes} of {n}",
            remedy="score at least one item",
        )
    share, z2 = successes / n, _Z95**2
    center = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # At the ends the formula gives 0 and 1 up to rounding.
    return (0.0 if successes == 0 else center - half), (1.0 if successes == n else center + half)


def mean_score(
    values: Sequence[float] | Float[np.ndarray, " item"],
    *,
    name: str,
    rule: str,
    groups: Sequence[str] | None = None,
    failures: int = 0,
    seed: int = 0,
) -> Score:
    """Mean of per-item values with a bootstrap interval.

    Where all values are 0 or all are 1 every resample is the same and the bootstrap would claim certainty; the Wilson
    interval, with as many trials as there are clusters, is given instead and the rule says so.

    Raises:
        DataError: See :func:`bootstrap`.
    """
    table = _with_ones(values)
    interval = bootstrap(table, _mean, groups=groups, seed=seed)
    if interval.value in {0.0, 1.0} and np.all(table[:, 0] == interval.value):
        trials = len(table) if groups is None else len(set(groups))
        low, high = wilson(int(interval.value) * trials, trials)
        interval = Interval(value=interval.value, low=low, high=high, rule="ci=wilson")
    return to_score(interval, name=name, rule=rule, n=len(table), failures=failures)


def paired_difference(
    ours: Sequence[float] | Float[np.ndarray, " item"],
    theirs: Sequence[float] | Float[np.ndarray, " item"],
    *,
    name: str,
    rule: str,
    groups: Sequence[str] | None = None,
    seed: int = 0,
) -> Score:
    """Mean of ``ours - theirs`` over the same items, with a bootstrap interval that keeps the pairs together.

    Raises:
        DataError: The two have different lengths; see also :func:`bootstrap`.
    """
    if len(ours) != len(theirs):
        raise DataError(
            f"a paired difference needs the same items; came {len(ours)} and {len(theirs)}",
            remedy="score both on one list of items",
        )
    table = _with_ones(np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64))
    interval = bootstrap(table, _mean, groups=groups, seed=seed)
    return to_score(interval, name=name, rule=f"{rule}; paired", n=len(table))


def seeds_score(values: Sequence[float], *, name: str, rule: str, n: int) -> Score:
    """Mean share over independent seeds, with a 95 % interval that knows both spreads.

    The ends are the outer ones of Student's interval over the seeds, kept within 0 and 1, and Wilson's over the items:
    a bootstrap over three seeds could only give numbers between the least and the greatest of them, and equal seeds
    would claim certainty.

    Args:
        values: A share for each seed.
        name: Of the score.
        rule: How one value is made.
        n: Independent items; seeds that are asked the same items do not add any.

    Raises:
        DataError: Fewer than two seeds.

    Example:
        >>> found = seeds_score([0.5, 0.6, 0.7], name="accuracy", rule="accuracy", n=300)
        >>> [round(x, 3) for x in (found.value, found.low, found.high)]
        [0.6, 0.352, 0.848]
    """
    mean, half = _student(values)
    least, most = wilson(round(mean * n), n)
    low, high = max(0.0, min(least, mean - half)), min(1.0, max(most, mean + half))
    return Score(name=name, value=mean, low=low, high=high, n=n, rule=f"{rule}; ci=student-{len(values)}-seeds+wilson")


def seeds_mean(values: Sequence[float], *, name: str, rule: str) -> Score:
    """Mean of any number over independent seeds with Student's 95 % interval, which may leave the number's range.

    For a difference of two that share seeds give the differences, seed by seed.

    Raises:
        DataError: Fewer than two seeds.

    Example:
        >>> found = seeds_mean([0.2, 0.2, 0.3], name="gain", rule="difference of accuracies")
        >>> [round(x, 3) for x in (found.value, found.low, found.high)]
        [0.233, 0.09, 0.377]
    """
    mean, half = _student(values)
    rule = f"{rule}; ci=student-{len(values)}-seeds"
    return Score(name=name, value=mean, low=mean - half, high=mean + half, n=len(values), rule=rule)


def block_jackknife(
    statistic: Callable[[Int[np.ndarray, " kept"]], float], *, groups: Sequence[str], blocks: int = 20, seed: int = 0
) -> Interval:
    """A statistic that is no function of column sums, with a 95 % interval from leaving out blocks of groups in turn.

    Groups are dealt to blocks at random; the ends are Student's. It suits smooth statistics, of items that do not have
    to be drawn twice: a bootstrap would put equal items at distance 0. Efron and Tibshirani 1993, chapter 11, with
    blocks for items.

    Args:
        statistic: Maps rows that are kept to a value.
        groups: Of each item; a group is left out as a whole.
        blocks: At most so many.
        seed: Of the dealing.

    Raises:
        DataError: There are fewer than three groups.

    Example:
        >>> values = np.arange(40.0)
        >>> found = block_jackknife(lambda kept: float(values[kept].mean()), groups=[str(i) for i in range(40)])
        >>> found.low < found.value == 19.5 < found.high
        True
    """
    names = sorted(set(groups))
    if len(names) < 3:
        raise DataError(f"{len(names)} groups: leaving one out tells no spread", remedy="give three groups or more")
    dealt = np.random.default_rng(seed).permutation(len(names))
    number = min(blocks, len(names))
    block_of = {name: int(place) % number for name, place in zip(names, dealt, strict=True)}
    block = np.array([block_of[group] for group in groups])
    value = statistic(np.arange(len(groups)))
    without = np.array([statistic(np.flatnonzero(block != b)) for b in range(number)])
    error = math.sqrt((number - 1) / number * float(((without - without.mean()) ** 2).sum()))
    half = _T95[min(number - 1, len(_T95)) - 1] * error
    return Interval(value=value, low=value - half, high=value + half, rule=f"ci=block-jackknife-{number}")


def spearman(ours: Float[np.ndarray, " n"], theirs: Float[np.ndarray, " m"]) -> float:
    """Spearman's rank correlation of pairs; equal values share their mean rank.

    Raises:
        DataError: The two have different lengths, or all values of one are equal.

    Example:
        >>> spearman(np.array([1.0, 2.0, 3.0]), np.array([1.0, 8.0, 27.0]))
        1.0
    """
    if len(ours) != len(theirs):
        raise DataError(f"a correlation needs pairs; came {len(ours)} and {len(theirs)}", remedy="give as many of both")
    first, second = (_ranks(values) - (len(values) - 1) / 2 for values in (ours, theirs))
    norm = math.sqrt(float(first @ first) * float(second @ second))
    if not norm:
        raise DataError("all values are equal: they have no order", remedy="give values that differ")
    return float(first @ second) / norm


def _ranks(values: Float[np.ndarray, " item"]) -> Float[np.ndarray, " item"]:
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts + 1) / 2)[index]


def exact_score(value: float, *, name: str, rule: str, n: int) -> Score:
    """A number that was derived, not sampled (a chance level): its interval is the point."""
    return Score(name=name, value=value, low=value, high=value, n=n, rule=rule)


def to_score(interval: Interval, *, name: str, rule: str, n: int, failures: int = 0) -> Score:
    """An interval with its name and the item count; the rule of the interval is appended to the rule of the metric."""
    return Score(
        name=name,
        value=interval.value,
        low=interval.low,
        high=interval.high,
        n=n,
        rule=f"{rule}; {interval.rule}",
        failures=failures,
    )


def _student(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of Student's interval."""
    if len(values) < 2:
        raise DataError(f"{len(values)} seeds have no spread", remedy="run two seeds or more")
    mean = math.fsum(values) / len(values)
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return mean, _T95[min(len(values) - 1, len(_T95)) - 1] * spread / math.sqrt(len(values))


def _mean(sums: Float[np.ndarray, "row column"]) -> Float[np.ndarray, " row"]:
    return sums[:, 0] / sums[:, 1]


def _with_ones(values: Sequence[float] | Float[np.ndarray, " item"]) -> Table:
    column = np.asarray(values, dtype=np.float64)
    return np.stack([column, np.ones_like(column)], axis=1)


def _sum_by_group(table: Table, groups: Sequence[str]) -> Float[np.ndarray, "group column"]:
    names, index = np.unique(np.asarray(groups), return_inverse=True)
    return np.stack([np.bincount(index, weights=column, minlength=len(names)) for column in table.T], axis=1)


def _weights(rng: np.random.Generator, resamples: int, n: int) -> Float[np.ndarray, "row item"]:
    """How often each of n items is drawn in each resample of n with replacement."""
    drawn: Int[np.ndarray, "row item"] = rng.integers(n, size=(resamples, n))
    flat = (drawn + n * np.arange(resamples)[:, None]).ravel()
    return np.bincount(flat, minlength=resamples * n).reshape(resamples, n).astype(np.float64)


def _check(table: Table, groups: Sequence[str] | None) -> None:
    if not len(table):
        raise DataError("no items to score", remedy="check that the split is not empty")
    bad = np.flatnonzero(~np.isfinite(table).all(1))
    if len(bad):
        raise DataError(
            f"{len(bad)} of {len(table)} values are not finite, the first is item {bad[0]}",
            remedy="find out what made it",
        )
    if groups is not None and len(groups) != len(table):
        raise DataError(f"{len(table)} items but {len(groups)} groups", remedy="give one group an item")
