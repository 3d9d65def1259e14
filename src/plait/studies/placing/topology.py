"""How much of a grid's topology the vectors of its cells keep, without training."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from plait.evaluation.statistics import spearman
from plait.studies.placing.codes import coordinates


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """What a table of vectors says about the grid.

    Attributes:
        spearman: Rank correlation of distances in the grid and of vectors, over all pairs of cells.
        row: R² of a linear probe for the row, on cells it did not learn from.
        column: The same for the column.
        direction: Share of pairs of such cells whose order in rows and in columns the probe tells, where it differs.
    """

    spearman: float
    row: float
    column: float
    direction: float


def topology(table: Float[Tensor, "n d"], *, rows: int, columns: int, penalty: float = 1e-2) -> Topology:
    """Measure a table of cells in raster order.

    The probe is ridge regression on the cells where row + column is even; it is asked about the others.

    Args:
        table: A vector for each cell.
        rows: Of the grid.
        columns: Likewise.
        penalty: Of the ridge, on vectors of length 1 on average.
    """
    at = coordinates((rows, columns)).double()
    table = table.detach().double()
    table = table / table.norm(dim=1).mean()
    above = torch.triu_indices(len(at), len(at), offset=1)
    # Rounded, so that distances which are equal but for their last digits share a rank.
    apart = [torch.cdist(x, x)[above[0], above[1]].round(decimals=6).numpy() for x in (at, table)]
    learn = at.sum(1) % 2 == 0
    read = _probe(table[learn], at[learn], table[~learn], penalty=penalty)
    true = at[~learn]
    left = (true - read).square().sum(0) / (true - true.mean(0)).square().sum(0)
    order = (true[:, None] - true[None]).sign()
    told = ((read[:, None] - read[None]).sign() == order)[order != 0]
    row, column = (1 - left).tolist()
    return Topology(spearman=spearman(*apart), row=row, column=column, direction=float(told.double().mean()))


def _probe(x: Tensor, y: Tensor, ask: Tensor, *, penalty: float) -> Tensor:
    center, mean = x.mean(0), y.mean(0)
    x = x - center
    weight = torch.linalg.solve(x.T @ x + penalty * torch.eye(x.shape[1], dtype=x.dtype), x.T @ (y - mean))
    return (ask - center) @ weight + mean
