"""The study of connectors: truths of its scenes, what is counted, what stays frozen, and the command."""

import json
import random
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from pydantic import ValidationError

from plait.assembly.towers import scratch_tower
from plait.cli.main import main
from plait.core.events import Event, Events
from plait.core.files import read_done, read_json
from plait.models import specs
from plait.models.connectors.measure import connector_account
from plait.models.multimodal import MultimodalLM
from plait.studies.connecting import scenes, training
from plait.studies.connecting.claims import enough
from plait.studies.connecting.costs import LARGE, LLAVA, Size, cost, costs, prefill_flops, size_of
from plait.studies.connecting.parts import (
    draws,
    fingerprint,
    learning,
    make_batch,
    make_model,
    make_tower,
    reader,
    save_language,
    spec_of,
    tokenizer_folder,
    tower_spec,
)
from plait.studies.connecting.scenes import IDS, Scene, Thing
from plait.studies.connecting.tables import markdown
from plait.studies.connecting.training import KINDS
from plait.studies.connectors import Arm, ConnectorStudy, Kind, Language, Sight
from plait.studies.verdicts import verdict

ROOT = Path(__file__).parents[3]
ARMS: tuple[Arm, ...] = ConnectorStudy.model_fields["arms"].default
SLOTS = {"shuffle-4": 4, "qformer-16": 16, "qformer-4": 4, "resampler-4": 4, "gated": 1}
"""Places in the text, as documented; a token a cell for all others."""
SMALL = Language(d=16, depth=2, heads=4, steps=2, asked=4)
SIGHT = Sight(d=16, depth=1, heads=4, steps=2)


def tiny(**given: Any) -> ConnectorStudy:
    settings: dict[str, Any] = {
        "arms": ("mlp", "mlp-wide", "qformer-4", "gated"),
        "language": SMALL,
        "sight": SIGHT,
        "steps": 2,
        "batch": 4,
        "asked": 4,
        "pool": 8,
        "rows": 4,
        "lrs": (1e-3, 1e-2),
        "workers": 1,
    }
    return ConnectorStudy(**settings | given)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A frozen decoder of no skill."""
    folder = tmp_path_factory.mktemp("decoder")
    torch.manual_seed(0)
    _, language = reader(SMALL, tokenizer_folder(folder / "words"))
    save_language(language, folder / "trained")
    return folder / "trained"


def model_of(arm: Arm, decoder: Path) -> MultimodalLM:
    torch.manual_seed(1)
    encoder: Any = scratch_tower(tower_spec(SIGHT)).encoder
    return make_model(arm, make_tower(SIGHT, encoder.state_dict()), decoder).model


# --- truths ----------------------------------------------------------------------------------------------------------


def solved(scene: Scene, kind: Kind, about: str) -> list[str]:
    """The answer, from places alone, by another way than the study's."""
    at = {divmod(place, 4): thing for place, thing in enumerate(scene) if thing is not None}
    match kind:
        case "count":
            return [str([thing.color for thing in at.values()].count(about))]
        case "color" | "right":
            row, column = int(about[1]) - 1, int(about[3]) - 1
            return [at[row, column + (kind == "right")].color]
        case "read":
            row = int(about.removeprefix("row")) - 1
            return [at[row, column].glyph for column in range(4) if (row, column) in at]


@pytest.mark.parametrize("kind", KINDS)
def test_a_solver_that_knows_the_scene_is_always_right(kind: Kind) -> None:
    asked = training.exam(random.Random(0), kind, 200)
    assert len(asked) == 200
    for scene, question in asked:
        assert list(question.answer) == solved(scene, kind, question.about)
        assert 4 <= sum(thing is not None for thing in scene) <= 10
        words = scenes.spoken(question)
        assert tuple(word for word, answers in words if answers) == question.answer
        assert all(word in IDS for word, _ in words)
        if kind == "read":
            assert len(question.answer) > 1
            places = [scenes.PLACES.index(word) for word, answers in words[2:] if not answers]
            assert places == sorted(places)
            assert [scene[place] is not None for place in places] == [True] * len(question.answer)


