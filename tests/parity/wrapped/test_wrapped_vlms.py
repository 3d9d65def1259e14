"""Vision-language models of transformers, wrapped: ids, logits, gradients and answers are those of transformers."""

from __future__ import annotations

import dataclasses
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from plait.assembly.vlm import Vlm, load_vlm, save_vlm
from plait.core.errors import CheckpointError, ConfigError, DataError
from plait.core.tensors import IGNORE, Batch, Patches
from plait.core.types import MediaRef, Request, Text, Turn
from plait.data.collate import collate, joined
from plait.data.template import Rendered
from plait.inference.engine import Engine, Prompt
from plait.models.attention import positions
from plait.models.decoding import Decodes
from plait.objectives.preference import answer_logprobs

FAMILIES = ["llava", "llava-siglip", "idefics3", "smolvlm", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl"]
FAMILIES += ["llava_onevision", "gemma3", "paligemma", "paligemma2", "blip-2"]
ONE_QUESTION = {"paligemma", "paligemma2", "blip-2"}
SIZES = [(32, 32), (70, 40), (40, 70), (1, 1), (33, 31), (200, 20), (20, 150), (640, 480), (1333, 801), (64, 64)]
"""Width and height: square, wide, tall, tiny, large."""

# Measured over all families: the widest gap was 3.8e-5 in values up to 33; at most 0.48 of what is allowed here.
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


def picture(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(width * 7919 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def ref(width: int, height: int) -> MediaRef:
    return MediaRef(modality="image", sha256=f"{width}x{height}", uri="noise", width=width, height=height)


def user(*parts: str | tuple[int, int]) -> Turn:
    return Turn(role="user", parts=tuple(Text(text=p) if isinstance(p, str) else ref(*p) for p in parts))


def said(text: str) -> Turn:
    return Turn(role="assistant", parts=(Text(text=text),), trained=True)


ONE = [user((70, 40), "what is in the picture?"), said("a small red cat")]
OTHER = [user((40, 70), "how many dogs are on the mat in this image?"), said("two")]
TWO = [user((64, 64), "is this a cat", (33, 31), "or this?"), said("left.")]
WORDS = [user("describe a dog"), said("a cat, and two dogs on a mat.")]
LONG = [*ONE, user("how many?"), said("one of them is black.")]


@pytest.fixture(scope="module", params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def vlm(name: str, vlm_folder: Callable[[str], Path]) -> Vlm:
    return load_vlm(vlm_folder(name))


@pytest.fixture(scope="module")
def reference(name: str, vlm_folder: Callable[[str], Path]) -> Any:
    return AutoModelForImageTextToText.from_pretrained(vlm_folder(name)).eval()


def messages(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """As transformers takes them."""
    return [
        {
            "role": turn.role,
            "content": [
                {"type": "image", "image": picture(p.width, p.height)}
                if isinstance(p, MediaRef)
                else {"type": "text", "text": p.text}
                for p in turn.parts
            ],
        }
        for turn in turns
    ]


def theirs(vlm: Vlm, conversations: Sequence[Sequence[Turn]], *, prompt: bool = False, side: str = "right") -> Any:
    """Inputs as the family's own processor makes them."""
    processor = vlm.reader.processor
    kind = vlm.model.model.config.model_type  # pyright: ignore[reportAttributeAccessIssue]
    how: dict[str, Any] = {"return_tensors": "pt"}
    if len(conversations) > 1:
        how |= {"padding": True, "padding_side": side}
    if kind not in ONE_QUESTION:
        return processor.apply_chat_template(
            [messages(turns) for turns in conversations],
            tokenize=True,
            return_dict=True,
            add_generation_prompt=prompt,
            return_tensors="pt",
            processor_kwargs={key: value for key, value in how.items() if key != "return_tensors"},
        )
    pictures = [[picture(r.width, r.height) for turn in turns for r in refs(turn)] for turns in conversations]
    texts = ["".join(p.text for p in turns[0].parts if isinstance(p, Text)) for turns in conversations]
    answers = [turns[1].parts[0].text for turns in conversations if len(turns) > 1]  # pyright: ignore[reportAttributeAccessIssue]
    if kind == "paligemma":
        marked = ["<image>" * len(found) + text for found, text in zip(pictures, texts, strict=True)]
        with warnings.catch_warnings():  # it copies its own tensors in a way that numpy 2 warns of
            warnings.simplefilter("ignore", DeprecationWarning)
            return processor(images=pictures, text=marked, **({"suffix": answers} if answers else {}), **how)
    end = processor.tokenizer.eos_token
    whole = [text + (answers[n] + end if answers else "") for n, text in enumerate(texts)]
    return processor(images=[p for found in pictures for p in found], text=whole, **how)


def refs(turn: Turn) -> list[MediaRef]:
    return [p for p in turn.parts if isinstance(p, MediaRef)]


def prepared(vlm: Vlm, found: Sequence[MediaRef]) -> Patches:
    return joined([vlm.prepare(picture(r.width, r.height), alone=len(found) == 1) for r in found])


def batch(vlm: Vlm, rendered: Sequence[Rendered], *, side: str = "right") -> Batch:
    """One sample a row, padded on a side."""
    width = max(map(len, rendered))
    token_ids = torch.full((len(rendered), width), vlm.stop)
    labels = torch.full_like(token_ids, IGNORE)
    segments = torch.zeros_like(token_ids)
    for row, one in enumerate(rendered):
        start = width - len(one) if side == "left" else 0
        ids = torch.tensor(one.token_ids)
        token_ids[row, start : start + len(one)] = ids
        labels[row, start : start + len(one)] = torch.where(torch.tensor(one.trained), ids, IGNORE)
        segments[row, start : start + len(one)] = 1
    items = [prepared(vlm, one.media) for one in rendered if one.media]
    rows = [row for row, one in enumerate(rendered) for _ in one.media]
    return Batch(
        token_ids=token_ids,
        labels=labels,
        segment_ids=segments,
        media={"image": joined(items)} if items else {},
        item_row={"image": torch.tensor(rows)} if items else {},
        sample_ids=tuple(f"s{row}" for row in range(len(rendered))),
    )


def conversations(name: str, *, pictures: bool = True) -> list[list[Turn]]:
    if name == "blip-2":
        return [ONE, OTHER]
    found = [ONE, OTHER, TWO] if name in ONE_QUESTION else [ONE, OTHER, TWO, LONG]
    return found if pictures and name in ONE_QUESTION else [*found, WORDS]


@pytest.mark.parametrize("prompt", [False, True])
def test_conversations_become_the_ids_of_the_processor(vlm: Vlm, name: str, prompt: bool) -> None:
    spaced = [user((64, 64), "  is this  a cat? \n")]
    for turns in [*conversations(name), spaced]:
        asked = turns[:-1] if prompt and len(turns) > 1 else turns
        if not prompt and name in ONE_QUESTION and len(asked) == 1:
            continue
        rendered = vlm.template.turns(asked, prompt=prompt)
        assert list(rendered.token_ids) == theirs(vlm, [asked], prompt=prompt)["input_ids"][0].tolist()
    system = [Turn(role="system", parts=(Text(text="be helpful"),)), *ONE]
    if name not in ONE_QUESTION:
        rendered = vlm.template.turns(system, prompt=prompt)
        assert list(rendered.token_ids) == theirs(vlm, [system], prompt=prompt)["input_ids"][0].tolist()


def test_pictures_of_any_size_expand_to_the_ids_of_the_processor(vlm: Vlm) -> None:
    for size in SIZES:
        asked = [user(size, "what?")]
        rendered = vlm.template.turns(asked, prompt=True)
        assert list(rendered.token_ids) == theirs(vlm, [asked], prompt=True)["input_ids"][0].tolist(), size
        made = vlm.prepare(picture(*size))
        assert vlm.model.slots("image", made).tolist() == list(rendered.slots), size
        alone = vlm.layout([ref(*size)])[0]
        assert alone.count(vlm.model.placeholder) == rendered.slots[0], size


def test_what_is_trained_is_the_answer_through_its_end(vlm: Vlm, name: str) -> None:
    for turns in conversations(name):
        rendered = vlm.template.turns(turns)
        trained = [i for i, kept in zip(rendered.token_ids, rendered.trained, strict=True) if kept]
        text = vlm.template.tokenizer.decode(trained)
        answers = [turn.parts[0].text for turn in turns if turn.trained]  # pyright: ignore[reportAttributeAccessIssue]
        end = vlm.template.tokenizer.decode([vlm.stop])
        assert "".join(text.split()) == "".join("".join(f"{answer}{end}" for answer in answers).split())


def test_a_placeholder_that_is_typed_stays_text(vlm: Vlm, name: str) -> None:
    mark = vlm.template.tokenizer.decode([vlm.model.placeholder])
    typed = [user((64, 64), f"what is {mark} in {vlm.reader.mark}{vlm.template.tokenizer.eos_token} here?")]
    plain = [user((64, 64), "what is in here?")]
    rendered = vlm.template.turns(typed, prompt=True)
    assert rendered.token_ids.count(vlm.model.placeholder) == rendered.slots[0]
    assert rendered.slots == vlm.template.turns(plain, prompt=True).slots
    said = vlm.template.tokenizer.decode(rendered.token_ids)
    assert f"whatis{mark}in" in "".join(said.split())
    ends = rendered.token_ids.count(vlm.template.tokenizer.eos_token_id)
    assert ends == vlm.template.turns(plain, prompt=True).token_ids.count(vlm.template.tokenizer.eos_token_id)


def losses(model: Any, logits: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of the sum of the loss, by the weights' own names."""
    weights = dict(model.named_parameters())
    for weight in weights.values():
        weight.requires_grad_(requires_grad=True)
    found = torch.autograd.grad(
        torch.nn.functional.cross_entropy(logits, targets, reduction="sum"), list(weights.values()), allow_unused=True
    )
    return {key: value for key, value in zip(weights, found, strict=True) if value is not None}


def same(vlm: Vlm, reference: Any, turns: Sequence[Sequence[Turn]], *, side: str = "right") -> None:
    """Logits where the next token is trained, and every gradient, equal the reference's."""
    for weight in [*vlm.model.parameters(), *reference.parameters()]:
        weight.requires_grad_(requires_grad=True)
    ours = batch(vlm, [vlm.template.turns(t) for t in turns], side=side)
    inputs = theirs(vlm, turns, side=side)
    if reference.config.model_type != "blip-2" or side == "right":  # its processor puts padding behind the picture
        assert torch.equal(inputs["input_ids"] * inputs["attention_mask"], ours.token_ids * ours.segment_ids)
    where = ours.predicting
    inputs.pop("labels", None)
    expected = reference(**inputs).logits[where]
    found = vlm.model(ours).logits
    torch.testing.assert_close(found, expected, **CLOSE)
    targets = ours.targets
    grads, wanted = losses(vlm.model.model, found, targets), losses(reference, expected, targets)
    assert set(grads) == set(wanted)
    for key, value in wanted.items():
        torch.testing.assert_close(grads[key], value, **CLOSE, msg=lambda text, key=key: f"{key}: {text}")


def test_one_sample_equals_the_reference(vlm: Vlm, reference: Any) -> None:
    same(vlm, reference, [ONE])


@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_samples_equal_the_reference(vlm: Vlm, reference: Any, side: str) -> None:
    same(vlm, reference, [ONE, OTHER], side=side)


def test_several_pictures_equal_the_reference(vlm: Vlm, reference: Any, name: str) -> None:
    if name != "blip-2":  # its processor takes one picture a text
        same(vlm, reference, [TWO])
        same(vlm, reference, [TWO, ONE])


def test_words_alone_equal_the_reference(vlm: Vlm, reference: Any, name: str) -> None:
    if name in ONE_QUESTION:  # their processors take no text without a picture
        ours = batch(vlm, [vlm.template.turns(WORDS)])
        found = vlm.model(ours).logits
        if name != "blip-2":  # and this model takes none
            kinds = ours.labels.ne(IGNORE).long()
            logits = reference(input_ids=ours.token_ids, token_type_ids=kinds).logits[ours.predicting]
            torch.testing.assert_close(found, logits, **CLOSE)
        mixed = vlm.model(batch(vlm, [vlm.template.turns(WORDS), vlm.template.turns(ONE)])).logits
        torch.testing.assert_close(mixed[: len(found)], found, **CLOSE)
    else:
        same(vlm, reference, [WORDS])
        same(vlm, reference, [WORDS, ONE])


def test_the_fused_head_gives_the_log_probabilities_of_the_scores(vlm: Vlm, name: str) -> None:
    ours = batch(vlm, [vlm.template.turns(turns) for turns in conversations(name)[:2]])
    out = vlm.model(ours)
    if name == "paligemma2":  # scores are capped after the head
        assert out.logprobs is None
        return
    expected = -torch.nn.functional.cross_entropy(out.logits, ours.targets, reduction="none")
    torch.testing.assert_close(out.logprobs, expected, **CLOSE)


def test_packed_rows_equal_their_samples_alone(vlm: Vlm, name: str) -> None:
    rendered = {f"s{n}": vlm.template.turns(t) for n, t in enumerate(conversations(name))}
    found = {r.sha256: p for one in rendered.values() for r, p in zip(one.media, pieces(vlm, one.media), strict=True)}
    row = max(map(len, rendered.values())) * 2
    slots = vlm.model.family.slots
    packed = collate(list(rendered.items()), found, slots=slots, encoded=False, row=row, pad=vlm.stop)
    assert int(packed.segment_ids.max()) > 1
    if name == "paligemma2":
        with pytest.raises(ConfigError, match="layers that look back only 24") as caught:
            vlm.model(packed)
        assert "at most 24 tokens" in caught.value.remedy
        return
    vlm.model.requires_grad_(requires_grad=True)
    alone = [batch(vlm, [rendered[one]]) for one in packed.sample_ids]
    targets = torch.cat([one.targets for one in alone])
    together = vlm.model(packed).logits
    apart = torch.cat([vlm.model(one).logits for one in alone])
    torch.testing.assert_close(together, apart, **CLOSE)
    grads, wanted = losses(vlm.model.model, together, targets), losses(vlm.model.model, apart, targets)
    for key, value in wanted.items():
        torch.testing.assert_close(grads[key], value, **CLOSE, msg=lambda text, key=key: f"{key}: {text}")


def test_a_packed_document_has_the_loss_that_it_has_alone(vlm: Vlm, name: str) -> None:
    """In float64; parts of the decoders and towers round to float32 all the same."""
    if name == "paligemma2":  # refused, see above
        return
    rendered = {f"s{n}": vlm.template.turns(t) for n, t in enumerate(conversations(name))}
    found = {r.sha256: p for one in rendered.values() for r, p in zip(one.media, pieces(vlm, one.media), strict=True)}
    row = max(map(len, rendered.values())) * 2
    packed = collate(list(rendered.items()), found, slots=vlm.model.family.slots, encoded=False, row=row, pad=vlm.stop)
    vlm.model.double()
    try:
        with torch.no_grad():
            together = answer_logprobs(vlm.model, packed)
            alone = torch.cat([answer_logprobs(vlm.model, batch(vlm, [rendered[one]])) for one in packed.sample_ids])
            torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-6)
            if name.startswith("qwen"):  # a shift of all axes would be no error: rotations are relative
                counted = positions(packed.segment_ids).expand(3, -1, -1)
                wrong = vlm.model._run(packed, packed.media["image"], counted, use_cache=False).last_hidden_state
                assert float((wrong - vlm.model.hidden(packed)).abs().max()) > 1e-2, "time, row and column matter"
    finally:
        vlm.model.float()


def pieces(vlm: Vlm, found: Sequence[MediaRef]) -> list[Patches]:
    return [vlm.prepare(picture(r.width, r.height), alone=len(found) == 1) for r in found]


def engine(vlm: Vlm) -> Engine:
    def render(turns: Sequence[Turn]) -> Prompt:
        rendered = vlm.template.turns(turns, prompt=True)
        return Prompt(token_ids=rendered.token_ids, media=rendered.media)

    def media(found: Sequence[MediaRef]) -> Patches:
        return joined([vlm.prepare(picture(r.width, r.height)) for r in found])

    assert isinstance(vlm.model, Decodes)
    return Engine(
        vlm.model,
        render=render,
        media=media,
        decode=vlm.template.tokenizer.decode,
        stop=vlm.stop,
        context=vlm.context,
        encoded=False,
    )


def test_answers_are_those_of_generate_alone_and_padded_in_front(vlm: Vlm, reference: Any, name: str) -> None:
    asked = [ONE[:1], OTHER[:1]]
    if name not in ONE_QUESTION:
        asked += [WORDS[:1], LONG[:3]]
    requests = [Request(id=f"r{n}", turns=tuple(turns), max_new_tokens=12) for n, turns in enumerate(asked)]
    found = [list(one.token_ids) for one in engine(vlm)(requests)]
    for batched in (True, False):
        for part in [asked] if batched else [[one] for one in asked]:
            inputs = theirs(vlm, part, prompt=True, side="left")
            inputs.pop("labels", None)
            out = reference.generate(**inputs, do_sample=False, max_new_tokens=12, eos_token_id=vlm.stop)
            for turns, ids in zip(part, out[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
                until = ids.index(vlm.stop) if vlm.stop in ids else len(ids)
                assert found[asked.index(turns)] == ids[:until]
    assert len({tuple(one) for one in found}) > 1


@pytest.mark.row("S4-225")
def test_a_saved_folder_loads_both_ways(vlm: Vlm, tmp_path: Path, vlm_folder: Callable[[str], Path], name: str) -> None:
    first = batch(vlm, [vlm.template.turns(ONE)])
    changed = load_vlm(vlm_folder(name))
    with torch.no_grad():
        for weight in changed.model.parameters():
            weight.mul_(1.01)
    expected = changed.model(first).logits
    save_vlm(changed, tmp_path)
    again = load_vlm(tmp_path)
    torch.testing.assert_close(again.model(first).logits, expected, rtol=0, atol=0)
    assert again.template.turns(ONE) == vlm.template.turns(ONE)
    model, report = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    inputs = theirs(again, [ONE])
    inputs.pop("labels", None)
    logits = model.eval()(**inputs).logits[first.predicting]
    torch.testing.assert_close(logits, expected, **CLOSE)
    source = {p.name: p.read_bytes() for p in vlm_folder(name).iterdir() if p.name.startswith(("tok", "proc", "pre"))}
    assert {n: (tmp_path / n).read_bytes() for n in source} == source
    assert again.key != vlm.key


def test_tokens_that_do_not_fit_their_placeholders_name_row_and_sample(vlm: Vlm) -> None:
    good = batch(vlm, [vlm.template.turns(ONE), vlm.template.turns(OTHER)])
    broken = good.token_ids.clone()
    at = (broken[1] == vlm.model.placeholder).nonzero()[0, 0]
    broken[1, at] = vlm.stop
    with pytest.raises(DataError, match=r"row 1 has .* placeholders") as caught:
        vlm.model(dataclasses.replace(good, token_ids=broken))
    assert caught.value.place == "row 1, sample s1"
    with pytest.raises(DataError, match="features of pictures"):
        vlm.model(dataclasses.replace(good, encoded=True))


def test_a_model_that_cannot_keep_samples_apart_says_so(vlm: Vlm, name: str) -> None:
    rendered = [(f"s{n}", vlm.template.turns(t)) for n, t in enumerate([ONE, OTHER])]
    features = {r.sha256: prepared(vlm, one.media) for _, one in rendered for r in one.media}
    row = sum(len(one) for _, one in rendered)
    packed = collate(rendered, features, slots=vlm.model.family.slots, encoded=False, row=row, pad=vlm.stop)
    text = vlm.model.family.text
    before = text._attn_implementation
    text._attn_implementation = "flash_attention_2"
    try:
        with pytest.raises(ConfigError, match="are not known to keep them apart") as caught:
            vlm.model(packed)
    finally:
        text._attn_implementation = before
    assert "one sample into a row" in caught.value.remedy


def test_weights_that_are_missing_or_left_over_are_listed(
    vlm_folder: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "broken"
    shutil.copytree(vlm_folder(name), folder)
    weights = load_file(folder / "model.safetensors")
    gone = next(key for key in sorted(weights) if key.endswith("up_proj.weight") or key.endswith("fc1.weight"))
    weights["a.stranger"] = weights.pop(gone)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 missing: .*; 1 unexpected: a.stranger"):
        load_vlm(folder)
    weights.pop("a.stranger")
    save_file(weights | {gone: torch.zeros(3, 3)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 of another shape: .*\[3, 3\]"):
        load_vlm(folder)
