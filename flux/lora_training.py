"""Training a LoRA (arXiv 2106.09685): a small change of a frozen FLUX, learned from a folder of captioned pictures.

Beside linear layers W stand pairs A, B, and only they are trained: W x + alpha / rank * B A x. Options: LoRA+ (arXiv
2402.12354), where B learns faster than A; the rank-stabilised scale alpha / sqrt(rank) (arXiv 2312.03732); a set of
pictures that shall stay as they are (prior preservation, arXiv 2208.12242, section 3.2); strengths that change from
step to step, so that a range of them, and not 1 alone, has been seen to give good pictures; and training at the guidance
that pictures are drawn with.

FLUX.1-dev is distilled: its velocity at guidance g is what classifier-free guidance made of another model (arXiv
2210.03142). Pictures do not show such a velocity, and a LoRA that is trained at g (--guidance) towards them unlearns what
g adds. With --guided g the target is the pictures' velocity plus that: v(x, t | g) - v(x, t | 1) of the model without the
LoRA.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from flux import adapters, cli, conditioning, data, draws, flow, lora_names, parallel
from flux.conditioning import Condition
from flux.errors import UserError
from flux.finetune import Captioned
from flux.flow import Velocity
from flux.settings import FineTuning
from lora import inject, io
from lora.adapter import Adapter, LowRank
from lora.metadata import about


@dataclass(frozen=True)
class TrainLora(FineTuning):
    """A LoRA, on a folder of captioned pictures."""

    rank: int = 16  # columns of B: what the LoRA can hold, and its size
    alpha: float | None = None  # the change is scaled by alpha / rank; default: the rank, so by 1
    target: str = "blocks"  # layers that get a pair, a regular expression: blocks is all of them; attn|linear is less
    stabilised: bool = False  # scale by alpha / sqrt(rank), so that large ranks learn as fast as small ones
    plus: float = 1.0  # LoRA+: learning rate of B over that of A; its paper advises 16
    weakest: float = 1.0  # strength of the LoRA while it learns: drawn for each step, from this
    strongest: float = 1.0  # to this; 0.75 to 1.5 makes one that can be turned up
    guided: float | None = None  # guidance whose part is added to the target; beside it --guidance, as it will be drawn
    prior: Path | None = None  # folder of captioned pictures that shall stay as the model draws them
    prior_weight: float = 1.0  # of their loss
    lr: float = 1e-3  # learning rate of AdamW after warmup
    batch: int = 4  # pictures per forward pass
    steps: int = 500  # optimizer steps
    warmup: int = 20  # optimizer steps in which lr rises from 0

    def __post_init__(self):
        super().__post_init__()
        if self.rank < 1:
            raise UserError(f"--rank {self.rank}: expected 1 or more")
        for name in ("alpha", "plus", "prior_weight"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise UserError(f"--{name.replace('_', '-')} {value}: expected a number above 0")
        if self.guided is not None and not 0 <= self.guided < math.inf:
            raise UserError(f"--guided {self.guided}: expected a guidance, 0 or more; for dev 3.5 is usual")
        if self.guided not in (None, 1) and self.guidance == 1:  # drawn at --guided, guidance would count twice
            raise UserError(f"--guided {self.guided:g} came without --guidance, expected the one that pictures will be "
                            f"drawn with; add --guidance {self.guided:g}")
        if not 0 < self.weakest <= self.strongest:
            raise UserError(f"--weakest {self.weakest} --strongest {self.strongest}: expected numbers above 0, the weakest "
                            "first, as --weakest 0.75 --strongest 1.5")

    def task(self):
        return LoraTask(self)


class LoraTask(Captioned):
    def __init__(self, settings: TrainLora):
        super().__init__(settings, also=settings.prior)
        torch.manual_seed(settings.seed)
        dtype = torch.float32 if self.place.type == "cpu" else torch.bfloat16  # of the frozen weights; A and B are float32
        self.model = adapters.load_flux(self.found, self.preset, dtype, self.place)
        pairs = inject.add_trained(self.model, settings.target, settings.rank, settings.alpha, settings.stabilised)
        self.pairs = nn.ModuleDict({layer.replace(".", "/"): pair for layer, pair in pairs.items()})

    def check_model(self) -> None:
        super().check_model()
        if self.settings.guided is not None and not self.preset.flux.guidance_embed:
            raise UserError(f"--guided came with --model {self.settings.model}, which takes no guidance; leave it out")

    def trainable(self) -> nn.Module:
        return self.model

    def batch(self, step: int, micro: int):
        settings, kept = self.settings, None
        strength = draws.rng(settings.seed, "strength", step, micro).uniform(settings.weakest, settings.strongest)
        if self.also:
            index = step * settings.accumulate + micro
            items = next(data.batches(self.also, settings.batch, settings.seed, index))
            kept = self.drawn(items, " to keep", step, micro)
        return super().batch(step, micro), kept, strength

    def held_out(self) -> list:
        return [(batch, None, 1.0) for batch in super().held_out()]

    def loss(self, batch) -> Tensor:
        """Per picture; that of the pictures to keep is spread over them."""
        learned, kept, strength = batch
        losses = self.missed(learned, strength)
        return losses if kept is None else losses + self.settings.prior_weight * self.missed(kept, strength).mean()

    def missed(self, drawn, strength: float) -> Tensor:
        x0, eps, t, cond, *weight = drawn
        return flow.loss(self.velocity(cond, strength), x0, eps, t, *weight)

    def velocity(self, cond: Condition, strength: float) -> Velocity:
        """What shall be the pictures' velocity: with --guided, less what guidance adds without the LoRA."""
        self.wear(strength)
        drawn = conditioning.velocity(self.model, cond)
        if self.settings.guided is None:
            return drawn
        plain, guided = (conditioning.velocity(self.model, replace(cond, guidance=g)) for g in (1.0, self.settings.guided))

        def less(x: Tensor, t: Tensor) -> Tensor:
            self.wear(0.0)
            with torch.no_grad():
                added = guided(x, t) - plain(x, t)
            self.wear(strength)
            return drawn(x, t) - added
        return less

    def wear(self, strength: float) -> None:
        for pair in self.pairs.values():
            pair.strength = strength

    def preview(self) -> Image.Image:
        self.wear(1.0)
        return super().preview()

    def adapter(self) -> Adapter:
        return Adapter({name.replace("/", "."): (LowRank(pair.A.detach().cpu(), pair.B.detach().cpu(), pair.scale),)
                        for name, pair in self.pairs.items()})

    def save(self, folder: Path, command: str = "lora", extra: Mapping[str, str] | None = None) -> None:
        """extra: of the metadata."""
        adapter, path = self.adapter(), folder / "final.safetensors"
        made = {"command": f"python train.py {command}", "config": cli.as_dict(self.settings), "pictures": len(self.items)}
        parents = {"flux": self.found["flux"].path}
        io.write(path, {"flux": adapter}, lora_names.names(self.preset),
                 metadata=about(adapter, folder.name, self.settings.model, made, parents, extra))
        if parallel.join().leads:
            print(f"draw with it: {self.how_to_draw(path)}")

    def how_to_draw(self, path: Path) -> str:
        return f"python sample.py --model {self.settings.model} --lora {path} ..."

