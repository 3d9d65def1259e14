"""Rules over decisions: closed forms, who is absent, certainty, calibration."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck

from plait.core.errors import ConfigError, DataError
from plait.models.fusion.decision import (
    Classifier,
    DecisionFusion,
    Rule,
    Stacking,
    WeightedAverage,
    average,
    fit_temperature,
    product,
    vote,
)
from plait.models.fusion.encode import Pool
from plait.models.fusion.streams import Stream, only, vector

pytestmark = pytest.mark.row("S3-17")
RULES: dict[str, Rule] = {
    "average": average,
    "weighted": partial(average, weights=torch.tensor([1.0, 2.0, 0.5])),
    "product": product,
    "product with prior": partial(product, prior=torch.tensor([0.5, 0.3, 0.2])),
    "vote": vote,
}
EVERY = pytest.mark.parametrize("name", RULES)


def drawn(seed: int, modalities: int = 3) -> Tensor:
    return torch.randn(modalities, 4, 3, generator=torch.Generator().manual_seed(seed)).log_softmax(-1)


@EVERY
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_a_rule_gives_a_distribution_of_those_present(name: str, data: st.DataObject) -> None:
    logprobs = drawn(data.draw(st.integers(0, 50)))
    present = torch.tensor(data.draw(st.lists(st.booleans(), min_size=12, max_size=12))).view(3, 4)
    found = RULES[name](logprobs, present)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(4))
    spoiled = logprobs.masked_fill(~present[..., None], torch.nan)
    assert torch.equal(RULES[name](spoiled, present), found)
    alone, nobody = present.sum(0) == 1, present.sum(0) == 0
    if name in ("average", "weighted", "product"):
        torch.testing.assert_close(found[alone], logprobs.transpose(0, 1)[alone][present.T[alone]])
    wanted = torch.tensor([0.5, 0.3, 0.2]) if "prior" in name else torch.full((3,), 1 / 3)
    torch.testing.assert_close(found[nobody].exp(), wanted.expand(int(nobody.sum()), 3))


def test_rules_by_hand() -> None:
    p = torch.tensor([[[0.5, 0.25, 0.25]], [[0.2, 0.6, 0.2]]])
    both, weights = torch.ones(2, 1, dtype=torch.bool), torch.tensor([3.0, 1.0])
    torch.testing.assert_close(average(p.log(), both, weights=weights).exp()[0], (3 * p[0, 0] + p[1, 0]) / 4)
    expected = p[0, 0] ** 3 * p[1, 0]
    torch.testing.assert_close(product(p.log(), both, weights=weights).exp()[0], expected / expected.sum())
    prior = torch.tensor([0.6, 0.3, 0.1])
    expected = p[0, 0] * p[1, 0] / prior  # Bayes' rule of two independent observations
    torch.testing.assert_close(product(p.log(), both, prior=prior).exp()[0], expected / expected.sum())
    torch.testing.assert_close(vote(p.log(), both, weights=weights).exp(), torch.tensor([[0.75, 0.25, 0.0]]))


def test_bayes_rule_recovers_the_posterior() -> None:
    """Two observations that are independent given the class: the product with the prior is exact."""
    torch.manual_seed(0)
    prior = torch.rand(3, dtype=torch.float64).softmax(0)
    likelihoods = [torch.randn(3, 4, dtype=torch.float64).softmax(-1) for _ in range(2)]  # class, observation
    posterior = lambda joint: joint / joint.sum(0)  # noqa: E731
    each = [posterior(prior[:, None] * table) for table in likelihoods]
    truth = posterior(prior[:, None, None] * likelihoods[0][:, :, None] * likelihoods[1][:, None, :])
    pairs = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    logprobs = torch.stack([each[i][:, pairs[:, i]].T.log() for i in range(2)])
    found = product(logprobs, torch.ones(2, 16, dtype=torch.bool), prior=prior)
    torch.testing.assert_close(found.exp(), truth.flatten(1).T)


def test_certain_experts() -> None:
    sure = torch.tensor([[[1.0, 0.0]], [[0.5, 0.5]]]).log()
    both = torch.ones(2, 1, dtype=torch.bool)
    assert average(sure, both).exp().tolist() == [[0.75, 0.25]]
    assert product(sure, both).exp().tolist() == [[1.0, 0.0]]
    against = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]).log()
    assert product(against, both).exp().tolist() == [[0.5, 0.5]]  # they exclude everything


def test_wrong_weights_are_named() -> None:
    both = torch.ones(3, 4, dtype=torch.bool)
    with pytest.raises(ConfigError, match=r"weights \[1.0, -1.0, 1.0\] for 3 modalities"):
        average(drawn(0), both, weights=torch.tensor([1.0, -1.0, 1.0]))
    with pytest.raises(DataError, match="2 prior probabilities for 3 classes"):
        product(drawn(0), both, prior=torch.tensor([0.5, 0.5]))


@pytest.mark.parametrize("name", ["average", "weighted", "product", "product with prior", "learned", "stacking"])
def test_gradients(name: str) -> None:
    rule = {"learned": WeightedAverage(3), "stacking": Stacking(3, 3).double(), **RULES}[name]
    present = torch.tensor([[True, True, False, False], [True, False, True, False], [True, True, True, False]])
    logits = torch.randn(3, 4, 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: rule(x.log_softmax(-1), present), logits)


def test_a_modality_that_is_missing_costs_little() -> None:
    """Three views of a label: without one, the rules stay far above the best that one view can do."""
    torch.manual_seed(0)
    label = torch.randint(3, (2000,))
    views = {n: nn.functional.one_hot(label, 3) + 0.8 * torch.randn(2000, 3) for n in ("a", "b", "c")}
    inputs = {name: vector(view / 0.64) for name, view in views.items()}  # exact log-likelihoods
    fuse = DecisionFusion({name: Classifier(Pool(), nn.Identity()) for name in views}, 3, rule=product)
    right = lambda given: (fuse(given).values.argmax(-1) == label).float().mean().item()  # noqa: E731
    assert right(inputs) > right(only(inputs, ["a", "b"])) + 0.02 > right(only(inputs, ["a"])) + 0.08


def test_classifiers_of_other_classes_are_named() -> None:
    fuse = DecisionFusion({"a": Classifier(Pool(), nn.Linear(2, 3))}, 4)
    with pytest.raises(DataError, match="classifier of a gives 3 classes, this fusion has 4"):
        fuse({"a": Stream(tokens=torch.rand(1, 1, 2))})


def test_calibration_finds_the_temperature_that_was_hidden() -> None:
    torch.manual_seed(0)
    logits = 2 * torch.randn(10_000, 4)
    labels = torch.distributions.Categorical(logits=logits).sample()
    assert math.isclose(fit_temperature(logits * 3, labels), 3, rel_tol=0.05)  # too sure by 3
    assert fit_temperature(logits * 1e4, labels) == pytest.approx(100, rel=1e-3)  # the bound
    inputs = {"a": vector(logits * 3), "b": vector(logits * 0.5, torch.arange(10_000) % 2 == 0)}
    fuse = DecisionFusion({name: Classifier(Pool(), nn.Identity()) for name in inputs}, 4, rule=product)
    loss = lambda: nn.functional.nll_loss(fuse(only(inputs, ["a"])).values, labels).item()  # noqa: E731
    before = loss()
    with pytest.raises(ConfigError, match="without dropout"):
        fuse.calibrate(inputs, labels)
    fuse.eval()
    found = fuse.calibrate(inputs, labels)
    assert found == {"a": pytest.approx(3, rel=0.05), "b": pytest.approx(0.5, rel=0.05)}
    assert loss() < before - 0.1
    assert fuse.state_dict()["temperatures"].tolist() == pytest.approx([3, 0.5], rel=0.05)
    with pytest.raises(DataError, match="b is present in none of 10000 samples"):
        fuse.calibrate(only(inputs, ["a"]), labels)
