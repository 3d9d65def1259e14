"""Ranks: together they train the very step of one process, whatever their number, and none is left waiting."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tests.unit.data import ranks

from plait.core.errors import ConfigError
from plait.core.launch import free_port
from plait.core.tensors import IGNORE, Batch
from plait.core.types import MediaRef
from plait.data.augment.feature_dropout import FeatureDropout
from plait.data.caption_batches import CaptionBatches
from plait.data.conversations import Conversation, ConversationBatches
from plait.data.features import FeatureStore
from plait.data.order import Order, block
from plait.data.pair_batches import PairBatches
from plait.data.template import Rendered
from plait.data.word_batches import WordBatches

# --- conversations -------------------------------------------------------------------------------------------------


def features(count: int, width: int = 2, view: float = 0.0) -> FeatureStore:
    made = FeatureStore(width, torch.float32)
    for number in range(count):
        made.add(torch.full((2, width), number + view), [(f"{number:064}", 1, 1, 2)])
    return made


def conversation(number: int, length: int, *, picture: bool) -> Conversation:
    ref = MediaRef(modality="image", sha256=f"{number:064}", uri=f"{number}.png")
    head = (99, 99) if picture else (5, 6)
    ids = (*head, *(100 * number + place for place in range(length - 2)))
    rendered = Rendered(
        token_ids=ids,
        trained=tuple(place % 3 == 2 for place in range(length)),
        media=(ref,) if picture else (),
        slots=(2,) if picture else (),
    )
    return Conversation(id=f"q{number}", task="picture" if picture else "text", rendered=rendered)


def source(**changes: Any) -> ConversationBatches:
    lengths = [5, 9, 14, 7, 8, 20, 11, 6, 10, 4, 17]
    plain: dict[str, Any] = {
        "conversations": [conversation(n, length, picture=n % 3 != 0) for n, length in enumerate(lengths)],
        "weights": {"picture": 2.0, "text": 1.0},
        "stores": [features(11), features(7, view=0.5)],
        "grid_out": lambda grid: grid,
        "batch_size": 5,
        "row": 24,
        "pad": 0,
        "steps": 7,
        "seed": 0,
        "dropout": FeatureDropout(least=0.1, most=0.9, first=0, full=4, seed=1),
    }
    return ConversationBatches(**plain | changes)


def contents(batches: list[Batch]) -> Counter[str]:
    """What is in the rows that have anything, with their pictures: independent of who holds which row."""
    found: list[str] = []
    for batch in batches:
        ends = (
            dict.fromkeys(range(len(batch.token_ids)), ())
            if "image" not in batch.media
            else {
                row: batch.media["image"].values.view(-1, 4)[batch.item_row["image"] == row].tolist()
                for row in range(len(batch.token_ids))
            }
        )
        for row, ids in enumerate(batch.token_ids):
            if batch.segment_ids[row].any():
                parts = (ids, batch.labels[row], batch.segment_ids[row])
                found.append(str([part.tolist() for part in parts] + [list(ends[row])]))
    return Counter(found)


@settings(max_examples=25)
@given(
    world=st.integers(1, 6),
    pieces=st.integers(1, 3),
    size=st.integers(1, 8),
    group=st.sampled_from([0, 1, 3]),
    step=st.integers(0, 6),
)
def test_all_ranks_together_have_the_step_of_one_process(
    world: int, pieces: int, size: int, group: int, step: int
) -> None:
    one = source(batch_size=size, group_by_length=group)
    parts = [source(batch_size=size, group_by_length=group, rank=r, world=world, pieces=pieces) for r in range(world)]
    micro = [part.step_batches(step) for part in parts]
    assert len({tuple(tuple(batch.token_ids.shape) for batch in found) for found in micro}) == 1, "ranks differ"
    assert contents(list(chain(*micro))) == contents(one.step_batches(step))
    ids = [[i for batch in found for i in batch.sample_ids] for found in micro]
    assert sorted(chain(*ids)) == sorted(one.sample_ids(step))
    assert ids == [part.sample_ids(step) for part in parts]
    counts = [sum(int((batch.labels != IGNORE).sum()) for batch in found) for found in micro]
    assert sum(counts) == int((one.step_batches(step)[0].labels != IGNORE).sum())


@settings(max_examples=12)
@given(before=st.integers(1, 5), after=st.integers(1, 5), at=st.integers(0, 7), group=st.sampled_from([0, 2]))
def test_another_number_of_ranks_goes_on_in_the_same_order(before: int, after: int, at: int, group: int) -> None:
    plan = [sorted(source(group_by_length=group).sample_ids(step)) for step in range(7)]
    for step in range(7):
        world = before if step < at else after
        parts = (source(group_by_length=group, rank=r, world=world).sample_ids(step) for r in range(world))
        assert sorted(chain(*parts)) == plan[step]


def test_an_epoch_over_all_ranks_has_every_sample_equally_often() -> None:
    lengths = [5, 9, 14, 7, 8, 20, 11, 6, 10, 4]
    given_ = [conversation(number, length, picture=True) for number, length in enumerate(lengths)]
    for world, group in ((1, 0), (3, 0), (3, 2), (2, 4)):
        parts = [
            source(
                conversations=given_,
                weights={"picture": 1.0},
                steps=8,
                rank=r,
                world=world,
                group_by_length=group,
                dropout=None,
            )
            for r in range(world)
        ]
        seen = Counter(i for part in parts for step in range(8) for i in part.sample_ids(step))
        assert seen == Counter({f"q{number}": 4 for number in range(10)})  # 8 steps of 5: four epochs


def test_a_rank_reads_only_what_its_rows_need() -> None:
    class Asked(FeatureStore):
        seen: list[str]

        def __call__(self, sha256s: Any) -> Any:
            self.seen += sha256s
            return super().__call__(sha256s)

    store = Asked(2, torch.float32)
    store.seen = []
    whole = features(11)
    for number in range(11):
        store.add(whole([f"{number:064}"]).values, [(f"{number:064}", 1, 1, 2)])
    one = source(stores=[store], rank=1, world=3)
    (batch,) = one.step_batches(2)
    assert {int(sha256) for sha256 in store.seen} == {int(i[1:]) for i in batch.sample_ids if int(i[1:]) % 3}


@pytest.mark.parametrize(("rank", "world"), [(2, 2), (-1, 2), (0, 0)])
def test_a_rank_that_is_not_there_is_refused(rank: int, world: int) -> None:
    with pytest.raises(ConfigError, match=f"rank {rank} of {world}"):
        source(rank=rank, world=world)


# --- a sample a row ------------------------------------------------------------------------------------------------


def pairs(**changes: Any) -> PairBatches:
    draw = torch.Generator().manual_seed(0)
    return PairBatches(
        image=torch.randn(11, 4, generator=draw),
        text=torch.randn(20, 3, generator=draw),
        texts_of=[(n, n + 9) for n in range(11)],
        classes=torch.arange(11) % 4,
        ids=[f"s{n}" for n in range(11)],
        batch_size=7,
        seed=3,
        audio=torch.randn(8, 5, generator=draw),
        sounds_of=[(n,) if n < 8 and n % 2 else () for n in range(11)],
        **changes,
    )


def captions(**changes: Any) -> CaptionBatches:
    return CaptionBatches(
        store=one_item(11),
        sha256s=[f"{n:064}" for n in range(11)],
        texts=[tuple(range(1, 3 + n % 5)) for n in range(20)],
        texts_of=[(n, n + 9) for n in range(11)],
        ids=[f"s{n}" for n in range(11)],
        batch_size=7,
        seed=3,
        **changes,
    )


def words(**changes: Any) -> WordBatches:
    return WordBatches(
        [f"{n:064}" for n in range(11)],
        torch.arange(11) % 6,
        targets=torch.arange(12).view(6, 2),
        stores=[one_item(11), one_item(11, view=0.5)],
        batch_size=7,
        seed=3,
        **changes,
    )


def one_item(count: int, view: float = 0.0) -> FeatureStore:
    made = FeatureStore(2, torch.float32)
    for number in range(count):
        made.add(torch.full((1, 2), number + view), [(f"{number:064}", 1, 1, 1)])
    return made


def rows(batch: Batch) -> Counter[tuple[str, ...]]:
    """Each row with its media, whoever holds it; padding of shorter texts left out."""
    found: list[tuple[str, ...]] = []
    for row, sample in enumerate(batch.sample_ids):
        there = batch.segment_ids[row] != 0
        parts = [sample, str(batch.token_ids[row][there].tolist()), str(batch.labels[row][there].tolist())]
        for modality in sorted(batch.media):
            parts.append(str(batch.media[modality].values[batch.item_row[modality] == row].tolist()))
        found.append(tuple(part for part in parts if part != "[]"))
    return Counter(found)


@pytest.mark.parametrize("made", [pairs, captions, words])
@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_a_batch_is_dealt_out_in_blocks(made: Any, world: int) -> None:
    for step in (0, 1, 4):
        (whole,) = made().step_batches(step)
        parts = [made(rank=r, world=world).step_batches(step)[0] for r in range(world)]
        assert sum((rows(part) for part in parts), Counter()) == rows(whole)
        if made is not words:  # of which each block is sorted by view
            assert tuple(chain(*(part.sample_ids for part in parts))) == whole.sample_ids
    with pytest.raises(ConfigError, match="a batch of 7"):
        made(rank=0, world=8)


@given(number=st.integers(1, 50), world=st.integers(1, 50))
def test_blocks_are_all_places_in_order_and_nearly_equal(number: int, world: int) -> None:
    if number < world:
        with pytest.raises(ConfigError):
            block(number, rank=0, world=world)
        return
    parts = [range(number)[block(number, rank=r, world=world)] for r in range(world)]
    assert list(chain(*parts)) == list(range(number))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert [len(part) for part in parts] == [len(part) for part in torch.arange(number).tensor_split(world)]


@given(
    number=st.integers(1, 20),
    world=st.integers(1, 4),
    other=st.integers(1, 4),
    at=st.integers(0, 6),
    seed=st.integers(0, 3),
)
def test_every_item_equally_often_though_the_number_of_ranks_changes(
    number: int, world: int, other: int, at: int, seed: int
) -> None:
    order = Order(number=number, batch_size=4, seed=seed)
    seen: Counter[int] = Counter()
    for step in range(number):  # four epochs
        now = world if step < at else other
        for rank in range(now):
            seen.update(order.batch(step)[block(4, rank=rank, world=now)].tolist())
    assert seen == Counter(dict.fromkeys(range(number), 4))


# --- real processes ------------------------------------------------------------------------------------------------


def test_two_processes_text_only_here_and_pictures_there_give_the_gradient_of_one(
    tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    port = free_port()
    places = [str(tiny_folders["image"]), str(tiny_folders["decoder"])]
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.unit.data.ranks", *places, str(tmp_path)],
            env={
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(sys.path),
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        model = ranks.built(*places)
        said = [worker.communicate(timeout=120) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], said
    kinds = [
        tuple("picture" if batch.media else "text" if batch.sample_ids else "nothing" for batch in both)
        for both in (
            [ranks.source(model, rank=r, world=2).step_batches(step)[0] for r in range(2)]
            for step in range(ranks.STEPS)
        )
    ]
    assert ("text", "picture") in kinds
    assert ("text", "nothing") in kinds
    here = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(2)]
    for pieces in (1, 2):
        one = ranks.source(model, pieces=pieces)
        for step in range(ranks.STEPS):
            for name, expected in ranks.gradients(model.model, one, step).items():
                for found in here:
                    torch.testing.assert_close(found[name].double(), expected.double(), rtol=2e-4, atol=2e-5)
                assert torch.equal(here[0][name], here[1][name]), "ranks would part"
