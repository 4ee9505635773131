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
of B's rows there and C = (B - 1 b)^T (B - 1 b) / width, R x R, mu_i = h_i . b and var_i = h_i^T C h_i.

Backward, with g = d loss / d out, a_i = g s_i l_i and each l_i and G_i computed again:

    dz_i = k1 a_i G_i (1 - G_i), or k1 G_i (a_i - sum_j G_j a_j)       dk0 = sum a_i          dk1 = sum G_i a_i
    dc0 = sum dz_i     dc1 = sum dz_i n_b     dc2 = sum dz_i n_i     dc3 = sum dz_i n_i n_b   (over rows and LoRAs)
    dn_b = sum_i dz_i (c1 + c3 n_i)           dn_i = dz_i (c2 + c3 n_b)
    dy   = g + rho_b (dn_b - mean(dn_b) - n_b mean(dn_b n_b))                                 (means over a slice)
    dl_i = g s_i (k0 + k1 G_i) + rho_i (dn_i - mean(dn_i) - n_i mean(dn_i n_i))    dh_i = B_i^T dl_i    dB_i = dl_i h_i^T

The products with W and A stay the library's, so a base stored in 8 bits will do; of a plain one, W and all A can be the
rows of one matrix (`join`), and y and h one product. What is here begins at (y, h).

Here: `fold`, `eager` (the definition, as one would write it), the two torch ops, and `gated_lora_linear`, which is called.
Then gated_lora_stack.py (LoRAs side by side; b and C), gated_lora_torch.py (the pair of functions that runs without a GPU),
gated_lora_forward.py and gated_lora_backward.py (the same in Triton, with the bytes that each kernel moves).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import gated_lora_backward, gated_lora_forward, gated_lora_torch, runtime
from kernels.gated_lora_stack import Layout, Stack, stack  # noqa: F401 - stack for those who call gated_lora_linear
from kernels.gated_lora_torch import EPS

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


# The torch ops: what torch.compile, checkpointing and meta tensors see.

def fused(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels run there."""
    return not runtime.why_not(device, dtype)


@torch.library.custom_op("minflux::gated_lora", mutates_args=())
def _forward(y: Tensor, h: Tensor, B: Tensor, root: Tensor, mean: Tensor, gate: Tensor | None, strengths: Tensor,
             offset: Tensor | None, slices: Sequence[int], ranks: Sequence[int], cuts: Sequence[int], used: Sequence[int],
             compete: bool) -> tuple[Tensor, Tensor]:
    run = (gated_lora_forward if fused(y.device, y.dtype) else gated_lora_torch).forward
    return run(y, h, (B, root, mean), gate, strengths, offset, Layout(*map(tuple, (slices, ranks, cuts, used))), compete)


@_forward.register_fake
def _(y, h, B, root, mean, gate, strengths, offset, slices, ranks, cuts, used, compete):
    shape = (0,) if gate is None else (len(slices) - 1, len(ranks), 2, y.shape[0])
    return y.new_empty(tuple(y.shape)), root.new_empty(shape)


@torch.library.custom_op("minflux::gated_lora_backward", mutates_args=())
def _backward(grad: Tensor, y: Tensor, h: Tensor, B: Tensor, stats: Tensor, gate: Tensor, strengths: Tensor,
              offset: Tensor | None, slices: Sequence[int], ranks: Sequence[int], cuts: Sequence[int], used: Sequence[int],
              compete: bool, for_B: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    run = (gated_lora_backward if fused(y.device, y.dtype) else gated_lora_torch).backward
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
