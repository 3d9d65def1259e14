"""Micro-batches in halves hold the same samples and give the same gradient."""

from __future__ import annotations

import pytest
import torch
from benchmarks.exactness import model
from benchmarks.layouts import source
from hypothesis import given
from hypothesis import strategies as st

from plait.core.errors import ResourceError
from plait.core.events import Events
from plait.core.tensors import Batch, Patches
from plait.objectives.language import NextToken
from plait.training.gradient import accumulate
from plait.training.smaller import divided, out_of_memory, rows_apart, samples_of_rows, smaller


def batch_of(rows: list[int], owners: list[int], sizes: list[int]) -> Batch:
    """Packed rows of so many samples, with items of so many cells that belong to some rows."""
    segments = torch.zeros(len(rows), 8, dtype=torch.long)
    for row, count in enumerate(rows):
        for at in range(count):
            segments[row, 2 * at : 2 * at + 2] = at + 1
    owners = sorted(owner % len(rows) for owner in owners)
    grid = torch.tensor([[1, 1, size] for size in sizes[: len(owners)]], dtype=torch.long).reshape(-1, 3)
    values = torch.arange(sum(sizes[: len(owners)]), dtype=torch.float32)[:, None]
    ids = torch.arange(segments.numel()).reshape(segments.shape)
    return Batch(
        token_ids=ids,
        labels=ids,
        segment_ids=segments,
        media={"image": Patches(values=values, grid=grid)} if owners else {},
        item_row={"image": torch.tensor(owners, dtype=torch.long)} if owners else {},
        sample_ids=tuple(f"s{i}" for i in range(sum(rows))),
    )


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=6),
    st.lists(st.integers(0, 5), max_size=5),
    st.lists(st.integers(1, 3), min_size=5, max_size=5),
    st.integers(1, 9),
)
def test_parts_are_the_batch_in_order(rows, owners, sizes, pieces):
    batch = batch_of(rows, owners, sizes)
    known = samples_of_rows(batch)
    assert known is not None
    parts = divided([batch], pieces)
    assert 1 <= len(parts) <= min(pieces, len(batch.token_ids))
    assert torch.equal(torch.cat([p.token_ids for p in parts]), batch.token_ids)
    assert torch.equal(torch.cat([p.segment_ids for p in parts]), batch.segment_ids)
    assert sum((p.sample_ids for p in parts), ()) == batch.sample_ids
    with_items = [p for p in parts if p.media]
    if batch.media:
        assert torch.equal(torch.cat([p.media["image"].values for p in with_items]), batch.media["image"].values)
        assert torch.equal(torch.cat([p.media["image"].grid for p in with_items]), batch.media["image"].grid)
        starts = [sum(len(q.token_ids) for q in parts[:at]) for at in range(len(parts))]
        where = [p.item_row["image"] + start for p, start in zip(parts, starts, strict=True) if p.media]
        assert torch.equal(torch.cat(where), batch.item_row["image"])
    sizes = [len(p.token_ids) for p in parts]
    assert max(sizes) - min(sizes) <= 1


def pairs(rows) -> Batch:
    ids = tuple(name for row in rows for name in row)
    segments = torch.zeros(len(rows), 4, dtype=torch.long)
    for at, row in enumerate(rows):
        segments[at, : len(row)] = torch.arange(1, len(row) + 1)
    return Batch(token_ids=segments, labels=segments, segment_ids=segments, media={}, item_row={}, sample_ids=ids)


def test_answers_of_one_pair_stay_together():
    batch = pairs([["a#chosen", "b#chosen"], ["b#rejected", "a#rejected"], ["c#chosen", "c#rejected"]])
    assert [part.sample_ids for part in rows_apart(batch)] == [batch.sample_ids[:4], batch.sample_ids[4:]]


def test_rows_whose_samples_nobody_knows_are_not_cut():
    batch = pairs([["a"], ["b"]])
    odd = Batch(**{name: getattr(batch, name) for name in Batch.__slots__} | {"sample_ids": ("a", "b", "c")})
    assert samples_of_rows(odd) is None
    assert divided([odd], 4) == [odd]


@pytest.mark.row("S4-60")
@pytest.mark.parametrize("pieces", [2, 4, 64])
def test_the_gradient_is_that_of_the_whole_batch(pieces):
    def gradient(count: int) -> torch.Tensor:
        built = model(by_document=True)
        micro = divided(source(packed=True).step_batches(0), count)
        assert (len(micro) > 1) == (count > 1)
        accumulate(built, NextToken(), micro, weights={})
        return torch.cat([w.grad.flatten() for w in built.parameters() if w.grad is not None])

    whole = gradient(1)
    assert float((gradient(pieces) - whole).norm() / whole.norm()) < 1e-12


def test_what_says_that_memory_ran_out():
    assert out_of_memory(MemoryError())
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert not out_of_memory(RuntimeError("shapes do not match"))
    assert out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 1.00 GB)"))
    assert out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**58)
    assert out_of_memory(caught.value)


def test_what_cannot_be_smaller_is_refused_with_a_way_out():
    batch = pairs([["a#chosen", "b#chosen"], ["b#rejected", "a#rejected"]])
    ways = {
        "cannot be cut further": {"passes": True, "splits": True, "apart": True},
        "compares all rows": {"passes": True, "splits": True, "apart": False},
        "not to be cut": {"passes": True, "splits": False, "apart": True},
        "outside of a pass": {"passes": False, "splits": True, "apart": True},
    }
    for said, how in ways.items():
        with pytest.raises(ResourceError, match=said) as caught:
            smaller([batch], 1, why="no room", step=3, events=Events(), **how)
        assert caught.value.exit_code == 5
        assert "trainer.micro_batch" in caught.value.remedy
        assert caught.value.place == "step 3"


def test_it_doubles_until_something_is_cut():
    rows = [["a#chosen"], ["a#rejected"], ["b#chosen"], ["b#rejected"], ["c#chosen"], ["c#rejected"]]
    seen = []

    def again(pieces: int) -> int:
        events = Events(listeners=(seen.append,))
        return smaller([pairs(rows)], pieces, why="x", step=1, passes=True, splits=True, apart=True, events=events)

    assert (again(1), again(2)) == (2, 4)
    with pytest.raises(ResourceError):
        again(4)
    assert "the same gradient" in seen[0].text
