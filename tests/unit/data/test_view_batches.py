"""Batches of views: the same bits for any ranks, micro-batches and workers, each picture's own views."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from plait.assembly.contract import ImageContract
from plait.core.errors import ConfigError
from plait.core.tensors import IGNORE, Batch
from plait.data.augment.pictures import change, draws
from plait.data.augment.settings import Changes
from plait.data.loader import Loader
from plait.data.view_batches import ViewBatches

NUMBER = 7


class Noise:
    """Pictures of several sizes."""

    def __len__(self) -> int:
        return NUMBER

    def __getitem__(self, number: int) -> Image.Image:
        rng = np.random.default_rng(number)
        return Image.fromarray(rng.integers(0, 256, (9 + number, 12, 3), dtype=np.uint8))


def views(**how: Any) -> ViewBatches:
    given: dict[str, Any] = {
        "pictures": Noise(),
        "ids": [f"s{n}" for n in range(NUMBER)],
        "classes": [n // 2 for n in range(NUMBER)],
        "prepare": ImageContract(size=8).prepare,
        "size": 8,
        "changes": Changes(),
        "views": 2,
        "batch_size": 5,
        "seed": 0,
    }
    return ViewBatches(**given | how)


def rows(batches: list[Batch]) -> list[tuple[str, int, bytes]]:
    """Sample, class and the views of each row in order."""
    found = []
    for batch in batches:
        media = batch.media["image"]
        per_row = len(media.values) // len(batch.sample_ids)
        assert batch.item_row["image"].tolist() == sorted(batch.item_row["image"].tolist())
        for at, name in enumerate(batch.sample_ids):
            pixels = media.values[at * per_row : (at + 1) * per_row]
            found.append((name, int(batch.labels[at, 0]), pixels.numpy().tobytes()))
    return found


@pytest.mark.row("S0-40")
@given(step=st.integers(0, 12), world=st.integers(1, 4), micro=st.integers(0, 4))
@settings(max_examples=25)
def test_views_are_the_same_bits_for_any_ranks_and_micro_batches(step: int, world: int, micro: int) -> None:
    whole = rows(views().step_batches(step))
    shares = [views(rank=rank, world=world, micro_batch=micro).step_batches(step) for rank in range(world)]
    assert [row for share in shares for row in rows(share)] == whole
    if micro:
        assert all(len(batch.sample_ids) <= micro for share in shares for batch in share)
    for rank, share in enumerate(shares):
        told = views(rank=rank, world=world, micro_batch=micro).sample_ids(step)
        assert told == [name for batch in share for name in batch.sample_ids]


def test_workers_make_the_very_views() -> None:
    source = views(batch_size=3)
    expected = [rows(source.step_batches(step)) for step in range(4)]
    for workers in (1, 2):
        with Loader(source, steps=4, workers=workers) as loader:
            assert [rows(list(loader.step_batches(step))) for step in range(4)] == expected


def test_what_a_picture_becomes_in_an_epoch_does_not_depend_on_the_size_of_batches() -> None:
    small, large = views(batch_size=1), views(batch_size=NUMBER)
    for epoch in range(2):
        by_step = [row for step in range(NUMBER) for row in rows(small.step_batches(epoch * NUMBER + step))]
        assert by_step == rows(large.step_batches(epoch))
    assert {row[2] for row in rows(large.step_batches(0))}.isdisjoint(row[2] for row in rows(large.step_batches(1)))


def test_each_view_is_made_of_its_own_picture_with_its_own_draws() -> None:
    (batch,) = views(batch_size=NUMBER, views=3).step_batches(1)
    assert batch.item_row["image"].tolist() == [row for row in range(NUMBER) for _ in range(3)]
    assert batch.media["image"].grid.tolist() == [[1, 8, 8]] * (3 * NUMBER)
    items = batch.media["image"].values.view(NUMBER, 3, 64, 3)
    for at, name in enumerate(batch.sample_ids):
        number = int(name[1:])
        for view in range(3):
            rng = draws(0, epoch=1, sample=name, view=view)
            expected = change(Noise()[number], Changes(), size=8, rng=rng)
            pixels = torch.from_numpy(np.array(expected)).view(-1, 3).float() / 255
            assert torch.equal(items[at, view], pixels)
        assert int(batch.labels[at, 0]) == number // 2
    assert set(Counter(batch.sample_ids).values()) == {1}


def test_unknown_classes_are_unknown() -> None:
    (batch,) = views(classes=None).step_batches(0)
    assert batch.labels.unique().tolist() == [IGNORE]


def test_without_a_crop_the_whole_picture_is_fitted() -> None:
    quiet = Changes.model_validate({"crop": None, "flip": 0, "gray": 0, "color": {"chance": 0}, "blur": {"chance": 0}})
    (batch,) = views(changes=quiet, batch_size=NUMBER).step_batches(0)
    items = batch.media["image"].values.view(NUMBER, 2, 64, 3)
    for at, name in enumerate(batch.sample_ids):
        fitted = ImageContract(size=8).prepare(Noise()[int(name[1:])]).values
        assert torch.equal(items[at, 0], fitted)
        assert torch.equal(items[at, 1], fitted)


def test_what_is_no_batch_is_refused() -> None:
    for how in ({"world": 6, "rank": 0}, {"rank": 2}, {"micro_batch": -1}):
        with pytest.raises(ConfigError):
            views(**how)
