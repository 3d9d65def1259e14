from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from plait.core.errors import ConfigError, DataError
from plait.data.features import FeatureStore
from plait.data.pair_batches import PairBatches, StoredPixels, exact, picked


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


def test_all_levels_of_a_pixel_survive_16_bits():
    levels = torch.arange(256, dtype=torch.uint8).float().div_(255).view(-1, 1).expand(-1, 3)
    assert torch.equal(exact(levels.half()), levels)
    assert not torch.equal(levels.half().float(), levels)


def stored(pairs: int) -> tuple[StoredPixels, dict[str, torch.Tensor]]:
    """Pictures of 1 x 2, 2 x 2, 3 x 2 ... pixels as a cache keeps them, and as they were."""
    store, raw = FeatureStore(3, torch.float16), {}
    torch.manual_seed(0)
    for i in range(pairs):
        raw[f"p{i}"] = torch.randint(0, 256, ((i + 1) * 2, 3)).float().div_(255)
        store.add(raw[f"p{i}"].half(), [(f"p{i}", 1, i + 1, 2)])
    names = tuple(f"p{i}" for i in range(pairs))
    return StoredPixels(store=store, sha256s=names, device=torch.device("cpu")), raw


def test_pixels_come_in_the_order_of_the_batch_and_as_they_were():
    pixels, raw = stored(6)
    features = source(pairs=6, batch_size=4)
    batches = PairBatches(
        image=pixels,
        text=features.text,
        texts_of=features.texts_of,
        classes=features.classes,
        ids=features.ids,
        batch_size=4,
        seed=0,
    )
    for step in range(4):
        (batch,), (other,) = batches.step_batches(step), features.step_batches(step)
        assert batch.sample_ids == other.sample_ids
        assert torch.equal(batch.media["text"].values, other.media["text"].values)
        numbers = [int(i[1:]) for i in batch.sample_ids]
        assert batch.media["image"].grid.tolist() == [[1, n + 1, 2] for n in numbers]
        assert torch.equal(batch.media["image"].values, torch.cat([raw[f"p{n}"] for n in numbers]))


def test_a_picture_that_is_not_stored_is_said():
    pixels, _ = stored(2)
    lost = StoredPixels(store=pixels.store, sha256s=("p0", "gone"), device=pixels.device)
    assert len(lost) == 2
    with pytest.raises(DataError, match="1 of 2 items have no cached features; the first is gone"):
        picked(lost, [0, 1])


def test_pairs_have_one_of_their_sounds_and_those_without_are_left_out_of_them():
    sounds_of = [(0, 1), (), (2,), (), (3, 4, 5)]
    batches = PairBatches(
        image=torch.zeros(5, 1),
        text=torch.zeros(5, 1),
        texts_of=[(i,) for i in range(5)],
        classes=torch.arange(5),
        ids=[f"s{i}" for i in range(5)],
        batch_size=5,
        seed=0,
        audio=torch.arange(6).float()[:, None],
        sounds_of=sounds_of,
    )
    seen: Counter[int] = Counter()
    for step in range(200):
        (batch,) = batches.step_batches(step)
        pairs = [int(batch.sample_ids[int(place)][1:]) for place in batch.item_row["audio"]]
        heard = batch.media["audio"].values[:, 0].int().tolist()
        assert sorted(pairs) == [0, 2, 4]
        assert all(sound in sounds_of[pair] for sound, pair in zip(heard, pairs, strict=True))
        seen.update(heard)
    assert min(seen[sound] for sound in (3, 4, 5)) > 40  # any of them, 67 times on average
    silent = PairBatches(
        image=torch.zeros(2, 1),
        text=torch.zeros(2, 1),
        texts_of=[(0,), (1,)],
        classes=torch.arange(2),
        ids=["a", "b"],
        batch_size=2,
        seed=0,
        audio=torch.zeros(0, 1),
        sounds_of=[(), ()],
    )
    assert "audio" not in silent.step_batches(0)[0].media


def heard(pairs: int, **changes: int) -> PairBatches:
    """Pairs of which some have sounds, in a batch of all but one."""
    whole = source(pairs, pairs - 1, extra=3)
    return PairBatches(
        image=whole.image,
        text=whole.text,
        texts_of=whole.texts_of,
        classes=whole.classes,
        ids=whole.ids,
        batch_size=whole.batch_size,
        seed=0,
        audio=torch.arange(2 * pairs).float()[:, None],
        sounds_of=[(i, pairs + i) if i % 3 else () for i in range(pairs)],
        **changes,
    )


@given(st.integers(4, 12), st.integers(1, 3), st.integers(0, 12), st.integers(0, 5))
def test_micro_batches_and_ranks_are_the_whole_batch_in_pieces(pairs: int, world: int, micro: int, step: int):
    (whole,) = heard(pairs).step_batches(step)
    shares = [heard(pairs, rank=rank, world=world, micro_batch=micro).step_batches(step) for rank in range(world)]
    pieces = [piece for share in shares for piece in share]
    sizes = [sum(len(piece.sample_ids) for piece in share) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    assert all(len(piece.sample_ids) <= (micro or pairs) for piece in pieces)
    assert tuple(i for piece in pieces for i in piece.sample_ids) == whole.sample_ids
    assert torch.equal(torch.cat([piece.labels for piece in pieces]), whole.labels)
    for side in ("image", "text"):
        assert torch.equal(torch.cat([piece.media[side].values for piece in pieces]), whole.media[side].values)
    said = [
        (piece.sample_ids[int(row)], value)
        for piece in pieces
        if "audio" in piece.media
        for row, value in zip(piece.item_row["audio"], piece.media["audio"].values[:, 0].tolist(), strict=True)
    ]
    expected = zip(whole.item_row["audio"], whole.media["audio"].values[:, 0].tolist(), strict=True)
    assert said == [(whole.sample_ids[int(row)], value) for row, value in expected]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"world": 9}, "samples for 9 processes"),
        ({"rank": 2, "world": 2}, "rank 2 of 2"),
        ({"micro_batch": -1}, "of -1"),
    ],
)
def test_a_part_that_is_none_is_refused(changes: dict[str, int], match: str):
    with pytest.raises(ConfigError, match=match):
        heard(6, **changes)
