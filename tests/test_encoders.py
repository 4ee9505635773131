"""CLIP, T5 and SigLIP against recorded tensors, the names of the released files, and deliberately wrong variants."""

import json
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flux import clip, config, siglip, t5
from golden import load

MANIFESTS = Path(__file__).parent / "manifests"
GOLDENS = ("clip_legacy_eos", "clip_modern_eos", "clip_pair", "t5_encoder", "siglip_redux")


def sized(kind, sizes, **more):
    """The config `kind` with those of the golden's sizes that it has."""
    names = {field.name for field in fields(kind)}
    return kind(**{name: value for name, value in (sizes | more).items() if name in names})


def build(golden) -> nn.ModuleDict:
    """The golden's networks by the prefix of their keys, in float32 with its weights."""
    sizes, kind = golden.config, golden.metadata["kind"]
    if kind == "clip_text":
        parts = {"": clip.ClipText(sized(config.ClipTextConfig, sizes["model"]))}
    elif kind == "clip_pair":
        text = sized(config.ClipTextConfig, sizes["text"], projection_dim=sizes["projection_dim"])
        vision = sized(config.ClipVisionConfig, sizes["vision"], projection_dim=sizes["projection_dim"])
        parts = {"clip.": clip.Clip(text, vision), "head.": clip.AestheticHead((40, 64, 32, 16, 8, 1))}
    elif kind == "t5_encoder":
        parts = {"": t5.T5Encoder(sized(config.T5Config, sizes["model"]))}
    else:
        small = sized(config.SiglipConfig, sizes["model"])
        parts = {"siglip.": siglip.SiglipVision(small), "redux.": siglip.Redux(small.hidden_size, sizes["txt_dim"])}
    for prefix, part in parts.items():
        part.load_state_dict({key[len(prefix):]: v for key, v in golden.weights.items() if key.startswith(prefix)})
    parts = {prefix.strip(".") or "text": part for prefix, part in parts.items()}
    return nn.ModuleDict(parts).eval().requires_grad_(False)


def run(golden, parts: nn.ModuleDict) -> dict[str, torch.Tensor]:
    """Every output of the golden, by its name."""
    outputs = {"clip_text": run_clip_text, "clip_pair": run_clip_pair, "t5_encoder": run_t5, "siglip_redux": run_siglip}
    return outputs[golden.metadata["kind"]](golden, **parts)


def run_clip_text(golden, text):
    seen, given = {}, golden.inputs
    for case in golden.config["cases"]:
        if f"{case}_mask" in given:
            masked = text(given[f"{case}_ids"], given[f"{case}_mask"])
            seen[f"{case}_last_mask"], seen[f"{case}_pool_mask"] = masked
        with noted(text.text_model.encoder.layers[0], seen, f"{case}_hidden1"):
            seen[f"{case}_last"], seen[f"{case}_pool"] = text(given[f"{case}_ids"])
    return seen


def run_clip_pair(golden, clip, head):
    pixels, ids = golden.inputs["pixels"], golden.inputs["ids"]
    image = clip.embed_image(pixels)
    return {"vision_last": clip.vision_model(pixels)[0], "image": image, "text": clip.embed_text(ids),
            "logits": clip(pixels, ids), "aesthetic": head(image)}


def run_t5(golden, text):
    n, given = golden.config["bucket_length"], golden.inputs
    attention = text.encoder.block[0].layer[0].SelfAttention
    seen = {"buckets": t5.relative_buckets(torch.arange(1 - n, n)),
            "bias": attention.position_bias(golden.outputs["bias"].shape[-1])}
    for case in golden.config["cases"]:
        seen[f"{case}_last"] = text(given[f"{case}_ids"])
        seen[f"{case}_last_mask"] = text(given[f"{case}_ids"], given[f"{case}_mask"])
    return seen


def run_siglip(golden, siglip, redux):
    seen, tower = {}, siglip.vision_model
    with noted(tower.embeddings, seen, "patches"), noted(tower.encoder.layers[0], seen, "hidden1"):
        last = siglip(golden.inputs["pixels"])
    return seen | {"last": last, "pool": siglip.pool(last), "redux": redux(last)}


