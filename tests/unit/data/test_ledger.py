"""The ledger: one fate a row, totals that add up, faults told from choices."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.core.errors import DataError, PlaitError
from plait.core.files import read_jsonl
from plait.data.ledger import REASONS, Ledger, Row, explain
from plait.data.media import CHANGES

pytestmark = pytest.mark.light

FATES = st.one_of(
    st.tuples(st.just("keep"), st.sets(st.sampled_from(sorted(CHANGES)))),
    st.tuples(st.just("drop"), st.sampled_from(sorted(REASONS))),
)


def fill(fates: list[tuple[str, object]]) -> Ledger:
    ledger = Ledger()
    ledger.enter("mine", (f"row {n}" for n in range(len(fates))))
    for number, (fate, what) in enumerate(fates):
        if fate == "keep":
            ledger.keep(f"row {number}", split="train", sample=str(number), changes=what)
        else:
            ledger.drop(f"row {number}", str(what), step="test")
    return ledger


@given(st.lists(FATES))
def test_totals_add_up_to_the_rows_whatever_happens(fates: list[tuple[str, object]]) -> None:
    ledger = fill(fates)
    totals = ledger.totals()
    assert totals["rows"] == len(fates) == totals["kept"] + totals["changed"] + totals["dropped"]
    assert totals["changed"] == sum(fate == "keep" and bool(what) for fate, what in fates)
    assert totals["faults"] <= totals["dropped"]
    assert sum(n for *_, n in ledger.summary()) == len(fates)
    ids = [row.id for row in ledger.rows()]
    assert ids == sorted(ids)


@given(st.lists(FATES, max_size=12))
def test_what_is_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, fates: list[tuple[str, object]]
) -> None:
    path = tmp_path_factory.mktemp("ledger") / "ledger.jsonl"
    ledger = fill(fates)
    ledger.write(path)
    assert tuple(Row(**record) for record in read_jsonl(path)) == ledger.rows()


def test_a_row_without_a_fate_is_a_bug_and_nothing_is_written(tmp_path: Path) -> None:
    ledger = Ledger()
    ledger.enter("mine", ["a", "b"])
    ledger.keep("a", split="train", sample="1")
    with pytest.raises(PlaitError, match="1 of 2 rows have no fate"):
        ledger.write(tmp_path / "ledger.jsonl")
    assert not list(tmp_path.iterdir())


def test_stopping_ends_the_rows_without_a_fate_and_no_others(tmp_path: Path) -> None:
    ledger = Ledger()
    ledger.enter("mine", ["a", "b", "c"])
    ledger.drop("b", "no-file", step="read")
    ledger.stop()
    ledger.write(tmp_path / "ledger.jsonl")
    assert [(row.id, row.reason) for row in ledger.rows()] == [("a", "stopped"), ("b", "no-file"), ("c", "stopped")]
    assert ledger.totals()["faults"] == 1


def test_a_row_has_one_fate_and_must_be_announced() -> None:
    ledger = Ledger()
    ledger.enter("mine", ["a"])
    ledger.drop("a", "variant", step="choose")
    with pytest.raises(PlaitError, match="already has a fate"):
        ledger.keep("a", split="train", sample="1")
    with pytest.raises(PlaitError, match="never announced"):
        ledger.drop("b", "variant", step="choose")
    with pytest.raises(DataError, match="twice"):
        ledger.enter("mine", ["a"])


def test_unknown_reasons_and_changes_are_refused() -> None:
    ledger = Ledger()
    ledger.enter("mine", ["a"])
    with pytest.raises(PlaitError, match="unknown reason"):
        ledger.drop("a", "because", step="choose")
    with pytest.raises(PlaitError, match="unknown change"):
        ledger.keep("a", split="train", sample="1", changes=["painted over"])
    ledger.keep("a", split="train", sample="1")


def test_choices_do_not_count_as_faults_and_do_not_dilute_them() -> None:
    fates: list[tuple[str, object]] = [("keep", set()), *[("drop", "unreadable")] * 2, *[("drop", "variant")] * 97]
    ledger = fill(fates)
    with pytest.raises(DataError, match=r"2 of 3 rows \(67%\) are faulty, allowed are 10%") as stopped:
        ledger.check_faults(0.1)
    assert stopped.value.place == "row 1"
    ledger.check_faults(0.67)
    fill([("drop", "variant")] * 50).check_faults(0.0)


def test_the_rate_that_is_allowed_is_inclusive() -> None:
    ledger = fill([("keep", set())] * 9 + [("drop", "no-file")])
    ledger.check_faults(0.1)
    with pytest.raises(DataError):
        ledger.check_faults(0.099)


def test_every_reason_explains_itself() -> None:
    assert all(explain("dropped", reason) for reason in REASONS)
    assert "EXIF" in explain("changed", "cmyk-to-rgb+orientation-applied")
    assert explain("kept", "") == "as it was"
