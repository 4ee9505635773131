"""A LoRA as a value: what each linear layer's weight W (out, in) and bias change by, and which parameters are replaced.

A change is a tuple of terms, whose deltas add up. A term touches the output rows `start : start + rows` of its layer, since
files of other layouts know q, k and v apart where our layer has them in one. Its `scale` (alpha / rank of the file) is
kept beside its factors, not multiplied in, so that what was read can be written again bit for bit.

Low rank: arXiv 2106.09685. DoRA: arXiv 2402.09353. LoKr and LoHa: arXiv 2309.14859.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST_RANK = 256  # up to which LoKr and LoHa are turned into a pair of factors


@dataclass(frozen=True, eq=False)
class LowRank:
    """scale * B A, with A (R, in) and B (rows, R)."""

    A: Tensor
    B: Tensor
    scale: float = 1.0
    start: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, and inputs of the layer."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The delta (rows, in) itself."""
        return self.scale * (self.B.to(dtype) @ self.A.to(dtype))

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., in) -> what the term adds to the output, (..., rows)."""
        return self.scale * F.linear(F.linear(x, self.A.to(x)), self.B.to(x))


@dataclass(frozen=True, eq=False)
class LoKr:
    """scale * kron(w1, w2): w1 (a, c), w2 (b, d) or the product of two factors; rows a*b, inputs c*d."""

    w1: Tensor
    w2: tuple[Tensor, ...]
    scale: float = 1.0
    start: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        return self.w1.shape[0] * self.w2[0].shape[0], self.w1.shape[1] * self.w2[-1].shape[1]

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.scale * torch.kron(self.w1.to(dtype), _product(self.w2, dtype))

    def __call__(self, x: Tensor) -> Tensor:
        x = x.unflatten(-1, (self.w1.shape[1], self.w2[-1].shape[1]))         # (..., c, d)
        for factor in reversed(self.w2):
            x = F.linear(x, factor.to(x))                                     # (..., c, b)
        return self.scale * F.linear(x.transpose(-1, -2), self.w1.to(x)).transpose(-1, -2).flatten(-2)


@dataclass(frozen=True, eq=False)
class LoHa:
    """scale * (w1_a w1_b) elementwise times (w2_a w2_b)."""

    w1: tuple[Tensor, Tensor]
    w2: tuple[Tensor, Tensor]
    scale: float = 1.0
    start: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        return self.w1[0].shape[0], self.w1[1].shape[1]

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.scale * _product(self.w1, dtype) * _product(self.w2, dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dense().to(x))


@dataclass(frozen=True, eq=False)
class Dense:
    """A whole difference (rows, in)."""

    weight: Tensor
    scale: float = 1.0
    start: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.weight.shape)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.scale * self.weight.to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return self.scale * F.linear(x, self.weight.to(x))


@dataclass(frozen=True, eq=False)
class Dora:
    """m * (W + D) / |W + D| in place of W, where D is the delta of `inner`; norms by row (axis "out") or column ("in").

    The delta depends on W: `dense` and a layer that bears it must know the base's rows.
    """

    inner: LowRank | LoKr | LoHa | Dense
    magnitude: Tensor  # (rows,) or (in,)
    axis: str = "out"

    @property
    def start(self) -> int:
        return self.inner.start

    @property
    def shape(self) -> tuple[int, int]:
        return self.inner.shape

    def gain(self, base: Tensor) -> Tensor:
        """m / |W + D|, (rows,) or (in,), float32, from the base's rows W (rows, in)."""
        if isinstance(self.inner, LowRank) and self.axis == "out":  # |w|^2 + 2 w.d + |d|^2, without the dense delta
            A, B, w = self.inner.A.float(), self.inner.B.float() * self.inner.scale, base.float()
            squared = w.square().sum(1) + 2 * ((w @ A.T) * B).sum(1) + ((B @ (A @ A.T)) * B).sum(1)
            norm = squared.clamp(min=0).sqrt()
        else:
            norm = (base.float() + self.inner.dense()).norm(dim=1 if self.axis == "out" else 0)
        return self.magnitude.flatten().float() / norm.clamp(min=torch.finfo(torch.float32).tiny)

    def dense(self, dtype: torch.dtype, base: Tensor) -> Tensor:
        gain = self.gain(base).to(dtype)
        changed = base.to(dtype) + self.inner.dense(dtype)
        return changed * (gain[:, None] if self.axis == "out" else gain) - base.to(dtype)


