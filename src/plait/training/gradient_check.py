"""Whether the gradient of a step is that of the whole batch, however it is computed: on the caller's own model.

A step is computed as a whole, and again in micro-batches of several sizes, with its rows in another order, unpacked,
with activations recomputed, with the other head. All of these are one number in mathematics. What rounding alone makes
of it is measured, not guessed: every weight and every media value is moved by up to one unit of rounding (Monte Carlo
arithmetic: Parker, UCLA CSD-970002, 1997), and a gradient may be :data:`TIMES` as far off as that moves it; or as far
as the longest sum in the model may be off by its own rounding, whose bound is its length in units (Higham, Accuracy and
Stability of Numerical Algorithms, section 4.2). In float64 that is some 1e-11. Where training is in half precision, the
same is done in its own number format, and the residuals must scatter about zero.

From Python::

    for finding in check_gradients(model, objective, batches, settings=settings):
        print(finding.status, finding.name, finding.value)
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from plait.core import device
from plait.core.errors import PlaitError
from plait.core.events import Events
from plait.core.protocols import Batches, Objective, Pairwise
from plait.core.tensors import Batch
from plait.data.collate import join_rows, take_rows
from plait.data.conversations import ConversationBatches
from plait.models.multimodal import MultimodalLM
from plait.models.recompute import blocks_of
from plait.models.wrapped.vlm import WrappedVLM
from plait.training.computed import computed
from plait.training.held import Gap, Gradient, Held, compare, held, part_of
from plait.training.optimizers import build_part
from plait.training.settings import Settings
from plait.training.state import TrainState

TIMES = 20.0
"""Rounding errors of a pass over those of moving each weight once: a weight's product, its sum, its norm and its
activation round, each once or more, and the largest of some tensors is looked at."""

_ALONE = 32  # at most so many rows go through the model one by one
_ROOM = 0.4  # of the free memory, for a copy of the weights
_SYSTEMATIC_Z = 6.0

Number = Literal["auto", "float64", "float32", "recipe"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of a check.

    Attributes:
        name: What was looked at.
        status: ``fail`` where the training would be wrong.
        value: What was found.
        fix: What to do; empty where all is well.
        facts: The same as numbers.
    """

    name: str
    status: Literal["ok", "warn", "fail"]
    value: str
    fix: str = ""
    facts: Mapping[str, Any] | None = None


