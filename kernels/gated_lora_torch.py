"""The gated LoRA linear without kernels: the same algebra (gated_lora_linear.py) in plain PyTorch, for any float dtype.

A slice of some rows at a time, small enough to stay in the cache, for all LoRAs: nothing of (N x rows x outputs) is stored.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.gated_lora_stack import Layout

EPS = 1e-5  # of all norms; written out in the kernels
ELEMENTS = 2 ** 16  # of a part


class Part(NamedTuple):
    """What forward and backward know of rows `rows` and slice `s` (outputs `outs`)."""

    s: int
    rows: slice
    outs: slice
    y: Tensor                           # all in float32, or float64
    n_b: Tensor | None
    ranks: list[slice]                  # of each LoRA
    h: list[Tensor]
    B: list[Tensor]
    l: list[Tensor]
    n: list[Tensor]
    gates: list[Tensor]                 # G_i


def parts(y: Tensor, h: Tensor, B: Tensor, stats: Tensor, gate: Tensor | None, offset: Tensor | None, layout: Layout,
          compete: bool) -> Iterator[Part]:
    wide, count = torch.promote_types(y.dtype, torch.float32), len(layout.ranks) - 1
    tokens = len(y) if offset is None else len(y) // len(offset)
    for s, (start, stop) in enumerate(pairwise(layout.slices)):
        ranks = [slice(*layout.over(s, i)) for i in range(count)]
        own = [B[each, start:stop].to(wide) for each in ranks]
        step = max(1, min(ELEMENTS // (stop - start), tokens))
        for row in [row for first in range(0, len(y), tokens) for row in range(first, first + tokens, step)]:
            rows = slice(row, min(row + step, row - row % tokens + tokens))                   # of one sample
            part = y[rows, start:stop].to(wide)
            hs = [h[rows, each].to(wide) for each in ranks]
            ls = [hi @ Bi for hi, Bi in zip(hs, own, strict=True)]
            n_b, ns, gates, logits = None, [], [], []
            if gate is not None:
                mean, rstd = stats[s, :, :, rows].unsqueeze(-1).unbind(1)                     # (N + 1, rows, 1)
                n_b = (part - mean[0]).mul_(rstd[0])
                c0, c1, c2, c3 = gate[:4, start:stop]
                p, q = torch.addcmul(c0, c1, n_b), torch.addcmul(c2, c3, n_b)
                for i, li in enumerate(ls):
                    ns.append((li - mean[i + 1]).mul_(rstd[i + 1]))
                    logits.append(torch.addcmul(p, q, ns[-1]))
                    if offset is not None:
                        logits[-1] += offset[row // tokens, i, s]
                gates = list(torch.stack(logits).softmax(0)) if compete else [z.sigmoid_() for z in logits]
            yield Part(s, rows, slice(start, stop), part, n_b, ranks, hs, own, ls, ns, gates)


def statistics(y: Tensor, h: Tensor, root: Tensor, mean: Tensor, layout: Layout) -> Tensor:
    """Mean and 1 / deviation of the base and of each LoRA per slice and row: (slices, N + 1, 2, M)."""
    count, at = len(layout.ranks) - 1, 0
    stats, h = root.new_empty(len(layout.slices) - 1, count + 1, 2, len(y)), h.to(root.dtype)
    for s, (start, stop) in enumerate(pairwise(layout.slices)):
        step = max(1, ELEMENTS // (stop - start))
        for row in range(0, len(y), step):
            variance, middle = torch.var_mean(y[row:row + step, start:stop].to(root.dtype), dim=1, correction=0)
            stats[s, 0, 0, row:row + step], stats[s, 0, 1, row:row + step] = middle, variance
        for i in range(count):
            first, last = layout.over(s, i)
            F_i = root[at:at + (last - first) ** 2].view(last - first, last - first)
            torch.mv(h[:, first:last], mean[s, first:last], out=stats[s, i + 1, 0])
            torch.sum((h[:, first:last] @ F_i.T).square_(), 1, out=stats[s, i + 1, 1])
            at += F_i.numel()
    stats[:, :, 1].add_(EPS).rsqrt_()
    return stats


def forward(y: Tensor, h: Tensor, stack: tuple[Tensor, Tensor, Tensor], gate: Tensor | None, strengths: Tensor,
            offset: Tensor | None, layout: Layout, compete: bool) -> tuple[Tensor, Tensor]:
    """y (M, O), h (M, R) -> out (M, O), statistics."""
    B, root, mean = stack
    out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    stats = root.new_empty(0) if gate is None else statistics(y, h, root, mean, layout)
    strengths = strengths.tolist()
    for part in parts(y, h, B, stats, gate, offset, layout, compete):
        total = part.y.clone() if part.y.dtype == y.dtype else part.y
        for i, li in enumerate(part.l):
            if gate is not None:
                li *= torch.addcmul(gate[4, part.outs], gate[5, part.outs], part.gates[i])
            total.add_(li, alpha=strengths[i])
        out[part.rows, part.outs] = total
    return out, stats


def backward(grad: Tensor, y: Tensor, h: Tensor, B: Tensor, stats: Tensor, gate: Tensor, strengths: Tensor,
             offset: Tensor | None, layout: Layout, compete: bool, for_B: bool) -> tuple[Tensor, ...]:
    """grad (M, O) -> those of y, h, B (or nothing), gate, offset (or nothing)."""
    wide, tokens = stats.dtype, len(y) if offset is None else len(y) // len(offset)
    dy = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    dh, dB = h.new_zeros(h.shape, dtype=wide), B.new_zeros(B.shape if for_B else 0, dtype=wide)
    dgate = torch.zeros_like(gate)
    doffset = gate.new_zeros(0) if offset is None else torch.zeros_like(offset)
    strengths = strengths.tolist()
    for part in parts(y, h, B, stats, gate, offset, layout, compete):
        s, rows, outs = part.s, part.rows, part.outs
        _, c1, c2, c3, k0, k1 = gate[:, outs]
        g, q, rstd = grad[rows, outs].to(wide), torch.addcmul(c2, c3, part.n_b), stats[s, :, 1, rows].unsqueeze(-1)
        a = [li.mul_(g).mul_(strength) for li, strength in zip(part.l, strengths, strict=True)]
        mixed = sum(ai * Gi for ai, Gi in zip(a, part.gates, strict=True)) if compete else None
        sums, by_lora = torch.zeros_like(g), torch.zeros_like(g)                              # of dz_i, and of dz_i n_i
        for i, (ai, Gi, ni) in enumerate(zip(a, part.gates, part.n, strict=True)):
            dgate[4, outs] += ai.sum(0)
            dgate[5, outs] += (ai * Gi).sum(0)
            dz = (ai - mixed).mul_(Gi) if compete else (1 - Gi).mul_(Gi).mul_(ai)
            dz *= k1
            sums += dz
            by_lora.addcmul_(dz, ni)
            if offset is not None:
                doffset[rows.start // tokens, i, s] += dz.sum()
            dl = torch.addcmul(k0, k1, Gi).mul_(g).mul_(strengths[i])
            dl += normed_gradient(dz.mul_(q), ni, rstd[i + 1])
            dh[rows, part.ranks[i]] += dl @ part.B[i].T
            if for_B:
                dB[part.ranks[i], outs] += part.h[i].T @ dl
        for row, each in enumerate((sums, sums * part.n_b, by_lora, by_lora * part.n_b)):
            dgate[row, outs] += each.sum(0)
        dy[rows, outs] = normed_gradient(torch.addcmul(c1 * sums, c3, by_lora), part.n_b, rstd[0]).add_(g)
    return dy, dh.to(h.dtype), dB.to(B.dtype), dgate, doffset


def normed_gradient(dn: Tensor, n: Tensor, rstd: Tensor) -> Tensor:
    """Of what n = (x - mean) rstd was made from. Overwrites dn."""
    m2 = (dn * n).mean(1, keepdim=True)
    return dn.sub_(dn.mean(1, keepdim=True)).addcmul_(n, m2, value=-1).mul_(rstd)
