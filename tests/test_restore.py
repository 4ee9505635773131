"""Restoring: any size, tiles, fidelity, what is kept constant, and the command with its mistakes."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from test_lucidflux import PRESET, SMALL, drawn
from torch.utils.flop_counter import FlopCounterMode

import sample
from flux import (
    bench_restoring,
    checkpoint,
    conditioning,
    fidelity,
    flow,
    latents,
    lucid_files,
    lucidflux,
    pictures,
    restore,
    tiles,
    wavelet,
)
from flux.autoencoder import AutoEncoder
from flux.config import DEMO, DEV, LUCID, AutoEncoderConfig
from flux.errors import UserError
from flux.lucidflux import LucidFlux
from flux.model import Flux
from flux.siglip import SiglipVision
from flux.swinir import Swinir
from flux.tiles import Tile
from golden import load

AE = AutoEncoderConfig(ch=8, ch_mult=(1, 1, 1, 1), num_res_blocks=1, norm_groups=1, scale_factor=1.0, shift_factor=0.0)


@pytest.fixture(scope="module")
def networks():
    generator = torch.Generator().manual_seed(5)
    prompt = torch.randn(1, 5, PRESET.flux.context_in_dim, generator=generator), torch.randn(1, PRESET.flux.vec_in_dim)
    return restore.Networks(PRESET, SMALL, drawn(Flux(PRESET.flux)), drawn(LucidFlux(PRESET.flux, SMALL), 1),
                            drawn(AutoEncoder(AE), 2), drawn(Swinir(SMALL.swinir), 3), drawn(SiglipVision(SMALL.siglip), 4),
                            prompt)


HOW = restore.How(steps=2, guidance=4.0, tile=128, overlap=16)


def picture(height, width, batch=1, seed=0):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("size", [(1, 1), (1, 150), (70, 33), (64, 192)])
def test_any_size_comes_back(networks, size):
    after, pre = restore.restore(networks, picture(*size), HOW)
    assert after.shape == pre.shape == (1, 3, *size)
    assert torch.isfinite(after).all() and after.abs().max() <= 1


def test_a_picture_is_the_same_among_others_and_again(networks):
    lq = picture(64, 80, batch=2)
    both, _ = restore.restore(networks, lq, replace(HOW, fidelity=0.3))
    alone, _ = restore.restore(networks, lq[1:], replace(HOW, fidelity=0.3))
    assert torch.allclose(both[1:], alone, atol=1e-5)
    assert torch.equal(alone, restore.restore(networks, lq[1:], replace(HOW, fidelity=0.3))[0])
    assert not torch.equal(alone, restore.restore(networks, lq[1:], replace(HOW, fidelity=0.3, seed=1))[0])


def test_it_is_its_parts_by_hand(networks):
    """Of one tile, as lucidflux.md section 1 tells it."""
    lq, n = picture(64, 64), networks
    after, pre = restore.restore(n, lq, HOW)
    with torch.inference_mode():
        assert torch.equal(pre, n.swinir.restore(lq))
        seen = n.siglip(lucidflux.to_siglip((pre + 1) / 2, 32))
        given = lucidflux.given(n.lucid, conditioning.condition(*n.prompt, 64, 64, 4.0), lq, pre, seen)
        img = latents.pack(latents.noise(1, 64, 64, torch.Generator().manual_seed(0)))
        img = flow.euler(lucidflux.velocity(n.model, n.lucid, given), img, flow.schedule(2, 16))
        out = n.autoencoder.decode(latents.unpack(img, 64, 64))
        assert torch.allclose(after, wavelet.coloured_as(out, pre).clamp(-1, 1), atol=1e-5)
        assert torch.allclose(restore.restore(n, lq, replace(HOW, colour_fix=False))[0], out.clamp(-1, 1), atol=1e-5)


def test_settings_do_what_they_say(networks):
    lq = picture(64, 64)
    plain, _ = restore.restore(networks, lq, HOW)
    changes = ({"strengths": (0.0, 1.0)}, {"strengths": (1.0, 0.0)}, {"tokens": False}, {"modulated": False},
               {"token_guidance": 3.0}, {"schedule": "released"}, {"guidance": 1.0}, {"fidelity": 0.5})
    large = replace(HOW, steps=3)
    seen = [restore.restore(networks, lq, large)[0]]
    for change in changes:
        out, _ = restore.restore(networks, lq, replace(large, **change))
        assert all(not torch.allclose(out, other, atol=1e-6) for other in seen), change
        seen.append(out)
    assert torch.equal(plain, restore.restore(networks, lq, replace(HOW, token_guidance=1.0))[0])


def test_pixels_for_siglip_equal_the_reference():
    golden = load("siglip_pixels")
    golden.close(lucidflux.to_siglip(golden.inputs["image"], golden.config["size"]), "pixels")
    lq = pictures.to_tensor(Image.fromarray(golden.inputs["lq"].numpy()))
    golden.close((lq.bfloat16().float() + 1).div(2).clamp(0, 1), "ci01", tol=2e-3)  # bfloat16 before, as there


# Tiles.

@pytest.mark.parametrize(("length", "tile", "overlap"), [(10, 16, 4), (16, 16, 4), (17, 16, 4), (100, 16, 4), (29, 8, 7),
                                                         (1000, 64, 0)])
def test_tiles_cover_and_overlap(length, tile, overlap):
    starts = tiles.starts(length, tile, overlap)
    assert starts[0] == 0 and starts[-1] + tile >= length and starts[-1] == max(length - tile, 0)
    assert all(overlap <= a + tile - b < tile for a, b in zip(starts, starts[1:], strict=False))
    fewer = len(starts) - 1
    assert not fewer or fewer * (tile - overlap) + overlap < length


def test_blending_gives_back_what_is_the_same_everywhere():
    x = torch.rand(2, 3, 50, 37)
    cut = tiles.over(50, 37, 16, 6)
    assert torch.allclose(tiles.blended(x, cut, 6, lambda part, i: part), x, atol=1e-6)
    assert [tile.cut(x).shape[2:] for tile in cut] == [(16, 16)] * len(cut)
    assert Tile(1, 2, 3, 4).times(16) == Tile(16, 32, 48, 64)
    ramp = tiles.ramp(Tile(0, 0, 9, 20), 3)
    assert ramp.min() > 0 and ramp[4, 10] == 1 and torch.equal(ramp, ramp.flip(0)) and torch.equal(ramp, ramp.flip(1))
    steps = tiles.blended(torch.zeros(1, 1, 8, 28), tiles.over(8, 28, 16, 4), 4, lambda part, i: part + i)[0, 0, 0]
    assert steps[0] == 0 and steps[-1] == 1 and (steps.diff() >= 0).all() and 0.3 < steps[14] < 0.7


def test_a_velocity_of_each_token_is_not_changed_by_tiles():
    def own(img, t):
        return img.sin() * t[:, None, None]
    img, t = torch.randn(2, 12 * 7, 64), torch.tensor([0.2, 0.8])
    cut = tiles.over(12, 7, 4, 2)
    assert torch.allclose(tiles.velocity([own] * len(cut), cut, 2, 12, 7)(img, t), own(img, t), atol=1e-6)


def test_tiles_share_the_tokens_of_the_whole_picture(networks):
    """And a picture that fits is one tile, whatever the overlap."""
    lq, calls = picture(128, 192), []
    watched = replace(networks, siglip=lambda pixels: calls.append(len(pixels)) or networks.siglip(pixels))
    out, _ = restore.restore(watched, lq, replace(HOW, tile=64, overlap=32))
    assert calls == [1] and out.shape == lq.shape
    small = picture(64, 64)
    assert torch.equal(restore.restore(networks, small, replace(HOW, tile=64, overlap=32))[0],
                       restore.restore(networks, small, HOW)[0])


# Fidelity.

def test_fidelity_leaves_less_of_the_way():
    schedule = flow.schedule(20, 64)
    assert fidelity.times(schedule, 0) == schedule
    starts = [fidelity.times(schedule, share / 10)[0] for share in range(11)]
    assert starts == pytest.approx([1 - 0.8 * (i / 10) ** 2.5 for i in range(11)])
    left = fidelity.times(schedule, 0.7)
    assert all(a > b for a, b in zip(left, left[1:], strict=False)) and left[-1] == 0
    noise, anchor = torch.randn(2, 4, 64), torch.randn(2, 4, 64)
    assert torch.equal(fidelity.begin(anchor, noise, 0), noise)
    assert torch.allclose(fidelity.begin(anchor, noise, 1), 0.8 * anchor + 0.2 * noise, atol=1e-6)


def test_low_frequencies_are_led_to_the_anchor():
    """At 1 the point that the velocity leads to has the anchor's, and its own fine detail."""
    img, anchor, t = torch.randn(2, 48, 64), torch.randn(2, 48, 64), torch.tensor([0.5, 0.9])
    plain = torch.randn(2, 48, 64)
    assert fidelity.tied(lambda *_: plain, anchor, 96, 128, 0)(img, t) is plain
    v = fidelity.tied(lambda *_: plain, anchor, 96, 128, 1.0)(img, t)
    ends = img - t[:, None, None] * plain, img - t[:, None, None] * v, anchor
    own, led, wanted = (latents.unpack(x, 96, 128) for x in ends)
    low = [wavelet.low(x, fidelity.LEVELS) for x in (own, wanted)]
    assert torch.allclose(led, own - low[0] + low[1], atol=1e-4)


