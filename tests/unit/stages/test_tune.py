"""Tune: what it leaves fits together, a stopped one ends with the bits of a quiet one, and faults are named."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from plait.core.errors import ConfigError, DataError, PlaitError, ResourceError, Stopped
from plait.core.estimate import Machine
from plait.core.events import Event, Events
from plait.core.files import find_model, mark_done, read_done, read_json, read_jsonl
from plait.core.types import Request
from plait.data.shards import ShardReader
from plait.stages.tune import Tune
from plait.training.monitor import TIMING

MACHINE = Machine(cores=2, memory_bytes=2**33, disk_bytes=2**35, gemm_fp32=1e11, gemm_bf16=1e11, measured=True)
PHASES = ("words", "connector", "decoder")
STEPS = {"words": 3, "connector": 2, "decoder": 3}

Folders = dict[str, Path]


def spec(folders: Folders, **settings: Any) -> Tune:
    sizes: dict[str, Any] = {
        "image_tower": str(folders["image"]),
        "resolution": 0,
        "views": 1,
        "decoder": str(folders["decoder"]),
        "dtype": "float32",
        "connector": {"d_hidden": 16, "tokens": 3, "free": 1},
        "words": {"steps": 3, "batch_size": 8},
        "frozen": {"steps": 2},
        "adapt": {"steps": 3, "rank": 2, "targets": ["q_proj", "down_proj"]},
        "batch_size": 4,
        "row": 192,
        "save_every": 1,
        "device": "cpu",
    }
    return Tune.model_validate(sizes | settings)


def without_words(folders: Folders, **settings: Any) -> Tune:
    """With a connector that has no first phase; null takes a setting away."""
    given = spec(folders).model_dump(mode="json", exclude_defaults=True) | {"connector": {"kind": "mlp"}} | settings
    return Tune.model_validate({name: value for name, value in given.items() if name != "words" and value is not None})


def tune(data: Path, stage: Tune, name: str = "02-tune", *, interrupt: tuple[str, int] | None = None) -> Path:
    """Run a stage; ``interrupt`` is Ctrl-C in the step of a phase that has the same number."""
    folder = data.parent / name
    folder.mkdir(exist_ok=True)

    def listener(event: Event) -> None:
        if event.kind == "progress" and interrupt is not None:
            phase, step = interrupt
            if (event.text, event.fields["done"]) == (f"tune: {phase}", step):
                os.kill(os.getpid(), signal.SIGINT)

    stage.run(data, folder, events=Events(listeners=(listener,)))
    return folder


def weights(folder: Path) -> dict[str, Any]:
    """Connector and adapter of the sealed model."""
    model = find_model(folder)
    return load_file(model / "model.safetensors") | load_file(model / "adapter" / "adapter_model.safetensors")


def lasting(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Metrics of each phase without what tells about the machine."""
    return {
        phase: [{k: v for k, v in r.items() if k not in TIMING} for r in read_jsonl(folder / phase / "metrics.jsonl")]
        for phase in PHASES
    }


def shown(folder: Path) -> list[dict[str, Any]]:
    return [read_json(path) for path in sorted((folder / "samples").iterdir())]


def assert_each_learned_in_its_phase(folder: Path, *, connector_goes_on: bool = False) -> None:
    """Only the connector in the first two phases, only the adapter in the last one unless the connector has a rate."""
    first, connector, decoder = (folder / phase / "checkpoints" / f"{steps:06d}" for phase, steps in STEPS.items())
    for before, after, moves in ((first, connector, True), (connector, decoder, connector_goes_on)):
        one, other = (load_file(path / "model.safetensors") for path in (before, after))
        assert one.keys() == other.keys()
        assert torch.equal(one["connectors.image.parts.3.words"], other["connectors.image.parts.3.words"]), (
            "the words are the decoder's own"
        )
        assert (
            torch.equal(one["connectors.image.parts.1.up.weight"], other["connectors.image.parts.1.up.weight"]) != moves
        )
    assert not (connector / "adapter").exists()
    adapter = load_file(decoder / "adapter" / "adapter_model.safetensors")
    assert all(bool(value.abs().sum() > 0) for value in adapter.values()), "an adapter did not leave its start"


