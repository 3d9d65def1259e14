"""Spec ⇄ tower from scratch with the preprocessing its own size asks for; and such a picture tower out of a checkpoint.

A frozen tower is a name and a digest. One that learned has its weights in the checkpoint's ``model.safetensors``, under
``tower.``, and its spec in ``plait.json``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError
from torch import nn

from plait.assembly.contract import ImageContract
from plait.assembly.local import digest, load_weights
from plait.assembly.record import PLAIT, read_fields, read_record
from plait.core.errors import CheckpointError
from plait.core.files import sha256_file
from plait.core.manifest import verify_model
from plait.models import specs, video_specs
from plait.models.build import build_encoder
from plait.models.towers.pixels import HALF

SCRATCH = "scratch"
"""Under which name ``plait.json`` keeps the spec of a tower that learned."""
WEIGHTS = "model.safetensors"
"""File of a checkpoint's weights."""

_PREFIX = "tower."
_KINDS = ("dual", "views")


def build_tower(spec: specs.ScratchImage) -> nn.Module:
    """A tower that learns, drawn from torch's generator.

    A classifier, which gives no features, is not trained.

    Raises:
        ConfigError: Its sizes do not fit together.
    """
    tower = build_encoder(spec)
    classifier = getattr(tower, "classifier", None)
    if isinstance(classifier, nn.Module):
        classifier.requires_grad_(False)
    return tower


def contract_of(spec: specs.ScratchImage | video_specs.SpaceTime, tower: nn.Module) -> ImageContract:
    """How pictures or frames become this tower's pixels: squares of its own size; it normalizes them itself.

    Args:
        spec: Of the tower.
        tower: Made of it.
    """
    normalize = getattr(tower, "normalize", None)
    if normalize is None:  # EfficientNet-Lite has its numbers in its code
        return ImageContract(size=spec.size, mean=HALF, std=HALF)
    mean, std = (tuple(round(x, 6) for x in values.flatten().tolist()) for values in (normalize.mean, normalize.std))
    return ImageContract(size=spec.size, mean=mean, std=std)


def read_spec(settings: Mapping[str, Any], *, folder: Path) -> specs.ScratchImage:
    """The spec of a tower that learned, as ``plait.json`` has it.

    Raises:
        CheckpointError: It describes no tower from scratch.
    """
    return read_part(specs.ScratchImage, settings, folder=folder, what="picture")


def read_part(kind: Any, settings: Mapping[str, Any], *, folder: Path, what: str) -> Any:
    """The spec of a tower that learned, of any modality.

    Args:
        kind: Union of the specs that it may be.
        settings: As ``plait.json`` has them.
        folder: Where that is.
        what: The tower reads, for errors.

    Raises:
        CheckpointError: They describe no such tower.
    """
    try:
        return TypeAdapter[Any](kind).validate_python(settings)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise CheckpointError(
            f"the {what} tower's spec, {'.'.join(map(str, first['loc'])) or 'kind'}: {first['msg']}",
            place=str(folder / PLAIT),
            remedy="use an undamaged copy of the folder, or the version of plait that wrote it",
        ) from error


class Learned(NamedTuple):
    """A tower out of a checkpoint, in eval mode and frozen."""

    tower: nn.Module
    contract: ImageContract
    key: str
    spec: Mapping[str, Any]


def holds_tower(folder: Path) -> bool:
    """Whether a folder is a checkpoint whose picture tower learned: a dual encoder's, or one of views."""
    if not (folder / PLAIT).is_file():
        return False
    record = read_fields(folder / PLAIT)
    return record.get("kind") in _KINDS and SCRATCH in record.get("composition", {}).get("image", {})


def load_learned(folder: Path) -> Learned:
    """The picture tower of such a checkpoint, without its heads.

    Raises:
        CheckpointError: A file is missing, damaged or of a later format.
    """
    verify_model(folder)
    kind = read_fields(folder / PLAIT).get("kind")
    record = read_record(folder, kind=str(kind) if kind in _KINDS else "dual")
    settings = record["composition"]["image"][SCRATCH]
    contract = ImageContract.from_dict(record["media"]["image"])
    tower = build_tower(read_spec(settings, folder=folder))
    load_weights(tower, folder / WEIGHTS, prefix=_PREFIX)
    key = digest({"weights": sha256_file(folder / WEIGHTS), "spec": settings, "contract": contract.as_dict()})
    return Learned(tower.eval().requires_grad_(False), contract, key, settings)
