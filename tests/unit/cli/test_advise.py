"""``plait advise encoder``: the answer for a person and as JSON."""

import json
import sys
from pathlib import Path

import pytest

from plait.cli.main import main
from plait.models import advise, specs


@pytest.fixture(autouse=True)
def _two_small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small = (
        ("vit", specs.ViT(patch=8, d=16, depth=1, heads=2), "attention", 70.0, "https://example.org/vit"),
        ("resnet", specs.ResNet(depth=18, width=8), "convolutions", 60.0, "https://example.org/resnet"),
    )
    monkeypatch.setattr(advise, "_SCRATCH", small)
    monkeypatch.setenv("PLAIT_HOME", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.row("S0-06")
def test_the_answer_has_figures_reasons_and_sources(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["advise", "encoder", "--size", "32", "--task", "dense", "--train-pictures", "500", "--memory-mib", "2"]
    assert main([*words, "--seconds", "2"]) == 0
    said = capsys.readouterr().out
    assert "over a limit\n  resnet:" in said
    assert "MiB, the limit is 2" in said
    assert "https://arxiv.org/abs/2010.11929" in said
    assert "torch" in said.splitlines()[-1]
    assert "plait data fetch efficientnet-lite0" in said
    (row,) = [line for line in said.splitlines() if line.startswith("1  vit")]
    assert "70.0" in row


def test_as_json(capsys: pytest.CaptureFixture[str], tiny_folders: dict[str, Path]) -> None:
    words = [
        "advise",
        "encoder",
        "--size",
        "32",
        "--seconds",
        "2",
        "--pretrained",
        str(tiny_folders["image"]),
        "--json",
    ]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in found["candidates"]][:2] == ["vit", "resnet"]
    assert found["candidates"][2]["pretrained"] is True
    assert found["candidates"][0]["ms_per_picture"]["rounds"] >= 1
    assert found["candidates"][0]["cost"]["tokens"] == 16
    assert found["machine"]["torch"]
    assert found["need"]["train_pictures"] is None
    assert len(found["rules"]) == 2


@pytest.mark.parametrize(
    ("flag", "value"), [("--size", "0"), ("--batch", "-1"), ("--latency-ms", "nan"), ("--latency-ms", "0")]
)
def test_numbers_that_mean_nothing_are_refused(flag: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["advise", "encoder", flag, value]) == 2
    assert f"{flag} is" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [("--size", "100000"), ("--size", "64", "--batch", "100000000")])
def test_pictures_that_no_memory_holds_are_refused(flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["advise", "encoder", *flags]) == 2
    assert "measured are at most 67,108,864" in capsys.readouterr().err


def test_other_parts_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["advise", "decoder"]) == 2
    assert main(["advise", "encoder", "--modality", "audio"]) == 2
    assert "image" in capsys.readouterr().err


def test_a_folder_that_is_none_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["advise", "encoder", "--size", "32", "--pretrained", "nowhere"]) == 3
    assert "nowhere" in capsys.readouterr().err


def test_on_a_terminal_it_asks_for_what_is_open(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = iter(["dense", "", "2", "500"])
    monkeypatch.setattr("builtins.input", lambda _: next(answers))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["advise", "encoder", "--size", "32", "--seconds", "1"]) == 0
    assert "dense tasks" in capsys.readouterr().out
    monkeypatch.setattr("builtins.input", lambda _: "many")
    assert main(["advise", "encoder", "--size", "32"]) == 2
    assert "'many' is no number" in capsys.readouterr().err

    def ended(_: str) -> str:
        raise EOFError

    monkeypatch.setattr("builtins.input", ended)
    assert main(["advise", "encoder", "--size", "16", "--seconds", "1"]) == 0
    assert "efficientnet-lite0 with its weights is left out: " in capsys.readouterr().out


def test_without_a_terminal_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: str) -> str:
        raise AssertionError("asked")

    monkeypatch.setattr("builtins.input", refuse)
    assert main(["advise", "encoder", "--size", "32", "--seconds", "1"]) == 0
