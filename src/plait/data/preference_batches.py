"""Batches of preference pairs: one prompt and picture with a right and a wrong answer, packed as two segments.

The pairs are split once into batches that never change, and steps go through these in turn. So whatever is computed
over all batches beforehand, such as the log-probabilities of a reference model, is computed over the very tensors that
train.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from plait.core.errors import DataError
from plait.core.packing import pack
from plait.core.tensors import Batch, Patches
from plait.core.types import AnswerKind, MediaRef, Sample, Text, Turn
from plait.data.collate import Account, collate, collate_rows
from plait.data.order import check_rank
from plait.data.packing import row_length
from plait.data.template import Rendered, Template


def preference(sample: Sample) -> tuple[Turn, Turn] | None:
    """The trained last turn, and the same turn with the rejected answer; None where no rejected answer is known."""
    last = sample.turns[-1]
    wrong = next((answer for answer in sample.answers if answer.kind == "rejected"), None)
    if wrong is None or last.role != "assistant" or not last.trained or last.parts == (Text(text=wrong.text),):
        return None
    return last, replace(last, parts=(Text(text=wrong.text),))


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferencePair:
    """One prompt with two answers.

    Attributes:
        id: Of the sample.
        chosen: The conversation with the right answer.
        rejected: The same with the wrong one.
    """

    id: str
    chosen: Rendered
    rejected: Rendered

    @classmethod
    def of(cls, sample: Sample, template: Template) -> PreferencePair:
        """Render both answers of a sample.

        Raises:
            DataError: It has no wrong answer, or a turn cannot be rendered.
        """
        turns = preference(sample)
        if turns is None:
            raise DataError(
                "the sample has no rejected answer to its last turn",
                place=f"sample {sample.id}",
                remedy="choose samples for which plait.data.preference_batches.preference finds one",
            )
        right, wrong = (template.sample(replace(sample, turns=(*sample.turns[:-1], turn))) for turn in turns)
        return cls(id=sample.id, chosen=right, rejected=wrong)

    def answers(self) -> list[tuple[str, Rendered]]:
        """Both, under the ids that :class:`plait.objectives.preference.DirectPreference` reads."""
        kinds: tuple[tuple[AnswerKind, Rendered], ...] = (("chosen", self.chosen), ("rejected", self.rejected))
        return [(f"{self.id}#{kind}", rendered) for kind, rendered in kinds]


class PreferenceBatches:
    """Source of preference batches for the training loop.

    All batches have one shape, rows being filled up with padding; only the last one of a pass may hold fewer pairs. Of
    several ranks each takes its share of the pairs of every batch, in turn, in rows of one number; where there are
    fewer pairs than ranks, a share is padding.

    Args:
        pairs: In the order in which they are trained.
        features: Cached features of media of one modality.
        grid_out: Tokens of these features, as :func:`plait.data.collate.collate` takes it.
        batch_size: Pairs in a batch.
        row: Tokens a row holds; 0 takes :func:`plait.data.packing.row_length`.
        pad: Id of padding.
        rank: Of this process.
        world: How many processes train together.

    Attributes:
        parts: The pairs of every batch that are this rank's.

    Raises:
        DataError: There is no pair, or an answer is longer than a row.
        ConfigError: There is no such rank.
    """

    def __init__(
        self,
        pairs: Sequence[PreferencePair],
        *,
        features: Callable[[Sequence[MediaRef]], Patches],
        grid_out: Account,
        batch_size: int,
        row: int,
        pad: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        check_rank(rank, world)
        if not pairs:
            raise DataError("there is no preference pair", remedy="ask for tasks whose questions have a wrong answer")
        whole = [pairs[start : start + batch_size] for start in range(0, len(pairs), batch_size)]
        answers = [[answer for pair in part for answer in pair.answers()] for part in whole]
        longest = max(len(rendered) for part in answers for _, rendered in part)
        self.row = row or row_length([[len(rendered) for _, rendered in part] for part in answers])
        if longest > self.row:
            name = next(name for part in answers for name, rendered in part if len(rendered) == longest)
            raise DataError(
                f"an answer with its prompt has {longest} tokens, a row holds {self.row}",
                place=f"sample {name}",
                remedy=f"set the row length to {longest} or more, or to 0",
            )
        shares = [[part[of::world] for part in whole] for of in range(world)]
        self.parts = shares[rank]
        self.rows = max(len(pack(_lengths(part), row=self.row)) for share in shares for part in share)
        self._features, self._grid_out, self._pad = features, grid_out, pad

    def __iter__(self) -> Iterator[Batch]:
        """Every batch once."""
        return (self._batch(part) for part in self.parts)

    def step_batches(self, step: int) -> list[Batch]:
        """The one batch of the update after ``step`` finished steps; always the same one."""
        return [self._batch(self.parts[step % len(self.parts)])]

    def in_pieces(self, step: int, sizes: Sequence[int], *, packed: bool = True) -> list[Batch]:
        """The same pairs of a step in several batches, for who compares the two.

        Args:
            step: Finished steps.
            sizes: Pairs of each batch, in order; what is left over is left out.
            packed: Whether a row holds several answers.
        """
        part = self.parts[step % len(self.parts)]
        starts = [sum(sizes[:at]) for at in range(len(sizes))]
        pieces = [part[start : start + size] for start, size in zip(starts, sizes, strict=True)]
        return [self._rows(piece) if packed else self._apart(piece) for piece in pieces if piece]

    def _apart(self, part: Sequence[PreferencePair]) -> Batch:
        answers = [answer for pair in part for answer in pair.answers()]
        return collate_rows(
            [[answer] for answer in answers],
            self._of(part),
            grid_out=self._grid_out,
            encoded=True,
            row=max(_lengths(part)),
            pad=self._pad,
        )

    def _of(self, part: Sequence[PreferencePair]) -> Mapping[str, Patches]:
        refs = {ref.sha256: ref for pair in part for ref in pair.chosen.media}
        return {name: self._features([ref]) for name, ref in refs.items()}

    def _batch(self, part: Sequence[PreferencePair]) -> Batch:
        return self._rows(part, rows=self.rows)

    def _rows(self, part: Sequence[PreferencePair], *, rows: int | None = None) -> Batch:
        answers = [answer for pair in part for answer in pair.answers()]
        return collate(
            answers,
            self._of(part),
            grid_out=self._grid_out,
            encoded=True,
            row=self.row,
            rows=rows,
            pad=self._pad,
        )


def _lengths(part: Sequence[PreferencePair]) -> list[int]:
    return [len(rendered) for pair in part for _, rendered in pair.answers()]


def questions_with_both(samples: Sequence[Sample], tasks: Sequence[str]) -> tuple[list[Sample], int]:
    """The questions of these tasks that have a right and a wrong answer, and how many have no wrong one."""
    asked = [sample for sample in samples if sample.meta["task"] in tasks]
    both = [sample for sample in asked if preference(sample) is not None]
    return both, len(asked) - len(both)
