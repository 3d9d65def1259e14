"""Fewer pictures than processes: said with their number and what helps, before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from plait.core import mesh
from plait.core.errors import ConfigError
from plait.core.events import Events
from plait.stages.pretrain import Pretrain
from plait.stages.tune import Tune


def refused(stage: Tune | Pretrain, data: Path) -> ConfigError:
    folder = data.parent / "02-stage"
    folder.mkdir(exist_ok=True)
    with pytest.raises(ConfigError) as caught:
        stage.run(data, folder, events=Events())
    assert not list(folder.iterdir())
    return caught.value


def tune(folders: dict[str, Path], share: float) -> Tune:
    settings: dict[str, Any] = {
        "image_tower": str(folders["image"]),
        "resolution": 0,
        "views": 1,
        "decoder": str(folders["decoder"]),
        "dtype": "float32",
        "connector": {"d_hidden": 16, "tokens": 3, "free": 1},
        "words": {"batch_size": 64, "share": share},
        "adapt": {"rank": 2, "targets": ["q_proj"]},
        "batch_size": 64,
        "device": "cpu",
    }
    return Tune.model_validate(settings)


@pytest.mark.parametrize(
    ("processes", "share", "said", "more"),
    [(20, 0.5, "18 named pictures", "raise words.share above 0.5: 36 pictures have names"), (40, 1.0, "36 named", "")],
)
def test_named_pictures_of_the_first_phase_of_tune(
    data_stage: Path,
    tiny_folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    *,
    processes: int,
    share: float,
    said: str,
    more: str,
) -> None:
    monkeypatch.setattr(mesh, "world", lambda: processes)
    error = refused(tune(tiny_folders, share), data_stage)
    assert error.cause.startswith(said)
    assert f"for {processes} processes" in error.cause
    assert error.place == "stages.tune.words"
    assert f"start {said.split()[0]} processes or fewer" in error.remedy
    assert more in error.remedy
    assert ("words.share" in error.remedy) == bool(more)
    assert not (data_stage.parent / "home" / "features").exists(), "said before pictures are encoded"


def test_pairs_of_a_dual_encoder(
    data_stage: Path, tiny_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mesh, "world", lambda: 40)
    tower = {"kind": "vit", "size": 16, "patch": 8, "d": 16, "depth": 1, "heads": 2}
    settings = {"image_tower": tower, "text_tower": str(tiny_folders["text"]), "max_tokens": 16, "batch_size": 64}
    error = refused(Pretrain.model_validate(settings), data_stage)
    assert error.cause.startswith("36 training pairs for 40 processes")
    assert error.place == str(data_stage)
    assert "start 36 processes or fewer" in error.remedy
