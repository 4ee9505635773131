"""LucidFlux (arXiv 2509.22414): a frozen FLUX restores a picture without a caption.

Two branches (`flux/control.py`), one for the low-quality picture and one for SwinIR's proxy of it, see the noise, their
picture and a fixed prompt. Modulation turns what they give into one residual per double block, by time and block. What
SigLIP sees in the proxy follows the prompt as text. Attributes carry the names of the released file, "ldr" for the proxy.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from flux import conditioning, flow
from flux.conditioning import Condition
from flux.config import FluxConfig, LucidConfig
from flux.control import ControlNet, begun_from, zeroed
from flux.layers import time_embedding
from flux.model import Flux
from flux.siglip import Redux


class Embedder(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.linear_1 = nn.Linear(256, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class Modulation(nn.Module):
    """Features of a branch, shifted and scaled by the time and by the number of the block that they go to."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.timestep_embedder = Embedder(width)
        self.control_index_embedder = Embedder(width)
        self.linear = nn.Linear(width, 2 * width)

    def vectors(self, t: Tensor, blocks: Tensor) -> Tensor:
        """t (B,) in [0, 1], blocks (K,) -> (B, K, 2D): shift, then scale. Of nothing else: made once for all steps."""
        numbers = time_embedding(blocks.to(t), time_factor=1.0)
        at = self.timestep_embedder(time_embedding(t))[:, None] + self.control_index_embedder(numbers)
        return self.linear(F.silu(at))

    def forward(self, x: Tensor, vectors: Tensor) -> Tensor:
        """x (B, L, D), vectors (B or 1, 2D) -> (B, L, D)."""
        shift, scale = vectors[:, None].chunk(2, dim=-1)
        return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=self.eps), 1 + scale)


