"""Errors and times of the kernels, beside what PyTorch does without them.

    python -m kernels.bench [--dtype bf16 fp32] [--only rope_attention] [--length 1536 4608 16896] [--table table.md]

On a GPU the two ceilings of this very card come first, a large copy and a large product, and every row shows its floor: the
bytes it must move over the first or the operations it must do over the second, whichever takes longer. Times are medians of
calls in turn with the other contenders', each with caches flushed before; peak is what one call allocates at most. Without a
GPU it prints errors alone; with TRITON_INTERPRET=1 those of the kernels too, in Triton's interpreter.

What is measured is in bench_cases.py. No GPU has run this yet.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from kernels import runtime
from kernels.bench_cases import DTYPES, KERNELS, Case


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


HEADINGS = ("task", "dtype", "by", "error", "ms", "floor ms", "reached", "spread", "peak MB")
COLUMNS = "{:<66}{:<6}{:<20}{:>9}{:>11}{:>11}{:>11}{:>11}{:>11}"
UNMEASURED = ("unmeasured",) * 5


def rows(case: Case, device: torch.device, bandwidth: float, rate: float) -> Iterator[tuple[str, ...]]:
    errors, works = {}, {}
    for name, work in case.contenders.items():
        try:
            outputs = (case.checked or case.contenders)[name]()
            worst = max((error(case.pick(x), e) for x, e in zip(outputs, case.exact, strict=bool(outputs))), default=None)
            errors[name] = "-" if worst is None else f"{worst:.1e}"
        except RuntimeError as refused:  # a backend that does not take this dtype, card or build
            yield case.name, case.dtype, name, "refused", *("-",) * 4, str(refused).split("\n")[0][:80]
            continue
        works[name] = work
    if device.type != "cuda":
        yield from ((case.name, case.dtype, name, worst, *UNMEASURED) for name, worst in errors.items() if worst != "-")
        return
    peaks = {name: peak(work, device) for name, work in works.items()}
    seconds = timed(works, device)
    floor = max(case.bytes / bandwidth, case.operations / rate)
    for name, worst in errors.items():
        took = median(seconds[name])
        yield (case.name, case.dtype, name, worst, f"{took * 1e3:.3f}", f"{floor * 1e3:.3f}", f"{floor / took:.0%}",
               f"{max(seconds[name]) / min(seconds[name]):.2f}", f"{peaks[name] / 1e6:.0f}")


def peak(work: Callable, device: torch.device) -> int:
    """Bytes beyond what is there before."""
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    return torch.cuda.max_memory_allocated(device) - before


def heading(device: torch.device, bandwidth: float, rate: float) -> list[str]:
    versions = f"torch {torch.__version__}, triton {runtime.triton and runtime.triton.__version__}"
    if device.type == "cuda":
        return [f"{torch.cuda.get_device_name()}; {versions}, CUDA {torch.version.cuda}, "
                f"cuDNN {torch.backends.cudnn.version()}",
                f"ceilings: copy {bandwidth / 1e12:.2f} TB/s, product {rate / 1e12:.0f} TFLOP/s in bf16"]
    return [f"no GPU: errors only; {versions}; " + (
        "kernels in the interpreter" if runtime.INTERPRETED else
        "TRITON_INTERPRET=1 adds the kernels in Triton's interpreter (fp32, fp16)")]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", choices=KERNELS, help="file of kernels (default: all)")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16", "fp32"])
    parser.add_argument("--length", nargs="+", type=int, help="attention's tokens (default: 1536 4608 16896; on the CPU 63)")
    parser.add_argument("--table", type=Path, help="also write all of it there, as Markdown")
    flags = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() and not runtime.INTERPRETED else "cpu")
    bandwidth, rate = ceilings(device) if device.type == "cuda" else (math.inf, math.inf)
    lines = [*heading(device, bandwidth, rate), f"command: {' '.join(['python -m kernels.bench', *argv])}",
             "error: the worst of the outputs, |ours - exact| / |exact| against float64; spread: slowest / fastest"]
    print(*lines, COLUMNS.format(*HEADINGS), sep="\n", flush=True)
    table = []
    for name, cases in KERNELS.items():
        for case in cases(device, flags.dtype, flags.length) if flags.only in (None, name) else ():
            for row in rows(case, device, bandwidth, rate):
                print(COLUMNS.format(*row), flush=True)
                table.append(row)
    if flags.table:
        bars = [f"| {' | '.join(row)} |" for row in (HEADINGS, ("---",) * len(HEADINGS), *table)]
        flags.table.write_text("\n".join((*(f"{line}  " for line in lines), "", *bars, "")))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
