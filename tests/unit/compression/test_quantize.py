"""A quantized decoder survives its folder, needs no other weights, and answers nearly as before."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from plait.adapters.lora import Lora, attach, merge
from plait.assembly.compressed import DECODER
from plait.assembly.multimodal import load_multimodal, save_multimodal
from plait.compression.quantize import part_bytes, quantize_decoder
from plait.core.errors import CheckpointError, NumericsError
from plait.models.composition import PretrainedDecoder
from plait.models.quantized import Int8Linear, quantized_layers

IDS = torch.tensor([[5, 9, 42, 7, 7, 80, 12, 3, 61, 2]])
LORA = Lora(rank=4, alpha=8.0, targets=("q_proj", "up_proj"))


def to(built: Any, dtype: torch.dtype) -> None:
    """Weights only: a loaded model keeps its rotary frequencies in float32 whatever its format."""
    for weight in built.language.model.parameters():
        weight.data = weight.data.to(dtype)


@pytest.fixture
def tuned(tiny_model: Any) -> Any:
    attach(tiny_model.language.model, LORA)
    torch.manual_seed(2)
    for name, weight in tiny_model.language.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    return tiny_model.with_lora(LORA)


def scores(built: Any) -> torch.Tensor:
    with torch.inference_mode():
        return built.language.model(IDS).logits.float()


@pytest.mark.row("S4-97")
def test_scores_stay_near_and_every_linear_layer_but_the_head_is_quantized(tuned: Any) -> None:
    before = scores(tuned)
    made = quantize_decoder(tuned)
    assert (made.layers, made.merged) == (14, 4)
    assert made.largest_error <= 0.5 + 1e-4
    assert 0.001 < made.error < 0.01
    assert made.built.lora is None
    decoder = made.built.language.model
    assert [name for name, module in decoder.named_modules() if isinstance(module, nn.Linear)] == ["lm_head"]
    assert decoder.lm_head.weight is decoder.get_input_embeddings().weight
    error = (scores(made.built) - before).norm() / before.norm()
    assert 0 < float(error) < 0.05  # seen: 0.012


def test_the_adapter_is_merged_before_anything_is_rounded(tuned: Any) -> None:
    """In a bfloat16 decoder, too: its 8-bit weights are those of the merged float32 matrices."""
    to(tuned, torch.bfloat16)
    decoder = tuned.language.model
    layer = decoder.model.layers[0].self_attn.q_proj
    a, b = (part["default"].weight.detach().float() for part in (layer.lora_A, layer.lora_B))
    merged = layer.base_layer.weight.detach().float() + layer.scaling["default"] * (b @ a)
    made = quantize_decoder(tuned).built.language.model
    found = made.model.layers[0].self_attn.q_proj
    assert isinstance(found, Int8Linear)
    off = (found.weight.float() * found.weight_scale[:, None] - merged).abs() / found.weight_scale[:, None]
    assert float(off.max()) <= 0.5 + 1e-4
    assert made.dtype == torch.bfloat16
    assert made.model.norm.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_gives_the_same_scores_without_the_decoder_it_was_made_from(
    tuned: Any, tiny_folders: dict[str, Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    base, folder = tmp_path / "decoder", tmp_path / "model"
    shutil.copytree(tiny_folders["decoder"], base)
    folder.mkdir()
    to(tuned, dtype)
    made = quantize_decoder(replace(tuned, decoder=PretrainedDecoder(name=str(base)))).built
    save_multimodal(made, folder)
    shutil.rmtree(base)
    loaded = load_multimodal(folder)
    assert torch.equal(scores(loaded), scores(made))
    assert loaded.language.model.dtype == dtype
    assert quantized_layers(loaded.language.model) == quantized_layers(made.language.model)
    assert not any(weight.requires_grad for weight in loaded.model.parameters())
    assert part_bytes(loaded) == part_bytes(made)
    # A second copy is the same folder again.
    again = tmp_path / "again"
    again.mkdir()
    save_multimodal(loaded, again)
    assert (again / DECODER).read_bytes() == (folder / DECODER).read_bytes()
    assert json.loads((again / "plait.json").read_text()) == json.loads((folder / "plait.json").read_text())


def test_what_is_shared_is_written_once_and_8_bits_are_8_bits(tuned: Any, tmp_path: Path) -> None:
    before = part_bytes(tuned)
    made = quantize_decoder(tuned).built
    save_multimodal(made, tmp_path)
    after, state = part_bytes(made), load_file(tmp_path / DECODER)
    assert "lm_head.weight" not in state
    weights = sum(tensor.numel() for name, tensor in state.items() if f"{name}_scale" in state)
    assert before["linear layers"] == 4 * weights
    outputs = sum(tensor.numel() for name, tensor in state.items() if name.endswith("_scale"))
    assert after["linear layers"] == weights + 4 * outputs
    assert (before["adapter"] > 0, after["adapter"]) == (True, 0)
    assert {name: after[name] for name in ("embeddings and norms", "connector")} == {
        name: before[name] for name in ("embeddings and norms", "connector")
    }
    # Random float32 weights are no bfloat16 numbers, so nothing else may be narrowed.
    assert state["model.embed_tokens.weight"].dtype == torch.float32


def test_twice_is_refused(tuned: Any) -> None:
    made = quantize_decoder(tuned).built
    with pytest.raises(CheckpointError, match="14 layers of the decoder have 8-bit weights already"):
        quantize_decoder(made)


def test_the_layer_with_a_broken_weight_is_named(tiny_model: Any) -> None:
    tiny_model.language.model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(NumericsError, match="1 of 1536 weights") as caught:
        quantize_decoder(tiny_model)
    assert caught.value.place == "model.layers.1.mlp.down_proj"


def change(folder: Path, **fields: Any) -> None:
    record = json.loads((folder / "plait.json").read_text())
    record["composition"]["decoder"] |= fields
    (folder / "plait.json").write_text(json.dumps(record))


def other_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 40
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (lambda f: (f / DECODER).unlink(), "is missing"),
        (lambda f: (f / DECODER).write_bytes((f / DECODER).read_bytes()[:-1]), "has sha256"),
        (lambda f: save_file({"x": torch.zeros(1)}, f / DECODER), "has sha256"),
        (lambda f: change(f, weights="../other.safetensors"), "expected 'decoder.safetensors'"),
        (lambda f: change(f, format="int3"), "of format 'int3'"),
        (lambda f: change(f, dtype="float8"), "dtype 'float8'"),
        (other_shape, "do not fit the configuration"),
    ],
)
def test_damage_is_named(tuned: Any, tmp_path: Path, damage: Any, cause: str) -> None:
    save_multimodal(quantize_decoder(tuned).built, tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=cause):
        load_multimodal(tmp_path)


def test_a_merged_adapter_cannot_be_left_out(tuned: Any, tmp_path: Path) -> None:
    save_multimodal(quantize_decoder(tuned).built, tmp_path)
    with pytest.raises(CheckpointError, match="cannot be left out"):
        load_multimodal(tmp_path, adapter=False)


def test_merging_changes_no_score_that_rounding_is_blamed_for(tuned: Any) -> None:
    before = scores(tuned)
    merge(tuned.language.model)
    torch.testing.assert_close(scores(tuned), before, rtol=1e-4, atol=1e-4)
