"""The transformer: recorded tensors, released names and sizes, identities, gradients, and deliberately wrong variants."""

import json
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from flux import attention, latents, layers, linear, model
from flux.config import TINY, FluxConfig
from flux.layers import LastLayer, MLPEmbedder, Modulation, QKNorm, time_embedding
from flux.model import Flux
from golden import load
from lora.inject import add_trained

MANIFESTS = Path(__file__).parent / "manifests"
MODELS = ("flux_dev", "flux_schnell", "flux_fill", "flux_dev_diffusers")
DTYPES = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))


def matrices(pe):
    """Our table (2, B, L, 1, E/2) -> the reference's rotation matrices (B, 1, L, E/2, 2, 2)."""
    cos, sin = (rearrange(part, "b l 1 e -> b 1 l e") for part in (pe.real, pe.imag))
    return torch.stack((cos, -sin, sin, cos), dim=-1).unflatten(-1, (2, 2))


def near(actual, expected, tol=1e-6) -> bool:
    """By the goldens' measure; torch.testing.assert_close would spend six seconds on its imports."""
    return bool((actual - expected).abs().max() <= tol * expected.abs().max())


# The functions, one by one.

def functions(golden) -> dict[str, torch.Tensor]:
    """Every float32 output of flux_functions, by its name."""
    given, config = golden.inputs, golden.config
    dim, axes = config["dim"], config["axes_small"]
    parts = nn.ModuleDict({"qknorm": QKNorm(config["head_dim"]), "mod_double": Modulation(dim, 6),
                           "mod_single": Modulation(dim, 3), "last": LastLayer(dim, config["out_channels"]),
                           "mlp_embedder": MLPEmbedder(256, dim)})
    parts.load_state_dict(golden.weights)
    pe = attention.rotary_table(given["ids"], config["axes"], config["theta"])
    small = attention.rotary_table(given["ids_small"], axes, config["theta"])
    q, k, v = (given[name].transpose(1, 2) for name in "qkv")                    # (B, H, L, E) -> (B, L, H, E)
    normed_q, normed_k = parts["qknorm"](q, k, v)
    temb = time_embedding(given["t"])
    return {"pe": matrices(pe), "pe_f64": matrices(pe), "pe_small": matrices(small),
            "temb": temb, "temb_odd": time_embedding(given["t"], 33), "temb_large": time_embedding(given["t_large"]),
            "qknorm_q": normed_q.transpose(1, 2), "qknorm_k": normed_k.transpose(1, 2),
            "rope_q": attention.rotate(normed_q, small).transpose(1, 2),
            "rope_k": attention.rotate(normed_k, small).transpose(1, 2),
            "attn": attention.attention(normed_q, normed_k, v, small),
            "mod_double": torch.cat(parts["mod_double"](given["vec"]), dim=-1),
            "mod_single": torch.cat(parts["mod_single"](given["vec"]), dim=-1),
            "last": parts["last"](given["x"], given["vec"]), "mlp_embedder": parts["mlp_embedder"](temb)}


def test_the_functions_equal_the_reference():
    golden = load("flux_functions")
    actual = functions(golden)
    assert actual.keys() == {name for name in golden.outputs if not name.endswith("_bf16")}
    for name, value in actual.items():
        assert value.dtype == torch.float32, name
        golden.close(value, name)


def test_the_functions_in_bfloat16_round_as_the_reference():
    golden = load("flux_functions")
    given, config = {name: value.bfloat16() for name, value in golden.inputs.items()}, golden.config
    small = attention.rotary_table(golden.inputs["ids_small"], config["axes_small"], config["theta"])
    norm = QKNorm(config["head_dim"]).bfloat16()
    norm.load_state_dict({key.removeprefix("qknorm."): v for key, v in golden.weights.items() if key.startswith("qknorm.")})
    q, k, v = (given[name].transpose(1, 2) for name in "qkv")
    normed_q, normed_k = norm(q, k, v)
    actual = {"temb_bf16": time_embedding(given["t"]),
              "qknorm_q_bf16": normed_q.transpose(1, 2), "qknorm_k_bf16": normed_k.transpose(1, 2),
              "rope_q_bf16": attention.rotate(normed_q, small).transpose(1, 2),
              "rope_k_bf16": attention.rotate(normed_k, small).transpose(1, 2)}
    assert actual.keys() == golden.tolerance["equal_fraction"].keys()
    for name, value in actual.items():
        expected = golden.outputs[name]
        assert value.dtype == torch.bfloat16, name
        golden.close(value, name)
        assert (value == expected).float().mean() >= golden.tolerance["equal_fraction"][name], name
        assert ((value - expected).abs() <= expected.abs() / 128).all(), f"{name}: more than one bfloat16 step"


