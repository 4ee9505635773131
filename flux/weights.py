"""From files on disk to networks that run: which file holds which part, and loading it strictly. Nothing is downloaded.

Read first: `checkpoint.py` (files), `naming.py` (names). `python -m flux.weights` lists found and missing parts;
`python -m flux.weights convert SRC DST --to diffusers` renames a transformer or an autoencoder.
"""

import argparse
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from flux import checkpoint, cli, naming
from flux.autoencoder import AutoEncoder
from flux.checkpoint import CheckpointError, layout, listed, read, refuse, save, shown
from flux.clip import ClipText
from flux.config import PRESETS, AutoEncoderConfig, ClipTextConfig, FluxConfig, Preset, SiglipConfig, T5Config
from flux.control import ControlNet
from flux.errors import UserError
from flux.model import Flux
from flux.siglip import Redux, SiglipVision
from flux.t5 import T5Encoder

PARTS = ("flux", "ae", "clip", "t5", "tokenizer", "tokenizer_2", "siglip", "redux")
VARIABLES = {"flux": "FLUX_MODEL", "ae": "FLUX_AE"}  # as in black-forest-labs/flux
DEMO = Path(__file__).parent / "demo" / "weights"

RELEASES = {  # preset: file, repository on huggingface.co
    "dev": ("flux1-dev", "black-forest-labs/FLUX.1-dev"),
    "krea": ("flux1-krea-dev", "black-forest-labs/FLUX.1-Krea-dev"),
    "schnell": ("flux1-schnell", "black-forest-labs/FLUX.1-schnell"),
    "fill": ("flux1-fill-dev", "black-forest-labs/FLUX.1-Fill-dev"),
    "kontext": ("flux1-kontext-dev", "black-forest-labs/FLUX.1-Kontext-dev"),
    "canny": ("flux1-canny-dev", "black-forest-labs/FLUX.1-Canny-dev"),
    "depth": ("flux1-depth-dev", "black-forest-labs/FLUX.1-Depth-dev"),
}
FILES = {  # best first; {stem} is the release's file
    "flux": ("{stem}.safetensors", "{stem}.sft", "{stem}[-_]fp8*.safetensors"),
    "ae": ("ae.safetensors", "ae.sft"),
    "clip": ("clip_l.safetensors",),
    "t5": ("t5xxl_fp16.safetensors", "t5xxl_bf16.safetensors", "t5xxl*.safetensors"),
    "siglip": ("sigclip_vision_patch14_384.safetensors",),
    "redux": ("flux1-redux-dev.safetensors",),
}
FLAGS = {"redux": "redux-weights"}  # of a part that is not called like its flag: --redux names pictures
COMFYUI = {  # folders of ComfyUI and of its models/
    "flux": ("diffusion_models", "unet", "checkpoints"), "ae": ("vae",), "clip": ("text_encoders", "clip"),
    "t5": ("text_encoders", "clip"), "siglip": ("clip_vision",), "redux": ("style_models",),
}
DIFFUSERS = {
    "flux": "transformer", "ae": "vae", "clip": "text_encoder", "t5": "text_encoder_2", "siglip": "image_encoder",
    "redux": "image_embedder", "tokenizer": "tokenizer", "tokenizer_2": "tokenizer_2",
}
TOKENIZERS = {"tokenizer": (("vocab.json", "merges.txt"), ("tokenizer.json",)), "tokenizer_2": (("spiece.model",),)}


@dataclass(frozen=True)
class Found:
    """Where one part lies, or, without a path, where it was looked for."""

    part: str
    path: Path | None
    kind: str  # named, demo, bfl, comfyui, diffusers, single file; or missing
    size: int  # bytes on disk
    published: str  # where to get it
    looked: str = ""


