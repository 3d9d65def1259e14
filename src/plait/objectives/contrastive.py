"""Contrastive losses of two towers, as sums over pairs.

InfoNCE (van den Oord et al., arXiv 1807.03748) in its symmetric form (CLIP, Radford et al., arXiv 2103.00020), and the
sigmoid loss of SigLIP (Zhai et al., arXiv 2303.15343). Both take the relation of positives as an argument: in a batch
where two pictures show one concept, or two captions read the same, the plain losses push equals apart.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType]

from plait.core.tensors import IGNORE, Batch, Embedded

CELLS = 2**22
"""Scores that are held at once, 16 MiB in float32; a larger table is computed in blocks of rows."""

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
    of a batch is not the sum of its parts' losses (``needs_global_batch``), but a sum over pairs each of which is
    compared with all others (:class:`plait.core.protocols.Pairwise`).

    Args:
        cells: Scores that are held at once: a larger table is computed in blocks of rows, once in the forward and once
            in the backward pass, for each of the two directions; the value and the gradient are the same.

    Example:
        >>> Contrastive().needs_global_batch
        True
    """

    needs_global_batch = True

    def __init__(self, *, cells: int = CELLS) -> None:
        super().__init__()
        self.cells = cells

    def count(self, batch: Batch) -> Mapping[str, Tensor]:
        """Number of pairs, and of sounds."""
        return _count(batch)

    def embed(self, model: nn.Module, batch: Batch) -> Embedded:
        """Vectors of both sides, and of the sounds."""
        return _embed(model, batch)

    def loss(self, found: Embedded, *, rows: range | None = None) -> Mapping[str, Tensor]:
        """Sum over pairs, and over sounds."""
        return terms_of(found, partial(_nce, scale=found.factors["scale"], cells=self.cells), rows=rows)

    def __call__(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """Sum over pairs, and over sounds."""
        return self.loss(self.embed(model, batch))


class SigmoidContrastive(nn.Module):
    """Objective: SigLIP's loss over a batch of pairs; terms, counts, model and batch are those of :class:`Contrastive`.

    The bias is learned: a weight of the objective (``objective.bias``), saved with the run and not with the model.

    Args:
        bias: Added to every score at the start. The paper's -10 fits batches of some 20,000; log(1 / b) one of b.
        cells: Scores that are held at once, see :class:`Contrastive`.

    Example:
        >>> SigmoidContrastive(bias=-3.0).bias.item()
        -3.0
    """

    needs_global_batch = True

    def __init__(self, *, bias: float = -10.0, cells: int = CELLS) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.tensor(bias))
        self.cells = cells

    def count(self, batch: Batch) -> Mapping[str, Tensor]:
        """Number of pairs, and of sounds."""
        return _count(batch)

    def embed(self, model: nn.Module, batch: Batch) -> Embedded:
        """Vectors of both sides, and of the sounds."""
        return _embed(model, batch)

    def loss(self, found: Embedded, *, rows: range | None = None) -> Mapping[str, Tensor]:
        """Sum over pairs, and over sounds."""
        return terms_of(
            found, partial(_judged, scale=found.factors["scale"], bias=self.bias, cells=self.cells), rows=rows
        )

    def forward(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """Sum over pairs, and over sounds."""
        return self.loss(self.embed(model, batch))


def match_groups(classes: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
    """A number for each row, equal for rows that match; :func:`same_class` is ``groups[:, None] == groups``.

    Example:
        >>> match_groups(torch.tensor([3, IGNORE, 3])).tolist()
        [6, 3, 6]
    """
    return torch.where(classes != IGNORE, 2 * classes, 2 * torch.arange(len(classes), device=classes.device) + 1)


def row_nce(logits: Float[Tensor, "a b"], positives: Bool[Tensor, "a b"]) -> Float[Tensor, ""]:
    """Cross-entropy of each row with its mass shared equally among its positives, summed: one side of InfoNCE.

    Args:
        logits: Scores of some rows with all others, divided by the temperature.
        positives: At least one a row.
    """
    own = logits.masked_fill(~positives, 0).sum(1) / positives.sum(1)
    return (logits.logsumexp(1) - own).sum()


def sum_in_blocks(
    one: Callable[[Tensor], Tensor], rows: Int[Tensor, " a"], *, width: int, cells: int
) -> Shaped[Tensor, "*k"]:
    """Sum of a function of rows over blocks of them, so that a table of scores is never there as a whole.

    Several blocks are computed again in the backward pass (``torch.utils.checkpoint``).

    Args:
        one: Sum, or sums, over the rows of which it is given the numbers.
        rows: Their numbers.
        width: Scores of a row.
        cells: Scores in a block at most, but one row at least.
    """
    size = max(1, cells // max(1, width))
    if len(rows) <= size:
        return one(rows)
    blocks = [rows[start : start + size] for start in range(0, len(rows), size)]
    parts: list[Tensor] = [checkpoint(one, block, use_reentrant=False, preserve_rng_state=False) for block in blocks]
    return torch.stack(parts).sum(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sides:
    """Two sides of which row i belongs to row i; rows of one group match. The loss sums over the anchors, or all.

    Attributes:
        left: Unit vectors.
        right: Unit vectors.
        groups: Equal numbers match.
        anchors: Rows that are summed over; None: all.
    """

    left: Float[Tensor, "k d"]
    right: Float[Tensor, "k d"]
    groups: Int[Tensor, " k"]
    anchors: Int[Tensor, " a"] | None

    @property
    def rows(self) -> Int[Tensor, " a"]:
        """Numbers of the anchors."""
        return torch.arange(len(self.left), device=self.left.device) if self.anchors is None else self.anchors

    def positives(self, rows: Int[Tensor, " a"]) -> Bool[Tensor, "a k"]:
        """Which rows match some rows, themselves included."""
        return self.groups[rows][:, None] == self.groups[None]


def _count(batch: Batch) -> dict[str, Tensor]:
    counts = {"contrastive": torch.tensor(len(batch.sample_ids), device=batch.labels.device)}
    if (sounds := batch.media.get("audio")) is not None:
        counts |= dict.fromkeys(_HEARD, torch.tensor(len(sounds.grid), device=batch.labels.device))
    return counts


def _embed(model: nn.Module, batch: Batch) -> Embedded:
    image, text, scale, audio, pair_of = model(batch)
    place = torch.arange(len(image), device=image.device)
    vectors, row_of = {"image": image, "text": text}, {"image": place, "text": place}
    if audio is not None:
        vectors["audio"], row_of["audio"] = audio, pair_of
    return Embedded(vectors=vectors, row_of=row_of, classes=batch.labels[:, 0], factors={"scale": scale})


def terms_of(found: Embedded, between: Callable[[Sides], Tensor], *, rows: range | None) -> dict[str, Tensor]:
    """The terms of :class:`Contrastive`: pairs, and each sound with its picture and with its text.

    Args:
        found: What was embedded.
        between: Sum over the anchors of two sides.
        rows: Rows of the batch that are summed over; all by default.
    """
    groups, (image, text) = match_groups(found.classes), (found.vectors["image"], found.vectors["text"])
    anchors = None if rows is None else torch.arange(rows.start, rows.stop, device=groups.device)
    terms = {"contrastive": between(Sides(left=image, right=text, groups=groups, anchors=anchors))}
    if "audio" in found.vectors:
        pair_of, audio = found.row_of["audio"], found.vectors["audio"]
        if rows is not None:
            anchors = ((pair_of >= rows.start) & (pair_of < rows.stop)).nonzero()[:, 0]
        for term, side in zip(_HEARD, (image, text), strict=True):
            sides = Sides(left=side[pair_of], right=audio, groups=groups[pair_of], anchors=anchors)
            terms[term] = between(sides)
    return terms


def _nce(sides: Sides, *, scale: Tensor, cells: int) -> Float[Tensor, ""]:
    left, right, rows, width = sides.left, sides.right, sides.rows, len(sides.left)
    if sides.anchors is None and width**2 <= cells:
        return info_nce(left, right, scale, positives=sides.positives(rows))

    def one_way(own: Tensor, other: Tensor, block: Tensor) -> Tensor:
        return row_nce(scale * own[block] @ other.T, sides.positives(block)) / 2

    in_blocks = partial(sum_in_blocks, rows=rows, width=width, cells=cells)
    return in_blocks(partial(one_way, left, right)) + in_blocks(partial(one_way, right, left))


def _judged(sides: Sides, *, scale: Tensor, bias: Tensor, cells: int) -> Float[Tensor, ""]:
    def judged(block: Tensor) -> Tensor:
        logits = scale * sides.left[block] @ sides.right.T + bias
        signs = 2 * sides.positives(block).to(logits.dtype) - 1
        return -functional.logsigmoid(signs * logits).sum()

    return sum_in_blocks(judged, sides.rows, width=len(sides.left), cells=cells)


def _with_own_pair(positives: Bool[Tensor, "b b"]) -> Bool[Tensor, "b b"]:
    return positives | torch.eye(len(positives), dtype=torch.bool, device=positives.device)
