"""What the tensors of a file are called, and which model they make: any published naming -> the names of our modules.

Our modules carry the names of Black Forest Labs' files (BFL) and of the text and image encoders on Hugging Face. Others
rename (diffusers, ComfyUI), split (q, k, v), swap (the last layer's shift and scale) or rescale (fp8). Every conversion
is a series of recipes, (new name, old names, function of their tensors); nothing is computed before it is asked for.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from flux.checkpoint import layout, refuse, shown

Recipe = tuple[str, tuple[str, ...], Callable[..., Tensor]]

EXPECTED = {"flux": "a FLUX.1 transformer", "ae": "the FLUX.1 autoencoder", "clip": "the CLIP-L text encoder",
            "t5": "the T5 v1.1 XXL encoder", "siglip": "a SigLIP vision tower",
            "redux": "the FLUX.1 Redux embedder"}
PREFIXES = {  # the last, bare one is for files that hold one part only
    "flux": ("model.diffusion_model.", "diffusion_model.", "transformer.", ""),
    "ae": ("vae.", "first_stage_model.", ""),
    "clip": ("text_encoders.clip_l.transformer.", "text_encoders.clip_l.", ""),
    "t5": ("text_encoders.t5xxl.transformer.", "text_encoders.t5xxl.", ""),
    "siglip": ("",),
    "redux": ("",),
}
OTHER_PARTS = re.compile(r"(model\.diffusion_model|vae|first_stage_model|text_encoders)\.")
IGNORED = {  # constants, and the towers and heads that FLUX does not use
    "clip": re.compile(r"(text_model\.)?embeddings\.position_ids|text_projection(\.weight)?|visual_projection\.weight"
                       r"|logit_scale|vision_model\..*"),
    "t5": re.compile(r"logit_scale"),
    "siglip": re.compile(r"text_model\..*|logit_scale|logit_bias|vision_model\.embeddings\.position_ids"),
}

# Marks in names, each of which betrays a model; "\n" is where a name begins. The first rows are never what we want.
KINDS = (
    ("", "a LoRA or another adapter", (".lora_", "\nlora_", ".lora.", ".hada_w1_", ".lokr_w", ".processor.",
                                       "ip_adapter")),
    ("", "a checkpoint in 4-bit bitsandbytes form", (".quant_state.", ".absmax")),
    ("", "a checkpoint in SVDQuant (nunchaku) form", (".qweight", ".wscales")),
    ("", "a ControlNet", ("controlnet_", "control_model.", "input_hint_block")),
    ("", "a FLUX.2 transformer", ("double_stream_modulation_img", "single_stream_modulation")),
    ("", "a FLUX.2 autoencoder", ("\nbn.running_mean",)),
    ("", "a Chroma transformer", ("distilled_guidance_layer.",)),
    ("", "a HunyuanVideo transformer", ("individual_token_refiner", "img_attn_qkv.")),
    ("", "an SD3 transformer", ("joint_blocks.", "\npos_embed.proj.")),
    ("", "a Qwen-Image transformer", (".img_mod.1.", "\ntxt_norm.")),
    ("", "a Z-Image or Lumina transformer", ("context_refiner.",)),
    ("", "an LTX-Video transformer", ("patchify_proj.",)),
    ("", "a Wan transformer", ("blocks.0.self_attn.q.", "\nblocks.0.attn1.to_q.", "\ncondition_embedder.")),
    ("", "an SDXL checkpoint", ("conditioner.embedders.", "\nadd_embedding.", "label_emb.0.0.")),
    ("", "a Stable Diffusion checkpoint", ("cond_stage_model.", "input_blocks.0.0.", "\ndown_blocks.0.attentions.",
                                           "\ndown_blocks.1.attentions.")),
    ("", "a Stable Diffusion autoencoder", ("\nquant_conv.", "\npost_quant_conv.")),
    ("", "a Wan autoencoder", ("\ndecoder.middle.",)),
    ("redux", EXPECTED["redux"], ("\nredux_up.",)),
    ("", "a LucidFlux checkpoint", ("\ncondition_lq.",)),
    ("", "a SwinIR restorer", (".residual_group.blocks.",)),
    ("", "a UMT5 text encoder", ("encoder.block.1.layer.0.SelfAttention.relative_attention_bias.",)),
    ("", "a language model", ("\nmodel.layers.0.", "\nmodel.embed_tokens.", "\nlanguage_model.")),
    ("", "an open_clip model", ("transformer.resblocks.0.",)),
    ("flux", EXPECTED["flux"], ("\ndouble_blocks.", "\nsingle_blocks.", "\nsingle_transformer_blocks.",
                                "\ntransformer_blocks.0.attn.add_")),
    ("ae", "a FLUX.1 autoencoder", ("\ndecoder.conv_in.", "\nencoder.conv_in.", "\ndecoder.mid", "\ndecoder.up")),
    ("t5", "a T5 text encoder", ("\nencoder.block.", "\nshared.")),
    ("clip", "a CLIP text encoder", ("\ntext_model.", "\nembeddings.token_embedding.", "\nencoder.layers.")),
    ("siglip", EXPECTED["siglip"], ("\nvision_model.embeddings.patch_embedding.bias", "\nvision_model.head.")),
    ("clip vision", "a CLIP vision tower", ("\nvision_model.",)),
)

# BFL module: diffusers modules that follow each other along its rows (flux.md section 9). N is the block's number.
TRANSFORMER = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "double_blocks.N.img_mod.lin": ("transformer_blocks.N.norm1.linear",),
    "double_blocks.N.txt_mod.lin": ("transformer_blocks.N.norm1_context.linear",),
    "double_blocks.N.img_attn.qkv": tuple(f"transformer_blocks.N.attn.to_{x}" for x in "qkv"),
    "double_blocks.N.txt_attn.qkv": tuple(f"transformer_blocks.N.attn.add_{x}_proj" for x in "qkv"),
    "double_blocks.N.img_attn.norm.query_norm": ("transformer_blocks.N.attn.norm_q",),
    "double_blocks.N.img_attn.norm.key_norm": ("transformer_blocks.N.attn.norm_k",),
    "double_blocks.N.txt_attn.norm.query_norm": ("transformer_blocks.N.attn.norm_added_q",),
    "double_blocks.N.txt_attn.norm.key_norm": ("transformer_blocks.N.attn.norm_added_k",),
    "double_blocks.N.img_attn.proj": ("transformer_blocks.N.attn.to_out.0",),
    "double_blocks.N.txt_attn.proj": ("transformer_blocks.N.attn.to_add_out",),
    "double_blocks.N.img_mlp.0": ("transformer_blocks.N.ff.net.0.proj",),
    "double_blocks.N.img_mlp.2": ("transformer_blocks.N.ff.net.2",),
    "double_blocks.N.txt_mlp.0": ("transformer_blocks.N.ff_context.net.0.proj",),
    "double_blocks.N.txt_mlp.2": ("transformer_blocks.N.ff_context.net.2",),
    "single_blocks.N.modulation.lin": ("single_transformer_blocks.N.norm.linear",),
    "single_blocks.N.linear1": (*(f"single_transformer_blocks.N.attn.to_{x}" for x in "qkv"),
                                "single_transformer_blocks.N.proj_mlp"),
    "single_blocks.N.linear2": ("single_transformer_blocks.N.proj_out",),
    "single_blocks.N.norm.query_norm": ("single_transformer_blocks.N.attn.norm_q",),
    "single_blocks.N.norm.key_norm": ("single_transformer_blocks.N.attn.norm_k",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),  # shift, scale here; scale, shift there
    "final_layer.linear": ("proj_out",),
}
AUTOENCODER = (  # BFL, diffusers; applied one after the other, in this order both ways (section 5)
    ("mid.block_1.", "mid_block.resnets.0."),
    ("mid.block_2.", "mid_block.resnets.1."),
    ("mid.attn_1.norm.", "mid_block.attentions.0.group_norm."),
    ("mid.attn_1.proj_out.", "mid_block.attentions.0.to_out.0."),
    ("mid.attn_1.", "mid_block.attentions.0.to_"),
    (".block.", ".resnets."),
    (".nin_shortcut.", ".conv_shortcut."),
    (".downsample.", ".downsamplers.0."),
    (".upsample.", ".upsamplers.0."),
    ("coder.norm_out.", "coder.conv_norm_out."),
    ("encoder.down.", "encoder.down_blocks."),  # the decoder's levels are counted from the other end
)


class Renamed(Mapping):
    """Tensors under new names, each made anew when asked for: a 24 GB file converts in the memory of one tensor."""

    def __init__(self, source: Mapping[str, Tensor], recipes: Iterable[Recipe], path: Path):
        self.source, self.recipes, self.path = source, {}, path
        for name, sources, make in recipes:
            if name in self.recipes:
                both = f"{shown(self.recipes[name][0][0])} and {shown(sources[0])}, which both mean {shown(name)}"
                raise refuse(path, f"holds {both}", "each tensor once", "name another file")
            self.recipes[name] = sources, make

    def __getitem__(self, name: str) -> Tensor:
        sources, make = self.recipes[name]
        tensors = [self.source[source] for source in sources]
        try:
            return make(*tensors)
        except (RuntimeError, IndexError, ValueError) as error:  # what torch raises for shapes
            shapes = [f"{shown(key)} {tuple(tensor.shape)}" for key, tensor in zip(sources, tensors, strict=True)]
            raise refuse(self.path, f"has {', '.join(shapes)}, of which no {shown(name)} can be made",
                         "shapes that fit", "download it again") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self.recipes)

    def __len__(self) -> int:
        return len(self.recipes)

    def __contains__(self, name: object) -> bool:
        return name in self.recipes  # Mapping's own would make the tensor

    def layout(self) -> dict[str, Tensor]:
        triples = ((name, *recipe) for name, recipe in self.recipes.items())
        return dict(Renamed(layout(self.source), triples, self.path))


def kinds(names: Iterable[str]) -> dict[str, str]:
    """{words: part or ""} of every model that the names point to."""
    text = "\n" + "\n".join(names)
    return {words: part for part, words, marks in KINDS if any(mark in text for mark in marks)}


def describe(names: Iterable[str]) -> str:
    """What a file with these tensors is, in words."""
    names = list(names)
    if not names:
        return "a file without tensors"
    bare = (re.sub(r"^(model\.)?diffusion_model\.|^transformer\.", "", name) for name in names)
    return next(iter(kinds(names) | kinds(bare)), f"an unknown model (its first tensor is {shown(names[0])})")


def prefix_of(names: Iterable[str], part: str) -> str | None:
    """What stands before the names of a part in this file; None if the part is not in it."""
    names = list(names)
    for prefix in PREFIXES[part]:
        found = kinds(name[len(prefix):] for name in names if name.startswith(prefix)).values()
        if part in found and "" not in found:
            return prefix
    return None


def select(state: Mapping[str, Tensor], part: str, path: Path) -> Mapping[str, Tensor]:
    """The tensors of one part, under the names of our module, out of whatever file holds them."""
    prefix = prefix_of(state, part)
    if prefix is None:
        raise refuse(path, f"is {describe(state)}", EXPECTED[part], "name another file")
    own = ((name.removeprefix(prefix), name) for name in state
           if name.startswith(prefix) or not OTHER_PARTS.match(name))
    kept = ((bare, (name,), same) for bare, name in own if part not in IGNORED or not IGNORED[part].fullmatch(bare))
    return to_own_names(unscaled(Renamed(state, kept, path), path), part, path)


def select_control(state: Mapping[str, Tensor], path: Path) -> Mapping[str, Tensor]:
    """The tensors of a ControlNet for FLUX.1 under the names of `flux/control.py`."""
    if "controlnet_mode_embedder.weight" in state:
        raise refuse(path, "is a union ControlNet, which wants a mode", "one that was trained for one kind of picture",
                     "name another file")
    if "controlnet_blocks.0.weight" not in state or not {"img_in.weight", "x_embedder.weight"} & set(state):
        raise refuse(path, f"is {describe(state)}", "a ControlNet for FLUX.1 in diffusers' or XLabs' form",
                     "name another file")
    if not is_diffusers(state):
        return state
    pixels = any(name.startswith("input_hint_block.") for name in state)
    own = to_bfl(state, "flux", path)
    return Renamed(own, ((_hint_name(name), (name,), same) for name in own), path) if pixels else own


def _hint_name(name: str) -> str:
    """diffusers' names in a ControlNet that reads pixels -> XLabs', who count the activations between convolutions too."""
    name = name.replace("controlnet_x_embedder.", "pos_embed_input.")
    name = name.replace("input_hint_block.conv_in.", "input_hint_block.0.").replace("_block.conv_out.", "_block.14.")
    return re.sub(r"^input_hint_block\.blocks\.(\d)\.", lambda m: f"input_hint_block.{2 * int(m[1]) + 2}.", name)


def to_own_names(state: Mapping[str, Tensor], part: str, path: Path) -> Mapping[str, Tensor]:
    if part in ("flux", "ae") and is_diffusers(state):
        return to_bfl(state, part, path)
    if part == "clip" and not any(name.startswith("text_model.") for name in state):
        return Renamed(state, ((f"text_model.{name}", (name,), same) for name in state), path)
    if part == "t5" and "encoder.embed_tokens.weight" in state:  # the same table as `shared`, often stored once
        twice = "shared.weight" in state
        return Renamed(state, (("shared.weight" if name == "encoder.embed_tokens.weight" else name, (name,), same)
                               for name in state if not (twice and name == "encoder.embed_tokens.weight")), path)
    return state


def unscaled(state: Mapping[str, Tensor], path: Path) -> Renamed:
    """ComfyUI's scaled fp8 -> bfloat16: each `x.weight` times the one number in `x.scale_weight`."""
    def recipes():
        for name in state:
            stem, _, last = name.rpartition(".")
            if last in ("comfy_quant", "weight_scale", "weight_scale_2"):
                raise refuse(path, f"is quantised in a form that is not read here ({shown(name)})",
                             "bf16, fp16, plain fp8 or fp8 with scale_weight", "take one of these")
            if last == "weight" and f"{stem}.scale_weight" in state:
                yield name, (name, f"{stem}.scale_weight"), _rescaled
            elif not (name == "scaled_fp8" or last == "scale_input"
                      or last == "scale_weight" and f"{stem}.weight" in state):
                yield name, (name,), same
    return Renamed(state, recipes(), path)


