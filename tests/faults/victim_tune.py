"""What ``test_kill_tune.py`` kills: ``python victim_tune.py FOLDER TOWER DECODER`` prints as JSON how attempts ended.

torch is imported once and a process is forked for each attempt, before any torch operation, as in ``victim.py``.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from victim import die, forked

from plait.cli.main import _terminate
from plait.core import files
from plait.core.errors import Stopped
from plait.core.events import Event, Events
from plait.stages.data import Data, PairsSource
from plait.stages.tune import Tune
from plait.stages.tuning import phases

COLORS = ("red", "blue", "green", "black", "white", "brown", "gray", "pink")
THINGS = ("cat", "bus", "lamp", "tree")


def make_data(root: Path) -> int:
    """A data stage over named pictures of noise."""
    (root / "own").mkdir()
    (root / "01-data").mkdir()
    lines = ["image,text"]
    for number, name in enumerate(f"{color} {thing}" for thing in THINGS for color in COLORS):
        noise = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(noise).save(root / "own" / f"{number}.png")
        lines.append(f"{number}.png,{name}")
    (root / "own" / "pairs.csv").write_text("\n".join(lines) + "\n")
    source = PairsSource(path=root / "own" / "pairs.csv", test_fraction=0.25)
    Data(source=source).run(None, root / "01-data", events=Events())
    return 0


def tune(
    folder: Path,
    tower: str,
    decoder: str,
    on_event: Callable[[Event], None] | None = None,
    *,
    mixed: bool = False,
    beside: bool = False,
) -> int:
    """Eight steps in three phases; the connector has dropout. What was resumed is written into ``resumed``.

    With ``mixed``, the decoder is held in bfloat16, and the connector learns in the last phase, too.
    """

    def note_resumed(event: Event) -> None:
        if event.text.startswith("resumed at step"):
            with (folder / "resumed").open("a") as file:
                file.write(event.text.split(":")[0] + "\n")

    sizes: dict[str, Any] = {
        "image_tower": tower,
        "resolution": 0,
        "views": 1,
        "decoder": decoder,
        "dtype": "bfloat16" if mixed else "float32",
        "connector": {"d_hidden": 16, "tokens": 3, "free": 1},
        "words": {"steps": 3, "batch_size": 8},
        "frozen": {"steps": 2},
        "adapt": {"steps": 3, "rank": 2, "lr_connector": 1e-3 if mixed else 0.0},
        "batch_size": 4,
        "row": 0 if mixed else 192,
        "save_every": 1,
        "device": "cpu",
        "trainer": {"schedule": {"kind": "cosine", "warmup": 0.08}, "async_save": beside},
    }
    folder.mkdir(exist_ok=True)
    listeners = (note_resumed, on_event) if on_event else (note_resumed,)
    Tune.model_validate(sizes).run(folder.parent / "01-data", folder, events=Events(listeners=listeners))
    return 0


# --- where it dies -------------------------------------------------------------------------------------------------


def in_step(phase: str, step: int) -> Callable[[Event], None]:
    """Dies after the update of a step, before its record and its checkpoint."""

    def listener(event: Event) -> None:
        if event.kind == "progress" and (event.text, event.fields["done"]) == (f"tune: {phase}", step):
            die()

    return listener


def before_answers(phase: str) -> Callable[[Event], None]:
    """Dies when a phase is complete and its answers are written, before the next one begins."""

    def listener(event: Event) -> None:
        if event.kind == "sample" and event.fields["phase"] == phase:
            die()

    return listener


def half_an_adapter() -> None:
    """Dies with half of the second adapter's file written."""
    save = phases.save_multimodal

    def patched(built: Any, folder: Path) -> None:
        save(built, folder)
        if built.lora is not None and folder.name.startswith(".000002"):
            path = folder / "adapter" / "adapter_model.safetensors"
            os.truncate(path, path.stat().st_size // 2)
            die()

    phases.save_multimodal = patched


def unsealed() -> None:
    """Dies when all is trained, before the seal."""
    files.mark_done = die


POINTS: dict[str, Callable[[], Callable[[Event], None] | None]] = {
    "in words": lambda: in_step("words", 2),
    "between words and connector": lambda: before_answers("words"),
    "in connector": lambda: in_step("connector", 2),
    "in decoder": lambda: in_step("decoder", 2),
    "half of an adapter written": half_an_adapter,
    "before the seal": unsealed,
}


# --- where it is asked to stop -------------------------------------------------------------------------------------


asked_at: list[float] = []


def ask_once() -> None:
    """What ``kill PID`` does; never again in this process."""
    if not asked_at:
        asked_at.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)


def at_event(kind: str, text: str, done: int = 0) -> Callable[[Event], None]:
    """Is asked when this is said."""

    def listener(event: Event) -> None:
        if event.kind == kind and event.text.startswith(text) and event.fields.get("done", 0) >= done:
            ask_once()

    return listener


def while_encoding() -> Callable[[Event], None]:
    """Is asked while the tower encodes pictures, which it has to do again: this process finds no features."""
    os.environ["PLAIT_HOME"] = tempfile.mkdtemp()
    return at_event("progress", "features")


def in_a_save() -> None:
    """Is asked in the middle of a checkpoint of the last phase."""
    save = phases.save_multimodal

    def patched(built: Any, folder: Path) -> None:
        if built.lora is not None and folder.name.startswith(".000002"):
            ask_once()
        save(built, folder)

    phases.save_multimodal = patched


SIGNALS: dict[str, Callable[[], Callable[[Event], None] | None]] = {
    "SIGTERM while encoding": while_encoding,
    "SIGTERM in words": lambda: at_event("progress", "tune: words", 2),
    "SIGTERM at answers": lambda: at_event("sample", ""),
    "SIGTERM in decoder": lambda: at_event("progress", "tune: decoder", 2),
    "SIGTERM in a save": in_a_save,
}


def asked(place: Path, tower: str, decoder: str, *, arm: Callable[[], Callable[[Event], None] | None]) -> int:
    """Tune as the command line runs it, saving beside training; how long it lived after the signal: file ``asked``."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        return tune(place, tower, decoder, arm(), beside=True)
    except Stopped as stopped:
        (place / "asked").write_text(str(time.monotonic() - asked_at[0]))
        return stopped.exit_code


def main(root: Path, tower: str, decoder: str) -> dict[str, Any]:
    """Every attempt."""
    importlib.import_module("torch._dynamo")  # every optimizer does; three seconds that the forks need not spend again
    importlib.import_module("transformers.models.llama.modeling_llama")
    importlib.import_module("peft")
    outcome: dict[str, Any] = {"data": forked(lambda: make_data(root))}
    outcome["whole"] = forked(lambda: tune(root / "whole", tower, decoder))
    for point, arm in POINTS.items():
        place = root / point
        killed = forked(lambda place=place, arm=arm: tune(place, tower, decoder, arm()))
        outcome[point] = [killed, forked(lambda place=place: tune(place, tower, decoder))]
    for point, arm in SIGNALS.items():
        place = root / point
        stopped = forked(lambda place=place, arm=arm: asked(place, tower, decoder, arm=arm))
        outcome[point] = [stopped, forked(lambda place=place: tune(place, tower, decoder))]
    outcome["whole, mixed"] = forked(lambda: tune(root / "whole, mixed", tower, decoder, mixed=True))
    place = root / "in decoder, mixed"
    killed = forked(lambda: tune(place, tower, decoder, in_step("decoder", 2), mixed=True))
    outcome["in decoder, mixed"] = [killed, forked(lambda: tune(place, tower, decoder, mixed=True))]
    return outcome


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), *sys.argv[2:4])))
