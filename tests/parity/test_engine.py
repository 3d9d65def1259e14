"""The engine against the forward without a cache: token for token, alone and in a batch of unlike lengths."""

from collections.abc import Sequence

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from plait.core.errors import DataError
from plait.core.protocols import Generate
from plait.core.tensors import Batch, Patches
from plait.core.types import Completion, MediaRef, Request, Text, Turn
from plait.inference.engine import Engine, Prompt
from plait.inference.sampling import sample
from plait.models.connector import Mlp
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
            item_row={},
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
        assert "".join(engine.stream(request)).strip() == engine([request])[0].text


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
