"""What an encoder of pictures costs, counted on torch's meta device: no weight is drawn and no product computed."""

import math
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from plait.core.errors import ConfigError
from plait.core.protocols import Encoder
from plait.core.tensors import Patches


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """What one picture, sound or video costs.

    Attributes:
        parameters: Weights of the encoder.
        trainable: Those of them that learn.
        d_out: Width of a token.
        tokens: That come out of one.
        flops: Operations of one forward pass: two for each multiply-add of convolutions, products and attention, which
            are all that is counted. Published "FLOPs" of picture models are multiply-adds, half of these.
        kept_bytes: Float32 that autograd keeps of one for the backward pass.
    """

    parameters: int
    trainable: int
    d_out: int
    tokens: int
    flops: int
    kept_bytes: int


def account(build: Callable[[], nn.Module], size: int) -> Account:
    """Count what square pictures cost that go through an encoder in training mode.

    Args:
        build: Makes the encoder; called on the meta device.
        size: Pixels a side.

    Raises:
        ConfigError: What it makes is no encoder.

    Example:
        >>> from plait.models.build import build_encoder
        >>> from plait.models.specs import ResNet
        >>> found = account(lambda: build_encoder(ResNet(depth=50)), 224)
        >>> f"{found.parameters:,} weights, {found.flops / 2e9:.2f} GMAC, {found.tokens} tokens"
        '23,508,032 weights, 4.09 GMAC, 49 tokens'
    """
    return media_account(build, (1, size, size))


def media_account(build: Callable[[], nn.Module], shape: tuple[int, int, int], *, channels: int = 3) -> Account:
    """Count what media of one shape cost that go through an encoder in training mode.

    Args:
        build: Makes the encoder; called on the meta device.
        shape: Frames, rows and columns of each.
        channels: 3 of pixels, 1 of samples.

    Raises:
        ConfigError: What it makes is no encoder.

    Example:
        >>> from plait.models.audio_specs import Whisper
        >>> from plait.models.build_media import build_audio
        >>> found = media_account(lambda: build_audio(Whisper()), (1, 1, 3 * 16_000), channels=1)
        >>> f"{found.parameters:,} weights, {found.tokens} tokens of 3 s"
        '7,632,384 weights, 150 tokens of 3 s'
    """
    with torch.device("meta"):
        encoder = build()
        if not isinstance(encoder, Encoder):
            raise ConfigError(f"{type(encoder).__name__} is no encoder", remedy="give it forward, grid_out and d_out")
        # What does not grow with the batch (tables of positions) falls out; batch norm wants more than one picture.
        two, three = (_pass(encoder, _media(shape, count, channels=channels)) for count in (2, 3))
    return Account(
        parameters=sum(weight.numel() for weight in encoder.parameters()),
        trainable=sum(weight.numel() for weight in encoder.parameters() if weight.requires_grad),
        d_out=encoder.d_out,
        tokens=three[0] - two[0],
        flops=three[1] - two[1],
        kept_bytes=three[2] - two[2],
    )


def peak_bytes(build: Callable[[], nn.Module], size: int, *, pictures: int = 1) -> int:
    """Most bytes of pixels and activations that stand in memory at once, without gradients; weights not counted.

    Counted operation by operation in the number format of the weights, attention with its whole matrix: a fused kernel
    needs less, and what an operation uses inside is not seen.

    Args:
        build: Makes the encoder; called on the meta device.
        size: Pixels a side.
        pictures: That go through together.

    Example:
        >>> from plait.models.build import build_encoder
        >>> from plait.models.specs import ResNet
        >>> f"{peak_bytes(lambda: build_encoder(ResNet(depth=18)), 224) / 2**20:.1f} MiB"  # two maps of 64 x 112 x 112
        '7.3 MiB'
    """
    with torch.device("meta"):
        encoder = build().eval()
        media = _media((1, size, size), pictures, channels=3)
        with torch.no_grad(), Alive((*encoder.parameters(), *encoder.buffers())) as alive:
            alive.add(media.values)
            encoder(media)
    return alive.most


class Alive(TorchDispatchMode):
    """Counts the bytes of all tensors that operations make, as long as they live.

    Args:
        known: Tensors that are not counted, such as weights.

    Attributes:
        now: Bytes alive.
        most: Most bytes that were alive at once.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        self._known = [tensor.untyped_storage() for tensor in known]  # held, or their views would count as new
        for storage in self._known:
            self._seen.add(storage)

    def __torch_dispatch__(  # noqa: PLR0917  torch calls it so
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return found

    def add(self, tensor: Tensor) -> None:
        """Count a tensor from now on."""
        storage = tensor.untyped_storage()
        if storage not in self._seen:
            self._seen.add(storage)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._gone, storage.nbytes())

    def _gone(self, size: int) -> None:
        self.now -= size


def _media(shape: tuple[int, int, int], count: int, *, channels: int) -> Patches:
    grid = torch.tensor([shape] * count, device="cpu")
    return Patches(values=torch.zeros(count * math.prod(shape), channels), grid=grid)


def _pass(encoder: Any, media: Patches) -> tuple[int, int, int]:
    """Tokens, operations and kept bytes of a batch."""
    kept: set[torch.UntypedStorage] = set()  # several tensors may be views of one
    own = {tensor.untyped_storage() for tensor in (*encoder.parameters(), *encoder.buffers())}

    def pack(tensor: Tensor) -> Tensor:
        kept.add(tensor.untyped_storage())
        return tensor

    with (
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        found = encoder(media)
    return len(found.values), counter.get_total_flops(), sum(storage.nbytes() for storage in kept - own)
