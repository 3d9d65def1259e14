"""Every fusion by name, as wide as a number of weights allows, with a head that tells two classes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from plait.core.errors import ConfigError
from plait.models import fusion_specs as specs
from plait.models.build_fusion import build_fusion
from plait.models.fusion.encode import Tokenwise
from plait.models.fusion.late import LateFusion
from plait.models.fusion.streams import Fusion, Inputs, vector
from plait.models.specs import Part
from plait.studies.fusing.tasks import MODALITIES
from plait.studies.fusion import FusionName, Norm

CLASSES, HEADS = 2, 2

_SPECS: Mapping[FusionName, Callable[[int], Part]] = {
    "concat-linear": lambda k: specs.Concat(d_out=k, normalize="none"),
    "concat-flags": lambda k: specs.Concat(d_out=k, normalize="none", flags=True),
    "concat-mlp": lambda k: specs.Concat(d_out=k, normalize="none"),
    "features": lambda k: specs.Late(d=k, depth=0, fusion=specs.Concat(d_out=0, normalize="none")),
    "attention": lambda k: specs.ModalityAttention(d_out=k, heads=HEADS),
    "gated": lambda k: specs.Gated(d_out=k),
    "low-rank": lambda k: specs.Mlb(d_out=k, rank=k),
    "bilinear": lambda k: specs.Bilinear(d_out=k),
    "average": lambda k: specs.Decision(classes=CLASSES, d_hidden=k, rule="average"),
    "product": lambda k: specs.Decision(classes=CLASSES, d_hidden=k, rule="product"),
}
"""Free size → settings."""


class Student(nn.Module):
    """A fusion and a head.

    Args:
        fusion: Of the two modalities.
        head: From what it gives to scores of the classes.
    """

    def __init__(self, fusion: Fusion, head: nn.Module) -> None:
        super().__init__()
        self.fusion, self.head = fusion, head

    def forward(self, inputs: Inputs) -> Float[Tensor, "b c"]:
        """Scores."""
        return self.head(self.fusion(inputs).vector())


def student(name: FusionName, d: int, *, size: int, norm: Norm = "none") -> Student:
    """A fusion with its head, weights drawn from torch's generator.

    The head is linear, but for ``concat-mlp`` and ``features``, which have a nonlinearity before it (``features`` a
    joint layer too), and for decisions, which are scores already.

    Args:
        name: Of the fusion.
        d: Width of each modality.
        size: Free size of the fusion: its width, or that of its hidden layer.
        norm: Of each modality on its own, before anything else.
    """
    spec, widths = _SPECS[name](size), dict.fromkeys(MODALITIES, d)
    if isinstance(spec, specs.Concat):
        fusion = build_fusion(spec.model_copy(update={"normalize": norm}), widths)
    else:
        fusion = build_fusion(spec, widths)
        if norm == "rms":
            alike = {m: Tokenwise(nn.RMSNorm(d, elementwise_affine=False)) for m in MODALITIES}
            fusion = LateFusion(alike, fusion)
    return Student(fusion, _head(name, fusion.d_out, size))


def _head(name: FusionName, d: int, size: int) -> nn.Module:
    match name:
        case "average" | "product":
            return nn.Identity()
        case "concat-mlp":
            return nn.Sequential(nn.GELU(), nn.Linear(d, CLASSES))
        case "features":
            return nn.Sequential(nn.Linear(d, size), nn.GELU(), nn.Linear(size, CLASSES))
        case _:
            return nn.Linear(d, CLASSES)


@cache
def size_for(name: FusionName, d: int, weights: int) -> int:
    """The largest free size with at most so many weights, head and all.

    Raises:
        ConfigError: The smallest has more.

    Example:
        >>> [size_for(name, 8, 700) for name in ("concat-linear", "bilinear", "low-rank")]
        [36, 8, 17]
    """
    step = HEADS if name == "attention" else 1
    size, least = 0, _weights(name, d, step)
    while _weights(name, d, size + step) <= weights:
        size += step
    if not size:
        raise ConfigError(
            f"{name} of width {d} has {least} weights at least, {weights} are allowed",
            place="weights",
            remedy=f"allow {least} or more",
        )
    return size


def _weights(name: FusionName, d: int, size: int) -> int:
    with torch.device("meta"):
        return sum(weight.numel() for weight in student(name, d, size=size).parameters())


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a fusion costs, with its head.

    Attributes:
        fusion: Its name.
        d: Width of each modality.
        size: Free size.
        weights: Numbers that learn.
        flops: Of one sample forward: two for each multiply-add of products of matrices, all that is counted.
    """

    fusion: FusionName
    d: int
    size: int
    weights: int
    flops: int


def cost(name: FusionName, d: int, *, size: int) -> Cost:
    """Count on torch's meta device: no weight is drawn and no product computed.

    Example:
        >>> found = cost("bilinear", 8, size=4)  # 9 x 9 products, 4 biases, and a head of 4 x 2 + 2
        >>> found.weights, found.flops == 2 * (9 * 9 * 4 + 9 * 4 + 4 * 2)
        (338, True)
    """
    with torch.device("meta"):
        model = student(name, d, size=size)
        inputs = {modality: vector(torch.zeros(1, d)) for modality in MODALITIES}
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten._trilinear: _trilinear}) as counter:
        model(inputs)
    weights = sum(weight.numel() for weight in model.parameters())
    return Cost(fusion=name, d=d, size=size, weights=weights, flops=counter.get_total_flops())


def _trilinear(
    first: torch.Size, weight: torch.Size, second: torch.Size, *_: object, out_shape: object = None, **__: object
) -> int:
    """Torch has no formula for the product inside ``nn.Bilinear``: first the matrix, then the vector."""
    rows, (d_out, d_first, d_second) = first[0], weight[-3:]
    return 2 * rows * d_out * d_second * (d_first + 1)
