"""What trials of a sweep are measured by: settings that move it are not searched, since values would not compare."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from plait.core.errors import ConfigError, PlaitError
from plait.models import specs
from plait.recipes.recipe import Recipe
from plait.stages.align import Align
from plait.stages.data import EmojiSource
from plait.stages.pretrain import Pretrain
from plait.stages.stage import Stage
from plait.stages.tune import Tune

EVALUATION, ON_TRAINING = "evaluation", "evaluation_training"
"""Fields of ``metrics.jsonl`` of samples for judging, as the loop calls them; ``loss`` is of the batch of a step."""

_WORDS = "words"
_UNSEEN = {"validation", "held_out", "test_fraction", "max_train", "max_test", "min_rows", "licence", "size"}
"""Of a source: what changes no picture and no text of the split that judges, or is looked at by itself."""
_MADE: Mapping[str, tuple[str, ...]] = {
    "chinese": ("name.zh",),
    "yes_no": ("yesno",),
    "groups": ("group",),
    "test_canvases": ("left", "right", "above", "count"),
}
"""Settings of questions, and the tasks of which they make some, in the splits that are held out."""
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """The number that trials are judged by.

    Attributes:
        stage: Its name in the recipe.
        phase: Of tune; else empty.
        field: Of ``metrics.jsonl``.
    """

    stage: str
    phase: str
    field: str

    @property
    def evaluates(self) -> bool:
        """Whether it is of samples that are there for judging."""
        return self.field.startswith(EVALUATION)

    @property
    def trains(self) -> bool:
        """Whether it is of the samples of a training step."""
        return self.field.partition("/")[0] == "loss"

    @property
    def term(self) -> str:
        """Of the loss; empty where it is all of it."""
        return self.field.partition("/")[2]


class Measure(NamedTuple):
    """Something that the value of a metric depends on, beside how good the model is.

    Attributes:
        what: Settings or what they change, where ``{stage}`` is that of the metric.
        of: What it is in a recipe; None where it does not count.
        why: It may not differ.
        instead: What is not moved by it, or another way.
    """

    what: str
    of: Callable[[Recipe, Judge], Any]
    why: str
    instead: str = ""


def check_measure(key: str, tried: Sequence[Recipe], judge: Judge) -> None:
    """See that a searched setting changes what is trained, and not what it is measured by.

    Args:
        key: The setting.
        tried: Recipes with its values.
        judge: What is measured.

    Raises:
        ConfigError: Values of the metric would not compare.
    """
    for measure in MEASURES:
        if len({json.dumps(measure.of(recipe, judge), sort_keys=True) for recipe in tried}) > 1:
            instead = f"{measure.instead}; or " if measure.instead else ""
            said = {"stage": judge.stage, "field": judge.field}
            raise ConfigError(
                f"search.{key} changes {measure.what}: {measure.why}: trials would not compare".format(**said),
                place=f"search.{key}",
                remedy=f"{instead}take it out, or give it one value under `set`".format(**said),
            )


def check_reference(key: str, recipe: Recipe, judge: Judge) -> None:
    """See that no align stage is to judge what is before it: its loss is relative to the model it begins from.

    Args:
        key: A searched setting of an earlier stage than the one that judges.
        recipe: Any of a trial.
        judge: What is measured.

    Raises:
        ConfigError: One is.
    """
    if isinstance(recipe.stages[judge.stage], Align) and (judge.evaluates or judge.trains):
        names = list(recipe.stages)
        tunes = [name for name in names[: names.index(judge.stage)] if isinstance(recipe.stages[name], Tune)]
        instead = f"judge by {tunes[-1]}.evaluation; or " if tunes else ""
        raise ConfigError(
            f"search.{key} changes the model that {judge.stage} begins from: {judge.field} says how far answers moved "
            "from what that model gave them, and begins at the same value for a poor one: trials would not compare",
            place=f"search.{key}",
            remedy=f"{instead}search settings of {judge.stage} alone",
        )


# --- what the data stage holds out ---------------------------------------------------------------------------------


def _held_out(recipe: Recipe, judge: Judge) -> float:
    source = recipe.data.source
    return float(source.held_out) if isinstance(source, EmojiSource) else source.test_fraction


def _samples(recipe: Recipe, judge: Judge) -> int:
    part = recipe.stages[judge.stage]
    judged = part.trainer.validation if isinstance(part, Pretrain | Tune | Align) and judge.evaluates else None
    return judged.samples if judged else 0


def _source(recipe: Recipe, judge: Judge) -> Any:
    """Where the pictures and texts come from."""
    counts = judge.evaluates or judge.trains
    return recipe.data.source.model_dump(mode="json", exclude=_UNSEEN) if counts else None


def _questions(recipe: Recipe, judge: Judge) -> Any:
    """What is asked of the split that judges, as far as it is of the tasks that do."""
    tasks = set(_shares(recipe.stages[judge.stage]))
    if not tasks or judge.phase == _WORDS or not (judge.evaluates or judge.trains):
        return None
    asked = recipe.data.questions
    found = {name: getattr(asked, name) for name, made in _MADE.items() if tasks & set(made)}
    if "test_canvases" in found and isinstance(recipe.data.source, EmojiSource):
        found["size"] = recipe.data.source.size
    if "test_canvases" in found and judge.trains:  # how many there are moves no share, but whether there are any does
        found |= {"canvases": asked.canvases > 0}
    if "yes_no" in found and judge.trains:
        found["yes_no_easy"] = asked.yes_no_easy
    spoken = asked.spoken.model_dump(mode="json", exclude={"test_voices"}) if asked.spoken else None
    return found | {"spoken": spoken}


# --- what is asked, and what the loss is ---------------------------------------------------------------------------


def _shares(part: Stage) -> dict[str, float]:
    """Share of each task in what judges; of align, that takes as many of each as there are, the place in the list."""
    if isinstance(part, Align):
        return {str(task): float(place) for place, task in enumerate(part.tasks)}
    if not isinstance(part, Tune):
        return {}
    whole = sum(part.tasks.values()) or 1.0
    return {str(task): round(share / whole, 9) for task, share in part.tasks.items() if share}


def _tasks(recipe: Recipe, judge: Judge) -> Any:
    counts = (judge.evaluates or judge.trains) and judge.phase != _WORDS
    return _shares(recipe.stages[judge.stage]) if counts else None


def _beta(recipe: Recipe, judge: Judge) -> Any:
    part = recipe.stages[judge.stage]
    counts = (judge.evaluates or judge.trains) and judge.term != "accuracy"
    return part.beta if isinstance(part, Align) and counts else None


def _decoder(recipe: Recipe, judge: Judge) -> Any:
    """How a tune stage cuts texts into tokens, and what it frames them by."""
    from plait.assembly.local import find_decoder

    part = recipe.stages[judge.stage]
    if not isinstance(part, Tune) or not (judge.evaluates or judge.trains):
        return None
    return _reads(part.decoder if isinstance(part.decoder, str) else part.decoder.tokenizer, find_decoder)


def _texts(recipe: Recipe, judge: Judge) -> Any:
    """How a Q-Former that writes cuts texts into tokens."""
    from plait.assembly.local import TEXT_TOWER, find_tower

    part = recipe.stages[judge.stage]
    if not isinstance(part, Pretrain) or part.qformer is None or not (judge.evaluates or judge.trains):
        return None
    assert isinstance(part.text_tower, str)  # of a Q-Former
    writes = judge.term in ("", "generate")
    return _reads(part.text_tower, lambda name: find_tower(name, TEXT_TOWER)) if writes else None


def _reads(name: str, find: Callable[[str], Path]) -> Any:
    """Digests of what belongs to a tokenizer in a local folder; what is no such folder stands for itself."""
    from plait.core.files import sha256_file

    try:
        folder = find(name) if Path(name).is_dir() else None
    except PlaitError:
        folder = None
    files = [folder / file for file in _TOKENIZER if (folder / file).is_file()] if folder else []
    return {file.name: sha256_file(file) for file in files} or name


def _objective(recipe: Recipe, judge: Judge) -> Any:
    """What a pretrain stage minimizes, and the views that it compares: held-out pictures are changed, too."""
    part = recipe.stages[judge.stage]
    if not isinstance(part, Pretrain) or not (judge.evaluates or judge.trains):
        return None
    found = part.model_dump(mode="json", include={"objective", "views"})
    return found | {"qformer": part.qformer is not None}


def _sounds(recipe: Recipe, judge: Judge) -> Any:
    part = recipe.stages[judge.stage]
    counts = (judge.evaluates or judge.trains) and judge.term != "contrastive"
    if not isinstance(part, Pretrain) or part.spoken is None or not counts:
        return None
    return part.spoken.model_dump(mode="json", include={"takes", "voices", "speeds", "max_seconds"})


# --- what only the loss of training depends on ---------------------------------------------------------------------


def _compared(recipe: Recipe, judge: Judge) -> Any:
    """Pairs that a contrastive loss tells apart in a step."""
    part = recipe.stages[judge.stage]
    return part.batch_size if isinstance(part, Pretrain) and judge.trains else None


def _terms(recipe: Recipe, judge: Judge) -> Any:
    """What experts add to a loss."""
    part = recipe.stages[judge.stage]
    if not isinstance(part, Tune) or isinstance(part.decoder, str) or part.decoder.mixture is None:
        return None
    added = {**part.decoder.mixture.model_dump(mode="json"), "depth": part.decoder.depth}
    return added if judge.trains and judge.term != "next_token" and judge.phase != _WORDS else None


def _word_targets(recipe: Recipe, judge: Judge) -> Any:
    """Words of a name that tune's first phase is asked for."""
    part = recipe.stages[judge.stage]
    counts = judge.phase == _WORDS and judge.trains and judge.term != "name"
    if not counts or not isinstance(part, Tune) or not isinstance(part.connector, specs.Words):
        return None
    return part.connector.tokens - part.connector.free