@pytest.mark.row("S2-10", "S2-32")
def test_all_files_are_there_and_the_sealed_model_gives_the_answers_shown_last(
    data_stage: Path, tiny_folders: Folders
) -> None:
    from plait.assembly.multimodal import load_multimodal
    from plait.inference.build import build_engine, encode_pictures

    folder = tune(data_stage, spec(tiny_folders))
    done = read_done(folder)
    assert done is not None
    assert done["summary"]["steps"] == STEPS
    assert done["summary"]["model"] == "decoder/checkpoints/000003"
    assert done["summary"]["skipped_steps"] == 0
    with Image.open(folder / "batches" / "first.png") as drawing:
        drawing.load()
        assert drawing.width > 300
    for phase, steps in STEPS.items():
        assert [record["step"] for record in read_jsonl(folder / phase / "metrics.jsonl")] == [*range(1, steps + 1)]
        assert (folder / phase / "results.csv").is_file()
        assert (folder / phase / "checkpoints" / f"{steps:06d}" / "plait.json").is_file()
    # Steps count on over the phases; of four times in a phase, few steps leave one each.
    assert [(record["step"], record["phase"]) for record in shown(folder)] == [
        (0, "untuned"),
        (3, "words"),
        (4, "connector"),
        (5, "connector"),
        (6, "decoder"),
        (7, "decoder"),
        (8, "decoder"),
    ]
    samples = shown(folder)[-1]["samples"]
    assert {(sample["split"], sample["task"]) for sample in samples} == {
        ("test-concept", "name.en"),
        ("test-concept", "yesno"),
    }
    built = load_multimodal(find_model(folder))
    with ShardReader(data_stage / "shards", "instruct-test-concept") as asked:
        of_id = {sample.id: sample for sample in asked}
    with ShardReader(data_stage / "shards", "test-concept") as reader:
        engine = build_engine(built, encode_pictures(built, reader.media))
        answers = engine(
            [Request(id=s["id"], turns=of_id[s["id"]].turns[:-1], max_new_tokens=10) for s in samples],
        )
    assert [answer.text.strip() for answer in answers] == [sample["answer"] for sample in samples]
    assert_each_learned_in_its_phase(folder)


@pytest.mark.row("S4-64")
@pytest.mark.row("S4-62", "S2-27")
@pytest.mark.parametrize(
    ("dtype", "trainer"),
    [
        ("float16", {"optimizer": {"kind": "lion"}, "schedule": {"kind": "wsd"}, "layer_decay": 0.5}),
        ("float32", {"optimizer": {"kind": "muon"}, "schedule": {"kind": "inverse-sqrt"}, "average": {"decay": 0.5}}),
    ],
)
def test_the_trainer_reaches_every_phase(
    data_stage: Path, tiny_folders: Folders, dtype: str, trainer: dict[str, Any]
) -> None:
    """The phases train with it, and record it; a phase that was cut off goes on to the same weights."""
    stage = spec(tiny_folders, dtype=dtype, trainer=trainer, adapt={"steps": 3, "rank": 2, "lr_connector": 1e-3})
    folder = tune(data_stage, stage)
    for phase in STEPS:
        newest = sorted((folder / phase / "checkpoints").iterdir())[-1]
        settings = read_json(newest / "resume" / "state.json")["settings"]
        assert settings["optimizer"]["kind"] == trainer["optimizer"]["kind"]
        assert settings["schedule"]["kind"] == trainer["schedule"]["kind"]
        assert settings["optimizer"].get("layer_decay", 1) == trainer.get("layer_decay", 1)
        assert settings["dtype"] == ("float32" if phase == "words" else dtype)
        assert (newest / "resume" / "average.safetensors").is_file() == ("average" in trainer)
        records = read_jsonl(folder / phase / "metrics.jsonl")
        assert all(record["loss"] is not None and record["skipped"] == 0 for record in records)
    with pytest.raises(KeyboardInterrupt):
        tune(data_stage, stage, "03-tune", interrupt=("decoder", 2))
    again = tune(data_stage, stage, "03-tune")
    assert all(torch.equal(value, weights(again)[name]) for name, value in weights(folder).items())


