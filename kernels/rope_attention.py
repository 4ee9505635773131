"""RMSNorm of q and k, rotary positions, softmax attention: what FLUX does between its qkv projection and the next linear.

Per token and head of width E, with gamma the norm's scale and a the angles of the token's position:

    rho(x) = 1 / sqrt(mean(x^2) + 1e-6)                      q_hat = q rho(q)        qn = gamma q_hat
    q' = rotation of the pairs (qn_0, qn_1), (qn_2, qn_3), ...:      (x, y) -> (x cos a - y sin a, x sin a + y cos a)
    out = softmax(q' k'^T / sqrt(E) + bias) v                lse = log sum exp of a row of these logits

and backwards, with P = exp(logits - lse) formed again instead of stored:

    delta = rowsum(dout out) - dlse     dv = P^T dout     dS = P (dout v^T - delta)     dq' = dS k' / sqrt(E)     dk' alike
    dqn = dq' turned back (by -a)        dgamma = sum over tokens and heads of dqn q_hat
    w = gamma dqn                        dq = rho (w - q_hat mean(w q_hat))

Text and image tokens have their own gamma in a double block: scales are (S, E), and tokens from `split` on take the last.
Everything is (B, L, H, E) in memory, any stride but the last, as a projection writes it and as the next linear reads it.
Arithmetic is float32; q', k', P and dS are rounded to the input's dtype where they enter the matrix unit.

Two ways on a GPU. `sdpa`: a pre-pass kernel writes q' and k', then torch's own attention runs, cuDNN's on Hopper, where
others found it nearly twice as fast as flash (github.com/huggingface/transformers/pull/48163), flash elsewhere. `triton`:
the pre-pass for k alone, as the kernel would repeat it for each block of queries; q in the prologue of our attention kernel.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import runtime
from kernels.runtime import jit, tl, triton

EPS = 1e-6  # of the norm; written out in the kernels
LOG2E = math.log2(math.e)  # exp(x) = exp2(x LOG2E), and the card has exp2

# The reference.


def norm_rope_reference(x: Tensor, scale: Tensor, pe: Tensor, split: int = 0) -> Tensor:
    """x (B, L, H, E), scale (S, E), pe (B or 1, L, 1, E/2) complex -> normalised and turned, rounded once at the end."""
    if len(scale) == 2:
        halves = ((x[:, :split], scale[:1], pe[:, :split]), (x[:, split:], scale[1:], pe[:, split:]))
        return torch.cat([norm_rope_reference(*half) for half in halves], dim=1)
    wide = _wide(x)
    pairs = torch.view_as_complex(F.rms_norm(wide, scale[0].shape, scale[0].to(wide.dtype), EPS).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * pe).flatten(3).to(x.dtype)


def reference(q: Tensor, k: Tensor, v: Tensor, q_scale: Tensor, k_scale: Tensor, pe: Tensor, split: int = 0,
              key_mask: Tensor | None = None, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """out (B, L, H, E) and lse (B, H, L), with the logits written out. A row that may see no key gives zeros and -inf."""
    q, k = norm_rope_reference(q, q_scale, pe, split), norm_rope_reference(k, k_scale, pe, split)
    logits = torch.einsum("blhe,bmhe->bhlm", _wide(q), _wide(k)) / math.sqrt(q.shape[-1])
    if bias is not None:
        logits = logits + bias
    if key_mask is not None:
        logits = logits.masked_fill(~key_mask[:, None, None], -math.inf)
    blind = (logits == -math.inf).all(dim=-1, keepdim=True)
    logits = logits.masked_fill(blind, 0)
    weights = logits.softmax(dim=-1).masked_fill(blind, 0)
    lse = logits.logsumexp(dim=-1).masked_fill(blind[..., 0], -math.inf)
    return torch.einsum("bhlm,bmhe->blhe", weights, _wide(v)).to(v.dtype), lse


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


# What all kernels share. T tokens, x (T, E) float32.


@jit
def _gamma(scale, tokens, split, E: tl.constexpr, STREAMS: tl.constexpr):
    """(S, E) -> (T or 1, E), by the stream of each token."""
    gamma = tl.load(scale + tl.arange(0, E)).to(tl.float32)[None, :]
    if STREAMS == 2:
        last = tl.load(scale + E + tl.arange(0, E)).to(tl.float32)[None, :]
        gamma = tl.where((tokens < split)[:, None], gamma, last)
    return gamma


@jit
def _turn(x, angles, direction, T: tl.constexpr, E: tl.constexpr):
    """Pairs of x turned by angles (T, E), which alternate cosine and sine; direction -1 turns back."""
    even, odd = tl.split(tl.reshape(x, (T, E // 2, 2)))
    cos, sin = tl.split(tl.reshape(angles, (T, E // 2, 2)))
    sin = sin * direction
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (T, E))


@jit
def _norm_rope(x, gamma, angles, T: tl.constexpr, E: tl.constexpr):
    rho = tl.rsqrt(tl.sum(x * x, axis=1) / E + 1e-6)
    return _turn(x * rho[:, None] * gamma, angles, 1.0, T, E)


# Pre-pass: reads x once, writes x' once. For q and k of one layer, 4 B L D elements: 113 MB at L = 4608, D = 3072 in bf16,
# beside the table (4 B L E bytes, 2 MB, once more for each group of heads, from the second-level cache).


@jit
def norm_rope_kernel(x, scale, pe, out, length, heads, split, multiplier, x_b, x_l, x_h, pe_b,
                     E: tl.constexpr, STREAMS: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr):
    """x (B, L, H, E), pe (B or 1, L, E/2, 2) -> out, contiguous. One program: TOKENS tokens, HEADS heads."""
    tokens, e, b = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, E), tl.program_id(2).to(tl.int64)
    at = tokens.to(tl.int64)[:, None]
    angles = tl.load(pe + b * pe_b + at * E + e[None, :], mask=(tokens < length)[:, None], other=0.0)
    gamma = _gamma(scale, tokens, split, E, STREAMS) * multiplier
    for i in tl.static_range(HEADS):
        h = tl.program_id(1) * HEADS + i
        keep, h = (tokens < tl.where(h < heads, length, 0))[:, None], h.to(tl.int64)
        tile = tl.load(x + b * x_b + at * x_l + h * x_h + e[None, :], mask=keep, other=0.0).to(tl.float32)
        tile = _norm_rope(tile, gamma, angles, TOKENS, E)
        tl.store(out + ((b * length + at) * heads + h) * E + e[None, :], tile.to(out.dtype.element_ty), mask=keep)


# Its backward: reads x and dy, writes dx: for q and k 6 B L D elements; rho is formed again. Each program leaves the sums of
# dgamma over its own tokens and heads in `partial` (programs, S, E) float32; torch adds them up, always in one order.


@jit
def norm_rope_backward_kernel(x, dy, scale, pe, dx, partial, length, heads, split, x_b, x_l, x_h, dy_b, dy_l, dy_h, pe_b,
                              E: tl.constexpr, STREAMS: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr):
    tokens, e, b = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, E), tl.program_id(2).to(tl.int64)
    at = tokens.to(tl.int64)[:, None]
    angles = tl.load(pe + b * pe_b + at * E + e[None, :], mask=(tokens < length)[:, None], other=0.0)
    gamma = _gamma(scale, tokens, split, E, STREAMS)
    dgamma = tl.zeros((TOKENS, E), tl.float32)
    for i in tl.static_range(HEADS):
        h = tl.program_id(1) * HEADS + i
        keep, h = (tokens < tl.where(h < heads, length, 0))[:, None], h.to(tl.int64)
        hat = tl.load(x + b * x_b + at * x_l + h * x_h + e[None, :], mask=keep, other=0.0).to(tl.float32)
        rho = tl.rsqrt(tl.sum(hat * hat, axis=1) / E + 1e-6)[:, None]
        hat = hat * rho
        dn = tl.load(dy + b * dy_b + at * dy_l + h * dy_h + e[None, :], mask=keep, other=0.0).to(tl.float32)
        dn = _turn(dn, angles, -1.0, TOKENS, E)
        dgamma += dn * hat
        w = gamma * dn
        w = rho * (w - hat * (tl.sum(w * hat, axis=1) / E)[:, None])
        tl.store(dx + ((b * length + at) * heads + h) * E + e[None, :], w.to(dx.dtype.element_ty), mask=keep)
    program = (b * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    if STREAMS == 2:
        first = (tokens < split)[:, None]
        tl.store(partial + program * 2 * E + e, tl.sum(tl.where(first, dgamma, 0.0), axis=0))
        tl.store(partial + (program * 2 + 1) * E + e, tl.sum(tl.where(first, 0.0, dgamma), axis=0))
    else:
        tl.store(partial + program * E + e, tl.sum(dgamma, axis=0))


# Attention. Logits are kept in base 2: q'' = q' log2(e) / sqrt(E), so that P = exp2(q'' k'^T - max).
# Forward, per head: q and out once, k' and v once per block of queries (from the second-level cache where they fit: those of
# one head are 2.4 MB at L = 4608): 4 B L D elements of memory traffic against 4 B H L^2 E operations.


@jit
def _masked(logits, row, rows, key, keys, length, key_mask, bias, bias_l, RAGGED: tl.constexpr):
    """Base-2 logits of queries row + rows, keys key + keys, with the bias and without keys that are not seen.

    Of rows and keys, which count from 0, one is a column and one a row.
    """
    if bias is not None:
        at = bias + (row + tl.zeros((), tl.int64)) * bias_l + key + (rows * bias_l + keys)
        inside = (row + rows < length) & (key + keys < length)
        logits += tl.load(at, mask=inside, other=0.0).to(tl.float32) * 1.4426950408889634
    if key_mask is not None:
        logits = tl.where(tl.load(key_mask + key + keys, mask=key + keys < length, other=0) != 0, logits, float("-inf"))
    if RAGGED:
        logits = tl.where(key + keys < length, logits, float("-inf"))
    return logits


@jit
def _tile(at, stride, first, length, T: tl.constexpr, E: tl.constexpr, RAGGED: tl.constexpr):
    """T rows of a (L, E) matrix; zeros past its end. int64 for the first row, int32 from there: fewer registers."""
    rows = tl.arange(0, T)
    at = at + (first + tl.zeros((), tl.int64)) * stride + (rows[:, None] * stride + tl.arange(0, E)[None, :])
    if RAGGED:
        tile = tl.load(at, mask=(first + rows < length)[:, None], other=0.0)
    else:
        tile = tl.load(at)
    return tile


@jit
def _put(tile, at, stride, first, length, T: tl.constexpr, E: tl.constexpr):
    """_tile's opposite; nothing is written past the end."""
    rows = tl.arange(0, T)
    at = at + (first + tl.zeros((), tl.int64)) * stride + (rows[:, None] * stride + tl.arange(0, E)[None, :])
    tl.store(at, tile.to(at.dtype.element_ty), mask=(first + rows < length)[:, None])


