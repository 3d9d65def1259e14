"""Every source row ends once, as kept, changed or dropped, with a reason; the totals add up or the stage fails."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from plait.core.errors import DataError, PlaitError
from plait.core.files import write_atomic
from plait.data.media import CHANGES

Fate = Literal["kept", "changed", "dropped"]
"""How a row can end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """Why a row was dropped.

    Attributes:
        text: One line for a person.
        fault: Whether something is wrong with the row, as opposed to a choice in the recipe.
    """

    text: str
    fault: bool


REASONS: Mapping[str, Reason] = {
    # choices
    "variant": Reason(text="another skin tone, gender or direction of a concept that has its one picture", fault=False),
    "flag": Reason(text="flag of a country or region; `flags: true` takes them", fault=False),
    "component": Reason(text="a part that is not used alone: skin tone swatch, hair", fault=False),
    "not-emoji": Reason(
        text="the source's own addition or spelling, not an emoji of Unicode, so it has no name", fault=False
    ),
    "not-in-train-style": Reason(text="its concept has no picture in the training style", fault=False),
    "duplicate": Reason(
        text="the same picture (pixel for pixel) as a kept row, or the same picture and text", fault=False
    ),
    "over-max-train": Reason(text="left out so that the training split has at most max_train pictures", fault=False),
    "over-max-test": Reason(text="left out so that a test split has at most max_test pictures", fault=False),
    "validated": Reason(text="its concept is held out for validation, which has it in the training style", fault=False),
    "not-listed": Reason(text="a picture or caption in the folder that the folder's list does not name", fault=False),
    "stopped": Reason(text="nothing was wrong with it when the stage stopped with an error", fault=False),
    # faults
    "bad-row": Reason(text="the row does not have the columns of the header", fault=True),
    "no-text": Reason(text="no name or caption", fault=True),
    "no-caption": Reason(text="a picture without a .txt file of the same name", fault=True),
    "no-picture": Reason(text="a .txt file without a picture of the same name", fault=True),
    "format": Reason(text="a picture, or a file with a caption, of a format that is not read", fault=True),
    "linked-folder": Reason(text="a folder that is a link; what is in it is not looked at", fault=True),
    "no-file": Reason(text="the picture file is not there or cannot be read", fault=True),
    "outside-root": Reason(text="the path leads outside the allowed folder", fault=True),
    "remote": Reason(text="a web address: nothing is downloaded", fault=True),
    "file-name": Reason(text="the file name is not a list of code points", fault=True),
    "too-large": Reason(text="over the limit of pixels or bytes", fault=True),
    "unreadable": Reason(text="empty, damaged, cut off, or not a picture of a known format", fault=True),
}
"""Why a row may be dropped; nothing else is accepted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the ledger.

    Attributes:
        id: The row in its source, such as ``twemoji/1f34e.png`` or ``pairs.csv:12``.
        source: Short name of the source.
        step: What decided: ``read``, ``name``, ``choose``, ``decode``, ``split``, ``subsample``.
        fate: How it ended.
        reason: A key of :data:`REASONS` if dropped; names of :data:`plait.data.media.CHANGES` joined by ``+`` if
            changed.
        split: Where it went, or would have gone.
        sample: Id of the sample it became.
        detail: What exactly, for a person.
    """

    id: str
    source: str
    step: str
    fate: Fate
    reason: str = ""
    split: str = ""
    sample: str = ""
    detail: str = ""


