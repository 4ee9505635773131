"""What LucidFlux reaches on pictures that are degraded and restored: against the clean ones, by measures of a picture alone
where their weights are given, and on the demo's held-out scenes by the referee.

`right` is the referee's word that shapes, colours and places are those of the scene; the strong half are the pictures
whose degraded input is farthest from the clean one.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from flux import clip_iqa, data, degradation, device, draws, iqa, niqe, pictures, quality, restore
from flux.config import DEMO, preset
from flux.demo import referee
from flux.demo import scene as world
from flux.errors import UserError

ABLATIONS = {"no proxy branch": {"strengths": (1.0, 0.0)}, "no branch for the picture itself": {"strengths": (0.0, 1.0)},
             "modulation at its mean": {"modulated": False}, "no image tokens": {"tokens": False}}
CEILING = 60.0  # dB that equal pictures count as in a mean
Pixels = np.ndarray  # (H, W, 3) in 0 .. 255


@dataclass(frozen=True)
class Evaluate:
    """PSNR, SSIM and more of input, SwinIR, fidelity from 0 to 1, ablations: on held-out scenes of the demo, or --data."""

    count: int = 100  # degraded pictures; a quarter as many clean ones
    seed: int = 1  # of scenes, degradations and noise
    steps: int | None = None  # Euler steps; default: the model's own
    batch: int = 10  # pictures that are restored together; changes no figure
    scale: int = 4  # times that low-quality pictures are smaller in between
    model: str = "demo"  # demo or dev
    weights: Path | None = None  # folder with the weights; default: for demo those that ship
    data: Path | None = None  # folder of clean pictures, whose middle is taken; default: the demo's scenes
    lpips: tuple[Path, ...] = ()  # torchvision's alexnet and lpips' alex.pth: LPIPS gets a column
    niqe: Path | None = None  # parameters of NIQE, of python -m flux.niqe or as published in .npz: NIQE gets a column
    clip: Path | None = None  # folder of openai/clip-vit-large-patch14: CLIP-IQA gets a column
    out: Path = Path("out")  # folder for the table and the sheet
    ablations: bool = True  # measure them too

    def __post_init__(self):
        if self.count < 1 or self.batch < 1 or (self.steps is not None and self.steps < 1):
            raise UserError(f"--count {self.count} --batch {self.batch} --steps {self.steps}: expected 1 or more of each")
        if self.model != "demo" and not self.data:
            raise UserError(f"--data is missing, expected a folder of clean pictures for {self.model}; add --data FOLDER")

    def run(self) -> None:
        model, (place, dtype) = preset(self.model), device.choose()
        measures = self.measures()
        networks = restore.load(model, *restore.find(model, self.weights, {}), dtype, place)
        config = networks.config
        how = restore.How(self.steps or config.steps, config.guidance, tile=model.width, seed=self.seed)
        scenes, clean, recipes = self.scenes(self.count, degradation.Degradation(self.scale, clean=0))
        lq = [degradation.apply(image, steps) for image, steps in zip(clean, recipes, strict=True)]
        rows = {"input": as_pixels(lq), "SwinIR": as_pixels(self.proxies(networks, lq))}
        settings = {f"fidelity {share:g}": {"fidelity": share} for share in (0, 0.25, 0.5, 0.75, 1)}
        for name, change in {**settings, **(ABLATIONS if self.ablations else {})}.items():
            rows[name] = as_pixels(self.restored(networks, lq, replace(how, **change), name))
        targets = as_pixels(clean)
        decibels = {name: [quality.of_pixels(quality.psnr, a, b) for a, b in zip(found, targets, strict=True)]
                    for name, found in rows.items()}
        right = {name: [verdict(pixels, scene) for pixels, scene in zip(found, scenes, strict=True)]
                 for name, found in rows.items()} if scenes else {}
        strong = np.array(decibels["input"]) <= np.median(decibels["input"])
        headings = [f"{len(lq)} {'held-out scenes' if scenes else 'pictures'}", "PSNR", *measures,
                    *(["right", "right, strong half"] if scenes else [])]
        lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
        for name, found in rows.items():
            cells = [f"{np.mean(np.minimum(decibels[name], CEILING)):.2f} dB"]
            cells += [f"{np.mean([measure(a, b) for a, b in zip(found, targets, strict=True)]):.3f}"
                      for measure in measures.values()]
            cells += [f"{np.mean(right[name]):.0%}", f"{np.mean(np.array(right[name])[strong]):.0%}"] if scenes else []
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines += ["", *self.of_clean(networks, how), "", *per_degradation(recipes, decibels, right)]
        self.out.mkdir(parents=True, exist_ok=True)
        text = "\n".join(lines) + "\n"
        (self.out / "lucidflux.md").write_text(text)
        print(text)
        names = ("input", "SwinIR", "fidelity 0", "fidelity 1")
        shown = np.flatnonzero(strong)[:8].tolist()
        pils = [Image.fromarray(found[i]) for found in (*(rows[name] for name in names), targets) for i in shown]
        captions = [f"{name}{' [wrong]' if scenes and not right[name][i] else ''}" for name in names for i in shown]
        captions += ["clean"] * len(shown)
        pictures.write_png(self.out / "lucidflux.png", pictures.contact_sheet(pils, len(shown), captions), None)
        print(self.out / "lucidflux.png")

    def measures(self) -> dict[str, Callable[[Pixels, Pixels], float]]:
        """Columns beside PSNR: of a picture, and of the clean one where a measure compares."""
        found = {"SSIM": lambda a, b: quality.of_pixels(quality.ssim, iqa.gray(a), iqa.gray(b))}
        if lpips := quality.load_lpips(self.lpips):
            found["LPIPS"] = lambda a, b: quality.of_pixels(lambda x, y: lpips(x.float(), y.float()), a, b)
        if self.niqe:
            good = niqe.load(self.niqe)
            found["NIQE"] = lambda a, _: good.score(Image.fromarray(a))
        if self.clip:
            judge = clip_iqa.load(self.clip)
            found["CLIP-IQA"] = lambda a, _: judge(Image.fromarray(a))
        return found

    def scenes(self, count: int, kind: degradation.Degradation
               ) -> tuple[list[world.Scene], list[Tensor], list[list[dict]]]:
        """Scenes, none of --data; the clean pictures; how each is degraded."""
        if self.data:
            if not self.data.is_dir() or not (items := data.folder(self.data)):
                raise UserError(f"--data {self.data} holds no pictures, expected a folder of clean ones; name another")
            edge = (preset(self.model).width,) * 2
            clean = [degradation.to_unit(ImageOps.fit(pictures.read(item.path), edge, Image.Resampling.BICUBIC))
                     for item in items[:count]]
            return [], clean, [degradation.recipe(draws.rng("lucidflux trial", self.seed, i), kind)
                               for i in range(len(clean))]
        rngs = [draws.rng("lucidflux trial", self.seed, i) for i in range(count)]
        scenes = [world.sample_scene(rng, held_out=True) for rng in rngs]
        clean = [degradation.to_unit(Image.fromarray(world.render(scene, DEMO.width)[0])) for scene in scenes]
        return scenes, clean, [degradation.recipe(rng, kind) for rng in rngs]

    def batches(self, images: list[Tensor], name: str) -> Iterator[Tensor]:
        for start in tqdm(range(0, len(images), self.batch), desc=name, disable=None):
            yield 2 * torch.stack(images[start:start + self.batch]) - 1

    def restored(self, networks: restore.Networks, lq: list[Tensor], how: restore.How, name: str) -> list[Tensor]:
        return [(image + 1) / 2 for batch in self.batches(lq, name)
                for image in restore.restore(networks, batch, how)[0].cpu()]

    @torch.inference_mode()
    def proxies(self, networks: restore.Networks, lq: list[Tensor]) -> list[Tensor]:
        return [(image + 1) / 2 for batch in self.batches(lq, "SwinIR") for image in restore.proxy(networks.swinir, batch)]

    @torch.inference_mode()
    def of_clean(self, networks: restore.Networks, how: restore.How) -> list[str]:
        """Pictures that lack nothing should come back as they are, but for the autoencoder."""
        _, clean, _ = self.scenes(max(self.count // 4, 1), degradation.PUBLISHED)
        tried = {"the autoencoder alone": [image for batch in self.batches(clean, "round trip") for image in
                                           (networks.autoencoder.decode(networks.autoencoder.encode(batch)) + 1) / 2],
                 "SwinIR": self.proxies(networks, clean)}
        for share in (0, 1):
            tried[f"fidelity {share}"] = self.restored(networks, clean, replace(how, fidelity=share), "clean")
        lines = [f"| {len(clean)} clean inputs | PSNR |", "|---|---|"]
        for name, found in tried.items():
            decibels = [quality.of_pixels(quality.psnr, a, b)
                        for a, b in zip(as_pixels(found), as_pixels(clean), strict=True)]
            lines.append(f"| {name} | {np.mean(np.minimum(decibels, CEILING)):.2f} dB |")
        return lines


def as_pixels(images: list[Tensor]) -> list[np.ndarray]:
    return [np.asarray(degradation.to_picture(image.clamp(0, 1))) for image in images]


def verdict(pixels: np.ndarray, scene: world.Scene) -> bool:
    return referee.judge(pixels, world.sample_caption(scene, draws.rng("asked"), full=True).asked).right


def per_degradation(recipes: list[list[dict]], decibels: dict[str, list[float]], right: dict[str, list[bool]]) -> list[str]:
    """By what a recipe has in it; one picture counts wherever it belongs."""
    def has(*ops):
        return [any(step["op"] in ops for step in steps) for steps in recipes]
    small = [min(step["to"] for step in steps if step["op"] == "resize") < 1 / 8 for steps in recipes]
    kinds = {"motion": has("motion"), "defocus": has("defocus"), "low light": has("dim"), "WebP": has("webp"),
             "photon noise": has("poisson"), "ringing": has("sinc"), "an eighth of the size or less on the way": small}
    names = ("input", "SwinIR", "fidelity 0", "fidelity 1")
    what = "PSNR, right" if right else "PSNR"
    lines = [f"| degradation | pictures | {' | '.join(f'{name}: {what}' for name in names)} |", "|---" * 6 + "|"]
    for kind, members in kinds.items():
        rows = np.flatnonzero(members)
        if len(rows):
            cells = [f"{np.mean([min(decibels[name][i], CEILING) for i in rows]):.1f} dB"
                     + (f", {np.mean([right[name][i] for i in rows]):.0%}" if right else "") for name in names]
            lines.append(f"| {kind} | {len(rows)} | {' | '.join(cells)} |")
    return lines
