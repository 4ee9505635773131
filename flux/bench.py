"""How long our networks take and how much memory, beside diffusers and transformers where these are installed.

`python sample.py bench`. Every contender gets the same random weights and inputs. Outputs are compared first, which also
warms up; then all run in turn, A B A B, so that a slow moment of the machine meets each of them, and every round gives
one ratio of ours to theirs. Memory is measured in a fresh process per contender.
"""

import ctypes
import gc
import multiprocessing
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib import metadata, util
from pathlib import Path
from statistics import median
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flux import cli, compiled, device, naming
from flux.autoencoder import AutoEncoder
from flux.clip import ClipText
from flux.config import AutoEncoderConfig, ClipTextConfig, FluxConfig, T5Config
from flux.errors import UserError
from flux.linear import Linear
from flux.model import Flux
from flux.t5 import T5Encoder

LIBRARIES = ("diffusers", "transformers")
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
Work = Callable[[], Tensor]  # does it once; its output is what is compared


@dataclass(frozen=True)
class Bench:
    """Time and memory of our networks, beside diffusers and transformers where these are installed."""

    part: tuple[Literal["transformer", "backward", "clip", "t5", "decode"], ...] = (  # what to time (default all)
        "transformer", "backward", "clip", "t5", "decode")
    against: tuple[Literal["diffusers", "transformers", "formulation", "compiled", "diffusers-compiled"], ...] = (
        # contenders; formulation: ours in the original's steps; compiled: ours by --compile (default: what is installed)
    )
    dtype: tuple[Literal["fp32", "bf16"], ...] = ("fp32",)  # of weights and inputs (default fp32)
    device: str = "auto"  # cpu, cuda or cuda:1; auto takes a GPU if there is one
    repeats: int = 5  # rounds that count
    clock: Literal["wall", "process"] = "wall"  # process: its own CPU time, for a machine that does other things as well
    memory: bool = True  # measure peak memory, too
    hidden: int = 768  # width of the transformer, a multiple of 128
    depth: int = 4  # its double blocks
    single: int = 8  # its single blocks
    image_tokens: int = 1024  # 1024 are a picture of 512 x 512 pixels
    text_tokens: int = 128  # of the transformer and T5
    clip_width: int = 768  # a multiple of 64
    clip_layers: int = 12  # its 77 tokens are given
    t5_width: int = 1024  # a multiple of 64
    t5_layers: int = 4  # the released one has 24, four times as wide
    ae_width: int = 64  # channels of the autoencoder's outer level, a multiple of 32
    latent: int = 32  # edge of the square of latents to decode, in cells of 8 pixels

    def __post_init__(self):
        least = {"hidden": 128, "clip_width": 64, "t5_width": 64, "ae_width": 32}
        for name, value in vars(self).items():
            step = least.get(name, 1)
            if type(value) is int and (value < step or value % step):
                flag = "--" + name.replace("_", "-")
                raise UserError(f"{flag} came as {value}, expected a positive multiple of {step}, as in {flag} {step}")


@dataclass(frozen=True)
class Row:
    """Our network beside one contender, or alone. Seconds are medians, `ratios` ours / theirs by round, peaks bytes."""

    part: str
    dtype: str
    ours: float
    our_peak: int | None = None
    against: str | None = None
    theirs: float | None = None
    their_peak: int | None = None
    error: float | None = None
    ratios: tuple[float, ...] = ()

    @property
    def ratio(self) -> float | None:
        return median(self.ratios) if self.ratios else None


# What is timed: (bench, who, place, dtype) -> work. Weights and inputs are drawn from a fixed seed on the CPU, in a fixed
# order, so each contender gets the same ones in whatever process it is built.

