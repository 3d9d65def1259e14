"""The picture tokenizer = Janus' and Chameleon's with the same weights: codes, losses, pictures, gradients, files."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import ChameleonVQVAE, ChameleonVQVAEConfig
from transformers.models.janus.configuration_janus import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAE, JanusVQVAEVectorQuantizer

from plait.core.errors import CheckpointError
from plait.models.codebook import VectorQuantizer
from plait.models.hub import janus
from plait.models.image_tokens import ImageTokenizer, ImageTokenSizes

NEAR = {"atol": 1e-10, "rtol": 1e-8}
"""Float64; worst measured: 2e-13 of the largest number, gradients included."""
TINY = {"base_channels": 32, "channel_multiplier": [1, 2, 2], "num_res_blocks": 1, "latent_channels": 6,
        "embed_dim": 4, "num_embeddings": 11}  # fmt: skip


def stirred(model: nn.Module) -> Any:
    torch.manual_seed(0)
    for weight in model.parameters():
        weight.data = torch.randn_like(weight) * 0.2 + (0.5 if weight.ndim == 1 else 0.0)
    return model.double().eval()


def tiny_janus() -> JanusVQVAE:
    theirs = stirred(JanusVQVAE(JanusVQVAEConfig(**TINY, num_patches=4)))
    codes = theirs.quantize.embedding.weight
    codes.data = functional.normalize(codes.data, dim=-1)  # theirs draws from unit codes, but compares what is there
    return theirs


def test_quantizer_values_losses_and_gradients_are_theirs():
    theirs = stirred(JanusVQVAEVectorQuantizer(JanusVQVAEConfig(**TINY)))
    ours = VectorQuantizer(11, 4).double()
    ours.codes.data.copy_(theirs.embedding.weight.data)
    vectors = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    one, two = (vectors.clone().requires_grad_() for _ in range(2))
    values, loss, ids = theirs(one)
    found = ours(two.permute(0, 2, 3, 1))
    assert torch.equal(found.ids.flatten(), ids)
    torch.testing.assert_close(found.values.permute(0, 3, 1, 2), values, **NEAR)
    # Theirs weighs the codebook's part with 0.25, where the paper weighs the commitment.
    own = (found.commitment + 0.25 * found.codebook) / vectors.numel()
    torch.testing.assert_close(own, loss, **NEAR)
    pull = torch.randn_like(values)
    ((values * pull).sum() + loss).backward()
    ((found.values.permute(0, 3, 1, 2) * pull).sum() + own).backward()
    torch.testing.assert_close(two.grad, one.grad, **NEAR)
    torch.testing.assert_close(ours.codes.grad, theirs.embedding.weight.grad, **NEAR)


@pytest.mark.row("S4-46")
def test_tokenizer_is_that_of_janus(as_saved, loaded):
    theirs = tiny_janus()
    config, state = as_saved(theirs)
    ours = ImageTokenizer(janus.sizes_from(config)).double().eval()
    ours.load_state_dict(janus.to_ours(state))
    pixels = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    wanted = theirs.encode(pixels * 2 - 1)
    ids = ours.encode(pixels)
    assert torch.equal(ids.flatten(), wanted.image_tokens)
    assert len(ids.unique()) > 3  # else this test would see little
    torch.testing.assert_close(ours.decode(ids), ((theirs.decode(ids.flatten(1)) + 1) / 2).clamp(0, 1), **NEAR)
    # Gradients: of the decoder from the picture, of the encoder from what it makes; theirs end at the codes.
    latents, drawn = ours.latents(pixels), ours.reconstruct(pixels).pixels
    reference, picture = theirs.quant_conv(theirs.encoder(pixels * 2 - 1)), (theirs.decode(ids.flatten(1)) + 1) / 2
    torch.testing.assert_close(latents, reference, **NEAR)
    torch.testing.assert_close(drawn, picture, **NEAR)
    pull, press = torch.randn_like(latents), torch.randn_like(drawn)
    ((reference * pull).sum() + (picture * press).sum()).backward()
    wanted = janus.to_ours(as_saved(theirs, gradients=True).state)
    for out, names in (((latents * pull).sum(), ("encoder.", "to_codes.")),
                       ((drawn * press).sum(), ("decoder.", "from_codes."))):  # fmt: skip
        weights = {name: p for name, p in ours.named_parameters() if name.startswith(names)}
        for name, found in zip(weights, torch.autograd.grad(out, list(weights.values())), strict=True):
            torch.testing.assert_close(found, wanted[name], **NEAR, msg=lambda m, name=name: f"{name}: {m}")
    again = loaded(JanusVQVAE, janus.config_from(ours.sizes, rows=4), janus.to_official(ours.state_dict(), ours.sizes))
    assert torch.equal(again.encode(pixels * 2 - 1).image_tokens, ids.flatten())
    assert janus.sizes_from(janus.config_from(ours.sizes, rows=4)) == ours.sizes


@torch.no_grad()
def test_codes_of_any_length_are_exported_so_that_janus_finds_the_same(loaded):
    torch.manual_seed(0)
    ours = ImageTokenizer(janus.sizes_from(JanusVQVAEConfig(**TINY).to_dict())).eval()
    ours.quantizer.codes.mul_(torch.linspace(0.1, 9, 11)[:, None])
    theirs = loaded(JanusVQVAE, janus.config_from(ours.sizes, rows=4), janus.to_official(ours.state_dict(), ours.sizes))
    pixels = torch.rand(3, 3, 16, 16)
    ids = ours.encode(pixels)
    assert torch.equal(theirs.encode(pixels * 2 - 1).image_tokens, ids.flatten())
    torch.testing.assert_close(
        (theirs.decode(ids.flatten(1)) + 1).div(2).clamp(0, 1), ours.decode(ids), atol=1e-5, rtol=0
    )


@torch.no_grad()
def test_encoder_is_that_of_chameleon(as_saved):
    theirs = stirred(ChameleonVQVAE(ChameleonVQVAEConfig(**TINY, resolution=16)))
    config, state = as_saved(theirs)
    ours = ImageTokenizer(janus.sizes_from(config)).double().eval()
    missing, unexpected = ours.load_state_dict(janus.to_ours(state), strict=False)
    assert not unexpected
    assert all(name.startswith("decoder.") for name in missing)
    pixels = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    assert torch.equal(ours.encode(pixels).flatten(), theirs.encode(pixels * 2 - 1).image_tokens)


@pytest.mark.row("S4-46")
def test_as_many_weights_as_published():
    with torch.device("meta"):
        ours = ImageTokenizer(ImageTokenSizes())
        theirs = JanusVQVAE(JanusVQVAEConfig())
    assert sum(p.numel() for p in ours.parameters()) == theirs.num_parameters()


def test_what_the_layout_has_not_is_refused():
    with pytest.raises(CheckpointError, match="double_latent"):
        janus.sizes_from(JanusVQVAEConfig(double_latent=True).to_dict())
    with pytest.raises(CheckpointError, match="groups is 4"):
        janus.config_from(ImageTokenSizes(groups=4), rows=16)
    with pytest.raises(CheckpointError, match="1 names have no place"):
        janus.to_ours({"encoder.extra": torch.zeros(1)})
