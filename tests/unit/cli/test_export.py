"""``plait export``: what it writes is said, what cannot be written is refused, nothing is overwritten."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from plait.assembly.multimodal import build_multimodal, save_multimodal
from plait.cli.main import main as plait
from plait.models import specs
from plait.models.composition import Connectors


@pytest.fixture
def model(tiny_model: Any, tmp_path: Path) -> Path:
    """The tiny model with LLaVA's connector."""
    torch.manual_seed(0)
    built = build_multimodal(
        tiny_model.towers, tiny_model.language, Connectors(image=specs.Mlp(norm=False)), decoder=tiny_model.decoder
    )
    folder = tmp_path / "model"
    folder.mkdir()
    save_multimodal(built, folder)
    return folder


def test_a_checkpoint_becomes_a_folder_of_transformers(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    assert plait(["export", str(model), "--to", "hf", str(tmp_path / "a")]) == 0
    out, err = capsys.readouterr()
    assert "LlavaForConditionalGeneration" in out
    assert "a picture is 16 tokens <image> (id 258)" in out
    assert "note: pictures that are not square" in out
    assert err.startswith("loading ")
    auto: Any = AutoModelForImageTextToText
    _, report = auto.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not any(report.values())
    assert AutoProcessor.from_pretrained(tmp_path / "a").image_token == "<image>"
    assert plait(["export", str(model), "--json", "--to", "hf", str(tmp_path / "b")]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["layout"], record["image_token_id"], record["merged"]) == ("LlavaForConditionalGeneration", 258, 0)
    assert len(record["notes"]) == 3


def test_what_cannot_be_written_is_refused(
    model: Path, tiny_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    assert plait(["export", str(model), "--to", "hf", str(tmp_path / "full")]) == 2
    assert "not empty" in capsys.readouterr().err
    words = tmp_path / "words"
    words.mkdir()
    save_multimodal(tiny_model, words)
    assert plait(["export", str(words), "--to", "hf", str(tmp_path / "c"), "--json"]) == 3
    fault = json.loads(capsys.readouterr().out)["error"]
    assert "connectors.image: found words, wanted mlp or linear" in fault["cause"]
    assert not (tmp_path / "c").exists()
    assert plait(["export", str(model), "--to", "hf", str(tmp_path / "d")]) == 0
    assert plait(["export", str(tmp_path / "d"), "--to", "hf", str(tmp_path / "e")]) == 2
    assert "already" in capsys.readouterr().err
    assert plait(["export", str(model), "--to", "onnx", str(tmp_path / "e")]) == 2
    assert plait(["export", str(model), str(tmp_path / "e")]) == 2
