from __future__ import annotations

import csv
import math
import os
import random
import signal
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import nn

from plait.core.device import Compute
from plait.core.errors import ConfigError, NumericsError, Stopped
from plait.core.events import Events
from plait.core.files import read_json, read_jsonl
from plait.core.tensors import IGNORE, Batch
from plait.training.loop import fit
from plait.training.monitor import TIMING
from plait.training.optim import SGD, AdamW, Rates
from plait.training.precision import autocast
from plait.training.schedule import Constant, Cosine
from plait.training.settings import Hooks, Settings

VOCABULARY, WIDTH, LENGTH = 11, 6, 5
CPU = Compute(device="cpu", dtype="float32", threads=torch.get_num_threads(), why=())
HALF = Compute(device="cpu", dtype="float16", threads=torch.get_num_threads(), why=())


class Language(nn.Module):
    """Embedding, hidden layer, head: enough for a masked cross-entropy."""

    def __init__(self, *, dropout: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.hidden = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(self.norm(torch.tanh(self.hidden(self.embed(token_ids))))))


class NextToken:
    """Cross-entropy on labelled positions, and a second term so that terms are told apart."""

    needs_global_batch = False

    def count(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {"text": (batch.labels != IGNORE).sum(), "size": torch.tensor(len(batch.sample_ids))}

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        logits = model(batch.token_ids)
        text = nn.functional.cross_entropy(
            logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE, reduction="sum"
        )
        return {"text": text, "size": logits.square().mean(dim=(1, 2)).sum()}


def rows(trained: Sequence[int], seed: int = 0) -> Batch:
    """A batch whose row ``i`` has ``trained[i]`` labelled positions."""
    generator = torch.Generator().manual_seed(seed)
    token_ids = torch.randint(VOCABULARY, (len(trained), LENGTH), generator=generator)
    labels = torch.randint(VOCABULARY, (len(trained), LENGTH), generator=generator)
    labels[torch.arange(LENGTH) >= torch.tensor(trained)[:, None]] = IGNORE
    ids = tuple(f"s{seed}-{i}" for i in range(len(trained)))
    return Batch(
        token_ids=token_ids, labels=labels, segment_ids=torch.ones_like(labels), media={}, item_row={}, sample_ids=ids
    )


class Stream:
    """Two micro-batches of unequal size a step, a pure function of the step."""

    def step_batches(self, step: int) -> list[Batch]:
        return [rows((5, 2, 3), seed=2 * step + 1), rows((1,), seed=2 * step + 2)]


def settings(steps: int = 4, **changes) -> Settings:
    plain = {
        "steps": steps,
        "compute": CPU,
        "rates": Rates(lr=0.02),
        "optimizer": AdamW(weight_decay=0.1),
        "schedule": Cosine(warmup=1),
    }
    return Settings(**(plain | changes))


def train(folder, model=None, *, batches=None, objective=None, events=None, hooks=None, **changes):
    model = model or Language(dropout=0.3)
    result = fit(
        model,
        objective or NextToken(),
        batches or Stream(),
        settings=settings(**changes),
        folder=folder,
        events=events or Events(),
        hooks=hooks,
    )
    return model, result


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [n for n in one if not torch.equal(one[n], other[n])] == []


def lasting(folder) -> list[dict]:
    """Metrics without what tells about the machine."""
    return [{k: v for k, v in record.items() if k not in TIMING} for record in read_jsonl(folder / "metrics.jsonl")]


# --- the step ------------------------------------------------------------------------------------------------------


def test_fit_takes_the_steps_of_a_loop_written_by_hand(tmp_path):
    model, result = train(tmp_path, Language(), steps=6, clip_norm=0.4)
    reference = Language()
    decay = [w for w in reference.parameters() if w.ndim >= 2]
    rest = [w for w in reference.parameters() if w.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=0.02
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: 0.5 + 0.5 * math.cos(math.pi * (n - 1) / 5) if n else 0
    )
    losses = []
    for step in range(6):
        token_ids = torch.cat([b.token_ids for b in Stream().step_batches(step)])
        labels = torch.cat([b.labels for b in Stream().step_batches(step)])
        logits = reference(token_ids)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()) + logits.square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(reference.parameters(), 0.4)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    for name, weight in reference.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), weight, rtol=1e-4, atol=1e-6)
    assert [r["loss"] for r in read_jsonl(tmp_path / "metrics.jsonl")] == pytest.approx(losses, rel=1e-5)
    assert result.values["loss"] == pytest.approx(losses[-1], rel=1e-5)


