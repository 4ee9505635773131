"""Low-quality pictures for training: a clean one goes twice through blur, resizing, noise and compression.

Real-ESRGAN's second-order model (arXiv 2107.10833, section 3) with the ranges that LucidFlux trains on (lucidflux.md
section 10.2), every number drawn per picture; and what photographs suffer besides: motion, defocus, low light, WebP, or
nothing at all. What was drawn is a recipe of plain numbers. It does not depend on the picture, is written beside what was
made by it, and makes the same again: `apply(image, recipe)` has no randomness of its own.

    python -m flux.degradation PICTURE... --out DIR      makes them; python -m flux.degradation LQ --again PICTURE, again
"""

import argparse
import io
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from flux import draws, edges, pictures
from flux.errors import UserError

KERNEL = 21  # pixels; smaller kernels stand in its middle
FAMILIES = ("iso", "aniso", "gen-iso", "gen-aniso", "plateau-iso", "plateau-aniso")
SHARES = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
MODES = ("area", "bilinear", "bicubic")


@dataclass(frozen=True)
class Degradation:
    """What is drawn how often; the ranges themselves are the published ones."""

    scale: int = 4  # the low-quality picture is so many times smaller, then enlarged again
    clean: float = 0.05  # share of pictures that stay as they are
    motion: float = 0.08  # share whose first blur is a line, as of a moving camera
    defocus: float = 0.08  # ... a disc, as of a lens out of focus
    dark: float = 0.08  # share in low light, before the noise
    webp: float = 0.1  # share of compressions that are WebP's


PUBLISHED = Degradation(clean=0, motion=0, defocus=0, dark=0, webp=0)


# --- recipes ---

def recipe(rng: np.random.Generator, kind: Degradation = Degradation()) -> list[dict]:
    """Steps in order, each {"op": name, ...numbers}."""
    if rng.random() < kind.clean:
        return []
    steps = [_first_blur(rng, kind)]
    steps.append(_resize(rng, (0.2, 0.7, 0.1), (0.15, 1.5), 1))
    if rng.random() < kind.dark:
        steps.append({"op": "dim", "gain": _uniform(rng, 0.3, 0.7), "gamma": _uniform(rng, 1, 1.6)})
    steps += [_noise(rng, (1, 30), (0.05, 3)), _compression(rng, kind)]
    if rng.random() < 0.8:
        steps.append(_blur(rng, (0.2, 1.5)))
    steps += [_resize(rng, (0.3, 0.4, 0.3), (0.3, 1.2), kind.scale), _noise(rng, (1, 25), (0.05, 2.5))]
    ending = [{"op": "resize", "to": 1 / kind.scale, "mode": str(rng.choice(MODES))}]
    if rng.random() < 0.8:
        ending.append({"op": "sinc", "size": _size(rng), "cutoff": _uniform(rng, math.pi / 3, math.pi)})
    compression = [_compression(rng, kind)]
    steps += ending + compression if rng.random() < 0.5 else compression + ending
    return [*steps, {"op": "resize", "to": 1.0, "mode": "bicubic"}]


def _uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return round(float(rng.uniform(low, high)), 6)  # as short in JSON as it needs to be


def _size(rng: np.random.Generator) -> int:
    return 2 * int(rng.integers(3, 11)) + 1  # 7, 9, ... 21


def _first_blur(rng: np.random.Generator, kind: Degradation) -> dict:
    draw = rng.random()
    if draw < kind.motion:
        return {"op": "motion", "length": _uniform(rng, 5, 20), "angle": _uniform(rng, 0, math.pi)}
    if draw < kind.motion + kind.defocus:
        return {"op": "defocus", "radius": _uniform(rng, 1.5, 6)}
    return _blur(rng, (0.2, 3))


def _blur(rng: np.random.Generator, sigma: tuple[float, float]) -> dict:
    size = _size(rng)
    if rng.random() < 0.1:
        return {"op": "sinc", "size": size, "cutoff": _uniform(rng, math.pi / (3 if size < 13 else 5), math.pi)}
    family = str(rng.choice(FAMILIES, p=SHARES))
    first = _uniform(rng, *sigma)
    step = {"op": "blur", "family": family, "size": size, "sigma": [first, first], "angle": 0.0, "beta": 1.0}
    if not family.endswith("-iso") and family != "iso":
        step |= {"sigma": [first, _uniform(rng, *sigma)], "angle": _uniform(rng, -math.pi, math.pi)}
    if family.startswith("gen"):
        step["beta"] = _uniform(rng, 0.5, 1) if rng.random() < 0.5 else _uniform(rng, 1, 4)
    elif family.startswith("plateau"):
        step["beta"] = 1.0 if rng.random() < 0.5 else _uniform(rng, 1, 2)
    return step


