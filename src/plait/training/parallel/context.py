"""Rows that several processes share (context parallelism): each trains on its own positions of every row.

Towers, connectors and embeddings run on whole rows in each of these processes; the blocks of the decoder on a part of
them (:mod:`plait.models.sequence.decoder`). Each process takes the loss of the positions that it has. Counts and sums
over tokens add up over processes as they do over micro-batches, and so do gradients.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from plait.core.errors import ConfigError
from plait.core.grid import Grid
from plait.core.protocols import Objective
from plait.core.tensors import IGNORE, Batch
from plait.models.mixtral import mixtures
from plait.models.multimodal import MultimodalLM
from plait.models.sequence.decoder import Exchange, SharedDecoder, SharedRows, check_shared
from plait.objectives.language import NextToken
from plait.training.trainer import Parallel


class Rows:
    """The rows of a model that trains, shared among the processes along the grid's ``context``.

    Args:
        model: What trains.
        objective: What it minimizes.
        parallel: How attention reaches the positions of others.
        grid: Where this process is among the others; all of them make this at the same time.

    Raises:
        ConfigError: See :func:`check_rows`.
    """

    def __init__(self, model: nn.Module, objective: Objective, parallel: Parallel, *, grid: Grid) -> None:
        decoder = check_rows(model, objective, parallel).decoder
        self.group = grid.group("context")
        self.exchange: Exchange = parallel.context_attention
        self.decoder = SharedDecoder(decoder, self.exchange, group=self.group)

    def part(self, batch: Batch) -> Batch:
        """A batch of which only this process's positions are trained: no label says what comes after the others."""
        placement = SharedRows.of(batch.segment_ids, self.exchange, group=self.group).placement
        follows = torch.zeros(batch.labels.shape[1] + 1, dtype=torch.bool, device=batch.labels.device)
        follows[placement.mine() + 1] = True
        return replace(batch, labels=batch.labels.masked_fill(~follows[:-1], IGNORE))

    def begin(self, batch: Batch) -> None:
        """The next pass, forward and backward, is over these rows."""
        self.decoder.begin(batch.segment_ids)

    def end(self) -> None:
        """Passes are over whole rows again, in each process by itself: answers, scores."""
        self.decoder.end()

    def finish(self) -> None:
        """Leave the model as it was found."""
        self.decoder.remove()


def check_rows(model: nn.Module, objective: Objective, parallel: Parallel) -> MultimodalLM:
    """See that rows can be shared.

    Raises:
        ConfigError: The model is none that reads rows with a decoder of Hugging Face, or one that goes across positions
            in another way than by attention; or the loss is no sum over tokens.
    """
    if not isinstance(model, MultimodalLM) or type(objective) is not NextToken:
        name = type(objective).__name__ if isinstance(model, MultimodalLM) else type(model).__name__
        raise ConfigError(
            f"parallel.context is {parallel.context}: rows of next-token training of a MultimodalLM can be shared, "
            f"and this is {name}",
            place="trainer.parallel.context",
            remedy="set it to 1",
        )
    if mixtures(model):
        raise ConfigError(
            f"parallel.context is {parallel.context}, and the decoder has experts, whose room and balance are of whole "
            "samples",
            place="trainer.parallel.context",
            remedy="set it to 1",
        )
    check_shared(model.decoder, parallel.context_attention, world=parallel.context * parallel.tensor)
    return model
