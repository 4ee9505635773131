"""The demo world: every weight that ships, trained from nothing, stage by stage.

Autoencoder -> text/vision pair -> flow with T5 -> guidance distilled into the flow. Later stages read what earlier ones
wrote to the weights folder; `python train.py demo` runs them all.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from flux import checkpoint, cli, conditioning, draws, flow, latents, pictures, weights
from flux.autoencoder import AutoEncoder
from flux.clip import ClipText
from flux.config import DEMO
from flux.demo import referee
from flux.demo import scene as world
from flux.model import Flux
from flux.settings import Training
from flux.siglip import SiglipVision
from flux.t5 import T5Encoder
from flux.tokenizers import ClipTokenizer, T5Tokenizer, train_clip_bpe, train_t5_unigram

WEIGHTS = Path(__file__).parents[1] / "demo" / "weights"


def to_image(pixels: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


# --- autoencoder ---

@dataclass(frozen=True)
class TrainAutoencoder(Training):
    """The autoencoder, on scenes of every style: L1 on pixels and their edges, with latents kept smooth."""

    steps: int = 16_000
    lr: float = 2e-3
    batch: int = 8
    warmup: int = 50
    schedule: Literal["constant", "cosine"] = "cosine"
    ema: float = 0.995
    styled: float = 0.15        # share of scenes in a style
    kl: float = 3e-4            # weight of the posterior's divergence from N(0, 1), per latent number
    crops: float = 0.95         # share of the steps that see 64 x 64 pixels: four times cheaper, and as instructive
    noise: float = 0.04         # added to the latents, in their deviations: a sampler never hits them exactly
    coarse: float = 0.1         # share of batches decoded from halved latents, which must give the halved picture

    def task(self):
        return AutoencoderTask(self)


class AutoencoderTask:
    """Smooth latents are what a small flow model learns fast: noise (KL) and scale equivariance (arXiv 2502.09509)."""

    def __init__(self, settings: TrainAutoencoder):
        self.settings = settings
        torch.manual_seed(draws.seed_of(settings.seed, "autoencoder"))
        self.model = AutoEncoder(DEMO.autoencoder).to(memory_format=torch.channels_last)
        for layer in self.model.modules():
            if isinstance(layer, nn.Conv2d):  # unit gain: torch's default fades a picture away over this depth
                nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)
        for name, layer in self.model.named_modules():
            if name.endswith(("conv2", "proj_out")):  # residual branches begin small: the picture passes at once
                layer.weight.data *= 0.1
        self.model.encoder.conv_out.bias.data[DEMO.autoencoder.z_channels:] = -5.0  # begin with little posterior noise

    def trainable(self) -> nn.Module:
        return self.model

    def scenes(self, *key, count: int, held_out: bool = False) -> tuple[Tensor, list[world.Scene]]:
        """Some have new shapes or a style: the base model never sees those, but the autoencoder carries the LoRAs too."""
        rng = draws.rng(self.settings.seed, *key)
        scenes = []
        for _ in range(count):
            shapes = world.SHAPES + world.NEW_SHAPES if rng.random() < 0.3 else world.SHAPES
            style = str(rng.choice(world.STYLES)) if rng.random() < self.settings.styled else ""
            scenes.append(world.sample_scene(rng, held_out, shapes=shapes, style=style))
        return to_image(np.stack([world.render(scene)[0] for scene in scenes])), scenes

    def batch(self, step: int, micro: int):
        image, scenes = self.scenes("pixels", step, micro, count=self.settings.batch)
        if step < self.settings.crops * self.settings.steps:
            rng = draws.rng(self.settings.seed, "crop", step, micro)
            image = torch.stack([around(picture, scene.things[rng.integers(len(scene.things))], rng)
                                 for picture, scene in zip(image, scenes, strict=True)])
        coarse = draws.rng(self.settings.seed, "coarse", step, micro).random() < self.settings.coarse
        generator = draws.generator(self.settings.seed, "posterior", step, micro)
        return image.to(memory_format=torch.channels_last), coarse, generator

    def loss(self, batch) -> Tensor:
        image, coarse, generator = batch
        mean, log_variance = self.model.moments(image)
        log_variance = log_variance.clamp(-12, 4)
        z = mean + torch.exp(0.5 * log_variance) * torch.randn(mean.shape, generator=generator)
        z = z + self.settings.noise * mean.detach().std() * torch.randn(mean.shape, generator=generator)
        if coarse:
            z, image = F.avg_pool2d(z, 2), F.avg_pool2d(image, 2)
        out = self.model.decoder(z)
        difference = out - image
        edges = difference.diff(dim=2).abs().mean() + difference.diff(dim=3).abs().mean()
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return difference.abs().mean() + edges + self.settings.kl * divergence

    def preview(self) -> Image.Image:
        image, _ = self.scenes("preview", count=16)
        mean, _ = self.model.moments(image)
        out = self.model.decoder(mean)
        error = (out.clamp(-1, 1) - image).square().mean().item()
        captions = [f"PSNR {10 * np.log10(4 / error):.1f} dB"] + [""] * 31
        return pictures.contact_sheet(pictures.to_pil(image) + pictures.to_pil(out), 8, captions)

    @torch.inference_mode()
    def save(self, folder: Path) -> None:
        """Fold the latents' size into the weights: unit variance under the config's scale 1 and shift 0.

        One factor for all channels: the quiet ones stay quiet, and the flow need not learn their noise.
        """
        means = [self.model.moments(self.scenes("size", i, count=32)[0])[0] for i in range(16)]
        size = torch.cat(means).square().mean().sqrt()
        z = DEMO.autoencoder.z_channels
        out = self.model.encoder.conv_out
        out.weight[:z] /= size
        out.bias[:z] /= size
        out.bias[z:] -= 2 * size.log()  # the log-variance
        self.model.decoder.conv_in.weight *= size
        checkpoint.save(WEIGHTS / "ae.safetensors", self.model.state_dict(),
                        {"config": str(self.settings), "latents": f"divided by {size.item():.4f}, folded in"})


def around(picture: Tensor, thing: world.Thing, rng: np.random.Generator, edge: int = 64) -> Tensor:
    """A crop (3, edge, edge) with an object near its middle: edges and corners are what there is to learn."""
    height, width = picture.shape[1:]
    y, x = (int(np.clip(at * size - edge / 2 + rng.integers(-edge // 4, edge // 4 + 1), 0, size - edge))
            for at, size in ((thing.y, height), (thing.x, width)))
    return picture[:, y:y + edge, x:x + edge]


# --- text/vision pair ---

@dataclass(frozen=True)
class TrainPair(Training):
    """CLIP's text tower and a SigLIP vision tower, trained to tell which caption belongs to which picture."""

    steps: int = 600
    lr: float = 1e-3
    batch: int = 64
    schedule: Literal["constant", "cosine"] = "cosine"
    ema: float = 0.99

    def task(self):
        return PairTask(self)


