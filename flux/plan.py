"""What fits on the card, and how long it will take: known before anything is loaded.

`--vram GB` takes the first of `candidates` whose expected peak is within the budget. A peak is the most that one of four
stages holds: text encoders, which are gone before the rest comes; pictures into latents; steps; latents into pictures.
Weights are counted from the names and shapes in the files' headers, everything else by running the networks on shapes
alone (`footprint.py`). Read first: `storage.py`, `stream.py`, `strips.py`.

On a GPU memory is what PyTorch allocates there, without what CUDA takes for itself. On the CPU it is the anonymous memory
of the process beyond Python's and PyTorch's own: weights that are computed with in the file's own dtype stay pages of the
file, which the system drops when it needs room, and count as none.
"""

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from torch import Tensor, nn

from flux import checkpoint, device, footprint, naming, storage, stream, strips, weights
from flux.adapters import Given
from flux.autoencoder import AutoEncoder
from flux.clip import ClipText
from flux.conditioning import CLIP_LENGTH
from flux.config import FluxConfig, Preset
from flux.errors import UserError
from flux.inputs import Inputs
from flux.model import Flux
from flux.settings import Conditioned
from flux.siglip import Redux, SiglipVision
from flux.t5 import T5Encoder

NAMES = {dtype: name for name, dtype in device.DTYPES.items()}
Layout = Mapping[str, Tensor]  # names, shapes and dtypes of a file, on the meta device


@dataclass(frozen=True)
class Sizes:
    """What memory depends on beside the model."""

    width: int  # pixels
    height: int
    batch: int = 1  # pictures that are drawn together
    guided: bool = False  # true guidance: twice as many rows go through the transformer
    prompts: int = 1
    seen: int = 0  # pictures for Redux
    references: tuple[tuple[int, int], ...] = ()  # width, height in pixels
    encoded: tuple[tuple[int, int], ...] = ()  # of all pictures that the autoencoder encodes, one after the other


@dataclass(frozen=True)
class Plan:
    """How the networks lie in memory; with `parts`, the bytes that each of them needs."""

    dtype: torch.dtype  # of the arithmetic
    way: str = "plain"  # of the transformer's weights: plain, int8, fp8, streamed
    strips: bool = False  # the autoencoder strip by strip
    stream_t5: bool = False
    parts: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        said = ((self.way, self.way != "plain"), ("T5 streamed", self.stream_t5), ("autoencoder in strips", self.strips))
        return ", ".join([NAMES[self.dtype], *(word for word, true in said if true)])

    @property
    def stages(self) -> dict[str, int]:
        """Bytes by stage. The autoencoder, LoRAs and a ControlNet stay where they are while the transformer computes."""
        p = self.parts
        kept = p["autoencoder"] + p["features"]
        loaded = kept + p["transformer"] + p["LoRAs"] + p["ControlNet"]
        return {"text": p["text"], "pictures in": max(p["seen"], kept + p["encode"]),
                "steps": loaded + p["step"], "pictures out": loaded + p["decode"]}

    @property
    def peak(self) -> int:
        return max(self.stages.values())

    def transformer(self, found: Mapping[str, weights.Found], config: FluxConfig, place: torch.device) -> Flux:
        if self.way == "plain":
            return weights.load_flux(found, config, self.dtype, place)
        model = weights.load_flux(found, config)  # mapped from its file
        if self.way == "streamed":
            return stream.streamed(model, self.dtype, place, lambda: weights.unchanged(found["flux"]))
        storage.store(model, storage.DTYPES[self.way], compute=self.dtype, device=place)
        stored = {layer for layer in model.modules() if isinstance(layer, storage.StoredLinear)}
        return stream.move(model, self.dtype, place, stored)

    def autoencoder(self, found: Mapping[str, weights.Found], preset: Preset, place: torch.device) -> nn.Module:
        whole = weights.load_autoencoder(found, preset.autoencoder, self.dtype, place).eval()
        return strips.InStrips(whole) if self.strips else whole


# Choosing.

