"""Reading pictures as words: a connector learns to hit the decoder's word embeddings, without a pass of the decoder."""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from plait.core.tensors import IGNORE, Batch


class WordTargets:
    """Cross-entropy of each mixed token with the word that stands there in the name, and of the name itself.

    ``-sum log softmax(scores)[target]`` over known words (term ``word``) and over pictures (term ``name``). The model
    gives ``(b k word, b name)`` scores for a batch's pictures (:class:`plait.models.connectors.words.WordReader`).
    Labels are ``b k+1``: for each mixed token the row of its word, or ``IGNORE`` for a word that is not in the list;
    last, the row of the name.

    Args:
        smoothing: Share of each target spread over all words (arXiv 1512.00567).
    """

    needs_global_batch = False

    def __init__(self, *, smoothing: float = 0.1) -> None:
        self.smoothing = smoothing

    def count(self, batch: Batch) -> Mapping[str, Tensor]:
        """Known words, and pictures."""
        return {"word": (batch.labels[:, :-1] != IGNORE).sum(), "name": (batch.labels[:, -1] != IGNORE).sum()}

    def __call__(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """Sums in nats."""
        words, names = model(batch.media["image"])
        return {
            "word": self._sum(words.flatten(0, 1), batch.labels[:, :-1].flatten()),
            "name": self._sum(names, batch.labels[:, -1]),
        }

    def _sum(self, scores: Float[Tensor, "n v"], targets: Int[Tensor, " n"]) -> Float[Tensor, ""]:
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        return nn.functional.cross_entropy(
            scores, targets, reduction="sum", ignore_index=IGNORE, label_smoothing=self.smoothing
        )
