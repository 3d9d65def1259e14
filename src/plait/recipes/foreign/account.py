"""Where every key of a foreign configuration went: each has one row, and no key is without."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from plait.core.errors import ConfigError
from plait.core.yamltext import came

Outcome = Literal["mapped", "as it is", "not mapped", "unknown"]
"""A setting of the recipe says it now; Plait does so anyway; nothing says it; the other tool documents no such key."""

OUTCOMES: tuple[Outcome, ...] = ("mapped", "as it is", "not mapped", "unknown")


@dataclass(frozen=True, slots=True)
class FromShell:
    """A value that only the shell knows, such as ``$TP``.

    Attributes:
        text: As it stands in the file.
        why: Why it is not known here.
    """

    text: str
    why: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Leaf:
    """One value of a foreign configuration.

    Attributes:
        key: As the configuration names it: dotted (DeepSpeed), ``--key`` (arguments).
        value: Plain data, or :class:`FromShell`.
        where: ``file:line``.
        name: Under which the rules know it.
    """

    key: str
    value: Any
    where: str
    name: str


@dataclass(frozen=True, slots=True)
class Row:
    """What became of one value.

    Attributes:
        leaf: Which.
        outcome: What became of it.
        why: Why, and what to do where something is to be done.
        settings: What it sets, by dotted path within the stage.
        implied: Whether nobody gave it: it is the other tool's default, and not what the recipe would do.
    """

    leaf: Leaf
    outcome: Outcome
    why: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    implied: bool = False

    def refused(self, why: str) -> Row:
        """The row of a value that cannot be set after all."""
        return replace(self, outcome="not mapped", why=why, settings={})


class Ledger:
    """Values that wait for their row, and rows in the order in which they were written.

    Rules look values up by name, and each value is settled once.

    Args:
        leaves: All values; of two with one name the last counts, as on a command line.
    """

    def __init__(self, leaves: Iterable[Leaf]) -> None:
        self.rows: list[Row] = []
        self._open: dict[str, Leaf] = {}
        for leaf in leaves:
            earlier = self._open.pop(leaf.name, None)
            if earlier is not None:
                why = f"given again as {leaf.key} at {_short(leaf.where)}, and the last one counts"
                self.rows.append(Row(earlier, "not mapped", why))
            self._open[leaf.name] = leaf

    def __contains__(self, name: str) -> bool:
        return name in self._open

    def waiting(self) -> list[Leaf]:
        """Values without a row, in their order."""
        return list(self._open.values())

    def leaf(self, name: str) -> Leaf:
        """A value that waits."""
        return self._open[name]

    # --- rows ------------------------------------------------------------------------------------------------------

    def maps(self, name: str, settings: Mapping[str, Any], why: str = "") -> None:
        """Settings of the recipe say it from now on."""
        self.rows.append(Row(self._open.pop(name), "mapped", why, settings))

    def keeps(self, name: str, why: str) -> None:
        """Plait does so anyway, or it says nothing."""
        self.rows.append(Row(self._open.pop(name), "as it is", why))

    def drops(self, name: str, why: str) -> None:
        """Nothing in a recipe says it."""
        self.rows.append(Row(self._open.pop(name), "not mapped", why))

    def forgets(self, name: str, why: str) -> None:
        """The other tool documents no such key."""
        self.rows.append(Row(self._open.pop(name), "unknown", why))

    def implies(self, key: str, value: Any, settings: Mapping[str, Any]) -> None:
        """A default of the other tool, which differs from what the recipe would do."""
        self.rows.append(Row(Leaf(key, value, "", key), "mapped", "the other tool's default", settings, implied=True))

    # --- values ----------------------------------------------------------------------------------------------------

    def number(self, name: str, *, least: float = 0.0) -> float:
        """A number; text is read as one, as a shell gives it.

        Raises:
            ConfigError: It is none, or below ``least``.
        """
        leaf = self._open[name]
        if isinstance(leaf.value, bool) or not isinstance(leaf.value, int | float | str):
            raise _wrong(leaf, "a number")
        try:
            value = float(leaf.value)
        except (ValueError, OverflowError) as error:
            raise _wrong(leaf, "a number") from error
        if not math.isfinite(value):
            raise _wrong(leaf, "a number")
        if value < least:
            raise _wrong(leaf, f"a number of {least:g} or more")
        return value

    def integer(self, name: str, *, least: int = 0) -> int:
        """A whole number, also written as 1e6.

        Raises:
            ConfigError: It is none, or below ``least``.
        """
        value = self.number(name, least=float(least))
        if value != int(value):
            raise _wrong(self._open[name], "a whole number")
        return int(value)

    def flag(self, name: str) -> bool:
        """Yes or no.

        Raises:
            ConfigError: It is neither.
        """
        leaf = self._open[name]
        if isinstance(leaf.value, bool):
            return leaf.value
        word = str(leaf.value).lower()
        if word in ("true", "1", "false", "0"):
            return word in ("true", "1")
        raise _wrong(leaf, "true or false")

    def word(self, name: str) -> str:
        """Text.

        Raises:
            ConfigError: It is none.
        """
        leaf = self._open[name]
        if not isinstance(leaf.value, str) or not leaf.value:
            raise _wrong(leaf, "text")
        return leaf.value

    def wrong(self, name: str, expected: str) -> ConfigError:
        """The error of a value that is not what it should be."""
        return _wrong(self._open[name], expected)


def _wrong(leaf: Leaf, expected: str) -> ConfigError:
    return ConfigError(
        f"{leaf.key}: expected {expected}, came {came(leaf.value)}", place=leaf.where, remedy="mend the file"
    )


def _short(where: str) -> str:
    return where.rpartition("/")[2]
