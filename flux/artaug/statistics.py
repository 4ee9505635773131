"""Intervals for what was measured on the same prompts and seeds twice."""

import math
from collections.abc import Sequence

import numpy as np

TIE = 0.05  # of a score from 1 to 10: pictures that are nearer count as equal


def interval(gains: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """Mean of paired differences, and its 95 % bootstrap interval: of 10,000 means of as many, drawn with return."""
    gains = np.asarray(gains, np.float64)
    if not len(gains):
        return math.nan, math.nan, math.nan
    rng = np.random.default_rng(seed)
    parts = [gains[rng.integers(len(gains), size=(100, len(gains)))].mean(axis=1) for _ in range(100)]
    low, high = np.percentile(np.concatenate(parts), (2.5, 97.5))
    return float(gains.mean()), float(low), float(high)


def win_tie_lose(gains: Sequence[float], tie: float = TIE) -> tuple[int, int, int]:
    gains = np.asarray(gains, np.float64)
    return int((gains > tie).sum()), int((abs(gains) <= tie).sum()), int((gains < -tie).sum())


def wilson(hits: int, count: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    if not count:
        return 0.0, 1.0
    z, share = 1.959964, hits / count
    middle, half = share + z * z / 2 / count, z * math.sqrt(share * (1 - share) / count + z * z / 4 / count**2)
    return (middle - half) / (1 + z * z / count), (middle + half) / (1 + z * z / count)
