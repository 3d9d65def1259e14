"""Nearest neighbors among pictures: against loops, a closed form for chance, and what leave-one-out leaves out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.core.errors import NumericsError
from plait.evaluation.picture_neighbors import NeighborTask, Shown, compare, neighbor_tasks, said

SPLITS = ("train", "test-concept", "test-style", "test-both")


def shown(number: int, split: str, concept: str) -> Shown:
    return Shown(
        id=f"s{number}", split=split, concept=concept, name=f"a {concept}", uri=f"{split}-000.tar#{number}.png"
    )


def some() -> list[Shown]:
    """Concepts a to d are trained on, the others are new; h is there once."""
    of = {"train": "abcda", "test-concept": "efgh", "test-style": "abd", "test-both": "effg"}
    return [
        shown(10 * at + number, split, concept)
        for at, (split, concepts) in enumerate(of.items())
        for number, concept in enumerate(concepts)
    ]


def unit(number: int, seed: int = 0, width: int = 4) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(number, width))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def by_hand(pictures: list[Shown], vectors: np.ndarray, split: str) -> dict[str, int]:
    """Rank of the nearest picture of the same concept, for each that has one."""
    trained = {one.concept for one in pictures if one.split == "train"}
    found: dict[str, int] = {}
    for at, one in enumerate(pictures):
        if one.split != split:
            continue
        old = one.concept in trained
        others = [
            other
            for other, two in enumerate(pictures)
            if other != at and (two.split == "train") == old and (old or two.concept not in trained)
        ]
        right = [float(vectors[at] @ vectors[o]) for o in others if pictures[o].concept == one.concept]
        wrong = [float(vectors[at] @ vectors[o]) for o in others if pictures[o].concept != one.concept]
        if right:
            found[one.id] = 1 + sum(score >= max(right) for score in wrong)
    return found


@given(
    concepts=st.lists(st.sampled_from("abcdef"), min_size=4, max_size=14),
    where=st.lists(st.sampled_from(SPLITS), min_size=14, max_size=14),
    seed=st.integers(0, 100),
)
@settings(max_examples=60)
def test_ranks_are_those_of_a_loop(concepts: list[str], where: list[str], seed: int) -> None:
    pictures = [shown(at, split, concept) for at, (concept, split) in enumerate(zip(concepts, where, strict=False))]
    vectors = unit(len(pictures), seed)
    for split in SPLITS[1:]:
        found: dict[str, int] = {}
        for task in neighbor_tasks(pictures, [split], seed=0):
            assert task.name in (f"{split}/among-train", f"{split}/among-new")
            result = task.evaluate(vectors)
            ids = [pictures[at].id for at in task.queries]
            found |= dict(zip(ids, result.ranks.tolist(), strict=True))
            assert result.recall_at_1() == pytest.approx(np.mean([rank == 1 for rank in result.ranks]))
        assert found == by_hand(pictures, vectors, split)


def test_each_split_is_asked_what_it_can_be() -> None:
    tasks = neighbor_tasks(some(), SPLITS[1:], seed=0)
    assert [task.name for task in tasks] == ["test-concept/among-new", "test-style/among-train", "test-both/among-new"]
    assert [len(task.queries) for task in tasks] == [3, 3, 4]
    assert [task.without for task in tasks] == [1, 0, 0]
    # 8 pictures of new concepts, less the one that asks; the 5 of training.
    assert [task.correct.shape[1] for task in tasks] == [7, 5, 7]
    assert tasks[0].correct.sum(1).tolist() == [1, 2, 1]
    assert neighbor_tasks([one for one in some() if one.concept == "h"], SPLITS[1:], seed=0) == []


def test_no_picture_is_its_own_neighbor() -> None:
    (task, *_) = neighbor_tasks(some(), SPLITS[1:], seed=0)
    result = task.evaluate(unit(len(some())))
    for answer in task.answers(result):
        assert answer["id"] not in [near["id"] for near in answer["top"]]
        assert len(answer["top"]) == 5


def test_answers_are_the_nearest_in_order() -> None:
    pictures, vectors = some(), unit(len(some()), 3)
    place = {one.id: at for at, one in enumerate(pictures)}
    for task in neighbor_tasks(pictures, SPLITS[1:], seed=0):
        result = task.evaluate(vectors)
        answers = task.answers(result)
        assert len(task.answers(result, limit=2)) == 2
        for answer in answers:
            scores = [near["score"] for near in answer["top"]]
            assert scores == sorted(scores, reverse=True)
            for near in answer["top"]:
                cosine = vectors[place[answer["id"]]] @ vectors[place[near["id"]]]
                assert near["score"] == pytest.approx(cosine, abs=1e-4)
            first_right = pictures[place[answer["top"][0]["id"]]].concept == answer["concept"]
            assert first_right == (answer["rank"] == 1)


def test_scores_stand_beside_chance_and_the_untrained_tower() -> None:
    pictures = some()
    perfect = np.eye(8)[[ord(one.concept) - ord("a") for one in pictures]]
    for task in neighbor_tasks(pictures, SPLITS[1:], seed=0):
        raw = task.evaluate(unit(len(pictures), 5))
        scores = {score.name: score for score in compare(task, task.evaluate(perfect), raw)}
        key = f"neighbors/{task.name}/R@1"
        assert scores[key].value == 1.0
        assert scores[f"{key}/chance"].value == pytest.approx(task.correct.mean())
        assert scores[f"{key}/untrained"].value == pytest.approx(raw.recall_at_1())
        assert scores[f"{key}/gain-over-untrained"].value == pytest.approx(1 - raw.recall_at_1())
        assert {score.n for score in scores.values()} == {len(task.queries)}
        line = said(task, scores)
        assert line.startswith(f"{task.split}: the nearest ")
        assert "100.0% of" in line
        assert ("have no other of their concept" in line) == bool(task.without)


def test_equal_vectors_find_nothing() -> None:
    pictures = some()
    for task in neighbor_tasks(pictures, SPLITS[1:], seed=0):
        assert task.evaluate(np.ones((len(pictures), 3)) / 3**0.5).recall_at_1() == 0.0


def test_what_is_no_number_is_refused() -> None:
    pictures = some()
    broken = unit(len(pictures))
    broken[3] = np.nan
    task = NeighborTask(pictures, split="test-style", among="among-train")
    with pytest.raises(NumericsError, match="NaN"):
        task.evaluate(broken)
