"""The processes that train together: rank, world, groups of them, and what one tells the others.

Launch with ``torchrun`` (or anything that sets its environment); without it ``torch.distributed`` is never initialized,
and everything here is a no-op.

No process waits in vain: one that fails says why before it leaves, and the others end with its words; of one that was
killed they find the connection closed.

Example:
    >>> with joined():
    ...     world(), first(lambda: "once")
    (1, 'once')
"""

# torch's annotations are partial: its members count as partially unknown.
# pyright: reportUnknownMemberType=false, reportPrivateImportUsage=false

from __future__ import annotations

import contextlib
import datetime
import json
import os
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from plait.core import errors
from plait.core.errors import ConfigError, PlaitError, ResourceError, Stopped
from plait.core.files import disk_error
from plait.core.launch import launched
from plait.core.lifeline import Lifeline
from plait.core.meeting import meet

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

TIMEOUT = datetime.timedelta(minutes=30)
"""How long a sum or gather waits for a rank that is alive and does not come."""

_FAULT, _LEFT = "fault", "left"
_LINGER_S = 3.0
_BROKEN = (
    "onnection closed",
    "onnection reset",
    "onnection refused",
    "onnection was",
    "eset by peer",
    "roken pipe",
    "imed out",
    "failed to connect",
    "connectFullMesh",
)  # what gloo, NCCL and the store say
_REACH_S = 10.0
_LOOK_S = 0.05  # while a rank waits for the first one
_Result = TypeVar("_Result")


class _Session:
    """What the processes tell each other beside tensors: through torch's store, which needs nobody to take part."""

    def __init__(self, store: dist.Store, lifeline: Lifeline) -> None:
        self.store = store
        self.lifeline = lifeline
        self.asked = 0
        self.groups: dict[tuple[tuple[tuple[int, ...], ...], bool], dist.ProcessGroup] = {}
        self.left = False  # whether another's fault has been found: then this process has none of its own to tell

    def tell(self, error: BaseException) -> None:
        """Say why this process leaves; the first to say so is the reason of all."""
        with contextlib.suppress(RuntimeError):  # the store may be gone
            if not self.left and not self.store.check([_FAULT]):
                self.store.set(_FAULT, json.dumps((rank(), _told(error))))

    def fault(self) -> BaseException | None:
        """Why another process left, if one did."""
        if not self.store.check([_FAULT]):
            return None
        place, told = json.loads(self.store.get(_FAULT))
        self.left = place != rank()
        return _retold(told, of=place) if self.left else None

    def leave(self, *, first: bool, of: int) -> None:
        """Rank 0, which may be the one that holds the store, leaves last, so that the others can read why they end."""
        with contextlib.suppress(RuntimeError):
            self.store.add(_LEFT, 1)
            deadline = time.monotonic() + _LINGER_S
            while first and int(self.store.get(_LEFT)) < of and time.monotonic() < deadline:
                time.sleep(_LOOK_S)

    def wait(self, key: str) -> Any:
        """What the first rank put under a key, as soon as it is there."""
        while True:
            broken = self.lifeline.broken()  # before looking, for it may have left in between
            if self.store.check([key]):
                break
            if (fault := self.fault()) is not None:
                raise fault
            if broken:
                raise _gone(self, "process 0 ended while this one waited for it")
            time.sleep(_LOOK_S)  # not in the store: a signal is answered in between
        return json.loads(self.store.get(key))


_session: ContextVar[_Session | None] = ContextVar("session", default=None)
_ours = threading.Event()  # whether torch's process group is Plait's: also in other threads, and while alone


def active() -> bool:
    """Whether this process has joined others."""
    return _session.get() is not None


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if active() else 0


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if active() else 1


def group_among(parts: tuple[tuple[int, ...], ...], *, again: bool = False) -> dist.ProcessGroup:
    """The group of processes that this one is in, made when first asked for; every process asks, in the same order.

    Args:
        parts: Ranks of each group: every rank is in one of them.
        again: A second one of the same processes.
    """
    session = _session.get()
    assert session is not None, "only several processes have groups"
    if (parts, again) not in session.groups:
        barrier()  # who makes a group waits for the others in torch's store, where nobody sees that one has failed
        with explained():
            own, _ = dist.new_subgroups_by_enumeration([list(part) for part in parts], timeout=TIMEOUT)
        assert isinstance(own, dist.ProcessGroup)
        session.groups[parts, again] = own
    return session.groups[parts, again]


@contextmanager
def alone() -> Generator[None]:
    """Work as one process does: in the block nobody else is there."""
    token = _session.set(None)
    try:
        yield
    finally:
        _session.reset(token)


