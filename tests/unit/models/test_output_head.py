"""The output head: float32 scores from 16-bit weights, gradients, and a copy that is never stale."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from plait.models.output_head import Float32Head
from plait.training.precision import autocast


def head_and_hidden(dtype: torch.dtype = torch.bfloat16) -> tuple[nn.Linear, torch.Tensor]:
    torch.manual_seed(0)
    head = nn.Linear(64, 500, bias=False, dtype=dtype).requires_grad_(False)
    head.weight.copy_(torch.randn(500, 64))
    return head, (3 * torch.randn(7, 64)).to(dtype)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_scores_have_the_resolution_of_float32(precision: str) -> None:
    head, hidden = head_and_hidden()
    exact = hidden.double() @ head.weight.double().T
    with autocast("cpu", precision):
        scores, rounded = Float32Head()(head, hidden), head(hidden)
    assert scores.dtype == torch.float32
    assert float((scores - exact).abs().max()) < 1e-4
    assert float((rounded.double() - exact).abs().max()) > 0.05, "the layer itself rounds"


def test_a_trained_head_gets_its_gradient() -> None:
    head, hidden = head_and_hidden(torch.float32)
    head.requires_grad_(True)
    hidden.requires_grad_(True)
    Float32Head()(head, hidden).square().sum().backward()
    found = [head.weight.grad, hidden.grad]
    head.weight.grad, hidden.grad = None, None
    head(hidden).square().sum().backward()
    for one, other in zip(found, (head.weight.grad, hidden.grad), strict=True):
        assert one is not None
        assert other is not None
        assert torch.allclose(one, other, rtol=1e-5)


def test_the_kept_copy_follows_the_weights_and_may_train_after_inference() -> None:
    head, hidden = head_and_hidden()
    wide = Float32Head()
    with torch.inference_mode():
        first = wide(head, hidden).clone()
    assert wide._weight(head.weight) is wide._weight(head.weight), "turned once"
    tracked = hidden.float().requires_grad_(True)
    wide(head, tracked).sum().backward()
    assert tracked.grad is not None
    assert torch.allclose(tracked.grad, head.weight.float().sum(0).expand_as(tracked.grad), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        head.weight.mul_(2)
    assert torch.allclose(wide(head, hidden), 2 * first)


def test_copies_start_empty_and_other_weights_at_the_same_place_are_noticed() -> None:
    head, hidden = head_and_hidden()
    wide = Float32Head()
    first = wide(head, hidden)
    assert copy.deepcopy(wide)._kept is None
    head.weight.data = 2 * head.weight.data
    assert torch.allclose(wide(head, hidden), 2 * first)
    head.float().requires_grad_(True)
    wide(head, hidden)
    assert wide._kept is None, "a head that learns needs no copy"


def test_weights_loaded_in_inference_mode_answer() -> None:
    with torch.inference_mode():
        head, hidden = head_and_hidden()
        assert torch.isfinite(Float32Head()(head, hidden)).all()


def test_a_bias_is_added_and_what_is_no_plain_layer_is_called_as_it_is() -> None:
    biased = nn.Linear(4, 3, dtype=torch.bfloat16)
    hidden = torch.randn(2, 4, dtype=torch.bfloat16)
    expected = hidden.float() @ biased.weight.float().T + biased.bias.float()
    assert torch.allclose(Float32Head()(biased, hidden), expected, atol=1e-6)
    wrapped = nn.Sequential(biased)
    assert torch.equal(Float32Head()(wrapped, hidden), biased(hidden))
    double = biased.double()
    assert Float32Head()(double, hidden.double()).dtype == torch.float64
