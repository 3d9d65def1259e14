from __future__ import annotations

import time

import pytest

from plait.core import speed
from plait.core.device import Compute
from plait.core.events import Events
from plait.core.files import read_json
from plait.training import peak_rate as peak
from plait.training.peak_rate import RATES, keeping_rates, peak_rate

CPU = Compute(device="cpu", dtype="float32", threads=1, why=())


def test_it_is_measured_once_a_run_and_goes_on_when_the_run_does(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def rate(dtype: str, *, device: str) -> float:
        asked.append((dtype, device))
        return 1e9 * len(asked)

    monkeypatch.setattr(speed, "gemm_peak", rate)
    seen: list = []
    for _ in range(2):
        with keeping_rates(tmp_path):
            assert [peak_rate(CPU, events=Events(listeners=(seen.append,))) for _ in range(3)] == [1e9] * 3
    assert asked == [("float32", "cpu")]
    assert [event.text for event in seen] == [
        "matrix products: 1 GFLOP/s (cpu, float32, 1 threads), which MFU is a share of"
    ]
    with keeping_rates(tmp_path):
        other = Compute(device="cpu", dtype="bfloat16", threads=1, why=())
        assert peak_rate(other, events=Events()) == 2e9
    assert read_json(tmp_path / RATES) == {"cpu, float32, 1 threads": 1e9, "cpu, bfloat16, 1 threads": 2e9}


@pytest.mark.parametrize("content", ["[1]", "{", '{"cpu, float32, 1 threads": "fast"}'])
def test_a_damaged_file_is_measured_anew(tmp_path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    monkeypatch.setattr(speed, "gemm_peak", lambda dtype, device: 5e9)
    (tmp_path / RATES).write_text(content)
    with keeping_rates(tmp_path):
        assert peak_rate(CPU, events=Events()) == 5e9


def test_it_takes_less_than_a_second_and_is_the_machines() -> None:
    peak._without_run.cache_clear()
    begun = time.process_time()
    assert 1e8 < peak_rate(CPU, events=Events()) < 1e14
    assert time.process_time() - begun < 1.0
