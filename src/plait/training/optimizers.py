"""Optimizers that torch lacks, and one made of two of torch's. The settings are in :mod:`plait.training.optim`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer as TorchOptimizer

from plait.training.optim import Optimizer, Rates
from plait.training.state import TrainState


def build_part(
    optimizer: Optimizer, part: Mapping[str, nn.Parameter], whole: TrainState, *, rates: Rates
) -> TorchOptimizer:
    """The optimizer of what this process holds, with the groups and rates that its weights have in the whole model.

    Args:
        optimizer: Which.
        part: What is moved here, by name; may be nothing.
        whole: What trains in all processes together.
        rates: Of the whole.

    Raises:
        ConfigError: A prefix of the rates matches no weight of the whole, or there is none.
    """
    if part.keys() == whole.weights.keys():
        return optimizer.build(part, whole.roles, rates=rates)
    optimizer.groups(whole.weights, whole.roles, rates=rates)  # for what it raises
    if not part:
        return torch.optim.SGD([{"params": [], "param_names": [], "peak_lr": 0.0, "above": 0}], lr=0.0)

    def here(prefix: str) -> bool:
        return any(name == prefix or name.startswith(f"{prefix}.") for name in part)

    own = replace(
        rates,
        parts={prefix: rate for prefix, rate in rates.parts.items() if here(prefix)},
        no_decay=tuple(filter(here, rates.no_decay)),
    )
    return optimizer.build(part, whole.roles, rates=own)


class LionUpdate(TorchOptimizer):
    """Lion: ``w <- w - lr (sign(b1 m + (1 - b1) g) + decay w)``, then ``m <- b2 m + (1 - b2) g``.

    Chen et al. (arXiv 2302.06675), algorithm 2.

    Args:
        groups: Named weights with their rates and decay.
        betas: ``b1`` and ``b2``.
    """

    def __init__(self, groups: list[dict[str, Any]], *, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of every weight that has a gradient."""
        for group in self.param_groups:
            first, second = group["betas"]
            weights = [w for w in group["params"] if w.grad is not None]
            if not weights:
                continue
            grads = [w.grad for w in weights]
            means = [self._mean(w) for w in weights]
            signs = torch._foreach_lerp(means, grads, 1 - first)
            torch._foreach_sign_(signs)
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(weights, signs, alpha=-group["lr"])
            torch._foreach_lerp_(means, grads, 1 - second)

    def _mean(self, weight: Tensor) -> Tensor:
        state = self.state[weight]
        if not state:
            state["mean"] = torch.zeros_like(weight)
        return state["mean"]


class LarsUpdate(TorchOptimizer):
    """LARS: momentum, with a rate for each weight of the groups that ``decays`` marks.

    ``u <- momentum u + lr * trust * |w| / (|g| + decay |w|) * (g + decay w)``, ``w <- w - u``; a weight or gradient of
    norm 0 is not scaled. You et al. (arXiv 1708.03888), algorithm 1; groups that do not decay (norms, biases) take the
    plain gradient.

    Args:
        groups: Named weights with their rates and decay.
        momentum: Share of the last update that carries on.
        trust: The paper's eta.
    """

    def __init__(self, groups: list[dict[str, Any]], *, momentum: float, trust: float) -> None:
        super().__init__(groups, {"momentum": momentum, "trust": trust, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of every weight that has a gradient."""
        for group in self.param_groups:
            decay = group["weight_decay"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                update = weight.grad + decay * weight if decay else weight.grad.clone()
                if group["decays"]:
                    size, slope = torch.linalg.vector_norm(weight), torch.linalg.vector_norm(weight.grad)
                    ratio = group["trust"] * size / (slope + decay * size)
                    update *= torch.where((size > 0) & (slope > 0), ratio, torch.ones_like(ratio))
                state = self.state[weight]
                if not state:
                    state["update"] = torch.zeros_like(weight)
                state["update"].mul_(group["momentum"]).add_(update, alpha=group["lr"])
                weight.sub_(state["update"])


class MuonAndAdamW(TorchOptimizer):
    """torch's Muon for some groups and torch's AdamW for the others, with one state and one list of groups.

    Args:
        inner: Groups of matrices, for Muon; may be empty.
        others: Groups for AdamW; may be empty.
        muon: Further arguments of :class:`torch.optim.Muon`.
        adamw: Further arguments of :class:`torch.optim.AdamW`.
    """

    def __init__(
        self,
        inner: list[dict[str, Any]],
        others: list[dict[str, Any]],
        *,
        muon: dict[str, Any],
        adamw: dict[str, Any],
    ) -> None:
        self._parts: list[tuple[TorchOptimizer, int]] = []
        if inner:
            self._parts.append((torch.optim.Muon([dict(group) for group in inner], **muon), len(inner)))
        if others:
            self._parts.append((torch.optim.AdamW([dict(group) for group in others], **adamw), len(others)))
        super().__init__([group for part, _ in self._parts for group in part.param_groups], {})
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of every weight that has a gradient."""
        for part, _ in self._parts:
            part.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state; see torch's."""
        super().load_state_dict(state_dict)
        self._share()

    def _share(self) -> None:
        """Let both work on this optimizer's groups and state."""
        first = 0
        for part, count in self._parts:
            part.state, part.param_groups = self.state, self.param_groups[first : first + count]
            first += count
