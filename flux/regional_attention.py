"""Regions in one pass: all prompts stand on the text axis, and who sees whom is a bias on the attention's logits.

    image tokens see each other, the whole prompt, and region i's prompt with weight s_i M_i at their place
    region i's prompt sees itself and the image tokens of its region; regions' prompts do not see one another
    the whole prompt sees everything; its pooled vector alone modulates the blocks

A weight w on a key is log w on its logit, and minus infinity where it is 0. One pass over n more prompts in place of the
n + 1 passes of `flux/regions.py`, which stays the reference: here prompts are mixed inside, and strengths mean less.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from einops import reduce
from torch import Tensor

from flux import conditioning, latents
from flux.conditioning import Condition
from flux.flow import Velocity
from flux.model import Flux
from flux.regions import Region, rectangle, soften


def token_weights(region: Region, size: tuple[int, int]) -> Tensor:
    """(L_img,) M_i at the image tokens of a picture of (width, height) pixels: the mean over each token's 2 x 2 latents."""
    mask = soften(rectangle(region.box, size[1] // 8, size[0] // 8))
    return reduce(mask, "(h ph) (w pw) -> (h w)", "mean", ph=2, pw=2)


def bias_of(plan: Sequence[Region], size: tuple[int, int], length: int) -> Tensor:
    """(L, L) added to logits, queries by keys, for prompts of `length` tokens each: whole, regions, then the image."""
    image = size[0] * size[1] // 256
    text = length * (len(plan) + 1)
    weights = torch.zeros(text + image, text + image)
    weights[:length] = 1                                    # the whole prompt sees everything
    weights[text:, text:] = 1
    weights[text:, :length] = 1
    for i, region in enumerate(plan, 1):
        own, here = slice(i * length, (i + 1) * length), token_weights(region, size)
        weights[own, own] = 1
        weights[own, text:] = here
        weights[text:, own] = region.strength * here[:, None]
    return weights.log()


@contextmanager
def biased(model: Flux, bias: Tensor) -> Iterator[None]:
    """Every attention of the model with bias (B, 1, L, L)."""
    blocks = (*model.double_blocks, *model.single_blocks)
    for block in blocks:
        block.attention_bias = bias
    try:
        yield
    finally:
        for block in blocks:
            del block.attention_bias


def velocity(model: Flux, cond: Condition, plans: Sequence[Sequence[Region]],
             features: Sequence[Sequence[tuple[Tensor, Tensor]]], size: tuple[int, int]) -> Velocity:
    """Of B pictures with as many regions each; features: (txt (1, L_txt, D), vec) of every region of every picture."""
    if not plans[0]:
        return conditioning.velocity(model, cond)
    local = torch.stack([torch.cat([txt for txt, _ in own], dim=1)[0] for own in features])  # (B, n L_txt, D)
    txt = torch.cat((cond.txt, local), dim=1)
    longer = replace(cond, txt=txt, txt_ids=latents.text_ids(txt.shape[1], txt.device))
    bias = torch.stack([bias_of(plan, size, cond.txt.shape[1]) for plan in plans])[:, None].to(txt)
    plain = conditioning.velocity(model, longer)

    def v(img: Tensor, t: Tensor) -> Tensor:
        with biased(model, bias):
            return plain(img, t)
    return v
