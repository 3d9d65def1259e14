"""What a rehearsal of a recipe runs: the same recipe, made small."""

from pathlib import Path

import pytest

from plait.core.spec import to_yaml
from plait.recipes import recipe as recipes
from plait.recipes.recipe import load_recipe
from plait.recipes.rehearse import small

SHIPPED = sorted(path.stem for path in Path(recipes.__file__).parent.glob("*.yaml"))


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_made_small_is_a_recipe_that_other_processes_can_read(name: str, tmp_path: Path) -> None:
    less = small(load_recipe(name).spec, samples=4)
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(less), encoding="utf-8")
    assert load_recipe(str(path)).spec == less
