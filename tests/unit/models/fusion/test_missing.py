"""Modality dropout never takes all, and comes from the generator alone; grids score every subset."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.core.errors import ConfigError
from plait.models.fusion.gated import GatedFusion
from plait.models.fusion.missing import MissingTokens, ModalityDropout, subset_grid, subsets
from plait.models.fusion.streams import Stream, only, presence, vector

pytestmark = pytest.mark.row("S0-16")
NAMES = ["image", "text", "audio"]


def inputs(here: torch.Tensor) -> dict[str, Stream]:
    return {name: vector(torch.ones(len(here), 2), here[:, i]) for i, name in enumerate(NAMES)}


@settings(max_examples=40, deadline=None)
@given(
    bits=st.lists(st.booleans(), min_size=18, max_size=18),
    rates=st.lists(st.sampled_from([0.0, 0.3, 0.9, 1.0]), min_size=3, max_size=3),
    seed=st.integers(0, 2**32),
)
def test_something_always_stays(bits: list[bool], rates: list[float], seed: int) -> None:
    here = torch.tensor(bits).view(6, 3)
    drop = ModalityDropout(dict(zip(NAMES, rates, strict=True)))
    found = presence(drop(inputs(here), torch.Generator().manual_seed(seed)), NAMES)
    assert not bool((found & ~here).any())  # nothing appears
    assert torch.equal(found.any(1), here.any(1))  # who had something still has
    torch.manual_seed(seed + 1)  # the global generator is not asked
    again = drop(inputs(here), torch.Generator().manual_seed(seed))
    assert torch.equal(presence(again, NAMES), found)
    if 0.0 in rates:
        kept = rates.index(0.0)
        assert torch.equal(found[:, kept], here[:, kept])


def test_how_often_each_is_dropped() -> None:
    here = torch.ones(40_000, 3, dtype=torch.bool)
    drop = ModalityDropout(dict.fromkeys(NAMES, 0.5))
    found = presence(drop(inputs(here), torch.Generator().manual_seed(0)), NAMES)
    wanted = 0.5 - 0.5**3 / 3
    assert (~found).float().mean(0).tolist() == pytest.approx([wanted] * 3, abs=0.01)  # 4 standard errors


def test_nothing_is_dropped_or_drawn_when_not_training() -> None:
    drop = ModalityDropout(dict.fromkeys(NAMES, 1.0)).eval()
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    given_inputs = inputs(torch.ones(2, 3, dtype=torch.bool))
    assert presence(drop(given_inputs, generator), NAMES).all()
    assert torch.equal(generator.get_state(), before)
    with pytest.raises(ConfigError, match=r"not probabilities: image 1.5"):
        ModalityDropout({"image": 1.5})


def test_learned_tokens_leave_what_is_there() -> None:
    fill = MissingTokens({"image": 2})
    tokens = torch.randn(2, 3, 2)
    real = torch.tensor([[True, False, True], [True, True, True]])
    found = fill({"image": Stream(tokens=tokens, real=real, present=torch.tensor([True, False]))})["image"]
    assert torch.equal(found.tokens[0][real[0]], tokens[0][real[0]])
    assert found.there.tolist() == [[True, False, True], [True, False, False]]
    found.tokens[1].sum().backward()
    assert fill.tokens["image"].grad is not None
    assert fill.tokens["image"].grad.tolist() == [1.0, 1.0]


def test_the_grid_has_every_subset_once() -> None:
    assert subsets(["a", "b", "c"], smallest=0) == [
        (), ("a",), ("b",), ("c",), ("a", "b"), ("a", "c"), ("b", "c"), ("a", "b", "c")
    ]  # fmt: skip
    torch.manual_seed(0)
    fuse = GatedFusion(dict.fromkeys(NAMES, 2), 4)
    whole = {name: vector(torch.randn(8, 2)) for name in NAMES}
    found = subset_grid(lambda chosen: fuse(only(whole, chosen)).values.abs().sum().item(), NAMES, smallest=0)
    assert len(found) == 8
    assert found[()] == 0
    assert len(set(found.values())) == 8
    with pytest.raises(ConfigError, match="2 modalities: a, a"):
        subset_grid(lambda chosen: 0.0, ["a", "a"])
