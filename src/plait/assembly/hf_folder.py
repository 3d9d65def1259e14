"""Local Hugging Face folder to a model of transformers, with what its weights lack: nothing is drawn unseen."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from plait.assembly.local import quiet, unreported
from plait.core.errors import CheckpointError

_BROKEN = (ImportError, KeyError, OSError, RuntimeError, SafetensorError, TypeError, ValueError)
# What transformers raises for folders that it cannot load.


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A model with transformers' account of its weights.

    Attributes:
        model: As transformers has it.
        folder: Where it comes from.
        missing: Names of weights that transformers drew at random.
        unexpected: Names in the file that the model has no place for.
        mismatched: Names with both shapes; these were drawn at random, too.
    """

    model: Any
    folder: Path
    missing: Sequence[str]
    unexpected: Sequence[str]
    mismatched: Sequence[str]

    def part(self, names: Sequence[str]) -> str:
        """The first of these parts that the model has, as a prefix of weights: ``vision_model.``, or nothing."""
        return next((f"{name}." for name in names if hasattr(self.model, name)), "")

    def check(self, *, inside: str = "", needed: Callable[[str], bool] = lambda _: True, exact: bool = False) -> None:
        """Refuse a model of which weights are not the folder's.

        Args:
            inside: Look only at weights whose names begin so.
            needed: Whether a weight, by its name inside, has to be there.
            exact: Whether the file may have nothing that the model has no place for.

        Raises:
            CheckpointError: Lists them, up to 20 of a kind.
        """
        kinds = {"missing": self.missing, "of another shape": self.mismatched}
        kinds |= {"unexpected": self.unexpected} if exact else {}
        found: list[str] = []
        for what, names in kinds.items():
            wrong = sorted(name.removeprefix(inside) for name in names if name.startswith(inside))
            wrong = [name for name in wrong if needed(name)]
            if wrong:
                more = f" and {len(wrong) - 20} more" if len(wrong) > 20 else ""
                found.append(f"{len(wrong)} {what}: {', '.join(wrong[:20])}{more}")
        if found:
            raise CheckpointError(
                f"weights that do not fit: {'; '.join(found)}",
                place=str(self.folder),
                remedy="use an undamaged copy of the folder: config.json and weights must come from one checkpoint",
            )


def load_folder(auto: Any, folder: Path, *, dtype: str, what: str) -> Loaded:
    """A model of transformers from safetensors on this disk.

    Args:
        auto: One of transformers' ``Auto`` classes.
        folder: Of the model.
        dtype: A name of torch's.
        what: It is called in an error.

    Raises:
        CheckpointError: Files are missing, damaged, or need another library.
    """
    with reading(folder, what, f"{auto.__name__} loads from safetensors, without other libraries"), unreported():
        model, report = auto.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told by check(), with all others
        )
    return Loaded(
        model=model,
        folder=folder,
        missing=sorted(report["missing_keys"]),
        unexpected=sorted(report["unexpected_keys"]),
        mismatched=sorted(f"{name} ({list(came)} for {list(due)})" for name, came, due in report["mismatched_keys"]),
    )


@contextlib.contextmanager
def reading(folder: Path, what: str, loads: str) -> Iterator[None]:
    """Without progress bars; what transformers raises becomes our error.

    Args:
        folder: That is read.
        what: Is read from it.
        loads: What a folder has to be, after "a folder that transformers'".

    Raises:
        CheckpointError: Something in this block could not be read.
    """
    try:
        with quiet():
            yield
    except _BROKEN as error:
        raise CheckpointError(
            f"no {what} can be read: {error}",
            place=str(folder),
            remedy=f"give a folder that transformers' {loads}",
        ) from error