@pytest.mark.row("S4-60")
def test_the_gradient_is_clipped_to_its_global_norm(tmp_path):
    before = weights(Language())
    plain = {"rates": Rates(lr=1.0), "optimizer": SGD(), "schedule": Constant()}
    model, result = train(tmp_path, Language(), steps=1, clip_norm=0.01, **plain)
    moved = math.sqrt(sum(float((weights(model)[n] - before[n]).square().sum()) for n in before))
    assert result.values["grad_norm"] > 0.01  # what is recorded is the norm before
    assert moved == pytest.approx(0.01, rel=1e-3)


def test_term_weights_and_report_only_terms(tmp_path):
    heavy, _ = train(tmp_path / "a", Language(), steps=2, weights={"size": 0.0})
    _, result = train(tmp_path / "b", Language(), steps=2, weights={"size": 2.0, "text": 0.5})
    assert result.values["loss"] == pytest.approx(0.5 * result.values["loss/text"] + 2 * result.values["loss/size"])

    class TextOnly(NextToken):
        def count(self, batch):
            return {"text": super().count(batch)["text"]}

    alone, _ = train(tmp_path / "c", Language(), steps=2, objective=TextOnly())
    assert_same(weights(heavy), weights(alone))


@pytest.mark.row("S4-64")
def test_frozen_weights_stay_and_have_no_optimizer_state(tmp_path):
    model = Language()
    model.embed.requires_grad_(False)
    before = weights(model)
    train(tmp_path, model)
    after = weights(model)
    assert torch.equal(before["embed.weight"], after["embed.weight"])
    assert not torch.equal(before["head.weight"], after["head.weight"])
    from safetensors import safe_open

    with safe_open(tmp_path / "checkpoints/000004/resume/optimizer.safetensors", "pt") as file:
        assert not [key for key in file.keys() if key.startswith("embed")]  # noqa: SIM118  (not a dict)


def test_a_stateful_objective_learns_and_is_restored(tmp_path):
    class Weighted(nn.Module):
        needs_global_batch = False

        def __init__(self) -> None:
            super().__init__()
            self.log_weight = nn.Parameter(torch.zeros(()))
            self.register_buffer("seen", torch.zeros(()))

        def count(self, batch):
            return {"text": NextToken().count(batch)["text"]}

        def forward(self, model, batch):
            self.seen += len(batch.sample_ids)
            text = NextToken()(model, batch)["text"]
            return {"text": text * self.log_weight.exp() - self.log_weight * self.count(batch)["text"]}

    whole, half = Weighted(), Weighted()
    train(tmp_path / "whole", objective=whole, steps=4)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "half", objective=half, hooks=Hooks(on_step=interrupt_at(2)), steps=4)
    rest = Weighted()
    train(tmp_path / "half", objective=rest, steps=4)
    assert whole.log_weight.item() != 0.0
    assert torch.equal(rest.log_weight, whole.log_weight)
    assert float(rest.seen) == float(whole.seen) == 16


@pytest.mark.row("S2-27")
def test_bfloat16_trains_float32_masters_to_nearly_the_float32_loss(tmp_path):
    half = Compute(device="cpu", dtype="bfloat16", threads=CPU.threads, why=())
    model = Language().to(torch.bfloat16)
    start = weights(model)
    low, result = train(tmp_path / "low", model, steps=12, compute=half)
    exact = Language()
    exact.load_state_dict(start)
    _, reference = train(tmp_path / "exact", exact, steps=12)
    assert {w.dtype for w in low.parameters()} == {torch.float32}
    assert result.values["loss"] == pytest.approx(reference.values["loss"], rel=0.02)
    with autocast("cpu", "bfloat16"):
        assert low(rows((1,)).token_ids).dtype == torch.bfloat16  # products really ran in bfloat16


# --- numbers that are not finite -----------------------------------------------------------------------------------


class Poisoned(NextToken):
    """Not finite in the micro-batches of some steps: the loss itself, or only its gradient."""

    def __init__(self, steps: Sequence[int], kind: str = "loss") -> None:
        self.bad = {f"s{2 * step + 1}-0" for step in steps}
        self.kind = kind

    def __call__(self, model, batch):
        sums = super().__call__(model, batch)
        if batch.sample_ids[0] in self.bad:
            zero = model.head.bias.sum() * 0
            sums["text"] = sums["text"] + (float("nan") if self.kind == "loss" else torch.sqrt(zero))  # d sqrt(0) = inf
        return sums


