"""The LoRAs of one layer side by side, and what the norm of their outputs needs: their B's moments.

All A are the rows of one matrix, so x is read once; each rank's row of B is zero where its term does not reach. With b the
mean of B's rows over a slice of `width` outputs and C = (B - 1 b)^T (B - 1 b) / width, R x R, the mean of l_i = B h_i over
the slice is h . b and its variance h^T C h. Centred before it is multiplied out: h^T B^T B h / width - (h . b)^2 would lose
every digit where the mean is large. C is formed in float64 once, and kept as a root F with C = F^T F, so that the variance
is |F h|^2, a sum of squares, and exact where B is nearly of rank one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Layout(NamedTuple):
    """Where things are in a stack. All are bounds, first 0, last the whole."""

    slices: tuple[int, ...]  # outputs over which the norms go
    ranks: tuple[int, ...]   # stacked ranks: of which LoRA
    cuts: tuple[int, ...]    # segments, the outputs in which the same ranks are at work; no segment is in two slices
    used: tuple[int, ...]    # first and stop rank at work, for every segment and LoRA; equal where there is none

    def at_work(self, segment: int, i: int) -> tuple[int, int]:
        at = 2 * (segment * (len(self.ranks) - 1) + i)
        return self.used[at], self.used[at + 1]

    def over(self, s: int, i: int) -> tuple[int, int]:
        """The ranks of LoRA i at work anywhere in slice s."""
        start, stop = self.slices[s:s + 2]
        some = [self.at_work(g, i) for g, cut in enumerate(self.cuts[:-1]) if start <= cut < stop]
        some = [pair for pair in some if pair[0] < pair[1]]
        return (min(first for first, _ in some), max(last for _, last in some)) if some else (self.ranks[i],) * 2


@dataclass(frozen=True, eq=False)
class Stack:
    """The LoRAs that have this layer."""

    A: Tensor                # (R, K)
    B: Tensor                # (R, O), each rank's row zero where its term does not reach
    root: Tensor             # all F, one after the other, for every slice and LoRA (float32 or float64)
    mean: Tensor             # (slices, R): b
    layout: Layout
    present: Tensor | None   # which of those given have this layer; None: all


def stack(loras: Sequence[Sequence[tuple[Tensor, Tensor, int]]], outputs: int, slices: Sequence[int] | None = None,
          dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", gated: bool = True) -> Stack | None:
    """Of N LoRAs, each any number of terms (A (r, K), B (rows, r) with its scale, first row); None if all are empty.

    Gradients reach A and B. Only the plain sum can do without what the gates' statistics need (`gated`). On a GPU
    every term is filled up to a multiple of 16 ranks, so that loads are aligned.
    """
    slices = list(slices or [outputs])
    assert sum(slices) == outputs, f"slices {slices} of {outputs} outputs"
    present = [i for i, terms in enumerate(loras) if terms]
    if not present:
        return None
    width = max(A.shape[1] for terms in loras for A, _, _ in terms)
    multiple = 16 if torch.device(device).type == "cuda" else 1
    bounds, As, Bs, extents, ranks = [0], [], [], [], 0
    for i in present:
        for A, B, start in sorted(loras[i], key=lambda term: (term[2], len(term[1]))):  # neighbours in rows are in ranks
            assert start >= 0 and start + len(B) <= outputs and len(A) == B.shape[1], (A.shape, B.shape, start, outputs)
            more = -len(A) % multiple
            As.append(F.pad(A.to(device, dtype), (0, width - A.shape[1], 0, more)))
            Bs.append(F.pad(B.to(device, dtype).T, (start, outputs - start - len(B), 0, more)))
            extents.append((len(bounds) - 1, start, start + len(B), ranks, ranks + len(A) + more))
            ranks += len(A) + more
        bounds.append(ranks)
    edges = [0, *torch.tensor(slices).cumsum(0).tolist()]
    cuts = sorted({*edges, *(edge for _, start, stop, _, _ in extents for edge in (start, stop))})
    used = []
    for start, stop in pairwise(cuts):
        for i in range(len(present)):
            here = [(a, b) for of, begin, end, a, b in extents if of == i and begin < stop and start < end]
            used += (min(a for a, _ in here), max(b for _, b in here)) if here else (bounds[i], bounds[i])
    layout = Layout(tuple(edges), tuple(bounds), tuple(cuts), tuple(used))
    A, B = torch.cat(As), torch.cat(Bs)
    root, mean = moments(B, layout) if gated else B.new_empty(2, 0, dtype=torch.promote_types(dtype, torch.float32))
    missing = len(present) < len(loras)
    return Stack(A, B, root, mean, layout, torch.tensor(present, device=device) if missing else None)


@torch.no_grad()
def moments(B: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """F and b of every slice and LoRA, formed in float64 from B as it is multiplied with."""
    wide, roots, means = torch.promote_types(B.dtype, torch.float32), [], []
    for s, (start, stop) in enumerate(pairwise(layout.slices)):
        part = B[:, start:stop].double()
        means.append(part.mean(1))
        part = part - means[-1][:, None]
        for i in range(len(layout.ranks) - 1):
            first, last = layout.over(s, i)
            values, vectors = torch.linalg.eigh(part[first:last] @ part[first:last].T / (stop - start))
            roots.append((values.clamp(min=0).sqrt()[:, None] * vectors.T).flatten())
    return torch.cat(roots).to(wide), torch.stack(means).to(wide)
