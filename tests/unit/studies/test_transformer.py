"""The study of Transformers: its truths, how far readers see, what heads and blocks are asked, and the command."""

import itertools
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from plait.cli.main import main
from plait.core.errors import ConfigError
from plait.core.events import Event, Events
from plait.core.files import read_done, read_json
from plait.models.transformer import Block, TransformerSizes
from plait.studies.stacking.probes import (
    gradient_norms,
    head_distance,
    influence,
    overlap,
    specialization,
    without_heads,
)
from plait.studies.stacking.students import (
    KERNEL,
    KERNEL_DILATED,
    LAYERS,
    LAYERS_DILATED,
    Attending,
    Beside,
    Convolving,
    Reader,
    hops,
    reader,
    weights_of,
    width_for,
)
from plait.studies.stacking.tables import markdown
from plait.studies.stacking.tasks import SKIP, Task
from plait.studies.stacking.training import WINDOW, Training, accuracy, train
from plait.studies.stacking.trials import Job, ablation_arms, beside, made, task_of, trial
from plait.studies.transformer import Ablation, Distance, Heads, ReaderName, TransformerStudy
from plait.studies.verdicts import verdict

ROOT = Path(__file__).parents[3]
READERS: tuple[ReaderName, ...] = ("transformer", "gru", "cnn", "dilated")
REACH = {"cnn": LAYERS * (KERNEL - 1), "dilated": (KERNEL_DILATED - 1) * (2**LAYERS_DILATED - 1)}
LONG = Task(words=8, length=140, begin=0, lags=(3,))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made_for(name: ReaderName, task: Task, *, d: int = 16) -> Reader:
    torch.manual_seed(0)
    return reader(name, d, Beside(task=task, code="rope", heads=2, weights=10**6)).double().eval()


def one_block(heads: int, task: Task, *, d: int = 16, depth: int = 1, **sizes: Any) -> Reader:
    torch.manual_seed(0)
    shape = TransformerSizes(d=d, depth=depth, heads=heads, d_ff=2 * d, **sizes)
    return Reader(Attending(shape, "rope", task.length), d, task)


def blocks(model: Reader) -> list[Block]:
    assert isinstance(model.body, Attending)
    return [block for block in model.body.transformer.blocks if isinstance(block, Block)]


def tiny(**given_: object) -> TransformerStudy:
    return TransformerStudy(
        **{
            "seeds": 3,
            "tuning": 1,
            "lrs": (1e-3, 1e-2),
            "d": 16,
            "attention_heads": 2,
            "rows": 8,
            "workers": 1,
            "distance": Distance(lags=(2, 8), tuned=2, length=20, weights=6000, steps=2, batch=4),
            "ablation": Ablation(depths=(1, 2), gradients=(2,), length=8, steps=2, batch=4),
            "several": Heads(heads=(1, 4), length=8, steps=2, batch=4),
            **given_,
        }
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """The tiny study, run once for all tests that look at it."""

    folder: Path
    found: dict[str, Any]
    seen: list[Event]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder, seen = tmp_path_factory.mktemp("transformer"), list[Event]()
    found = tiny().run(folder, events=Events(None, listeners=(seen.append,)))
    return Ran(folder=folder, found=found, seen=seen)


# --- truths ----------------------------------------------------------------------------------------------------------


@pytest.mark.row("S3-C02")
@pytest.mark.row("S3-C05")
@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 7), max_size=3, unique=True), st.booleans(), st.integers(0, 6), st.integers(0, 99))
def test_one_who_reads_the_sequence_answers_every_question(lags: list[int], mark: bool, begin: int, seed: int) -> None:
    task = Task(words=5, length=10, begin=begin, lags=tuple(lags), mark=mark)
    if not task.questions:
        return
    batch = task.draw(20, seeded(seed))
    for ids, targets in zip(batch.ids.tolist(), batch.targets.tolist(), strict=True):
        marked = [t for t, token in enumerate(ids) if token >= task.words]
        assert len(marked) == mark
        for t, answers in enumerate(targets):
            for question, answer in zip(task.questions, answers, strict=True):
                from_ = marked[0] if question == "marked" else t - int(question.removeprefix("back "))
                asked = t >= begin and 0 <= from_ < t
                assert answer == (ids[from_] % task.words if asked else SKIP)


def test_no_word_but_the_one_asked_for_tells_the_answer() -> None:
    task = Task(words=4, length=6, begin=0, lags=(2,))
    batch = task.draw(20_000, seeded(0))
    answer = batch.targets[:, 5, 0]
    for t in range(6):
        same = float((batch.ids[:, t] == answer).double().mean())
        assert same == 1 if t == 3 else abs(same - 1 / 4) < 0.02


