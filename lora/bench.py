"""What LoRAs cost: `python -m lora.bench`. Beside merged weights, gated, beside peft on diffusers, and at FLUX.1-dev's size.

`--size dev --dtype bf16 --device cuda` is a step of the real transformer at 1024 x 1024; its weights are random.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib import util
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as computed_again
from tqdm import tqdm

from flux import cli, device, flow, lora_layers, lora_names, naming
from flux.bench import Bench, network, processor, timed
from flux.config import DEMO, DEV
from flux.model import Flux
from lora import algebra, fuse, gates, inject, io
from lora.adapter import Adapter, LowRank

SIZES = {"small": Bench(), "dev": Bench(hidden=3072, depth=19, single=38, image_tokens=4096, text_tokens=512)}
TITLES = ("work", "against", "seconds", "ratio (least-greatest)", "error")


def random_lora(shapes: dict[str, tuple[int, int]], rank: int, seed: int, dtype: torch.dtype) -> Adapter:
    """Over layers of the given shapes (out, in), each of about a hundredth of a fresh weight's size."""
    g = torch.Generator().manual_seed(seed)
    layers = {}
    for layer, (rows, columns) in shapes.items():
        A = torch.randn(rank, columns, generator=g) / columns ** 0.5
        B = torch.randn(rows, rank, generator=g) * 0.01
        layers[layer] = (LowRank(A.to(dtype), B.to(dtype)),)
    return Adapter(layers)


def linears(model: nn.Module) -> dict[str, tuple[int, int]]:
    return {name: tuple(layer.weight.shape) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}


def at_run_time(size: Bench, rounds: int, rank: int, dtype: torch.dtype, place: torch.device) -> list[tuple]:
    """Forward passes with 1 and 4 LoRAs on every linear layer, beside the same LoRAs merged."""
    rows = []
    for count in (1, 4):
        works, outputs = {}, {}
        for merged in (False, True):
            model, img, velocity = network(size, "minflux", place, dtype)
            loras, shapes = inject.Loras(model), linears(model)
            for i in range(count):
                loras.attach(str(i), random_lora(shapes, rank, i, dtype), 0.7)
            if merged:
                loras.merge()
            works[merged] = torch.no_grad()(lambda velocity=velocity, img=img: velocity(img))
            outputs[merged] = works[merged]().double()
        error = ((outputs[False] - outputs[True]).abs().max() / outputs[True].abs().max()).item()
        what = f"forward, {count} LoRA{'s' * (count > 1)} of rank {rank}"
        rows.append(row(what, "merged", works[False], works[True], rounds, place, error))
    return rows


def gated(size: Bench, rounds: int, rank: int, dtype: torch.dtype, place: torch.device) -> list[tuple]:
    """A forward pass with 4 LoRAs behind gates in every linear layer of the blocks, beside none; and gates by definition."""
    works = {}
    for name in ("none", "gates", "defined"):
        model, img, velocity = network(size, "minflux", place, dtype)
        if name != "none":
            loras, layers = inject.Loras(model), lora_layers.layers(model.config)
            shapes = {layer.name: (layer.rows, layer.inputs) for layer in layers}
            for i in range(4):
                loras.attach(str(i), random_lora(shapes, rank, i, dtype))
            rule = fuse.put("gates", loras, gates=gates.Gates(layers).to(place))
            if name == "defined":
                rule.define()
            velocity = partial(rule.velocity(lambda img, t, velocity=velocity: velocity(img)), t=torch.ones(1, device=place))
        works[name] = torch.no_grad()(lambda velocity=velocity, img=img: velocity(img))
    mine, exact = works["gates"]().double(), works["defined"]().double()
    error = ((mine - exact).abs().max() / exact.abs().max()).item()
    what = f"forward, 4 gated LoRAs of rank {rank}"
    return [row(what, "no LoRA", works["gates"], works["none"], rounds, place),
            row(what, "gates as defined", works["gates"], works["defined"], rounds, place, error)]


