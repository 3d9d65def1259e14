"""What `plait plan` says of a model is what the model has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from tests.matrix.cases import CONNECTORS, Case, settings

from plait.assembly.account import composition_account
from plait.assembly.compose import compose
from plait.cli.main import main
from plait.models.composition import Composition
from plait.models.crossattend import plain


@pytest.mark.row("S2-09")
@pytest.mark.parametrize("connector", CONNECTORS)
@pytest.mark.parametrize("decoder", ["gpt2", "smollm2"])
def test_weights_and_tokens_are_those_of_the_built_model(
    connector: str, decoder: str, tiny_folders: dict[str, Path]
) -> None:
    given = settings(Case("vit", connector, decoder), towers={}, decoder=tiny_folders["decoder"])
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


def test_a_decoder_costs_two_operations_a_weight_and_token(tiny_folders: dict[str, Path]) -> None:
    given = settings(Case("vit", "linear", "llama"), towers={}, decoder=tiny_folders["decoder"])
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
    given = settings(Case("swin", "qformer", "qwen2"), towers={}, decoder=tiny_folders["decoder"])
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