@jit
def attention_kernel(q, k, v, scale, pe, key_mask, bias, out, lse, length, heads, split, multiplier,
                     q_b, q_l, q_h, v_b, v_l, v_h, pe_b, mask_b, bias_b, bias_h, bias_l,
                     E: tl.constexpr, STREAMS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
                     RAGGED: tl.constexpr, PRECISION: tl.constexpr):
    """Raw q, k' and v -> out (B, L, H, E) contiguous, lse (B, H, L) float32. One program: ROWS queries of one head."""
    first, queries, keys = tl.program_id(0) * ROWS, tl.arange(0, ROWS)[:, None], tl.arange(0, KEYS)[None, :]
    rows = first + tl.arange(0, ROWS)
    b, h = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    x = _tile(q + b * q_b + h * q_h, q_l, first, length, ROWS, E, True).to(tl.float32)
    angles = _tile(pe + b * pe_b, E, first, length, ROWS, E, True)
    x = _norm_rope(x, _gamma(scale, rows, split, E, STREAMS), angles, ROWS, E) * multiplier
    x = x.to(k.dtype.element_ty)
    k += (b * length * heads + h) * E
    v += b * v_b + h * v_h
    if key_mask is not None:
        key_mask += b * mask_b
    if bias is not None:
        bias += b * bias_b + h * bias_h

    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, E), tl.float32)
    for start in range(0, length, KEYS):
        tile = _tile(k, heads * E, start, length, KEYS, E, RAGGED)
        logits = tl.dot(x, tl.trans(tile), input_precision=PRECISION)
        logits = _masked(logits, first, queries, start, keys, length, key_mask, bias, bias_l, RAGGED)
        new = tl.maximum(top, tl.max(logits, axis=1))
        shift = new
        if (key_mask is not None) or (bias is not None):
            shift = tl.where(new == float("-inf"), 0.0, new)  # as long as a row has seen nothing
        p = tl.exp2(logits - shift[:, None])
        fade = tl.exp2(top - shift)
        total = total * fade + tl.sum(p, axis=1)
        tile = _tile(v, v_l, start, length, KEYS, E, RAGGED)
        acc = tl.dot(p.to(tile.dtype), tile, acc * fade[:, None], input_precision=PRECISION)
        top = new

    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    _put(acc, out + (b * length * heads + h) * E, heads * E, first, length, ROWS, E)
    tl.store(lse + (b * heads + h) * length + rows, (top + tl.log2(total)) * 0.6931471805599453, mask=rows < length)


