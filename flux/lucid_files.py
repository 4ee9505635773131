"""Where LucidFlux's own files lie, and how they become networks: strictly, by the names they were published under.

Read first: `weights.py`, which finds the transformer and the autoencoder that it works on.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flux import checkpoint, naming, pth, weights
from flux.checkpoint import refuse, shown
from flux.conditioning import TextEncoders
from flux.config import LucidConfig, Preset
from flux.errors import UserError
from flux.lucidflux import LucidFlux
from flux.siglip import SiglipVision
from flux.swinir import Swinir

FILES = {  # part: names in --weights or a folder of these, best first
    "lucidflux": ("lucidflux.safetensors", "lucidflux.pth"),
    "swinir": ("swinir.safetensors", "swinir.pth", "general_swinir_v1.ckpt"),
    "siglip": ("siglip.safetensors", "siglip2-so400m-patch16-512"),
    "prompt": ("prompt_embeddings.safetensors", "prompt_embeddings.pt"),
}
ENDS = ("img_in", "txt_in", "time_in", "vector_in", "guidance_in")  # of the transformer that a branch has, too
FOLDERS = ("", "lucidflux", "LucidFlux", "models", "DiffBIR")
WHAT = {"lucidflux": "LucidFlux's checkpoint", "swinir": "SwinIR's weights", "siglip": "the SigLIP2 vision tower",
        "prompt": "the embedding of the fixed prompt"}
PUBLISHED = {"lucidflux": "huggingface.co/W2GenAI/LucidFlux lucidflux.pth",
             "swinir": "huggingface.co/lxq007/DiffBIR general_swinir_v1.ckpt",
             "siglip": "huggingface.co/google/siglip2-so400m-patch16-512",
             "prompt": "huggingface.co/W2GenAI/LucidFlux prompt_embeddings.pt"}


@dataclass(frozen=True)
class Place:
    """A part's file; without a path, where it was looked for."""

    part: str
    path: Path | None
    looked: str = ""
    published: str = ""  # where to get it

    def require(self) -> Path:
        if self.path is None:
            raise UserError(f"{WHAT[self.part]} is missing ({self.looked}), expected {self.published}; put it there "
                            f"or name it with --{self.part}")
        return self.path


def find(preset: Preset, folder: Path | None, named: Mapping[str, Path | None]) -> dict[str, Place]:
    """Every part of FILES: where a flag says, else in the folder of the weights. UserError where a named one is missing."""
    folder = folder or (weights.DEMO if preset.name == "demo" else None)
    places = {}
    for part, names in FILES.items():
        path = named.get(part)
        if path is not None and not path.exists():
            raise UserError(f"--{part} {shown(path)} is not there, expected {WHAT[part]}; check it")
        inside = (folder / inner / name for inner in FOLDERS for name in names) if folder and path is None else ()
        looked = f"not in {shown(str(folder))}" if folder else "no --weights DIR"
        stage = {"lucidflux": "branches", "swinir": "swinir"}.get(part)
        published = f"what python train.py lucidflux {stage} makes" if preset.name == "demo" and stage else PUBLISHED[part]
        places[part] = Place(part, path or next((at for at in inside if at.exists()), None), looked, published)
    return places


def load_lucidflux(path: Path, preset: Preset, config: LucidConfig, dtype: torch.dtype | None = None,
                   place: torch.device | str = "cpu", transformer: Mapping[str, Tensor] | None = None) -> LucidFlux:
    """The dict of five state dicts as released, or the same in one safetensors file; or what `save_lucidflux` wrote."""
    state = pth.read(path)
    if not any(name.startswith("condition_lq.") for name in state):
        raise refuse(path, f"is {naming.describe(state)}", WHAT["lucidflux"], "name another file")
    if path.suffix == ".safetensors" and (shared := checkpoint.read_header(path).metadata.get("shared")):
        begun = shared_with(transformer or {}, config.depth)
        if digest(begun) != shared:
            raise refuse(path, "leaves out what it shares with a transformer", "to be used with that one, as it was when "
                         "this was trained", "check --model and --flux")
        state = {**begun, **state}
    return weights.load(lambda: LucidFlux(preset.flux, config), state, dtype, place, path)


