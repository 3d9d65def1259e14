"""Weights renamed both ways."""

import pytest
import torch

from plait.core.errors import CheckpointError
from plait.models.hub.rename import Rule, to_ours, to_theirs

RULES = (
    Rule(ours="blocks.*.attention.qkv", theirs=("layer.*.q", "layer.*.k", "layer.*.v"), shares=(2, 1, 1)),
    Rule(ours="blocks.*.up", theirs=("layer.*.fc",), transposed=True),
    Rule(ours="class_token", theirs=("cls",)),
)


def theirs() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    found = {"cls": torch.randn(1, 4)}
    for i in (0, 11):
        for name, rows in (("q", 8), ("k", 4), ("v", 4)):
            found |= {f"layer.{i}.{name}.weight": torch.randn(rows, 4), f"layer.{i}.{name}.bias": torch.randn(rows)}
        found |= {f"layer.{i}.fc.weight": torch.randn(4, 6), f"layer.{i}.fc.bias": torch.randn(6)}
    return found


def test_there_and_back() -> None:
    state = theirs()
    ours = to_ours({**state, "layer.0.position_ids": torch.zeros(1)}, RULES, ignored=("layer.*.position_ids",))
    wanted = torch.cat([state[f"layer.11.{n}.weight"] for n in "qkv"])
    assert torch.equal(ours["blocks.11.attention.qkv.weight"], wanted)
    assert torch.equal(ours["blocks.0.up.weight"], state["layer.0.fc.weight"].T)
    back = to_theirs(ours, RULES)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_unknown_names_and_missing_parts_are_listed() -> None:
    state = theirs()
    del state["layer.0.k.weight"]
    with pytest.raises(CheckpointError, match=r"1 names .*\(head\.weight\); 1 matrices .*\(blocks\.0\.attention\.qkv"):
        to_ours({**state, "head.weight": torch.zeros(1)}, RULES)
    with pytest.raises(CheckpointError, match=r"1 of our weights .*\(head\.weight\)"):
        to_theirs({"head.weight": torch.zeros(1)}, RULES)
