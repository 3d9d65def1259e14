"""Optimizers as typed settings, and which weights get which rate and decay."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from plait.core.errors import ConfigError
from plait.core.spec import Spec
from plait.training.roles import Roles

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer as TorchOptimizer


SMALL = 4096
"""Weights with fewer numbers keep float32 moments in 8-bit AdamW."""

BLOCK = 256
"""Numbers that share one scale in 8-bit AdamW."""

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
"""Memory of a running mean: the share of the old value that stays."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """How fast which weights learn; what a stage or a phase sets, whatever the optimizer.

    Attributes:
        lr: Peak learning rate of every weight that ``parts`` does not name.
        parts: Peak rate by name prefix, such as ``{"connector": 1e-3, "decoder.layers": 1e-4}``; the longest match
            wins.
        no_decay: Name prefixes of further weights that do not decay, such as ``position``.
        layer_decay: Rate of a layer over that of the layer above it: a weight with ``k`` layers above it
            (:attr:`plait.training.roles.Roles.above`) learns at its rate times ``layer_decay ** k``.

    Raises:
        ConfigError: ``lr`` is not above 0, a rate of a part is below it, or ``layer_decay`` is not in (0, 1].
    """

    lr: float = 1e-3
    parts: Mapping[str, float] = field(default_factory=dict)
    no_decay: tuple[str, ...] = ()
    layer_decay: float = 1.0

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ConfigError(f"lr is {self.lr}", place="lr", remedy="set it above 0")
        for part, rate in self.parts.items():
            if not rate >= 0:
                raise ConfigError(f"the rate of {part!r} is {rate}", place="parts", remedy="set it to 0 or above")

        if not 0 < self.layer_decay <= 1:
            raise ConfigError(
                f"layer_decay is {self.layer_decay}", place="layer_decay", remedy="set it above 0, and to 1 at most"
            )

    def plain(self) -> dict[str, Any]:
        """As plain data, for the checkpoint."""
        return {
            "lr": self.lr,
            "parts": dict(self.parts),
            "no_decay": list(self.no_decay),
            "layer_decay": self.layer_decay,
        }


class _Optimizer(Spec):
    """What every optimizer has."""

    source: ClassVar[str]
    """Where it comes from."""

    weight_decay: float = Field(default=0.0, ge=0.0)
    """Decay of matrices and embeddings; norms, biases, scalars and vectors (temperature) never decay."""

    def groups(
        self, weights: Mapping[str, nn.Parameter], roles: Roles | None = None, *, rates: Rates
    ) -> list[dict[str, Any]]:
        """Split trainable weights by part, by depth where rates depend on it, and by decay, in a fixed order.

        Args:
            weights: Trainable weights by name.
            roles: Which of them are of norms, and how many layers lie above them.
            rates: How fast they learn.

        Returns:
            Groups for :mod:`torch.optim`, each also with ``part`` (its prefix, or ``rest``), ``above``, ``decays`` and
            ``peak_lr``.

        Raises:
            ConfigError: There is nothing to train, or a prefix of ``parts`` or ``no_decay`` matches no trainable
                weight.
        """
        roles = roles or Roles()
        if not weights:
            raise ConfigError(
                "no weight is trainable", place="model", remedy="set requires_grad_(True) on the parts that learn"
            )
        for setting, prefixes in (("parts", tuple(rates.parts)), ("no_decay", rates.no_decay)):
            for prefix in prefixes:
                if not any(_under(name, prefix) for name in weights):
                    heads = sorted({name.split(".")[0] for name in weights})
                    raise ConfigError(
                        f"{prefix!r} matches none of {len(weights)} trainable weights",
                        place=f"rates.{setting}",
                        remedy=f"use the beginning of a trainable weight's name: {', '.join(heads[:8])}",
                    )
        found: dict[tuple[str, int, bool, bool], list[tuple[str, nn.Parameter]]] = {}
        for name, weight in weights.items():
            part = max((p for p in rates.parts if _under(name, p)), key=len, default="rest")
            above = roles.above.get(name, 0) if rates.layer_decay != 1 else 0
            decays = weight.ndim >= 2 and name not in roles.norms and not any(_under(name, p) for p in rates.no_decay)
            spread = hasattr(weight, "placements")  # torch takes no list of both kinds
            found.setdefault((part, above, decays, spread), []).append((name, weight))
        return [
            {
                "params": named,
                "part": part,
                "above": above,
                "decays": decays,
                "peak_lr": (peak := rates.parts.get(part, rates.lr) * rates.layer_decay**above),
                "lr": peak,
                "weight_decay": self.weight_decay if decays else 0.0,
            }
            for (part, above, decays, _), named in sorted(found.items(), key=lambda item: item[0])
        ]

    def build(self, weights: Mapping[str, nn.Parameter], roles: Roles | None = None, *, rates: Rates) -> TorchOptimizer:
        """Make the torch optimizer; see :meth:`groups`.

        Raises:
            ConfigError: As :meth:`groups`.
        """
        raise NotImplementedError

    def state_bytes(self, shape: Sequence[int], *, inner: bool = True) -> int:
        """Bytes of state that a float32 weight has after a step, but for its count of steps.

        Args:
            shape: Of the weight.
            inner: False for norms, tables that are looked up, and heads over a vocabulary.
        """
        raise NotImplementedError


class AdamW(_Optimizer):
    """Adam with decay apart from the gradient.

    Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/1711.05101"
    kind: Literal["adamw"] = "adamw"
    """Which optimizer."""

    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Memory of the gradient's mean and of its square."""

    eps: float = Field(default=1e-8, gt=0.0)
    """Added to the root of the second moment."""

    def build(self, weights: Mapping[str, nn.Parameter], roles: Roles | None = None, *, rates: Rates) -> TorchOptimizer:
        """Make torch's; see the base class."""
        import torch

        groups = self.groups(weights, roles, rates=rates)
        return torch.optim.AdamW(groups, lr=rates.lr, betas=self.betas, eps=self.eps, fused=_can_fuse(weights))

    def state_bytes(self, shape: Sequence[int], *, inner: bool = True) -> int:
        """Two moments of every number."""
        return 8 * math.prod(shape)


