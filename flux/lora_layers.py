"""The 304 linear layers of FLUX.1's blocks, in the order and of the types by which `lora/` learns about LoRAs.

Parts of a layer's rows that mean different things are its slices: q, k, v, the MLP; shift, scale and gate of a modulation.
"""

import re
from dataclasses import replace

from flux.config import FluxConfig
from flux.lora_names import DIFFSYNTH
from lora.probes import Layer


def layers(config: FluxConfig) -> tuple[Layer, ...]:
    """Double blocks, in each the image stream before the text stream, then single blocks."""
    width, hidden, out = config.hidden_size, config.mlp_hidden, []
    for i in range(config.depth):
        for s in ("img", "txt"):
            at = f"double_blocks.{i}.{s}"
            out += [Layer(f"{at}_attn.qkv", f"{s}_qkv", width, (width,) * 3, i, s),
                    Layer(f"{at}_attn.proj", f"{s}_out", width, (width,), i, s),
                    Layer(f"{at}_mlp.0", f"{s}_mlp0", width, (hidden,), i, s),
                    Layer(f"{at}_mlp.2", f"{s}_mlp2", hidden, (width,), i, s),
                    Layer(f"{at}_mod.lin", f"{s}_mod", width, (width,) * 6, i, s)]
    for i in range(config.depth_single_blocks):
        at = f"single_blocks.{i}"
        out += [Layer(f"{at}.linear1", "linear1", width, (width, width, width, hidden), i, "both"),
                Layer(f"{at}.linear2", "linear2", width + hidden, (width,), i, "both"),
                Layer(f"{at}.modulation.lin", "modulation", width, (width,) * 3, i, "both")]
    return tuple(out)


def in_diffsynth(layer: Layer) -> Layer:
    """The same layer under DiffSynth's name, and its type as DiffSynth's published encoders call it."""
    number = re.search(r"_blocks\.(\d+)\.", layer.name)[1]
    theirs = DIFFSYNTH[layer.name.replace(f"_blocks.{number}.", "_blocks.N.")]
    return replace(layer, name=theirs.replace("N", number), type=theirs.partition("N.")[2])
