"""How processes that were started together find each other in a store that others have used before them.

``torchrun`` keeps one store as long as it lives. Processes that it starts again would find the addresses and words of
those before them there, and connect to the dead. Its own number of restarts cannot tell the starts apart: it is not
the same on all machines (https://github.com/pytorch/pytorch/issues/108158).
"""

# torch's annotations are partial: its members count as partially unknown.
# pyright: reportUnknownMemberType=false, reportPrivateImportUsage=false

from __future__ import annotations

import datetime
import json
import time
import uuid
from typing import Any

import torch.distributed as dist

from plait.core.errors import ResourceError

_LOOK_S = 0.02


def meet(store: dist.Store, *, rank: int, world: int, patience: datetime.timedelta) -> str:
    """Agree on a name that nobody before has used in this store: keys below it are of these processes alone.

    Every other process says a word of its own, and rank 0 answers with the name and the words it has heard. An answer
    with one's own word is no older than that word, and those who are older are dead by then: a launcher ends all before
    it starts any again.

    Args:
        store: That all can reach.
        rank: Of this process.
        world: How many processes there are.
        patience: How long to wait for another one.

    Raises:
        ResourceError: One did not come.
    """
    until = time.monotonic() + patience.total_seconds()
    own = uuid.uuid4().hex
    if rank:
        store.set(f"meet/{rank}", own)
        while True:
            answer: dict[str, Any] = json.loads(store.get("meet/0")) if store.check(["meet/0"]) else {}
            if answer.get("heard", {}).get(str(rank)) == own:
                store.set(f"met/{answer['name']}/{rank}", "")
                return str(answer["name"])
            _wait(until, world, rank=rank, missing=[0])
    heard: dict[str, str] = {}
    while missing := [other for other in range(1, world) if not store.check([f"met/{own}/{other}"])]:
        words = {str(other): _word(store, other) for other in range(1, world)}
        if words != heard:
            heard = words
            store.set("meet/0", json.dumps({"name": own, "heard": heard}))
        _wait(until, world, rank=rank, missing=missing)
    return own


def _word(store: dist.Store, other: int) -> str:
    key = f"meet/{other}"
    return store.get(key).decode() if store.check([key]) else ""


def _wait(until: float, world: int, *, rank: int, missing: list[int]) -> None:
    if time.monotonic() > until:
        raise ResourceError(
            f"process {rank} of {world} waited in vain for {', '.join(map(str, missing))}",
            place=f"process {rank}",
            remedy="see what those processes say; start all of them with the same command",
        )
    time.sleep(_LOOK_S)  # not in the store: a signal is answered in between
