"""Regions in one pass: who sees whom, against attention computed token by token, and the identities of the other way."""

import math

import pytest
import torch

from flux import conditioning, flow, regional_attention
from flux.attention import attention
from flux.config import TINY
from flux.model import Flux
from flux.regions import Region

SIZE = 48, 64
LENGTH = 3
LEFT, RIGHT = Region((0, 0, 0.34, 1), "left", 2.0), Region((0.67, 0, 1, 1), "right")


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_who_sees_whom():
    bias = regional_attention.bias_of([LEFT, RIGHT], SIZE, LENGTH)
    seen = bias.exp()
    text, image = 3 * LENGTH, 12
    assert bias.shape == (text + image,) * 2
    assert (seen[:LENGTH] == 1).all(), "the whole prompt sees everything"
    assert (seen[3:6, 3:6] == 1).all() and (seen[3:6, 6:9] == 0).all() and (seen[3:6, :3] == 0).all()
    assert (seen[text:, text:] == 1).all() and (seen[text:, :LENGTH] == 1).all()
    here = regional_attention.token_weights(LEFT, SIZE)
    assert torch.allclose(seen[text:, 4], 2 * here, atol=1e-6) and torch.allclose(seen[4, text:], here, atol=1e-6)
    rows = here.view(4, 3)
    assert rows[:, 0].min() > 0.7 and rows[:, 2].max() < 0.01


def test_a_weight_is_that_many_equal_keys():
    """log 2 on a logit is the same key twice."""
    q, k, v = (random(1, n, 2, 8, seed=i) for i, n in enumerate((5, 5, 5)))
    pe = torch.ones(1, 5, 1, 4, dtype=torch.complex64)
    bias = torch.zeros(1, 1, 5, 5)
    bias[..., 3] = math.log(2)
    twice = [torch.cat((x, x[:, 3:4]), dim=1) for x in (k, v)]
    scores = torch.einsum("blhe,bmhe->bhlm", q, twice[0]) / math.sqrt(8)
    expected = torch.einsum("bhlm,bmhe->blhe", scores.softmax(-1), twice[1]).flatten(2)
    assert torch.allclose(attention(q, k, v, pe, bias=bias), expected, atol=1e-6)


@pytest.fixture(scope="module")
def given():
    torch.manual_seed(0)
    model = Flux(TINY).eval().requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    cond = conditioning.condition(random(2, LENGTH, 28), random(2, 24, seed=1), *SIZE, 3.5)
    return model, cond, random(2, 12, 64, seed=2), torch.full((2,), 0.6)


def features(*seeds):
    return [[(random(1, LENGTH, 28, seed=seed), random(1, 24, seed=seed)) for seed in seeds]] * 2


def test_without_regions_nothing_changes(given):
    model, cond, img, t = given
    plain = conditioning.velocity(model, cond)(img, t)
    assert torch.equal(regional_attention.velocity(model, cond, [(), ()], [[], []], SIZE)(img, t), plain)
    never = [Region(LEFT.box, "left", 0.0)] * 1
    mixed = regional_attention.velocity(model, cond, [never, never], features(5), SIZE)(img, t)
    assert mixed.shape == plain.shape and torch.isfinite(mixed).all() and not torch.equal(mixed, plain), (
        "the whole prompt still sees the region's")
    assert torch.equal(conditioning.velocity(model, cond)(img, t), plain), "the bias is taken off again"


def test_prompts_of_regions_reach_their_places_first(given):
    """In the first block an image token outside a region does not know of its prompt."""
    model, cond, img, t = given
    seen = {}
    block = model.double_blocks[0]
    handle = block.register_forward_hook(lambda module, args, out: seen.__setitem__(len(seen), out[0]))
    try:
        for seed in (5, 6):
            regional_attention.velocity(model, cond, [[LEFT]] * 2, features(seed), SIZE)(img, t)
    finally:
        handle.remove()
    change = (seen[0] - seen[1]).abs().amax((0, 2)).view(4, 3)
    assert change[:, 0].min() > 1e-3 and change[:, 2].max() < 0.02 * change[:, 0].min()


def test_each_picture_has_its_own_regions(given):
    model, cond, img, t = given
    both = regional_attention.velocity(model, cond, [[LEFT], [RIGHT]], features(5), SIZE)(img, t)
    for row, region in enumerate((LEFT, RIGHT)):
        alone = regional_attention.velocity(model, cond[row:row + 1], [[region]], features(5)[:1], SIZE)
        assert torch.allclose(alone(img[row:row + 1], t[:1]), both[row:row + 1], atol=1e-5)


def test_it_samples(given):
    model, cond, img, _ = given
    v = regional_attention.velocity(model, cond, [[LEFT, RIGHT]] * 2, features(5, 6), SIZE)
    assert torch.isfinite(flow.euler(v, img, flow.schedule(3, 12))).all()
