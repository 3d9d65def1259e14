"""The one training loop: count, micro-batches, sum over global count, clip, step. Every objective runs through it.

The loss of a step is ``sum over terms of weight * (sum over micro-batches and ranks) / (count over micro-batches and
ranks)``: the gradient is that of one big batch whatever the split, because nothing is averaged before everything is
counted.
"""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from plait.core import dtensors, mesh
from plait.core.device import fingerprint, seed_everything
from plait.core.errors import ConfigError, Stopped
from plait.core.events import Events
from plait.core.files import write_json
from plait.core.protocols import Batches, Objective, Paced, Pairwise
from plait.core.tensors import Batch
from plait.training.average import MovingAverage
from plait.training.computed import computed
from plait.training.generators import rng_kept, rng_restorer
from plait.training.gradient import Sums, accumulate, check_batches
from plait.training.interrupt import StopRequest, Woken, stop_requests
from plait.training.keeping import Keeper, Trained
from plait.training.monitor import Cost, Monitor, Plan
from plait.training.norm import Norm
from plait.training.optimizers import build_part
from plait.training.parallel.order import timeline_record
from plait.training.parallel.twin import lay_out
from plait.training.peak_rate import peak_rate
from plait.training.precision import LossScale, autocast, hold_masters
from plait.training.ranks import asked, patience, seed_step, start_alike
from plait.training.rehearsal import Asked, rehearsal, rehearsing
from plait.training.settings import EVALUATION, ON_TRAINING, FitResult, Hooks, Settings, judged
from plait.training.smaller import Exhausted, divided, first_line, out_of_memory, release, smaller
from plait.training.state import Origin, Progress, TrainState
from plait.training.units import placeholders, total_units
from plait.training.verdict import Judge


def fit(
    model: nn.Module,
    objective: Objective,
    batches: Batches,
    *,
    settings: Settings,
    folder: Path,
    events: Events,
    hooks: Hooks | None = None,
) -> FitResult:
    """Train ``model`` in place, or continue where an earlier call in the same folder was stopped or killed.

    Set ``requires_grad`` and train/eval modes before: the loop changes neither. Trainable half-precision weights are
    turned into float32. On a CPU a resumed run ends with the very bits of one that ran through, if the fingerprint is
    the same.

    In several processes (:mod:`plait.core.mesh`) each calls this with its share of the batches and a folder of its own;
    the first one's has the checkpoints. Hooks are called in the first alone. A model that trains in pieces
    (``settings.parallel``) is empty after an error.

    Args:
        model: Its trainable weights learn; frozen ones must be those of the first call when continuing.
        objective: What to minimize; a stateful one (``nn.Module``) trains and is saved too.
        batches: Where data come from.
        settings: How to train.
        folder: The stage's folder: ``metrics.jsonl``, ``results.csv``, ``checkpoints/``.
        events: Where to say what happens.
        hooks: What the caller adds.

    Raises:
        ConfigError: Nothing is trainable, settings are not those of the checkpoint, or a term has to see the whole
            batch at once.
        DataError: A step has no batch, or nothing to train on.
        NumericsError: Too many steps in a row were left out, or ``settings.guard`` ends the run; the last checkpoint
            stays.
        CheckpointError: A checkpoint does not fit this model, or none of several is whole.
        ResourceError: The disk is full, or a step does not fit the memory; the last checkpoint stays.
        Stopped: Ctrl-C or SIGTERM: the step at hand was finished and saved. A second signal stops at once.
    """
    hooks = hooks or Hooks()
    if (instead := rehearsal()) is not None:
        asked_for = Asked(
            model=model,
            objective=objective,
            batches=batches,
            settings=settings,
            folder=folder,
            events=events,
            hooks=hooks,
        )
        with rehearsing(None):
            return instead(asked_for)
    run = _Run(model, objective, batches, settings=settings, folder=folder, events=events, hooks=hooks)
    with computed(run.layout.model, settings, events=events), stop_requests() as stop:
        result = run.all(stop)
    run.layout.finish()
    if run.layout.in_pieces:  # hooks of modules refer to each other: the pieces would stay for long
        del run
        gc.collect()
    return result


