"""Package or local Hugging Face folder to frozen audio tower, with its feature extractor; specs to one that learns."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch

from plait.assembly.hf_folder import load_folder, reading
from plait.assembly.local import WHISPER, digest, fingerprint
from plait.assembly.scratch import SCRATCH
from plait.assembly.whisper_tiny import whisper_folder
from plait.core.device import choose_dtype
from plait.core.errors import CheckpointError, ConfigError, DataError
from plait.core.events import Events
from plait.core.files import read_json
from plait.core.protocols import Encoder
from plait.core.tensors import Patches
from plait.core.types import MediaRef
from plait.data.sounds import Sound
from plait.models import audio_specs
from plait.models.build_media import build_audio
from plait.models.towers.mel import SAMPLE_RATE
from plait.models.towers.pretrained_audio import FAMILIES, PARTS, PretrainedAudio, shortened
from plait.models.towers.wav2vec import Wav2Vec

_PREPROCESSING = 1
"""Raise when the code that makes features of towers changes what comes out."""
_ONLY_TRAINING = ("masked_spec_embed",)
"""Weights that features do without: the vector of masked frames."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AudioTower:
    """An audio encoder with what it asks of sounds.

    Attributes:
        encoder: Mono samples to features; an :class:`~plait.core.protocols.Encoder` and an ``nn.Module``.
        rate: Samples a second that it takes; resampling is the caller's.
        settings: Arguments of :func:`load_audio_tower` that give this tower again.
        key: Digest of weights, preprocessing, settings and the version of our code: heads trained on one key need it
            again.
        own: Of a tower from scratch, what makes it again but for its weights, which the model that uses it keeps; None
            where it is found by its name.
    """

    encoder: Encoder
    rate: int
    settings: Mapping[str, Any]
    key: str
    own: Mapping[str, Any] | None = None

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What decides about prepared sounds."""
        return {"rate": self.rate, "code": _PREPROCESSING}

    @property
    def cache_key(self) -> str:
        """The key with the libraries whose versions change the last bits: features are shared only under this one."""
        versions = {name: metadata.version(name).split(".")[:2] for name in ("torch", "numpy", "transformers")}
        return digest({"tower": self.key, **versions})

    def prepare(self, sound: Sound) -> Patches:
        """Samples as the encoder takes them.

        Raises:
            DataError: They are at another rate than the tower's, or too few or too many for it; names the sound.
        """
        if sound.rate != self.rate:
            raise DataError(
                f"the sound has {sound.rate:,} samples a second, the tower takes {self.rate:,}",
                place=sound.place or str(self.settings.get("name", "audio tower")),
                remedy=f"resample it to {self.rate:,}, such as by `ffmpeg -i IN -ac 1 -ar {self.rate} OUT.wav`",
            )
        self._grid(len(sound.samples), place=sound.place)
        return Patches(values=torch.from_numpy(sound.samples)[:, None], grid=torch.tensor([[1, 1, len(sound.samples)]]))

    def grid(self, ref: MediaRef) -> torch.Tensor:
        """Grid of what the encoder makes of a sound, told by its length (``ref.length``, at the tower's rate).

        Raises:
            DataError: That is not known, or too little or too much for the tower.
        """
        place = f"sound {ref.sha256[:12]} ({ref.uri or 'no uri'})"
        if ref.length < 1:
            raise DataError(
                "the length of the sound is not known, and how many tokens it becomes depends on it",
                place=place,
                remedy="let MediaRef say its length in samples, as the data stage does",
            )
        return self._grid(ref.length, place=place)

    def tokens(self, ref: MediaRef) -> int:
        """How many tokens the encoder makes of a sound.

        Raises:
            DataError: As :meth:`grid`.
        """
        return int(self.grid(ref).prod())

    def _grid(self, samples: int, *, place: str) -> torch.Tensor:
        try:
            return self.encoder.grid_out(torch.tensor([[1, 1, samples]]))
        except DataError as error:
            raise DataError(error.cause, place=place or error.place, remedy=error.remedy) from error


def load_audio_tower(
    name: str,
    *,
    layer: int = -1,
    keep: Literal["real", "all"] = "real",
    window_s: float = 0.0,
    dtype: str = "auto",
    events: Events | None = None,
) -> AudioTower:
    """Load a frozen audio tower.

    Args:
        name: ``whisper-tiny-en``, or a local Hugging Face folder of a family in
            :data:`~plait.models.towers.pretrained_audio.FAMILIES`; of Whisper the encoder is taken, of CLAP the audio
            tower.
        layer: Which hidden layer is taken, counted from the end.
        keep: Whether tokens of the silence that short sounds are filled up with are left out.
        window_s: Of Whisper: how long a window it hears, in seconds. 0 is the 30 s that it was trained on, silence
            included; less takes less time and gives other features (:func:`.pretrained_audio.shortened`).
        dtype: ``auto`` (:func:`plait.core.device.choose_dtype`), ``bfloat16`` or ``float32``.
        events: Where the one-time conversion of weights is said.

    Raises:
        ConfigError: No such tower, or a layer or window it has not.
        ResourceError: Its package is not fetched, or damaged.
        CheckpointError: Its family is not known, its files cannot be read or do not belong together, or weights are
            missing: transformers would draw those at random.
    """
    folder = _folder(name, events or Events())
    kind = choose_dtype("cpu", dtype)[0]
    part = _part(folder)
    weights = fingerprint(folder)
    backbone, extractor = _backbone(folder, kind, part=part), _extractor(folder)
    if window_s:
        backbone, extractor = shortened(backbone, extractor, window_s)
    encoder = PretrainedAudio(backbone, extractor, layer=layer, keep=keep)
    # A setting that changes nothing is no part of the key: saved models know their towers by it.
    settings = {"name": name, "layer": layer, "keep": keep, "dtype": kind} | (
        {"window_s": window_s} if window_s else {}
    )
    made = settings | {"weights": weights, "code": _PREPROCESSING}
    del made["name"]
    return AudioTower(
        encoder=encoder.eval().requires_grad_(False), rate=encoder.rate, settings=settings, key=digest(made)
    )


def scratch_audio_tower(spec: audio_specs.ScratchAudio, *, key: str = "") -> AudioTower:
    """An audio tower that belongs to a model, drawn from torch's generator; an output layer for CTC does not learn.

    Args:
        spec: Of the tower.
        key: Of its weights, where they are known; else of its settings.

    Raises:
        ConfigError: Its sizes do not fit together.
    """
    encoder = build_audio(spec)
    if isinstance(encoder, Wav2Vec):
        for unused in (encoder.head, encoder.mask_token):
            if unused is not None:
                unused.requires_grad_(False)
    settings = {SCRATCH: spec.model_dump(mode="json")}
    made = AudioTower(encoder=encoder, rate=SAMPLE_RATE, settings=settings, key=key, own=settings)
    return made if key else replace(made, key=digest({"settings": settings} | made.preprocessing))


def _folder(name: str, events: Events) -> Path:
    if name == WHISPER:
        return whisper_folder(events=events)
    if not (Path(name) / "config.json").is_file():
        raise ConfigError(
            f"{name!r} is no folder with a config.json",
            place="audio tower",
            remedy=f"use {WHISPER!r}, or a local folder in Hugging Face's form",
        )
    return Path(name)


def _part(folder: Path) -> str:
    """Which part of the folder's model is the tower; refuses by the configuration alone, before weights are read."""
    path = folder / "config.json"
    try:
        config: Any = read_json(path)
    except DataError as error:
        raise CheckpointError(error.cause, place=str(path), remedy="use an undamaged copy of the folder") from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in FAMILIES and kind not in PARTS:
        raise CheckpointError(
            f"model_type is {kind!r}, which is no audio tower that is known here",
            place=f"{path}: model_type",
            remedy=f"use a folder of one of: {', '.join(sorted({*PARTS, *FAMILIES}))}",
        )
    return PARTS.get(str(kind), "")


def _backbone(folder: Path, dtype: str, *, part: str) -> Any:
    from transformers import AutoModel

    loaded = load_folder(AutoModel, folder, dtype=dtype, what="audio tower")
    inside = loaded.part([part]) if part else ""
    loaded.check(inside=inside, needed=lambda name: name not in _ONLY_TRAINING)
    return getattr(loaded.model, inside[:-1]) if inside else loaded.model


def _extractor(folder: Path) -> Any:
    from transformers import AutoFeatureExtractor

    with reading(folder, "feature extractor", "AutoFeatureExtractor loads"), warnings.catch_warnings():
        # The published extractor of AST has a filter narrower than its frequencies are apart, and was trained so.
        warnings.filterwarnings("ignore", message="At least one mel filter has all zero values")
        return AutoFeatureExtractor.from_pretrained(folder, local_files_only=True)
