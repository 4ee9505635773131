"""The pictures a user gives beside the prompt: read, checked against the model and each other, brought to one size, encoded.

`read` does all that can fail before any weights are loaded; what it returns is what the networks are shown.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flux import canny, checkpoint, cli, conditioning, edits, fill, flow, latents, pictures, weights
from flux.autoencoder import AutoEncoder
from flux.conditioning import Condition, Residuals
from flux.config import PRESETS, Preset
from flux.edits import Layout
from flux.errors import UserError
from flux.settings import Conditioned

STRENGTH = 0.75  # of img2img when none is said: the layout stays, details change


@dataclass(frozen=True)
class Inputs:
    """Pictures in mode RGB, the mask in mode L; image, mask and control are of one size, which is the drawn one's, or half
    of its width where it is drawn beside the image."""

    size: tuple[int, int]  # width, height in pixels of what is drawn
    image: Image.Image | None
    mask: Image.Image | None
    control: Image.Image | None
    references: tuple[Image.Image, ...]
    seen: tuple[tuple[Image.Image, float], ...]  # by Redux, with a strength each
    strength: float  # 1: the image is not started from
    files: dict[str, str]  # what the metadata says of them: name and fingerprint
    layout: Layout = edits.FILL  # how image and mask are shown

    def finished(self, drawn: Image.Image, keep: bool) -> Image.Image:
        """The picture that was asked for, of a drawn canvas. To `keep`: known pixels, and where an edit's mask is white
        throughout those that have not changed to the eye."""
        if self.layout.beside:
            drawn = drawn.crop((drawn.width // 2, 0, *drawn.size))
        if not keep:
            return drawn
        anywhere = (self.layout.beside or self.layout.repaint < 1) and self.mask.getextrema() == (255, 255)
        return fill.keep(drawn, self.image, edits.changed(self.image, drawn) if anywhere else self.mask)


@dataclass(frozen=True)
class Encoded:
    """The same for the transformer, one for all pictures of a batch."""

    start: Tensor | None  # (1, L_img, 64)
    channels: Tensor | None  # (1, L_img, C)
    references: tuple[Tensor, ...]  # (1, 16, h, w)
    image_tokens: Tensor | None  # (1, N, 4096)
    known: Tensor | None = None  # (1, L_img, 64) bool: latents of cells of 8x8 pixels of which nothing is repainted
    true: Tensor | None = None  # (1, L_img, 64), latents of the picture, for those

    def begin(self, noise: Tensor, t: float) -> Tensor:
        """Noise (B, L_img, 64), or where there is a picture to start from, that on its way to noise."""
        return noise if self.start is None else flow.interpolate(self.start, noise, noise.new_full((len(noise),), t))

    def held(self, velocity: flow.Velocity) -> flow.Velocity:
        """What is known is not left to the model."""
        return velocity if self.known is None else fill.held(velocity, self.known, self.true)

    def onto(self, cond: Condition) -> Condition:
        if self.channels is not None:
            cond = conditioning.with_channels(cond, self.channels)
        if self.references:
            cond = conditioning.with_references(cond, self.references)
        if self.image_tokens is not None:
            cond = conditioning.with_image_tokens(cond, self.image_tokens)
        return cond


def read(asked: Conditioned, model: Preset) -> Inputs:
    """UserError for a picture that cannot be used, and for what this model cannot take."""
    check_model(asked, model)
    check_company(asked)
    named = {"image": asked.image, "mask": asked.mask, "control": asked.control or asked.control_from,
             **{f"reference {i}": path for i, path in enumerate(asked.reference, 1)}}
    redux = [cli.path_and_scale("--redux", word, 0, 10) for word in asked.redux]
    named |= {f"redux {i}": path for i, (path, _) in enumerate(redux, 1)}
    opened = {name: pictures.read(path) for name, path in named.items() if path}
    files = {name: f"{path.name} {checkpoint.fingerprint(path)}" for name, path in named.items() if path}
    if asked.controlnet:
        files["controlnet"] = f"{asked.controlnet.name} {checkpoint.fingerprint(asked.controlnet)}"

    image, mask, control = opened.get("image"), opened.get("mask"), opened.get("control")
    if image and mask and image.size != mask.size:
        raise UserError(f"--mask {asked.mask} is {edges(mask)} pixels, expected {edges(image)} as --image {asked.image}; "
                        "make them equal")
    mask = mask.convert("L") if mask else Image.new("L", image.size, 255 * (not asked.outpaint)) if (
        asked.outpaint or asked.edits) else None
    if asked.outpaint:
        check_canvas(asked, image)
        image, mask = fill.outpaint(image, mask, *asked.pads)
    references = [to_reference(opened[f"reference {i}"], model) for i in range(1, len(asked.reference) + 1)]
    size = size_of(asked, model, image or control or next(iter(references), None))
    image = fitted(image, size, f"--image {asked.image}")
    control = fitted(control, size, f"--control {asked.control or asked.control_from}")
    if asked.control_from:
        control = Image.fromarray(canny.edges(np.asarray(control))).convert("RGB")
    default = 1.0 if mask or not image else STRENGTH
    mask_value = edits.MASK_VALUE if asked.mask_value is None else asked.mask_value
    layout = Layout(edits.MODES[asked.beside], asked.repaint, mask_value)
    return Inputs((size[0] * (1 + asked.beside), size[1]), image, mask and mask.resize(size, Image.Resampling.BOX), control,
                  tuple(references), tuple((opened[f"redux {i}"], strength) for i, (_, strength) in enumerate(redux, 1)),
                  default if asked.strength is None else asked.strength, files, layout)


def check_model(asked: Conditioned, model: Preset) -> None:
    """Each kind of conditioning goes with the models that were trained for it."""
    controls = (asked.control or asked.control_from) and not asked.controlnet
    for flag, given, kind in (("--mask", asked.mask, "mask"), ("--outpaint", asked.outpaint, "mask"),
                              ("--repaint", asked.repaint < 1, "mask"), ("--beside", asked.beside, "mask"),
                              ("--reference", asked.reference, "reference"), ("--control", controls, "control")):
        if given and model.takes != kind:
            able = [preset.name for preset in PRESETS.values() if preset.takes == kind]
            other = "" if kind != "control" else " or name a ControlNet with --controlnet"
            raise UserError(f"{flag} came with --model {model.name}, which was not trained for it, expected "
                            f"{' or '.join(able)}; take --model {able[0]}{other}")
    if model.takes == "mask" and not (asked.mask or asked.outpaint or asked.edits):
        raise UserError(f"--model {model.name} came without --mask and --outpaint, expected a picture and what to repaint; "
                        "add --image PICTURE --mask MASK")
    if model.takes == "control" and not (asked.control or asked.control_from):
        raise UserError(f"--model {model.name} came without a picture to follow, expected --control; add --control PICTURE")
    if model.name == "depth" and asked.control_from:
        raise UserError("--control-from came with --model depth, which follows depths and not edges, expected --control; "
                        "add --control DEPTHS")


def check_company(asked: Conditioned) -> None:
    """Flags that mean nothing without another."""
    alone = [("--mask", asked.mask), ("--outpaint", asked.outpaint), ("--strength", asked.strength is not None),
             ("--repaint", asked.repaint < 1), ("--beside", asked.beside)]
    for flag, given in alone:
        if given and not asked.image:
            raise UserError(f"{flag} came without --image, expected the picture it is about; add --image PICTURE")
    if asked.keep and not (asked.mask or asked.outpaint or asked.edits):
        raise UserError("--keep came without --mask and --outpaint, expected what is not to be kept; add one of them")
    if asked.control and asked.control_from:
        raise UserError("--control came with --control-from, expected one picture to follow; leave out one of them")
    if asked.controlnet and not (asked.control or asked.control_from):
        raise UserError("--controlnet came without a picture to follow, expected --control; add --control PICTURE")
    if asked.controlnet and not os.path.isfile(asked.controlnet):
        raise UserError(f"--controlnet {checkpoint.shown(asked.controlnet)} is no file, expected a ControlNet's weights; "
                        "check the name")


def check_canvas(asked: Conditioned, image: Image.Image) -> None:
    left, top, right, bottom = asked.pads
    width, height = image.width + left + right, image.height + top + bottom
    if width * height > pictures.MAX_PIXELS:
        raise UserError(f"--outpaint {asked.outpaint} makes {width}x{height} pixels, expected at most "
                        f"{pictures.MAX_PIXELS // 10**6} megapixels; add fewer")


def edges(pil: Image.Image) -> str:
    return f"{pil.width}x{pil.height}"


def size_of(asked: Conditioned, model: Preset, like: Image.Image | None) -> tuple[int, int]:
    """Width and height to draw: as the flags say; what they leave open follows the picture's shape, or is the model's."""
    if like is None or (asked.width and asked.height):
        return asked.width or model.width, asked.height or model.height
    own, area = model.width * model.height, like.width * like.height
    scale = (own / area) ** 0.5 if area > 2 * own else 1.0
    scale = asked.width / like.width if asked.width else asked.height / like.height if asked.height else scale
    width, height = (max(16, round(scale * edge / 16) * 16) for edge in like.size)
    return asked.width or width, asked.height or height


def fitted(pil: Image.Image | None, size: tuple[int, int], name: str) -> Image.Image | None:
    """The picture at that size (Lanczos). UserError where its shape would change by over a tenth and a token."""
    if pil is None or pil.size == size:
        return pil
    change = (size[0] / size[1]) / (pil.width / pil.height)
    scale = (size[0] * size[1] / (pil.width * pil.height)) ** 0.5
    off = max(abs(edge - scale * own) for edge, own in zip(size, pil.size, strict=True))  # pixels
    if not 1 / 1.1 <= change <= 1.1 and off > 16:
        raise UserError(f"{name} is {edges(pil)} pixels, expected the shape of {size[0]}x{size[1]}; crop it, or change "
                        "--width and --height")
    return pil.resize(size, Image.Resampling.LANCZOS)


def to_reference(pil: Image.Image, model: Preset) -> Image.Image:
    """At the model's reference size that is nearest in shape (Lanczos); without such at its own, in multiples of 16."""
    own = tuple(max(16, round(edge / 16) * 16) for edge in pil.size)
    shape = pil.width / pil.height
    size = min(model.reference_sizes or (own,), key=lambda size: abs(size[0] / size[1] - shape))
    return pil if pil.size == size else pil.resize(size, Image.Resampling.LANCZOS)


