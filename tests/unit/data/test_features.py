"""The feature cache: computed once, kept exactly, mended when damaged, resumed when killed."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from plait.core import mesh
from plait.core.errors import DataError, NumericsError, ResourceError, UsageError
from plait.core.events import Events
from plait.core.files import lock
from plait.core.tensors import Patches
from plait.core.types import MediaRef
from plait.data import features
from plait.data.features import Fill, FreshFeatures, cached_features
from plait.data.media import encode_png


class Halver:
    """Means over 2 x 2 pixels, times ``scale``; counts what it was given."""

    d_out = 3

    def __init__(self, dtype=torch.bfloat16, scale: float = 1.0) -> None:
        self.dtype, self.scale, self.seen = dtype, scale, 0

    def __call__(self, media: Patches) -> Patches:
        self.seen += len(media.grid)
        start, parts = 0, []
        for f, h, w in media.grid.tolist():
            picture = media.values[start : start + f * h * w].view(f, h // 2, 2, w // 2, 2, 3)
            parts.append(picture.mean((2, 4)).view(-1, 3))
            start += f * h * w
        return Patches(values=(torch.cat(parts) * self.scale).to(self.dtype), grid=self.grid_out(media.grid))

    def grid_out(self, grid):
        return grid // torch.tensor([1, 2, 2])


class Album:
    """Pictures of many sizes in memory."""

    def __init__(self, count: int, *, repeat: int = 0) -> None:
        self.data = {}
        self.refs = []
        for i in range(count):
            rng = np.random.default_rng(i)
            size = (2 * (1 + i % 3), 2 * (1 + i % 2))
            data = encode_png(Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)))
            sha256 = hashlib.sha256(data).hexdigest()
            self.data[sha256] = data
            self.refs.append(MediaRef(modality="image", sha256=sha256, uri=f"train-000.tar#{i}.png"))
        self.refs += self.refs[:repeat]

    def read(self, ref: MediaRef) -> bytes:
        return self.data[ref.sha256]

    def pixels(self, ref: MediaRef) -> Patches:
        return prepare(Image.open(io.BytesIO(self.read(ref))))


def prepare(picture: Image.Image) -> Patches:
    values = torch.from_numpy(np.array(picture)).float().view(-1, 3) / 255
    return Patches(values=values, grid=torch.tensor([[1, picture.height, picture.width]]))


def fill(album: Album, folder, encoder, *, events=None, key="k" * 64, chunk_items=4):
    return cached_features(
        album.refs,
        read=album.read,
        prepare=prepare,
        encoder=encoder,
        key=key,
        folder=folder,
        events=events or Events(),
        chunk_items=chunk_items,
    )


def chunks(folder, key="k" * 64):
    return sorted((folder / key[:16]).glob("*.safetensors"))


@settings(max_examples=15, deadline=None)
@given(count=st.integers(1, 11), chunk_items=st.integers(1, 5), order=st.lists(st.integers(0, 10), max_size=8))
def test_what_comes_out_is_what_the_encoder_gives(tmp_path_factory, count, chunk_items, order):
    album, encoder = Album(count), Halver()
    store = fill(album, tmp_path_factory.mktemp("cache"), encoder, chunk_items=chunk_items)
    wanted = [album.refs[i % count] for i in order]
    out = store([ref.sha256 for ref in wanted])
    parts = [encoder(album.pixels(ref)) for ref in wanted]
    assert out.values.dtype == torch.bfloat16
    assert out.grid.tolist() == [p.grid[0].tolist() for p in parts]
    assert out.values.equal(torch.cat([p.values for p in parts]) if parts else torch.zeros(0, 3).bfloat16())


def test_a_cache_goes_to_another_process_by_the_names_of_its_files(tmp_path):
    album = Album(7)
    store = fill(album, tmp_path, Halver())
    names = [ref.sha256 for ref in album.refs]
    sent = ForkingPickler.dumps(store)
    again = ForkingPickler.loads(sent)
    assert again(names).values.equal(store(names).values)
    assert again(names).grid.equal(store(names).grid)
    assert str(again.fill) == str(store.fill)
    for path in chunks(tmp_path):
        path.unlink()
    with pytest.raises(FileNotFoundError):
        ForkingPickler.loads(sent)
    fresh = FreshFeatures(album.refs, read=album.read, prepare=prepare, encoder=Halver())
    with pytest.raises(TypeError, match="need the encoder"):
        ForkingPickler.dumps(fresh)


@pytest.mark.row("S4-64")
@settings(max_examples=15, deadline=None)
@given(count=st.integers(1, 9), order=st.lists(st.integers(0, 8), max_size=8))
def test_encoded_anew_each_time_they_are_what_the_cache_keeps(tmp_path_factory, count, order):
    album = Album(count)
    store = fill(album, tmp_path_factory.mktemp("cache"), Halver())
    fresh = FreshFeatures(album.refs, read=album.read, prepare=prepare, encoder=(again := Halver()))
    wanted = [album.refs[i % count].sha256 for i in order]
    for _ in range(2):
        kept, now = store(wanted), fresh(wanted)
        assert now.values.equal(kept.values)
        assert now.grid.equal(kept.grid)
    assert again.seen == 2 * len(set(wanted))  # each once a call
    assert len(fresh) == count
    assert album.refs[0].sha256 in fresh
    assert fresh.one_each(wanted).values.equal(kept.values)
    with pytest.raises(DataError, match="1 of 1 items are unknown"):
        fresh(["0" * 64])


def test_pictures_as_large_as_the_data_stage_may_be_told_to_take_are_encoded(tmp_path):
    """51 megapixels: above the default limit, below the largest setting of ``data.source.max_megapixels``."""
    album = Album(0)
    data = encode_png(Image.new("1", (8500, 6000)))
    album.refs.append(MediaRef(modality="image", sha256=hashlib.sha256(data).hexdigest(), uri="large.png"))
    album.data[album.refs[0].sha256] = data
    store = cached_features(
        album.refs,
        read=album.read,
        prepare=lambda picture: prepare(picture.resize((4, 2))),
        encoder=Halver(),
        key="k" * 64,
        folder=tmp_path,
        events=Events(),
    )
    assert len(store) == 1


@pytest.mark.row("S4-08")
def test_each_picture_is_computed_once_over_all_runs(tmp_path):
    encoder = Halver()
    store = fill(Album(10, repeat=3), tmp_path, encoder)
    assert encoder.seen == 10
    assert (store.fill.computed, store.fill.reused, store.fill.duplicates) == (10, 0, 3)
    store = fill(Album(12), tmp_path, encoder)
    assert encoder.seen == 12, "only the two new ones"
    assert (store.fill.computed, store.fill.reused, store.fill.duplicates) == (2, 10, 0)
    assert len(store) == 12
    fill(Album(12), tmp_path, encoder, key="other" * 10)
    assert encoder.seen == 24, "another encoder shares nothing"


def test_float32_is_kept_in_float16_and_16_bits_as_they_are(tmp_path):
    album = Album(5)
    names = [ref.sha256 for ref in album.refs]
    exact = torch.cat([Halver(torch.float32)(album.pixels(ref)).values for ref in album.refs])
    single = fill(album, tmp_path, Halver(torch.float32), key="a" * 20)(names).values
    assert single.dtype == torch.float16
    assert ((single.float() - exact).abs() <= exact.abs() * 2**-11).all()
    assert fill(album, tmp_path, Halver(torch.bfloat16), key="b" * 20)(names).values.equal(exact.bfloat16())


def test_progress_and_one_closing_note_with_break_even(tmp_path):
    seen = []
    fill(Album(10), tmp_path, Halver(), events=Events(listeners=(seen.append,)))
    progress = [(e.fields["done"], e.fields["total"]) for e in seen if e.kind == "progress"]
    assert progress == [(4, 10), (8, 10), (10, 10)]
    (note,) = [e for e in seen if e.kind == "note"]
    assert note.text.startswith("features: 10 computed, 0 reused, 0 duplicates; ")
    assert note.fields["computed"] == 10


def test_break_even():
    costs = {"computed": 100, "reused": 0, "duplicates": 0, "bytes": 2**20}
    pays = Fill(**costs, seconds=10.0, read_seconds=2.0)
    assert pays.items_per_s == 10
    assert pays.break_even_epochs == 10 / 8  # 10 + 2 e = 10 e
    assert "saves 8.0 s an epoch, pays off after 1.25 epochs" in str(pays)
    never = Fill(**costs, seconds=1.0, read_seconds=2.0)
    assert never.break_even_epochs == float("inf")
    assert "does not pay" in str(never)


# --- damage --------------------------------------------------------------------------------------------------------


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [flip, truncate, os.unlink])
def test_a_damaged_chunk_is_said_and_only_its_items_are_computed_again(tmp_path, damage):
    album, encoder, seen = Album(10), Halver(), []
    names = [ref.sha256 for ref in album.refs]
    whole = fill(album, tmp_path, encoder)(names).values.clone()
    damage(chunks(tmp_path)[1])
    store = fill(album, tmp_path, encoder, events=Events(listeners=(seen.append,)))
    assert encoder.seen == 14
    assert store(names).values.equal(whole)
    (warning,) = [e.text for e in seen if e.kind == "warning"]
    assert "chunk-00001.safetensors" in warning
    assert "4 items" in warning
    fill(album, tmp_path, encoder)
    assert encoder.seen == 14, "mended for good"


@pytest.mark.parametrize("content", ["", "{", '{"format": 0}', "[]"])
def test_a_damaged_index_starts_over_and_says_so(tmp_path, content):
    album, encoder, seen = Album(6), Halver(), []
    fill(album, tmp_path, encoder)
    (tmp_path / ("k" * 16) / "index.json").write_text(content)
    store = fill(album, tmp_path, encoder, events=Events(listeners=(seen.append,)))
    assert (encoder.seen, len(store)) == (12, 6)
    assert sum(e.kind == "warning" for e in seen) == 1
    assert len(chunks(tmp_path)) == 2, "files of the old index are gone"


def test_bytes_that_are_not_what_their_digest_says_are_refused(tmp_path):
    album = Album(3)
    album.data[album.refs[1].sha256] = album.data[album.refs[0].sha256]
    with pytest.raises(DataError, match="not what it was") as caught:
        fill(album, tmp_path, Halver())
    assert caught.value.place == "train-000.tar#1.png"


def test_features_that_16_bits_cannot_hold_are_refused_by_name(tmp_path):
    class Bursts(Halver):
        def __call__(self, media):
            out = super().__call__(media)
            out.values[int(out.grid[0].prod()) :] *= 1e6  # all items but the first
            return out

    with pytest.raises(
        NumericsError, match=r"not finite in torch\.float16; the encoder's largest is \d.*e\+05"
    ) as caught:
        fill(Album(3), tmp_path, Bursts(torch.float32))
    assert caught.value.place == "train-000.tar#1.png"
    assert chunks(tmp_path) == []


def test_an_encoder_whose_account_is_wrong_is_caught(tmp_path):
    encoder = Halver()
    encoder.grid_out = lambda grid: grid
    with pytest.raises(DataError, match="grid_out"):
        fill(Album(2), tmp_path, encoder)


def test_a_picture_that_was_not_handed_in_is_named(tmp_path):
    store = fill(Album(2), tmp_path, Halver())
    with pytest.raises(DataError, match="1 of 2 items have no cached features; the first is ffffffffffff"):
        store([Album(2).refs[0].sha256, "f" * 64])


def test_a_cache_in_use_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "_LOOK_EVERY_S", 0.01)
    place = tmp_path / ("k" * 16)
    place.mkdir()
    seen = []
    with ExitStack() as other:
        other.enter_context(lock(place))

        def listener(event):
            seen.append(event)
            if sum(e.kind == "progress" for e in seen) == 3:
                other.close()  # the other run is done

        store = fill(Album(2), tmp_path, Halver(), events=Events(listeners=(listener,)))
    assert len(store) == 2
    notes = [e.text for e in seen if e.kind == "note"]
    assert len(notes) == 2, "said once, then what filling took"
    assert notes[0].startswith(f"the feature cache is being filled by process {os.getpid()} on ")


def test_waiting_for_a_cache_ends_with_an_error_that_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "_LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(features, "_PATIENCE_S", 0.03)
    (tmp_path / ("k" * 16)).mkdir()
    with lock(tmp_path / ("k" * 16)), pytest.raises(ResourceError, match="feature cache is still in use by process"):
        fill(Album(2), tmp_path, Halver())


def test_a_usage_error_of_the_work_itself_is_not_waited_out(tmp_path):
    def refuse(ref):
        raise UsageError("mine")

    album = Album(2)
    album.read = refuse
    with pytest.raises(UsageError, match="mine"):
        fill(album, tmp_path, Halver())


def test_temporary_files_of_killed_writers_are_swept(tmp_path):
    fill(Album(2), tmp_path, Halver())
    stray = tmp_path / ("k" * 16) / ".chunk-00001.safetensors.12345.tmp"
    stray.write_bytes(b"half")
    fill(Album(2), tmp_path, Halver())
    assert not stray.exists()


def test_another_process_only_reads_what_the_first_one_made(tmp_path, monkeypatch):
    album = Album(5)
    made = fill(album, tmp_path, Halver())
    monkeypatch.setattr(mesh, "rank", lambda: 1)
    place = tmp_path / ("k" * 16)
    (place / ".chunk-00009.safetensors.12345.tmp").write_bytes(b"of a run that writes now")
    encoder = Halver()
    with lock(place):
        read = fill(album, tmp_path, encoder)
    assert read.fill.computed == encoder.seen == 0
    assert (place / ".chunk-00009.safetensors.12345.tmp").exists()
    names = [ref.sha256 for ref in album.refs]
    assert torch.equal(read(names).values, made(names).values)
    (place / "index.json").unlink()  # its disk is another one: it computes, too
    assert fill(album, tmp_path, encoder).fill.computed == 5


def test_few_items_say_nothing_about_what_the_cache_saves():
    costs = {"duplicates": 0, "bytes": 2**20, "seconds": 10.0, "read_seconds": 2.0}
    assert "pays off" not in str(Fill(computed=60, reused=3, **costs))
    assert "pays off" in str(Fill(computed=60, reused=4, **costs))


KILLED = """
import importlib.util, os, pathlib, signal, sys
spec = importlib.util.spec_from_file_location("album", sys.argv[1])
tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tests)

