"""A linear layer, N LoRAs beside it, and a gate that weighs each of them per token and output (arXiv 2508.02107).

With y = W x + bias, h_i = A_i x, l_i = B_i h_i (the file's alpha / rank inside) and strengths s_i:

    z_i = LN_b(y) w_b + LN_l(l_i) w_l + LN_b(y) LN_l(l_i) w_c + b + offset_i
    out = y + sum_i s_i (k0 + k1 G_i) l_i        G_i = sigmoid(z_i), or a softmax over the LoRAs (`compete`)

The published gate has k0 = 0, k1 = w_out and norms over the whole row; ours has k0 = beta (1 - lambda), k1 = 2 beta lambda
(N beta lambda if they compete) and norms over slices of the row such as q, k, v. Without a gate, k0 = 1 and k1 = 0.

Folding. n_b = (y - mu_b) rho_b and n_i = (l_i - mu_i) rho_i are the norms before gain and shift. All parameters go into six
numbers per output, by ordinary operations through which autograd reaches them (`fold`):

    z_i = (c0 + c1 n_b) + (c2 + c3 n_b) n_i + offset_i

Statistics. l_i is never stored, and not needed for its mean and variance over a slice of `width` outputs: with b the mean
of B's rows there and C = (B - 1 b)^T (B - 1 b) / width, R x R, mu_i = h . b and var_i = h^T C h. Centred before it is
multiplied out: h^T B^T B h / width - mu^2 would lose every digit where the mean is large. C is formed in float64 once, and
kept as a root F with C = F^T F, so that var_i = |F h|^2 is a sum of squares, and exact where B is nearly of rank one.

Backward, with g = d loss / d out, a_i = g s_i l_i and each l_i and G_i computed again:

    dz_i = k1 a_i G_i (1 - G_i), or k1 G_i (a_i - sum_j G_j a_j)       dk0 = sum a_i          dk1 = sum G_i a_i
    dc0 = sum dz_i     dc1 = sum dz_i n_b     dc2 = sum dz_i n_i     dc3 = sum dz_i n_i n_b   (over rows and LoRAs)
    dn_b = sum_i dz_i (c1 + c3 n_i)           dn_i = dz_i (c2 + c3 n_b)
    dy   = g + rho_b (dn_b - mean(dn_b) - n_b mean(dn_b n_b))                                 (means over a slice)
    dl_i = g s_i (k0 + k1 G_i) + rho_i (dn_i - mean(dn_i) - n_i mean(dn_i n_i))    dh_i = B_i^T dl_i    dB_i = dl_i h_i^T

The products with W and A stay the library's, so a base stored in 8 bits will do; of a plain one, W and all A can be the
rows of one matrix (`join`), and y and h one product. What is here begins at (y, h).

In this order: `fold`, `eager` (the definition, as one would write it), `stack`, the pair that runs without a GPU, the
Triton kernels, the two torch ops, and `gated_lora_linear`, which picks. All norms have eps 1e-5.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise, product
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # the kernels below stay functions that nobody calls
    triton, tl = None, SimpleNamespace(constexpr=None)

jit = triton.jit if triton else lambda function: function
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's own switch: kernels as slow Python on the CPU, for tests
EPS = 1e-5


# The gate's parameters, and the definition.

class Gate(NamedTuple):
    """What is learned, each (O,), and how much of l_i passes: k0 + k1 G_i."""

    weight_base: Tensor
    weight_lora: Tensor
    weight_cross: Tensor
    bias: Tensor
    base_gain: Tensor   # of LN_b
    base_shift: Tensor
    lora_gain: Tensor   # of LN_l
    lora_shift: Tensor
    k0: Tensor
    k1: Tensor
    compete: bool = False


def published(weight_out: Tensor) -> tuple[Tensor, Tensor]:
    """k0, k1 of arXiv 2508.02107: w_out G_i. Preset `ref`."""
    return torch.zeros_like(weight_out), weight_out


def around_sum(mix: Tensor, beta: Tensor | float, count: int, compete: bool = False) -> tuple[Tensor, Tensor]:
    """k0, k1 of beta (1 + lambda (2 G_i - 1)), where G_i of `compete` is count / 2 times the softmax. Preset `ours`.

    mix: lambda of every output, in [0, 1]. With all logits 0 this is beta, whatever lambda: a plain sum.
    """
    return beta * (1 - mix), beta * mix * (count if compete else 2)


def fold(gate: Gate) -> Tensor:
    """c0, c1, c2, c3, k0, k1 as (6, O) in float32 or float64, rounded once; differentiable."""
    w_b, w_l, w_c, b, base_gain, base_shift, lora_gain, lora_shift, k0, k1 = (part.double() for part in gate[:10])
    c0 = w_b * base_shift + b + (w_l + w_c * base_shift) * lora_shift
    c1 = base_gain * (w_b + w_c * lora_shift)
    c2 = lora_gain * (w_l + w_c * base_shift)
    c3 = w_c * base_gain * lora_gain
    return torch.stack((c0, c1, c2, c3, k0, k1)).to(torch.promote_types(gate.bias.dtype, torch.float32))


def eager(y: Tensor, deltas: Sequence[Tensor], gate: Gate | None, strengths: Sequence[float] | Tensor | None = None,
          offset: Tensor | None = None, slices: Sequence[int] | None = None) -> Tensor:
    """The definition, for any dtype, and for l_i of any kind: y and each of deltas (B, ..., O) -> (B, ..., O).

    offset: (B, N, slices). slices: their widths; one if not given. Stores everything N times over: not for use at size.
    """
    strengths = [1.0] * len(deltas) if strengths is None else strengths
    if not deltas:
        return y
    if gate is None:
        return y + sum(s * delta for s, delta in zip(strengths, deltas, strict=True))
    k0, k1 = gate.k0.to(y.dtype), gate.k1.to(y.dtype)
    opened = opening(y, deltas, gate, offset, slices)
    return y + sum(s * (k0 + k1 * g) * delta for s, g, delta in zip(strengths, opened, deltas, strict=True))


def opening(y: Tensor, deltas: Sequence[Tensor], gate: Gate, offset: Tensor | None = None,
            slices: Sequence[int] | None = None) -> Tensor:
    """G_i of all LoRAs (N, B, ..., O), as `eager` has them."""
    slices = slices or [y.shape[-1]]

    def norm(x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
        parts = zip(*(part.split(list(slices), dim=-1) for part in (x, gain, shift)), strict=True)
        return torch.cat([F.layer_norm(part, part.shape[-1:], *affine, EPS) for part, *affine in parts], dim=-1)

    w_b, w_l, w_c, b, base_gain, base_shift, lora_gain, lora_shift = (part.to(y.dtype) for part in gate[:8])
    base, logits = norm(y, base_gain, base_shift), []
    for i, delta in enumerate(deltas):
        own = norm(delta, lora_gain, lora_shift)
        logits.append(base * w_b + own * w_l + base * own * w_c + b)
        if offset is not None:
            each = torch.cat([offset[:, i, s, None].expand(-1, width) for s, width in enumerate(slices)], -1)  # (B, O)
            logits[-1] = logits[-1] + each.to(y.dtype).view(len(y), *[1] * (y.ndim - 2), -1)
    return torch.stack(logits).softmax(0) if gate.compete else torch.stack(logits).sigmoid()


# The LoRAs of a layer side by side.

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


# Without a GPU: a slice of some rows at a time, small enough to stay in the cache, for all LoRAs.

ELEMENTS = 2 ** 16  # of such a part


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


def forward_torch(y: Tensor, h: Tensor, stack: tuple[Tensor, Tensor, Tensor], gate: Tensor | None, strengths: Tensor,
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


def backward_torch(grad: Tensor, y: Tensor, h: Tensor, B: Tensor, stats: Tensor, gate: Tensor, strengths: Tensor,
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


# The kernels. M rows, O outputs, N LoRAs, S slices, R ranks; a tile is BM rows by BN outputs of one segment. Bytes for bf16,
# B and h of all LoRAs left out, since programs beside each other read the same of them, from the cache:
#
#   base_statistics   reads y                      2 M O
#   lora_statistics   reads h, writes              2 M R + 8 M S (N + 1)
#   apply             reads y, writes out          4 M O
#   sweep             reads y, g, writes t         6 M O, and partial sums: 12 M (N + 1) O / BN by rows, 24 O M / BM by
#                                                  columns;
#                     `compete` writes             8 M O more, what its softmax needs
#   finish            reads y, t, writes dy        6 M O
#   rank_gradient     reads y, g for each BR ranks, all but the first time from L2 at best: from 4 M O up
#   factor_gradient   the same, and only if B learns
#
# Statistics, logits, gates and sums are float32; only operands of the matrix unit and results are of the layer's dtype.

BN = 64
BLOCKS = {  # kernel: rows, warps, stages. Chosen for no spills (`configurations`), not yet by a clock
    "base_statistics": (4, 4, 1), "lora_statistics": (64, 4, 1), "apply": (32, 8, 1), "sweep": (32, 8, 1),
    "finish": (32, 4, 1), "rank_gradient": (32, 8, 1), "factor_gradient": (32, 8, 1)}


@jit
def _aligned(ptr, ALIGN: tl.constexpr):
    """A number out of a table, known to be a multiple of ALIGN: so that loads from there may be wide."""
    return tl.multiple_of(tl.load(ptr), ALIGN)


@jit
def _tile(row, tiles_ptr, t, M, BM: tl.constexpr, BN: tl.constexpr, ALIGN: tl.constexpr):
    """Tile t at `row`, an int64: what lies within a tile is counted from there in int32, which saves half the registers of
    an address. Lanes of rows and which exist; outputs and which exist; slice; segment."""
    start, stop = _aligned(tiles_ptr + 4 * t, ALIGN), _aligned(tiles_ptr + 4 * t + 1, ALIGN)
    lanes, cols = tl.arange(0, BM), start + tl.arange(0, BN)
    s, segment = tl.load(tiles_ptr + 4 * t + 2).to(tl.int64), tl.load(tiles_ptr + 4 * t + 3)
    return row, lanes, lanes < M - row, cols, cols < stop, s, segment


@jit
def _first_row(BM: tl.constexpr):
    return tl.program_id(0).to(tl.int64) * BM


@jit
def _read(ptr, stride, tile):
    """(BM, BN) of a matrix with M rows, in float32."""
    row, lanes, inside, cols, within, _, _ = tile
    at = ptr + row * stride + (lanes[:, None] * stride + cols[None, :])
    return tl.load(at, mask=inside[:, None] & within[None, :], other=0.0).to(tl.float32)


@jit
def _write(ptr, value, stride, tile):
    row, lanes, inside, cols, within, _, _ = tile
    at = ptr + row * stride + (lanes[:, None] * stride + cols[None, :])
    tl.store(at, value.to(ptr.dtype.element_ty), mask=inside[:, None] & within[None, :])


@jit
def _coefficient(gate_ptr, which, O, tile):
    """c0 to c3, k0, k1: (1, BN)."""
    _, _, _, cols, within, _, _ = tile
    return tl.load(gate_ptr + which * O + cols, mask=within, other=0.0)[None, :]


@jit
def _moments(stats_ptr, member, N, M, tile):
    """Both numbers that (S, N + 1, 2, M) holds of a member (0: base, i + 1: LoRA i): (BM, 1) each."""
    row, lanes, inside, _, _, s, _ = tile
    at = stats_ptr + (s * (N + 1) + member) * 2 * M + row + lanes
    return tl.load(at, mask=inside, other=0.0)[:, None], tl.load(at + M, mask=inside, other=0.0)[:, None]


@jit
def _low_rank(i, loras, sizes, tile, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, ALIGN: tl.constexpr):
    """l_i on one tile, from the ranks at work there."""
    h_ptr, h_stride, B_ptr, ranges_ptr, _, _ = loras
    _, O, N, _, _ = sizes
    row, lanes, inside, cols, within, _, segment = tile
    here = ranges_ptr + 2 * (segment * N + i)
    first, stop = _aligned(here, ALIGN), _aligned(here + 1, ALIGN)
    l = tl.zeros((BM, BN), tl.float32)
    for r in range(first, stop, BR):
        ranks = tl.arange(0, BR)
        known = ranks < stop - r
        h = tl.load(h_ptr + row * h_stride + r + (lanes[:, None] * h_stride + ranks[None, :]),
                    mask=inside[:, None] & known[None, :], other=0.0)
        B = tl.load(B_ptr + first.to(tl.int64) * O + ((r - first + ranks)[:, None] * O + cols[None, :]),
                    mask=known[:, None] & within[None, :], other=0.0)
        l = tl.dot(h, B, l, input_precision="ieee")
    return l


@jit
def _base(y_ptr, y_stride, gate_ptr, stats_ptr, sizes, tile):
    """y, n_b, and what all LoRAs' logits are made of: p = c0 + c1 n_b, q = c2 + c3 n_b."""
    M, O, N, _, _ = sizes
    y = _read(y_ptr, y_stride, tile)
    mean, rstd = _moments(stats_ptr, 0, N, M, tile)
    n_b = (y - mean) * rstd
    p = _coefficient(gate_ptr, 0, O, tile) + _coefficient(gate_ptr, 1, O, tile) * n_b
    return y, n_b, p, _coefficient(gate_ptr, 2, O, tile) + _coefficient(gate_ptr, 3, O, tile) * n_b