def find(preset: Preset, weights: str | Path | None = None, overrides: Mapping[str, str | Path | None] | None = None,
         env: Mapping[str, str] = os.environ) -> dict[str, Found]:
    """Every part of a preset. A flag for the part comes first, then --weights, FLUX_MODEL or FLUX_AE, FLUX_WEIGHTS.

    The demo's weights lie in the package, and the environment, which speaks of real models, does not change them.
    UserError if something named is not there; a part that was only looked for is `missing`: see `require`.
    """
    demo = preset.name.partition("-")[0] == "demo"
    env = {} if demo else env
    asked = weights or env.get("FLUX_WEIGHTS")
    if asked and not os.path.isdir(asked):
        raise UserError(f"{'--weights' if weights else 'FLUX_WEIGHTS'} {shown(str(asked))} is no folder, expected the "
                        "one that holds the weights; check the name")
    folder = asked or (DEMO if demo else None)
    found = {}
    for part in PARTS:
        published = _published(preset, part)
        flagged, variable = (overrides or {}).get(part), env.get(VARIABLES.get(part, ""))
        in_folder = None if flagged or not folder else _search(Path(folder), preset, part)
        if flagged:
            found[part] = _named(part, f"--{FLAGS.get(part, part)}", flagged, published)
        elif variable and not (in_folder and weights):
            found[part] = _named(part, VARIABLES[part], variable, published)
        elif in_folder:
            path, kind = in_folder
            found[part] = Found(part, path, kind, _size(path, part), published)
        else:
            looked = f"not in {shown(str(folder))}" if folder else "no --weights DIR and no FLUX_WEIGHTS"
            found[part] = Found(part, None, "missing", 0, published, looked)
    return {part: _from_single_file(place, found["flux"]) for part, place in found.items()}


def require(found: Mapping[str, Found], *parts: str) -> None:
    """UserError that says what is missing, where it was looked for and where it is published."""
    for part in parts:
        place = found[part]
        if place.path is None:
            what = naming.EXPECTED.get(part, f"the {'T5' if part == 'tokenizer_2' else 'CLIP'} tokenizer")
            flag = f", or name it with --{FLAGS.get(part, part)}" if part in FILES else ""
            raise UserError(f"{what} is missing ({place.looked}), expected {place.published}; put it there{flag}")


def load(build: Callable[[], nn.Module], state: Mapping[str, Tensor], dtype: torch.dtype | None = None,
         device: torch.device | str = "cpu", source: str | Path = "the weights") -> nn.Module:
    """Build a network without memory and give it these tensors, every one of them and no others.

    A tensor that has `dtype` already (or None, which keeps the file's) is not copied on the CPU: it stays on disk until
    it is used. The network comes in eval mode, with nothing to train.
    """
    with _ParametersOnMeta():
        model = build()
    _check_names_and_shapes(model.state_dict(), layout(state), source)
    tensors = {}
    for name in model.state_dict():
        tensor = state[name]
        tensors[name] = tensor.to(device, dtype if tensor.is_floating_point() else None)
    model.load_state_dict(tensors, assign=True)
    model = model.requires_grad_(False).eval().to(device)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    return model


class _ParametersOnMeta(TorchFunctionMode):
    """Parameters, for which layers take torch.empty, get no memory; buffers, which are computed, get their values."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        return function(*args, **(kwargs | {"device": "meta"} if function is torch.empty else kwargs))


def _check_names_and_shapes(expected: Mapping[str, Tensor], given: Mapping[str, Tensor], source: str | Path) -> None:
    missing = [name for name in expected if name not in given]
    unexpected = [name for name in given if name not in expected]
    wrong = [f"{name} {tuple(given[name].shape)} for {tuple(expected[name].shape)}" for name in expected
             if name in given and given[name].shape != expected[name].shape]
    faults = [f"{len(names)} {word} ({listed(names)})" for word, names in
              (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong)) if names]
    if faults:
        raise CheckpointError(f"{shown(str(source))} does not fit{_release_of(expected, given)}: {'; '.join(faults)}; "
                              f"expected the {len(expected)} tensors of this model: check --model and the file")


def _release_of(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """The FLUX.1 releases differ in two places only."""
    def release(state):
        columns = state["img_in.weight"].shape[-1] if state["img_in.weight"].ndim else 0
        base = {384: "Fill", 128: "Canny or Depth"}.get(columns, "dev")
        return base if any(name.startswith("guidance_in.") for name in state) else "schnell"
    if "img_in.weight" not in given or "img_in.weight" not in expected or release(given) == release(expected):
        return ""
    return f" FLUX.1 {release(expected)}, it looks like {release(given)}"


def state_of(found: Mapping[str, Found], part: str) -> Mapping[str, Tensor]:
    """The tensors of a part under our modules' names, mapped from disk."""
    require(found, part)
    return naming.select(read(found[part].path), part, found[part].path)


def unchanged(place: Found) -> None:
    """UserError if a mapped part has lost bytes since it was found; touching them would end the process without a word."""
    if (size := _size(place.path, place.part)) != place.size:
        raise refuse(place.path, f"has {size} bytes and had {place.size} at the start", "a file that stays as it is",
                     "run the command again when it is whole")


