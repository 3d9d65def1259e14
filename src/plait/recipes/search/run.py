"""``plait sweep``: trials one after the other, each in a process of its own; then one run of the best settings."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from plait.core.errors import ConfigError, DataError, PlaitError, ResourceError, Stopped, UsageError
from plait.core.events import Event, Events
from plait.core.files import lock, new_run, read_json, stage_folder, write_atomic, write_json
from plait.core.launch import launched
from plait.core.spec import Resolved, load, to_yaml
from plait.core.yamltext import Node, Source, put, read_override, write_text
from plait.recipes import run as runner
from plait.recipes.recipe import Recipe, load_recipe, shipped
from plait.recipes.search import folder as files
from plait.recipes.search.draw import Running, Trial, best_of, importance
from plait.recipes.search.sweep import Plan, Sweep, check, from_folders, metrics_file
from plait.recipes.search.work import LOG, Ended, Watcher, fields, read_values, work
from plait.report.sweep_page import SweepFacts, write_sweep_page
from plait.training import plan as machine_plan

SWEEPS = Path("sweeps")
"""Where sweeps go unless told otherwise, relative to the working directory."""

_FINAL = "final"
_ENV = "env.json"
_SHOWN_ERRORS = 3

Worker = Callable[[Path, Watcher | None], Ended]
"""Runs what is in a run folder; :func:`plait.recipes.search.work.work`."""

Listeners = tuple[Callable[[Event], None], ...]


@dataclass(slots=True)
class Outcome:
    """What a sweep found.

    Attributes:
        folder: Of the sweep.
        plan: What was searched.
        trials: All that ended.
        best: The best that ran to its end.
        final: Run folder of the best settings with test scores; None if there is none.
    """

    folder: Path
    plan: Plan
    trials: list[Trial] = field(default_factory=list[Trial])
    best: Trial | None = None
    final: Path | None = None


def start(sweep: Sweep, *, root: Path = SWEEPS, listeners: Listeners = (), worker: Worker = work) -> Outcome:
    """Check a sweep, create its folder and run it.

    Args:
        sweep: What to search.
        root: Where sweeps go.
        listeners: Told of every event.
        worker: Runs a trial.

    Raises:
        ConfigError: The sweep does not fit its recipe; nothing was created.
        DataError: No trial ran to its end.
        ResourceError: The disk does not hold the checkpoints of all trials, and nothing was created; or the machine
            failed in a trial, which a resumed sweep goes on with.
        Stopped: Ctrl-C or SIGTERM; what is finished is kept, the trial at work saved its state.
    """
    _refuse_processes()
    if sweep.recipe not in shipped():
        sweep = sweep.model_copy(update={"recipe": str(Path(sweep.recipe).resolve())})
    plan = check(from_folders(sweep, lambda part, key: Path()))
    Running(plan.sweep, [])  # a library that is missing is said now
    runner.check_first(plan.base.spec, root)
    _require_disk(plan, root)
    env = runner.environment() | {"threads": runner.usual_threads(), "processes": 1}
    contents = {
        files.SWEEP: to_yaml(plan.sweep),
        files.BASE: plan.base.to_yaml(),
        _ENV: json.dumps(env, indent=2) + "\n",
    }
    return _go_on(new_run(plan.sweep.name, root, contents=contents), plan, listeners=listeners, worker=worker)


def resume(
    folder: Path,
    *,
    trials: int | None = None,
    again: bool = False,
    listeners: Listeners = (),
    worker: Worker = work,
) -> Outcome:
    """Go on with a sweep: finished trials are kept, the one that was at work goes on from its checkpoint.

    Args:
        folder: Of the sweep.
        trials: Another number of them.
        again: Run the best settings to the end once more, although the test splits were read before.
        listeners: Told of every event.
        worker: Runs a trial.

    Raises:
        ConfigError: The recipe is another one than when the sweep began.
        UsageError: It is in use, or has nothing left to do.
    """
    _refuse_processes()
    sweep = load(Sweep, folder / files.SWEEP).spec
    if trials is not None and trials != sweep.trials:
        sweep = sweep.model_copy(update={"trials": trials})
    plan = check(sweep)
    if _settings(plan.base.to_yaml()) != _settings((folder / files.BASE).read_text(encoding="utf-8")):
        raise ConfigError(
            f"the recipe {sweep.recipe} is not what it was when the sweep began: trials would not compare",
            place=str(folder / files.BASE),
            remedy="put it back, or begin another sweep",
        )
    return _go_on(folder, plan, listeners=listeners, worker=worker, again=again)


def find_sweep(name: str, root: Path = SWEEPS) -> Path:
    """Resolve ``latest``, ``tiny-0003`` or a path to a sweep's folder.

    Raises:
        UsageError: There is none; lists the newest ones.
    """
    for candidate in (Path(name), root / name):
        if (candidate / files.SWEEP).is_file():
            return candidate.resolve()
    known = sorted(p.parent.name for p in root.glob(f"*/{files.SWEEP}") if not p.parent.is_symlink())
    remedy = f"choose one of: {', '.join(known[-5:])}" if known else "start one with `plait sweep SWEEP.yaml`"
    raise UsageError(f"no sweep called {name!r}", place=str(root.absolute()), remedy=remedy)


def _go_on(folder: Path, plan: Plan, *, listeners: Listeners, worker: Worker, again: bool = False) -> Outcome:
    with lock(folder):
        write_atomic(folder / files.SWEEP, to_yaml(plan.sweep))
        events = Events(folder / "events.jsonl", listeners=listeners)
        return _Sweeping(folder, plan, events=events, worker=worker).all(again=again)


class _Sweeping:
    """A sweep at work."""

    def __init__(self, folder: Path, plan: Plan, *, events: Events, worker: Worker) -> None:
        self.folder, self.plan, self.events, self.worker = folder, plan, events, worker
        self.env: dict[str, Any] = read_json(folder / _ENV)
        self.trials = files.read_trials(folder)

    def all(self, *, again: bool) -> Outcome:
        sweep = self.plan.sweep
        if self.trials:
            self.events.note(f"{len(self.trials)} trials were finished before")
        if sweep.trials and sweep.number < sweep.trials:
            self.events.note(f"the lists have {sweep.number} combinations: as many trials, not {sweep.trials}")
        base = None
        while len(self.trials) < sweep.number:
            base = base or self._shared()
            trial = self._trial(base)
            files.keep(self.folder, trial)
            self.trials.append(trial)
            self._tell(trial)
        best = best_of(sweep, self.trials)
        if best is None:
            self._refuse()
        assert best is not None
        self._write_best(best)
        final = self._final(best, again=again) if sweep.final or again else None
        self._write(final)
        return Outcome(self.folder, self.plan, trials=self.trials, best=best, final=final)

    # --- trials ----------------------------------------------------------------------------------------------------

    def _shared(self) -> Path | None:
        """The run of the stages before what is searched; None if there are none."""
        plan = self.plan
        if not plan.shared:
            return None
        run = files.make_run(self.folder / "shared", plan.begin(), self.env, files={})
        if not _finished(run):
            self.events.note(f"once for all trials: {', '.join(plan.shared)}")
            ended = self.worker(run, None)
            if ended.code:
                raise DataError(
                    f"what all trials share failed: {ended.error}",
                    place=str(run),
                    remedy=f"see {LOG} there, and resume",
                )
        return run

    def _trial(self, base: Path | None) -> Trial:
        """Run, or go on with, the next trial."""
        plan, number = self.plan, len(self.trials)
        run = files.trial_folder(self.folder, number)
        running = Running(plan.sweep, self.trials, values=files.drawn(run))
        values = running.values
        said = ", ".join(f"{key}={json.dumps(value)}" for key, value in values.items())
        same = next((trial.number for trial in self.trials if trial.values == values), None)
        if same is not None:
            said += f" (again: those of trial {same}, there is hardly anything else to try)"
        try:
            recipe = plan.trial(values)
        except ConfigError as fault:  # settings that do not go together
            self.events.note(f"trial {number}: {said}")
            return Trial(number=number, values=values, state="failed", error=str(fault))
        again = run.is_dir()
        shared = files.stage_folders(base, plan.shared) if base else ()
        files.make_run(run, recipe, self.env, files=files.drawn_file(number, values), shared=shared)
        self.events.note(f"trial {number}{' goes on' if again else ''}: {said}")
        stage = files.stage_folders(run, (*plan.shared, *plan.middle))[-1]
        path = metrics_file(plan, stage)
        seen = _Seen(path, plan.field, running)
        ended = self.worker(run, seen.look)
        self._check_machine(number, ended, run)
        return self._judge(number, running, seen, ended=ended, path=path)

    def _check_machine(self, number: int, ended: Ended, run: Path) -> None:
        """End the sweep where a trial ended by no fault of its settings; it has no result then, and is gone on with.

        Raises:
            Stopped: Somebody ended the trial by a signal.
            ResourceError: The machine is at fault.
        """
        if ended.signal:
            text = f"trial {number} was ended by {signal.Signals(ended.signal).name} from outside; it has no result"
            self.events.warning(f"{text}: `plait sweep --resume` goes on with it")
            raise Stopped(ended.signal, text)
        if ended.machine:
            raise ResourceError(
                f"trial {number} failed by the machine, not by its settings; it has no result: {ended.error}",
                place=str(run),
                remedy="mend that, and `plait sweep --resume`: the trial goes on from its checkpoint",
            )

    def _judge(self, number: int, running: Running, seen: _Seen, *, ended: Ended, path: Path) -> Trial:
        best = self.plan.sweep.take == "best"
        value, step = (running.best, running.best_step) if best else (seen.value, seen.step)
        trial = Trial(number=number, values=running.values, state="failed", step=step, reached=seen.step)
        trial.rungs = running.rungs
        if ended.code and not ended.stopped:
            trial.error = ended.error
        elif value is None and not ended.stopped:
            if not any(one.state != "failed" for one in self.trials):
                self._refuse_metric(path)
            trial.error = f"it reported no {self.plan.field}"
        elif value is None or not math.isfinite(value):
            trial.error = f"{self.plan.field} is not finite"
        else:
            trial.state, trial.value = ("pruned" if ended.stopped else "complete"), value
        return trial

    def _refuse_metric(self, path: Path) -> None:
        known = fields(path)
        place = ".".join(self.plan.sweep.metric.split(".")[:-1])
        hint = f"it reports: {', '.join(f'{place}.{name}' for name in known)}" if known else "it writes no metrics"
        more = ""
        if self.plan.field == "evaluation":
            more = "set trainer.validation of the stage, so that it is judged on the validation split; or "
        raise ConfigError(
            f"the first trial reported no {self.plan.sweep.metric}: {hint}",
            place="metric",
            remedy=f"{more}take one of those, in another sweep",
        )

    def _refuse(self) -> None:
        self._write(None)
        said = [f"trial {t.number}: {t.error or 'stopped early'}" for t in self.trials[:_SHOWN_ERRORS]]
        raise DataError(
            f"none of {len(self.trials)} trials ran to its end; {'; '.join(said)}",
            place=str(self.folder),
            remedy=f"mend what they say ({LOG} in a trial's folder has all), and begin another sweep",
        )

    def _tell(self, trial: Trial) -> None:
        best = best_of(self.plan.sweep, self.trials)
        shown = (
            trial.error if trial.value is None else f"{self.plan.sweep.metric} {trial.value:.6g} at step {trial.step}"
        )
        now = f"; best so far: trial {best.number}, {best.value:.6g}" if best and best.value is not None else ""
        state = {"pruned": "stopped early", "complete": "done", "failed": "failed"}[trial.state]
        kind = "warning" if trial.state == "failed" else "note"
        self.events.emit(kind, f"trial {trial.number}: {state}: {shown}{now}", trial=trial.number, state=trial.state)
        self.events.progress("trials", len(self.trials), self.plan.sweep.number)
        self._write(None)

    # --- the last run ----------------------------------------------------------------------------------------------

    def _final(self, best: Trial, *, again: bool) -> Path | None:
        """The best settings to the recipe's end, with test scores: the only time that test splits are read."""
        path = self.folder / files.ACCESS
        looks: list[dict[str, Any]] = read_json(path) if path.is_file() else []
        if looks and (done := self.folder / str(looks[-1]["run"])).is_dir() and _finished(done):
            if not again:
                if looks[-1]["trial"] != best.number:
                    self.events.warning(
                        f"trial {best.number} is the best now, but the test splits were read for trial "
                        f"{looks[-1]['trial']}: a second look chooses by the test; --again takes it all the same"
                    )
                return done
            looks.append(self._look(best, len(looks) + 1))
        elif not looks or not (self.folder / str(looks[-1]["run"])).is_dir():
            looks = [*looks[:-1], self._look(best, max(len(looks), 1))]
        write_json(path, looks)
        look = looks[-1]
        if look["trial"] != best.number:
            self.events.warning(
                f"trial {best.number} is the best now, and {files.BEST} has its settings, but the last run goes on "
                f"with trial {look['trial']}, for which it was begun; when that is done, `plait sweep --resume "
                f"--again` takes trial {best.number}, as a second look at the test splits"
            )
        trial = next(one for one in self.trials if one.number == look["trial"])
        from_run = files.trial_folder(self.folder, trial.number)
        names = (*self.plan.shared, *self.plan.middle)
        data, *others = files.stage_folders(from_run, names)
        sealed, begun = ((data,), others) if self.plan.shared else ((), [data, *others])
        run = self.folder / str(look["run"])
        files.make_run(run, self.plan.whole(trial.values), self.env, files={}, shared=sealed, begun=begun, shut=False)
        self.events.note(f"the last run: trial {trial.number} to the recipe's end; test splits are read now")
        ended = self.worker(run, None)
        if ended.code:
            raise DataError(
                f"the last run failed: {ended.error}", place=str(run), remedy="mend it, and `plait sweep --resume`"
            )
        return run

    def _look(self, best: Trial, number: int) -> dict[str, Any]:
        """A record of reading the test splits."""
        splits = files.test_splits(files.trial_folder(self.folder, best.number))
        name = f"{_FINAL}/{_FINAL}-{number:04d}"
        return {"run": name, "trial": best.number, "settings": best.values, "splits": splits}

    # --- what is written -------------------------------------------------------------------------------------------

    def _write_best(self, best: Trial) -> None:
        """``best.yaml``: what was found, on top of the original recipe; all of the recipe, where that says less."""
        tree = Node({}, Source("override"))
        for word in self.plan.overrides(best.values):
            tree = put(tree, *read_override(word))
        name = f"{self.plan.base.spec.name}-best"
        path, whole = self.folder / files.BEST, self.plan.whole(best.values)
        write_atomic(path, write_text({"extends": self.plan.sweep.recipe, "name": name, **tree.plain()}))
        if not _is(path, whole.spec):  # such as an item of a list, which no file that extends another can set alone
            alone = Resolved(whole.spec.model_copy(update={"name": name}), whole.sources)
            write_atomic(path, alone.to_yaml())

    def _write(self, final: Path | None) -> None:
        files.write_table(self.folder / files.TABLE, self.plan.sweep, self.trials)
        best = best_of(self.plan.sweep, self.trials)
        facts = SweepFacts(
            sweep=self.plan.sweep.model_dump(mode="json"),
            trials=[asdict(trial) for trial in self.trials],
            best=None if best is None else best.number,
            metrics=_metrics_path(self.plan),
            judged=self.plan.field,
            importance=importance(self.plan.sweep, self.trials),
            final=final,
        )
        try:
            write_sweep_page(self.folder, facts)
        except (PlaitError, OSError, ValueError) as fault:  # a page that cannot be written never costs the sweep
            self.events.warning(f"sweep.html was not written: {fault}")


