"""Triton where it is installed, and what the machine at hand can run."""

import functools
import os
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import torch

try:
    import triton
    import triton.language as tl
    from triton import jit
except ImportError:  # the kernels stay plain functions, which nothing calls
    triton, tl = None, SimpleNamespace(constexpr=None)

    def jit(function):
        return function

INTERPRETED = triton is not None and triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: kernels run on the CPU, in NumPy
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def constant(function):
    """A function that compiled code calls once, as by torch.compiler.assume_constant_result, which would import the whole
    compiler for it: a second at every start."""
    function._dynamo_marked_constant = True
    return function


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Of a CUDA card: (9, 0) is an H100, (8, 9) an RTX 4090. (0, 0) is no such card."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" and torch.version.cuda else (0, 0)


@functools.cache
def has_compiler() -> bool:
    """Triton builds its launcher with a C compiler when the first kernel starts."""
    return bool(os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"))


@constant
def why_not(device: torch.device, dtype: torch.dtype) -> str:
    """Why our kernels do not run here; empty where they do."""
    if triton is None:
        return "triton is not installed"
    if dtype not in DTYPES:
        return f"no kernel takes {str(dtype).removeprefix('torch.')}"
    if INTERPRETED:
        return "Triton's interpreter is wrong in bf16" if dtype == torch.bfloat16 else ""
    if capability(device) < (8, 0):
        return "no NVIDIA card of compute capability 8.0 or more"
    return "" if has_compiler() or os.name == "nt" else "no C compiler, which Triton needs"


def on(device: torch.device):
    """The context in which kernels start on this device, where there are several."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@constant
def is_hopper(device: torch.device) -> bool:
    return capability(device)[0] == 9
