"""Faults of a setting that is a word or a mapping of several kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from plait.core.errors import ConfigError
from plait.core.spec import Spec, load

pytestmark = pytest.mark.light


class Round(Spec):
    """A circle."""

    kind: Literal["round"] = "round"
    """Which shape this is."""
    radius: int = Field(default=1, ge=1)
    """Half its width."""


class Square(Spec):
    """A square."""

    kind: Literal["square"] = "square"
    """Which shape this is."""
    side: int = Field(default=1, ge=1)
    """Width."""
    corners: tuple[Annotated[int, Field(ge=1)], ...] = (1, 2)
    """Corners."""


class Drawing(Spec):
    """A shape by its name in a file, or described."""

    size: int = 1
    """Size."""
    shape: str | Annotated[Round | Square, Field(discriminator="kind")] = "star"
    """Shape."""


def read(tmp_path: Path, *overrides: str) -> Drawing:
    (tmp_path / "drawing.yaml").write_text("size: 2\n")
    return load(Drawing, tmp_path / "drawing.yaml", overrides).spec


def test_a_word_or_a_mapping_is_taken(tmp_path: Path) -> None:
    assert read(tmp_path).shape == "star"
    assert read(tmp_path, "shape=moon").shape == "moon"
    assert read(tmp_path, "shape.kind=square", "shape.side=3").shape == Square(side=3)
    assert read(tmp_path, "shape={kind: round, radius: 2}").shape == Round(radius=2)


@pytest.mark.parametrize(
    ("overrides", "cause", "remedy"),
    [
        (["shape.kind=round", "shape.radius=0"], "shape.radius: expected integer ≥ 1, came 0", "explain shape.radius"),
        (
            ["shape.kind=square", "shape.corners=[3, 0]"],
            "shape.corners.1: expected integer ≥ 1, came 0",
            "explain shape.corners.1",
        ),
        (["shape.side=3"], "shape.kind is missing: expected round or square", "give shape.kind"),
        (
            ["shape.kind=sqare"],
            "shape.kind: expected round or square, came text 'sqare'",
            "see `plait config explain shape.kind`",
        ),
        (["shape.kind=round", "shape.raduis=2"], "unknown setting 'shape.raduis'", "did you mean 'shape.radius'?"),
        (["shape.kind=round", "shape.side=2"], "unknown setting 'shape.side'", "it goes with shape.kind = square"),
        (["shape=3"], "shape: expected text or mapping (Round) or mapping (Square), came 3", "explain shape"),
    ],
    ids=["below", "item", "no kind", "kind", "typo", "other kind", "scalar"],
)
def test_one_fault_is_said_once_and_where_it_is(tmp_path: Path, overrides: list[str], cause: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, *overrides)
    assert caught.value.cause == cause  # not also what pydantic says of the alternatives nobody meant
    assert remedy in caught.value.remedy
