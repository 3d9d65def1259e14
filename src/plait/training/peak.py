"""What a stage holds at its highest moment, by part, and what its checkpoints take on disk.

Activations come from :mod:`plait.training.cost`. ``benchmarks/plan.py`` compares the sums with processes that run.
"""

from __future__ import annotations

from plait.core.estimate import Machine
from plait.training.cost import BYTES

PARTS = ("weights", "gradients", "optimizer", "activations", "caches", "runtime")
"""Keys of ``Estimate.memory``."""

HEAP = 1.15
"""RSS over live bytes, for activations: glibc's heap keeps freed blocks that it cannot hand back.

Seen in ``benchmarks/plan.py``: 1.04 to 1.2 in bfloat16 and in towers, up to 1.5 in float32 with LoRA.
"""

LEFT_BYTES = 80 * 2**20
"""What encoding, answering and earlier phases leave in the heap: RSS of a tune stage's second phase began 50 to 100 MiB
above the sum of what is there."""

TOKENIZER_BYTES = 950
"""Of a token of the vocabulary, in the tokenizer's tables: SmolLM2's 49,152 take 45 MiB."""

RUNTIME_BYTES = 416 * 2**20
"""Interpreter with all that a stage imports, kernels once used, where nobody measured it.

Linux x86-64, Python 3.11, torch 2.13, transformers 5.23, peft 0.21.
"""


def peak_memory(
    machine: Machine,
    *,
    frozen: int = 0,
    frozen_dtype: str = "float32",
    trainable: int = 0,
    activations: int = 0,
    caches: int = 0,
    state: float = 8.0,
    async_save: bool = False,
) -> dict[str, int]:
    """Peak memory in bytes by part (:data:`PARTS`) of a training step, or of inference when nothing is trainable.

    Args:
        machine: Tells the runtime baseline.
        frozen: Number of weights without gradients.
        frozen_dtype: Their format.
        trainable: Number of trained weights: float32 masters, gradients and the optimizer's state.
        activations: Live bytes kept for backward, with logits; :data:`HEAP` is applied here.
        caches: Bytes of features, reference log-probabilities, keys and values that are held at the same time.
        state: Bytes of the optimizer's state by trained weight
            (:meth:`plait.training.trainer.Trainer.state_bytes`); AdamW's by default.
        async_save: Checkpoints are written beside training, from a copy of weights and state; it counts as a cache.
    """
    return {
        "weights": frozen * BYTES[frozen_dtype] + 4 * trainable,
        "gradients": 4 * trainable,
        "optimizer": round(state * trainable),
        "activations": int(HEAP * activations),
        "caches": caches + (round((4 + state) * trainable) if async_save else 0),
        "runtime": machine.runtime_bytes or RUNTIME_BYTES,
    }


def in_turn(parts: dict[str, int], *, early: int = 0) -> dict[str, int]:
    """The higher end of a backward pass: activations go as gradients come, so they are not all there at once.

    In a stack of equal layers what is alive rises or falls all the way, and is highest at one of the ends. With several
    micro-batches gradients stay from one to the next: there the plain sum holds.

    Args:
        parts: Of :func:`peak_memory`.
        early: Bytes of the gradients that come first, with all activations still there: those of the output head.

    Example:
        >>> in_turn({"gradients": 4, "activations": 10})
        {'gradients': 0, 'activations': 10}
        >>> in_turn({"gradients": 40, "activations": 10}, early=5)
        {'gradients': 40, 'activations': 0}
    """
    if parts["activations"] + early >= parts["gradients"]:
        return parts | {"gradients": min(early, parts["gradients"])}
    return parts | {"activations": 0}


def checkpoint_bytes(*, weights: int, trainable: int, state: float = 8.0) -> int:
    """Disk for one checkpoint: the model's own files, trained weights to go on from, and the optimizer's state.

    Args:
        weights: Bytes of the model's own files.
        trainable: Number of trained weights.
        state: Bytes of the optimizer's state by trained weight; AdamW's by default.
    """
    return weights + round((4 + state) * trainable)


def checkpoints_left(steps: int, every: int, *, judged: int = 0, keep: int = 2) -> int:
    """How many checkpoints a phase leaves at most.

    Where it is judged, each new best one is saved, and the best stays besides the last ones. It is not known before
    which one that is: most are left where it is the first. ``trainer.guard`` leaves no more: what it goes back to is
    among the last ones (of a run that is stopped again and again between two checkpoints, until the next one, it is
    not).

    Args:
        steps: It has.
        every: Steps between checkpoints; the last step has one, too. 0: that alone.
        judged: Steps between evaluations; the last step has one, too. 0: none.
        keep: Of the last ones, at most.

    Example:
        >>> checkpoints_left(100, 10), checkpoints_left(100, 10, judged=50), checkpoints_left(100, 0, judged=50)
        (2, 3, 2)
    """
    planned = {*range(every, steps, every), steps} if every else {steps}
    if judged and sum(step > judged for step in planned) >= keep:
        return keep + 1
    return min(keep, len(planned | {*range(judged, steps, judged)} if judged else planned))
