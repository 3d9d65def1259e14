"""Collate: order of pictures, padding, fixed rows, what is trained, and the token account."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plait.core.errors import DataError
from plait.core.tensors import IGNORE, Batch, Patches
from plait.core.types import MediaRef
from plait.data.collate import collate, join_rows, joined, split_rows, take_rows
from plait.data.template import Rendered

HOLE, PAD = 99, 7


def halved(grid: Tensor) -> Tensor:
    """A token account: rows and columns halved, rounded up."""
    return torch.stack([grid[:, 0], -(-grid[:, 1] // 2), -(-grid[:, 2] // 2)], dim=1)


def rendered(words: int, pictures: tuple[str, ...], answer: int, *, slots: int = 2) -> Rendered:
    """Words count up from 10; pictures stand in front, the answer at the end."""
    ids = (*[HOLE] * (slots * len(pictures)), *range(10, 10 + words))
    return Rendered(
        token_ids=ids,
        trained=tuple(index >= len(ids) - answer for index in range(len(ids))),
        media=tuple(MediaRef(modality="image", sha256=name, uri="") for name in pictures),
        slots=(slots,) * len(pictures),
    )


def store(*names: str) -> dict[str, Patches]:
    """A 2 x 4 grid a picture (two tokens by the account), filled with the picture's number."""
    return {name: Patches(values=torch.full((8, 1), float(name)), grid=torch.tensor([[1, 2, 4]])) for name in names}


def batch_of(samples: list[tuple[str, Rendered]], *, row: int, rows: int | None = None) -> Batch:
    names = {ref.sha256 for _, r in samples for ref in r.media}
    return collate(samples, store(*names), grid_out=halved, encoded=True, row=row, pad=PAD, rows=rows)


def test_a_small_batch_by_hand() -> None:
    batch = batch_of(
        [("a", rendered(2, (), 1)), ("b", rendered(2, ("5",), 2)), ("c", rendered(1, (), 1))], row=5, rows=3
    )
    assert batch.token_ids.tolist() == [[HOLE, HOLE, 10, 11, 10], [10, 11, PAD, PAD, PAD], [PAD] * 5]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 1, 2], [1, 1, 0, 0, 0], [0] * 5]
    no = IGNORE
    assert batch.labels.tolist() == [[no, no, 10, 11, 10], [no, 11, no, no, no], [no] * 5]
    assert batch.sample_ids == ("b", "c", "a")
    assert batch.item_row["image"].tolist() == [0]
    assert batch.media["image"].grid.tolist() == [[1, 2, 4]]


SAMPLES = st.lists(
    st.tuples(st.integers(1, 6), st.lists(st.integers(0, 30).map(str), max_size=3), st.integers(0, 3)), max_size=8
)


@settings(deadline=None)
@given(drawn=SAMPLES, row=st.integers(12, 30))
def test_pictures_come_in_the_order_of_their_placeholders(drawn: list[tuple[int, list[str], int]], row: int) -> None:
    samples = [(f"s{n}", rendered(w, tuple(p), min(a, w))) for n, (w, p, a) in enumerate(drawn)]
    batch = batch_of(samples, row=row)
    by_id = dict(samples)
    # Read the batch like a person: sample after sample, row after row.
    wanted = [float(ref.sha256) for sample_id in batch.sample_ids for ref in by_id[sample_id].media]
    if wanted:
        assert batch.media["image"].values[::8, 0].tolist() == wanted
        holes = (batch.token_ids == HOLE).sum(1)
        tokens = halved(batch.media["image"].grid).prod(1)
        given_tokens = torch.zeros_like(holes).index_add(0, batch.item_row["image"], tokens)
        assert torch.equal(given_tokens, holes)
    else:
        assert batch.media == {}
    # Nothing is lost and nothing is made up.
    assert int((batch.labels != IGNORE).sum()) == sum(sum(r.trained) for _, r in samples)
    kept = batch.segment_ids != 0
    assert int(kept.sum()) == sum(len(r) for _, r in samples)
    assert bool((batch.token_ids[~kept] == PAD).all())
    assert bool((batch.labels[~kept] == IGNORE).all())
    labeled = batch.labels != IGNORE
    assert torch.equal(batch.labels[labeled], batch.token_ids[labeled])
    assert not bool((batch.labels == HOLE).any())
    found = [
        tuple(batch.token_ids[r][batch.segment_ids[r] == s].tolist())
        for r in range(len(batch.token_ids))
        for s in range(1, int(batch.segment_ids[r].max()) + 1)
    ]
    assert found == [by_id[sample_id].token_ids for sample_id in batch.sample_ids]


