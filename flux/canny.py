"""Canny's edges (IEEE PAMI 8(6), 1986) as OpenCV's `Canny` finds them, for FLUX.1-Canny, which was trained on them.

Without blur: Sobel 3x3 at repeated borders; |dx| + |dy|, of the channel where it is largest; only ridges across the
gradient's direction stay; ridges above `high` are edges, and so are those above `low` that touch an edge.
"""

import numpy as np

TAN = 13573  # tan(22.5 degrees) * 2^15, OpenCV's fixed point


def edges(picture: np.ndarray, low: int = 50, high: int = 200) -> np.ndarray:
    """(H, W, 3) uint8 -> (H, W) bool."""
    dx, dy, size = gradient(picture)
    ridge = ridges(dx, dy, size) & (size > low)
    return connected(ridge, ridge & (size > high))


def gradient(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(H, W, C) -> dx, dy, |dx| + |dy|, each (H, W) int32, of the first channel with the largest sum."""
    p = np.pad(picture.astype(np.int32), ((1, 1), (1, 1), (0, 0)), mode="edge")
    across, down = p[:, 2:] - p[:, :-2], p[2:] - p[:-2]
    dx = across[:-2] + 2 * across[1:-1] + across[2:]
    dy = down[:, :-2] + 2 * down[:, 1:-1] + down[:, 2:]
    size = abs(dx) + abs(dy)
    strongest = size.argmax(-1)[..., None]
    return tuple(np.take_along_axis(x, strongest, -1)[..., 0] for x in (dx, dy, size))


def ridges(dx: np.ndarray, dy: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Where `size` is a maximum along the gradient, taken as horizontal, vertical or one of the diagonals.

    Of two equal neighbours in a row or a column the right or lower one is no ridge; on a diagonal neither is.
    """
    p = np.pad(size, 1)
    near = {(i, j): p[1 + i:p.shape[0] - 1 + i, 1 + j:p.shape[1] - 1 + j] for i in (-1, 0, 1) for j in (-1, 0, 1)}
    x, y = abs(dx).astype(np.int64), abs(dy).astype(np.int64) << 15
    horizontal, vertical = y < x * TAN, y > x * TAN + (x << 16)  # tan(67.5 degrees) = tan(22.5 degrees) + 2
    row = (size > near[0, -1]) & (size >= near[0, 1])
    column = (size > near[-1, 0]) & (size >= near[1, 0])
    falling = (size > near[-1, -1]) & (size > near[1, 1])
    rising = (size > near[-1, 1]) & (size > near[1, -1])
    diagonal = np.where((dx < 0) ^ (dy < 0), rising, falling)
    return np.where(horizontal, row, np.where(vertical, column, diagonal))


def connected(weak: np.ndarray, strong: np.ndarray) -> np.ndarray:
    """The `weak` cells that a path through weak cells, of eight neighbours each, joins to a `strong` one."""
    weak, found = np.pad(weak, 1), np.pad(strong, 1)
    width = weak.shape[1]
    around = np.array([i * width + j for i in (-1, 0, 1) for j in (-1, 0, 1)])
    weak_flat, found_flat = weak.ravel(), found.ravel()
    frontier = np.flatnonzero(found_flat)
    while len(frontier):
        near = (frontier[:, None] + around).ravel()
        frontier = np.unique(near[weak_flat[near] & ~found_flat[near]])
        found_flat[frontier] = True
    return found[1:-1, 1:-1]
