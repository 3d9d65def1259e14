"""Folder ⇄ picture tower that learned from views, with its head.

A folder holds ``config.json``, ``model.safetensors`` (``tower.`` and ``head.``) and ``plait.json`` of kind ``views``:
the tower's spec and the media contract. Its tower serves as that of a dual encoder's checkpoint does
(:mod:`plait.assembly.scratch`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

import torch
from PIL import Image
from torch import Tensor

from plait.assembly.local import load_weights
from plait.assembly.record import PLAIT, read_fields, read_record, write_record
from plait.assembly.scratch import SCRATCH, WEIGHTS, build_tower, contract_of, read_spec
from plait.assembly.towers import ImageTower, raw_pictures
from plait.core.errors import CheckpointError, DataError
from plait.core.files import write_json
from plait.core.manifest import verify_model
from plait.core.snapshot import later, save_tensors
from plait.core.tensors import Patches
from plait.data.sounds import Sound
from plait.models import specs
from plait.models.heads import ProjectionHead
from plait.models.views import ViewEncoder

KIND = "views"
_CONFIG = "config.json"
_BATCH = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewSizes:
    """Sizes of the head.

    Attributes:
        d_hidden: Width between its layers.
        d_shared: Width of what is compared.
        layers: Linear layers.
        dropout: Share of hidden units dropped while training.
    """

    d_hidden: int
    d_shared: int
    layers: int = 2
    dropout: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewModel:
    """A picture tower that learned from views.

    Attributes:
        model: Tower and head.
        image: How pictures become its pixels.
        sizes: Of the head.

    Example:
        >>> found = load_views(run / "02-pretrain/checkpoints/000090")  # doctest: +SKIP
        >>> found.embed_pictures([picture, other]).shape  # doctest: +SKIP
        torch.Size([2, 192])
    """

    model: ViewEncoder
    image: ImageTower
    sizes: ViewSizes

    @property
    def d_out(self) -> int:
        """Width of the tower's features."""
        return width_of(self.model)

    @property
    def audio(self) -> None:
        """It does not hear."""
        return

    @torch.inference_mode()
    def embed_pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Unit vectors in front of the head, ``picture d``.

        Args:
            pictures: RGB.
        """
        device = next(self.model.parameters()).device
        done: list[Tensor] = []
        for at in range(0, len(pictures), _BATCH):
            raw = [self.image.prepare(picture) for picture in pictures[at : at + _BATCH]]
            values, grid = torch.cat([one.values for one in raw]), torch.cat([one.grid for one in raw])
            done.append(self.model.embed_image(Patches(values=values.to(device), grid=grid.to(device))))
        return torch.cat(done) if done else torch.zeros(0, self.d_out)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """None at all, ``0 d``.

        Raises:
            DataError: There is a text.
        """
        if texts:
            _pictures_alone("texts", place=texts[0][:60])
        return torch.zeros(0, self.d_out)

    def embed_sounds(self, sounds: Sequence[Sound]) -> Tensor:
        """None at all, ``0 d``.

        Raises:
            DataError: There is a sound.
        """
        if sounds:
            self.check_hears(place=sounds[0].place)
        return torch.zeros(0, self.d_out)

    def check_hears(self, *, place: str) -> NoReturn:
        """See that the model embeds sounds.

        Raises:
            DataError: It does not hear.
        """
        _pictures_alone("sounds", place=place)


def build_views(spec: specs.ScratchImage, sizes: ViewSizes) -> ViewModel:
    """A tower, and then its head, drawn from torch's generator.

    Args:
        spec: Of the tower.
        sizes: Of the head.

    Raises:
        ConfigError: The sizes of the spec do not fit together.
    """
    tower = build_tower(spec)
    width = tower.d_out
    assert isinstance(width, int)
    head = ProjectionHead(width, sizes.d_hidden, sizes.d_shared, dropout=sizes.dropout, depth=sizes.layers)
    return ViewModel(model=ViewEncoder(tower, head), image=raw_pictures(contract_of(spec, tower), spec), sizes=sizes)


def save_views(found: ViewModel, folder: Path) -> None:
    """Write the three files into a folder that exists.

    Raises:
        OSError: The disk is full or not writable.
        safetensors.SafetensorError: Likewise.
    """
    config = {
        "architectures": ["ViewEncoder"],
        "model_type": "plait-views",
        "image_width": found.d_out,
        **asdict(found.sizes),
    }
    composition = {"image": {**found.image.settings, "key": found.image.key}}
    media = {"image": found.image.contract.as_dict()}
    save_tensors(found.model.state_dict(), folder / WEIGHTS, metadata={"format": "pt"})
    later(lambda: write_json(folder / _CONFIG, config))
    later(lambda: write_record(folder, kind=KIND, composition=composition, media=media))


def holds_views(folder: Path) -> bool:
    """Whether a folder is such a checkpoint."""
    return (folder / PLAIT).is_file() and read_fields(folder / PLAIT).get("kind") == KIND


def load_views(folder: Path) -> ViewModel:
    """Read what :func:`save_views` wrote, in eval mode.

    Raises:
        CheckpointError: A file is missing, damaged, of a later format or of another kind, or pictures are prepared in
            another way now.
    """
    verify_model(folder)
    record, config = read_record(folder, kind=KIND), read_fields(folder / _CONFIG)
    try:
        settings, key = record["composition"]["image"][SCRATCH], record["composition"]["image"]["key"]
        sizes = ViewSizes(**{name: config[name] for name in ("d_hidden", "d_shared", "layers", "dropout")})
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"a field is missing: {error}", place=str(folder / PLAIT), remedy="use an undamaged copy of the folder"
        ) from error
    found = build_views(read_spec(settings, folder=folder), sizes)
    if found.image.key != key:
        raise CheckpointError(
            f"pictures are prepared by {found.image.key[:12]}, this tower learned on {str(key)[:12]}",
            place=str(folder / PLAIT),
            remedy="use the version of plait that wrote it, or train again",
        )
    load_weights(found.model, folder / WEIGHTS)
    found.model.eval()
    return found


def width_of(model: ViewEncoder) -> int:
    """Of the tower's features."""
    width = model.tower.d_out
    assert isinstance(width, int)
    return width


def _pictures_alone(what: str, *, place: str) -> NoReturn:
    raise DataError(
        f"this model embeds pictures alone, {what} came: it learned from views of pictures",
        place=place,
        remedy="train one on pairs, with stages.pretrain.objective contrastive, sigmoid or hard-contrastive"
        + (", and stages.pretrain.spoken" if what == "sounds" else ""),
    )
