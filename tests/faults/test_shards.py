"""Damaged shards: cut off, bit-flipped, exchanged, tampered with; each is named and refused before it is used."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from plait.core.errors import DataError, ResourceError
from plait.core.types import MediaRef, Sample, Turn
from plait.data.media import encode_png
from plait.data.shards import ShardReader, write_shards

pytestmark = pytest.mark.light


def entries(count: int, shade: int = 0) -> list[tuple[Sample, dict[str, bytes]]]:
    made = []
    for number in range(count):
        data = encode_png(Image.new("RGB", (4, 4), (number, shade, 0)))
        sha256 = hashlib.sha256(data).hexdigest()
        ref = MediaRef(modality="image", sha256=sha256, uri="", width=4, height=4)
        sample = Sample(id=f"s{number}", turns=(Turn(role="user", parts=(ref,)),), meta={"shade": shade})
        made.append((sample, {sha256: data}))
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shards(tmp_path, "train", entries(4))
    return tmp_path


def read_all(folder: Path, name: str = "train") -> list[bytes]:
    with ShardReader(folder, name) as reader:
        return [reader.media(ref) for sample in reader for ref in sample.media()]


def refused(folder: Path, name: str = "train") -> DataError:
    with pytest.raises(DataError) as error:
        read_all(folder, name)
    assert "train-000.tar" in str(error.value)
    assert error.value.remedy
    return error.value


@pytest.mark.row("S4-14")
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_flipped_bit_is_found(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("flip")
    write_shards(folder, "train", entries(2))
    good = read_all(folder)
    path = folder / data.draw(st.sampled_from(["train-000.tar", "train-000.tar.idx"]))
    content = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    fault = ""
    read = []
    try:
        read = read_all(folder)
    except DataError as error:
        fault = str(error)
    if fault:
        assert "train-000.tar" in fault
    else:
        # A flip in the index may hit a blank or a number nobody needs; what is read is right all the same.
        assert path.suffix == ".idx"
        assert read == good


@pytest.mark.parametrize("part", [0.0, 0.5, 0.99])
def test_a_cut_off_shard_is_refused_with_both_sizes(folder: Path, part: float) -> None:
    path = folder / "train-000.tar"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    assert f"its index says {len(content):,}" in refused(folder).cause


def test_a_longer_shard_is_refused(folder: Path) -> None:
    with (folder / "train-000.tar").open("ab") as file:
        file.write(b"more")
    refused(folder)


def test_a_shard_of_another_run_is_refused(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    write_shards(other, "train", entries(4, shade=9))
    (folder / "train-000.tar").write_bytes((other / "train-000.tar").read_bytes())
    assert "sha256" in refused(folder).cause


def test_a_test_shard_put_in_place_of_the_training_one_is_refused(folder: Path) -> None:
    write_shards(folder, "test-style", entries(4, shade=5))
    for ending in (".tar", ".tar.idx"):
        (folder / f"train-000{ending}").write_bytes((folder / f"test-style-000{ending}").read_bytes())
    assert "does not belong to it" in refused(folder).cause


def test_a_missing_index_a_missing_shard_and_a_gap_are_named(folder: Path) -> None:
    index = (folder / "train-000.tar.idx").read_text()
    (folder / "train-000.tar.idx").unlink()
    assert "no index" in refused(folder).cause
    (folder / "train-000.tar.idx").write_text(index)
    (folder / "train-000.tar").rename(folder / "away")
    assert "cannot be read" in refused(folder).cause
    (folder / "away").rename(folder / "train-001.tar")
    (folder / "train-000.tar.idx").rename(folder / "train-001.tar.idx")
    assert "no index" in refused(folder).cause


@pytest.mark.row("S4-14")
@pytest.mark.parametrize("lost", [[3], [2, 3], [1], [1, 2, 3]])
def test_a_split_that_lost_whole_shards_is_refused(tmp_path: Path, lost: list[int]) -> None:
    write_shards(tmp_path, "train", entries(4), max_bytes=1)
    assert len(read_all(tmp_path)) == 4
    for number in lost:
        for ending in (".tar", ".tar.idx"):
            (tmp_path / f"train-{number:03d}{ending}").unlink()
    names = ", ".join(f"train-{number:03d}.tar" for number in lost)
    assert f"it is one of 4 of its split; not there: {names}" in refused(tmp_path).cause


def test_a_shard_too_many_is_refused(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    write_shards(other, "train", entries(4, shade=9), max_bytes=1)
    for ending in (".tar", ".tar.idx"):
        (folder / f"train-001{ending}").write_bytes((other / f"train-001{ending}").read_bytes())
    assert "one of 1 of its split, but there is train-001.tar" in refused(folder).cause


def test_a_shard_of_a_larger_split_is_refused(tmp_path: Path) -> None:
    for name, count in (("mine", 4), ("other", 5)):
        (tmp_path / name).mkdir()
        write_shards(tmp_path / name, "train", entries(count), max_bytes=1)
    for ending in (".tar", ".tar.idx"):
        (tmp_path / f"mine/train-001{ending}").write_bytes((tmp_path / f"other/train-001{ending}").read_bytes())
    assert "it is of another split than train-000.tar" in refused(tmp_path / "mine").cause


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"split_samples": 5}, "its split has 4 samples, its index says 5"),
        ({"split_samples": 3}, "incomplete"),
        ({"shards": 0}, "incomplete"),
        ({"shards": 10**12}, "not there: train-001.tar, train-002.tar, train-003.tar"),
        ({"shards": "1"}, "cannot be used"),
        ({"shards": 1.5}, "the index of train-000.tar"),
        ({"sha256": None}, "the index of train-000.tar"),
        ({"more": 1}, "cannot be used"),
        ({"format": 1}, "has format 1, this version reads 2"),
    ],
)
def test_a_header_that_states_another_split_is_refused(folder: Path, change: dict[str, object], cause: str) -> None:
    path = folder / "train-000.tar.idx"
    header, *rest = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps(json.loads(header) | change), *rest]) + "\n")
    assert cause in refused(folder).cause


@pytest.mark.parametrize("lines", [[], ["{"], ["[]"], ['{"format": 2}'], ['{"format": 1, "shard": "train-000.tar"}']])
def test_a_damaged_index_is_refused(folder: Path, lines: list[str]) -> None:
    (folder / "train-000.tar.idx").write_text("\n".join(lines))
    assert "index" in refused(folder).cause


def test_a_lost_line_of_the_index_is_noticed(folder: Path) -> None:
    path = folder / "train-000.tar.idx"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    assert "incomplete" in refused(folder).cause


@pytest.mark.parametrize(
    "change",
    [{"name": "../../etc/passwd"}, {"name": "/etc/passwd"}, {"offset": -1}, {"size": 10**9}, {"offset": 10**9}],
)
def test_an_index_that_points_outside_is_refused(folder: Path, change: dict[str, object]) -> None:
    path = folder / "train-000.tar.idx"
    header, first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([header, json.dumps(json.loads(first) | change), *rest]) + "\n")
    assert "does not belong to it or is incomplete" in refused(folder).cause


@pytest.mark.parametrize(
    "uri",
    ["../secret#a.png", "/etc/passwd", "train-000.tar#../a", "train-000.tar", "#s0.png", "", "x/train-000.tar#s0.png"],
)
def test_a_reference_that_leads_elsewhere_is_refused(folder: Path, uri: str) -> None:
    with ShardReader(folder, "train") as reader:
        good = reader[0].media()[0]
        with pytest.raises(DataError, match="does not name a member"):
            reader.media(MediaRef(modality="image", sha256=good.sha256, uri=uri))


def test_a_reference_to_other_bytes_or_to_nothing_is_refused(folder: Path) -> None:
    with ShardReader(folder, "train") as reader:
        first, second = reader[0].media()[0], reader[1].media()[0]
        with pytest.raises(DataError, match="not those the sample was made with"):
            reader.media(MediaRef(modality="image", sha256=first.sha256, uri=second.uri))
        with pytest.raises(DataError, match=r"no member 'absent\.png'"):
            reader.media(MediaRef(modality="image", sha256=first.sha256, uri="train-000.tar#absent.png"))
        with pytest.raises(DataError, match="no index"):
            reader.media(MediaRef(modality="image", sha256=first.sha256, uri="train-007.tar#s0.png"))


def test_a_shard_that_changes_after_it_was_opened_is_noticed(folder: Path) -> None:
    with ShardReader(folder, "train") as reader:
        ref = reader[0].media()[0]
        good = reader.media(ref)
        path = folder / "train-000.tar"
        offset = path.read_bytes().index(good)
        with path.open("r+b") as file:
            file.seek(offset + 20)
            file.write(b"\xff\xff\xff\xff")
        with pytest.raises(DataError, match="changed after the shard was opened"):
            reader.media(ref)


def test_links_and_devices_in_a_tar_do_nothing(folder: Path) -> None:
    """Only regular bytes at noted offsets are read; the tar's own headers are never followed."""
    with tarfile.open(folder / "train-000.tar", "a") as tar:
        link = tarfile.TarInfo("evil.json")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    refused(folder)


def test_a_full_disk_leaves_no_part_of_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match=r"No space left on device \([\d,]+ MiB free\)"):
        write_shards(tmp_path, "train", entries(3))
    assert list(tmp_path.iterdir()) == []