class SGD(_Optimizer):
    """Gradient descent with momentum; decay is part of the gradient."""

    source: ClassVar[str] = "https://doi.org/10.1016/0041-5553(64)90137-5"
    kind: Literal["sgd"] = "sgd"
    """Which optimizer."""

    momentum: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the last update that carries on."""

    nesterov: bool = False
    """Look ahead by the momentum."""

    @model_validator(mode="after")
    def _ahead(self) -> SGD:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov without momentum changes nothing; give momentum, or take nesterov out")
        return self

    def build(self, weights: Mapping[str, nn.Parameter], roles: Roles | None = None, *, rates: Rates) -> TorchOptimizer:
        """Make torch's; see the base class."""
        import torch

        groups = self.groups(weights, roles, rates=rates)
        return torch.optim.SGD(groups, lr=rates.lr, momentum=self.momentum, nesterov=self.nesterov)

    def state_bytes(self, shape: Sequence[int], *, inner: bool = True) -> int:
        """The last update, if it carries on."""
        return 4 * math.prod(shape) if self.momentum else 0


class Adafactor(_Optimizer):
    """Second moments of a matrix as one row and one column; no first moment; steps in proportion to the weights.

    Shazeer and Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost" (arXiv 1804.04235). torch's form:
    the step is ``max(least, RMS(w)) * min(lr, 1 / sqrt(t))``, so that rates near 0.01 are usual.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/1804.04235"
    kind: Literal["adafactor"] = "adafactor"
    """Which optimizer."""

    memory: float = Field(default=-0.8, le=0.0)
    """Exponent of the second moment's memory: the newest gradient weighs ``t ** memory``."""

    least: float = Field(default=1e-3, ge=0.0)
    """Least root mean square that a weight is taken to have, so that one at zero can move."""

    clip: float = Field(default=1.0, ge=1.0)
    """Largest root mean square of an update, before the step."""

    def build(self, weights: Mapping[str, nn.Parameter], roles: Roles | None = None, *, rates: Rates) -> TorchOptimizer:
        """Make torch's; see the base class."""
        import torch

        groups = self.groups(weights, roles, rates=rates)
        return torch.optim.Adafactor(groups, lr=rates.lr, beta2_decay=self.memory, eps=(None, self.least), d=self.clip)

    def state_bytes(self, shape: Sequence[int], *, inner: bool = True) -> int:
        """A row and a column of the last two axes."""
        if len(shape) < 2:
            return 4 * math.prod(shape)
        return 4 * math.prod(shape[:-2]) * (shape[-2] + shape[-1])


class Lion(_Optimizer):
    """Steps of one size: the sign of a running mean of the gradient. Rates a third to a tenth of AdamW's are usual.

    Chen et al., "Symbolic Discovery of Optimization Algorithms" (arXiv 2302.06675), algorithm 2.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2302.06675"
    kind: Literal["lion"] = "lion"
    """Which optimizer."""

    betas: tuple[Beta, Beta] = (0.9, 0.99)
    """Memory of the mean that gives the sign, and of the mean that is kept."""

    def build(self, weights: Mapping[str, nn.Parameter], roles: Roles | None = None, *, rates: Rates) -> TorchOptimizer:
        """Make :class:`plait.training.optimizers.LionUpdate`; see the base class."""
        from plait.training.optimizers import LionUpdate

        return LionUpdate(self.groups(weights, roles, rates=rates), betas=self.betas)

    def state_bytes(self, shape: Sequence[int], *, inner: bool = True) -> int:
        """One mean of every number."""
        return 4 * math.prod(shape)


class Lars(_Optimizer):
    """Momentum with a rate for each matrix: a share of its norm over that of its gradient. For very large batches.

    You, Gitman and Ginsburg, "Large Batch Training of Convolutional Networks" (arXiv 1708.03888), algorithm 1. Norms,
    biases and scalars are trained with plain momentum. Rates of 1 and more are usual.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/1708.03888"
    kind: Literal["lars"] = "lars"
    """Which optimizer."""

    momentum: float = Field(default=0.9, ge=0.0, lt=1.0)
    """Share of the last update that carries on."""

    trust: float = Field(default=1e-3, gt=0.0)
    """Share of a matrix's norm that an update of rate 1 may change."""

    def build(self, weights: Mapping[str, nn.Parameter], roles: Roles | None = None, *, rates: Rates) -> TorchOptimizer:
        """Make :class:`plait.training.optimizers.LarsUpdate`; see the base class."""
        from plait.training.optimizers import LarsUpdate

        return LarsUpdate(self.groups(weights, roles, rates=rates), momentum=self.momentum, trust=self.trust)

    def state_bytes(self, shape: Sequence[int], *, inner: bool = True) -> int:
        """The last update."""
        return 4 * math.prod(shape)


