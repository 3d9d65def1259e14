"""Going on: from every step to the same bits, and what differs or cannot be read is said, never passed over."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.tiny_run import VOCABULARY, Counted, Epochs, files, names, rows, tiny_model, train
from torch import nn

from plait.core.errors import CheckpointError, ConfigError, NumericsError, ResourceError, Stopped
from plait.core.files import read_json, read_jsonl, write_json
from plait.core.tensors import Batch
from plait.training import checkpoint, loop
from plait.training.checkpoint import accepting, verify
from plait.training.optim import SGD, AdamW, Rates
from plait.training.state import Progress, TrainState, restore_state

STEPS = 6


def stop_after(step: int, number: int = signal.SIGTERM) -> Any:
    def on_step(now: int, _: object) -> None:
        if now == step:
            os.kill(os.getpid(), number)

    return on_step


def stopped(folder: Path, step: int, **how: Any) -> None:
    """A run that a signal ends after a step; before the first one for 0."""
    if step:
        with pytest.raises(Stopped):
            train(folder, on_step=stop_after(step), **how)
        return

    class Early(Epochs):
        def step_batches(self, step: int) -> list[Batch]:
            os.kill(os.getpid(), signal.SIGTERM)
            return super().step_batches(step)

    with pytest.raises(Stopped, match="before step 1"):
        train(folder, **(how | {"batches": Early()}))


# --- the same bits -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    train(folder, batches=Epochs())
    return folder


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("step", range(STEPS + 1))
def test_from_every_step_of_accumulating_epochs_to_the_same_bits(
    whole: Path, tmp_path: Path, step: int, beside: bool
) -> None:
    """Steps 2, 4 and 6 are ends of an epoch, the others lie within one; 6 is the last, 0 is before the first."""
    stopped(tmp_path, step, batches=Epochs(), async_save=beside)
    result = train(tmp_path, batches=Epochs(), async_save=beside)
    assert result.resumed_from == step
    assert files(tmp_path).items() >= {k: v for k, v in files(whole).items() if "/000006/" in k}.items()
    assert [r["step"] for r in read_jsonl(tmp_path / "metrics.jsonl")] == list(range(1, STEPS + 1))
    losses = [[r["loss"] for r in read_jsonl(folder / "metrics.jsonl")] for folder in (tmp_path, whole)]
    assert losses[0] == losses[1]


class Rollouts:
    """Sampled from the model with the global generator; three steps learn from the same ones, as in PPO's epochs."""

    def __init__(self, model: nn.Module, *, forget: bool = False) -> None:
        self.model = model
        self.sampled: torch.Tensor | None = None
        self.forget = forget

    def step_batches(self, step: int) -> list[Batch]:
        if step % 3 == 0 or self.sampled is None:
            with torch.no_grad():
                start = nn.functional.one_hot(torch.arange(4) % VOCABULARY, VOCABULARY).float()
                chances = self.model(start).softmax(-1)
                self.sampled = torch.multinomial(chances, 6, replacement=True)
        parts = self.sampled.reshape(2, 2, 6)
        return [rows(part, f"{step}-{i}-0", f"{step}-{i}-1") for i, part in enumerate(parts)]

    def state(self) -> dict[str, torch.Tensor]:
        return {} if self.sampled is None else {"sampled": self.sampled}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.sampled = None if self.forget else tensors.get("sampled")


def ppo_like(folder: Path, **how: Any) -> int:
    model = tiny_model()
    forget = how.pop("forget", False)
    return train(folder, model=model, batches=Rollouts(model, forget=forget), **how).resumed_from


def test_loops_within_loops_resume_anywhere_to_the_same_bits(tmp_path: Path) -> None:
    ppo_like(tmp_path / "whole", save_every=0)
    for step in range(1, STEPS):
        with pytest.raises(Stopped):
            ppo_like(tmp_path / str(step), on_step=stop_after(step), save_every=0)
        assert ppo_like(tmp_path / str(step), save_every=0) == step
        assert files(tmp_path / "whole").items() <= files(tmp_path / str(step)).items(), step
    with pytest.raises(Stopped):
        ppo_like(tmp_path / "forgotten", on_step=stop_after(4), save_every=0)
    ppo_like(tmp_path / "forgotten", save_every=0, forget=True)
    model = "checkpoints/000006/model.safetensors"
    assert files(tmp_path / "whole")[model] != files(tmp_path / "forgotten")[model]  # what is held does matter


