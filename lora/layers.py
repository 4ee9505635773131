"""A linear layer with LoRAs beside it: y = W x + bias + sum_i s_i delta_i(x), any number at once, strengths free to change.

Whatever the LoRAs are, they are folded into one plan: all A side by side, so that x is read once, and one B for each range
of output rows, with the strengths in it. The layer itself is left as it is, in whatever form its weight is stored. Where
a rule weighs each l_i = delta_i(x) by more than one number (`gates.py`, `fuse.py`), they stay apart (`Apart`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.gated_lora_linear import Stack, add_loras, fused, stack
from lora.adapter import Bias, Dora, LowRank, Term, as_low_rank


@dataclass
class Plan:
    """What is added to a linear layer's output. All tensors have the dtype and device in which the layer computes."""

    A: Tensor | None = None  # (R, in): the low-rank terms of all LoRAs, those of one range of rows beside each other
    ranges: list[tuple[int, int, int, Tensor]] = field(default_factory=list)  # start, stop, R of it, B with its strength
    others: list[tuple[int, int, Term, Tensor, Tensor | None]] = field(default_factory=list)  # no low rank: start, stop,
    #                                                    the term, what its rows (or 1) and its inputs are multiplied with
    row_gain: Tensor | None = None  # (out,): DoRA by rows adds this times W x
    column_gains: list[tuple[int, int, Tensor]] = field(default_factory=list)  # start, stop, gain: adds W (gain * x)
    bias: Tensor | None = None  # (out,)
    beside: Stack | None = None  # instead of A and ranges where a kernel runs: one pass over the output adds them all


Rule = Callable[[Tensor, Sequence[Tensor]], Tensor]  # (y (..., out), each l_i (..., out)) -> out (..., out)


@dataclass
class Apart:
    """LoRAs whose l_i a rule is given one by one, instead of a plan of their sum."""

    plans: Sequence[Plan]  # one for each LoRA, at strength 1
    rule: Rule
    stack: Stack | None = None  # of them all, if they are pairs of factors: then `gate` is applied to y and h = A x at once
    gate: Callable[[Tensor, Tensor, Stack], Tensor] | None = None


class LoraLinear(nn.Module):
    """A linear layer `base` and what is added to it: a plan of given LoRAs, and, while one is trained, a pair of factors.

    The plan does not follow the layer to another device or dtype; LoRAs are attached where the model computes.
    """

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        self.plan: Plan | Apart = Plan()
        self.trained: TrainedLora | TrainedDense | None = None

    @property
    def plain(self) -> nn.Module:
        """`base` where nothing is added to it: then whatever is quicker for that layer alone gives the same bits."""
        parts = (self.trained, *vars(self.plan).values())
        return self.base if all(part is None or isinstance(part, list) and not part for part in parts) else self

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out). Inputs beyond the layer's own are seen by the LoRAs alone (control LoRAs)."""
        own, plan = x[..., :self.base.in_features], self.plan
        y = self.base(own)
        if isinstance(plan, Plan):
            y = self.changed(x, y, y if plan.row_gain is None else y.clone(), plan)
        elif plan.stack is not None:
            y = plan.gate(y, F.linear(x[..., :plan.stack.A.shape[1]], plan.stack.A), plan.stack)
        else:
            y = plan.rule(y, [self.changed(x, torch.zeros_like(y), y, each) for each in plan.plans])
        return y if self.trained is None else y + self.trained(x)

    def changed(self, x: Tensor, y: Tensor, before: Tensor, plan: Plan) -> Tensor:
        """y, and in its place, what a plan adds for the input x where the layer itself gives `before`, all (..., out)."""
        own = x[..., :self.base.in_features]
        if plan.beside is not None:
            y = add_loras(y, F.linear(x[..., :plan.beside.A.shape[1]], plan.beside.A), plan.beside)
        elif plan.A is not None:
            inner = F.linear(x[..., :plan.A.shape[1]], plan.A).flatten(0, -2)  # (tokens, R)
            first, out = 0, y.view(-1, y.shape[-1])
            for start, stop, rank, B in plan.ranges:
                out[:, start:stop].addmm_(inner[:, first:first + rank], B.T)
                first += rank
        for start, stop, term, rows, columns in plan.others:
            seen = x[..., :term.shape[1]]
            y[..., start:stop] += rows * term(seen if columns is None else seen * columns)
        for start, stop, gain in plan.column_gains:
            y[..., start:stop] += F.linear(own * gain, weight_of(self.base)[start:stop].to(y.dtype))
        if plan.row_gain is not None:
            bias = self.base.bias
            y += plan.row_gain * (before if bias is None else before - bias)
        if plan.bias is not None:
            y += plan.bias
        return y


