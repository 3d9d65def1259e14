"""One stage of a pipeline at work: it receives, computes and sends micro-batches in the order of its schedule.

Own code, not ``torch.distributed.pipelining``, whose orders it keeps (tests compare them). There, every micro-batch has
the shape, the dtype and the need of a gradient of the first one, found by a trial run; their number is fixed when a
schedule is made, and 1F1B wants as many as there are stages; what a stage raises becomes a ``RuntimeError``. Packed
rows differ in length from one micro-batch to the next, one without a picture has nothing to learn before a frozen
decoder, and a fault has to reach the user as it is. So each message says what it is before it comes.

Messages to the next stage and to the one before go through two groups. Each pair of neighbors sends and receives in the
order of micro-batches in each of them, whatever the schedule, so that no order of calls makes two stages wait for each
other, also where a group runs its messages one after the other (NCCL).
"""

# torch's annotations are partial: its members count as partially unknown.
# pyright: reportUnknownMemberType=false, reportPrivateImportUsage=false

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from plait.core import mesh
from plait.core.collectives import Group
from plait.training.parallel.order import Action, Kind, Span

Compute = Callable[[int, Tensor | None], Tensor]
"""A micro-batch through a stage: its number and what came from the stage before (None in the first) → what goes to the
next one; in the last, the loss."""

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_NOTHING, _PLAIN, _LEARNS = 0, 1, 2  # what a message holds: no tensor, one, or one that has a gradient
_DIMENSIONS = 5
_SENDS = 2  # gradients that may be on their way at a time


class Timeline:
    """What one stage did when, in seconds since this was made: all stages make it at the same time.

    Args:
        stage: Its number.
        device: Work on ``cuda`` is waited for, so that its time is seen; do not record every step there.
    """

    def __init__(self, stage: int, *, device: str = "cpu") -> None:
        self.spans: list[Span] = []
        self._stage, self._device = stage, device
        mesh.barrier()
        self._zero = time.perf_counter()

    @contextmanager
    def span(self, kind: Kind, micro: int) -> Iterator[None]:
        """Record what is done inside."""
        start = time.perf_counter()
        yield
        if self._device == "cuda":
            torch.cuda.synchronize()
        self.spans.append(Span(self._stage, kind, micro, start - self._zero, time.perf_counter() - self._zero))


class Link:
    """The messages between a stage and its neighbors.

    Args:
        onward: The processes of a pipeline in order, for what goes to the next stage.
        back: The same ones, for what goes to the stage before.
        device: Where tensors are received.

    Attributes:
        onward: As given.
        stage: Of this process.
        stages: How many.
    """

    def __init__(self, onward: Group, back: Group, *, device: str) -> None:
        assert onward is not None, "a single process has no pipeline"
        self.stage, self.stages = dist.get_rank(onward), dist.get_world_size(onward)
        self.onward, self._back, self._device = onward, back, torch.device(device)
        self._outputs: deque[list[tuple[dist.Work, Tensor]]] = deque()
        self._gradients: deque[list[tuple[dist.Work, Tensor]]] = deque()

    @property
    def first(self) -> bool:
        """Whether no stage comes before this one."""
        return self.stage == 0

    @property
    def last(self) -> bool:
        """Whether no stage comes after this one."""
        return self.stage == self.stages - 1

    def give(self, output: Tensor) -> None:
        """Send the next stage what it computes with; does not wait for it."""
        self._outputs.append(self._send(output, self.onward, to=self.stage + 1))

    def take(self) -> Tensor:
        """What the stage before computed; needs a gradient if it did there."""
        found = self._receive(self.onward, of=self.stage - 1)
        assert found is not None  # a stage always sends something
        return found

    def give_back(self, gradient: Tensor | None) -> None:
        """Send the stage before the gradient of what it gave, or that there is none."""
        self._gradients.append(self._send(gradient, self._back, to=self.stage - 1))
        while len(self._gradients) > _SENDS:
            self._wait(self._gradients)

    def take_back(self, output: Tensor) -> Tensor | None:
        """The gradient of the oldest output that was given; None if it needs none, or has none."""
        found = self._receive(self._back, of=self.stage + 1) if output.requires_grad else None
        self._wait(self._outputs)
        return found

    def finish(self) -> None:
        """Wait until all has been received."""
        for sent in (self._outputs, self._gradients):
            while sent:
                self._wait(sent)

    def _send(self, tensor: Tensor | None, group: Group, *, to: int) -> list[tuple[dist.Work, Tensor]]:
        holds = _NOTHING if tensor is None else _LEARNS if tensor.requires_grad else _PLAIN
        says = [holds, 0, 0, *[0] * _DIMENSIONS]
        if tensor is not None:
            says = [holds, _DTYPES.index(tensor.dtype), tensor.ndim, *tensor.shape]
            says += [0] * (3 + _DIMENSIONS - len(says))
        parts = [torch.tensor(says, device=self._device)]
        if tensor is not None:
            parts.append(tensor.detach().contiguous())
        sent: list[tuple[dist.Work, Tensor]] = []
        with mesh.explained():
            for part in parts:
                work = dist.isend(part, group=group, group_dst=to)
                assert work is not None  # None is for who is not in the group
                sent.append((work, part))
        return sent

    def _receive(self, group: Group, *, of: int) -> Tensor | None:
        head = torch.zeros(3 + _DIMENSIONS, dtype=torch.int64, device=self._device)
        with mesh.explained():
            dist.recv(head, group=group, group_src=of)
            holds, dtype, count, *shape = head.tolist()
            if holds == _NOTHING:
                return None
            found = torch.empty(shape[:count], dtype=_DTYPES[dtype], device=self._device)
            dist.recv(found, group=group, group_src=of)
        return found.requires_grad_(holds == _LEARNS)

    def _wait(self, sent: deque[list[tuple[dist.Work, Tensor]]]) -> None:
        with mesh.explained():
            for work, _ in sent.popleft():
                work.wait()


def run(order: Sequence[Action], compute: Compute, link: Link, *, timeline: Timeline | None = None) -> int:
    """All passes of a step through one stage; adds to the gradients of its weights.

    Every stage of the pipeline calls this, with orders of one schedule and the same micro-batches.

    Args:
        order: Of this stage.
        compute: What this stage does.
        link: To its neighbors.
        timeline: Records what is done, if given.

    Returns:
        The most micro-batches whose activations it held at a time.
    """
    kept: dict[int, tuple[Tensor | None, Tensor]] = {}
    most = 0

    def span(kind: Kind, micro: int) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if timeline is None else timeline.span(kind, micro)

    for action in order:
        micro = action.micro
        if action.kind == "forward":
            received = None
            if not link.first:
                with span("wait", micro):
                    received = link.take()
            with span("forward", micro):
                output = compute(micro, received)
            kept[micro] = received, output
            most = max(most, len(kept))
            if not link.last:
                link.give(output)
            continue
        received, output = kept.pop(micro)
        gradient = None
        if not link.last:
            with span("wait", micro):
                gradient = link.take_back(output)
        with span("backward", micro), mesh.explained():
            if output.requires_grad and (link.last or gradient is not None):
                output.backward(gradient)
        if received is not None and received.requires_grad:
            link.give_back(received.grad)
    link.finish()
    return most
