"""Which tokens of a text are hidden for masked language modeling: BERT's rule (https://arxiv.org/abs/1810.04805).

A share of the tokens is chosen. Of these, 80 % become the mask, 10 % another token, 10 % stay as they are; the model is
asked for all of them. With whole words, all tokens of a word are chosen together (the same authors, in 2019).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from plait.core.errors import ConfigError, DataError
from plait.core.tensors import IGNORE


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenMask:
    """How tokens are hidden.

    Attributes:
        mask: Id of the mask token.
        others: Ids that may stand in place of a chosen token: the vocabulary without special tokens.
        rate: Share of a text's tokens that are chosen.
        masked: Share of the chosen ones that become the mask.
        replaced: Share of the chosen ones that become one of ``others``. The rest stay.
        whole_words: Choose all tokens of a word, or none.

    Raises:
        ConfigError: A share is not between 0 and 1, two are more than 1 together, or there is nothing to put in place.

    Example:
        >>> rule = TokenMask(mask=4, others=range(5, 100))
        >>> found = rule(list(range(5, 25)), generator=torch.Generator().manual_seed(0))
        >>> int((found.labels != -100).sum()), len(found.token_ids)  # 15 % of 20
        (3, 20)
    """

    mask: int
    others: Sequence[int]
    rate: float = 0.15
    masked: float = 0.8
    replaced: float = 0.1
    whole_words: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise ConfigError(f"rate is {self.rate:g}", place="rate", remedy="set it above 0 and to at most 1")
        if min(self.masked, self.replaced) < 0 or self.masked + self.replaced > 1 + 1e-9:
            raise ConfigError(
                f"masked is {self.masked:g} and replaced {self.replaced:g}: shares of the chosen tokens",
                place="masked",
                remedy="set both to 0 or more and to at most 1 together",
            )
        if self.replaced and not len(self.others):
            raise ConfigError("there are no other tokens", place="others", remedy="give the ids of the vocabulary")

    def __call__(
        self, token_ids: Sequence[int], *, words: Sequence[int | None] | None = None, generator: torch.Generator
    ) -> MaskedText:
        """Hide some tokens of a text.

        So many are chosen that the mean over texts is the rate, but at least one. Whole words are tried in random
        order, and those that would make it too many are passed over; where all would, the shortest one is chosen.

        Args:
            token_ids: Of the text.
            words: Number of each token's word, as fast tokenizers tell (``word_ids``); None for special tokens, which
                are never chosen. By default each token is a word of its own.
            generator: Of the choice, on the CPU.

        Raises:
            DataError: There is no token to choose, or ``words`` is not as long as the text.
        """
        words = range(len(token_ids)) if words is None else words
        if len(words) != len(token_ids):
            raise DataError(f"{len(token_ids)} tokens, but words of {len(words)}", place="words")
        places: dict[int, list[int]] = {}
        for at, word in enumerate(words):
            if word is not None:
                places.setdefault(word if self.whole_words else at, []).append(at)
        chosen = self._choose([*places.values()], generator)
        ids, labels = torch.tensor(token_ids), torch.full((len(token_ids),), IGNORE)
        labels[chosen] = ids[chosen]
        draw = torch.rand(len(chosen), generator=generator)
        ids[chosen[draw < self.masked]] = self.mask
        other = chosen[(draw >= self.masked) & (draw < self.masked + self.replaced)]
        which: list[int] = torch.randint(max(1, len(self.others)), (len(other),), generator=generator).tolist()
        ids[other] = torch.tensor([self.others[at] for at in which], dtype=ids.dtype)
        return MaskedText(token_ids=ids, labels=labels)

    def _choose(self, words: list[list[int]], generator: torch.Generator) -> Int[Tensor, " k"]:
        number = sum(map(len, words))
        if not number:
            raise DataError("a text without a token that can be hidden", place="text", remedy="leave it out")
        wanted = self.rate * number + float(torch.rand((), generator=generator))  # rounded at random: the mean is exact
        left = max(1, min(number, int(wanted)))
        order: list[int] = torch.randperm(len(words), generator=generator).tolist()
        taken: list[int] = []
        for at in order:
            if len(words[at]) <= left:
                taken += words[at]
                left -= len(words[at])
        if not taken:
            taken = words[min(order, key=lambda at: len(words[at]))]
        return torch.tensor(sorted(taken))


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskedText:
    """A text with hidden tokens.

    Attributes:
        token_ids: With masks and other tokens in some places.
        labels: What stood in the chosen places; :data:`~plait.core.tensors.IGNORE` elsewhere. Not shifted.
    """

    token_ids: Int[Tensor, " t"]
    labels: Int[Tensor, " t"]
