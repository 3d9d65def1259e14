"""Folder ⇄ dual encoder: small trained heads, and by name and digest the frozen towers under them.

A folder holds ``config.json`` and ``model.safetensors`` (heads and scale) and ``plait.json``: format, composition
(which towers, with the digest of their weights and preprocessing) and media contract. The weights of frozen towers are
not copied: they are packages or folders on this machine, and loading refuses any whose digest is another. A picture
tower that learned lies in the folder: its weights with the heads', its spec in the composition.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from plait.assembly.local import load_weights
from plait.assembly.record import PLAIT, read_fields, read_record, write_record
from plait.assembly.scratch import SCRATCH, WEIGHTS, build_tower, contract_of, read_spec
from plait.assembly.towers import ImageTower, TextEncoder, load_image_tower, load_text_tower, raw_pictures
from plait.core.errors import CheckpointError
from plait.core.events import Events
from plait.core.files import write_json
from plait.core.tensors import Patches
from plait.models import specs
from plait.models.dual import DualEncoder, rows
from plait.models.heads import ProjectionHead

_CONFIG = "config.json"
_BATCH = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadSizes:
    """Sizes of both heads.

    Attributes:
        d_hidden: Width between a head's layers.
        d_shared: Width of the shared space.
        dropout: Share of hidden units dropped while training.
    """

    d_hidden: int
    d_shared: int
    dropout: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Dual:
    """A dual encoder with its towers: pictures and texts to unit vectors of one space.

    Attributes:
        model: Heads and scale, and the picture tower if it learns.
        image: Frozen picture tower; the pixels alone (:func:`~plait.assembly.towers.raw_pictures`) if it learns.
        text: Frozen text tower.
        sizes: Of the heads.

    Example:
        >>> dual = load_dual(run / "02-pretrain/checkpoints/000090")  # doctest: +SKIP
        >>> dual.embed_pictures([picture]) @ dual.embed_texts(["red apple", "bicycle"]).T  # doctest: +SKIP
        tensor([[0.61, 0.08]])
    """

    model: DualEncoder
    image: ImageTower
    text: TextEncoder
    sizes: HeadSizes

    @torch.inference_mode()
    def embed_pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Unit vectors, ``picture d``.

        Args:
            pictures: RGB.
        """
        done = [
            self.model.embed_image(self._encode(pictures[at : at + _BATCH])) for at in range(0, len(pictures), _BATCH)
        ]
        return torch.cat(done) if done else torch.zeros(0, self.sizes.d_shared)

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors, ``text d``.

        Raises:
            DataError: A text is longer than the text tower takes.
        """
        if not texts:
            return torch.zeros(0, self.sizes.d_shared)
        return self.model.embed_text(rows(self.text.encoder(texts).float().to(self.model.log_scale.device)))

    def _encode(self, pictures: Sequence[Image.Image]) -> Patches:
        raw = [self.image.prepare(picture) for picture in pictures]
        joined = Patches(values=torch.cat([r.values for r in raw]), grid=torch.cat([r.grid for r in raw]))
        found = self.image.encoder(joined)
        device = self.model.log_scale.device
        return Patches(values=found.values.float().to(device), grid=found.grid.to(device))


def build_dual(image: ImageTower | specs.ScratchImage, text: TextEncoder, sizes: HeadSizes, *, scale: float) -> Dual:
    """New heads on two towers, drawn from torch's generator.

    Args:
        image: Frozen picture tower; or the spec of one that learns, drawn before the heads.
        text: Text tower.
        sizes: Of the heads.
        scale: Where the factor on the cosine starts.

    Raises:
        ConfigError: The sizes of the spec do not fit together.
    """
    tower = None
    if not isinstance(image, ImageTower):
        tower, spec = build_tower(image), image
        image = raw_pictures(contract_of(spec, tower), spec)
    heads = [
        ProjectionHead(width, sizes.d_hidden, sizes.d_shared, dropout=sizes.dropout)
        for width in (_width(image, tower), text.encoder.d_out)
    ]
    model = DualEncoder(heads[0], heads[1], scale=scale, tower=tower)
    return Dual(model=model, image=image, text=text, sizes=sizes)


def save_dual(dual: Dual, folder: Path) -> None:
    """Write the three files into a folder that exists.

    Raises:
        OSError: The disk is full or not writable.
        safetensors.SafetensorError: Likewise.
    """
    config = {
        "architectures": ["DualEncoder"],
        "model_type": "plait-dual",
        "image_width": _width(dual.image, dual.model.tower),
        "text_width": dual.text.encoder.d_out,
        **asdict(dual.sizes),
    }
    composition = {
        "image": {**dual.image.settings, "key": dual.image.key},
        "text": {**dual.text.settings, "key": dual.text.key},
    }
    media = {"image": dual.image.contract.as_dict(), "text": {"max_tokens": dual.text.encoder.max_tokens}}
    weights = {name: value.detach().cpu().contiguous() for name, value in dual.model.state_dict().items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    write_json(folder / _CONFIG, config)
    write_record(folder, kind="dual", composition=composition, media=media)


def load_dual(folder: Path, *, events: Events | None = None) -> Dual:
    """Read what :func:`save_dual` wrote, in eval mode.

    Raises:
        CheckpointError: A file is missing, damaged, of a later format or of another kind; a tower is not the one that
            the heads were trained on.
        ResourceError: A tower's package is not fetched.
    """
    record, config = read_record(folder, kind="dual"), read_fields(folder / _CONFIG)
    try:
        settings = {side: dict(record["composition"][side]) for side in ("image", "text")}
        keys = {side: settings[side].pop("key") for side in settings}
        sizes = HeadSizes(**{name: config[name] for name in ("d_hidden", "d_shared", "dropout")})
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"a field is missing: {error}", place=str(folder / PLAIT), remedy="use an undamaged copy of the folder"
        ) from error
    image: ImageTower | specs.ScratchImage
    if SCRATCH in settings["image"]:
        image = read_spec(settings["image"][SCRATCH], folder=folder)
    else:
        image = load_image_tower(settings["image"].pop("name"), **settings["image"], events=events)
    text = load_text_tower(settings["text"].pop("name"), **settings["text"])
    dual = build_dual(image, text, sizes, scale=1.0)
    for side, tower in (("image", dual.image), ("text", text)):
        if tower.key != keys[side]:
            raise CheckpointError(
                f"the {side} tower {tower.settings.get('name', 'from scratch')!r} has digest {tower.key[:12]}, "
                f"the heads were trained on {keys[side][:12]}",
                place=str(folder / PLAIT),
                remedy="fetch the version of the tower that was used, or train the heads again",
            )
    load_weights(dual.model, folder / WEIGHTS)
    dual.model.eval()
    return dual


def _width(image: ImageTower, tower: nn.Module | None) -> int:
    """Of what the picture's head reads."""
    width = image.encoder.d_out if tower is None else tower.d_out
    assert isinstance(width, int)
    return width
