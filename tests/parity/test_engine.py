"""The engine against the forward without a cache: token for token, alone and in a batch of unlike lengths."""

import copy
import dataclasses
from collections.abc import Sequence

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from plait.core.errors import DataError, NumericsError, UsageError
from plait.core.protocols import Generate
from plait.core.tensors import Batch, Patches
from plait.core.types import Completion, MediaRef, Request, Text, Turn
from plait.inference.engine import Engine, Prompt
from plait.inference.sampling import sample
from plait.models.connectors.projection import Mlp
from plait.models.multimodal import MultimodalLM

VOCABULARY, HOLE, STOP = 60, 60, 2


@pytest.fixture(scope="module")
def model() -> MultimodalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    decoder = LlamaForCausalLM(config)
    for weight in decoder.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return MultimodalLM({}, {"image": Mlp(8, 16, 32)}, decoder, placeholder=HOLE).eval()


def patches(refs: Sequence[MediaRef]) -> Patches:
    values = [torch.randn(2, 8, generator=torch.Generator().manual_seed(int(ref.sha256))) for ref in refs]
    return Patches(values=torch.cat(values), grid=torch.tensor([[1, 1, 2]] * len(refs)))


def render(turns: Sequence[Turn]) -> Prompt:
    """Digits of the text are ids; a picture is two placeholders."""
    ids: list[int] = [1]
    media: list[MediaRef] = []
    for part in (p for turn in turns for p in turn.parts):
        if isinstance(part, MediaRef):
            ids += [HOLE, HOLE]
            media.append(part)
        else:
            ids += [int(word) for word in part.text.split()]
    return Prompt(token_ids=tuple(ids), media=tuple(media))


@pytest.fixture(scope="module")
def engine(model: MultimodalLM) -> Engine:
    return Engine(
        model, render=render, media=patches, decode=lambda ids: " ".join(map(str, ids)), stop=STOP, context=64, rows=3
    )


def ask(number: int, text: str, *pictures: int, **how: float) -> Request:
    refs = tuple(MediaRef(modality="image", sha256=str(p), uri="") for p in pictures)
    turn = Turn(role="user", parts=(*refs, Text(text=text)))
    return Request(id=f"r{number}", turns=(turn,), max_new_tokens=8, **how)  # pyright: ignore[reportArgumentType]


REQUESTS = [
    ask(1, "5 6 7", 1),
    ask(2, "9"),
    ask(3, "11 12 13 14 15 16 17", 2, 3),
    ask(4, "20 21"),
    ask(5, "30 31 32 33", 1),
]


def uncached(model: MultimodalLM, request: Request) -> list[int]:
    prompt = render(request.turns)
    ids, made = list(prompt.token_ids), []
    while len(made) < request.max_new_tokens:
        row = torch.tensor([ids])
        batch = Batch(
            token_ids=row,
            labels=torch.full_like(row, -100),
            segment_ids=torch.ones_like(row),
            media={"image": patches(prompt.media)} if prompt.media else {},
            item_row={"image": torch.zeros(len(prompt.media), dtype=torch.long)} if prompt.media else {},
            sample_ids=("x",),
            encoded=True,
        )
        with torch.inference_mode():
            token = int(model.logits(model.hidden(batch)[0, -1:])[0].argmax())
        if token == STOP:
            break
        made.append(token)
        ids.append(token)
    return made


@pytest.mark.row("S4-107")
def test_greedy_answers_are_those_of_the_forward_without_a_cache(model: MultimodalLM, engine: Engine) -> None:
    assert isinstance(engine, Generate)
    together = engine(REQUESTS)
    for request, completion in zip(REQUESTS, together, strict=True):
        assert list(completion.token_ids) == uncached(model, request)
        assert completion.id == request.id
        assert completion.image_tokens == 2 * len(render(request.turns).media)


def test_batch_mates_do_not_change_an_answer_not_even_a_sampled_one(engine: Engine) -> None:
    hot = [ask(i, f"{i} {i + 1}", temperature=1.5, seed=i) for i in range(3, 12)]
    together = engine(hot)
    assert together == [engine([request])[0] for request in hot]
    assert len({completion.token_ids for completion in together}) > 1


def test_a_stream_says_what_the_call_says(engine: Engine) -> None:
    for request in REQUESTS:
        pieces: list[str] = []
        for piece in engine.stream(request):
            assert not torch.is_inference_mode_enabled(), "the caller's own mode holds between pieces"
            pieces.append(piece)
        assert "".join(pieces) == engine([request])[0].text


def test_unfinished_characters_are_held_back(model: MultimodalLM) -> None:
    def decode(ids: Sequence[int]) -> str:
        return bytes("图像" * 8, "utf-8")[: len(ids)].decode("utf-8", errors="replace")

    engine = Engine(model, render=render, media=patches, decode=decode, stop=-1, context=64)
    pieces = list(engine.stream(ask(1, "5 6", 1)))
    assert all("\ufffd" not in piece for piece in pieces[:-1])
    assert "".join(pieces).startswith("图像")


