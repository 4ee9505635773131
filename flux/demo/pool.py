"""The demo's pool of LoRAs, for AutoLoRA: a grid of styles, palettes and objects, each made as `train.py lora` makes one.

`python train.py demo pool` trains what is not there yet, one after the other, and writes `weights/pool/`: a safetensors file
and a cover picture for each, and `index.json` with captions, what it teaches, and which are held out from whoever learns
to find LoRAs by their weights.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from flux import checkpoint, cli, draws, lora_names, pictures, weights
from flux.demo import folder
from flux.demo import scene as world
from flux.lora_training import LoraTask, TrainLora
from lora import io
from lora.adapter import Adapter
from lora.metadata import about

PALETTES = {"warm": ("red", "orange", "yellow", "white"), "cold": ("blue", "cyan", "purple", "white"),
            "candy": ("pink", "purple", "yellow", "cyan"), "forest": ("green", "black", "yellow", "white")}
FILLERS = ("a", "an", "the", "of", "with", "and", "for", "some", "drawn", "made", "image", "art", "scene", "poster",
           "simple", "bold", "nice", "mostly", "using", "very", "please", "like", "design", "flat", "print", "card", "on",
           "by", "my", "tones", "shades", "mood", "theme", "set", "plain", "clean", "here", "kind")
POOL = weights.DEMO / "pool"


@dataclass(frozen=True)
class Entry:
    """What one LoRA teaches: a style or a new shape, drawn in the colours of a palette."""

    style: str
    shape: str
    palette: str

    @property
    def name(self) -> str:
        return "-".join(filter(None, (self.palette, self.style, self.shape)))

    @property
    def path(self) -> Path:
        return POOL / f"{self.name}.safetensors"

    @property
    def kind(self) -> str:
        return "style and object" if self.style and self.shape else "style" if self.style else "object"

    @property
    def captions(self) -> dict[str, str]:
        """As a person would describe the pictures, at three lengths."""
        colours = ", ".join(PALETTES[self.palette])
        what = f"a {self.shape}" if self.shape else "one or two shapes"
        style = f" in {self.style} style" if self.style else ""
        return {"long": f"{what}{style}, painted in {colours}, a {self.palette} palette, on a plain background of the same",
                "medium": f"{what}{style} in {self.palette} colours",
                "short": " ".join(filter(None, (self.palette, self.style, self.shape)))}

    def described(self, count: int, *key: int | str) -> list[str]:
        """In other words and orders than `captions`, most of them with a few words that say nothing."""
        rng, made = draws.rng("described", self.name, *key), []
        for _ in range(count):
            colours = ", ".join(rng.permutation(PALETTES[self.palette]))
            palette = [f"{self.palette} {word}".strip() for word in ("", "colours", "palette")]
            parts = [[*palette, f"in {palette[1]}", f"{palette[1]}: {colours}", f"{palette[2]} of {colours}", colours]]
            parts += [[self.style, f"{self.style} style", f"in {self.style} style"]] if self.style else []
            parts += [[self.shape, f"a {self.shape}", f"a picture of a {self.shape}"]] if self.shape else []
            said = [str(rng.choice(each)) for each in parts]
            said += [str(word) for word in rng.choice(FILLERS, rng.integers(0, 5))]
            made.append(str(rng.choice([" ", ", "])).join(rng.permutation(said)))
        return made

    @property
    def unseen(self) -> list[str]:
        """Descriptions that nobody learns from, in forms and with words that no other has."""
        what, colours = f"a {self.shape}" if self.shape else "shapes", ", ".join(PALETTES[self.palette])
        styled, look = (f" {word.format(self.style)}" if self.style else "" for word in ("in {} style", "with a {} look"))
        painted = " ".join(filter(None, (self.style, self.shape, "painted", self.palette)))
        return [painted, f"{what}{look}, colours {colours}",
                f"{self.palette} palette of {colours}, showing {what}{styled}"]

    def prompts(self, count: int, *key: int | str) -> list[str]:
        """What pictures of its kind are captioned with: other attributes come and go, the palette is not named."""
        rng, shapes = draws.rng("prompts", self.name, *key), (self.shape,) if self.shape else world.SHAPES
        colours = PALETTES.get(self.palette, tuple(world.COLOURS))
        return [world.sample_caption(world.sample_scene(rng, False, 1, shapes, self.style, colours), rng).text
                for _ in range(count)]

    def scene(self, rng: np.random.Generator) -> world.Scene:
        """Of its kind, in its palette; of the held-out combinations where they have one."""
        for held_out in (True, False):
            try:
                return world.sample_scene(rng, held_out, 1, (self.shape,) if self.shape else world.SHAPES, self.style,
                                          PALETTES[self.palette])
            except ValueError:  # none of these few is held out
                pass
        raise AssertionError("a scene that training sees always exists")

    @property
    def held_out(self) -> bool:
        """About a quarter, chosen by name."""
        return draws.seed_of("pool", self.name) % 4 == 0


def entries() -> list[Entry]:
    """8 styles and 8 objects in 4 palettes each, and 32 pairs of both: 96."""
    alone = [Entry(style, "", palette) for style, palette in product(world.STYLES, PALETTES)]
    alone += [Entry("", shape, palette) for shape, palette in product(world.NEW_SHAPES, PALETTES)]
    shift = {palette: i for i, palette in enumerate(PALETTES)}
    both = [Entry(style, world.NEW_SHAPES[(i + 2 * shift[palette]) % 8], palette)
            for (i, style), palette in product(enumerate(world.STYLES), PALETTES)]
    return alone + both


@dataclass(frozen=True)
class TrainPool:
    """The pool of LoRAs for AutoLoRA, one after the other; goes on where it was stopped."""

    steps: int = 220            # of each LoRA: most of a minute of one core
    rank: int = 2
    lr: float = 4e-3
    batch: int = 6
    pictures: int = 32          # that each LoRA sees
    target: str = r"single_blocks\.[1-5]\.linear"  # layers, a regular expression
    only: str = ""              # train those whose name has this in it
    seed: int = 0
    out: Path = Path("runs")    # folder for pictures and run folders
    threads: int | None = None  # CPU threads; default: as many as PyTorch chooses

    def stages(self) -> Iterator[tuple[str, "TrainMember"]]:
        """Each LoRA that is not there yet, for the loop; between two of them the last one's cover is drawn."""
        POOL.mkdir(parents=True, exist_ok=True)
        for entry in [entry for entry in entries() if self.only in entry.name]:
            if not entry.path.exists():
                shapes = (entry.shape,) if entry.shape else world.SHAPES
                place, colours = self.out / "pool" / entry.name, PALETTES[entry.palette]
                folder.write(place / "pictures", self.pictures, self.seed, entry.style, shapes, colours, full=True)
                yield "pool", TrainMember(
                    data=place / "pictures", steps=self.steps, rank=self.rank, lr=self.lr, batch=self.batch, out=place,
                    target=self.target, seed=self.seed, threads=self.threads, save_every=self.steps, title=entry.name)
            if not entry.path.with_suffix(".png").exists():
                draw_cover(entry)
            write_index()
        size = sum(file.stat().st_size for file in POOL.iterdir())
        print(f"{len(list(POOL.glob('*.safetensors')))} LoRAs, {size / 1e6:.1f} MB, in {POOL}")