def test_an_old_checkpoint_still_loads_every_tensor(tmp_path: Path) -> None:
    """Written by version 0.1.0 in format 1; a format that is left behind needs a way on, or a refusal that says so."""
    old = Path(__file__).parents[1] / "data" / "checkpoint-format-1"
    verify(old)
    model = tiny_model()
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    trainee = TrainState(model)
    optimizer = AdamW().build(trainee.weights, trainee.roles, rates=Rates(lr=0.05))
    assert restore_state(old, trainee, optimizer) == Progress(step=4)
    saved = load_file(old / "resume/weights.safetensors")
    assert saved.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(model.get_parameter(name), value) for name, value in saved.items())
    moments = load_file(old / "resume/optimizer.safetensors")
    held = {f"{name}/{key}": v for name, w in model.named_parameters() for key, v in optimizer.state[w].items()}
    assert moments.keys() == held.keys()
    assert all(torch.equal(held[name], value) for name, value in moments.items())


class Poisoned(Counted):
    """From the fourth step on the loss is not a number."""

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        bad = int(batch.sample_ids[0].split("-")[0]) >= 3
        return {"text": super().__call__(model, batch)["text"] * (float("nan") if bad else 1.0)}


@pytest.mark.row("S4-60")
def test_the_steps_that_were_not_finite_are_all_listed_also_after_a_resume(tmp_path: Path) -> None:
    with pytest.raises(Stopped, match="after step 7"):
        train(tmp_path, objective=Poisoned(), on_step=stop_after(7), steps=50)
    with pytest.raises(NumericsError, match="10 steps in a row"):
        train(tmp_path, objective=Poisoned(), steps=50)
    records = read_json(tmp_path / "not_finite.json")
    assert [record["step"] for record in records] == list(range(4, 14))
    assert records[0]["samples"] == ["3-0", "3-1"]


# --- what differs --------------------------------------------------------------------------------------------------


def test_a_changed_setting_is_refused_with_both_values_and_goes_on_with_consent(tmp_path: Path) -> None:
    stopped(tmp_path, 3)
    faster = {"rates": Rates(lr=0.5)}
    with pytest.raises(ConfigError, match=r"optimizer\.lr: 0\.05 -> 0\.5") as error:
        train(tmp_path, **faster)
    assert "--accept optimizer.lr" in error.value.remedy
    assert names(tmp_path) == ["000002", "000003"]
    seen: list[Any] = []
    with accepting(["optimizer.lr"]):
        assert train(tmp_path, seen=seen, **faster).resumed_from == 3
    assert any("and accepted: optimizer.lr: 0.05 -> 0.5" in e.text for e in seen if e.kind == "warning")
    assert train(tmp_path, **faster).resumed_from == STEPS  # the new value is the checkpoint's own now


def test_settings_newer_than_a_checkpoint_go_on_at_their_defaults_and_are_refused_otherwise(tmp_path: Path) -> None:
    how: dict[str, Any] = {"optimizer": SGD(momentum=0.9), "context": {"data": "a", "packing": True}}
    how["context_defaults"] = {"packing": True}
    train(tmp_path / "whole", **how)
    stopped(tmp_path / "cut", 3, **how)
    folder = tmp_path / "cut/checkpoints/000003"
    state = read_json(folder / "resume/state.json")
    del state["settings"]["optimizer"]["nesterov"], state["settings"]["optimizer"]["layer_decay"]
    del state["settings"]["context"]["packing"], state["settings"]["async_save"], state["settings"]["defaults"]
    write_json(folder / "resume/state.json", state)
    (folder / "manifest.json").unlink()
    checkpoint.write_manifest(folder, step=3)
    with pytest.raises(ConfigError, match=r"1 settings.*optimizer\.nesterov: not set -> true"):
        train(tmp_path / "cut", **how | {"optimizer": SGD(momentum=0.9, nesterov=True)})
    with pytest.raises(ConfigError, match=r"context\.packing: not set -> false"):
        train(tmp_path / "cut", **how | {"context": {"data": "a", "packing": False}})
    seen: list[Any] = []
    assert train(tmp_path / "cut", seen=seen, **how).resumed_from == 3
    assert not any("setting changed" in event.text for event in seen)
    last = {name: data for name, data in files(tmp_path / "whole").items() if "/000006/" in name}
    assert last.items() <= files(tmp_path / "cut").items()


