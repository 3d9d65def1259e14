"""Log-mel spectrograms as Whisper takes them.

Radford et al., https://arxiv.org/abs/2212.04356, section 2.2. The mel scale is Slaney's (Auditory Toolbox, 1998):
linear below 1 kHz, logarithmic above.
"""

import math
from contextlib import nullcontext

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

SAMPLE_RATE = 16_000
"""Samples a second that speech models take."""

_LINEAR_HZ = 200 / 3
_BREAK_HZ = 1000.0
_BREAK_MEL = _BREAK_HZ / _LINEAR_HZ
_LOG_STEP = math.log(6.4) / 27


def mel_of(hertz: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Slaney's mel scale.

    Example:
        >>> mel_of(torch.tensor([1000.0, 6400.0])).tolist()
        [15.0, 42.0]
    """
    above = _BREAK_MEL + torch.log(hertz.clamp(min=_BREAK_HZ) / _BREAK_HZ) / _LOG_STEP
    return torch.where(hertz < _BREAK_HZ, hertz / _LINEAR_HZ, above)


def hertz_of(mel: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """The inverse of :func:`mel_of`."""
    above = _BREAK_HZ * torch.exp(_LOG_STEP * (mel.clamp(min=_BREAK_MEL) - _BREAK_MEL))
    return torch.where(mel < _BREAK_MEL, mel * _LINEAR_HZ, above)


def mel_filters(mels: int, *, window: int = 400, rate: int = SAMPLE_RATE) -> Float[Tensor, "mel f"]:
    """Triangles with equal distances on the mel scale from 0 Hz to half the rate, each of area 1 over hertz.

    Args:
        mels: Triangles.
        window: Samples of the Fourier transform, which has ``window / 2 + 1`` frequencies.
        rate: Samples a second.
    """
    ends = mel_of(torch.tensor([0.0, rate / 2], dtype=torch.float64))
    corners = hertz_of(torch.linspace(float(ends[0]), float(ends[1]), mels + 2, dtype=torch.float64))
    frequency = torch.linspace(0, rate / 2, window // 2 + 1, dtype=torch.float64)
    low, peak, high = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    rising, falling = (frequency - low) / (peak - low), (high - frequency) / (high - peak)
    return torch.minimum(rising, falling).clamp(min=0) * 2 / (high - low)


class LogMel(nn.Module):
    """Samples to frames: 25 ms windows every 10 ms, power, mel filters, logarithm, 8 decades below the loudest at most.

    Computed in float32 on the samples' device, whatever the format of the weights around it; ``torch.stft`` pads both
    ends by reflection. The floor depends on the loudest frame, so a sound must come as a whole.

    Args:
        mels: Filters.
        window: Samples of a frame.
        hop: Samples between frames.

    Example:
        >>> LogMel(80)(torch.zeros(1, 16_000)).shape
        torch.Size([1, 80, 100])
    """

    def __init__(self, mels: int, *, window: int = 400, hop: int = 160) -> None:
        super().__init__()
        self.window, self.hop = window, hop
        # No buffers: a module turned to bfloat16 would turn them too, and the lowest mels would lose their shape.
        with torch.device("cpu"):
            self._filters = mel_filters(mels, window=window).float()
            self._hann = torch.hann_window(window)

    def forward(self, samples: Float[Tensor, "b s"]) -> Float[Tensor, "b mel frame"]:
        """``s // hop`` frames, about -1..1 for speech."""
        kind = samples.device.type  # where costs are counted, on the meta device, there is no autocast to switch off
        with nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False):
            spectrum = torch.stft(
                samples.float(),
                self.window,
                self.hop,
                window=self._hann.to(samples.device),
                return_complex=True,
            )
            power = spectrum[..., :-1].abs().square().contiguous()
            level = (self._filters.to(samples.device) @ power).clamp(min=1e-10).log10()
        floor = level.amax(dim=(1, 2), keepdim=True) - 8.0
        return (torch.maximum(level, floor) + 4.0) / 4.0


def filled(samples: Float[Tensor, "b s"], length: int) -> Float[Tensor, "b t"]:
    """Zeros behind sounds, up to a length."""
    return functional.pad(samples, (0, length - samples.shape[1]))
