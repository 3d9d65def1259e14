"""Scenes of regions on a grid, questions of three words, and which regions the answer is in."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from plait.models.fusion.streams import Stream
from plait.studies.attention import Scenes

Kind = Literal["attribute", "relation", "detail", "chain"]
KINDS: tuple[Kind, ...] = get_args(Kind)

WORDS, REGIONS = "words", "regions"
_COLOUR, _MARK, _OF, _SCENE, _LEFT, _FIRST_SHAPE = range(6)
"""Numbers of words; the shapes follow each other."""

LENGTH = 3
"""Words of a question."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Samples.

    Attributes:
        inputs: Words and regions; regions stand in the order of cells, which no arm sees.
        labels: A colour, or the number of colours plus a mark, or after all marks no and yes.
        asked: Cells that tell the answer: of the thing, of both things, of the mark, of what is beside the thing.
    """

    inputs: dict[str, Stream]
    labels: Int[Tensor, " b"]
    asked: Bool[Tensor, "b n"]


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Codes of everything that can be seen or said, each of length 1 and at right angles to the others.

    - ``attribute``: "colour of SHAPE": every shape is there once.
    - ``relation``: "SHAPE left SHAPE": no or yes, as often; both are never in one column.
    - ``detail``: "mark of scene": one region has a small mark.
    - ``chain``: "colour left SHAPE": the colour of what is left of it, where something is.

    Attributes:
        scenes: Settings.
        shape: Codes of shapes.
        colour: Of colours.
        size: Of sizes, which nobody asks for.
        row: Of rows.
        column: Of columns.
        mark: Of marks.
        word: Of words.
        spot: Of the places of words in a question.
    """

    scenes: Scenes
    shape: Float[Tensor, "n d"]
    colour: Float[Tensor, "c d"]
    size: Float[Tensor, "2 d"]
    row: Float[Tensor, "r d"]
    column: Float[Tensor, "k d"]
    mark: Float[Tensor, "m d"]
    word: Float[Tensor, "w e"]
    spot: Float[Tensor, "3 e"]

    def draw(self, rows: int, generator: torch.Generator, *, kinds: Sequence[Kind]) -> Batch:
        """New samples.

        Args:
            rows: How many.
            generator: Of everything.
            kinds: Of questions, as often each.
        """
        scenes, sample = self.scenes, torch.arange(rows)
        cells = scenes.rows * scenes.columns
        at = torch.arange(cells)
        row, column = at // scenes.columns, at % scenes.columns
        shape = torch.rand(rows, cells, generator=generator).argsort(1)
        colour = torch.randint(scenes.colours, (rows, cells), generator=generator)
        size = torch.randint(2, (rows, cells), generator=generator)
        marked = torch.randint(cells, (rows,), generator=generator)
        mark = torch.randint(scenes.marks, (rows,), generator=generator)
        regions = self.shape[shape] + self.colour[colour] + self.size[size] + self.row[row] + self.column[column]
        regions[sample, marked] += scenes.loudness * self.mark[mark]
        regions = regions + scenes.noise * torch.randn(regions.shape, generator=generator)

        numbers = torch.tensor([KINDS.index(kind) for kind in kinds])
        number = numbers[torch.randint(len(numbers), (rows,), generator=generator)]
        relation, detail, chain = (number == KINDS.index(kind) for kind in ("relation", "detail", "chain"))
        allowed = (column > 0) | ~chain[:, None]
        first = torch.rand(rows, cells, generator=generator).masked_fill(~allowed, -1.0).argmax(1)
        same = column == column[first][:, None]
        second = torch.rand(rows, cells, generator=generator).masked_fill(same, -1.0).argmax(1)
        seen = torch.where(detail, marked, torch.where(chain, first - 1, first))
        labels = torch.where(detail, scenes.colours + mark, colour[sample, seen])
        holds = (column[first] < column[second]).long()
        labels = torch.where(relation, scenes.colours + scenes.marks + holds, labels)
        asked = torch.zeros(rows, cells, dtype=torch.bool)
        asked[sample, seen] = True
        asked[sample[relation], second[relation]] = True
        named = _FIRST_SHAPE + shape
        said = torch.stack(
            [
                torch.where(relation, named[sample, first], torch.where(detail, _MARK, _COLOUR)),
                torch.where(relation | chain, _LEFT, _OF),
                torch.where(detail, _SCENE, torch.where(relation, named[sample, second], named[sample, first])),
            ],
            dim=1,
        )
        # Numbers of about size 1, as towers give them.
        inputs = {
            WORDS: Stream(tokens=(self.word[said] + self.spot) * (scenes.d_word / 2) ** 0.5),
            REGIONS: Stream(tokens=regions * (scenes.d_region / 5) ** 0.5),
        }
        return Batch(inputs=inputs, labels=labels, asked=asked)

    def best(self, batch: Batch) -> Int[Tensor, " b"]:
        """What a rule answers that knows all codes: it reads words, finds the regions, and reads those."""
        scenes, sample = self.scenes, torch.arange(len(batch.labels))
        said = (batch.inputs[WORDS].tokens @ self.word.mT).argmax(-1)
        regions = batch.inputs[REGIONS].tokens
        shapes = (said - _FIRST_SHAPE).clamp(min=0)[:, [0, 2]]
        at = (regions @ self.shape.mT).argmax(1).gather(1, shapes)  # where the first and the last word's shape is
        column = at % scenes.columns
        holds = column[:, 0] < column[:, 1]
        seen = torch.where(said[:, 1] == _LEFT, (at[:, 1] - 1).clamp(min=0), at[:, 1])
        colour = (regions[sample, seen] @ self.colour.mT).argmax(-1)
        mark = (regions @ self.mark.mT).amax(1).argmax(-1)
        found = torch.where(said[:, 0] == _MARK, scenes.colours + mark, colour)
        return torch.where(said[:, 0] >= _FIRST_SHAPE, scenes.colours + scenes.marks + holds.long(), found)

    def counting(self, batch: Batch) -> Int[Tensor, " b"]:
        """What a rule answers that sees no region apart: the most frequent colour, the first mark, or no."""
        scenes = self.scenes
        said = (batch.inputs[WORDS].tokens[:, 0] @ self.word.mT).argmax(-1)
        colours = (batch.inputs[REGIONS].tokens @ self.colour.mT).argmax(-1)
        counts = nn.functional.one_hot(colours, scenes.colours).sum(1)
        found = torch.where(said == _MARK, scenes.colours, counts.argmax(1))
        return torch.where(said >= _FIRST_SHAPE, scenes.colours + scenes.marks, found)


