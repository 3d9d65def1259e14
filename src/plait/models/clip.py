"""CLIP from scratch: a vision and a text transformer, two projections, a temperature (arXiv 2103.00020)."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from plait.models.dual import Embeddings
from plait.models.towers.pixels import CLIP_MEAN, CLIP_STD
from plait.models.towers.text_transformer import TextSizes, TextTransformer
from plait.models.towers.vit import VisionTransformer, ViTSizes
from plait.models.transformer import TransformerSizes


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipSizes:
    """Shape of a CLIP model.

    Attributes:
        vision: Of the picture tower.
        text: Of the text tower.
        d_shared: Width of the space that both share.
    """

    vision: ViTSizes
    text: TextSizes
    d_shared: int = 512


CLIP_B32 = ClipSizes(
    vision=ViTSizes(
        transformer=TransformerSizes(d=768, depth=12, heads=12, eps=1e-5, activation="quick_gelu"),
        patch=32,
        grid=(7, 7),
        norm="pooled",
        norm_first=True,
        patch_bias=False,
        mean=CLIP_MEAN,
        std=CLIP_STD,
    ),
    text=TextSizes(
        transformer=TransformerSizes(d=512, depth=12, heads=8, eps=1e-5, activation="quick_gelu"),
        vocabulary=49_408,
        causal=True,
        max_tokens=77,
        pool="end",
        end=49_407,
    ),
)
"""ViT-B/32 of table 20."""


class Clip(nn.Module):
    """Pictures and texts to unit vectors of one space.

    The rule of training (in-batch contrast) is an objective's, not this module's.

    Args:
        sizes: Shape.

    Example:
        >>> with torch.device("meta"):
        ...     clip = Clip(CLIP_B32)
        >>> sum(p.numel() for p in clip.parameters())
        151277313
    """

    def __init__(self, sizes: ClipSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.vision, self.text = VisionTransformer(sizes.vision), TextTransformer(sizes.text)
        self.image_projection = nn.Linear(self.vision.d_out, sizes.d_shared, bias=False)
        self.text_projection = nn.Linear(self.text.d_out, sizes.d_shared, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, pixels: Float[Tensor, "b 3 h w"], token_ids: Int[Tensor, "b t"]) -> Embeddings:
        """Embed pairs."""
        return Embeddings(self.embed_image(pixels), self.embed_text(token_ids), self.log_scale.exp())

    def embed_image(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Unit vectors of RGB pictures in 0..1, of one size."""
        return functional.normalize(self.image_projection(self.vision.pooled(pixels)), dim=-1)

    def embed_text(self, token_ids: Int[Tensor, "b t"]) -> Float[Tensor, "b d"]:
        """Unit vectors of texts; what stands after the end token does not count."""
        return functional.normalize(self.text_projection(self.text.pooled(token_ids)), dim=-1)
