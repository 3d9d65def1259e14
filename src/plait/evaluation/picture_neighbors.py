"""Whether the nearest other picture is of the same concept: what a picture tower knows without any text.

Pictures of concepts that training had are looked up among the training pictures. Those of new concepts are looked up
among all test pictures of new concepts but themselves (leave one out). Nearest by cosine, ties placed worst.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from plait.core.types import Score
from plait.evaluation.picture_names import beside
from plait.evaluation.retrieval import chance_scores, first_ranks, rank_scores
from plait.evaluation.statistics import paired_difference

TRAIN = "train"
Among = Literal["among-train", "among-new"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """One picture that is looked at.

    Attributes:
        id: Sample id.
        split: Where it is from.
        concept: What it shows.
        name: That in words; the id where nobody named it.
        uri: Where its bytes are, in the shard folder.
    """

    id: str
    split: str
    concept: str
    name: str
    uri: str


@dataclass(frozen=True, slots=True)
class NeighborResult:
    """Similarity of some pictures with others, and the ranks that follow from it."""

    similarity: Float[np.ndarray, "query candidate"]
    ranks: Int[np.ndarray, " query"]

    def recall_at_1(self) -> float:
        """Share of pictures whose nearest other one was of their concept."""
        return float((self.ranks <= 1).mean())


class NeighborTask:
    """Pictures of one test split against others.

    Args:
        pictures: All that there are.
        split: That is scored.
        among: Where its pictures are looked up.
        seed: Seed of the bootstrap.

    Attributes:
        name: What it is called in score names: ``<split>/<among>``.
        queries: Which of all pictures are looked up: those that have one of their concept among the others.
        without: How many have none.
    """

    def __init__(self, pictures: Sequence[Shown], *, split: str, among: Among, seed: int = 0) -> None:
        self.pictures, self.split, self.among, self.seed = pictures, split, among, seed
        self.name = f"{split}/{among}"
        trained = {one.concept for one in pictures if one.split == TRAIN}
        if among == "among-train":
            self._others = [at for at, one in enumerate(pictures) if one.split == TRAIN]
            own = 0
        else:
            self._others = [at for at, one in enumerate(pictures) if one.split != TRAIN and one.concept not in trained]
            own = 1
        there = Counter(pictures[at].concept for at in self._others)
        asked = [
            at
            for at, one in enumerate(pictures)
            if one.split == split and (one.concept in trained) == (among == "among-train")
        ]
        self.queries = [at for at in asked if there[pictures[at].concept] > own]
        self.without = len(asked) - len(self.queries)
        concepts = np.array([one.concept for one in pictures])
        self.correct: Bool[np.ndarray, "query candidate"] = self._left(
            concepts[self.queries][:, None] == concepts[self._others][None, :]
        )
        self.groups = tuple(pictures[at].concept for at in self.queries)

    def evaluate(self, vectors: Float[np.ndarray, "picture d"]) -> NeighborResult:
        """Look up each picture.

        Args:
            vectors: Unit vectors of all pictures.

        Raises:
            NumericsError: A vector is not finite.
        """
        similarity = self._left(vectors[self.queries] @ vectors[self._others].T)
        return NeighborResult(similarity, first_ranks(similarity, self.correct))

    def answers(self, result: NeighborResult, *, limit: int | None = None) -> list[dict[str, Any]]:
        """The five nearest of each picture, or of the first few, as records of ``predictions.jsonl``."""
        found: list[dict[str, Any]] = []
        for row, at in enumerate(self.queries[: limit or None]):
            one = self.pictures[at]
            others = [other for other in self._others if other != at]
            order = np.argsort(-result.similarity[row], kind="stable")[:5]
            near = [(self.pictures[others[int(place)]], result.similarity[row, place]) for place in order]
            top = [
                {"text": other.name, "score": round(float(score), 4), "id": other.id, "uri": other.uri}
                for other, score in near
            ]
            found.append(
                {
                    "id": one.id,
                    "split": self.split,
                    "uri": one.uri,
                    "concept": one.concept,
                    "truth": one.name,
                    "rank": int(result.ranks[row]),
                    "top": top,
                }
            )
        return found

    def _left(self, table: np.ndarray) -> np.ndarray:
        """Without the column of the picture itself."""
        if self.among == "among-train":
            return table
        kept = np.array(self._others)[None, :] != np.array(self.queries, dtype=int)[:, None]
        return table[kept].reshape(len(self.queries), max(0, len(self._others) - 1))


def neighbor_tasks(pictures: Sequence[Shown], splits: Sequence[str], *, seed: int) -> list[NeighborTask]:
    """All that can be asked of some splits.

    Args:
        pictures: Of all splits, those of training among them.
        splits: Test splits.
        seed: Seed of the bootstrap.
    """
    kinds: tuple[Among, ...] = ("among-train", "among-new")
    tasks = [NeighborTask(pictures, split=split, among=among, seed=seed) for split in splits for among in kinds]
    return [task for task in tasks if task.queries]


def compare(task: NeighborTask, trained: NeighborResult, untrained: NeighborResult) -> list[Score]:
    """Scores of a trained tower beside chance and its own untrained weights.

    Names are ``neighbors/<split>/<among>/<metric>`` for the tower, with ``/chance``, ``/untrained`` and (of R@1, as a
    paired difference) ``/gain-over-untrained`` behind for the rest.
    """
    name = f"neighbors/{task.name}"

    def ranked(result: NeighborResult) -> list[Score]:
        return rank_scores(result.ranks, name=name, groups=task.groups, seed=task.seed)

    return [
        *ranked(trained),
        *(beside(score, "chance") for score in chance_scores(task.correct, name=name)),
        *(beside(score, "untrained") for score in ranked(untrained)),
        paired_difference(
            (trained.ranks <= 1).astype(np.float64),
            (untrained.ranks <= 1).astype(np.float64),
            name=f"{name}/R@1/gain-over-untrained",
            rule="hit@1/any-correct/ties-worst",
            groups=task.groups,
            seed=task.seed,
        ),
    ]


def said(task: NeighborTask, scores: Mapping[str, Score]) -> str:
    """One line about a task.

    Args:
        task: Which.
        scores: By name, from :func:`compare`.
    """
    key = f"neighbors/{task.name}/R@1"
    one, chance, gain = scores[key], scores[f"{key}/chance"], scores[f"{key}/gain-over-untrained"]
    nearest = "training picture" if task.among == "among-train" else "other picture of a new concept"
    left = f"; {task.without:,} have no other of their concept" if task.without else ""
    return (
        f"{task.split}: the nearest {nearest} shows the same for {one.value:.1%} of {one.n:,} pictures "
        f"(95 % {one.low:.1%} to {one.high:.1%}; chance {chance.value:.2%}; "
        f"over the untrained tower {gain.low:+.1%} to {gain.high:+.1%}){left}"
    )