@runtime_checkable
class Divisible(Protocol):
    """A source whose samples belong together in groups, which it alone can divide."""

    parts: Sequence[Sequence[object]]

    def in_pieces(self, step: int, sizes: Sequence[int], *, packed: bool = True) -> list[Batch]:
        """The groups of a step in several batches."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """The gradient that others are compared with.

    Attributes:
        gradient: Of the whole batch.
        bounds: How far off each part may be.
        noise: How far rounding once moves it.
        dtype: In which it was computed; None: in that of the recipe.
    """

    gradient: Gradient
    bounds: Mapping[str, float]
    noise: float
    dtype: torch.dtype | None

    def judge(self, name: str, other: Gradient, *, fix: str) -> Finding:
        """Say how far another way of computing the step is off, and where."""
        gap = compare(self.gradient.of, other.of)
        counts = units_differ(self.gradient.sums.counts, other.sums.counts)
        return judged(name, gap, self.bounds, fix=fix, counts=counts)


def judged(name: str, gap: Gap, bounds: Mapping[str, float], *, fix: str, counts: str = "") -> Finding:
    """A finding of how far a gradient is off.

    Args:
        name: How it was computed.
        gap: From that of the whole batch.
        bounds: Of each part.
        fix: Where it is too far.
        counts: How the units differ, if they do.
    """
    over = {part: gap.parts[part] for part in gap.parts if not gap.parts[part] <= bounds.get(part, 0.0)}
    facts: dict[str, Any] = {"parts": dict(gap.parts), "bounds": {p: bounds.get(p) for p in gap.parts}}
    facts |= {"along": gap.along, "mean_z": gap.mean_z}
    if not over and not counts:
        tight = max(gap.parts, key=lambda part: gap.parts[part] / max(bounds.get(part, 0.0), 1e-300))
        to = f"to {gap.parts[tight]:.1e}" if gap.parts[tight] else "bits"
        return Finding(
            name=name,
            status="ok",
            value=f"the same {to} ({tight}; bound {bounds.get(tight, 0.0):.0e})",
            facts=facts,
        )
    said = [counts] if counts else []
    if over:
        each = [f"{part} by {_percent(off)} (bound {bounds.get(part, 0.0):.0e})" for part, off in over.items()]
        listed = named(each)
        said.append(f"the gradient differs: {listed}; most in {gap.tensor}, by {_percent(gap.own)}")
        if gap.along > 0.5 or gap.along < -0.25:
            said.append(f"along the gradient itself it is {1 + gap.along:.3g} times as long")
    return Finding(name=name, status="fail", value="; ".join(said), fix=fix, facts=facts)


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
    ways = _Ways.of(batches, first, objective)
    chosen = choose_dtype(model, settings) if dtype == "auto" else _DTYPES[dtype]
    try:
        with held(model, objective, settings, dtype=chosen) as still:
            reference = yield from _Passes(still, ways, objective).all()
    except RuntimeError as error:
        if chosen != torch.float64 or dtype == "float64" or "dtype" not in str(error).lower():
            raise
        with held(model, objective, settings, dtype=torch.float32) as still:  # a part of it knows no float64
            reference = yield from _Passes(still, ways, objective).all()
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ways:
    """One step's batch in several forms.

    Attributes:
        whole: In one piece.
        splits: In micro-batches, by what is said of it.
        unpacked: Each sample in a row of its own; None where nothing is packed.
        packed: In longer rows, where none of those of ``whole`` holds two samples.
        backward: Rows in reverse order; None where their order means something.
    """

    whole: Batch
    splits: Mapping[str, Sequence[Batch]]
    unpacked: Batch | None
    backward: Batch | None
    packed: Batch | None = None

    @classmethod
    def of(cls, batches: Batches, first: Sequence[Batch], objective: Objective) -> _Ways:
        whole = join_rows(first)
        source = source_of(batches)
        where = whole.token_ids.device
        if isinstance(source, Divisible):
            count = len(source.parts[0])
            splits = {
                said: [piece.to(where) for piece in source.in_pieces(0, sizes)] for said, sizes in _sizes(count).items()
            }
            (unpacked,) = source.in_pieces(0, [count], packed=False)
            return cls(whole=whole, splits=splits, unpacked=unpacked.to(where), backward=_backward(whole))
        if objective.needs_global_batch and not isinstance(objective, Pairwise):
            return cls(whole=whole, splits={}, unpacked=None, backward=None)
        unpacked = packed = None
        if isinstance(source, ConversationBatches) and source.packed:
            unpacked = join_rows(replace(source, packed=False, pieces=1).step_batches(0)).to(where)
            if int(whole.segment_ids.max()) < 2:
                longer = replace(source, row=2 * source.row, pieces=1, group_by_length=0)
                packed = join_rows(longer.step_batches(0)).to(where)
        rows = _filled(unpacked if unpacked is not None else whole)
        splits = {
            said: [take_rows(rows, sum(sizes[:at]), sum(sizes[: at + 1])) for at in range(len(sizes))]
            for said, sizes in _sizes(len(rows.token_ids)).items()
        }
        return cls(whole=whole, splits=splits, unpacked=unpacked, backward=_backward(whole), packed=packed)


def source_of(batches: Batches) -> Batches:
    """The source behind loaders and devices."""
    while (inner := getattr(batches, "batches", None)) is not None:
        batches = inner
    return batches


def _filled(batch: Batch) -> Batch:
    """Without rows of padding alone."""
    rows = [at for at, filled in enumerate((batch.segment_ids != 0).any(1).tolist()) if filled]
    return join_rows([take_rows(batch, at, at + 1) for at in rows])


def _backward(batch: Batch) -> Batch | None:
    count = len(batch.token_ids)
    return join_rows([take_rows(batch, at, at + 1) for at in reversed(range(count))]) if count > 1 else None


def _sizes(count: int) -> dict[str, list[int]]:
    """Sizes of micro-batches: of one each, of equal ones, of uneven ones."""
    found: dict[str, list[int]] = {}
    if 1 < count <= _ALONE:
        found[f"split {count} x 1"] = [1] * count
    if count > 2:
        half = -(-count // 2)
        found[f"split {half} + {count - half}"] = [half, count - half]
    if count > 3:
        uneven = [1, (count - 1) // 3, count - 1 - (count - 1) // 3]
        found["split " + " + ".join(map(str, uneven))] = uneven
    return found


class _Passes:
    """The comparisons in one number format."""

    def __init__(self, still: Held, ways: _Ways, objective: Objective) -> None:
        self.still, self.ways, self.objective = still, ways, objective

    def all(self) -> Iterator[Finding]:  # pyright: ignore[reportInvalidReturn]
        """Every finding; returns the reference."""
        whole = self.ways.whole
        base = self.still.gradient([whole])
        if not base.sums.complete:
            yield Finding(
                name="whole batch",
                status="fail",
                value=f"the loss is not finite: samples {', '.join(base.sums.not_finite[:4])}",
                fix="look at these samples; try dtype: float32",
            )
            return None
        reference = self._bounded(base)
        yield from self._about(reference)
        yield from self._parts(base)
        steady = yield from self._again(reference)
        if steady and self.ways.backward is not None:
            yield self._one("rows reversed", [self.ways.backward], reference, fix=_ACROSS)
        for said, micro in self.ways.splits.items():
            yield self._one(said, micro, reference, fix=self._why())
        if not self.ways.splits:
            yield Finding(
                name="micro-batches",
                status="ok",
                value="this objective takes its batch whole, and the trainer refuses to split it: nothing to compare",
            )
        if self.ways.packed is not None:
            yield self._one("packed in long rows", [self.ways.packed], reference, fix=_PACKING)
        elif self.ways.unpacked is not None:
            yield self._one("packing off", [self.ways.unpacked], reference, fix=_PACKING)
        yield from self._computed(reference)
        yield from self._means(reference)
        return reference

    # --- single checks ---------------------------------------------------------------------------------------------

    def _bounded(self, base: Gradient) -> Reference:
        """Measure what rounding does to this gradient."""
        dtype = self.still.dtype
        eps = torch.finfo(dtype or _recipe_dtype(self.still.settings)).eps
        self.still.move(noise=eps, seed=5)
        try:
            shaken = self.still.gradient([self.ways.whole], noise=eps)
        finally:
            self.still.move()
        gap = compare(base.of, shaken.of)
        longest = max((max(w.shape, default=1) for w in self.still.model.parameters()), default=1)
        most = max(math.sqrt(eps), longest * eps)  # beyond it, half of the digits are gone: rounding is no excuse
        bounds = {part: min(max(TIMES * off, longest * eps), most) for part, off in gap.parts.items()}
        return Reference(gradient=base, bounds=bounds, dtype=dtype, noise=gap.largest)

    def _about(self, reference: Reference) -> Iterator[Finding]:
        batch, sums, settings = self.ways.whole, reference.gradient.sums, self.still.settings
        counts = {name: count for name, count in sums.counts.items() if settings.weights.get(name, 1.0)}
        tokens = int((batch.segment_ids != 0).sum())
        said = f"{len(batch.sample_ids)} samples"
        said += f", {tokens:,} tokens in {len(batch.token_ids)} rows" if batch.token_ids.shape[1] > 1 else ""
        said += (
            f"; counted: {', '.join(f'{count:,.0f} {name}' for name, count in counts.items())}; loss {sums.loss:.4f}"
        )
        facts: dict[str, Any] = {"loss": sums.loss, "counts": dict(sums.counts)}
        yield Finding(name="whole batch", status="ok", value=said, facts=facts)
        if self.still.quiet or self.still.woken:
            notes = [f"dropout off in {self.still.quiet} modules"] if self.still.quiet else []
            if count := len(self.still.woken):
                notes.append(
                    f"{count} tensors that begin at zero ({named(self.still.woken, limit=1)}) made small random, to "
                    "see what is behind them"
                )
            facts = {"woken": list(self.still.woken), "quiet": self.still.quiet}
            yield Finding(name="held still", status="ok", value="for these checks: " + "; ".join(notes), facts=facts)
        name = str(reference.dtype or _recipe_dtype(settings)).removeprefix("torch.")
        value = f"{name}: each weight moved by a unit of rounding moves the gradient by {reference.noise:.0e}"
        yield Finding(
            name="rounding", status="ok", value=value, facts={"dtype": name, "bounds": dict(reference.bounds)}
        )

    def _parts(self, base: Gradient) -> Iterator[Finding]:
        """What learns gets a gradient; what is frozen, none."""
        norms: dict[str, float] = {}
        empty: list[str] = []
        broken: list[str] = []
        for name, grad in base.of.items():
            size = 0.0 if grad is None else float(grad.double().norm())
            norms[part_of(name)] = math.hypot(norms.get(part_of(name), 0.0), size)
            broken += [] if math.isfinite(size) else [name]
            empty += [] if size else [name]
        dead = [part for part, norm in norms.items() if not norm]
        listed = ", ".join(f"{part} {norm:.2g}" for part, norm in norms.items())
        facts = {"norms": norms, "without": empty, "not_finite": broken}
        if broken or dead:
            said = f"not finite: {named(broken)}" if broken else f"no gradient reaches {', '.join(dead)}"
            fix = (
                "look for a division or logarithm of zero"
                if broken
                else (
                    "the loss does not depend on it: freeze it, or connect it (a detach, a torch.no_grad, a part "
                    "that is not called)"
                )
            )
            yield Finding(name="what learns", status="fail", value=f"{said} (norms: {listed})", fix=fix, facts=facts)
        elif empty:
            yield Finding(
                name="what learns",
                status="warn",
                value=f"norms: {listed}; no gradient in {len(empty)} of {len(base.of)} tensors: {named(empty)}",
                fix="fine if these samples do not use them; else see why the loss does not depend on them",
                facts=facts,
            )
        else:
            yield Finding(
                name="what learns",
                status="ok",
                value=f"{len(base.of)} tensors, each with a finite gradient; norms: {listed}",
                facts=facts,
            )
        frozen = self.still.frozen
        touched = [name for name, weight in frozen.items() if weight.requires_grad or weight.grad is not None]
        numbers = sum(weight.numel() for weight in frozen.values())
        value = f"{len(frozen)} tensors, {numbers:,} weights, without a gradient" if frozen else "nothing is frozen"
        if touched:
            fix = "something sets requires_grad again in the forward pass"
            value = f"a gradient in {len(touched)} frozen tensors: {named(touched)}"
            yield Finding(name="what is frozen", status="fail", value=value, fix=fix)
        else:
            yield Finding(name="what is frozen", status="ok", value=value)

    def _again(self, reference: Reference) -> Iterator[Finding]:  # pyright: ignore[reportInvalidReturn]
        """The same batch once more, with other random numbers; returns whether it was the same."""
        other = self.still.gradient([self.ways.whole], seed=1)
        finding = reference.judge("once more", other, fix=_STATE)
        if finding.status == "ok":
            yield finding
            return True
        same = reference.judge("once more", self.still.gradient([self.ways.whole]), fix=_STATE)
        if same.status == "ok":
            yield Finding(
                name="once more",
                status="warn",
                value="other random numbers give another gradient: something is drawn that is no dropout; passes are "
                "seeded equally, but micro-batches draw other numbers than the whole batch",
                fix="take chance out for this check; differences below may come from it",
                facts=finding.facts,
            )
        else:
            yield same
        return False

    def _one(self, name: str, micro: Sequence[Batch], reference: Reference, *, fix: str) -> Finding:
        try:
            other = self.still.gradient(micro)
        except PlaitError as error:
            return Finding(name=name, status="fail", value=f"refused: {error.cause}", fix=error.remedy or fix)
        return reference.judge(name, other, fix=fix)

    def _computed(self, reference: Reference) -> Iterator[Finding]:
        """Other ways of computing the same: activations recomputed, the other head."""
        model, settings = self.still.model, self.still.settings
        ways: dict[str, Settings] = {}
        if blocks_of(model):
            other = "full" if settings.recompute == "none" else "none"
            ways[f"recompute {other}"] = replace(settings, recompute=other, compile=False)
        if isinstance(model, MultimodalLM | WrappedVLM):
            other = "full" if settings.head == "fused" else "fused"
            ways[f"head {other}"] = replace(settings, head=other, compile=False)
        for name, changed in ways.items():
            try:
                with computed(model, changed, events=Events(None)):
                    other = self.still.gradient([self.ways.whole])
            except PlaitError as error:
                yield Finding(name=name, status="warn", value=f"not possible: {error.cause}", fix=error.remedy)
                continue
            yield reference.judge(name, other, fix=_BUG)

    def _means(self, reference: Reference) -> Iterator[Finding]:
        """What a mean of the micro-batches' means would have given instead."""
        if isinstance(self.objective, Pairwise) or not self.ways.splits:
            return
        micro = next(iter(self.ways.splits.values()))
        term = next(name for name in reference.gradient.sums.counts if self.still.settings.weights.get(name, 1.0))
        counts = [float(self.objective.count(batch)[term]) for batch in micro]
        if min(counts) == max(counts):  # then it is the same
            return
        total: dict[str, Tensor | None] = {}
        done = 0
        with contextlib.suppress(PlaitError):  # a piece without one trained token has no mean
            for batch in micro:
                found = self.still.gradient([batch])
                done += 1
                for name, grad in found.of.items():
                    if grad is not None:
                        before = total.get(name)
                        total[name] = grad / len(micro) if before is None else before + grad / len(micro)
        if done < len(micro):
            return
        total |= {name: None for name in reference.gradient.of if name not in total}
        gap = compare(reference.gradient.of, total)
        yield Finding(
            name="mean of means",
            status="ok",
            value=f"for information: averaging each of {len(micro)} micro-batches for itself ({min(counts):,.0f} to "
            f"{max(counts):,.0f} {term} each) would have made the gradient {_percent(gap.largest)} wrong",
            facts={"parts": dict(gap.parts), "counts": counts},
        )

    def _why(self) -> str:
        norms = [n for n, m in self.still.model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        live = [n for n in norms if self.still.model.get_submodule(n).training]
        if live:
            return (
                f"{named(live)} takes its statistics from the micro-batch: put batch norms into eval mode, or use "
                "layer or group norms"
            )
        return _SUMS


_SUMS = (
    "the objective must return sums and counts over the batch, never means, and no row may change another one's loss "
    "(batch statistics, a state kept between forward passes)"
)
_ACROSS = "a row's loss depends on its place: look for positions, masks or a state that go from row to row"
_STATE = (
    "the model must be a function of its weights, the batch and torch's random numbers: look for a cache or a buffer "
    "that a forward pass writes"
)
_PACKING = (
    "samples of one row see each other, or their positions run on: attention must be block-diagonal by segment_ids, "
    "and positions begin anew in each (set packing: false until then)"
)
_BUG = "this way of computing must not change the gradient: set it off, and report it with the model's name"


def _check_rates(
    model: nn.Module, objective: Objective, settings: Settings, *, rate: Callable[[str], float] | None
) -> Iterator[Finding]:
    """Every weight that learns is in one group of the optimizer, at the rate that is meant for it."""
    trained = TrainState(model, objective)
    try:
        optimizer = build_part(settings.optimizer, trained, trained, rates=settings.rates)
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


def _own_precision(still: Held, ways: _Ways) -> Iterator[Finding]:
    """The recipe's own number format: residuals of a split are of rounding's size, and scatter about zero."""
    if not ways.splits:
        return
    said, micro = next((item for item in ways.splits.items() if len(item[1]) == 2), next(iter(ways.splits.items())))
    base = still.gradient([ways.whole])
    kind = _recipe_dtype(still.settings)
    eps = torch.finfo(kind).eps
    still.move(noise=eps, seed=5)
    noise = compare(base.of, still.gradient([ways.whole], noise=eps).of)
    still.move()
    gap = compare(base.of, still.gradient(micro).of)
    name = str(kind).removeprefix("torch.")
    bounds = {part: max(3 * off, eps) for part, off in noise.parts.items()}  # rounded once, not TIMES as often
    facts = {"parts": dict(gap.parts), "noise": dict(noise.parts), "mean_z": gap.mean_z, "along": gap.along}
    value = (
        f"{said}: residuals are {_percent(gap.largest)} of the gradient (a unit of rounding in all weights makes "
        f"{_percent(noise.largest)}), their mean is {gap.mean_z:+.1f} standard errors from zero"
    )
    over = [part for part, off in gap.parts.items() if not off <= bounds[part]]
    systematic = abs(gap.mean_z) > _SYSTEMATIC_Z and abs(gap.along) > 3 * max(abs(noise.along), eps / 4)
    fix = ""
    if over or systematic:
        fix = f"in {name} this split rounds otherwise than rounding alone explains: compare losses with dtype: float32"
    yield Finding(name=f"in {name}", status="warn" if fix else "ok", value=value, fix=fix, facts=facts)


def _recipe_dtype(settings: Settings) -> torch.dtype:
    return getattr(torch, settings.compute.dtype)


def units_differ(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """How the counts of two computations of one step differ; "" if they do not."""
    differ = [n for n in before if not math.isclose(before[n], after.get(n, 0.0), rel_tol=1e-9)]
    if not differ:
        return ""
    return "counts differ: " + ", ".join(f"{n} {before[n]:g}, here {after.get(n, 0.0):g}" for n in differ)


def named(names: Sequence[str], *, limit: int = 3) -> str:
    """Some names for a line, and how many more there are."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if abs(share) >= 1e-4 or share == 0 else f"{share:.1e}"
