"""The rules by which several LoRAs are weighed, each against dense arithmetic written out, on two small layers."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux.errors import UserError
from kernels import gated_lora_linear as kernel
from lora import fuse
from lora.adapter import Adapter, Bias, Dora, LoKr, LowRank, delta
from lora.gates import Gates, Options
from lora.inject import Loras
from lora.probes import Layer

LAYERS = (Layer("first", "a", 12, (8, 8, 4)), Layer("second", "b", 20, (12,)))
TIMES = [1.0, 0.7, 0.4, 0.1, 0.0]


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, img: Tensor, t: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(img))) * t[:, None, None]


def lora(seed: int, rank: int = 3, layers: tuple[str, ...] = ("first", "second")) -> Adapter:
    g = torch.Generator().manual_seed(seed)
    shape = {"first": (20, 12), "second": (12, 20)}
    return Adapter({name: (LowRank(torch.randn(rank, shape[name][1], generator=g) * 0.3,
                                   torch.randn(shape[name][0], rank, generator=g) * 0.3, 0.5),) for name in layers})


def on(adapters: list[Adapter], strengths: list[float] | None = None) -> tuple[Toy, Loras]:
    model = Toy().requires_grad_(False)
    loras = Loras(model)
    for i, (adapter, strength) in enumerate(zip(adapters, strengths or [1.0] * len(adapters), strict=True)):
        loras.attach(f"lora {i}", adapter, strength)
    return model, loras


def dense(adapter: Adapter, layer: str) -> Tensor:
    return delta(adapter.layers.get(layer, ()), {"first": (20, 12), "second": (12, 20)}[layer],
                 getattr(Toy(), layer).weight.detach())


def with_matrices(first: Tensor, second: Tensor) -> Toy:
    model = Toy().requires_grad_(False)
    model.first.weight += first
    model.second.weight += second
    return model


def x(batch: int = 2) -> Tensor:
    return torch.randn(batch, 5, 12, generator=torch.Generator().manual_seed(9))


def at(t: float, batch: int = 2) -> Tensor:
    return torch.full((batch,), t)


def ran(rule: str, adapters: list[Adapter], strengths: list[float] | None = None, t: float = 0.7, **more) -> Tensor:
    model, loras = on(adapters, strengths)
    fusing = fuse.put(rule, loras, **more)
    v = fusing.velocity(model, TIMES)
    fusing.look(lambda: v(x(), at(1.0)))
    return v(x(), at(t))


def merged(adapters: list[Adapter], make) -> Tensor:
    parts = [make([dense(adapter, layer) for adapter in adapters]) for layer in ("first", "second")]
    return with_matrices(*parts)(x(), at(0.7))


@pytest.mark.parametrize(("rule", "factor"), [("sum", 1), ("mean", 1 / 3), ("sqrt", 3 ** -0.5)])
def test_scaled_sums(rule, factor):
    adapters = [lora(1), lora(2), lora(3)]
    torch.testing.assert_close(ran(rule, adapters), merged(adapters, lambda D: factor * sum(D)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", [rule for rule in fuse.RULES if rule not in ("gates", "static")])
@pytest.mark.parametrize("others", [[], [0.0]])
def test_one_lora_alone_is_as_ever(rule, others):
    """Also beside one at strength 0."""
    adapters = [lora(1), *(lora(i + 2) for i in range(len(others)))]
    expected = on(adapters[:1], [0.7])[0](x(), at(0.7))
    assert torch.equal(ran(rule, adapters, [0.7, *others]), expected) or rule in ("mean", "sqrt", "composite")
    torch.testing.assert_close(ran(rule, adapters, [0.7, *others]), expected)


def test_dare_drops_four_of_five_and_keeps_the_mean():
    adapters = [lora(1), lora(2)]
    g = torch.Generator().manual_seed(4)
    expected = merged(adapters, lambda D: sum(d * (torch.rand(d.shape, generator=g) < 0.2) * 5 for d in D))
    torch.testing.assert_close(ran("dare", adapters, seed=4), expected, rtol=1e-5, atol=1e-5)
    many = fuse.dare([torch.ones(300, 300)], torch.Generator().manual_seed(0))
    assert set(many.unique().tolist()) == {0.0, 5.0} and many.mean().item() == pytest.approx(1, abs=0.02)


def test_ties_entry_by_entry():
    """By a loop over entries."""
    D = [dense(lora(i), "first") for i in (1, 2, 3)]
    kept = []
    for d in D:
        least = sorted(d.abs().flatten().tolist())[-round(0.2 * d.numel())]
        kept.append([[value if abs(value) >= least else 0.0 for value in row] for row in d.tolist()])
    expected = torch.zeros(20, 12)
    for i, j in itertools.product(range(20), range(12)):
        values = [each[i][j] for each in kept]
        sign = math.copysign(1, sum(values))
        agree = [value for value in values if value and math.copysign(1, value) == sign]
        expected[i, j] = sum(agree) / len(agree) if agree else 0
    torch.testing.assert_close(fuse.ties(D), expected)
    torch.testing.assert_close(ran("ties", [lora(1), lora(2)]), merged([lora(1), lora(2)], fuse.ties), rtol=1e-5, atol=1e-5)


def test_switch_takes_them_in_turn():
    adapters = [lora(1), lora(2), lora(3)]
    model, loras = on(adapters)
    v = fuse.put("switch", loras).velocity(model, TIMES)
    for step, t in enumerate(TIMES[:-1]):
        torch.testing.assert_close(v(x(), at(t)), on([adapters[step % 3]])[0](x(), at(t)))


def test_composite_averages_velocities():
    adapters = [lora(1), lora(2), lora(3)]
    torch.testing.assert_close(ran("composite", adapters), sum(on([one])[0](x(), at(0.7)) for one in adapters) / 3)


def test_klora_keeps_the_larger_of_two():
    """The scale of the second falls from 1.275 through 0 and rises again; layers change sides with it, one by one."""
    adapters, layers = [lora(1, 2), lora(2, 3)], ("first", "second")
    sizes = {layer: [dense(one, layer).abs().flatten().sort(descending=True).values[:6].sum().item() for one in adapters]
             for layer in layers}
    gamma = sum(a / b for a, b in sizes.values()) / 2
    model, loras = on(adapters)
    v = fuse.put("klora", loras).velocity(model, TIMES)
    taken = set()
    for step, t in enumerate(TIMES[:-1]):
        scale = (1.5 * step / 4 + 1.275) % 1.5
        choice = tuple(0 if sizes[layer][0] / gamma >= sizes[layer][1] * scale else 1 for layer in layers)
        taken.add(choice)
        expected = with_matrices(*(dense(adapters[i], layer) for i, layer in zip(choice, layers, strict=True)))
        torch.testing.assert_close(v(x(), at(t)), expected(x(), at(t)), rtol=1e-5, atol=1e-5)
    assert len(taken) > 1


@pytest.mark.parametrize("rule", ["klora", "ziplora"])
def test_pairs_only(rule):
    with pytest.raises(UserError, match="expected two"):
        fuse.put(rule, on([lora(1), lora(2), lora(3)])[1])


def test_zip_finds_apart_what_is_apart():
    """Inputs of the one LoRA and of the other share no coordinate: each D_i is kept where its inputs are, not elsewhere."""
    D = [dense(lora(i, 4), "first") for i in (1, 2)]
    M = [torch.diag(torch.tensor([1.0] * 6 + [0.0] * 6)), torch.diag(torch.tensor([0.0] * 6 + [1.0] * 6))]
    m = fuse.zip_columns(*D, *M, steps=800)
    for i, seen in enumerate((slice(0, 6), slice(6, 12))):
        change = (D[0] * m[0] + D[1] * m[1])[:, seen]
        assert (change - D[i][:, seen]).norm() < 0.05 * D[i][:, seen].norm()
    assert torch.equal(ran("ziplora", [lora(1), lora(2)]), ran("ziplora", [lora(1), lora(2)]))


def test_zip_loss_is_that_of_the_inputs_themselves():
    """Its gradient at the start, against autograd through inputs: one Adam step tells the sign of every entry."""
    D = [dense(lora(i), "first") for i in (1, 2)]
    X = [torch.randn(30, 12, generator=torch.Generator().manual_seed(i)) for i in (5, 6)]
    m = torch.ones(2, 12, requires_grad=True)
    loss = 0.01 * (m[0] * m[1]).abs().mean()
    for i in (0, 1):
        whole = (X[i] @ D[i].T).square().sum()
        loss = loss + ((X[i] * m[0]) @ D[0].T + (X[i] * m[1]) @ D[1].T - X[i] @ D[i].T).square().sum() / whole
    loss.backward()
    stepped = fuse.zip_columns(*D, *(each.T @ each / 30 for each in X), steps=1)
    torch.testing.assert_close(stepped, 1 - 0.01 * m.grad.sign(), rtol=1e-4, atol=1e-4)


def test_energy_by_hand():
    y, deltas = torch.tensor([[1.0, 2.0]]), [torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 15.0]])]
    expected = [1 + 2 * 5 / 20 * 3, 2 + 2 * 5 / 20 * 4 + 0.5 * 2 * 15 / 20 * 15]
    torch.testing.assert_close(fuse.energy(y, deltas, [1.0, 0.5]), torch.tensor([expected]))
    assert torch.isfinite(fuse.energy(y, [torch.zeros(1, 2)] * 2, [1.0, 1.0])).all()


# --- gates ---

def gates(learned: bool = True, **options) -> Gates:
    """With weights as training may leave them, or fresh."""
    torch.manual_seed(7)
    made = Gates(LAYERS, Options(**options))
    if learned:
        with torch.no_grad():
            for parameter in made.parameters():
                parameter += 0.5 * torch.randn(parameter.shape)
    return made


KNOWN = {f"lora {i}": torch.randn(6, generator=torch.Generator().manual_seed(20 + i)) for i in range(6)}


def gated(adapters: list[Adapter], strengths: list[float] | None = None, made: Gates | None = None) -> Tensor:
    return ran("gates", adapters, strengths, gates=made or gates(embedding=6), embeddings=KNOWN)


@pytest.mark.parametrize("learned", [True, False])
def test_no_lora_and_one_lora_exactly(learned):
    made = gates(learned, embedding=6)
    assert torch.equal(gated([], made=made), Toy()(x(), at(0.7)))
    assert torch.equal(gated([lora(1)], [0.8], made), on([lora(1)], [0.8])[0](x(), at(0.7)))
    assert torch.equal(gated([lora(1), lora(2)], [0.8, 0.0], made), on([lora(1)], [0.8])[0](x(), at(0.7)))


@pytest.mark.parametrize("compete", [True, False])
def test_untrained_they_are_the_plain_sum(compete):
    adapters = [lora(1), lora(2), lora(3)]
    torch.testing.assert_close(gated(adapters, made=gates(False, embedding=6, compete=compete)), ran("sum", adapters),
                               rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("compete", [True, False])
def test_order_is_of_no_account(compete):
    made = gates(embedding=6, compete=compete, gain=5)
    adapters = [lora(1), lora(2, 2), lora(3, 4, ("second",))]
    expected = gated(adapters, [1.0, 0.6, 0.8], made)
    for order in itertools.permutations(range(3)):
        model = Toy().requires_grad_(False)
        loras = Loras(model)
        for i in order:
            loras.attach(f"lora {i}", adapters[i], [1.0, 0.6, 0.8][i])
        found = fuse.put("gates", loras, gates=made, embeddings=KNOWN).velocity(model, TIMES)(x(), at(0.7))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert (expected - ran("sum", adapters, [1.0, 0.6, 0.8])).abs().max() > 0.01  # they do something


def test_gains_by_hand():
    """What each LoRA's outputs are multiplied with, as factors and as what is none; by itself nothing is."""
    made = gates(False, embedding=6, gain=5)
    with torch.no_grad():
        for layer in LAYERS:
            made.of(layer.name).gain.weight.normal_(0, 2)
    known = torch.stack([KNOWN["lora 0"], KNOWN["lora 1"], KNOWN["lora 2"]])
    who = known / known.square().mean(1, keepdim=True).sqrt()
    company = F.silu(made.gain_in(torch.stack([torch.cat((who[i], (who.sum(0) - who[i]) / 2)) for i in range(3)])))
    adapters = [lora(1), lora(2), lora(3)]
    g = torch.Generator().manual_seed(5)
    adapters[1] = Adapter({**adapters[1].layers, "second": (LoKr(torch.randn(3, 4, generator=g) * 0.3,
                                                                 (torch.randn(4, 5, generator=g) * 0.3,)),)})

    def change(name: str) -> Tensor:
        gain = 2 * torch.sigmoid(company @ made.of(name).gain.weight.T / 3)
        return sum(gain[i][:, None] * dense(one, name) for i, one in enumerate(adapters))
    with torch.no_grad():
        expected = with_matrices(change("first"), change("second"))(x(), at(0.7))
    torch.testing.assert_close(gated(adapters, made=made), expected, rtol=1e-4, atol=1e-5)
    assert (expected - ran("sum", adapters)).abs().max() > 0.02, "they do something"
    assert torch.equal(gated([lora(1)], [0.8], made), on([lora(1)], [0.8])[0](x(), at(0.7)))