@pytest.mark.parametrize("encoded", [True, False])
def test_a_batch_says_whether_its_media_are_features(encoded: bool) -> None:
    batch = collate([("a", rendered(1, ("1",), 1))], store("1"), grid_out=halved, encoded=encoded, row=4, pad=PAD)
    assert batch.encoded is encoded


@pytest.mark.row("S4-44")
def test_a_picture_of_another_size_than_its_placeholders_is_named_before_any_forward() -> None:
    good, bad = rendered(1, ("1",), 1), rendered(1, ("2", "3"), 1)
    features = store("1", "2")
    features["3"] = Patches(values=torch.zeros(16, 1), grid=torch.tensor([[1, 4, 4]]))
    with pytest.raises(
        DataError, match=r"2 placeholders for the picture, 4 media tokens \(1 item, grid \[\[1, 4, 4\]\]\)"
    ) as caught:
        collate([("a", good), ("b", bad)], features, grid_out=halved, encoded=True, row=9, pad=PAD)
    assert caught.value.place == "sample b, picture 2 (3)"


def test_each_modality_has_its_order_and_its_account() -> None:
    both = Rendered(
        token_ids=(HOLE, HOLE, *[HOLE] * 8, 10),
        trained=(*[False] * 10, True),
        media=tuple(MediaRef(modality=kind, sha256=name, uri="") for kind, name in (("image", "1"), ("audio", "2"))),
        slots=(2, 8),
    )
    samples = [("a", both), ("b", rendered(3, ("3",), 1))]
    accounts = {"image": halved, "audio": lambda grid: grid}
    batch = collate(samples, store("1", "2", "3"), grid_out=accounts, encoded=True, row=11, pad=PAD)
    assert batch.media["image"].values[:, 0].tolist() == [1.0] * 8 + [3.0] * 8
    assert batch.media["audio"].values[:, 0].tolist() == [2.0] * 8
    assert batch.item_row["image"].tolist() == [0, 1]
    assert batch.item_row["audio"].tolist() == [0]
    with pytest.raises(DataError, match="8 placeholders for the sound, 2 media tokens") as caught:
        collate(samples, store("1", "2", "3"), grid_out=halved, encoded=True, row=11, pad=PAD)
    assert "sample a, sound 2" in caught.value.place


def test_faults_name_the_sample() -> None:
    with pytest.raises(DataError, match=r"9 tokens \(4 of them media\), a row holds 8") as caught:
        batch_of([("a", rendered(1, (), 1)), ("long", rendered(5, ("1", "2"), 1))], row=8)
    assert caught.value.place == "sample long"
    with pytest.raises(DataError, match="the picture has no features") as caught:
        collate([("a", rendered(1, ("1",), 1))], {}, grid_out=halved, encoded=True, row=8, pad=PAD)
    assert caught.value.place == "sample a, picture 1 (1)"
    with pytest.raises(DataError, match="fill 2 rows of 4 tokens, the batch has 1"):
        batch_of([("a", rendered(3, (), 1)), ("b", rendered(3, (), 1))], row=4, rows=1)


def test_a_batch_moves_whole() -> None:
    moved = batch_of([("a", rendered(1, ("1",), 1))], row=4).to(torch.device("meta"))
    tensors = [moved.token_ids, moved.labels, moved.segment_ids, moved.item_row["image"]]
    tensors += [moved.media["image"].values, moved.media["image"].grid]
    assert all(tensor.is_meta for tensor in tensors)
    assert moved.encoded
    assert moved.sample_ids == ("a",)


