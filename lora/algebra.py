"""Arithmetic with LoRAs, exact and without the dense matrices: sums, differences, averages, recompression, extraction.

A sum of low-rank terms is a low-rank term whose factors stand beside each other. Recompression is the truncated singular
value decomposition of that product, of which only a core as small as the rank is ever decomposed:
B A = Qb (Rb Ra^T) Qa^T. By Eckart and Young (1936) nothing of the same rank is nearer. Nothing is centred.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from flux.errors import UserError
from lora.adapter import Adapter, Bias, Dora, LowRank, Term, as_low_rank

EXACT_SIDE = 1024  # up to which a whole difference is decomposed exactly; above, by random projections


def combined(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """sum_i weights_i * adapter_i, exactly: ranks add up. Terms that are not linear in the LoRA (DoRA) are refused."""
    assert len(adapters) == len(weights), f"{len(adapters)} LoRAs and {len(weights)} weights"
    layers: dict[str, list[Term]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        if adapter.replaced:
            raise UserError(f"a LoRA that replaces {len(adapter.replaced)} norms cannot be added to others; expected only "
                            "low-rank changes; use it at run time with --lora")
        for layer, terms in adapter.layers.items():
            layers.setdefault(layer, []).extend(_times(term, weight, layer) for term in terms)
    return Adapter({layer: tuple(terms) for layer, terms in layers.items()}, {}, {})


def averaged(adapters: Sequence[Adapter]) -> Adapter:
    return combined(adapters, [1 / len(adapters)] * len(adapters))


def subtracted(adapter: Adapter, other: Adapter) -> Adapter:
    """adapter - other: what the first does beyond the second."""
    return combined([adapter, other], [1.0, -1.0])


def _times(term: Term, weight: float, layer: str) -> Term:
    if isinstance(term, Dora):
        raise UserError(f"{layer} has DoRA, which depends on the base and cannot be added; expected plain low-rank terms; "
                        "merge it into a checkpoint and extract it from there")
    return Bias(term.value * weight, term.start) if isinstance(term, Bias) else replace(term, scale=term.scale * weight)


@dataclass(frozen=True)
class Kept:
    """What a recompression left of a layer: its rank, and the share of the squared Frobenius norm."""

    rank: int
    energy: float


def recompressed(adapter: Adapter, rank: int | None = None, energy: float | None = None,
                 done: Callable[[str], None] = lambda layer: None) -> tuple[Adapter, dict[str, Kept]]:
    """The nearest LoRA of at most `rank`, or of the least rank that keeps `energy` (0 to 1) of each term's squared norm.

    Rows that terms touch apart (q, k, v) stay apart; where ranges of rows overlap they become one. Biases are summed.
    Also what each layer kept.
    """
    layers, kept = {}, {}
    for layer, terms in adapter.layers.items():
        biases = [term for term in terms if isinstance(term, Bias)]
        out: list[Term] = _summed_biases(biases)
        groups = list(_groups([as_low_rank(term) for term in terms if not isinstance(term, Bias)], layer))
        for start, group in groups:
            term, share = truncated(group, start, rank, energy)
            out.append(term)
            kept[layer if len(groups) == 1 else f"{layer}[{start}:]"] = Kept(term.rank, share)
        layers[layer] = tuple(out)
        done(layer)
    return Adapter(layers, dict(adapter.replaced), dict(adapter.metadata)), kept


def truncated(terms: list[LowRank], start: int, rank: int | None, energy: float | None) -> tuple[LowRank, float]:
    """The best single pair for the sum of terms on rows from `start`, with balanced factors, and its share of the energy."""
    A, B = joined(terms, start)
    U, S, V = svd_of_product(B, A)
    rank = chosen_rank(S, rank, energy)
    root = S[:rank].sqrt()
    share = (S[:rank].square().sum() / S.square().sum().clamp(min=torch.finfo(S.dtype).tiny)).item() if S.any() else 1.0
    dtype = terms[0].A.dtype if terms[0].A.is_floating_point() else torch.float32
    return LowRank((root[:, None] * V[:rank]).to(dtype), (U[:, :rank] * root).to(dtype), 1.0, start), share


def chosen_rank(S: Tensor, rank: int | None, energy: float | None) -> int:
    """At most `rank`, at least 1: the least number of singular values (falling) whose squares sum to the share `energy`."""
    most = len(S) if rank is None else min(rank, len(S))
    if energy is None or not S.any():
        return max(1, most if energy is None else 1)
    share = S.double().square().cumsum(0) / S.double().square().sum()
    return max(1, min(most, int((share < energy - 1e-12).sum()) + 1))


def svd_of_product(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """B (rows, R), A (R, in) -> U (rows, k), S (k,), V (k, in) with B A = U diag(S) V, k = min(rows, R, in)."""
    Qb, Rb = torch.linalg.qr(B)
    Qa, Ra = torch.linalg.qr(A.T)
    U, S, V = torch.linalg.svd(Rb @ Ra.T, full_matrices=False)
    return Qb @ U, S, V @ Qa.T


def joined(terms: list[LowRank], start: int) -> tuple[Tensor, Tensor]:
    """The sum of terms as one A (R, in) and B (rows from `start`, R), float32, scales multiplied in."""
    columns = max(term.shape[1] for term in terms)
    rows = max(term.start + term.shape[0] for term in terms) - start
    A = torch.cat([F.pad(term.A.float(), (0, columns - term.shape[1])) for term in terms])
    B = torch.cat([F.pad(term.scale * term.B.float(), (0, 0, term.start - start, rows - term.shape[0] - term.start + start))
                   for term in terms], dim=1)
    return A, B


def _groups(terms: list[Term], layer: str) -> Iterator[tuple[int, list[LowRank]]]:
    """(first row, terms) of rows that no other group touches."""
    for term in terms:
        if not isinstance(term, LowRank):
            raise UserError(f"{layer} has a {type(term).__name__} that is no pair of factors of moderate rank; expected "
                            "low-rank terms; merge it into a checkpoint and extract it from there")
    group, stop = [], 0
    for term in sorted(terms, key=lambda term: term.start):
        if group and term.start >= stop:
            yield group[0].start, group
            group = []
        group.append(term)
        stop = max(stop if len(group) > 1 else 0, term.start + term.shape[0])
    if group:
        yield group[0].start, group


def _summed_biases(biases: list[Bias]) -> list[Term]:
    if not biases:
        return []
    out = torch.zeros(max(bias.start + len(bias.value) for bias in biases))
    for bias in biases:
        out[bias.start:bias.start + len(bias.value)] += bias.value.float()
    return [Bias(out)]


def extracted(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], layers: Iterable[str], rank: int | None,
              energy: float | None = None, dtype: torch.dtype = torch.bfloat16,
              done: Callable[[str], None] = lambda layer: None) -> tuple[Adapter, dict[str, Kept]]:
    """The LoRA between two checkpoints: the nearest to tuned - base in each layer's weight, and the difference of biases.

    Large layers are decomposed from random projections with two power iterations (arXiv 0909.4061, algorithms 4.3 and
    5.1). Layers that do not differ are left out.
    """
    found, kept = {}, {}
    for layer in layers:
        change = tuned[f"{layer}.weight"].float() - base[f"{layer}.weight"].float()
        terms: list[Term] = []
        if change.any():
            U, S, V = _svd(change, rank)
            whole = change.square().sum()
            r = chosen_rank(S, rank, None if energy is None else energy * (whole / S.square().sum()).item())
            root = S[:r].sqrt()
            terms.append(LowRank((root[:, None] * V[:r]).to(dtype), (U[:, :r] * root).to(dtype)))
            kept[layer] = Kept(r, (S[:r].square().sum() / whole).item())
        if f"{layer}.bias" in base and not torch.equal(tuned[f"{layer}.bias"], base[f"{layer}.bias"]):
            terms.append(Bias(tuned[f"{layer}.bias"].float() - base[f"{layer}.bias"].float()))
        if terms:
            found[layer] = tuple(terms)
        done(layer)
    return Adapter(found, {}, {}), kept


def _svd(matrix: Tensor, rank: int | None) -> tuple[Tensor, Tensor, Tensor]:
    if rank is None or min(matrix.shape) <= max(EXACT_SIDE, 4 * rank):
        return torch.linalg.svd(matrix, full_matrices=False)
    generator = torch.Generator().manual_seed(0)
    Q = matrix @ torch.randn(matrix.shape[1], rank + 16, generator=generator)
    for _ in range(3):
        Q = torch.linalg.qr(Q)[0]
        Q = matrix @ torch.linalg.qr(matrix.T @ Q)[0]
    Q = torch.linalg.qr(Q)[0]
    U, S, V = torch.linalg.svd(Q.T @ matrix, full_matrices=False)
    return Q @ U, S, V


def inner(a: Adapter, b: Adapter, layer: str) -> float:
    """<delta_a, delta_b> of one layer, the sum over all entries, from the factors: tr((B_a^T B_b) (A_b A_a^T))."""
    total = 0.0
    for left in a.layers.get(layer, ()):
        for right in b.layers.get(layer, ()):
            if isinstance(left, Bias) or isinstance(right, Bias):
                continue
            left, right = as_low_rank(left), as_low_rank(right)
            if not isinstance(left, LowRank) or not isinstance(right, LowRank):
                raise UserError(f"{layer} has a term that is no pair of factors; expected low-rank terms")
            first, last = max(left.start, right.start), min(left.start + left.shape[0], right.start + right.shape[0])
            if first < last:
                columns = min(left.shape[1], right.shape[1])
                Bs = (left.B[first - left.start:last - left.start].double().T
                      @ right.B[first - right.start:last - right.start].double())
                As = left.A[:, :columns].double() @ right.A[:, :columns].double().T
                total += left.scale * right.scale * (Bs * As).sum().item()
    return total


def norm(adapter: Adapter, layer: str) -> float:
    """Frobenius norm of a layer's delta."""
    return max(inner(adapter, adapter, layer), 0.0) ** 0.5
