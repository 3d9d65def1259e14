"""What the plan says that a process holds is what the layouts leave it, counted on small models that are really cut."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from plait.adapters.lora import Lora as Adapter
from plait.adapters.lora import attach
from plait.core.errors import ConfigError
from plait.core.grid import Grid
from plait.models.connectors.projection import Mlp
from plait.models.mixtral import take_experts
from plait.models.multimodal import MultimodalLM
from plait.training.cost import DecoderShape, Lora, decoder_activations
from plait.training.parallel.cut import owners, stages_of
from plait.training.parallel.expert import ExpertGroups
from plait.training.parallel.messages import messages
from plait.training.parallel.order import SCHEDULES, most_kept
from plait.training.parallel.share import Held, Member, Model, by_process
from plait.training.parallel.tensor import divide
from plait.training.trainer import Parallel

SIZES: dict[str, Any] = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def llama(*, tied: bool = True, **more: Any) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, "tie_word_embeddings": tied, **more}))


def numbers(weights: Any) -> int:
    return sum(dtensor_free(weight).numel() for weight in weights)


def dtensor_free(weight: torch.Tensor) -> torch.Tensor:
    return weight.to_local() if isinstance(weight, DTensor) else weight


@pytest.fixture
def two() -> Iterator[DeviceMesh]:
    """The first of two processes, the other of which only seems to be there."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        yield init_device_mesh("cpu", (2,), mesh_dim_names=("tensor",))
    finally:
        dist.destroy_process_group()


@pytest.mark.row("S2-29")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("adapter", [True, False])
def test_a_tensor_share_is_what_divide_leaves(two: DeviceMesh, tied: bool, adapter: bool) -> None:
    decoder: nn.Module = llama(tied=tied)
    shape = DecoderShape.from_config(decoder.config)
    lora = Lora(rank=3, targets=TARGETS) if adapter else None
    if adapter:
        attach(decoder, Adapter(rank=3, targets=TARGETS))
    model = Model(
        shape=shape, width=4, learns=not adapter, lora=lora, adapter=lora.params(shape) if lora is not None else 0
    )
    whole = Member().held(model)
    weights = dict(decoder.named_parameters())
    assert whole.learn == numbers(weight for weight in weights.values() if weight.requires_grad)
    divide(decoder, two)
    weights = dict(decoder.named_parameters())
    held = Member.of(Parallel(tensor=2), rank=0, world=2).held(model)
    assert held.learn == numbers(weight for weight in weights.values() if weight.requires_grad)
    assert held.still == 4 * numbers(weight for weight in weights.values() if not weight.requires_grad)
    inside = [weight for name, weight in weights.items() if ".layers." in name and weight.requires_grad]
    assert held.blocks == numbers(inside)


@pytest.mark.row("S2-30")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("stages", "blocks"), [(2, ()), (3, ()), (3, (1, 3, 1))])
def test_a_stage_holds_what_the_cut_gives_it(tied: bool, stages: int, blocks: tuple[int, ...]) -> None:
    model = MultimodalLM({}, {"image": Mlp(4, 8, 16)}, llama(tied=tied), placeholder=23)
    parts = stages_of(model, stages, blocks)
    held = owners(model, parts)
    weights = dict(model.named_parameters())
    connectors = numbers(model.connectors.parameters())
    shape = DecoderShape.from_config(model.decoder.config)
    planned = Model(shape=shape, width=4, learns=True, beside=connectors, media=connectors)
    parallel = Parallel(pipeline=stages, pipeline_blocks=blocks)
    for stage in range(stages):
        member = Member.of(parallel, rank=stage, world=stages)
        mine = {name: weight for name, weight in weights.items() if stage in held[name]}
        assert member.held(planned).learn == numbers(mine.values()), stage
        assert member.held(planned).layers == member.decoder(shape, loads=planned).layers == len(parts[stage])
        for schedule in ("1f1b", "gpipe"):
            order = SCHEDULES[schedule](stage, stages, 7)
            again = Member.of(parallel.model_copy(update={"schedule": schedule}), rank=stage, world=stages)
            assert again.kept(7) == most_kept(order)


@pytest.mark.row("S4-68")
def test_experts_are_dealt_out_and_the_rest_is_whole(two: DeviceMesh) -> None:
    config = transformers.MixtralConfig(**{**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2})
    decoder = transformers.MixtralForCausalLM(config)
    take_experts(decoder)
    model = Model(shape=DecoderShape.from_config(config), width=4, learns=True)
    assert Member().held(model).learn == numbers(decoder.parameters())
    ExpertGroups(Grid.of(0, 2), 2, device="cpu").deal_out(decoder)
    assert Member.of(Parallel(expert=2), rank=0, world=2).held(model).learn == numbers(decoder.parameters())


