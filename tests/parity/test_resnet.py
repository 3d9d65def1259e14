"""ResNet = transformers' ResNet: values, gradients, statistics, files both ways."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
)

from plait.core.errors import CheckpointError, ConfigError, DataError
from plait.core.protocols import Encoder
from plait.core.tensors import Patches
from plait.models.hub.resnet import config_from, sizes_from, to_official, to_ours
from plait.models.towers.resnet import (
    RESNET_18,
    RESNET_34,
    RESNET_50,
    RESNET_101,
    RESNET_152,
    ResNet,
    ResNetSizes,
)

KINDS = ("basic", "bottleneck")
TINY = ResNetSizes(depths=(1, 2, 1, 1), widths=(8, 8, 16, 16), d_stem=8, num_classes=3)


def stirred(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights and statistics that are far from those of a fresh model, in float64."""
    torch.manual_seed(seed)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("running_var"):
            value.data.uniform_(0.3, 1.5)
        elif value.is_floating_point() and "normalize" not in name:
            value.data.add_(torch.randn_like(value), alpha=0.2)
    return model.double()


def theirs(kind: str, *, bare: bool = False) -> ResNetForImageClassification | ResNetModel:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 24], "depths": [1, 2, 1, 1], "num_labels": 3}
    made = (ResNetModel if bare else ResNetForImageClassification)(ResNetConfig(layer_type=kind, **sizes))
    return stirred(made)


@pytest.mark.row("S0-01")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(64, 64), (45, 70)])
@pytest.mark.parametrize("training", [False, True])
def test_maps_logits_gradients_and_statistics(as_saved, kind, size, training):
    reference = theirs(kind).train(training)
    config, state = as_saved(reference)
    tower = ResNet(sizes_from(config)).double().train(training)
    tower.load_state_dict(to_ours(state), strict=True)
    ours, other = (torch.rand(3, 3, *size, dtype=torch.float64).requires_grad_() for _ in range(2))
    other.data.copy_(ours.data)

    maps = tower.stages(ours)
    wanted = reference(tower.normalize(other), output_hidden_states=True)
    # One pass a model where it trains, or the statistics would move twice.
    logits = tower.classifier(maps[-1].mean((2, 3))) if training else tower.logits(ours)
    # Measured in float64: 6e-14 of the largest number at worst, gradients included.
    near = {"atol": 1e-11, "rtol": 1e-10}
    for found, hidden in zip(maps, wanted.hidden_states[1:], strict=True):
        torch.testing.assert_close(found, hidden, **near)
    torch.testing.assert_close(logits, wanted.logits, **near)

    pull = torch.randn_like(wanted.logits)
    ((logits * pull).sum() + maps[0].square().mean()).backward()
    ((wanted.logits * pull).sum() + wanted.hidden_states[1].square().mean()).backward()
    torch.testing.assert_close(ours.grad, other.grad, **near)
    gradients = to_ours(as_saved(reference, gradients=True).state)
    for name, weight in tower.named_parameters():
        torch.testing.assert_close(weight.grad, gradients[name], **near)
    after = to_ours(as_saved(reference).state)
    for name, buffer in tower.named_buffers():
        if "normalize" not in name:
            torch.testing.assert_close(buffer, after[name], **near)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_classes", [0, 2, 5])
@torch.no_grad()
def test_ours_loads_in_transformers_and_comes_back(as_saved, loaded, kind, num_classes):
    sizes = replace(TINY, bottleneck=kind == "bottleneck", num_classes=num_classes)
    tower = stirred(ResNet(sizes)).eval()
    auto = AutoModelForImageClassification if num_classes else AutoModel
    reference = loaded(auto, config_from(sizes), to_official(tower.state_dict()))
    pixels = torch.rand(2, 3, 40, 33, dtype=torch.float64)
    found = reference(tower.normalize(pixels))
    if num_classes:
        torch.testing.assert_close(tower.logits(pixels), found.logits, atol=1e-11, rtol=1e-10)
    else:
        torch.testing.assert_close(tower.features(pixels), found.last_hidden_state, atol=1e-11, rtol=1e-10)
    config, state = as_saved(reference)
    assert sizes_from(config) == sizes
    back = to_ours(state)
    assert back.keys() == tower.state_dict().keys()
    assert all(torch.equal(back[name], value) for name, value in tower.state_dict().items())


@pytest.mark.row("S0-01")
@pytest.mark.parametrize(
    ("sizes", "weights"),
    [
        (RESNET_18, 11_689_512),
        (RESNET_34, 21_797_672),
        (RESNET_50, 25_557_032),
        (RESNET_101, 44_549_160),
        (RESNET_152, 60_192_808),
    ],
)
def test_published_numbers_of_parameters(sizes, weights):
    with torch.device("meta"):
        tower = ResNet(replace(sizes, num_classes=1000))
        reference = AutoModelForImageClassification.from_config(
            AutoConfig.for_model(**{"num_labels": 1000, **config_from(sizes), "model_type": "resnet"})
        )
    assert sum(p.numel() for p in tower.parameters()) == weights
    assert reference.num_parameters() == weights