def test_what_no_phase_can_compute_is_said_before_the_first(
    data_stage: Path, tiny_folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(_: str) -> None:
        raise ResourceError("there is no compiler", place="trainer.compile")

    monkeypatch.setattr("plait.models.compiled._require_compiler", missing)
    with pytest.raises(ResourceError, match="no compiler"):
        tune(data_stage, spec(tiny_folders, trainer={"compile": True}))
    assert not any((data_stage.parent / "02-tune" / phase).exists() for phase in PHASES)


def test_without_a_cache_it_learns_the_same(data_stage: Path, tiny_folders: Folders) -> None:
    cached = tune(data_stage, spec(tiny_folders))
    fresh = tune(data_stage, spec(tiny_folders, cache=False), "02-fresh")
    kept = weights(cached)
    assert {
        name for name, weight in weights(fresh).items() if not torch.allclose(weight, kept[name], atol=1e-6)
    } == set()


def test_a_step_in_parts_and_batches_of_like_lengths_train_the_same_questions(
    data_stage: Path, tiny_folders: Folders
) -> None:
    whole = tune(data_stage, spec(tiny_folders))
    cut = tune(data_stage, spec(tiny_folders, trainer={"schedule": {"warmup": 0.08}, "micro_batch": 2}), "02-cut")
    kept = weights(whole)
    assert {n for n, w in weights(cut).items() if not torch.allclose(w, kept[n], atol=2e-5)} == set()
    assert (whole / "batches/first.png").read_bytes() == (cut / "batches/first.png").read_bytes()
    grouped = tune(data_stage, spec(tiny_folders, group_by_length=3, row=0), "02-grouped")
    units = [[record["units/next_token"] for record in lasting(folder)["connector"]] for folder in (whole, grouped)]
    assert len(units[0]) == len(units[1])
    assert all(count > 0 for count in units[1])


def test_rows_of_one_question_learn_the_same(data_stage: Path, tiny_folders: Folders) -> None:
    kept = weights(tune(data_stage, spec(tiny_folders)))
    alone = weights(tune(data_stage, spec(tiny_folders, packing=False), "02-alone"))
    assert {n for n, w in alone.items() if not torch.allclose(w, kept[n], atol=2e-5)} == set()


def test_a_connector_with_a_rate_learns_on_in_the_last_phase(data_stage: Path, tiny_folders: Folders) -> None:
    adapt = {"steps": 3, "rank": 2, "targets": ["q_proj"], "lr_connector": 1e-3}
    folder = tune(data_stage, spec(tiny_folders, adapt=adapt))
    assert_each_learned_in_its_phase(folder, connector_goes_on=True)
    last = read_jsonl(folder / "decoder" / "metrics.jsonl")[-1]
    assert {"lr", "lr/connectors"} <= last.keys()


@pytest.mark.parametrize(
    ("drop", "said"),
    [
        ({"least": 0.5, "most": 0.3}, "least 0.5 is above most 0.3"),
        ({"start": 0.6, "full": 0.6}, "start 0.6 is not before full 0.6"),
        ({"most": 1.0}, "less than 1"),
    ],
)
def test_shares_of_features_that_cannot_be_dropped_are_refused(drop: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Tune.model_validate({"adapt": {"drop": drop}})


EXPERTS = {"kind": "new", "model_type": "mixtral", "mixture": {"experts": 3}}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"connector": {"tokens": 2, "free": 2}}, "2 of 2 tokens are free"),
        ({"connector": {"kind": "mlp"}, "new_pictures": 0.5}, "new_pictures: only the connector `words`"),
        ({"decoder": {"kind": "new"}, "adapt": {"rank": 4}}, "adapt.rank is 4: an adapter on a new decoder"),
        ({"decoder": {"kind": "new", "d": 10, "heads": 4}}, "4 heads do not divide a width of 10"),
        ({"image_tower": "pretrain", "resolution": 64}, "resolution is 64"),
        ({"connector": {"kind": "mlp"}, "frozen": {"steps": 0}}, "the connector would stay as it was drawn"),
        ({"connector": {"kind": "mlp"}, "lr_gates": 0.1}, "the connector `mlp` has no gates"),
        ({"cache": False, "trainer": {"workers": 1}}, "trainer.workers is 1, but cache is false"),
        ({"trainer": {"parallel": {"expert": 2}}}, "trainer.parallel.expert is 2: the decoder has no experts"),
        (
            {"decoder": EXPERTS, "trainer": {"parallel": {"expert": 2}}},
            "trainer.parallel.expert is 2, which does not divide 3 experts",
        ),
        ({"decoder": EXPERTS, "trainer": {"compile": True}}, "layers with experts cannot be compiled"),
    ],
)
def test_settings_that_cannot_go_together_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Tune.model_validate(settings)


