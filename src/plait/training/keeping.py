"""What one run keeps on disk and goes on from: when it saves, what it saves, and which checkpoint it leaves."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from plait.core import dtensors, mesh
from plait.core.errors import ConfigError, NumericsError
from plait.core.events import Events
from plait.core.protocols import Batches, StatefulBatches
from plait.training.average import MovingAverage
from plait.training.checkpoint import Checkpoints, check_origin
from plait.training.generators import rng_kept
from plait.training.gradient import named
from plait.training.parallel.layout import Whole
from plait.training.pieces import load_pieces, pieces
from plait.training.precision import LossScale
from plait.training.saving import Saver
from plait.training.settings import Hooks, Settings
from plait.training.sharded import save_together
from plait.training.state import (
    IN_PIECES,
    Origin,
    Progress,
    Stored,
    TrainState,
    digest_json,
    moved_by,
    read_batches,
    read_state,
    read_stored,
    restore_state,
    restore_weights,
    save_rest,
    save_state,
)


@dataclass(slots=True, kw_only=True)
class Trained:
    """What moves while training, from step to step.

    Attributes:
        tensors: Of the model and a stateful objective.
        optimizer: Moves them.
        average: Their moving average, where one is kept.
        scaler: Of float16.
        batches: Where data come from; may hold a state.
        progress: How far training is.
    """

    tensors: TrainState
    optimizer: torch.optim.Optimizer
    average: MovingAverage | None
    scaler: LossScale | None
    batches: Batches
    progress: Progress

    @property
    def averaged(self) -> dict[str, torch.Tensor]:
        """The moving average by name; nothing where none is kept."""
        return self.average.tensors() if self.average else {}


class Keeper:
    """Saves and restores one run. Several processes have one folder of checkpoints, that of the first.

    Args:
        folder: Of this process; holds ``checkpoints/``, if it is the first one.
        trained: What is saved.
        settings: Of the run.
        origin: What a run that goes on must agree with.
        hooks: What the caller adds to a checkpoint.
        events: Where to say what happens.
        layout: How the processes hold the model.

    Attributes:
        saver: Writes.
        checkpoints: Where.
    """

    def __init__(
        self,
        folder: Path,
        trained: Trained,
        settings: Settings,
        *,
        origin: Origin,
        hooks: Hooks,
        events: Events,
        layout: Whole,
    ) -> None:
        self.trained, self.settings, self.hooks, self.events = trained, settings, hooks, events
        self.origin = origin
        self._folder, self._layout = folder, layout
        home = Path(mesh.first(lambda: str(folder.resolve()))) if mesh.active() else folder
        self.checkpoints = Checkpoints(home / "checkpoints", keep_last=settings.keep_last, events=events)
        self.saver = Saver(self.checkpoints, events=events, beside=settings.async_save)

    # --- saving ----------------------------------------------------------------------------------------------------

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due; none is while updates are left out, as bad weights may be the reason."""
        every = self.settings.save_every
        return bool(every) and step % every == 0 and not self.trained.progress.skipped_in_row

    def save(self, *, before: Callable[[], None], planned: bool = True) -> None:
        """Save the step at hand; every process calls this.

        Args:
            before: Makes durable what a checkpoint must never be ahead of.
            planned: Whether a run that nobody stops would save here, too: only to such a step training may go back.

        Raises:
            NumericsError: A weight is not finite.
            ResourceError: The disk is full or not writable; earlier checkpoints are untouched.
        """
        trained = self.trained
        progress = trained.progress
        weights = trained.tensors.weights.items()
        broken = [name for name, weight in weights if not bool(dtensors.local(weight).isfinite().all())]
        broken = list(dict.fromkeys(name for found in mesh.gather(broken) for name in found))
        if broken:
            raise NumericsError(
                f"{len(broken)} weights are not finite after step {progress.step}: {named(broken)}",
                place=f"step {progress.step}",
                remedy=f"lower the learning rate; the last good state is {self.saver.last_good()}",
            )
        progress.anchor = progress.step if planned else progress.anchor
        best = [progress.best[0]] if progress.best else []
        stay = frozenset([*best, progress.anchor] if "rewind" in self.settings.guard.actions else best)

        def ready() -> None:
            before()
            self.checkpoints.stay = stay

        if self._layout.in_pieces:
            ready()
            self.saver.within(progress.step, self._save_pieces)
        elif mesh.rank() == 0:
            self.saver.save(progress.step, self._write, before=ready)
        else:
            before()
            self.saver.found(self.checkpoints.path(progress.step), step=progress.step)

    def _write(self, folder: Path) -> None:
        trained = self.trained
        save_state(
            folder,
            trained.tensors,
            trained.optimizer,
            progress=trained.progress,
            origin=self.origin,
            average=trained.averaged,
            batches=trained.batches.state() if isinstance(trained.batches, StatefulBatches) else {},
        )
        with rng_kept(), self.shown():
            self.hooks.save_model(folder)

    def _save_pieces(self) -> None:
        """Each process its own pieces; the model's own files by the first, from whole weights."""
        trained, step = self.trained, self.trained.progress.step
        tensors, scalars = pieces(trained.tensors, trained.optimizer, average=trained.averaged)
        scalars = {name: value for told in mesh.gather(scalars) for name, value in told.items()}

        def rest(folder: Path) -> None:
            (folder / "resume").mkdir()
            save_rest(folder, scalars, progress=trained.progress, origin=self.origin, form=IN_PIECES)
            with rng_kept():
                self.hooks.save_model(folder)

        with self.shown():
            save_together(self.checkpoints, step, tensors, write=rest)

    def shown(self) -> contextlib.AbstractContextManager[None]:
        """The model as others may see it: with its average, where that is used."""
        used = self.settings.average is not None and self.settings.average.use
        return self._layout.shown(self.trained.average if used else None)

    def wait(self) -> None:
        """Wait for the checkpoint that is on its way, in whatever process it is."""
        mesh.first(self.saver.wait)

    # --- going on --------------------------------------------------------------------------------------------------

    def resume(self) -> Progress:
        """Go on from the newest whole checkpoint, if there is one; every process reads it."""
        trained = self.trained
        path = mesh.first(lambda: str(self.checkpoints.newest() or ""))
        if not path:
            return trained.progress
        found = Path(path)
        check_origin(found, self.origin, events=self.events)
        stored = self._stored(found)
        trained.progress = restore_state(
            found, trained.tensors, trained.optimizer, stored=stored, elsewhere=self._layout.elsewhere
        )
        if isinstance(trained.batches, StatefulBatches):
            trained.batches.restore(read_batches(found))
        if trained.average is not None:
            self._resume_average(trained.average, stored.average, found)
        if trained.scaler is not None and trained.progress.scale:
            trained.scaler.scale, trained.scaler.good = trained.progress.scale
        self.saver.found(found, step=trained.progress.step)
        self._say_resumed(found)
        return trained.progress

    def rewind(self) -> Progress | None:
        """Put weights, optimizer, average and scale back to the last checkpoint; every process calls this.

        Steps and generators stay as they are. One that only a stopped run has is passed over, so that such a run ends
        where one ends that ran through.

        Returns:
            How far the run was then; None where there is no checkpoint.
        """
        trained = self.trained
        self.wait()
        anchor = trained.progress.anchor
        path = mesh.first(lambda: str(self.checkpoints.whole(anchor) or self.checkpoints.newest() or ""))
        if not path or not anchor:
            return None
        if Path(path) != self.checkpoints.path(anchor):
            self.events.warning(f"checkpoint {anchor} is damaged or missing: back to {Path(path).name} instead")
        stored = self._stored(Path(path))
        with rng_kept():
            then = restore_state(
                Path(path), trained.tensors, trained.optimizer, stored=stored, elsewhere=self._layout.elsewhere
            )
        trained.progress.averaged, trained.progress.scale = then.averaged, then.scale
        if trained.average is not None:
            self._resume_average(trained.average, stored.average, Path(path))
        if trained.scaler is not None and then.scale:
            trained.scaler.scale, trained.scaler.good = then.scale
        return then

    def _stored(self, checkpoint: Path) -> Stored:
        """Tensors of a checkpoint, however it holds them."""
        elsewhere = self._layout.elsewhere
        if read_state(checkpoint)["format"] == IN_PIECES:
            moved = moved_by(self.trained.optimizer)
            return load_pieces(checkpoint, self.trained.tensors, moved=moved, elsewhere=elsewhere)
        return read_stored(checkpoint).without(elsewhere)

    def _resume_average(self, average: MovingAverage, means: Mapping[str, torch.Tensor], found: Path) -> None:
        """Go on with the average of a checkpoint, or begin one where none was kept until now."""
        progress = self.trained.progress
        if means:
            average.restore(means, updates=progress.averaged)
            return
        average.begin()
        progress.averaged = 0
        self.events.note(f"{found.name} has no moving average: it begins with the weights of step {progress.step}")

    def _say_resumed(self, found: Path) -> None:
        step, total = self.trained.progress.step, self.settings.steps
        if step > total:
            raise ConfigError(
                f"steps is {total}, but {step} are done", place=str(found), remedy=f"set steps to {step} or more"
            )
        schedule = self.settings.schedule
        before = read_state(found)["settings"]["steps"]
        rates = [self.settings.rates.lr * schedule.factor(step, count) for count in (before, total)]
        if rates[0] != rates[1]:
            self.events.warning(
                f"{total} steps, not {before}, bend the schedule: the next rate is {rates[1]:.3g}, not {rates[0]:.3g}"
            )
        tensors, optimizer = self.trained.tensors, self.trained.optimizer
        weights = sum(w.numel() for w in tensors.weights.values())
        restored = {
            "model": f"{weights:,} weights, {len(tensors.buffers())} buffers",
            "optimizer": f"{self.settings.optimizer.kind}, {len(optimizer.state)} states",
            "schedule": f"next rate {rates[1]:.3g}",
            "random numbers": "Python, NumPy, torch" if not mesh.active() else "drawn anew for each step and process",
            "data cursor": f"step {step}",
        }
        self.events.note(
            f"resumed at step {step} of {total}: " + ", ".join(f"{part} ({what})" for part, what in restored.items()),
            step=step,
            checkpoint=str(found),
            restored=restored,
            settings_sha256=digest_json(self.origin.settings),
        )

    # --- the end ---------------------------------------------------------------------------------------------------

    def leave(self, *, gave_up: bool) -> Path:
        """Leave the model as it is best, or as it is last; returns its checkpoint, seen from this process's folder."""
        trained, progress = self.trained, self.trained.progress
        step, best = progress.step, progress.best
        if best is not None and best[0] != step:
            if path := mesh.first(lambda: str(self.checkpoints.whole(best[0]) or "")):
                then = read_state(Path(path))["settings"].get("average")  # may have been taken up or dropped since
                stored = self._stored(Path(path))
                restore_weights(Path(path), trained.tensors, stored, average=bool(then and then["use"]))
                early = f"stopped early, after step {step} of {self.settings.steps}: " if gave_up else ""
                self.events.note(f"{early}the model is that of step {best[0]}, evaluation {best[1]:.6g}", step=best[0])
                return self._here(best[0])
            self.events.warning(
                f"the checkpoint of the best step, {best[0]}, is damaged or missing: the model is that of step {step}; "
                f"to have the best one (evaluation {best[1]:.6g}), put a good copy back and resume",
                step=best[0],
            )
        if trained.average is not None and self.settings.average is not None and self.settings.average.use:
            trained.average.copy_to_model()
        return self._here(step)

    def _here(self, step: int) -> Path:
        return self._folder / "checkpoints" / self.checkpoints.path(step).name
