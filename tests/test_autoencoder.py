"""The autoencoder: recorded tensors, released names and sizes, draws from the posterior, and deliberately wrong variants."""

import hashlib
import json
import math
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flux import autoencoder
from flux.autoencoder import AutoEncoder
from flux.config import AutoEncoderConfig
from golden import load

MANIFESTS = Path(__file__).parent / "manifests"
GOLDENS = ("ae_1244", "ae_encoder", "ae_decoder")  # ae_diffusers needs the renaming of weights.py: test_weights.py
DTYPES = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))


def recipe(golden) -> dict[str, torch.Tensor]:
    """The weights of ae_1244, which are not stored but made anew (`recipe` in its config), and checked."""
    shapes, weights = json.loads(golden.metadata["shapes"]), {}
    digest = hashlib.sha256()
    for i, key in enumerate(sorted(shapes)):
        generator = torch.Generator().manual_seed(golden.config["weights_seed"] + i)
        n = torch.randint(-127, 128, shapes[key], generator=generator).float() / 127
        if len(shapes[key]) == 4:
            w = n * (1.7 / math.sqrt(math.prod(shapes[key][1:])))
        elif key.endswith(".bias"):
            w = n * 0.25
        else:
            w = 1 + 0.4 * n
        if "conv_in." in key:
            w = w / 20
        weights[key] = w.bfloat16().float()
        total, first = golden.part("check.")[key].tolist()
        assert weights[key].double().sum().item() == pytest.approx(total) and weights[key].view(-1)[0] == first, key
        digest.update(key.encode())
        digest.update(weights[key].numpy().tobytes())
    assert digest.hexdigest() == golden.metadata["weights_sha256"]
    return weights


def build(golden) -> AutoEncoder:
    """Its autoencoder; the half whose weights the golden does not hold keeps random ones."""
    names = {field.name for field in fields(AutoEncoderConfig)}
    model = AutoEncoder(AutoEncoderConfig(**{k: v for k, v in golden.config["params"].items() if k in names}))
    weights = golden.weights or recipe(golden)
    missing, unknown = model.load_state_dict(weights, strict=False)
    assert not unknown and (not missing or golden.config["part"] not in {key.split(".")[0] for key in missing})
    return model.eval().requires_grad_(False)


def run(golden, model: AutoEncoder) -> dict[str, torch.Tensor]:
    """Every output of the golden by its name."""
    given = {name: x.to(next(model.parameters()).dtype) for name, x in golden.inputs.items()}
    out = {}
    if "x" in given:
        mean, log_variance = model.moments(given["x"])
        out |= {"moments": torch.cat((mean, log_variance), dim=1), "mean": mean, "encode": model.encode(given["x"])}
    if "z" in given:
        out["decode"] = model.decode(given["z"])
    return out


@DTYPES
@pytest.mark.parametrize("name", GOLDENS)
def test_equals_the_reference(name, dtype, hard):
    if name == "ae_1244" and dtype == torch.bfloat16 and not hard:
        pytest.skip("fifteen seconds of bfloat16 convolutions on a CPU: pytest --hard")
    golden = load(name)
    actual = run(golden, build(golden).to(dtype))
    assert actual.keys() == golden.outputs.keys()
    for output, value in actual.items():
        assert value.dtype == dtype, output
        golden.close(value, output, dtype=dtype)


# Wrong variants: each is one plausible mistake and must exceed a tolerance, both ways unless only one has the part.

def swap(owner, name: str, make):
    """The function `name` of a module or class as `make(original)` returns it."""
    return lambda model, patch: patch.setattr(owner, name, make(getattr(owner, name)))


def constants(**change):
    return lambda model, patch: setattr(model, "config", replace(model.config, **change))


def norms(**change):
    def apply(model, patch):
        for module in model.modules():
            if isinstance(module, nn.GroupNorm):
                vars(module).update(change)
    return apply


def query_and_key_swapped(model, patch):
    for attention in (model.encoder.mid.attn_1, model.decoder.mid.attn_1):
        attention.q, attention.k = attention.k, attention.q


def upsampling_convolutions_swapped(model, patch):
    up = model.decoder.up
    up[2].upsample, up[3].upsample = up[3].upsample, up[2].upsample


