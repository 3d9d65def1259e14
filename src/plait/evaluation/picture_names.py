"""A dual encoder on one split: every picture against every name of the split, both ways, and what it answered."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from plait.assembly.pairs import Pairs
from plait.core.types import Score
from plait.data.pair_batches import StoredPixels, picked
from plait.evaluation.retrieval import Direction, Gallery, chance_scores, rank_scores
from plait.evaluation.statistics import paired_difference
from plait.models.dual import DualEncoder, rows

_BATCH = 32  # pictures that a tower encodes together: their activations, not their pixels, take the memory


@dataclass(frozen=True, slots=True)
class RetrievalResult:
    """Similarity of every picture with every name of a split, and the ranks that follow from it."""

    similarity: Float[np.ndarray, "picture text"]
    directions: dict[str, Direction]

    def recall_at_1(self) -> float:
        """Share of pictures whose name came first."""
        return float((self.directions["image-to-text"].ranks <= 1).mean())


class RetrievalTask:
    """Image-text retrieval on one test split; scores a dual encoder as often as asked.

    Args:
        pairs: The split.
        name: What it is called in score names.
        seed: Seed of the bootstrap.
    """

    def __init__(self, pairs: Pairs, *, name: str, seed: int = 0) -> None:
        self.pairs = pairs
        self.name = name
        self.seed = seed
        self.gallery = Gallery(pairs.names, pairs.concepts)
        row = {text: listed[0] for text, listed in zip(pairs.names, pairs.texts_of, strict=True)}
        self._candidates = torch.tensor([row[text] for text in self.gallery.texts], device=pairs.text.device)

    @torch.no_grad()
    def evaluate(self, model: DualEncoder) -> RetrievalResult:
        """Compare all pictures with all names, without dropout; the model's mode is put back.

        Raises:
            NumericsError: A similarity is NaN.
        """
        training = model.training
        model.eval()
        number = len(self.pairs.ids)
        step = _BATCH if isinstance(self.pairs.image, StoredPixels) else max(number, 1)  # features: all at once
        parts = [
            model.embed_image(picked(self.pairs.image, range(at, min(at + step, number))))
            for at in range(0, max(number, 1), step)
        ]
        image, text = torch.cat(parts), model.embed_text(rows(self.pairs.text[self._candidates]))
        model.train(training)
        similarity = (image @ text.T).double().cpu().numpy()
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


def compare(task: RetrievalTask, trained: RetrievalResult, untrained: RetrievalResult) -> list[Score]:
    """Scores of a trained model beside chance and its own untrained heads.

    Names are ``retrieval/<split>/<direction>/<metric>`` for the model, with ``/chance``, ``/untrained`` and (of R@1, as
    a paired difference) ``/gain-over-untrained`` behind for the rest.
    """
    scores: list[Score] = []
    for way, found in trained.directions.items():
        name, raw = f"retrieval/{task.name}/{way}", untrained.directions[way]
        scores += rank_scores(found.ranks, name=name, groups=found.groups, seed=task.seed)
        scores += [_renamed(s, "chance") for s in chance_scores(found.correct, name=name)]
        bare = rank_scores(raw.ranks, name=name, groups=raw.groups, seed=task.seed)
        scores += [_renamed(s, "untrained") for s in bare]
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


def _renamed(score: Score, suffix: str) -> Score:
    return Score(
        name=f"{score.name}/{suffix}",
        value=score.value,
        low=score.low,
        high=score.high,
        n=score.n,
        rule=score.rule,
        failures=score.failures,
    )
