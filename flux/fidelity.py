"""One number between what a generator finds likely and what the picture says: 0 restores as released, 1 stays close.

Two means, which grow together. The trajectory starts from the proxy on its way to noise, not from noise alone, so that
less is left to be invented (SDEdit, arXiv 2108.01073). And at each step the low frequencies of the picture that the
velocity points to are led to the proxy's (as ILVR, arXiv 2108.02938, does for its reference).
"""

import torch
from torch import Tensor

from flux import flow, latents, wavelet
from flux.flow import Velocity

LATEST = 0.8  # share of the way that fidelity 1 leaves out: with more the demo's PSNR falls again
BEND = 2.5  # fidelities between leave out less than their share
LEVELS = 2  # of wavelet.low, on latents of 8 pixels: what is larger than about 32


def first(fidelity: float) -> float:
    """The time at which a trajectory begins."""
    return 1 - LATEST * fidelity**BEND


def times(schedule: list[float], fidelity: float) -> list[float]:
    """The part of a schedule from 1 to 0 that is left; its first time falls with fidelity, whatever the steps."""
    start = first(fidelity)
    return [start, *(t for t in schedule if t < start)]


def begin(anchor: Tensor, noise: Tensor, fidelity: float) -> Tensor:
    """anchor, the proxy's tokens, and noise (B, L, 64) -> where the trajectory starts."""
    return noise if not fidelity else flow.interpolate(anchor, noise, noise.new_full((len(noise),), first(fidelity)))


def tied(velocity: Velocity, anchor: Tensor, height: int, width: int, fidelity: float) -> Velocity:
    """x_0 = x_t - t v is where a velocity points to; its low frequencies, by that share, become the anchor's.

    height, width in pixels. At fidelity 0 the velocity itself.
    """
    if not fidelity:
        return velocity
    want = wavelet.low(latents.unpack(anchor, height, width).float(), LEVELS)

    def v(img: Tensor, t: Tensor) -> Tensor:
        plain, at = velocity(img, t), t.view(-1, 1, 1)
        found = wavelet.low(latents.unpack(img - at * plain, height, width).float(), LEVELS)
        return plain - fidelity * (latents.pack(want - found) / at).to(plain)
    return v


def guided(full: Velocity, without: Velocity, scale: float) -> Velocity:
    """Away from what the transformer draws without image tokens; scale 1 is `full` alone, at half the cost."""
    if scale == 1:
        return full

    def v(img: Tensor, t: Tensor) -> Tensor:
        plain = without(img, t)
        return torch.lerp(plain, full(img, t), scale)
    return v
