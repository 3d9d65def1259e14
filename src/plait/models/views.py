"""A picture tower that learns from views alone: SimCLR's model (Chen et al., https://arxiv.org/abs/2002.05709)."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from plait.core.errors import DataError
from plait.core.tensors import Batch, Patches
from plait.models.dual import pool


class ViewEncoder(nn.Module):
    """A tower, and a head between it and the loss.

    What objectives over views compare is behind the head; what the tower is used for later is in front of it, where
    features keep what the loss has no use for (section 4.2 of the paper).

    Args:
        tower: Encoder of pictures; its tokens are averaged.
        head: Maps their mean to the space in which views are compared.
    """

    def __init__(self, tower: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.tower = tower
        self.head = head

    def forward(self, batch: Batch) -> tuple[Float[Tensor, "n d"], Int[Tensor, " n"]]:
        """A vector of each view, as long as it comes, and the row that the view is of.

        Raises:
            DataError: There are no pictures.
        """
        if "image" not in batch.media:
            raise DataError("there are no pictures in the batch", place=str(batch.sample_ids[:3]))
        return self.head(pool(self.tower(batch.media["image"]))), batch.item_row["image"]

    def embed_image(self, media: Patches) -> Float[Tensor, "item d"]:
        """Unit vectors of pictures in front of the head."""
        return functional.normalize(pool(self.tower(media)), dim=-1)
