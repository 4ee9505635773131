"""Do several LoRAs work together? Pictures of a style and an object that no gate was trained on together, under every rule
of `lora/fuse.py`, judged by the reader."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flux import conditioning, draws, flow, fusion, latents, lora_layers, lora_names, pictures, weights
from flux.config import DEMO
from flux.demo import reader
from flux.demo import scene as world
from flux.demo.fusion_stage import held_out, taught
from flux.demo.pool import PALETTES
from flux.lora_search import Member, Searcher, pool
from lora import fuse, gates, io
from lora.gates import Gates
from lora.inject import Loras

PAIRS_ONLY = ("klora", "ziplora")
TERMS = ("weight_base", "weight_lora", "weight_cross", "bias", "time", "member", "gain", "mix")  # left out one by one


@dataclass(frozen=True)
class Case:
    """One drawing of several pictures: LoRAs, the object's first and then the style's, and what they shall show."""

    members: tuple[Member, ...]
    captions: tuple[world.Caption, ...]
    style: str
    shape: str
    seed: int


def cases(folder: Path, count: int, each: int, others: int, seed: int) -> list[Case]:
    """Of pairs that are held out, taken in turn, with any LoRAs of the pool that teach them; `others` distract."""
    rng, members = draws.rng("fusion cases", seed), pool(folder)
    pairs = [(style, shape) for style in world.STYLES for shape in world.NEW_SHAPES if held_out(style, shape)]
    out = []
    for i in range(count):
        style, shape = pairs[i % len(pairs)]
        one, other = ([member for member in members if taught(member) == words] for words in (("", shape), (style, "")))
        meant = [some[rng.integers(len(some))] for some in (one, other)]
        rest = [member for member in members if member not in meant]
        found = [*meant, *(rest[k] for k in rng.choice(len(rest), 4, replace=False))][:2 + others]
        colours = tuple(dict.fromkeys(c for member in meant for c in PALETTES[member.about["palette"]]))
        captions = []
        for _ in range(each):
            try:
                drawn = world.sample_scene(rng, True, 1, (shape,), style, colours)
            except ValueError:  # none of these few colours is held out
                drawn = world.sample_scene(rng, False, 1, (shape,), style, colours)
            captions.append(world.sample_caption(replace(drawn, light="normal", finish="flat"), rng, full=True))
        out.append(Case(tuple(found), tuple(captions), style, shape, draws.seed_of("fusion", seed, i) % 2**31))
    return out


class Studio:
    """The demo's networks, loaded once, with any LoRAs under any rule."""

    def __init__(self, steps: int, guidance: float = DEMO.guidance, learned: Path = fusion.SHIPPED):
        found = weights.find(DEMO)
        self.steps, self.guidance = steps, guidance
        self.encoders = conditioning.TextEncoders(found, DEMO, torch.float32, torch.device("cpu"))
        self.autoencoder = weights.load_autoencoder(found, DEMO.autoencoder, torch.float32).eval()
        self.network = weights.load_flux(found, DEMO.flux, torch.float32).eval()
        self.loras, self.names = Loras(self.network), lora_names.names(DEMO)
        layers = lora_layers.layers(DEMO.flux)
        called = {layer.name: lora_layers.in_diffsynth(layer).name for layer in layers}
        self.gates, about = gates.load(learned, layers, called)
        knows = self.gates.options.embedding
        self.searcher = Searcher(fusion.encoder_of(learned, about)) if knows else None
        self.known: dict[str, Tensor] = {}

    def put(self, members: Sequence[Member], strengths: Sequence[float]) -> None:
        for name in list(self.loras.on):
            self.loras.detach(name)
        for member, strength in zip(members, strengths, strict=True):
            self.loras.attach(member.name, io.read(member.file, self.names)[0]["flux"], strength)
            if self.searcher and member.name not in self.known:
                self.known[member.name] = self.searcher.embed(member.file)[0]

    @torch.inference_mode()
    def draw(self, case: Case, rule: str, learned: Gates | None = None,
             strengths: Sequence[float] | None = None) -> list[Image.Image]:
        """By 20 steps as the sampler takes them; rules that must look are given all pictures at once."""
        self.put(case.members, strengths or [1.0] * len(case.members))
        fusing = fuse.put(rule, self.loras, 0, learned or self.gates, self.known or None)
        txt, vec = self.encoders([caption.text for caption in case.captions])
        cond = conditioning.condition(txt, vec, DEMO.width, DEMO.height, self.guidance)
        noise = [latents.noise(1, DEMO.height, DEMO.width, torch.Generator().manual_seed(case.seed + i))
                 for i in range(len(case.captions))]
        img = latents.pack(torch.cat(noise))
        times = flow.schedule(self.steps, img.shape[1], DEMO.shift)
        velocity = fusing.velocity(conditioning.velocity(self.network, cond), times)
        fusing.look(lambda: flow.euler(velocity, img, fusion.few(times)))
        img = flow.euler(velocity, img, times)
        return pictures.to_pil(self.autoencoder.decode(latents.unpack(img, DEMO.height, DEMO.width)))


    def pictures(self, case: Case, way: str) -> list[Image.Image]:
        """Under a rule; or `object alone`, `style alone`, or `gates without TERM`."""
        if way.endswith(" alone"):
            return self.draw(only(case, ("object", "style").index(way.split()[0])), "sum")
        if way.startswith("gates without "):
            return self.draw(case, "gates", without(self.gates, way.split()[-1]))
        return self.draw(case, way)

    def seconds(self, case: Case, way: str) -> float:
        """Processor time of one step: merged, added, gates, definition (the gates as their equation says)."""
        self.put(case.members, [1.0] * len(case.members))
        fusing = fuse.put("sum" if way in ("merged", "added") else "gates", self.loras, 0, self.gates, self.known or None)
        if way == "merged":
            self.loras.merge()
        if way == "definition":
            fusing.define()
        txt, vec = self.encoders([caption.text for caption in case.captions])
        cond = conditioning.condition(txt, vec, DEMO.width, DEMO.height, self.guidance)
        img, t = torch.randn(len(txt), 64, 64), torch.full((len(txt),), 0.5)
        velocity = fusing.velocity(conditioning.velocity(self.network, cond), [1.0, 0.5, 0.0])
        velocity(img, t)
        started = time.process_time()
        velocity(img, t)
        spent = time.process_time() - started
        self.loras.unmerge()
        return spent


