"""ArtAug (arXiv 2412.12888): a critic looks at pictures, they are drawn again so, and a LoRA learns the difference.

A vision-language model is shown each picture with its prompt and answers with regions and prompts for them; from the same
noise the picture is drawn again, by the whole prompt's velocity blended with one per region (`flux/regions.py`). Sampling
shows that; training repeats it for many prompts and keeps what is gained (`flux/artaug/`). The critic is any server that
`vlm_client` can talk to; which one answered is printed, and written into the picture.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from PIL import Image, ImageDraw

from flux import pictures
from flux.artaug import drawing
from flux.artaug.evaluate import Evaluate
from flux.artaug.loop import Learn, Loop, Pairs
from flux.errors import UserError
from flux.settings import Sampling
from vlm_client.critique import EditPlan

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
    region_scale: float = 100.0  # times the strength of every edit: 1 as published, 100 replaces the prompt inside
    mode: Literal["blend", "attention"] = "blend"  # a pass per region and step; or one pass with masked attention
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
        artist, critic = drawing.Artist(self), drawing.critic(self)
        jobs = [(prompt, self.seed + i) for i, prompt in enumerate(p for p in self.prompt for _ in range(self.num))]
        before = [next(artist.draw([prompt], [seed])) for prompt, seed in jobs]
        plans = drawing.ask(critic, [(pil, prompt) for pil, (prompt, _) in zip(before, jobs, strict=True)])
        count = sum(len(plan.edits) for plan in plans)
        print(f"critic: {critic.name}, {count} edits for {len(plans)} pictures", flush=True)
        for (prompt, seed), pil, plan in zip(jobs, before, plans, strict=True):
            after = next(artist.draw([prompt], [seed], [drawing.areas(plan, self.region_scale)], self.mode))
            yield story(pil, plan, after, prompt), {
                "prompt": prompt, "seed": seed, "steps": artist.steps, "guidance": artist.guidance, "model": self.model,
                "config": replace(self, prompt=(prompt,), num=1, seed=seed), "files": artist.files, "critic": plan.critic,
                "plan": plan.as_dict()}


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
TRAIN = {"": Loop, "pairs": Pairs, "learn": Learn, "evaluate": Evaluate}