def draw_world(scenes: Scenes, *, seed: int) -> World:
    """Codes at random.

    Args:
        scenes: Settings.
        seed: Of the codes.
    """
    generator = torch.Generator().manual_seed(seed)
    cells = scenes.rows * scenes.columns
    numbers = (cells, scenes.colours, 2, scenes.rows, scenes.columns, scenes.marks)
    seen = _at_right_angles(sum(numbers), scenes.d_region, generator).split(numbers)
    word, spot = _at_right_angles(_FIRST_SHAPE + cells + LENGTH, scenes.d_word, generator).split(
        (_FIRST_SHAPE + cells, LENGTH)
    )
    shape, colour, size, row, column, mark = seen
    return World(
        scenes=scenes,
        shape=shape,
        colour=colour,
        size=size,
        row=row,
        column=column,
        mark=mark,
        word=word,
        spot=spot,
    )


def left_graph(scenes: Scenes) -> Bool[Tensor, "n n"]:
    """Which cell hears which: each what is left of it.

    Example:
        >>> left_graph(Scenes(rows=2, columns=2)).int().tolist()
        [[0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0]]
    """
    cells = scenes.rows * scenes.columns
    at = torch.arange(cells)
    inside = at[at % scenes.columns > 0]
    found = torch.zeros(cells, cells, dtype=torch.bool)
    found[inside, inside - 1] = True
    return found


def _at_right_angles(rows: int, width: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(width, rows, generator=generator)).Q.mT.contiguous()
