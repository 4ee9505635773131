"""LucidFlux: recorded tensors, the released checkpoint's names and layout, and what its parts must do (section 12)."""

import json
import zipfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flux import checkpoint, conditioning, flow, latents, lucid_files, lucidflux, pth, weights
from flux.config import DEV, LUCID, TINY, FluxConfig, LucidConfig, Preset, SiglipConfig, SwinirConfig, T5Config
from flux.errors import UserError
from flux.lucidflux import LucidFlux, Modulation
from flux.model import Flux
from flux.swinir import Swinir
from golden import load

MANIFESTS = Path(__file__).parent / "manifests"
SMALL = LucidConfig(siglip=SiglipConfig(hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                                        image_size=32, patch_size=16),
                    swinir=SwinirConfig(embed_dim=12, depths=(2,), num_heads=(3,), num_feat=8))
PRESET = Preset(name="dev", flux=replace(TINY, depth=3), t5=T5Config(d_model=TINY.context_in_dim))


def drawn(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.1, generator=generator)
    return module.eval().requires_grad_(False)


def situation(config=PRESET.flux, batch=1, width=48, height=32):
    g = torch.Generator().manual_seed(3)
    txt, vec = torch.randn(batch, 5, config.context_in_dim, generator=g), torch.randn(batch, config.vec_in_dim, generator=g)
    cond = conditioning.condition(txt, vec, width, height, 4.0)
    img = torch.randn(batch, width * height // 256, 64, generator=g)
    lq, ldr = (torch.rand(batch, 3, height, width, generator=g) * 2 - 1 for _ in range(2))
    return cond, img, lq, ldr, torch.randn(batch, 4, SMALL.siglip.hidden_size, generator=g)


# Recorded tensors.

@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_modulation_equals_the_reference(dtype):
    golden = load("lucid_modulation")
    mod = Modulation(golden.config["params"]["hidden_size"], 1e-6)
    mod.load_state_dict(golden.weights)
    mod, x, t = mod.to(dtype).eval(), golden.inputs["x"].to(dtype), golden.inputs["timesteps"].to(dtype)
    with torch.no_grad():
        for index in (0, 1, 11, 18):
            golden.close(mod(x, mod.vectors(t, torch.tensor([index]))[:, 0]), f"i{index}", dtype=dtype)
        each = mod.vectors(t, golden.inputs["index"])
        golden.close(mod(x, each[torch.arange(len(t)), torch.arange(len(t))]), "vec", dtype=dtype)


def reference(golden, dtype=torch.float32):
    params = golden.config["params"]
    config = FluxConfig(**params)
    model, lucid = Flux(config), LucidFlux(config, replace(SMALL, depth=golden.config["controlnet_depth"]))
    model.load_state_dict({k[5:]: v for k, v in golden.weights.items() if k.startswith("flux.")})
    own = {k: v for k, v in golden.weights.items() if not k.startswith("flux.")}
    own |= {k: v for k, v in lucid.state_dict().items() if k.startswith("connector.")}  # not recorded here
    lucid.load_state_dict(own)
    x = {k: v if k.endswith("ids") else v.to(dtype) for k, v in golden.inputs.items()}
    h, w = golden.config["h"], golden.config["w"]
    prompt = conditioning.condition(x["txt"], x["y"], 16 * w, 16 * h, golden.config["guidance"])
    lucid, model = lucid.to(dtype).eval(), model.to(dtype).eval()
    given = lucidflux.Given(lucid.condition_lq.embed(x["cond_lq"]), lucid.condition_ldr.embed(x["cond_ldr"]), prompt,
                            x["siglip_txt"][:, x["txt"].shape[1]:])
    return model, lucid, given, x


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@torch.no_grad()
def test_the_whole_equals_the_reference(dtype):
    golden = load("lucid_full")
    model, lucid, given, x = reference(golden, dtype)
    assert torch.equal(x["siglip_txt"][:, :x["txt"].shape[1]], x["txt"]), "the prompt comes first"
    lucid.depth = 19
    args = x["img"], x["img_ids"], x["txt"], x["txt_ids"], x["y"], x["timesteps"], x["guidance"]
    lq, ldr = lucid.condition_lq(*args, given.lq)[0], lucid.condition_ldr(*args, given.ldr)[0]
    dual = lucid.residuals(lq, ldr, lucid.table(x["timesteps"]))
    golden.close(torch.stack(dual), "dual", dtype=dtype)
    whole = (x["img"], x["img_ids"], x["siglip_txt"], x["siglip_txt_ids"], x["y"], x["timesteps"], x["guidance"])
    golden.close(model(*whole), "img_plain", dtype=dtype)
    golden.close(model(*whole, residuals=dual[:model.config.depth]), "img", dtype=dtype)


@torch.no_grad()
def test_a_trajectory_equals_the_reference():
    golden = load("lucid_full")
    model, lucid, given, x = reference(golden)
    times = golden.config["schedule"]
    for table in (None, lucidflux.tables(lucid, times)):
        golden.close(flow.euler(lucidflux.velocity(model, lucid, given, table), x["img"], times), "denoise")


@pytest.mark.parametrize(("size", "name"), [((1024, 1024, 20), "lucid0"), ((768, 512, 50), "lucid1")])
def test_the_released_schedule(size, name):
    width, height, steps = size
    golden = load("schedule")
    assert golden.config["lucid"][int(name[-1])] == list(size)
    ours = torch.tensor(lucidflux.schedule(steps, width, height, "released"), dtype=torch.float64)
    assert (ours - golden.outputs[name]).abs().max() <= 1e-6
    right = lucidflux.schedule(steps, width, height, "flux")
    assert right == flow.schedule(steps, width * height // 256)


def test_the_released_shift_is_that_of_a_small_picture():
    assert lucidflux.mu(1024, 1024, "released") == pytest.approx(0.4675, abs=1e-9)
    assert lucidflux.mu(1024, 1024, "flux") == pytest.approx(1.15)
    times = [lucidflux.schedule(20, 1024, 1024, kind) for kind in ("released", "flux")]
    assert [[round(t[i], 3) for i in (5, 10, 15)] for t in times] == [[0.827, 0.615, 0.347], [0.905, 0.760, 0.513]]
    assert [sum(t < 0.5 for t in kind[:-1]) for kind in times] == [7, 4]


# Names, sizes, files.

def test_names_and_sizes_are_the_released_ones():
    with torch.device("meta"):
        lucid = LucidFlux(DEV.flux, LUCID["dev"])
    state = {name: list(tensor.shape) for name, tensor in lucid.state_dict().items()}
    branch, modulation, connector = (json.loads((MANIFESTS / f"{name}.json").read_text()) for name in (
        "lucidflux_condition_branch", "lucidflux_modulation", "redux_connector"))
    parts = {"condition_lq": branch, "condition_ldr": branch, "modulation_lq": modulation, "modulation_ldr": modulation,
             "connector": connector}
    assert state == {f"{part}.{name}": shape for part, names in parts.items() for name, shape in names.items()}
    assert sum(parameter.numel() for parameter in lucid.parameters()) == 1_630_798_432
    assert sum(parameter.numel() for parameter in lucid.condition_lq.parameters()) == 743_807_280
    assert sum(parameter.numel() for parameter in lucid.modulation_lq.parameters()) == 39_340_032


def nested(lucid: LucidFlux) -> dict:
    return {part: getattr(lucid, part).state_dict() for part in ("condition_lq", "condition_ldr", "modulation_lq",
                                                                 "modulation_ldr", "connector")}


def test_both_forms_of_the_checkpoint_load_strictly(tmp_path):
    lucid = drawn(LucidFlux(PRESET.flux, SMALL))
    torch.save(nested(lucid), tmp_path / "lucidflux.pth")
    checkpoint.save(tmp_path / "lucidflux.safetensors", lucid.state_dict())
    for name in ("lucidflux.pth", "lucidflux.safetensors"):
        again = lucid_files.load_lucidflux(tmp_path / name, PRESET, SMALL)
        assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), lucid.state_dict().values(), strict=True))
    broken = nested(lucid)
    del broken["modulation_lq"]["linear.bias"]
    torch.save(broken, tmp_path / "less.pth")
    broken["connector"]["more"] = torch.zeros(1)
    torch.save(broken, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"1 missing \(modulation_lq.linear.bias\)"):
        lucid_files.load_lucidflux(tmp_path / "less.pth", PRESET, SMALL)
    with pytest.raises(UserError, match=r"1 unexpected \(connector.more\)"):
        lucid_files.load_lucidflux(tmp_path / "other.pth", PRESET, SMALL)
    with pytest.raises(UserError, match="is a SwinIR restorer; expected LucidFlux's checkpoint"):
        torch.save(Swinir(SMALL.swinir).state_dict(), tmp_path / "swinir.pth")
        lucid_files.load_lucidflux(tmp_path / "swinir.pth", PRESET, SMALL)