def test_words_and_pixels_both_tell_the_scene() -> None:
    rng = random.Random(3)
    drawn = [scenes.draw_scene(rng) for _ in range(20)]
    pixels = scenes.pictures(drawn, seed=5)
    assert pixels.shape == (20, 24, 24, 3)
    assert torch.equal(pixels, scenes.pictures(drawn, seed=5))
    assert not torch.equal(pixels, scenes.pictures(drawn, seed=6))
    colors, glyphs = list(scenes.COLORS.values()), scenes.GLYPHS
    for picture, scene in zip(pixels, drawn, strict=True):
        words = [word.split("-") for word in scenes.describe(scene)]
        assert scene == tuple(Thing(color=word[0], glyph=word[1]) if word[1:] else None for word in words)
        for place, thing in enumerate(scene):
            row, column = divmod(place, 4)
            cell = picture[6 * row : 6 * row + 6, 6 * column : 6 * column + 6]
            lit = cell.amax(-1) > 0.5
            if thing is None:
                assert not lit.any()
                continue
            near = [float((cell[lit].mean(0) - torch.tensor(color)).norm()) for color in colors]
            assert list(scenes.COLORS)[near.index(min(near))] == thing.color
            wanted = torch.tensor([[bit == "1" for bit in line] for line in glyphs[thing.glyph].split()])
            rows, columns = wanted.any(1).nonzero(), wanted.any(0).nonzero()
            found_rows, found_columns = lit.any(1).nonzero(), lit.any(0).nonzero()
            box = lit[found_rows[0] : found_rows[-1] + 1, found_columns[0] : found_columns[-1] + 1]
            assert torch.equal(box, wanted[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])


def test_loss_is_taken_on_answers_alone() -> None:
    scene, question = training.exam(random.Random(0), "read", 1)[0]
    _, short = training.exam(random.Random(0), "count", 1)[0]
    words = training.in_words(scene)
    batch = make_batch([(words, [question]), (words[:3], [short])])
    assert batch.labels[0][batch.labels[0] >= 0].tolist() == [IDS[word] for word in question.answer]
    assert batch.labels[1][batch.labels[1] >= 0].tolist() == [IDS[word] for word in short.answer]
    assert batch.segment_ids.sum(1).tolist() == [1 + 16 + 2 + 2 * len(question.answer), 1 + 3 + 2 + 1]
    blank = (None,) * 16
    assert [scenes.ask(blank, kind, random.Random(0)) is None for kind in KINDS] == [False, True, True, True]


# --- what is counted -------------------------------------------------------------------------------------------------


@pytest.mark.row("S2-C04")
@pytest.mark.row("S2-06")
@pytest.mark.parametrize("arm", ARMS)
def test_tokens_of_a_picture_are_those_documented(arm: Arm, decoder: Path) -> None:
    model = model_of(arm, decoder)
    slots = training.slots_of(model)
    assert len(slots) == SLOTS.get(arm, 16)
    spec = spec_of(arm, d_in=16, d=16, layers=2)
    size = Size(name="", family="gpt2", side=4, d_in=16, d=16, d_ff=32, layers=2, heads=4, text=3, bytes=4)
    counted = cost(arm, spec, size, times=2 if arm == "mlp-4" else 1)
    assert counted.slots == len(slots)
    assert counted.trainable == sum(weight.numel() for weight in learning(model).values())
    question = training.exam(random.Random(0), "color", 1)[0][1]
    batch = make_batch([(slots, [question])], torch.rand(1, 16, 16))
    assert batch.token_ids.shape[1] == 1 + len(slots) + 3
    with torch.inference_mode():
        prompt = make_batch([(slots, [])], torch.rand(1, 16, 16))
        kept = model.eval().prefill(prompt).cache
    layers = [(layer.keys, layer.values) for layer in kept.layers]
    held = sum(tensor.numel() * 4 for pair in layers for tensor in pair)
    own = 2 * 2 * 16 * 4  # of the first word of the row
    assert counted.cache_bytes == held - own + (16 * 16 * 4 if arm == "gated" else 0)


@pytest.mark.row("S2-C04")
@pytest.mark.parametrize(("slots", "text"), [(16, 3), (4, 3), (1, 7)])
@pytest.mark.parametrize(("family", "products"), [("gpt2", 2), ("llama", 3)])
def test_operations_of_the_prefill_are_those_of_the_formula(
    slots: int, text: int, family: Literal["gpt2", "llama"], products: int
) -> None:
    d, d_ff, layers = 24, 40, 3
    size = Size(name="", family=family, side=4, d_in=16, d=d, d_ff=d_ff, layers=layers, heads=2, text=text, bytes=4)
    t = slots + text
    plain = layers * (2 * t * (4 * d * d + products * d * d_ff) + 2 * 2 * t * t * d)
    assert prefill_flops(size, slots) == plain
    reading = specs.GatedCrossAttention(every=1, heads=2, resampler=None)
    seen = 16
    looks = 2 * 2 * t * d * d + 2 * 2 * seen * 16 * d + 2 * 2 * t * seen * d + 2 * t * 2 * 4 * d * d
    assert prefill_flops(size, slots, reading=reading, seen=seen) == plain + layers * looks


