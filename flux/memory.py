"""What each part of a drawing needs in memory: its weights, and what computing takes beside them.

Weights are counted from the names and shapes in the files' headers, everything else by running the networks on shapes
alone (`footprint.py`).

On a GPU memory is what PyTorch allocates there, without what CUDA takes for itself. On the CPU it is the anonymous memory
of the process beyond Python's and PyTorch's own: weights that are computed with in the file's own dtype stay pages of the
file, which the system drops when it needs room, and count as none.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor, nn

from flux import footprint, storage, strips
from flux.adapters import Given
from flux.autoencoder import AutoEncoder
from flux.clip import ClipText
from flux.conditioning import CLIP_LENGTH
from flux.config import FluxConfig, Preset
from flux.model import Flux
from flux.siglip import Redux, SiglipVision
from flux.t5 import T5Encoder

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


def parts(model: Preset, layouts: Mapping[str, Layout], sizes: Sizes, on_cpu: bool, dtype: torch.dtype, way: str,
          in_strips: bool, stream_t5: bool, loras: Iterable[Given]) -> dict[str, int]:
    """Bytes: what weights take, by network, and what computing takes beside them, by stage. See `plan.Plan`."""

    def loaded(part: str) -> int:
        return resident(layouts[part], dtype, on_cpu) if part in layouts else 0
    rows = sizes.batch * (1 + sizes.guided)
    tokens, img = text_tokens(model, sizes), image_tokens(sizes)
    kinds, of_layers = ("double_blocks", "single_blocks"), way if way in storage.DTYPES else "plain"
    of_loras = factors(loras, ("flux",), dtype)
    place = "cpu" if on_cpu and not of_loras else "meta"  # layers with a LoRA have no gelu in their product
    of_kind = {kind: step(model.flux, kind, dtype, of_layers, rows, img, tokens, place) for kind in kinds}
    transformer, of_step = loaded("flux"), max(of_kind.values())
    if way == "streamed":
        pairs = coming(layouts["flux"], dtype, on_cpu)
        transformer = resident(outside(layouts["flux"]), dtype, on_cpu)
        of_step = max(of_kind[kind] + size for kind, size in pairs.items())
    elif way != "plain":
        transformer = in_8_bits(layouts["flux"], dtype, on_cpu)

    t5, coming_t5 = loaded("t5"), 0
    if stream_t5:
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
        "encode": max((encode(model, dtype, in_strips, *size) for size in sizes.encoded), default=0),
        "transformer": transformer,
        "LoRAs": of_loras,
        "ControlNet": loaded("control") + residuals,
        "step": of_step,
        "decode": decode(model, dtype, in_strips, sizes.batch, sizes.width, sizes.height),
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
def step(config: FluxConfig, kind: str, dtype: torch.dtype, way: str, rows: int, img: int, txt: int, place: str) -> int:
    """Of a velocity through blocks of one kind, for L = img + txt tokens. place: see `footprint.peak`."""
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
    return footprint.peak(velocity, place)


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
