"""The study of attention: truths of its scenes, equal budgets, what maps measure, and the command."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from plait.cli.main import main
from plait.core.errors import ConfigError
from plait.core.events import Event, Events
from plait.core.files import read_json
from plait.models.fusion.streams import Fused, Inputs, Stream
from plait.studies.attending.findings import findings
from plait.studies.attending.maps import chosen, fall, gradient_map, look, pointing
from plait.studies.attending.scenes import KINDS, LENGTH, REGIONS, WORDS, Kind, World, draw_world, left_graph
from plait.studies.attending.students import (
    ATTENTION,
    CROSS,
    GRAPHS,
    OTHERS,
    Size,
    Student,
    cost,
    count,
    shape_of,
    size_for,
    student,
)
from plait.studies.attending.tables import markdown
from plait.studies.attending.training import Arm, mixed
from plait.studies.attending.trials import Job, trial
from plait.studies.attention import ArmName, AttentionStudy, Scenes
from plait.studies.verdicts import verdict

ROOT = Path(__file__).parents[3]
ARMS: tuple[ArmName, ...] = AttentionStudy.model_fields["arms"].default
SCENES = Scenes()
ENDS = shape_of(SCENES)
CELLS = SCENES.rows * SCENES.columns


def world(**given: Any) -> World:
    return draw_world(Scenes(**given), seed=3)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made(name: ArmName, *, seed: int = 0) -> Arm:
    torch.manual_seed(seed)
    return Arm(name=name, student=student(name, ENDS, size_for(name, ENDS, 16_000)).eval(), world=world())


class _Reader(torch.nn.Module):
    """Looks at regions as it is told, and answers with what it finds there."""

    def __init__(self, seen: World) -> None:
        super().__init__()
        self.seen, self.d_out = seen, SCENES.colours

    def forward(self, inputs: Inputs, *, need_weights: bool = False) -> Fused:
        regions, said = inputs[REGIONS], inputs[WORDS].tokens @ self.seen.word.mT
        named = said[:, 2].argmax(-1) - (said.shape[-1] - CELLS)
        match = (regions.tokens @ self.seen.shape.mT).gather(2, named[:, None, None].expand(-1, CELLS, 1))[..., 0]
        weights = (20 * match).masked_fill(~regions.there, -1e9).softmax(-1)
        values = 20 * torch.einsum("bn,bnc->bc", weights, regions.tokens @ self.seen.colour.mT)
        return Fused(values=values, present=regions.here, weights={"0": weights[:, None, None]} if need_weights else {})


# --- truths ----------------------------------------------------------------------------------------------------------


@pytest.mark.row("S3-C07")
@pytest.mark.parametrize("kind", KINDS)
def test_a_rule_that_knows_the_codes_answers_all(kind: Kind) -> None:
    for noise, least in ((0.0, 1.0), (SCENES.noise, 0.98)):
        seen = world(noise=noise)
        batch = seen.draw(3000, seeded(), kinds=[kind])
        assert float((seen.best(batch) == batch.labels).double().mean()) >= least


@pytest.mark.row("S3-C07")
def test_the_answer_is_in_the_regions_that_are_asked_for_and_nowhere_else() -> None:
    seen = world(noise=0.0)
    for kind, regions in zip(KINDS, (1, 2, 1, 1), strict=True):
        batch = seen.draw(500, seeded(), kinds=[kind])
        assert batch.asked.sum(1).unique().tolist() == [regions]
        if kind in ("attribute", "detail"):
            # Other regions may change; the answer of the rule that knows all codes does not.
            other = seen.draw(500, seeded(1), kinds=[kind])
            shapes = batch.inputs[REGIONS].tokens @ seen.shape.mT @ seen.shape
            moved = other.inputs[REGIONS].tokens - other.inputs[REGIONS].tokens @ seen.shape.mT @ seen.shape + shapes
            moved = moved - moved @ seen.mark.mT @ seen.mark
            tokens = torch.where(batch.asked[..., None], batch.inputs[REGIONS].tokens, moved)
            again = type(batch)(
                inputs={**batch.inputs, REGIONS: Stream(tokens=tokens)}, labels=batch.labels, asked=batch.asked
            )
            assert torch.equal(seen.best(again), batch.labels)


def test_answers_are_balanced_and_counting_says_little() -> None:
    seen = world()
    relation = seen.draw(4000, seeded(), kinds=["relation"])
    assert abs(float((relation.labels == relation.labels.max()).double().mean()) - 0.5) < 0.03
    mixed_ = seen.draw(6000, seeded(), kinds=["attribute", "relation", "detail"])
    kinds = [mixed_.labels < 6, (mixed_.labels >= 6) & (mixed_.labels < 12), mixed_.labels >= 12]
    assert all(abs(float(kind.double().mean()) - 1 / 3) < 0.03 for kind in kinds)
    for kind, most in (("attribute", 0.42), ("relation", 0.54), ("detail", 0.2), ("chain", 0.42)):
        batch = seen.draw(4000, seeded(), kinds=[kind])
        assert float((seen.counting(batch) == batch.labels).double().mean()) < most


def test_settings_whose_codes_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"codes of 29 properties and 17 words do not stand at right angles"):
        Scenes(d_word=12)
    seen = world()
    codes = torch.cat([seen.shape, seen.colour, seen.size, seen.row, seen.column, seen.mark])
    torch.testing.assert_close(codes @ codes.mT, torch.eye(len(codes)), atol=1e-5, rtol=0)


# --- arms ------------------------------------------------------------------------------------------------------------


@pytest.mark.row("S0-C14")
@pytest.mark.row("S4-C05")
@pytest.mark.parametrize("name", ARMS)
def test_every_arm_is_as_large_as_the_weights_allow(name: ArmName) -> None:
    size = size_for(name, ENDS, 16_000)
    weights = sum(weight.numel() for weight in made(name).student.parameters())
    assert 15_000 < weights <= 16_000
    assert weights == count(name, ENDS, size) == cost(name, ENDS, size, regions=CELLS).weights
    assert count(name, ENDS, Size(size.width, size.inside + 1)) > 16_000
    assert set(ATTENTION) | set(OTHERS) | set(CROSS) | set(GRAPHS) == set(ARMS)


def test_a_budget_below_the_smallest() -> None:
    with pytest.raises(ConfigError, match=r"joint has \d+ weights at least, 50 are allowed"):
        size_for("joint", ENDS, 50)


@pytest.mark.row("S3-C07")
@pytest.mark.parametrize("name", [name for name in ARMS if name not in ("graph-true", "graph-random")])
def test_no_arm_hears_the_order_of_regions(name: ArmName) -> None:
    arm, batch = made(name), world().draw(8, seeded(), kinds=["attribute"])
    order = torch.randperm(CELLS, generator=seeded(1))
    turned = {**batch.inputs, REGIONS: Stream(tokens=batch.inputs[REGIONS].tokens[:, order])}
    with torch.no_grad():
        one = arm(batch.inputs, generator=seeded(), need_weights=True)
        other = arm(turned, generator=seeded(), need_weights=True)
    torch.testing.assert_close(one.scores, other.scores, atol=1e-5, rtol=1e-4)
    for ours, theirs in zip(one.maps, other.maps, strict=True):
        torch.testing.assert_close(ours[:, order], theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.row("S3-C07")
def test_means_of_raw_vectors_do_not_tell_which_colour_goes_with_which_shape() -> None:
    """What the claim says cross-modal attention is needed for: exchanging colours leaves the mean as it is."""
    seen, arm = world(noise=0.0), made("early")
    batch = seen.draw(64, seeded(), kinds=["attribute"])
    tokens = batch.inputs[REGIONS].tokens
    colours = tokens @ seen.colour.mT @ seen.colour
    turned = {**batch.inputs, REGIONS: Stream(tokens=tokens - colours + colours.roll(1, dims=1))}
    with torch.no_grad():
        same, apart = (arm(inputs, generator=seeded()).scores for inputs in (batch.inputs, turned))
        torch.testing.assert_close(same, apart, atol=1e-5, rtol=1e-4)
        late = made("late")
        assert not torch.allclose(*(late(i, generator=seeded()).scores for i in (batch.inputs, turned)), atol=1e-4)


@pytest.mark.row("S0-C14")
@pytest.mark.parametrize("width", [8, 32])
def test_operations_are_those_of_formulas(width: int) -> None:
    words, regions, inside = LENGTH, 20, 10
    encode = 2 * words * (ENDS.words * width + width**2) + 2 * regions * (ENDS.regions * width + width**2)
    pooled = 2 * (2 * width * width + width * inside + inside * ENDS.answers)
    assert cost("late", ENDS, Size(width, inside), regions=regions).flops == encode + pooled
    projections = 2 * (2 * words * width**2 + 2 * regions * width**2)  # queries and output; keys and values
    attention = 2 * 2 * words * regions * width
    inner = 2 * 2 * words * width**2
    head = 2 * (words * width * inside + inside * ENDS.answers)
    found = cost("cross-1", ENDS, Size(width, inside), regions=regions).flops
    assert found == encode + projections + attention + inner + head


@pytest.mark.row("S0-C16")
def test_graphs_have_as_many_edges_and_other_ends() -> None:
    graph = left_graph(SCENES).expand(50, -1, -1)
    other = mixed(graph, generator=seeded())
    assert torch.equal(other.sum((1, 2)), graph.sum((1, 2)))
    assert torch.equal(other.sum(2).sort(1).values, graph.sum(2).sort(1).values)
    assert float((other & graph).double().sum() / graph.double().sum()) < 0.25
    # What is heard along the true graph is the answer to a chain.
    batch = world().draw(200, seeded(), kinds=["chain"])
    assert bool((left_graph(SCENES).any(0) & batch.asked).sum(1).eq(1).all())


@pytest.mark.row("S0-C16")
def test_arms_of_graphs_differ_by_the_graph_alone() -> None:
    batch = world().draw(16, seeded(), kinds=["chain"])
    arms = [made(name) for name in GRAPHS]
    for one, other in pairwise(arms):
        assert all(torch.equal(a, b) for a, b in zip(one.student.parameters(), other.student.parameters(), strict=True))
        with torch.no_grad():
            assert not torch.allclose(*(arm(batch.inputs, generator=seeded()).scores for arm in (one, other)))


@pytest.mark.row("S0-C16")
def test_a_gate_of_reading_is_shut_at_the_start() -> None:
    arm, batch = made("cross-gated"), world().draw(8, seeded(), kinds=["detail"])
    blind = {**batch.inputs, REGIONS: Stream(tokens=torch.zeros_like(batch.inputs[REGIONS].tokens))}
    with torch.no_grad():
        assert torch.equal(*(arm(inputs, generator=seeded()).scores for inputs in (batch.inputs, blind)))


# --- maps ------------------------------------------------------------------------------------------------------------


@pytest.mark.row("S3-C07")
@pytest.mark.row("S0-C14")
def test_a_reader_that_is_known_to_look_points_and_is_faithful() -> None:
    seen = world()
    arm = Arm(name="cross-1", student=Student(_Reader(seen), torch.nn.Identity()).eval(), world=seen)
    batch = seen.draw(200, seeded(), kinds=["attribute"])
    found = look(arm, batch, deleted=1, generator=seeded())
    assert found.pointed["layer 1"] == 1
    assert found.mass["layer 1"] > 0.99
    assert found.fell["layer 1 top"] > 0.6
    assert abs(found.fell["layer 1 least"]) < 0.01
    assert abs(found.fell["random"] - found.fell["layer 1 top"] / CELLS) < 0.1
    assert found.pointed["gradient"] > 0.9


@pytest.mark.row("S3-C07")
def test_pointing_by_chance_is_the_share_that_is_asked_for() -> None:
    for kind, share in (("attribute", 1 / CELLS), ("relation", 2 / CELLS)):
        batch = world().draw(6000, seeded(), kinds=[kind])
        values = torch.rand(6000, CELLS, generator=seeded(1))
        assert abs(pointing(values, batch.asked) - share) < 0.02


@pytest.mark.row("S0-C14")
@pytest.mark.parametrize("name", ["late", "cross-2", "joint"])
def test_maps_are_shares_and_deleting_nothing_costs_nothing(name: ArmName) -> None:
    arm, batch = made(name), world().draw(8, seeded(), kinds=["attribute"])
    maps = arm(batch.inputs, generator=seeded(), need_weights=True).maps
    assert len(maps) == (0 if name == "late" else 2)
    for values in maps:
        torch.testing.assert_close(values.sum(1), torch.ones(8))
    none = torch.zeros(8, CELLS, dtype=torch.bool)
    assert fall(arm, batch.inputs, none, generator=seeded()) == pytest.approx(0, abs=1e-6)
    assert fall(arm, batch.inputs, ~none, generator=seeded()) != pytest.approx(0, abs=1e-6)
    gradient = gradient_map(arm, batch.inputs, generator=seeded())
    assert gradient.shape == (8, CELLS)
    assert bool((gradient >= 0).all())
    assert chosen(gradient, 2).sum(1).tolist() == [2] * 8


# --- the study -------------------------------------------------------------------------------------------------------


def tiny(**given: Any) -> AttentionStudy:
    arms = ("late", "late-tower", "gated", "cross-1", "cross-gated", *GRAPHS)
    return AttentionStudy(**{"arms": arms, "seeds": 3, "steps": 2, "rows": 20, "workers": 1, "lrs": (1e-3,), **given})


@pytest.mark.row("S3-C07")
@pytest.mark.row("S0-C14")
@pytest.mark.row("S0-C16")
@pytest.mark.row("S4-C05")
def test_the_command_gives_every_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arms = "arms=[late,late-tower,gated,cross-1,cross-gated,graph-true,graph-random,graph-full]"
    quick = [arms, "seeds=3", "steps=2", "rows=20", "workers=1", "lrs=[0.001]"]
    assert main(["study", "attention", *quick, "--runs", str(tmp_path), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    found = read_json(tmp_path / "attention-0001" / "results.json")
    assert said["findings"] == found["findings"]
    assert AttentionStudy(**found["spec"]) == tiny()
    assert found["trained"] == 8 * (1 + 3)
    claims = [f["claim"] for f in found["findings"]]
    numbers = {"S3-C07": 6, "S0-C14": 12, "S0-C16, gates": 2, "S0-C16, graphs": 2, "S4-C05": 9}
    assert {claim: claims.count(claim) for claim in claims} == numbers
    tables = (tmp_path / "attention-0001" / "results.md").read_text()
    assert tables == markdown(found)
    for one in found["findings"]:
        assert one["verdict"] == verdict(one["low"], one["high"])
        assert one["what"] in tables
        assert one["low"] <= one["value"] <= one["high"]


def test_a_training_depends_on_nothing_before_it_and_divergence_is_said(tmp_path: Path) -> None:
    study = tiny()
    jobs = [Job(arm="cross-1", lr=0.01, seed=seed) for seed in (0, 1)]
    first, again = [[trial(study, job) for job in order] for order in (jobs, jobs[::-1])]
    for one, other in zip(first, again[::-1], strict=True):
        assert (one.loss, one.accuracy, one.looked) == (other.loss, other.accuracy, other.looked)
    assert first[0].loss != first[1].loss
    seen: list[Event] = []
    found = tiny(arms=("early",), lrs=(1e30,), steps=8).run(tmp_path, events=Events(None, listeners=(seen.append,)))
    assert found["diverged"] == len([e for e in seen if e.kind == "warning"]) == 4
    assert found["findings"] == []


# --- what was published ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published() -> dict[str, Any]:
    return read_json(ROOT / "benchmarks" / "results" / "attention.json")


@pytest.mark.row("S3-C07")
@pytest.mark.row("S0-C14")
@pytest.mark.row("S0-C16")
@pytest.mark.row("S4-C05")
def test_the_page_shows_the_published_results_of_todays_defaults(published: dict[str, Any]) -> None:
    assert AttentionStudy(**published["spec"]) == AttentionStudy(workers=published["spec"]["workers"])
    page = (ROOT / "docs" / "attention.md").read_text(encoding="utf-8")
    for part in markdown(published).split("\n\n"):
        assert part.strip() in page


@pytest.mark.row("S3-C07")
@pytest.mark.row("S4-C05")
def test_published_what_has_to_hold_by_construction(published: dict[str, Any]) -> None:
    for score in published["scores"]:
        assert len(score["seeds"]) == 5
        assert score["low"] <= score["best"] + 0.01
        if score["arm"] == "early" and score["kind"] == "attribute":
            assert score["value"] < score["counting"] + 0.03
    tuned = {r["arm"]: r["accuracy"] for r in published["rates"] if r["taken"]}
    again = findings(published, tuned)
    assert [(f["what"], f["verdict"]) for f in again] == [(f["what"], f["verdict"]) for f in published["findings"]]