def test_swinir_in_all_its_wrappings(tmp_path):
    model = drawn(Swinir(SMALL.swinir))
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    state["module.layers.0.residual_group.blocks.1.attn_mask"] = torch.zeros(4, 64, 64)
    state["module.layers.0.residual_group.blocks.0.attn.relative_position_index"] = torch.zeros(64, 64, dtype=torch.long)
    state["lpips_metric.net.slice1.0.weight"] = torch.zeros(3)
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "general_swinir_v1.ckpt")
    again = lucid_files.load_swinir(tmp_path / "general_swinir_v1.ckpt", SMALL)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))


class Evil:
    def __reduce__(self):
        return print, ("code ran",)


def test_torch_files_that_are_not_tensors_alone_are_refused(tmp_path, capsys):
    good = tmp_path / "good.pth"
    torch.save({"a": {"b": torch.arange(3)}, "step": 5, "c": torch.ones(2)}, good)
    assert list(pth.read(good)) == ["a.b", "c"]
    torch.save({"a": Evil()}, tmp_path / "evil.pth")
    torch.save([torch.ones(1)], tmp_path / "list.pth")
    (tmp_path / "cut.pth").write_bytes(good.read_bytes()[:-200])
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "page.pth").write_text("<!doctype html>")
    with zipfile.ZipFile(tmp_path / "zip.pth", "w") as file:
        file.writestr("a.txt", "no tensors")
    deep = {"x": torch.ones(1)}
    for _ in range(9):
        deep = {"d": deep}
    torch.save(deep, tmp_path / "deep.pth")
    for name in ("evil", "list", "cut", "empty", "page", "zip", "deep", "none"):
        with pytest.raises(UserError) as told:
            pth.read(tmp_path / f"{name}.pth")
        assert "\n" not in str(told.value), name
    assert "code ran" not in capsys.readouterr().out
    rng = torch.Generator().manual_seed(0)
    data = bytearray(good.read_bytes())
    for i in range(60):  # a byte here and there
        at = int(torch.randint(len(data), (1,), generator=rng))
        (tmp_path / "mutated.pth").write_bytes(bytes(data[:at]) + bytes([data[at] ^ (1 + i)]) + bytes(data[at + 1:]))
        with suppress(UserError):
            pth.read(tmp_path / "mutated.pth")