def _hardness(recipe: Recipe, judge: Judge) -> Any:
    """What makes samples of training harder or easier than they are."""
    if not judge.trains:
        return None
    part, found = recipe.stages[judge.stage], {"max_train": recipe.data.source.max_train}
    if isinstance(part, Pretrain):
        inside = part.qformer if part.qformer is not None else part.image_tower
        return found | {"dropout": part.dropout, "keywords": part.keywords, "inside": _drops(inside)}
    if isinstance(part, Tune):
        speaks = isinstance(part.connector, specs.Words)
        found |= {"views": part.views}
        if speaks:
            found |= {"share": part.words.share}
        if not speaks or judge.phase == _WORDS:  # one that speaks in words drops nothing once the words are learned
            found |= {"inside": _drops(part.connector)}
        if part.audio_tower and judge.phase != _WORDS:
            found |= {"heard": _drops(part.audio_connector)}
        if judge.phase == "decoder":
            found |= {"drop": part.adapt.drop.model_dump(mode="json"), "new_from": part.new_from}
            found |= {"new_pictures": part.new_pictures}
    return found


def _drops(part: object) -> dict[str, Any]:
    return {name: rate for name in ("dropout", "drop_path", "patch_dropout") if (rate := getattr(part, name, 0.0))}


MEASURES: tuple[Measure, ...] = (
    Measure(
        "data.source.validation",
        lambda recipe, judge: recipe.data.source.validation,
        "another split would judge, and less be left to train on",
    ),
    Measure(
        "what is held out to test with",
        _held_out,
        "another split would judge, and more or less be left to train on",
    ),
    Measure(
        "data.seed",
        lambda recipe, judge: recipe.data.seed,
        "another split would judge",
        "search stages.{stage}.seed, which the samples that judge do not depend on",
    ),
    Measure("data.source", _source, "other pictures or texts would judge"),
    Measure(
        "stages.{stage}.trainer.validation.samples",
        _samples,
        "other samples would judge, and a contrastive loss grows with their number",
    ),
    Measure("stages.{stage}.tasks", _tasks, "other questions would judge"),
    Measure("data.questions", _questions, "other questions would judge"),
    Measure(
        "stages.{stage}.beta",
        _beta,
        "the loss of the same answers depends on it",
        "judge by {stage}.evaluation/accuracy, which does not",
    ),
    Measure(
        "the tokenizer of stages.{stage}.decoder",
        _decoder,
        "nats a token of other tokens, or behind another chat template, are another measure",
        "compare whole runs by their test scores (`plait runs compare`)",
    ),
    Measure(
        "the tokenizer of stages.{stage}.text_tower",
        _texts,
        "nats a token of other tokens are another measure",
        "judge by {stage}.evaluation/contrast or {stage}.evaluation/match",
    ),
    Measure(
        "the objective (stages.{stage}.qformer)",
        _objective,
        "another loss would judge",
        "compare whole runs by their test scores (`plait runs compare`)",
    ),
    Measure(
        "the sounds of stages.{stage}.spoken",
        _sounds,
        "the loss has other terms, or other sounds would judge",
        "judge by {stage}.evaluation/contrastive, of pictures and texts alone",
    ),
    Measure(
        "stages.{stage}.batch_size",
        _compared,
        "a contrastive loss grows with the pairs it tells apart",
        "judge by {stage}.evaluation, which has its own",
    ),
    Measure(
        "what the experts of stages.{stage}.decoder add to the loss",
        _terms,
        "it is a part of {field}",
        "judge by {stage}.evaluation, which leaves it out",
    ),
    Measure(
        "how many words of a name the first phase is asked for",
        _word_targets,
        "{field} is their mean",
        "judge by {stage}.evaluation, of the last phase",
    ),
    Measure(
        "how hard the samples of training are",
        _hardness,
        "{field} is of these",
        "judge by {stage}.evaluation, of samples as they are, without dropout",
    ),
)
"""It must be the same in all trials."""
