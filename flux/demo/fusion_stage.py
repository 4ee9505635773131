"""Training the gates by which several LoRAs work together (arXiv 2508.02107, section 3.5 of our notes), in the demo world.

FLUX and the LoRAs are frozen. In a step, N of a pool's LoRAs are on the network. Either one of them is meant: picture and
caption are of its kind, the others distract. Or two are, a style's and an object's, and the picture, drawn by the
renderer, shows both: of pairs of a style and a shape that are not `held_out`, and of LoRAs that are not.
"""

import itertools
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from flux import checkpoint, conditioning, draws, flow, latents, lora_layers, lora_names, weights
from flux.conditioning import Condition
from flux.config import preset
from flux.demo import scene as world
from flux.demo.pool import PALETTES
from flux.errors import UserError
from flux.fusion import ENCODER
from flux.lora_search import Member, Searcher, pool
from flux.settings import Training
from lora import gates, io
from lora.adapter import Adapter
from lora.fuse import Gated
from lora.gates import Gates, Options
from lora.inject import Loras
from lora.layers import Plan, plan

COUNTS = {2: 0.7, 3: 0.2, 4: 0.06, 5: 0.04}  # how often so many LoRAs are there; one alone is not gated

GAIN = 32  # features that gains are made of


@dataclass(frozen=True)
class TrainFusion(Training):
    """Gates that let several LoRAs of the demo's pool work together."""

    pool: Path = weights.DEMO / "pool"  # folder of LoRAs with index.json; default: the shipped one
    encoder: Path = weights.DEMO / ENCODER  # of LoRAs, whose vectors the gates are told; default: the shipped one
    model: str = "demo"         # the preset that the LoRAs are for; so far the demo alone
    weights: Path | None = None  # folder with the model's weights
    kind: Literal["ours", "published"] = "ours"
    variant: Literal["full", "no_base", "no_cross", "no_lora"] = "full"  # what the gate does not see
    compete: bool = False       # a softmax over the LoRAs in place of a sigmoid for each
    embedding: bool = True      # tell the gates what each LoRA is
    gain: bool = True           # and learn a gain of its outputs from that and from what the others are
    time: bool = True           # and how far the picture is
    slices: bool = True         # norms over slices such as q, k, v, not whole rows
    composed: float = 0.92      # share of steps whose pictures show a style and an object
    away: float = 1.4           # how far from the bare model's velocity the target lies: 1 at the picture's, 2 twice as far
    focus: float = 0.5          # share of a picture's loss that its object has, however small it is; 0: by its area
    teacher: float = 0.0        # weight of the distance to the best of: the sum / sqrt(N), either LoRA alone
    hinge: float = 0.1          # weight of: a picture must fit its own caption better than a distractor's
    entropy: float = 0.01       # weight of the gates' entropy
    extra_every: int = 0        # steps from one with these three terms, which cost three more passes; 0: none has them
    steps: int = 400
    lr: float = 3e-2
    batch: int = 4              # pictures per step, all under the same LoRAs
    warmup: int = 20
    schedule: Literal["constant", "cosine"] = "cosine"
    ema: float = 0.98
    sample_every: int = 0
    validate_every: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.model != "demo":
            raise UserError(f"--model {self.model}: gates are trained on pictures of the demo's renderer, expected demo; "
                            "others need pictures of their LoRAs, which is not done yet")
        for name in ("composed", "focus"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name} {getattr(self, name)}: expected a share from 0 to 1")

    def task(self):
        return FusionTask(self)


def held_out(style: str, shape: str) -> bool:
    """A quarter of all pairs of a style and a shape: no gate is trained on a picture that shows both."""
    return draws.seed_of("fusion", style, shape) % 4 == 0


@dataclass(frozen=True)
class Example:
    """What a step is about: LoRAs, the scene they should draw, and one of the distractors' for contrast."""

    members: tuple[Member, ...]
    scenes: tuple[world.Scene, ...]
    others: tuple[world.Scene, ...]
    meant: int  # how many of the members, from the first


