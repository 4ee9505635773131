"""All that stays constant along a trajectory: prompt features, coordinates, guidance, what pictures say; and the velocity
under them.

`TextEncoders` turns prompts into features once; `velocity(model, condition)` closes over them. Every member of the family
is another condition: Fill, Canny and Depth join channels to the noisy tokens, Kontext appends tokens to them, Redux
appends tokens to the text, ControlNets add residuals inside. The sampler and the loss never know.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from flux import latents, stream, weights
from flux.clip import ClipText
from flux.config import Preset
from flux.control import ControlNet, spread
from flux.flow import Velocity
from flux.model import Flux
from flux.reuse import Reusing
from flux.t5 import T5Encoder
from flux.tokenizers import ClipTokenizer, T5Tokenizer

CLIP_LENGTH = 77  # tokens, of every CLIP text tower
Residuals = Callable[[Tensor, Tensor], list[Tensor] | None]  # (img (B, L, 64), t (B,)) -> what Flux.forward adds inside


@dataclass(frozen=True)
class Condition:
    """txt (B, L_txt, 4096), vec (B, 768), ids (1, L, 3), guidance: what the network sees beside the noisy tokens."""

    txt: Tensor
    vec: Tensor
    txt_ids: Tensor
    img_ids: Tensor  # of the noisy tokens, then of the references
    guidance: float
    channels: Tensor | None = None  # (B, L_img, C), joined to the channels of the noisy tokens: Fill, Canny, Depth
    references: Tensor | None = None  # (B, L_ref, 64), tokens that follow the noisy ones: Kontext

    def __getitem__(self, rows: slice) -> "Condition":
        """Some of the pictures of a batch."""
        channels, references = (x if x is None else x[rows] for x in (self.channels, self.references))
        return replace(self, txt=self.txt[rows], vec=self.vec[rows], channels=channels, references=references)


class TextEncoders:
    """CLIP and T5 with their tokenizers: prompts -> (txt, vec). Built, used once and dropped: T5-XXL is 9.5 GB."""

    def __init__(self, found: Mapping[str, weights.Found], preset: Preset, dtype: torch.dtype, device: torch.device,
                 stream_t5: bool = False):
        self.length = preset.t5_length
        self.clip_tokenizer = ClipTokenizer(found["tokenizer"].path)
        self.t5_tokenizer = T5Tokenizer(found["tokenizer_2"].path)
        self.clip, self.t5 = networks(found, preset, dtype, device, stream_t5)

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


def networks(found: Mapping[str, weights.Found], preset: Preset, dtype: torch.dtype, device: torch.device,
             stream_t5: bool = False) -> tuple[ClipText, T5Encoder]:
    """The two encoders, T5 whole or block by block."""
    clip = weights.load_clip(found, preset.clip, dtype, device)
    if not stream_t5:
        return clip, weights.load_t5(found, preset.t5, dtype, device)
    t5 = weights.load_t5(found, preset.t5)  # mapped from its file
    return clip, stream.streamed(t5, dtype, device, lambda: weights.unchanged(found["t5"]))


def condition(txt: Tensor, vec: Tensor, width: int, height: int, guidance: float) -> Condition:
    """Features of B prompts, for pictures of width x height pixels."""
    h, w = height // 8, width // 8
    txt_ids, img_ids = latents.text_ids(txt.shape[1], txt.device), latents.image_ids(h, w, device=txt.device)
    return Condition(txt, vec, txt_ids, img_ids, guidance)


def with_channels(cond: Condition, channels: Tensor) -> Condition:
    """channels (1 or B, L_img, C) beside the noisy tokens: `fill.tokens`, or a control picture's packed latents."""
    return replace(cond, channels=channels.expand(len(cond.txt), -1, -1))


