"""The demo world's renderer and captions: deterministic, consistent with their ground truth, and split cleanly."""

from dataclasses import replace

import numpy as np
import pytest

from flux.demo.scene import (
    COLOURS,
    LIGHTS,
    NEW_SHAPES,
    PLACES,
    SHAPES,
    SIZES,
    STYLES,
    boxes,
    distance,
    render,
    sample_caption,
    sample_scene,
    write_caption,
)


def scenes(count: int, **how):
    return [sample_scene(np.random.default_rng(i), **how) for i in range(count)]


def test_the_same_seed_gives_the_same_picture_and_caption():
    for i in range(20):
        (a, b), rng = [sample_scene(np.random.default_rng(i)) for _ in range(2)], np.random.default_rng
        assert a == b and np.array_equal(render(a)[0], render(b)[0])
        assert sample_caption(a, rng(i)) == sample_caption(b, rng(i))
    assert len({render(scene)[0].tobytes() for scene in scenes(50)}) == 50


def test_a_tenth_of_the_combinations_is_held_out():
    train, held = scenes(300), scenes(300, held_out=True)
    def combination(scene):
        return scene.background, *sorted((thing.shape, thing.colour) for thing in scene.things)
    assert not {combination(scene) for scene in train} & {combination(scene) for scene in held}
    scene = scenes(1, things=1)[0]
    single = [replace(scene, background=ground, things=(replace(scene.things[0], shape=shape, colour=colour),))
              for shape in SHAPES for colour in COLOURS for ground in COLOURS if colour != ground]
    share = np.mean([one.held_out for one in single])
    assert 0.07 < share < 0.13
    two = next(one for one in scenes(20, things=2) if one.things[0] != one.things[1])
    assert replace(two, things=two.things[::-1]).held_out == two.held_out  # the order of objects does not matter


def test_the_base_world_has_no_new_shapes_and_no_styles():
    words = " ".join(sample_caption(scene, np.random.default_rng(i)).text for i, scene in enumerate(scenes(400)))
    assert not any(word in words for word in (*NEW_SHAPES, *STYLES))
    assert all(word in words for word in (*SHAPES, *COLOURS, *SIZES, *PLACES, "left of", "above", *LIGHTS[1:], "glossy"))


def test_a_caption_says_what_is_asked_and_no_more():
    for i, scene in enumerate(scenes(300)):
        caption = sample_caption(scene, np.random.default_rng(i))
        said = set(caption.text.replace(",", "").split())
        for thing in caption.asked.things:
            assert {word for word in (thing.shape, thing.colour, thing.size) if word} <= said
        assert (caption.asked.background in said) == bool(caption.asked.background) or not caption.asked.background
        unsaid = {scene.background, *(thing.colour for thing in scene.things)} - {
            caption.asked.background, *(thing.colour for thing in caption.asked.things)}
        assert not unsaid & said
        assert len(caption.text.split()) <= 23  # what the demo's T5 reads, with its end mark


@pytest.mark.parametrize("form", ["plain", "background first", "telegram"])
def test_captions_read_as_english(form):
    scene = replace(scenes(1, things=1)[0], background="orange", light="dim", finish="flat")
    scene = replace(scene, things=(replace(scene.things[0], shape="ring", colour="orange", size="", place="left"),))
    expected = {"plain": "an orange ring on the left on an orange background in dim light",
                "background first": "on an orange background, an orange ring on the left in dim light",
                "telegram": "orange ring left, orange background, in dim light"}
    assert write_caption(scene, form) == expected[form]


def test_masks_boxes_and_pixels_agree():
    for scene in scenes(60):
        pixels, masks = render(scene)
        assert pixels.shape == (128, 128, 3) and pixels.dtype == np.uint8 and masks.shape == (len(scene.things), 128, 128)
        for thing, mask, (x0, y0, x1, y1) in zip(scene.things, masks, boxes(masks), strict=True):
            assert x0 < thing.x + 0.5 * thing.radius and x1 > thing.x - thing.radius and y0 < thing.y < y1
            assert mask[int(y0 * 128):int(np.ceil(y1 * 128)), int(x0 * 128):int(np.ceil(x1 * 128))].sum() > 0.93 * mask.sum()
        if scene.light == "normal" and scene.finish == "flat":
            inside = masks[-1] == 1  # the second object lies on top
            assert np.ptp(pixels[inside], axis=0).max() == 0
            assert tuple(pixels[inside][0]) == COLOURS[scene.things[-1].colour]
            assert tuple(pixels[0, 0]) == COLOURS[scene.background]
    assert boxes(np.zeros((1, 8, 8))) == [(0.0, 0.0, 0.0, 0.0)]


def test_shapes_differ_and_fill_about_their_radius():
    y, x = (np.mgrid[:128, :128] + 0.5) / 64 - 1
    cover = {shape: distance(shape, 1.2 * x, 1.2 * y) < 0 for shape in SHAPES + NEW_SHAPES}
    for shape, inside in cover.items():
        area, reach = inside.sum() / 64**2 * 1.44, np.hypot(1.2 * x, 1.2 * y)[inside].max()
        assert 0.6 < area < 3.2 and 0.8 < reach < 1.3, shape
        for other in cover.keys() - {shape}:
            assert (inside & cover[other]).sum() < 0.97 * (inside | cover[other]).sum(), (shape, other)
    with pytest.raises(ValueError, match="'dodo'"):
        distance("dodo", x, y)


@pytest.mark.parametrize("style", STYLES)
def test_a_style_changes_the_picture(style):
    for scene in scenes(5, things=1):
        scene = replace(scene, things=(replace(scene.things[0], colour="red"),), background="cyan")
        plain, styled = (render(replace(scene, style=name))[0].astype(int) for name in ("", style))
        assert abs(plain - styled).max() > 15


@pytest.mark.parametrize("style", ["stripes", "checks", "halftone", "pixel"])
def test_a_pattern_is_the_same_under_every_token(style):
    """Tokens are 16 pixels wide; far from the object all show the same piece, which is not plain."""
    scene = replace(sample_scene(np.random.default_rng(5), things=1), light="normal", finish="flat", style=style)
    thing = replace(scene.things[0], x=0.75, y=0.75, radius=0.1)
    pixels = render(replace(scene, things=(thing,)))[0].astype(int)
    tokens = pixels[:64, :64].reshape(4, 16, 4, 16, 3).swapaxes(1, 2).reshape(16, -1)
    assert abs(tokens - tokens[0]).max() <= 1 and tokens[0].std() > 10


def test_other_sizes_show_the_same_scene():
    scene = scenes(1, things=1)[0]
    small, large = render(scene, 64)[0].astype(float), render(scene, 128)[0].astype(float)
    assert abs(large.reshape(64, 2, 64, 2, 3).mean((1, 3)) - small).mean() < 2


def test_a_split_may_have_no_scene_of_so_few_words():
    with pytest.raises(ValueError, match="no scene of diamond in blue, cyan"):
        sample_scene(np.random.default_rng(0), held_out=True, things=1, shapes=("diamond",), colours=("blue", "cyan"))
