"""Wrong names that are hard and certainly wrong: for yes/no questions, for rejected answers, for canvases.

Wrong names are other pictures' right names, and each name is the wrong one (nearly) as often as it is the right one:
who answers yes/no questions without looking at the picture is right half of the time. A name is never used as wrong
where it might be true: one whose words contain the other's (cat, black cat), one from a family of overlapping meanings
(faces), a broad one (bird) within its group.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from plait.core.types import Sample
from plait.data.sources import rank

_STOP = frozenset(["a", "an", "the", "of", "with", "and", "in", "at", "to", "large", "medium", "small", "big"])
_WORD = re.compile(r"[\u3400-\u9fff]|[^\W_\u3400-\u9fff]+|[#*]")
_TOO_SIMILAR = 0.7  # share of common words, from which one text may be another way to say the other
_TRIES = 48


@dataclass(frozen=True, slots=True)
class Label:
    """What is known about the name of a picture: its words, and what else it may be called."""

    concept: str
    words: tuple[frozenset[str], ...]
    group: str
    subgroup: str
    family: str
    broad: bool

    @classmethod
    def of(cls, sample: Sample) -> Label:
        """The label of a picture."""
        keywords = sample.answer("keywords.en")
        texts = [name_of(sample), *(keywords.split(", ") if keywords else ())]
        return cls(
            concept=sample.meta["concept"],
            words=tuple(words for text in texts if (words := _words(text))),
            group=sample.answer("group") or "",
            subgroup=sample.meta.get("subgroup", ""),
            family=sample.meta.get("family", ""),
            broad=bool(sample.meta.get("broad", False)),
        )


def may_be_true(shown: Label, named: Label) -> bool:
    """Whether the name of ``named`` might be true of the picture of ``shown``; in doubt, yes."""
    if shown.concept == named.concept:
        return True
    if shown.family and named.family and _overlap(shown.family, named.family):
        return True
    if named.broad and (shown.group == named.group or not shown.group or not named.group):
        return True
    return any(_similar(one, other) for one in shown.words for other in named.words)


def _overlap(one: str, other: str) -> bool:
    """Families overlap if one's words contain the other's; ``happy face`` and ``unhappy face`` are opposites."""
    a, b = set(one.split()), set(other.split())
    return a <= b or b <= a


def _similar(one: frozenset[str], other: frozenset[str]) -> bool:
    common = len(one & other)
    return common == min(len(one), len(other)) or common >= _TOO_SIMILAR * len(one | other)


def wrong_names(samples: Sequence[Sample], *, seed: int, hard: bool = True) -> list[Sample | None]:
    """For each picture another one whose name is wrong for it; every name is used once if that is possible.

    The hardest name is taken: of the same subgroup, else with a word in common, else of the same group, else any; or
    any from the start. Names that are hard to place come first; whoever is left over swaps with another picture. None
    where every name of the others might be true.

    Args:
        samples: Pictures with names.
        seed: Of the choice.
        hard: Whether hard names are wanted.
    """
    labels = [Label.of(sample) for sample in samples]
    order = sorted(range(len(samples)), key=lambda i: rank(seed, "wrong", samples[i].id))
    pools = _Pools(labels, order, hard=hard)
    chosen: dict[int, int] = {}
    # Broad names fit only pictures of other groups, so they choose their picture before the pictures choose their name.
    for named in (i for i in order if labels[i].broad):
        taken = (
            p
            for p in _sample_of(order, seed, samples[named].id)
            if p not in chosen and not may_be_true(labels[p], labels[named])
        )
        if (picture := next(taken, None)) is not None:
            chosen[picture] = named
            pools.take(named)
    for picture in order:
        if picture not in chosen and (named := pools.hardest(picture)) is not None:
            chosen[picture] = named
            pools.take(named)
    for picture in order:
        if picture not in chosen:
            _place_left_over(picture, chosen, pools, tries=_sample_of(order, seed, samples[picture].id))
    return [samples[chosen[i]] if i in chosen else None for i in range(len(samples))]


def _sample_of(order: Sequence[int], seed: int, key: str) -> list[int]:
    return seeded(seed, "try", key).sample(order, min(len(order), 8 * _TRIES))


def _place_left_over(picture: int, chosen: dict[int, int], pools: _Pools, *, tries: Sequence[int]) -> None:
    """Give a picture a name by swapping with another; failing that, one that is used twice; failing that, none."""
    labels = pools.labels
    for free in pools.free():
        for other in tries:
            theirs = chosen.get(other)
            if (
                theirs is None
                or may_be_true(labels[picture], labels[theirs])
                or may_be_true(labels[other], labels[free])
            ):
                continue
            chosen[picture], chosen[other] = theirs, free
            pools.take(free)
            return
    again = next((n for n in tries if not may_be_true(labels[picture], labels[n])), None)
    if again is not None:
        chosen[picture] = again


class _Pools:
    """Names not used yet, by what makes them hard."""

    def __init__(self, labels: Sequence[Label], order: Iterable[int], *, hard: bool) -> None:
        self.labels, self._hard = labels, hard
        self._free = dict.fromkeys(order)
        self._by_key: dict[tuple[str, str], dict[int, None]] = defaultdict(dict)
        for index in self._free:
            for key in self._keys(index):
                self._by_key[key][index] = None

    def hardest(self, picture: int) -> int | None:
        """The first free name that is certainly wrong for a picture, from the hardest pool on."""
        for key in self._keys(picture):
            for tried, named in enumerate(self._by_key[key]):
                if tried == _TRIES:
                    break
                if not may_be_true(self.labels[picture], self.labels[named]):
                    return named
        return None

    def take(self, named: int) -> None:
        """Mark a name as used."""
        del self._free[named]
        for key in self._keys(named):
            self._by_key[key].pop(named, None)

    def free(self) -> list[int]:
        """Some names not used yet."""
        return list(self._free)[:_TRIES]

    def _keys(self, index: int) -> list[tuple[str, str]]:
        if not self._hard:
            return [("any", "")]
        label = self.labels[index]
        keys = [("subgroup", label.subgroup)] if label.subgroup else []
        keys += [("word", word) for word in sorted(label.words[0] if label.words else ())]
        return [*keys, *([("group", label.group)] if label.group else []), ("any", "")]


def _words(text: str) -> frozenset[str]:
    words = [_stem(word) for word in _WORD.findall(text.lower())]
    return frozenset(w for w in words if w not in _STOP) or frozenset(words)


def _stem(word: str) -> str:
    """Enough to see that "raising hands" and "raised hand" speak of the same; not a linguist's stem."""
    for ending in ("ing", "ed", "es", "s"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word.removesuffix(ending).rstrip("e")
    return word.rstrip("e") if len(word) > 3 else word


def name_of(sample: Sample) -> str:
    """The English name of a labelled picture."""
    return sample.answer("name.en") or ""


def seeded(seed: int, *key: str) -> random.Random:
    """A generator that depends on nothing but the seed and the key."""
    return random.Random(int(rank(seed, *key), 16))
