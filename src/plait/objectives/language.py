"""Next-token prediction: the loss as a sum over trained tokens, never a mean."""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from plait.core.tensors import Batch, Output


def next_token_loss(logits: Float[Tensor, "n v"], targets: Int[Tensor, " n"]) -> Float[Tensor, ""]:
    """``-sum_i log softmax(logits_i)[target_i]``, in float32 or wider, whatever the logits' dtype.

    Example:
        Two positions with equal scores over 4 words: 2 ln 4 = 2.7726.
    """
    return nn.functional.cross_entropy(_wide(logits), targets, reduction="sum")


class NextToken:
    """Autoregressive language modeling on the trained tokens of a batch.

    The model gives log-probabilities, or scores, only where the next token is trained
    (:class:`plait.models.multimodal.MultimodalLM`), so no full ``b t v`` tensor exists.

    Args:
        choices: Of a model with experts, how many of them each token chooses in all layers together: then there are two
            terms more. ``balance``: how unevenly experts are chosen, as a mean over documents
            (:meth:`plait.models.moe.Choices.balance`), summed over layers; ``dropped``: the share of choices that had
            no room, a number without a gradient.
    """

    needs_global_batch = False

    def __init__(self, *, choices: int = 0) -> None:
        self.choices = choices

    def count(self, batch: Batch) -> Mapping[str, Tensor]:
        """Trained tokens; of a model with experts documents and choices, too."""
        counts = {"next_token": batch.predicting.sum()}
        if self.choices:
            counts |= {"balance": batch.documents, "dropped": self.choices * (batch.segment_ids != 0).sum()}
        return counts

    def __call__(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """Sum of the negative log-likelihood, in nats.

        Raises:
            TypeError: The model says nothing of experts.
        """
        output: Output = model(batch)
        sums = {"next_token": -token_logprobs(output, batch.targets).sum()}
        if self.choices:
            if output.balance is None or output.dropped is None:
                raise TypeError("choices of experts are counted, but the model has none, or does not train")
            sums |= {"balance": output.balance, "dropped": output.dropped.to(output.balance.dtype)}
        return sums


def token_logprobs(output: Output, targets: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Log-probability of each target: as the model computed it together with its head, else from its scores.

    Args:
        output: Of the model.
        targets: The token that came (:attr:`plait.core.tensors.Batch.targets`).
    """
    if output.logprobs is not None:
        return output.logprobs
    return -nn.functional.cross_entropy(_wide(output.logits), targets, reduction="none")


def sequence_logprobs(each: Float[Tensor, " n"], *, owner: Int[Tensor, " n"], count: int) -> Float[Tensor, " s"]:
    """Log-probability of each sequence: the sum over its tokens.

    Args:
        each: Log-probability of each token.
        owner: Which sequence each token belongs to, from 0.
        count: Number of sequences.
    """
    return torch.zeros(count, dtype=each.dtype, device=each.device).index_add(0, owner, each)


def _wide(logits: Float[Tensor, "n v"]) -> Float[Tensor, "n v"]:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