class Ledger:
    """Collects the fates of rows.

    Example:
        >>> ledger = Ledger()
        >>> ledger.enter("mine", ["a.png", "b.png"])
        >>> ledger.keep("a.png", split="train", sample="5f")
        >>> ledger.drop("b.png", "unreadable", step="decode", detail="0 bytes")
        >>> ledger.totals()["dropped"]
        1
    """

    def __init__(self) -> None:
        self._open: dict[str, str] = {}
        self._rows: dict[str, Row] = {}

    def enter(self, source: str, ids: Iterable[str]) -> None:
        """Announce rows before anything is decided about them.

        Raises:
            DataError: An id was announced before.
        """
        for row in ids:
            if row in self._open or row in self._rows:
                raise DataError("the row came twice", place=row, remedy="give each row of the source its own id")
            self._open[row] = source

    def keep(self, row: str, *, split: str, sample: str, changes: Iterable[str] = ()) -> None:
        """End a row as kept, or as changed if ``changes`` (keys of :data:`plait.data.media.CHANGES`) says so."""
        named = sorted(changes)
        if unknown := set(named) - set(CHANGES):
            raise _bug(f"unknown change {unknown}", row)
        fate: Fate = "changed" if named else "kept"
        self._end(
            Row(
                id=row,
                source=self._take(row),
                step="split",
                fate=fate,
                reason="+".join(named),
                split=split,
                sample=sample,
            )
        )

    def drop(self, row: str, reason: str, *, step: str, split: str = "", detail: str = "") -> None:
        """End a row as dropped for one of :data:`REASONS`."""
        if reason not in REASONS:
            raise _bug(f"unknown reason {reason!r}", row)
        source = self._take(row)
        self._end(Row(id=row, source=source, step=step, fate="dropped", reason=reason, split=split, detail=detail))

    def stop(self) -> None:
        """End all rows that have no fate yet as ``stopped``: the stage is failing, and the ledger helps to see why."""
        for row in tuple(self._open):
            self.drop(row, "stopped", step="split")

    def dropped(self) -> tuple[Row, ...]:
        """The rows dropped so far, in the order in which that was decided."""
        return tuple(row for row in self._rows.values() if row.fate == "dropped")

    def rows(self) -> tuple[Row, ...]:
        """All rows by id.

        Raises:
            PlaitError: A row has no fate: a bug, so nothing is written.
        """
        if self._open:
            raise _bug(
                f"{len(self._open)} of {len(self._open) + len(self._rows)} rows have no fate", next(iter(self._open))
            )
        return tuple(self._rows[key] for key in sorted(self._rows))

    def totals(self) -> dict[str, int]:
        """``rows``, ``kept``, ``changed``, ``dropped`` and, of these, ``faults``."""
        rows = self.rows()
        fates = Counter(row.fate for row in rows)
        faults = sum(row.fate == "dropped" and REASONS[row.reason].fault for row in rows)
        return {"rows": len(rows), **{fate: fates[fate] for fate in get_args(Fate)}, "faults": faults}

    def check_faults(self, max_rate: float) -> None:
        """Stop if too many rows are faulty; rows left out by choice count neither way.

        Raises:
            DataError: The rate is above ``max_rate``; names the commonest fault and one row that has it.
        """
        faulty = [row for row in self.rows() if row.fate == "dropped" and REASONS[row.reason].fault]
        used = sum(row.fate != "dropped" for row in self.rows())
        wanted = used + len(faulty)
        if not faulty or len(faulty) <= max_rate * wanted:
            return
        reason, count = Counter(row.reason for row in faulty).most_common(1)[0]
        example = next(row for row in faulty if row.reason == reason)
        raise DataError(
            f"{len(faulty):,} of {wanted:,} rows ({len(faulty) / wanted:.0%}) are faulty, allowed are {max_rate:.0%}; "
            f"{count:,} times: {REASONS[reason].text}",
            place=f"{example.id}{': ' + example.detail if example.detail else ''}",
            remedy="mend the rows listed in ledger.jsonl, or raise data.max_fault_rate",
        )

    def summary(self) -> list[tuple[str, str, str, int]]:
        """``(source, fate, reason, rows)`` for every combination that occurs, for the card and the terminal."""
        counted = Counter((row.source, row.fate, row.reason) for row in self.rows())
        order = get_args(Fate)
        return [
            (*key, n)
            for key, n in sorted(counted.items(), key=lambda item: (item[0][0], order.index(item[0][1]), item[0][2]))
        ]

    def write(self, path: Path) -> None:
        """Write JSON Lines, one row a line, sorted by id, as a whole or not at all."""
        lines = [json.dumps({k: v for k, v in asdict(row).items() if v}, ensure_ascii=False) for row in self.rows()]
        write_atomic(path, "".join(line + "\n" for line in lines))

    def _take(self, row: str) -> str:
        if row not in self._open:
            raise _bug("the row already has a fate" if row in self._rows else "the row was never announced", row)
        return self._open.pop(row)

    def _end(self, row: Row) -> None:
        self._rows[row.id] = row


def explain(fate: str, reason: str) -> str:
    """One line for a person about a reason of either kind."""
    if fate == "dropped":
        return REASONS[reason].text
    return "; ".join(CHANGES[name] for name in reason.split("+")) if reason else "as it was"


def _bug(cause: str, row: str) -> PlaitError:
    return PlaitError(f"ledger: {cause}", place=row, remedy="this is a bug in a data source; please report it")
