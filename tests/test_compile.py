"""torch.compile of the blocks: how many graphs there are, that none is broken, and that the numbers stay.

All but one trace without generating code, as inductor's C++ takes a minute where the machine is busy.
"""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters

import sample
from flux import bench, compiled, conditioning, flow, storage
from flux.config import TINY
from flux.errors import UserError
from flux.model import Flux
from flux.reuse import Reusing
from lora.adapter import Adapter, Dora, LowRank
from lora.inject import Loras

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def afresh():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(dtype=torch.float32, backend="eager"):
    """The same network twice: compiled, and not."""
    pair = []
    for _ in range(2):
        torch.manual_seed(0)
        pair.append(Flux(replace(TINY, depth=2, depth_single_blocks=2)).to(dtype).eval().requires_grad_(False))
    compiled.compile_blocks(pair[0], backend=backend)
    return pair


def given(batch=2, h=4, w=6, text=5, dtype=torch.float32):
    cond = conditioning.condition(random(batch, text, TINY.context_in_dim, seed=1).to(dtype),
                                  random(batch, TINY.vec_in_dim, seed=2).to(dtype), 8 * w, 8 * h, 3.5)
    return random(batch, h * w // 4, 64).to(dtype), torch.full((batch,), 0.7, dtype=dtype), cond


def error(pair, *sizes, dtype=torch.float32):
    """Of the compiled network, relative to the largest number of the other."""
    img, t, cond = given(*sizes, dtype=dtype)
    ours, plain = (conditioning.velocity(model, cond)(img, t).float() for model in pair)
    return ((ours - plain).abs().max() / plain.abs().max()).item()


def graphs() -> int:
    assert not counters["graph_break"], counters["graph_break"]
    return counters["stats"]["unique_graphs"]


@torch._dynamo.config.patch(recompile_limit=1)  # which must be raised
@torch.inference_mode()
def test_one_graph_serves_all_blocks_of_a_kind_and_a_size_that_changes_takes_one_more():
    """From then on all sizes are free; a batch of one is a case of its own, as for all of torch.compile."""
    pair = build()
    expected = [((2, 4, 6, 5), 2), ((2, 4, 6, 5), 2), ((3, 6, 6, 7), 4), ((5, 10, 4, 9), 4), ((2, 2, 6, 4), 4),
                ((1, 4, 6, 5), 6), ((1, 6, 10, 11), 6)]
    for sizes, count in expected:
        assert error(pair, *sizes) < 1e-5 and graphs() == count, sizes


def with_loras(model, dora=False):
    """Random ones on every linear layer of the blocks."""
    layers = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "in_features") and "_blocks" in name:
            term = LowRank(random(2, layer.in_features, seed=3), random(layer.out_features, 2, seed=4))
            layers[name] = (Dora(term, 1 + random(layer.out_features, seed=5).abs()) if dora else term,)
    Loras(model).attach("a", Adapter(layers), 0.3)


@pytest.mark.parametrize("kind", ("bf16 with LoRAs", "fp8 with DoRAs"))
def test_what_blocks_are_made_of(kind):
    dtype = torch.bfloat16 if kind.startswith("bf16") else torch.float32
    pair = build(dtype)
    for model in pair:
        if kind == "fp8 with DoRAs":
            storage.store(model, torch.float8_e4m3fn, least=1)
        with_loras(model, dora="DoRA" in kind)
    with torch.no_grad():
        assert error(pair, dtype=dtype) < (1e-5 if kind.startswith("fp8") else 2e-2) and graphs() == 2


@torch.inference_mode()
def test_steps_reuse_compiled_blocks():
    pair, (img, _, cond) = build(), given(3)
    ours, plain = (flow.euler(conditioning.velocity(Reusing(model, 0.5), cond), img * random(3, 1, 1), flow.schedule(4, 6))
                   for model in pair)
    assert (ours - plain).abs().max() <= 1e-5 * plain.abs().max() and graphs() >= 2


def test_gradients_stay():
    pair = build(backend="aot_eager")
    img, t, cond = given()
    grads = []
    for model in pair:
        model.requires_grad_(True)
        conditioning.velocity(model, cond)(img, t).square().mean().backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert graphs() == 2 and grads[0].keys() == grads[1].keys()
    for name, grad in grads[1].items():
        assert (grads[0][name] - grad).abs().max() <= 1e-5 * max(grad.abs().max().item(), 1e-3), name


def test_generated_code_computes_the_same():
    try:
        compiled.check(CPU)
    except UserError as why:
        pytest.skip(str(why))
    torch.manual_seed(0)
    plain = Flux(replace(TINY, depth=1, depth_single_blocks=1)).eval().requires_grad_(False)
    pair = [Flux(plain.config).eval().requires_grad_(False), plain]
    pair[0].load_state_dict(plain.state_dict())
    pair[0].single_blocks[0].compile(fullgraph=True)  # one kind: half the time
    with torch.inference_mode():
        assert 0 <= error(pair) < 1e-5 and graphs() == 1


# The command.

@pytest.mark.parametrize(("flags", "said"), (
    (["--compile"], "needs a C\\+\\+ compiler, expected no-such-compiler in PATH; install it"),
    (["--compile", "--cuda-graphs", "--device=cpu"], "--cuda-graphs came with the device cpu, expected cuda"),
    (["--cuda-graphs"], "--cuda-graphs came without --compile")))
def test_mistakes_are_told_before_anything_is_loaded(flags, said, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=said):
        sample.main(["a red circle", "--device=cpu", "--out", str(tmp_path), *flags])
    assert not list(tmp_path.iterdir())


def test_without_headers_or_triton(monkeypatch, tmp_path):
    monkeypatch.setattr(compiled.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("CXX", "sh")
    with pytest.raises(UserError, match="needs Python.h"):
        compiled.check(CPU)
    monkeypatch.setattr(compiled.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs triton"):
        compiled.check(torch.device("cuda"))
    with pytest.raises(UserError, match="--compile came with a --vram for which weights are streamed"):
        compiled.check(CPU, streamed=True)


def test_the_flag_and_the_benchmark(monkeypatch, tmp_path):
    """Through the commands, with the backend that tests can wait for."""
    compile_blocks, seen = compiled.compile_blocks, []
    monkeypatch.setattr(compiled, "compile_blocks",
                        lambda model, graphs=False: seen.append(graphs) or compile_blocks(model, backend="eager"))
    monkeypatch.setattr(compiled, "check", lambda *_: None)
    sample.main(["a red circle", "--steps=2", "--compile", "--device=cpu", "--out", str(tmp_path)])
    assert seen == [False] and graphs() == 2
    toy = bench.Bench(part=("transformer",), against=("compiled",), repeats=1, memory=False, hidden=128, depth=1,
                      single=1, image_tokens=40, text_tokens=8, device="cpu")
    rows = list(bench.measure(toy))
    assert [row.against for row in rows] == ["compiled"] and all(row.error < 1e-5 for row in rows) and len(seen) == 2
