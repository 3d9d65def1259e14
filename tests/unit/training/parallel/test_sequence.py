"""Pieces of rows between divided matrices: gradients of one process, memory and messages as planned, refusals."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from benchmarks.layouts import BOUNDS
from tests.rank_script import Case, case_of
from tests.unit.training.parallel.sequence_ranks import SIZES
from tests.unit.training.parallel.sequence_ranks import TARGETS as ADAPTED
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig, LlamaForCausalLM

from plait.core import dtensors, mesh
from plait.core.errors import ConfigError
from plait.models.crossattend import ReadingLayer
from plait.models.documents import documents_for, read_by_document
from plait.models.packing import packed_masks
from plait.models.recompute import Recompute, recomputed
from plait.stages.tune import Tune
from plait.training.cost import Attention, DecoderShape, Gradients, Lora, decoder_activations
from plait.training.parallel.messages import messages
from plait.training.parallel.share import Member, Model
from plait.training.parallel.tensor import divide
from plait.training.precision import autocast, hold_masters
from plait.training.trainer import Parallel

ROWS, LENGTH = 4, 20
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


# --- what a process keeps -------------------------------------------------------------------------------------------


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> Iterator[DeviceMesh]:
    """The first of two processes, the other of which only seems to be there."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    monkeypatch.setattr(mesh, "active", lambda: True)
    try:
        yield init_device_mesh("cpu", (2,), mesh_dim_names=("tensor",))
    finally:
        dist.destroy_process_group()


def config(layers: int, attention: str = "eager") -> LlamaConfig:
    return LlamaConfig(
        vocab_size=64,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        attn_implementation=attention,
    )


class Kept:
    """A Llama of which two processes divide the matrices, and what its forward pass keeps in the first of them."""

    def __init__(self, ranks: DeviceMesh, *, dtype: str, attention: str, lora: Lora | None, sequence: bool) -> None:
        self.ranks, self.dtype, self.attention, self.lora = ranks, dtype, attention, lora
        self.parallel = Parallel(tensor=2, sequence=sequence)

    def built(self, layers: int) -> Callable[[], object]:
        """Its forward pass, to be called."""
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(config(layers, "eager" if self.attention == "documents" else self.attention))
        blocks = model.model
        if self.attention == "documents":
            assert read_by_document(model)
        if self.lora is not None:
            model.requires_grad_(False).to(getattr(torch, self.dtype))
            settings = peft.LoraConfig(r=self.lora.rank, target_modules=list(self.lora.targets))
            model = peft.get_peft_model(model, settings)
            hold_masters(weight for weight in model.parameters() if weight.requires_grad)
        divide(model, self.ranks, sequence=self.parallel.sequence)
        self.model = model
        embeds = torch.randn(ROWS, LENGTH, 96, dtype=blocks.dtype, requires_grad=True)
        common: dict[str, Any] = {"inputs_embeds": embeds, "use_cache": False}
        if self.attention == "documents":
            segments = torch.arange(1, 3).repeat_interleave(LENGTH // 2).repeat(ROWS, 1)
            masks = packed_masks(model, segments, getattr(torch, self.dtype))
            common |= {"attention_mask": masks} | documents_for(model, segments, masks)
        else:
            mask = torch.ones(ROWS, LENGTH, dtype=torch.long)
            mask[0, -3:] = 0
            common |= {"attention_mask": mask}
        return partial(blocks, **common)

    def saved(self, layers: int) -> tuple[int, int]:
        """Bytes of distinct storages that autograd saves, weights left out; and those of whole rows of states."""
        forward = self.built(layers)
        weights = {dtensors.local(weight).untyped_storage().data_ptr() for weight in self.model.parameters()}
        storages: dict[int, torch.UntypedStorage] = {}
        whole: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = storage
                if tensor.numel() == ROWS * LENGTH * 96:
                    whole[storage.data_ptr()] = storage.nbytes()
            return tensor

        with autocast("cpu", self.dtype), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            forward()
        return sum(storage.nbytes() for storage in storages.values()), sum(whole.values())

    def alive(self, layers: int, how: Recompute) -> int:
        """Bytes given out by torch's allocator in a forward pass, and not taken back."""
        forward, found = self.built(layers), []
        with recomputed(self.model, how), autocast("cpu", self.dtype):
            found.append(forward())
            gc.collect()
            with torch.profiler.profile(profile_memory=True) as profile:
                found.append(forward())
        events = profile.profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]
        return sum(event.nbytes() for event in events if event.name() == "[memory]")

    def planned(self, layers: int, how: Recompute = "none") -> int:
        """By the closed form."""
        shape = DecoderShape.from_config(config(layers))
        member = Member.of(self.parallel, rank=0, world=2)
        gradients: Gradients = "full" if self.lora is None else "through"
        attention: Attention = LENGTH // 2
        if self.attention == "eager" or self.attention == "sdpa":
            attention = self.attention
        kind: dict[str, Any] = {"dtype": self.dtype, "gradients": gradients, "lora": self.lora, "recompute": how}
        return decoder_activations(member.decoder(shape), rows=ROWS, length=LENGTH, attention=attention, **kind)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.row("S4-65")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("attention", ["eager", "sdpa", "documents"])
