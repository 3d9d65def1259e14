"""Picture towers of Hugging Face transformers behind the :class:`~plait.core.protocols.Encoder` face."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from plait.core.errors import ConfigError, DataError
from plait.core.tensors import Patches
from plait.models.towers.families import layout
from plait.models.towers.pixels import Normalize, by_size


class PretrainedVision(nn.Module):
    """A picture model of transformers, of any family in :data:`~plait.models.towers.families.FAMILIES`.

    Takes raw RGB pixels in 0..1, one row a pixel, and normalizes them itself. Gives one token a patch, or a cell of the
    last feature map, in raster order; class, distillation and register tokens are left out. Frames are encoded one by
    one; items of different sizes may be mixed, and each comes out as it would alone.

    **Sizes.** Networks of convolutions or windows and transformers that compute their positions take pictures of any
    size. Positions learned on one square are interpolated to another grid, as transformers does it: features then drift
    with the distance from the size of training. Where a family has no interpolation, other sizes are refused. A picture
    that does not fill its last row or column of patches is padded below and to the right with the mean color (zeros
    after normalization), never cropped, so that ``h`` x ``w`` pixels become ``ceil(h / cell)`` x ``ceil(w / cell)``
    tokens in every family. ResNet and RegNet round up by themselves and are not padded.

    **Layers.** ``layer`` counts from the end: -1 is what the model gives at its end, after its last norm if it has one
    there; -2 is what goes into its last layer (LLaVA's choice, arXiv 2304.08485); -1 - ``num_layers`` is what goes into
    its first.

    A batch norm in training mode takes its statistics from pictures of one size at a time, and DINOv3 jitters its
    positions as its configuration says; frozen towers are in eval mode, where neither happens.

    Args:
        backbone: Changed: its pooling parts are taken off, and a masked autoencoder no longer masks.
        mean: Of the three channels.
        std: Of the three channels.
        layer: Which hidden layer is taken; only -1 where the grid shrinks from stage to stage.

    Raises:
        CheckpointError: The family is not known, or its pictures or patches are not square.
        ConfigError: It has no such layer.

    Example:
        >>> from transformers import ViTConfig, ViTModel
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> tower = PretrainedVision(ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8)))
        >>> tower(Patches(values=torch.rand(20 * 32, 3), grid=torch.tensor([[1, 20, 32]]))).grid.tolist()
        [[1, 3, 4]]
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        *,
        mean: tuple[float, ...] = (0.5, 0.5, 0.5),
        std: tuple[float, ...] = (0.5, 0.5, 0.5),
        layer: int = -1,
    ) -> None:
        super().__init__()
        self.layout = layout(backbone)
        if not -1 - self.layout.num_layers <= layer <= -1:
            raise ConfigError(
                f"layer is {layer}, {type(backbone).__name__} has "
                + (
                    f"-1 to {-1 - self.layout.num_layers}" if self.layout.num_layers else "one grid only at its end, -1"
                ),
                place="layer",
                remedy="count from the end: -1 is the last",
            )
        _without_summary(backbone)
        self.backbone = backbone
        self.normalize = Normalize(mean, std)
        self.layer = layer
        self.d_out: int = self.layout.d_out

    def forward(self, media: Patches) -> Patches:
        """Encode.

        Raises:
            DataError: Rows and grid disagree, or a picture has a size that the tower cannot take.
        """
        self._check(media.grid)
        return by_size(
            media,
            self.features,
            grid_out=self.grid_out(media.grid),
            d_out=self.d_out,
            batch_size=self.layout.batch_size,
            name=type(self.backbone).__name__,
        )

    def grid_out(self, grid: Int[Tensor, "item 3"]) -> Int[Tensor, "item 3"]:
        """One token a patch or cell, begun ones included."""
        cell = grid.new_tensor([1, self.layout.cell, self.layout.cell])
        return (grid + cell - 1) // cell

    def features(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n d"]:
        """Tokens of pictures of one size in raster order, in the dtype of the weights."""
        h, w = pixels.shape[2:]
        x = self.normalize(pixels)
        pad_to = self.layout.pad_to
        if h % pad_to or w % pad_to:
            x = functional.pad(x, (0, -w % pad_to, 0, -h % pad_to))
        # transformers keeps tables between calls (BEiT's positions); made in inference mode, they could not be trained
        # with afterwards.
        graded = torch.is_grad_enabled()
        with torch.inference_mode(mode=False), torch.set_grad_enabled(graded):
            hidden = self._hidden(x.to(self.backbone.dtype))
        if hidden.ndim == 4:
            hidden = hidden.flatten(2).transpose(1, 2)
        hidden = hidden[:, self.layout.leading :]
        wanted = -(-h // self.layout.cell) * -(-w // self.layout.cell)
        if hidden.shape[1] != wanted:
            raise DataError(
                f"{hidden.shape[1]} tokens came of {h} x {w} pixels, expected {wanted}",
                place=f"{type(self.backbone).__name__} output",
                remedy="this is a fault of the tower's layout in plait.models.towers.families",
            )
        return hidden

    def _hidden(self, x: Float[Tensor, "b 3 h w"]) -> Tensor:
        inputs = self.layout.call(self.backbone, x)
        if self.layer == -1:
            return self.backbone(**inputs).last_hidden_state
        return self.backbone(**inputs, output_hidden_states=True).hidden_states[self.layer]

    def _check(self, grid: Int[Tensor, "item 3"]) -> None:
        own = self.layout.own
        fixed = self.layout.sizes == "own"
        wrong = [row for row in grid.tolist() if min(row[1:]) < 1 or (fixed and row[1:] != [own, own])]
        if wrong:
            takes = f"of {own} x {own} pixels" if fixed else "of one pixel or more a side"
            raise DataError(
                f"this tower takes RGB pictures {takes}, came a grid of {wrong[0]}",
                place=f"{type(self.backbone).__name__} input",
                remedy="prepare pictures with the tower's own contract",
            )


def _without_summary(backbone: Any) -> None:
    """Take off the parts that make one vector of a picture: here there is none, so their weights would only cost."""
    for name in ("pooler", "head"):
        part = getattr(backbone, name, None)
        if isinstance(part, nn.Module) and any(True for _ in part.parameters()):
            setattr(backbone, name, None)
    if getattr(backbone, "use_head", False):  # SigLIP and AIMv2 ask this before they look for it
        backbone.use_head = False
