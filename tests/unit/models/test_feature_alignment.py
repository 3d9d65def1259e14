"""The layer that maps features of one domain onto those of another: closed forms."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.core.errors import DataError
from plait.core.protocols import Encoder
from plait.core.tensors import Patches
from plait.models.connectors.domain import FeatureAlignment
from plait.objectives.domain import coral


def features(rows: int, d: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(d, d, dtype=torch.float64, generator=generator)
    shift = torch.randn(d, dtype=torch.float64, generator=generator)
    return torch.randn(rows, d, dtype=torch.float64, generator=generator) @ spread + 3 * shift


def through(layer: FeatureAlignment, values: torch.Tensor) -> torch.Tensor:
    grid = torch.ones(len(values), 3, dtype=torch.long)
    media = layer(Patches(values=values, grid=grid))
    assert torch.equal(media.grid, layer.grid_out(grid))
    return media.values


@pytest.mark.row("S0-53")
def test_a_new_layer_changes_nothing_and_learns() -> None:
    layer, values = FeatureAlignment(4), features(5, 4, 0).float()
    assert isinstance(layer, Encoder)
    assert torch.equal(through(layer, values), values)
    through(layer, values).sum().backward()
    assert all(weight.grad is not None for weight in layer.parameters())


@pytest.mark.row("S0-53")
@settings(deadline=None, max_examples=30)
@given(st.integers(1, 6), st.integers(0, 999))
def test_features_get_the_mean_and_covariance_that_are_wanted(d: int, seed: int) -> None:
    given_, wanted = features(40, d, seed), features(30, d, seed + 1000)
    layer = FeatureAlignment(d).double()
    layer.fit(given=given_, wanted=wanted, ridge=0.0)
    with torch.no_grad():
        mapped = through(layer, given_)
    torch.testing.assert_close(mapped.mean(0), wanted.mean(0), rtol=1e-6, atol=1e-6)
    scale = float(wanted.var(0).sum())
    torch.testing.assert_close(torch.cov(mapped.T) / scale, torch.cov(wanted.T) / scale, rtol=1e-6, atol=1e-6)
    assert coral(mapped / scale**0.5, wanted / scale**0.5).item() == pytest.approx(0, abs=1e-10)


@pytest.mark.row("S0-53")
def test_with_a_ridge_it_is_algorithm_1_in_scipys_words() -> None:
    given_, wanted = features(40, 5, 1), features(30, 5, 2)
    layer = FeatureAlignment(5).double()
    layer.fit(given=given_, wanted=wanted, ridge=0.3)
    one, other = (np.cov(x.numpy().T) for x in (given_, wanted))
    one, other = (c + 0.3 * np.trace(c) / 5 * np.eye(5) for c in (one, other))
    expected = np.linalg.inv(scipy.linalg.sqrtm(one)) @ scipy.linalg.sqrtm(other)
    np.testing.assert_allclose(layer.linear.weight.detach().numpy().T, expected, rtol=1e-8, atol=1e-10)
    same = FeatureAlignment(5).double()
    same.fit(given=1000 * given_, wanted=1000 * wanted, ridge=0.3)
    torch.testing.assert_close(same.linear.weight, layer.linear.weight)


def test_what_cannot_be_whitened() -> None:
    flat = torch.zeros(9, 3)
    flat[:, 0] = torch.arange(9.0)
    layer = FeatureAlignment(3)
    with pytest.raises(DataError, match="no variance"):
        layer.fit(given=flat, wanted=torch.randn(9, 3), ridge=0.0)
    layer.fit(given=flat, wanted=torch.randn(9, 3), ridge=0.1)
    assert bool(layer.linear.weight.isfinite().all())
    with pytest.raises(DataError, match="1 rows") as caught:
        layer.fit(given=flat, wanted=flat[:1])
    assert caught.value.place == "wanted"
    with pytest.raises(DataError, match="not finite"):
        layer.fit(given=flat * torch.nan, wanted=flat)
