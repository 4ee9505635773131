"""What LoRA files call things: key = prefix + module + suffix, each looked up in a table, none guessed.

Which modules there are, and how each family of programs spells them, is told by whoever knows the network (for FLUX.1:
`flux/lora_names.py`). Prefixes and suffixes are the same for all networks. Each spelling points to a `Place`: some output
rows of one of our layers.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

PREFIXES = (  # stripped in this order, each at most once
    "base_model.model.", "text_encoders.clip_l.transformer.", "text_encoders.t5xxl.transformer.", "transformer.", "unet.",
    "model.diffusion_model.", "diffusion_model.", "text_encoder_2.", "text_encoder.",
)
UNDERSCORED = {  # prefixes before names in which every dot became an underscore: the parts such a name may mean
    "lora_unet_": ("flux",), "lora_transformer_": ("flux",), "lycoris_": ("flux",), "lora_te1_": ("clip",),
    "lora_te2_": ("t5", "clip"), "lora_te3_": ("t5",), "lora_te_": ("clip",),
}
DOTTED_PARTS = {"text_encoders.clip_l.transformer.": ("clip",), "text_encoders.t5xxl.transformer.": ("t5",),
                "text_encoder_2.": ("t5",), "text_encoder.": ("clip",)}

ROLES = {  # suffix: what the tensor is; the first of a role is the one that is written
    **dict.fromkeys((".lora_A.weight", ".lora_down.weight", ".lora_A", ".lora.down.weight", ".lora_linear_layer.down.weight",
                     ".down.weight"), "A"),
    **dict.fromkeys((".lora_B.weight", ".lora_up.weight", ".lora_B", ".lora.up.weight", ".lora_linear_layer.up.weight",
                     ".up.weight"), "B"),
    ".alpha": "alpha", ".scalar": "scalar",
    **dict.fromkeys((".lora_B.bias", ".diff_b"), "bias"),
    ".diff": "dense",
    ".reshape_weight": "reshape",
    **dict.fromkeys((".dora_scale", ".lora_magnitude_vector", ".lora_magnitude_vector.weight",
                     ".lora_magnitude_vector.default", ".magnitude"), "magnitude"),
    **{f".{name}": name for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b",
                                     "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")},
}
REFUSED = {  # suffix: why
    **dict.fromkeys((".lora_mid.weight", ".lokr_t2", ".hada_t1", ".hada_t2"), "for a convolution, which FLUX.1 has not"),
    **dict.fromkeys((".oft_blocks", ".oft_diag", ".oft_R.weight"), "of OFT, which is not a sum"),
    **dict.fromkeys((".a1.weight", ".a2.weight", ".b1.weight", ".b2.weight"), "of GLoRA"),
    **dict.fromkeys((".on_input", ".lora_ia3", ".ia3_l"), "of IA3"),
    ".set_weight": "a whole new weight, as a checkpoint has",
    ".w_norm": "a whole new norm", ".b_norm": "a whole new norm",
}
BOOKKEEPING = re.compile(r"bundle_emb\.|.*_aux\.|.*(\.|_)position_embedding|(.*(\.|_))?text_projection")


@dataclass(frozen=True)
class Place:
    """Output rows `start : start + rows` of a layer with `columns` inputs, under one spelling."""

    part: str  # which network: flux, clip, t5
    layer: str  # our name
    start: int
    rows: int
    columns: int
    dialect: str  # whose spelling
    swapped: bool = False  # the two halves of its rows come the other way round there
    narrower: int = 0  # only so many inputs, the first ones, may be given too
    wider: bool = False  # more may be


@dataclass(frozen=True)
class Names:
    """Every spelling of every layer, and of parameters that a LoRA may replace."""

    dotted: Mapping[str, tuple[Place, ...]]  # several where parts or dialects share a spelling
    parameters: Mapping[str, tuple[str, str, tuple[int, ...]]]  # spelling: part, our name, shape
    underscored: Mapping[str, tuple[Place, ...]] = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "underscored", {name.replace(".", "_"): places for name, places in self.dotted.items()})


@dataclass(frozen=True)
class Key:
    """A key of a file, understood: `module` is its spelling with the prefix, `role` a value of ROLES, or "replace"."""

    module: str
    place: Place | None
    role: str
    parameter: tuple[str, str, tuple[int, ...]] | None = None


class Unknown(Exception):
    """A key that is not understood, and why."""


class Unusable(Unknown):
    """A key without which its module would mean something else: no part of the file may be used."""


def parse(key: str, names: Names) -> Key:
    """Unknown, with words for the user, if no table has it."""
    key = re.sub(r"\.lora_(A|B|magnitude_vector)\.[^.]+(?=\.(weight|bias)$)", r".lora_\1", key)  # an adapter's name in PEFT
    for prefix, parts in UNDERSCORED.items():
        if key.startswith(prefix):
            stem, dot, suffix = key[len(prefix):].partition(".")
            return _key(prefix + stem, names.underscored.get(stem), parts, dot + suffix)
    prefix, rest = "", key
    for each in PREFIXES:
        if rest.startswith(each):
            prefix, rest = prefix + each, rest[len(each):]
    parts = next((parts for each, parts in DOTTED_PARTS.items() if each in prefix), ("flux", "clip", "t5"))
    parameter = rest.removesuffix(".set_weight")  # as ComfyUI writes it
    if parameter in names.parameters:
        return Key(prefix + parameter, None, "replace", names.parameters[parameter])
    rest = re.sub(r"\.(?:processor\.)?((?:to|add)_[a-z_]+)_lora\.", r".\1.lora.", rest)  # diffusers before PEFT
    for stem in _stems(rest):
        if stem in names.dotted:
            return _key(prefix + stem, names.dotted[stem], parts, rest[len(stem):])
    return _key(prefix + rest, None, parts, next((suffix for suffix in (*ROLES, *REFUSED) if rest.endswith(suffix)), ""))


def _stems(name: str) -> Iterator[str]:
    """What may be a module's name: the longest beginnings first."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def _key(module: str, places: tuple[Place, ...] | None, parts: tuple[str, ...], suffix: str) -> Key:
    place = next((place for part in parts for place in places or () if place.part == part), None)
    if suffix in REFUSED:
        raise (Unknown if place is None else Unusable)(f"is {REFUSED[suffix]}")
    if place is None:
        raise Unknown("is no layer of this model")
    if suffix not in ROLES:
        raise Unknown("has an unknown ending")
    return Key(module, place, ROLES[suffix])
