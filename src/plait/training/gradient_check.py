"""Whether the gradient of a step is that of the whole batch, however it is computed: on the caller's own model.

A step is computed as a whole, and again in micro-batches of several sizes, with its rows in another order, unpacked,
with activations recomputed, with the other head. All of these are one number in mathematics. What rounding alone makes
of it is measured, not guessed: every weight and every media value is moved by up to one unit of rounding (Monte Carlo
arithmetic: Parker, UCLA CSD-970002, 1997), and a gradient may be
:data:`plait.training.gradient_passes.TIMES` as far off as that moves it; or as far as the longest sum in the
model may be off by its own rounding, whose bound is its length in units (Higham, Accuracy and Stability of Numerical
Algorithms, section 4.2). In float64 that is some 1e-11. Where training is in half precision, the
same is done in its own number format, and the residuals must scatter about zero.

From Python::

    for finding in check_gradients(model, objective, batches, settings=settings):
        print(finding.status, finding.name, finding.value)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import torch
from torch import nn

from plait.core import device
from plait.core.errors import PlaitError
from plait.core.protocols import Batches, Objective
from plait.training.finding import Finding, Reference, named, percent, recipe_dtype
from plait.training.gradient_passes import Passes
from plait.training.gradient_ways import Ways
from plait.training.held import Held, compare, held, part_of
from plait.training.optimizers import build_part
from plait.training.settings import Settings
from plait.training.state import TrainState

_ROOM = 0.4  # of the free memory, for a copy of the weights
_SYSTEMATIC_Z = 6.0

Number = Literal["auto", "float64", "float32", "recipe"]


def check_gradients(
    model: nn.Module,
    objective: Objective,
    batches: Batches,
    *,
    settings: Settings,
    dtype: Number = "auto",
    rate: Callable[[str], float] | None = None,
    keep: Callable[[Reference], None] | None = None,
) -> Iterator[Finding]:
    """Compute the first step in many ways and compare; nothing is trained, and all is put back.

    Args:
        model: In the modes in which it is about to train.
        objective: What it minimizes.
        batches: The first step's are taken; keep it small.
        settings: How it trains.
        dtype: Number format of the comparison; ``auto`` is float64 while memory allows, else float32, else the
            recipe's own.
        rate: The peak rate that each weight is meant to have, by its name; None does not compare rates.
        keep: Given the gradient of the whole batch, for comparisons elsewhere (several processes).

    Yields:
        One finding a check, as soon as it is made.
    """
    yield from _check_rates(model, objective, settings, rate=rate)
    first = list(batches.step_batches(0))
    ways = Ways.of(batches, first, objective)
    chosen = choose_dtype(model, settings) if dtype == "auto" else _DTYPES[dtype]
    try:
        with held(model, objective, settings, dtype=chosen) as still:
            reference = yield from Passes(still, ways, objective).all()
    except RuntimeError as error:
        if chosen != torch.float64 or dtype == "float64" or "dtype" not in str(error).lower():
            raise
        with held(model, objective, settings, dtype=torch.float32) as still:  # a part of it knows no float64
            reference = yield from Passes(still, ways, objective).all()
    if reference is not None and keep is not None:
        keep(reference)
    if reference is not None and chosen is not None and settings.compute.dtype in ("bfloat16", "float16"):
        with held(model, objective, settings, dtype=None) as still:
            yield from _own_precision(still, ways)


_DTYPES: Mapping[str, torch.dtype | None] = {"float64": torch.float64, "float32": torch.float32, "recipe": None}


def choose_dtype(model: nn.Module, settings: Settings) -> torch.dtype | None:
    """The number format of a comparison: the exactest one that fits; None is that of the recipe."""
    numbers = sum(weight.numel() for weight in model.parameters())
    where = settings.compute.device
    free = torch.cuda.mem_get_info()[0] if where == "cuda" else device.memory().free
    kinds = [torch.float64, torch.float32] if where != "mps" else [torch.float32]
    return next((kind for kind in kinds if kind.itemsize * numbers < _ROOM * free), None)


def _check_rates(
    model: nn.Module, objective: Objective, settings: Settings, *, rate: Callable[[str], float] | None
) -> Iterator[Finding]:
    """Every weight that learns is in one group of the optimizer, at the rate that is meant for it."""
    trained = TrainState(model, objective)
    try:
        optimizer = build_part(settings.optimizer, trained.weights, trained, rates=settings.rates)
    except PlaitError as error:
        yield Finding(name="learning rates", status="fail", value=error.cause, fix=error.remedy)
        return
    names = {id(weight): name for name, weight in trained.weights.items()}
    seen: list[str] = []
    wrong: list[str] = []
    groups: dict[tuple[str, float], list[int]] = {}
    for group in optimizer.param_groups:
        peak = float(group["peak_lr"])
        for weight in group["params"]:
            name = names[id(weight)]
            seen.append(name)
            meant = peak if rate is None else rate(name) * settings.rates.layer_decay ** group["above"]
            if not math.isclose(peak, meant, rel_tol=1e-9):
                wrong.append(f"{name} {peak:g} instead of {meant:g}")
            groups.setdefault((part_of(name), peak), []).append(weight.numel())
    listed = ", ".join(f"{part} {peak:g} ({sum(sizes):,} weights)" for (part, peak), sizes in groups.items())
    if lost := sorted(trained.weights.keys() - set(seen)) or sorted({n for n in seen if seen.count(n) > 1}):
        value = f"{len(lost)} trained tensors are in no group of the optimizer, or in two: {named(lost)}"
        yield Finding(name="learning rates", status="fail", value=value, fix="report this with the recipe")
    elif wrong:
        value = f"{len(wrong)} tensors do not learn at the recipe's rate: {named(wrong)}"
        fix = "see which prefix of rates.parts matches these names"
        yield Finding(name="learning rates", status="fail", value=value, fix=fix)
    else:
        yield Finding(name="learning rates", status="ok", value=f"at their peak: {listed}")


def _own_precision(still: Held, ways: Ways) -> Iterator[Finding]:
    """The recipe's own number format: residuals of a split are of rounding's size, and scatter about zero."""
    if not ways.splits:
        return
    said, micro = next((item for item in ways.splits.items() if len(item[1]) == 2), next(iter(ways.splits.items())))
    base = still.gradient([ways.whole])
    kind = recipe_dtype(still.settings)
    eps = torch.finfo(kind).eps
    still.move(noise=eps, seed=5)
    noise = compare(base.of, still.gradient([ways.whole], noise=eps).of)
    still.move()
    gap = compare(base.of, still.gradient(micro).of)
    name = str(kind).removeprefix("torch.")
    bounds = {part: max(3 * off, eps) for part, off in noise.parts.items()}  # rounded once, not TIMES as often
    facts = {"parts": dict(gap.parts), "noise": dict(noise.parts), "mean_z": gap.mean_z, "along": gap.along}
    value = (
        f"{said}: residuals are {percent(gap.largest)} of the gradient (a unit of rounding in all weights makes "
        f"{percent(noise.largest)}), their mean is {gap.mean_z:+.1f} standard errors from zero"
    )
    over = [part for part, off in gap.parts.items() if not off <= bounds[part]]
    systematic = abs(gap.mean_z) > _SYSTEMATIC_Z and abs(gap.along) > 3 * max(abs(noise.along), eps / 4)
    fix = ""
    if over or systematic:
        fix = f"in {name} this split rounds otherwise than rounding alone explains: compare losses with dtype: float32"
    yield Finding(name=f"in {name}", status="warn" if fix else "ok", value=value, fix=fix, facts=facts)
