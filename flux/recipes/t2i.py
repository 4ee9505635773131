"""Text to image: a prompt becomes a picture; so do a prompt and other pictures, by every member of the FLUX.1 family.

The whole road of the project in one file: text encoders -> noise -> Euler steps along the velocity -> autoencoder.
Pictures that a user gives come in by `flux/inputs.py`. Training takes the same road with `flow.loss` in place of Euler.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from flux import checkpoint, conditioning, data, device, draws, fill, flow, inputs, latents, parallel, pictures, weights
from flux.cache import Cache, content, source
from flux.config import preset
from flux.demo import scene
from flux.errors import UserError
from flux.settings import Conditioned, Training


@dataclass(frozen=True)
class TextToImage(Conditioned):
    """Pictures for prompts, and for the pictures given with them."""

    prompt: tuple[str, ...] = ()  # what to draw; several make several pictures; none draws the demo's contact sheet
    prompts: Path | None = None  # file with one prompt a line; # starts a comment
    batch: int = 4  # pictures that go through the transformer together; changes speed and memory, not the pictures
    POSITIONAL = "prompt"

    def images(self) -> Iterator[tuple[Image.Image, dict]]:
        """(picture, metadata) one by one. Picture i has seed + i, and is the same alone or among others."""
        model = preset(self.model)
        given = inputs.read(self, model)
        width, height = given.size
        latents.check_size(width, height)
        steps, guidance = self.steps or model.steps, model.guidance if self.guidance is None else self.guidance
        prompts = [prompt for prompt in self.all_prompts() for _ in range(self.num)]
        jobs = [(prompt, self.seed + i) for i, prompt in enumerate(prompts)]
        place, dtype = device.choose(self.device, self.dtype)
        found = weights.find(model, self.weights, {"flux": self.flux, "ae": self.ae, "clip": self.clip, "t5": self.t5,
                                                   "siglip": self.siglip, "redux": self.redux_weights})
        parts = ("flux", "ae", "clip", "t5", "tokenizer", "tokenizer_2", *(("siglip", "redux") if self.redux else ()))
        weights.require(found, *parts)

        files = {part: f"{found[part].path.name} {checkpoint.fingerprint(found[part].path)}" for part in parts
                 if found[part].path.is_file()} | given.files

        with torch.inference_mode():
            encoders = conditioning.TextEncoders(found, model, dtype, place)
            words = [*prompts, self.negative or ""] if self.guided else prompts
            features = {prompt: encoders([prompt]) for prompt in dict.fromkeys(words)}
            del encoders  # the memory of T5 is the transformer's now
            seen = inputs.image_tokens(given, found, model, dtype, place)
            autoencoder = weights.load_autoencoder(found, model.autoencoder, dtype, place).eval()
            fixed = inputs.encode(given, autoencoder, model, seen)
            transformer = weights.load_flux(found, model.flux, dtype, place).eval()
            times = flow.schedule(steps, (width // 16) * (height // 16), model.shift)
            left = flow.remaining(times, given.strength)
            control = inputs.controlled(self, given, autoencoder, model, times, dtype, place)

            def under(prompts: list[str]) -> flow.Velocity:
                txt, vec = (torch.cat(part) for part in zip(*(features[prompt] for prompt in prompts), strict=True))
                cond = fixed.onto(conditioning.condition(txt, vec, width, height, guidance))
                return conditioning.velocity(transformer, cond, control and control(cond))

            with tqdm(total=len(jobs) * (len(left) - 1), desc="sampling", unit="step", disable=None) as bar:
                for start in range(0, len(jobs), self.batch):
                    some = jobs[start:start + self.batch]
                    noise = [latents.noise(1, height, width, torch.Generator().manual_seed(seed)) for _, seed in some]
                    img = fixed.begin(latents.pack(torch.cat(noise).to(place)), left[0]).to(dtype)
                    for state in flow.euler_steps(self.velocity(under, [prompt for prompt, _ in some], times), img, left):
                        img = state
                        bar.update(len(some))
                    decoded = autoencoder.decode(latents.unpack(img, height, width))
                    for pil, (prompt, seed) in zip(pictures.to_pil(decoded), some, strict=True):
                        if self.keep:
                            pil = fill.keep(pil, given.image, given.mask)
                        alone = replace(self, prompt=(prompt,), prompts=None, num=1, seed=seed)
                        yield pil, {"prompt": prompt, "seed": seed, "steps": steps, "guidance": guidance,
                                    "model": self.model, "config": alone, "files": files}

    @property
    def guided(self) -> bool:
        return self.cfg_scale not in (None, 1)

    def velocity(self, under: Callable[[list[str]], flow.Velocity], prompts: list[str], times: list[float]) -> flow.Velocity:
        """Under the prompts; with true guidance also away from the negative one, in its share of the steps."""
        if not self.guided:
            return under(prompts)
        both = under(prompts + [self.negative or ""] * len(prompts))
        return conditioning.guided(both, under(prompts), self.cfg_scale, flow.span(times, self.cfg_start, self.cfg_end))

    def all_prompts(self) -> list[str]:
        """Those of the command, then those of the file; when there are none, no words for pictures, or the demo's own."""
        prompts = list(self.prompt)
        if self.prompts:
            if not self.prompts.is_file():
                raise UserError(f"--prompts {self.prompts}: no such file; expected one prompt a line; check the name")
            lines = (line.split("#")[0].strip() for line in self.prompts.read_text(encoding="utf-8").splitlines())
            prompts += [line for line in lines if line]
        if not prompts and (self.image or self.reference or self.control or self.control_from or self.redux):
            return [""]
        if not prompts and self.model != "demo":
            raise UserError(f"no prompt for {self.model}; expected words to draw; give them as in "
                            f'python sample.py --model {self.model} "a red circle"')
        return prompts or demo_prompts()


