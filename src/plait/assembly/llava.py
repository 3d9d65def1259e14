"""Our composition ⇄ a folder in LLaVA's layout, which ``AutoModelForImageTextToText`` and ``AutoProcessor`` load.

LLaVA is a picture tower of CLIP's or SigLIP's kind, one hidden layer of it, two linear layers with GELU between, and a
decoder (arXiv 2310.03744). A composition of ours that is made of these is written in that layout whole, with equal
logits; any other is refused with what would have to be different. What a layout cannot say is said by
:attr:`Exported.notes`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from plait.adapters.lora import merge
from plait.assembly.contract import mean_color
from plait.assembly.fit import SQUARE
from plait.assembly.local import fingerprint, put_weights, quiet
from plait.assembly.multimodal import Multimodal, build_multimodal
from plait.assembly.record import read_fields
from plait.assembly.smollm import LanguageModel
from plait.assembly.towers import ImageTower, load_image_tower
from plait.assembly.vlm import load_whole
from plait.core.errors import CheckpointError, ConfigError
from plait.core.events import Events
from plait.core.files import check_empty, folder_atomic
from plait.models import specs
from plait.models.composition import Connectors, PretrainedDecoder
from plait.models.documents import read_by_document
from plait.models.hub import llava
from plait.models.quantized import quantized_layers
from plait.models.towers.pretrained import PretrainedVision

DECODERS = ("llama", "mistral", "qwen2", "qwen3")
"""Families of decoders whose logits in this layout were compared with ours."""
TOWERS = ("clip_vision_model", "siglip_vision_model")

_IMAGE_TOKENS = ("<image>", "<|image|>", "<|image_pad|>")
# The first that means nothing else to the tokenizer, or means a picture already.

_OPENING = (
    "{%- set plait = namespace(turns=[]) -%}{%- for m in messages -%}{%- if m['content'] is string -%}"
    "{%- set plait.turns = plait.turns + [m] -%}{%- else -%}{%- set plait.text = '' -%}{%- for c in m['content'] -%}"
    "{%- set plait.text = plait.text + (c['text'] if c['type'] == 'text' else 'PICTURE') -%}{%- endfor -%}"
    "{%- set plait.turns = plait.turns + [dict(m, content=plait.text)] -%}{%- endif -%}{%- endfor -%}"
    "{%- set messages = plait.turns %}"
)
# Contents in parts become one text, as the chat templates of language models want it.
_PARTS = (
    "{%- set plait = namespace(turns=[]) -%}{%- for m in messages -%}{%- set plait.turns = plait.turns + "
    "[dict(m, content=[dict(type='text', text=m['content'])])] -%}{%- endfor -%}{%- set messages = plait.turns %}"
)
# The other way round, as those of LLaVA want it.


@dataclass(frozen=True, slots=True, kw_only=True)
class Mismatch:
    """Why a composition is not LLaVA.

    Attributes:
        part: Which setting or part.
        found: What it is.
        wanted: What it would have to be.
    """

    part: str
    found: str
    wanted: str

    def __str__(self) -> str:
        return f"{self.part}: found {self.found}, wanted {self.wanted}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What was written.

    Attributes:
        folder: Where.
        layout: Class of transformers that loads it.
        dtype: Number format of all weights.
        weights: How many numbers.
        merged: Matrices into which adapters were folded.
        image_token: Stands for one token of a picture.
        image_token_id: Its id.
        tokens_per_picture: So many of them.
        notes: What is different there, a line each.
    """

    folder: Path
    layout: str
    dtype: str
    weights: int
    merged: int
    image_token: str
    image_token_id: int
    tokens_per_picture: int
    notes: tuple[str, ...]


def mismatches(built: Multimodal) -> list[Mismatch]:
    """What would have to be different for a composition to be LLaVA; empty where it is."""
    return [*_of_tower(built), *_of_connector(built), *_of_decoder(built)]