class Dies(tests.Halver):
    def __call__(self, media):
        if self.seen >= 8:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(media)

tests.fill(tests.Album(10), pathlib.Path(sys.argv[2]), Dies())
"""


def test_killed_halfway_the_finished_chunks_are_kept(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", KILLED, __file__, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == -signal.SIGKILL, result.stderr
    index = json.loads((tmp_path / ("k" * 16) / "index.json").read_text())
    assert [len(c["items"]) for c in index["chunks"]] == [4, 4]
    encoder = Halver()
    store = fill(Album(10), tmp_path, encoder)
    assert (encoder.seen, store.fill.reused) == (2, 8)
    fresh = fill(Album(10), tmp_path / "fresh", Halver())
    names = [ref.sha256 for ref in Album(10).refs]
    assert store(names).values.equal(fresh(names).values)


def test_a_file_without_its_line_in_the_index_is_not_trusted(tmp_path):
    """Killed between the file and the index: the file is removed and its items are computed again."""
    album, encoder = Album(4), Halver()
    fill(album, tmp_path, encoder)
    path = chunks(tmp_path)[0]
    stray = path.with_name("chunk-00001.safetensors")
    stray.write_bytes(path.read_bytes())
    store = fill(Album(6), tmp_path, encoder)
    assert (encoder.seen, len(store)) == (6, 6)
    assert [p.name for p in chunks(tmp_path)] == ["chunk-00000.safetensors", "chunk-00001.safetensors"]
    assert store([Album(6).refs[5].sha256]).grid.tolist() == [[1, 3, 2]]


# --- pictures of several items -------------------------------------------------------------------------------------


def overview_and_whole(picture: Image.Image) -> Patches:
    """Two items where a picture has more than one row of 2 x 2 pixels; else one."""
    small = prepare(picture.resize((2, 2)))
    if picture.height == 2:
        return small
    whole = prepare(picture)
    return Patches(values=torch.cat([small.values, whole.values]), grid=torch.cat([small.grid, whole.grid]))


def test_pictures_of_one_item_and_of_several_come_back_as_they_are(tmp_path):
    album, encoder = Album(7), Halver()
    parts = {"read": album.read, "prepare": overview_and_whole, "encoder": encoder, "key": "k" * 64}
    names = [ref.sha256 for ref in album.refs]
    for _ in range(2):  # computed, then read back
        store = cached_features(album.refs, **parts, folder=tmp_path, events=Events(), chunk_items=3)
        wanted = {name: encoder(overview_and_whole(Image.open(io.BytesIO(album.data[name])))) for name in names}
        counts = {len(media.grid) for media in wanted.values()}
        assert counts == {1, 2}
        for name in names:
            assert store([name]).grid.tolist() == wanted[name].grid.tolist()
            assert store([name]).values.equal(wanted[name].values)
        chosen = [names[4], names[0], names[4]]
        assert store(chosen).values.equal(torch.cat([wanted[name].values for name in chosen]))
        assert store(chosen).grid.equal(torch.cat([wanted[name].grid for name in chosen]))
    assert store.fill.computed == 0
    one = [name for name in names if len(wanted[name].grid) == 1]
    assert len(store.one_each(one).grid) == len(one)
    several = next(name for name in names if len(wanted[name].grid) == 2)
    with pytest.raises(DataError, match="the picture is 2 items") as caught:
        store.one_each([*one, several])
    assert several[:12] in caught.value.place


def test_a_feature_that_is_not_finite_names_its_picture_among_pictures_of_several_items(tmp_path):
    album = Album(6)
    last = album.refs[-1].sha256

    class Broken(Halver):
        def __call__(self, media):
            found = super().__call__(media)
            found.values[-1] = float("inf")
            return found

    parts = {"read": album.read, "prepare": overview_and_whole, "encoder": Broken(), "key": "k" * 64}
    with pytest.raises(NumericsError) as caught:
        cached_features(album.refs, **parts, folder=tmp_path, events=Events())
    assert caught.value.place == next(ref.uri for ref in album.refs if ref.sha256 == last)
