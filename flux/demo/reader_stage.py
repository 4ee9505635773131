"""The reader of the demo world (`reader.py`): a classifier of rendered pictures, for judging what LoRAs draw."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from flux import checkpoint, draws, weights
from flux.config import DEMO
from flux.demo import reader
from flux.demo import scene as world
from flux.demo.autoencoder_stage import to_image
from flux.demo.pair_stage import half
from flux.settings import Training


@dataclass(frozen=True)
class TrainReader(Training):
    """The classifier that tells style, shape, colours and place of pictures with one object."""

    steps: int = 7000
    lr: float = 2e-3
    batch: int = 32
    warmup: int = 50
    schedule: Literal["constant", "cosine"] = "cosine"
    ema: float = 0.998
    scenes: int = 30_000        # pictures made once, half of them given back by the autoencoder
    warm: bool = False          # begin with the shipped weights; another --seed makes other pictures
    sample_every: int = 0

    def task(self):
        return ReaderTask(self)


class ReaderTask:
    def __init__(self, settings: TrainReader):
        self.settings = settings
        torch.manual_seed(draws.seed_of(settings.seed, "reader"))
        self.model = reader.Reader()
        if settings.warm:
            self.model.load_state_dict(reader.load().state_dict())
        self.image, self.labels = pictures_of_styles(settings.scenes, False, settings.seed)

    def trainable(self) -> nn.Module:
        return self.model

    def batch(self, step: int, micro: int) -> tuple[Tensor, Tensor]:
        rng = draws.rng(self.settings.seed, "reader", step, micro)
        rows = torch.from_numpy(rng.choice(len(self.image), self.settings.batch))
        image = self.image[rows].float() / 127.5 - 1
        return worn(image, draws.generator(self.settings.seed, "worn", step, micro)), self.labels[rows]

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.model.loss(*batch)

    def preview(self) -> None:
        return None

    def save(self, folder: Path) -> None:
        about = {"config": str(self.settings)}
        checkpoint.save(weights.DEMO / "reader.safetensors", half(self.model.state_dict()), about)
        reader.load.cache_clear()
        print(*accuracy(), sep="\n")


@torch.inference_mode()
def pictures_of_styles(count: int, held_out: bool, seed: int) -> tuple[Tensor, Tensor]:
    """(N, 3, 128, 128) uint8 of scenes with one object, a ninth in each style and one without; labels (N, 5)."""
    autoencoder = weights.load_autoencoder(weights.find(DEMO), DEMO.autoencoder, torch.float32)
    images, labels = [], []
    for start in tqdm(range(0, count, 32), desc="pictures", disable=None):
        rng = draws.rng(seed, "reader's scenes", str(held_out), start)
        scenes = [world.sample_scene(rng, held_out, 1, shapes(rng), str(rng.choice(("", *world.STYLES)))) for _ in range(32)]
        image = to_image(np.stack([world.render(scene)[0] for scene in scenes]))
        if start // 32 % 2:
            image = autoencoder.decode(autoencoder.encode(image))
        images.append((image.clamp(-1, 1) * 127.5 + 127.5).round().byte())
        labels += [reader.labels_of(scene) for scene in scenes]
    return torch.cat(images)[:count], torch.tensor(labels)[:count]


def shapes(rng: np.random.Generator) -> tuple[str, ...]:
    return world.NEW_SHAPES if rng.random() < 0.3 else world.SHAPES


def worn(image: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures moved by up to 6 pixels, outlines bent by about one, a little blurred, tinted and noisy: what a sampler draws
    is never clean."""
    def share() -> float:
        return torch.rand((), generator=generator).item()

    dy, dx = (int(share() * 13) - 6 for _ in range(2))
    image = F.pad(image, (6, 6, 6, 6), mode="replicate")[:, :, 6 + dy:134 + dy, 6 + dx:134 + dx]
    image = bent(image, 1.5 * share(), generator)
    if share() < 0.3:
        image = image + (0.3 + 0.7 * share()) * (F.avg_pool2d(image, 3, 1, 1, count_include_pad=False) - image)
    image = image * (0.95 + 0.1 * share()) + 0.06 * (torch.rand(3, 1, 1, generator=generator) - 0.5)
    return image + 0.06 * share() * torch.randn(image.shape, generator=generator)


def bent(image: Tensor, pixels: float, generator: torch.Generator) -> Tensor:
    """image (B, 3, H, W), its points moved smoothly, each of 9 x 9 by a draw of that deviation."""
    count, _, height, width = image.shape
    moved = torch.randn(count, 2, 9, 9, generator=generator) * (2 * pixels / width)
    moved = F.interpolate(moved, (height, width), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    still = F.affine_grid(torch.eye(2, 3).expand(count, 2, 3), list(image.shape), align_corners=False)
    return F.grid_sample(image, still + moved, padding_mode="border", align_corners=False)


def accuracy(count: int = 900) -> list[str]:
    """Lines of a table: on held-out combinations of colours and shapes, with each style and all together."""
    image, labels = pictures_of_styles(count, True, 1)
    found = reader.read(image.permute(0, 2, 3, 1).numpy())
    chosen = torch.tensor([[words.index(getattr(one, name)) for name, words in reader.WORDS.items()] for one in found])
    right = chosen == labels
    lines = ["| renders | all right | " + " | ".join(reader.WORDS) + " |", "|---" * (2 + len(reader.WORDS)) + "|"]
    for i, style in enumerate((*reader.WORDS["style"], "all")):
        rows = labels[:, 0] == i if style != "all" else torch.ones(len(labels), dtype=torch.bool)
        shares = [right[rows].all(1), *right[rows].T]
        lines.append(f"| {style or 'no style'} | " + " | ".join(f"{100 * s.float().mean():.1f} %" for s in shares) + " |")
    return lines
