"""Training on a folder of captioned pictures: latents and text features made once, batches by step, flow matching.

What is trained is not said here: a recipe takes `Captioned` and adds a model, `trainable` and `save`.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from flux import conditioning, data, device, draws, flow, latents, parallel, pictures, weights
from flux.cache import Cache, content, source
from flux.config import preset
from flux.errors import UserError
from flux.settings import FineTuning


class Captioned:
    """A task of train.py without what it trains: `model`, the transformer, is the recipe's to set.

    also: a data set beside --data, whose items the recipe draws itself, from `self.also`.
    """

    model: torch.nn.Module

    def __init__(self, settings: FineTuning, also: Path | None = None):
        if not settings.data:
            raise UserError("--data is missing, expected a folder of pictures with captions; add --data FOLDER")
        self.settings, self.preset = settings, preset(settings.model)
        self.check_model()
        self.place, _ = device.choose(settings.device)
        self.items, self.unseen = data.hold_out(self.load(settings.data), settings.held_out)
        self.also = self.load(also) if also else []
        self.found = weights.find(self.preset, settings.weights)
        weights.require(self.found, "flux", "ae", "clip", "t5", "tokenizer", "tokenizer_2")
        self.frozen = torch.float32 if self.place.type == "cpu" else torch.bfloat16
        self.encoders: conditioning.TextEncoders | None = None  # until a caption comes that is not in the cache
        self.autoencoder = weights.load_autoencoder(self.found, self.preset.autoencoder, torch.float32, self.place)
        self.cache = Cache(settings.out / "cache" if settings.cache else None)
        made_by = {part: source(self.found[part].path) for part in ("ae", "clip", "t5", "tokenizer", "tokenizer_2")}
        self.latents_from = "latents", self.place.type, made_by.pop("ae")
        self.features_from = "features", self.place.type, str(self.frozen), self.preset.t5_length, *made_by.values()
        self.fill_cache([*self.items, *self.unseen, *self.also])

    def check_model(self) -> None:
        if self.preset.flux.in_channels != self.preset.flux.out_channels:
            raise UserError(f"--model {self.settings.model} draws from a prompt and a {self.preset.takes} picture, expected "
                            "a model that needs captions alone; take --model dev or demo")

    def load(self, path: Path) -> list[data.Item]:
        return data.load(path, self.settings.edge or self.preset.width)

    def fill_cache(self, items: list[data.Item]) -> None:
        """All that a run will need, each process its share of it; then the encoders' memory is the transformer's."""
        if not self.settings.cache:
            return
        team = parallel.join()
        captions = dict.fromkeys(["", *(item.caption for item in items)])
        made = [entry for item in items for entry in self.entries(item)]
        todo = [partial(self.cache.get, *entry) for entry in made if not self.cache.has(entry[0])]
        todo += [partial(self.features, [caption]) for caption in captions if not self.cache.has(self.features_key(caption))]
        with team.together():
            for make in tqdm(todo[team.rank::team.size], desc="latents and features", disable=None):
                if self.cache.folder:  # until nothing more can be kept
                    make()
        self.encoders = None

    def batch(self, step: int, micro: int):
        return self.drawn(self.draw(step, micro), "", step, micro)

    def drawn(self, items: list[data.Item], purpose: str, step: int, micro: int):
        """A batch of these pictures, with captions dropped and noise and times drawn for this step and purpose."""
        rng = draws.rng(self.settings.seed, "caption" + purpose, step, micro)
        captions = [item.caption if rng.random() >= self.settings.drop else "" for item in items]
        generator = draws.generator(self.settings.seed, "noise" + purpose, step, micro)
        times = self.times(len(items), self.tokens(items[0]), generator)
        return self.noised(items, captions, times, generator)

    def times(self, count: int, tokens: int, generator: torch.Generator) -> Tensor:
        """(count,) times in [0, 1]; "shift" is the distribution that sampling at this size calls for (arXiv 2403.03206,
        section 5.3.2)."""
        if self.settings.times == "uniform":
            return torch.rand(count, generator=generator)
        if self.settings.times == "sampled":
            return flow.draw_sampled_t(count, generator, flow.mu(tokens) if self.preset.shift else 0.0)
        return flow.draw_t(count, generator, mean=flow.mu(tokens) if self.settings.times == "shift" else 0.0)

    def tokens(self, item: data.Item) -> int:
        """Of what is drawn."""
        return math.prod(item.size) // 256

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

    def entries(self, item: data.Item) -> list[tuple[tuple, Callable[[], dict[str, Tensor]]]]:
        """All that is made of a picture once: name in the cache, and what makes it."""
        return [((*self.latents_from, item.size, content(item.path)), partial(self.encoded, item))]

    def latent(self, item: data.Item) -> Tensor:
        """(1, 16, h, w), each picture alone, so that it does not depend on its neighbours in a batch."""
        return self.cache.get(*self.entries(item)[0])["latent"]

    @torch.no_grad()
    def encoded(self, item: data.Item) -> dict[str, Tensor]:
        return {"latent": self.autoencoder.encode(data.images([item]).to(self.place)).cpu()}

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
        x0, eps, t, cond, *weight = batch
        return flow.loss(conditioning.velocity(self.model, cond), x0, eps, t, *weight)

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
