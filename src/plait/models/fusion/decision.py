"""Decision-level fusion: every modality decides, then the decisions are merged.

Not to be mixed up with late fusion of features (:mod:`plait.models.fusion.late`). Rules are pure functions of
log-probabilities ``m b c`` (of each modality, sample and class) and of who is present, ``m b``; they return
log-probabilities ``b c``. Where nobody is present that is the uniform distribution, or the prior.
"""

import math
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from plait.core.errors import ConfigError, DataError
from plait.models.fusion.streams import Fused, Inputs, Stream, at_least, presence, take

Rule = Callable[[Tensor, Tensor], Tensor]
"""``(logprobs: m b c, present: m b) -> b c``. Weights and priors are bound before, as by ``functools.partial``."""


def average(
    logprobs: Float[Tensor, "m b c"], present: Bool[Tensor, "m b"], *, weights: Float[Tensor, " m"] | None = None
) -> Float[Tensor, "b c"]:
    """``log sum_m w_m p_m / sum_m w_m`` over those present: soft voting, or with weights the linear opinion pool.

    Example:
        >>> both = torch.tensor([[[0.75, 0.25]], [[0.25, 0.75]]]).log()
        >>> average(both, torch.tensor([[True], [True]])).exp().round(decimals=4).tolist()
        [[0.5, 0.5]]
    """
    shares = _shares(logprobs, present, weights)
    total = shares.sum(0)
    logs = shares.clamp(min=torch.finfo(shares.dtype).tiny).log().masked_fill(shares == 0, -math.inf)
    # An absent modality's numbers may be anything; a certain one has log 0.
    found = torch.logsumexp(_seen(logprobs, present) + logs[..., None], dim=0)
    found = found - total.clamp(min=torch.finfo(total.dtype).tiny).log()[:, None]
    return _or_uniform(found, total > 0)


def product(
    logprobs: Float[Tensor, "m b c"],
    present: Bool[Tensor, "m b"],
    *,
    weights: Float[Tensor, " m"] | None = None,
    prior: Float[Tensor, " k"] | None = None,
) -> Float[Tensor, "b c"]:
    """``prod_m p_m^{w_m}``, normalized: product of experts (Hinton 2002), or with weights the logarithmic opinion pool.

    With the prior of the classes it is divided by ``prior^(sum w - 1)``: Bayes' rule where modalities are independent
    given the class, since each of them has the prior in it already.

    Raises:
        DataError: Not as many prior probabilities as classes.
    """
    if prior is not None and len(prior) != logprobs.shape[-1]:
        raise DataError(f"{len(prior)} prior probabilities for {logprobs.shape[-1]} classes", place="prior")
    shares = _shares(logprobs, present, weights)
    total = (_seen(logprobs, present) * shares[..., None]).sum(0)
    if prior is not None:
        total = total - (shares.sum(0) - 1)[:, None] * prior.to(total).log()
    # Experts that exclude every class between them say nothing: uniform rather than NaN.
    possible = (total > -math.inf).any(-1)
    found = functional.log_softmax(total.masked_fill(~possible[:, None], 0.0), dim=-1)
    return found if prior is not None else _or_uniform(found, present.any(0))


def vote(
    logprobs: Float[Tensor, "m b c"], present: Bool[Tensor, "m b"], *, weights: Float[Tensor, " m"] | None = None
) -> Float[Tensor, "b c"]:
    """Log of the share of votes of each class, one vote a modality: majority. Of equal ones ``argmax`` takes the first.

    It has no gradient.

    Example:
        >>> three = torch.tensor([[[0.9, 0.1]], [[0.4, 0.6]], [[0.4, 0.6]]]).log()
        >>> vote(three, torch.ones(3, 1, dtype=torch.bool)).argmax(-1).item()
        1
    """
    votes = functional.one_hot(_seen(logprobs, present).argmax(-1), logprobs.shape[-1]).to(logprobs.dtype)
    shares = _shares(logprobs, present, weights)
    total = shares.sum(0)
    found = ((votes * shares[..., None]).sum(0) / total.where(total > 0, 1.0)[:, None]).log()
    return _or_uniform(found, total > 0)


class WeightedAverage(nn.Module):
    """:func:`average` with one learned weight a modality, positive and of sum 1; equal at the start.

    Args:
        modalities: How many.
    """

    def __init__(self, modalities: int) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(modalities))

    def forward(self, logprobs: Float[Tensor, "m b c"], present: Bool[Tensor, "m b"]) -> Float[Tensor, "b c"]:
        """Average."""
        return average(logprobs, present, weights=self.scores.softmax(0))


class Stacking(nn.Module):
    """``log softmax(W [p_1; ..; p_k] + b)``: a linear model over the decisions (Wolpert 1992).

    An absent modality gives zeros, which no decision is. Train it on decisions about samples that the classifiers did
    not learn from.

    Args:
        modalities: How many.
        classes: How many.
    """

    def __init__(self, modalities: int, classes: int) -> None:
        super().__init__()
        self.out = nn.Linear(modalities * classes, classes)

    def forward(self, logprobs: Float[Tensor, "m b c"], present: Bool[Tensor, "m b"]) -> Float[Tensor, "b c"]:
        """Stack."""
        decisions = _seen(logprobs, present).exp().masked_fill(~present[..., None], 0.0)
        return functional.log_softmax(self.out(decisions.transpose(0, 1).flatten(1)), dim=-1)


