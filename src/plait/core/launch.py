"""What a launcher of several processes (``torchrun``) says in the environment; imports torch only if it has to.

One process, or none that a launcher started, is process 0 of 1, and everything here is a no-op.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from plait.core.errors import PlaitError, ResourceError

_Result = TypeVar("_Result")


def launched() -> bool:
    """Whether this process was started as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def processes() -> int:
    """How many processes were started together."""
    return int(os.environ.get("WORLD_SIZE", "1")) if launched() else 1


def place() -> int:
    """This process's number among those that were started together, from 0; known before they have joined."""
    return int(os.environ.get("RANK", "0")) if launched() else 0


def local() -> int:
    """How many of the processes that were started together are on this machine."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))) if launched() else 1


def own_share(cores: int) -> int:
    """Cores for each of the processes that were started on this machine."""
    return max(1, cores // local())


@contextmanager
def together() -> Generator[None]:
    """Join the processes that were started together (:func:`plait.core.mesh.joined`), on the best device there is.

    Raises:
        ConfigError: The launcher left something out.
        ResourceError: There are more processes on this machine than GPUs.
    """
    if not launched():
        yield
        return
    import torch

    from plait.core import mesh

    with mesh.joined("cuda" if torch.cuda.is_available() else "cpu"):
        yield


def first(work: Callable[[], _Result]) -> _Result:
    """Let the first process do something while the others wait (:func:`plait.core.mesh.first`)."""
    if not launched():
        return work()
    from plait.core import mesh

    return mesh.first(work)


# --- who launched it -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What one call of torchrun started.

    Attributes:
        id: Its ``--rdzv-id``, which all its machines share; of a call without one, ``agent``.
        agent: The process that starts ours, on this machine: host, number and when it began. Empty where the system
            does not tell.
        restarts: How often this machine's processes were started again because one failed.
    """

    id: str
    agent: str
    restarts: int

    def same(self, call: Mapping[str, object]) -> bool:
        """Whether this is the same call of torchrun as one that :func:`record` wrote down.

        The agent starts a command once and then only starts it again: after a fault, which it counts, and when machines
        come or go, which it does not. Two calls may be given the same id by a person.
        """
        agents = call.get("agents")
        if self.agent and isinstance(agents, list) and self.agent in agents:
            return True
        return self.restarts > 0 and call.get("id") == self.id


def record(launches: Sequence[Launch]) -> dict[str, Any]:
    """A call of torchrun, for ``env.json``: its id, and the agents of all machines.

    Args:
        launches: Of all processes; one at least.
    """
    return {"id": launches[0].id, "agents": sorted({one.agent for one in launches if one.agent})}


def launches() -> list[Launch]:
    """Who started each of the processes that have joined, in their order; none if it was not torchrun."""
    own = launch()
    if own is None:
        return []
    if not launched():
        return [own]
    from plait.core import mesh

    return [Launch(**found) for found in mesh.gather(asdict(own))]


def launch(proc: Path = Path("/proc")) -> Launch | None:
    """Who started this process, if it was torchrun.

    Args:
        proc: Where the system tells about processes.
    """
    given = os.environ.get("TORCHELASTIC_RUN_ID")
    if given is None:
        return None
    number = os.getppid()
    began = _began(proc / str(number) / "stat")
    agent = f"process {number} on {socket.gethostname()}"
    return Launch(
        id=given if given not in ("", "none") else agent,
        agent=f"{agent}, begun at {began}" if began else "",
        restarts=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
    )


def _began(stat: Path) -> str:
    """When a process began, in ticks since the machine did; the name before it may hold spaces and brackets."""
    try:
        return stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def tell_launcher(fault: PlaitError) -> None:
    """Leave a fault of this process where torchrun looks for it, so that it names it as the cause; once is enough."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path or fault.rank is not None:
        return
    with contextlib.suppress(OSError):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        told = {"message": str(fault), "extraInfo": {"timestamp": str(int(time.time()))}}
        Path(path).write_text(json.dumps({"message": told}), encoding="utf-8")


def free_port() -> int:
    """A port of this machine where processes that are about to start can meet.

    Below those that systems hand out for connections (49,152 and up by RFC 6335, Linux from 32,768): of these, one that
    is free now may be somebody's end of a connection a moment later.

    Raises:
        ResourceError: There is none.
    """
    for port in random.SystemRandom().sample(range(10_000, 32_000), 200):
        with socket.socket() as tried:
            try:
                tried.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise ResourceError(
        "no free port between 10,000 and 32,000 on 127.0.0.1", remedy="end what holds them, or start with torchrun"
    )
