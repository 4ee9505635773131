"""What finding a LoRA costs: `python -m lora.bench_retrieval`. Search by size of the pool, and encoding at full size."""

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from flux import cli, lora_layers, lora_names
from flux.bench import processor
from flux.config import DEV
from lora import index, io, retrieval
from lora.adapter import Adapter
from lora.bench import random_lora
from lora.encoder import Encoder
from lora.index import Index
from lora.probes import changes

WIDTH = 768  # CLIP-L's


class Lines(Sequence):
    """Lines of an index that has no files but one, made when asked for."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict:
        if not 0 <= i < self.count:
            raise IndexError(i)
        return {"id": f"lora-{i}", "file": "it", "sha256": f"{i:064x}", "also": [], "kind": ("style", "object")[i % 2]}


def vectors(count: int) -> Tensor:
    """Unit vectors of random directions, among which nothing is near anything: (N, 768)."""
    out, g = torch.empty(count, WIDTH, dtype=torch.float16), torch.Generator().manual_seed(0)
    for rows in out.split(65536):
        rows.copy_(torch.nn.functional.normalize(torch.randn(rows.shape, generator=g), dim=1))
    return out


def search(sizes: list[int], rounds: int, folder: Path) -> Iterator[tuple]:
    """An index of each size in `folder`; the first query reads it from disk, the others find it in memory."""
    (folder / "it").touch()
    for size in sizes:
        path = folder / "index.safetensors"
        start = time.perf_counter()
        index.write(path, vectors(size), Lines(size), "none", folder, None)
        built = time.perf_counter() - start
        start = time.perf_counter()
        found = Index(path)
        opened = time.perf_counter() - start
        queries, g = [], torch.Generator().manual_seed(1)
        for i in range(rounds + 1):  # half of them near some LoRA, half near none
            q = torch.randn(WIDTH, generator=g)
            queries.append(q if i % 2 else found.vectors[i * 7919 % size].float() + 0.05 * q)
        seconds, cpu, equal, plain = [], [], 0, []
        for q in queries:
            start, used = time.perf_counter(), time.process_time()
            answer = retrieval.query(found, q, 3)
            seconds.append(time.perf_counter() - start)
            cpu.append(time.process_time() - used)
            assert len(answer.hits) == 3
        for q in queries[:5]:
            q = retrieval.checked(found, q)
            start = time.perf_counter()
            exact = torch.cat([rows.float() @ q for rows in found.vectors.split(65536)])
            expected = exact.topk(10)
            plain.append(time.perf_counter() - start)
            equal += torch.equal(retrieval.nearest(found, q, 10)[0], expected.indices)
        first, *rest = (1000 * s for s in seconds)
        yield (f"{size:,}", f"{path.stat().st_size / 1e6:,.1f}", f"{built:.1f}", f"{1000 * opened:.1f}", f"{first:.1f}",
               f"{median(rest):.1f} ({min(rest):.1f}-{max(rest):.1f})",
               f"{1000 * median(cpu[1:]):.1f}", f"{1000 * median(plain):.0f}", f"{equal} of 5")


@torch.inference_mode()
def encode(rounds: int, rank: int, folder: Path) -> tuple:
    """LoRA files over all 304 layers of FLUX.1-dev, in bf16, through the encoder: seconds to read, and to embed."""
    layers, names = lora_layers.layers(DEV.flux), lora_names.names(DEV)
    torch.manual_seed(0)
    encoder, path = Encoder(layers).eval(), folder / "lora.safetensors"
    shapes = {layer.name: (layer.rows, layer.inputs) for layer in layers}
    io.write(path, {"flux": random_lora(shapes, rank, 0, torch.bfloat16)}, names)
    read, embedded, cpu = [], [], []
    for _ in range(rounds + 1):
        start, used = time.perf_counter(), time.process_time()
        adapters, _ = io.read(path, names)
        middle = time.perf_counter()
        encoder([changes(adapters.get("flux", Adapter()), layers)])
        read.append(middle - start)
        embedded.append(time.perf_counter() - middle)
        cpu.append(time.process_time() - used)
    whole = median(cpu[1:])
    return (f"{len(layers)} layers of rank {rank}, {path.stat().st_size / 1e6:.0f} MB", f"{median(read[1:]):.2f}",
            f"{median(embedded[1:]):.2f}", f"{whole:.2f}", f"{3600 / whole:,.0f}")


def table(titles: Sequence[str], rows) -> None:
    print("| " + " | ".join(titles) + " |\n|" + "---|" * len(titles), flush=True)
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m lora.bench_retrieval", description=__doc__.partition(":")[0])
    parser.add_argument("--part", choices=("search", "encode"), action="append", help="default: both")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10**3, 10**4, 10**5, 10**6], help="LoRAs in the index")
    parser.add_argument("--rounds", type=int, default=20, help="queries that count (20); a quarter as many encodings")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--folder", type=Path, help="where the files go (default: the system's for temporary ones)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of PyTorch (default: its own choice)")
    flags = parser.parse_args(argv)
    torch.set_num_threads(flags.threads)
    parts = flags.part or ("search", "encode")
    load = Path("/proc/loadavg")
    print(f"{processor(torch.device('cpu'))}; torch {torch.__version__}, {torch.get_num_threads()} threads; "
          f"load before: {load.read_text().split()[0] if load.exists() else '?'}")
    with tempfile.TemporaryDirectory(dir=flags.folder) as folder, torch.inference_mode():
        if "search" in parts:
            table(("LoRAs", "MB", "s to write", "ms to open", "ms, first query", "ms a query", "CPU ms",
                   "ms, all in float32", "same 10"), search(flags.sizes, flags.rounds, Path(folder)))
        if "encode" in parts:
            table(("a LoRA of FLUX.1-dev", "s to read", "s to embed", "CPU s, both", "an hour and core"),
                  [encode(max(1, flags.rounds // 4), flags.rank, Path(folder))])


if __name__ == "__main__":
    cli.run(main)
