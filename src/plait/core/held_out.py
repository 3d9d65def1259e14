"""Test splits kept shut: a trial of a search may not see them, so that a test score is one look, not the best of many.

A run folder that holds :data:`MARK` reads no test split after its data stage, whoever resumes it.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Generator, Iterable
from pathlib import Path

from plait.core.errors import DataError

MARK = "held_out.json"
"""In a run folder: its stages leave test splits shut. Says why, as ``why``."""

_TEST = "test"
_QUESTIONS = "instruct-"

_SHUT: contextvars.ContextVar[bool] = contextvars.ContextVar("held out", default=False)


@contextlib.contextmanager
def shut(*, when: bool = True) -> Generator[None]:
    """Keep test splits shut in the block; a block within that is given False changes nothing."""
    token = _SHUT.set(when or _SHUT.get())
    try:
        yield
    finally:
        _SHUT.reset(token)


def shut_in(run: Path) -> bool:
    """Whether the stages of a run leave test splits shut."""
    return (run / MARK).is_file()


def is_test(split: str) -> bool:
    """Whether a split is for the last look.

    Example:
        >>> is_test("test-concept"), is_test("instruct-test-style"), is_test("validation"), is_test("train")
        (True, True, False, False)
    """
    return split.removeprefix(_QUESTIONS).startswith(_TEST)


def opened(splits: Iterable[str]) -> tuple[str, ...]:
    """Those splits that may be read now; all of them unless test splits are shut.

    Example:
        >>> with shut():
        ...     opened(("train", "test-style"))
        ('train',)
    """
    return tuple(split for split in splits if not (_SHUT.get() and is_test(split)))


def check(split: str, place: Path) -> None:
    """See that a split may be read.

    Raises:
        DataError: It is a test split, and these are shut.
    """
    if _SHUT.get() and is_test(split):
        raise DataError(
            f"the split {split!r} is shut: this is a trial of a search, and test splits are read once, by its last run",
            place=str(place),
            remedy="search by a number of the validation split, or take this stage out of the search",
        )
