"""BLIP-2's first stage = ``Blip2ForImageTextRetrieval`` with the same weights; what writing may see."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Blip2Config, Blip2ForImageTextRetrieval

from plait.core.errors import CheckpointError
from plait.core.tensors import IGNORE, Batch, Patches
from plait.models.blip2 import Blip2Stage1
from plait.models.connectors.query import QFormer
from plait.models.hub import blip2 as hub
from plait.models.hub import qformer

NEAR = {"atol": 1e-10, "rtol": 1e-8}
"""Float64; worst measured: 2e-15 of the largest number, gradients included."""
TINY = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}


class TheirTower(nn.Module):
    """Their vision tower behind our face: the class token counts as a token."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.d_out = model, 16

    def forward(self, media: Patches) -> Patches:
        pixels = media.values.view(len(media.grid), 16, 16, 3).permute(0, 3, 1, 2)
        found = self.model(pixel_values=pixels).last_hidden_state
        grid = torch.tensor([[1, 1, found.shape[1]]] * len(found))
        return Patches(values=found.flatten(0, 1), grid=grid)


def theirs() -> Any:
    config = Blip2Config(
        vision_config={**TINY, "num_hidden_layers": 1, "image_size": 16, "patch_size": 8},
        qformer_config={**TINY, "encoder_hidden_size": 16, "use_qformer_text_input": True, "vocab_size": 40,
                        "max_position_embeddings": 12, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        text_config={"model_type": "opt", "hidden_size": 20, "ffn_dim": 24, "num_hidden_layers": 1,
                     "num_attention_heads": 2, "vocab_size": 30, "word_embed_proj_dim": 20, "pad_token_id": 1},
        num_query_tokens=5,
        image_text_hidden_size=8,
    )  # fmt: skip
    model = Blip2ForImageTextRetrieval(config).double().eval()
    torch.manual_seed(0)
    for weight in model.parameters():
        weight.data = torch.randn_like(weight) * 0.3 + (0.5 if weight.ndim == 1 else 0.0)
    return model


def ours_of(reference: Any, config: dict[str, Any], state: dict[str, Tensor]) -> Blip2Stage1:
    sizes = qformer.sizes_from(config["qformer_config"], queries=config["num_query_tokens"])
    made = Blip2Stage1(TheirTower(reference.vision_model), QFormer(sizes), start=39, d_shared=8).double().eval()
    missing, unexpected = made.load_state_dict(hub.to_ours(state).stage, strict=False)
    assert not unexpected
    assert all(name.startswith(("writing.", "tower.", "log_scale")) for name in missing)
    return made


def batch(n: int) -> Batch:
    generator = torch.Generator().manual_seed(n)
    ids = torch.randint(2, 39, (n, 6), generator=generator)
    real = torch.arange(6)[None] < torch.tensor([6, 4, 2, 5])[:n, None]
    pixels = torch.rand(n * 256, 3, dtype=torch.float64, generator=generator)
    media = {"image": Patches(values=pixels, grid=torch.tensor([[1, 16, 16]] * n))}
    labels = ids.masked_fill(~real, IGNORE)
    return Batch(token_ids=ids, labels=labels, segment_ids=real.long(), media=media,
                 item_row={"image": torch.arange(n)}, sample_ids=tuple("abcd"[:n]))  # fmt: skip


@pytest.mark.row("S2-08")
@pytest.mark.row("S2-09")
def test_contrast_and_matching_are_theirs_values_and_gradients(as_saved, loaded):
    reference = theirs()
    config, state = as_saved(reference)
    ours = ours_of(reference, config, state)
    given = batch(3)
    pixels = given.media["image"].values.view(3, 16, 16, 3).permute(0, 3, 1, 2)
    asked = {"pixel_values": pixels, "input_ids": given.token_ids, "attention_mask": given.segment_ids}
    contrast = reference(**asked).logits_per_image
    match = reference(**asked, use_image_text_matching_head=True).logits_per_image
    found = ours(given)
    torch.testing.assert_close(found.similarity / ours.scale, contrast, **NEAR)
    torch.testing.assert_close(found.match, match, **NEAR)
    pull, press = torch.randn_like(contrast), torch.randn_like(match)
    ((contrast * pull).sum() + (match * press).sum()).backward()
    gradients = as_saved(reference, gradients=True).state
    reference.zero_grad()
    ((found.similarity / ours.scale * pull).sum() + (found.match * press).sum()).backward()
    for name, wanted in hub.to_ours(gradients).stage.items():
        weight = ours.get_parameter(name)
        assert weight.grad is not None, name
        torch.testing.assert_close(weight.grad, wanted, **NEAR, msg=lambda m, name=name: f"{name}: {m}")
    # The tower, which both share, got the same from us as from them.
    again = as_saved(reference, gradients=True).state
    for name in hub.to_ours(gradients).tower:
        torch.testing.assert_close(again[name], gradients[name], **NEAR)
    back = loaded(Blip2ForImageTextRetrieval, config, hub.to_official(ours.state_dict(), hub.to_ours(state).tower))
    assert all(torch.equal(value, state[name]) for name, value in as_saved(back).state.items())


@torch.no_grad()
def test_chosen_pairs_are_judged_like_any_other(as_saved):
    reference = theirs()
    ours = ours_of(reference, *as_saved(reference))
    given = batch(4)
    pictures, texts = torch.tensor([0, 3, 3]), torch.tensor([2, 1, 0])
    seen: list[Tensor] = []
    found = ours(given, choose=lambda similarity: (seen.append(similarity), (pictures, texts))[1])
    torch.testing.assert_close(seen[0], found.similarity)
    assert len(found.match) == 7
    torch.testing.assert_close(found.match[:4], ours(given).match)
    pixels = given.media["image"].values.view(4, 16, 16, 3).permute(0, 3, 1, 2)[pictures]
    wanted = reference(pixel_values=pixels, input_ids=given.token_ids[texts], attention_mask=given.segment_ids[texts],
                       use_image_text_matching_head=True).logits_per_image  # fmt: skip
    torch.testing.assert_close(found.match[4:], wanted, **NEAR)


@pytest.mark.row("S2-08")
@torch.no_grad()
def test_writing_sees_the_picture_and_what_stands_before(as_saved):
    reference = theirs()
    ours = ours_of(reference, *as_saved(reference))
    for weight in ours.writing.parameters():
        weight.copy_(torch.randn_like(weight))
    given = batch(4)
    source, real = ours.look(given), given.segment_ids != 0
    scores = ours.write(source, given.token_ids, real)
    places = given.labels[:, 1:] != IGNORE
    torch.testing.assert_close(ours(given).logits, scores[:, :-1][places], **NEAR)
    for at in range(1, 6):  # another word changes what comes from it on, and nothing before it
        changed = given.token_ids.clone()
        changed[:, at] = 2 + (changed[:, at] - 1) % 37
        other = ours.write(source, changed, real)
        torch.testing.assert_close(other[:, :at], scores[:, :at], **NEAR)
        assert ((other[:, at] - scores[:, at]).abs().amax(1) > 1e-6)[real[:, at]].all()
    # The first token is the one that says "write", whatever stood there.
    changed = given.token_ids.clone()
    changed[:, 0] = 7
    assert torch.equal(ours.write(source, changed, real), scores)
    # Another picture changes every word; queries do not see the text: their states are those of a picture alone.
    elsewhere = source._replace(values=source.values.roll(1, 0))
    assert ((ours.write(elsewhere, given.token_ids, real) - scores).abs().amax(-1) > 1e-6)[real].all()
    both = ours.qformer.attend(source.values, text=(given.token_ids, real, "generate"))
    torch.testing.assert_close(both[:, :5], ours.qformer.attend(source.values), **NEAR)
    # The head is BERT's: linear, GELU, norm, the table of words.
    begun = torch.cat([torch.full((4, 1), 39), given.token_ids[:, 1:]], dim=1)
    text = ours.qformer.attend(source.values, text=(begun, real, "generate"))[:, 5:]
    head, table = ours.writing, ours.qformer.embedding.weight
    inner = functional.gelu(text @ head.dense.weight.T + head.dense.bias)
    inner = functional.layer_norm(inner, (16,), head.norm.weight, head.norm.bias, 1e-12)
    torch.testing.assert_close(scores, inner @ table.T + head.bias, **NEAR)
    # Step by step as at once.
    written = ours.caption(source, end=-1, max_tokens=4)
    ids = torch.cat([torch.full((4, 1), 39), torch.tensor(written)], dim=1)
    at_once = ours.write(source, ids, torch.ones_like(ids, dtype=torch.bool)).argmax(-1)
    assert at_once[:, :-1].tolist() == written


def test_names_without_a_place_are_listed(as_saved):
    _, state = as_saved(theirs())
    with pytest.raises(CheckpointError, match="1 names have no place"):
        hub.to_ours(state | {"language_model.extra": torch.zeros(1)})


def test_features_of_the_tower_may_come_instead_of_pixels(as_saved):
    reference = theirs()
    ours = ours_of(reference, *as_saved(reference))
    given = batch(2)
    features = ours.tower(given.media["image"])
    cached = replace(given, media={"image": features}, encoded=True)
    for one, two in zip(ours(given), ours(cached), strict=True):
        torch.testing.assert_close(one, two, **NEAR)
