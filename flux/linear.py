"""Linear layers of the transformer. On a CPU with AVX-512, without gradients, the product is oneDNN's own, bias and gelu
within it: in float32 a fifth to a quarter quicker than torch's on an AMD EPYC, in bfloat16 a little, to the bit the same.
With AVX2 alone, torch's product (MKL's) with gelu after it is the quicker one (docs/kernels.md).
"""

import torch
from torch import Tensor, nn

from flux.footprint import runs_on

ONEDNN_IS_QUICKER = torch.backends.cpu.get_cpu_capability() == "AVX512"  # measured on AMD alone


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight, self.bias) if by_onednn(self, x) else super().forward(x)


def product(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """oneDNN's: x (..., in), weight (out, in), bias (out,) -> (..., out), tanh gelu of it if asked for."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu" if gelu else "none", [], "tanh" if gelu else "")


def beside_gelu(layer: nn.Module, x: Tensor) -> Linear | None:
    """The layer, if gelu can be a part of its product, which saves a pass, and in bfloat16 a rounding. Else None."""
    layer = getattr(layer, "plain", layer)  # LoRAs at strength 0 change nothing
    return layer if isinstance(layer, Linear) and by_onednn(layer, x) else None


def by_onednn(layer: Linear, x: Tensor) -> bool:
    """Where it is quicker, in the weight's dtype. Gradients need torch's product; compilers and autocast choose theirs."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    if not ONEDNN_IS_QUICKER or not torch.backends.mkldnn.is_available():
        return False
    if runs_on(x) != "cpu" or layer.weight.dtype != x.dtype:
        return False
    return x.dtype == torch.float32 or x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
