"""Video towers: a picture tower for each frame and a module over time, or one Transformer over space-time patches.

Arnab et al. (ViViT, https://arxiv.org/abs/2103.15691) compare the two; VideoMAE (https://arxiv.org/abs/2203.12602) is
of the second kind.
"""

from dataclasses import dataclass
from typing import Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from plait.core.errors import ConfigError, DataError
from plait.core.protocols import Encoder
from plait.core.tensors import Patches
from plait.models.attention import Places
from plait.models.position.absolute import LearnedSequence, LearnedVolume, SinCosSequence, SinCosVolume
from plait.models.position.rotary import Rotary
from plait.models.towers.pixels import IMAGENET_MEAN, IMAGENET_STD, EncodeClips, Normalize, by_shape
from plait.models.transformer import Transformer, TransformerSizes

# --- frames, then time -----------------------------------------------------------------------------------------------


class FrameEncoder(nn.Module):
    """A picture tower for each frame, then modules over time: an :class:`~plait.core.protocols.Encoder` for video.

    Args:
        tower: Any picture tower; towers encode frames one by one.
        over_time: Applied in turn to what came before; each has the face of an Encoder, such as :class:`FramePool`,
            :class:`TemporalTransformer` and :class:`TimePool`.

    Example:
        >>> from plait.models.towers.vit import VisionTransformer, vit
        >>> tower = VisionTransformer(vit(24, 1, 2, patch=8, size=16))
        >>> temporal = TemporalTransformer(TransformerSizes(d=24, depth=1, heads=2), frames=4)
        >>> video = FrameEncoder(tower, FramePool(24), temporal)
        >>> clip = Patches(values=torch.rand(3 * 16 * 16, 3), grid=torch.tensor([[3, 16, 16]]))
        >>> video(clip).grid.tolist()  # a token a frame
        [[3, 1, 1]]
    """

    def __init__(self, tower: nn.Module, *over_time: nn.Module) -> None:
        super().__init__()
        self.tower, self.over_time = tower, nn.ModuleList(over_time)
        self.d_out: int = self._chain()[-1].d_out

    def forward(self, media: Patches) -> Patches:
        """Encode."""
        for module in self._chain():
            media = module(self._as_wide(media, module) if module is not self.tower else media)
        return media

    def _as_wide(self, media: Patches, module: Encoder) -> Patches:
        """Features in the number format of what reads them: a frozen tower may well be narrower."""
        assert isinstance(module, nn.Module)
        wide = next((weight.dtype for weight in module.parameters()), media.values.dtype)
        return Patches(values=media.values.to(wide), grid=media.grid)

    def grid_out(self, grid: Int[Tensor, "item 3"]) -> Int[Tensor, "item 3"]:
        """What the modules leave, one after the other."""
        for module in self._chain():
            grid = module.grid_out(grid)
        return grid

    def _chain(self) -> list[Encoder]:
        return [cast(Encoder, module) for module in (self.tower, *self.over_time)]


class FramePool(nn.Module):
    """The mean of each frame's cells: one token a frame."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.d_out = d

    def forward(self, media: Patches) -> Patches:
        """Pool."""
        return _by_clip(self, media, lambda clips: clips.mean((2, 3)))

    def grid_out(self, grid: Int[Tensor, "item 3"]) -> Int[Tensor, "item 3"]:
        """Frames stay."""
        return torch.cat([grid[:, :1], torch.ones_like(grid[:, 1:])], dim=1)


class TimePool(nn.Module):
    """The mean over frames, cell by cell; it does not know their order."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.d_out = d

    def forward(self, media: Patches) -> Patches:
        """Pool."""
        return _by_clip(self, media, lambda clips: clips.mean(1).flatten(1, 2))

    def grid_out(self, grid: Int[Tensor, "item 3"]) -> Int[Tensor, "item 3"]:
        """One frame is left."""
        return torch.cat([torch.ones_like(grid[:, :1]), grid[:, 1:]], dim=1)


