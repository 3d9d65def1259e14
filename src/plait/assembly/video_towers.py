"""Local Hugging Face folder of VideoMAE to frozen video tower of ours, with the preprocessing it was trained with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

from plait.assembly.contract import ImageContract, read_contract
from plait.assembly.local import digest, fingerprint, put_weights
from plait.core.device import choose_dtype
from plait.core.errors import CheckpointError, ConfigError, DataError
from plait.core.events import Events
from plait.core.files import read_json
from plait.core.tensors import Patches
from plait.models.hub import videomae
from plait.models.towers.video import SpaceTimeTransformer, VideoSizes

_PREPROCESSING = 1
"""Raise when the code that makes pixels or features of towers changes what comes out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoTower:
    """A frozen video encoder with its preprocessing.

    Attributes:
        encoder: Clips of raw pixels to features; an :class:`~plait.core.protocols.Encoder` and an ``nn.Module``.
        contract: How each frame becomes those pixels.
        frames: Frames of a clip; :mod:`plait.data.frames` chooses them.
        settings: Arguments of :func:`load_video_tower` that give this tower again.
        key: Digest of weights, contract, settings and the version of our code: heads trained on one key need it again.
    """

    encoder: SpaceTimeTransformer
    contract: ImageContract
    frames: int
    settings: Mapping[str, Any]
    key: str

    @property
    def cache_key(self) -> str:
        """The key with the libraries whose versions change the last bits: features are shared only under this one."""
        versions = {name: metadata.version(name).split(".")[:2] for name in ("torch", "pillow")}
        return digest({"tower": self.key, **versions})

    def prepare(self, frames: Sequence[Image.Image]) -> Patches:
        """RGB frames to one clip of raw pixels, each frame by the contract.

        Raises:
            DataError: They are not as many as the tower takes.
        """
        if len(frames) != self.frames:
            raise DataError(
                f"{len(frames)} frames came, this tower takes {self.frames}",
                place="video frames",
                remedy="choose them with plait.data.frames, which gives any number of any video",
            )
        values = torch.cat([self.contract.prepare(frame).values for frame in frames])
        size = self.contract.size
        return Patches(values=values, grid=torch.tensor([[len(frames), size, size]]))


def load_video_tower(name: str, *, dtype: str = "auto", events: Events | None = None) -> VideoTower:
    """Load a frozen VideoMAE, in our own code, which gives what transformers gives.

    Args:
        name: A local Hugging Face folder; a classifier or a decoder of pretraining in it is left out, which an event
            says.
        dtype: ``auto`` (:func:`plait.core.device.choose_dtype`), ``bfloat16`` or ``float32``.
        events: Where to say so.

    Raises:
        ConfigError: No such folder.
        CheckpointError: It holds another model, asks for preprocessing that is not done here, or its weights do not
            fit.
    """
    folder, events = Path(name), events or Events()
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"{name!r} is no folder with a config.json",
            place="video tower",
            remedy="give a local folder in Hugging Face's form",
        )
    kind = choose_dtype("cpu", dtype)[0]
    weights = fingerprint(folder)
    sizes = _sizes(folder)
    side = sizes.grid[1] * sizes.patch
    contract, otherwise = read_contract(folder, size=side, multiple=sizes.patch, own=side, fixed=True)
    if otherwise:
        events.note(
            f"{name}: for frames that are not square its own preprocessing {otherwise}; here they are fitted whole",
            place=str(folder),
        )
    encoder = _encoder(folder, replace(sizes, mean=contract.mean, std=contract.std), events)
    made = {"weights": weights, "dtype": kind, "contract": contract.as_dict(), "code": _PREPROCESSING}
    return VideoTower(
        encoder=encoder.to(getattr(torch, kind)).eval().requires_grad_(False),
        contract=contract,
        frames=sizes.grid[0] * sizes.tubelet,
        settings={"name": name, "dtype": kind},
        key=digest(made),
    )


def _sizes(folder: Path) -> VideoSizes:
    path = folder / "config.json"
    try:
        config: Any = read_json(path)
        return videomae.sizes_from(config)
    except (DataError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"no configuration of VideoMAE: {error}",
            place=str(path),
            remedy="use an undamaged copy of a VideoMAE folder",
        ) from error


def _encoder(folder: Path, sizes: VideoSizes, events: Events) -> SpaceTimeTransformer:
    """The tower without a classifier: of what fine-tuning leaves, tokens before pooling."""
    path = folder / "model.safetensors"
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"weights cannot be read: {error}",
            place=str(path),
            remedy="use an undamaged copy with its weights in one model.safetensors",
        ) from error
    given, decoder = videomae.split(state)
    body = {key: value for key, value in given.items() if not key.startswith(("classifier.", "fc_norm."))}
    left = len(state) - len(body)
    if left:
        events.note(
            f"{left} tensors of a classifier or of pretraining's decoder ({len(decoder)}) are left out", place=str(path)
        )
    sizes = replace(sizes, num_classes=0, norm="none" if sizes.norm == "pooled" else sizes.norm)
    tower = SpaceTimeTransformer(sizes)
    put_weights(tower, videomae.to_ours(body, place=str(path)), path)
    return tower
