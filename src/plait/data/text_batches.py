"""Batches of texts, each row a text as it is, or with parts hidden: a function of seed and step alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from plait.core.errors import ConfigError, DataError
from plait.core.tensors import IGNORE, Batch
from plait.data.masking.spans import SpanMask
from plait.data.masking.tokens import TokenMask
from plait.data.order import Order, block, generator


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenText:
    """A text as tokens.

    Attributes:
        id: Of the sample.
        token_ids: With what begins and ends it.
        words: Number of each token's word; None for special tokens. Empty: each token is a word of its own.
    """

    id: str
    token_ids: Sequence[int]
    words: Sequence[int | None] = ()


Row = tuple[Sequence[int], Sequence[int]]
"""Token ids, and labels of as many; :data:`~plait.core.tensors.IGNORE` where nothing is trained."""

Form = Callable[[TokenText, torch.Generator], Row]
"""What of a text is read and what is trained, by chance as far as the form has any."""


def as_it_is(text: TokenText, _: torch.Generator) -> Row:
    """Every token is to be told from those before it: autoregressive modeling."""
    return text.token_ids, text.token_ids


@dataclass(frozen=True, slots=True, kw_only=True)
class Hidden:
    """Form of masked language modeling: labels stand where tokens are hidden.

    Attributes:
        rule: Which tokens are hidden.
    """

    rule: TokenMask

    def __call__(self, text: TokenText, chance: torch.Generator) -> Row:
        """Hide; see :class:`plait.data.masking.tokens.TokenMask`."""
        found = self.rule(text.token_ids, words=text.words or None, generator=chance)
        return found.token_ids.tolist(), found.labels.tolist()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewritten:
    """Form of span corruption for one row: what is read, and behind it what is to be written, which alone is trained.

    An encoder-decoder parts the row again where labels begin (``models/reading.py``); a decoder learns
    it as it stands, by next tokens.

    Attributes:
        rule: Which spans are hidden. What begins or ends a text is a token like others.
        end: Id behind what is written.
    """

    rule: SpanMask
    end: int

    def __call__(self, text: TokenText, chance: torch.Generator) -> Row:
        """Hide; see :class:`plait.data.masking.spans.SpanMask`."""
        read, written = self.rule(text.token_ids, generator=chance)
        written = [*written, self.end]
        return [*read, *written], [IGNORE] * len(read) + written


@dataclass(frozen=True, slots=True, kw_only=True)
class Continued:
    """Form of prefix language modeling: the beginning of a text is given, the rest is to be told.

    Attributes:
        shortest: Tokens of the beginning at least; how many it has is drawn, all lengths being equally likely.
    """

    shortest: int = 1

    def __post_init__(self) -> None:
        if self.shortest < 1:
            raise ConfigError(f"shortest is {self.shortest}", place="shortest", remedy="set it to 1 or more")

    def __call__(self, text: TokenText, chance: torch.Generator) -> Row:
        """Cut.

        Raises:
            DataError: The text is too short to have a rest.
        """
        longest = len(text.token_ids) - 1
        if longest < self.shortest:
            raise DataError(
                f"{len(text.token_ids)} tokens: nothing is left behind a beginning of {self.shortest}",
                place=f"sample {text.id}",
                remedy="leave it out, or lower shortest",
            )
        given = int(torch.randint(self.shortest, longest + 1, (), generator=chance))
        return text.token_ids, [IGNORE] * given + [*text.token_ids[given:]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextBatches:
    """Source of batches of texts for the training loop.

    All texts are gone through in a new random order each epoch. The rows of a step, and what is hidden in them, are the
    same however the batch is split: what is drawn for a row depends on the seed, the step and the sample's id alone.

    Attributes:
        texts: All of them.
        form: What is read, and what is trained.
        batch_size: Texts in a batch, that of all ranks together.
        longest: Tokens of a row at most; a longer text is an error, never cut.
        seed: Seed of order and form.
        pad: Token id behind shorter rows.
        micro_batch: Texts in a micro-batch at most; 0: all of a rank's at once.
        rank: Which of the processes that train together this is: it takes its block of each batch.
        world: How many there are; the batch of all of them is the same for any number.

    Raises:
        ConfigError: There are fewer texts in a batch than processes, no such rank, or ``micro_batch`` is negative.
        DataError: There is no text, two have one id, a text is longer than a row, or has not as many words as tokens.
    """

    texts: Sequence[TokenText]
    form: Form
    batch_size: int
    longest: int
    seed: int
    pad: int = 0
    micro_batch: int = 0
    rank: int = 0
    world: int = 1
    _order: Order = field(init=False, repr=False)

    def __post_init__(self) -> None:
        block(self.batch_size, rank=self.rank, world=self.world)
        if self.micro_batch < 0:
            raise ConfigError(
                f"micro-batches of {self.micro_batch} texts", place="micro_batch", remedy="set 0 (all at once) or more"
            )
        _check(self.texts, self.longest)
        object.__setattr__(self, "_order", Order(number=len(self.texts), batch_size=self.batch_size, seed=self.seed))

    def step_batches(self, step: int) -> list[Batch]:
        """The micro-batches of this rank for the update after ``step`` finished steps; always the same ones.

        Raises:
            DataError: A text cannot take the form, or is longer than a row in it.
        """
        chosen: list[int] = self._order.batch(step).tolist()
        mine = chosen[block(self.batch_size, rank=self.rank, world=self.world)]
        size = self.micro_batch or len(mine)
        return [self._batch(mine[at : at + size], step) for at in range(0, len(mine), size)]

    def _batch(self, chosen: Sequence[int], step: int) -> Batch:
        texts = [self.texts[number] for number in chosen]
        rows = [self._row(text, step) for text in texts]
        width = max(len(ids) for ids, _ in rows)
        ids = torch.full((len(rows), width), self.pad, dtype=torch.long)
        labels, segments = torch.full_like(ids, IGNORE), torch.zeros_like(ids)
        for at, (row, trained) in enumerate(rows):
            ids[at, : len(row)], labels[at, : len(row)] = torch.tensor(row), torch.tensor(trained)
            segments[at, : len(row)] = 1
        return Batch(
            token_ids=ids,
            labels=labels,
            segment_ids=segments,
            media={},
            item_row={},
            sample_ids=tuple(text.id for text in texts),
        )

    def _row(self, text: TokenText, step: int) -> Row:
        try:
            row = self.form(text, generator(self.seed, f"form {text.id}", step))
        except DataError as error:
            raise DataError(error.cause, place=f"sample {text.id}", remedy=error.remedy) from error
        if len(row[0]) > self.longest:
            raise DataError(
                f"{len(text.token_ids)} tokens are {len(row[0])} in this form, a row has {self.longest}",
                place=f"sample {text.id}",
                remedy="raise longest, or shorten the text",
            )
        return row


def _check(texts: Sequence[TokenText], longest: int) -> None:
    if not texts:
        raise DataError("there is no text to learn from", place="texts", remedy="check what the data stage kept")
    seen: set[str] = set()
    for text in texts:
        if text.id in seen:
            raise DataError("two texts have this id", place=f"sample {text.id}", remedy="give each its own")
        seen.add(text.id)
        if text.words and len(text.words) != len(text.token_ids):
            raise DataError(f"{len(text.token_ids)} tokens, but words of {len(text.words)}", place=f"sample {text.id}")
    if long := [text for text in texts if len(text.token_ids) > longest]:
        raise DataError(
            f"{len(long)} of {len(texts)} texts are longer than {longest} tokens; the first has "
            f"{len(long[0].token_ids)}",
            place=f"sample {long[0].id}",
            remedy="raise longest, or shorten or leave out those texts",
        )
