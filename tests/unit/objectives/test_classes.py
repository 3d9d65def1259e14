"""Classes to be told: closed forms, sample by sample, gradients; additive over any division."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from plait.core.errors import ConfigError, DataError
from plait.core.tensors import IGNORE, Batch, Patches
from plait.objectives.classes import Answered, Classified, PseudoLabelled, generalized_nce
from plait.training.gradient import accumulate

CLASSES, WIDTH = 4, 3


class Scores(nn.Module):
    """A linear layer over pictures of one number row each."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, CLASSES).double()

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        return self.layer(batch.media["image"].values), batch.item_row["image"]


def batch(labels: list[list[int]], *, views: int = 1, seed: int = 0, large: float = 1.0) -> Batch:
    number = len(labels)
    draw = torch.Generator().manual_seed(seed)
    values = large * torch.randn(number * views, WIDTH, generator=draw, dtype=torch.float64)
    rows = torch.arange(number).repeat(views)  # first views, then second ones
    return Batch(
        token_ids=torch.zeros(number, len(labels[0]), dtype=torch.long),
        labels=torch.tensor(labels),
        segment_ids=torch.ones(number, len(labels[0]), dtype=torch.long),
        media={"image": Patches(values=values, grid=torch.ones(len(rows), 3, dtype=torch.long))},
        item_row={"image": rows},
        sample_ids=tuple(f"s{at}" for at in range(number)),
    )


def cut(whole: Batch, sizes: list[int]) -> list[Batch]:
    """Rows in order, with all views of theirs."""
    found, start = [], 0
    for size in sizes:
        mine = (whole.item_row["image"] >= start) & (whole.item_row["image"] < start + size)
        media = whole.media["image"]
        found.append(
            Batch(
                token_ids=whole.token_ids[start : start + size],
                labels=whole.labels[start : start + size],
                segment_ids=whole.segment_ids[start : start + size],
                media={"image": Patches(values=media.values[mine], grid=media.grid[mine])},
                item_row={"image": whole.item_row["image"][mine] - start},
                sample_ids=whole.sample_ids[start : start + size],
            )
        )
        start += size
    return found


def model() -> Scores:
    torch.manual_seed(0)
    return Scores()


def one_by_one(whole: Batch, of: Callable[[torch.Tensor, int], torch.Tensor | None]) -> torch.Tensor:
    """Sum of a function of an item's scores and its row, item by item."""
    scores, rows = model()(whole)
    each = [of(score, int(row)) for score, row in zip(scores, rows, strict=True)]
    return torch.stack([one for one in each if one is not None]).sum()


@pytest.mark.row("S0-22")
@pytest.mark.parametrize(("smoothing", "robust"), [(0.0, 0.0), (0.2, 0.0), (0.0, 0.7)])
@pytest.mark.parametrize("views", [1, 2])
def test_classes_item_by_item(smoothing: float, robust: float, views: int) -> None:
    whole = batch([[0], [3], [IGNORE], [2]], views=views)

    def of(score: torch.Tensor, row: int) -> torch.Tensor | None:
        label = int(whole.labels[row, 0])
        if label == IGNORE:
            return None
        if robust:
            return (1 - score.softmax(0)[label] ** robust) / robust
        target = torch.full((CLASSES,), smoothing / CLASSES, dtype=torch.float64)
        target[label] += 1 - smoothing
        return -(target * score.log_softmax(0)).sum()

    objective = Classified(smoothing=smoothing, robust=robust)
    torch.testing.assert_close(objective(model(), whole)["class"], one_by_one(whole, of) / views)
    assert int(objective.count(whole)["class"]) == 3


@pytest.mark.row("S0-24")
def test_robust_loss_goes_from_cross_entropy_to_one_minus_p() -> None:
    scores = torch.randn(6, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    classes = torch.arange(6) % CLASSES
    right = scores.softmax(1).gather(1, classes[:, None])
    torch.testing.assert_close(generalized_nce(scores, classes, q=1.0), (1 - right)[:, 0])
    wanted = functional.cross_entropy(scores, classes, reduction="sum")
    assert float(generalized_nce(scores, classes, q=1e-7).sum()) == pytest.approx(float(wanted), rel=1e-5)
    scores.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda values: generalized_nce(values, classes, q=0.7), (scores,))
    # The gradient of a label weighs p^q times that of cross-entropy: what is thought wrong pulls less.
    (mine,) = torch.autograd.grad(generalized_nce(scores, classes, q=0.7).sum(), scores)
    (theirs,) = torch.autograd.grad(functional.cross_entropy(scores, classes, reduction="sum"), scores)
    torch.testing.assert_close(mine, theirs * right.detach() ** 0.7)


