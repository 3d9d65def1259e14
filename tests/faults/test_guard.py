"""A step goes wrong: a spike (T14), numbers that are not finite (T12, T13), memory that runs out (T15)."""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.tiny_run import CPU, VOCABULARY, Counted, Stream, rows, tiny_model, train
from torch import nn

from plait.core.errors import ConfigError, NumericsError, ResourceError, Stopped
from plait.core.events import Events
from plait.core.files import read_jsonl
from plait.core.tensors import Batch
from plait.training import interrupt as interrupt_module
from plait.training.guard import Guard
from plait.training.loop import fit
from plait.training.monitor import TIMING
from plait.training.optim import SGD, Rates
from plait.training.settings import Hooks, Settings, Stopping

STEPS = 40
BAD = 33
"""Number of the step that is planted, from 1."""


class Spiked(Counted):
    """A loss a hundred times too high where a sample is in the batch."""

    def __init__(self, *samples: str, times: float = 100.0) -> None:
        self.samples, self.times = samples, times

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        if not any(name in self.samples for name in batch.sample_ids):
            return super().__call__(model, batch)
        logits = model(nn.functional.one_hot(batch.token_ids, VOCABULARY).float()).flatten(0, 1)
        each = nn.functional.cross_entropy(logits, batch.labels.flatten(), reduction="none").reshape(batch.labels.shape)
        row = next(at for at, name in enumerate(batch.sample_ids) if name in self.samples)
        factor = torch.ones(len(each), 1)
        factor[row] = self.times
        return {"text": (each * factor).sum()}


def planted(*steps: int, **how: Any) -> Spiked:
    return Spiked(*(f"{step - 1}-1" for step in steps), **how)


def ran(folder: Path, guard: dict[str, Any], **how: Any) -> Any:
    return train(folder, steps=STEPS, guard=Guard(**guard), **({"objective": planted(BAD), "save_every": 5} | how))


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / f"checkpoints/{step:06}/resume/weights.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def records(folder: Path) -> list[dict[str, Any]]:
    found = read_jsonl(folder / "metrics.jsonl")
    return [{key: value for key, value in one.items() if key not in TIMING} for one in found]


# --- spikes (T14) --------------------------------------------------------------------------------------------------


@pytest.mark.row("S4-60")
def test_a_spike_is_warned_of_by_default_and_changes_nothing_else(tmp_path: Path) -> None:
    seen: list[Any] = []
    result = ran(tmp_path / "warn", {}, seen=seen)
    ran(tmp_path / "off", {"spike": "off"})
    assert same(weights(tmp_path / "warn", STEPS), weights(tmp_path / "off", STEPS))
    (warning,) = [event for event in seen if event.kind == "warning"]
    assert warning.text.startswith(f"step {BAD}: loss ")
    assert warning.fields["samples"][0] == f"{BAD - 1}-1"
    assert f"{BAD - 1}-1 (9" in warning.text  # more than 90 % of the loss
    assert (result.spikes, result.skipped) == (1, 0)
    assert records(tmp_path / "warn")[-1]["spikes"] == 1
    assert "spikes" not in records(tmp_path / "off")[-1]


@pytest.mark.row("S4-60")
def test_a_skipped_spike_leaves_weights_and_moments_as_they_were(tmp_path: Path) -> None:
    seen: list[Any] = []
    states: dict[int, dict[str, torch.Tensor]] = {}
    model = tiny_model()
    result = ran(
        tmp_path,
        {"spike": "skip"},
        model=model,
        seen=seen,
        on_step=lambda step, _: states.__setitem__(step, {n: w.clone() for n, w in model.state_dict().items()}),
    )
    assert same(states[BAD], states[BAD - 1])
    assert not same(states[BAD + 1], states[BAD])
    moments = load_file(tmp_path / f"checkpoints/{STEPS:06}/resume/optimizer.safetensors")
    assert float(moments["0.weight/step"]) == STEPS - 1
    assert (result.spikes, result.skipped) == (1, 1)
    (warning,) = [event for event in seen if event.kind == "warning"]
    assert warning.fields["samples"][0] == f"{BAD - 1}-1"
    assert "update left out (1 in a row, 1 in all)" in warning.text


