"""Folder ⇄ multimodal model: connector and adapter, and by name and digest the tower and the decoder under them.

A folder holds ``config.json`` and ``model.safetensors`` (the connector), ``adapter/`` (LoRA, as peft writes it), the
tokenizer with its chat template, and ``plait.json``: format, composition and media contract. Weights that did not train
are not copied: they are packages or folders on this machine, and loading refuses any whose digest is another. A decoder
with 8-bit layers is no other decoder's any more: it lies in the folder itself (:mod:`plait.assembly.compressed`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from plait.adapters.lora import Lora, load_adapter, save_adapter
from plait.assembly.compressed import load_decoder, save_decoder
from plait.assembly.language import load_language
from plait.assembly.local import load_weights, quiet
from plait.assembly.record import PLAIT, read_record, write_record
from plait.assembly.smollm import LanguageModel
from plait.assembly.towers import ImageTower, load_image_tower
from plait.core.errors import CheckpointError, PlaitError
from plait.core.events import Events
from plait.core.files import read_json, write_json
from plait.core.types import MediaRef
from plait.data.template import Template
from plait.models.connectors.projection import Chain, Mlp, PixelShuffle, Split
from plait.models.connectors.words import ToWords
from plait.models.multimodal import MultimodalLM
from plait.models.quantized import quantized_layers

ADAPTER = "adapter"
_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectorSizes:
    """Shape of the connector.

    Attributes:
        shuffle: So many cells a side are joined before they are projected.
        d_hidden: Width between its two layers.
        dropout: Share of inputs and hidden units dropped while training.
        tokens: Tokens that a joined cell becomes.
        free: How many of these are not mixtures of words.
    """

    shuffle: int = 2
    d_hidden: int = 1024
    dropout: float = 0.0
    tokens: int = 6
    free: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Multimodal:
    """A model with everything that must stay together from training to serving.

    Attributes:
        model: Tower, connector and decoder.
        image: The picture tower with its media contract.
        language: The decoder with its tokenizer and chat template.
        name: Name or folder the decoder was loaded by.
        sizes: Of the connector.
        lora: How adapters are attached; None where there are none.
    """

    model: MultimodalLM
    image: ImageTower
    language: LanguageModel
    name: str
    sizes: ConnectorSizes
    lora: Lora | None = None

    @property
    def connector(self) -> Chain:
        """Of pictures."""
        found = self.model.connectors["image"]
        assert isinstance(found, Chain)
        return found

    @property
    def onto(self) -> ToWords:
        """The connector's last part."""
        found = self.connector.parts[-1]
        assert isinstance(found, ToWords)
        return found

    @property
    def slots_per_picture(self) -> int:
        """Tokens a picture becomes: the contract makes all pictures one size."""
        side = self.image.contract.size
        cells = self.image.encoder.grid_out(torch.tensor([[1, side, side]]))
        return int(self.connector.grid_out(cells).prod())

    @property
    def template(self) -> Template:
        """Turns to ids, for training and for serving."""
        slots = self.slots_per_picture

        def count(_: MediaRef) -> int:
            return slots

        return Template(self.language.tokenizer, placeholder=self.model.placeholder, slots=count)

    @property
    def context(self) -> int:
        """Most tokens of a conversation."""
        return int(self.language.model.config.max_position_embeddings)

    @property
    def stop(self) -> int:
        """Id that ends an answer."""
        found = self.language.tokenizer.eos_token_id
        assert isinstance(found, int)
        return found

    def with_lora(self, lora: Lora) -> Multimodal:
        """The same model, said to have these adapters (:func:`plait.adapters.lora.attach` puts them in)."""
        return replace(self, lora=lora)


def build_multimodal(
    image: ImageTower, language: LanguageModel, sizes: ConnectorSizes, *, name: str, words: Tensor, shape: Tensor
) -> Multimodal:
    """A new connector, drawn from torch's generator, between a tower and a decoder.

    Args:
        image: Picture tower.
        language: Decoder.
        sizes: Of the connector.
        name: Name or folder the decoder was loaded by.
        words: Embeddings of the words that picture tokens are mixed from, ``word d``.
        shape: How the decoder's embeddings spread (:func:`plait.models.connector.shape_of`), ``d d``.
    """
    shuffle = PixelShuffle(image.encoder.d_out, sizes.shuffle)
    wide = words.shape[1] * sizes.tokens
    mlp = Mlp(shuffle.d_out, sizes.d_hidden, wide, dropout=sizes.dropout)
    onto = ToWords(words.float(), shape, count=sizes.tokens, free=sizes.free)
    connector = Chain(shuffle, mlp, Split(wide, sizes.tokens), onto)
    encoder = image.encoder
    assert isinstance(encoder, torch.nn.Module)
    # The first id beyond both vocabularies: no text becomes it, and no decoder can write it.
    placeholder = max(language.model.config.vocab_size, len(language.tokenizer))
    model = MultimodalLM({"image": encoder}, {"image": connector}, language.model, placeholder=placeholder)
    return Multimodal(model=model, image=image, language=language, name=name, sizes=sizes)