class FusionTask:
    def __init__(self, settings: TrainFusion):
        self.settings, self.preset = settings, preset(settings.model)
        self.members = [one for one in pool(settings.pool) if not one.held_out and not held_out(*taught(one))]
        self.styles = [one for one in self.members if taught(one)[0] and not taught(one)[1]]
        self.objects = [one for one in self.members if taught(one)[1] and not taught(one)[0]]
        if not self.styles or not self.objects or len(self.members) < max(COUNTS):
            raise UserError(f"{settings.pool} has {len(self.styles)} LoRAs of a style and {len(self.objects)} of an object "
                            f"to train with; expected both, and {max(COUNTS)} in all; make the pool: train.py demo pool")
        found = weights.find(self.preset, settings.weights)
        self.encoders = conditioning.TextEncoders(found, self.preset, torch.float32, torch.device("cpu"))
        self.autoencoder = weights.load_autoencoder(found, self.preset.autoencoder, torch.float32)
        self.network = weights.load_flux(found, self.preset.flux, torch.float32).eval().requires_grad_(False)
        names = lora_names.names(self.preset)
        self.adapters: dict[str, Adapter] = {one.name: io.read(one.file, names)[0]["flux"] for one in self.members}
        self.known, width = None, 0
        if settings.embedding and settings.kind == "ours":
            searcher = Searcher(settings.encoder, settings.weights)
            self.known = {one.name: searcher.embed(one.file)[0].clone() for one in self.members}
            width = len(next(iter(self.known.values())))
        torch.manual_seed(draws.seed_of(settings.seed, "fusion"))
        used = {layer for adapter in self.adapters.values() for layer in adapter.layers}
        some = [layer for layer in lora_layers.layers(self.preset.flux)
                if layer.name in used or settings.kind == "published"]  # whose files have all layers
        self.gates = Gates(some, Options(settings.kind, settings.variant, settings.compete, width, settings.time,
                                         settings.slices, gain=GAIN if width and settings.gain else 0))
        for layer in self.gates.layers:
            self.gates.of(layer.name).requires_grad_(layer.name in used)
        self.loras = Loras(self.network)

    def trainable(self) -> nn.Module:
        return self.gates

    def example(self, *key: int | str) -> Example:
        rng = draws.rng(self.settings.seed, "example", *key)
        count = int(rng.choice(list(COUNTS), p=list(COUNTS.values())))
        if rng.random() < self.settings.composed:
            pairs = [pair for pair in itertools.product(self.styles, self.objects)
                     if not held_out(taught(pair[0])[0], taught(pair[1])[1])]
            meant = pairs[rng.integers(len(pairs))]
        else:
            meant = (self.members[rng.integers(len(self.members))],)
        rest = [one for one in self.members if one not in meant]
        others = [rest[i] for i in rng.choice(len(rest), count - len(meant), replace=False)]
        contrast = others[:1] or [meant[1]]
        members = (*meant, *others)
        order = rng.permutation(len(members))  # nothing may depend on it; what is meant is told by the captions alone
        return Example(tuple(members[i] for i in order), tuple(scene_of(meant, rng) for _ in range(self.settings.batch)),
                       tuple(scene_of(contrast, rng) for _ in range(self.settings.batch)), len(meant))

    def batch(self, step: int, micro: int):
        """The example, latents (B, L, 64), weights of tokens (B, L), noise, times, and the conditions of its captions and,
        every few steps, of the distractor's."""
        example = self.example(step, micro)
        rng, g = (make(self.settings.seed, "fusion", step, micro) for make in (draws.rng, draws.generator))
        drawn, masks = zip(*map(world.render, example.scenes), strict=True)
        pixels = np.stack(drawn)
        with torch.no_grad():
            image = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
            x0 = latents.pack(self.autoencoder.encode(image))
        eps = torch.randn(x0.shape, generator=g)
        t = flow.draw_sampled_t(len(x0), g, flow.mu(x0.shape[1]))
        weight = torch.stack([token_weights(mask.max(0), self.settings.focus) for mask in masks])
        own, other = ([world.sample_caption(scene, rng, full=True).text for scene in scenes]
                      for scenes in (example.scenes, example.others))
        every = self.settings.extra_every
        extra = every > 0 and step % every == every - 1
        return example, x0, weight, eps, t, self.condition(own), self.condition(other) if extra else None

    def condition(self, words: list[str]) -> Condition:
        txt, vec = self.encoders(words)
        return conditioning.condition(txt.clone(), vec.clone(), self.preset.width, self.preset.height, 1.0)

    def loss(self, batch) -> Tensor:
        """Flow matching (B,) under the gates, and every few steps what else there is."""
        example, x0, weight, eps, t, own, other = batch
        self.put(example.members)
        x, target = flow.interpolate(x0, eps, t), eps - x0
        teach = self.settings.teacher if other and example.meant > 1 else 0.0
        bare, *plain = self.plain(example, x, t, own, bool(teach)) if other or self.settings.away != 1 else [target]
        target = bare + self.settings.away * (target - bare)
        fusing = Gated(self.loras, self.gates, self.known)

        def error(v: Tensor) -> Tensor:
            return ((v - target).square().mean(2) * weight).mean(1)

        def velocity(cond: Condition) -> Tensor:
            return fusing.velocity(conditioning.velocity(self.network, cond))(x, t)
        if other and self.settings.entropy:
            fusing.entropy = []
        v = velocity(own)
        losses = fitting = error(v)
        if other is None:
            return losses
        if fusing.entropy:
            losses = losses + self.settings.entropy * torch.stack(fusing.entropy).mean()
            fusing.entropy = None
        if self.settings.hinge:
            losses = losses + self.settings.hinge * (0.1 * error(bare) - (error(velocity(other)) - fitting)).clamp(min=0)
        if teach:
            best = torch.stack([error(each) for each in plain]).argmin(0)
            wanted = torch.stack(plain)[best, torch.arange(len(best))]
            losses = losses + teach * (v - wanted).square().flatten(1).mean(1)
        return losses

    @torch.no_grad()
    def plain(self, example: Example, x: Tensor, t: Tensor, cond: Condition, teach: bool) -> list[Tensor]:
        """Velocities of the bare model, and for the teacher of the sum / sqrt(N) and of each LoRA alone."""
        found, layers = [], self.loras.layers
        count = len(example.members)
        ways = [[0.0] * count]
        if teach:
            ways += [[count ** -0.5] * count, *([float(i == j) for j in range(count)] for i in range(count))]
        for strengths in ways:
            scale = dict(zip(self.loras.on, strengths, strict=True))
            self.loras.set_plans({layer: plan(base, [(terms, scale[name]) for name, (terms, _) in members.items()])
                                  if any(strengths) else Plan() for layer, (base, members) in layers.items()})
            found.append(conditioning.velocity(self.network, cond)(x, t))
        return found

    def put(self, members: tuple[Member, ...]) -> None:
        for name in list(self.loras.on):
            self.loras.detach(name)
        for one in members:
            self.loras.attach(one.name, self.adapters[one.name])

    def preview(self) -> None:
        return None

    def save(self, folder: Path) -> None:
        """The gates, and beside them the encoder whose vectors they were told."""
        about = {"model": self.preset.name, "config": str(self.settings)}
        if self.known is not None:
            about["encoder"] = checkpoint.fingerprint(checkpoint.locate(self.settings.encoder))
            shutil.copyfile(self.settings.encoder, folder / "final.encoder.safetensors")
        gates.save(folder / "final.safetensors", self.gates, about)
        print(f"draw with them: python sample.py --lora ONE --lora OTHER --fuse gates:{folder / 'final.safetensors'} ...")


