"""Ours against transformers: every family of picture towers, from a folder, on the same pixels.

The reference is the family's own class, loaded from the same folder, called by its own documentation, one picture at a
time. All weights are drawn at random, those that start at zero as well: a bias table of zeros proves nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from plait.assembly.towers import ImageTower, load_image_tower
from plait.core.errors import ConfigError
from plait.core.protocols import Encoder
from plait.core.tensors import Patches

MEAN, STD = (0.48, 0.45, 0.40), (0.26, 0.25, 0.27)

Reference = Callable[[PreTrainedModel, Tensor], Tensor]
"""Normalized picture ``1 3 h w`` to tokens ``n d`` in raster order."""


def tokens(leading: int, **arguments: Any) -> Reference:
    return lambda model, pixels: model(pixel_values=pixels, **arguments).last_hidden_state[0, leading:]


def cells(model: PreTrainedModel, pixels: Tensor) -> Tensor:
    """Every row of cells after the other."""
    last = model(pixel_values=pixels).last_hidden_state[0]
    return torch.stack([last[:, i, j] for i in range(last.shape[1]) for j in range(last.shape[2])])


def unmasked(model: PreTrainedModel, pixels: Tensor) -> Tensor:
    """Patches in any order are put back by what the model says of it; here all are kept."""
    model.config.mask_ratio = 0.0
    torch.manual_seed(7)
    out = model(pixel_values=pixels, interpolate_pos_encoding=True)
    assert not out.mask.any()
    assert len(out.ids_restore[0]) < 2 or not out.ids_restore[0].equal(out.ids_restore[0].sort().values)
    return out.last_hidden_state[0, 1:][out.ids_restore[0]]


def naflex(model: PreTrainedModel, pixels: Tensor) -> Tensor:
    """As the processor of SigLIP 2 makes it: patches of numpy, padded to 30, with a mask."""
    from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches, pad_along_first_dim

    patch = model.config.patch_size
    patches, mask = pad_along_first_dim(convert_image_to_patches(pixels[0].detach().numpy(), patch), 30)
    rows, columns = (side // patch for side in pixels.shape[2:])
    out = model(
        pixel_values=torch.from_numpy(patches)[None],
        pixel_attention_mask=torch.from_numpy(mask)[None],
        spatial_shapes=torch.tensor([[rows, columns]]),
    )
    return out.last_hidden_state[0, : rows * columns]


def pixtral(model: PreTrainedModel, pixels: Tensor) -> Tensor:
    """Two pictures padded to one size and packed, as its processor makes it; the first is looked at."""
    h, w = pixels.shape[2:]
    pair = functional.pad(torch.cat([pixels, pixels.flip(2)]), (0, 8, 0, 8))
    out = model(pixel_values=pair, image_sizes=torch.tensor([[h, w], [h + 8, w + 8]])).last_hidden_state[0]
    return out[: (h // 8) * (w // 8)]


@dataclass(frozen=True, kw_only=True)
class Case:
    """How to call the original of a family, and what is expected of ours."""

    reference: Reference
    cell: int = 8
    pad_to: int = 8
    sizes: tuple[tuple[int, int], ...] = ((32, 32), (16, 40), (29, 18), (48, 48))
    layers: int = 2
    idle: tuple[str, ...] = ()
    """Weights that no patch token depends on."""
    centered: bool = True
    """Whether a cell looks at its middle; a stride of 2 with a padding of 1 looks at its corner."""
    mixing: str = ""
    """Part of the names of weights without which tokens see only themselves."""


ASKED = {"interpolate_pos_encoding": True}
SWIN_SIZES = ((32, 32), (64, 48), (36, 60), (32, 32))
MASK = ("embeddings.mask_token",)
AFTER, POOLED = ("post_layernorm.bias", "post_layernorm.weight"), ("layernorm.bias", "layernorm.weight")
SHRINKS = {"cell": 16, "pad_to": 16, "layers": 0}
WINDOWS = {"pad_to": 4, "layers": 0}
RESIDUAL = {"pad_to": 1, "layers": 0, "centered": False}

CASES = {
    "clip": Case(reference=tokens(1, **ASKED), idle=AFTER),
    "siglip": Case(reference=tokens(0, **ASKED)),
    "siglip2": Case(reference=naflex),
    "aimv2": Case(reference=tokens(0), sizes=((32, 32),)),
    "aimv2-native": Case(reference=tokens(0)),
    "mlcd": Case(reference=tokens(1), idle=AFTER),
    "pixtral": Case(reference=pixtral),
    "vit": Case(reference=tokens(1, **ASKED)),
    "deit": Case(reference=tokens(2, **ASKED)),
    "vit_mae": Case(reference=unmasked),
    "vit_msn": Case(reference=tokens(1, **ASKED)),
    "ijepa": Case(reference=tokens(0, **ASKED)),
    "beit": Case(reference=tokens(1)),
    "beit-shared": Case(reference=tokens(1)),
    "data2vec": Case(reference=tokens(1)),
    "dinov2": Case(reference=tokens(1), idle=MASK),
    "dinov2-registers": Case(reference=tokens(4), idle=MASK),
    "dinov3": Case(reference=tokens(4), idle=MASK),
    "dinov3-convnext": Case(reference=tokens(1), **SHRINKS),
    "convnext": Case(reference=cells, **SHRINKS, idle=POOLED),
    "convnextv2": Case(reference=cells, **SHRINKS, idle=POOLED),
    "swin": Case(reference=tokens(0), **WINDOWS, sizes=SWIN_SIZES),
    "swin-absolute": Case(reference=tokens(0, **ASKED), **WINDOWS, sizes=SWIN_SIZES),
    "swinv2": Case(reference=tokens(0), **WINDOWS, sizes=(*SWIN_SIZES, (9, 11)), mixing="attention.output.dense"),
    "resnet": Case(reference=cells, **RESIDUAL, cell=16),
    "resnet-v15": Case(reference=cells, **RESIDUAL, cell=32, mixing="layer.1.convolution"),
    "regnet": Case(reference=cells, **RESIDUAL, cell=16),
}


def each(*, where: Callable[[Case], bool] = lambda case: True) -> pytest.MarkDecorator:
    """A test for every family."""
    return pytest.mark.parametrize("name", [name for name, case in CASES.items() if where(case)])


def load(path: Path, **settings: Any) -> ImageTower:
    return load_image_tower(str(path), dtype="float32", **settings)


def picture(h: int, w: int, seed: int = 0) -> Patches:
    values = torch.rand(h * w, 3, generator=torch.Generator().manual_seed(seed))
    return Patches(values=values, grid=torch.tensor([[1, h, w]]))


def joined(*items: Patches) -> Patches:
    return Patches(values=torch.cat([i.values for i in items]), grid=torch.cat([i.grid for i in items]))


def normalized(item: Patches, pad_to: int) -> Tensor:
    """What transformers gets: our pixels after normalization, padded below and to the right with zeros."""
    _, h, w = item.grid[0].tolist()
    pixels = (item.values.view(h, w, 3) - torch.tensor(MEAN)) / torch.tensor(STD)
    return functional.pad(pixels.permute(2, 0, 1), (0, -w % pad_to, 0, -h % pad_to))[None]


# --- values --------------------------------------------------------------------------------------------------------


@pytest.mark.row("S2-01")
@pytest.mark.row("S0-02")
@pytest.mark.row("S0-03")
@each()
@torch.no_grad()
def test_tokens_are_those_of_transformers_at_every_size(name, tiny_towers):
    """Worst of all families and sizes measured: 2.1e-5 of values up to 64 (ResNet), elsewhere 7.2e-7."""
    case, path = CASES[name], tiny_towers.folder(name)
    tower = load(path)
    assert isinstance(tower.encoder, Encoder)
    items = [picture(h, w, seed) for seed, (h, w) in enumerate(case.sizes)]
    media = joined(*items, items[0])
    out = tower.encoder(media)
    assert out.grid.equal(tower.encoder.grid_out(media.grid))
    assert out.grid[:-1].tolist() == [[1, -(-h // case.cell), -(-w // case.cell)] for h, w in case.sizes]
    # A fresh one for each: transformers' Swin remembers the sizes it has seen.
    fresh = tiny_towers.theirs(name)
    wanted = [case.reference(deepcopy(fresh), normalized(item, case.pad_to)) for item in [*items, items[0]]]
    torch.testing.assert_close(out.values, torch.cat(wanted), atol=2e-5, rtol=1e-5)
    assert out.values.shape[1] == tower.encoder.d_out
    assert out.values.std() > 0.1, "a tower whose tokens are alike would pass anything"


@each()
@torch.no_grad()
def test_mixed_sizes_give_what_one_by_one_gives_in_any_order(name, tiny_towers):
    """Worst measured: 1.6e-5 of values up to 76 (ResNet), elsewhere 9.5e-7."""
    sizes = CASES[name].sizes if name == "aimv2" else ((40, 24), (5, 70), (64, 64), (40, 24), (1, 1), (64, 64), (9, 9))
    encoder = load(tiny_towers.folder(name)).encoder
    items = [picture(h, w, seed) for seed, (h, w) in enumerate(sizes)]
    alone = [deepcopy(encoder)(item) for item in items]
    together = encoder(joined(*items))
    torch.testing.assert_close(together.values, torch.cat([a.values for a in alone]), atol=2e-5, rtol=1e-5)
    assert together.grid.equal(torch.cat([a.grid for a in alone]))
    for item, first in reversed(list(zip(items, alone, strict=True))):
        torch.testing.assert_close(encoder(item).values, first.values, atol=2e-5, rtol=1e-5)


@each(where=lambda case: len(case.sizes) > 1)
@torch.no_grad()
def test_the_account_holds_for_every_size(name, tiny_towers):
    """``by_size`` compares the number of tokens with ``grid_out`` and refuses any difference."""
    encoder = load(tiny_towers.folder(name)).encoder
    sides = [1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 47, 65]
    items = [picture(h, w) for h, w in zip(sides, reversed(sides), strict=True)]
    out = encoder(joined(*items, picture(1, 400)))
    assert out.values.isfinite().all()
    video = Patches(values=torch.rand(3 * 16 * 24, 3), grid=torch.tensor([[3, 16, 24]]))
    frames = encoder(video)
    one = encoder(Patches(values=video.values[16 * 24 : 2 * 16 * 24], grid=torch.tensor([[1, 16, 24]])))
    n = len(one.values)
    torch.testing.assert_close(frames.values[n : 2 * n], one.values, atol=2e-5, rtol=1e-5)


@each()
def test_each_token_looks_most_at_its_own_patch(name, tiny_towers):
    """Raster order, seen from outside: the gradient of token i by the pixels is largest in patch i."""
    case = CASES[name]
    encoder = load(tiny_towers.folder(name)).encoder
    for key, weight in encoder.backbone.named_parameters():
        if case.mixing and case.mixing in key:
            weight.data.zero_()
    rows, columns = (4, 4) if name == "aimv2" else (3, 5)
    item = picture(rows * case.cell, columns * case.cell)
    pixels = item.values.requires_grad_()
    out = encoder(Patches(values=pixels, grid=item.grid))
    assert out.grid.tolist() == [[1, rows, columns]]
    direction = torch.randn(encoder.d_out, generator=torch.Generator().manual_seed(0))
    half = 0 if case.centered else case.cell // 2
    seen = []
    for token in out.values:
        (gradient,) = torch.autograd.grad(token @ direction, pixels, retain_graph=True)
        map_ = gradient.abs().sum(1).view(rows * case.cell, columns * case.cell)
        map_ = functional.pad(map_, (half, -half, half, -half))
        seen.append(int(map_.view(rows, case.cell, columns, case.cell).sum((1, 3)).argmax()))
    assert seen == list(range(rows * columns))


@pytest.mark.parametrize("name", ["clip", "siglip2", "beit", "dinov3", "pixtral", "swin", "swinv2", "convnext"])
@torch.no_grad()
def test_bfloat16_changes_only_the_last_bits(name, tiny_towers):
    """Positions are interpolated in bfloat16, too. Lowest cosine measured: 0.998 (Swin V2), elsewhere 0.9999."""
    path = tiny_towers.folder(name)
    media = joined(picture(32, 32, 0), picture(40, 24, 1))
    wide, narrow = (load_image_tower(str(path), dtype=kind).encoder(media) for kind in ("float32", "bfloat16"))
    assert narrow.values.dtype == torch.bfloat16
    assert functional.cosine_similarity(wide.values, narrow.values.float(), dim=1).min() > 0.995


# --- gradients -----------------------------------------------------------------------------------------------------

CHECKED = ("clip", "siglip", "vit", "beit", "dinov2-registers", "dinov3", "swin", "swinv2", "convnext", "resnet")


@pytest.mark.row("S2-01")
@pytest.mark.row("S0-03")
@pytest.mark.parametrize("name", CHECKED)
def test_gradients_are_those_of_transformers(name, tiny_towers):
    """Worst measured: 1.1e-6 of the largest gradient of a weight."""
    case, path = CASES[name], tiny_towers.folder(name)
    encoder = load(path).encoder
    assert isinstance(encoder, nn.Module)
    encoder.requires_grad_(requires_grad=True)
    reference = tiny_towers.theirs(name)
    item = picture(*case.sizes[1])
    ours, theirs_ = item.values.clone().requires_grad_(), item.values.clone().requires_grad_()
    out = encoder(Patches(values=ours, grid=item.grid)).values
    wanted = case.reference(reference, normalized(Patches(values=theirs_, grid=item.grid), case.pad_to))
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    (out * weights).sum().backward()
    (wanted * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs_.grad, atol=1e-5, rtol=1e-4)
    found = dict(encoder.backbone.named_parameters())
    compared = 0
    for key, weight in reference.named_parameters():
        if weight.grad is not None and key in found:
            scale = weight.grad.abs().max().clamp(min=1)
            torch.testing.assert_close(found[key].grad / scale, weight.grad / scale, atol=2e-5, rtol=1e-4, msg=key)
            compared += 1
    assert compared == sum(weight.grad is not None for weight in reference.parameters()) > 10


@each()
def test_it_is_frozen_and_trains_when_it_is_not(name, tiny_towers):
    encoder = load(tiny_towers.folder(name)).encoder
    assert isinstance(encoder, nn.Module)
    assert not encoder.training
    assert not any(weight.requires_grad for weight in encoder.parameters())
    item = joined(picture(32, 32, 0), picture(32, 32, 1))
    with torch.inference_mode():
        encoder(item)  # as a validation between two steps does; nothing it leaves behind may be in the way of the next

    encoder.requires_grad_(requires_grad=True).train()
    out = encoder(item).values
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    grads = {key: weight.grad for key, weight in encoder.backbone.named_parameters()}
    without = [key for key, grad in grads.items() if grad is None]
    assert sorted(without) == sorted(CASES[name].idle)
    # Some are reached and 0: a number added to all keys changes no attention, and a rectifier may be shut.
    assert sum(bool(grad.any()) for grad in grads.values() if grad is not None) > 0.7 * len(grads)


# --- layers --------------------------------------------------------------------------------------------------------


@each(where=lambda case: case.layers > 0 and case.reference not in (naflex, pixtral, unmasked))
@torch.no_grad()
def test_a_hidden_layer_is_that_of_transformers(name, tiny_towers):
    case, path = CASES[name], tiny_towers.folder(name)
    item = picture(32, 32)
    out = tiny_towers.theirs(name)(pixel_values=normalized(item, 8), output_hidden_states=True)
    assert len(out.hidden_states) == case.layers + 1
    last = load(path)
    for layer in range(-2, -case.layers - 2, -1):
        tower = load(path, layer=layer)
        torch.testing.assert_close(tower.encoder(item).values, out.hidden_states[layer][0, -16:], atol=2e-5, rtol=1e-5)
        assert load_image_tower(**tower.settings).key == tower.key != last.key
    with pytest.raises(ConfigError, match=rf"layer is {-case.layers - 2}, .* has -1 to {-1 - case.layers}"):
        load(path, layer=-case.layers - 2)
    with pytest.raises(ConfigError, match="layer is 0"):
        load(path, layer=0)


@pytest.mark.parametrize("name", ["siglip2", "pixtral", "vit_mae"])
@torch.no_grad()
def test_the_layer_before_the_last_goes_through_the_last(name, tiny_towers):
    """For families that transformers calls otherwise: what comes out of -3 becomes -2 by the first block."""
    tower = {layer: load(tiny_towers.folder(name), layer=layer).encoder for layer in (-1, -2, -3)}
    caught = {}
    backbone = tower[-1].backbone
    stack = {"siglip2": "encoder.layers", "pixtral": "transformer.layers", "vit_mae": "layers"}[name]
    for i, block in enumerate(backbone.get_submodule(stack)):
        block.register_forward_pre_hook(lambda _, inputs, i=i: caught.__setitem__(i, inputs[0]))
    item = picture(24, 40)
    tower[-1](item)
    for layer, i in ((-2, 1), (-3, 0)):
        torch.testing.assert_close(tower[layer](item).values, caught[i][0, -15:], atol=2e-5, rtol=1e-5)


@each(where=lambda case: case.layers == 0)
def test_a_shrinking_grid_has_only_its_last_layer(name, tiny_towers):
    with pytest.raises(ConfigError, match=r"layer is -2, .* has one grid only at its end"):
        load(tiny_towers.folder(name), layer=-2)
