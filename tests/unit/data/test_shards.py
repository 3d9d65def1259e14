"""Shards: plain tar for everyone, verified random access for us, the same bytes every time."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from plait.core.errors import DataError
from plait.core.types import Answer, MediaRef, Sample, Text, Turn
from plait.data.media import encode_png
from plait.data.shards import ShardReader, split_names, write_shards

pytestmark = pytest.mark.light


def picture(number: int) -> bytes:
    return encode_png(Image.new("RGB", (3, 2), (number % 256, number // 256, 7)))


def ref_of(data: bytes, uri: str = "") -> MediaRef:
    return MediaRef(modality="image", sha256=hashlib.sha256(data).hexdigest(), uri=uri, width=3, height=2)


def sample_of(number: int, *shown: bytes, text: str = "") -> Sample:
    parts = (*(ref_of(data) for data in shown), *((Text(text=text),) if text else ()))
    return Sample(
        id=f"s{number:04d}",
        turns=(Turn(role="user", parts=parts),),
        answers=(Answer(kind="label", name="name.en", text=f"thing {number}"),),
        meta={"split": "train", "n": number},
    )


def entries(count: int, first: int = 0) -> list[tuple[Sample, dict[str, bytes]]]:
    made = []
    for number in range(first, first + count):
        data = picture(number)
        made.append((sample_of(number, data), {hashlib.sha256(data).hexdigest(): data}))
    return made


@pytest.mark.row("S4-18")
def test_any_tar_reader_streams_the_samples_in_order(tmp_path: Path) -> None:
    """What WebDataset does: members of one sample stand together and share everything up to the first dot."""
    write_shards(tmp_path, "train", entries(5))
    groups: dict[str, dict[str, bytes]] = {}
    last = ""
    with tarfile.open(tmp_path / "train-000.tar", "r|") as tar:
        for member in tar:
            key, _, ending = member.name.partition(".")
            assert key == last or key not in groups, "members of one sample must stand together"
            last = key
            file = tar.extractfile(member)
            assert file is not None
            assert member.isreg()
            groups.setdefault(key, {})[ending] = file.read()
    assert list(groups) == [f"s{n:04d}" for n in range(5)]
    for number, group in enumerate(groups.values()):
        assert set(group) == {"json", "png"}
        assert group["png"] == picture(number)
        assert json.loads(group["json"])["meta"]["n"] == number


@pytest.mark.row("S4-18")
@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 12), max_bytes=st.integers(1, 20_000))
def test_what_is_written_is_read_back_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, count: int, max_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    written = write_shards(folder, "train", entries(count), max_bytes=max_bytes)
    with ShardReader(folder, "train") as reader:
        assert len(reader) == count
        for index in reversed(range(count)):
            assert reader[index] == written[index]
            assert reader.media(reader[index].media()[0]) == picture(index)
        assert list(reader) == written


def test_many_shards_are_numbered_and_each_is_whole(tmp_path: Path) -> None:
    write_shards(tmp_path, "train", entries(4), max_bytes=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        name for n in range(4) for name in (f"train-{n:03d}.tar", f"train-{n:03d}.tar.idx")
    )
    assert split_names(tmp_path) == ["train"]


def test_uris_name_the_member_that_holds_the_bytes(tmp_path: Path) -> None:
    (written,) = write_shards(tmp_path, "train", entries(1))
    assert written.media()[0].uri == "train-000.tar#s0000.png"


def test_a_picture_shown_by_many_samples_is_stored_once(tmp_path: Path) -> None:
    data = picture(1)
    media = {hashlib.sha256(data).hexdigest(): data}
    written = write_shards(tmp_path, "instruct-train", ((sample_of(n, data, text="?"), media) for n in range(20)))
    with tarfile.open(tmp_path / "instruct-train-000.tar") as tar:
        assert sum(name.endswith(".png") for name in tar.getnames()) == 1
    assert {sample.media()[0].uri for sample in written} == {"instruct-train-000.tar#s0000.png"}
    with ShardReader(tmp_path, "instruct-train") as reader:
        assert reader.media(reader[19].media()[0]) == data


def test_questions_reach_pictures_in_the_shards_of_another_split(tmp_path: Path) -> None:
    (shown,) = write_shards(tmp_path, "train", entries(1))
    question = replace(shown, id="q", turns=(Turn(role="user", parts=(*shown.turns[0].parts, Text(text="What?"))),))
    write_shards(tmp_path, "instruct-train", [(question, {})])
    with ShardReader(tmp_path, "instruct-train") as reader:
        assert reader.media(reader[0].media()[0]) == picture(0)
        assert reader[0].text("user") == "What?"


def test_several_pictures_of_one_sample_are_numbered(tmp_path: Path) -> None:
    one, two = picture(1), picture(2)
    media = {hashlib.sha256(data).hexdigest(): data for data in (one, two)}
    (written,) = write_shards(tmp_path, "train", [(sample_of(0, one, two, one), media)])
    assert [ref.uri.partition("#")[2] for ref in written.media()] == ["s0000.0.png", "s0000.1.png", "s0000.0.png"]
    with ShardReader(tmp_path, "train") as reader:
        assert [reader.media(ref) for ref in reader[0].media()] == [one, two, one]


def test_text_in_any_script_survives(tmp_path: Path) -> None:
    sample = replace(sample_of(0, text="这是什么？ 👩🏽‍🚀"), meta={"split": "train", "note": "naïve\u2028"})
    write_shards(tmp_path, "train", [(sample, {})])
    with ShardReader(tmp_path, "train") as reader:
        assert reader[0] == sample


def test_the_same_samples_give_the_same_bytes_without_time_or_owner(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_shards(tmp_path / name, "train", entries(3))
    for file in ("train-000.tar", "train-000.tar.idx"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    with tarfile.open(tmp_path / "a/train-000.tar") as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar} == {(0, 0, 0, "", "", 0o644)}


def test_no_samples_make_no_shard(tmp_path: Path) -> None:
    assert write_shards(tmp_path, "train", []) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad", ["../x", "/etc/x", "a/b", "", ".hidden", "a b", "x" * 120])
def test_ids_that_are_no_plain_file_names_are_refused(tmp_path: Path, bad: str) -> None:
    with pytest.raises(DataError, match="member's name"):
        write_shards(tmp_path, "train", [(replace(sample_of(0), id=bad), {})])
    assert list(tmp_path.iterdir()) == []


def test_doubled_ids_wrong_hashes_and_missing_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="same id"):
        write_shards(tmp_path, "train", [*entries(1), *entries(1)])
    with pytest.raises(DataError, match="another sha256"):
        write_shards(tmp_path, "train", [(sample_of(0, picture(0)), {ref_of(picture(0)).sha256: picture(1)})])
    with pytest.raises(DataError, match="not handed over"):
        write_shards(tmp_path, "train", [(sample_of(0, picture(0)), {})])
    with pytest.raises(DataError, match="shard's name"):
        write_shards(tmp_path, "../train", entries(1))
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_split_names_those_there_are(tmp_path: Path) -> None:
    write_shards(tmp_path, "test-style", entries(1))
    write_shards(tmp_path, "train", entries(1))
    with pytest.raises(DataError) as refused:
        ShardReader(tmp_path, "test")
    assert refused.value.remedy == "choose one of: test-style, train"


def test_the_reader_uses_no_file_but_the_tar(tmp_path: Path) -> None:
    """Offsets in the index are those of the member's bytes in the plain tar."""
    write_shards(tmp_path, "train", entries(3))
    content = (tmp_path / "train-000.tar").read_bytes()
    header, *members = map(json.loads, (tmp_path / "train-000.tar.idx").read_text().splitlines())
    assert header["sha256"] == hashlib.sha256(content).hexdigest()
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        for record, member in zip(members, tar, strict=True):
            assert (record["name"], record["offset"], record["size"]) == (member.name, member.offset_data, member.size)
