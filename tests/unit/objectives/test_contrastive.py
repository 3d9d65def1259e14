from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from plait.core.tensors import IGNORE, Batch, Patches
from plait.models.dual import Embeddings
from plait.objectives.contrastive import Contrastive, info_nce, same_class, sigmoid_pairs


def unit(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return functional.normalize(
        torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1
    )


@pytest.mark.row("S2-21")
@pytest.mark.row("S3-23")
@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_uniform_similarities_give_log_n(n: int):
    alike = functional.normalize(torch.ones(n, 3, dtype=torch.float64), dim=1)
    loss = info_nce(alike, alike, torch.tensor(17.0, dtype=torch.float64)) / n
    assert loss.item() == pytest.approx(math.log(n), abs=1e-12)


def test_perfect_alignment_goes_to_zero_with_temperature():
    eye = torch.eye(8, dtype=torch.float64)
    losses = [info_nce(eye, eye, torch.tensor(s, dtype=torch.float64)).item() / 8 for s in (1.0, 10.0, 100.0)]
    assert losses == pytest.approx([math.log(1 + 7 * math.exp(-s)) for s in (1.0, 10.0, 100.0)], abs=1e-12)


def test_positives_change_the_floor_to_log_k():
    # Two concepts with three pictures each, perfectly separated: each row shares its mass among three equal logits.
    classes = torch.tensor([0, 0, 0, 1, 1, 1])
    vectors = torch.eye(2, dtype=torch.float64)[classes]
    scale = torch.tensor(100.0, dtype=torch.float64)
    with_positives = info_nce(vectors, vectors, scale, positives=same_class(classes)) / 6
    assert with_positives.item() == pytest.approx(math.log(3), abs=1e-9)


def test_equal_captions_are_pushed_apart_only_without_positives():
    classes = torch.tensor([0, 0, 1])
    text = torch.eye(2, dtype=torch.float64)[classes]
    image = text.clone().requires_grad_()
    scale = torch.tensor(100.0, dtype=torch.float64)
    info_nce(image, text, scale, positives=same_class(classes)).backward()
    assert image.grad is not None
    assert image.grad.abs().max().item() < 1e-12


@given(st.integers(2, 6), st.integers(0, 20))
def test_symmetric_in_sides_and_in_the_order_of_pairs(n: int, seed: int):
    image, text = unit(n, 4, seed), unit(n, 4, seed + 1)
    scale = torch.tensor(5.0, dtype=torch.float64)
    classes = torch.randint(0, 3, (n,), generator=torch.Generator().manual_seed(seed))
    loss = info_nce(image, text, scale, positives=same_class(classes))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    shuffled = info_nce(image[order], text[order], scale, positives=same_class(classes[order]))
    assert info_nce(text, image, scale, positives=same_class(classes)).item() == pytest.approx(loss.item(), abs=1e-10)
    assert shuffled.item() == pytest.approx(loss.item(), abs=1e-10)


def test_distinct_classes_are_the_plain_loss():
    image, text, scale = unit(5, 4), unit(5, 4, 1), torch.tensor(9.0, dtype=torch.float64)
    plain = info_nce(image, text, scale)
    assert info_nce(image, text, scale, positives=same_class(torch.arange(5))).item() == pytest.approx(
        plain.item(), abs=1e-12
    )


@pytest.mark.parametrize("classes", [None, [0, 1, 0, 2]])
def test_gradients_are_the_numerical_ones(classes):
    positives = None if classes is None else same_class(torch.tensor(classes))
    image, text = unit(4, 3).requires_grad_(), unit(4, 3, 1).requires_grad_()
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b, s: info_nce(a, b, s, positives=positives), (image, text, scale))
    assert torch.autograd.gradcheck(
        lambda a, b, s, c: sigmoid_pairs(a, b, s, bias=c, positives=positives), (image, text, scale, bias)
    )


def test_sigmoid_closed_forms():
    zero = torch.tensor(0.0, dtype=torch.float64)
    # No information: every one of n x n decisions costs ln 2.
    assert sigmoid_pairs(unit(4, 3), unit(4, 3, 1), zero, bias=zero).item() == pytest.approx(16 * math.log(2))
    eye = torch.eye(4, dtype=torch.float64)
    sure = sigmoid_pairs(
        eye, eye, torch.tensor(60.0, dtype=torch.float64), bias=torch.tensor(-30.0, dtype=torch.float64)
    )
    assert sure.item() == pytest.approx(16 * math.log1p(math.exp(-30)), rel=1e-9)


def test_same_class_ignores_the_unknown():
    found = same_class(torch.tensor([3, IGNORE, 3, IGNORE]))
    assert found.tolist() == [
        [True, False, True, False],
        [False, True, False, False],
        [True, False, True, False],
        [False, False, False, True],
    ]


class FixedVectors(torch.nn.Module):
    def __init__(self, image: torch.Tensor, text: torch.Tensor) -> None:
        super().__init__()
        self.vectors = Embeddings(image, text, torch.tensor(4.0, dtype=torch.float64))

    def forward(self, batch: Batch) -> Embeddings:
        return self.vectors


def test_objective_reads_classes_from_labels_and_counts_pairs():
    image, text = unit(3, 4), unit(3, 4, 1)
    classes = torch.tensor([7, 7, IGNORE])
    batch = Batch(
        token_ids=torch.zeros(3, 1, dtype=torch.long),
        labels=classes[:, None],
        segment_ids=torch.ones(3, 1, dtype=torch.long),
        media={},
        item_row={},
        sample_ids=("a", "b", "c"),
    )
    objective = Contrastive()
    assert objective.needs_global_batch
    assert {k: int(v) for k, v in objective.count(batch).items()} == {"contrastive": 3}
    expected = info_nce(image, text, torch.tensor(4.0, dtype=torch.float64), positives=same_class(classes))
    assert objective(FixedVectors(image, text), batch)["contrastive"].item() == expected.item()


@pytest.mark.row("S3-11")
def test_sounds_are_told_apart_by_their_pictures_and_their_texts():
    image, text, audio = unit(4, 5), unit(4, 5, 1), unit(3, 5, 2)
    scale, classes, pair_of = (
        torch.tensor(4.0, dtype=torch.float64),
        torch.tensor([7, 1, 7, 2]),
        torch.tensor([0, 2, 3]),
    )

    class Hearing(torch.nn.Module):
        def forward(self, batch: Batch) -> Embeddings:
            return Embeddings(image, text, scale, audio, pair_of)

    batch = Batch(
        token_ids=torch.zeros(4, 1, dtype=torch.long),
        labels=classes[:, None],
        segment_ids=torch.ones(4, 1, dtype=torch.long),
        media={"audio": Patches(values=audio, grid=torch.ones(3, 3, dtype=torch.long))},
        item_row={"audio": pair_of},
        sample_ids=("a", "b", "c", "d"),
    )
    counts = {name: int(count) for name, count in Contrastive().count(batch).items()}
    assert counts == {"contrastive": 4, "contrastive-image-audio": 3, "contrastive-text-audio": 3}
    terms = Contrastive()(Hearing(), batch)
    same = same_class(torch.tensor([7, 7, 2]))  # the two sounds of class 7 are positives of both its pictures
    assert terms["contrastive"].item() == info_nce(image, text, scale, positives=same_class(classes)).item()
    for side, vectors in (("image", image), ("text", text)):
        expected = info_nce(vectors[pair_of], audio, scale, positives=same)
        assert terms[f"contrastive-{side}-audio"].item() == expected.item()