@pytest.mark.parametrize("learns", ["all", "adapters"])
@pytest.mark.parametrize("sequence", [True, False])
def test_a_block_keeps_what_the_formula_says(
    two: DeviceMesh, dtype: str, attention: str, learns: str, sequence: bool
) -> None:
    lora = Lora(rank=4, targets=TARGETS) if learns == "adapters" else None
    model = Kept(two, dtype=dtype, attention=attention, lora=lora, sequence=sequence)
    (one, _), (three, whole) = model.saved(1), model.saved(3)
    assert model.planned(2) == three - one  # two blocks' worth
    assert bool(whole) is not sequence  # hidden states of all positions are kept in no block


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.row("S4-65")
@pytest.mark.parametrize("how", ["full", "selective"])
@pytest.mark.parametrize(("dtype", "learns"), [("float32", "all"), ("bfloat16", "adapters")])
def test_a_recomputed_block_keeps_its_piece_of_its_input(
    two: DeviceMesh, how: Recompute, dtype: str, learns: str
) -> None:
    lora = Lora(rank=4, targets=TARGETS) if learns == "adapters" else None
    model = Kept(two, dtype=dtype, attention="eager", lora=lora, sequence=True)
    found = model.alive(3, how) - model.alive(1, how)
    assert model.planned(3, how) - model.planned(1, how) == pytest.approx(found, rel=0.005)


# --- what processes compute and send --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """What the processes of a case say."""
    return case_of(Path(__file__).with_name("sequence_ranks.py"), str(tmp_path_factory.mktemp("pieces")))


@pytest.mark.row("S4-65")
def test_families_give_the_losses_and_gradients_of_one_process(case: Case) -> None:
    found = case("families")
    log = found.pop("log")
    for ranks in found.values():
        for name, (loss, gradient, norm) in (item for rank in ranks for item in rank.items()):
            bound = 1e-5 if name.startswith("Gemma") else 1e-12  # its norms are in float32
            assert loss <= bound, (name, log)
            assert gradient <= bound, name
            assert norm <= bound, name
    assert [len(ranks[0]) for ranks in found.values()] == [2, 10]