def test_statistics_are_float32():
    """The mean of squares is formed in float32: in bfloat16, 256 + 1 is 256."""
    x = torch.ones(1, 1, 1, 512, dtype=torch.bfloat16)
    x[..., 0] = 16.0
    norm = layers.RMSNorm(512).bfloat16()
    assert near(norm(x).float(), F.rms_norm(x.float(), (512,), eps=1e-6), 2**-8)


# The whole network.

def build(golden) -> Flux:
    flux = Flux(FluxConfig(**golden.config["params"]))
    flux.load_state_dict(golden.weights)
    return flux.eval().requires_grad_(False)


def run(golden, flux: Flux, dtype=torch.float32) -> dict[str, torch.Tensor]:
    """Every output of the golden by its name; those of the second times carry `_b`, in bfloat16 `_b_bf16`."""
    given, seen = golden.inputs, {}

    def entering(block, args):
        if not seen:
            seen.update(img_in=args[0], txt_in=args[1], vec=args[2], pe=matrices(args[3]))

    def after_double(block, args, out):
        seen.setdefault("double0_img", out[0])
        seen.setdefault("double0_txt", out[1])

    def after_single(block, args, out):
        seen.setdefault("single0", out)

    hooks = [flux.double_blocks[0].register_forward_pre_hook(entering),
             flux.double_blocks[0].register_forward_hook(after_double),
             flux.single_blocks[0].register_forward_hook(after_single)]

    def forward(b: str):
        img, txt, y = (given[name].to(dtype) for name in ("img", "txt", "y"))
        return flux(img, given["img_ids"], txt, given["txt_ids"], y, given["timesteps" + b], given.get("guidance" + b))

    out = {"img": forward("")} | seen
    seen.clear()
    b = "_b" if dtype == torch.float32 else "_b_bf16"
    out |= {"img" + b: forward("_b"), "vec" + b: seen["vec"]}
    for hook in hooks:
        hook.remove()
    return {name: value for name, value in out.items() if name in golden.outputs}


@DTYPES
@pytest.mark.parametrize("name", MODELS)
def test_equals_the_reference(name, dtype):
    golden = load(name)
    actual = run(golden, build(golden).to(dtype), dtype)
    if dtype == torch.float32:
        expected = {name for name in golden.outputs if not name.endswith("_bf16")}
    else:
        expected = golden.tolerance["bf16_reference_error"].keys()
    assert actual.keys() == expected - {"img_diffusers"}
    for output, value in actual.items():
        assert value.dtype == (torch.float32 if output == "pe" else dtype), output
        golden.close(value, output, dtype=dtype)


def test_bfloat16_time_is_coarse():
    """t and guidance are cast before the product with 1000, as released: in bfloat16 0.7431 becomes 744."""
    exact = (1000 * torch.tensor([0.7431])).bfloat16()
    assert exact == 744 and torch.equal(time_embedding(torch.tensor([0.7431]).bfloat16()).float(),
                                        time_embedding(torch.tensor([0.744])).bfloat16().float())


# Wrong variants: each is one plausible mistake and must exceed a tolerance.

def rows(path: str, order: tuple[int, ...]):
    """The output chunks of a linear in another order."""
    def change(flux, patch):
        for name, module in flux.named_modules():
            if name.endswith(path):
                for p in (module.weight, module.bias):
                    p.copy_(torch.cat([p.chunk(len(order))[i] for i in order]))
    return change


