"""Several processes of one test, which train together: each a copy of this one, made before any torch operation."""

from __future__ import annotations

import contextlib
import json
import os
import traceback
from collections.abc import Callable
from typing import Any

from plait.core import mesh
from plait.core.launch import free_port


def together(world: int, work: Callable[[], Any], *, join: bool = True) -> list[Any]:
    """What each rank gives back, or how it failed; ``killed`` for one that died. Without ``join``, it joins itself."""
    port = free_port()
    pipes = []
    for rank in range(world):
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            try:
                with mesh.joined() if join else contextlib.nullcontext():
                    answer = work()
            except BaseException as error:
                traceback.print_exc()
                answer = f"{type(error).__name__}: {error}"
            os.write(write, json.dumps(answer).encode())
            os._exit(0)
        os.close(write)
        pipes.append((pid, read))
    answers = []
    for pid, read in pipes:
        with os.fdopen(read, "rb") as pipe:
            said = pipe.read()
        os.waitpid(pid, 0)
        answers.append(json.loads(said) if said else "killed")
    return answers
