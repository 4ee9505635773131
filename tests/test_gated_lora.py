"""The gated LoRA linear: against the definition in float64, forward and backward, and against the recorded LoraMerger.

What is called `test_either...` runs twice: here on the pair of functions for machines without a GPU, and, by
`test_kernels_interpreted`, in a process of its own on the Triton kernels, which Triton's interpreter executes.
"""

import importlib.util
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from golden import load
from kernels import gated_lora_linear as kernel
from kernels import runtime
from kernels.gated_lora_linear import Gate, fold, gated_lora_linear, stack
from lora.adapter import Adapter, LowRank
from lora.inject import Loras

INTERPRETED = runtime.INTERPRETED
only_here = pytest.mark.skipif(INTERPRETED, reason="once is enough: not about the kernels")


@dataclass
class Case:
    """One layer and all that is put beside it."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    loras: list[list[tuple[Tensor, Tensor, int]]]
    gate: Gate | None
    strengths: Tensor
    offset: Tensor | None
    slices: tuple[int, ...]

    def to(self, dtype: torch.dtype, wide: torch.dtype) -> "Case":
        """x, weights and LoRAs of one dtype, what belongs to the gate of the other; all leaves that want gradients."""
        def leaf(t: Tensor | None, dtype: torch.dtype = dtype) -> Tensor | None:
            return None if t is None else t.detach().to(dtype).requires_grad_()
        gate = None if self.gate is None else Gate(*(leaf(t, wide) for t in self.gate[:10]), self.gate.compete)
        loras = [[(leaf(A), leaf(B), start) for A, B, start in terms] for terms in self.loras]
        return Case(leaf(self.x), leaf(self.weight), leaf(self.bias), loras, gate, self.strengths.to(wide),
                    leaf(self.offset, wide), self.slices)

    def leaves(self) -> dict[str, Tensor]:
        out = {"x": self.x, "weight": self.weight, "bias of the layer": self.bias}
        out |= {f"{name}{i}.{j}": t for i, terms in enumerate(self.loras) for j, term in enumerate(terms)
                for name, t in zip("AB", term[:2], strict=True)}
        out |= {} if self.gate is None else dict(zip(Gate._fields[:10], self.gate[:10], strict=True))
        return out | ({} if self.offset is None else {"offset": self.offset})

    def eager(self) -> Tensor:
        rows = len(self.weight)
        deltas = [sum((F.pad(F.linear(F.linear(self.x, A), B), (start, rows - start - len(B))) for A, B, start in terms))
                  for terms in self.loras]
        there = [i for i, terms in enumerate(self.loras) if terms]
        offset = None if self.offset is None else self.offset[:, there]
        return kernel.eager(F.linear(self.x, self.weight, self.bias), [deltas[i] for i in there], self.gate,
                            self.strengths[there], offset, self.slices)

    def ours(self, base=None) -> Tensor:
        beside = stack(self.loras, len(self.weight), self.slices, self.x.dtype)
        base = base or (lambda x: F.linear(x, self.weight, self.bias))
        gate, compete = (None, False) if self.gate is None else (fold(self.gate), self.gate.compete)
        return gated_lora_linear(self.x, base, beside, gate, self.strengths, self.offset, compete)


def case(rows: tuple[int, ...] = (1, 9), ranks: tuple = (4, 9), slices: tuple[int, ...] = (40, 24), compete: bool = False,
         offset: bool = True, gated: bool = True, columns: int = 32) -> Case:
    """ranks: of each LoRA one number, a tuple (term by term, each in its slice), or None for a LoRA without this layer."""
    g, out = torch.Generator().manual_seed(sum(rows) + len(ranks)), sum(slices)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    loras = []
    for each in ranks:
        starts = [sum(slices[:s]) for s in range(len(slices))]
        if isinstance(each, tuple):
            loras.append([(draw(r, columns) / columns ** 0.5, draw(slices[s], r) / r ** 0.5, starts[s])
                          for s, r in enumerate(each) if r])
        else:
            loras.append([(draw(each, columns) / columns ** 0.5, draw(out, each) / each ** 0.5, 0)] if each else [])
    gate = Gate(*(draw(out) for _ in range(8)), draw(out).abs(), draw(out), compete) if gated else None
    return Case(draw(*rows, columns), draw(out, columns) / columns ** 0.5, draw(out), loras, gate,
                torch.linspace(0.5, 1.5, len(ranks), dtype=torch.float64),
                draw(rows[0], len(ranks), len(slices)) if offset and gated else None, slices)


def run(each: Case, how) -> dict[str, Tensor]:
    """The output and all gradients, in float64."""
    out, leaves = how(each), each.leaves()
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).half().to(out.dtype)
    grads = torch.autograd.grad(out, list(leaves.values()), grad)
    return {"out": out.detach().double()} | {name: part.double() for name, part in zip(leaves, grads, strict=True)}


def error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm().clamp(min=1e-30)).item()


CASES = {
    "one row, eight LoRAs": case((1, 1), (2, 4, 3, 5, 2, 4, 3, 2), (40,), offset=False),
    "63 rows, two slices, an absent one": case((1, 63), (4, None, (3, 5), (0, 4))),
    "100 rows, competing": case((2, 50), (4, 9), compete=True),
    "257 rows, rank beyond a block": case((257,), (80,), (48,), offset=False),
    "outputs beyond what is read at a time": case((1, 3), (2,), (1100,), offset=False),
    "competing in one slice": case((1, 33), (4, 3, 2), (70,), compete=True, offset=False),
    "without a gate": case((1, 63), (4, (3, 5), (0, 4)), gated=False),
}
TORCH_CASES = {
    "rank 64": case((2, 30), (64, 16), (96, 48)),
    "four slices of many": case((1, 40), ((4, 4, 4, 4), 16, (0, 8, 0, 8)), (200, 200, 200, 800)),
    "three axes": case((2, 3, 5), (4, 4), (40, 24)),
}


def no_gradient(name: str, each: Case) -> bool:
    """A softmax does not change when all logits do: what shifts all alike has the gradient 0."""
    return each.gate is not None and each.gate.compete and name in ("weight_base", "bias", "lora_shift")


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=("fp32", "fp16"))
@pytest.mark.parametrize("name", CASES if INTERPRETED else CASES | TORCH_CASES)
def test_either_against_float64(name, dtype):
    """Output and every gradient are at most 1.5 times as far off as the definition in the same dtype, or within 2e-6, the
    least that float32 can be asked for; uninitialised memory is NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        given = (CASES | TORCH_CASES)[name].to(dtype, torch.float32)
        expected = run(given.to(torch.float64, torch.float64), Case.eager)
        chain, actual = run(given, Case.eager), run(given, Case.ours)
    finally:
        torch.use_deterministic_algorithms(False)
    for part, value in actual.items():
        if no_gradient(part, given):
            assert value.norm() <= 2e-3 * actual["weight_lora"].norm(), part
            continue
        mine, limit = error(value, expected[part]), max(1.5 * error(chain[part], expected[part]), 2e-6)
        assert mine <= limit, f"{part}: {mine:.2e} above {limit:.2e}"


