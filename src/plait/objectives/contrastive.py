"""Contrastive losses of two towers, as sums over pairs.

InfoNCE (van den Oord et al., arXiv 1807.03748) in its symmetric form (CLIP, Radford et al., arXiv 2103.00020), and the
sigmoid loss of SigLIP (Zhai et al., arXiv 2303.15343). Both take the relation of positives as an argument: in a batch
where two pictures show one concept, or two captions read the same, the plain losses push equals apart.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from plait.core.tensors import IGNORE, Batch

_HEARD = ("contrastive-image-audio", "contrastive-text-audio")


def info_nce(
    image: Float[Tensor, "b d"],
    text: Float[Tensor, "b d"],
    scale: Float[Tensor, ""],
    *,
    positives: Bool[Tensor, "b b"] | None = None,
) -> Float[Tensor, ""]:
    """Symmetric InfoNCE, summed over pairs.

    With s = scale * image @ text.T: -1/2 sum_ij (P_ij log softmax_j(s)_ij + Q_ij log softmax_i(s)_ij), where P and Q
    share the mass of a row (of a column) equally among its positives. Without ``positives`` this is CLIP's loss times
    b. With k positives a row the smallest possible value is b ln k, not 0.

    Args:
        image: Unit vectors.
        text: Unit vectors; row i belongs to row i of ``image``.
        scale: 1 / temperature.
        positives: ``[i, j]``: picture i and text j match. The pairs themselves always do.

    Example:
        >>> one = functional.normalize(torch.ones(4, 2), dim=1)
        >>> round(info_nce(one, one, torch.tensor(10.0)).item() / 4, 4)  # all alike: ln 4
        1.3863
    """
    return symmetric_nce(scale * image @ text.T, positives=positives)


def symmetric_nce(logits: Float[Tensor, "b b"], *, positives: Bool[Tensor, "b b"] | None = None) -> Float[Tensor, ""]:
    """:func:`info_nce` of scores that are there already, such as the best of several queries.

    Args:
        logits: Score of picture i and text j, divided by the temperature.
        positives: As in :func:`info_nce`.
    """
    by_row, by_column = logits.log_softmax(1), logits.log_softmax(0)
    if positives is None:
        return -(by_row.diagonal() + by_column.diagonal()).sum() / 2
    mass = _with_own_pair(positives).to(logits.dtype)
    return -(mass / mass.sum(1, keepdim=True) * by_row + mass / mass.sum(0, keepdim=True) * by_column).sum() / 2


def sigmoid_pairs(
    image: Float[Tensor, "b d"],
    text: Float[Tensor, "b d"],
    scale: Float[Tensor, ""],
    *,
    bias: Float[Tensor, ""],
    positives: Bool[Tensor, "b b"] | None = None,
) -> Float[Tensor, ""]:
    """SigLIP's loss: -sum_ij log sigmoid(z_ij (scale * image_i . text_j + bias)), z = 1 for positives, else -1.

    Divided by b it is SigLIP's loss. The paper's starting bias of -10 fits batches of some 20,000; log(1 / b) fits a
    batch of b.

    Args:
        image: Unit vectors.
        text: Unit vectors; row i belongs to row i of ``image``.
        scale: 1 / temperature.
        bias: Added to every logit.
        positives: As in :func:`info_nce`.
    """
    logits = scale * image @ text.T + bias
    if positives is None:
        positives = torch.zeros_like(logits, dtype=torch.bool)
    signs = 2 * _with_own_pair(positives).to(logits.dtype) - 1
    return -functional.logsigmoid(signs * logits).sum()


def same_class(classes: Int[Tensor, " b"]) -> Bool[Tensor, "b b"]:
    """Which pairs match because their class is equal; :data:`IGNORE` matches nothing but its own pair."""
    known = classes != IGNORE
    return _with_own_pair((classes[:, None] == classes[None]) & known[:, None])


class Contrastive:
    """Objective: symmetric InfoNCE over a batch of pairs, one term ``contrastive``, counted in pairs.

    Where pairs have sounds, each sound is told apart from the others by its picture and by its text, too: two more
    terms, ``contrastive-image-audio`` and ``contrastive-text-audio``, counted in sounds.

    The model returns vectors of images and texts, a scale, and vectors of sounds with the pair of each, or None twice
    (:class:`plait.models.dual.Embeddings`).
    ``batch.labels``, ``b 1``, holds the class of each pair: pairs of equal class are positives of each other. The loss
    of a batch is not the sum of its parts' losses, so the loop must see the whole batch (``needs_global_batch``).

    Example:
        >>> Contrastive().needs_global_batch
        True
    """

    needs_global_batch = True

    def count(self, batch: Batch) -> Mapping[str, Tensor]:
        """Number of pairs, and of sounds."""
        counts = {"contrastive": torch.tensor(len(batch.sample_ids), device=batch.labels.device)}
        if (sounds := batch.media.get("audio")) is not None:
            counts |= dict.fromkeys(_HEARD, torch.tensor(len(sounds.grid), device=batch.labels.device))
        return counts

    def __call__(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """Sum over pairs, and over sounds."""
        image, text, scale, audio, pair_of = model(batch)
        positives = same_class(batch.labels[:, 0])
        terms = {"contrastive": info_nce(image, text, scale, positives=positives)}
        if audio is not None:
            among = positives[pair_of][:, pair_of]
            for term, side in zip(_HEARD, (image, text), strict=True):
                terms[term] = info_nce(side[pair_of], audio, scale, positives=among)
        return terms


def _with_own_pair(positives: Bool[Tensor, "b b"]) -> Bool[Tensor, "b b"]:
    return positives | torch.eye(len(positives), dtype=torch.bool, device=positives.device)
