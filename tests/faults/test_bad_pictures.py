"""Bad pictures: each is refused with its cause, or used with what was changed; none crashes, none fills the memory."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from plait.core.errors import DataError
from plait.core.events import Events
from plait.core.files import read_jsonl
from plait.data.media import MediaError, open_image
from plait.data.shards import ShardReader
from plait.stages.data import Data

pytestmark = pytest.mark.light


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def noise(mode: str = "RGB", size: tuple[int, int] = (64, 48)) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def png_of_size(width: int, height: int, body: bytes = b"") -> bytes:
    """A PNG whose header promises any size, with whatever body."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def gif_of_size(width: int, height: int) -> bytes:
    data = bytearray(encode(Image.new("P", (4, 4)), "GIF"))
    data[6:10] = struct.pack("<2H", width, height)
    return bytes(data)


REFUSED = {
    "zero bytes": (b"", "unreadable", "0 bytes"),
    "one byte": (b"\x89", "unreadable", "not a picture"),
    "words": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "unreadable", "not a picture"),
    "a TIFF": (encode(noise(), "TIFF"), "unreadable", "not a picture of a known format"),
    "a header alone": (b"\x89PNG\r\n\x1a\n", "unreadable", "damaged|cut off"),
    "half a JPEG": (encode(noise(), "JPEG")[:1500], "unreadable", "cut off|truncated"),
    "half a progressive JPEG": (encode(noise(), "JPEG", progressive=True)[:1500], "unreadable", "cut off|truncated"),
    "half a PNG": (encode(noise(), "PNG")[:4000], "unreadable", "cut off|truncated"),
    "half a WebP": (encode(noise(), "WEBP")[:900], "unreadable", "cut off"),
    "half a GIF": (encode(noise("P"), "GIF")[:1500], "unreadable", "damaged"),
    "half a BMP": (encode(noise(), "BMP")[:4000], "unreadable", "cut off"),
    "a damaged checksum": (encode(noise(), "PNG").replace(b"IDAT", b"IDAU", 1), "unreadable", "damaged"),
    "30,000 x 30,000": (png_of_size(30_000, 30_000), "too-large", "decompression bomb.*MP"),
    "2 billion wide": (png_of_size(2**31 - 1, 1), "too-large", "decompression bomb"),
    "a bomb of 95 MP": (png_of_size(10_000, 9_500), "too-large", "decompression bomb"),
    "a bomb of 64 MP": (png_of_size(8_000, 8_000), "too-large", "decompression bomb.*64 MP.*allowed are 50 MP"),
    "a GIF that claims 60,000 x 60,000": (gif_of_size(60_000, 60_000), "too-large", "decompression bomb"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_with_its_cause_and_little_memory(case: str) -> None:
    data, reason, cause = REFUSED[case]
    tracemalloc.start()
    try:
        with pytest.raises(MediaError, match=f"(?s){cause}") as refused:
            open_image(data, place="upload 7")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (refused.value.reason, refused.value.place, refused.value.exit_code) == (reason, "upload 7", 4)
    assert refused.value.remedy
    assert peak < 8 * 2**20


CHANGED = {
    "CMYK": (encode(noise("CMYK"), "JPEG"), ("cmyk-to-rgb",)),
    "16-bit": (encode(Image.fromarray(np.full((8, 8), 40_000, np.uint16)), "PNG"), ("16-bit-to-8-bit",)),
    "animated GIF": (
        encode(noise("P"), "GIF", save_all=True, append_images=[noise("P").rotate(90)]),
        ("first-frame",),
    ),
    "transparent": (encode(Image.new("RGBA", (5, 5), (9, 9, 9, 0)), "PNG"), ("transparency-on-white",)),
    "one pixel": (encode(Image.new("RGB", (1, 1)), "PNG"), ()),
    "one pixel wide": (encode(Image.new("L", (1, 5000)), "PNG"), ()),
}


@pytest.mark.parametrize("case", CHANGED)
def test_it_is_used_and_what_was_changed_is_said(case: str) -> None:
    data, changes = CHANGED[case]
    decoded = open_image(data, place="x")
    assert decoded.image.mode == "RGB"
    assert decoded.changes == changes


def test_a_folder_of_bad_pictures_becomes_a_ledger_and_the_good_ones_go_on(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    for number in range(40):
        Image.new("RGB", (8, 8), (number * 5, 9, 9)).save(folder / f"good{number}.png")
        (folder / f"good{number}.txt").write_text(f"thing{number}")
    bad = {
        **{case: data for case, (data, _, _) in REFUSED.items()},
        **{case: data for case, (data, _) in CHANGED.items()},
    }
    for number, data in enumerate(bad.values()):
        (folder / f"bad{number:02d}.png").write_bytes(data)
        (folder / f"bad{number:02d}.txt").write_text(f"bad{number}")
    out = tmp_path / "01-data"
    out.mkdir()
    spec = Data.model_validate({"source": str(folder), "max_fault_rate": 0.5})
    spec.run(None, out, events=Events(None))
    reasons = {row["id"]: row.get("reason", "") for row in read_jsonl(out / "ledger.jsonl")}
    assert [reasons[f"bad{n:02d}.png"] for n in range(len(REFUSED))] == [reason for _, reason, _ in REFUSED.values()]
    fates = [reasons[f"bad{n:02d}.png"] for n in range(len(REFUSED), len(bad))]
    assert fates == ["+".join(changes) for _, changes in CHANGED.values()]
    with ShardReader(out / "shards", "train") as reader:
        for sample in reader:
            open_image(reader.media(sample.media()[0]), place=sample.id)
    with pytest.raises(DataError, match="are faulty"):
        spec.model_copy(update={"max_fault_rate": 0.1}).run(None, out, events=Events(None))


def dropped(out: Path) -> list[str]:
    return [row["reason"] for row in read_jsonl(out / "ledger.jsonl") if row["fate"] == "dropped"]


@pytest.mark.parametrize("trick", ["../secret.png", "/etc/passwd", "link.png", "folder/../../secret.png"])
def test_a_path_outside_the_root_is_refused(tmp_path: Path, trick: str) -> None:
    folder = tmp_path / "mine"
    (folder / "folder").mkdir(parents=True)
    Image.new("RGB", (3, 3)).save(tmp_path / "secret.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    lines = ["image,text", f"{trick},stolen"]
    for number in range(20):
        Image.new("RGB", (3, 3), (number, 0, 0)).save(folder / f"{number}.png")
        lines.append(f"{number}.png,thing{number}")
    (folder / "pairs.csv").write_text("\n".join(lines))
    out = tmp_path / "01-data"
    out.mkdir()
    Data.model_validate({"source": str(folder / "pairs.csv")}).run(None, out, events=Events(None))
    assert dropped(out) == ["outside-root"]
    allowed = {
        "kind": "pairs",
        "path": str(folder / "pairs.csv"),
        "root": "/" if trick.startswith("/") else str(tmp_path),
    }
    Data.model_validate({"source": allowed}).run(None, out, events=Events(None))
    assert dropped(out) == (["unreadable"] if trick.startswith("/") else [])
