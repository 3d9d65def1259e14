"""Temporal dynamic fusion: how much each modality counts changes from step to step, with what was seen so far."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from plait.core.errors import DataError
from plait.models.fusion.streams import Fused, Inputs, Stream, at_least, take


class TemporalFusion(nn.Module):
    """``y_t = sum_m g_tm W_m x_tm``, ``g_t = softmax(S s_t + own_m(x_tm))``, ``s_t`` the state of a GRU up to step t.

    The softmax is over the modalities that are there at step t, so that gates sum to 1; a step without any gives 0.
    Step t depends on no later step. The GRU (https://arxiv.org/abs/1406.1078) sees all modalities and which are there.

    Args:
        widths: Width of each modality.
        d_out: Width of the result.
        d_memory: Width of the GRU's state.

    Raises:
        ConfigError: Built for no modality.
        DataError: Modalities have different numbers of steps.

    Example:
        >>> fuse = TemporalFusion({"audio": 8, "video": 4}, 16)
        >>> fused = fuse({"audio": Stream(tokens=torch.rand(2, 10, 8)), "video": Stream(tokens=torch.rand(2, 10, 4))})
        >>> fused.values.shape, fused.weights["gates"].shape
        (torch.Size([2, 10, 16]), torch.Size([2, 10, 2]))
    """

    def __init__(self, widths: Mapping[str, int], d_out: int, *, d_memory: int = 32) -> None:
        super().__init__()
        at_least(1, list(widths), kind="temporal fusion")
        self.widths, self.d_out = dict(widths), d_out
        self.values = nn.ModuleDict({name: nn.Linear(width, d_out) for name, width in widths.items()})
        self.own = nn.ModuleDict({name: nn.Linear(width, 1) for name, width in widths.items()})
        self.memory = nn.GRU(sum(widths.values()) + len(widths), d_memory, batch_first=True)
        self.scores = nn.Linear(d_memory, len(widths))

    def forward(self, inputs: Inputs, *, need_weights: bool = False) -> Fused:
        """Fuse step by step; ``weights["gates"]`` is ``b t m``. They are always given."""
        streams = take(inputs, list(self.widths), widths=self.widths)
        steps = {name: stream.tokens.shape[1] for name, stream in streams.items()}
        if len(set(steps.values())) > 1:
            raise DataError(
                f"modalities have different numbers of steps: {', '.join(f'{n} {t}' for n, t in steps.items())}",
                remedy="bring them to the same steps first, as with aligned()",
            )
        there = torch.stack([stream.there for stream in streams.values()], dim=2)
        tokens = [stream.tokens for stream in streams.values()]
        state, _ = self.memory(torch.cat([*tokens, there.to(tokens[0].dtype)], dim=2))
        own = torch.cat([self.own[name](x) for name, x in zip(streams, tokens, strict=True)], dim=2)
        gates = _softmax_over(self.scores(state) + own, there)
        values = torch.stack([self.values[name](x) for name, x in zip(streams, tokens, strict=True)], dim=3)
        fused = (values * gates[:, :, None, :]).sum(3)
        real = there.any(2)
        return Fused(values=fused, present=real.any(1), real=real, weights={"gates": gates})


def aligned(inputs: Inputs, steps: int) -> dict[str, Stream]:
    """Every modality at the same number of steps, each step from the token nearest in time.

    Each sample's tokens that count are taken to span the same time evenly, whatever their rate: 50 frames of audio and
    25 of video over one second both become ``steps``.

    Example:
        >>> slow = Stream(tokens=torch.tensor([[[1.0], [2.0]]]))
        >>> aligned({"video": slow}, 4)["video"].tokens.flatten().tolist()
        [1.0, 1.0, 2.0, 2.0]
    """
    found: dict[str, Stream] = {}
    for name, stream in inputs.items():
        clean = stream.clean()
        there, here = clean.there, clean.here
        if not there.shape[1]:
            found[name] = Stream(tokens=clean.tokens.new_zeros(len(there), steps, clean.tokens.shape[2]), present=here)
            continue
        # Tokens that count first, in their order, wherever padding stood.
        order = (~there).long().sort(dim=1, stable=True).indices
        middle = (torch.arange(steps, device=there.device) + 0.5) * there.sum(1, keepdim=True) / steps
        at = order.gather(1, middle.floor().long().clamp(max=there.shape[1] - 1))
        tokens = clean.tokens.gather(1, at[..., None].expand(-1, -1, clean.tokens.shape[2]))
        found[name] = Stream(tokens=tokens, present=here)
    return found


def _softmax_over(scores: Tensor, there: Tensor) -> Tensor:
    nobody = ~there.any(-1, keepdim=True)
    weights = scores.masked_fill(~there & ~nobody, float("-inf")).softmax(-1)
    return weights.masked_fill(~there, 0.0)
