"""Local Hugging Face folder to frozen audio tower, with the feature extractor it was trained with."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError

from plait.assembly.local import digest, fingerprint, quiet, unreported
from plait.core.device import choose_dtype
from plait.core.errors import CheckpointError, ConfigError, DataError
from plait.core.files import read_json
from plait.models.towers.pretrained_audio import FAMILIES, PARTS, PretrainedAudio

_PREPROCESSING = 1
"""Raise when the code that makes features of towers changes what comes out."""
_ONLY_TRAINING = ("masked_spec_embed",)
"""Weights that features do without: the vector of masked frames."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AudioTower:
    """A frozen audio encoder.

    Attributes:
        encoder: Mono samples to features; an :class:`~plait.core.protocols.Encoder` and an ``nn.Module``.
        rate: Samples a second that it takes; resampling is the caller's.
        settings: Arguments of :func:`load_audio_tower` that give this tower again.
        key: Digest of weights, preprocessing, settings and the version of our code: heads trained on one key need it
            again.
    """

    encoder: PretrainedAudio
    rate: int
    settings: Mapping[str, Any]
    key: str

    @property
    def cache_key(self) -> str:
        """The key with the libraries whose versions change the last bits: features are shared only under this one."""
        versions = {name: metadata.version(name).split(".")[:2] for name in ("torch", "numpy", "transformers")}
        return digest({"tower": self.key, **versions})


def load_audio_tower(
    name: str, *, layer: int = -1, keep: Literal["real", "all"] = "real", dtype: str = "auto"
) -> AudioTower:
    """Load a frozen audio tower.

    Args:
        name: A local Hugging Face folder of a family in :data:`~plait.models.towers.pretrained_audio.FAMILIES`; of
            Whisper the encoder is taken, of CLAP the audio tower.
        layer: Which hidden layer is taken, counted from the end.
        keep: Whether tokens of the silence that short sounds are filled up with are left out.
        dtype: ``auto`` (:func:`plait.core.device.choose_dtype`), ``bfloat16`` or ``float32``.

    Raises:
        ConfigError: No such folder, or a layer it has not.
        CheckpointError: Its family is not known, its files cannot be read or do not belong together, or weights are
            missing: transformers would draw those at random.
    """
    folder = Path(name)
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"{name!r} is no folder with a config.json",
            place="audio tower",
            remedy="give a local folder in Hugging Face's form",
        )
    kind = choose_dtype("cpu", dtype)[0]
    part = _part(folder)
    weights = fingerprint(folder)
    backbone = _backbone(folder, kind, part=part)
    encoder = PretrainedAudio(backbone, _extractor(folder), layer=layer, keep=keep)
    settings = {"name": name, "layer": layer, "keep": keep, "dtype": kind}
    made = {"weights": weights, "layer": layer, "keep": keep, "dtype": kind, "code": _PREPROCESSING}
    return AudioTower(
        encoder=encoder.eval().requires_grad_(False), rate=encoder.rate, settings=settings, key=digest(made)
    )


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

    with _readable(folder), quiet(), unreported():
        model, report = AutoModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=dtype, output_loading_info=True
        )
    inside = f"{part}." if part and hasattr(model, part) else ""
    missing = sorted(key.removeprefix(inside) for key in report["missing_keys"] if key.startswith(inside))
    missing = [key for key in missing if key not in _ONLY_TRAINING]
    if missing or report["mismatched_keys"]:
        wrong = missing or sorted(str(key) for key in report["mismatched_keys"])
        raise CheckpointError(
            f"{len(wrong)} weights are missing or of another shape, such as {wrong[0]}",
            place=str(folder),
            remedy="use an undamaged copy of the folder: config.json and weights must come from one checkpoint",
        )
    return getattr(model, part) if inside else model


def _extractor(folder: Path) -> Any:
    from transformers import AutoFeatureExtractor

    with _readable(folder), warnings.catch_warnings():
        # The published extractor of AST has a filter narrower than its frequencies are apart, and was trained so.
        warnings.filterwarnings("ignore", message="At least one mel filter has all zero values")
        return AutoFeatureExtractor.from_pretrained(folder, local_files_only=True)


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except (ImportError, KeyError, OSError, RuntimeError, SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"no audio tower can be read: {error}",
            place=str(folder),
            remedy="give a folder that transformers' AutoModel and AutoFeatureExtractor load, weights in safetensors",
        ) from error
