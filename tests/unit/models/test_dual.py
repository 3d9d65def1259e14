from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from plait.core.errors import DataError
from plait.core.tensors import Batch, Patches
from plait.models import specs
from plait.models.build import build_encoder
from plait.models.dual import MAX_SCALE, DualEncoder, pool
from plait.models.heads import ProjectionHead


def patches(values: torch.Tensor, cells: int = 1) -> Patches:
    grid = torch.tensor([[1, 1, cells]]).expand(len(values) // cells, 3)
    return Patches(values=values, grid=grid)


def batch(**media: Patches) -> Batch:
    rows = len(next(iter(media.values())).grid)
    ids = torch.zeros(rows, 1, dtype=torch.long)
    return Batch(
        token_ids=ids,
        labels=ids,
        segment_ids=ids + 1,
        media=media,
        item_row={},
        sample_ids=tuple(str(i) for i in range(rows)),
    )


def test_embeddings_are_unit_vectors_of_the_towers_passed_in():
    torch.manual_seed(0)
    image, text = ProjectionHead(6, 8, 4), nn.Linear(3, 4)
    dual = DualEncoder(image, text)
    a, b = torch.randn(5, 6), torch.randn(5, 3)
    out = dual(batch(image=patches(a), text=patches(b)))
    torch.testing.assert_close(out.image.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(out.text, nn.functional.normalize(text(b), dim=1))
    assert out.scale.item() == pytest.approx(1 / 0.07)


def test_maps_of_cells_are_averaged_item_by_item():
    values = torch.arange(12.0).reshape(6, 2)
    ragged = Patches(values=values, grid=torch.tensor([[1, 2, 2], [1, 1, 2]]))
    torch.testing.assert_close(pool(ragged), torch.stack([values[:4].mean(0), values[4:].mean(0)]))
    torch.testing.assert_close(pool(patches(values)), values)


def test_scale_is_limited_in_value_but_can_come_back():
    dual = DualEncoder(nn.Identity(), nn.Identity(), scale=MAX_SCALE * 3)
    assert dual.scale.item() == pytest.approx(MAX_SCALE)
    dual.scale.backward()
    assert dual.log_scale.grad is not None
    assert dual.log_scale.grad.item() == pytest.approx(
        MAX_SCALE
    )  # torch.clamp would give 0 here, and the scale would be stuck
    assert DualEncoder(nn.Identity(), nn.Identity(), scale=5.0).log_scale.item() == pytest.approx(math.log(5.0))


def test_what_is_missing_is_named():
    dual = DualEncoder(nn.Identity(), nn.Identity())
    with pytest.raises(DataError, match="missing: text"):
        dual(batch(image=patches(torch.ones(2, 3))))
    with pytest.raises(DataError, match="2 pictures but 1 texts"):
        dual(batch(image=patches(torch.ones(2, 3)), text=patches(torch.ones(1, 3))))


def test_dropout_acts_only_while_training():
    torch.manual_seed(0)
    head = ProjectionHead(6, 32, 4, dropout=0.5)
    x = torch.randn(3, 6)
    assert not torch.equal(head(x), head(x))
    head.eval()
    assert torch.equal(head(x), head(x))


def test_a_head_does_not_mind_the_scale_of_its_features():
    torch.manual_seed(0)
    head = ProjectionHead(6, 8, 4)
    x = torch.randn(3, 6)
    torch.testing.assert_close(head(x), head(100 * x))


def test_a_tower_changes_no_name_of_the_heads():
    heads = [ProjectionHead(6, 8, 4), ProjectionHead(3, 8, 4)]
    tower = nn.Linear(3, 6)
    without, with_one = DualEncoder(*heads), DualEncoder(*heads, tower=tower)
    assert set(with_one.state_dict()) - set(without.state_dict()) == {"tower.weight", "tower.bias"}
    assert set(without.state_dict()) == {
        "log_scale",
        *(f"{side}.layers.{i}.{kind}" for side in ("image", "text") for i in (0, 3) for kind in ("weight", "bias")),
    }


@pytest.mark.row("S2-05")
@pytest.mark.parametrize(
    "spec",
    [specs.ViT(size=16, patch=8, d=16, depth=2, heads=2), specs.ResNet(size=32, width=8)],
    ids=["vit", "resnet"],
)
def test_every_weight_of_a_tower_gets_its_gradient(spec: specs.ScratchImage):
    torch.manual_seed(0)
    tower = build_encoder(spec)
    dual = DualEncoder(ProjectionHead(tower.d_out, 8, 4), nn.Linear(3, 4), tower=tower)
    pixels = Patches(values=torch.rand(2 * spec.size**2, 3), grid=torch.tensor([[1, spec.size, spec.size]] * 2))
    out = dual(batch(image=pixels, text=patches(torch.randn(2, 3))))
    torch.testing.assert_close(out.image.norm(dim=1), torch.ones(2))
    (out.image * out.text).sum().backward()
    assert [name for name, w in dual.named_parameters() if w.grad is None and name != "log_scale"] == []
    assert [name for name, w in tower.named_parameters() if not w.grad.any() and "key" not in name] == []