def demo_prompts(count: int = 16, seed: int = 7) -> list[str]:
    """Captions of scenes that training never saw."""
    rng = np.random.default_rng(seed)
    return [scene.sample_caption(scene.sample_scene(rng, held_out=True), rng).text for _ in range(count)]


# --- training ---

@dataclass(frozen=True)
class FineTune(Training):
    """The whole transformer, on a folder of captioned pictures; text encoders and autoencoder stay as they are."""

    model: str = "demo"  # a preset of flux/config.py: demo, dev, krea, schnell
    weights: Path | None = None  # folder with the weights; without it FLUX_WEIGHTS, and for demo the shipped ones
    edge: int | None = None  # pixels: pictures go into buckets of about edge x edge; default: the model's own size
    guidance: float = 1.0  # distilled guidance the transformer is told; 1 is the plain conditional velocity
    drop: float = 0.1  # share of captions left empty
    held_out: float = 0.05  # share of the pictures that training never sees, for the validation loss
    cache: bool = True  # make latents and text features once, into the folder cache/ of --out, which runs share
    lr: float = 1e-5  # learning rate of AdamW after warmup

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.held_out < 1:
            raise UserError(f"--held-out {self.held_out}: expected a share from 0 to below 1, such as 0.05")

    def task(self):
        return FineTuneTask(self)


