"""How good editing LoRAs are: `python train.py influxedit evaluate`, on pairs that training never saw; and `compare`, which
trains the variants that InFluxEdit's authors wonder about, all alike, and sets them side by side.

Every edit is drawn as sample.py draws it, and compared with the pair's target: everywhere, inside the mask of what changes
and outside it, where the source should come back as the autoencoder alone gives it back. Where the data say what is asked
for (`asked`, as flux/demo/edits.py writes it), the demo's referee tells whether the edit shows it.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from flux import adapters, conditioning, data, device, draws, edits, fill, pairs, pictures, quality, weights
from flux.config import preset
from flux.demo import referee
from flux.demo.edits import asked
from flux.edit_training import EMBEDDER, TrainEdit, read_mask
from flux.edits import Layout
from flux.errors import UserError


@dataclass(frozen=True)
class EvaluateEdits:
    """Editing LoRAs on pairs that training never saw: how near the target, in the mask and around it, and the referee."""

    data: Path | None = None    # pairs, as those of training
    lora: tuple[str, ...] = ()  # PATH or PATH:SCALE of a LoRA that train.py influxedit made; each gets a row of the table
    model: str = "demo-fill"    # what the LoRAs were trained on
    weights: Path | None = None  # folder with the weights; without it FLUX_WEIGHTS, and for demo the shipped ones
    edge: int | None = None     # pixels: pictures go into buckets of about edge x edge; default: the model's own size
    masks: bool = True          # use the data's masks, white where it changes; --no-masks: all of it may change
    mask_value: float | None = None  # what the model is told where the mask is white; default: as it was trained
    hold: bool = True           # lead known latents straight to the picture's own; --no-hold leaves them to the model
    count: int | None = None    # of the first pairs; default: all
    batch: int = 16             # pairs that are drawn together
    seed: int = 1               # of the noise
    lpips: tuple[Path, ...] = ()  # torchvision's alexnet and lpips' alex.pth: LPIPS gets a column
    device: str = "auto"        # cpu, cuda, cuda:1, mps; auto takes the first GPU there is
    out: Path = Path("out")     # folder for the sheets of before, target and drawn

    def __post_init__(self):
        if not self.data or not self.lora:
            raise UserError("--data or --lora is missing, expected pairs and what to judge; add --data PAIRS --lora "
                            "runs/influxedit/final.safetensors")
        for name in ("count", "batch"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: expected 1 or more")

    def run(self) -> None:
        trial = Trial(self)
        names = ("PSNR", "SSIM", *(["LPIPS"] if self.lpips else []), "inside", "outside", "autoencoder outside",
                 "--keep, pixels that differ", "right")
        print(f"\n| {len(trial.items)} pairs | mode | embedder | repaint | mask value | {' | '.join(names)} |",
              "|---" * (len(names) + 5) + "|", sep="\n")
        for word in self.lora:
            print(trial.row(word), flush=True)


class Trial:
    def __init__(self, settings: EvaluateEdits):
        self.settings, self.preset = settings, preset(settings.model)
        self.items = pairs.load(settings.data, settings.edge or self.preset.width)[:settings.count]
        if not settings.masks:
            self.items = [replace(item, mask=None) for item in self.items]
        self.asked = wanted(settings.data)
        self.lpips = quality.load_lpips(settings.lpips)
        self.place, self.dtype = device.choose(settings.device)
        self.found = weights.find(self.preset, settings.weights)
        weights.require(self.found, "flux", "ae", "clip", "t5", "tokenizer", "tokenizer_2")
        self.autoencoder = weights.load_autoencoder(self.found, self.preset.autoencoder, torch.float32, self.place)
        self.features: dict[str, tuple[Tensor, Tensor]] = {}

    def row(self, word: str) -> str:
        """The table's line of one LoRA, which the sheet follows."""
        lora, = adapters.read((word,), self.preset)
        said = edits.from_metadata(lora.parts["flux"].metadata if "flux" in lora.parts else {}, lora.path.name)
        if said is None:
            raise UserError(f"{lora.path} does not say how it was trained, expected one that train.py influxedit made; name "
                            "another")
        (layout, prefix), value = said, self.settings.mask_value
        used = layout if value is None else replace(layout, mask_value=value)
        self.encode([prefix + item.caption for item in self.items])
        model = adapters.load_flux(self.found, self.preset, self.dtype, self.place)
        adapters.attach([lora], "flux", model)
        figures, shown = [], []
        for batch in tqdm(list(self.batches()), desc=lora.path.name, disable=None):
            some, pils = self.judge(model, used, prefix, batch)
            figures += some
            shown += pils
        mean = {name: np.nanmean([row[name] for row in figures]) for name in figures[0] if any(
            not np.isnan(row[name]) for row in figures)}
        path = self.settings.out / f"edits_{lora.path.parent.name}.png"
        self.settings.out.mkdir(parents=True, exist_ok=True)
        pils, words = zip(*shown[:24], strict=True)
        pictures.write_png(path, pictures.contact_sheet(pils, 6, words), None)
        embedder = "trained" if EMBEDDER in lora.parts["flux"].layers else "left"
        told = f"{layout.mask_value:g}" + ("" if used == layout else f", told {used.mask_value:g}")
        cells = [lora.path.parent.name, layout.mode, embedder, f"{layout.repaint:g}", told]
        forms = {"psnr": "{:.1f} dB", "ssim": "{:.3f}", **({"lpips": "{:.3f}"} if self.lpips else {}), "inside": "{:.1f} dB",
                 "outside": "{:.1f} dB", "alone": "{:.1f} dB", "kept": "{:.0f}", "right": "{:.0%}"}
        cells += [form.format(mean[name]) if name in mean else "" for name, form in forms.items()]
        return f"| {' | '.join(cells)} |"

    def batches(self) -> Iterator[list[data.Item]]:
        """In the data's order, but pictures of one size at a time."""
        for size in dict.fromkeys(item.size for item in self.items):
            alike = [item for item in self.items if item.size == size]
            yield from (alike[i:i + self.settings.batch] for i in range(0, len(alike), self.settings.batch))

    @torch.no_grad()
    def judge(self, model: torch.nn.Module, layout: Layout, prefix: str, batch: list[data.Item]
              ) -> tuple[list[dict[str, float]], list[tuple[Image.Image, str]]]:
        """Figures of each pair, by name, and three pictures of each with their words."""
        source, target, mask = (x.to(self.place) for x in (data.images(batch, "source"), data.images(batch),
                                                           torch.cat([read_mask(item) for item in batch])))
        features = tuple(torch.cat(part) for part in zip(*(self.features[prefix + item.caption] for item in batch),
                                                         strict=True))
        seeds = [draws.seed_of("edit trial", self.settings.seed, str(item.path.name)) % 2**31 for item in batch]
        drawn = pictures.to_pil(edits.draw(model, self.autoencoder, self.preset, layout, source, mask, features, seeds,
                                           self.settings.hold))
        trip = pictures.to_pil(self.autoencoder.decode(self.autoencoder.encode(source)))
        found, alone = (torch.cat([pictures.to_tensor(pil) for pil in pils]) / 2 + 0.5 for pils in (drawn, trip))
        target, source, mask = (x.cpu() for x in (target / 2 + 0.5, source / 2 + 0.5, mask))
        inside, outside = (mask > 0.5).float(), (mask == 0).float()
        columns = {"psnr": quality.psnr(found, target), "ssim": quality.ssim(found, target),
                   "inside": quality.psnr(found, target, inside), "outside": quality.psnr(found, source, outside),
                   "alone": quality.psnr(alone, source, outside)}
        if self.lpips:
            columns["lpips"] = self.lpips(found.float(), target.float())
        rows, shown = [], []
        for i, item in enumerate(batch):
            row = {name: float(column[i]) for name, column in columns.items()}
            before, after = pictures.to_pil(2 * source[i:i + 1] - 1)[0], pictures.to_pil(2 * target[i:i + 1] - 1)[0]
            known = np.asarray(outside[i, 0], bool)
            kept = fill.keep(drawn[i], before, Image.fromarray((255 * mask[i, 0]).round().byte().numpy()))
            row["kept"] = float((np.asarray(kept) != np.asarray(before)).any(-1)[known].sum()) if known.any() else np.nan
            scene = self.asked.get(str(item.path))
            row["right"] = np.nan if scene is None else float(referee.judge(np.asarray(drawn[i]), scene).right)
            rows.append(row)
            shown += [(before, "before"), (after, "target"), (drawn[i], "[wrong] " * (row["right"] == 0) + item.caption)]
        return rows, shown

    def encode(self, prompts: list[str]) -> None:
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.features]
        if new:
            encoders = conditioning.TextEncoders(self.found, self.preset, self.dtype, self.place)
            with torch.no_grad():
                self.features |= {prompt: encoders([prompt]) for prompt in new}


