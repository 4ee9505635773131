"""What a LoRA may learn from pairs of pictures: the losses of the ways in `flux/artaug/differential.py`, and their tests.

A lesson gives the losses of some rows (B,) and a test, smaller the more is known, that says when a stage is over.

    pictures:   z_s = (1 - s) z + s eps,                     loss = w(s) |v(z_s, s, P) - (eps - z)|^2
    regional:   h = (1 - t) ((1 - u) z + u z') + t eps,      loss = |v(h, t, P) - v_R(h, t)|^2

v_R is the blend of the regions' velocities (`flux/regions.py`), t one of the sampler's times. It is the distillation of
guidance (arXiv 2210.03142) with regions in guidance's place. u in [0, 1] puts states between the pictures before and after:
a LoRA that has learned half of the way is there when it draws, and must know how to go on (arXiv 1011.0686).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flux import draws, flow

GRID = 1000  # times
TEST_EVERY, TEST_NOISES, TEST_TIMES, TEST_PAIRS = 50, 4, (0.9, 0.7, 0.5), 4
LEARNED = 0.15  # relative error of the one-step reconstruction at which a stage ends
PATIENCE, WORTH = 3, 0.98  # tests without an improvement of 2 % end a stage too
Without = Callable[[flow.Velocity], flow.Velocity]  # the same with the LoRA in training switched off


def times() -> Tensor:
    """The (1000,) noise levels that training draws from: 3u / (1 + 2u) for u from 1 down to 0.003 / 1.002."""
    u = torch.linspace(1, 0.003 / 1.002, GRID)
    return 3 * u / (1 + 2 * u)


def weights_of(sigma: Tensor, how: str = "bell") -> Tensor:
    """Of noise levels (n,) out of `times()`: exp(-2 ((1000 s - 500) / 1000)^2) less its minimum, scaled to mean 1."""
    if how == "none":
        return torch.ones_like(sigma)
    def bell(s):
        return torch.exp(-2 * ((1000 * s - 500) / 1000) ** 2)
    every = bell(times())
    return (bell(sigma) - every.min()) / (every - every.min()).mean()


def loss(velocity: flow.Velocity, z: Tensor, eps: Tensor, sigma: Tensor, how: str = "bell") -> Tensor:
    """z, eps (B, L, 64), sigma (B,) -> (B,)."""
    return weights_of(sigma.cpu(), how).to(sigma) * flow.loss(velocity, z, eps, sigma)


def paired_loss(velocity: flow.Velocity, base: flow.Velocity, z: Tensor, after: Tensor, eps: Tensor, sigma: Tensor,
                how: str = "bell") -> Tensor:
    """|v(z_s) - sg[v_base(z_s)] - (z - z')|^2, per pair: how far the target moves when z is replaced by z'."""
    noisy = flow.interpolate(z, eps, sigma)
    with torch.no_grad():
        target = base(noisy, sigma) + z - after
    return weights_of(sigma.cpu(), how).to(sigma) * (velocity(noisy, sigma) - target).square().flatten(1).mean(1)


def velocity_loss(velocity: flow.Velocity, taught: flow.Velocity, img: Tensor, t: Tensor) -> Tensor:
    """|v(h) - v_R(h)|^2 at states h (B, L, 64) and times (B,), per pair; zero where both are the same."""
    with torch.no_grad():
        target = taught(img, t)
    return (velocity(img, t) - target).float().square().flatten(1).mean(1)


# --- lessons ---

@dataclass
class Pictures:
    """Latents (N, L, 64) to be known by heart; beside those `before`, what they have beyond these."""

    z: Tensor
    weighting: str = "bell"
    before: Tensor | None = None

    def losses(self, velocity: flow.Velocity, without: Without, some: list[int], generator: torch.Generator) -> Tensor:
        sigma = times()[torch.randint(GRID, (len(some),), generator=generator)].to(self.z.device)
        eps = torch.randn(self.z[some].shape, generator=generator).to(self.z.device)
        if self.before is None:
            return loss(velocity, self.z[some], eps, sigma, self.weighting)
        return paired_loss(velocity, without(velocity), self.before[some], self.z[some], eps, sigma, self.weighting)

    def test(self, velocity: flow.Velocity, without: Without, some: list[int]) -> float:
        """Mean |z_s - s v - z| / |z| at fixed noises and times."""
        z, errors = self.z[some], []
        for i in range(TEST_NOISES):
            eps = torch.randn(z.shape, generator=draws.generator("overfit test", i)).to(z.device)
            for time in TEST_TIMES:
                sigma = torch.full((len(z),), time, device=z.device)
                noisy = flow.interpolate(z, eps, sigma)
                error = noisy - time * velocity(noisy, sigma).float() - z
                errors.append(error.flatten(1).norm(dim=1) / z.flatten(1).norm(dim=1))
        return torch.cat(errors).mean().item()

    def rate(self, done: float) -> float:
        """Share of the learning rate when that share of the steps is done: constant, as published."""
        return 1.0

    def ends(self, errors: Sequence[float]) -> str:
        """Why a stage with these tests is over, "" if it is not. The first test stands before any step."""
        if len(errors) > 1 and errors[-1] < LEARNED:
            return f"known by heart: error {errors[-1]:.3f}"
        if len(errors) > PATIENCE + 1 and min(errors[-PATIENCE:]) > WORTH * min(errors[:-PATIENCE]):
            return f"no better for {PATIENCE} tests: error {errors[-1]:.3f}"
        return ""


@dataclass
class Regional:
    """The velocity that drew the latents `after` from the noise of those `before`, both (N, L, 64), by plans of regions."""

    before: Tensor
    after: Tensor
    times: Tensor  # of the sampler's steps
    taught: Callable[[list[int]], flow.Velocity]  # rows -> that velocity

    def losses(self, velocity: flow.Velocity, without: Without, some: list[int], generator: torch.Generator) -> Tensor:
        t = self.times[torch.randint(len(self.times), (len(some),), generator=generator)].to(self.after)
        share = torch.rand(len(some), 1, 1, generator=generator).to(self.after)
        eps = torch.randn(self.after[some].shape, generator=generator).to(self.after)
        img = flow.interpolate(torch.lerp(self.before[some], self.after[some], share), eps, t)
        return velocity_loss(velocity, without(self.taught(some)), img, t)

    def test(self, velocity: flow.Velocity, without: Without, some: list[int]) -> float:
        """Which share of the change of the velocity is missing, at fixed states; 1 before any step."""
        def distance(v: flow.Velocity) -> Tensor:
            return sum(self.losses(v, without, some, draws.generator("velocity test", i)).sum() for i in range(TEST_NOISES))
        return (distance(velocity) / distance(without(velocity)).clamp(min=1e-12)).sqrt().item()

    def rate(self, done: float) -> float:
        """A half cosine: half a way to another light is what no prompt asks for, so the end must be exact."""
        return 0.5 * (1 + math.cos(math.pi * done))

    def ends(self, errors: Sequence[float]) -> str:
        """Never before its last step: there is nothing to know by heart."""
        return ""
