"""Training an editing LoRA on Fill, from pairs of pictures before and after: the task of flux/recipes/influxedit.py.

It is the LoRA training of flux/lora_training.py with Fill's channels beside the noise: a `Layout` (flux/edits.py) says what
of the source they show. The first layer, which alone sees those channels, may be trained whole beside the LoRA.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from flux import conditioning, data, edits, fill, latents, pairs, pictures
from flux.cache import content
from flux.config import PRESETS
from flux.edits import Layout
from flux.errors import UserError
from flux.lora_training import LoraTask, TrainLora
from lora import inject
from lora.adapter import Adapter, Bias, Dense

EMBEDDER = "img_in"  # of 64 channels of noise and 320 of what is shown; diffusers calls it x_embedder


@dataclass(frozen=True)
class TrainEdit(TrainLora):
    """An editing LoRA on Fill, from pairs of pictures before and after."""

    model: str = "demo-fill"  # a preset that takes a mask: demo-fill, fill; for a LoRA for dev too, as it goes onto Fill
    mode: Literal["channels", "side-by-side"] = "channels"  # the source in Fill's channels, or beside what is drawn
    repaint: float | None = None  # share hidden of what changes: 1 Fill, 0.5 ACE++, 0 InFluxEdit; default 0, side-by-side 1
    quirks: Literal["none", "released"] = "none"  # released: the original's training saw a black mask and left the embedder
    masks: bool = True  # use the data's masks, white where it changes; --no-masks or data without: all of it changes
    sides: Literal["right", "both"] = "right"  # side-by-side: where the edit stands; both: left or right at random
    train_embedder: bool = False  # train the first layer whole, too; it is saved with the LoRA
    embedder_lr: float | None = None  # learning rate of the first layer; default: that of the LoRA
    known_weight: float = 1.0  # of the loss where nothing changes, as the source beside the edit: 1 counts all, 0 the edit
    changed_weight: float = 1.0  # of the loss where target and source differ, against 1 elsewhere
    prompt: str = ""  # the instruction of pairs without a caption
    prefix: str = ""  # words before every caption, as "before and after, the right half shows: "
    drop: float = 0.0  # share of captions left empty
    times: Literal["shift", "sampled", "logit-normal", "uniform"] = (  # at which noise levels; shift: logit-normal, moved as
        "sampled")  # sampling at this size is; sampled: as densely as its steps are, up to pure noise

    def __post_init__(self):
        super().__post_init__()
        self.layout  # noqa: B018  checks it
        for name in ("known_weight", "changed_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected a number from 0, such as 0.1")
        if self.embedder_lr is not None and not (self.train_embedder and self.embedder_lr > 0):
            raise UserError(f"--embedder-lr {self.embedder_lr}: expected a learning rate above 0, and --train-embedder; "
                            "add that, or leave this out")
        if self.embedder_lr not in (None, self.lr) and self.optimiser.endswith(".Prodigy"):
            raise UserError(f"--embedder-lr {self.embedder_lr} came with Prodigy, of one rate for all; expected none; "
                            "leave it out")
        if self.quirks != "none" and (self.train_embedder or self.mode != "channels"):
            raise UserError("--quirks released came with --train-embedder or --mode side-by-side, expected neither: the "
                            "released code trains no embedder, and errs in its other mode alone; leave one out")
        if self.sides == "both" and self.mode != "side-by-side":
            raise UserError("--sides both came with --mode channels, which has none, expected side-by-side; change one")

    @property
    def layout(self) -> Layout:
        repaint = edits.REPAINT[self.mode] if self.repaint is None else self.repaint
        return Layout(self.mode, repaint, edits.MASK_VALUE if self.quirks == "none" else edits.RELEASED.mask_value)

    @property
    def lr_scales(self) -> dict[str, float]:
        """Of parameters by the beginning of their names, for flux/optimiser.py."""
        return {f"{EMBEDDER}.trained.": (self.embedder_lr or self.lr) / self.lr} if self.train_embedder else {}

    def task(self):
        return EditTask(self)


class EditTask(LoraTask):
    def __init__(self, settings: TrainEdit):
        self.layout = settings.layout
        super().__init__(settings)
        self.embedder = inject.add_trained_whole(self.model, EMBEDDER) if settings.train_embedder else None

    def check_model(self) -> None:
        if self.preset.takes != "mask":
            able = ", ".join(name for name, preset in PRESETS.items() if preset.takes == "mask")
            raise UserError(f"--model {self.settings.model} takes no picture with a mask, expected one of {able}; take "
                            f"--model {'demo-fill' if self.settings.model == 'demo' else 'fill'}")

    def load(self, path: Path) -> list[data.Item]:
        """The pairs, with the instructions in full; masks that are not to be used are forgotten."""
        items, says = pairs.load(path, self.settings.edge or self.preset.width), self.settings
        return [replace(item, caption=(says.prefix + (item.caption or says.prompt)).strip(),
                        mask=item.mask if says.masks else None) for item in items]

    def tokens(self, item: data.Item) -> int:
        return super().tokens(item) * (2 if self.layout.beside else 1)

    # --- what is made of a pair once ---

    def entries(self, item: data.Item) -> list[tuple[tuple, Callable[[], dict[str, Tensor]]]]:
        """One for each side on which the edit may stand, the right one first."""
        made_from = (*self.latents_from, item.size, self.layout.mode, self.layout.repaint,
                     *(content(path) for path in (item.path, item.source, item.mask) if path))
        sides = (False, True) if self.settings.sides == "both" else (False,)
        return [((*made_from, left), partial(self.encoded, item, left)) for left in sides]

    @torch.no_grad()
    def encoded(self, item: data.Item, left: bool = False) -> dict[str, Tensor]:
        """latent and shown (1, 16, h, w), of what is drawn and what is given; mask (1, 1, 8h, 8w) in [0, 1] and where they
        differ (1, L_img, 1), both as uint8 of 255."""
        target, source = (data.images([item], part).to(self.place) for part in ("path", "source"))
        shown, mask = self.layout.shown(source, read_mask(item).to(self.place), left)
        drawn = self.layout.canvas(source, target, left)
        differs = (drawn - self.layout.canvas(source, source, left)).abs().amax(1, keepdim=True)
        differs = fill.pack_mask((differs > 0.1).float()).amax(-1, keepdim=True)
        return {"latent": self.autoencoder.encode(drawn).cpu(), "shown": self.autoencoder.encode(shown).cpu(),
                "mask": (255 * mask).round().byte().cpu(), "differs": (255 * differs).byte().cpu()}

    # --- a step ---

    def noised(self, items: list[data.Item], captions: list[str], times: Tensor, generator: torch.Generator):
        """What `loss` takes: the pairs of one bucket, noise from the generator, and a weight for each token."""
        left = torch.rand(len(items), generator=generator) < 0.5 if self.settings.sides == "both" else [False] * len(items)
        kept = [self.cache.get(*self.entries(item)[int(side)]) for item, side in zip(items, left, strict=True)]
        latent, shown, mask, differs = (torch.cat([row[name] for row in kept]).to(self.place)
                                        for name in ("latent", "shown", "mask", "differs"))
        x0, mask = latents.pack(latent), mask.float() / 255
        eps = torch.randn(x0.shape, generator=generator).to(self.place)
        return x0, eps, times.to(self.place), self.condition(captions, shown, mask, self.settings.guidance), self.weights(
            mask, differs.float() / 255)

    def condition(self, captions: list[str], shown: Tensor, mask: Tensor, guidance: float) -> conditioning.Condition:
        """shown (B, 16, h, w), mask (B, 1, 8h, 8w), both of the canvas."""
        txt, vec = self.features(captions)
        cond = conditioning.condition(txt, vec, mask.shape[3], mask.shape[2], guidance)
        return conditioning.with_channels(cond, self.layout.channels(shown, mask).to(txt))

    def weights(self, mask: Tensor, differs: Tensor) -> Tensor:
        """mask (B, 1, 8h, 8w), differs (B, L_img, 1) -> (B, L_img, 64), how much each number counts in the loss."""
        counts = torch.where(edits.known(mask), self.settings.known_weight, 1 + (self.settings.changed_weight - 1) * differs)
        return counts.clamp(min=1e-6)  # if all were known and known counted nothing


    # --- what is seen and saved ---

    def preview(self) -> Image.Image:
        """Source, target and what is drawn, of the first four pairs that training does not see, or of all."""
        self.wear(1.0)
        items = (self.unseen or self.items)[:4]
        rows = []
        for i, item in enumerate(items):
            source, mask = (x.to(self.place) for x in (data.images([item], "source"), read_mask(item)))
            drawn = edits.draw(self.model, self.autoencoder, self.preset, self.layout, source, mask,
                               self.features([item.caption]), [i])
            rows.append((source, data.images([item]), drawn))
        pils = [pil for row in rows for picture in row for pil in pictures.to_pil(picture)]
        words = [word for item in items for word in ("before", "target", f"drawn: {item.caption}")]
        return pictures.contact_sheet(pils, 3, words)

    def adapter(self) -> Adapter:
        layers = dict(super().adapter().layers)
        if self.embedder is not None:
            layers[EMBEDDER] = Dense(self.embedder.weight.detach().cpu()), Bias(self.embedder.bias.detach().cpu())
        return Adapter(layers)

    def save(self, folder: Path) -> None:
        super().save(folder, "influxedit", edits.to_metadata(self.layout, self.settings.prefix))

    def how_to_draw(self, path: Path) -> str:
        return f'python sample.py influxedit --model {self.settings.model} --lora {path} picture.png "..."'


def read_mask(item: data.Item) -> Tensor:
    """(1, 1, H, W) in [0, 1] at the size of the item's bucket; white throughout where it has none."""
    if item.mask is None:
        return torch.ones(1, 1, *item.size[::-1])
    grey = pictures.read(item.mask).convert("L")
    return edits.soft(grey if grey.size == item.size else data.fit(grey, item.size, Image.Resampling.BOX), item.size)
