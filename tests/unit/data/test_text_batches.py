"""Batches of texts: the same rows however they are divided; nothing is cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from plait.core.errors import ConfigError, DataError
from plait.core.tensors import IGNORE, Batch
from plait.data.masking.spans import SpanMask, restored
from plait.data.masking.tokens import TokenMask
from plait.data.text_batches import Continued, Form, Hidden, Rewritten, TextBatches, TokenText, as_it_is

SENTINELS, END = tuple(range(99, 89, -1)), 1
FORMS: list[Form] = [
    as_it_is,
    Hidden(rule=TokenMask(mask=2, others=range(10, 80))),
    Rewritten(rule=SpanMask(sentinels=SENTINELS), end=END),
    Continued(),
]


def texts(number: int = 7) -> list[TokenText]:
    draw = torch.Generator().manual_seed(0)
    return [
        TokenText(id=f"s{at}", token_ids=torch.randint(10, 80, (4 + at,), generator=draw).tolist())
        for at in range(number)
    ]


def source(form: Form = as_it_is, **given: Any) -> TextBatches:
    return TextBatches(**{"texts": texts(), "form": form, "batch_size": 5, "longest": 20, "seed": 3, **given})


def rows(found: list[Batch]) -> list[tuple[str, list[int], list[int]]]:
    """Id, tokens and labels of each row, without padding."""
    return [
        (name, ids[: int(size)], labels[: int(size)])
        for batch in found
        for name, ids, labels, size in zip(
            batch.sample_ids, batch.token_ids.tolist(), batch.labels.tolist(), batch.segment_ids.sum(1), strict=True
        )
    ]


@given(form=st.sampled_from(FORMS), world=st.integers(1, 5), micro=st.integers(0, 4), step=st.integers(0, 9))
def test_rows_are_the_same_however_a_batch_is_divided(form: Form, world: int, micro: int, step: int) -> None:
    whole = rows(source(form).step_batches(step))
    parts = [source(form, rank=rank, world=world, micro_batch=micro).step_batches(step) for rank in range(world)]
    assert [row for part in parts for row in rows(part)] == whole
    assert all(len(batch.sample_ids) <= (micro or 5) for part in parts for batch in part)


def test_each_step_draws_anew_and_padding_is_no_text() -> None:
    hidden = [{name: labels for name, _, labels in rows(source(FORMS[1]).step_batches(step))} for step in range(9)]
    both = [one["s6"] for one in hidden if "s6" in one]
    assert any(one != both[0] for one in both)
    (batch,) = source(FORMS[1], pad=7).step_batches(0)
    padding = batch.segment_ids == 0
    assert padding.any()
    assert (batch.token_ids[padding] == 7).all()
    assert (batch.labels[padding] == IGNORE).all()


@pytest.mark.row("S4-49")
def test_a_rewritten_row_holds_what_was_there() -> None:
    known = {text.id: list(text.token_ids) for text in texts()}
    for name, ids, labels in rows(source(FORMS[2]).step_batches(0)):
        first = next(at for at, label in enumerate(labels) if label != IGNORE)
        assert ids[first:] == labels[first:]
        assert ids[-1] == END
        assert restored(ids[:first], ids[first:-1], SENTINELS) == known[name]


def test_a_continued_text_is_whole_and_its_rest_alone_is_trained() -> None:
    known, lengths = {text.id: list(text.token_ids) for text in texts()}, set[int]()
    for step in range(40):
        for name, ids, labels in rows(source(Continued(shortest=2)).step_batches(step)):
            first = next(at for at, label in enumerate(labels) if label != IGNORE)
            assert ids == known[name]
            assert 2 <= first < len(ids)
            assert labels[first:] == ids[first:]
            if name == "s0":
                lengths.add(first)
    assert lengths == {2, 3}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"texts": []}, "no text"),
        ({"texts": [*texts(2), texts(1)[0]]}, "two texts have this id"),
        ({"longest": 8}, "2 of 7 texts are longer than 8 tokens; the first has 9"),
        ({"texts": [TokenText(id="a", token_ids=[1, 2], words=[0])]}, "2 tokens, but words of 1"),
        ({"micro_batch": -1}, "micro-batches of -1"),
        ({"world": 6, "rank": 0}, "5 samples for 6 processes"),
    ],
)
def test_what_cannot_be_is_refused_at_once(given: dict[str, Any], says: str) -> None:
    with pytest.raises((ConfigError, DataError), match=says):
        source(**given)


def test_a_text_that_cannot_take_the_form_is_named() -> None:
    short = [TokenText(id="short", token_ids=[5])]
    with pytest.raises(DataError, match="a text of 1 tokens") as error:
        source(FORMS[2], texts=short, batch_size=1).step_batches(0)
    assert error.value.place == "sample short"
    with pytest.raises(DataError, match="nothing is left behind a beginning of 1"):
        source(Continued(), texts=short, batch_size=1).step_batches(0)
    with pytest.raises(DataError, match="10 tokens are 13 in this form, a row has 12"):
        source(FORMS[2], texts=texts()[6:], batch_size=1, longest=12).step_batches(0)
    with pytest.raises(ConfigError, match="shortest is 0"):
        Continued(shortest=0)
