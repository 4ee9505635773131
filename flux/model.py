"""The FLUX.1 transformer: noisy image tokens, text and time -> velocity. Read `attention.py` and `layers.py` first."""

import torch
from torch import Tensor, nn

from flux.attention import rotary_table
from flux.config import FluxConfig
from flux.layers import DoubleStreamBlock, LastLayer, MLPEmbedder, SingleStreamBlock, time_embedding


class Flux(nn.Module):
    def __init__(self, config: FluxConfig):
        super().__init__()
        self.config = config
        self.img_in = nn.Linear(config.in_channels, config.hidden_size)
        self.txt_in = nn.Linear(config.context_in_dim, config.hidden_size)
        self.time_in = MLPEmbedder(256, config.hidden_size)
        self.vector_in = MLPEmbedder(config.vec_in_dim, config.hidden_size)
        if config.guidance_embed:
            self.guidance_in = MLPEmbedder(256, config.hidden_size)
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(config) for _ in range(config.depth))
        self.single_blocks = nn.ModuleList(SingleStreamBlock(config) for _ in range(config.depth_single_blocks))
        self.final_layer = LastLayer(config.hidden_size, config.out_channels)

    def forward(self, img: Tensor, img_ids: Tensor, txt: Tensor, txt_ids: Tensor, vec: Tensor, t: Tensor,
                guidance: Tensor | None = None, residuals: list[Tensor] | None = None) -> Tensor:
        """img (B, L_img, C), txt (B, L_txt, 4096), vec (B, 768), t (B,), guidance (B,) -> velocity (B, L_img, 64).

        ids are (B or 1, L, 3): frame, row, column. `residuals`: one (B, L_img, D) per double block, and then perhaps one
        per single block, added to the image tokens after it (ControlNet branches, LucidFlux).
        """
        vec = self.condition(vec, t.to(img.dtype), guidance)
        pe = self.positions(txt_ids, img_ids)
        img = self.blocks(self.img_in(img), self.txt_in(txt), vec, pe, residuals)                  # (B, L_img, D)
        return self.final_layer(img, vec)

    def blocks(self, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor, residuals: list[Tensor] | None = None,
               done: int = 0) -> Tensor:
        """img (B, L_img, D), txt (B, L_txt, D), vec (B, D) -> img after all blocks; `done` double ones are behind."""
        for i, block in enumerate(self.double_blocks[done:], done):
            img, txt = block(img, txt, vec, pe)
            if residuals is not None:
                img = img + residuals[i]
        x, start = torch.cat((txt, img), dim=1), txt.shape[1]
        del img, txt
        for i, block in enumerate(self.single_blocks, len(self.double_blocks)):
            x = block(x, vec, pe)
            if residuals is not None and i < len(residuals):
                x = torch.cat((x[:, :start], x[:, start:] + residuals[i]), dim=1)
        return x[:, start:]

    def positions(self, txt_ids: Tensor, img_ids: Tensor) -> Tensor:
        """Ids (B or 1, L, 3) -> the rotary table over text, then image."""
        return rotary_table(torch.cat((txt_ids, img_ids), dim=1), self.config.axes_dim, self.config.theta)

    def condition(self, vec: Tensor, t: Tensor, guidance: Tensor | None) -> Tensor:
        """Pooled text (B, 768), time and guidance (B,) -> (B, D), summed in the released order: bf16 depends on it."""
        cond = self.time_in(time_embedding(t))
        if self.config.guidance_embed:
            assert guidance is not None, "this model takes a guidance strength"
            cond = cond + self.guidance_in(time_embedding(guidance.to(t.dtype)))
        return cond + self.vector_in(vec)
