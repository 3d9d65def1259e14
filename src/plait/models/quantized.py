"""Linear layers with 8-bit weights: one scale an output, round to nearest, activations as they are.

``y = (x Wᵀ) s`` with ``W`` in -127 … 127 and ``s`` the largest weight of a row over 127, so that no weight is off by
more than half a scale. Symmetric quantization by output channel as in Jacob et al., https://arxiv.org/abs/1712.05877.
"""

import torch
from jaxtyping import Float, Int8
from torch import Tensor, nn

LEVELS = 127
"""Largest magnitude of an 8-bit weight; -128 is not used, so that the range is symmetric."""

PACKED_ROWS = 8
"""Up to so many rows torch's kernel for 8-bit weights is used on a CPU.

Measured, one thread (AMX), 576 to 1,536, bfloat16: 1 row 110 to 160 µs (unpacking the weights first: 560 to 1,220;
bfloat16 weights: 325 to 620), 8 rows 730 (780; 170), 32 rows 1,660 to 1,950 (860 to 890; 210 to 540). Its cost grows
with the rows, that of unpacking does not.
"""


def quantize_rows(weight: Float[Tensor, "out d"]) -> tuple[Int8[Tensor, "out d"], Float[Tensor, " out"]]:
    """8-bit weights and their scales: ``|weight - scale * int8| <= scale / 2``, but for float32's own rounding.

    Example:
        The row ``1.27, -0.4, 0.006`` becomes ``127, -40, 1`` with scale 0.01.

    Raises:
        ValueError: A weight is not finite.
    """
    wide = weight.detach().float()
    if not bool(wide.isfinite().all()):
        raise ValueError(f"{int((~wide.isfinite()).sum())} of {wide.numel()} weights are not finite")
    largest = wide.abs().amax(1)
    # A row of zeros has no scale of its own; the smallest normal number keeps tiny rows from dividing by zero.
    scale = torch.where(largest > 0, largest / LEVELS, 1.0).clamp(min=torch.finfo(torch.float32).tiny)
    return (wide / scale[:, None]).round().clamp(-LEVELS, LEVELS).to(torch.int8), scale


class Int8Linear(nn.Module):
    """A linear layer with 8-bit weights, for inference; activations keep their format.

    Args:
        d_in: Width of the input.
        d_out: Width of the output.
        bias: Whether there is one, in float32.

    Attributes:
        weight: 8-bit weights.
        weight_scale: Scale of each output, float32.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, d_in: int, d_out: int, *, bias: bool = False) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(d_out, d_in, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.ones(d_out))
        self.register_buffer("bias", torch.zeros(d_out) if bias else None)

    @classmethod
    def of(cls, linear: nn.Linear) -> "Int8Linear":
        """Quantize a layer.

        Raises:
            ValueError: A weight is not finite.
        """
        made = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
        made.weight, made.weight_scale = quantize_rows(linear.weight)
        if linear.bias is not None:
            made.bias = linear.bias.detach().float()
        return made

    def _packed(self, x: Tensor, rows: int) -> bool:
        """Whether torch's kernel for 8-bit weights is the faster one, and is made for these sizes.

        It has no code for what is left over of a block and reads beyond the end instead; torch tests it on inputs that
        32 divides and outputs that 16 divides.
        """
        d_out, d_in = self.weight.shape
        known = x.device.type == "cpu" and x.dtype == torch.bfloat16 and 0 < rows <= PACKED_ROWS
        whole = d_in % 32 == 0 and d_out % 16 == 0
        return known and whole and torch.backends.cpu.get_cpu_capability() == "AVX512"

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b out"]:
        """Multiply, then scale in float32, then round once to the input's format."""
        rows = x.numel() // x.shape[-1]
        if self._packed(x, rows):
            ones = torch.ones(len(self.weight), dtype=x.dtype)
            product = torch.ops.aten._weight_int8pack_mm(x.reshape(rows, -1).contiguous(), self.weight, ones)
            product = product.view(*x.shape[:-1], -1)
        else:
            # Whole numbers up to 127 are exact in every float format there is.
            product = nn.functional.linear(x, self.weight.to(x.dtype))
        scaled = product.float() * self.weight_scale
        return (scaled if self.bias is None else scaled + self.bias).to(x.dtype)

    def extra_repr(self) -> str:
        """Shape, for printing a model."""
        return f"d_in={self.weight.shape[1]}, d_out={self.weight.shape[0]}, bias={self.bias is not None}"


def swap(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put another layer in the place of that name."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)


def quantized_layers(model: nn.Module) -> tuple[str, ...]:
    """Names of the layers with 8-bit weights."""
    return tuple(name for name, module in model.named_modules() if isinstance(module, Int8Linear))
