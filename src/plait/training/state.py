"""Everything that training changes, as named tensors and plain scalars: what a checkpoint's ``resume/`` folder holds.

Safetensors files (weights, optimizer, random-number generators, a moving average) and one JSON file; no pickle.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from plait.core import dtensors
from plait.core.errors import CheckpointError, ConfigError
from plait.core.files import read_json, write_json
from plait.core.snapshot import later, save_tensors
from plait.training.generators import rng_state, set_rng_state
from plait.training.roles import Roles

WHOLE, IN_PIECES = 1, 2
"""Versions of the ``resume/`` folder that are written: with whole tensors, and with those of
:mod:`plait.training.pieces`."""

OLDEST = 1
"""Oldest version that is read."""

STATE = "resume/state.json"
WEIGHTS = "resume/weights.safetensors"
OPTIMIZER = "resume/optimizer.safetensors"
RNG = "resume/rng.safetensors"
AVERAGE = "resume/average.safetensors"
BATCHES = "resume/batches.safetensors"


@dataclass(slots=True, kw_only=True)
class Progress:
    """How far training is.

    Attributes:
        step: Finished steps; also the data cursor, since the order of the data is a pure function of the step.
        skipped: Steps whose update was left out because a number was not finite.
        skipped_in_row: How many of these were the last ones.
        broken: Those last ones, each with its numbers and samples.
        untold: Values of the last step if a signal came before the caller's hook was done with them.
        overflowed: Steps of float16 whose update was left out because the loss was scaled too high.
        scale: Of float16: factor of the loss, and steps without overflow since it changed
            (:class:`plait.training.precision.LossScale`).
        averaged: Updates of the moving average.
        best: Step and value of the best evaluation.
        stale: Evaluations since the best one.
        unjudged: Whether a signal ended the evaluation of the last step.
        taken: Samples whose updates are in the weights.
        spikes: Steps with a loss or gradient norm far above those before.
        spikes_in_row: How many of these were the last ones.
        watched: Losses and norms that the next ones are compared with (:class:`plait.training.guard.Watch`).
        rewinds: How often training went back to a checkpoint's weights.
        rewound: Steps whose updates were lost by that.
        anchor: Step of the last checkpoint that a run that nobody stopped has, too; 0 for none.
        pieces: In how many parts micro-batches are done since memory ran out.
    """

    step: int = 0
    skipped: int = 0
    skipped_in_row: int = 0
    broken: list[dict[str, Any]] = field(default_factory=list)
    untold: dict[str, Any] | None = None
    overflowed: int = 0
    scale: tuple[float, int] | None = None
    averaged: int = 0
    best: tuple[int, float] | None = None
    stale: int = 0
    unjudged: bool = False
    taken: int = 0
    spikes: int = 0
    spikes_in_row: int = 0
    watched: dict[str, list[float]] = field(default_factory=dict)
    rewinds: int = 0
    rewound: int = 0
    anchor: int = 0
    pieces: int = 1

    def plain(self) -> dict[str, Any]:
        """As plain data, for the checkpoint."""
        return asdict(self)

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> Progress:
        """From the JSON part of a checkpoint, which may be older than some fields."""
        known: dict[str, Any] = {item.name: record[item.name] for item in fields(cls) if item.name in record}
        for name in ("scale", "best"):  # pairs are lists in JSON
            if known.get(name) is not None:
                known[name] = tuple(known[name])
        return cls(**known)


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What a checkpoint must agree with to be continued.

    Attributes:
        settings: The settings of the run as plain data.
        fingerprint: See :func:`plait.core.device.fingerprint`.
        frozen: Digest of the weights that do not train.
    """

    settings: Mapping[str, Any]
    fingerprint: Mapping[str, str | int] = field(default_factory=dict)
    frozen: str = ""


