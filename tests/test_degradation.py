"""Degradation: recipes that make the same again, kernels against their formulas, published ranges, any size."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from flux import degradation, draws, edges, pictures
from flux.degradation import Degradation


def picture(height=40, width=56, seed=0):
    g = torch.Generator().manual_seed(seed)
    return F.interpolate(torch.rand(1, 3, 5, 7, generator=g), (height, width), mode="bicubic")[0].clamp(0, 1)


def recipes(count, kind=degradation.PUBLISHED):
    return [degradation.recipe(np.random.default_rng(i), kind) for i in range(count)]


def test_a_recipe_makes_the_same_again():
    """Also after JSON, and whatever ran before."""
    ops = set()
    for i in range(60):
        steps = degradation.recipe(draws.rng("test", i))
        assert steps == degradation.recipe(draws.rng("test", i))
        ops |= {step["op"] for step in steps}
        first = degradation.apply(picture(), steps)
        torch.manual_seed(i)
        assert torch.equal(first, degradation.apply(picture(), json.loads(json.dumps(steps))))
        assert first.shape == (3, 40, 56) and first.min() >= 0 and first.max() <= 1
        assert torch.equal(first * 255, (first * 255).round())
        assert steps or torch.allclose(first, picture(), atol=0.5 / 255 + 1e-6)
    assert ops == set(degradation.STEPS)


def test_pictures_of_a_batch_differ():
    made = [degradation.apply(picture(), steps) for steps in recipes(8)]
    assert all(not torch.equal(made[0], other) for other in made[1:])


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (7, 3), (17, 64)])
def test_any_size(size):
    for steps in recipes(12, Degradation(clean=0)):
        out = degradation.apply(picture(*size), steps)
        assert out.shape == (3, *size) and torch.isfinite(out).all()


def test_the_published_ranges():
    """Shares by counting; every number inside its range."""
    found, count = recipes(1500), 1500
    first = [steps[0] for steps in found]
    assert abs(sum(step["op"] == "sinc" for step in first) / count - 0.1) < 0.02
    kinds = [step["family"] for step in first if step["op"] == "blur"]
    for family, share in zip(degradation.FAMILIES, degradation.SHARES, strict=True):
        assert abs(kinds.count(family) - share * len(kinds)) < 3.5 * (share * (1 - share) * len(kinds)) ** 0.5, family
    for step in first:
        assert step["size"] in range(7, 22, 2)
        if step["op"] == "blur":
            assert all(0.2 <= sigma <= 3 for sigma in step["sigma"])
            assert (step["sigma"][0] == step["sigma"][1]) == step["family"].endswith("iso") or "aniso" in step["family"]
        else:
            assert math.pi / (3 if step["size"] < 13 else 5) - 1e-6 <= step["cutoff"] <= math.pi + 1e-6
    scales = np.array([steps[1]["to"] for steps in found])
    assert abs((scales > 1).mean() - 0.2) < 0.03 and abs((scales == 1).mean() - 0.1) < 0.02
    assert scales.min() >= 0.15 and scales.max() <= 1.5 and scales.min() < 0.17
    for steps in found:
        ops = [step["op"] for step in steps]
        assert ops[2] in ("gaussian", "poisson") and ops[3] == "jpeg"
        second = 4 + (ops[4] in ("blur", "sinc"))
        assert 0.3 / 4 <= steps[second]["to"] <= 1.2 / 4 + 1e-9
        assert steps[-1] == {"op": "resize", "to": 1.0, "mode": "bicubic"}
        assert sum(op == "jpeg" for op in ops) == 2
        assert {step["to"] for step in steps[second + 1:-1] if step["op"] == "resize"} == {0.25}
        for step in steps:
            assert step["op"] != "jpeg" or 30 <= step["quality"] <= 95
    assert abs(np.mean([steps[2]["gray"] for steps in found]) - 0.4) < 0.03
    assert abs(np.mean([steps[4]["op"] in ("blur", "sinc") for steps in found]) - 0.8) < 0.03
    more = recipes(1500, Degradation())
    assert abs(np.mean([not steps for steps in more]) - 0.05) < 0.015


def test_kernels_by_their_formulas():
    """Sum 1, symmetric; a Gaussian's second moments are its covariance; a sinc passes what is below its cutoff."""
    x, y = np.meshgrid(np.arange(21) - 10, np.arange(21) - 10)
    for steps in recipes(150, Degradation(clean=0)):
        for step in steps:
            if step["op"] == "blur":
                kernel = degradation.gaussian_kernel(*(step[k] for k in ("family", "size", "sigma", "angle", "beta")))
            elif step["op"] == "sinc":
                kernel = degradation.sinc_kernel(step["size"], step["cutoff"])
            else:
                continue
            assert kernel.shape == (21, 21) and kernel.sum() == pytest.approx(1, abs=1e-5)
            assert np.allclose(kernel, kernel[::-1, ::-1], atol=1e-7)
    kernel = degradation.gaussian_kernel("aniso", 21, [2.0, 1.0], 0.5, 1.0).astype(float)
    turn = np.array([[math.cos(0.5), -math.sin(0.5)], [math.sin(0.5), math.cos(0.5)]])
    expected = turn @ np.diag([4.0, 1.0]) @ turn.T
    moments = [[(kernel * a * b).sum() for b in (x, y)] for a in (x, y)]
    assert np.allclose(moments, expected, rtol=0.02)
    sinc = np.abs(np.fft.fft2(degradation.sinc_kernel(21, math.pi / 2)))
    assert sinc[0, 2] > 0.85 and sinc[0, 9] < 0.15  # 0.19 pi and 0.86 pi
    line, disc = degradation.motion_kernel(9, 0.0), degradation.defocus_kernel(4)
    assert (line > 0).sum(1).tolist() == [0] * 10 + [9] + [0] * 10
    assert (disc / disc.max()).sum() == pytest.approx(math.pi * 16, rel=0.03)


