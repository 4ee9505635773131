"""What LoRA files call FLUX.1's layers and its text encoders': every spelling, and which rows of our layers it means.

Spellings: ours (BFL's), diffusers', DiffSynth's, XLabs'. diffusers keeps q, k, v and the MLP's first layer apart where BFL
has one; its last modulation has scale before shift (DiffSynth's version 1 too, version 2 not); XLabs names the attention's
parts by their LoRA.
"""

import re
from collections.abc import Iterator

import torch
from torch import nn

from flux.clip import ClipText
from flux.config import FluxConfig, Preset
from flux.model import Flux
from flux.naming import TRANSFORMER
from flux.t5 import T5Encoder
from lora.dialects import Names, Place

DIFFSYNTH = {  # ours: DiffSynth's, where it has another name than diffusers or more than a part of it
    "double_blocks.N.img_attn.qkv": "blocks.N.attn.a_to_qkv", "double_blocks.N.txt_attn.qkv": "blocks.N.attn.b_to_qkv",
    "double_blocks.N.img_attn.proj": "blocks.N.attn.a_to_out", "double_blocks.N.txt_attn.proj": "blocks.N.attn.b_to_out",
    "double_blocks.N.img_mlp.0": "blocks.N.ff_a.0", "double_blocks.N.img_mlp.2": "blocks.N.ff_a.2",
    "double_blocks.N.txt_mlp.0": "blocks.N.ff_b.0", "double_blocks.N.txt_mlp.2": "blocks.N.ff_b.2",
    "double_blocks.N.img_mod.lin": "blocks.N.norm1_a.linear", "double_blocks.N.txt_mod.lin": "blocks.N.norm1_b.linear",
    "single_blocks.N.linear1": "single_blocks.N.to_qkv_mlp", "single_blocks.N.linear2": "single_blocks.N.proj_out",
    "single_blocks.N.modulation.lin": "single_blocks.N.norm.linear",
    "final_layer.linear": "final_proj_out", "final_layer.adaLN_modulation.1": "final_norm_out.linear",
    "img_in": "x_embedder", "txt_in": "context_embedder",
}
XLABS = {
    "double_blocks.N.img_attn.qkv": "double_blocks.N.processor.qkv_lora1",
    "double_blocks.N.txt_attn.qkv": "double_blocks.N.processor.qkv_lora2",
    "double_blocks.N.img_attn.proj": "double_blocks.N.processor.proj_lora1",
    "double_blocks.N.txt_attn.proj": "double_blocks.N.processor.proj_lora2",
    "single_blocks.N.linear1": "single_blocks.N.processor.qkv_lora",  # its q, k and v rows alone
    "single_blocks.N.linear2": "single_blocks.N.processor.proj_lora",  # its attention columns alone, in most files
}
ALSO = {".ff.net.0.proj": ".ff.linear_in", ".ff.net.2": ".ff.linear_out", ".attn.to_out.0": ".attn.to_out",  # diffusers, too
        ".ff_context.net.0.proj": ".ff_context.linear_in", ".ff_context.net.2": ".ff_context.linear_out"}


def names(preset: Preset) -> Names:
    """Of a preset's transformer and its two text encoders."""
    places = [*transformer_places(preset.flux), *encoder_places("clip", lambda: ClipText(preset.clip)),
              *encoder_places("t5", lambda: T5Encoder(preset.t5))]
    dotted = {}
    for spelling, place in places:
        dotted.setdefault(spelling, {}).setdefault((place.part, place.dialect), place)
    return Names({spelling: tuple(some.values()) for spelling, some in dotted.items()}, norm_scales(preset.flux))


def transformer_places(config: FluxConfig) -> Iterator[tuple[str, Place]]:
    """(spelling, place). Two dialects may have one word for the same place."""
    width = config.hidden_size
    with torch.device("meta"):
        shapes = {name: tuple(layer.weight.shape) for name, layer in Flux(config).named_modules()
                  if isinstance(layer, nn.Linear)}
    for layer, (rows, columns) in shapes.items():
        pattern = re.sub(r"_blocks\.\d+\.", "_blocks.N.", layer)
        number = (re.search(r"_blocks\.(\d+)\.", layer) or ["", ""])[1]
        first = layer == "img_in"  # takes more where pictures are joined on channels
        tokens = config.out_channels if first else 0  # what it takes of the picture itself
        yield layer, Place("flux", layer, 0, rows, columns, "bfl", narrower=tokens, wider=first)
        if pattern in XLABS:
            rows_there = 3 * width if pattern.endswith("linear1") else rows
            yield XLABS[pattern].replace("N", number), Place(
                "flux", layer, 0, rows_there, columns, "xlabs", narrower=width if pattern.endswith("linear2") else 0)
        theirs = TRANSFORMER.get(pattern, ())
        for i, spelling in enumerate(theirs):
            stop = rows if i == len(theirs) - 1 else (i + 1) * width
            place = Place("flux", layer, i * width, stop - i * width, columns, "diffusers", "adaLN" in layer, tokens, first)
            yield spelling.replace("N", number), place
            for usual, other in ALSO.items():
                if spelling.endswith(usual):
                    yield spelling.replace(usual, other).replace("N", number), place
        if pattern in DIFFSYNTH:
            yield DIFFSYNTH[pattern].replace("N", number), Place(
                "flux", layer, 0, rows, columns, "diffsynth", narrower=tokens, wider=first)


def encoder_places(part: str, build) -> Iterator[tuple[str, Place]]:
    """The text encoders keep the names that transformers gives them."""
    with torch.device("meta"):
        layers = {name: tuple(layer.weight.shape) for name, layer in build().named_modules()
                  if isinstance(layer, nn.Linear)}
    for layer, (rows, columns) in layers.items():
        yield layer, Place(part, layer, 0, rows, columns, "transformers")


def norm_scales(config: FluxConfig) -> dict[str, tuple[str, str, tuple[int, ...]]]:
    """The norms of q and k, which control LoRAs replace."""
    found = {}
    for pattern, theirs in TRANSFORMER.items():
        if pattern.endswith("_norm"):
            depth = config.depth if pattern.startswith("double") else config.depth_single_blocks
            for number in range(depth):
                about = ("flux", f"{pattern}.scale".replace("N", str(number)), (config.head_dim,))
                found |= dict.fromkeys((about[1], *(f"{name}.weight".replace("N", str(number)) for name in theirs)), about)
    return found