def test_files_are_found_and_what_is_missing_is_told(tmp_path):
    (tmp_path / "LucidFlux").mkdir()
    torch.save({"txt": torch.zeros(1, 5, TINY.context_in_dim), "vec": torch.zeros(1, TINY.vec_in_dim), "prompt": "x"},
               tmp_path / "LucidFlux" / "prompt_embeddings.pt")
    places = lucid_files.find(PRESET, tmp_path, {})
    txt, vec = lucid_files.load_prompt(places["prompt"], {}, PRESET, SMALL, torch.float32, torch.device("cpu"), tmp_path)
    assert (*txt.shape, *vec.shape) == (1, 5, TINY.context_in_dim, 1, TINY.vec_in_dim)
    with pytest.raises(UserError, match="SwinIR's weights is missing .*general_swinir_v1.ckpt; put it there"):
        places["swinir"].require()
    with pytest.raises(UserError, match="--swinir .*nowhere is not there"):
        lucid_files.find(PRESET, tmp_path, {"swinir": tmp_path / "nowhere"})
    with pytest.raises(UserError, match="holds txt"):
        lucid_files.load_prompt(places["prompt"], {}, DEV, SMALL, torch.float32, torch.device("cpu"), tmp_path)


# What it must do.

@torch.no_grad()
def test_zeroed_branches_give_zero_and_blocks_take_turns():
    fresh = LucidFlux(PRESET.flux, SMALL)
    cond, img, lq, _, _ = situation()
    guidance = torch.full((1,), 4.0)
    double, _ = fresh.condition_lq(img, cond.img_ids, cond.txt, cond.txt_ids, cond.vec, torch.tensor([0.5]), guidance,
                                   fresh.condition_lq.embed(lq))
    assert len(double) == 2 and not any(x.any() for x in double)
    lucid = drawn(LucidFlux(replace(PRESET.flux, depth=19), SMALL))
    phi = [torch.randn(1, 6, TINY.hidden_size) for _ in range(4)]
    table = lucid.table(torch.tensor([0.3]))
    plain = lucid.residuals(phi[:2], phi[2:], table)
    moved = lucid.residuals([phi[0] + torch.randn_like(phi[0]), phi[1]], phi[2:], table)
    assert len(plain) == 19
    assert [torch.equal(a, b) for a, b in zip(plain, moved, strict=True)] == [k % 2 == 1 for k in range(19)]
    half = lucid.residuals(phi[:2], phi[2:], table, (0.0, 1.0))
    assert torch.equal(half[4], lucid.modulation_ldr(phi[2], table[1][:, 4]))


