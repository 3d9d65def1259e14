"""Norms of parts, and what a step works on, in several processes: those of one, in one message."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.rank_script import cases_of


@pytest.mark.row("S4-60")
def test_norms_of_parts_are_those_of_one_process_in_every_layout(tmp_path: Path) -> None:
    found = cases_of(Path(__file__).with_name("norm_ranks.py"), str(tmp_path))
    log = found.pop("log")
    assert len(found) == 6
    for name, (one, *several) in found.items():
        assert isinstance(one, dict), log
        assert {"grad_norm", "grad_norm/connectors", "grad_norm/decoder"} == set(one["norms"][0]), name
        for each in several:
            assert isinstance(each, dict), (name, each, log)
            assert each["units"] == pytest.approx(one["units"]), name
            for here, there in zip(each["norms"], one["norms"], strict=True):
                assert here == pytest.approx(there, rel=1e-6), name
            assert each["norms"] == several[0]["norms"], name
            assert each["messages"] == (name != "DDP"), name  # all have the whole gradient there
