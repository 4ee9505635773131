"""Several LoRAs on one network, and the rules by which they are weighed (section 3.6 of our notes on arXiv 2508.02107).

With l_i = s_i D_i x what LoRA i adds to a layer's output y, and N of them:

    sum, mean, sqrt  y + c sum_i l_i with c = 1, 1 / N, 1 / sqrt(N)
    klora       each layer keeps the LoRA with the larger entries, the second one gaining by and by (arXiv 2502.18461); N = 2
    dare        four of five entries of every D_i dropped, the others times five (arXiv 2311.03099)
    ties        a fifth of the entries kept, signs elected, those who agree averaged (arXiv 2306.01708)
    switch, composite   LoRAs in turn, step by step; the mean of velocities with one LoRA each (arXiv 2402.16843)
    ziplora     each input of D_1 and D_2 weighed so that both do alone what they did, but apart (arXiv 2311.13600); N = 2
    energy      l_i in proportion to |l_i| / |y|, token by token
    gates, static   learned gates (`gates.py`), and their mean merged into the factors

A rule is put on a network once (`put`) and then lives around its velocity, since some change from step to step. One LoRA
alone is added plainly by all of them. Strengths are outside of every rule but those that look at D_i's entries.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from flux.errors import UserError
from kernels.gated_lora_linear import Gate, Stack, add_loras, eager, fold, opening, stack
from lora.adapter import Bias, Dense, LowRank, Term, as_low_rank, delta, delta_bias
from lora.gates import MOST, Gates
from lora.inject import Loras
from lora.layers import Apart, Plan, plan, weight_of

Velocity = Callable[[Tensor, Tensor], Tensor]  # (img (B, L, C), t (B,)) -> v
Member = tuple[tuple[Term, ...], float]  # a layer's terms and their strength
RULES = ("sum", "mean", "sqrt", "klora", "dare", "ties", "switch", "composite", "ziplora", "energy", "gates", "static")
KEPT_BY_DARE, KEPT_BY_TIES = 0.2, 0.2  # shares of entries


class Fusion:
    """A rule that is the same in every step: `by_layer` says what stands in a layer. Base of the others."""

    looks = False  # whether it must see the network at work first (`look`)

    def __init__(self, loras: Loras):
        self.loras = loras
        self.names = [name for name, (_, strength) in loras.on.items() if callable(strength) or strength]
        self.shared = {}  # layers with several LoRAs: the layer, and what each has
        for layer, (base, members) in loras.layers.items():
            present = {name: member for name, member in members.items() if member[1]}
            if len(present) > 1:
                self.shared[layer] = base, present

    def plain(self) -> dict[str, Plan]:
        """Plans of the plain sum in all layers."""
        return {layer: plan(base, list(members.values())) for layer, (base, members) in self.loras.layers.items()}

    def velocity(self, v: Velocity, times: Sequence[float]) -> Velocity:
        """v under this rule, for a trajectory over `times` from 1 to 0."""
        return v

    def look(self, drawn: Callable[[], object]) -> None:
        """drawn: takes a few steps with the network as it is."""


class Weighed(Fusion):
    """c sum_i l_i."""

    def __init__(self, loras: Loras, factor: Callable[[int], float]):
        super().__init__(loras)
        c = factor(max(1, len(self.names)))
        loras.set_plans({layer: plan(base, [(terms, c * s) for terms, s in members.values()])
                         for layer, (base, members) in loras.layers.items()})


class Merged(Fusion):
    """One matrix for all LoRAs of a layer, made of their D_i, each (out, in): as large as the layer itself."""

    def __init__(self, loras: Loras, merge: Callable[[list[Tensor]], Tensor]):
        super().__init__(loras)
        plans = {}
        for layer, (base, members) in self.shared.items():
            shape, weight = (base.out_features, base.in_features), weight_of(base).detach().cpu()
            terms: list[Term] = [Dense(merge([s * delta(given, shape, weight) for given, s in members.values()]))]
            for given, s in members.values():
                bias = delta_bias(given, base.out_features)
                terms += [] if bias is None else [Bias(s * bias)]
            plans[layer] = plan(base, [(tuple(terms), 1.0)])
        loras.set_plans(plans)


def dare(deltas: Sequence[Tensor], generator: torch.Generator, kept: float = KEPT_BY_DARE) -> Tensor:
    """Drop and rescale, then add."""
    return sum(D * (torch.rand(D.shape, generator=generator) < kept) / kept for D in deltas)


def ties(deltas: Sequence[Tensor], kept: float = KEPT_BY_TIES) -> Tensor:
    """Trim each to its largest entries, elect the sign of their sum, average those that have it."""
    trimmed = []
    for D in deltas:
        least = D.abs().flatten().kthvalue(D.numel() - max(1, round(kept * D.numel())) + 1).values
        trimmed.append(D * (D.abs() >= least))
    every = torch.stack(trimmed)
    agree = (every.sign() == every.sum(0).sign()) & (every != 0)
    return (every * agree).sum(0) / agree.sum(0).clamp(min=1)


class Chosen(Fusion):
    """Rules that take the LoRAs one at a time: prepared plans are exchanged."""

    def __init__(self, loras: Loras):
        super().__init__(loras)
        self.plans = {name: {layer: plan(base, [members[name]] if name in members else [])
                             for layer, (base, members) in loras.layers.items()} for name in self.names}

    def only(self, name: str) -> None:
        self.loras.set_plans(self.plans[name])


class Switch(Chosen):
    def velocity(self, v: Velocity, times: Sequence[float]) -> Velocity:
        def switched(img: Tensor, t: Tensor) -> Tensor:
            self.only(self.names[step_of(t, times) % len(self.names)])
            return v(img, t)
        return switched if self.names else v


class Composite(Chosen):
    def velocity(self, v: Velocity, times: Sequence[float]) -> Velocity:
        def composed(img: Tensor, t: Tensor) -> Tensor:
            total = 0
            for name in self.names:
                self.only(name)
                total = total + v(img, t)
            return total / len(self.names)
        return composed if self.names else v


class KLora(Chosen):
    """The first LoRA is the object's, the second the style's, which gains weight as the picture comes about."""

    def __init__(self, loras: Loras):
        super().__init__(loras)
        _expect_pair("klora", self.names)
        self.sizes = {layer: largest_entries(base, list(members.values()))
                      for layer, (base, members) in self.shared.items()}
        self.gamma = sum(first / second for first, second in self.sizes.values()) / max(1, len(self.sizes))

    def velocity(self, v: Velocity, times: Sequence[float]) -> Velocity:
        def chosen(img: Tensor, t: Tensor) -> Tensor:
            scale = klora_scale(step_of(t, times) / (len(times) - 1))
            self.loras.set_plans({
                layer: self.plans[self.names[0 if first / self.gamma >= second * scale else 1]][layer]
                for layer, (first, second) in self.sizes.items()})
            return v(img, t)
        return chosen if self.sizes else v


def klora_scale(phase: float) -> float:
    """phase: the share of the schedule that is done."""
    return (1.5 * phase + 1.275) % 1.5


def largest_entries(base: nn.Module, members: Sequence[Member]) -> tuple[float, ...]:
    """For each of two LoRAs the sum of the largest entries of |D|, as many as the product of both ranks."""
    shape, weight = (base.out_features, base.in_features), weight_of(base).detach().cpu()
    matrices = [(s * delta(terms, shape, weight)).abs().flatten() for terms, s in members]
    ranks = [sum(term.rank for term in map(as_low_rank, terms) if isinstance(term, LowRank)) or 1 for terms, _ in members]
    count = min(ranks[0] * ranks[1], matrices[0].numel())
    return tuple(matrix.topk(count).values.sum().item() for matrix in matrices)


class Zip(Chosen):
    """Weights m_1, m_2 of every layer's inputs: (D_1 m_1 + D_2 m_2) x shall be D_i x for inputs x as they come when LoRA i
    is alone, and m_1 m_2 small. Inputs are seen on a short trajectory of the picture's own prompt."""

    looks = True

    def __init__(self, loras: Loras):
        super().__init__(loras)
        _expect_pair("ziplora", self.names)

    def look(self, drawn: Callable[[], object]) -> None:
        seen = []
        for name in self.names:
            self.only(name)
            seen.append(inputs_of(self.loras, list(self.shared), drawn))
        plans = {}
        for layer, (base, members) in self.shared.items():
            shape, weight = (base.out_features, base.in_features), weight_of(base).detach().cpu()
            D = [s * delta(terms, shape, weight) for terms, s in members.values()]
            m = zip_columns(*D, *(each[layer] for each in seen))
            plans[layer] = plan(base, [((Dense(D[0] * m[0] + D[1] * m[1]),), 1.0)])
        self.loras.set_plans(self.plain() | plans)


