"""What the gated LoRA linear costs and how exact it is: rows for `python -m kernels.bench`.

Of the whole layer, from x to its output, and of its backward pass for x and the gate. Errors are of whichever runs on the
device, and of the eager definition in the same dtype, both against the definition in float64 on the same numbers. Bytes and
operations are counted, not measured. A CPU is not timed: what it would tell is not what the kernels are for.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.gated_lora_linear import Gate, eager, fold, gated_lora_linear, stack

GPU = [(4608, 3072, (3072, 3072, 3072, 12288), (16,) * 4), (4608, 15360, (3072,), (16,) * 4),
       *((4608, 3072, (3072, 3072, 3072, 12288), (16,) * n) for n in (1, 2, 8)),
       (4608, 3072, (3072, 3072, 3072), (4, 16, 32, 64)), (512, 3072, (3072, 3072, 3072, 12288), (16,) * 4)]
CPU = [(100, 192, (96, 96, 96, 384), (16,) * 4), (100, 480, (96,), (16,) * 4), (63, 192, (200,), (4, 9, 16))]
ROWS = 256  # of the layer with which errors are computed: float64 of all would fill a card


@dataclass(frozen=True)
class Row:
    """Errors: norm of the difference over the norm. Seconds: median; None where it was not timed."""

    name: str
    dtype: str
    error: float
    eager_error: float
    seconds: float | None
    eager_seconds: float | None
    bytes: int
    flops: int
    compiled_seconds: float | None = None


@dataclass(frozen=True)
class Layer:
    x: Tensor
    weight: Tensor
    A: list[Tensor]
    B: list[Tensor]
    gate: Gate
    slices: tuple[int, ...]

    def to(self, dtype: torch.dtype) -> "Layer":
        """x, weights and LoRAs; the gate stays wide, except for the definition's own float64."""
        gate = Gate(*(part.double() for part in self.gate[:10])) if dtype == torch.float64 else self.gate
        return Layer(self.x.to(dtype), self.weight.to(dtype), [A.to(dtype) for A in self.A], [B.to(dtype) for B in self.B],
                     gate, self.slices)

    def first(self, rows: int) -> "Layer":
        return Layer(self.x[:rows], self.weight, self.A, self.B, self.gate, self.slices)

    def eager(self, x: Tensor, *gate: Tensor) -> Tensor:
        deltas = [F.linear(F.linear(x, A), B) for A, B in zip(self.A, self.B, strict=True)]
        return eager(F.linear(x, self.weight), deltas, Gate(*gate), None, None, self.slices)

    def ours(self) -> Callable[..., Tensor]:
        loras = [[(A, B, 0)] for A, B in zip(self.A, self.B, strict=True)]
        beside = stack(loras, len(self.weight), self.slices, self.x.dtype, self.x.device)
        return lambda x, *gate: gated_lora_linear(x, lambda x: F.linear(x, self.weight), beside, fold(Gate(*gate)))


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


def results(each: Layer, how: Callable[..., Tensor], backward: bool) -> list[Tensor]:
    """The output, or the gradients of x and the gate."""
    leaves = [part.detach().requires_grad_(backward) for part in (each.x, *each.gate[:10])]
    out = how(*leaves)
    if not backward:
        return [out]
    return list(torch.autograd.grad(out, leaves, torch.ones_like(out)))


def farthest(actual: list[Tensor], exact: list[Tensor]) -> float:
    return max(((a.double() - e).norm() / e.norm()).item() for a, e in zip(actual, exact, strict=True))


def timed(work: Callable[[], object], rounds: int = 20) -> float:
    seconds = []
    for _ in range(rounds + 3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return median(seconds[3:])


def cost(rows: int, columns: int, outputs: int, ranks: int, count: int, slices: int, size: int, backward: bool
         ) -> tuple[int, int]:
    """Bytes and operations, those beside each kernel summed up and those of the products with W and A.

    Per element and LoRA 10 operations make up the gate, and 25 its gradient.
    """
    moved, stats = size * rows * outputs, 8 * rows * slices * (count + 1)
    products = size * ((outputs + ranks) * columns + rows * columns + rows * (outputs + ranks))
    if not backward:
        return products + 3 * moved + 2 * stats, 2 * rows * (columns * (outputs + ranks) + ranks * outputs) \
            + 10 * count * rows * outputs
    tiles, blocks = -(-outputs // 64), -(-rows // 32)
    sums = 12 * rows * (count + 1) * tiles + 24 * outputs * blocks
    return products + 8 * moved + 2 * sums + 2 * stats, 2 * rows * (columns * (outputs + ranks) + 3 * ranks * outputs) \
        + 35 * count * rows * outputs


def rows(device: torch.device | str = "cpu") -> list[Row]:
    device, out = torch.device(device), []
    on_gpu = device.type == "cuda"
    for M, K, slices, ranks in GPU if on_gpu else CPU:
        for dtype in (torch.bfloat16,) if on_gpu else (torch.float32, torch.bfloat16):
            whole = layer(M, K, slices, ranks, dtype, device)
            part, wide = whole.first(ROWS), whole.first(ROWS).to(torch.float64)
            for backward in (False, True):
                exact = results(wide, wide.eager, backward)
                errors = [farthest(results(part, how, backward), exact) for how in (part.ours(), part.eager)]
                hows = [whole.ours(), whole.eager, torch.compile(whole.eager)] if on_gpu else []
                seconds = [timed(lambda how=how: results(whole, how, backward)) for how in hows]  # noqa: B023
                name = f"{K} -> {sum(slices)}, {M} rows, rank {'+'.join(map(str, ranks))}{', with backward' * backward}"
                moved, flops = cost(M, K, sum(slices), sum(ranks), len(ranks), len(slices), dtype.itemsize, backward)
                if backward:
                    moved, flops = (a + b for a, b in zip((moved, flops), cost(
                        M, K, sum(slices), sum(ranks), len(ranks), len(slices), dtype.itemsize, False), strict=True))
                ours, chain, compiled = seconds or (None,) * 3
                out.append(Row(name, str(dtype).removeprefix("torch."), *errors, ours, chain, moved, flops, compiled))
    return out


if __name__ == "__main__":
    for each in rows("cuda" if torch.cuda.is_available() else "cpu"):
        print(each)
