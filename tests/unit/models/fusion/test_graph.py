"""Graphs: matrix and list of edges agree, nodes may be renumbered, isolated nodes hear themselves."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck

from plait.core.errors import ConfigError, DataError
from plait.models.fusion.graph import (
    Edges,
    GraphAttention,
    GraphConvolution,
    GraphFusion,
    edges_of,
    from_edges,
    full,
    nearest,
)
from plait.models.fusion.streams import Stream

pytestmark = pytest.mark.row("S0-18")

LAYERS = {
    "gcn": lambda: GraphConvolution(4, 6),
    "gat": lambda: GraphAttention(4, 6, heads=2),
    "gat mean": lambda: GraphAttention(4, 6, heads=2, average=True),
}
EVERY = pytest.mark.parametrize("name", LAYERS)


@EVERY
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_list_and_matrix_agree_and_renumbering_renumbers(name: str, data: st.DataObject) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name]().double()
    n = data.draw(st.integers(1, 5))
    bits = data.draw(st.lists(st.booleans(), min_size=2 * n * n, max_size=2 * n * n))
    hears = torch.tensor(bits).view(2, n, n)
    nodes = torch.randn(2, n, 4, dtype=torch.float64)
    found = layer(nodes, hears).nodes
    torch.testing.assert_close(layer(nodes, edges_of(hears)).nodes, found, atol=1e-12, rtol=1e-12)
    order = torch.tensor(data.draw(st.permutations(range(n))))
    moved = layer(nodes[:, order], hears[:, order][:, :, order]).nodes
    torch.testing.assert_close(moved, found[:, order], atol=1e-12, rtol=1e-12)


@EVERY
def test_a_node_without_neighbors_hears_itself(name: str) -> None:
    layer = LAYERS[name]()
    nodes = torch.randn(1, 3, 4)
    lonely = torch.zeros(1, 3, 3, dtype=torch.bool)
    own = layer.linear(nodes)
    own = own.unflatten(-1, (2, -1)).mean(-2) if name == "gat mean" else own
    torch.testing.assert_close(layer(nodes, lonely).nodes, own + layer.bias)
    assert torch.equal(
        layer(nodes, torch.eye(3, dtype=torch.bool)[None]).nodes, layer(nodes, lonely).nodes
    )  # once only
    nothing = torch.zeros(0, dtype=torch.long)
    torch.testing.assert_close(layer(nodes, Edges(to=nothing, source=nothing)).nodes, own + layer.bias)


@EVERY
@pytest.mark.parametrize("sparse", [False, True])
def test_gradients(name: str, *, sparse: bool) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name]().double()
    hears = torch.rand(2, 3, 3) < 0.5
    graph = edges_of(hears) if sparse else hears
    assert gradcheck(lambda x: layer(x, graph).nodes, torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True))


@EVERY
def test_deep_in_one_layer_only_neighbors_are_heard(name: str) -> None:
    layer = LAYERS[name]()
    path = from_edges([torch.tensor([[0, 1], [1, 2]])], torch.ones(1, 3, dtype=torch.bool))
    nodes = torch.randn(1, 3, 4, requires_grad=True)
    layer(nodes, path).nodes[0, 0].square().sum().backward()
    assert nodes.grad is not None
    assert (nodes.grad[0] != 0).any(-1).tolist() == [True, True, False]


def test_builders() -> None:
    there = torch.tensor([[True, True, True, False]])
    nodes = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [1.0, 0.0]]])
    assert full(nodes, there).int().tolist() == [[[0, 1, 1, 0], [1, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]]]
    # Of each its nearest: 0-1, 1-0, 2-1; heard both ways.
    assert nearest(nodes, there, k=1).int().tolist() == [[[0, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]]
    assert torch.equal(nearest(nodes, there, k=99), full(nodes, there))
    one_way = from_edges([torch.tensor([[0, 1], [0, 3]])], there, both_ways=False)
    assert one_way.nonzero().tolist() == [[0, 0, 1]]  # node 3 is not there
    with pytest.raises(DataError, match="names node 4 or 0, the nodes are 0 to 3"):
        from_edges([torch.tensor([[0, 4]])], there)
    with pytest.raises(DataError, match="2 lists of edges for 1 samples"):
        from_edges([torch.zeros(0, 2).long()] * 2, there)


def test_the_graph_that_is_given_is_the_one_used() -> None:
    projections = {"image": nn.Linear(3, 4), "text": nn.Linear(2, 4)}
    fuse = GraphFusion(projections, [GraphAttention(4, 6, heads=2), GraphConvolution(6, 5)])
    image = torch.randn(1, 2, 3, requires_grad=True)
    both = {"image": Stream(tokens=image), "text": Stream(tokens=torch.randn(1, 3, 2))}
    known = from_edges([torch.tensor([[2, 0]])], torch.ones(1, 5, dtype=torch.bool))  # first word and first region
    found = fuse(both, graph=known, need_weights=True)
    assert found.weights["layer 0"].shape == (1, 2, 5, 5)
    assert found.weights["layer 1"][0, 0].ne(0).sum() == 5 + 2
    found.values[0, 2].square().sum().backward()
    assert image.grad is not None
    assert (image.grad[0] != 0).any(-1).tolist() == [True, False]
    fuse.sparse = True
    torch.testing.assert_close(fuse(both, graph=known).values, found.values)
    with pytest.raises(ConfigError, match="2 graph layers; one gives width 6, the next takes 4"):
        GraphFusion(projections, [GraphAttention(4, 6), GraphConvolution(4, 5)])


def test_regions_of_the_true_graph_answer_where_a_wrong_graph_cannot() -> None:
    """The value of the one region that the word is joined to; a graph of other edges cannot tell which that is."""

    def loss(*, right: bool) -> float:
        torch.manual_seed(0)
        layer, head = GraphConvolution(2, 8), nn.Linear(8, 1)
        best = torch.optim.Adam([*layer.parameters(), *head.parameters()], lr=5e-2)
        value = torch.tensor(0.0)
        for _ in range(60):
            regions, chosen = torch.randn(64, 4), torch.randint(4, (64,))
            nodes = torch.zeros(64, 5, 2)
            nodes[:, 1:, 0], nodes[:, 0, 1] = regions, 1.0
            used = chosen if right else torch.randint(4, (64,))
            graph = torch.zeros(64, 5, 5, dtype=torch.bool)
            graph[torch.arange(64), 0, used + 1] = True
            asked: Tensor = head(layer(nodes, graph).nodes[:, 0])[:, 0]
            value = (asked - regions.gather(1, chosen[:, None])[:, 0]).square().mean()
            best.zero_grad()
            value.backward()
            best.step()
        return value.item()

    assert loss(right=True) < 0.05
    assert loss(right=False) > 0.5
