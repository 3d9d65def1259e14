"""``plait list``: parts, one line each."""

import json

import pytest

from plait.cli.main import main

pytestmark = pytest.mark.light


def test_every_part_has_a_line_with_its_source(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    said = capsys.readouterr().out
    for name in ("vit", "swin", "whisper", "space-time", "llama", "qformer", "gated-cross-attention", "mfb", "m_rope"):
        (line,) = [line for line in said.splitlines() if line.startswith(f"  {name} ")]
        assert "https://" in line


def test_encoders_come_by_modality(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "encoders"]) == 0
    said = capsys.readouterr().out
    heads = [line for line in said.splitlines() if not line.startswith(" ")]
    assert [head.split(" (")[0] for head in heads] == [f"encoders of {m}" for m in ("image", "audio", "video", "text")]
    assert main(["list", "encoders", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["encoders"]
    assert {part["modality"] for part in found if part["name"] == "pretrained"} == {"image", "audio", "video", "text"}
    tower = next(s for part in found if part["name"] == "frames" for s in part["settings"] if s["name"] == "tower")
    assert tower["default"]["kind"] == "vit"


def test_all_fusions_come(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "fusions", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["fusions"]
    assert len(found["fusions"]) == 17
    gated = next(part for part in found["fusions"] if part["name"] == "gated")
    assert {"d_out", "tied", "sees", "bias"} == {setting["name"] for setting in gated["settings"]}


def test_one_kind_with_settings_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "connectors", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["connectors"]
    qformer = next(part for part in found["connectors"] if part["name"] == "qformer")
    queries = {"name": "queries", "default": 32, "about": "Tokens that come out, whatever the size of the picture."}
    assert queries in qformer["settings"]


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("optimizers", {"adamw", "sgd", "adafactor", "lion", "lars", "muon", "adamw-8bit"}),
        ("schedules", {"cosine", "linear", "constant", "polynomial", "inverse-sqrt", "wsd"}),
    ],
)
def test_what_a_model_may_be_trained_by(capsys: pytest.CaptureFixture[str], kind: str, names: set[str]) -> None:
    assert main(["list", kind, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)[kind]
    assert {part["name"] for part in found} == names
    assert all(part["about"] and part["source"].startswith("https://") for part in found)


def test_an_unknown_kind_is_an_error_of_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "things"]) == 2
    assert "encoders" in capsys.readouterr().err


def test_shipped_recipes_come_with_what_they_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "recipes", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["recipes"]
    assert {"quickstart", "simclr", "compose-blip2"} <= {part["name"] for part in found}
    assert all(part["about"] for part in found)
