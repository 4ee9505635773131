"""A judge of pictures in a style: a small classifier that tells the style of a picture and what its lone object is.

The referee knows flat paint only: stripes, sketches and neon confuse it. This network was trained on renders alone, of every
style and shape, as they are and as the autoencoder gives them back; its own accuracy on held-out renders is in the README.
Nothing trains on what it says.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux import checkpoint, weights
from flux.demo.scene import COLOURS, NEW_SHAPES, PLACES, SHAPES, STYLES, Scene

WORDS = {"style": ("", *STYLES), "shape": SHAPES + NEW_SHAPES, "colour": tuple(COLOURS), "background": tuple(COLOURS),
         "place": tuple(PLACES)}


class Reader(nn.Module):
    """Pictures (B, 3, 128, 128) in [-1, 1] -> logits (B, 53), those of WORDS one after the other."""

    def __init__(self, widths: tuple[int, ...] = (24, 48, 64, 96, 96)):
        super().__init__()
        layers, before = [], 3
        for width in widths:  # each halves the picture's edges: 128 to 4
            layers += [nn.Conv2d(before, width, 3, stride=2, padding=1), nn.GroupNorm(8, width), nn.SiLU(),
                       nn.Conv2d(width, width, 3, padding=1, groups=8), nn.SiLU()]
            before = width
        self.body = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.Linear(before * 16, 128), nn.SiLU(), nn.Linear(128, sum(map(len, WORDS.values()))))

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.body(image).flatten(1))

    def loss(self, image: Tensor, labels: Tensor) -> Tensor:
        """labels (B, 5) indices into WORDS -> cross-entropy (B,), summed over the five."""
        logits = self(image).float().split([len(words) for words in WORDS.values()], dim=1)
        return sum(F.cross_entropy(each, labels[:, i], reduction="none") for i, each in enumerate(logits))


def labels_of(scene: Scene) -> list[int]:
    thing = scene.things[0]
    said = {"style": scene.style, "shape": thing.shape, "colour": thing.colour, "background": scene.background,
            "place": thing.place}
    return [words.index(said[name]) for name, words in WORDS.items()]


@dataclass(frozen=True)
class Reading:
    """What a picture of one object shows."""

    style: str
    shape: str
    colour: str
    background: str
    place: str

    def shows(self, asked: Scene) -> bool:
        """Shape, colours and place as far as they are asked for; the style is told apart from them."""
        thing = asked.things[0]
        pairs = ((thing.shape, self.shape), (thing.colour, self.colour), (asked.background, self.background),
                 (thing.place, self.place))
        return all(word in ("", found) for word, found in pairs)


@cache
def load() -> Reader:
    with torch.device("meta"):
        reader = Reader()
    found = checkpoint.read(weights.DEMO / "reader.safetensors")
    reader.load_state_dict({name: tensor.float() for name, tensor in found.items()}, assign=True)
    return reader.eval()


@torch.inference_mode()
def read(pixels: np.ndarray, shapes: tuple[str, ...] = WORDS["shape"]) -> list[Reading]:
    """Pictures (B, 128, 128, 3) uint8 of one object each; as the referee, told of new shapes only where one is asked for."""
    image = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    logits = dict(zip(WORDS, load()(image).split([len(words) for words in WORDS.values()], dim=1), strict=True))
    logits["shape"][:, [shape not in shapes for shape in WORDS["shape"]]] = -torch.inf
    chosen = [each.argmax(1).tolist() for each in logits.values()]
    return [Reading(*(words[row[i]] for words, row in zip(WORDS.values(), chosen, strict=True))) for i in range(len(image))]
