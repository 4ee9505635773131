"""Differential training (arXiv 2412.12888): what "after" has beyond "before", as a LoRA.

    1. Delta_1 learns the pictures before, on the frozen base: an anchor for what these pictures are.
    2. Delta_2 learns the pictures after, on base and Delta_1, both frozen. What is left to learn is the difference.
    3. Delta_2 is kept, without its anchor; those of several groups of pairs are averaged, exactly, and recompressed.

    z_s = (1 - s) z + s eps,   loss = w(s) |v(z_s, s, P) - (eps - z)|^2

Ablations: `paired_noise` needs no anchor, since with the same s and eps the target changes by d = z - z'; `plain` learns
the pictures after as any LoRA would. Read `flux/flow.py` and `flux/artaug/pairs.py` first.
"""

import json
import math
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from flux import conditioning, draws, flow, latents, lora_names, parallel
from flux.artaug.drawing import Artist
from flux.artaug.pairs import digest
from flux.errors import UserError
from flux.resume import _write
from lora import algebra, inject, io
from lora.adapter import Adapter, LowRank

LEARNING = ("method", "grouping", "group", "learn_steps", "learn_batch", "lr", "rank", "target_layers", "weighting", "seed")
GRID = 1000  # times
TEST_EVERY, TEST_NOISES, TEST_TIMES, TEST_PAIRS = 50, 4, (0.9, 0.7, 0.5), 4
LEARNED = 0.15  # relative error of the one-step reconstruction at which a stage ends
PATIENCE, WORTH = 3, 0.98  # tests without an improvement of 2 % end a stage too


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


@dataclass
class Stage:
    """What a training gave: the LoRA, its losses, and (step, error) of its overfit tests; why it ended."""

    adapter: Adapter
    losses: list[float] = field(default_factory=list)
    tests: list[tuple[int, float]] = field(default_factory=list)
    end: str = ""

    @property
    def failed(self) -> bool:
        """It reconstructs its own pictures no better than before it began."""
        return len(self.tests) > 1 and not self.tests[-1][1] < self.tests[0][1]


