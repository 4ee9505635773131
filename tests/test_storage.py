"""Weights in 8 bits: how far they are off, that LoRAs go beside them, and that nothing else of the model changes."""

import pytest
import torch
from torch import nn

from flux import storage
from flux.config import TINY
from flux.model import Flux
from lora.adapter import Adapter, Dora, LowRank
from lora.inject import Loras

KINDS = pytest.mark.parametrize(("dtype", "step"), [(torch.float8_e4m3fn, 2**-4), (torch.int8, 0.5 / 127)])


@KINDS
def test_a_number_is_off_by_half_a_step_at_most(dtype, step):
    """e4m3 has three bits after the leading one, so half a step is 1/16 of the number; int8's is the same everywhere."""
    torch.manual_seed(0)
    weight = torch.randn(20, 50) * torch.logspace(-3, 3, 20)[:, None]
    weight[3] = 0
    numbers, scale = storage.stored(weight, dtype)
    off = (numbers.float() * scale - weight).abs()
    largest = weight.abs().amax(1, keepdim=True)
    size = weight.abs().clamp(min=2**-6 / 448 * largest) if dtype != torch.int8 else largest  # e4m3's least normal number
    assert (off <= step * size * (1 + 1e-5)).all() and not off[3].any()
    assert numbers.dtype == dtype and scale.shape == (20, 1)


@KINDS
def test_a_model_keeps_its_names_and_nearly_its_velocity(dtype, step):
    torch.manual_seed(0)
    plain, kept = Flux(TINY).eval(), Flux(TINY).eval()
    kept.load_state_dict(plain.state_dict())
    storage.store(kept, dtype, least=2**10)
    layers = [layer for layer in kept.modules() if isinstance(layer, storage.StoredLinear)]
    assert len(layers) > 20 and set(plain.state_dict()) <= set(kept.state_dict())
    ids, inputs = torch.zeros(1, 12, 3), (torch.randn(2, 12, 64), torch.randn(2, 5, 28), torch.randn(2, 24), torch.rand(2))
    img, txt, vec, t = inputs
    with torch.no_grad():
        a, b = (model(img, ids, txt, torch.zeros(1, 5, 3), vec, t, torch.ones(2)) for model in (plain, kept))
    assert 0 < (a - b).norm() / a.norm() < 0.05


@KINDS
def test_loras_lie_beside_stored_weights(dtype, step):
    """DoRA needs the weights that are computed with, so those that come back from 8 bits."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 160))
    storage.store(model, dtype)
    layer = model[0]
    low = LowRank(torch.randn(4, 128), torch.randn(160, 4), 0.1)
    x, weight = torch.randn(3, 128), layer.dequantised()
    for term in (low, Dora(low, torch.rand(160)), Dora(low, torch.rand(128), "in")):
        change = term.dense(torch.float32, weight) if isinstance(term, Dora) else term.dense()
        loras = Loras(model)
        loras.attach("a", Adapter({"0": (term,)}), 0.7)
        expected = x @ (weight + 0.7 * change).T + layer.bias
        assert ((model(x) - expected).abs().max() / expected.abs().max()) < 1e-5
        loras.detach("a")
        assert model[0] is layer
