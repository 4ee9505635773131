"""What regions cost: `python -m flux.bench_regions`, processor time of a step of the demo with n of them over a plain one.

Three ways: all n + 1 passes as one batch, one after the other (`flux/regions.py`), and one pass over all prompts
(`flux/regional_attention.py`). All run in turn, so that a slow moment of the machine meets each of them, and every round
gives one ratio; told are their medians. The first two may cost n + 1 plain steps and a twentieth of that.
"""

import argparse
import time
from dataclasses import replace
from statistics import median

import torch

from flux.artaug.drawing import Artist
from flux.artaug.settings import Making
from flux.flow import Velocity
from flux.regions import Region

BOXES = ((0.0, 0.0, 1.0, 1.0), (0.0, 0.0, 0.5, 1.0), (0.5, 0.25, 1.0, 0.75))


def ways(artist: Artist, pictures: int, count: int) -> dict[str, Velocity]:
    """The velocities of a batch of pictures with `count` regions each."""
    prompts = ["a red circle left of a blue star on a yellow background"] * pictures
    plan = [Region(box, f"a green cross on a pink background, {i}") for i, box in enumerate(BOXES[:count])]
    artist.read([*prompts, *(region.prompt for region in plan)])
    found = {}
    for name, batch, mode in (("batched", pictures * (count + 1), "blend"), ("one by one", pictures, "blend"),
                              ("attention", pictures, "attention")):
        artist.settings = replace(artist.settings, batch=batch)
        found[name] = artist.velocity(prompts, [plan] * pictures, mode)
    return found


@torch.inference_mode()
def ratios(artist: Artist, pictures: int, rounds: int) -> dict[int, dict[str, float]]:
    """By number of regions and way: processor time of a step over that of a plain one."""
    img, t = torch.randn(pictures, artist.size[0] * artist.size[1] // 256, 64), torch.full((pictures,), 0.5)
    steps = {(n, name): v for n in range(1, len(BOXES) + 1) for name, v in ways(artist, pictures, n).items()}
    plain, seconds = next(iter(ways(artist, pictures, 0).values())), {key: [] for key in steps}

    def timed(v: Velocity) -> float:
        begun = time.process_time()
        v(img, t)
        return time.process_time() - begun
    for i in range(rounds + 1):  # the first warms up
        unit = timed(plain)
        for key, v in steps.items():
            ratio = timed(v) / unit
            if i:
                seconds[key].append(ratio)
    return {n: {name: median(seconds[n, name]) for m, name in steps if m == n} for n in range(1, len(BOXES) + 1)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m flux.bench_regions", description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=4, help="of a step (default: 4)")
    parser.add_argument("--rounds", type=int, default=20, help="that count (default: 20)")
    parser.add_argument("--threads", type=int, default=1, help="(default: 1)")
    chosen = parser.parse_args(argv)
    torch.set_num_threads(chosen.threads)
    found = ratios(Artist(Making(device="cpu")), chosen.pictures, chosen.rounds)
    print(f"| regions | {' | '.join(found[1])} | at most |\n|{'---|' * (len(found[1]) + 2)}")
    for n, row in found.items():
        print(f"| {n} | {' | '.join(f'{ratio:.2f}' for ratio in row.values())} | {1.05 * (n + 1):.2f} |")


if __name__ == "__main__":
    main()