def test_at_every_distance_the_same_positions_are_asked() -> None:
    study = TransformerStudy()
    jobs = [Job(part="copy", arm="gru", level=lag, lr=0.1, seed=0) for lag in study.distance.lags]
    asked = [task_of(study, job).draw(3, seeded(1)).targets != SKIP for job in jobs]
    assert all(torch.equal(one, asked[0]) for one in asked)
    assert int(asked[0][0].sum()) == study.distance.length - max(study.distance.lags)


# --- how far readers see ---------------------------------------------------------------------------------------------


@pytest.mark.row("S3-C02")
@pytest.mark.parametrize("name", ["cnn", "dilated"])
def test_convolutions_see_their_field_and_nothing_else(name: ReaderName) -> None:
    """Exactly: what is said does not change by a bit, and the gradient is 0, beyond it; at its edge it is not."""
    model, reach = made_for(name, LONG), REACH[name]
    assert isinstance(model.body, Convolving)
    assert model.body.reach == reach
    ids = LONG.draw(4, seeded(0)).ids
    far = influence(model, ids)
    assert not far[reach + 1 :].any()
    assert bool((far[: reach + 1] > 0).all())
    edge = LONG.length - 1 - reach
    beyond, within = ids.clone(), ids.clone()
    beyond[:, :edge] = (ids[:, :edge] + 1) % LONG.words
    within[:, edge] = (ids[:, edge] + 1) % LONG.words
    with torch.no_grad():
        said = [model(one)[:, -1] for one in (ids, beyond, within)]
    assert torch.equal(said[0], said[1])
    assert not torch.equal(said[0], said[2])


@pytest.mark.row("S3-C02")
def test_one_layer_of_attention_sees_every_word_before_and_none_after() -> None:
    model = one_block(2, LONG).double()
    ids = LONG.draw(2, seeded(0)).ids
    assert bool((influence(model, ids) > 0).all())
    words = model.words(ids).detach().requires_grad_()
    said = model.body(words)[:, 70]
    (found,) = torch.autograd.grad((said * torch.randn_like(said)).sum(), words)
    assert bool((found[:, :71].norm(dim=-1) > 0).all())
    assert not found[:, 71:].any()


@pytest.mark.row("S3-C02")
@pytest.mark.parametrize("name", READERS)
def test_no_reader_sees_what_comes(name: ReaderName) -> None:
    task = replace(LONG, length=24)
    model = made_for(name, task)
    ids = task.draw(4, seeded(0)).ids
    later = ids.clone()
    later[:, 12:] = (ids[:, 12:] + 1) % task.words
    with torch.no_grad():
        torch.testing.assert_close(model(ids)[:, :12], model(later)[:, :12], atol=1e-12, rtol=0)


@pytest.mark.row("S3-C02")
@pytest.mark.parametrize(("name", "kernel", "layers"), [("cnn", KERNEL, LAYERS), ("dilated", 3, LAYERS_DILATED)])
def test_fewest_layers_by_all_ways(name: ReaderName, kernel: int, layers: int) -> None:
    steps = [2**i if name == "dilated" else 1 for i in range(layers)]
    fewest: dict[int, int] = {}
    for taps in itertools.product(range(kernel), repeat=layers):
        far = sum(tap * step for tap, step in zip(taps, steps, strict=True))
        fewest[far] = min(fewest.get(far, layers), sum(tap > 0 for tap in taps))
    assert {far: hops(name, far) for far in range(max(fewest) + 1)} == fewest
    assert hops(name, max(fewest) + 1) is None
    if name == "cnn":
        assert all(count == math.ceil(far / (kernel - 1)) for far, count in fewest.items())


@pytest.mark.row("S3-C02")
@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("part", ["copy", "keep"])
def test_readers_are_as_wide_as_equal_weights_allow(name: ReaderName, part: Any) -> None:
    study = TransformerStudy()
    task = task_of(study, Job(part=part, arm=name, level=8, lr=0.1, seed=0))
    both = beside(study, task)
    d = width_for(name, both)
    assert 0.95 * both.weights < weights_of(name, d, both) <= both.weights
    assert weights_of(name, d + (8 if name == "transformer" else 1), both) > both.weights
    with pytest.raises(ConfigError, match=f"{name} has .* weights at least, 9 are allowed"):
        width_for(name, replace(both, weights=9))


