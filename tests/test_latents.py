"""Packing, coordinates and noise: recorded tensors, all exact, and what a wrong size is told."""

import pytest
import torch
from einops import EinopsError

from flux import latents
from flux.errors import UserError
from golden import load


def test_equals_the_reference():
    golden = load("packing")
    given, expected, config = golden.inputs, golden.outputs, golden.config
    batch, h, w = config["latent"]
    assert torch.equal(latents.pack(given["latent"]), expected["img"])
    assert torch.equal(latents.pack(given["latent"][:1]).expand(batch, -1, -1), expected["rep_img"])
    for name in ("img_ids", "rep_img_ids"):
        assert torch.equal(latents.image_ids(h, w).expand(batch, -1, -1), expected[name]), name
    assert torch.equal(latents.text_ids(config["txt_len"]).expand(batch, -1, -1), expected["txt_ids"])
    for i, (height, width) in enumerate(config["unpack"]):
        assert torch.equal(latents.unpack(given[f"tokens{i}"], height, width), expected[f"unpacked{i}"])


def test_noise_equals_the_reference():
    golden = load("packing")
    for i, (count, height, width, seed) in enumerate(golden.config["noise"]):
        noise = latents.noise(count, height, width, torch.Generator().manual_seed(seed))
        assert noise.dtype == torch.float32
        assert (noise - golden.outputs[f"noise{i}"]).abs().max() <= 1e-6
        assert torch.equal(noise.bfloat16().float(), golden.outputs[f"noise{i}_bf16"])


def test_the_order_of_a_token():
    """Channel slowest, then row, then column of the 2x2 patch; tokens row by row."""
    img = latents.pack(torch.arange(16 * 4 * 6).float().view(1, 16, 4, 6))
    for row, column, c, ph, pw in ((0, 0, 0, 0, 0), (0, 1, 0, 1, 0), (1, 2, 3, 0, 1), (1, 0, 15, 1, 1)):
        assert img[0, row * 3 + column, c * 4 + ph * 2 + pw] == c * 24 + (2 * row + ph) * 6 + 2 * column + pw


@pytest.mark.parametrize(("h", "w"), [(2, 2), (2, 14), (10, 6), (6, 2)])
def test_unpack_undoes_pack(h, w):
    x = torch.randn(3, 16, h, w)
    assert latents.pack(x).shape == (3, h * w // 4, 64)
    assert torch.equal(latents.unpack(latents.pack(x), 8 * h, 8 * w), x)
    img = torch.randn(2, h * w // 4, 64)
    assert torch.equal(latents.pack(latents.unpack(img, 8 * h, 8 * w)), img)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (16, 17), (33, 50), (63, 100)])
def test_odd_pictures_round_up(height, width):
    """Noise and unpack agree on the tokens of any size in pixels: 16 to a token, the last one perhaps only begun."""
    noise = latents.noise(1, height, width, torch.Generator().manual_seed(0))
    assert noise.shape == (1, 16, 2 * -(-height // 16), 2 * -(-width // 16))
    assert torch.equal(latents.unpack(latents.pack(noise), height, width), noise)
    with pytest.raises(EinopsError):
        latents.unpack(latents.pack(noise)[:, 1:], height, width)


def test_noise_belongs_to_its_generator():
    one, two = (latents.noise(2, 32, 32, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.equal(one, latents.noise(2, 32, 32, torch.Generator().manual_seed(4)))
    before = torch.get_rng_state()
    latents.noise(1, 32, 32, torch.Generator().manual_seed(3))
    assert torch.equal(torch.get_rng_state(), before)


def test_ids():
    """Frame, row, column; frame 1 is Kontext's reference picture; text has none of them."""
    ids = latents.image_ids(4, 6, frame=1)
    assert ids.dtype == torch.float32
    assert ids.tolist() == [[[1, row, column] for row in range(2) for column in range(3)]]
    assert latents.text_ids(3).tolist() == [[[0, 0, 0]] * 3]
    assert latents.image_ids(2, 2 * 4097)[0, -1].tolist() == [0, 0, 4096], "exact where bfloat16 is not"
    kontext = load("denoise_kontext")
    h, w = kontext.config["cond_hw"]
    assert torch.equal(latents.image_ids(2 * h, 2 * w, frame=1), kontext.inputs["img_cond_seq_ids"])


@pytest.mark.parametrize("size", [(16, 16), (1024, 1024), (1568, 672)])
def test_sizes_that_fit(size):
    latents.check_size(*size)


@pytest.mark.parametrize(("width", "height", "words"), [
    (1000, 512, "width 1000.*take 992"), (512, 1025, "height 1025.*take 1024"), (8, 16, "width 8.*take 16"),
    (0, 16, "width 0.*take 16"), (16, -32, "height -32.*take 16"), (7, 7, "width 7"), (39, 16, "take 32"),
])
def test_sizes_that_do_not_fit(width, height, words):
    with pytest.raises(UserError, match=words) as caught:
        latents.check_size(width, height)
    assert "\n" not in str(caught.value) and "multiple of 16" in str(caught.value)
    latents.check_size(int(str(caught.value).split()[-1]), 16)
