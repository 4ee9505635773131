"""The autoencoder in little memory, exactly: each layer is computed in strips of rows, with the rows beside them that
a convolution sees.

Tiles of a picture decoded apart differ from the whole, since GroupNorm and the middle attention look at all of it. Here
every layer still does: a norm's statistics are taken over the whole map first, and only what is computed between one map
and the next (norm, activation, convolution) is cut into strips. Two feature maps are in memory at a time, and a strip.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux.autoencoder import AutoEncoder, Downsample, ResnetBlock, Upsample

ROWS = 64  # of an output map that are computed together


class InStrips(nn.Module):
    """An autoencoder that encodes and decodes in strips; otherwise itself."""

    def __init__(self, whole: AutoEncoder):
        super().__init__()
        self.whole, self.config = whole, whole.config

    def encode(self, image: Tensor) -> Tensor:
        return encode(self.whole, image)

    def decode(self, latents: Tensor) -> Tensor:
        return decode(self.whole, latents)


def decode(autoencoder: AutoEncoder, latents: Tensor, rows: int = ROWS) -> Tensor:
    """As `autoencoder.decode`: latents (B, 16, h, w) -> image (B, 3, 8h, 8w), about in [-1, 1]."""
    config, decoder = autoencoder.config, autoencoder.decoder
    h = decoder.conv_in(latents / config.scale_factor + config.shift_factor)
    h = decoder.mid.block_2(decoder.mid.attn_1(decoder.mid.block_1(h)))
    for level in reversed(decoder.up):
        for block in level.block:
            h = resnet(block, h, rows)
        if hasattr(level, "upsample"):
            h = up(level.upsample, h, rows)
    return normed(decoder.norm_out, decoder.conv_out, h, rows)


def encode(autoencoder: AutoEncoder, image: Tensor, rows: int = ROWS) -> Tensor:
    """As `autoencoder.encode` without sampling: image (B, 3, 8h, 8w) in [-1, 1] -> latents (B, 16, h, w)."""
    config, encoder = autoencoder.config, autoencoder.encoder
    h = convolved(encoder.conv_in, image, rows)
    for level in encoder.down:
        for block in level.block:
            h = resnet(block, h, rows)
        if hasattr(level, "downsample"):
            h = down(level.downsample, h, rows)
    h = encoder.mid.block_2(encoder.mid.attn_1(encoder.mid.block_1(h)))
    z = normed(encoder.norm_out, encoder.conv_out, h, rows).chunk(2, dim=1)[0]
    return config.scale_factor * (z - config.shift_factor)


def resnet(block: ResnetBlock, x: Tensor, rows: int) -> Tensor:
    """May write into x."""
    h = normed(block.norm1, block.conv1, x, rows)
    if hasattr(block, "nin_shortcut"):
        x = block.nin_shortcut(x)
    return normed(block.norm2, block.conv2, h, rows, onto=x)


def normed(norm: nn.GroupNorm, conv: nn.Conv2d, x: Tensor, rows: int, onto: Tensor | None = None) -> Tensor:
    """conv(silu(norm(x))), or that added to `onto` in place."""
    grouped = x.unflatten(1, (norm.num_groups, -1))
    variance, mean = torch.var_mean(grouped.float(), dim=(2, 3, 4), correction=0)          # (B, G)
    scale = torch.rsqrt(variance + norm.eps).repeat_interleave(grouped.shape[2], dim=1) * norm.weight.float()
    shift = norm.bias.float() - mean.repeat_interleave(grouped.shape[2], dim=1) * scale    # (B, C)

    def activated(piece: Tensor) -> Tensor:
        return F.silu(torch.addcmul(shift[..., None, None], piece, scale[..., None, None]).to(x.dtype))
    return convolved(conv, x, rows, activated, onto)


def convolved(conv: nn.Conv2d, x: Tensor, rows: int, before=lambda piece: piece, onto: Tensor | None = None) -> Tensor:
    """A 3x3 convolution of before(x), zeros around it."""
    height = x.shape[2]
    out = x.new_empty(len(x), conv.out_channels, *x.shape[2:]) if onto is None else onto
    for start in range(0, height, rows):
        stop = min(start + rows, height)
        piece = before(x[:, :, max(start - 1, 0):min(stop + 1, height)])
        piece = F.pad(piece, (1, 1, int(start == 0), int(stop == height)))
        new = F.conv2d(piece, conv.weight, conv.bias)
        if onto is None:
            out[:, :, start:stop] = new
        else:
            out[:, :, start:stop] += new
    return out


def up(layer: Upsample, x: Tensor, rows: int) -> Tensor:
    """Twice the edges; a strip of the output needs half as many rows, and one more on each side."""
    height, conv = 2 * x.shape[2], layer.conv
    out = x.new_empty(len(x), conv.out_channels, height, 2 * x.shape[3])
    rows += rows % 2
    for start in range(0, height, rows):
        stop = min(start + rows, height)
        first, last = max(start // 2 - 1, 0), min(stop // 2 + 1, height // 2)
        piece = F.interpolate(x[:, :, first:last], scale_factor=2.0, mode="nearest")
        piece = piece[:, :, max(start - 1, 0) - 2 * first:min(stop + 1, height) - 2 * first]
        out[:, :, start:stop] = F.conv2d(F.pad(piece, (1, 1, int(start == 0), int(stop == height))), conv.weight, conv.bias)
    return out


def down(layer: Downsample, x: Tensor, rows: int) -> Tensor:
    """Half the edges; zeros on the right and at the bottom only."""
    height, conv = x.shape[2] // 2, layer.conv
    out = x.new_empty(len(x), conv.out_channels, height, x.shape[3] // 2)
    for start in range(0, height, rows):
        stop = min(start + rows, height)
        piece = F.pad(x[:, :, 2 * start:min(2 * stop + 1, x.shape[2])], (0, 1, 0, int(stop == height)))
        out[:, :, start:stop] = F.conv2d(piece, conv.weight, conv.bias, stride=2)
    return out
