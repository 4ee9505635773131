"""Text to image: a prompt becomes a picture.

The whole road of the project in one file: text encoders -> noise -> Euler steps along the velocity -> autoencoder.
Training takes the same road with `flow.loss` in place of Euler.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

from flux import checkpoint, conditioning, device, flow, latents, parallel, pictures, weights
from flux.config import preset
from flux.demo import scene
from flux.errors import UserError
from flux.finetune import Captioned
from flux.settings import FineTuning, Sampling


@dataclass(frozen=True)
class TextToImage(Sampling):
    """Pictures for prompts."""

    prompt: tuple[str, ...] = ()  # what to draw; several make several pictures; none draws the demo's contact sheet
    prompts: Path | None = None  # file with one prompt a line; # starts a comment
    batch: int = 4  # pictures that go through the transformer together; changes speed and memory, not the pictures
    POSITIONAL = "prompt"

    def images(self) -> Iterator[tuple[Image.Image, dict]]:
        """(picture, metadata) one by one. Picture i has seed + i, and is the same alone or among others."""
        model = preset(self.model)
        width, height = self.width or model.width, self.height or model.height
        latents.check_size(width, height)
        steps, guidance = self.steps or model.steps, model.guidance if self.guidance is None else self.guidance
        prompts = [prompt for prompt in self.all_prompts() for _ in range(self.num)]
        jobs = [(prompt, self.seed + i) for i, prompt in enumerate(prompts)]
        place, dtype = device.choose(self.device, self.dtype)
        found = weights.find(model, self.weights, {"flux": self.flux, "ae": self.ae, "clip": self.clip, "t5": self.t5})
        weights.require(found, "flux", "ae", "clip", "t5", "tokenizer", "tokenizer_2")

        files = {part: f"{lies.path.name} {checkpoint.fingerprint(lies.path)}" for part, lies in found.items()
                 if lies.path and lies.path.is_file() and part != "siglip"}

        with torch.inference_mode():
            encoders = conditioning.TextEncoders(found, model, dtype, place)
            features = {prompt: encoders([prompt]) for prompt in dict.fromkeys(prompt for prompt, _ in jobs)}
            del encoders  # the memory of T5 is the transformer's now
            transformer = weights.load_flux(found, model.flux, dtype, place).eval()
            autoencoder = weights.load_autoencoder(found, model.autoencoder, dtype, place).eval()
            times = flow.schedule(steps, (width // 16) * (height // 16), model.shift)
            with tqdm(total=len(jobs) * steps, desc="sampling", unit="step", disable=None) as bar:
                for start in range(0, len(jobs), self.batch):
                    some = jobs[start:start + self.batch]
                    txt, vec = (torch.cat(part) for part in zip(*(features[prompt] for prompt, _ in some), strict=True))
                    noise = [latents.noise(1, height, width, torch.Generator().manual_seed(seed)) for _, seed in some]
                    img = latents.pack(torch.cat(noise).to(place, dtype))
                    cond = conditioning.condition(txt, vec, width, height, guidance)
                    for state in flow.euler_steps(conditioning.velocity(transformer, cond), img, times):
                        img = state
                        bar.update(len(some))
                    decoded = autoencoder.decode(latents.unpack(img, height, width))
                    for pil, (prompt, seed) in zip(pictures.to_pil(decoded), some, strict=True):
                        alone = replace(self, prompt=(prompt,), prompts=None, num=1, seed=seed)
                        yield pil, {"prompt": prompt, "seed": seed, "steps": steps, "guidance": guidance,
                                    "model": self.model, "config": alone, "files": files}

    def all_prompts(self) -> list[str]:
        """Those of the command, then those of the file; the demo's own when there are none."""
        prompts = list(self.prompt)
        if self.prompts:
            if not self.prompts.is_file():
                raise UserError(f"--prompts {self.prompts}: no such file; expected one prompt a line; check the name")
            lines = (line.split("#")[0].strip() for line in self.prompts.read_text(encoding="utf-8").splitlines())
            prompts += [line for line in lines if line]
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
