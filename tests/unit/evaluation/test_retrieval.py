from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.core.errors import DataError, NumericsError
from plait.evaluation.retrieval import Gallery, chance_scores, first_ranks, rank_scores

pytestmark = pytest.mark.light


def brute_force_rank(scores, correct) -> int:
    """The definition: sort by score, wrong before right among equals; the position of the first right one."""
    order = sorted(range(len(scores)), key=lambda j: (-scores[j], correct[j]))
    return 1 + next(place for place, j in enumerate(order) if correct[j])


@st.composite
def problems(draw):
    candidates = draw(st.integers(1, 8))
    queries = draw(st.integers(1, 6))
    # Few distinct values, so that ties are common.
    scores = draw(
        st.lists(
            st.lists(st.sampled_from([-1.0, 0.0, 0.5]), min_size=candidates, max_size=candidates),
            min_size=queries,
            max_size=queries,
        )
    )
    correct = [[draw(st.booleans()) for _ in range(candidates)] for _ in range(queries)]
    for row in correct:
        row[draw(st.integers(0, candidates - 1))] = True
    return np.array(scores), np.array(correct)


@pytest.mark.row("S4-137")
@pytest.mark.row("S2-15")
@given(problems())
def test_ranks_follow_the_definition(problem):
    scores, correct = problem
    expected = [brute_force_rank(s, c) for s, c in zip(scores.tolist(), correct.tolist(), strict=True)]
    assert first_ranks(scores, correct).tolist() == expected
    by_name = {s.name: s.value for s in rank_scores(first_ranks(scores, correct), name="t")}
    for k in (1, 5, 10):
        assert by_name[f"t/R@{k}"] == pytest.approx(np.mean([r <= k for r in expected]))
    assert by_name["t/MRR"] == pytest.approx(np.mean([1 / r for r in expected]))


@given(problems(), st.integers(0, 5))
def test_order_of_candidates_does_not_matter(problem, seed: int):
    scores, correct = problem
    order = np.random.default_rng(seed).permutation(scores.shape[1])
    assert first_ranks(scores, correct).tolist() == first_ranks(scores[:, order], correct[:, order]).tolist()


def test_a_model_that_says_the_same_to_all_finds_nothing():
    scores = rank_scores(first_ranks(np.zeros((20, 20)), np.eye(20, dtype=bool)), name="t")
    assert [s.value for s in scores[:3]] == [0.0, 0.0, 0.0]
    assert all("ties-worst" in s.rule for s in scores)


def test_any_of_several_correct_candidates_counts():
    # torchmetrics' recall would give 0.2 here.
    correct = np.zeros((1, 25), dtype=bool)
    correct[0, :5] = True
    assert rank_scores(first_ranks(np.linspace(1, 0, 25)[None], correct), name="t")[0].value == 1.0


def test_chance_is_what_random_orders_give():
    rng = np.random.default_rng(0)
    correct = np.zeros((3, 30), dtype=bool)
    for row, count in enumerate((1, 4, 11)):
        correct[row, :count] = True
    trials = 4000
    ranks = np.concatenate([first_ranks(rng.random((3, 30)), correct) for _ in range(trials)])
    expected = {s.name: s for s in chance_scores(correct, name="t")}
    for k in (1, 5, 10):
        assert expected[f"t/R@{k}"].value == pytest.approx(np.mean(ranks <= k), abs=0.015)
    assert expected["t/MRR"].value == pytest.approx(np.mean(1 / ranks), abs=0.015)
    assert expected["t/MRR"].low == expected["t/MRR"].high


def test_chance_closed_forms():
    one = {s.name: s.value for s in chance_scores(np.eye(300, dtype=bool), name="t")}
    assert one["t/R@1"] == pytest.approx(1 / 300)
    assert one["t/R@10"] == pytest.approx(10 / 300)
    assert one["t/MRR"] == pytest.approx(sum(1 / r for r in range(1, 301)) / 300)
    few = {s.name: s.value for s in chance_scores(np.eye(3, dtype=bool), name="t")}
    assert few["t/R@5"] == 1.0


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(DataError, match="1 of 2 queries have no correct candidate, the first is query 1"):
        first_ranks(np.zeros((2, 2)), np.array([[True, False], [False, False]]))
    with pytest.raises(NumericsError, match="1 of 2 queries have NaN"):
        first_ranks(np.array([[0.0, np.nan], [0.0, 1.0]]), np.ones((2, 2), dtype=bool))


def test_gallery_forgives_other_pictures_and_other_names_of_the_concept():
    gallery = Gallery(["cat", "tom cat", "dog", "cat"], ["c", "c", "d", "c"])
    assert gallery.texts == ("cat", "dog", "tom cat")
    assert gallery.correct.tolist() == [
        [True, False, True],
        [True, False, True],
        [False, True, False],
        [True, False, True],
    ]
    # Each picture is nearest to the other name of its concept, and the dog to a cat.
    similarity = np.array([[0.1, 0.0, 0.9], [0.9, 0.0, 0.1], [0.8, 0.7, 0.0], [0.1, 0.0, 0.9]])
    found = gallery.directions(similarity)
    assert found["image-to-text"].ranks.tolist() == [1, 1, 2, 1]
    assert found["image-to-text"].groups == ("c", "c", "d", "c")
    assert found["text-to-image"].ranks.tolist() == [1, 1, 1]
    assert found["text-to-image"].groups == ("c", "d", "c")
    assert gallery.nearest(similarity[2], 2) == [("cat", 0.8), ("dog", 0.7)]


@pytest.mark.row("S3-11")
def test_sounds_of_some_texts_are_found_and_find_as_if_ranked_one_by_one():
    names, concepts = ["cat", "tom cat", "dog", "cat", "cow"], ["c", "c", "d", "c", "w"]
    gallery = Gallery(names, concepts)  # cat, cow, dog, tom cat
    said = [0, 2, 3]  # nobody says cow
    rng = np.random.default_rng(0)
    images, texts = rng.normal(size=(5, 3)), rng.normal(size=(4, 3))
    found = gallery.heard(images, texts, said=said)
    of_sound, of_text = ["c", "d", "c"], ["c", "w", "d", "c"]

    def rank(scores: np.ndarray, right: list[bool]) -> int:
        best = max(s for s, r in zip(scores, right, strict=True) if r)
        return 1 + sum(s >= best and not r for s, r in zip(scores, right, strict=True))

    for way, scores, queries, candidates in (
        ("image-to-audio", images, concepts, of_sound),
        ("text-to-audio", texts, of_text, of_sound),
        ("audio-to-image", images.T, of_sound, concepts),
        ("audio-to-text", texts.T, of_sound, of_text),
    ):
        asked = [q for q, concept in enumerate(queries) if concept in candidates]
        assert len(asked) == len(queries) - (way in {"image-to-audio", "text-to-audio"})
        expected = [rank(scores[q], [queries[q] == c for c in candidates]) for q in asked]
        assert found[way].ranks.tolist() == expected
        assert found[way].groups == tuple(queries[q] for q in asked)
