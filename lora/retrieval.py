"""From a vector to the LoRAs nearest to it in an index, exactly, and to silence where none is near enough.

A search reads every row once, in 8 bits, and looks again, in float32, at the few hundred best. The error of the coarse
similarity is bounded (`roughly`), so it is known when no row outside can belong to the answer; until then more are looked
at. Then come the rules of section 2.4: a least similarity, kinds, exclusions, and maximal marginal relevance (Carbonell and
Goldstein 1998), which keeps three copies of one LoRA from being the three best.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flux.errors import UserError
from lora.index import LANES, Calibration, Index, key_of

TOGETHER = 512  # blocks of the coarse copy in one call, 49,152 LoRAs
FIRST = 512  # rows that are looked at again, at first
ROUNDING = 1e-5  # more than float32 sums of products of unit vectors are wrong by


@dataclass(frozen=True)
class Hit:
    id: str
    file: Path
    similarity: float  # cosine
    probability: float | None  # of being right, where the index is calibrated
    about: dict  # the LoRA's line


@dataclass(frozen=True)
class Answer:
    """Best first; fewer than were asked for, or none, where no more are near enough."""

    hits: tuple[Hit, ...]
    gone: tuple[str, ...] = ()  # ids that would have been in it, but whose files are not there any more


def query(index: Index, vector: Tensor, k: int = 3, min_sim: float | None = None, kinds: Sequence[str] = (),
          exclude: Sequence[str] = (), diversity: float = 0.3) -> Answer:
    """vector (d,) of any length -> up to k LoRAs.

    min_sim: None is the calibrated one, if there is one. kinds: only of these. exclude: ids or hashes. diversity: weight of
    a LoRA's likeness to those chosen before it, 0 to 1.
    """
    if k < 1 or not 0 <= diversity <= 1:
        raise UserError(f"{k} LoRAs, diversity {diversity:g}; expected at least 1 and a weight from 0 to 1; change them")
    q = checked(index, vector)
    if min_sim is None:
        min_sim = index.calibration.min_sim if index.calibration else -1.0
    allowed = admitted(index, kinds, exclude)
    most = len(index) if allowed is None else int(allowed.sum())
    count = min(most, max(32, 8 * k))
    while True:  # until enough of them have a file
        rows, similarities = nearest(index, q, count, allowed)
        near = similarities >= min_sim
        rows, similarities = rows[near], similarities[near]
        hits, gone = [], []
        for i in marginal(index.vectors[rows].float(), similarities, diversity):
            about = index.row(int(rows[i]))
            file = index.folder / about["file"]
            if not file.is_file():
                gone.append(about["id"])
                continue
            hits.append(Hit(about["id"], file, similarities[i].item(), probability(index, similarities[i]), about))
            if len(hits) == k:
                break
        if len(hits) == k or count == most or not near.all():
            return Answer(tuple(hits), tuple(gone))
        count = min(most, 8 * count)


def checked(index: Index, vector: Tensor) -> Tensor:
    """(d,) of length 1, float32."""
    q = vector.detach().float().cpu().flatten()
    if len(q) != index.vectors.shape[1] or not torch.isfinite(q).all() or not q.any():
        raise UserError(f"the query has {len(q)} numbers, {int(torch.isfinite(q).sum())} of them finite, and norm "
                        f"{q.norm():g}; expected {index.vectors.shape[1]} finite ones, not all zero; embed it again")
    return q / q.norm()


def admitted(index: Index, kinds: Sequence[str], exclude: Sequence[str]) -> Tensor | None:
    """(N,) true where a row may be found; None if all may."""
    allowed = None
    if kinds:
        if unknown := set(kinds) - set(index.kinds):
            raise UserError(f"no LoRA is of kind {min(unknown)!r}; expected of {', '.join(index.kinds)}; choose among these")
        allowed = torch.isin(index.kind, torch.tensor([index.kinds.index(kind) for kind in kinds], dtype=torch.int16))
    if exclude:
        kept = ~torch.isin(index.keys, torch.tensor([key_of(name) for name in exclude])).any(dim=1)
        allowed = kept if allowed is None else allowed & kept
    return allowed


def nearest(index: Index, q: Tensor, count: int, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rows and cosines (count,) of the nearest to the unit vector q (d,), best first: exactly those."""
    most = len(index) if allowed is None else int(allowed.sum())
    count = min(count, most)
    if not count:
        return torch.zeros(0, dtype=torch.int64), torch.zeros(0)
    rough, error = roughly(index, q)
    if allowed is not None:
        rough.masked_fill_(~allowed, -torch.inf)
    look = min(most, max(FIRST, 4 * count))
    while True:
        best, rows = rough.topk(look)
        exact, order = (index.vectors[rows].float() @ q).topk(count)
        if look == most or exact[-1] >= best[-1] + error:
            return rows[order], exact
        look = min(most, 4 * look)


