"""Preference batches: both answers of a pair in one batch, one shape for all, and the same ones at every call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.core.errors import ConfigError, DataError
from plait.core.tensors import IGNORE, Patches
from plait.core.types import Answer, MediaRef, Sample, Text, Turn
from plait.data.preference_batches import (
    PreferenceBatches,
    PreferencePair,
    preference,
    questions_with_both,
)
from plait.data.template import Rendered

REF = MediaRef(modality="image", sha256="a" * 64, uri="a.png")


def rendered(prompt: int, answer: Sequence[int]) -> Rendered:
    """Two placeholders (99), a prompt of so many tokens, and the trained answer."""
    ids = (99, 99, *range(1, prompt + 1), *answer)
    return Rendered(
        token_ids=ids,
        trained=tuple(number >= 2 + prompt for number in range(len(ids))),
        media=(REF,),
        slots=(2,),
    )


def features(names: Sequence[str]) -> Patches:
    return Patches(
        values=torch.zeros(2 * len(names), 3, dtype=torch.float16), grid=torch.tensor([[1, 1, 2]] * len(names))
    )


def batches(pairs: Sequence[PreferencePair], **settings_: Any) -> PreferenceBatches:
    given_: dict[str, Any] = {"batch_size": 3, "row": 24, "pad": 0, **settings_}
    return PreferenceBatches(pairs, features=features, grid_out=lambda grid: grid, **given_)


def pair(number: int, prompt: int, right: Sequence[int], wrong: Sequence[int]) -> PreferencePair:
    return PreferencePair(id=f"q{number}", chosen=rendered(prompt, right), rejected=rendered(prompt, wrong))


PAIRS = st.lists(
    st.tuples(
        st.integers(1, 8),
        st.lists(st.integers(40, 60), min_size=1, max_size=6),
        st.lists(st.integers(40, 60), min_size=1),
    ).filter(lambda drawn: len(drawn[2]) <= 12),
    min_size=1,
    max_size=11,
)


@settings(deadline=None)
@given(drawn=PAIRS, size=st.integers(1, 5))
def test_every_pair_is_whole_in_one_batch_of_one_shape(drawn: list[Any], size: int) -> None:
    pairs = [pair(number, *one) for number, one in enumerate(drawn)]
    source = batches(pairs, batch_size=size)
    made = list(source)
    assert len({batch.token_ids.shape for batch in made}) == 1
    assert made[0].token_ids.shape[1] == 24
    seen: list[str] = []
    for batch in made:
        found: dict[str, tuple[list[int], list[int]]] = {}
        names = iter(batch.sample_ids)
        for ids, labels, segments in zip(batch.token_ids, batch.labels, batch.segment_ids, strict=True):
            for segment in range(1, int(segments.max()) + 1):
                here = segments == segment
                trained = [label for label in labels[here].tolist() if label != IGNORE]
                found[next(names)] = (ids[here].tolist(), trained)
        assert next(names, None) is None
        for one in pairs:
            if f"{one.id}#chosen" in found:
                seen.append(one.id)
                for kind, whole in (("chosen", one.chosen), ("rejected", one.rejected)):
                    ids = list(whole.token_ids)
                    expected = [i for i, flag in zip(ids, whole.trained, strict=True) if flag]
                    assert found.pop(f"{one.id}#{kind}") == (ids, expected)
        assert not found
    assert sorted(seen) == sorted(one.id for one in pairs)


@settings(deadline=None)
@given(drawn=PAIRS, size=st.integers(1, 5), world=st.integers(1, 4))
def test_ranks_share_every_batch_and_never_part_a_pair(drawn: list[Any], size: int, world: int) -> None:
    pairs = [pair(number, *one) for number, one in enumerate(drawn)]
    whole = batches(pairs, batch_size=size)
    shares = [batches(pairs, batch_size=size, rank=rank, world=world) for rank in range(world)]
    assert {share.row for share in shares} == {whole.row}
    for step in range(len(whole.parts)):
        made = [share.step_batches(step)[0] for share in shares]
        assert len({batch.token_ids.shape for batch in made}) == 1
        names = [{name.partition("#")[0] for name in batch.sample_ids} for batch in made]
        assert max(map(len, names)) - min(map(len, names)) <= 1
        assert sorted(name for batch in made for name in batch.sample_ids) == sorted(
            whole.step_batches(step)[0].sample_ids
        )
        assert sum(map(len, names)) == len(whole.parts[step])
    with pytest.raises(ConfigError, match="rank"):
        batches(pairs, rank=world, world=world)


def test_steps_go_through_the_same_batches_again_and_again() -> None:
    source = batches([pair(number, 3, [40 + number], [50]) for number in range(7)])
    once = [batch.sample_ids for batch in source]
    assert [len(ids) for ids in once] == [6, 6, 2]
    assert [source.step_batches(step)[0].sample_ids for step in range(7)] == [once[step % 3] for step in range(7)]


def test_the_pairs_of_a_step_come_in_pieces_and_unpacked() -> None:
    source = batches([pair(number, number + 2, [40 + number], [50, 51]) for number in range(3)])
    (whole,) = source.step_batches(0)
    pieces = source.in_pieces(0, [1, 2])
    assert {*pieces[0].sample_ids} == {"q0#chosen", "q0#rejected"}
    assert {name for piece in pieces for name in piece.sample_ids} == set(whole.sample_ids)
    (apart,) = source.in_pieces(0, [3], packed=False)
    assert (apart.segment_ids.amax(1) == 1).all()
    assert sorted(apart.labels[apart.predicting.roll(1, 1)].tolist()) == sorted([40, 41, 42, *[50, 51] * 3])
    assert sorted(apart.sample_ids) == sorted(whole.sample_ids)


def test_a_row_is_as_long_as_asked_or_as_needed() -> None:
    long = [pair(0, 3, [40], [50] * 128)]
    assert batches(long, row=0).row == 144, "133 tokens and 6 beside them"
    assert batches([pair(0, 3, [40], [50])], row=0).row == 8
    with pytest.raises(DataError, match=r"has 133 tokens, a row holds 24") as caught:
        batches(long)
    assert caught.value.place == "sample q0#rejected"


def test_no_pair_is_no_source() -> None:
    with pytest.raises(DataError, match="no preference pair"):
        batches([])


def sample(answer: str, *answers: Answer, trained: bool = True) -> Sample:
    turns = (
        Turn(role="user", parts=(REF, Text(text="what?"))),
        Turn(role="assistant", parts=(Text(text=answer),), trained=trained),
    )
    return Sample(id="s", turns=turns, answers=answers, meta={"task": "name.en"})


def test_the_wrong_answer_takes_the_place_of_the_right_one_and_nothing_else() -> None:
    right, wrong = Answer(kind="reference", text="a cat"), Answer(kind="rejected", text="a dog")
    turns = preference(sample("a cat", right, wrong))
    assert turns is not None
    assert turns[0] == sample("a cat").turns[1]
    assert turns[1] == Turn(role="assistant", parts=(Text(text="a dog"),), trained=True)
    assert preference(sample("a cat", right)) is None
    assert preference(sample("a dog", wrong)) is None
    assert preference(sample("a cat", wrong, trained=False)) is None
    found = questions_with_both([sample("a cat", right, wrong), sample("a cat", right)], ("name.en",))
    assert found == ([sample("a cat", right, wrong)], 1)
    assert questions_with_both([sample("a cat", right, wrong)], ("yesno",)) == ([], 0)


def test_both_answers_share_the_prompt_and_train_through_the_end_of_the_turn(tiny_model: Any) -> None:
    made = PreferencePair.of(sample("cat", Answer(kind="rejected", text="a wolf")), tiny_model.template)
    decode = tiny_model.language.tokenizer.decode
    for answer, whole in (("cat", made.chosen), ("a wolf", made.rejected)):
        trained = [i for i, flag in zip(whole.token_ids, whole.trained, strict=True) if flag]
        assert decode(trained) == f"{answer}<|im_end|>"
    first = made.chosen.trained.index(True)
    assert made.rejected.trained.index(True) == first
    assert made.chosen.token_ids[:first] == made.rejected.token_ids[:first]
    with pytest.raises(DataError, match="no rejected answer"):
        PreferencePair.of(sample("cat"), tiny_model.template)
