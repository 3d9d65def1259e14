"""Experts held by several processes are those of one: values, gradients, tokens, and what is sent."""

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from tests.rank_script import cases_of

from plait.core.errors import ConfigError
from plait.models.moe_parallel import Dispatch


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What the processes say."""
    found = cases_of(Path(__file__).with_name("moe_ranks.py"))
    del found["log"]
    return found


@pytest.mark.row("S4-68")
def test_values_gradients_and_counts_are_those_of_one_process(found: dict[str, Any]) -> None:
    found = {name: said for name, said in found.items() if name != "frozen"}
    for name, said in found.items():
        for one in said:
            assert isinstance(one, dict), (name, one)
            assert one["apart"] <= 1e-14, (name, one)
            assert one["conserved"], name
            assert (one["dropped"] > 0) == name.startswith("capacity"), name
    assert len(found) == 10
    assert found["no token here, 2"][0]["tokens"] == 0
    assert found["nobody's expert, 4"][0]["idle"] > found["no token here, 4"][0]["idle"]


@pytest.mark.row("S4-68")
def test_bytes_sent_are_those_of_the_tokens_whose_expert_is_elsewhere(found: dict[str, Any]) -> None:
    for name, said in found.items():
        assert name == "frozen" or all(one["sent"] == one["formula"] for one in said), name


def test_who_has_nothing_that_learns_before_the_layer_still_goes_backward(found: dict[str, Any]) -> None:
    assert found["frozen"][0] <= 1e-14
    assert found["frozen"][1] == 0.0


def test_experts_that_cannot_be_dealt_out_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_world_size", lambda _: 4)
    with pytest.raises(ConfigError, match="6 experts over 4 processes"):
        Dispatch(dist.ProcessGroup(0, 4), experts=6)