@torch.no_grad()
def test_without_branches_and_tokens_it_is_plain_dev():
    model, lucid = drawn(Flux(PRESET.flux)), drawn(LucidFlux(PRESET.flux, SMALL))
    cond, img, lq, ldr, seen = situation()
    given = lucidflux.given(lucid, cond, lq, ldr, seen, (0.0, 0.0))
    given = replace(given, tokens=given.tokens[:, :0])
    t = torch.tensor([0.7])
    assert torch.equal(lucidflux.velocity(model, lucid, given)(img, t), conditioning.velocity(model, cond)(img, t))
    whole = lucidflux.velocity(model, lucid, lucidflux.given(lucid, cond, lq, ldr, seen))
    assert not torch.allclose(whole(img, t), conditioning.velocity(model, cond)(img, t), atol=1e-3)


def test_what_is_begun_changes_nothing_and_learns_in_every_group():
    """By an eps of 1: residuals are zero at first, and no group is cut off from its gradient for good."""
    model = drawn(Flux(PRESET.flux))
    lucid = lucidflux.begun(model, replace(SMALL, eps=1.0))
    assert torch.equal(lucid.condition_ldr.double_blocks[1].img_mlp[0].weight, model.double_blocks[1].img_mlp[0].weight)
    assert lucid.condition_lq.input_hint_block[-1].weight.std() > 0
    cond, img, lq, ldr, seen = situation(batch=2)

    def v():
        given = lucidflux.given(lucid, cond, lq, ldr, seen)
        return lucidflux.velocity(model, lucid, replace(given, tokens=given.tokens[:, :0]))
    t = torch.tensor([0.3, 0.9])
    assert torch.equal(v()(img, t), conditioning.velocity(model, cond)(img, t))
    optimiser = torch.optim.AdamW(lucid.parameters(), lr=1e-3)
    for _ in range(3):
        optimiser.zero_grad()
        out = lucidflux.velocity(model, lucid, lucidflux.given(lucid, cond, lq, ldr, seen))(img, t)
        out.square().mean().backward()
        optimiser.step()
    for part in ("condition_lq", "condition_ldr", "modulation_lq", "modulation_ldr", "connector"):
        dead = [name for name, p in getattr(lucid, part).named_parameters()
                if (p.grad is None or not p.grad.any()) and not name.startswith(("double_blocks.1.txt_m",
                                                                               "double_blocks.1.txt_attn.proj",
                                                                               "double_blocks.1.txt_attn.norm.query"))]
        assert not dead, (part, dead)  # of the last block, text goes nowhere
    assert all(p.grad is None for p in model.parameters())


@torch.no_grad()
def test_a_batch_is_its_pictures():
    model, lucid = drawn(Flux(PRESET.flux)), drawn(LucidFlux(PRESET.flux, SMALL))
    cond, img, lq, ldr, seen = situation(batch=3)
    t = torch.tensor([0.1, 0.5, 0.9])
    whole = lucidflux.velocity(model, lucid, lucidflux.given(lucid, cond, lq, ldr, seen))(img, t)
    for i in range(3):
        rows = slice(i, i + 1)
        alone = lucidflux.velocity(model, lucid, lucidflux.given(lucid, cond[rows], lq[rows], ldr[rows], seen[rows]))
        assert torch.allclose(alone(img[rows], t[rows]), whole[rows], atol=1e-5)


def test_the_demo_is_one_of_them():
    from flux.config import DEMO
    with torch.device("meta"):
        lucid, swinir = LucidFlux(DEMO.flux, LUCID["demo"]), Swinir(LUCID["demo"].swinir)
    unused = ("txt_mlp.0", "txt_mlp.2", "txt_attn.proj")  # the transformer's own, and not stored again: see test_restore.py
    count = sum(p.numel() for network in (lucid, swinir) for name, p in network.named_parameters()
                if not any(f"double_blocks.0.{part}." in name for part in unused))
    others = sum(path.stat().st_size for path in weights.DEMO.rglob("*")
                 if path.is_file() and path.stem not in ("lucidflux", "swinir"))
    assert 2 * count + others <= 40e6, f"{2 * count / 1e6:.1f} MB in bfloat16, {others / 1e6:.1f} MB of others"
    assert latents.pack(torch.zeros(1, 16, 16, 16)).shape[1] == 64
    assert weights.DEMO.is_dir()
