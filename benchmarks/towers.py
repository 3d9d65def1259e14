"""Own towers beside Hugging Face's classes with the same weights: items a second, forward alone and with backward.

Both sides get the same input, give the same values (checked first) and run in turn, so that a busy moment hits both
alike; figures are medians, ratios are medians over pairs. FLOPs of both are counted, not assumed. Ours starts from raw
pixels and normalizes them; theirs gets them normalized. Aim: at least 1.0 times everywhere, 1.2 where packing helps.

Run: ``python benchmarks/towers.py [--rounds 7] [--only vit]``; writes ``benchmarks/results/towers.json``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from plait import __version__
from plait.core.device import cpu_name, usable_cores
from plait.core.files import write_json
from plait.models.hub import bert, clip, gpt2, resnet, swin, vit
from plait.models.towers.resnet import ResNet
from plait.models.towers.swin import Swin
from plait.models.towers.text_transformer import TextTransformer
from plait.models.towers.vit import VisionTransformer

RESULTS = Path(__file__).parent / "results" / "towers.json"
Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Pair:
    """Two models with the same weights on the same input.

    Attributes:
        ours: Model and call.
        theirs: Model and call.
        items: Pictures or real tokens of a call.
        unit: What is counted.
        same: Whether two results are the same function; padding makes rows that nobody reads.
    """

    ours: tuple[nn.Module, Call]
    theirs: tuple[nn.Module, Call]
    items: int
    unit: str
    same: Callable[[Tensor, Tensor], bool]


def saved(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and weights as ``save_pretrained`` writes them."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)  # pyright: ignore[reportCallIssue]
        return json.loads((Path(folder) / "config.json").read_text()), load_file(Path(folder) / "model.safetensors")


def close(a: Tensor, b: Tensor) -> bool:
    """Within what number formats allow."""
    return bool((a.float() - b.float()).norm() / b.float().norm() < (1e-4 if a.dtype == torch.float32 else 0.03))


def picture_pair(kind: str, dtype: torch.dtype, *, size: int = 224, batch: int = 8) -> Pair:
    """A picture tower: all tokens of its last layer."""
    torch.manual_seed(0)
    pixels = torch.rand(batch, 3, size, size)
    match kind:
        case "ViT-S/16":
            sizes = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
            theirs = transformers.ViTModel(transformers.ViTConfig(**sizes))
            record, state = saved(theirs)
            ours = VisionTransformer(vit.sizes_from(record))
            ours.load_state_dict(vit.to_ours(state))
            call, reference = lambda: ours.tokens(pixels), lambda x: theirs(x).last_hidden_state
        case "CLIP ViT-B/32":
            theirs = transformers.CLIPVisionModel(transformers.CLIPVisionConfig())
            record, state = saved(theirs)
            ours = VisionTransformer(clip.vision_sizes_from(record))
            named = clip.to_ours(state)
            ours.load_state_dict({name.removeprefix("vision."): value for name, value in named.items()})
            call, reference = lambda: ours.tokens(pixels), lambda x: theirs(x).last_hidden_state
        case "Swin-T":
            theirs = transformers.SwinModel(transformers.SwinConfig())
            record, state = saved(theirs)
            ours = Swin(swin.sizes_from(record))
            ours.load_state_dict(swin.to_ours(state))
            call, reference = lambda: ours.features(pixels).flatten(2).mT, lambda x: theirs(x).last_hidden_state
        case _:
            theirs = transformers.ResNetModel(transformers.ResNetConfig())
            record, state = saved(theirs)
            ours = ResNet(resnet.sizes_from(record))
            ours.load_state_dict(resnet.to_ours(state))
            call, reference = lambda: ours.features(pixels), lambda x: theirs(x).last_hidden_state
    # Without random depth, the same function of the same input; batch norm counts in its training form on both sides.
    for model in (ours, theirs):
        model.to(dtype).eval()
    normalized = ((pixels - ours.normalize.mean.float()) / ours.normalize.std.float()).to(dtype)
    return Pair(
        ours=(ours, call), theirs=(theirs, lambda: reference(normalized)), items=batch, unit="pictures", same=close
    )


def text_pair(kind: str, dtype: torch.dtype, *, packed: bool) -> Pair:
    """A text model on 32 texts of 8 to 128 tokens: ours in packed rows of 128 or padded alike, theirs padded."""
    torch.manual_seed(0)
    lengths = [8, 12, 16, 16, 20, 24, 28, 32, 40, 48, 64, 72, 88, 96, 112, 128] * 2
    if kind == "BERT (MiniLM-L6's size)":
        sizes = {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536, "num_hidden_layers": 6}
        theirs: Any = transformers.BertModel(transformers.BertConfig(**sizes), add_pooling_layer=True)
        layout = bert
    else:
        theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=384, n_head=6, n_layer=6, vocab_size=8192))
        layout = gpt2
    record, state = saved(theirs)
    ours = TextTransformer(layout.sizes_from(record))
    ours.load_state_dict(layout.to_ours(state))
    for model in (ours, theirs):
        model.to(dtype).eval()
    texts = [torch.randint(1, 8000, (n,)) for n in lengths]
    padded = nn.utils.rnn.pad_sequence(texts, batch_first=True)
    real = torch.arange(padded.shape[1])[None] < torch.tensor(lengths)[:, None]
    inner = theirs if layout is bert else theirs.transformer

    def reference() -> Tensor:
        return inner(padded, attention_mask=real.long()).last_hidden_state[real]

    rows, segments, order = pack(texts) if packed else (padded, real.long(), None)

    def call() -> Tensor:
        hidden = ours(rows, segment_ids=segments)[segments != 0]
        return hidden if order is None else hidden[order]

    return Pair(ours=(ours, call), theirs=(theirs, reference), items=sum(lengths), unit="tokens", same=close)


def pack(texts: list[Tensor], row: int = 128) -> tuple[Tensor, Tensor, Tensor]:
    """Texts in rows of 128, best fit; ids, segments, and where each text's tokens went, in the texts' order."""
    space: list[int] = []
    members: list[list[int]] = []
    for number in sorted(range(len(texts)), key=lambda i: -len(texts[i])):
        fitting = [i for i, left in enumerate(space) if left >= len(texts[number])]
        at = min(fitting, key=lambda i: space[i]) if fitting else len(space)
        if not fitting:
            space.append(row)
            members.append([])
        space[at] -= len(texts[number])
        members[at].append(number)
    ids, segments = torch.zeros(len(space), row, dtype=torch.long), torch.zeros(len(space), row, dtype=torch.long)
    start: dict[int, int] = {}
    done = 0
    for r, listed in enumerate(members):
        at = 0
        for s, number in enumerate(listed, 1):
            end = at + len(texts[number])
            ids[r, at:end], segments[r, at:end] = texts[number], s
            start[number] = done + at
            at = end
        done += at
    order = torch.cat([torch.arange(start[i], start[i] + len(text)) for i, text in enumerate(texts)])
    return ids, segments, order


def timed(model: nn.Module, call: Call, *, backward: bool) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    with torch.set_grad_enabled(backward):
        found = call()
        if backward:
            found.float().square().mean().backward()
    took = time.perf_counter() - started
    model.zero_grad(set_to_none=True)
    return took


def measure(pair: Pair, *, rounds: int, backward: bool) -> dict[str, Any]:
    """Medians of both sides and of the ratio of each pair."""
    flops = {}
    for side in ("ours", "theirs"):
        counter = FlopCounterMode(display=False)
        with counter:
            getattr(pair, side)[1]()
        flops[side] = counter.get_total_flops()
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    for number in range(rounds + 1):
        for side in ("ours", "theirs") if number % 2 else ("theirs", "ours"):
            took = timed(*getattr(pair, side), backward=backward)
            if number:  # the first of each plans its kernels
                times[side].append(took)
    ratios = [b / a for a, b in zip(times["ours"], times["theirs"], strict=True)]
    return {
        "unit": pair.unit,
        "ours_per_s": pair.items / statistics.median(times["ours"]),
        "theirs_per_s": pair.items / statistics.median(times["theirs"]),
        "ratio": statistics.median(ratios),
        "ratio_least": min(ratios),
        "ratio_most": max(ratios),
        "gflops_ours": flops["ours"] / 1e9,
        "gflops_theirs": flops["theirs"] / 1e9,
        "rounds": rounds,
    }


def main() -> None:
    """Measure every case and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="only cases whose name has this in it")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    cases: dict[str, Callable[[torch.dtype], Pair]] = {
        **{
            name: (lambda dtype, name=name: picture_pair(name, dtype))
            for name in ("ViT-S/16", "CLIP ViT-B/32", "Swin-T", "ResNet-50")
        },
        "Swin-T, 256 px": lambda dtype: picture_pair("Swin-T", dtype, size=256),
        **{
            f"{name}, {'packed' if packed else 'padded'}": (
                lambda dtype, name=name, packed=packed: text_pair(name, dtype, packed=packed)
            )
            for name in ("BERT (MiniLM-L6's size)", "GPT-2 (6 x 384)")
            for packed in (False, True)
        },
    }
    rows = []
    for name, make in cases.items():
        if args.only not in name:
            continue
        for dtype in (torch.float32, torch.bfloat16):
            pair = make(dtype)
            with torch.no_grad():
                assert pair.same(pair.ours[1](), pair.theirs[1]()), f"{name}: the two sides differ"
            for backward in (False, True):
                row = {"case": name, "dtype": str(dtype).removeprefix("torch."), "backward": backward}
                row |= measure(pair, rounds=args.rounds, backward=backward)
                rows.append(row)
                print(
                    f"| {name} | {row['dtype']} | {'forward + backward' if backward else 'forward'} "
                    f"| {row['ours_per_s']:,.1f} | {row['theirs_per_s']:,.1f} | {row['ratio']:.2f} "
                    f"({row['ratio_least']:.2f} to {row['ratio_most']:.2f}) "
                    f"| {row['gflops_ours']:,.1f} / {row['gflops_theirs']:,.1f} |",
                    flush=True,
                )
    if args.only:
        return
    machine = {"cpu": cpu_name(), "cores": usable_cores(), "load_before": os.getloadavg()[0]}
    versions = {"plait": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    write_json(RESULTS, {"date": str(datetime.date.today()), **machine, **versions, "rows": rows})


if __name__ == "__main__":
    main()
