"""Readers of sequences: Plait's Transformer, and recurrence and convolution of as many weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from plait.core.errors import ConfigError
from plait.models.attention import Places, causal
from plait.models.transformer import Transformer, TransformerSizes
from plait.studies.placing.codes import Width, sequence_code
from plait.studies.stacking.tasks import Task
from plait.studies.transformer import CodeName, ReaderName

KERNEL, LAYERS = 5, 4
"""Of the plain convolutions."""

KERNEL_DILATED, LAYERS_DILATED = 3, 6
"""Of those that skip words, 1, 2, 4, ... in each."""

DEPTH = 2
"""Blocks of the Transformer beside them."""


class Attending(nn.Module):
    """Plait's Transformer over a sequence, each word seeing itself and those before.

    Args:
        sizes: Of the Transformer.
        code: Of positions.
        length: Of the sequences.
    """

    def __init__(self, sizes: TransformerSizes, code: CodeName, length: int) -> None:
        super().__init__()
        self.length = length
        self.code = sequence_code(code, Width(d=sizes.d, heads=sizes.heads), length=length)
        if self.code.absolute is not None:
            for table in self.code.absolute.parameters():
                nn.init.normal_(table, std=0.5)
        self.transformer = Transformer(sizes, relative=self.code.relative)

    def forward(self, x: Float[Tensor, "b t d"], *, weights: list[Tensor] | None = None) -> Float[Tensor, "b t d"]:
        """Read.

        Args:
            x: Words.
            weights: Attention weights of every block are appended here.
        """
        found = self.code.places((self.length,), front=False)
        places = Places(mask=causal(self.length, device=x.device), gap=found.gap, turn=found.turn)
        return self.transformer(x + self.code.added((self.length,)), places, weights=weights)


class Recurrent(nn.Module):
    """One GRU.

    Args:
        d: Width.
    """

    def __init__(self, d: int) -> None:
        super().__init__()
        self.gru = nn.GRU(d, d, batch_first=True)

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """Read."""
        return self.gru(x)[0]


class Convolving(nn.Module):
    """Causal convolutions, each after a norm of every word on its own and added to what came in.

    Args:
        d: Width.
        kernel: Words that one sees.
        dilations: How far apart these are, in each layer.
    """

    def __init__(self, d: int, kernel: int, dilations: Sequence[int]) -> None:
        super().__init__()
        self.kernel, self.dilations = kernel, tuple(dilations)
        self.norms = nn.ModuleList(nn.LayerNorm(d) for _ in dilations)
        self.layers = nn.ModuleList(nn.Conv1d(d, d, kernel, dilation=step) for step in dilations)

    @property
    def reach(self) -> int:
        """How far back it sees."""
        return (self.kernel - 1) * sum(self.dilations)

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """Read."""
        for norm, layer, step in zip(self.norms, self.layers, self.dilations, strict=True):
            before = functional.pad(norm(x).mT, ((self.kernel - 1) * step, 0))
            x = x + functional.gelu(layer(before)).mT
        return x


class Reader(nn.Module):
    """Words, a body that reads them, and one linear head for all questions.

    Args:
        body: From vectors of words to vectors that know those before.
        d: Width.
        task: What is read and asked.
    """

    def __init__(self, body: Attending | Recurrent | Convolving, d: int, task: Task) -> None:
        super().__init__()
        self.body, self.words_each = body, task.words
        self.words = nn.Embedding(task.vocabulary, d)
        nn.init.normal_(self.words.weight, std=0.5)  # about as large as sines and cosines
        self.head = nn.Linear(d, len(task.questions) * task.words)

    def forward(self, ids: Int[Tensor, "b t"]) -> Float[Tensor, "b t q v"]:
        """Scores of all words for every question, at every position."""
        return self.answer(self.body(self.words(ids)))

    def answer(self, hidden: Float[Tensor, "b t d"]) -> Float[Tensor, "b t q v"]:
        """The head alone."""
        return self.head(hidden).unflatten(-1, (-1, self.words_each))


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """What readers beside each other have in common.

    Attributes:
        task: What they read.
        code: Of the Transformer's positions.
        heads: Of the Transformer.
        weights: At most so many.
    """

    task: Task
    code: CodeName
    heads: int
    weights: int


def reader(name: ReaderName, d: int, beside: Beside) -> Reader:
    """A reader by name, weights drawn from torch's generator."""
    match name:
        case "transformer":
            sizes = TransformerSizes(d=d, depth=DEPTH, heads=beside.heads, d_ff=2 * d)
            body = Attending(sizes, beside.code, beside.task.length)
        case "gru":
            body = Recurrent(d)
        case "cnn":
            body = Convolving(d, KERNEL, [1] * LAYERS)
        case "dilated":
            body = Convolving(d, KERNEL_DILATED, [2**i for i in range(LAYERS_DILATED)])
    return Reader(body, d, beside.task)


@cache
def width_for(name: ReaderName, beside: Beside) -> int:
    """The greatest width with at most so many weights, all of the reader counted.

    Raises:
        ConfigError: The narrowest has more.
    """
    step = 2 * beside.heads if name == "transformer" else 1
    d, least = 0, weights_of(name, step, beside)
    while weights_of(name, d + step, beside) <= beside.weights:
        d += step
    if not d:
        raise ConfigError(
            f"{name} has {least} weights at least, {beside.weights} are allowed",
            place="distance.weights",
            remedy=f"allow {least} or more",
        )
    return d


def weights_of(name: ReaderName, d: int, beside: Beside) -> int:
    """Numbers that learn, counted on torch's meta device."""
    with torch.device("meta"):
        return sum(weight.numel() for weight in reader(name, d, beside).parameters())


def hops(name: ReaderName, distance: int) -> int | None:
    """Fewest layers or steps between a word and what is said so much later; None: it cannot be heard.

    Example:
        >>> [hops(name, 16) for name in ("transformer", "gru", "cnn", "dilated")]
        [1, 17, 4, 2]
        >>> hops("cnn", 17) is None
        True
    """
    match name:
        case "transformer":
            return 1
        case "gru":
            return distance + 1
        case "cnn":
            kernel, dilations = KERNEL, [1] * LAYERS
        case "dilated":
            kernel, dilations = KERNEL_DILATED, [2**i for i in range(LAYERS_DILATED)]
    fewest = {0: 0}  # reached distance → layers that do not just pass on
    for step in dilations:
        after = dict(fewest)
        for far, count in fewest.items():
            for tap in range(1, kernel):
                there = far + tap * step
                after[there] = min(after.get(there, count + 1), count + 1)
        fewest = after
    return fewest.get(distance)
