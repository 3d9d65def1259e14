"""What a decoder costs, from its shape alone: FLOPs, activations, time. Stages make their estimates from this.

Letters: N weights in matrix products, D tokens, ``b`` rows, ``t`` positions, ``h`` heads, ``d`` width, ``f`` width of
the feed-forward, ``s`` bytes a number.

A product of N weights with D tokens is 2ND operations forward, 2ND for the gradient of its input and 2ND for the
gradient of its weights. So a trained part costs 6ND (Kaplan et al. 2020, section 2.1), a frozen part that gradients
only flow *through* 4ND, and a frozen part before the first trained weight 2ND. Attention adds QKᵀ and AV,
4·b·t²·h·d_head a layer forward, and twice that backward whether or not weights are trained.
``tests/parity/test_cost_flops.py`` holds this to torch's own counter.

Example:
    >>> work = decoder_flops(SMOLLM2_135M, rows=64, length=20, head_positions=0, gradients="through")
    >>> f"{work / 1e12:.2f} TFLOP a step"
    '0.55 TFLOP a step'
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from plait.core.estimate import Estimate, Machine, made_before
from plait.core.files import read_json
from plait.models.head_room import scores_held

Gradients = Literal["none", "through", "full"]
"""What backward does in a part: nothing, gradients of inputs only (frozen weights), or of inputs and weights."""

Attention = Literal["eager", "sdpa"] | int
"""How scores are computed: all at once, fused, or (:mod:`plait.models.documents`) by document, of so many tokens."""

Recompute = Literal["none", "full", "selective"]
"""What blocks do again in the backward pass (:mod:`plait.models.recompute`)."""

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
"""Bytes a number."""

EFFICIENCY: dict[str, tuple[float, float]] = {"float32": (0.40, 0.85), "bfloat16": (0.10, 0.40)}
"""Share of the measured matrix rate that a step of a small decoder reaches, low and high.