@pytest.mark.row("S2-C04")
def test_32_queries_save_llava_most_of_its_tokens_and_operations() -> None:
    mlp, queries = (cost(arm, LARGE[arm], LLAVA) for arm in ("mlp", "qformer-32"))
    assert (mlp.slots, queries.slots) == (576, 32)
    assert mlp.trainable == 20_979_712
    assert queries.flops < 0.15 * mlp.flops
    assert mlp.cache_bytes == 18 * queries.cache_bytes == 576 * 2 * 32 * 4096 * 2


@pytest.mark.row("S2-C06")
@pytest.mark.parametrize(("d", "layers"), [(64, 3), (32, 2)])
def test_the_wide_projection_has_as_many_weights_as_the_layers_inside(d: int, layers: int) -> None:
    inside, wide = (
        connector_account(spec_of(arm, d_in=d, d=d, layers=layers), cells=(4, 4), d_in=d, d_out=d, layers=layers)
        for arm in ("gated", "mlp-wide")
    )
    assert abs(inside.parameters + d - wide.parameters) <= 0.01 * wide.parameters


@pytest.mark.row("S2-C05")
def test_projections_differ_in_their_layers_alone(decoder: Path) -> None:
    layers = {
        arm: sum(weight.dim() == 2 for weight in learning(model_of(arm, decoder)).values())
        for arm in ("linear", "mlp", "mlp-wide", "mlp-4")
    }
    assert layers == {"linear": 1, "mlp": 2, "mlp-wide": 2, "mlp-4": 4}
    for arm, count in layers.items():  # a matrix and a bias each, and no norm
        assert len([name for name in learning(model_of(arm, decoder)) if name.startswith("connectors.")]) == 2 * count


# --- what stays as it is ---------------------------------------------------------------------------------------------


@pytest.mark.row("S2-06")
@pytest.mark.row("S2-C06")
@pytest.mark.parametrize("arm", ["mlp", "qformer-4", "gated"])
def test_training_moves_the_connector_alone(arm: Arm, decoder: Path) -> None:
    model, study = model_of(arm, decoder), tiny(steps=3)
    rng = draws("here")
    drawn = [scenes.draw_scene(rng) for _ in range(8)]
    words = make_batch([(training.in_words(drawn[0]), training.several(drawn[0], 4, rng))])
    seen = training.features_of(model.encoders["image"], drawn, seed=1)
    shown = make_batch([(training.slots_of(model), training.several(drawn[0], 4, rng))], seen[:1])

    def state() -> tuple[str, str, torch.Tensor, torch.Tensor]:
        with torch.inference_mode():
            said, looked = model.eval()(words).logits, model(shown).logits
        return fingerprint(model.decoder), fingerprint(model.encoders), said, looked

    before = state()
    training.train_connector(model, (drawn, seen), study, rng=rng, lr=1e-2)
    after = state()
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])  # text without a picture: bit for bit
    assert not torch.equal(before[3], after[3])
    with torch.inference_mode():
        plain = model_of("linear", decoder).eval()(words).logits
    assert torch.equal(plain, after[2])
    assert all(name.startswith("connectors.") or name == "mark" or ".reads." in name for name in learning(model))
    next(iter(model.encoders.parameters())).data.view(-1)[0] += 1e-6
    assert fingerprint(model.encoders) != after[1]


@pytest.mark.row("S2-06")
def test_every_connector_gets_the_same_frozen_weights(decoder: Path) -> None:
    models = [model_of(arm, decoder) for arm in ARMS]
    for part in ("decoder", "encoders"):
        prints = {
            arm: fingerprint(getattr(model, part)) for arm, model in zip(ARMS, models, strict=True) if arm != "gated"
        }
        assert len(set(prints.values())) == 1
    assert fingerprint(models[-1].decoder) == fingerprint(models[0].decoder)  # the layers that read are no part of it
    models[0].decoder.requires_grad_(requires_grad=True)
    next(iter(models[0].decoder.parameters())).data.view(-1)[0] += 1e-6
    assert fingerprint(models[0].decoder) != fingerprint(models[-1].decoder)  # seen though it could learn