@settings(max_examples=50, deadline=None)
@given(SAMPLES, st.integers(1, 6), st.integers(0, 2))
def test_pieces_put_together_are_the_batch(drawn: list[tuple[int, list[str], int]], pieces: int, spare: int) -> None:
    samples = [(str(n), rendered(words, tuple(names), answer)) for n, (words, names, answer) in enumerate(drawn)]
    plain = batch_of(samples, row=12)
    batch = batch_of(samples, row=12, rows=len(plain.token_ids) + spare)
    if not len(batch.token_ids):
        return
    found = split_rows(batch, pieces)
    heights = [len(piece.token_ids) for piece in found]
    assert len(found) <= pieces
    assert max(heights) == -(-len(batch.token_ids) // pieces)
    for field in ("token_ids", "labels", "segment_ids"):
        assert torch.cat([getattr(piece, field) for piece in found]).equal(getattr(batch, field))
    assert sum((piece.sample_ids for piece in found), ()) == batch.sample_ids
    for piece in found:
        holes = (piece.token_ids == HOLE).sum(1).tolist()
        rows = piece.item_row["image"].tolist() if piece.media else []
        assert [2 * rows.count(row) for row in range(len(holes))] == holes
    if batch.media:
        media = joined([piece.media["image"] for piece in found if piece.media])
        assert media.values.equal(batch.media["image"].values)
        assert media.grid.equal(batch.media["image"].grid)


@settings(max_examples=50, deadline=None)
@given(SAMPLES, st.lists(st.integers(1, 3), min_size=1))
def test_rows_taken_and_joined_again_are_the_batch(drawn: list[tuple[int, list[str], int]], heights: list[int]) -> None:
    samples = [(str(n), rendered(words, tuple(names), answer)) for n, (words, names, answer) in enumerate(drawn)]
    batch = batch_of(samples, row=12)
    parts: list[Batch] = []
    at = 0
    while at < len(batch.token_ids):
        stop = min(at + heights[len(parts) % len(heights)], len(batch.token_ids))
        parts.append(take_rows(batch, at, stop))
        at = stop
    if not parts:
        return
    again = join_rows(parts)
    for field in ("token_ids", "labels", "segment_ids"):
        assert getattr(again, field).equal(getattr(batch, field))
    assert again.sample_ids == batch.sample_ids
    assert again.media.keys() == batch.media.keys()
    for modality, media in batch.media.items():
        assert again.media[modality].values.equal(media.values)
        assert again.media[modality].grid.equal(media.grid)
        assert again.item_row[modality].equal(batch.item_row[modality])


def test_shorter_rows_are_filled_up_with_padding() -> None:
    short, long = batch_of([("a", rendered(2, (), 1))], row=3), batch_of([("b", rendered(4, (), 1))], row=5)
    both = join_rows([short, long])
    assert both.segment_ids.tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]]
    assert both.labels[0].tolist() == [IGNORE, 11, IGNORE, IGNORE, IGNORE]
    assert both.sample_ids == ("a", "b")


# --- pictures of several items -------------------------------------------------------------------------------------


def test_a_picture_may_be_several_items_overview_and_tiles() -> None:
    """Each item is told its row; placeholders are the sum."""
    features = store("1", "2")
    values = torch.full((8 + 16, 1), 2.0)
    features["2"] = Patches(values=values, grid=torch.tensor([[1, 2, 4], [1, 4, 4]]))  # 2 and 4 tokens
    both = Rendered(
        token_ids=(*[HOLE] * 8, 10),
        trained=(False,) * 8 + (True,),
        media=tuple(MediaRef(modality="image", sha256=name, uri="", width=30, height=20) for name in "12"),
        slots=(2, 6),
    )
    samples = [("a", both), ("b", rendered(1, ("1",), 1)), ("c", replace(both, media=both.media[::-1], slots=(6, 2)))]
    batch = collate(samples, features, grid_out=halved, encoded=True, row=9, pad=PAD)
    assert batch.sample_ids == ("a", "c", "b")
    one, two = [[1, 2, 4]], [[1, 2, 4], [1, 4, 4]]
    assert batch.media["image"].grid.tolist() == [*one, *two, *two, *one, *one]
    assert batch.item_row["image"].tolist() == [0, 0, 0, 1, 1, 1, 2]
    second = split_rows(batch, 3)[1]
    assert second.media["image"].values[:, 0].tolist() == [2.0] * 24 + [1.0] * 8
    assert second.item_row["image"].tolist() == [0, 0, 0]
    short = replace(both, token_ids=both.token_ids[1:], trained=both.trained[1:], slots=(2, 5))
    with pytest.raises(DataError) as caught:
        collate([("a", short)], features, grid_out=halved, encoded=True, row=9, pad=PAD)
    assert caught.value.cause == (
        "5 placeholders for the picture of 30 x 20 pixels, 2 + 4 = 6 media tokens (2 items, grid "
        "[[1, 2, 4], [1, 4, 4]])"
    )
    assert caught.value.place == "sample a, picture 2 (2)"