# Backward, first sweep: for a block of queries over all keys, dq' and delta. Reads q'', dout, out, k', v, writes dq':
# 6 B L D elements against 6 B H L^2 E operations. A row that has seen nothing has lse -inf; its P is zero all the same.


@jit
def attention_backward_q_kernel(q, k, v, key_mask, bias, out, do, lse, dlse, delta, dq, length, heads, inverse_root,
                                v_b, v_l, v_h, do_b, do_l, do_h, mask_b, bias_b, bias_h, bias_l,
                                E: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, RAGGED: tl.constexpr,
                                PRECISION: tl.constexpr):
    """q'', k', out contiguous (B, L, H, E); v, do of any stride -> dq' contiguous, delta (B, H, L) float32."""
    first, queries, keys = tl.program_id(0) * ROWS, tl.arange(0, ROWS)[:, None], tl.arange(0, KEYS)[None, :]
    rows = first + tl.arange(0, ROWS)
    b, h = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    here, line, inside = (b * length * heads + h) * E, (b * heads + h) * length + rows, rows < length
    x = _tile(q + here, heads * E, first, length, ROWS, E, True)
    g = _tile(do + b * do_b + h * do_h, do_l, first, length, ROWS, E, True)
    y = _tile(out + here, heads * E, first, length, ROWS, E, True)
    gap = tl.sum(g.to(tl.float32) * y.to(tl.float32), axis=1) - tl.load(dlse + line, mask=inside, other=0.0)
    tl.store(delta + line, gap, mask=inside)
    lse2 = tl.load(lse + line, mask=inside, other=0.0) * 1.4426950408889634
    lse2 = tl.where(lse2 == float("-inf"), 0.0, lse2)
    k += here
    v += b * v_b + h * v_h
    if key_mask is not None:
        key_mask += b * mask_b
    if bias is not None:
        bias += b * bias_b + h * bias_h

    acc = tl.zeros((ROWS, E), tl.float32)
    for start in range(0, length, KEYS):
        tile = _tile(k, heads * E, start, length, KEYS, E, RAGGED)
        logits = tl.dot(x, tl.trans(tile), input_precision=PRECISION)
        logits = _masked(logits, first, queries, start, keys, length, key_mask, bias, bias_l, RAGGED)
        dp = tl.dot(g, tl.trans(_tile(v, v_l, start, length, KEYS, E, RAGGED)), input_precision=PRECISION)
        ds = tl.exp2(logits - lse2[:, None]) * (dp - gap[:, None])
        acc = tl.dot(ds.to(tile.dtype), tile, acc, input_precision=PRECISION)
    _put(acc * inverse_root, dq + here, heads * E, first, length, ROWS, E)


