"""A picture tower that learns from views alone: it goes on to the same bits, is saved, serves, and is scored."""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.rank_script import cases_of
from tests.unit.data.test_view_batches import rows, views
from tests.unit.stages.test_pretrain_scratch import MACHINE, VIT, Killed, pictures, pretrain, tensors

from plait.assembly.scratch import holds_tower
from plait.assembly.towers import load_image_tower
from plait.assembly.views import load_views
from plait.cli.main import main
from plait.core.errors import CheckpointError, ConfigError, DataError
from plait.core.estimate import Estimate
from plait.core.events import Events
from plait.core.files import read_done, read_json, read_jsonl
from plait.data.loader import Loader
from plait.data.shards import ShardReader
from plait.data.view_batches import ShardPictures
from plait.stages.data import Data, PairsSource
from plait.stages.pretrain import Pretrain

MOCO = {"kind": "moco", "queue": 20, "momentum": 0.9, "temperature": 0.2}
KINDS: dict[str, dict[str, Any]] = {
    "nt-xent": {"kind": "nt-xent"},
    "supcon": {"kind": "supcon"},
    "n-pair": {"kind": "n-pair"},
    "margin": {"kind": "margin"},
    "triplet": {"kind": "triplet", "average": "active"},
    "hard-nt-xent": {"kind": "hard-nt-xent", "classes": False, "prior": 0.05},
    "moco": MOCO,
}
SETTINGS: dict[str, Any] = {
    "image_tower": VIT,
    "objective": {"kind": "nt-xent"},
    "steps": 6,
    "batch_size": 8,
    "d_hidden": 8,
    "d_shared": 4,
    "save_every": 2,
    "seed": 3,
}
learn = partial(pretrain, settings=SETTINGS)


@pytest.fixture
def twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pictures of noise, of which some are in the test splits, and a split to judge by; no text tower is here."""
    import numpy as np
    from PIL import Image

    monkeypatch.setenv("PLAIT_HOME", str(tmp_path / "home"))
    own, stage = tmp_path / "own", tmp_path / "01-data"
    for path in (own, stage):
        path.mkdir()
    lines = ["image,text"]
    for number in range(40):
        noise = np.random.default_rng(number).integers(0, 256, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(noise).save(own / f"{number}.png")
        lines.append(f"{number}.png,thing {number // 2}")
    (own / "pairs.csv").write_text("\n".join(lines) + "\n")
    source = PairsSource(path=own / "pairs.csv", test_fraction=0.2, validation=0.2)
    Data(source=source).run(None, stage, events=Events())
    return stage


@pytest.mark.row("S2-05")
@pytest.mark.parametrize("kind", ["nt-xent", "moco"])
def test_a_killed_run_goes_on_to_the_same_bits(kind: str, twice: Path, tmp_path: Path) -> None:
    """Weights, MoCo's copy and its queue; with workers where there were none."""
    how: dict[str, Any] = {"objective": KINDS[kind], "dropout": 0.1}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    learn(twice, whole, **how)
    with pytest.raises(Killed):
        learn(twice, stopped, stop="checkpoint 000004 saved", **how)
    assert read_done(stopped) is None
    said = learn(twice, stopped, trainer={"workers": 1}, **how)
    assert any(text.startswith("resumed at step 4") for text in said)
    assert tensors(stopped) == tensors(whole)
    for name in ("scores.json", "predictions.jsonl", "samples/000006.json"):
        assert (stopped / name).read_bytes() == (whole / name).read_bytes(), name
    held = {name.rpartition("objective.")[2] for name in tensors(whole) if "objective." in name}
    assert ({"queue", "queue_classes", "head", "stepped"} < held) == (kind == "moco")
    assert any(name.startswith("key.tower.") for name in held) == (kind == "moco")


