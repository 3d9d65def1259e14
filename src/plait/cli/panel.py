"""Progress on the screen: one live panel on a terminal, plain lines without carriage returns elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Protocol, TextIO, runtime_checkable

from plait.core.launch import place

if TYPE_CHECKING:
    from plait.core.events import Event

_EVERY_S = 10.0
_NOT_SHOWN = ("error", "stopped")
_SHOWN = ("loss", "lr", "grad_norm", "tokens_per_s", "samples_per_s", "data_wait", "memory_mb", "mfu")


@runtime_checkable
class Screen(Protocol):
    """Where lines go: stdout, stderr, or a buffer."""

    def write(self, text: str, /) -> object:
        """Take text."""
        ...

    def flush(self) -> object:
        """Show it now."""
        ...


@contextlib.contextmanager
def watch(*, quiet_stdout: bool = False) -> Generator[Callable[[Event], None]]:
    """A listener for :class:`plait.core.events.Events` that draws while the block runs.

    Of several processes only the first one draws.

    Args:
        quiet_stdout: Draw on stderr, because stdout carries JSON.
    """
    if place():
        yield _unseen
        return
    stream = sys.stderr if quiet_stdout else sys.stdout
    # Said before the heavy imports, so that something is on the screen within a second.
    print("plait: starting", file=stream, flush=True)
    if stream.isatty():
        with _live(stream) as listener:
            yield listener
    else:
        yield Lines(stream)


def _unseen(event: Event) -> None:
    """Nothing is drawn."""


class Lines:
    """One plain line an event; progress at most every ten seconds and at the end of a task.

    Example:
        >>> import io
        >>> from plait.core.events import Events
        >>> screen = io.StringIO()
        >>> Events(None, listeners=(Lines(screen),)).note("4,009 pictures")
        >>> screen.getvalue().split("  ")[1].strip()
        '4,009 pictures'
    """

    def __init__(
        self, stream: Screen, *, every_s: float = _EVERY_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.stream = stream
        self.every_s = every_s
        self.clock = clock
        self.begun = clock()
        self.said: dict[str, float] = {}
        self.open = True

    def __call__(self, event: Event) -> None:
        """Print the event if it is due; faults are printed by the command itself, in the end."""
        if not self.open or event.kind in _NOT_SHOWN:
            return
        if event.kind == "progress":
            finished = event.fields["done"] == event.fields["total"]
            now = self.clock()
            if not finished and now - self.said.setdefault(event.text, now) < self.every_s:
                return
            self.said[event.text] = now
        try:
            print(f"{self._elapsed()}  {describe(event)}", file=self.stream, flush=True)
        except BrokenPipeError:
            self.open = False  # the reader (head, less) went away; the work goes on

    def _elapsed(self) -> str:
        seconds = int(self.clock() - self.begun)
        return f"{seconds // 60:3d}:{seconds % 60:02d}"


def describe(event: Event) -> str:
    """The event as one line."""
    if event.kind != "progress":
        mark = "warning: " if event.kind == "warning" else ""
        return f"{mark}{event.text}"
    done, total = event.fields["done"], event.fields["total"]
    share = f"{done}/{total} ({done / total:.0%})" if total else f"{done}"
    return f"{event.text} {share}  {figures(event)}".rstrip()


def figures(event: Event) -> str:
    """Time to go, loss, rate and the like, those that the event carries: what is last is cut first."""
    shown = [f"{name} {event.fields[name]:.4g}" for name in _SHOWN if isinstance(event.fields.get(name), int | float)]
    eta = event.fields.get("eta_s")
    if isinstance(eta, int | float):
        shown.insert(0, f"eta {int(eta) // 60}:{int(eta) % 60:02d}")
    return "  ".join(shown)


@contextlib.contextmanager
def _live(stream: TextIO) -> Generator[Callable[[Event], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TaskID,
        TextColumn,
        TimeElapsedColumn,
    )
    from rich.table import Column

    console = Console(file=stream)
    columns = (
        SpinnerColumn(),
        TextColumn("[bold]{task.description:<14}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        # Alone takes what width is left, so that a narrow screen cuts figures, not the bar.
        TextColumn("{task.fields[figures]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
    )
    with Progress(*columns, console=console, transient=True, expand=True) as progress:
        tasks: dict[str, TaskID] = {}

        def listener(event: Event) -> None:
            if event.kind in _NOT_SHOWN:
                return
            if event.kind != "progress":
                style = {"warning": "yellow", "error": "bold red", "stage": "bold cyan", "sample": "green"}.get(
                    event.kind
                )
                console.print(describe(event), style=style, markup=False, highlight=False)
                return
            done, total = event.fields["done"], event.fields["total"]
            if event.text not in tasks:
                tasks[event.text] = progress.add_task(event.text, total=total or None, figures="")
            task = tasks[event.text]
            progress.update(task, completed=done, total=total or None, figures=figures(event))
            if total and done >= total:
                progress.remove_task(task)
                del tasks[event.text]

        yield listener
