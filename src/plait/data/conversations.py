"""Batches of conversations for a language-modeling loss: tasks mixed by weight, rows of one shape, views."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from plait.core.errors import ConfigError, DataError
from plait.core.packing import pack
from plait.core.tensors import Batch, Patches
from plait.core.types import MediaRef, Modality
from plait.data.augment.feature_dropout import FeatureDropout
from plait.data.collate import Account, AccountTable, collate_rows, split_rows
from plait.data.features import FeatureStore
from plait.data.mixture import Mixture
from plait.data.order import by_length, check_rank, generator
from plait.data.packing import row_length
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


def tabled(account: Account, stores: Sequence[FeatureStore], refs: Sequence[MediaRef]) -> Account:
    """A token account of the grids that media have, without the model behind it.

    Args:
        account: Of the model.
        stores: Where the media's features are.
        refs: The media.
    """

    def table(of: Callable[[Tensor], Tensor], wanted: set[str]) -> AccountTable:
        return AccountTable.of(of, torch.cat([store.grids(wanted) for store in stores]).unique(dim=0))

    if not isinstance(account, Mapping):
        return table(account, {ref.sha256 for ref in refs})
    return {m: table(of, {ref.sha256 for ref in refs if ref.modality == m}) for m, of in account.items()}


@dataclass(frozen=True, kw_only=True)
class ConversationBatches:
    """Source of batches for the training loop: which samples a step sees depends on seed and step alone.

    Each task is gone through in a new random order each epoch; which task comes next is drawn by weight, from some step
    on by other weights if wanted (:class:`~plait.data.mixture.Mixture`). All batches have one shape: the fewest rows
    into which each step's samples can be packed, filled up with padding. A step may end within a pair.

    The rows of a step are the same for any number of ranks, and are dealt to them in turn; each rank reads what its own
    rows need. A rank for which there is none gets padding, so that all ranks have batches of one shape and as many.

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
        group_by_length: Within windows of so many batches, put samples of like length into one batch, whose rows are
            then as long and as many as suits it, ``row`` at most: short ones are not paid for as long ones are.
            1 only fits the rows to each batch; 0 gives all batches the same rows.
        packed: Whether a row holds several samples; without, each has one, as long as the longest of its step.
        rank: Which of the processes that train together this is.
        world: How many there are.

    Raises:
        ConfigError: No task with a weight has samples, or there is no such rank.
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
    group_by_length: int = 0
    packed: bool = True
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        check_rank(self.rank, self.world)
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
        mixed = Mixture(
            sources=self._groups(),
            weights=self.weights,
            late=(self.late[0] * self.batch_size, self.late[1]) if self.late else None,
            seed=self.seed,
        )
        number = self.steps * self.batch_size
        if not self.group_by_length:
            return mixed.first(number)
        window = self.group_by_length * self.batch_size
        first = -(-number // window) * window  # whole windows, so that a longer plan begins like a shorter one
        if mixed.late:
            first = min(first, mixed.late[0])  # over which none reaches
        plan, lengths = mixed.first(first + max(0, -(-(number - first) // window) * window)), self._sorted_by()
        grouped: list[int] = []
        for part in (plan[:first], plan[first:]):
            grouped += by_length(part, lengths, batch_size=self.batch_size, window=self.group_by_length, seed=self.seed)
        return grouped[:number]

    @cached_property
    def rows(self) -> int:
        """Rows of every batch of all ranks together, where all have one shape."""
        return max(len(pack(lengths, row=self.row)) for lengths in self.lengths())

    def shape(self, step: int) -> tuple[int, int]:
        """Rows of a step's batch of all ranks together, and tokens of a row."""
        lengths = self._lengths(step)
        if not self.packed:
            return len(lengths), max(lengths)
        if not self.group_by_length:
            return self.rows, self.row
        row = min(row_length([lengths]), self.row)
        return len(pack(lengths, row=row)), row

    def lengths(self) -> list[list[int]]:
        """Tokens of each sample of each step."""
        return [self._lengths(step) for step in range(self.steps)]

    def sample_ids(self, step: int) -> list[str]:
        """The samples of a step that this rank trains, without making its batches."""
        return [c.id for members in self._rows_of(step) for c in members]

    def step_batches(self, step: int) -> list[Batch]:
        """The micro-batches of the update after ``step`` finished steps; always the same ones.

        Raises:
            DataError: Something has no features, or becomes another number of tokens than it has placeholders.
        """
        rows = self._rows_of(step)
        batch = collate_rows(
            [[(c.id, c.rendered) for c in members] for members in rows],
            self._features(step, [c for members in rows for c in members]),
            grid_out=self.grid_out,
            encoded=True,
            row=self.shape(step)[1],
            pad=self.pad,
        )
        return split_rows(batch, self.pieces)

    def __getstate__(self) -> dict[str, Any]:
        """For a process that makes batches: with the plan, and without the model behind the token account."""
        self.plan  # noqa: B018 (computed once, here)
        if self.packed and not self.group_by_length:
            self.rows  # noqa: B018
        refs = [ref for c in self.conversations for ref in c.rendered.media]
        return vars(self) | {"grid_out": tabled(self.grid_out, (*self.stores, *self.others.values()), refs)}

    # --- inside ----------------------------------------------------------------------------------------------------

    def _rows_of(self, step: int) -> list[list[Conversation]]:
        """What stands in each row of this rank; as many rows on every rank."""
        height, row = self.shape(step)
        chosen = self._of(step)
        packed = pack([len(c.rendered) for c in chosen], row=row) if self.packed else [[i] for i in range(len(chosen))]
        packed += [[]] * (-(-height // self.world) * self.world - len(packed))
        return [[chosen[index] for index in members] for members in packed[self.rank :: self.world]]

    def _features(self, step: int, mine: Sequence[Conversation]) -> dict[str, Patches]:
        """Of the media of this rank's samples; views are drawn for those of all ranks."""
        draw = generator(self.seed, "view", step)
        needed = {ref.sha256: ref for c in mine for ref in c.rendered.media}
        everywhere = (ref for c in self._of(step) for ref in c.rendered.media if ref.modality not in self.others)
        features: dict[str, Patches] = {}
        for sha256 in dict.fromkeys(ref.sha256 for ref in everywhere):
            store = self.stores[int(torch.randint(len(self.stores), (1,), generator=draw))]
            if sha256 in needed:
                features[sha256] = (store if sha256 in store else self.stores[0])([sha256])
        if self.dropout is not None:
            features = self.dropout(features, step)
        return features | {
            sha256: self.others[ref.modality]([sha256]) for sha256, ref in needed.items() if ref.modality in self.others
        }

    def _groups(self) -> dict[str, list[list[int]]]:
        """The samples of each task, those of a pair together."""
        groups: dict[tuple[str, str], list[int]] = {}
        for index, conversation in enumerate(self.conversations):
            groups.setdefault((conversation.task, conversation.pair or f"alone {index}"), []).append(index)
        of_task: dict[str, list[list[int]]] = {}
        for (task, _), group in groups.items():
            of_task.setdefault(task, []).append(group)
        return of_task

    def _sorted_by(self) -> list[int]:
        """A length for each sample, one for all of a pair, which so stays together."""
        lengths = [0] * len(self.conversations)
        for group in (group for groups in self._groups().values() for group in groups):
            for index in group:
                lengths[index] = max(len(self.conversations[i].rendered) for i in group)
        return lengths

    def _lengths(self, step: int) -> list[int]:
        return [len(c.rendered) for c in self._of(step)]

    def _shares(self) -> list[tuple[int, Mapping[str, float]]]:
        return [(0, self.weights), *([self.late] if self.late else [])]

    def _of(self, step: int) -> list[Conversation]:
        return [self.conversations[i] for i in self.plan[step * self.batch_size : (step + 1) * self.batch_size]]
