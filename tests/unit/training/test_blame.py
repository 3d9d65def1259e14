"""A step run again a part at a time names the sample and the module."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch
from benchmarks.exactness import model
from benchmarks.layouts import Pictures, source, tower
from torch import nn

from plait.core.tensors import Batch, Patches
from plait.objectives.contrastive import Contrastive
from plait.objectives.language import NextToken
from plait.training import blame
from plait.training.contrast import join
from plait.training.smaller import samples_of_rows

NOTHING = contextlib.nullcontext


def micro() -> list[Batch]:
    return source(packed=True).step_batches(0)


def counts(batches) -> dict[str, float]:
    totals: dict[str, float] = {}
    for batch in batches:
        for name, count in NextToken().count(batch).items():
            totals[name] = totals.get(name, 0.0) + float(count)
    return totals


@pytest.mark.row("S4-60")
def test_a_module_and_the_samples_that_reach_it_are_named():
    built = model(by_document=True)
    name, layer = next((n, m) for n, m in built.named_modules() if n.endswith("layers.1.mlp.up_proj"))
    batches = micro()
    bad = batches[0].sample_ids[2]
    row, segment = place(batches[0], bad)

    def poison(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        if output.shape[:2] == (1, batches[0].token_ids.shape[1]):
            here = torch.equal(where["ids"], batches[0].token_ids[row : row + 1])
            return output.masked_fill(where["segments"][..., None] == segment, float("nan")) if here else output
        return output

    where: dict[str, torch.Tensor] = {}

    class Spying(NextToken):
        def __call__(self, model, batch):
            where["ids"], where["segments"] = batch.token_ids, batch.segment_ids
            return super().__call__(model, batch)

    with layer.register_forward_hook(poison):
        found = blame.not_finite(built, Spying(), batches, around=NOTHING)
    assert found.module == name
    assert not found.given
    assert bad in found.samples
    assert set(found.samples) <= set(samples_of_rows(batches[0])[row])


def place(batch: Batch, sample: str) -> tuple[int, int]:
    for row, names in enumerate(samples_of_rows(batch)):
        if sample in names:
            return row, names.index(sample) + 1
    raise AssertionError


def test_media_that_are_not_finite_are_said_to_be_given():
    built, batches = model(by_document=True), micro()
    patches = batches[0].media["image"]
    values = patches.values.clone()
    values[0, 0] = float("inf")
    bad = replace(batches[0], media={"image": Patches(values=values, grid=patches.grid)})
    found = blame.not_finite(built, NextToken(), [bad], around=NOTHING)
    assert found.module.startswith("connectors.image")
    assert found.given
    assert "look at the data" in str(found)


def test_a_weight_that_ran_away_is_named_with_the_rate_as_the_reason():
    built = model(by_document=True)
    name, weight = next((n, w) for n, w in built.named_parameters() if w.requires_grad)
    with torch.no_grad():
        weight[0] = float("inf")
    found = blame.not_finite(built, NextToken(), micro(), around=NOTHING)
    assert found.grown == f"{name} has grown to inf"
    assert "lower the learning rate" in str(found)


def test_a_sound_step_blames_nobody_and_changes_nothing():
    built, batches = model(by_document=True), micro()
    before = torch.get_rng_state()
    found = blame.not_finite(built, NextToken(), batches, around=NOTHING)
    assert (found.module, found.samples) == ("", ())
    blame.losses(built, NextToken(), batches, weights={}, counts=counts(batches), around=NOTHING)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(w.grad is None for w in built.parameters())


@pytest.mark.row("S4-60")
def test_losses_of_samples_add_up_to_the_step_and_the_worst_comes_first():
    built, batches = model(by_document=True), micro()
    units = counts(batches)
    with torch.no_grad():
        whole = sum(float(value) / units[name] for b in batches for name, value in NextToken()(built, b).items())
    found = blame.losses(built, NextToken(), batches, weights={}, counts=units, around=NOTHING)
    assert sorted(one for names, _ in found for one in names.split(", ")) == sorted(
        n for b in batches for n in b.sample_ids
    )
    assert "," not in found[0][0]
    assert [value for _, value in found] == sorted((value for _, value in found), reverse=True)
    assert sum(value for _, value in found) == pytest.approx(whole, rel=1e-9)


def test_a_gradient_that_is_not_finite_names_weights_and_sample():
    built, batches = model(by_document=True), micro()
    bad = batches[0].sample_ids[1]
    row = place(batches[0], bad)[0]
    weights = {name: weight for name, weight in built.named_parameters() if weight.requires_grad}
    name, weight = next((n, w) for n, w in weights.items() if "lora_A" in n)

    class Steep(NextToken):
        """Infinitely so in one weight, for one row."""

        def __call__(self, model, batch):
            sums = dict(super().__call__(model, batch))
            if bad in batch.sample_ids:
                term = next(iter(sums))
                sums[term] = sums[term] + torch.sqrt(weight.sum() * 0)  # d sqrt(0) = inf
            return sums

    weight.grad = torch.full_like(weight, float("nan"))
    names, samples = blame.gradients(built, Steep(), batches, weights=weights, around=NOTHING)
    assert names == [name]
    assert tuple(samples) == samples_of_rows(batches[0])[row]


def test_rows_of_a_pairwise_loss_add_up_to_it():
    built, batches = tower().double(), Pictures(pieces=2).step_batches(0)
    objective = Contrastive()
    whole = join([objective.embed(built, batch) for batch in batches])
    total = float(objective.loss(whole)["contrastive"].detach()) / whole.rows
    found = blame.losses(
        built, objective, batches, weights={}, counts={"contrastive": float(whole.rows)}, around=NOTHING
    )
    assert sum(value for _, value in found) == pytest.approx(total, rel=1e-9)
    assert len(found) == whole.rows
