"""What is hidden is to be found: tokens, from both sides (BERT), codes of a picture's cells (BEiT), pixels (MAE).

BERT: https://arxiv.org/abs/1810.04805. BEiT: https://arxiv.org/abs/2106.08254. MAE: https://arxiv.org/abs/2111.06377.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from plait.core.tensors import IGNORE, Batch
from plait.objectives.language import next_token_loss
from plait.objectives.reconstruction import squared_error


class MaskedTokens:
    """Objective: cross-entropy of each hidden token; one term ``masked``, counted in hidden tokens.

    ``-sum log softmax(scores)[label]`` over positions that have a label, which is the token of that position itself,
    not the next one. The model gives scores ``n v`` of these positions in reading order
    (:class:`plait.models.reading.MaskedReader`, :class:`plait.models.masked_images.MaskedCells`).
    """

    needs_global_batch = False

    def count(self, batch: Batch) -> Mapping[str, Tensor]:
        """Hidden tokens."""
        return {"masked": (batch.labels != IGNORE).sum()}

    def __call__(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """Sum in nats."""
        return {"masked": next_token_loss(model(batch), batch.labels[batch.labels != IGNORE])}


class MaskedPixels:
    """Objective of MAE: mean squared error of each hidden cell's pixels; one term ``pixels``, counted in hidden cells.

    The model gives pixels of hidden cells, ``n e``, and those that stood there
    (:class:`plait.models.masked_images.MaskedAutoencoder`). Cells that are seen have no loss.
    """

    needs_global_batch = False

    def count(self, batch: Batch) -> Mapping[str, Tensor]:
        """Hidden cells."""
        return {"pixels": (batch.labels != IGNORE).sum()}

    def __call__(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """Sum over cells."""
        found, wanted = model(batch)
        return {"pixels": squared_error(found, wanted) / wanted.shape[1]}