@jit
def _member(i, p, q, loras, sizes, tile, OFFSET: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
            ALIGN: tl.constexpr):
    """l_i, n_i, z_i and rho_i on one tile."""
    _, _, _, _, stats_ptr, offset_ptr = loras
    M, _, N, S, tokens = sizes
    row, lanes, inside, _, _, s, _ = tile
    l = _low_rank(i, loras, sizes, tile, BM, BN, BR, ALIGN)
    mean, rstd = _moments(stats_ptr, i + 1, N, M, tile)
    n = (l - mean) * rstd
    z = p + q * n
    if OFFSET:
        z += tl.load(offset_ptr + (((row.to(tl.int32) + lanes) // tokens) * N + i) * S + s, mask=inside, other=0.0)[:, None]
    return l, n, z, rstd


@jit
def _sigmoid(z, FAST: tl.constexpr):
    """FAST: (1 + tanh(z / 2)) / 2 by one instruction, exact to 2^-11 where bf16 keeps 2^-9."""
    if FAST:
        gate = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [0.5 * z], tl.float32, is_pure=True, pack=1)
        gate = 0.5 * gate + 0.5
    else:
        gate = 1.0 / (1.0 + tl.exp(-z))
    return gate


@jit
def base_statistics(y_ptr, stats_ptr, slices_ptr, y_stride, M, N, BM: tl.constexpr, WIDE: tl.constexpr):
    """Program (rows, slice): mean and centred squares of WIDE columns at a time, joined one after the other."""
    row, lanes, s = _first_row(BM), tl.arange(0, BM), tl.program_id(1).to(tl.int64)
    inside, start, stop = lanes < M - row, tl.load(slices_ptr + s), tl.load(slices_ptr + s + 1)
    mean, squares = tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32)
    for at in range(start, stop, WIDE):
        cols = at + tl.arange(0, WIDE)
        within = cols < stop
        y = tl.load(y_ptr + row * y_stride + (lanes[:, None] * y_stride + cols[None, :]),
                    mask=inside[:, None] & within[None, :], other=0.0).to(tl.float32)
        before, more = (at - start).to(tl.float32), (tl.minimum(stop, at + WIDE) - at).to(tl.float32)
        here = tl.sum(y, 1) / more
        centred = tl.where(within[None, :], y - here[:, None], 0.0)
        step = here - mean
        mean += step * (more / (before + more))
        squares += tl.sum(centred * centred, 1) + step * step * (before * more / (before + more))
    out = stats_ptr + s * (N + 1) * 2 * M + row + lanes
    tl.store(out, mean, mask=inside)
    tl.store(out + M, 1.0 / tl.sqrt(squares / (stop - start).to(tl.float32) + 1e-5), mask=inside)


@jit
def lora_statistics(h_ptr, root_ptr, mean_ptr, stats_ptr, roots_ptr, h_stride, M, R, N, BM: tl.constexpr, BR: tl.constexpr):
    """Program (rows, slice and LoRA): mu = h . b, and rho from |F h|^2, BR entries of F h at a time."""
    row, lanes, pair = _first_row(BM), tl.arange(0, BM), tl.program_id(1).to(tl.int64)
    inside, s, i = lanes < M - row, pair // N, pair % N
    first, stop, at = tl.load(roots_ptr + 3 * pair), tl.load(roots_ptr + 3 * pair + 1), tl.load(roots_ptr + 3 * pair + 2)
    mean, squares, count = tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32), stop - first
    for k in range(0, count, BR):
        left = k + tl.arange(0, BR)
        Fh = tl.zeros((BM, BR), tl.float32)
        for j in range(0, count, BR):
            right = j + tl.arange(0, BR)
            known = right < count
            h = tl.load(h_ptr + row * h_stride + first + (lanes[:, None] * h_stride + right[None, :]),
                        mask=inside[:, None] & known[None, :], other=0.0).to(tl.float32)
            F_i = tl.load(root_ptr + at + left[None, :] * count + right[:, None],
                          mask=known[:, None] & (left < count)[None, :], other=0.0)           # (right, left): F^T
            Fh = tl.dot(h, F_i, Fh, input_precision="ieee")
            if k == 0:
                mean += tl.sum(h * tl.load(mean_ptr + s * R + first + right, mask=known, other=0.0)[None, :], 1)
        squares += tl.sum(Fh * Fh, 1)
    out = stats_ptr + (s * (N + 1) + i + 1) * 2 * M + row + lanes
    tl.store(out, mean, mask=inside)
    tl.store(out + M, 1.0 / tl.sqrt(squares + 1e-5), mask=inside)