def token_weights(mask: np.ndarray, focus: float) -> Tensor:
    """An object's mask (H, W) -> (L,) with a mean of 1, a share `focus` of it on the tokens that the object touches."""
    h, w = (edge // 16 for edge in mask.shape)
    seen = torch.from_numpy(mask).reshape(h, 16, w, 16).amax((1, 3)).flatten() > 0
    share = seen.float().mean()
    if not focus or not 0 < share < 1:
        return torch.ones(len(seen))
    return torch.where(seen, focus / share, (1 - focus) / (1 - share))


def taught(member: Member) -> tuple[str, str]:
    """The style and the shape that a LoRA of the demo's pool teaches, "" for none."""
    return member.about.get("style", ""), member.about.get("shape", "")


def scene_of(meant: tuple[Member, ...] | list[Member], rng: np.random.Generator) -> world.Scene:
    """One object in their style, shape and palettes; in plain light and paint, which no style hides."""
    style, shape = ("".join(dict.fromkeys(words)) for words in zip(*map(taught, meant), strict=True))
    colours = tuple(dict.fromkeys(colour for one in meant for colour in PALETTES[one.about["palette"]]))
    drawn = world.sample_scene(rng, things=1, shapes=(shape,) if shape else world.SHAPES, style=style, colours=colours)
    return replace(drawn, light="normal", finish="flat")
