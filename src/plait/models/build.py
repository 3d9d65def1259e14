"""Specs to modules: encoders from scratch, and connectors between two widths."""

from dataclasses import replace

from torch import Tensor, nn

from plait.core.errors import ConfigError
from plait.models import specs
from plait.models.connectors.projection import Chain, Linear, Mlp, PixelShuffle, Split, Unchanged
from plait.models.connectors.query import PerceiverResampler, QFormer, QFormerSizes, ResamplerSizes
from plait.models.connectors.words import ToWords
from plait.models.crossattend import GatedCrossAttention
from plait.models.position.absolute import SinCosGrid
from plait.models.position.relative import GridBias
from plait.models.position.rotary import Rotary
from plait.models.towers.convnet import EfficientNetLite
from plait.models.towers.hybrid import (
    CoAtNetSizes,
    HybridTower,
    OnCells,
    attention_stage,
    coatnet,
    early_convolutions,
)
from plait.models.towers.resnet import RESNET_18, RESNET_34, RESNET_50, RESNET_101, RESNET_152, ResNet
from plait.models.towers.swin import Swin, SwinSizes
from plait.models.towers.vit import VisionTransformer, ViTSizes
from plait.models.transformer import Transformer, TransformerSizes

_RESNETS = {18: RESNET_18, 34: RESNET_34, 50: RESNET_50, 101: RESNET_101, 152: RESNET_152}


def build_encoder(spec: specs.Part) -> nn.Module:
    """An encoder from scratch, its weights drawn from torch's generator.

    Raises:
        ConfigError: The spec is of a pretrained tower, which :mod:`plait.assembly.towers` loads; or its sizes do not
            fit together.
    """
    match spec:
        case specs.ViT():
            return VisionTransformer(_vit(spec))
        case specs.ResNet():
            sizes = _RESNETS[spec.depth]
            widths = tuple(d * spec.width // 64 for d in sizes.widths)
            return ResNet(replace(sizes, widths=widths, d_stem=spec.width))
        case specs.EfficientNetLite():
            return EfficientNetLite(batch_size=0)
        case specs.Swin():
            shape = {name: getattr(spec, name) for name in ("d", "depths", "heads", "window", "patch", "drop_path")}
            return Swin(SwinSizes(**shape))
        case specs.Hybrid():
            return _hybrid(spec)
        case specs.CoAtNet():
            sizes = CoAtNetSizes(
                widths=spec.widths,
                depths=spec.depths,
                attention=spec.attention,
                d_head=spec.d_head,
                picture=spec.size,
            )
            return coatnet(sizes)
        case _:
            raise ConfigError(
                f"{type(spec).__name__} is not built from scratch", remedy="load it with load_image_tower"
            )


def build_connector(
    spec: specs.Part, *, d_in: int, d_out: int, words: tuple[Tensor, Tensor] | None = None
) -> nn.Module:
    """A connector between a tower of width ``d_in`` and a decoder of width ``d_out``.

    For gated cross-attention it is what prepares the tower's tokens, of width ``d_in``; its layers are made by
    :func:`build_reading`.

    Args:
        spec: Which one.
        d_in: Width of what it takes.
        d_out: Width of what it gives.
        words: For :class:`~plait.models.specs.Words`: embeddings of the words that are mixed, ``word d``, and how the
            decoder's embeddings spread (:func:`~plait.models.connectors.words.shape_of`), ``d d``.

    Raises:
        ConfigError: No connector is described so, or heads do not divide the width.
    """
    match spec:
        case specs.Linear():
            shuffle = PixelShuffle(d_in, spec.shuffle)
            return Chain(shuffle, Linear(shuffle.d_out, d_out)) if spec.shuffle > 1 else Linear(d_in, d_out)
        case specs.Mlp():
            shuffle = PixelShuffle(d_in, spec.shuffle)
            mlp = Mlp(shuffle.d_out, spec.d_hidden or d_out, d_out, dropout=spec.dropout, norm=spec.norm)
            return Chain(shuffle, mlp) if spec.shuffle > 1 else mlp
        case specs.Words():
            assert words is not None
            shuffle = PixelShuffle(d_in, spec.shuffle)
            wide = d_out * spec.tokens
            mlp = Mlp(shuffle.d_out, spec.d_hidden, wide, dropout=spec.dropout)
            onto = ToWords(words[0].float(), words[1], count=spec.tokens, free=spec.free)
            return Chain(shuffle, mlp, Split(wide, spec.tokens), onto)
        case specs.QFormer():
            shape = {name: getattr(spec, name) for name in ("d", "depth", "heads", "queries", "every", "dropout")}
            return QFormer(QFormerSizes(d_source=d_in, **shape), d_out=d_out)
        case specs.Resampler():
            return _resampler(spec, d_in, d_out=d_out)
        case specs.GatedCrossAttention():
            return Unchanged(d_in) if spec.resampler is None else _resampler(spec.resampler, d_in, d_out=0)
        case _:
            raise ConfigError(f"{type(spec).__name__} is no connector", remedy="see `plait list connectors`")


def build_reading(
    spec: specs.GatedCrossAttention, *, d_in: int, d: int, layers: int
) -> list[GatedCrossAttention | None]:
    """Gated cross-attentions for a decoder: one entry a layer, None where nothing reads.

    Args:
        spec: How often, and with how many heads.
        d_in: Width of what is read.
        d: Width of the decoder.
        layers: Of the decoder.
    """
    sizes = TransformerSizes(d=d, depth=1, heads=spec.heads, d_source=d_in)
    return [GatedCrossAttention(sizes) if i % spec.every == 0 else None for i in range(layers)]


def _vit(spec: specs.ViT) -> ViTSizes:
    side = -(-spec.size // spec.patch)
    return ViTSizes(
        transformer=TransformerSizes(
            d=spec.d,
            depth=spec.depth,
            heads=spec.heads,
            d_ff=spec.d_ff,
            norm=spec.norm,
            norm_place=spec.norm_place,
            dropout=spec.dropout,
            drop_path=spec.drop_path,
        ),
        patch=spec.patch,
        grid=(side, side),
        position=spec.position,
        relative=spec.relative,
        class_token=spec.class_token,
        registers=spec.registers,
        pool="class" if spec.class_token else "mean",
        patch_dropout=spec.patch_dropout,
    )


def _hybrid(spec: specs.Hybrid) -> HybridTower:
    side = -(-spec.size // 2 ** len(spec.widths))
    sizes = TransformerSizes(d=spec.d, depth=spec.depth, heads=spec.heads)
    relative = (lambda _: GridBias(spec.heads, side, side)) if spec.relative == "grid_bias" else None
    rotary = Rotary.grid(spec.d // spec.heads) if spec.relative == "rope" else None
    cells = OnCells(Transformer(sizes, relative=relative), absolute=SinCosGrid(spec.d), rotary=rotary)
    return HybridTower([early_convolutions(spec.widths, spec.d), attention_stage(cells)])


def _resampler(spec: specs.Resampler, d_in: int, *, d_out: int) -> PerceiverResampler:
    sizes = ResamplerSizes(d=d_in, queries=spec.queries, depth=spec.depth, heads=spec.heads)
    return PerceiverResampler(sizes, d_out=d_out)