class Normed(Language):
    """With running statistics, which a forward changes before the loss is known."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_norm = nn.BatchNorm1d(WIDTH)

    def forward(self, token_ids):
        return self.head(self.batch_norm(self.embed(token_ids).flatten(0, 1)).unflatten(0, token_ids.shape))


@pytest.mark.row("S4-60")
@pytest.mark.parametrize(("kind", "compute"), [("loss", CPU), ("gradient", CPU), ("loss", HALF)])
def test_a_step_that_is_not_finite_changes_nothing_and_is_named(tmp_path, kind, compute):
    seen, states = [], []
    model = Normed()
    hooks = Hooks(on_step=lambda step, values: states.append(weights(model)))
    _, result = train(
        tmp_path,
        model,
        objective=Poisoned([1], kind),
        events=Events(listeners=(seen.append,)),
        hooks=hooks,
        steps=3,
        save_every=1,
        keep_last=9,
        compute=compute,
    )
    assert_same(states[0], states[1])  # weights, running mean and variance, batch counter
    assert not torch.equal(states[1]["head.weight"], states[2]["head.weight"])
    assert (result.skipped, result.overflowed) == (1, 0)
    assert [r["skipped"] for r in read_jsonl(tmp_path / "metrics.jsonl")] == [0, 1, 1]
    (warning,) = [e for e in seen if e.kind == "warning"]
    assert warning.fields["step"] == 2
    assert "s3-0" in warning.fields["samples"]
    if kind == "loss":
        assert warning.fields["samples"] == ["s3-0"]  # only the row at fault
        assert read_jsonl(tmp_path / "metrics.jsonl")[1]["loss"] is None
    # The optimizer has taken two steps, not three; and nothing was saved while a step was left out.
    from safetensors.torch import load_file

    assert float(load_file(tmp_path / "checkpoints/000003/resume/optimizer.safetensors")["head.weight/step"]) == 2
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["000001", "000003"]


@pytest.mark.row("S4-60")
@pytest.mark.parametrize("compute", [CPU, HALF])
def test_ten_in_a_row_stop_the_run_and_keep_the_last_good_checkpoint(tmp_path, compute):
    with pytest.raises(NumericsError, match="10 steps in a row were left out") as error:
        train(tmp_path, objective=Poisoned(range(3, 99)), steps=50, save_every=1, compute=compute)
    assert error.value.exit_code == 6
    assert "000003" in error.value.remedy
    assert "s25-0" in error.value.place
    skipped = read_json(tmp_path / "not_finite.json")  # every step of the row, with the samples to look at
    assert [record["step"] for record in skipped] == list(range(4, 14))
    assert skipped[0] == {"step": 4, "loss": "nan", "grad_norm": "nan", "samples": ["s7-0"]}
    assert str(tmp_path / "not_finite.json") in error.value.remedy
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 13
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["000002", "000003"]


@pytest.mark.parametrize("compute", [CPU, HALF])
def test_nine_in_a_row_do_not(tmp_path, compute):
    _, result = train(tmp_path, objective=Poisoned([*range(1, 10), *range(11, 20)]), steps=21, compute=compute)
    assert result.skipped == 18


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    def poison(step, values):
        if step == 2:
            with torch.no_grad():
                model.head.bias[0] = float("inf")

    model = Language()
    with pytest.raises(NumericsError, match=r"1 weights are not finite after step 2: head\.bias"):
        train(tmp_path, model, hooks=Hooks(on_step=poison), save_every=1)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["000001"]


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prepare", "changes", "message"),
    [
        (lambda m: m.requires_grad_(False), {}, "no weight is trainable"),
        (lambda m: m.eval(), {}, "every module is in eval mode"),
        (lambda m: m, {"steps": 0}, "steps is 0"),
        (lambda m: m, {"clip_norm": 0.0}, "clip_norm is 0.0"),
        (lambda m: m, {"keep_last": 0}, "keep_last is 0"),
    ],
)
def test_refused_before_anything_is_trained(tmp_path, prepare, changes, message):
    with pytest.raises(ConfigError, match=message) as error:
        train(tmp_path, prepare(Language()), **changes)
    assert error.value.remedy


# --- hooks, progress, results --------------------------------------------------------------------------------------


def test_a_hook_may_draw_numbers_and_switch_modes(tmp_path):
    def sample(step, values):
        random.random()
        np.random.rand(3)
        torch.rand(5)
        noisy.eval()

    def save(folder):
        torch.rand(5)
        (folder / "model.txt").write_text("as the caller likes")

    quiet, _ = train(tmp_path / "quiet", save_every=1)
    noisy = Language(dropout=0.3)
    train(tmp_path / "noisy", noisy, hooks=Hooks(on_step=sample, save_model=save), save_every=1)
    assert_same(weights(quiet), weights(noisy))
    assert (tmp_path / "noisy/checkpoints/000004/model.txt").read_text() == "as the caller likes"


def test_the_seed_decides_not_what_ran_before(tmp_path):
    one, _ = train(tmp_path / "one", seed=3)
    torch.rand(1000)
    two, _ = train(tmp_path / "two", seed=3)
    other, _ = train(tmp_path / "other", seed=4)
    assert_same(weights(one), weights(two))
    assert not torch.equal(one.head.weight, other.head.weight)


def test_progress_and_results_are_complete(tmp_path):
    seen = []
    train(
        tmp_path,
        events=Events(listeners=(seen.append,)),
        hooks=Hooks(task="tune", flops=lambda batch: 10.0 * batch.token_ids.numel(), peak_flops=1e6),
    )
    progress = [e for e in seen if e.kind == "progress"]
    assert [(e.text, e.fields["done"], e.fields["total"]) for e in progress] == [("tune", n, 4) for n in range(1, 5)]
    fields = set(progress[-1].fields)
    assert {
        "loss",
        "loss/text",
        "loss/size",
        "lr",
        "grad_norm",
        "samples_per_s",
        "tokens_per_s",
        "data_wait",
        "eta_s",
    } <= fields
    assert {"memory_bytes", "mfu", "skipped"} <= fields
    with (tmp_path / "results.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["step"] for row in table] == ["1", "2", "3", "4"]
    assert float(table[2]["loss"]) == read_jsonl(tmp_path / "metrics.jsonl")[2]["loss"]
    assert table[0]["units/text"] == "11.0"
    assert table[0]["samples"] == "4"


# --- stopping and going on -----------------------------------------------------------------------------------------


def interrupt_at(step: int, number: int = signal.SIGINT):
    def on_step(now, values):
        if now == step:
            os.kill(os.getpid(), number)

    return on_step


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_step_and_the_rest_gives_the_same_bits(tmp_path, number):
    whole, _ = train(tmp_path / "whole", steps=5)
    handler = signal.getsignal(number)
    with pytest.raises(Stopped, match="stopped after step 2 of 5, which is saved") as stopped:
        train(tmp_path / "cut", hooks=Hooks(on_step=interrupt_at(2, number)), steps=5)
    assert stopped.value.exit_code == 128 + number
    assert signal.getsignal(number) is handler
    rest, result = train(tmp_path / "cut", Language(dropout=0.3, seed=99), steps=5)
    assert result.resumed_from == 2
    assert_same(weights(whole), weights(rest))
    assert lasting(tmp_path / "whole") == lasting(tmp_path / "cut")


def test_a_signal_while_waiting_for_data_stops_before_the_next_step(tmp_path):
    class Slow(Stream):
        def step_batches(self, step):
            if step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().step_batches(step)

    with pytest.raises(Stopped, match="after step 2"):
        train(tmp_path, batches=Slow())
    assert [r["step"] for r in lasting(tmp_path)] == [1, 2]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["000002"]


def test_a_second_signal_stops_at_once(tmp_path):
    def twice(step, values):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Stopped, match="at once"):
        train(tmp_path, hooks=Hooks(on_step=twice))
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_finished_run_is_not_run_again_but_may_be_made_longer(tmp_path):
    first, done = train(tmp_path, schedule=Constant())
    seen = []
    again, result = train(
        tmp_path, Language(dropout=0.3, seed=5), events=Events(listeners=(seen.append,)), schedule=Constant()
    )
    assert result.checkpoint == done.checkpoint
    assert (result.step, result.resumed_from, dict(result.values)) == (4, 4, {})
    assert_same(weights(first), weights(again))
    assert any(e.text.startswith("resumed at step 4 of 4") for e in seen)

    longer, _ = train(tmp_path, Language(dropout=0.3, seed=5), steps=6, schedule=Constant())
    whole, _ = train(tmp_path / "whole", steps=6, schedule=Constant())
    assert_same(weights(longer), weights(whole))
    with pytest.raises(ConfigError, match="steps is 5, but 6 are done"):
        train(tmp_path, steps=5, schedule=Constant())


def test_more_steps_bend_a_falling_schedule_and_that_is_said(tmp_path):
    train(tmp_path, steps=4)
    seen = []
    train(tmp_path, steps=8, events=Events(listeners=(seen.append,)))
    assert any("8 steps, not 4, bend the schedule" in e.text for e in seen if e.kind == "warning")


def test_a_resumed_run_says_what_it_restored(tmp_path):
    train(tmp_path)
    seen = []
    train(tmp_path, events=Events(listeners=(seen.append,)))
    (note,) = [e for e in seen if "restored" in e.fields]
    assert list(note.fields["restored"]) == ["model", "optimizer", "schedule", "random numbers", "data cursor"]
