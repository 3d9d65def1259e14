"""The planner's closed forms against published and measured figures, and what it may propose."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.cli.main import main
from plait.core.errors import ConfigError
from plait.stages.tune import Tune
from plait.training.cost import SMOLLM2_135M, DecoderShape, Lora
from plait.training.parallel.advise import Cluster, Judged, Work, layouts
from plait.training.trainer import Parallel

LLAMA_7B = DecoderShape(layers=32, d_model=4096, d_ff=11008, heads=32, kv_heads=32, vocab=32_000, tied=False)
MEASURED = DecoderShape(layers=6, d_model=512, d_ff=1536, heads=8, kv_heads=8, vocab=8192)
"""Of ``benchmarks/scaling.py``, 25 M."""


def cluster(processes: int, *, gib: float = 80, per_host: int = 8) -> Cluster:
    return Cluster(
        processes=processes, per_host=per_host, memory_bytes=round(gib * 2**30), flops=1e14, near=1e11, far=1e10
    )


def chosen(found: list[Judged], **settings: int) -> Judged:
    return next(one for one in found if one.parallel == Parallel.model_validate(settings))


@pytest.mark.row("S4-67")
def test_states_follow_zero_and_shrink_with_each_dimension() -> None:
    work = Work(shape=LLAMA_7B, rows=64, length=2048)
    found = layouts(work, cluster(8))
    states = ("weights", "gradients", "optimizer")
    whole = sum(chosen(found).memory[name] for name in states)
    assert whole == 16 * LLAMA_7B.params
    for settings, share in (({"zero": 3}, 1 / 8), ({"tensor": 8}, 1 / 8), ({"tensor": 2, "zero": 3}, 1 / 8)):
        held = sum(chosen(found, **settings).memory[name] for name in states)
        # Norms are whole where matrices are divided.
        assert held == pytest.approx(whole * share, rel=1e-6 if "tensor" not in settings else 1e-3), settings
    assert found[0].fits
    assert not chosen(found).fits  # 100 GiB of states


@pytest.mark.row("S4-67")
def test_tensor_within_machines_and_stages_between_them_are_ranked_together() -> None:
    work = Work(shape=LLAMA_7B, rows=64, length=2048, recompute=True)
    wires = replace(cluster(32, gib=40), far=1e9)
    found = layouts(work, wires)
    both = {"tensor": 8, "pipeline": 4}
    one = chosen(found, **both)
    states = ("weights", "gradients", "optimizer")
    d = LLAMA_7B.d_model
    words, block = LLAMA_7B.vocab * d, (LLAMA_7B.params - 2 * LLAMA_7B.vocab * d - d) // 32
    held = (8 * (block - 2 * d) + words) / 8 + 8 * 2 * d  # the first stage's: norms are whole in each process
    assert sum(one.memory[name] for name in states) == pytest.approx(16 * held)
    hidden = 64 * 2048 * LLAMA_7B.d_model * 2
    assert one.sent == {"tensor": (8 * 5 + 1) * hidden * 2 * 7 // 8, "pipeline": 2 * hidden}
    # Over slow wires, 32 processes on 4 machines: the classic layout beats each of the two alone.
    assert one.fits
    assert one.step_s < min(chosen(found, tensor=32).step_s, chosen(found, pipeline=32).step_s)


@pytest.mark.row("S4-67")
def test_bytes_that_are_sent_are_those_measured() -> None:
    found = layouts(Work(shape=MEASURED, rows=4, length=128, dtype="float32"), cluster(2))
    sockets = {"tensor": 26.1, "pipeline": 17.0, "context": 118.1}  # MiB of a step, benchmarks/scaling.py
    for name, mib in sockets.items():
        assert sum(chosen(found, **{name: 2}).sent.values()) / 2**20 == pytest.approx(mib, rel=5e-3), name


@pytest.mark.row("S4-65")
@pytest.mark.row("S4-67")
def test_pieces_of_rows_are_proposed_beside_tensor_with_less_memory_and_more_bytes() -> None:
    found = layouts(Work(shape=LLAMA_7B, rows=64, length=2048), cluster(8))
    plain, pieces = chosen(found, tensor=8), chosen(found, tensor=8, sequence=True)
    assert pieces.memory["activations"] < plain.memory["activations"]
    assert {**pieces.memory, "activations": 0} == {**plain.memory, "activations": 0}
    hidden, norms = 64 * 2048 * LLAMA_7B.d_model * 2, (2 * 32 + 1) * LLAMA_7B.d_model
    # Inputs of matrices that learn once more, rows cut and joined; gradients of norms.
    more = hidden * (2 * 32 + 2) * 7 // 8 + 2 * 4 * norms * 7 // 8
    assert pieces.sent["tensor"] - plain.sent["tensor"] == more
    adapters = layouts(Work(shape=LLAMA_7B, rows=64, length=2048, lora=Lora(rank=8)), cluster(8))
    sides = 2 * 4 * 32 * 8 * 2 * LLAMA_7B.d_model * 7 // 8  # gradients of A beside queries and values
    rank = (64 * 2048 * 2) * 32 * 8 * 2 * 7 // 8  # and their inputs once more, as wide as the rank
    one, other = chosen(adapters, tensor=8), chosen(adapters, tensor=8, sequence=True)
    assert other.sent["tensor"] - one.sent["tensor"] == hidden * 7 // 8 + rank + sides
    assert not any(one.parallel.sequence and one.parallel.context > 1 for one in found)


@pytest.mark.row("S4-68")
def test_experts_are_proposed_where_there_are_some() -> None:
    mixtral = replace(LLAMA_7B, experts=8, top_k=2)
    found = layouts(Work(shape=mixtral, rows=64, length=2048), cluster(8))
    assert {one.parallel.expert for one in found} == {1, 2, 4, 8}
    alone, among = chosen(found), chosen(found, expert=8)
    expert = mixtral.layers * 8 * mixtral.expert_params
    assert alone.memory["weights"] - among.memory["weights"] == 4 * expert * 7 // 8
    hidden = 8 * 2048 * mixtral.d_model * 2  # of a process, a layer
    assert among.sent["expert"] == 4 * mixtral.layers * 2 * hidden * 7 // 8
    assert among.sent["data"] < alone.sent["data"]  # of an expert that nobody else holds nothing is summed
    assert not any(one.parallel.expert > 1 for one in layouts(Work(shape=LLAMA_7B, rows=64, length=8), cluster(8)))


@pytest.mark.row("S4-67")
def test_slow_wires_between_machines_keep_tensor_parallelism_within_one() -> None:
    work = Work(shape=LLAMA_7B, rows=64, length=2048, recompute=True)
    best = layouts(work, cluster(16, gib=40))[0]
    assert best.fits
    assert best.parallel.tensor <= 8


@hypothesis.settings(max_examples=50)
@given(
    st.sampled_from([1, 2, 3, 4, 6, 8, 12]),
    st.integers(1, 32),
    st.sampled_from([64, 1000]),
    st.booleans(),
    st.booleans(),
)
def test_every_proposal_is_a_setting_that_can_be_used(
    processes: int, rows: int, length: int, adapters: bool, recompute: bool
) -> None:
    lora = Lora(rank=8) if adapters else None
    work = Work(shape=SMOLLM2_135M, rows=rows, length=length, lora=lora, recompute=recompute)
    found = layouts(work, cluster(processes))
    for one in found:
        assert one.parallel.grid(0, processes).data == one.data <= rows
        assert SMOLLM2_135M.heads % one.parallel.tensor == 0
        assert one.idle < 1
        assert one.step_s >= one.compute_s > 0
        assert all(count >= 0 for count in (*one.sent.values(), *one.memory.values()))
    times = [one.step_s for one in found if one.fits]
    assert times == sorted(times)
    small = layouts(work, replace(cluster(processes), memory_bytes=1))
    assert not any(one.fits for one in small)
    assert {str(one.parallel) for one in small} == {str(one.parallel) for one in found}


def test_the_command_ranks_layouts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    config = {**sizes, "num_key_value_heads": 2, "vocab_size": 100}
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = ["advise", "parallel", "--decoder", str(tmp_path), "--processes", "4", "--memory-gib", "1"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "layouts fit 1 GiB" in said
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["layouts"][0]["fits"]
    assert {"tensor": 2} in [one["parallel"] for one in found["layouts"]]
    assert main([*words[:-1], "0.0000001"]) == 0
    assert "those that come nearest" in capsys.readouterr().out


def test_numbers_and_folders_that_mean_nothing_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["advise", "parallel", "--processes", "0", "--memory-gib", "1"]) == 2
    assert "--processes is 0, expected more than 0" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{}")
    words = ["advise", "parallel", "--decoder", str(tmp_path), "--processes", "4", "--memory-gib", "1"]
    assert main(words) == 3
    assert "no decoder of LLaMA's kin" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tensor": 2}, "tensor is 2, and the decoder has 9 heads"),
        ({"tensor": 9}, "tensor is 9, and the decoder has 3 heads of keys"),
        ({"context": 2, "context_attention": "ulysses"}, "context is 2 with ulysses, and the decoder has 9 heads"),
        ({"pipeline": 31}, "pipeline is 31, and the decoder has 30 blocks"),
        ({"expert": 2}, "expert is 2, and the decoder has no experts"),
    ],
)
def test_sizes_that_cannot_be_divided_are_refused_before_anything_is_loaded(
    settings: dict[str, object], said: str
) -> None:
    shape = SMOLLM2_135M
    sizes = {"heads": shape.heads, "kv_heads": shape.kv_heads, "layers": shape.layers, "experts": shape.experts}
    with pytest.raises(ConfigError, match=said):
        Parallel.model_validate(settings).check_decoder(**sizes)


def test_words_which_have_no_language_model_are_dealt_to_all_processes() -> None:
    stage = Tune.model_validate({"trainer": {"parallel": {"tensor": 3}}})
    assert stage.shares(6, setting="batch_size") == 2
    assert stage.shares(6, setting="words.batch_size") == 6
