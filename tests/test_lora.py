"""LoRAs on a network: beside its layers equals inside them, whatever is undone is undone bit for bit, and gradients of what
is trained. The reference everywhere is a dense float64 formula written here.
"""

import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux.config import TINY
from flux.errors import UserError
from flux.model import Flux
from lora import adapter, inject
from lora.adapter import Adapter, Bias, Dense, Dora, LoHa, LoKr, LowRank
from lora.inject import Loras
from lora.layers import LoraLinear

IN, OUT = 24, 36


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Two layers, (24 -> 36) and a square one without bias."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(IN, OUT), nn.Linear(OUT, OUT, bias=False)).requires_grad_(False).to(dtype)


def pair(rows: int = OUT, columns: int = IN, rank: int = 3, seed: int = 0, scale: float = 0.5, start: int = 0) -> LowRank:
    return LowRank(draw(rank, columns, seed=seed, scale=columns ** -0.5), draw(rows, rank, seed=seed + 1), scale, start)


def hada(seed: int, rank: int) -> LoHa:
    return LoHa((draw(OUT, rank, seed=seed), draw(rank, IN, seed=seed + 1)),
                (draw(OUT, rank, seed=seed + 2), draw(rank, IN, seed=seed + 3)), 0.05)


TERMS = {  # terms of the first layer
    "a pair": (pair(),),
    "a part": (pair(12, start=12),),
    "parts of several ranks": (pair(12), pair(8, rank=2, seed=3, start=28), pair(12, rank=5, seed=5, start=12)),
    "parts that overlap": (pair(20), pair(20, seed=4, start=10), pair(seed=6)),
    "a bias": (Bias(draw(OUT)),),
    "a pair and a part's bias": (pair(), Bias(draw(10), 20)),
    "a whole difference": (Dense(draw(OUT, IN, scale=0.2), 0.5),),
    "a part's difference": (Dense(draw(4, IN, scale=0.2), 0.5, 30),),
    "LoKr": (LoKr(draw(6, 3), (draw(6, 8, scale=0.2),), 0.5),),
    "LoKr of factors": (LoKr(draw(6, 3), (draw(6, 2, scale=0.2), draw(2, 8)), 0.5),),
    "LoKr on a part": (LoKr(draw(2, 3), (draw(6, 8, scale=0.2),), 0.5, 24),),
    "LoHa": (hada(0, 2),),
    "LoHa of high rank": (hada(0, 17),),  # 289 > 256: stays as it is
    "DoRA": (Dora(pair(), draw(OUT).abs() + 0.2),),
    "DoRA by columns": (Dora(pair(), draw(IN).abs() + 0.2, "in"),),
    "DoRA on a part": (Dora(pair(12, start=12), draw(12).abs() + 0.2), pair(12)),
    "DoRA on a part by columns": (Dora(pair(12, start=12), draw(IN).abs() + 0.2, "in"), Bias(draw(OUT))),
    "DoRA of LoKr": (Dora(LoKr(draw(6, 3), (draw(6, 8, scale=0.2),)), draw(OUT).abs() + 0.2),),
    "DoRA of LoKr by columns": (Dora(LoKr(draw(6, 3), (draw(6, 8, scale=0.2),)), draw(IN).abs() + 0.2, "in"),),
    "DoRA of LoHa": (Dora(hada(0, 2), draw(OUT).abs() + 0.2),),
    "DoRA of a difference": (Dora(Dense(draw(OUT, IN, scale=0.2)), draw(OUT).abs() + 0.2),),
}


def dense(term, weight: Tensor) -> Tensor:
    """A term's delta in float64, on its rows of that weight."""
    if isinstance(term, LowRank):
        return term.scale * term.B.double() @ term.A.double()
    if isinstance(term, LoKr):
        w2 = term.w2[0].double() if len(term.w2) == 1 else term.w2[0].double() @ term.w2[1].double()
        return term.scale * torch.kron(term.w1.double(), w2)
    if isinstance(term, LoHa):
        return term.scale * (term.w1[0].double() @ term.w1[1].double()) * (term.w2[0].double() @ term.w2[1].double())
    if isinstance(term, Dense):
        return term.scale * term.weight.double()
    base = weight[term.start:term.start + term.shape[0]].double()
    changed = base + dense(term.inner, weight)
    by_rows = term.axis == "out"
    m = term.magnitude.double()
    return (m[:, None] if by_rows else m) * changed / changed.norm(dim=1 if by_rows else 0, keepdim=True) - base


