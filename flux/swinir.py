"""SwinIR (arXiv 2108.10257) as DiffBIR trained it: a picture of any blur, noise and compression -> a clean, smooth proxy.

Attention inside windows of 8 x 8 cells, every other block with the windows shifted by half; a cell is 8 x 8 pixels. It is
trained for PSNR, so it says what is certain and blurs the rest: LucidFlux sees its output beside the degraded picture.
Attributes carry the names of the released file.
"""

from functools import cache

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flux import edges
from flux.config import SwinirConfig

MEAN = (0.4488, 0.4371, 0.4040)  # of DIV2K's pictures, RGB in [0, 1]
SHARES = (0.1, 0.5, 0.9, 0.99)  # quantiles by which a clean picture is known


@cache
def offsets(window: int) -> Tensor:
    """(W*W, W*W) row of the bias table for each pair of cells: (dy + W - 1) * (2W - 1) + dx + W - 1."""
    with torch.inference_mode(False):  # kept for whoever comes next, who may want to learn
        y, x = torch.cartesian_prod(torch.arange(window), torch.arange(window)).T
        dy, dx = y[:, None] - y[None], x[:, None] - x[None]
        return (dy + window - 1) * (2 * window - 1) + dx + window - 1


def shift_mask(h: int, w: int, window: int, device: torch.device | str = "cpu") -> Tensor:
    """(windows, 1, W*W, W*W), 0 or -100: after the cyclic shift by W/2 only what was adjacent before may meet."""
    def parts(length):
        at = torch.arange(length, device=device)
        return (at >= length - window).long() + (at >= length - window // 2)
    regions = windows((3 * parts(h)[:, None] + parts(w))[None, ..., None], window)[0, ..., 0]    # (windows, W*W)
    return -100.0 * (regions[:, None, :, None] != regions[:, None, None, :])


def windows(x: Tensor, window: int) -> Tensor:
    return rearrange(x, "b (h p) (w q) c -> b (h w) (p q) c", p=window, q=window)


class WindowAttention(nn.Module):
    def __init__(self, dim: int, heads: int, window: int):
        super().__init__()
        self.heads, self.window = heads, window
        self.relative_position_bias_table = nn.Parameter(0.02 * torch.randn((2 * window - 1) ** 2, heads))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x (B, windows, W*W, D), mask of `shift_mask` -> the same shape."""
        q, k, v = rearrange(self.qkv(x), "b n l (three h e) -> three b n h l e", three=3, h=self.heads)
        bias = self.relative_position_bias_table[offsets(self.window).to(x.device)].permute(2, 0, 1)     # (H, W*W, W*W)
        bias = bias if mask is None else bias + mask.to(bias)
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v, bias), "b n h l e -> b n l (h e)"))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SwinBlock(nn.Module):
    def __init__(self, config: SwinirConfig, heads: int, shifted: bool):
        super().__init__()
        self.window, self.shift = config.window_size, config.window_size // 2 if shifted else 0
        self.norm1 = nn.LayerNorm(config.embed_dim)
        self.attn = WindowAttention(config.embed_dim, heads, config.window_size)
        self.norm2 = nn.LayerNorm(config.embed_dim)
        self.mlp = Mlp(config.embed_dim, int(config.mlp_ratio * config.embed_dim))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x (B, h, w, D), both edges multiples of the window."""
        shift, (_, h, _, _) = self.shift, x.shape
        y = self.norm1(x).roll((-shift, -shift), (1, 2)) if shift else self.norm1(x)
        y = self.attn(windows(y, self.window), mask if shift else None)
        y = rearrange(y, "b (h w) (p q) c -> b (h p) (w q) c", h=h // self.window, p=self.window)
        x = x + (y.roll((shift, shift), (1, 2)) if shift else y)
        return x + self.mlp(self.norm2(x))


class BasicLayer(nn.Module):
    def __init__(self, config: SwinirConfig, depth: int, heads: int):
        super().__init__()
        self.blocks = nn.ModuleList(SwinBlock(config, heads, i % 2 == 1) for i in range(depth))


class ResidualSwinBlock(nn.Module):
    """Some blocks, a convolution, and the way past both."""

    def __init__(self, config: SwinirConfig, depth: int, heads: int):
        super().__init__()
        self.residual_group = BasicLayer(config, depth, heads)
        self.conv = nn.Conv2d(config.embed_dim, config.embed_dim, 3, padding=1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = x
        for block in self.residual_group.blocks:
            y = block(y, mask)
        return x + self.conv(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def clearness(image: Tensor) -> Tensor:
    """image (B, 3, H, W) in [0, 1] -> (B, 6), by which noise and blur can be told: logarithms of the mean of |Laplacian| and
    of its quantiles, and the share of pixels where it is nothing."""
    centre = image[..., 1:-1, 1:-1]
    around = image[..., :-2, 1:-1] + image[..., 2:, 1:-1] + image[..., 1:-1, :-2] + image[..., 1:-1, 2:]
    steep = (4 * centre - around).abs().flatten(1)
    ordered = steep.sort(dim=1).values
    found = [steep.mean(1), *(ordered[:, round(share * (steep.shape[1] - 1))] for share in SHARES)]
    return torch.stack([*((x + 1e-3).log() / 2 + 2 for x in found), (steep < 1 / 510).float().mean(1)], dim=1)


class Swinir(nn.Module):
    def __init__(self, config: SwinirConfig):
        super().__init__()
        self.config = config
        dim, features, cell = config.embed_dim, config.num_feat, config.unshuffle_scale
        self.conv_first = nn.Sequential(nn.PixelUnshuffle(cell), nn.Conv2d(3 * cell**2, dim, 3, padding=1))
        self.patch_embed = nn.ModuleDict({"norm": nn.LayerNorm(dim)})
        self.layers = nn.ModuleList(ResidualSwinBlock(config, depth, heads)
                                    for depth, heads in zip(config.depths, config.num_heads, strict=True))
        self.norm = nn.LayerNorm(dim)
        self.conv_after_body = nn.Conv2d(dim, dim, 3, padding=1)
        self.conv_before_upsample = nn.Sequential(nn.Conv2d(dim, features, 3, padding=1), nn.LeakyReLU(0.01))
        self.conv_up1, self.conv_up2, self.conv_up3, self.conv_hr = (nn.Conv2d(features, features, 3, padding=1)
                                                                     for _ in range(4))
        self.conv_last = nn.Conv2d(features, 3, 3, padding=1)
        if config.keeps:
            self.keep = nn.Sequential(nn.Linear(len(SHARES) + 2, 64), nn.GELU(), nn.Linear(64, 1))

    def features(self, first: Tensor) -> Tensor:
        """(B, D, h, w) of the first convolution -> the same shape, after all blocks."""
        x = first.permute(0, 2, 3, 1)
        mask = shift_mask(*x.shape[1:3], self.config.window_size, x.device)
        x = self.patch_embed["norm"](x)
        for layer in self.layers:
            x = layer(x, mask)
        return self.norm(x).permute(0, 3, 1, 2)

    def forward(self, image: Tensor) -> Tensor:
        """image (B, 3, H, W) in [0, 1], edges multiples of 64 (cell times window) -> the same, not clamped."""
        made, kept = self.made(image)
        return made if kept is None else torch.lerp(made, image, kept)

    def made(self, image: Tensor) -> tuple[Tensor, Tensor | None]:
        """The picture made anew; and where `keeps`, how much of the input is kept instead, (B, 1, 1, 1) in [0, 1]."""
        step = self.config.step
        assert not (image.shape[2] % step or image.shape[3] % step), f"{tuple(image.shape)}, expected multiples of {step}"
        mean = torch.tensor(MEAN, dtype=image.dtype, device=image.device)[:, None, None]
        first = self.conv_first(image - mean)
        x = self.conv_before_upsample(self.conv_after_body(self.features(first)) + first)
        for conv in (self.conv_up1, self.conv_up2, self.conv_up3):
            x = F.leaky_relu(conv(F.interpolate(x, scale_factor=2, mode="nearest")), 0.2)
        made = self.conv_last(F.leaky_relu(self.conv_hr(x), 0.2)) + mean
        if not self.config.keeps:
            return made, None
        return made, self.keep(clearness(image.float()).to(image)).to(image).sigmoid()[..., None, None]

    def restore(self, image: Tensor) -> Tensor:
        """image (B, 3, H, W) in [-1, 1] of any size -> its proxy, the same size and range (lucidflux.md section 1)."""
        padded, (height, width) = edges.filled(image, self.config.step), image.shape[2:]
        return 2 * self((padded.float().clamp(-1, 1) + 1) / 2)[..., :height, :width].clamp(0, 1) - 1