def swap(owner, name: str, make):
    """The function `name` of a module as `make(original)` returns it."""
    return lambda flux, patch: patch.setattr(owner, name, make(getattr(owner, name)))


def ids_changed(change):
    return swap(model, "rotary_table", lambda table: lambda ids, axes, theta: table(change(ids), axes, theta))


def halves(x, pe):
    """Rotation of the first half of the channels against the second."""
    (cos, sin), (a, b) = (pe.real, pe.imag), x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


def exact_gelu_in_double_blocks(flux, patch):
    for module in flux.modules():
        if isinstance(module, nn.GELU):
            module.approximate = "none"


def heads_first(flux, patch):
    for name, module in flux.named_modules():
        if name.endswith("attn.qkv"):
            heads = flux.config.num_heads
            for p in (module.weight, module.bias):
                p.copy_(rearrange(p, "(three h e) ... -> (h three e) ...", three=3, h=heads))


def query_and_key_scales_swapped(flux, patch):
    for norm in flux.modules():
        if isinstance(norm, QKNorm):
            norm.query_norm, norm.key_norm = norm.key_norm, norm.query_norm


def streams_swapped(flux, patch):
    for block in flux.double_blocks:
        block.img_mlp, block.txt_mlp = block.txt_mlp, block.img_mlp


def mlp_before_attention(flux, patch):
    for block in flux.single_blocks:
        block.linear2.weight.copy_(block.linear2.weight.roll(flux.config.hidden_size, dims=1))


def text_tokens_returned(flux, patch):
    """The first L_img tokens instead of the last."""
    def keep_first(block, args, out):
        return out.roll(out.shape[1] - seen["img"], dims=1)
    seen = {}
    flux.img_in.register_forward_hook(lambda module, args, out: seen.update(img=out.shape[1]))
    flux.single_blocks[-1].register_forward_hook(keep_first)


