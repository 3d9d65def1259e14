"""Every pair of parts, composed: `make matrix` walks the whole product."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from tests.matrix.cases import (
    CONNECTORS,
    DECODERS,
    SCRATCH,
    SOUNDS,
    VIDEOS,
    Case,
    cover,
    encoders,
    folder_of,
    pairwise,
    product,
    settings,
)
from tests.matrix.walk import walk
from tests.tiny_towers import TinyTowers

RECORD = Path(__file__).parents[2] / "docs" / "matrix.json"


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> TinyTowers:
    """Folders of tiny towers."""
    return TinyTowers(tmp_path_factory.mktemp("towers"))


@pytest.mark.row("S2-09", "S2-11", "S4-44")
@pytest.mark.parametrize("case", pairwise(), ids=str)
def test_any_encoder_connector_and_decoder_compose(
    case: Case, towers: TinyTowers, tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    name = folder_of(case.encoder)
    walk(
        settings(case, tower=towers.folder(name) if name else None, decoder=tiny_folders["decoder"]), tmp_path / "model"
    )


def test_every_two_parts_meet_in_few_cases() -> None:
    found = pairwise()
    assert len(found) <= 150
    axes = (encoders(short=True), tuple(CONNECTORS), tuple(DECODERS))
    for i, j in itertools.combinations(range(3), 2):
        assert {(case[i], case[j]) for case in found} == set(itertools.product(axes[i], axes[j]))
    assert cover([("a", "b"), ("c", "d")]) != cover([("a", "b"), ("c",)])


def test_every_kind_is_in_the_matrix() -> None:
    from plait.cli.list import catalogue

    parts = (*SCRATCH.values(), *SOUNDS.values(), *VIDEOS.values(), *CONNECTORS.values(), *DECODERS.values())
    kinds = {part["kind"] for part in parts}
    listed = catalogue()
    wanted = {part["name"] for part in (*listed["connectors"], *listed["decoders"])}
    wanted |= {part["name"] for part in listed["encoders"] if part["modality"] != "text"}
    assert kinds | {"pretrained"} == wanted


def test_the_record_of_the_whole_product_is_of_these_parts_and_holds() -> None:
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    walked = {Case(*row["case"]): row for row in record["cases"]}
    assert set(walked) == set(product()), "run `make matrix` again and commit docs/matrix.json"
    assert [str(case) for case, row in walked.items() if not row["holds"]] == []