def inputs_of(loras: Loras, layers: Sequence[str], drawn: Callable[[], object]) -> dict[str, Tensor]:
    """Second moments (in, in) of the inputs of layers while `drawn` runs."""
    moments, hooks = {}, []
    for layer in layers:
        def see(module, given, layer=layer):
            x = given[0].detach().float().flatten(0, -2).cpu()
            moments[layer] = moments.get(layer, 0) + x.T @ x / len(x)
        hooks.append(loras.model.get_submodule(layer).register_forward_pre_hook(see))
    drawn()
    for hook in hooks:
        hook.remove()
    return moments


def zip_columns(D1: Tensor, D2: Tensor, M1: Tensor, M2: Tensor, steps: int = 100, lr: float = 0.01,
                penalty: float = 0.01) -> Tensor:
    """D_i (out, in), second moments M_i (in, in) of inputs -> m (2, in), by gradient steps from ones.

    Loss: sum_i E|(D_1 m_1 + D_2 m_2 - D_i) x_i|^2, over that of zeros, + penalty * mean|m_1 m_2|. The expectation is
    sum_jk m_j m_k (D^T D)_jk (M)_jk: a quadratic form, so that no input is needed again.
    """
    D = torch.cat((D1, D2), dim=1).float()
    gram, width = D.T @ D, D1.shape[1]                                                # (2 in, 2 in)
    forms = [gram * M.repeat(2, 2) for M in (M1, M2)]
    targets = [torch.cat((torch.ones(width), torch.zeros(width))), torch.cat((torch.zeros(width), torch.ones(width)))]
    whole = [(target @ form @ target).clamp(min=1e-12) for form, target in zip(forms, targets, strict=True)]
    with torch.inference_mode(False), torch.enable_grad():
        forms, whole = [form.clone() for form in forms], [size.clone() for size in whole]
        m = torch.ones(2 * width, requires_grad=True)
        optimiser = torch.optim.Adam([m], lr=lr)
        for _ in range(steps):
            loss = penalty * (m[:width] * m[width:]).abs().mean()
            for form, target, size in zip(forms, targets, whole, strict=True):
                off = m - target
                loss = loss + off @ form @ off / size
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return m.detach().view(2, width)