def test_linear_in_strength():
    """Of the layer itself: what follows it is not."""
    made, adapters = gates(embedding=6), [lora(1, layers=("second",)), lora(2, layers=("second",))]
    base = Toy()(x(), at(0.7))
    one, two, both = (gated(adapters, s, made) - base for s in ([1e-9, 1.0], [1.0, 1e-9], [0.3, -1.7]))
    torch.testing.assert_close(both, 0.3 * two - 1.7 * one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"compete": True}, {"slices": False}, {"time": False}, {"embedding": 6},
                                     {"kind": "published"}, {"variant": "no_base"}, {"variant": "no_cross"},
                                     {"variant": "no_lora"}])
def test_against_the_definition(options):
    """The equation of the layer, with dense deltas and every term written out."""
    made, adapters, t = gates(**options), [lora(1), lora(2), lora(3)], at(0.7)
    y = x()
    for name, after in (("first", torch.tanh), ("second", lambda y: y * 0.7)):
        layer, own = getattr(Toy(), name), made.of(name)
        base, deltas = layer(y), [F.linear(y, dense(one, name)) for one in adapters]
        time, members = made.shared(t, torch.stack([KNOWN[f"lora {i}"] for i in range(3)])[:, :made.options.embedding or 6])
        shift = made.offset(name, 3, time, members)
        y = after(kernel.eager(base, deltas, own.gate(3), None, shift, own.slices))
    torch.testing.assert_close(gated(adapters, made=made), y, rtol=1e-5, atol=1e-5)