@pytest.mark.row("S3-C02")
def test_convolution_copies_from_within_its_field_and_guesses_beyond() -> None:
    found: dict[int, float] = {}
    for lag in (2, 5):
        task = Task(words=4, length=16, begin=8, lags=(lag,))
        torch.manual_seed(0)
        model = Reader(Convolving(16, 5, [1]), 16, task)  # sees 4 back
        train(model, task, Training(steps=120, batch=32, lr=1e-2), generator=seeded(1))
        found[lag] = accuracy(model, task.draw(500, seeded(2)))[0]
    assert found[2] > 0.95
    assert abs(found[5] - 1 / 4) < 0.06


# --- norms and residuals ---------------------------------------------------------------------------------------------


@pytest.mark.row("S3-C04")
@pytest.mark.parametrize("place", ["none", "pre", "post"])
def test_arms_differ_in_norms_and_residuals_alone(place: str) -> None:
    study = TransformerStudy()
    jobs = [Job(part="ablation", arm=f"{place}{sign}", level=2, lr=0.1, seed=3) for sign in "+-"]
    both = [made(study, job) for job in jobs]
    bare = made(study, replace(jobs[0], arm="none+"))
    for one in both:  # the same first weights wherever they have the same
        shared = {name: w for name, w in one.state_dict().items() if "norm" not in name}
        assert shared.keys() == bare.state_dict().keys()
        assert all(torch.equal(w, bare.state_dict()[name]) for name, w in shared.items())
    parts = [
        part for model in both for block in blocks(model) for part in (block.attention_part, block.feed_forward_part)
    ]
    assert [part.residual for part in parts] == [True] * 4 + [False] * 4
    assert {part.place for part in parts} == {place}
    assert len(ablation_arms(study)) == 6


@pytest.mark.row("S3-C04")
@pytest.mark.parametrize("residual", [True, False])
def test_gradients_through_blocks_that_say_nothing(residual: bool) -> None:
    """With residuals and no norm they are the same before every block; without, nothing comes through."""
    task = Task(words=5, length=8, begin=2, lags=(2,))
    model = one_block(2, task, depth=5, norm_place="none", residual=residual)
    for block in blocks(model):
        for layer in (block.attention.out, block.feed_forward.down):
            assert isinstance(layer, nn.Linear)
            nn.init.zeros_(layer.weight)
    found = gradient_norms(model, task.draw(4, seeded(0)))
    assert len(found) == 5
    assert all(one == found[0] for one in found)
    assert (found[0] > 0) == residual


@pytest.mark.row("S3-C04")
def test_gradients_are_those_of_autograd() -> None:
    task = Task(words=5, length=8, begin=2, lags=(2,))
    model = one_block(2, task, depth=3)
    batch = task.draw(4, seeded(0))
    found = gradient_norms(model, batch)
    words = model.words(batch.ids).detach().requires_grad_()  # of rope nothing is added to them
    scores = model.answer(model.body(words))
    loss = nn.functional.cross_entropy(scores[:, 2:].flatten(0, 2), batch.targets[:, 2:].flatten())
    (wanted,) = torch.autograd.grad(loss, words)
    assert found[0] == pytest.approx(float(wanted.norm()), rel=1e-5)
    with pytest.raises(ConfigError, match="a Recurrent has no blocks"):
        gradient_norms(made_for("gru", task), batch)


@pytest.mark.row("S3-C04")
def test_steps_are_counted_until_the_loss_and_no_run_is_left_out(ran: Ran) -> None:
    study = tiny(ablation=Ablation(depths=(1,), length=8, steps=30, batch=4, loss=100.0))
    job = Job(part="ablation", arm="pre+", level=1, lr=1e-3, seed=0)
    assert trial(study, job).steps == WINDOW
    never = study.model_copy(update={"ablation": Ablation(depths=(1,), length=8, steps=12, batch=4, loss=1e-9)})
    assert trial(never, job).steps is None
    steps = ran.found["steps"]  # two of them are fewer than a window
    assert all(one["reached"] == 0 and one["seeds"] == [2, 2, 2] and one["value"] == 2 for one in steps)
    saved = [claim for claim in ran.found["claims"] if claim["unit"] == "steps"]
    assert {claim["verdict"] for claim in saved} == {"not shown"}


# --- heads -----------------------------------------------------------------------------------------------------------


@pytest.mark.row("S3-C05")
def test_numbers_of_heads_have_equal_weights_and_equal_first_ones() -> None:
    study = TransformerStudy()
    jobs = [Job(part="three", arm=f"{n}", level=0, lr=0.1, seed=1) for n in study.several.heads]
    first, *others = [made(study, job).state_dict() for job in jobs]
    for other in others:
        assert first.keys() == other.keys()
        assert all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.row("S3-C05")
