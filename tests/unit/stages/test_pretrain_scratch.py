"""A picture tower from scratch in the pretrain stage: it learns, goes on to the same bits, is saved, and serves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from plait.assembly.dual import load_dual
from plait.assembly.towers import load_image_tower
from plait.core import mesh
from plait.core.errors import CheckpointError, ConfigError
from plait.core.estimate import Estimate, Machine
from plait.core.events import Event, Events
from plait.core.files import read_done, read_json, read_jsonl
from plait.core.tensors import Patches
from plait.data.shards import ShardReader
from plait.stages.pretrain import Pretrain
from plait.stages.pretraining.outcome import say_pieces

MACHINE = Machine(cores=2, memory_bytes=2**33, disk_bytes=2**35, gemm_fp32=1e11, gemm_bf16=1e11, measured=True)
VIT = {"kind": "vit", "size": 16, "patch": 8, "d": 16, "depth": 1, "heads": 2}
TOWERS: dict[str, dict[str, Any]] = {
    "vit": VIT | {"dropout": 0.1},
    "resnet": {"kind": "resnet", "size": 32, "width": 8},  # batch norm: state that is no weight
    "swin": {"kind": "swin", "size": 16, "patch": 2, "d": 8, "depths": [1, 1], "heads": [2, 2], "window": 4},
}


class Killed(BaseException):
    """What no handler expects, as little as kill -9."""


@pytest.fixture
def settings(tiny_folders: dict[str, Path]) -> dict[str, Any]:
    return {
        "text_tower": str(tiny_folders["text"]),
        "max_tokens": 16,
        "steps": 6,
        "batch_size": 8,
        "d_hidden": 8,
        "d_shared": 4,
        "save_every": 2,
        "seed": 3,
    }


def pretrain(data: Path, folder: Path, settings: dict[str, Any], *, stop: str = "", **changes: Any) -> list[str]:
    said: list[str] = []

    def listener(event: Event) -> None:
        said.append(event.text)
        if stop and event.text.startswith(stop):
            raise Killed

    folder.mkdir(exist_ok=True)
    Pretrain.model_validate(settings | changes).run(data, folder, events=Events(listeners=(listener,)))
    return said


def tensors(folder: Path) -> dict[str, bytes]:
    """Every tensor of the last checkpoint, byte for byte: the model's, weights, optimizer, generators."""
    from safetensors.torch import load_file

    last = max((folder / "checkpoints").glob("[0-9]*"))
    found = {
        f"{path.relative_to(last).as_posix()}: {name}": value.contiguous().view(-1).numpy().tobytes()
        for path in last.rglob("*.safetensors")
        for name, value in load_file(path).items()
    }
    # Not Python's generator: beartype, which checks signatures in tests, draws from it as often as it is called.
    del found["resume/rng.safetensors: python"]
    return found


