"""SwinIR: recorded tensors, the released names, sizes that do not fit its windows; and the wavelet colour fix."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from flux import degradation, draws, edges, lucid_files, swinir, wavelet, weights
from flux.config import LUCID, SwinirConfig
from flux.demo import scene as world
from golden import load

MANIFESTS = Path(__file__).parent / "manifests"


def small() -> swinir.Swinir:
    torch.manual_seed(0)
    return swinir.Swinir(SwinirConfig(embed_dim=12, depths=(2,), num_heads=(3,), num_feat=8)).eval().requires_grad_(False)


def test_equals_the_reference():
    golden = load("swinir")
    sizes = {name: golden.config["model"][name] for name in ("embed_dim", "depths", "num_heads", "window_size",
                                                             "mlp_ratio", "unshuffle_scale")}
    model = swinir.Swinir(SwinirConfig(**sizes)).eval()
    model.load_state_dict(golden.weights)
    for name in ("x0", "x1"):
        with torch.no_grad():
            first = model.conv_first(golden.inputs[name] - torch.tensor(swinir.MEAN)[:, None, None])
            golden.close(model.features(first).flatten(2).transpose(1, 2), f"{name}_feat")
            golden.close(model(golden.inputs[name]), name)


def test_names_are_those_of_the_released_file():
    with torch.device("meta"):
        state = swinir.Swinir(LUCID["dev"].swinir).state_dict()
    manifest = json.loads((MANIFESTS / "lucidflux_swinir.json").read_text())
    assert {name: list(tensor.shape) for name, tensor in state.items()} == manifest
    assert sum(tensor.numel() for tensor in state.values()) == 15_792_587


def test_positions_and_mask_are_the_released_buffers():
    """By their definition: pairs of cells by their offset; a mask from the slices in which the original numbers regions."""
    at = [(y, x) for y in range(8) for x in range(8)]
    for i, (y, x) in enumerate(at[::7]):
        for j, (v, u) in enumerate(at[::5]):
            assert swinir.offsets(8)[7 * i, 5 * j] == (y - v + 7) * 15 + (x - u + 7)
    numbers, count = torch.zeros(16, 24), 0
    for rows in (slice(0, -8), slice(-8, -4), slice(-4, None)):
        for columns in (slice(0, -8), slice(-8, -4), slice(-4, None)):
            numbers[rows, columns], count = count, count + 1
    for n, mask in enumerate(swinir.shift_mask(16, 24, 8)[:, 0]):
        own = numbers[8 * (n // 3):8 * (n // 3) + 8, 8 * (n % 3):8 * (n % 3) + 8].flatten()
        assert torch.equal(mask, -100.0 * (own[:, None] != own[None]))


@pytest.mark.parametrize("size", [(64, 128), (65, 1), (1, 1), (100, 63), (1, 200)])
def test_any_size_comes_back(size):
    model, image = small(), torch.rand(3, 3, *size) * 2 - 1
    out = model.restore(image)
    assert out.shape == image.shape and out.abs().max() <= 1
    whole = edges.filled(image, 64)
    assert whole.shape[2] % 64 == whole.shape[3] % 64 == 0
    assert torch.equal(out, 2 * model((whole + 1) / 2).clamp(0, 1)[..., :size[0], :size[1]] - 1)
    if min(size) > 63:
        assert torch.equal(whole, F.pad(image, (0, -size[1] % 64, 0, -size[0] % 64), mode="reflect"))


def test_a_picture_alone_is_the_same_in_a_batch():
    model, image = small(), torch.rand(3, 3, 64, 64)
    assert torch.allclose(model(image)[1:2], model(image[1:2]), atol=1e-6)


def test_sizes_that_do_not_fit_are_told():
    with pytest.raises(AssertionError, match="multiples of 64"):
        small()(torch.rand(1, 3, 72, 64))


def test_colour_fix_equals_the_reference():
    golden = load("wavelet_color")
    for name in ("chw", "s0", "s1"):
        content, style = (golden.inputs[f"{name}_{part}"] for part in ("content", "style"))
        if content.ndim == 3:
            content, style = content[None], style[None]
        low, fixed = wavelet.low(content), wavelet.coloured_as(content, style)
        high = content - low
        if name == "chw":
            low, fixed, high = low[0], fixed[0], high[0]
        for part, value in ((name, fixed), (f"{name}_low", low), (f"{name}_high", high)):
            golden.close(value, part)


def test_colour_fix_of_equal_pictures_changes_nothing_and_an_offset_goes():
    image = torch.rand(2, 3, 33, 47)
    assert torch.equal(wavelet.coloured_as(image, image), image)
    shifted = image + torch.tensor([0.2, -0.1, 0.05])[:, None, None]
    assert torch.allclose(wavelet.coloured_as(shifted, image), image, atol=1e-6)


def test_blur_is_the_binomial_kernel_spread_out():
    image = torch.rand(1, 2, 20, 23, dtype=torch.float64)
    row = torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64)
    kernel = (row[:, None] * row / 16).expand(2, 1, 3, 3)
    for dilation in (1, 4):
        padded = F.pad(image, (dilation,) * 4, mode="replicate")
        assert torch.allclose(wavelet.blurred(image, dilation), F.conv2d(padded, kernel, dilation=dilation, groups=2))


def test_the_demos_tells_clean_pictures_and_keeps_them():
    """Of renders that training never saw; what is degraded is made anew."""
    network = lucid_files.load_swinir(weights.DEMO / "swinir.safetensors", LUCID["demo"])
    rngs = [draws.rng("clean or not", i) for i in range(8)]
    clean = [degradation.to_unit(Image.fromarray(world.render(world.sample_scene(rng, held_out=True))[0])) for rng in rngs]
    kind = degradation.Degradation(clean=0)
    worse = [degradation.apply(x, degradation.recipe(rng, kind)) for x, rng in zip(clean, rngs, strict=True)]
    clean, worse = torch.stack(clean), torch.stack(worse)
    with torch.inference_mode():
        assert network.made(clean)[1].min() > 0.9 and network.made(worse)[1].max() < 0.5
        assert (network(clean) - clean).abs().mean() < 0.2 * (network.made(clean)[0] - clean).abs().mean()
        assert (network(worse) - clean).square().mean() < 0.6 * (worse - clean).square().mean()


def test_clearness_is_of_each_picture_and_sees_noise_and_blur():
    square = torch.zeros(1, 3, 64, 64)
    square[..., 16:48, 16:48] = 1
    noisy = square + 0.1 * torch.randn(square.shape, generator=torch.Generator().manual_seed(0))
    blurred = torch.nn.functional.avg_pool2d(square, 9, 1, 4)
    both = torch.cat((square, noisy, blurred))
    found = swinir.clearness(both)
    assert found.shape == (3, 6) and torch.allclose(found[1:2], swinir.clearness(noisy))
    assert found[0, -1] > found[2, -1] > found[1, -1], "flat pixels: most of a clean picture, none of a noisy one"
    assert found[0, 4] > found[2, 4], "the steepest hundredth is steeper where nothing is blurred"
