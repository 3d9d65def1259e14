"""Baselines are what their names say: a white picture, and the parts before training."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from PIL import Image

from plait.adapters.lora import Lora, attach
from plait.assembly.multimodal import Multimodal, load_multimodal, save_multimodal
from plait.core.errors import DataError, NumericsError
from plait.core.events import Events
from plait.core.types import Answer, Completion, MediaRef, Request, Sample, Text, Turn
from plait.evaluation.asking import blanked, collect, show_answers, untuned, white_pictures
from plait.inference.build import encode_pictures
from plait.inference.engine import Engine


def sample(*refs: MediaRef) -> Sample:
    return Sample(
        id="s",
        turns=(
            Turn(role="user", parts=(*refs, Text(text="what?"))),
            Turn(role="assistant", parts=(Text(text="cat"),), trained=True),
        ),
        answers=(Answer(kind="reference", text="cat", name="name.en"),),
        meta={"task": "name.en"},
    )


REF = MediaRef(modality="image", sha256="1" * 64, uri="a.png", width=10, height=20)


def test_a_blanked_question_differs_in_its_picture_alone():
    asked = sample(REF)
    blank = blanked(asked)
    (ref,) = blank.media()
    assert ref.sha256 != REF.sha256
    assert blank.text("user") == "what?"
    assert (blank.turns[1], blank.answers, blank.id) == (asked.turns[1], asked.answers, asked.id)
    assert blanked(blank) == blank


def test_a_white_picture_is_encoded_as_a_file_with_one_would_be(tiny_model: Multimodal):
    out = io.BytesIO()
    Image.new("RGB", (17, 17), "white").save(out, "PNG")
    expected = encode_pictures(tiny_model, lambda ref: out.getvalue())([REF, REF])
    found = white_pictures(tiny_model, dtype=torch.float32)([REF, REF])
    # float32, one and two pictures at a time: worst seen 2e-7.
    torch.testing.assert_close(found.values, expected.values, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.grid, expected.grid)
    assert white_pictures(tiny_model, dtype=torch.float16)([REF]).values.dtype == torch.float16


def test_a_model_whose_scores_are_no_numbers_shows_no_answers_and_training_decides(tmp_path):
    class Broken(Engine):
        def __init__(self) -> None: ...

        def __call__(self, requests: Sequence[Request]) -> list[Completion]:
            raise NumericsError("the scores of token 1 of the answer are not numbers", place=requests[0].id)

    said: list[tuple[str, str]] = []
    events = Events(None)
    events.emit = lambda kind, text, **_: said.append((kind, text))
    show_answers(Broken(), {"train": [sample(REF)]}, step=3, phase="decoder", longest=4, folder=tmp_path, events=events)
    assert [kind for kind, _ in said] == ["warning"]
    assert "decoder, step 3: it answers nothing: the scores of token 1" in said[0][1]
    assert json.loads((tmp_path / "samples" / "000003.json").read_text())["samples"] == []


@pytest.fixture
def tuned(tiny_model: Multimodal, tmp_path) -> Multimodal:
    """As the stage loads it: saved with an adapter that does something, loaded without."""
    attach(tiny_model.language.model, Lora(rank=2, alpha=4.0, targets=("q_proj",)))
    for name, weight in tiny_model.language.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    save_multimodal(tiny_model.with_lora(Lora(rank=2, alpha=4.0, targets=("q_proj",))), tmp_path)
    return load_multimodal(tmp_path, adapter=False)


def test_untuned_has_the_decoder_as_it_was_and_another_connector_over_the_same_words(tuned, tiny_folders):
    from transformers import AutoModelForCausalLM

    torch.nn.init.constant_(list(tuned.connector.parts)[-1].length, 9.0)  # as if it had been trained
    before = {name: value.clone() for name, value in tuned.connector.state_dict().items()}
    fresh = untuned(tuned, seed=5)
    after = fresh.connector.state_dict()
    assert before.keys() == after.keys()
    last = f"parts.{len(list(fresh.connector.parts)) - 1}"
    # Norms and the scale begin at constants, which the tiny model never left.
    same = {name for name in before if torch.equal(before[name], after[name])} - {f"{last}.scale"}
    assert {name for name in same if "norm" not in name} == {f"{last}.words", f"{last}.shape"}
    original = AutoModelForCausalLM.from_pretrained(tiny_folders["decoder"]).state_dict()
    found = fresh.language.model.state_dict()
    assert original.keys() == found.keys()
    assert all(torch.equal(original[name], found[name]) for name in original)
    assert not fresh.model.training
    assert not [name for name, weight in fresh.model.named_parameters() if weight.requires_grad]


def test_the_seed_alone_decides_the_untuned_connector(tuned):
    first = untuned(tuned, seed=5).connector.state_dict()
    torch.rand(3)
    again = untuned(tuned, seed=5).connector.state_dict()
    other = untuned(tuned, seed=6).connector.state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["parts.1.up.weight"], other["parts.1.up.weight"])


def test_collected_questions_hold_who_answered_them_and_a_sample_without_an_answer_is_refused():
    first = replace(sample(REF), meta={"task": "name.en", "split": "test-both", "concepts": ["b", "a"]})
    second = replace(first, id="t")
    rows = collect([first, second], {"model": {"s": "cat", "t": "dog"}, "blank": {"t": "x"}})
    assert [row.answers for row in rows] == [{"model": "cat"}, {"model": "dog", "blank": "x"}]
    assert (rows[0].group, rows[0].target, rows[0].uri, rows[0].question) == ("a b", "cat", "a.png", "what?")
    with pytest.raises(DataError, match=r"no answer is called 'name\.en'") as caught:
        collect([replace(first, answers=())], {})
    assert caught.value.place == "sample s"