def test_fidelity_is_monotone(networks):
    """Distance to the proxy's own round trip, for a network that knows nothing."""
    lq = picture(64, 64)
    _, pre = restore.restore(networks, lq, HOW)
    trip = networks.autoencoder.decode(networks.autoencoder.encode(pre))
    away = [(restore.restore(networks, lq, replace(HOW, steps=4, fidelity=share, colour_fix=False))[0]
             - trip.clamp(-1, 1)).square().mean().item() for share in (0, 0.25, 0.5, 0.75, 1)]
    assert all(a > b for a, b in zip(away, away[1:], strict=False)), away


def test_guidance_of_one_is_none():
    def v(value):
        return lambda img, t: torch.full_like(img, value)
    img, t, full = torch.zeros(1, 2, 64), torch.ones(1), v(2.0)
    assert fidelity.guided(full, v(1.0), 1) is full
    assert torch.equal(fidelity.guided(full, v(1.0), 3)(img, t), torch.full_like(img, 4.0))


def test_conditioning_costs_little_at_full_size():
    """By counted operations, at the spec's sizes: 1024 x 1024 pixels, 512 + 1024 tokens of text."""
    with torch.device("meta"):
        model, lucid = Flux(DEV.flux).requires_grad_(False), LucidFlux(DEV.flux, LUCID["dev"]).requires_grad_(False)
        prompt = conditioning.condition(torch.zeros(1, 512, 4096), torch.zeros(1, 768), 1024, 1024, 4.0)
        hint, tokens, img = torch.zeros(1, 4096, 3072), torch.zeros(1, 1024, 4096), torch.zeros(1, 4096, 64)
        t = torch.ones(1)
        given = lucidflux.Given(hint, hint, prompt, tokens)
        with FlopCounterMode(display=False) as plain:
            conditioning.velocity(model, conditioning.with_image_tokens(prompt, tokens))(img, t)
        with FlopCounterMode(display=False) as whole:
            lucidflux.velocity(model, lucid, given)(img, t)
    assert 1.05 < whole.get_total_flops() / plain.get_total_flops() < 1.07


