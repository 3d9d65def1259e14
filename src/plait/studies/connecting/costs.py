"""What a connector costs, itself and in the decoder's prefill: counted on torch's meta device, and timed."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.flop_counter import FlopCounterMode

from plait.models import specs
from plait.models.build import build_reading
from plait.models.connectors.measure import connector_account
from plait.models.crossattend import MediaView, install
from plait.models.multimodal import MultimodalLM
from plait.studies.connecting import parts, scenes, training
from plait.studies.connectors import Arm, ConnectorStudy

_ROUNDS = 7
"""Of which the median is taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A frozen tower and a frozen decoder.

    Attributes:
        name: For tables.
        family: Of the decoder.
        side: Cells a side of what the tower gives.
        d_in: Its width.
        d: Width of the decoder.
        d_ff: Inside its feed-forward networks.
        layers: Of the decoder.
        heads: Of its attention.
        text: Tokens of the prompt beside the picture's.
        bytes: Of a number in the cache of keys and values.
    """

    name: str
    family: Literal["gpt2", "llama"]
    side: int
    d_in: int
    d: int
    d_ff: int
    layers: int
    heads: int
    text: int
    bytes: int


LLAVA = Size(
    name="llava-1.5-7b", family="llama", side=24, d_in=1024, d=4096, d_ff=11008, layers=32, heads=32, text=40, bytes=2
)
"""CLIP ViT-L/14 at 336 pixels and a 7 B decoder, arXiv 2310.03744."""
LARGE: dict[str, specs.Connector] = {
    "linear": specs.Linear(),
    "mlp": specs.Mlp(norm=False),
    "shuffle-144": specs.Mlp(shuffle=2, norm=False),
    "qformer-32": specs.QFormer(),
    "resampler-64": specs.Resampler(),
    "gated": specs.GatedCrossAttention(every=4, resampler=None),
}
"""LLaVA's, LLaVA-1.5's, with 2 x 2 joined, BLIP-2's queries, Flamingo's latents, layers before every 4th."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a picture costs until the first word of the answer.

    Attributes:
        size: Of which parts.
        arm: The connector.
        trainable: Its weights.
        tokens: That it makes of a picture.
        slots: Places that these take in the decoder's text.
        connector_flops: One forward pass of it, for one picture.
        prefill_flops: Of the decoder with picture and prompt, layers that read inside it counted, without its head.
        flops: Both.
        cache_bytes: Keys and values of the picture's places, and what layers inside the decoder look at, which is kept
            for every further word.
    """

    size: str
    arm: str
    trainable: int
    tokens: int
    slots: int
    connector_flops: int
    prefill_flops: int
    flops: int
    cache_bytes: int


def size_of(study: ConnectorStudy) -> Size:
    """The study's own parts; a question has two words behind the first of the row."""
    language = study.language
    return Size(
        name="study",
        family="gpt2",
        side=scenes.SIDE,
        d_in=study.sight.d,
        d=language.d,
        d_ff=2 * language.d,
        layers=language.depth,
        heads=language.heads,
        text=3,
        bytes=4,
    )


def cost(arm: str, spec: specs.Connector, size: Size, *, times: int = 1) -> Cost:
    """Count.

    Args:
        arm: Name of the connector.
        spec: Its settings.
        size: What it connects.
        times: How often this connector stands one after the other; the first goes between the two widths.
    """
    found = connector_account(spec, cells=(size.side, size.side), d_in=size.d_in, d_out=size.d, layers=size.layers)
    more = [
        connector_account(spec, cells=(size.side, size.side), d_in=size.d, d_out=size.d, layers=size.layers)
        for _ in range(times - 1)
    ]
    inside = isinstance(spec, specs.GatedCrossAttention)
    prefill = prefill_flops(size, found.slots, reading=spec if inside else None, seen=found.tokens)
    flops = sum(one.flops for one in (found, *more))
    cached = 2 * size.layers * size.d * found.slots + (found.tokens * size.d_in if inside else 0)
    return Cost(
        size=size.name,
        arm=arm,
        trainable=sum(one.parameters for one in (found, *more)) + (size.d if inside else 0),  # the picture's mark
        tokens=found.tokens,
        slots=found.slots,
        connector_flops=flops,
        prefill_flops=prefill,
        flops=flops + prefill,
        cache_bytes=size.bytes * cached,
    )


