"""What a verb prints: lines for a person, or one JSON value with ``--json``."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Out:
    """Where a verb's result goes.

    Attributes:
        json: Whether ``--json`` was given: then lines are silent and :meth:`result` prints.
        silent: Whether nothing is printed: of several processes that train together, the first one prints.
    """

    json: bool = False
    silent: bool = False

    def line(self, text: str = "") -> None:
        """Print one line for a person, at once."""
        if not (self.json or self.silent):
            print(text, flush=True)

    def result(self, value: Any) -> None:
        """Print the result as one JSON value; only with ``--json``."""
        if self.json and not self.silent:
            json.dump(value, sys.stdout, ensure_ascii=False, indent=2, default=str)
            sys.stdout.write("\n")
            sys.stdout.flush()