def test_another_batch_size_is_refused_with_both_values(tmp_path: Path) -> None:
    stopped(tmp_path, 3, context={"batch_size": 2})
    with pytest.raises(ConfigError, match=r"context\.batch_size: 2 -> 4"):
        train(tmp_path, context={"batch_size": 4})


def test_another_number_format_or_shape_names_the_tensors_and_changes_nothing(tmp_path: Path) -> None:
    stopped(tmp_path, 3)
    trainee = TrainState(tiny_model().double())
    optimizer = AdamW().build(trainee.weights, trainee.roles, rates=Rates(lr=0.05))
    before = {name: value.clone() for name, value in trainee.weights.items()}
    with pytest.raises(CheckpointError, match=r"0\.bias: saved float32 \[8\], wanted float64 \[8\]"):
        restore_state(tmp_path / "checkpoints/000003", trainee, optimizer)
    assert all(torch.equal(before[name], value) for name, value in trainee.weights.items())


def test_an_optimizer_state_without_its_weight_is_named(tmp_path: Path) -> None:
    stopped(tmp_path, 3)
    trainee = TrainState(tiny_model())
    some = {name: weight for name, weight in trainee.weights.items() if name != "0.bias"}
    optimizer = AdamW().build(some, trainee.roles, rates=Rates(lr=0.05))
    with pytest.raises(CheckpointError, match=r"state is of 1 weights that do not train now: 0\.bias"):
        restore_state(tmp_path / "checkpoints/000003", trainee, optimizer)


def test_tied_weights_are_saved_once_and_stay_tied(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(2)
            self.embed = nn.Linear(VOCABULARY, 8, bias=False)
            self.head = nn.Linear(8, VOCABULARY, bias=False)
            self.head.weight = nn.Parameter(self.embed.weight.detach().t().contiguous())
            self.again = nn.Linear(VOCABULARY, 8, bias=False)
            self.again.weight = self.embed.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(x) + self.again(x))

    nothing: dict[str, Any] = {"save_model": lambda temp: None}
    train(tmp_path / "whole", model=Tied(), **nothing)
    with pytest.raises(Stopped):
        train(tmp_path / "cut", model=Tied(), on_step=stop_after(3), **nothing)
    saved = load_file(tmp_path / "cut/checkpoints/000003/resume/weights.safetensors")
    assert saved.keys() == {"embed.weight", "head.weight"}
    rest = Tied()
    train(tmp_path / "cut", model=rest, **nothing)
    assert rest.again.weight is rest.embed.weight
    last = {k: v for k, v in files(tmp_path / "whole").items() if "/000006/" in k}
    assert last.items() <= files(tmp_path / "cut").items()


# --- what cannot be read or written --------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["weights", "optimizer", "rng"])
def test_a_file_cut_after_it_was_verified_is_an_error_not_the_end_of_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """Mapped, it would be: SIGBUS cannot be caught."""
    stopped(tmp_path, 3)
    sound = checkpoint.verify

    def verify_then_cut(folder: Path) -> None:
        sound(folder)
        os.truncate(folder / f"resume/{part}.safetensors", 100)

    monkeypatch.setattr(checkpoint, "verify", verify_then_cut)
    with pytest.raises(CheckpointError, match="cannot be read any more, though it was whole just now") as error:
        train(tmp_path)
    assert part in error.value.place


