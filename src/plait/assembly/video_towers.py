"""Local Hugging Face folder of VideoMAE, or a spec, to a video tower of ours with its preprocessing and its frames."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from plait.assembly.contract import ImageContract, read_contract
from plait.assembly.local import digest, fingerprint, put_weights
from plait.assembly.scratch import SCRATCH, build_tower, contract_of
from plait.assembly.towers import ImageTower, load_image_tower
from plait.core.device import choose_dtype
from plait.core.errors import CheckpointError, ConfigError, DataError
from plait.core.events import Events
from plait.core.files import read_json
from plait.core.protocols import Encoder
from plait.core.tensors import Patches
from plait.core.types import MediaRef
from plait.data.frames import Sampling
from plait.data.videos import Video
from plait.models import specs, video_specs
from plait.models.build_media import build_video
from plait.models.hub import videomae
from plait.models.towers.video import SpaceTimeTransformer, VideoSizes

FRAMES = "frames"
"""Under which name ``plait.json`` keeps the loaded picture tower of a video tower that learned."""
_PREPROCESSING = 1
"""Raise when the code that makes pixels or features of towers changes what comes out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoTower:
    """A video encoder with its preprocessing.

    Attributes:
        encoder: Clips of raw pixels to features; an :class:`~plait.core.protocols.Encoder` and an ``nn.Module``.
        contract: How each frame becomes those pixels.
        sampling: Which frames of a video are looked at.
        settings: Arguments of :func:`load_video_tower` that give this tower again.
        key: Digest of weights, contract, settings and the version of our code: heads trained on one key need it again.
        own: Of a tower from scratch, what makes it again but for its weights, which the model that uses it keeps; None
            where it is found by its name.
        frame_tower: Of a tower from scratch, the loaded picture tower in it, if there is one.
    """

    encoder: Encoder
    contract: ImageContract
    sampling: Sampling
    settings: Mapping[str, Any]
    key: str
    own: Mapping[str, Any] | None = None
    frame_tower: ImageTower | None = None

    @property
    def frames(self) -> int:
        """How many are looked at, at most."""
        return self.sampling.frames

    @property
    def shape(self) -> tuple[int, int, int]:
        """Frames, rows and columns of a video that has as many frames as are looked at."""
        return self.frames, self.contract.size, self.contract.size

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What decides about prepared videos."""
        return {"contract": self.contract.as_dict(), "sampling": asdict(self.sampling), "code": _PREPROCESSING}

    @property
    def cache_key(self) -> str:
        """The key with the libraries whose versions change the last bits: features are shared only under this one."""
        versions = {name: metadata.version(name).split(".")[:2] for name in ("torch", "pillow")}
        with contextlib.suppress(metadata.PackageNotFoundError):  # without it there are no videos, only ready frames
            versions["av"] = metadata.version("av").split(".")[:2]
        return digest({"tower": self.key, "sampling": asdict(self.sampling), **versions})

    def prepare(self, video: Video) -> Patches:
        """The frames of a video that the tower looks at, as one clip of raw pixels.

        Raises:
            MediaError: One of them cannot be decoded.
        """
        return self.clip(video.frames(self.sampling.indices(video.total)))

    def grid(self, ref: MediaRef) -> torch.Tensor:
        """Grid of what the encoder makes of a video, told by its frames (``ref.length``) where they matter.

        Raises:
            DataError: They matter and are not known.
        """
        if self.sampling.policy != "uniform" and ref.length < 1:
            raise DataError(
                "the length of the video is not known, and how many frames are looked at depends on it",
                place=f"video {ref.sha256[:12]} ({ref.uri or 'no uri'})",
                remedy="let MediaRef say its length in frames (plait.data.videos.open_video counts them)",
            )
        _, rows, columns = self.shape
        return self.encoder.grid_out(torch.tensor([[self.sampling.count(ref.length), rows, columns]]))

    def clip(self, frames: Sequence[Image.Image]) -> Patches:
        """RGB frames to one clip of raw pixels, each frame by the contract.

        Raises:
            DataError: They are not as many as the tower takes.
        """
        fewer = self.sampling.policy != "uniform" and 0 < len(frames) < self.frames
        if len(frames) != self.frames and not fewer:
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
        sampling=Sampling(frames=sizes.grid[0] * sizes.tubelet),
        settings={"name": name, "dtype": kind},
        key=digest(made),
    )


def scratch_video_tower(
    spec: video_specs.ScratchVideo,
    *,
    frame_tower: ImageTower | None = None,
    key: str = "",
    events: Events | None = None,
) -> VideoTower:
    """A video tower that belongs to a model, drawn from torch's generator but for a pretrained tower of its frames.

    Args:
        spec: Of the tower.
        frame_tower: The loaded tower of its frames; None loads it where the spec names one.
        key: Of its weights, where they are known; else of its settings.
        events: Where the one-time conversion of weights is said.

    Raises:
        ConfigError: Its sizes do not fit together, or the tower of frames is not there.
        ResourceError: The package of that tower is not fetched, or damaged.
        CheckpointError: The folder of that tower holds no usable weights.
    """
    if isinstance(spec, video_specs.FramesThenTime):
        named = spec.tower
        if frame_tower is None and isinstance(named, specs.PretrainedImage):
            frame_tower = load_image_tower(
                named.name, size=named.size, layer=named.layer, dtype=named.dtype, events=events
            )
        inner: Any = build_tower(named) if frame_tower is None else frame_tower.encoder  # pyright: ignore[reportArgumentType]
        contract = contract_of(named, inner) if frame_tower is None else frame_tower.contract  # pyright: ignore[reportArgumentType]
        encoder: nn.Module = build_video(spec, tower=inner)
    else:
        encoder = build_video(spec)
        contract = contract_of(spec, encoder)
    assert isinstance(encoder, Encoder)
    settings: dict[str, Any] = {SCRATCH: spec.model_dump(mode="json")}
    if frame_tower is not None:
        settings[FRAMES] = {**(frame_tower.own or frame_tower.settings), "key": frame_tower.key}
    made = VideoTower(
        encoder=encoder,
        contract=contract,
        sampling=Sampling(policy=spec.sampling, frames=spec.frames, step=spec.step),
        settings=settings,
        key=key,
        own=settings,
        frame_tower=frame_tower,
    )
    return made if key else replace(made, key=digest({"settings": settings} | made.preprocessing))


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
