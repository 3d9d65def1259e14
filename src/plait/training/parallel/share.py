"""What one of several processes holds of a model and of a batch, from sizes alone, by the functions that really cut.

Which blocks a stage has is said by :mod:`plait.training.parallel.deal`, how many micro-batches it holds by
:mod:`plait.training.parallel.order`, what ZeRO leaves by :mod:`plait.training.zero`. A decoder of which ``tensor``
processes divide the matrices is, to each of them, a decoder with fewer heads, a narrower feed-forward network and fewer
words: its weights and activations follow from these sizes. Tests compare all of it with what the layouts hold.

Example:
    >>> from plait.training.cost import SMOLLM2_135M
    >>> one = Member.of(Parallel(tensor=3), rank=0, world=3)
    >>> one.decoder(SMOLLM2_135M).heads, SMOLLM2_135M.heads
    (3, 9)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from plait.core.estimate import Peaks, Share, peak_of
from plait.core.grid import Grid
from plait.training.cost import DecoderShape, Lora
from plait.training.parallel.deal import dealt
from plait.training.parallel.order import SCHEDULES, most_kept
from plait.training.trainer import Parallel
from plait.training.zero import zero_bytes

SAVED = "saved"
"""The moment in which a checkpoint of pieces is written: each process its own, from copies, and process 0 the model's
own files, from whole weights."""

WHOLE = "whole"
"""The moment, at the end of a phase, in which a model that lies in pieces is put together in every process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model that trains, or of which a part does.

    Attributes:
        shape: Of its decoder.
        width: Bytes of a weight of the decoder; 4 where it learns.
        learns: Whether the decoder's own weights do.
        lora: Its adapter.
        adapter: Weights of the adapter.
        beside: Learning weights beside it: connectors.
        media: Weights of all connectors, by which stages are chosen.
        still: Bytes of what stands still beside it: towers, and connectors that do not learn.
    """

    shape: DecoderShape
    width: int
    learns: bool = False
    lora: Lora | None = None
    adapter: int = 0
    beside: int = 0
    media: int = 0
    still: int = 0

    @property
    def bytes(self) -> int:
        """Of all weights, as one process holds them."""
        return self.width * self.shape.params + 4 * (self.adapter + self.beside) + self.still


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What one process has of a model before ZeRO divides it once more.

    Attributes:
        blocks: Learning weights in blocks.
        rest: Learning weights outside of them.
        still_blocks: Bytes of what does not learn, in blocks.
        still_rest: And outside.
        layers: Blocks.
        twice: Learning weights outside of blocks that another stage of the pipeline has, too.
    """

    blocks: int
    rest: int
    still_blocks: int
    still_rest: int
    layers: int
    twice: int = 0

    @property
    def learn(self) -> int:
        """Learning weights."""
        return self.blocks + self.rest

    @property
    def still(self) -> int:
        """Bytes of what does not learn."""
        return self.still_blocks + self.still_rest


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One of the processes that train together.

    Attributes:
        parallel: How they share the work.
        rank: Its number.
        world: How many they are.
    """

    parallel: Parallel = field(default_factory=Parallel)
    rank: int = 0
    world: int = 1

    @classmethod
    def of(cls, parallel: Parallel, *, rank: int, world: int) -> Member:
        """One process alone divides nothing, whatever is set."""
        return cls(parallel=parallel if world > 1 else Parallel(), rank=rank, world=world)

    def data_only(self) -> Member:
        """The same process where no language model is divided."""
        return replace(self, parallel=self.parallel.data_only())

    @property
    def grid(self) -> Grid:
        """Where it is among the others."""
        return self.parallel.grid(self.rank, self.world)

    @property
    def spread(self) -> int:
        """Processes that ZeRO divides weights among: those that see other tokens."""
        return self.grid.data * self.grid.context

    @property
    def in_pieces(self) -> bool:
        """Whether processes hold different weights."""
        return self.parallel.spreads or self.parallel.pipeline > 1

    @property
    def ends(self) -> tuple[bool, bool]:
        """Whether it is in the first and in the last stage."""
        place = self.grid.place("pipeline")
        return place == 0, place == self.parallel.pipeline - 1

    def rows(self, rows: int) -> int:
        """Of a batch of so many, how many this process has at most."""
        return math.ceil(rows / self.grid.data)

    def length(self, row: int) -> int:
        """Of a row's positions, how many go through blocks here."""
        return math.ceil(row / self.parallel.context)

    @property
    def pieces(self) -> int:
        """Processes among which positions are divided between the matrices of a block."""
        return self.parallel.tensor if self.parallel.sequence else 1

    def kept(self, pieces: int) -> int:
        """Micro-batches whose activations are there at once, of so many a step."""
        if self.parallel.pipeline == 1:
            return 1
        order = SCHEDULES[self.parallel.schedule](self.grid.place("pipeline"), self.parallel.pipeline, pieces)
        return most_kept(order)

    def decoder(self, shape: DecoderShape, *, loads: Model | None = None) -> DecoderShape:
        """The decoder whose blocks this process computes: its stage's, with its part of every matrix.

        Args:
            shape: Of the whole one.
            loads: The whole model, whose adapter and connectors count where stages are chosen; by default there are
                none.
        """
        tensor = self.parallel.tensor
        layers = self._blocks(loads or Model(shape=shape, width=4, learns=True))
        if tensor == 1:
            return replace(shape, layers=layers)
        return replace(
            shape,
            layers=layers,
            d_head=shape.d_head or shape.d_model // shape.heads,
            heads=math.ceil(shape.heads / tensor),
            kv_heads=math.ceil(shape.kv_heads / tensor),
            d_ff=math.ceil(shape.d_ff / tensor),
            vocab=math.ceil(shape.vocab / tensor),
            pieces=self.pieces,
        )

    def _blocks(self, model: Model) -> int:
        """Blocks of this stage, by the rule that really cuts."""
        if self.parallel.pipeline == 1:
            return model.shape.layers
        shape = model.shape
        each = (_in_blocks(shape) + model.adapter) / shape.layers
        parts = dealt(
            [each] * shape.layers,
            self.parallel.pipeline,
            self.parallel.pipeline_blocks,
            before=model.media,
            after=shape.vocab * shape.d_model,
        )
        return len(parts[self.grid.place("pipeline")])

    def held(self, model: Model) -> Held:
        """What this process has of a model, as long as it trains."""
        whole, (first, last) = model.shape, self.ends
        own = self.decoder(whole, loads=model)
        blocks = _in_blocks(own, experts=self.parallel.expert)
        table = own.vocab * own.d_model
        rest = table * (first + (last and (not first or not own.tied))) + own.d_model * last
        adapter = 0
        if model.lora is not None and model.adapter:
            adapter = round(model.adapter * model.lora.params(own) / model.lora.params(whole))
        return Held(
            blocks=adapter + (blocks if model.learns else 0),
            rest=model.beside * first + (rest if model.learns else 0),
            still_blocks=0 if model.learns else model.width * blocks,
            still_rest=model.still * first + (0 if model.learns else model.width * rest),
            layers=own.layers,
            twice=table if model.learns and own.tied and first != last else 0,
        )

    # --- memory ----------------------------------------------------------------------------------------------------

    def states(self, held: Held, *, state: float, pieces: int = 1, activations: int = 0) -> dict[str, int]:
        """Weights, gradients and optimizer's state, and what is gathered besides for a moment.

        Args:
            held: What this process has of the model.
            state: Bytes of the optimizer's state by learning weight.
            pieces: Micro-batches of a step.
            activations: Bytes that are alive when the backward pass begins: sums are under way when they have gone.
        """
        from plait.core.collectives import BUCKET  # imports torch

        zero, spread = self.parallel.zero, self.spread
        found = zero_bytes(held.learn, world=spread, stage=zero, bytes_state=state)
        if not zero or self.parallel.pipeline > 1:  # of a stage, gradients stay whole: see parallel/updates.py
            # Small gradients are put together for their sum.
            message = min(4 * held.learn, BUCKET) if spread > 1 else 0
            message = max(message, 4 * held.twice - activations)  # of the other copy, when activations have gone
            return found | {"weights": found["weights"] + held.still} | ({"gathered": message} if message else {})
        block = math.ceil((4 * held.blocks + held.still_blocks) / max(1, held.layers))
        outer = 4 * held.rest + held.still_rest
        # A group's whole gradient, and the copy of it that is summed.
        sums = 8 * max(math.ceil(held.blocks / max(1, held.layers)), held.rest)
        if zero == 1 and pieces == 1:  # sent on as it comes
            found["gradients"] = zero_bytes(held.learn, world=spread, stage=2)["gradients"]
        if zero == 3:
            weights, gathered = found["weights"] + math.ceil(held.still / spread), outer + 2 * block
        else:
            weights, gathered = found["weights"] + held.still, math.ceil((4 * held.learn + held.still) / spread)
        return found | {"weights": weights, "gathered": gathered + max(0, sums - activations)}

    def apart(self, phase: str, held: Held, parts: Mapping[str, int], *, model: int) -> dict[str, dict[str, int]]:
        """Parts of memory in the moments beside a phase that a model in pieces has (:data:`SAVED`, :data:`WHOLE`).

        Args:
            phase: Its name; "" where the stage has one alone.
            held: What this process has of the model.
            parts: Of memory in the phase.
            model: Bytes of all of the model.
        """
        if not self.in_pieces:
            return {}
        spread = self.spread if self.parallel.zero and self.parallel.pipeline == 1 else 1
        learn, still = math.ceil(4 * held.learn / spread), math.ceil(held.still / spread)
        # What a stage of a pipeline has is a part of the whole.
        whole = model if self.parallel.pipeline > 1 else model + learn + still
        idle = {**parts, "gradients": 0, "activations": 0}
        # What is written is copied, then made bytes. What two stages have is written once: by each of them, say, half.
        copies = 2 * (learn + parts["optimizer"])
        copies -= round(copies * held.twice / (2 * max(1, held.learn)))
        saved = idle | {"weights": learn + still if self.rank else whole, "gathered": copies}
        before = f"{phase}, " if phase else ""
        return {f"{before}{SAVED}": saved, f"{before}{WHOLE}": idle | {"weights": whole, "gathered": 0}}


