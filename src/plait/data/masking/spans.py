"""Spans of a text replaced by sentinels, to be written: T5's span corruption (https://arxiv.org/abs/1910.10683, 3.1.4).

A text of n tokens loses ``k = round(rate * n)`` of them in ``s = round(k / length)`` spans. What is read has a sentinel
for each span, ``n - k + s`` tokens; what is written has each sentinel and then its span, ``k + s`` tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from plait.core.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanMask:
    """How spans are hidden.

    Attributes:
        sentinels: Ids of the sentinels, in their order (``<extra_id_0>`` first). A text has none of them itself.
        rate: Share of tokens that are hidden.
        length: Mean length of a span, in tokens.

    Raises:
        ConfigError: The rate is not between 0 and 1, the length below 1, or there are no sentinels.

    Example:
        >>> rule = SpanMask(sentinels=(99, 98, 97))
        >>> read, written = rule(list(range(20)), generator=torch.Generator().manual_seed(0))
        >>> len(read), len(written), restored(read, written, rule.sentinels) == list(range(20))
        (18, 4, True)
    """

    sentinels: Sequence[int]
    rate: float = 0.15
    length: float = 3.0

    def __post_init__(self) -> None:
        if not 0 < self.rate < 1:
            raise ConfigError(f"rate is {self.rate:g}", place="rate", remedy="set it above 0 and below 1")
        if not self.length >= 1:
            raise ConfigError(f"length is {self.length:g}", place="length", remedy="set it to 1 or more")
        if not len(self.sentinels):
            raise ConfigError("there are no sentinels", place="sentinels", remedy="give the ids of <extra_id_0> on")

    def sizes(self, number: int) -> tuple[int, int]:
        """Tokens that are hidden in a text of so many, and spans: at least one, and one token is left.

        Raises:
            DataError: The text has less than two tokens.

        Example:
            >>> SpanMask(sentinels=range(100)).sizes(512)
            (77, 26)
        """
        if number < 2:
            raise DataError(f"a text of {number} tokens: nothing is left when one is hidden", place="text")
        hidden = min(max(round(self.rate * number), 1), number - 1)
        return hidden, min(max(round(hidden / self.length), 1), hidden, number - hidden)

    def __call__(self, token_ids: Sequence[int], *, generator: torch.Generator) -> tuple[list[int], list[int]]:
        """What is read, and what is to be written; a text never begins with a hidden span, as in the authors' code.

        Args:
            token_ids: Of the text, without what ends it.
            generator: Of the choice, on the CPU.

        Raises:
            DataError: The text has less than two tokens, more spans than there are sentinels, or a sentinel in it.
        """
        hidden, spans = self.sizes(len(token_ids))
        if spans > len(self.sentinels):
            raise DataError(
                f"{spans} spans of {len(token_ids)} tokens, but {len(self.sentinels)} sentinels",
                place="text",
                remedy="give more sentinels, shorter texts or longer spans",
            )
        marks = self.sentinels[:spans]
        if found := set(marks) & set(token_ids):
            raise DataError(f"the text has the sentinel {min(found)} in it", place="text", remedy="escape its text")
        shown, gone = _pieces(len(token_ids) - hidden, spans, generator), _pieces(hidden, spans, generator)
        read: list[int] = []
        written: list[int] = []
        at = 0
        for mark, kept, lost in zip(marks, shown, gone, strict=True):
            read += [*token_ids[at : at + kept], mark]
            written += [mark, *token_ids[at + kept : at + kept + lost]]
            at += kept + lost
        return read, written


def restored(read: Sequence[int], written: Sequence[int], sentinels: Sequence[int]) -> list[int]:
    """The text, from what was read and what was written: each sentinel gives way to its span.

    Raises:
        DataError: A sentinel of one is not in the other.
    """
    marks = set(sentinels)
    spans: dict[int, list[int]] = {}
    span: list[int] = []
    for token in written:
        if token in marks:
            span = spans.setdefault(token, [])
        else:
            span.append(token)
    if (wanted := {token for token in read if token in marks}) != set(spans):
        raise DataError(f"sentinels {sorted(wanted)} were read and {sorted(spans)} written", place="text")
    return [found for token in read for found in (spans[token] if token in marks else (token,))]


def _pieces(number: int, pieces: int, generator: torch.Generator) -> list[int]:
    """Lengths, 1 at least, of a whole cut in random places; each way to cut it is equally likely."""
    cuts = torch.randperm(number - 1, generator=generator)[: pieces - 1].sort().values + 1
    ends: list[int] = [0, *cuts.tolist(), number]
    return [end - start for start, end in pairwise(ends)]
