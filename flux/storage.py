"""Linear layers whose weights are kept in 8 bits: half of bfloat16's memory, the same arithmetic.

Each row of a weight is stored as e4m3 or int8 numbers and one float32 scale, its largest magnitude over the format's.
Before it is used a weight is made bfloat16 again (or the dtype that it had): nothing but the weights is rounded, and
nothing is gained in speed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
DTYPES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}


class StoredLinear(nn.Module):
    """A linear layer with weight (out, in) = scale (out, 1) * numbers (out, in)."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.compute_dtype = linear.weight.dtype
        numbers, scale = stored(linear.weight.detach(), dtype)
        self.weight = nn.Parameter(numbers, requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def dequantised(self) -> Tensor:
        return (self.weight.to(torch.float32) * self.scale).to(self.compute_dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantised().to(x.dtype), self.bias)


def stored(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(out, in) -> numbers (out, in) in float8_e4m3fn or int8, scale (out, 1) in float32; a row of zeros has scale 1."""
    wide = weight.float()
    most = wide.abs().amax(dim=1, keepdim=True)
    scale = torch.where(most > 0, most / LARGEST[dtype], 1.0)
    numbers = wide / scale
    return (numbers.round() if dtype == torch.int8 else numbers).to(dtype), scale


def store(model: nn.Module, dtype: torch.dtype, least: int = 2**14) -> None:
    """Keep every linear layer of at least so many weights in 8 bits, one after the other."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and layer.weight.numel() >= least:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, StoredLinear(layer, dtype))
