"""Regions with prompts of their own: masks, the blend against recorded values, and the flag from the command to the file."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from flux import conditioning, flow, latents, regions
from flux.config import TINY, FluxConfig
from flux.demo import scene
from flux.errors import UserError
from flux.model import Flux
from flux.regions import Region
from golden import load
from vlm_client import boxes

H, W = 8, 6  # latent cells


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Masks.

@pytest.mark.parametrize("edge", (16, 64, 128))
@pytest.mark.parametrize("box", [(0, 0, 1, 1), (0, 0, 0.5, 1), (0.25, 0.25, 0.75, 0.75), (0.5, 0, 1, 0.5),
                                 (0.2, 0.3, 0.8, 0.8)])
def test_the_inside_stays_and_the_integral_too(box, edge):
    hard = regions.rectangle(box, edge, edge)
    soft = regions.soften(hard)
    assert soft.min() >= 0 and soft.max() <= 1 and soft.sum() == pytest.approx(hard.sum().item(), rel=0.02)
    rows, columns = (hard.any(axis).nonzero()[:, 0] for axis in (1, 0))
    assert soft[rows[len(rows) // 2], columns[len(columns) // 2]] == pytest.approx(1, abs=1e-3)
    if box != (0, 0, 1, 1):
        assert soft[hard == 1].min() < 0.9 and soft[hard == 0].max() > 0.1, "the edge is soft"


def test_the_papers_blur_is_wide():
    hard = regions.rectangle((0.25, 0.25, 0.75, 0.75), 128, 128)
    soft = regions.soften(hard, sigma=10, kernel=33)
    assert soft.sum() == pytest.approx(hard.sum().item(), rel=1e-4) and soft[64, 64] == pytest.approx(1)
    assert 0.4 < soft[64, 32] < 0.6 and soft[64, 14] == 0 and soft[64, 17] > 0, "a kernel of 33 reaches 16 cells"


@pytest.mark.parametrize(("box", "cells"), [
    ((0, 0, 1, 1), (0, 10, 0, 20)), ((0.05, 0.05, 0.06, 0.06), (0, 2, 1, 3)), ((0.99, 0.99, 1, 1), (8, 10, 18, 20)),
    ((0.5, 0.5, 0.55, 0.6), (5, 7, 10, 12)), ((0.1, 0.3, 0.55, 0.7), (3, 7, 2, 11)),
    ((0.52, 0.0, 0.56, 1), (0, 10, 10, 12))])
def test_a_rectangle_has_every_cell_it_touches_and_two_at_least(box, cells):
    mask = regions.rectangle(box, 10, 20)
    top, bottom, left, right = cells
    assert mask.sum() == (bottom - top) * (right - left) and mask[top:bottom, left:right].all()


def test_the_three_conventions_make_the_same_mask():
    size, box = (1008, 756), (0.25, 0.125, 0.5, 0.875)
    masks = [regions.rectangle(boxes.to_fractions(written, convention, size), 32, 32) for convention, written in (
        ("norm1000", (250, 125, 500, 875)), ("pixel_resized", (252, 94.5, 504, 661.5)), ("frac", box))]
    assert masks[0].sum() == 8 * 24 and all(torch.equal(mask, masks[0]) for mask in masks)


def test_weights_lie_as_the_packed_latents_do():
    found = regions.weights([Region((0, 0, 0.5, 1), "a", 3.0), Region((0.2, 0.2, 0.9, 0.5), "b")], 8 * W, 8 * H)
    assert found.shape == (2, H * W // 4, 64)
    maps, expected = latents.unpack(found, 8 * H, 8 * W), 3 * regions.soften(regions.rectangle((0, 0, 0.5, 1), H, W))
    assert (maps == maps[:, :1]).all() and torch.equal(maps[0, 0], expected)


# The blend.

@pytest.mark.parametrize("name", ("binary", "soft", "empty", "none"))
def test_the_blend_is_the_recorded_one(name):
    golden = load("region_guidance")
    local = golden.inputs["local"]
    masks = golden.inputs.get(f"{name}_masks", torch.zeros(0, local.shape[2]))
    golden.close(regions.blend(golden.inputs["v"], local[:len(masks)], masks[..., None]), name)


@torch.inference_mode()
def test_a_trajectory_is_the_recorded_one():
    golden = load("region_guidance")
    given, config = golden.inputs, golden.config
    model = Flux(FluxConfig(**{key: tuple(x) if isinstance(x, list) else x for key, x in config["params"].items()}))
    model.load_state_dict(golden.weights)
    ids = given["img_ids"], torch.zeros(1, config["txt_len"], 3)

    def under(txt, vec):
        return conditioning.velocity(model, conditioning.Condition(txt, vec, ids[1], ids[0][:1], config["guidance"]))

    plain = under(given["txt"], given["vec"])
    parts = [plain, *(under(txt, vec) for txt, vec in zip(given["txt_i"], given["vec_i"], strict=True))]
    batched = under(torch.cat((given["txt"], *given["txt_i"])), torch.cat((given["vec"], *given["vec_i"])))
    for together in (batched, regions.one_by_one(parts)):
        v, img, times = regions.regional(together, plain, given["loop_masks"][..., None]), given["img"], config["schedule"]
        golden.close(flow.euler(v, img, times), "final")
        states = [img, *flow.euler_steps(v, img, times)]
        for i, (state, t) in enumerate(zip(states[:-1], times[:-1], strict=True)):
            golden.close(v(state, torch.full((len(img),), t)), f"loop_v{i}")


def under(prompts, seen=None):
    """A velocity that depends on the prompt, the place and the time alone; `seen` counts its passes."""
    rows = torch.stack([random(H * W // 4, 64, seed=sum(prompt.encode())) for prompt in prompts])

    def v(img, t):
        if seen is not None:
            seen.append(len(img))
        return rows * t[:, None, None] + 0.1 * img
    return v


LEFT, RIGHT = Region((0, 0, 0.5, 1), "left"), Region((0.5, 0, 1, 1), "right")
SIZE = 8 * W, 8 * H
IMG, T = random(2, H * W // 4, 64, seed=3), torch.full((2,), 0.7)


def test_without_regions_nothing_changes():
    expected = under(["a", "b"])(IMG, T)
    assert torch.equal(regions.velocity(under, ["a", "b"], (), SIZE)(IMG, T), expected)
    model = Flux(replace(TINY)).eval()
    cond = conditioning.condition(random(2, 5, TINY.context_in_dim), random(2, TINY.vec_in_dim), *SIZE, 3.5)
    plain = conditioning.velocity(model, cond)
    with torch.inference_mode():
        assert torch.equal(regions.velocity(lambda prompts: plain, ["a", "b"], (), SIZE)(IMG, T), plain(IMG, T))


def test_a_strong_region_over_all_is_its_prompt():
    wanted = under(["left"] * 2)(IMG, T)
    for strength, close in ((10, 0.2), (1000, 2e-3)):
        got = regions.velocity(under, ["a", "b"], [Region((0, 0, 1, 1), "left", strength)], SIZE)(IMG, T)
        assert (got - wanted).abs().max() <= close * (under(["a", "b"])(IMG, T) - wanted).abs().max()


def test_two_equal_regions_are_one_of_twice_the_strength():
    twice = regions.velocity(under, ["a", "b"], [LEFT, LEFT], SIZE)(IMG, T)
    once = regions.velocity(under, ["a", "b"], [replace(LEFT, strength=2.0)], SIZE)(IMG, T)
    assert torch.allclose(twice, once, atol=1e-6)


def test_a_region_changes_nothing_far_from_it():
    plain = under(["a", "b"])(IMG, T)
    mixed = regions.velocity(under, ["a", "b"], [Region((0, 0, 0.3, 0.3), "left")], SIZE)(IMG, T)
    change = latents.unpack(mixed - plain, 8 * H, 8 * W).abs().amax((0, 1))
    assert change[:2, :2].min() > 0.01 and change[5:].max() == 0 and change[:, 5:].max() == 0


@pytest.mark.parametrize(("batch", "passes"), [(6, [6]), (4, [2, 2, 2])])
def test_passes_go_together_where_they_fit(batch, passes):
    seen = []
    v = regions.velocity(lambda prompts: under(prompts, seen), ["a", "b"], [LEFT, RIGHT], SIZE, batch=batch)
    assert torch.allclose(v(IMG, T), regions.velocity(under, ["a", "b"], [LEFT, RIGHT], SIZE)(IMG, T), atol=1e-6)
    assert seen == passes


def test_regions_have_a_window_of_steps():
    times, seen = flow.schedule(5, 6), []
    v = regions.velocity(lambda prompts: under(prompts, seen), ["a", "b"], [LEFT], SIZE, conditioning.span(times, 0.2, 0.6))
    flow.euler(v, IMG, times)
    assert seen == [2, 4, 4, 2, 2]


# The flag.

def test_the_words_of_a_region():
    assert regions.read(["0,0,.5,1: a red circle", " 0.5, 0, 1, 1 @ 2.5 :at 10:30 @ home "]) == (
        Region((0, 0, 0.5, 1), "a red circle"), Region((0.5, 0, 1, 1), "at 10:30 @ home", 2.5))


@pytest.mark.parametrize("word", ["", "a red circle", "0,0,1: a", "0,0,1,1", "0,0,1,1:", "0,0,1,x: a", "0.5,0,0.5,1: a",
                                  "0,0,1,1.1: a", "-0.1,0,1,1: a", "nan,0,1,1: a", "0,0,1,1 @: a", "0,0,1,1 @ -1: a",
                                  "0,0,1,1 @ nan: a", "0,0,1,1 @ 1e9: a"])
def test_mistakes_are_told(word):
    with pytest.raises(UserError, match="--region .*expected") as error:
        regions.read([word])
    assert "\n" not in str(error.value)


def draw(out, *words):
    sample.main([*map(str, words), "--out", str(out), "--device", "cpu"])
    return np.stack([np.asarray(Image.open(path)).astype(int) for path in sorted(out.glob("*[0-9].png"))])


def test_regions_from_the_command_to_the_file(tmp_path):
    """By the demo model, two steps: enough to tell that the parts meet."""
    words = ("a red circle on a white background", "--steps", 2, "--num", 2, "--seed", 3)
    plain = draw(tmp_path / "a", *words)
    some = (*words, "--region", "0,0,0.4,1 @ 20: a blue star on a black background")
    left = draw(tmp_path / "b", *some)
    change = abs(left - plain).mean((0, 1, 3))
    assert change[:40].min() > 4 * change[96:].max()
    looped = draw(tmp_path / "c", *some, "--batch", 1)
    assert abs(left - looped).max() <= 1
    never = draw(tmp_path / "d", *some, "--region-start", 0.1, "--region-end", 0.2)
    assert np.array_equal(never, plain)
    guided = draw(tmp_path / "e", *some, "--cfg-scale", 2, "--negative", "a green background")
    assert not np.array_equal(guided, left)
    first = min((tmp_path / "b").glob("*.png"))
    again = draw(tmp_path / "g", "--from", first)
    assert abs(again[0] - left[0]).max() <= 1


def test_a_region_gets_what_its_prompt_says_and_the_rest_stays(tmp_path):
    words = ("a red circle left of a blue star on a yellow background", "--seed", 5)
    plain, = draw(tmp_path / "a", *words)
    cross, = draw(tmp_path / "b", *words, "--region", "0,0,0.5,1 @ 20: a green cross on the left on a yellow background")

    def share(pixels, colour):
        return (abs(pixels - np.array(scene.COLOURS[colour])).max(-1) < 40).mean()

    left, right = (slice(None), slice(0, 60)), (slice(None), slice(68, 128))
    assert share(plain[left], "red") > 0.05 and share(plain[left], "green") == 0
    assert share(cross[left], "green") > 0.03 and share(cross[left], "red") == 0
    assert abs(cross[right] - plain[right]).mean() < 2 < 5 < abs(cross[left] - plain[left]).mean()
