"""MoCo: negatives out of a queue, encoded by a slowly moving copy of the model (He et al., arXiv 1911.05722).

The model encodes the first view of each row, the query; a copy of it whose weights follow by ``k <- m k + (1 - m) q``
(equation 2) encodes the second, the key. A query finds its own key among the keys of earlier batches (equation 1).

Shuffled batch norm of the paper is not here, and nothing stands in for it. It hides that a query and its key, encoded
side by side, have their statistics in common; what has no statistics of the batch leaks nothing. So layer or group
norms are fine, and batch norms that are frozen (eval mode); batch norm in training mode is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from plait.core import dtensors
from plait.core.errors import ConfigError, DataError
from plait.core.tensors import IGNORE, Batch, Embedded, Patches
from plait.core.types import Modality
from plait.objectives.contrastive import CELLS, sum_in_blocks
from plait.objectives.grouped import check_views, counted, exactly, inverse, items_of, wide


def momentum_nce(
    query: Float[Tensor, "b d"],
    key: Float[Tensor, "b d"],
    queue: Float[Tensor, "k d"],
    *,
    temperature: float = 0.07,
    cells: int = CELLS,
) -> Float[Tensor, ""]:
    """MoCo's loss, summed over queries: ``-log(e^{q.k+} / (e^{q.k+} + sum_j e^{q.k_j}))``, scores over the temperature.

    Args:
        query: Unit vectors.
        key: Unit vectors; row i belongs to row i of ``query``.
        queue: Unit vectors of other samples.
        temperature: The paper's is 0.07.
        cells: Scores that are held at once.

    Raises:
        ConfigError: The temperature is not a number above 0, or too small.

    Example:
        >>> one = torch.tensor([[1.0, 0.0]])
        >>> round(momentum_nce(one, one, one.repeat(7, 1)).item(), 4)  # all alike: ln 8
        2.0794
    """
    unknown = torch.full((len(query),), IGNORE, device=query.device)
    past = torch.full((len(queue),), IGNORE, device=query.device)
    every = torch.arange(len(query), device=query.device)
    return _over(query, key, queue, classes=(unknown, past), rows=every, scale=inverse(temperature), cells=cells)


class MomentumContrast(nn.Module):
    """Objective: MoCo over batches with two views of each row; one term ``moco``, counted in rows.

    The model is :mod:`plait.objectives.grouped`'s, asked once a view. What moves beside its weights are buffers of this
    objective: ``key``, a copy of the weights that learn (in float32 at least; what is frozen is no copy), and
    ``queue``. They are saved and put back with the run, to the same bits.

    A step is one call of :meth:`loss` with gradients: then the keys of the whole batch, of all micro-batches and ranks,
    enter the queue in the order of rows, in place of the oldest. The copy follows when the next step begins
    (:meth:`pace`), with the weights as the optimizer left them: as in the paper, where it follows after the update. A
    step that the loop leaves out is taken back with all other buffers: nothing was queued, and the copy stands still.
    Without gradients, as in validation, nothing moves.

    The queue begins with random unit vectors. Where classes are known, a key of the query's class is no negative; with
    classes unknown, as in the paper, an older key of the same sample is one: keep the queue below the data set.

    Args:
        model: What will be trained; its weights at this moment begin the copy.
        width: Of its vectors.
        queue: Keys that are kept.
        momentum: m, from 0 and below 1.
        temperature: See :func:`momentum_nce`.
        seed: Of the first keys.
        cells: Scores that are held at once.

    Raises:
        ConfigError: One of them is out of its range, or nothing in the model learns.
    """

    needs_global_batch = True
    queue: Tensor
    queue_classes: Tensor
    head: Tensor
    stepped: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        width: int,
        queue: int = 4096,
        momentum: float = 0.999,
        temperature: float = 0.07,
        seed: int = 0,
        cells: int = CELLS,
    ) -> None:
        super().__init__()
        if not 0 <= momentum < 1:
            raise ConfigError(f"momentum is {momentum:g}", place="momentum", remedy="set it to 0 or more and below 1")
        if queue < 1:
            raise ConfigError(f"the queue holds {queue} keys", place="queue", remedy="set it to 1 or more")
        self.momentum, self.scale, self.cells = momentum, inverse(temperature), cells
        self._online = (model,)  # a plain attribute: its weights are not this objective's
        learning = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        if not learning:
            raise ConfigError("nothing in the model learns", place="model", remedy="unfreeze a part of it")
        self.key = _copy_of(learning)
        like = wide(next(iter(learning.values())).detach())
        first = torch.randn(queue, width, generator=torch.Generator().manual_seed(seed)).to(like)
        self.register_buffer("queue", functional.normalize(first, dim=1))
        self.register_buffer("queue_classes", torch.full((queue,), IGNORE, device=like.device))
        self.register_buffer("head", torch.zeros((), dtype=torch.int64, device=like.device))
        self.register_buffer("stepped", torch.zeros((), dtype=torch.int64, device=like.device))

    @property
    def keys(self) -> Float[Tensor, "k d"]:
        """The queue, the oldest first."""
        return self.queue.roll(-int(self.head), 0)

    @torch.no_grad()
    def pace(self, step: int, steps: int) -> None:
        """Let the copy follow, if a step was taken since it did."""
        if not int(self.stepped):
            return
        weights = dict(self._online[0].named_parameters())
        for name, copy in self.key.named_buffers():
            copy.lerp_(weights[name].detach().to(copy.dtype), 1 - self.momentum)
        self.stepped.zero_()

    def count(self, batch: Batch) -> Mapping[str, Tensor]:
        """Rows."""
        return counted(batch, "moco")

    def embed(self, model: nn.Module, batch: Batch) -> Embedded:
        """Unit vectors of queries, and of keys, to which no gradient goes.

        Raises:
            DataError: A row has not two views.
            ConfigError: The model has a batch norm in training mode, or lies in pieces on several processes.
        """
        self._check(model)
        query = _unit(*model(first := take_view(batch, 0)), view=first)
        with torch.no_grad():
            # Buffers as copies: what this pass would move in them is the model's own affair.
            tensors = dict(self.key.named_buffers()) | {n: b.clone() for n, b in model.named_buffers()}
            second = take_view(batch, 1)
            key = _unit(*functional_call(model, tensors, (second,)), view=second)
        every = torch.arange(len(query), device=query.device)
        return Embedded(
            vectors={"query": query, "key": key}, row_of={"query": every, "key": every}, classes=batch.labels[:, 0]
        )

    def loss(self, found: Embedded, *, rows: range | None = None) -> Mapping[str, Tensor]:
        """Sum over some rows; with gradients, the keys of all rows enter the queue.

        Raises:
            ConfigError: Vectors are not as wide as the queue.
            DataError: A row has nothing to be told from: all keys in the queue are of its class.
        """
        query, key, past = found.vectors["query"], found.vectors["key"].detach(), self.queue_classes
        if query.shape[1] != self.queue.shape[1]:
            raise ConfigError(
                f"vectors are {query.shape[1]} wide, the queue {self.queue.shape[1]}",
                place="width",
                remedy="build the objective with the width of the model's vectors",
            )
        alike = (past == past[0]).all() & (past[0] != IGNORE)
        if bool((alike & (found.classes == past[0])).any()):
            raise DataError(
                f"all {len(past)} keys in the queue are of class {int(past[0])}, as a row of this batch",
                place="batch",
                remedy="use data of several classes, a longer queue, or no classes",
            )
        total = _over(
            query,
            key,
            self.queue,
            classes=(found.classes, past),
            rows=items_of(found.row_of["query"], rows),
            scale=self.scale,
            cells=self.cells,
        )
        if self.training and torch.is_grad_enabled():
            self._enqueue(key, found.classes)
        return {"moco": total}

    def forward(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """Sum over rows."""
        return self.loss(self.embed(model, batch))

    @torch.no_grad()
    def _enqueue(self, key: Float[Tensor, "b d"], classes: Int[Tensor, " b"]) -> None:
        """Put others in the place of the tensors: the graph of the loss still needs the old ones."""
        size, number = len(self.queue), len(key)
        kept = torch.arange(max(0, number - size), number, device=key.device)
        places = (self.head + kept) % size
        self.queue = self.queue.index_copy(0, places, key[kept].to(self.queue.dtype))
        self.queue_classes = self.queue_classes.index_copy(0, places, classes[kept])
        self.head = (self.head + number) % size
        self.stepped = torch.ones_like(self.stepped)

    def _check(self, model: nn.Module) -> None:
        if found := batch_norms(model):
            raise ConfigError(
                f"{found[0]} takes the statistics of a batch, in which a query and its key give each other away",
                place="model",
                remedy="put batch norms into eval mode, or use layer or group norms",
            )
        copied = {name for name, _ in self.key.named_buffers()}
        if new := [n for n, w in model.named_parameters() if w.requires_grad and n not in copied]:
            raise ConfigError(
                f"{new[0]} learns, and did not when the copy was made",
                place="model",
                remedy="unfreeze all that will learn before the objective is built",
            )
        if any(dtensors.local(weight) is not weight for weight in model.parameters()):
            raise ConfigError(
                "the model lies in pieces on several processes; its copy is whole in each",
                place="trainer.parallel.zero",
                remedy="set it to 0",
            )


def batch_norms(model: nn.Module) -> list[str]:
    """Names of batch norms in training mode."""
    modules: list[tuple[str, nn.Module]] = [*model.named_modules()]
    return [name for name, module in modules if isinstance(module, _BatchNorm) and module.training]


def take_view(batch: Batch, at: int) -> Batch:
    """A batch with the first or the second view of each row alone.

    Args:
        batch: Its rows have two items of each kind of media.
        at: 0 or 1.

    Raises:
        DataError: A row has another number.
    """
    media: dict[Modality, Patches] = {}
    item_row: dict[Modality, Tensor] = {}
    for modality, patches in batch.media.items():
        belongs = batch.item_row[modality]
        check_views(batch.sample_ids, belongs, views=2)
        chosen = belongs.argsort(stable=True)[at::2]
        sizes = patches.grid.prod(1)
        begin, taken = sizes.cumsum(0) - sizes, sizes[chosen]
        shift = begin[chosen] - (taken.cumsum(0) - taken)
        lines = torch.arange(int(taken.sum()), device=taken.device) + shift.repeat_interleave(taken)
        media[modality] = Patches(values=patches.values[lines], grid=patches.grid[chosen])
        item_row[modality] = belongs[chosen]
    return replace(batch, media=media, item_row=item_row)


def _unit(vectors: Float[Tensor, "b d"], belongs: Int[Tensor, " b"], *, view: Batch) -> Float[Tensor, "b d"]:
    """In the order of rows."""
    check_views(view.sample_ids, belongs, views=1)
    with exactly(vectors):
        return functional.normalize(wide(vectors), dim=1)[belongs.argsort()]


def _over(
    query: Float[Tensor, "b d"],
    key: Float[Tensor, "b d"],
    queue: Float[Tensor, "k d"],
    *,
    classes: tuple[Int[Tensor, " b"], Int[Tensor, " k"]],
    rows: Int[Tensor, " a"],
    scale: float,
    cells: int,
) -> Float[Tensor, ""]:
    """Sum over some rows; ``classes`` are those of the rows and of the queue, and equal ones are no negatives."""
    with exactly(query):
        query, key, queue = wide(query), wide(key), wide(queue).to(query.dtype)

        def some(block: Tensor) -> Tensor:
            own, kind = query[block], classes[0][block][:, None]
            same = (kind == classes[1]) & (kind != IGNORE)
            wrong = (own @ queue.T).masked_fill(same, float("-inf"))
            logits = scale * torch.cat([(own * key[block]).sum(1, keepdim=True), wrong], 1)
            return functional.cross_entropy(logits, torch.zeros_like(block), reduction="sum")

        return sum_in_blocks(some, rows, width=len(queue) + 1, cells=cells)


def _copy_of(weights: Mapping[str, nn.Parameter]) -> nn.Module:
    """Modules that hold copies of weights as buffers, under the same names."""
    root = nn.Module()
    for name, weight in weights.items():
        *path, last = name.split(".")
        place = root
        for part in path:
            if not hasattr(place, part):
                place.add_module(part, nn.Module())
            place = place.get_submodule(part)
        copied = wide(weight.detach()).clone()
        place.register_buffer(last, copied)
    return root
