"""How far a gradient moves when a step is computed in another way: micro-batches, packing, number format, and how.

One step of a small vision-language model (a Llama with grouped queries, LoRA on it, a connector) over 12 conversations
of different lengths, some with a picture. The reference is the whole batch at once, one conversation a row, nothing
fused or recomputed, in float64. Each line says by which share of its norm the gradient of all that learns differs from
the reference of its number format, and from the float64 one. In bfloat16 weights are float32, products are not.

Run: ``python benchmarks/exactness.py [--keep]``, seconds. Writes ``benchmarks/results/exactness.json``. A test holds
the bounds.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from plait import __version__
from plait.adapters.lora import Lora, attach
from plait.core.device import Compute, cpu_name
from plait.core.events import Events
from plait.core.files import write_json
from plait.core.types import MediaRef
from plait.data.conversations import Conversation, ConversationBatches
from plait.data.features import FeatureStore
from plait.data.template import Rendered
from plait.models.composition import Mixture
from plait.models.connectors.projection import Mlp
from plait.models.documents import read_by_document
from plait.models.mixtral import take_experts
from plait.models.multimodal import MultimodalLM
from plait.objectives.language import NextToken
from plait.training.computed import computed
from plait.training.gradient import accumulate
from plait.training.precision import autocast
from plait.training.settings import Settings

RESULTS = Path(__file__).parent / "results" / "exactness.json"
WORDS, PLACE, WIDTH = 96, 96, 6
LENGTHS = (9, 31, 14, 22, 12, 40, 17, 26, 11, 35, 19, 28)
FORMATS = ("float64", "float32", "bfloat16")
BOUNDS: Mapping[str, float] = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 0.02}
"""What the test allows within a number format; bfloat16 rounds to 3 digits in other places."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How a step is computed."""

    dtype: str
    pieces: int = 1
    packed: bool = False
    by_document: bool = True
    head: str = "full"
    recompute: str = "none"

    def __str__(self) -> str:
        rows = "packed" if self.packed else "one a row"
        if self.packed and not self.by_document:
            rows += ", one mask"
        several = "es" if self.pieces > 1 else ""
        return f"{rows}; {self.pieces} micro-batch{several}; head {self.head}; recompute {self.recompute}"


def ways() -> list[Way]:
    """Micro-batches x packing in every format; head and recomputation once each."""
    found = [
        Way(dtype=dtype, pieces=pieces, packed=packed, head="fused")
        for dtype, packed, pieces in itertools.product(FORMATS, (False, True), (1, 2, 4))
    ]
    for dtype in FORMATS:
        found += [
            Way(dtype=dtype, packed=True, by_document=False, head="fused"),
            Way(dtype=dtype, packed=True, pieces=2, recompute="full"),
            Way(dtype=dtype, packed=True, pieces=2, head="fused", recompute="selective"),
        ]
    return found


def conversations() -> list[Conversation]:
    """Two of three have a picture of four tokens; a third of each is trained."""
    found = []
    for number, length in enumerate(LENGTHS):
        draw = random.Random(number)
        picture = number % 3 != 0
        ref = MediaRef(modality="image", sha256=f"{number:064}", uri=f"{number}.png")
        words = tuple(draw.randrange(WORDS) for _ in range(length))
        rendered = Rendered(
            token_ids=(words[0], *([PLACE] * 4), *words[1:]) if picture else words,
            trained=tuple([False] * (5 if picture else 1) + [place % 3 == 0 for place in range(1, length)]),
            media=(ref,) if picture else (),
            slots=(4,) if picture else (),
        )
        found.append(Conversation(id=f"c{number}", task="any", rendered=rendered))
    return found


def features() -> FeatureStore:
    """Of the pictures, drawn."""
    store = FeatureStore(WIDTH, torch.float32)
    for number in range(len(LENGTHS)):
        generator = torch.Generator().manual_seed(number)
        store.add(torch.randn(4, WIDTH, generator=generator), [(f"{number:064}", 1, 2, 2)])
    return store


def model(*, by_document: bool, kv_heads: int = 2, layers: int = 3, mixture: Mixture | None = None) -> MultimodalLM:
    """The same weights each time; float64."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": WORDS,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": True,
    }
    if mixture is None:
        decoder = LlamaForCausalLM(LlamaConfig(**sizes))
    else:
        chosen = {"num_local_experts": mixture.experts, "num_experts_per_tok": mixture.top_k}
        decoder = MixtralForCausalLM(MixtralConfig(**sizes | {"intermediate_size": 16}, **chosen))
        for name, weight in decoder.named_parameters():
            if name.endswith("mlp.gate.weight"):
                nn.init.normal_(weight, std=0.5)  # or experts are chosen by a hair
        take_experts(decoder, capacity=mixture.capacity)
    if by_document:
        read_by_document(decoder)
    else:
        decoder.set_attn_implementation("sdpa")
    targets = ("q_proj", "v_proj", "down_proj") if mixture is None else ("q_proj", "v_proj")
    attach(decoder, Lora(rank=4, alpha=8.0, targets=targets))
    for name, weight in decoder.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)
    built = MultimodalLM({}, {"image": Mlp(WIDTH, 16, 32)}, decoder, placeholder=PLACE)
    return built.double().train()


def gradient(way: Way) -> Tensor:
    """Of all that learns, as one float64 vector."""
    built = model(by_document=way.by_document)
    if way.dtype != "float64":
        built.float()
    source = ConversationBatches(
        conversations=conversations(),
        weights={"any": 1.0},
        stores=[features()],
        grid_out=lambda grid: grid,
        batch_size=len(LENGTHS),
        row=64,
        pad=0,
        steps=1,
        seed=0,
        pieces=way.pieces,
        packed=way.packed,
    )
    compute = Compute(device="cpu", dtype=way.dtype, threads=1, why=())
    settings = Settings(steps=1, compute=compute, head=way.head, recompute=way.recompute)  # pyright: ignore[reportArgumentType]
    around = (lambda: autocast("cpu", "bfloat16")) if way.dtype == "bfloat16" else (lambda: autocast("cpu", "float32"))
    with computed(built, settings, events=Events()):
        accumulate(built, NextToken(), source.step_batches(0), weights={}, around=around)
    return torch.cat([w.grad.double().flatten() for w in built.parameters() if w.grad is not None])


def measure(compute: Callable[[Way], Tensor] = gradient) -> list[dict[str, Any]]:
    """A record for each way: how far it is from the reference of its format, and from the float64 one."""
    exact = compute(Way(dtype="float64"))
    records = []
    for dtype in FORMATS:
        reference = compute(Way(dtype=dtype))
        for way in (way for way in ways() if way.dtype == dtype):
            found = compute(way)
            records.append(
                {
                    "format": dtype,
                    "way": str(way),
                    "from_reference": float((found - reference).norm() / reference.norm()),
                    "from_float64": float((found - exact).norm() / exact.norm()),
                }
            )
    return records


def table(records: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| format | way | from the whole batch | from float64 |", "|---|---|---|---|"]
    lines += [f"| {r['format']} | {r['way']} | {r['from_reference']:.1e} | {r['from_float64']:.1e} |" for r in records]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="How far a gradient moves when a step is computed in another way.")
    parser.add_argument("--keep", action="store_true", help="write the figures")
    args = parser.parse_args()
    records = measure()
    print(table(records))
    if args.keep:
        versions = {"plait": __version__, "torch": torch.__version__}
        record = {"date": str(datetime.date.today()), "cpu": cpu_name(), **versions, "bounds": dict(BOUNDS)}
        write_json(RESULTS, record | {"rows": records})


if __name__ == "__main__":
    main()
