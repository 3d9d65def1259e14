from __future__ import annotations

import math

import pytest
import torch

from plait.core.errors import ConfigError, DataError
from plait.core.tensors import Batch, Patches
from plait.models.image_tokens import ImageTokenizer, ImageTokenSizes, peak_signal_to_noise
from plait.objectives.reconstruction import Recoding, squared_error

SMALL = ImageTokenSizes(
    channels=8, multipliers=(1, 2, 1), blocks=1, d_latent=8, codes=16, d_code=4, groups=4, attention=False
)


def ragged(*sizes: tuple[int, int]) -> Patches:
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(sum(h * w for h, w in sizes), 3, generator=generator)
    return Patches(values=values, grid=torch.tensor([[1, h, w] for h, w in sizes]))


@pytest.mark.row("S4-46")
@torch.no_grad()
def test_pictures_of_mixed_sizes_come_out_as_they_would_alone():
    torch.manual_seed(0)
    tokenizer = ImageTokenizer(SMALL).eval()
    media = ragged((8, 12), (4, 4), (8, 12), (16, 4))
    found = tokenizer(media)
    assert torch.equal(found.media.grid, media.grid)
    losses, at = torch.zeros(2), 0
    for _, h, w in media.grid.tolist():
        pixels = media.values[at : at + h * w].view(1, h, w, 3).permute(0, 3, 1, 2)
        alone = tokenizer.reconstruct(pixels)
        assert alone.ids.shape == (1, h // 4, w // 4)
        torch.testing.assert_close(found.media.values[at : at + h * w], alone.pixels[0].flatten(1).T, atol=1e-5, rtol=0)
        assert torch.equal(tokenizer.encode(pixels), alone.ids)
        torch.testing.assert_close(tokenizer.decode(alone.ids), alone.pixels.clamp(0, 1), atol=1e-6, rtol=0)
        losses += torch.stack([alone.codebook, alone.commitment])
        at += h * w
    torch.testing.assert_close(torch.stack([found.codebook, found.commitment]), losses)


def test_objective_sums_add_up_and_are_means_over_their_own_numbers():
    torch.manual_seed(0)
    tokenizer = ImageTokenizer(SMALL)
    objective = Recoding(cell=SMALL.cell, d_code=SMALL.d_code)
    media = ragged((8, 8), (4, 8), (8, 8))

    def batch(media: Patches) -> Batch:
        ids = torch.zeros(len(media.grid), 1, dtype=torch.long)
        return Batch(token_ids=ids, labels=ids, segment_ids=ids, media={"image": media}, item_row={}, sample_ids=())

    whole, counts = objective(tokenizer, batch(media)), objective.count(batch(media))
    assert {name: int(count) for name, count in counts.items()} == {"pixels": 480, "codebook": 40, "commitment": 40}
    halves = [
        Patches(values=media.values[:96], grid=media.grid[:2]),
        Patches(values=media.values[96:], grid=media.grid[2:]),
    ]
    parts = [objective(tokenizer, batch(half)) for half in halves]
    for name, value in whole.items():
        torch.testing.assert_close(value, parts[0][name] + parts[1][name])
        assert objective.count(batch(halves[0]))[name] + objective.count(batch(halves[1]))[name] == counts[name]
    sum(whole.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tokenizer.parameters())
    assert squared_error(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0])) == 5


def test_noise_in_decibels():
    pictures = torch.zeros(2, 3, 4, 4)
    assert peak_signal_to_noise(pictures, pictures + torch.tensor([1.0, 0.1])[:, None, None, None]) == [0.0, 20.0]
    assert peak_signal_to_noise(pictures, pictures) == [math.inf] * 2


def test_what_does_not_fit_is_refused():
    tokenizer = ImageTokenizer(SMALL)
    for size in ((9, 8), (8, 2), (0, 8)):
        with pytest.raises(DataError, match="a code stands for 4 x 4"):
            tokenizer.encode(torch.rand(1, 3, *size))
    with pytest.raises(DataError, match="there are 16"):
        tokenizer.decode(torch.tensor([[[16]]]))
    with pytest.raises(ConfigError, match="into 3 groups"):
        ImageTokenSizes(channels=8, groups=3)
