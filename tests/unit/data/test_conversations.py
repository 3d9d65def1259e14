"""Conversation batches: one shape, tasks by weight, each task's samples in turn, and the same ones at every call."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.core.errors import ConfigError, DataError
from plait.core.tensors import IGNORE, Batch
from plait.core.types import MediaRef
from plait.data.augment.feature_dropout import FeatureDropout
from plait.data.conversations import Conversation, ConversationBatches, check_lengths
from plait.data.features import FeatureStore
from plait.data.loader import Loader
from plait.data.packing import row_length
from plait.data.template import Rendered


def sha(number: int) -> str:
    return f"{number:064}"


def conversation(number: int, task: str, length: int) -> Conversation:
    """Two placeholders (99) and ids of its own; the last is trained."""
    ref = MediaRef(modality="image", sha256=sha(number), uri=f"{number}.png")
    ids = (99, 99, *(1000 * number + place for place in range(length - 2)))
    trained = tuple(place == length - 1 for place in range(length))
    return Conversation(
        id=f"q{number}", task=task, rendered=Rendered(token_ids=ids, trained=trained, media=(ref,), slots=(2,))
    )


def store(view: int, pictures: int) -> FeatureStore:
    """Picture 5 in view 2: two cells with the features 5, 2."""
    made = FeatureStore(2, torch.float32)
    for picture in range(pictures):
        made.add(torch.tensor([[float(picture), float(view)]] * 2), [(sha(picture), 1, 1, 2)])
    return made


LENGTHS = {"name": [5, 9, 14], "yesno": [7, 8, 20, 11, 6], "left": [10, 4]}


def source(**changes: Any) -> ConversationBatches:
    of_task = [(task, length) for task, lengths in LENGTHS.items() for length in lengths]
    conversations = [conversation(number, *one) for number, one in enumerate(of_task)]
    given_: dict[str, Any] = {
        "conversations": conversations,
        "weights": {"name": 1.0, "yesno": 3.0, "left": 0.0, "above": 2.0},
        "stores": [store(0, 10), store(1, 10)],
        "grid_out": lambda grid: grid,
        "batch_size": 4,
        "row": 24,
        "pad": 0,
        "steps": 6,
        "seed": 0,
    }
    return ConversationBatches(**given_ | changes)


def same(one: Batch, other: Batch) -> bool:
    pairs = [(one.token_ids, other.token_ids), (one.labels, other.labels), (one.segment_ids, other.segment_ids)]
    pairs += [(one.media[m].values, other.media[m].values) for m in one.media.keys() | other.media.keys()]
    return all(torch.equal(a, b) for a, b in pairs) and one.sample_ids == other.sample_ids


def test_a_step_is_the_same_whatever_came_before() -> None:
    used, fresh = source(), source()
    for step in (4, 0, 5):
        (now,) = used.step_batches(step)
    assert same(now, fresh.step_batches(5)[0])
    assert not same(now, source(seed=1).step_batches(5)[0])


@settings(deadline=None)
@given(short=st.integers(1, 12), more=st.integers(0, 30), seed=st.integers(0, 5))
def test_a_longer_plan_begins_like_a_shorter_one(short: int, more: int, seed: int) -> None:
    begun = source(steps=short, seed=seed).plan
    assert source(steps=short + more, seed=seed).plan[: len(begun)] == begun


@settings(deadline=None)
@given(size=st.integers(1, 9), row=st.integers(20, 60), seed=st.integers(0, 3), steps=st.integers(1, 8))
def test_all_batches_have_one_shape_and_hold_the_planned_samples_whole(
    size: int, row: int, seed: int, steps: int
) -> None:
    batches = source(batch_size=size, row=row, seed=seed, steps=steps)
    of_id = {c.id: c for c in batches.conversations}
    shapes: set[tuple[int, ...]] = set()
    filled = 0
    for step in range(steps):
        (batch,) = batches.step_batches(step)
        shapes.add(tuple(batch.token_ids.shape))
        planned = [batches.conversations[i].id for i in batches.plan[step * size : (step + 1) * size]]
        assert sorted(batch.sample_ids) == sorted(planned)
        names = iter(batch.sample_ids)
        for ids, labels, segments in zip(batch.token_ids, batch.labels, batch.segment_ids, strict=True):
            for segment in range(1, int(segments.max()) + 1):
                here = segments == segment
                rendered = of_id[next(names)].rendered
                assert tuple(ids[here].tolist()) == rendered.token_ids
                assert [x for x in labels[here].tolist() if x != IGNORE] == [rendered.token_ids[-1]]
            assert bool((labels[segments == 0] == IGNORE).all())
        filled = max(filled, int((batch.segment_ids != 0).any(1).sum()))
    ((rows, width),) = shapes
    assert width == row
    assert rows == filled, "more rows than any step needs"


def test_weights_are_shares_and_unwanted_tasks_never_come() -> None:
    batches = source(steps=1000)
    seen = Counter(batches.conversations[i].task for i in batches.plan)
    assert set(seen) == {"name", "yesno"}
    # 4,000 draws at one quarter: 4 standard errors are 110. "above" has a weight and no samples: it takes no share.
    assert abs(seen["name"] - 1000) < 110


def test_late_weights_hold_from_their_step_on_and_change_nothing_before() -> None:
    batches = source(steps=60, late=(40, {"yesno": 1.0}))
    tasks = [batches.conversations[i].task for i in batches.plan]
    assert len(tasks) == 240
    assert set(tasks[:160]) == {"name", "yesno"}
    assert set(tasks[160:]) == {"yesno"}
    assert batches.plan[:160] == source(steps=60).plan[:160]
    with pytest.raises(ConfigError, match="no sample of the tasks above"):
        source(late=(1, {"above": 1.0}))


def test_pairs_stay_together_and_change_no_shares() -> None:
    plain = [conversation(number, "name", 6) for number in range(40)]
    pairs = [replace(conversation(40 + n, "yesno", 6), pair=f"p{n // 2}") for n in range(0, 60)]
    batches = source(conversations=[*plain, *pairs], weights={"name": 1.0, "yesno": 3.0}, steps=500)
    chosen = [batches.conversations[i] for i in batches.plan]
    assert len(chosen) == 2000
    asked = [c.pair for c in chosen if c.pair]
    assert asked[0 : 2 * (len(asked) // 2) : 2] == asked[1::2]
    together = sum(a.pair == b.pair for a, b in pairwise(chosen) if a.pair)
    assert together >= len(asked) // 2, "no other task comes between the two"
    assert abs(len(asked) / len(chosen) - 0.75) < 0.05


def test_pairs_of_two_tasks_are_kept_apart() -> None:
    one, two = (replace(conversation(n, task, 6), pair="same") for n, task in enumerate(("name", "yesno")))
    batches = source(conversations=[one, two], weights={"name": 1.0}, steps=3, batch_size=2)
    assert set(batches.plan) == {0}


def test_features_are_dropped_from_a_step_on_and_the_same_again() -> None:
    drop = FeatureDropout(least=0.5, most=0.9, first=3, full=4, seed=0)
    plain, dropped = source(steps=8), source(steps=8, dropout=drop)
    for step in range(8):
        (as_is,), (seen,), (again,) = (b.step_batches(step) for b in (plain, dropped, dropped))
        assert torch.equal(seen.media["image"].values, again.media["image"].values)
        assert torch.equal(seen.token_ids, as_is.token_ids)
        assert torch.equal(seen.media["image"].values, as_is.media["image"].values) == (step < 4)


def test_each_task_is_gone_through_before_a_sample_comes_again() -> None:
    batches = source(steps=100)
    for task, lengths in LENGTHS.items():
        came = [i for i in batches.plan if batches.conversations[i].task == task]
        epochs = [tuple(came[at : at + len(lengths)]) for at in range(0, len(came) - len(lengths) + 1, len(lengths))]
        assert all(len(set(epoch)) == len(lengths) for epoch in epochs)
        assert task == "left" or len(set(epochs)) > 1, "every epoch has the same order"


def test_views_are_mixed_and_a_picture_without_one_is_seen_as_it_is() -> None:
    batches = source(stores=[store(0, 10), store(1, 4)], steps=200)
    views: Counter[tuple[bool, int]] = Counter()
    for step in range(200):
        (batch,) = batches.step_batches(step)
        pictures = [int(name[1:]) for name in batch.sample_ids]  # features stand in the order of the placeholders
        values = batch.media["image"].values
        assert values[::2, 0].tolist() == pictures
        assert torch.equal(values[::2], values[1::2])
        views.update((picture < 4, int(view)) for picture, view in zip(pictures, values[::2, 1].tolist(), strict=True))
    assert views[(False, 1)] == 0
    share = views[(True, 1)] / (views[(True, 0)] + views[(True, 1)])
    assert abs(share - 0.5) < 0.12  # some 400 draws, 4 standard errors and a bit


def test_pieces_are_the_rows_of_the_whole_dealt_out() -> None:
    whole, pieces = source(batch_size=9), source(batch_size=9, pieces=3)
    for step in range(3):
        (batch,) = whole.step_batches(step)
        split = pieces.step_batches(step)
        assert len(split) > 1
        assert torch.equal(torch.cat([piece.token_ids for piece in split]), batch.token_ids)
        assert tuple(itertools.chain(*(piece.sample_ids for piece in split))) == batch.sample_ids
        values = torch.cat([piece.media["image"].values for piece in split if piece.media])
        assert torch.equal(values, batch.media["image"].values)


def test_a_sample_longer_than_a_row_is_named() -> None:
    with pytest.raises(DataError, match="2 of 10 samples are longer than a row of 12 tokens, the longest 20") as caught:
        source(row=12)
    assert caught.value.place == "sample q2"
    assert caught.value.remedy.startswith("set row to 20 or more")


def test_what_the_decoder_cannot_read_is_named() -> None:
    longer = [*source().conversations, conversation(20, "name", 135)]
    check_lengths(longer, most=135)
    with pytest.raises(DataError, match="1 of 11 samples are longer than the 134 tokens") as caught:
        check_lengths(longer, most=134)
    assert caught.value.place == "sample q20"


@pytest.mark.parametrize("weights", [{"above": 1.0, "count": 1.0}, {"name": 0.0}, {}])
def test_tasks_without_samples_are_refused_at_once(weights: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="no sample of the tasks"):
        source(weights=weights)


# --- samples of like length in one batch ---------------------------------------------------------------------------


def varied(**changes: Any) -> ConversationBatches:
    """Lengths as of answers in chats: most short, a few very long (log-normal, 12 to 400)."""
    rng = random.Random(2)
    lengths = [min(400, 12 + int(rng.lognormvariate(3.4, 0.9))) for _ in range(400)]
    conversations = [conversation(n % 10, "name", length) for n, length in enumerate(lengths)]
    named = [replace(c, id=f"q{number}") for number, c in enumerate(conversations)]
    plain: dict[str, Any] = {"conversations": named, "weights": {"name": 1.0}, "batch_size": 10, "steps": 40}
    made = source(**plain | {"row": 400} | changes)
    return replace(made, row=row_length(made.lengths()) if "row" not in changes else made.row)


def padding(batches: ConversationBatches) -> tuple[float, int]:
    """Share of padded places, and computed scores (rows times squared length)."""
    shapes = [batches.shape(step) for step in range(batches.steps)]
    places = sum(rows * row for rows, row in shapes)
    return 1 - sum(map(sum, batches.lengths())) / places, sum(rows * row**2 for rows, row in shapes)


def test_grouping_by_length_pads_less_and_attends_over_less() -> None:
    plain, grouped, alone = varied(), varied(group_by_length=8), varied(group_by_length=1)
    (share, scores), (less, fewer), (_, between) = map(padding, (plain, grouped, alone))
    assert less <= share, f"{less:.3f} of the places are padding, {share:.3f} without"
    assert less < 0.75 * share
    assert fewer < between < scores, "rows that suit a step save some, like lengths beside each other more"


@settings(deadline=None, max_examples=30)
@given(
    window=st.integers(1, 5),
    short=st.integers(1, 12),
    more=st.integers(0, 20),
    late=st.sampled_from([None, 3, 7]),
    seed=st.integers(0, 3),
)
def test_grouping_keeps_the_samples_of_each_window_and_begins_alike(
    window: int, short: int, more: int, late: int | None, seed: int
) -> None:
    given_: dict[str, Any] = {"seed": seed, "late": None if late is None else (late, {"yesno": 1.0})}
    batches = source(steps=short, group_by_length=window, **given_)
    longer = source(steps=short + more, group_by_length=window, **given_)
    assert longer.plan[: len(batches.plan)] == batches.plan
    as_come = source(steps=short + more + window, **given_).plan
    edges = [0]
    while edges[-1] < short + more:
        step = edges[-1] + window
        edges.append(late if late is not None and edges[-1] < late < step else step)
    for begin, end in pairwise(edges):
        if end <= short + more:
            assert sorted(longer.plan[4 * begin : 4 * end]) == sorted(as_come[4 * begin : 4 * end])


def test_grouped_batches_hold_their_samples_whole_and_the_windows_are_in_no_order() -> None:
    batches = varied(group_by_length=8)
    of_id = {c.id: c for c in batches.conversations}
    longest: list[int] = []
    for step in (0, 5, 13):
        (batch,) = batches.step_batches(step)
        (again,) = varied(group_by_length=8).step_batches(step)
        assert same(batch, again)
        assert tuple(batch.token_ids.shape) == batches.shape(step)
        assert int((batch.segment_ids != 0).sum()) == sum(len(of_id[i].rendered) for i in batch.sample_ids)
    longest = [max(batches.lengths()[step]) for step in range(8)]
    assert sorted(longest) != longest
    assert sorted(longest, reverse=True) != longest


def test_grouping_keeps_pairs_side_by_side() -> None:
    rng = random.Random(0)
    pairs = [replace(conversation(n, "yesno", rng.randint(4, 22)), pair=f"p{n // 2}") for n in range(60)]
    batches = source(conversations=pairs, weights={"yesno": 1.0}, steps=15, group_by_length=15, stores=[store(0, 60)])
    chosen = [batches.conversations[i].pair for i in batches.plan]
    assert chosen[::2] == chosen[1::2]


# --- in another process --------------------------------------------------------------------------------------------


def test_workers_make_the_same_batches_without_the_model_behind_the_account() -> None:
    batches = source(pieces=2, dropout=FeatureDropout(least=0.5, most=0.9, first=0, full=2, seed=0))
    with Loader(batches, steps=6, workers=1) as loader:
        for step in range(6):
            for came, expected in zip(loader.step_batches(step), batches.step_batches(step), strict=True):
                assert same(came, expected)


def test_a_store_goes_to_another_process_as_it_is() -> None:
    made = store(1, 6)
    assert len(made) == 6
    again = ForkingPickler.loads(ForkingPickler.dumps(made))
    names = [sha(number) for number in (5, 0, 3)]
    assert torch.equal(again(names).values, made(names).values)
    assert torch.equal(again(names).grid, made(names).grid)
    assert (len(again), again.d_out, again.dtype) == (6, 2, torch.float32)
    assert made.grids(names).tolist() == [[1, 1, 2]]
