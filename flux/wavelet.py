"""The colours of one picture, the detail of another: a wavelet split without subsampling (lucidflux.md section 6).

StableSR (arXiv 2305.07015, section 3.4) puts the low frequencies of its input under what a sampler drew.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = 5


def blurred(x: Tensor, dilation: int) -> Tensor:
    """x (B, C, H, W) by the binomial kernel [1 2 1; 2 4 2; 1 2 1] / 16, spread by `dilation`; edges are repeated."""
    kernel = torch.tensor([1.0, 2.0, 1.0], dtype=x.dtype, device=x.device) / 4
    x = F.pad(x, (dilation,) * 4, mode="replicate")
    for along, shape in ((2, (3, 1)), (3, (1, 3))):
        dilate = (dilation, 1) if along == 2 else (1, dilation)
        x = F.conv2d(x, kernel.view(1, 1, *shape).expand(x.shape[1], 1, *shape), dilation=dilate, groups=x.shape[1])
    return x


def low(x: Tensor, levels: int = LEVELS) -> Tensor:
    """x (B, C, H, W) without what is finer than about 2^levels cells."""
    for level in range(levels):
        x = blurred(x, 2**level)
    return x


def coloured_as(image: Tensor, reference: Tensor, levels: int = LEVELS) -> Tensor:
    """The detail of `image` on the low frequencies of `reference`; (B, 3, H, W) of any range, not clamped."""
    return image + low(reference - image, levels)