def test_a_prompt_that_is_too_long_says_by_how_much(engine: Engine) -> None:
    with pytest.raises(DataError, match="61 tokens; with an answer of 8 that is 5 more than the 64") as caught:
        engine([ask(7, " ".join(["5"] * 60))])
    assert caught.value.place == "request r7"
    with pytest.raises(DataError, match="5 more than"):
        engine.stream(ask(7, " ".join(["5"] * 60)))  # before the first piece is asked for


@pytest.mark.parametrize("how", [{"max_new_tokens": 0}, {"temperature": -1.0}])
def test_a_request_that_asks_for_nothing_sensible_is_refused(engine: Engine, how: dict[str, float]) -> None:
    request = dataclasses.replace(ask(8, "5"), **how)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError) as caught:
        engine([request])
    assert caught.value.place == "request r8"


def test_another_number_of_tokens_than_placeholders_is_refused_by_request(model: MultimodalLM) -> None:
    def longer(refs: Sequence[MediaRef]) -> Patches:
        # Three tokens for the first picture and one for the second: right in sum, wrong for both.
        return Patches(values=torch.randn(4, 8), grid=torch.tensor([[1, 1, 3], [1, 1, 1]]))

    engine = Engine(model, render=render, media=longer, decode=str, stop=STOP, context=64)
    with pytest.raises(DataError, match="row 0 has 2 placeholders, 3 media tokens") as caught:
        engine([ask(1, "5", 1), ask(2, "6", 2)])
    assert caught.value.place == "row 0, sample r1"


def test_a_finished_row_does_not_walk_out_of_the_context(model: MultimodalLM) -> None:
    seen: list[int] = []

    def note(_module: object, _args: object, given: dict[str, torch.Tensor], _out: object) -> None:
        assert torch.is_inference_mode_enabled()
        seen.append(int(given["position_ids"].max()))

    hook = model.decoder.model.rotary_emb.register_forward_hook(note, with_kwargs=True)  # pyright: ignore[reportAttributeAccessIssue]
    long = dataclasses.replace(ask(1, " ".join(["5"] * 60)), max_new_tokens=3)
    short = dataclasses.replace(ask(2, "6"), max_new_tokens=40)
    engine = Engine(model, render=render, media=patches, decode=str, stop=STOP, context=64)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("plait.inference.engine.sample", lambda *_, **__: 7)
            found = engine([long, short])
    finally:
        hook.remove()
    assert [len(c.token_ids) for c in found] == [3, 40]
    assert max(seen) <= 63
    # The prompts, then one call a token but the last: nobody would read what that call says.
    assert len(seen) == 40


def test_scores_that_are_not_numbers_are_named(model: MultimodalLM) -> None:
    broken = copy.deepcopy(model)
    torch.nn.init.constant_(broken.decoder.get_parameter("lm_head.weight"), float("nan"))
    engine = Engine(broken, render=render, media=patches, decode=str, stop=STOP, context=64)
    with pytest.raises(NumericsError, match="token 1 of the answer") as caught:
        engine([ask(4, "5")])
    assert caught.value.place == "request r4"


def test_a_model_in_training_mode_is_refused(model: MultimodalLM) -> None:
    engine = Engine(copy.deepcopy(model).train(), render=render, media=patches, decode=str, stop=STOP, context=64)
    with pytest.raises(ValueError, match="training mode"):
        engine([ask(1, "5")])


def test_sixteen_bit_features_and_decoder_meet_a_wider_connector(model: MultimodalLM) -> None:
    mixed = copy.deepcopy(model)
    mixed.decoder.to(torch.bfloat16)

    def half(refs: Sequence[MediaRef]) -> Patches:
        found = patches(refs)
        return Patches(values=found.values.half(), grid=found.grid)

    engine = Engine(mixed, render=render, media=half, decode=str, stop=STOP, context=64)
    assert all(c.finish in ("stop", "length") for c in engine(REQUESTS))


def test_lengths_and_stops_are_told_apart(engine: Engine) -> None:
    found: list[Completion] = engine([ask(i, str(i), temperature=2.0, seed=i) for i in range(3, 40)])
    assert {c.finish for c in found} == {"stop", "length"}
    assert all((c.finish == "length") == (len(c.token_ids) == 8) for c in found if c.finish == "length")


def test_sampling_follows_the_softmax() -> None:
    logits = torch.tensor([1.0, 2.0, 0.0])
    generator = torch.Generator().manual_seed(0)
    n = 4000
    counts = torch.bincount(
        torch.tensor([sample(logits, temperature=0.5, generator=generator) for _ in range(n)]), minlength=3
    )
    expected = torch.softmax(logits / 0.5, 0) * n
    # Pearson's chi-square with 2 degrees of freedom: above 18.4 in one of 10,000 draws.
    assert float(((counts - expected) ** 2 / expected).sum()) < 18.4
    assert sample(logits, temperature=0.0) == 1
    with pytest.raises(ValueError, match="needs a generator"):
        sample(logits, temperature=1.0)
