from __future__ import annotations

from collections import Counter

import torch
from hypothesis import given
from hypothesis import strategies as st

from plait.data.pair_batches import PairBatches


def source(pairs: int = 10, batch_size: int = 4, seed: int = 0, extra: int = 0) -> PairBatches:
    return PairBatches(
        image=torch.arange(pairs).float()[:, None],
        text=torch.arange(pairs + extra).float()[:, None] * 10,
        texts_of=[(i, *range(pairs, pairs + extra)) for i in range(pairs)],
        classes=torch.arange(pairs) // 2,
        ids=[f"s{i}" for i in range(pairs)],
        batch_size=batch_size,
        seed=seed,
    )


@given(st.integers(1, 12), st.integers(1, 30), st.integers(0, 3))
def test_every_pair_comes_equally_often(pairs: int, batch_size: int, seed: int):
    batches = source(pairs, batch_size, seed)
    # pairs steps of batch_size pairs are exactly batch_size epochs.
    seen = Counter(i for step in range(pairs) for i in batches.step_batches(step)[0].sample_ids)
    assert set(seen.values()) == {batch_size}
    assert len(seen) == pairs


def test_a_step_is_the_same_whatever_came_before():
    long, fresh = source(extra=3), source(extra=3)
    for step in range(20):
        (before,) = long.step_batches(step)
    (now,) = fresh.step_batches(19)
    assert before.sample_ids == now.sample_ids
    assert torch.equal(before.media["text"].values, now.media["text"].values)
    assert source(seed=1).step_batches(19)[0].sample_ids != now.sample_ids


def test_sides_and_classes_belong_together():
    (batch,) = source().step_batches(3)
    rows = [int(i[1:]) for i in batch.sample_ids]
    assert batch.media["image"].values[:, 0].tolist() == rows
    assert batch.media["text"].values[:, 0].tolist() == [10 * row for row in rows]
    assert batch.labels[:, 0].tolist() == [row // 2 for row in rows]
    assert batch.media["image"].grid.tolist() == [[1, 1, 1]] * len(rows)


def test_the_main_text_is_taken_half_the_time_and_more():
    batches = source(pairs=10, batch_size=10, extra=3)
    texts = [t for step in range(200) for t in batches.step_batches(step)[0].media["text"].values[:, 0].tolist()]
    share = sum(t < 100 for t in texts) / len(texts)
    assert abs(share - (0.5 + 0.5 / 4)) < 0.04  # 2,000 draws: 3.6 standard errors
    assert {100.0, 110.0, 120.0} <= set(texts)
