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
from torch import nn
from tqdm import tqdm

from flux import (
    adapters,
    attention,
    checkpoint,
    compiled,
    conditioning,
    device,
    flow,
    fusion,
    inputs,
    latents,
    parallel,
    pictures,
    regions,
    reuse,
    weights,
)
from flux.config import Preset, preset
from flux.demo import scene
from flux.errors import UserError
from flux.finetune import Captioned
from flux.plan import plan_of
from flux.settings import Conditioned, FineTuning


@dataclass(frozen=True)
class TextToImage(Conditioned):
    """Pictures for prompts, and for the pictures given with them."""

    prompt: tuple[str, ...] = ()  # what to draw; several make several pictures; none draws the demo's contact sheet
    prompts: Path | None = None  # file with one prompt a line; # starts a comment
    batch: int = 4  # pictures that go through the transformer together; changes speed and memory, not the pictures
    POSITIONAL = "prompt"

    def images(self) -> Iterator[tuple[Image.Image, dict]]:
        """(picture, metadata) one by one. Picture i has seed + i, and is the same alone or among others."""
        areas, way = regions.read(self.region), fusion.read(self)
        loras = adapters.read(self.lora, preset(self.model))
        model = adapters.fitted(preset(self.model), loras)
        given = inputs.read(self, model)
        width, height = given.size
        latents.check_size(width, height)
        times = self.schedule(model, (width // 16) * (height // 16))
        guidance = model.guidance if self.guidance is None else self.guidance
        prompts = [prompt for prompt in self.all_prompts() for _ in range(self.num)]
        jobs = [(prompt, self.seed + i) for i, prompt in enumerate(prompts)]
        place, _ = device.choose(self.device, self.dtype)
        found = weights.find(model, self.weights, {"flux": self.flux, "ae": self.ae, "clip": self.clip, "t5": self.t5,
                                                   "siglip": self.siglip, "redux": self.redux_weights})
        parts = ("flux", "ae", "clip", "t5", "tokenizer", "tokenizer_2", *(("siglip", "redux") if self.redux else ()))
        weights.require(found, *parts)

        files = {part: f"{found[part].path.name} {checkpoint.fingerprint(found[part].path)}" for part in parts
                 if found[part].path.is_file()} | given.files | adapters.files(model, loras) | way.files

        words = [*prompts, *(area.prompt for area in areas), *([self.negative or ""] if self.guided else [])]
        plan = plan_of(self, model, found, place, given, loras, min(self.batch, len(jobs)), len(set(words)))
        dtype = plan.dtype
        if self.compile:
            compiled.check(place, self.cuda_graphs, plan.way == "streamed")
        with torch.inference_mode():
            encoders = conditioning.TextEncoders(found, model, dtype, place, plan.stream_t5)
            adapters.attach(loras, "clip", encoders.clip, way.beside(loras))
            adapters.attach(loras, "t5", encoders.t5, way.beside(loras))
            features = {prompt: encoders([prompt]) for prompt in dict.fromkeys(words)}
            del encoders  # the memory of T5 is the transformer's now
            seen = inputs.image_tokens(given, found, model, dtype, place)
            autoencoder = plan.autoencoder(found, model, place)
            fixed = inputs.encode(given, autoencoder, model, seen, self.hold)
            transformer = plan.transformer(found, model, place)
            fusing = way.attach(loras, transformer, model)
            batch = 1 if fusing.looks else self.batch
            attention.choose(transformer, self.attention, place, dtype)
            if self.compile:
                compiled.compile_blocks(transformer, self.cuda_graphs)
            left = flow.remaining(times, given.strength)
            control = inputs.controlled(self, given, autoencoder, model, times, dtype, place)

            def under(prompts: list[str]) -> flow.Velocity:
                txt, vec = (torch.cat(part) for part in zip(*(features[prompt] for prompt in prompts), strict=True))
                cond = fixed.onto(conditioning.condition(txt, vec, width, height, guidance))
                network = transformer if self.reuse is None else reuse.Reusing(transformer, self.reuse)
                return fusing.velocity(conditioning.velocity(network, cond, control and control(cond)), left)

            with tqdm(total=len(jobs) * (len(left) - 1), desc="sampling", unit="step", disable=None) as bar:
                for start in range(0, len(jobs), batch):
                    some = jobs[start:start + batch]
                    noise = [latents.noise(1, height, width, torch.Generator().manual_seed(seed)) for _, seed in some]
                    img = fixed.begin(latents.pack(torch.cat(noise).to(place)), left[0]).to(dtype)
                    velocity = fixed.held(self.velocity(under, [prompt for prompt, _ in some], times, given.size))
                    fusing.look(partial(flow.euler, velocity, img, fusion.few(left)))
                    for state in flow.euler_steps(velocity, img, left):
                        img = state
                        bar.update(len(some))
                    decoded = autoencoder.decode(latents.unpack(img, height, width))
                    for pil, (prompt, seed) in zip(pictures.to_pil(decoded), some, strict=True):
                        pil = given.finished(pil, self.keep)
                        alone = replace(self, prompt=(prompt,), prompts=None, num=1, seed=seed)
                        yield pil, {"prompt": prompt, "seed": seed, "steps": len(times) - 1, "guidance": guidance,
                                    "model": self.model, "config": alone, "files": files} | way.said(fusing)

    def schedule(self, model: Preset, tokens: int) -> list[float]:
        """--times as they are; else even steps, shifted by --shift, or as the model is for so many image tokens."""
        if self.times is not None:
            return self.given_times
        steps = self.steps or model.steps
        if self.shift is None:
            return flow.schedule(steps, tokens, model.shift)
        return [flow.shift_time(t, math.log(self.shift)) for t in flow.schedule(steps, tokens, shift=False)]

    @property
    def guided(self) -> bool:
        return self.cfg_scale not in (None, 1)

    def velocity(self, under: Callable[[list[str]], flow.Velocity], prompts: list[str], times: list[float],
                 size: tuple[int, int]) -> flow.Velocity:
        """Under the prompts, in regions also under theirs; with true guidance also away from the negative one."""
        areas, unwanted = regions.read(self.region), [self.negative or ""] * len(prompts)
        span = conditioning.span(times, self.region_start, self.region_end)
        wanted = regions.velocity(under, prompts, areas, size, span, self.batch)
        if not self.guided:
            return wanted
        both = regions.one_by_one([wanted, under(unwanted)]) if areas else under(prompts + unwanted)
        return conditioning.guided(both, wanted, self.cfg_scale, conditioning.span(times, self.cfg_start, self.cfg_end))

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
class FineTune(FineTuning):
    """The whole transformer, on a folder of captioned pictures; text encoders and autoencoder stay as they are."""

    lr: float = 1e-5  # learning rate of AdamW after warmup

    def task(self):
        return FineTuneTask(self)


class FineTuneTask(Captioned):
    def __init__(self, settings: FineTune):
        super().__init__(settings)
        self.model = weights.load_flux(self.found, self.preset.flux, torch.float32, self.place).requires_grad_(True)

    def trainable(self) -> nn.Module:
        return self.model

    def save(self, folder: Path) -> None:
        checkpoint.save(folder / "final.safetensors", self.model.state_dict(), {"config": str(self.settings)})
        if parallel.join().leads:
            print(f"draw with it: python sample.py --model {self.settings.model} --flux {folder / 'final.safetensors'} ...")


SAMPLE = TextToImage
TRAIN = {"": FineTune}
