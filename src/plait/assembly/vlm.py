"""Hugging Face folder ⇄ vision-language model of transformers, with its own processor, chat template and account."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plait.assembly.hf_folder import load_folder, reading
from plait.assembly.local import fingerprint, quiet
from plait.assembly.record import read_fields
from plait.assembly.vlm_pictures import READERS, PictureReader
from plait.core.errors import CheckpointError, ConfigError
from plait.data.processor_template import ProcessorTemplate
from plait.models.wrapped.families import FAMILIES
from plait.models.wrapped.vlm import WrappedVLM

if TYPE_CHECKING:
    from PIL import Image

    from plait.core.tensors import Patches
    from plait.core.types import MediaRef


@dataclass(frozen=True, slots=True, kw_only=True)
class Vlm:
    """A wrapped model with everything that must stay together from training to serving.

    Attributes:
        model: Unchanged, in the face of ``MultimodalLM``.
        reader: Its processor's pictures.
        template: Turns to ids, for training and for serving.
        folder: Where it was loaded from.
        key: Digest of the folder: weights, configuration, tokenizer, processor.
    """

    model: WrappedVLM
    reader: PictureReader
    template: ProcessorTemplate
    folder: Path
    key: str

    def layout(self, refs: Sequence[MediaRef]) -> list[list[int]]:
        """The exact ids that the pictures of one conversation expand to, from their sizes alone."""
        return [self.template.tokenizer(text, add_special_tokens=False).input_ids for text in self.reader.expand(refs)]

    def prepare(self, picture: Image.Image, *, alone: bool = True) -> Patches:
        """A picture as the model's own image processor makes it.

        Args:
            picture: RGB.
            alone: Whether it is the only picture of its conversation; LLaVA-OneVision sees such a one more finely.
        """
        return self.reader.prepare(picture, alone=alone)

    @property
    def stop(self) -> int:
        """Id that ends an answer."""
        return self.template.stop

    @property
    def context(self) -> int:
        """Most tokens of a conversation."""
        return int(self.model.family.text.max_position_embeddings)


def load_vlm(folder: Path, *, dtype: str = "auto") -> Vlm:
    """Load a folder in the hub's layout, in eval mode, its weights frozen; nothing is downloaded.

    Args:
        folder: Of a model that ``AutoModelForImageTextToText`` loads, with its processor.
        dtype: A name of torch's; ``auto`` takes the folder's.

    Raises:
        ConfigError: No such folder.
        CheckpointError: The family is not known here, files are missing or damaged, or weights are missing or left
            over; lists them.
    """
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"no folder with a config.json: {folder}",
            place=str(folder),
            remedy="give the path of a Hugging Face model folder on this disk",
        )
    kind = read_fields(folder / "config.json").get("model_type")
    if kind not in FAMILIES:
        raise CheckpointError(
            f"model_type is {kind!r}, which is no vision-language model that is known here",
            place=f"{folder / 'config.json'}: model_type",
            remedy=f"use a folder of one of: {', '.join(FAMILIES)}",
        )
    key = fingerprint(folder)
    model = load_whole(folder, dtype)
    processor = load_processor(folder)
    wrapped = WrappedVLM(model)
    reader = READERS[kind](processor)
    tokenizer = processor.tokenizer
    if reader.talks and not processor.chat_template:
        raise CheckpointError(
            "the processor has no chat template",
            place=str(folder),
            remedy="use an instruction-tuned model, or put a chat_template.jinja beside its processor",
        )
    template = ProcessorTemplate(
        tokenizer,
        compose=reader.compose,
        expand=reader.expand,
        mark=reader.mark,
        placeholder=wrapped.placeholder,
        stops=_stops(model, tokenizer),
        adds=reader.adds,
    )
    wrapped.eval().requires_grad_(requires_grad=False)
    return Vlm(model=wrapped, reader=reader, template=template, folder=folder, key=key)


def save_vlm(vlm: Vlm, folder: Path) -> None:
    """Write a folder that exists: weights as they are now, everything else as it was in the folder they came from.

    ``AutoModelForImageTextToText`` and ``AutoProcessor`` load it.

    Raises:
        OSError: The disk is full or not writable.
        safetensors.SafetensorError: Likewise.
    """
    for path in sorted(vlm.folder.iterdir()):
        if path.is_file() and path.suffix in (".json", ".jinja", ".txt", ".model") and "safetensors" not in path.name:
            shutil.copyfile(path, folder / path.name)
    with quiet():
        vlm.model.model.save_pretrained(folder)  # pyright: ignore[reportCallIssue]


def load_processor(folder: Path) -> Any:
    """The folder's processor for pictures and text, with Pillow; what it does with videos is left out.

    Video processors of transformers need torchvision; SmolVLM's needs num2words besides, so its pictures, which are
    Idefics3's to the last token, are read by that processor.

    Raises:
        CheckpointError: A file is missing or damaged.
    """
    import transformers
    from transformers import AutoImageProcessor, AutoTokenizer

    config = read_fields(folder / "config.json")
    with reading(folder, "processor", "AutoProcessor loads"):
        images = AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        base: Any = getattr(transformers, _PROCESSORS[config["model_type"]])
        settings, _ = base.get_processor_dict(folder, local_files_only=True)
        settings.pop("video_processor", None)
        return without_videos(base).from_args_and_dict([images, tokenizer], settings)


_PROCESSORS = {
    "llava": "LlavaProcessor",
    "idefics3": "Idefics3Processor",
    "smolvlm": "Idefics3Processor",
    "qwen2_vl": "Qwen2VLProcessor",
    "qwen2_5_vl": "Qwen2_5_VLProcessor",
    "qwen3_vl": "Qwen3VLProcessor",
    "internvl": "InternVLProcessor",
    "llava_onevision": "LlavaOnevisionProcessor",
    "gemma3": "Gemma3Processor",
    "paligemma": "PaliGemmaProcessor",
    "blip-2": "Blip2Processor",
}


def without_videos(processor: Any) -> Any:
    """A class of transformers' processors as it is, of which no video processor is asked."""

    def attributes(_: type) -> list[str]:
        return ["image_processor", "tokenizer"]

    return type(processor.__name__, (processor,), {"get_attributes": classmethod(attributes)})


def load_whole(folder: Path, dtype: str) -> Any:
    """The model of a folder as transformers has it, every weight in its place.

    Raises:
        CheckpointError: Files are missing or damaged, or weights are missing or left over; lists them.
    """
    from transformers import AutoModelForImageTextToText

    loaded = load_folder(AutoModelForImageTextToText, folder, dtype=dtype, what="vision-language model")
    loaded.check(exact=True)
    return loaded.model


def _stops(model: Any, tokenizer: Any) -> list[int]:
    """Ids that end an answer: the tokenizer's, and those that the folder's generation settings name."""
    named = model.generation_config.eos_token_id
    more = [] if named is None else [named] if isinstance(named, int) else list(named)
    return [*([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]), *more]
