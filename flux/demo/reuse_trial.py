"""What first-block caching (`flux/reuse.py`) saves in the demo world and what it costs, beside simply taking fewer steps."""

import time
from collections import defaultdict
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from flux import conditioning, draws, flow, latents, pictures, weights
from flux.conditioning import Condition
from flux.config import DEMO
from flux.demo import referee
from flux.demo import scene as world
from flux.errors import UserError
from flux.model import Flux
from flux.reuse import Reusing


@dataclass(frozen=True)
class JudgeReuse:
    """Time, error and the referee's verdict of --reuse at rising thresholds, and of fewer steps; nothing is written."""

    thresholds: tuple[float, ...] = ()  # of --reuse; default 0, 0.05, 0.1, 0.2, 0.3, 0.5
    fewer: tuple[int, ...] = ()  # Euler steps to set beside them; default 16, 12, 10, 8, 6
    count: int = 50             # captions with one object, and as many with two
    batch: int = 4              # pictures together; each decides for itself what it reuses
    steps: int = DEMO.steps     # Euler steps of the reusing trajectories and of what all are compared with
    guidance: float = DEMO.guidance  # distilled guidance
    seed: int = 1               # of captions and noise
    threads: int | None = None  # CPU threads; default: as many as PyTorch chooses

    def __post_init__(self):
        if min(self.count, self.batch, self.steps, *self.fewer) < 1:
            raise UserError("--count, --batch, --steps and --fewer: expected 1 or more; change what is below")

    @torch.inference_mode()
    def run(self) -> None:
        if self.threads:
            torch.set_num_threads(self.threads)
        place, found, tokens = torch.device("cpu"), weights.find(DEMO), DEMO.width * DEMO.height // 256
        encoders = conditioning.TextEncoders(found, DEMO, torch.float32, place)
        model = weights.load_flux(found, DEMO.flux, torch.float32).eval()
        autoencoder = weights.load_autoencoder(found, DEMO.autoencoder, torch.float32)
        ways = {f"{self.steps} steps": (self.steps, None)}
        ways |= {f"--reuse {x:g}": (self.steps, x) for x in self.thresholds or (0.0, 0.05, 0.1, 0.2, 0.3, 0.5)}
        ways |= {f"--steps {steps}": (steps, None) for steps in self.fewer or (16, 12, 10, 8, 6)}
        ratios, errors, shares, right = (defaultdict(list) for _ in range(4))

        captions = self.captions()
        for start in tqdm(range(0, len(captions), self.batch), desc="batches", disable=None):
            some = captions[start:start + self.batch]
            txt, vec = encoders([caption.text for caption in some])
            cond = conditioning.condition(txt, vec, DEMO.width, DEMO.height, self.guidance)
            noise = [latents.noise(1, DEMO.height, DEMO.width, draws.generator("reuse", self.seed, start + i))
                     for i in range(len(some))]
            noise, whole = latents.pack(torch.cat(noise)), None
            if start == 0:
                draw(model, cond, noise, [1.0, 0.5, 0.0], None)  # warms up
            for way, (steps, threshold) in ways.items():
                img, seconds, full = draw(model, cond, noise, flow.schedule(steps, tokens), threshold)
                whole = whole or (img, seconds)
                ratios[way].append(seconds / whole[1])
                errors[way] += ((img - whole[0]).flatten(1).norm(dim=1) / whole[0].flatten(1).norm(dim=1)).tolist()
                shares[way].append(full / (self.steps * len(some)))
                pils = pictures.to_pil(autoencoder.decode(latents.unpack(img, DEMO.height, DEMO.width)))
                right[way] += [referee.judge(np.asarray(pil), caption.asked).right
                               for pil, caption in zip(pils, some, strict=True)]
        print(f"| {len(captions)} captions, {torch.get_num_threads()} threads | full steps | time | error | right |",
              "|---|---|---|---|---|", sep="\n")
        for way, times in ratios.items():
            print(f"| `{way}` | {np.mean(shares[way]):.0%} | {median(times):.2f} ({min(times):.2f}-{max(times):.2f}) | "
                  f"{median(errors[way]):.3f} | {np.mean(right[way]):.0%} |")

    def captions(self) -> list[world.Caption]:
        """Of held-out scenes, one object and two in turn."""
        rng = draws.rng("reuse", self.seed)
        return [world.sample_caption(world.sample_scene(rng, held_out=True, things=things), rng)
                for _ in range(self.count) for things in (1, 2)]


def draw(model: Flux, cond: Condition, noise: Tensor, times: list[float], threshold: float | None
         ) -> tuple[Tensor, float, int]:
    """Final tokens (B, L_img, 64), seconds, and how many full passes of one picture they took."""
    network = model if threshold is None else Reusing(model, threshold)
    start = time.perf_counter()
    img = flow.euler(conditioning.velocity(network, cond), noise, times)
    seconds = time.perf_counter() - start
    return img, seconds, (len(times) - 1) * len(img) if threshold is None else network.full
