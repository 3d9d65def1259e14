"""Folder ⇄ Q-Former with the three tasks of BLIP-2's first stage, and its weights as the start of a connector.

A folder holds ``config.json``, ``model.safetensors`` (Q-Former, heads and scale), the tokenizer, and ``plait.json``.
The frozen picture tower is named there, with the digest that loading asks for again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor, nn

from plait.assembly.local import load_weights, put_weights, quiet
from plait.assembly.record import PLAIT, read_fields, read_record, write_record
from plait.assembly.scratch import WEIGHTS
from plait.assembly.towers import ImageTower, load_image_tower, text_folder
from plait.core.errors import CheckpointError, ConfigError
from plait.core.events import Events
from plait.core.files import write_json
from plait.core.manifest import verify_model
from plait.core.snapshot import later, save_tensors
from plait.core.spec import Spec
from plait.models import specs
from plait.models.blip2 import Blip2Stage1
from plait.models.connectors.query import QFormer, QFormerSizes

KIND = "queries"
"""Of the folder, in ``plait.json``."""

_CONFIG = "config.json"
_SHAPE = ("queries", "d", "depth", "heads", "every")
"""What the stage and the connector must have in common; how much they drop is their own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextTokens:
    """Texts as token ids that begin with one whose state stands for the text, and end with one that ends it.

    Attributes:
        tokenizer: With ``[CLS]`` and ``[SEP]``, or what stands for them.
    """

    tokenizer: Any

    @property
    def start(self) -> int:
        """The id after all others: in place of the first one where text is written (BLIP-2's ``[DEC]``)."""
        return len(self.tokenizer)

    @property
    def end(self) -> int:
        """Ends a text."""
        return int(self.tokenizer.sep_token_id)

    @property
    def pad(self) -> int:
        """Stands behind shorter texts, seen by none."""
        return int(self.tokenizer.pad_token_id or 0)

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, never cut."""
        if not texts:
            return []
        return self.tokenizer(list(texts), truncation=False, padding=False, verbose=False)["input_ids"]

    def text(self, ids: Sequence[int]) -> str:
        """What was written."""
        known = [number for number in ids if number < self.start]
        return self.tokenizer.decode(known, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()


class Sizes(Spec):
    """Sizes of the model.

    Example:
        >>> Sizes(shape=specs.QFormerShape(d=128, heads=4)).d_shared
        256
    """

    shape: specs.QFormerShape
    """Of the Q-Former."""
    d_shared: int = 256
    """Width of the space in which pictures and texts are compared."""
    max_tokens: int = 128
    """Longest text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryModel:
    """A Q-Former on a frozen picture tower, with a head for each of the three tasks.

    Attributes:
        model: Tower, Q-Former, heads.
        image: The tower with its media contract.
        words: Texts to ids and back.
        sizes: Of the model.
    """

    model: Blip2Stage1
    image: ImageTower
    words: TextTokens
    sizes: Sizes

    def own_state(self) -> dict[str, Tensor]:
        """Tensors that the folder keeps: all but the tower's."""
        return {name: value for name, value in self.model.state_dict().items() if not name.startswith("tower.")}


def load_tokens(name: str) -> TextTokens:
    """The tokenizer of a text tower, without its weights.

    Args:
        name: ``minilm``, or a local Hugging Face folder of a BERT-like encoder.

    Raises:
        ConfigError: No such tower, or its tokenizer has no token that begins or ends a text.
        ResourceError: Its package is not fetched, or damaged.
    """
    return _tokens(text_folder(name))


def build_queries(image: ImageTower, words: TextTokens, sizes: Sizes, *, scale: float) -> QueryModel:
    """A new Q-Former with its heads, drawn from torch's generator, on a frozen tower.

    Args:
        image: Picture tower.
        words: Tokenizer; the Q-Former has its vocabulary and one token more.
        sizes: Of the model.
        scale: Where the factor on similarities starts, 1 / temperature.
    """
    encoder = image.encoder
    assert isinstance(encoder, nn.Module)
    shape = QFormerSizes(
        d_source=int(image.encoder.d_out),
        vocabulary=words.start + 1,
        max_tokens=sizes.max_tokens,
        dropout=sizes.shape.dropout,
        **{name: getattr(sizes.shape, name) for name in _SHAPE},
    )
    model = Blip2Stage1(encoder, QFormer(shape), start=words.start, d_shared=sizes.d_shared, scale=scale)
    return QueryModel(model=model, image=image, words=words, sizes=sizes)


def save_queries(built: QueryModel, folder: Path) -> None:
    """Write a folder that exists.

    Raises:
        OSError: The disk is full or not writable.
        safetensors.SafetensorError: Likewise.
    """
    save_tensors(built.own_state(), folder / WEIGHTS, metadata={"format": "pt"})
    config = {
        "architectures": ["Blip2Stage1"],
        "model_type": "plait-queries",
        "image_width": built.image.encoder.d_out,
        "vocabulary": built.words.start + 1,
        **built.sizes.model_dump(mode="json"),
    }
    later(lambda: write_json(folder / _CONFIG, config))
    with quiet():
        built.words.tokenizer.save_pretrained(str(folder))
    composition = {"image": {**built.image.settings, "key": built.image.key}}
    media = {"image": built.image.contract.as_dict(), "text": {"max_tokens": built.sizes.max_tokens}}
    later(lambda: write_record(folder, kind=KIND, composition=composition, media=media))