@contextmanager
def noted(module, seen, name):
    """What the module returns meanwhile, under its name in `seen`."""
    handle = module.register_forward_hook(lambda module, args, out: seen.__setitem__(name, out))
    yield
    handle.remove()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
@pytest.mark.parametrize("name", GOLDENS)
def test_equals_the_reference(name, dtype):
    golden = load(name)
    actual = run(golden, build(golden).to(dtype))
    assert actual.keys() == golden.outputs.keys()
    for output, value in actual.items():
        if output != "buckets":
            assert value.dtype == dtype, output
            golden.close(value, output, dtype=dtype)
    assert "buckets" not in actual or torch.equal(actual["buckets"], golden.outputs["buckets"])


def replace(path, module):
    """A variant with `module` in the place of the submodule at `path`."""
    def spoil(parts, monkeypatch):
        parts.set_submodule(path, module())
    return spoil


def patch(module, name, value):
    def spoil(parts, monkeypatch):
        monkeypatch.setattr(module, name, value)
    return spoil


def adjust(kind, **attributes):
    """A variant in which every submodule of a kind has other attributes."""
    def spoil(parts, monkeypatch):
        found = [module for module in parts.modules() if isinstance(module, kind)]
        assert found, kind
        for module in found:
            for name, value in attributes.items():
                assert hasattr(module, name), name
                setattr(module, name, value)
    return spoil


attend, exact_gelu = F.scaled_dot_product_attention, F.gelu  # before a variant puts its own in their place


def bias_once(parts, monkeypatch):
    """Only the first block of T5 sees positions."""
    forward = t5.SelfAttention.forward
    monkeypatch.setattr(t5.SelfAttention, "forward", lambda self, x, bias: forward(
        self, x, bias if hasattr(self, "relative_attention_bias") else torch.zeros_like(bias)))


def mirrored(relative, *sizes, buckets=t5.relative_buckets):
    return buckets(-relative, *sizes)


WRONG = {
    "clip_legacy_eos": {
        "exact gelu": adjust(clip.Mlp, act=F.gelu),
        "no causal mask": patch(clip, "causal_mask", lambda ids, keep: None),
        "no final norm": replace("text.text_model.final_layer_norm", nn.Identity),
        "last row pooled": patch(clip, "pooled_position", lambda ids, eos: torch.full((len(ids),), ids.shape[1] - 1)),
        "eps": adjust(nn.LayerNorm, eps=1e-3),
        "heads": adjust(clip.SelfAttention, heads=2),
    },
    "clip_modern_eos": {
        "quick gelu": adjust(clip.Mlp, act=clip.quick_gelu),
        "tanh gelu": adjust(clip.Mlp, act=siglip.gelu_tanh),
        "largest id pooled": adjust(clip.TextTower, eos_token_id=2),
    },
    "clip_pair": {
        "no norm before": replace("clip.vision_model.pre_layrnorm", nn.Identity),
        "no norm after": replace("clip.vision_model.post_layernorm", nn.Identity),
        "no scale": lambda parts, monkeypatch: parts["clip"].logit_scale.zero_(),
        "not of unit length": patch(F, "normalize", lambda x, dim: x),
        "activation in the head": replace("head.layers.1", nn.ReLU),
    },
    "t5_encoder": {
        "scaled scores": patch(F, "scaled_dot_product_attention", lambda q, k, v, attn_mask, scale: attend(
            q, k, v, attn_mask=attn_mask)),
        "exact gelu": patch(F, "gelu", lambda x, approximate: exact_gelu(x)),
        "no final norm": replace("text.encoder.final_layer_norm", nn.Identity),
        "bias in the first block only": bias_once,
        "query minus key": patch(t5, "relative_buckets", mirrored),
        "eps": adjust(t5.RMSNorm, eps=1e-3),
    },
    "siglip_redux": {
        "exact gelu": adjust(clip.Mlp, act=F.gelu),
        "no last norm": replace("siglip.vision_model.post_layernorm", nn.Identity),
        "eps": adjust(nn.LayerNorm, eps=1e-5),
        "gelu in the connector": patch(F, "silu", F.gelu),
    },
}