class _Run:
    """One call of :func:`fit`: what it holds from step to step."""

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        batches: Batches,
        *,
        settings: Settings,
        folder: Path,
        events: Events,
        hooks: Hooks,
    ) -> None:
        if settings.stopping and hooks.evaluate is None:
            raise ConfigError(
                "stopping is set, but nothing evaluates", place="stopping", remedy="give the hook evaluate"
            )
        self.batches, self.settings = batches, settings
        self.events, self.hooks, self.folder = events, hooks, folder
        plain = TrainState(model, objective)
        if not plain.trains:
            raise ConfigError(
                "every module is in eval mode", place="model", remedy="call .train() on the parts that learn"
            )
        if turned := hold_masters(plain.weights.values()):
            events.note(f"{turned} trainable tensors are held in float32 while training")
        origin = Origin(
            settings=settings.plain(), fingerprint=fingerprint(settings.compute), frozen=plain.frozen_digest()
        )
        start_alike(plain, origin, batches, events=events)
        self.layout = lay_out(model, objective, settings.parallel, device=settings.compute.device)
        self.train_state = TrainState(self.layout.model, self.layout.objective)
        self.modes = plain
        moved = self.layout.moved(self.train_state.weights)
        self.optimizer = build_part(settings.optimizer, moved, plain, rates=settings.rates)
        if settings.rates.layer_decay != 1 and not any(group["above"] for group in self.optimizer.param_groups):
            events.note("nothing that trains here lies in a stack of layers: layer_decay has no effect")
        self.average = None
        if settings.average:
            self.average = MovingAverage(self.train_state.weights, decay=settings.average.decay)
        self.scaler = LossScale() if settings.compute.dtype == "float16" else None
        trained = Trained(
            tensors=self.train_state,
            optimizer=self.optimizer,
            average=self.average,
            scaler=self.scaler,
            batches=batches,
            progress=Progress(),
        )
        self.keeper = Keeper(folder, trained, settings, origin=origin, hooks=hooks, events=events, layout=self.layout)
        self.placeholders = placeholders(model)
        seed_everything(settings.seed)
        self.progress = self.keeper.resume()
        self.resumed_from = self.progress.step
        plan = Plan(
            task=hooks.task,
            total=settings.steps,
            log_every=settings.log_every,
            peak_flops=self._peak() * mesh.world(),
        )
        self.monitor = Monitor(folder, plan, step=self.progress.step, events=events)
        self.judge = Judge(settings, keeper=self.keeper, layout=self.layout, around=self._autocast, events=events)

    def all(self, stop: StopRequest) -> FitResult:
        """Every step that is left."""
        values: dict[str, Any] = {}
        with self.keeper.saver:
            self._catch_up(stop)
            while self.progress.step < self.settings.steps and not self._gave_up():
                self.keeper.saver.check()
                rng_back = rng_restorer()
                micro, waited = self._fetch(stop)
                if asked(stop):
                    rng_back()
                    self._stop(stop)
                seed_step(self.settings.seed, self.progress.step, self.layout.grid)
                try:
                    values = self._step(micro, waited, stop)
                except Woken:
                    rng_back()
                    self._stop(stop)
                step = self.progress.step
                is_best = self.progress.best is not None and self.progress.best[0] == step
                last = step == self.settings.steps or self._gave_up()
                if last or self.keeper.due(step) or is_best or self.judge.went_back:
                    self.keeper.save(before=self.monitor.sync)
                if asked(stop):
                    self._stop(stop)
            self.keeper.wait()
        self.monitor.results()
        return FitResult(
            checkpoint=self.keeper.leave(gave_up=self._gave_up()),
            step=self.progress.step,
            skipped=self.progress.skipped,
            overflowed=self.progress.overflowed,
            spikes=self.progress.spikes,
            rewound=self.progress.rewound,
            best=self.progress.best,
            resumed_from=self.resumed_from,
            values=values,
        )

    def _peak(self) -> float:
        """What this device can do in a second; 0 where nobody tells what a step asks of it."""
        if self.hooks.flops is None or self.hooks.peak_flops:
            return self.hooks.peak_flops

        def measured() -> float:
            try:
                return peak_rate(self.settings.compute, events=self.events)
            except Exception as error:  # a figure for the eye never costs the run
                self.events.note(f"matrix products could not be measured, so there is no MFU: {first_line(error)}")
                return 0.0

        return mesh.first(measured)

    def _catch_up(self, stop: StopRequest) -> None:
        """Evaluate and tell the step that a signal ended, as if nothing had happened."""
        progress = self.progress
        if progress.unjudged and (found := self._evaluate(stop)):
            self.monitor.amend(progress.step, found)
            if progress.best is not None and progress.best[0] == progress.step:
                progress.anchor = progress.step  # where nobody stops it, a run saves here
            if progress.untold is not None:
                progress.untold |= found
        if progress.untold is not None and not asked(stop):
            self._tell(progress.untold, stop)
        if asked(stop):
            self._stop(stop)

    def _fetch(self, stop: StopRequest) -> tuple[Sequence[Batch], float]:
        """The next step's batches and the seconds they took; a signal ends the wait, since nothing is half done."""
        began = time.perf_counter()
        try:
            with stop.wake():
                micro = self.batches.step_batches(self.progress.step)
        except Woken:
            micro = ()
        return micro, time.perf_counter() - began

    def _step(self, micro: Sequence[Batch], waited: float, stop: StopRequest) -> dict[str, Any]:
        """One update.

        Raises:
            Woken: A signal came and the gradient was not there in time: everything is as before the step, but for the
                generators.
        """
        began = time.perf_counter()
        settings, step = self.settings, self.progress.step
        factor = settings.schedule.factor(step, settings.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        if isinstance(self.layout.objective, Paced):
            self.layout.objective.pace(step, settings.steps)
        kept = {name: buffer.clone() for name, buffer in self.train_state.buffers().items()}
        micro, sums = self._gradient(micro, kept, stop)
        norms = self._clip() if sums.complete else Norm(math.nan)  # that of a part of the gradient says nothing
        self.progress.step += 1
        found = self._values(sums, norms=norms, factor=factor)
        updated = self._update(kept, sums, norm=norms.total, micro=micro, stop=stop)
        self._note_timeline()
        self.train_state.zero_grad()
        units = total_units(micro, self.layout.grid, placeholders=self.placeholders, flops=self.hooks.flops)
        self.progress.taken += units.samples if updated else 0
        cost = Cost(
            samples=units.samples,
            tokens=units.tokens,
            flops=units.flops,
            wait_s=waited,
            work_s=time.perf_counter() - began,
            save_s=self.keeper.saver.take_stalled(),
        )
        self.judge.settle()  # before it is judged: what is saved is what was judged
        found |= {"skipped": self.progress.skipped} | units.shares() | self._went_wrong()
        found |= {} if self.judge.ends else self._evaluate(stop)
        values = self.monitor.step(self.progress.step, found, cost)
        if self.judge.ends:
            self.judge.end(self.folder)
        if self.progress.unjudged:
            self.progress.untold = values  # told with its evaluation, when resumed
        else:
            self._tell(values, stop)
        return values

    def _tell(self, values: Mapping[str, Any], stop: StopRequest) -> None:
        """Tell the caller's hook; one that takes too long after a signal is given up, and told again when resumed."""
        self.progress.untold = None
        on_step, step = self.hooks.on_step, self.progress.step
        if on_step is None or not self.hooks.tells(step):
            return

        def tell() -> None:
            on_step(step, values)

        try:
            with rng_kept(), self.keeper.shown(), patience(stop):
                mesh.first(tell)
        except Woken:
            self.progress.untold = dict(values)
        finally:
            self.modes.reset_modes()

    def _gradient(
        self, micro: Sequence[Batch], kept: Mapping[str, Tensor], stop: StopRequest
    ) -> tuple[Sequence[Batch], Sums]:
        """The gradient of a step, in smaller micro-batches if it does not fit the memory; also returns these.

        Raises:
            Woken: As in :meth:`_step`.
            ResourceError: The smallest micro-batches do not fit.
        """
        rng_back = rng_restorer()
        while True:
            parts = divided(micro, self.progress.pieces)
            check_batches(parts, self.layout.objective, step=self.progress.step)
            try:
                with patience(stop):
                    sums = accumulate(
                        self.layout.model,
                        self.layout.objective,
                        parts,
                        weights=self.settings.weights,
                        around=self._autocast,
                        scale=self.scaler.scale if self.scaler else 1.0,
                        layout=self.layout,
                    )
                return parts, sums
            except Woken:
                self._buffers_back(kept)
                self.train_state.zero_grad()
                raise
            except Exception as error:
                if not (isinstance(error, Exhausted) or out_of_memory(error)):
                    raise
                why, passes = first_line(error), isinstance(error, Exhausted)
            # What the error held is free only here.
            self._buffers_back(kept)
            self.train_state.zero_grad()
            release()
            rng_back()
            self.progress.pieces = smaller(
                micro,
                self.progress.pieces,
                why=why,
                step=self.progress.step + 1,
                passes=passes,
                splits=self.settings.guard.out_of_memory == "split",
                apart=not self.layout.objective.needs_global_batch or isinstance(self.layout.objective, Pairwise),
                events=self.events,
            )

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        return autocast(self.settings.compute.device, self.settings.compute.dtype)

    def _went_wrong(self) -> dict[str, int]:
        """Counts that are there only where something did."""
        counts = {"spikes": self.progress.spikes, "rewound": self.progress.rewound}
        return {name: count for name, count in counts.items() if count}

    def _update(
        self, kept: Mapping[str, Tensor], sums: Sums, *, norm: float, micro: Sequence[Batch], stop: StopRequest
    ) -> bool:
        """Move the weights, or leave the update out where something went wrong; whether it was made."""
        finite = sums.complete and math.isfinite(sums.loss) and math.isfinite(norm)
        too_high = self.scaler is not None and math.isfinite(sums.loss) and not finite and self.scaler.scale > 1
        if self.scaler is not None and math.isfinite(sums.loss):
            self.scaler.update(finite=finite)
            self.progress.scale = (self.scaler.scale, self.scaler.good)
        if too_high:  # nothing is wrong with these samples: a smaller scale will do
            self.progress.overflowed += 1
        elif self.judge.update(sums, norm=norm, micro=micro, stop=stop):
            self.layout.update(self.optimizer)
            if self.average is not None:
                self.average.update()
                self.progress.averaged = self.average.updates
            return True
        self._buffers_back(kept)
        return False

    def _evaluate(self, stop: StopRequest) -> dict[str, float]:
        """Ask the hook if it is time, and remember the best; given up after a signal, it is asked when resumed."""
        settings, step, evaluate = self.settings.stopping, self.progress.step, self.hooks.evaluate
        self.progress.unjudged = False
        if settings is None or evaluate is None or (step % settings.every and step != self.settings.steps):
            return {}
        try:
            with rng_kept(), self.keeper.shown(), patience(stop):
                found = mesh.first(lambda: judged(evaluate))
        except Woken:
            self.progress.unjudged = True
            return {}
        finally:
            self.modes.reset_modes()
        best, value = self.progress.best, found[EVALUATION]
        if settings.gains(value, best[1] if best else None):
            self.progress.best, self.progress.stale = (step, value), 0
        else:
            self.progress.stale += 1
        said = f"now the best, after {best[1]:.6g}" if best and not self.progress.stale else "the first"
        if self.progress.stale and self.progress.best is not None:
            at, most = self.progress.best
            several = "s" if self.progress.stale > 1 else ""
            said = f"the best is {most:.6g} of step {at}, {self.progress.stale} evaluation{several} ago"
        beside = f" (on training samples {found[ON_TRAINING]:.6g})" if ON_TRAINING in found else ""
        self.events.note(f"step {step}: evaluation {value:.6g}{beside}; {said}", step=step, evaluation=str(value))
        return found

    def _gave_up(self) -> bool:
        """Whether the last evaluations brought no gain; told by the checkpoint, so that a resumed run stays stopped."""
        settings = self.settings.stopping
        return settings is not None and 0 < settings.patience <= self.progress.stale

    def _values(self, sums: Sums, *, norms: Norm, factor: float) -> dict[str, float]:
        values = {"loss": sums.loss} | {f"loss/{term}": value for term, value in sums.terms.items()}
        values |= {"grad_norm": norms.total} | {f"grad_norm/{part}": norm for part, norm in norms.parts.items()}
        values |= {"lr": self.settings.rates.lr * factor}
        values |= {f"lr/{part}": rate * factor for part, rate in self.settings.rates.parts.items()}
        values |= {f"units/{term}": count for term, count in sums.counts.items()}
        return values | ({"loss_scale": self.scaler.scale} if self.scaler else {})

    def _clip(self) -> Norm:
        """Scale the gradient to ``clip_norm`` if it is longer; returns its norm before, without the loss's scale."""
        grads = [w.grad for w in self.train_state.weights.values() if w.grad is not None]
        if self.scaler is not None:
            self.scaler.unscale([dtensors.local(grad) for grad in grads])
        return self.layout.clip(self.train_state.weights, self.settings.clip_norm)

    def _note_timeline(self) -> None:
        """Keep what a pipeline's stages did in a step that they measured, and say how long they were idle."""
        spans = self.layout.take_timeline()
        if spans and mesh.rank() == 0:
            record = timeline_record(spans, step=self.progress.step, schedule=self.settings.parallel.schedule)
            write_json(self.folder / "timeline.json", record)
            several = "es" if record["micro_batches"] > 1 else ""
            self.events.note(
                f"pipeline of {record['stages']} stages, {record['micro_batches']} micro-batch{several}: idle for "
                f"{record['idle']:.0%} of step {self.progress.step}, {record['bubble']:.0%} if all took equally long",
                idle=record["idle"],
            )

    def _buffers_back(self, kept: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, buffer in self.train_state.buffers().items():
                buffer.copy_(kept[name])

    def _stop(self, stop: StopRequest) -> None:
        step = self.progress.step
        if step and self.keeper.saver.asked != step:
            self.keeper.save(before=self.monitor.sync, planned=False)
        self.keeper.wait()
        text = (
            f"stopped after step {step} of {self.settings.steps}, which is saved" if step else "stopped before step 1"
        )
        self.events.note(text, step=step, signal=stop.signal)
        raise Stopped(stop.signal, text)
