"""Ours against transformers: CLIP's and SigLIP's losses, values and gradients through the models' own towers."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from plait.objectives.contrastive import info_nce, sigmoid_pairs

TEXT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 8,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def inputs(n: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "input_ids": torch.randint(3, 40, (n, 6), generator=generator),
        "pixel_values": torch.randn(n, 3, 8, 8, generator=generator, dtype=torch.float64),
    }


def compare(model: torch.nn.Module, theirs: torch.Tensor, ours: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(theirs, parameters, retain_graph=True, allow_unused=True)
    found = torch.autograd.grad(ours, parameters, allow_unused=True)
    assert any(g is not None and g.abs().max() > 1e-6 for g in expected)
    for e, f in zip(expected, found, strict=True):
        assert (e is None) == (f is None)
        if e is not None and f is not None:
            torch.testing.assert_close(f, e, rtol=1e-9, atol=1e-12)


@pytest.mark.row("S3-23")
@pytest.mark.row("S2-13")
def test_info_nce_is_clips_loss():
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=12)).double().eval()
    out = model(**inputs(), return_loss=True)
    ours = info_nce(out.image_embeds, out.text_embeds, model.logit_scale.exp()) / 5
    compare(model, out.loss, ours)


@pytest.mark.row("S3-23")
def test_sigmoid_pairs_is_siglips_loss():
    torch.manual_seed(0)
    model = SiglipModel(SiglipConfig(text_config=TEXT, vision_config=VISION)).double().eval()
    with torch.no_grad():  # transformers leaves these at random values; SigLIP starts at 10 and -10
        model.logit_scale.fill_(2.3)
        model.logit_bias.fill_(-3.0)
    out = model(**inputs(), return_loss=True)
    image, text = functional.normalize(out.image_embeds, dim=1), functional.normalize(out.text_embeds, dim=1)
    ours = sigmoid_pairs(image, text, model.logit_scale.exp().squeeze(), bias=model.logit_bias.squeeze()) / 5
    compare(model, out.loss, ours)