# --- plain data ----------------------------------------------------------------------------------------------------


def gather(value: Any) -> list[Any]:
    """Small plain data of every rank, in their order; on all ranks."""
    if not active():
        return [value]
    found: list[Any] = [None] * world()
    with explained():
        dist.all_gather_object(found, value)
    return found


def barrier() -> None:
    """Wait until every rank is here."""
    if active():
        with explained():
            dist.barrier()


def first(work: Callable[[], _Result]) -> _Result:
    """Let rank 0 do something, while the others wait as long as it takes; its result, plain JSON data, is given to all.

    It does so :func:`alone`: nothing in it waits for the others.

    Raises:
        PlaitError: What it raises there, in all.
        Stopped: Somebody stopped it there.
    """
    session = _session.get()
    if session is None:
        return work()
    session.asked += 1
    key = f"first/{session.asked}"
    if rank() == 0:
        if (fault := session.fault()) is not None:
            raise fault
        try:
            with alone():
                result = work()
        except BaseException as error:
            session.store.set(key, json.dumps((_told(error), None)))
            raise
        session.store.set(key, json.dumps((None, result)))
        return result
    with explained():
        told, result = session.wait(key)
    if told is not None:
        session.left = True
        raise _retold(told, of=0)
    return result


def first_then_others(work: Callable[[], _Result]) -> _Result:
    """Let rank 0 do something and then, all at once, the others: for what the first one leaves in a cache for them."""
    found: list[_Result] = []
    first(lambda: found.append(work()))
    return found[0] if found else work()


# --- faults --------------------------------------------------------------------------------------------------------


@contextmanager
def agreed(place: Path) -> Generator[None]:
    """All ranks end the block well, or all raise: their own fault, or one that names the rank that has it.

    Args:
        place: What an error of the disk names.
    """
    fault: BaseException | None = None
    try:
        yield
    except PlaitError as error:
        fault = error
    except OSError as error:
        fault = disk_error(error, place)
    except SafetensorError as error:  # its Rust writer reports a full disk as its own type
        fault = disk_error(OSError(str(error)), place)
    except Exception as error:
        fault = error
    said = gather(None if fault is None else _told(fault))
    if fault is not None:
        raise fault
    for other, told in enumerate(said):
        if told is not None:
            raise _retold(told, of=other)


@contextmanager
def explained() -> Generator[None]:
    """Where others are needed: if one of them is gone, say which and why, and not what the network said.

    Raises:
        PlaitError: As the other one told.
        ResourceError: It told nothing: it was killed, or its machine is gone.
    """
    session = _session.get()
    try:
        yield
    except RuntimeError as error:
        if session is None or isinstance(error, torch.OutOfMemoryError):
            raise
        if (fault := _fault_of_another(session)) is not None:
            raise fault from error
        if not any(word in str(error) for word in _BROKEN):
            raise
        raise _gone(session, _short(error)) from error


def _gone(session: _Session, how: str) -> ResourceError:
    session.left = True
    gone = ResourceError(
        f"another of {world()} processes is gone, and said nothing: {how}",
        place=f"process {rank()}",
        remedy="it was killed (out of memory?), or its machine or network failed; what it printed says more. "
        "Start all again: `plait resume`, or torchrun with --max-restarts",
    )
    gone.rank = -1
    return gone


def _fault_of_another(session: _Session) -> BaseException | None:
    for _ in range(20):  # it tells before it leaves, but the store may be slower than a closed connection
        try:
            if (fault := session.fault()) is not None:
                return fault
        except RuntimeError:  # the store has gone with its process
            return None
        time.sleep(_LOOK_S)
    return None


def _short(error: RuntimeError) -> str:
    """What the network said, without its advice and the place in its source."""
    line = str(error).splitlines()[0].partition(". This is typically")[0]
    return line.rpartition("] ")[2] if line.startswith("[/") else line


def _told(error: BaseException) -> dict[str, Any]:
    """A fault as plain data."""
    if isinstance(error, PlaitError):
        return {
            "kind": next(kind.__name__ for kind in type(error).__mro__ if hasattr(errors, kind.__name__)),
            "cause": error.cause,
            "place": error.place,
            "remedy": error.remedy,
            "rank": error.rank,
        }
    if isinstance(error, KeyboardInterrupt):
        number = error.signal if isinstance(error, Stopped) else signal.SIGINT
        return {"kind": "Stopped", "signal": number, "cause": str(error) or "interrupted"}
    return {"kind": "", "cause": f"{type(error).__name__}: {error}", "place": "", "remedy": "", "rank": None}