def is_diffusers(names: Iterable[str]) -> bool:
    """Of a transformer or an autoencoder."""
    own = re.compile(r"(single_)?transformer_blocks\.|x_embedder\.|(en|de)coder\.(mid_block|conv_norm_out)")
    return any(own.match(name) for name in names)


def to_bfl(state: Mapping[str, Tensor], part: str, path: Path) -> Renamed:
    """diffusers' names of part "flux" or "ae" -> BFL's; bit for bit, as the way back."""
    recipes = _transformer_to_bfl(state) if part == "flux" else _autoencoder_to_bfl(state)
    return Renamed(state, recipes, path)


def to_diffusers(state: Mapping[str, Tensor], part: str, path: Path) -> Renamed:
    recipes = _transformer_to_diffusers(state) if part == "flux" else _autoencoder_to_diffusers(state)
    return Renamed(state, recipes, path)


def _transformer_names(names: Iterable[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """TRANSFORMER with its weights, biases and scales, for the blocks that occur in `names` under either naming."""
    numbers = {"double": {}, "single": {}}
    for name in names:
        if match := re.match(r"(single)?[a-z_]*_blocks\.(\d{1,3})\.", name):
            numbers[match[1] or "double"][match[2]] = None
    for ours, theirs in TRANSFORMER.items():
        suffixes = (("scale", "weight"),) if ours.endswith("_norm") else (("weight", "weight"), ("bias", "bias"))
        for number in numbers.get(ours.partition("_blocks.N.")[0], ("",)):
            for a, b in suffixes:
                yield (f"{ours}.{a}".replace(".N.", f".{number}."),
                       tuple(f"{name}.{b}".replace(".N.", f".{number}.") for name in theirs))


def _transformer_to_bfl(state: Mapping[str, Tensor]) -> Iterator[Recipe]:
    rest = dict.fromkeys(state)
    for ours, theirs in _transformer_names(state):
        if all(name in rest for name in theirs):
            yield ours, theirs, _swapped if "adaLN" in ours else _joined
            for name in theirs:
                del rest[name]
    yield from ((name, (name,), same) for name in rest)  # the strict report will tell


def _transformer_to_diffusers(state: Mapping[str, Tensor]) -> Iterator[Recipe]:
    width = layout(state)["img_in.bias"].shape[0] if "img_in.bias" in state else 0  # without it nothing can be cut
    rest = dict.fromkeys(state)
    for ours, theirs in _transformer_names(state):
        if ours not in rest:
            continue
        del rest[ours]
        if len(theirs) == 1:
            yield theirs[0], (ours,), _swapped if "adaLN" in ours else same
        for i, name in enumerate(theirs if len(theirs) > 1 else ()):
            yield name, (ours,), _rows(i * width, None if i == len(theirs) - 1 else (i + 1) * width)
    yield from ((name, (name,), same) for name in rest)


def _autoencoder_to_bfl(state: Mapping[str, Tensor]) -> Iterator[Recipe]:
    levels = len({match[1] for name in state if (match := re.match(r"decoder\.up_blocks\.(\d+)\.", name))})
    for name in state:
        ours = name
        for bfl, diffusers in AUTOENCODER:
            ours = ours.replace(diffusers, bfl)
        ours = re.sub(r"^decoder\.up_blocks\.(\d{1,3})\.", lambda m: f"decoder.up.{levels - 1 - int(m[1])}.", ours)
        yield ours, (name,), _convolution if _is_attention(ours) else same


def _autoencoder_to_diffusers(state: Mapping[str, Tensor]) -> Iterator[Recipe]:
    levels = len({match[1] for name in state if (match := re.match(r"decoder\.up\.(\d+)\.", name))})
    for name in state:
        theirs = name
        for bfl, diffusers in AUTOENCODER:
            theirs = theirs.replace(bfl, diffusers)
        theirs = re.sub(r"^decoder\.up\.(\d{1,3})\.", lambda m: f"decoder.up_blocks.{levels - 1 - int(m[1])}.", theirs)
        yield theirs, (name,), _linear if _is_attention(name) else same


def _is_attention(name: str) -> bool:
    return re.fullmatch(r"(en|de)coder\.mid\.attn_1\.(q|k|v|proj_out)\.weight", name) is not None


def same(tensor: Tensor) -> Tensor:
    return tensor


def _joined(*tensors: Tensor) -> Tensor:
    return torch.cat(tensors) if len(tensors) > 1 else tensors[0]


def _swapped(tensor: Tensor) -> Tensor:
    return torch.cat(tensor.chunk(2)[::-1])


def _rows(start: int, stop: int | None) -> Callable[[Tensor], Tensor]:
    def cut(tensor: Tensor) -> Tensor:
        if start >= (len(tensor) if stop is None else min(stop, len(tensor))):
            raise ValueError("no rows left")
        return tensor[start:stop]
    return cut


def _linear(weight: Tensor) -> Tensor:
    """A 1x1 convolution (out, in, 1, 1) as a linear layer (out, in)."""
    return weight.flatten(1) if weight.ndim == 4 else weight


def _convolution(weight: Tensor) -> Tensor:
    return weight[..., None, None] if weight.ndim == 2 else weight


def _rescaled(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight.float() * scale.float().reshape(())).bfloat16()
