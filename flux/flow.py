"""Rectified flow (arXiv 2209.03003, 2403.03206): the straight path, its loss, the schedule, Euler's method.

x_t = (1 - t) x_0 + t eps, so the velocity dx/dt is eps - x_0. **t = 1 is noise, t = 0 the image.** Sampling integrates a
velocity and training regresses one; how it comes about (text, Fill, regions, restoration) is of no concern here.
"""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]  # (img (B, L, 64), t (B,)) -> v (B, L, 64)


def interpolate(x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x0, eps (B, ...), t (B,) in [0, 1] -> x_t (B, ...)."""
    t = t.view(-1, *[1] * (x0.ndim - 1))
    return (1 - t) * x0 + t * eps


def loss(velocity: Velocity, x0: Tensor, eps: Tensor, t: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean squared error per sample (B,) of the velocity at x_t, in float32; zero for the true one. weight, of the shape of
    x0: how much each number counts; each sample counts the same."""
    v = velocity(interpolate(x0, eps, t).to(x0.dtype), t)
    error = (v.float() - (eps - x0).float()).square().flatten(1)
    return error.mean(1) if weight is None else (error * weight.flatten(1)).sum(1) / weight.flatten(1).sum(1)


def mu(tokens: int, base_shift: float = 0.5, max_shift: float = 1.15) -> float:
    """Logarithm of the shift for a picture of so many tokens: the line through (256, 0.5) and (4096, 1.15)."""
    slope = (max_shift - base_shift) / (4096 - 256)
    return base_shift + slope * (tokens - 256)


def shift_time(t: float, mu: float) -> float:
    """Move t in [0, 1] towards noise: e^mu / (e^mu + 1/t - 1); 0 and 1 stay."""
    return math.exp(mu) / (math.exp(mu) + (1 / t - 1)) if t > 0 else 0.0


def schedule(steps: int, tokens: int, shift: bool = True, base_shift: float = 0.5, max_shift: float = 1.15) -> list[float]:
    """steps + 1 times from 1 to 0, evenly spaced, then shifted by the number of image tokens (schnell: unshifted)."""
    times = [1 - i / steps for i in range(steps + 1)]
    return [shift_time(t, mu(tokens, base_shift, max_shift)) for t in times] if shift else times


def remaining(times: list[float], strength: float) -> list[float]:
    """The end of a schedule from its time nearest to `strength` in [0, 1]: all of it for 1, only the image's 0.0 for 0."""
    return times[min(range(len(times)), key=lambda i: abs(times[i] - strength)):]


def draw_t(count: int, generator: torch.Generator, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Logit-normal times (count,): sigmoid(mean + std * n). mean = mu(tokens) matches the shift that sampling uses."""
    return torch.sigmoid(mean + std * torch.randn(count, generator=generator))


def draw_sampled_t(count: int, generator: torch.Generator, mu: float) -> Tensor:
    """Times (count,) as densely as `schedule` with that mu visits them, one in each of `count` equal shares of the path.

    A logit-normal draw almost never comes near t = 1, where a sampler spends its first steps and settles what goes where.
    """
    even = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return torch.sigmoid(torch.logit(even, eps=1e-6) + mu)


def euler_steps(velocity: Velocity, img: Tensor, times: list[float]) -> Iterator[Tensor]:
    """The state after each step; for progress, previews, and changes on the way."""
    for t, t_next in pairwise(times):
        img = img + (t_next - t) * velocity(img, torch.full((img.shape[0],), t, dtype=img.dtype, device=img.device))
        yield img


def euler(velocity: Velocity, img: Tensor, times: list[float]) -> Tensor:
    """Integrate the velocity over `times` from img (B, L, 64)."""
    for state in euler_steps(velocity, img, times):
        img = state
    return img