@given(
    st.integers(0, 10**9), st.integers(0, 10**9), st.integers(0, 10**9), st.integers(2, 64), st.sampled_from([1, 2, 3])
)
@pytest.mark.row("S4-66")
def test_states_of_all_processes_make_up_one_whole(blocks: int, rest: int, still: int, world: int, zero: int) -> None:
    held = Held(blocks=blocks, rest=rest, still_blocks=0, still_rest=still, layers=3)
    whole = Member().states(held, state=8.0)
    found = Member.of(Parallel.model_validate({"zero": zero}), rank=0, world=world).states(held, state=8.0, pieces=2)
    divided = {1: ("optimizer",), 2: ("optimizer", "gradients"), 3: ("optimizer", "gradients", "weights")}[zero]
    for part in ("weights", "gradients", "optimizer"):
        if part in divided:
            assert 0 <= world * found[part] - whole[part] < 3 * world
        else:
            assert found[part] == whole[part]
    assert "gathered" not in whole


def test_activations_shrink_with_what_is_divided() -> None:
    shape = DecoderShape(layers=4, d_model=64, d_ff=128, heads=4, kv_heads=4, vocab=100)
    kind: dict[str, Any] = {"length": 10, "dtype": "float32", "gradients": "full"}

    def kept(**settings: Any) -> int:
        member = Member.of(Parallel.model_validate(settings), rank=0, world=2)
        return decoder_activations(member.decoder(shape), rows=member.rows(6), **kind)

    whole = decoder_activations(shape, rows=6, **kind)
    assert kept() == kept(zero=3) == whole // 2
    assert whole // 2 < kept(tensor=2) < whole  # norms and inputs of matrices are whole in each
    assert kept(pipeline=2) == whole // 2


@pytest.mark.row("S4-65")
@pytest.mark.parametrize("tensor", [2, 4])
def test_pieces_of_rows_divide_all_that_a_block_keeps(tensor: int) -> None:
    """Korthikanti et al., https://arxiv.org/abs/2205.05198: equation 4 is equation 1 over the number of processes."""
    shape = DecoderShape(layers=4, d_model=64, d_ff=128, heads=4, kv_heads=4, vocab=100)
    kind: dict[str, Any] = {"length": 12, "rows": 3, "dtype": "float32", "gradients": "full", "attention": "eager"}
    member = Member.of(Parallel(tensor=tensor, sequence=True), rank=0, world=tensor)
    plain = Member.of(Parallel(tensor=tensor), rank=0, world=tensor)
    whole = decoder_activations(shape, **kind)
    assert decoder_activations(member.decoder(shape), **kind) * tensor == whole
    assert decoder_activations(plain.decoder(shape), **kind) * tensor > whole


def test_alike_processes_are_told_together() -> None:
    def moments(member: Member) -> dict[str, dict[str, int]]:
        return {"training": {"weights": 8 if member.ends[1] else 5}}

    assert by_process(Parallel(pipeline=2), 1, moments)["shares"] == ()
    found = by_process(Parallel(pipeline=2), 6, moments)
    assert [(share.ranks, sum(share.memory.values())) for share in found["shares"]] == [((0, 1, 2), 5), ((3, 4, 5), 8)]
    assert found["memory"] == {"weights": 8}
    with pytest.raises(ConfigError, match="5 processes cannot be divided into pipeline 2"):
        by_process(Parallel(pipeline=2), 5, moments)


def test_frozen_weights_are_gathered_too() -> None:
    """By hand: two processes, 6 bytes still in blocks and 2 beside, 10 weights that learn, one pass."""
    shape = DecoderShape(layers=1, d_model=2, d_ff=2, heads=1, kv_heads=1, vocab=1)
    lora = Lora(rank=1, targets=("q_proj",))
    model = Model(shape=shape, width=2, lora=lora, adapter=lora.params(shape), beside=6)
    held = Member().held(model)
    assert (held.blocks, held.rest) == (4, 6)

    def sent(zero: int) -> int:
        member = Member.of(Parallel.model_validate({"zero": zero}), rank=0, world=2)
        return messages(member, model, positions=1, micro=1, width=2, stream=2)["data"]

    assert sent(0) == 4 * 10
    assert sent(1) == sent(2) == 4 * 10 + (held.still_blocks + held.still_rest) // 2
    assert sent(3) == 4 * 10 + 4 * 4 // 2 + held.still_blocks + held.still_rest // 2


@pytest.mark.parametrize("again", [False, True])
def test_both_ways_of_attention_send_what_their_formulas_say(again: bool) -> None:
    """docs/parallel.md: (3N - 2) p k 2d numbers around a ring, 4 (N - 1) / N p (h + k') d for dealt out heads."""
    shape = DecoderShape(layers=3, d_model=48, d_ff=8, heads=6, kv_heads=3, vocab=16)
    model, p, d, n, size = Model(shape=shape, width=4), 10, 8, 3, 4

    def sent(attention: str) -> int:
        member = Member.of(Parallel.model_validate({"context": n, "context_attention": attention}), rank=0, world=n)
        return messages(member, model, positions=p, micro=1, width=size, stream=size, again=again)["context"]

    forward = (n - 1) * p * 3 * 2 * d
    assert sent("ring") == 3 * size * ((3 * n - 2) * p * 3 * 2 * d + (forward if again else 0))
    exchanged = 4 * (n - 1) * p * (6 + 3) * d // n
    assert sent("ulysses") == 3 * size * (exchanged * 3 // 2 if again else exchanged)