class Energy(Fusion):
    def __init__(self, loras: Loras):
        super().__init__(loras)
        plans = {}
        for layer, (base, members) in self.shared.items():
            strengths = [s for _, s in members.values()]
            plans[layer] = Apart([plan(base, [(terms, 1.0)]) for terms, _ in members.values()],
                                 lambda y, deltas, strengths=strengths: energy(y, deltas, strengths))
        loras.set_plans(plans)


def energy(y: Tensor, deltas: Sequence[Tensor], strengths: Sequence[float]) -> Tensor:
    """y + sum_i s_i w_i l_i with w_i = N e_i / sum_j e_j, e_i = |l_i| / |y| of a token; equals weigh 1, as in a sum."""
    e = torch.stack([delta.norm(dim=-1, keepdim=True) for delta in deltas])  # |y| is the same for all
    w = len(deltas) * e / e.sum(0).clamp(min=torch.finfo(e.dtype).tiny)
    return y + sum(s * wi * delta for s, wi, delta in zip(strengths, w, deltas, strict=True))


class Gated(Fusion):
    """Learned gates, in every layer that they and several LoRAs have. Layers without a gate get strengths / max(1, N / 2).

    embeddings: what is known of each LoRA, by name. watched: keeps the mean of every gate, by step, for a report.
    """

    def __init__(self, loras: Loras, gates: Gates, embeddings: Mapping[str, Tensor] | None = None, watched: bool = False):
        super().__init__(loras)
        if len(self.names) > MOST:
            raise UserError(f"{len(self.names)} LoRAs came with --fuse gates, expected at most {MOST}; leave some out")
        self.gates, self.watched = gates, watched
        self.known = None if embeddings is None or not gates.options.embedding else embeddings
        self.seen: list[tuple[float, str, str, float]] = []  # time, layer, LoRA, mean of gain (k0 + k1 G)
        self.rows: dict[str, Tensor] | None = None  # while it is a dictionary: sums of k0 + k1 G, (N, out) by layer
        self.counts: dict[str, int] = {}
        self.now: tuple[Tensor, Tensor | None] | None = None
        self.folded: dict[str, Tensor] = {}
        self.entropy: list[Tensor] | None = None  # while it is a list: of every layer's gates, in nats
        self.gains: dict[tuple[str, str], Tensor] = {}  # (layer, LoRA) -> (out,)
        self.left: set[tuple[str, str]] = set()  # those that no factor bears
        if gates.options.gain and self.known is not None and len(self.names) > 1:
            self.shared = self.gained()
        plans = {}
        for layer, (base, members) in loras.layers.items():
            _, members = self.shared.get(layer, (base, {name: member for name, member in members.items() if member[1]}))
            if layer not in gates:
                factor = 1 / max(1, len(self.names) / 2)
                plans[layer] = plan(base, [(terms, factor * s) for terms, s in members.values()])
            elif len(members) > 1 or members and gates.options.single:
                plans[layer] = self.apart(layer, base, members)
        loras.set_plans(plans)

    def gained(self) -> dict[str, tuple[nn.Module, dict[str, Member]]]:
        """`shared` with every LoRA's gains multiplied into it; where it is not factors, they are kept for the rule."""
        company, out = self.gates.company(torch.stack([self.known[name] for name in self.names])), {}
        for layer, (base, members) in self.shared.items():
            if layer in self.gates:
                self.gains |= {(layer, name): own
                               for name, own in zip(self.names, self.gates.gains(layer, company), strict=True)}
                self.left |= {(layer, name) for name, (terms, _) in members.items() if not weighable(terms)}
                members = {name: (terms if (layer, name) in self.left else weighed(terms, self.gains[layer, name], layer), s)
                           for name, (terms, s) in members.items()}
            out[layer] = base, members
        return out

    def apart(self, layer: str, base: nn.Module, members: Mapping[str, Member]) -> Apart:
        own, names, strengths = self.gates.of(layer), list(members), torch.tensor([s for _, s in members.values()])
        terms = [[as_low_rank(term) for term in given] for given, _ in members.values()]
        beside = None
        if all(isinstance(term, LowRank) for given in terms for term in given):
            dtype, device = (getattr(base, f"compute_{name}", getattr(base.weight, name)) for name in ("dtype", "device"))
            pairs = [[(term.A.float(), term.scale * term.B.float(), term.start) for term in given] for given in terms]
            beside = stack(pairs, base.out_features, own.slices, dtype, device)

        def offset() -> Tensor | None:
            time, known = self.now
            who = None if known is None else known[:, [self.names.index(name) for name in names]]
            return self.gates.offset(layer, len(names), time, who)

        def gate(y: Tensor, h: Tensor, loras: Stack) -> Tensor:
            if self.watches:
                return rule(y, [h[..., a:b] @ loras.B[a:b].to(h) for a, b in pairwise(loras.layout.ranks)])
            if torch.is_grad_enabled() or layer not in self.folded:
                self.folded[layer] = fold(own.gate(len(names)))
            return add_loras(y, h, loras, self.folded[layer], strengths, offset(), self.gates.options.compete)

        def rule(y: Tensor, deltas: Sequence[Tensor]) -> Tensor:
            given, shift = own.gate(len(names)), offset()
            deltas = [delta * self.gains[layer, name].to(delta) if (layer, name) in self.left else delta
                      for name, delta in zip(names, deltas, strict=True)]
            if self.watches:
                self.note(layer, names, given, opening(y, deltas, given, shift, own.slices).float())
            return eager(y, deltas, given, strengths, shift, own.slices)

        return Apart([plan(base, [(given, 1.0)]) for given, _ in members.values()], rule, beside, gate)

    @property
    def watches(self) -> bool:
        return self.watched or self.rows is not None or self.entropy is not None

    def define(self) -> None:
        """Compute the gates as their equation says, with every l_i stored: to measure what that costs."""
        for layer in self.shared:
            wrapper = self.loras.model.get_submodule(layer)
            if isinstance(wrapper.plan, Apart):
                wrapper.plan.stack = None

    def note(self, layer: str, names: Sequence[str], gate: Gate, opened: Tensor) -> None:
        """opened (N, B, ..., out): G_i."""
        passing = gate.k0 + gate.k1 * opened
        if self.entropy is not None:
            inside = opened.clamp(1e-5, 1 - 1e-5)  # at its ends the entropy has no gradient
            self.entropy.append(torch.special.entr(inside).add(torch.special.entr(1 - inside)).mean())
        if self.watched:
            for name, share in zip(names, passing, strict=True):
                gains = self.gains.get((layer, name), share.new_ones(()))
                self.seen.append((self.at, layer, name, (share * gains).mean().item()))
        if self.rows is not None:
            each = passing.flatten(1, -2)
            self.rows[layer] = self.rows.get(layer, 0) + each.sum(1)
            self.counts[layer] = self.counts.get(layer, 0) + each.shape[1]

    def velocity(self, v: Velocity, times: Sequence[float] = ()) -> Velocity:
        if not self.names:
            return v
        known = None if self.known is None else torch.stack([self.known[name] for name in self.names])

        def gated(img: Tensor, t: Tensor) -> Tensor:
            self.at = t[0].item()
            self.now = self.gates.shared(t, known)
            return v(img, t)
        return gated