@pytest.mark.parametrize("count", range(1, 9))
def test_either_for_any_number_of_loras(count):
    """Of mixed ranks; gates that compete for even numbers."""
    given = case((1, 5), (2, 5, 3, 4, 1, 6, 2, 3)[:count], (24,), compete=count % 2 == 0, offset=False, columns=8)
    given = given.to(torch.float32, torch.float32)
    expected, actual = run(given.to(torch.float64, torch.float64), Case.eager), run(given, Case.ours)
    for name, value in actual.items():
        if not no_gradient(name, given):
            assert error(value, expected[name]) <= 1e-5, name


def adversarial(kind: str) -> tuple[Tensor, Tensor]:
    """B (O, R), h (M, R)."""
    g = torch.Generator().manual_seed(0)
    B, h = torch.randn(90, 6, generator=g), torch.randn(40, 6, generator=g)
    if kind == "nearly rank one":
        B = B[:, :1] @ torch.randn(1, 6, generator=g) + 1e-4 * B
    elif kind == "mean far above deviation":  # mean^2 / var = 1e5
        B = 0.003 * B + 1.0
        h = h.abs()
    elif kind == "tiny":
        B = 1e-6 * B
    elif kind == "zero":
        B = 0 * B
    elif kind == "variance of eps":
        B = 0.003 * B
    return B, h


