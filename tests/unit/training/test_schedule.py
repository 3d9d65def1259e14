from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from plait.training.schedule import Constant, Cosine, InverseSqrt, Linear, Polynomial, Wsd

TOTAL, RISE = 200, 20


def reference_rates(schedule, steps: int = TOTAL) -> list[float]:
    """Rates a torch scheduler gives, from the first update on."""
    rates = []
    for _ in range(steps):
        rates.append(schedule.get_last_lr()[0])
        schedule.optimizer.step()
        schedule.step()
    return rates


@pytest.fixture
def optimizer():
    import torch

    weight = torch.nn.Parameter(torch.zeros(1))
    return torch.optim.SGD([weight], lr=1.0)


@pytest.mark.row("S4-62")
@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "cosine floor"])
def test_equals_transformers(name, optimizer):
    import transformers

    ours, theirs = {
        "constant": (Constant(warmup=RISE), transformers.get_constant_schedule_with_warmup(optimizer, RISE)),
        "linear": (Linear(warmup=RISE), transformers.get_linear_schedule_with_warmup(optimizer, RISE, TOTAL)),
        "cosine": (Cosine(warmup=RISE), transformers.get_cosine_schedule_with_warmup(optimizer, RISE, TOTAL)),
        "cosine floor": (
            Cosine(warmup=RISE / TOTAL, floor=0.1),
            transformers.get_cosine_with_min_lr_schedule_with_warmup(optimizer, RISE, TOTAL, min_lr_rate=0.1),
        ),
    }[name]
    assert [ours.factor(step, TOTAL) for step in range(TOTAL)] == pytest.approx(reference_rates(theirs), abs=1e-12)


@pytest.mark.row("S4-62")
@pytest.mark.parametrize(
    ("ours", "name", "given"),
    [
        (Polynomial(warmup=RISE, power=3.0), "polynomial", {"power": 3.0, "lr_end": 0.0}),
        (Polynomial(warmup=RISE, power=2.0, floor=0.1), "polynomial", {"power": 2.0, "lr_end": 0.1}),
        (InverseSqrt(warmup=RISE), "inverse_sqrt", {}),
        (InverseSqrt(), "inverse_sqrt", {"num_warmup_steps": 0}),
        (InverseSqrt(warmup=RISE, timescale=7), "inverse_sqrt", {"timescale": 7}),
        *[
            (Wsd(warmup=RISE, fall=fall, form=form), "wsd", {"decay_type": form, "num_decay_steps": 50})
            for form in ("linear", "cosine", "1-sqrt")
            for fall in (50, 0.25)
        ],
    ],
)
def test_further_schedules_equal_transformers(ours, name, given, optimizer):
    from transformers import get_inverse_sqrt_schedule, get_polynomial_decay_schedule_with_warmup, get_wsd_schedule

    steps = {"num_warmup_steps": RISE, **({} if name == "inverse_sqrt" else {"num_training_steps": TOTAL})}
    make = {
        "polynomial": get_polynomial_decay_schedule_with_warmup,
        "inverse_sqrt": get_inverse_sqrt_schedule,
        "wsd": get_wsd_schedule,
    }[name]
    theirs = make(optimizer, **(steps | given))
    assert [ours.factor(step, TOTAL) for step in range(TOTAL)] == pytest.approx(reference_rates(theirs), abs=1e-12)


@given(longer=st.integers(0, 300), form=st.sampled_from(["linear", "cosine", "1-sqrt"]))
def test_a_longer_run_of_wsd_keeps_all_but_the_fall(longer, form):
    schedule = Wsd(warmup=RISE, fall=50, form=form, floor=0.1)
    before = range(TOTAL - 50)
    assert [schedule.factor(s, TOTAL) for s in before] == [schedule.factor(s, TOTAL + longer) for s in before]


@pytest.mark.row("S4-62")
def test_equals_torch_cosine_annealing(optimizer):
    import torch

    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=TOTAL, eta_min=0.25)
    ours = Cosine(floor=0.25)
    assert [ours.factor(step, TOTAL) for step in range(TOTAL)] == pytest.approx(reference_rates(theirs), abs=1e-12)


@given(
    kind=st.sampled_from([Constant, Linear, Cosine, Polynomial, InverseSqrt, Wsd]),
    warmup=st.one_of(st.integers(0, 50).map(float), st.floats(0, 0.99)),
    total=st.integers(1, 300),
)
def test_rises_then_never_rises_again(kind, warmup, total):
    schedule = kind(warmup=warmup)
    rise = schedule.warmup_steps(total)
    factors = [schedule.factor(step, total) for step in range(total)]
    assert all(0 <= f <= 1 for f in factors)
    assert factors[:rise] == sorted(factors[:rise])
    assert factors[rise:] == sorted(factors[rise:], reverse=True)
    if rise < total:
        assert factors[rise] == 1.0


@given(floor=st.floats(0, 1), total=st.integers(1, 300))
def test_a_falling_schedule_ends_at_its_floor(floor, total):
    for kind in (Linear, Cosine, Polynomial, Wsd):
        assert kind(floor=floor).factor(total, total) == pytest.approx(floor)


def test_refuses_a_broken_number_of_steps():
    with pytest.raises(ValidationError, match="whole number of steps"):
        Cosine(warmup=1.5)


def test_spec_modules_load_no_torch():
    code = "import sys, plait.training.schedule, plait.training.optim; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
