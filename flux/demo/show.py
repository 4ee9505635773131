"""The README's picture of the family on the demo: `python -m flux.demo.show FILE.png` draws image to image, Fill and
outpainting by the commands that a user types, a row each, what was given on the left."""

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from flux import cli, pictures
from flux.demo import scene as world

CIRCLE = world.Scene((world.Thing("circle", "red", "large", "left", 0.27, 0.5, 0.22),), "blue")
HIDDEN = world.Scene((world.Thing("star", "yellow", "large", "centre", 0.5, 0.5, 0.22),), "purple",
                     finish="gradient background")
HEART = world.Scene((world.Thing("heart", "pink", "large", "left", 0.26, 0.5, 0.2),), "green")


def draw(prompt: str, **settings) -> Image.Image:
    text_to_image = cli.recipes()["t2i"]
    command = cli.build(text_to_image, cli.describe(text_to_image).sample, {"prompt": (prompt,), **settings})
    return next(iter(command.images()))[0]


def rows(folder: Path) -> list[list[tuple[Image.Image, str]]]:
    def saved(name: str, pixels: np.ndarray) -> Path:
        pictures.write_png(folder / name, Image.fromarray(pixels), None)
        return folder / name

    start = world.render(CIRCLE)[0]
    circle = saved("circle.png", start)
    prompt = "a large yellow star on the left on a blue background"
    first = [(Image.fromarray(start), "--image")]
    first += [(draw(prompt, image=circle, strength=s), f"--strength {s:g}: {prompt}") for s in (0.4, 0.5, 0.6, 0.75)]

    whole, mask = world.render(HIDDEN)[0], np.zeros((128, 128), np.uint8)
    mask[28:100, 28:100] = 255
    star, hole = saved("star.png", whole), saved("hole.png", mask)
    second = [(Image.fromarray(np.where(mask[..., None] > 0, 127, whole).astype(np.uint8)), "--image and --mask")]
    for what in ("a large yellow star", "a large cyan ring", "a medium orange heart", "a large white cross"):
        prompt = f"{what} in the centre on a purple gradient background"
        second.append((draw(prompt, model="demo-fill", image=star, mask=hole, keep=True), prompt))

    half = world.render(HEART)[0][:, :64]
    left = saved("half.png", half)
    canvas = Image.new("RGB", (128, 128), (127, 127, 127))
    canvas.paste(Image.fromarray(half), (0, 0))
    third = [(canvas, "--image and --outpaint 0,0,64,0")]
    for what in ("a yellow circle", "a white square", "a black ring", "a red star"):
        prompt = f"a large pink heart left of {what} on a green background"
        third.append((draw(prompt, model="demo-fill", image=left, outpaint="0,0,64,0", keep=True), prompt))
    return [first, second, third]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m flux.demo.show", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="PNG to write")
    options = parser.parse_args(argv)
    with TemporaryDirectory() as folder:
        shown = rows(Path(folder))
    pils, captions = zip(*sum(shown, []), strict=True)
    pictures.write_png(options.file, pictures.contact_sheet(pils, len(shown[0]), captions), None)
    print(options.file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
