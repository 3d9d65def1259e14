from __future__ import annotations

import pytest
import torch
from torch import nn

from plait.core.errors import ConfigError
from plait.training.precision import autocast, hold_masters


def test_masters_keep_every_value_and_leave_wider_ones_alone():
    half = nn.Parameter(torch.randn(64).to(torch.bfloat16))
    before = half.detach().clone()
    wide = nn.Parameter(torch.randn(4, dtype=torch.float64))
    assert hold_masters([half, wide]) == 1
    assert (half.dtype, wide.dtype) == (torch.float32, torch.float64)
    assert torch.equal(half.detach(), before.float())


@pytest.mark.row("S2-27")
def test_small_updates_survive_in_a_master_and_vanish_without():
    weight = nn.Parameter(torch.ones(1).to(torch.bfloat16))
    lost = weight.detach().clone()
    hold_masters([weight])
    for _ in range(100):
        weight.data -= 1e-3
        lost -= 1e-3
    assert weight.item() == pytest.approx(0.9, abs=1e-5)
    assert lost.item() == 1.0


def test_autocast_runs_products_in_bfloat16_and_gives_float32_gradients():
    layer = nn.Linear(4, 4)
    with autocast("cpu", "bfloat16"):
        out = layer(torch.randn(2, 4))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32
    with autocast("cpu", "float32"):
        assert layer(torch.randn(2, 4)).dtype == torch.float32


@pytest.mark.parametrize(("device", "dtype"), [("cpu", "float16"), ("meta", "bfloat16")])
def test_what_cannot_be_done_is_refused(device, dtype):
    with pytest.raises(ConfigError, match=r"cannot train in float16|no automatic bfloat16") as error:
        autocast(device, dtype)
    assert "float32" in error.value.remedy
