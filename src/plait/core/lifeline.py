"""How the processes that wait for the first one notice that it is gone, though nobody takes part in anything then.

Each holds a connection to it, over which nothing is sent. The system closes it when that process ends, however it ends;
of a machine that is lost, the system finds out in about a minute, by asking.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterable

_ASKING = {"TCP_KEEPIDLE": 30, "TCP_KEEPALIVE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}
"""Seconds until the system first asks whether the other machine is there, seconds between, and how often."""


class Lifeline:
    """The end of one process.

    Args:
        held: Of the first process, what the others connect to; of another one, its connection; None where there is no
            way to the first.
    """

    def __init__(self, held: socket.socket | None) -> None:
        self._held = held

    @classmethod
    def offer(cls, others: int) -> tuple[Lifeline, int]:
        """The end of the first process; and the port at which so many others may hold on to it.

        The system itself takes their connections up and ends them: they are never looked at here.
        """
        try:  # both kinds of addresses, where the system has both
            held = socket.create_server(("", 0), family=socket.AF_INET6, backlog=others, dualstack_ipv6=True)
        except (OSError, ValueError):
            held = socket.create_server(("", 0), backlog=others)
        return cls(held), int(held.getsockname()[1])

    @classmethod
    def hold(cls, hosts: Iterable[str], port: int, *, patience_s: float) -> Lifeline:
        """The end of another process.

        Args:
            hosts: Names of the first process's machine; the first one that can be reached is taken.
            port: That it offers.
            patience_s: How long to try each.
        """
        for host in hosts:
            try:
                held = socket.create_connection((host, port), timeout=patience_s)
            except OSError:
                continue
            held.setblocking(False)
            held.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in _ASKING.items():
                if hasattr(socket, name):  # not every system has each
                    held.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
            return cls(held)
        return cls(None)

    def __bool__(self) -> bool:
        """Whether it holds."""
        return self._held is not None

    def broken(self) -> bool:
        """Whether the first process is gone. Nothing is ever sent, so what can be read is the end."""
        if self._held is None:
            return False
        try:
            return not self._held.recv(1)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close(self) -> None:
        """Let go."""
        if self._held is not None:
            with contextlib.suppress(OSError):
                self._held.close()
