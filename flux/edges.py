"""Pictures reflected at their edges, as far as one likes: torch's own reflection ends where the picture does."""

import torch
from torch import Tensor


def mirrored(length: int, start: int, stop: int) -> Tensor:
    """Indices that go on beyond 0 .. length - 1 as in a mirror, the edge once: 2 1 | 0 1 2 | 1 0 1 2 ..."""
    at = torch.arange(start, stop) % max(2 * length - 2, 1)
    return torch.minimum(at, (2 * length - 2 - at).clamp(min=0)) if length > 1 else torch.zeros_like(at)


def reflected(x: Tensor, pad: int) -> Tensor:
    """x (..., H, W) with `pad` cells more on every side."""
    height, width = x.shape[-2:]
    return x[..., mirrored(height, -pad, height + pad), :][..., mirrored(width, -pad, width + pad)]


def filled(x: Tensor, step: int) -> Tensor:
    """x (..., H, W), longer on the right and at the bottom, until both edges are multiples of `step`."""
    height, width = x.shape[-2:]
    return x[..., mirrored(height, 0, -(-height // step) * step), :][..., mirrored(width, 0, -(-width // step) * step)]
