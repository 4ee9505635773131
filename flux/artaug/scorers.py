"""What pairs are judged by, each scorer for one question and written by hand on released weights:

    aesthetic   how good a picture looks         LAION's predictor on CLIP ViT-L/14; demo: a palette's range in OKLab
    fidelity    whether it shows the prompt      CLIP similarity of picture and prompt; demo: the demo's own pair
    structure   whether it is the same picture   CLIP similarity of two pictures; demo: the same
    opinion     a second taste                   PickScore, ViT-H/14 (arXiv 2305.01569); demo: the entropy of tones

The demo's are for a world that CLIP never saw. None of them is the measuring critic, by which results are told.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from flux import checkpoint, naming, pictures, weights
from flux.clip import H14_TEXT, H14_VISION, PIXEL_MEAN, PIXEL_STD, AestheticHead, Clip
from flux.conditioning import CLIP_LENGTH
from flux.config import ClipTextConfig, ClipVisionConfig
from flux.errors import UserError
from flux.tokenizers import ClipTokenizer

KINDS = {  # what a file is -> its network; strictly these tensors, position_ids of old files aside
    "clip": partial(Clip, ClipTextConfig(), ClipVisionConfig()),
    "pickscore": partial(Clip, H14_TEXT, H14_VISION),
    "aesthetic": AestheticHead,
}


def load(kind: str, path: Path, device: torch.device | str = "cpu") -> nn.Module:
    """One of KINDS from a file, or the folder of a Hugging Face model; CheckpointError for anything else."""
    state = checkpoint.read(path)
    own = ((name, (name,), naming.same) for name in state if not name.endswith("embeddings.position_ids"))
    return weights.load(KINDS[kind], naming.Renamed(state, own, path), torch.float32, device, path)


def pixels(pils: Sequence[Image.Image], edge: int) -> Tensor:
    """As CLIP was shown pictures: the shorter edge resized to `edge`, bicubic, the middle cut out -> (B, 3, edge, edge)."""
    rows = []
    for pil in pils:
        scale = edge / min(pil.size)
        pil = pil.convert("RGB").resize([max(edge, int(side * scale)) for side in pil.size], Image.Resampling.BICUBIC)
        left, top = (pil.width - edge) // 2, (pil.height - edge) // 2
        rows.append(np.asarray(pil.crop((left, top, left + edge, top + edge)), np.float32) / 255)
    image = torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
    return (image - mean) / std


class Released:
    """CLIP ViT-L/14, LAION's head and PickScore, from files."""

    def __init__(self, files: Mapping[str, Path | None], tokenizer: Path, device: torch.device):
        missing = [f"--{name}-weights" for name in KINDS if not files.get(name)]
        if missing:
            raise UserError(f"{', '.join(missing)} came without a file, expected CLIP ViT-L/14, LAION's aesthetic head and "
                            "PickScore as safetensors; they are at huggingface.co/openai/clip-vit-large-patch14, "
                            "github.com/christophschuhmann/improved-aesthetic-predictor and huggingface.co/yuvalkirstain/"
                            "PickScore_v1")
        self.device, self.tokenizer = device, ClipTokenizer(tokenizer)
        self.clip, self.pick, self.head = (load(kind, files[kind], device) for kind in ("clip", "pickscore", "aesthetic"))
        self.names = {"aesthetic": "LAION aesthetic predictor", "fidelity": "CLIP ViT-L/14", "structure": "CLIP ViT-L/14",
                      "opinion": "PickScore"}

    @torch.inference_mode()
    def of(self, pils: Sequence[Image.Image], prompts: Sequence[str]) -> tuple[list[dict[str, float]], Tensor]:
        """Scores of each picture under its prompt; and unit embeddings of the pictures (B, P)."""
        ids = self.tokenizer(list(prompts), CLIP_LENGTH).to(self.device)
        image = self.clip.embed_image(pixels(pils, 224).to(self.device))
        seen, said = F.normalize(image, dim=-1), F.normalize(self.clip.embed_text(ids), dim=-1)
        picked = F.cosine_similarity(self.pick.embed_image(pixels(pils, 224).to(self.device)), self.pick.embed_text(ids))
        columns = self.head(image), (seen * said).sum(-1), self.pick.logit_scale.exp() * picked
        rows = torch.stack(columns, dim=1).float().tolist()
        return [dict(zip(("aesthetic", "fidelity", "opinion"), row, strict=True)) for row in rows], seen.cpu()


class Demo:
    """The demo's contrastive pair, and two tastes that are arithmetic on pixels."""

    names = {"aesthetic": "range of an OKLab palette", "fidelity": "demo pair", "structure": "demo pair",
             "opinion": "entropy of tones"}

    def __init__(self, found: Mapping[str, weights.Found], preset):
        self.text = weights.load_clip(found, preset.clip, torch.float32)
        self.vision = weights.load_siglip(found, preset.siglip, torch.float32)
        self.tokenizer, self.edge = ClipTokenizer(found["tokenizer"].path), preset.siglip.image_size

    @torch.inference_mode()
    def of(self, pils: Sequence[Image.Image], prompts: Sequence[str]) -> tuple[list[dict[str, float]], Tensor]:
        edge = (self.edge, self.edge)
        image = torch.cat([pictures.to_tensor(pil if pil.size == edge else pil.resize(edge)) for pil in pils])
        seen = F.normalize(self.vision.pool(self.vision(image)), dim=-1)
        said = F.normalize(self.text(self.tokenizer(list(prompts), CLIP_LENGTH))[1], dim=-1)
        rows = [{"aesthetic": palette(pil), "fidelity": float(cosine), "opinion": tones(pil)}
                for pil, cosine in zip(pils, (seen * said).sum(-1), strict=True)]
        return rows, seen


def palette(pil: Image.Image) -> float:
    """1 to 10: how far lightness reaches, from its 5th to its 95th percentile, and how far hues lie apart, in OKLab."""
    lightness, a, b = np.moveaxis(oklab(pil), -1, 0)
    low, high = np.percentile(lightness, (5, 95))
    return float(1 + 9 * (0.7 * min(1.0, (high - low) / 0.6) + 0.3 * min(1.0, np.hypot(a.std(), b.std()) / 0.15)))


def tones(pil: Image.Image) -> float:
    """1 to 10: entropy of 32 steps of OKLab lightness, as a share of the largest there is."""
    share = np.histogram(oklab(pil)[..., 0], 32, (0, 1))[0] / (pil.width * pil.height)
    share = share[share > 0]
    return float(1 + 9 * -(share * np.log2(share)).sum() / 5)


def oklab(pil: Image.Image) -> np.ndarray:
    """sRGB -> (H, W, 3) OKLab (Ottosson 2020): lightness in [0, 1], a, b."""
    srgb = np.asarray(pil.convert("RGB"), np.float64) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    cones = linear @ np.array([[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
                               [0.0883024619, 0.2817188376, 0.6299787005]]).T
    return np.cbrt(cones) @ np.array([[0.2104542553, 0.7936177850, -0.0040720468],
                                      [1.9779984951, -2.4285922050, 0.4505937099],
                                      [0.0259040371, 0.7827717662, -0.8086757660]]).T


def choose(artist, settings) -> Released | Demo:
    """The demo's for the demo's models; for the others those of the files named by flags."""
    if artist.preset.name.partition("-")[0] == "demo":
        weights.require(artist.found, "siglip")
        return Demo(artist.found, artist.preset)
    files = {kind: getattr(settings, f"{kind}_weights") for kind in KINDS}
    return Released(files, artist.found["tokenizer"].path, artist.place)