@pytest.mark.row("S4-65")
def test_gathers_and_scatters_send_what_the_closed_form_says(case: Case) -> None:
    found = case("sent")
    log = found.pop("log")
    shape = DecoderShape.from_config(LlamaConfig(**SIZES))
    for world, ranks in ((int(count), ranks) for count, ranks in found.items()):
        for name, numbers in (item for rank in ranks for item in rank.items()):
            how, adapters, sequence = name.split()
            lora = Lora(rank=2, targets=ADAPTED[how]) if adapters == "True" else None
            model = Model(
                shape=shape,
                width=4,
                learns=lora is None,
                lora=lora,
                adapter=lora.params(shape) if lora is not None else 0,
                beside=int(lora is not None),
            )
            member = Member.of(Parallel(tensor=world, sequence=sequence == "True"), rank=0, world=world)
            common: dict[str, Any] = {"positions": 16, "micro": 1, "width": 4, "stream": 4}
            expected = messages(member, model, again=how == "full", **common)["tensor"]
            head = 2 * 16 * shape.d_model * (world - 1) / world  # is not run here
            assert 4 * (sum(numbers) + head) == expected, (world, name, numbers, log)
    assert [len(ranks[0]) for ranks in found.values()] == [8, 4]


@pytest.mark.row("S4-65")
def test_sums_are_scattered_to_the_same_numbers_by_either_way(case: Case) -> None:
    assert case("scattered")["same"] == [[True] * 3] * 3


@pytest.mark.row("S4-65")
@pytest.mark.row("S2-29")
def test_processes_end_where_one_does(case: Case) -> None:
    found = case("equal")
    log = found.pop("log")
    for name, distances in found.items():
        assert all(isinstance(one, float) and one <= BOUNDS["float64"] for one in distances), (name, distances, log)
        assert max(distances) <= 1e-11, name
        assert len(set(distances)) == 1, f"{name}: processes end apart: {distances}"
    assert len(found) == 6


@pytest.mark.row("S2-31")
def test_a_run_goes_on_in_another_layout_after_every_step(case: Case) -> None:
    found = case("resumed")
    log = found.pop("log")
    assert found.pop("through") == ["kept"], log
    *before, (_, last) = found.items()
    for done, (_, ranks) in enumerate(before):
        assert ranks == [[f"resumed at step {done} of {done + 1}"] if done else []] * len(ranks), log
    for said, distance in last:
        assert said == ["resumed at step 4 of 5"], log
        assert distance <= BOUNDS["float64"], log
    assert [len(ranks) for ranks in found.values()] == [4, 1, 4, 4, 2]


# --- what is refused ------------------------------------------------------------------------------------------------


def test_what_may_work_across_positions_is_refused_before_anything_is_cut(two: DeviceMesh) -> None:
    inside = LlamaForCausalLM(config(2))
    inside.model.layers[1].add_module("mixed", nn.Conv1d(96, 96, 3))
    dropping = LlamaForCausalLM(config(1))
    dropping.model.layers[0].mlp.add_module("dropout", nn.Dropout(0.1))
    bare = LlamaForCausalLM(config(1))
    bare.model.norm = nn.Identity()
    reading = LlamaForCausalLM(config(1))
    reading.model.layers[0] = ReadingLayer(reading.model.layers[0], None)
    cases = {
        "LlamaModel has at layers.1.mixed a Conv1d, of which it is not known": inside,
        "LlamaModel has at layers.0.mlp.dropout dropout of 0.1": dropping,
        "LlamaModel has not one norm behind its blocks": bare,
        "LlamaModel reads media inside its blocks": reading,
    }
    for said, model in cases.items():
        before = [id(weight) for weight in model.parameters()]
        with pytest.raises(ConfigError, match=said) as error:
            divide(model, two, sequence=True)
        assert error.value.place == "trainer.parallel.sequence"
        assert [id(weight) for weight in model.parameters()] == before


def test_settings_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ValueError, match="tensor is 1: set tensor to 2 or more"):
        Parallel(sequence=True)
    with pytest.raises(ValueError, match="sequence is true and context is 2: both cut rows"):
        Parallel(sequence=True, tensor=2, context=2)
    assert Parallel(tensor=2, sequence=True).data_only() == Parallel()
    with pytest.raises(ValueError, match="reads pictures inside the decoder, where each process would have a piece"):
        Tune.model_validate(
            {"connector": {"kind": "gated-cross-attention"}, "trainer": {"parallel": {"tensor": 2, "sequence": True}}}
        )