CONNECTORS: dict[str, dict[str, Any]] = {
    "linear": {"kind": "linear", "shuffle": 2},
    "mlp": {"kind": "mlp", "d_hidden": 8},
    "qformer": {"kind": "qformer", "queries": 3, "d": 16, "depth": 2, "heads": 2},
    "resampler": {"kind": "resampler", "queries": 3, "depth": 1, "heads": 2},
    "gated-cross-attention": {
        "kind": "gated-cross-attention",
        "every": 1,
        "heads": 2,
        "resampler": {"kind": "resampler", "queries": 3, "depth": 1, "heads": 2},
    },
}


@pytest.mark.row("S2-09", "S4-44")
@pytest.mark.parametrize("kind", CONNECTORS)
def test_any_connector_learns_in_both_phases_and_the_sealed_model_answers(
    data_stage: Path, tiny_folders: Folders, kind: str
) -> None:
    from plait.assembly.multimodal import load_multimodal
    from plait.inference.build import build_engine, encode_pictures

    adapt = {"steps": 2, "rank": 2, "targets": ["q_proj"], "lr_connector": 1e-3}
    folder = tune(data_stage, without_words(tiny_folders, connector=CONNECTORS[kind], adapt=adapt))
    done = read_done(folder)
    assert done is not None
    assert done["summary"]["steps"] == {"connector": 2, "decoder": 2}
    one, other = (
        load_file(folder / phase / "checkpoints" / "000002" / "model.safetensors") for phase in ("connector", "decoder")
    )
    moved = [name for name in one if not torch.equal(one[name], other[name])]
    # Behind a gate that is 0 at the start, the second step is the first that moves what is read.
    assert moved, kind
    assert len(one) == len(other)
    samples = shown(folder)[-1]["samples"]
    built = load_multimodal(find_model(folder))
    assert built.slots_per_picture == (1 if kind == "gated-cross-attention" else built.tokens_per_picture)
    with ShardReader(data_stage / "shards", "instruct-test-concept") as asked:
        of_id = {sample.id: sample for sample in asked}
    with ShardReader(data_stage / "shards", "test-concept") as reader:
        engine = build_engine(built, encode_pictures(built, reader.media))
        answers = engine(
            [Request(id=s["id"], turns=of_id[s["id"]].turns[:-1], max_new_tokens=10) for s in samples],
        )
    assert [answer.text.strip() for answer in answers] == [sample["answer"] for sample in samples]


@pytest.mark.row("S2-11")
def test_gates_have_a_rate_of_their_own(data_stage: Path, tiny_folders: Folders) -> None:
    adapt = {"steps": 1, "rank": 2, "targets": ["q_proj"]}
    settings = without_words(tiny_folders, connector=CONNECTORS["gated-cross-attention"], adapt=adapt, lr_gates=0.2)
    folder = tune(data_stage, settings)
    weights = load_file(folder / "connector" / "checkpoints" / "000002" / "model.safetensors")
    opened = [float(value.abs()) for name, value in weights.items() if name.endswith("gate")]
    others = [float(value.abs().max()) for name, value in weights.items() if name.endswith("norm.weight")]
    assert max(opened) > 0.1, "Adam's first update is the rate"
    assert max(abs(1 - value) for value in others) < 0.05