def load_queries(folder: Path, *, events: Events | None = None) -> QueryModel:
    """Read what :func:`save_queries` wrote, in eval mode.

    Raises:
        CheckpointError: A file is missing, damaged, of another format or of another kind; or the tower is not the one
            that the Q-Former was trained on.
        ResourceError: The tower's package is not fetched.
    """
    settings, key, sizes = _read(folder)
    image = load_image_tower(settings.pop("name"), **settings, events=events)
    if image.key != key:
        raise CheckpointError(
            f"the picture tower {image.settings['name']!r} has digest {image.key[:12]}, the Q-Former was trained on "
            f"{key[:12]}",
            place=str(folder / PLAIT),
            remedy="fetch the version of the tower that was used, or train the Q-Former again",
        )
    built = build_queries(image, _tokens(folder), sizes, scale=1.0)
    load_weights(built.model, folder / WEIGHTS, names=built.own_state())
    built.model.eval()
    return built


def start_connector(connector: nn.Module, spec: specs.QFormer, image: ImageTower, *, folder: Path) -> int:
    """Give a connector the weights of a Q-Former that :func:`save_queries` wrote: all but its way into the decoder.

    Text has no place in a connector: what only text passed stays behind.

    Args:
        connector: Made of ``spec``; its projection to the decoder stays as it was drawn.
        spec: Its settings.
        image: The tower whose features it reads.
        folder: Checkpoint of the first stage.

    Returns:
        How many weights were taken.

    Raises:
        ConfigError: Sizes or the towers differ; says both.
        CheckpointError: The folder holds no such model, or a damaged one.
    """
    settings, key, sizes = _read(folder)
    ours, theirs = ({name: getattr(shape, name) for name in _SHAPE} for shape in (spec, sizes.shape))
    if ours != theirs:
        raise ConfigError(
            f"the connector has {_listed(ours)}; the Q-Former of the pretrain stage has {_listed(theirs)}",
            place="connector",
            remedy="give stages.pretrain.qformer and the connector the same sizes",
        )
    if image.key != key:
        raise ConfigError(
            f"the connector reads {_tower(image.settings)}; the Q-Former of the pretrain stage learned on "
            f"{_tower(settings)}",
            place="connector",
            remedy="give both stages the same image_tower and the same resolution",
        )
    assert isinstance(connector, QFormer)
    taken = {name: value for name, value in connector.state_dict().items() if not name.startswith("out.")}
    found = _weights(folder / WEIGHTS)
    prefix = "qformer."
    kept = {name: found[prefix + name] for name in taken if prefix + name in found}
    put_weights(connector, kept, folder / WEIGHTS, names=taken)
    return sum(value.numel() for value in kept.values())


def holds_queries(folder: Path) -> bool:
    """Whether a folder is a checkpoint of a Q-Former's first stage."""
    return (folder / PLAIT).is_file() and read_fields(folder / PLAIT).get("kind") == KIND


def _read(folder: Path) -> tuple[dict[str, Any], str, Sizes]:
    """Settings of the picture tower, its digest, and the sizes of the model."""
    verify_model(folder)
    record, config = read_record(folder, kind=KIND), read_fields(folder / _CONFIG)
    try:
        settings = dict(record["composition"]["image"])
        key = str(settings.pop("key"))
        sizes = Sizes.model_validate({name: config[name] for name in Sizes.model_fields})
    except (KeyError, TypeError, ValueError, ValidationError) as error:
        raise CheckpointError(
            f"a field is missing or wrong: {error}",
            place=str(folder / PLAIT),
            remedy="use an undamaged copy of the folder",
        ) from error
    return settings, key, sizes


def _weights(path: Path) -> Mapping[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot be read: {error}", place=str(path), remedy="use an undamaged copy") from error


def _tokens(folder: Path) -> TextTokens:
    from transformers import AutoTokenizer

    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"no tokenizer can be read: {error}", place=str(folder), remedy="use an undamaged copy of the folder"
        ) from error
    missing = [name for name in ("cls_token", "sep_token") if getattr(tokenizer, name) is None]
    if missing:
        raise ConfigError(
            f"the tokenizer has no {' and no '.join(missing)}: a text's first token stands for it, its last ends it",
            place=str(folder),
            remedy="use the tokenizer of a BERT-like text tower, such as minilm",
        )
    return TextTokens(tokenizer=tokenizer)


def _listed(sizes: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in sizes.items())


def _tower(settings: Mapping[str, Any]) -> str:
    return f"{settings.get('name')} at {settings.get('size') or 'its own number of'} pixels"
