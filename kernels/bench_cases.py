"""What `python -m kernels.bench` measures: for each file of kernels its tasks, and who can do them.

Every contender gets the same numbers. Errors are against the definition in float64 on those numbers: for attention of one
head, for the gated linear of a layer with a few rows, as float64 of all would fill a card. Bytes and operations are counted.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import rope_attention
from kernels.gated_lora_linear import Gate, eager, fold, gated_lora_linear, stack

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
            "efficient": SDPBackend.EFFICIENT_ATTENTION}
Work = Callable[[], list[Tensor]]


@dataclass
class Case:
    """One task and those who can do it. `exact` gives the float64 outputs to compare a contender's with."""

    name: str
    dtype: str
    exact: list[Tensor]
    contenders: dict[str, Work]
    bytes: int  # that must be read and written, at least
    operations: int  # of the matrix unit, 2 for a multiply and add
    pick: Callable[[Tensor], Tensor] = lambda x: x  # the part of each output that `exact` holds
    checked: dict[str, Work] = field(default_factory=dict)  # whose outputs are compared, if not those that are timed


def with_gradients(function: Callable, given: list[Tensor], weight: Tensor) -> list[Tensor]:
    """The output, and the gradients of all that is given."""
    given = [x.detach().requires_grad_() for x in given]
    out = function(*given)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), given)]


# Attention.


def turned(x: Tensor, scale: Tensor, pe: Tensor) -> Tensor:
    """Norm and rotation in eager PyTorch, on real numbers so that torch.compile can generate code for it."""
    normed = F.rms_norm(x.float(), scale.shape[1:], eps=1e-6).to(x.dtype) * scale[0]
    even, odd = normed.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = torch.view_as_real(pe).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


def chain(q: Tensor, k: Tensor, v: Tensor, scales: list[Tensor], pe: Tensor) -> Tensor:
    """All of it in eager PyTorch."""
    q, k = (turned(x, scale, pe) for x, scale in zip((q, k), scales, strict=True))
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def before_attention(name: str, dtype: str, q: Tensor, k: Tensor, q_scale: Tensor, k_scale: Tensor, pe: Tensor) -> Case:
    """The pre-pass: q and k read, normalised, turned and written."""
    pairs, table = ((q, q_scale), (k, k_scale)), rope_attention._real(pe)
    exact = [rope_attention.norm_rope_reference(x.detach().double(), scale.detach().double(), pe) for x, scale in pairs]
    ways = {"eager": lambda x, scale: turned(x, scale, pe)}
    if q.is_cuda:
        ways["compiled"] = torch.compile(ways["eager"], dynamic=False)
    if not rope_attention.why_not(q.device, q.dtype, q.shape[-1]):
        ways["ours"] = lambda x, scale: rope_attention.norm_rope(x, scale, table, 0, 1.0)
    return Case(name, dtype, exact, {way: torch.no_grad()(lambda how=how: [how(x, scale) for x, scale in pairs])
                                     for way, how in ways.items()}, 4 * q.numel() * q.itemsize, 0)


