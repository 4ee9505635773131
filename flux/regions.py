"""Regions of a picture with prompts of their own: the blend of velocities of ArtAug (arXiv 2412.12888, regional guidance).

    v = (v(P) + sum_i s_i M_i v(P_i)) / (1 + sum_i s_i M_i)

P is the picture's prompt; region i has a prompt P_i, a soft mask M_i in [0, 1] over the latents and a strength s_i. At
strength 1 both prompts count the same inside; at 100 the region all but follows its own. Read `flux/conditioning.py` first.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from flux import latents
from flux.conditioning import within
from flux.errors import UserError
from flux.flow import Velocity

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in fractions of the picture, y down


@dataclass(frozen=True)
class Region:
    box: Box
    prompt: str
    strength: float = 1.0


def read(words: Sequence[str]) -> tuple[Region, ...]:
    """Each "x0,y0,x1,y1: prompt" or "x0,y0,x1,y1 @ strength: prompt" of a flag."""
    regions = []
    for word in words:
        place, _, prompt = word.partition(":")
        place, at, strength = place.partition("@")
        try:
            box, strength = tuple(float(edge) for edge in place.split(",")), float(strength) if at else 1.0
        except ValueError:
            box = ()
        if len(box) != 4 or not prompt.strip():
            raise UserError(f"--region {word!r}: expected fractions of the picture and a prompt; write it as "
                            '--region "0,0,0.5,1: a red circle", with a strength as "0,0,0.5,1 @ 3: a red circle"')
        if not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
            raise UserError(f"--region {word!r}: expected x0,y0,x1,y1 from 0 to 1 with x0 < x1 and y0 < y1; the upper left "
                            "quarter is 0,0,0.5,0.5")
        if not 0 <= strength <= 1000:
            raise UserError(f"--region {word!r}: expected a strength from 0 to 1000, such as @ 3")
        regions.append(Region(box, prompt.strip(), strength))
    return tuple(regions)


# --- masks ---

def rectangle(box: Box, h: int, w: int) -> Tensor:
    """-> (h, w) latents, 1 in every cell that the box touches, in at least 2 x 2 of them."""
    rows, columns = _cells(box[1], box[3], h), _cells(box[0], box[2], w)
    mask = torch.zeros(h, w)
    mask[rows, columns] = 1
    return mask


def _cells(start: float, end: float, count: int) -> slice:
    first, last = math.floor(start * count + 1e-6), math.ceil(end * count - 1e-6)  # 0.55 * 20 is 11.000000000000002
    first = max(0, min(first, count - 2))
    return slice(first, max(last, first + 2))


def soften(mask: Tensor, sigma: float | None = None, kernel: int | None = None) -> Tensor:
    """Gaussian blur of (h, w) whose weights sum to 1, so that the inside of a region stays 1; edges are repeated.

    sigma in latent cells, by default 4 % of the shorter edge; the paper's code has 10, and a kernel of 33, at 128 x 128.
    """
    sigma = 0.04 * min(mask.shape) if sigma is None else sigma
    reach = (kernel or 2 * math.ceil(3 * sigma) + 1) // 2
    bell = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    bell = (bell / bell.sum()).to(mask)
    padded = F.pad(mask[None, None], (reach,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, bell.view(1, 1, 1, -1)), bell.view(1, 1, -1, 1))[0, 0].clamp(0, 1)


def weights(regions: Sequence[Region], width: int, height: int) -> Tensor:
    """s_i M_i of every region as (n, L, 64), laid out as the packed latents of a picture of width x height pixels."""
    masks = torch.stack([region.strength * soften(rectangle(region.box, height // 8, width // 8)) for region in regions])
    return latents.pack(masks[:, None].repeat(1, 16, 1, 1))


# --- the velocity ---

def blend(v: Tensor, local: Tensor, weights: Tensor) -> Tensor:
    """v (B, L, C), local (n, B, L, C), weights (n, L, C or 1), or (n, B, L, C) -> (B, L, C), summed in float32."""
    weights = (weights if weights.ndim == 4 else weights.unsqueeze(1)).to(v.device)  # (n, 1 or B, L, C)
    return ((v.float() + (weights * local).sum(0)) / (1 + weights.sum(0))).to(v.dtype)


def regional(together: Velocity, plain: Velocity, weights: Tensor, span: tuple[float, float] = (1.0, 0.0)) -> Velocity:
    """The blend in the steps of a `span`, the plain velocity in the others.

    together: the velocity of a batch n + 1 times as long, under the prompts and then under each region's.
    """
    def v(img: Tensor, t: Tensor) -> Tensor:
        if not within(t, span):
            return plain(img, t)
        times = len(weights) + 1
        whole, *local = together(img.repeat(times, 1, 1), t.repeat(times)).chunk(times)
        return blend(whole, torch.stack(local), weights)
    return v


def one_by_one(velocities: Sequence[Velocity]) -> Velocity:
    """The velocity of a batch of so many parts, one part after the other: the same in less memory."""
    def v(img: Tensor, t: Tensor) -> Tensor:
        count = len(velocities)
        return torch.cat([part(x, s) for part, x, s in zip(velocities, img.chunk(count), t.chunk(count), strict=True)])
    return v


def velocity(under: Callable[[list[str]], Velocity], prompts: list[str], regions: Sequence[Region], size: tuple[int, int],
             span: tuple[float, float] = (1.0, 0.0), batch: int = 4) -> Velocity:
    """Under one prompt per picture, and in all of them the same regions; without these, `under(prompts)` itself.

    size: width, height in pixels. Passes of a step go together where they are no more than `batch`.
    """
    return velocity_of_each(under, prompts, [regions] * len(prompts), size, span, batch)


def velocity_of_each(under: Callable[[list[str]], Velocity], prompts: list[str], plans: Sequence[Sequence[Region]],
                     size: tuple[int, int], span: tuple[float, float] = (1.0, 0.0), batch: int = 4) -> Velocity:
    """The same where each picture has regions of its own, as many as the others."""
    if not plans[0]:
        return under(prompts)
    parts = [prompts, *([region.prompt for region in areas] for areas in zip(*plans, strict=True))]
    words = [prompt for part in parts for prompt in part]
    together = under(words) if len(words) <= batch else one_by_one([under(part) for part in parts])
    each = torch.stack([weights(areas, *size) for areas in plans], dim=1)  # (n, B, L, 64)
    return regional(together, under(prompts), each, span)
