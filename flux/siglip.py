"""SigLIP's image tower (arXiv 2303.15343), and the connector that turns its patches into text tokens for FLUX.

FLUX.1-Redux reads so400m patch14-384 (729 patches), LucidFlux SigLIP2 so400m patch16-512 (1024): one architecture.
Unlike CLIP's tower (read `flux/clip.py` first) it has no class token and no norm before its layers; its patches have a
bias, and an attention head, which FLUX does not use, pools them. Attributes carry the names of the released files.
"""

from functools import partial

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flux.clip import Encoder, Mlp, drawn, table
from flux.config import SiglipConfig

gelu_tanh = partial(F.gelu, approximate="tanh")


class Embeddings(nn.Module):
    def __init__(self, config: SiglipConfig):
        super().__init__()
        width, patches = config.hidden_size, (config.image_size // config.patch_size) ** 2
        self.image_size = config.image_size
        self.patch_embedding = nn.Conv2d(config.num_channels, width, config.patch_size, config.patch_size)
        self.position_embedding = table(patches, width, std=width**-0.5)

    def forward(self, pixels: Tensor) -> Tensor:
        size = (self.image_size, self.image_size)
        assert pixels.shape[-2:] == size, f"pixels {tuple(pixels.shape)}, expected {size}"
        x = self.patch_embedding(pixels.to(self.patch_embedding.weight.dtype))
        return rearrange(x, "b d h w -> b (h w) d") + self.position_embedding.weight


class PoolingHead(nn.Module):
    """One learned query attends to all patches (section 3 of arXiv 2106.04560 calls it MAP)."""

    def __init__(self, config: SiglipConfig):
        super().__init__()
        width = config.hidden_size
        self.probe = nn.Parameter(drawn(1, 1, width, std=width**-0.5))
        self.attention = nn.MultiheadAttention(width, config.num_attention_heads, batch_first=True)
        self.layernorm = nn.LayerNorm(width, config.layer_norm_eps)
        self.mlp = Mlp(width, config.intermediate_size, gelu_tanh)

    def forward(self, last: Tensor) -> Tensor:
        x, _ = self.attention(self.probe.expand(len(last), -1, -1), last, last, need_weights=False)
        return (x + self.mlp(self.layernorm(x)))[:, 0]


class Tower(nn.Module):
    def __init__(self, config: SiglipConfig):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config, gelu_tanh)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.head = PoolingHead(config)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.post_layernorm(self.encoder(self.embeddings(pixels)))


class SiglipVision(nn.Module):
    def __init__(self, config: SiglipConfig):
        super().__init__()
        self.vision_model = Tower(config)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, S, S) in [-1, 1] -> (B, N, D) after the last norm, N patches row by row."""
        return self.vision_model(pixels)

    def pool(self, last: Tensor) -> Tensor:
        """(B, N, D) -> (B, D), the whole image."""
        return self.vision_model.head(last)


class Redux(nn.Module):
    """Image tokens for FLUX: they follow the T5 tokens, with ids of zero as these have."""

    def __init__(self, in_dim: int = 1152, txt_dim: int = 4096):
        super().__init__()
        self.redux_up = nn.Linear(in_dim, 3 * txt_dim)
        self.redux_down = nn.Linear(3 * txt_dim, txt_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, in_dim) -> (B, N, txt_dim)."""
        return self.redux_down(F.silu(self.redux_up(x)))
