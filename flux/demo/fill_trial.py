"""What the demo's Fill model can do: hidden objects painted as asked, judged by the referee, and known pixels left alone."""

from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from flux import cli, draws, pictures, weights
from flux.config import DEMO_FILL
from flux.demo import referee
from flux.demo import scene as world
from flux.demo.autoencoder_stage import to_image
from flux.demo.fill_stage import around


@dataclass(frozen=True)
class JudgeFill:
    """Pictures with a hidden object, painted again as their caption asks, or as a caption of another object asks."""

    count: int = 100            # pictures of each kind
    guidance: float = DEMO_FILL.guidance  # distilled guidance
    steps: int = DEMO_FILL.steps  # Euler steps
    hold: bool = True           # as python sample.py has it
    seed: int = 1               # of scenes, captions, masks and noise
    out: Path = Path("out")     # folder for the before/after sheet

    def run(self) -> None:
        print("| | as asked | known pixels | by the autoencoder alone | with --keep, pixels that differ |", "|---" * 5 + "|",
              sep="\n")
        self.out.mkdir(parents=True, exist_ok=True)
        for name, other in (("the hidden object", False), ("another object in its place", True)):
            right, drawn, alone, differ, shown = self.trial(other)
            print(f"| {name}, {self.count} captions | {right:.0%} | {drawn:.1f} dB | {alone:.1f} dB | {differ} |")
            path = self.out / f"fill_{'other' if other else 'hidden'}.png"
            pils, words = zip(*shown[:24], strict=True)
            pictures.write_png(path, pictures.contact_sheet(pils, 6, words), None)
            print(path)

    def trial(self, other: bool) -> tuple[float, float, float, int, list[tuple[Image.Image, str]]]:
        """Share of right pictures; PSNR of known pixels as drawn and after the autoencoder's round trip; pixels that --keep
        changed; given and drawn pictures, each with its caption."""
        rng, marks, errors, differ, shown = draws.rng("fill trial", self.seed, int(other)), [], [], 0, []
        autoencoder = weights.load_autoencoder(weights.find(DEMO_FILL), DEMO_FILL.autoencoder, torch.float32)
        with TemporaryDirectory() as folder:
            image_path, mask_path = Path(folder) / "image.png", Path(folder) / "mask.png"
            for i in tqdm(range(self.count), desc="pictures", disable=None):
                scene = world.sample_scene(rng, held_out=True, things=1)
                asked = scene if not other else another(scene, rng)
                caption = world.sample_caption(asked, rng)
                pixels, mask = world.render(scene)[0], np.zeros((DEMO_FILL.height, DEMO_FILL.width), np.uint8)
                for box in around(scene, rng):
                    mask[box] = 255
                pictures.write_png(image_path, Image.fromarray(pixels), None)
                pictures.write_png(mask_path, Image.fromarray(mask), None)
                drawn, kept = (np.asarray(self.draw(caption.text, image_path, mask_path, i, keep)) for keep in (False, True))
                known = mask == 0
                image = to_image(pixels[None])
                with torch.inference_mode():
                    trip = np.asarray(pictures.to_pil(autoencoder.decode(autoencoder.encode(image)))[0])
                errors.append([np.square(found[known] / 255.0 - pixels[known] / 255.0).mean() for found in (drawn, trip)])
                differ += int((kept[known] != pixels[known]).any(-1).sum())
                marks.append(referee.judge(drawn, caption.asked).right)
                given = Image.fromarray(np.where(known[..., None], pixels, 127).astype(np.uint8))
                shown += [(given, "given"), (Image.fromarray(drawn), ("" if marks[-1] else "[wrong] ") + caption.text)]
        psnr = -10 * np.log10(np.array(errors)).mean(0)
        return float(np.mean(marks)), psnr[0], psnr[1], differ, shown

    def draw(self, prompt: str, image: Path, mask: Path, i: int, keep: bool) -> Image.Image:
        """By the command that a user types."""
        text_to_image = cli.recipes()["t2i"]
        command = cli.build(text_to_image, cli.describe(text_to_image).sample, {
            "model": "demo-fill", "prompt": (prompt,), "image": image, "mask": mask, "keep": keep, "hold": self.hold,
            "steps": self.steps, "guidance": self.guidance, "seed": draws.seed_of("fill trial", self.seed, i) % 2**31})
        return next(iter(command.images()))[0]


def another(scene: world.Scene, rng: np.random.Generator) -> world.Scene:
    """The same scene with another shape of another colour, as large and in the same place."""
    thing = scene.things[0]
    shape = str(rng.choice([name for name in world.SHAPES if name != thing.shape]))
    colour = str(rng.choice([name for name in world.COLOURS if name not in (thing.colour, scene.background)]))
    return replace(scene, things=(replace(thing, shape=shape, colour=colour),))