def test_of_any_kind_of_lora():
    """DoRA, LoKr and biases: by the definition, l_i as they come beside the layer."""
    g = torch.Generator().manual_seed(3)
    low = lora(1).layers["first"][0]
    kinds = [Adapter({"first": (Dora(low, torch.rand(20, generator=g) + 0.5),)}),
             Adapter({"first": (LoKr(torch.randn(4, 3, generator=g) * 0.3, (torch.randn(5, 4, generator=g) * 0.3,)),
                                Bias(torch.randn(20, generator=g)))})]
    made = gates(embedding=6)
    model, loras = on(kinds)
    v = fuse.put("gates", loras, gates=made, embeddings=KNOWN).velocity(model, TIMES)
    layer, own = Toy().first, made.of("first")
    deltas = [F.linear(x(), dense(kinds[0], "first")), F.linear(x(), dense(kinds[1], "first"))
              + kinds[1].layers["first"][1].value]
    time, members = made.shared(at(0.7), torch.stack([KNOWN["lora 0"], KNOWN["lora 1"]]))
    y = kernel.eager(layer(x()), deltas, own.gate(2), None, made.offset("first", 2, time, members), own.slices)
    torch.testing.assert_close(v(x(), at(0.7)), Toy().second(torch.tanh(y)) * 0.7, rtol=1e-4, atol=1e-5)


