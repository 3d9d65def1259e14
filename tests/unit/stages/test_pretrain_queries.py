"""BLIP-2's two stages: a Q-Former learns in the pretrain stage, is saved, and is what tune's connector begins with."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from plait.core.errors import CheckpointError, ConfigError, DataError
from plait.core.estimate import Estimate, Machine
from plait.core.events import Event, Events
from plait.core.files import read_done, read_json, read_jsonl
from plait.stages.pretrain import Pretrain
from plait.stages.tune import Tune

MACHINE = Machine(cores=2, memory_bytes=2**33, disk_bytes=2**35, gemm_fp32=1e11, gemm_bf16=1e11, measured=True)
SHAPE = {"queries": 3, "d": 16, "depth": 2, "heads": 2, "every": 1}


class Killed(BaseException):
    """What no handler expects, as little as kill -9."""


def spec(folders: dict[str, Path], **changes: Any) -> Pretrain:
    settings: dict[str, Any] = {
        "image_tower": str(folders["image"]),
        "resolution": 0,
        "tower_dtype": "float32",
        "text_tower": str(folders["text"]),
        "max_tokens": 16,
        "qformer": SHAPE,
        "d_shared": 8,
        "steps": 6,
        "batch_size": 8,
        "save_every": 2,
        "seed": 3,
        "device": "cpu",
    }
    return Pretrain.model_validate(settings | changes)


def pretrain(data: Path, stage: Pretrain, name: str = "02-pretrain", *, stop: str = "") -> Path:
    folder = data.parent / name
    folder.mkdir(exist_ok=True)

    def listener(event: Event) -> None:
        if stop and event.text.startswith(stop):
            raise Killed

    stage.run(data, folder, events=Events(listeners=(listener,)))
    return folder


def tune_spec(folders: dict[str, Path], **connector: Any) -> Tune:
    return Tune.model_validate(
        {
            "image_tower": str(folders["image"]),
            "resolution": 0,
            "views": 0,
            "decoder": str(folders["decoder"]),
            "dtype": "float32",
            "connector": {"kind": "qformer", "start": "pretrain"} | SHAPE | connector,
            "tasks": {"name.en": 1},
            "frozen": {"steps": 2},
            "adapt": {"steps": 1, "rank": 2, "targets": ["q_proj"], "drop": {"most": 0.0}},
            "batch_size": 4,
            "row": 192,
            "save_every": 1,
            "device": "cpu",
        }
    )


def tune(previous: Path, stage: Tune) -> tuple[Path, list[str]]:
    said: list[str] = []
    folder = previous.parent / "03-tune"
    folder.mkdir(exist_ok=True)
    stage.run(previous, folder, events=Events(listeners=(lambda event: said.append(event.text),)))
    return folder, said


def checkpoint(folder: Path) -> Path:
    done = read_done(folder)
    assert done is not None
    return folder / done["summary"]["checkpoint"]


@pytest.mark.row("S2-09")
def test_the_stage_leaves_scores_samples_and_a_folder_that_loads_with_equal_bits(
    data_stage: Path, tiny_folders: dict[str, Path]
) -> None:
    from plait.assembly.queries import load_queries
    from plait.assembly.towers import load_image_tower

    folder = pretrain(data_stage, spec(tiny_folders))
    names = {score["name"] for score in read_json(folder / "scores.json")}
    ways = [f"retrieval/test-concept/{way}/R@1" for way in ("image-to-text", "text-to-image")]
    ends = ("", "/chance", "/untrained", "/gain-over-untrained", "/judged", "/gain-by-judging")
    assert {way + end for way in ways for end in ends} <= names
    assert "writing/test-concept/name/exact-match" in names
    last = read_jsonl(folder / "metrics.jsonl")[-1]
    assert {"loss/contrast", "loss/match", "loss/generate"} <= last.keys()
    assert (last["units/contrast"], last["units/match"]) == (8, 24)
    shown = read_json(folder / "samples" / "000006.json")["samples"]
    assert len(shown) == 3
    assert all(isinstance(one["written"], str) for one in shown)
    done = read_done(folder)
    assert done is not None
    assert "judged again" in done["summary"]["lines"][0]

    place = checkpoint(folder)
    record = read_json(place / "plait.json")
    assert (record["kind"], record["format"]) == ("queries", 2)
    kept, resumed = load_file(place / "model.safetensors"), load_file(place / "resume" / "weights.safetensors")
    assert not any(name.startswith("tower.") for name in kept)
    assert all(torch.equal(kept[name], value) for name, value in resumed.items()), "what was trained is what is saved"
    again = load_queries(place)
    assert not again.model.training
    state = again.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in kept.items())
    tower = load_image_tower(str(tiny_folders["image"]), dtype="float32").encoder
    assert isinstance(tower, torch.nn.Module)
    frozen = tower.state_dict()
    assert all(torch.equal(state[f"tower.{name}"], value) for name, value in frozen.items()), "the tower moved"
    assert again.words.text(again.words.ids(["cat"])[0]) == "cat"


@pytest.mark.row("S2-09")
def test_all_three_losses_fall(data_stage: Path, tiny_folders: dict[str, Path]) -> None:
    quiet = {"qformer": SHAPE | {"dropout": 0.0, "d": 32}, "batch_size": 36, "lr": 3e-3, "save_every": 0}
    folder = pretrain(data_stage, spec(tiny_folders, steps=60, **quiet))
    records = read_jsonl(folder / "metrics.jsonl")
    for term, chance in (("contrast", math.log(36)), ("match", math.log(2)), ("generate", 4.0)):
        first, last = (sum(r[f"loss/{term}"] for r in part) / 5 for part in (records[:5], records[-5:]))
        assert last < 0.97 * first, (term, first, last)
        assert last < chance, (term, last)


def test_a_killed_run_goes_on_to_the_same_bits(data_stage: Path, tiny_folders: dict[str, Path]) -> None:
    stage = spec(tiny_folders)
    whole = pretrain(data_stage, stage, "whole")
    with pytest.raises(Killed):
        pretrain(data_stage, stage, "stopped", stop="checkpoint 000004 saved")
    assert read_done(data_stage.parent / "stopped") is None
    stopped = pretrain(
        data_stage, spec(tiny_folders, trainer=stage.trainer.model_copy(update={"workers": 1})), "stopped"
    )
    one, other = (load_file(checkpoint(folder) / "model.safetensors") for folder in (whole, stopped))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (whole / "scores.json").read_bytes() == (stopped / "scores.json").read_bytes()


@pytest.mark.row("S2-09")
def test_tunes_connector_begins_with_the_weights_of_the_first_stage(
    data_stage: Path, tiny_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from plait.stages.tuning import phases

    first = pretrain(data_stage, spec(tiny_folders))
    trained = load_file(checkpoint(first) / "model.safetensors")
    begun: list[dict[str, torch.Tensor]] = []
    fit = phases.fit_ahead

    def watched(model: Any, *rest: Any, **more: Any) -> Any:
        begun.append({name: value.clone() for name, value in model.connectors["image"].state_dict().items()})
        return fit(model, *rest, **more)

    monkeypatch.setattr(phases, "fit_ahead", watched)
    folder, said = tune(first, tune_spec(tiny_folders))
    taken = {name: value for name, value in begun[0].items() if not name.startswith("out.")}
    assert set(begun[0]) - set(taken) == {"out.weight", "out.bias"}
    assert taken
    assert all(torch.equal(value, trained[f"qformer.{name}"]) for name, value in taken.items())
    left = {name.removeprefix("qformer.") for name in trained if name.startswith("qformer.")} - set(taken)
    assert left
    assert all(name.startswith(("embedding.", "position.")) or ".text_" in name for name in left), left
    count = sum(value.numel() for value in taken.values())
    assert any(f"starts from the pretrain stage's Q-Former: {count:,} weights" in line for line in said)
    saved = load_file(folder / "connector" / "checkpoints" / "000002" / "model.safetensors")
    assert not torch.equal(saved["connectors.image.queries"], trained["qformer.queries"]), "the second stage trains it"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"queries": 4}, r"queries 4, d 16.*has queries 3, d 16"),
        ({"d": 32}, r"d 32.*d 16"),
        ({"every": 2}, r"every 2.*every 1"),
    ],
)
def test_other_sizes_are_refused_with_both(
    data_stage: Path, tiny_folders: dict[str, Path], change: dict[str, int], match: str
) -> None:
    first = pretrain(data_stage, spec(tiny_folders, steps=1))
    with pytest.raises(ConfigError, match=match) as caught:
        tune(first, tune_spec(tiny_folders, **change))
    assert caught.value.place == "stages.tune.connector"


def test_another_tower_or_a_dual_encoder_is_refused(
    data_stage: Path, tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    first = pretrain(data_stage, spec(tiny_folders, steps=1, resolution=48))
    with pytest.raises(ConfigError, match=r"learned on .* at 48 pixels"):
        tune(first, tune_spec(tiny_folders))
    dual = pretrain(data_stage, spec(tiny_folders, steps=1, qformer=None), "02-dual")
    with pytest.raises(DataError, match="trained no Q-Former: it trained a dual encoder"):
        tune(dual, tune_spec(tiny_folders))
    with pytest.raises(DataError, match="no finished 'pretrain' stage"):
        tune(data_stage, tune_spec(tiny_folders))
    drawn, said = tune(dual, tune_spec(tiny_folders, start="drawn"))
    assert read_done(drawn) is not None
    assert not any("starts from" in line for line in said)


def test_a_damaged_folder_is_named(data_stage: Path, tiny_folders: dict[str, Path]) -> None:
    from plait.assembly.queries import load_queries

    place = checkpoint(pretrain(data_stage, spec(tiny_folders, steps=1)))
    (place / "manifest.json").unlink()  # what it records is changed on purpose
    record = json.loads((place / "plait.json").read_text())
    key = record["composition"]["image"]["key"]
    for change, match in (
        (record | {"kind": "dual"}, "kind 'dual'"),
        (json.loads(json.dumps(record).replace(key, "0" * len(key))), "has digest"),
        (record | {"composition": {}}, "a field is missing"),
    ):
        (place / "plait.json").write_text(json.dumps(change))
        with pytest.raises(CheckpointError, match=match):
            load_queries(place)


def test_settings_of_the_other_form_are_refused() -> None:
    with pytest.raises(ValueError, match="d_hidden, dropout: settings of a dual encoder"):
        Pretrain.model_validate({"qformer": SHAPE, "d_hidden": 8, "dropout": 0.1})
    with pytest.raises(ValueError, match="a Q-Former learns on a frozen tower"):
        Pretrain.model_validate({"qformer": SHAPE, "image_tower": {"kind": "vit"}, "resolution": 0})
    with pytest.raises(ValueError, match="3 heads do not divide a width of 16"):
        Pretrain.model_validate({"qformer": SHAPE | {"heads": 3}})


def test_a_start_that_no_stage_can_give_is_refused() -> None:
    from plait.models.composition import Composition

    connector = {"kind": "qformer", "start": "pretrain"}
    with pytest.raises(ValueError, match="that Q-Former reads pictures"):
        Tune.model_validate({"audio_connector": connector})
    with pytest.raises(ValueError, match="learns on squares"):
        Tune.model_validate({"connector": connector, "fit": {"kind": "native"}})
    parts = {"encoders": {"image": {"kind": "vit"}}, "connectors": {"image": connector}}
    with pytest.raises(ValueError, match="only a recipe has a pretrain stage"):
        Composition.model_validate(parts)


def test_the_estimate_counts_the_weights_that_learn() -> None:
    from plait.models.blip2 import Blip2Stage1
    from plait.models.connectors.query import QFormer, QFormerSizes
    from plait.stages.pretraining.needs import IMAGE_WIDTH, VOCABULARY

    for shape in (SHAPE, SHAPE | {"depth": 3, "every": 2}):
        stage = Pretrain.model_validate({"qformer": shape, "d_shared": 8, "max_tokens": 16})
        sizes = QFormerSizes(d_source=IMAGE_WIDTH, vocabulary=VOCABULARY, max_tokens=16, **shape)
        with torch.device("meta"):
            model = Blip2Stage1(torch.nn.Identity(), QFormer(sizes), start=VOCABULARY - 1, d_shared=8)
        before = {"data": Estimate(stage="data", samples={"train": 100, "test-concept": 10})}
        found = stage.estimate(MACHINE, before)
        assert found.params_trainable == sum(weight.numel() for weight in model.parameters())
        assert 0 < found.seconds[0] < found.seconds[1]
        longer = stage.model_copy(update={"epochs": 60.0}).estimate(MACHINE, before)
        assert longer.flops > found.flops


@pytest.mark.real
def test_the_vocabulary_is_the_packaged_one(packages: Any) -> None:
    from plait.assembly.queries import load_tokens
    from plait.stages.pretraining.needs import VOCABULARY

    packages("minilm")
    words = load_tokens("minilm")
    assert words.start + 1 == VOCABULARY
    assert words.text([*words.ids(["crescent moon"])[0], words.start]) == "crescent moon"