def load_flux(found: Mapping[str, Found], config: FluxConfig, dtype: torch.dtype | None = None,
              device: torch.device | str = "cpu") -> Flux:
    return load(lambda: Flux(config), state_of(found, "flux"), dtype, device, found["flux"].path)


def load_autoencoder(found: Mapping[str, Found], config: AutoEncoderConfig, dtype: torch.dtype | None = None,
                     device: torch.device | str = "cpu") -> AutoEncoder:
    return load(lambda: AutoEncoder(config), state_of(found, "ae"), dtype, device, found["ae"].path)


def load_clip(found: Mapping[str, Found], config: ClipTextConfig, dtype: torch.dtype | None = None,
              device: torch.device | str = "cpu") -> ClipText:
    return load(lambda: ClipText(config), state_of(found, "clip"), dtype, device, found["clip"].path)


def load_t5(found: Mapping[str, Found], config: T5Config, dtype: torch.dtype | None = None,
            device: torch.device | str = "cpu") -> T5Encoder:
    return load(lambda: T5Encoder(config), state_of(found, "t5"), dtype, device, found["t5"].path)


def load_siglip(found: Mapping[str, Found], config: SiglipConfig, dtype: torch.dtype | None = None,
                device: torch.device | str = "cpu") -> SiglipVision:
    return load(lambda: SiglipVision(config), state_of(found, "siglip"), dtype, device, found["siglip"].path)


def load_redux(found: Mapping[str, Found], preset: Preset, dtype: torch.dtype | None = None,
               device: torch.device | str = "cpu") -> Redux:
    return load(lambda: Redux(preset.siglip.hidden_size, preset.t5.d_model), state_of(found, "redux"), dtype, device,
                found["redux"].path)


def load_control(path: Path, config: FluxConfig, dtype: torch.dtype | None = None,
                 device: torch.device | str = "cpu") -> ControlNet:
    """A ControlNet for a model of this size; how many blocks it has, and whether it reads guidance, its names say."""
    state = naming.select_control(read(path), path)
    def blocks(kind):
        return len({match[0] for name in state if (match := re.match(rf"{kind}_blocks\.\d+\.", name))})
    config = replace(config, in_channels=64, depth=blocks("double"), depth_single_blocks=blocks("single"),
                     guidance_embed=any(name.startswith("guidance_in.") for name in state))
    pixels = "pos_embed_input.weight" in state
    return load(lambda: ControlNet(config, pixels), state, dtype, device, path)


def _published(preset: Preset, part: str) -> str:
    if preset.name not in RELEASES:
        if part == "redux":
            return "one trained for this model, which ships with none"
        return "the file that ships with minflux; `python train.py demo` makes it again"
    stem, repository = RELEASES[preset.name]
    return {
        "flux": f"huggingface.co/{repository} {stem}.safetensors",
        "ae": f"huggingface.co/{repository} ae.safetensors",
        "clip": "huggingface.co/comfyanonymous/flux_text_encoders clip_l.safetensors",
        "t5": "huggingface.co/comfyanonymous/flux_text_encoders t5xxl_fp16.safetensors",
        "siglip": "huggingface.co/black-forest-labs/FLUX.1-Redux-dev image_encoder/",
        "redux": "huggingface.co/black-forest-labs/FLUX.1-Redux-dev flux1-redux-dev.safetensors",
    }.get(part, f"huggingface.co/{repository} {part}/")


def _named(part: str, by: str, path: str | Path, published: str) -> Found:
    """What a flag or a variable names: a file, a folder of shards, or a folder of diffusers with the part in it."""
    path = Path(path)
    if not os.path.exists(path):
        raise UserError(f"{by} {shown(path)} is not there, expected a weights file; check the name")
    if os.path.isdir(path / DIFFUSERS[part]):
        path /= DIFFUSERS[part]
    return Found(part, path, "named", _size(path, part), published)


def _search(folder: Path, preset: Preset, part: str) -> tuple[Path, str] | None:
    return next(_places(folder, preset, part), None)


