"""Compiled blocks: loss and gradients of plain ones, one compilation for all layers, and never a silent fallback."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from plait.adapters.lora import Lora, attach
from plait.core.errors import ConfigError, ResourceError
from plait.core.tensors import IGNORE, Batch, Patches
from plait.models.compiled import compiled
from plait.models.connectors.projection import Mlp
from plait.models.crossattend import GatedCrossAttention
from plait.models.multimodal import MultimodalLM
from plait.models.recompute import recomputed
from plait.models.transformer import Transformer, TransformerSizes
from plait.objectives.language import NextToken
from plait.training.precision import autocast, hold_masters

TRACED = "aot_eager"
"""Traces and takes apart as inductor does, and runs torch's own kernels: no C++ compiler, and seconds less."""


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def adapted() -> MultimodalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    decoder = LlamaForCausalLM(config).bfloat16().requires_grad_(False)
    attach(decoder, Lora(rank=4))
    for name, weight in decoder.named_parameters():
        weight.requires_grad_("lora_" in name)
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)
    hold_masters(w for w in decoder.parameters() if w.requires_grad)
    return MultimodalLM({}, {"image": Mlp(6, 8, 32)}, decoder, placeholder=40).train()


def inside() -> MultimodalLM:
    torch.manual_seed(0)
    decoder = GPT2LMHeadModel(
        GPT2Config(vocab_size=40, n_embd=32, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=1)
    ).eval()
    reads = GatedCrossAttention(TransformerSizes(d=32, depth=1, heads=4, d_source=12))
    nn.init.constant_(reads.gate, 0.5)
    return MultimodalLM(
        {}, {"image": Mlp(6, 8, 12)}, decoder, placeholder=40, reading=[None, reads, None], inside="image"
    )


def batch(width: int, *, holes: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(width)
    ids = torch.randint(3, 39, (4, width), generator=generator)
    ids[:, 1 : 1 + holes] = 40
    segments = torch.ones_like(ids)
    segments[1, width // 2 :] = 2
    picture = Patches(values=torch.randn(12, 6, generator=generator), grid=torch.tensor([[1, 1, 3]] * 4))
    return Batch(
        token_ids=ids,
        labels=torch.where(ids == 40, IGNORE, ids),
        segment_ids=segments,
        media={"image": picture},
        item_row={"image": torch.arange(4)},
        sample_ids=tuple("abcde"),
        encoded=True,
    )


def step(model: nn.Module, loss: Callable[[], Tensor], dtype: str = "float32") -> list[Tensor]:
    torch.manual_seed(7)
    model.zero_grad()
    with autocast("cpu", dtype):
        found = loss()
    found.backward()
    return [found.detach(), *(w.grad.clone() for w in model.parameters() if w.grad is not None)]


def told(model: MultimodalLM, given: Batch) -> Callable[[], Tensor]:
    objective = NextToken()
    return lambda: objective(model, given)["next_token"]


def close(found: list[Tensor], wanted: list[Tensor], *, to: float) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert float((one - other).norm()) <= to * float(other.norm()) + 1e-5


def test_one_compilation_serves_all_layers_and_two_all_shapes() -> None:
    model = adapted()
    given = [batch(width) for width in (16, 16, 24, 40, 33)]
    wanted = [step(model, told(model, one), "bfloat16") for one in given]
    seen: list[int] = []
    with compiled(model, backend=TRACED) as count:
        assert count == 4
        for one, plain in zip(given, wanted, strict=True):
            close(step(model, told(model, one), "bfloat16"), plain, to=0.02)
            seen.append(graphs())
    assert seen == [1, 1, 2, 2, 2]
    assert not any("forward" in block.__dict__ for block in model.decoder.base_model.layers)  # pyright: ignore[reportGeneralTypeIssues]


def test_a_decoder_that_reads_inside_has_its_own_layers_compiled() -> None:
    model, given = inside(), batch(16, holes=1)
    wanted = step(model, told(model, given))
    with compiled(model, backend=TRACED):
        close(step(model, told(model, given)), wanted, to=1e-5)
    assert graphs() == 1


def test_compiled_blocks_are_recomputed_too_and_drop_the_same() -> None:
    model = adapted()
    for layer in model.decoder.base_model.layers:  # pyright: ignore[reportGeneralTypeIssues]
        layer.self_attn.attention_dropout = 0.3
    loss = told(model, batch(16))
    with compiled(model, backend=TRACED):
        wanted = step(model, loss)
        with recomputed(model, "full"):
            found = step(model, loss)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert not torch.equal(step(model.eval(), loss)[0], found[0]), "dropout was on"


OWN = """
import torch
from plait.models.compiled import compiled
from plait.models.transformer import Transformer, TransformerSizes
torch.manual_seed(0)
model, x = Transformer(TransformerSizes(d=32, depth=3, heads=4, gated=True)), torch.randn(4, 20, 32, requires_grad=True)
found = []
for backend in (None, "aot_eager"):
    if backend:
        with compiled(model, backend=backend):
            loss = model(x).relu().square().sum()
    else:
        loss = model(x).relu().square().sum()
    found.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
assert all(torch.allclose(one, other, rtol=1e-5, atol=1e-5) for one, other in zip(*found))
print(torch._dynamo.utils.counters["stats"]["unique_graphs"])
"""


def test_our_own_transformer_is_compiled_once() -> None:
    """In a process of its own: here, the tests check the shapes of every call of ours, which cannot be compiled."""
    run = subprocess.run([sys.executable, "-c", OWN], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.split() == ["1"]


def test_answers_are_not_compiled() -> None:
    model, given = adapted().eval(), batch(16)
    with compiled(model, backend=TRACED), torch.no_grad():
        state = model.prefill(given)
        model.extend(state, torch.tensor([4, 5, 6, 7]), last=30)
        model(given)
    assert graphs() == 0


def test_what_cannot_be_compiled_whole_ends_the_first_step() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if float(x.detach().sum()) > 0 else x

    sizes = TransformerSizes(d=32, depth=2, heads=4)
    model = Transformer(sizes, feed_forward=lambda _: Odd())
    with compiled(model, backend=TRACED), pytest.raises(ConfigError, match="Block cannot be compiled as a whole") as e:
        model(torch.randn(1, 4, 32))
    assert e.value.place == "trainer.compile"
    assert "false" in e.value.remedy
    with pytest.raises(ConfigError, match="no Transformer blocks to compile"), compiled(nn.Linear(2, 2)):
        pass


def test_without_a_compiler_nothing_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder, exc

    def none() -> str:
        raise exc.InvalidCxxCompiler()

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(ResourceError, match="needs a C\\+\\+ compiler") as caught, compiled(adapted()):
        pass
    assert "g++" in caught.value.remedy


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # inductor's own
def test_inductor_gives_the_same_loss_and_compiles_once() -> None:
    model, given = adapted(), batch(16)
    wanted = step(model, told(model, given), "bfloat16")
    with compiled(model):
        found = [step(model, told(model, given), "bfloat16") for _ in range(2)]
    assert graphs() == 1
    torch.testing.assert_close(found[0][0], wanted[0], rtol=2e-3, atol=0)
    # Joined operations round less often: compiled gradients are as near to those of float32 as plain ones are.
    exact = torch.cat([one.flatten() for one in step(model, told(model, given))[1:]])
    plain, fused = (torch.cat([one.float().flatten() for one in each[1:]]) for each in (wanted, found[1]))
    assert float((fused - exact).norm()) <= 1.5 * float((plain - exact).norm())
