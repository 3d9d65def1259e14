"""An encoder with what reads it: one neck, one reader of questions, and linear layers for the whole and for details."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from plait.models.attention import ANYWHERE
from plait.models.position.absolute import SinCosGrid
from plait.models.transformer import Transformer, TransformerSizes
from plait.studies.encoders import EncoderName
from plait.studies.seeing.scenes import ANSWERS, COLORS, SIDE
from plait.studies.seeing.towers import GRID, maps, tower


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """Scores.

    Attributes:
        answers: Of each question, for a picture, a color or a pair of colors.
        marks: Of each cell of 4 pixels: is there a mark to be found?
    """

    answers: dict[str, Float[Tensor, "b *of a"]]
    marks: Float[Tensor, "b fine"]


class Student(nn.Module):
    """A tower, and readers that are the same for every tower.

    The neck brings each map of the tower to one width and 8 x 8 cells and adds them up. Questions about named colors
    are a token a color in a Transformer of two blocks that see each other and all cells; one linear layer tells the
    shape of each, and a small network the relation of each pair. ``count`` is a linear layer on the mean of the cells,
    ``far`` one on the cells of the lower right corner, and marks one on every cell.

    Args:
        name: Of the tower.
        places: Whether sines and cosines tell the reader where cells are.
        d: Width of neck and reader.
    """

    def __init__(self, name: EncoderName, *, places: bool = True, d: int = 32) -> None:
        super().__init__()
        self.name: EncoderName = name
        self.tower = tower(name)
        with torch.device("meta"):
            widths = [found.shape[1] for found in maps(tower(name), torch.zeros(2, 3, SIDE, SIDE))]
        self.neck = nn.ModuleList(nn.Linear(width, d) for width in widths)
        self.norm = nn.LayerNorm(d)
        self.places = SinCosGrid(d) if places else None
        self.colors = nn.Parameter(torch.randn(COLORS, d))
        self.reader = Transformer(TransformerSizes(d=d, depth=2, heads=4, d_ff=2 * d, d_source=d))
        self.shape = nn.Linear(d, ANSWERS["shape"])
        self.pair = nn.Sequential(nn.Linear(2 * d, 2 * d), nn.GELU(), nn.Linear(2 * d, 4))
        self.count, self.far = nn.Linear(d, ANSWERS["count"]), nn.Linear(d, ANSWERS["far"])
        self.marks = nn.Linear(d, 1)

    def cells(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b fine d"]:
        """What the readers see of a picture."""
        found = torch.zeros(())
        for layer, grid in zip(self.neck, maps(self.tower, pixels), strict=True):
            part = layer(grid.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            found = found + functional.interpolate(part, size=(GRID, GRID))
        return self.norm(found.flatten(2).mT)

    def forward(self, pixels: Float[Tensor, "b 3 h w"]) -> Said:
        """Answers to all questions."""
        cells = self.cells(pixels)
        grid = cells.unflatten(1, (GRID, GRID))
        source = functional.avg_pool2d(grid.permute(0, 3, 1, 2), 2).flatten(2).mT
        corner = source[:, -1]
        if self.places is not None:
            source = source + self.places(GRID // 2, GRID // 2).to(cells)
        read = self.reader(self.colors.expand(len(cells), -1, -1), ANYWHERE, source=source)
        first, second = (read.unsqueeze(at).expand(-1, COLORS, COLORS, -1) for at in (2, 1))
        pairs = self.pair(torch.cat([first, second], dim=-1))
        answers = {
            "shape": self.shape(read),
            "left": pairs[..., :2],
            "same": pairs[..., 2:],
            "count": self.count(cells.mean(1)),
            "far": self.far(corner),
        }
        return Said(answers=answers, marks=self.marks(cells)[..., 0])
