"""Rotary positions (arXiv 2104.09864, over three axes) and the joint attention of text and image tokens.

Tokens stay (B, L, H, E) in memory: a projection writes that layout, attention reads and returns it, and merging the
heads is a view.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def rotary_table(ids: Tensor, axes_dim: tuple[int, ...], theta: int) -> Tensor:
    """Token coordinates (B, L, axes) -> pe (B, L, 1, E/2): one unit complex number per channel pair, complex64.

    Within an axis of width w, pair j turns by position * theta^(-2j/w). Angles are formed in float64: positions beyond 256
    have no exact bfloat16, and float32 angles lose digits (the 2025 reference uses float32, the 2024 one float64).
    """
    angles = []
    for axis, width in enumerate(axes_dim):
        frequency = theta ** -(torch.arange(0, width, 2, dtype=torch.float64, device=ids.device) / width)
        angles.append(ids[..., axis, None].double() * frequency)
    angle = torch.cat(angles, dim=-1).unsqueeze(2)
    return torch.complex(angle.cos().float(), angle.sin().float())


def rotate(x: Tensor, pe: Tensor) -> Tensor:
    """Turn adjacent channel pairs of x (B, L, H, E), read as complex numbers, by pe, in float32; returns x's dtype."""
    if torch.compiler.is_compiling():  # which generates no code for complex numbers: the same product, written out
        real, imaginary = rearrange(x.float(), "b l h (e two) -> two b l h e", two=2)
        cos, sin = torch.view_as_real(pe).unbind(-1)
        return torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), dim=-1).flatten(3).to(x.dtype)
    pairs = torch.view_as_complex(rearrange(x.float(), "b l h (e two) -> b l h e two", two=2))
    return torch.view_as_real(pairs * pe).flatten(3).to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, pe: Tensor) -> Tensor:
    """Normalised q, k and v (B, L, H, E), pe (B, L, 1, E/2) -> (B, L, H*E). No mask: padded text attends too."""
    q = rotate(q, pe)
    k = rotate(k, pe)
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2).flatten(2)