def encode(given: Inputs, autoencoder: AutoEncoder, model: Preset, image_tokens: Tensor | None, hold: bool = False
           ) -> Encoded:
    """By the mean of the autoencoder's posterior, so that the same pictures give the same conditions."""
    weight = next(autoencoder.parameters())
    start = channels = known = true = None
    image = pictures.to_tensor(given.image) if given.image else None
    if given.image and given.strength < 1:
        start = latents.pack(autoencoder.encode(given.layout.canvas(image, image).to(weight)))
    if given.mask:
        mask = edits.soft(given.mask, given.mask.size)
        channels, known, true = edits.encode(image, mask, given.layout, autoencoder, hold)
    elif model.takes == "control":
        channels = latents.pack(autoencoder.encode(pictures.to_tensor(given.control).to(weight)))
    references = tuple(autoencoder.encode(pictures.to_tensor(pil).to(weight)) for pil in given.references)
    return Encoded(start, channels, references, image_tokens, known, true)


def image_tokens(given: Inputs, found: Mapping[str, weights.Found], model: Preset, dtype: torch.dtype,
                 place: torch.device) -> Tensor | None:
    """What Redux sees, (1, N, 4096): the tokens of its pictures one after the other, each times its strength."""
    if not given.seen:
        return None
    siglip = weights.load_siglip(found, model.siglip, dtype, place)
    redux = weights.load_redux(found, model, dtype, place)
    edge = model.siglip.image_size
    pils = [pil.resize((edge, edge), Image.Resampling.BICUBIC) for pil, _ in given.seen]  # squashed, as released
    pixels = torch.cat([pictures.to_tensor(pil) for pil in pils]).to(place, dtype)
    tokens = [strength * redux(siglip(x[None])) for x, (_, strength) in zip(pixels, given.seen, strict=True)]
    return torch.cat(tokens, dim=1)


def controlled(asked: Conditioned, given: Inputs, autoencoder: AutoEncoder, model: Preset, times: list[float],
               dtype: torch.dtype, place: torch.device) -> Callable[[Condition], Residuals] | None:
    """Condition -> what the ControlNet adds under it; None without a ControlNet."""
    if not asked.controlnet:
        return None
    branch = weights.load_control(asked.controlnet, model.flux, dtype, place)
    image = pictures.to_tensor(given.control).to(place, dtype)
    hint = branch.embed(image if branch.pixels else autoencoder.encode(image))
    rule = asked.control_index or ("repeat" if branch.pixels else "interval")  # as the two kinds are used
    depths = model.flux.depth, model.flux.depth_single_blocks
    span = conditioning.span(times, asked.control_start, asked.control_end)
    return lambda cond: conditioning.control(branch, hint, cond, depths, rule, asked.control_scale, span)
