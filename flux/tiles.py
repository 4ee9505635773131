"""Pictures larger than a network was trained on, in overlapping tiles whose answers are blended.

What is blended is the velocity, at every step (MultiDiffusion, arXiv 2302.08113): neighbours agree on what they share
before it is drawn, where tiles restored apart would only be faded into each other.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from flux.flow import Velocity


@dataclass(frozen=True)
class Tile:
    """Rows and columns of a map."""

    top: int
    left: int
    height: int
    width: int

    def times(self, factor: int) -> "Tile":
        """The same on a map of so many times the cells."""
        return Tile(*(factor * edge for edge in (self.top, self.left, self.height, self.width)))

    def cut(self, x: Tensor) -> Tensor:
        """(..., H, W) -> (..., height, width)."""
        return x[..., self.top:self.top + self.height, self.left:self.left + self.width]


def starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin: as few as there can be, evenly spread, neighbours sharing `overlap` cells or more."""
    assert 0 <= overlap < tile
    if length <= tile:
        return [0]
    count = -(-(length - overlap) // (tile - overlap))
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def over(height: int, width: int, tile: int, overlap: int) -> list[Tile]:
    return [Tile(top, left, min(tile, height), min(tile, width)) for top in starts(height, tile, overlap)
            for left in starts(width, tile, overlap)]


def ramp(tile: Tile, overlap: int) -> Tensor:
    """(height, width) weights: 1 in the middle, falling towards every edge over the overlap, never 0."""
    def line(length):
        at = torch.arange(length)
        return (torch.minimum(at, length - 1 - at) + 1).clamp(max=overlap + 1) / (overlap + 1)
    return line(tile.height)[:, None] * line(tile.width)


def blended(x: Tensor, tiles: list[Tile], overlap: int, of: Callable[[Tensor, int], Tensor]) -> Tensor:
    """of(a tile of x, its number) -> the same size; x (B, C, H, W) -> their mean by `ramp`."""
    if len(tiles) == 1:
        return of(x, 0)
    total, weight = torch.zeros_like(x), x.new_zeros(x.shape[2:])
    for i, tile in enumerate(tiles):
        share = ramp(tile, overlap).to(x)
        tile.cut(total).add_(share * of(tile.cut(x), i))
        tile.cut(weight).add_(share)
    return total / weight


def velocity(each: list[Velocity], tiles: list[Tile], overlap: int, height: int, width: int) -> Velocity:
    """One velocity per tile of a map of height x width tokens -> that of the whole."""
    if len(tiles) == 1:
        return each[0]

    def v(img: Tensor, t: Tensor) -> Tensor:
        def of(x, i):
            tokens = each[i](rearrange(x, "b c h w -> b (h w) c"), t)
            return rearrange(tokens, "b (h w) c -> b c h w", h=tiles[i].height)
        whole = blended(rearrange(img, "b (h w) c -> b c h w", h=height, w=width), tiles, overlap, of)
        return rearrange(whole, "b c h w -> b (h w) c")
    return v
