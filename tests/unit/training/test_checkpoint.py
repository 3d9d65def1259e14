from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from torch import nn

from plait.core.errors import CheckpointError, ConfigError
from plait.core.events import Events
from plait.core.files import read_json
from plait.training.checkpoint import (
    Checkpoints,
    accepting,
    changed_settings,
    check_origin,
    list_checkpoints,
    verify,
    write_manifest,
)
from plait.training.generators import rng_kept
from plait.training.optim import SGD, AdamW, Rates
from plait.training.state import Origin, Progress, TrainState, restore_state, save_state

ORIGIN = Origin(
    settings={
        "steps": 9,
        "log_every": 1,
        "optimizer": {"lr": 0.1, "betas": [0.9, 0.99]},
        "context": {"data": "a", "steps": 9},
    },
    fingerprint={"torch": "2.13", "threads": 2},
    frozen="f" * 64,
)


class Model(nn.Module):
    def __init__(self, seed: int = 0, width: int = 3) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.base = nn.Linear(3, 3).requires_grad_(False)
        self.frozen_norm = nn.BatchNorm1d(3).requires_grad_(False).eval()
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, width, bias=False)
        self.register_buffer("derived", torch.ones(2), persistent=False)

    def forward(self, x):
        return self.head(self.norm(self.frozen_norm(self.base(x))))


def trained(spec=None, *, steps: int = 3, seed: int = 0, width: int = 3):
    model = Model(seed, width)
    trainee = TrainState(model)
    optimizer = (spec or AdamW()).build(trainee.weights, trainee.roles, rates=Rates(lr=0.1, parts={"head": 0.2}))
    for _ in range(steps):
        model(torch.randn(8, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, trainee, optimizer


def save(folder, trainee, optimizer, *, step: int = 3, origin: Origin = ORIGIN):
    return Checkpoints(folder, keep_last=2, events=Events()).save(
        step,
        lambda temp: save_state(
            temp, trainee, optimizer, progress=Progress(step=step, skipped=2, skipped_in_row=1), origin=origin
        ),
    )


def draw() -> list:
    return [
        random.random(),
        random.gauss(0, 1),
        np.random.rand(),
        np.random.randn(),
        torch.rand(3).tolist(),
        torch.randn(3).tolist(),
    ]


# --- state ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [AdamW(), SGD(), SGD(momentum=0.9)])
def test_everything_comes_back_to_the_bit(tmp_path, spec):
    model, trainee, optimizer = trained(spec)
    random.gauss(0, 1)  # leaves half a pair cached, as does the next line
    np.random.randn()
    numbers: list = []

    def write_and_draw(temp):  # at once: beartype, which checks types here, draws from Python's generator itself
        save_state(temp, trainee, optimizer, progress=Progress(step=3, skipped=2, skipped_in_row=1), origin=ORIGIN)
        numbers.extend(draw())

    folder = Checkpoints(tmp_path, keep_last=1, events=Events()).save(3, write_and_draw)

    other, fresh, blank = trained(spec, steps=1, seed=5)
    other.base.load_state_dict(model.base.state_dict())
    expected = Progress(step=3, skipped=2, skipped_in_row=1)
    assert restore_state(folder, fresh, blank) == expected
    assert draw() == numbers
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    torch.manual_seed(1)
    for one, opt in ((model, optimizer), (other, blank)):
        with rng_kept():
            one(torch.randn(8, 3)).square().sum().backward()
        opt.step()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), f"{name} after one more step"


def test_only_safetensors_and_json_are_written(tmp_path):
    _, trainee, optimizer = trained()
    folder = save(tmp_path, trainee, optimizer)
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    resume = {"state.json", "weights.safetensors", "optimizer.safetensors", "rng.safetensors"}
    assert files == {"manifest.json"} | {f"resume/{name}" for name in resume}
    for name in files:
        data = (folder / name).read_bytes()
        if name.endswith(".json"):
            json.loads(data)
        else:
            length = int.from_bytes(data[:8], "little")
            assert isinstance(json.loads(data[8 : 8 + length]), dict)


def test_state_is_what_training_changes_and_nothing_else():
    trainee = TrainState(Model())
    assert set(trainee.tensors()) == {
        "norm.weight",
        "norm.bias",
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
        "head.weight",
    }


def test_an_objective_may_hold_the_model_and_adds_only_what_is_its_own():
    class Objective(nn.Module):
        def __init__(self, model: Model) -> None:
            super().__init__()
            self.model = model
            self.scale = nn.Parameter(torch.ones(()))

    model = Model()
    trainee = TrainState(model, Objective(model))
    assert set(trainee.weights) == {"norm.weight", "norm.bias", "head.weight", "objective.scale"}
    AdamW().build(trainee.weights, trainee.roles, rates=Rates())  # torch refuses a weight that comes twice


@pytest.mark.row("S4-64")
def test_the_frozen_digest_sees_every_frozen_bit_and_no_other():
    model = Model()
    digest = TrainState(model).frozen_digest()
    with torch.no_grad():
        model.head.weight.add_(1)
        model.norm.running_mean.add_(1)
        model.derived.add_(1)
    assert TrainState(model).frozen_digest() == digest
    model.frozen_norm.running_mean[0] = 1e-30
    assert TrainState(model).frozen_digest() != digest
    model.frozen_norm.running_mean[0] = 0
    assert TrainState(model).frozen_digest() == digest
    model.base.weight.data = model.base.weight.data.to(torch.bfloat16)
    assert TrainState(model).frozen_digest() != digest


def test_a_checkpoint_of_another_model_names_the_tensors_and_changes_nothing(tmp_path):
    folder = save(tmp_path, *trained()[1:])
    model, trainee, optimizer = trained(width=4)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(
        CheckpointError,
        match=r"1 of 6 tensors do not fit: head\.weight: saved float32 \[3, 3\], wanted float32 \[4, 3\]",
    ):
        restore_state(folder, trainee, optimizer)
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in before.items())


