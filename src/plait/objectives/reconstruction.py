"""What came through a bottleneck beside what went in, as sums over numbers."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from plait.core.tensors import Batch


def squared_error(found: Float[Tensor, "*n"], wanted: Float[Tensor, "*n"]) -> Float[Tensor, ""]:
    """``sum_i (found_i - wanted_i)^2``, in float32 or wider."""
    wide = torch.promote_types(found.dtype, torch.float32)
    return (found.to(wide) - wanted.to(wide)).square().sum()


class Recoding:
    """Objective of VQ-VAE (https://arxiv.org/abs/1711.00937, equation 3) over a batch of pictures.

    Terms: ``pixels``, the squared error of what is drawn; ``codebook``, which draws codes to vectors; ``commitment``,
    which keeps vectors near codes and is weighed with 0.25 in the paper. The first is counted in numbers of pixels, the
    others in numbers of codes, so that each is a mean over its own.

    The model returns pictures and both sums (:class:`plait.models.image_tokens.ImageTokenizer`).

    Args:
        cell: Pixels a side that a code stands for.
        d_code: Numbers of a code.
    """

    needs_global_batch = False

    def __init__(self, *, cell: int, d_code: int) -> None:
        self.cell, self.d_code = cell, d_code

    def count(self, batch: Batch) -> Mapping[str, Tensor]:
        """Numbers of pixels, and of codes."""
        values = batch.media["image"].values
        coded = torch.tensor(len(values) // self.cell**2 * self.d_code, device=values.device)
        return {"pixels": torch.tensor(values.numel(), device=values.device), "codebook": coded, "commitment": coded}

    def __call__(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """Sums of squares."""
        media, codebook, commitment = model(batch.media["image"])
        pixels = squared_error(media.values, batch.media["image"].values)
        return {"pixels": pixels, "codebook": codebook, "commitment": commitment}
