"""What fits on the card, and how long it will take: known before anything is loaded.

`--vram GB` takes the first of `candidates` whose expected peak is within the budget. A peak is the most that one of four
stages holds: text encoders, which are gone before the rest comes; pictures into latents; steps; latents into pictures.
Read first: `memory.py`, which counts, `storage.py`, `stream.py`, `strips.py`.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from flux import adapters, checkpoint, device, memory, naming, storage, stream, strips, weights
from flux.adapters import Given
from flux.config import FluxConfig, Preset
from flux.errors import UserError
from flux.inputs import Inputs
from flux.linear import Linear
from flux.memory import Layout, Sizes
from flux.model import Flux
from flux.settings import Conditioned

NAMES = {dtype: name for name, dtype in device.DTYPES.items()}


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

    def counted(self, model: Preset, layouts: Mapping[str, Layout], sizes: Sizes, place: torch.device,
                loras: Iterable[Given] = ()) -> "Plan":
        """With its parts, for these files and sizes."""
        counted = memory.parts(model, layouts, sizes, place.type == "cpu", self.dtype, self.way, self.strips,
                               self.stream_t5, loras)
        return replace(self, parts=counted)

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

    def transformer(self, found: Mapping[str, weights.Found], preset: Preset, place: torch.device) -> Flux:
        if self.way == "plain":
            return adapters.load_flux(found, preset, self.dtype, place)
        network = adapters.load_flux(found, preset, self.dtype if preset.adapter else None)  # mapped, unless it is merged
        if self.way == "streamed":
            return stream.streamed(network, self.dtype, place, lambda: weights.unchanged(found["flux"]))
        storage.store(network, storage.DTYPES[self.way], compute=self.dtype, device=place)
        stored = {layer for layer in network.modules() if isinstance(layer, storage.StoredLinear)}
        return stream.move(network, self.dtype, place, stored)

    def autoencoder(self, found: Mapping[str, weights.Found], preset: Preset, place: torch.device) -> nn.Module:
        whole = weights.load_autoencoder(found, preset.autoencoder, self.dtype, place).eval()
        return strips.InStrips(whole) if self.strips else whole


# Choosing.

def plan_of(asked: Conditioned, model: Preset, found: Mapping[str, weights.Found], place: torch.device, given: Inputs,
            loras: list[Given], batch: int, prompts: int) -> Plan:
    """As the flags say; under --vram the best that fits, which is printed. What a flag settles stays as it is.

    `batch` pictures are drawn together, `prompts` different ones are encoded.
    """
    dtype = device.choose(str(place), asked.dtype)[1]
    if asked.vram is None:
        return Plan(dtype, asked.store, asked.strips)
    sizes = Sizes(*given.size, batch, asked.cfg_scale not in (None, 1), prompts, len(given.seen),
                  tuple(pil.size for pil in given.references), encoded(given, model))
    layouts = {part: checkpoint.layout(weights.state_of(found, part)) for part in ("flux", "ae", "clip", "t5")}
    if asked.controlnet:
        layouts["control"] = checkpoint.layout(naming.select_control(checkpoint.read(asked.controlnet), asked.controlnet))
    layouts |= {part: checkpoint.layout(weights.state_of(found, part)) for part in ("siglip", "redux") if given.seen}

    every = candidates(place, asked.dtype, asked.store, asked.strips)
    plan = choose(asked.vram, (plan.counted(model, layouts, sizes, place, loras) for plan in every),
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
    """Best first. A GPU should be faster with weights in 8 bits than with fetching them (no GPU has measured it).

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


# Time.

def operations(config: FluxConfig, sizes: Sizes, txt: int) -> int:
    """Of a step's matrix products: two per weight and token, and two per pair of tokens and channel for q k^T, for a v."""
    tokens = txt + memory.image_tokens(sizes)
    width, blocks = config.hidden_size, config.depth + config.depth_single_blocks
    weights_per_token = (4 + 2 * config.mlp_ratio) * width**2  # a token meets one of a double block's two streams
    return round(sizes.batch * (1 + sizes.guided) * blocks * tokens * (2 * weights_per_token + 4 * tokens * width))


def estimate(plan: Plan, model: Preset, sizes: Sizes, layout: Layout, place: torch.device) -> float:
    """Seconds per step: products at the rate of one that is timed here, and what bringing the weights takes.

    On a GPU streamed weights come while it computes; on the CPU widening them takes turns with the products.
    """
    tokens, width, count = 512, 1024, sum(t.numel() for t in layout.values() if t.ndim == 2)
    x, linear = torch.randn(tokens, width, device=place, dtype=plan.dtype), Linear(width, 4 * width)
    linear = linear.to(place, plan.dtype)
    once = timed(lambda: linear(x), place)
    products = operations(model.flux, sizes, memory.text_tokens(model, sizes)) / (2 * tokens * linear.weight.numel()) * once
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