def network(bench: Bench, who: str, place: torch.device, dtype: torch.dtype) -> tuple[nn.Module, Tensor, Callable]:
    """One transformer: the module, img (1, L, 64) and the function img -> velocity."""
    torch.manual_seed(0)
    config = FluxConfig(hidden_size=bench.hidden, num_heads=bench.hidden // 128, depth=bench.depth,
                        depth_single_blocks=bench.single)
    flux = Flux(config)
    img = torch.randn(1, bench.image_tokens, config.in_channels)
    txt = torch.randn(1, bench.text_tokens, config.context_in_dim)
    vec, t, guidance = torch.randn(1, config.vec_in_dim), torch.tensor([0.75]), torch.tensor([3.5])
    img, txt, vec, t, guidance = (x.to(place, dtype) for x in (img, txt, vec, t, guidance))
    cells = torch.arange(bench.image_tokens)
    img_ids = torch.stack((0 * cells, cells // 32, cells % 32), dim=-1).float().to(place)    # (L, 3): rows of 32 cells
    txt_ids = torch.zeros(bench.text_tokens, 3, device=place)
    if who == "compiled":
        compiled.compile_blocks(flux)
    for layer in flux.modules() if who == "formulation" else ():
        if isinstance(layer, Linear):
            layer.__class__ = nn.Linear  # its products are torch's
    if not who.startswith("diffusers"):
        flux = flux.to(place, dtype)
        forward = flux if who != "formulation" else lambda *inputs: formulation(flux, *inputs)
        return flux, img, lambda img: forward(img, img_ids[None], txt, txt_ids[None], vec, t, guidance)

    from diffusers import FluxTransformer2DModel

    theirs = FluxTransformer2DModel(num_layers=config.depth, num_single_layers=config.depth_single_blocks,
                                    num_attention_heads=config.num_heads, guidance_embeds=True)
    theirs.load_state_dict(renamed(flux, "flux", place, dtype), assign=True)
    if who == "diffusers-compiled":
        theirs.compile(dynamic=False)
    return theirs, img, lambda img: theirs(img, txt, vec, t, img_ids, txt_ids, guidance, return_dict=False)[0]


def renamed(model: nn.Module, part: str, place: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights under diffusers' names, cast: to be assigned, as diffusers' own .to(dtype) warns."""
    state = naming.to_diffusers(model.state_dict(), part, Path("minflux"))
    return {name: tensor.to(place, dtype, copy=True) for name, tensor in state.items()}


def transformer(bench: Bench, who: str, place: torch.device, dtype: torch.dtype) -> Work:
    _, img, velocity = network(bench, who, place, dtype)
    return torch.no_grad()(lambda: velocity(img))


def backward(bench: Bench, who: str, place: torch.device, dtype: torch.dtype) -> Work:
    """Forward and backward, with gradients for every weight and for img, which is what is compared."""
    module, img, velocity = network(bench, who, place, dtype)

    def work():
        leaf = img.clone().requires_grad_()
        velocity(leaf).square().mean().backward()
        module.zero_grad()
        return leaf.grad
    return work


def clip(bench: Bench, who: str, place: torch.device, dtype: torch.dtype) -> Work:
    torch.manual_seed(0)
    config = ClipTextConfig(hidden_size=bench.clip_width, intermediate_size=4 * bench.clip_width,
                            num_hidden_layers=bench.clip_layers, num_attention_heads=bench.clip_width // 64)
    model = ClipText(config)
    ids = torch.randint(config.vocab_size, (1, config.max_position_embeddings)).to(place)
    if who == "minflux":
        model = model.to(place, dtype).eval()
        return torch.no_grad()(lambda: model(ids)[1])

    from transformers import CLIPTextConfig, CLIPTextModel

    theirs = CLIPTextModel(CLIPTextConfig(**vars(config))).to(place, dtype).eval()
    names = theirs.state_dict().keys()  # since version 5 they begin without text_model.
    theirs.load_state_dict({name if name in names else name.removeprefix("text_model."): tensor
                            for name, tensor in model.state_dict().items()})
    return torch.no_grad()(lambda: theirs(ids).pooler_output)


def t5(bench: Bench, who: str, place: torch.device, dtype: torch.dtype) -> Work:
    torch.manual_seed(0)
    config = T5Config(d_model=bench.t5_width, d_ff=5 * bench.t5_width // 2, num_layers=bench.t5_layers,
                      num_heads=bench.t5_width // 64)
    model = T5Encoder(config)
    ids = torch.randint(config.vocab_size, (1, bench.text_tokens)).to(place)
    if who == "minflux":
        model = model.to(place, dtype).eval()
        return torch.no_grad()(lambda: model(ids))

    import transformers

    theirs = transformers.T5EncoderModel(transformers.T5Config(**vars(config), feed_forward_proj="gated-gelu"))
    state = model.state_dict()
    theirs.load_state_dict(state | {"encoder.embed_tokens.weight": state["shared.weight"]})
    theirs = theirs.to(place, dtype).eval()
    return torch.no_grad()(lambda: theirs(ids).last_hidden_state)


def decode(bench: Bench, who: str, place: torch.device, dtype: torch.dtype) -> Work:
    torch.manual_seed(0)
    config = AutoEncoderConfig(ch=bench.ae_width)
    model = AutoEncoder(config)
    latents = torch.randn(1, config.z_channels, bench.latent, bench.latent).to(place, dtype)
    if who == "minflux":
        model = model.to(place, dtype)
        return torch.no_grad()(lambda: model.decode(latents))

    from diffusers import AutoencoderKL

    levels = len(config.ch_mult)
    theirs = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(config.ch * m for m in config.ch_mult), layers_per_block=config.num_res_blocks,
        latent_channels=config.z_channels, use_quant_conv=False, use_post_quant_conv=False)
    theirs.load_state_dict(renamed(model, "ae", place, dtype), assign=True)
    theirs.eval()
    scale, shift = config.scale_factor, config.shift_factor
    return torch.no_grad()(lambda: theirs.decode(latents / scale + shift, return_dict=False)[0])


WORK = {"transformer": (transformer, ("diffusers", "formulation", "compiled", "diffusers-compiled")),
        "backward": (backward, ("diffusers", "formulation", "compiled", "diffusers-compiled")),
        "clip": (clip, ("transformers",)), "t5": (t5, ("transformers",)), "decode": (decode, ("diffusers",))}


# The same network in the steps of the original release (black-forest-labs/flux, which cannot be imported beside us):
# tokens behind heads in memory, rotation by 2x2 matrices, norms and modulation written out, torch's linear layers. None
# of its code is here.

def formulation(flux: Flux, img, img_ids, txt, txt_ids, vec, t, guidance) -> Tensor:
    vec = flux.condition(vec, t, guidance)
    img, txt = flux.img_in(img), flux.txt_in(txt)
    pe = _matrices(torch.cat((txt_ids, img_ids), dim=1), flux.config)
    for block in flux.double_blocks:
        img, txt = _double(block, img, txt, vec, pe)
    x = torch.cat((txt, img), dim=1)
    for block in flux.single_blocks:
        x = _single(block, x, vec, pe)
    shift, scale = flux.final_layer.adaLN_modulation(vec).chunk(2, dim=1)
    return flux.final_layer.linear(_modulate(x[:, txt.shape[1]:], shift[:, None], scale[:, None]))


def _matrices(ids: Tensor, config: FluxConfig) -> Tensor:
    """(B, L, 3) -> (B, 1, L, E/2, 2, 2), one rotation per channel pair."""
    turns = []
    for axis, width in enumerate(config.axes_dim):
        omega = 1 / config.theta ** (torch.arange(0, width, 2, dtype=torch.float64, device=ids.device) / width)
        angle = torch.einsum("bl,d->bld", ids[..., axis].double(), omega)
        turns.append(torch.stack((angle.cos(), -angle.sin(), angle.sin(), angle.cos()), dim=-1))
    return rearrange(torch.cat(turns, dim=2), "b l d (i j) -> b 1 l d i j", i=2).float()


def _turn(x: Tensor, pe: Tensor) -> Tensor:
    pairs = rearrange(x.float(), "b h l (d j) -> b h l d 1 j", j=2)
    return (pe[..., 0] * pairs[..., 0] + pe[..., 1] * pairs[..., 1]).flatten(3).type_as(x)


def _attention(q: Tensor, k: Tensor, v: Tensor, pe: Tensor) -> Tensor:
    return rearrange(F.scaled_dot_product_attention(_turn(q, pe), _turn(k, pe), v), "b h l e -> b l (h e)")


def _rms(x: Tensor, scale: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(torch.mean(wide**2, dim=-1, keepdim=True) + 1e-6)).to(x.dtype) * scale


def _qkv(joined: Tensor, norm: nn.Module, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = rearrange(joined, "b l (three h e) -> three b h l e", three=3, h=heads)
    return _rms(q, norm.query_norm.scale).to(v), _rms(k, norm.key_norm.scale).to(v), v


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return (1 + scale) * F.layer_norm(x, x.shape[-1:], eps=1e-6) + shift


def _mlp(layers: nn.Sequential, x: Tensor) -> Tensor:
    return layers[2](F.gelu(layers[0](x), approximate="tanh"))


def _double(block: nn.Module, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
    img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = block.img_mod(vec)
    txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = block.txt_mod(vec)
    img_qkv = block.img_attn.qkv(_modulate(img, img_shift1, img_scale1))
    img_q, img_k, img_v = _qkv(img_qkv, block.img_attn.norm, block.img_attn.num_heads)
    txt_qkv = block.txt_attn.qkv(_modulate(txt, txt_shift1, txt_scale1))
    txt_q, txt_k, txt_v = _qkv(txt_qkv, block.txt_attn.norm, block.txt_attn.num_heads)
    q, k, v = torch.cat((txt_q, img_q), dim=2), torch.cat((txt_k, img_k), dim=2), torch.cat((txt_v, img_v), dim=2)
    attn = _attention(q, k, v, pe)
    txt_attn, img_attn = attn[:, :txt.shape[1]], attn[:, txt.shape[1]:]
    img = img + img_gate1 * block.img_attn.proj(img_attn)
    img = img + img_gate2 * _mlp(block.img_mlp, _modulate(img, img_shift2, img_scale2))
    txt = txt + txt_gate1 * block.txt_attn.proj(txt_attn)
    txt = txt + txt_gate2 * _mlp(block.txt_mlp, _modulate(txt, txt_shift2, txt_scale2))
    return img, txt


def _single(block: nn.Module, x: Tensor, vec: Tensor, pe: Tensor) -> Tensor:
    shift, scale, gate = block.modulation(vec)
    both = block.linear1(_modulate(x, shift, scale))
    qkv, mlp = torch.split(both, (3 * x.shape[2], both.shape[2] - 3 * x.shape[2]), dim=2)
    attn = _attention(*_qkv(qkv, block.norm, block.num_heads), pe)
    return x + gate * block.linear2(torch.cat((attn, F.gelu(mlp, approximate="tanh")), dim=2))


# Measuring.

def measure(bench: Bench) -> Iterator[Row]:
    for part in bench.part:
        for dtype in bench.dtype:
            yield from rows(bench, part, dtype)


def rows(bench: Bench, part: str, dtype: str) -> list[Row]:
    """One row per contender, or one of ours alone."""
    place, kind = device.choose(bench.device, dtype)
    make, possible = WORK[part]
    others = [who for who in possible if who in bench.against or (not bench.against and installed(who))]
    everyone = ("minflux", *others)
    peaks = {who: peak_in_fresh_process(bench, part, who, place, kind) if bench.memory else None for who in everyone}
    works = {who: make(bench, who, place, kind) for who in everyone}
    outputs = {who: work().double() for who, work in works.items()}
    seconds = {who: [] for who in everyone}
    for _ in range(bench.repeats):
        for who, work in works.items():
            seconds[who].append(timed(work, place, time.process_time if bench.clock == "process" else time.perf_counter))
    ours = Row(part, dtype, median(seconds["minflux"]), peaks["minflux"])
    return [replace(ours, against=who, theirs=median(seconds[who]), their_peak=peaks[who],
                    error=relative_error(outputs["minflux"], outputs[who]),
                    ratios=tuple(a / b for a, b in zip(seconds["minflux"], seconds[who], strict=True)))
            for who in others] or [ours]


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def timed(work: Work, place: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds."""
    wait(place)
    start = clock()
    work()
    wait(place)
    return clock() - start


def wait(place: torch.device) -> None:
    if place.type != "cpu":
        torch.accelerator.synchronize(place)


def peak_in_fresh_process(bench: Bench, part: str, who: str, place: torch.device, dtype: torch.dtype) -> int | None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(peak, bench, part, who, place, dtype).result()


def peak(bench: Bench, part: str, who: str, place: torch.device, dtype: torch.dtype) -> int | None:
    """Bytes that one warm call needs at most beyond weights and inputs; None where the system does not tell."""
    counted = place.type == "cpu" and platform.libc_ver()[0] == "glibc" and os.access("/proc/self/clear_refs", os.W_OK)
    if counted:  # from here on a tensor's memory goes back to the system when it is freed, and fresh memory is counted
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
    work = WORK[part][0](bench, who, place, dtype)
    work()
    gc.collect()
    if place.type == "cuda":
        wait(place)
        before = torch.cuda.memory_allocated(place)
        torch.cuda.reset_peak_memory_stats(place)
        work()
        return torch.cuda.max_memory_allocated(place) - before
    if not counted:
        return None
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = status("VmRSS")
    work()
    return status("VmHWM") - before


def status(name: str) -> int:
    """Bytes, of this process (Linux)."""
    return 1024 * int(re.search(rf"^{name}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1])


def installed(who: str) -> bool:
    return who in LIBRARIES and util.find_spec(who) is not None


# The command.

COLUMNS = "{:<12}{:<6}{:<13}{:>9}{:>11}{:>11}   {:<18}{:>9}{:>11}"


def main(argv: list[str]) -> None:
    command = cli.describe(Path(__file__)).sample
    if cli.wants_help(argv):
        print(cli.help_text("python sample.py bench [flags]", command))
        return
    bench = Bench(**cli.parse(argv, command))
    absent = [who for who in LIBRARIES if not installed(who)]
    if lacking := [who for who in absent if who in [other.partition("-")[0] for other in bench.against]]:
        raise UserError(f"--against {lacking[0]} is not installed, expected a library that is; pip install {lacking[0]}")
    place, _ = device.choose(bench.device)
    if any(who.endswith("compiled") for who in bench.against):
        compiled.check(place)
    print(heading(bench, place), flush=True)
    if absent and not bench.against:
        print(f"not installed, so not compared: {', '.join(absent)}", flush=True)
    print(COLUMNS.format("part", "dtype", "against", "error", "ours ms", "theirs ms", "ratio", "ours MB", "theirs MB"))
    for row in measure(bench):
        print(line(row), flush=True)


def heading(bench: Bench, place: torch.device) -> str:
    versions = [f"{name} {metadata.version(name)}" for name in ("torch", *filter(installed, LIBRARIES))]
    step = (f"transformer {bench.hidden} wide, {bench.depth} double and {bench.single} single blocks, "
            f"{bench.image_tokens} + {bench.text_tokens} tokens")
    texts = (f"CLIP {bench.clip_width} x {bench.clip_layers} layers, 77 tokens; "
             f"T5 {bench.t5_width} x {bench.t5_layers} layers, {bench.text_tokens} tokens")
    edge = 8 * bench.latent
    return f"""machine  {processor(place)}; {', '.join(versions)}
sizes    {step}
         {texts}; autoencoder {bench.ae_width} wide, {edge} x {edge} pixels
error    max|ours - theirs| / max|theirs|, before the clock starts; backward is forward and backward, its gradient for img
ms       {bench.clock} time, medians of {bench.repeats} rounds in turn; ratio ours / theirs: their median (least-greatest)
MB       peak of one call in a fresh process, beyond weights and inputs
"""


def processor(place: torch.device) -> str:
    if place.type == "cuda":
        return torch.cuda.get_device_name(place)
    info = Path("/proc/cpuinfo")
    name = re.search(r"^model name\s*:\s*(.+)", info.read_text(), re.MULTILINE) if info.exists() else None
    return f"{name[1] if name else platform.machine()}, {torch.get_num_threads()} threads"


def line(row: Row) -> str:
    def shown(value, unit: float, form: str = ".1f") -> str:
        return "-" if value is None else format(value / unit, form)

    spread = f"{row.ratio:.2f} ({min(row.ratios):.2f}-{max(row.ratios):.2f})" if row.ratios else "-"
    return COLUMNS.format(row.part, row.dtype, row.against or "-", shown(row.error, 1, ".1e"), shown(row.ours, 1e-3),
                          shown(row.theirs, 1e-3), spread, shown(row.our_peak, 1e6), shown(row.their_peak, 1e6))


SAMPLE = Bench
