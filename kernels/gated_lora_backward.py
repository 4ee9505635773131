"""The gated LoRA linear backward, in Triton: g = d loss / d out -> the gradients of y, h, the gate, the offset and B.

Read gated_lora_linear.py for the algebra, gated_lora_forward.py for tiles and what one LoRA adds on a tile: all l_i, n_i
and G_i are formed again from y, h and the statistics. `sweep` makes what is summed, `finish` takes the base's norm
into account, `rank_gradient` and `factor_gradient` go over all tiles for dh and dB. Sums over programs are kept apart and
added up in one order, so that two runs give the same bits. Bytes as there: of main memory, for bf16.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kernels.gated_lora_forward import (
    BN,
    _aligned,
    _base,
    _coefficient,
    _first_row,
    _member,
    _moments,
    _read,
    _sigmoid,
    _tile,
    _write,
    blocks,
    described,
    fast,
    launch,
    tables,
)
from kernels.gated_lora_stack import Layout
from kernels.runtime import jit, tl, triton

# Reads y and g, writes t: 6 M O bytes; partial sums by rows 12 M (N + 1) O / BN, and by columns 24 O M / BM. `compete`
# writes 8 M O more, what its softmax needs. 2 M O R operations, twice that for `compete`.


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


# Reads y and t, writes dy: 6 M O bytes.


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


# Reads y and g once for each BR ranks of a LoRA, all but the first time from the second-level cache at best: 4 M O bytes
# and up; writes dh, 2 M R. 4 M O R operations.


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


# The same bytes and operations, and only if B learns; writes dB, 2 R O.


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


# How they are started.


def backward(grad: Tensor, y: Tensor, h: Tensor, B: Tensor, stats: Tensor, gate: Tensor, strengths: Tensor,
             offset: Tensor | None, layout: Layout, compete: bool, for_B: bool) -> tuple[Tensor, ...]:
    table, (M, O), N, S = tables(layout, y.device, y.dtype), y.shape, len(layout.ranks) - 1, len(layout.slices) - 1
    tiles, tokens = len(table.tiles), M if offset is None else M // len(offset)
    dy = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    by_row = stats.new_empty(tiles, N + 1, 3, M)
    by_column = stats.new_empty(triton.cdiv(M, blocks("sweep", y.dtype, compete)[0]), 6, O)
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


def configurations() -> Iterator[tuple[str, Callable, dict[str, str], dict[str, object], int, int]]:
    return described(sweep, finish, rank_gradient, factor_gradient)
