"""Own data: lists are read with file:line, bad rows are counted, doubles do not leak."""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from plait.core.errors import DataError
from plait.data.expect import expect_pairs
from plait.data.ledger import Ledger
from plait.data.media import LIMITS, Limits, encode_png
from plait.data.sources import Gathered, Picture
from plait.data.sources.pair_files import read_lines
from plait.data.sources.pairs import PairsChoice, gather_pairs, group_rows

pytestmark = pytest.mark.light


def write_picture(path: Path, number: int, kind: str = "PNG") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 7), (number % 256, number // 256, 90)).save(path, kind)


def choice_of(path: Path, **changes: object) -> PairsChoice:
    choice = PairsChoice(
        path=path,
        root=path if path.is_dir() else path.parent,
        licence="CC0-1.0",
        test_fraction=0.2,
        min_rows=2,
        limits=LIMITS,
        max_train=None,
        max_test=None,
        seed=0,
    )
    return replace(choice, **changes)


def gather(choice: PairsChoice) -> tuple[Gathered, Ledger]:
    ledger = Ledger()
    return gather_pairs(choice, ledger, lambda done, total: None), ledger


def write_csv(folder: Path, count: int = 20, extra: str = "") -> Path:
    lines = ["image,text,place"]
    for number in range(count):
        write_picture(folder / f"img/{number}.png", number)
        lines.append(f'img/{number}.png,"thing, number {number}",shelf {number}')
    path = folder / "pairs.csv"
    path.write_text("\n".join(lines) + "\n" + extra, encoding="utf-8")
    return path


def test_a_csv_file_becomes_train_and_test(tmp_path: Path) -> None:
    gathered, ledger = gather(choice_of(write_csv(tmp_path)))
    counts = Counter(p.sample.meta["split"] for p in gathered.pictures)
    assert counts == {"train": 16, "test-concept": 4}
    assert ledger.totals() == {"rows": 20, "kept": 20, "changed": 0, "dropped": 0, "faults": 0}
    first = next(p for p in gathered.pictures if p.row == "pairs.csv:2")
    assert first.sample.answer("name.en") == "thing, number 0"
    assert first.sample.meta["columns"] == {"place": "shelf 0"}
    assert (first.sample.media()[0].width, first.sample.media()[0].height) == (9, 7)
    assert first.read() == (tmp_path / "img/0.png").read_bytes()


@pytest.mark.parametrize("start", ["image,text\n", "\ufeffimage,text\r\n", " Text , IMAGE \n", "\n\nimage,text\n"])
def test_headers_as_people_write_them(tmp_path: Path, start: str) -> None:
    turned = "Text" in start
    path = tmp_path / "p.csv"
    path.write_text(start + ("b c,a.png\n" if turned else "a.png,b c\n"), encoding="utf-8")
    (line,) = list(read_lines(path))
    assert (line.image, line.text, line.fault) == ("a.png", "b c", "")


@pytest.mark.parametrize(
    ("content", "place", "cause"),
    [
        (b"", ":1", "empty"),
        (b"picture,words\na,b\n", ":1", "no column called 'image'; the header is: picture, words"),
        (b"image\na\n", ":1", "no column called 'text'"),
        (b"image,text,text\n", ":1", "more than one column"),
        (b"image,text\na,ok\nb,\xff\xfe\n", ":3", "not UTF-8: byte 0xff"),
        (b'image,text\na,"open\n', ":2", "not a CSV file"),
        (b"image;text\na.png;b\n", ":1", "the separator looks like ';'"),
        (b'\n"image";"text"\n', ":2", "the separator looks like ';'"),
        (b"image\ttext\na.png\tb\n", ":1", "the separator looks like a tab"),
        ("image,text\n".encode("utf-16"), "", "the file is UTF-16 text"),
        (b"PK\x03\x04\x14\x00", "", "a ZIP archive or an Excel workbook"),
        (encode_png(Image.new("RGB", (2, 2))), "", "the file is a PNG picture"),
        (b"image,text\na,\0\n", "", "no text (it has zero bytes)"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_its_line(
    tmp_path: Path, content: bytes, place: str, cause: str
) -> None:
    path = tmp_path / "p.csv"
    path.write_bytes(content)
    with pytest.raises(DataError) as refused:
        list(read_lines(path))
    assert refused.value.place == f"{path}{place}"
    assert cause in refused.value.cause


def test_rows_are_named_by_the_line_they_end_on(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text('image,text\na.png,"two\nlines"\nb.png,x,y\n\nc.png,z\n', encoding="utf-8")
    assert [(line.row, line.fault) for line in read_lines(path)] == [
        ("p.csv:3", ""),
        ("p.csv:4", "bad-row"),
        ("p.csv:6", ""),
    ]


def test_a_folder_with_text_files(tmp_path: Path) -> None:
    for number in range(5):
        write_picture(tmp_path / f"sub/{number}.JPG", number, "JPEG")
        (tmp_path / f"sub/{number}.txt").write_text(f" caption {number}\n", encoding="utf-8-sig")
    gathered, ledger = gather(choice_of(tmp_path))
    assert {p.sample.answer("name.en") for p in gathered.pictures} == {f"caption {n}" for n in range(5)}
    assert ledger.dropped() == ()


def test_every_picture_and_caption_of_a_folder_has_a_fate(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    for name in ("a.png", "sub/b.png", "lonely.png", "blank.png", "shouted.png"):
        write_picture(folder / name, len(name))
    for name in ("scan.tif", "PHOTO.HEIC", "odd.xyz", "notes.pdf", "noending"):
        (folder / name).write_bytes(b"whatever")
    for name in ("a", "sub/b", "scan", "odd", "orphan", "sub/a"):
        (folder / f"{name}.txt").write_text(f"caption of {name}")
    (folder / "blank.txt").touch()
    (folder / "shouted.TXT").write_text("CAPTION")
    (tmp_path / "elsewhere").mkdir()
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    _, ledger = gather(choice_of(folder))
    assert ledger.totals()["kept"] == 2
    assert {row.id: row.reason for row in ledger.rows() if row.fate == "dropped"} == {
        "PHOTO.HEIC": "format",
        "blank.png": "no-text",
        "linked/": "linked-folder",
        "lonely.png": "no-caption",
        "odd.xyz": "format",
        "orphan.txt": "no-picture",
        "scan.tif": "format",
        "shouted.TXT": "no-picture",
        "shouted.png": "no-caption",
        "sub/a.txt": "no-picture",
    }


def test_a_part_of_the_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated, because tests may run as root, who may read everything."""
    write_picture(tmp_path / "a.png", 1)
    write_picture(tmp_path / "secret/b.png", 2)
    scan = os.scandir

    def scandir(path: str) -> object:
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match="a folder cannot be read: Permission denied") as refused:
        list(read_lines(tmp_path))
    assert refused.value.place == str(tmp_path / "secret")


def test_two_lists_in_a_folder_are_refused_and_one_is_to_go(tmp_path: Path) -> None:
    write_picture(tmp_path / "a.png", 1)
    (tmp_path / "captions.jsonl").write_text('{"image": "a.png", "text": "x"}\n')
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,y\n")
    with pytest.raises(DataError, match=r"2 lists: captions\.jsonl, metadata\.csv") as refused:
        list(read_lines(tmp_path))
    assert "remove metadata.csv to use captions.jsonl" in refused.value.remedy
    assert [line.text for line in read_lines(tmp_path / "metadata.csv")] == ["y"]


def test_what_a_folders_list_does_not_name_is_counted_but_is_no_fault(tmp_path: Path) -> None:
    lines = []
    for number in range(4):
        write_picture(tmp_path / f"sub/{number}.png", number)
        lines.append(json.dumps({"image": f"./sub/{number}.png", "text": f"caption {number}"}))
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    write_picture(tmp_path / "sub/forgotten.png", 9)
    (tmp_path / "sub/0.txt").write_text("not read")
    gathered, ledger = gather(choice_of(tmp_path))
    assert len(gathered.pictures) == 4
    assert {row.id: row.reason for row in ledger.dropped()} == {
        "sub/forgotten.png": "not-listed",
        "sub/0.txt": "not-listed",
    }
    assert ledger.totals()["faults"] == 0


@pytest.mark.parametrize("name", ["captions.jsonl", "metadata.jsonl"])
def test_a_folder_with_a_list(tmp_path: Path, name: str) -> None:
    keys = ("image", "text") if name.startswith("captions") else ("file_name", "caption")
    for number in range(4):
        write_picture(tmp_path / f"{number}.png", number)
    lines = [json.dumps({keys[0]: f"{n}.png", keys[1]: f"caption {n}", "score": n}) for n in range(4)]
    (tmp_path / name).write_text("\n".join([*lines, "{", "[1]", '{"image": 3, "text": "x"}', ""]))
    gathered, ledger = gather(choice_of(tmp_path))
    assert len(gathered.pictures) == 4
    assert [(row.id, row.reason) for row in ledger.dropped()] == [(f"{name}:{n}", "bad-row") for n in (5, 6, 7)]
    assert gathered.pictures[0].sample.meta["columns"].keys() == {"score"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("absent.png,x", "no-file"),
        ("img,x", "no-file"),
        ("img/0.png,", "no-text"),
        (f"img/0.png,{'x' * 2001}", "too-large"),
        ("https://example.org/a.png,x", "remote"),
        ("data:image/png;base64,x", "remote"),
        ("../outside.png,x", "outside-root"),
        ("/etc/hostname,x", "outside-root"),
        ("link.png,x", "outside-root"),
        ("empty.png,x", "unreadable"),
        ("words.png,x", "unreadable"),
        ("big.png,x", "too-large"),
        ("img/0.png", "bad-row"),
        ('img/0.png,"THING,  number 0"', "duplicate"),
        ('copy.png,"thing, number 0"', "duplicate"),
    ],
)
def test_a_row_that_cannot_be_used_is_counted_and_the_rest_goes_on(tmp_path: Path, row: str, reason: str) -> None:
    folder = tmp_path / "data"
    path = write_csv(folder, extra=row if row == "img/0.png" else f"{row},shelf\n")
    write_picture(tmp_path / "outside.png", 1)
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    (folder / "empty.png").touch()
    (folder / "words.png").write_text("no picture")
    Image.new("RGB", (9, 7), (0, 0, 90)).save(folder / "copy.png", compress_level=0)
    Image.new("RGB", (60, 60)).save(folder / "big.png")
    gathered, ledger = gather(choice_of(path, limits=Limits(max_pixels=3000)))
    assert len(gathered.pictures) == 20
    assert [(row.id, row.reason) for row in ledger.dropped()] == [("pairs.csv:22", reason)]


def test_a_changed_picture_is_counted_as_changed(tmp_path: Path) -> None:
    path = write_csv(tmp_path)
    Image.new("CMYK", (8, 8)).save(tmp_path / "img/3.png", "JPEG")
    _, ledger = gather(choice_of(path))
    (row,) = [row for row in ledger.rows() if row.fate == "changed"]
    assert (row.id, row.reason) == ("pairs.csv:5", "cmyk-to-rgb")


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """31 pictures, for tests that only make lists of them."""
    folder = tmp_path_factory.mktemp("gallery")
    for number in range(31):
        write_picture(folder / f"{number}.png", number)
    return folder


@pytest.mark.row("S4-12")
@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=12, max_size=40),
    seed=st.integers(0, 5),
    validation=st.sampled_from([0.0, 0.2, 0.3]),
)
def test_no_picture_and_no_text_is_on_both_sides(
    gallery: Path, rows: list[tuple[int, int]], seed: int, validation: float
) -> None:
    folder = gallery
    lines = "".join(f"{number}.png,text {text}\n" for number, text in rows)
    (folder / "pairs.csv").write_text(f"image,text\n{lines}")
    cause = ""
    pictures: tuple[Picture, ...] = ()
    try:
        pictures = gather(choice_of(folder / "pairs.csv", seed=seed, validation=validation))[0].pictures
    except DataError as error:  # one group of all rows, or too few rows
        cause = error.cause
    if cause:
        assert "held out" in cause or "can be used" in cause
        return
    for key in (lambda p: p.sample.media()[0].sha256, lambda p: p.sample.answer("name.en")):
        sides: dict[str, set[str]] = {"train": set(), "test-concept": set()} | (
            {"validation": set()} if validation else {}
        )
        for picture in pictures:
            sides[picture.sample.meta["split"]].add(key(picture))
        assert all(sides.values())
        assert sum(map(len, sides.values())) == len(set().union(*sides.values()))
    without = gather(choice_of(folder / "pairs.csv", seed=seed))[0].pictures
    tests = [[p.sample for p in found if p.sample.meta["split"] == "test-concept"] for found in (pictures, without)]
    assert tests[0] == tests[1], "validation takes nothing from the test"


@given(st.lists(st.tuples(st.integers(0, 9).map(str), st.integers(0, 9).map(str)), max_size=25))
def test_groups_do_not_depend_on_the_order_of_rows(keys: list[tuple[str, ...]]) -> None:
    named = dict(zip(keys, group_rows(keys), strict=True))
    turned = dict(zip(reversed(keys), group_rows(list(reversed(keys))), strict=True))
    assert named == turned


def test_two_classes_cannot_be_held_out_and_the_message_says_so(tmp_path: Path) -> None:
    lines = []
    for number in range(40):
        write_picture(tmp_path / f"{number}.png", number)
        lines.append(f"{number}.png,{'cat' if number % 2 else 'dog'}")
    (tmp_path / "p.csv").write_text("image,text\n" + "\n".join(lines))
    with pytest.raises(DataError, match="40 rows make 2 groups") as refused:
        gather(choice_of(tmp_path / "p.csv"))
    assert "test_fraction=0" in refused.value.remedy
    gathered, _ = gather(choice_of(tmp_path / "p.csv", test_fraction=0.0))
    assert {p.sample.meta["split"] for p in gathered.pictures} == {"train"}


@pytest.mark.row("S4-63")
def test_a_share_of_the_rows_validates(tmp_path: Path) -> None:
    path = write_csv(tmp_path)
    gathered, ledger = gather(choice_of(path, validation=0.25, max_train=6))
    assert Counter(p.sample.meta["split"] for p in gathered.pictures) == {
        "train": 6,
        "validation": 5,
        "test-concept": 4,
    }
    assert Counter(row.reason for row in ledger.dropped()) == {"over-max-train": 5}
    assert gathered.facts["validation_groups"] == 5
    again, _ = gather(choice_of(path, validation=0.25, max_train=6))
    assert gathered == again
    other, _ = gather(choice_of(path, validation=0.25, max_train=6, seed=1))
    assert gathered.pictures != other.pictures


def test_limits_of_rows_are_kept_and_counted(tmp_path: Path) -> None:
    gathered, ledger = gather(choice_of(write_csv(tmp_path), max_train=5, max_test=2))
    assert Counter(p.sample.meta["split"] for p in gathered.pictures) == {"train": 5, "test-concept": 2}
    assert Counter(row.reason for row in ledger.dropped()) == {"over-max-train": 11, "over-max-test": 2}


@pytest.mark.parametrize(
    ("make", "cause"),
    [
        (lambda folder: folder, "there are no rows"),
        (lambda folder: folder / "absent.csv", "no such file or folder"),
        (lambda folder: write_csv(folder, 0), "there are no rows"),
        (lambda folder: write_csv(folder, 1), "1 of 1 rows can be used, at least 2 are needed"),
    ],
)
def test_nothing_to_work_with_is_an_error(tmp_path: Path, make: Callable[[Path], Path], cause: str) -> None:
    with pytest.raises(DataError, match=cause):
        gather(choice_of(make(tmp_path)))


def test_all_rows_faulty_names_the_first(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("image,text\na.png,x\nb.png,y\n")
    with pytest.raises(DataError, match=r"0 of 2 rows .* the first of the others is p\.csv:2: no-file"):
        gather(choice_of(tmp_path / "p.csv"))


def test_a_file_that_changes_under_our_hands_is_noticed(tmp_path: Path) -> None:
    gathered, _ = gather(choice_of(write_csv(tmp_path)))
    picture = gathered.pictures[0]
    assert isinstance(picture.data, Path)
    write_picture(picture.data, 999)
    with pytest.raises(DataError, match="changed or vanished"):
        picture.read()
    picture.data.unlink()
    with pytest.raises(DataError, match="changed or vanished"):
        picture.read()


def test_animations_and_all_formats_are_taken_as_they_are(tmp_path: Path) -> None:
    for number, kind in enumerate(["PNG", "JPEG", "WEBP", "GIF", "BMP"]):
        ending = {"JPEG": "jpeg"}.get(kind, kind.lower())
        write_picture(tmp_path / f"{number}.{ending}", number, kind)
        (tmp_path / f"{number}.txt").write_text(f"caption {number}")
    gathered, _ = gather(choice_of(tmp_path))
    assert len(gathered.pictures) == 5
    for picture in gathered.pictures:
        assert Image.open(io.BytesIO(picture.read())).size == (9, 7)


def test_what_is_expected_of_a_table_without_its_pictures_is_refused_with_the_first(tmp_path: Path) -> None:
    table = tmp_path / "pairs.csv"
    table.write_text("image,text\n" + "".join(f"no{i}.png,a thing {i}\n" for i in range(30)), encoding="utf-8")
    with pytest.raises(DataError, match="0 of 30 rows name a picture that is there, at least 2 are needed") as caught:
        expect_pairs(choice_of(table))
    assert "no0.png" in caught.value.cause
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError):
        expect_pairs(choice_of(empty))