def with_references(cond: Condition, pictures: Sequence[Tensor]) -> Condition:
    """Latents (1 or B, 16, h, w) of reference pictures of any size; picture k is frame k, the drawn one frame 0.

    FLUX.1-Kontext was trained with one picture; frames above 1 follow the ids' meaning, not a released example.
    """
    ids = [latents.image_ids(*x.shape[2:], frame=k, device=x.device) for k, x in enumerate(pictures, 1)]
    tokens = torch.cat([latents.pack(x) for x in pictures], dim=1).expand(len(cond.txt), -1, -1)
    return replace(cond, references=tokens, img_ids=torch.cat((cond.img_ids, *ids), dim=1))


def with_image_tokens(cond: Condition, tokens: Tensor) -> Condition:
    """Redux's tokens (1 or B, N, 4096) of one or several pictures, after the T5 tokens and with ids of zero as these."""
    txt = torch.cat((cond.txt, tokens.expand(len(cond.txt), -1, -1)), dim=1)
    return replace(cond, txt=txt, txt_ids=latents.text_ids(txt.shape[1], txt.device))


def span(times: list[float], start: float, end: float) -> tuple[float, float]:
    """First and last time of the steps between two shares in [0, 1] of all steps; (0, 1), which holds no time, if none."""
    inside = times[round(start * (len(times) - 1)):round(end * (len(times) - 1))]
    return (inside[0], inside[-1]) if inside else (0.0, 1.0)


def within(t: Tensor, span: tuple[float, float]) -> bool:
    """Whether a step at t (B,), one time for all, is in the span; times that t's dtype cannot tell apart count as one."""
    first, last = torch.tensor(span, dtype=t.dtype).tolist()
    return last <= t[0].item() <= first


def velocity(model: Flux | Reusing, cond: Condition, residuals: Residuals | None = None) -> Velocity:
    """The model under a condition, as a function of the noisy tokens and the time alone."""
    guidance = None
    if model.config.guidance_embed:
        guidance = torch.full((len(cond.txt),), cond.guidance, dtype=cond.txt.dtype, device=cond.txt.device)

    def v(img: Tensor, t: Tensor) -> Tensor:
        added, length = residuals(img, t) if residuals else None, img.shape[1]
        if cond.channels is not None:
            img = torch.cat((img, cond.channels), dim=-1)
        if cond.references is not None:
            img = torch.cat((img, cond.references), dim=1)
            added = added and [F.pad(x, (0, 0, 0, img.shape[1] - length)) for x in added]
        return model(img, cond.img_ids, cond.txt, cond.txt_ids, cond.vec, t, guidance, added)[:, :length]
    return v


def control(branch: ControlNet, hint: Tensor, cond: Condition, depths: tuple[int, int], rule: str, scale: float = 1.0,
            span: tuple[float, float] = (1.0, 0.0)) -> Residuals:
    """What a ControlNet adds inside, for a model of so many double and single blocks.

    hint (1 or B, L_img, D) of `embed`; `scale` times the branch's answer, in the steps of a `span`.
    """
    guidance = None
    if branch.config.guidance_embed:
        guidance = torch.full((len(cond.txt),), cond.guidance, dtype=cond.txt.dtype, device=cond.txt.device)

    def added(img: Tensor, t: Tensor) -> list[Tensor] | None:
        if not within(t, span):
            return None
        ids = cond.img_ids[:, :img.shape[1]]
        answer = branch(img, ids, cond.txt, cond.txt_ids, cond.vec, t, guidance, hint)
        return [x for given, depth in zip(answer, depths, strict=True) if given
                for x in spread([scale * y for y in given], depth, rule)]
    return added


def guided(both: Velocity, plain: Velocity, scale: float, span: tuple[float, float]) -> Velocity:
    """Classifier-free guidance (arXiv 2207.12598) in the steps of a `span`, the plain velocity in the others.

    both: the velocity of a doubled batch, under the prompts and then under the negative ones.
    """
    def v(img: Tensor, t: Tensor) -> Tensor:
        if not within(t, span):
            return plain(img, t)
        wanted, unwanted = both(torch.cat((img, img)), torch.cat((t, t))).chunk(2)
        return unwanted + scale * (wanted - unwanted)
    return v
