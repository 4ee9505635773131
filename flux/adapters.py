"""The LoRAs of --lora: read and checked before any weights, then attached to the networks that they change. And those that
are a part of a model: the demo's Fill is its transformer and a LoRA."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from flux import checkpoint, cli, lora_names, weights
from flux.config import PRESETS, Preset
from flux.model import Flux
from lora import io
from lora.adapter import Adapter, Bias
from lora.inject import Loras


@dataclass(frozen=True)
class Given:
    """One file, opened."""

    name: str
    path: Path
    scale: float
    parts: dict[str, Adapter]  # by network: flux, clip, t5


def read(words: tuple[str, ...], model: Preset) -> list[Given]:
    """PATH or PATH:SCALE, each a LoRA for this model; UserError for any that is not."""
    names = lora_names.names(model) if words else None
    given = []
    for word in words:
        path, scale = cli.path_and_scale("--lora", word, -10, 10)
        parts, report = io.read(path, names)
        for key, why in report.dropped.items():
            print(f"{path.name}: {checkpoint.shown(key)} is not used: {why}", file=sys.stderr)
        given.append(Given(f"{len(given) + 1} {path.name}", path, scale, parts))
    return given


def fitted(model: Preset, given: list[Given]) -> Preset:
    """The model with what LoRAs make of it: one that widens img_in makes it a control model (FLUX.1-Canny-dev-lora), or
    Fill, which has a mask's channels too."""
    first = [term for lora in given if "flux" in lora.parts for term in lora.parts["flux"].layers.get("img_in", ())]
    widest = max((term.shape[1] for term in first if not isinstance(term, Bias)), default=0)
    if widest <= model.flux.in_channels:
        return model
    return replace(model, takes="mask" if widest == PRESETS["fill"].flux.in_channels else "control")


def attach(given: list[Given], part: str, network: nn.Module, factor: float = 1.0) -> Loras:
    """Those for one network, beside its weights, at their scales times a factor."""
    loras = Loras(network)
    for lora in given:
        if part in lora.parts:
            loras.attach(lora.name, lora.parts[part], factor * lora.scale, widen=part == "flux")
    return loras


def files(model: Preset, given: list[Given]) -> dict[str, str]:
    """What a picture's metadata say of them, and of the one that is a part of the model."""
    own = {"adapter": f"{model.adapter} {checkpoint.fingerprint(weights.DEMO / model.adapter)}"} if model.adapter else {}
    return own | {f"lora {lora.name}": checkpoint.fingerprint(checkpoint.locate(lora.path)) for lora in given}


def load_flux(found: Mapping[str, weights.Found], model: Preset, dtype: torch.dtype | None = None,
              device: torch.device | str = "cpu") -> Flux:
    """The transformer of a preset; where that is a base model and a LoRA, these merged, but for a file that has it all."""
    first = checkpoint.layout(weights.state_of(found, "flux")).get("img_in.weight") if model.adapter else None
    if first is None or first.shape[1] == model.flux.in_channels:
        return weights.load_flux(found, model.flux, dtype, device)
    base = PRESETS[model.name.partition("-")[0]]
    network = weights.load_flux(found, base.flux, dtype, device)
    parts, _ = io.read(weights.DEMO / model.adapter, lora_names.names(base))
    loras = Loras(network)
    loras.attach(model.adapter, parts["flux"], widen=True)
    loras.merge()
    network.config = model.flux
    return network
