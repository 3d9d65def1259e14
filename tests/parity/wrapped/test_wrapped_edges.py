"""What wrapped models take, refuse and read beside the parity of every family."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from plait.assembly.vlm import load_vlm, without_videos
from plait.core.errors import CheckpointError, ConfigError, DataError
from plait.core.tensors import Batch, Patches
from plait.core.types import MediaRef, Text, Turn
from plait.data.collate import joined
from plait.models.wrapped.families import FAMILIES
from plait.models.wrapped.vlm import WrappedVLM

Make = Callable[[str], Path]
QUESTION = Turn(role="user", parts=(Text(text="what is it?"),))
ANSWER = Turn(role="assistant", parts=(Text(text="a cat"),), trained=True)


def ref(width: int, height: int) -> MediaRef:
    return MediaRef(modality="image", sha256=f"{width}x{height}", uri="shard.tar#one.png", width=width, height=height)


@pytest.fixture
def copied(vlm_folder: Make, tmp_path: Path) -> Callable[[str], Path]:
    """A folder that a test may change."""

    def copy(name: str) -> Path:
        shutil.copytree(vlm_folder(name), tmp_path / name)
        return tmp_path / name

    return copy


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("name", ["llava", "smolvlm", "qwen2_vl", "internvl", "gemma3", "paligemma", "blip-2"])
def test_folders_of_the_older_layout_are_read_alike(copied: Make, name: str) -> None:
    folder = copied(name)
    before = load_vlm(folder)
    settings = json.loads((folder / "processor_config.json").read_text())
    images = settings.pop("image_processor")
    images["image_processor_type"] = images["image_processor_type"].removesuffix("Pil")
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    if name == "smolvlm":
        settings["processor_class"] = "SmolVLMProcessor"
    (folder / "processor_config.json").write_text(json.dumps(settings))
    after = load_vlm(folder)
    picture = Image.effect_noise((50, 37), 60).convert("RGB")
    assert torch.equal(after.prepare(picture).values, before.prepare(picture).values)
    turns = [Turn(role="user", parts=(ref(50, 37), Text(text="what?")))]
    assert after.template.turns(turns, prompt=True) == before.template.turns(turns, prompt=True)


def test_smolvlm_s_own_processor_writes_the_same_ids(vlm_folder: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.models.smolvlm.processing_smolvlm as module

    monkeypatch.setattr(module, "num2words", object())  # it only spells numbers of video frames, and is not installed
    vlm = load_vlm(vlm_folder("smolvlm"))
    ours = vlm.reader.processor
    theirs = without_videos(module.SmolVLMProcessor)(ours.image_processor, ours.tokenizer, None, image_seq_len=4)
    for size in [(70, 40), (32, 32), (20, 150)]:
        turns = [Turn(role="user", parts=(ref(*size), Text(text="what is it?")))]
        asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}]
        text = ours.apply_chat_template(asked, add_generation_prompt=True)
        found = theirs(text=[text], images=[[Image.new("RGB", size)]])["input_ids"][0]
        assert list(vlm.template.turns(turns, prompt=True).token_ids) == list(found)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_positions_of_time_row_and_column_are_the_model_s_own(vlm_folder: Make, name: str) -> None:
    vlm = load_vlm(vlm_folder(name))
    turns = [Turn(role="user", parts=(Text(text="is"), ref(70, 40), Text(text="or"), ref(16, 48))), ANSWER]
    ids = torch.tensor([vlm.template.turns(turns).token_ids])
    grids = joined([vlm.prepare(Image.new("RGB", size)) for size in [(70, 40), (16, 48)]])
    hole = (ids == vlm.model.placeholder).int()
    model: Any = vlm.model.model
    wanted, lag = model.model.get_rope_index(ids, mm_token_type_ids=hole, image_grid_thw=grids.grid)
    one = {"sample_ids": ("a",), "media": {"image": grids}, "item_row": {"image": torch.tensor([0, 0])}}
    alone = Batch(token_ids=ids, labels=ids, segment_ids=torch.ones_like(ids), **one)
    found = vlm.model.family.positions(alone, grids)
    assert torch.equal(found, wanted)
    assert torch.equal(vlm.model.family.keep(found, alone.segment_ids), lag)
    twice = Patches(values=grids.values.repeat(2, 1), grid=grids.grid.repeat(2, 1))
    segments = torch.cat([torch.ones_like(ids), torch.full_like(ids, 2)], dim=1)
    packed = dataclasses.replace(alone, token_ids=ids.repeat(1, 2), labels=ids.repeat(1, 2), segment_ids=segments)
    assert torch.equal(vlm.model.family.positions(packed, twice), wanted.repeat(1, 1, 2))


def test_answers_do_not_leave_positions_behind(vlm_folder: Make) -> None:
    vlm = load_vlm(vlm_folder("qwen2_vl"))
    picture = Image.new("RGB", (70, 40), (200, 10, 10))
    rendered = vlm.template.turns([Turn(role="user", parts=(ref(70, 40),)), ANSWER])
    ids = torch.tensor([rendered.token_ids])
    one = {"media": {"image": vlm.prepare(picture)}, "item_row": {"image": torch.tensor([0])}, "sample_ids": ("a",)}
    batch = Batch(token_ids=ids, labels=ids, segment_ids=torch.ones_like(ids), **one)
    before = vlm.model.hidden(batch)
    vlm.model.prefill(batch)
    words = torch.tensor([vlm.template.turns([QUESTION, ANSWER]).token_ids])
    text = Batch(
        token_ids=words, labels=words, segment_ids=torch.ones_like(words), media={}, item_row={}, sample_ids=()
    )
    vlm.model.hidden(text)
    assert torch.equal(vlm.model.hidden(batch), before)
    assert vlm.model.model.model.rope_deltas is None  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("name", ["llava_onevision", "idefics3", "qwen2_5_vl", "gemma3", "blip-2"])
def test_sixteen_bit_models_keep_their_account(vlm_folder: Make, name: str) -> None:
    vlm = load_vlm(vlm_folder(name), dtype="bfloat16")
    rendered = vlm.template.turns([Turn(role="user", parts=(ref(1333, 97), Text(text="a"))), ANSWER])
    ids = torch.tensor([rendered.token_ids])
    made = vlm.prepare(Image.new("RGB", (1333, 97)))
    one = {"media": {"image": made}, "item_row": {"image": torch.tensor([0])}, "sample_ids": ("a",)}
    out = vlm.model(Batch(token_ids=ids, labels=ids, segment_ids=torch.ones_like(ids), **one))
    assert out.hidden.dtype == torch.bfloat16
    assert out.logits.dtype == torch.float32
    assert out.logits.isfinite().all()


def test_a_picture_that_the_processor_refuses_is_named(vlm_folder: Make) -> None:
    vlm = load_vlm(vlm_folder("qwen2_vl"))
    with pytest.raises(DataError, match="4000 x 1 pixels: absolute aspect ratio") as caught:
        vlm.layout([ref(4000, 1)])
    assert caught.value.place == "shard.tar#one.png"
    with pytest.raises(DataError, match="0 x 9 pixels"):
        vlm.layout([ref(0, 9)])


def test_a_folder_without_chat_template_is_refused(copied: Make) -> None:
    folder = copied("llava")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match="no chat template"):
        load_vlm(folder)


TEMPLATES = {
    "never learn to stop": "{% for m in messages %}{% for c in m['content'] %}{{ c['text'] }} {% endfor %}{% endfor %}",
    "changes what is said": "{% for m in messages %}{{ m['content'][0]['text'] | upper }}{% endfor %}",
    "writes 1 of 2 texts": "{{ messages[0]['content'][0]['text'] }}",
    "refuses the roles user, assistant: no": "{{ raise_exception('no') }}",
    "and 1 of 0 pictures": "<image>{% for m in messages %}{{ m['content'][0]['text'] }}{% endfor %}",
}


@pytest.mark.parametrize("words", TEMPLATES)
def test_chat_templates_that_cannot_be_trained_on_say_why(copied: Make, words: str) -> None:
    folder = copied("llava")
    (folder / "chat_template.jinja").write_text(TEMPLATES[words])
    with pytest.raises((ConfigError, DataError), match=words):
        load_vlm(folder).template.turns([QUESTION, ANSWER])


def test_models_that_take_one_question_refuse_more(vlm_folder: Make) -> None:
    for name in ("paligemma", "blip-2"):
        with pytest.raises(DataError, match="takes one question: roles user, assistant, user"):
            load_vlm(vlm_folder(name)).template.turns([QUESTION, ANSWER, QUESTION])


def test_families_and_forms_that_are_not_known_are_refused(copied: Make) -> None:
    with pytest.raises(ConfigError, match="no folder with a config"):
        load_vlm(Path("/nowhere"))
    folder = copied("gemma3")
    settings = json.loads((folder / "processor_config.json").read_text())
    settings["image_processor"]["do_pan_and_scan"] = True
    (folder / "processor_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="pan and scan is on"):
        load_vlm(folder)
    edit(folder / "config.json", model_type="nothing")
    with pytest.raises(CheckpointError, match="'nothing', which is no vision-language model") as caught:
        load_vlm(folder)
    assert all(name in caught.value.remedy for name in FAMILIES)


def test_blip_2_without_an_id_for_pictures_is_refused(copied: Make) -> None:
    folder = copied("blip-2")
    edit(folder / "config.json", image_token_index=None)
    with pytest.raises(CheckpointError, match="no id stands for a picture's token"):
        load_vlm(folder)


def test_a_tokenizer_that_does_not_say_where_ids_come_from_is_refused(vlm_folder: Make) -> None:
    from plait.data.processor_template import ProcessorTemplate

    class Slow:
        is_fast = False
        name_or_path = "here"

    slow: Any = Slow()
    with pytest.raises(ConfigError, match="from which characters"):
        ProcessorTemplate(slow, compose=lambda *_: "", expand=lambda _: [], mark="<image>", placeholder=1, stops=[2])


def llava_over(kind: str, **settings: Any) -> WrappedVLM:
    """A random LLaVA over a decoder of a kind."""
    from transformers import AutoConfig, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = AutoConfig.for_model(kind, **sizes, num_key_value_heads=2, vocab_size=40, **settings)
    vision = CLIPVisionConfig(**sizes, image_size=32, patch_size=16)
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=39, vision_feature_layer=-1)
    model = LlavaForConditionalGeneration(config)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    return WrappedVLM(model).eval()


def packed(lengths: list[int]) -> tuple[Batch, list[Batch]]:
    """Samples of random words with a picture each, in one row and alone."""
    torch.manual_seed(1)
    ids = [torch.cat([torch.full((1, 4), 39), torch.randint(3, 38, (1, n))], dim=1) for n in lengths]
    pixels = [Patches(values=torch.rand(32 * 32, 3), grid=torch.tensor([[1, 32, 32]])) for _ in lengths]
    one = {"item_row": {"image": torch.tensor([0])}, "sample_ids": ("a",)}
    alone = [
        Batch(token_ids=i, labels=i, segment_ids=torch.ones_like(i), media={"image": p}, **one)
        for i, p in zip(ids, pixels, strict=True)
    ]
    segments = torch.cat([torch.full_like(i, n) for n, i in enumerate(ids, 1)], dim=1)
    rows = {"image": torch.zeros(len(ids), dtype=torch.long)}
    names = tuple(map(str, range(len(ids))))
    together = {"media": {"image": joined(pixels)}, "item_row": rows, "sample_ids": names}
    row = torch.cat(ids, dim=1)
    return Batch(token_ids=row, labels=row, segment_ids=segments, **together), alone


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2"])
def test_decoders_that_pack_keep_samples_apart(kind: str) -> None:
    model = llava_over(kind, **({"head_dim": 8} if kind in ("qwen3", "gemma", "gemma2") else {}))
    row, alone = packed([5, 9, 3])
    for how in ("eager",) if kind == "gemma2" else ("sdpa", "eager"):  # Gemma 2 has no other
        model.model.set_attn_implementation(how)  # pyright: ignore[reportCallIssue]
        expected = torch.cat([model.hidden(one) for one in alone], dim=1)
        torch.testing.assert_close(model.hidden(row), expected, rtol=1e-4, atol=1e-5)


def test_packed_rows_are_refused_where_samples_could_see_each_other() -> None:
    row, alone = packed([5, 9, 3])
    short = llava_over("mistral", sliding_window=12)
    with pytest.raises(ConfigError, match="in 29 tokens, and mistral has layers that look back only 12"):
        short.hidden(row)
    assert short.hidden(alone[1]).isfinite().all()
    with pytest.raises(ConfigError, match=r"olmo2 has layers .* not known to keep them apart") as caught:
        llava_over("olmo2").hidden(row)
    assert caught.value.place == "samples 0, 1, 2"
