"""Videos from bytes: which frames, of which containers, and what is refused before a frame is decoded."""

from __future__ import annotations

import io
import sys

import av
import numpy as np
import pytest
from PIL import Image
from tests.tiny_videos import SIZE, sound_only, video

from plait.core.errors import ConfigError
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


def test_a_telephone_lies_on_its_side() -> None:
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        stream.codec_context.options = {"crf": "1"}
        pixels = np.zeros((16, 32, 3), np.uint8)
        pixels[:, :16] = 255  # the left half is white
        file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode())
    data = out.getvalue()
    movie, track, rest = data.split(_matrix(1, 0, 0, 1))
    turned = movie + _matrix(1, 0, 0, 1) + track + _matrix(0, 1, -1, 0) + rest  # a quarter to the right
    (straight,), (upright,) = (open_video(d, place="a").frames([0]) for d in (data, turned))
    assert straight.size == (32, 16)
    assert upright.size == (16, 32)
    shown = np.asarray(upright.convert("L")).astype(int)
    assert shown[:14].min() > 200  # what was left is above
    assert shown[18:].max() < 50


def _matrix(a: int, b: int, c: int, d: int) -> bytes:
    """Of an MP4 track's head: 16.16 fixed point, the last column 2.30."""
    numbers = (a << 16, b << 16, 0, c << 16, d << 16, 0)
    return b"".join(n.to_bytes(4, "big", signed=True) for n in numbers)


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
        (VideoLimits(max_frames=5), "the video has 6 frames, allowed are 5"),
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
    assert refused.value.remedy == "pip install 'plait[video]'"