def _retold(told: dict[str, Any], *, of: int) -> BaseException:
    """The fault of another process."""
    if told["kind"] == "Stopped":
        return Stopped(told["signal"], told["cause"])
    kind: type[PlaitError] = getattr(errors, told["kind"]) if told["kind"] else PlaitError
    if told["rank"] is not None:  # passed on from a third
        fault = kind(told["cause"], place=told["place"], remedy=told["remedy"])
        fault.rank = told["rank"]
        return fault
    fault = kind(f"process {of} of {world()}: {told['cause']}", place=told["place"], remedy=told["remedy"])
    fault.rank = of
    return fault


def cause_of(error: BaseException) -> BaseException:
    """Why this process really ends: a launcher stops all processes when one fails, whose fault is then the cause."""
    session = _session.get()
    if session is not None and isinstance(error, KeyboardInterrupt):
        with contextlib.suppress(RuntimeError):  # the store may be gone
            if isinstance(fault := session.fault(), PlaitError):
                return fault
    return error


# --- joining -------------------------------------------------------------------------------------------------------


@contextmanager
def joined(device: str = "cpu") -> Generator[None]:
    """Join the processes that ``torchrun`` started, for the length of the block; does nothing in a single process.

    What the block raises is told to the other processes before this one leaves.

    Args:
        device: ``cuda`` talks over NCCL about tensors there and takes the GPU of this process's local rank; all else
            talks over gloo.

    Raises:
        ConfigError: ``WORLD_SIZE`` is above 1, but the rest of torchrun's variables is missing; or somebody else has
            made a process group.
        ResourceError: There is no GPU for this process, or another one did not come or was killed.
    """
    if active() or _ours.is_set() or not launched():
        yield
        return
    if dist.is_initialized():
        raise ConfigError(
            "torch.distributed is at work already, and not by Plait: each process would train alone",
            place="environment",
            remedy="call torch.distributed.destroy_process_group() before it, or let torchrun start Plait",
        )
    missing = [name for name in _VARIABLES if name not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} is not set",
            place="environment",
            remedy="start with `torchrun`, or unset WORLD_SIZE to use one process",
        )
    if device == "cuda":
        _take_gpu()
    try:
        session, place, count = _join(device)
    except RuntimeError as error:
        raise ResourceError(
            f"the processes could not join: {_short(error)}",
            place=f"process {os.environ['RANK']}",
            remedy="one of them may have been killed, or the network fails; what the others say tells more",
        ) from error
    token = _session.set(session)
    _ours.set()
    try:
        yield
        barrier()
    except BaseException as error:
        told = cause_of(error)
        session.tell(told)
        if told is not error:
            raise told from error
        raise
    finally:
        _session.reset(token)
        dist.destroy_process_group()
        _ours.clear()
        session.leave(first=place == 0, of=count)
        session.lifeline.close()


def _join(device: str) -> tuple[_Session, int, int]:
    """Meet the others; also this process's rank, and how many there are."""
    found, place, count = next(dist.rendezvous("env://", timeout=TIMEOUT))
    # torchrun keeps its store when it starts processes again: what those before them left there is not for these.
    store = dist.PrefixStore(meet(found, rank=place, world=count, patience=TIMEOUT), found)
    lifeline = _lifeline(store, rank=place, world=count)
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    theirs = dist.PrefixStore("torch", store)
    dist.init_process_group(backend, store=theirs, rank=place, world_size=count, timeout=TIMEOUT)
    return _Session(dist.PrefixStore("plait", store), lifeline), place, count


def _lifeline(store: dist.Store, *, rank: int, world: int) -> Lifeline:
    if rank == 0:
        end, port = Lifeline.offer(world - 1)
        store.set("lifeline", json.dumps((socket.gethostname(), port)))
        return end
    host, port = json.loads(store.get("lifeline"))
    end = Lifeline.hold((os.environ["MASTER_ADDR"], host), port, patience_s=_REACH_S)
    if not end:
        text = f"process {rank} cannot reach port {port} of {host}: if process 0 is killed, it may wait for it in vain"
        warnings.warn(text, RuntimeWarning, stacklevel=2)
    return end


def _take_gpu() -> None:
    """Work on the GPU of this process's local rank."""
    local, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= there:
        raise ResourceError(
            f"process {local} of this machine has no GPU: there are {there}",
            place="LOCAL_RANK",
            remedy=f"start {there} processes on it, or set CUDA_VISIBLE_DEVICES= to use none",
        )
    torch.cuda.set_device(local)
