"""--fuse: the rule by which the LoRAs of --lora are weighed (`lora/fuse.py`), and the files that learned gates need.

Gates want to know what each LoRA is: they were trained with the vectors of an encoder of LoRAs (`flux/lora_search.py`),
whose file lies beside theirs: X.encoder.safetensors for X.safetensors, or else retriever.safetensors.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from flux import adapters, checkpoint, lora_layers, weights
from flux.adapters import Given
from flux.config import Preset
from flux.errors import UserError
from flux.lora_search import Searcher
from flux.settings import Conditioned
from lora import fuse, gates
from lora.fuse import Fusion, Gated
from lora.gates import Gates

ENCODER = "retriever.safetensors"  # beside a file of gates
SHIPPED = weights.DEMO / "gates.safetensors"
LOOKS = 5  # times at which a rule that must see the network sees it


@dataclass(frozen=True)
class Way:
    """--fuse, read."""

    rule: str
    file: Path | None = None  # of gates
    report: bool = False

    @property
    def files(self) -> dict[str, str]:
        """What a picture's metadata say of it."""
        return {"gates": f"{self.file.name} {checkpoint.fingerprint(checkpoint.locate(self.file))}"} if self.file else {}

    def beside(self, given: list[Given]) -> float:
        """What strengths are multiplied with where a rule does not reach: in the text encoders."""
        count = max(1, sum(lora.scale != 0 for lora in given))
        return {"mean": 1 / count, "sqrt": count ** -0.5, "gates": 1 / max(1, count / 2), "static": 1 / max(1, count / 2)
                }.get(self.rule, 1.0)

    def attach(self, given: list[Given], network: nn.Module, model: Preset) -> Fusion:
        """The LoRAs for the transformer, beside its weights, under the rule."""
        loras = adapters.attach(given, "flux", network)
        if self.rule not in ("gates", "static"):
            return fuse.put(self.rule, loras)
        learned, known = opened(self.file, model, given)
        return fuse.put(self.rule, loras, gates=learned.to(next(network.parameters()).device), embeddings=known,
                        watched=self.report)

    def said(self, fusing: Fusion) -> dict:
        """Since the last time: the mean of each LoRA's gate by block and step."""
        if not self.report or not isinstance(fusing, Gated):
            return {}
        seen, fusing.seen = fusing.seen, []
        return {"gates": table(seen)}


def read(settings: Conditioned) -> Way:
    rule, _, file = settings.fuse.partition(":")
    if rule not in fuse.RULES or (file and rule not in ("gates", "static")):
        raise UserError(f"--fuse {settings.fuse}: expected one of {', '.join(fuse.RULES)}, the last two with a file "
                        "of gates behind a colon if it is not the demo's; change it")
    learned = rule in ("gates", "static")
    if settings.gate_report and rule != "gates":
        raise UserError(f"--gate-report came with --fuse {rule}, expected --fuse gates; leave it out")
    if learned and not file and settings.model != "demo":
        raise UserError(f"--fuse {rule} came without a file for {settings.model}, expected gates that were trained for it, "
                        f"as in --fuse {rule}:gates.safetensors; add it")
    for name in ("compile", "reuse"):
        fixed = rule in ("sum", "mean", "sqrt", "dare", "ties") or name == "reuse" and rule in ("energy", "gates")
        if getattr(settings, name) not in (None, False) and not fixed:
            raise UserError(f"--{name} came with --fuse {rule}, which changes the network on the way; expected one of them; "
                            "leave the other out")
    path = None if not learned else Path(file) if file else SHIPPED
    if path is not None:
        checkpoint.read_header(checkpoint.locate(path))
    return Way(rule, path, settings.gate_report)


def opened(file: Path, model: Preset, given: list[Given]) -> tuple[Gates, Mapping[str, Tensor] | None]:
    """Gates, and what they want to know of each LoRA."""
    layers = lora_layers.layers(model.flux)
    learned, about = gates.load(file, layers, {layer.name: lora_layers.in_diffsynth(layer).name for layer in layers})
    if not learned.options.embedding:
        return learned, None
    searcher = Searcher(encoder_of(file, about))
    return learned, {lora.name: searcher.embed(lora.path)[0] for lora in given}


def encoder_of(file: Path, about: Mapping) -> Path:
    """The encoder by whose vectors the gates in a file were trained."""
    places = [file.with_name(f"{file.stem}.encoder.safetensors"), file.with_name(ENCODER)]
    for place in places:
        if place.is_file() and checkpoint.fingerprint(place) == about.get("encoder"):
            return place
    raise UserError(f"{checkpoint.shown(file)} was trained by vectors of an encoder of LoRAs that is not beside it; "
                    f"expected the one with the fingerprint {about.get('encoder')}; put it there as {places[0].name}")


def few(times: list[float]) -> list[float]:
    """A short way through the same times."""
    return [*times[:-1:max(1, len(times) // LOOKS)], times[-1]]


def table(seen: list[tuple[float, str, str, float]]) -> dict[str, list[list[float]]]:
    """By LoRA: a row for each block in the network's order, in it the mean of all its layers by step."""
    blocks = list(dict.fromkeys(".".join(layer.split(".")[:2]) for _, layer, _, _ in seen))
    times = sorted({t for t, _, _, _ in seen}, reverse=True)
    sums: dict[tuple[str, str, float], list[float]] = {}
    for t, layer, name, share in seen:
        sums.setdefault((name, ".".join(layer.split(".")[:2]), t), []).append(share)

    def mean(values: list[float]) -> float:
        return round(sum(values) / len(values), 4)
    names = dict.fromkeys(name for _, _, name, _ in seen)
    return {"blocks": blocks, "times": [round(t, 4) for t in times]} | {
        name: [[mean(sums[name, block, t]) for t in times] for block in blocks] for name in names}


def heat_map(shown: Mapping[str, list], cell: int = 14) -> Image.Image:
    """What `table` says as a picture: a panel for each LoRA, a row for each block, a column for each step.

    Blue passes nothing, white as much as a plain sum, red twice that or more.
    """
    blocks, times = shown["blocks"], shown["times"]
    names = [name for name in shown if name not in ("blocks", "times")]
    font, margin = ImageFont.load_default(11), 140
    panel = cell * len(blocks) + 34
    canvas = Image.new("RGB", (margin + cell * len(times) + 12, panel * len(names) + 18), "white")
    draw = ImageDraw.Draw(canvas)
    for i, name in enumerate(names):
        top = i * panel + 20
        draw.text((6, top - 16), name, "black", font)
        for row, (block, values) in enumerate(zip(blocks, shown[name], strict=True)):
            if cell >= 12:
                draw.text((6, top + row * cell), block, "#555555", font)
            for column, value in enumerate(values):
                off = min(1.0, abs(value - 1))
                faded = round(255 * (1 - off))
                colour = (255, faded, faded) if value > 1 else (faded, faded, 255)
                x, y = margin + column * cell, top + row * cell
                draw.rectangle((x, y, x + cell - 2, y + cell - 2), colour, "#dddddd")
    draw.text((margin, panel * len(names)), "first step to last; blue 0, white 1, red 2", "#555555", font)
    return canvas
