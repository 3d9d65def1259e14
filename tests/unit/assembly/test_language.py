"""Decoders from local folders: what Plait cannot run as it was trained is refused, and not run otherwise."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from plait.assembly.language import load_language
from plait.core.errors import CheckpointError
from plait.core.files import read_json, write_json


@pytest.mark.parametrize("setting", ["final_logit_softcapping", "logit_scale", "logits_scaling"])
def test_a_decoder_that_changes_its_scores_after_the_head_is_refused(
    tiny_folders: dict[str, Path], tmp_path: Path, setting: str
) -> None:
    folder = tmp_path / "decoder"
    shutil.copytree(tiny_folders["decoder"], folder)
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", config | {setting: 1.0})
    load_language(str(folder), dtype="float32")
    write_json(folder / "config.json", config | {setting: 30.0})
    with pytest.raises(CheckpointError, match=setting) as caught:
        load_language(str(folder), dtype="float32")
    assert caught.value.place == str(folder)
