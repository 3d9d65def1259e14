"""Sequences of random words and questions about words further back; made anew for every step."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

SKIP = -100
"""Target of positions that are not asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Sequences and what is asked of them.

    Attributes:
        ids: Words; a marked word is the word plus the number of words.
        targets: Answers to every question at every position, ``SKIP`` where it is not asked.
    """

    ids: Int[Tensor, "b t"]
    targets: Int[Tensor, "b t q"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Which word stood so far back, for each lag; and which was the marked one, if one is marked.

    Attributes:
        words: Different words.
        length: Of a sequence.
        begin: Positions before this one are not asked; lags reach no further back.
        lags: How far back, a question for each.
        mark: Whether one word is marked, somewhere before ``begin``, or before the last word where that is 0; its
            question comes last, and is asked after it only.
    """

    words: int
    length: int
    begin: int
    lags: tuple[int, ...] = ()
    mark: bool = False

    @property
    def questions(self) -> tuple[str, ...]:
        """Their names."""
        return (*(f"back {lag}" for lag in self.lags), *(("marked",) if self.mark else ()))

    @property
    def vocabulary(self) -> int:
        """Different tokens."""
        return self.words * (2 if self.mark else 1)

    def draw(self, rows: int, generator: torch.Generator, *, mark_at: int | None = None) -> Batch:
        """Draw sequences.

        Args:
            rows: How many.
            generator: Of everything.
            mark_at: Where the marked word stands in all of them; at random unless given.
        """
        words = torch.randint(self.words, (rows, self.length), generator=generator)
        at, ids, answers = torch.arange(self.length), words, list[Tensor]()
        for lag in self.lags:
            back = functional.pad(words[:, : self.length - lag], (lag, 0))
            answers.append(back.masked_fill(at < max(lag, self.begin), SKIP))
        if self.mark:
            where = torch.randint(self.begin or self.length - 1, (rows, 1), generator=generator)
            where = where if mark_at is None else torch.full_like(where, mark_at)
            marked = words.gather(1, where).expand(-1, self.length)
            answers.append(marked.masked_fill((at <= where) | (at < self.begin), SKIP))
            ids = words + self.words * (at == where)
        return Batch(ids=ids, targets=torch.stack(answers, dim=-1))


def right(scores: Float[Tensor, "b t q v"], targets: Int[Tensor, "b t q"]) -> list[float]:
    """Share of right answers to each question, over all positions where it is asked.

    Example:
        >>> scores = torch.tensor([[[[0.0, 1.0]], [[1.0, 0.0]], [[0.0, 1.0]]]])
        >>> right(scores, torch.tensor([[[1], [1], [SKIP]]]))
        [0.5]
    """
    asked, hit = targets != SKIP, scores.argmax(-1) == targets
    return [float(hit[..., q][asked[..., q]].double().mean()) for q in range(targets.shape[-1])]
