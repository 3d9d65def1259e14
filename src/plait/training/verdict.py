"""What becomes of a step that went wrong: its update is made, left out, or training goes back or ends."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from torch import nn

from plait.core import mesh
from plait.core.errors import ConfigError, NumericsError
from plait.core.events import Events
from plait.core.protocols import Batches, Pairwise, holds_state
from plait.core.tensors import Batch
from plait.training import blame
from plait.training.blame import Around
from plait.training.gradient import Sums, named
from plait.training.guard import Spike, Watch
from plait.training.interrupt import StopRequest, Woken
from plait.training.keeping import Keeper
from plait.training.monitor import write_skipped
from plait.training.parallel.layout import Whole
from plait.training.ranks import patience
from plait.training.settings import Settings
from plait.training.state import Progress


class Judge:
    """Decides about the update of each step, by :class:`plait.training.guard.Guard`.

    Args:
        settings: Of the run.
        keeper: Has the checkpoints to go back to, and how far training is.
        layout: How processes hold the model.
        around: Entered around each forward, such as autocast.
        events: Where to say what went wrong.

    Attributes:
        ends: Why the run ends after this step; empty while it goes on.
        went_back: Whether the last step ended with the weights of a checkpoint, so that it has to be saved.

    Raises:
        ConfigError: Training is to go back, and the batches hold a state that cannot.
    """

    def __init__(self, settings: Settings, *, keeper: Keeper, layout: Whole, around: Around, events: Events) -> None:
        self._settings, self._keeper, self._layout = settings, keeper, layout
        self._around, self._events = around, events
        self._guard = settings.guard
        self._stop = StopRequest()
        self._watch = Watch(settings.guard, self._progress.watched)
        self.ends = ""
        self.went_back = self._goes_back = False
        if "rewind" in self._guard.actions and not 0 < settings.save_every < settings.steps and not settings.stopping:
            events.warning(
                f"guard is to rewind, and no checkpoint is made before the end ({settings.steps} steps, save_every "
                f"{settings.save_every}): what it would take back ends the run; set save_every lower"
            )
        _check_batches(keeper.trained.batches, goes_back="rewind" in self._guard.actions)

    @property
    def _progress(self) -> Progress:
        return self._keeper.trained.progress

    def update(self, sums: Sums, *, norm: float, micro: Sequence[Batch], stop: StopRequest) -> bool:
        """Whether to make the update of a step; says so and counts where it went wrong.

        Args:
            sums: What the step computed.
            norm: Of its gradient.
            micro: This process's micro-batches of it.
            stop: A signal ends the search for the sample.
        """
        progress, self._stop = self._progress, stop
        if not (sums.complete and math.isfinite(sums.loss) and math.isfinite(norm)):
            self._not_finite(sums, norm=norm, micro=micro)
            return False
        spike = self._watch.judge(sums.loss, norm)
        if spike is None:
            self._watch.took(sums.loss, norm)
            progress.watched = self._watch.plain()
            progress.spikes_in_row = 0
        elif not self._spiked(spike, sums, micro, norm=norm):
            return False
        progress.skipped_in_row = 0
        progress.broken.clear()
        return True

    def settle(self) -> None:
        """After the update or without it: go back, if that is what it came to. ``went_back`` says that it did."""
        progress = self._progress
        self.went_back = False
        if not self.ends and progress.skipped_in_row >= self._settings.max_skipped_in_row:
            if self._guard.not_finite == "rewind":
                self._goes_back = True
            else:
                self.ends = f"{progress.skipped_in_row} steps in a row were left out"
        if self._goes_back and not self.ends:
            self._goes_back = False
            self._rewind()

    def end(self, folder: Path) -> NoReturn:
        """End the run, after the record of its last step.

        Args:
            folder: Of the stage; gets ``not_finite.json``.

        Raises:
            NumericsError: Says why; the last checkpoint stays.
        """
        progress = self._progress
        last = progress.broken[-1] if progress.broken else {"samples": (), "loss": "", "grad_norm": ""}
        raise NumericsError(
            f"{self.ends} (loss {last['loss']}, gradient norm {last['grad_norm']})",
            place=f"step {progress.step}, samples {named(last['samples'])}",
            remedy=f"lower the rate or look at the samples in {write_skipped(folder, progress.broken)}; "
            f"the last good state is {self._keeper.saver.last_good()}",
        )

    # --- what went wrong -------------------------------------------------------------------------------------------

    def _not_finite(self, sums: Sums, *, norm: float, micro: Sequence[Batch]) -> None:
        """Count and name a step whose numbers are not finite."""
        ids = list(sums.not_finite) or _ids(micro)
        weights = self._keeper.trained.tensors.weights
        found = self._looked(lambda: _not_finite(self._layout, micro, weights=weights, around=self._around))
        where = next((one["where"] for one in found if one.get("where")), "")
        culprits = [name for one in found for name in one.get("samples", ())] or ids
        said = f"loss {sums.loss}, gradient norm {norm}"
        self._leave_out(said + (f", {where}" if where else ""), culprits, loss=sums.loss, norm=norm)
        if self._guard.not_finite == "stop":
            self.ends = f"{said} {where}".strip()

    def _spiked(self, spike: Spike, sums: Sums, micro: Sequence[Batch], *, norm: float) -> bool:
        """Count and name a spike; whether its update is made all the same."""
        progress, action = self._progress, self._guard.spike
        progress.spikes += 1
        progress.spikes_in_row += 1
        found = self._looked(lambda: {"samples": self._losses(sums, micro)})
        parts = sorted(((n, v) for one in found for n, v in one.get("samples", ())), key=lambda part: -part[1])
        whole = sum(part for _, part in parts)
        shares = [f"{name} ({part / whole:.0%} of the loss)" for name, part in parts[:3]] if whole > 0 else []
        culprits = [name for name, _ in parts] or _ids(micro)
        said = f"{spike}; {', '.join(shares)}" if shares else str(spike)
        if action == "warn":
            self._events.warning(
                f"step {progress.step}: {said}; the update was made (trainer.guard.spike)",
                step=progress.step,
                spike=spike.name,
                samples=culprits[:3] if parts else culprits,
            )
            if progress.spikes_in_row >= self._settings.max_skipped_in_row:
                self._events.note(f"{progress.spikes_in_row} steps in a row: what came is the new usual")
                self._watch.forget()
                progress.watched = self._watch.plain()
                progress.spikes_in_row = 0
            return True
        self._leave_out(
            said,
            culprits[:3] if parts else culprits,
            loss=sums.loss,
            norm=norm,
        )
        if action == "stop":
            self.ends = said
        self._goes_back = action == "rewind"
        return False

    def _leave_out(self, said: str, culprits: Sequence[str], *, loss: float, norm: float) -> None:
        progress = self._progress
        progress.skipped += 1
        progress.skipped_in_row += 1
        record = {"loss": str(loss), "grad_norm": str(norm), "samples": list(culprits)}
        progress.broken.append({"step": progress.step, **record})
        self._events.warning(
            f"step {progress.step}: {said}: update left out "
            f"({progress.skipped_in_row} in a row, {progress.skipped} in all); samples {named(culprits)}",
            step=progress.step,
            **record,
        )

    # --- which sample ----------------------------------------------------------------------------------------------

    def _looked(self, look: Callable[[], Mapping[str, Any]]) -> list[dict[str, Any]]:
        """What each process finds by running its micro-batches again; nothing where they pass in step.

        Looking must not cost the run: a fault of it is said.
        """
        grid = self._layout.grid
        pairwise = isinstance(self._layout.objective, Pairwise) and mesh.world() > 1
        if self._layout.in_step or grid.size("pipeline") > 1 or grid.size("tensor") > 1 or pairwise:
            return []
        try:
            with patience(self._stop):
                found = dict(look())
        except Woken:
            found = {}
            self._events.note("which samples it was is not looked for any longer: a signal came")
        except Exception as error:
            found = {}
            self._events.note(f"which samples it was could not be told: {type(error).__name__}: {error}")
        return mesh.gather(found)

    def _losses(self, sums: Sums, micro: Sequence[Batch]) -> list[tuple[str, float]]:
        return blame.losses(
            self._layout.model,
            self._layout.objective,
            micro,
            weights=self._settings.weights,
            counts=sums.counts,
            around=self._around,
        )

    # --- going back, ending ----------------------------------------------------------------------------------------

    def _rewind(self) -> None:
        progress = self._progress
        if progress.rewinds >= self._guard.rewinds:
            self.ends = f"it went wrong again after going back {progress.rewinds} times"
            return
        then = self._keeper.rewind()
        if then is None:
            self.ends = "there is no checkpoint to go back to: set save_every lower"
            return
        self.went_back = True
        lost, samples = progress.step - then.step, progress.taken - then.taken
        progress.rewinds += 1
        progress.rewound += lost
        progress.taken, progress.watched = then.taken, then.watched
        progress.skipped_in_row = progress.spikes_in_row = 0
        progress.broken.clear()
        self._watch = Watch(self._guard, then.watched)
        self._events.warning(
            f"went back to the weights of step {then.step}: the updates of steps {then.step + 1} to {progress.step} "
            f"are lost ({samples} samples, and those left out); going on with the data of step {progress.step + 1} "
            f"({progress.rewinds} of {self._guard.rewinds} times)",
            step=progress.step,
            rewound_to=then.step,
        )


def _not_finite(
    layout: Whole, micro: Sequence[Batch], *, weights: Mapping[str, nn.Parameter], around: Around
) -> dict[str, Any]:
    """Module and samples; or, where every pass is finite, the weights whose gradient is not."""
    found = blame.not_finite(layout.model, layout.objective, micro, around=around)
    if found.samples:
        return {"where": str(found), "samples": list(found.samples)}
    names, samples = blame.gradients(layout.model, layout.objective, micro, weights=weights, around=around)
    if not names:
        return {}
    return {"where": f"the loss is finite, the gradient of {named(names, limit=3)} is not", "samples": list(samples)}


def _ids(micro: Sequence[Batch]) -> list[str]:
    """Samples of a step in all processes."""
    own = [name for batch in micro for name in batch.sample_ids]
    return list(dict.fromkeys(name for told in mesh.gather(own) for name in told))


def _check_batches(batches: Batches, *, goes_back: bool) -> None:
    if goes_back and holds_state(batches):
        raise ConfigError(
            f"{type(batches).__name__} holds a state that belongs to the weights of a step, and guard is to rewind",
            place="guard",
            remedy="set guard.spike and guard.not_finite to skip or stop",
        )