@pytest.mark.row("S4-60")
def test_going_back_restores_the_checkpoint_and_goes_on_with_later_data(tmp_path: Path) -> None:
    seen: list[Any] = []
    result = ran(tmp_path, {"spike": "rewind"}, seen=seen, keep_last=9)
    assert same(weights(tmp_path, BAD), weights(tmp_path, 30))
    moments = [
        load_file(tmp_path / f"checkpoints/{step:06}/resume/optimizer.safetensors")["0.weight/step"]
        for step in (30, BAD)
    ]
    assert float(moments[0]) == float(moments[1]) == 30
    assert (result.step, result.rewound, result.spikes) == (STEPS, 3, 1)
    text = next(event.text for event in seen if event.text.startswith("went back"))
    assert text.startswith(
        "went back to the weights of step 30: the updates of steps 31 to 33 are lost (4 samples, and"
    )
    assert [one["step"] for one in records(tmp_path)] == list(range(1, STEPS + 1))
    assert records(tmp_path)[-1]["rewound"] == 3


@pytest.mark.parametrize("stop", [31, BAD - 1, BAD, BAD + 1])
@pytest.mark.parametrize("spike", ["warn", "skip", "rewind"])
def test_a_run_stopped_around_a_spike_ends_with_the_same_bits(tmp_path: Path, spike: str, stop: int) -> None:
    def interrupt(step: int, _: object) -> None:
        if step == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    how: dict[str, Any] = {"save_every": 10, "keep_last": 1}
    ran(tmp_path / "whole", {"spike": spike}, **how)
    with pytest.raises(Stopped):
        ran(tmp_path / "parts", {"spike": spike}, on_step=interrupt, **how)
    ran(tmp_path / "parts", {"spike": spike}, **how)
    assert same(weights(tmp_path / "parts", STEPS), weights(tmp_path / "whole", STEPS))
    assert records(tmp_path / "parts") == records(tmp_path / "whole")


@pytest.mark.row("S4-63")
def test_what_is_judged_best_where_a_run_goes_back_is_what_is_kept(tmp_path: Path) -> None:
    """Evaluated in the very step that goes back: the value belongs to the weights of the checkpoint."""
    model = tiny_model()
    judged: list[dict[str, torch.Tensor]] = []

    def evaluate() -> float:
        judged.append({name: weight.clone() for name, weight in model.state_dict().items()})
        return -float(len(judged))

    guarded = replace(settings(STEPS), guard=Guard(spike="rewind"), stopping=Stopping(every=BAD), save_every=30)
    result = fit(
        model,
        planted(BAD),
        Stream(),
        settings=replace(guarded, steps=BAD),
        folder=tmp_path,
        events=Events(),
        hooks=Hooks(evaluate=evaluate),
    )
    assert result.best == (BAD, -1.0)
    assert same(judged[0], weights(tmp_path, 30))
    assert same(weights(tmp_path, BAD), judged[0])
    assert same(dict(model.state_dict()), judged[0])


def settings(steps: int) -> Settings:
    return Settings(steps=steps, compute=CPU, rates=Rates(lr=0.05))


def test_a_new_usual_is_the_same_for_a_run_that_was_stopped(tmp_path: Path) -> None:
    objective = planted(*range(25, 99))

    def interrupt(step: int, _: object) -> None:
        if step == 34:  # the tenth
            os.kill(os.getpid(), signal.SIGTERM)

    whole = ran(tmp_path / "whole", {}, objective=objective)
    with pytest.raises(Stopped):
        ran(tmp_path / "parts", {}, objective=objective, on_step=interrupt)
    assert ran(tmp_path / "parts", {}, objective=objective).spikes == whole.spikes
    assert records(tmp_path / "parts") == records(tmp_path / "whole")


