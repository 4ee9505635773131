"""Training for LucidFlux (lucidflux.md section 9): SwinIR first, then the branches beside a frozen FLUX.

Low-quality pictures are made as they are needed (`flux/degradation.py`), each by its own recipe. Without --data the demo
world's scenes are degraded.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as computed_again

from flux import (
    checkpoint,
    conditioning,
    data,
    degradation,
    device,
    draws,
    flow,
    latents,
    lucid_files,
    lucidflux,
    pictures,
    quality,
    restore,
    weights,
)
from flux.config import preset
from flux.demo import scene as world
from flux.errors import UserError
from flux.settings import Training
from flux.swinir import Swinir

FINE = 1e-4  # mean squared error, of 40 dB, below which it matters less


@dataclass(frozen=True)
class Degrading(Training):
    """Settings of trainings that make low-quality pictures."""

    model: str = "demo"  # demo or dev
    weights: Path | None = None  # folder with the weights; without it FLUX_WEIGHTS, and for demo the shipped ones
    edge: int | None = None  # pixels of a crop's edge, a multiple of 64; default: the model's own size
    scale: int = 4  # times that low-quality pictures are smaller before they are enlarged again
    clean: float = 0.05  # share of pictures that are not degraded at all
    extra: bool = True  # motion, defocus, low light and WebP beside the published degradations
    sharpen: bool = True  # unsharp masking of the clean pictures of --data, as published; scenes are sharp
    pairs: int = 0  # demo: different pairs of pictures, which are kept; 0 makes new ones for ever

    def __post_init__(self):
        super().__post_init__()
        if self.edge is not None and (self.edge < restore.CELLS or self.edge % restore.CELLS):
            raise UserError(f"--edge {self.edge}: expected a multiple of {restore.CELLS} pixels, such as 512")
        if not 1 <= self.scale <= 16 or not 0 <= self.clean <= 1 or self.pairs < 0:
            raise UserError(f"--scale {self.scale} --clean {self.clean} --pairs {self.pairs}: expected a scale "
                            "from 1 to 16, a share from 0 to 1 and a count; change what is outside")

    @property
    def kind(self) -> degradation.Degradation:
        share = 1.0 if self.extra else 0.0
        own = degradation.Degradation()
        more = (share * x for x in (own.motion, own.defocus, own.dark, own.webp))
        return degradation.Degradation(self.scale, self.clean, *more)


@dataclass(frozen=True)
class TrainSwinir(Degrading):
    """SwinIR, which makes the proxy, trained for its PSNR, as NAFNet (arXiv 2204.04676): a decibel counts the same in every
    picture, however bad."""

    steps: int = 5000
    lr: float = 1e-3
    batch: int = 8
    schedule: Literal["constant", "cosine"] = "cosine"
    ema: float = 0.995
    clean: float = 0.1  # share of pictures that are not degraded at all
    swinir: Path | None = None  # file of SwinIR that stays as it is: only what says how much of the input to keep is trained

    def task(self):
        return SwinirTask(self)


@dataclass(frozen=True)
class TrainBranches(Degrading):
    """Branches, modulation and connector of LucidFlux; transformer, autoencoder, SwinIR and SigLIP stay as they are."""

    steps: int = 4000
    lr: float = 5e-4
    batch: int = 16
    schedule: Literal["constant", "cosine"] = "cosine"
    ema: float = 0.995
    gradient_checkpointing: bool = True  # keep only the inputs of blocks, the frozen ones too: less memory, slower
    guidance: float = 1.0  # distilled guidance the networks are told
    drop: float = 0.1  # share of batches without image tokens: what --token-guidance compares with
    times: Literal["flux_shift", "lucidflux_released", "early"] = "flux_shift"  # released: almost noise alone
    warm: bool = False  # begin with the released or shipped branches instead of the transformer's own blocks
    lucidflux: Path | None = None  # file of branches to begin with, for --warm
    swinir: Path | None = None  # file of SwinIR alone
    siglip: Path | None = None  # file or folder of the SigLIP2 vision tower alone
    prompt: Path | None = None  # file of the fixed prompt's embedding alone

    def task(self):
        return BranchesTask(self)


class Pairs:
    """Clean and low-quality pictures, each pair a function of its key alone."""

    def __init__(self, settings: Degrading, size: int):
        self.settings, self.size, self.kept = settings, settings.edge or size, {}
        self.items = data.load(settings.data, self.size) if settings.data else []
        if not self.items and settings.model != "demo":
            raise UserError(f"--data is missing, expected a folder of pictures for {settings.model}; add --data FOLDER")

    def keys(self, step: int, micro: int) -> list[tuple]:
        """Of a batch: from a key a pair can be made again."""
        seed, count = self.settings.seed, self.settings.batch
        if self.items:
            return [(str(self.items[i].path), step, micro, i) for i in self.drawn(step, micro)]
        if self.settings.pairs:
            rows = draws.rng(seed, "pairs", step, micro).integers(self.settings.pairs, size=count)
            return [(seed, "pair", int(i)) for i in rows]
        return [(seed, "pair", step, micro, i) for i in range(count)]

    def fixed(self, count: int) -> list[tuple]:
        """Keys of pictures to look at: of the demo's held-out scenes, or of --data."""
        names = [str(item.path) for item in self.items] or [""]
        return [(names[i % len(names)], "held out", i) for i in range(count)]

    def drawn(self, step: int, micro: int) -> list[int]:
        """Items of a batch: epochs in a shuffled order, whatever their shape, since crops are square."""
        settings, total = self.settings, len(self.items)
        first = (step * settings.accumulate + micro) * settings.batch
        return [int(draws.rng(settings.seed, "epoch", n // total).permutation(total)[n % total])
                for n in range(first, first + settings.batch)]

    def pair(self, key: tuple, held_out: bool = False) -> tuple[Tensor, Tensor]:
        """(clean, low quality), each (3, H, W) in [0, 1]."""
        if key not in self.kept:
            rng = draws.rng("held out" if held_out else "train", *(str(part).replace("/", "|") for part in key))
            clean = self.crop(self.items[key[-1] % len(self.items)], rng) if self.items else degradation.to_unit(
                Image.fromarray(world.render(world.sample_scene(rng, held_out=held_out), self.size)[0]))
            made = clean, degradation.apply(clean, degradation.recipe(rng, self.settings.kind))
            if not self.settings.pairs:
                return made
            self.kept[key] = tuple((x * 255).round().byte() for x in made)
        return tuple(x.float() / 255 for x in self.kept[key])

    def crop(self, item: data.Item, rng: np.random.Generator) -> Tensor:
        """A random square of the picture, perhaps mirrored; a smaller picture is enlarged to just hold it."""
        pil = pictures.read(item.path)
        if (short := min(pil.size)) < self.size:
            size = [max(self.size, round(edge * self.size / short)) for edge in pil.size]
            pil = pil.resize(size, Image.Resampling.BICUBIC)
        left, top = (int(rng.integers(edge - self.size + 1)) for edge in pil.size)
        image = degradation.to_unit(pil.crop((left, top, left + self.size, top + self.size)))
        image = image.flip(2) if rng.random() < 0.5 else image
        return degradation.sharpened(image) if self.settings.sharpen else image


def stacked(pairs: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """-> clean and low quality, each (B, 3, H, W) in [-1, 1]."""
    return tuple(2 * torch.stack(part) - 1 for part in zip(*pairs, strict=True))


def shown(rows: dict[str, Tensor], clean: Tensor) -> Image.Image:
    """A sheet, a row for each name, its first picture with the mean PSNR against the clean ones, which come last."""
    rows, captions, pils = {**rows, "clean": clean}, [], []
    targets = [np.asarray(pil) for pil in pictures.to_pil(clean)]
    for name, images in rows.items():
        found = pictures.to_pil(images)
        decibels = [quality.of_pixels(quality.psnr, np.asarray(a), b) for a, b in zip(found, targets, strict=True)]
        mean = np.minimum(decibels, 99).mean()
        captions += [name if name == "clean" else f"{name}, {mean:.1f} dB"] + [""] * (len(found) - 1)
        pils += found
    return pictures.contact_sheet(pils, len(clean), captions)


class SwinirTask:
    ahead = True  # degrading

    def __init__(self, settings: TrainSwinir):
        self.settings, self.preset = settings, preset(settings.model)
        config = restore.config_of(self.preset)
        if settings.swinir and not config.swinir.keeps:
            raise UserError(f"--swinir came with --model {settings.model}, whose SwinIR keeps nothing of its input, "
                            "expected --model demo; leave --swinir out")
        self.place, _ = device.choose(settings.device)
        self.pairs = Pairs(settings, self.preset.width)
        torch.manual_seed(draws.seed_of(settings.seed, "swinir"))
        self.model = Swinir(config.swinir).to(self.place)
        if settings.swinir:
            without = replace(config, swinir=replace(config.swinir, keeps=False))
            plain = lucid_files.load_swinir(settings.swinir, without, self.place)
            self.model.load_state_dict(self.model.state_dict() | plain.state_dict())
            self.model.requires_grad_(False).keep.requires_grad_(True)

    def trainable(self) -> nn.Module:
        return self.model

    def batch(self, step: int, micro: int):
        return stacked(self.pairs.pair(key) for key in self.pairs.keys(step, micro))

    def names(self, step: int, micro: int) -> list[str]:
        return [str(key) for key in self.pairs.keys(step, micro)]

    def held_out(self) -> list:
        return [] if self.pairs.items else [stacked(self.pairs.pair(key, True) for key in self.pairs.fixed(16))]

    def loss(self, batch) -> Tensor:
        clean, lq = ((x.to(self.place) + 1) / 2 for x in batch)
        made, kept = self.model.made(lq)  # judged by itself, too: else all is kept, and nothing learned
        found = (made,) if kept is None else (made, torch.lerp(made, lq, kept))
        return sum(((x - clean).square().flatten(1).mean(1) / FINE).log1p() for x in found)

    def preview(self) -> Image.Image:
        clean, lq = stacked(self.pairs.pair(key, True) for key in self.pairs.fixed(8))
        return shown({"input": lq, "SwinIR": self.model.restore(lq.to(self.place)).cpu()}, clean)

    def save(self, folder: Path) -> None:
        demo = self.settings.model == "demo" and not self.settings.data
        path = weights.DEMO / "swinir.safetensors" if demo else folder / "final.safetensors"
        state = {name: tensor.bfloat16() if demo else tensor for name, tensor in self.model.state_dict().items()}
        checkpoint.save(path, state, {"config": str(self.settings)})


class BranchesTask:
    ahead = True  # degrading

    def __init__(self, settings: TrainBranches):
        self.settings, self.preset = settings, preset(settings.model)
        self.config = restore.config_of(self.preset)
        self.place, _ = device.choose(settings.device)
        found = weights.find(self.preset, settings.weights)
        named = {name: getattr(settings, name) for name in lucid_files.FILES}
        places = lucid_files.find(self.preset, settings.weights, named)
        weights.require(found, "flux", "ae")
        self.pairs = Pairs(settings, self.preset.width)
        frozen = torch.bfloat16 if settings.dtype == "bf16" and self.place.type != "cpu" else torch.float32
        self.flux = weights.load_flux(found, self.preset.flux, frozen, self.place)
        self.autoencoder = weights.load_autoencoder(found, self.preset.autoencoder, torch.float32, self.place)
        self.swinir = lucid_files.load_swinir(places["swinir"].require(), self.config, self.place)
        self.siglip = lucid_files.load_siglip(places["siglip"].require(), self.config, frozen, self.place)
        self.prompt = lucid_files.load_prompt(places["prompt"], found, self.preset, self.config, frozen, self.place,
                                              places["lucidflux"].path or weights.DEMO / "lucidflux.safetensors")
        torch.manual_seed(draws.seed_of(settings.seed, "branches"))
        if settings.warm:
            transformer = weights.state_of(found, "flux")
            self.model = lucid_files.load_lucidflux(places["lucidflux"].require(), self.preset, self.config, torch.float32,
                                                    self.place, transformer)
        else:
            self.model = lucidflux.begun(self.flux, self.config).float()
        self.model.requires_grad_(True)
        for branch in (self.model.condition_lq, self.model.condition_ldr):  # always see the same prompt and guidance
            branch.vector_in.requires_grad_(False)
            if self.preset.flux.guidance_embed:
                branch.guidance_in.requires_grad_(False)
        for block in (*self.flux.double_blocks, *self.flux.single_blocks) if settings.gradient_checkpointing else ():
            block.forward = partial(computed_again, block.forward, use_reentrant=False)
        self.size = self.pairs.size
        self.kept = {}  # by the key of a pair: what the frozen networks say of it

    def trainable(self) -> nn.Module:
        return self.model

    def batch(self, step: int, micro: int):
        rng, generator = (make(self.settings.seed, "branches", step, micro) for make in (draws.rng, draws.generator))
        keys, tokens = self.pairs.keys(step, micro), (self.size // 16) ** 2
        t = lucidflux.draw_t(len(keys), generator, tokens, self.settings.times)
        return self.noised(self.looked_at(keys), t, rng.random() < self.settings.drop, generator)

    def names(self, step: int, micro: int) -> list[str]:
        return [str(key) for key in self.pairs.keys(step, micro)]

    def held_out(self) -> list:
        """Four pictures of the demo's held-out scenes at four times each."""
        if self.pairs.items:
            return []
        batches = []
        for i in range(4):
            keys = [key for key in self.pairs.fixed(16)[4 * i:4 * i + 4] for _ in range(4)]
            given = self.looked_at(keys, held_out=True)
            times = torch.tensor([0.2, 0.5, 0.8, 0.95]).repeat(4)
            batches.append(self.noised(given, times, False, draws.generator("held out", i)))
        return batches

    @torch.no_grad()
    def looked_at(self, keys: list[tuple], held_out: bool = False) -> tuple[Tensor, ...]:
        """x0 (B, L, 64), lq and pre (B, 3, H, W), seen (B, N, D), made of each picture alone."""
        rows = []
        for key in keys:
            if key in self.kept:
                rows.append(self.kept[key])
                continue
            clean, lq = (2 * x[None].to(self.place) - 1 for x in self.pairs.pair(key, held_out))
            pre = self.swinir.restore(lq)
            row = (latents.pack(self.autoencoder.encode(clean)), lq, pre, restore.seen(self.siglip, self.config, pre))
            if self.settings.pairs:
                row = self.kept[key] = tuple(x.half() for x in row)
            rows.append(row)
        return tuple(torch.cat(part).float() for part in zip(*rows, strict=True))

    def noised(self, given: tuple[Tensor, ...], t: Tensor, dropped: bool, generator: torch.Generator):
        eps = torch.randn(given[0].shape, generator=generator).to(self.place)
        return *given, eps, t.to(self.place), dropped

    def loss(self, batch) -> Tensor:
        x0, lq, pre, seen, eps, t, dropped = batch
        txt, vec = (x.float().expand(len(x0), *x.shape[1:]) for x in self.prompt)
        prompt = conditioning.condition(txt, vec, *[self.size] * 2, self.settings.guidance)
        given = lucidflux.given(self.model, prompt, lq, pre, seen)
        given = replace(given, tokens=given.tokens[:, :0]) if dropped else given
        return flow.loss(lucidflux.velocity(self.flux, self.model, given), x0, eps, t)

    def preview(self) -> Image.Image:
        clean, lq = stacked(self.pairs.pair(key, True) for key in self.pairs.fixed(8))
        networks = restore.Networks(self.preset, self.config, self.flux, self.model, self.autoencoder, self.swinir,
                                    self.siglip, self.prompt)
        how = restore.How(self.config.steps, self.config.guidance, tile=self.size)
        after, pre = (x.cpu() for x in restore.restore(networks, lq, how))
        return shown({"input": lq, "SwinIR": pre, "restored": after}, clean)

    def save(self, folder: Path) -> None:
        demo = self.settings.model == "demo" and not self.settings.data
        path = weights.DEMO / "lucidflux.safetensors" if demo else folder / "final.safetensors"
        lucid_files.save_lucidflux(path, self.model, self.flux.state_dict(), {"config": str(self.settings)})