@pytest.mark.parametrize(("name", "variant"), [(name, variant) for name in WRONG for variant in WRONG[name]])
def test_a_wrong_variant_fails(name, variant, monkeypatch):
    golden = load(name)
    parts = build(golden)
    WRONG[name][variant](parts, monkeypatch)
    actual, expected = run(golden, parts), golden.outputs
    errors = {key: ((actual[key] - expected[key]).abs().max() / expected[key].abs().max()).item() for key in expected}
    assert any(error > golden.tol(key) for key, error in errors.items()), errors


FULL_SIZE = {
    "clip_l_text": lambda: clip.ClipText(config.ClipTextConfig()),
    "clip_vit_l14": lambda: clip.Clip(config.ClipTextConfig(), config.ClipVisionConfig()),
    "clip_vit_h14_pickscore": lambda: clip.Clip(clip.H14_TEXT, clip.H14_VISION),
    "laion_aesthetic_head": clip.AestheticHead,
    "t5_xxl_encoder": lambda: t5.T5Encoder(config.T5Config()),
    "siglip_so400m_patch14_384": lambda: siglip.SiglipVision(config.SiglipConfig()),
    "siglip_so400m_patch16_512": lambda: siglip.SiglipVision(config.SiglipConfig(image_size=512, patch_size=16)),
    "redux_connector": siglip.Redux,
}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_names_and_shapes_are_those_of_the_released_file(name):
    with torch.device("meta"):
        model = FULL_SIZE[name]()
    ours = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert ours == json.loads((MANIFESTS / f"{name}.json").read_text())


def test_the_image_tower_stands_alone():
    golden = load("clip_pair")
    alone = clip.ClipVision(sized(config.ClipVisionConfig, golden.config["vision"]))
    keys = {key.removeprefix("clip."): value for key, value in golden.weights.items() if "vision_model" in key}
    alone.load_state_dict(keys)
    last, _ = alone(golden.inputs["pixels"])
    golden.close(last, "vision_last")


@pytest.mark.parametrize(("relative", "bucket"), [
    (-1000, 15), (-128, 15), (-91, 15), (-90, 14), (-64, 14), (-33, 12), (-32, 12), (-20, 10), (-16, 10), (-15, 9),
    (-12, 9), (-8, 8), (-7, 7), (0, 0), (1, 17), (7, 23), (8, 24), (12, 25), (20, 26), (33, 28), (64, 30), (91, 31),
    (5000, 31)])
def test_t5_buckets(relative, bucket):
    assert t5.relative_buckets(torch.tensor(relative)).item() == bucket


def test_t5_in_half_precision_does_not_overflow():
    """A feed-forward whose outputs pass 65504, as in the released weights."""
    golden = load("t5_encoder")
    model = build(golden)["text"]
    for block in model.encoder.block:
        block.layer[1].DenseReluDense.wo.weight *= 100_000
    wo_outputs = []
    model.encoder.block[0].layer[1].DenseReluDense.register_forward_hook(lambda m, a, out: wo_outputs.append(out))
    expected = model(golden.inputs["short_ids"])
    assert wo_outputs[0].abs().max() > torch.finfo(torch.float16).max
    actual = model.half()(golden.inputs["short_ids"])
    assert actual.dtype == torch.float16
    assert (actual - expected).abs().max() < 0.02 * expected.abs().max()


def test_a_caption_without_tokens_to_attend_to_stays_finite():
    golden = load("t5_encoder")
    ids = golden.inputs["short_ids"]
    assert build(golden)["text"](ids, torch.zeros_like(ids)).isfinite().all()


def test_pictures_of_another_size_and_captions_too_long_are_refused():
    with torch.device("meta"):
        tower = siglip.SiglipVision(config.DEMO.siglip)
        with pytest.raises(AssertionError, match="expected \\(128, 128\\)"):
            tower(torch.zeros(1, 3, 144, 128))
        with pytest.raises(AssertionError, match="positions for 77"):
            clip.ClipText(config.DEMO.clip)(torch.zeros(1, 78, dtype=torch.long))