class PairTask:
    """Symmetric cross-entropy over the batch (arXiv 2103.00020, figure 3). Both towers end in the same width, so that
    neither needs a projection and the row that FLUX takes is itself in the shared space."""

    def __init__(self, settings: TrainPair):
        self.settings = settings
        torch.manual_seed(draws.seed_of(settings.seed, "pair"))
        train_tokenizers()
        self.tokenizer = ClipTokenizer(WEIGHTS / "tokenizer")
        self.model = nn.ModuleDict({"text": ClipText(DEMO.clip), "vision": SiglipVision(DEMO.siglip)})
        self.model.register_parameter("logit_scale", nn.Parameter(torch.tensor(np.log(1 / 0.07), dtype=torch.float32)))

    def trainable(self) -> nn.Module:
        return self.model

    def pairs(self, rng: np.random.Generator, held_out: bool = False):
        scenes = [world.sample_scene(rng, held_out) for _ in range(self.settings.batch)]
        captions = [world.sample_caption(scene, rng).text for scene in scenes]
        image = to_image(np.stack([world.render(scene)[0] for scene in scenes]))
        return image, self.tokenizer(captions, conditioning.CLIP_LENGTH)

    def batch(self, step: int, micro: int):
        return self.pairs(draws.rng(self.settings.seed, "pairs", step, micro))

    def held_out(self) -> list:
        return [self.pairs(draws.rng("held out"), held_out=True)]

    def logits(self, batch) -> Tensor:
        image, ids = batch
        seen = self.model["vision"].pool(self.model["vision"](image))
        _, said = self.model["text"](ids)
        return self.model.logit_scale.exp().clamp(max=100) * F.normalize(seen, dim=-1) @ F.normalize(said, dim=-1).T

    def loss(self, batch) -> Tensor:
        logits = self.logits(batch)
        own = torch.arange(len(logits))
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2

    def preview(self) -> None:
        logits = self.logits(self.pairs(draws.rng(self.settings.seed, "preview"), held_out=True))
        right = (logits.argmax(1) == torch.arange(len(logits))).float().mean()
        print(f"held-out pictures that find their caption among {len(logits)}: {100 * right:.0f} %", flush=True)

    def save(self, folder: Path) -> None:
        about = {"config": str(self.settings)}
        checkpoint.save(WEIGHTS / "clip.safetensors", half(self.model["text"].state_dict()), about)
        checkpoint.save(WEIGHTS / "siglip.safetensors", half(self.model["vision"].state_dict()), about)


