"""One run of a sweep in a process of its own: ``python -m plait.recipes.search.child RUN``.

Its memory goes with it, a crash ends it alone, and it does not outlive the sweep: when the process that started it is
gone (its standard input ends), it saves its state and stops, as at SIGTERM.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from typing import NoReturn

from plait.core.errors import PlaitError, Stopped


def main(run: Path) -> int:
    """Go on with a run; returns what ``plait resume`` would exit with."""
    from plait.recipes.run import resume

    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        resume(run)
    except KeyboardInterrupt as stop:
        return stop.exit_code if isinstance(stop, Stopped) else 130
    except PlaitError as fault:  # the run's own log has it in full
        sys.stderr.write(f"error [{fault.code}]: {fault}\n")
        return fault.exit_code
    return 0


def _end_with_parent() -> None:
    while os.read(sys.stdin.fileno(), 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _terminate(number: int, frame: object) -> NoReturn:
    raise Stopped(number, "terminated")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _terminate)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the sweep hears Ctrl-C, and stops this
    sys.exit(main(Path(sys.argv[1])))
