"""The LoRAs of --lora: read and checked before any weights, then attached to the networks that they change."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from flux import checkpoint, cli, lora_names
from flux.config import Preset
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
    """The model with what LoRAs make of it: one that widens img_in is a control model (FLUX.1-Canny-dev-lora)."""
    first = [term for lora in given if "flux" in lora.parts for term in lora.parts["flux"].layers.get("img_in", ())]
    if any(term.shape[1] > model.flux.in_channels for term in first if not isinstance(term, Bias)):
        return replace(model, takes="control")
    return model


def attach(given: list[Given], part: str, network: nn.Module) -> Loras:
    """Those for one network, beside its weights."""
    loras = Loras(network)
    for lora in given:
        if part in lora.parts:
            loras.attach(lora.name, lora.parts[part], lora.scale, widen=part == "flux")
    return loras


def files(given: list[Given]) -> dict[str, str]:
    """What a picture's metadata say of them."""
    return {f"lora {lora.name}": checkpoint.fingerprint(checkpoint.locate(lora.path)) for lora in given}