# Second sweep: for a block of keys over all queries, dk' and dv, with P^T in place of P. 6 B L D elements, 8 B H L^2 E
# operations. Queries past the end have dout = delta = 0 and add nothing; keys past the end are not stored.


@jit
def attention_backward_kv_kernel(q, k, v, key_mask, bias, do, lse, delta, dk, dv, length, heads,
                                 v_b, v_l, v_h, do_b, do_l, do_h, mask_b, bias_b, bias_h, bias_l,
                                 E: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, RAGGED: tl.constexpr,
                                PRECISION: tl.constexpr):
    """q'', k' contiguous (B, L, H, E); v, do of any stride -> dk', dv contiguous. One program: KEYS keys of one head."""
    first, queries, keys = tl.program_id(0) * KEYS, tl.arange(0, ROWS)[None, :], tl.arange(0, KEYS)[:, None]
    b, h = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    here, line = (b * length * heads + h) * E, (b * heads + h) * length
    kt = _tile(k + here, heads * E, first, length, KEYS, E, True)
    vt = _tile(v + b * v_b + h * v_h, v_l, first, length, KEYS, E, True)
    do += b * do_b + h * do_h
    if key_mask is not None:
        key_mask += b * mask_b
    if bias is not None:
        bias += b * bias_b + h * bias_h

    dkt = tl.zeros((KEYS, E), tl.float32)
    dvt = tl.zeros((KEYS, E), tl.float32)
    for start in range(0, length, ROWS):
        rows = start + tl.arange(0, ROWS)
        x = _tile(q + here, heads * E, start, length, ROWS, E, RAGGED)
        g = _tile(do, do_l, start, length, ROWS, E, RAGGED)
        lse2 = tl.load(lse + line + rows, mask=rows < length, other=0.0) * 1.4426950408889634
        lse2 = tl.where(lse2 == float("-inf"), 0.0, lse2)
        logits = tl.dot(kt, tl.trans(x), input_precision=PRECISION)                                   # (KEYS, ROWS)
        logits = _masked(logits, start, queries, first, keys, length, key_mask, bias, bias_l, False)
        p = tl.exp2(logits - lse2[None, :])
        dvt = tl.dot(p.to(g.dtype), g, dvt, input_precision=PRECISION)
        gap = tl.load(delta + line + rows, mask=rows < length, other=0.0)
        ds = p * (tl.dot(vt, tl.trans(g), input_precision=PRECISION) - gap[None, :])
        dkt = tl.dot(ds.to(x.dtype), x, dkt, input_precision=PRECISION)
    _put(dkt * 0.6931471805599453, dk + here, heads * E, first, length, KEYS, E)  # q'' carries log2(e)
    _put(dvt, dv + here, heads * E, first, length, KEYS, E)


