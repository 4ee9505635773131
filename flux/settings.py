"""The flags that many commands share: what a recipe's own dataclass inherits.

`flux/cli.py` reads this file as text: the comment on a field's line is its help, so it carries the unit. No torch here.
"""

import math
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

from flux.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """Settings of every command that makes pictures."""

    model: str = "demo"  # a preset of flux/config.py: demo, dev, krea, schnell, fill, kontext, canny, depth
    weights: Path | None = None  # folder with the weights; without it FLUX_WEIGHTS, and for demo the shipped ones
    flux: Path | None = None  # file of the transformer alone; without it FLUX_MODEL, then --weights
    ae: Path | None = None  # file of the autoencoder alone; without it FLUX_AE, then --weights
    clip: Path | None = None  # file or folder of the CLIP text encoder alone
    t5: Path | None = None  # file or folder of the T5 encoder alone
    lora: tuple[str, ...] = ()  # PATH or PATH:SCALE of a LoRA in any format; may be repeated; scale 0 changes nothing
    width: int | None = None  # pixels, a multiple of 16: one token is 2 x 2 latents of 8 x 8 pixels
    height: int | None = None  # pixels, a multiple of 16
    steps: int | None = None  # Euler steps from noise to image; time grows with them
    shift: float | None = None  # moves the steps towards noise by this factor; default: by the picture's size; schnell: 1
    times: str | None = None  # the steps' own times from 1 (noise) to 0, as in 1,0.75,0.5,0.25,0, in place of --steps
    guidance: float | None = None  # distilled guidance: larger follows the prompt more and varies less
    seed: int = 0  # of the noise; picture i uses seed + i and is the same alone or among others
    num: int = 1  # pictures per prompt
    out: Path = Path("out")  # folder for the pictures; nothing in it is overwritten
    device: str = "auto"  # cpu, cuda, cuda:1, mps; auto takes the first GPU there is
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # of weights and arithmetic; auto is bf16 on GPU, else fp32
    attention: Literal["auto", "sdpa", "triton"] = "auto"  # torch's attention or our kernel; auto: the faster, if known
    store: Literal["plain", "fp8", "int8"] = "plain"  # how the transformer's weights lie in memory: in 8 bits they take half
    reuse: float | None = None  # change of the first block below which a step takes the others' work from the last; try 0.1
    compile: bool = False  # torch.compile of the transformer's blocks: a minute before the first step, then faster ones
    cuda_graphs: bool = False  # with --compile on a GPU: launch all kernels of a block at once
    strips: bool = False  # encode and decode pictures strip by strip: the same pictures in less memory
    vram: float | None = None  # GB of memory: chooses what --dtype, --store and --strips leave open (default: all there is)
    metadata: bool = True  # write into each picture how it was made, for --from

    def __post_init__(self):
        for name in ("width", "height"):
            pixels = getattr(self, name)
            if pixels is not None and (pixels < 16 or pixels % 16):
                nearest = max(16, round(pixels / 16) * 16)
                raise UserError(f"--{name} {pixels}: expected a positive multiple of 16 pixels; nearest is {nearest}")
        _at_least(1, self, "steps", "num")
        _at_least(0, self, "guidance", "seed", "reuse", "vram")
        if self.shift is not None and not self.shift > 0:
            raise UserError(f"--shift {self.shift}: expected a factor above 0, such as 3; 1 shifts nothing")
        if self.cuda_graphs and not self.compile:
            raise UserError("--cuda-graphs came without --compile, expected both; add --compile")
        if self.times is not None:
            for name in ("steps", "shift"):
                if getattr(self, name) is not None:
                    raise UserError(f"--{name} came with --times, expected one of them: the times say all; leave one out")
            self.given_times  # noqa: B018  checks them

    @property
    def given_times(self) -> list[float]:
        """Those of --times."""
        words = self.times.split(",")
        times = [float(word) if re.fullmatch(r" *([0-9]+[.]?[0-9]*|[.][0-9]+) *", word) else math.nan for word in words]
        falling = all(late < early for early, late in pairwise(times))
        if len(times) < 2 or times[0] != 1 or times[-1] != 0 or not falling:
            raise UserError(f"--times {self.times!r}: expected falling numbers from 1 to 0, such as 1,0.75,0.5,0.25,0; "
                            "a list of sigmas may lack the 0 at its end: add it")
        return times