@pytest.mark.parametrize("number", [0, 3])
def test_another_format_is_refused_with_what_to_do(tmp_path, number):
    _, trainee, optimizer = trained()
    folder = save(tmp_path, trainee, optimizer)
    state = read_json(folder / "resume/state.json") | {"format": number}
    (folder / "resume/state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match=f"resume format {number}, this version reads 1 to 2") as error:
        restore_state(folder, trainee, optimizer)
    assert "version" in error.value.remedy


def test_restored_state_does_not_hang_on_the_file(tmp_path):
    _, trainee, optimizer = trained()
    folder = save(tmp_path, trainee, optimizer)
    restore_state(folder, trainee, optimizer)
    before = {k: v.clone() for s in optimizer.state.values() for k, v in s.items()}
    path = folder / "resume/optimizer.safetensors"
    path.write_bytes(b"\0" * path.stat().st_size)
    assert all(torch.equal(v, before[k]) for k, v in list(optimizer.state.values())[-1].items())


# --- folders -------------------------------------------------------------------------------------------------------


def write(text: str):
    return lambda folder: (folder / "model.txt").write_text(text)


def test_rotation_keeps_the_newest(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep_last=2, events=Events())
    for step in (5, 90, 100, 1_000_000):
        checkpoints.save(step, write(str(step)))
    assert [p.name for p in list_checkpoints(tmp_path / "c")] == ["000100", "1000000"]
    assert checkpoints.newest() == tmp_path / "c/1000000"
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["000100", "1000000"]


def test_rotation_waits_for_the_new_one_to_verify(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep_last=1, events=Events())
    checkpoints.save(1, write("good"))

    def cut_after_sealing(folder, *, step):
        write_manifest(folder, step=step)
        (folder / "model.txt").write_text("")

    monkeypatch.setattr("plait.training.checkpoint.write_manifest", cut_after_sealing)
    with pytest.raises(CheckpointError, match=r"model\.txt has 0 bytes of 3"):
        checkpoints.save(2, write("bad"))
    verify(tmp_path / "000001")
    assert checkpoints.newest() == tmp_path / "000001"
    assert (tmp_path / "quarantine/000002/model.txt").is_file()


def test_an_empty_folder_has_no_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path / "new" / "checkpoints", keep_last=1, events=Events())
    assert checkpoints.newest() is None


def test_what_is_not_ours_is_left_alone(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=1, events=Events())
    checkpoints.save(1, write("1"))
    (tmp_path / ".DS_Store").write_text("")
    (tmp_path / "best").mkdir()
    (tmp_path / "000001" / "README.md").write_text("a note of mine")
    checkpoints.save(2, write("2"))
    assert checkpoints.newest() == tmp_path / "000002"
    assert {p.name for p in tmp_path.iterdir()} == {".DS_Store", "best", "000002"}


# --- settings ------------------------------------------------------------------------------------------------------


def origin(**changes) -> Origin:
    return Origin(settings={**ORIGIN.settings, **changes}, fingerprint=ORIGIN.fingerprint, frozen=ORIGIN.frozen)


@pytest.fixture
def saved(tmp_path):
    return save(tmp_path, *trained()[1:])


