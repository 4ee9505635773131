"""What a LoRA does in the demo world: whether its style or object is there, and whether what the base knows was kept."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from flux import cli, draws, pictures
from flux.config import DEMO
from flux.demo import reader
from flux.demo import scene as world
from flux.demo.pool import entries
from flux.demo.reader import Reading
from flux.errors import UserError


@dataclass(frozen=True)
class JudgeLora:
    """A LoRA for the demo model at rising strengths, judged by the reader on captions that training never saw."""

    lora: Path | None = None    # the LoRA to judge
    style: str = ""             # the style it was taught, said in the captions
    shape: str = ""             # or the new shape, in place of the captions' own
    strengths: tuple[float, ...] = ()  # default 0, 0.25, 0.5, 0.75, 1, 1.25, 1.5
    count: int = 100            # pictures at each strength, with one object
    guidance: float = DEMO.guidance  # distilled guidance
    steps: int = DEMO.steps     # Euler steps
    seed: int = 1               # of captions and noise
    out: Path = Path("out")     # folder for the contact sheet

    def __post_init__(self):
        if self.lora is None:
            raise UserError("--lora is missing, expected the LoRA to judge; add --lora runs/lora/final.safetensors")
        for name, known in (("style", world.STYLES), ("shape", world.NEW_SHAPES)):
            if getattr(self, name) not in ("", *known):
                raise UserError(f"--{name} {getattr(self, name)}: expected one of {', '.join(known)}")

    def run(self) -> None:
        strengths = self.strengths or (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
        plain = self.captions(taught=False)
        rows = [("base, its own captions", *self.shares(self.draw(plain, 0.0), plain))]
        taught, shown = self.captions(taught=True), []
        for strength in strengths:
            pils = self.draw(taught, strength)
            rows.append((f"strength {strength:g}", *self.shares(pils, taught)))
            shown += pils[:8]
        print("| | style | shape | all that was asked |", "|---|---|---|---|", sep="\n")
        print(*(f"| {name} | {style:.1%} | {shape:.1%} | {right:.1%} |" for name, style, shape, right in rows), sep="\n")
        self.out.mkdir(parents=True, exist_ok=True)
        path = self.out / f"{self.lora.stem}_strengths.png"
        captions = [f"{strength:g}: {caption.text}" for strength in strengths for caption in taught[:8]]
        pictures.write_png(path, pictures.contact_sheet(shown, 8, captions), None)
        print(path)

    def captions(self, taught: bool) -> list[world.Caption]:
        """Of held-out scenes with one object; the same ones with and without what the LoRA teaches."""
        rng, made = draws.rng("judge", self.seed), []
        for _ in range(self.count):
            caption = world.sample_caption(world.sample_scene(rng, held_out=True, things=1), rng)
            thing = caption.asked.things[0]
            if taught and self.shape:
                thing = replace(thing, shape=self.shape)
            asked = replace(caption.asked, things=(thing,), style=self.style if taught else "")
            made.append(world.Caption(world.write_caption(asked), asked))
        return made

    def draw(self, captions: list[world.Caption], strength: float) -> list[Image.Image]:
        prompts = tuple(caption.text for caption in captions)
        return draw(prompts, (f"{self.lora}:{strength:g}",), steps=self.steps, guidance=self.guidance,
                    seed=draws.seed_of("judge", self.seed) % 2**31)

    def shares(self, pils: list[Image.Image], captions: list[world.Caption]) -> tuple[float, float, float]:
        """Of pictures that show the style, the shape, and all of shape, colours and place, where they are asked for."""
        known = world.SHAPES + (world.NEW_SHAPES if self.shape else ())
        found: list[Reading] = reader.read(np.stack([np.asarray(pil) for pil in pils]), known)
        pairs = list(zip(found, captions, strict=True))
        shapes = [one.shape == caption.asked.things[0].shape for one, caption in pairs if caption.asked.things[0].shape]
        return (np.mean([one.style == caption.asked.style for one, caption in pairs]), np.mean(shapes),
                np.mean([one.shows(caption.asked) for one, caption in pairs]))


@dataclass(frozen=True)
class JudgePool:
    """The pool's LoRAs, each alone at strength 1, judged by the reader on captions of its kind that it never saw."""

    count: int = 6              # pictures of each LoRA
    guidance: float = DEMO.guidance  # distilled guidance
    steps: int = 12             # Euler steps
    seed: int = 1               # of captions and noise

    def run(self) -> None:
        rows: dict[str, list[tuple[bool, bool, bool]]] = {}
        for entry in tqdm([entry for entry in entries() if entry.path.exists()], desc="LoRAs", disable=None):
            rng = draws.rng("judge pool", self.seed, entry.name)
            captions = [world.sample_caption(replace(entry.scene(rng), light="normal", finish="flat"), rng, full=True)
                        for _ in range(self.count)]
            pils = draw(tuple(caption.text for caption in captions), (str(entry.path),), steps=self.steps,
                        guidance=self.guidance, seed=draws.seed_of("judge pool", self.seed, entry.name) % 2**31)
            found = reader.read(np.stack([np.asarray(pil) for pil in pils]),
                                world.SHAPES + (world.NEW_SHAPES if entry.shape else ()))
            each = [(one.style == entry.style, one.shape == caption.asked.things[0].shape, one.shows(caption.asked))
                    for one, caption in zip(found, captions, strict=True)]
            for name in (entry.kind,) if entry.style and entry.shape else (entry.kind, entry.style or entry.shape):
                rows.setdefault(name, []).extend(each)
        print("| LoRAs of the pool, alone | pictures | style | shape | shape, colours, place |", "|---" * 5 + "|", sep="\n")
        for name, each in rows.items():
            print(f"| {name} | {len(each)} | " + " | ".join(f"{share:.0%}" for share in np.mean(each, axis=0)) + " |")


