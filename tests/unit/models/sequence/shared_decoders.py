"""What ``test_shared_decoders.py`` starts: ``python shared_decoders.py`` reads rows in 2 and 3 processes."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist
from benchmarks.sides.several import together
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from plait.core import mesh
from plait.core.errors import ConfigError
from plait.models.attention import positions
from plait.models.packing import packed_masks
from plait.models.recompute import recomputed
from plait.models.sequence.decoder import SharedDecoder

COMMON: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
}
GROUPED = COMMON | {"num_key_value_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "mistral": GROUPED | {"sliding_window": 4},
    "qwen2": GROUPED | {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3": GROUPED | {"head_dim": 6},
    "gpt2": {"vocab_size": 50, "n_embd": 24, "n_layer": 2, "n_head": 6, "n_positions": 64}
    | dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
    "gpt_neox": COMMON,
    "gemma3_text": GROUPED
    | {"head_dim": 6, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "qwen3_moe": GROUPED
    | {"head_dim": 6, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    | {"experts_implementation": "eager"},
    "deepseek_v3": COMMON  # values of another width than keys
    | {"num_key_value_heads": 6, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
    | {"v_head_dim": 6, "n_routed_experts": 2, "first_k_dense_replace": 2, "moe_intermediate_size": 8},
}
REFUSED: dict[str, dict[str, Any]] = {
    "gemma2": GROUPED | {"head_dim": 6},  # caps its scores
    "doge": GROUPED | {"keep_window_size": 4},  # changes its mask in each layer
    "lfm2": GROUPED | {"layer_types": ["conv", "full_attention"]},
    "mamba": {"vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 1, "state_size": 4},
    "bloom": {"vocab_size": 50, "hidden_size": 24, "n_layer": 1, "n_head": 6},
    "gpt_oss": GROUPED | {"head_dim": 6, "num_local_experts": 2, "num_experts_per_tok": 1},  # its softmax has a sink
    "llama": GROUPED | {"attention_dropout": 0.1},
}
SEGMENTS = torch.tensor([[1] * 3 + [2] * 12 + [3] * 5 + [0] * 3, [1] * 2 + [0] * 21, [0] * 23])


def read() -> dict[str, float]:
    """How far hidden states and gradients, summed over processes, are from those of whole rows."""
    found: dict[str, float] = {}
    for family, sizes in FAMILIES.items():
        for exchange in ("ring", "ulysses"):
            for how in ("none", "full", "selective") if family in ("llama", "mistral") else ("none",):
                decoder = built(family, sizes)
                expected = passed(decoder, SEGMENTS)
                shared = SharedDecoder(decoder, exchange, group=dist.group.WORLD)
                for segments in (SEGMENTS.flip(0)[:, :11], SEGMENTS):  # rows of another length before
                    shared.begin(segments)
                    with recomputed(decoder, how):
                        got = passed(decoder, segments, shared=shared)
                    shared.end()
                again = passed(decoder, SEGMENTS)
                assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True)), "not as before"
                pairs = zip(got, expected, strict=True)
                worst = max(float((a - b).norm() / b.norm().clamp(min=1e-6)) for a, b in pairs)
                found[f"{family}, {exchange}, recompute {how}"] = worst
    return found


def refused() -> dict[str, str]:
    """What is said of decoders whose rows cannot be shared."""
    found: dict[str, str] = {}
    for family, sizes in REFUSED.items():
        decoder = built(family, sizes, attention="eager")
        try:
            shared = SharedDecoder(decoder, "ring", group=dist.group.WORLD)
            shared.begin(SEGMENTS)
            passed(decoder, SEGMENTS, shared=shared)
            found[family] = "read"
        except ConfigError as error:
            found[family] = error.cause
    return found


def built(family: str, sizes: dict[str, Any], *, attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **sizes), attn_implementation=attention, dtype=torch.float64
    ).train()


def passed(decoder: Any, segments: Tensor, *, shared: SharedDecoder | None = None) -> list[Tensor]:
    """Hidden states where there are tokens, and all gradients, added up over processes."""
    draw = torch.Generator().manual_seed(1)
    slope, given = (torch.randn(*segments.shape, 24, dtype=torch.float64, generator=draw) for _ in range(2))
    given.requires_grad_()
    real = (segments != 0)[..., None]
    if shared is not None:
        assert shared.rows is not None
        mine = torch.zeros(segments.shape[1], dtype=torch.bool)
        mine[shared.rows.placement.mine()] = True
        real = real & mine[:, None]
    decoder.zero_grad()
    hidden = decoder.base_model(
        inputs_embeds=given,
        attention_mask=packed_masks(decoder, segments, given.dtype),
        position_ids=positions(segments),
        use_cache=False,
    ).last_hidden_state
    assert hidden.shape == given.shape
    ((hidden * slope) * real).sum().backward()
    weights = [weight for weight in decoder.base_model.parameters() if weight.requires_grad]
    grads = [torch.zeros_like(w) if w.grad is None else w.grad.clone() for w in weights]
    assert given.grad is not None
    found = [(hidden * real).detach(), given.grad.clone(), *grads]
    if shared is not None:
        for tensor in found:
            dist.all_reduce(tensor)
    return found


def work() -> dict[str, Any]:
    return {"read": read(), "refused": refused() if mesh.world() == 2 else {}}


if __name__ == "__main__":
    print(json.dumps({str(world): together(world, work) for world in (2, 3)}))