def _of_tower(built: Multimodal) -> Iterator[Mismatch]:
    others = [modality for modality in built.towers if modality != "image"]
    if others or "image" not in built.towers:
        yield Mismatch(part="encoders", found=", ".join(built.towers), wanted="image alone")
    tower = built.towers.get("image")
    if not isinstance(tower, ImageTower):
        return
    encoder, contract = tower.encoder, tower.contract
    if contract.fit != SQUARE:
        yield Mismatch(part="encoders.image.fit", found=type(contract.fit).__name__.lower(), wanted="square")
        return
    if not isinstance(encoder, PretrainedVision):
        found = str(tower.settings.get("name") or "a tower of Plait's own")
        yield Mismatch(part="encoders.image", found=found, wanted="a Hugging Face folder of CLIP or SigLIP")
        return
    config = encoder.backbone.config
    if config.model_type not in TOWERS:
        yield Mismatch(part="encoders.image", found=config.model_type, wanted=" or ".join(TOWERS))
    elif config.model_type == "siglip_vision_model" and encoder.layer == -1:
        wanted = "-2 or less: LLaVA takes layers before SigLIP's last norm"
        yield Mismatch(part="encoders.image.layer", found="-1", wanted=wanted)
    if contract.size != config.image_size:
        wanted = f"{config.image_size}, at which its positions were learned"
        yield Mismatch(part="encoders.image.size", found=str(contract.size), wanted=wanted)


def _of_connector(built: Multimodal) -> Iterator[Mismatch]:
    spec = built.connectors.image
    if not isinstance(spec, specs.Linear | specs.Mlp):
        found = "none" if spec is None else spec.kind
        yield Mismatch(part="connectors.image", found=found, wanted="mlp or linear")
        return
    if spec.shuffle != 1:
        yield Mismatch(part="connectors.image.shuffle", found=str(spec.shuffle), wanted="1")
    if isinstance(spec, specs.Mlp):
        if spec.norm:
            yield Mismatch(part="connectors.image.norm", found="true", wanted="false")
        if spec.d_hidden not in (0, built.language.width):
            wanted = f"{built.language.width}, the decoder's width (or 0)"
            yield Mismatch(part="connectors.image.d_hidden", found=str(spec.d_hidden), wanted=wanted)


def _of_decoder(built: Multimodal) -> Iterator[Mismatch]:
    kind = built.language.model.config.model_type
    if kind not in DECODERS:
        yield Mismatch(part="decoder", found=kind, wanted=f"one of {', '.join(DECODERS)}")
    eight = len(quantized_layers(built.language.model))
    if eight:
        wanted = "none: export the checkpoint that was compressed"
        yield Mismatch(part="decoder's layers of 8 bits", found=str(eight), wanted=wanted)


# --- out -----------------------------------------------------------------------------------------------------------


def export_llava(built: Multimodal, folder: Path) -> Exported:
    """Write a composition as a folder of ``LlavaForConditionalGeneration``, with its processor.

    Adapters are merged, in float32 and in a copy: the model in memory stays as it is. All weights get one number
    format, the widest among the parts.

    Args:
        built: A model of ours.
        folder: New, or empty.

    Raises:
        UsageError: The folder holds something.
        ConfigError: The model maps to no layout that is known; says of each part what it is and would have to be.
        ResourceError: The disk is full or not writable.
    """
    from transformers import GenerationConfig

    check_empty(folder)
    if wrong := mismatches(built):
        raise ConfigError(
            f"this model is not LLaVA: {'; '.join(map(str, wrong))}",
            place="export to hf",
            remedy="compose and train a model with these parts; Plait itself loads this one as it is",
        )
    dtypes = {weight.dtype for weight in built.model.parameters()}
    dtype = max(dtypes, key=lambda kind: torch.finfo(kind).bits)
    decoder: Any = copy.deepcopy(built.language.model)
    decoder.to(dtype)
    merged = merge(decoder)
    tokenizer, token = _tokenizer(built)
    number = tokenizer.convert_tokens_to_ids(token)
    vocabulary = max(int(decoder.config.vocab_size), number + 1)
    state = {name: value for name, value in built.model.state_dict().items() if not name.startswith("decoder.")}
    state |= {f"decoder.{name}": value for name, value in _grown(decoder, vocabulary).items()}
    named = {name: value.detach().cpu().to(dtype).contiguous() for name, value in llava.to_official(state).items()}
    config = _config(built, vocabulary=vocabulary, image_token_id=number)
    config.dtype = dtype
    generation = GenerationConfig(
        eos_token_id=built.stop, pad_token_id=tokenizer.pad_token_id, suppress_tokens=[number]
    )  # no answer holds a picture
    with folder_atomic(folder) as target, quiet():
        save_file(named, target / "model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(target)
        generation.save_pretrained(target)
        _processor(built, tokenizer, token=token).save_pretrained(target)
    return Exported(
        folder=folder,
        layout="LlavaForConditionalGeneration",
        dtype=str(dtype).removeprefix("torch."),
        weights=sum(value.numel() for value in named.values()),
        merged=merged,
        image_token=token,
        image_token_id=number,
        tokens_per_picture=built.slots_per_picture,
        notes=tuple(_notes(built, token=token, merged=merged, dtype=dtype)),
    )


def _tokenizer(built: Multimodal) -> tuple[Any, str]:
    """A copy of the tokenizer that knows the picture's token, and that token."""
    from tokenizers import AddedToken

    tokenizer: Any = copy.deepcopy(built.language.tokenizer)
    special = {str(added) for added in tokenizer.added_tokens_decoder.values() if added.special}
    known = tokenizer.get_vocab()
    token = next((t for t in _IMAGE_TOKENS if t in special or t not in known), "<|plait_image|>")
    if token not in special:
        tokenizer.add_tokens([AddedToken(token, special=True, normalized=False)], special_tokens=True)
    template = str(tokenizer.chat_template)
    # What came out of LLaVA goes back as it was.
    tokenizer.chat_template = (
        template.removeprefix(_PARTS) if template.startswith(_PARTS) else _OPENING.replace("PICTURE", token) + template
    )
    return tokenizer, token


def _grown(decoder: Any, vocabulary: int) -> dict[str, Tensor]:
    """Weights of the decoder; rows of zeros for ids that it did not know."""
    state = dict(decoder.state_dict())
    if decoder.config.tie_word_embeddings:
        state.pop("lm_head.weight")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        value = state.get(name)
        if value is not None and len(value) < vocabulary:
            state[name] = torch.cat([value, value.new_zeros(vocabulary - len(value), value.shape[1])])
    return state


def _config(built: Multimodal, *, vocabulary: int, image_token_id: int) -> Any:
    from transformers import LlavaConfig

    encoder = _encoder(built)
    vision, text = copy.deepcopy(encoder.backbone.config), copy.deepcopy(built.language.model.config)
    if vision.model_type == "siglip_vision_model":
        vision.vision_use_head = False
    text.vocab_size = vocabulary
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token_id,
        image_seq_length=built.slots_per_picture,
        projector_hidden_act="linear" if isinstance(built.connectors.image, specs.Linear) else "gelu",
        vision_feature_layer=encoder.layer,
        vision_feature_select_strategy=_strategy(vision),
        tie_word_embeddings=bool(text.tie_word_embeddings),
        architectures=["LlavaForConditionalGeneration"],
    )


