"""Measures of likeness against their formulas in float64, written out window by window and pixel by pixel."""

import math

import numpy as np
import pytest
import torch

from flux import checkpoint, quality
from flux.errors import UserError


def pictures(*shape, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=rng), torch.rand(*shape, generator=rng)


def test_psnr_and_its_masks():
    a, b = pictures(3, 3, 9, 14)
    mask = (torch.rand(3, 1, 9, 14) > 0.6).float()
    mask[2] = 0
    for i in range(3):
        error = np.square((a[i] - b[i]).double().numpy())
        assert quality.psnr(a, b)[i].item() == pytest.approx(-10 * math.log10(error.mean()), abs=1e-9)
        some = error[:, mask[i, 0].numpy() > 0]
        if some.size:
            assert quality.psnr(a, b, mask)[i].item() == pytest.approx(-10 * math.log10(some.mean()), abs=1e-9)
    assert quality.psnr(a, b, mask)[2].isnan() and quality.psnr(a, a).isinf().all()


@pytest.mark.parametrize("size", [(11, 11), (12, 17)])
def test_ssim_window_by_window(size):
    """Wang et al. 2004, equation 13: means, variances and covariance under an 11 x 11 Gaussian of sigma 1.5."""
    a, b = pictures(2, 3, *size)
    b = 0.7 * a + 0.3 * b
    window = np.array([[math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / (2 * 1.5**2)) for j in range(11)] for i in range(11)])
    window /= window.sum()
    for n in range(2):
        values = []
        for c in range(3):
            for y in range(size[0] - 10):
                for x in range(size[1] - 10):
                    p, q = (part[n, c, y:y + 11, x:x + 11].double().numpy() for part in (a, b))
                    mp, mq = (window * p).sum(), (window * q).sum()
                    vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
                    cov = (window * (p - mp) * (q - mq)).sum()
                    values.append((2 * mp * mq + 1e-4) * (2 * cov + 9e-4) / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))
        assert quality.ssim(a, b)[n].item() == pytest.approx(np.mean(values), abs=1e-10)
    assert torch.allclose(quality.ssim(a, a), torch.ones(2, dtype=torch.float64))


def test_of_pixels_and_of_greys():
    rng = np.random.default_rng(0)
    a = rng.integers(0, 250, (14, 20, 3), dtype=np.uint8)
    assert quality.of_pixels(quality.psnr, a, a + np.uint8(5)) == pytest.approx(20 * math.log10(255 / 5))
    assert quality.of_pixels(quality.psnr, a, a) == math.inf
    grey = a[..., 0].astype(np.int16)
    assert quality.of_pixels(quality.ssim, grey, grey) == pytest.approx(1)
    one = torch.from_numpy(grey.repeat(3).reshape(14, 20, 3) / 255.0).permute(2, 0, 1)[None]
    other = quality.of_pixels(quality.ssim, grey, 250 - grey)
    assert other == pytest.approx(quality.ssim(one, 250 / 255 - one).item(), abs=1e-9) and other < 0


def files(folder):
    torch.manual_seed(0)
    alex, linear = {}, {}
    for i, (number, (rows, columns, edge)) in enumerate(zip(quality.Lpips.NUMBERS, quality.Lpips.SHAPES, strict=True)):
        alex |= {f"features.{number}.weight": torch.randn(rows, columns, edge, edge) * (columns * edge * edge) ** -0.5,
                 f"features.{number}.bias": 0.1 * torch.randn(rows)}
        linear[f"lin{i}.model.1.weight"] = torch.rand(1, rows, 1, 1)
    checkpoint.save(folder / "alexnet.safetensors", alex | {"classifier.6.bias": torch.zeros(1000)})
    checkpoint.save(folder / "alex.safetensors", linear)
    return (folder / "alexnet.safetensors", folder / "alex.safetensors"), alex, linear


def test_lpips_is_its_formula(tmp_path):
    """arXiv 1801.03924, equation 1, with AlexNet as torchvision lists its layers."""
    paths, alex, linear = files(tmp_path)
    network = quality.load_lpips(paths)
    a, b = pictures(2, 3, 64, 71)
    found = network(a, b)

    def features(x):
        shift, scale = torch.tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]]).view(2, 3, 1, 1)
        x = (2 * x - 1 - shift) / scale
        layers = [(0, 4, 2, False), (3, 1, 2, True), (6, 1, 1, True), (8, 1, 1, False), (10, 1, 1, False)]
        for number, stride, pad, pooled in layers:
            if pooled:
                x = torch.nn.functional.max_pool2d(x, 3, 2)
            weight, bias = (alex[f"features.{number}.{part}"] for part in ("weight", "bias"))
            x = torch.nn.functional.conv2d(x, weight, bias, stride, pad)
            x = x.clamp(min=0)
            yield x

    total = 0
    for i, (f, g) in enumerate(zip(features(a), features(b), strict=True)):
        f, g = (x / (x.norm(dim=1, keepdim=True) + 1e-10) for x in (f, g))
        total = total + (linear[f"lin{i}.model.1.weight"] * (f - g) ** 2).sum(1).mean((1, 2))
    assert torch.allclose(found, total, rtol=1e-4) and (found > 0).all() and not network(a, a).any()


def test_lpips_without_its_weights(tmp_path):
    paths, _, _ = files(tmp_path)
    assert quality.load_lpips(()) is None
    with pytest.raises(UserError, match=r"lin0.model.1.weight is missing or of another shape \(5 are\)"):
        quality.load_lpips(paths[:1])
