"""What programs of a benchmark measure alike: time and memory from the moment the model is loaded. Standard library.

Before that moment every weight is touched and freed memory is given back, so that neither pages of a weight file that
were not read yet nor what loading left behind are counted for one side only.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROC = Path("/proc/self")


def rss(key: str = "VmRSS") -> int:
    """Bytes of a line of ``/proc/self/status``: ``VmRSS`` is held now, ``VmHWM`` is the most held."""
    text = (PROC / "status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(f"{key}:"))


def loopback() -> int:
    """Bytes that went over the loopback device so far, headers included, of all programs of this machine."""
    lines = (PROC / "net/dev").read_text(encoding="ascii").splitlines()
    return next((int(line.split()[9]) for line in lines if line.split()[0] == "lo:"), 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """The moment the model is loaded.

    Attributes:
        time: Seconds of the performance counter.
        loaded: Bytes of RAM held.
    """

    time: float
    loaded: int

    @classmethod
    def now(cls, weights: Iterable[Any]) -> Start:
        """Touch weights (torch tensors), give back what is free, let the peak start anew, start the clock."""
        for weight in weights:
            weight.detach().amax()
        gc.collect()
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)
        (PROC / "clear_refs").write_text("5", encoding="ascii")
        return cls(time=time.perf_counter(), loaded=rss())

    def stop(self) -> dict[str, float]:
        """Seconds since then, and the most RAM since then: in all, and above what was held at the start."""
        seconds = time.perf_counter() - self.time
        peak = rss("VmHWM")
        return {"seconds": seconds, "loaded": self.loaded, "peak": peak, "above": peak - self.loaded}


def read_job() -> dict[str, Any]:
    """The job that the benchmark wrote, from the file that is the only argument."""
    return json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))


def read_questions(job: dict[str, Any]) -> list[dict[str, str]]:
    """Records of ``data.jsonl``: picture (path below the folder), sha256, question, answer.

    The job's ``order`` says which ones (of all epochs, one after the other); without it, the first ``samples``.
    """
    lines = Path(job["work"], "data.jsonl").read_text(encoding="utf-8").splitlines()
    order = job.get("order") or range(job["samples"])
    return [json.loads(lines[number]) for number in order]


def write_result(job: dict[str, Any], result: dict[str, Any]) -> None:
    """Where the job wants it."""
    Path(job["result"]).write_text(json.dumps(result), encoding="utf-8")
