"""Capacity, balance by document and padding of a mixture of experts, against going through tokens one by one."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plait.core.errors import ConfigError
from plait.models.moe import Choices, MixtureOfExperts, Routed, with_room
from plait.models.transformer import FeedForward, TransformerSizes

SIZES = TransformerSizes(d=8, depth=1, heads=2, d_ff=12, activation="silu", gated=True, bias=False)


def one_by_one(chosen: list[list[int]], document: list[int], *, experts: int, capacity: float) -> list[list[bool]]:
    """GShard's algorithm 1 in words: all first choices in the order of tokens, then all second ones."""
    taken: dict[tuple[int, int], int] = {}
    kept = [[False] * len(row) for row in chosen]
    for choice in range(len(chosen[0])):
        for token, row in enumerate(chosen):
            if document[token] < 0:
                continue
            share = round(capacity * 100) * len(row) * document.count(document[token]) / (experts * 100)
            place = (document[token], row[choice])
            kept[token][choice] = taken.get(place, 0) < math.ceil(share)
            taken[place] = taken.get(place, 0) + 1
    return kept


@given(
    documents=st.lists(st.integers(-1, 3), min_size=1, max_size=24),
    top_k=st.integers(1, 3),
    experts=st.integers(3, 6),
    capacity=st.sampled_from([0.25, 0.5, 1.0, 1.1, 1.25, 2.0]),
    seed=st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_room_is_given_as_one_by_one(
    documents: list[int], top_k: int, experts: int, capacity: float, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    chosen = torch.rand(len(documents), experts, generator=draw).topk(top_k).indices
    document = torch.tensor(documents)
    lengths = torch.bincount(document[document >= 0], minlength=4)
    kept = with_room(chosen, document, lengths=lengths, experts=experts, capacity=capacity)
    assert kept.tolist() == one_by_one(chosen.tolist(), documents, experts=experts, capacity=capacity)


@pytest.mark.row("S4-68")
def test_what_is_beyond_the_capacity_passes_by_and_is_counted_however_rows_are_split() -> None:
    torch.manual_seed(0)
    layer = MixtureOfExperts(SIZES, experts=4, top_k=2, capacity=0.75).double()
    documents = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1, 1, 1], [1, 2, 2, 3, 3, 3, 0, 0]])
    x = torch.randn(3, 8, 8, dtype=torch.float64, requires_grad=True)
    whole: list[Routed] = []
    found = layer(x, documents=documents, routed=whole)
    assert 0 < whole[0].dropped < whole[0].chosen.sum() == 2 * whole[0].tokens
    parts: list[Routed] = []
    each = [layer(x[[row]], documents=documents[[row]], routed=parts) for row in range(3)]
    torch.testing.assert_close(torch.cat(each), found)
    for a, b in zip(parts[0] + parts[1] + parts[2], whole[0], strict=True):
        torch.testing.assert_close(a, b)
    assert not found[documents == 0].any()
    roomy = MixtureOfExperts(SIZES, experts=4, top_k=2, capacity=2.0).double()
    roomy.load_state_dict(layer.state_dict())
    none: list[Routed] = []
    torch.testing.assert_close(roomy(x, documents=documents, routed=none), layer.eval()(x, documents=documents))
    assert none[0].dropped == 0


def test_weights_of_what_has_room_are_those_without_a_capacity() -> None:
    torch.manual_seed(0)
    layer = MixtureOfExperts(SIZES, experts=3, top_k=2, capacity=0.5).double()
    layer.choices = []
    x = torch.randn(1, 9, 8, dtype=torch.float64)
    found = layer(x)
    (choices,) = layer.choices
    wanted = torch.zeros_like(x)
    for token in range(9):
        picked = choices.probability[token, choices.chosen[token]]
        for k, expert in enumerate(choices.chosen[token].tolist()):
            if choices.kept[token, k]:
                wanted[0, token] += picked[k] / picked.sum() * of_expert(layer, expert, x[0, token])
    assert choices.dropped > 0
    torch.testing.assert_close(found, wanted)


def of_expert(layer: MixtureOfExperts, expert: int, x: Tensor) -> Tensor:
    up, down = layer.experts.get_parameter("gate_up_proj")[expert], layer.experts.get_parameter("down_proj")[expert]
    gate, inner = (up @ x).chunk(2)
    return down @ (torch.nn.functional.silu(gate) * inner)


@pytest.mark.parametrize("gated", [True, False])
def test_an_expert_with_biases_is_a_feed_forward_network(*, gated: bool) -> None:
    torch.manual_seed(0)
    sizes = replace(SIZES, gated=gated, bias=True, d_ff=0)
    layer = MixtureOfExperts(sizes, experts=1, top_k=1)
    plain = FeedForward(8, 32, activation="silu", gated=gated)
    weights = {name.removeprefix("experts."): weight[0] for name, weight in layer.state_dict().items()}
    up = "gate_up_proj" if gated else "up_proj"
    plain.load_state_dict(
        {
            "up.weight": weights[up],
            "up.bias": weights[f"{up}_bias"],
            "down.weight": weights["down_proj"],
            "down.bias": weights["down_proj_bias"],
        }
    )
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(layer(x), plain(x))


def test_balance_by_document_is_the_sum_over_documents_and_even_choices_give_top_k() -> None:
    torch.manual_seed(0)
    layer = MixtureOfExperts(SIZES, experts=4, top_k=2)
    documents = torch.tensor([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]])
    layer.choices = []
    layer(torch.randn(2, 6, 8), documents=documents)
    (choices,) = layer.choices
    assert choices.lengths.tolist() == [3, 2, 6]
    wanted = torch.zeros(())
    for number in range(3):
        mine = choices.document == number
        share = torch.tensor([(choices.chosen[mine] == e).sum() / mine.sum() for e in range(4)])
        wanted = wanted + 4 * (share * choices.probability[mine].mean(0)).sum()
    torch.testing.assert_close(choices.balance(), wanted)
    assert torch.autograd.grad(choices.balance(), layer.gate.weight)[0].any()
    even = Choices(
        probability=torch.full((4, 4), 0.25),
        chosen=torch.tensor([[0, 1], [2, 3], [0, 1], [2, 3]]),
        kept=torch.ones(4, 2, dtype=torch.bool),
        document=torch.zeros(4, dtype=torch.long),
        lengths=torch.tensor([4]),
    )
    assert float(even.balance()) == 2.0


def test_documents_can_be_told_beforehand_and_must_fit_the_tokens() -> None:
    torch.manual_seed(0)
    layer = MixtureOfExperts(SIZES, experts=4, capacity=0.5)
    documents = torch.tensor([[1, 1, 1, 1, 2, 2, 2, 2, 2, 0]])
    x = torch.randn(1, 10, 8)
    wanted = layer(x, documents=documents)
    layer.documents = documents
    torch.testing.assert_close(layer(x), wanted, atol=0, rtol=0)
    with pytest.raises(ValueError, match=r"documents of \[1, 10\] tokens are told, \[1, 3\] came"):
        layer(x[:, :3])
    assert layer.eval()(x[:, :3]).shape == (1, 3, 8)


@pytest.mark.parametrize("capacity", [0.0, -1.0, math.inf])
def test_impossible_capacities_are_refused(capacity: float) -> None:
    with pytest.raises(ConfigError, match="capacity is"):
        MixtureOfExperts(SIZES, experts=4, capacity=capacity)