def _encoder(built: Multimodal) -> PretrainedVision:
    encoder = built.image.encoder
    assert isinstance(encoder, PretrainedVision)
    return encoder


def _strategy(vision: Any) -> Literal["default", "full"]:
    """``default`` leaves out the first token, which is CLIP's class token."""
    return "default" if vision.model_type == "clip_vision_model" else "full"


def _processor(built: Multimodal, tokenizer: Any, *, token: str) -> Any:
    from transformers import LlavaProcessor
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    contract, vision = built.image.contract, _encoder(built).backbone.config
    side = {"height": contract.size, "width": contract.size}
    images = LlavaImageProcessorPil(
        do_pad=True,  # to a square: the picture is shown whole, as ours are
        do_center_crop=False,
        size=side,
        crop_size=side,
        resample={"bilinear": 2, "bicubic": 3}[contract.resample],
        image_mean=list(contract.mean),
        image_std=list(contract.std),
    )
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=_strategy(vision),
        num_additional_image_tokens=1 if vision.model_type == "clip_vision_model" else 0,
        image_token=token,
        chat_template=tokenizer.chat_template,
    )


def _notes(built: Multimodal, *, token: str, merged: int, dtype: torch.dtype) -> Iterator[str]:
    contract = built.image.contract
    filled, here = mean_color(contract.mean), contract.background
    color = "" if filled == here else f", and with the mean color {filled} where Plait, as in training, takes {here}"
    yield f"pictures that are not square are filled up to one before they are scaled instead of after{color}"
    yield f"what a person types as {token} is a picture to transformers' processor; Plait reads it as plain words"
    yield "texts are tokenized joined to the template: one that begins or ends with a space may become other ids"
    if merged:
        yield f"adapters are merged into {merged} matrices, in float32: there is no LoRA to take off again"
    computed = {next(part.parameters()).dtype for part in (_encoder(built), built.connector, built.language.model)}
    if computed != {dtype}:
        parts = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in computed))
        wide = str(dtype).removeprefix("torch.")
        yield f"all weights are {wide}, the parts here {parts}: last digits of logits differ"


# --- in ------------------------------------------------------------------------------------------------------------


