"""The shape of a space that two modalities share: how near pairs are, how even it is filled, how far apart its halves.

Retrieval says whether the right one is nearest; these say why it is not. All are of unit vectors, one pair a row.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from plait.core.errors import DataError
from plait.core.types import Score
from plait.evaluation.statistics import block_jackknife, to_score

Vectors = Float[np.ndarray, "pair d"]
LEAST = 4
"""Groups that the shape of a space is measured on at least."""


def alignment(first: Vectors, second: Float[np.ndarray, "pair d"]) -> float:
    """Mean squared distance of the two of a pair; 0: they are one, 2: at right angles.

    Wang and Isola, section 4.1.2 with alpha = 2, https://arxiv.org/abs/2005.10242.

    Example:
        >>> alignment(np.eye(2), np.eye(2)[::-1])
        2.0
    """
    return float(((first - second) ** 2).sum(1).mean())


def uniformity(vectors: Vectors) -> float:
    """Logarithm of the mean of ``exp(-2 distance²)`` over all pairs of different rows; lower is more even.

    0: all rows are one point. Wang and Isola, section 4.1.2 with t = 2, https://arxiv.org/abs/2005.10242.

    Raises:
        DataError: There are fewer than two rows.
    """
    number = len(vectors)
    if number < 2:
        raise DataError(f"uniformity needs two vectors, came {number}", remedy="give more pairs")
    norms = (vectors**2).sum(1)
    distance = np.maximum(norms[:, None] + norms[None] - 2 * vectors @ vectors.T, 0)
    kernel = np.exp(-2 * distance)
    return float(np.log((kernel.sum() - np.trace(kernel)) / (number * (number - 1))))


def modality_gap(first: Vectors, second: Float[np.ndarray, "other d"]) -> float:
    """Distance of the means of two modalities; 0: none. Liang et al., section 4, https://arxiv.org/abs/2203.02053.

    Example:
        >>> modality_gap(np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])).__round__(3)
        1.414
    """
    return float(np.linalg.norm(first.mean(0) - second.mean(0)))


def linear_cka(first: Vectors, second: Float[np.ndarray, "other e"]) -> float:
    """Likeness of two sets of vectors of the same items, whatever their widths and rotations; 0 to 1.

    Kornblith et al., equation 3 with a linear kernel, https://arxiv.org/abs/1905.00414: ``|Y'X|² / (|X'X| |Y'Y|)`` of
    centered columns. With fewer items than columns it is large for any vectors: compare only over the same items.

    Raises:
        DataError: They have different numbers of rows, or all rows of one are equal.
    """
    if len(first) != len(second):
        raise DataError(f"CKA needs pairs; came {len(first)} and {len(second)}", remedy="give as many of both")
    x, y = (vectors - vectors.mean(0) for vectors in (first, second))
    below = np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
    # What is left of equal rows after centering is rounding.
    if any(np.abs(c).max() <= 1e-6 * np.abs(raw).max() for c, raw in ((x, first), (y, second))):
        raise DataError("all vectors of one side are equal: CKA has no value", remedy="give vectors that differ")
    return float(np.linalg.norm(y.T @ x) ** 2 / below)


def space_scores(
    first: Vectors,
    second: Float[np.ndarray, "pair d"],
    *,
    name: str,
    groups: Sequence[str],
    sides: tuple[str, str] = ("image", "text"),
    seed: int = 0,
) -> list[Score]:
    """All of the above for pictures and their texts, or other pairs, with 95 % intervals of a jackknife over groups.

    Args:
        first: Unit vectors of pictures.
        second: Unit vectors of their texts, in the same order.
        name: Prefix of the score names.
        groups: Of each pair; left out together.
        sides: What the two are.
        seed: Of the blocks.

    Raises:
        DataError: There are fewer than :data:`LEAST` groups, or vectors that do not differ.
    """
    if (number := len(set(groups))) < LEAST:
        raise DataError(f"{number} groups, the shape of a space needs {LEAST}", remedy="give more pairs")
    measures: dict[str, tuple[str, Callable[[Vectors, Vectors], float]]] = {
        "alignment": ("mean squared distance of pairs", alignment),
        # Of different rows only: a name that many pictures share would count as crowding.
        f"uniformity-{sides[0]}": (
            "log mean exp(-2 distance²), each once",
            lambda x, _: uniformity(np.unique(x, axis=0)),
        ),
        f"uniformity-{sides[1]}": (
            "log mean exp(-2 distance²), each once",
            lambda _, y: uniformity(np.unique(y, axis=0)),
        ),
        "modality-gap": ("distance of means", modality_gap),
        "cka": ("linear CKA", linear_cka),
    }
    scores: list[Score] = []
    for what, (rule, measure) in measures.items():
        found = block_jackknife(
            lambda kept, measure=measure: measure(first[kept], second[kept]), groups=groups, seed=seed
        )
        scores.append(to_score(found, name=f"{name}/{what}", rule=rule, n=len(first)))
    return scores
