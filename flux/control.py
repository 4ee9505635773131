"""ControlNet (arXiv 2302.05543) for FLUX: a branch that sees the noise and a control picture and steers the image tokens.

It begins like the transformer, with its own copy of the first double blocks (and perhaps single blocks); each block's
image tokens leave through a linear layer that was zero before training. What the branch gives is spread over the
transformer's blocks by an explicit rule and added there: see `residuals` in `flux/model.py` and `flux/conditioning.py`.

Two kinds of files are read (`weights.load_control`), and a control picture comes in accordingly:

- diffusers' FluxControlNetModel (InstantX, Shakker): its latents through `controlnet_x_embedder`
- XLabs' ControlNetFlux, and LucidFlux's branches: its pixels through `input_hint_block` and `pos_embed_input`, under
  XLabs' own names or as diffusers converts them

Union ControlNets, which want a mode, and inpainting ones, which want a mask, are refused.
"""

import math

import torch
from torch import Tensor, nn

from flux import latents
from flux.config import FluxConfig
from flux.errors import UserError
from flux.model import Flux


def zeroed(layer: nn.Module) -> nn.Module:
    """With zeros for weights: what is added through it changes nothing until it is trained."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def hint_block(channels: int = 16) -> nn.Sequential:
    """Pixels (B, 3, 8h, 8w) -> (B, 16, h, w): eight 3x3 convolutions, SiLU between, the last zero."""
    strides = (1, 1, 2, 1, 2, 1, 2)
    layers = [nn.Conv2d(3 if i == 0 else channels, channels, 3, stride, padding=1) for i, stride in enumerate(strides)]
    layers.append(zeroed(nn.Conv2d(channels, channels, 3, padding=1)))
    return nn.Sequential(*[step for layer in layers for step in (layer, nn.SiLU())][:-1])


class ControlNet(Flux):
    """The transformer's beginning with other ends. config: its own depths; `pixels` as the control picture comes in."""

    def __init__(self, config: FluxConfig, pixels: bool = False):
        super().__init__(config)
        del self.final_layer
        width = config.hidden_size
        self.controlnet_blocks = nn.ModuleList(zeroed(nn.Linear(width, width)) for _ in self.double_blocks)
        self.controlnet_single_blocks = nn.ModuleList(zeroed(nn.Linear(width, width)) for _ in self.single_blocks)
        if pixels:
            self.input_hint_block = hint_block()
            self.pos_embed_input = nn.Linear(config.in_channels, width)  # as released; it has nothing of a position
        else:
            self.controlnet_x_embedder = zeroed(nn.Linear(config.in_channels, width))

    @property
    def pixels(self) -> bool:
        return hasattr(self, "input_hint_block")

    def embed(self, control: Tensor) -> Tensor:
        """Pixels (B, 3, 8h, 8w) in [-1, 1], or latents (B, 16, h, w) -> (B, L_img, D), constant along a trajectory."""
        if self.pixels:
            return self.pos_embed_input(latents.pack(self.input_hint_block(control)))
        return self.controlnet_x_embedder(latents.pack(control))

    def forward(self, img: Tensor, img_ids: Tensor, txt: Tensor, txt_ids: Tensor, vec: Tensor, t: Tensor,
                guidance: Tensor | None, hint: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """As `Flux.forward`, with hint (1 or B, L_img, D) of `embed` -> (B, L_img, D) per double, and per single block."""
        vec = self.condition(vec, t.to(img.dtype), guidance)
        img, txt = self.img_in(img) + hint, self.txt_in(txt)
        pe = self.positions(txt_ids, img_ids)
        double, single = [], []
        for block, out in zip(self.double_blocks, self.controlnet_blocks, strict=True):
            img, txt = block(img, txt, vec, pe)
            double.append(out(img))
        x, start = torch.cat((txt, img), dim=1), txt.shape[1]
        for block, out in zip(self.single_blocks, self.controlnet_single_blocks, strict=True):
            x = block(x, vec, pe)
            single.append(out(x[:, start:]))
        return double, single


def begun_from(model: Flux, config: FluxConfig, pixels: bool = False) -> ControlNet:
    """A branch to be trained: every tensor that it has in common with the transformer is copied; it changes nothing yet."""
    branch = ControlNet(config, pixels).to(model.img_in.weight)
    own = branch.state_dict()
    branch.load_state_dict(own | {name: tensor for name, tensor in model.state_dict().items() if name in own})
    return branch


def spread(given: list[Tensor], depth: int, rule: str) -> list[Tensor]:
    """K residuals -> one per block of `depth` (flux.md section 8.4).

    interval: the first blocks share the first residual and so on, i // ceil(depth / K) (diffusers). repeat: in turn,
    i % K (XLabs). identity: each its own, K = depth (LucidFlux).
    """
    if rule == "identity":
        if len(given) != depth:
            raise UserError(f"--control-index identity came with a ControlNet of {len(given)} blocks, expected {depth}, one "
                            "per block of the model; take interval or repeat")
        return given
    every = math.ceil(depth / len(given))
    return [given[i // every if rule == "interval" else i % len(given)] for i in range(depth)]