@pytest.mark.parametrize("kind", ("plain", "nearly rank one", "mean far above deviation", "tiny", "zero", "variance of eps"))
def test_either_statistics(kind):
    """Of l_i without l_i, to 5e-6 in variance + eps (kernels.md, section 3), and in the mean of the deviation's size."""
    B, h = adversarial(kind)
    beside = stack([[(torch.zeros(6, 3), B, 0)]], 90)
    y = h @ B.T
    gate = torch.zeros(6, 90)
    _, stats = torch.ops.minflux.gated_lora(y, h, beside.B, beside.root, beside.mean, gate, torch.ones(1), None,
                                            *beside.layout, False)
    exact = h.double() @ B.T.double()
    for member, value in ((0, y.double()), (1, exact)):
        mean, rstd = value.mean(1), (value.var(1, correction=0) + 1e-5).rsqrt()
        assert (stats[0, member, 1] / rstd - 1).abs().max() <= 5e-6
        assert ((stats[0, member, 0] - mean).abs() <= 1e-6 * value.abs().amax(1)).all()


def test_either_is_repeatable_and_takes_strides():
    """Bit for bit; y and h as views of one product (`join`) and a gradient whose rows are apart."""
    given = CASES["63 rows, two slices, an absent one"].to(torch.float32, torch.float32)
    first, again = run(given, Case.ours), run(given, Case.ours)
    assert all(torch.equal(a, b) for a, b in zip(first.values(), again.values(), strict=True))
    beside = stack(given.loras, len(given.weight), given.slices)
    base = kernel.join(given.weight, given.bias, beside)
    joined = run(given, lambda each: torch.cat((each.ours(base), each.x), -1)[..., :64])
    for name in ("out", "x", "weight", "weight_cross", "offset"):
        assert error(joined[name], first[name]) <= 1e-6, name


def test_either_beside_a_layer():
    """LoRAs that `lora` puts on a network take the kernels where they run."""
    torch.manual_seed(0)
    linear = nn.Linear(24, 40).requires_grad_(False)
    model, x = nn.Sequential(linear), torch.randn(2, 5, 24, requires_grad=True)
    terms = LowRank(torch.randn(3, 24), torch.randn(12, 3), 0.5, 20), LowRank(torch.randn(2, 24), torch.randn(40, 2), 0.5)
    Loras(model).attach("it", Adapter({"0": terms}), 0.7)
    assert (model[0].plan.beside is not None) == INTERPRETED
    weight = linear.weight + 0.7 * (terms[1].dense() + F.pad(terms[0].dense(), (0, 0, 20, 8)))
    out, grad = model(x), torch.randn(2, 5, 40)
    assert error(out, F.linear(x, weight, linear.bias)) <= 1e-6
    assert error(torch.autograd.grad(out, x, grad)[0], grad @ weight) <= 1e-6


@only_here
@pytest.mark.skipif(importlib.util.find_spec("triton") is None,
                    reason="Triton is not installed: only the functions without kernels run here")
@pytest.mark.interpreted("either")
def test_kernels_interpreted(interpreted):
    status, said = interpreted
    assert status == 0, said


@only_here
@pytest.mark.parametrize("compete", (False, True))
def test_gradcheck(compete):
    """By differences in float64, of the op itself and of all parameters."""
    given = case((2, 3), (2, (1, 2)), (7, 5), compete, columns=4).to(torch.float64, torch.float64)
    assert torch.autograd.gradcheck(lambda *_: given.ours(), list(given.leaves().values()))


@only_here
@pytest.mark.parametrize("compete", (False, True))
def test_closed_form_equals_autograd(compete):
    given = case((2, 9), (2, (1, 2), 5), (17, 15), compete).to(torch.float64, torch.float64)
    expected, actual = run(given, Case.eager), run(given, Case.ours)
    size = max(part.norm() for part in expected.values())
    for name, value in actual.items():
        assert (value - expected[name]).norm() <= 1e-12 * (size if no_gradient(name, given) else expected[name].norm()), name


