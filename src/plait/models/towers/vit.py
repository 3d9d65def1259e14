"""Vision transformer from scratch: patches, positions of any kind, the one Transformer.

Dosovitskiy et al., "An image is worth 16x16 words", https://arxiv.org/abs/2010.11929.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from plait.core.errors import ConfigError, DataError
from plait.core.tensors import Patches
from plait.models.attention import Places, same_segment
from plait.models.position.absolute import LearnedGrid, LearnedRowColumn, SinCosGrid
from plait.models.position.relative import GridBias, LinearBias, gaps
from plait.models.position.rotary import Rotary, Turn, unit_coordinates
from plait.models.ragged import packed_rows
from plait.models.towers.pixels import HALF, Normalize, by_size
from plait.models.transformer import Transformer, TransformerSizes, norm_of

Absolute = Literal["learned", "sincos", "row_column", "none"]
Relative = Literal["none", "grid_bias", "alibi", "rope", "rope_unit"]
Remainder = Literal["pad", "crop", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ViTSizes:
    """Shape and kind of a vision transformer.

    Attributes:
        transformer: Of the blocks.
        patch: Pixels a side of a patch.
        grid: Rows and columns of patches that learned positions are made for; others are interpolated.
        position: Absolute code, added to the patches.
        relative: Relative code, in every block; with an absolute one it is a hybrid.
        class_token: Whether a learned token stands in front.
        registers: Further learned tokens in front (https://arxiv.org/abs/2309.16588).
        pool: What :meth:`VisionTransformer.pooled` gives: the class token, or the mean of the patches.
        pooler: A linear layer and tanh over what is pooled (the paper's head while pretraining).
        norm: Where the last norm stands: over all tokens, or only over what is pooled (CLIP).
        norm_first: A norm before the first block (CLIP).
        patch_bias: Whether the embedding of patches has a bias (CLIP has none).
        num_classes: Width of the classifier; 0: none.
        patch_dropout: Share of the patches of each picture that is left out while training, drawn anew for every
            picture: blocks compute the others alone (FLIP, https://arxiv.org/abs/2212.00794). What stands in front of
            them stays.
        remainder: What happens to pixels that make no whole patch: ``pad`` fills up with the mean color below and to
            the right, ``crop`` cuts them off there, ``error`` refuses the picture.
        mean: Of the pixels, subtracted.
        std: Divided by.
    """

    transformer: TransformerSizes
    patch: int = 16
    grid: tuple[int, int] = (14, 14)
    position: Absolute = "learned"
    relative: Relative = "none"
    class_token: bool = True
    registers: int = 0
    pool: Literal["class", "mean"] = "class"
    pooler: bool = False
    norm: Literal["all", "pooled"] = "all"
    norm_first: bool = False
    patch_bias: bool = True
    num_classes: int = 0
    patch_dropout: float = 0.0
    remainder: Remainder = "pad"
    mean: tuple[float, ...] = HALF
    std: tuple[float, ...] = HALF


def vit(d: int, depth: int, heads: int, *, patch: int = 16, size: int = 224, num_classes: int = 0) -> ViTSizes:
    """Sizes as the paper has them, for pictures of one size.

    Args:
        d: Width.
        depth: Blocks.
        heads: Of attention.
        patch: Pixels a side of a patch.
        size: Pixels a side of a picture.
        num_classes: Width of the classifier.
    """
    transformer = TransformerSizes(d=d, depth=depth, heads=heads, eps=1e-12)
    return ViTSizes(transformer=transformer, patch=patch, grid=(size // patch, size // patch), num_classes=num_classes)


VIT_TI16, VIT_S16, VIT_B16 = vit(192, 12, 3), vit(384, 12, 6), vit(768, 12, 12)
VIT_L16, VIT_H14 = vit(1024, 24, 16), vit(1280, 32, 16, patch=14)
"""Table 1 of the paper; Ti and S are DeiT's (https://arxiv.org/abs/2012.12877)."""


class PatchEmbedding(nn.Module):
    """Each patch through one linear layer: a strided convolution, or the same weights on patches laid out as rows.

    Args:
        patch: Pixels a side.
        d: Width of a token.
        bias: With a bias.
        unfold: Lay patches out as rows instead of convolving; the same values.
    """

    def __init__(self, patch: int, d: int, *, bias: bool = True, unfold: bool = True) -> None:
        super().__init__()
        self.patch, self.unfold = patch, unfold
        self.conv = nn.Conv2d(3, d, patch, patch, bias=bias)

    def forward(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n d"]:
        """Tokens in raster order; sides must be multiples of the patch."""
        if not self.unfold:
            return self.conv(pixels).flatten(2).transpose(1, 2)
        rows = patches_of(pixels.permute(0, 2, 3, 1), self.patch)
        return functional.linear(rows, self.conv.weight.permute(0, 2, 3, 1).flatten(1), self.conv.bias)


def patches_of(pixels: Float[Tensor, "b h w c"], patch: int) -> Float[Tensor, "b n e"]:
    """Patches in raster order, each with its pixels in raster order and channels last; undone by :func:`pixels_of`."""
    cells = pixels.unflatten(2, (-1, patch)).unflatten(1, (-1, patch))  # b rows p columns p c
    return cells.permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2)


def pixels_of(patches: Float[Tensor, "b n e"], patch: int, *, rows: int) -> Float[Tensor, "b h w c"]:
    """The picture whose patches these are: the inverse of :func:`patches_of`."""
    cells = patches.unflatten(2, (patch, patch, -1)).unflatten(1, (rows, -1))  # b rows columns p p c
    return cells.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2)


class VisionTransformer(nn.Module):
    """Pictures to tokens, one a patch: an :class:`~plait.core.protocols.Encoder` for pictures of any size.

    Takes raw RGB pixels in 0..1 and normalizes them itself. Gives patches in raster order, without the tokens in
    front. Frames are encoded one by one; pictures of different sizes may be mixed, those of one size are computed
    together.

    Args:
        sizes: Shape and kind.
        embed: Pixels (of whole patches) to tokens; the linear :class:`PatchEmbedding` unless given.
        batch_size: Pictures (rows, where they are packed by a mask) computed together at most; 0: all.
        row: How pictures of different sizes are computed; the values are the same. None: those of one size are a batch.
            Else they are packed, and each sees only itself (NaViT, https://arxiv.org/abs/2307.06304): 0 puts all in one
            row and attends picture by picture, so that nothing is filled up; another number makes rows of so many
            tokens, or as many as the largest has, with a mask: few large operations. Not done where positions are
            biases of scores (``grid_bias``, ``alibi``), nor, while training, with ``drop_path``, which drops rows, or
            with ``patch_dropout``.

    Raises:
        ConfigError: It is to pool a class token that it has not, or to drop patches and has relative positions, which
            are those of whole grids.

    Example:
        >>> from dataclasses import replace
        >>> with torch.device("meta"):
        ...     tower = VisionTransformer(replace(VIT_B16, num_classes=1000))
        >>> sum(p.numel() for p in tower.parameters())
        86567656
    """

    def __init__(
        self, sizes: ViTSizes, *, embed: nn.Module | None = None, batch_size: int = 0, row: int | None = None
    ) -> None:
        super().__init__()
        if sizes.pool == "class" and not sizes.class_token:
            raise ConfigError("pool is class, but there is no class token", remedy="set pool to mean")
        if sizes.patch_dropout and sizes.relative != "none":
            raise ConfigError(
                f"patch_dropout is {sizes.patch_dropout:g}, but relative positions ({sizes.relative}) are those of "
                "whole grids",
                place="patch_dropout",
                remedy="use absolute positions (learned, sincos, row_column), or set patch_dropout to 0",
            )
        self.sizes, self.batch_size, self.row = sizes, batch_size, row
        inner = sizes.transformer
        self.d_out = inner.d
        self.normalize = Normalize(sizes.mean, sizes.std)
        self.embed = embed or PatchEmbedding(sizes.patch, inner.d, bias=sizes.patch_bias)
        self.class_token = nn.Parameter(torch.zeros(1, inner.d)) if sizes.class_token else None
        self.registers = nn.Parameter(torch.empty(sizes.registers, inner.d)) if sizes.registers else None
        for token in (self.class_token, self.registers):
            if token is not None:
                nn.init.trunc_normal_(token, std=0.02)
        self.position = _absolute(sizes)
        self.rotary = _rotary(sizes)
        self.norm_first = norm_of(inner) if sizes.norm_first else nn.Identity()
        self.transformer = Transformer(inner, relative=_relative(sizes), final_norm=sizes.norm == "all")
        self.norm_pooled = norm_of(inner) if sizes.norm == "pooled" else nn.Identity()
        self.pooler = nn.Sequential(nn.Linear(inner.d, inner.d), nn.Tanh()) if sizes.pooler else nn.Identity()
        self.classifier = nn.Linear(inner.d, sizes.num_classes) if sizes.num_classes else None

    def forward(self, media: Patches) -> Patches:
        """Encode.

        Raises:
            DataError: Rows and grid disagree, the rows are not RGB, or a picture is refused by ``remainder``.
        """
        encode, grid = self.features, self.grid_out(media.grid)
        packed = self.packs(media.grid)
        if packed:  # what stands in front of a picture's patches is packed with them
            encode = self.embedded
            frames = grid.repeat_interleave(grid[:, 0], dim=0)
            count = frames[:, 1] * frames[:, 2] + self.prefix
            grid = torch.stack([torch.ones_like(count), count, torch.ones_like(count)], dim=1)
        found = by_size(
            media, encode, grid_out=grid, d_out=self.d_out, batch_size=self.batch_size, name="VisionTransformer"
        )
        return self._packed(found.values, self.grid_out(media.grid)) if packed else found

    def grid_out(self, grid: Int[Tensor, "item 3"]) -> Int[Tensor, "item 3"]:
        """One token a patch; begun patches count when they are filled up. A row of the kept ones where some drop."""
        patch = grid.new_tensor([1, self.sizes.patch, self.sizes.patch])
        cells = grid // patch if self.sizes.remainder == "crop" else -(-grid // patch)
        if not self.drops:
            return cells
        kept = [self._kept(rows * columns) for rows, columns in cells[:, 1:].tolist()]
        return torch.stack([cells[:, 0], torch.ones_like(cells[:, 0]), cells.new_tensor(kept)], dim=1)

    def features(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n d"]:
        """Patches of pictures of one size, without the tokens in front."""
        return self.tokens(pixels)[:, self.prefix :]

    def pooled(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """One vector a picture: the class token, or the mean of its patches."""
        tokens = self.tokens(pixels)
        pooled = tokens[:, 0] if self.sizes.pool == "class" else tokens[:, self.prefix :].mean(1)
        return self.pooler(self.norm_pooled(pooled))

    def logits(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b classes"]:
        """Classes.

        Raises:
            ConfigError: There is no classifier.
        """
        if self.classifier is None:
            raise ConfigError("this tower has no classifier", remedy="build it with num_classes")
        return self.classifier(self.pooled(pixels))

    @property
    def drops(self) -> bool:
        """Whether patches are left out now."""
        return self.training and self.sizes.patch_dropout > 0

    def _kept(self, patches: int) -> int:
        return max(1, round(patches * (1 - self.sizes.patch_dropout)))

    def _some(self, x: Float[Tensor, "b m d"]) -> Float[Tensor, "b k d"]:
        """What stands in front, and of each picture's patches those that are kept, in order."""
        front, patches = self.prefix, x.shape[1] - self.prefix
        drawn = torch.rand(len(x), patches, device=x.device).argsort(dim=1)[:, : self._kept(patches)]
        kept = drawn.sort(dim=1).values[..., None].expand(-1, -1, x.shape[2])
        return torch.cat([x[:, :front], x[:, front:].gather(1, kept)], dim=1)

    @property
    def prefix(self) -> int:
        """Tokens in front of the patches."""
        return self.sizes.class_token + self.sizes.registers

    def tokens(
        self,
        pixels: Float[Tensor, "b 3 h w"],
        *,
        weights: list[Tensor] | None = None,
        hidden: list[Tensor] | None = None,
        masked: Bool[Tensor, "b n"] | None = None,
        mask: Float[Tensor, " d"] | None = None,
    ) -> Float[Tensor, "b m d"]:
        """All tokens, those in front included: class token, registers, patches (those that do not drop).

        Args:
            pixels: RGB in 0..1.
            weights: If given, attention weights of every block are appended.
            hidden: If given, what goes into every block is appended.
            masked: Patches in whose place the mask stands, with their positions.
            mask: A learned token.
        """
        x = self.embedded(pixels, masked=masked, mask=mask)
        places = self._places(*self._cells_of(pixels), x)
        return self.transformer(self._some(x) if self.drops else x, places, weights=weights, hidden=hidden)

    def embedded(
        self,
        pixels: Float[Tensor, "b 3 h w"],
        *,
        masked: Bool[Tensor, "b n"] | None = None,
        mask: Float[Tensor, " d"] | None = None,
    ) -> Float[Tensor, "b m d"]:
        """What goes into the first block: patches with their positions, and what stands in front of them.

        Args:
            pixels: RGB in 0..1.
            masked: Patches in whose place the mask stands, with their positions.
            mask: A learned token.
        """
        rows, columns = self._cells_of(pixels)
        x = self.embed(self.whole(self.normalize(pixels).to(self.embed_dtype)))
        if masked is not None and mask is not None:
            x = torch.where(masked[..., None], mask.to(x), x)
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1)
        x = self._positioned(x, rows, columns)
        if self.registers is not None:  # after positions: they stand nowhere
            at = int(self.sizes.class_token)
            x = torch.cat([x[:, :at], self.registers.expand(len(x), -1, -1), x[:, at:]], dim=1)
        return self.norm_first(x)

    def _cells_of(self, pixels: Float[Tensor, "b 3 h w"]) -> tuple[int, int]:
        """Rows and columns of patches, as :meth:`grid_out` counts them."""
        more = 0 if self.sizes.remainder == "crop" else self.sizes.patch - 1
        rows, columns = ((side + more) // self.sizes.patch for side in pixels.shape[2:])
        return rows, columns

    def packs(self, grid: Int[Tensor, "item 3"]) -> bool:
        """Whether these pictures are packed: they differ in size, and ``row`` is set."""
        if self.row is None or self.sizes.relative in ("grid_bias", "alibi"):
            return False
        if self.drops or (self.training and self.sizes.transformer.drop_path):
            return False
        return len(grid[:, 1:].unique(dim=0)) > 1

    def _packed(self, tokens: Float[Tensor, "n d"], grid: Int[Tensor, "item 3"]) -> Patches:
        """Through the blocks, several pictures in a row, and without what stands in front."""
        shapes: list[list[int]] = grid.repeat_interleave(grid[:, 0], dim=0)[:, 1:].tolist()
        counts = [self.prefix + rows * columns for rows, columns in shapes]
        lengths = grid.new_tensor(counts)
        turn = None
        if self.rotary is not None:
            of_shape = {(r, c): self._places(r, c, tokens).turn for r, c in shapes}
            turns = [found for found in (of_shape[r, c] for r, c in shapes) if found is not None]
            turn = Turn(*(torch.cat(parts) for parts in zip(*turns, strict=True)))
        found = self._in_rows(tokens, lengths, turn) if self.row else self._apart(tokens, counts, turn)
        within = torch.arange(len(found), device=found.device) - (lengths.cumsum(0) - lengths).repeat_interleave(
            lengths
        )
        return Patches(values=found[within >= self.prefix], grid=grid)

    def _apart(self, tokens: Float[Tensor, "n d"], counts: list[int], turn: Turn | None) -> Float[Tensor, "n d"]:
        """All in one row (so many pictures of one as are computed together), each attended to on its own."""
        done: list[Tensor] = []
        step, start = self.batch_size or len(counts), 0
        for at in range(0, len(counts), step):
            some = tuple(counts[at : at + step])
            part = slice(start, start := start + sum(some))
            places = Places(lengths=some, turn=None if turn is None else Turn(turn.cos[part], turn.sin[part]))
            done.append(self.transformer(tokens[None, part], places)[0])
        return torch.cat(done)

    def _in_rows(self, tokens: Float[Tensor, "n d"], lengths: Int[Tensor, " item"], turn: Turn | None) -> Tensor:
        """In rows of one length, with a mask."""
        packed = packed_rows(lengths, self.row or 0)
        rows, turns = packed.put(tokens), None if turn is None else [packed.put(part) for part in turn]
        done: list[Tensor] = []
        step = self.batch_size or len(rows)
        for at in range(0, len(rows), step):
            some = slice(at, at + step)
            mask = same_segment(packed.segment_ids[some])
            places = Places(mask=mask, turn=None if turns is None else Turn(*(part[some] for part in turns)))
            done.append(self.transformer(rows[some], places))
        return packed.take(torch.cat(done))

    @property
    def embed_dtype(self) -> torch.dtype:
        """Of the weights that read pixels."""
        return next(self.embed.parameters()).dtype

    def whole(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h2 w2"]:
        """Pictures of whole patches."""
        h, w = pixels.shape[2:]
        p = self.sizes.patch
        if h % p == 0 and w % p == 0:
            return pixels
        if self.sizes.remainder == "pad":
            return functional.pad(pixels, (0, -w % p, 0, -h % p))
        if self.sizes.remainder == "crop" and h >= p and w >= p:
            return pixels[:, :, : h // p * p, : w // p * p]
        raise DataError(
            f"a picture of {h} x {w} pixels does not split into patches of {p} x {p}",
            place="VisionTransformer input",
            remedy="scale pictures to multiples of the patch, or set remainder to pad",
        )

    def _positioned(self, x: Float[Tensor, "b m d"], rows: int, columns: int) -> Float[Tensor, "b m d"]:
        if self.position is None:
            return x
        code = self.position(rows, columns).to(x)
        # A code of the cells alone says nothing about the class token.
        return x + functional.pad(code, (0, 0, x.shape[1] - len(code), 0))

    def _places(self, rows: int, columns: int, x: Tensor) -> Places:
        relative = self.sizes.relative
        if relative == "none":
            return Places()
        if self.rotary is not None:
            at = unit_coordinates(rows, columns) if relative == "rope_unit" else _cells(rows, columns).float()
            # At the origin nothing turns: what stands in front of the patches has no place.
            return Places(turn=self.rotary(functional.pad(at, (0, 0, self.prefix, 0)).to(x.device)))
        at = functional.pad(_cells(rows, columns), (0, 0, self.prefix, 0)).to(x.device)
        gap = gaps(at, at)
        gap[: self.prefix], gap[:, : self.prefix] = 0, 0
        return Places(gap=gap, grid=(rows, columns))


def _cells(rows: int, columns: int) -> Int[Tensor, "n 2"]:
    return torch.cartesian_prod(torch.arange(rows), torch.arange(columns))


def _absolute(sizes: ViTSizes) -> nn.Module | None:
    d, grid = sizes.transformer.d, sizes.grid
    match sizes.position:
        case "learned":
            return LearnedGrid(*grid, d, prefix=int(sizes.class_token))
        case "sincos":
            return SinCosGrid(d)
        case "row_column":
            return LearnedRowColumn(*grid, d)
        case "none":
            return None


def _rotary(sizes: ViTSizes) -> Rotary | None:
    d_head = sizes.transformer.d_head or sizes.transformer.d // sizes.transformer.heads
    match sizes.relative:
        case "rope":
            return Rotary.grid(d_head)
        case "rope_unit":
            return Rotary.unit_grid(d_head)
        case _:
            return None


def _relative(sizes: ViTSizes) -> Callable[[int], nn.Module] | None:
    heads = sizes.transformer.heads
    match sizes.relative:
        case "grid_bias":
            if sizes.registers:
                raise ConfigError("grid_bias knows no registers", remedy="set registers to 0, or use rope")
            return lambda _: GridBias(heads, *sizes.grid, class_token=sizes.class_token)
        case "alibi":
            return lambda _: LinearBias(heads)
        case _:
            return None
