"""Whether picture and text belong together: pairs judged one by one, wrong ones chosen among those that look right.

Image-text matching with hard negatives of the batch: Li et al., ALBEF, https://arxiv.org/abs/2107.07651; with contrast
and generation in one step: BLIP-2, https://arxiv.org/abs/2301.12597.
"""

from collections.abc import Mapping
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from plait.core.errors import DataError
from plait.core.tensors import IGNORE, Batch
from plait.objectives.contrastive import same_class, symmetric_nce
from plait.objectives.language import next_token_loss
from plait.objectives.seeded import drawn_from


def match_loss(logits: Float[Tensor, "k 2"], matched: Bool[Tensor, " k"]) -> Float[Tensor, ""]:
    """``-sum_i log softmax(logits_i)[matched_i]``; two classes, no and yes.

    Example:
        >>> round(match_loss(torch.zeros(3, 2), torch.tensor([True, False, False])).item(), 4)  # 3 ln 2
        2.0794
    """
    return next_token_loss(logits, matched.long())


def hard_negatives(
    similarity: Float[Tensor, "b b"], *, positives: Bool[Tensor, "b b"], generator: torch.Generator
) -> tuple[Int[Tensor, " k"], Int[Tensor, " k"]]:
    """A wrong text for each picture, then a wrong picture for each text: ``2 b`` pairs as pictures and their texts.

    Text j is drawn for picture i with probability softmax over the wrong ones of ``similarity[i]``, so what is most
    like the right one comes most often; pictures likewise.

    Args:
        similarity: Of picture i and text j, divided by the temperature.
        positives: Pairs that match, so that they are no negatives; the pairs themselves always do.
        generator: Of the choice, on the CPU.

    Raises:
        DataError: A picture or a text has no wrong one in the batch.
    """
    own = torch.arange(len(similarity))
    right = positives.cpu() | torch.eye(len(own), dtype=torch.bool)
    alone = (right.all(1) | right.all(0)).nonzero()[:, 0]
    if len(alone):
        raise DataError(
            f"{len(alone)} of {len(own)} pairs match everything in the batch, so they have no negatives",
            place=f"row {int(alone[0])} of the batch",
            remedy="use larger batches, or ones with different texts",
        )
    scores = similarity.detach().to("cpu", torch.float32).masked_fill(right, float("-inf"))
    texts = torch.multinomial(scores.softmax(1), 1, generator=generator)[:, 0]
    pictures = torch.multinomial(scores.T.softmax(1), 1, generator=generator)[:, 0]
    device = similarity.device
    return torch.cat([own, pictures]).to(device), torch.cat([texts, own]).to(device)


def same_text(token_ids: Int[Tensor, "b t"], segment_ids: Int[Tensor, "b t"]) -> Bool[Tensor, "b b"]:
    """Which rows read the same; padding (segment 0) is no text."""
    ids = token_ids.masked_fill(segment_ids == 0, -1)
    return (ids[:, None] == ids[None]).all(-1)


class QueryTasks:
    """Objective of BLIP-2's first stage: terms ``contrast``, ``match`` and ``generate``, which the paper adds up.

    ``contrast`` is symmetric InfoNCE, counted in pairs; ``match`` judges each pair, a hard negative text for each
    picture and a hard negative picture for each text, counted in all three; ``generate`` is counted in trained tokens.
    Rows that read the same are positives of each other: neither pushed apart nor judged as wrong.

    Negatives are a function of the seed and of the samples in the batch, so a resumed run draws the same ones.

    The model is :class:`plait.models.blip2.Blip2Stage1`.

    Args:
        seed: Of the negatives.
        classes: What each sample shows, by its id: those of one class are positives of each other, too.
    """

    needs_global_batch = True

    def __init__(self, *, seed: int = 0, classes: Mapping[str, int] | None = None) -> None:
        self.seed, self.classes = seed, classes or {}

    def count(self, batch: Batch) -> Mapping[str, Tensor]:
        """Pairs, judgements, and trained tokens."""
        pairs = torch.tensor(len(batch.token_ids), device=batch.labels.device)
        return {"contrast": pairs, "match": 3 * pairs, "generate": batch.predicting.sum()}

    def __call__(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """Sums in nats.

        Raises:
            DataError: A pair has no negatives in the batch.
        """
        known = [self.classes.get(name, IGNORE) for name in batch.sample_ids]
        positives = same_text(batch.token_ids, batch.segment_ids) | same_class(
            torch.tensor(known, device=batch.token_ids.device)
        )
        choose = partial(hard_negatives, positives=positives, generator=drawn_from(self.seed, batch.sample_ids))
        similarity, judged, logits = model(batch, choose=choose)
        return {
            "contrast": symmetric_nce(similarity, positives=positives),
            "match": match_loss(judged, torch.arange(len(judged), device=judged.device) < len(positives)),
            "generate": next_token_loss(logits, batch.targets),
        }
