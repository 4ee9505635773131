"""A low-quality picture -> a restored one: the whole road of LucidFlux (lucidflux.md section 1), for any size.

    low quality -> SwinIR's proxy -> SigLIP's tokens; both pictures -> branches; Euler steps; decoder; the proxy's colours

Read `lucidflux.py` first. Everything that stays the same along the trajectory is made once.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from flux import conditioning, edges, fidelity, flow, latents, lucid_files, lucidflux, strips, tiles, wavelet, weights
from flux.autoencoder import AutoEncoder
from flux.config import LUCID, LucidConfig, Preset
from flux.errors import UserError
from flux.lucidflux import LucidFlux
from flux.model import Flux
from flux.siglip import SiglipVision
from flux.swinir import Swinir

CELLS = 64  # pixels: of SwinIR's windows, and four tokens
LARGE = 2_000_000  # pixels from which the autoencoder works in strips


@dataclass(frozen=True)
class Networks:
    preset: Preset
    config: LucidConfig
    model: Flux
    lucid: LucidFlux
    autoencoder: AutoEncoder
    swinir: Swinir
    siglip: SiglipVision
    prompt: tuple[Tensor, Tensor]  # txt (1, L, 4096), vec (1, 768)


@dataclass(frozen=True)
class How:
    """Settings of a restoration; see the flags of `flux/recipes/lucidflux.py`."""

    steps: int
    guidance: float
    schedule: str = "flux"
    fidelity: float = 0.0
    strengths: tuple[float, float] = (1.0, 1.0)
    tokens: bool = True
    modulated: bool = True  # else by the mean of all times and blocks
    token_guidance: float = 1.0
    tile: int = 1024  # pixels, a multiple of 64
    overlap: int = 0  # pixels, a multiple of 16
    colour_fix: bool = True
    seed: int = 0


def config_of(preset: Preset) -> LucidConfig:
    if preset.name not in LUCID:
        raise UserError(f"--model {preset.name} came with lucidflux, expected {' or '.join(LUCID)}; take one of them")
    return LUCID[preset.name]


def find(preset: Preset, folder: Path | None, named: dict[str, Path | None]
         ) -> tuple[dict[str, weights.Found], dict[str, lucid_files.Place]]:
    """Files of the transformer and autoencoder, and LucidFlux's own; UserError if any that is needed is missing."""
    config_of(preset)
    found = weights.find(preset, folder, {part: named.get(part) for part in ("flux", "ae", "clip", "t5")})
    places = lucid_files.find(preset, folder, named)
    weights.require(found, "flux", "ae")
    for part in ("lucidflux", "swinir", "siglip"):
        places[part].require()
    return found, places


def load(preset: Preset, found: dict[str, weights.Found], places: dict[str, lucid_files.Place], dtype: torch.dtype,
         place: torch.device) -> Networks:
    config, beside = config_of(preset), places["lucidflux"].require()
    prompt = lucid_files.load_prompt(places["prompt"], found, preset, config, dtype, place, beside)
    return Networks(
        preset, config, weights.load_flux(found, preset.flux, dtype, place),
        lucid_files.load_lucidflux(beside, preset, config, dtype, place, weights.state_of(found, "flux")),
        weights.load_autoencoder(found, preset.autoencoder, dtype, place),
        lucid_files.load_swinir(places["swinir"].require(), config, place),
        lucid_files.load_siglip(places["siglip"].require(), config, dtype, place), prompt)


def proxy(swinir: Swinir, lq: Tensor, cut: list[tiles.Tile] | None = None, overlap: int = 0) -> Tensor:
    """lq (B, 3, H, W) in [-1, 1], edges multiples of 64 -> SwinIR's answer, the same size and range."""
    cut = cut or tiles.over(*lq.shape[2:], max(lq.shape[2:]), 0)
    return tiles.blended(lq.float(), cut, overlap, lambda x, i: swinir.restore(x))


def seen(siglip: SiglipVision, config: LucidConfig, pre: Tensor) -> Tensor:
    """pre (B, 3, H, W) in [-1, 1] -> SigLIP's patches of the whole picture (B, N, D)."""
    return siglip(lucidflux.to_siglip((pre + 1) / 2, config.siglip.image_size))


@torch.inference_mode()
def restore(networks: Networks, lq: Tensor, how: How, pre: Tensor | None = None,
            step: Callable[[], object] = lambda: None) -> tuple[Tensor, Tensor]:
    """lq (B, 3, H, W) in [-1, 1], any size -> (restored, proxy), the same size and range. `step` is called after each.

    All pictures of a batch begin from the same noise, as each would alone.
    """
    height, width = lq.shape[2:]
    weight = networks.lucid.connector.redux_up.weight
    lq = edges.filled(lq.to(weight.device), CELLS)
    size = tall, wide = lq.shape[2:]
    cut = tiles.over(tall // 16, wide // 16, how.tile // 16, how.overlap // 16)
    pixels = [tile.times(16) for tile in cut]
    pre = proxy(networks.swinir, lq, pixels, how.overlap) if pre is None else edges.filled(pre.to(weight.device), CELLS)

    txt, vec = (x.to(weight).expand(len(lq), *x.shape[1:]) for x in networks.prompt)
    prompt = conditioning.condition(txt, vec, pixels[0].width, pixels[0].height, how.guidance)
    patches = seen(networks.siglip, networks.config, pre)
    givens = [lucidflux.given(networks.lucid, prompt, *(tile.cut(x).to(weight) for x in (lq, pre)), patches.to(weight),
                              how.strengths) for tile in pixels]
    bare = [replace(given, tokens=given.tokens[:, :0]) for given in givens]
    schedule = lucidflux.schedule(how.steps, pixels[0].width, pixels[0].height, how.schedule)  # of what the networks see
    times = fidelity.times(schedule, how.fidelity)
    table = lucidflux.tables(networks.lucid, times)
    if not how.modulated:
        table = lucidflux.flattened(table)

    def under(givens):
        each = [lucidflux.velocity(networks.model, networks.lucid, given, table) for given in givens]
        return tiles.velocity(each, cut, how.overlap // 16, tall // 16, wide // 16)

    autoencoder = strips.InStrips(networks.autoencoder) if tall * wide > LARGE else networks.autoencoder
    noise = latents.noise(1, tall, wide, torch.Generator().manual_seed(how.seed)).to(weight).expand(len(lq), -1, -1, -1)
    img, v = latents.pack(noise), under(givens if how.tokens else bare)
    if how.tokens:
        v = fidelity.guided(v, under(bare), how.token_guidance)
    if how.fidelity:
        anchor = latents.pack(autoencoder.encode(pre.to(weight)))
        img, v = fidelity.begin(anchor, img, how.fidelity), fidelity.tied(v, anchor, *size, how.fidelity)
    for state in flow.euler_steps(v, img, times):
        img = state
        step()
    out = autoencoder.decode(latents.unpack(img, *size)).float()
    if how.colour_fix:
        out = wavelet.coloured_as(out, pre.float())
    return out.clamp(-1, 1)[..., :height, :width], pre[..., :height, :width]
