"""The blocks of the MMDiT: embedders, modulation, double-stream blocks (arXiv 2403.03206), single-stream blocks
(parallel attention and MLP, arXiv 2302.05442), and the last layer. Attributes carry the released key names.

Read `attention.py` first. B batch, L tokens, D model width, H heads, E head width.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flux.attention import attention
from flux.config import FluxConfig
from flux.linear import Linear, beside_gelu, product


def time_embedding(t: Tensor, dim: int = 256, max_period: float = 10_000, time_factor: float = 1000.0) -> Tensor:
    """t (B,) in [0, 1], or guidance -> (B, dim): cosines, then sines, of time_factor * t * max_period^(-k / half).

    The product with time_factor is rounded to t's dtype, as in the reference: in bfloat16 0.7431 becomes 744.
    """
    half = dim // 2
    frequency = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angle = (time_factor * t)[:, None].float() * frequency
    return F.pad(torch.cat((angle.cos(), angle.sin()), dim=-1), (0, dim % 2)).to(t.dtype)


class MLPEmbedder(nn.Module):
    def __init__(self, in_dim: int, hidden_size: int):
        super().__init__()
        self.in_layer = Linear(in_dim, hidden_size)
        self.out_layer = Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-6) * scale over the last axis, statistics in float32."""

    def __init__(self, dim: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            return F.rms_norm(x, self.scale.shape, self.scale, eps=1e-6)
        wide = x.float()
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return F.rms_norm(wide, self.scale.shape, eps=1e-6).to(x.dtype) * self.scale  # two roundings, as released
        squares = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()          # the same in half the time
        return wide.mul_(squares.div_(x.shape[-1]).add_(1e-6).rsqrt_()).to(x.dtype).mul_(self.scale)


class QKNorm(nn.Module):
    def __init__(self, head_dim: int):
        super().__init__()
        self.query_norm = RMSNorm(head_dim)
        self.key_norm = RMSNorm(head_dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.query_norm(q).to(v), self.key_norm(k).to(v)


class SelfAttention(nn.Module):
    """The parameters of one stream's attention; the double block joins two of them."""

    def __init__(self, hidden_size: int, num_heads: int, qkv_bias: bool):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(hidden_size, 3 * hidden_size, bias=qkv_bias)
        self.norm = QKNorm(hidden_size // num_heads)
        self.proj = Linear(hidden_size, hidden_size)


class Modulation(nn.Module):
    """vec (B, D) -> `count` tensors (B, 1, D): shift, scale, gate, once or twice (adaptive layer norm, arXiv 2212.09748)."""

    def __init__(self, hidden_size: int, count: int):
        super().__init__()
        self.count = count
        self.lin = Linear(hidden_size, count * hidden_size)

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        return self.lin(F.silu(vec))[:, None].chunk(self.count, dim=-1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(1 + scale) * layer_norm(x) + shift; x (B, L, D), shift and scale (B, 1, D)."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


class MLP(nn.Sequential):
    def __init__(self, config: FluxConfig):
        super().__init__(Linear(config.hidden_size, config.mlp_hidden), nn.GELU(approximate="tanh"),
                         Linear(config.mlp_hidden, config.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        if (first := beside_gelu(self[0], x)) is not None:
            return self[2](product(x, first.weight, first.bias, gelu=True))
        return super().forward(x)


class DoubleStreamBlock(nn.Module):
    """Image and text keep their own weights and meet in one attention."""

    attention_way = "auto"  # or sdpa, triton: see kernels/rope_attention.py
    attention_bias: Tensor | None = None  # on the logits: see flux/regional_attention.py

    def __init__(self, config: FluxConfig):
        super().__init__()
        self.img_mod = Modulation(config.hidden_size, 6)
        self.img_attn = SelfAttention(config.hidden_size, config.num_heads, config.qkv_bias)
        self.img_mlp = MLP(config)
        self.txt_mod = Modulation(config.hidden_size, 6)
        self.txt_attn = SelfAttention(config.hidden_size, config.num_heads, config.qkv_bias)
        self.txt_mlp = MLP(config)

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
        """img (B, L_img, D), txt (B, L_txt, D), vec (B, D), pe over text then image -> img, txt."""
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = self.img_mod(vec)
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = self.txt_mod(vec)

        txt_attn, img_attn = self.attend(modulate(txt, txt_shift1, txt_scale1), modulate(img, img_shift1, img_scale1), pe)
        img = torch.addcmul(img, img_gate1, self.img_attn.proj(img_attn))
        img = torch.addcmul(img, img_gate2, self.img_mlp(modulate(img, img_shift2, img_scale2)))
        txt = torch.addcmul(txt, txt_gate1, self.txt_attn.proj(txt_attn))
        txt = torch.addcmul(txt, txt_gate2, self.txt_mlp(modulate(txt, txt_shift2, txt_scale2)))
        return img, txt

    def attend(self, txt: Tensor, img: Tensor, pe: Tensor) -> tuple[Tensor, ...]:
        """One attention over both streams, given and returned apart. Its q, k and v are freed before the MLPs run.

        The projections are joined before the norms, so that the backward pass keeps v once.
        """
        joined = torch.cat((self.txt_attn.qkv(txt), self.img_attn.qkv(img)), dim=1)
        q, k, v = (rearrange(x, "b l (h e) -> b l h e", h=self.txt_attn.num_heads) for x in joined.chunk(3, dim=-1))
        joined = attention(q, k, v, pe, (self.txt_attn.norm, self.img_attn.norm), txt.shape[1], self.attention_way,
                           self.attention_bias)
        return joined.split((txt.shape[1], img.shape[1]), dim=1)


class SingleStreamBlock(nn.Module):
    """Attention and MLP side by side on the joined tokens, with one projection in and one out."""

    attention_way = "auto"
    attention_bias: Tensor | None = None

    def __init__(self, config: FluxConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.mlp_hidden = config.mlp_hidden
        self.linear1 = Linear(config.hidden_size, 3 * config.hidden_size + config.mlp_hidden)
        self.linear2 = Linear(config.hidden_size + config.mlp_hidden, config.hidden_size)
        self.norm = QKNorm(config.head_dim)
        self.modulation = Modulation(config.hidden_size, 3)

    def forward(self, x: Tensor, vec: Tensor, pe: Tensor) -> Tensor:
        """x (B, L_txt + L_img, D), vec (B, D) -> x."""
        shift, scale, gate = self.modulation(vec)
        return torch.addcmul(x, gate, self.linear2(self.branches(modulate(x, shift, scale), pe)))

    def branches(self, x: Tensor, pe: Tensor) -> Tensor:
        """Modulated x (B, L, D) -> attention beside MLP (B, L, D + 4D). linear1's output is freed on return."""
        rows = 3 * x.shape[-1], self.mlp_hidden
        if (linear1 := beside_gelu(self.linear1, x)) is not None:
            (qkv, mlp), (qkv_bias, mlp_bias) = linear1.weight.split(rows), linear1.bias.split(rows)
            return torch.cat((self.attend(product(x, qkv, qkv_bias), pe), product(x, mlp, mlp_bias, gelu=True)), dim=-1)
        qkv, mlp = self.linear1(x).split(rows, dim=-1)
        return BesideGelu.apply(self.attend(qkv, pe), mlp)

    def attend(self, qkv: Tensor, pe: Tensor) -> Tensor:
        q, k, v = rearrange(qkv, "b l (three h e) -> three b l h e", three=3, h=self.num_heads)
        return attention(q, k, v, pe, (self.norm,), way=self.attention_way, bias=self.attention_bias)


class BesideGelu(torch.autograd.Function):
    """cat((a, gelu(b)), -1) with gelu written where it belongs: otherwise a block's largest activation is copied once more.

    Differentiable twice; has no forward-mode derivative (torch.func.jvp).
    """

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(b)
        if torch.compiler.is_compiling():  # which joins the two itself, and does not take such an output
            return torch.cat((a, F.gelu(b, approximate="tanh")), dim=-1)
        both = a.new_empty(*a.shape[:-1], a.shape[-1] + b.shape[-1])
        both[..., :a.shape[-1]] = a
        torch.ops.aten.gelu.out(b, approximate="tanh", out=both[..., a.shape[-1]:])
        return both

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        (b,) = ctx.saved_tensors
        grad_a, grad_gelu = grad.split((grad.shape[-1] - b.shape[-1], b.shape[-1]), dim=-1)
        return grad_a.clone(), torch.ops.aten.gelu_backward(grad_gelu, b, approximate="tanh")  # a view would keep all


class LastLayer(nn.Module):
    def __init__(self, hidden_size: int, out_channels: int):
        super().__init__()
        self.linear = Linear(hidden_size, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vec)[:, None].chunk(2, dim=-1)
        return self.linear(modulate(x, shift, scale))