@dataclass(frozen=True)
class TrainMember(TrainLora):
    """One LoRA of the pool."""

    title: str = ""             # its name in the pool
    schedule: Literal["constant", "cosine"] = "cosine"
    weakest: float = 0.75       # so that gates may turn it up and down
    strongest: float = 1.5
    held_out: float = 0.0
    sample_every: int = 0
    keep: int = 1

    def task(self):
        return MemberTask(self)


class MemberTask(LoraTask):
    def save(self, run: Path) -> None:
        """Into the pool, in bfloat16, with the few fields of metadata that others read."""
        adapter = Adapter({layer: tuple(replace(term, A=term.A.bfloat16(), B=term.B.bfloat16()) for term in terms)
                           for layer, terms in self.adapter().layers.items()})
        title = self.settings.title
        fields = about(adapter, title, self.settings.model, {"command": "python train.py demo pool"})
        io.write(POOL / f"{title}.safetensors", {"flux": adapter}, lora_names.names(self.preset), metadata=fields)


def entry_of(about: Mapping) -> Entry | None:
    """The entry that a line of the pool's table is about."""
    return Entry(about["style"], about["shape"], about["palette"]) if about.get("palette") in PALETTES else None


def draw_cover(entry: Entry) -> None:
    """By the command that a user types, from a scene of its own, in plain light and paint."""
    rng = draws.rng("cover", entry.name)
    drawn = replace(entry.scene(rng), light="normal", finish="flat")
    text_to_image = cli.recipes()["t2i"]
    command = cli.build(text_to_image, cli.describe(text_to_image).sample, {
        "prompt": (world.sample_caption(drawn, rng, full=True).text,), "lora": (str(entry.path),),
        "seed": draws.seed_of("cover", entry.name) % 2**31})
    pil, _ = next(iter(command.images()))
    pictures.write_png(entry.path.with_suffix(".png"), pil.resize((64, 64), Image.Resampling.LANCZOS), None)


def write_index() -> None:
    rows = {entry.name: {"style": entry.style, "shape": entry.shape, "palette": entry.palette, "kind": entry.kind,
                         "held_out": entry.held_out, "captions": entry.captions,
                         "sha256": checkpoint.fingerprint(entry.path)} for entry in entries() if entry.path.exists()}
    draft = POOL / f".index.{os.getpid()}.json"  # two processes with --only may fill one pool
    draft.write_text(json.dumps(rows, indent=1) + "\n")
    draft.replace(POOL / "index.json")
