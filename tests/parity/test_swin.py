"""Swin = transformers' Swin in values, gradients and files; windows = a mask over the map; cost = the paper's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    SwinModel,
)

from plait.core.errors import CheckpointError, ConfigError, DataError
from plait.core.protocols import Encoder
from plait.core.tensors import Patches
from plait.models.attention import Attention, AttentionSizes, Places
from plait.models.hub.swin import config_from, sizes_from, to_official, to_ours
from plait.models.position.relative import GridBias, gaps
from plait.models.towers.swin import SWIN_B, SWIN_L, SWIN_S, SWIN_T, Swin, SwinSizes, Windows

TINY = SwinSizes(d=8, depths=(2, 2, 1), heads=(2, 2, 4), window=4, num_classes=3, drop_path=0.0)
NEAR = {"atol": 1e-12, "rtol": 1e-9}


def stirred(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights far from those of a fresh model, in float64; biases of distances are zeros there."""
    torch.manual_seed(seed)
    for value in model.parameters():
        value.data.add_(torch.randn_like(value), alpha=0.2)
    return model.double()


def theirs(made: type = SwinForImageClassification, **settings) -> SwinForImageClassification | SwinModel:
    sizes = {"embed_dim": 8, "depths": [2, 2, 1], "num_heads": [2, 2, 4], "window_size": 4, "image_size": 64}
    return stirred(made(SwinConfig(**{**sizes, "drop_path_rate": 0.0, "num_labels": 3, **settings}))).eval()


