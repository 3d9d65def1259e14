"""Q-Former = BLIP-2's, Perceiver resampler = Idefics', with the same weights."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    IdeficsConfig,
    LlavaConfig,
)
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from plait.core.errors import ConfigError, DataError
from plait.core.protocols import Encoder
from plait.core.tensors import Patches
from plait.models.connectors.projection import Mlp
from plait.models.connectors.query import PerceiverResampler, QFormer, QFormerSizes, ResamplerSizes, query_text_mask
from plait.models.hub import qformer as hub

TINY = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def randomize(module: nn.Module) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(torch.randn_like(weight) * 0.3 + (0.5 if weight.ndim == 1 else 0.0))


def blip2(folder: Path, kind: type, *, text: bool) -> tuple[nn.Module, dict, dict[str, Tensor]]:
    config = Blip2Config(
        vision_config={**TINY, "num_hidden_layers": 1, "image_size": 16, "patch_size": 8},
        qformer_config={**TINY, **QUIET, "encoder_hidden_size": 16, "use_qformer_text_input": text, "vocab_size": 40,
                        "max_position_embeddings": 12},
        text_config={"model_type": "opt", "hidden_size": 20, "ffn_dim": 24, "num_hidden_layers": 1,
                     "num_attention_heads": 2, "vocab_size": 30, "word_embed_proj_dim": 20, "pad_token_id": 1},
        num_query_tokens=5,
        image_text_hidden_size=8,
    )  # fmt: skip
    theirs = kind(config).eval()
    randomize(theirs)
    theirs.save_pretrained(folder)
    return theirs, json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def ours_from(record: dict, state: dict[str, Tensor], *, d_out: int) -> QFormer:
    own = ("qformer.", "query_tokens", "language_projection.", "embeddings.")
    made = QFormer(hub.sizes_from(record["qformer_config"], queries=record["num_query_tokens"]), d_out=d_out).eval()
    made.load_state_dict(hub.to_ours({name: value for name, value in state.items() if name.startswith(own)}))
    return made


@pytest.mark.row("S2-08")
def test_qformer_is_that_of_blip2_values_and_gradients(tmp_path: Path) -> None:
    theirs, record, state = blip2(tmp_path, Blip2ForConditionalGeneration, text=False)
    ours = ours_from(record, state, d_out=20)
    assert isinstance(ours, Encoder)
    features = torch.randn(3, 7, 16)
    found = theirs.qformer(query_embeds=theirs.query_tokens.expand(3, -1, -1), encoder_hidden_states=features)
    wanted = theirs.language_projection(found.last_hidden_state)
    media = Patches(values=features.flatten(0, 1), grid=torch.tensor([[1, 1, 7]] * 3))
    got = ours(media)
    torch.testing.assert_close(got.values.view(3, 5, 20), wanted, atol=1e-5, rtol=1e-4)  # worst measured: 1e-6
    assert got.grid.tolist() == [[1, 1, 5]] * 3
    got.values.square().sum().backward()
    wanted.square().sum().backward()
    grads = hub.to_official({name: p.grad for name, p in ours.named_parameters()})
    torch.testing.assert_close(grads["query_tokens"], theirs.query_tokens.grad, atol=1e-4, rtol=1e-3)
    for layer, name in (
        (0, "crossattention.attention.key"),
        (1, "intermediate_query.dense"),
        (2, "attention.output.dense"),
    ):
        reference = theirs.qformer.get_submodule(f"encoder.layer.{layer}.{name}").weight.grad
        torch.testing.assert_close(
            grads[f"qformer.encoder.layer.{layer}.{name}.weight"], reference, atol=1e-4, rtol=1e-3
        )
    back = hub.to_official(ours.state_dict())
    assert all(torch.equal(value, state[name]) for name, value in back.items())


@pytest.mark.row("S2-08")
def test_queries_and_text_see_each_other_as_in_blip2(tmp_path: Path) -> None:
    theirs, record, state = blip2(tmp_path, Blip2ForImageTextRetrieval, text=True)
    ours = ours_from(record, state, d_out=0)
    features, ids = torch.randn(2, 7, 16), torch.randint(2, 40, (2, 6))
    present = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    # Matching: all see all, and the head judges the queries.
    embedded = theirs.embeddings(input_ids=ids, query_embeds=theirs.query_tokens.expand(2, -1, -1))
    there = torch.cat([torch.ones(2, 5), present], dim=1)
    wanted = theirs.qformer(query_embeds=embedded, query_length=5, attention_mask=there, encoder_hidden_states=features)
    found = ours.attend(features, text=(ids, present, "match"))
    torch.testing.assert_close(found[there.bool()], wanted.last_hidden_state[there.bool()], atol=1e-5, rtol=1e-4)
    # Contrast: as if each were alone.
    together = ours.attend(features, text=(ids, present, "contrast"))
    torch.testing.assert_close(together[:, :5], ours.attend(features), atol=1e-5, rtol=1e-4)
    alone = theirs.qformer(query_embeds=theirs.embeddings(input_ids=ids), query_length=0, attention_mask=present)
    torch.testing.assert_close(together[:, 5:][present], alone.last_hidden_state[present], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours.attend(None, text=(ids, present, "contrast"))[present],
                               alone.last_hidden_state[present], atol=1e-5, rtol=1e-4)  # fmt: skip
    # Generation: a later word changes nothing before it, the queries see no text at all.
    changed = ids.clone()
    changed[:, 3] = 2 + (ids[:, 3] - 1) % 38
    one, two = (ours.attend(features, text=(x, present, "generate")) for x in (ids, changed))
    torch.testing.assert_close(one[:, : 5 + 3], two[:, : 5 + 3])
    assert not torch.allclose(one[:, 8], two[:, 8])


@pytest.mark.row("S2-08")
def test_masks_of_the_three_tasks() -> None:
    present = torch.tensor([[True, True, False]])
    rows = {task: query_text_mask(2, present, task)[0, 0].int().tolist() for task in ("contrast", "match", "generate")}
    assert rows["contrast"] == [[1, 1, 0, 0, 0]] * 2 + [[0, 0, 1, 1, 0]] * 3
    assert rows["match"] == [[1, 1, 1, 1, 0]] * 5
    assert rows["generate"] == [[1, 1, 0, 0, 0]] * 2 + [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0]]


def test_a_qformer_without_words_refuses_text() -> None:
    small = QFormer(QFormerSizes(d_source=8, d=8, depth=1, heads=2, queries=2))
    with pytest.raises(ConfigError, match="knows no text"):
        small.attend(torch.rand(1, 3, 8), text=(torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2).bool(), "match"))
    with pytest.raises(ConfigError, match="nothing to attend"):
        small.attend(None)


@pytest.mark.row("S2-12")
def test_resampler_is_that_of_idefics() -> None:
    config = IdeficsConfig(perceiver_config={"qk_layer_norms_perceiver": False}, vision_config={"embed_dim": 16})
    theirs = IdeficsPerceiverResampler(config, 16, 2, 4, 6, 3)
    randomize(theirs)
    ours = PerceiverResampler(ResamplerSizes(d=16, queries=3, depth=2, heads=4, d_head=6, activation="relu"))
    with torch.no_grad():
        ours.latents.copy_(theirs.latents)
        ours.norm.load_state_dict(theirs.layer_norm.state_dict())
        for block, (attention, ff) in zip(ours.blocks, theirs.blocks, strict=True):
            block.source_norm.load_state_dict(attention.context_layer_norm.state_dict())
            block.norm.load_state_dict(attention.latents_layer_norm.state_dict())
            block.attention.q.weight.copy_(attention.q_proj.weight)
            block.attention.kv.weight.copy_(torch.cat([attention.k_proj.weight, attention.v_proj.weight]))
            block.attention.out.weight.copy_(attention.output_proj.weight)
            block.feed_forward_norm.load_state_dict(ff.ln.state_dict())
            block.feed_forward.up.weight.copy_(ff.fc.weight)
            block.feed_forward.down.weight.copy_(ff.c_proj.weight)
    features = torch.randn(2, 9, 16)
    wanted = theirs(features)
    found = ours(Patches(values=features.flatten(0, 1), grid=torch.tensor([[1, 3, 3]] * 2))).values.view(2, 3, 16)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    found.square().sum().backward()
    wanted.square().sum().backward()
    torch.testing.assert_close(ours.latents.grad, theirs.latents.grad, atol=1e-4, rtol=1e-3)


@pytest.mark.row("S2-07")
def test_mlp_is_llavas_projector() -> None:
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "hidden_size": 12},
        text_config={"model_type": "llama", "hidden_size": 32},
    )
    theirs = LlavaMultiModalProjector(config)
    ours = Mlp(12, 32, 32, norm=False)
    ours.up.load_state_dict(theirs.linear_1.state_dict())
    ours.down.load_state_dict(theirs.linear_2.state_dict())
    features = torch.randn(5, 12)
    assert torch.equal(ours(Patches(values=features, grid=torch.tensor([[1, 1, 5]]))).values, theirs(features))


def small(kind: str) -> nn.Module:
    torch.manual_seed(0)
    sizes = QFormerSizes(d_source=8, d=8, depth=2, heads=2, queries=3, dropout=0.0)
    match kind:
        case "qformer":
            made = QFormer(sizes, d_out=6)
        case "qformer-frames":
            made = QFormer(sizes, d_out=6, per_frame=True)
        case "resampler":
            made = PerceiverResampler(ResamplerSizes(d=8, queries=3, depth=2, heads=2), d_out=6)
        case _:
            made = PerceiverResampler(ResamplerSizes(d=8, queries=3, depth=2, heads=2, frames=4), d_out=6)
    return made.eval()


@pytest.mark.row("S2-06")
@pytest.mark.parametrize("kind", ["qformer", "qformer-frames", "resampler", "resampler-frames"])
@settings(max_examples=15, deadline=None)
@given(grids=st.lists(st.tuples(*[st.integers(1, 4)] * 3), min_size=1, max_size=4))
def test_any_number_of_tokens_becomes_a_fixed_number(kind: str, grids: list[tuple[int, int, int]]) -> None:
    made, grid = small(kind), torch.tensor(grids)
    media = Patches(values=torch.randn(int(grid.prod(1).sum()), 8), grid=grid)
    found = made(media)
    assert torch.equal(found.grid, made.grid_out(grid))
    assert len(found.values) == int(found.grid.prod(1).sum())
    assert len(found.values) == 3 * (sum(f for f, _, _ in grids) if kind == "qformer-frames" else len(grids))
    items = media.values.split(grid.prod(1).tolist())
    alone = [made(Patches(values=item, grid=grid[i : i + 1])).values for i, item in enumerate(items)]
    torch.testing.assert_close(found.values, torch.cat(alone), atol=1e-5, rtol=1e-4)


def test_more_frames_than_codes_are_refused() -> None:
    with pytest.raises(DataError, match="5 tokens, 4 learned positions"):
        small("resampler-frames")(Patches(values=torch.rand(5, 8), grid=torch.tensor([[5, 1, 1]])))
