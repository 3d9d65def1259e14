"""A step computed in many ways in one number format, and compared; see :mod:`plait.training.gradient_check`."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor, nn

from plait.core.errors import PlaitError
from plait.core.events import Events
from plait.core.protocols import Objective, Pairwise
from plait.core.tensors import Batch
from plait.core.types import Modality
from plait.models.multimodal import MultimodalLM
from plait.models.recompute import blocks_of
from plait.models.wrapped.vlm import WrappedVLM
from plait.training.computed import computed
from plait.training.finding import Finding, Reference, named, percent, recipe_dtype
from plait.training.gradient_ways import Ways
from plait.training.held import Gradient, Held, compare, part_of
from plait.training.settings import Settings

_MODALITIES = get_args(Modality)

TIMES = 20.0
"""Rounding errors of a pass over those of moving each weight once: a weight's product, its sum, its norm and its
activation round, each once or more, and the largest of some tensors is looked at."""


class Passes:
    """The comparisons in one number format."""

    def __init__(self, still: Held, ways: Ways, objective: Objective) -> None:
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
        eps = torch.finfo(dtype or recipe_dtype(self.still.settings)).eps
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
        name = str(reference.dtype or recipe_dtype(settings)).removeprefix("torch.")
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
        idle = {part: kind for part, norm in norms.items() if not norm and (kind := self._lacking(part))}
        dead = [part for part, norm in norms.items() if not norm and part not in idle]
        listed = ", ".join(f"{part} {norm:.2g}" for part, norm in norms.items())
        facts = {"norms": norms, "without": empty, "not_finite": broken, "not_used": idle}
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
        elif idle:
            kinds, count = " or ".join(dict.fromkeys(idle.values())), len(self.ways.whole.sample_ids)
            rest = [name for name in empty if part_of(name) not in idle]
            more = f"; no gradient in {len(rest)} other tensors: {named(rest)}" if rest else ""
            yield Finding(
                name="what learns",
                status="warn",
                value=f"not looked at: {', '.join(idle)}, since none of these {count} samples has {kinds} (norms: "
                f"{listed}){more}",
                fix=f"give more --samples, or another seed, so that one of them has {kinds}",
                facts=facts,
            )
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

    def _lacking(self, part: str) -> str:
        """The modality that a part is for, where no sample of the batch has any; else ""."""
        name = getattr(self.still.model, "inside", "") if part == "mark" else part.partition(".")[2]
        there = [kind for kind, found in self.ways.whole.media.items() if len(found.grid)]
        return name if name in _MODALITIES and name not in there else ""

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
            f"{max(counts):,.0f} {term} each) would have made the gradient {percent(gap.largest)} wrong",
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
