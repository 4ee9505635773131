"""ControlNet branches: recorded tensors, names of files, where residuals go, and that a fresh one changes nothing."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flux import checkpoint, conditioning, control, flow, latents, naming, weights
from flux.config import DEV, TINY, FluxConfig
from flux.errors import UserError
from flux.model import Flux
from golden import load

MANIFESTS = Path(__file__).parent / "manifests"
H, W, TEXT = 4, 6, 5  # latent cells, tokens


def drawn(module, seed=0):
    """Weights for every parameter, the zeroed ones too."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.1, generator=generator)
    return module.eval().requires_grad_(False)


def given(config: FluxConfig, batch=2, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    txt = torch.randn(batch, TEXT, config.context_in_dim, generator=g)
    vec = torch.randn(batch, config.vec_in_dim, generator=g)
    img = torch.randn(batch, H * W // 4, 64, generator=g)
    cond = conditioning.condition(txt.to(dtype), vec.to(dtype), 8 * W, 8 * H, 3.5)
    return img.to(dtype), torch.full((batch,), 0.7, dtype=dtype), cond


# The branch.

@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_equals_the_reference(dtype):
    golden = load("lucid_branch")
    branch = control.ControlNet(replace(FluxConfig(**golden.config["params"]), depth=golden.config["controlnet_depth"],
                                        depth_single_blocks=0), pixels=True)
    branch.load_state_dict(golden.weights)
    branch, x = branch.to(dtype).eval(), {k: v if k.endswith("ids") else v.to(dtype) for k, v in golden.inputs.items()}
    with torch.no_grad():
        packed = latents.pack(branch.input_hint_block(x["cond_lq"]))
        double, single = branch(x["img"], x["img_ids"], x["txt"], x["txt_ids"], x["y"], x["timesteps"], x["guidance"],
                                branch.embed(x["cond_lq"]))
    golden.close(packed, "hint", dtype=dtype)
    for i, residual in enumerate(double):
        golden.close(residual, f"res{i}", dtype=dtype)
    assert len(double) == 2 and single == []


def test_names_are_those_of_the_released_branch():
    manifest = json.loads((MANIFESTS / "lucidflux_condition_branch.json").read_text())
    with torch.device("meta"):
        branch = control.ControlNet(replace(DEV.flux, depth=2, depth_single_blocks=0), pixels=True)
    assert {name: list(tensor.shape) for name, tensor in branch.state_dict().items()} == manifest


def test_a_branch_begins_as_the_transformer_and_changes_nothing():
    model = drawn(Flux(TINY))
    branch = control.begun_from(model, replace(TINY, depth=1, depth_single_blocks=1))
    assert torch.equal(branch.double_blocks[0].img_attn.qkv.weight, model.double_blocks[0].img_attn.qkv.weight)
    assert torch.equal(branch.time_in.in_layer.weight, model.time_in.in_layer.weight)
    img, t, cond = given(TINY)
    hint = branch.embed(torch.randn(1, 16, H, W))
    residuals = conditioning.control(branch, hint, cond, (1, 2), "interval")
    assert all(not x.any() for x in residuals(img, t))
    assert torch.equal(conditioning.velocity(model, cond, residuals)(img, t), conditioning.velocity(model, cond)(img, t))


@pytest.mark.parametrize("pixels", (False, True))
def test_a_branch_is_the_transformers_beginning(pixels):
    """By the model's own blocks, one after the other."""
    config = replace(TINY, depth=2, depth_single_blocks=1, guidance_embed=False)
    branch = drawn(control.ControlNet(config, pixels))
    img, t, cond = given(config)
    picture = torch.randn(1, 3, 8 * H, 8 * W) if pixels else torch.randn(1, 16, H, W)
    double, single = branch(img, cond.img_ids, cond.txt, cond.txt_ids, cond.vec, t, None, branch.embed(picture))
    seen = []
    as_model = drawn(Flux(config))
    as_model.load_state_dict({**as_model.state_dict(), **{k: v for k, v in branch.state_dict().items()
                                                          if k in as_model.state_dict()}})
    as_model.img_in.register_forward_hook(lambda *args: args[-1] + branch.embed(picture))
    for block in (*as_model.double_blocks, *as_model.single_blocks):
        block.register_forward_hook(lambda module, args, out: seen.append(out))
    as_model(img, cond.img_ids, cond.txt, cond.txt_ids, cond.vec, t)
    for i, (a, _) in enumerate(seen[:2]):
        assert torch.equal(double[i], branch.controlnet_blocks[i](a))
    assert torch.equal(single[0], branch.controlnet_single_blocks[0](seen[2][:, TEXT:]))


# Where residuals go.

@pytest.mark.parametrize(("count", "depth", "rule", "expected"), [
    (5, 19, "interval", [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4]),
    (2, 5, "repeat", [0, 1, 0, 1, 0]), (3, 3, "identity", [0, 1, 2]), (3, 3, "repeat", [0, 1, 2]),
    (1, 4, "interval", [0] * 4), (10, 38, "interval", [i // 4 for i in range(38)]), (7, 2, "interval", [0, 1])])
def test_residuals_are_spread_by_the_rule(count, depth, rule, expected):
    assert control.spread(list(range(count)), depth, rule) == expected


def test_identity_wants_one_for_each():
    with pytest.raises(UserError, match="identity came with a ControlNet of 2 blocks, expected 19"):
        control.spread([0, 1], 19, "identity")


@pytest.mark.parametrize("singles", (False, True))
def test_a_model_adds_residuals_after_its_blocks(singles):
    config = replace(TINY, depth=2)
    model, plain = drawn(Flux(config)), drawn(Flux(config))
    img, t, cond = given(config, batch=3)
    g = torch.Generator().manual_seed(2)
    added = [torch.randn(3, H * W // 4, config.hidden_size, generator=g) for _ in range(4 if singles else 2)]
    args = (img, cond.img_ids, cond.txt, cond.txt_ids, cond.vec, t, torch.full((3,), 3.5))
    for block, x in zip(plain.double_blocks, added[:2], strict=True):
        block.register_forward_hook(lambda module, args, out, x=x: (out[0] + x, out[1]))
    for block, x in zip(plain.single_blocks if singles else (), added[2:], strict=True):
        block.register_forward_hook(lambda module, args, out, x=x: torch.cat((out[:, :TEXT], out[:, TEXT:] + x), dim=1))
    assert torch.equal(model(*args, added), plain(*args))
    assert not torch.equal(model(*args, added), model(*args))


def test_scale_window_and_references():
    config = replace(TINY, depth=2)
    model, branch = drawn(Flux(config)), drawn(control.ControlNet(replace(TINY, depth_single_blocks=1)), 3)
    img, t, cond = given(config)
    hint = branch.embed(torch.randn(1, 16, H, W, generator=torch.Generator().manual_seed(4)))

    def v(cond, *args):
        residuals = conditioning.control(branch, hint, cond, (2, 2), "repeat", *args)
        return conditioning.velocity(model, cond, residuals)(img, t)

    plain = conditioning.velocity(model, cond)(img, t)
    times = flow.schedule(4, 6)  # t = 0.7 is in none of its steps, but between the first and the last
    assert torch.equal(v(cond, 0.0), plain) and not torch.equal(v(cond), plain)
    assert torch.equal(v(cond, 1.0, conditioning.span(times, 0, 0.25)), plain)
    assert torch.equal(v(cond, 1.0, conditioning.span(times, 0, 1)), v(cond))
    one = conditioning.control(branch, hint, cond, (2, 2), "repeat", 1.0)(img, t)
    two = conditioning.control(branch, hint, cond, (2, 2), "repeat", 2.0)(img, t)
    assert len(one) == 4 and all(torch.equal(2 * a, b) for a, b in zip(one, two, strict=True))
    both = conditioning.with_references(cond, [torch.randn(1, 16, 2, 4)])
    nothing = torch.zeros(2, 2, TINY.hidden_size)  # is added to the reference's two tokens
    expected = model(torch.cat((img, both.references), dim=1), both.img_ids, cond.txt, cond.txt_ids, cond.vec, t,
                     torch.full((2,), 3.5), [torch.cat((x, nothing), dim=1) for x in one])[:, :img.shape[1]]
    assert torch.equal(v(both), expected) and not torch.equal(v(both), conditioning.velocity(model, both)(img, t))


# Files.

def as_diffusers(branch: control.ControlNet) -> dict[str, torch.Tensor]:
    """The branch as diffusers' FluxControlNetModel saves it; its names are written out here once more."""
    state = dict(naming.to_diffusers(branch.state_dict(), "flux", Path("x")))
    renamed = {}
    for name, tensor in state.items():
        number = int(name.split(".")[1]) if name.startswith("input_hint_block.") else -1
        place = {0: "conv_in", 14: "conv_out"}.get(number, f"blocks.{number // 2 - 1}")
        name = f"input_hint_block.{place}.{name.split('.')[-1]}" if number >= 0 else name
        renamed[name.replace("pos_embed_input", "controlnet_x_embedder")] = tensor
    return renamed


@pytest.mark.parametrize("guidance", (False, True))
@pytest.mark.parametrize("pixels", (False, True))
@pytest.mark.parametrize("form", ("own", "diffusers"))
def test_files_of_both_forms_load(form, pixels, guidance, tmp_path):
    config = replace(TINY, depth=2, depth_single_blocks=0 if pixels else 3, guidance_embed=guidance)
    branch = drawn(control.ControlNet(config, pixels))
    state = branch.state_dict() if form == "own" else as_diffusers(branch)
    checkpoint.save(tmp_path / "c.safetensors", {k: v.contiguous() for k, v in state.items()})
    loaded = weights.load_control(tmp_path / "c.safetensors", replace(TINY, in_channels=384))
    assert loaded.pixels == pixels and loaded.config == config
    assert {k: v.tolist() for k, v in loaded.state_dict().items()} == {k: v.tolist() for k, v in branch.state_dict().items()}


def test_names_of_diffusers_are_the_published_ones():
    """As in diffusers' controlnet_flux.py: what a ControlNet of pixels adds to a transformer."""
    names = set(as_diffusers(control.ControlNet(replace(TINY, depth_single_blocks=1), pixels=True)))
    assert {"x_embedder.weight", "controlnet_x_embedder.weight", "controlnet_blocks.0.weight",
            "controlnet_single_blocks.0.bias", "input_hint_block.conv_in.bias", "input_hint_block.blocks.5.weight",
            "input_hint_block.conv_out.weight", "transformer_blocks.0.attn.add_q_proj.weight",
            "single_transformer_blocks.0.proj_out.weight"} <= names
    assert not any(name.startswith(("norm_out", "proj_out", "input_hint_block.blocks.6")) for name in names)


def test_other_files_are_refused(tmp_path):
    def told(state):
        checkpoint.save(tmp_path / "c.safetensors", {k: v.contiguous() for k, v in state.items()})
        with pytest.raises(UserError) as error:
            weights.load_control(tmp_path / "c.safetensors", TINY)
        assert "\n" not in str(error.value) and "expected" in str(error.value)
        return str(error.value)

    branch = control.ControlNet(replace(TINY, depth_single_blocks=0))
    state = branch.state_dict()
    assert "union ControlNet" in told({**state, "controlnet_mode_embedder.weight": torch.zeros(10, 32)})
    assert "a FLUX.1 transformer" in told(Flux(TINY).state_dict())
    assert "a ControlNet" in told({"controlnet_blocks.0.weight": torch.zeros(2), "input_blocks.0.0.weight": torch.zeros(2)})
    assert "of another shape (controlnet_x_embedder.weight (32, 68)" in told(
        {**state, "controlnet_x_embedder.weight": torch.zeros(32, 68)})  # an inpainting one
    missing = {name: tensor for name, tensor in state.items() if name != "controlnet_blocks.0.bias"}
    assert "1 missing (controlnet_blocks.0.bias)" in told(missing)
    assert "unexpected" in told({**state, "double_blocks.7.img_mod.lin.bias": torch.zeros(192)})


def test_a_fresh_layer_is_zero():
    assert not any(p.any() for p in control.zeroed(torch.nn.Linear(3, 4)).parameters())
    assert math.prod(control.hint_block()(torch.randn(1, 3, 16, 24)).shape) == 16 * 2 * 3
