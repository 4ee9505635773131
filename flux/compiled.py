"""torch.compile for the transformer, block by block: one graph of each kind serves all blocks of that kind, so compiling
takes as long for 57 blocks as for two. A size that changes is compiled once more and is free from then on.

Measured on the CPU alone by `python sample.py bench --against compiled`; no GPU has run it.
"""

import os
import shutil
import sys
import sysconfig
import warnings
from importlib import util
from pathlib import Path

import torch

from flux.errors import UserError
from flux.model import Flux


def check(place: torch.device, cuda_graphs: bool = False, streamed: bool = False) -> None:
    """UserError where compiling would fail in the first step, after all has been loaded."""
    if streamed:
        raise UserError("--compile came with a --vram for which weights are streamed, expected them to stay in memory; give "
                        "it more, or leave --compile out")
    if cuda_graphs and place.type != "cuda":
        raise UserError(f"--cuda-graphs came with the device {place.type}, expected cuda; leave it out")
    if place.type == "cuda":
        if not util.find_spec("triton"):
            raise UserError("--compile on a GPU needs triton, which is not installed; pip install triton, or leave it out")
        return
    compiler = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    if not shutil.which(compiler):
        raise UserError(f"--compile needs a C++ compiler, expected {compiler} in PATH; install it (Debian: apt install "
                        "g++), name another by CXX, or leave --compile out")
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        raise UserError("--compile needs Python.h, which this Python came without; install it (Debian: apt install "
                        "python3-dev), or leave --compile out")


def compile_blocks(model: Flux, cuda_graphs: bool = False, backend: str = "inductor") -> None:
    """Each block as one graph, made when it is first called; after LoRAs are attached, as these change what is in blocks.

    cuda_graphs: kernels are recorded and replayed together, which helps where launching them takes longer than they do.
    backend: "inductor" generates code; "eager" traces alone, for tests.
    """
    if cuda_graphs:  # what blocks return lives until the next step begins, not just until the next block is called
        model.img_in.register_forward_pre_hook(lambda *_: torch.compiler.cudagraph_mark_step_begin())
    # Sizes, batches of one and LoRAs that differ from block to block make more graphs than the 8 that torch allows.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    # Of the rotary table, which comes in as complex numbers; `attention.rotate` takes it apart before it computes.
    warnings.filterwarnings("ignore", "Torchinductor does not support code generation for complex", UserWarning)
    for block in (*model.double_blocks, *model.single_blocks):
        block.compile(fullgraph=True, backend=backend, mode="reduce-overhead" if cuda_graphs else None)
