"""From noise to tokens and back: the packing of latents, and the coordinates of tokens. All exact."""

import math

import torch
from einops import rearrange
from torch import Tensor

from flux.errors import UserError


def check_size(width: int, height: int) -> None:
    """Pictures have edges in multiples of 16 pixels: 8 per latent cell, 2 cells per token."""
    for name, edge in (("width", width), ("height", height)):
        if edge <= 0 or edge % 16:
            near = max(16, round(edge / 16) * 16)
            raise UserError(f"{name} {edge}: expected a positive multiple of 16 pixels; take {near}")


def noise(count: int, height: int, width: int, generator: torch.Generator, channels: int = 16) -> Tensor:
    """Standard normal latents (count, 16, 2*ceil(height/16), 2*ceil(width/16)), float32, drawn where the generator lives."""
    shape = (count, channels, 2 * math.ceil(height / 16), 2 * math.ceil(width / 16))
    return torch.randn(shape, generator=generator, device=generator.device)


def pack(latents: Tensor) -> Tensor:
    """(B, 16, h, w) latents -> (B, h/2 * w/2, 64) tokens, one per 2x2 patch, channel-major."""
    return rearrange(latents, "b c (h ph) (w pw) -> b (h w) (c ph pw)", ph=2, pw=2)


def unpack(img: Tensor, height: int, width: int) -> Tensor:
    """(B, L_img, 64) tokens of a height x width picture (pixels, rounded up to 16) -> (B, 16, h, w) latents."""
    h, w = math.ceil(height / 16), math.ceil(width / 16)
    return rearrange(img, "b (h w) (c ph pw) -> b c (h ph) (w pw)", h=h, w=w, ph=2, pw=2)


def image_ids(h: int, w: int, frame: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """Coordinates (1, h/2 * w/2, 3) of the tokens of an h x w latent: frame, row, column; float32, exact to 2^24."""
    rows, columns = torch.arange(h // 2, device=device), torch.arange(w // 2, device=device)
    frames = torch.tensor([frame], device=device)
    return torch.cartesian_prod(frames, rows, columns).float()[None]


def text_ids(length: int, device: torch.device | str = "cpu") -> Tensor:
    """Coordinates (1, length, 3) of text tokens: all zero, so they never rotate."""
    return torch.zeros(1, length, 3, device=device)
