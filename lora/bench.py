"""What LoRAs cost: `python -m lora.bench`. Beside merged weights, beside peft on diffusers, and at FLUX.1-dev's size."""

import argparse
import tempfile
import time
from collections.abc import Callable
from importlib import util
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from tqdm import tqdm

from flux import cli, device, flow, lora_names, naming
from flux.bench import Bench, network, processor, timed
from flux.config import DEMO, DEV
from flux.model import Flux
from lora import algebra, inject, io
from lora.adapter import Adapter, LowRank

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


def at_run_time(rounds: int, rank: int, dtype: torch.dtype) -> list[tuple]:
    """Forward passes with 1 and 4 LoRAs on every linear layer, beside the same LoRAs merged."""
    place, rows = torch.device("cpu"), []
    for count in (1, 4):
        works, outputs = {}, {}
        for merged in (False, True):
            model, img, velocity = network(Bench(), "minflux", place, dtype)
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

    def stepping(module: nn.Module, velocity: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        optimiser = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-3, fused=True)

        def step() -> Tensor:
            loss = flow.loss(lambda img, t: velocity(img), x0, eps, t).mean()
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            return loss.detach()
        return step

    ours = Flux(config)
    ours.load_state_dict(base.state_dict())
    inject.add_trained(ours, "blocks", rank)
    mine = stepping(ours, lambda img: ours(img, img_ids[None], txt, txt_ids[None], vec, t, guidance))
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
    other = stepping(theirs, lambda img: theirs(img, txt, vec, t, img_ids, txt_ids, guidance, return_dict=False)[0])
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
    parser.add_argument("--part", choices=("run-time", "training", "full-size"), action="append", help="default: all")
    parser.add_argument("--rounds", type=int, default=5, help="that count (5)")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the run-time part (fp32)")
    flags = parser.parse_args(argv)
    parts = flags.part or ("run-time", "training", "full-size")
    _, dtype = device.choose("cpu", flags.dtype)
    print(f"{processor(torch.device('cpu'))}; torch {torch.__version__}; {flags.dtype} at run time")
    print("| " + " | ".join(TITLES) + " |\n|" + "---|" * len(TITLES))
    for part, measure in (("run-time", lambda: at_run_time(flags.rounds, flags.rank, dtype)),
                          ("training", lambda: training(flags.rounds, 8)), ("full-size", lambda: full_size(flags.rank, 8))):
        for cells in measure() if part in parts else ():
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    cli.run(main)
