"""A sound model passes every way of computing its step; each planted fault is found, and said with its place."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.rank_script import cases_of
from tests.tiny_run import CPU, VOCABULARY, Counted, rows
from torch import Tensor, nn

from plait.core.device import Compute
from plait.core.tensors import Batch, Patches
from plait.training.finding import Finding
from plait.training.gradient_check import check_gradients
from plait.training.held import compare, held, part_of
from plait.training.optim import Rates
from plait.training.settings import Settings


class Rows:
    """Six rows of three to eight trained tokens."""

    def step_batches(self, step: int) -> list[Batch]:
        ids = torch.randint(VOCABULARY, (6, 8), generator=torch.Generator().manual_seed(step + 3))
        batch = rows(ids, *"abcdef")
        for row in range(5):
            batch.labels[row, 3 + row :] = -100
        return [batch]


@dataclass(frozen=True)
class Inner:
    dropout: float = 0.5
    eps: float = 1e-5


@dataclass(frozen=True)
class Outer:
    inner: Inner = field(default_factory=Inner)
    scale: float = 0.5


class Sized(nn.Module):
    """Drops at a rate that stands in its sizes, as Plait's own models do."""

    def __init__(self) -> None:
        super().__init__()
        self.outer, self.module = Outer(), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.module(x)
        return self.outer.scale * nn.functional.dropout(x, self.outer.inner.dropout, self.training)


class Model(nn.Module):
    """Two linear layers, with something in between."""

    def __init__(self, between: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.between, self.last = nn.Linear(VOCABULARY, 8), between, nn.Linear(8, VOCABULARY)

    def forward(self, hot: Tensor) -> Tensor:
        hidden = self.first(hot.to(self.first.weight.dtype))
        return self.last(self.between(hidden) if self.between is not None else hidden)


class MeanOfMeans(Counted):
    """A mean over the micro-batch, counted as one."""

    def count(self, batch: Batch) -> dict[str, Tensor]:
        return {"text": torch.tensor(1)}

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"text": super().__call__(model, batch)["text"] / (batch.labels != -100).sum()}


class Scaled(Counted):
    """Counts are right, the sum is over rows of means."""

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"text": super().__call__(model, batch)["text"] / len(batch.sample_ids)}


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden.flatten(0, 1)).view_as(hidden)


class Cached(nn.Module):
    """Adds what the forward pass before left."""

    left: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        found = hidden if self.left is None else hidden + self.left.to(hidden)
        self.left = hidden.detach().mean((0, 1))
        return found