def test_going_back_after_a_signal_in_an_evaluation_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The evaluation of the best step is given up, and made when resumed: to that step a spike goes back."""
    monkeypatch.setattr(interrupt_module, "GRACE_S", 0.05)

    def trained(folder: Path, *, stops: bool) -> None:
        def evaluate() -> float:
            if stops and not (folder / "stopped").exists() and (folder / "checkpoints/000030").exists():
                (folder / "stopped").touch()
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(5)
            return 1.0 if (folder / "checkpoints/000030").exists() else 2.0

        folder.mkdir(exist_ok=True)
        how = replace(
            settings(STEPS), guard=Guard(spike="rewind"), stopping=Stopping(every=8), save_every=15, keep_last=1
        )
        fit(
            tiny_model(),
            planted(35),
            Stream(),
            settings=how,
            folder=folder,
            events=Events(),
            hooks=Hooks(evaluate=evaluate),
        )

    trained(tmp_path / "whole", stops=False)
    with pytest.raises(Stopped):
        trained(tmp_path / "parts", stops=True)
    trained(tmp_path / "parts", stops=False)
    assert same(weights(tmp_path / "parts", STEPS), weights(tmp_path / "whole", STEPS))
    assert records(tmp_path / "parts") == records(tmp_path / "whole")


def test_a_signal_ends_the_search_for_the_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupt_module, "GRACE_S", 0.05)

    class Slow(Spiked):
        """Found with a signal on its way, and slow to look into."""

        calls = 0

        def __call__(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
            if any(name in self.samples for name in batch.sample_ids):
                self.calls += 1
                if self.calls == 2:
                    os.kill(os.getpid(), signal.SIGTERM)
                    time.sleep(30)
            return super().__call__(model, batch)

    seen: list[Any] = []
    began = time.monotonic()
    with pytest.raises(Stopped):
        ran(tmp_path, {"spike": "skip"}, objective=Slow(f"{BAD - 1}-1"), seen=seen)
    assert time.monotonic() - began < 20
    assert any("not looked for any longer" in event.text for event in seen)
    assert any("update left out" in event.text for event in seen)


def test_going_back_too_often_or_nowhere_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(NumericsError, match="went wrong again after going back 2 times") as caught:
        ran(tmp_path / "often", {"spike": "rewind", "rewinds": 2}, objective=planted(31, 33, 35))
    assert "34-1" in caught.value.place
    with pytest.raises(NumericsError, match="no checkpoint to go back to: set save_every lower"):
        ran(tmp_path / "nowhere", {"spike": "rewind"}, save_every=0)


def test_a_spike_may_end_the_run_and_the_run_goes_on_with_another_guard(tmp_path: Path) -> None:
    with pytest.raises(NumericsError, match="sigma above the usual") as caught:
        ran(tmp_path, {"spike": "stop"})
    assert caught.value.exit_code == 6
    assert f"step {BAD}, samples {BAD - 1}-1" in caught.value.place
    assert json.loads((tmp_path / "not_finite.json").read_text())[0]["step"] == BAD
    assert ran(tmp_path, {"spike": "skip"}).step == STEPS


def test_ten_spikes_in_a_row_are_the_new_usual_or_the_end(tmp_path: Path) -> None:
    objective = planted(*range(25, 99))
    seen: list[Any] = []
    result = ran(tmp_path / "warn", {}, objective=objective, seen=seen)
    assert result.spikes == 10
    assert any("10 steps in a row: what came is the new usual" in event.text for event in seen)
    with pytest.raises(NumericsError, match="10 steps in a row were left out"):
        ran(tmp_path / "skip", {"spike": "skip"}, objective=objective)


@pytest.mark.row("S4-60")
@pytest.mark.parametrize("spike", ["skip", "rewind"])
def test_a_poisoned_batch_costs_a_guarded_run_nothing_and_another_one_much(tmp_path: Path, spike: str) -> None:
    """Same task, three seeds, plain SGD: what a batch of weight 1,000 does to the loss of the last steps."""
    after: dict[str, list[float]] = {"off": [], spike: [], "unspoiled": []}
    for seed in range(3):
        for name, found in after.items():
            folder = tmp_path / f"{name} {seed}"
            guard = Guard(spike="off" if name == "unspoiled" else name)  # pyright: ignore[reportArgumentType]
            objective = Counted() if name == "unspoiled" else planted(BAD, times=1_000.0)
            train(
                folder,
                model=nn.Sequential(nn.Linear(VOCABULARY, 16), nn.Tanh(), nn.Linear(16, VOCABULARY)),
                batches=Learnable(seed),
                objective=objective,
                steps=60,
                save_every=5,
                guard=guard,
                optimizer=SGD(momentum=0.0),
                rates=Rates(lr=0.5),
                clip_norm=None,
            )
            found.append(statistics.fmean(one["loss"] for one in records(folder)[-10:]))
    for seed in range(3):
        assert after[spike][seed] < 1.2 * after["unspoiled"][seed], after
        assert after["off"][seed] > 1.5 * after["unspoiled"][seed], after


class Learnable(Stream):
    """Rows of one letter: a model without positions can tell the turned row."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def step_batches(self, step: int) -> list[Batch]:
        draw = torch.Generator().manual_seed(1_000 * self.seed + step)
        letters = torch.randint(VOCABULARY, (2, 1), generator=draw).expand(2, 3).contiguous()
        return [rows(letters, f"{step}-0", f"{step}-1")]