SmolLM2's shape, 16 to 64 rows of 20 tokens, seen here: 0.45 to 0.86 in float32; 0.08 to 0.56 in bfloat16, where AMX
makes products so fast that everything else dominates (0.22 to 0.30 on a quiet machine).
"""

_WIDENED = 2_048  # words of a 16-bit head that are widened at once
_WIDE = 64  # products over so many numbers or more are kept by selective recomputation
_RANDOM = 5_056  # the state of torch's generator, which every recomputed block keeps
_UNMEASURED = 3.0
_FACTOR: dict[Gradients, int] = {"none": 2, "through": 4, "full": 6}
_INPUT_OF = {
    "q_proj": "norm1",
    "k_proj": "norm1",
    "v_proj": "norm1",
    "o_proj": "attention",
    "gate_proj": "norm2",
    "up_proj": "norm2",
    "down_proj": "product",
}
"""Which tensor a linear layer reads; layers that read the same one keep it once."""


# --- shapes --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderShape:
    """Sizes of a Llama-like decoder: RMSNorm, rotary positions, grouped-query attention, gated feed-forward, no biases.

    ``d_head`` 0 means ``d_model // heads``; ``tied`` means that the head is the embedding. With ``experts``, each layer
    has so many feed-forward networks and a router, and a token passes ``top_k`` of them.

    What one of several processes has may come with ``pieces``: so many keep each their own positions of what is between
    the matrices, and of what norms give these (:mod:`plait.training.parallel.sequence`).
    """

    layers: int
    d_model: int
    d_ff: int
    heads: int
    kv_heads: int
    vocab: int
    d_head: int = 0
    tied: bool = True
    experts: int = 0
    top_k: int = 1
    pieces: int = 1

    @classmethod
    def from_config(cls, config: Any) -> DecoderShape:
        """From a Hugging Face configuration with Llama's names (or its ``text_config``)."""
        config = getattr(config, "text_config", config)
        return cls(
            layers=config.num_hidden_layers,
            d_model=config.hidden_size,
            d_ff=config.intermediate_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            vocab=config.vocab_size,
            d_head=getattr(config, "head_dim", None) or 0,
            tied=bool(config.tie_word_embeddings),
            experts=getattr(config, "num_local_experts", None) or 0,
            top_k=getattr(config, "num_experts_per_tok", None) or 1,
        )

    @classmethod
    def of_folder(cls, folder: Path) -> DecoderShape | None:
        """From a model folder's ``config.json``; None where it has other names than Llama's."""
        config = read_json(folder / "config.json")
        config = config.get("text_config", config)
        try:
            return cls.from_config(SimpleNamespace(**{"tie_word_embeddings": False, **config}))
        except AttributeError:
            return None

    @property
    def d_attention(self) -> int:
        """Width of all query heads together."""
        return self.heads * (self.d_head or self.d_model // self.heads)

    @property
    def d_kv(self) -> int:
        """Width of all key heads together, and of all value heads."""
        return self.kv_heads * (self.d_head or self.d_model // self.heads)

    def matrices(self) -> dict[str, tuple[int, int]]:
        """The linear layers of one block: name → (inputs, outputs)."""
        return {
            "q_proj": (self.d_model, self.d_attention),
            "k_proj": (self.d_model, self.d_kv),
            "v_proj": (self.d_model, self.d_kv),
            "o_proj": (self.d_attention, self.d_model),
            "gate_proj": (self.d_model, self.d_ff),
            "up_proj": (self.d_model, self.d_ff),
            "down_proj": (self.d_ff, self.d_model),
        }

    @property
    def linear_params(self) -> int:
        """Weights of all blocks that take part in a token's matrix products; without embedding and head."""
        return self.layers * (
            sum(a * b for a, b in self.matrices().values())
            + (self.top_k - 1) * self.expert_params
            + self.d_model * self.experts
        )

    @property
    def expert_params(self) -> int:
        """Weights of one feed-forward network."""
        return 3 * self.d_model * self.d_ff

    @property
    def params(self) -> int:
        """All weights; a tied head counts once."""
        norms = (2 * self.layers + 1) * self.d_model
        idle = self.layers * max(0, self.experts - self.top_k) * self.expert_params
        return self.linear_params + idle + norms + self.vocab * self.d_model * (1 if self.tied else 2)


SMOLLM2_135M = DecoderShape(layers=30, d_model=576, d_ff=1536, heads=9, kv_heads=3, vocab=49_152)


def planned_decoder(before: Mapping[str, Estimate], machine: Machine) -> tuple[DecoderShape, str]:
    """Sizes and number format of the decoder that the last stage before leaves; SmolLM2's where none is planned."""
    made = made_before(before)
    if made is None or not made.decoder:
        return SMOLLM2_135M, machine.dtype
    return DecoderShape(**dict[str, Any](made.decoder)), made.decoder_dtype or machine.dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """Low-rank adapters on linear layers of every block.

    Attributes:
        rank: Inner width.
        targets: Names of :meth:`DecoderShape.matrices`.
    """

    rank: int
    targets: tuple[str, ...] = ("q_proj", "v_proj")

    def params(self, shape: DecoderShape) -> int:
        """Weights of all adapters on ``shape``."""
        sizes = shape.matrices()
        return shape.layers * sum(self.rank * sum(sizes[name]) for name in self.targets)


# --- FLOPs ---------------------------------------------------------------------------------------------------------


def linear_flops(params: int, tokens: int, gradients: Gradients) -> float:
    """Operations of matrix products: 2ND, 4ND or 6ND."""
    return float(_FACTOR[gradients]) * params * tokens


def attention_flops(shape: DecoderShape, *, rows: int, queries: int, keys: int, gradients: Gradients) -> float:
    """QKᵀ and AV of all layers: full squares, since the causal half is computed too and masked."""
    forward = 4.0 * shape.layers * rows * queries * keys * shape.d_attention
    return forward * (1 if gradients == "none" else 3)


def decoder_flops(
    shape: DecoderShape,
    *,
    rows: int,
    length: int,
    gradients: Gradients,
    head_positions: int | None = None,
    lora: Lora | None = None,
    recompute: Recompute = "none",
) -> float:
    """One pass over ``rows`` × ``length`` positions: forward, and whatever ``gradients`` asks of backward.

    Args:
        shape: The decoder.
        rows: Rows of the batch.
        length: Positions a row, padding included.
        gradients: For the decoder's own weights.
        head_positions: Positions at which logits are computed, over all rows; None means all.
        lora: Adapters, always trained.
        recompute: ``full`` runs the blocks forward once more, up to their last product; ``selective`` attention in
            steps (fused attention is kept, and not counted apart here).
    """
    tokens = rows * length
    head = tokens if head_positions is None else head_positions
    again = 0.0
    if recompute == "full" and gradients != "none":
        again = decoder_flops(shape, rows=rows, length=length, gradients="none", head_positions=0)
        again -= linear_flops(shape.layers * shape.d_ff * shape.d_model, tokens, "none")
        again += linear_flops(lora.params(shape), tokens, "none") if lora else 0.0
    elif recompute == "selective" and gradients != "none":
        again = attention_flops(shape, rows=rows, queries=length, keys=length, gradients="none")
    return again + (
        linear_flops(shape.linear_params, tokens, gradients)
        + linear_flops(shape.vocab * shape.d_model, head, gradients)
        + attention_flops(shape, rows=rows, queries=length, keys=length, gradients=gradients)
        + (linear_flops(lora.params(shape), tokens, "full") if lora else 0.0)
    )


def generate_flops(shape: DecoderShape, *, rows: int, prompt: int, new: int) -> float:
    """Decoding with a cache: the prompt gives the first token, each further one is a pass over a context longer by one.

    Args:
        shape: The decoder.
        rows: Answers made.
        prompt: Positions of a prompt, image positions included.
        new: Tokens of an answer.
    """
    steps = max(new - 1, 0)
    context = steps * prompt + steps * (steps + 1) // 2
    return (
        decoder_flops(shape, rows=rows, length=prompt, gradients="none", head_positions=rows)
        + linear_flops(shape.linear_params + shape.vocab * shape.d_model, rows * steps, "none")
        + attention_flops(shape, rows=rows, queries=1, keys=context, gradients="none")
    )


# --- memory --------------------------------------------------------------------------------------------------------


def decoder_activations(
    shape: DecoderShape,
    *,
    rows: int,
    length: int,
    dtype: str,
    gradients: Gradients,
    attention: Attention = "sdpa",
    lora: Lora | None = None,
    recompute: Recompute = "none",
) -> int:
    """Live bytes that Hugging Face's Llama keeps for backward, without logits and without what the heap adds.

    Counted tensor by tensor; ``tests/parity/test_cost_memory.py`` holds it to what autograd really saves. A block
    keeps, a token:

    - both norms: their input in float32 (8d) and 1/rms (8);
    - attention: q, k, v as wide as the queries (3s·h·d_head); then with SDPA the output (s·h·d_head), the log-sum (4h)
      and the mask (s·t), with eager the float32 probabilities (4ht) and a copy in the working format; document by
      document the keys and values as wide as they are, the probabilities in the working format (s·h for each token of
      the document), what came out and its place;
    - feed-forward: gate, SiLU of it, up (3sf).

    Trained weights also keep their inputs. In bfloat16 they are float32 masters under autocast, so each layer keeps a
    converted input of its own and a converted copy of its weights. With nothing to differentiate, only one block's
    worth of temporaries is alive.

    Args:
        shape: The decoder.
        rows: Rows of a micro-batch.
        length: Positions a row.
        dtype: Format of the mathematics.
        gradients: For the decoder's own weights.
        attention: Which implementation runs.
        lora: Adapters, always trained.
        recompute: What blocks keep (:mod:`plait.models.recompute`): all; their inputs; or these and their products.
            In the backward pass one block's worth of everything is there besides.
    """
    own = math.ceil(length / shape.pieces)
    if recompute != "none" and gradients != "none":
        kind: dict[str, Any] = {"dtype": dtype, "gradients": gradients, "attention": attention, "lora": lora}
        inputs = kept_between(shape, products=False, **kind)
        kept = kept_between(shape, products=recompute == "selective", **kind) - inputs
        one = dataclasses.replace(shape, layers=1)
        block = decoder_activations(one, rows=rows, length=length, **kind)
        return shape.layers * (rows * (own * inputs + length * kept) + _RANDOM) + block
    s, f, d, a = BYTES[dtype], shape.top_k * shape.d_ff, shape.d_model, shape.d_attention
    between, token, copies = 8 * d + 8, 3 * s * f, 0
    if attention == "sdpa":
        token += 4 * s * a + 4 * shape.heads + s * length
    elif isinstance(attention, int):
        token += s * (a + 2 * shape.d_kv + shape.heads * attention) + 8
        token += (4 if gradients == "full" else s) * a  # of trained masters, rotary positions make it float32
    else:
        token += 3 * s * a + shape.heads * length * (4 if dtype == "float32" else 4 + s)
    if gradients == "full":
        normed, inputs = _inputs_kept(shape, tuple(shape.matrices()), dtype=dtype, attention=attention)
        if dtype != "float32" and attention == "sdpa":
            inputs -= a  # nothing to convert: the output of attention is in the working format and kept anyway
        between += 8 * d + s * (normed if shape.pieces == 1 else 2 * d)  # converted before it is sent: once
        token += s * inputs
        copies += shape.linear_params * s if dtype != "float32" else 0
    if lora is not None:
        kept = (0, 0) if gradients == "full" else _inputs_kept(shape, lora.targets, dtype=dtype, attention=attention)
        between += s * (kept[0] + lora.rank * len(lora.targets))
        token += s * kept[1]
        copies += lora.params(shape) * s if dtype != "float32" else 0
    return rows * (length * token + own * between) * (1 if gradients == "none" else shape.layers) + copies


def kept_between(
    shape: DecoderShape,
    *,
    dtype: str,
    gradients: Gradients,
    attention: Attention,
    lora: Lora | None,
    products: bool,
) -> int:
    """Bytes a token that a block which is recomputed keeps: its input, and with ``products`` what wide ones gave.

    Fused attention is kept, attention in steps is not, nor what an adapter of a low rank adds. The input is the sum of
    all blocks before: float32 where trained masters are.
    """
    s, sizes = BYTES[dtype], shape.matrices()
    token = shape.d_model * (4 if gradients == "full" else s)
    if products:
        token += s * sum(outputs for inputs, outputs in sizes.values() if inputs >= _WIDE)
        token += s * shape.d_attention + 4 * shape.heads if attention == "sdpa" else 0
        if lora is not None:
            ranks = [lora.rank for name in lora.targets if sizes[name][0] >= _WIDE]
            own = sum(_INPUT_OF[name].startswith("norm") for name in lora.targets if sizes[name][0] >= _WIDE)
            token += s * (sum(ranks) - own * lora.rank * (shape.pieces - 1) // shape.pieces)
            token += s * sum(sizes[name][1] for name in lora.targets if lora.rank >= _WIDE)
    return token


def _inputs_kept(shape: DecoderShape, names: tuple[str, ...], *, dtype: str, attention: Attention) -> tuple[int, int]:
    """Width of all inputs that trained linear layers of a block keep: of what norms give, and of the others."""
    widths = {name: inputs for name, (inputs, _) in shape.matrices().items() if name in names}
    if dtype == "float32":  # otherwise each keeps its own converted copy
        widths = {_INPUT_OF[name]: width for name, width in widths.items()}
        if attention == "sdpa":
            widths.pop("attention", None)  # its output is kept anyway
    normed = sum(width for name, width in widths.items() if _INPUT_OF.get(name, name).startswith("norm"))
    return normed, sum(widths.values()) - normed


def logits_bytes(shape: DecoderShape, positions: int, *, gradients: Gradients = "through") -> int:
    """Peak bytes of float32 logits; for a loss also of log-probabilities and two gradients."""
    return positions * shape.vocab * (4 if gradients == "none" else 16)


def head_bytes(
    shape: DecoderShape,
    positions: int,
    *,
    dtype: str,
    gradients: Gradients = "through",
    head: Literal["fused", "full"] = "fused",
    device: str = "cpu",
    scores: int = 0,
) -> int:
    """Peak live bytes of output head and loss in a training step.

    Fused: the scores of some positions; the gradient of the hidden states, and of a head that learns its own; for
    16-bit hidden states these in float32, and a piece of their frozen head widened. In the backward pass the gradients
    are there twice, and the scores no more. ``tests/unit/models/test_fused_head.py`` counts them.

    Args:
        shape: The decoder.
        positions: Positions at which the next token is trained.
        dtype: Format of the hidden states and of a frozen head; one that learns has float32 masters.
        gradients: Of the head: ``full`` where it learns.
        head: How it is computed: :mod:`plait.models.fused_head`, or all scores at once.
        device: Where; it says how many scores are held at once.
        scores: Scores held at once, instead; 0 takes the device's.
    """
    if head == "full":
        return logits_bytes(shape, positions, gradients=gradients)
    learned = shape.vocab * shape.d_model if gradients == "full" else 0
    states = positions * shape.d_model
    wide = 0 if dtype == "float32" else states
    piece = min(_WIDENED, shape.vocab) * shape.d_model if wide and not learned else 0
    room = min(positions, max(1, (scores or scores_held(device)) // shape.vocab)) * shape.vocab
    return 4 * (states + learned + max(wide + piece + room, wide * bool(learned) + states + learned))


def kv_cache_bytes(shape: DecoderShape, *, rows: int, length: int, dtype: str) -> int:
    """Keys and values of all layers."""
    return 2 * shape.layers * rows * length * shape.d_kv * BYTES[dtype]


# --- time ----------------------------------------------------------------------------------------------------------


def time_range(
    flops: float | int, machine: Machine, *, dtype: str = "", efficiency: tuple[float, float] | None = None
) -> tuple[float, float]:
    """Shortest and longest expected seconds: FLOPs over the machine's matrix rate at the bounds of :data:`EFFICIENCY`.

    Args:
        flops: Operations.
        machine: Measured or guessed rates; a guess widens the range threefold on either side.
        dtype: Format the work is done in; the machine's own by default.
        efficiency: Other bounds, for work that is not a decoder.
    """
    dtype = dtype or machine.dtype
    low, high = efficiency or EFFICIENCY[dtype]
    rate = machine.gemm_bf16 if dtype == "bfloat16" else machine.gemm_fp32
    doubt = 1.0 if machine.measured else _UNMEASURED
    return flops / (rate * high) / doubt, flops / (rate * low) * doubt
