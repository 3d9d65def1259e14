"""Videos from bytes: which frames, of which containers, and what is refused before a frame is decoded."""

from __future__ import annotations

import io
import random
import sys
from dataclasses import replace

import av
import numpy as np
import pytest
from PIL import Image
from tests.tiny_videos import SIZE, box, matrix, shown_by, sound_only, video

from plait.core.errors import ConfigError, pip_install
from plait.data.media import MediaError
from plait.data.videos import VideoLimits, open_video

pytestmark = pytest.mark.light

CONTAINERS = [
    ("mp4", "libx264", "MP4"),
    ("mov", "mpeg4", "MP4"),
    ("matroska", "libx264", "MATROSKA"),
    ("webm", "libvpx-vp9", "MATROSKA"),
    ("avi", "mpeg4", "AVI"),
]


def grey(picture: Image.Image) -> float:
    return float(np.asarray(picture).mean())


@pytest.mark.row("S4-43")
@pytest.mark.parametrize(("container", "codec", "kind"), CONTAINERS)
def test_chosen_frames_are_those_that_were_written(container: str, codec: str, kind: str) -> None:
    found = open_video(video(12, container=container, codec=codec), place="a")
    assert (found.format, found.total, found.width, found.height) == (kind, 12, *SIZE)
    pictures = found.frames([0, 3, 3, 7, 11])
    assert [picture.mode for picture in pictures] == ["RGB"] * 5
    assert [picture.size for picture in pictures] == [SIZE] * 5
    assert [grey(picture) for picture in pictures] == pytest.approx([0, 60, 60, 140, 220], abs=3)
    assert [grey(picture) for picture in found.frames([11, 0])] == pytest.approx([220, 0], abs=3)
    assert found.frames([]) == []
    with pytest.raises(ValueError, match="frames 0 to 12 of a video of 12"):
        found.frames([0, 12])