def test_heads_with_the_same_queries_and_keys_look_alike_and_others_may_look_elsewhere() -> None:
    task = Task(words=5, length=8, begin=2, lags=(2,))
    model = one_block(2, task)
    qkv = blocks(model)[0].attention.qkv
    with torch.no_grad():
        for rows in qkv.weight.split(8)[:4]:
            rows.copy_(qkv.weight[:8])
        qkv.bias.zero_()
    ids = task.draw(4, seeded(0)).ids
    assert head_distance(model, ids, begin=2) == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        qkv.weight[8:16] *= -100  # one looks at what the other does not
    assert 0.5 < head_distance(model, ids, begin=2) <= 1


@pytest.mark.row("S3-C05")
@pytest.mark.parametrize("which", ["keys", "values"])
def test_subspaces_that_are_the_same_orthogonal_or_random(which: str) -> None:
    task = Task(words=5, length=8, begin=2, lags=(2,))
    model = one_block(4, task)
    qkv = blocks(model)[0].attention.qkv
    first = {"keys": 16, "values": 32}[which]
    with torch.no_grad():
        rows = torch.linalg.qr(torch.randn(16, 16)).Q
        qkv.weight[first : first + 16] = rows
        assert overlap(model, which) == pytest.approx(0, abs=1e-6)
        same = torch.cat([torch.randn(4, 4) @ rows[:4] for _ in range(4)])
        qkv.weight[first : first + 16] = same
        assert overlap(model, which) == pytest.approx(1, abs=1e-4)
        random: list[float] = []
        for _ in range(60):
            qkv.weight[first : first + 16] = torch.randn(16, 16)
            random.append(overlap(model, which))
    assert sum(random) / 60 == pytest.approx(4 / 16, abs=0.01)


@pytest.mark.row("S3-C05")
def test_a_head_that_is_taken_says_nothing_and_the_others_what_they_said() -> None:
    task = Task(words=5, length=8, begin=2, lags=(1, 2))
    model = one_block(2, task).eval()
    batch = task.draw(50, seeded(0))
    attention = blocks(model)[0].attention
    whole = accuracy(model, batch)
    with torch.no_grad():
        attention.out.weight[:, 8:] = 0.0  # the second is silent already
    alone = accuracy(model, batch)
    without = without_heads(model, batch)
    assert without[1] == alone
    assert accuracy(model, batch) == alone  # the reader is as it was
    with torch.no_grad():
        attention.out.weight.zero_()
    assert without[0] == accuracy(model, batch)
    assert len(whole) == len(without[0]) == 2


@pytest.mark.row("S3-C05")
@settings(deadline=None, max_examples=40)
@given(st.integers(2, 8), st.integers(1, 3), st.integers(0, 999))
def test_how_specialized_heads_can_be(heads: int, questions: int, seed: int) -> None:
    without = torch.rand(heads, questions, generator=seeded(seed)).tolist()
    found = specialization([1.0] * questions, without)
    assert found is not None
    assert 1 / heads - 1e-9 <= found <= 1
    assert specialization([1.0], [[0.5]] * heads) == pytest.approx(1 / heads)
    assert specialization([1.0], [[1.0]] * (heads - 1) + [[0.2]]) == 1
    assert specialization([1.0, 0.3], [[1.0, 0.3]] * heads) is None


@settings(deadline=None, max_examples=50)
@given(st.floats(-1, 1), st.floats(0, 1), st.floats(-1, 1))
def test_verdicts_follow_from_intervals(low: float, breadth: float, against: float) -> None:
    found = verdict(low, low + breadth, limit=against)
    assert (found == "supported") == (low > against)
    assert (found == "contradicted") == (low + breadth < against)


# --- the study -------------------------------------------------------------------------------------------------------