def test_filtering_is_convolution():
    image, kernel = picture(9, 30), degradation.gaussian_kernel("aniso", 21, [2.5, 0.7], 1.1, 1.0)
    padded = edges.reflected(image.double(), 10)[:, None]
    expected = F.conv2d(padded, torch.from_numpy(kernel).double()[None, None])[:, 0]
    assert (degradation.filtered(image, kernel) - expected).abs().max() < 1e-5


def test_reflection_is_torchs_and_goes_on():
    x = torch.arange(12.0).view(1, 3, 4)
    assert torch.equal(edges.reflected(x, 2), F.pad(x, (2, 2, 2, 2), mode="reflect"))
    assert edges.mirrored(3, -4, 8).tolist() == [0, 1, 2, 1, 0, 1, 2, 1, 0, 1, 2, 1]
    assert edges.mirrored(1, -2, 3).tolist() == [0] * 5


def test_noise_has_the_size_that_was_drawn():
    flat = torch.full((3, 200, 200), 0.5)
    for gray in (False, True):
        made = degradation.STEPS["gaussian"](flat, {"sigma": 20.0, "gray": gray, "seed": 3}, flat.shape[1:])
        assert (made - flat).std().item() * 255 == pytest.approx(20, rel=0.03)
        assert torch.equal(made[0], made[1]) == gray
    ramp = torch.linspace(0, 1, 256).expand(3, 256, 256)  # 256 values: 256 levels, so the variance is light / 256
    noise = degradation.STEPS["poisson"](ramp, {"scale": 1.0, "gray": False, "seed": 3}, ramp.shape[1:]) - ramp
    assert noise[..., 200:].var().item() == pytest.approx(ramp[..., 200:].mean().item() / 256, rel=0.05)


def test_sharpening_leaves_flat_parts_alone():
    image = torch.full((3, 60, 80), 0.4)
    assert torch.allclose(degradation.sharpened(image), image, atol=1e-6)
    image[:, :, 40:] = 0.7
    out = degradation.sharpened(image)
    assert out[0, 30, 41] > 0.705 and out[0, 30, 38] < 0.395
    assert torch.equal(degradation.sharpened(picture(1, 1)), picture(1, 1))


def test_the_command_and_back(tmp_path, capsys):
    clean = tmp_path / "clean.png"
    pictures.write_png(clean, degradation.to_picture(picture()), None)
    assert degradation.main([str(clean), "--out", str(tmp_path / "lq"), "--seed", "4"]) == 0
    made = next((tmp_path / "lq").glob("*.png"))
    assert pictures.read_metadata(made)["degradation"]
    again = degradation.to_picture(degradation.remake(made, clean))
    assert again.tobytes() == pictures.read(made).tobytes()
    assert degradation.main([str(clean), "--out", str(tmp_path / "many"), "--count", "5"]) == 0
    assert len(list((tmp_path / "many").iterdir())) == 5
    assert len(list(tmp_path.glob("many_*_sheet.png"))) == 1, "beside the folder, not in it"
    for word, names in ((str(tmp_path / "none.png"), []), (str(clean), ["--again", str(clean)])):
        assert degradation.main([word, "--out", str(tmp_path / "x"), *names]) == 2
    bad = tmp_path / "bad.png"
    for steps in ("no", [{"op": "nothing"}], [{"op": "blur"}], [{"op": "resize", "to": "wide", "mode": "area"}]):
        pictures.write_png(bad, Image.new("RGB", (4, 4)), {"degradation": steps})
        assert degradation.main([str(bad), "--again", str(clean), "--out", str(tmp_path / "x")]) == 2
    assert "Traceback" not in capsys.readouterr().err
