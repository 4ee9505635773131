"""Rotary positions (arXiv 2104.09864, over three axes) and the joint attention of text and image tokens.

On a GPU tokens stay (B, L, H, E) in memory, as a projection writes them, and `kernels/rope_attention.py` does it all; what
stands here is the release step by step, for the CPU.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flux.errors import UserError
from kernels.rope_attention import rope_attention, why_not


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
    """Turn adjacent channel pairs of x (..., E), read as complex numbers, by pe (..., E/2) in float32; keeps the dtype."""
    if torch.compiler.is_compiling():  # which generates no code for complex numbers: the same product, written out
        real, imaginary = rearrange(x.float(), "... (e two) -> two ... e", two=2)
        cos, sin = torch.view_as_real(pe).unbind(-1)
        return torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), dim=-1).flatten(3).to(x.dtype)
    pairs = torch.view_as_complex(rearrange(x.float(), "... (e two) -> ... e two", two=2))
    return torch.view_as_real(pairs * pe).flatten(3).to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, pe: Tensor, norms: Sequence[nn.Module] = (), split: int = 0,
              way: str = "auto", bias: Tensor | None = None) -> Tensor:
    """q, k, v (B, L, H, E), pe (B or 1, L, 1, E/2) -> (B, L, H*E). No mask: padded text attends too.

    `bias` (B or 1, 1, L, L) is added to the logits.

    `norms` are the QKNorm of the tokens before `split` and of the others, or one for all; none if q and k are normalised.
    """
    if norms and (way == "triton" or not why_not(q.device, q.dtype, q.shape[-1])):
        q_scale = torch.stack([norm.query_norm.scale for norm in norms])
        k_scale = torch.stack([norm.key_norm.scale for norm in norms])
        return rope_attention(q, k, v, q_scale, k_scale, pe, split, bias=bias, way=way).flatten(2)
    q, k, v, pe = (x.transpose(1, 2) for x in (q, k, v, pe))                               # (B, H, L, E), also in memory:
    if len(norms) == 2:
        lengths = (split, q.shape[2] - split)
        streams = zip(norms, *(x.split(lengths, dim=2) for x in (q, k, v)), strict=True)
        q, k = (torch.cat(parts, dim=2) for parts in zip(*(norm(*qkv) for norm, *qkv in streams), strict=True))
    elif norms:
        q, k = norms[0](q, k, v)
    q = rotate(q, pe)
    k = rotate(k, pe)
    v = v if torch.is_grad_enabled() else v.contiguous()  # an eighth faster, but backward would keep v twice
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return out.transpose(1, 2).flatten(2)


def choose(flux: nn.Module, way: str, device: torch.device, dtype: torch.dtype) -> None:
    """--attention auto, sdpa or triton, for every block of the transformer."""
    if way == "triton" and (fault := why_not(device, dtype, flux.config.head_dim)):
        raise UserError(f"--attention triton cannot run here ({fault}), expected auto or sdpa; take --attention auto")
    for block in (*flux.double_blocks, *flux.single_blocks):
        block.attention_way = way