class _Seen:
    """Follows the metric of a trial.

    A trial that is to end does so when it has gone beyond the step at which that was decided: one that was at its last
    step is done, however soon anybody looked.
    """

    def __init__(self, path: Path, field: str, running: Running) -> None:
        self.path, self.field, self.running = path, field, running
        self.step = 0
        self.value: float | None = None
        self._goes_on = True
        self._sentenced = False
        self._looked: tuple[int, int] | None = None

    def look(self, ended: bool) -> bool:
        """Take in what is new, in the order of steps; False once the trial is to end."""
        if not self._goes_on:
            return False
        state = self.path.stat() if self.path.is_file() else None
        mark = (state.st_size, state.st_mtime_ns) if state else None
        if mark == self._looked and not ended:
            return True
        self._looked = mark
        for step, value in read_values(self.path, self.field):
            if step <= self.step:
                continue
            if self._sentenced:
                self._goes_on = False
                return False
            if value is not None:
                self.step, self.value = step, value
                self._sentenced = not self.running.goes_on(step, value)
        return True


def _metrics_path(plan: Plan) -> str:
    """Where a trial's metrics are, from its folder."""
    names = (*plan.shared, *plan.middle)
    return metrics_file(plan, stage_folder(Path(), len(names), names[-1])).as_posix()


