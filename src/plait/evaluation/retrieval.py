"""Cross-modal retrieval: R@K, mean reciprocal rank and what chance gives.

A query may have several correct candidates (a picture style each, synonyms); it counts as found at K if *any* of them
is among the first K (the convention for COCO and Flickr30K captions; torchmetrics calls it hit rate, its "recall" would
give 0.2 for a perfect model with five captions a picture). Ties are placed worst: a correct candidate stands behind
every wrong one of equal score, so a model that gives the same score to everything finds nothing. Rule identifiers end
in ``ties-worst`` for this.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from plait.core.errors import DataError, NumericsError
from plait.core.types import Score
from plait.evaluation.statistics import exact_score, mean_score

RECALL_AT = (1, 5, 10)


def first_ranks(
    scores: Float[np.ndarray, "query candidate"], correct: Bool[np.ndarray, "query candidate"]
) -> Int[np.ndarray, " query"]:
    """Rank, from 1, of the best-placed correct candidate of each query; ties placed worst.

    Raises:
        NumericsError: A score is NaN.
        DataError: A query has no correct candidate.

    Example:
        >>> first_ranks(np.array([[0.1, 0.9, 0.9]]), np.array([[False, True, False]]))
        array([2])
    """
    if np.isnan(scores).any():
        raise NumericsError(
            f"{int(np.isnan(scores).any(1).sum())} of {len(scores)} queries have NaN scores",
            remedy="check the embeddings",
        )
    _check_answerable(correct)
    best = np.where(correct, scores, -np.inf).max(1, keepdims=True)
    return 1 + ((scores >= best) & ~correct).sum(1)


def rank_scores(
    ranks: Int[np.ndarray, " query"], *, name: str, groups: Sequence[str] | None = None, seed: int = 0
) -> list[Score]:
    """R@1, R@5, R@10 and MRR with 95 % intervals.

    Args:
        ranks: From :func:`first_ranks`.
        name: Prefix of the score names, such as ``test-concept/image-to-text``.
        groups: Concept of each query; queries that share one are resampled together.
        seed: Seed of the bootstrap.

    Raises:
        DataError: There is no query.
    """
    found = {f"R@{k}": ((ranks <= k).astype(np.float64), f"hit@{k}/any-correct/ties-worst") for k in RECALL_AT}
    found["MRR"] = (1.0 / ranks, "mrr/first-correct/ties-worst")
    return [
        mean_score(values, name=f"{name}/{metric}", rule=rule, groups=groups, seed=seed)
        for metric, (values, rule) in found.items()
    ]


def chance_scores(correct: Bool[np.ndarray, "query candidate"], *, name: str) -> list[Score]:
    """What a uniformly random order of the candidates reaches, exactly; names as in :func:`rank_scores`.

    With m correct of c candidates, none is among the first k with probability C(c - m, k) / C(c, k).

    Raises:
        DataError: A query has no correct candidate.
    """
    _check_answerable(correct)
    candidates = int(correct.shape[1])
    sizes, counts = np.unique(correct.sum(1), return_counts=True)
    # missed[k]: probability that a query has no correct candidate among the first k, averaged over queries.
    missed = np.zeros(candidates + 1)
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        left = np.arange(candidates, 0, -1, dtype=np.float64)
        missed[0] += count / len(correct)
        missed[1:] += count / len(correct) * np.cumprod(np.clip((left - size) / left, 0.0, 1.0))
    values = {f"R@{k}": 1.0 - missed[min(k, candidates)] for k in RECALL_AT}
    values["MRR"] = ((missed[:-1] - missed[1:]) / np.arange(1, candidates + 1)).sum()
    rule, n = "chance/uniform-order", len(correct)
    return [exact_score(float(value), name=f"{name}/{key}", rule=rule, n=n) for key, value in values.items()]


@dataclass(frozen=True, slots=True)
class Direction:
    """One direction of retrieval: rank of the first correct candidate of each query, and what is correct.

    Attributes:
        ranks: From :func:`first_ranks`.
        correct: ``query candidate``.
        groups: Concept of each query.
    """

    ranks: Int[np.ndarray, " query"]
    correct: Bool[np.ndarray, "query candidate"]
    groups: tuple[str, ...]


class Gallery:
    """The pictures of one split against all distinct texts of that split, in both directions.

    A text is correct for a picture if it is a text of the picture's concept, so that two pictures of one concept, or
    two texts for it, are never wrong answers for each other.

    Args:
        texts: The text of each picture.
        concepts: The concept of each picture.

    Attributes:
        texts: Distinct texts, sorted: the candidates of a picture.
        correct: ``picture text``.

    Example:
        >>> gallery = Gallery(["cat", "dog", "cat"], ["c1", "c2", "c1"])
        >>> gallery.texts, gallery.correct.tolist()
        (('cat', 'dog'), [[True, False], [False, True], [True, False]])
    """

    def __init__(self, texts: Sequence[str], concepts: Sequence[str]) -> None:
        self.texts = tuple(sorted(set(texts)))
        self.concepts = tuple(concepts)
        column = {text: number for number, text in enumerate(self.texts)}
        known = {concept: number for number, concept in enumerate(sorted(set(concepts)))}
        named = np.zeros((len(known), len(self.texts)), dtype=np.bool_)
        for text, concept in zip(texts, concepts, strict=True):
            named[known[concept], column[text]] = True
        self.correct: Bool[np.ndarray, "picture text"] = named[[known[concept] for concept in concepts]]
        self._alike: Bool[np.ndarray, "text text"] = named.T @ named  # texts of one concept
        first = dict(zip(reversed(texts), reversed(concepts), strict=True))
        self._text_concepts = tuple(first[text] for text in self.texts)

    def directions(self, similarity: Float[np.ndarray, "picture text"]) -> dict[str, Direction]:
        """Ranks in both directions, by name.

        Raises:
            NumericsError: A similarity is NaN.
        """
        return {
            "image-to-text": Direction(first_ranks(similarity, self.correct), self.correct, self.concepts),
            "text-to-image": Direction(first_ranks(similarity.T, self.correct.T), self.correct.T, self._text_concepts),
        }

    def heard(
        self,
        images: Float[np.ndarray, "picture sound"],
        texts: Float[np.ndarray, "text sound"],
        *,
        said: Sequence[int],
    ) -> dict[str, Direction]:
        """Ranks in the four directions that sounds of texts have, by name.

        A query of which nothing correct can be heard (its texts are not said) takes no part.

        Args:
            images: Similarity of pictures and sounds.
            texts: Similarity of the candidates (:attr:`texts`) and sounds.
            said: Which of the candidates each sound says.
        """
        of_sound = tuple(self._text_concepts[column] for column in said)
        by_image: Bool[np.ndarray, "picture sound"] = self.correct[:, list(said)]
        by_text: Bool[np.ndarray, "text sound"] = self._alike[:, list(said)]
        found: dict[str, Direction] = {}
        for name, scores, correct, owners in (
            ("image", images, by_image, self.concepts),
            ("text", texts, by_text, self._text_concepts),
        ):
            asked = np.flatnonzero(correct.any(1))
            groups = tuple(owners[int(query)] for query in asked)
            found[f"{name}-to-audio"] = Direction(first_ranks(scores[asked], correct[asked]), correct[asked], groups)
            back = Direction(first_ranks(scores.T, correct.T), correct.T, of_sound)
            found[f"audio-to-{name}"] = back
        return found

    def nearest(self, similarity: Float[np.ndarray, " text"], number: int) -> list[tuple[str, float]]:
        """The nearest texts of one picture with their similarities, nearest first."""
        order = np.argsort(-similarity, kind="stable")[:number]
        return [(self.texts[int(i)], float(similarity[int(i)])) for i in order]


def _check_answerable(correct: Bool[np.ndarray, "query candidate"]) -> None:
    without = np.flatnonzero(~correct.any(1))
    if len(without):
        raise DataError(
            f"{len(without)} of {len(correct)} queries have no correct candidate, the first is query {without[0]}",
            remedy="take candidates from the same split as the queries",
        )
