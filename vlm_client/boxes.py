"""Boxes as models write them, and as fractions (x1, y1, x2, y2) of the picture, x to the right and y down.

    norm1000       whole numbers from 0 to 1000, whatever the picture's size: Qwen2-VL (arXiv 2409.12191), Qwen3-VL
    pixel_resized  pixels of the picture as the model's processor has resized it: Qwen2.5-VL (arXiv 2502.13923)
    frac           fractions from 0 to 1: what a model of another family is asked for

The client sends pictures in a size that the processor leaves as it is, so `pixel_resized` means pixels of what was sent.
"""

import math
import re
from dataclasses import dataclass

from vlm_client import VlmError

Box = tuple[float, float, float, float]
CONVENTIONS = ("norm1000", "pixel_resized", "frac")


@dataclass(frozen=True)
class Processor:
    """A model family's rule for sizes: edges in multiples of `factor` pixels, areas between two bounds."""

    factor: int = 28  # pixels: patches of 14, merged 2 x 2
    min_pixels: int = 56 * 56
    max_pixels: int = 12_845_056  # = 16384 * 28 * 28, of the released preprocessor_config.json


QWEN2 = Processor()  # and Qwen2.5-VL, whose file says the same
QWEN3 = Processor(factor=32, min_pixels=65_536, max_pixels=16_777_216)  # patches of 16, merged 2 x 2
OTHER = Processor(factor=1, min_pixels=1, max_pixels=16_777_216)  # of fractions, to which no size matters


def convention(model: str) -> str:
    """By the name of the model; Qwen3-VL went back to the scale of Qwen2-VL."""
    name = model.lower()
    if re.search(r"qwen-?2[._-]5", name):
        return "pixel_resized"
    return "norm1000" if re.search(r"qwen-?[23]|qwen-?vl", name) else "frac"


def processor(model: str) -> Processor:
    if convention(model) == "frac":
        return OTHER
    return QWEN3 if re.search(r"qwen-?3", model.lower()) else QWEN2


def resized(width: int, height: int, rule: Processor = QWEN2, max_pixels: int | None = None) -> tuple[int, int]:
    """Width and height after the processor, by Qwen's `smart_resize`: the nearest multiples of `factor`, then shrunk or
    enlarged into its bounds. `max_pixels` may lower the upper one. A size that came out of it goes through unchanged.
    """
    most = max(min(max_pixels or rule.max_pixels, rule.max_pixels), rule.min_pixels)
    if max(width, height) > 200 * min(width, height):
        raise VlmError(f"a picture of {width}x{height} pixels came, expected edges within a ratio of 200; crop it")

    def multiples(scale: float, rounding) -> tuple[int, int]:
        w, h = (max(rule.factor, rounding(edge * scale / rule.factor) * rule.factor) for edge in (width, height))
        return w, h

    w, h = multiples(1, round)
    if w * h > most:
        return multiples(math.sqrt(most / (width * height)), math.floor)
    if w * h < rule.min_pixels:
        return multiples(math.sqrt(rule.min_pixels / (width * height)), math.ceil)
    return w, h


def spans(convention: str, size: tuple[int, int]) -> tuple[float, float]:
    """What the right and the lower edge of a picture of `size` (width, height as sent) are in that scale."""
    return {"norm1000": (1000, 1000), "pixel_resized": size, "frac": (1, 1)}[convention]


def to_fractions(box: Box, convention: str, size: tuple[int, int]) -> Box:
    """Neither ordered nor clipped: that is for the parser to see."""
    x, y = spans(convention, size)
    return box[0] / x, box[1] / y, box[2] / x, box[3] / y


def from_fractions(box: Box, convention: str, size: tuple[int, int]) -> Box:
    """Whole numbers, but for `frac`, which has four digits."""
    x, y = spans(convention, size)
    digits = 4 if convention == "frac" else None
    return tuple(round(value * edge, digits) for value, edge in zip(box, (x, y, x, y), strict=True))


def area(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def overlap(a: Box, b: Box) -> float:
    """Intersection over union."""
    shared = area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    union = area(a) + area(b) - shared
    return shared / union if union else 0.0
