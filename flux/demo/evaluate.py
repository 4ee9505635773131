"""The measured table of the demo world."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flux import checkpoint, cli, conditioning, device, draws, latents, pictures, weights
from flux.config import DEMO
from flux.demo import referee
from flux.demo import scene as world
from flux.demo.autoencoder_stage import AutoencoderTask, TrainAutoencoder
from flux.plan import Plan


@dataclass(frozen=True)
class Evaluate:
    """What the shipped demo can do, judged by the referee on captions and seeds that training never saw."""

    count: int = 100            # pictures with one object, and as many with two
    guidance: float = DEMO.guidance  # distilled guidance
    steps: int = DEMO.steps     # Euler steps
    seed: int = 1               # of captions and noise
    out: Path = Path("out")     # folder for the contact sheet
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # of weights and arithmetic
    store: Literal["plain", "fp8", "int8"] = "plain"  # how the transformer's weights lie in memory

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
        if self.store != "plain":
            print(f"velocity: {100 * self.velocity_error():.2f} % off from that of plain weights")
        if (self.dtype, self.store) != ("auto", "plain"):
            return  # the table that ships is of the plain model
        files = {file.name: checkpoint.fingerprint(file) for file in sorted(weights.DEMO.glob("*.safetensors"))}
        table = {"command": "python train.py demo evaluate", "settings": cli.as_dict(self), "rows": rows, "weights": files}
        (weights.DEMO / "table.json").write_text(json.dumps(table, indent=1) + "\n")
        sheet = pictures.contact_sheet([pil for pil, _ in shown], 8, [mark for _, mark in shown])
        self.out.mkdir(parents=True, exist_ok=True)
        pictures.write_png(self.out / "evaluate.png", sheet, None)
        print(f"the table is in {weights.DEMO / 'table.json'}, the first pictures are in {self.out / 'evaluate.png'}")

    def pictures(self, things: int) -> tuple[list[world.Caption], list[Image.Image]]:
        """Drawn by the command that a user types, from the shipped files."""
        rng = draws.rng("evaluate", self.seed, things)
        captions = [world.sample_caption(world.sample_scene(rng, held_out=True, things=things), rng)
                    for _ in range(self.count)]
        text_to_image = cli.recipes()["t2i"]
        command = cli.build(text_to_image, cli.describe(text_to_image).sample, {
            "prompt": tuple(caption.text for caption in captions), "steps": self.steps, "guidance": self.guidance,
            "seed": draws.seed_of("evaluate", self.seed) % 2**31, "batch": 20, "dtype": self.dtype, "store": self.store})
        return captions, [pil for pil, _ in command.images()]

    @torch.inference_mode()
    def velocity_error(self) -> float:
        """|v - v'| / |v| of stored weights against plain ones, for eight captions and noises, at times from 1 to 0.05."""
        found, dtype = weights.find(DEMO), device.choose("cpu", self.dtype)[1]
        rng, generator = draws.rng("evaluate", self.seed, 1), torch.Generator().manual_seed(self.seed)
        texts = [world.sample_caption(world.sample_scene(rng, held_out=True), rng).text for _ in range(8)]
        txt, vec = conditioning.TextEncoders(found, DEMO, dtype, torch.device("cpu"))(texts)
        cond = conditioning.condition(txt, vec, DEMO.width, DEMO.height, self.guidance)
        img = latents.pack(latents.noise(8, DEMO.height, DEMO.width, generator)).to(dtype)
        t = torch.linspace(1, 0.05, 8).to(dtype)
        models = (Plan(dtype, way).transformer(found, DEMO, torch.device("cpu")) for way in ("plain", self.store))
        plain, stored = (conditioning.velocity(model, cond)(img, t) for model in models)
        return ((stored - plain).float().norm() / plain.float().norm()).item()

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
