"""How a vision-language model's own processor sees a picture: its text from the size alone, its pixels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from plait.core.errors import CheckpointError, DataError
from plait.core.tensors import Patches

if TYPE_CHECKING:
    from PIL import Image

    from plait.core.types import MediaRef
    from plait.data.processor_template import Message


class PictureReader:
    """A processor of one or more tiles of fixed size.

    Args:
        processor: Of transformers, with the PIL backend.

    Attributes:
        talks: Whether conversations need the folder's chat template.
    """

    talks = True

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.images = processor.image_processor

    @property
    def mark(self) -> str:
        """What the chat template writes for a picture."""
        return str(self.processor.image_token)

    @property
    def adds(self) -> bool:
        """Whether the tokenizer may add its first token to what :meth:`compose` gives."""
        return True

    def compose(self, messages: Sequence[Message], prompt: bool) -> str:
        """The folder's own chat template."""
        return self.processor.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)

    def expand(self, refs: Sequence[MediaRef]) -> list[str]:
        """What the pictures of one conversation are in its text, by the processor's own words.

        Raises:
            DataError: A picture has no size, or one that the processor does not take.
        """
        for ref in refs:
            if min(ref.width, ref.height) < 1:
                raise DataError(
                    f"a picture of {ref.width} x {ref.height} pixels",
                    place=ref.uri,
                    remedy="give the picture's width and height in its reference",
                )
        return [self.processor.replace_image_token(self.sized(ref), 0) for ref in refs]

    def sized(self, ref: MediaRef) -> Mapping[str, Any]:
        """What the image processor would say of a picture of this size, without its pixels."""
        del ref
        side = self.images.crop_size if getattr(self.images, "do_center_crop", False) else self.images.size
        if not side.get("height") or not side.get("width"):
            raise CheckpointError(
                f"pictures are not made one size: {dict(side)}",
                place="preprocessor_config.json: size",
                remedy="use a folder whose image processor crops or resizes to a height and a width",
            )
        return {"pixel_values": [np.broadcast_to(np.float32(0), (3, side["height"], side["width"]))]}

    def prepare(self, picture: Image.Image, *, alone: bool = True) -> Patches:
        """Pixels as the processor makes them, one row a pixel; grid ``(tiles, rows, columns)``."""
        del alone
        pixels: torch.Tensor = self.call(picture)["pixel_values"]
        if pixels.ndim == 5:
            pixels = pixels[0]
        tiles, _, height, width = pixels.shape
        values = pixels.permute(0, 2, 3, 1).reshape(tiles * height * width, -1)
        return Patches(values=values, grid=torch.tensor([[tiles, height, width]]))

    def call(self, picture: Image.Image) -> Mapping[str, Any]:
        """The processor on one picture."""
        return self.processor(images=[picture], text=[self.mark], return_tensors="pt")


