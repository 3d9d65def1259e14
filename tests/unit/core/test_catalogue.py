"""The list of settings, and the way from a typo back to it."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from pydantic import Field

from plait.core.catalogue import nearest
from plait.core.spec import Spec, catalogue

pytestmark = pytest.mark.light


class Tree(Spec):
    """A spec that holds itself."""

    size: int = 1
    """Size."""
    left: Tree | None = None
    """Smaller."""
    right: Tree | None = None
    """Larger."""


class Words(Spec):
    """Types as people read them."""

    plain: dict[str, float] = Field(default_factory=lambda: {"a": 1.0})
    """Weights."""
    short: str = Field(default="ab", min_length=1, max_length=3, pattern="^[a-z]+$")
    """Word."""
    sizes: tuple[int, ...] = Field(default=(1,), min_length=1)
    """Sizes."""
    pair: tuple[int, str] = (1, "a")
    """Two."""
    maybe: Tree | None = None
    """A tree."""
    named: Mapping[str, Tree] = Field(default_factory=dict)
    """Trees."""


def test_a_spec_that_holds_itself_is_listed_as_deep_as_it_is_used() -> None:
    paths = {setting.path for setting in catalogue(Tree).settings({"left": {"left": {}}})}
    assert {"left.left.left", "left.left.size", "right"} <= paths
    assert not {"left.left.left.size", "right.size"} & paths


@pytest.mark.parametrize(
    ("path", "kind", "bounds", "default"),
    [
        ("plain", "mapping of names to number", "", {"a": 1.0}),
        ("short", "text", "at least 1 characters and at most 3 characters and matching ^[a-z]+$", "ab"),
        ("sizes", "list of integer", "at least 1 items", [1]),
        ("pair", "list of 2: integer, text", "", [1, "a"]),
        ("maybe", "mapping (Tree) or null", "", None),
        ("maybe.size", "integer", "", 1),
        ("named.oak.size", "integer", "", 1),
    ],
)
def test_types_and_bounds_in_words(path: str, kind: str, bounds: str, default: object) -> None:
    known = {setting.path: setting for setting in catalogue(Words).settings({"named": {"oak": {}}})}
    setting = known[path]
    assert (setting.type, setting.range, setting.default, setting.required) == (kind, bounds, default, False)


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ("pretrain.steps", ("stages.pretrain.steps",)),
        ("steps", ("stages.pretrain.steps", "stages.tune.steps")),
        ("stages.pretrain.stepz", ("stages.pretrain.steps",)),
        ("data.sourse", ("data.source",)),
        ("sourse", ("data.source",)),
        ("sed", ("seed",)),
        ("wholly.different", ()),
    ],
)
def test_the_nearest_path(typed: str, found: tuple[str, ...]) -> None:
    paths = ["name", "seed", "data", "data.source", "data.seed", "stages.pretrain.steps", "stages.tune.steps", "stages"]
    assert nearest(typed, paths) == found
