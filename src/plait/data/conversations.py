"""Batches of conversations for a language-modeling loss: tasks mixed by weight, rows of one shape, views."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from plait.core.errors import ConfigError, DataError
from plait.core.packing import pack
from plait.core.tensors import Batch, Patches
from plait.core.types import Modality
from plait.data.augment.feature_dropout import FeatureDropout
from plait.data.collate import Account, collate, split_rows
from plait.data.features import FeatureStore
from plait.data.order import generator
from plait.data.template import Rendered


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """One rendered sample.

    Attributes:
        id: Of the sample.
        task: What it asks.
        rendered: Its ids.
        pair: Conversations of one task that have the same are trained one after the other; "" stands alone. Two
            questions about one picture with opposite answers, say: side by side, what picture and answer have in
            themselves cancels in the gradient, and what is left is how they fit.
    """

    id: str
    task: str
    rendered: Rendered
    pair: str = ""


def check_lengths(conversations: Sequence[Conversation], *, most: int) -> None:
    """Refuse conversations that no decoder of this context reads.

    Args:
        conversations: That are to fit.
        most: Tokens that the decoder reads.

    Raises:
        DataError: A conversation is longer than that; names it.
    """
    long = [c for c in conversations if len(c.rendered) > most]
    if long:
        raise DataError(
            f"{len(long)} of {len(conversations)} samples are longer than the {most:,} tokens that the decoder reads, "
            f"the longest {max(len(c.rendered) for c in long):,}",
            place=f"sample {long[0].id}",
            remedy="shorten their texts or leave them out",
        )


@dataclass(frozen=True, kw_only=True)
class ConversationBatches:
    """Source of batches for the training loop: which samples a step sees depends on seed and step alone.

    Each task is gone through in a new random order each epoch; which task comes next is drawn by weight, from some step
    on by other weights if wanted. All batches have one shape: the fewest rows into which each step's samples can be
    packed, filled up with padding. A step may end within a pair.

    Attributes:
        conversations: All of them.
        weights: Share of each task; tasks that are not named are left out.
        late: The first step that has other weights, and these; None keeps the weights to the end.
        stores: Features of pictures, one store a view; a picture that a view's store has not is seen as it is.
        grid_out: The token account of the connector, or of the one of each modality.
        batch_size: Samples a step.
        row: Tokens a row holds.
        pad: Id of padding.
        steps: How many steps there are.
        seed: Of order, tasks and views.
        pieces: Micro-batches a step: its rows are dealt out evenly, for less memory; the gradient stays the same.
        dropout: Of the features of a step's pictures; None leaves them as they are.
        others: Features of what is no picture, by modality; they have neither views nor dropout.

    Raises:
        ConfigError: No task with a weight has samples.
        DataError: A sample is longer than a row; names it.
    """

    conversations: Sequence[Conversation]
    weights: Mapping[str, float]
    stores: Sequence[FeatureStore]
    grid_out: Account
    batch_size: int
    row: int
    pad: int
    steps: int
    seed: int
    pieces: int = 1
    late: tuple[int, Mapping[str, float]] | None = None
    dropout: FeatureDropout | None = None
    others: Mapping[Modality, FeatureStore] = field(default_factory=dict[Modality, FeatureStore])

    def __post_init__(self) -> None:
        long = [c for c in self.conversations if len(c.rendered) > self.row]
        if long:
            longest = max(len(c.rendered) for c in long)
            raise DataError(
                f"{len(long)} of {len(self.conversations)} samples are longer than a row of {self.row} tokens, the "
                f"longest {longest}",
                place=f"sample {long[0].id}",
                remedy=f"set row to {longest} or more, or to 0: then the longest fits",
            )
        for _, weights in self._shares():
            if not any(weights.get(c.task, 0.0) > 0 for c in self.conversations):
                raise ConfigError(
                    f"no sample of the tasks {', '.join(weights)}",
                    place="tasks",
                    remedy="name tasks that the data stage made",
                )

    @cached_property
    def plan(self) -> list[int]:
        """Samples in the order in which they are trained."""
        shares = [(step * self.batch_size, weights) for step, weights in self._shares()]
        return _plan(self.conversations, shares, number=self.steps * self.batch_size, seed=self.seed)

    @cached_property
    def rows(self) -> int:
        """Rows of every batch."""
        return max(len(pack(lengths, row=self.row)) for lengths in self.lengths())

    def lengths(self) -> list[list[int]]:
        """Tokens of each sample of each step."""
        return [[len(c.rendered) for c in self._of(step)] for step in range(self.steps)]

    def step_batches(self, step: int) -> list[Batch]:
        """The micro-batches of the update after ``step`` finished steps; always the same ones."""
        chosen = self._of(step)
        draw = generator(self.seed, "view", step)
        features: dict[str, Patches] = {}
        refs = [ref for c in chosen for ref in c.rendered.media]
        for sha256 in dict.fromkeys(ref.sha256 for ref in refs if ref.modality not in self.others):
            store = self.stores[int(torch.randint(len(self.stores), (1,), generator=draw))]
            features[sha256] = (store if sha256 in store else self.stores[0])([sha256])
        if self.dropout is not None:
            features = self.dropout(features, step)
        features |= {r.sha256: self.others[r.modality]([r.sha256]) for r in refs if r.modality in self.others}
        batch = collate(
            [(c.id, c.rendered) for c in chosen],
            features,
            grid_out=self.grid_out,
            encoded=True,
            row=self.row,
            pad=self.pad,
            rows=self.rows,
        )
        return split_rows(batch, self.pieces)

    def _shares(self) -> list[tuple[int, Mapping[str, float]]]:
        return [(0, self.weights), *([self.late] if self.late else [])]

    def _of(self, step: int) -> list[Conversation]:
        return [self.conversations[i] for i in self.plan[step * self.batch_size : (step + 1) * self.batch_size]]


def _plan(
    conversations: Sequence[Conversation],
    shares: Sequence[tuple[int, Mapping[str, float]]],
    *,
    number: int,
    seed: int,
) -> list[int]:
    """Which sample is when, given from which one on which weights hold; a longer plan begins like a shorter one."""
    groups: dict[tuple[str, str], list[int]] = {}
    for index, conversation in enumerate(conversations):
        groups.setdefault((conversation.task, conversation.pair or f"alone {index}"), []).append(index)
    of_task: dict[str, list[list[int]]] = {}
    for (task, _), group in groups.items():
        of_task.setdefault(task, []).append(group)
    size = {task: sum(map(len, found)) / len(found) for task, found in of_task.items()}
    rng = random.Random(f"{seed} tasks")
    piles: dict[str, list[list[int]]] = {task: [] for task in of_task}
    plan: list[int] = []
    for begin, end in zip(shares, [*shares[1:], (number, {})], strict=True):
        weights = begin[1]
        tasks = sorted(task for task in of_task if weights.get(task, 0.0) > 0)
        while len(plan) < min(end[0], number):
            task = rng.choices(tasks, [weights[task] / size[task] for task in tasks])[0]
            if not piles[task]:
                piles[task] = rng.sample(of_task[task], len(of_task[task]))
            plan += piles[task].pop()
    return plan[:number]