class Static(Gated):
    """Gates seen at work, and their mean over tokens and steps merged into the factors: no gate is computed any more."""

    looks = True

    def look(self, drawn: Callable[[], object]) -> None:
        self.loras.set_plans({layer: self.apart(layer, base, members) for layer, (base, members) in self.shared.items()
                              if layer in self.gates})
        self.rows, self.counts = {}, {}
        drawn()
        means = {layer: self.rows[layer] / self.counts[layer] for layer in self.rows}
        self.rows = None
        plans = {}
        for layer, weights in means.items():
            base, members = self.shared[layer]
            plans[layer] = plan(base, [(weighed(terms, weight, layer), s)
                                       for (terms, s), weight in zip(members.values(), weights, strict=True)])
        self.loras.set_plans(plans)


def weighable(terms: Sequence[Term]) -> bool:
    return all(isinstance(term, LowRank | Bias) for term in map(as_low_rank, terms))


def weighed(terms: Sequence[Term], rows: Tensor, layer: str) -> tuple[Term, ...]:
    """Terms whose outputs are multiplied with rows (out,), by their factors. Gradients reach rows."""
    out = []
    for term in map(as_low_rank, terms):
        own = rows[term.start:term.start + term.shape[0]]
        if isinstance(term, LowRank):
            own = own.to(term.B.device)
            out.append(LowRank(term.A, term.B.float() * own[:, None], term.scale, term.start))
        elif isinstance(term, Bias):
            out.append(Bias(term.value.float() * own.to(term.value.device), term.start))
        else:
            raise UserError(f"{layer} has a {type(term).__name__}, which cannot be weighed by rows; expected plain LoRAs "
                            "for --fuse static; take --fuse gates")
    return tuple(out)


