"""wav2vec 2.0's task: which of several quantized frames stood where a span was masked.

Baevski et al., https://arxiv.org/abs/2006.11477, sections 3.1 and 3.2.
"""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from plait.core.errors import DataError
from plait.core.tensors import Batch
from plait.objectives.seeded import drawn_from


def span_mask(
    lengths: Int[Tensor, " item"], *, starts: float, span: int, generator: torch.Generator, at_least: int = 1
) -> Bool[Tensor, " n"]:
    """Which time steps of ragged sounds are masked: spans that may overlap, inside their sounds.

    Of a sound of n steps, ``starts n`` (rounded up or down by chance, so that the mean is right) are chosen without
    replacement among those whose span fits. With the paper's 0.065 and 10 about half of all steps are masked.

    Args:
        lengths: Steps of each sound.
        starts: Share of steps at which a span begins.
        span: Steps of a span.
        generator: Of the choice, on the CPU.
        at_least: Spans of every sound, however short.

    Raises:
        DataError: A sound is shorter than a span.
    """
    counts = [int(n) for n in lengths]
    if counts and min(counts) < span:
        raise DataError(
            f"a sound has {min(counts)} time steps, a span {span}",
            place=f"sound {counts.index(min(counts))} of the batch",
            remedy="leave out sounds that short, or mask shorter spans",
        )
    masks: list[Tensor] = []
    for count in counts:
        number = int(starts * count + float(torch.rand((), generator=generator)))
        number = min(max(number, at_least), count - span + 1)
        chosen = torch.randperm(count - span + 1, generator=generator)[:number]
        mask = torch.zeros(count, dtype=torch.bool)
        mask[(chosen[:, None] + torch.arange(span)).flatten()] = True
        masks.append(mask)
    return torch.cat(masks).to(lengths.device) if masks else torch.zeros(0, dtype=torch.bool, device=lengths.device)


def other_steps(
    masked: Bool[Tensor, " n"], lengths: Int[Tensor, " item"], *, count: int, generator: torch.Generator
) -> Int[Tensor, "m k"]:
    """Wrong answers for each masked step: other masked steps of the same sound, drawn evenly with replacement.

    Args:
        masked: Over all sounds' steps, one sound after the other.
        lengths: Steps of each sound.
        count: Wrong answers of each.
        generator: Of the choice, on the CPU.

    Returns:
        Numbers among the masked steps, from 0.

    Raises:
        DataError: A sound has a single masked step, which has no others.
    """
    found: list[Tensor] = []
    at = first = 0
    for number, length in enumerate(int(n) for n in lengths):
        m = int(masked[at : at + length].sum())
        at += length
        if m == 1:
            raise DataError(
                "a sound has one masked step, so there is no wrong answer",
                place=f"sound {number} of the batch",
                remedy="mask longer spans, or more of them",
            )
        drawn = torch.randint(max(m - 1, 1), (m, count), generator=generator)
        drawn += drawn >= torch.arange(m)[:, None]  # itself is left out, the others stay equally likely
        found.append(first + drawn)
        first += m
    return torch.cat(found).to(masked.device) if found else torch.zeros(0, count, dtype=torch.long)


def masked_contrast(
    predicted: Float[Tensor, "m e"],
    targets: Float[Tensor, "m e"],
    others: Int[Tensor, "m k"],
    *,
    codes: Int[Tensor, "m g"],
    temperature: float = 0.1,
) -> Float[Tensor, ""]:
    """Equation 3: ``-sum_t log(exp(cos(c_t, q_t) / T) / sum_q exp(cos(c_t, q) / T))`` over the right and wrong answers.

    A wrong answer with the codes of the right one is the right one, and does not count.

    Args:
        predicted: At masked steps.
        targets: Quantized frames there.
        others: Wrong answers, as numbers of masked steps (:func:`other_steps`).
        codes: Of each target.
        temperature: T.
    """
    wide = torch.promote_types(predicted.dtype, torch.float32)
    cosine = functional.normalize(predicted.to(wide), dim=1) @ functional.normalize(targets.to(wide), dim=1).T
    right = cosine.diagonal()[:, None]
    wrong = cosine.gather(1, others).masked_fill((codes[others] == codes[:, None]).all(-1), float("-inf"))
    logits = torch.cat([right, wrong], dim=1) / temperature
    return -logits.log_softmax(1)[:, 0].sum()


def code_diversity(probability: Float[Tensor, "g v"], count: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """How far the use of codes is from even, times the steps: ``n (g v - sum_g exp(entropy_g)) / (g v)``.

    0 where every code is used alike; nearly n where each group uses one code. Sums of all micro-batches and ranks go in
    first: the entropy of a mean is not the mean of entropies.

    Args:
        probability: Sum over masked steps of each code's probability.
        count: Masked steps.

    Example:
        >>> code_diversity(torch.tensor([[2.0, 2.0], [4.0, 0.0]]), torch.tensor(4.0)).item()  # perplexities 2 and 1
        1.0
    """
    share = probability / count
    floor = torch.finfo(share.dtype).tiny  # a code that nobody uses adds nothing, and its gradient is a number
    perplexity = (-(share * share.clamp(min=floor).log()).sum(1)).exp().sum()
    return count * (share.numel() - perplexity) / share.numel()


class MaskedSpeech:
    """Objective of wav2vec 2.0: terms ``contrast`` and ``diversity`` (weighed with 0.1), counted in masked steps.

    The model is :class:`plait.models.towers.wav2vec_pretraining.Wav2VecPretraining`.

    Masks, wrong answers and noise are a function of the seed and of the samples in the batch. The evenness of codes is
    one of the whole batch, so the loop must see all of it (``needs_global_batch``).

    Args:
        grid_out: Of the tower: time steps of each sound.
        seed: Of masks, wrong answers and noise.
        starts: Share of steps at which a masked span begins.
        span: Its steps.
        others: Wrong answers of each masked step.
        temperature: Of the cosines.
    """

    needs_global_batch = True

    def __init__(
        self,
        grid_out: Callable[[Tensor], Tensor],
        *,
        seed: int = 0,
        starts: float = 0.065,
        span: int = 10,
        others: int = 100,
        temperature: float = 0.1,
    ) -> None:
        self.grid_out, self.seed = grid_out, seed
        self.starts, self.span, self.others, self.temperature = starts, span, others, temperature

    def count(self, batch: Batch) -> Mapping[str, Tensor]:
        """Masked steps."""
        masked = self._mask(batch, drawn_from(self.seed, batch.sample_ids))[0].sum()
        return {"contrast": masked, "diversity": masked}

    def __call__(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """Sums over masked steps."""
        generator = drawn_from(self.seed, batch.sample_ids)
        masked, lengths = self._mask(batch, generator)
        others = other_steps(masked, lengths, count=self.others, generator=generator)
        predicted, targets, codes, probability = model(batch.media["audio"], masked=masked, generator=generator)
        return {
            "contrast": masked_contrast(predicted, targets, others, codes=codes, temperature=self.temperature),
            "diversity": code_diversity(probability, masked.sum().to(probability)),
        }

    def _mask(self, batch: Batch, generator: torch.Generator) -> tuple[Bool[Tensor, " n"], Int[Tensor, " item"]]:
        lengths = self.grid_out(batch.media["audio"].grid)[:, 2]
        return span_mask(lengths, starts=self.starts, span=self.span, generator=generator), lengths