def by_process(
    parallel: Parallel,
    processes: int,
    moments: Callable[[Member], Mapping[str, Mapping[str, int]]],
    *,
    sent: Callable[[Member], Mapping[str, int]] | None = None,
) -> Peaks:
    """Memory of each of several processes; of one, its own alone.

    Args:
        parallel: How they share the work.
        processes: How many there are.
        moments: Parts of memory at each moment, of one of them.
        sent: Bytes that it sends in a step.

    Raises:
        ConfigError: So many cannot be divided so.
    """
    if processes == 1:
        return Peaks(**peak_of(moments(Member())), shares=())
    kinds: dict[tuple[int, bool], list[int]] = {}
    for rank in range(processes):
        kinds.setdefault((parallel.grid(rank, processes).place("pipeline"), rank == 0), []).append(rank)
    shares: list[Share] = []
    for ranks in kinds.values():
        member = Member.of(parallel, rank=ranks[0], world=processes)
        one = Share(ranks=tuple(ranks), **peak_of(moments(member)), sent=sent(member) if sent else {})
        alike = next((s for s in shares if replace(s, ranks=()) == replace(one, ranks=())), None)
        if alike is None:
            shares.append(one)
        else:
            shares[shares.index(alike)] = replace(alike, ranks=tuple(sorted((*alike.ranks, *ranks))))
    most = max(shares, key=lambda share: sum(share.memory.values()))
    return Peaks(memory=most.memory, moments=most.moments, shares=tuple(shares))


def _in_blocks(shape: DecoderShape, *, experts: int = 1) -> int:
    """Weights of all blocks, of whose experts a process has its part."""
    tables = shape.vocab * shape.d_model * (1 if shape.tied else 2)
    elsewhere = shape.layers * (shape.experts - shape.experts // experts) * shape.expert_params
    return shape.params - tables - shape.d_model - elsewhere
