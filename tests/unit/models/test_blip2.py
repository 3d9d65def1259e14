"""BLIP-2's first stage learns to find, judge and name; what does not fit is refused."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from plait.core.errors import ConfigError, DataError
from plait.core.tensors import IGNORE, Batch, Patches
from plait.models.blip2 import Blip2Stage1
from plait.models.connectors.query import QFormer, QFormerSizes
from plait.models.dual import MAX_SCALE
from plait.models.multimodal import MultimodalLM
from plait.models.towers.pixels import RawPixels
from plait.objectives.language import NextToken
from plait.objectives.matching import QueryTasks

CLS, END, START = 0, 1, 2
NAMES = [[3, 4], [3, 5], [6], [7, 4, 6]]
"""Token ids of four things' names, of one to three tokens."""


def small(**more: int) -> Blip2Stage1:
    torch.manual_seed(0)
    sizes = QFormerSizes(d_source=6, d=32, depth=2, heads=2, queries=3, vocabulary=9, max_tokens=8, dropout=0.0)
    return Blip2Stage1(nn.Identity(), QFormer(replace(sizes, **more)), start=START, d_shared=8)


def batch(things: list[int], *, seed: int, noise: float = 0.15) -> Batch:
    """Features of pictures, one to four tokens each: the thing's own direction and noise; its name as text."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [1 + (seed + i) % 4 for i in range(len(things))]
    values = torch.cat([torch.eye(6)[thing].expand(n, 6) for thing, n in zip(things, lengths, strict=True)])
    values = values + noise * torch.randn(values.shape, generator=generator)
    ids, labels = torch.zeros(len(things), 5, dtype=torch.long), torch.full((len(things), 5), IGNORE)
    segments = torch.zeros_like(ids)
    for row, thing in enumerate(things):
        text = torch.tensor([CLS, *NAMES[thing], END])
        ids[row, : len(text)], segments[row, : len(text)] = text, 1
        labels[row, 1 : len(text)] = text[1:]
    grid = torch.tensor([[1, 1, n] for n in lengths])
    return Batch(token_ids=ids, labels=labels, segment_ids=segments, media={"image": Patches(values=values, grid=grid)},
                 item_row={"image": torch.arange(len(things))}, encoded=True,
                 sample_ids=tuple(f"{seed}-{i}" for i in range(len(things))))  # fmt: skip


def loss(model: nn.Module, given: Batch) -> dict[str, Tensor]:
    objective = QueryTasks()
    return {name: x / objective.count(given)[name] for name, x in objective(model, given).items()}


@pytest.mark.row("S2-09")
def test_the_three_losses_fall_and_new_pictures_are_found_judged_and_named():
    model = small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    things = [0, 1, 2, 3, 0]  # one name comes twice: the two are no negatives of each other
    first = loss(model, batch(things, seed=0))
    for step in range(130):
        optimizer.zero_grad()
        sum(loss(model, batch(things, seed=step)).values(), torch.zeros(())).backward()
        optimizer.step()
    model.eval()
    new = batch([0, 1, 2, 3] * 5, seed=999)
    ids, present = new.token_ids, new.segment_ids != 0
    with torch.no_grad():
        last, source = loss(model, batch(things, seed=999)), model.look(new)
        near = model.contrast.similarity(model.embed_image(source), model.embed_text(ids[:4], present[:4]))
        judged = [model.judge(source, ids.roll(by, 0), present.roll(by, 0)).argmax(1) for by in range(4)]
    # Two pictures have the same name: the least that contrast can cost is 2/5 ln 2.
    least = {"contrast": 0.4 * math.log(2), "match": 0.0, "generate": 0.0}
    assert all(last[name] - low < 0.5 * (first[name] - low) for name, low in least.items()), (first, last)
    found = (near.argmax(1) == torch.arange(20) % 4).sum()
    named = sum(name == NAMES[i % 4] for i, name in enumerate(model.caption(source, end=END, max_tokens=5)))
    assert found >= 15  # measured: 20 of 20, by chance 5; judged 18, none wrongly; named 20
    assert judged[0].sum() >= 15
    assert torch.stack(judged[1:]).float().mean() < 0.25
    assert named >= 15


def test_negatives_are_a_function_of_seed_and_samples():
    model, given = small().eval(), batch([0, 1, 2, 3], seed=0)
    seen: list[tuple[int, ...]] = []

    class Spy(nn.Module):
        def forward(self, batch: Batch, *, choose):
            out = model(batch, choose=choose)
            pairs = choose(torch.zeros(4, 4))  # continues the draw
            seen.append(tuple(torch.cat(pairs).tolist()))
            return out

    terms = [QueryTasks(seed=seed)(Spy(), given) for seed in (0, 0, 1)]
    assert seen[0] == seen[1] != seen[2]
    assert torch.equal(terms[0]["match"], terms[1]["match"])
    other = replace(given, sample_ids=("w", "x", "y", "z"))
    QueryTasks(seed=0)(Spy(), other)
    assert seen[3] != seen[0]
    assert {name: int(n) for name, n in QueryTasks().count(given).items()} == {
        "contrast": 4,
        "match": 12,
        "generate": 12,
    }


@pytest.mark.row("S2-09")
def test_second_stage_learns_with_the_same_qformer_and_leaves_the_frozen_as_they_were():
    torch.manual_seed(0)
    sizes = QFormerSizes(d_source=6, d=32, depth=2, heads=2, queries=3, vocabulary=9, max_tokens=8, dropout=0.0)
    qformer = QFormer(sizes, d_out=16)  # the way into the decoder, which the first stage passes by
    first = Blip2Stage1(nn.Identity(), qformer, start=START, d_shared=8)
    sum(loss(first, batch([0, 1, 2], seed=0)).values(), torch.zeros(())).backward()
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    decoder = LlamaForCausalLM(LlamaConfig(vocab_size=9, **shape)).requires_grad_(False)
    for weight in decoder.parameters():
        weight.copy_(torch.randn_like(weight) * 0.5 if weight.ndim > 1 else weight)  # a fresh one says nothing at all
    tower = nn.Linear(6, 6).requires_grad_(False)
    model = MultimodalLM({"image": tower}, {"image": qformer}, decoder, placeholder=9)
    before = {name: p.clone() for part in (decoder, tower) for name, p in part.state_dict().items()}

    def seen(seed: int) -> Batch:
        """Each text with its picture's tokens in front."""
        given = batch([0, 1, 2, 3], seed=seed)
        front = torch.full((4, 3), 9)
        ids = torch.cat([front, given.token_ids], dim=1)
        labels = torch.cat([torch.full_like(front, IGNORE), given.labels], dim=1)
        segments = torch.cat([torch.ones_like(front), given.segment_ids], dim=1)
        return replace(given, token_ids=ids, labels=labels, segment_ids=segments)

    objective = NextToken()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    costs: list[float] = []
    for step in range(60):
        given = seen(step)
        cost = objective(model, given)["next_token"] / objective.count(given)["next_token"]
        optimizer.zero_grad()
        cost.backward()
        optimizer.step()
        costs.append(cost.item())
    assert sum(costs[-5:]) < 0.5 * sum(costs[:5])  # measured: 3.66 at first, 0.69 at last
    after = {name: p for part in (decoder, tower) for name, p in part.state_dict().items()}
    assert all(torch.equal(before[name], value) for name, value in after.items())