@jit
def apply(y_ptr, h_ptr, B_ptr, out_ptr, gate_ptr, stats_ptr, strength_ptr, offset_ptr, tiles_ptr, ranges_ptr, y_stride,
          h_stride, M, O, N, S, tokens, GATED: tl.constexpr, COMPETE: tl.constexpr, OFFSET: tl.constexpr, FAST: tl.constexpr,
          BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, ALIGN: tl.constexpr):
    """Program (rows, tile): the sum over all LoRAs. The softmax of `compete` is kept running: its largest logit so far, the
    sum of exponentials, and the sum of l_i weighted by them."""
    loras, sizes = (h_ptr, h_stride, B_ptr, ranges_ptr, stats_ptr, offset_ptr), (M, O, N, S, tokens)
    tile = _tile(_first_row(BM), tiles_ptr, tl.program_id(1), M, BM, BN, ALIGN)
    total = tl.zeros((BM, BN), tl.float32)
    if GATED:
        y, _, p, q = _base(y_ptr, y_stride, gate_ptr, stats_ptr, sizes, tile)
        weighted = tl.zeros((BM, BN), tl.float32)
        if COMPETE:
            largest, exps = tl.full((BM, BN), float("-inf"), tl.float32), tl.zeros((BM, BN), tl.float32)
        for i in range(N):
            l, n, z, rho = _member(i, p, q, loras, sizes, tile, OFFSET, BM, BN, BR, ALIGN)
            l *= tl.load(strength_ptr + i)
            total += l
            if COMPETE:
                new = tl.maximum(largest, z)
                fade, each = tl.exp(largest - new), tl.exp(z - new)
                exps, weighted, largest = exps * fade + each, weighted * fade + each * l, new
            else:
                weighted += _sigmoid(z, FAST) * l
        if COMPETE:
            weighted /= exps
        total = _coefficient(gate_ptr, 4, O, tile) * total + _coefficient(gate_ptr, 5, O, tile) * weighted
    else:
        y = _read(y_ptr, y_stride, tile)
        for i in range(N):
            total += tl.load(strength_ptr + i) * _low_rank(i, loras, sizes, tile, BM, BN, BR, ALIGN)
    _write(out_ptr, y + total, O, tile)


