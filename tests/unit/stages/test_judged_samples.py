"""Which samples judge a training: the same ones whatever the stage's seed is."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from plait.assembly import said
from plait.assembly.audio_towers import AudioTower
from plait.assembly.multimodal import Multimodal
from plait.assembly.pairs import Pairs, Texts
from plait.assembly.questions import Questions
from plait.core.device import Compute
from plait.core.events import Events
from plait.core.types import Answer, Sample, Text, Turn
from plait.data.features import FeatureStore
from plait.data.preference_batches import PreferenceBatches
from plait.data.spoken import Saying
from plait.models.specs import QFormerShape
from plait.objectives.contrastive import Contrastive
from plait.stages.align import Align
from plait.stages.aligning.validating import judged_pairs
from plait.stages.pretrain import Pretrain
from plait.stages.pretraining.validating import judge_pairs, judge_queries
from plait.stages.tune import Tune
from plait.stages.tuning.validating import judged_questions
from plait.training.trainer import Trainer, Validate
from plait.training.validate import Validation

SEEDS = (0, 1, 7)
JUDGED = Trainer(validation=Validate(samples=6))
COMPUTE = Compute(device="cpu", dtype="float32", threads=1, why=())
NUMBER = 20


def question(number: int) -> Sample:
    turns = (
        Turn(role="user", parts=(Text(text="?"),)),
        Turn(role="assistant", parts=(Text(text=f"thing {number}"),), trained=True),
    )
    answers = (
        Answer(kind="reference", name="name.en", text=f"thing {number}"),
        Answer(kind="rejected", name="name.en", text="none"),
    )
    return Sample(id=f"{number:03}", turns=turns, answers=answers, meta={"task": "name.en"})


QUESTIONS = [question(number) for number in range(NUMBER)]


def ids(validation: Validation | None) -> list[list[tuple[str, ...]]]:
    assert validation is not None
    assert validation.trained is not None
    return [[batch.sample_ids for batch in of.batches()] for of in (validation.held, validation.trained)]


@pytest.mark.row("S3-28")
def test_questions_of_tune() -> None:
    found = [judged_questions(Tune(seed=seed, trainer=JUDGED), QUESTIONS) for seed in SEEDS]
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 6


@pytest.mark.row("S3-28")
def test_pairs_of_align(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(shards: Path, splits: Any, image: Any, *, choose: Any, **named: Any) -> Any:
        return Mock(spec=Questions, samples={split: choose(split, QUESTIONS) for split in splits})

    def batches(stage: Align, built: Any, questions: Any, samples: Any, *, rank: int, world: int) -> Any:
        return Mock(spec=PreferenceBatches, ids=[sample.id for sample in samples])

    monkeypatch.setattr("plait.assembly.questions.read_questions", read)
    monkeypatch.setattr("plait.assembly.splits.splits_of", lambda *args, **named: ("train", "validation"))
    monkeypatch.setattr(Align, "batches", batches)
    built = Mock(spec=Multimodal, image=None, audio=None)
    judged: list[Any] = []
    learned: list[Any] = []
    for seed in SEEDS:
        stage = Align(seed=seed, tasks=("name.en",), trainer=JUDGED, steps=2, batch_size=10)
        questions, _ = stage._questions(built, Path(), Events())  # pyright: ignore[reportPrivateUsage]
        judged.append([(split, of.ids) for split, of in judged_pairs(stage, built, questions).items()])  # pyright: ignore[reportAttributeAccessIssue]
        learned.append(questions.samples["train"])
    assert judged[0] == judged[1] == judged[2]
    assert [(split, len(samples)) for split, samples in judged[0]] == [("validation", 6), ("train", 6)]
    assert learned[0] != learned[1], "training itself goes by the stage's seed"


@pytest.mark.row("S3-28")
def test_pairs_of_a_dual_encoder() -> None:
    texts = tuple((number,) for number in range(NUMBER))
    names = tuple(f"{number:03}" for number in range(NUMBER))
    pairs = Pairs(
        ids=names,
        names=names,
        concepts=names,
        uris=names,
        image=torch.arange(2.0 * NUMBER).view(NUMBER, 2),
        text=torch.arange(2.0 * NUMBER).view(NUMBER, 2),
        texts_of=texts,
        classes=torch.arange(NUMBER),
    )
    splits = {"train": pairs, "validation": pairs}
    found = [
        ids(
            judge_pairs(
                Pretrain(seed=seed, trainer=JUDGED), nn.Linear(1, 1), Contrastive(), splits=splits, compute=COMPUTE
            )
        )
        for seed in SEEDS
    ]
    assert found[0] == found[1] == found[2]
    assert len(found[0][0][0]) == 6


@pytest.mark.row("S3-28")
def test_pairs_and_negatives_of_a_q_former() -> None:
    names = tuple(f"{number:064}" for number in range(NUMBER))
    store = FeatureStore(2, torch.float32)
    for name in names:
        store.add(torch.ones(1, 2), [(name, 1, 1, 1)])
    texts = Texts(
        ids=names,
        names=names,
        concepts=names,
        uris=names,
        sha256s=names,
        texts=names,
        texts_of=tuple((number,) for number in range(NUMBER)),
        classes=tuple(range(NUMBER)),
    )
    words: Any = SimpleNamespace(ids=lambda listed: [[1, 2] for _ in listed], pad=0)
    built: Any = SimpleNamespace(model=nn.Linear(1, 1))
    splits = {"train": texts, "validation": texts}
    found = [
        judge_queries(
            Pretrain(seed=seed, trainer=JUDGED, qformer=QFormerShape()),
            built,
            splits,
            store=store,
            words=words,
            compute=COMPUTE,
        )
        for seed in SEEDS
    ]
    assert ids(found[0]) == ids(found[1]) == ids(found[2])
    assert len({validation.held.objective.seed for validation in found if validation}) == 1  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.row("S3-28")
def test_voices_that_say_the_names_of_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: dict[str, list[Any]] = {"train": [], "validation": [], "test-style": []}

    def say_all(names: Any, saying: Saying, *, trained: bool, made: Any) -> Any:
        (split,) = names
        heard[split].append([saying.takes_of(f"name {number}", trained=trained) for number in range(9)])
        return said._Sounds(of_name={"a": ("b",)}, unsaid=Counter(), long=0)  # pyright: ignore[reportPrivateUsage]

    monkeypatch.setattr(said, "check_voice", lambda voice: None)
    monkeypatch.setattr(said, "_say_all", say_all)
    for silent in ("cached_features", "_tell"):
        monkeypatch.setattr(said, silent, lambda *args, **named: None)
    monkeypatch.setattr(said, "_with_sounds", lambda pairs, *args: pairs)
    splits = {split: Mock(spec=Pairs, names=(split,)) for split in heard}
    tower = Mock(spec=AudioTower, prepare=None, encoder=None, cache_key="")
    for seed in SEEDS:
        saying = Saying(
            voices=("a", "b"), test_voices=("c", "d"), speeds=(1, 2, 3), takes=2, max_seconds=4.0, seed=seed
        )
        said.say_names(splits, tower, saying, cache=Path(), events=Events())
    one, other, another = heard["validation"]
    assert one == other == another
    assert heard["train"][0] != heard["train"][1]
    assert heard["test-style"][0] != heard["test-style"][1]