class Classifier(nn.Module):
    """``head(mean(encoder(x)))``: one modality's decision.

    Args:
        encoder: Stream to stream.
        head: Vector to scores of classes.
    """

    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, stream: Stream) -> Float[Tensor, "b c"]:
        """Scores."""
        return self.head(self.encoder(stream).mean())


class DecisionFusion(nn.Module):
    """Every modality's classifier, its temperature, then a rule.

    Args:
        classifiers: Of each modality, from its stream to scores ``b c`` of the same classes.
        classes: How many.
        rule: How decisions become one: :func:`average`, :func:`product`, :func:`vote`, :class:`WeightedAverage`,
            :class:`Stacking`, or your own.

    Raises:
        ConfigError: Built for no modality.
        DataError: A classifier knows another number of classes.

    Example:
        >>> from plait.models.fusion.encode import Pool
        >>> image, text = Classifier(Pool(), nn.Linear(8, 3)), Classifier(Pool(), nn.Linear(4, 3))
        >>> fuse = DecisionFusion({"image": image, "text": text}, 3, rule=product)
        >>> fused = fuse({"image": Stream(tokens=torch.rand(2, 9, 8)), "text": Stream(tokens=torch.rand(2, 5, 4))})
        >>> fused.values.exp().sum(1).round(decimals=5).tolist()
        [1.0, 1.0]
    """

    temperatures: Tensor

    def __init__(self, classifiers: Mapping[str, nn.Module], classes: int, *, rule: Rule = average) -> None:
        super().__init__()
        self.names = at_least(1, list(classifiers), kind="decision-level fusion")
        self.classifiers, self.rule, self.d_out = nn.ModuleDict(classifiers), rule, classes
        self.register_buffer("temperatures", torch.ones(len(self.names)))

    def decisions(self, inputs: Inputs) -> Float[Tensor, "m b c"]:
        """Scores of each modality on its own, before temperatures."""
        found: list[Tensor] = []
        for name, stream in take(inputs, self.names).items():
            scores = self.classifiers[name](stream)
            if scores.shape[-1] != self.d_out:
                raise DataError(
                    f"the classifier of {name} gives {scores.shape[-1]} classes, this fusion has {self.d_out}",
                    place=name,
                    remedy="give classifiers of the same classes in the same order",
                )
            found.append(scores)
        return torch.stack(found)

    def forward(self, inputs: Inputs, *, need_weights: bool = False) -> Fused:
        """Log-probabilities ``b c``; ``weights["decisions"]`` are the probabilities of each modality, ``b m c``."""
        scores = self.decisions(inputs) / self.temperatures[:, None, None]
        logprobs = functional.log_softmax(scores, dim=-1)
        there = presence(inputs, self.names)
        weights = {"decisions": logprobs.exp().transpose(0, 1).masked_fill(~there[..., None], 0.0)}
        return Fused(values=self.rule(logprobs, there.mT), present=there.any(1), weights=weights)

    @torch.no_grad()
    def calibrate(self, inputs: Inputs, labels: Int[Tensor, " b"]) -> dict[str, float]:
        """Set each modality's temperature by samples held out from its training; returns them.

        Raises:
            ConfigError: Called while training: dropout would look like doubt.
            DataError: A modality is present in no sample.
        """
        if self.training:
            raise ConfigError("temperatures are fitted to decisions without dropout", remedy="call eval() first")
        there = presence(inputs, self.names)
        for i, (name, scores) in enumerate(zip(self.names, self.decisions(inputs), strict=True)):
            if not there[:, i].any():
                raise DataError(f"{name} is present in none of {len(labels)} samples", remedy="calibrate on more")
            self.temperatures[i] = fit_temperature(scores[there[:, i]], labels[there[:, i]])
        return dict(zip(self.names, self.temperatures.tolist(), strict=True))


@torch.no_grad()
def fit_temperature(logits: Float[Tensor, "b c"], labels: Int[Tensor, " b"]) -> float:
    """The T that makes ``softmax(logits / T)`` most likely, between 0.01 and 100.

    Guo et al., "On calibration of modern neural networks", https://arxiv.org/abs/1706.04599. The loss is convex in
    ``1 / T``, so that its slope changes sign once, which bisection finds.
    """
    wide = logits.double()
    chosen = wide.gather(1, labels[:, None])
    low, high = math.log(0.01), math.log(100.0)  # of 1 / T
    for _ in range(60):
        middle = (low + high) / 2
        expected = ((wide * math.exp(middle)).softmax(-1) * wide).sum(-1, keepdim=True)
        low, high = (low, middle) if float((expected - chosen).mean()) > 0 else (middle, high)
    return math.exp(-(low + high) / 2)


def _seen(logprobs: Tensor, present: Tensor) -> Tensor:
    return logprobs.masked_fill(~present[..., None], 0.0)


def _shares(logprobs: Tensor, present: Tensor, weights: Tensor | None) -> Float[Tensor, "m b"]:
    shares = present.to(logprobs.dtype)
    if weights is None:
        return shares
    if len(weights) != len(logprobs) or bool((weights < 0).any()):
        raise ConfigError(
            f"weights {[round(w, 4) for w in weights.tolist()]} for {len(logprobs)} modalities",
            place="weights",
            remedy="give one weight a modality, 0 or more",
        )
    return shares * weights.to(shares)[:, None]


def _or_uniform(logprobs: Tensor, known: Tensor) -> Tensor:
    return logprobs.where(known[:, None], -math.log(logprobs.shape[-1]))