@pytest.mark.row("S2-09")
@pytest.mark.parametrize("model_type", ["qwen2", "gpt2", "mixtral"])
def test_a_new_decoder_learns_as_a_whole_and_loads_without_plait(
    data_stage: Path, tiny_folders: Folders, model_type: str
) -> None:
    from transformers import AutoModelForCausalLM

    from plait.assembly.multimodal import load_multimodal

    new = {"kind": "new", "model_type": model_type, "d": 16, "depth": 2, "heads": 2, "context": 256}
    new["tokenizer"] = str(tiny_folders["decoder"])
    new |= {"mixture": {"experts": 3}} if model_type == "mixtral" else {}
    adapt = {"steps": 2, "lr_connector": 1e-3}
    folder = tune(data_stage, without_words(tiny_folders, decoder=new, frozen=None, adapt=adapt))
    built = load_multimodal(find_model(folder))
    theirs = AutoModelForCausalLM.from_pretrained(find_model(folder) / "decoder")
    assert theirs.config.model_type == model_type
    ids = torch.tensor([[5, 9, 42, 7]])
    with torch.inference_mode():
        torch.testing.assert_close(theirs(ids).logits, built.language.model(ids).logits)
    fresh = tune(data_stage, without_words(tiny_folders, decoder=new, frozen=None, adapt=adapt | {"steps": 1}), "other")
    other = load_multimodal(find_model(fresh)).language.model.get_input_embeddings().weight
    assert not torch.equal(other, built.language.model.get_input_embeddings().weight)


@pytest.mark.row("S0-50")
def test_full_fine_tuning_moves_every_weight_of_the_decoder(data_stage: Path, tiny_folders: Folders) -> None:
    folder = tune(data_stage, without_words(tiny_folders, adapt={"steps": 2, "rank": 0}))
    old = load_file(tiny_folders["decoder"] / "model.safetensors")
    new = load_file(find_model(folder) / "decoder" / "model.safetensors")
    assert old.keys() == new.keys()
    assert [name for name in old if torch.equal(old[name].float(), new[name].float())] == []
    assert not (find_model(folder) / "adapter").exists()


def test_stopped_in_every_phase_it_ends_like_one_that_ran_through(data_stage: Path, tiny_folders: Folders) -> None:
    """With another number of workers at each start, which changes nothing."""
    whole = tune(data_stage, spec(tiny_folders), "whole")
    parts = data_stage.parent / "parts"
    for workers, (phase, step) in enumerate((("words", 2), ("connector", 1), ("decoder", 2))):
        stage = spec(tiny_folders, trainer={"schedule": {"warmup": 0.08}, "workers": workers})
        with pytest.raises(Stopped):
            tune(data_stage, stage, "parts", interrupt=(phase, step))
        assert multiprocessing.active_children() == []
        assert read_done(parts) is None
        assert max(p.name for p in (parts / phase / "checkpoints").glob("0*")) == f"{step:06d}"
    tune(data_stage, spec(tiny_folders), "parts")
    one, other = weights(whole), weights(parts)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert lasting(whole) == lasting(parts)
    assert shown(whole) == shown(parts)
    assert read_done(whole) == read_done(parts)
    # Killed after the last checkpoint, before the seal: nothing is left to train, and all there is to say is said.
    (parts / "done.json").unlink()
    tune(data_stage, spec(tiny_folders), "parts")
    assert read_done(whole) == read_done(parts)


def test_other_settings_or_data_do_not_continue_a_phase(data_stage: Path, tiny_folders: Folders) -> None:
    with pytest.raises(Stopped):
        tune(data_stage, spec(tiny_folders), interrupt=("words", 2))
    with pytest.raises(ConfigError, match=r"context\.words\.lr: "):
        tune(data_stage, spec(tiny_folders, words={"steps": 3, "batch_size": 8, "lr": 0.5}))
    done = read_done(data_stage)
    assert done is not None
    mark_done(data_stage, kind="data", previous=None, summary=done["summary"] | {"other": "data"})
    with pytest.raises(ConfigError, match=r"context\.data: "):
        tune(data_stage, spec(tiny_folders))


