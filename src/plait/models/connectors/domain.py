"""A layer that maps features of one domain onto those of another."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from plait.core.errors import DataError
from plait.core.tensors import Patches


class FeatureAlignment(nn.Module):
    """``x W + b``, the identity at the start: between a pretrained tower and what reads its features.

    It learns like any layer, or is set in one stroke from features alone, without labels (:meth:`fit`): so that
    features of a new domain have the mean and covariance that its reader knows.

    Args:
        d: Width.

    Example:
        >>> layer = FeatureAlignment(2)
        >>> layer.fit(given=torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0]]), wanted=torch.randn(9, 2), ridge=0.0)
    """

    def __init__(self, d: int) -> None:
        super().__init__()
        self.d_in = self.d_out = d
        self.linear = nn.Linear(d, d)
        nn.init.eye_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def grid_out(self, grid: Int[Tensor, "item 3"]) -> Int[Tensor, "item 3"]:
        """Unchanged: one token a cell."""
        return grid

    def forward(self, media: Patches) -> Patches:
        """Map every cell."""
        return Patches(values=self.linear(media.values), grid=media.grid)

    @torch.no_grad()
    def fit(self, *, given: Float[Tensor, "n d"], wanted: Float[Tensor, "m d"], ridge: float = 0.01) -> None:
        """Whiten features, and color them as others are: ``W = C_given^(-1/2) C_wanted^(1/2)``, and means meet.

        CORAL without training: Sun, Feng and Saenko 2016, https://arxiv.org/abs/1511.05547, algorithm 1, which adds 1
        to every variance; here it is a share of the mean variance, so that the scale of features changes nothing.
        Computed in float64.

        Args:
            given: What comes in.
            wanted: What it shall look like.
            ridge: Added to every variance of each, as a share of their mean. With 0 covariances become equal, if the
                given one is of full rank.

        Raises:
            DataError: One has fewer than 2 rows, or numbers that are not finite; or some direction has no variance,
                and ``ridge`` is 0.
        """
        for name, rows in (("given", given), ("wanted", wanted)):
            if len(rows) < 2 or not bool(rows.isfinite().all()):
                raise DataError(
                    f"{len(rows)} rows" if len(rows) < 2 else "features are not finite",
                    place=name,
                    remedy="give 2 rows or more of finite features of each domain",
                )
        (one, of_given), (other, of_wanted) = (_spread(x.double(), ridge) for x in (given, wanted))
        least, most = of_given[0].min(), of_given[0].max()
        if not bool(least > most * len(of_given[0]) * torch.finfo(torch.float64).eps):
            raise DataError(
                "some direction of the features has no variance, so they cannot be whitened",
                place="given",
                remedy="give more rows, or set ridge above 0",
            )
        weight = _power(of_given, -0.5) @ _power(of_wanted, 0.5)
        self.linear.weight.copy_(weight.T)
        self.linear.bias.copy_(other - one @ weight)


def _spread(rows: Tensor, ridge: float) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Mean, and the covariance with its ridge as eigenvalues and eigenvectors."""
    covariance = torch.cov(rows.T).reshape(rows.shape[1], rows.shape[1])
    values, vectors = torch.linalg.eigh(covariance)
    values = values.clamp(min=0)
    return rows.mean(0), (values + ridge * values.mean(), vectors)


def _power(spread: tuple[Tensor, Tensor], exponent: float) -> Tensor:
    values, vectors = spread
    return vectors * values**exponent @ vectors.T