@jit
def sweep(y_ptr, h_ptr, B_ptr, grad_ptr, gate_ptr, stats_ptr, strength_ptr, offset_ptr, tiles_ptr, ranges_ptr, t_ptr,
          by_row_ptr, by_column_ptr, lse_ptr, mixed_ptr, y_stride, h_stride, grad_stride, M, O, N, S, tokens,
          COMPETE: tl.constexpr, OFFSET: tl.constexpr, FAST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
          BR: tl.constexpr, ALIGN: tl.constexpr):
    """Program (rows, tile): t = g + rho_b dn_b, and what is summed over rows or outputs. Partial sums, added up afterwards
    in the same order every time: by_row (tiles, N + 1, 3, M) of dn, dn n and dz; by_column (blocks of rows, 6, O).
    `compete` also keeps log sum exp z and sum G a."""
    loras, sizes = (h_ptr, h_stride, B_ptr, ranges_ptr, stats_ptr, offset_ptr), (M, O, N, S, tokens)
    tile = _tile(_first_row(BM), tiles_ptr, tl.program_id(1), M, BM, BN, ALIGN)
    row, lanes, inside, cols, within, _, _ = tile
    _, n_b, p, q = _base(y_ptr, y_stride, gate_ptr, stats_ptr, sizes, tile)
    g = _read(grad_ptr, grad_stride, tile)
    if COMPETE:
        largest, exps = tl.full((BM, BN), float("-inf"), tl.float32), tl.zeros((BM, BN), tl.float32)
        mixed = tl.zeros((BM, BN), tl.float32)
        for i in range(N):
            l, n, z, rho = _member(i, p, q, loras, sizes, tile, OFFSET, BM, BN, BR, ALIGN)
            new = tl.maximum(largest, z)
            fade, each = tl.exp(largest - new), tl.exp(z - new)
            mixed = mixed * fade + each * (g * l * tl.load(strength_ptr + i))
            exps, largest = exps * fade + each, new
        mixed, lse = mixed / exps, largest + tl.log(exps)
        _write(lse_ptr, lse, O, tile)
        _write(mixed_ptr, mixed, O, tile)
    sum_a, sum_Ga = tl.zeros((BM, BN), tl.float32), tl.zeros((BM, BN), tl.float32)
    sum_dz, sum_dzn = tl.zeros((BM, BN), tl.float32), tl.zeros((BM, BN), tl.float32)
    k1 = _coefficient(gate_ptr, 5, O, tile)
    row_ptr = by_row_ptr + tl.program_id(1).to(tl.int64) * (N + 1) * 3 * M + row + lanes
    for i in range(N):
        l, n, z, rho = _member(i, p, q, loras, sizes, tile, OFFSET, BM, BN, BR, ALIGN)
        a = g * l * tl.load(strength_ptr + i)
        if COMPETE:
            G = tl.exp(z - lse)
            dz = k1 * G * (a - mixed)
        else:
            G = _sigmoid(z, FAST)
            dz = k1 * G * (1.0 - G) * a
        sum_a += a
        sum_Ga += G * a
        sum_dz += dz
        sum_dzn += dz * n
        dn = dz * q
        tl.store(row_ptr + (i + 1) * 3 * M, tl.sum(dn, 1), mask=inside)
        tl.store(row_ptr + ((i + 1) * 3 + 1) * M, tl.sum(dn * n, 1), mask=inside)
        tl.store(row_ptr + ((i + 1) * 3 + 2) * M, tl.sum(dz, 1), mask=inside)
    dn_b = _coefficient(gate_ptr, 1, O, tile) * sum_dz + _coefficient(gate_ptr, 3, O, tile) * sum_dzn
    tl.store(row_ptr, tl.sum(dn_b, 1), mask=inside)
    tl.store(row_ptr + M, tl.sum(dn_b * n_b, 1), mask=inside)
    _, rstd = _moments(stats_ptr, 0, N, M, tile)
    _write(t_ptr, g + rstd * dn_b, O, tile)
    column_ptr = by_column_ptr + tl.program_id(0).to(tl.int64) * 6 * O + cols
    tl.store(column_ptr, tl.sum(sum_dz, 0), mask=within)
    tl.store(column_ptr + O, tl.sum(sum_dz * n_b, 0), mask=within)
    tl.store(column_ptr + 2 * O, tl.sum(sum_dzn, 0), mask=within)
    tl.store(column_ptr + 3 * O, tl.sum(sum_dzn * n_b, 0), mask=within)
    tl.store(column_ptr + 4 * O, tl.sum(sum_a, 0), mask=within)
    tl.store(column_ptr + 5 * O, tl.sum(sum_Ga, 0), mask=within)


