"""Folder ⇄ dual encoder: small trained heads, and by name and digest the frozen towers under them.

It may hear: a third head on a frozen audio tower puts sounds into the same space.

A folder holds ``config.json`` and ``model.safetensors`` (heads and scale) and ``plait.json``: format, composition
(which towers, with the digest of their weights and preprocessing) and media contract. The weights of frozen towers are
not copied: they are packages or folders on this machine, and loading refuses any whose digest is another. A tower that
learned lies in the folder: its weights with the heads', its spec in the composition, a text tower's vocabulary in
``tokenizer.json``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from plait.assembly.audio_towers import AudioTower, load_audio_tower
from plait.assembly.local import load_weights
from plait.assembly.record import PLAIT, read_fields, read_record, write_record
from plait.assembly.scratch import SCRATCH, WEIGHTS, build_tower, contract_of, read_part, read_spec
from plait.assembly.text_scratch import TOKENIZER, RawTokens, build_text_tower, read_words
from plait.assembly.towers import ImageTower, TextEncoder, load_image_tower, load_text_tower, raw_pictures, raw_texts
from plait.core.errors import CheckpointError, DataError
from plait.core.events import Events
from plait.core.files import write_atomic, write_json
from plait.core.manifest import verify_model
from plait.core.snapshot import later, save_tensors
from plait.core.tensors import Patches
from plait.data.sounds import Sound
from plait.models import specs
from plait.models.dual import DualEncoder, rows
from plait.models.heads import ProjectionHead
from plait.models.text_specs import ScratchTextTower

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
        text: Frozen text tower; the vocabulary alone if it learns.
        sizes: Of the heads.
        audio: Frozen audio tower, if it hears.

    Example:
        >>> dual = load_dual(run / "02-pretrain/checkpoints/000090")  # doctest: +SKIP
        >>> dual.embed_pictures([picture]) @ dual.embed_texts(["red apple", "bicycle"]).T  # doctest: +SKIP
        tensor([[0.61, 0.08]])
    """

    model: DualEncoder
    image: ImageTower
    text: TextEncoder
    sizes: HeadSizes
    audio: AudioTower | None = None

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
        found, device = self.text.encoder(texts), self.model.log_scale.device
        if isinstance(found, Tensor):
            return self.model.embed_text(rows(found.float().to(device)))
        return self.model.embed_text(Patches(values=found.values.to(device), grid=found.grid.to(device)))

    def check_hears(self, *, place: str) -> None:
        """See that the model embeds sounds.

        Raises:
            DataError: It does not hear.
        """
        if self.audio is None:
            raise DataError(
                "this model embeds pictures and texts, it does not hear",
                place=place,
                remedy="train one with stages.pretrain.spoken",
            )

    @torch.inference_mode()
    def embed_sounds(self, sounds: Sequence[Sound]) -> Tensor:
        """Unit vectors, ``sound d``.

        Args:
            sounds: Mono, at the tower's rate.

        Raises:
            DataError: The model does not hear, or a sound is not what the tower takes.
        """
        if not sounds:
            return torch.zeros(0, self.sizes.d_shared)
        self.check_hears(place=sounds[0].place)
        assert self.audio is not None
        device = self.model.log_scale.device
        found = [self.audio.encoder(self.audio.prepare(sound)) for sound in sounds]  # one by one: lengths differ
        parts = [Patches(values=one.values.float().to(device), grid=one.grid.to(device)) for one in found]
        return torch.cat([self.model.embed_audio(part) for part in parts])

    def _encode(self, pictures: Sequence[Image.Image]) -> Patches:
        raw = [self.image.prepare(picture) for picture in pictures]
        joined = Patches(values=torch.cat([r.values for r in raw]), grid=torch.cat([r.grid for r in raw]))
        found = self.image.encoder(joined)
        device = self.model.log_scale.device
        return Patches(values=found.values.float().to(device), grid=found.grid.to(device))


def build_dual(
    image: ImageTower | specs.ScratchImage,
    text: TextEncoder,
    sizes: HeadSizes,
    *,
    scale: float,
    audio: AudioTower | None = None,
) -> Dual:
    """New heads on two towers, drawn from torch's generator.

    Args:
        image: Frozen picture tower; or the spec of one that learns, drawn before the heads.
        text: Frozen text tower; or what stands before one that learns, drawn behind the picture's.
        sizes: Of the heads.
        scale: Where the factor on the cosine starts.
        audio: Frozen audio tower; its head is drawn last.

    Raises:
        ConfigError: The sizes of the spec do not fit together.
    """
    tower = None
    if not isinstance(image, ImageTower):
        tower, spec = build_tower(image), image
        image = raw_pictures(contract_of(spec, tower), spec)
    words = build_text_tower(text.encoder.spec) if isinstance(text.encoder, RawTokens) else None
    widths = [_width(image, tower), text.encoder.d_out, *([audio.encoder.d_out] if audio else [])]
    heads = [ProjectionHead(width, sizes.d_hidden, sizes.d_shared, dropout=sizes.dropout) for width in widths]
    model = DualEncoder(
        heads[0], heads[1], scale=scale, tower=tower, text_tower=words, audio=heads[2] if audio else None
    )
    return Dual(model=model, image=image, text=text, sizes=sizes, audio=audio)


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
    if dual.audio is not None:
        config["audio_width"] = dual.audio.encoder.d_out
        composition["audio"] = {**dual.audio.settings, "key": dual.audio.key}
        media["audio"] = {"rate": dual.audio.rate}
    save_tensors(dual.model.state_dict(), folder / WEIGHTS, metadata={"format": "pt"})
    later(lambda: write_json(folder / _CONFIG, config))
    if isinstance(dual.text.encoder, RawTokens):
        vocabulary = dual.text.encoder.words.written()
        later(lambda: write_atomic(folder / TOKENIZER, vocabulary))
    later(lambda: write_record(folder, kind="dual", composition=composition, media=media))


def load_dual(folder: Path, *, events: Events | None = None) -> Dual:
    """Read what :func:`save_dual` wrote, in eval mode.

    Raises:
        CheckpointError: A file is missing, damaged, of a later format or of another kind; a tower is not the one that
            the heads were trained on.
        ResourceError: A tower's package is not fetched.
    """
    verify_model(folder)
    record, config = read_record(folder, kind="dual"), read_fields(folder / _CONFIG)
    try:
        sides = ("image", "text", "audio") if "audio" in record["composition"] else ("image", "text")
        settings = {side: dict(record["composition"][side]) for side in sides}
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
    if SCRATCH in settings["text"]:
        spec = read_part(ScratchTextTower, settings["text"][SCRATCH], folder=folder, what="text")
        text = raw_texts(RawTokens(read_words(folder), spec, max_tokens=settings["text"]["max_tokens"]))
    else:
        text = load_text_tower(settings["text"].pop("name"), **settings["text"])
    audio = None
    if "audio" in settings:
        audio = load_audio_tower(settings["audio"].pop("name"), **settings["audio"], events=events)
    dual = build_dual(image, text, sizes, scale=1.0, audio=audio)
    for side, tower in (("image", dual.image), ("text", text), ("audio", audio)):
        if tower is not None and tower.key != keys[side]:
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
