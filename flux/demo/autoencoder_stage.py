"""First stage of the demo world: the autoencoder, on rendered scenes of every style."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from flux import checkpoint, draws, pictures, weights
from flux.autoencoder import AutoEncoder
from flux.config import DEMO
from flux.demo import scene as world
from flux.settings import Training


def to_image(pixels: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


@dataclass(frozen=True)
class TrainAutoencoder(Training):
    """The autoencoder, on scenes of every style: L1 on pixels and their edges, with latents kept smooth."""

    steps: int = 16_000
    lr: float = 2e-3
    batch: int = 8
    warmup: int = 50
    schedule: Literal["constant", "cosine"] = "cosine"
    ema: float = 0.995
    styled: float = 0.15        # share of scenes in a style
    kl: float = 3e-4            # weight of the posterior's divergence from N(0, 1), per latent number
    crops: float = 0.95         # share of the steps that see 64 x 64 pixels: four times cheaper, and as instructive
    noise: float = 0.04         # added to the latents, in their deviations: a sampler never hits them exactly
    coarse: float = 0.1         # share of batches decoded from halved latents, which must give the halved picture

    def task(self):
        return AutoencoderTask(self)


class AutoencoderTask:
    """Smooth latents are what a small flow model learns fast: noise (KL) and scale equivariance (arXiv 2502.09509)."""

    ahead = True  # rendering

    def __init__(self, settings: TrainAutoencoder):
        self.settings = settings
        torch.manual_seed(draws.seed_of(settings.seed, "autoencoder"))
        self.model = AutoEncoder(DEMO.autoencoder).to(memory_format=torch.channels_last)
        for layer in self.model.modules():
            if isinstance(layer, nn.Conv2d):  # unit gain: torch's default fades a picture away over this depth
                nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)
        for name, layer in self.model.named_modules():
            if name.endswith(("conv2", "proj_out")):  # residual branches begin small: the picture passes at once
                layer.weight.data *= 0.1
        self.model.encoder.conv_out.bias.data[DEMO.autoencoder.z_channels:] = -5.0  # begin with little posterior noise

    def trainable(self) -> nn.Module:
        return self.model

    def scenes(self, *key, count: int, held_out: bool = False) -> tuple[Tensor, list[world.Scene]]:
        """Some have new shapes or a style: the base model never sees those, but the autoencoder carries the LoRAs too."""
        rng = draws.rng(self.settings.seed, *key)
        scenes = []
        for _ in range(count):
            shapes = world.SHAPES + world.NEW_SHAPES if rng.random() < 0.3 else world.SHAPES
            style = str(rng.choice(world.STYLES)) if rng.random() < self.settings.styled else ""
            scenes.append(world.sample_scene(rng, held_out, shapes=shapes, style=style))
        return to_image(np.stack([world.render(scene)[0] for scene in scenes])), scenes

    def batch(self, step: int, micro: int):
        image, scenes = self.scenes("pixels", step, micro, count=self.settings.batch)
        if step < self.settings.crops * self.settings.steps:
            rng = draws.rng(self.settings.seed, "crop", step, micro)
            image = torch.stack([around(picture, scene.things[rng.integers(len(scene.things))], rng)
                                 for picture, scene in zip(image, scenes, strict=True)])
        coarse = draws.rng(self.settings.seed, "coarse", step, micro).random() < self.settings.coarse
        generator = draws.generator(self.settings.seed, "posterior", step, micro)
        return image.to(memory_format=torch.channels_last), coarse, generator

    def loss(self, batch) -> Tensor:
        image, coarse, generator = batch
        mean, log_variance = self.model.moments(image)
        log_variance = log_variance.clamp(-12, 4)
        z = mean + torch.exp(0.5 * log_variance) * torch.randn(mean.shape, generator=generator)
        z = z + self.settings.noise * mean.detach().std() * torch.randn(mean.shape, generator=generator)
        if coarse:
            z, image = F.avg_pool2d(z, 2), F.avg_pool2d(image, 2)
        out = self.model.decoder(z)
        difference = out - image
        edges = difference.diff(dim=2).abs().mean() + difference.diff(dim=3).abs().mean()
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return difference.abs().mean() + edges + self.settings.kl * divergence

    def preview(self) -> Image.Image:
        image, _ = self.scenes("preview", count=16)
        mean, _ = self.model.moments(image)
        out = self.model.decoder(mean)
        error = (out.clamp(-1, 1) - image).square().mean().item()
        captions = [f"PSNR {10 * np.log10(4 / error):.1f} dB"] + [""] * 31
        return pictures.contact_sheet(pictures.to_pil(image) + pictures.to_pil(out), 8, captions)

    @torch.inference_mode()
    def save(self, folder: Path) -> None:
        """Fold the latents' size into the weights: unit variance under the config's scale 1 and shift 0.

        One factor for all channels: the quiet ones stay quiet, and the flow need not learn their noise.
        """
        means = [self.model.moments(self.scenes("size", i, count=32)[0])[0] for i in range(16)]
        size = torch.cat(means).square().mean().sqrt()
        z = DEMO.autoencoder.z_channels
        out = self.model.encoder.conv_out
        out.weight[:z] /= size
        out.bias[:z] /= size
        out.bias[z:] -= 2 * size.log()  # the log-variance
        self.model.decoder.conv_in.weight *= size
        checkpoint.save(weights.DEMO / "ae.safetensors", self.model.state_dict(),
                        {"config": str(self.settings), "latents": f"divided by {size.item():.4f}, folded in"})


def around(picture: Tensor, thing: world.Thing, rng: np.random.Generator, edge: int = 64) -> Tensor:
    """A crop (3, edge, edge) with an object near its middle: edges and corners are what there is to learn."""
    height, width = picture.shape[1:]
    y, x = (int(np.clip(at * size - edge / 2 + rng.integers(-edge // 4, edge // 4 + 1), 0, size - edge))
            for at, size in ((thing.y, height), (thing.x, width)))
    return picture[:, y:y + edge, x:x + edge]
