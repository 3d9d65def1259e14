"""A dual encoder on one split: every picture against every name of the split, both ways, and what it answered."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from plait.assembly.pairs import Named, Pairs
from plait.core.errors import NumericsError
from plait.core.tensors import Patches
from plait.core.types import Score
from plait.data.pair_batches import StoredPixels, StoredTokens, picked
from plait.evaluation.retrieval import Direction, Gallery, chance_scores, rank_scores
from plait.evaluation.space import Vectors, space_scores
from plait.evaluation.statistics import paired_difference
from plait.models.dual import DualEncoder, rows

_BATCH = 32  # pictures or texts that a tower encodes together: their activations, not their pixels, take the memory


@dataclass(frozen=True, slots=True)
class RetrievalResult:
    """Similarity of every picture with every name of a split, and the ranks that follow from it."""

    similarity: Float[np.ndarray, "picture text"]
    directions: dict[str, Direction]

    def recall_at_1(self) -> float:
        """Share of pictures whose name came first."""
        return float((self.directions["image-to-text"].ranks <= 1).mean())


@dataclass(frozen=True, slots=True, kw_only=True)
class Halves:
    """Two modalities of one split in the shared space, one pair a row: what its shape is measured on.

    Attributes:
        name: Prefix of score names: ``space/<split>``, or ``space/<split>/<side>-audio``.
        first: Unit vectors.
        second: Unit vectors.
        groups: Concept of each pair.
        sides: What the two are.
    """

    name: str
    first: Vectors
    second: Vectors
    groups: tuple[str, ...]
    sides: tuple[str, str]

    def scores(self, *, seed: int) -> list[Score]:
        """All measures of :mod:`plait.evaluation.space`.

        Raises:
            DataError: There are too few concepts, or vectors that do not differ.
        """
        return space_scores(self.first, self.second, name=self.name, groups=self.groups, sides=self.sides, seed=seed)


class NamedTask:
    """Image-text retrieval on one test split, whoever says how similar pictures and names are.

    Args:
        pairs: The split.
        name: What it is called in score names.
        seed: Seed of the bootstrap.
    """

    def __init__(self, pairs: Named, *, name: str, seed: int = 0) -> None:
        self.pairs: Named = pairs
        self.name = name
        self.seed = seed
        self.gallery = Gallery(pairs.names, pairs.concepts)

    def result(self, similarity: Float[np.ndarray, "picture text"]) -> RetrievalResult:
        """Ranks that follow from the similarity of each picture with each name of the gallery.

        Raises:
            NumericsError: A similarity is NaN.
        """
        if lost := int(np.isnan(similarity).any(1).sum()):
            raise NumericsError(
                f"of {lost} of {len(similarity)} pictures the model makes no numbers (NaN): its weights have run away",
                place=f"split {self.name}",
                remedy="lower the learning rate, or let steps warm up (trainer.schedule.warmup); the warnings before "
                "this name the first step and module; checkpoints saved before are as they were",
            )
        return RetrievalResult(similarity, self.gallery.directions(similarity))

    def answers(self, result: RetrievalResult, *, limit: int | None = None) -> list[dict[str, Any]]:
        """The five nearest names of each picture, or of the first few, as records of ``predictions.jsonl``."""
        pairs, ranks = self.pairs, result.directions["image-to-text"].ranks
        return [
            {
                "id": pairs.ids[i],
                "split": self.name,
                "uri": pairs.uris[i],
                "concept": pairs.concepts[i],
                "truth": pairs.names[i],
                "rank": int(ranks[i]),
                "top": [
                    {"text": text, "score": round(score, 4)}
                    for text, score in self.gallery.nearest(result.similarity[i], 5)
                ],
            }
            for i in range(min(len(pairs.ids), limit or len(pairs.ids)))
        ]


class RetrievalTask(NamedTask):
    """Image-text retrieval on one test split; scores a dual encoder as often as asked.

    Args:
        pairs: The split.
        name: What it is called in score names.
        seed: Seed of the bootstrap.
    """

    def __init__(self, pairs: Pairs, *, name: str, seed: int = 0) -> None:
        super().__init__(pairs, name=name, seed=seed)
        self.features = pairs
        row = {text: listed[0] for text, listed in zip(pairs.names, pairs.texts_of, strict=True)}
        self._candidates = [row[text] for text in self.gallery.texts]
        sounds_of = pairs.sounds_of or ((),) * len(pairs.names)  # none at all where nothing was said
        said = {text: listed[0] for text, listed in zip(pairs.names, sounds_of, strict=True) if listed}
        self._said = [number for number, text in enumerate(self.gallery.texts) if text in said]
        self._sounds = [said[self.gallery.texts[number]] for number in self._said]

    @torch.no_grad()
    def evaluate(self, model: DualEncoder) -> RetrievalResult:
        """Compare all pictures with all names, without dropout; the model's mode is put back.

        Raises:
            NumericsError: A similarity is NaN.
        """
        image, text = self._vectors(model)
        result = self.result(image @ text.T)
        if self.features.audio is not None and self._said:
            sound = self._heard(model, self.features.audio[self._sounds])
            result.directions.update(self.gallery.heard(image @ sound.T, text @ sound.T, said=self._said))
        return result

    @torch.no_grad()
    def halves(self, model: DualEncoder) -> list[Halves]:
        """Each picture and its own name, without dropout; where there are sounds, each of both with its sound, too."""
        image, text = self._vectors(model)
        place = {name: number for number, name in enumerate(self.gallery.texts)}
        own = text[[place[name] for name in self.pairs.names]]
        name, concepts = f"space/{self.name}", self.pairs.concepts
        found = [Halves(name=name, first=image, second=own, groups=concepts, sides=("image", "text"))]
        if self.features.audio is None:
            return found
        heard = [pair for pair, listed in enumerate(self.features.sounds_of) if listed]
        groups = tuple(concepts[pair] for pair in heard)
        sound = self._heard(model, self.features.audio[[self.features.sounds_of[pair][0] for pair in heard]])
        for side, vectors in (("image", image[heard]), ("text", own[heard])):
            of = f"{name}/{side}-audio"
            found.append(Halves(name=of, first=vectors, second=sound, groups=groups, sides=(side, "audio")))
        return found

    @staticmethod
    def _heard(model: DualEncoder, features: Float[torch.Tensor, "sound f"]) -> Float[np.ndarray, "sound d"]:
        """Unit vectors of sounds, in float64; the model's mode is put back."""
        training = model.training
        model.eval()
        found = model.embed_audio(rows(features))
        model.train(training)
        return found.double().cpu().numpy()

    def _vectors(self, model: DualEncoder) -> tuple[Vectors, Vectors]:
        """Unit vectors of all pictures and of all names of the gallery, in float64; the model's mode is put back."""
        training = model.training
        model.eval()
        pairs = self.features
        image = _embedded(model.embed_image, pairs.image, range(len(pairs.ids)))
        text = _embedded(model.embed_text, pairs.text, self._candidates)
        model.train(training)
        return image.double().cpu().numpy(), text.double().cpu().numpy()