class Idefics3Reader(PictureReader):
    """Tiles in rows and columns, and the whole picture."""

    def sized(self, ref: MediaRef) -> Mapping[str, Any]:
        """Rows and columns of tiles."""
        rows, columns = self._cells(ref.height, ref.width) if self.images.do_image_splitting else (0, 0)
        return {"rows": [[rows]], "cols": [[columns]]}

    def _cells(self, height: int, width: int) -> tuple[int, int]:
        side = int(self.images.max_image_size["longest_edge"])
        if self.images.do_resize:
            height, width = _longest(height, width, int(self.images.size["longest_edge"]), even=True)
            if max(height, width) > _LARGEST:
                height, width = _longest(height, width, _LARGEST, even=False)
        ratio = width / height
        if width >= height:
            width = math.ceil(width / side) * side
            height = math.ceil(int(width / ratio) / side) * side
        else:
            height = math.ceil(height / side) * side
            width = math.ceil(int(height * ratio) / side) * side
        return (0, 0) if max(height, width) <= side else (height // side, width // side)


_LARGEST = 4096
"""Longest side that Idefics3's image processor resizes to."""


def _longest(height: int, width: int, side: int, *, even: bool) -> tuple[int, int]:
    """A size whose longest side is ``side``, the other rounded as Idefics3 does."""
    ratio = width / height
    other = int(side / ratio) if width >= height else int(side * ratio)
    other = max(other + other % 2 if even else other, 1)
    return (other, side) if width >= height else (side, other)


class QwenReader(PictureReader):
    """Any size: patches, so many a side to a token."""

    def sized(self, ref: MediaRef) -> Mapping[str, Any]:
        """How many patches."""
        try:
            patches = int(self.images.get_number_of_image_patches(ref.height, ref.width, {}))
        except ValueError as error:
            raise DataError(
                f"a picture of {ref.width} x {ref.height} pixels: {error}",
                place=ref.uri,
                remedy="cut or pad the picture, or leave it out",
            ) from error
        return {"image_grid_thw": [np.array([1, 1, patches])]}

    def prepare(self, picture: Image.Image, *, alone: bool = True) -> Patches:
        """Flattened patches; the grid is counted in them."""
        del alone
        found = self.call(picture)
        return Patches(values=found["pixel_values"], grid=found["image_grid_thw"].long())


class InternVLReader(PictureReader):
    """Tiles, as many as fit the picture's shape best, and the whole of it."""

    def sized(self, ref: MediaRef) -> Mapping[str, Any]:
        """How many tiles."""
        how = {"crop_to_patches": True}  # the processor's own default, whatever the image processor's is
        return {"num_patches": [self.images.get_number_of_image_patches(ref.height, ref.width, how)]}


class OnevisionReader(PictureReader):
    """A picture alone in tiles, with the whole of it; one of several as one square."""

    def expand(self, refs: Sequence[MediaRef]) -> list[str]:
        """Likewise; alone or one of several makes a difference."""
        super().expand(refs)  # for its check of sizes
        return [self.processor.replace_image_token(self.several(refs), index) for index in range(len(refs))]

    def sized(self, ref: MediaRef) -> Mapping[str, Any]:
        """Of a picture alone."""
        return self.several([ref])

    def several(self, refs: Sequence[MediaRef]) -> Mapping[str, Any]:
        """Likewise, of all pictures of a conversation."""
        side = self.images.size
        return {
            "batch_num_images": [len(refs)],
            "image_sizes": [(ref.height, ref.width) for ref in refs],
            "pixel_values": [[np.broadcast_to(np.float32(0), (3, side["height"], side["width"]))]],
        }

    def prepare(self, picture: Image.Image, *, alone: bool = True) -> Patches:
        """One row a tile: its pixels, then the picture's height and width, which decide what of it is padding."""
        times = 1 if alone else 2
        found = self.processor(images=[[picture] * times], text=[self.mark * times], return_tensors="pt")
        tiles: torch.Tensor = found["pixel_values"][0]
        size = torch.tensor([picture.height, picture.width], dtype=tiles.dtype).expand(len(tiles), 2)
        return Patches(values=torch.cat([tiles.flatten(1), size], dim=1), grid=torch.tensor([[len(tiles), 1, 1]]))


class Gemma3Reader(PictureReader):
    """One square; pan and scan, which adds crops, is off."""

    def __init__(self, processor: Any) -> None:
        super().__init__(processor)
        if self.images.do_pan_and_scan:
            raise CheckpointError(
                "pan and scan is on: how many crops a picture becomes is not known from its size here",
                place="preprocessor_config.json: do_pan_and_scan",
                remedy="set do_pan_and_scan to false, as Gemma 3 is published",
            )

    def sized(self, ref: MediaRef) -> Mapping[str, Any]:
        """No crops."""
        del ref
        return {"num_crops": [0]}


class PaliGemmaReader(PictureReader):
    """One square; the family has no chat template: pictures, a prompt, a newline, an answer."""

    talks = False

    @property
    def adds(self) -> bool:
        """No: what is composed has it."""
        return False

    def sized(self, ref: MediaRef) -> Mapping[str, Any]:
        """Nothing: all pictures are one size."""
        del ref
        return {}

    def call(self, picture: Image.Image) -> Mapping[str, Any]:
        """The image processor alone, to which the processor adds nothing."""
        return self.images([picture], return_tensors="pt")

    def compose(self, messages: Sequence[Message], prompt: bool) -> str:
        """Pictures, a prompt, a newline, an answer."""
        del prompt
        pictures, asked, said = _one_question(messages, mark=self.mark, name="PaliGemma")
        tokenizer = self.processor.tokenizer
        answer = "" if said is None else said + tokenizer.eos_token
        return f"{pictures}{tokenizer.bos_token}{asked}\n{answer}"


class Blip2Reader(PictureReader):
    """One square, as many tokens as there are queries; no chat template: pictures, a prompt, an answer."""

    talks = False

    def __init__(self, processor: Any) -> None:
        super().__init__(processor)
        if not processor.num_query_tokens:
            raise CheckpointError(
                "num_query_tokens is not set, so a picture's tokens cannot be counted",
                place="processor_config.json",
                remedy="set num_query_tokens as in config.json, and save the processor once more",
            )

    @property
    def mark(self) -> str:
        """The picture's token."""
        token = self.processor.image_token
        return str(getattr(token, "content", token))

    @property
    def adds(self) -> bool:
        """No: what is composed has it."""
        return False

    def call(self, picture: Image.Image) -> Mapping[str, Any]:
        """The image processor alone, to which the processor adds nothing."""
        return self.images([picture], return_tensors="pt")

    def expand(self, refs: Sequence[MediaRef]) -> list[str]:
        """A token a query."""
        return [self.mark * self.processor.num_query_tokens for _ in refs]

    def compose(self, messages: Sequence[Message], prompt: bool) -> str:
        """Pictures, then the first token, then words."""
        del prompt
        pictures, asked, said = _one_question(messages, mark=self.mark, name="BLIP-2")
        tokenizer = self.processor.tokenizer
        start = tokenizer.bos_token if tokenizer.bos_token_id in tokenizer("").input_ids else ""
        return f"{pictures}{start}{asked}" + ("" if said is None else said + tokenizer.eos_token)


def _one_question(messages: Sequence[Message], *, mark: str, name: str) -> tuple[str, str, str | None]:
    """Pictures, what is asked and what is said, of a conversation of one question."""
    roles = [message["role"] for message in messages]
    if roles not in (["user"], ["user", "assistant"]):
        raise DataError(
            f"{name} has no chat template and takes one question: roles {', '.join(roles)}",
            place="the conversation",
            remedy="give one user turn, and at most one assistant turn behind it",
        )
    kinds = [part["type"] for message in messages for part in message["content"]]
    texts = ["".join(p["text"] for p in m["content"] if p["type"] == "text") for m in messages]
    return mark * kinds.count("image"), texts[0], texts[1] if len(texts) > 1 else None


READERS: dict[str, type[PictureReader]] = {
    "llava": PictureReader,
    "idefics3": Idefics3Reader,
    "smolvlm": Idefics3Reader,
    "qwen2_vl": QwenReader,
    "qwen2_5_vl": QwenReader,
    "qwen3_vl": QwenReader,
    "internvl": InternVLReader,
    "llava_onevision": OnevisionReader,
    "gemma3": Gemma3Reader,
    "paligemma": PaliGemmaReader,
    "blip-2": Blip2Reader,
}
"""``model_type`` → how its processor is asked."""