@pytest.mark.row("S3-24")
def test_answers_are_judged_by_how_many_gave_them() -> None:
    people = [[1, 1, 1, 1, 0], [2, 0, IGNORE, IGNORE, IGNORE], [IGNORE] * 5, [3, 3, 0, 0, IGNORE]]
    whole = batch(people)
    soft = [{1: 1.0, 0: 1 / 3}, {2: 1 / 3, 0: 1 / 3}, None, {3: 2 / 3, 0: 2 / 3}]

    def of(score: torch.Tensor, row: int) -> torch.Tensor | None:
        targets = soft[row]
        if targets is None:
            return None
        return sum(
            (
                -targets.get(at, 0.0) * functional.logsigmoid(score[at])
                - (1 - targets.get(at, 0.0)) * functional.logsigmoid(-score[at])
                for at in range(CLASSES)
            ),
            start=torch.zeros((), dtype=torch.float64),
        )

    torch.testing.assert_close(Answered()(model(), whole)["answer"], one_by_one(whole, of))
    assert int(Answered().count(whole)["answer"]) == 3


@pytest.mark.row("S0-23")
@pytest.mark.parametrize("views", [1, 2])
def test_the_first_view_labels_the_last_one_where_it_is_sure(views: int) -> None:
    whole = batch([[0], [IGNORE], [IGNORE], [2], [IGNORE], [IGNORE]], views=views, large=4.0)
    learner = model()
    with torch.no_grad():
        scores = learner(whole)[0].view(views, 6, CLASSES)
    sure, label = scores[0].softmax(1).max(1)
    unlabelled = whole.labels[:, 0] == IGNORE
    objective = PseudoLabelled(threshold=float(sure[unlabelled].median()))
    taken = unlabelled & (sure >= objective.threshold)
    assert 0 < int(taken.sum()) < int(unlabelled.sum())
    found = objective(learner, whole)
    wanted = functional.cross_entropy(scores[-1][taken], label[taken], reduction="sum")
    torch.testing.assert_close(found["pseudo"].detach(), wanted)
    known = functional.cross_entropy(scores[0][~unlabelled], torch.tensor([0, 2]), reduction="sum")
    torch.testing.assert_close(found["class"].detach(), known)
    assert {name: int(count) for name, count in objective.count(whole).items()} == {"class": 2, "pseudo": 4}


@pytest.mark.row("S0-23")
def test_no_gradient_goes_through_the_label() -> None:
    """The gradient of the pseudo term is that of cross-entropy with the label written down beforehand."""
    whole = batch([[IGNORE]] * 4, views=2, large=3.0)
    learner = model()
    scores, _ = learner(whole)
    sure, label = scores[:4].softmax(1).max(1)
    taken = sure >= 0.5
    wanted = torch.autograd.grad(
        functional.cross_entropy(scores[4:][taken], label[taken], reduction="sum"), [*learner.parameters()]
    )
    found = torch.autograd.grad(PseudoLabelled(threshold=0.5)(learner, whole)["pseudo"], [*learner.parameters()])
    for one, two in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, two)


@given(
    sizes=st.sampled_from([[6], [3, 3], [1, 5], [2, 1, 3], [1] * 6]),
    which=st.sampled_from(["class", "robust", "pseudo", "answer"]),
)
def test_any_division_gives_the_gradient_of_the_whole(sizes: list[int], which: str) -> None:
    objective: Any = {
        "class": Classified(smoothing=0.1),
        "robust": Classified(robust=0.7),
        "pseudo": PseudoLabelled(threshold=0.5),
        "answer": Answered(),
    }[which]
    labels = [[0, 1], [IGNORE, 2], [3, 3], [IGNORE, IGNORE], [1, IGNORE], [IGNORE, 0]]
    whole = batch(labels, views=1 if which == "answer" else 2, large=2.0)

    def gradient(micro: list[Batch]) -> list[torch.Tensor]:
        learner = model()
        accumulate(learner, objective, micro, weights={})
        return [weight.grad for weight in learner.parameters() if weight.grad is not None]

    for one, two in zip(gradient(cut(whole, sizes)), gradient([whole]), strict=True):
        assert float((one - two).abs().max()) <= 1e-12 * max(1.0, float(two.abs().max()))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Classified(smoothing=1.0), "smoothing is 1"),
        (lambda: Classified(robust=1.5), r"robust is 1\.5"),
        (lambda: Classified(smoothing=0.1, robust=0.5), "both set"),
        (lambda: Answered(enough=0), "enough is 0"),
        (lambda: PseudoLabelled(threshold=1.2), r"threshold is 1\.2"),
    ],
)
def test_settings_that_cannot_be_are_refused(make: Callable[[], object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make()


def test_data_that_cannot_be_names_its_sample() -> None:
    with pytest.raises(DataError, match="class 4 of a model with 4, 0 to 3") as error:
        Classified()(model(), batch([[0], [4]]))
    assert error.value.place == "sample s1"
    with pytest.raises(DataError, match="2 views where 1 must be"):
        Answered()(model(), batch([[0]], views=2))
    with pytest.raises(DataError, match="3 views where 1 must be"):
        PseudoLabelled()(model(), batch([[0]], views=3))


def test_a_sure_model_without_labels_is_a_loss_of_log_classes_at_most() -> None:
    """Nothing known: every class is as likely, no row is sure, and the pseudo term is 0."""
    learner = model()
    with torch.no_grad():
        for weight in learner.parameters():
            weight.zero_()
    found = PseudoLabelled(threshold=0.5)(learner, batch([[0], [IGNORE]], views=2))
    assert float(found["pseudo"].detach()) == 0
    assert float(found["class"].detach()) == pytest.approx(math.log(CLASSES))