def _is(path: Path, recipe: Recipe) -> bool:
    """Whether a file is this recipe, but for its name."""
    try:
        return load_recipe(str(path)).spec.model_copy(update={"name": recipe.name}) == recipe
    except ConfigError:
        return False


def _require_disk(plan: Plan, root: Path) -> None:
    """Refuse a sweep whose trials, which are all kept, would fill the disk.

    Raises:
        ResourceError: As of a run; a trial is taken to need what the recipe needs as it is.
    """
    machine = machine_plan.survey(root, probe=False)
    number, last = plan.sweep.number, int(plan.sweep.final)
    times = dict.fromkeys(plan.middle, number + last) | dict.fromkeys(plan.shared[1:], 1 + last)
    times |= dict.fromkeys(plan.later, last)
    named = [(name, stage) for name, stage, _ in runner.stages(plan.base.spec, root)]
    all_of = [
        replace(needs, disk_bytes=needs.disk_bytes * times.get(needs.stage, 1))
        for needs in machine_plan.estimate_all(named, machine)
    ]
    try:
        machine_plan.require(machine_plan.total(all_of, machine), machine, place=root)
    except ResourceError as fault:
        raise ResourceError(
            f"{number} trials, of which all checkpoints are kept: {fault.cause}",
            place=fault.place,
            remedy=f"fewer trials; or {fault.remedy}",
        ) from fault


def _finished(run: Path) -> bool:
    return all(stage["state"] == "done" for stage in runner.summary(run)["stages"])


def _settings(text: str) -> Any:
    from plait.core.yamltext import read_text

    return read_text(text, files.BASE).plain()


def _refuse_processes() -> None:
    if launched():
        raise UsageError(
            "a sweep was started in several processes; its trials run in one each",
            place="torchrun",
            remedy="start it without torchrun: `plait sweep SWEEP.yaml`",
        )
