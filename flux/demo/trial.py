"""The referee on trial: how often is it right about pictures whose truth is known? `python -m flux.demo.trial`."""

import argparse
import time
from collections import Counter
from dataclasses import replace
from itertools import product

import numpy as np
from tqdm import tqdm

from flux.demo import referee
from flux.demo.scene import COLOURS, PLACES, RELATIONS, SHAPES, Scene, render, sample_caption, sample_scene


def degrade(pixels: np.ndarray, rng: np.random.Generator, blur: float = 1.0, noise: float = 4.0, shift: float = 8.0):
    """What an autoencoder and a sampler may do to a right picture; blur in pixels, noise and tint in grey levels."""
    taps = np.exp(-np.arange(-4, 5) ** 2 / (2 * blur**2))
    image = np.pad(pixels.astype(np.float64), ((4, 4), (4, 4), (0, 0)), "edge")
    for axis in (0, 1):
        image = np.apply_along_axis(np.convolve, axis, image, taps / taps.sum(), "valid")
    image = image + rng.normal(0, noise, image.shape) + rng.uniform(-shift, shift, 3)
    return np.round(np.clip(image, 0, 255)).astype(np.uint8)


def twist(scene: Scene, name: str, rng: np.random.Generator) -> Scene:
    """A scene that differs in one attribute (background, shape, colour, place, relation): no picture shows both.

    Where both objects are alike, "left of" is shown by a picture of "right of" too.
    """
    def other(names, *but):
        return str(rng.choice([each for each in names if each not in but]))

    if name == "background":
        return replace(scene, background=other(COLOURS, scene.background))
    if name == "relation":
        x, y = RELATIONS[scene.relation]
        alike = len({(thing.shape, thing.colour) for thing in scene.things}) == 1
        mirrored = [word for word, step in RELATIONS.items() if alike and step == (-x, -y)]
        return replace(scene, relation=other(RELATIONS, scene.relation, *mirrored))
    things, i = list(scene.things), int(rng.integers(len(scene.things)))
    names = {"shape": SHAPES, "colour": COLOURS, "place": PLACES}[name]
    things[i] = replace(things[i], **{name: other(names, getattr(things[i], name))})
    return replace(scene, things=tuple(things))


def measure(pictures: int, things: int, degraded: bool, bar: tqdm) -> tuple[Counter, Counter, Counter]:
    """Held-out scenes against captions that say everything: times judged, and judged right, per attribute or "right";
    and times that a caption with one attribute changed was found right all the same."""
    rng = np.random.default_rng((pictures, things, degraded))
    judged, held, fooled = Counter(), Counter(), Counter()
    for _ in range(pictures):
        scene = sample_scene(rng, held_out=True, things=things)
        asked = sample_caption(scene, rng, full=True).asked
        pixels = degrade(render(scene)[0], rng) if degraded else render(scene)[0]
        verdict = referee.judge(pixels, asked)
        results = [(name.split()[0], each) for name, each in verdict.held.items()] + [("right", verdict.right)]
        judged.update(name for name, _ in results)
        held.update(name for name, each in results if each)
        for name in ("background", "shape", "colour", "place" if things == 1 else "relation"):
            fooled[name] += referee.compare(verdict.seen, twist(asked, name, rng)).right
        bar.update()
    return judged, held, fooled


def nonsense(rng: np.random.Generator) -> dict[str, tuple[np.ndarray, Scene]]:
    """Pictures that are never right, each with what is asked of it."""
    scene, two = sample_scene(rng, things=1), sample_scene(rng, things=2)
    blank = np.broadcast_to(np.array(COLOURS[scene.background], np.uint8), (128, 128, 3))
    first_only = replace(two, things=(replace(two.things[0], size=""),), relation="")
    return {"noise": (rng.integers(0, 256, (128, 128, 3), np.uint8), scene), "blank": (blank, scene),
            "two objects for one": (render(two)[0], first_only)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m flux.demo.trial", description="Measure the referee itself.")
    parser.add_argument("--pictures", type=int, default=1000, metavar="N", help="how many in all (default: 1000)")
    pictures = max(parser.parse_args().pictures // 4, 1)
    lines, began = [], time.process_time()
    with tqdm(total=4 * pictures, desc="refereeing", unit="picture", disable=None) as bar:
        for things, degraded in product((1, 2), (False, True)):
            title = f"{('one object', 'two objects')[things - 1]}, {'degraded' if degraded else 'clean'}"
            judged, held, fooled = measure(pictures, things, degraded, bar)
            lines.append((title, {name: f"{100 * held[name] / judged[name]:.1f}" for name in judged},
                          {name: f"{100 * fooled[name] / pictures:.1f}" for name in fooled}))
    wrong = [{name: referee.judge(*each).right for name, each in nonsense(np.random.default_rng(seed)).items()}
             for seed in range(100)]
    columns = ("right", "objects", "background", "shape", "colour", "place", "relation", "size", "light", "finish")
    print(f"{4 * pictures} pictures of held-out scenes; degraded: blur of 1 pixel, noise of 4, tint of up to 8 in 255")
    for heading, names, i in (("found right, % (the pictures show what is asked)", columns, 1),
                              ("found right, % (the named attribute is not as asked)", columns[2:7], 2)):
        print(f"\n{heading}\n{'':22}" + "".join(f"{name:>11}" for name in names))
        for line in lines:
            print(f"{line[0]:22}" + "".join(f"{line[i].get(name, '-'):>11}" for name in names))
    print("\nfound right of 100:", ", ".join(f"{name} {sum(each[name] for each in wrong)}" for name in wrong[0]))
    print(f"{(time.process_time() - began) / 4 / pictures * 1000:.0f} ms of one core a picture, drawing included")


if __name__ == "__main__":
    main()
