"""A recipe that judges training while it goes on: values are losses of the kept models, whatever the batches are."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_recipe import write_recipe

from plait.core.errors import ConfigError
from plait.core.events import Event
from plait.core.files import read_done, read_jsonl
from plait.recipes.recipe import load_recipe
from plait.recipes.run import resume, start

Folders = Mapping[str, Path]
HELD = ["data.source.validation=0.2"]
PHASES = ("03-tune/connector", "03-tune/decoder", "04-align", "02-pretrain")


def judged(stage: str, **settings: Any) -> str:
    given = ", ".join(f"{name}: {value}" for name, value in {"every": 1, "samples": 6, **settings}.items())
    return f"stages.{stage}.trainer.validation={{{given}}}"


ALL = [*HELD, *(judged(stage) for stage in ("pretrain", "tune", "align"))]


def run(root: Path, folders: Folders, *overrides: str, steps: int = 4, seen: list[Event] | None = None) -> Path:
    root.mkdir(exist_ok=True)
    recipe = write_recipe(root, folders, steps=steps)
    listeners = (seen.append,) if seen is not None else ()
    return start(str(recipe), overrides, root=root / "runs", listeners=listeners)


def evaluations(run: Path, phase: str, name: str = "evaluation") -> dict[int, float]:
    return {r["step"]: r[name] for r in read_jsonl(run / phase / "metrics.jsonl") if name in r}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def _own_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLAIT_HOME", str(home))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_folders: Folders, home: Path) -> tuple[Path, list[Event]]:
    seen: list[Event] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLAIT_HOME", str(home))
        return run(tmp_path_factory.mktemp("whole"), tiny_folders, *ALL, seen=seen), seen


@pytest.mark.row("S4-63")
@pytest.mark.parametrize("phase", PHASES)
def test_every_phase_that_learns_from_answers_or_pairs_is_judged(whole: tuple[Path, list[Event]], phase: str) -> None:
    folder, _ = whole
    steps = {"03-tune/connector": 2, "03-tune/decoder": 4, "04-align": 3, "02-pretrain": 4}[phase]
    terms = {"04-align": {"dpo", "margin", "accuracy", "chosen"}, "02-pretrain": {"contrastive"}}
    found = evaluations(folder, phase)
    assert list(found) == [*range(1, steps + 1)]
    assert list(evaluations(folder, phase, "evaluation_training")) == [*range(1, steps + 1)]
    last = read_jsonl(folder / phase / "metrics.jsonl")[-1]
    named = {name.partition("/")[2] for name in last if name.startswith("evaluation/")}
    assert named == terms.get(phase, {"next_token"})
    done = read_done(folder / phase.partition("/")[0])
    assert done is not None
    told = done["summary"]["validation"]
    told = told[phase.partition("/")[2]] if "/" in phase else told
    best = min(found, key=found.__getitem__)
    assert (told["step"], told["evaluation"], told["steps"]) == (best, found[best], steps)
    assert told["gap"] == found[best] - evaluations(folder, phase, "evaluation_training")[best]
    assert (folder / phase / "checkpoints" / f"{best:06d}").is_dir()


def test_the_warm_up_on_words_is_not_judged(whole: tuple[Path, list[Event]]) -> None:
    assert not evaluations(whole[0], "03-tune/words")


def test_what_is_kept_is_the_best_and_that_is_said(whole: tuple[Path, list[Event]]) -> None:
    folder, seen = whole
    texts = [event.text for event in seen]
    assert sum("evaluation" in text and "on training samples" in text for text in texts) >= 13
    found = evaluations(folder, "03-tune/decoder")
    best = min(found, key=found.__getitem__)
    (line,) = [text for text in texts if text.startswith("decoder: validation")]
    assert f"is best at step {best} of 4" in line
    assert "that model is kept" in line
    done = read_done(folder / "03-tune")
    assert done is not None
    assert done["summary"]["model"] == f"decoder/checkpoints/{best:06d}"


@pytest.mark.row("S4-63")
def test_a_value_is_the_loss_of_the_kept_model_question_by_question(whole: tuple[Path, list[Event]]) -> None:
    """An oracle that packs nothing, caches nothing and adds up in another order."""
    from plait.assembly.multimodal import load_multimodal
    from plait.core.events import Events
    from plait.data.collate import collate
    from plait.data.media import decode_image
    from plait.data.shards import ShardReader
    from plait.stages.tuning.validating import judged_questions

    folder, _ = whole
    recipe = load_recipe(str(folder / "recipe.yaml")).spec
    done = read_done(folder / "03-tune")
    assert done is not None
    model = load_multimodal(folder / "03-tune" / done["summary"]["model"], events=Events())
    model.model.eval()
    with ShardReader(folder / "01-data" / "shards", "instruct-validation") as reader:
        chosen = judged_questions(recipe.stages["tune"], list(reader))  # pyright: ignore[reportArgumentType]
        assert len(chosen) == 6
        assert {sample.meta["split"] for sample in chosen} == {"validation"}
        nats, tokens = 0.0, 0
        for sample in chosen:
            rendered = model.template.sample(sample)
            (ref,) = sample.media()
            patches = model.image.prepare(decode_image(reader.media(ref), place=ref.uri))
            with torch.no_grad():
                features = model.image.encoder(patches)
                batch = collate(
                    [(sample.id, rendered)],
                    {ref.sha256: features},
                    grid_out=model.accounts,
                    encoded=True,
                    row=len(rendered),
                    pad=model.stop,
                )
                logits = model.model(batch).logits.double()
            nats += float(torch.nn.functional.cross_entropy(logits, batch.targets, reduction="sum"))
            tokens += len(batch.targets)
    found = evaluations(folder, "03-tune/decoder")
    assert nats / tokens == pytest.approx(min(found.values()), rel=2e-3)  # cached features have 16 bits


@pytest.mark.row("S4-63")
def test_values_do_not_depend_on_the_batches_of_training(
    whole: tuple[Path, list[Event]], tmp_path: Path, tiny_folders: Folders
) -> None:
    """At the first step the rate is 0: the model is that which training starts from, whatever its batches are."""
    other = [
        "stages.pretrain.batch_size=5",
        "stages.pretrain.trainer.micro_batch=2",
        "stages.tune.frozen.steps=1",
        "stages.tune.batch_size=3",
        "stages.tune.packing=false",
        "stages.tune.trainer.workers=1",
    ]
    changed = run(tmp_path, tiny_folders, *ALL, *other, "stages.align=null", steps=1)
    for phase in ("02-pretrain", "03-tune/connector"):
        for name in ("evaluation", "evaluation_training"):
            before, after = (evaluations(folder, phase, name)[1] for folder in (whole[0], changed))
            assert before == pytest.approx(after, rel=1e-6)


@pytest.mark.row("S4-63")
@pytest.mark.parametrize(
    ("kind", "terms"),
    [
        ("image_tower={kind: resnet, size: 32, width: 8}", {"contrastive"}),  # whose norms would see the batch
        ("qformer={queries: 3, d: 16, depth: 2, heads: 2, every: 1}", {"contrast", "match", "generate"}),
    ],
)
def test_every_form_of_pretrain_is_judged(tmp_path: Path, tiny_folders: Folders, kind: str, terms: set[str]) -> None:
    words = [*HELD, judged("pretrain"), f"stages.pretrain.{kind}", "stages.tune=null", "stages.align=null"]
    words += ["stages.pretrain.dropout=null", "stages.pretrain.lr=0.003"]
    at_once = ["stages.pretrain.trainer.micro_batch=3"] if "resnet" in kind else ["stages.pretrain.batch_size=6"]
    one, other = (run(tmp_path / name, tiny_folders, *words, *more) for name, more in (("one", []), ("other", at_once)))
    last = read_jsonl(one / "02-pretrain" / "metrics.jsonl")[-1]
    assert {name.partition("/")[2] for name in last if name.startswith("evaluation/")} == terms
    found = evaluations(one, "02-pretrain")
    done = read_done(one / "02-pretrain")
    assert done is not None
    best = min(found, key=found.__getitem__)
    assert done["summary"]["checkpoint"] == f"checkpoints/{best:06d}"
    assert done["summary"]["validation"]["evaluation"] == found[best]
    assert done["summary"]["pairs"]["validation"] == 6
    if "resnet" not in kind:  # the first rate is 0, but norms have moved by the batches of training
        assert found[1] == pytest.approx(evaluations(other, "02-pretrain")[1], rel=1e-6)


@pytest.mark.row("S4-63")
def test_patience_ends_a_stage_early_and_it_stays_ended(tmp_path: Path, tiny_folders: Folders) -> None:
    """Where no gain is large enough the first evaluation is the best."""
    early = [*HELD, judged("tune", patience=2, least_gain=100.0, gap="false"), "stages.pretrain=null"]
    early += [judged("align", patience=1, least_gain=100.0)]
    seen: list[Event] = []
    folder = run(tmp_path, tiny_folders, *early, steps=40, seen=seen)
    assert list(evaluations(folder, "02-tune/decoder")) == [1, 2, 3]
    texts = [event.text for event in seen]
    assert any("stopped early, after step 3 of 40: the model is that of step 1" in text for text in texts)
    assert any("is best at step 1 of 3, stopped early (40 were planned); that model is kept" in text for text in texts)
    tune = folder / "02-tune"
    done = read_done(tune)
    assert done is not None
    assert done["summary"]["model"] == "decoder/checkpoints/000001"
    assert "gap" not in done["summary"]["validation"]["decoder"]
    aligned = read_done(folder / "03-align")
    assert aligned is not None
    assert (aligned["summary"]["steps"], aligned["summary"]["model"]) == (2, "checkpoints/000001")
    assert (folder / "03-align" / "samples" / "000002.json").is_file(), "answers of the model that is left"
    shutil.rmtree(folder / "03-align")
    (tune / "done.json").unlink()  # as if it had been killed right before
    resume(folder)
    again = read_done(tune)
    assert again is not None
    assert again["summary"] == done["summary"]


def test_the_average_is_judged_where_it_is_kept(tmp_path: Path, tiny_folders: Folders) -> None:
    """With a decay near 1 and few steps it hardly moves, and the weights do."""
    words = [*HELD, judged("pretrain"), "stages.tune=null", "stages.align=null", "stages.pretrain.lr=0.05"]
    found: list[dict[int, float]] = []
    for name, average in (("without", "null"), ("kept", "{decay: 0.2}"), ("beside", "{decay: 0.2, use: false}")):
        folder = run(tmp_path / name, tiny_folders, *words, f"stages.pretrain.trainer.average={average}")
        found.append(evaluations(folder, "02-pretrain"))
    assert found[0] == found[2]
    assert found[0][1] == pytest.approx(found[1][1])
    assert found[0][4] != pytest.approx(found[1][4], rel=1e-4)


def test_without_data_held_out_for_it_nothing_is_created(tmp_path: Path, tiny_folders: Folders) -> None:
    with pytest.raises(ConfigError) as refused:
        run(tmp_path, tiny_folders, judged("tune"), judged("align"))
    assert "stages.tune.trainer.validation, stages.align.trainer.validation is set" in str(refused.value)
    assert "data.source.validation is 0" in str(refused.value)
    assert not (tmp_path / "runs").exists()