def _resize(rng: np.random.Generator, shares: tuple[float, ...], span: tuple[float, float], below: int) -> dict:
    """Up, down or not; relative to the clean picture's size divided by `below`."""
    way = rng.choice(3, p=shares)
    to = _uniform(rng, 1, span[1]) if way == 0 else _uniform(rng, span[0], 1) if way == 1 else 1.0
    return {"op": "resize", "to": to / below, "mode": str(rng.choice(MODES))}


def _noise(rng: np.random.Generator, sigma: tuple[float, float], scale: tuple[float, float]) -> dict:
    gaussian = rng.random() < 0.5
    amount = {"sigma": _uniform(rng, *sigma)} if gaussian else {"scale": _uniform(rng, *scale)}
    return {"op": "gaussian" if gaussian else "poisson", **amount, "gray": bool(rng.random() < 0.4),
            "seed": int(rng.integers(2**31))}


def _compression(rng: np.random.Generator, kind: Degradation) -> dict:
    return {"op": "webp" if rng.random() < kind.webp else "jpeg", "quality": int(rng.integers(30, 96))}


# --- kernels, (21, 21) float32, of sum 1 ---

def _grid(size: int = KERNEL) -> tuple[np.ndarray, np.ndarray]:
    at = np.arange(size) - (size - 1) / 2
    return np.meshgrid(at, at)  # x, y


def gaussian_kernel(family: str, size: int, sigma: list[float], angle: float, beta: float) -> np.ndarray:
    """Plain, generalised (exp(-d^beta / 2)) or plateau (1 / (1 + d^beta)), d the squared Mahalanobis distance."""
    x, y = _grid(size)
    u, v = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    d = (u / sigma[0]) ** 2 + (v / sigma[1]) ** 2
    return _whole(1 / (1 + d**beta) if family.startswith("plateau") else np.exp(-0.5 * d**beta))


