"""Conditions of the one velocity, against the model called by hand, and as identities. Recorded: test_flow.py."""

from dataclasses import replace

import pytest
import torch

from flux import conditioning, flow, latents
from flux.config import TINY
from flux.model import Flux

H, W, TEXT = 4, 6, 5  # latent cells, tokens
DTYPES = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(channels=64, dtype=torch.float32):
    torch.manual_seed(0)
    return Flux(replace(TINY, in_channels=channels)).to(dtype).eval().requires_grad_(False)


def given(batch=3, dtype=torch.float32, seed=0):
    txt, vec = random(batch, TEXT, TINY.context_in_dim, seed=seed), random(batch, TINY.vec_in_dim, seed=seed + 1)
    cond = conditioning.condition(txt.to(dtype), vec.to(dtype), 8 * W, 8 * H, 3.5)
    img = random(batch, H * W // 4, 64, seed=seed + 2)
    return img.to(dtype), torch.full((batch,), 0.7, dtype=dtype), cond


def by_hand(model, img, t, cond, ids):
    guidance = torch.full((len(img),), 3.5, dtype=img.dtype)
    return model(img, ids, cond.txt, cond.txt_ids, cond.vec, t, guidance)


@DTYPES
def test_channels_are_joined_to_each_token(dtype):
    model = build(384, dtype)
    img, t, cond = given(dtype=dtype)
    channels = random(1, H * W // 4, 320, seed=9).to(dtype)
    expected = by_hand(model, torch.cat((img, channels.repeat(3, 1, 1)), dim=2), t, cond, cond.img_ids)
    v = conditioning.velocity(model, conditioning.with_channels(cond, channels))(img, t)
    assert v.shape == img.shape and torch.equal(v, expected)


@DTYPES
@pytest.mark.parametrize("sizes", [((2, 4),), ((2, 4), (6, 2)), ((4, 6), (2, 2), (2, 2))])
def test_references_follow_with_frames_of_their_own(dtype, sizes):
    model = build(dtype=dtype)
    img, t, cond = given(dtype=dtype)
    pictures = [random(1, 16, h, w, seed=h + w).to(dtype) for h, w in sizes]
    rows = [[k, r, s] for k, (h, w) in enumerate(((H, W), *sizes)) for r in range(h // 2) for s in range(w // 2)]
    joined = torch.cat((img, *(latents.pack(x).repeat(3, 1, 1) for x in pictures)), dim=1)
    expected = by_hand(model, joined, t, cond, torch.tensor([rows]).float())[:, :H * W // 4]
    v = conditioning.velocity(model, conditioning.with_references(cond, pictures))(img, t)
    assert v.shape == img.shape and torch.equal(v, expected)


@DTYPES
def test_image_tokens_follow_the_text(dtype):
    model = build(dtype=dtype)
    img, t, cond = given(dtype=dtype)
    tokens = random(1, 7, TINY.context_in_dim, seed=5).to(dtype)
    longer = replace(cond, txt=torch.cat((cond.txt, tokens.repeat(3, 1, 1)), dim=1), txt_ids=torch.zeros(1, TEXT + 7, 3))
    v = conditioning.velocity(model, conditioning.with_image_tokens(cond, tokens))(img, t)
    assert torch.equal(v, by_hand(model, img, t, longer, cond.img_ids))
    none = conditioning.with_image_tokens(cond, tokens[:, :0])
    assert torch.equal(conditioning.velocity(model, none)(img, t), conditioning.velocity(model, cond)(img, t))
    parts = conditioning.with_image_tokens(conditioning.with_image_tokens(cond, tokens[:, :3]), tokens[:, 3:])
    assert torch.equal(conditioning.velocity(model, parts)(img, t), v)


def test_a_picture_of_a_batch_has_its_own_condition():
    model = build(128)
    img, t, cond = given()
    cond = conditioning.with_channels(cond, random(3, H * W // 4, 64, seed=7))
    cond = conditioning.with_image_tokens(cond, random(3, 2, TINY.context_in_dim, seed=8))
    together = conditioning.velocity(model, cond)(img, t)
    for i in range(3):
        alone = conditioning.velocity(model, cond[i:i + 1])(img[i:i + 1], t[:1])
        assert (alone - together[i]).abs().max() <= 1e-5 * together.abs().max()
    model, cond = build(), conditioning.with_references(given()[2], [random(3, 16, 2, 4)])
    together = conditioning.velocity(model, cond)(img, t)
    alone = conditioning.velocity(model, cond[1:2])(img[1:2], t[:1])
    assert (alone - together[1]).abs().max() <= 1e-5 * together.abs().max()


# True classifier-free guidance.

def pair(scale, span=(1.0, 0.0), seen=None):
    """The guided velocity, and those under the prompts and the negative ones alone."""
    model = build()
    img, t, cond = given()
    _, _, other = given(seed=20)
    doubled = conditioning.condition(torch.cat((cond.txt, other.txt)), torch.cat((cond.vec, other.vec)), 8 * W, 8 * H, 3.5)
    wanted, unwanted, both = (conditioning.velocity(model, c) for c in (cond, other, doubled))

    def counted(img, t):
        if seen is not None:
            seen.append((len(img), t[0].item()))
        return both(img, t)

    return conditioning.guided(counted, wanted, scale, span), wanted, unwanted, img, t


@pytest.mark.parametrize("scale", (0.0, 0.5, 1.0, 4.5))
def test_guidance_goes_away_from_the_negative_prompt(scale):
    seen = []
    v, wanted, unwanted, img, t = pair(scale, seen=seen)
    expected = unwanted(img, t) + scale * (wanted(img, t) - unwanted(img, t))
    assert (v(img, t) - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert seen == [(6, pytest.approx(0.7))], "one doubled batch"


def test_guidance_has_a_window_of_steps():
    times, seen = flow.schedule(5, 6), []
    v, wanted, _, img, _ = pair(3.0, flow.span(times, 0.2, 0.6), seen)
    flow.euler(v, img, times)
    assert [t for _, t in seen] == pytest.approx(times[1:3])
    never = pair(3.0, flow.span(times, 0.5, 0.5))[0]
    assert torch.equal(flow.euler(never, img, times), flow.euler(wanted, img, times))
