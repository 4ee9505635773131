"""The autoencoder in strips is the autoencoder, at any size and any height of the strips."""

import pytest
import torch

from flux import strips
from flux.autoencoder import AutoEncoder
from flux.config import AutoEncoderConfig

CONFIG = AutoEncoderConfig(ch=8, ch_mult=(1, 2, 2, 4), num_res_blocks=1, norm_groups=4)


@pytest.fixture(scope="module")
def autoencoder():
    torch.manual_seed(0)
    model = AutoEncoder(CONFIG).requires_grad_(False)
    for p in model.parameters():  # norms that scale and shift, so that a forgotten one shows
        p += 0.1 * torch.randn(p.shape)
    return model


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


@pytest.mark.parametrize("rows", [1, 3, 8, 17, 64, 1000])
@pytest.mark.parametrize("size", [(1, 6, 5), (3, 4, 9)])
def test_strips_give_the_whole(autoencoder, rows, size):
    batch, h, w = size
    latents, image = torch.randn(batch, 16, h, w), torch.rand(batch, 3, 8 * h, 8 * w) * 2 - 1
    before = latents.clone(), image.clone()
    assert error(strips.decode(autoencoder, latents, rows), autoencoder.decode(latents)) < 1e-5
    assert error(strips.encode(autoencoder, image, rows), autoencoder.encode(image)) < 1e-5
    assert torch.equal(latents, before[0]) and torch.equal(image, before[1])


def test_strips_in_bfloat16_are_as_near_to_float64_as_the_whole(autoencoder):
    latents = torch.randn(1, 16, 8, 8)
    exact = AutoEncoder(CONFIG).double()
    exact.load_state_dict(autoencoder.state_dict())
    truth = exact.decode(latents.double())
    rounded = AutoEncoder(CONFIG).bfloat16()
    rounded.load_state_dict(autoencoder.state_dict())
    whole, cut = (error(one(latents.bfloat16()), truth)
                  for one in (rounded.decode, lambda x: strips.decode(rounded, x, 8)))
    assert cut < 1.5 * whole
