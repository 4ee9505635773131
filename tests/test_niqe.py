"""NIQE: its fits recover what drew the numbers, its windows are torch's convolution, and good pictures score best."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter

from flux import niqe
from flux.errors import UserError


def texture(seed: int, edge: int = 192) -> Image.Image:
    """Noise with the spectrum of photographs, amplitude 1 / frequency."""
    rng = np.random.default_rng(seed)
    fy, fx = np.fft.fftfreq(edge)[:, None], np.fft.fftfreq(edge)[None]
    waves = np.fft.fft2(rng.standard_normal((edge, edge))) / np.maximum(np.hypot(fy, fx), 1 / edge)
    x = np.fft.ifft2(waves).real
    return Image.fromarray(np.uint8(np.clip(128 + 45 * x / x.std(), 0, 255))).convert("RGB")


@pytest.mark.parametrize(("shape", "draw"), ((1.0, "laplace"), (2.0, "normal")))
def test_shapes_of_known_distributions_are_found(shape, draw):
    x = getattr(np.random.default_rng(0), draw)(size=200_000)
    found, left, right = niqe.asymmetric(x)
    assert found == pytest.approx(shape, rel=0.03) and left == pytest.approx(right, rel=0.03)
    assert left == pytest.approx(1.0 if draw == "laplace" else 2 ** 0.5, rel=0.03)  # exp(-(|x| / scale)^shape)
    _, left, right = niqe.asymmetric(np.where(x < 0, 2 * x, x))
    assert left / right == pytest.approx(2, rel=0.05)

    rng, sides = np.random.default_rng(1), np.abs(x)  # and twice as wide on one side, which is drawn twice as often
    found, left, right = niqe.asymmetric(np.where(rng.random(len(x)) < 2 / 3, -2 * sides, sides))
    assert found == pytest.approx(shape, rel=0.03) and left / right == pytest.approx(2, rel=0.03)


def test_windows_are_a_convolution_with_edges_repeated():
    x = np.random.default_rng(0).random((20, 31))
    bell = torch.exp(-0.5 * (torch.arange(-3, 4, dtype=torch.float64) / (7 / 6)) ** 2)
    window = bell[:, None] * bell / bell.sum() ** 2
    padded = F.pad(torch.from_numpy(x)[None, None], (3, 3, 3, 3), mode="replicate")
    assert np.allclose(niqe.blurred(x), F.conv2d(padded, window[None, None])[0, 0].numpy())


def test_patches_are_cut_where_they_lie():
    x = np.arange(6 * 10.0).reshape(6, 10)
    cut = niqe.cut(x, 3, (10, 6), 3)
    assert cut.shape == (6, 3, 3) and np.array_equal(cut[4], x[3:6, 3:6])


def test_good_pictures_score_best():
    good = niqe.fitted(texture(i) for i in range(12))
    pil = texture(100)
    noise = np.random.default_rng(1).normal(0, 25, (192, 192, 3))
    noisy = Image.fromarray(np.uint8(np.clip(np.asarray(pil) + noise, 0, 255)))
    scores = {name: good.score(x) for name, x in (("good", pil), ("blurred", pil.filter(ImageFilter.GaussianBlur(2))),
                                                  ("noisy", noisy))}
    assert scores["good"] < 0.6 * min(scores["blurred"], scores["noisy"]), scores
    assert np.isfinite(good.score(Image.new("RGB", (128, 48)))), "a flat picture has a score"


def test_files_and_what_is_none(tmp_path):
    for i in range(6):
        texture(i).save(tmp_path / f"{i}.png")
    assert niqe.main([str(tmp_path), "--out", str(tmp_path / "niqe.npz")]) == 0
    texts = [niqe.load(tmp_path / "niqe.npz"), niqe.fitted(texture(i) for i in range(6))]
    assert texts[0].score(texture(9)) == pytest.approx(texts[1].score(texture(9)))
    (tmp_path / "broken.npz").write_bytes((tmp_path / "niqe.npz").read_bytes()[:500])
    np.savez(tmp_path / "small.npz", mu_pris_param=np.zeros(3), cov_pris_param=np.eye(3))
    for name in ("broken.npz", "missing.npz", "small.npz"):
        with pytest.raises(UserError, match=name):
            niqe.load(tmp_path / name)
    with pytest.raises(UserError, match="30x60"):
        texts[0].score(Image.new("RGB", (30, 60)))
    assert niqe.main([str(tmp_path / "nowhere")]) == 2
