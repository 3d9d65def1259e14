"""Any model that can be asked → an engine: our own, and vision-language models of Hugging Face as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from plait.assembly.vlm import Vlm
from plait.core.errors import DataError
from plait.core.types import Text
from plait.data.collate import joined
from plait.data.media import decode_image
from plait.inference.build import build_engine, encode_pictures
from plait.inference.engine import Engine, Prompt

if TYPE_CHECKING:
    from plait.assembly.multimodal import Multimodal
    from plait.core.tensors import Patches
    from plait.core.types import MediaRef, Turn


def engine_for(model: Multimodal | Vlm, read: Callable[[MediaRef], bytes]) -> Engine:
    """An engine around whatever :func:`plait.inference.load.load` gives.

    Args:
        model: In eval mode.
        read: Bytes of a picture.
    """
    if isinstance(model, Vlm):
        return wrapped_engine(model, read)
    return build_engine(model, encode_pictures(model, read))


def wrapped_engine(vlm: Vlm, read: Callable[[MediaRef], bytes]) -> Engine:
    """An engine around a model of Hugging Face: its own processor, chat template and account of tokens.

    Requests are answered one by one, because how some processors prepare a picture depends on whether it is the only
    one of its conversation.

    Args:
        vlm: In eval mode.
        read: Bytes of a picture.
    """
    tokenizer = vlm.template.tokenizer

    def render(turns: Sequence[Turn]) -> Prompt:
        for part in (part for turn in turns for part in turn.parts):
            if not isinstance(part, Text) and part.modality != "image":
                raise DataError(
                    f"this model reads pictures, came {part.modality}",
                    place=part.uri,
                    remedy="ask about a picture, or take a model that was trained with such media",
                )
        rendered = vlm.template.turns(turns, prompt=True)
        return Prompt(token_ids=rendered.token_ids, media=rendered.media)

    def media(refs: Sequence[MediaRef]) -> Patches:
        pictures = [decode_image(read(ref), place=ref.uri or ref.sha256[:12]) for ref in refs]
        return joined([vlm.prepare(picture, alone=len(refs) == 1) for picture in pictures])

    def decode(token_ids: Sequence[int]) -> str:
        text = tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    return Engine(
        vlm.model,
        render=render,
        media=media,
        decode=decode,
        stop=vlm.stop,
        context=vlm.context,
        rows=1,
        encoded=False,
    )