def roughly(index: Index, q: Tensor) -> tuple[Tensor, float]:
    """Similarities (N,) of q with the index's rounded rows r', and how wrong they are at most.

    The products are sums over a LoRA's numbers, weighed by q: what an embedding bag computes, here of the columns of
    `index.coarse`, 96 LoRAs at a time, which PyTorch's for bytes (FBGEMM) holds in registers. With its int8 matrix products
    (`_weight_int8pack_mm`, `_int_mm`) a search took two and eleven times as long on AVX2.

    |q r - q r'| <= |r - r'|, as |q| = 1. The d sums are in float32, each of two roundings of what is at most about |r'|.
    """
    blocks, width, _ = index.coarse.shape
    most = min(blocks, TOGETHER)
    numbers, starts = torch.arange(most * width, dtype=torch.int32), torch.arange(0, most * width, width, dtype=torch.int32)
    weights, sums = q.repeat(most), torch.empty(blocks, LANES)
    for first in range(0, blocks, TOGETHER):
        columns = index.coarse[first:first + TOGETHER]
        used = len(columns) * width
        sums[first:first + TOGETHER] = torch.ops.quantized.embedding_bag_byte_rowwise_offsets(
            columns.flatten(0, 1), numbers[:used], starts[:len(columns)], per_sample_weights=weights[:used])
    rounding = 2 * (width + width ** 0.5) * 2.0 ** -24 * (1.001 + index.error)
    return sums.flatten()[:len(index)] * index.scale, index.error + rounding + ROUNDING


def marginal(vectors: Tensor, similarities: Tensor, diversity: float) -> Iterator[int]:
    """The candidates (n, d), best first, in the order of (1 - w) similarity - w (likeness to the nearest before it)."""
    left, likeness = torch.ones(len(vectors), dtype=torch.bool), torch.full((len(vectors),), -1.0)
    for _ in range(len(vectors)):
        worth = (1 - diversity) * similarities - diversity * likeness
        best = int(worth.masked_fill(~left, -torch.inf).argmax())
        yield best
        left[best] = False
        likeness = torch.maximum(likeness, vectors @ vectors[best])


def probability(index: Index, similarity: Tensor) -> float | None:
    found = index.calibration
    return None if found is None else torch.sigmoid(found.slope * similarity + found.offset).item()


def calibrate(similarities: Tensor, right: Tensor, precision: float = 0.95) -> Calibration:
    """From validation answers, their similarities (n,) and whether each was right (n,).

    min_sim is the least similarity from which on a share `precision` was right; where there is none, it is above all
    that were seen. The probability is a logistic curve with the targets of Platt (1999), by Newton's method.
    """
    similarities, right = similarities.double(), right.bool()
    if len(similarities) < 10 or right.all() or not right.any():
        raise UserError(f"{len(similarities)} validation answers, {int(right.sum())} right; expected at least 10, right and "
                        "wrong ones; use more queries")
    order = similarities.argsort(descending=True)
    values, share = similarities[order], right[order].double().cumsum(0) / torch.arange(1, len(order) + 1)
    last = torch.cat((values[1:] < values[:-1], torch.tensor([True])))  # a threshold takes all that are equal
    good = (last & (share >= precision)).nonzero()
    min_sim = values[good[-1]].item() if len(good) else values[0].item() + 1e-3
    positive, negative = int(right.sum()), int((~right).sum())
    target = torch.where(right, (positive + 1) / (positive + 2), 1 / (negative + 2)).double()
    x = torch.stack((similarities, torch.ones_like(similarities)), dim=1)
    w = torch.tensor([0.0, 0.0], dtype=torch.float64)
    for _ in range(50):
        p = torch.sigmoid(x @ w)
        gradient = x.T @ (p - target)
        hessian = x.T @ (x * (p * (1 - p))[:, None]) + 1e-6 * torch.eye(2, dtype=torch.float64)
        step = torch.linalg.solve(hessian, gradient)
        w -= step * min(1.0, 10 / step.norm().clamp(min=1e-12).item())
    return Calibration(min_sim, w[0].item(), w[1].item())
