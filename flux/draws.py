"""Randomness without state: every draw is named by a key, such as (seed, step, micro-step, "noise").

A run that was killed and resumed, or split over more processes, draws the same numbers, and there is no generator state
to save.
"""

import hashlib

import numpy as np
import torch


def seed_of(*key: int | str) -> int:
    """A key -> 63-bit seed, the same on every machine."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()  # parts hold no slash
    return int.from_bytes(digest[:8], "little") >> 1


def generator(*key: int | str) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(*key))


def rng(*key: int | str) -> np.random.Generator:
    return np.random.default_rng(seed_of(*key))