def stepping(module: nn.Module, loss_of: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A step of AdamW on what is to be learned of a module."""
    optimiser = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-3, fused=True)

    def step() -> Tensor:
        loss = loss_of()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        return loss.detach()
    return step


def step(size: Bench, rounds: int, rank: int, dtype: torch.dtype, place: torch.device) -> list[tuple]:
    """A training step of a LoRA on every linear layer of the blocks: blocks computed again, beside activations kept."""
    works, peaks = {}, {}
    for again in (False, True):
        model, img, velocity = network(size, "minflux", place, dtype)
        inject.add_trained(model.requires_grad_(False), "blocks", rank)
        model.to(place)
        for block in (*model.double_blocks, *model.single_blocks) if again else ():
            block.forward = partial(computed_again, block.forward, use_reentrant=False)
        works[again] = stepping(model, lambda velocity=velocity, img=img: velocity(img).float().square().mean())
        if place.type == "cuda":
            torch.cuda.reset_peak_memory_stats(place)
            works[again]()
            peaks[again] = f", {torch.cuda.max_memory_allocated(place) / 2**30:.1f} GiB"
    return [row(f"training step, rank {rank}, blocks computed again{peaks.get(True, '')}", f"kept{peaks.get(False, '')}",
                works[True], works[False], rounds, place)]


def training(rounds: int, rank: int) -> list[tuple]:
    """A training step of a LoRA on every linear layer of the demo's blocks, beside peft on diffusers."""
    torch.manual_seed(0)
    place, config, batch = torch.device("cpu"), DEMO.flux, 8
    base = Flux(config).requires_grad_(False)
    x0, eps = torch.randn(2, batch, 64, config.in_channels).unbind()
    txt, vec, t = torch.randn(batch, 24, config.context_in_dim), torch.randn(batch, config.vec_in_dim), torch.rand(batch)
    guidance = torch.ones(batch)
    cells = torch.arange(64)
    img_ids, txt_ids = torch.stack((0 * cells, cells // 8, cells % 8), dim=-1).float(), torch.zeros(24, 3)

    def loss_of(velocity: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        return lambda: flow.loss(lambda img, t: velocity(img), x0, eps, t).mean()

    ours = Flux(config)
    ours.load_state_dict(base.state_dict())
    inject.add_trained(ours, "blocks", rank)
    mine = stepping(ours, loss_of(lambda img: ours(img, img_ids[None], txt, txt_ids[None], vec, t, guidance)))
    if not (util.find_spec("peft") and util.find_spec("diffusers")):
        return [row(f"training step, rank {rank}", None, mine, None, rounds, place)]

    from diffusers import FluxTransformer2DModel
    from peft import LoraConfig, inject_adapter_in_model

    theirs = FluxTransformer2DModel(
        num_layers=config.depth, num_single_layers=config.depth_single_blocks, num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim, joint_attention_dim=config.context_in_dim, guidance_embeds=True,
        pooled_projection_dim=config.vec_in_dim, axes_dims_rope=config.axes_dim)
    theirs.load_state_dict(dict(naming.to_diffusers(base.state_dict(), "flux", Path("minflux"))), assign=True)
    theirs.requires_grad_(False)
    targets = "to_[qkv]|add_[qkv]_proj|to_out.0|to_add_out|net.0.proj|net.2|linear|proj_mlp|proj_out"
    lora = LoraConfig(r=rank, lora_alpha=rank, target_modules=rf".*transformer_blocks\..*({targets})")
    inject_adapter_in_model(lora, theirs)
    other = stepping(theirs, loss_of(lambda img: theirs(img, txt, vec, t, img_ids, txt_ids, guidance, return_dict=False)[0]))
    return [row(f"training step, rank {rank}", "peft on diffusers", mine, other, rounds, place)]


def row(work: str, against: str | None, ours: Callable, theirs: Callable | None, rounds: int, place: torch.device,
        error: float | None = None) -> tuple:
    """Both in turn, after one round that does not count."""
    pairs = [(timed(ours, place), timed(theirs, place) if theirs else None) for _ in range(rounds + 1)][1:]
    ratios = [a / b for a, b in pairs if b]
    spread = f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})" if ratios else "-"
    return work, against or "-", f"{median(a for a, _ in pairs):.3f}", spread, "-" if error is None else f"{error:.0e}"


def full_size(rank: int, many: int) -> list[tuple]:
    """A LoRA over all 304 linear layers of FLUX.1-dev's blocks: read from disk, and eight of them made into one."""
    with torch.device("meta"):
        shapes = {name: shape for name, shape in linears(Flux(DEV.flux)).items() if "blocks" in name}
    names, rows = lora_names.names(DEV), []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lora.safetensors"
        io.write(path, {"flux": random_lora(shapes, rank, 0, torch.bfloat16)}, names)
        start = time.perf_counter()
        adapters, _ = io.read(path, names)
        rows.append((f"read {len(shapes)} layers of rank {rank}, {path.stat().st_size / 1e6:.0f} MB", "-",
                     f"{time.perf_counter() - start:.2f}", "-", "-"))
        loras = [random_lora(shapes, rank, i, torch.bfloat16) for i in range(many)]
        both = algebra.combined(loras, [1 / many] * many)
        with tqdm(total=len(shapes), desc="recompression", disable=None) as bar:
            start = time.perf_counter()
            _, kept = algebra.recompressed(both, rank, done=lambda layer: bar.update())
        rows.append((f"{many} of them recompressed to rank {rank}", "-", f"{time.perf_counter() - start:.1f}", "-", "-"))
    return rows


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m lora.bench", description=__doc__.partition(":")[0])
    parser.add_argument("--part", choices=("run-time", "gated", "step", "training", "full-size"), action="append",
                        help="default: all")
    parser.add_argument("--size", choices=SIZES, default="small", help="of the first three (small)")
    parser.add_argument("--rounds", type=int, default=5, help="that count (5)")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the first three (fp32)")
    parser.add_argument("--device", default="cpu", help="of the first three (cpu)")
    flags = parser.parse_args(argv)
    place, dtype = device.choose(flags.device, flags.dtype)
    print(f"{processor(place)}; torch {torch.__version__}; {flags.size}, {flags.dtype} but for training and full-size")
    print("| " + " | ".join(TITLES) + " |\n|" + "---|" * len(TITLES))
    sized = {"run-time": at_run_time, "gated": gated, "step": step}
    parts = {name: partial(measure, SIZES[flags.size], flags.rounds, flags.rank, dtype, place)
             for name, measure in sized.items()}
    parts |= {"training": lambda: training(flags.rounds, 8), "full-size": lambda: full_size(flags.rank, 8)}
    for part, measure in parts.items():
        for cells in measure() if part in (flags.part or parts) else ():
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    cli.run(main)
