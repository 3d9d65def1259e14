"""A text tower from scratch in the pretrain stage: it learns with its own vocabulary, goes on, is saved, and serves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.rank_script import cases_of
from tests.unit.stages.test_pretrain_scratch import MACHINE, Killed, pictures, tensors
from tests.unit.stages.test_pretrain_scratch import pretrain as learn

from plait.assembly.dual import load_dual
from plait.assembly.text_scratch import RawTokens
from plait.core.errors import CheckpointError, ConfigError, DataError
from plait.core.estimate import Estimate
from plait.core.files import read_done, read_json, read_jsonl
from plait.data.byte_pairs import BytePairs
from plait.data.shards import ShardReader
from plait.stages.pretrain import Pretrain

VIT = {"kind": "vit", "size": 16, "patch": 8, "d": 16, "depth": 1, "heads": 2, "dropout": 0.1}
GPT = {"kind": "gpt", "vocabulary": 300, "max_tokens": 24, "d": 16, "depth": 2, "heads": 2, "dropout": 0.1}
SETTINGS: dict[str, Any] = {
    "image_tower": VIT,
    "text_tower": GPT,
    "steps": 6,
    "batch_size": 8,
    "d_hidden": 8,
    "d_shared": 4,
    "save_every": 2,
    "seed": 3,
}


def pretrain(data: Path, folder: Path, *, stop: str = "", **changes: Any) -> list[str]:
    return learn(data, folder, SETTINGS, stop=stop, **changes)


@pytest.mark.parametrize("locked", [False, True], ids=["both learn", "the picture tower is locked"])
def test_a_killed_run_goes_on_to_the_same_bits(
    locked: bool, data_stage: Path, tmp_path: Path, tiny_folders: dict[str, Path]
) -> None:
    image = {"image_tower": str(tiny_folders["image"]), "resolution": 32} if locked else {}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    said = pretrain(data_stage, whole, **image)
    assert any("text tower from scratch:" in text for text in said)
    with pytest.raises(Killed):
        pretrain(data_stage, stopped, stop="checkpoint 000004 saved", **image)
    assert read_done(stopped) is None
    trainer = Pretrain().trainer.model_copy(update={"workers": 1})
    said = pretrain(data_stage, stopped, trainer=trainer, **image)
    assert any(text.startswith("resumed at step 4") for text in said)
    assert tensors(stopped) == tensors(whole)
    for name in ("scores.json", "predictions.jsonl", "samples/000006.json"):
        assert (stopped / name).read_bytes() == (whole / name).read_bytes(), name
    last, first = (load_dual(whole / "checkpoints" / step).model for step in ("000006", "000004"))
    assert last.text_tower is not None
    assert first.text_tower is not None
    before = dict(first.text_tower.named_parameters())
    assert [n for n, w in last.text_tower.named_parameters() if torch.equal(w, before[n])] == []
    assert (last.tower is None) == locked


@pytest.fixture
def trained(data_stage: Path, tmp_path: Path) -> Path:
    pretrain(data_stage, tmp_path / "02-pretrain", steps=2)
    return tmp_path / "02-pretrain" / "checkpoints" / "000002"


def test_the_saved_model_answers_like_the_trained_one(trained: Path, data_stage: Path) -> None:
    dual = load_dual(trained)
    shown = pictures(data_stage)
    predictions = read_jsonl(trained.parents[1] / "predictions.jsonl")
    found = dual.embed_pictures([shown[p["id"]] for p in predictions])
    for vector, prediction in zip(found, predictions, strict=True):
        said = dual.embed_texts([answer["text"] for answer in prediction["top"]])
        expected = torch.tensor([answer["score"] for answer in prediction["top"]])
        torch.testing.assert_close(said @ vector, expected, atol=1e-4, rtol=0)  # scores are kept with four places
    with pytest.raises(DataError, match="tokens, the model takes 24"):
        dual.embed_texts(["a much longer text than any of the names that it was trained with, 苹果"])


def test_the_vocabulary_is_that_of_the_texts_of_training(trained: Path, data_stage: Path) -> None:
    with ShardReader(data_stage / "shards", "train") as reader:
        texts = sorted({str(sample.answer("name.en")) for sample in reader})
    expected = BytePairs.learn(texts, size=300)
    assert (trained / "tokenizer.json").read_text(encoding="utf-8") == expected.written()
    dual = load_dual(trained)
    assert isinstance(dual.text.encoder, RawTokens)
    assert dual.text.encoder.spec.vocabulary == expected.size
    record = read_json(trained / "plait.json")["composition"]["text"]
    assert record["scratch"]["head"] is False


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda at: (at / "tokenizer.json").unlink(), "cannot be read"),
        (lambda at: (at / "tokenizer.json").write_text("{"), "no tokenizer"),
        (
            lambda at: (at / "tokenizer.json").write_text(BytePairs.learn(["b"], size=300).written()),
            "the text tower 'from scratch' has digest",
        ),
    ],
    ids=["missing", "damaged", "another"],
)
def test_a_vocabulary_that_does_not_fit_is_refused(trained: Path, edit: Any, match: str) -> None:
    edit(trained)
    (trained / "manifest.json").unlink()  # the change is on purpose
    with pytest.raises(CheckpointError, match=match):
        load_dual(trained)


def test_micro_batches_lead_to_the_weights_of_the_whole_batch(data_stage: Path, tmp_path: Path) -> None:
    still = {
        "image_tower": VIT | {"dropout": 0.0},
        "text_tower": GPT | {"dropout": 0.0},
        "dropout": 0.0,
        "lr": 0.05,
    }
    for name, micro in (("whole", 0), ("parts", 3)):
        trainer = {"micro_batch": micro, "optimizer": {"kind": "sgd"}}
        pretrain(data_stage, tmp_path / name, trainer=trainer, **still)
    whole, parts, before = (
        load_dual(tmp_path / name).model.state_dict()
        for name in ("whole/checkpoints/000006", "parts/checkpoints/000006", "whole/checkpoints/000004")
    )
    for name, value in whole.items():
        moved = float((value - before[name]).norm())
        assert float((parts[name] - value).norm()) <= 1e-4 * moved + 1e-6, name


@pytest.mark.row("S0-40")
def test_two_processes_make_what_one_makes(data_stage: Path) -> None:
    """Three steps of 9 pairs at once, and of 5 and 4 in pieces; ZeRO-3; CLIP's loss and SigLIP's."""
    from safetensors.torch import load_file

    found = cases_of(Path(__file__).with_name("words_ranks.py"), str(data_stage))
    for case, said in found.items():
        if case != "log":
            assert set(said) == {"done"}, found["log"]

    def weights(case: str, step: str = "000003") -> dict[str, torch.Tensor]:
        return load_file(data_stage.parent / case / "checkpoints" / step / "model.safetensors")

    for one, two in (
        ("ddp-contrastive-1", "ddp-contrastive-2"),
        ("ddp-contrastive-1", "zero-contrastive-2"),
        ("ddp-sigmoid-1", "ddp-sigmoid-2"),
    ):
        right, start, other = weights(one), weights(one, "000002"), weights(two)
        assert right.keys() == other.keys()
        for name, value in right.items():
            moved = float((value - start[name]).norm())
            assert float((other[name] - value).norm()) <= 1e-4 * moved + 1e-6, (two, name)
            assert moved > 0 or "types" in name, name


# --- settings and estimate -----------------------------------------------------------------------------------------


def test_positions_are_the_towers_own() -> None:
    assert Pretrain.model_validate(SETTINGS).max_tokens == 24
    with pytest.raises(ValueError, match=r"max_tokens is 64, text_tower\.max_tokens is 24"):
        Pretrain.model_validate(SETTINGS | {"max_tokens": 64})
    again = Pretrain.model_validate(Pretrain.model_validate(SETTINGS).model_dump(mode="json"))
    assert again == Pretrain.model_validate(SETTINGS)


def test_what_cannot_be_is_said_before_anything_runs(data_stage: Path, tmp_path: Path) -> None:
    small = Pretrain.model_validate(SETTINGS | {"text_tower": GPT | {"vocabulary": 100}})
    with pytest.raises(ConfigError, match="100 ids does not hold all bytes"):
        small.check(MACHINE)
    uneven = Pretrain.model_validate(SETTINGS | {"text_tower": GPT | {"heads": 3}})
    with pytest.raises(ConfigError, match="3 heads"):
        uneven.check(MACHINE)
    with pytest.raises(ValueError, match="a Q-Former reads texts itself"):
        Pretrain.model_validate({"text_tower": GPT, "qformer": {"queries": 2}})
    short = GPT | {"max_tokens": 8, "vocabulary": 259}
    with pytest.raises(DataError, match="longer than 8 tokens"):
        pretrain(data_stage, tmp_path / "run", text_tower=short)


@pytest.mark.parametrize("image", [VIT, "efficientnet-lite0"], ids=["scratch", "locked"])
def test_the_estimate_counts_the_tower(image: Any) -> None:
    data = Estimate(stage="data", samples={"train": 100, "test-concept": 10})

    def needs(text: Any) -> Estimate:
        stage = Pretrain.model_validate({"image_tower": image, "text_tower": text, "steps": 10})
        return stage.estimate(MACHINE, {"data": data})

    frozen, own = needs("minilm"), needs(GPT)
    deeper = needs(GPT | {"depth": 4})
    assert deeper.params_trainable - own.params_trainable == 2 * (12 * 16 * 16 + 13 * 16)
    assert deeper.flops > own.flops
    assert sum(deeper.moments.values()) > sum(own.moments.values())
    assert own.params_frozen < frozen.params_frozen
    assert any("the text tower learns from scratch" in note for note in own.notes)


def test_a_record_of_another_kind_is_refused(trained: Path) -> None:
    record = read_json(trained / "plait.json")
    record["composition"]["text"]["scratch"]["kind"] = "t5"
    (trained / "plait.json").write_text(json.dumps(record))
    (trained / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="the text tower's spec"):
        load_dual(trained)
