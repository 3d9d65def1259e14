"""What transformers' picture models have in common and where they differ: how each is called, and what its tokens are.

======================================  ==========================================================================
patches, positions interpolated         CLIP, MetaCLIP 2, SigLIP, SigLIP 2 (fixed, NaFlex), ViT, DeiT, ViTMAE, ViT-MSN,
                                        I-JEPA, BEiT, data2vec, DINOv2 (with registers or without)
patches, any size                       DINOv3, Pixtral, MLCD, AIMv2 (native)
patches, one size                       AIMv2
cells of the last map, any size         ConvNeXt (V1, V2, DINOv3's), Swin (V1, V2), ResNet, RegNet
======================================  ==========================================================================

A model whose ``model_type`` is not in :data:`FAMILIES` is refused: where the class tokens are and how many pixels a
token spans cannot be told from a configuration alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from plait.core.errors import CheckpointError

Pixels = Float[Tensor, "b 3 h w"]
Call = Callable[[PreTrainedModel, Pixels], dict[str, Any]]
"""Arguments of a backbone's forward for normalized pictures of one size, both sides multiples of ``pad_to``."""

Sizes = Literal["any", "interpolated", "own"]
"""``any``: no positions, or positions computed for every size; ``interpolated``: positions were learned on one square
and are interpolated to others; ``own``: positions were learned on one square and there is no other size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How one backbone is called and what comes out.

    Attributes:
        d_out: Width of a token.
        cell: Pixels a side that a token spans.
        pad_to: Pictures are padded below and to the right to a multiple of this; 1 where the backbone pads by itself.
        sizes: Which pictures it takes.
        own: Pixels a side it was trained at; 0 if it does not say.
        call: Its arguments.
        leading: Class, distillation and register tokens, all of which come before the patches.
        num_layers: Layers that all work on one grid; 0 where the grid shrinks from stage to stage.
        batch_size: Pictures computed together at most.
    """

    d_out: int
    cell: int
    pad_to: int
    sizes: Sizes
    own: int
    call: Call
    leading: int = 0
    num_layers: int = 0
    batch_size: int = 16


def layout(backbone: PreTrainedModel) -> Layout:
    """The layout of a backbone.

    Raises:
        CheckpointError: Its family is not known, or its pictures, patches or positions are not square.
    """
    config = backbone.config
    if config.model_type not in FAMILIES:
        raise CheckpointError(
            f"the family {config.model_type!r} of {type(backbone).__name__} is not known",
            remedy=f"use a picture tower of one of: {', '.join(FAMILIES)}",
        )
    return FAMILIES[config.model_type](config)


# --- how they are called -------------------------------------------------------------------------------------------


def _pixels(backbone: PreTrainedModel, pixels: Pixels) -> dict[str, Any]:
    return {"pixel_values": pixels}


def _interpolated(backbone: PreTrainedModel, pixels: Pixels) -> dict[str, Any]:
    # At the size of training this changes nothing: transformers then takes the positions as they are.
    return {"pixel_values": pixels, "interpolate_pos_encoding": True}