@dataclass(frozen=True)
class Conditioned(Sampling):
    """Settings of commands whose pictures follow more than a prompt; `flux/inputs.py` reads them."""

    image: Path | None = None  # picture to start from, or with a mask to repaint; over twice the model's pixels it is shrunk
    strength: float | None = None  # way back to noise that --image goes: 0 returns it, 1 forgets it; default 0.75, masked 1
    mask: Path | None = None  # grey picture as large as --image: white is repainted, black is known; needs fill
    outpaint: str | None = None  # pixels to add around --image, left,top,right,bottom as in 64,0,64,0; needs fill
    hold: bool = True  # lead known latents straight to the picture's own; --no-hold leaves them to the model, as released
    keep: bool = False  # put the known pixels back: equal to --image where the mask is black
    repaint: float = 1.0  # share hidden of what the mask repaints: 1 all of it, as Fill was trained; less for editing LoRAs
    beside: bool = False  # draw on the right half of a canvas, with --image on the left, for editing LoRAs; needs fill
    mask_value: float | None = None  # what the model is told where the mask is white; default 1, as it was trained
    reference: tuple[Path, ...] = ()  # picture that the prompt changes or speaks of; needs kontext
    control: Path | None = None  # picture of edges or depths to follow; needs canny, depth or --controlnet
    control_from: Path | None = None  # picture whose Canny edges are followed, in place of --control
    controlnet: Path | None = None  # file of a ControlNet for FLUX.1, which follows --control
    control_scale: float = 1.0  # strength of the ControlNet
    control_start: float = 0.0  # share of the steps before the ControlNet begins
    control_end: float = 1.0  # share of the steps after which it ends
    control_index: Literal["interval", "repeat", "identity"] | None = None  # blocks its residuals go to; default: its kind's
    redux: tuple[str, ...] = ()  # PICTURE or PICTURE:STRENGTH, seen by Redux: the drawn one will be like it
    redux_weights: Path | None = None  # file of the Redux embedder alone
    siglip: Path | None = None  # file or folder of the SigLIP vision tower alone, which Redux sees with
    negative: str | None = None  # what not to draw, by true classifier-free guidance: twice the time
    cfg_scale: float | None = None  # of true classifier-free guidance, against --negative or no words; default: none
    cfg_start: float = 0.0  # share of the steps before true guidance begins
    cfg_end: float = 1.0  # share of the steps after which it ends
    fuse: str = "sum"  # how several LoRAs are weighed, a rule of lora/fuse.py: sum, mean, sqrt, ..., gates or gates:FILE
    gate_report: bool = False  # with --fuse gates: the mean gate of each LoRA by block and step, in the picture; slower
    region: tuple[str, ...] = ()  # prompt of a part, "x0,y0,x1,y1: a red circle" in shares; strength: "0,0,0.5,1 @ 3: ..."
    region_start: float = 0.0  # share of the steps before regions begin
    region_end: float = 1.0  # share of the steps after which they end

    def __post_init__(self):
        super().__post_init__()
        _at_least(0, self, "cfg_scale", "control_scale")
        for name in ("strength", "repaint", "mask_value", "control_start", "control_end", "cfg_start", "cfg_end",
                     "region_start", "region_end"):
            share = getattr(self, name)
            if share is not None and not 0 <= share <= 1:
                raise UserError(f"--{name.replace('_', '-')} {share}: expected a share from 0 to 1, such as 0.5")
        for name in ("control", "cfg", "region"):
            start, end = getattr(self, f"{name}_start"), getattr(self, f"{name}_end")
            if start >= end:
                raise UserError(f"--{name}-start {start} and --{name}-end {end}: expected start before end; change one")
        if self.negative is not None and self.cfg_scale is None:
            raise UserError("--negative came without --cfg-scale, expected how strongly to avoid it; add --cfg-scale 3")
        if self.outpaint is not None:
            self.pads  # noqa: B018  checks it

    @property
    def edits(self) -> bool:
        """The model sees what it is to change, so that a mask is not needed."""
        return self.repaint < 1 or self.beside

    @property
    def pads(self) -> tuple[int, ...]:
        """Pixels that --outpaint adds left, top, right, bottom."""
        words = ("0,0,0,0" if self.outpaint is None else self.outpaint).split(",")
        if len(words) != 4 or not all(re.fullmatch(r" *[0-9]{1,4} *", word) for word in words):
            raise UserError(f"--outpaint {self.outpaint!r}: expected pixels left,top,right,bottom; write it as 64,0,64,0")
        return tuple(map(int, words))