def reference(linear: nn.Linear, x: Tensor, *loras: tuple[tuple, float]) -> Tensor:
    """(W + sum s delta) x + bias + sum s delta_bias in float64."""
    weight = F.pad(linear.weight.double(), (0, x.shape[-1] - linear.in_features))
    bias = torch.zeros(len(weight), dtype=torch.float64) if linear.bias is None else linear.bias.double()
    for terms, strength in loras:
        for term in terms:
            rows = slice(term.start, term.start + term.shape[0])
            if isinstance(term, Bias):
                bias = bias.clone()
                bias[rows] += strength * term.value.double()
            else:
                delta = dense(term, linear.weight)
                weight[rows, :delta.shape[1]] += strength * delta
    return x.double() @ weight.T + bias


def near(actual: Tensor, expected: Tensor, tol: float) -> None:
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).abs().max() / expected.abs().max()
    assert error <= tol, f"error {error:.3g}"


def state(model: nn.Module) -> list[tuple]:
    """Which objects a network is made of, and where its numbers lie."""
    return [*((name, id(module)) for name, module in model.named_modules()),
            *((name, id(part), part.data_ptr(), part.requires_grad) for name, part in model.named_parameters())]


@pytest.mark.parametrize("strength", (1.0, 0.4, -1.5))
@pytest.mark.parametrize("kind", TERMS)
def test_beside_equals_inside(kind, strength):
    """Both equal the float64 formula, on a batch of 3, on tokens, and on (B, D)."""
    model, terms = net(), TERMS[kind]
    linear, loras = model[0], Loras(model)
    loras.attach("it", Adapter({"0": terms}), strength)
    for x in (draw(3, 5, IN), draw(3, IN), draw(1, 1, IN)):
        expected = reference(linear, x, (terms, strength))
        near(model[0](x), expected, 1e-5)
        loras.merge()
        assert type(model[0]) is nn.Linear
        near(model[0](x), expected, 1e-5)
        loras.unmerge()


@pytest.mark.parametrize("kind", TERMS)
def test_bfloat16(kind):
    """One rounding of W + delta is 2^-9 of a weight; beside it, each kind rounds its factors and three or four sums. Of the
    largest output 1.5 % covers both, and most is the layer's own rounding."""
    model, terms = net(torch.bfloat16), TERMS[kind]
    linear, loras = model[0], Loras(model)
    x = draw(3, 5, IN).bfloat16()
    expected = reference(linear, x, (terms, 1.0))
    loras.attach("it", Adapter({"0": terms}))
    assert model[0](x).dtype == torch.bfloat16
    near(model[0](x), expected, 0.015)
    loras.merge()
    assert model[0](x).dtype == torch.bfloat16
    near(model[0](x), expected, 0.015)


def test_several_at_their_own_strengths():
    """All kinds at once on one layer equal the sum, beside and inside; DoRA is of the plain weight, not of the others."""
    model = net()
    linear, loras, x = model[0], Loras(model), draw(2, 4, IN)
    strengths = {kind: (-1) ** i * (0.3 + 0.1 * i) for i, kind in enumerate(TERMS)}
    for kind, strength in strengths.items():
        loras.attach(kind, Adapter({"0": TERMS[kind]}), strength)
    expected = reference(linear, x, *((TERMS[kind], s) for kind, s in strengths.items()))
    near(model[0](x), expected, 1e-5)
    loras.merge()
    near(model[0](x), expected, 1e-5)
    loras.detach("DoRA")
    del strengths["DoRA"]
    loras.unmerge()
    near(model[0](x), reference(linear, x, *((TERMS[kind], s) for kind, s in strengths.items())), 1e-5)