def step_of(t: Tensor, times: Sequence[float]) -> int:
    """The number of the step that begins at t (B,)."""
    now = t[0].item()
    return min(range(len(times)), key=lambda i: abs(times[i] - now))


def _expect_pair(rule: str, names: Sequence[str]) -> None:
    if len(names) > 2:
        raise UserError(f"{len(names)} LoRAs came with --fuse {rule}, expected two, the object's first; leave some out")


def put(rule: str, loras: Loras, seed: int = 0, gates: Gates | None = None,
        embeddings: Mapping[str, Tensor] | None = None, watched: bool = False) -> Fusion:
    """A rule of RULES onto the LoRAs of a network, which lie beside its weights. seed: of what dare drops."""
    if rule in ("gates", "static"):
        assert gates is not None, f"{rule} without gates"
        return (Gated if rule == "gates" else Static)(loras, gates, embeddings, watched)
    match rule:
        case "sum":
            return Fusion(loras)
        case "mean":
            return Weighed(loras, lambda count: 1 / count)
        case "sqrt":
            return Weighed(loras, lambda count: count ** -0.5)
        case "dare":
            generator = torch.Generator().manual_seed(seed)
            return Merged(loras, lambda deltas: dare(deltas, generator))
        case "ties":
            return Merged(loras, ties)
    return {"klora": KLora, "switch": Switch, "composite": Composite, "ziplora": Zip, "energy": Energy}[rule](loras)
