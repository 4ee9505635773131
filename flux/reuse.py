"""Steps that reuse the blocks of an earlier step: first-block caching, after TeaCache (arXiv 2411.19108) as ParaAttention
and diffusers (`FirstBlockCacheConfig`) simplify it. An approximation, measured by `python train.py demo judge-reuse`.

Consecutive steps of a sampler ask the network nearly the same. The first double block is a cheap look at how nearly: when
what it adds to the image tokens has hardly changed since the last full step, what all other blocks add is taken from there.

Reusing whole steps needs no code: two Euler steps with one velocity are one step over both, so it is `--steps`.
"""

import torch
from torch import Tensor

from flux.model import Flux


class Reusing:
    """A Flux for one trajectory, called as the Flux is: each velocity makes its own and begins with a full step.

    Every picture of a batch decides for itself, so that it is the same alone or among others. Keeps two (B, L_img, D)
    tensors of the last full step; asks the device for its decision once a step.
    """

    def __init__(self, model: Flux, threshold: float):
        self.model, self.config, self.threshold = model, model.config, threshold
        self.first: Tensor | None = None  # (B, L_img, D) that the first block added
        self.rest: Tensor | None = None  # (B, L_img, D) that all other blocks, and all residuals, added
        self.steered = False  # by residuals
        self.full = 0  # pictures times steps that were computed whole, for those who measure

    def __call__(self, img: Tensor, img_ids: Tensor, txt: Tensor, txt_ids: Tensor, vec: Tensor, t: Tensor,
                 guidance: Tensor | None = None, residuals: list[Tensor] | None = None) -> Tensor:
        model = self.model
        vec, pe = model.condition(vec, t.to(img.dtype), guidance), model.positions(txt_ids, img_ids)
        before = model.img_in(img)
        img, txt = model.double_blocks[0](before, model.txt_in(txt), vec, pe)
        steered = img if residuals is None else img + residuals[0]
        first = img - before
        rows = self.changed(first, residuals is not None)
        self.full += len(rows)
        if len(rows) == len(img):
            out = model.blocks(steered, txt, vec, pe, residuals, done=1)
            self.first, self.rest = first, out - img
        else:
            out = img + self.rest
            if rows:
                some, pe = residuals and [x[rows] for x in residuals], pe.expand(len(img), -1, -1, -1)[rows]
                out[rows] = model.blocks(steered[rows], txt[rows], vec[rows], pe, some, done=1)
                self.first[rows], self.rest[rows] = first[rows], (out - img)[rows]
        return model.final_layer(out, vec)

    def changed(self, first: Tensor, steered: bool) -> list[int]:
        """Pictures to compute whole: mean|first - last full step's| is not below threshold * mean|last full step's|.

        All of them in the first step, and where a ControlNet comes or goes.
        """
        fresh, self.steered = self.first is None or steered != self.steered, steered
        if fresh:
            return list(range(len(first)))
        change = (first - self.first).abs().mean((1, 2), dtype=torch.float32)
        small = change < self.threshold * self.first.abs().mean((1, 2), dtype=torch.float32)
        return [i for i, reused in enumerate(small.tolist()) if not reused]
