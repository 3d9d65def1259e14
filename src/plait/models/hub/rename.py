"""Rules that rename weights both ways: join what we keep as one matrix, split it again, turn what is stored turned."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from plait.core.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One module or tensor of ours and where it comes from; ``*`` stands for a number, the same on both sides.

    A name of a module covers all its tensors (``weight``, ``bias``, statistics).

    Attributes:
        ours: Name of ours.
        theirs: Names of theirs; several are joined along the first axis.
        shares: Relative sizes of several; equal where it is empty.
        transposed: Whether their matrices are stored as ``in out``, as GPT-2's are.
        leading: Axes of length 1 that theirs have in front and ours have not; -1: ours have one more.
    """

    ours: str
    theirs: tuple[str, ...]
    shares: tuple[int, ...] = ()
    transposed: bool = False
    leading: int = 0


def to_ours(
    state: Mapping[str, Tensor], rules: Sequence[Rule], *, ignored: Sequence[str] = (), place: str = ""
) -> dict[str, Tensor]:
    """Weights under published names under ours.

    Args:
        state: Published names to tensors.
        rules: Of the layout.
        ignored: Names, with ``*``, that have no place here and need none, such as stored position numbers.
        place: File or folder, for errors.

    Raises:
        CheckpointError: Some names have no place, or parts of a joined matrix are missing; lists them.
    """
    found: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    unknown: list[str] = []
    for name, value in state.items():
        if any(_matches(pattern, name) is not None for pattern in ignored):
            continue
        match = next(_match(rules, name), None)
        if match is None:
            unknown.append(name)
            continue
        rule, number, ours = match
        turned = value.T.contiguous() if rule.transposed and value.ndim == 2 else value
        turned = turned[None] if rule.leading < 0 else turned.view(turned.shape[rule.leading :])
        if len(rule.theirs) == 1:
            found[ours] = turned
        else:
            parts.setdefault(ours, {})[number] = turned
            if len(parts[ours]) == len(rule.theirs):
                found[ours] = torch.cat([parts[ours][i] for i in range(len(rule.theirs))])
    lacking = sorted(name for name in parts if name not in found)
    if unknown or lacking:
        raise CheckpointError(
            f"{len(unknown)} names have no place here{_some(unknown)}; {len(lacking)} matrices miss parts"
            f"{_some(lacking)}",
            place=place,
            remedy="use weights of the layout that is asked for",
        )
    return found


def to_theirs(state: Mapping[str, Tensor], rules: Sequence[Rule], *, place: str = "") -> dict[str, Tensor]:
    """Our weights under published names: the inverse of :func:`to_ours`.

    Raises:
        CheckpointError: Some of our names have none in this layout; lists them.
    """
    found: dict[str, Tensor] = {}
    unknown: list[str] = []
    for name, value in state.items():
        rule, bound = next(((rule, bound) for rule in rules for bound in _bound(rule.ours, name)), (None, None))
        if rule is None or bound is None:
            unknown.append(name)
            continue
        shares = rule.shares or (1,) * len(rule.theirs)
        pieces = value.split([len(value) * share // sum(shares) for share in shares]) if len(shares) > 1 else [value]
        for pattern, piece in zip(rule.theirs, pieces, strict=True):
            turned = piece.T if rule.transposed and piece.ndim == 2 else piece
            turned = turned[0] if rule.leading < 0 else turned.reshape([1] * rule.leading + list(turned.shape))
            found[_filled(pattern, bound)] = turned.contiguous()
    if unknown:
        raise CheckpointError(
            f"{len(unknown)} of our weights have no name in this layout{_some(unknown)}",
            place=place,
            remedy="build the tower as the layout has it, or save it in our own",
        )
    return found


@dataclass(frozen=True, slots=True)
class _Bound:
    numbers: tuple[str, ...]
    leaf: str


def _match(rules: Sequence[Rule], name: str) -> Iterator[tuple[Rule, int, str]]:
    for rule in rules:
        for number, pattern in enumerate(rule.theirs):
            for bound in _bound(pattern, name):
                yield rule, number, _filled(rule.ours, bound)


def _bound(pattern: str, name: str) -> Iterator[_Bound]:
    """How a pattern names a tensor, or the module whose tensor it is."""
    numbers = _matches(pattern, name)
    if numbers is not None:
        yield _Bound(numbers, "")
        return
    module, _, leaf = name.rpartition(".")
    numbers = _matches(pattern, module)
    if module and numbers is not None:
        yield _Bound(numbers, f".{leaf}")


def _matches(pattern: str, name: str) -> tuple[str, ...] | None:
    found = re.fullmatch(re.escape(pattern).replace(r"\*", r"(\d+)"), name)
    return found.groups() if found else None


def _filled(pattern: str, bound: _Bound) -> str:
    for number in bound.numbers:
        pattern = pattern.replace("*", number, 1)
    return pattern + bound.leaf


def _some(names: Sequence[str]) -> str:
    return f" ({', '.join(names[:6])}{', ..' if len(names) > 6 else ''})" if names else ""