def test_same_settings_pass_in_silence(saved):
    seen: list = []
    check_origin(saved, origin(optimizer={"lr": 0.1, "betas": (0.9, 0.99)}), events=Events(listeners=(seen.append,)))
    assert seen == []  # a tuple read back as a list is no change


def test_changed_settings_are_refused_with_a_diff(saved):
    changed = origin(optimizer={"lr": 0.2, "betas": [0.9, 0.99]}, context={"data": "b", "steps": 9}, seed=1)
    with pytest.raises(ConfigError, match="3 settings are not those of the checkpoint") as error:
        check_origin(saved, changed, events=Events())
    assert 'optimizer.lr: 0.1 -> 0.2; context.data: "a" -> "b"; seed: not set -> 1' in error.value.cause
    assert error.value.remedy.endswith("(free to change: log_every, steps)"), "of those that may change, what is there"
    assert error.value.exit_code == 3


def test_a_change_that_somebody_accepts_is_a_warning_and_the_refusal_says_how(saved):
    changed = origin(optimizer={"lr": 0.2, "betas": [0.9, 0.99]}, context={"data": "b", "steps": 9})
    seen: list = []
    with accepting(["optimizer.lr"]), pytest.raises(ConfigError, match="1 settings are not") as error:
        check_origin(saved, changed, events=Events(listeners=(seen.append,)))
    assert "go on all the same with `plait resume RUN --accept context.data`" in error.value.remedy
    assert seen == []
    with accepting(["optimizer.lr", "context.data"]):
        check_origin(saved, changed, events=Events(listeners=(seen.append,)))
    assert [(e.kind, e.text) for e in seen] == [
        ("warning", "setting changed since the checkpoint, and accepted: optimizer.lr: 0.1 -> 0.2"),
        ("warning", 'setting changed since the checkpoint, and accepted: context.data: "a" -> "b"'),
    ]
    with pytest.raises(ConfigError, match="2 settings"):  # consent ends with the block
        check_origin(saved, changed, events=Events())


def test_another_kind_of_optimizer_cannot_be_accepted(saved):
    with pytest.raises(ConfigError, match=r"optimizer\.kind") as error:
        check_origin(saved, origin(optimizer={"kind": "sgd"}), events=Events())
    assert "--accept" not in error.value.remedy
    with pytest.raises(ConfigError, match=r"optimizer\.kind cannot be accepted"), accepting(["optimizer.kind"]):
        pass


def test_steps_of_a_part_are_not_said_to_be_free(saved):
    with pytest.raises(ConfigError, match=r"context\.words\.steps: not set -> 3") as error:
        check_origin(saved, origin(context={"data": "a", "words": {"steps": 3}}), events=Events())
    assert error.value.remedy.endswith("(free to change: log_every)")


def test_free_settings_may_change_and_are_said(saved):
    seen: list = []
    check_origin(
        saved,
        origin(steps=20, log_every=5, context={"data": "a", "steps": 20}),
        events=Events(listeners=(seen.append,)),
    )
    assert [e.text.split(": ", 1)[1] for e in seen] == ["steps: 9 -> 20", "log_every: 1 -> 5", "context.steps: 9 -> 20"]


def test_a_name_that_is_free_at_the_top_is_not_free_deeper(saved):
    with pytest.raises(ConfigError, match=r"optimizer\.steps"):
        check_origin(saved, origin(optimizer={"lr": 0.1, "betas": [0.9, 0.99], "steps": 3}), events=Events())


def test_another_machine_is_warned_about_not_refused(saved):
    seen: list = []
    elsewhere = Origin(settings=ORIGIN.settings, fingerprint={"torch": "2.14", "threads": 2}, frozen=ORIGIN.frozen)
    check_origin(saved, elsewhere, events=Events(listeners=(seen.append,)))
    (warning,) = seen
    assert warning.kind == "warning"
    assert warning.text == "resumed elsewhere, so the result will not be bit-identical: torch: 2.13 then, 2.14 now"


def test_other_frozen_weights_are_refused(saved):
    other = Origin(settings=ORIGIN.settings, fingerprint=ORIGIN.fingerprint, frozen="e" * 64)
    with pytest.raises(CheckpointError, match="frozen weights are others"):
        check_origin(saved, other, events=Events())


def test_a_setting_that_appears_or_goes_is_a_change():
    assert changed_settings({"a": 1, "b": {}}, {"a": 1, "b": {"c": None}}) == {
        "b": "b: {} -> not set",
        "b.c": "b.c: not set -> null",
    }