def _embedded(
    embed: Callable[[Patches], torch.Tensor], source: torch.Tensor | StoredPixels | StoredTokens, numbers: Sequence[int]
) -> torch.Tensor:
    """Vectors of some items: features all at once, what a tower reads a few at a time."""
    step = max(len(numbers), 1) if isinstance(source, torch.Tensor) else _BATCH
    return torch.cat([embed(picked(source, numbers[at : at + step])) for at in range(0, max(len(numbers), 1), step)])


def compare(task: NamedTask, trained: RetrievalResult, untrained: RetrievalResult) -> list[Score]:
    """Scores of a trained model beside chance and its own untrained heads.

    Names are ``retrieval/<split>/<direction>/<metric>`` for the model, with ``/chance``, ``/untrained`` and (of R@1, as
    a paired difference) ``/gain-over-untrained`` behind for the rest.
    """
    scores: list[Score] = []
    for way, found in trained.directions.items():
        name, raw = f"retrieval/{task.name}/{way}", untrained.directions[way]
        scores += rank_scores(found.ranks, name=name, groups=found.groups, seed=task.seed)
        scores += [beside(s, "chance") for s in chance_scores(found.correct, name=name)]
        bare = rank_scores(raw.ranks, name=name, groups=raw.groups, seed=task.seed)
        scores += [beside(s, "untrained") for s in bare]
        scores.append(
            paired_difference(
                (found.ranks <= 1).astype(np.float64),
                (raw.ranks <= 1).astype(np.float64),
                name=f"{name}/R@1/gain-over-untrained",
                rule="hit@1/any-correct/ties-worst",
                groups=found.groups,
                seed=task.seed,
            )
        )
    return scores


def beside(score: Score, suffix: str) -> Score:
    """The same score, named as one that another stands beside."""
    return Score(
        name=f"{score.name}/{suffix}",
        value=score.value,
        low=score.low,
        high=score.high,
        n=score.n,
        rule=score.rule,
        failures=score.failures,
    )