def from_llava(folder: Path, *, dtype: str = "float32", events: Events | None = None) -> Multimodal:
    """A folder in LLaVA's layout as our own composition, in eval mode, nothing trainable.

    The tower is named by the folder from then on; the decoder belongs to the model, which saves it whole.

    Args:
        folder: Of ``LlavaForConditionalGeneration``, with its processor.
        dtype: ``float32`` or ``bfloat16``, of all parts.
        events: Where it is said what is different here.

    Raises:
        CheckpointError: It is no LLaVA, weights are missing or left over, or it has a form that is not done here.
    """
    from transformers import AutoConfig

    kind = read_fields(folder / "config.json").get("model_type")
    if kind != "llava":
        raise _wrong(folder, "model_type", found=kind, wanted="'llava'")
    config: Any = AutoConfig.from_pretrained(folder, local_files_only=True)
    _check(config, folder)
    whole = load_whole(folder, dtype)
    layers = int(config.vision_config.num_hidden_layers)
    layer = int(config.vision_feature_layer)
    layer = layer if layer < 0 else layer - layers - 1
    tower = load_image_tower(str(folder), layer=layer, dtype=dtype, events=events)
    language = LanguageModel(
        model=_decoder(whole), tokenizer=_read_tokenizer(folder), folder=folder, key=fingerprint(folder)
    )
    act = str(config.projector_hidden_act)
    spec = specs.Linear() if act == "linear" else specs.Mlp(norm=False)
    built = build_multimodal(
        {"image": tower}, language, Connectors(image=spec), decoder=PretrainedDecoder(name=str(folder)), whole=True
    )
    projector = {f"multi_modal_projector.{k}": v for k, v in whole.model.multi_modal_projector.state_dict().items()}
    ours = {
        name.removeprefix("connectors.image."): value
        for name, value in llava.projector_to_ours(projector, act=act, place=str(folder)).items()
    }
    built.connector.to(whole.dtype)
    put_weights(built.connector, ours, folder)
    (events or Events()).note(
        "the chat template writes a picture where it stands in the text, without what LLaVA's own puts around it",
        place=str(folder),
    )
    built.model.eval()
    built.model.requires_grad_(requires_grad=False)
    return built


def _wrong(folder: Path, field: str, *, found: object, wanted: str) -> CheckpointError:
    return CheckpointError(
        f"{field} is {found!r}, expected {wanted}",
        place=f"{folder / 'config.json'}: {field}",
        remedy="ask this model as it is (`plait chat FOLDER`), or use a LLaVA 1.5",
    )


def _check(config: Any, folder: Path) -> None:
    """Refuse a form of LLaVA that is not done here."""
    vision, text = config.vision_config, config.text_config
    if vision.model_type not in TOWERS:
        raise _wrong(folder, "vision_config", found=vision.model_type, wanted=" or ".join(TOWERS))
    if text.model_type not in DECODERS:
        raise _wrong(folder, "text_config", found=text.model_type, wanted=f"one of {', '.join(DECODERS)}")
    if config.projector_hidden_act not in ("gelu", "linear"):
        raise _wrong(folder, "projector_hidden_act", found=config.projector_hidden_act, wanted="'gelu' or 'linear'")
    if config.vision_feature_select_strategy != _strategy(vision):
        came, wanted = config.vision_feature_select_strategy, _strategy(vision)
        raise _wrong(
            folder, "vision_feature_select_strategy", found=came, wanted=f"{wanted!r} with {vision.model_type}"
        )
    layer, layers = config.vision_feature_layer, int(vision.num_hidden_layers)
    last = layer in (-1, layers) and vision.model_type == "siglip_vision_model"
    if not isinstance(layer, int) or not -layers - 1 <= layer <= layers or last:
        kind = "one layer before the last" if last else f"one layer, {-layers - 1} to {layers}"
        raise _wrong(folder, "vision_feature_layer", found=layer, wanted=kind)


def _decoder(whole: Any) -> Any:
    """The causal language model inside, its modules as they are."""
    from transformers import AutoModelForCausalLM

    base = whole.model.language_model
    with torch.device("meta"):
        decoder: Any = AutoModelForCausalLM.from_config(base.config)
    setattr(decoder, decoder.base_model_prefix, base)
    decoder.lm_head = whole.lm_head
    decoder.config = base.config
    decoder.generation_config = copy.deepcopy(whole.generation_config)
    read_by_document(decoder)
    return decoder.eval()


def _read_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, with a chat template for contents that are one text."""
    from transformers import AutoTokenizer

    with quiet():
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    template = str(tokenizer.chat_template or "")
    starts = next((o for t in _IMAGE_TOKENS if template.startswith(o := _OPENING.replace("PICTURE", t))), "")
    if starts:
        tokenizer.chat_template = template.removeprefix(starts)
    elif template:
        tokenizer.chat_template = _PARTS + template
    return tokenizer
