"""Compiles every configuration of every kernel for compute capabilities 8.0, 8.9 and 9.0, on any machine with Triton.

    python -m kernels.compile_check [--only rope_attention] [--match bf16] [--target 90] [--table table.md]

No GPU is needed: Triton is told the target, and its wheel holds the assembler. Fails if a kernel spills registers to memory,
does not fit into the card's shared memory, or multiplies matrices without the matrix unit where it should use it.

A file of this folder takes part by a function `configurations()`, which yields (name, kernel, signature, constants, warps,
stages): types by argument, `*bf16`, `i32`, `i32:16` for an integer that is a multiple of 16 as sizes and strides are, and
`constexpr` for what `constants` holds. A seventh item, if any, lists the only targets.
"""

import argparse
import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from kernels.runtime import triton

SHARED_LIMIT = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}  # bytes per program (CUDA programming guide)
COLUMNS = "{:<62}{:>4}{:>6}{:>10}{:>8}{:>7}{:>9}  {}"


@dataclass(frozen=True)
class Result:
    name: str
    target: int
    registers: int  # per thread
    shared: int  # bytes per program
    spills: int  # instructions that move registers to local memory or back
    stack: int  # bytes per thread
    products: int  # instructions of the matrix unit
    expects_products: bool

    @property
    def fault(self) -> str:
        return ", ".join(fault for fault, found in (
            ("spills", self.spills or self.stack),
            (f"more than {SHARED_LIMIT[self.target] >> 10} KB shared", self.shared > SHARED_LIMIT[self.target]),
            ("no matrix instruction", self.expects_products and not self.products)) if found)


def files() -> list[str]:
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if "\ndef configurations(" in path.read_text())


def jobs(only: str | None = None, match: str = "", target: int | None = None) -> Iterator[tuple[str, int, int]]:
    """(file, number of the configuration, target); kernels themselves do not travel between processes."""
    for file in [only] if only else files():
        for number, (name, *_, targets) in enumerate(map(_with_targets, _configurations(file))):
            yield from ((file, number, one) for one in targets if match in name and target in (None, one))


def _configurations(file: str) -> list[tuple]:
    return list(importlib.import_module(f"kernels.{file}").configurations())


def _with_targets(configuration: tuple) -> tuple:
    return configuration if len(configuration) == 7 else (*configuration, tuple(SHARED_LIMIT))


def build(job: tuple[str, int, int]) -> Result:
    file, number, target = job
    name, kernel, signature, constants, warps, stages, _ = _with_targets(_configurations(file)[number])
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values())
               if kind.startswith("*") or kind.endswith(":16")}
    kinds = {argument: kind.removesuffix(":16") for argument, kind in signature.items()}
    source = triton.compiler.ASTSource(kernel, kinds, constants, aligned)
    place = triton.backends.compiler.GPUTarget("cuda", target, 32)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    built = triton.compile(source, target=place, options=options)
    usage, code = disassembled(built.asm["cubin"])
    products = len(re.findall(r"\b(?:HMMA|HGMMA|QGMMA|IMMA)\b", code))
    half = re.search(r"tt\.dot [^\n]*: tensor<\w+xb?f16>", built.asm["ttir"])  # others are meant to be exact in float32
    return Result(f"{file} {name}", target, usage["REG"], built.metadata.shared, len(re.findall(r"\b(?:STL|LDL)\b", code)),
                  usage["STACK"], products, half is not None)


def disassembled(binary: bytes) -> tuple[dict[str, int], str]:
    """What the assembler gave the kernel, REG per thread and STACK bytes per thread, and the kernel's instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        said = [subprocess.run([tool, f"--dump-{what}", file.name], check=True, capture_output=True, text=True).stdout
                for what in ("resource-usage", "sass")]
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said[0])}, said[1]


def table(results: list[Result]) -> Iterator[str]:
    """Markdown: per kernel, dtype and target the number of configurations, and the range of what they take."""
    groups = {}
    for result in results:
        groups.setdefault((*result.name.split()[1:3], result.target), []).append(result)
    yield "| kernel | dtype | sm | configurations | registers | shared KB | spills |"
    yield "|---|---|---|---|---|---|---|"
    for (kernel, dtype, target), some in groups.items():
        registers, shared = sorted(r.registers for r in some), sorted(round(r.shared / 1024) for r in some)
        spills = sum(r.spills + (r.stack > 0) for r in some)
        ranges = (str(all[0]) if all[0] == all[-1] else f"{all[0]}-{all[-1]}" for all in (registers, shared))
        yield f"| {kernel} | {dtype} | {target} | {len(some)} | {' | '.join(ranges)} | {spills} |"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.compile_check", description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", choices=files(), help="file of kernels (default: all)")
    parser.add_argument("--match", default="", help="part of a configuration's name (default: all)")
    parser.add_argument("--target", type=int, choices=sorted(SHARED_LIMIT), help="compute capability (default: each)")
    parser.add_argument("--table", type=Path, help="also write a summary there, as Markdown")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one per core)")
    flags = parser.parse_args(argv)
    if triton is None:
        print("triton is not installed, so nothing can be compiled; pip install triton", file=sys.stderr)
        return 2
    print(f"triton {triton.__version__}")
    print(COLUMNS.format("configuration", "sm", "regs", "shared KB", "spills", "stack", "products", "fault"))
    results = []
    with ProcessPoolExecutor(flags.jobs) as pool:
        for result in pool.map(build, jobs(flags.only, flags.match, flags.target)):
            results.append(result)
            print(COLUMNS.format(result.name, result.target, result.registers, f"{result.shared / 1024:.1f}", result.spills,
                                 result.stack, result.products, result.fault), flush=True)
    faults = sum(bool(result.fault) for result in results)
    print(f"{len(results)} configurations, {faults} faults")
    if flags.table:
        flags.table.write_text("\n".join((f"triton {triton.__version__}", "", *table(results), "")))
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