# --- numbers that are not finite -----------------------------------------------------------------------------------


def test_not_finite_may_end_the_run_at_once_or_go_back_after_ten(tmp_path: Path) -> None:
    once, ten = planted(BAD, times=math.nan), planted(*range(22, 32), times=math.nan)
    with pytest.raises(NumericsError, match="loss nan") as caught:
        ran(tmp_path / "stop", {"not_finite": "stop"}, objective=once)
    assert f"samples {BAD - 1}-1" in caught.value.place
    with pytest.raises(NumericsError, match="10 steps in a row were left out"):
        ran(tmp_path / "skip", {}, objective=ten)
    result = ran(tmp_path / "rewind", {"not_finite": "rewind"}, objective=ten)
    assert (result.step, result.skipped, result.rewound) == (STEPS, 10, 11)


@pytest.mark.parametrize("first", [{}, {"answers": torch.zeros(2)}], ids=["empty at first", "from the start"])
def test_a_source_with_a_state_cannot_go_back(tmp_path: Path, first: dict[str, torch.Tensor]) -> None:
    class Sampled(Stream):
        def state(self) -> dict[str, torch.Tensor]:
            return first

        def restore(self, tensors: dict[str, torch.Tensor]) -> None: ...

    with pytest.raises(ConfigError, match="holds a state"):
        ran(tmp_path, {"spike": "rewind"}, batches=Sampled())


# --- memory (T15) --------------------------------------------------------------------------------------------------


class Many:
    """Eight rows a step, without dropout's help."""

    def __init__(self, pieces: int = 1) -> None:
        self.pieces = pieces

    def step_batches(self, step: int) -> list[Batch]:
        ids = torch.randint(VOCABULARY, (8, 3), generator=torch.Generator().manual_seed(step))
        size = 8 // self.pieces
        return [
            rows(ids[at : at + size], *(f"{step}-{row}" for row in range(at, at + size))) for at in range(0, 8, size)
        ]