@jit
def finish(y_ptr, t_ptr, stats_ptr, means_ptr, tiles_ptr, y_stride, M, O, N, BM: tl.constexpr, BN: tl.constexpr,
           ALIGN: tl.constexpr):
    """Program (rows, tile): dy = t - rho_b (m1 + n_b m2) in t's place, m1 and m2 the means of dn_b and dn_b n_b."""
    tile = _tile(_first_row(BM), tiles_ptr, tl.program_id(1), M, BM, BN, ALIGN)
    mean, rstd = _moments(stats_ptr, 0, N, M, tile)
    m1, m2 = _moments(means_ptr, 0, N, M, tile)
    n_b = (_read(y_ptr, y_stride, tile) - mean) * rstd
    _write(t_ptr, _read(t_ptr, O, tile) - rstd * (m1 + n_b * m2), O, tile)


@jit
def _output_gradient(i, y_ptr, y_stride, grad_ptr, grad_stride, gate_ptr, means_ptr, strength_ptr, lse_ptr, mixed_ptr, loras,
                     sizes, tile, COMPETE: tl.constexpr, OFFSET: tl.constexpr, FAST: tl.constexpr, BM: tl.constexpr,
                     BN: tl.constexpr, BR: tl.constexpr, ALIGN: tl.constexpr):
    """dl_i on one tile, 0 outside of it."""
    _, _, _, _, stats_ptr, _ = loras
    M, O, N, _, _ = sizes
    _, _, inside, _, within, _, _ = tile
    _, _, p, q = _base(y_ptr, y_stride, gate_ptr, stats_ptr, sizes, tile)
    l, n, z, rstd = _member(i, p, q, loras, sizes, tile, OFFSET, BM, BN, BR, ALIGN)
    g = _read(grad_ptr, grad_stride, tile) * tl.load(strength_ptr + i)
    k1 = _coefficient(gate_ptr, 5, O, tile)
    if COMPETE:
        G = tl.exp(z - _read(lse_ptr, O, tile))
        dz = k1 * G * (g * l - _read(mixed_ptr, O, tile))
    else:
        G = _sigmoid(z, FAST)
        dz = k1 * G * (1.0 - G) * g * l
    m1, m2 = _moments(means_ptr, i + 1, N, M, tile)
    dl = g * (_coefficient(gate_ptr, 4, O, tile) + k1 * G) + rstd * (dz * q - m1 - n * m2)
    return tl.where(inside[:, None] & within[None, :], dl, 0.0)


@jit
def rank_gradient(y_ptr, h_ptr, B_ptr, grad_ptr, gate_ptr, stats_ptr, means_ptr, strength_ptr, offset_ptr, tiles_ptr,
                  ranges_ptr, chunks_ptr, lse_ptr, mixed_ptr, dh_ptr, y_stride, h_stride, grad_stride, M, O, N, S, tokens, R,
                  tiles, COMPETE: tl.constexpr, OFFSET: tl.constexpr, FAST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                  BR: tl.constexpr, ALIGN: tl.constexpr):
    """Program (rows, chunk: BR ranks of one LoRA): dh = sum over tiles of dl B^T, tiles without these ranks left out."""
    loras, sizes = (h_ptr, h_stride, B_ptr, ranges_ptr, stats_ptr, offset_ptr), (M, O, N, S, tokens)
    row, chunk, ranks = _first_row(BM), chunks_ptr + 3 * tl.program_id(1), tl.arange(0, BR)
    i, first, stop = tl.load(chunk), _aligned(chunk + 1, ALIGN), _aligned(chunk + 2, ALIGN)
    known = ranks < stop - first
    dh = tl.zeros((BM, BR), tl.float32)
    for t in range(tiles):
        tile = _tile(row, tiles_ptr, t, M, BM, BN, ALIGN)
        _, _, _, cols, within, _, segment = tile
        here = ranges_ptr + 2 * (segment * N + i)
        if (tl.load(here) < stop) & (tl.load(here + 1) > first):
            dl = _output_gradient(i, y_ptr, y_stride, grad_ptr, grad_stride, gate_ptr, means_ptr, strength_ptr, lse_ptr,
                                  mixed_ptr, loras, sizes, tile, COMPETE, OFFSET, FAST, BM, BN, BR, ALIGN)
            B = tl.load(B_ptr + first.to(tl.int64) * O + (ranks[:, None] * O + cols[None, :]),
                        mask=known[:, None] & within[None, :], other=0.0)
            dh = tl.dot(dl.to(B.dtype), tl.trans(B), dh, input_precision="ieee")
    lanes = tl.arange(0, BM)
    at = dh_ptr + row * R + first + (lanes[:, None] * R + ranks[None, :])
    tl.store(at, dh.to(dh_ptr.dtype.element_ty), mask=(lanes < M - row)[:, None] & known[None, :])


