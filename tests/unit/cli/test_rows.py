"""The checklist's coverage, read from source, must say what pytest itself would say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from plait.cli import rows
from plait.cli.main import main
from plait.core.errors import DataError, UsageError

pytestmark = pytest.mark.light

HEADER = "id\tcategory\ttype\tpriority\tname\n"

EVERY_STYLE = """
import pytest
from pytest import mark

pytestmark = [pytest.mark.row("A-1"), pytest.mark.filterwarnings("ignore")]

@pytest.mark.row("A-2")
def test_plain(): ...

@mark.row("A-2", "A-3")
@pytest.mark.parametrize("x", [1, pytest.param(2, marks=pytest.mark.row("A-4"))])
def test_parametrized(x): ...

@pytest.mark.row("B-1")
class TestOuter:
    pytestmark: list = [pytest.mark.row("B-2")]

    def test_method(self): ...

    class TestInner:
        @pytest.mark.row("B-3")
        def test_deep(self): ...

    def helper(self): ...

async def helper(): ...
"""

TELL = """
import json
def pytest_collection_modifyitems(items):
    found = sorted({(row, i.nodeid.split("[")[0]) for i in items for m in i.iter_markers("row") for row in m.args})
    with open("found.json", "w") as file:
        json.dump(found, file)
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "docs").mkdir()
    (tmp_path / "tests" / "unit").mkdir(parents=True)
    ids = ["A-1", "A-2", "A-3", "A-4", "B-1", "B-2", "B-3", "B-4"]
    lines = [
        f"{i}\t{'alpha' if i[0] == 'A' else 'beta'}\tT\t{'core' if i[-1] in '24' else 'imp.'}\tRow {i}\n" for i in ids
    ]
    (tmp_path / "docs" / "requirements.tsv").write_text(HEADER + "".join(lines))
    return tmp_path


def write_test(checkout: Path, text: str, name: str = "test_one.py") -> None:
    (checkout / "tests" / "unit" / name).write_text(text)


def test_finds_what_pytest_finds(checkout: Path) -> None:
    write_test(checkout, EVERY_STYLE)
    (checkout / "conftest.py").write_text(TELL)
    (checkout / "pytest.ini").write_text("[pytest]\nmarkers =\n    row(id): a row\n")
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "tests"]
    subprocess.run(command, cwd=checkout, check=True, capture_output=True, timeout=60)
    found = {tuple(pair) for pair in json.loads((checkout / "found.json").read_text())}
    assert {(c.row, c.test) for c in rows.collect(checkout)} == found
    assert ("B-2", "tests/unit/test_one.py::TestOuter::TestInner::test_deep") in found  # the oracle is not empty


def test_counts_by_category_and_priority(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_test(checkout, EVERY_STYLE)
    monkeypatch.chdir(checkout / "tests" / "unit")  # anywhere inside the checkout will do
    assert main(["rows"]) == 0
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in capsys.readouterr().out.splitlines()}
    assert lines["alpha"] == "4 of 4 2 of 2"
    assert lines["beta"] == "3 of 4 1 of 2"
    assert lines["all"] == "7 of 8 3 of 4"


def test_json_lists_every_row_once_with_its_tests(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_test(checkout, EVERY_STYLE)
    monkeypatch.chdir(checkout)
    assert main(["rows", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)["rows"]
    assert [row["id"] for row in result] == ["A-1", "A-2", "A-3", "A-4", "B-1", "B-2", "B-3", "B-4"]
    assert set(result[0]) == {"id", "category", "priority", "name", "tests"}
    assert result[2]["tests"] == ["tests/unit/test_one.py::test_parametrized"]
    assert main(["rows", "--json", "--missing"]) == 0
    assert [row["id"] for row in json.loads(capsys.readouterr().out)["rows"]] == ["B-4"]


@pytest.mark.parametrize(
    ("text", "place", "cause"),
    [
        ('import pytest\n\n@pytest.mark.row("Z-9")\ndef test_a(): ...\n', "test_one.py:3", "no row Z-9"),
        ("import pytest\nX = 'A-1'\n@pytest.mark.row(X)\ndef test_a(): ...\n", "test_one.py:3", "literal"),
        ('import pytest\n@pytest.mark.row("A-1")\ndef helper(): ...\n', "test_one.py:2", "no test carries"),
        ("def test_a(:\n", "test_one.py:1", "cannot parse"),
    ],
)
def test_refuses_and_names_the_line(checkout: Path, text: str, place: str, cause: str) -> None:
    write_test(checkout, text)
    with pytest.raises(DataError, match=cause) as caught:
        rows.join(rows.read_checklist(checkout / "docs" / "requirements.tsv"), rows.collect(checkout))
    assert caught.value.place.endswith(place)


@pytest.mark.parametrize(
    ("extra", "line", "cause"),
    [("A-1\talpha\tT\tcore\tagain\n", 10, "twice"), ("C-1\talpha\n", 10, "2 fields")],
)
def test_refuses_a_damaged_checklist(checkout: Path, extra: str, line: int, cause: str) -> None:
    path = checkout / "docs" / "requirements.tsv"
    path.write_text(path.read_text() + extra)
    with pytest.raises(DataError, match=cause) as caught:
        rows.read_checklist(path)
    assert caught.value.place == f"{path}:{line}"


def test_outside_a_checkout_says_so(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"requirements\.tsv"):
        rows.find_root(tmp_path)


def test_this_checkout_is_consistent() -> None:
    root = rows.find_root(Path(__file__).parent)
    joined = rows.join(rows.read_checklist(root / rows.CHECKLIST), rows.collect(root))
    assert any(row["tests"] for row in joined)