def test_scale_is_limited():
    model = small()
    model.log_scale.data.fill_(9.0)
    assert model.scale.item() == pytest.approx(MAX_SCALE)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="begun with token 2, the Q-Former has 0"):
        small(vocabulary=0)
    with pytest.raises(ConfigError, match="tokens of width 3, the Q-Former takes 6"):
        Blip2Stage1(RawPixels(), QFormer(QFormerSizes(d_source=6, d=8, depth=1, heads=1, vocabulary=9)), start=2)
    model, given = small(), batch([0, 1], seed=0)
    media = given.media["image"]
    fewer = Patches(values=media.values[: int(media.grid[0].prod())], grid=media.grid[:1])
    for wrong, cause in (
        (replace(given, media={}), "0 pictures came for 2 texts"),
        (replace(given, media={"image": fewer}), "1 pictures came for 2 texts"),
        (replace(given, item_row={"image": torch.tensor([1, 0])}), r"of rows \[1, 0\]"),
        (replace(given, segment_ids=given.segment_ids * torch.tensor([[1], [0]])), "row 1 has no text"),
        (replace(given, segment_ids=torch.tensor([[1, 1, 2, 2, 2]] * 2)), "row 0 has .* several texts"),
    ):
        with pytest.raises(DataError, match=cause):
            model(wrong)
    with pytest.raises(DataError, match="have no negatives"):
        QueryTasks()(model, batch([3, 3], seed=0))


def test_pictures_of_one_class_are_neither_pushed_apart_nor_judged_as_wrong():
    model, given = small(), batch([0, 1, 2], seed=0)
    ids = given.sample_ids
    alone, same = QueryTasks(), QueryTasks(classes={ids[0]: 4, ids[1]: 4})
    assert same(model, given)["contrast"] != alone(model, given)["contrast"]
    with pytest.raises(DataError, match="have no negatives"):
        QueryTasks(classes=dict.fromkeys(ids, 4))(model, given)
    unknown = QueryTasks(classes={"another": 4})
    assert all(torch.equal(a, b) for a, b in zip(
        unknown(model, given).values(), alone(model, given).values(), strict=True))  # fmt: skip


def test_scores_of_words_are_those_of_writing_all_of_them():
    model, given = small().eval(), batch([0, 1, 2, 3], seed=1)
    present = given.segment_ids != 0
    whole = model.write(model.look(given), given.token_ids, present)
    trained = given.labels[:, 1:] != IGNORE
    torch.testing.assert_close(model(given).logits, whole[:, :-1][trained])
