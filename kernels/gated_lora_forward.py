"""The gated LoRA linear forward, in Triton: y (M, O) and h (M, R) -> statistics, and out (M, O).

Read gated_lora_linear.py first, for the algebra. M rows, O outputs, N LoRAs, S slices, R ranks; a tile is BM rows by BN
outputs in which the same ranks are at work. Statistics, logits, gates and sums are float32; only operands of the matrix
unit and results are of the layer's dtype.

Bytes beside each kernel are those of main memory, for bf16; B, h and F are left out, as programs beside each other read
the same of them, from the cache. Forward in all: 6 M O, of which the statistics' 2 M O from the cache if the product
before has just written it; the eager gate moves about 2 M O for each of some 20 steps per LoRA.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import pairwise, product
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import runtime
from kernels.gated_lora_stack import Layout
from kernels.runtime import jit, tl, triton

BN, BF, WIDE = 64, 16, 1024  # outputs of a tile; ranks of F, and outputs, of which statistics are made at a time
BLOCKS = {  # kernel: rows, warps, stages. What compiles without spills (kernels.compile_check), not yet chosen by a clock
    "base_statistics": (4, 4, 1), "lora_statistics": (64, 4, 1), "apply": (32, 8, 1), "sweep": (32, 8, 1),
    "finish": (32, 4, 1), "rank_gradient": (32, 8, 1), "factor_gradient": (32, 8, 1)}

# What all kernels share: a tile, what is loaded for it, one LoRA's part in it.


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


# Reads y: 2 M O bytes; writes mean and 1 / deviation: 8 M S.


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


# Reads h, 2 M R bytes (once more for each slice, from the cache), writes 8 M N S. 2 M R^2 operations for F h.


@jit
def lora_statistics(h_ptr, root_ptr, mean_ptr, stats_ptr, roots_ptr, h_stride, M, R, N, BM: tl.constexpr, BF: tl.constexpr):
    """Program (rows, slice and LoRA): mu = h . b, and rho from |F h|^2, BF entries of F h at a time."""
    row, lanes, pair = _first_row(BM), tl.arange(0, BM), tl.program_id(1).to(tl.int64)
    inside, s, i = lanes < M - row, pair // N, pair % N
    first, stop, at = tl.load(roots_ptr + 3 * pair), tl.load(roots_ptr + 3 * pair + 1), tl.load(roots_ptr + 3 * pair + 2)
    mean, squares, count = tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32), stop - first
    for k in range(0, count, BF):
        left = k + tl.arange(0, BF)
        Fh = tl.zeros((BM, BF), tl.float32)
        for j in range(0, count, BF):
            right = j + tl.arange(0, BF)
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


# Reads y and 8 M S (N + 1) of statistics, writes out: 4 M O bytes, whatever N. 2 M O R operations for all l_i.


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


# How they are started.


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
    align = 1 if any(edge % 16 for edge in layout.ranks + layout.cuts + layout.used) else 16
    small = most <= 16 or align == 1  # what is not aligned spills above 16, float32 above 32
    block = 16 if small else 32 if most <= 32 or dtype == torch.float32 else 64
    chunks = [(i, r, min(r + block, b)) for i, (a, b) in enumerate(pairwise(layout.ranks)) for r in range(a, b, block)]
    made = (torch.tensor(each, dtype=torch.int32, device=device) for each in
            (layout.slices, tiles, layout.used, roots, chunks))
    return Tables(*made, block, align, tuple(spans))


def blocks(name: str, dtype: torch.dtype, compete: bool) -> tuple[int, int, int]:
    """Rows, warps and stages. In float32 products are made without the matrix unit: half the rows, `sweep` by more warps
    (which spills on sm_80 if LoRAs compete, as half of them do on sm_90 if not)."""
    rows, warps, stages = BLOCKS[name]
    if dtype == torch.float32 and rows == 32:
        return 16, 16 if name == "sweep" and not compete else warps, stages
    return rows, warps, stages


def launch(kernel: Callable, grid: Callable[[int], tuple[int, int]], *args: object, **constants: object) -> None:
    rows, warps, stages = blocks(kernel.__name__, args[0].dtype, constants.get("COMPETE", False))
    with runtime.on(args[0].device):
        kernel[grid(rows)](*args, BM=rows, num_warps=warps, num_stages=stages, **constants)


def fast(y: Tensor) -> bool:
    """Whether the card's own tanh is good enough."""
    return y.dtype != torch.float32 and y.is_cuda


