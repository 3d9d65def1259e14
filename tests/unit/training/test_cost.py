"""The formulas against numbers known from elsewhere; torch's own counters are in ``tests/parity/test_cost_*``."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.core.estimate import Machine
from plait.training.cost import (
    SMOLLM2_135M,
    DecoderShape,
    Lora,
    decoder_activations,
    decoder_flops,
    kv_cache_bytes,
    logits_bytes,
    time_range,
)
from plait.training.peak import PARTS, RUNTIME_BYTES, checkpoint_bytes, checkpoints_left, in_turn, peak_memory

pytestmark = pytest.mark.light


def machine(**changes: object) -> Machine:
    known: dict[str, object] = {"cores": 2, "memory_bytes": 2**34, "disk_bytes": 2**36, "measured": True}
    return Machine(**(known | {"gemm_fp32": 2e11, "gemm_bf16": 1e12} | changes))  # type: ignore[arg-type]


def test_smollm2_has_the_published_number_of_weights() -> None:
    assert SMOLLM2_135M.params == 134_515_008


def test_a_lora_of_rank_8_on_all_layers_of_smollm2() -> None:
    lora = Lora(rank=8, targets=tuple(SMOLLM2_135M.matrices()))
    a_block = 8 * ((576 + 576) * 2 + (576 + 192) * 2 + (576 + 1536) * 3)
    assert lora.params(SMOLLM2_135M) == 30 * a_block


shapes = st.builds(
    DecoderShape,
    layers=st.integers(1, 40),
    d_model=st.sampled_from([64, 576, 2048]),
    d_ff=st.sampled_from([128, 1536, 8192]),
    heads=st.sampled_from([4, 8]),
    kv_heads=st.sampled_from([1, 4]),
    vocab=st.integers(100, 50_000),
)


@given(shapes, st.integers(1, 64), st.integers(1, 256))
def test_work_adds_over_rows_and_grows_with_gradients(shape: DecoderShape, rows: int, length: int) -> None:
    one, both, full = (decoder_flops(shape, rows=rows, length=length, gradients=g) for g in ("none", "through", "full"))
    assert 2 * one <= both < full == pytest.approx(3 * one)
    assert decoder_flops(shape, rows=2 * rows, length=length, gradients="full") == pytest.approx(2 * full)
    packed = decoder_flops(shape, rows=rows, length=2 * length, gradients="full")
    assert packed >= 2 * full * (1 - 1e-12)  # attention grows with the square


@given(shapes, st.sampled_from(["float32", "bfloat16"]), st.sampled_from(["eager", "sdpa"]))
def test_frozen_weights_keep_less_and_rows_add(shape: DecoderShape, dtype: str, attention: str) -> None:
    def kept(rows: int, gradients: str, lora: Lora | None = None) -> int:
        return decoder_activations(
            shape,
            rows=rows,
            length=32,
            dtype=dtype,
            gradients=gradients,
            attention=attention,
            lora=lora,  # type: ignore[arg-type]
        )

    assert kept(1, "none") <= kept(1, "through") < kept(1, "through", Lora(rank=4)) < kept(1, "full")
    assert kept(4, "through") == 4 * kept(1, "through")


def test_a_known_cache_and_head() -> None:
    # 2 (keys, values) x 30 layers x 3 heads of 64 x 2 bytes = 23,040 bytes a position
    assert kv_cache_bytes(SMOLLM2_135M, rows=1, length=100, dtype="bfloat16") == 2_304_000
    assert logits_bytes(SMOLLM2_135M, 1, gradients="none") == 49_152 * 4
    assert logits_bytes(SMOLLM2_135M, 2) == 49_152 * 2 * 16


def test_adamw_holds_sixteen_bytes_a_trained_weight() -> None:
    parts = peak_memory(machine(), frozen=1000, frozen_dtype="bfloat16", trainable=10, activations=0)
    assert tuple(parts) == PARTS
    assert parts["weights"] == 2000 + 40
    assert parts["weights"] - 2000 + parts["gradients"] + parts["optimizer"] == 160
    assert parts["runtime"] == RUNTIME_BYTES
    assert peak_memory(machine(runtime_bytes=5))["runtime"] == 5


def test_a_checkpoint_holds_the_model_its_masters_and_their_state() -> None:
    assert checkpoint_bytes(weights=100, trainable=10) == 100 + 4 * 10 + 8 * 10
    assert checkpoint_bytes(weights=100, trainable=10, state=0.0) == 140


@given(st.integers(1, 60), st.integers(0, 20))
def test_as_many_checkpoints_are_left_as_a_run_would_leave(steps: int, every: int) -> None:
    saved = [step for step in range(1, steps + 1) if step == steps or (every and step % every == 0)]
    assert checkpoints_left(steps, every) == len(saved[-2:])


@given(st.integers(1, 30), st.integers(0, 9), st.integers(0, 9), st.integers(0, 30))
def test_what_is_alive_in_a_backward_pass_is_highest_at_an_end(layers: int, kept: int, grown: int, early: int) -> None:
    """Brute force: the head's gradient first, then layer after layer gives its activations back for a gradient."""
    alive = [early + kept * (layers - done) + grown * done for done in range(layers + 1)]
    parts = {"gradients": early + grown * layers, "activations": kept * layers, "weights": 7}
    found = in_turn(parts, early=early)
    assert found["gradients"] + found["activations"] == max(alive)
    assert found["weights"] == 7


def test_time_follows_the_rate_of_the_format() -> None:
    fp32 = time_range(1e12, machine(), dtype="float32", efficiency=(0.5, 1.0))
    assert fp32 == (5.0, 10.0)
    assert time_range(1e12, machine(dtype="bfloat16"), efficiency=(0.5, 1.0)) == (1.0, 2.0)
    assert time_range(1e12, machine(measured=False), efficiency=(0.5, 1.0)) == (pytest.approx(5 / 3), 30.0)


def test_checkpoints_beside_training_hold_a_copy_of_weights_and_moments() -> None:
    within, beside = (peak_memory(machine(), trainable=1000, caches=5, async_save=on) for on in (False, True))
    assert sum(beside.values()) - sum(within.values()) == 12 * 1000
