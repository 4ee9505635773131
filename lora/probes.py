"""What a LoRA does to a few vectors: the only thing that an encoder of LoRAs (`encoder.py`) looks at.

Factors are not unique: (R A, B R^-1) is the same LoRA as (A, B), one term may be written as two, and q, k, v apart or
together. So a LoRA is not read but asked: each layer's change D answers probes q with D q. What depends on D q alone
cannot depend on how D is written down; LoKr, LoHa and DoRA are no special cases. D itself is never formed.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from flux.errors import UserError
from lora.adapter import Adapter, Bias, Dora, LowRank, as_low_rank
from lora.algebra import svd_of_product


@dataclass(frozen=True)
class Layer:
    """A linear layer (rows, inputs) that LoRAs may change. Layers of one type learn together."""

    name: str
    type: str
    inputs: int
    slices: tuple[int, ...]  # rows of each part that means something of its own: q, k, v
    block: int = 0
    stream: str = ""  # which tokens pass through it

    @property
    def rows(self) -> int:
        return sum(self.slices)


@dataclass(frozen=True, eq=False)
class Change:
    """A layer's change, ready to be asked: all pairs of factors as one, and what is no pair, with its first row."""

    pair: LowRank | None
    others: tuple[tuple[int, Callable[[Tensor], Tensor]], ...] = ()
    undecomposed: bool = False  # it is a DoRA whose base is not here: asked as if it were none


Changes = Mapping[str, Change]  # by layer; a layer that is not in it does not change


def changes(adapter: Adapter, layers: Sequence[Layer], base: Mapping[str, Tensor] | None = None) -> dict[str, Change]:
    """An adapter as changes of these layers; its biases and other layers are left out.

    base: weights by name (`<layer>.weight`), which DoRA needs; without them its plain delta is taken.
    """
    out = {}
    for layer in layers:
        terms = [as_low_rank(term) for term in adapter.layers.get(layer.name, ()) if not isinstance(term, Bias)]
        if not terms:
            continue
        for term in terms:
            if term.start + term.shape[0] > layer.rows or term.shape[1] > layer.inputs:
                raise UserError(f"{layer.name} has {layer.rows} rows and {layer.inputs} inputs, the LoRA changes rows up to "
                                f"{term.start + term.shape[0]} of {term.shape[1]}; expected a LoRA for the encoder's model")
        doras = [term for term in terms if isinstance(term, Dora)]
        weight = None if base is None or not doras else base[f"{layer.name}.weight"]
        plain = [term.inner if isinstance(term, Dora) and weight is None else term for term in terms]
        pairs = [term for term in plain if isinstance(term, LowRank)]
        others = tuple((term.start, decomposed(term, weight) if isinstance(term, Dora) else term)
                       for term in plain if not isinstance(term, LowRank))
        out[layer.name] = Change(whole(pairs, layer) if pairs else None, others, bool(doras) and weight is None)
    return out


def whole(pairs: list[LowRank], layer: Layer) -> LowRank:
    """Pairs on any rows and the first inputs of a layer, as one pair on all of it: their factors beside each other."""
    if len(pairs) == 1 and pairs[0].shape == (layer.rows, layer.inputs):
        return pairs[0]
    A = torch.cat([F.pad(pair.A.float(), (0, layer.inputs - pair.shape[1])) for pair in pairs])
    B = torch.cat([F.pad(pair.scale * pair.B.float(), (0, 0, pair.start, layer.rows - pair.start - pair.shape[0]))
                   for pair in pairs], dim=1)
    return LowRank(A, B)


def decomposed(term: Dora, weight: Tensor) -> Callable[[Tensor], Tensor]:
    """x -> g (W + D) x - W x on the term's rows, or with g on x where norms are by column (`Dora`)."""
    base = weight[term.start:term.start + term.shape[0]]
    gain = term.gain(base)

    def act(x: Tensor) -> Tensor:
        W, g = base.to(x), gain.to(x)
        if term.axis == "out":
            return g * (F.linear(x, W) + term.inner(x)) - F.linear(x, W)
        return F.linear(g * x, W) + term.inner(g * x) - F.linear(x, W)
    return act


def answers(asked: Sequence[Change | None], q: Tensor, rows: int) -> Tensor:
    """b LoRAs' changes of one layer, probes q (P, in) -> D q (b, P, rows), zero where there is none: x = q A^T B^T."""
    out = q.new_zeros(len(asked), len(q), rows)
    paired = [i for i, change in enumerate(asked) if change and change.pair is not None]
    if paired:
        pairs = [asked[i].pair for i in paired]
        if len(pairs) == 1:
            A, B = pairs[0].A.to(q)[None], pairs[0].B.to(q).T[None]
        else:  # of several ranks: zeros change no product
            A = pad_sequence([pair.A.to(q) for pair in pairs], batch_first=True)       # (n, R, in)
            B = pad_sequence([pair.B.to(q).T for pair in pairs], batch_first=True)     # (n, R, rows)
        scale = q.new_tensor([pair.scale for pair in pairs])[:, None, None]
        y = scale * (q @ A.transpose(1, 2)) @ B                                        # (n, P, rows)
        out = y if len(paired) == len(asked) else out.index_add(0, torch.tensor(paired, device=q.device), y)
    for i, change in enumerate(asked):
        for start, act in change.others if change else ():
            y = act(q)
            y = F.pad(y, (start, rows - start - y.shape[-1]))[None]
            out = out.index_add(0, torch.tensor([i], device=q.device), y)
    return out


def augmented(lora: Changes, generator: torch.Generator, strength: float = 0.4, dropout: float = 0.1,
              truncation: float = 0.2) -> dict[str, Change]:
    """The same LoRA as another file might have it: all of it up to `strength` weaker or as much stronger (its logarithm is
    uniform), layers left out, and with probability `truncation` each pair at half its rank."""
    first, second, *drawn = torch.rand(2 + len(lora), generator=generator).tolist()
    low, high = math.log(1 - strength), math.log(1 + strength)
    factor, cut = math.exp(low + (high - low) * first), second < truncation
    kept = {name: change for (name, change), x in zip(lora.items(), drawn, strict=True) if x >= dropout} or lora
    return {name: times(halved(change) if cut else change, factor) for name, change in kept.items()}


def times(change: Change, factor: float) -> Change:
    pair = None if change.pair is None else replace(change.pair, scale=change.pair.scale * factor)
    others = tuple((start, lambda x, act=act: factor * act(x)) for start, act in change.others)
    return Change(pair, others, change.undecomposed)


def halved(change: Change) -> Change:
    """The nearest pair of half the rank."""
    if change.pair is None or change.pair.rank < 2:
        return change
    U, S, V = svd_of_product(change.pair.B.float(), change.pair.A.float())
    rank = len(S) // 2 or 1
    return replace(change, pair=LowRank(V[:rank], U[:, :rank] * S[:rank], change.pair.scale))
