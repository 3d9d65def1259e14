"""Recomputed activations: the very bits of gradients, dropout on, and fewer bytes kept, fewest by the full kind."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, ViTConfig, ViTModel

from plait.adapters.lora import Lora, attach
from plait.core.errors import ConfigError
from plait.core.tensors import IGNORE, Batch, Patches
from plait.models.connectors.projection import Mlp
from plait.models.connectors.query import QFormer, QFormerSizes
from plait.models.crossattend import GatedCrossAttention, ReadingLayer
from plait.models.multimodal import MultimodalLM
from plait.models.recompute import Recompute, blocks_of, recomputed
from plait.models.transformer import Block, Transformer, TransformerSizes
from plait.objectives.language import NextToken
from plait.training.precision import autocast, hold_masters

HOWS: list[Recompute] = ["none", "full", "selective"]


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_dropout=0.2,
    )
    return LlamaForCausalLM(config)


def spliced(*, bits16: bool = False) -> MultimodalLM:
    """A frozen decoder with an adapter that drops, as tune trains it."""
    decoder = llama().requires_grad_(False)
    if bits16:
        decoder.bfloat16()
    attach(decoder, Lora(rank=4, alpha=8.0, targets=("q_proj", "down_proj"), dropout=0.3))
    for name, weight in decoder.named_parameters():
        weight.requires_grad_("lora_" in name)
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)
    hold_masters(w for w in decoder.parameters() if w.requires_grad)
    return MultimodalLM({}, {"image": Mlp(6, 8, 64)}, decoder, placeholder=40)


def inside() -> MultimodalLM:
    torch.manual_seed(0)
    decoder = GPT2LMHeadModel(
        GPT2Config(vocab_size=40, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1)  # drops 0.1
    )
    reading = [GatedCrossAttention(TransformerSizes(d=64, depth=1, heads=4, d_source=12, dropout=0.2)), None]
    for read in reading[:1]:
        assert read is not None
        nn.init.constant_(read.gate, 0.5)
        nn.init.constant_(read.feed_forward_gate, 0.5)
    return MultimodalLM({}, {"image": Mlp(6, 8, 12)}, decoder, placeholder=40, reading=reading, inside="image")


def batch(holes: int) -> Batch:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 39, (4, 24), generator=generator)
    ids[:, 1 : 1 + holes] = 40
    segments = torch.ones_like(ids)
    segments[1, 14:] = 2
    segments[2, 20:] = 0
    picture = Patches(values=torch.randn(12, 6, generator=generator), grid=torch.tensor([[1, 1, 3]] * 4))
    return Batch(
        token_ids=ids,
        labels=torch.where((ids == 40) | (segments == 0), IGNORE, ids),
        segment_ids=segments,
        media={"image": picture},
        item_row={"image": torch.arange(4)},
        sample_ids=tuple("abcde"),
        encoded=True,
    )


def told(model: MultimodalLM, holes: int) -> Callable[[], Tensor]:
    given, objective = batch(holes), NextToken()
    return lambda: objective(model, given)["next_token"]


def own() -> tuple[nn.Module, Callable[[], Tensor]]:
    torch.manual_seed(0)
    sizes = TransformerSizes(
        d=64, depth=4, heads=4, dropout=0.1, attention_dropout=0.1, drop_path=0.2, layer_drop=0.3, layer_scale=0.5
    )
    model, x = Transformer(sizes), torch.randn(4, 20, 64)
    return model, lambda: model(x).relu().square().sum()


def queries() -> tuple[nn.Module, Callable[[], Tensor]]:
    torch.manual_seed(0)
    model = QFormer(QFormerSizes(queries=4, d=64, depth=2, heads=4, d_source=6, dropout=0.1))
    media = Patches(values=torch.randn(4 * 9, 6), grid=torch.tensor([[1, 3, 3]] * 4))
    return model, lambda: model(media).values.relu().square().sum()


def tower() -> tuple[nn.Module, Callable[[], Tensor]]:
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, image_size=16,
                       patch_size=4, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)  # fmt: skip
    model, pixels = ViTModel(config), torch.randn(2, 3, 16, 16)
    return model, lambda: model(pixel_values=pixels).last_hidden_state.relu().square().sum()


def case(name: str) -> tuple[nn.Module, Callable[[], Tensor], str]:
    match name:
        case "adapter":
            model = spliced()
            return model, told(model, 3), "float32"
        case "adapter, 16 bits":
            model = spliced(bits16=True)
            return model, told(model, 3), "bfloat16"
        case "read inside":
            model = inside()
            return model, told(model, 1), "float32"
        case "our Transformer":
            return *own(), "float32"
        case "our Transformer, 16 bits":
            return *own(), "bfloat16"
        case "Q-Former":
            return *queries(), "float32"
        case _:
            return *tower(), "float32"


CASES = ["adapter", "adapter, 16 bits", "read inside", "our Transformer", "our Transformer, 16 bits", "Q-Former", "ViT"]


def step(model: nn.Module, loss: Callable[[], Tensor], dtype: str) -> list[Tensor]:
    """The loss, every gradient, and a random number after them."""
    torch.manual_seed(7)
    model.zero_grad()
    with autocast("cpu", dtype):
        found = loss()
    found.backward()
    return [found.detach(), *(w.grad.clone() for w in model.parameters() if w.grad is not None), torch.rand(3)]


@pytest.mark.row("S4-61")
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_the_same_bits_with_dropout_on(name: str) -> None:
    model, loss, dtype = case(name)
    model.train()
    found: dict[str, list[Tensor]] = {}
    for how in HOWS:
        with recomputed(model, how) as count:
            assert count == (0 if how == "none" else len(blocks_of(model)))
            found[how] = step(model, loss, dtype)
    assert len(found["none"]) > 3
    for how in HOWS[1:]:
        assert len(found[how]) == len(found["none"])
        assert all(torch.equal(one, other) for one, other in zip(found[how], found["none"], strict=True)), how
    dropped = step(model.eval(), loss, dtype)
    assert not torch.equal(dropped[0], found["none"][0]), "dropout was on"


def alive_after(work: Callable[[], object]) -> int:
    """Bytes that torch's allocator has given out while the result is held, and not got back."""
    work()
    gc.collect()  # what earlier tests left must not be given back now
    with torch.profiler.profile(profile_memory=True) as profile:
        held = work()
    events = profile.profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]
    del held
    return sum(event.nbytes() for event in events if event.name() == "[memory]")


