"""Folder ⇄ multimodal model: what was trained, and by name and digest the towers and the decoder under it.

A folder holds ``config.json``, ``model.safetensors`` (connectors, layers that read inside the decoder, towers that were
trained), ``adapter/`` (LoRA, as peft writes it), the tokenizer with its chat template, and ``plait.json``: format,
composition and media contract. Weights that did not train are not copied: they are packages or folders on this machine,
and loading refuses any whose digest is another. A decoder that was trained as a whole lies in ``decoder/`` in Hugging
Face's layout; one with 8-bit layers is no other decoder's any more and lies in the folder itself
(:mod:`plait.assembly.compressed`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from plait.adapters.lora import Lora, load_adapter, save_adapter
from plait.assembly.audio_towers import AudioTower
from plait.assembly.compressed import load_decoder, save_decoder
from plait.assembly.language import load_language, load_trained
from plait.assembly.local import fingerprint, load_weights, quiet
from plait.assembly.media_towers import Tower, kept, media_contract, read_tower, record_of, slot_counter, tower_key
from plait.assembly.record import PLAIT, read_record, same_key, write_record
from plait.assembly.smollm import LanguageModel
from plait.assembly.towers import ImageTower
from plait.assembly.video_towers import VideoTower
from plait.core.errors import CheckpointError, ConfigError, PlaitError
from plait.core.events import Events
from plait.core.files import read_json, write_json
from plait.core.manifest import verify_model
from plait.core.snapshot import held, later, save_tensors
from plait.core.types import Modality
from plait.data.template import Template
from plait.models import specs
from plait.models.build import build_connector, build_reading
from plait.models.composition import MODALITIES, Connectors, Decoder, PretrainedDecoder
from plait.models.connectors.words import ToWords, shape_of
from plait.models.crossattend import layers_of, plain
from plait.models.multimodal import MultimodalLM
from plait.models.quantized import quantized_layers

ADAPTER = "adapter"
DECODER = "decoder"
_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Multimodal:
    """A model with everything that must stay together from training to serving.

    Attributes:
        model: Towers, connectors and decoder.
        towers: With their media contracts, by modality.
        language: The decoder with its tokenizer and chat template.
        connectors: Of each modality, as settings.
        decoder: What the decoder was before training.
        whole: Whether the decoder itself is trained, so that its weights belong to this model.
        lora: How adapters are attached; None where there are none.
    """

    model: MultimodalLM
    towers: Mapping[Modality, Tower]
    language: LanguageModel
    connectors: Connectors
    decoder: Decoder
    whole: bool = False
    lora: Lora | None = None

    @property
    def image(self) -> ImageTower:
        """The picture tower.

        Raises:
            ConfigError: The model reads no pictures.
        """
        found = self.towers.get("image")
        if not isinstance(found, ImageTower):
            raise ConfigError(
                f"this model reads {', '.join(self.towers)}, no pictures",
                remedy="give it an encoder and a connector for pictures",
            )
        return found

    @property
    def connector(self) -> nn.Module:
        """Of pictures."""
        return self.model.connectors["image"]

    @property
    def slots_per_picture(self) -> int:
        """Placeholders of a picture that is a square of the contract's size, as all are unless it says otherwise."""
        side = self.image.contract.size
        return int(self.model.slots("image", self.image.encoder.grid_out(torch.tensor([[1, side, side]]))))

    @property
    def tokens_per_picture(self) -> int:
        """What the connector makes of a picture; as many as its placeholders unless they are read inside."""
        side = self.image.contract.size
        cells = self.image.encoder.grid_out(torch.tensor([[1, side, side]]))
        return int(self.connector.grid_out(cells).prod())  # pyright: ignore[reportCallIssue]

    @property
    def audio(self) -> AudioTower | None:
        """The audio tower, if the model hears."""
        found = self.towers.get("audio")
        return found if isinstance(found, AudioTower) else None

    @property
    def video(self) -> VideoTower | None:
        """The video tower, if the model sees videos."""
        found = self.towers.get("video")
        return found if isinstance(found, VideoTower) else None

    def slot_grid(self, grid: Tensor) -> Tensor:
        """The token account of pictures, from their features on: grids in, grids of placeholders out."""
        return self.model.slot_grid("image", grid)

    @property
    def accounts(self) -> Mapping[Modality, Callable[[Tensor], Tensor]]:
        """The token account of each modality, from features on."""
        return {modality: partial(self.model.slot_grid, modality) for modality in self.towers}

    @property
    def raw_accounts(self) -> Mapping[Modality, Callable[[Tensor], Tensor]]:
        """The token account of each modality, from raw media on: pixels, samples, frames."""

        def account(modality: Modality, grid: Tensor) -> Tensor:
            return self.model.slot_grid(modality, self.towers[modality].encoder.grid_out(grid))

        return {modality: partial(account, modality) for modality in self.towers}

    @property
    def template(self) -> Template:
        """Turns to ids, for training and for serving."""
        accounts = self.accounts
        count = {modality: slot_counter(tower, accounts[modality]) for modality, tower in self.towers.items()}
        return Template(
            self.language.tokenizer,
            placeholder=self.model.placeholders,
            slots=lambda ref: count[ref.modality](ref),
        )

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

    def own_state(self) -> dict[str, Tensor]:
        """Tensors that ``model.safetensors`` keeps: all but those of frozen towers, and of the decoder proper."""
        own = {f"encoders.{modality}.{name}" for modality, tower in self.towers.items() for name in kept(tower)}
        return {
            name: value
            for name, value in self.model.state_dict().items()
            if name in own
            or not name.startswith(("encoders.", "decoder."))
            or (name.startswith("decoder.") and ".reads." in name)
        }


