"""The output head: float32 scores from 16-bit weights, and gradients, with no float32 copy of the weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from plait.models.output_head import float32_scores
from plait.training.precision import autocast


def head_and_hidden(dtype: torch.dtype = torch.bfloat16, *, words: int = 5_000) -> tuple[nn.Linear, torch.Tensor]:
    torch.manual_seed(0)
    head = nn.Linear(64, words, bias=False, dtype=dtype).requires_grad_(False)
    head.weight.copy_(torch.randn(words, 64))
    return head, (3 * torch.randn(7, 64)).to(dtype)


@pytest.mark.parametrize("words", [1, 500, 2_048, 5_000])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_scores_have_the_resolution_of_float32(precision: str, words: int) -> None:
    head, hidden = head_and_hidden(words=words)
    exact = hidden.double() @ head.weight.double().T
    with autocast("cpu", precision):
        scores, rounded = float32_scores(head, hidden), head(hidden)
    assert scores.dtype == torch.float32
    assert float((scores - exact).abs().max()) < 1e-4
    assert words == 1 or float((rounded.double() - exact).abs().max()) > 0.05, "the layer itself rounds"


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_the_gradient_of_a_frozen_head_s_inputs_is_that_of_the_whole_product(kind: torch.dtype) -> None:
    head, hidden = head_and_hidden(kind)
    one = hidden.clone().requires_grad_(True)
    float32_scores(head, one).square().mean().backward()
    other = hidden.double().requires_grad_(True)
    (other @ head.weight.double().T).square().mean().backward()
    assert one.grad is not None
    assert other.grad is not None
    assert one.grad.dtype == kind, "the gradient is rounded once, where the hidden states are"
    assert torch.allclose(one.grad, other.grad.to(kind), rtol=2e-2 if kind == torch.bfloat16 else 2e-3)


def test_a_trained_head_gets_its_gradient() -> None:
    head, hidden = head_and_hidden(torch.float32)
    head.requires_grad_(True)
    hidden.requires_grad_(True)
    float32_scores(head, hidden).square().sum().backward()
    found = [head.weight.grad, hidden.grad]
    head.weight.grad, hidden.grad = None, None
    head(hidden).square().sum().backward()
    for one, other in zip(found, (head.weight.grad, hidden.grad), strict=True):
        assert one is not None
        assert other is not None
        assert torch.allclose(one, other, rtol=1e-5)


def test_a_trained_16_bit_head_or_its_bias_gets_a_gradient() -> None:
    head, hidden = head_and_hidden()
    head.requires_grad_(True)
    float32_scores(head, hidden).sum().backward()
    assert head.weight.grad is not None
    biased = nn.Linear(64, 3, dtype=torch.bfloat16)
    biased.weight.requires_grad_(False)
    float32_scores(biased, hidden).sum().backward()
    assert biased.bias.grad is not None
    assert torch.equal(biased.bias.grad, torch.full((3,), 7.0, dtype=torch.bfloat16))


class _Sizes(TorchDispatchMode):
    """The largest float32 matrix that any operation returns, but for those with a row for each position."""

    def __init__(self, positions: int) -> None:
        super().__init__()
        self.positions = positions
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if (
            isinstance(out, torch.Tensor)
            and out.dtype == torch.float32
            and out.dim() == 2
            and len(out) != self.positions
        ):
            self.largest = max(self.largest, out.numel())
        return out


def test_no_copy_of_the_weights_is_made_forward_or_backward() -> None:
    head, hidden = head_and_hidden(words=10_000)
    hidden = hidden.float().requires_grad_(True)
    with _Sizes(len(hidden)) as sizes:
        float32_scores(head, hidden).sum().backward()
    assert sizes.largest == 2_048 * 64


def test_new_weights_are_seen_at_once() -> None:
    head, hidden = head_and_hidden()
    first = float32_scores(head, hidden)
    head.weight.data = 2 * head.weight.data
    assert torch.allclose(float32_scores(head, hidden), 2 * first)


def test_weights_loaded_in_inference_mode_answer() -> None:
    with torch.inference_mode():
        head, hidden = head_and_hidden()
        assert torch.isfinite(float32_scores(head, hidden)).all()


def test_a_bias_is_added_and_what_is_no_plain_layer_is_called_as_it_is() -> None:
    biased = nn.Linear(4, 3, dtype=torch.bfloat16).requires_grad_(False)
    hidden = torch.randn(2, 4, dtype=torch.bfloat16)
    expected = hidden.float() @ biased.weight.float().T + biased.bias.float()
    assert torch.allclose(float32_scores(biased, hidden), expected, atol=1e-6)
    wrapped = nn.Sequential(biased)
    assert torch.equal(float32_scores(wrapped, hidden), biased(hidden))
    double = biased.double()
    assert float32_scores(double, hidden.double()).dtype == torch.float64