def save_lucidflux(path: Path, lucid: LucidFlux, transformer: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """In bfloat16, without the tensors that never left the transformer's: of a branch's last block, text goes nowhere, and
    what reads prompt and guidance is not trained."""
    shared = shared_with(transformer, len(lucid.condition_lq.double_blocks))
    state = {name: tensor.detach().bfloat16() for name, tensor in lucid.state_dict().items()}
    own = {name: tensor for name, tensor in state.items()
           if name not in shared or not torch.equal(tensor.cpu(), shared[name].cpu().bfloat16())}
    checkpoint.save(path, own, {**metadata, "shared": digest(shared)})


def shared_with(transformer: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """What branches of so many blocks began as, under their names."""
    def shares(key: str) -> bool:
        return (int(key.split(".")[1]) < depth if key.startswith("double_blocks.") else key.split(".")[0] in ENDS)
    keys = [key for key in transformer if shares(key)]
    return {f"condition_{name}.{key}": transformer[key] for name in ("lq", "ldr") for key in keys}


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Twelve hex digits of tensors in bfloat16."""
    made = hashlib.sha256()
    for name in sorted(tensors):
        made.update(name.encode() + tensors[name].detach().cpu().bfloat16().contiguous().view(torch.uint8).numpy().tobytes())
    return made.hexdigest()[:12]


def load_swinir(path: Path, config: LucidConfig, place: torch.device | str = "cpu") -> Swinir:
    """In float32, as released. Buffers are computed, and the networks of its loss, which some files hold, left out."""
    state = pth.read(path)
    bare = {re.sub(r"^(state_dict\.)?(module\.)?", "", name): tensor for name, tensor in state.items()}
    own = "keep|" * config.swinir.keeps + r"conv_\w+|patch_embed|layers|norm"
    kept = {name: tensor for name, tensor in bare.items() if re.match(rf"({own})\.", name)
            and name.rpartition(".")[2] not in ("attn_mask", "relative_position_index")}
    if not any(".residual_group.blocks." in name for name in kept):
        raise refuse(path, f"is {naming.describe(state)}", WHAT["swinir"], "name another file")
    return weights.load(lambda: Swinir(config.swinir), kept, torch.float32, place, path)


def load_siglip(path: Path, config: LucidConfig, dtype: torch.dtype | None = None, place: torch.device | str = "cpu"
                ) -> SiglipVision:
    state = naming.select(checkpoint.read(path), "siglip", path)
    return weights.load(lambda: SiglipVision(config.siglip), state, dtype, place, path)


def load_prompt(place: Place, found: Mapping[str, weights.Found], preset: Preset, config: LucidConfig, dtype: torch.dtype,
                device: torch.device, beside: Path) -> tuple[Tensor, Tensor]:
    """(txt (1, L, 4096), vec (1, 768)) of the fixed prompt: from its file, or by the text encoders, and then written
    beside the checkpoint, so that they are needed once."""
    if place.path is None:
        weights.require(found, "clip", "t5", "tokenizer", "tokenizer_2")
        txt, vec = (x.clone() for x in TextEncoders(found, preset, dtype, device)([config.prompt]))  # one may learn beside
        path = beside.with_name("prompt_embeddings.safetensors")
        checkpoint.save(path, {"txt": txt.cpu(), "vec": vec.cpu()}, {"prompt": config.prompt})
        print(f"the prompt's embedding was made and written to {path}", flush=True)
        return txt, vec
    state = pth.read(place.path)
    if not {"txt", "vec"} <= set(state):
        raise refuse(place.path, f"holds {checkpoint.listed(sorted(state))}", "tensors txt and vec", "name another file")
    txt, vec = (state[name].to(device, dtype) for name in ("txt", "vec"))
    txt, vec = txt[None] if txt.ndim == 2 else txt, vec[None] if vec.ndim == 1 else vec
    widths = preset.flux.context_in_dim, preset.flux.vec_in_dim
    if (txt.shape[0], txt.shape[-1], *vec.shape) != (1, widths[0], 1, widths[1]) or txt.ndim != 3:
        raise refuse(place.path, f"holds txt {tuple(txt.shape)} and vec {tuple(vec.shape)}", f"(1, L, {widths[0]}) and "
                     f"(1, {widths[1]})", "check --model")
    return txt, vec
