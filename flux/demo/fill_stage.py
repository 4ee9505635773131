"""The Fill model of the demo world: the shipped transformer, with a first layer that also takes a picture with a hole and
the mask of the hole (`flux/fill.py`), and a LoRA on every linear layer. Both are written as one LoRA file, which
`flux/adapters.py` merges where `--model demo-fill` is asked for.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from flux import cli, conditioning, draws, fill, flow, latents, lora_names, pictures, weights
from flux.config import DEMO, DEMO_FILL
from flux.demo import scene as world
from flux.demo.autoencoder_stage import to_image
from flux.settings import Training
from lora import inject, io
from lora.adapter import Adapter, Bias, Dense, LowRank
from lora.metadata import about


@dataclass(frozen=True)
class TrainFill(Training):
    """The demo's Fill model: a wider first layer and a LoRA, on scenes of which a part is hidden."""

    steps: int = 3600
    lr: float = 1.5e-3
    batch: int = 24
    warmup: int = 50
    schedule: Literal["constant", "cosine"] = "cosine"
    ema: float = 0.995
    dtype: Literal["fp32", "bf16"] = "bf16"
    rank: int = 32              # of the LoRA
    scenes: int = 12_000        # pictures with a hole whose latents are made once; their captions vary at every visit
    known: float = 0.2          # weight of what is not hidden in the loss: the sampler leads that by itself
    drop: float = 0.1           # share of captions left empty

    def task(self):
        return FillTask(self)