@pytest.mark.row("S4-61")
@pytest.mark.parametrize("name", CASES)
def test_the_more_is_recomputed_the_less_is_kept(name: str) -> None:
    model, loss, dtype = case(name)
    model.train()
    kept: dict[str, int] = {}
    saved: dict[str, int] = {}
    for how in HOWS:
        numbers: list[int] = []

        def pack(tensor: Tensor, numbers: list[int] = numbers) -> Tensor:
            numbers.append(tensor.numel() * tensor.element_size())
            return tensor

        with recomputed(model, how), autocast("cpu", dtype):
            torch.manual_seed(7)
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                loss()
            saved[how] = sum(numbers)

            def forward() -> Tensor:
                torch.manual_seed(7)  # as many layers dropped each time
                return loss()

            kept[how] = alive_after(forward)
    assert saved["full"] < saved["none"]
    assert kept["full"] < kept["selective"] < kept["none"], kept


def test_blocks_are_the_outermost_ones() -> None:
    assert [type(block) for block in blocks_of(inside())] == [ReadingLayer, ReadingLayer]
    assert {type(block) for block in blocks_of(own()[0])} == {Block}
    assert len(blocks_of(spliced())) == 3


def test_afterwards_everything_is_as_it_was() -> None:
    model, loss, dtype = case("adapter")
    names = list(model.state_dict())
    with recomputed(model, "full"):
        assert all("forward" in block.__dict__ for block in blocks_of(model))
        assert list(model.state_dict()) == names
    assert not any("forward" in block.__dict__ for block in blocks_of(model))
    with pytest.raises(RuntimeError, match="stop"), recomputed(model, "full"):
        raise RuntimeError("stop")
    assert not any("forward" in block.__dict__ for block in blocks_of(model))
    assert step(model, loss, dtype)


def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    from plait.models import recompute

    seen: list[int] = []
    plain = recompute.checkpoint
    monkeypatch.setattr(recompute, "checkpoint", lambda *a, **k: seen.append(1) or plain(*a, **k))
    return seen


def test_only_passes_with_a_gradient_are_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = calls(monkeypatch)
    model = spliced()
    with recomputed(model, "full"):
        with torch.no_grad():
            model(batch(3))
        assert not seen
        model(batch(3))
        assert len(seen) == 3
        model.decoder.requires_grad_(False)
        model(batch(3))
        assert len(seen) == 6, "a gradient goes through to the connector"
        model.requires_grad_(False)
        model(batch(3))
        assert len(seen) == 6, "there is none"


def test_answers_and_collected_weights_are_made_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = calls(monkeypatch)
    model, x = own()[0].eval(), torch.randn(1, 5, 64)
    collected: list[Tensor] = []
    told_model = spliced().eval()
    with recomputed(model, "full"), recomputed(told_model, "full"):
        model(x, weights=collected)
        assert len(collected) == 4
        prompt = batch(3)
        before = len(seen)
        state = told_model.prefill(prompt)
        told_model.extend(state, torch.tensor([4, 5, 6, 7]), last=30)
        assert len(seen) == before


@pytest.mark.parametrize("how", ["full", "selective"])
def test_what_cannot_be_recomputed_is_refused(how: Recompute) -> None:
    with (
        pytest.raises(ConfigError, match="Linear has no Transformer blocks") as caught,
        recomputed(nn.Linear(2, 2), how),
    ):
        pass
    assert caught.value.place == "trainer.recompute"
    layer = Block(TransformerSizes(d=8, depth=1, heads=2), feed_forward=nn.Sequential(nn.BatchNorm1d(8)))
    with (
        pytest.raises(ConfigError, match="Block has a batch norm, whose running mean"),
        recomputed(nn.Sequential(layer), how),
    ):
        pass
    with recomputed(nn.Linear(2, 2), "none") as count:
        assert count == 0
