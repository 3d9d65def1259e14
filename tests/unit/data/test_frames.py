"""Which frames are chosen: in order, inside the video, as many as asked for."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.core.errors import ConfigError, DataError
from plait.data.frames import Sampling, every, in_segments, uniform

pytestmark = pytest.mark.light

TOTALS, COUNTS = st.integers(1, 500), st.integers(1, 64)


@pytest.mark.row("S4-43")
@given(total=TOTALS, count=COUNTS, seed=st.integers(0, 9))
def test_there_are_as_many_as_asked_for_each_in_its_segment(total: int, count: int, seed: int) -> None:
    for found in (uniform(total, count), in_segments(total, count, seed=seed)):
        assert len(found) == count
        assert found == sorted(found)
        assert 0 <= found[0] <= found[-1] < total
        for i, frame in enumerate(found):
            assert i * total // count <= frame <= (i + 1) * total // count
    if total >= count:
        assert len(set(in_segments(total, count, seed=seed))) == count


@given(total=TOTALS, count=COUNTS)
def test_uniform_is_the_same_backwards(total: int, count: int) -> None:
    mirrored = [total - 1 - frame for frame in reversed(uniform(total, count))]
    assert all(abs(a - b) <= 1 for a, b in zip(uniform(total, count), mirrored, strict=True))
    assert uniform(count, count) == list(range(count))


@pytest.mark.row("S4-43")
@given(total=TOTALS, step=st.integers(1, 20), first=st.integers(0, 600), most=st.integers(0, 10))
def test_every_step(total: int, step: int, first: int, most: int) -> None:
    if first >= total:
        with pytest.raises(DataError, match=f"number {first}, the video has {total}"):
            every(total, step, first=first, most=most)
        return
    found = every(total, step, first=first, most=most)
    assert found[0] == first
    assert all(b - a == step for a, b in pairwise(found))
    assert len(found) == most or found[-1] + step >= total
    assert not most or len(found) <= most


def test_seed_and_item_decide_and_nothing_else() -> None:
    def draws(seed: int, item: str) -> list[int]:
        return in_segments(1000, 8, seed=seed, item=item)

    assert draws(3, "a") == draws(3, "a") != draws(3, "b")
    assert draws(3, "a") != draws(4, "a")
    # The same in every process and version: the recipe names the seed alone.
    assert in_segments(1000, 4, seed=0, item="a.mp4") == [228, 419, 610, 853]


def test_every_frame_of_a_segment_has_its_chance() -> None:
    seen = {in_segments(12, 3, seed=seed)[1] for seed in range(100)}
    assert seen == {4, 5, 6, 7}


@pytest.mark.parametrize("ask", [lambda: uniform(0, 3), lambda: every(0, 1), lambda: in_segments(0, 3, seed=0)])
def test_an_empty_video_is_named(ask) -> None:
    with pytest.raises(DataError, match="the video has 0 frames"):
        ask()


@pytest.mark.parametrize("ask", [lambda: uniform(9, 0), lambda: in_segments(9, -1, seed=0)])
def test_no_frame_wanted(ask) -> None:
    with pytest.raises(ConfigError, match="frames are wanted"):
        ask()


def test_faults_of_every() -> None:
    with pytest.raises(ConfigError, match="step is 0, first 0, most 0"):
        every(9, 0)


@given(total=TOTALS, count=COUNTS, step=st.integers(1, 20))
def test_a_contract_says_how_many_frames_before_they_are_chosen(total: int, count: int, step: int) -> None:
    always, some = Sampling(frames=count), Sampling(policy="every", frames=count, step=step)
    assert always.indices(total) == uniform(total, count)
    assert always.count(0) == always.count(total) == count
    assert some.indices(total) == list(range(0, total, step))[:count]
    assert some.count(total) == len(some.indices(total)) <= count
    with pytest.raises(DataError, match="the video has 0 frames"):
        some.count(0)