def _places(folder: Path, preset: Preset, part: str) -> Iterator[tuple[Path, str]]:
    """Where a part lies in a folder of BFL, ComfyUI or diffusers, or in one inside it with the repository's name."""
    if preset.name not in RELEASES:
        name = part + preset.name.removeprefix("demo") if part == "flux" and not preset.adapter else part
        path = folder / (DIFFUSERS[part] if part in TOKENIZERS else f"{name}.safetensors")
        if _holds(path, part):
            yield path, "demo"
        return
    stem, repository = RELEASES[preset.name]
    inside = repository.partition("/")[2], *(("FLUX.1-Redux-dev",) if part in ("siglip", "redux") else ())
    for root in (folder, *(folder / name for name in inside)):
        for inner in ("", *(f"{models}{name}" for models in ("models/", "") for name in COMFYUI.get(part, ()))):
            for pattern in FILES.get(part, ()):
                for path in sorted((root / inner).glob(pattern.format(stem=stem))):
                    yield path, "comfyui" if inner else "bfl"
        if _holds(root / DIFFUSERS[part], part):
            yield root / DIFFUSERS[part], "diffusers"


def _holds(path: Path, part: str) -> bool:
    if part in TOKENIZERS:
        return any(all((path / name).is_file() for name in names) for names in TOKENIZERS[part])
    return path.is_file() or any((path / name).is_file() for name in checkpoint.INDEXES)


def _from_single_file(place: Found, flux: Found) -> Found:
    """ComfyUI's one-file checkpoints hold the autoencoder and the text encoders too."""
    if place.path or place.part not in ("ae", "clip", "t5") or not flux.path or not flux.path.is_file():
        return place
    if flux.path.suffix == ".json" or not naming.prefix_of(checkpoint.read_header(flux.path).entries, place.part):
        return place
    return Found(place.part, flux.path, "single file", flux.size, place.published)


def _size(path: Path, part: str) -> int:
    """Bytes of a file, of the shards of an index, or of a tokenizer."""
    if part in TOKENIZERS:
        files = [path / name for names in TOKENIZERS[part] for name in names] if path.is_dir() else [path]
    elif (path := checkpoint.locate(path)).suffix == ".json":
        files = [path.parent / name for name in set(checkpoint.shards(path).values())]
    else:
        files = [path]
    return sum(os.path.getsize(file) for file in files if os.path.exists(file))


def table(found: Mapping[str, Found]) -> str:
    rows = [("part", "size", "kind", "where")]
    for place in found.values():
        size = f"{place.size / 1e9:.2f} GB" if place.size >= 1e8 else f"{place.size / 1e6:.2f} MB"
        where = shown(place.path) if place.path else f"{place.looked}; published: {place.published}"
        rows.append((place.part, size if place.path else "-", place.kind, where))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def convert(source: Path, target: Path, to: str) -> None:
    """Write a transformer or an autoencoder under the other names, tensor by tensor."""
    if os.path.exists(target):
        raise UserError(f"{shown(target)} is there already, expected a new file; name another one")
    tensors = read(source)
    part = next((part for part in ("flux", "ae") if naming.prefix_of(tensors, part) is not None), None)
    if part is None:
        raise refuse(source, f"is {naming.describe(tensors)}", "a FLUX.1 transformer or autoencoder",
                     "name another file")
    own = naming.select(tensors, part, source)
    new = naming.to_diffusers(own, part, source) if to == "diffusers" else own
    back = {name: tensor.shape for name, tensor in layout(naming.to_bfl(new, part, source)).items()}
    if back != {name: tensor.shape for name, tensor in layout(own).items()}:
        raise refuse(source, "does not come back as it was", "a whole FLUX.1 checkpoint", "download it again")
    save(target, new)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m flux.weights", description="List the weights found and missing.")
    parser.add_argument("--model", default="demo", choices=PRESETS, help="which model (default: demo)")
    parser.add_argument("--weights", metavar="DIR", help="folder with the weights; without it FLUX_WEIGHTS")
    for part in FILES:
        parser.add_argument(f"--{FLAGS.get(part, part)}", dest=part, metavar="FILE", help=f"{naming.EXPECTED[part]} alone")
    command = parser.add_subparsers(dest="command").add_parser("convert", help="rename a checkpoint's tensors")
    command.add_argument("source", type=Path, metavar="SRC")
    command.add_argument("target", type=Path, metavar="DST")
    command.add_argument("--to", required=True, choices=("diffusers", "bfl"))
    flags = parser.parse_args(argv)
    if flags.command == "convert":
        convert(flags.source, flags.target, flags.to)
    else:
        print(table(find(PRESETS[flags.model], flags.weights, {part: getattr(flags, part) for part in FILES})))


if __name__ == "__main__":
    cli.run(main)