def test_gradients_of_all_parameters():
    """In float64 against numerical differences along the gradient; through the op that training uses."""
    made = gates(embedding=6).double()
    model = Toy().requires_grad_(False).double()
    loras = Loras(model)
    for i in range(3):
        loras.attach(f"lora {i}", lora(i + 1))

    def loss() -> Tensor:
        v = fuse.put("gates", loras, gates=made, embeddings=KNOWN).velocity(model, TIMES)
        return v(x().double(), torch.tensor([0.3, 0.7]).double()).square().mean()
    loss().backward()
    for name, parameter in made.named_parameters():
        size = parameter.grad.norm().item()
        assert size > 0, name
        step, way = 1e-5, parameter.grad / size
        with torch.no_grad():
            parameter += step * way
            up = loss()
            parameter -= 2 * step * way
            down = loss()
            parameter += step * way
        assert ((up - down) / (2 * step)).item() == pytest.approx(size, rel=1e-4, abs=1e-9), name


def test_static_equals_constant_gates():
    made = gates(embedding=0, time=False)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.split(".")[-1] in ("weight_base", "weight_lora", "weight_cross"):
                parameter.zero_()
    adapters = [lora(1), lora(2)]
    by_gates = ran("gates", adapters, [1.0, 0.5], gates=made)
    assert (by_gates - ran("static", adapters, [1.0, 0.5], gates=made)).norm() < 1e-3 * by_gates.norm()
    assert (by_gates - ran("sum", adapters, [1.0, 0.5])).norm() > 1e-2 * by_gates.norm()