@pytest.mark.row("S4-47")
def test_the_shape_of_the_space_is_measured_before_and_after_or_said_to_be_unknown(
    data_stage: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    said = pretrain(data_stage, tmp_path / "run", settings, image_tower=next(iter(TOWERS.values())))
    scores = {score["name"]: score for score in read_json(tmp_path / "run" / "scores.json")}
    for split in {name.split("/")[1] for name in scores if name.startswith("retrieval/")}:
        unknown = any(text.startswith(f"{split}: ") and "too few to measure" in text for text in said)
        for measure in ("alignment", "uniformity-image", "uniformity-text", "modality-gap", "cka"):
            for end in ("", "/untrained"):
                assert (f"space/{split}/{measure}{end}" in scores) != unknown
    assert any(name.startswith("space/") for name in scores), "one split at least is large enough"


@pytest.mark.row("S2-05")
@pytest.mark.parametrize("kind", TOWERS)
def test_a_killed_run_goes_on_to_the_same_bits(
    kind: str, data_stage: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    tower = {"image_tower": TOWERS[kind]}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    pretrain(data_stage, whole, settings, **tower)
    with pytest.raises(Killed):
        pretrain(data_stage, stopped, settings, stop="checkpoint 000004 saved", **tower)
    assert read_done(stopped) is None
    trainer = Pretrain().trainer.model_copy(update={"workers": 1})
    said = pretrain(data_stage, stopped, settings, trainer=trainer, **tower)
    assert any(text.startswith("resumed at step 4") for text in said)
    assert tensors(stopped) == tensors(whole)
    for name in ("scores.json", "predictions.jsonl", "samples/000006.json"):
        assert (stopped / name).read_bytes() == (whole / name).read_bytes(), name
    dual = load_dual(whole / "checkpoints" / "000006")
    first = load_dual(whole / "checkpoints" / "000004")
    assert dual.model.tower is not None
    assert first.model.tower is not None
    before = dict(first.model.tower.named_parameters())
    still = [name for name, w in dual.model.tower.named_parameters() if torch.equal(w, before[name])]
    assert still == []  # the gradient reaches every weight


def test_it_learns_pictures_it_can_tell_apart(tmp_path: Path, settings: dict[str, Any], own_colors: Path) -> None:
    folder = tmp_path / "02-pretrain"
    pretrain(own_colors, folder, settings, image_tower=VIT, steps=60, batch_size=24, lr=0.01, dropout=0.0)
    losses = [record["loss"] for record in read_jsonl(folder / "metrics.jsonl")]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


@pytest.fixture
def own_colors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """24 pictures of one color each."""
    from plait.stages.data import Data, PairsSource

    monkeypatch.setenv("PLAIT_HOME", str(tmp_path / "home"))
    own, stage = tmp_path / "colors", tmp_path / "01-data"
    for path in (own, stage):
        path.mkdir()
    lines = ["image,text"]
    colors = np.random.default_rng(0).integers(0, 256, (24, 3))
    for number, color in enumerate(colors.tolist()):
        Image.new("RGB", (20, 20), tuple(color)).save(own / f"{number}.png")
        lines.append(f"{number}.png,{'abcdefghijklmnopqrstuvwx'[number] * 3}")
    (own / "pairs.csv").write_text("\n".join(lines) + "\n")
    Data(source=PairsSource(path=own / "pairs.csv", test_fraction=0.0)).run(None, stage, events=Events())
    return stage


@pytest.fixture
def trained(data_stage: Path, tmp_path: Path, settings: dict[str, Any]) -> Path:
    """Checkpoint of a vision transformer."""
    pretrain(data_stage, tmp_path / "02-pretrain", settings, image_tower=VIT, steps=2)
    return tmp_path / "02-pretrain" / "checkpoints" / "000002"


def pictures(data: Path) -> dict[str, Image.Image]:
    from plait.data.media import decode_image

    with ShardReader(data / "shards", "test-concept") as reader:
        return {s.id: decode_image(reader.media(s.media()[0]), place=s.id) for s in reader}


def test_the_saved_model_answers_like_the_trained_one(trained: Path, data_stage: Path) -> None:
    dual = load_dual(trained)
    assert dual.model.tower is not None
    assert not dual.model.training
    assert dual.image.contract.size == 16
    record = read_json(trained / "plait.json")
    assert record["composition"]["image"]["scratch"]["d"] == 16
    assert record["media"]["image"]["size"] == 16
    shown = pictures(data_stage)
    predictions = read_jsonl(trained.parents[1] / "predictions.jsonl")
    found = dual.embed_pictures([shown[p["id"]] for p in predictions])
    for vector, prediction in zip(found, predictions, strict=True):
        said = dual.embed_texts([answer["text"] for answer in prediction["top"]])
        expected = torch.tensor([answer["score"] for answer in prediction["top"]])
        torch.testing.assert_close(said @ vector, expected, atol=0.02, rtol=0)  # texts in bfloat16, in another batch


def test_pixels_of_training_are_those_of_serving(trained: Path, data_stage: Path) -> None:
    from plait.assembly.pairs import read_pairs

    dual = load_dual(trained)
    cache = data_stage.parent / "home" / "features"
    found = read_pairs(data_stage / "shards", ["test-concept"], dual, cache=cache, keywords=False, events=Events())[
        "test-concept"
    ]
    assert not isinstance(found.image, torch.Tensor)
    prepared = [dual.image.prepare(picture).values for picture in pictures(data_stage).values()]
    assert torch.equal(found.image(range(len(found.ids))).values, torch.cat(prepared))


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda r: r["composition"]["image"].update(key="0" * 64), "the image tower 'from scratch'"),
        (lambda r: r["composition"]["image"]["scratch"].update(kind="foo"), "the picture tower's spec"),
        (lambda r: r["composition"]["image"]["scratch"].update(patch=4), "tensors do not fit"),
    ],
    ids=["preprocessing", "kind", "size"],
)
def test_what_does_not_fit_is_refused(trained: Path, edit: Any, match: str) -> None:
    record = read_json(trained / "plait.json")
    edit(record)
    (trained / "plait.json").write_text(json.dumps(record))
    (trained / "manifest.json").unlink()  # the change is on purpose
    with pytest.raises(CheckpointError, match=match):
        load_dual(trained)