def test_its_benchmark_runs(capsys):
    small = ("--hidden=128", "--depth=2", "--single=1", "--branch=1", "--edge=64", "--text-tokens=4", "--seen-tokens=4")
    bench_restoring.main([*small, "--rounds=3", "--dtype=fp32"])
    found = re.search(r"blocks ([0-9.]+) times that \(([0-9.]+)-([0-9.]+)\)", capsys.readouterr().out)
    median, least, most = map(float, found.groups())
    assert least <= median <= most and most > 1
    with pytest.raises(SystemExit, match="2"):
        bench_restoring.main([*small, "--rounds=0"])


# The command.

@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """LucidFlux and SwinIR for the demo, untrained."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    from flux import weights
    model = weights.load_flux(weights.find(DEMO), DEMO.flux, torch.float32)
    lucid = lucidflux.begun(model, LUCID["demo"])
    lucid_files.save_lucidflux(folder / "lucidflux.safetensors", lucid, model.state_dict(), {})
    checkpoint.save(folder / "swinir.safetensors", Swinir(LUCID["demo"].swinir).state_dict())
    checkpoint.save(folder / "prompt.safetensors", {"txt": torch.zeros(1, 24, 96), "vec": torch.zeros(1, 96)})
    return folder


def command(files, folder, *words):
    named = [f"--lucidflux={files}/lucidflux.safetensors", f"--swinir={files}/swinir.safetensors",
             f"--prompt={files}/prompt.safetensors"]
    return ["lucidflux", *map(str, words), *named, "--out", str(folder), "--steps", "1"]


def test_what_is_shared_with_the_transformer_is_not_stored(files):
    from flux import weights
    path = files / "lucidflux.safetensors"
    transformer = weights.state_of(weights.find(DEMO), "flux")
    again = lucid_files.load_lucidflux(path, DEMO, LUCID["demo"], torch.float32, transformer=transformer)
    stored = checkpoint.read(path)
    assert not {"condition_lq.double_blocks.0.txt_mlp.0.weight", "condition_ldr.guidance_in.in_layer.weight"} & set(stored)
    assert torch.equal(again.condition_ldr.vector_in.in_layer.weight, transformer["vector_in.in_layer.weight"].float())
    name = "double_blocks.0.txt_mlp.0.weight"
    assert torch.equal(again.condition_lq.state_dict()[name], transformer[name].float())
    assert torch.equal(again.connector.redux_up.weight, stored["connector.redux_up.weight"].float())
    other = {name: tensor.clone() for name, tensor in transformer.items()}
    other["double_blocks.0.txt_mlp.0.weight"][0, 0] += 1
    for wrong in (None, other):
        with pytest.raises(UserError, match="leaves out what it shares with a transformer"):
            lucid_files.load_lucidflux(path, DEMO, LUCID["demo"], transformer=wrong)


def test_a_folder_with_broken_pictures(files, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (40, 70, 3), dtype=np.uint8)).save(folder / "a.png")
    Image.fromarray(rng.integers(0, 256, (9, 5, 4), dtype=np.uint8), "RGBA").save(folder / "b.png")
    (folder / "c.jpg").write_bytes(b"\xff\xd8 broken")
    sample.main(command(files, tmp_path / "out", folder, "--scale", "2", "--sheet"))
    told = capsys.readouterr()
    assert "1 of 3 pictures could not be restored" in told.err and "c.jpg" in told.err
    made = sorted((tmp_path / "out").glob("*_seed0.png"))
    assert [Image.open(path).size for path in made] == [(140, 80), (10, 18)]
    assert len(list((tmp_path / "out").glob("*_seed0_steps.png"))) == 2
    metadata = pictures.read_metadata(made[0])
    assert metadata["recipe"] == "lucidflux" and metadata["prompt"] == "a.png" and "lucidflux" in metadata["files"]


def test_figures_against_a_reference(files, tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    sample.main(command(files, tmp_path / "out", path, "--reference", path))
    figures = pictures.read_metadata(next((tmp_path / "out").glob("*_seed0.png")))["figures"]
    assert figures["input"] == {"psnr": None, "ssim": 1.0} and figures["restored"]["psnr"] < 40
    json.dumps(figures, allow_nan=False)


@pytest.mark.parametrize(("words", "told"), [
    ((), "without a picture"), (("none.png",), "cannot be opened"), (("a.png", "--scale", "100"), "--scale 100"),
    (("a.png", "--scale", "16"), "after --scale 16"), (("a.png", "--fidelity", "2"), "--fidelity 2"),
    (("a.png", "--tile", "100"), "--tile 100"), (("a.png", "--tile", "64", "--overlap", "64"), "--overlap 64"),
    (("a.png", "--model", "schnell"), "--model schnell came with lucidflux"), (("a.png", "--width", "64"), "--width came"),
    (("a.png", "--reference", "a.png", "--reference", "b.png"), "--reference names 2"),
    (("a.png", "--reference", "b.png"), "expected 700x700"), (("a.png", "--lora", "x"), "--lora came"),
    (("a.png", "--swinir", "nowhere"), "--swinir nowhere is not there")])
def test_mistakes_are_told(files, tmp_path, monkeypatch, words, told):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (700, 700)).save("a.png")
    Image.new("RGB", (7, 7)).save("b.png")
    own = [word for word in command(files, tmp_path / "out", *words) if "--swinir" not in words or "swinir=" not in word]
    with pytest.raises(UserError, match=told) as error:
        sample.main(own)
    assert "\n" not in str(error.value)


def test_a_tall_thin_picture(files, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (600, 1, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    sample.main(command(files, tmp_path / "out", tmp_path / "a.png"))
    assert Image.open(next((tmp_path / "out").glob("*_seed0.png"))).size == (1, 600)
