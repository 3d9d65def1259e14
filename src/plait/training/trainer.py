"""What every training stage lets a recipe set: ``stages.<stage>.trainer``.

Numbers of steps, batch sizes and peak rates are the stage's own, since they differ from phase to phase.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from plait.core.errors import ConfigError
from plait.core.grid import Grid
from plait.core.spec import Spec
from plait.training.guard import Guard
from plait.training.optim import AdamW, Optimizer
from plait.training.schedule import Cosine, Schedule


class Average(Spec):
    """A moving average of the trained weights, one update a step."""

    decay: float = Field(default=0.999, gt=0.0, lt=1.0)
    """Share of the old average that stays; in the first steps less, so that the start is soon forgotten."""
    use: bool = True
    """Look at, score and save the average as the model. Otherwise it is only kept in the checkpoints' `resume/`."""


class Validate(Spec):
    """Judging while training: the loss on samples of the split `validation`, which is in no test and not trained on.

    It is what is minimized (the same terms with the same weights, as sums over counts), without dropout, views or other
    changes. The checkpoint that is best so is the result.
    """

    every: int = Field(default=50, ge=1)
    """Steps from one evaluation to the next; the last step is evaluated, too."""
    samples: int = Field(default=128, ge=2)
    """Most samples that are evaluated, the same ones every time and for every seed of the stage, in the shares that
    training has (of tasks). A contrastive loss compares all of them with each other, so its value depends on their
    number, not on `batch_size`."""
    patience: int = Field(default=0, ge=0)
    """So many evaluations in a row without a gain end training early; 0 never does."""
    least_gain: float = Field(default=0.0, ge=0.0)
    """What the best evaluation must be beaten by to be one with a gain."""
    gap: bool = True
    """Evaluate as many samples of training likewise: how much lower their loss is shows what is learned by heart. It
    doubles the time of evaluations."""