def test_its_tower_serves_as_a_frozen_one(trained: Path, data_stage: Path) -> None:
    dual, tower = load_dual(trained), load_image_tower(str(trained), dtype="float32")
    assert dual.model.tower is not None
    assert tower.encoder.d_out == 16
    assert not any(w.requires_grad for w in tower.encoder.parameters())  # type: ignore[attr-defined]
    raw = tower.prepare(next(iter(pictures(data_stage).values())))
    again = load_image_tower(str(trained), **{k: v for k, v in tower.settings.items() if k != "name"})
    assert again.key == tower.key
    with torch.inference_mode():
        found = tower.encoder(raw)
        assert torch.equal(found.values, dual.model.tower(raw).values)
        rounded = load_image_tower(str(trained), dtype="bfloat16").encoder(raw)
    assert torch.equal(rounded.values, found.values.bfloat16())
    assert isinstance(found, Patches)
    assert found.grid.tolist() == [[1, 2, 2]]
    with pytest.raises(ConfigError, match="size is 64, this tower learned at 16 pixels"):
        load_image_tower(str(trained), size=64)


# --- settings and estimate -----------------------------------------------------------------------------------------


def test_a_tower_from_scratch_has_its_own_size() -> None:
    assert Pretrain.model_validate({"image_tower": VIT}).resolution == 0
    assert Pretrain.model_validate({"image_tower": VIT | {"size": 64}, "resolution": 64}).resolution == 64
    with pytest.raises(ValueError, match=r"resolution is 128, image_tower\.size is 16"):
        Pretrain.model_validate({"image_tower": VIT, "resolution": 128})
    again = Pretrain.model_validate(Pretrain.model_validate({"image_tower": VIT}).model_dump(mode="json"))
    assert again == Pretrain.model_validate({"image_tower": VIT})


def test_sizes_that_do_not_fit_are_said_before_anything_runs(settings: dict[str, Any]) -> None:
    stage = Pretrain.model_validate(settings | {"image_tower": VIT | {"heads": 3}})
    with pytest.raises(ConfigError, match="3 heads") as caught:
        stage.check(MACHINE)
    assert caught.value.place == "stages.pretrain.image_tower"
    Pretrain.model_validate(settings | {"image_tower": VIT}).check(MACHINE)


def test_the_estimate_counts_the_tower() -> None:
    data = Estimate(stage="data", samples={"train": 100, "test-concept": 10})

    def needs(**changes: Any) -> Estimate:
        stage = Pretrain.model_validate({"image_tower": VIT | changes.pop("tower", {}), "steps": 10} | changes)
        return stage.estimate(MACHINE, {"data": data})

    base = needs()
    assert base.image_tokens == (10 * 100 + 7 * 10) * 4
    assert base.seconds[0] < base.seconds[1]
    assert "vit d16 x1 /8 at 16 px" in base.notes[0]
    assert "3 forward passes" in base.notes[1]
    deeper = needs(tower={"depth": 3})
    assert deeper.params_trainable - base.params_trainable == 2 * (12 * 16 * 16 + 13 * 16)
    assert deeper.flops > base.flops
    assert deeper.memory["activations"] > base.memory["activations"]
    small = needs(batch_size=10)
    assert small.memory["activations"] < 0.2 * base.memory["activations"]
    assert small.flops < base.flops


# --- micro-batches -------------------------------------------------------------------------------------------------


