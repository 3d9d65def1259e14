"""Text transformers as models of a batch: what they tell of its labels."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from plait.core.errors import DataError
from plait.core.tensors import IGNORE, Batch, Output
from plait.models.towers.seq2seq import EncoderDecoder
from plait.models.towers.text_transformer import TextTransformer


class MaskedReader(nn.Module):
    """Scores of the tokens that stood where labels stand (:class:`plait.objectives.masked.MaskedTokens`).

    The output layer, the largest matrix, is computed for these positions alone.

    Args:
        text: Sees both sides; has a head for masked tokens.
    """

    def __init__(self, text: TextTransformer) -> None:
        super().__init__()
        self.text = text

    def forward(self, batch: Batch) -> Float[Tensor, "n v"]:
        """In reading order."""
        hidden = self.text(batch.token_ids, segment_ids=batch.segment_ids)
        return self.text.logits(hidden[batch.labels != IGNORE])


class Writer(nn.Module):
    """Scores of next tokens, for :class:`plait.objectives.language.NextToken`.

    Args:
        text: Sees what is before; has an output layer.
    """

    def __init__(self, text: TextTransformer) -> None:
        super().__init__()
        self.text = text

    def forward(self, batch: Batch) -> Output:
        """Hidden states, and scores where the next token is trained."""
        hidden = self.text(batch.token_ids, segment_ids=batch.segment_ids)
        return Output(hidden=hidden, score=lambda: self.text.logits(hidden[batch.predicting]))


class Rewriter(nn.Module):
    """An encoder-decoder that reads the beginning of each row and writes the rest, which has labels.

    Scores are of the same tokens, in the same order, as :class:`Writer` gives, and of each row's first written one,
    which follows the start token; so the loss is :class:`plait.objectives.language.NextToken`'s.

    Args:
        model: The encoder-decoder.
        start: Id that the decoder begins with; T5's is that of padding.
    """

    def __init__(self, model: EncoderDecoder, *, start: int = 0) -> None:
        super().__init__()
        self.model, self.start = model, start

    def forward(self, batch: Batch) -> Output:
        """Decoder's hidden states at the places of their rows, and scores where the next token is trained.

        Raises:
            DataError: A row holds several texts, or nothing to read before what is written, or its labels have a gap.
        """
        given = (batch.labels == IGNORE) & (batch.segment_ids != 0)
        written = (batch.labels != IGNORE) & (batch.segment_ids != 0)
        _check_rows(batch, given, written)
        read = self._left(batch.token_ids, given)
        after = self._left(batch.token_ids, written)
        begun = torch.cat([torch.full_like(after[:, :1], self.start), after[:, :-1]], 1)
        length = torch.arange(read.shape[1], device=read.device)
        real = length < given.sum(1, keepdim=True)
        found: Tensor = self.model.decode(begun, self.model.encode(read, real=real), real=real)
        hidden = found.new_zeros(*batch.token_ids.shape, found.shape[2])
        within = torch.arange(after.shape[1], device=read.device) < written.sum(1, keepdim=True)
        told = batch.predicting
        hidden[told] = found[within]
        return Output(hidden=hidden, score=lambda: self.model.logits(hidden[told]))

    @staticmethod
    def _left(token_ids: Int[Tensor, "b t"], chosen: Tensor) -> Int[Tensor, "b s"]:
        """Chosen tokens of each row moved to its left, 0 behind them."""
        sizes = chosen.sum(1)
        out = token_ids.new_zeros(len(token_ids), int(sizes.max()))
        out[torch.arange(out.shape[1], device=out.device) < sizes[:, None]] = token_ids[chosen]
        return out


def _check_rows(batch: Batch, given: Tensor, written: Tensor) -> None:
    begins = (written[:, 1:] & ~written[:, :-1]).sum(1)
    bad = (batch.segment_ids > 1).any(1) | ~given[:, 0] | (begins != 1)
    bad |= (given[:, 1:] & written[:, :-1]).any(1)
    if bool(bad.any()):
        row = int(bad.int().argmax())
        raise DataError(
            "the row is not one text of a beginning to read and a rest to write",
            place=f"sample {batch.sample_ids[row] if len(batch.sample_ids) == len(bad) else f'of row {row}'}",
            remedy="give rows of the form Rewritten, one text each",
        )
