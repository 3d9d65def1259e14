"""What models of the study are made of: a tokenizer of its words, a decoder, a tower, a connector between them."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from plait.assembly.language import CHATML, load_language, new_language
from plait.assembly.local import quiet
from plait.assembly.media_towers import Tower
from plait.assembly.multimodal import Multimodal, build_multimodal
from plait.assembly.smollm import LanguageModel
from plait.assembly.towers import ImageTower, scratch_tower
from plait.core.tensors import IGNORE, Batch, Patches
from plait.core.types import Modality
from plait.models import specs
from plait.models.build import build_connector
from plait.models.composition import Connectors, NewDecoder, PretrainedDecoder
from plait.models.connectors.measure import connector_account
from plait.models.connectors.projection import Chain
from plait.models.crossattend import plain
from plait.models.multimodal import MultimodalLM
from plait.studies.connecting.scenes import (
    BEGIN,
    COLORS,
    END,
    GLYPHS,
    IDS,
    PAD,
    PIXELS,
    PLACES,
    SIDE,
    WORDS,
    Question,
    spoken,
)
from plait.studies.connectors import Arm, Language, Sight

CELLS = SIDE**2
"""Tokens that the tower makes of a picture."""
CONTEXT = 256
"""Most tokens of a row."""
PREPARED = "tower.pt"
"""File of a tower and the features of its pictures."""
_HEADS, _DEPTH = 4, 3
_SPREAD, _QUERY = 4.0, 0.15

Row = tuple[Sequence[int], Sequence[Question]]
"""What stands for the scene, as ids, and questions about it."""


def spec_of(arm: Arm, *, d_in: int, d: int, layers: int) -> specs.Connector:
    """Settings of a connector, as a recipe would give them; of ``mlp-4`` those of each of its two parts.

    Args:
        arm: Its name.
        d_in: Width of the tower.
        d: Width of the decoder.
        layers: Of the decoder.
    """
    match arm:
        case "linear":
            return specs.Linear()
        case "mlp" | "mlp-4":
            return specs.Mlp(norm=False)  # as LLaVA-1.5 has it, and as `linear` has none
        case "mlp-wide":
            return specs.Mlp(norm=False, d_hidden=_equal_width(d_in=d_in, d=d, layers=layers))
        case "shuffle-4":
            return specs.Mlp(norm=False, shuffle=2)
        case "qformer-16" | "qformer-4":
            count = int(arm.removeprefix("qformer-"))
            return specs.QFormer(queries=count, d=d, depth=2, every=1, heads=_HEADS, dropout=0.0)
        case "resampler-4":
            return specs.Resampler(queries=4, depth=_DEPTH, heads=_HEADS)
        case "gated":
            return specs.GatedCrossAttention(every=1, heads=_HEADS, resampler=None)


def _equal_width(*, d_in: int, d: int, layers: int) -> int:
    """Hidden width at which an MLP has as many weights as the layers that read inside the decoder."""

    def weights(spec: specs.Connector) -> int:
        return connector_account(spec, cells=(SIDE, SIDE), d_in=d_in, d_out=d, layers=layers).parameters

    gated = weights(specs.GatedCrossAttention(every=1, heads=_HEADS, resampler=None)) + d  # and the picture's mark
    one, two = (weights(specs.Mlp(norm=False, d_hidden=width)) for width in (1, 2))
    return 1 + round((gated - one) / (two - one))


def tokenizer_folder(folder: Path) -> Path:
    """Write the study's words as a tokenizer, beside a decoder of no use: Hugging Face's layout wants one."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel(dict(IDS), unk_token=PAD))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, bos_token=BEGIN, eos_token=END, chat_template=CHATML
    )
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    with quiet():
        LlamaForCausalLM(config).save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
    return folder


def decoder_spec(language: Language, tokenizer: Path) -> NewDecoder:
    """Settings of the decoder."""
    return NewDecoder(
        model_type="gpt2",
        tokenizer=str(tokenizer),
        d=language.d,
        d_ff=2 * language.d,
        depth=language.depth,
        heads=language.heads,
        context=CONTEXT,
    )


def tower_spec(sight: Sight) -> specs.ViT:
    """Settings of the tower: a patch is a cell."""
    return specs.ViT(
        size=SIDE * PIXELS, patch=PIXELS, d=sight.d, depth=sight.depth, heads=sight.heads, class_token=False
    )


def reader(language: Language, tokenizer: Path) -> tuple[MultimodalLM, LanguageModel]:
    """A new decoder that learns, in a model that could read pictures but is given none."""
    spec = decoder_spec(language, tokenizer)
    found = new_language(spec)
    begin(found.model)
    found.model.requires_grad_(requires_grad=True)
    connectors = Connectors(image=specs.Linear())
    towers: dict[Modality, Tower] = {"image": scratch_tower(tower_spec(Sight(d=8, depth=1, heads=1)))}
    built = build_multimodal(towers, found, connectors, decoder=spec, whole=True)
    return built.model, found


