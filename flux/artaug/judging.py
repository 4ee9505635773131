"""How pictures of prompts are told, base against another: means, gains with their intervals, wins.

The score is the measuring critic's, which no filter of pairs reads; fidelity is the scorer's; in the demo the referee says
whether what was asked for is there: `right` as everywhere (number, shapes, colours, places, relation), `all` with the words
for size, light and finish too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flux.artaug import statistics
from flux.demo import referee
from flux.demo.scene import Caption
from vlm_client import measuring


@dataclass
class Judged:
    """Of each picture: score, fidelity, whether it is right, which share of what was asked it shows; embeddings."""

    score: np.ndarray
    parts: dict[str, np.ndarray]
    fidelity: np.ndarray
    right: np.ndarray | None
    named: np.ndarray | None
    seen: Tensor

    def told(self) -> dict[str, float]:
        figures = {"score": self.score.mean(), "fidelity": self.fidelity.mean()}
        if self.right is not None:
            figures |= {"right": 100 * self.right.mean(), "all": 100 * self.named.mean()}
        return {name: round(float(value), 4) for name, value in figures.items()}


def judge(pils: Sequence[Image.Image], captions: Sequence[Caption], scorer) -> Judged:
    rows, seen = [], []
    for first in range(0, len(pils), 32):
        found = scorer.of(pils[first:first + 32], [caption.text for caption in captions[first:first + 32]])
        rows += found[0]
        seen.append(found[1])
    scores = [measuring.scores(pil) for pil in pils]
    parts = {name: np.array([each[name] for each in scores]) for name in scores[0]}
    right = named = None
    if all(caption.asked for caption in captions):
        verdicts = [referee.judge(np.asarray(pil), caption.asked) for pil, caption in zip(pils, captions, strict=True)]
        right = np.array([verdict.right for verdict in verdicts], float)
        named = np.array([all(verdict.held.values()) for verdict in verdicts], float)
    fidelity = np.array([row["fidelity"] for row in rows])
    return Judged(np.mean(list(parts.values()), axis=0), parts, fidelity, right, named, torch.cat(seen))


def against(base: Judged, other: Judged) -> dict:
    """Paired figures: gains with 95 % bootstrap intervals, wins, ties, losses and the interval of wins' share."""
    gains = other.score - base.score
    wins = statistics.win_tie_lose(gains)
    figures = {"gain": statistics.interval(gains), "wins": wins, "win share": statistics.wilson(wins[0], len(gains)),
               "fidelity": statistics.interval(other.fidelity - base.fidelity)}
    if base.right is not None:
        figures["right"] = statistics.interval(100 * (other.right - base.right))
        figures["all"] = statistics.interval(100 * (other.named - base.named))
    return figures


def diversity(seen: Tensor, seeds: int) -> float:
    """Mean 1 - cosine between pictures of one prompt; rows are prompts times seeds."""
    away = []
    for group in seen.view(-1, seeds, seen.shape[-1]):
        cosines = group @ group.T
        away.append((1 - cosines[~torch.eye(seeds, dtype=torch.bool)]).mean())
    return float(torch.stack(away).mean())
