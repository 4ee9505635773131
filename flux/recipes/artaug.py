"""ArtAug (arXiv 2412.12888), so far its first step: a critic looks at a picture, and it is drawn again with its edits.

A vision-language model is shown each picture with its prompt and answers with regions and prompts for them; from the same
noise the picture is drawn again, by the whole prompt's velocity blended with one per region (`flux/regions.py`). The
critic is any server that `vlm_client` can talk to; which one answered is printed, and written into the picture.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from flux import adapters, checkpoint, conditioning, device, flow, latents, pictures, regions, weights
from flux.config import preset
from flux.errors import UserError
from flux.regions import Region
from flux.settings import Sampling
from vlm_client import VlmError
from vlm_client.client import Critic
from vlm_client.critique import EditPlan

PARTS = ("flux", "ae", "clip", "t5", "tokenizer", "tokenizer_2")
MARK = "#e0218a"  # of a region's frame
NOT_YET = ("shift", "times", "store", "reuse", "compile", "strips", "vram", "attention")  # flags that only t2i heeds


@dataclass(frozen=True)
class ArtAug(Sampling):
    """A picture, what a critic would change in which region, and the picture drawn again so."""

    prompt: tuple[str, ...] = ()  # what to draw; several make several pictures
    vlm: str | None = None  # address of the critic, such as http://localhost:8000; a key comes from VLM_API_KEY
    vlm_model: str | None = None  # name of its model, where the server has several
    vlm_timeout_s: float = 120.0  # seconds for a picture, tries and pauses included
    ledger: Path = Path("runs/artaug")  # folder that keeps what was asked and answered; no question is asked twice
    region_scale: float = 1.0  # times the strength of every edit: 1 as published, 20 all but replaces the prompt inside
    batch: int = 4  # prompts that go through the transformer together in a step
    POSITIONAL = "prompt"

    def images(self) -> Iterator[tuple[Image.Image, dict]]:
        """(before, each region, after; metadata) of each prompt."""
        if not self.prompt or not self.vlm:
            raise UserError("artaug came without a prompt or --vlm, expected both; start python -m vlm_client.measuring, or "
                            'a Qwen2-VL server, and add "a red circle" --vlm http://localhost:8000')
        for name in NOT_YET:
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise UserError(f"--{name} came with artaug, which does not heed it yet, expected others; leave it out")
        model, loras = preset(self.model), adapters.read(self.lora, preset(self.model))
        if model.takes:
            raise UserError(f"--model {model.name} draws from a {model.takes} too, expected one that needs a prompt alone; "
                            "take --model demo or dev")
        size = width, height = self.width or model.width, self.height or model.height
        latents.check_size(*size)
        steps, guidance = self.steps or model.steps, model.guidance if self.guidance is None else self.guidance
        jobs = [(prompt, self.seed + i) for i, prompt in enumerate(p for p in self.prompt for _ in range(self.num))]
        place, dtype = device.choose(self.device, self.dtype)
        found = weights.find(model, self.weights, {"flux": self.flux, "ae": self.ae, "clip": self.clip, "t5": self.t5})
        weights.require(found, *PARTS)
        files = {part: f"{found[part].path.name} {checkpoint.fingerprint(found[part].path)}" for part in PARTS
                 if found[part].path.is_file()} | adapters.files(model, loras)
        critic = self.critic()

        def read(prompts: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
            encoders = conditioning.TextEncoders(found, model, dtype, place)
            for part in ("clip", "t5"):
                adapters.attach(loras, part, getattr(encoders, part))
            return {prompt: encoders([prompt]) for prompt in dict.fromkeys(prompts)}

        with torch.inference_mode():
            features = read([prompt for prompt, _ in jobs])
            autoencoder = weights.load_autoencoder(found, model.autoencoder, dtype, place).eval()
            transformer = adapters.load_flux(found, model, dtype, place).eval()
            adapters.attach(loras, "flux", transformer)
            times = flow.schedule(steps, (width // 16) * (height // 16), model.shift)

            def under(prompts: list[str]) -> flow.Velocity:
                txt, vec = (torch.cat(part) for part in zip(*(features[prompt] for prompt in prompts), strict=True))
                return conditioning.velocity(transformer, conditioning.condition(txt, vec, *size, guidance))

            def draw(prompt: str, seed: int, areas: Sequence[Region] = ()) -> Image.Image:
                noise = latents.noise(1, height, width, torch.Generator().manual_seed(seed)).to(place, dtype)
                v = regions.velocity(under, [prompt], areas, size, batch=self.batch)
                img = flow.euler(v, latents.pack(noise), times)
                return pictures.to_pil(autoencoder.decode(latents.unpack(img, height, width)))[0]

            before = [draw(prompt, seed) for prompt, seed in jobs]
            plans = ask(critic, [(pil, prompt) for pil, (prompt, _) in zip(before, jobs, strict=True)])
            count = sum(len(plan.edits) for plan in plans)
            print(f"critic: {critic.name}, {count} edits for {len(plans)} pictures", flush=True)
            features |= read([edit.prompt for plan in plans for edit in plan.edits])
            for (prompt, seed), pil, plan in zip(jobs, before, plans, strict=True):
                areas = [Region(edit.box, edit.prompt, self.region_scale * edit.strength) for edit in plan.edits]
                after = draw(prompt, seed, areas)
                alone = replace(self, prompt=(prompt,), num=1, seed=seed)
                yield story(pil, plan, after, prompt), {
                    "prompt": prompt, "seed": seed, "steps": steps, "guidance": guidance, "model": self.model,
                    "config": alone, "files": files, "critic": plan.critic, "plan": plan.as_dict()}

    def critic(self) -> Critic:
        try:
            return Critic(self.vlm, self.ledger, self.vlm_model, timeout_s=self.vlm_timeout_s)
        except VlmError as error:
            raise UserError(f"--vlm: {error}") from None


def ask(critic: Critic, pairs: list[tuple[Image.Image, str]]) -> list[EditPlan]:
    try:
        return critic.plans(pairs)
    except VlmError as error:
        raise UserError(f"--vlm: {error}") from None


def story(before: Image.Image, plan: EditPlan, after: Image.Image, prompt: str) -> Image.Image:
    """In a row: the picture, each region framed above its prompt, the picture drawn again. Small ones are enlarged."""
    fine = max(1, 256 // min(before.size))

    def large(pil: Image.Image) -> Image.Image:
        return pil.resize((fine * pil.width, fine * pil.height), Image.Resampling.BICUBIC)

    panels, captions = [large(before)], [prompt]
    for edit in plan.edits:
        panel = large(before)
        corners = [share * edge for share, edge in zip(edit.box, (*panel.size, *panel.size), strict=True)]
        ImageDraw.Draw(panel).rectangle([corners[0], corners[1], corners[2] - 1, corners[3] - 1], outline=MARK, width=3)
        panels.append(panel)
        captions.append(f"{edit.aspect}: {edit.prompt}")
    panels.append(large(after))
    captions.append(f"after, by {plan.critic}" if plan.edits else "nothing to change")
    return pictures.contact_sheet(panels, len(panels), captions)


SAMPLE = ArtAug
