"""What a rehearsal of a recipe runs: the same recipe, made small."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from plait.core import mesh
from plait.core.errors import ConfigError
from plait.core.spec import to_yaml
from plait.core.tensors import Batch
from plait.objectives.matching import QueryTasks
from plait.recipes import recipe as recipes
from plait.recipes.recipe import load_recipe
from plait.recipes.rehearse import small
from plait.recipes.rehearsed.rank import compared
from plait.training.rehearsal import Asked

SHIPPED = sorted(path.stem for path in Path(recipes.__file__).parent.glob("*.yaml"))


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_made_small_is_a_recipe_that_other_processes_can_read(name: str, tmp_path: Path) -> None:
    less = small(load_recipe(name).spec, samples=4)
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(less), encoding="utf-8")
    assert load_recipe(str(path)).spec == less


def test_processes_refuse_to_divide_what_is_no_sum_over_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mesh, "world", lambda: 2)
    one = torch.ones(1, 1, dtype=torch.long)
    batch = Batch(token_ids=one, labels=one, segment_ids=one, media={}, item_row={}, sample_ids=("a",))
    asked = object.__new__(Asked)
    object.__setattr__(asked, "objective", QueryTasks())
    object.__setattr__(asked, "batches", SimpleNamespace(step_batches=lambda _: [batch]))
    with pytest.raises(ConfigError, match="2 processes hold a part of it each"):
        compared(asked, tmp_path)
