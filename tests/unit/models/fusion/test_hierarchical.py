"""Levels: scores against plain loops, known phrases and objects, a score that finds the relation at its own level."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cosine_similarity

from plait.core.errors import ConfigError
from plait.models.fusion.hierarchical import HierarchicalFusion, Level, Pair, Windows, all_pairs, grouped, own_pairs
from plait.models.fusion.streams import Stream

pytestmark = pytest.mark.row("S3-14")


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_scores_are_the_mean_of_best_matches(data: st.DataObject) -> None:
    n, r = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 4))
    bits = lambda count: st.lists(st.booleans(), min_size=2 * count, max_size=2 * count)  # noqa: E731
    torch.manual_seed(data.draw(st.integers(0, 20)))
    first = Stream(tokens=torch.randn(2, n, 3), real=torch.tensor(data.draw(bits(n)), dtype=torch.bool).view(2, n))
    second = Stream(tokens=torch.randn(2, r, 3), real=torch.tensor(data.draw(bits(r)), dtype=torch.bool).view(2, r))
    found = all_pairs(Pair(first, second))
    for b in range(2):
        for c in range(2):
            words, regions = first.tokens[b][first.there[b]], second.tokens[c][second.there[c]]
            if not len(words) or not len(regions):
                assert found[b, c] == float("-inf")
                continue
            cosine = cosine_similarity(words[:, None], regions[None], dim=-1)
            wanted = (cosine.amax(1).mean() + cosine.amax(0).mean()) / 2
            torch.testing.assert_close(found[b, c], wanted)
    torch.testing.assert_close(own_pairs(Pair(first, second)), found.diag())


def test_windows_are_means_of_neighbors_that_count() -> None:
    words = Stream(tokens=torch.tensor([[[1.0], [2.0], [6.0], [9.0]]]), real=torch.tensor([[True, True, True, False]]))
    assert Windows(3)(words).tokens.flatten().tolist() == [1.5, 3.0, 4.0, 0.0]
    with pytest.raises(ConfigError, match="a window of 2 tokens has no middle"):
        Windows(2)


def test_known_phrases_and_objects_take_the_place_of_windows() -> None:
    fuse = HierarchicalFusion({"text": nn.Linear(4, 8), "image": nn.Linear(3, 8)}, d=8, d_out=5, heads=2)
    both = {"text": Stream(tokens=torch.randn(2, 5, 4)), "image": Stream(tokens=torch.randn(2, 6, 3))}
    pairs = fuse.pairs(both)
    words, regions = pairs["word"]
    phrases = grouped(words, torch.tensor([[0, 0, 1, 1, -1], [0, 0, 0, 0, 0]]))
    assert phrases.there.tolist() == [[True, True], [True, False]]
    torch.testing.assert_close(phrases.tokens[0, 1], words.tokens[0, 2:4].mean(0))
    known = {**pairs, "phrase": Pair(phrases, grouped(regions, torch.zeros(2, 6, dtype=torch.long)))}
    found = fuse.fuse(known, need_weights=True)
    assert found.values.shape == (2, 5)
    assert found.weights["phrase first"].shape == (2, 2, 2, 1)
    assert found.weights["word second"].shape == (2, 2, 6, 5)
    assert found.weights["sentence score"].shape == (2,)
    assert not torch.equal(found.values, fuse(both).values)


def test_every_level_has_a_gradient_of_its_own() -> None:
    fuse = HierarchicalFusion({"text": nn.Linear(4, 8), "image": nn.Linear(3, 8)}, d=8, d_out=5)
    both = {"text": Stream(tokens=torch.randn(3, 5, 4)), "image": Stream(tokens=torch.randn(3, 6, 3))}
    scores = fuse.scores(fuse.pairs(both))
    assert list(scores) == ["word", "phrase", "sentence"]
    for score in scores.values():
        fuse.zero_grad()
        nn.functional.cross_entropy(score / 0.1, torch.arange(3)).backward(retain_graph=True)
        assert all(p.grad is not None and bool((p.grad != 0).any()) for p in fuse.projections.parameters())
    level = Level(nn.Identity(), nn.Identity(), d=4, heads=1)
    with pytest.raises(ConfigError, match="word has width 4"):
        HierarchicalFusion({"text": nn.Linear(4, 8), "image": nn.Linear(3, 8)}, d=8, d_out=5, levels={"word": level})


def test_words_find_a_region_that_the_whole_picture_hides() -> None:
    """Pictures differ in one region of many: words rank the right one first more often than wholes do."""
    torch.manual_seed(0)
    things = nn.functional.normalize(torch.randn(40, 16), dim=-1)
    clutter = nn.functional.normalize(torch.randn(40, 15, 16), dim=-1)
    image = Stream(tokens=torch.cat([things[:, None], clutter], dim=1))
    text = Stream(tokens=(things + 0.05 * torch.randn(40, 16))[:, None])
    fuse = HierarchicalFusion({"text": nn.Identity(), "image": nn.Identity()}, d=16, d_out=4)
    scores = fuse.scores(fuse.pairs({"text": text, "image": image}))
    right = {name: (score.argmax(1) == torch.arange(40)).float().mean().item() for name, score in scores.items()}
    assert right["word"] > 0.8
    assert right["sentence"] < 0.4