def test_strengths():
    """Numbers, changed while attached, also under inference mode; or by the layer's name; none that is not finite."""
    model = net()
    first, second, loras = *model, Loras(model)
    both = Adapter({"0": TERMS["DoRA"], "1": (pair(OUT, OUT),)})
    x, y = draw(2, IN), draw(2, OUT)
    loras.attach("it", both)
    for strength in (1.0, 0.25, 0.0, -2.0):
        with torch.inference_mode():
            loras.set_strength("it", strength)
            seen = model[0](x), model[1](y)
        near(seen[0], reference(first, x, (both.layers["0"], strength)), 1e-5)
        near(model[1](y), reference(second, y, (both.layers["1"], strength)), 1e-5)
    loras.set_strength("it", lambda layer: {"0": 0.5, "1": -1.0}[layer])
    near(model[0](x), reference(first, x, (both.layers["0"], 0.5)), 1e-5)
    near(model[1](y), reference(second, y, (both.layers["1"], -1.0)), 1e-5)
    loras.merge()
    near(model[0](x), reference(first, x, (both.layers["0"], 0.5)), 1e-5)
    before, outputs = state(model), model[0](x)
    for wrong in (float("nan"), float("inf"), lambda layer: float("nan")):
        with pytest.raises(UserError, match="finite"):
            loras.set_strength("it", wrong)
    with pytest.raises(KeyError):
        loras.set_strength("other", 1.0)
    assert state(model) == before and torch.equal(model[0](x), outputs)


@pytest.mark.parametrize("kind", TERMS)
def test_strength_zero_changes_nothing(kind):
    for dtype in (torch.float32, torch.bfloat16):
        model = net(dtype)
        x = draw(2, 4, IN).to(dtype)
        before, loras = model(x), Loras(model)
        loras.attach("it", Adapter({"0": TERMS[kind]}), 0.0)
        assert torch.equal(model(x), before)
        loras.merge()
        assert torch.equal(model(x), before)


def tiny() -> Flux:
    torch.manual_seed(0)
    return Flux(TINY).eval().requires_grad_(False)


def full(model: Flux, seed: int, scale: float = 0.2) -> Adapter:
    """Something on every linear layer, and new norms."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    terms = {}
    for i, (name, layer) in enumerate(layers.items()):
        low = pair(layer.out_features, layer.in_features, 2, seed + i, scale)
        bias = Bias(draw(layer.out_features, seed=i, scale=0.01))
        terms[name] = (Dora(low, layer.weight.norm(dim=1)), bias) if i % 3 else (low,)
    return Adapter(terms, {name: draw(*part.shape, seed=seed).abs() + 0.5 for name, part in model.named_parameters()
                           if name.endswith("_norm.scale")})


def sample(seed: int = 0, channels: int = 64, batch: int = 1) -> tuple:
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(2.0), torch.arange(3.0)).expand(batch, -1, -1)
    return (draw(batch, 6, channels, seed=seed), ids, draw(batch, 4, TINY.context_in_dim, seed=seed + 1),
            torch.zeros(batch, 4, 3), draw(batch, TINY.vec_in_dim, seed=seed + 2), torch.full((batch,), 0.6),
            torch.full((batch,), 3.5))


@pytest.mark.parametrize("onednn", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_strength_zero_changes_no_bit_of_a_velocity(dtype, onednn, monkeypatch):
    """Where layers without a LoRA have gelu in their product, those with one that adds nothing have it, too; and merged."""
    monkeypatch.setattr("flux.linear.ONEDNN_IS_QUICKER", onednn)
    model = tiny().to(dtype)
    inputs = [part.to(dtype) if part.is_floating_point() else part for part in sample()]
    with torch.no_grad():
        before, loras, it = model(*inputs), Loras(model), full(model, 0)
        for merged in (False, True):
            loras.attach("it", it, 0.0)
            if merged:
                loras.merge()
            assert torch.equal(model(*inputs), before)
            loras.set_strength("it", 0.5)
            assert not torch.equal(model(*inputs), before)


def test_unloading_restores_the_network():
    """Promise P13: the very same modules and parameters, untouched, whatever was done in between and in whatever order."""
    model = tiny()
    before, copies = state(model), [part.clone() for part in model.parameters()]
    plain, loras = model(*sample(batch=3)), Loras(model)
    a, b = full(model, 0), full(model, 50)
    for steps in list(itertools.permutations(("merge", "unmerge", "strength", "b", "off a")))[::11]:
        loras.attach("a", a, 0.7)
        for step in steps:
            if step == "b":
                loras.attach("b", b, lambda name: 0.5 if "double" in name else 0.0)
            elif step == "strength":
                loras.set_strength(next(iter(loras.on), "a"), 1.3) if loras.on else None
            elif step == "off a":
                loras.detach("a")
            else:
                getattr(loras, step)()
        for name in list(loras.on):
            loras.detach(name)
        assert state(model) == before
        loras.unmerge()
    assert state(model) == before and all(map(torch.equal, model.parameters(), copies))
    assert torch.equal(model(*sample(batch=3)), plain)


def test_merging_is_repeatable():
    """Twice the same bytes, and the same as merged from the start; the base is never written to."""
    model, loras = tiny(), None
    copies = {name: part.clone() for name, part in model.named_parameters()}
    loras = Loras(model)
    loras.merge()
    loras.attach("a", full(model, 0), 0.6)
    first = {name: part.clone() for name, part in model.named_parameters()}
    loras.unmerge()
    assert {name.replace(".base.", ".") for name, _ in model.named_parameters()} == copies.keys()
    assert all(torch.equal(part, copies[name.replace(".base.", ".")]) for name, part in model.named_parameters()
               if "norm" not in name)
    loras.merge()
    assert all(torch.equal(part, first[name]) for name, part in model.named_parameters())
    loras.detach("a")
    assert all(torch.equal(part, copies[name]) for name, part in model.named_parameters())


def test_a_layer_may_be_another_next_time():
    """While nothing is attached the network is its owner's; attached again, the same layers keep the same wrappers."""
    model, adapter, x = net(), Adapter({"0": TERMS["DoRA"], "1": (pair(OUT, OUT),)}), draw(2, IN)
    loras = Loras(model)
    loras.attach("it", adapter)
    wrappers = list(model)
    loras.detach("it")
    model[0] = linear = nn.Linear(IN, OUT)
    loras.attach("it", adapter)
    near(model[0](x), reference(linear, x, (TERMS["DoRA"], 1.0)), 1e-5)
    assert model[0].base is linear and model[0] is not wrappers[0] and model[1] is wrappers[1]
    loras.detach("it")
    assert model[0] is linear