@torch.inference_mode()
def test_pictures_of_mixed_sizes_come_out_as_if_encoded_alone():
    tower = stirred(ResNet(TINY)).eval()
    tower.batch_size = 2
    pictures = [
        torch.rand(f, h, w, 3, dtype=torch.float64) for f, h, w in ((1, 64, 32), (2, 40, 70), (1, 64, 32), (3, 1, 33))
    ]
    values, grid = torch.cat([p.reshape(-1, 3) for p in pictures]), torch.tensor([p.shape[:3] for p in pictures])
    together = tower(Patches(values=values, grid=grid))
    alone = [tower.features(p.permute(0, 3, 1, 2)) for p in pictures]
    assert together.grid.tolist() == [[len(m), *m.shape[2:]] for m in alone]
    wanted = torch.cat([m[f, :, r, c][None] for m in alone for f, r, c in cells(m)])
    torch.testing.assert_close(together.values, wanted, atol=1e-12, rtol=1e-10)


def cells(maps):
    """Frame, row and column in raster order, written out."""
    frames, _, rows, columns = maps.shape
    return [(f, r, c) for f in range(frames) for r in range(rows) for c in range(columns)]


@settings(max_examples=15, deadline=None)
@given(size=st.tuples(st.integers(1, 99), st.integers(1, 99)))
@torch.inference_mode()
def test_the_token_account_is_what_forward_gives(size):
    tower = ResNet(TINY).eval()
    media = Patches(values=torch.rand(size[0] * size[1], 3), grid=torch.tensor([[1, *size]]))
    out = tower(media)
    assert out.grid.equal(tower.grid_out(media.grid))
    assert out.values.shape == (int(out.grid.prod()), tower.d_out)
    maps = tower.stages(torch.rand(1, 3, *size))
    assert [tuple(m.shape[2:]) for m in maps] == [tuple(-(-side // s) for side in size) for s in (4, 8, 16, 32)]


def test_maps_stay_channels_last_as_ragged_pixels_are():
    maps = ResNet(TINY).stages(torch.rand(2, 70, 64, 3).permute(0, 3, 1, 2))
    assert all(m.is_contiguous(memory_format=torch.channels_last) for m in maps)


def test_bfloat16_follows_float32():
    tower = stirred(ResNet(TINY)).float().eval()
    pixels = torch.rand(2, 3, 64, 64)
    wanted, found = tower.features(pixels), tower.bfloat16().features(pixels)
    assert found.dtype == torch.bfloat16
    assert (found.float() - wanted).norm() / wanted.norm() < 0.08  # worst of 20 seeds: 0.034


def test_it_is_an_encoder_and_refuses_what_is_not_its_input():
    tower = ResNet(replace(TINY, num_classes=0))
    assert isinstance(tower, Encoder)
    with pytest.raises(DataError, match=r"counts 1024 RGB pixels, came \(1023, 3\) \| at ResNet input"):
        tower(Patches(values=torch.rand(1023, 3), grid=torch.tensor([[1, 32, 32]])))
    with pytest.raises(DataError, match=r"batch norm needs two values .* came one .* map has become 1 x 1"):
        tower.train()(Patches(values=torch.rand(9, 3), grid=torch.tensor([[1, 3, 3]])))
    assert tower(Patches(values=torch.rand(0, 3), grid=torch.zeros(0, 3, dtype=torch.long))).values.shape == (0, 16)
    with pytest.raises(ConfigError, match="4 depths, 3 widths"):
        replace(TINY, widths=(8, 8, 16))
    with pytest.raises(ConfigError, match="no classifier"):
        tower.logits(torch.rand(1, 3, 32, 32))


def test_configs_and_weights_that_have_no_place_are_named(as_saved):
    config, state = as_saved(theirs("basic"))
    with pytest.raises(CheckpointError, match=r"hidden_act is 'gelu', expected 'relu'; downsample_in_bottleneck is"):
        sizes_from({**config, "hidden_act": "gelu", "downsample_in_bottleneck": True})
    with pytest.raises(CheckpointError, match=r"layer_type is 'preact', expected one of 'bottleneck', 'basic'"):
        sizes_from({**config, "layer_type": "preact"})
    with pytest.raises(CheckpointError, match=r"1 names have no place here \(encoder\.stages\.0\.extra\)"):
        to_ours({**state, "resnet.encoder.stages.0.extra": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"1 of our weights have no name in this layout \(neck\.weight\)"):
        to_official({"neck.weight": torch.zeros(1)})