@dataclass(frozen=True)
class Training:
    """Settings of every training stage; the loop in train.py reads them all."""

    data: Path | None = None  # folder with pictures and captions; without it the demo's renderer draws them
    steps: int = 1000  # optimizer steps
    optimiser: str = "adamw"  # adamw; muon (orthogonal steps for blocks' matrices); or a class, as prodigyopt.Prodigy
    lr: float = 1e-4  # learning rate after warmup; a LoRA bears ten times more than a full model
    batch: int = 1  # samples per forward pass: as many as fit in memory
    accumulate: int = 1  # forward passes per optimizer step; batch * accumulate samples make one gradient
    warmup: int = 100  # optimizer steps in which lr rises from 0: Adam's first variance estimates are poor
    schedule: Literal["constant", "cosine"] = "constant"  # of lr after warmup; cosine falls to a hundredth at the end
    beta2: float = 0.99  # AdamW's memory of squared gradients; 0.99 follows short trainings better than 0.999
    weight_decay: float = 0.0  # share of each weight taken off per unit of lr, decoupled
    clip: float = 1.0  # largest gradient norm; 0 clips nothing
    ema: float = 0.0  # decay per step of the averaged weights that are saved; 0 keeps no average
    seed: int = 0  # of data order, noise and times; the same seed gives the same run
    out: Path = Path("runs")  # folder that gets one run folder per training
    resume: str = "auto"  # auto: the latest checkpoint of the run folder if any; none: afresh; or a checkpoint's path
    save_every: int = 500  # optimizer steps between checkpoints: what a crash can cost
    keep: int = 3  # checkpoints left on disk; older ones are deleted after a newer one is complete
    log_every: int = 10  # optimizer steps between lines of metrics.jsonl
    sample_every: int = 500  # optimizer steps between sample pictures, at fixed prompts and seeds; 0 draws none
    validate_every: int = 500  # optimizer steps between losses on the held-out set, at fixed times and noises; 0: none
    tensorboard: bool = False  # write the figures for TensorBoard too; needs the extra: pip install -e ".[tensorboard]"
    gradient_checkpointing: bool = False  # keep only the inputs of blocks and compute the rest again: less memory, slower
    shard: bool = False  # under torchrun, split weights, average and moments over the processes (FSDP2)
    device: str = "auto"  # cpu, cuda, cuda:1, mps; auto takes the first GPU there is
    dtype: Literal["fp32", "bf16"] = "fp32"  # of the forward pass; weights stay fp32, bf16 is autocast
    threads: int | None = None  # CPU threads; default: as many as PyTorch chooses

    def __post_init__(self):
        _at_least(1, self, "steps", "batch", "accumulate", "save_every", "keep", "log_every", "threads")
        _at_least(0, self, "warmup", "seed", "sample_every", "validate_every")
        if self.optimiser not in ("adamw", "muon") and "." not in self.optimiser:
            raise UserError(f"--optimiser {self.optimiser}: expected adamw, muon or a class by its import path, such as "
                            "prodigyopt.Prodigy")
        if not self.lr > 0:
            raise UserError(f"--lr {self.lr}: expected a learning rate above 0, such as 1e-4")
        if not 0 <= self.ema < 1:
            raise UserError(f"--ema {self.ema}: expected a decay from 0 to below 1, such as 0.999")


@dataclass(frozen=True)
class FineTuning(Training):
    """Settings of every training on a folder of captioned pictures; `flux/finetune.py` reads them."""

    model: str = "demo"  # a preset of flux/config.py: demo, dev, krea, schnell
    weights: Path | None = None  # folder with the weights; without it FLUX_WEIGHTS, and for demo the shipped ones
    edge: int | None = None  # pixels: pictures go into buckets of about edge x edge; default: the model's own size
    guidance: float = 1.0  # distilled guidance the transformer is told; 1 is the plain conditional velocity
    drop: float = 0.1  # share of captions left empty
    times: Literal["shift", "sampled", "logit-normal", "uniform"] = (  # at which noise levels; shift: logit-normal, moved as
        "shift")  # sampling at this size is; sampled: as densely as its steps are, up to pure noise
    held_out: float = 0.05  # share of the pictures that training never sees, for the validation loss
    cache: bool = True  # make latents and text features once, into the folder cache/ of --out, which runs share

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.held_out < 1:
            raise UserError(f"--held-out {self.held_out}: expected a share from 0 to below 1, such as 0.05")


def _at_least(least: int, settings, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: expected {least} or more")
