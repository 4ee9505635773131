"""Expected and measured memory and time of every plan, for a model at its full size with random weights.

`python sample.py bench --random --model dev`. The weights are written to a folder as released files have them, a block at
a time, and deleted at the end. Every row is a fresh process that loads what its stage needs just as a drawing does and
runs it once; see `plan.py` for what counts as memory.
"""

import ctypes
import multiprocessing
import os
import platform
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from flux import checkpoint, cli, conditioning, device, weights
from flux import plan as planning
from flux.autoencoder import AutoEncoder
from flux.bench import M_MMAP_THRESHOLD, processor, status, wait
from flux.clip import ClipText
from flux.config import Preset, preset
from flux.errors import UserError
from flux.memory import Sizes
from flux.model import Flux
from flux.plan import Plan
from flux.t5 import T5Encoder

POOL = 2**22 + 9  # random numbers that are drawn; tensors repeat them
EVERY = 0.002  # seconds between looks at the memory of the process
RELEASED = {"flux": torch.bfloat16, "ae": torch.float32, "clip": torch.float16, "t5": torch.float16}


@dataclass(frozen=True)
class BenchPlans:
    """Memory and time of every plan, expected and measured, with random weights."""

    random: bool = True  # what this command is known by
    model: str = "dev"  # a preset of flux/config.py
    width: int = 512  # pixels, a multiple of 16
    height: int = 512  # pixels, a multiple of 16
    batch: int = 1  # pictures that go through together
    stage: tuple[Literal["text", "steps", "pictures"], ...] = ("text", "steps", "pictures")  # what to run (default all)
    plan: tuple[Literal["fp32", "fp32-streamed", "fp32-int8", "fp32-fp8",
                        "bf16", "bf16-streamed", "bf16-int8", "bf16-fp8"], ...] = ()  # default: all that this device needs
    sparse: bool = False  # files without contents: for memory alone, no disk space and no time to write
    depth: int | None = None  # blocks of each kind that transformer and T5 have (default: the model's own)
    blocks: int | None = None  # of each kind that are computed, all are loaded; each needs the same memory (default: all)
    folder: Path | None = None  # where the files go for a while, 34 GB for dev (default: the system's temporary one)
    device: str = "auto"  # cpu, cuda or cuda:1; auto takes a GPU if there is one


@dataclass(frozen=True)
class Row:
    """Bytes and seconds, of one run with all reading of the file that it needed; CPU time tells of a busy machine."""

    stage: str
    plan: Plan
    expected: int
    measured: int | None = None  # None where the system does not tell
    estimated: float | None = None
    seconds: float | None = None
    cpu_seconds: float | None = None


# Random weights.