def only(case: Case, at: int) -> Case:
    """With one of its LoRAs alone."""
    return replace(case, members=case.members[at:at + 1])


def judged(pils: Sequence[Image.Image], case: Case) -> list[tuple[bool, bool, bool]]:
    """Of each picture: whether the style is there, whether the shape is, whether all that was asked is."""
    found = reader.read(np.stack([np.asarray(pil) for pil in pils]))
    return [(one.style == case.style, one.shape == case.shape, one.style == case.style and one.shows(caption.asked))
            for one, caption in zip(found, case.captions, strict=True)]


def without(learned: Gates, term: str) -> Gates:
    """Gates with one learned term left out: weights and shifts of it zero; of `mix`, lambda."""
    made = Gates(learned.layers, learned.options)
    made.load_state_dict(learned.state_dict())
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.split(".")[2:3] == [term]:
                parameter.fill_(-1e9 if term == "mix" else 0)
    return made.eval().requires_grad_(False)


def interval(values: np.ndarray, seed: int = 0, draws_: int = 2000) -> tuple[float, float]:
    """values (cases, pictures): the middle 95 % of means over cases drawn with replacement."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(len(values), size=(draws_, len(values)))].mean((1, 2))
    return tuple(np.quantile(means, (0.025, 0.975)))


Results = Mapping[str, np.ndarray]  # by rule: (cases, pictures, 3) of `judged`


def table(title: str, results: Results) -> list[str]:
    """Lines of markdown: shares, and how much less often than by gates both were there."""
    both = {name: found[..., 0] * found[..., 1] for name, found in results.items()}
    lines = [f"| {title} | style | object | both | 95 % | gates minus this | all that was asked |", "|---" * 7 + "|"]
    for name, found in results.items():
        low, high = interval(both[name])
        less = ""
        if "gates" in both and name != "gates":
            off = both["gates"] - both[name]
            less = "{:+.0f} ({:+.0f} to {:+.0f})".format(100 * off.mean(), *(100 * x for x in interval(off)))
        lines.append(f"| {name} | {found[..., 0].mean():.0%} | {found[..., 1].mean():.0%} | {both[name].mean():.0%} | "
                     f"{low:.0%}-{high:.0%} | {less} | {found[..., 2].mean():.0%} |")
    return lines


def trial(studio: Studio, some: Sequence[Case], way: str) -> np.ndarray:
    """(cases, pictures, 3) of `judged`."""
    return np.array([judged(studio.pictures(case, way), case) for case in some], dtype=float)
