"""The study of position codes: its questions, its codes at other sizes, its figures, and the command."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from plait.cli.main import main
from plait.core.errors import ConfigError
from plait.core.events import Event, Events
from plait.core.files import read_done, read_json
from plait.models.position.absolute import SinCosGrid
from plait.models.transformer import TransformerSizes
from plait.studies.placing.codes import Width, grid_code, sequence_code
from plait.studies.placing.reader import Reader, Training, answers, train
from plait.studies.placing.tables import markdown
from plait.studies.placing.tasks import COLORS, SKIP, grid_task, sequence_task
from plait.studies.placing.topology import topology
from plait.studies.positions import Grids, Positions, Sequences

ROOT = Path(__file__).parents[3]
WIDTH = Width(d=32, heads=4)
SIZES = TransformerSizes(d=32, depth=2, heads=4, d_ff=64)
SEQUENCES, GRIDS = Sequences.model_fields["codes"].default, Grids.model_fields["codes"].default


def tiny(**given_: object) -> Positions:
    return Positions(
        **{
            "seeds": 2,
            "rows": 8,
            "workers": 1,
            "sequence": Sequences(codes=("none", "learned"), length=8, steps=2, times=(1, 2)),
            "grid": Grids(codes=("bias", "learned-2d"), side=4, steps=2),
            **given_,
        }
    )


# --- questions -------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(length=st.integers(6, 40), offset=st.integers(1, 3), seed=st.integers(0, 99))
def test_sequences_are_asked_what_stands_in_them(length: int, offset: int, seed: int) -> None:
    task = sequence_task(words=5, offset=offset)
    ids, targets = task.draw(3, (length,), torch.Generator().manual_seed(seed))
    for row, near, far in zip(ids.tolist(), targets["near"].tolist(), targets["far"].tolist(), strict=True):
        assert row.count(5) == 1
        marker = row.index(5)
        for t in range(length):
            seen = t >= offset and row[t - offset] != 5
            assert near[t] == (row[t - offset] if seen else SKIP)
            assert far[t] == (row[marker + 1] if t > marker + 1 else SKIP)
        assert far[-1] != SKIP


@settings(deadline=None, max_examples=30)
@given(side=st.sampled_from([2, 4, 6]), seed=st.integers(0, 99))
def test_grids_are_asked_what_stands_in_them(side: int, seed: int) -> None:
    task = grid_task()
    ids, targets = task.draw(9, (side, side), torch.Generator().manual_seed(seed))
    assert ids.shape == (9, 1 + side * side)
    for number, row in enumerate(ids.tolist()):
        cells = row[1:]
        assert sum(cell > 0 for cell in cells) == 2
        (a,) = (i for i, cell in enumerate(cells) if 1 <= cell <= COLORS)
        (b,) = (i for i, cell in enumerate(cells) if cell > COLORS)
        assert a % side != b % side
        right = {
            "color": cells[a] - 1,
            "quadrant": COLORS + 2 * (a // side >= side // 2) + (a % side >= side // 2),
            "left": COLORS + 4 + (a % side < b % side),
        }
        for question, target in targets.items():
            assert (target[number, 1:] == SKIP).all()
            asked = row[0] == 1 + 2 * COLORS + list(targets).index(question)
            assert int(target[number, 0]) == (right[question] if asked else SKIP)


def test_no_answer_is_more_likely_than_chance_says() -> None:
    _, targets = grid_task().draw(6000, (6, 6), torch.Generator().manual_seed(0))
    for question, chance in grid_task().chance.items():
        asked = targets[question][targets[question] != SKIP]
        most = asked.bincount().max() / len(asked)
        assert abs(float(most) - chance) < 0.035


# --- codes and readers -----------------------------------------------------------------------------------------------


@pytest.mark.row("S0-12")
@pytest.mark.parametrize("name", SEQUENCES)
def test_every_code_of_sequences_reads_longer_ones(name: str) -> None:
    torch.manual_seed(0)
    reader = Reader(SIZES, sequence_code(name, WIDTH, length=8), sequence_task(words=5, offset=2))
    found = answers(reader, (32,), rows=5, seed=0)
    assert len(found["far"]) == 5
    assert 0 < len(found["near"]) <= 5 * 8
    # Nothing later is seen: an answer at one token is the same when the rest is cut off.
    fitted, ids = reader.fitted((32,)), torch.randint(5, (2, 32))
    whole = fitted(ids, fitted.places((32,)), (32,))["near"][:, :8]
    short = reader(ids[:, :8], reader.places((8,)), (8,))["near"]
    if name != "learned":  # whose table is stretched
        torch.testing.assert_close(whole, short, atol=1e-4, rtol=0)


@pytest.mark.row("S0-12")
@pytest.mark.parametrize("name", GRIDS)
def test_every_code_of_grids_reads_larger_ones_and_only_none_forgets_the_order(name: str) -> None:
    torch.manual_seed(0)
    reader = Reader(SIZES, grid_code(name, WIDTH, side=4), grid_task()).eval()
    for weight in reader.code.parameters():
        torch.nn.init.normal_(weight)
    for block in reader.transformer.blocks:
        for weight in () if block.attention.relative is None else block.attention.relative.parameters():
            torch.nn.init.normal_(weight)
    assert {q: len(right) for q, right in answers(reader, (8, 8), rows=6, seed=0).items()} == dict.fromkeys(
        ("color", "quadrant", "left"), 6
    )
    fitted = reader.fitted((8, 8))
    ids, _ = grid_task().draw(3, (8, 8), torch.Generator().manual_seed(0))
    moved = torch.cat([ids[:, :1], ids[:, 1:].flip(1)], dim=1)
    said, after = (fitted(x, fitted.places((8, 8)), (8, 8))["left"][:, 0] for x in (ids, moved))
    assert torch.allclose(said, after, atol=1e-4) == (name == "none")


def test_names_that_are_no_codes() -> None:
    with pytest.raises(ConfigError, match="no position code 'rop'"):
        sequence_code("rop", WIDTH, length=8)
    with pytest.raises(ConfigError, match="no position code 'rope'"):
        grid_code("rope", WIDTH, side=4)


@pytest.mark.row("S0-C11")
def test_without_a_code_relations_stay_at_chance_and_colors_do_not() -> None:
    """What the whole study says of `none` and of one code, in seconds: 2 x 2 grids, where A and B differ in columns."""
    found = {}
    for name, steps in (("none", 80), ("learned-2d", 160)):
        torch.manual_seed(0)
        reader = Reader(SIZES, grid_code(name, WIDTH, side=2), grid_task())
        train(reader, (2, 2), Training(steps=steps, batch=32, lr=1e-2), seed=0)
        found[name] = {q: sum(r) / len(r) for q, r in answers(reader, (2, 2), rows=200, seed=1).items()}
    assert found["none"]["color"] > 0.95
    assert abs(found["none"]["left"] - 0.5) < 0.15
    assert abs(found["none"]["quadrant"] - 0.25) < 0.15
    assert min(found["learned-2d"].values()) > 0.9


# --- topology --------------------------------------------------------------------------------------------------------


@pytest.mark.row("S0-13")
def test_coordinates_keep_everything_and_noise_keeps_nothing() -> None:
    at = torch.cartesian_prod(torch.arange(10.0), torch.arange(10.0))
    itself = topology(at, rows=10, columns=10, penalty=1e-9)
    assert itself.spearman == pytest.approx(1)
    assert min(itself.row, itself.column, itself.direction) > 0.999
    torch.manual_seed(0)
    noise = topology(torch.randn(100, 16), rows=10, columns=10)
    assert abs(noise.spearman) < 0.1
    assert max(noise.row, noise.column) < 0.3
    assert abs(noise.direction - 0.5) < 0.15
    rows_only = topology(torch.cat([at[:, :1], torch.zeros(100, 1)], dim=1), rows=10, columns=10)
    assert rows_only.row > 0.99
    assert rows_only.column < 0.01


@pytest.mark.row("S0-13")
def test_sines_of_a_grid_keep_its_topology() -> None:
    found = topology(SinCosGrid(64)(14, 14), rows=14, columns=14)
    assert found.spearman > 0.6
    assert min(found.row, found.column) > 0.99
    assert found.direction > 0.99


# --- the study -------------------------------------------------------------------------------------------------------


@pytest.mark.row("S0-12")
@pytest.mark.row("S0-C09")
def test_a_run_publishes_every_score_with_its_settings(tmp_path: Path) -> None:
    study, seen = tiny(), list[Event]()
    found = study.run(tmp_path, events=Events(None, listeners=(seen.append,)))
    assert read_json(tmp_path / "results.json") == json.loads(json.dumps(found))
    assert Positions(**found["spec"]) == study
    assert found["trained"] == 8
    assert len(found["scores"]) == 2 * (2 * 2) + 2 * (3 * 2)
    for score in found["scores"]:
        assert len(score["seeds"]) == 2
        assert score["low"] <= score["value"] <= score["high"]
        assert score["value"] == pytest.approx(sum(score["seeds"]) / 2)
    tables = (tmp_path / "results.md").read_text()
    assert "far, 16" in tables
    assert "left, 8x8" in tables
    assert "learned-2d, trained, seed 1" in tables
    assert read_done(tmp_path) is not None
    assert [e.fields["done"] for e in seen if e.kind == "progress"] == list(range(1, 9))


def test_results_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    folders = [tmp_path / str(workers) for workers in (1, 2)]
    scores = []
    for workers, folder in enumerate(folders, 1):
        folder.mkdir()
        study = tiny(
            workers=workers, sequence=Sequences(codes=("t5",), length=8, steps=3, times=(1,)), grid=Grids(codes=())
        )
        scores.append(study.run(folder, events=Events())["scores"])
    assert scores[0] == scores[1]


def test_a_training_that_diverges_is_said(tmp_path: Path) -> None:
    seen: list[Event] = []
    study = tiny(lr=1e30, sequence=Sequences(codes=("none",), length=8, steps=8), grid=Grids(codes=()))
    study.run(tmp_path, events=Events(None, listeners=(seen.append,)))
    assert next(e.text for e in seen if e.kind == "warning").startswith("none on sequence diverged with seed 0")


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ValidationError, match="offset 5 is more than half of length 8"):
        Sequences(length=8, offset=5)
    with pytest.raises(ValidationError, match="no multiple of 4 each"):
        Positions(d=24, heads=4)
    with pytest.raises(ValidationError, match="seeds"):
        Positions(seeds=1)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = ["seeds=2", "rows=4", "workers=1", "sequence.steps=1", "sequence.codes=[rope]", "grid.codes=[]"]
    assert main(["study", "positions", *quick, "--runs", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "| rope " in said
    folder = tmp_path / "positions-0001"
    assert "seeds: 2" in (folder / "study.yaml").read_text()
    assert read_json(folder / "env.json")["versions"]["torch"]
    assert main(["study", "positions", *quick, "--runs", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["folder"].endswith("positions-0002")
    assert main(["study", "positions", "sequence.step=1", "--runs", str(tmp_path)]) == 3
    assert "sequence.steps" in capsys.readouterr().err
    assert main(["study", "no-such-study"]) == 2


# --- what was published ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published() -> dict[str, Any]:
    return read_json(ROOT / "benchmarks" / "results" / "positions.json")


@pytest.mark.row("S0-C09")
@pytest.mark.row("S0-C10")
def test_the_page_shows_the_published_results_of_todays_defaults(published: dict[str, Any]) -> None:
    assert Positions(**published["spec"]) == Positions()
    page = (ROOT / "docs" / "positions.md").read_text(encoding="utf-8")
    for part in markdown(published).split("\n\n"):
        assert part.strip() in page


@pytest.mark.row("S0-C11")
def test_published_without_a_code_places_are_at_chance(published: dict[str, Any]) -> None:
    scores = {(s["code"], s["question"]): s for s in published["scores"] if s["family"] == "grid" and s["times"] == 1}
    for question in ("quadrant", "left"):
        assert scores["none", question]["low"] <= scores["none", question]["chance"] <= scores["none", question]["high"]
    assert all(scores[code, "color"]["value"] > 0.95 for code in GRIDS)
