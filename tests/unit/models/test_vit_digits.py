"""A vision transformer from scratch learns to read: 1,797 real digits of 8 x 8 pixels (UCI optdigits), three seeds."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn import functional

from plait.core.tensors import Patches
from plait.models import specs
from plait.models.build import build_encoder
from plait.models.towers.vit import VisionTransformer

DIGITS = Path(__file__).parents[2] / "data" / "digits.png"


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures, ``n 3 8 8`` in 0..1, and what they show."""
    sheet = torch.frombuffer(bytearray(Image.open(DIGITS).tobytes()), dtype=torch.uint8).view(344, 336).float() / 255
    cells = sheet.unfold(0, 8, 8).unfold(1, 8, 8).flatten(0, 1)[:1797]
    labels = torch.tensor([int(digit) for digit in DIGITS.with_suffix(".txt").read_text().strip()])
    return cells[:, None].expand(-1, 3, -1, -1), labels


def accuracy(seed: int) -> float:
    """Share of 360 held-out digits that are read right after 8 passes over the other 1,437."""
    torch.manual_seed(seed)
    pixels, labels = digits()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))  # the same split for every seed
    test, train = order[:360], order[360:]
    tower = build_encoder(specs.ViT(size=8, patch=2, d=64, depth=2, heads=4))
    assert isinstance(tower, VisionTransformer)
    head = torch.nn.Linear(64, 10)
    weights = [*tower.parameters(), *head.parameters()]
    epochs, batch = 8, 32
    optimizer = torch.optim.AdamW(weights, lr=4e-3, weight_decay=0.05)
    steps = epochs * -(-len(train) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(epochs):
        for rows in train[torch.randperm(len(train))].split(batch):
            loss = functional.cross_entropy(head(tower.pooled(pixels[rows])), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        return float((head(tower.eval().pooled(pixels[test])).argmax(1) == labels[test]).float().mean())


@pytest.mark.row("S2-04")
def test_it_reads_digits_that_it_has_not_seen() -> None:
    assert min(accuracy(seed) for seed in range(3)) >= 0.92


@pytest.mark.row("S2-03")
@pytest.mark.row("S2-04")
def test_its_tokens_are_features_of_patches() -> None:
    pixels, _ = digits()
    tower = build_encoder(specs.ViT(size=8, patch=2, d=48, depth=3, heads=4))
    found = tower(Patches(values=pixels[:2].permute(0, 2, 3, 1).reshape(-1, 3), grid=torch.tensor([[1, 8, 8]] * 2)))
    assert found.values.shape == (2 * 16, 48)
    assert found.grid.tolist() == [[1, 4, 4]] * 2
