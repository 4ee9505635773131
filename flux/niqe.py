"""NIQE (Mittal, Soundararajan, Bovik: "Making a completely blind image quality analyzer", 2013): how far the statistics of
a picture's patches are from those of good pictures. Lower is better. Pure numpy.

What good pictures are like is a mean (36,) and a covariance (36, 36) of features, from a file: `.npz` with mu_pris_param and
cov_pris_param as others keep the published one, or made of one's own pictures by

    python -m flux.niqe photos --out niqe.npz
"""

import argparse
import io
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from PIL import Image
from tqdm import tqdm

from flux import data, pictures
from flux.errors import UserError

PATCH = 96  # pixels of a patch's edge; smaller for pictures that hold fewer than 16
SHARP = 0.75  # share of the sharpest patch's contrast from which a patch counts as good
SHIFTS = ((0, 1), (1, 0), (1, 1), (1, -1))  # neighbours whose products are looked at
EXTENT = 3  # of the Gaussian window, 7 x 7, sigma 7/6


@dataclass(frozen=True)
class Good:
    """What good pictures are like."""

    mean: np.ndarray  # (36,)
    covariance: np.ndarray  # (36, 36)

    def score(self, pil: Image.Image) -> float:
        """NIQE of a picture with at least 48 pixels along its edges."""
        features, _ = of_patches(pil)
        away = self.mean - features.mean(0)
        own = np.cov(features, rowvar=False) if len(features) > 1 else np.zeros_like(self.covariance)
        return float(np.sqrt(max(0.0, away @ np.linalg.pinv((self.covariance + own) / 2) @ away)))


def fitted(pils: Iterable[Image.Image]) -> Good:
    """Of the sharp patches of good pictures."""
    rows = []
    for pil in pils:
        features, contrast = of_patches(pil)
        rows.append(features[contrast >= SHARP * contrast.max()])
    features = np.concatenate(rows) if rows else np.zeros((0, 36))
    if len(features) < 37:
        raise UserError(f"{len(features)} sharp patches came for NIQE, expected 37 or more; give more or larger pictures")
    return Good(features.mean(0), np.cov(features, rowvar=False))


def of_patches(pil: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """36 features of each patch that lies wholly inside (N, 36), and its mean local contrast (N,)."""
    if min(pil.size) < 48:
        raise UserError(f"a picture of {pil.width}x{pil.height} came to NIQE, expected 48 pixels or more along each edge")
    edge = min(PATCH, min(pil.size) // 4 // 2 * 2)
    grey = pil.convert("L")
    columns, contrast = [], None
    for scale in (1, 2):
        small = grey if scale == 1 else grey.resize((grey.width // 2, grey.height // 2), Image.Resampling.BICUBIC)
        normal, deviation = (cut(x, edge // scale, pil.size, edge) for x in normalised(np.asarray(small, np.float64)))
        contrast = deviation.mean((1, 2)) if contrast is None else contrast
        columns.append(np.stack([features(patch) for patch in normal]))
    return np.concatenate(columns, axis=1), contrast


def cut(x: np.ndarray, edge: int, size: tuple[int, int], whole: int) -> np.ndarray:
    """(H, W) -> (N, edge, edge), as many as the picture of that size holds of `whole` pixels."""
    wide, tall = (length // whole for length in size)
    x = x[:tall * edge, :wide * edge].reshape(tall, edge, wide, edge)
    return x.transpose(0, 2, 1, 3).reshape(-1, edge, edge)


def normalised(grey: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(H, W) in 0 .. 255 -> each value less the mean around it, over the deviation around it + 1; and that deviation."""
    mean = blurred(grey)
    deviation = np.sqrt(np.abs(blurred(grey * grey) - mean * mean))
    return (grey - mean) / (deviation + 1), deviation


def blurred(x: np.ndarray) -> np.ndarray:
    line = np.exp(-0.5 * (np.arange(-EXTENT, EXTENT + 1) / (7 / 6)) ** 2)
    line /= line.sum()
    for axis in (0, 1):
        padded = np.pad(x, [(EXTENT, EXTENT) if i == axis else (0, 0) for i in (0, 1)], mode="edge")
        x = sum(w * np.take(padded, np.arange(i, i + x.shape[axis]), axis) for i, w in enumerate(line))
    return x


def features(normal: np.ndarray) -> np.ndarray:
    """Of a patch: shape and scale of its distribution, and of those of its products with four neighbours. (18,)"""
    shape, left, right = asymmetric(normal)
    found = [shape, (left + right) / 2]
    for shift in SHIFTS:
        shape, left, right = asymmetric(normal * np.roll(normal, shift, (0, 1)))
        found += [shape, (right - left) * math.gamma(2 / shape) / math.gamma(1 / shape), left, right]
    return np.array(found)


def asymmetric(x: np.ndarray) -> tuple[float, float, float]:
    """Shape and both scales of an asymmetric generalised Gaussian, by its moments (Lasmar et al. 2009)."""
    below, above = x[x < 0], x[x > 0]
    left, right = (math.sqrt((side**2).mean()) if len(side) else 0.0 for side in (below, above))
    if not left or not right:  # a flat patch, or one that has no other side
        return 10.0, left, right
    ratio, spread = left / right, np.abs(x).mean() ** 2 / (x**2).mean()
    wanted = spread * (ratio**3 + 1) * (ratio + 1) / (ratio**2 + 1) ** 2
    shapes, known = moments()
    shape = float(shapes[np.argmin((known - wanted) ** 2)])
    scale = math.sqrt(math.gamma(1 / shape) / math.gamma(3 / shape))
    return shape, left * scale, right * scale


@cache
def moments() -> tuple[np.ndarray, np.ndarray]:
    """Shapes, and E|x|^2 / E x^2 of a generalised Gaussian of each."""
    shapes = np.arange(0.2, 10.0005, 0.001)
    return shapes, np.array([math.gamma(2 / s) ** 2 / (math.gamma(1 / s) * math.gamma(3 / s)) for s in shapes])


# --- files, and the command ---

def load(path: Path) -> Good:
    try:
        with np.load(path, allow_pickle=False) as file:
            good = Good(file["mu_pris_param"].astype(float).ravel(), file["cov_pris_param"].astype(float))
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise UserError(f"{path} cannot be read as NIQE's parameters ({type(error).__name__}: {error}), expected an .npz "
                        "with mu_pris_param and cov_pris_param; make one by python -m flux.niqe FOLDER") from error
    if good.mean.shape != (36,) or good.covariance.shape != (36, 36):
        raise UserError(f"{path} holds a mean {good.mean.shape} and a covariance {good.covariance.shape}, expected (36,) "
                        "and (36, 36); name another file")
    return good


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m flux.niqe", description="What good pictures are like, for NIQE.")
    parser.add_argument("folder", type=Path, help="of good pictures")
    parser.add_argument("--out", type=Path, default=Path("niqe.npz"), help="the file to write (default: niqe.npz)")
    flags = parser.parse_args(argv)
    try:
        if not flags.folder.is_dir():
            raise UserError(f"{flags.folder}: no such folder; expected one of good pictures; check the name")
        good = fitted(pictures.read(item.path) for item in tqdm(data.folder(flags.folder), disable=None))
        made = io.BytesIO()
        np.savez(made, mu_pris_param=good.mean, cov_pris_param=good.covariance)
        pictures.publish(flags.out, made.getvalue())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(flags.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
