"""T5 v1.1 encoder (arXiv 1910.10683, gated feed-forward of arXiv 2002.05202): FLUX reads its last state, every token.

Unlike other transformers: position enters only as a bias on the scores, learned per bucket of distances by the first
block and used by all; scores are not divided by sqrt(d_kv), as the initialisation of q carries that factor; norms have
no mean and nothing has an additive bias. Attributes carry the names of the released files, in which the embedding is
stored once, as `shared`.
"""

from itertools import count

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flux.clip import table
from flux.config import T5Config


def relative_buckets(relative: Tensor, num_buckets: int = 32, max_distance: int = 128) -> Tensor:
    """Key position minus query position, integers of any shape -> buckets 0 .. num_buckets - 1 (section 2.1).

    The upper half is for keys ahead. In each half the first `exact` buckets are single distances, the others grow by
    a constant factor, (max_distance / exact) ** (1 / steps), and the last one has no end. Their first distances are
    found in integers, since a rounded logarithm puts a distance on the edge into the wrong bucket.
    """
    half, exact = num_buckets // 2, num_buckets // 4
    steps = half - exact
    starts = [next(n for n in count(exact) if n**steps * exact**k >= max_distance**k * exact**steps)
              for k in range(1, steps)]
    distance = relative.abs()
    far = exact + torch.bucketize(distance, torch.tensor(starts, device=relative.device), right=True)
    return torch.where(distance < exact, distance, far) + half * (relative > 0)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis (arXiv 1910.07467), its statistics in float32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        x = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.eps)
        return self.weight * x.to(self.weight.dtype)


class SelfAttention(nn.Module):
    def __init__(self, config: T5Config, holds_bias: bool):
        super().__init__()
        self.config = config
        inner = config.num_heads * config.d_kv
        self.q = nn.Linear(config.d_model, inner, bias=False)
        self.k = nn.Linear(config.d_model, inner, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)
        self.o = nn.Linear(inner, config.d_model, bias=False)
        nn.init.trunc_normal_(self.q.weight, std=(config.d_model * config.d_kv) ** -0.5)
        if holds_bias:
            buckets = config.relative_attention_num_buckets
            self.relative_attention_bias = table(buckets, config.num_heads, std=config.d_model**-0.5)

    def position_bias(self, length: int) -> Tensor:
        """(1, H, L, L), added to the scores of query i and key j."""
        table = self.relative_attention_bias
        positions = torch.arange(length, device=table.weight.device)
        buckets = relative_buckets(positions[None, :] - positions[:, None], table.num_embeddings,
                                   self.config.relative_attention_max_distance)
        return rearrange(table(buckets), "i j h -> 1 h i j")

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (rearrange(proj(x), "b l (h e) -> b h l e", e=self.config.d_kv) for proj in (self.q, self.k, self.v))
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        return self.o(rearrange(x, "b h l e -> b l (h e)"))


class GatedGelu(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        self.wi_0 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wi_1 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x)
        if x.dtype == torch.float16:
            # Its outputs pass 65504, the end of float16. What returns is float32, and so the sum of the residuals is
            # float32 from here on; each norm brings it back to the dtype of its weight.
            return F.linear(x.float(), self.wo.weight.float())
        return self.wo(x)


class AttentionLayer(nn.Module):
    def __init__(self, config: T5Config, holds_bias: bool):
        super().__init__()
        self.SelfAttention = SelfAttention(config, holds_bias)
        self.layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return x + self.SelfAttention(self.layer_norm(x), bias)


class FeedForwardLayer(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        self.DenseReluDense = GatedGelu(config)
        self.layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.DenseReluDense(self.layer_norm(x))


class Block(nn.Module):
    def __init__(self, config: T5Config, holds_bias: bool):
        super().__init__()
        self.layer = nn.ModuleList((AttentionLayer(config, holds_bias), FeedForwardLayer(config)))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        attention, feed_forward = self.layer
        return feed_forward(attention(x, bias))


class Stack(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        self.block = nn.ModuleList(Block(config, holds_bias=i == 0) for i in range(config.num_layers))
        self.final_layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        bias = self.block[0].layer[0].SelfAttention.position_bias(x.shape[1])  # (1, H, L, L)
        if mask is not None:
            # the least number, not -inf: a row with nothing to attend to then stays finite
            bias = bias.masked_fill(~mask.bool()[:, None, None], torch.finfo(bias.dtype).min)
        for block in self.block:
            x = block(x, bias)
        return self.final_layer_norm(x)


class T5Encoder(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        self.shared = table(config.vocab_size, config.d_model, std=1.0)
        self.encoder = Stack(config)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """ids (B, L) -> (B, L, d_model) after the final norm, every position.

        mask (B, L), 1 = a token to attend to. FLUX gives none and attends to padding, as it was trained.
        """
        return self.encoder(self.shared(ids), mask)