class Parallel(Spec):
    """How processes that train together (`torchrun`) share the work. One process does all of it and ignores this."""

    zero: Literal[0, 1, 2, 3] = 0
    """What each process keeps only its part of (ZeRO, by torch's FSDP2): `0` nothing, every process has the whole
    model (DDP); `1` the optimizer's state; `2` gradients, too; `3` weights, too: a block's are gathered while it is
    computed, and again for its backward pass. Results are those of one process, but for what dropout draws."""
    offload: bool = False
    """Keep what is spread in the host's memory, and move a block's weights to the GPU while it is computed; needs
    `zero` of 1 or more."""

    tensor: int = Field(default=1, ge=1)
    """Processes that divide the matrices of a language model's blocks, its vocabulary and its heads between them
    (Megatron): neighbours, which get the same batches. The number of processes is a multiple of it."""
    sequence: bool = False
    """Between these matrices (norms, the stream from block to block, dropout) each of the processes that `tensor`
    divides them among keeps its own piece of the positions (Megatron's sequence parallelism): less memory for
    activations, the same results. Needs `tensor` of 2 or more; not together with `context`."""
    pipeline: int = Field(default=1, ge=1)
    """Stages that the blocks of a language model are cut into, each on a process of its own: towers, connectors and
    embeddings are on the first, norm, head and loss on the last. Of `m` micro-batches (`micro_batch`) and `p` stages,
    each process is idle for `(p - 1) / (m + p - 1)` of a step. Goes together with `tensor` and with `zero: 1`."""
    schedule: Literal["1f1b", "gpipe"] = "1f1b"
    """Order of a pipeline's work: `1f1b` keeps the activations of at most as many micro-batches as there are stages,
    `gpipe` of all. Idle times and results are equal."""
    pipeline_blocks: tuple[int, ...] = ()
    """Blocks of each stage; by default so many that all have about equal work."""

    expert: int = Field(default=1, ge=1)
    """Processes that divide the experts of a language model between them, and send each other tokens (GShard):
    neighbours, which get other samples. It divides the number of data shares, and the number of experts. Not together
    with `zero`, `tensor`."""
    context: int = Field(default=1, ge=1)
    """Processes that share each row of a language model's tokens (context or sequence parallelism): neighbours, which
    get the same batches. Each computes the decoder's blocks for its part of a row, so that activations of long rows
    take a part of the memory; attention goes over all of it. The number of processes is a multiple of it."""
    context_attention: Literal["ring", "ulysses"] = "ring"
    """How attention reaches the other parts of a row: `ring` passes keys and values on from process to process;
    `ulysses` deals out heads and brings all positions of some together, which sends less the more processes there are;
    `context` (times `tensor`) must divide the number of heads."""

    def data_only(self) -> Parallel:
        """Without what divides a language model: for a part that has none."""
        off = {"tensor": 1, "sequence": False, "expert": 1, "context": 1, "pipeline": 1, "pipeline_blocks": ()}
        return self.model_copy(update=off)

    @property
    def divides(self) -> bool:
        """Whether any process holds or computes a part that others do not, beside ZeRO."""
        return max(self.tensor, self.pipeline, self.expert, self.context) > 1

    @property
    def spreads(self) -> bool:
        """Whether weights lie in pieces on several processes, in one way or another; a stage has its own whole."""
        return bool(self.zero) or self.tensor > 1 or self.expert > 1

    def grid(self, rank: int, world: int) -> Grid:
        """Where a process is among the others; one alone divides nothing, whatever is set.

        Raises:
            ConfigError: These cannot be divided so.
        """
        if world == 1:
            return Grid.of(rank, world)
        grid = Grid.of(rank, world, pipeline=self.pipeline, context=self.context, tensor=self.tensor)
        if grid.data % self.expert:
            raise ConfigError(
                f"{self.expert} processes are to divide the experts, and there are {grid.data} data shares",
                place="trainer.parallel.expert",
                remedy=f"start a multiple of {self.expert} processes, or set a divisor of {grid.data}",
            )
        return grid

    def check_device(self, device: str) -> None:
        """See that weights can be divided so on a device.

        Args:
            device: ``cpu``, ``cuda`` or ``mps``.

        Raises:
            ConfigError: CPU offload, where weights are on the CPU anyway.
        """
        if self.offload and device == "cpu":
            raise ConfigError(
                "parallel.offload is true, but the weights are in this processor's memory anyway",
                place="trainer.parallel.offload",
                remedy="set it to false, or train on a GPU",
            )

    def check_decoder(self, *, heads: int, kv_heads: int, layers: int, experts: int) -> None:
        """See that a decoder of these sizes can be divided so, long before it is loaded.

        Raises:
            ConfigError: It cannot.
        """
        for name, count in (("heads", heads), ("heads of keys", kv_heads)):
            if count % self.tensor:
                raise ConfigError(
                    f"tensor is {self.tensor}, and the decoder has {count} {name}, which cannot be dealt out evenly",
                    place="trainer.parallel.tensor",
                    remedy=f"set a divisor of {heads} heads and {kv_heads} heads of keys: "
                    + ", ".join(str(n) for n in range(1, kv_heads + 1) if not (heads % n or kv_heads % n)),
                )
        if self.context_attention == "ulysses" and self.context > 1 and heads % (self.context * self.tensor):
            raise ConfigError(
                f"context is {self.context} with ulysses, and the decoder has {heads} heads",
                place="trainer.parallel.context",
                remedy="set a divisor (of heads over tensor), or context_attention: ring",
            )
        if self.pipeline > layers:
            raise ConfigError(
                f"pipeline is {self.pipeline}, and the decoder has {layers} blocks",
                place="trainer.parallel.pipeline",
                remedy="set it to that or less",
            )
        if self.expert > 1 and (not experts or experts % self.expert):
            raise ConfigError(
                f"expert is {self.expert}, and the decoder has {experts or 'no'} experts",
                place="trainer.parallel.expert",
                remedy="set a divisor" if experts else "set 1, or take a decoder with experts (mixtral)",
            )

    @model_validator(mode="after")
    def _experts(self) -> Parallel:
        why = {
            "zero": "it would cut experts again, and gather those of all processes",
            "tensor": "both cut the matrices of the same networks",
            "pipeline": "a mixture's losses are in every stage",
            "context": "its capacity and balance are of whole samples",
        }
        other = next((name for name in why if getattr(self, name) > (name != "zero")), None)
        if self.expert > 1 and other is not None:
            raise ValueError(
                f"expert is {self.expert} and {other} is {getattr(self, other)}: {why[other]}; set one off"
            )
        return self

    @model_validator(mode="after")
    def _spread(self) -> Parallel:
        if self.offload and not self.zero:
            raise ValueError("offload moves what is spread, and zero is 0: set zero to 1, 2 or 3, or offload to false")
        return self

    @model_validator(mode="after")
    def _pieces(self) -> Parallel:
        if self.sequence and self.tensor == 1:
            raise ValueError(
                "sequence cuts rows for the processes that divide matrices, and tensor is 1: set tensor to 2 or more, "
                "or sequence to false"
            )
        if self.sequence and self.context > 1:
            raise ValueError(
                f"sequence is true and context is {self.context}: both cut rows by their positions; set one off"
            )
        return self

    @model_validator(mode="after")
    def _stages(self) -> Parallel:
        if self.pipeline == 1 and self.pipeline_blocks:
            raise ValueError(
                "pipeline_blocks are those of a pipeline's stages, and pipeline is 1: set it, or take them out"
            )
        if self.pipeline > 1 and self.context > 1:
            raise ValueError("pipeline and context are both set, and are not tried together: set one of the two")
        if self.pipeline > 1 and self.zero > 1:
            raise ValueError(
                f"pipeline is {self.pipeline} and zero is {self.zero}: a stage has passes of several micro-batches "
                "under way, which need its weights and gradients whole: set zero to 1 or 0, or pipeline to 1"
            )
        if self.pipeline > 1 and self.offload:
            raise ValueError("pipeline and offload are both set: a stage's weights stay where they are; set one off")
        if self.pipeline_blocks and (len(self.pipeline_blocks) != self.pipeline or min(self.pipeline_blocks) < 1):
            raise ValueError(f"pipeline_blocks must be {self.pipeline} numbers from 1 on, one for each stage")
        return self


