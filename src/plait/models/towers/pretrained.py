"""Picture towers of Hugging Face transformers behind the :class:`~plait.core.protocols.Encoder` face."""

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from plait.core.errors import DataError
from plait.core.tensors import Patches


class PretrainedVision(nn.Module):
    """A vision transformer of one picture size: CLIP, SigLIP, ViT, DINOv2 and their like.

    Takes raw RGB pixels in 0..1, one row a pixel, and normalizes them itself. Gives the last hidden state of every
    patch, in raster order; class and register tokens, which all of them put first, are left out.

    Args:
        backbone: Called with ``pixel_values``, returns ``last_hidden_state``.
        size: Pixels a side.
        patch: Pixels a side of a patch.
        mean: Of the three channels.
        std: Of the three channels.
        batch_size: Pictures computed together at most.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: PreTrainedModel,
        *,
        size: int,
        patch: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        batch_size: int = 16,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.size, self.patch, self.batch_size = size, patch, batch_size
        self.d_out: int = backbone.config.hidden_size
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)

    def forward(self, media: Patches) -> Patches:
        """Encode.

        Raises:
            DataError: A picture has another size than the tower.
        """
        frames = int(media.grid[:, 0].sum())
        wrong = [row for row in media.grid.tolist() if row[1:] != [self.size, self.size]]
        if wrong or media.values.shape != (frames * self.size**2, 3):
            came = f"a grid of {wrong[0]}" if wrong else f"rows of shape {tuple(media.values.shape)}"
            raise DataError(
                f"this tower takes RGB pictures of {self.size} x {self.size} pixels, came {came}",
                place="PretrainedVision input",
                remedy="prepare pictures with the tower's own contract",
            )
        pixels = (media.values.view(frames, self.size, self.size, 3) - self.mean) / self.std
        pixels = pixels.permute(0, 3, 1, 2).to(self.backbone.dtype)
        num_patches = (self.size // self.patch) ** 2
        hidden = [
            self.backbone(pixel_values=p).last_hidden_state[:, -num_patches:] for p in pixels.split(self.batch_size)
        ]
        return Patches(values=torch.cat(hidden).flatten(0, 1), grid=self.grid_out(media.grid))

    def grid_out(self, grid: Int[Tensor, "item 3"]) -> Int[Tensor, "item 3"]:
        """One token a patch."""
        return grid // grid.new_tensor([1, self.patch, self.patch])
