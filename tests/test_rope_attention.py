"""kernels/rope_attention.py: the reference against the release's steps, the kernels against the reference in float64.

Kernels run in Triton's interpreter, on the CPU, which must be asked for before Triton is imported: one test here starts
pytest on this file in a process of its own. The interpreter is wrong in bfloat16, so that is not tested without a card.
"""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from flux import attention, layers
from flux.config import TINY
from flux.errors import UserError
from flux.layers import QKNorm
from flux.model import Flux
from kernels import compile_check, gated_lora_linear, rope_attention, runtime
from kernels.rope_attention import norm_rope_reference, reference, why_not, with_lse
from lora.adapter import Adapter, LowRank
from lora.inject import Loras

needs_triton = pytest.mark.skipif(runtime.triton is None, reason="triton is not installed")
interpreted = pytest.mark.skipif(not runtime.INTERPRETED, reason="runs under TRITON_INTERPRET=1, in the process that "
                                 "test_in_the_interpreter starts")


def error(actual, expected) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


def inputs(length: int, width: int, dtype=torch.float32, batch: int = 1, heads: int = 2, streams: int = 2):
    """q, k, v as views of one projection, NaN past its last token; two scales near 1; the rotary table; where text ends."""
    g = torch.Generator().manual_seed(length)
    joined = torch.full((batch, length + 3, 3, heads, width), math.nan)
    joined[:, :length] = torch.randn(batch, length, 3, heads, width, generator=g)
    q, k, v = joined.to(dtype)[:, :length].unbind(2)
    scales = [(1 + 0.2 * torch.randn(streams, width, generator=g)).to(dtype) for _ in range(2)]
    ids = torch.randint(60, (1, length, 3), generator=g)
    pe = attention.rotary_table(ids, (width // 4, 3 * width // 8, 3 * width // 8), 10_000)
    return [x.requires_grad_() for x in (q.detach(), k.detach(), v.detach(), *scales)], pe, length // 3


def chain(q, k, v, q_scale, k_scale, pe, split):
    """What eager PyTorch does in this dtype, as in the release."""
    parts = []
    for x, scale in ((q, q_scale), (k, k_scale)):
        pair = zip(x.split((split, x.shape[1] - split), dim=1), scale, strict=True) if len(scale) == 2 else [(x, scale[0])]
        normed = torch.cat([F.rms_norm(part.float(), one.shape, eps=1e-6).to(x.dtype) * one for part, one in pair], dim=1)
        parts.append(attention.rotate(normed, pe))
    return attention.attention(*parts, v, pe[:, :1] * 0 + 1).unflatten(-1, q.shape[2:])


def masks(length: int, heads: int = 2):
    """Some keys unseen by all; some pairs by a bias of -inf, and one row sees nothing."""
    g = torch.Generator().manual_seed(0)
    key_mask = torch.rand(1, length, generator=g) < 0.8
    bias = torch.randn(1, heads, length, length, generator=g)
    bias[torch.rand(bias.shape, generator=g) < 0.3] = -math.inf
    bias[:, 0, length // 2] = -math.inf
    return key_mask, bias


# Anywhere.

@pytest.mark.parametrize("streams", (1, 2))
def test_the_reference_is_the_chain(streams):
    given, pe, split = inputs(13, 32, torch.float64, batch=2, streams=streams)
    out, lse = reference(*given, pe, split)
    assert error(chain(*given, pe, split), out) < 1e-6  # the chain normalises in float32
    q, k = (norm_rope_reference(x, scale, pe, split) for x, scale in zip(given[:2], given[3:], strict=True))
    assert error(rope_attention.sdpa(q, k, given[2]), out) < 1e-12
    logits = torch.einsum("blhe,bmhe->bhlm", q, k) / math.sqrt(32)
    assert error(logits.exp().sum(-1).log(), lse) < 1e-12


def test_gradients_of_the_reference_by_differences():
    """Of out and lse, for q, k, v and both norm scales, under a mask and a bias."""
    given, pe, split = inputs(3, 16, torch.float64, heads=1)
    key_mask, bias = torch.tensor([[True, False, True]]), torch.randn(1, 1, 3, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *given: reference(*given, pe, split, key_mask, bias), given)


def test_masks_of_the_reference_are_those_of_torch():
    (q, k, v, *scales), pe, split = inputs(13, 32, torch.float64)
    key_mask, bias = masks(13)
    for mask, added in ((key_mask, None), (None, bias), (key_mask, bias)):
        ours, lse = reference(q, k, v, *scales, pe, split, mask, added)
        theirs = rope_attention.rope_attention(q, k, v, *scales, pe, split, mask, added)
        assert error(theirs, ours.detach()) < 1e-12
        assert torch.isfinite(ours).all() and (lse == -math.inf).any() == (added is not None)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_attention_of_torch_keeps_our_layout(dtype):
    (q, k, v, *_), _, _ = inputs(13, 32, dtype)
    assert rope_attention.sdpa(q, k, v).is_contiguous()


@pytest.mark.skipif(runtime.INTERPRETED, reason="the interpreter runs kernels on the CPU")
def test_a_machine_without_a_card_takes_the_reference():
    given, pe, split = inputs(13, 32)
    assert why_not(torch.device("cpu"), torch.float32, 32)
    assert error(with_lse(*given, pe, split)[0], reference(*given, pe, split)[0].double()) == 0
    assert error(rope_attention.rope_attention(*given, pe, split), reference(*given, pe, split)[0].double()) < 1e-6
    with pytest.raises(ValueError, match="take auto"):
        rope_attention.rope_attention(*given, pe, split, way="triton")
    with pytest.raises(UserError, match="take --attention auto"):
        attention.choose(Flux(TINY), "triton", torch.device("cpu"), torch.float32)


def test_what_the_kernels_do_not_take_is_said():
    assert "float64" in why_not(torch.device("cpu"), torch.float64, 32) or runtime.triton is None
    assert why_not(torch.device("cpu"), torch.float32, 80)


@needs_triton
def test_outputs_have_shapes_before_they_exist():
    """What torch.compile and meta tensors see."""
    with torch.device("meta"):
        q, scale, table = torch.empty(2, 5, 3, 32, dtype=torch.float16), torch.empty(1, 32), torch.empty(1, 5, 16, 2)
        out, lse = rope_attention.attention(q, q, q, scale, scale, table, 0, None, None)
        assert out.shape == q.shape and out.dtype == q.dtype and lse.shape == (2, 3, 5) and lse.dtype == torch.float32
        assert rope_attention.norm_rope(q, scale, table, 0, 1.0).shape == q.shape


@needs_triton
@pytest.mark.skipif(runtime.INTERPRETED, reason="interpreted kernels are not compiled")
def test_a_kernel_compiles_without_a_card():
    """One of them; python -m kernels.compile_check does all."""
    job = next(compile_check.jobs("rope_attention", "norm_rope_kernel bf16 E128", 90))
    result = compile_check.build(job)
    assert not result.fault and 0 < result.registers < 256, result


@needs_triton
@pytest.mark.skipif(runtime.INTERPRETED, reason="this is that process")
@pytest.mark.interpreted("test_kernel_")
def test_in_the_interpreter(interpreted):
    status, said = interpreted
    assert status == 0, said


# In the interpreter.

@pytest.fixture
def poison(monkeypatch):
    """Fresh memory holds NaN: outputs and scratch that a kernel leaves unwritten are seen."""
    fresh = torch.Tensor.new_empty

    def poisoned(*args, **kwargs):
        memory = fresh(*args, **kwargs)
        return memory.fill_(math.nan) if memory.is_floating_point() else memory

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


@interpreted
@pytest.mark.parametrize(("length", "width", "dtype", "streams"), [
    (1, 32, torch.float16, 1), (63, 64, torch.float32, 2), (100, 128, torch.float16, 2), (257, 32, torch.float32, 1),
    (257, 128, torch.float16, 2)])
def test_kernel_errs_as_the_chain(length, width, dtype, streams, poison):
    """Forward and backward at most 1.5 times as far from float64 as eager PyTorch in the same dtype, by both ways."""
    given, pe, split = inputs(length, width, dtype, batch=1 + (length < 100), streams=streams)
    exact = [x.detach().double().requires_grad_() for x in given]
    weight = torch.randn(given[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)

    def all_of(function, given):
        out = function(*given, pe, split)
        return [out, *torch.autograd.grad((out * weight.to(out.dtype)).sum(), given)]

    expected = [x.detach() for x in all_of(lambda *given: reference(*given)[0], exact)]
    eager = all_of(chain, given)
    for way in ("triton", "sdpa"):
        ours = all_of(lambda *given, way=way: rope_attention.rope_attention(*given, way=way), given)
        names = ("out", "dq", "dk", "dv", "dq_scale", "dk_scale")
        for name, a, b, c in zip(names, ours, eager, expected, strict=True):
            assert a.dtype == dtype and torch.isfinite(a).all(), name
            if c.norm() > 1e-6:  # with one key, q and k have no gradient
                limit = 1.5 * error(b, c) + 1e-7
                assert error(a, c) <= limit, f"{way} {name}: {error(a, c):.2g} above {limit:.2g}"


@interpreted
def test_kernel_sees_masks_and_gives_the_sum_of_exponentials(poison):
    given, pe, split = inputs(63, 32)
    key_mask, bias = masks(63)
    exact = [x.detach().double().requires_grad_() for x in given]
    for mask, added in ((key_mask, None), (key_mask, bias)):
        out, lse = with_lse(*given, pe, split, mask, added)
        out64, lse64 = reference(*exact, pe, split, mask, added)
        assert error(out, out64.detach()) < 5e-6
        seen = lse64 > -math.inf
        assert torch.equal(lse > -math.inf, seen) and (lse - lse64)[seen].abs().max() < 5e-6
        weights = torch.randn(out.shape), torch.randn(lse.shape) * 0.1
        grads = [torch.autograd.grad((o * weights[0].to(o)).sum() + (ls[seen] * weights[1].to(o)[seen]).sum(), leaves)
                 for o, ls, leaves in ((out, lse, given), (out64, lse64, exact))]
        for name, a, b in zip(("dq", "dk", "dv", "dq_scale", "dk_scale"), *grads, strict=True):
            assert error(a, b) < 1e-5, name


@interpreted
def test_kernel_takes_peaked_logits_and_gives_the_same_bits_twice():
    (q, k, v, q_scale, k_scale), pe, split = inputs(63, 32)
    given = q, k, v, 8 * q_scale, k_scale
    out, lse = with_lse(*given, pe, split)
    assert error(out, reference(*(x.detach().double() for x in given), pe, split)[0]) < 2e-5
    again = with_lse(*given, pe, split)
    assert torch.equal(out, again[0]) and torch.equal(lse, again[1])


@interpreted
def test_kernel_takes_nothing():
    given, pe, split = inputs(4, 32, batch=0)
    out = rope_attention.rope_attention(*given, pe, split, way="triton")
    assert out.shape == (0, 4, 2, 32)
    assert all((grad == 0).all() for grad in torch.autograd.grad(out.sum(), given))


@interpreted
def test_kernel_operations_are_known_to_torch():
    (q, k, v, q_scale, k_scale), pe, split = inputs(3, 32, heads=1)
    table = rope_attention._real(pe)
    torch.library.opcheck(rope_attention.norm_rope, (q, q_scale, table, split, 1.0))
    torch.library.opcheck(rope_attention.attention, (q, k, v, q_scale, k_scale, table, split, None, None))


@interpreted
@pytest.mark.parametrize("way", ("triton", "sdpa"))
def test_kernel_inside_compiled_and_checkpointed_blocks(way):
    """With a LoRA beside a layer of each, so both kernels in one graph. fullgraph, forward and backward; a block that is
    computed again gives the same gradients; all near the plain chain."""
    torch.manual_seed(0)
    config = replace(TINY, hidden_size=64, axes_dim=(8, 12, 12))
    double, single = layers.DoubleStreamBlock(config), layers.SingleStreamBlock(config)
    double.attention_way = single.attention_way = way
    for block, layer in ((double, "img_attn.qkv"), (single, "linear1")):
        factors = torch.randn(3, 64), torch.randn(block.get_submodule(layer).out_features, 3)
        Loras(block).attach("it", Adapter({layer: (LowRank(*factors, 0.1),)}), 0.5)
        assert block.get_submodule(layer).plan.beside is not None  # that is: the kernel's
    img, txt, vec = torch.randn(1, 5, 64), torch.randn(1, 2, 64), torch.randn(1, 64)
    pe = attention.rotary_table(torch.randint(9, (1, 7, 3)), config.axes_dim, config.theta)

    def blocks(img, txt):
        return single(torch.cat(double(img, txt, vec, pe), dim=1), vec, pe)

    def gradients(function):
        x = img.clone().requires_grad_()
        out = function(x, txt)
        return out.detach(), *torch.autograd.grad(out.square().sum(), [x, *double.parameters(), *single.parameters()],
                                                  allow_unused=True)

    eager = gradients(blocks)
    compiled = gradients(torch.compile(blocks, fullgraph=True, backend="aot_eager"))
    again = gradients(lambda img, txt: checkpoint(blocks, img, txt, use_reentrant=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "why_not", lambda *_: "not now")
        patch.setattr(gated_lora_linear, "fused", lambda *_: False)
        double.attention_way = single.attention_way = "auto"
        plain = gradients(blocks)
    for a, b, c, d in zip(eager, compiled, again, plain, strict=True):
        if a is not None:
            torch.testing.assert_close(b, a)
            torch.testing.assert_close(c, a)
            torch.testing.assert_close(d, a, rtol=1e-4, atol=1e-5)


def test_norms_as_parameters_of_the_block():
    """flux/attention.py gives each stream its own norm."""
    torch.manual_seed(0)
    norms = [QKNorm(32), QKNorm(32)]
    for norm in norms:
        for p in norm.parameters():
            p.data += 0.3 * torch.randn(32)
    (q, k, v, *_), pe, split = inputs(12, 32)
    scales = [torch.stack([getattr(norm, name).scale for norm in norms]) for name in ("query_norm", "key_norm")]
    expected = reference(q, k, v, *scales, pe, split)[0]
    assert error(attention.attention(q, k, v, pe, norms, split), expected.flatten(2).double()) < 1e-6
