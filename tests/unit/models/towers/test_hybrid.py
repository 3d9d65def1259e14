"""Convolutions before a Transformer: parts = torch's own, stages fit, positions are heard, any size goes through."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from plait.core.errors import ConfigError, DataError
from plait.core.protocols import Encoder
from plait.core.tensors import Patches
from plait.models.position.absolute import LearnedGrid, LearnedRowColumn, SinCosGrid
from plait.models.position.relative import GridBias, LinearBias
from plait.models.position.rotary import Rotary
from plait.models.towers.hybrid import (
    COATNET_0,
    COATNET_1,
    CoAtNetSizes,
    HybridTower,
    OnCells,
    attention_stage,
    coatnet,
    early_convolutions,
)
from plait.models.transformer import Transformer, TransformerSizes

SIZES = TransformerSizes(d=16, depth=2, heads=2)
TINY = CoAtNetSizes(widths=(8, 8, 8, 16, 32), depths=(2, 1, 1, 2, 1), d_head=8, picture=96, num_classes=3)
NEAR = {"atol": 1e-12, "rtol": 1e-9}


def early(**settings) -> HybridTower:
    cells = OnCells(Transformer(SIZES), absolute=SinCosGrid(16))
    return HybridTower([early_convolutions((4, 8, 16), 16), attention_stage(cells)], **settings)


def stirred(tower: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for name, value in [*tower.named_parameters(), *tower.named_buffers()]:
        if name.endswith("running_var"):
            value.data.uniform_(0.5, 1.5)
        elif "norm" in name and value.is_floating_point() and "normalize" not in name:
            value.data.add_(torch.randn_like(value), alpha=0.2)
        elif name.endswith("table"):
            value.data.normal_()
    return tower.double().eval()


@pytest.mark.row("S0-04")
@pytest.mark.parametrize("training", [False, True])
def test_early_convolutions_and_transformer_are_those_of_torch(training):
    tower = stirred(early()).train(training)
    stem, cells = (part.inner for part in tower.parts)
    pixels = torch.rand(2, 3, 50, 71, dtype=torch.float64)
    x = tower.normalize(pixels)
    for part in stem[:-1]:
        norm = part.norm
        x = functional.conv2d(functional.pad(x, (1, 1, 1, 1)), part.conv.weight, stride=2)
        mean, var = (
            (x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)) if training else (norm.running_mean, norm.running_var)
        )
        x = (x - mean[:, None, None]) / (var + 1e-5).sqrt()[:, None, None] * norm.weight[:, None, None]
        x = (x + norm.bias[:, None, None]).clamp(min=0)
    x = torch.einsum("bchw,dc->bhwd", x, stem[-1].weight[:, :, 0, 0]) + stem[-1].bias
    rows, columns = x.shape[1:3]
    x = x.flatten(1, 2) + SinCosGrid(16)(rows, columns)
    transformer = cells[0].transformer
    for block in transformer.blocks:
        layer = nn.TransformerEncoderLayer(
            16, 2, 64, dropout=0.0, activation="gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
        ).double()
        pairs = {
            layer.self_attn.in_proj_weight: block.attention.qkv.weight,
            layer.self_attn.in_proj_bias: block.attention.qkv.bias,
        }
        for theirs, ours in (
            (layer.self_attn.out_proj, block.attention.out),
            (layer.linear1, block.feed_forward.up),
            (layer.linear2, block.feed_forward.down),
            (layer.norm1, block.attention_part.norm),
            (layer.norm2, block.feed_forward_part.norm),
        ):
            pairs |= {theirs.weight: ours.weight, theirs.bias: ours.bias}
        for theirs, ours in pairs.items():
            theirs.data = ours.data
        x = layer(x)
    wanted = functional.layer_norm(x, (16,), transformer.norm.weight, transformer.norm.bias, 1e-6)
    found = tower.features(pixels)
    assert found.shape == (2, 16, 7, 9)
    torch.testing.assert_close(found.flatten(2).mT, wanted, **NEAR)  # measured: 4e-15


@pytest.mark.row("S0-04")
def test_early_convolutions_cost_what_their_filters_say():
    stem = early_convolutions((4, 8, 16, 32), 24)
    with FlopCounterMode(display=False) as counter:
        stem(torch.rand(1, 3, 64, 96))
    area = 64 * 96
    filters = [(3, 4), (4, 8), (8, 16), (16, 32)]
    wanted = sum(9 * a * b * area // 4**i for i, (a, b) in enumerate(filters, 1)) + 32 * 24 * area // 4**4
    assert counter.get_total_flops() / 2 == wanted


@pytest.mark.row("S0-04")
@pytest.mark.parametrize(("sizes", "millions"), [(COATNET_0, 25), (COATNET_1, 42)])
def test_coatnets_are_as_large_as_the_papers(sizes, millions):
    with torch.device("meta"):
        tower = coatnet(replace(sizes, num_classes=1000))
    assert round(sum(p.numel() for p in tower.parameters()) / 1e6) == millions


CODES = {
    "sines and cosines": lambda: OnCells(Transformer(SIZES), absolute=SinCosGrid(16)),
    "learned": lambda: OnCells(Transformer(SIZES), absolute=LearnedGrid(3, 3, 16)),
    "rows plus columns": lambda: OnCells(Transformer(SIZES), absolute=LearnedRowColumn(4, 5, 16)),
    "rotary": lambda: OnCells(Transformer(SIZES), rotary=Rotary.grid(8)),
    "bias": lambda: OnCells(Transformer(SIZES, relative=lambda _: GridBias(2, 4, 5))),
    "ALiBi": lambda: OnCells(Transformer(SIZES, relative=lambda _: LinearBias(2))),
    "absolute and relative": lambda: OnCells(
        Transformer(SIZES, relative=lambda _: GridBias(2, 6, 6)), absolute=SinCosGrid(16), rotary=Rotary.grid(8)
    ),
}


@pytest.mark.row("S0-04")
@pytest.mark.parametrize("code", [None, *CODES])
@torch.no_grad()
def test_cells_are_a_set_until_a_position_code_says_where_they_are(code):
    torch.manual_seed(0)
    cells = stirred(OnCells(Transformer(SIZES)) if code is None else CODES[code]())
    maps = torch.randn(2, 16, 4, 5, dtype=torch.float64)
    mixed = maps.flatten(2)[:, :, torch.randperm(20)].unflatten(2, (4, 5))
    here, there = (cells(m).mean((2, 3)) for m in (maps, mixed))
    assert torch.allclose(here, there, atol=1e-12) == (code is None)


@torch.no_grad()
def test_relative_biases_serve_smaller_maps_refuse_larger_ones_and_can_be_fitted():
    tower = stirred(coatnet(TINY))
    wide = stirred(coatnet(replace(TINY, picture=128)))
    wide.load_state_dict({**tower.state_dict(), **{n: v for n, v in wide.state_dict().items() if n.endswith("table")}})
    for narrow, large in zip(tables(tower), tables(wide), strict=True):
        (rows, columns), (most, _) = narrow.grid, large.grid
        spare = most - rows
        inner = large.table.view(2 * most - 1, 2 * most - 1, -1)[
            spare : spare + 2 * rows - 1, spare : spare + 2 * columns - 1
        ]
        narrow.table.data = inner.flatten(0, 1).clone()
    pixels = torch.rand(1, 3, 96, 64, dtype=torch.float64)
    torch.testing.assert_close(tower.features(pixels), wide.features(pixels), **NEAR)
    with pytest.raises(DataError, match=r"a map of 6 x 7 cells, the relative bias knows 6 x 6"):
        tower.features(torch.rand(1, 3, 96, 97, dtype=torch.float64))
    before = tower.features(pixels)
    tower.fit(96, 96)
    torch.testing.assert_close(tower.features(pixels), before, atol=1e-6, rtol=1e-5)  # interpolated in float32
    tower.fit(96, 200)
    assert [t.grid for t in tables(tower)] == [(6, 13), (6, 13), (3, 7)]
    assert tower.features(torch.rand(1, 3, 96, 200, dtype=torch.float64)).shape == (1, 32, 3, 7)


def tables(tower: HybridTower) -> list[GridBias]:
    return [module for module in tower.modules() if isinstance(module, GridBias)]


@pytest.mark.row("S0-04")
@pytest.mark.parametrize("make", [early, lambda: coatnet(replace(TINY, num_classes=0))])
def test_gradients_reach_the_pixels_and_every_weight(make):
    tower = make().train()
    assert isinstance(tower, Encoder)
    values = torch.rand(2 * 96 * 80, 3, requires_grad=True)
    tower(Patches(values=values, grid=torch.tensor([[2, 96, 80]]))).values.square().sum().backward()
    assert values.grad.abs().sum() > 0
    assert not [name for name, p in tower.named_parameters() if p.grad is None]


@pytest.mark.row("S0-04")
@pytest.mark.parametrize("make", [early, lambda: coatnet(TINY)])
@torch.inference_mode()
def test_pictures_of_mixed_sizes_come_out_as_if_encoded_alone(make):
    tower = stirred(make())
    tower.batch_size = 2
    shapes = ((1, 64, 32), (2, 40, 70), (1, 64, 32), (3, 1, 33))
    pictures = [torch.rand(f, h, w, 3, dtype=torch.float64) for f, h, w in shapes]
    values, grid = torch.cat([p.reshape(-1, 3) for p in pictures]), torch.tensor(shapes)
    together = tower(Patches(values=values, grid=grid))
    alone = [tower.features(p.permute(0, 3, 1, 2)) for p in pictures]
    assert together.grid.tolist() == [[len(m), *m.shape[2:]] for m in alone]
    torch.testing.assert_close(together.values, torch.cat([m.permute(0, 2, 3, 1).flatten(0, 2) for m in alone]), **NEAR)


@settings(max_examples=12, deadline=None)
@given(size=st.tuples(st.integers(1, 96), st.integers(1, 96)), which=st.sampled_from(["early", "coatnet"]))
@torch.inference_mode()
def test_the_token_account_is_what_forward_gives(size, which):
    tower = (early() if which == "early" else coatnet(TINY)).eval()
    media = Patches(values=torch.rand(size[0] * size[1], 3), grid=torch.tensor([[1, *size]]))
    out = tower(media)
    assert out.grid.equal(tower.grid_out(media.grid))
    assert out.values.shape == (int(out.grid.prod()), tower.d_out)
    assert all(
        m.shape[1] == part.d_out for m, part in zip(tower.stages(torch.rand(1, 3, *size)), tower.parts, strict=True)
    )


def test_a_hybrid_learns():
    """Which half of the picture is striped."""
    torch.manual_seed(0)
    tower = coatnet(replace(TINY, picture=64, num_classes=2)).train()
    pixels = torch.rand(32, 3, 64, 64) * 0.3
    side = torch.arange(32) % 2
    for picture, right in zip(pixels, side, strict=True):
        picture[:, ::2, 32 * int(right) : 32 * int(right) + 32] += 0.5
    optimizer = torch.optim.AdamW(tower.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = functional.cross_entropy(tower.logits(pixels), side)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.1 < losses[0], losses


def test_stages_that_do_not_fit_are_named():
    cells = OnCells(Transformer(SIZES))
    with pytest.raises(ConfigError, match="stage 1 takes 16 channels, what comes before it gives 12"):
        HybridTower([early_convolutions((4, 8), 12), attention_stage(cells)])
    with pytest.raises(ConfigError, match="stage 0 takes 16 channels, what comes before it gives 3"):
        HybridTower([attention_stage(cells)])
    with pytest.raises(ConfigError, match=r"heads of 8 do not divide widths \(16, 36\)"):
        replace(TINY, widths=(8, 8, 8, 16, 36))
    with pytest.raises(ConfigError, match="no classifier"):
        early().logits(torch.rand(1, 3, 32, 32))
