"""CLIP-IQA (arXiv 2207.12396): a picture is good as far as CLIP finds it nearer to "Good photo." than to "Bad photo.".

On the towers of ViT-L/14 as OpenAI released them; the paper's figures are of a ResNet, so scores differ and their order is
what counts. Read `flux/clip.py` first.
"""

from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

from flux import checkpoint, weights
from flux.checkpoint import refuse
from flux.clip import PIXEL_MEAN, PIXEL_STD, Clip
from flux.config import ClipTextConfig, ClipVisionConfig
from flux.tokenizers import ClipTokenizer

PROMPTS = ("Good photo.", "Bad photo.")  # the paper's antonyms


class ClipIqa:
    def __init__(self, clip: Clip, ids: Tensor, size: int):
        """ids (2, L): PROMPTS, tokenized; size: pixels of an edge that the tower takes."""
        self.clip, self.ids, self.size = clip, ids, size

    @torch.inference_mode()
    def __call__(self, pil: Image.Image) -> float:
        """In [0, 1]; 1 is good. The whole picture is seen, reduced and cut to a square, as CLIP sees it."""
        edge = self.size
        pil = ImageOps.fit(pil, (edge, edge), Image.Resampling.BICUBIC)
        image = torch.frombuffer(bytearray(pil.tobytes()), dtype=torch.uint8).view(edge, edge, 3).permute(2, 0, 1) / 255
        mean, std = (torch.tensor(part)[:, None, None] for part in (PIXEL_MEAN, PIXEL_STD))
        return self.clip(((image - mean) / std)[None], self.ids)[0].softmax(0)[0].item()


def load(folder: Path, text: ClipTextConfig | None = None, vision: ClipVisionConfig | None = None) -> ClipIqa:
    """From the folder of openai/clip-vit-large-patch14: model.safetensors, vocab.json, merges.txt."""
    text, vision = text or ClipTextConfig(), vision or ClipVisionConfig()
    state = checkpoint.read(folder)
    if "visual_projection.weight" not in state:
        raise refuse(folder, "has no tower for pictures beside the one for text", "the folder of "
                     "openai/clip-vit-large-patch14", "name that folder")
    own = {name: state[name] for name in state if not name.endswith(".position_ids")}
    clip = weights.load(lambda: Clip(text, vision), own, torch.float32, source=folder)
    return ClipIqa(clip, ClipTokenizer(folder)(list(PROMPTS)), vision.image_size)