def holds_media(name: str) -> bool:
    """Whether a tensor of the model makes media readable: a connector's, or a layer's that reads inside the decoder."""
    return name.startswith("connectors.") or name == "mark" or ".reads." in name


def build_multimodal(
    towers: Mapping[Modality, Tower],
    language: LanguageModel,
    connectors: Connectors,
    *,
    decoder: Decoder,
    whole: bool = False,
    words: tuple[Tensor, Tensor] | None = None,
) -> Multimodal:
    """New connectors, drawn from torch's generator, between towers and a decoder.

    Args:
        towers: By modality.
        language: Decoder.
        connectors: As settings, one for each tower.
        decoder: What the language model is, as settings.
        whole: Whether the decoder's weights belong to this model.
        words: For a connector that speaks in words: embeddings of these words, ``word d``, and how all embeddings
            spread (:func:`plait.models.connectors.words.shape_of`), ``d d``; None takes the whole vocabulary.

    Raises:
        ConfigError: A tower has no connector, or sizes do not fit together.
    """
    chosen = connectors.by_modality()
    if set(chosen) != set(towers):
        raise ConfigError(
            f"towers for {', '.join(towers)}; connectors for {', '.join(chosen)}",
            place="connectors",
            remedy="give each tower a connector",
        )
    if words is None and any(isinstance(spec, specs.Words) for spec in chosen.values()):
        table = language.model.get_input_embeddings().get_parameter("weight").detach().float()
        words = (table, shape_of(table))
    encoders: dict[str, nn.Module] = {}
    built: dict[str, nn.Module] = {}
    reading, inside = None, ""
    for modality, spec in chosen.items():
        tower = towers[modality].encoder
        assert isinstance(tower, nn.Module)
        width = int(towers[modality].encoder.d_out)
        encoders[modality] = tower
        built[modality] = build_connector(spec, d_in=width, d_out=language.width, words=words)
        if isinstance(spec, specs.GatedCrossAttention):
            inside, layers = modality, len(layers_of(language.model))
            reading = build_reading(spec, d_in=width, d=language.width, layers=layers)
    # The first ids beyond both vocabularies: no text becomes them, and no decoder can write them.
    first = max(language.model.config.vocab_size, len(language.tokenizer))
    placeholders = {modality: first + MODALITIES.index(modality) for modality in chosen}
    model = MultimodalLM(encoders, built, language.model, placeholder=placeholders, reading=reading, inside=inside)
    return Multimodal(
        model=model, towers=towers, language=language, connectors=connectors, decoder=decoder, whole=whole
    )