@pytest.mark.row("S2-26")
def test_micro_batches_lead_to_the_weights_of_the_whole_batch(
    data_stage: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Six steps of 8 pairs at once, and 3 at a time: the same losses, norms and weights, but for rounding."""
    tower = {"image_tower": VIT, "dropout": 0.0, "batch_size": 8}
    runs = {"whole": {}, "parts": {"trainer": {"micro_batch": 3}}}
    said = {name: pretrain(data_stage, tmp_path / name, settings, **tower, **more) for name, more in runs.items()}
    piecewise = "each batch of 8 pairs is embedded 3 at a time, in 3 micro-batches"
    assert [any(piecewise in text for text in said[name]) for name in runs] == [False, True]
    whole, parts, before = (
        load_dual(tmp_path / name).model.state_dict()
        for name in ("whole/checkpoints/000006", "parts/checkpoints/000006", "whole/checkpoints/000004")
    )
    for states in (whole, parts, before):  # The gradient of keys' bias is 0: AdamW makes whole steps of its rounding.
        for name in [name for name in states if name.endswith("qkv.bias")]:
            states[name] = states[name].view(3, -1)[[0, 2]]

    def distance(one: dict[str, torch.Tensor]) -> float:
        return sum(float((one[name] - value).square().sum()) for name, value in whole.items()) ** 0.5

    assert distance(parts) < 1e-4 * distance(before)  # of what two steps move; 1e-5 was measured
    losses = [read_jsonl(tmp_path / name / "metrics.jsonl") for name in runs]
    for one, other in zip(*losses, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


@pytest.mark.row("S2-26")
def test_batch_norm_in_micro_batches_is_warned_of(data_stage: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    said = pretrain(
        data_stage, tmp_path / "run", settings | {"steps": 1}, image_tower=TOWERS["resnet"], trainer={"micro_batch": 4}
    )
    assert any("batch norms take their statistics from 4 pairs at a time" in text for text in said)


@pytest.mark.parametrize("what", ["pairs", "pictures"])
def test_batch_norm_in_several_processes_is_warned_of(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mesh, "world", lambda: 3)
    said: list[str] = []
    for model in (torch.nn.BatchNorm2d(2), torch.nn.LayerNorm(2)):
        say_pieces(model, 8, 0, events=Events(listeners=(lambda event: said.append(event.text),)), what=what)
    (warning,) = said
    assert warning.startswith(f"1 batch norms take their statistics from the {what} of each of 3 processes")


def test_a_stopped_run_may_go_on_in_smaller_pieces(data_stage: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    run = tmp_path / "run"
    with pytest.raises(Killed):
        pretrain(data_stage, run, settings, stop="checkpoint 000004 saved", image_tower=VIT)
    said = pretrain(data_stage, run, settings, image_tower=VIT, trainer={"micro_batch": 2})
    assert any(text.startswith("resumed at step 4") for text in said)


def test_the_estimate_counts_one_micro_batch() -> None:
    from plait.objectives.contrastive import CELLS
    from plait.stages.pretraining import needs

    assert needs.SCORES == CELLS
    data = Estimate(stage="data", samples={"train": 600, "test-concept": 10})

    def estimate(micro: int, **changes: Any) -> Estimate:
        given = {"image_tower": VIT, "steps": 10, "batch_size": 512, "trainer": {"micro_batch": micro}} | changes
        return Pretrain.model_validate(given).estimate(MACHINE, {"data": data})

    whole, parts, more = estimate(0), estimate(32), estimate(1024)
    assert more.memory == whole.memory
    assert more.flops == whole.flops
    assert "all of which are held at once" in whole.notes[1]
    assert "32 of which are held at once" in parts.notes[1]
    kept = needs.tower_account(Pretrain.model_validate({"image_tower": VIT}).image_tower).kept_bytes
    assert whole.memory["activations"] - parts.memory["activations"] > 480 * kept
    assert whole.flops < parts.flops < (1 + 1 / 3) * whole.flops
    frozen = {"image_tower": "efficientnet-lite0"}
    # Its highest moment is before the first step, where the frozen tower runs; heads alone come in parts.
    heads = 4 * (512 - 32) * 3 * 512  # what they make of the other rows, in the space that is shared
    assert estimate(0, **frozen).moments["training"] - estimate(32, **frozen).moments["training"] > heads


def test_a_stage_that_takes_its_batches_whole_refuses_pieces() -> None:
    from plait.stages.align import Align

    pieces = {"trainer": {"micro_batch": 4}}
    for stage, given in ((Pretrain, {"qformer": {}}), (Align, {})):
        with pytest.raises(ValueError, match=r"trainer\.micro_batch is 4: .* takes its batches whole"):
            stage.model_validate(given | pieces)