def test_a_whole_network_beside_and_inside():
    """With DoRA, biases and norms on every layer, at strengths of their own."""
    model = tiny()
    plain, loras = model(*sample()), Loras(model)
    a, b = full(model, 0), full(model, 50)
    loras.attach("a", a, 0.8)
    loras.attach("b", b, lambda name: -0.4 if "single" in name else 0.2)
    with torch.inference_mode():
        beside = model(*sample())
    loras.merge()
    near(beside, model(*sample()), 1e-5)
    assert (beside - plain).abs().max() > 0.01 * plain.abs().max()


def test_norms_are_replaced_whole():
    model = tiny()
    name = "single_blocks.1.norm.key_norm.scale"
    own, loras = model.get_parameter(name), Loras(model)
    a, b = (Adapter({}, {name: draw(TINY.head_dim, seed=i)}) for i in (1, 2))
    loras.attach("a", a, 0.3)
    assert torch.equal(model.get_parameter(name), a.replaced[name])
    loras.attach("b", b)
    assert torch.equal(model.get_parameter(name), b.replaced[name])
    loras.set_strength("b", 0.0)
    assert torch.equal(model.get_parameter(name), a.replaced[name])
    loras.set_strength("a", lambda layer: 0.0)
    assert torch.equal(model.get_parameter(name), own)
    loras.detach("a"), loras.detach("b")
    assert model.get_parameter(name) is own


