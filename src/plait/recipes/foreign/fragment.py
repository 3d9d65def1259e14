"""A foreign configuration as a recipe that extends another one, and an account of every key."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from plait.core.errors import ConfigError
from plait.core.yamltext import SIZE_LIMIT, Keys, write_text
from plait.recipes.foreign import deepspeed, megatron
from plait.recipes.foreign.account import OUTCOMES, Ledger, Row
from plait.recipes.foreign.target import Target
from plait.recipes.recipe import find_recipe, load_recipe, shipped

Tool = Literal["auto", "deepspeed", "megatron"]
"""Whose configuration it is; `auto` looks at the file."""

_WIDTH = 110


@dataclass(frozen=True, slots=True)
class Imported:
    """What a configuration became.

    Attributes:
        tool: Whose it was.
        rows: What became of each key, in the order in which the rules came to it.
        settings: Of the stage, by dotted path.
        text: The recipe.
    """

    tool: str
    rows: Sequence[Row]
    settings: Mapping[str, Any]
    text: str

    def of(self, outcome: str) -> list[Row]:
        """Rows of one outcome."""
        return [row for row in self.rows if row.outcome == outcome]


def import_config(
    path: Path,
    *,
    tool: Tool = "auto",
    extends: str = "standard",
    stage: str = "tune",
    folder: Path = Path(),
    processes: int = 0,
    variables: Mapping[str, str] | None = None,
) -> Imported:
    """Map a DeepSpeed or Megatron-LM configuration to a stage of a recipe.

    What the recipe refuses (two settings that do not go together, one that this stage has not) is not mapped, and its
    row says why in the recipe's own words: what comes out always loads.

    Args:
        path: A DeepSpeed JSON; or a script, a file of arguments or a YAML file of Megatron-LM.
        tool: Whose it is.
        extends: The parent: name of a shipped recipe, or path of a recipe or a run folder.
        stage: Stage of it that the configuration is for.
        folder: Where the recipe will lie: a path of the parent is written as seen from there.
        processes: How many processes the configuration was for, where sizes of batches follow from it.
        variables: Of Megatron's script, what the shell would know.

    Raises:
        ConfigError: The file, the parent or the stage is wrong.
    """
    text = _read(path)
    found = tool if tool != "auto" else "deepspeed" if text.lstrip("\ufeff \t\r\n").startswith("{") else "megatron"
    resolved = load_recipe(extends)
    target = Target.of(resolved.spec, stage, processes=processes)
    if found == "deepspeed":
        ledger = Ledger(deepspeed.read_leaves(text, path))
        deepspeed.read(ledger, target)
    else:
        ledger = Ledger(megatron.read_leaves(text, path, variables=variables))
        megatron.read(ledger, target)
    if ledger.rows and all(row.outcome == "unknown" for row in ledger.rows):
        names = {"deepspeed": "DeepSpeed", "megatron": "Megatron-LM"}
        raise ConfigError(
            f"none of its keys is one of {names[found]}", place=str(path), remedy="check the file, or give --from"
        )
    rows, settings = _fit(ledger.rows, extends, stage)
    parent = extends if extends in shipped() else os.path.relpath(find_recipe(extends), folder)
    return Imported(found, rows, settings, _write(rows, settings, path=path, parent=parent, stage=stage))


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(SIZE_LIMIT + 1)
    except OSError as error:
        raise ConfigError(f"cannot read it: {error.strerror}", place=str(path), remedy="check the path") from error
    if len(data) > SIZE_LIMIT:
        raise ConfigError(f"larger than {SIZE_LIMIT:,} bytes", place=str(path), remedy="give a configuration")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError("not UTF-8", place=f"{path}:{line}", remedy="save the file as UTF-8") from error


# --- what goes together --------------------------------------------------------------------------------------------


def _fit(rows: Iterable[Row], extends: str, stage: str) -> tuple[list[Row], dict[str, Any]]:
    """Settings that the recipe takes, and the rows, those of refused ones with the reason."""
    joined, kept = _join(rows)
    if not joined:
        return kept, joined
    if _refusal(extends, stage, joined) is None:
        return kept, joined
    settings: dict[str, Any] = {}
    fitted: list[Row] = []
    for row in kept:
        if row.outcome == "mapped":
            refusal = _refusal(extends, stage, {**settings, **row.settings})
            if refusal is None:
                settings |= row.settings
            else:
                row = row.refused(refusal)  # noqa: PLW2901
        fitted.append(row)
    return fitted, settings


def _join(rows: Iterable[Row]) -> tuple[dict[str, Any], list[Row]]:
    """All settings; of two rows that say another of one thing, the first counts."""
    settings: dict[str, Any] = {}
    by: dict[str, Row] = {}
    kept: list[Row] = []
    for row in rows:
        clash = next((p for p, value in row.settings.items() if p in settings and settings[p] != value), None)
        if clash is not None:
            row = row.refused(f"{by[clash].leaf.key} has set {clash} to {settings[clash]}")  # noqa: PLW2901
        settings |= row.settings
        by |= dict.fromkeys(row.settings, row)
        kept.append(row)
    return settings, kept


def _refusal(extends: str, stage: str, settings: Mapping[str, Any]) -> str | None:
    """Why the recipe does not take settings; None if it does."""
    try:
        load_recipe(extends, [f"stages.{stage}.{path}={json.dumps(value)}" for path, value in settings.items()])
    except ConfigError as error:
        return f"the recipe refuses it: {error.cause}"
    return None


# --- the file ------------------------------------------------------------------------------------------------------


def _write(rows: Sequence[Row], settings: Mapping[str, Any], *, path: Path, parent: str, stage: str) -> str:
    tree: dict[str, Any] = {}
    notes: dict[Keys, str] = {}
    for dotted, value in settings.items():
        keys = tuple(dotted.split("."))
        below = tree
        for key in keys[:-1]:
            below = below.setdefault(key, {})
        below[keys[-1]] = value
        by = next(row for row in rows if dotted in row.settings)
        notes["stages", stage, *keys] = f"{by.leaf.key}, {_place(by)}"
    recipe: dict[str, Any] = {"extends": parent} | ({"stages": {stage: tree}} if tree else {})
    head = f"# {path.name}, by `plait config import`. What became of every key is listed below.\n"
    return head + write_text(recipe, notes).rstrip("\n") + "\n\n" + "\n".join(_account(rows)) + "\n"


def _account(rows: Sequence[Row]) -> list[str]:
    """Rows as comments."""
    lines: list[str] = []
    for outcome in OUTCOMES:
        found = [row for row in rows if row.outcome == outcome]
        lines += [f"# {outcome}: {len(found)}"] if found else []
        for row in found:
            text = f"{given(row)} ({_place(row)}): {said(row)}"
            lines += textwrap.wrap(
                text, _WIDTH, initial_indent="#   ", subsequent_indent="#     ", break_on_hyphens=False
            )
    return lines


def given(row: Row) -> str:
    """What stood there, for a person."""
    value = row.leaf.value
    if value is True and row.leaf.key.startswith("--"):
        return row.leaf.key
    text = " ".join(value.split()) if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return f"{row.leaf.key} = {text if len(text) <= 60 else text[:59] + '…'}"


def said(row: Row) -> str:
    """What became of it, for a person."""
    set_to = ", ".join(f"{path}: {json.dumps(value)}" for path, value in row.settings.items())
    return "; ".join(part for part in (set_to, row.why) if part)


def _place(row: Row) -> str:
    return "not given" if row.implied else row.leaf.where.rpartition("/")[2]