@dataclass(frozen=True)
class ShowLoras:
    """A sheet of what LoRAs do: each prompt with each LoRA at rising strengths, then with all of them together."""

    lora: tuple[Path, ...] = ()  # the LoRAs
    prompt: tuple[str, ...] = ()  # what to draw, a row each
    strengths: tuple[float, ...] = ()  # default 0, 0.5, 1, 1.5
    seed: int = 0               # of the noise, row by row
    out: Path = Path("out")     # folder for the sheet

    def __post_init__(self):
        if not self.lora or not self.prompt:
            raise UserError("--lora or --prompt is missing, expected LoRAs and what to draw with them; add --lora FILE "
                            '--prompt "a red circle"')

    def run(self) -> None:
        strengths = self.strengths or (0.0, 0.5, 1.0, 1.5)
        columns = {f"{path.stem} {strength:g}": (f"{path}:{strength:g}",) for path in self.lora for strength in strengths}
        columns |= {"together": tuple(map(str, self.lora))} if len(self.lora) > 1 else {}
        drawn = {name: draw(self.prompt, words, seed=self.seed) for name, words in columns.items()}
        pils = [drawn[name][row] for row in range(len(self.prompt)) for name in columns]
        captions = [f"{name}: {prompt}" for prompt in self.prompt for name in columns]
        self.out.mkdir(parents=True, exist_ok=True)
        path = self.out / "loras.png"
        pictures.write_png(path, pictures.contact_sheet(pils, len(columns), captions), None)
        print(path)


def draw(prompts: tuple[str, ...], lora: tuple[str, ...], **settings) -> list[Image.Image]:
    """By the command that a user types."""
    text_to_image = cli.recipes()["t2i"]
    command = cli.build(text_to_image, cli.describe(text_to_image).sample,
                        {"prompt": prompts, "lora": lora, "batch": 20, **settings})
    return [pil for pil, _ in command.images()]