class Trainer(Spec):
    """How a stage trains, in all of its phases.

    Example:
        >>> Trainer(schedule={"kind": "linear", "warmup": 0.1}).schedule.factor(10, 20)
        0.5555555555555556
    """

    optimizer: Optimizer = AdamW()
    """Which optimizer; one of another `kind` begins with its own defaults."""
    schedule: Schedule = Cosine()
    """How the learning rates move; one of another `kind` begins with its own defaults."""
    layer_decay: float = Field(default=1.0, gt=0.0, le=1.0)
    """Rate of a layer over that of the layer above it, in every stack of layers that trains; 1: all equal. What comes
    before a stack (embeddings) counts as one more layer, what follows (norm, head) as one, too."""
    clip_norm: float | None = Field(default=1.0, gt=0.0)
    """Largest norm of the whole gradient: a longer one is scaled to it. null never clips."""
    head: Literal["fused", "full"] = "fused"
    """Loss over a vocabulary, in tune and align (pretrain leaves no choice): `fused` goes through the scores of some
    positions after the others and keeps none; `full` computes all at once. Values and gradients are equal. Not `full`
    together with `parallel.tensor`."""
    recompute: Literal["none", "full", "selective"] = "none"
    """What Transformer blocks keep for the backward pass: `none` recomputes nothing; `full` keeps a block's input alone
    and runs the block again; `selective` keeps the results of wide matrix products and of fused attention, too; not
    together with `compile`. Gradients are the same bits. Pretrain refuses it where no
    Transformer learns (heads on frozen towers, convolutions); tune's phase `words` does without."""
    compile: bool = False
    """Compile Transformer blocks while training (torch.compile): takes up to a minute at the start of a phase, and a
    C++ compiler. Results differ by rounding. Where there are blocks: as `recompute`."""
    workers: int = Field(default=0, ge=0)
    """Processes that make batches ahead while training is at work; 0 makes each batch when it is its turn. Batches and
    their order are the same for any number. It pays where batches take long to make (`data_wait` in `metrics.jsonl`)
    and cores are left; each process takes about 60 MiB and a copy of the texts."""
    average: Average | None = None
    """Keep a moving average of the trained weights (EMA): `{}` takes its defaults. By default there is none."""
    validation: Validate | None = None
    """Judge the model while it trains, keep the best checkpoint, stop early: `{}` takes its defaults; needs
    `data.source.validation`. With `average.use` it is the average that is judged. By default nothing is."""
    micro_batch: int = Field(default=0, ge=0)
    """Samples of a batch that go through the model at once: less memory, the same gradient, also of a contrastive loss
    (cached gradients: up to one forward pass more). Of packed rows (tune), the rows that so many samples fill. 0 takes
    the whole batch."""
    guard: Guard = Guard()
    """What happens where a step goes wrong: spikes, numbers that are not finite, memory that runs out."""
    parallel: Parallel = Parallel()
    """How several processes share the work."""
    async_save: bool = False
    """Write checkpoints beside training, from a copy of the state in host memory: a step waits only while it is copied.
    It takes as much more memory as a checkpoint has bytes."""

    @model_validator(mode="after")
    def _together(self) -> Trainer:
        if self.compile and self.recompute == "selective":
            raise ValueError(
                "recompute is selective and compile is true: it chooses among operations, of which a compiled block "
                "has one; set recompute to full or none, or compile to false"
            )
        return self

    @model_validator(mode="after")
    def _spread(self) -> Trainer:
        if self.parallel.spreads:
            check_spread(self.optimizer.kind, compiles=self.compile, async_save=self.async_save)
        if self.parallel.pipeline > 1:
            check_staged(compiles=self.compile, async_save=self.async_save)
        check_context(self.parallel, compiles=self.compile)
        if self.parallel.tensor > 1 and self.head == "full":
            raise ValueError(
                "head is full and parallel.tensor is set: every process would put the whole head together and compute "
                "all scores, which tensor divides; set head to fused"
            )
        return self

    @property
    def judged_every(self) -> int:
        """Steps between evaluations; 0 where nothing is judged."""
        return self.validation.every if self.validation else 0

    def pieces(self, batch_size: int) -> int:
        """Micro-batches that a batch of so many samples comes in."""
        return math.ceil(batch_size / self.micro_batch) if self.micro_batch else 1

    def check_whole(self, *, stage: str) -> None:
        """See that batches are not to be split, for a stage that takes them whole.

        Raises:
            ValueError: ``micro_batch`` is set.
        """
        if self.micro_batch:
            raise ValueError(
                f"trainer.micro_batch is {self.micro_batch}: {stage} takes its batches whole; lower batch_size instead"
            )

    def check_no_head(self, *, stage: str) -> None:
        """See that no head is chosen, for a stage without a choice.

        Raises:
            ValueError: ``head`` is not the default.
        """
        if self.head != "fused":
            raise ValueError(f"trainer.head is {self.head}: {stage} leaves no choice of head; take it out")

    def check_data_only(self, *, stage: str) -> None:
        """See that nothing divides a language model, for a stage without one.

        Raises:
            ValueError: ``parallel.tensor`` or ``parallel.context`` is set.
        """
        if self.parallel.divides:
            raise ValueError(
                f"trainer.parallel divides a language model between processes, and {stage} trains none; take it out"
            )

    def check_no_blocks(self, *, learns: str) -> None:
        """See that nothing is to be done with Transformer blocks, where none learns.

        Args:
            learns: What does.

        Raises:
            ValueError: ``recompute`` or ``compile`` is set.
        """
        if self.compile or self.recompute != "none":
            name, value, off = ("compile", "true", "false") if self.compile else ("recompute", self.recompute, "none")
            raise ValueError(f"trainer.{name} is {value}: {learns} learns, without Transformer blocks; set {off}")

    def state_bytes(self, *, tables: float = 0.0) -> float:
        """Bytes that the optimizer and the average keep of each trained float32 weight, for large matrices.

        Args:
            tables: Share of the weights that are embeddings or heads over a vocabulary.
        """
        side = 512
        inner, outer = (self.optimizer.state_bytes((side, side), inner=inner) / side**2 for inner in (True, False))
        return inner * (1 - tables) + outer * tables + (4 if self.average else 0)


