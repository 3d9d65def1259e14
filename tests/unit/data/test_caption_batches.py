"""Batches of pictures and token ids: aligned, repeatable, and only names are trained."""

from __future__ import annotations

import torch

from plait.core.tensors import IGNORE
from plait.data.caption_batches import CaptionBatches
from plait.data.features import FeatureStore

TEXTS = [[1, 5, 2], [1, 6, 7, 2], [1, 8, 2], [1, 9, 9, 9, 2]]


def batches(*, seed: int = 0, texts_of: tuple[tuple[int, ...], ...] = ((0, 3), (1,), (2, 3))) -> CaptionBatches:
    """Three pictures of two cells; the value of a cell is its picture's number."""
    store = FeatureStore(d_out=4, dtype=torch.float32)
    values = torch.arange(3.0).repeat_interleave(2)[:, None].expand(6, 4)
    store.add(values, [(f"sha-{i}", 1, 1, 2) for i in range(3)])
    shas = tuple(f"sha-{i}" for i in range(3))
    return CaptionBatches(
        store=store,
        sha256s=shas,
        texts=TEXTS,
        texts_of=texts_of,
        ids=("a", "b", "c"),
        batch_size=2,
        seed=seed,
        pad=0,
    )


def test_pictures_texts_and_ids_of_a_row_belong_together_and_only_names_are_trained():
    drawn, epochs = set[str](), [0, 0, 0]
    for step in range(30):
        (batch,) = batches().step_batches(step)
        cells = batch.media["image"].values.view(2, 2, 4)
        assert batch.encoded
        for row, name in enumerate(batch.sample_ids):
            number = "abc".index(name)
            epochs[number] += 1
            assert bool((cells[row] == number).all())
            real = batch.segment_ids[row] == 1
            ids = batch.token_ids[row][real].tolist()
            is_name = ids == TEXTS[number]
            assert is_name or (ids == TEXTS[3] and number != 1)
            drawn.add(name + ("" if is_name else " other"))
            assert bool((batch.token_ids[row][~real] == 0).all())
            trained = ids if is_name else [IGNORE] * len(ids)
            assert batch.labels[row].tolist() == [*trained, *[IGNORE] * int((~real).sum())]
    assert drawn == {"a", "b", "c", "a other", "c other"}
    assert epochs == [20, 20, 20]


def test_a_step_is_always_the_same_and_seeds_differ():
    one, again = (batches().step_batches(7)[0] for _ in range(2))
    assert torch.equal(one.token_ids, again.token_ids)
    assert one.sample_ids == again.sample_ids
    orders = {tuple(batches(seed=seed).step_batches(step)[0].sample_ids for step in range(6)) for seed in range(4)}
    assert len(orders) > 1