# --- the study -------------------------------------------------------------------------------------------------------


def test_verdicts_follow_from_intervals_by_rule() -> None:
    assert [verdict(low, high) for low, high in ((0.01, 0.2), (-0.2, -0.01), (-0.1, 0.1), (0.0, 0.1))] == [
        "supported",
        "contradicted",
        "not shown",
        "not shown",
    ]
    assert [enough(low, high, margin=0.02) for low, high in ((-0.5, 0.02), (0.021, 0.3), (0.0, 0.03))] == [
        "supported",
        "contradicted",
        "not shown",
    ]


@pytest.mark.row("S2-C04")
@pytest.mark.row("S2-C05")
@pytest.mark.row("S2-C06")
@pytest.mark.row("S2-06")
def test_a_run_publishes_every_score_and_a_verdict_of_each_claim(tmp_path: Path) -> None:
    study, seen = tiny(arms=("linear", "mlp", "mlp-4", "mlp-wide", "qformer-4", "gated")), list[Event]()
    found = study.run(tmp_path, events=Events(None, listeners=(seen.append,)))
    assert read_json(tmp_path / "results.json") == json.loads(json.dumps(found))
    assert ConnectorStudy(**found["spec"]) == study
    assert found["trained"] == 2 * 3 + 6 * 2 + 6 * 2  # parts, rates with the first seed, the other seeds
    assert len(found["scores"]) == 6 * 2 * (4 + 1)
    for score in found["scores"]:
        assert len(score["seeds"]) == 3
        assert score["low"] <= score["value"] <= score["high"]
    assert found["unchanged"] == {"trainings": 24, "same_decoder": 24, "same_tower": 24, "same_text": 24}
    assert {one["row"] for one in found["claims"]} == {"S2-C04", "S2-C05", "S2-C06", "S2-06"}
    assert {one["verdict"] for one in found["claims"]} <= {"supported", "contradicted", "not shown"}
    for arm in study.arms:
        rates = [one for one in found["rates"] if one["arm"] == arm]
        assert [one["lr"] for one in rates if one["chosen"]] == [max(rates, key=lambda one: one["tuned"])["lr"]]
    assert found["costs"] == costs(study)
    assert set(found["prefill_ms"]) == set(study.arms)
    tables = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert tables == markdown(found)
    for one in found["claims"]:
        assert one["claim"] in tables
    assert read_done(tmp_path) is not None


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = ["arms=[mlp,qformer-4]", "steps=1", "batch=2", "asked=4", "pool=4", "rows=2", "lrs=[0.001]", "workers=1"]
    quick += ["language.steps=1", "language.d=16", "sight.steps=1", "sight.d=16", "--runs", str(tmp_path), "--json"]
    assert main(["study", "connectors", *quick]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["folder"].endswith("connectors-0001")
    assert said["study"] == "connectors"


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ValidationError, match="seeds"):
        tiny(seeds=2)
    with pytest.raises(ValidationError, match="arms"):
        tiny(arms=("mlp-9",))


# --- what was published ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published() -> dict[str, Any]:
    return read_json(ROOT / "benchmarks" / "results" / "study_connectors.json")


@pytest.mark.row("S2-C04")
@pytest.mark.row("S2-C05")
@pytest.mark.row("S2-C06")
@pytest.mark.row("S2-06")
def test_the_page_shows_the_published_results_of_todays_defaults(published: dict[str, Any]) -> None:
    assert ConnectorStudy(**published["spec"] | {"workers": 0}) == ConnectorStudy()  # no result depends on these
    page = (ROOT / "docs" / "connectors.md").read_text(encoding="utf-8")
    for part in markdown(published).split("\n\n"):
        assert part.strip() in page


@pytest.mark.row("S2-06")
def test_published_what_has_to_hold_by_construction(published: dict[str, Any]) -> None:
    trainings = published["unchanged"]["trainings"]
    assert set(published["unchanged"].values()) == {trainings}
    study = ConnectorStudy()
    at = {one["arm"]: one for one in published["costs"] if one["size"] == size_of(study).name}
    assert {arm: at[arm]["slots"] for arm in ARMS} == {arm: SLOTS.get(arm, 16) for arm in ARMS}
    weights = {one["arm"]: one["trainable"] for one in published["scores"]}
    assert weights == {arm: at[arm]["trainable"] for arm in ARMS}
