"""Search: finds the fusion a task needs, the same way every time."""

import pytest
import torch
from torch import Tensor, nn

from plait.core.errors import ConfigError, NumericsError
from plait.models.fusion.bilinear import BilinearFusion
from plait.models.fusion.concat import ConcatFusion
from plait.models.fusion.search import SearchedFusion, SearchSpeed, SearchStep, search
from plait.models.fusion.streams import Stream, vector

pytestmark = pytest.mark.row("S0-19")
WIDTHS = {"a": 1, "b": 1}


def model() -> tuple[nn.Module, SearchedFusion]:
    searched = SearchedFusion({"concat": ConcatFusion(WIDTHS, d_out=2), "bilinear": BilinearFusion(WIDTHS, 2)})
    return nn.ModuleDict({"fusion": searched}), searched


def xor(step: int) -> tuple[dict[str, Stream], Tensor]:
    signs = torch.randint(2, (64, 2), generator=torch.Generator().manual_seed(step)) * 2.0 - 1
    return {"a": vector(signs[:, :1]), "b": vector(signs[:, 1:])}, (signs.prod(1) < 0).long()


def found(seed: int, steps: int = 30) -> tuple[list[SearchStep], SearchedFusion]:
    torch.manual_seed(seed)
    whole, searched = model()

    def loss(step: int) -> Tensor:
        inputs, label = xor(step)
        return nn.functional.cross_entropy(searched(inputs).values, label)

    speed = SearchSpeed(weights=5e-2, shares=1e-1)
    log = search(whole, searched, train=loss, valid=lambda step: loss(10_000 + step), steps=steps, speed=speed)
    return log, searched


def test_it_chooses_what_the_task_needs_and_repeats_itself() -> None:
    log, searched = found(0)
    assert searched.best() == "bilinear"
    assert searched.shares()["bilinear"] > 0.8
    assert log[-1].valid < log[0].valid / 2
    assert log[-1].shares == searched.shares()
    again, _ = found(0)
    assert again == log
    inputs, label = xor(77)
    alone = searched.discretized()
    assert isinstance(alone, BilinearFusion)
    assert (alone(inputs).values.argmax(-1) == label).all()


def test_equal_shares_give_the_mean_and_one_alone_gives_that_one() -> None:
    _, searched = model()
    inputs, _ = xor(0)
    parts = torch.stack([searched.candidates[name](inputs).values for name in searched.names])
    torch.testing.assert_close(searched(inputs).values, parts.mean(0))
    with torch.no_grad():
        searched.choice.copy_(torch.tensor([200.0, -200.0]))
    assert torch.equal(searched(inputs).values, parts[0])
    assert searched.best() == "concat"


def test_shares_move_on_validation_only_and_weights_on_training_only() -> None:
    torch.manual_seed(0)
    whole, searched = model()
    weight = searched.candidates.get_submodule("concat.out").get_parameter("weight")
    flat = lambda _: searched.choice.sum() * 0 + weight.sum() * 0  # noqa: E731

    def valid(_: int) -> Tensor:
        return searched.choice[0] + weight.sum()

    before = weight.detach().clone()
    search(whole, searched, train=flat, valid=valid, steps=1)
    assert torch.equal(weight, before)
    assert searched.best() == "bilinear"


def test_what_cannot_be_searched_is_refused() -> None:
    with pytest.raises(ConfigError, match="candidates: a of width 2, b of width 3"):
        SearchedFusion({"a": ConcatFusion(WIDTHS, d_out=2), "b": ConcatFusion(WIDTHS, d_out=3)})
    _, searched = model()
    zero = lambda _: torch.tensor(0.0)  # noqa: E731
    with pytest.raises(ConfigError, match="is not in the model"):
        search(nn.Linear(1, 1), searched, train=zero, valid=zero, steps=1)
    with pytest.raises(NumericsError, match="nan at step 0 of the search"):
        search(searched, searched, train=zero, valid=lambda _: torch.tensor(float("nan")), steps=1)