def only_in_one_process(objective: str, processes: int) -> ConfigError:
    """The refusal of an objective that cannot be shared.

    Args:
        objective: Its name.
        processes: That were to share it.
    """
    return ConfigError(
        f"{objective} compares all rows of a batch with each other, but {processes} processes hold a part of it each",
        place="fit",
        remedy="train it in one process",
    )


def check_context(parallel: Parallel, *, compiles: bool) -> None:
    """See that what else is set works on shared rows.

    Raises:
        ValueError: Blocks are compiled.
    """
    if parallel.context > 1 and compiles:
        raise ValueError(
            "parallel.context is set and compile is true: attention over shared rows sends messages, which compiled "
            "blocks are not tried with; set one of them off"
        )


def check_spread(optimizer: str, *, compiles: bool, async_save: bool) -> None:
    """See that what else is set works on pieces of weights.

    Raises:
        ValueError: An optimizer needs a weight as a whole; or another setting does not go together with pieces.
    """
    why = {
        "adafactor": "its steps follow from means over rows and columns",
        "adamw-8bit": "256 numbers of a weight share a scale, wherever it is cut",
        "muon": "it orthogonalizes matrices in bfloat16, which rounds otherwise where they are cut",
    }
    if optimizer in why:
        raise ValueError(
            f"optimizer.kind is {optimizer}, which cannot work on pieces of weights ({why[optimizer]}); take adamw, "
            "sgd, lion or lars, or let every process keep the whole model (take trainer.parallel out)"
        )
    if compiles:
        raise ValueError(
            "compile is true: compiled blocks are not tried in pieces; set it to false, or take trainer.parallel out"
        )
    if async_save:
        raise ValueError(
            "async_save is true: pieces are written within the step, by all processes at once; set it to false, or "
            "take trainer.parallel out"
        )


def check_staged(*, compiles: bool, async_save: bool) -> None:
    """See that what else is set works in the stages of a pipeline.

    Raises:
        ValueError: It does not.
    """
    if compiles:
        raise ValueError("compile is true: compiled blocks are not tried in a pipeline; set it off, or pipeline to 1")
    if async_save:
        raise ValueError(
            "async_save is true: stages write their weights within the step, all at once; set it to false, or "
            "parallel.pipeline to 1"
        )
