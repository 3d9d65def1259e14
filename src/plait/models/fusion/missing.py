"""Missing modalities: drop them while training, learn what stands for them, and score every subset."""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

import torch
from torch import nn

from plait.core.errors import ConfigError
from plait.models.fusion.streams import Inputs, Stream, at_least, presence, take


class ModalityDropout(nn.Module):
    """While training, makes modalities of samples absent at random; never all that a sample has.

    Each present modality is dropped with its own probability, independently; where that would leave nothing, one of
    those the sample had stays, each with the same chance. With k modalities of rate p, one is so dropped with
    probability ``p - p^k / k``. After ModDrop, https://arxiv.org/abs/1501.00102.

    Args:
        rates: Probability of dropping each modality.

    Raises:
        ConfigError: A rate below 0 or above 1.

    Example:
        >>> drop = ModalityDropout({"image": 1.0, "text": 0.0})
        >>> both = {name: Stream(tokens=torch.rand(4, 1, 2)) for name in ("image", "text")}
        >>> presence(drop(both, torch.Generator().manual_seed(0)), ["image", "text"]).sum(0).tolist()
        [0, 4]
    """

    def __init__(self, rates: Mapping[str, float]) -> None:
        super().__init__()
        at_least(1, list(rates), kind="modality dropout")
        wrong = {name: rate for name, rate in rates.items() if not 0 <= rate <= 1}
        if wrong:
            raise ConfigError(
                f"not probabilities: {', '.join(f'{n} {r}' for n, r in wrong.items())}",
                place="rates",
                remedy="choose between 0 and 1",
            )
        self.rates = dict(rates)

    def forward(self, inputs: Inputs, generator: torch.Generator) -> dict[str, Stream]:
        """Drop; the draws come from the generator alone. Not training, nothing changes and nothing is drawn."""
        streams = take(inputs, list(self.rates))
        if not self.training:
            return dict(inputs)
        had = presence(streams, list(self.rates))
        rates = torch.tensor(list(self.rates.values()), device=generator.device)
        drawn = torch.rand(had.shape, generator=generator, device=generator.device)
        order = torch.rand(had.shape, generator=generator, device=generator.device).to(had.device)
        kept = had & (drawn >= rates).to(had.device)
        survivor = order.masked_fill(~had, -1.0).argmax(1, keepdim=True)
        only = torch.zeros_like(had).scatter(1, survivor, True) & had
        kept = torch.where(kept.any(1, keepdim=True), kept, only)
        return {
            name: Stream(tokens=inputs[name].tokens, real=inputs[name].real, present=kept[:, i])
            for i, name in enumerate(self.rates)
        }


class MissingTokens(nn.Module):
    """One learned token for each modality, which stands for it where a sample has none; all are present after.

    After missing-aware prompts, https://arxiv.org/abs/2303.03369, with a token in place of prompts in every layer.

    Args:
        widths: Width of each modality's tokens.

    Raises:
        ConfigError: Built for no modality.

    Example:
        >>> fill = MissingTokens({"image": 2})
        >>> lost = Stream(tokens=torch.full((1, 3, 2), torch.nan), present=torch.tensor([False]))
        >>> found = fill({"image": lost})["image"]
        >>> found.real.tolist(), torch.equal(found.tokens[0, 0], fill.tokens["image"])
        ([[True, False, False]], True)
    """

    def __init__(self, widths: Mapping[str, int]) -> None:
        super().__init__()
        at_least(1, list(widths), kind="a set of missing tokens")
        self.widths = dict(widths)
        self.tokens = nn.ParameterDict({name: nn.Parameter(torch.randn(d) * 0.02) for name, d in widths.items()})

    def forward(self, inputs: Inputs) -> dict[str, Stream]:
        """Fill in."""
        streams = take(inputs, list(self.widths), widths=self.widths)
        return {name: self._filled(stream, self.tokens[name]) for name, stream in streams.items()}

    @staticmethod
    def _filled(stream: Stream, learned: torch.Tensor) -> Stream:
        tokens, there, absent = stream.tokens, stream.there, ~stream.here
        if not tokens.shape[1]:
            tokens, there = tokens.new_zeros(len(tokens), 1, tokens.shape[2]), there.new_zeros(len(tokens), 1)
        first = torch.arange(tokens.shape[1], device=tokens.device) == 0
        stands = absent[:, None] & first
        return Stream(tokens=torch.where(stands[..., None], learned.to(tokens.dtype), tokens), real=there | stands)


def subsets(names: Sequence[str], *, smallest: int = 1) -> list[tuple[str, ...]]:
    """All subsets, from small to large, in the order of the names.

    Example:
        >>> subsets(["image", "text"])
        [('image',), ('text',), ('image', 'text')]
    """
    return [chosen for size in range(smallest, len(names) + 1) for chosen in combinations(names, size)]


def subset_grid(
    score: Callable[[tuple[str, ...]], float], names: Sequence[str], *, smallest: int = 1
) -> dict[tuple[str, ...], float]:
    """The score with every subset of modalities; a pure function of ``score``.

    Args:
        score: Of the model when it gets only these modalities (:func:`~plait.models.fusion.streams.only`).
        names: All modalities.
        smallest: Size of the smallest subset; 0 also scores with none at all.

    Raises:
        ConfigError: A name comes twice, or there are more than 10: 1023 subsets are the most that are scored.

    Example:
        >>> subset_grid(lambda chosen: len(chosen) / 2, ["image", "text"])
        {('image',): 0.5, ('text',): 0.5, ('image', 'text'): 1.0}
    """
    if len(set(names)) != len(names) or len(names) > 10:
        raise ConfigError(f"{len(names)} modalities: {', '.join(names)}", remedy="name each once, at most 10")
    return {chosen: score(chosen) for chosen in subsets(names, smallest=smallest)}