def sinc_kernel(size: int, cutoff: float) -> np.ndarray:
    """The circular low-pass filter of that cutoff, in radians per pixel: it rings, as over-sharpened pictures do."""
    x, y = _grid(size)
    r = np.hypot(x, y)
    r[r == 0] = 1
    kernel = cutoff * torch.special.bessel_j1(torch.from_numpy(cutoff * r)).numpy() / (2 * math.pi * r)
    kernel[size // 2, size // 2] = cutoff**2 / (4 * math.pi)
    return _whole(kernel)


def motion_kernel(length: float, angle: float) -> np.ndarray:
    x, y = _grid()
    along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    return _whole(np.clip((length + 1) / 2 - abs(along), 0, 1) * np.clip(1 - abs(across), 0, 1))


def defocus_kernel(radius: float) -> np.ndarray:
    return _whole(np.clip(radius + 0.5 - np.hypot(*_grid()), 0, 1))


def _whole(kernel: np.ndarray) -> np.ndarray:
    pad = (KERNEL - len(kernel)) // 2
    return np.pad(kernel / kernel.sum(), pad).astype(np.float32)


def filtered(image: Tensor, kernel: np.ndarray) -> Tensor:
    """image (3, H, W) by a kernel that is the same upside down; edges reflect. By the Fourier transform."""
    padded, size = edges.reflected(image, KERNEL // 2), [edge + KERNEL - 1 for edge in image.shape[1:]]
    spectrum = torch.fft.rfft2(padded) * torch.fft.rfft2(torch.from_numpy(kernel), size)
    return torch.fft.irfft2(spectrum, size)[:, KERNEL - 1:, KERNEL - 1:]


# --- steps ---

def apply(image: Tensor, recipe: list[dict]) -> Tensor:
    """image (3, H, W) float32 in [0, 1] -> the same size and range, made worse as the recipe says, in 256 levels."""
    whole = image.shape[1:]
    for step in recipe:
        image = STEPS[step["op"]](image, step, whole).clamp(0, 1)
    return (image * 255).round() / 255


def _resized(image: Tensor, step: dict, whole: tuple[int, int]) -> Tensor:
    size = [max(1, round(step["to"] * edge)) for edge in whole]
    more = {} if step["mode"] == "area" else {"align_corners": False}
    return F.interpolate(image[None], size, mode=step["mode"], **more)[0]


def _gaussian(image: Tensor, step: dict, whole: tuple[int, int]) -> Tensor:
    shape = (1, *image.shape[1:]) if step["gray"] else image.shape
    return image + step["sigma"] / 255 * torch.randn(shape, generator=torch.Generator().manual_seed(step["seed"]))


def _poisson(image: Tensor, step: dict, whole: tuple[int, int]) -> Tensor:
    """Photon noise: as many levels of light as the picture has values, to the next power of two."""
    light = (gray(image) if step["gray"] else image).mul(255).round() / 255
    levels = 2 ** math.ceil(math.log2(max(len(light.unique()), 2)))
    counted = torch.poisson(light * levels, generator=torch.Generator().manual_seed(step["seed"])) / levels
    return image + step["scale"] * (counted - light)


def _compressed(image: Tensor, step: dict, whole: tuple[int, int]) -> Tensor:
    data = io.BytesIO()
    to_picture(image).save(data, "WEBP" if step["op"] == "webp" else "JPEG", quality=step["quality"])
    return to_unit(Image.open(data).convert("RGB"))


STEPS = {
    "blur": lambda image, step, whole: filtered(image, gaussian_kernel(*(step[name] for name in (
        "family", "size", "sigma", "angle", "beta")))),
    "sinc": lambda image, step, whole: filtered(image, sinc_kernel(step["size"], step["cutoff"])),
    "motion": lambda image, step, whole: filtered(image, motion_kernel(step["length"], step["angle"])),
    "defocus": lambda image, step, whole: filtered(image, defocus_kernel(step["radius"])),
    "dim": lambda image, step, whole: step["gain"] * image ** step["gamma"],
    "resize": _resized, "gaussian": _gaussian, "poisson": _poisson, "jpeg": _compressed, "webp": _compressed,
}


def gray(image: Tensor) -> Tensor:
    """(3, H, W) -> (1, H, W), the luma of BT.601."""
    return (image * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0, keepdim=True)


def sharpened(image: Tensor, weight: float = 0.5, sigma: float = 8.0, threshold: float = 10 / 255) -> Tensor:
    """Unsharp masking where there is something to sharpen: the target of training, as published. (3, H, W) in [0, 1]."""
    at = torch.arange(51, dtype=torch.float32) - 25
    line = torch.exp(-0.5 * (at / sigma) ** 2)
    line = (line / line.sum()).view(1, 1, 1, 51)

    def blurred(x):
        x = F.conv2d(edges.reflected(x, 25)[:, None], line)
        return F.conv2d(x, line.transpose(2, 3))[:, 0]

    residual = image - blurred(image)
    soft = blurred((residual.abs() > threshold).float())
    return soft * (image + weight * residual).clamp(0, 1) + (1 - soft) * image


def to_unit(pil: Image.Image) -> Tensor:
    """RGB picture -> (3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(pil)).permute(2, 0, 1).float() / 255


def to_picture(image: Tensor) -> Image.Image:
    return Image.fromarray((image * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy())


# --- the command ---

def remake(made: Path, clean: Path) -> Tensor:
    """The low-quality picture again, from the clean one and what the other's file says of how it was made."""
    steps = pictures.read_metadata(made).get("degradation")
    if not isinstance(steps, list) or not all(isinstance(step, dict) and step.get("op") in STEPS for step in steps):
        raise UserError(f"{made} carries no recipe of python -m flux.degradation, expected one; name one that it made")
    try:
        return apply(to_unit(pictures.read(clean)), steps)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{made} carries a recipe that cannot be used ({type(error).__name__}: {error}); expected one of "
                        "python -m flux.degradation; name another picture") from error


def told(step: dict) -> str:
    """A step in a word: its name and its first number."""
    number = next((value for value in step.values() if type(value) in (int, float)), None)
    return step["op"] if number is None else f"{step['op']} {number:.3g}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m flux.degradation", description="Makes low-quality pictures.")
    parser.add_argument("pictures", type=Path, nargs="+", metavar="PICTURE")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for what is made (default: out)")
    parser.add_argument("--seed", type=int, default=0, help="of the recipes (default: 0)")
    parser.add_argument("--count", type=int, default=1, help="of each picture, by other recipes (default: 1)")
    parser.add_argument("--scale", type=int, default=4, help="times smaller in between (default: 4)")
    parser.add_argument("--published", action="store_true", help="only what LucidFlux was trained on")
    parser.add_argument("--again", type=Path, metavar="CLEAN", help="make PICTURE, whose file says how, again from this")
    flags = parser.parse_args(argv)
    kind = Degradation(flags.scale, *([0.0] * 5 if flags.published else []))
    try:
        jobs, shown = [(path, i) for path in flags.pictures for i in range(max(1, flags.count))], []
        for i, (path, _) in enumerate(jobs):
            steps = pictures.read_metadata(path).get("degradation") if flags.again else \
                recipe(draws.rng("degradation", flags.seed, i), kind)
            made = to_picture(remake(path, flags.again) if flags.again else apply(to_unit(pictures.read(path)), steps))
            to = pictures.next_path(flags.out, flags.seed)
            pictures.write_png(to, made, {"degradation": steps, "source": path.name, "seed": flags.seed})
            shown.append((made, " ".join(told(step) for step in steps[:-1]) or "clean"))
            print(to)
        if len(shown) > 1:
            folder = to.parent.resolve()  # the sheet lies beside it: all that is in it may be restored
            sheet = folder.with_name(f"{folder.name}_{to.stem}_sheet.png")
            pictures.write_png(sheet, pictures.contact_sheet([pil for pil, _ in shown], max(4, round(len(shown) ** 0.5)),
                                                             [words for _, words in shown]), None)
            print(sheet)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
