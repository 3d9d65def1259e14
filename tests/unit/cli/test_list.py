"""``plait list``: parts, one line each."""

import json

import pytest

from plait.cli.main import main

pytestmark = pytest.mark.light


def test_every_part_has_a_line_with_its_source(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    said = capsys.readouterr().out
    for name in ("vit", "swin", "qformer", "gated-cross-attention", "rope", "m_rope"):
        (line,) = [line for line in said.splitlines() if line.startswith(f"  {name} ")]
        assert "https://" in line


def test_one_kind_with_settings_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "connectors", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["connectors"]
    qformer = next(part for part in found["connectors"] if part["name"] == "qformer")
    queries = {"name": "queries", "default": 32, "about": "Tokens that come out, whatever the size of the picture."}
    assert queries in qformer["settings"]


def test_an_unknown_kind_is_an_error_of_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "things"]) == 2
    assert "encoders" in capsys.readouterr().err