class LucidFlux(nn.Module):
    """All that is trained: two branches, their modulations, and the connector from SigLIP's patches to text tokens."""

    def __init__(self, model: FluxConfig, config: LucidConfig):
        super().__init__()
        branch = replace(model, depth=config.depth, depth_single_blocks=0)
        self.depth = model.depth
        self.condition_lq = ControlNet(branch, pixels=True)
        self.condition_ldr = ControlNet(branch, pixels=True)
        self.modulation_lq = Modulation(model.hidden_size, config.eps)
        self.modulation_ldr = Modulation(model.hidden_size, config.eps)
        self.connector = Redux(config.siglip.hidden_size, model.context_in_dim)

    def table(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """t (B,) -> modulation vectors (B, depth, 2D) of either branch."""
        blocks = torch.arange(self.depth, device=t.device)
        return self.modulation_lq.vectors(t, blocks), self.modulation_ldr.vectors(t, blocks)

    def residuals(self, lq: Sequence[Tensor], ldr: Sequence[Tensor], table: tuple[Tensor, Tensor],
                  strengths: tuple[float, float] = (1.0, 1.0)) -> list[Tensor]:
        """Features (B, L, D) of the branches' blocks -> one residual per double block: the branches' blocks take turns."""
        def of(modulation, given, at):
            return [modulation(given[k % len(given)], at[:, k]) for k in range(self.depth)]
        both = of(self.modulation_lq, lq, table[0]), of(self.modulation_ldr, ldr, table[1])
        return [strengths[0] * a + strengths[1] * b for a, b in zip(*both, strict=True)]


def begun(model: Flux, config: LucidConfig) -> LucidFlux:
    """To be trained from scratch: branches begin as the transformer's own blocks, and together they change nothing yet.

    A layer norm would blow the untrained branches' features up, whatever their size (lucidflux.md section 3): with an eps
    near 1 it keeps them as small as they are, and as the last linear layer of a modulation is zero, nothing is added.
    """
    made = LucidFlux(model.config, config).to(model.img_in.weight)
    for name in ("condition_lq", "condition_ldr"):
        branch = begun_from(model, made.condition_lq.config, pixels=True)
        last = branch.input_hint_block[-1].weight  # which a ControlNet begins with as zeros; one zero on the way is enough
        nn.init.normal_(last, std=last[0].numel() ** -0.5)
        setattr(made, name, branch)
    zeroed(made.modulation_lq.linear)
    zeroed(made.modulation_ldr.linear)
    return made


@dataclass(frozen=True)
class Given:
    """What a picture says, constant along its trajectory: made once."""

    lq: Tensor  # (1 or B, L_img, D) of `condition_lq.embed`
    ldr: Tensor
    prompt: Condition  # what the branches read
    tokens: Tensor  # (1 or B, N, 4096), what the transformer reads after it; N = 0: nothing
    strengths: tuple[float, float] = (1.0, 1.0)  # of the branches


def given(lucid: LucidFlux, prompt: Condition, lq: Tensor, ldr: Tensor, seen: Tensor,
          strengths: tuple[float, float] = (1.0, 1.0)) -> Given:
    """lq, ldr (B, 3, 8h, 8w) in [-1, 1]; seen (B, N, 1152), SigLIP's patches of ldr."""
    return Given(lucid.condition_lq.embed(lq), lucid.condition_ldr.embed(ldr), prompt, lucid.connector(seen), strengths)


def velocity(model: Flux, lucid: LucidFlux, given: Given, table: dict[float, tuple[Tensor, Tensor]] | None = None
             ) -> flow.Velocity:
    """`table`: modulation vectors by time, for the times of a schedule (`tables`); others are computed."""
    cond, guidance = given.prompt, None
    if lucid.condition_lq.config.guidance_embed:
        guidance = torch.full((len(cond.txt),), cond.guidance, dtype=cond.txt.dtype, device=cond.txt.device)

    def residuals(img: Tensor, t: Tensor) -> list[Tensor]:
        args = img, cond.img_ids, cond.txt, cond.txt_ids, cond.vec, t, guidance
        lq, _ = lucid.condition_lq(*args, given.lq) if given.strengths[0] else ([torch.zeros_like(given.lq)], None)
        ldr, _ = lucid.condition_ldr(*args, given.ldr) if given.strengths[1] else ([torch.zeros_like(given.ldr)], None)
        at = table[t[0].item()] if table else lucid.table(t.to(img.dtype))
        return lucid.residuals(lq, ldr, at, given.strengths)

    return conditioning.velocity(model, conditioning.with_image_tokens(cond, given.tokens), residuals)


def tables(lucid: LucidFlux, times: Sequence[float]) -> dict[float, tuple[Tensor, Tensor]]:
    """For `velocity`: of every time of a schedule, by its value in the network's dtype."""
    t = torch.tensor(times[:-1], dtype=lucid.connector.redux_up.weight.dtype, device=lucid.connector.redux_up.weight.device)
    both = lucid.table(t)
    return {time: (both[0][i:i + 1], both[1][i:i + 1]) for i, time in enumerate(t.tolist())}


def flattened(table: dict[float, tuple[Tensor, Tensor]]) -> dict[float, tuple[Tensor, Tensor]]:
    """The same vectors for all times and blocks, their mean: what is left of a modulation that tells none apart."""
    means = [torch.stack(part).mean((0, 2), keepdim=True)[0] for part in zip(*table.values(), strict=True)]
    return {t: tuple(mean.expand_as(part) for mean, part in zip(means, both, strict=True)) for t, both in table.items()}


def to_siglip(image: Tensor, size: int) -> Tensor:
    """image (B, 3, H, W) in [0, 1] -> (B, 3, size, size) in [-1, 1], as released: truncated to 8 bits, squashed by PIL."""
    pixels = (image.float().clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    small = [np.array(Image.fromarray(picture).resize((size, size), Image.Resampling.BILINEAR)) for picture in pixels]
    return ((torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5).to(image.device)


def mu(width: int, height: int, schedule: str) -> float:
    """Logarithm of the shift of sampling times. `released` counts 1/64 of the tokens, at 1024 x 1024 64 in place of 4096."""
    tokens = (width // 8) * (height // 8) // 256 if schedule == "released" else (width // 16) * (height // 16)
    return flow.mu(tokens)


def draw_t(count: int, generator: torch.Generator, tokens: int, kind: str) -> Tensor:
    """Training times (count,). `flux_shift` and `lucidflux_released` are logit-normal around `logit_mean`; `early` is even
    along a schedule that is shifted e times farther than the sampler's: 43 % of the demo's times are above 0.85, where a
    picture's places and colours are settled by what the branches say alone."""
    if kind == "early":
        return flow.draw_sampled_t(count, generator, flow.mu(tokens) + 1)
    return flow.draw_t(count, generator, logit_mean(tokens, kind))


def logit_mean(tokens: int, kind: str) -> float:
    """`flux_shift` matches sampling: 1.15 at 1024 x 1024 pixels. There `lucidflux_released` has 3.1582, the factor itself
    in place of its logarithm: half of its times are above 0.959."""
    return math.exp(flow.mu(tokens)) if kind == "lucidflux_released" else flow.mu(tokens)


def schedule(steps: int, width: int, height: int, kind: str) -> list[float]:
    """steps + 1 times from 1 to 0; kind `released` as the authors sample, `flux` as the transformer was meant to be."""
    shift = mu(width, height, kind)
    return [flow.shift_time(1 - i / steps, shift) for i in range(steps + 1)]
