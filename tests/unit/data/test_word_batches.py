from __future__ import annotations

from collections import Counter

import torch
from hypothesis import given
from hypothesis import strategies as st

from plait.core.tensors import IGNORE
from plait.data.features import FeatureStore
from plait.data.word_batches import WordBatches, WordList

NAMES = [[7, 3], [5], [3, 9, 4, 7]]


def test_targets_are_the_words_in_order_then_filler() -> None:
    words = WordList.of(NAMES, filler=1)
    assert words.token_ids == (1, 3, 4, 5, 7, 9)
    assert words.token_ids[words.filler] == 1
    targets = words.targets([*NAMES, [8, 3]], count=3)
    spelled = [[words.token_ids[row] if row != IGNORE else None for row in name] for name in targets.tolist()]
    # The third name is cut at three tokens; the last has a word that no name of the list has.
    assert spelled == [[7, 3, 1], [5, 1, 1], [3, 9, 4], [None, 3, 1]]


def test_a_filler_that_a_name_has_is_in_the_list_once() -> None:
    words = WordList.of(NAMES, filler=3)
    assert words.token_ids == (3, 4, 5, 7, 9)
    assert words.filler == 0


@given(names=st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=6), min_size=1), filler=st.integers(0, 30))
def test_targets_spell_the_names(names: list[list[int]], filler: int) -> None:
    words = WordList.of(names, filler=filler)
    for name, rows in zip(names, words.targets(names, count=4).tolist(), strict=True):
        assert [words.token_ids[row] for row in rows] == (name + [filler] * 4)[:4]


def store(view: int, pictures: int) -> FeatureStore:
    """Picture 5 in view 2 is one cell with the features 5, 2."""
    made = FeatureStore(2, torch.float32)
    for picture in range(pictures):
        made.add(torch.tensor([[float(picture), float(view)]]), [(f"{picture:064}", 1, 1, 1)])
    return made


def source(pictures: int = 10, batch_size: int = 4, *, views: int = 3, seed: int = 0) -> WordBatches:
    names = torch.arange(pictures) % len(NAMES)
    return WordBatches(
        [f"{picture:064}" for picture in range(pictures)],
        names,
        targets=WordList.of(NAMES, filler=1).targets(NAMES, count=2),
        stores=[store(view, pictures) for view in range(views)],
        batch_size=batch_size,
        seed=seed,
    )


def test_a_step_is_the_same_whatever_came_before() -> None:
    used, fresh = source(), source()
    (before,) = [used.step_batches(step) for step in (3, 0, 9, 7)][-1]
    (now,) = fresh.step_batches(7)
    assert torch.equal(before.media["image"].values, now.media["image"].values)
    assert torch.equal(before.labels, now.labels)
    assert not torch.equal(source(seed=1).step_batches(7)[0].media["image"].values, now.media["image"].values)


@given(pictures=st.integers(1, 12), batch_size=st.integers(1, 20), seed=st.integers(0, 3))
def test_every_picture_comes_once_an_epoch(pictures: int, batch_size: int, seed: int) -> None:
    batches = source(pictures, batch_size, seed=seed)
    stream: list[int] = []
    for step in range(pictures):
        (batch,) = batches.step_batches(step)
        stream += [int(values[0]) for values in batch.media["image"].values]
    # Inside a batch pictures are sorted by view, so epochs are counted where batches and epochs end together.
    assert set(Counter(stream).values()) == {min(batch_size, pictures)}


def test_labels_belong_to_the_pictures_and_every_view_is_seen() -> None:
    batches, words = source(), WordList.of(NAMES, filler=1).targets(NAMES, count=2)
    views: Counter[int] = Counter()
    for step in range(200):
        (batch,) = batches.step_batches(step)
        pictures = [int(value) for value in batch.media["image"].values[:, 0]]
        views.update(int(value) for value in batch.media["image"].values[:, 1])
        assert batch.labels[:, -1].tolist() == [picture % len(NAMES) for picture in pictures]
        assert torch.equal(batch.labels[:, :-1], words[batch.labels[:, -1]])
        assert batch.sample_ids == tuple(f"{picture:064}"[:12] for picture in pictures)
        assert batch.encoded
    # 800 draws from three views: 4 standard errors are 53.
    assert all(abs(views[view] - 800 / 3) < 54 for view in range(3))
