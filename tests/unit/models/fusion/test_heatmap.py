"""Heat maps: the darkest cell is the largest weight, at its place; what is no weight is refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from plait.core.errors import DataError
from plait.models.fusion.heatmap import heat_map, over_picture

pytestmark = pytest.mark.row("S3-19", "S0-15")


def test_cells_are_where_and_as_dark_as_the_weights_say() -> None:
    weights = torch.tensor([[0.0, 0.1, 0.2], [0.3, 0.4, 0.5]])
    cells = np.asarray(heat_map(weights, cell=10).convert("L")).astype(int)
    centers = cells[4 + 5 : 4 + 20 : 10, 4 + 5 : 4 + 30 : 10]
    assert centers.shape == (2, 3)
    assert (np.diff(centers.flatten()) < 0).all()  # the larger the darker
    assert centers[0, 0] > 240
    assert centers[1, 2] < 60
    assert np.array_equal(heat_map(torch.zeros(1, 1), cell=3), heat_map(torch.zeros(1, 1), cell=3))


def test_names_stand_at_the_side_and_make_room() -> None:
    weights = torch.rand(2, 3)
    plain = heat_map(weights)
    named = heat_map(weights, rows=["dog", "狗"], columns=["a", "bb", "region 3"])
    assert named.width > plain.width + 15
    assert named.height > plain.height + 30
    corner = np.asarray(named)[:20, :20]
    assert (corner == 255).all()  # nothing where neither has anything to say
    side = np.asarray(named.convert("L"))[:, : named.width - plain.width]
    assert (side < 100).any()


def test_a_picture_is_shaded_where_it_was_looked_at() -> None:
    picture = Image.new("RGB", (20, 10), (10, 200, 30))
    shaded = np.asarray(over_picture(picture, torch.tensor([[0.0, 1.0]]), strength=1.0))
    assert shaded.shape == (10, 20, 3)
    assert (shaded[:, :10] == (10, 200, 30)).all()
    assert (shaded[:, 10:] == (214, 39, 40)).all()


@pytest.mark.parametrize(
    ("weights", "said"),
    [(torch.tensor([[-1.0]]), "from -1 to -1"), (torch.tensor([[torch.nan]]), "nan"), (torch.zeros(0, 3), "none")],
)
def test_what_is_no_weight_is_refused(weights: torch.Tensor, said: str) -> None:
    with pytest.raises(DataError, match=said):
        heat_map(weights)


def test_names_must_fit() -> None:
    with pytest.raises(DataError, match="1 names for 2 rows"):
        heat_map(torch.ones(2, 1), rows=["a"])
