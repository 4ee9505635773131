"""Editing with Fill: how a picture, a mask of what changes, and perhaps a second canvas become Fill's extra channels.

InFluxEdit (andjoer/InFluxEdit), ACE++ (arXiv 2501.02487) and plain Fill are one rule with three numbers, a `Layout`. The
model is shown image * (1 - repaint * mask): all of what is to change is hidden for Fill (1), half of it for ACE++ (0.5),
nothing for InFluxEdit (0), whose mask is white throughout. Or the picture stands on the left of a canvas twice as wide and
the edit is drawn beside it, as in-context methods do (ACE++, and InFluxEdit's other mode). Read flux/fill.py first.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageFilter
from torch import Tensor

from flux import conditioning, fill, flow, latents
from flux.autoencoder import AutoEncoder
from flux.config import Preset
from flux.errors import UserError
from flux.model import Flux

MASK_VALUE = 1.0  # of the mask channels where it changes, in training and sampling alike
MODES = ("channels", "side-by-side")
REPAINT = {"channels": 0.0, "side-by-side": 1.0}  # where none is said


@dataclass(frozen=True)
class Layout:
    """What a model is given of the picture to edit. It was trained with one, and samples with the same."""

    mode: str = "channels"  # the picture as channels alone, or on the left of a canvas, side-by-side
    repaint: float = 1.0  # share of what changes that is hidden: 1 Fill, 0.5 ACE++, 0 InFluxEdit
    mask_value: float = MASK_VALUE

    def __post_init__(self):
        numbers = all(isinstance(x, int | float) and 0 <= x <= 1 for x in (self.repaint, self.mask_value))
        if self.mode not in MODES or not numbers:
            raise UserError(f"layout {self.mode!r} with repaint scale {self.repaint} and mask value {self.mask_value}: "
                            f"expected {' or '.join(MODES)} and numbers from 0 to 1; change them")

    @property
    def beside(self) -> bool:
        return self.mode == "side-by-side"

    def canvas(self, source: Tensor, other: Tensor, left: bool = False) -> Tensor:
        """(B, C, H, W) each -> what is drawn: `other`, or both side by side (B, C, H, 2W), it on the right or `left`."""
        if not self.beside:
            return other
        return torch.cat((other, source) if left else (source, other), dim=-1)

    def shown(self, source: Tensor, mask: Tensor, left: bool = False) -> tuple[Tensor, Tensor]:
        """source (B, 3, H, W) in [-1, 1], mask (B, 1, H, W) in [0, 1], 1 = changes -> the same of the canvas, before
        `repaint` has hidden what is to be hidden: what the autoencoder sees, and where it changes."""
        mask = self.canvas(torch.zeros_like(mask), mask, left)
        return fill.masked(self.canvas(source, source, left), self.repaint * mask), mask

    def channels(self, encoded: Tensor, mask: Tensor) -> Tensor:
        """Latents (B, 16, h, w) of what is shown, and its mask (B, 1, 8h, 8w) -> (B, L_img, 64 + 256)."""
        return fill.tokens(encoded, self.mask_value * mask)

    def cut(self, drawn: Tensor) -> Tensor:
        """The edit (..., H, W) of a drawn canvas."""
        return drawn[..., drawn.shape[-1] // 2:] if self.beside else drawn

    def __str__(self):
        return f"{self.mode}, repaint scale {self.repaint:g}, mask value {self.mask_value:g}"


FILL = Layout()
# What was released, not what was meant: the training's mask picture is grey 1 of 255, which is then cut at one half, so
# that training sees black and sampling white; and the first layer is made trainable after the optimiser was built.
RELEASED = replace(FILL, repaint=0.0, mask_value=0.0)


def soft(mask: Image.Image, size: tuple[int, int]) -> Tensor:
    """Picture -> (1, 1, H, W) in [0, 1] at that width and height: white is 1, greys stay between."""
    grey = mask.convert("L")
    grey = grey if grey.size == size else grey.resize(size, Image.Resampling.BOX)
    return torch.from_numpy(np.asarray(grey, np.float32) / 255)[None, None]


def known(mask: Tensor) -> Tensor:
    """Mask (B, 1, 8h, 8w) -> (B, L_img, 64) bool: latents of cells of 8x8 pixels of which nothing changes."""
    return latents.pack((F.max_pool2d(mask, 8) == 0).expand(-1, 16, -1, -1))


def encode(source: Tensor, mask: Tensor, layout: Layout, autoencoder: AutoEncoder, hold: bool
           ) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """source (B, 3, H, W), mask (B, 1, H, W) -> of the canvas Fill's channels (B, L_img, 320); and to `hold` what is known,
    which latents (B, L_img, 64) that are, and their values."""
    weight = next(autoencoder.parameters())
    source = source.to(weight)
    shown, mask = layout.shown(source, mask.to(weight))
    channels = layout.channels(autoencoder.encode(shown), mask)
    if not hold:
        return channels, None, None
    return channels, known(mask), latents.pack(autoencoder.encode(layout.canvas(source, source)))


@torch.no_grad()
def draw(model: Flux, autoencoder: AutoEncoder, preset: Preset, layout: Layout, source: Tensor, mask: Tensor,
         features: tuple[Tensor, Tensor], seeds: Sequence[int], hold: bool = True) -> Tensor:
    """source (B, 3, H, W), mask (B, 1, H, W), features of B prompts, seeds of noise -> edits (B, 3, H, W) in [-1, 1]: what
    sample.py draws, many at a time."""
    channels, known, true = encode(source, mask, layout, autoencoder, hold)
    height, width = source.shape[2], source.shape[3] * (1 + layout.beside)
    noise = [latents.noise(1, height, width, torch.Generator().manual_seed(seed)) for seed in seeds]
    img = latents.pack(torch.cat(noise)).to(channels)
    cond = conditioning.condition(*features, width, height, preset.guidance)
    velocity = conditioning.velocity(model, conditioning.with_channels(cond, channels))
    img = flow.euler(fill.held(velocity, known, true) if hold else velocity, img,
                     flow.schedule(preset.steps, img.shape[1], preset.shift))
    return layout.cut(autoencoder.decode(latents.unpack(img, height, width)))


def changed(before: Image.Image, after: Image.Image, least: int = 24) -> Image.Image:
    """Where two pictures differ, as a soft mask in mode L: what the autoencoder alone changes is below `least` of 255.

    A difference counts with 4 pixels around it, and fades over as many.
    """
    difference = np.asarray(ImageChops.difference(before, after)).max(2).astype(np.uint8)
    calm = Image.fromarray(difference).filter(ImageFilter.MedianFilter(3))  # one pixel alone is none
    mask = calm.point(lambda level: 255 * (level >= least)).filter(ImageFilter.MaxFilter(9))
    return mask.filter(ImageFilter.BoxBlur(2)).point(lambda level: 0 if level < 8 else level)


def to_metadata(layout: Layout, prefix: str = "") -> dict[str, str]:
    """What a LoRA's file says of how it is to be sampled."""
    return {"influxedit": json.dumps(asdict(layout) | {"prefix": prefix})}


def from_metadata(metadata: Mapping[str, str], name: str) -> tuple[Layout, str] | None:
    """The layout and the words before every prompt; None of a LoRA that does not say. UserError for nonsense."""
    if "influxedit" not in metadata:
        return None
    try:
        said = json.loads(metadata["influxedit"])
        return Layout(said["mode"], said["repaint"], said["mask_value"]), str(said["prefix"])
    except (UserError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise UserError(f"{name} says of its own layout {metadata['influxedit'][:80]!r}, expected what train.py influxedit "
                        "wrote; train it again, or take its metadata out with python -m lora convert") from error
