"""What a caller hands to the training loop: batches, settings, hooks; and what it gets back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from plait.core.device import Compute
from plait.core.errors import ConfigError
from plait.core.protocols import Batches, StatefulBatches, holds_state
from plait.core.spec import defaults
from plait.core.tensors import Batch
from plait.data.sources import JUDGED_SEED
from plait.training.checkpoint import DEFAULTS
from plait.training.guard import Guard
from plait.training.optim import AdamW, Optimizer, Rates
from plait.training.schedule import Cosine, Schedule
from plait.training.trainer import Average, Parallel, Trainer, Validate, check_context, check_spread, check_staged


@dataclass(frozen=True, slots=True)
class OnDevice:
    """Batches of another source, moved to a device."""

    batches: Batches
    device: str

    def step_batches(self, step: int) -> Sequence[Batch]:
        """The other's batches."""
        return [batch.to(torch.device(self.device)) for batch in self.batches.step_batches(step)]

    @property
    def holds_state(self) -> bool:
        """Whether the other one does."""
        return holds_state(self.batches)

    def state(self) -> Mapping[str, Tensor]:
        """The other's state; nothing if it has none."""
        return self.batches.state() if isinstance(self.batches, StatefulBatches) else {}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Give the other its state back."""
        if isinstance(self.batches, StatefulBatches):
            self.batches.restore(tensors)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopping:
    """Evaluating while training. The best checkpoint is never rotated away, and is the result of the run.

    Attributes:
        every: Steps between evaluations; the last step is evaluated, too.
        patience: So many evaluations in a row without a gain end the run; 0 never does.
        least_gain: What the best value must be beaten by.
        higher: Whether higher values are better.
    """

    every: int
    patience: int = 0
    least_gain: float = 0.0
    higher: bool = False

    def __post_init__(self) -> None:
        for name, bound in {"every": 1, "patience": 0, "least_gain": 0}.items():
            if not getattr(self, name) >= bound:
                raise ConfigError(f"{name} is {getattr(self, name)}", place=name, remedy=f"set it to {bound} or more")

    @classmethod
    def of(cls, validation: Validate | None) -> Stopping | None:
        """As a recipe says."""
        if validation is None:
            return None
        return cls(every=validation.every, patience=validation.patience, least_gain=validation.least_gain)

    def gains(self, value: float, best: float | None) -> bool:
        """Whether a value beats the best one so far; NaN never does."""
        if best is None or math.isnan(value):
            return not math.isnan(value)
        return value > best + self.least_gain if self.higher else value < best - self.least_gain


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How to train.

    Attributes:
        steps: Updates in all.
        compute: Device, dtype and threads, from :func:`plait.core.device.setup`.
        seed: Seeds Python, NumPy and torch before the first step.
        rates: Peak learning rates.
        optimizer: Which.
        schedule: How the rates move.
        weights: Weight of each loss term; 1 where none is given, 0 only reports the term.
        clip_norm: Largest norm of the whole gradient; None never clips.
        average: Keep a moving average of the trained weights.
        stopping: Evaluate while training, keep the best checkpoint, and stop early; needs :attr:`Hooks.evaluate`.
        log_every: Steps between records in ``metrics.jsonl``.
        save_every: Steps between checkpoints; 0 saves only the last step.
        keep_last: Checkpoints kept.
        async_save: Write checkpoints beside training, from a copy of the state in host memory; a step waits only while
            it is copied, or where the checkpoint before is still being written.
        max_skipped_in_row: So many steps in a row whose updates are left out end the run.
        guard: What happens where a step goes wrong. A run may go on with another one.
        head: How losses over a vocabulary are computed, where the model leaves a choice: ``fused`` or ``full``.
        recompute: What Transformer blocks keep for the backward pass (:mod:`plait.models.recompute`).
        compile: Whether Transformer blocks are compiled (:mod:`plait.models.compiled`).
        parallel: How several processes share the work.
        context: The caller's own settings as plain data (its spec); recorded, and compared when the run is resumed.
        context_defaults: What stands in it where nobody sets anything, by dotted path
            (:func:`plait.core.spec.defaults`): a run goes on with a setting that is newer than its checkpoint, while
            that is at its default.
    """

    steps: int
    compute: Compute
    seed: int = 0
    rates: Rates = field(default_factory=Rates)
    optimizer: Optimizer = field(default_factory=AdamW)
    schedule: Schedule = field(default_factory=Cosine)
    weights: Mapping[str, float] = field(default_factory=dict)
    clip_norm: float | None = 1.0
    average: Average | None = None
    stopping: Stopping | None = None
    log_every: int = 1
    save_every: int = 0
    keep_last: int = 2
    async_save: bool = False
    max_skipped_in_row: int = 10
    guard: Guard = field(default_factory=Guard)
    head: Literal["fused", "full"] = "fused"
    recompute: Literal["none", "full", "selective"] = "none"
    compile: bool = False
    parallel: Parallel = field(default_factory=Parallel)
    context: Mapping[str, Any] = field(default_factory=dict)
    context_defaults: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        least = {"steps": 1, "log_every": 1, "save_every": 0, "keep_last": 1, "max_skipped_in_row": 1}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ConfigError(f"{name} is {getattr(self, name)}", place=name, remedy=f"set it to {bound} or more")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ConfigError(
                f"clip_norm is {self.clip_norm}", place="clip_norm", remedy="set it above 0, or to null for no clipping"
            )

        try:
            check_context(self.parallel, compiles=self.compile)
            if self.parallel.spreads:
                check_spread(self.optimizer.kind, compiles=self.compile, async_save=self.async_save)
        except ValueError as error:
            raise ConfigError(str(error), place="parallel", remedy="change one of the two") from error
        if self.parallel.pipeline > 1:
            try:
                check_staged(compiles=self.compile, async_save=self.async_save)
            except ValueError as error:
                raise ConfigError(str(error), place="parallel.pipeline", remedy="change one of the two") from error

    def with_trainer(
        self,
        trainer: Trainer,
        *,
        lr: float,
        parts: Mapping[str, float] | None = None,
        weight_decay: float | None = None,
    ) -> Settings:
        """A copy that trains as a recipe's ``trainer`` says.

        Args:
            trainer: What the recipe gives.
            lr: Peak learning rate of every weight that ``parts`` does not name.
            parts: Peak rate by name prefix.
            weight_decay: Instead of the optimizer's.
        """
        optimizer = trainer.optimizer
        if weight_decay is not None:
            optimizer = optimizer.model_copy(update={"weight_decay": weight_decay})
        how = trainer.validation
        judged = {"validation": {"samples": how.samples, "seed": JUDGED_SEED}} if how else {}
        return replace(
            self,
            context={**self.context, **judged},  # a value over other samples is not to be compared
            stopping=Stopping.of(trainer.validation),
            rates=Rates(lr=lr, parts=parts or {}, layer_decay=trainer.layer_decay),
            optimizer=optimizer,
            schedule=trainer.schedule,
            clip_norm=trainer.clip_norm,
            async_save=trainer.async_save,
            head=trainer.head,
            recompute=trainer.recompute,
            compile=trainer.compile,
            parallel=trainer.parallel,
            guard=trainer.guard,
            average=trainer.average,
        )

    def plain(self) -> dict[str, Any]:
        """As plain data, for the checkpoint. Device and threads are in the fingerprint instead.

        How the same step is computed (head, recompute, compile, parallel), and what happens where one goes wrong
        (guard), is no part of it: a run may go on in another way.
        """
        how = {"head", "recompute", "compile", "parallel", "guard"}
        skip = how | {"compute", "rates", "optimizer", "schedule", "average", "stopping", "weights", "context"}
        skip |= {"context_defaults"}
        return {
            **{name: getattr(self, name) for name in self.__slots__ if name not in skip},
            "dtype": self.compute.dtype,
            "optimizer": self.optimizer.model_dump(mode="json") | self.rates.plain(),
            "schedule": self.schedule.model_dump(mode="json"),
            "weights": dict(self.weights),
            "context": dict(self.context),
            **({"average": self.average.model_dump(mode="json")} if self.average else {}),
            **({"stopping": asdict(self.stopping)} if self.stopping else {}),
            DEFAULTS: self._defaults(),
        }

    def _defaults(self) -> dict[str, Any]:
        """Dotted path → what stands there in :meth:`plain` where nobody sets anything."""
        inner = {
            "optimizer": defaults(self.optimizer) | _defaults_of(self.rates),
            "schedule": defaults(self.schedule),
            "average": defaults(self.average) if self.average else {},
            "stopping": _defaults_of(self.stopping) if self.stopping else {},
            "context": {n: v for n, v in self.context_defaults.items() if n.partition(".")[0] in self.context},
        }
        own = {name: value for name, value in _defaults_of(self).items() if name not in inner}
        return own | {f"{group}.{name}": value for group, found in inner.items() for name, value in found.items()}