def test_a_watched_gate_draws_the_same_and_is_noted():
    adapters, made = [lora(1), lora(2)], gates(embedding=6)
    model, loras = on(adapters)
    fusing = fuse.put("gates", loras, gates=made, embeddings=KNOWN, watched=True)
    found = fusing.velocity(model, TIMES)(x(), at(0.7))
    torch.testing.assert_close(found, gated(adapters, made=made), rtol=1e-5, atol=1e-5)
    assert {(layer, name) for _, layer, name, _ in fusing.seen} == set(itertools.product(("first", "second"),
                                                                                        ("lora 0", "lora 1")))


def test_two_conflicting_loras_learn_to_take_turns():
    """Spec 6.8: LoRA i was made for inputs of kind i and spoils the other's; gates see the kind in y."""
    g = torch.Generator().manual_seed(0)
    layer = nn.Linear(16, 24).requires_grad_(False)
    centres = 2 * torch.randn(2, 16, generator=g)
    deltas = [torch.randn(24, 4, generator=g) @ torch.randn(4, 16, generator=g) * 0.2 for _ in range(2)]
    factors = [torch.linalg.svd(D, full_matrices=False) for D in deltas]
    adapters = [Adapter({"0": (LowRank(V[:4], U[:, :4] * S[:4]),)}) for U, S, V in factors]
    model = nn.Sequential(layer)
    loras = Loras(model)
    for i, adapter in enumerate(adapters):
        loras.attach(str(i), adapter)

    def data(i: int) -> tuple[Tensor, Tensor]:
        rows = centres[i] + 0.5 * torch.randn(64, 16, generator=g)
        return rows, layer(rows) + rows @ deltas[i].T

    def error(v) -> Tensor:
        return sum((v(rows[None], torch.ones(1))[0] - wanted).square().mean() for rows, wanted in (data(0), data(1)))
    by_sum = error(lambda rows, t: model(rows)).item()
    made = Gates((Layer("0", "a", 16, (24,)),), Options())
    v = fuse.put("gates", loras, gates=made).velocity(lambda rows, t: model(rows), TIMES)
    optimiser = torch.optim.Adam(made.parameters(), lr=3e-2)
    for _ in range(200):
        optimiser.zero_grad()
        error(v).backward()
        optimiser.step()
    assert error(v).item() < 0.3 * by_sum
