"""How wav2vec 2.0 learns without text: masked frames are told apart by their quantized form.

Baevski et al., https://arxiv.org/abs/2006.11477, section 3; the product quantizer is that of vq-wav2vec,
https://arxiv.org/abs/1910.05453, with Gumbel softmax, https://arxiv.org/abs/1611.01144.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from plait.core.errors import ConfigError, DataError
from plait.core.tensors import Patches
from plait.models.towers.pixels import by_shape
from plait.models.towers.wav2vec import Wav2Vec
from plait.models.towers.whisper import check_sounds


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeechTaskSizes:
    """Shape of what pretraining adds; the defaults are base's.

    Attributes:
        groups: Codes that a frame is made of, one of each codebook.
        codes: Of each codebook.
        d_code: Width of all codes of a frame together.
        d_shared: Width in which frames are compared.
        dropout: Share of what is quantized that is dropped.
    """

    groups: int = 2
    codes: int = 320
    d_code: int = 256
    d_shared: int = 256
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.d_code % self.groups:
            raise ConfigError(
                f"a width of {self.d_code} is not {self.groups} equal codes",
                place="SpeechTaskSizes",
                remedy="choose groups that divide d_code",
            )


class Quantized(NamedTuple):
    """Frames made of codes.

    Attributes:
        values: The codes of each frame, one behind the other; gradients arrive at the scores, too, while training.
        ids: Which code of each codebook.
        probability: Of each code: a softmax without noise while training, else 1 for the chosen one.
    """

    values: Float[Tensor, "m e"]
    ids: Int[Tensor, "m g"]
    probability: Float[Tensor, "m g v"]


class ProductQuantizer(nn.Module):
    """One code of each of several codebooks, by the best score; equation 1 of the paper.

    While training, Gumbel noise is added to the scores: codes are drawn with their probability. The gradient is that of
    the softmax of the noisy scores, divided by ``temperature``.

    Args:
        d: Width of frames.
        sizes: Codebooks.
    """

    def __init__(self, d: int, sizes: SpeechTaskSizes) -> None:
        super().__init__()
        self.groups, self.codes_each = sizes.groups, sizes.codes
        self.codes = nn.Parameter(torch.rand(sizes.groups * sizes.codes, sizes.d_code // sizes.groups))
        self.score = nn.Linear(d, sizes.groups * sizes.codes)
        nn.init.normal_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    def forward(
        self, frames: Float[Tensor, "m d"], *, temperature: float, generator: torch.Generator | None = None
    ) -> Quantized:
        """Quantize.

        Args:
            frames: One a row.
            temperature: Of the softmax behind the gradient; 2 at first, 0.5 at the end of the paper's training.
            generator: Of the noise; torch's own unless given.
        """
        scores = self.score(frames).unflatten(1, (self.groups, self.codes_each))
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if not self.training:
            ids = scores.argmax(-1)
            chosen = functional.one_hot(ids, self.codes_each).to(scores)
            return Quantized(self._joined(chosen), ids, chosen)
        where = scores.device if generator is None else generator.device
        noise = torch.empty(scores.shape, dtype=scores.dtype, device=where).exponential_(generator=generator)
        soft = ((scores - noise.log().to(scores.device)) / temperature).softmax(-1)
        ids = soft.argmax(-1)
        # s - s is 0 to the last bit, so the choice is hard and only its gradient soft.
        chosen = functional.one_hot(ids, self.codes_each).to(scores) + (soft - soft.detach())
        return Quantized(self._joined(chosen), ids, scores.softmax(-1))

    def _joined(self, chosen: Float[Tensor, "m g v"]) -> Float[Tensor, "m e"]:
        books = self.codes.unflatten(0, (self.groups, self.codes_each))
        return torch.einsum("mgv,gve->mge", chosen.to(books.dtype), books).flatten(1)


class SpeechTask(NamedTuple):
    """What the loss is made of, at masked steps, sound by sound.

    Attributes:
        predicted: What the Transformer expects there.
        targets: The quantized frames that were there.
        codes: Their codes.
        probability: Of each code, summed over the steps.
    """

    predicted: Float[Tensor, "m e"]
    targets: Float[Tensor, "m e"]
    codes: Int[Tensor, "m g"]
    probability: Float[Tensor, "g v"]


class Wav2VecPretraining(nn.Module):
    """A tower, a quantizer, and both sides of the comparison; trained by ``plait.objectives.speech.MaskedSpeech``.

    Args:
        tower: Learns; built with a mask token.
        sizes: Of what pretraining adds.
        temperature: Of the quantizer. The paper lowers it by a factor of 0.999995 a step, from 2 to 0.5: set it.

    Raises:
        ConfigError: The tower has no vector for masked frames.

    Example:
        >>> from plait.models.towers.wav2vec import WAV2VEC_BASE
        >>> with torch.device("meta"):
        ...     model = Wav2VecPretraining(Wav2Vec(WAV2VEC_BASE), SpeechTaskSizes())
        >>> sum(p.numel() for p in model.parameters())
        95044608
    """

    def __init__(self, tower: Wav2Vec, sizes: SpeechTaskSizes, *, temperature: float = 2.0) -> None:
        super().__init__()
        if tower.mask_token is None:
            raise ConfigError("this tower has no vector for masked frames", remedy="build it with mask_token")
        d_frame = tower.sizes.widths[-1]
        self.tower, self.sizes, self.temperature = tower, sizes, temperature
        self.quantizer = ProductQuantizer(d_frame, sizes)
        self.predict = nn.Linear(tower.d_out, sizes.d_shared)
        self.target = nn.Linear(sizes.d_code, sizes.d_shared)

    def forward(
        self, media: Patches, *, masked: Bool[Tensor, " n"], generator: torch.Generator | None = None
    ) -> SpeechTask:
        """Both sides of the comparison; sounds of different lengths are computed apart.

        Args:
            media: Samples, one row a sample.
            masked: Over the time steps of all sounds, one sound after the other.
            generator: Of the quantizer's noise.

        Raises:
            DataError: The mask is not of as many steps as the tower makes; or the sounds are not what it takes.
        """
        check_sounds(media, name="Wav2VecPretraining")
        tower, grid = self.tower, self.tower.grid_out(media.grid)
        if len(masked) != int(grid.prod(1).sum()):
            raise DataError(
                f"the mask is of {len(masked)} time steps, the sounds have {int(grid.prod(1).sum())}",
                place="Wav2VecPretraining input",
                remedy="make it for the tower's grid_out",
            )
        frames = by_shape(
            media,
            lambda sounds: tower.frames(sounds.flatten(1)),
            grid_out=grid,
            d_out=self.quantizer.score.in_features,
            batch_size=tower.batch_size,
            name="Wav2VecPretraining",
        ).values
        marked = torch.cat([frames, masked[:, None].to(frames)], dim=1)
        context = by_shape(
            Patches(values=marked, grid=grid),
            lambda steps: tower.in_context(steps[:, 0, 0, :, :-1], masked=steps[:, 0, 0, :, -1] > 0),
            grid_out=grid,
            d_out=tower.d_out,
            batch_size=tower.batch_size,
            name="Wav2VecPretraining",
        ).values
        heard = functional.dropout(frames[masked], self.sizes.dropout, self.training)
        values, ids, probability = self.quantizer(heard, temperature=self.temperature, generator=generator)
        return SpeechTask(self.predict(context[masked]), self.target(values), ids, probability.sum(0))