# Sizes of blocks: rows (queries), keys, warps, stages, by bytes per element and head width E. No card has run them: they are
# what compiles without spills (python -m kernels.compile_check). BLOCKS fit into the 99 KB of shared memory of every card.

TOKENS, HEADS = 16, 4  # of the pre-pass and its backward
PREPASS = {"num_warps": 4, "enable_fp_fusion": True}

HOPPER_BLOCKS = {
    "attention_kernel": {2: {32: (128, 128, 8, 3), 64: (128, 128, 8, 3), 128: (128, 64, 8, 3)},
                         4: {32: (64, 32, 8, 2), 64: (64, 32, 8, 2), 128: (32, 32, 8, 2)}},
    "attention_backward_q_kernel": {2: {32: (128, 64, 8, 2), 64: (128, 64, 8, 2), 128: (128, 64, 8, 2)},
                                    4: {32: (32, 16, 4, 2), 64: (32, 16, 4, 2), 128: (32, 16, 4, 2)}},
    "attention_backward_kv_kernel": {2: {32: (64, 128, 8, 2), 64: (64, 128, 8, 2), 128: (64, 64, 8, 2)},
                                     4: {32: (32, 32, 8, 1), 64: (32, 32, 8, 1), 128: (32, 32, 8, 1)}},
}
BLOCKS = {
    "attention_kernel": {2: {32: (128, 64, 8, 2), 64: (128, 64, 8, 2), 128: (128, 64, 8, 3)},
                         4: HOPPER_BLOCKS["attention_kernel"][4]},
    "attention_backward_q_kernel": {2: {32: (64, 64, 4, 2), 64: (64, 64, 4, 2), 128: (64, 64, 4, 2)},
                                    4: {32: (32, 16, 4, 2), 64: (32, 16, 4, 2), 128: (16, 16, 4, 2)}},
    "attention_backward_kv_kernel": {2: {32: (64, 64, 8, 2), 64: (32, 64, 8, 2), 128: (32, 64, 8, 2)},
                                     4: {32: (32, 32, 8, 1), 64: (32, 32, 4, 1), 128: (32, 32, 8, 1)}},
}


def _options(table: dict, kernel: str, itemsize: int, width: int, length: int, biased: bool) -> dict:
    rows, keys, warps, stages = table[kernel][2 if runtime.INTERPRETED else itemsize][width]
    rows = rows // 2 if biased else rows  # the bias takes registers
    return {"E": width, "ROWS": rows, "KEYS": keys, "RAGGED": length % (rows if "_kv_" in kernel else keys) != 0,
            "PRECISION": "tf32" if itemsize == 2 else "ieee", "num_warps": warps, "num_stages": stages,
            "enable_fp_fusion": True}