def attention_cases(device: torch.device, dtypes: list[str], lengths: list[int]) -> Iterator[Case]:
    batch, heads, width = (1, 24, 128) if device.type == "cuda" else (1, 2, 128)
    for length in lengths or ([1536, 4608, 16896] if device.type == "cuda" else [63]):
        for dtype in dtypes:
            given, pe = attention_inputs(device, DTYPES[dtype], batch, length, heads, width)
            yield before_attention(f"q and k alone {batch}x{length}x{heads}x{width}", dtype, *given[:2], *given[3:], pe)
            weight = torch.randn(batch, length, heads, width, device=device).to(DTYPES[dtype])
            few = [x.detach()[:, :, :1].double() if x.dim() == 4 else x.detach().double() for x in given]
            exact = with_gradients(lambda *x, pe=pe: rope_attention.reference(*x, pe)[0], few, weight[:, :, :1].double())[:4]
            ways = {"eager": lambda q, k, v, *scales, pe=pe: chain(q, k, v, scales, pe)}
            if device.type == "cuda":
                ways["compiled"] = torch.compile(ways["eager"], dynamic=False)
                ways |= {f"pre-pass, {name}": with_backend(backend, pe) for name, backend in BACKENDS.items()}
            ways["auto"] = lambda *x, pe=pe: rope_attention.rope_attention(*x, pe)
            if not rope_attention.why_not(device, DTYPES[dtype], width):
                ways["triton"] = lambda *x, pe=pe: rope_attention.rope_attention(*x, pe, way="triton")
            tensor, product = batch * length * heads * width * given[0].itemsize, 2 * batch * heads * length**2 * width
            for backward in (False, True):
                def contender(function, backward=backward, given=given, weight=weight):
                    if backward:
                        return lambda: with_gradients(function, given, weight)[:4]
                    return lambda: [torch.no_grad()(function)(*given)]
                yield Case(f"attention {batch}x{length}x{heads}x{width}{', forward and backward' * backward}", dtype,
                           exact if backward else exact[:1], {name: contender(way) for name, way in ways.items()},
                           (4 + 8 * backward) * tensor, (2 + 5 * backward) * product, lambda x: x[:, :, :1])