class FillTask:
    def __init__(self, settings: TrainFill):
        self.settings = settings
        found = weights.find(DEMO)
        self.encoders = conditioning.TextEncoders(found, DEMO, torch.float32, torch.device("cpu"))
        self.autoencoder = weights.load_autoencoder(found, DEMO.autoencoder, torch.float32)
        self.model = weights.load_flux(found, DEMO.flux, torch.float32)
        torch.manual_seed(draws.seed_of(settings.seed, "fill"))
        pairs = inject.add_trained(self.model, "blocks", settings.rank)
        self.pairs = nn.ModuleDict({layer.replace(".", "/"): pair for layer, pair in pairs.items()})
        self.before = self.model.img_in
        self.model.img_in = widened(self.before, DEMO_FILL.flux.in_channels)
        self.scenes = [world.sample_scene(draws.rng(settings.seed, "hidden scene", i)) for i in range(settings.scenes)]
        shown = [self.latents_of(self.scenes[start:start + 32], draws.rng(settings.seed, "holes", start))
                 for start in tqdm(range(0, len(self.scenes), 32), desc="latents", disable=None)]
        self.x0, self.known, self.masks = (torch.cat(parts) for parts in zip(*shown, strict=True))
        self.mu = flow.mu(self.x0.shape[1])

    @torch.inference_mode()
    def latents_of(self, scenes: list[world.Scene], rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, 64, 64) of the pictures, the same of the pictures with a hole, and the masks (B, 1, 128, 128) uint8."""
        image = to_image(np.stack([world.render(scene)[0] for scene in scenes]))
        mask = torch.from_numpy(np.stack([hole(scene, rng) for scene in scenes]))[:, None]
        known = self.autoencoder.encode(fill.masked(image, mask))
        return latents.pack(self.autoencoder.encode(image)), latents.pack(known), mask.byte()

    def trainable(self) -> nn.Module:
        return self.model

    def batch(self, step: int, micro: int):
        rng = draws.rng(self.settings.seed, "fill", step, micro)
        rows = rng.choice(len(self.scenes), self.settings.batch)
        captions = [world.sample_caption(self.scenes[i], rng).text for i in rows]
        captions = [caption if rng.random() >= self.settings.drop else "" for caption in captions]
        generator = draws.generator(self.settings.seed, "noise", step, micro)
        at = torch.from_numpy(rows)
        return self.noised(captions, self.x0[at], self.known[at], self.masks[at], generator)

    def held_out(self) -> list:
        batches = []
        for i in range(4):
            rng = draws.rng("held-out holes", i)
            scenes = [world.sample_scene(rng, held_out=True) for _ in range(24)]
            captions = [world.sample_caption(scene, rng).text for scene in scenes]
            shown = (part.clone() for part in self.latents_of(scenes, rng))
            batches.append(self.noised(captions, *shown, draws.generator("held-out holes", i)))
        return batches

    def noised(self, captions: list[str], x0: Tensor, known: Tensor, masks: Tensor, generator: torch.Generator):
        t = flow.draw_sampled_t(len(x0), generator, self.mu)
        hidden = latents.pack(F.avg_pool2d(masks.float(), 8).expand(-1, DEMO.autoencoder.z_channels, -1, -1))
        weight = torch.lerp(torch.tensor(self.settings.known), torch.tensor(1.0), hidden)
        return x0, torch.randn(x0.shape, generator=generator), t, weight, self.condition(captions, known, masks, 1.0)

    def condition(self, captions: list[str], known: Tensor, masks: Tensor, guidance: float) -> conditioning.Condition:
        """known (B, 64, 64), masks (B, 1, 128, 128); guidance 1 is the plain conditional velocity."""
        txt, vec = (part.clone() for part in self.encoders(captions))
        cond = conditioning.condition(txt, vec, DEMO.width, DEMO.height, guidance)
        return conditioning.with_channels(cond, torch.cat((known, fill.pack_mask(masks.float())), dim=-1))

    def loss(self, batch) -> Tensor:
        x0, eps, t, weight, cond = batch
        return flow.loss(conditioning.velocity(self.model, cond), x0, eps, t, weight)

    def preview(self) -> Image.Image:
        """Held-out scenes with their object hidden: what is given, and what is drawn."""
        rng, count = draws.rng("fill preview"), 8
        scenes = [world.sample_scene(rng, held_out=True, things=1) for _ in range(count)]
        captions = [world.sample_caption(scene, rng).text for scene in scenes]
        _, known, masks = self.latents_of(scenes, rng)
        noise = torch.cat([latents.noise(1, DEMO.height, DEMO.width, draws.generator("preview", i)) for i in range(count)])
        cond, img = self.condition(captions, known, masks, DEMO.guidance), latents.pack(noise)
        img = flow.euler(conditioning.velocity(self.model, cond), img, flow.schedule(DEMO.steps, img.shape[1], DEMO.shift))
        image = to_image(np.stack([world.render(scene)[0] for scene in scenes]))
        given = pictures.to_pil(fill.masked(image, masks.float()))
        drawn = pictures.to_pil(self.autoencoder.decode(latents.unpack(img, DEMO.height, DEMO.width)))
        return pictures.contact_sheet([*given, *drawn], count, [*captions, *captions])

    def save(self, folder: Path) -> None:
        """Beside the transformer that it was trained on, in bfloat16."""
        layers = {name.replace("/", "."): (LowRank(pair.A.detach().bfloat16(), pair.B.detach().bfloat16(), pair.scale),)
                  for name, pair in self.pairs.items()}
        change = self.model.img_in.weight.detach().clone()
        change[:, :self.before.in_features] -= self.before.weight
        bias = self.model.img_in.bias.detach() - self.before.bias
        adapter = Adapter({**layers, "img_in": (Dense(change.bfloat16()), Bias(bias.bfloat16()))})
        made = {"command": "python train.py demo fill", "config": cli.as_dict(self.settings)}
        fields = about(adapter, "demo-fill", "demo", made, {"flux": weights.DEMO / "flux.safetensors"})
        io.write(weights.DEMO / DEMO_FILL.adapter, {"flux": adapter}, lora_names.names(DEMO), metadata=fields)


def widened(layer: nn.Linear, columns: int) -> nn.Linear:
    """The same layer with more inputs, which change nothing yet."""
    wide = nn.Linear(columns, layer.out_features)
    wide.weight.data = F.pad(layer.weight.detach(), (0, columns - layer.in_features)).clone()
    wide.bias.data = layer.bias.detach().clone()
    return wide


def hole(scene: world.Scene, rng: np.random.Generator) -> np.ndarray:
    """What is hidden of a scene, (128, 128) float32 in 0 and 1: around an object, a box or an ellipse anywhere, a side."""
    mask = np.zeros((DEMO.height, DEMO.width), np.float32)
    kind = rng.choice(("object", "box", "ellipse", "side", "all"), p=(0.55, 0.15, 0.1, 0.15, 0.05))
    if kind == "object":
        for box in around(scene, rng):
            mask[box] = 1
    elif kind in ("box", "ellipse"):
        x, y = rng.uniform(0.15, 0.85, 2)
        a, b = rng.uniform(0.12, 0.4, 2)
        v, u = (np.mgrid[:DEMO.height, :DEMO.width] + 0.5) / DEMO.width
        u, v = abs(u - x) / a, abs(v - y) / b
        mask[(np.maximum(u, v) if kind == "box" else np.hypot(u, v)) < 1] = 1
    elif kind == "side":
        mask[:, :int(rng.uniform(0.2, 0.7) * DEMO.width)] = 1
        mask = np.rot90(mask, rng.integers(4)).copy()
    else:
        mask[:] = 1
    return mask


def around(scene: world.Scene, rng: np.random.Generator) -> Iterator[tuple[slice, slice]]:
    """Boxes 3 to 14 pixels larger than an object on each side; of two objects one, or now and then both."""
    boxes = world.boxes(world.render_masks(scene))
    if len(boxes) > 1 and rng.random() < 0.75:
        boxes = [boxes[rng.integers(len(boxes))]]
    for x0, y0, x1, y1 in boxes:
        x0, y0, x1, y1 = (round(edge * DEMO.width) for edge in (x0, y0, x1, y1))
        left, top, right, bottom = (int(pixels) for pixels in rng.integers(3, 15, 4))
        yield slice(max(y0 - top, 0), y1 + bottom), slice(max(x0 - left, 0), x1 + right)