@torch.no_grad()
def begin(decoder: nn.Module) -> None:
    """Draw a GPT-2 so that it learns to look things up in a minute rather than in an hour.

    Mimetic initialization (arXiv 2305.09828, with another sign): queries meet equal keys, and what attention finds is
    added as it is. Words that name two things begin as their sum, and the place of a cell as the word for it. All of it
    may change in training.
    """
    for weight in decoder.parameters():
        if weight.dim() > 1:  # drawn with a deviation of 0.02, which is for larger widths
            weight.mul_(_SPREAD)
    for name, weight in decoder.named_parameters():
        d = len(weight)
        if name.endswith("attn.c_attn.weight"):
            weight[:, :d] = weight[:, d : 2 * d] = _QUERY * torch.randn(d, d)
            weight[:, 2 * d :] = nn.init.orthogonal_(torch.empty(d, d))
            decoder.get_parameter(name.replace("c_attn", "c_proj")).copy_(weight[:, 2 * d :].T)
    words, places = (decoder.get_parameter(f"transformer.{name}.weight") for name in ("wte", "wpe"))
    for color in COLORS:
        for glyph in GLYPHS:
            words[IDS[f"{color}-{glyph}"]] = words[IDS[color]] + words[IDS[glyph]]
    for number, place in enumerate(PLACES, 1):  # behind the first word of the row
        places[number] = words[IDS[place]]


def save_language(found: LanguageModel, folder: Path) -> None:
    """Write a decoder with its tokenizer, in Hugging Face's layout."""
    with quiet():
        found.model.save_pretrained(str(folder))
        found.tokenizer.save_pretrained(str(folder))


def make_tower(sight: Sight, weights: dict[str, Tensor]) -> ImageTower:
    """A tower with these weights, frozen."""
    tower = scratch_tower(tower_spec(sight))
    assert isinstance(tower.encoder, nn.Module)
    tower.encoder.load_state_dict(weights)
    tower.encoder.eval().requires_grad_(requires_grad=False)
    return tower


def make_model(arm: Arm, tower: ImageTower, decoder: Path) -> Multimodal:
    """A frozen tower and a frozen decoder with a connector between them, its weights drawn from torch's generator."""
    language = load_language(str(decoder), dtype="float32")
    config = language.model.config
    d_in, d = tower.encoder.d_out, language.width
    spec = spec_of(arm, d_in=d_in, d=d, layers=config.num_hidden_layers)
    built = build_multimodal(
        {"image": tower}, language, Connectors(image=spec), decoder=PretrainedDecoder(name=str(decoder))
    )
    if arm == "mlp-4":
        parts: list[Any] = [build_connector(spec, d_in=width, d_out=d) for width in (d_in, d)]
        built.model.connectors["image"] = Chain(*parts)
    return built


def learning(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights that learn."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def fingerprint(module: nn.Module) -> str:
    """Digest of every weight and buffer, byte by byte, whether it learns or not; of a decoder without its readers."""
    digest = hashlib.sha256()
    with plain(module) if isinstance(module, PreTrainedModel) else nullcontext():
        for name, value in sorted(module.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def make_batch(rows: Sequence[Row], features: Tensor | None = None) -> Batch:
    """Rows padded behind; loss on answers alone.

    Args:
        rows: In order.
        features: Of the picture of each row, ``b cells d``; None: the rows have none.
    """
    ids: list[list[int]] = []
    targets: list[list[int]] = []
    for scene, questions in rows:
        line = [IDS[BEGIN], *scene]
        target = [IGNORE] * len(line)
        for question in questions:
            for word, answers in spoken(question):
                line.append(IDS[word])
                target.append(IDS[word] if answers else IGNORE)
        ids.append(line)
        targets.append(target)
    longest = max(map(len, ids))
    fill = [longest - len(line) for line in ids]
    media: dict[Any, Patches] = {}
    item_row: dict[Any, Tensor] = {}
    if features is not None:
        grid = torch.tensor([[1, SIDE, SIDE]]).expand(len(rows), -1)
        media["image"] = Patches(values=features.flatten(0, 1), grid=grid)
        item_row["image"] = torch.arange(len(rows))
    return Batch(
        token_ids=torch.tensor([line + [0] * n for line, n in zip(ids, fill, strict=True)]),
        labels=torch.tensor([line + [IGNORE] * n for line, n in zip(targets, fill, strict=True)]),
        segment_ids=torch.tensor([[1] * len(line) + [0] * n for line, n in zip(ids, fill, strict=True)]),
        media=media,
        item_row=item_row,
        sample_ids=tuple(str(i) for i in range(len(rows))),
        encoded=True,
    )


def draws(*key: object) -> random.Random:
    """Draws of their own for each key."""
    return random.Random(repr(key))
