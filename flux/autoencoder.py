"""The autoencoder: pictures to latents and back (convolutional KL autoencoder of arXiv 2112.10752, 16 channels, 1/8 size).

Attributes carry the key names of the released `ae.safetensors`. `encode` and `decode` include the shift and scale that
make latents about unit variance, so nothing else in the project knows those constants.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flux.config import AutoEncoderConfig


def _norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)


class AttnBlock(nn.Module):
    """Single-head attention over all cells, as 1x1 convolutions."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = _norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        q, k, v = (rearrange(layer(n), "b c h w -> b 1 (h w) c").contiguous() for layer in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(rearrange(out, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = _norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        if hasattr(self, "nin_shortcut"):
            x = self.nin_shortcut(x)
        return x + h


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # right and bottom only


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _mid(channels: int, groups: int) -> nn.Module:
    mid = nn.Module()
    mid.block_1 = ResnetBlock(channels, channels, groups)
    mid.attn_1 = AttnBlock(channels, groups)
    mid.block_2 = ResnetBlock(channels, channels, groups)
    return mid


def _level(widths: list[int], groups: int) -> nn.Module:
    """A resolution: residual blocks from each width to the next."""
    level = nn.Module()
    level.block = nn.ModuleList(ResnetBlock(a, b, groups) for a, b in pairwise(widths))
    return level


class Encoder(nn.Module):
    """Pictures (B, 3, 8h, 8w) -> moments (B, 32, h, w): mean, then log-variance."""

    def __init__(self, config: AutoEncoderConfig):
        super().__init__()
        groups, widths = config.norm_groups, [config.ch * m for m in config.ch_mult]
        self.conv_in = nn.Conv2d(config.in_channels, config.ch, 3, padding=1)
        self.down = nn.ModuleList()
        for before, width in pairwise([config.ch, *widths]):
            self.down.append(_level([before] + [width] * config.num_res_blocks, groups))
        for level, width in zip(self.down[:-1], widths[:-1], strict=True):
            level.downsample = Downsample(width)
        self.mid = _mid(widths[-1], groups)
        self.norm_out = _norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            for block in level.block:
                h = block(h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """z (B, 16, h, w) -> pictures (B, 3, 8h, 8w). `up.0` is the highest resolution and runs last."""

    def __init__(self, config: AutoEncoderConfig):
        super().__init__()
        groups, widths = config.norm_groups, [config.ch * m for m in config.ch_mult]
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = _mid(widths[-1], groups)
        self.up = nn.ModuleList()
        for above, width in zip([*widths[1:], widths[-1]], widths, strict=True):
            self.up.append(_level([above] + [width] * (config.num_res_blocks + 1), groups))
        for level, width in zip(self.up[1:], widths[1:], strict=True):
            level.upsample = Upsample(width)
        self.norm_out = _norm(widths[0], groups)
        self.conv_out = nn.Conv2d(widths[0], config.out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.conv_in(z)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))
        for level in reversed(self.up):
            for block in level.block:
                h = block(h)
            if hasattr(level, "upsample"):
                h = level.upsample(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class AutoEncoder(nn.Module):
    def __init__(self, config: AutoEncoderConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def moments(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """image (B, 3, 8h, 8w) in [-1, 1] -> mean and log-variance of the posterior, both (B, 16, h, w), unscaled."""
        return self.encoder(image).chunk(2, dim=1)

    def encode(self, image: Tensor, sample: bool = False, generator: torch.Generator | None = None) -> Tensor:
        """image (B, 3, 8h, 8w) in [-1, 1] -> latents (B, 16, h, w): the posterior's mean, or a draw from it.

        The 2025 reference takes the mean; the 2024 release, diffusers, LucidFlux's and InFluxEdit's trainings draw.
        """
        edge = self.config.downsampling
        assert image.shape[2] % edge == 0 and image.shape[3] % edge == 0, f"{tuple(image.shape)} is no multiple of {edge}"
        z, log_variance = self.moments(image)
        if sample:
            noise = torch.randn(z.shape, generator=generator, device=z.device, dtype=z.dtype)
            z = z + torch.exp(0.5 * log_variance) * noise
        return self.config.scale_factor * (z - self.config.shift_factor)

    def decode(self, latents: Tensor) -> Tensor:
        """latents (B, 16, h, w) -> image (B, 3, 8h, 8w), about in [-1, 1], not clamped."""
        return self.decoder(latents / self.config.scale_factor + self.config.shift_factor)