class Tight(Counted):
    """Has room for so many rows, from a step on; says what torch's allocator says."""

    def __init__(self, room: int, *, since: int = 0) -> None:
        self.room, self.since = room, since

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        sums = super().__call__(model, batch)
        if len(batch.token_ids) > self.room and int(batch.sample_ids[0].split("-")[0]) >= self.since:
            torch.empty(2**58)
        return sums


def plain_model() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(VOCABULARY, 8), nn.Tanh(), nn.Linear(8, VOCABULARY))


@pytest.mark.row("S4-60")
@pytest.mark.parametrize("room", [1, 2, 4])
def test_a_step_without_room_is_done_in_smaller_pieces_with_the_same_bits(tmp_path: Path, room: int) -> None:
    seen: list[Any] = []
    train(tmp_path / "tight", model=plain_model(), batches=Many(), objective=Tight(room), seen=seen)
    train(tmp_path / "pieces", model=plain_model(), batches=Many(8 // room))
    assert same(weights(tmp_path / "tight", 6), weights(tmp_path / "pieces", 6))
    warnings = [event for event in seen if event.kind == "warning"]
    assert [event.fields["pieces"] for event in warnings] == [2, 4, 8][: len(warnings)]
    assert warnings[-1].fields["pieces"] == 8 // room
    assert {event.fields["step"] for event in warnings} == {1}
    assert "can't allocate memory" in warnings[0].text
    assert records(tmp_path / "tight") == records(tmp_path / "pieces")


def test_dropout_and_later_steps_too_and_a_resumed_run_stays_in_pieces(tmp_path: Path) -> None:
    def interrupt(step: int, _: object) -> None:
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    train(tmp_path / "whole", batches=Many(), objective=Tight(4, since=2))
    with pytest.raises(Stopped):
        train(tmp_path / "parts", batches=Many(), objective=Tight(4, since=2), on_step=interrupt)
    train(tmp_path / "parts", batches=Many())  # with room again: in pieces all the same
    assert same(weights(tmp_path / "parts", 6), weights(tmp_path / "whole", 6))


def test_one_row_without_room_and_a_guard_that_stops_are_exit_5(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="a micro-batch of 8 rows; it cannot be cut further") as caught:
        train(tmp_path / "row", batches=Many(), objective=Tight(0, since=3))
    assert caught.value.exit_code == 5
    assert caught.value.place == "step 4"
    assert "plait plan" in caught.value.remedy
    assert [path.name for path in (tmp_path / "row/checkpoints").iterdir()] == ["000002"]
    with pytest.raises(ResourceError, match="not to be cut"):
        train(tmp_path / "stop", batches=Many(), objective=Tight(4), guard=Guard(out_of_memory="stop"))


LIMITED = """
import resource, sys
from pathlib import Path
import torch
from torch import nn
torch.set_num_threads(1)
from tests.faults.test_guard import Wide
from tests.tiny_run import train
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(5, 2_000_000 // 8, bias=False), nn.Tanh(), nn.Linear(2_000_000 // 8, 5, bias=False))
nn.functional.linear(torch.ones(2, 2), torch.ones(2, 2))
said = []
def limit(step, values):
    pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (pages + int(sys.argv[2]), resource.RLIM_INFINITY))
result = train(Path(sys.argv[1]), model=model, batches=Wide(), steps=2, seen=said, on_step=limit, save_every=0)
print([event.text for event in said if event.kind == "warning"])
"""


class Wide:
    """Little in the first step, 64 rows in the second: about 200 MB of activations at once."""

    def step_batches(self, step: int) -> list[Batch]:
        count = 64 if step else 2
        ids = torch.randint(VOCABULARY, (count, 1), generator=torch.Generator().manual_seed(step))
        return [rows(ids, *(f"{step}-{row}" for row in range(count)))]


@pytest.mark.row("S4-60")
def test_a_true_limit_of_the_address_space_is_met_with_smaller_pieces(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path), str(120 * 2**20)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr[-2_000:]
    assert "step 2: memory ran out" in done.stdout
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 2
