"""What ``test_tensor.py`` starts: ``python tensor_ranks.py CASE`` works in several processes, prints JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from benchmarks.sides.several import together
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from plait.adapters.lora import Lora, attach
from plait.core import dtensors, mesh
from plait.models.fused_head import token_logprobs
from plait.models.output_head import float32_scores
from plait.training.norm import clip
from plait.training.parallel.tensor import divide

SIZES: dict[str, Any] = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32,
}
FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "Llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "Llama, tied, with biases": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES, tie_word_embeddings=True, attention_bias=True, mlp_bias=True)
    ),
    "Qwen2, biases": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "Qwen3, norms of heads": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8)),
    "Gemma 3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SIZES, head_dim=8, layer_types=["full_attention"] * 2, sliding_window=16)
    ),
    "Phi, dropout of hidden states": lambda: PhiForCausalLM(PhiConfig(**SIZES, resid_pdrop=0.3, embd_pdrop=0.2)),
    "GPT-NeoX, dropout of hidden states": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, hidden_dropout=0.3)),
}


def built(family: str, *, lora: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = FAMILIES[family]()
    if lora:
        attach(model, Lora(rank=2, alpha=4.0, targets=("q_proj", "o_proj", "down_proj")))
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(weight, std=0.1)
    return model.double()


def loss_of(model: Any) -> Tensor:
    ids = torch.randint(0, 37, (2, 9), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)  # of dropout
    hidden = model.base_model(ids, use_cache=False).last_hidden_state
    head = model.get_output_embeddings()
    return -token_logprobs(head, hidden[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), scores=74).sum()


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def compare(family: str, *, lora: bool) -> list[float]:
    """Distance of loss, of the farthest gradient, and of the norm of all, from the undivided model's."""
    one = built(family, lora=lora)
    loss_of(one).backward()
    expected = {name: weight.grad for name, weight in one.named_parameters() if weight.grad is not None}
    norm = torch.nn.utils.get_total_norm(expected.values())
    model = built(family, lora=lora)
    divide(model, init_device_mesh("cpu", (mesh.world(),), mesh_dim_names=("tensor",)))
    loss = loss_of(model)
    loss.backward()
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    assert found.keys() == expected.keys()
    apart = max(float((whole(found[n]) - g).norm() / g.norm().clamp(min=1e-9)) for n, g in expected.items())
    return [
        abs(loss.item() - loss_of(one).item()),
        apart,
        abs(clip(found, None).total - float(norm)) / float(norm),
        sum(dtensors.local(w).numel() for w in model.parameters()) / sum(w.numel() for w in one.parameters()),
    ]


def families() -> dict[str, Any]:
    cases = [(family, False) for family in FAMILIES] + [("Llama, tied, with biases", True)]
    return {
        f"{family}{', LoRA' if lora else ''}, {world}": together(world, partial(compare, family, lora=lora))
        for family, lora in cases
        for world in ((2, 4) if family.startswith("Llama") else (4,))
    }


def in_pieces() -> dict[str, Any]:
    """Norms of heads, whose weights FSDP puts others in the place of."""

    def work() -> float:
        one = built("Qwen3, norms of heads")
        loss_of(one).backward()
        model: Any = built("Qwen3, norms of heads")
        ranks = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
        divide(model, ranks["tensor"])
        fully_shard(model.base_model, mesh=ranks["data"])
        loss_of(model).backward()  # the same in both shares: the mean of both is the gradient
        pairs = [(dict(model.named_parameters())[name].grad, weight.grad) for name, weight in one.named_parameters()]
        return max(float((dtensors.whole(found) - grad).norm() / grad.norm()) for found, grad in pairs)

    return {"apart": together(4, work)}


class Sums(TorchDispatchMode):
    """How many numbers each sum over processes was of."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "all_reduce" in str(func) or "allreduce" in str(func):
            tensor = args[0] if isinstance(args[0], Tensor) else args[0][0]
            self.numbers.append(tensor.numel())
        return func(*args, **(kwargs or {}))


def count() -> dict[str, Any]:
    """Messages of a forward and of a backward pass, with 3 blocks and with 2."""

    def work(layers: int) -> list[list[int]]:
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**SIZES | {"num_hidden_layers": layers})).double()
        divide(model, init_device_mesh("cpu", (mesh.world(),), mesh_dim_names=("tensor",)))
        ids = torch.arange(18).view(2, 9)
        with Sums() as forward:
            out = model.base_model(ids, use_cache=False).last_hidden_state.square().sum()
        with Sums() as backward:
            out.backward()
        return [forward.numbers, backward.numbers]

    return {str(layers): together(2, partial(work, layers)) for layers in (2, 3)}


def words() -> dict[str, Any]:
    """Log-probabilities and gradients of a head whose words are divided, from the whole head's."""

    def work(vocabulary: int, *, equal: bool, bias: bool) -> float:
        torch.manual_seed(vocabulary)
        head = nn.Linear(6, vocabulary, bias=bias).double()
        hidden = torch.randn(11, 6, dtype=torch.float64)
        targets = torch.arange(11) % vocabulary
        shares = torch.ones(11, dtype=torch.float64) if equal else torch.rand(11, dtype=torch.float64)

        def gradients(head: nn.Linear, how: Callable[..., Tensor]) -> list[Tensor]:
            own = hidden.clone().requires_grad_()
            said = how(head, own)
            (said * shares).sum().backward()
            return [said.detach(), own.grad, *(whole(w.grad) for w in head.parameters())]

        def scored(head: nn.Linear, own: Tensor) -> Tensor:
            return functional.log_softmax(float32_scores(head, own), -1).gather(1, targets[:, None])[:, 0]

        expected = gradients(head, scored)
        ranks = init_device_mesh("cpu", (mesh.world(),))
        cut = nn.Linear(6, vocabulary, bias=bias)
        for name, weight in head.named_parameters():
            setattr(cut, name, nn.Parameter(distribute_tensor(weight.detach(), ranks, [Shard(0)])))
        fused = gradients(cut, lambda head, own: token_logprobs(head, own, targets, scores=4 * vocabulary))
        cut.zero_grad()
        full = gradients(cut, scored)
        return max(float((a - b).abs().max()) for found in (fused, full) for a, b in zip(found, expected, strict=True))

    return {
        f"{vocabulary} words, {world}, {equal}, {bias}": together(
            world, partial(work, vocabulary, equal=equal, bias=bias)
        )
        for vocabulary, world, equal, bias in (
            (12, 2, True, True),
            (13, 4, True, True),
            (13, 4, False, False),
            (9, 4, False, True),
        )
    }


CASES: dict[str, Callable[[], Any]] = {"families": families, "count": count, "words": words, "in_pieces": in_pieces}

if __name__ == "__main__":
    print(json.dumps({name: CASES[name]() for name in sys.argv[1:] or CASES}))
