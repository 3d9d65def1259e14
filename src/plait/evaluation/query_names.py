"""A Q-Former's first stage on one split: pictures against names, the nearest judged again, and names it writes."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from plait.assembly.pairs import Texts
from plait.assembly.queries import TextTokens
from plait.core.types import Score
from plait.data.caption_batches import padded
from plait.data.features import FeatureStore
from plait.evaluation.picture_names import NamedTask, RetrievalResult, beside
from plait.evaluation.retrieval import first_ranks, rank_scores
from plait.evaluation.statistics import paired_difference
from plait.evaluation.text import exact_match
from plait.models.blip2 import Blip2Stage1
from plait.models.ragged import Rows

JUDGED = 16
"""Nearest names of a picture, and pictures of a name, that are judged again."""

_BATCH = 64


class QueryTask(NamedTask):
    """Image-text retrieval on one test split by the nearest query (ITC), by judging (ITM), and writing (ITG).

    Args:
        pairs: The split.
        store: Features of its pictures.
        words: Tokenizer.
        name: What it is called in score names.
        seed: Seed of the bootstrap.
    """

    def __init__(self, pairs: Texts, store: FeatureStore, words: TextTokens, *, name: str, seed: int = 0) -> None:
        super().__init__(pairs, name=name, seed=seed)
        self._sha256s, self._store, self._words = pairs.sha256s, store, words
        self._ids, present = padded(words.ids(self.gallery.texts), pad=words.pad)
        self._present = present.bool()

    @torch.no_grad()
    def evaluate(self, model: Blip2Stage1) -> RetrievalResult:
        """Compare all pictures with all names; the model is in eval mode.

        Raises:
            NumericsError: A similarity is NaN.
        """
        text = model.embed_text(*self._texts(model, torch.arange(len(self._ids))))
        number = len(self._sha256s)
        parts = [
            model.contrast.similarity(model.embed_image(self._look(model, range(at, min(at + _BATCH, number)))), text)
            for at in range(0, number, _BATCH)
        ]
        return self.result(torch.cat(parts).double().cpu().numpy())

    @torch.no_grad()
    def judge(self, model: Blip2Stage1, result: RetrievalResult, *, most: int = JUDGED) -> dict[str, np.ndarray]:
        """Ranks, by direction, where the nearest ``most`` candidates of each query are put in a new order.

        They stand before all others, by how much surer of yes than of no the judgement is.

        Args:
            model: In eval mode.
            result: Of :meth:`evaluate`.
            most: Candidates that are judged.
        """
        near = result.similarity
        pairs = np.zeros(near.shape, dtype=np.bool_)
        by_picture, by_text = (np.argsort(-values, axis=1, kind="stable")[:, :most] for values in (near, near.T))
        np.put_along_axis(pairs, by_picture, True, axis=1)
        np.put_along_axis(pairs.T, by_text, True, axis=1)
        sure = self._sure(model, pairs)
        return {
            "image-to-text": first_ranks(_before(near, by_picture, sure), self.gallery.correct),
            "text-to-image": first_ranks(_before(near.T, by_text, sure.T), self.gallery.correct.T),
        }

    @torch.no_grad()
    def write(self, model: Blip2Stage1, *, limit: int | None = None) -> list[str]:
        """A name for each picture, or for the first few: the likeliest next token again and again.

        No name is longer than the longest of the split, so that a model that never ends one ends.
        """
        number = min(len(self._sha256s), limit or len(self._sha256s))
        longest = self._ids.shape[1]
        return [
            self._words.text(ids)
            for at in range(0, number, _BATCH)
            for ids in model.caption(
                self._look(model, range(at, min(at + _BATCH, number))), end=self._words.end, max_tokens=longest
            )
        ]

    def further_scores(self, model: Blip2Stage1, result: RetrievalResult) -> list[Score]:
        """Scores of judging, beside those of the nearest query, and of writing.

        Names are those of :func:`~plait.evaluation.picture_names.compare` with ``/judged`` behind, of R@1 also
        ``/gain-by-judging`` (a paired difference); and ``writing/<split>/name/exact-match``.

        Args:
            model: In eval mode.
            result: Of :meth:`evaluate`.
        """
        scores: list[Score] = []
        for way, ranks in self.judge(model, result).items():
            found, name = result.directions[way], f"retrieval/{self.name}/{way}"
            judged = rank_scores(ranks, name=name, groups=found.groups, seed=self.seed)
            scores += [beside(score, "judged") for score in judged]
            scores.append(
                paired_difference(
                    (ranks <= 1).astype(np.float64),
                    (found.ranks <= 1).astype(np.float64),
                    name=f"{name}/R@1/gain-by-judging",
                    rule="hit@1/any-correct/ties-worst",
                    groups=found.groups,
                    seed=self.seed,
                )
            )
        named = [[name] for name in self.pairs.names]
        written = self.write(model)
        key = f"writing/{self.name}/name/exact-match"
        return [*scores, exact_match(written, named, name=key, groups=self.pairs.concepts)]

    # --- inside ----------------------------------------------------------------------------------------------------

    def _look(self, model: Blip2Stage1, pictures: Sequence[int]) -> Rows:
        source = model.tokens(self._store.one_each([self._sha256s[i] for i in pictures]))
        device = model.log_scale.device
        return Rows(source.values.to(device), None if source.real is None else source.real.to(device))

    def _texts(self, model: Blip2Stage1, chosen: Int[Tensor, " k"]) -> tuple[Int[Tensor, "k t"], Bool[Tensor, "k t"]]:
        device = model.log_scale.device
        return self._ids[chosen].to(device), self._present[chosen].to(device)

    def _sure(self, model: Blip2Stage1, pairs: Bool[np.ndarray, "picture text"]) -> Float[np.ndarray, "picture text"]:
        """Score of yes less that of no, for the pairs that are asked for; 0 elsewhere."""
        sure = np.zeros(pairs.shape)
        asked = np.argwhere(pairs)
        for at in range(0, len(asked), 4 * _BATCH):
            part = asked[at : at + 4 * _BATCH]
            shown, place = np.unique(part[:, 0], return_inverse=True)
            source, rows = self._look(model, shown.tolist()), torch.tensor(place.tolist())
            rows = rows.to(source.values.device)
            picked = Rows(source.values[rows], None if source.real is None else source.real[rows])
            judged = model.judge(picked, *self._texts(model, torch.tensor(part[:, 1].tolist())))
            sure[part[:, 0], part[:, 1]] = (judged[:, 1] - judged[:, 0]).double().cpu().numpy()
        return sure


def _before(
    near: Float[np.ndarray, "query candidate"],
    first: Int[np.ndarray, "query few"],
    sure: Float[np.ndarray, "query candidate"],
) -> Float[np.ndarray, "query candidate"]:
    """Scores that put the few first, by how sure judging is of them, and leave the rest in order behind."""
    scores = near.copy()
    gap = near.max() - sure.min() + 1.0
    np.put_along_axis(scores, first, np.take_along_axis(sure, first, axis=1) + gap, axis=1)
    return scores
