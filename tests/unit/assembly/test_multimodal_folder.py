"""A multimodal model survives its folder; peft reads its adapter; what does not fit is named."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from plait.adapters.lora import Lora, attach, merge
from plait.assembly.multimodal import load_multimodal, save_multimodal
from plait.core.errors import CheckpointError, ConfigError, DataError
from plait.core.snapshot import Snapshot
from plait.core.types import MediaRef, Request, Text, Turn
from plait.inference.build import build_engine, encode_pictures
from plait.models.composition import PretrainedDecoder

LORA = Lora(rank=4, alpha=8.0, targets=("q_proj", "v_proj"))


def png(seed: int = 0) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


def request(text: str = "what?") -> Request:
    ref = MediaRef(modality="image", sha256="0" * 64, uri="a.png")
    return Request(id="r", turns=(Turn(role="user", parts=(ref, Text(text=text))),), max_new_tokens=6)


def answer(built):
    return build_engine(built, encode_pictures(built, lambda ref: png()))([request()])[0]


@pytest.fixture
def trained(tiny_model):
    """With an adapter that does something."""
    attach(tiny_model.language.model, LORA)
    torch.manual_seed(2)
    for name, weight in tiny_model.language.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    return tiny_model.with_lora(LORA)


def test_a_saved_model_answers_as_before_and_pictures_take_the_contracted_tokens(trained, tmp_path):
    save_multimodal(trained, tmp_path)
    loaded = load_multimodal(tmp_path)
    before, after = answer(trained), answer(loaded)
    assert before == after
    assert before.image_tokens == trained.slots_per_picture == 12
    record = json.loads((tmp_path / "plait.json").read_text())
    assert record["media"]["image"]["tokens"] == 12
    without = answer(load_multimodal(tmp_path, adapter=False))
    assert without.token_ids != before.token_ids


@pytest.mark.parametrize("kind", ["adapter", "whole"])
def test_a_snapshot_is_the_folder_of_that_moment_byte_for_byte(request, tiny_model, tmp_path, kind):
    """Weights move on before it is written; a decoder that trains as a whole goes through transformers' own writer."""
    built = request.getfixturevalue("trained") if kind == "adapter" else replace(tiny_model, whole=True)
    save_multimodal(built, tmp_path / "now")
    snapshot = Snapshot()
    (tmp_path / "later").mkdir()
    with snapshot.taking():
        save_multimodal(built, tmp_path / "later")
    with torch.no_grad():
        for weight in built.model.parameters():
            weight.add_(1)
    snapshot.write()
    files = [p.relative_to(tmp_path / "now") for p in (tmp_path / "now").rglob("*") if p.is_file()]
    assert any("model.safetensors" in str(name) for name in files)
    assert {p.relative_to(tmp_path / "later") for p in (tmp_path / "later").rglob("*") if p.is_file()} == set(files)
    assert [n for n in files if (tmp_path / "now" / n).read_bytes() != (tmp_path / "later" / n).read_bytes()] == []


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's, of transformers
def test_peft_reads_the_adapter_without_plait(trained, tiny_folders, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    save_multimodal(trained, tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tiny_folders["decoder"])
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ids = torch.tensor([[5, 9, 42, 7]])
    with torch.inference_mode():
        torch.testing.assert_close(theirs(ids).logits, trained.language.model(ids).logits, rtol=1e-6, atol=1e-6)


def test_a_merged_adapter_gives_the_same_scores_and_leaves_no_layer_behind(trained):
    ids = torch.tensor([[5, 9, 42, 7]])
    decoder = trained.language.model
    with torch.inference_mode():
        before = decoder(ids).logits
        assert merge(decoder) == 4
        # float32: worst seen 2e-6.
        torch.testing.assert_close(decoder(ids).logits, before, rtol=1e-5, atol=1e-5)
    assert not [name for name, _ in decoder.named_parameters() if "lora" in name]


def test_a_target_that_matches_nothing_is_refused(tiny_model):
    with pytest.raises(ConfigError, match=r"no linear layer is called out_proj; there are .*q_proj"):
        attach(tiny_model.language.model, Lora(targets=("q_proj", "out_proj")))


@pytest.mark.parametrize(
    ("file", "damage", "cause"),
    [
        ("plait.json", lambda p: p.unlink(), "plait.json is missing"),
        ("plait.json", lambda p: p.write_text("{"), "not valid JSON"),
        ("plait.json", lambda p: p.write_text('{"kind": "dual", "format": 2}'), "kind 'dual'"),
        ("model.safetensors", lambda p: p.write_bytes(p.read_bytes()[:50]), "cannot be read"),
        ("model.safetensors", lambda p: save_file({"x": torch.zeros(1)}, p), "tensors do not fit"),
        ("adapter/adapter_model.safetensors", lambda p: p.write_bytes(b""), "cannot be read"),
        (
            "adapter/adapter_model.safetensors",
            lambda p: save_file(dict(list(load_file(p).items())[1:]), p),
            "1 tensors are missing",
        ),
        ("adapter/adapter_config.json", lambda p: p.unlink(), "cannot be read"),
        ("tokenizer.json", lambda p: p.unlink(), "tokenizer"),
    ],
)
def test_damage_is_named(trained, tmp_path, file, damage, cause):
    save_multimodal(trained, tmp_path)
    damage(tmp_path / file)
    with pytest.raises(CheckpointError, match=cause):
        load_multimodal(tmp_path)


def test_another_tower_or_decoder_is_refused(trained, tiny_folders, tmp_path):
    copy = tmp_path / "decoder"
    shutil.copytree(tiny_folders["decoder"], copy)
    (tmp_path / "model").mkdir()
    save_multimodal(replace(trained, decoder=PretrainedDecoder(name=str(copy))), tmp_path / "model")
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="the decoder has digest"):
        load_multimodal(tmp_path / "model")


def test_a_prompt_longer_than_the_context_says_by_how_much(trained):
    engine = build_engine(trained, encode_pictures(trained, lambda ref: png()))
    with pytest.raises(DataError, match=r"that is .* more than the 256 the model can hold"):
        engine([request("x" * 300)])