def plan_of(asked: Conditioned, model: Preset, found: Mapping[str, weights.Found], place: torch.device, given: Inputs,
            loras: list[Given], batch: int, prompts: int) -> Plan:
    """As the flags say; under --vram the best that fits, which is printed. What a flag settles stays as it is."""
    dtype = device.choose(str(place), asked.dtype)[1]
    if asked.vram is None:
        return Plan(dtype, asked.store, asked.strips)
    batch = min(batch, asked.num * prompts)
    sizes = Sizes(*given.size, batch, asked.cfg_scale not in (None, 1), prompts, len(given.seen),
                  tuple(pil.size for pil in given.references), encoded(given, model))
    layouts = {part: checkpoint.layout(weights.state_of(found, part)) for part in ("flux", "ae", "clip", "t5")}
    if asked.controlnet:
        layouts["control"] = checkpoint.layout(naming.select_control(checkpoint.read(asked.controlnet), asked.controlnet))
    layouts |= {part: checkpoint.layout(weights.state_of(found, part)) for part in ("siglip", "redux") if given.seen}

    def measured(plan: Plan) -> Plan:
        return replace(plan, parts=parts(plan, model, layouts, sizes, place, loras))
    plan = choose(asked.vram, map(measured, candidates(place, asked.dtype, asked.store, asked.strips)),
                  [f"--{name.replace('_', '-')}" for name in ("dtype", "store", "strips")
                   if getattr(asked, name) != type(asked).__dataclass_fields__[name].default])
    seconds = estimate(plan, model, sizes, layouts["flux"], place)
    print(f"plan: {plan}; at most {gb(plan.peak)} of {asked.vram:g} GB expected "
          f"({', '.join(f'{stage} {gb(size)}' for stage, size in plan.stages.items())}); about {seconds:.2g} s a step, "
          "estimated", flush=True)
    return plan


def encoded(given: Inputs, model: Preset) -> tuple[tuple[int, int], ...]:
    drawn = given.mask or (given.image and given.strength < 1) or model.takes == "control" or given.control
    return (given.size,) * bool(drawn) + tuple(pil.size for pil in given.references)


def candidates(place: torch.device, dtype: str = "auto", store: str = "plain", in_strips: bool = False) -> Iterator[Plan]:
    """Best first. A GPU computes faster with weights in 8 bits than it can fetch them; of the two int8 is the nearer.

    The CPU has weights at hand either way, and making 8 bits wide is as slow as streaming, which rounds nothing. There,
    float32 is kept as long as something in it fits, since pictures should not depend on the budget; then bfloat16.
    """
    ways = ("plain", "streamed", "int8", "fp8") if place.type == "cpu" else ("plain", "int8", "fp8", "streamed")
    dtypes = ("fp32", "bf16") if place.type == "cpu" and dtype == "auto" else (dtype,)
    for name in dtypes:
        for way in ways if store == "plain" else (store,):
            for cut in (True,) if in_strips else (False, True):
                for stream_t5 in (False, True):
                    yield Plan(device.choose(str(place), name)[1], way, cut, stream_t5)


def choose(budget: float, plans: Iterable[Plan], settled: list[str]) -> Plan:
    """The first that fits in so many GB; UserError with the smallest if none does."""
    smallest = None
    for plan in plans:
        if plan.peak <= budget * 1e9:
            return plan
        smallest = plan if smallest is None or plan.peak < smallest.peak else smallest
    stage, size = max(smallest.stages.items(), key=lambda item: item[1])
    more = f", leave out {' and '.join(settled)}" if settled else ""
    raise UserError(f"--vram {budget:g} GB is too little for any plan, expected at least {gb(size)} ({smallest}; most in "
                    f"{stage}); give that{more}, or make --batch, --width and --height smaller")


def gb(size: float) -> str:
    """Rounded up, so that what is told fits."""
    return f"{-(-size // 10**7) / 100:.2f} GB"


# Counting.

def parts(plan: Plan, model: Preset, layouts: Mapping[str, Layout], sizes: Sizes, place: torch.device,
          loras: Iterable[Given] = ()) -> dict[str, int]:
    """Bytes: what weights take, by network, and what computing takes beside them, by stage."""
    dtype, on_cpu = plan.dtype, place.type == "cpu"

    def loaded(part: str) -> int:
        return resident(layouts[part], dtype, on_cpu) if part in layouts else 0
    rows = sizes.batch * (1 + sizes.guided)
    tokens, img = text_tokens(model, sizes), image_tokens(sizes)
    way = plan.way if plan.way in storage.DTYPES else "plain"
    of_kind = {kind: step(model.flux, kind, dtype, way, rows, img, tokens) for kind in ("double_blocks", "single_blocks")}
    transformer, of_step = loaded("flux"), max(of_kind.values())
    if plan.way == "streamed":
        pairs = coming(layouts["flux"], dtype, on_cpu)
        transformer = resident(outside(layouts["flux"]), dtype, on_cpu)
        of_step = max(of_kind[kind] + size for kind, size in pairs.items())
    elif plan.way != "plain":
        transformer = in_8_bits(layouts["flux"], dtype, on_cpu)

    t5, coming_t5 = loaded("t5"), 0
    if plan.stream_t5:
        t5, coming_t5 = resident(outside(layouts["t5"]), dtype, on_cpu), max(coming(layouts["t5"], dtype, on_cpu).values())
    branches = len([name for name in layouts.get("control", ()) if re.match(r"controlnet_(single_)?blocks\..*weight", name)])
    residuals = branches * rows * img * model.flux.hidden_size * dtype.itemsize
    feature = (tokens * model.flux.context_in_dim + model.flux.vec_in_dim) * dtype.itemsize
    return {
        "text": loaded("clip") + t5 + max(clip_step(model, dtype), coming_t5 + t5_step(model, dtype))
        + factors(loras, ("clip", "t5"), dtype),
        "seen": loaded("siglip") + loaded("redux") + (seeing(model, dtype, sizes.seen) if sizes.seen else 0),
        "features": (sizes.prompts + rows) * feature,
        "autoencoder": loaded("ae"),
        "encode": max((encode(model, dtype, plan.strips, *size) for size in sizes.encoded), default=0),
        "transformer": transformer,
        "LoRAs": factors(loras, ("flux",), dtype),
        "ControlNet": loaded("control") + residuals,
        "step": of_step,
        "decode": decode(model, dtype, plan.strips, sizes.batch, sizes.width, sizes.height),
    }