@only_here
def test_the_recorded_merger():
    """The definition and the op give LoraMerger's outputs and gradients. l_i in.lora<N> are of full rank: A is one."""
    golden = load("lora_merger")
    for count in golden.config["n"]:
        names = ("weight_base", "weight_lora", "weight_cross", "bias", "norm_base.weight", "norm_base.bias",
                 "norm_lora.weight", "norm_lora.bias")
        parts = [golden.weights[name].requires_grad_() for name in names]
        out_weight = golden.weights["weight_out"].requires_grad_()
        gate = Gate(*parts, *kernel.published(out_weight))
        base = golden.inputs["base"].float().requires_grad_()
        deltas = golden.inputs[f"lora{count}"].float().requires_grad_()                           # (N, B, L, D)
        out = kernel.eager(base, list(deltas), gate)
        golden.close(out, f"n{count}")
        grads = torch.autograd.grad(out, [*parts, out_weight, base, deltas], golden.inputs["gout"].float())
        for name, grad in zip([*(f"grad.{name}" for name in (*names, "weight_out")), "grad_base", "grad_lora"], grads,
                              strict=True):
            golden.close(grad, f"n{count}_{name}")
        x, weight, bias = (golden.inputs[name].float() for name in ("x", "weight", "bias"))
        A, B = golden.inputs["A"].float()[:count], golden.inputs["B"].float()[:count]
        beside = stack([[(a, b, 0)] for a, b in zip(A, B, strict=True)], len(weight))
        for base in (lambda x: F.linear(x, weight, bias), kernel.join(weight, bias, beside)):  # noqa: B023
            golden.close(gated_lora_linear(x, base, beside, fold(gate)), f"linear{count}")


@only_here
def test_what_the_gates_promise():
    """ours: with logits 0 the plain sum whatever lambda; any order of LoRAs; linear in the strengths. No LoRA: y itself."""
    given = case((2, 5), (3, 4, 2), offset=False).to(torch.float32, torch.float32)
    out, mix = len(given.weight), torch.rand(64, generator=torch.Generator().manual_seed(0))
    beta, y = 3 ** -0.5, F.linear(given.x, given.weight, given.bias)
    for compete in (False, True):
        zero = Gate(*[torch.zeros(out)] * 4, torch.ones(out), torch.zeros(out), torch.ones(out), torch.zeros(out),
                    *kernel.around_sum(mix, beta, 3, compete), compete)
        given.gate = None
        plain = y + beta * (given.ours() - y)
        given.gate = zero
        assert error(given.ours(), plain) <= 1e-6
        given.gate = Gate(*case((2, 5), (3, 4, 2)).to(torch.float32, torch.float32).gate[:8], *zero[8:])
        there = given.ours()
        given.loras, given.strengths = given.loras[::-1], given.strengths.flip(0)
        assert error(given.ours(), there) <= 1e-6
        given.strengths = 2 * given.strengths
        assert error(given.ours() - y, 2 * (there - y)) <= 1e-6
    assert stack([[], []], out) is None
    assert torch.equal(gated_lora_linear(given.x, lambda x: F.linear(x, given.weight, given.bias), None), y)
    empty = gated_lora_linear(given.x[:0], lambda x: F.linear(x, given.weight), stack(given.loras, out, given.slices),
                              fold(given.gate), given.strengths)
    assert empty.shape == (0, 5, out)


@only_here
@pytest.mark.parametrize("gated", (True, False))
def test_as_an_op(gated):
    """Its fake and its gradient are what torch asks of an op; under checkpointing and meta tensors it is the same."""
    given = case((2, 5), (3, (2, 2)), gated=gated).to(torch.float32, torch.float32)
    plain = run(given, Case.ours)
    again = run(given, lambda each: checkpoint(Case.ours, each, use_reentrant=False))
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    beside = stack(given.loras, 64, given.slices)
    y, h = F.linear(given.x, given.weight).flatten(0, 1), F.linear(given.x, beside.A).flatten(0, 1)
    args = (y.detach().requires_grad_(), h.detach().requires_grad_(), beside.B.detach().requires_grad_(), beside.root,
            beside.mean, fold(given.gate).detach().requires_grad_() if gated else None, torch.ones(2), None,
            *beside.layout, False)
    torch.library.opcheck(torch.ops.minflux.gated_lora.default, args,
                          test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))
    meta = torch.ops.minflux.gated_lora(*(part.to("meta") if isinstance(part, Tensor) else part for part in args))
    assert meta[0].shape == y.shape


@only_here
def test_compiles_without_a_break():
    given = case((2, 5), (3, (2, 2))).to(torch.float32, torch.float32)
    beside, plain = stack(given.loras, 64, given.slices), run(given, Case.ours)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x, weight, bias, gate, offset):
        return gated_lora_linear(x, lambda x: F.linear(x, weight, bias), beside, fold(Gate(*gate)), given.strengths.float(),
                                 offset)

    actual = run(given, lambda each: compiled(each.x, each.weight, each.bias, tuple(each.gate[:10]), each.offset))
    assert all(error(actual[name], plain[name]) <= 1e-6 for name in plain)
