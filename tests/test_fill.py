"""Fill's tokens: recorded ones, exact, and against a loop over pixels; outpainting; known pixels kept."""

import numpy as np
import pytest
import torch
from PIL import Image

from flux import fill, latents, pictures
from golden import load


def test_equals_the_reference():
    golden = load("fill_packing")
    given = golden.inputs
    mask = (given["mask_u8"].float() / 255)[None, None]
    image = pictures.to_tensor(Image.fromarray(given["image_u8"].numpy()))
    golden.close(fill.masked(image, mask), "masked_image")
    batch = golden.config["batch"]
    latent, mask = given["latent"].expand(batch, -1, -1, -1), mask.expand(batch, -1, -1, -1)
    assert torch.equal(fill.pack_mask(mask).bfloat16().float(), golden.outputs["mask_tokens"])
    assert torch.equal(fill.tokens(latent, mask).bfloat16().float(), golden.outputs["img_cond"])
    assert torch.equal(fill.tokens(latent.bfloat16(), mask).float(), golden.outputs["img_cond"])


@pytest.mark.parametrize(("h", "w", "batch"), [(1, 1, 1), (1, 3, 2), (2, 5, 3)])
def test_each_pixel_of_a_mask_has_its_channel(h, w, batch):
    """Token (r, s), channel ((i * 8 + j) * 2 + ph) * 2 + pw holds pixel (16r + 8ph + i, 16s + 8pw + j)."""
    mask = torch.rand(batch, 1, 16 * h, 16 * w, generator=torch.Generator().manual_seed(0))
    packed = fill.pack_mask(mask)
    assert packed.shape == (batch, h * w, 256)
    for row in range(16 * h):
        for column in range(16 * w):
            (r, ph, i), (s, pw, j) = ((x // 16, x % 16 // 8, x % 8) for x in (row, column))
            assert torch.equal(packed[:, r * w + s, ((i * 8 + j) * 2 + ph) * 2 + pw], mask[:, 0, row, column])


def test_tokens_are_latents_then_mask():
    latent, mask = torch.randn(2, 16, 4, 6), torch.rand(2, 1, 32, 48)
    tokens = fill.tokens(latent, mask)
    assert torch.equal(tokens[..., :64], latents.pack(latent)) and torch.equal(tokens[..., 64:], fill.pack_mask(mask))


def picture(width, height, seed=0, mode="RGB"):
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


@pytest.mark.parametrize("pads", [(0, 0, 0, 0), (3, 0, 0, 0), (0, 5, 7, 0), (16, 32, 48, 1)])
def test_outpainting_adds_an_area_to_repaint(pads):
    left, top, right, bottom = pads
    pil, mask = picture(20, 13), picture(20, 13, 1, "L")
    canvas, area = fill.outpaint(pil, mask, *pads)
    assert canvas.size == area.size == (20 + left + right, 13 + top + bottom)
    inside = slice(top, top + 13), slice(left, left + 20)
    assert np.array_equal(np.asarray(canvas)[inside], pil) and np.array_equal(np.asarray(area)[inside], mask)
    outside = np.ones(canvas.size[::-1], bool)
    outside[inside] = False
    assert (np.asarray(area)[outside] == 255).all()


def test_known_pixels_are_kept():
    drawn, known, mask = picture(31, 17), picture(31, 17, 1), np.asarray(picture(31, 17, 2, "L")).copy()
    mask[:5], mask[12:] = 0, 255
    out = np.asarray(fill.keep(drawn, known, Image.fromarray(mask))).astype(int)
    assert np.array_equal(out[:5], np.asarray(known)[:5]) and np.array_equal(out[12:], np.asarray(drawn)[12:])
    share = mask[..., None] / 255
    assert abs(out - (share * np.asarray(drawn) + (1 - share) * np.asarray(known))).max() <= 1