@dataclass(frozen=True, eq=False)
class Bias:
    """A difference (rows,) of the bias."""

    value: Tensor
    start: int = 0

    @property
    def shape(self) -> tuple[int]:
        return tuple(self.value.shape)


Term = LowRank | LoKr | LoHa | Dense | Dora | Bias


@dataclass(frozen=True)
class Adapter:
    """Terms by layer; new values of whole parameters (norms, in control LoRAs) by name; what the file says of itself."""

    layers: Mapping[str, tuple[Term, ...]] = field(default_factory=dict)
    replaced: Mapping[str, Tensor] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)

    def tensors(self) -> Iterable[Tensor]:
        for terms in self.layers.values():
            for term in terms:
                yield from tensors_of(term)
        yield from self.replaced.values()


def tensors_of(term: Term) -> Iterable[Tensor]:
    for each in fields(term):
        value = getattr(term, each.name)
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from value
        elif isinstance(value, Term):
            yield from tensors_of(value)


def delta(terms: Iterable[Term], shape: tuple[int, int], base: Tensor | None = None,
          dtype: torch.dtype = torch.float32) -> Tensor:
    """The change (out, in) of a layer's weight as one matrix. DoRA needs the base weight; biases are no part of it.

    A term may have more inputs than the layer (control LoRAs do): the result is then as wide as the widest, and the
    layer's own weight is to be padded with zeros on the right.
    """
    terms = [term for term in terms if not isinstance(term, Bias)]
    out = torch.zeros(shape[0], max([shape[1], *(term.shape[1] for term in terms)]), dtype=dtype)
    for term in terms:
        rows = slice(term.start, term.start + term.shape[0])
        change = term.dense(dtype, base[rows]) if isinstance(term, Dora) else term.dense(dtype)
        out[rows, :term.shape[1]] += change
    return out


def delta_bias(terms: Iterable[Term], rows: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
    """The change (out,) of a layer's bias, None if there is none."""
    out = None
    for term in terms:
        if isinstance(term, Bias):
            out = torch.zeros(rows, dtype=dtype) if out is None else out
            out[term.start:term.start + len(term.value)] += term.value.to(dtype)
    return out


def as_low_rank(term: Term, largest: int = LARGEST_RANK) -> Term:
    """LoKr and LoHa as the pair of factors that they exactly are, where its rank is at most `largest`; others unchanged.

    kron(w1, w2_a w2_b) = kron(w1, w2_a) kron(I, w2_b): rank c * R. An elementwise product of two matrices of rank R is the
    sum of R * R elementwise products of their columns and rows.
    """
    if isinstance(term, LoKr) and len(term.w2) == 2 and term.w1.shape[1] * term.w2[0].shape[1] <= largest:
        eye = torch.eye(term.w1.shape[1])
        A, B = torch.kron(eye, term.w2[1].float()), torch.kron(term.w1.float(), term.w2[0].float())
        return LowRank(A, B, term.scale, term.start)
    if isinstance(term, LoHa) and term.w1[1].shape[0] * term.w2[1].shape[0] <= largest:
        (a, b), (c, d) = ((left.float(), right.float()) for left, right in (term.w1, term.w2))
        A = (b[:, None] * d[None, :]).flatten(0, 1)                           # (R * R, in)
        B = (a[:, :, None] * c[:, None, :]).flatten(1)                        # (rows, R * R)
        return LowRank(A, B, term.scale, term.start)
    if isinstance(term, Dora):
        return replace(term, inner=as_low_rank(term.inner, largest))
    return term


def _product(factors: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    out = factors[0].to(dtype)
    for factor in factors[1:]:
        out = out @ factor.to(dtype)
    return out
