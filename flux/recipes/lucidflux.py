"""LucidFlux (arXiv 2509.22414): restoring pictures without a caption, and training what that takes.

The road of a picture is in `flux/restore.py`; the network in `flux/lucidflux.py`; here is what a user can ask for.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from tqdm import tqdm

from flux import checkpoint, data, device, iqa, pictures, quality, restore
from flux.config import preset
from flux.errors import UserError
from flux.lucid_training import TrainBranches, TrainSwinir
from flux.lucid_trial import Evaluate
from flux.settings import Sampling

UNHEEDED = ("width", "height", "num", "lora", "shift", "times", "store", "reuse", "compile", "strips", "vram", "attention")


@dataclass(frozen=True)
class Restore(Sampling):
    """Low-quality pictures restored: sharper, cleaner, and no caption."""

    picture: tuple[Path, ...] = ()  # what to restore: files, or folders of them; what is broken is listed and left out
    scale: float = 1.0  # times the edges of what is made: a small picture needs 4
    fidelity: float = 0.0  # from 0, as released, what is likely, to 1, close to what can be seen
    tile: int | None = None  # pixels, a multiple of 64; larger pictures are restored in tiles; default: the model's own
    overlap: int | None = None  # pixels that tiles share, a multiple of 16; default: an eighth of the tile
    sampling: Literal["flux", "released"] = "flux"  # which times: released takes any size for one of 128 x 128 pixels
    lq: float = 1.0  # strength of the branch that sees the picture itself
    pre: float = 1.0  # strength of the branch that sees SwinIR's proxy
    tokens: bool = True  # let the transformer read what SigLIP sees in the proxy
    token_guidance: float = 1.0  # away from what it draws without those; 1 is none, others take twice the time
    colour_fix: bool = True  # the proxy's colours under the restored detail
    reference: tuple[Path, ...] = ()  # the clean picture of each, for PSNR and SSIM
    sheet: bool = False  # write before, proxy and after beside each other too
    lucidflux: Path | None = None  # file of the branches, lucidflux.pth or .safetensors, alone
    swinir: Path | None = None  # file of SwinIR alone
    siglip: Path | None = None  # file or folder of the SigLIP2 vision tower alone
    prompt: Path | None = None  # file of the fixed prompt's embedding, prompt_embeddings.pt or .safetensors, alone
    POSITIONAL = "picture"

    def __post_init__(self):
        super().__post_init__()
        for name, low, high in (("scale", 1 / 16, 16), ("fidelity", 0, 1), ("lq", 0, 10), ("pre", 0, 10),
                                ("token_guidance", 0, 30)):
            if not low <= getattr(self, name) <= high:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected {low:g} to {high}")
        for name, step, least in (("tile", restore.CELLS, restore.CELLS), ("overlap", 16, 0)):
            pixels = getattr(self, name)
            if pixels is not None and (pixels < least or pixels % step):
                raise UserError(f"--{name} {pixels}: expected a multiple of {step} pixels, {least} or more")
        for name in UNHEEDED:
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise UserError(f"--{name} came with lucidflux, which does not heed it, expected others; leave it out")

    def images(self) -> Iterator[tuple[Image.Image, dict]]:
        """(restored, metadata) of every picture that can be read; each is the same alone or among others."""
        model = preset(self.model)
        how = self.how(model)
        jobs = self.jobs()
        found, places = restore.find(model, self.weights, {name: getattr(self, name) for name in (
            "flux", "ae", "clip", "t5", "lucidflux", "swinir", "siglip", "prompt")})
        sound, broken = [], []
        for path, reference in jobs:  # all of them before any weights; none is kept in memory
            try:
                self.opened(path, reference)
                sound.append((path, reference))
            except pictures.PictureError as error:
                broken.append(str(error))
        if not sound:
            raise UserError(broken[0])
        place, dtype = device.choose(self.device, self.dtype)
        networks = restore.load(model, found, places, dtype, place)
        paths = {part: found[part].path for part in ("flux", "ae")} | {
            part: places[part].path for part in ("lucidflux", "swinir", "siglip")}
        files = {part: f"{path.name} {checkpoint.fingerprint(path)}" for part, path in paths.items() if path.is_file()}
        with tqdm(total=len(sound) * how.steps, desc="restoring", unit="step", disable=None) as bar:
            for path, against in sound:
                pil, reference = self.opened(path, against)
                lq = pictures.to_tensor(pil)
                after, proxy = (pictures.to_pil(x)[0] for x in restore.restore(networks, lq, how, step=bar.update))
                figures = measured(reference, {"input": pil, "proxy": proxy, "restored": after})
                alone = replace(self, picture=(path,), reference=(against,) if against else ())
                yield after, {"prompt": path.name, "seed": self.seed, "steps": how.steps, "guidance": how.guidance,
                              "model": self.model, "config": alone, "files": files,
                              **({"figures": figures} if figures else {}),
                              **({"sheet": sheet(pil, proxy, after, reference, figures)} if self.sheet else {})}
        if broken:
            print(f"{len(broken)} of {len(jobs)} pictures could not be restored:", *broken, sep="\n  ", file=sys.stderr)

    def how(self, model) -> restore.How:
        config = restore.config_of(model)
        tile = self.tile or model.width
        overlap = tile // 128 * 16 if self.overlap is None else self.overlap
        if overlap >= tile:
            raise UserError(f"--overlap {overlap} with tiles of {tile} pixels, expected less; take {tile // 128 * 16}")
        guidance = config.guidance if self.guidance is None else self.guidance
        return restore.How(self.steps or config.steps, guidance, self.sampling, self.fidelity, (self.lq, self.pre),
                           self.tokens, True, self.token_guidance, tile, overlap, self.colour_fix, self.seed)

    def jobs(self) -> list[tuple[Path, Path | None]]:
        """Every picture with its reference, folders opened."""
        paths = in_folders(self.picture)
        if not paths:
            raise UserError("lucidflux came without a picture, expected one or a folder of them; "
                            "python sample.py lucidflux photo.jpg")
        references = in_folders(self.reference)
        if references and len(references) != len(paths):
            raise UserError(f"--reference names {len(references)} pictures for {len(paths)}, expected one for each; name "
                            "them in the same order, or folders of the same names")
        return list(zip(paths, references or [None] * len(paths), strict=True))

    def opened(self, path: Path, reference: Path | None) -> tuple[Image.Image, Image.Image | None]:
        """A picture at the size that is made of it, and the one to compare with."""
        pil = pictures.read(path)
        size = [max(1, round(self.scale * edge)) for edge in pil.size]
        pixels = [-(-edge // restore.CELLS) * restore.CELLS for edge in size]
        if pixels[0] * pixels[1] > pictures.MAX_PIXELS:
            raise pictures.PictureError(f"{path}: {size[0]}x{size[1]} after --scale {self.scale:g}; expected at most "
                                        f"{pictures.MAX_PIXELS // 10**6} megapixels: take a smaller --scale")
        pil = pil if tuple(size) == pil.size else pil.resize(size, Image.Resampling.BICUBIC)
        clean = pictures.read(reference) if reference else None
        if clean and clean.size != pil.size:
            raise pictures.PictureError(f"--reference {reference} is {clean.width}x{clean.height} pixels, expected "
                                        f"{pil.width}x{pil.height}, what is made; check --scale")
        return pil, clean


def in_folders(paths: tuple[Path, ...]) -> list[Path]:
    return [inner for path in paths for inner in ([item.path for item in data.folder(path)] if path.is_dir() else [path])]


def measured(reference: Image.Image | None, pils: dict[str, Image.Image]) -> dict[str, dict[str, float | None]]:
    """PSNR in dB (None where equal) and SSIM of each against the reference; nothing without one."""
    if reference is None:
        return {}
    clean, figures = np.asarray(reference), {}
    for name, pil in pils.items():
        decibels = quality.of_pixels(quality.psnr, np.asarray(pil), clean)
        figures[name] = {"psnr": round(decibels, 2) if np.isfinite(decibels) else None,
                         "ssim": round(quality.of_pixels(quality.ssim, iqa.gray(np.asarray(pil)), iqa.gray(clean)), 4)}
    return figures


def sheet(before: Image.Image, proxy: Image.Image, after: Image.Image, reference: Image.Image | None, figures: dict
          ) -> Image.Image:
    """In a row; small pictures are enlarged."""
    panels = {"input": before, "proxy": proxy, "restored": after} | ({"reference": reference} if reference else {})
    fine = max(1, 256 // max(before.size))
    pils = [pil.resize((fine * pil.width, fine * pil.height), Image.Resampling.BICUBIC) for pil in panels.values()]
    captions = [name + (f", {figures[name]['psnr']} dB, SSIM {figures[name]['ssim']}" if name in figures else "")
                for name in panels]
    return pictures.contact_sheet(pils, len(pils), captions)


SAMPLE = Restore
TRAIN = {"swinir": TrainSwinir, "branches": TrainBranches, "evaluate": Evaluate}
