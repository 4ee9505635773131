"""Second stage of the demo world: a CLIP text tower and a SigLIP vision tower as a pair, and both tokenizers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux import checkpoint, conditioning, draws, weights
from flux.clip import ClipText
from flux.config import DEMO
from flux.demo import scene as world
from flux.demo.autoencoder_stage import to_image
from flux.settings import Training
from flux.siglip import SiglipVision
from flux.tokenizers import ClipTokenizer, train_clip_bpe, train_t5_unigram


@dataclass(frozen=True)
class TrainPair(Training):
    """CLIP's text tower and a SigLIP vision tower, trained to tell which caption belongs to which picture."""

    steps: int = 600
    lr: float = 1e-3
    batch: int = 64
    schedule: Literal["constant", "cosine"] = "cosine"
    ema: float = 0.99

    def task(self):
        return PairTask(self)


class PairTask:
    """Symmetric cross-entropy over the batch (arXiv 2103.00020, figure 3). Both towers end in the same width, so that
    neither needs a projection and the row that FLUX takes is itself in the shared space."""

    ahead = True  # rendering

    def __init__(self, settings: TrainPair):
        self.settings = settings
        torch.manual_seed(draws.seed_of(settings.seed, "pair"))
        train_tokenizers()
        self.tokenizer = ClipTokenizer(weights.DEMO / "tokenizer")
        self.model = nn.ModuleDict({"text": ClipText(DEMO.clip), "vision": SiglipVision(DEMO.siglip)})
        self.model.register_parameter("logit_scale", nn.Parameter(torch.tensor(np.log(1 / 0.07), dtype=torch.float32)))

    def trainable(self) -> nn.Module:
        return self.model

    def pairs(self, rng: np.random.Generator, held_out: bool = False):
        scenes = [world.sample_scene(rng, held_out) for _ in range(self.settings.batch)]
        captions = [world.sample_caption(scene, rng).text for scene in scenes]
        image = to_image(np.stack([world.render(scene)[0] for scene in scenes]))
        return image, self.tokenizer(captions, conditioning.CLIP_LENGTH)

    def batch(self, step: int, micro: int):
        return self.pairs(draws.rng(self.settings.seed, "pairs", step, micro))

    def held_out(self) -> list:
        return [self.pairs(draws.rng("held out"), held_out=True)]

    def logits(self, batch) -> Tensor:
        image, ids = batch
        seen = self.model["vision"].pool(self.model["vision"](image))
        _, said = self.model["text"](ids)
        return self.model.logit_scale.exp().clamp(max=100) * F.normalize(seen, dim=-1) @ F.normalize(said, dim=-1).T

    def loss(self, batch) -> Tensor:
        logits = self.logits(batch)
        own = torch.arange(len(logits))
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2

    def preview(self) -> None:
        logits = self.logits(self.pairs(draws.rng(self.settings.seed, "preview"), held_out=True))
        right = (logits.argmax(1) == torch.arange(len(logits))).float().mean()
        print(f"held-out pictures that find their caption among {len(logits)}: {100 * right:.0f} %", flush=True)

    def save(self, folder: Path) -> None:
        about = {"config": str(self.settings)}
        checkpoint.save(weights.DEMO / "clip.safetensors", half(self.model["text"].state_dict()), about)
        checkpoint.save(weights.DEMO / "siglip.safetensors", half(self.model["vision"].state_dict()), about)


def train_tokenizers() -> None:
    """Both vocabularies from the caption grammar, with the words for styles and new shapes that LoRAs will teach."""
    rng = draws.rng("tokenizers")
    corpus = []
    for i in range(20_000):
        shapes = world.SHAPES + world.NEW_SHAPES if i % 4 == 0 else world.SHAPES
        style = str(rng.choice(world.STYLES)) if i % 4 == 1 else ""
        corpus.append(world.sample_caption(world.sample_scene(rng, shapes=shapes, style=style), rng).text)
    train_clip_bpe(corpus, DEMO.clip.vocab_size, weights.DEMO / "tokenizer")
    train_t5_unigram(corpus, DEMO.t5.vocab_size, weights.DEMO / "tokenizer_2" / "spiece.model")


def half(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As shipped: bfloat16."""
    return {name: tensor.bfloat16() for name, tensor in state.items()}
