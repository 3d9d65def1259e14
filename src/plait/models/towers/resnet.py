"""ResNet: a convolutional picture tower with maps at four scales.

He et al., "Deep residual learning for image recognition", https://arxiv.org/abs/1512.03385. Bottlenecks stride in the
3x3 filter ("v1.5"), as in torchvision and in Hugging Face's published weights, not in the first 1x1 as in the paper.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from plait.core.errors import DataError
from plait.models.towers.maps import MapTower, channels_last, same_count
from plait.models.towers.pixels import IMAGENET_MEAN, IMAGENET_STD


@dataclass(frozen=True, slots=True, kw_only=True)
class ResNetSizes:
    """Shape of a ResNet: a column of table 1 of the paper.

    Attributes:
        depths: Blocks of each stage.
        widths: Channels that each stage gives.
        bottleneck: Narrow, filter and widen (from ResNet-50 on); else two 3x3 filters.
        d_stem: Channels of the first convolution.
        num_classes: Width of the classifier; 0: none.
    """

    depths: tuple[int, ...]
    widths: tuple[int, ...] = (256, 512, 1024, 2048)
    bottleneck: bool = True
    d_stem: int = 64
    num_classes: int = 0

    def __post_init__(self) -> None:
        same_count(depths=self.depths, widths=self.widths)


_SLIM = (64, 128, 256, 512)
RESNET_18 = ResNetSizes(depths=(2, 2, 2, 2), widths=_SLIM, bottleneck=False)
RESNET_34 = ResNetSizes(depths=(3, 4, 6, 3), widths=_SLIM, bottleneck=False)
RESNET_50 = ResNetSizes(depths=(3, 4, 6, 3))
RESNET_101 = ResNetSizes(depths=(3, 4, 23, 3))
RESNET_152 = ResNetSizes(depths=(3, 8, 36, 3))
"""The five of the paper's table 1."""


class ConvNorm(nn.Module):
    """Convolution with symmetric padding, batch norm, and ReLU unless ``linear``: ``ceil(size / stride)`` cells."""

    def __init__(self, d_in: int, d_out: int, kernel: int, *, stride: int = 1, linear: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(d_in, d_out, kernel, stride, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(d_out)
        self.linear = linear
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")  # arXiv 1502.01852

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h2 w2"]:
        """Convolve, normalize, rectify.

        Raises:
            DataError: It trains, and a channel has one value, whose deviation is nothing.
        """
        x = self.conv(x)
        if self.training and x.numel() == x.shape[1]:
            raise DataError(
                "batch norm needs two values a channel while it trains, came one",
                place=f"one picture whose map has become {x.shape[2]} x {x.shape[3]}",
                remedy="give several pictures of this size, or larger ones, or set the tower to eval()",
            )
        x = self.norm(x)
        # In place: the gradient of the norm needs what went into it, not what came out.
        return x if self.linear else functional.relu(x, inplace=True)


class Residual(nn.Module):
    """``relu(f(x) + x)``; where the shape changes, ``x`` passes a 1x1 convolution."""

    def __init__(self, d_in: int, d_out: int, *, stride: int, bottleneck: bool) -> None:
        super().__init__()
        narrow = d_out // 4
        self.inner = nn.Sequential(
            *(
                (
                    ConvNorm(d_in, narrow, 1),
                    ConvNorm(narrow, narrow, 3, stride=stride),
                    ConvNorm(narrow, d_out, 1, linear=True),
                )
                if bottleneck
                else (ConvNorm(d_in, d_out, 3, stride=stride), ConvNorm(d_out, d_out, 3, linear=True))
            )
        )
        same = stride == 1 and d_in == d_out
        self.shortcut = nn.Identity() if same else ConvNorm(d_in, d_out, 1, stride=stride, linear=True)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h2 w2"]:
        """Filter and add."""
        return functional.relu(self.inner(x).add_(self.shortcut(x)), inplace=True)


class ResNet(MapTower):
    """Pictures to a grid of features; :meth:`stages` gives C2 to C5, of cells of 4, 8, 16 and 32 pixels.

    Args:
        sizes: Shape.
        mean: Of the three channels.
        std: Of the three channels.
        batch_size: Pictures computed together at most; 0: all of one size.

    Example:
        >>> tower = ResNet(RESNET_18)
        >>> [tuple(c.shape[1:]) for c in tower.stages(torch.rand(1, 3, 64, 96))]
        [(64, 16, 24), (128, 8, 12), (256, 4, 6), (512, 2, 3)]
    """

    def __init__(
        self,
        sizes: ResNetSizes,
        *,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        batch_size: int = 0,
    ) -> None:
        super().__init__(
            d_out=sizes.widths[-1],
            cell=2 ** (len(sizes.widths) + 1),
            num_classes=sizes.num_classes,
            mean=mean,
            std=std,
            batch_size=batch_size,
        )
        self.sizes = sizes
        self.stem = ConvNorm(3, sizes.d_stem, 7, stride=2)
        self.blocks = nn.ModuleList()
        width = sizes.d_stem
        for number, (depth, d) in enumerate(zip(sizes.depths, sizes.widths, strict=True)):
            first = Residual(width, d, stride=2 if number else 1, bottleneck=sizes.bottleneck)
            rest = (Residual(d, d, stride=1, bottleneck=sizes.bottleneck) for _ in range(depth - 1))
            self.blocks.append(nn.Sequential(first, *rest))
            width = d
        channels_last(self)

    def stages(self, pixels: Float[Tensor, "b 3 h w"]) -> list[Tensor]:
        """Maps of all stages, the finest first."""
        x = functional.max_pool2d(self.stem(self.prepared(pixels)), 3, stride=2, padding=1)
        maps: list[Tensor] = []
        for stage in self.blocks:
            x = stage(x)
            maps.append(x)
        return maps