def _defaults_of(settings: Settings | Rates | Stopping) -> dict[str, Any]:
    return {item.name: item.default for item in fields(settings) if item.default is not MISSING}


EVALUATION = "evaluation"
"""Name of the value that says how good the model is, in what :attr:`Hooks.evaluate` gives and in the metrics."""

ON_TRAINING = "evaluation_training"
"""Name of the same value over samples that are trained on."""


def judged(evaluate: Callable[[], float | Mapping[str, float]]) -> dict[str, float]:
    """What a hook finds, by name.

    Raises:
        ConfigError: It gives several values, and none is called ``evaluation``.
    """
    found = evaluate()
    values = {n: float(value) for n, value in (found if isinstance(found, Mapping) else {EVALUATION: found}).items()}
    if EVALUATION not in values:
        raise ConfigError(
            f"the hook evaluate gives {', '.join(values) or 'nothing'}",
            place="Hooks.evaluate",
            remedy=f"call the value that says how good the model is {EVALUATION!r}",
        )
    return values


def _nothing(_: Path) -> None: ...


def _always(_: int) -> bool:
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Hooks:
    """What a caller adds to the loop.

    Attributes:
        save_model: Writes the model's own files (Hugging Face layout) into a checkpoint folder. Resuming does not read
            them. With ``async_save``, what it does not put off (:mod:`plait.core.snapshot`) is done within the step.
        evaluate: How good the model is now on data it does not learn from; in the modes that it had before training
            unless the hook sets them. Modes and generators are put back afterwards. A value, or that under the name
            ``evaluation`` with others beside it, which are recorded, too.
        on_step: Told ``(finished steps, values)`` after every step and before its checkpoint, so that a killed run
            tells it again rather than never. One that takes too long after a signal is given up, and the step is told
            again when the run is resumed. It may sample from the model: generators and train/eval modes are put back
            afterwards.
        tells: Of which steps ``on_step`` is told; all by default. Among several processes the others wait meanwhile,
            and a model in pieces is put together.
        task: What progress is called.
        tokenizer: Of the batches' token ids, for who reads them (``plait doctor gradients``); the loop does not.
        flops: Floating-point operations that the model asks for to learn from a batch
            (:mod:`plait.training.model_flops`); None: unknown, there is no MFU.
        peak_flops: What one process's device can do in a second; 0 measures it (:mod:`plait.training.peak_rate`).
    """

    save_model: Callable[[Path], None] = _nothing
    evaluate: Callable[[], float | Mapping[str, float]] | None = None
    on_step: Callable[[int, Mapping[str, Any]], None] | None = None
    tells: Callable[[int], bool] = _always
    task: str = "train"
    tokenizer: Any = None
    flops: Callable[[Batch], float] | None = None
    peak_flops: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FitResult:
    """Result of :func:`plait.training.loop.fit`.

    Attributes:
        checkpoint: The checkpoint of the model as it is left: the best one where the run was evaluated and that one is
            whole, else the last.
        step: Finished steps.
        skipped: Steps whose update was left out because a number was not finite, or a spike.
        overflowed: Steps of float16 whose update was left out because the loss was scaled too high.
        spikes: Steps with a loss or gradient norm far above those before, whatever was done then.
        rewound: Steps whose updates were lost by going back to a checkpoint's weights.
        best: Step and value of the best evaluation, where there was one.
        resumed_from: Step it went on from; 0 for a new run.
        values: Values of the last step done now; empty if there was nothing left to do.
    """

    checkpoint: Path
    step: int
    skipped: int
    overflowed: int = 0
    spikes: int = 0
    rewound: int = 0
    best: tuple[int, float] | None = None
    resumed_from: int
    values: Mapping[str, Any]
