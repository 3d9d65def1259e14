"""Feature dropout: its rise, its shares, what stays the same."""

from __future__ import annotations

import pytest
import torch

from plait.core.tensors import Patches
from plait.data.augment.feature_dropout import FeatureDropout

pytestmark = pytest.mark.light

GRID = torch.tensor([[1, 2, 2]])


def ones(pictures: int, width: int = 5000) -> dict[str, Patches]:
    return {f"{n:064}": Patches(values=torch.ones(4, width), grid=GRID) for n in range(pictures)}


@pytest.mark.parametrize(("step", "expected"), [(0, 0.0), (10, 0.0), (12, 0.2), (20, 1.0), (99, 1.0)])
def test_it_rises_in_a_straight_line(step: int, expected: float) -> None:
    drop = FeatureDropout(least=0.1, most=0.5, first=10, full=20, seed=0)
    assert drop.strength(step) == pytest.approx(expected)


def test_a_rise_of_no_steps_is_a_jump() -> None:
    drop = FeatureDropout(least=0.1, most=0.5, first=7, full=7, seed=0)
    assert [drop.strength(step) for step in (6, 7)] == [0.0, 1.0]


def test_shares_lie_between_least_and_most_and_the_mean_is_kept() -> None:
    drop = FeatureDropout(least=0.2, most=0.8, first=0, full=4, seed=3)
    for step, strength in ((2, 0.5), (9, 1.0)):
        found = drop(ones(60), step)
        shares = torch.tensor([float((media.values == 0).float().mean()) for media in found.values()])
        # 20,000 values: 5 standard errors of a share are below 0.02.
        assert shares.min() > 0.2 * strength - 0.02
        assert shares.max() < 0.8 * strength + 0.02
        assert shares.std() > 0.1 * strength, "pictures differ"
        means = torch.tensor([float(media.values.mean()) for media in found.values()])
        assert torch.allclose(means, torch.ones(60), atol=0.06)
        assert all(torch.equal(media.grid, GRID) for media in found.values())


def test_what_is_dropped_depends_on_seed_step_and_picture_alone() -> None:
    drop = FeatureDropout(least=0.3, most=0.6, first=0, full=1, seed=0)
    all_three, last = drop(ones(3), 5), drop({f"{2:064}": ones(3)[f"{2:064}"]}, 5)
    assert torch.equal(all_three[f"{2:064}"].values, last[f"{2:064}"].values)
    assert not torch.equal(all_three[f"{1:064}"].values, all_three[f"{2:064}"].values)
    for other in (drop(ones(3), 6), FeatureDropout(least=0.3, most=0.6, first=0, full=1, seed=1)(ones(3), 5)):
        assert not torch.equal(all_three[f"{2:064}"].values, other[f"{2:064}"].values)


def test_features_of_16_bits_stay_that() -> None:
    drop = FeatureDropout(least=0.3, most=0.6, first=0, full=1, seed=0)
    (found,) = drop({"a": Patches(values=torch.ones(4, 8, dtype=torch.bfloat16), grid=GRID)}, 3).values()
    assert found.values.dtype == torch.bfloat16