WRONG = {
    "no such layer": Adapter({"0": (pair(),), "7": (pair(),)}),
    "not linear": Adapter({"": (pair(),)}),
    "too many rows": Adapter({"0": (pair(OUT + 1),)}),
    "rows beyond": Adapter({"0": (pair(12, start=30),)}),
    "rows before": Adapter({"0": (pair(12, start=-1),)}),
    "too few inputs": Adapter({"0": (pair(columns=IN - 1),)}),
    "more inputs": Adapter({"1": (pair(OUT, OUT),), "0": (pair(columns=2 * IN),)}),
    "a bias where none is": Adapter({"0": (pair(),), "1": (Bias(draw(OUT)),)}),
    "a long bias": Adapter({"0": (Bias(draw(OUT), 1),)}),
    "a wrapper's part": Adapter({"0": (pair(),), "0.base": (pair(),)}),
    "a layer's own bias anew": Adapter({"0": (pair(),)}, {"0.bias": draw(OUT)}),
    "a wrapped layer's bias anew": Adapter({"0": (pair(),)}, {"0.base.bias": draw(OUT)}),
    "no such norm": Adapter({"0": (pair(),)}, {"0.scale": draw(3)}),
    "another norm's shape": Adapter({}, {"0.bias": draw(3)}),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_changes_nothing(what):
    """Also beside or inside others, and also where only the second layer is wrong."""
    model = net()
    loras, x = Loras(model), draw(2, IN)
    for merged in (False, True):
        loras.attach("good", Adapter({"0": TERMS["LoHa"]}), 0.5)
        if merged:
            loras.merge()
        before, output, on = state(model), model(x), dict(loras.on)
        with pytest.raises(UserError, match="LoRA bad changes") as error:
            loras.attach("bad", WRONG[what])
        assert "\n" not in str(error.value)
        assert state(model) == before and torch.equal(model(x), output) and loras.on == on


def test_what_fails_later_changes_nothing():
    """A callable that raises, a layer that cannot take another weight."""
    model, x = net(), draw(2, IN)
    loras = Loras(model)
    loras.attach("good", Adapter({"0": TERMS["LoHa"]}))
    before, output = state(model), model(x)

    def strength(layer):
        if layer == "1":
            raise RuntimeError("no")
        return 2.0

    with pytest.raises(RuntimeError):
        loras.attach("bad", Adapter({"0": (pair(),), "1": (pair(OUT, OUT),)}), strength)
    assert state(model) == before and torch.equal(model(x), output) and loras.on.keys() == {"good"}
    wide = Adapter({"0": (Dora(pair(columns=2 * IN), draw(OUT)),)})
    for widen in (False, True):
        with pytest.raises(UserError):
            loras.attach("wide", wide, widen=widen)
    assert state(model) == before


def test_more_inputs():
    """A control LoRA: the layer's own inputs first, then those it alone sees; a plain LoRA stays as narrow as it is."""
    model = net()
    linear, loras = model[0], Loras(model)
    terms, plain, before = (pair(columns=2 * IN), Bias(draw(OUT))), (pair(seed=9),), state(model)
    with pytest.raises(UserError):
        loras.attach("control", Adapter({"0": terms}))
    loras.attach("control", Adapter({"0": terms}), 0.8, widen=True)
    loras.attach("plain", Adapter({"0": plain}), 0.5)
    x = draw(3, 4, 2 * IN)
    expected = reference(linear, x, (terms, 0.8), (plain, 0.5))
    near(model[0](x), expected, 1e-5)
    loras.merge()
    assert model[0].in_features == 2 * IN
    near(model[0](x), expected, 1e-5)
    loras.attach("another", Adapter({"0": (pair(seed=20),)}), 0.0)  # its size is the layer's own, not the widened one's
    with pytest.raises(UserError):
        loras.attach("second control", Adapter({"0": terms}))
    near(model[0](x), expected, 1e-5)
    loras.set_strength("control", 0.0)
    near(model[0](x[..., :IN]), reference(linear, x[..., :IN], (plain, 0.5)), 1e-5)
    for name in ("another", "control", "plain"):
        loras.detach(name)
    assert state(model) == before


def test_a_control_lora_on_the_transformer():
    model = tiny()
    given, loras = sample(channels=128), Loras(model)
    narrow = (given[0][..., :64], *given[1:])
    plain = model(*narrow)
    low = pair(TINY.hidden_size, 128)
    loras.attach("control", Adapter({"img_in": (low,)}), widen=True)
    beside = model(*given)
    loras.merge()
    near(beside, model(*given), 1e-5)
    loras.unmerge()
    assert not torch.equal(beside, model(*given[:1], *given[1:])) or (beside - plain).abs().max() > 1e-3
    loras.attach("control", Adapter({"img_in": (LowRank(F.pad(low.A[:, :64], (0, 64)), low.B, low.scale),)}), widen=True)
    loras.attach("again", Adapter({"img_in": (LowRank(low.A[:, :64], low.B, -low.scale),)}))
    near(model(*given), plain, 1e-5)  # blind to the added channels, then taken back
    loras.detach("control"), loras.detach("again")
    assert torch.equal(model(*narrow), plain)


class Quantised(nn.Module):
    """Whole numbers and a scale per row: what `dequantised` and `compute_dtype` are for."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.step = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight.detach() / self.step).round().to(torch.int8))
        self.compute_dtype = torch.float32

    def dequantised(self) -> Tensor:
        return self.weight.float() * self.step

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantised(), self.bias)


@pytest.mark.parametrize("kind", TERMS)
def test_beside_a_quantised_layer(kind):
    model = net()
    model[0] = Quantised(model[0])
    before, terms, x, loras = state(model), TERMS[kind], draw(2, 4, IN), Loras(model)
    plain = nn.Linear(IN, OUT)
    plain.weight.data, plain.bias = model[0].dequantised(), model[0].bias
    loras.attach("it", Adapter({"0": terms}), 0.7)
    near(model[0](x), reference(plain, x, (terms, 0.7)), 1e-5)
    with pytest.raises(UserError, match="stored as Quantised"):
        loras.merge()
    near(model[0](x), reference(plain, x, (terms, 0.7)), 1e-5)
    loras.detach("it")
    assert state(model) == before


def test_conversion_to_pairs_is_exact():
    for term in (TERMS["LoKr of factors"][0], TERMS["LoHa"][0], TERMS["DoRA of LoHa"][0]):
        low = adapter.as_low_rank(term)
        inner, own = (low.inner, term.inner) if isinstance(term, Dora) else (low, term)
        assert isinstance(inner, LowRank)
        near(dense(inner, torch.empty(0)), dense(own, torch.empty(0)), 1e-6)
    for kind in ("LoKr", "LoHa of high rank", "a pair"):
        assert adapter.as_low_rank(TERMS[kind][0]) is TERMS[kind][0]


def test_the_dense_delta_of_every_kind():
    """What merging adds, against the formula here."""
    weight = net()[0].weight
    for terms in TERMS.values():
        expected = torch.zeros(OUT, IN, dtype=torch.float64)
        for term in terms:
            if not isinstance(term, Bias):
                expected[term.start:term.start + term.shape[0]] += dense(term, weight)
        delta = adapter.delta(terms, (OUT, IN), weight, torch.float64)
        assert (delta - expected).abs().max() <= 1e-6 * max(expected.abs().max(), 1)  # DoRA's norms are of float32


# Training.

def test_a_fresh_trained_lora_changes_nothing():
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny().to(dtype)
        given = tuple(part.to(dtype) if part.ndim and i not in (1, 3) else part for i, part in enumerate(sample()))
        before = model(*given)
        made = inject.add_trained(model, "blocks", 4)
        assert torch.equal(model(*given), before)
        names = {name for name, part in model.named_parameters() if part.requires_grad}
        assert names == {f"{layer}.trained.{x}" for layer in made for x in "AB"}
        assert made.keys() == {name.removesuffix(".base") for name, part in model.named_modules()
                               if isinstance(part, nn.Linear) and "blocks" in name}
        assert all(factors.A.dtype == factors.B.dtype == torch.float32 for factors in made.values())
    torch.manual_seed(0)
    made = inject.add_trained(nn.Sequential(nn.Linear(4096, 8)), "0", 256)
    assert made["0"].A.std().item() == pytest.approx(4096 ** -0.5, rel=0.01) and not made["0"].B.any()


def test_what_is_trained_is_chosen_by_name():
    model = tiny()
    made = inject.add_trained(model, r"img_attn\.qkv|linear1", 2)
    assert made.keys() == {"double_blocks.0.img_attn.qkv", "single_blocks.0.linear1", "single_blocks.1.linear1"}
    for pattern in ("no such layer", "("):
        plain = tiny()
        plain.txt_in.weight.requires_grad_()
        before = state(plain)
        with pytest.raises(UserError) as error:
            inject.add_trained(plain, pattern, 2)
        assert "\n" not in str(error.value) and state(plain) == before
    model = Flux(TINY)
    inject.freeze(model, "double|img_in")
    assert {name for name, part in model.named_parameters() if not part.requires_grad} == {
        name for name, _ in model.named_parameters() if re.search("double|img_in", name)}


@pytest.mark.parametrize(("rank", "alpha", "stabilised", "scale"), (
    (4, None, False, 1.0), (4, 8.0, False, 2.0), (4, 8.0, True, 4.0), (16, None, True, 4.0)))
def test_scales_of_trained_loras(rank, alpha, stabilised, scale):
    """alpha / rank, or alpha / sqrt(rank) (arXiv 2312.03732); alpha is the rank if not given."""
    model = net()
    linear = model[0]
    factors = inject.add_trained(model, "^0$", rank, alpha, stabilised)["0"]
    factors.B.data = draw(OUT, rank)
    x = draw(2, IN)
    near(model[0](x), reference(linear, x, ((LowRank(factors.A.data, factors.B.data, scale),), 1.0)), 1e-5)


@pytest.mark.parametrize("attached", (False, True))
def test_gradients_of_trained_factors(attached):
    """Through two layers, against float64 autograd of the dense formula; given LoRAs beside them have none."""
    model, x, target = net(), draw(3, 5, IN).requires_grad_(), draw(3, 5, OUT)
    first, second = model
    given = {name: [] for name in "01"}
    if attached:
        loras = Loras(model)
        for kind in ("DoRA", "LoHa", "parts that overlap", "DoRA on a part by columns"):
            loras.attach(kind, Adapter({"0": TERMS[kind], "1": (pair(OUT, OUT, seed=7),)}), 0.5)
            given["0"] += [(TERMS[kind], 0.5)]
            given["1"] += [((pair(OUT, OUT, seed=7),), 0.5)]
    made = inject.add_trained(model, ".", 3, alpha=6.0)
    for i, factors in enumerate(made.values()):
        factors.B.data = draw(*factors.B.shape, seed=i)
    ((model(x) - target) ** 2).mean().backward()
    wide = {name: tuple(part.detach().double().requires_grad_() for part in (f.A, f.B)) for name, f in made.items()}
    seen = x.detach().double().requires_grad_()
    y = seen
    for name, linear in (("0", first), ("1", second)):
        A, B = wide[name]
        y = reference(linear, y, *given[name]) + 2.0 * y @ A.T @ B.T
    ((y - target) ** 2).mean().backward()
    near(x.grad, seen.grad, 1e-5)
    for name, factors in made.items():
        near(factors.A.grad, wide[name][0].grad, 1e-5)
        near(factors.B.grad, wide[name][1].grad, 1e-5)
    assert all(part.grad is None for name, part in model.named_parameters() if "trained" not in name)


@pytest.mark.parametrize("kind", TERMS)
def test_gradients_pass_through_given_loras(kind):
    """To the input and to the own weight and bias, again and again; none to DoRA's norms (section 4.3). Also if the
    strength was set under inference mode, as between two steps of a training."""
    model, terms = net().requires_grad_(), TERMS[kind]
    linear, loras, x, g = model[0], Loras(model), draw(2, 5, IN).requires_grad_(), draw(2, 5, OUT)
    with torch.inference_mode():
        loras.attach("it", Adapter({"0": terms}), 0.7)
    for _ in range(2):
        linear.zero_grad()
        x.grad = None
        (model[0](x) * g).sum().backward()
    wide = nn.Linear(IN, OUT)
    wide.weight.data, wide.bias.data = linear.weight.data, torch.zeros(OUT)
    effect = reference(wide, torch.eye(IN), *[(tuple(t for t in terms if not isinstance(t, Bias)), 0.7)]).T
    near(x.grad, g.double() @ effect, 1e-5)
    near(linear.bias.grad, g.sum((0, 1)).double(), 1e-5)
    gains = torch.ones(OUT, IN, dtype=torch.float64)  # DoRA multiplies the weight too
    for term in terms:
        if isinstance(term, Dora):
            rows, base = slice(term.start, term.start + term.shape[0]), linear.weight.detach().double()
            changed = base[term.start:term.start + term.shape[0]] + dense(term.inner, base)
            dim = 1 if term.axis == "out" else 0
            m = term.magnitude.double()
            gains[rows] += 0.7 * ((m[:, None] if dim else m) / changed.norm(dim=dim, keepdim=True) - 1)
    near(linear.weight.grad, gains * torch.einsum("bto,bti->oi", g.double(), x.detach().double()), 1e-5)


def test_gradients_against_differences():
    """Of one loss, by a step of 1e-4 to either side in float64."""
    model = net().double()
    inject.add_trained(model, "0", 2)
    factors = model[0].trained.double()
    factors.B.data = draw(OUT, 2).double()
    x = draw(4, IN).double()

    def loss():
        return model(x).square().mean()

    loss().backward()
    for parameter in (factors.A, factors.B):
        for index in ((0, 0), (1, 1), (len(parameter) - 1, parameter.shape[1] - 1)):
            value = parameter.data[index].item()
            sides = []
            for step in (1e-4, -1e-4):
                parameter.data[index] = value + step
                sides.append(loss().item())
            parameter.data[index] = value
            assert (sides[0] - sides[1]) / 2e-4 == pytest.approx(parameter.grad[index].item(), rel=1e-6, abs=1e-9)


def test_a_tiny_transformer_learns():
    """Its output is fitted by what is trained alone, on top of an attached LoRA, in bfloat16 as well."""
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny().to(dtype)
        given = tuple(part.to(dtype) if i not in (1, 3) else part for i, part in enumerate(sample()))
        loras, target = Loras(model), draw(1, 6, 64, seed=5).to(dtype)
        loras.attach("a", full(model, 0), 0.5)
        frozen = {name: part.clone() for name, part in model.named_parameters()}
        made = inject.add_trained(model, "blocks|final", 4)
        trained, losses = [part for part in model.parameters() if part.requires_grad], []
        for _ in range(8):
            loss = F.mse_loss(model(*given).float(), target.float())
            for part, grad in zip(trained, torch.autograd.grad(loss, trained), strict=True):
                part.data -= 0.01 * grad.sign()  # torch.optim would spend seconds on its imports
            losses.append(loss.item())
        assert losses[-1] < 0.8 * losses[0], losses
        assert all(torch.equal(part, frozen[name]) for name, part in model.named_parameters() if name in frozen)
        assert all(factors.B.any() for factors in made.values())


def test_given_and_trained_loras_do_not_lose_each_other():
    """While one is trained, strengths of given ones may change; taking them off, or trained ones along, is refused."""
    model = net()
    linear, loras, x = model[0], Loras(model), draw(2, IN)
    loras.attach("a", Adapter({"0": TERMS["LoHa"]}))
    factors = inject.add_trained(model, "0", 2)["0"]
    factors.B.data = draw(OUT, 2)
    trained = (LowRank(factors.A.data, factors.B.data),)
    loras.set_strength("a", 0.5)
    near(model[0](x), reference(linear, x, (TERMS["LoHa"], 0.5), (trained, 1.0)), 1e-5)
    loras.attach("b", Adapter({"0": TERMS["DoRA"]}), 0.3)
    expected = reference(linear, x, (TERMS["LoHa"], 0.5), (TERMS["DoRA"], 0.3), (trained, 1.0))
    loras.detach("b")
    loras.attach("b", Adapter({"0": TERMS["DoRA"]}), 0.3)
    near(model[0](x), expected, 1e-5)
    loras.detach("b")
    before = state(model)
    for act in (lambda: loras.detach("a"), loras.merge):
        with pytest.raises(UserError, match="in training"):
            act()
    assert state(model) == before and loras.on.keys() == {"a"} and not loras.merged
    model = net()
    inject.add_trained(model, "0", 2)
    before = state(model)
    with pytest.raises(UserError, match="attach given LoRAs before"):
        Loras(model).attach("a", Adapter({"0": TERMS["LoHa"]}))
    assert state(model) == before and isinstance(model[0], LoraLinear)
