"""Reading a sweep, and refusing what cannot work, before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from plait.core.errors import ConfigError
from plait.recipes.recipe import load_recipe
from plait.recipes.search.sweep import Range, check, load_sweep

pytestmark = pytest.mark.light

GOOD = """
recipe: quickstart
search:
  stages.tune.frozen.lr: {low: 1e-4, high: 1e-2, log: true}
  stages.tune.adapt.rank: [4, 8, 16]
metric: tune.evaluation
"""


def write(tmp_path: Path, text: str = GOOD) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return str(path)


def test_a_file_says_all_and_words_change_it(tmp_path: Path) -> None:
    sweep = load_sweep(write(tmp_path), ["trials=7", "halving={least: 20}", "stages.tune.adapt.steps=30"])
    assert (sweep.name, sweep.number, sweep.take, sweep.method) == ("mine", 7, "best", "tpe")
    assert sweep.search["stages.tune.frozen.lr"] == Range(low=1e-4, high=1e-2, log=True)
    assert sweep.search["stages.tune.adapt.rank"] == (4, 8, 16)
    assert sweep.set == {"stages.tune.adapt.steps": 30}
    assert sweep.halving is not None
    assert sweep.halving.reduction == 3
    again = load_sweep(write(tmp_path), ["stages.tune.adapt.rank=8"])
    assert list(again.search) == ["stages.tune.frozen.lr"]
    assert again.set == {"stages.tune.adapt.rank": 8}


def test_a_recipe_and_words_are_a_sweep_too() -> None:
    words = ["stages.pretrain.lr=[1e-3, 3e-3]", "stages.pretrain.steps=40", "metric=pretrain.evaluation", "method=grid"]
    plan = check(load_sweep("quickstart", words))
    assert plan.sweep.number == 2
    assert plan.sweep.name == "quickstart"
    assert (plan.shared, plan.middle) == (("data",), ("pretrain",))
    assert plan.later[:2] == ("tune", "align")
    assert plan.trial({"stages.pretrain.lr": 3e-3}).spec.stages["pretrain"].model_dump()["lr"] == 3e-3
    assert list(plan.trial({"stages.pretrain.lr": 3e-3}).spec.stages) == ["pretrain"]
    assert list(plan.begin().spec.stages) == []


def test_a_path_in_a_sweep_file_is_seen_from_its_folder(tmp_path: Path) -> None:
    text = f"{GOOD}set: {{data.source: {{kind: pairs, path: mine.csv}}}}\n"
    assert load_sweep(write(tmp_path, text)).set["data.source"]["path"] == str(tmp_path / "mine.csv")
    named = load_sweep(write(tmp_path, f"{GOOD}set: {{data.source: emoji}}\n"), ["data.questions.groups=false"])
    assert named.set == {"data.source": "emoji", "data.questions.groups": False}
    listed = load_sweep(
        write(tmp_path, f"{GOOD}  \n".replace("  stages.tune.frozen", "  data.source: [a, b]\n  stages.tune.frozen"))
    )
    assert listed.search["data.source"] == (str(tmp_path / "a"), str(tmp_path / "b"))


def test_what_is_before_the_first_searched_setting_is_shared(tmp_path: Path) -> None:
    plan = check(load_sweep(write(tmp_path)))
    assert (plan.shared, plan.middle, plan.phase, plan.field) == (
        ("data", "pretrain"),
        ("tune",),
        "decoder",
        "evaluation",
    )
    whole = check(
        load_sweep(
            write(tmp_path), ["seed=3", "search={data.questions.canvases: [100, 200]}", "metric=tune.connector.loss"]
        )
    )
    assert (whole.shared, whole.phase) == ((), "connector")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["stages.tune.adapt.rnk=[4, 8]"], "did you mean 'stages.tune.adapt.rank'"),
        (["stages.tune.adapt.rank=[]"], "has no values"),
        (["stages.tune.adapt.rank=[4, 4]"], "has 4 twice"),
        (["stages.tune.adapt.rank=[null, 4]"], "has null"),
        (["stages.tune.adapt.rank=[4, many]"], "expected integer"),
        (["stages.tune.frozen.lr={low: 1e-2, high: 1e-4}"], "low 0.01 is not below high 0.0001"),
        (["stages.tune.frozen.lr={low: 0, high: 1e-4, log: true}"], "no logarithm"),
        (["stages.tune.frozen.lr={low: -1.0, high: 1e-4}"], "expected number"),
        (["method=grid"], "a grid has no end of values"),
        (["metric=tune.test-concept"], "a score of a test split cannot judge"),
        (["metric=pretrain.recall_at_1"], "a score of a test split cannot judge"),
        (["metric=evaluate.f1"], "a score of a test split cannot judge"),
        (["metric=tnue.loss"], "did you mean 'tune.loss'"),
        (["metric=data.loss"], "no stage of the recipe that trains is called 'data'"),
        (["metric=pretrain.evaluation"], "is known before that stage"),
        (["trials=0"], "trials"),
        (["trails=20"], "did you mean 'trials'"),
        (["methd=grid"], "did you mean 'method'"),
        (["halving={least: 10, reducton: 3}"], "reduction"),
        (["name.x=1"], "name"),
        (["search.name=[a, b]"], "search"),
        (["recipe=quickstrat"], "did you mean 'quickstart'"),
    ],
)
def test_bad_input_is_refused_with_what_would_do(tmp_path: Path, words: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(load_sweep(write(tmp_path), words))
    assert said in str(caught.value)


@pytest.mark.row("S3-28")
def test_a_stage_that_reads_test_splits_before_the_one_that_is_judged_is_refused(tmp_path: Path) -> None:
    words = ["stages.second.lr=[1e-3, 3e-3]", "metric=second.loss", "method=grid"]
    path = tmp_path / "recipe.yaml"
    path.write_text("extends: quickstart\nstages: {align: null, compress: null, second: {kind: align}}\n")
    assert "evaluate" in load_recipe(str(path)).spec.stages
    with pytest.raises(ConfigError, match=r"every trial would make evaluate before second") as caught:
        check(load_sweep(str(path), words))
    assert "stages.evaluate=null" in caught.value.remedy
    assert check(load_sweep(str(path), [*words, "stages.evaluate=null"])).middle == ("second",)
    behind = check(load_sweep("quickstart", ["stages.tune.frozen.lr=[1e-3, 3e-3]", "metric=tune.loss"]))
    assert "evaluate" in behind.later


@pytest.mark.row("S3-28")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data.source.validation=[50, 100]"], "data.source.validation: another split"),
        (["data.source.validation={low: 50, high: 100}"], "data.source.validation: another split"),
        (["data.source=[{validation: 50}, {validation: 100}]"], "data.source.validation: another split"),
        (["data.source.held_out=[200, 300]"], "what is held out to test with: another split"),
        (["search={seed: [0, 1]}"], "search.seed changes data.seed: another split"),
        (["stages.pretrain.trainer.validation.samples=[64, 128]"], "trainer.validation.samples: other samples"),
        (["stages.pretrain.trainer.validation=[{samples: 64}, {samples: 32}]"], "trainer.validation.samples: other"),
        (["stages.pretrain.batch_size=[64, 128]", "metric=pretrain.loss"], "pretrain.batch_size: a contrastive loss"),
        (["stages.pretrain.batch_size=[64, 128]"], ""),
        (["stages.tune.batch_size=[4, 8]", "metric=tune.loss"], ""),
        (["stages.pretrain.trainer.validation.every=[5, 10]"], ""),
    ],
)
def test_what_trials_are_measured_by_is_not_searched(words: list[str], said: str) -> None:
    fixed = [] if any(w.startswith("data.source") for w in words) else ["data.source.validation=100"]
    given = ["metric=pretrain.evaluation", "method=random", *fixed, *words]
    if not said:
        assert check(load_sweep("quickstart", given)).sweep.search
        return
    with pytest.raises(ConfigError) as caught:
        check(load_sweep("quickstart", given))
    assert said in str(caught.value)


NEW = "set={stages.tune.decoder: {kind: new, model_type: mixtral, mixture: {}}}"
COUNTS = "set={stages.tune.tasks: {name.en: 1, yesno: 0, count: 1}}"
DROPS = "set={stages.pretrain.image_tower: {kind: vit, dropout: 0.1}}"
SAID = "set={stages.pretrain.spoken: {}}"
SPOKEN = "stages.pretrain.spoken"
Q_FORMER = "set={stages.pretrain.qformer: {}}"
VIT = "set={stages.pretrain.image_tower: {kind: vit}}"


@pytest.mark.row("S3-28")
@pytest.mark.parametrize(
    ("metric", "words", "said", "instead"),
    [
        ("pretrain.loss", [DROPS, "stages.pretrain.dropout=[0.0, 0.3]"], "how hard", "pretrain.evaluation"),
        ("tune.loss", [COUNTS, "data.questions.canvases=[0, 200]"], "data.questions: other questions", ""),
        ("tune.loss", [COUNTS, "data.questions.canvases=[100, 200]"], "", ""),
        ("tune.evaluation", [COUNTS, "data.questions.canvases=[0, 200]"], "", ""),
        ("tune.evaluation", [COUNTS, "data.questions.test_canvases=[20, 40]"], "data.questions: other questions", ""),
        ("align.evaluation", ["stages.align.beta=[0.1, 0.3]"], "stages.align.beta: the loss", "evaluation/accuracy"),
        ("align.evaluation/margin", ["stages.align.beta={low: 0.1, high: 0.3}"], "align.beta: the loss", ""),
        ("align.loss", ["stages.align.beta=[0.1, 0.3]"], "align.beta: the loss", "evaluation/accuracy"),
        ("align.evaluation/accuracy", ["stages.align.beta=[0.1, 0.3]"], "", ""),
        ("align.evaluation/accuracy", ["stages.align.tasks=[[name.en], [yesno]]"], "align.tasks: other", ""),
        ("align.evaluation", ["stages.align.seed=[0, 1]"], "", ""),
        (
            "align.evaluation",
            ["stages.tune.adapt.lr=[1e-3, 3e-3]"],
            "changes the model that align begins from",
            "tune.eval",
        ),
        (
            "align.evaluation",
            ["data.questions.canvases=[10, 20]"],
            "changes the model that align begins",
            "align alone",
        ),
        (
            "tune.evaluation",
            ["stages.tune.tasks=[{name.en: 1}, {name.en: 1, yesno: 1}]"],
            "stages.tune.tasks: other",
            "",
        ),
        ("tune.evaluation", ["stages.tune.tasks=[{name.en: 1, yesno: 1}, {name.en: 2, yesno: 2}]"], "", ""),
        ("tune.words.loss", ["stages.tune.tasks=[{name.en: 1}, {name.en: 1, yesno: 1}]"], "", ""),
        (
            "tune.evaluation",
            ["stages.tune.decoder=[a, b]"],
            "the tokenizer of stages.tune.decoder: nats",
            "runs compare",
        ),
        ("tune.evaluation", [NEW, "stages.tune.decoder.d=[128, 256]"], "", ""),
        ("tune.evaluation", [NEW, "stages.tune.decoder.mixture.balance=[0.1, 0.2]"], "", ""),
        ("tune.loss", [NEW, "stages.tune.decoder.mixture.balance=[0.1, 0.2]"], "add to the loss", "leaves it out"),
        ("tune.loss/next_token", [NEW, "stages.tune.decoder.mixture.balance=[0.1, 0.2]"], "", ""),
        ("tune.evaluation", ["stages.tune.seed=[0, 1]"], "", ""),
        ("tune.evaluation", ["stages.tune.adapt.drop.most=[0.5, 0.9]"], "", ""),
        ("tune.loss", ["stages.tune.adapt.drop.most=[0.5, 0.9]"], "how hard", "tune.evaluation"),
        ("tune.connector.loss", ["stages.tune.adapt.drop.most=[0.5, 0.9]"], "", ""),
        ("tune.loss", ["stages.tune.views=[0, 4]"], "how hard", "tune.evaluation"),
        ("tune.loss", ["stages.tune.connector.dropout=[0.0, 0.3]"], "", ""),
        ("tune.words.loss", ["stages.tune.connector.dropout=[0.0, 0.3]"], "how hard", "tune.evaluation"),
        ("tune.words.loss", ["stages.tune.connector.tokens=[4, 6]"], "how many words", "tune.evaluation"),
        ("tune.words.loss/name", ["stages.tune.connector.tokens=[4, 6]"], "", ""),
        ("tune.evaluation", ["stages.tune.connector.tokens=[4, 6]"], "", ""),
        ("tune.evaluation", ["data.questions.yes_no=[1, 2]"], "data.questions: other questions", ""),
        ("tune.evaluation", ["data.questions.yes_no_easy=[1, 2]"], "", ""),
        ("tune.loss", ["data.questions.yes_no_easy=[1, 2]"], "data.questions: other questions", ""),
        (
            "tune.evaluation",
            ["set={stages.tune.tasks: {name.en: 1, yesno: 0}}", "data.questions.yes_no=[1, 2]"],
            "",
            "",
        ),
        ("tune.evaluation", ["data.source.variants=[one, all]"], "data.source: other pictures", ""),
        ("tune.evaluation", ["data.source.max_train=[100, 200]"], "", ""),
        ("tune.loss", ["data.source.max_train=[100, 200]"], "how hard", "tune.evaluation"),
        ("tune.seconds", ["stages.tune.views=[0, 4]"], "", ""),
        ("pretrain.evaluation", ["stages.pretrain.dropout=[0.1, 0.3]"], "", ""),
        ("pretrain.loss", ["stages.pretrain.dropout=[0.1, 0.3]"], "how hard", "pretrain.evaluation"),
        ("pretrain.loss", [VIT, "stages.pretrain.image_tower.drop_path=[0.0, 0.1]"], "how hard", "pretrain.evaluation"),
        (
            "pretrain.loss/contrastive",
            ["stages.pretrain.batch_size=[64, 128]"],
            "batch_size: a contrastive",
            "evaluation",
        ),
        ("pretrain.samples_per_s", ["stages.pretrain.batch_size=[64, 128]"], "", ""),
        ("pretrain.evaluation", ["stages.pretrain.scale=[10.0, 20.0]"], "", ""),
        ("pretrain.evaluation", ["stages.pretrain.text_tower=[a, b]"], "", ""),
        (
            "pretrain.evaluation",
            [Q_FORMER, "stages.pretrain.text_tower=[a, b]"],
            "text_tower: nats",
            "evaluation/contrast",
        ),
        ("pretrain.evaluation/contrast", [Q_FORMER, "stages.pretrain.text_tower=[a, b]"], "", ""),
        ("pretrain.evaluation", [SAID, f"{SPOKEN}.speeds=[[150], [170, 190]]"], "the sounds", "alone"),
        ("pretrain.evaluation/contrastive", [SAID, f"{SPOKEN}.speeds=[[150], [170, 190]]"], "", ""),
        ("pretrain.evaluation", [SAID, f"{SPOKEN}.takes=[1, 2]"], "other sounds would judge", "evaluation/contrastive"),
    ],
)
def test_what_moves_the_value_that_judges_is_not_searched(
    metric: str, words: list[str], said: str, instead: str
) -> None:
    sweep = load_sweep("quickstart", ["method=random", f"metric={metric}", *words])
    if not said:
        assert check(sweep).sweep.search
        return
    with pytest.raises(ConfigError) as caught:
        check(sweep)
    assert said in caught.value.cause
    assert caught.value.place.startswith("search.")
    assert instead in caught.value.remedy


@pytest.mark.row("S3-28")
def test_decoders_of_one_tokenizer_are_searched(tmp_path: Path) -> None:
    for name, template in (("small", "a"), ("large", "a"), ("other", "b")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(f'{{"name": "{name}"}}')
        (folder / "tokenizer.json").write_text("{}")
        (folder / "chat_template.jinja").write_text(template)
    small, large, other = (str(tmp_path / name) for name in ("small", "large", "other"))
    given = ["metric=tune.evaluation", "method=random"]
    assert check(load_sweep("quickstart", [*given, f"stages.tune.decoder=[{small}, {large}]"])).sweep.search
    for one in (other, "smollm2"):
        with pytest.raises(ConfigError, match="another chat template"):
            check(load_sweep("quickstart", [*given, f"stages.tune.decoder=[{small}, {one}]"]))


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        ("align.evaluation/accuracy", ""),
        ("align.loss/accuracy", ""),
        ("align.evaluation_training", "judge by align.evaluation, of the validation split"),
        ("tune.words.evaluation_training", "judge by tune.evaluation, of"),
        ("tune.words.evaluation", "which learns words, is not judged"),
        ("tune.evaluation_training/text", "judge by tune.evaluation, of"),
        ("align.accuracy", "a score of a test split"),
        ("align.test/evaluation", "a score of a test split"),
        ("align.retrieval", "a score of a test split"),
        ("evaluate.evaluation", "a score of a test split"),
    ],
)
def test_a_term_of_the_loss_is_no_test_score(metric: str, said: str) -> None:
    sweep = load_sweep("quickstart", ["stages.align.lr=[1e-4, 3e-4]", f"metric={metric}"])
    if not said:
        assert check(sweep).field == metric.partition(".")[2]
        return
    with pytest.raises(ConfigError, match=said):
        check(sweep)


def test_more_of_some_terms_is_better() -> None:
    def found(*words: str) -> str:
        return load_sweep("quickstart", ["stages.align.lr=[1e-4, 3e-4]", *words]).direction

    assert found("metric=align.evaluation/accuracy") == found("metric=align.evaluation/margin") == "maximize"
    assert found("metric=align.tokens_per_s") == "maximize"
    assert found("metric=align.evaluation") == found("metric=align.evaluation/dpo") == "minimize"
    assert found("metric=align.evaluation/accuracy", "direction=minimize") == "minimize"


def test_no_search_and_no_metric(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="search"):
        load_sweep("quickstart", ["metric=pretrain.loss"])
    with pytest.raises(ConfigError, match="metric is missing"):
        load_sweep(write(tmp_path, GOOD.replace("metric: tune.evaluation", "")))
    with pytest.raises(ConfigError, match="no recipe called"):
        load_sweep("nothing", ["metric=pretrain.loss"])