# The operations as torch sees them: opaque, with the shapes of their outputs and their gradients. `table` is pe as real
# numbers (B or 1, L, E/2, 2); scales are (S, E).


@torch.library.custom_op("minflux::norm_rope", mutates_args=())
def norm_rope(x: Tensor, scale: Tensor, table: Tensor, split: int, multiplier: float) -> Tensor:
    out = x.new_empty(x.shape)
    if out.numel():
        (_, length, heads, width), grid = x.shape, _prepass_grid(x)
        with runtime.on(x.device):
            norm_rope_kernel[grid](x, scale, table, out, length, heads, split, multiplier, *x.stride()[:3], _batch(table),
                                   E=width, STREAMS=len(scale), TOKENS=TOKENS, HEADS=HEADS, **PREPASS)
    return out


@norm_rope.register_fake
def _(x, scale, table, split, multiplier):
    return x.new_empty(x.shape)


@torch.library.custom_op("minflux::norm_rope_backward", mutates_args=())
def norm_rope_backward(dy: Tensor, x: Tensor, scale: Tensor, table: Tensor, split: int) -> tuple[Tensor, Tensor]:
    """The gradients of norm_rope with multiplier 1."""
    dx, grid = x.new_empty(x.shape), _prepass_grid(x)
    if not dx.numel():
        return dx, torch.zeros_like(scale)
    (_, length, heads, width), dy = x.shape, _dense(dy)
    partial = scale.new_empty(math.prod(grid), len(scale), width, dtype=torch.float32)
    with runtime.on(x.device):
        norm_rope_backward_kernel[grid](x, dy, scale, table, dx, partial, length, heads, split, *x.stride()[:3],
                                        *dy.stride()[:3], _batch(table), E=width, STREAMS=len(scale), TOKENS=TOKENS,
                                        HEADS=HEADS, **PREPASS)
    return dx, partial.sum(dim=0).to(scale.dtype)


@norm_rope_backward.register_fake
def _(dy, x, scale, table, split):
    return x.new_empty(x.shape), scale.new_empty(scale.shape)


def _save_norm_rope(ctx, inputs, output):
    x, scale, table, ctx.split, multiplier = inputs
    assert multiplier == 1
    ctx.save_for_backward(x, scale, table)


def _differentiate_norm_rope(ctx, dy):
    return *norm_rope_backward(dy, *ctx.saved_tensors, ctx.split), None, None, None


norm_rope.register_autograd(_differentiate_norm_rope, setup_context=_save_norm_rope)