class Random(Mapping):
    """Tensors of these names and shapes; a tensor is made when it is asked for."""

    def __init__(self, network: nn.Module, dtype: torch.dtype):
        self.shapes = {name: tensor.to(dtype) for name, tensor in network.state_dict().items()}
        self.pool = 0.02 * torch.randn(POOL, generator=torch.Generator().manual_seed(0))
        self.pool = self.pool.to(dtype)

    def __getitem__(self, name: str) -> Tensor:
        shape = self.shapes[name].shape
        if len(shape) == 1 and name.endswith(("scale", "norm.weight")):
            return self.pool.new_ones(shape)
        count = shape.numel()
        return self.pool.repeat(-(-count // POOL))[:count].view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def layout(self) -> dict[str, Tensor]:
        return self.shapes


def write(folder: Path, model: Preset, parts: list[str], sparse: bool) -> dict[str, weights.Found]:
    """Files of these networks, in the dtypes of the released ones."""
    builds = {"flux": lambda: Flux(model.flux), "ae": lambda: AutoEncoder(model.autoencoder),
              "clip": lambda: ClipText(model.clip), "t5": lambda: T5Encoder(model.t5)}
    found = {}
    for part in parts:
        with torch.device("meta"):
            network = builds[part]()
        tensors, path = Random(network, RELEASED[part]), folder / f"{part}.safetensors"
        if sparse:
            _, head, size = checkpoint.described(tensors.layout())
            with path.open("wb") as file:
                file.write(head)
                file.truncate(len(head) + size)
        else:
            checkpoint.save(path, tensors)
        found[part] = weights.Found(part, path, "random", path.stat().st_size, "")
    return found


# Measuring.

def rows(bench: BenchPlans, model: Preset, found: Mapping[str, weights.Found]) -> Iterator[Row]:
    place, _ = device.choose(bench.device)
    sizes = Sizes(bench.width, bench.height, bench.batch)
    layouts = {part: checkpoint.layout(weights.state_of(found, part)) for part in found}
    seen = set()
    for name in bench.plan or (("fp32", "fp32-streamed", "fp32-int8", "fp32-fp8", "bf16") if place.type == "cpu" else
                               ("bf16", "bf16-int8", "bf16-fp8", "bf16-streamed")):
        dtype, _, way = name.partition("-")
        whole = Plan(device.DTYPES[dtype], way or "plain")
        variants = {"text": [whole, replace(whole, stream_t5=True)], "steps": [whole],
                    "pictures": [whole, replace(whole, strips=True)]}
        for stage in bench.stage:
            for plan in variants[stage]:
                known = stage, plan.dtype, stage == "steps" and plan.way, plan.strips, plan.stream_t5
                if known not in seen:
                    seen.add(known)
                    row = Row(stage, plan, expected(stage, plan.counted(model, layouts, sizes, place).parts))
                    if stage == "steps":
                        row = replace(row, estimated=planning.estimate(plan, model, sizes, layouts["flux"], place))
                    yield in_fresh_process(bench, model, found, row)


def expected(stage: str, parts: Mapping[str, int]) -> int:
    """Of what a stage's process loads and runs."""
    feature = parts["features"] // 2
    return {"text": parts["text"], "steps": parts["transformer"] + parts["step"] + feature,
            "pictures": parts["autoencoder"] + parts["decode"]}[stage]


def in_fresh_process(bench: BenchPlans, model: Preset, found: Mapping[str, weights.Found], row: Row) -> Row:
    free = available()
    if free is not None and device.choose(bench.device)[0].type == "cpu" and row.expected > 0.9 * free:
        return row
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(run, bench, model, found, row).result()


def available() -> int | None:
    """Bytes of memory that a process may still have (Linux)."""
    info = Path("/proc/meminfo")
    if not info.exists():
        return None
    return next(1024 * int(line.split()[1]) for line in info.read_text().splitlines() if line.startswith("MemAvailable"))


def run(bench: BenchPlans, model: Preset, found: Mapping[str, weights.Found], row: Row) -> Row:
    """Peak bytes of loading and running a stage, seconds of running it."""
    place, _ = device.choose(bench.device)
    if platform.libc_ver()[0] == "glibc":  # memory that is freed goes back to the system, as on a GPU it goes back to torch
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
    with torch.inference_mode():
        warm_up(row.plan.dtype, place)
        with Peak(place) as peak:
            work = STAGES[row.stage](bench, model, found, row.plan, place)
            start, spent = time.perf_counter(), time.process_time()
            work()
            wait(place)
            seconds, spent = time.perf_counter() - start, time.process_time() - spent
    return replace(row, measured=peak.bytes, seconds=seconds, cpu_seconds=spent)


def warm_up(dtype: torch.dtype, place: torch.device) -> None:
    """What libraries keep for themselves from their first use on."""
    x = torch.randn(64, 64, device=place, dtype=dtype)
    nn.functional.linear(x, x)
    nn.functional.conv2d(x[None, None], x[None, None, :3, :3])


class Peak:
    """Most bytes while the block runs, beyond those before: as PyTorch counts on a GPU, else the anonymous memory."""

    def __init__(self, place: torch.device):
        self.place, self.bytes, self.over = place, None, threading.Event()

    def __enter__(self) -> "Peak":
        if self.place.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.place)
            self.before = torch.cuda.memory_allocated(self.place)
        elif os.path.exists("/proc/self/status"):
            self.before, self.most = status("RssAnon"), 0
            self.looking = threading.Thread(target=self.look)
            self.looking.start()
        return self

    def look(self) -> None:
        while not self.over.wait(EVERY):
            self.most = max(self.most, status("RssAnon"))

    def __exit__(self, *_) -> None:
        self.over.set()
        if self.place.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.place) - self.before
        elif hasattr(self, "looking"):
            self.looking.join()
            self.bytes = max(self.most, status("RssAnon")) - self.before


def text(bench: BenchPlans, model: Preset, found: Mapping, plan: Plan, place: torch.device):
    clip, t5 = conditioning.networks(found, model, plan.dtype, place, plan.stream_t5)
    few = 100  # ids that every vocabulary has
    words, pooled = (torch.arange(n, device=place)[None] % few for n in (model.t5_length, conditioning.CLIP_LENGTH))
    whole = t5.encoder.block
    t5.encoder.block = whole[:bench.blocks]
    return lambda: (t5(words), clip(pooled), whole)  # what was loaded stays loaded, computed or not


