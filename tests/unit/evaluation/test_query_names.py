"""Judging puts only the nearest in a new order; writing is greedy and ends."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from plait.assembly.pairs import Texts
from plait.assembly.queries import TextTokens, load_tokens
from plait.core.errors import NumericsError
from plait.data.features import FeatureStore
from plait.evaluation.query_names import QueryTask, _before
from plait.models.blip2 import Blip2Stage1
from plait.models.connectors.query import QFormer, QFormerSizes

NAMES = ("cat", "dog", "owl", "cow", "bee")


@pytest.fixture
def words(tiny_folders: dict[str, Any]) -> TextTokens:
    return load_tokens(str(tiny_folders["text"]))


def task(words: TextTokens) -> tuple[QueryTask, Blip2Stage1]:
    torch.manual_seed(0)
    store = FeatureStore(d_out=6, dtype=torch.float32)
    store.add(torch.randn(20, 6), [(name, 1, 2, 2) for name in NAMES])
    pairs = Texts(
        ids=NAMES,
        names=NAMES,
        concepts=NAMES,
        uris=NAMES,
        sha256s=NAMES,
        texts=NAMES,
        texts_of=tuple((i,) for i in range(5)),
        classes=tuple(range(5)),
    )
    sizes = QFormerSizes(
        d_source=6, d=16, depth=2, heads=2, queries=3, every=1, vocabulary=words.start + 1, max_tokens=16
    )
    model = Blip2Stage1(torch.nn.Identity(), QFormer(sizes), start=words.start, d_shared=8).eval()
    return QueryTask(pairs, store, words, name="test", seed=0), model


def test_similarity_and_judging_are_those_of_one_pair_at_a_time(words: TextTokens) -> None:
    asked, model = task(words)
    result = asked.evaluate(model)
    sure = np.zeros((5, 5))
    with torch.no_grad():
        for i in range(5):
            source = asked._look(model, [i])
            for j, name in enumerate(asked.gallery.texts):
                ids = torch.tensor(words.ids([name]))
                present = torch.ones_like(ids, dtype=torch.bool)
                near = model.contrast.similarity(model.embed_image(source), model.embed_text(ids, present))
                assert result.similarity[i, j] == pytest.approx(near.item(), abs=1e-6)
                judged = model.judge(source, ids, present)[0]
                sure[i, j] = judged[1] - judged[0]
    ranks = asked.judge(model, result, most=5)  # all of them are judged: what is nearest decides nothing
    place = [asked.gallery.texts.index(name) for name in NAMES]
    right = sure[np.arange(5), place]
    assert ranks["image-to-text"].tolist() == (1 + (sure > right[:, None]).sum(1)).tolist()
    kept = asked.judge(model, result, most=1)  # one alone has no order
    assert kept["image-to-text"].tolist() == result.directions["image-to-text"].ranks.tolist()


def test_writing_ends_and_scores_are_named(words: TextTokens) -> None:
    asked, model = task(words)
    written = asked.write(model)
    assert len(written) == 5
    assert len(asked.write(model, limit=2)) == 2
    assert all("[" not in name for name in written), "special tokens are not read out"
    scores = {score.name: score for score in asked.further_scores(model, asked.evaluate(model))}
    assert "retrieval/test/image-to-text/R@1/judged" in scores
    assert scores["writing/test/name/exact-match"].n == 5


@given(st.data())
def test_the_few_come_first_and_the_rest_keep_its_order(data: st.DataObject) -> None:
    candidates = data.draw(st.integers(2, 7))
    seed, few = data.draw(st.integers(0, 1000)), data.draw(st.integers(1, candidates))
    rng = np.random.default_rng(seed)
    near, sure = rng.normal(size=(3, candidates)), 5 * rng.normal(size=(3, candidates))
    first = np.argsort(-near, axis=1)[:, :few]
    order = np.argsort(-_before(near, first, sure), axis=1)
    for row in range(3):
        assert set(order[row, :few]) == set(first[row])
        assert list(order[row, :few]) == sorted(first[row], key=lambda c: -sure[row, c])
        assert list(order[row, few:]) == [c for c in np.argsort(-near[row]) if c not in set(first[row])]


def test_vectors_that_are_no_numbers_name_the_split_and_what_to_do(words: TextTokens) -> None:
    asked, _ = task(words)
    similarity = np.zeros((5, 5))
    similarity[1, 2] = np.nan
    with pytest.raises(NumericsError, match="of 1 of 5 pictures the model makes no numbers") as error:
        asked.result(similarity)
    assert error.value.place == "split test"
    assert "learning rate" in error.value.remedy
