"""Advice: limits exclude with a number, rules order, timings are kept, and every claim has a source."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from plait.assembly.towers import load_image_tower
from plait.core.device import Compute
from plait.core.errors import ConfigError
from plait.models import specs
from plait.models.advise import (
    ENOUGH,
    IMAGENET,
    MIB,
    Candidate,
    Clock,
    Judged,
    Need,
    Task,
    Timing,
    judge,
    pretrained_candidate,
    ranked,
    rules,
    scratch_candidates,
)
from plait.models.build import build_encoder
from plait.models.measure import account

SMALL = Need(size=32)


@pytest.fixture
def clock(tmp_path: Path) -> Clock:
    compute = Compute(device="cpu", dtype="float32", threads=torch.get_num_threads(), why=())
    return Clock(compute=compute, cache=tmp_path / "advise", seconds=5.0)


def tiny(name: str, spec: specs.Part, **more: Any) -> Candidate:
    settings = spec.model_dump(mode="json")
    return Candidate(name=name, settings=settings, build=lambda: build_encoder(spec), family="attention", **more)


def candidates() -> list[Candidate]:
    return [
        tiny("small", specs.ViT(size=32, patch=8, d=16, depth=1, heads=2), top1=70.0, source="a"),
        tiny("large", specs.ViT(size=32, patch=4, d=64, depth=4, heads=2), top1=80.0, source="b"),
        tiny("maps", specs.ResNet(size=32, depth=18, width=8), top1=60.0, source="c"),
    ]


# --- what it costs ---------------------------------------------------------------------------------------------------


@pytest.mark.row("S0-06")
def test_costs_are_counted_and_measured(clock: Clock) -> None:
    found = judge(candidates(), SMALL, clock)
    assert [one.candidate.name for one in found] == ["large", "small", "maps"]
    for one in found:
        assert one.status == "fits"
        assert one.account == account(one.candidate.build, 32)
        assert one.timing is not None
        assert 0 < one.timing.least <= one.timing.median <= one.timing.most
        assert not one.timing.cached
        assert one.memory_bytes > 4 * one.account.parameters
    assert [one.scales for one in found] == [1, 1, 4]


def test_training_needs_more_memory(clock: Clock) -> None:
    need = Need(size=32, train_pictures=1000, batch=4)
    found = {one.candidate.name: one for one in judge(candidates()[:1], need, clock)}["small"]
    assert found.account is not None
    assert found.memory_bytes == 16 * found.account.parameters + 4 * found.account.kept_bytes


@pytest.mark.row("S0-06")
def test_what_is_over_a_limit_is_listed_with_its_number(clock: Clock) -> None:
    free = {one.candidate.name: one for one in judge(candidates(), SMALL, clock)}
    limit = free["large"].memory_bytes / MIB - 0.001
    found = judge(candidates(), Need(size=32, memory_mib=limit), clock)
    assert [one.status for one in found] == ["fits", "fits", "over"]
    assert "MiB, the limit is" in found[-1].why
    found = judge(candidates(), Need(size=32, latency_ms=1e-6), clock)
    assert {one.status for one in found} == {"over"}
    assert all("ms a picture, the limit is" in one.why for one in found)


def test_what_cannot_be_built_is_listed_with_its_cause(clock: Clock) -> None:
    def broken() -> nn.Module:
        raise ConfigError("heads do not divide the width")

    wrong = Candidate(name="wrong", settings={}, build=broken, family="attention")
    found = judge([wrong, *candidates()[:1]], SMALL, clock)
    assert found[-1].status == "refused"
    assert found[-1].why == "cannot be at 32 pixels: heads do not divide the width"
    assert len(found) == 2


def test_without_time_a_limit_on_time_cannot_be_checked(clock: Clock) -> None:
    hasty = Clock(compute=clock.compute, cache=clock.cache, seconds=0.0)
    found = judge(candidates(), Need(size=32, latency_ms=1e6), hasty)
    assert [one.status for one in found] == ["fits", "unmeasured", "unmeasured"]
    assert found[0].candidate.name == "small"  # the fewest operations are timed first
    assert "--seconds" in found[1].why
    assert found[0].timing is not None
    assert found[0].timing.rounds < ENOUGH
    assert list(hasty.cache.iterdir()) == []  # a figure of one round is not kept


def test_figures_are_kept_until_asked_again(clock: Clock) -> None:
    first = judge(candidates()[:1], SMALL, clock)
    kept = judge(candidates()[:1], SMALL, clock)
    assert [one.timing.median for one in kept if one.timing] == [one.timing.median for one in first if one.timing]
    assert all(one.timing and one.timing.cached for one in kept)
    again = Clock(compute=clock.compute, cache=clock.cache, seconds=5.0, again=True)
    assert all(one.timing and not one.timing.cached for one in judge(candidates()[:1], SMALL, again))
    other = judge(candidates()[:1], Need(size=32, batch=2), clock)  # another batch is other work
    assert all(one.timing and not one.timing.cached for one in other)
    for path in clock.cache.iterdir():
        path.write_text("{")
    assert all(one.timing and not one.timing.cached for one in judge(candidates()[:1], SMALL, clock))


def test_figures_of_one_moment_are_compared(clock: Clock) -> None:
    judge(candidates()[:1], SMALL, clock)
    found = judge(candidates()[:2], SMALL, clock)
    assert [one.timing.cached for one in found if one.timing] == [False, False]
    hasty = Clock(compute=clock.compute, cache=clock.cache, seconds=0.0)
    found = {one.candidate.name: one.timing for one in judge(candidates(), SMALL, hasty)}
    assert found["small"] is not None
    assert found["large"] is not None
    assert (found["small"].cached, found["large"].cached, found["maps"]) == (False, True, None)


def test_the_callers_draws_are_left_alone(clock: Clock) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    judge(candidates()[:1], SMALL, clock)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_pretrained_folder_is_a_candidate(tiny_folders: dict[str, Path], clock: Clock) -> None:
    tower = load_image_tower(str(tiny_folders["image"]), size=32, dtype="float32")
    assert isinstance(tower.encoder, nn.Module)
    candidate = pretrained_candidate("mine", tower.encoder, settings={"tower": tower.key})
    weights = {name: p.clone() for name, p in tower.encoder.state_dict().items()}
    (found,) = judge([candidate], SMALL, clock)
    assert found.candidate.pretrained
    assert found.account is not None
    assert (found.account.trainable, found.status) == (0, "fits")
    assert all(torch.equal(p, weights[name]) for name, p in tower.encoder.state_dict().items())


# --- the order -------------------------------------------------------------------------------------------------------


def given(name: str, *, ms: float = 1.0, scales: int = 1, **more: Any) -> Judged:
    timing = Timing(median=ms, least=ms, most=ms, rounds=1, date="2026-11-22")
    made: dict[str, Any] = {"settings": {}, "build": nn.Identity, "family": "attention", "top1": 80.0, **more}
    return Judged(candidate=Candidate(name=name, **made), scales=scales, timing=timing)


FOUND = [
    given("plain", ms=1.0),
    given("maps", ms=3.0, scales=4, family="convolutions", top1=71.0),
    given("mixed", ms=2.0, family="both", top1=80.4),
    given("clip", ms=9.0, pretrained=True, with_text=True, top1=0.0),
]


@pytest.mark.row("S0-06")
@pytest.mark.parametrize(
    ("task", "pictures", "order"),
    [
        ("classify", None, ["plain", "mixed", "maps", "clip"]),  # equal in whole points: the faster one
        ("classify", 1000, ["clip", "maps", "mixed", "plain"]),
        ("classify", IMAGENET, ["plain", "mixed", "maps", "clip"]),
        ("dense", None, ["maps", "plain", "mixed", "clip"]),
        ("retrieve", None, ["clip", "plain", "mixed", "maps"]),
        ("generate", None, ["clip", "plain", "mixed", "maps"]),
    ],
)
def test_rules_order(task: Task, pictures: int | None, order: list[str]) -> None:
    found = ranked(FOUND, Need(task=task, train_pictures=pictures))
    assert [one.candidate.name for one in found] == order


def test_only_rules_that_apply_are_named_and_all_have_evidence() -> None:
    assert len(rules(Need())) == 2
    assert len(rules(Need(task="dense", train_pictures=10))) == 4
    for task in ("dense", "generate"):
        for rule in rules(Need(task=task, train_pictures=10)):
            assert rule.says
            assert rule.evidence
            assert rule.source.startswith(("https://arxiv.org/", "the column", "measured on this machine"))


def test_candidates_of_the_literature() -> None:
    found = {candidate.name: candidate for candidate in scratch_candidates(64)}
    assert len(found) == 9
    for candidate in found.values():
        assert candidate.source.startswith("https://")
        assert candidate.settings["size"] == 64
        json.dumps(dict(candidate.settings))
    counts = {"resnet-50": 23_508_032, "vit-b/16": 86_567_656 - 769_000 - 196 * 768 + 16 * 768, "swin-t": 27_519_354}
    for name, count in counts.items():
        with torch.device("meta"):
            assert sum(p.numel() for p in found[name].build().parameters()) == count
