"""What is asked of a reader besides its answers: where gradients go, and what its heads do."""

import copy
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from plait.core.errors import ConfigError
from plait.models.attention import Attention
from plait.models.transformer import Block
from plait.studies.stacking.students import Attending, Reader
from plait.studies.stacking.tasks import Batch, right
from plait.studies.stacking.training import loss_of


def influence(reader: Reader, ids: Int[Tensor, "b t"]) -> Float[Tensor, " t"]:
    """Norm of the gradient of what is said last, by a random direction, to each word, over its distance from there.

    Args:
        reader: The weights are not moved; the direction is drawn from torch's generator.
        ids: Words.
    """
    words = reader.words(ids).detach().requires_grad_()
    said = reader.body(words)[:, -1]
    (found,) = torch.autograd.grad((said * torch.randn_like(said)).sum(), words)
    return found.norm(dim=-1).mean(0).flip(0)


def gradient_norms(reader: Reader, batch: Batch) -> list[float]:
    """Norm of the gradient of the loss to what goes into each block of a Transformer, first block first."""
    hidden: list[Tensor] = []
    whole = _attending(reader)
    handles = [block.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0])) for block in _blocks(whole)]
    try:
        loss = loss_of(reader, batch)
    finally:
        for handle in handles:
            handle.remove()
    return [float(found.double().norm()) for found in torch.autograd.grad(loss, hidden)]


@torch.inference_mode()
def head_distance(reader: Reader, ids: Int[Tensor, "b t"], *, begin: int) -> float:
    """Mean over pairs of heads of the first block of how far apart they look: total variation, 0 alike, 1 disjoint.

    Args:
        reader: With two heads or more.
        ids: Words.
        begin: Positions before this one are left out.
    """
    maps: list[Tensor] = []
    _attending(reader.eval())(reader.words(ids), weights=maps)
    looks = maps[0][:, :, begin:]
    pairs = _pairs(looks.shape[1])
    return sum(float((looks[:, i] - looks[:, j]).abs().sum(-1).mean()) / 2 for i, j in pairs) / len(pairs)


@torch.inference_mode()
def overlap(reader: Reader, which: str) -> float:
    """Mean over pairs of heads of the first block of the shared part of the subspaces that they read.

    ``|A.T B|^2 / r`` for orthonormal bases of the r-dimensional row spaces: 1 for the same, 0 for orthogonal ones, and
    ``r / d`` on average for random ones.

    Args:
        reader: With two heads or more.
        which: ``keys`` or ``values``.
    """
    attention = _attention(reader)
    rows = attention.qkv.weight.double().chunk(3)[("queries", "keys", "values").index(which)]
    bases = [torch.linalg.qr(part.mT).Q for part in rows.chunk(attention.heads)]
    pairs = _pairs(attention.heads)
    return sum(float((bases[i].mT @ bases[j]).square().sum()) / attention.d_head for i, j in pairs) / len(pairs)


@torch.inference_mode()
def without_heads(reader: Reader, batch: Batch) -> list[list[float]]:
    """Share of right answers to each question where what a head of the first block says is set to 0, for each head."""
    found: list[list[float]] = []
    for head in range(_attention(reader).heads):
        without = copy.deepcopy(reader).eval()
        attention = _attention(without)
        attention.out.weight[:, head * attention.d_value : (head + 1) * attention.d_value] = 0.0
        found.append(right(without(batch.ids), batch.targets))
    return found


def specialization(whole: Sequence[float], without: Sequence[Sequence[float]]) -> float | None:
    """How much one head answers each question: its share of what all losses of single heads add up to, over questions.

    ``1 / heads`` where all are alike, 1 where one does it all. A question that loses less than 5 points in sum
    says nothing; None where all are such.

    Args:
        whole: Accuracy of each question with all heads.
        without: The same without each head.

    Example:
        >>> specialization([1.0, 1.0], [[0.5, 1.0], [1.0, 0.25]])
        1.0
    """
    shares: list[float] = []
    for question, accuracy in enumerate(whole):
        lost = [max(0.0, accuracy - one[question]) for one in without]
        if sum(lost) >= 0.05:
            shares.append(max(lost) / sum(lost))
    return sum(shares) / len(shares) if shares else None


def _pairs(n: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(n) for j in range(i)]


def _attending(reader: Reader) -> Attending:
    if not isinstance(reader.body, Attending):
        kind = type(reader.body).__name__
        raise ConfigError(f"a {kind} has no blocks and heads", remedy="ask a reader whose body is a Transformer")
    return reader.body


def _blocks(body: Attending) -> list[Block]:
    return [block for block in body.transformer.blocks if isinstance(block, Block)]


def _attention(reader: Reader) -> Attention:
    return _blocks(_attending(reader))[0].attention