class Noisy(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * (1 + 0.1 * torch.rand_like(hidden))


class Running(nn.Module):
    """A row sees those above it."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + 0.1 * hidden.cumsum(0)


class Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.inner(hidden).detach()


class Closed(nn.Module):
    """A gate that begins at zero, as LoRA's second factor does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.gate = nn.Linear(8, 8), nn.Parameter(torch.zeros(8))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.gate * self.inner(hidden)


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.size = nn.Parameter(torch.zeros(()))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + (self.size * 0).sqrt()


def findings(model: nn.Module, objective: Any = None, **changes: Any) -> dict[str, Finding]:
    given = {"dtype": changes.pop("dtype", "auto"), "rate": changes.pop("rate", None)}
    batches = changes.pop("batches", None) or Rows()
    settings = Settings(steps=3, **({"compute": CPU, "rates": Rates(lr=0.05)} | changes))
    found = check_gradients(model, objective or Counted(), batches, settings=settings, **given)
    return {finding.name: finding for finding in found}


SPLITS = ("split 6 x 1", "split 3 + 3", "split 1 + 1 + 4")


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_sound_model_passes_and_is_put_back(dtype: str) -> None:
    model = Model(nn.Dropout(0.5))
    model.first.bias.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    drawn = torch.get_rng_state()
    found = findings(model, dtype=dtype)
    assert {finding.status for finding in found.values()} == {"ok"}
    assert {*SPLITS, "rows reversed", "once more", "mean of means", "what is frozen"} <= found.keys()
    assert found["whole batch"].facts["counts"] == {"text": 3 + 4 + 5 + 6 + 7 + 8}
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(tensor.dtype == torch.float32 for tensor in model.state_dict().values())
    assert model.between.p == 0.5
    assert all(weight.grad is None for weight in model.parameters())
    assert torch.equal(torch.get_rng_state(), drawn)


def test_what_a_mean_of_means_would_have_cost_is_that_of_torch() -> None:
    """Against gradients that torch takes of both losses."""
    (batch,) = Rows().step_batches(0)
    model = Model()

    def gradient(means: bool) -> Tensor:
        logits = model(nn.functional.one_hot(batch.token_ids, VOCABULARY).float())
        each = nn.functional.cross_entropy(logits.transpose(1, 2), batch.labels, reduction="none")
        there = (batch.labels != -100).sum(1)
        loss = (each.sum(1) / there).mean() if means else each.sum() / there.sum()
        grads = torch.autograd.grad(loss, list(model.last.parameters()))
        return torch.cat([grad.flatten() for grad in grads]).double()

    wrong, right = gradient(True), gradient(False)
    parts = findings(model)["mean of means"].facts["parts"]
    assert parts["last"] == pytest.approx(float((wrong - right).norm() / right.norm()), rel=1e-4)
    assert parts["last"] > 0.01


@pytest.mark.parametrize(
    ("between", "objective", "where", "says", "fix"),
    [
        (None, MeanOfMeans(), SPLITS, "counts differ: text 1, here 6", "sums and counts"),
        (None, Scaled(), SPLITS, "the gradient differs", "sums and counts"),
        (Normed(), None, SPLITS, "the gradient differs", "between.norm takes its statistics from the micro-batch"),
        (Cached(), None, ("once more",), "the gradient differs", "a function of its weights"),
        (Running(), None, ("rows reversed", *SPLITS), "the gradient differs", ""),
        (Detached(), None, ("what learns",), "no gradient reaches between", "a detach"),
        (Broken(), None, ("what learns",), "not finite: between.size", "division"),
    ],
    ids=["mean of means", "mean by rows", "batch statistics", "cache", "rows", "detached", "not finite"],
)
def test_a_planted_fault_is_found(between: Any, objective: Any, where: Any, says: str, fix: str) -> None:
    found = findings(Model(between), objective)
    for name in where:
        assert found[name].status == "fail", name
        assert fix in found[name].fix
    assert says in found[where[0]].value
    assert found["whole batch"].status == "ok"


def test_batch_norm_in_eval_mode_passes() -> None:
    model = Model(Normed())
    model.between.eval()
    assert {finding.status for finding in findings(model).values()} == {"ok"}


def test_a_part_that_nothing_reaches_fails_and_is_named() -> None:
    class Beside(Model):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Linear(2, 2)

    found = findings(Beside())
    assert found["what learns"].status == "fail"
    assert "no gradient reaches unused" in found["what learns"].value


class Sounding(Model):
    """A connector of pictures is part of the loss; that of sounds is, where ``heard``."""

    def __init__(self, *, heard: bool) -> None:
        super().__init__()
        self.heard = heard
        self.connectors = nn.ModuleDict({name: nn.Linear(1, 8, bias=False) for name in ("image", "audio")})

    def forward(self, hot: Tensor) -> Tensor:
        seen = self.connectors["image"].weight.mT
        return self.last(self.first(hot.to(seen.dtype)) + seen + (self.connectors["audio"].weight.mT * self.heard))


class Media(Rows):
    """The same rows, each with a medium of these modalities."""

    def __init__(self, *modalities: Any) -> None:
        self.modalities = modalities

    def step_batches(self, step: int) -> list[Batch]:
        media = Patches(values=torch.ones(6, 1), grid=torch.ones(6, 3, dtype=torch.long))
        (batch,) = super().step_batches(step)
        return [
            replace(
                batch,
                media=dict.fromkeys(self.modalities, media),
                item_row=dict.fromkeys(self.modalities, torch.arange(6)),
            )
        ]


@pytest.mark.parametrize(
    ("heard", "modalities", "status", "says"),
    [
        (False, ("image",), "warn", "not looked at: connectors.audio, since none of these 6 samples has audio"),
        (False, ("image", "audio"), "fail", "no gradient reaches connectors.audio"),
        (True, ("image", "audio"), "ok", "6 tensors, each with a finite gradient"),
    ],
)
def test_a_part_that_these_samples_do_not_use_is_no_fault(heard: bool, modalities: Any, status: str, says: str) -> None:
    found = findings(Sounding(heard=heard), batches=Media(*modalities))
    assert found["what learns"].status == status
    assert says in found["what learns"].value
    assert {f.status for name, f in found.items() if name != "what learns"} == {"ok"}


def test_what_begins_at_zero_is_woken_and_put_back() -> None:
    model = Model(Closed())
    found = findings(model)
    assert "1 tensors that begin at zero (between.gate)" in found["held still"].value
    assert found["what learns"].status == "ok"  # behind a gate of zero the inner layer would have none
    assert not model.between.gate.any()


def test_dropout_inside_sizes_is_taken_off_and_put_back() -> None:
    model = Model(Sized())
    found = findings(model)
    assert found["once more"].status == "ok"
    assert {name for name, one in found.items() if one.status != "ok"} == set()
    assert isinstance(model.between, Sized)
    assert (model.between.outer.inner, model.between.module.p) == (Inner(dropout=0.5), 0.3)


def test_chance_that_is_no_dropout_is_a_warning() -> None:
    found = findings(Model(Noisy()))
    assert found["once more"].status == "warn"
    assert "something is drawn that is no dropout" in found["once more"].value


def test_rates_are_compared_with_what_is_meant() -> None:
    rates = Rates(lr=0.05, parts={"last": 0.01})
    meant = {"first": 0.05, "last": 0.01}
    right = findings(Model(), rates=rates, rate=lambda name: meant[part_of(name)])
    assert right["learning rates"].status == "ok"
    assert "last 0.01 (45 weights)" in right["learning rates"].value
    wrong = findings(Model(), rates=rates, rate=lambda name: 0.05)
    assert wrong["learning rates"].status == "fail"
    assert "last.weight 0.01 instead of 0.05" in wrong["learning rates"].value


def test_a_frozen_weight_with_a_gradient_fails() -> None:
    model = Model()

    def thaw(module: nn.Module, _: Any) -> None:
        model.first.weight.requires_grad_(True)

    model.first.weight.requires_grad_(False)
    model.register_forward_pre_hook(thaw)
    found = findings(model)
    assert found["what is frozen"].status == "fail"
    assert "a gradient in 1 frozen tensors: first.weight" in found["what is frozen"].value
    assert not model.first.weight.requires_grad


def test_residuals_of_half_precision_scatter_about_zero() -> None:
    compute = Compute(device="cpu", dtype="bfloat16", threads=1, why=())
    sound = findings(Model(), compute=compute)["in bfloat16"]
    assert sound.status == "ok"
    assert abs(sound.facts["mean_z"]) < 6
    assert 1e-5 < max(sound.facts["parts"].values()) < 0.05
    assert findings(Model(Normed()), compute=compute)["in bfloat16"].status == "warn"


def test_gaps_are_those_of_the_definition() -> None:
    one = {"a.x": torch.tensor([3.0, 4.0]), "a.y": torch.tensor([0.0]), "b": None, "c": torch.ones(4)}
    two = {"a.x": torch.tensor([3.0, 4.0]), "a.y": torch.tensor([2.0]), "b": None, "c": 2 * torch.ones(4)}
    gap = compare(one, two)
    assert gap.parts == {"a": pytest.approx(2 / 5), "c": pytest.approx(1.0)}
    assert (gap.part, gap.largest, gap.tensor, gap.own) == ("c", pytest.approx(1.0), "c", pytest.approx(1.0))
    assert gap.along == pytest.approx(4 / 29)
    assert compare(one, {"a.y": None}).parts == {"a": 0.0}
    assert compare({"b": None}, {"b": torch.ones(1)}).largest == float("inf")
    assert compare(one, {"c": torch.full((4,), float("nan"))}).part == "c"


def test_a_model_is_held_in_a_format_and_let_go_after_a_fault() -> None:
    model = Model(nn.Dropout(0.5))
    settings = Settings(steps=1, compute=CPU)

    def fail() -> None:
        with held(model, Counted(), settings, dtype=torch.float64) as still:
            assert {weight.dtype for weight in model.parameters()} == {torch.float64}
            still.move(noise=1e-3)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert model.between.p == 0.5


@pytest.fixture(scope="module")
def together() -> dict[str, Any]:
    return cases_of(Path(__file__).with_name("gradient_ranks.py"))


@pytest.mark.row("S4-66")
@pytest.mark.parametrize("case", ["two", "four", "zero"])
def test_processes_that_sum_rightly_pass(together: dict[str, Any], case: str) -> None:
    assert [found["status"] for found in together[case]] == ["ok"] * len(together[case]), json.dumps(together[case])


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("summed twice", "it is 2 times as long"),
        ("not summed", "the gradient differs"),
        ("averaged", "counts differ: text 1, here 2"),
        ("dealt twice", "counts differ"),
    ],
)
def test_processes_that_sum_wrongly_are_found(together: dict[str, Any], case: str, says: str) -> None:
    for found in together[case]:
        assert found["status"] == "fail"
        assert says in found["value"]