@jit
def factor_gradient(y_ptr, h_ptr, B_ptr, grad_ptr, gate_ptr, stats_ptr, means_ptr, strength_ptr, offset_ptr, tiles_ptr,
                    ranges_ptr, chunks_ptr, lse_ptr, mixed_ptr, dB_ptr, y_stride, h_stride, grad_stride, M, O, N, S, tokens,
                    COMPETE: tl.constexpr, OFFSET: tl.constexpr, FAST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                    BR: tl.constexpr, ALIGN: tl.constexpr):
    """Program (tile, chunk): dB = sum over rows of h^T dl; 0 where the tile has none of these ranks."""
    loras, sizes = (h_ptr, h_stride, B_ptr, ranges_ptr, stats_ptr, offset_ptr), (M, O, N, S, tokens)
    chunk, ranks = chunks_ptr + 3 * tl.program_id(1), tl.arange(0, BR)
    i, first, stop = tl.load(chunk), _aligned(chunk + 1, ALIGN), _aligned(chunk + 2, ALIGN)
    known = ranks < stop - first
    row = tl.program_id(0).to(tl.int64) * 0
    row, lanes, inside, cols, within, s, segment = _tile(row, tiles_ptr, tl.program_id(0), M, BM, BN, ALIGN)
    here = ranges_ptr + 2 * (segment * N + i)
    dB = tl.zeros((BR, BN), tl.float32)
    if (tl.load(here) < stop) & (tl.load(here + 1) > first):
        for _ in range(0, M, BM):
            tile = _tile(row, tiles_ptr, tl.program_id(0), M, BM, BN, ALIGN)
            dl = _output_gradient(i, y_ptr, y_stride, grad_ptr, grad_stride, gate_ptr, means_ptr, strength_ptr, lse_ptr,
                                  mixed_ptr, loras, sizes, tile, COMPETE, OFFSET, FAST, BM, BN, BR, ALIGN)
            at = h_ptr + row * h_stride + first + (lanes[:, None] * h_stride + ranks[None, :])
            h = tl.load(at, mask=(lanes < M - row)[:, None] & known[None, :], other=0.0)
            dB = tl.dot(tl.trans(h), dl.to(h.dtype), dB, input_precision="ieee")
            row += BM
    at = dB_ptr + first.to(tl.int64) * O + (ranks[:, None] * O + cols[None, :])
    tl.store(at, dB.to(dB_ptr.dtype.element_ty), mask=known[:, None] & within[None, :])


class Tables(NamedTuple):
    """A layout as the kernels read it: int32 tensors, all small."""

    slices: Tensor   # (S + 1,)
    tiles: Tensor    # (T, 4): start, stop, slice, segment
    ranges: Tensor   # (segments, N, 2)
    roots: Tensor    # (S * N, 3): first and stop rank, where F is
    chunks: Tensor   # (chunks, 3): LoRA, first and stop rank
    block: int       # BR
    align: int       # 16 if all of the above but the slices' and LoRAs' numbers are multiples of it
    spans: tuple[tuple[int, int], ...]  # of every slice, its tiles


@lru_cache(maxsize=4096)
def tables(layout: Layout, device: torch.device, dtype: torch.dtype) -> Tables:
    count, tiles, spans, roots, at = len(layout.ranks) - 1, [], [], [], 0
    for s, (start, stop) in enumerate(pairwise(layout.slices)):
        before = len(tiles)
        for segment, (a, b) in enumerate(pairwise(layout.cuts)):
            if start <= a < stop:
                tiles += [(col, min(col + BN, b), s, segment) for col in range(a, b, BN)]
        spans.append((before, len(tiles)))
        for i in range(count):
            first, last = layout.over(s, i)
            roots.append((first, last, at))
            at += (last - first) ** 2
    most = max(b - a for a, b in zip(layout.used[::2], layout.used[1::2], strict=True))
    block = 16 if most <= 16 else 32 if most <= 32 or dtype == torch.float32 else 64  # 64 in float32 spills
    chunks = [(i, r, min(r + block, b)) for i, (a, b) in enumerate(pairwise(layout.ranks)) for r in range(a, b, block)]
    made = (torch.tensor(each, dtype=torch.int32, device=device) for each in
            (layout.slices, tiles, layout.used, roots, chunks))
    align = 1 if any(edge % 16 for edge in layout.ranks + layout.cuts + layout.used) else 16
    return Tables(*made, block, align, tuple(spans))


def forward_triton(y: Tensor, h: Tensor, stack: tuple[Tensor, Tensor, Tensor], gate: Tensor | None, strengths: Tensor,
                   offset: Tensor | None, layout: Layout, compete: bool) -> tuple[Tensor, Tensor]:
    (B, root, mean), table = stack, tables(layout, y.device, y.dtype)
    (M, O), N, S = y.shape, len(layout.ranks) - 1, len(layout.slices) - 1
    out, stats = torch.empty(y.shape, dtype=y.dtype, device=y.device), root.new_empty(0)
    if gate is not None:
        stats = root.new_empty(S, N + 1, 2, M)
        launch(base_statistics, lambda BM: (triton.cdiv(M, BM), S), y, stats, table.slices, y.stride(0), M, N, WIDE=1024)
        launch(lora_statistics, lambda BM: (triton.cdiv(M, BM), S * N), h, root, mean, stats, table.roots, h.stride(0), M,
               h.shape[1], N, BR=16)
    launch(apply, lambda BM: (triton.cdiv(M, BM), len(table.tiles)), y, h, B, out, stats if gate is None else gate, stats,
           strengths, stats if offset is None else offset, table.tiles, table.ranges, y.stride(0), h.stride(0), M, O, N, S,
           M if offset is None else M // len(offset), GATED=gate is not None, COMPETE=compete, OFFSET=offset is not None,
           FAST=fast(y), BN=BN, BR=table.block, ALIGN=table.align)
    return out, stats