def text_tokens(model: Preset, sizes: Sizes) -> int:
    """T5's, and one per patch that Redux sees."""
    return model.t5_length + sizes.seen * (model.siglip.image_size // model.siglip.patch_size) ** 2


def image_tokens(sizes: Sizes) -> int:
    """One per 16 x 16 pixels, of the drawn picture and of references."""
    return sum(w // 16 * (h // 16) for w, h in ((sizes.width, sizes.height), *sizes.references))


def resident(layout: Layout, dtype: torch.dtype, on_cpu: bool) -> int:
    """Bytes of weights that are loaded whole: on the CPU those of this dtype already stay in their file."""
    return sum(t.numel() * dtype.itemsize for t in layout.values() if not (on_cpu and t.dtype == dtype))


def in_8_bits(layout: Layout, dtype: torch.dtype, on_cpu: bool) -> int:
    wide = {name: t for name, t in layout.items() if t.ndim != 2 or t.numel() < storage.LEAST}
    return resident(wide, dtype, on_cpu) + sum(t.numel() + 4 * len(t) for name, t in layout.items() if name not in wide)


def block_of(name: str) -> tuple[str, int] | None:
    """`double_blocks.3.img_mlp.0.weight` -> ("double_blocks", 3)."""
    match = re.match(r"(?:encoder\.)?(double_blocks|single_blocks|block)\.(\d+)\.", name)
    return match and (match[1], int(match[2]))


def is_linear(name: str, layout: Layout) -> bool:
    """Whether a tensor is the weight or the bias of a linear layer."""
    weight = layout.get(f"{name.rpartition('.')[0]}.weight")
    return weight is not None and weight.ndim == 2


def outside(layout: Layout) -> Layout:
    """What streaming leaves on the device."""
    return {name: t for name, t in layout.items() if not (block_of(name) and is_linear(name, layout))}


def coming(layout: Layout, dtype: torch.dtype, on_cpu: bool) -> dict[str, int]:
    """By kind of block: bytes of one that computes and of one that is being fetched."""
    def first(kind: str) -> Layout:
        return {name: t for name, t in layout.items() if block_of(name) == (kind, 0) and is_linear(name, layout)}
    kinds = {block_of(name)[0] for name in layout if block_of(name)}
    return {kind: 2 * resident(first(kind), dtype, on_cpu) for kind in kinds}


def factors(loras: Iterable[Given], networks: tuple[str, ...], dtype: torch.dtype) -> int:
    """Bytes of the LoRAs' tensors as they lie beside the layers."""
    def count(value: object) -> int:
        if isinstance(value, Tensor):
            return value.numel()
        inside = value if isinstance(value, tuple) else vars(value).values() if hasattr(value, "__dict__") else ()
        return sum(map(count, inside))
    adapters = [lora.parts[part] for lora in loras for part in networks if part in lora.parts and lora.scale]
    return dtype.itemsize * sum(count(terms) for adapter in adapters for terms in adapter.layers.values())


# Computing on shapes: bytes beside the weights. One block of a kind stands for all, as each frees what it made.

@cache
def step(config: FluxConfig, kind: str, dtype: torch.dtype, way: str, rows: int, img: int, txt: int) -> int:
    """Of a velocity through blocks of one kind, for L = img + txt tokens."""
    depth, single = (1, 0) if kind == "double_blocks" else (0, 1)
    config = replace(config, depth=depth, depth_single_blocks=single)
    model = shapes(lambda: Flux(config), dtype)
    if way != "plain":
        storage.store(model, storage.DTYPES[way])

    def velocity():
        x, words = torch.empty(rows, img, config.in_channels, dtype=dtype), torch.empty(rows, txt, config.context_in_dim,
                                                                                        dtype=dtype)
        vec, t = torch.empty(rows, config.vec_in_dim, dtype=dtype), torch.empty(rows, dtype=dtype)
        return model(x, torch.empty(1, img, 3), words, torch.empty(1, txt, 3), vec, t, t)
    return footprint.peak(velocity)


@cache
def t5_step(model: Preset, dtype: torch.dtype) -> int:
    network = shapes(lambda: T5Encoder(replace(model.t5, num_layers=1)), dtype)
    return footprint.peak(lambda: network(torch.zeros(1, model.t5_length, dtype=torch.long)))


@cache
def clip_step(model: Preset, dtype: torch.dtype) -> int:
    network = shapes(lambda: ClipText(replace(model.clip, num_hidden_layers=1)), dtype)
    return footprint.peak(lambda: network(torch.zeros(1, CLIP_LENGTH, dtype=torch.long)))


@cache
def seeing(model: Preset, dtype: torch.dtype, count: int) -> int:
    network = shapes(lambda: SiglipVision(replace(model.siglip, num_hidden_layers=1)), dtype)
    redux = shapes(lambda: Redux(model.siglip.hidden_size, model.t5.d_model), dtype)
    edge = model.siglip.image_size

    def tokens():
        pixels = torch.empty(count, 3, edge, edge, dtype=dtype)
        return torch.cat([redux(network(x[None])) for x in pixels], dim=1)
    return footprint.peak(tokens)


@cache
def encode(model: Preset, dtype: torch.dtype, in_strips: bool, width: int, height: int) -> int:
    network = autoencoder_shapes(model, dtype, in_strips)
    return footprint.peak(lambda: network.encode(torch.empty(1, 3, height, width, dtype=dtype)))


@cache
def decode(model: Preset, dtype: torch.dtype, in_strips: bool, batch: int, width: int, height: int) -> int:
    network, z = autoencoder_shapes(model, dtype, in_strips), model.autoencoder.z_channels
    return footprint.peak(lambda: network.decode(torch.empty(batch, z, height // 8, width // 8, dtype=dtype)))


def autoencoder_shapes(model: Preset, dtype: torch.dtype, in_strips: bool) -> nn.Module:
    whole = shapes(lambda: AutoEncoder(model.autoencoder), dtype)
    return strips.InStrips(whole) if in_strips else whole


def shapes(build: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    with torch.device("meta"):
        return build().to(dtype).requires_grad_(False).eval()


# Time.

def operations(config: FluxConfig, sizes: Sizes, txt: int) -> int:
    """Of a step's matrix products: two per weight and token, and two per pair of tokens and channel for q k^T, for a v."""
    tokens = txt + image_tokens(sizes)
    width, blocks = config.hidden_size, config.depth + config.depth_single_blocks
    weights_per_token = (4 + 2 * config.mlp_ratio) * width**2  # a token meets one of a double block's two streams
    return round(sizes.batch * (1 + sizes.guided) * blocks * tokens * (2 * weights_per_token + 4 * tokens * width))


def estimate(plan: Plan, model: Preset, sizes: Sizes, layout: Layout, place: torch.device) -> float:
    """Seconds per step: products at the rate of one that is timed here, and what bringing the weights takes.

    On a GPU streamed weights come while it computes; on the CPU widening them takes turns with the products.
    """
    tokens, width, count = 512, 1024, sum(t.numel() for t in layout.values() if t.ndim == 2)
    x, linear = torch.randn(tokens, width, device=place, dtype=plan.dtype), nn.Linear(width, 4 * width)
    linear = linear.to(place, plan.dtype)
    once = timed(lambda: linear(x), place)
    products = operations(model.flux, sizes, text_tokens(model, sizes)) / (2 * tokens * linear.weight.numel()) * once
    if plan.way in storage.DTYPES:
        layer = storage.StoredLinear(linear, storage.DTYPES[plan.way], plan.dtype, place)
        return products + count / linear.weight.numel() * timed(layer.dequantised, place)
    if plan.way == "streamed":
        held = linear.weight.detach().to("cpu", next(t.dtype for t in layout.values() if t.ndim == 2))
        held = held.pin_memory() if place.type == "cuda" else held
        fetching = count / held.numel() * timed(lambda: held.to(place, plan.dtype), place)
        return products + fetching if place.type == "cpu" else max(products, fetching)
    return products


@torch.no_grad()
def timed(work: Callable[[], Tensor], place: torch.device, rounds: int = 3) -> float:
    """Seconds, the least of some rounds after one to warm up."""
    seconds = []
    for _ in range(1 + rounds):
        start = time.perf_counter()
        work()
        if place.type != "cpu":
            torch.accelerator.synchronize(place)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
