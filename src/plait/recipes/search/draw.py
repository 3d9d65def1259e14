"""What the next trial is, and which trials end early: Optuna's samplers and its asynchronous successive halving.

Nothing is kept here: what is drawn follows from the seed, the number of the trial and the trials before it, so that a
sweep that was killed goes on as if nothing had happened.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from plait.core.errors import ResourceError, pip_install
from plait.recipes.search.sweep import Halving, Range, Sweep

if TYPE_CHECKING:
    import optuna

State = Literal["complete", "pruned", "failed"]

_LEAST_FOR_IMPORTANCE = 8
_REDRAWS = 20
_EVEN_REDRAWS = 100


@dataclass(slots=True, kw_only=True)
class Trial:
    """One finished trial.

    Attributes:
        number: From 0.
        values: Searched settings.
        state: Ran to its end; was stopped early; ended by a fault or without a value.
        value: The metric; None of a failed one.
        step: Of that value.
        reached: The last step at which it told a value; 0 in trials from before this was kept.
        rungs: Values at which it was compared, by Optuna's name of the rung.
        error: Why it failed.
    """

    number: int
    values: dict[str, Any]
    state: State
    value: float | None = None
    step: int = 0
    reached: int = 0
    rungs: dict[str, float] = field(default_factory=dict[str, float])
    error: str = ""


class Running:
    """A trial at work: what it is, and whether it goes on.

    Args:
        sweep: The search.
        before: All trials before it, in order.
        values: Its settings if they were drawn before; else they are drawn now.

    Raises:
        ResourceError: Optuna is not installed.
    """

    def __init__(self, sweep: Sweep, before: Sequence[Trial], *, values: Mapping[str, Any] | None = None) -> None:
        self.sweep = sweep
        self._study = _study(sweep, before)
        number = len(before)
        if values is None and sweep.method == "grid":
            values = sweep.grid()[number]
        if values is not None:
            self._study.enqueue_trial({key: _inner(sweep, key, value) for key, value in values.items()})
        self._trial = self._ask()
        if values is None:
            self._draw_anew([trial.values for trial in before], seed=_seed(sweep, number))
        self.values = self._drawn()
        self.best: float | None = None
        self.best_step = 0

    def _ask(self) -> optuna.Trial:
        trial = self._study.ask()
        for key, distribution in _space(self.sweep).items():
            trial._suggest(key, distribution)
        return trial

    def _drawn(self) -> dict[str, Any]:
        return {key: _outer(self.sweep, key, self._trial.params[key]) for key in self.sweep.search}

    def _draw_anew(self, known: Sequence[Mapping[str, Any]], *, seed: int) -> None:
        """Draw until the settings are none that were tried, which would only give the same value; lists to their end.

        The sampler draws first, then chance. Where a range has hardly another number left, one is tried again.
        """
        for number in range(_REDRAWS + _EVEN_REDRAWS):
            if self._drawn() not in known:
                return
            if number == _REDRAWS:
                self._study.sampler = _optuna().samplers.RandomSampler(seed=seed)
            self._drop()
            self._trial = self._ask()
        rest = [] if any(isinstance(given, Range) for given in self.sweep.search.values()) else self.sweep.grid()
        left = next((values for values in rest if values not in known), None)
        if left is not None and self._drawn() in known:
            self._drop()
            self._study.enqueue_trial({key: _inner(self.sweep, key, value) for key, value in left.items()})
            self._trial = self._ask()

    def _drop(self) -> None:
        self._study.tell(self._trial, state=_optuna().trial.TrialState.FAIL)

    def goes_on(self, step: int, value: float) -> bool:
        """Tell a value; False if the trial is to end. A value that is not finite ends it."""
        if self.best is None or self._is_better(value, self.best):
            self.best, self.best_step = value, step
        if self.sweep.halving is None:
            return True
        judged = self.best if self.sweep.take == "best" else value
        self._trial.report(judged, step)
        return not self._trial.should_prune()

    @property
    def rungs(self) -> dict[str, float]:
        """Values at which it was compared."""
        found = self._study.get_trials(deepcopy=False)[-1].system_attrs
        return {key: value for key, value in found.items() if key.startswith("completed_rung_")}

    def _is_better(self, one: float, other: float) -> bool:
        if math.isnan(one) or math.isnan(other):
            return math.isnan(other) and not math.isnan(one)
        return one < other if self.sweep.direction == "minimize" else one > other


def best_of(sweep: Sweep, trials: Sequence[Trial]) -> Trial | None:
    """The trial that ran to its end with the best value; the first one of equals."""
    sign = 1.0 if sweep.direction == "minimize" else -1.0
    done = [trial for trial in trials if trial.state == "complete" and trial.value is not None]
    return min(done, key=lambda trial: (sign * (trial.value or 0.0), trial.number)) if done else None


def importance(sweep: Sweep, trials: Sequence[Trial]) -> dict[str, float]:
    """Share of each setting in what separates good trials from others (PED-ANOVA); empty where that says nothing."""
    done = [trial for trial in trials if trial.state == "complete"]
    if len(done) < _LEAST_FOR_IMPORTANCE or len(sweep.search) < 2 or len({trial.value for trial in done}) < 3:
        return {}
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna calls it experimental
        try:
            found = get_param_importances(_study(sweep, trials), evaluator=PedAnovaImportanceEvaluator())
        except (ValueError, RuntimeError, ZeroDivisionError):
            return {}
    return {key: round(share, 4) for key, share in found.items() if math.isfinite(share)}


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ResourceError(
            "optuna is not installed: it draws what a sweep tries",
            place="plait sweep",
            remedy=pip_install("plait[sweep]"),
        ) from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def _study(sweep: Sweep, trials: Sequence[Trial]) -> optuna.Study:
    """A study that knows these trials and draws the next one."""
    library = _optuna()
    seed = _seed(sweep, len(trials))
    samplers = library.samplers
    sampler = samplers.TPESampler(seed=seed) if sweep.method == "tpe" else samplers.RandomSampler(seed=seed)
    study = library.create_study(direction=sweep.direction, sampler=sampler, pruner=_pruner(library, sweep.halving))
    states = library.trial.TrialState
    space = _space(sweep)
    for trial in trials:
        told = {} if trial.value is None else {trial.reached or trial.step: trial.value}
        study.add_trial(
            library.trial.create_trial(
                state={"complete": states.COMPLETE, "pruned": states.PRUNED}.get(trial.state, states.FAIL),
                value=trial.value if trial.state == "complete" else None,
                params={key: _inner(sweep, key, trial.values[key]) for key in space},
                distributions=space,
                intermediate_values={trial.reached or trial.step: trial.value}
                if told and trial.state == "pruned"
                else {},
                system_attrs=dict(trial.rungs),
            )
        )
    return study


def _seed(sweep: Sweep, number: int) -> int:
    """Of the draw of a trial."""
    return (sweep.seed * 1_000_003 + number) % 2**32


def _pruner(library: Any, halving: Halving | None) -> Any:
    if halving is None:
        return library.pruners.NopPruner()
    return library.pruners.SuccessiveHalvingPruner(
        min_resource=halving.least, reduction_factor=halving.reduction, min_early_stopping_rate=0
    )


def _space(sweep: Sweep) -> dict[str, Any]:
    library = _optuna()
    kinds = library.distributions
    found: dict[str, Any] = {}
    for key, given in sweep.search.items():
        if not isinstance(given, Range):
            found[key] = kinds.CategoricalDistribution([_text(value) for value in given])
        elif given.whole:
            found[key] = kinds.IntDistribution(given.low, given.high, log=given.log, step=given.step or 1)
        else:
            found[key] = kinds.FloatDistribution(given.low, given.high, log=given.log, step=given.step)
    return found


def _text(value: Any) -> str:
    """A listed value as Optuna keeps it, which takes no lists and no mappings."""
    return json.dumps(value, sort_keys=True)


def _inner(sweep: Sweep, key: str, value: Any) -> Any:
    return value if isinstance(sweep.search[key], Range) else _text(value)


def _outer(sweep: Sweep, key: str, value: Any) -> Any:
    return value if isinstance(sweep.search[key], Range) else json.loads(value)
