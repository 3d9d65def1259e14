"""Two towers and a temperature: CLIP's model (Radford et al., arXiv 2103.00020), composed of the modules passed in.

Sounds may share the space as a third modality, as in ImageBind (Girdhar et al., arXiv 2305.05665).
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from plait.core.errors import DataError
from plait.core.tensors import Batch, Patches

MAX_SCALE = 100.0
"""Largest factor on cosine similarities; CLIP clips here to keep training stable."""


class Embeddings(NamedTuple):
    """Unit vectors of both sides of each pair, the factor on their cosine, and sounds of those pairs that have one."""

    image: Float[Tensor, "b d"]
    text: Float[Tensor, "b d"]
    scale: Float[Tensor, ""]
    audio: Float[Tensor, "sound d"] | None = None
    pair_of: Int[Tensor, " sound"] | None = None
    """Pair of each sound."""


class DualEncoder(nn.Module):
    """Embeds pictures and texts into one space where matching ones are near.

    Differs from CLIP in how the limit on the scale is kept: the value is clamped, the gradient is not, so a scale that
    reached the limit can come down again.

    Args:
        image: Maps pooled picture features, ``b d``, to the shared space.
        text: Maps pooled text features, ``b d``, to the shared space.
        scale: Where the learned factor starts; 1 / 0.07 in CLIP.
        tower: Picture encoder that learns with the rest: pictures then come as raw pixels. Without one they come as
            features of a frozen tower.
        text_tower: Text encoder that learns with the rest: texts then come as token ids
            (:class:`plait.models.towers.token_tower.TokenTower`), else as features.
        audio: Maps pooled features of sounds, ``b d``, to the shared space; None: the model does not hear.

    Example:
        >>> dual = DualEncoder(nn.Linear(1280, 256), nn.Linear(384, 256))
        >>> round(dual.scale.item(), 2)
        14.29
    """

    def __init__(
        self,
        image: nn.Module,
        text: nn.Module,
        *,
        scale: float = 1 / 0.07,
        tower: nn.Module | None = None,
        text_tower: nn.Module | None = None,
        audio: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.tower = tower
        self.text_tower = text_tower
        self.image = image
        self.text = text
        self.audio = audio
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))

    @property
    def scale(self) -> Float[Tensor, ""]:
        """Factor on the cosine, at most :data:`MAX_SCALE`."""
        return limited(self.log_scale)

    def forward(self, batch: Batch) -> Embeddings:
        """Embed both sides.

        Args:
            batch: ``media`` holds ``image`` and ``text``, one item a row; items of several rows (a map of cells) are
                averaged before the head. ``audio`` may be there for some of the pairs, which ``item_row`` names.

        Raises:
            DataError: A modality is missing or not for this model, or image and text have different numbers of items.
        """
        missing = {"image", "text"} - set(batch.media)
        if missing:
            raise DataError(
                f"a dual encoder needs image and text, missing: {', '.join(sorted(missing))}",
                place=str(batch.sample_ids[:3]),
            )
        sounds = batch.media.get("audio")
        if sounds is not None and self.audio is None:
            raise DataError("sounds came, this dual encoder does not hear", place=str(batch.sample_ids[:3]))
        image, text = batch.media["image"], batch.media["text"]
        if len(image.grid) != len(text.grid):
            raise DataError(
                f"{len(image.grid)} pictures but {len(text.grid)} texts in one batch", place=str(batch.sample_ids[:3])
            )
        found = Embeddings(self.embed_image(image), self.embed_text(text), self.scale)
        if sounds is None:
            return found
        return found._replace(audio=self.embed_audio(sounds), pair_of=batch.item_row["audio"])

    def embed_image(self, media: Patches) -> Float[Tensor, "item d"]:
        """Unit vectors of pictures: of their pixels where there is a tower, else of their features."""
        if self.tower is not None:
            media = self.tower(media)
        return functional.normalize(self.image(pool(media)), dim=-1)

    def embed_text(self, media: Patches) -> Float[Tensor, "item d"]:
        """Unit vectors of texts: of their token ids where there is a tower, else of their features."""
        if self.text_tower is not None:
            media = self.text_tower(media)
        return functional.normalize(self.text(pool(media)), dim=-1)

    def embed_audio(self, media: Patches) -> Float[Tensor, "item d"]:
        """Unit vectors of sounds.

        Raises:
            DataError: The model does not hear.
        """
        if self.audio is None:
            raise DataError("this dual encoder does not hear", remedy="train one with stages.pretrain.spoken")
        return functional.normalize(self.audio(pool(media)), dim=-1)


def limited(log_scale: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """``exp`` of it, at most :data:`MAX_SCALE`: the value is clamped, the gradient is not."""
    excess = (log_scale.detach() - math.log(MAX_SCALE)).clamp(min=0)
    return (log_scale - excess).exp()


def rows(values: Float[Tensor, "item d"]) -> Patches:
    """Pooled features as media: one item a row."""
    return Patches(values=values, grid=torch.ones(len(values), 3, dtype=torch.long, device=values.device))


def pool(media: Patches) -> Float[Tensor, "item d"]:
    """Mean of the rows of each item."""
    sizes = media.grid.prod(1)
    if bool((sizes == 1).all()):
        return media.values
    item = torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes)
    total = media.values.new_zeros(len(sizes), media.values.shape[1]).index_add(0, item, media.values)
    return total / sizes[:, None].to(total.dtype)
