"""EfficientNet-Lite0 = timm's, and the fast form = the slow form."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from plait.core.errors import CheckpointError, DataError
from plait.core.files import sha256_file
from plait.core.protocols import Encoder
from plait.core.tensors import Patches
from plait.models.towers.convnet import EfficientNetLite, Group, rename_original

SIZES = ("96x96", "75x50")
TINY = (Group(1, 3, 1, 1, 8), Group(2, 5, 2, 2, 8), Group(1, 3, 2, 2, 8), Group(1, 5, 2, 2, 8), Group(1, 3, 2, 2, 8))


@pytest.fixture(scope="module")
def weights(packages):
    (path,) = packages("efficientnet-lite0").rglob("*.pth")
    return path


def load(path) -> EfficientNetLite:
    tower = EfficientNetLite()
    tower.load_state_dict(rename_original(torch.load(path, weights_only=True)), strict=True)
    return tower.eval()


def tiny(seed: int = 0, **settings) -> EfficientNetLite:
    """Same code, few weights; statistics that are not the identity, so that folding has something to fold."""
    torch.manual_seed(seed)
    tower = EfficientNetLite(TINY, d_out=12, num_classes=3, **settings)
    for name, buffer in tower.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.3, 1.5)
    return tower.eval()


def patches(*pictures: torch.Tensor) -> Patches:
    """Pictures of ``f h w 3`` as one ragged batch."""
    return Patches(
        values=torch.cat([p.reshape(-1, 3) for p in pictures]), grid=torch.tensor([list(p.shape[:3]) for p in pictures])
    )


@pytest.mark.row("S0-01")
@pytest.mark.row("S0-05")
@pytest.mark.real
@pytest.mark.parametrize("size", SIZES)
@torch.inference_mode()
def test_features_and_logits_are_those_of_timm(golden, weights, size):
    tensors, record = golden("convnet")
    assert sha256_file(weights) == record["weights_sha256"]
    pixels = tensors[f"pixels_{size}"].permute(0, 3, 1, 2).float() / 255
    tower = load(weights)
    # Measured: equal bit for bit on the machine that made them. Other CPUs sum in another order.
    torch.testing.assert_close(tower.features(pixels), tensors[f"features_{size}"], atol=2e-4, rtol=0)
    torch.testing.assert_close(tower.logits(pixels), tensors[f"logits_{size}"], atol=1e-4, rtol=0)


@pytest.mark.real
@pytest.mark.parametrize("size", SIZES)
@torch.inference_mode()
def test_the_frozen_form_gives_the_same_features(golden, weights, size):
    tensors, _ = golden("convnet")
    pixels = tensors[f"pixels_{size}"].permute(0, 3, 1, 2).float() / 255
    wanted = tensors[f"features_{size}"]
    folded = load(weights).frozen(torch.float32).features(pixels)
    torch.testing.assert_close(
        folded, wanted, atol=2e-4, rtol=0
    )  # worst measured: 3e-5 here, 5e-5 on Twemoji at 224 px
    coarse = load(weights).frozen(torch.bfloat16).features(pixels).float()
    assert ((coarse - wanted).norm() / wanted.norm()) < 0.12  # worst measured: 0.081
    pooled = functional.cosine_similarity(coarse.mean((2, 3)), wanted.mean((2, 3)))
    assert pooled.min() > 0.99  # worst measured: 0.9952


@pytest.mark.row("S4-64")
@torch.inference_mode()
def test_folding_keeps_the_function_and_removes_every_norm():
    pixels = torch.rand(2, 3, 45, 70)
    wanted = tiny().logits(pixels)
    folded = tiny().frozen(torch.float32)
    torch.testing.assert_close(folded.logits(pixels), wanted, atol=1e-5, rtol=1e-4)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in folded.modules())
    assert not any(p.requires_grad for p in folded.parameters())


@torch.inference_mode()
def test_ragged_items_come_out_as_if_encoded_alone_and_in_raster_order():
    tower = tiny(batch_size=2)
    pictures = [torch.rand(f, h, w, 3) for f, h, w in ((1, 64, 32), (2, 40, 70), (1, 64, 32), (1, 33, 1), (3, 64, 32))]
    together = tower(patches(*pictures))
    start = 0
    for picture, cells in zip(pictures, together.grid.tolist(), strict=True):
        frames, rows, columns = cells
        stop = start + frames * rows * columns
        maps = tower.features(picture.permute(0, 3, 1, 2))
        wanted = torch.stack([maps[f, :, r, c] for f in range(frames) for r in range(rows) for c in range(columns)])
        torch.testing.assert_close(together.values[start:stop], wanted, atol=1e-5, rtol=1e-4)
        start = stop
    assert start == len(together.values)


@settings(max_examples=12, deadline=None)
@given(
    grid=st.lists(st.tuples(st.integers(1, 2), st.integers(1, 70), st.integers(1, 70)), max_size=2),
    max_cells=st.integers(0, 3),
)
@torch.inference_mode()
def test_the_token_account_is_what_forward_gives(grid, max_cells):
    tower = tiny(max_cells=max_cells)
    media = Patches(
        values=torch.rand(sum(f * h * w for f, h, w in grid), 3), grid=torch.tensor(grid, dtype=torch.long).view(-1, 3)
    )
    account = tower.grid_out(media.grid)
    out = tower(media)
    assert out.grid.equal(account)
    assert out.values.shape == (int(account.prod(1).sum()), tower.d_out)
    if max_cells:
        assert int(account[:, 1:].max() if len(account) else 0) <= max_cells


@torch.inference_mode()
def test_max_cells_averages_the_map():
    picture = torch.rand(1, 128, 128, 3)
    full, small = tiny()(patches(picture)), tiny(max_cells=2)(patches(picture))
    assert full.grid.tolist() == [[1, 4, 4]]
    quarters = full.values.view(2, 2, 2, 2, 12).mean((1, 3)).view(4, 12)
    torch.testing.assert_close(small.values, quarters, atol=1e-5, rtol=1e-4)


def test_gradients_reach_the_pixels_and_every_weight():
    tower = tiny().train()
    media = patches(torch.rand(1, 64, 64, 3), torch.rand(1, 64, 64, 3))
    media.values.requires_grad_()
    tower(media).values.square().sum().backward()
    assert media.values.grad.abs().sum() > 0
    assert all(p.grad is not None for n, p in tower.named_parameters() if not n.startswith("classifier"))


def test_it_is_an_encoder_and_refuses_rows_that_are_not_its_grid():
    tower = tiny()
    assert isinstance(tower, Encoder)
    with pytest.raises(DataError, match=r"counts 1024 RGB pixels, came \(1023, 3\)"):
        tower(Patches(values=torch.rand(1023, 3), grid=torch.tensor([[1, 32, 32]])))
    with pytest.raises(DataError, match="RGB"):
        tower(Patches(values=torch.rand(1024, 1), grid=torch.tensor([[1, 32, 32]])))


def test_unknown_weights_are_named():
    with pytest.raises(CheckpointError, match=r"_blocks\.0\._se_reduce\.weight"):
        rename_original({"_blocks.0._se_reduce.weight": torch.zeros(1)})
