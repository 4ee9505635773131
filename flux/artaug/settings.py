"""The flags of ArtAug's stages; `flux/cli.py` reads this file as text. Where the paper is silent, defaults are ours."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flux.errors import UserError
from flux.settings import _at_least


@dataclass(frozen=True)
class Asking:
    """Settings of every command that asks a critic."""

    vlm: str | None = None  # address of the critic, such as http://localhost:8000; a key comes from VLM_API_KEY
    vlm_model: str | None = None  # name of its model, where the server has several
    vlm_timeout_s: float = 120.0  # seconds for a picture, tries and pauses included


@dataclass(frozen=True)
class Making(Asking):
    """Settings of every stage that draws pairs and judges them."""

    prompts: Path | None = None  # file with one prompt a line; # starts a comment; the demo has captions of its own
    count: int = 300  # prompts of an iteration; no prompt is used twice
    model: str = "demo"  # a preset of flux/config.py: demo, dev, krea, schnell
    weights: Path | None = None  # folder with the weights; without it FLUX_WEIGHTS, and for demo the shipped ones
    lora: tuple[str, ...] = ()  # PATH or PATH:SCALE of LoRAs that the base model wears all the time
    width: int | None = None  # pixels, a multiple of 16
    height: int | None = None  # pixels, a multiple of 16
    steps: int | None = None  # Euler steps of a picture
    guidance: float | None = None  # distilled guidance, of drawing and of learning
    region_scale: float = 100.0  # times the strength of every edit: 1 as published, 100 replaces the prompt inside
    mode: Literal["blend", "attention"] = "blend"  # a pass per region and step; or one pass with masked attention
    batch: int = 16  # pictures, times passes of a step, that go through the transformer together
    clip_weights: Path | None = None  # file or folder of CLIP ViT-L/14 with both towers: fidelity, structure
    aesthetic_weights: Path | None = None  # file of LAION's aesthetic head on it
    pickscore_weights: Path | None = None  # file or folder of PickScore (ViT-H/14)
    gain: float = 0.25  # least gain in the aesthetic score
    gain_percentile: float | None = None  # and least percentile of it among all; default: 70, demo 30
    floor_percentile: float | None = None  # of the scores before, that the score after reaches; default: 60, demo 30
    fidelity: float | None = None  # least change of the similarity with the prompt; default: -0.01, demo -0.5
    structure: tuple[float, ...] = ()  # similarity of before and after, least and most; default 0.8 0.985, demo 0.3 0.999
    change: float = 0.05  # least mean absolute change of latents, in their standard deviation
    target: int = 200  # pairs to keep at most, spread over what they show
    seed: int = 0  # of prompts, noise and everything drawn
    out: Path = Path("runs")  # folder that gets the run folder artaug
    device: str = "auto"  # cpu, cuda, cuda:1, mps; auto takes the first GPU there is
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # of frozen weights; auto is bf16 on GPU, else fp32
    threads: int | None = None  # CPU threads; default: as many as PyTorch chooses
    TOGETHER = True  # under torchrun every process runs the stage

    def __post_init__(self):
        _at_least(1, self, "count", "batch", "target", "steps", "threads")
        _at_least(0, self, "seed", "region_scale", "change", "guidance")
        if self.structure and (len(self.structure) != 2 or self.structure[0] >= self.structure[1]):
            raise UserError(f"--structure {self.structure}: expected the least and the most, as --structure 0.8 --structure "
                            "0.985")

    @property
    def run_folder(self) -> Path:
        return self.out / "artaug"

    @property
    def ledger(self) -> Path:
        return self.run_folder / "critic"

    def limits(self) -> tuple[float, float, float, tuple[float, float]]:
        """Percentiles of gain and floor, least fidelity, bounds of structure, where no flag says them.

        The demo's own pair of towers reads more than CLIP: a picture in another light is 0.1 to 0.4 less like its caption. A
        bound in the midst of these leaves the light to chance, and a LoRA learns half a way. And its pictures are few.
        """
        demo = self.model.partition("-")[0] == "demo"
        given = (self.gain_percentile, self.floor_percentile, self.fidelity, self.structure or None)
        usual = (30.0, 30.0, -0.5, (0.3, 0.999)) if demo else (70.0, 60.0, -0.01, (0.8, 0.985))
        return tuple(default if value is None else value for value, default in zip(given, usual, strict=True))


@dataclass(frozen=True)
class Learning(Making):
    """Settings of the training on pairs."""

    method: Literal["velocity", "two_stage", "paired_noise", "plain"] = "velocity"  # that of the regions; anchor, then
    #                                                                   difference, as published; or the ablations
    grouping: Literal["groups", "per_pair", "joint"] = "joint"  # pairs that one LoRA is trained on; then they are averaged
    group: int = 8  # pairs of a group
    learn_steps: int = 600  # most optimizer steps of a stage
    learn_batch: int = 8  # pictures per optimizer step
    lr: float = 1e-3  # learning rate of AdamW; 1e-4 for FLUX.1-dev
    rank: int = 16  # of each LoRA, and of the average
    target_layers: str = "blocks"  # layers that get a pair, a regular expression
    weighting: Literal["bell", "none"] = "bell"  # of times: most in the middle, as published; or all the same
    keep_anchor: bool = False  # keep the LoRAs of the first stage too

    def __post_init__(self):
        super().__post_init__()
        _at_least(1, self, "group", "learn_steps", "learn_batch", "rank")