def _unmasked(backbone: PreTrainedModel, pixels: Pixels) -> dict[str, Any]:
    """A masked autoencoder sorts patches by noise and keeps the first; rising noise without a mask moves none."""
    backbone.config.mask_ratio = 0.0
    patch = backbone.config.patch_size
    count = (pixels.shape[2] // patch) * (pixels.shape[3] // patch)
    noise = torch.arange(count, device=pixels.device, dtype=torch.float32).expand(len(pixels), count)
    return _interpolated(backbone, pixels) | {"noise": noise}


def _windows(backbone: PreTrainedModel, pixels: Pixels) -> dict[str, Any]:
    """Window and shift of every block for this size.

    transformers sets them as it goes and does not set them back, so that a picture's features would depend on the
    pictures before it; and it fails on maps smaller than a window. Here they are set before every call: a map of one
    window or less is not shifted, one that is smaller is padded to a window, as Swin pads at its borders.
    """
    config = backbone.config
    rows, columns = (-(-side // config.patch_size) for side in pixels.shape[2:])
    encoder: Any = backbone.encoder
    for stage in encoder.layers:
        for i, block in enumerate(stage.blocks):
            block.window_size = config.window_size
            block.shift_size = config.window_size // 2 if i % 2 and min(rows, columns) > config.window_size else 0
        rows, columns = -(-rows // 2), -(-columns // 2)
    return _interpolated(backbone, pixels) | {"always_partition": True}


def _cut(backbone: PreTrainedModel, pixels: Pixels) -> dict[str, Any]:
    """Patches cut out beforehand, with their mask and the shape of the grid: NaFlex of SigLIP 2 (arXiv 2502.14786)."""
    patch = backbone.config.patch_size
    b, c, h, w = pixels.shape
    rows, columns = h // patch, w // patch
    patches = pixels.view(b, c, rows, patch, columns, patch).permute(0, 2, 4, 3, 5, 1)
    return {
        "pixel_values": patches.reshape(b, rows * columns, -1),
        "pixel_attention_mask": torch.ones(b, rows * columns, dtype=torch.int64, device=pixels.device),
        "spatial_shapes": torch.tensor([[rows, columns]] * b, device=pixels.device),
    }


# --- the families --------------------------------------------------------------------------------------------------


def _patches(
    config: PreTrainedConfig,
    *,
    leading: int = 0,
    sizes: Sizes = "interpolated",
    call: Call = _interpolated,
    batch_size: int = 16,
) -> Layout:
    """A transformer on one grid of patches."""
    patch = _side(config, "patch_size")
    return Layout(
        d_out=config.hidden_size,
        cell=patch,
        pad_to=patch,
        sizes=sizes,
        own=_side(config, "image_size"),
        call=call,
        leading=leading,
        num_layers=config.num_hidden_layers,
        batch_size=batch_size,
    )


def _naflex(config: PreTrainedConfig) -> Layout:
    """Any number of patches in any shape; its positions are resized to it with antialiasing."""
    return Layout(
        d_out=config.hidden_size,
        cell=config.patch_size,
        pad_to=config.patch_size,
        sizes="interpolated",
        own=int(config.num_patches**0.5) * config.patch_size,
        call=_cut,
        num_layers=config.num_hidden_layers,
    )


def _aimv2(config: PreTrainedConfig) -> Layout:
    return _patches(config, sizes="any" if config.is_native else "own", call=_pixels)


def _beit(config: PreTrainedConfig) -> Layout:
    """Its positions are absolute, relative biases, or both; all are interpolated without being asked."""
    return _patches(config, leading=1, call=_pixels)


def _swin(config: PreTrainedConfig, *, call: Call) -> Layout:
    """Windows on a grid that is halved, rounded up, after every stage but the last."""
    patch = _side(config, "patch_size")
    growth = 2 ** (len(config.depths) - 1)
    return Layout(
        d_out=config.embed_dim * growth,
        cell=patch * growth,
        pad_to=patch,
        sizes="interpolated" if config.use_absolute_embeddings else "any",
        own=_side(config, "image_size"),
        call=call,
    )


def _convnext(config: PreTrainedConfig, *, stem: int, leading: int = 0) -> Layout:
    """Strides as wide as their kernels drop what does not fill one, so that pictures are padded to whole cells."""
    cell = stem * 2 ** (len(config.hidden_sizes) - 1)
    own = _side(config, "image_size")
    width = config.hidden_sizes[-1]
    return Layout(d_out=width, cell=cell, pad_to=cell, sizes="any", own=own, call=_pixels, leading=leading)


def _residual(config: PreTrainedConfig, *, stem: int) -> Layout:
    """Strides of 2 that pad by themselves and round up: ResNet and RegNet."""
    cell = stem * 2 ** (len(config.hidden_sizes) - (0 if config.downsample_in_first_stage else 1))
    return Layout(d_out=config.hidden_sizes[-1], cell=cell, pad_to=1, sizes="any", own=0, call=_pixels)


def _side(config: PreTrainedConfig, field: str) -> int:
    value = getattr(config, field, 0)
    sides = set(value) if isinstance(value, list | tuple) else {value}
    if len(sides) != 1 or not all(isinstance(side, int) for side in sides):
        raise CheckpointError(
            f"{field} is {value}, expected one number or a square",
            place=f"config.json: {field}",
            remedy="use a tower of square pictures and square patches",
        )
    return sides.pop()


FAMILIES: Mapping[str, Callable[[PreTrainedConfig], Layout]] = {
    "clip_vision_model": lambda config: _patches(config, leading=1),
    "metaclip_2_vision_model": lambda config: _patches(config, leading=1),
    "siglip_vision_model": _patches,
    "siglip2_vision_model": _naflex,
    "aimv2_vision_model": _aimv2,
    "mlcd_vision_model": lambda config: _patches(config, leading=1, sizes="any", call=_pixels),
    "pixtral": lambda config: _patches(config, sizes="any", call=_pixels, batch_size=1),
    "vit": lambda config: _patches(config, leading=1),
    "deit": lambda config: _patches(config, leading=2),
    "vit_mae": lambda config: _patches(config, leading=1, call=_unmasked),
    "vit_msn": lambda config: _patches(config, leading=1),
    "ijepa": _patches,
    "beit": _beit,
    "data2vec-vision": _beit,
    "dinov2": lambda config: _patches(config, leading=1, call=_pixels),
    "dinov2_with_registers": lambda config: _patches(config, leading=1 + config.num_register_tokens, call=_pixels),
    "dinov3_vit": lambda config: _patches(config, leading=1 + config.num_register_tokens, sizes="any", call=_pixels),
    "dinov3_convnext": lambda config: _convnext(config, stem=4, leading=1),
    "convnext": lambda config: _convnext(config, stem=config.patch_size),
    "convnextv2": lambda config: _convnext(config, stem=config.patch_size),
    "swin": lambda config: _swin(config, call=_windows),
    "swinv2": lambda config: _swin(config, call=_interpolated),
    "resnet": lambda config: _residual(config, stem=4),
    "regnet": lambda config: _residual(config, stem=2),
}
"""``model_type`` of a vision configuration to its layout."""

DUAL = ("clip", "metaclip_2", "siglip", "siglip2", "aimv2")
"""``model_type`` of folders that hold a text tower, too; their picture tower is ``vision_model``."""