def backward_triton(grad: Tensor, y: Tensor, h: Tensor, B: Tensor, stats: Tensor, gate: Tensor, strengths: Tensor,
                    offset: Tensor | None, layout: Layout, compete: bool, for_B: bool) -> tuple[Tensor, ...]:
    table, (M, O), N, S = tables(layout, y.device, y.dtype), y.shape, len(layout.ranks) - 1, len(layout.slices) - 1
    tiles, tokens = len(table.tiles), M if offset is None else M // len(offset)
    dy = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    by_row = stats.new_empty(tiles, N + 1, 3, M)
    by_column = stats.new_empty(triton.cdiv(M, blocks("sweep", y.dtype)[0]), 6, O)
    lse, mixed = (stats.new_empty(M, O) for _ in range(2)) if compete else (stats, stats)
    sizes, off = (M, O, N, S, tokens), stats if offset is None else offset
    how = {"COMPETE": compete, "OFFSET": offset is not None, "FAST": fast(y), "BN": BN, "BR": table.block,
           "ALIGN": table.align}
    strides = y.stride(0), h.stride(0), grad.stride(0)
    launch(sweep, lambda BM: (triton.cdiv(M, BM), tiles), y, h, B, grad, gate, stats, strengths, off, table.tiles,
           table.ranges, dy, by_row, by_column, lse, mixed, *strides, *sizes, **how)
    by_row[:, 0, 2] = 0  # the base has no dz
    sums = torch.stack([by_row[first:last].sum(0) for first, last in table.spans])            # (S, N + 1, 3, M)
    means = (sums[:, :, :2] / table.slices.diff().view(-1, 1, 1, 1)).contiguous()
    launch(finish, lambda BM: (triton.cdiv(M, BM), tiles), y, dy, stats, means, table.tiles, y.stride(0), M, O, N, BN=BN,
           ALIGN=table.align)
    dh = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    given = y, h, B, grad, gate, stats, means, strengths, off, table.tiles, table.ranges, table.chunks, lse, mixed
    launch(rank_gradient, lambda BM: (triton.cdiv(M, BM), len(table.chunks)), *given, dh, *strides, *sizes, h.shape[1],
           tiles, **how)
    dB = B.new_empty(B.shape if for_B else 0)
    if for_B:
        launch(factor_gradient, lambda BM: (tiles, len(table.chunks)), *given, dB, *strides, *sizes, **how)
    doffset = gate.new_empty(0)
    if offset is not None:
        doffset = sums[:, 1:, 2].unflatten(-1, (len(offset), tokens)).sum(-1).permute(2, 1, 0).contiguous()   # (B, N, S)
    return dy, dh, dB, by_column.sum(0), doffset


def blocks(name: str, dtype: torch.dtype) -> tuple[int, int, int]:
    """Rows, warps and stages. In float32 products are made without the matrix unit: half the rows, `sweep` by more warps."""
    rows, warps, stages = BLOCKS[name]
    if dtype == torch.float32 and rows == 32:
        return 16, 16 if name == "sweep" else warps, stages
    return rows, warps, stages


def launch(kernel: Callable, grid: Callable[[int], tuple[int, int]], *args: object, **constants: object) -> None:
    rows, warps, stages = blocks(kernel.__name__, args[0].dtype)
    kernel[grid(rows)](*args, BM=rows, num_warps=warps, num_stages=stages, **constants)


def fast(y: Tensor) -> bool:
    """Whether the card's own tanh is good enough."""
    return y.dtype != torch.float32 and y.is_cuda and torch.version.hip is None


def configurations() -> Iterator[tuple[str, Callable, dict[str, str], dict[str, object], int, int]]:
    """What is to compile without spills: name, kernel, signature, constants, warps, stages."""
    if triton is None:
        return
    for (dtype, block), compete in product((("bf16", 16), ("bf16", 64), ("fp32", 16), ("fp32", 32)), (False, True)):
        own = {"y_ptr", "h_ptr", "B_ptr", "out_ptr", "grad_ptr", "t_ptr", "dh_ptr", "dB_ptr"}
        tables = {"slices_ptr", "tiles_ptr", "ranges_ptr", "roots_ptr", "chunks_ptr"}
        for kernel in (base_statistics, lora_statistics, apply, sweep, finish, rank_gradient, factor_gradient):
            rows, warps, stages = blocks(kernel.__name__, torch.float32 if dtype == "fp32" else torch.bfloat16)
            constants = {"GATED": True, "COMPETE": compete, "OFFSET": True, "FAST": dtype == "bf16", "BM": rows, "BN": BN,
                         "BR": block, "WIDE": 1024, "ALIGN": 16}
            constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
            ranked = "BR" in constants and kernel is not lora_statistics
            if (compete and "COMPETE" not in constants) or (block != 16 and not ranked):
                continue  # the same again, or never launched so
            signature = {name: "constexpr" if name in constants else f"*{dtype}" if name in own else "*i32" if name in tables
                         else "*fp32" if name.endswith("_ptr") else "i32" for name in kernel.arg_names}
            yield (f"{kernel.__name__} {dtype} {block}{' compete' * compete}", kernel, signature, constants, warps, stages)


# The torch ops: what torch.compile, checkpointing and meta tensors see.