@pytest.mark.row("S0-03")
@pytest.mark.parametrize(
    "size",
    [
        pytest.param((64, 64), id="windows fit"),
        pytest.param((64, 128), id="not square"),
        pytest.param((75, 90), id="patches, windows and merges are padded"),
        pytest.param((120, 61), id="padded, the last map is one window wide"),
    ],
)
@pytest.mark.parametrize(
    "settings", [{}, {"qkv_bias": False, "mlp_ratio": 2.5, "layer_norm_eps": 1e-3, "patch_size": 3}]
)
def test_maps_logits_and_gradients(as_saved, size, settings):
    reference = theirs(**settings)
    config, state = as_saved(reference)
    tower = Swin(sizes_from(config)).double()
    tower.load_state_dict(to_ours(state), strict=True)
    ours = torch.rand(3, 3, *size, dtype=torch.float64).requires_grad_()
    other = ours.detach().clone().requires_grad_()

    maps, logits = tower.stages(ours), tower.logits(ours)
    inner = reference.swin(
        tower.normalize(other), output_hidden_states=True, output_hidden_states_before_downsampling=True
    )
    # Measured: 4e-15 of the largest number at worst, gradients included.
    for found, wanted in zip(maps, inner.reshaped_hidden_states[1:], strict=True):
        torch.testing.assert_close(found, wanted, **NEAR)
    torch.testing.assert_close(tower.features(ours).flatten(2).mT, inner.last_hidden_state, **NEAR)
    wanted = reference(tower.normalize(other)).logits
    torch.testing.assert_close(logits, wanted, **NEAR)

    pull = torch.randn_like(wanted)
    (logits * pull).sum().backward()
    (wanted * pull).sum().backward()
    torch.testing.assert_close(ours.grad, other.grad, **NEAR)
    gradients = to_ours(as_saved(reference, gradients=True).state)
    for name, weight in tower.named_parameters():
        torch.testing.assert_close(weight.grad, gradients[name], **NEAR, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("num_classes", [0, 2, 5])
@torch.no_grad()
def test_ours_loads_in_transformers_and_comes_back(as_saved, loaded, num_classes):
    sizes = replace(TINY, num_classes=num_classes)
    tower = stirred(Swin(sizes)).eval()
    auto = AutoModelForImageClassification if num_classes else AutoModel
    reference = loaded(auto, config_from(sizes, image_size=64), to_official(tower.state_dict()))
    pixels = torch.rand(2, 3, 64, 72, dtype=torch.float64)
    found = reference(tower.normalize(pixels))
    if num_classes:
        torch.testing.assert_close(tower.logits(pixels), found.logits, **NEAR)
    else:
        torch.testing.assert_close(tower.features(pixels).flatten(2).mT, found.last_hidden_state, **NEAR)
    config, state = as_saved(reference)
    assert sizes_from(config) == sizes
    back = to_ours(state)
    assert back.keys() == tower.state_dict().keys()
    assert all(torch.equal(back[name], value) for name, value in tower.state_dict().items())


@pytest.mark.row("S0-03")
@torch.no_grad()
def test_a_map_smaller_than_the_window_is_its_own_window(as_saved):
    """Transformers 5.23 cannot compute this; a reference with the small window and the inner part of the table can."""
    wide = stirred(Swin(SwinSizes(d=8, depths=(2,), heads=(2,), window=5))).eval()
    small = theirs(SwinModel, depths=[2], num_heads=[2], window_size=3)
    state = to_official(wide.state_dict())
    for name in [n for n in state if n.endswith("table")]:
        state[name] = state[name].view(9, 9, 2)[2:7, 2:7].flatten(0, 1)
    narrow = Swin(SwinSizes(d=8, depths=(2,), heads=(2,), window=3)).double().eval()
    narrow.load_state_dict(to_ours(state))
    pixels = torch.rand(2, 3, 12, 40, dtype=torch.float64)
    torch.testing.assert_close(wide.features(pixels), narrow.features(pixels), **NEAR)
    same = Swin(sizes_from(as_saved(small).config)).double().eval()
    same.load_state_dict(to_ours(as_saved(small).state))
    wanted = small(same.normalize(pixels)).last_hidden_state
    torch.testing.assert_close(same.features(pixels).flatten(2).mT, wanted, **NEAR)


@pytest.mark.row("S0-03")
@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 9), window=st.integers(1, 4), data=st.data())
def test_windows_are_a_mask_over_the_whole_map(rows, columns, window, data):
    """Oracle: attention over all cells of the padded map, allowed where ``(at - shift) // window`` is equal."""
    shift = data.draw(st.integers(0, window - 1))
    torch.manual_seed(0)
    attention = Attention(AttentionSizes(d=4, heads=2), relative=GridBias(2, window, window)).double()
    x = torch.randn(2, rows * columns, 4, dtype=torch.float64, requires_grad=True)
    windows = Windows(rows, columns, window, shift=shift, like=x, pictures=2)
    found = windows.joined(attention(windows.split(x), windows.places).values)

    high, wide = (-(-side // window) * window for side in (rows, columns))
    padded = torch.nn.functional.pad(x.unflatten(1, (rows, columns)), (0, 0, 0, wide - columns, 0, high - rows))
    at = torch.cartesian_prod(torch.arange(high), torch.arange(wide)).view(-1, 2)
    of = (at - shift).div(window, rounding_mode="floor")
    gap = gaps(at, at).clamp(1 - window, window - 1)
    places = Places(mask=(of[:, None] == of[None]).all(-1)[None, None], gap=gap)
    wanted = attention(padded.flatten(1, 2), places).values.unflatten(1, (high, wide))[:, :rows, :columns].flatten(1, 2)
    torch.testing.assert_close(found, wanted, **NEAR)
    pull = torch.randn_like(wanted)
    torch.testing.assert_close(*(torch.autograd.grad((y * pull).sum(), x)[0] for y in (found, wanted)), **NEAR)


@pytest.mark.row("S0-03")
@pytest.mark.parametrize(
    ("sizes", "weights"), [(SWIN_T, 28_288_354), (SWIN_S, 49_606_258), (SWIN_B, 87_768_224), (SWIN_L, 196_532_476)]
)
def test_published_numbers_of_parameters(sizes, weights):
    sizes = replace(sizes, num_classes=1000)
    with torch.device("meta"):
        tower = Swin(sizes)
        reference = AutoModelForImageClassification.from_config(AutoConfig.for_model(**config_from(sizes)))
    assert sum(p.numel() for p in tower.parameters()) == weights
    assert reference.num_parameters() == weights


@pytest.mark.row("S0-03")
@pytest.mark.parametrize("shift", [0, 3])
def test_cost_of_attention_is_equations_1_and_2(shift):
    h = w = 14
    c, heads = 12, 3

    def products(window: int) -> float:
        attention = Attention(
            AttentionSizes(d=c, heads=heads), relative=GridBias(heads, window, window), backend="reference"
        )
        x = torch.rand(1, h * w, c)
        windows = Windows(h, w, window, shift=shift, like=x, pictures=1)
        with FlopCounterMode(display=False) as counter:
            windows.joined(attention(windows.split(x), windows.places).values)
        return counter.get_total_flops() / 2  # it counts a multiplication and an addition as two

    assert products(7) == 4 * h * w * c**2 + 2 * 7**2 * h * w * c
    assert products(14) == 4 * h * w * c**2 + 2 * (h * w) ** 2 * c


@pytest.mark.row("S0-03")
@torch.no_grad()
def test_cost_of_the_tower_is_linear_in_the_area():
    tower = Swin(TINY, backend="reference").eval()

    def flops(height: int, width: int) -> float:
        with FlopCounterMode(display=False) as counter:
            tower.features(torch.rand(1, 3, height, width))
        return counter.get_total_flops()

    one = flops(64, 64)
    assert [flops(64, 128), flops(128, 128), flops(192, 256)] == [2 * one, 4 * one, 12 * one]


def test_later_blocks_are_skipped_more_often_and_for_whole_pictures():
    tower = Swin(replace(TINY, drop_path=0.4))
    parts = [block.attention_part.drop_path for stage in tower.blocks for block in stage.blocks]
    assert parts == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    torch.manual_seed(0)
    tower.train()
    same = torch.rand(1, 3, 64, 64).expand(64, -1, -1, -1)
    maps = tower.stages(same)[0].flatten(1)  # of the first two blocks, whose shares are 0 and 0.1
    assert 1 < len(maps.round(decimals=4).unique(dim=0)) <= 4


@torch.inference_mode()
def test_pictures_of_mixed_sizes_come_out_as_if_encoded_alone():
    tower = stirred(Swin(TINY, batch_size=2)).eval()
    shapes = ((1, 64, 32), (2, 40, 70), (1, 64, 32), (3, 1, 33))
    pictures = [torch.rand(f, h, w, 3, dtype=torch.float64) for f, h, w in shapes]
    values, grid = torch.cat([p.reshape(-1, 3) for p in pictures]), torch.tensor(shapes)
    together = tower(Patches(values=values, grid=grid))
    alone = [tower.features(p.permute(0, 3, 1, 2)) for p in pictures]
    assert together.grid.tolist() == [[len(m), *m.shape[2:]] for m in alone]
    wanted = torch.cat([m[f, :, r, c][None] for m in alone for f, r, c in cells(m)])
    torch.testing.assert_close(together.values, wanted, **NEAR)


def cells(maps):
    """Frame, row and column in raster order, written out."""
    frames, _, rows, columns = maps.shape
    return [(f, r, c) for f in range(frames) for r in range(rows) for c in range(columns)]


@settings(max_examples=15, deadline=None)
@given(size=st.tuples(st.integers(1, 80), st.integers(1, 80)))
@torch.inference_mode()
def test_the_token_account_is_what_forward_gives(size):
    tower = Swin(TINY).eval()
    media = Patches(values=torch.rand(size[0] * size[1], 3), grid=torch.tensor([[1, *size]]))
    out = tower(media)
    assert out.grid.equal(tower.grid_out(media.grid))
    assert out.values.shape == (int(out.grid.prod()), tower.d_out)
    assert out.values.isfinite().all()


def test_bfloat16_follows_float32():
    tower = stirred(Swin(TINY)).float().eval()
    pixels = torch.rand(2, 3, 75, 90)
    wanted, found = tower.features(pixels), tower.bfloat16().features(pixels)
    assert found.dtype == torch.bfloat16
    assert (found.float() - wanted).norm() / wanted.norm() < 0.03  # worst of 20 seeds: 0.014


def test_it_is_an_encoder_and_refuses_what_is_not_its_input():
    tower = Swin(replace(TINY, num_classes=0))
    assert isinstance(tower, Encoder)
    with pytest.raises(DataError, match=r"counts 1024 RGB pixels, came \(1023, 3\) \| at Swin input"):
        tower(Patches(values=torch.rand(1023, 3), grid=torch.tensor([[1, 32, 32]])))
    assert tower(Patches(values=torch.rand(0, 3), grid=torch.zeros(0, 3, dtype=torch.long))).values.shape == (0, 32)
    with pytest.raises(ConfigError, match="3 depths, 2 heads"):
        replace(TINY, heads=(2, 2))
    with pytest.raises(ConfigError, match="no classifier"):
        tower.logits(torch.rand(1, 3, 32, 32))
    with pytest.raises(ConfigError, match="5 heads"):
        Swin(replace(TINY, heads=(5, 2, 2)))


def test_configs_and_weights_that_have_no_place_are_named(as_saved):
    config, state = as_saved(theirs())
    with pytest.raises(CheckpointError, match=r"hidden_act is 'relu', expected 'gelu'; use_absolute_embeddings is"):
        sizes_from({**config, "hidden_act": "relu", "use_absolute_embeddings": True})
    assert sizes_from({**config, "patch_size": [4, 4]}).patch == 4
    with pytest.raises(CheckpointError, match="patch_size is 4 x 2, expected a square"):
        sizes_from({**config, "patch_size": [4, 2]})
    index = {"swin.encoder.layers.0.blocks.1.attention.self.relative_position_index": torch.zeros(1)}
    assert to_ours({**state, **index}).keys() == to_ours(state).keys()
    with pytest.raises(CheckpointError, match=r"1 names have no place here \(embeddings\.mask_token\)"):
        to_ours({**state, "swin.embeddings.mask_token": torch.zeros(1)})
    del state["swin.encoder.layers.0.blocks.0.attention.self.key.bias"]
    with pytest.raises(CheckpointError, match=r"1 matrices miss parts \(blocks\.0\.blocks\.0\.attention\.qkv\.bias\)"):
        to_ours(state)
    with pytest.raises(CheckpointError, match=r"1 of our weights have no name in this layout \(neck\.weight\)"):
        to_official({"neck.weight": torch.zeros(1)})