def save_multimodal(built: Multimodal, folder: Path) -> None:
    """Write a folder, made if need be; what did not train is named, not copied, unless it has 8-bit layers.

    Within a snapshot (:mod:`plait.core.snapshot`) tensors are copied and written with it; 8-bit layers, which do not
    train, and small files are written at once.

    Raises:
        OSError: The disk is full or not writable.
        safetensors.SafetensorError: Likewise.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(built.own_state(), folder / _WEIGHTS, metadata={"format": "pt"})
    config = {
        "architectures": ["MultimodalLM"],
        "model_type": "plait-multimodal",
        "widths": {modality: tower.encoder.d_out for modality, tower in built.towers.items()},
        "text_config": built.language.model.config.to_dict(),
        "connectors": built.connectors.model_dump(mode="json"),
        "words": next((len(m.words) for m in built.model.connectors.modules() if isinstance(m, ToWords)), 0),
    }
    later(lambda: write_json(folder / _CONFIG, config))
    with quiet():
        built.language.tokenizer.save_pretrained(str(folder))
    dtype = str(built.language.model.dtype).removeprefix("torch.")
    decoder = {"spec": built.decoder.model_dump(mode="json"), "dtype": dtype, "key": built.language.key}
    with plain(built.language.model):
        if built.lora is not None:
            save_adapter(built.language.model, built.lora, folder / ADAPTER, base=_name(built.decoder))
        if quantized_layers(built.language.model):
            decoder |= save_decoder(built.language.model, folder)
        elif built.whole:
            _save_whole(built.language.model, folder / DECODER)
            later(lambda: decoder.update(folder=DECODER, key=fingerprint(folder / DECODER)))
    composition = {
        "towers": {modality: record_of(tower) for modality, tower in built.towers.items()},
        "decoder": decoder,
        "adapter": ADAPTER if built.lora is not None else None,
        "placeholders": built.model.placeholders,
    }
    media = _media(built)
    later(lambda: write_record(folder, kind="multimodal", composition=composition, media=media))


def _save_whole(decoder: Any, folder: Path) -> None:
    """Write a decoder that trains as a whole, as transformers does."""
    state = held(decoder.state_dict())

    def write() -> None:
        with quiet():
            decoder.save_pretrained(str(folder), state_dict=state)

    later(write)


def _media(built: Multimodal) -> dict[str, Any]:
    """The media contract: what pictures, sounds and videos must be, and become."""
    found: dict[str, Any] = {modality: media_contract(tower) for modality, tower in built.towers.items()}
    if "image" in found:
        found["image"]["tokens"] = built.slots_per_picture
    if built.video is not None:
        longest = built.video.encoder.grid_out(torch.tensor([built.video.shape]))
        found["video"]["tokens"] = int(built.model.slots("video", longest))
    return json.loads(json.dumps(found))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Record:
    """What ``plait.json`` and ``config.json`` say, checked."""

    towers: dict[Modality, dict[str, Any]]
    decoder: dict[str, Any]
    spec: Decoder
    connectors: Connectors
    words: int
    text_config: Mapping[str, Any]
    placeholders: dict[str, int]
    media: Mapping[str, Any]
    adapter: bool


def load_multimodal(folder: Path, *, adapter: bool = True, events: Events | None = None) -> Multimodal:
    """Read what :func:`save_multimodal` wrote, in eval mode, nothing trainable.

    Args:
        folder: Of a checkpoint.
        adapter: False leaves the adapter out: the decoder as it was before.
        events: Where a one-time conversion is said.

    Raises:
        CheckpointError: A file is missing, damaged, of another format or of another kind; tower or decoder are not
            those the folder was trained with; or the adapter cannot be left out, being merged into 8-bit weights.
        ResourceError: A package is not fetched.
    """
    record = _read(folder)
    towers: dict[Modality, Tower] = {
        modality: read_tower(modality, settings, folder=folder, events=events)
        for modality, settings in record.towers.items()
    }
    language, whole = _load_language(record, folder, adapter=adapter, events=events)
    width = language.width
    blank = (torch.zeros(record.words, width), torch.zeros(width, width))  # read from the folder below
    built = build_multimodal(
        towers, language, record.connectors, decoder=record.spec, whole=whole, words=blank if record.words else None
    )
    if built.model.placeholders != record.placeholders:
        raise CheckpointError(
            f"placeholders are {record.placeholders}, tokenizer and decoder make them {built.model.placeholders}",
            place=str(folder / PLAIT),
            remedy="tokenizer and plait.json must come from the same checkpoint",
        )
    load_weights(built.model, folder / _WEIGHTS, names=built.own_state())
    for modality, tower in towers.items():
        same_key(f"{modality} tower", tower_key(tower), tower.key, folder=folder)
    if _media(built) != record.media:
        raise CheckpointError(
            f"the media contract is {json.dumps(record.media)}, towers and connectors make it "
            f"{json.dumps(_media(built))}",
            place=f"{folder / PLAIT}: media",
            remedy="use an undamaged copy of the folder, or the version of plait that wrote it",
        )
    if record.adapter and adapter:
        with plain(language.model):
            built = built.with_lora(load_adapter(language.model, folder / ADAPTER))
    built.model.eval()
    built.model.requires_grad_(requires_grad=False)
    return built


def _read(folder: Path) -> _Record:
    verify_model(folder)
    record = read_record(folder, kind="multimodal")
    try:
        parts: Mapping[str, Any] = record["composition"]
        config: Mapping[str, Any] = read_json(folder / _CONFIG)
        decoder = {"dtype": parts["decoder"]["dtype"], "key": parts["decoder"]["key"], **parts["decoder"]}
        if decoder["dtype"] not in _DTYPES or int(config["words"]) < 0:
            raise ValueError(f"dtype {decoder['dtype']!r}, words {config['words']!r}")
        return _Record(
            towers={
                modality: dict(parts["towers"][modality]) for modality in MODALITIES if modality in parts["towers"]
            },
            decoder=decoder,
            spec=TypeAdapter[Decoder](Decoder).validate_python(decoder["spec"]),
            connectors=Connectors.model_validate(config["connectors"]),
            words=int(config["words"]),
            text_config=config["text_config"],
            placeholders={str(name): int(number) for name, number in dict(parts["placeholders"]).items()},
            media=record["media"],
            adapter=parts["adapter"] is not None,
        )
    except (AttributeError, KeyError, TypeError, ValueError, PlaitError) as error:
        raise CheckpointError(
            f"a field is missing or cannot be read: {error}", place=str(folder / PLAIT), remedy="use an undamaged copy"
        ) from error


def _load_language(
    record: _Record, folder: Path, *, adapter: bool, events: Events | None
) -> tuple[LanguageModel, bool]:
    """The decoder, and whether its weights lie in the folder in full."""
    decoder, tokenizer = record.decoder, _tokenizer(folder)
    if "weights" in decoder:
        if not adapter:
            raise CheckpointError(
                "the adapter cannot be left out: it is merged into the decoder's 8-bit weights",
                place=str(folder),
                remedy="load the checkpoint that was compressed",
            )
        return load_decoder(folder, decoder, record.text_config, tokenizer=tokenizer), False
    dtype = str(decoder["dtype"])
    if "folder" in decoder:
        language = load_trained(folder / DECODER, tokenizer=tokenizer, dtype=dtype)
        found = fingerprint(folder / DECODER)
        same_key("decoder", found, decoder["key"], folder=folder)
        return replace(language, key=found), True
    language = load_language(_name(record.spec), dtype=dtype, events=events)
    same_key("decoder", language.key, decoder["key"], folder=folder)
    return replace(language, tokenizer=tokenizer), False


def _name(decoder: Decoder) -> str:
    """Of a pretrained decoder; what a new one is called in an adapter's file."""
    return decoder.name if isinstance(decoder, PretrainedDecoder) else decoder.model_type


def _tokenizer(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast  # AutoTokenizer warns of a config.json it does not know

    try:
        with quiet():
            return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"the tokenizer cannot be read: {error}", place=str(folder), remedy="use an undamaged copy"
        ) from error