def train_tokenizers() -> None:
    """Both vocabularies from the caption grammar, with the words for styles and new shapes that LoRAs will teach."""
    rng = draws.rng("tokenizers")
    corpus = []
    for i in range(20_000):
        shapes = world.SHAPES + world.NEW_SHAPES if i % 4 == 0 else world.SHAPES
        style = str(rng.choice(world.STYLES)) if i % 4 == 1 else ""
        corpus.append(world.sample_caption(world.sample_scene(rng, shapes=shapes, style=style), rng).text)
    train_clip_bpe(corpus, DEMO.clip.vocab_size, WEIGHTS / "tokenizer")
    train_t5_unigram(corpus, DEMO.t5.vocab_size, WEIGHTS / "tokenizer_2" / "spiece.model")


def half(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As shipped: bfloat16."""
    return {name: tensor.bfloat16() for name, tensor in state.items()}


# --- flow ---

@dataclass(frozen=True)
class TrainFlow(Training):
    """The transformer and its T5 encoder together, on latents of scenes that get a fresh caption at every visit."""

    steps: int = 12_500
    optimiser: Literal["adamw", "muon"] = "muon"
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
        self.single, self.double = (np.flatnonzero(things == count) for count in (1, 2))
        self.there = torch.stack([what_is_where(scene) for scene in self.scenes])
        self.hidden: Tensor | None = None  # (B, 64, D), image tokens half-way through the transformer
        self.model["flux"].single_blocks[1].register_forward_hook(self.keep_hidden)
        self.tokens = self.packed_latents(settings.out / "demo-flow" / "latents.safetensors")
        self.mu = flow.mu(self.tokens.shape[1])

    def trainable(self) -> nn.Module:
        return self.model

    @torch.inference_mode()
    def packed_latents(self, cache: Path) -> Tensor:
        """(scenes, 64, 64) tokens of every training scene, made once for this autoencoder and these scenes."""
        maker = checkpoint.fingerprint(WEIGHTS / "ae.safetensors") + f" {self.settings.seed} {self.settings.scenes}"
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
        captions = [world.sample_caption(self.scenes[i], rng, vague=rng.random() < self.settings.vague).text for i in rows]
        captions = [caption if rng.random() >= self.settings.drop else "" for caption in captions]
        generator = draws.generator(self.settings.seed, "noise", step, micro)
        x0 = self.tokens[torch.from_numpy(rows)]
        eps = torch.randn(x0.shape, generator=generator)
        return x0, eps, flow.draw_sampled_t(len(x0), generator, self.mu), captions, self.there[rows].long()

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
        """The flow's, and a second that only the object's tokens have: which shape and colour lies under each.

        Drawing rewards reading late, because words for shapes explain so little of a picture's squared error; an aligned
        half-way layer learns them at once (as arXiv 2410.06940, with the renderer's truth for the encoder's features).
        """
        x0, eps, t, captions, there = batch
        drawing = flow.loss(conditioning.velocity(self.model["flux"], self.condition(captions)), x0, eps, t)
        covered = there[..., 0] >= 0
        shape, colour = self.model["reader"](self.hidden[covered]).float().split((len(world.SHAPES), len(world.COLOURS)), -1)
        said = there[covered]
        return drawing + self.settings.reading * (F.cross_entropy(shape, said[:, 0]) + F.cross_entropy(colour, said[:, 1]))

    def keep_hidden(self, block, inputs, out: Tensor) -> None:
        self.hidden = out[:, -self.tokens.shape[1]:]

    def preview(self) -> Image.Image:
        return preview(self.model["flux"], self.autoencoder, self.condition, 1.0)

    def save(self, folder: Path) -> None:
        """The transformer twice: the guidance stage, whose student replaces the shipped one, needs its teacher again."""
        about = {"config": str(self.settings)}
        for place in (folder, WEIGHTS):
            checkpoint.save(place / "flux.safetensors", half(self.model["flux"].state_dict()), about)
        checkpoint.save(WEIGHTS / "t5.safetensors", half(self.model["t5"].state_dict()), about)


def what_is_where(scene: world.Scene) -> Tensor:
    """(64, 2) indices of the shape and the colour under a token, -1 where no object covers a twelfth of it; int8."""
    edge = DEMO.width // 16
    covered = world.render_masks(scene).reshape(-1, edge, 16, edge, 16).mean((2, 4)).reshape(-1, edge * edge)
    there = np.full((edge * edge, 2), -1, np.int8)
    for thing, share in zip(scene.things, covered, strict=True):
        there[share > 1 / 12] = world.SHAPES.index(thing.shape), list(world.COLOURS).index(thing.colour)
    return torch.from_numpy(there)


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
                                   out=settings.out, warm=True))
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
        checkpoint.save(WEIGHTS / "flux.safetensors", half(self.model["flux"].state_dict()), {"config": self.about})


# --- the measured table ---

@dataclass(frozen=True)
class Evaluate:
    """What the shipped demo can do, judged by the referee on captions and seeds that training never saw."""

    count: int = 100            # pictures with one object, and as many with two
    guidance: float = DEMO.guidance  # distilled guidance
    steps: int = DEMO.steps     # Euler steps
    seed: int = 1               # of captions and noise
    out: Path = Path("out")     # folder for the contact sheet

    def run(self) -> None:
        rows = [("", "right", "shape", "colours", "place")]
        shown = []
        for things in (1, 2):
            captions, pils = self.pictures(things)
            verdicts = [referee.judge(np.asarray(pil), caption.asked) for pil, caption in zip(pils, captions, strict=True)]
            rows.append((f"{'one object' if things == 1 else 'two objects'}, {self.count} captions", *summary(verdicts)))
            marks = [caption.text if verdict.right else f"[wrong] {caption.text}"
                     for caption, verdict in zip(captions, verdicts, strict=True)]
            shown += list(zip(pils, marks, strict=True))[:24]
        image, _ = AutoencoderTask(TrainAutoencoder(styled=0.0)).scenes("evaluate", count=100, held_out=True)
        rows.append(("autoencoder round trip, 100 scenes", f"{self.psnr(image):.1f} dB", "", "", ""))
        text = "\n".join(f"| {' | '.join(str(cell) for cell in row)} |" for row in [rows[0], ("---",) * 5, *rows[1:]])
        print(text)
        files = {file.name: checkpoint.fingerprint(file) for file in sorted(WEIGHTS.glob("*.safetensors"))}
        table = {"command": "python train.py demo evaluate", "settings": cli.as_dict(self), "rows": rows, "weights": files}
        (WEIGHTS / "table.json").write_text(json.dumps(table, indent=1) + "\n")
        sheet = pictures.contact_sheet([pil for pil, _ in shown], 8, [mark for _, mark in shown])
        self.out.mkdir(parents=True, exist_ok=True)
        pictures.write_png(self.out / "evaluate.png", sheet, None)
        print(f"the table is in {WEIGHTS / 'table.json'}, the first pictures are in {self.out / 'evaluate.png'}")

    def pictures(self, things: int) -> tuple[list[world.Caption], list[Image.Image]]:
        """Drawn by the command that a user types, from the shipped files."""
        rng = draws.rng("evaluate", self.seed, things)
        captions = [world.sample_caption(world.sample_scene(rng, held_out=True, things=things), rng)
                    for _ in range(self.count)]
        text_to_image = cli.recipes()["t2i"]
        command = cli.build(text_to_image, cli.describe(text_to_image).sample, {
            "prompt": tuple(caption.text for caption in captions), "steps": self.steps, "guidance": self.guidance,
            "seed": draws.seed_of("evaluate", self.seed) % 2**31, "batch": 20})
        return captions, [pil for pil, _ in command.images()]

    @torch.inference_mode()
    def psnr(self, image: Tensor) -> float:
        """Of the autoencoder's round trip, in dB on [0, 1]."""
        autoencoder = weights.load_autoencoder(weights.find(DEMO), DEMO.autoencoder, torch.float32)
        error = (autoencoder.decode(autoencoder.encode(image)).clamp(-1, 1) - image).square().mean((1, 2, 3))
        return (10 * torch.log10(4 / error)).mean().item()


def summary(verdicts: list[referee.Verdict]) -> tuple[str, ...]:
    """Shares of pictures in which all that was asked is right, then each kind of attribute, where it was asked."""
    def share(marks):
        return f"{100 * sum(marks) / max(len(marks), 1):.0f} %"

    def kind(*names):
        return share([mark for verdict in verdicts for name, mark in verdict.held.items() if name.split()[0] in names])
    right = share([verdict.right for verdict in verdicts])
    return right, kind("shape"), kind("colour", "background"), kind("place", "relation")


@dataclass(frozen=True)
class TrainAll:
    """Every shipped weight from nothing, stage by stage, then the measured table; goes on where it was stopped."""

    seed: int = 0               # of every draw; the same seed gives the same weights on one machine
    out: Path = Path("runs")    # folder that gets one run folder per stage
    threads: int | None = None  # CPU threads; default: as many as PyTorch chooses

    def stages(self):
        yield from ((stage, TRAIN[stage](seed=self.seed, out=self.out, threads=self.threads))
                    for stage in ("autoencoder", "pair", "flow", "guidance"))
        yield "evaluate", Evaluate()


TRAIN = {"": TrainAll, "autoencoder": TrainAutoencoder, "pair": TrainPair, "flow": TrainFlow, "guidance": TrainGuidance,
         "evaluate": Evaluate}