@pytest.mark.parametrize(
    "swapped", [("resume/weights.safetensors",) * 2, ("resume/weights.safetensors", "model.safetensors")]
)
def test_a_file_of_another_checkpoint_or_in_anothers_place_is_found(tmp_path: Path, swapped: tuple[str, str]) -> None:
    """Of the same size and readable: only its digest tells."""
    train(tmp_path)
    target, source = swapped
    old = tmp_path / "checkpoints/000004" / source
    shutil.copy(old, tmp_path / "checkpoints/000006" / target)
    seen: list[Any] = []
    assert train(tmp_path, seen=seen).resumed_from == 4
    assert any(f"damaged: sha256 of {target}" in e.text or f"damaged: {target}" in e.text for e in seen)


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("beside", [False, True])
def test_a_disk_that_turns_read_only_is_said_and_metrics_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, beside: bool
) -> None:
    train(tmp_path, steps=2)
    real = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if Path(target).name == "000004":
            raise OSError(code, os.strerror(code), str(target))
        return real(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(ResourceError, match=os.strerror(code)) as error:
        train(tmp_path, async_save=beside)
    assert error.value.exit_code == 5
    assert names(tmp_path) == ["000002"]
    assert [r["step"] for r in read_jsonl(tmp_path / "metrics.jsonl")][:4] == [1, 2, 3, 4]
    monkeypatch.setattr(Path, "rename", real)
    assert train(tmp_path).resumed_from == 2


def test_renames_never_leave_a_folder_so_no_other_disk_comes_into_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another file system answers EXDEV; a temporary folder of the system often is one."""
    real, seen = Path.rename, []

    def watched(self: Path, target: Path) -> Path:
        seen.append((self.parent, Path(target).parent))
        if self.parent != Path(target).parent:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return real(self, target)

    monkeypatch.setattr(Path, "rename", watched)
    train(tmp_path)
    assert len(seen) >= 4


def test_a_copied_checkpoint_is_verified_and_gone_on_from(whole: Path, tmp_path: Path) -> None:
    """Copied, not renamed into place: the manifest is the mark of a whole one, whatever brought it there."""
    stopped(tmp_path / "first", 3, batches=Epochs())
    shutil.copytree(tmp_path / "first/checkpoints/000003", tmp_path / "second/checkpoints/000003")
    assert train(tmp_path / "second", batches=Epochs()).resumed_from == 3
    last = {k: v for k, v in files(whole).items() if "/000006/" in k}
    assert last.items() <= files(tmp_path / "second").items()


def test_whatever_lies_among_checkpoints_and_is_not_ours_stays(tmp_path: Path) -> None:
    strange = ["notes.txt", "000002-copy", ".hidden.tmp", "best"]
    (tmp_path / "checkpoints").mkdir()
    for name in strange:
        (tmp_path / "checkpoints" / name).mkdir() if "." not in name else (tmp_path / "checkpoints" / name).write_text(
            "mine"
        )
    stopped(tmp_path, 3)
    train(tmp_path)
    assert set(names(tmp_path)) == {*strange, "000004", "000006"}


# --- time and signals ----------------------------------------------------------------------------------------------


def test_a_clock_that_jumps_back_changes_nothing_that_lasts(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock on the wall goes back a day at every look, during the run and between save and resume."""
    import time

    now = [2e9]

    def backwards() -> float:
        now[0] -= 86_400
        return now[0]

    monkeypatch.setattr(time, "time", backwards)
    seen: list[Any] = []
    stopped(tmp_path, 3, batches=Epochs(), seen=seen)
    assert train(tmp_path, batches=Epochs(), seen=seen).resumed_from == 3
    assert {k: v for k, v in files(whole).items() if "/000006/" in k}.items() <= files(tmp_path).items()
    left = [e.fields["eta_s"] for e in seen if e.kind == "progress" and e.fields["eta_s"] is not None]
    assert all(eta >= 0 for eta in left)
    assert all(r["seconds"] > 0 for r in read_jsonl(tmp_path / "metrics.jsonl"))


def test_a_step_given_up_leaves_the_state_of_the_step_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half its micro-batches are done, batch statistics have moved, numbers were drawn."""
    monkeypatch.setattr("plait.training.interrupt.GRACE_S", 0.05)

    class Moving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = tiny_model()
            self.norm = nn.BatchNorm1d(VOCABULARY)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(self.norm(x.flatten(0, 1)).unflatten(0, x.shape[:2]))

    train(tmp_path / "whole", model=Moving(), batches=Epochs())
    began = loop.accumulate

    def hang(*args: Any, **named: Any) -> Any:
        sums = began(*args, **named)
        if calls.pop():
            os.kill(os.getpid(), signal.SIGTERM)
            while True:
                torch.rand(1)
        return sums

    calls = [True, False, False, False]
    monkeypatch.setattr(loop, "accumulate", hang)
    with pytest.raises(Stopped, match="stopped after step 3 of 6, which is saved"):
        train(tmp_path / "cut", model=Moving(), batches=Epochs())
    monkeypatch.setattr(loop, "accumulate", began)
    assert read_json(tmp_path / "cut/checkpoints/000003/resume/state.json")["step"] == 3
    assert train(tmp_path / "cut", model=Moving(), batches=Epochs()).resumed_from == 3
    last = {k: v for k, v in files(tmp_path / "whole").items() if "/000006/" in k}
    assert last.items() <= files(tmp_path / "cut").items()
