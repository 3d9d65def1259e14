"""A text transformer that learns, as a tower: token ids come as media, one vector a text goes out."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor, nn

from plait.core.tensors import Patches
from plait.models.ragged import rows_of
from plait.models.towers.text_transformer import TextTransformer


class TokenTower(nn.Module):
    """Texts as media, one token id a row of one channel, to one vector each by the rule of the transformer's sizes.

    Ids travel as numbers, as pixels and samples do: float32 holds them exactly below 2^24. So a text that a tower
    learns from goes the way of a picture: kept raw, picked for a batch, split into micro-batches, counted.

    Args:
        transformer: What reads.

    Example:
        >>> from plait.models.build_media import build_text
        >>> from plait.models.text_specs import Gpt
        >>> tower = TokenTower(build_text(Gpt(vocabulary=300, d=64, depth=2, heads=2)))
        >>> ids = torch.tensor([1.0, 7.0, 2.0, 1.0, 2.0])[:, None]
        >>> tower(Patches(values=ids, grid=torch.tensor([[1, 1, 3], [1, 1, 2]]))).values.shape
        torch.Size([2, 64])
    """

    def __init__(self, transformer: TextTransformer) -> None:
        super().__init__()
        self.transformer = transformer
        self.d_out: int = transformer.d_out

    def forward(self, media: Patches) -> Patches:
        """One vector a text.

        Raises:
            DataError: A text is longer than learned positions, or lacks the token to pool.
        """
        rows = rows_of(media)
        token_ids = rows.values[..., 0].long()
        segment_ids = None if rows.real is None else rows.real.long()
        grid = self.grid_out(media.grid)
        if not len(token_ids):
            return Patches(values=media.values.new_zeros(0, self.d_out), grid=grid)
        return Patches(values=self.transformer.pooled(token_ids, segment_ids=segment_ids), grid=grid)

    def grid_out(self, grid: Int[Tensor, "item 3"]) -> Int[Tensor, "item 3"]:
        """One vector of each text."""
        return torch.ones_like(grid)
