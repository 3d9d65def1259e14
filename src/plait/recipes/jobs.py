"""Which run a command had begun before its processes were started again, as torchrun does when one of them fails."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plait.core.errors import PlaitError
from plait.core.files import read_json
from plait.core.launch import Launch, record

ENV = "env.json"


def job(started: Sequence[Launch], *, recipe: str, overrides: Sequence[str]) -> dict[str, Any]:
    """What ``env.json`` keeps of who started a run; nothing where a person did.

    Args:
        started: By whom, of all processes.
        recipe: As given.
        overrides: As given.
    """
    if not started:
        return {}
    return {"job": record(started) | {"recipe": recipe, "overrides": list(overrides)}}


def begun(root: Path, started: Sequence[Launch], *, recipe: str, overrides: Sequence[str]) -> Path | None:
    """The newest run that this very command began; None if it begins one now.

    A folder that cannot be read is none of them.

    Args:
        root: Where runs are.
        started: Who starts it now, of all processes: the first of them may be on a machine that has just come.
        recipe: As given: a command that torchrun starts may be a script with several recipes.
        overrides: As given.
    """
    if not started:
        return None
    found: list[tuple[float, Path]] = []
    for path in root.glob(f"*/{ENV}"):
        if path.parent.is_symlink():
            continue
        try:
            env = read_json(path)
            kept: object = env.get("job") if isinstance(env, Mapping) else None
        except PlaitError:
            continue
        if isinstance(kept, Mapping) and _same(kept, started, recipe=recipe, overrides=overrides):
            found.append((path.stat().st_mtime, path.parent))
    return max(found)[1] if found else None


def _same(kept: Mapping[str, object], started: Sequence[Launch], *, recipe: str, overrides: Sequence[str]) -> bool:
    return any(one.same(kept) for one in started) and (kept.get("recipe"), kept.get("overrides")) == (
        recipe,
        list(overrides),
    )