@torch.library.custom_op("minflux::rope_attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor, q_scale: Tensor, k_scale: Tensor, table: Tensor, split: int,
              key_mask: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Raw q, k, v -> out (B, L, H, E), lse (B, H, L). Keeps those and out and lse for the backward pass, no q' or k'."""
    out, lse = _outputs(q)
    if out.numel():
        batch, length, heads, width = q.shape
        options = _options(_tiles(q), "attention_kernel", q.itemsize, width, length, bias is not None)
        turned = norm_rope(k, k_scale, table, split, 1.0)
        with runtime.on(q.device):
            attention_kernel[triton.cdiv(length, options["ROWS"]), batch * heads](
                q, turned, v, q_scale, table, key_mask, bias, out, lse, length, heads, split, LOG2E / math.sqrt(width),
                *q.stride()[:3], *v.stride()[:3], _batch(table), *_mask_strides(key_mask, bias), STREAMS=len(q_scale),
                **options)
    return out, lse


@attention.register_fake
def _(q, k, v, q_scale, k_scale, table, split, key_mask, bias):
    return _outputs(q)


@torch.library.custom_op("minflux::rope_attention_backward", mutates_args=())
def attention_backward(dout: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, q_scale: Tensor, k_scale: Tensor,
                       table: Tensor, split: int, key_mask: Tensor | None, bias: Tensor | None, out: Tensor, lse: Tensor
                       ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v and both scales."""
    (batch, length, heads, width), dout, dlse = q.shape, _dense(dout), dlse.contiguous()
    (dq, dk, dv), delta = (out.new_empty(out.shape) for _ in range(3)), lse.new_empty(lse.shape)
    if out.numel():
        x, turned = norm_rope(q, q_scale, table, split, LOG2E / math.sqrt(width)), norm_rope(k, k_scale, table, split, 1.0)
        strides = (*v.stride()[:3], *dout.stride()[:3], *_mask_strides(key_mask, bias))
        with runtime.on(q.device):
            options = _options(_tiles(q), "attention_backward_q_kernel", q.itemsize, width, length, bias is not None)
            attention_backward_q_kernel[triton.cdiv(length, options["ROWS"]), batch * heads](
                x, turned, v, key_mask, bias, out, dout, lse, dlse, delta, dq, length, heads, 1 / math.sqrt(width),
                *strides, **options)
            options = _options(_tiles(q), "attention_backward_kv_kernel", q.itemsize, width, length, bias is not None)
            attention_backward_kv_kernel[triton.cdiv(length, options["KEYS"]), batch * heads](
                x, turned, v, key_mask, bias, dout, lse, delta, dk, dv, length, heads, *strides, **options)
    dq, dq_scale = norm_rope_backward(dq, q, q_scale, table, split)
    dk, dk_scale = norm_rope_backward(dk, k, k_scale, table, split)
    return dq, dk, dv, dq_scale, dk_scale


@attention_backward.register_fake
def _(dout, dlse, q, k, v, q_scale, k_scale, table, split, key_mask, bias, out, lse):
    return *(x.new_empty(x.shape) for x in (q, k, v)), *(x.new_empty(x.shape) for x in (q_scale, k_scale))


def _save_attention(ctx, inputs, output):
    q, k, v, q_scale, k_scale, table, ctx.split, key_mask, bias = inputs
    ctx.save_for_backward(q, k, v, q_scale, k_scale, table, key_mask, bias, *output)


def _differentiate_attention(ctx, dout, dlse):
    q, k, v, q_scale, k_scale, table, key_mask, bias, out, lse = ctx.saved_tensors
    grads = attention_backward(dout, dlse, q, k, v, q_scale, k_scale, table, ctx.split, key_mask, bias, out, lse)
    return *grads, None, None, None, None


attention.register_autograd(_differentiate_attention, setup_context=_save_attention)


def _outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(batch, heads, length, dtype=torch.float32)


def _prepass_grid(x: Tensor) -> tuple[int, int, int]:
    batch, length, heads, _ = x.shape
    return -(-length // TOKENS), -(-heads // HEADS), batch


def _tiles(q: Tensor) -> dict:
    return HOPPER_BLOCKS if runtime.INTERPRETED or runtime.is_hopper(q.device) else BLOCKS


def _batch(x: Tensor) -> int:
    """The stride from sample to sample; 0 where one serves all."""
    return x.stride(0) if len(x) > 1 else 0


def _mask_strides(key_mask: Tensor | None, bias: Tensor | None) -> tuple[int, int, int, int]:
    heads = 0 if bias is None or bias.shape[1] == 1 else bias.stride(1)
    return (0 if key_mask is None else _batch(key_mask), *((0, 0, 0) if bias is None else
                                                          (_batch(bias), heads, bias.stride(2))))


def _dense(x: Tensor) -> Tensor:
    """Kernels take any stride but in the last dimension; gradients of sums come expanded."""
    return x if x.stride(-1) == 1 else x.contiguous()


# The function that picks.

FASTER = {}  # (capability, E): least L at which `triton` is ahead of `sdpa`. Nothing is measured yet, so auto is sdpa.


def rope_attention(q: Tensor, k: Tensor, v: Tensor, q_scale: Tensor, k_scale: Tensor, pe: Tensor, split: int = 0,
                   key_mask: Tensor | None = None, bias: Tensor | None = None, way: str = "auto") -> Tensor:
    """q, k, v (B, L, H, E) as projected, scales (S, E), pe (B or 1, L, 1, E/2) complex -> (B, L, H, E).

    key_mask (B or 1, L) is True where a key is seen; bias (B or 1, H or 1, L, L) is added to the logits, without gradient.
    `way` is auto, sdpa or triton; where our kernels do not run, plain torch does it, but not if triton was asked for.
    """
    fault = why_not(q.device, q.dtype, q.shape[-1])
    if way == "triton" and fault:
        raise ValueError(f"attention by triton: {fault}; take auto")
    if way == "triton" or (way == "auto" and not fault and _triton_is_faster(q)):
        return with_lse(q, k, v, q_scale, k_scale, pe, split, key_mask, bias)[0]
    if fault:
        q, k = norm_rope_reference(q, q_scale, pe, split), norm_rope_reference(k, k_scale, pe, split)
    else:
        table = _real(pe)
        q, k = norm_rope(q, q_scale, table, split, 1.0), norm_rope(k, k_scale, table, split, 1.0)
    return sdpa(q, k, v, key_mask, bias)


def with_lse(q: Tensor, k: Tensor, v: Tensor, q_scale: Tensor, k_scale: Tensor, pe: Tensor, split: int = 0,
             key_mask: Tensor | None = None, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """By our kernels or else the reference: out (B, L, H, E) and lse (B, H, L), which joins attentions to parts."""
    if why_not(q.device, q.dtype, q.shape[-1]):
        return reference(q, k, v, q_scale, k_scale, pe, split, key_mask, bias)
    if key_mask is not None:
        key_mask = key_mask.contiguous().view(torch.uint8)
    if bias is not None:
        bias = _dense(bias)
    return attention(q, k, v, q_scale, k_scale, _real(pe), split, key_mask, bias)


def sdpa(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """torch's attention on (B, L, H, E), which keeps that layout in memory. A mask keeps it from flash."""
    mask = None if key_mask is None else key_mask[:, None, None]
    if bias is not None:
        mask = bias.to(q.dtype) if mask is None else bias.to(q.dtype).masked_fill(~mask, -math.inf)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if runtime.is_hopper(q.device):  # at each call, not once around the model: checkpointing repeats it in the backward pass
        with sdpa_kernel(HOPPER, set_priority=True):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


HOPPER = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def why_not(device: torch.device, dtype: torch.dtype, width: int) -> str:
    """Why our kernels do not run there; empty where they do."""
    return runtime.why_not(device, dtype) or ("" if width in (32, 64, 128) else f"heads are {width} wide, not 32, 64 or 128")


def _triton_is_faster(q: Tensor) -> bool:
    return q.shape[1] >= FASTER.get((runtime.capability(q.device), q.shape[-1]), math.inf)


def _real(pe: Tensor) -> Tensor:
    return torch.view_as_real(pe).squeeze(2).contiguous()


def configurations() -> Iterator[tuple]:
    """For compile_check: every kernel, dtype, head width and table of blocks; in its least form, and with mask and bias."""
    signature = {"heads": "i32", "partial": "*fp32", "multiplier": "fp32", "inverse_root": "fp32", "pe": "*fp32"}
    signature |= dict.fromkeys(("lse", "dlse", "delta"), "*fp32")
    strides = (f"{x}_{axis}" for x in ("x", "dy", "q", "v", "do", "pe", "mask", "bias") for axis in "blh")
    signature |= dict.fromkeys(("length", "split", *strides), "i32:16")
    sizes = [(*kind, width) for kind in (("bf16", 2), ("fp32", 4)) for width in (32, 64, 128)]
    for dtype, itemsize, width in (*sizes, ("fp16", 2, 128)):  # fp16 differs from bf16 in nothing but its instructions
        for kernel in (norm_rope_kernel, norm_rope_backward_kernel):
            constants = {"E": width, "STREAMS": 2, "TOKENS": TOKENS, "HEADS": HEADS}
            yield (f"{kernel.__name__} {dtype} E{width}", kernel, _signature(kernel, signature, constants, dtype), constants,
                   PREPASS["num_warps"], 3)
        for kernel in (attention_kernel, attention_backward_q_kernel, attention_backward_kv_kernel):
            for table, targets in ((HOPPER_BLOCKS, (90,)), (BLOCKS, (80, 89))):
                for ragged, masked in ((0, False), (1, True)):
                    constants = _options(table, kernel.__name__, itemsize, width, ragged, masked) | {"STREAMS": 2}
                    constants |= {} if masked else {"key_mask": None, "bias": None}
                    warps, stages = constants.pop("num_warps"), constants.pop("num_stages")
                    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
                    types = _signature(kernel, signature | {"key_mask": "*u8", "bias": f"*{dtype}"}, constants, dtype)
                    kind = " ragged masked" * masked
                    yield (f"{kernel.__name__} {dtype} E{width}{kind}", kernel, types, constants, warps, stages, targets)


def _signature(kernel, known: dict[str, str], constants: dict, dtype: str) -> dict[str, str]:
    return {name: "constexpr" if name in constants else known.get(name, f"*{dtype}") for name in kernel.arg_names}