def attention_inputs(device, dtype, batch: int, length: int, heads: int, width: int) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    joined = torch.randn(batch, length, 3, heads, width, device=device, generator=generator).to(dtype)
    scales = [(1 + 0.1 * torch.randn(1, width, device=device, generator=generator)).to(dtype) for _ in range(2)]
    angles = torch.rand(1, length, 1, width // 2, device=device, generator=generator) * 2 * math.pi
    return [x.requires_grad_() for x in (*joined.unbind(2), *scales)], torch.polar(torch.ones_like(angles), angles)


def with_backend(backend: SDPBackend, pe: Tensor) -> Callable:
    def function(q, k, v, *scales):
        table = rope_attention._real(pe)
        q, k = (rope_attention.norm_rope(x, scale, table, 0, 1.0) for x, scale in zip((q, k), scales, strict=True))
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    return function


# The gated LoRA linear: inputs, outputs by slices, ranks. A whole layer from x to its output, and back to x and the gate.

QKV_MLP, MLP = (3072, (3072, 3072, 3072, 12288)), (15360, (3072,))
ON_GPU = [(4608, *QKV_MLP, (16,) * n) for n in (4, 1, 2, 8)] + [
    (4608, *MLP, (16,) * 4), (4608, *QKV_MLP, (32,) * 4), (4608, *QKV_MLP, (64,) * 4), (512, *QKV_MLP, (16,) * 4),
    (4608, 3072, (3072,), (16,) * 4), (4608, 3072, (3072, 3072, 3072), (4, 16, 32, 64)), (4096, 3072, (12288,), (16,) * 4),
    (4096, 12288, (3072,), (16,) * 4)]
ON_CPU = [(100, 192, (96, 96, 96, 384), (16,) * 4), (100, 480, (96,), (16,) * 4), (63, 192, (200,), (4, 9, 16))]
ROWS = 256  # with which errors are computed


@dataclass(frozen=True)
class Layer:
    x: Tensor
    weight: Tensor
    A: list[Tensor]
    B: list[Tensor]
    gate: Gate
    slices: tuple[int, ...]

    def double(self) -> "Layer":
        return Layer(self.x.double(), self.weight.double(), [A.double() for A in self.A], [B.double() for B in self.B],
                     Gate(*(part.double() for part in self.gate[:10])), self.slices)

    def eager(self, x: Tensor, *gate: Tensor) -> Tensor:
        deltas = [F.linear(F.linear(x, A), B) for A, B in zip(self.A, self.B, strict=True)]
        return eager(F.linear(x, self.weight), deltas, Gate(*gate), None, None, self.slices)

    def ways(self) -> dict[str, Callable[..., Tensor]]:
        loras = [[(A, B, 0)] for A, B in zip(self.A, self.B, strict=True)]
        beside = stack(loras, len(self.weight), self.slices, self.x.dtype, self.x.device)

        def plain(x: Tensor, *_: Tensor) -> Tensor:
            return F.linear(x, self.weight)

        out = {"plain linear": plain, "eager": self.eager,
               "ours": lambda x, *gate: gated_lora_linear(x, plain, beside, fold(Gate(*gate)))}
        return out | ({"compiled": torch.compile(self.eager, dynamic=False)} if self.x.is_cuda else {})

    def work(self, how: Callable[..., Tensor], backward: bool) -> Work:
        """The output, or the gradients of x and the gate."""
        given = [self.x, *self.gate[:10]]
        if not backward:
            return lambda: [torch.no_grad()(how)(*given)]
        return lambda: with_gradients(how, given, torch.ones((), dtype=self.x.dtype, device=self.x.device))[1:]


def layer(rows: int, columns: int, slices: tuple[int, ...], ranks: tuple[int, ...], dtype: torch.dtype,
          device: torch.device) -> Layer:
    """Outputs of size 1, LoRAs of a third of it, gates of N(0, 1)."""
    g, out = torch.Generator(device).manual_seed(0), sum(slices)

    def draw(*shape: int, size: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (size * torch.randn(*shape, generator=g, device=device)).to(dtype)

    gate = Gate(*(draw(out, dtype=torch.float32) for _ in range(10)))
    return Layer(draw(1, rows, columns)[0], draw(out, columns, size=columns ** -0.5),
                 [draw(r, columns, size=columns ** -0.5) for r in ranks], [draw(out, r, size=r ** -0.5 / 3) for r in ranks],
                 gate, slices)


def gated_cases(device: torch.device, dtypes: list[str], _lengths: list[int]) -> Iterator[Case]:
    for rows, columns, slices, ranks in ON_GPU if device.type == "cuda" else ON_CPU:
        for dtype in dtypes:
            whole = layer(rows, columns, slices, ranks, DTYPES[dtype], device)
            few = replace(whole, x=whole.x[:ROWS])
            name = f"gated {columns} -> {sum(slices)}, {rows} rows, rank {'+'.join(map(str, ranks))}"
            for backward in (False, True):
                exact = few.double().work(few.double().eager, backward)()
                ways, checks = ({who: each.work(how, backward) for who, how in each.ways().items()} for each in (whole, few))
                checks["plain linear"] = list  # is here for its time: nothing to compare
                if backward:
                    del ways["plain linear"]  # of which the gate is no input
                counts = [counted(rows, columns, sum(slices), sum(ranks), len(ranks), len(slices), whole.x.itemsize, back)
                          for back in (False, True)[:1 + backward]]
                moved, operations = map(sum, zip(*counts, strict=True))
                yield Case(name + ", forward and backward" * backward, dtype, exact, ways, moved, operations, checked=checks)


def counted(rows: int, columns: int, outputs: int, ranks: int, count: int, slices: int, size: int, backward: bool
            ) -> tuple[int, int]:
    """Bytes, those beside each kernel summed up and those of the products with W and A; operations of the matrix unit."""
    moved, stats = size * rows * outputs, 8 * rows * slices * (count + 1)
    products = size * ((outputs + ranks) * columns + rows * columns + rows * (outputs + ranks))
    operations = 2 * rows * (columns * (outputs + ranks) + (3 if backward else 1) * ranks * outputs)
    if not backward:
        return products + 3 * moved + 2 * stats, operations
    sums = 12 * rows * (count + 1) * -(-outputs // 64) + 24 * outputs * -(-rows // 32)
    return products + 8 * moved + 2 * sums + 2 * stats, operations


KERNELS = {"rope_attention": attention_cases, "gated_lora_linear": gated_cases}