@pytest.mark.parametrize(("container", "codec", "kind"), CONTAINERS)
def test_a_file_that_ends_early_is_refused_however_little_is_missing(container: str, codec: str, kind: str) -> None:
    whole = video(8, container=container, codec=codec)
    for missing in (1, 7, len(whole) // 3, len(whole) // 2):
        with pytest.raises(MediaError, match=rf"the {kind} video is (cut off|damaged)"):
            open_video(whole[:-missing], place="a")
    assert open_video(whole, place="a").total == 8


def corners() -> bytes:
    """One frame whose corners are, row by row: 0, 80, 160, 240."""
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        stream.codec_context.options = {"crf": "1"}
        pixels = np.kron(np.array([[0, 80], [160, 240]], np.uint8), np.ones((8, 16), np.uint8))
        file.mux(stream.encode(av.VideoFrame.from_ndarray(np.stack([pixels] * 3, 2), format="rgb24")))
        file.mux(stream.encode())
    return out.getvalue()


@pytest.mark.parametrize(
    ("turn", "seen"),
    [
        ((1, 0, 0, 1), [[0, 80], [160, 240]]),
        ((0, 1, -1, 0), [[160, 0], [240, 80]]),  # a quarter to the right: a telephone lies on its side
        ((-1, 0, 0, -1), [[240, 160], [80, 0]]),
        ((0, -1, 1, 0), [[80, 240], [0, 160]]),
        ((-1, 0, 0, 1), [[80, 0], [240, 160]]),  # a mirror: what faces the user
        ((1, 0, 0, -1), [[160, 240], [0, 80]]),
        ((0, 1, 1, 0), [[0, 160], [80, 240]]),
        ((0, -1, -1, 0), [[240, 80], [160, 0]]),
        ((2, 0, 0, 1), [[0, 80], [160, 240]]),  # pixels count as squares
        ((0, 0, 0, 0), [[0, 80], [160, 240]]),  # says nothing
    ],
)
def test_frames_are_turned_and_mirrored_as_the_file_says(
    turn: tuple[int, int, int, int], seen: list[list[int]]
) -> None:
    (shown,) = open_video(shown_by(corners(), matrix(*turn)), place="a").frames([0])
    assert shown.size == ((16, 32) if turn[1] else (32, 16))
    width, height = shown.size
    values = np.asarray(shown.convert("L")).astype(float)
    found = [[values[y, x] for x in (width // 4, 3 * width // 4)] for y in (height // 4, 3 * height // 4)]
    assert np.array(found) == pytest.approx(np.array(seen), abs=8)


@pytest.mark.parametrize("turn", [(1, 1, -1, 1), (1, 0, 1, 1), (20, 1, -1, 20)])
def test_a_video_turned_by_no_quarter_is_refused(turn: tuple[int, int, int, int]) -> None:
    with pytest.raises(MediaError, match=r"turned by (45|0|3) degrees or slanted"):
        open_video(shown_by(corners(), matrix(*turn)), place="a").frames([0])


@pytest.mark.parametrize(("container", "codec", "kind"), CONTAINERS)
def test_a_title_in_an_old_encoding_is_no_reason(container: str, codec: str, kind: str) -> None:
    data = video(3, container=container, codec=codec, title="Cafe in Orleans")
    assert data.count(b"Cafe in Orleans") == 1
    data = data.replace(b"Cafe in Orleans", "Café in Orléans".encode("latin-1"))
    found = open_video(data, place="a")
    assert (found.format, found.total, len(found.frames([0, 2]))) == (kind, 3, 2)


@pytest.mark.parametrize(("container", "codec", "name"), [("mp4", "libx264", b"avc1"), ("avi", "mpeg4", b"FMP4")])
def test_a_codec_that_is_not_known_is_said(container: str, codec: str, name: bytes) -> None:
    data = video(3, container=container, codec=codec)
    at = data.rindex(name)
    with pytest.raises(MediaError, match=r"the codec of the (MP4|AVI) video is not known here") as refused:
        open_video(data[:at] + b"Z" * len(name) + data[at + len(name) :], place="a")
    assert refused.value.remedy.startswith("convert it")


def test_nothing_but_our_own_error_comes_out_of_damaged_files() -> None:
    draw, refused = random.Random(5), 0
    whole = [video(6, container=container, codec=codec, title="x", seed=1) for container, codec, _ in CONTAINERS]
    for number in range(150):
        data = bytearray(whole[number % len(whole)])
        for _ in range(draw.choice((1, 4, 40))):
            data[draw.randrange(len(data))] = draw.randrange(256)
        if number % 3 == 0:
            del data[draw.randrange(len(data)) :]
        elif number % 3 == 1:  # heads and tables, where most faults lie
            at = draw.randrange(min(800, len(data)))
            data[-at : len(data) - at + 8] = draw.randbytes(8)
        try:
            found = open_video(bytes(data), place="a")
            found.frames(range(found.total))
        except MediaError:
            refused += 1
    assert 50 < refused < 150


FRAGMENTS = {"movflags": "frag_every_frame+empty_moov"}


def with_count(data: bytes, table: bytes, count: int) -> bytes:
    """An MP4 whose table says that it has so many samples."""
    at = data.index(table) + (8 if table == b"trun" else 12)
    return data[:at] + count.to_bytes(4, "big") + data[at + 4 :]


@pytest.mark.parametrize("table", [b"stsz", b"trun"])
def test_tables_of_what_is_not_there_never_reach_ffmpeg(table: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    data = video(6, options=FRAGMENTS if table == b"trun" else None)
    assert open_video(data, place="a").total == 6
    bombs = [with_count(data, table, 80_000_000)]
    if table == b"stsz":  # also where it does not belong, and in what FFmpeg takes for free space
        misplaced = box(b"stsz", bytes(8), (80_000_000).to_bytes(4, "big"))
        hidden = box(b"free", box(b"moov", box(b"udta", misplaced)))
        bombs += [
            data + box(b"moof", box(b"traf", misplaced)),
            data + hidden,
            data + box(b"meta", box(b"hdlr"), misplaced),
        ]
    monkeypatch.setattr(av, "open", None)
    for bomb in bombs:
        with pytest.raises(
            MediaError, match=r"80,000,\d+ samples by its own account, allowed are 3,456,000"
        ) as refused:
            open_video(bomb, place="a")
        assert refused.value.reason == "too-large"


def test_edits_that_repeat_everything_are_counted() -> None:
    data = video(6)
    at = data.index(b"elst") + 8
    with pytest.raises(MediaError, match="6,000,000 samples by its own account"):
        open_video(data[:at] + (1_000_000).to_bytes(4, "big") + data[at + 4 :], place="a")


def test_hours_of_plain_sound_beside_it_are_no_reason() -> None:
    out = io.BytesIO()
    with av.open(out, "w", format="mov") as file:
        pictures = file.add_stream("mpeg4", rate=10)
        pictures.width, pictures.height, pictures.pix_fmt = *SIZE, "yuv420p"
        sounds = file.add_stream("pcm_s16le", rate=16_000, layout="mono")
        for number in range(3):
            file.mux(pictures.encode(av.VideoFrame(*SIZE, "yuv420p")))
            heard = av.AudioFrame.from_ndarray(np.zeros((1, 1_600), np.int16), format="s16", layout="mono")
            heard.sample_rate, heard.pts = 16_000, 1_600 * number
            file.mux(sounds.encode(heard))
        file.mux(pictures.encode())
        file.mux(sounds.encode())
    assert (
        open_video(out.getvalue(), place="a", limits=VideoLimits(max_frames=3)).total == 3
    )  # 4,803 samples, 48 are allowed


def test_a_compressed_header_could_hide_anything() -> None:
    with pytest.raises(MediaError, match="the header of the MOV video is compressed"):
        open_video(box(b"moov", box(b"cmov", bytes(40))), place="a")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (box(b"free") * 100_001, "more than 100,000 boxes side by side"),
        (box(b"udta", box(b"abcd") * 2_000), "more than 2,000 boxes"),
    ],
)
def test_a_flood_of_boxes_is_refused_at_once(more: bytes, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plait.data.videos._BOXES", 2_000)
    with pytest.raises(MediaError, match=said) as refused:
        open_video(video(2) + more, place="a")
    assert refused.value.reason == "too-large"


def test_no_more_is_decoded_than_allowed() -> None:
    found = open_video(video(12), place="a", limits=VideoLimits(max_decoded=4 * 40 * 24))
    assert len(found.frames([0, 3])) == 2
    with pytest.raises(
        MediaError, match=r"5 frames of 40 x 24 must be decoded .*: 4,800 pixels, allowed are 3,840"
    ) as refused:
        found.frames([0, 4])
    assert refused.value.reason == "too-large"
    grows = replace(found, width=4, height=4)  # frames need not have the size that the header says
    with pytest.raises(MediaError, match="4,800 pixels, allowed are 3,840"):
        grows.frames([0, 4])


def test_bytes_behind_the_last_box_are_none_of_the_video() -> None:
    data = video(4)
    for more in (b"made by a camera", bytes(16), b"\xff" * 16, b"TAG"):
        assert len(open_video(data + more, place="a").frames(range(4))) == 4
    with pytest.raises(MediaError, match="the MP4 video is cut off: 92 bytes are missing"):
        open_video(data + (100).to_bytes(4, "big") + b"free", place="a")


def test_the_end_of_what_was_streamed_is_not_missed() -> None:
    data = video(8, options=FRAGMENTS)
    last = data.rindex(b"moof", 0, data.rindex(b"moof")) - 4
    assert open_video(data[:last], place="a").total == 6  # as the docs say: cut between two fragments
    with pytest.raises(MediaError, match="cut off"):
        open_video(data[: last + 50], place="a")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", r"the video is empty \(0 bytes\)"),
        (b"words and more words", r"not a video of a known container.*begins with 77 6f 72"),
        (b"\x00\x00\x00\x10ftypisom\x00\x00\x00\x00", "the MP4 video is damaged"),
        (b"\x1a\x45\xdf\xa3", "the MATROSKA video is damaged"),
        (b"\x1a\x45\xdf\xa3\xff", "the MATROSKA video is damaged"),
        (b"RIFF\x04\x00\x00\x00AVI ", "the AVI video is damaged|no video stream"),
        (b"\x00\x00\x00\x01ftyp" + bytes(20), "the MP4 video is damaged"),
    ],
)
def test_what_is_no_video_is_refused(data: bytes, said: str) -> None:
    with pytest.raises(MediaError, match=said) as refused:
        open_video(data, place="films/a.mp4")
    assert refused.value.place == "films/a.mp4"
    assert refused.value.remedy


def test_a_file_of_sound_alone_is_refused() -> None:
    with pytest.raises(MediaError, match="the MP4 file has no video stream, only audio") as refused:
        open_video(sound_only(), place="song.m4a")
    assert refused.value.place == "song.m4a"


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        (VideoLimits(max_frames=5), "the video has more than 5 frames, allowed are 5"),
        (VideoLimits(max_pixels=900), r"frames of 0\.0 MP, allowed are 0 MP"),
        (VideoLimits(max_bytes=100), r"the video has \S+ bytes, allowed are 100"),
    ],
)
def test_what_is_over_the_limits_is_refused(limits: VideoLimits, said: str) -> None:
    with pytest.raises(MediaError, match=said) as refused:
        open_video(video(6), place="a", limits=limits)
    assert refused.value.reason == "too-large"


def test_damage_inside_is_refused_where_a_frame_is_lost() -> None:
    whole = bytearray(video(12, seed=1))
    start = whole.index(b"mdat") + 4
    whole[start + 40 : start + 4_000] = bytes(3_960)
    with pytest.raises(MediaError, match=r"the MP4 video is damaged|12 frames by its own account, \d+ can be decoded"):
        open_video(bytes(whole), place="a").frames(range(12))


def test_without_pyav_the_command_that_installs_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    data = video(2)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ConfigError, match="needs the package av") as refused:
        open_video(data, place="a")
    assert refused.value.remedy == pip_install("plait[video]")