WRONG = {
    "shift and scale swapped in the last layer": rows("final_layer.adaLN_modulation.1", (1, 0)),
    "shift and scale swapped in the single blocks": rows("modulation.lin", (1, 0, 2)),
    "gate first in the single blocks": rows("modulation.lin", (2, 0, 1)),
    "both halves of the double modulation swapped": rows("img_mod.lin", (3, 4, 5, 0, 1, 2)),
    "shift and scale swapped for the text": rows("txt_mod.lin", (1, 0, 2, 4, 3, 5)),
    "q and k swapped": rows("attn.qkv", (1, 0, 2)),
    "heads slowest in qkv": heads_first,
    "query and key scales swapped": query_and_key_scales_swapped,
    "MLPs of the streams swapped": streams_swapped,
    "MLP before attention in linear2": mlp_before_attention,
    "text tokens returned": text_tokens_returned,
    "exact gelu in the double blocks": exact_gelu_in_double_blocks,
    "exact gelu in the single blocks": swap(layers, "BesideGelu", lambda beside: SimpleNamespace(
        apply=lambda attn, mlp: torch.cat((attn, F.gelu(mlp)), dim=-1))),
    "no rope": ids_changed(torch.zeros_like),
    "image before text": ids_changed(lambda ids: ids.roll(15, dims=1)),
    "columns before rows": ids_changed(lambda ids: ids[..., [0, 2, 1]]),
    "ids from one": ids_changed(lambda ids: ids + (ids.sum(-1, keepdim=True) > 0)),
    "theta 1000": swap(model, "rotary_table", lambda table: lambda ids, axes, theta: table(ids, axes, 1000)),
    "halves rotate": swap(attention, "rotate", lambda rotate: halves),
    "rotation the other way round": swap(attention, "rotate", lambda rotate: lambda x, pe: rotate(
        x, pe.conj())),
    "no scale in attention": swap(F, "scaled_dot_product_attention", lambda sdpa: partial(sdpa, scale=1.0)),
    "eps 1e-5 in layer norm": swap(F, "layer_norm", lambda norm: lambda x, shape, eps: norm(x, shape, eps=1e-5)),
    "eps 1e-5 in q and k norm": swap(F, "rms_norm", lambda norm: lambda x, shape, weight=None, eps=0: norm(
        x, shape, weight, eps=1e-5)),
    "q and k norm off": swap(QKNorm, "forward", lambda forward: lambda self, q, k, v: (q, k)),
    "scale without one": swap(layers, "modulate", lambda modulate: lambda x, shift, scale: modulate(x, shift, scale - 1)),
    "no guidance": lambda flux, patch: setattr(flux, "config", replace(flux.config, guidance_embed=False)),
    "sines before cosines": swap(model, "time_embedding", lambda embed: lambda t: embed(t).roll(128, dims=-1)),
    "time from 0 to 1": swap(model, "time_embedding", lambda embed: lambda t: embed(t / 1000)),
    "no pooled text": lambda flux, patch: flux.vector_in.out_layer.weight.zero_(),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_variant_exceeds_the_tolerance(wrong, monkeypatch):
    golden = load("flux_dev")
    flux = build(golden)
    WRONG[wrong](flux, monkeypatch)
    excess = {}
    for name, value in run(golden, flux).items():
        expected = golden.outputs[name]
        excess[name] = ((value - expected).abs().max() / expected.abs().max() / golden.tol(name)).item()
    assert max(excess.values()) > 1, excess


# Sizes and names of the released files.

@pytest.mark.parametrize(("name", "config", "count"), [
    ("flux_dev", FluxConfig(), 11_901_408_320),
    ("flux_schnell", FluxConfig(guidance_embed=False), 11_891_178_560),
    ("flux_fill", FluxConfig(in_channels=64 + 64 + 256), 11_902_391_360),
])
def test_released_names_shapes_and_counts(name, config, count):
    with torch.device("meta"):
        flux = Flux(config)
    assert {key: list(p.shape) for key, p in flux.state_dict().items()} == json.loads(
        (MANIFESTS / f"{name}_bfl.json").read_text())
    assert sum(p.numel() for p in flux.parameters()) == count
    assert sum(p.numel() for p in flux.double_blocks[0].parameters()) == 339_831_296
    assert sum(p.numel() for p in flux.single_blocks[0].parameters()) == 141_591_808


# Identities.

@pytest.fixture
def tiny() -> Flux:
    torch.manual_seed(0)
    return Flux(replace(TINY, depth=2)).eval()


def inputs(batch: int = 3, h: int = 4, w: int = 6, length: int = 5) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    normal = [torch.randn(batch, *shape, generator=g) for shape in ((h * w // 4, 64), (length, 28), (24,))]
    return {"img": normal[0], "img_ids": latents.image_ids(h, w), "txt": normal[1], "txt_ids": latents.text_ids(length),
            "vec": normal[2], "t": torch.linspace(0.25, 0.75, batch), "guidance": torch.linspace(1, 2, batch)}


@torch.no_grad()
def test_residuals(tiny):
    """Zeros change nothing, and residual i is added to the image stream right after double block i."""
    given = inputs()
    plain = tiny(**given)
    zeros = [torch.zeros(3, 6, 32)] * 2
    assert torch.equal(tiny(**given, residuals=zeros), plain)
    for i in range(2):
        extra = torch.randn(3, 6, 32, generator=torch.Generator().manual_seed(i))
        hook = tiny.double_blocks[i].register_forward_hook(lambda block, args, out, extra=extra: (out[0] + extra, out[1]))
        expected = tiny(**given)
        hook.remove()
        actual = tiny(**given, residuals=[extra if j == i else zeros[j] for j in range(2)])
        assert torch.equal(actual, expected) and not near(actual, plain, 1e-3)


@torch.no_grad()
def test_a_batch_equals_its_samples(tiny):
    given = inputs()
    alone = [tiny(**{name: x if name.endswith("ids") else x[i:i + 1] for name, x in given.items()}) for i in range(3)]
    assert near(tiny(**given), torch.cat(alone))
    ids = {name: x.expand(3, -1, -1) for name, x in given.items() if name.endswith("ids")}
    assert torch.equal(tiny(**given | ids), tiny(**given))


@torch.no_grad()
def test_tokens_have_no_order_but_their_ids(tiny):
    """Shuffled image tokens with their ids give the shuffled velocity; text, whose ids are zero, does not care at all."""
    given, plain = inputs(), tiny(**inputs())
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    moved = given | {"img": given["img"][:, order], "img_ids": given["img_ids"][:, order]}
    assert near(tiny(**moved), plain[:, order])
    assert near(tiny(**given | {"txt": given["txt"].flip(1)}), plain)
    assert not near(tiny(**given | {"img_ids": moved["img_ids"]}), plain, 1e-4)


def test_text_never_rotates():
    x = torch.randn(2, 5, 3, 16)
    assert torch.equal(attention.rotate(x, attention.rotary_table(latents.text_ids(5), (4, 6, 6), 10_000)), x)


def test_rotary_scores_depend_on_offsets_only():
    """q at p against k at p + d scores the same wherever p is, and keeps the length of q."""
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 128, generator=g)

    def score(at: list[int], offset: list[int]) -> float:
        q_at, k_at = (attention.rotary_table(torch.tensor([[ids]]), (16, 56, 56), 10_000)
                      for ids in (at, [a + d for a, d in zip(at, offset, strict=True)]))
        assert near(attention.rotate(q, q_at).norm(), q.norm())
        return (attention.rotate(q, q_at) * attention.rotate(k, k_at)).sum().item()

    for offset in ([0, 0, 0], [0, 3, -2], [1, -7, 11]):
        here = score([0, 9, 9], offset)
        for there in ([0, 40, 17], [3, 500, 63], [1, 4000, 4095]):
            assert score(there, offset) == pytest.approx(here, abs=1e-4)
    assert abs(score([0, 9, 9], [0, 3, -2]) - score([0, 9, 9], [0, 3, 2])) > 0.1


@pytest.fixture
def double(monkeypatch):
    """float64 wherever the code asks for float32, so that a float64 model is one throughout."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@torch.no_grad()
def test_float32_is_near_float64(tiny, monkeypatch):
    given = inputs()
    single = tiny(**given)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    exact = tiny.double()(**{name: x.double() for name, x in given.items()})
    assert exact.dtype == torch.float64
    assert near(single, exact, 1e-4)


def test_gradients(double):
    """Of a scalar of the whole model, along one random direction per parameter and input, against central differences."""
    torch.manual_seed(0)
    flux = Flux(replace(TINY, depth_single_blocks=1)).double()
    given = {name: x.double() for name, x in inputs(batch=2, h=2, w=4, length=3).items()}
    moving = dict(flux.named_parameters()) | {name: given[name].requires_grad_() for name in ("img", "txt", "vec")}
    weight = torch.randn(2, 2, 64, dtype=torch.float64)

    def scalar():
        return (flux(**given) * weight).sum()

    scalar().backward()
    for name, x in moving.items():
        direction, h = torch.randn_like(x), 1e-5
        with torch.no_grad():
            x += h * direction
            above = scalar()
            x -= 2 * h * direction
            below = scalar()
            x += h * direction
        slope = (x.grad * direction).sum().item()
        assert slope != 0 and slope == pytest.approx((above - below).item() / (2 * h), rel=1e-5, abs=1e-8), name


def test_guidance_is_asked_for(tiny):
    given = inputs()
    with pytest.raises(AssertionError, match="guidance"):
        tiny(**given | {"guidance": None})
    changed = tiny(**given | {"guidance": given["guidance"] + 1})
    assert not near(changed, tiny(**given), 1e-4)


def test_gelu_beside_attention_is_its_two_operations():
    """Both derivatives against numerical ones, and what compiling traces."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, 3, width, dtype=torch.double, generator=generator, requires_grad=True) for width in (4, 7))
    joined = layers.BesideGelu.apply
    torch.testing.assert_close(joined(a, b), torch.cat((a, F.gelu(b, approximate="tanh")), dim=-1))
    assert torch.autograd.gradcheck(joined, (a, b)) and torch.autograd.gradgradcheck(joined, (a, b))
    compiled = torch.compile(lambda a, b: joined(a, b).square().sum(), backend="aot_eager", fullgraph=True)
    compiled(a, b).backward()
    torch.testing.assert_close(b.grad, torch.autograd.grad(F.gelu(b, approximate="tanh").square().sum(), b)[0])


def test_the_backward_pass_keeps_v_once():
    """As a part of the projection that it came from, not copied; and both layouts give the same."""
    qkv = torch.randn(2, 5, 3, 2, 8, requires_grad=True)
    pe, kept = torch.ones(1, 5, 1, 4, dtype=torch.complex64), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        joined = qkv * 1
        out = attention.attention(*joined.unbind(2), pe)
    of_v = [x for x in kept if x.shape == (2, 2, 5, 8) and torch.equal(x, joined[:, :, 2].transpose(1, 2))]
    assert of_v and all(x.data_ptr() == joined[:, :, 2].data_ptr() for x in of_v)
    with torch.no_grad():
        torch.testing.assert_close(attention.attention(*joined.unbind(2), pe), out)


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_a_product_by_onednn_is_as_exact_as_torchs(dtype, bias, monkeypatch):
    """Without gradients; bit-equal in bfloat16, on which runs with LoRAs that add nothing depend. One token and many."""
    monkeypatch.setattr(linear, "ONEDNN_IS_QUICKER", True)
    torch.manual_seed(0)
    layer = linear.Linear(100, 36, bias=bias).to(dtype)
    for x in (torch.randn(3, 57, 100).to(dtype), torch.randn(1, 100).to(dtype), torch.randn(0, 100).to(dtype)):
        exact, other = deepcopy(layer).double()(x.double()), layer(x)
        with torch.no_grad():
            mine = layer(x)
        assert mine.dtype == dtype and mine.shape == other.shape and not mine.requires_grad
        assert (mine - exact).norm() <= 1.1 * (other - exact).norm() + 1e-7 * exact.norm()
        assert dtype == torch.float32 or torch.equal(mine, other)
        assert other.requires_grad and torch.autograd.grad(other.float().sum(), layer.weight)[0].shape == layer.weight.shape


@pytest.mark.parametrize("lora", (False, True))
def test_autocast_has_its_way_without_gradients(lora, monkeypatch):
    """Validation of a run in bfloat16: the same dtypes as in training, with LoRAs too."""
    monkeypatch.setattr(linear, "ONEDNN_IS_QUICKER", True)
    torch.manual_seed(0)
    single = layers.SingleStreamBlock(TINY)
    if lora:
        add_trained(single, "linear", 2)
    x, pe = torch.randn(2, 37, TINY.hidden_size), torch.ones(1, 37, 1, TINY.head_dim // 2, dtype=torch.complex64)
    with torch.autocast("cpu", torch.bfloat16):
        trained = single.branches(x, pe)
        with torch.no_grad():
            validated = single.branches(x, pe)
    assert validated.dtype == trained.dtype == torch.bfloat16 and near(validated, trained, 0.02)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_gelu_is_as_exact_within_the_product_as_after_it(dtype, monkeypatch):
    """Without gradients: in bfloat16 rounded once less. Both in the MLP of a double block and in a single block."""
    monkeypatch.setattr(linear, "ONEDNN_IS_QUICKER", True)
    torch.manual_seed(0)
    mlp, single = layers.MLP(TINY).to(dtype), layers.SingleStreamBlock(TINY).to(dtype)
    x, pe = torch.randn(2, 37, TINY.hidden_size).to(dtype), torch.ones(1, 37, 1, TINY.head_dim // 2, dtype=torch.complex64)
    for function, wide in ((mlp, deepcopy(mlp).double()), (lambda x: single.branches(x, pe),
                                                         lambda x: deepcopy(single).double().branches(x, pe))):
        exact = wide(x.double())
        apart = (function(x) - exact).norm()
        with torch.no_grad():
            assert (function(x) - exact).norm() <= 1.02 * apart <= 0.02 * exact.norm()
