"""A small differentiable search: all candidate fusions at once, mixed by learned shares; the largest share is chosen.

Liu et al., DARTS, https://arxiv.org/abs/1806.09055, first-order form: shares learn on validation data, weights on
training data, in turns. Candidates may differ in kind, in width inside and in the layers at which they exchange.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from plait.core.errors import ConfigError, NumericsError
from plait.models.fusion.streams import Fused, Fusion, Inputs, at_least


class SearchedFusion(nn.Module):
    """``sum_i softmax(a)_i f_i(x)`` over candidate fusions ``f_i``.

    Args:
        candidates: Fusions of the same modalities and one width of the result, by name.

    Raises:
        ConfigError: Fewer than two, or their results differ in width.

    Example:
        >>> from plait.models.fusion.concat import ConcatFusion
        >>> from plait.models.fusion.gated import GatedFusion
        >>> widths = {"image": 8, "text": 4}
        >>> mixed = SearchedFusion({"concat": ConcatFusion(widths, d_out=16), "gated": GatedFusion(widths, 16)})
        >>> mixed.shares()
        {'concat': 0.5, 'gated': 0.5}
    """

    def __init__(self, candidates: Mapping[str, Fusion]) -> None:
        super().__init__()
        if len(candidates) < 2 or len({fusion.d_out for fusion in candidates.values()}) > 1:
            listed = ", ".join(f"{name} of width {fusion.d_out}" for name, fusion in candidates.items()) or "none"
            raise ConfigError(
                f"candidates: {listed}", remedy="give two or more whose results have the same width, as by a projection"
            )
        self.names = at_least(2, list(candidates), kind="a search")
        self.candidates = nn.ModuleDict(_modules(candidates))
        self.choice = nn.Parameter(torch.zeros(len(candidates)))
        self.d_out = next(iter(candidates.values())).d_out

    def forward(self, inputs: Inputs, *, need_weights: bool = False) -> Fused:
        """Mix the vectors of all; ``weights["shares"]`` is one row a candidate."""
        shares = self.choice.softmax(0)
        fused = [self.candidates[name](inputs) for name in self.names]
        mixed = torch.stack([found.vector() for found in fused], dim=-1) @ shares.to(fused[0].values.dtype)
        return Fused(values=mixed, present=fused[0].present, weights={"shares": shares})

    def shares(self) -> dict[str, float]:
        """Share of each candidate."""
        return dict(zip(self.names, self.choice.detach().softmax(0).tolist(), strict=True))

    def best(self) -> str:
        """Candidate of the largest share; of equal ones the first."""
        return self.names[int(self.choice.argmax())]

    def discretized(self) -> nn.Module:
        """The best candidate alone, with the weights it has; train it on, it was never alone before."""
        return self.candidates.get_submodule(self.best())


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchStep:
    """One line of the log of a search.

    Attributes:
        step: From 0.
        train: Loss by which weights took their step.
        valid: Loss by which shares took theirs, before it.
        shares: After the step.
    """

    step: int
    train: float
    valid: float
    shares: dict[str, float]


Loss = Callable[[int], Tensor]
"""Loss of a step's batch. To be reproducible it must depend on nothing but the step and the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSpeed:
    """Learning rates of a search; both optimizers are Adam.

    Attributes:
        weights: Of the model.
        shares: Of the shares.
    """

    weights: float = 1e-2
    shares: float = 3e-2


def search(
    model: nn.Module,
    searched: SearchedFusion,
    *,
    train: Loss,
    valid: Loss,
    steps: int,
    speed: SearchSpeed | None = None,
) -> list[SearchStep]:
    """Learn shares and weights in turns; the same model, losses and steps give the same log.

    Args:
        model: What the losses run; has ``searched`` in it.
        searched: Whose shares are learned.
        train: Loss on training data.
        valid: Loss on data that weights never see.
        steps: Of each.
        speed: Learning rates.

    Raises:
        ConfigError: ``searched`` is not in the model.
        NumericsError: A loss is not finite.
    """
    speed = speed or SearchSpeed()
    weights = [p for p in model.parameters() if p is not searched.choice and p.requires_grad]
    if not weights or not any(p is searched.choice for p in model.parameters()):
        raise ConfigError(
            "the fusion that is searched is not in the model, or the model has no weights beside it",
            remedy="pass the model that contains it, with weights that may be trained",
        )
    fast, slow = torch.optim.Adam(weights, lr=speed.weights), torch.optim.Adam([searched.choice], lr=speed.shares)
    log: list[SearchStep] = []
    for step in range(steps):
        found_valid = _update(valid, step, optimizer=slow, model=model)
        found_train = _update(train, step, optimizer=fast, model=model)
        log.append(SearchStep(step=step, train=found_train, valid=found_valid, shares=searched.shares()))
    return log


def _update(loss: Loss, step: int, *, optimizer: torch.optim.Optimizer, model: nn.Module) -> float:
    model.zero_grad(set_to_none=True)
    value = loss(step)
    if not bool(torch.isfinite(value)):
        raise NumericsError(
            f"the loss is {value.item()} at step {step} of the search", remedy="lower the learning rates"
        )
    value.backward()
    optimizer.step()
    return value.item()


def _modules(candidates: Mapping[str, Fusion]) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {name: fusion for name, fusion in candidates.items() if isinstance(fusion, nn.Module)}
    if len(found) != len(candidates):
        raise ConfigError(
            f"{', '.join(sorted(set(candidates) - set(found)))}: not a module", remedy="give fusions that are modules"
        )
    return found