class TrainedLora(nn.Module):
    """strength * scale * B (A x) with A and B to learn, in float32: A Gaussian of variance 1 / in, B zero (arXiv 2106.09685,
    4.1). `strength` is for who trains it, and no part of what was learned."""

    def __init__(self, in_features: int, out_features: int, rank: int, scale: float, device: torch.device | str = "cpu"):
        super().__init__()
        self.scale, self.strength = scale, 1.0
        self.A = nn.Parameter(torch.randn(rank, in_features, device=device) * in_features ** -0.5)
        self.B = nn.Parameter(torch.zeros(out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return self.strength * self.scale * F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype))


class TrainedDense(nn.Module):
    """A change D x + b of a whole layer to learn, in float32 whatever the layer is; zero at first."""

    def __init__(self, in_features: int, out_features: int, device: torch.device | str = "cpu"):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out_features, in_features, device=device))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


def weight_of(base: nn.Module) -> Tensor:
    """The weight (out, in) in a floating-point form; a layer that stores it otherwise has `dequantised()`."""
    return base.dequantised() if hasattr(base, "dequantised") else base.weight


def plan(base: nn.Module, loras: list[tuple[tuple[Term, ...], float]]) -> Plan:
    """Fold (terms, strength) of several LoRAs for one layer. A strength of 0 leaves nothing behind, bit for bit."""
    loras = [(terms, strength) for terms, strength in loras if strength]
    weight = base.weight
    device, dtype = getattr(base, "compute_device", weight.device), getattr(base, "compute_dtype", weight.dtype)
    out, pairs, made = Plan(), {}, {}

    def add(total: Tensor | None, part: Tensor, start: int) -> Tensor:
        total = torch.zeros(base.out_features, device=device) if total is None else total
        total[start:start + len(part)] += part.to(device)
        return total

    for terms, strength in loras:
        for term in terms:
            start, stop = term.start, term.start + term.shape[0]
            if isinstance(term, Bias):
                out.bias = add(out.bias, strength * term.value.float(), start)
                continue
            rows = columns = None
            if isinstance(term, Dora):  # s (g (W + D) - W) = s (g - 1) W + s g D, and the same with columns
                gain = term.gain(weight_of(base)[start:stop].cpu())
                if term.axis == "out":
                    rows = gain
                    out.row_gain = add(out.row_gain, strength * (gain - 1), start)
                else:
                    columns = gain
                    made.setdefault((start, stop), []).append(strength * (gain - 1))
                term = term.inner
            term = as_low_rank(term)
            if isinstance(term, LowRank):
                A, B = term.A.float(), strength * term.scale * term.B.float()
                pairs.setdefault((start, stop), []).append((A if columns is None else A * columns,
                                                            B if rows is None else rows[:, None] * B))
            else:
                times = torch.as_tensor(strength if rows is None else strength * rows, device=device).to(dtype)
                out.others.append((start, stop, _moved(term, device, dtype), times,
                                   None if columns is None else columns.to(device, dtype)))
    out.column_gains = [(*rows, sum(gains).to(device, dtype)) for rows, gains in made.items()]
    if pairs and fused(device, dtype):
        terms = [(A, B, start) for (start, _), group in pairs.items() for A, B in group]
        out.beside = stack([terms], base.out_features, None, dtype, device, gated=False)
    elif pairs:
        widest = max(A.shape[1] for group in pairs.values() for A, _ in group)
        out.A = torch.cat([F.pad(A, (0, widest - A.shape[1])) for group in pairs.values() for A, _ in group])
        out.A = out.A.to(device, dtype)
        for (start, stop), group in pairs.items():
            B = torch.cat([B for _, B in group], dim=1).to(device, dtype)
            out.ranges.append((start, stop, B.shape[1], B))
    out.row_gain = None if out.row_gain is None else out.row_gain.to(dtype)
    out.bias = None if out.bias is None else out.bias.to(dtype)
    return out


def _moved(term: Term, device: torch.device, dtype: torch.dtype) -> Term:
    moved = {name: tuple(part.to(device, dtype) for part in value) if isinstance(value, tuple) else
             value.to(device, dtype) if isinstance(value, Tensor) else value for name, value in vars(term).items()}
    return type(term)(**moved)