# --- what cannot be trained ----------------------------------------------------------------------------------------


def test_without_a_data_stage_nothing_begins(tmp_path: Path, tiny_folders: Folders) -> None:
    for previous in (None, tmp_path):
        with pytest.raises(DataError, match="no finished 'data' stage before this one"):
            spec(tiny_folders).run(previous, tmp_path, events=Events())
    assert list(tmp_path.iterdir()) == []


def untrained(data: Path) -> bool:
    return not list((data.parent / "02-tune").glob("*/metrics.jsonl"))


def test_tasks_that_the_data_do_not_have_are_named_before_training(data_stage: Path, tiny_folders: Folders) -> None:
    with pytest.raises(ConfigError, match="no sample of the tasks left, count") as caught:
        tune(data_stage, spec(tiny_folders, tasks={"left": 1.0, "count": 1.0}))
    assert caught.value.place == "stages.tune.tasks"
    assert untrained(data_stage)


def test_a_row_that_nobody_sets_holds_samples_that_are_never_drawn(data_stage: Path, tiny_folders: Folders) -> None:
    short: dict[str, Any] = {"words": {"steps": 1, "batch_size": 8}, "frozen": {"steps": 1}, "batch_size": 1, "row": 0}
    folder = tune(data_stage, spec(tiny_folders, adapt={"steps": 1, "rank": 2}, **short))
    assert read_done(folder)["summary"]["lines"]


def test_a_sample_longer_than_a_row_is_named_before_training(data_stage: Path, tiny_folders: Folders) -> None:
    with pytest.raises(DataError, match=r"are longer than a row of 64 tokens, the longest \d+") as caught:
        tune(data_stage, spec(tiny_folders, row=64))
    assert caught.value.place.startswith("sample ")
    assert caught.value.remedy.startswith("set row to ")
    assert untrained(data_stage)


def test_data_that_ask_for_no_name_are_refused(
    data_stage: Path, tiny_folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    from plait.stages.tuning import phases

    def nameless(*args: Any, **named: Any) -> Any:
        choose = named.pop("choose")

        def without_names(split: str, samples: Any) -> Any:
            return [sample for sample in choose(split, samples) if sample.meta["task"] != "name.en"]

        return whole(*args, **named, choose=without_names)

    whole = phases.read_questions
    monkeypatch.setattr(phases, "read_questions", nameless)
    with pytest.raises(DataError, match="no question of the training split asks for a name") as caught:
        tune(data_stage, spec(tiny_folders))
    assert caught.value.place == str(data_stage)


def refused(stage: Tune, kind: type[PlaitError], setting: str) -> PlaitError:
    with pytest.raises(kind) as caught:
        stage.check(MACHINE)
    assert caught.value.place == f"stages.tune.{setting}"
    assert caught.value.remedy
    return caught.value


def test_what_is_not_here_is_said_before_anything_runs(
    tiny_folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec(tiny_folders).check(MACHINE)
    refused(spec(tiny_folders, image_tower="foo"), ConfigError, "image_tower")
    refused(spec(tiny_folders, decoder=str(tmp_path / "none")), ConfigError, "decoder")
    monkeypatch.setenv("PLAIT_HOME", str(tmp_path))
    fault = refused(spec(tiny_folders, decoder="smollm2"), ResourceError, "decoder")
    assert fault.remedy == "run `plait data fetch smollm2`"
    if sys.platform != "darwin":
        refused(spec(tiny_folders, device="mps"), ResourceError, "device")


def test_checking_loads_no_torch(tiny_folders: Folders) -> None:
    code = f"""
import sys
from plait.core.estimate import Machine
from plait.stages.tune import Tune
machine = Machine(cores=1, memory_bytes=1, disk_bytes=1, gemm_fp32=1.0, gemm_bf16=1.0, measured=False)
Tune(image_tower={str(tiny_folders["image"])!r}, decoder={str(tiny_folders["decoder"])!r}).check(machine)
print("torch" in sys.modules)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["False"]
