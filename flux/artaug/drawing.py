"""One model that draws many pictures: plain ones, and the same ones again by a critic's plan, from the same noise.

Text encoders are read when prompts come that were not read yet, and dropped; the transformer stays, with LoRAs that may be
exchanged between pictures. `flux/recipes/artaug.py` draws one story with it, `flux/artaug/pairs.py` thousands of pairs.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from PIL import Image
from torch import Tensor

from flux import adapters, checkpoint, conditioning, device, flow, latents, pictures, regional_attention, regions, weights
from flux.config import preset
from flux.errors import UserError
from flux.regions import Region
from lora.adapter import Adapter
from lora.inject import Loras
from vlm_client import VlmError
from vlm_client.client import Critic
from vlm_client.critique import EditPlan

PARTS = ("flux", "ae", "clip", "t5", "tokenizer", "tokenizer_2")


class Artist:
    """Settings need model, weights, device, dtype, width, height, steps, guidance, lora, batch and the parts' files."""

    def __init__(self, settings):
        self.settings, self.preset = settings, preset(settings.model)
        if self.preset.takes:
            raise UserError(f"--model {settings.model} draws from a {self.preset.takes} too, expected one that needs a "
                            "prompt alone; take --model demo or dev")
        self.given = adapters.read(settings.lora, self.preset)
        self.size = settings.width or self.preset.width, settings.height or self.preset.height
        latents.check_size(*self.size)
        self.steps = settings.steps or self.preset.steps
        self.guidance = self.preset.guidance if settings.guidance is None else settings.guidance
        self.place, self.dtype = device.choose(settings.device, settings.dtype)
        own = {part: getattr(settings, part, None) for part in ("flux", "ae", "clip", "t5")}
        self.found = weights.find(self.preset, settings.weights, own)
        weights.require(self.found, *PARTS)
        self.times = flow.schedule(self.steps, self.size[0] // 16 * (self.size[1] // 16), self.preset.shift)
        self.features: dict[str, tuple[Tensor, Tensor]] = {}
        self.passes = 0  # pictures that went through the transformer, steps counted

    @cached_property
    def files(self) -> dict[str, str]:
        """Which weights, by name and hash."""
        return {part: f"{self.found[part].path.name} {checkpoint.fingerprint(self.found[part].path)}" for part in PARTS
                if self.found[part].path.is_file()} | adapters.files(self.preset, self.given)

    @cached_property
    @torch.inference_mode(False)
    def autoencoder(self):
        return weights.load_autoencoder(self.found, self.preset.autoencoder, self.dtype, self.place).eval()

    @cached_property
    @torch.inference_mode(False)
    def transformer(self):
        network = adapters.load_flux(self.found, self.preset, self.dtype, self.place).eval()
        self.loras = adapters.attach(self.given, "flux", network)
        return network

    def wear(self, adapter: Adapter | None, strength: float = 1.0) -> None:
        """Draw with this LoRA instead of the last one worn; those of --lora stay."""
        loras: Loras = self.transformer and self.loras
        if "worn" in loras.on:
            loras.detach("worn")
        if adapter is not None and adapter.layers and strength:
            loras.attach("worn", adapter, strength)

    @torch.inference_mode()
    def read(self, prompts: Sequence[str]) -> None:
        """Their features, those of prompts that are new."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.features]
        if not new:
            return
        encoders = conditioning.TextEncoders(self.found, self.preset, self.dtype, self.place)
        for part in ("clip", "t5"):
            adapters.attach(self.given, part, getattr(encoders, part))
        self.features |= {prompt: encoders([prompt]) for prompt in new}

    def condition(self, prompts: Sequence[str]) -> conditioning.Condition:
        txt, vec = (torch.cat(part) for part in zip(*(self.features[prompt] for prompt in prompts), strict=True))
        return conditioning.condition(txt, vec, *self.size, self.guidance)

    def under(self, prompts: list[str]) -> flow.Velocity:
        return conditioning.velocity(self.transformer, self.condition(prompts))

    @torch.inference_mode()
    def draw(self, prompts: Sequence[str], seeds: Sequence[int], plans: Sequence[Sequence[Region]] | None = None,
             mode: str = "blend") -> Iterator[Image.Image]:
        """A picture per prompt and seed, in order, each by its own regions if there are plans.

        mode: blend (one pass per region and step) or attention (one longer pass, see flux/regional_attention.py).
        """
        plans = [()] * len(prompts) if plans is None else plans
        self.read([*prompts, *(area.prompt for plan in plans for area in plan)])
        drawn: dict[int, Image.Image] = {}
        by_length = sorted(range(len(prompts)), key=lambda i: (len(plans[i]), i))
        while by_length:
            count = len(plans[by_length[0]])
            some = [i for i in by_length[:max(1, self.settings.batch // (count + 1))] if len(plans[i]) == count]
            by_length = by_length[len(some):]
            v = self.velocity([prompts[i] for i in some], [plans[i] for i in some], mode)
            noise = [latents.noise(1, *self.size[::-1], torch.Generator().manual_seed(seeds[i])) for i in some]
            img = flow.euler(v, latents.pack(torch.cat(noise).to(self.place, self.dtype)), self.times)
            pils = pictures.to_pil(self.autoencoder.decode(latents.unpack(img, *self.size[::-1])))
            drawn |= dict(zip(some, pils, strict=True))
            self.passes += len(some) * self.steps * (count + 1)
        yield from (drawn[i] for i in range(len(prompts)))

    def velocity(self, prompts: list[str], plans: Sequence[Sequence[Region]], mode: str) -> flow.Velocity:
        if mode == "attention" and plans[0]:
            read = [[self.features[area.prompt] for area in plan] for plan in plans]
            return regional_attention.velocity(self.transformer, self.condition(prompts), plans, read, self.size)
        return regions.velocity_of_each(self.under, prompts, plans, self.size, batch=self.settings.batch)

    @torch.inference_mode()
    def encode(self, pils: Sequence[Image.Image]) -> Tensor:
        """Pictures -> latents (B, 16, h, w), float32 on the CPU, each alone."""
        return torch.cat([self.autoencoder.encode(pictures.to_tensor(pil).to(self.place, self.dtype)).float().cpu()
                          for pil in pils])


def areas(plan: EditPlan, scale: float) -> list[Region]:
    """A critic's edits as regions; `scale` times their strength."""
    return [Region(edit.box, edit.prompt, scale * edit.strength) for edit in plan.edits]


def critic(settings) -> Critic:
    try:
        return Critic(settings.vlm, settings.ledger, settings.vlm_model, timeout_s=settings.vlm_timeout_s)
    except VlmError as error:
        raise UserError(f"--vlm: {error}") from None


def ask(critic: Critic, shown: Sequence[tuple[Image.Image, str]]) -> list[EditPlan]:
    """One plan per (picture, prompt)."""
    try:
        return critic.plans(shown)
    except VlmError as error:
        raise UserError(f"--vlm: {error}") from None


def chunks(count: int, size: int) -> list[range]:
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


