"""Errors and times of the kernels, beside what PyTorch does without them.

    python -m kernels.bench [--dtype bf16 fp32] [--length 1536 4608 16896] [--only rope_attention]

On a GPU the two ceilings of this very card come first, a large copy and a large product, and every row shows its floor: the
bytes it must move over the first or the operations it must do over the second, whichever takes longer. Times are medians of
calls in turn with the other contenders', each with caches flushed before. Without a GPU it prints errors alone; with
TRITON_INTERPRET=1 those of the kernels too, in Triton's interpreter.

One function per file of kernels gives its cases: KERNELS. No GPU has run this yet.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import rope_attention, runtime

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
            "efficient": SDPBackend.EFFICIENT_ATTENTION}


@dataclass
class Case:
    """One task and those who can do it. `exact` gives the float64 outputs to compare the first of a contender's with."""

    name: str
    dtype: str
    exact: list[Tensor]
    pick: Callable[[Tensor], Tensor]  # the part of each output that `exact` holds
    contenders: dict[str, Callable[[], list[Tensor]]]
    bytes: int  # that must be read and written, at least
    operations: int  # of the matrix unit, 2 for a multiply and add


# Attention.


def chain(q, k, v, scales, pe):
    """Norm, rotation and attention in eager PyTorch, on real numbers so that torch.compile can generate code for it."""
    turned = []
    for x, scale in zip((q, k), scales, strict=True):
        normed = F.rms_norm(x.float(), scale.shape[1:], eps=1e-6).to(x.dtype) * scale[0]
        even, odd = normed.float().unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = torch.view_as_real(pe).unbind(-1)
        pairs = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
        turned.append(pairs.flatten(-2).to(x.dtype).transpose(1, 2))
    return F.scaled_dot_product_attention(*turned, v.transpose(1, 2)).transpose(1, 2)


def attention_cases(device: torch.device, dtypes: list[str], lengths: list[int]) -> Iterator[Case]:
    batch, heads, width = (1, 24, 128) if device.type == "cuda" else (1, 2, 128)
    for length in lengths:
        for dtype in dtypes:
            given, pe = attention_inputs(device, DTYPES[dtype], batch, length, heads, width)
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
                           exact if backward else exact[:1], lambda x: x[:, :, :1],
                           {name: contender(function) for name, function in ways.items()},
                           bytes=(4 + 8 * backward) * tensor, operations=(2 + 5 * backward) * product)


def attention_inputs(device, dtype, batch: int, length: int, heads: int, width: int) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    joined = torch.randn(batch, length, 3, heads, width, device=device, generator=generator).to(dtype)
    scales = [(1 + 0.1 * torch.randn(1, width, device=device, generator=generator)).to(dtype) for _ in range(2)]
    angles = torch.rand(1, length, 1, width // 2, device=device, generator=generator) * 2 * math.pi
    return [x.requires_grad_() for x in (*joined.unbind(2), *scales)], torch.polar(torch.ones_like(angles), angles)


def with_backend(backend, pe):
    def function(q, k, v, *scales):
        table = rope_attention._real(pe)
        q, k = (rope_attention.norm_rope(x, scale, table, 0, 1.0) for x, scale in zip((q, k), scales, strict=True))
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    return function


def with_gradients(function, given: list[Tensor], weight: Tensor) -> list[Tensor]:
    given = [x.detach().requires_grad_() for x in given]
    out = function(*given)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), given)]


KERNELS = {"rope_attention": attention_cases}


# Measuring.


def error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


def ceilings(device: torch.device) -> tuple[float, float]:
    """Bytes per second of a large copy, read and written; operations per second of an 8192^3 product in bf16."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device=device).bfloat16() for _ in range(2))
    times = timed({"copy": lambda: target.copy_(source), "product": lambda: a @ b}, device)
    return 2 * source.numel() / median(times["copy"]), 2 * 8192**3 / median(times["product"])


def timed(works: dict[str, Callable], device: torch.device, repeats: int = 20) -> dict[str, list[float]]:
    """Seconds of each, in turn."""
    flush, seconds = torch.empty(1 << 28, dtype=torch.uint8, device=device), {name: [] for name in works}
    for work in works.values():
        for _ in range(3):
            work()
    for _ in range(repeats):
        for name, work in works.items():
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            end.synchronize()
            seconds[name].append(start.elapsed_time(end) / 1000)
    return seconds


COLUMNS = "{:<46}{:<6}{:<20}{:>9}{:>9}{:>9}{:>9}{:>7}"


def show(case: Case, device: torch.device, bandwidth: float, rate: float) -> None:
    errors, works = {}, {}
    for name, work in case.contenders.items():
        try:
            outputs = [case.pick(x) for x in work()]
        except RuntimeError as refused:  # a backend that does not take this dtype, card or build
            reason = str(refused).split("\n")[0][:80]
            print(COLUMNS.format(case.name, case.dtype, name, "refused", "-", "-", "-", "-"), reason)
            continue
        errors[name] = max(error(a, b) for a, b in zip(outputs, case.exact, strict=True))
        works[name] = work
    seconds = timed(works, device) if device.type == "cuda" else {}
    floor = max(case.bytes / bandwidth, case.operations / rate) if seconds else None
    for name, worst in errors.items():
        took = median(seconds[name]) if seconds else None
        cells = ("-",) * 4 if took is None else (f"{took * 1e3:.3f}", f"{floor * 1e3:.3f}", f"{floor / took:.0%}",
                                                f"{max(seconds[name]) / min(seconds[name]):.2f}")
        print(COLUMNS.format(case.name, case.dtype, name, f"{worst:.1e}", *cells), flush=True)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", choices=KERNELS, help="file of kernels (default: all)")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16", "fp32"])
    parser.add_argument("--length", nargs="+", type=int, help="tokens (default: 1536 4608 16896; on the CPU 63)")
    flags = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() and not runtime.INTERPRETED else "cpu")
    lengths = flags.length or ([1536, 4608, 16896] if device.type == "cuda" else [63])
    bandwidth = rate = math.inf
    if device.type == "cuda":
        bandwidth, rate = ceilings(device)
        print(f"{torch.cuda.get_device_name()}; torch {torch.__version__}, CUDA {torch.version.cuda}, "
              f"cuDNN {torch.backends.cudnn.version()}, triton {runtime.triton and runtime.triton.__version__}")
        print(f"ceilings: copy {bandwidth / 1e12:.2f} TB/s, product {rate / 1e12:.0f} TFLOP/s in bf16")
    else:
        print("no GPU: errors only; " + ("kernels in the interpreter" if runtime.INTERPRETED else
                                         "TRITON_INTERPRET=1 adds the kernels in Triton's interpreter (fp32, fp16)"))
    print("error: the worst of the outputs, |ours - exact| / |exact| against float64; spread: slowest / fastest")
    print(COLUMNS.format("task", "dtype", "by", "error", "ms", "floor ms", "reached", "spread"))
    for name, cases in KERNELS.items():
        if flags.only in (None, name):
            for case in cases(device, flags.dtype, lengths):
                show(case, device, bandwidth, rate)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