def wanted(path: Path) -> dict:
    """Scenes by the target's path, where metadata.jsonl tells them."""
    index = path / "metadata.jsonl" if path.is_dir() else path
    if index.suffix != ".jsonl" or not index.is_file():
        return {}
    records = map(json.loads, index.read_text(encoding="utf-8").splitlines())
    try:
        return {str(index.parent / record["target"]): asked(record["asked"]) for record in records if "asked" in record}
    except (TypeError, LookupError, AttributeError) as error:
        raise UserError(f"{index}: `asked` is no scene ({error!r}), expected what python -m flux.demo.edits writes; write "
                        "it again, or take it out") from error


@dataclass(frozen=True)
class CompareEdits(TrainEdit):
    """Mode x embedder x repaint scale x mask value: a LoRA of each, trained alike, then the table of `evaluate`."""

    unseen: Path | None = None  # pairs that training never sees, for the table
    held_out: float = 0.0  # share of the pictures that training never sees, for the validation loss

    VARIANTS = {"channels": {}, "embedder": {"train_embedder": True}, "half": {"repaint": 0.5}, "hidden": {"repaint": 1.0},
                "black-mask": {"quirks": "released"}, "side-by-side": {"mode": "side-by-side"}}

    def __post_init__(self):
        super().__post_init__()
        if not self.unseen:
            raise UserError("--unseen is missing, expected pairs that training never sees; add --unseen PAIRS")

    def stages(self):
        shared = {field.name: getattr(self, field.name) for field in fields(TrainEdit)}
        for name, change in self.VARIANTS.items():
            yield name, TrainEdit(**shared | change)
        made = tuple(str(self.out / f"influxedit-{name}" / "final.safetensors") for name in self.VARIANTS)
        yield "evaluate", EvaluateEdits(data=self.unseen, lora=made, model=self.model, weights=self.weights, edge=self.edge,
                                        masks=self.masks, device=self.device, out=self.out)