def steps(bench: BenchPlans, model: Preset, found: Mapping, plan: Plan, place: torch.device):
    transformer = plan.transformer(found, model, place)
    whole = transformer.double_blocks, transformer.single_blocks
    transformer.double_blocks, transformer.single_blocks = (blocks[:bench.blocks] for blocks in whole)
    made = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(bench.batch, *shape, generator=made).to(place, plan.dtype)
    txt, vec = drawn(model.t5_length, model.flux.context_in_dim), drawn(model.flux.vec_in_dim)
    cond = conditioning.condition(txt, vec, bench.width, bench.height, model.guidance)
    img = drawn(cond.img_ids.shape[1], model.flux.in_channels)
    t = torch.full((bench.batch,), 0.75, device=place, dtype=plan.dtype)
    velocity = conditioning.velocity(transformer, cond)

    def step():
        v = velocity(img, t)
        assert torch.isfinite(v).all() and whole  # what was loaded stays loaded, computed or not
    return step


def pictures(bench: BenchPlans, model: Preset, found: Mapping, plan: Plan, place: torch.device):
    autoencoder = plan.autoencoder(found, model, place)
    shape = bench.batch, model.autoencoder.z_channels, bench.height // 8, bench.width // 8
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(place, plan.dtype)
    return lambda: autoencoder.decode(latents)


STAGES = {"text": text, "steps": steps, "pictures": pictures}


# The command.

COLUMNS = "{:<10}{:<40}{:>14}{:>14}{:>8}{:>14}{:>12}{:>9}"


def main(argv: list[str]) -> None:
    command = cli.describe(Path(__file__)).sample
    if cli.wants_help(argv):
        print(cli.help_text("python sample.py bench --random [flags]", command))
        return
    bench = BenchPlans(**cli.parse(argv, command))
    for name in ("width", "height"):
        if getattr(bench, name) < 16 or getattr(bench, name) % 16:
            raise UserError(f"--{name} {getattr(bench, name)}: expected a positive multiple of 16 pixels; take 512")
    model = preset(bench.model)
    if bench.depth is not None:
        model = replace(model, flux=replace(model.flux, depth=bench.depth, depth_single_blocks=bench.depth),
                        t5=replace(model.t5, num_layers=bench.depth))
    place, _ = device.choose(bench.device)
    folder = Path(tempfile.mkdtemp(prefix="minflux-bench-", dir=bench.folder))
    try:
        started = time.perf_counter()
        parts = {"text": ("clip", "t5"), "steps": (), "pictures": ()}
        found = write(folder, model, ["flux", "ae", *(part for stage in bench.stage for part in parts[stage])], bench.sparse)
        print(f"machine  {processor(place)}; torch {torch.__version__}\n"
              f"model    {model.name} with {'empty' if bench.sparse else 'random'} weights of "
              f"{sum(place.size for place in found.values()) / 1e9:.1f} GB, {bench.width}x{bench.height} pixels, batch "
              f"{bench.batch}; written in {time.perf_counter() - started:.0f} s\n"
              f"blocks   {model.flux.depth} double, {model.flux.depth_single_blocks} single, {model.t5.num_layers} of T5; "
              f"computed: {'all' if bench.blocks is None else f'{bench.blocks} of each kind'}\n", flush=True)
        print(COLUMNS.format("stage", "plan", "expected GB", "measured GB", "ratio", "estimated s", "measured s", "CPU s"))
        for row in rows(bench, model, found):
            print(line(row, bench), flush=True)
    finally:
        shutil.rmtree(folder)


def line(row: Row, bench: BenchPlans) -> str:
    def shown(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    ratio = row.expected / row.measured if row.measured else None
    told = "does not fit" if row.measured is None else f"{row.measured / 1e9:.3f}"
    part = bench.blocks is not None and row.stage != "pictures"  # then its time says nothing
    return COLUMNS.format(row.stage, str(row.plan), f"{row.expected / 1e9:.3f}", told, shown(ratio, ".2f"),
                          shown(row.estimated, ".3g"), *(shown(None if part else s, ".3g") for s in
                                                         (row.seconds, row.cpu_seconds)))


SAMPLE = BenchPlans