class FineTuneTask:
    """Flow matching with the time distribution that sampling at this size uses (arXiv 2403.03206, section 5.3.2)."""

    def __init__(self, settings: FineTune):
        if not settings.data:
            raise UserError("--data is missing, expected a folder of pictures with captions; add --data FOLDER")
        self.settings, self.preset = settings, preset(settings.model)
        if self.preset.flux.in_channels != self.preset.flux.out_channels:
            raise UserError(f"--model {settings.model} draws from a prompt and a {self.preset.takes} picture, expected a "
                            "model that needs captions alone; take --model dev or demo")
        self.place, _ = device.choose(settings.device)
        items = data.load(settings.data, settings.edge or self.preset.width)
        self.items, self.unseen = data.hold_out(items, settings.held_out)
        self.found = weights.find(self.preset, settings.weights)
        weights.require(self.found, "flux", "ae", "clip", "t5", "tokenizer", "tokenizer_2")
        self.frozen = torch.float32 if self.place.type == "cpu" else torch.bfloat16
        self.encoders: conditioning.TextEncoders | None = None  # until a caption comes that is not in the cache
        self.autoencoder = weights.load_autoencoder(self.found, self.preset.autoencoder, torch.float32, self.place)
        self.cache = Cache(settings.out / "cache" if settings.cache else None)
        made_by = {part: source(self.found[part].path) for part in ("ae", "clip", "t5", "tokenizer", "tokenizer_2")}
        self.latents_from = "latents", self.place.type, made_by.pop("ae")
        self.features_from = "features", self.place.type, str(self.frozen), self.preset.t5_length, *made_by.values()
        self.fill_cache()
        self.model = weights.load_flux(self.found, self.preset.flux, torch.float32, self.place).requires_grad_(True)

    def fill_cache(self) -> None:
        """All that a run will need, each process its share of it; then the encoders' memory is the transformer's."""
        if not self.settings.cache:
            return
        items, team = [*self.items, *self.unseen], parallel.join()
        captions = dict.fromkeys(["", *(item.caption for item in items)])
        todo = [partial(self.latent, item) for item in items if not self.cache.has(self.latent_key(item))]
        todo += [partial(self.features, [caption]) for caption in captions if not self.cache.has(self.features_key(caption))]
        with team.together():
            for make in tqdm(todo[team.rank::team.size], desc="latents and features", disable=None):
                if self.cache.folder:  # until nothing more can be kept
                    make()
        self.encoders = None

    def trainable(self) -> nn.Module:
        return self.model

    def batch(self, step: int, micro: int):
        items = self.draw(step, micro)
        rng = draws.rng(self.settings.seed, "caption", step, micro)
        captions = [item.caption if rng.random() >= self.settings.drop else "" for item in items]
        generator = draws.generator(self.settings.seed, "noise", step, micro)
        times = flow.draw_t(len(items), generator, mean=flow.mu(math.prod(items[0].size) // 256))
        return self.noised(items, captions, times, generator)

    def held_out(self) -> list:
        """A batch for each picture that was kept apart, at four times from almost clear to almost noise."""
        times = torch.tensor([0.125, 0.375, 0.625, 0.875])
        return [self.noised([item] * 4, [item.caption] * 4, times, draws.generator(self.settings.seed, "held out", i))
                for i, item in enumerate(self.unseen)]

    def noised(self, items: list[data.Item], captions: list[str], times: Tensor, generator: torch.Generator):
        """What `loss` takes: the pictures of one bucket, noise from the generator."""
        x0 = latents.pack(torch.cat([self.latent(item) for item in items])).to(self.place)
        eps = torch.randn(x0.shape, generator=generator).to(self.place)
        txt, vec = self.features(captions)
        cond = conditioning.condition(txt, vec, *items[0].size, self.settings.guidance)
        return x0, eps, times.to(self.place), cond

    @torch.no_grad()
    def latent(self, item: data.Item) -> Tensor:
        """(1, 16, h, w), each picture alone, so that it does not depend on its neighbours in a batch."""
        return self.cache.get(self.latent_key(item), lambda: {
            "latent": self.autoencoder.encode(data.images([item]).to(self.place)).cpu()})["latent"]

    def latent_key(self, item: data.Item) -> tuple:
        return *self.latents_from, item.size, content(item.path)

    def features(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """txt (B, L_txt, 4096), vec (B, 768), float32, each caption alone."""
        rows = [self.cache.get(self.features_key(caption), partial(self.encode, caption)) for caption in captions]
        return tuple(torch.cat([row[name] for row in rows]).to(self.place).float() for name in ("txt", "vec"))

    def features_key(self, caption: str) -> tuple:
        return *self.features_from, caption

    @torch.no_grad()
    def encode(self, caption: str) -> dict[str, Tensor]:
        if self.encoders is None:
            self.encoders = conditioning.TextEncoders(self.found, self.preset, self.frozen, self.place)
        txt, vec = self.encoders([caption])
        return {"txt": txt.cpu(), "vec": vec.cpu()}

    def draw(self, step: int, micro: int) -> list[data.Item]:
        index = step * self.settings.accumulate + micro
        return next(data.batches(self.items, self.settings.batch, self.settings.seed, index))

    def names(self, step: int, micro: int) -> list[str]:
        return [str(item.path) for item in self.draw(step, micro)]

    def loss(self, batch) -> Tensor:
        x0, eps, t, cond = batch
        return flow.loss(conditioning.velocity(self.model, cond), x0, eps, t)

    def preview(self) -> Image.Image:
        """The first four captions, from fixed seeds."""
        captions = [item.caption for item in self.items[:4]]
        width, height = self.preset.width, self.preset.height
        txt, vec = self.features(captions)
        noise = [latents.noise(1, height, width, draws.generator("preview", i)) for i in range(len(captions))]
        img = latents.pack(torch.cat(noise).to(self.place))
        cond = conditioning.condition(txt, vec, width, height, self.preset.guidance)
        times = flow.schedule(self.preset.steps, img.shape[1], self.preset.shift)
        img = flow.euler(conditioning.velocity(self.model, cond), img, times)
        pils = pictures.to_pil(self.autoencoder.decode(latents.unpack(img, height, width)))
        return pictures.contact_sheet(pils, 2, captions)

    def save(self, folder: Path) -> None:
        checkpoint.save(folder / "final.safetensors", self.model.state_dict(), {"config": str(self.settings)})
        if parallel.join().leads:
            print(f"draw with it: python sample.py --model {self.settings.model} --flux {folder / 'final.safetensors'} ...")


SAMPLE = TextToImage
TRAIN = {"": FineTune}