class TemporalTransformer(nn.Module):
    """Every cell looks at the same cell of all frames of its video; where frames stand is added or turned in.

    Args:
        sizes: Of the blocks.
        position: Code of the frame's number: ``learned``, ``sincos``, ``rope``, or ``none``, which cannot tell one
            order of frames from another.
        frames: Longest video, where positions are learned.

    Raises:
        ConfigError: Positions are to be learned, for no frame.
    """

    def __init__(
        self,
        sizes: TransformerSizes,
        *,
        position: Literal["learned", "sincos", "rope", "none"] = "learned",
        frames: int = 0,
    ) -> None:
        super().__init__()
        self.d_out = sizes.d
        self.position: nn.Module | None = None
        self.rotary: Rotary | None = None
        if position == "learned":
            if frames < 1:
                raise ConfigError(
                    f"positions are to be learned for {frames} frames",
                    place="TemporalTransformer",
                    remedy="give the frames of the longest video, or choose sincos or rope",
                )
            self.position = LearnedSequence(frames, sizes.d)
        elif position == "sincos":
            self.position = SinCosSequence(sizes.d)
        elif position == "rope":
            self.rotary = Rotary.sequence(sizes.d_head or sizes.d // sizes.heads)
        self.transformer = Transformer(sizes)

    def forward(self, media: Patches) -> Patches:
        """Encode.

        Raises:
            DataError: A video has more frames than learned positions.
        """
        return _by_clip(self, media, self._over_time)

    def grid_out(self, grid: Int[Tensor, "item 3"]) -> Int[Tensor, "item 3"]:
        """Nothing is joined."""
        return grid

    def _over_time(self, clips: Float[Tensor, "b f h w d"]) -> Float[Tensor, "b n d"]:
        frames, rows, columns = clips.shape[1:4]
        x = clips.permute(0, 2, 3, 1, 4).flatten(0, 2)  # cells of all clips, then frames
        if self.position is not None:
            x = x + self.position(frames).to(x)
        turn = None
        if self.rotary is not None:
            turn = self.rotary(torch.arange(frames, device=x.device)[:, None])
        x = self.transformer(x, Places(turn=turn))
        return x.unflatten(0, (-1, rows, columns)).permute(0, 3, 1, 2, 4).flatten(1, 3)


def _by_clip(module: Encoder, media: Patches, encode: EncodeClips) -> Patches:
    name = type(module).__name__
    if media.values.shape[1] != module.d_out:
        raise DataError(
            f"features of width {media.values.shape[1]} came, expected {module.d_out}",
            place=f"{name} input",
            remedy="build it with the d_out of the tower before it",
        )
    return by_shape(media, encode, grid_out=module.grid_out(media.grid), d_out=module.d_out, name=name)


# --- space and time at once ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoSizes:
    """Shape and kind of a space-time tower.

    Attributes:
        transformer: Of the blocks.
        tubelet: Frames of a space-time patch.
        patch: Pixels a side of it.
        grid: Patches along time, rows and columns that positions are made for.
        position: ``sincos``: 3-D sines and cosines, of any grid; ``learned``: a table, interpolated to other grids;
            ``sequence``: VideoMAE's sines and cosines of the patch's number, which know one grid only; ``none``.
        norm: Where the last norm stands: over all tokens, over what is pooled, or nowhere.
        pool: What :meth:`SpaceTimeTransformer.pooled` gives: the mean of all tokens, or the first one.
        num_classes: Width of the classifier; 0: none.
        remainder: What happens to frames and pixels that make no whole patch: ``pad`` repeats the last frame and fills
            up with the mean color below and to the right, ``error`` refuses the clip.
        mean: Of the pixels, subtracted.
        std: Divided by.
    """

    transformer: TransformerSizes
    tubelet: int = 2
    patch: int = 16
    grid: tuple[int, int, int] = (8, 14, 14)
    position: Literal["sincos", "learned", "sequence", "none"] = "sincos"
    norm: Literal["all", "pooled", "none"] = "all"
    pool: Literal["mean", "first"] = "mean"
    num_classes: int = 0
    remainder: Literal["pad", "error"] = "pad"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD


def _videomae(d: int, depth: int, heads: int) -> VideoSizes:
    inner = TransformerSizes(d=d, depth=depth, heads=heads, eps=1e-12, key_bias=False)
    return VideoSizes(transformer=inner, position="sequence")


VIDEOMAE_S, VIDEOMAE_B, VIDEOMAE_L = _videomae(384, 12, 6), _videomae(768, 12, 12), _videomae(1024, 24, 16)
"""For clips of 16 frames of 224 x 224 pixels, which become 1568 tokens."""


class TubeletEmbedding(nn.Module):
    """Each space-time patch through one linear layer: a strided 3-D convolution, or the same weights on rows.

    Args:
        tubelet: Frames of a patch.
        patch: Pixels a side.
        d: Width of a token.
        unfold: Lay patches out as rows instead of convolving; the same values.
    """

    def __init__(self, tubelet: int, patch: int, d: int, *, unfold: bool = True) -> None:
        super().__init__()
        self.unfold = unfold
        self.conv = nn.Conv3d(3, d, (tubelet, patch, patch), (tubelet, patch, patch))

    def forward(self, clips: Float[Tensor, "b f 3 h w"]) -> Float[Tensor, "b n d"]:
        """Tokens in raster order, frame by frame; sides must be multiples of the patch."""
        if not self.unfold:
            return self.conv(clips.transpose(1, 2)).flatten(2).mT
        t, p, _ = self.conv.kernel_size
        # b frames t 3 rows p columns p: the order in which the convolution's weights are kept is 3 t p p
        cells = clips.unflatten(4, (-1, p)).unflatten(3, (-1, p)).unflatten(1, (-1, t))
        rows = cells.permute(0, 1, 4, 6, 3, 2, 5, 7).flatten(4).flatten(1, 3)
        return functional.linear(rows, self.conv.weight.flatten(1), self.conv.bias)


class SpaceTimeTransformer(nn.Module):
    """Clips to tokens, one a space-time patch: an :class:`~plait.core.protocols.Encoder` for video.

    Takes raw RGB pixels in 0..1, grid ``(frames, rows, columns)``, and normalizes them itself. Clips of different sizes
    may be mixed (but for ``sequence`` positions); those of one size are computed together.

    Args:
        sizes: Shape and kind.
        batch_size: Clips computed together at most; 0: all of one size.

    Example:
        >>> with torch.device("meta"):
        ...     tower = SpaceTimeTransformer(VIDEOMAE_B)
        >>> tower.grid_out(torch.tensor([[16, 224, 224]])).tolist()
        [[8, 14, 14]]
    """

    def __init__(self, sizes: VideoSizes, *, batch_size: int = 0) -> None:
        super().__init__()
        self.sizes, self.batch_size = sizes, batch_size
        inner = sizes.transformer
        self.d_out = inner.d
        self.normalize = Normalize(sizes.mean, sizes.std)
        self.embed = TubeletEmbedding(sizes.tubelet, sizes.patch, inner.d)
        self.position: nn.Module | None = None
        if sizes.position == "sincos":
            self.position = SinCosVolume(inner.d)
        elif sizes.position == "learned":
            self.position = LearnedVolume(*sizes.grid, d=inner.d)
        elif sizes.position == "sequence":
            self.position = SinCosSequence(inner.d)
        self.transformer = Transformer(inner, final_norm=sizes.norm == "all")
        # Its own eps: VideoMAE's is torch's usual one, not that of the blocks.
        self.norm_pooled = nn.LayerNorm(inner.d) if sizes.norm == "pooled" else nn.Identity()
        self.classifier = nn.Linear(inner.d, sizes.num_classes) if sizes.num_classes else None

    def forward(self, media: Patches) -> Patches:
        """Encode.

        Raises:
            DataError: Rows and grid disagree, the rows are not RGB, or a clip has a size that is refused.
        """
        if media.values.shape[1] != 3:
            raise DataError(
                f"rows have {media.values.shape[1]} values, expected RGB",
                place="SpaceTimeTransformer input",
                remedy="give raw pixels, one row a pixel, and the grid (frames, rows, columns) of each clip",
            )
        return by_shape(
            media,
            lambda clips: self.features(clips.permute(0, 1, 4, 2, 3)),
            grid_out=self.grid_out(media.grid),
            d_out=self.d_out,
            batch_size=self.batch_size,
            name="SpaceTimeTransformer",
        )

    def grid_out(self, grid: Int[Tensor, "item 3"]) -> Int[Tensor, "item 3"]:
        """One token a space-time patch; begun patches count when they are filled up."""
        return -(-grid // grid.new_tensor([self.sizes.tubelet, self.sizes.patch, self.sizes.patch]))

    def features(
        self,
        clips: Float[Tensor, "b f 3 h w"],
        *,
        weights: list[Tensor] | None = None,
        hidden: list[Tensor] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """Tokens of clips of one size.

        Args:
            clips: RGB in 0..1.
            weights: If given, attention weights of every block are appended.
            hidden: If given, what goes into every block is appended.

        Raises:
            DataError: Positions are a sequence and the clips have another grid, or there is a remainder.
        """
        clips = self.normalize(clips.flatten(0, 1)).unflatten(0, clips.shape[:2])
        clips = self._whole(clips.to(self.embed.conv.weight.dtype))
        t, p = self.sizes.tubelet, self.sizes.patch
        grid = clips.shape[1] // t, clips.shape[3] // p, clips.shape[4] // p
        x = self.embed(clips)
        if self.sizes.position == "sequence":
            x = x + self._numbered(grid).to(x)
        elif self.position is not None:
            x = x + self.position(*grid).to(x)
        return self.transformer(x, weights=weights, hidden=hidden)

    def pooled(self, clips: Float[Tensor, "b f 3 h w"]) -> Float[Tensor, "b d"]:
        """One vector a clip."""
        tokens = self.features(clips)
        return self.norm_pooled(tokens.mean(1) if self.sizes.pool == "mean" else tokens[:, 0])

    def logits(self, clips: Float[Tensor, "b f 3 h w"]) -> Float[Tensor, "b classes"]:
        """Classes.

        Raises:
            ConfigError: There is no classifier.
        """
        if self.classifier is None:
            raise ConfigError("this tower has no classifier", remedy="build it with num_classes")
        return self.classifier(self.pooled(clips))

    def _whole(self, clips: Float[Tensor, "b f 3 h w"]) -> Float[Tensor, "b f2 3 h2 w2"]:
        """Clips of whole space-time patches."""
        t, p = self.sizes.tubelet, self.sizes.patch
        frames, _, rows, columns = clips.shape[1:]
        if frames % t == rows % p == columns % p == 0:
            return clips
        if self.sizes.remainder == "error":
            raise DataError(
                f"a clip of {frames} frames of {rows} x {columns} pixels does not split into patches of {t} frames of "
                f"{p} x {p}",
                place="SpaceTimeTransformer input",
                remedy="sample and scale to multiples of the patch, or set remainder to pad",
            )
        clips = functional.pad(clips, (0, -columns % p, 0, -rows % p))
        return torch.cat([clips, clips[:, -1:].expand(-1, -frames % t, -1, -1, -1)], dim=1)

    def _numbered(self, grid: tuple[int, int, int]) -> Float[Tensor, "n d"]:
        if grid != self.sizes.grid:
            t, p = self.sizes.tubelet, self.sizes.patch
            wanted, came = (
                f"{frames * t} frames of {rows * p} x {columns * p}"
                for frames, rows, columns in (self.sizes.grid, grid)
            )
            raise DataError(
                f"positions are numbers of patches, made for clips of {wanted} pixels, came {came}",
                place="SpaceTimeTransformer input",
                remedy="sample and scale to that size, or set position to sincos or learned and train again",
            )
        assert self.position is not None
        return self.position(grid[0] * grid[1] * grid[2])