@pytest.mark.row("S2-18")
@pytest.mark.row("S0-40")
@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_lead_to_the_losses_of_the_whole_batch(kind: str, twice: Path, tmp_path: Path) -> None:
    for name, trainer in (("whole", {}), ("parts", {"micro_batch": 3})):
        learn(twice, tmp_path / name, objective=KINDS[kind], trainer=trainer, steps=4)
    records = [read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts")]
    assert len(records[0]) == 4
    for one, other in zip(*records, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


@pytest.mark.row("S0-40")
@pytest.mark.parametrize("optimizer", ["adamw", "lars"])
def test_it_learns_to_tell_pictures_apart(optimizer: str, own_colors: Path, tmp_path: Path) -> None:
    quiet = {"color": {"chance": 0}, "gray": 0, "blur": {"chance": 0}}
    lr = {"adamw": 0.01, "lars": 1.0}[optimizer]
    learn(
        own_colors,
        tmp_path / "run",
        views={"changes": quiet},
        steps=40,
        batch_size=24,
        lr=lr,
        trainer={"optimizer": {"kind": optimizer}},
    )
    losses = [record["loss"] for record in read_jsonl(tmp_path / "run" / "metrics.jsonl")]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert read_json(tmp_path / "run" / "scores.json") == []  # there is no test split


@pytest.fixture
def own_colors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """24 pictures of one color each."""
    import numpy as np
    from PIL import Image

    monkeypatch.setenv("PLAIT_HOME", str(tmp_path / "home"))
    own, stage = tmp_path / "colors", tmp_path / "01-data"
    for path in (own, stage):
        path.mkdir()
    lines = ["image,text"]
    for number, color in enumerate(np.random.default_rng(0).integers(0, 256, (24, 3)).tolist()):
        Image.new("RGB", (20, 20), tuple(color)).save(own / f"{number}.png")
        lines.append(f"{number}.png,{'abcdefghijklmnopqrstuvwx'[number] * 3}")
    (own / "pairs.csv").write_text("\n".join(lines) + "\n")
    Data(source=PairsSource(path=own / "pairs.csv", test_fraction=0.0)).run(None, stage, events=Events())
    return stage


def test_training_is_judged_by_the_same_views_every_time(twice: Path, tmp_path: Path) -> None:
    for kind in ("nt-xent", "moco"):
        trainer = {"validation": {"every": 3, "samples": 6}}
        learn(twice, tmp_path / kind, objective=KINDS[kind], trainer=trainer, lr=1e-9)
        found = [r for r in read_jsonl(tmp_path / kind / "metrics.jsonl") if "evaluation" in r]
        assert len(found) == 2
        assert "evaluation_training" in found[0]
        summary = read_json(tmp_path / kind / "done.json")["summary"]
        assert summary["validation"]["step"] in (3, 6)
        if kind == "nt-xent":  # nothing was learned: the same views, the same loss
            assert found[0]["evaluation"] == pytest.approx(found[1]["evaluation"], rel=1e-5)


@pytest.mark.row("S2-18")
@pytest.mark.row("S0-40")
def test_two_processes_in_micro_batches_make_what_one_makes(twice: Path) -> None:
    """Three steps of 9 pictures at once, and of 5 and 4 in pieces of two: all weights, MoCo's copy and its queue."""
    from safetensors.torch import load_file

    script = Path(__file__).with_name("views_ranks.py")
    found = cases_of(script, str(twice))
    for kind in ("nt-xent", "moco"):
        assert (found[f"{kind}-1"], found[f"{kind}-2"]) == (["done"], ["done", "done"]), found["log"]
        one, two = (_all_of(twice.parent / f"{kind}-{world}", load_file) for world in (1, 2))
        assert one.keys() == two.keys()
        moved = 0.0
        start = _all_of(twice.parent / f"{kind}-1", load_file, step="000002")
        for name, value in one.items():
            if value.is_floating_point():
                torch.testing.assert_close(two[name], value, atol=2e-6, rtol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
                moved = max(moved, float((value - start[name]).abs().max()))
            else:
                assert torch.equal(two[name], value), name
        assert moved > 1e-3
        scores = [read_json(twice.parent / f"{kind}-{world}" / "scores.json") for world in (1, 2)]
        assert [s["name"] for s in scores[0]] == [s["name"] for s in scores[1]]


def _all_of(folder: Path, load: Any, *, step: str = "000003") -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint but generators."""
    at = folder / "checkpoints" / step
    return {
        f"{path.name}: {name}": value
        for path in sorted(at.rglob("*.safetensors"))
        if path.name != "rng.safetensors"
        for name, value in load(path).items()
    }


# --- what comes out ------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(data_stage: Path, tmp_path: Path) -> Path:
    """Checkpoint of a vision transformer."""
    learn(data_stage, tmp_path / "02-pretrain", steps=2)
    return tmp_path / "02-pretrain" / "checkpoints" / "000002"


def test_the_saved_tower_serves_as_a_frozen_one(trained: Path, data_stage: Path) -> None:
    found, tower = load_views(trained), load_image_tower(str(trained), dtype="float32")
    assert holds_tower(trained)
    assert not found.model.training
    assert tower.encoder.d_out == found.d_out == 16
    assert not any(w.requires_grad for w in tower.encoder.parameters())  # type: ignore[attr-defined]
    picture = next(iter(pictures(data_stage).values()))
    raw = tower.prepare(picture)
    with torch.inference_mode():
        assert torch.equal(tower.encoder(raw).values, found.model.tower(raw).values)
    (vector,) = found.embed_pictures([picture])
    features = tower.encoder(raw).values.mean(0)
    torch.testing.assert_close(vector, features / features.norm())
    assert load_image_tower(str(trained), dtype="float32").key == tower.key


def test_predictions_are_what_the_saved_tower_says(trained: Path, data_stage: Path) -> None:
    """Texts of a csv are the concepts: those of tests are new, and each is there once; nothing can be scored."""
    stage = trained.parents[1]
    predictions, scores = read_jsonl(stage / "predictions.jsonl"), read_json(stage / "scores.json")
    assert bool(predictions) == bool(scores)
    summary = read_json(stage / "done.json")["summary"]
    assert summary["lines"]
    assert set(summary["pictures"]) >= {"train"}


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda r: r["composition"]["image"].update(key="0" * 64), "pictures are prepared by"),
        (lambda r: r["composition"]["image"]["scratch"].update(kind="foo"), "the picture tower's spec"),
        (lambda r: r["composition"]["image"]["scratch"].update(patch=4), "tensors do not fit"),
        (lambda r: r["composition"].pop("image"), "a field is missing"),
        (lambda r: r.update(kind="multimodal"), "expected 'views'"),
    ],
    ids=["preprocessing", "kind", "size", "field", "other"],
)
def test_what_does_not_fit_is_refused(trained: Path, edit: Any, match: str) -> None:
    record = read_json(trained / "plait.json")
    edit(record)
    (trained / "plait.json").write_text(json.dumps(record))
    (trained / "manifest.json").unlink()  # which would say so first
    with pytest.raises(CheckpointError, match=match):
        load_views(trained)


def test_a_flipped_bit_is_seen(trained: Path) -> None:
    target = trained / "model.safetensors"
    data = bytearray(target.read_bytes())
    data[-3] ^= 16
    target.write_bytes(bytes(data))
    for load in (load_views, lambda folder: load_image_tower(str(folder))):
        with pytest.raises(CheckpointError, match=r"damaged: sha256 of model\.safetensors"):
            load(trained)


def test_embed_takes_pictures_and_refuses_texts_and_sounds(
    trained: Path, data_stage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = sorted((data_stage.parent / "own").glob("*.png"))[:3]
    assert main(["embed", str(trained), "--image", *map(str, files), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["dimension"] == 16
    cosines = torch.tensor(found["cosines"]["image-image"])
    torch.testing.assert_close(cosines.diagonal(), torch.ones(3))
    assert main(["embed", str(trained), "--image", str(files[0]), "--text", "red cat"]) == DataError.exit_code
    assert "embeds pictures alone, texts came" in capsys.readouterr().err
    assert main(["embed", str(trained), "--sound", str(files[0])]) == DataError.exit_code
    assert "embeds pictures alone, sounds came" in capsys.readouterr().err


# --- what is refused before anything runs --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"image_tower": "efficientnet-lite0"}, "give it a tower from scratch"),
        ({"views": None}, "views is null"),
        ({"views": {"number": 3}}, "takes two views"),
        ({"views": {"number": 1}}, "number"),
        ({"views": {"changes": {"rotate": 1}}}, "rotate"),
        ({"objective": {"kind": "contrastive"}, "views": {}}, "views is set, and objective is contrastive"),
        ({"objective": {"kind": "supcon", "classes": False}}, "classes"),
        ({"keywords": False, "scale": 5.0}, "keywords, scale: settings of a dual encoder"),
        ({"spoken": {}}, "spoken: settings of a dual encoder"),
        ({"qformer": {}}, "image_tower is a vit from scratch"),
        ({"objective": MOCO, "trainer": {"parallel": {"zero": 1}}}, r"trainer\.parallel\.zero is 1, and moco"),
    ],
)
def test_what_does_not_go_together_is_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Pretrain.model_validate(SETTINGS | given)


def test_three_views_go_with_those_that_take_any_number(twice: Path, tmp_path: Path) -> None:
    for kind in ("supcon", "margin", "triplet"):
        learn(twice, tmp_path / kind, objective={"kind": kind}, views={"number": 3, "layers": 3}, steps=1)
        assert "head.layers.6.weight" in load_views(tmp_path / kind / "checkpoints/000001").model.state_dict()


@pytest.mark.parametrize(
    "tower", [{"kind": "resnet", "size": 32, "width": 8}, {"kind": "efficientnet-lite", "size": 32}]
)
def test_moco_refuses_batch_norms_by_plan(tower: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="batch norms, which take the statistics of a batch") as caught:
        Pretrain.model_validate(SETTINGS | {"image_tower": tower, "objective": MOCO}).check(MACHINE)
    assert caught.value.place == "stages.pretrain.image_tower"
    Pretrain.model_validate(SETTINGS | {"image_tower": tower}).check(MACHINE)


def test_batch_norm_in_micro_batches_is_warned_of(twice: Path, tmp_path: Path) -> None:
    tower = {"kind": "resnet", "size": 32, "width": 8}
    said = learn(twice, tmp_path / "run", image_tower=tower, steps=1, trainer={"micro_batch": 4})
    assert any("batch norms take their statistics from 4 pictures at a time" in text for text in said)


def test_a_queue_longer_than_the_data_is_warned_of(twice: Path, tmp_path: Path) -> None:
    said = learn(twice, tmp_path / "run", objective=MOCO | {"queue": 500}, steps=1)
    assert any("an older key of the same picture is a negative" in text for text in said)


def test_no_text_tower_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PLAIT_HOME", str(tmp_path / "nothing"))
    Pretrain.model_validate(SETTINGS).check(MACHINE)


def test_the_estimate_counts_views_copies_and_keys() -> None:
    data = Estimate(stage="data", samples={"train": 100, "test-concept": 10})

    def needs(**changes: Any) -> Estimate:
        return Pretrain.model_validate(SETTINGS | {"batch_size": 50} | changes).estimate(MACHINE, {"data": data})

    two, more = needs(), needs(objective={"kind": "supcon"}, views={"number": 4})
    assert two.image_tokens == (6 * 50 * 2 + 7 * 110) * 4
    assert more.memory["activations"] > 1.8 * two.memory["activations"]
    assert more.flops > 1.5 * two.flops
    queued = needs(objective=MOCO)
    assert queued.flops < two.flops
    assert queued.memory["activations"] < two.memory["activations"]
    assert queued.memory["caches"] - two.memory["caches"] == 4 * (queued.params_trainable + 20 * 6)
    small = needs(trainer={"micro_batch": 5})
    assert small.memory["activations"] < two.memory["activations"]
    assert two.params_trainable == sum(w.numel() for w in built_weights())
    assert two.d_image == 16
    assert two.cells == 4


def built_weights() -> list[torch.nn.Parameter]:
    from plait.assembly.views import ViewSizes, build_views

    spec = Pretrain.model_validate(SETTINGS)
    assert not isinstance(spec.image_tower, str)
    model = build_views(spec.image_tower, ViewSizes(d_hidden=8, d_shared=4)).model
    return [weight for weight in model.parameters() if weight.requires_grad]


# --- pictures of shards --------------------------------------------------------------------------------------------


def test_pictures_of_shards_go_to_workers_and_damage_is_named(data_stage: Path) -> None:

    shards = data_stage / "shards"
    with ShardReader(shards, "train") as reader:
        samples = list(reader)
    pictures = ShardPictures(shards, "train", refs=[s.media()[0] for s in samples], ids=[s.id for s in samples])
    assert len(pictures) == len(samples)
    make = partial(views, pictures=pictures, ids=pictures.ids, classes=None, batch_size=4)
    expected = rows(make().step_batches(0))  # opened here: what goes to a worker opens it anew
    with Loader(make(), steps=1, workers=1) as loader:
        assert rows(list(loader.step_batches(0))) == expected
    target = shards / "train-000.tar"
    damaged = bytearray(target.read_bytes())
    rng = random.Random(0)
    for _ in range(200):
        damaged[rng.randrange(len(damaged))] ^= 255
    target.write_bytes(bytes(damaged))
    with pytest.raises(DataError, match=r"train-000\.tar|sample|bytes"):
        ShardPictures(shards, "train", refs=pictures.refs, ids=pictures.ids)[0]