def save_multimodal(built: Multimodal, folder: Path) -> None:
    """Write a folder that exists; what did not train is named, not copied, unless it has 8-bit layers.

    Raises:
        OSError: The disk is full or not writable.
        safetensors.SafetensorError: Likewise.
    """
    weights = {name: value.detach().cpu().contiguous() for name, value in built.connector.state_dict().items()}
    save_file(weights, folder / _WEIGHTS, metadata={"format": "pt"})
    config = {
        "architectures": ["MultimodalLM"],
        "model_type": "plait-multimodal",
        "image_width": built.image.encoder.d_out,
        "text_config": built.language.model.config.to_dict(),
        "connector": {**asdict(built.sizes), "words": len(built.onto.words)},
    }
    write_json(folder / _CONFIG, config)
    with quiet():
        built.language.tokenizer.save_pretrained(str(folder))
    if built.lora is not None:
        save_adapter(built.language.model, built.lora, folder / ADAPTER, base=built.name)
    dtype = str(built.language.model.dtype).removeprefix("torch.")
    decoder = {"name": built.name, "dtype": dtype, "key": built.language.key}
    if quantized_layers(built.language.model):
        decoder |= save_decoder(built.language.model, folder)
    composition = {
        "image": {**built.image.settings, "key": built.image.key},
        "decoder": decoder,
        "adapter": ADAPTER if built.lora is not None else None,
        "placeholder": built.model.placeholder,
    }
    media = {"image": {**built.image.contract.as_dict(), "tokens": built.slots_per_picture}}
    write_record(folder, kind="multimodal", composition=composition, media=media)


def load_multimodal(folder: Path, *, adapter: bool = True, events: Events | None = None) -> Multimodal:
    """Read what :func:`save_multimodal` wrote, in eval mode, nothing trainable.

    Args:
        folder: Of a checkpoint.
        adapter: False leaves the adapter out: the decoder as it was before.
        events: Where a one-time conversion is said.

    Raises:
        CheckpointError: A file is missing, damaged, of a later format or of another kind; tower or decoder are not
            those the folder was trained with; or the adapter cannot be left out, being merged into 8-bit weights.
        ResourceError: A package is not fetched.
    """
    record = read_record(folder, kind="multimodal")
    try:
        parts: Mapping[str, Any] = record["composition"]
        settings = dict(parts["image"])
        image_key, decoder = settings.pop("key"), dict(parts["decoder"])
        config: Mapping[str, Any] = read_json(folder / _CONFIG)
        connector = dict(config["connector"])
        words = int(connector.pop("words"))
        sizes, shape = ConnectorSizes(**connector), config["text_config"]
        name, dtype = str(decoder["name"]), str(decoder["dtype"])
        placeholder, has_adapter = int(parts["placeholder"]), parts["adapter"] is not None
    except (KeyError, TypeError, ValueError, PlaitError) as error:
        raise CheckpointError(
            f"a field is missing or cannot be read: {error}", place=str(folder / PLAIT), remedy="use an undamaged copy"
        ) from error
    image = load_image_tower(settings.pop("name"), **settings, events=events)
    _same("tower", image.key, image_key, folder=folder)
    tokenizer = _tokenizer(folder)
    if "weights" in decoder:
        if not adapter:
            raise CheckpointError(
                "the adapter cannot be left out: it is merged into the decoder's 8-bit weights",
                place=str(folder),
                remedy="load the checkpoint that was compressed",
            )
        language = load_decoder(folder, decoder, shape, tokenizer=tokenizer)
    else:
        language = replace(load_language(name, dtype=dtype, events=events), tokenizer=tokenizer)
        _same("decoder", language.key, decoder["key"], folder=folder)
    width = language.width
    blank = {"words": torch.zeros(words, width), "shape": torch.zeros(width, width)}  # read from the folder below
    built = build_multimodal(image, language, sizes, name=name, **blank)
    if built.model.placeholder != placeholder:
        raise CheckpointError(
            f"the placeholder is {placeholder}, tokenizer and decoder make it {built.model.placeholder}",
            place=str(folder / PLAIT),
            remedy="tokenizer and plait.json must come from the same checkpoint",
        )
    load_weights(built.connector, folder / _WEIGHTS)
    if has_adapter and adapter:
        built = built.with_lora(load_adapter(language.model, folder / ADAPTER))
    built.model.eval()
    built.model.requires_grad_(requires_grad=False)
    return built


def _same(what: str, found: str, wanted: object, *, folder: Path) -> None:
    if found != wanted:
        raise CheckpointError(
            f"the {what} has digest {found[:12]}, this model was trained with {str(wanted)[:12]}",
            place=str(folder / PLAIT),
            remedy=f"fetch the version of the {what} that was used, or train again",
        )


def _tokenizer(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast  # AutoTokenizer warns of a config.json it does not know

    try:
        with quiet():
            return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"the tokenizer cannot be read: {error}", place=str(folder), remedy="use an undamaged copy"
        ) from error
