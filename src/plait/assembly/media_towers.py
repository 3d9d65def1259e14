"""What is the same for towers of pictures, sounds and videos: made of settings, known by a key, kept, found again.

A frozen tower is kept as its name and digest. One from scratch belongs to the model that uses it, which keeps its
weights; a video tower from scratch may hold a frozen picture tower, of which again only name and digest are kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor, nn

from plait.assembly.audio_towers import AudioTower, load_audio_tower, scratch_audio_tower
from plait.assembly.local import digest
from plait.assembly.record import PLAIT, same_key
from plait.assembly.resolution import slots_of
from plait.assembly.scratch import SCRATCH, read_part, read_spec
from plait.assembly.towers import ImageTower, load_image_tower, scratch_tower
from plait.assembly.video_towers import FRAMES, VideoTower, load_video_tower, scratch_video_tower
from plait.core.errors import CheckpointError, ConfigError
from plait.core.events import Events
from plait.core.tensors import Patches
from plait.core.types import MediaRef, Modality
from plait.data.media import decode_image
from plait.data.sounds import decode_sound
from plait.data.videos import open_video
from plait.models import audio_specs, specs, video_specs

Tower = ImageTower | AudioTower | VideoTower
"""What comes before a connector: an encoder with what prepares its media."""


def make_tower(spec: specs.Part, *, events: Events | None = None) -> Tower:
    """The tower that a spec describes; what is loaded is frozen, what is drawn from torch's generator may learn.

    Args:
        spec: Of an encoder of pictures, sounds or videos.
        events: Where a one-time conversion of a package is said.

    Raises:
        ConfigError: It is of no such encoder, its sizes do not fit together, or a folder is missing.
        ResourceError: A package is not fetched.
        CheckpointError: A folder holds no usable weights.
    """
    match spec:
        case specs.PretrainedImage():
            return load_image_tower(
                spec.name, size=spec.size, fit=spec.fit, layer=spec.layer, dtype=spec.dtype, events=events
            )
        case audio_specs.PretrainedAudio():
            return load_audio_tower(
                spec.name, layer=spec.layer, keep=spec.keep, window_s=spec.window_s, dtype=spec.dtype, events=events
            )
        case audio_specs.Whisper() | audio_specs.Wav2Vec2():
            return scratch_audio_tower(spec)
        case video_specs.PretrainedVideo():
            return load_video_tower(spec.name, dtype=spec.dtype, events=events)
        case video_specs.FramesThenTime() | video_specs.SpaceTime():
            return scratch_video_tower(spec, events=events)
        case specs.ViT() | specs.ResNet() | specs.EfficientNetLite() | specs.Swin() | specs.Hybrid() | specs.CoAtNet():
            return scratch_tower(spec)
        case _:
            raise ConfigError(
                f"{type(spec).__name__} is no encoder of pictures, sounds or videos", remedy="see `plait list encoders`"
            )


def kept(tower: Tower) -> dict[str, Tensor]:
    """Tensors of the encoder that the model keeps: none of a tower that is found by its name."""
    if tower.own is None:
        return {}
    assert isinstance(tower.encoder, nn.Module)
    inner = tower.frame_tower if isinstance(tower, VideoTower) else None
    lent = "tower." if inner is not None and inner.own is None else "\0"  # as FrameEncoder calls it
    return {name: value for name, value in tower.encoder.state_dict().items() if not name.startswith(lent)}


def tower_key(tower: Tower) -> str:
    """What tells a tower from all others: of one that belongs to a model, settings and weights as they are now."""
    if tower.own is None:
        return tower.key
    state = {name: value.detach().cpu().contiguous() for name, value in kept(tower).items()}
    settings = dict(tower.own)
    if FRAMES in settings:  # known by its key, wherever it lies
        settings[FRAMES] = settings[FRAMES]["key"]
        settings[SCRATCH] = {name: value for name, value in settings[SCRATCH].items() if name != "tower"}
    weights = hashlib.sha256(save(state)).hexdigest()
    return digest({"settings": settings, "weights": weights} | tower.preprocessing)


def record_of(tower: Tower) -> dict[str, Any]:
    """A tower as ``plait.json`` names it; the inverse of :func:`read_tower`."""
    return {**(tower.own or tower.settings), "key": tower_key(tower)}


def read_tower(modality: Modality, record: Mapping[str, Any], *, folder: Path, events: Events | None = None) -> Tower:
    """The tower that ``plait.json`` names; of one that belongs to the model, with weights to be read from the folder.

    Args:
        modality: What it reads.
        record: Of the tower.
        folder: Of the checkpoint, for errors.
        events: Where a one-time conversion of a package is said.

    Raises:
        CheckpointError: The record cannot be read, or the tower's digest is another.
        ConfigError: The tower is not there.
        ResourceError: Its package is not fetched.
    """
    settings = dict(record)
    key = str(settings.pop("key", ""))
    try:
        if SCRATCH in settings:
            return _scratch(modality, settings, key=key, folder=folder, events=events)
        load: Callable[..., Tower] = _LOADERS[modality]
        found = load(settings.pop("name"), **settings, events=events)
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"the {modality} tower's settings cannot be read: {error}",
            place=str(folder / PLAIT),
            remedy="use an undamaged copy of the folder",
        ) from error
    same_key(f"{modality} tower", found.key, key, folder=folder)
    return found


_LOADERS: Mapping[Modality, Callable[..., Tower]] = {
    "image": load_image_tower,
    "audio": load_audio_tower,
    "video": load_video_tower,
}


def _scratch(
    modality: Modality, settings: Mapping[str, Any], *, key: str, folder: Path, events: Events | None
) -> Tower:
    if modality == "image":
        return scratch_tower(read_spec(settings[SCRATCH], folder=folder), dtype=str(settings.get("dtype", "")), key=key)
    if modality == "audio":
        spec = read_part(audio_specs.ScratchAudio, settings[SCRATCH], folder=folder, what=modality)
        return scratch_audio_tower(spec, key=key)
    spec = read_part(video_specs.ScratchVideo, settings[SCRATCH], folder=folder, what=modality)
    inner = None
    if FRAMES in settings:
        inner = read_tower("image", settings[FRAMES], folder=folder, events=events)
        assert isinstance(inner, ImageTower)
    return scratch_video_tower(spec, frame_tower=inner, key=key, events=events)


def media_contract(tower: Tower) -> dict[str, Any]:
    """What media must be, or become, as ``plait.json`` keeps it."""
    match tower:
        case ImageTower():
            return tower.contract.as_dict()
        case AudioTower():
            return {"rate": tower.rate}
        case VideoTower():
            return tower.contract.as_dict() | {"sampling": asdict(tower.sampling)}


def slot_counter(tower: Tower, account: Callable[[Tensor], Tensor]) -> Callable[[MediaRef], int]:
    """How many placeholders stand for a medium, told before it is opened.

    Args:
        tower: That encodes it.
        account: From its features on, grid to grid.
    """
    if isinstance(tower, ImageTower):
        return cache(slots_of(tower.contract, tower.encoder.grid_out, account))
    measure = tower.grid

    @cache
    def count(ref: MediaRef) -> int:
        return int(account(measure(ref)).prod())

    return count


def read_media(tower: Tower, data: bytes, *, place: str) -> Patches:
    """Encoded bytes as the tower's encoder takes them.

    Args:
        tower: Of pictures, sounds or videos.
        data: Of one of these.
        place: Where they come from, for errors.

    Raises:
        DataError: They cannot be read, or are not what the tower takes; names the place.
    """
    match tower:
        case ImageTower():
            return tower.prepare(decode_image(data, place=place))
        case AudioTower():
            return tower.prepare(decode_sound(data, place=place))
        case VideoTower():
            return tower.prepare(open_video(data, place=place))
