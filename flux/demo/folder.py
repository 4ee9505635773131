"""Rendered scenes as a folder of captioned pictures, for a first training: `python -m flux.demo.folder DIR --count 64`."""

import argparse
import sys
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from flux import draws, pictures
from flux.demo import scene


def write(folder: Path, count: int, seed: int = 0, style: str = "", shapes: tuple[str, ...] = scene.SHAPES,
          colours: tuple[str, ...] = tuple(scene.COLOURS), full: bool = False, things: int | None = None) -> None:
    """Scenes that training may see: 00000.png with its caption in 00000.txt, and so on; `full` captions omit nothing;
    `things` objects in each, by default one or two."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in tqdm(range(count), desc=str(folder), disable=None):
        rng = draws.rng("folder", seed, i)
        drawn = scene.sample_scene(rng, things=things, shapes=shapes, style=style, colours=colours)
        (folder / f"{i:05d}.txt").write_text(scene.sample_caption(drawn, rng, full).text + "\n")
        pictures.write_png(folder / f"{i:05d}.png", Image.fromarray(scene.render(drawn)[0]), None)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m flux.demo.folder", description="Rendered scenes with captions.")
    parser.add_argument("folder", type=Path, help="where the pictures go; those of the same number are replaced")
    parser.add_argument("--count", type=int, default=64, help="pictures (64)")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes (0)")
    parser.add_argument("--style", choices=scene.STYLES, default="", help="draw and caption all in a style")
    parser.add_argument("--shape", choices=scene.SHAPES + scene.NEW_SHAPES, help="draw this shape alone")
    parser.add_argument("--things", type=int, choices=(1, 2), help="objects in each picture (either)")
    parser.add_argument("--full", action="store_true", help="captions say all that is drawn, as those for a LoRA should")
    options = parser.parse_args(argv)
    shapes = (options.shape,) if options.shape else scene.SHAPES
    try:
        write(options.folder, options.count, options.seed, options.style, shapes, full=options.full,
              things=options.things)
    except OSError as error:
        print(f"error: {options.folder}: {error.strerror}; expected a folder to write into: choose another", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