def forward(y: Tensor, h: Tensor, stack: tuple[Tensor, Tensor, Tensor], gate: Tensor | None, strengths: Tensor,
            offset: Tensor | None, layout: Layout, compete: bool) -> tuple[Tensor, Tensor]:
    (B, root, mean), table = stack, tables(layout, y.device, y.dtype)
    (M, O), N, S = y.shape, len(layout.ranks) - 1, len(layout.slices) - 1
    out, stats = torch.empty(y.shape, dtype=y.dtype, device=y.device), root.new_empty(0)
    if gate is not None:
        stats = root.new_empty(S, N + 1, 2, M)
        launch(base_statistics, lambda BM: (triton.cdiv(M, BM), S), y, stats, table.slices, y.stride(0), M, N,
               WIDE=WIDE)
        launch(lora_statistics, lambda BM: (triton.cdiv(M, BM), S * N), h, root, mean, stats, table.roots, h.stride(0), M,
               h.shape[1], N, BF=BF)
    launch(apply, lambda BM: (triton.cdiv(M, BM), len(table.tiles)), y, h, B, out, stats if gate is None else gate, stats,
           strengths, stats if offset is None else offset, table.tiles, table.ranges, y.stride(0), h.stride(0), M, O, N, S,
           M if offset is None else M // len(offset), GATED=gate is not None, COMPETE=compete, OFFSET=offset is not None,
           FAST=fast(y), BN=BN, BR=table.block, ALIGN=table.align)
    return out, stats


def configurations() -> Iterator[tuple[str, Callable, dict[str, str], dict[str, object], int, int]]:
    return described(base_statistics, lora_statistics, apply)


def described(*kernels: Callable) -> Iterator[tuple[str, Callable, dict[str, str], dict[str, object], int, int]]:
    """For compile_check: name, kernel, types of its arguments, constants, warps, stages, in every form that is launched."""
    own = {"y_ptr", "h_ptr", "B_ptr", "out_ptr", "grad_ptr", "t_ptr", "dh_ptr", "dB_ptr"}
    tables = {"slices_ptr", "tiles_ptr", "ranges_ptr", "roots_ptr", "chunks_ptr"}
    sizes = {"y_stride", "h_stride", "grad_stride", "M", "O", "R", "tokens"}
    kinds = (("bf16", 16), ("bf16", 32), ("bf16", 64), ("fp16", 64), ("fp32", 16), ("fp32", 32))
    seen = set()
    for (dtype, block), form in product(kinds, ("", "plain", "unaligned", "compete", "compete unaligned")):
        plain, align = form == "plain", 1 if "unaligned" in form else 16
        if dtype == "fp16" and form or align == 1 and block > 16:
            continue  # fp16 differs from bf16 in nothing but its instructions; the others are not launched
        for kernel in kernels:
            rows, warps, stages = blocks(kernel.__name__, torch.float32 if dtype == "fp32" else torch.bfloat16,
                                         "compete" in form)
            constants = {"GATED": not plain, "COMPETE": "compete" in form, "OFFSET": not plain, "FAST": dtype != "fp32",
                         "BM": rows, "BN": BN, "BR": block, "BF": BF, "WIDE": WIDE, "ALIGN": align}
            constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
            kind = "i32:16" if align == 16 else "i32"
            signature = {name: "constexpr" if name in constants else f"*{dtype}" if name in own else "*i32" if name in tables
                         else "*fp32" if name.endswith("_ptr") else kind if name in sizes else "i32"
                         for name in kernel.arg_names}
            if (same := (kernel.__name__, dtype, kind, *constants.values())) not in seen:
                seen.add(same)
                rank = f"rank {block} " * ("BR" in constants)
                yield f"{kernel.__name__} {dtype} {rank}{form}".strip(), kernel, signature, constants, warps, stages
