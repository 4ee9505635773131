"""Fill: what FLUX.1-Fill is given beside the noise, a picture with a hole and the mask of the hole (flux.md section 8.1).

A mask is 1 where the picture is repainted and 0 where it is known; values between are soft. Both are constant along a
trajectory and are joined to the noisy tokens on the channel axis.
"""

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from flux import latents
from flux.flow import Velocity


def masked(image: Tensor, mask: Tensor) -> Tensor:
    """image (B, 3, H, W) in [-1, 1], mask (B, 1, H, W) in [0, 1] -> what the autoencoder is shown: grey where hidden."""
    return image * (1 - mask)


def pack_mask(mask: Tensor) -> Tensor:
    """(B, 1, 16h, 16w) -> (B, h * w, 256) tokens: 8x8 pixels to channels first, then 2x2 of those, as latents are packed."""
    return rearrange(mask, "b 1 (h ph i) (w pw j) -> b (h w) (i j ph pw)", ph=2, pw=2, i=8, j=8)


def tokens(masked_latents: Tensor, mask: Tensor) -> Tensor:
    """Latents (B, 16, h, w) of the masked image, mask (B, 1, 8h, 8w) -> (B, L_img, 64 + 256)."""
    return torch.cat((latents.pack(masked_latents), pack_mask(mask).to(masked_latents.dtype)), dim=-1)


def held(velocity: Velocity, known: Tensor, true: Tensor) -> Velocity:
    """`known` latents (B, L_img, 64) bool go straight to where they come from, `true`, by v = (x_t - x_0) / t; elsewhere the
    velocity itself."""
    return lambda img, t: torch.where(known, (img - true) / t[:, None, None], velocity(img, t))


def outpaint(pil: Image.Image, mask: Image.Image, left: int, top: int, right: int, bottom: int):
    """Picture and mask (modes RGB and L) on a canvas that is so many pixels larger; the new area is to be repainted.

    The picture's edge goes on into it: the model is not shown that, but the latents of known pixels beside it see a little.
    """
    around = (top, bottom), (left, right)
    canvas = Image.fromarray(np.pad(np.asarray(pil), (*around, (0, 0)), mode="edge"))
    return canvas, Image.fromarray(np.pad(np.asarray(mask), around, constant_values=255))


def keep(drawn: Image.Image, known: Image.Image, mask: Image.Image) -> Image.Image:
    """`drawn` with the known pixels back in place: equal bytes where the mask is 0, a blend where it is soft."""
    return Image.composite(drawn, known, mask)
