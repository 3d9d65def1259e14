"""What a stage expects to need, said before it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypedDict


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What this machine can do, as measured by ``plait doctor`` or assumed.

    Attributes:
        cores: Usable cores.
        memory_bytes: RAM that is free for us.
        disk_bytes: Free disk where the run goes.
        home_disk_bytes: Free disk where ``PLAIT_HOME`` is; None if that is the same disk.
        processes: That train together.
        local: Of them on this machine, the first of all; 0: all.
        gemm_fp32: Matrix rate in FLOP/s, float32.
        gemm_bf16: Matrix rate in FLOP/s, bfloat16 (equal to or below fp32 where the CPU has no bf16 units).
        measured: Whether the rates were measured here or are a guess.
        device: ``cpu``, ``cuda`` or ``mps``.
        dtype: Number format the heavy mathematics will use here: ``bfloat16`` or ``float32``.
        threads: Threads it will use.
        runtime_bytes: RAM of the interpreter with its libraries imported, before any weight; 0 if not measured.
    """

    cores: int
    memory_bytes: int
    disk_bytes: int
    gemm_fp32: float
    gemm_bf16: float
    measured: bool
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 1
    runtime_bytes: int = 0
    home_disk_bytes: int | None = None
    processes: int = 1
    local: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What some of several processes, all alike, need of a stage.

    Attributes:
        ranks: Their numbers.
        memory: Peak memory of each in bytes by part.
        moments: Bytes in all at each moment that was counted; ``memory`` is the highest one's.
        sent: Bytes that each sends in a step, by what is divided; of the stage's last phase.
    """

    ranks: tuple[int, ...]
    memory: Mapping[str, int]
    moments: Mapping[str, int]
    sent: Mapping[str, int] = field(default_factory=dict[str, int])

    @property
    def moment(self) -> str:
        """When memory is highest."""
        return max(self.moments, key=self.moments.__getitem__, default="")


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """One stage's expected needs.

    Attributes:
        stage: Name of the stage.
        samples: Samples it hands to the next stage, per split.
        params_trainable: Weights that get gradients.
        params_frozen: Weights that do not.
        tokens: Text and image positions processed in all.
        image_tokens: Of these, how many stand for images.
        flops: Floating-point operations in all.
        memory: Peak memory in bytes by part: weights, gradients, optimizer, activations, caches, runtime. Of several
            processes, that of the one with most.
        moments: Bytes in all at each moment that was counted: ``before`` the first step, each phase; ``memory`` is the
            highest one's.
        shares: What each of several processes needs, where they train together; else it is one process's work.
        disk_bytes: What it leaves in the run folder.
        spare_bytes: What it needs there besides for a moment: a checkpoint that is being written.
        home_bytes: What it leaves under ``PLAIT_HOME``: cached features, converted weights.
        seconds: Shortest and longest expected time.
        d_image: Width of the features of a picture tower that it trains; 0 where it trains none.
        cells: Features that such a tower makes of a picture.
        slots: Places that a picture takes in the text of the model that it makes; 0 where it makes none.
        decoder: Sizes of the decoder of that model (of :class:`plait.training.cost.DecoderShape`).
        decoder_dtype: Number format of that decoder's weights.
        adapter: Weights of its adapter.
        connectors: Weights of its connectors.
        words: Numbers in the list of words that a connector speaks in.
        notes: What the estimate rests on, and warnings.
    """

    stage: str
    samples: Mapping[str, int] = field(default_factory=dict[str, int])
    params_trainable: int = 0
    params_frozen: int = 0
    tokens: int = 0
    image_tokens: int = 0
    flops: float = 0.0
    memory: Mapping[str, int] = field(default_factory=dict[str, int])
    moments: Mapping[str, int] = field(default_factory=dict[str, int])
    shares: tuple[Share, ...] = ()
    disk_bytes: int = 0
    spare_bytes: int = 0
    home_bytes: int = 0
    seconds: tuple[float, float] = (0.0, 0.0)
    notes: tuple[str, ...] = ()
    d_image: int = 0
    cells: int = 0
    slots: int = 0
    decoder: Mapping[str, int] = field(default_factory=dict[str, int])
    decoder_dtype: str = ""
    adapter: int = 0
    connectors: int = 0
    words: int = 0

    @property
    def moment(self) -> str:
        """When memory is highest; nothing where one moment alone was counted."""
        return max(self.moments, key=self.moments.__getitem__, default="")


class Peak(TypedDict):
    """Fields of :class:`Estimate`."""

    memory: Mapping[str, int]
    moments: Mapping[str, int]


class Peaks(Peak):
    """The same of several processes."""

    shares: tuple[Share, ...]


def peak_of(moments: Mapping[str, Mapping[str, int]]) -> Peak:
    """The parts of the highest of several moments, and what each comes to.

    Args:
        moments: Parts in bytes of each.

    Example:
        >>> peak_of({"before": {"weights": 5}, "training": {"weights": 4, "gradients": 4}})["memory"]
        {'weights': 4, 'gradients': 4}
    """
    sums = {name: sum(parts.values()) for name, parts in moments.items()}
    return {"memory": moments[max(sums, key=sums.__getitem__)], "moments": sums}


def made_before(before: Mapping[str, Estimate]) -> Estimate | None:
    """The last stage before that makes a multimodal model."""
    return next((one for one in reversed(list(before.values())) if one.slots), None)


def picture_slots(before: Mapping[str, Estimate], usual: int) -> int:
    """Places of a picture in the model that the last stage before made, or as many as usual where none is planned."""
    return next((one.slots for one in reversed(list(before.values())) if one.slots), usual)
