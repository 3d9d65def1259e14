"""Direct preference optimization: a right answer against a wrong one, measured from where the model began."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from plait.core.errors import DataError
from plait.core.tensors import Batch
from plait.objectives.language import sequence_logprobs, token_logprobs


def preference_loss(margin: Float[Tensor, " pair"]) -> Float[Tensor, ""]:
    """``-sum_i log sigmoid(margin_i)``: equation 7 of Rafailov et al., https://arxiv.org/abs/2305.18290.

    A margin is the difference of implicit rewards, chosen minus rejected, each
    ``beta (log p(answer | prompt) - log p_ref(answer | prompt))``.

    Example:
        Before the first step the model is its reference: every margin is 0, and every pair costs ln 2 = 0.6931.
    """
    return -nn.functional.logsigmoid(margin).sum()


def answer_logprobs(model: nn.Module, batch: Batch) -> Float[Tensor, " segment"]:
    """Log-probability of the trained tokens of each sample of a packed batch, in the order of ``batch.sample_ids``.

    Args:
        model: Gives log-probabilities or scores where the next token is trained, in reading order.
        batch: Segments of a row numbered from 1.

    Raises:
        DataError: Segments and sample ids do not correspond.
    """
    owner = _owners(batch)
    each = token_logprobs(model(batch), batch.targets)
    return sequence_logprobs(each, owner=owner, count=len(batch.sample_ids))


class DirectPreference:
    """DPO (arXiv 2305.18290) over packed batches that hold both answers of each pair.

    Samples are called ``<pair>#chosen`` and ``<pair>#rejected``. Besides the loss ``dpo`` there are three terms to look
    at, to be given weight 0: ``margin`` (difference of rewards), ``accuracy`` (whether it is above 0) and ``chosen``
    (reward of the chosen answer, which may fall while the margin rises).

    Args:
        reference: Log-probability of each sample, by its id, under the model that training starts from.
        beta: How strongly the model is held to the reference.
    """

    needs_global_batch = False
    REPORTED = ("margin", "accuracy", "chosen")

    def __init__(self, reference: Mapping[str, float], *, beta: float) -> None:
        self.reference = reference
        self.beta = beta

    def count(self, batch: Batch) -> Mapping[str, Tensor]:
        """Pairs."""
        pairs = torch.tensor(len(batch.sample_ids) // 2)
        return {"dpo": pairs} | dict.fromkeys(self.REPORTED, pairs)

    def __call__(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """Sums over pairs.

        Raises:
            DataError: A pair is not complete, or a sample has no reference.
        """
        chosen, rejected = pair_places(batch.sample_ids)
        missing = [name for name in batch.sample_ids if name not in self.reference]
        if missing:
            raise DataError(
                f"{len(missing)} of {len(batch.sample_ids)} answers have no reference log-probability",
                place=f"sample {missing[0]}",
                remedy="compute the reference over all batches before training",
            )
        logprobs = answer_logprobs(model, batch)
        before = torch.tensor([self.reference[name] for name in batch.sample_ids], dtype=torch.float64)
        rewards = self.beta * (logprobs - before.to(logprobs))
        margin = rewards[chosen] - rewards[rejected]
        seen = margin.detach()
        return {
            "dpo": preference_loss(margin),
            "margin": seen.sum(),
            "accuracy": (seen > 0).to(seen.dtype).sum(),
            "chosen": rewards.detach()[chosen].sum(),
        }


def pair_places(sample_ids: Sequence[str]) -> tuple[list[int], list[int]]:
    """Where the chosen and the rejected answers stand among the samples; the two lists name the same pairs in order.

    Raises:
        DataError: A sample has the wrong kind of id, or its other half is not there.
    """
    places = {name: place for place, name in enumerate(sample_ids)}
    pairs = [name.removesuffix("#chosen") for name in sample_ids if name.endswith("#chosen")]
    rejected = [places.get(f"{pair}#rejected", -1) for pair in pairs]
    if -1 in rejected or 2 * len(pairs) != len(sample_ids):
        halves = {f"{pair}#{kind}" for pair in pairs for kind in ("chosen", "rejected")}
        odd = min(halves ^ places.keys(), default=sample_ids[0])
        raise DataError(
            f"the other half of the pair is not in the batch ({len(sample_ids)} samples, {len(pairs)} of them chosen)",
            place=f"sample {odd}",
            remedy="put <pair>#chosen and <pair>#rejected into one batch",
        )
    return [places[f"{pair}#chosen"] for pair in pairs], rejected


def _owners(batch: Batch) -> Int[Tensor, " n"]:
    """Which sample each trained token belongs to: samples are numbered row by row, as collating leaves them."""
    per_row = batch.segment_ids.amax(1)
    if int(per_row.sum()) != len(batch.sample_ids):
        raise DataError(
            f"{int(per_row.sum())} segments, {len(batch.sample_ids)} sample ids",
            place=f"samples {', '.join(batch.sample_ids[:4])}",
            remedy="number the segments of each row from 1, and name each one",
        )
    first = per_row.cumsum(0) - per_row
    number = first[:, None] + batch.segment_ids - 1
    return number[batch.predicting]
