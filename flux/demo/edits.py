"""Pairs of pictures in the demo world, before and after an edit: `python -m flux.demo.edits DIR --task circle --count 64`.

circle: a white outline on black becomes a filled circle on a background, in the colours of the prompt, as in the task
fill50k of ControlNet (arXiv 2302.05543) that InFluxEdit trains on. recolour, add, remove: one of two objects gets another
colour, comes or goes, and all else stays; their prompts say what is there afterwards, and a mask says where it changes.

DIR gets source/, target/, mask/ and metadata.jsonl, whose `asked` is what the referee wants to see. Held-out pairs are of
combinations of shapes and colours that no training sees, neither of these pairs nor of the base.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from flux import draws, pictures
from flux.demo import scene as world
from flux.demo.scene import Scene, Thing

OUTLINE = 2.0  # pixels on either side of the circle's edge
PAD = 12  # pixels a mask is larger than the object on each side: its shadow is inside


@dataclass(frozen=True)
class Pair:
    """source, target (128, 128, 3) uint8; mask (128, 128) uint8, 255 where it changes, or None: everywhere."""

    source: np.ndarray
    target: np.ndarray
    mask: np.ndarray | None
    prompt: str
    asked: Scene


def circle(rng: np.random.Generator, held_out: bool) -> Pair:
    radius = float(rng.uniform(0.13, 0.3))
    x, y = (float(rng.uniform(radius + 0.05, 0.95 - radius)) for _ in range(2))
    colour, background = map(str, rng.choice(list(world.COLOURS), 2, replace=False))
    scene = Scene((Thing("circle", colour, "", "", x, y, radius),), background)
    if scene.held_out != held_out:
        return circle(rng, held_out)
    target = world.render(scene)[0]
    v, u = (np.mgrid[:len(target), :len(target)] + 0.5) / len(target)
    line = np.clip(OUTLINE + 0.5 - abs(np.hypot(u - x, v - y) - radius) * len(target), 0, 1)
    source = np.repeat(np.round(255 * line).astype(np.uint8)[..., None], 3, 2)
    return Pair(source, target, None, f"{colour} circle with {background} background", scene)


def recolour(rng: np.random.Generator, held_out: bool) -> Pair:
    scene = world.sample_scene(rng, held_out, things=2)
    i = int(rng.integers(2))
    taken = scene.background, scene.things[i].colour
    before = replace(scene.things[i], colour=str(rng.choice([name for name in world.COLOURS if name not in taken])))
    return _pair(replace(scene, things=(*scene.things[:i], before, *scene.things[i + 1:])), scene, scene, i)


def add(rng: np.random.Generator, held_out: bool) -> Pair:
    scene = world.sample_scene(rng, held_out, things=2)
    i = int(rng.integers(2))
    return _pair(_without(scene, i), scene, scene, i)


def remove(rng: np.random.Generator, held_out: bool) -> Pair:
    scene = world.sample_scene(rng, held_out, things=2)
    i = int(rng.integers(2))
    after = _without(scene, i)
    return _pair(scene, after, scene, i) if after.held_out == held_out else remove(rng, held_out)


TASKS: dict[str, Callable[[np.random.Generator, bool], Pair]] = {
    "circle": circle, "recolour": recolour, "add": add, "remove": remove}


def _without(scene: Scene, i: int) -> Scene:
    return replace(scene, things=scene.things[:i] + scene.things[i + 1:], relation="")


def _pair(before: Scene, after: Scene, both: Scene, i: int) -> Pair:
    """The prompt says shapes, colours and the relation; `both` has the object i around which the mask lies."""
    asked = replace(after, light="normal", finish="flat", things=tuple(replace(thing, size="") for thing in after.things))
    x0, y0, x1, y1 = (round(128 * edge) for edge in world.boxes(world.render_masks(both))[i])
    mask = np.zeros((128, 128), np.uint8)
    mask[max(y0 - PAD, 0):y1 + PAD, max(x0 - PAD, 0):x1 + PAD] = 255
    return Pair(world.render(before)[0], world.render(after)[0], mask, world.write_caption(asked), asked)


def write(folder: Path, task: str, count: int, seed: int = 0, held_out: bool = False) -> None:
    """00000.png and so on below source/, target/ and, where there is one, mask/, and a line of metadata.jsonl for each."""
    for part in ("source", "target", "mask")[:2 if task == "circle" else 3]:
        (folder / part).mkdir(parents=True, exist_ok=True)
    lines = []
    for i in tqdm(range(count), desc=str(folder), disable=None):
        pair, name = TASKS[task](draws.rng("edit", task, seed, i, int(held_out)), held_out), f"{i:05d}.png"
        parts = {"source": pair.source, "target": pair.target} | ({} if pair.mask is None else {"mask": pair.mask})
        for part, pixels in parts.items():
            pictures.write_png(folder / part / name, Image.fromarray(pixels), None, sync=False)
        files = {part: f"{part}/{name}" for part in parts}
        lines.append(json.dumps(files | {"prompt": pair.prompt, "asked": asdict(pair.asked)}))
    pictures.publish(folder / "metadata.jsonl", ("\n".join(lines) + "\n").encode())


def asked(record: dict) -> Scene:
    """`asked` of a line of metadata.jsonl, as `write` made it."""
    return Scene(**record | {"things": tuple(Thing(**thing) for thing in record["things"])})


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m flux.demo.edits", description="Rendered pairs, before and after an "
                                     "edit, with prompts.")
    parser.add_argument("folder", type=Path, help="where the pairs go; those of the same number are replaced")
    parser.add_argument("--task", choices=TASKS, default="circle", help="which edit (circle)")
    parser.add_argument("--count", type=int, default=64, help="pairs (64)")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes (0)")
    parser.add_argument("--held-out", action="store_true", help="of combinations that training never sees")
    options = parser.parse_args(argv)
    try:
        write(options.folder, options.task, options.count, options.seed, options.held_out)
    except OSError as error:
        print(f"error: {options.folder}: {error.strerror}; expected a folder to write into: choose another", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
