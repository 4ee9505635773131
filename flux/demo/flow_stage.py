"""Third stage of the demo world: the transformer with its T5 encoder; and the fourth, guidance distilled into it."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from flux import checkpoint, conditioning, draws, flow, latents, pictures, weights
from flux.autoencoder import AutoEncoder
from flux.config import DEMO
from flux.demo import referee
from flux.demo import scene as world
from flux.demo.autoencoder_stage import to_image
from flux.demo.pair_stage import half
from flux.model import Flux
from flux.settings import Training
from flux.t5 import T5Encoder
from flux.tokenizers import ClipTokenizer, T5Tokenizer


@dataclass(frozen=True)
class TrainFlow(Training):
    """The transformer and its T5 encoder together, on latents of scenes that get a fresh caption at every visit."""

    steps: int = 12_500
    optimiser: str = "muon"
    lr: float = 1e-3
    batch: int = 24
    warmup: int = 100
    schedule: Literal["constant", "cosine"] = "cosine"
    ema: float = 0.999
    dtype: Literal["fp32", "bf16"] = "bf16"
    reading: float = 0.1        # weight of telling shape and colour under each token: teaches to read before drawing
    scenes: int = 24_000        # pictures whose latents are made once; their captions vary at every visit
    drop: float = 0.1           # share of captions left empty: what guidance compares with
    singles: float = 0.65       # share of scenes with one object, whose place a caption may leave open
    vague: float = 0.5          # share of captions that seldom say it: to settle on one place is what is hard to learn
    settle: bool = True         # pair scenes with noise that tells what their caption leaves open
    warm: bool = False          # begin with the shipped transformer and T5 instead of from nothing

    def task(self):
        return FlowTask(self)


class FlowTask:
    def __init__(self, settings: TrainFlow):
        self.settings = settings
        found = weights.find(DEMO)
        self.clip_tokenizer = ClipTokenizer(found["tokenizer"].path)
        self.t5_tokenizer = T5Tokenizer(found["tokenizer_2"].path)
        self.clip = weights.load_clip(found, DEMO.clip, torch.float32)
        self.autoencoder = weights.load_autoencoder(found, DEMO.autoencoder, torch.float32)
        torch.manual_seed(draws.seed_of(settings.seed, "flow"))
        width, words = DEMO.flux.hidden_size, len(world.SHAPES) + len(world.COLOURS)
        reader = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, words))
        self.model = nn.ModuleDict({"flux": Flux(DEMO.flux), "t5": T5Encoder(DEMO.t5), "reader": reader})
        begin_as_identity(self.model["flux"])
        if settings.warm:
            self.model["flux"].load_state_dict(weights.load_flux(found, DEMO.flux, torch.float32).state_dict())
            self.model["t5"].load_state_dict(weights.load_t5(found, DEMO.t5, torch.float32).state_dict())
        self.scenes = [world.sample_scene(draws.rng(settings.seed, "scene", i)) for i in range(settings.scenes)]
        things = np.array([len(scene.things) for scene in self.scenes])
        both = np.arange(len(things))  # for a handful of scenes that are all of one kind
        self.single, self.double = (both[things == count] if (things == count).any() else both for count in (1, 2))
        self.there = torch.stack([what_is_where(scene) for scene in self.scenes]) if settings.reading else \
            torch.full((len(self.scenes), 64, 2), -1, dtype=torch.int8)  # nobody reads them
        self.hidden: Tensor | None = None  # (B, 64, D), image tokens half-way through the transformer
        self.model["flux"].single_blocks[1].register_forward_hook(self.keep_hidden)
        self.tokens = self.packed_latents(settings.out / "demo-flow" / "latents.safetensors")
        self.mu = flow.mu(self.tokens.shape[1])

    def trainable(self) -> nn.Module:
        return self.model

    @torch.inference_mode()
    def packed_latents(self, cache: Path) -> Tensor:
        """(scenes, 64, 64) tokens of every training scene, made once for this autoencoder and these scenes."""
        maker = checkpoint.fingerprint(weights.DEMO / "ae.safetensors") + f" {self.settings.seed} {self.settings.scenes}"
        if cache.exists():
            header = checkpoint.read_header(cache)
            if header.metadata.get("maker") == maker:
                return checkpoint.read(cache)["tokens"].clone()
        made = []
        for start in tqdm(range(0, len(self.scenes), 32), desc="latents", disable=None):
            image = to_image(np.stack([world.render(scene)[0] for scene in self.scenes[start:start + 32]]))
            made.append(latents.pack(self.autoencoder.encode(image)))
        tokens = torch.cat(made)
        cache.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.save(cache, {"tokens": tokens}, {"maker": maker})
        return tokens

    def condition(self, captions: list[str]) -> conditioning.Condition:
        """Trains T5, not CLIP. Guidance 1 is the plain conditional velocity; the next stage teaches the others."""
        txt = self.model["t5"](self.t5_tokenizer(captions, DEMO.t5_length))
        with torch.no_grad():
            _, vec = self.clip(self.clip_tokenizer(captions, conditioning.CLIP_LENGTH))
        return conditioning.condition(txt, vec, DEMO.width, DEMO.height, 1.0)

    def batch(self, step: int, micro: int):
        rows, rng = self.draw(step, micro)
        captions = [world.sample_caption(self.scenes[i], rng, vague=rng.random() < self.settings.vague) for i in rows]
        captions = [caption if rng.random() >= self.settings.drop else world.Caption("", None) for caption in captions]
        generator = draws.generator(self.settings.seed, "noise", step, micro)
        x0 = self.tokens[torch.from_numpy(rows)]
        eps = torch.randn(x0.shape, generator=generator)
        if self.settings.settle:
            eps = torch.stack([settle(*pair, self.scenes[i], caption.asked)
                               for *pair, i, caption in zip(eps, x0, rows, captions, strict=True)])
        t = flow.draw_sampled_t(len(x0), generator, self.mu)
        return x0, eps, t, [caption.text for caption in captions], self.there[rows].long()

    @torch.no_grad()
    def held_out(self) -> list:
        """Four batches of scenes with combinations that training never shows, at fixed times."""
        batches = []
        for i in range(4):
            rng, generator = draws.rng("held out", i), draws.generator("held out", i)
            scenes = [world.sample_scene(rng, held_out=True) for _ in range(24)]
            x0 = latents.pack(self.autoencoder.encode(to_image(np.stack([world.render(scene)[0] for scene in scenes]))))
            batches.append((x0, torch.randn(x0.shape, generator=generator), flow.draw_sampled_t(24, generator, self.mu),
                            [world.sample_caption(scene, rng).text for scene in scenes],
                            torch.stack([what_is_where(scene) for scene in scenes]).long()))
        return batches

    def draw(self, step: int, micro: int) -> tuple[np.ndarray, np.random.Generator]:
        """The scenes of a batch, and the generator for what else is drawn on its side."""
        rng = draws.rng(self.settings.seed, "flow", step, micro)
        single = rng.random(self.settings.batch) < self.settings.singles
        one, two = (rng.choice(rows, self.settings.batch) for rows in (self.single, self.double))
        return np.where(single, one, two), rng

    def names(self, step: int, micro: int) -> list[str]:
        return [f"scene {i} ({world.write_caption(self.scenes[i])})" for i in self.draw(step, micro)[0]]

    def loss(self, batch) -> Tensor:
        """The flow's, and a second at each token: which shape and colour lies under it, or none.

        Drawing rewards reading late, because words for shapes explain so little of a picture's squared error; an aligned
        half-way layer learns them at once (as arXiv 2410.06940, with the renderer's truth for the encoder's features).
        """
        x0, eps, t, captions, there = batch
        drawing = flow.loss(conditioning.velocity(self.model["flux"], self.condition(captions)), x0, eps, t)
        shape, colour = self.model["reader"](self.hidden).float().split((len(world.SHAPES), len(world.COLOURS)), -1)
        shape = torch.cat((shape, torch.zeros_like(shape[..., :1])), dim=-1)  # the last: no object
        covered = there[..., 0] >= 0
        shapes = torch.where(covered, there[..., 0], len(world.SHAPES))
        reading = F.cross_entropy(shape.transpose(1, 2), shapes) + F.cross_entropy(colour[covered], there[covered][:, 1])
        return drawing + self.settings.reading * reading

    def keep_hidden(self, block, inputs, out: Tensor) -> None:
        self.hidden = out[:, -self.tokens.shape[1]:]

    def preview(self) -> Image.Image:
        return preview(self.model["flux"], self.autoencoder, self.condition, 1.0)

    def save(self, folder: Path) -> None:
        """The transformer twice: the guidance stage, whose student replaces the shipped one, needs its teacher again."""
        about = {"config": str(self.settings)}
        for place in (folder, weights.DEMO):
            checkpoint.save(place / "flux.safetensors", half(self.model["flux"].state_dict()), about)
        checkpoint.save(weights.DEMO / "t5.safetensors", half(self.model["t5"].state_dict()), about)


def what_is_where(scene: world.Scene) -> Tensor:
    """(64, 2) indices of the shape and the colour under a token, -1 where no object covers a twelfth of it; int8."""
    edge = DEMO.width // 16
    covered = world.render_masks(scene).reshape(-1, edge, 16, edge, 16).mean((2, 4)).reshape(-1, edge * edge)
    there = np.full((edge * edge, 2), -1, np.int8)
    for thing, share in zip(scene.things, covered, strict=True):
        there[share > 1 / 12] = world.SHAPES.index(thing.shape), list(world.COLOURS).index(thing.colour)
    return torch.from_numpy(there)


def settle(noise: Tensor, x0: Tensor, scene: world.Scene, asked: world.Scene | None) -> Tensor:
    """Noise (64, 64) that tells the place and the size of a lone object where the caption leaves them open.

    Which noise a picture is paired with is free as long as each caption's noise stays Gaussian (arXiv 2302.00482, section
    3.2). Paired at random, the flow begins towards the mean of all places, and a small model comes to rest between two.
    Here the object comes where the noise looks most like it (its mean token less the background's), by an exchange of two
    patches; and its size is the third of the normal distribution in which the likeness around it lies. (Gaussian but for
    what little an object's look depends on its place, under a gradient.)
    """
    if len(scene.things) == 2:
        return noise
    thing, noise, edge = scene.things[0], noise.clone(), DEMO.width // 16
    grid, blocks, around = torch.arange(edge * edge).view(edge, edge), {}, {}
    for name, (x, y) in world.PLACES.items():  # the 2 x 2 tokens of a place, and 4 x 4
        row, column = round(y * edge) - 1, round(x * edge) - 1
        blocks[name] = grid[row:row + 2, column:column + 2].flatten()
        around[name] = grid[row - 1:row + 3, column - 1:column + 3].flatten()
    look = F.normalize(x0[blocks[thing.place]].mean(0) - x0[[0, edge - 1, -edge, -1]].mean(0), dim=0)  # against the corners
    if not (asked and asked.things[0].place):
        most = max(blocks, key=lambda name: (noise[blocks[name]] * look).sum())
        here, there = blocks[most], blocks[thing.place]
        noise[here], noise[there] = noise[there], noise[here]
    if not (asked and asked.things[0].size):
        ring = around[thing.place][~torch.isin(around[thing.place], torch.cat(list(blocks.values())))]
        z = (noise[ring] * look).sum() / len(ring) ** 0.5
        third = (list(world.SIZES).index(thing.size) + torch.special.ndtr(z)) / len(world.SIZES)
        noise[ring] += (torch.special.ndtri(third) - z) * look / len(ring) ** 0.5
    return noise


def begin_as_identity(model: Flux) -> None:
    """adaLN-zero (arXiv 2212.09748, section 3.2): every block begins as the identity, and the model as zero."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            if name.endswith((".lin", "adaLN_modulation.1", "final_layer.linear")):
                nn.init.zeros_(layer.weight)
            else:
                nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)


def preview(model: Flux, autoencoder: AutoEncoder, condition, guidance: float, count: int = 16) -> Image.Image:
    """Held-out captions, drawn in 20 steps from fixed seeds, and how many of 48 the referee finds right."""
    rng = draws.rng("preview")
    captions = [world.sample_caption(world.sample_scene(rng, held_out=True, things=1 + i % 2), rng) for i in range(48)]
    noise = torch.cat([latents.noise(1, DEMO.height, DEMO.width, draws.generator("preview", i)) for i in range(48)])
    cond = replace(condition([caption.text for caption in captions]), guidance=guidance)
    img = latents.pack(noise)
    img = flow.euler(conditioning.velocity(model, cond), img, flow.schedule(DEMO.steps, img.shape[1], DEMO.shift))
    pils = pictures.to_pil(autoencoder.decode(latents.unpack(img, DEMO.height, DEMO.width)))
    right = [referee.judge(np.asarray(pil), caption.asked).right for pil, caption in zip(pils, captions, strict=True)]
    print(f"guidance {guidance:g}: right {sum(right[0::2])} of 24 with one object, {sum(right[1::2])} of 24 with two",
          flush=True)
    return pictures.contact_sheet(pils[:count], 4, [caption.text for caption in captions[:count]])


# --- guidance ---

@dataclass(frozen=True)
class TrainGuidance(Training):
    """Classifier-free guidance distilled into the guidance embedding (arXiv 2210.03142, section 3.1), as in dev."""

    steps: int = 1600
    lr: float = 3e-4
    batch: int = 24
    schedule: Literal["constant", "cosine"] = "cosine"
    ema: float = 0.995
    dtype: Literal["fp32", "bf16"] = "bf16"
    scenes: int = 24_000        # as in the flow stage, whose latents are used
    strongest: float = 3.0      # guidance is drawn from 1 to this

    def task(self):
        return GuidanceTask(self)


class GuidanceTask(FlowTask):
    """One pass of the student learns what two passes of the flow stage's model give: v_empty + g (v - v_empty)."""

    def __init__(self, settings: TrainGuidance):
        super().__init__(TrainFlow(seed=settings.seed, scenes=settings.scenes, batch=settings.batch, drop=0.0,
                                   out=settings.out, warm=True, reading=0.0))
        self.strongest, self.about = settings.strongest, str(settings)
        drawn = settings.out / "demo-flow" / "flux.safetensors"  # without it the shipped one, which may be a student itself
        found = weights.find(DEMO, overrides={"flux": drawn} if drawn.exists() else None)
        self.teacher = weights.load_flux(found, DEMO.flux, torch.float32)
        self.model["flux"].load_state_dict(self.teacher.state_dict())
        self.model["t5"].requires_grad_(False)
        del self.model["reader"]

    def batch(self, step: int, micro: int):
        return *super().batch(step, micro), self.strengths(self.settings.batch, "guidance", step, micro)

    def held_out(self) -> list:
        return [(*batch, self.strengths(24, "held out guidance", i)) for i, batch in enumerate(super().held_out())]

    def strengths(self, count: int, *key: int | str) -> Tensor:
        return 1 + (self.strongest - 1) * torch.rand(count, generator=draws.generator(self.settings.seed, *key))

    def loss(self, batch) -> Tensor:
        x0, eps, t, captions, _, guidance = batch
        x = flow.interpolate(x0, eps, t)
        with torch.no_grad():
            cond, empty = self.condition(captions), self.condition([""] * len(captions))
            plain, free = (conditioning.velocity(self.teacher, c)(x, t) for c in (cond, empty))
        v = self.model["flux"](x, cond.img_ids, cond.txt, cond.txt_ids, cond.vec, t, guidance)
        return (v - free - guidance[:, None, None] * (plain - free)).square().mean((1, 2))

    def preview(self) -> Image.Image:
        return preview(self.model["flux"], self.autoencoder, self.condition, DEMO.guidance)

    def save(self, folder: Path) -> None:
        checkpoint.save(weights.DEMO / "flux.safetensors", half(self.model["flux"].state_dict()), {"config": self.about})