def fused(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels run there."""
    return triton is not None and (device.type == "cuda" or INTERPRETED) and dtype != torch.float64


@torch.library.custom_op("minflux::gated_lora", mutates_args=())
def _forward(y: Tensor, h: Tensor, B: Tensor, root: Tensor, mean: Tensor, gate: Tensor | None, strengths: Tensor,
             offset: Tensor | None, slices: Sequence[int], ranks: Sequence[int], cuts: Sequence[int], used: Sequence[int],
             compete: bool) -> tuple[Tensor, Tensor]:
    run = forward_triton if fused(y.device, y.dtype) else forward_torch
    return run(y, h, (B, root, mean), gate, strengths, offset, Layout(*map(tuple, (slices, ranks, cuts, used))), compete)


@_forward.register_fake
def _(y, h, B, root, mean, gate, strengths, offset, slices, ranks, cuts, used, compete):
    shape = (0,) if gate is None else (len(slices) - 1, len(ranks), 2, y.shape[0])
    return y.new_empty(tuple(y.shape)), root.new_empty(shape)


@torch.library.custom_op("minflux::gated_lora_backward", mutates_args=())
def _backward(grad: Tensor, y: Tensor, h: Tensor, B: Tensor, stats: Tensor, gate: Tensor, strengths: Tensor,
              offset: Tensor | None, slices: Sequence[int], ranks: Sequence[int], cuts: Sequence[int], used: Sequence[int],
              compete: bool, for_B: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    run = backward_triton if fused(y.device, y.dtype) else backward_torch
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    layout = Layout(*map(tuple, (slices, ranks, cuts, used)))
    return run(grad, y, h, B, stats, gate, strengths, offset, layout, compete, for_B)


@_backward.register_fake
def _(grad, y, h, B, stats, gate, strengths, offset, slices, ranks, cuts, used, compete, for_B):
    def like(x: Tensor) -> Tensor:
        return x.new_empty(tuple(x.shape))
    nothing = stats.new_empty(0)
    return (like(y), like(h), like(B) if for_B else B.new_empty(0), like(gate),
            nothing if offset is None else like(offset))


def _save(ctx, inputs, output):
    y, h, B, _, _, gate, strengths, offset, *ctx.layout, ctx.compete = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(None if gate is None else y, h, B, output[1], gate, strengths, offset)


def _differentiate(ctx, grad, _):
    y, h, B, stats, gate, strengths, offset = ctx.saved_tensors
    _, for_h, for_B, *_ = ctx.needs_input_grad
    dh = dB = dgate = doffset = None
    if gate is None:  # out = y + h (s B): two products
        count = len(ctx.layout[1]) - 1
        of_rank = torch.cat([strengths[i].expand(ctx.layout[1][i + 1] - ctx.layout[1][i]) for i in range(count)]).to(grad)
        dy, dh = grad, (grad @ B.T) * of_rank if for_h else None
        dB = of_rank[:, None] * (h.T @ grad) if for_B else None
    else:
        dy, dh, dB, dgate, doffset = _backward(grad, y, h, B, stats, gate, strengths, offset, *ctx.layout, ctx.compete,
                                               for_B)
    return (dy, dh, dB if for_B else None, None, None, dgate, None, None if offset is None else doffset, *[None] * 5)


_forward.register_autograd(_differentiate, setup_context=_save)


# What is called.

class Joined(NamedTuple):
    """A plain layer's W and the A of all its LoRAs as the rows of one matrix (O + R, K), and the bias over both."""

    weight: Tensor
    bias: Tensor | None


def join(weight: Tensor, bias: Tensor | None, loras: Stack) -> Joined:
    """Copies W: only for a layer whose own weight then becomes the first O rows of this."""
    A = loras.A.to(weight)
    return Joined(torch.cat((weight, A)), None if bias is None else torch.cat((bias, bias.new_zeros(len(A)))))


def add_loras(y: Tensor, h: Tensor, loras: Stack, gate: Tensor | None = None, strengths: Tensor | None = None,
              offset: Tensor | None = None, compete: bool = False) -> Tensor:
    """y (..., O) = W x + bias, h (..., R) = A x -> out (..., O). Any row stride.

    gate: (6, O) of `fold`, or None for the plain sum. strengths (N,) and offset (B, N, slices), B the first dimension of y,
    are of all LoRAs that were stacked, also of those that lack this layer. There is no gradient for strengths.
    """
    if y.numel() == 0:
        return y
    wide, layout = loras.root.dtype, loras.layout
    count = len(layout.ranks) - 1
    if strengths is None:
        strengths = torch.ones(count, dtype=wide, device=y.device)
    else:
        assert not strengths.requires_grad, "strengths have no gradient: learn k0 and k1 instead"
        strengths = strengths.to(y.device, wide)
        strengths = strengths if loras.present is None else strengths[loras.present]
    assert gate is None or loras.root.numel(), "stacked with gated=False"
    if offset is not None:
        offset = (offset if loras.present is None else offset[:, loras.present]).to(wide).contiguous()
        assert gate is not None and offset.shape == (len(y), count, len(layout.slices) - 1), offset.shape
    assert strengths.shape == (count,) and y.shape[-1] == layout.slices[-1] and h.shape[-1] == layout.ranks[-1], y.shape
    rows, h = y.reshape(-1, y.shape[-1]), h.to(y.dtype).reshape(-1, h.shape[-1])
    rows, h = (part if part.stride(-1) == 1 else part.contiguous() for part in (rows, h))
    gate = None if gate is None else gate.to(wide)
    out, _ = _forward(rows, h, loras.B.to(y.dtype), loras.root, loras.mean, gate, strengths, offset, *layout, compete)
    return out.view(y.shape)


def gated_lora_linear(x: Tensor, base: Callable[[Tensor], Tensor] | Joined, loras: Stack | None, gate: Tensor | None = None,
                      strengths: Tensor | None = None, offset: Tensor | None = None, compete: bool = False) -> Tensor:
    """x (..., K) -> (..., O). base: the linear layer, stored in any form, or joined with the A of `loras`."""
    if isinstance(base, Joined):
        assert loras is not None, "joined with the LoRAs"
        y, h = F.linear(x, base.weight, base.bias).split((loras.layout.slices[-1], loras.layout.ranks[-1]), dim=-1)
    else:
        y = base(x)
        if loras is None:
            return y
        h = F.linear(x, loras.A.to(x.dtype))
    return add_loras(y, h, loras, gate, strengths, offset, compete)
