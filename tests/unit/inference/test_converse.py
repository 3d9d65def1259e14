"""A conversation keeps its turns, its pictures, and what was said before it was stopped."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from plait.core.errors import DataError
from plait.core.types import Completion, MediaRef, Request, Text, Turn
from plait.data.media import MediaError
from plait.inference.build import build_engine, encode_pictures
from plait.inference.converse import Attachments, Conversation, Decoding, build_request, next_piece, user_turn
from plait.inference.engine import ContextError


def png(seed: int = 0) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def pictures():
    return Attachments()


@pytest.fixture
def conversation(tiny_model, pictures):
    engine = build_engine(tiny_model, encode_pictures(tiny_model, pictures.read))
    return Conversation(engine=engine, decoding=Decoding(max_new_tokens=6))


def listen(pieces) -> tuple[str, Completion]:
    said = ""
    while isinstance(piece := next_piece(pieces), str):
        said += piece
    return said, piece


def test_turns_add_up_to_the_request_that_asks_it_all_at_once(conversation, pictures, tiny_model):
    ref, _ = pictures.add(png(), place="a.png")
    conversation.pictures = [ref]
    first, one = listen(conversation.ask("what?"))
    second, two = listen(conversation.ask("and why?"))
    turns = (
        Turn(role="user", parts=(ref, Text(text="what?"))),
        Turn(role="assistant", parts=(Text(text=first),)),
        Turn(role="user", parts=(Text(text="and why?"),)),
    )
    alone = conversation.engine([Request(id="x", turns=turns[:1], max_new_tokens=6)])[0]
    together = conversation.engine([Request(id="x", turns=turns, max_new_tokens=6)])[0]
    assert (one.text, one.image_tokens) == (first, tiny_model.slots_per_picture)
    assert (alone.text, together.text) == (first, second)
    assert two.prompt_tokens > one.prompt_tokens


def test_forgetting_keeps_the_last_picture_and_a_new_one_replaces_it(conversation, pictures):
    old, new = (pictures.add(png(seed), place=f"{seed}.png")[0] for seed in (1, 2))
    conversation.pictures = [old]
    before, _ = listen(conversation.ask("what?"))
    assert conversation.pictures == []
    conversation.forget()
    assert (conversation.turns, conversation.pictures) == ([], [old])
    assert listen(conversation.ask("what?"))[0] == before
    conversation.pictures = [new]
    conversation.forget()
    assert conversation.pictures == [new]


def test_a_stopped_answer_is_kept_as_far_as_it_was_said(conversation):
    pieces = conversation.ask("what?")
    said = ""
    while not said:
        said = next(pieces)
    pieces.close()
    assert [turn.parts for turn in conversation.turns] == [(Text(text="what?"),), (Text(text=said),)]
    pieces = conversation.ask("and?")
    pieces.close()  # before a word: as if it had not been asked
    assert len(conversation.turns) == 2


def test_a_question_too_long_leaves_the_conversation_as_it_was(conversation):
    with pytest.raises(ContextError, match="more than the 256"):
        conversation.ask("x" * 400)
    assert (conversation.turns, conversation.asked) == ([], 0)
    listen(conversation.ask("short"))


def test_without_a_length_the_answer_gets_what_the_context_leaves(conversation):
    def asked(length: int) -> int:
        turns = [user_turn([Text(text="x" * length)])]
        return build_request(conversation.engine, turns, Decoding(), name="r").max_new_tokens

    empty = asked(1)
    assert asked(101) == empty - 100
    with pytest.raises(DataError):
        conversation.engine.stream(
            build_request(conversation.engine, [user_turn([Text(text="x" * 300)])], Decoding(), name="r")
        )


def test_each_question_of_a_conversation_samples_anew_and_the_seed_repeats_it_all(tiny_model):
    def talk(seed: int) -> list[str]:
        engine = build_engine(tiny_model, encode_pictures(tiny_model, Attachments().read))
        decoding = Decoding(max_new_tokens=6, temperature=1.5, seed=seed)
        conversation = Conversation(engine=engine, decoding=decoding)
        said = []
        for _ in range(2):
            said.append(listen(conversation.ask("what?"))[0])
            conversation.forget()
        return said

    assert talk(3) == talk(3)
    assert talk(3)[0] != talk(3)[1]
    assert talk(3)[1] == talk(4)[0]


def test_pictures_after_all_text_go_to_the_front_as_in_training_and_others_stay():
    a, b = (MediaRef(modality="image", sha256=name, uri=name) for name in "ab")
    one, two = Text(text="1"), Text(text="2")
    assert user_turn([one, two, a, b]).parts == (a, b, one, two)
    assert user_turn([a, one, b, two]).parts == (a, one, b, two)
    assert user_turn([one]).parts == (one,)


def test_a_picture_is_checked_when_it_comes_and_what_changes_is_said(pictures):
    frames = [Image.new("L", (8, 8), grey) for grey in (0, 200)]
    out = io.BytesIO()
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:])
    ref, changes = pictures.add(out.getvalue(), place="a.gif")
    assert (ref.width, changes) == (8, ("animated; only the first frame is used",))
    assert pictures.read(ref) == out.getvalue()
    with pytest.raises(MediaError, match="cut off"):
        pictures.add(png()[:200], place="b.png")
