"""All that stays constant along a trajectory: prompt features, coordinates, guidance; and the velocity under them.

`TextEncoders` turns prompts into features once; `velocity(model, condition)` closes over them. Other systems wrap the
velocity or build another condition; the sampler and the loss never know.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flux import latents, weights
from flux.config import Preset
from flux.flow import Velocity
from flux.model import Flux
from flux.tokenizers import ClipTokenizer, T5Tokenizer

CLIP_LENGTH = 77  # tokens, of every CLIP text tower


@dataclass(frozen=True)
class Condition:
    """txt (B, L_txt, 4096), vec (B, 768), ids (1, L, 3), guidance: what the network sees beside the noisy tokens."""

    txt: Tensor
    vec: Tensor
    txt_ids: Tensor
    img_ids: Tensor
    guidance: float

    def __getitem__(self, rows: slice) -> "Condition":
        """Some of the pictures of a batch."""
        return Condition(self.txt[rows], self.vec[rows], self.txt_ids, self.img_ids, self.guidance)


class TextEncoders:
    """CLIP and T5 with their tokenizers: prompts -> (txt, vec). Built, used once and dropped: T5-XXL is 9.5 GB."""

    def __init__(self, found: Mapping[str, weights.Found], preset: Preset, dtype: torch.dtype, device: torch.device):
        self.length = preset.t5_length
        self.clip_tokenizer = ClipTokenizer(found["tokenizer"].path)
        self.t5_tokenizer = T5Tokenizer(found["tokenizer_2"].path)
        self.clip = weights.load_clip(found, preset.clip, dtype, device).eval()
        self.t5 = weights.load_t5(found, preset.t5, dtype, device).eval()

    @torch.inference_mode()
    def __call__(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """B prompts -> txt (B, L_txt, 4096), vec (B, 768). One warning per prompt that an encoder cuts off."""
        device = next(self.t5.parameters()).device
        for prompt in dict.fromkeys(prompts):
            self.warn_if_cut(prompt)
        txt = self.t5(self.t5_tokenizer(prompts, self.length).to(device))
        _, vec = self.clip(self.clip_tokenizer(prompts, CLIP_LENGTH).to(device))
        return txt, vec

    def warn_if_cut(self, prompt: str) -> None:
        cuts = []
        encoders = (("CLIP", self.clip_tokenizer, CLIP_LENGTH), ("T5", self.t5_tokenizer, self.length))
        for name, tokenizer, length in encoders:
            needed, dropped = tokenizer.dropped(prompt, length)
            if dropped:
                cuts.append(f"{name} reads {length} of its {needed} tokens and drops {dropped!r}")
        if cuts:
            print(f"warning: the prompt is long: {'; '.join(cuts)}", file=sys.stderr)


def condition(txt: Tensor, vec: Tensor, width: int, height: int, guidance: float) -> Condition:
    """Features of B prompts, for pictures of width x height pixels."""
    h, w = height // 8, width // 8
    txt_ids, img_ids = latents.text_ids(txt.shape[1], txt.device), latents.image_ids(h, w, device=txt.device)
    return Condition(txt, vec, txt_ids, img_ids, guidance)


def velocity(model: Flux, cond: Condition) -> Velocity:
    """The model under a condition, as a function of the noisy tokens and the time alone."""
    guidance = None
    if model.config.guidance_embed:
        guidance = torch.full((len(cond.txt),), cond.guidance, dtype=cond.txt.dtype, device=cond.txt.device)

    def v(img: Tensor, t: Tensor) -> Tensor:
        return model(img, cond.img_ids, cond.txt, cond.txt_ids, cond.vec, t, guidance)
    return v
