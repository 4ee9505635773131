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
ROWS = 2048  # of a weight that are rounded together
LEAST = 2**14  # numbers of a weight that is stored in 8 bits


class StoredLinear(nn.Module):
    """A linear layer with weight (out, in) = scale (out, 1) * numbers (out, in)."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype, compute: torch.dtype, device: torch.device):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.compute_dtype = compute
        pieces = [stored(piece.to(device, compute), dtype) for piece in linear.weight.detach().split(ROWS)]
        numbers, scale = (torch.cat(part) for part in zip(*pieces, strict=True))
        self.register_buffer("scale", scale)
        self.weight = nn.Parameter(numbers, requires_grad=False)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.to(device, compute), requires_grad=False)

    def dequantised(self) -> Tensor:
        return self.weight.to(torch.float32).mul_(self.scale).to(self.compute_dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantised().to(x.dtype), self.bias)


def stored(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(out, in) -> numbers (out, in) in float8_e4m3fn or int8, scale (out, 1) in float32; a row of zeros has scale 1."""
    wide = weight.float()
    most = wide.abs().amax(dim=1, keepdim=True)
    scale = torch.where(most > 0, most / LARGEST[dtype], 1.0)
    numbers = wide / scale
    return (numbers.round() if dtype == torch.int8 else numbers).to(dtype), scale


def store(model: nn.Module, dtype: torch.dtype, least: int = LEAST, compute: torch.dtype | None = None,
          device: torch.device | None = None) -> nn.Module:
    """Keep every linear layer of at least so many weights in 8 bits, one after the other.

    A model that is mapped from its file goes to the device this way without ever being there whole: `compute` and
    `device` say as what and where it will compute, without them as and where it is. All other layers stay as they are.
    """
    names = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and layer.weight.numel() >= least]
    for name in names:
        parent, _, last = name.rpartition(".")
        layer = model.get_submodule(name)
        new = StoredLinear(layer, dtype, compute or layer.weight.dtype, device or layer.weight.device)
        setattr(model.get_submodule(parent), last, new)
    return model
