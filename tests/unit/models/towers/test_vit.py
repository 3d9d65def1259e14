"""The vision transformer: patches, positions, pictures of any size."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.core.errors import ConfigError, DataError
from plait.core.protocols import Encoder
from plait.core.tensors import Patches
from plait.models import specs
from plait.models.build import build_encoder
from plait.models.masked_images import MaskedAutoencoder, MaskedCells
from plait.models.measure import account
from plait.models.ragged import packed_rows
from plait.models.towers.vit import (
    PatchEmbedding,
    VisionTransformer,
    ViTSizes,
    patches_of,
    pixels_of,
)
from plait.models.transformer import TransformerSizes

TINY = ViTSizes(transformer=TransformerSizes(d=16, depth=2, heads=2, d_ff=24), patch=4, grid=(3, 3))
KINDS = {
    "learned": TINY,
    "sincos": replace(TINY, position="sincos"),
    "row_column": replace(TINY, position="row_column"),
    "rope": replace(TINY, position="none", relative="rope"),
    "rope_unit": replace(TINY, position="none", relative="rope_unit", registers=2),
    "grid_bias": replace(TINY, position="none", relative="grid_bias"),
    "alibi": replace(TINY, position="none", relative="alibi"),
    "hybrid": replace(TINY, position="sincos", relative="grid_bias", class_token=False, pool="mean"),
}


def tower(sizes: ViTSizes, seed: int = 0) -> VisionTransformer:
    torch.manual_seed(seed)
    made = VisionTransformer(sizes).eval()
    with torch.no_grad():
        for weight in made.parameters():  # tokens and tables too, so that every code shows
            weight.add_(torch.randn_like(weight) * 0.3)
    return made


def ragged(*pictures: torch.Tensor) -> Patches:
    """Pictures of ``h w 3``."""
    values = torch.cat([p.reshape(-1, 3) for p in pictures])
    return Patches(values=values, grid=torch.tensor([[1, *p.shape[:2]] for p in pictures]))


@pytest.mark.row("S2-02")
def test_unfolding_equals_convolving_and_patches_are_row_major() -> None:
    torch.manual_seed(0)
    conv, unfold = PatchEmbedding(4, 8, unfold=False), PatchEmbedding(4, 8)
    unfold.load_state_dict(conv.state_dict())
    pixels = torch.rand(2, 3, 12, 20)
    torch.testing.assert_close(unfold(pixels), conv(pixels), atol=1e-6, rtol=1e-5)
    picture = pixels.permute(0, 2, 3, 1)
    cut = patches_of(picture, 4)
    assert torch.equal(cut[0, 6], picture[0, 4:8, 4:8].flatten())  # of 5 patches a row, the second of the second row
    assert torch.equal(pixels_of(cut, 4, rows=3), picture)


@pytest.mark.row("S2-02")
def test_pixels_that_make_no_whole_patch() -> None:
    pixels = torch.rand(1, 3, 10, 13)
    pad, crop, refuse = (tower(replace(TINY, remainder=how)) for how in ("pad", "crop", "error"))
    grid = torch.tensor([[1, 10, 13]])
    assert pad.grid_out(grid).tolist() == [[1, 3, 4]]
    assert crop.grid_out(grid).tolist() == [[1, 2, 3]]
    gray = torch.full((1, 3, 12, 16), 0.5)  # the mean color
    gray[:, :, :10, :13] = pixels
    torch.testing.assert_close(pad.features(pixels), pad.features(gray))
    torch.testing.assert_close(crop.features(pixels), crop.features(pixels[:, :, :8, :12]))
    with pytest.raises(DataError, match="10 x 13 pixels does not split into patches of 4 x 4"):
        refuse.features(pixels)
    with pytest.raises(DataError, match="2 x 13"):
        crop.features(pixels[:, :, :2])


@pytest.mark.row("S2-03")
@pytest.mark.parametrize("kind", [*KINDS, "none"])
def test_order_of_patches_counts_only_with_positions(kind: str) -> None:
    sizes = KINDS.get(kind, replace(TINY, position="none"))
    made = tower(sizes)
    patches = patches_of(torch.rand(1, 12, 12, 3), 4)
    shuffled = patches[:, torch.randperm(9)]
    pooled = [made.pooled(pixels_of(p, 4, rows=3).permute(0, 3, 1, 2)) for p in (patches, shuffled)]
    assert torch.allclose(*pooled, atol=1e-5) == (kind == "none")


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8, deadline=None)
@given(sides=st.lists(st.tuples(st.integers(1, 17), st.integers(1, 17)), min_size=1, max_size=5))
def test_mixed_sizes_are_what_each_gives_alone(kind: str, sides: list[tuple[int, int]]) -> None:
    made = tower(KINDS[kind])
    assert isinstance(made, Encoder)
    pictures = [torch.rand(*side, 3) for side in sides]
    together = made(ragged(*pictures))
    assert torch.equal(together.grid, made.grid_out(torch.tensor([[1, *side] for side in sides])))
    alone = torch.cat([made(ragged(p)).values for p in pictures])
    torch.testing.assert_close(together.values, alone, atol=2e-5, rtol=1e-4)


@pytest.mark.row("S0-12")
@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_learns(kind: str) -> None:
    made = tower(replace(KINDS[kind], num_classes=3)).train()
    made.logits(torch.rand(2, 3, 16, 8)).square().sum().backward()  # not the learned grid: interpolation has gradients
    idle = [name for name, p in made.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


def test_nothing_and_wrong_input() -> None:
    made = tower(TINY)
    none = made(Patches(values=torch.zeros(0, 3), grid=torch.zeros(0, 3, dtype=torch.long)))
    assert none.values.shape == (0, 16)
    with pytest.raises(DataError, match=r"counts 16 RGB pixels, came \(15, 3\)"):
        made(Patches(values=torch.zeros(15, 3), grid=torch.tensor([[1, 4, 4]])))
    with pytest.raises(ConfigError, match="no class token"):
        VisionTransformer(replace(TINY, class_token=False))
    with pytest.raises(ConfigError, match="no classifier"):
        made.logits(torch.rand(1, 3, 4, 4))


def test_attention_maps_and_bfloat16() -> None:
    made = tower(TINY)
    weights: list[torch.Tensor] = []
    made.tokens(torch.rand(2, 3, 12, 12), weights=weights)
    assert [w.shape for w in weights] == [(2, 2, 10, 10)] * 2
    torch.testing.assert_close(weights[1].sum(-1), torch.ones(2, 2, 10))
    assert made.bfloat16().features(torch.rand(1, 3, 12, 12)).dtype == torch.bfloat16


# --- pictures of different sizes in one row ------------------------------------------------------------------------

MIXED = ((5, 9), (12, 12), (4, 4), (12, 12), (1, 33), (3, 1), (21, 6))


def mixed(*, frames: int = 0) -> Patches:
    """Pictures of many sizes, and perhaps a clip."""
    grid = torch.tensor([[1, h, w] for h, w in MIXED] + [[frames, 7, 7]] * bool(frames))
    torch.manual_seed(3)
    return Patches(values=torch.rand(int(grid.prod(1).sum()), 3, dtype=torch.float64), grid=grid)


PACKS = {name: sizes for name, sizes in KINDS.items() if sizes.relative not in ("grid_bias", "alibi")}
PACKS["both"] = replace(TINY, relative="rope", registers=3, norm_first=True)
PACKS["bare"] = replace(PACKS["rope"], pool="mean", class_token=False)


@pytest.mark.row("S2-01")
@pytest.mark.parametrize("row", [0, 1, 20, 500])
@pytest.mark.parametrize("kind", PACKS)
def test_packed_pictures_are_what_they_are_alone_values_and_gradients(kind: str, row: int) -> None:
    made = tower(PACKS[kind]).double()
    media = mixed(frames=2)
    media.values.requires_grad_()
    weights = torch.rand(int(made.grid_out(media.grid).prod(1).sum()), 16, dtype=torch.float64)
    alone = [
        made(Patches(values=values, grid=media.grid[i : i + 1]))
        for i, values in enumerate(media.values.split(media.grid.prod(1).tolist()))
    ]
    wanted = torch.cat([found.values for found in alone])
    learned = [media.values, *made.parameters()]
    wanted_gradients = torch.autograd.grad((wanted * weights).sum(), learned, allow_unused=True)
    made.row = row
    assert made.packs(media.grid)
    found = made(media)
    assert torch.equal(found.grid, made.grid_out(media.grid))
    torch.testing.assert_close(found.values, wanted, atol=1e-10, rtol=0)
    gradients = torch.autograd.grad((found.values * weights).sum(), learned, allow_unused=True)
    for a, b in zip(gradients, wanted_gradients, strict=True):
        if b is None:  # the head's parts
            assert a is None
        else:
            torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def test_what_cannot_be_packed_is_a_batch_a_size() -> None:
    pictures = mixed()
    for kind in ("grid_bias", "alibi"):
        made = tower(KINDS[kind]).double()
        by_size = made(pictures)
        made.row = 40
        assert torch.equal(made(pictures).values, by_size.values)
    dropping = tower(replace(TINY, transformer=replace(TINY.transformer, drop_path=0.5)))
    dropping.row = 40
    assert not dropping.train().packs(pictures.grid)
    assert dropping.eval().packs(pictures.grid)
    same = torch.tensor([[1, 8, 8], [1, 8, 8]])
    assert not dropping.packs(same)


@pytest.mark.parametrize("row", [0, 12])
def test_packing_holds_its_batches_small_and_takes_none(row: int) -> None:
    whole, parts = tower(KINDS["rope"]).double(), tower(KINDS["rope"]).double()
    whole.row = parts.row = row
    parts.batch_size = 2
    torch.testing.assert_close(parts(mixed()).values, whole(mixed()).values, atol=1e-12, rtol=0)
    none = Patches(values=torch.zeros(0, 3, dtype=torch.float64), grid=torch.zeros(0, 3, dtype=torch.long))
    assert whole(none).values.shape == (0, 16)


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12), row=st.integers(1, 20))
def test_packed_rows_give_every_token_back(lengths: list[int], row: int) -> None:
    packed = packed_rows(torch.tensor(lengths), row)
    values = torch.arange(1.0, sum(lengths) + 1)[:, None]
    rows = packed.put(values)
    assert torch.equal(packed.take(rows), values)
    assert torch.equal(rows[..., 0] != 0, packed.segment_ids != 0)
    # One segment of a row is one item, whole and in order.
    items = {tuple(item.flatten().tolist()) for item in values.split(lengths)}
    found = {
        tuple(rows[r, packed.segment_ids[r] == s].flatten().tolist())
        for r in range(len(rows))
        for s in range(1, int(packed.segment_ids[r].max()) + 1)
    }
    assert found == items


# --- patches left out while training --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["learned", "sincos", "row_column"])
@pytest.mark.parametrize("front", [{}, {"registers": 2}, {"class_token": False, "pool": "mean"}])
def test_dropped_patches_are_as_if_they_were_not_there(kind: str, front: dict[str, Any]) -> None:
    model = tower(replace(KINDS[kind], patch_dropout=0.5, **front)).train()
    pixels = torch.rand(3, 3, 12, 16)
    torch.manual_seed(5)
    found = model.tokens(pixels)
    torch.manual_seed(5)
    kept = torch.rand(3, 12).argsort(1)[:, :6].sort(1).values
    whole = model.embedded(pixels)
    for picture, places in enumerate(kept):
        rows = torch.cat([torch.arange(model.prefix), model.prefix + places])
        alone = model.transformer(whole[picture : picture + 1, rows])
        torch.testing.assert_close(found[picture], alone[0], atol=1e-6, rtol=1e-5)
    assert len({tuple(places.tolist()) for places in kept}) == 3, "each picture has its own"


def test_a_tower_says_how_many_patches_it_keeps_and_keeps_all_once_it_has_learned() -> None:
    model = tower(replace(TINY, patch_dropout=0.6), seed=1)
    media = ragged(torch.rand(12, 12, 3), torch.rand(8, 20, 3), torch.rand(4, 4, 3))
    whole = tower(TINY, seed=1)(media)
    torch.testing.assert_close(model(media).values, whole.values)
    found = model.train()(media)
    assert found.grid.tolist() == [[1, 1, 4], [1, 1, 4], [1, 1, 1]]  # of 9, 10 and one; one is always left
    assert torch.equal(found.grid, model.grid_out(media.grid))
    assert len(found.values) == 9
    rows = VisionTransformer(model.sizes, row=0).train()(media)  # not packed while patches drop
    assert torch.equal(rows.grid, found.grid)


@pytest.mark.parametrize("relative", ["rope", "grid_bias", "alibi"])
def test_patches_are_not_dropped_under_relative_positions(relative: Any) -> None:
    with pytest.raises(ConfigError, match="are those of whole grids") as error:
        VisionTransformer(replace(TINY, position="none", relative=relative, patch_dropout=0.5))
    assert error.value.place == "patch_dropout"


def test_what_drops_out_costs_nothing_in_the_blocks() -> None:
    """Counted operations: those of the embedding for all patches, those of the blocks for the kept ones."""
    spec = specs.ViT(size=64, patch=4, d=32, depth=2, heads=2, class_token=False)
    whole, half = (
        account(lambda rate=rate: build_encoder(spec.model_copy(update={"patch_dropout": rate})), 64)
        for rate in (0.0, 0.5)
    )
    d, patches = 32, 256

    def flops(tokens: int) -> int:
        blocks = 2 * (2 * tokens * 12 * d * d + 4 * tokens * tokens * d)
        return 2 * patches * 48 * d + blocks

    assert (whole.flops, half.flops) == (flops(256), flops(128))
    assert half.kept_bytes < 0.6 * whole.kept_bytes
    assert (whole.tokens, half.tokens) == (256, 128)


@pytest.mark.parametrize("build", [MaskedAutoencoder, partial(MaskedCells, codes=5)])
def test_a_tower_that_drops_patches_learns_from_no_hidden_ones(build: Callable[[VisionTransformer], object]) -> None:
    with pytest.raises(ConfigError, match="hidden cells would be among what is dropped"):
        build(VisionTransformer(replace(TINY, patch_dropout=0.5)))