@pytest.mark.row("S3-C02")
@pytest.mark.row("S3-C04")
@pytest.mark.row("S3-C05")
def test_a_run_publishes_every_score_with_its_settings(ran: Ran) -> None:
    study, found = tiny(), ran.found
    assert read_json(ran.folder / "results.json") == json.loads(json.dumps(found))
    assert TransformerStudy(**found["spec"]) == study
    cells = 4 * (2 + 1) + 6 * 2 + 2 * 2
    tuned = 4 * (1 + 1) + 6 * 2 + 2 * 2
    assert found["trained"] == 3 * cells + 2 * 1 * tuned
    assert len(found["rates"]) == tuned
    assert all(rate["lr"] in study.lrs for rate in found["rates"])
    assert len(found["scores"]) == 4 * (2 + 2) + 2 * (3 + 1)
    assert all(s["low"] <= s["value"] <= s["high"] and len(s["seeds"]) == 3 for s in found["scores"])
    assert len(found["steps"]) == 12
    assert len(found["gradients"]) == 6
    assert [one["arm"] for one in found["heads"]] == ["4"]
    assert {claim["row"] for claim in found["claims"]} == {"S3-C02", "S3-C04", "S3-C05"}
    for claim in found["claims"]:
        assert claim["verdict"] == verdict(claim["low"], claim["high"], limit=claim["against"])
    beyond = [one for one in found["influence"] if one["hops"] is None]
    assert all(one["value"] == 0 for one in beyond)
    tables = (ran.folder / "results.md").read_text()
    assert tables == markdown(found)
    for words in ("copy, which word", "keep, which word", "steps to a loss", "three relations", "learning rates", "18"):
        assert words in tables
    for row in ("S3-C02", "S3-C04", "S3-C05"):
        assert f"{row}: differences" in tables
    assert read_done(ran.folder) is not None
    assert sum(e.kind == "progress" for e in ran.seen) == found["trained"]


@pytest.mark.parametrize(("part", "arm", "level"), [("copy", "gru", 2), ("keep", "cnn", 0), ("three", "4", 0)])
def test_a_training_depends_on_nothing_before_it(part: Any, arm: str, level: int) -> None:
    """So that it is the same in any order and in any process."""
    study = tiny()
    jobs = [Job(part=part, arm=arm, level=level, lr=0.01, seed=seed) for seed in (0, 1)]
    first, again = [[trial(study, job) for job in order] for order in (jobs, jobs[::-1])]
    for one, other in zip(first, again[::-1], strict=True):
        assert (one.loss, one.accuracy, one.heads) == (other.loss, other.accuracy, other.heads)
    assert first[0].loss != first[1].loss


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ValidationError, match="give shorter ones"):
        Distance(lags=(4, 48))
    with pytest.raises(ValidationError, match="lag 16 is outside of 16 words"):
        Ablation(lag=16)
    with pytest.raises(ValidationError, match="leaves nothing of 16 words"):
        Heads(lags=(1, 15))
    with pytest.raises(ValidationError, match="a width of 32 in 32 heads"):
        TransformerStudy(several=Heads(heads=(1, 32)))
    with pytest.raises(ValidationError, match="no learning rate"):
        TransformerStudy(lrs=())


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = ["seeds=3", "tuning=1", "rows=4", "workers=1", "lrs=[0.01]", "d=16", "attention_heads=2"]
    quick += ["distance.readers=[transformer,cnn]", "distance.lags=[2]", "distance.tuned=2", "distance.steps=1"]
    quick += ["distance.weights=6000", "ablation.depths=[1]", "ablation.gradients=[2]", "ablation.steps=1"]
    quick += ["several.heads=[1,2]", "several.steps=1"]
    assert main(["study", "transformer", *quick, "--runs", str(tmp_path)]) == 0
    assert "| not shown" in capsys.readouterr().out
    assert main(["study", "transformer", *quick, "--runs", str(tmp_path), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["folder"].endswith("transformer-0002")
    assert said["study"] == "transformer"


# --- what was published ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published() -> dict[str, Any]:
    return read_json(ROOT / "benchmarks" / "results" / "transformer.json")


@pytest.mark.row("S3-C02")
@pytest.mark.row("S3-C04")
@pytest.mark.row("S3-C05")
def test_the_page_shows_the_published_results_of_todays_defaults(published: dict[str, Any]) -> None:
    as_many = {**published["spec"], "workers": 0}  # processes change nothing
    assert TransformerStudy(**as_many) == TransformerStudy()
    page = (ROOT / "docs" / "transformer.md").read_text(encoding="utf-8")
    for part in markdown(published).split("\n\n"):
        assert part.strip() in page


@pytest.mark.row("S3-C02")
@pytest.mark.row("S3-C04")
def test_published_what_has_to_hold_by_construction(published: dict[str, Any]) -> None:
    chance = 1 / published["spec"]["distance"]["words"]
    blind = [s for s in published["scores"] if s["arm"] == "cnn" and s["question"] in ("back 32", "32")]
    assert len(blind) == 2
    assert all(abs(s["value"] - chance) < 0.03 for s in blind)  # out of its field
    for one in published["influence"]:
        assert (one["value"] == 0) == (one["hops"] is None)
    assert {len(s["seeds"]) for s in published["scores"]} == {5}
    limit = published["spec"]["ablation"]["steps"]
    assert all(sum(n < limit for n in one["seeds"]) <= one["reached"] <= 5 for one in published["steps"])
