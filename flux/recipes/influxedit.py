"""InFluxEdit: pictures edited as told, by LoRAs on FLUX.1-Fill that learned from pairs before and after.

After andjoer/InFluxEdit, which publishes no paper and no figures. Fill sees a picture through 320 channels beside the
noise; where plain Fill is shown grey for what it is to paint, here it is shown the picture itself and a white mask, and a
LoRA learns what to do with it. Or the picture stands beside the edit on one canvas. Both are a `Layout` (flux/edits.py),
the training is in flux/edit_training.py, its judgement in flux/edit_trial.py; drawing is t2i's.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from PIL import Image

from flux import checkpoint, cli, edits
from flux.edit_training import TrainEdit
from flux.edit_trial import CompareEdits, EvaluateEdits
from flux.edits import Layout
from flux.errors import UserError
from flux.repaint import Repaint


@dataclass(frozen=True)
class Edit(Repaint):
    """A picture edited as words say, by a LoRA that python train.py influxedit made."""

    mode: Literal["channels", "side-by-side"] | None = None  # default: as the LoRA was trained
    repaint: float | None = None  # share hidden of what changes, 0 to 1; default: as the LoRA was trained
    mask_value: float | None = None  # what the model is told where the mask is white; default: as the LoRA was trained

    def images(self) -> Iterator[tuple[Image.Image, dict]]:
        layout, prefix = self.layout()
        words = tuple((prefix + word).strip() for word in self.request[1:] or ("",))
        yield from self.drawn(words, repaint=layout.repaint, beside=layout.beside, mask_value=layout.mask_value)

    def layout(self) -> tuple[Layout, str]:
        """What the LoRAs were trained with, and the words before every prompt; flags win, and say so."""
        learned = {}
        for word in self.lora:
            path, _ = cli.path_and_scale("--lora", word, -10, 10)
            file = checkpoint.locate(path)
            said = file.suffix == ".safetensors" and edits.from_metadata(checkpoint.read_header(file).metadata, path.name)
            learned |= {said: path} if said else {}
        if len(learned) > 1:
            (one, _), (other, _) = list(learned)[:2]
            raise UserError(f"the LoRAs were trained as {one} and as {other}, expected one layout; leave one out")
        layout, prefix = next(iter(learned), (Layout(repaint=edits.REPAINT[self.mode or "channels"]), ""))
        if not learned:
            print("warning: no --lora that python train.py influxedit made; the model alone repaints, it does not edit",
                  file=sys.stderr)
        asked = {name: getattr(self, name) for name in ("mode", "repaint", "mask_value") if getattr(self, name) is not None}
        wanted = replace(layout, **asked)
        if learned and wanted != layout:
            print(f"warning: the LoRA was trained as {layout}, and is used as {wanted}", file=sys.stderr)
        return wanted, prefix


SAMPLE = Edit
TRAIN = {"": TrainEdit, "evaluate": EvaluateEdits, "compare": CompareEdits}
