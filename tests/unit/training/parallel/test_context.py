"""Training with rows shared among processes equals training in one; what is kept and sent; what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from benchmarks.context import formula
from benchmarks.layouts import BOUNDS
from pydantic import ValidationError
from tests.rank_script import cases_of

from plait.stages.align import Align
from plait.stages.tune import Tune
from plait.training.trainer import Trainer

Said = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Said:
    """What the processes of each case say, as JSON."""
    return cases_of(Path(__file__).with_name("fit_context.py"), str(tmp_path_factory.mktemp("context")))


@pytest.mark.row("S4-65")
def test_processes_that_share_rows_end_where_one_does(said: Said) -> None:
    found = said["equal"]
    for name, apart in found.items():
        bound = next(limit for form, limit in BOUNDS.items() if form in name)
        assert all(isinstance(one, float) and one <= bound for one in apart), (name, apart)
        assert len(set(apart)) == 1, f"{name}: processes end apart: {apart}"
    assert len(found) == 5


@pytest.mark.row("S4-65")
def test_a_process_with_nothing_to_learn_from_in_its_part_holds_nobody_up(said: Said) -> None:
    found = said["lopsided"]
    assert len(found) == 2
    for name, apart in found.items():
        assert all(isinstance(one, float) and one <= BOUNDS["float64"] for one in apart), (name, apart)


@pytest.mark.row("S4-65")
def test_rows_without_a_picture_teach_a_connector_alone_nothing(said: Said) -> None:
    apart = said["connector"]["apart"]
    assert all(isinstance(one, float) and one <= BOUNDS["float64"] for one in apart), apart


def test_hooks_compute_whole_rows_in_the_first_process_alone_and_nothing_is_left_on_the_model(said: Said) -> None:
    found = said["shown"]
    (alone,) = found["{}"]
    assert len(alone["seen"]) == 8  # five steps, three evaluations
    others = [pair for pair in found.values() if len(pair) == 2]
    assert len(others) == 2
    for first, second in others:
        assert first["seen"] == pytest.approx(alone["seen"], rel=1e-9)
        assert second["seen"] == []
        assert all(one["hooks"] == 0 and one["attention"] for one in (first, second))


@pytest.mark.row("S4-65")
def test_each_process_keeps_its_part_of_the_activations_and_sends_what_the_formula_says(said: Said) -> None:
    found = said["memory"]
    (fused,) = found["fused"]
    for name in ("ring", "ulysses"):
        setting = {"context": 2, "context_attention": name}
        assert [one["sent"] for one in found[name]] == [formula(600, setting)] * 2
        assert max(one["kept"] for one in found[name]) < 0.55 * fused["kept"]
    assert fused["sent"] == 0


def test_what_cannot_share_rows_is_refused_in_every_process_before_anything_is_taken(said: Said) -> None:
    why = {
        "objective": "rows of next-token training of a MultimodalLM can be shared, and this is Other",
        "model": "rows of next-token training of a MultimodalLM can be shared, and this is DualEncoder",
        "gated": "LlamaForCausalLM reads media inside, by cross-attention",
        "heads": "3 heads cannot be dealt out evenly to 2 processes",
    }
    for one in said["refused"]["said"]:
        assert one.keys() == why.keys()
        for name, text in one.items():
            assert text.endswith(why[name]), name


def test_recipes_that_cannot_share_rows_are_refused() -> None:
    shared = {"parallel": {"context": 2}}
    with pytest.raises(ValidationError, match=r"parallel\.context is set and compile is true"):
        Trainer.model_validate(shared | {"compile": True})
    with pytest.raises(ValidationError, match="this loss compares whole answers"):
        Align.model_validate({"kind": "align", "trainer": shared})
    with pytest.raises(ValidationError, match="reads pictures inside the decoder, which shared rows do not"):
        Tune.model_validate({"kind": "tune", "trainer": shared, "connector": {"kind": "gated-cross-attention"}})