class TrainState:
    """The tensors of a model and of a stateful objective: those that training changes and those that it does not.

    Buffers belong to what changes where their module is in training mode (running means of batch norm, a queue of
    negatives), and to what is frozen elsewhere. Set the modes before you build this.

    Attributes:
        weights: Trainable weights by name; an objective's begin with ``objective.``.
        roles: What they are in the model.

    Raises:
        ConfigError: Two tensors have one name.
    """

    def __init__(self, model: nn.Module, objective: object = None) -> None:
        self._roots = [("", model)]
        if isinstance(objective, nn.Module):
            self._roots.append(("objective.", objective))
        self.weights: dict[str, nn.Parameter] = {}
        self.roles = Roles()
        self._live: list[tuple[str, nn.Module, str]] = []
        self._modes: list[tuple[nn.Module, bool]] = []
        for prefix, root in self._roots:
            known = {id(w) for w in self.weights.values()}  # an objective may hold a weight of the model, or all of it
            named = ((prefix + n, w) for n, w in root.named_parameters())
            trainable = {n: w for n, w in named if w.requires_grad and id(w) not in known}
            if clash := trainable.keys() & self.weights.keys():
                raise ConfigError(
                    f"two weights are called {min(clash)!r}",
                    place="objective",
                    remedy="rename the model's part 'objective'",
                )
            self.weights |= trainable
            self.roles |= Roles.of(root).under(prefix)
            self._modes += [(m, m.training) for m in root.modules()]
            for path, owner, name in _buffers(root):
                if owner.training:
                    self._live.append((prefix + path, owner, name))

    @property
    def trains(self) -> bool:
        """Whether any module is in training mode."""
        return any(training for _, training in self._modes)

    def reset_modes(self) -> None:
        """Put every module back into the mode it had; a hook that samples from the model switches them."""
        for module, training in self._modes:
            module.training = training

    def zero_grad(self) -> None:
        """No trained weight has a gradient."""
        for weight in self.weights.values():
            weight.grad = None

    def buffers(self) -> dict[str, Tensor]:
        """Buffers that training changes, by name. Looked up anew: a module may put another tensor in its place."""
        return {path: owner.get_buffer(name) for path, owner, name in self._live}

    def tensors(self) -> dict[str, Tensor]:
        """All that training changes."""
        return {name: weight.detach() for name, weight in self.weights.items()} | self.buffers()

    def digest(self) -> str:
        """sha256 of all that training changes."""
        return _digest(self.tensors())

    def frozen_digest(self) -> str:
        """sha256 of all that training does not change; about half a second a gigabyte."""
        live = {path for path, _, _ in self._live}
        still: dict[str, Tensor] = {}
        for prefix, root in self._roots:
            still |= {prefix + n: w.detach() for n, w in root.named_parameters() if not w.requires_grad}
            still |= {
                prefix + path: owner.get_buffer(name)
                for path, owner, name in _buffers(root)
                if prefix + path not in live
            }
        return _digest(still)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _buffers(root: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Persistent buffers: full name, owner, own name. Others can be computed again and are no state."""
    persistent = root.state_dict(keep_vars=True).keys()
    for path, _ in root.named_buffers():
        if path in persistent:
            parent, _, name = path.rpartition(".")
            yield path, root.get_submodule(parent), name


# --- saving and restoring ------------------------------------------------------------------------------------------


def save_state(
    folder: Path,
    train_state: TrainState,
    optimizer: torch.optim.Optimizer,
    *,
    progress: Progress,
    origin: Origin,
    average: Mapping[str, Tensor] = MappingProxyType({}),
    batches: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:
    """Write ``folder/resume/``; within a snapshot, when that is written.

    Args:
        folder: Of the checkpoint.
        train_state: What training changes.
        optimizer: Its moments are saved too.
        progress: How far training is.
        origin: What a run that goes on must agree with.
        average: The moving average of the weights; no file if there is none.
        batches: What the source of the batches holds; no file if it holds nothing.

    Raises:
        OSError: The disk is full or not writable.
        safetensors.SafetensorError: Likewise.
    """
    (folder / "resume").mkdir()
    states, scalars = optimizer_state(optimizer)
    files = {WEIGHTS: train_state.tensors(), OPTIMIZER: states, AVERAGE: average, BATCHES: batches}
    for name, tensors in files.items():
        if name in (AVERAGE, BATCHES) and not tensors:
            continue
        save_tensors(tensors, folder / name)
    save_rest(folder, scalars, progress=progress, origin=origin)


def save_rest(
    folder: Path, scalars: Mapping[str, Any], *, progress: Progress, origin: Origin, form: int = WHOLE
) -> None:
    """Write what of ``folder/resume/``, which exists, is no tensor of training: generators and plain data.

    Args:
        folder: Of the checkpoint.
        scalars: Of the optimizer.
        progress: How far training is.
        origin: What a run that goes on must agree with.
        form: How the tensors are stored: :data:`WHOLE` or :data:`IN_PIECES`.
    """
    rng, rng_scalars = rng_state()
    save_tensors(rng, folder / RNG)
    record = {
        "format": form,
        **progress.plain(),
        "settings": origin.settings,
        "settings_sha256": digest_json(origin.settings),
        "fingerprint": origin.fingerprint,
        "frozen_sha256": origin.frozen,
        "optimizer": scalars,
        "rng": rng_scalars,
    }
    later(lambda: write_json(folder / STATE, record))


def read_state(folder: Path) -> dict[str, Any]:
    """The JSON part of ``folder/resume/``.

    Raises:
        CheckpointError: Written in a format that this version does not read.
    """
    record: dict[str, Any] = read_json(folder / STATE)
    if not OLDEST <= record["format"] <= IN_PIECES:
        raise CheckpointError(
            f"resume format {record['format']}, this version reads {OLDEST} to {IN_PIECES}",
            place=str(folder),
            remedy="resume with the version of plait that wrote it (env.json of the run names it)",
        )
    return record


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """Tensors of a checkpoint.

    Attributes:
        weights: All that training changes.
        optimizer: By weight and name of the state.
        average: The moving average of the weights; nothing if none was kept.
    """

    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    average: Mapping[str, Tensor]

    def without(self, names: frozenset[str]) -> Stored:
        """Without what belongs to some weights."""

        def left(tensors: Mapping[str, Tensor], weight: Callable[[str], str]) -> dict[str, Tensor]:
            return {name: tensor for name, tensor in tensors.items() if weight(name) not in names}

        return Stored(
            weights=left(self.weights, str),
            optimizer=left(self.optimizer, lambda name: name.rpartition("/")[0]),
            average=left(self.average, str),
        )


def read_stored(folder: Path) -> Stored:
    """Tensors of a checkpoint that holds them whole.

    Raises:
        CheckpointError: A file changed since it was verified.
    """
    average = _read_tensors(folder / AVERAGE) if (folder / AVERAGE).is_file() else {}
    return Stored(weights=_read_tensors(folder / WEIGHTS), optimizer=_read_tensors(folder / OPTIMIZER), average=average)


def restore_state(
    folder: Path,
    train_state: TrainState,
    optimizer: torch.optim.Optimizer,
    *,
    stored: Stored | None = None,
    elsewhere: frozenset[str] = frozenset(),
) -> Progress:
    """Put back, bit for bit, what :func:`save_state` wrote.

    Args:
        folder: Of the checkpoint.
        train_state: What training changes; may lie in pieces on several processes.
        optimizer: Gets its moments back.
        stored: Its tensors, where they were read already.
        elsewhere: Names of weights that other processes hold.

    Raises:
        CheckpointError: Names, shapes or dtypes are not those of this model or optimizer; nothing was changed then.
    """
    record, stored = read_state(folder), stored or read_stored(folder)
    _same_tensors(stored.weights, train_state.tensors(), folder / WEIGHTS)
    scalars = {name: value for name, value in record["optimizer"].items() if name.rpartition("/")[0] not in elsewhere}
    state = _optimizer_dict(optimizer, stored.optimizer, scalars)
    _copy(stored.weights, train_state)
    optimizer.load_state_dict(state)
    progress = Progress.read(record)  # before the generators: beartype, which checks types in tests, draws from one
    set_rng_state(_read_tensors(folder / RNG), record["rng"])
    return progress


def restore_weights(folder: Path, train_state: TrainState, stored: Stored, *, average: bool) -> None:
    """Put back only the trained weights and buffers of a checkpoint, or the average in their place if it has one.

    Raises:
        CheckpointError: They are not those of this model; nothing was changed then.
    """
    weights = {**stored.weights, **(stored.average if average else {})}
    _same_tensors(weights, train_state.tensors(), folder / WEIGHTS)
    _copy(weights, train_state)


def _copy(saved: Mapping[str, Tensor], train_state: TrainState) -> None:
    present = train_state.tensors()
    with torch.no_grad():
        for name, tensor in saved.items():
            present[name].copy_(dtensors.spread_like(tensor, present[name]))


def read_batches(folder: Path) -> dict[str, Tensor]:
    """What the source of the batches held; nothing if it held nothing.

    Raises:
        CheckpointError: The file changed since it was verified.
    """
    return _read_tensors(folder / BATCHES) if (folder / BATCHES).is_file() else {}


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors by plain reading: a mapped file that is cut meanwhile ends the process (SIGBUS), a read one does not.

    Raises:
        CheckpointError: The file changed since it was verified.
    """
    try:
        return load(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot be read any more, though it was whole just now: {error}",
            place=str(path),
            remedy="see that nothing else writes to the run folder, then `plait resume`",
        ) from error


def digest_json(value: Any) -> str:
    """sha256 of plain data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False, default=str).encode()).hexdigest()


def _same_tensors(saved: Mapping[str, Tensor], present: Mapping[str, Tensor], place: Path) -> None:
    def form(tensors: Mapping[str, Tensor]) -> dict[str, str]:
        return {name: f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for name, t in tensors.items()}

    require_same(form(saved), form(present), place=place)


def require_same(then: Mapping[str, str], now: Mapping[str, str], *, place: Path) -> None:
    """See that tensors are those that are wanted.

    Args:
        then: Dtype and shape, as text, of each saved tensor.
        now: The same of those to be filled.
        place: Of the saved ones.

    Raises:
        CheckpointError: They are not; names up to three with both forms.
    """
    wrong = [
        f"{n}: saved {then.get(n, 'nothing')}, wanted {now.get(n, 'nothing')}"
        for n in sorted({**then, **now})
        if then.get(n) != now.get(n)
    ]
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(
            f"{len(wrong)} of {len({**then, **now})} tensors do not fit: {'; '.join(wrong[:3])}{more}",
            place=str(place),
            remedy="resume with the recipe that wrote it, or start a new run",
        )


# --- optimizer -----------------------------------------------------------------------------------------------------


def moved_by(optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    """Names and weights in the order in which torch numbers them."""
    groups = optimizer.param_groups
    return {name: weight for one in groups for name, weight in zip(one["param_names"], one["params"], strict=True)}


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What an optimizer holds of each weight, as ``weight/name``: tensors, and plain numbers."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for name, weight in moved_by(optimizer).items():
        for key, value in optimizer.state.get(weight, {}).items():
            (tensors if isinstance(value, Tensor) else scalars)[f"{name}/{key}"] = value
    return tensors, scalars


def _optimizer_dict(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]
) -> dict[str, Any]:
    """The saved state in the form torch's ``load_state_dict`` takes; rates come from the present settings."""
    weights = moved_by(optimizer)
    unknown = sorted({full.rpartition("/")[0] for full in (*tensors, *scalars)} - weights.keys())
    if unknown:
        raise CheckpointError(
            f"the optimizer's state is of {len(unknown)} weights that do not train now: {', '.join(unknown[:3])}",
            place=OPTIMIZER,
            remedy="resume with the recipe that wrote it, or start a new run",
        )
    index = {name: number for number, name in enumerate(weights)}
    states: dict[int, dict[str, Any]] = {}
    for full, value in (*tensors.items(), *scalars.items()):
        name, _, key = full.rpartition("/")
        states.setdefault(index[name], {})[key] = (
            _laid_out(value, weights[name]) if isinstance(value, Tensor) else value
        )
    return optimizer.state_dict() | {"state": states}


def _laid_out(value: Tensor, weight: Tensor) -> Tensor:
    """A copy of a loaded state in the memory order of its weight.

    Fused optimizers go through memory, not through indices: a contiguous moment of a channels-last filter would meet
    the wrong weights. A copy in any case, since a loaded tensor is mapped from the file.
    """
    if value.shape != weight.shape:
        return value.clone()
    return torch.empty_like(weight, dtype=value.dtype).copy_(dtensors.spread_like(value, weight))
