"""How pictures become pixels: the media contract, and what a folder's preprocessing asks for.

Fields of that file are honored or refused one by one: a step that is not done here would give the tower pictures it was
not trained for.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from plait.assembly.fit import SQUARE, Fit, Item, fit_from_json, fit_to_json
from plait.assembly.local import IMAGE_TOWER
from plait.core.errors import CheckpointError, DataError
from plait.core.files import read_json
from plait.core.tensors import Patches

_RESAMPLE = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_RESAMPLE_NAMES: dict[int, Literal["bicubic", "bilinear"]] = {
    3: "bicubic",
    2: "bilinear",
}  # Pillow's numbers, as preprocessor_config.json holds them
_HONORED = frozenset(
    {"do_resize", "size", "resample", "do_center_crop", "crop_size", "crop_pct", "patch_size", "max_num_patches"}
    | {"do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"}
    | {"do_convert_rgb"}  # pictures are RGB before they come here
    | {"image_processor_type", "feature_extractor_type", "processor_class", "_valid_processor_keys"}
    | {"data_format", "input_data_format", "default_to_square"}
)
"""Fields of ``preprocessor_config.json`` that are seen to, or change no pixel."""

_WHITE = (255, 255, 255)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageContract:
    """How a picture becomes pixels; kept in ``plait.json``, so that serving does what training did.

    The whole picture is shown, and never cropped. By default it is scaled to fit a square, and the rest of the square
    is filled; ``fit`` says otherwise (:mod:`plait.assembly.fit`).

    Attributes:
        size: Pixels a side of the square, or of a tile; a picture at its own resolution does not depend on it.
        resample: Filter, antialiased when it shrinks.
        background: RGB of the filling, 0..255.
        mean: Subtracted from values in 0..1 by the tower itself.
        std: Divided by, by the tower itself.
        fit: Which items a picture becomes.

    Example:
        >>> from plait.assembly.fit import Tiles
        >>> ImageContract(size=336, fit=Tiles(max_tiles=9)).sizes(1000, 480)
        ((336, 336), (672, 1008))
    """

    size: int
    resample: Literal["bicubic", "bilinear"] = "bicubic"
    background: tuple[int, int, int] = _WHITE
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    fit: Fit = SQUARE

    def sizes(self, width: int, height: int) -> tuple[tuple[int, int], ...]:
        """Height and width of each item that a picture becomes: the account before any pixel is touched.

        Raises:
            DataError: A side has no pixel, or is not known.
        """
        return tuple((item.height, item.width) for item in self.fit.items(width, height, size=self.size))

    def prepare(self, picture: Image.Image) -> Patches:
        """RGB picture to the items of :meth:`sizes`, one row a pixel, values in 0..1, not yet normalized."""
        items = self.fit.items(*picture.size, size=self.size)
        shown = [self._scaled(picture, item) for item in items]
        pixels = [torch.from_numpy(np.array(item.convert("RGB"))).view(-1, 3) for item in shown]
        values = pixels[0] if len(pixels) == 1 else torch.cat(pixels)
        return Patches(
            values=values.float().div_(255), grid=torch.tensor([[1, item.height, item.width] for item in items])
        )

    def _scaled(self, picture: Image.Image, item: Item) -> Image.Image:
        """The picture as one item: fitted whole in the middle, or each side on its own."""
        scale = min(item.width / picture.width, item.height / picture.height)
        width, height = (max(1, round(side * scale)) for side in picture.size)
        if item.bent:
            width, height = item.width, item.height
        if picture.size != (width, height):
            picture = picture.resize((width, height), _RESAMPLE[self.resample])
        if (width, height) != (item.width, item.height):
            whole = Image.new("RGB", (item.width, item.height), self.background)
            whole.paste(picture, ((item.width - width) // 2, (item.height - height) // 2))
            picture = whole
        return picture

    def as_dict(self) -> dict[str, Any]:
        """Plain data for ``plait.json``; the inverse of :meth:`from_dict`.

        A square, which is what contracts were before there was a choice, is not written: digests of saved models hold.
        """
        fields = {name: getattr(self, name) for name in _PLAIN}
        found = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
        return found if self.fit == SQUARE else found | {"fit": fit_to_json(self.fit)}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> ImageContract:
        """Read a contract.

        Raises:
            CheckpointError: A field is missing or unknown.
        """
        if set(record) - {"fit"} != set(_PLAIN):
            raise CheckpointError(
                f"the media contract has the fields {sorted(record)}, expected {sorted(_PLAIN)} and perhaps 'fit'",
                place="plait.json",
                remedy="save the model again with this version of plait",
            )
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in record.items()}
        if "fit" in record:
            fields["fit"] = fit_from_json(record["fit"])
        return cls(**fields)


_PLAIN = tuple(field.name for field in dataclasses.fields(ImageContract) if field.name != "fit")


def read_contract(folder: Path, *, size: int, multiple: int, own: int, fixed: bool) -> tuple[ImageContract, str]:
    """What a folder's preprocessing asks for, refused unless it is what :class:`ImageContract` does.

    Args:
        folder: With a ``preprocessor_config.json``, or a ``processor_config.json`` of transformers 5.
        size: Pixels a side that are wanted; 0 takes what the file asks for.
        multiple: Sizes must be multiples of this.
        own: Pixels a side the tower was trained at; where the file says nothing, its size. 0 if that is not known.
        fixed: Whether there is no other size than ``own``.

    Returns:
        The contract, and what its own processor does to pictures that are not square; empty if it is not known.

    Raises:
        CheckpointError: The file is missing or damaged, or asks for something that is not done here.
    """
    path, settings = _settings(folder)
    asked = _asked(settings, own)
    for field, fine, wanted in _judged(settings, asked, multiple=multiple, own=own if fixed else 0):
        if not fine:
            came = json.dumps(settings[field]) if field in settings else "not there"
            raise CheckpointError(
                f"{field} is {came}, expected {wanted}",
                place=f"{path}: {field}",
                remedy=f"use {IMAGE_TOWER!r} or another folder: features would not be those this tower was trained for",
            )
    mean = _triple(settings["image_mean"])
    contract = ImageContract(
        size=size or asked.side,
        resample=_RESAMPLE_NAMES[settings["resample"]],
        background=mean_color(mean) if _padded(settings) else _WHITE,
        mean=mean,
        std=_triple(settings["image_std"]),
    )
    return contract, asked.otherwise


def mean_color(mean: tuple[float, float, float]) -> tuple[int, int, int]:
    """With what LLaVA's image processor fills a picture up to a square."""
    red, green, blue = (int(value * 255) for value in mean)
    return red, green, blue


