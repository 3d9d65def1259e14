"""What ``test_run_ranks.py`` starts: ``python run_ranks.py FOLDER FOLDERS`` runs recipes in one and in two processes.

torch is imported once; every process is forked from there, before any torch operation.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.sides.several import together
from tests.tiny_recipe import write_recipe

from plait.cli.main import main
from plait.core.errors import DataError
from plait.core.launch import place
from plait.data.conversations import ConversationBatches

JUDGED = ["data.source.validation=0.2", "stages.tune.words.steps=1"]
JUDGED += [f"stages.{stage}.trainer.validation={{every: 2, samples: 5}}" for stage in ("pretrain", "tune", "align")]


def command(root: Path, *words: str) -> Callable[[], int]:
    """What a process does that was started with these words; what it prints is kept, by verb and number."""

    def work() -> int:
        os.chdir(root)
        with (
            Path(f"{words[0]}-{place()}.out").open("w") as out,
            Path(f"{words[0]}-{place()}.err").open("w") as err,
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            return main(list(words))

    return work


def faulty(root: Path, *words: str) -> Callable[[], int]:
    """The same; data of process 1 are damaged in the third step of each phase."""

    def work() -> int:
        if place() == 1:
            good = ConversationBatches.step_batches

            def broken(self: ConversationBatches, step: int) -> Any:
                if step == 2:
                    raise DataError("half of a picture is missing", place="sample 7", remedy="fetch it again")
                return good(self, step)

            ConversationBatches.step_batches = broken
        return command(root, *words)()

    return work


def all_of(root: Path, folders: dict[str, Path]) -> dict[str, Any]:
    """Exit codes of the processes of each case."""
    for library in ("torch._dynamo", "transformers.models.llama.modeling_llama", "peft"):
        importlib.import_module(library)
    cases: dict[str, tuple[int, Any, list[str]]] = {
        "one": (1, command, []),
        "two": (2, command, []),
        "faulty": (2, faulty, []),
        "too many": (2, command, ["stages.tune.words.batch_size=1"]),
        "misspelt": (2, command, ["stages.pretrain.batch_sizes=1"]),
        "judged by one": (1, command, JUDGED),
        "judged by two": (2, command, JUDGED),
    }
    found: dict[str, Any] = {}
    for name, (world, kind, words) in cases.items():
        place = root / name
        place.mkdir()
        recipe = write_recipe(place, folders, steps=4)
        found[name] = together(world, kind(place, "run", recipe.name, *words), join=False)
    found["faulty, resumed by one"] = together(1, command(root / "faulty", "resume"), join=False)
    found["two, resumed"] = together(2, command(root / "two", "resume", "--json"), join=False)
    return found


if __name__ == "__main__":
    print(json.dumps(all_of(Path(sys.argv[1]), {n: Path(p) for n, p in json.loads(sys.argv[2]).items()})))
