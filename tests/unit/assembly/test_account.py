"""What `plait plan` says of a model is what the model has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from tests.matrix.cases import CONNECTORS, SOUNDS, VIDEOS, Case, folder_of, modality_of, settings
from tests.tiny_towers import TinyTowers

from plait.assembly.account import composition_account, heard
from plait.assembly.compose import compose
from plait.cli.main import main
from plait.core.types import MediaRef, Turn
from plait.models import audio_specs
from plait.models.composition import Composition
from plait.models.crossattend import plain


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> TinyTowers:
    """Folders of tiny towers."""
    return TinyTowers(tmp_path_factory.mktemp("towers"))


@pytest.mark.row("S2-09")
@pytest.mark.parametrize("connector", CONNECTORS)
@pytest.mark.parametrize("decoder", ["gpt2", "smollm2"])
def test_weights_and_tokens_are_those_of_the_built_model(
    connector: str, decoder: str, tiny_folders: dict[str, Path]
) -> None:
    given = settings(Case("vit", connector, decoder), tower=None, decoder=tiny_folders["decoder"])
    spec = Composition.model_validate(given)
    encoder, between, language = composition_account(spec, prompt=9)
    built = compose(spec)
    total = sum(weight.numel() for weight in built.model.parameters())
    mark = built.model.mark.numel() if built.model.inside else 0  # what stands for a picture in the text
    assert encoder.parameters + between.parameters + language.parameters == total - mark
    learn = sum(weight.numel() for weight in built.model.parameters() if weight.requires_grad)
    assert encoder.trainable + between.trainable + language.trainable == learn - mark
    assert (between.tokens, between.slots) == (built.tokens_per_picture, built.slots_per_picture)
    assert language.tokens == 9 + between.slots
    assert min(encoder.flops, language.flops) > 0


@pytest.mark.row("S2-09")
@pytest.mark.parametrize("connector", CONNECTORS)
@pytest.mark.parametrize("encoder", [*SOUNDS, *VIDEOS, "hf-whisper", "hf-wav2vec2", "hf-videomae"])
def test_sounds_and_videos_cost_what_the_built_model_has(
    encoder: str, connector: str, tiny_folders: dict[str, Path], towers: TinyTowers
) -> None:
    name = folder_of(encoder)
    tower = towers.folder(name) if name else None
    given = settings(Case(encoder, connector, "llama"), tower=tower, decoder=tiny_folders["decoder"])
    spec = Composition.model_validate(given)
    seconds = 0.4
    of, between, language = composition_account(spec, prompt=9, seconds=seconds)
    built = compose(spec)
    modality = modality_of(encoder)
    assert [part.part for part in (of, between)] == [f"{modality} encoder", f"{modality} connector"]
    mark = built.model.mark.numel() if built.model.inside else 0
    weights = list(built.model.parameters())
    assert of.parameters + between.parameters + language.parameters == sum(w.numel() for w in weights) - mark
    learn = sum(weight.numel() for weight in weights if weight.requires_grad)
    assert of.trainable + between.trainable + language.trainable == learn - mark
    # A video of many frames: so many as are looked at.
    ref = MediaRef(modality=modality, sha256="0", uri="", length=round(seconds * 16_000))
    (slots,) = built.template.turns((Turn(role="user", parts=(ref,)),), prompt=True).slots
    assert (between.slots, language.tokens) == (slots, 9 + slots)
    assert min(of.flops, language.flops, of.tokens) > 0


def test_no_more_of_a_sound_is_counted_than_is_heard_at_once() -> None:
    assert heard(audio_specs.Whisper(tokens=50), 3.0) == 1.0
    assert heard(audio_specs.Whisper(), 3.0) == 3.0
    assert heard(audio_specs.PretrainedAudio(window_s=2.0), 3.0) == 2.0
    assert heard(audio_specs.PretrainedAudio(), 40.0) == 40.0


def test_a_decoder_costs_two_operations_a_weight_and_token(tiny_folders: dict[str, Path]) -> None:
    given = settings(Case("vit", "linear", "llama"), tower=None, decoder=tiny_folders["decoder"])
    spec = Composition.model_validate(given)
    short, long = (composition_account(spec, prompt=n)[-1] for n in (1, 2))
    built = compose(spec)
    with plain(built.language.model):
        layers = sum(weight.numel() for name, weight in built.language.model.named_parameters() if "proj" in name)
    width = built.language.width
    # One more token: all matrices once, and attention over one more of t + t - 1 pairs, both products, both layers.
    t = long.tokens
    assert long.flops - short.flops == 2 * layers + 2 * 4 * width * (t * t - (t - 1) ** 2)


def test_the_plan_of_a_file(tiny_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = settings(Case("swin", "qformer", "qwen2"), tower=None, decoder=tiny_folders["decoder"])
    path = tmp_path / "model.yaml"
    path.write_text(yaml.safe_dump(given), encoding="utf-8")
    assert main(["plan", str(path)]) == 0
    said = capsys.readouterr().out
    assert "image connector" in said
    assert "qwen2" in said
    assert main(["plan", str(path), "--json"]) == 0
    parts = json.loads(capsys.readouterr().out)["parts"]
    assert [part["part"] for part in parts] == ["image encoder", "image connector", "decoder"]
    assert main(["plan", str(path), "connectors.image.kind=mlpp"]) == 3
    assert "expected linear or mlp" in capsys.readouterr().err
    assert torch.get_default_device().type == "cpu"