BOTH = {
    "no attention": swap(autoencoder.AttnBlock, "forward", lambda forward: lambda self, x: x),
    "no residual around attention": swap(autoencoder.AttnBlock, "forward",
                                         lambda forward: lambda self, x: forward(self, x) - x),
    "no scale in attention": swap(F, "scaled_dot_product_attention",
                                  lambda sdpa: lambda q, k, v: sdpa(q, k, v, scale=1.0)),
    "query and key swapped": query_and_key_swapped,
    "gelu for swish": swap(F, "silu", lambda silu: F.gelu),
    "eps 1e-5 in group norm": norms(eps=1e-5),
    "sixteen groups": norms(num_groups=16),
    "no shift": constants(shift_factor=0.0),
    "no scale": constants(scale_factor=1.0),
    "square root of the scale": constants(scale_factor=math.sqrt(0.3611)),
    "scale of the 4-channel autoencoder": constants(scale_factor=0.18215),
    "shift after the scale": constants(shift_factor=0.1159 / 0.3611),
}
ENCODE = {
    "symmetric padding": swap(F, "pad", lambda pad: lambda x, by: pad(x, (1, 1, 1, 1))),
    "padding by the edge": swap(F, "pad", lambda pad: lambda x, by: pad(x, by, mode="replicate")),
    "log-variance first": swap(AutoEncoder, "moments", lambda moments: lambda self, x: moments(self, x)[::-1]),
}
DECODE = {
    "bilinear upsampling": swap(F, "interpolate", lambda interpolate: lambda x, scale_factor, mode: interpolate(
        x, scale_factor=scale_factor, mode="bilinear")),
    "upsampling convolutions swapped": upsampling_convolutions_swapped,
}


@pytest.mark.parametrize(("way", "wrong"), [
    *(("encode", wrong) for wrong in BOTH | ENCODE), *(("decode", wrong) for wrong in BOTH | DECODE)])
def test_a_wrong_variant_exceeds_the_tolerance(way, wrong, monkeypatch):
    golden = load("ae_encoder" if way == "encode" else "ae_decoder")
    model = build(golden)
    (BOTH | ENCODE | DECODE)[wrong](model, monkeypatch)
    actual, expected = run(golden, model)[way], golden.outputs[way]
    assert (actual - expected).abs().max() > golden.tol(way) * expected.abs().max()


# Names, sizes, and what the posterior is for.

def test_released_names_and_shapes():
    with torch.device("meta"):
        model = AutoEncoder(AutoEncoderConfig())
    assert {key: list(p.shape) for key, p in model.state_dict().items()} == json.loads(
        (MANIFESTS / "ae_bfl.json").read_text())
    assert sum(p.numel() for p in model.parameters()) == 83_819_683


@pytest.fixture
def small() -> AutoEncoder:
    torch.manual_seed(0)
    model = AutoEncoder(AutoEncoderConfig(ch=8, ch_mult=(1, 1, 2, 2), num_res_blocks=1, norm_groups=4))
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize(("h", "w"), [(1, 1), (3, 5), (7, 2)])
def test_odd_sizes(small, h, w):
    """Any latent size, as long as the picture has whole cells; a batch equals its pictures."""
    image = torch.rand(2, 3, 8 * h, 8 * w, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = small.encode(image)
    assert latents.shape == (2, 16, h, w) and small.decode(latents).shape == image.shape
    alone = torch.cat([small.decode(small.encode(picture[None])) for picture in image])
    assert (small.decode(latents) - alone).abs().max() < 1e-5
    with pytest.raises(AssertionError, match="multiple of 8"):
        small.encode(image[..., 1:])


def test_the_default_is_the_mean_and_a_sample_is_around_it(small):
    image = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, log_variance = small.moments(image)
    config = small.config
    assert torch.equal(small.encode(image), config.scale_factor * (mean - config.shift_factor))

    eps = torch.randn(mean.shape, generator=torch.Generator().manual_seed(5))
    drawn = small.encode(image, sample=True, generator=torch.Generator().manual_seed(5))
    assert torch.equal(drawn, config.scale_factor * (mean + torch.exp(log_variance / 2) * eps - config.shift_factor))
    other = small.encode(image, sample=True, generator=torch.Generator().manual_seed(6))
    assert (drawn - other).abs().max() > 0.1
    before = torch.get_rng_state()
    small.encode(image, sample=True, generator=torch.Generator().manual_seed(5))
    assert torch.equal(torch.get_rng_state(), before), "a draw from the generator leaves the global state alone"


def test_the_spread_of_samples_is_the_posteriors(small):
    image, generator = torch.zeros(1, 3, 8, 8), torch.Generator().manual_seed(0)
    mean, log_variance = small.moments(image)
    many = small.encode(image.expand(2000, -1, -1, -1), sample=True, generator=generator)
    z = many / small.config.scale_factor + small.config.shift_factor
    normal = (z - mean) / torch.exp(log_variance / 2)                            # (2000, 16, 1, 1)
    assert (normal.mean(0).abs() < 0.1).all() and ((normal.std(0) - 1).abs() < 0.1).all()


def test_decode_undoes_what_encode_does_to_the_mean(small):
    """Shift and scale meet: the decoder receives exactly what the encoder's mean was."""
    seen = {}
    small.decoder.register_forward_pre_hook(lambda module, args: seen.update(z=args[0]))
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    small.decode(small.encode(image))
    assert (seen["z"] - small.moments(image)[0]).abs().max() < 1e-6