def _padded(settings: Mapping[str, Any]) -> bool:
    """Whether pictures are filled up to a square and shown whole, as LLaVA's image processor may do."""
    kind = str(settings.get("image_processor_type"))
    return kind.startswith("LlavaImageProcessor") and settings.get("do_pad") is True


def _settings(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The file that says how pictures are prepared, and what it says."""
    path, joint = folder / "preprocessor_config.json", folder / "processor_config.json"
    nested = not path.is_file() and joint.is_file()
    path = joint if nested else path
    try:
        settings = read_json(path)
    except DataError as error:
        raise CheckpointError(error.cause, place=str(path), remedy="use an undamaged copy of the folder") from error
    if nested and isinstance(settings, dict):
        settings = settings.get("image_processor")
    if not isinstance(settings, dict):
        raise CheckpointError(
            "holds no image_processor" if nested else "not a JSON object",
            place=str(path),
            remedy="use an undamaged copy of the folder",
        )
    return path, settings


@dataclass(frozen=True, slots=True)
class _Asked:
    """The square a file asks for: the field that says so, its side (0: it is none), what befalls other shapes."""

    field: str
    side: int
    otherwise: str


def _asked(settings: Mapping[str, Any], own: int) -> _Asked:
    size = settings.get("size", own)
    padded = "fills them up to a square with their mean color before it scales them" if _padded(settings) else ""
    if settings.get("do_center_crop"):
        return _Asked("crop_size", _side(settings.get("crop_size", own)), padded or "cuts their edges off")
    if "max_num_patches" in settings:
        patches, patch = settings["max_num_patches"], _side(settings.get("patch_size"))
        side = math.isqrt(patches) * patch if isinstance(patches, int) and patches > 0 else 0
        return _Asked("max_num_patches", side, f"keeps their shape, in up to {patches} patches")
    side = _side(size)
    if "crop_pct" in settings:  # ConvNeXt's: pictures of 384 pixels or more are not cropped
        return _Asked("size", side, "cuts their edges off" if side < 384 else "bends them to a square")
    if isinstance(size, dict) and "longest_edge" in size:
        return _Asked("size", side, "keeps their shape")
    return _Asked(
        "size", side, padded or "bends them to a square" if isinstance(size, dict) and "height" in size else ""
    )


def _judged(settings: Mapping[str, Any], asked: _Asked, *, multiple: int, own: int) -> Iterator[tuple[str, bool, str]]:
    """Each field that matters, whether it is honored, and what it would have to be; ``own`` is the one size, or 0."""
    for field in ("do_resize", "do_rescale", "do_normalize"):
        yield field, settings.get(field, True) is True, "true"
    factor = settings.get("rescale_factor", 1 / 255)
    yield "rescale_factor", isinstance(factor, float) and math.isclose(factor, 1 / 255, rel_tol=1e-6), "1/255"
    if own:
        yield asked.field, asked.side == own, f"{own} pixels, the tower's image_size"
    else:
        fits = asked.side > 0 and asked.side % multiple == 0
        pixels = "pixels" if multiple == 1 else f"a multiple of {multiple} pixels"
        yield asked.field, fits, f"a square of {pixels} a side"
    if asked.field == "crop_size":
        sides = settings.get("size", asked.side)
        sides = sides.values() if isinstance(sides, dict) else [sides]
        yield "size", all(isinstance(side, int) and side >= asked.side for side in sides), f"{asked.side} or more"
    if "patch_size" in settings:
        yield "patch_size", _side(settings["patch_size"]) == multiple, f"{multiple} pixels, as the tower's"
    if "crop_pct" in settings:
        share = settings["crop_pct"]
        yield "crop_pct", isinstance(share, int | float) and 0 < share <= 1, "a share of 1"
    for field, least in (("image_mean", -math.inf), ("image_std", 0)):
        values = settings.get(field)
        listed = values if isinstance(values, list) else []
        fine = len(listed) == 3 and all(isinstance(value, int | float) and value > least for value in listed)
        yield field, fine, "three numbers" + (" above 0" if field == "image_std" else "")
    yield "resample", settings.get("resample") in tuple(_RESAMPLE_NAMES), "3 (bicubic) or 2 (bilinear)"
    for field, value in settings.items():
        yield (
            field,
            field in _HONORED or (field == "do_pad" and _padded(settings)) or value in (None, False),
            "nothing: this step is not known here",
        )


def _side(value: Any) -> int:
    """Pixels a side of a square, however it is written; 0 if it is none."""
    sides = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else [value]
    side = sides[0] if sides and all(other == sides[0] for other in sides) else 0
    return side if isinstance(side, int) and side > 0 else 0


def _triple(values: list[float]) -> tuple[float, float, float]:
    red, green, blue = map(float, values)
    return red, green, blue
