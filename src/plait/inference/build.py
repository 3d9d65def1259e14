"""A loaded model to an engine: one place where pictures become features, by cache or by bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from plait.assembly.media_towers import read_media
from plait.assembly.multimodal import Multimodal
from plait.core.tensors import Patches
from plait.core.types import MediaRef, Turn
from plait.data.collate import joined
from plait.inference.engine import Engine, Prompt


def build_engine(
    built: Multimodal, media: Callable[[Sequence[MediaRef]], Patches], *, rows: int = 32, context: int = 0
) -> Engine:
    """An engine around a loaded model.

    Args:
        built: In eval mode.
        media: Pictures to features of the model's tower: a feature cache, or :func:`encode_pictures`.
        rows: Requests answered together.
        context: Most tokens of prompt and answer; 0 takes the decoder's own.
    """
    template = built.template
    tokenizer = built.language.tokenizer

    def render(turns: Sequence[Turn]) -> Prompt:
        rendered = template.turns(turns, prompt=True)
        return Prompt(token_ids=rendered.token_ids, media=rendered.media)

    def decode(token_ids: Sequence[int]) -> str:
        text = tokenizer.decode(list(token_ids), skip_special_tokens=True)
        assert isinstance(text, str)
        return text

    return Engine(
        built.model,
        render=render,
        media=media,
        decode=decode,
        stop=built.stop,
        context=context or built.context,
        rows=rows,
        encoded=True,
    )


def encode_pictures(built: Multimodal, read: Callable[[MediaRef], bytes]) -> Callable[[Sequence[MediaRef]], Patches]:
    """Features of pictures, sounds and videos from their bytes, by the media contract the model was trained with.

    Args:
        built: Whose towers and contracts.
        read: Bytes of one of them.
    """

    def media(refs: Sequence[MediaRef]) -> Patches:
        tower = built.towers[refs[0].modality]
        raw = [read_media(tower, read(ref), place=ref.uri or ref.sha256[:12]) for ref in refs]
        with torch.inference_mode():
            return tower.encoder(joined(raw))

    return media
