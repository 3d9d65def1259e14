"""Optimizers as typed settings, and which weights get which rate and decay."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from plait.core.errors import ConfigError
from plait.core.spec import Spec

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer as TorchOptimizer


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

    Raises:
        ConfigError: ``lr`` is not above 0, or a rate of a part is below it.
    """

    lr: float = 1e-3
    parts: Mapping[str, float] = field(default_factory=dict)
    no_decay: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ConfigError(f"lr is {self.lr}", place="lr", remedy="set it above 0")
        for part, rate in self.parts.items():
            if not rate >= 0:
                raise ConfigError(f"the rate of {part!r} is {rate}", place="parts", remedy="set it to 0 or above")

    def plain(self) -> dict[str, Any]:
        """As plain data, for the checkpoint."""
        return {"lr": self.lr, "parts": dict(self.parts), "no_decay": list(self.no_decay)}


class _Optimizer(Spec):
    """What every optimizer has."""

    weight_decay: float = Field(default=0.0, ge=0.0)
    """Decay of matrices and embeddings; norms, biases, scalars and vectors (temperature) never decay."""

    def groups(
        self, weights: Mapping[str, nn.Parameter], norms: frozenset[str] = frozenset(), *, rates: Rates
    ) -> list[dict[str, Any]]:
        """Split trainable weights by part and by decay, in a fixed order.

        Args:
            weights: Trainable weights by name.
            norms: Names of weights that belong to normalization layers, whatever their shape.
            rates: How fast they learn.

        Returns:
            Groups for :mod:`torch.optim`, each also with ``part`` (its prefix, or ``rest``) and ``peak_lr``.

        Raises:
            ConfigError: There is nothing to train, or a prefix of ``parts`` or ``no_decay`` matches no trainable
                weight.
        """
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
        found: dict[tuple[str, bool], list[tuple[str, nn.Parameter]]] = {}
        for name, weight in weights.items():
            part = max((p for p in rates.parts if _under(name, p)), key=len, default="rest")
            decays = weight.ndim >= 2 and name not in norms and not any(_under(name, p) for p in rates.no_decay)
            found.setdefault((part, decays), []).append((name, weight))
        return [
            {
                "params": named,
                "part": part,
                "peak_lr": rates.parts.get(part, rates.lr),
                "lr": rates.parts.get(part, rates.lr),
                "weight_decay": self.weight_decay if decays else 0.0,
            }
            for (part, decays), named in sorted(found.items(), key=lambda item: item[0])
        ]


class AdamW(_Optimizer):
    """Adam with decay apart from the gradient.

    Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019.
    """

    kind: Literal["adamw"] = "adamw"
    """Which optimizer."""

    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Memory of the gradient's mean and of its square."""

    eps: float = Field(default=1e-8, gt=0.0)
    """Added to the root of the second moment."""

    def build(
        self, weights: Mapping[str, nn.Parameter], norms: frozenset[str] = frozenset(), *, rates: Rates
    ) -> TorchOptimizer:
        """Make the torch optimizer; see :meth:`groups`.

        Raises:
            ConfigError: As :meth:`groups`.
        """
        import torch

        # Fused: one kernel a weight instead of ten; a third of the time on a CPU for 300 LoRA matrices.
        fused = all(w.device.type in ("cpu", "cuda", "mps") for w in weights.values())
        groups = self.groups(weights, norms, rates=rates)
        return torch.optim.AdamW(groups, lr=rates.lr, betas=self.betas, eps=self.eps, fused=fused)


class SGD(_Optimizer):
    """Gradient descent with momentum."""

    kind: Literal["sgd"] = "sgd"
    """Which optimizer."""

    momentum: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the last update that carries on."""

    def build(
        self, weights: Mapping[str, nn.Parameter], norms: frozenset[str] = frozenset(), *, rates: Rates
    ) -> TorchOptimizer:
        """Make the torch optimizer; see :meth:`groups`.

        Raises:
            ConfigError: As :meth:`groups`.
        """
        import torch

        return torch.optim.SGD(self.groups(weights, norms, rates=rates), lr=rates.lr, momentum=self.momentum)


Optimizer = Annotated[AdamW | SGD, Field(discriminator="kind")]
"""Any optimizer, chosen by ``kind``."""


def norm_weights(module: nn.Module) -> frozenset[str]:
    """Names of weights in normalization layers: any class called ``*Norm`` or ``*Norm2d``, whoever wrote it."""
    return frozenset(
        f"{path}.{name}" if path else name
        for path, owner in module.named_modules()
        if re.search(r"Norm(\dd)?$", type(owner).__name__)
        for name, _ in owner.named_parameters(recurse=False)
    )


def _under(name: str, prefix: str) -> bool:
    """Whether ``name`` is ``prefix`` or lies below it: ``connector`` holds ``connector.proj``, never ``connector2``."""
    return name == prefix or name.startswith(prefix + ".")