def prefill_flops(size: Size, slots: int, *, reading: specs.GatedCrossAttention | None = None, seen: int = 0) -> int:
    """Operations of a decoder that reads a picture's places and a prompt, counted; without its head.

    Args:
        size: Of the decoder.
        slots: Places of the picture.
        reading: Layers inside it.
        seen: Tokens that these look at.

    Example:
        >>> size = Size(name="", family="gpt2", side=1, d_in=8, d=8, d_ff=16, layers=1, heads=1, text=4, bytes=4)
        >>> prefill_flops(size, 6) == 2 * 10 * (4 * 8 * 8 + 2 * 8 * 16) + 2 * 2 * 10 * 10 * 8
        True
    """
    tokens = slots + size.text
    with torch.device("meta"), torch.no_grad():
        decoder = _decoder(size, tokens)
        more: dict[str, Any] = {}
        if reading is not None:
            install(decoder, build_reading(reading, d_in=size.d_in, d=size.d, layers=size.layers))
            mask = torch.ones(1, 1, tokens, seen, dtype=torch.bool)
            more["media"] = MediaView(source=torch.zeros(1, seen, size.d_in), mask=mask)
        decoder.requires_grad_(requires_grad=False)
        with FlopCounterMode(display=False) as counter:
            decoder.base_model(
                inputs_embeds=torch.zeros(1, tokens, size.d),
                attention_mask=torch.zeros(1, 1, tokens, tokens),
                position_ids=torch.zeros(1, tokens, dtype=torch.long),
                use_cache=False,
                **more,
            )
    return counter.get_total_flops()


def _decoder(size: Size, tokens: int) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    common = {
        "vocab_size": 8,
        "hidden_size": size.d,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "max_position_embeddings": tokens,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    width = {"n_inner": size.d_ff} if size.family == "gpt2" else {"intermediate_size": size.d_ff}
    config = AutoConfig.for_model(size.family, **common, **width)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def costs(study: ConnectorStudy) -> list[dict[str, Any]]:
    """Of the study's connectors, and of published ones at LLaVA's size."""
    size = size_of(study)
    found = [
        cost(
            arm,
            parts.spec_of(arm, d_in=size.d_in, d=size.d, layers=size.layers),
            size,
            times=2 if arm == "mlp-4" else 1,
        )
        for arm in study.arms
    ]
    return [asdict(one) for one in (*found, *(cost(arm, spec, LLAVA) for arm, spec in LARGE.items()))]


def prefill_ms(study: ConnectorStudy, folder: Path) -> dict[Arm, float]:
    """Milliseconds from features to the first word of answers to a batch: the median of rounds that are interleaved.

    Args:
        study: The settings.
        folder: With the parts of the first seed.
    """
    kept = torch.load(folder / "sight-0" / parts.PREPARED, weights_only=True)
    tower = parts.make_tower(study.sight, kept["weights"])
    rng = parts.draws("times")
    scene = scenes.draw_scene(rng)
    questions = [q for q in (scenes.ask(scene, "count", rng) for _ in range(study.batch)) if q is not None]
    features = kept["features"]["blank"].expand(study.batch, -1, -1)
    models: dict[Arm, MultimodalLM] = {
        arm: parts.make_model(arm, tower, folder / "language-0" / "trained").model.eval() for arm in study.arms
    }
    taken: dict[Arm, list[float]] = {arm: [] for arm in study.arms}
    with torch.inference_mode():
        for _ in range(_ROUNDS + 1):
            for arm, model in models.items():
                slots = training.slots_of(model)
                batch = parts.make_batch([(slots, [question]) for question in questions], features)
                begun = time.perf_counter()
                model.prefill(batch)
                taken[arm].append(1000 * (time.perf_counter() - begun))
    return {arm: round(statistics.median(times[1:]), 2) for arm, times in taken.items()}  # the first round warms up