class Student:
    """The artist's transformer, learning from latents (N, 16, h, w) under prompts."""

    def __init__(self, artist: Artist, settings, key: tuple):
        self.artist, self.settings, self.key = artist, settings, key
        self.network = artist.transformer

    def condition(self, prompts: Sequence[str]) -> conditioning.Condition:
        cond = self.artist.condition(prompts)
        return conditioning.condition(cond.txt.clone(), cond.vec.clone(), *self.artist.size, self.artist.guidance)

    @contextmanager
    def wearing(self, anchor: Adapter | None):
        """Frozen, beside what is learned."""
        if anchor is None:
            yield
            return
        self.artist.loras.attach("anchor", anchor)
        try:
            yield
        finally:
            self.artist.loras.detach("anchor")

    def learn(self, name: str, z: Tensor, prompts: Sequence[str], anchor: Adapter | None = None,
              after: Tensor | None = None) -> Stage:
        """A fresh LoRA on z; on the pairs (z, after) by the paired loss if `after` is given."""
        s = self.settings
        z, after = (x if x is None else latents.pack(x).to(self.artist.place) for x in (z, after))
        torch.manual_seed(draws.seed_of(*self.key, name))
        with self.wearing(anchor), inject.training(self.network, s.target_layers, s.rank) as pairs:
            parameters = [p for pair in pairs.values() for p in (pair.A, pair.B)]
            optimiser = torch.optim.AdamW(parameters, lr=s.lr, weight_decay=0.0)
            stage = Stage(Adapter(), tests=[(0, self.reconstruction(z if after is None else after, prompts))])
            for step in range(s.learn_steps):
                generator = draws.generator(*self.key, name, step)
                some = self.batch(len(z), step, name)
                sigma = times()[torch.randint(GRID, (len(some),), generator=generator)].to(z.device)
                eps = torch.randn(z[some].shape, generator=generator).to(z.device)
                velocity = conditioning.velocity(self.network, self.condition([prompts[i] for i in some]))
                if after is None:
                    losses = loss(velocity, z[some], eps, sigma, s.weighting)
                else:
                    losses = paired_loss(velocity, without(pairs, velocity), z[some], after[some], eps, sigma, s.weighting)
                losses.mean().backward()
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
                stage.losses.append(losses.mean().item())
                if not math.isfinite(stage.losses[-1]):
                    raise UserError(f"{name}: the loss is {stage.losses[-1]} at step {step}, expected a finite one; lower "
                                    "--lr")
                if (step + 1) % TEST_EVERY == 0:
                    stage.tests.append((step + 1, self.reconstruction(z if after is None else after, prompts)))
                    if ended := ends([error for _, error in stage.tests]):
                        stage.end = ended
                        break
            stage.adapter = Adapter({layer: (LowRank(pair.A.detach().cpu(), pair.B.detach().cpu(), pair.scale),)
                                     for layer, pair in pairs.items()})
        return stage

    def batch(self, count: int, step: int, name: str) -> list[int]:
        """Which pairs: all of them once, in another order each time."""
        size = min(self.settings.learn_batch, count)
        epoch, at = divmod(step, count // size)
        order = draws.rng(*self.key, name, "order", epoch).permutation(count)
        return order[at * size:(at + 1) * size].tolist()

    @torch.no_grad()
    def reconstruction(self, z: Tensor, prompts: Sequence[str]) -> float:
        """Mean |z_s - s v - z| / |z| of up to four pictures, at fixed noises and times: how well they are known by heart."""
        z, prompts = z[:TEST_PAIRS], prompts[:TEST_PAIRS]
        velocity, errors = conditioning.velocity(self.network, self.condition(prompts)), []
        for i in range(TEST_NOISES):
            eps = torch.randn(z.shape, generator=draws.generator("overfit test", i)).to(z.device)
            for time in TEST_TIMES:
                sigma = torch.full((len(z),), time, device=z.device)
                noisy = flow.interpolate(z, eps, sigma)
                error = noisy - time * velocity(noisy, sigma).float() - z
                errors.append(error.flatten(1).norm(dim=1) / z.flatten(1).norm(dim=1))
        return torch.cat(errors).mean().item()


def without(pairs, velocity: flow.Velocity) -> flow.Velocity:
    """The same velocity with the learned LoRA switched off."""
    def v(img: Tensor, t: Tensor) -> Tensor:
        for pair in pairs.values():
            pair.strength = 0.0
        try:
            return velocity(img, t)
        finally:
            for pair in pairs.values():
                pair.strength = 1.0
    return v


def ends(errors: Sequence[float]) -> str:
    """Why a stage with these tests is over, "" if it is not. The first test stands before any step."""
    if len(errors) > 1 and errors[-1] < LEARNED:
        return f"known by heart: error {errors[-1]:.3f}"
    if len(errors) > PATIENCE + 1 and min(errors[-PATIENCE:]) > WORTH * min(errors[:-PATIENCE]):
        return f"no better for {PATIENCE} tests: error {errors[-1]:.3f}"
    return ""


# --- groups, and what becomes of them ---

def groups(count: int, settings) -> list[range]:
    size = {"per_pair": 1, "joint": count, "groups": settings.group}[settings.grouping]
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


def differences(artist: Artist, settings, folder: Path, pairs: tuple[list[dict], Tensor, Tensor], key: tuple
                ) -> list[Adapter]:
    """Delta_2 of every group, each trained once and kept in the folder; groups are shared out over processes."""
    rows, before, after = pairs
    prompts, team = [row["prompt"] for row in rows], parallel.join()
    artist.read(prompts)
    folder.mkdir(parents=True, exist_ok=True)
    names, parts = lora_names.names(artist.preset), groups(len(rows), settings)
    learned = {name: value for name, value in vars(settings).items() if name in LEARNING}
    made_from = digest([learned, key, [row["sha256"] for row in rows], sorted(artist.files.items())])
    with team.together():
        for k, part in tqdm(list(enumerate(parts))[team.rank::team.size], desc=settings.method, disable=None):
            path = folder / f"group-{k:03d}.safetensors"
            if not path.exists() or json.loads(path.with_suffix(".json").read_text())["key"] != made_from:
                student, said = Student(artist, settings, (*key, settings.method, k)), [prompts[i] for i in part]
                train_group(student, path, before[part.start:part.stop], after[part.start:part.stop], said, names,
                            made_from)
    team.wait()
    found = []
    for k in range(len(parts)):
        told = json.loads((folder / f"group-{k:03d}.json").read_text())
        if not told["left_out"]:
            found.append(io.read(folder / f"group-{k:03d}.safetensors", names)[0]["flux"])
    return found


def train_group(student: Student, path: Path, before: Tensor, after: Tensor, prompts: list[str], names,
                key: str) -> None:
    """Both stages of one group, into one file, and beside it what they told."""
    method, anchor = student.settings.method, None
    if method == "two_stage":
        anchor = student.learn("anchor", before, prompts)
        stage = student.learn("difference", after, prompts, anchor.adapter)
    elif method == "paired_noise":
        stage = student.learn("difference", before, prompts, after=after)
    else:
        stage = student.learn("difference", after, prompts)
    told = {"key": key, "left_out": bool(anchor and anchor.failed), "stages": {
        name: {"loss": [round(x, 5) for x in each.losses[::10]], "overfit test": each.tests, "end": each.end}
        for name, each in (("anchor", anchor), ("difference", stage)) if each}}
    if anchor and student.settings.keep_anchor:
        io.write(path.with_name(f"{path.stem}_anchor.safetensors"), {"flux": anchor.adapter}, names)
    path.unlink(missing_ok=True)
    _write(path.with_suffix(".json"), json.dumps(told, indent=1))
    io.write(path, {"flux": stage.adapter}, names)


def average(adapters: Sequence[Adapter], rank: int) -> tuple[Adapter, float]:
    """The exact mean, recompressed to `rank`; and the least share of a layer's energy that is left."""
    if not adapters:
        raise UserError("no group of pairs passed its first stage, expected one at least; raise --learn-steps or lower --lr")
    with torch.inference_mode(False), torch.no_grad():
        small, kept = algebra.recompressed(algebra.averaged(adapters), rank)
    return small, min(each.energy for each in kept.values())
