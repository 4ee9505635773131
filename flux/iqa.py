"""How good a picture is by itself: blur, flatness, edges over noise. Pure numpy; against a reference: flux/quality.py.

The measures for curation are those of lucidflux.md section 10.1, in whole numbers until the last step, so that they are
exact and the same on every machine.
"""

import numpy as np

PATCH = 240  # pixels
FLAT = 800  # variance of the gradient's magnitude below which a patch is flat


def gray(picture: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 -> (H, W) int16: 0.299 R + 0.587 G + 0.114 B, rounded."""
    weighed = picture.astype(np.int32) @ np.array((299, 587, 114), np.int32)
    return ((weighed + 500) // 1000).astype(np.int16)


def blur(grey: np.ndarray) -> float:
    """Variance of the 4-neighbour Laplacian; low where there are no edges, huge where there is noise."""
    a = np.pad(grey, 1, mode="reflect") if min(grey.shape) > 1 else np.pad(grey, 1, mode="edge")
    laplacian = a[:-2, 1:-1] + a[2:, 1:-1] + a[1:-1, :-2] + a[1:-1, 2:] - 4 * a[1:-1, 1:-1]
    return _variance(laplacian.sum(dtype=np.int64), np.square(laplacian, dtype=np.int32).sum(dtype=np.int64), grey.size)


def _variance(total: float, squares: float, count: int) -> float:
    return float(squares / count - (total / count) ** 2)


def gradient(grey: np.ndarray) -> np.ndarray:
    """(..., H, W) int16 -> Sobel's squared magnitude, int32; the last two axes reflect."""
    a = np.pad(grey, [(0, 0)] * (grey.ndim - 2) + [(1, 1), (1, 1)], mode="reflect")
    down = a[..., :-2, :] + 2 * a[..., 1:-1, :] + a[..., 2:, :]
    across = a[..., :-2] + 2 * a[..., 1:-1] + a[..., 2:]
    gx, gy = down[..., 2:] - down[..., :-2], across[..., 2:, :] - across[..., :-2, :]
    return np.square(gx, dtype=np.int32) + np.square(gy, dtype=np.int32)


def flatness(grey: np.ndarray) -> tuple[float, int]:
    """(share of flat patches, patches): whole ones of 240 x 240 from the top left corner; 0 where there are none."""
    rows, columns = (edge // PATCH for edge in grey.shape)
    if not rows * columns:
        return 0.0, 0
    patches = grey[:rows * PATCH, :columns * PATCH].reshape(rows, PATCH, columns, PATCH).swapaxes(1, 2)
    squared = gradient(patches)
    means = np.sqrt(squared, dtype=np.float64).mean((2, 3))
    return float((squared.mean((2, 3)) - means**2 < FLAT).mean()), rows * columns


def clarity(grey: np.ndarray) -> float:
    """A stand-in for a learned judge: the steepest edges over the noise, in dB. It knows nothing of what is shown.

    Edges: the steepest 1 % of gradients. Noise: the median of Immerkaer's operator (1996), which is blind to
    planes and straight edges. Both are in grey levels, of every second row and column of a large picture.
    """
    if min(grey.shape) < 3:
        return 0.0
    a = grey.astype(np.int32)
    second = a[:-2] - 2 * a[1:-1] + a[2:]
    noise = np.median(abs(second[:, :-2] - 2 * second[:, 1:-1] + second[:, 2:])) / 0.6745 / 6
    squared = (gradient(grey)[::2, ::2] if grey.size > 2**16 else gradient(grey)).ravel()
    steep = np.sqrt(np.partition(squared, -(len(squared) // 100 + 1))[-(len(squared) // 100 + 1):].mean()) / 4
    return float(20 * np.log10((steep + 1) / (noise + 1)))
