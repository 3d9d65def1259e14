"""The shape of a shared space: closed forms, an independent reckoning, and what leaves it alone."""

import numpy as np
import pytest
import torch

from plait.core.errors import DataError
from plait.evaluation.space import alignment, linear_cka, modality_gap, space_scores, uniformity
from plait.evaluation.statistics import block_jackknife


def unit(rng: np.random.Generator, n: int, d: int) -> np.ndarray:
    drawn = rng.normal(size=(n, d))
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


@pytest.mark.row("S3-11")
@pytest.mark.row("S4-47")
def test_against_an_independent_reckoning() -> None:
    rng = np.random.default_rng(0)
    x, y = unit(rng, 30, 8), unit(rng, 30, 8)
    tx, ty = torch.from_numpy(x), torch.from_numpy(y)
    assert alignment(x, y) == pytest.approx(float(2 - 2 * (tx * ty).sum(1).mean()))
    assert uniformity(x) == pytest.approx(float(torch.pdist(tx).square().mul(-2).exp().mean().log()))
    assert modality_gap(x, y) == pytest.approx(float((tx.mean(0) - ty.mean(0)).norm()))
    # CKA as HSIC of centered Gram matrices: equation 3 of Kornblith et al.
    center = np.eye(30) - 1 / 30
    first, second = center @ (x @ x.T) @ center, center @ (y @ y.T) @ center
    assert linear_cka(x, y) == pytest.approx((first * second).sum() / np.sqrt((first**2).sum() * (second**2).sum()))


def test_likeness_ignores_rotation_and_scale_and_sees_through_widths() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(200, 6))
    turn, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    assert linear_cka(x, 3 * x @ turn + 5) == pytest.approx(1)
    assert linear_cka(x, np.concatenate([x, x], axis=1)) == pytest.approx(1)
    assert linear_cka(x, rng.normal(size=(200, 6))) < 0.1


def test_a_gap_is_the_distance_of_cones_and_one_point_is_not_even() -> None:
    rng = np.random.default_rng(2)
    x = unit(rng, 500, 64)
    assert modality_gap(x, x) == 0
    assert uniformity(np.ones((4, 3))) == 0
    # Evenly on a sphere, x . y is about normal with a variance of 1 / d, so the mean of exp(4 x . y) is exp(8 / d).
    assert uniformity(x) == pytest.approx(-4 + 8 / 64, abs=0.01)
    with pytest.raises(DataError, match="came 1"):
        uniformity(x[:1])
    for equal in (np.ones((4, 3)), np.full((4, 3), 0.1)):  # of which the second does not center to 0 exactly
        with pytest.raises(DataError, match="are equal"):
            linear_cka(equal, x[:4])
    with pytest.raises(DataError, match="came 4 and 3"):
        linear_cka(x[:4], x[:3])


def test_the_jackknife_of_a_mean_is_students_interval() -> None:
    values = np.random.default_rng(3).normal(size=11)
    found = block_jackknife(lambda kept: float(values[kept].mean()), groups=[str(i) for i in range(11)], blocks=11)
    half = 2.228 * values.std(ddof=1) / np.sqrt(11)
    assert (found.value, found.low, found.high) == pytest.approx(
        (values.mean(), values.mean() - half, values.mean() + half)
    )
    with pytest.raises(DataError, match="2 groups"):
        block_jackknife(lambda _: 0.0, groups=["a", "b", "b"])


def test_the_jackknife_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(4)
    covered = 0
    for _ in range(400):
        values = rng.exponential(size=60)
        found = block_jackknife(
            lambda kept, v=values: float(np.log(v[kept].mean())), groups=[str(i) for i in range(60)]
        )
        covered += found.low <= 0 <= found.high
    assert 0.91 <= covered / 400 <= 0.99  # seeded; 95 % is said


def test_a_name_that_many_pictures_share_is_no_crowding() -> None:
    rng = np.random.default_rng(6)
    texts, pictures = unit(rng, 50, 64), unit(rng, 400, 64)
    groups = [str(i // 8) for i in range(400)]
    scores = {s.name: s for s in space_scores(pictures, texts.repeat(8, axis=0), name="space/test", groups=groups)}
    assert scores["space/test/uniformity-text"].value == pytest.approx(uniformity(texts))


def test_scores_have_intervals_and_few_groups_are_refused() -> None:
    rng = np.random.default_rng(5)
    x, y = unit(rng, 12, 4), unit(rng, 12, 4)
    scores = space_scores(x, y, name="space/test", groups=[str(i // 2) for i in range(12)])
    assert [score.name.rpartition("/")[2] for score in scores] == [
        "alignment",
        "uniformity-image",
        "uniformity-text",
        "modality-gap",
        "cka",
    ]
    assert all(score.low < score.value < score.high and "jackknife-6" in score.rule for score in scores)
    with pytest.raises(DataError, match="2 groups, the shape of a space needs 4"):
        space_scores(x, y, name="space/test", groups=["a", "b"] * 6)
