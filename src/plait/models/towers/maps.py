"""What towers share that give a map of features for each scale: ragged pictures in, cells of the last map out."""

from abc import abstractmethod

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from plait.core.errors import ConfigError
from plait.core.tensors import Patches
from plait.models.towers.pixels import IMAGENET_MEAN, IMAGENET_STD, Normalize, by_size


class MapTower(nn.Module):
    """Pictures to maps of features: an :class:`~plait.core.protocols.Encoder`, and a backbone of many scales.

    Takes raw RGB pixels in 0..1, one row a pixel, and normalizes them itself. Gives one row a cell of the last map, in
    raster order. Frames are encoded one by one. Items of different sizes may be mixed; those of one size are computed
    together, and have their own statistics where a tower with batch norm trains.

    Args:
        d_out: Width of the last map.
        cell: Pixels a side of its cells; begun cells count.
        num_classes: Width of the classifier, which only :meth:`logits` uses; 0: none.
        mean: Of the three channels.
        std: Of the three channels.
        batch_size: Pictures computed together at most; 0: all of one size.
    """

    def __init__(
        self,
        *,
        d_out: int,
        cell: int,
        num_classes: int = 0,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        batch_size: int = 0,
    ) -> None:
        super().__init__()
        self.d_out, self.cell, self.batch_size = d_out, cell, batch_size
        self.normalize = Normalize(mean, std)
        self.classifier = nn.Linear(d_out, num_classes) if num_classes else None

    @abstractmethod
    def stages(self, pixels: Float[Tensor, "b 3 h w"]) -> list[Tensor]:
        """Maps ``b d rows columns`` of all scales, the finest first, for detection and segmentation."""

    def features(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d rows columns"]:
        """The last map of pictures of one size, in the dtype of the weights."""
        return self.stages(pixels)[-1]

    def forward(self, media: Patches) -> Patches:
        """Encode.

        Raises:
            DataError: Rows and grid disagree, or the rows are not RGB.
        """
        return by_size(
            media,
            lambda pixels: self.features(pixels).permute(0, 2, 3, 1).flatten(1, 2),
            grid_out=self.grid_out(media.grid),
            d_out=self.d_out,
            batch_size=self.batch_size,
            name=type(self).__name__,
        )

    def grid_out(self, grid: Int[Tensor, "item 3"]) -> Int[Tensor, "item 3"]:
        """One token a cell, begun cells included."""
        cell = grid.new_tensor([1, self.cell, self.cell])
        return (grid + cell - 1) // cell

    def logits(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b classes"]:
        """Scores of classes, from the mean of the last map.

        Raises:
            ConfigError: The tower has no classifier.
        """
        if self.classifier is None:
            raise ConfigError("this tower has no classifier", remedy="build it with num_classes")
        return self.classifier(self.features(pixels).mean((2, 3)))

    def prepared(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """Normalized pixels in the dtype of the weights."""
        return self.normalize(pixels).to(next(self.parameters()).dtype)


def same_count(**columns: tuple[int, ...]) -> None:
    """Refuse sizes whose columns have not one number for each stage.

    Raises:
        ConfigError: Says how many each has.
    """
    if len({len(column) for column in columns.values()}) > 1:
        raise ConfigError(
            f"one number a stage is needed: {', '.join(f'{len(c)} {name}' for name, c in columns.items())}",
            remedy="give all of them as many numbers as there are stages",
        )


def channels_last(module: nn.Module) -> None:
    """Lay out the filters of all convolutions channels last, as ragged pixels are: no map is reordered on the way."""
    for weight in module.parameters():
        if weight.ndim == 4:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
