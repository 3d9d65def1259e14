"""What a pretraining takes, beside what was published of some."""

from __future__ import annotations

import pytest

from plait.training.cost import DecoderShape, decoder_flops
from plait.training.scale import scale, usual_shape


@pytest.mark.row("S4-59")
@pytest.mark.parametrize(
    ("weights", "tokens", "published"),
    [
        (174.6e9, 300e9, 3.14e23),  # GPT-3 175B: arXiv 2005.14165, table D.1
        (13.0e9, 300e9, 2.31e22),  # GPT-3 13B: the same
        (125e6, 300e9, 2.25e20),  # GPT-3 small: the same
        (70e9, 1.4e12, 5.76e23),  # Chinchilla: arXiv 2203.15556, table 3 (its budget, that of Gopher)
    ],
)
def test_operations_are_those_of_papers(weights, tokens, published):
    found = scale(weights=weights, tokens=tokens, devices=1, peak=1e12, mfu=1.0)
    assert found.flops == pytest.approx(published, rel=0.04)
    assert found.petaflop_days == pytest.approx(published / 8.64e19, rel=0.04)


@pytest.mark.row("S4-59")
def test_days_are_those_of_a_published_run():
    """LLaMA-65B (arXiv 2302.13971, section 2.4): 380 tokens/s a GPU on 2,048 A100, 1.4 T tokens in about 21 days."""
    mfu = 6 * 65.2e9 * 380 / 312e12
    found = scale(weights=65.2e9, tokens=1.4e12, devices=2_048, peak=312e12, mfu=mfu)
    assert found.seconds / 86_400 == pytest.approx(21, rel=0.02)
    assert found.device_hours == pytest.approx(1_022_362, rel=0.02)  # its table 15
    assert found.tokens_per_s == pytest.approx(380)


@pytest.mark.row("S4-59")
@pytest.mark.parametrize("weights", [1e9, 7e9, 65e9, 175e9, 1e12])
def test_a_usual_shape_has_about_so_many_weights_and_costs_six_n_d(weights):
    shape = usual_shape(weights)
    blocks = shape.params - 2 * shape.vocab * shape.d_model
    assert blocks == pytest.approx(weights, rel=0.2)
    short = 128  # positions: attention costs next to nothing
    counted = decoder_flops(shape, rows=1, length=short, head_positions=0, gradients="full")
    assert counted == pytest.approx(6 * blocks * short, rel=0.05)


def test_gpt3_is_usual():
    shape = usual_shape(175e9)
    assert (shape.layers, shape.d_model, shape.heads) == (96, 12_288, 96)  # arXiv 2005.14165, table 2.1
    assert isinstance(shape, DecoderShape)