class Muon(_Optimizer):
    """Orthogonal updates of the matrices inside the model; AdamW for embeddings, heads, filters, norms and biases.

    Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon), with the rates of Liu et al., "Muon is Scalable for
    LLM Training" (arXiv 2502.16982): those of AdamW serve.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2502.16982"
    kind: Literal["muon"] = "muon"
    """Which optimizer."""

    momentum: Beta = 0.95
    """Memory of the matrices' mean gradient."""

    scale: Literal["adamw", "original"] = "adamw"
    """Size of a matrix's update: `adamw` gives it the root mean square of AdamW's, so that one rate serves both;
    `original` is Jordan's, with rates near 0.02."""

    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Of AdamW, for what is no inner matrix."""

    eps: float = Field(default=1e-8, gt=0.0)
    """Of AdamW."""

    def build(self, weights: Mapping[str, nn.Parameter], roles: Roles | None = None, *, rates: Rates) -> TorchOptimizer:
        """Make :class:`plait.training.optimizers.MuonAndAdamW`; see the base class."""
        from plait.training.optimizers import MuonAndAdamW

        embeddings = roles.embeddings if roles else frozenset()
        inner: list[dict[str, Any]] = []
        others: list[dict[str, Any]] = []
        for group in self.groups(weights, roles, rates=rates):
            matrices = [(n, w) for n, w in group["params"] if w.ndim == 2 and group["decays"] and n not in embeddings]
            names = {name for name, _ in matrices}
            rest = [(n, w) for n, w in group["params"] if n not in names]
            inner += [{**group, "params": matrices}] if matrices else []
            others += [{**group, "params": rest}] if rest else []
        return MuonAndAdamW(
            inner,
            others,
            muon={
                "momentum": self.momentum,
                "adjust_lr_fn": "match_rms_adamw" if self.scale == "adamw" else "original",
            },
            adamw={"betas": self.betas, "eps": self.eps, "fused": _can_fuse(weights)},
        )

    def state_bytes(self, shape: Sequence[int], *, inner: bool = True) -> int:
        """One mean of a matrix, two moments of the rest."""
        return (4 if len(shape) == 2 and inner else 8) * math.prod(shape)


class AdamW8bit(_Optimizer):
    """AdamW with both moments in 8 bits, in blocks of 256 that each have their own scale.

    Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (arXiv 2110.02861). Weights of fewer than 4,096
    numbers keep float32 moments, as there.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2110.02861"
    kind: Literal["adamw-8bit"] = "adamw-8bit"
    """Which optimizer."""

    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Memory of the gradient's mean and of its square."""

    eps: float = Field(default=1e-8, gt=0.0)
    """Added to the root of the second moment."""

    def build(self, weights: Mapping[str, nn.Parameter], roles: Roles | None = None, *, rates: Rates) -> TorchOptimizer:
        """Make :class:`plait.training.eight_bit.AdamW8bitUpdate`; see the base class."""
        from plait.training.eight_bit import AdamW8bitUpdate

        return AdamW8bitUpdate(self.groups(weights, roles, rates=rates), betas=self.betas, eps=self.eps)

    def state_bytes(self, shape: Sequence[int], *, inner: bool = True) -> int:
        """Two bytes of every number, and two scales of every 256."""
        count = math.prod(shape)
        return 8 * count if count < SMALL else 2 * count + 8 * math.ceil(count / BLOCK)


Optimizer = Annotated[
    AdamW | SGD | Adafactor | Lion | Lars | Muon | AdamW8bit,
    Field(discriminator="kind"),
]
"""Any optimizer, chosen by ``kind``."""


def _can_fuse(weights: Mapping[str, nn.Parameter]) -> bool:
    """Fused: one kernel a weight instead of ten; a third of the time on a CPU for 300 LoRA matrices."""
    return all(w.device.type in ("cpu", "cuda", "mps") for w in weights.values())


def _under(name: str, prefix: str) -> bool:
    """Whether ``name`` is ``prefix`` or lies below it: ``connector`` holds ``connector.proj``, never ``connector2``."""
    return name == prefix or name.startswith(prefix + ".")
