"""Decoders from local folders: what Plait cannot run as it was trained is refused, and not run otherwise."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

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


def test_weights_that_are_missing_or_of_another_shape_are_never_drawn(
    tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "decoder"
    shutil.copytree(tiny_folders["decoder"], folder)
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = "model.layers.0.mlp.down_proj.weight"
    rest = {key: value for key, value in weights.items() if key != name}
    for given, said in ((rest, name), (rest | {name: torch.zeros(3, 3)}, r"down_proj.weight \(\[3, 3\] for \[")):
        save_file(given, path, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=f"1 (missing|of another shape): .*{said}"):
            load_language(str(folder), dtype="float32")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="no causal language model can be read"):
        load_language(str(folder), dtype="float32")
