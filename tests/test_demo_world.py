"""The demo world's referee: it finds what is there, is not fooled by what is not, and knows nothing of what trains.

The renderer and the captions have their own tests in test_scene.py.
"""

import ast
import inspect
from dataclasses import replace

import numpy as np
import pytest
import torch
from tqdm import tqdm

from flux import draws
from flux.demo import reader, referee
from flux.demo.masks import components
from flux.demo.reader_stage import bent
from flux.demo.referee import compare, judge, look
from flux.demo.scene import (
    COLOURS,
    NEW_SHAPES,
    SHAPES,
    Caption,
    Scene,
    Thing,
    distance,
    render,
    sample_caption,
    sample_scene,
)
from flux.demo.trial import degrade, measure, nonsense

RED_STAR = Scene((Thing("star", "red", "medium", "left", 0.27, 0.5, 0.16),), "cyan")
PAIR = Scene((Thing("heart", "white", "medium", "", 0.26, 0.5, 0.16),
              Thing("ring", "black", "small", "", 0.74, 0.5, 0.105)), "green", "left of")


def paint(mask: np.ndarray, colour, ground) -> np.ndarray:
    """A mask (H, W) in [0, 1] in one colour on another, both 0..255."""
    colour, ground = np.array(colour, float), np.array(ground, float)
    return np.round(ground + (colour - ground) * mask[..., None]).astype(np.uint8)


@pytest.mark.parametrize("degraded", [False, True])
@pytest.mark.parametrize("things", [1, 2])
def test_right_pictures_are_right_and_one_wrong_word_is_not(things, degraded):
    judged, held, fooled = measure(25, things, degraded, tqdm(disable=True))
    assert judged["right"] == 25 and judged["shape"] == judged["colour"] == 25 * things
    wrong = {name: judged[name] - held[name] for name in judged if name != "finish" and held[name] < judged[name]}
    assert not wrong
    assert set(fooled) == {"background", "shape", "colour", "place" if things == 1 else "relation"}
    assert not any(fooled.values())


def test_every_shape_and_colour_is_named():
    for i, shape in enumerate(SHAPES):
        for j, colour in enumerate(COLOURS):
            background = list(COLOURS)[(i + j + 1) % len(COLOURS)]
            if background == colour or (i + j) % 3:
                continue
            scene = Scene((replace(RED_STAR.things[0], shape=shape, colour=colour),), background)
            seen = look(render(scene)[0], 1)
            assert seen.background == background and [(t.shape, t.colour) for t in seen.things] == [(shape, colour)]


def test_what_is_seen_lies_where_it_was_drawn():
    for i in range(10):
        scene = sample_scene(np.random.default_rng(i), things=1)
        (found,), (thing,) = look(render(scene)[0], 1).things, scene.things
        assert np.allclose((found.x, found.y), (thing.x, thing.y), atol=0.01)
        assert found.radius == pytest.approx(thing.radius, rel=0.06)


def test_nonsense_is_never_right():
    for i in range(8):
        for name, (pixels, asked) in nonsense(np.random.default_rng(i)).items():
            assert not judge(pixels, asked).right, (i, name)


def test_one_object_more_or_less_is_wrong():
    y, x = (np.mgrid[:128, :128] + 0.5) / 128
    pixels = render(RED_STAR)[0].copy()
    assert judge(pixels, RED_STAR).right
    pixels[np.hypot(x - 0.75, y - 0.75) < 0.01] = COLOURS["blue"]
    assert judge(pixels, RED_STAR).right  # a speck
    pixels[np.hypot(x - 0.75, y - 0.75) < 0.04] = COLOURS["blue"]
    verdict = judge(pixels, RED_STAR)
    assert not verdict.right and not verdict.held["objects"]
    assert not judge(render(RED_STAR)[0], replace(PAIR, background="cyan")).right
    assert not judge(render(PAIR)[0], replace(PAIR, things=PAIR.things[:1], relation="")).right


def test_two_that_touch_in_one_colour_are_two():
    disc = Thing("circle", "red", "large", "", 0.285, 0.5, 0.24)
    touching = Scene((disc, replace(disc, x=0.715)), "green", "left of")
    pixels = render(touching)[0]
    assert len(components((pixels == COLOURS["red"]).all(-1))) == 1
    assert judge(pixels, touching).right
    assert not judge(pixels, replace(touching, things=touching.things[:1], relation="")).right


@pytest.mark.parametrize("shape", SHAPES)
def test_a_smudge_is_no_shape(shape):
    """Bent and blurred; and one half of it."""
    y, x = (np.mgrid[:128, :128] + 0.5 - 64) / 22
    angle = np.arctan2(y, x)
    bent = distance(shape, x, y) + 0.2 * np.sin(3 * angle + 1) + 0.13 * np.cos(5 * angle)
    asked = Scene((Thing(shape, "blue", "", "", 0.5, 0.5, 0.17),), "yellow")
    whole = np.clip(0.5 - 22 * distance(shape, x, y), 0, 1)
    assert judge(paint(whole, COLOURS["blue"], COLOURS["yellow"]), asked).right
    for mask in (np.clip(0.5 - bent * 2, 0, 1), whole * (x + y < 0)):
        assert not judge(paint(mask, COLOURS["blue"], COLOURS["yellow"]), asked).right


@pytest.mark.parametrize("rgb", [(128, 128, 128), (140, 90, 50), (230, 90, 115), (150, 190, 60)])
def test_an_object_of_a_colour_between_names_has_none(rgb):
    assert [thing.colour for thing in look(paint(render(RED_STAR)[1][0], rgb, COLOURS["cyan"]), 1).things] == [""]


@pytest.mark.parametrize("rgb", [(140, 90, 50), (150, 190, 60), (90, 0, 90)])  # grey would be white in dim light
def test_a_background_of_a_colour_between_names_has_none(rgb):
    assert look(paint(render(RED_STAR)[1][0], COLOURS["black"], rgb), 1).background == ""


def test_what_is_not_said_is_not_judged():
    silent = replace(RED_STAR, things=(Thing("", "", "", "", 0.27, 0.5, 0.16),), background="")
    verdict = judge(render(RED_STAR)[0], silent)
    assert verdict.held == {"objects": True} and verdict.right
    verdict = judge(render(RED_STAR)[0], replace(RED_STAR, light="dim", finish="glossy"))
    assert " ".join(sorted(verdict.held)) == "background colour 1 finish light objects place 1 shape 1 size 1"
    assert verdict.right and not verdict.held["light"] and not verdict.held["finish"]
    for i in range(10):
        rng = np.random.default_rng(i)
        scene = sample_scene(rng)
        caption: Caption = sample_caption(scene, rng)
        assert judge(degrade(render(scene)[0], rng), caption.asked).right, caption.text


def test_two_objects_are_matched_in_one_way_for_everything():
    seen = look(render(PAIR)[0], 2)
    swapped = replace(PAIR, things=PAIR.things[::-1])
    assert compare(seen, PAIR).right and compare(seen, replace(swapped, relation="right of")).right
    assert not compare(seen, swapped).held["relation"]
    heart, ring = PAIR.things
    crossed = replace(PAIR, things=(replace(heart, colour="black"), replace(ring, colour="white")), relation="")
    assert not compare(seen, crossed).right
    above = compare(seen, replace(PAIR, relation="above"))
    assert not above.right and [name for name, held in above.held.items() if not held] == ["relation"]


def test_places_and_relations_have_gaps_between_them():
    assert [referee.place_of(*at) for at in ((0.3, 0.52), (0.3, 0.3), (0.1, 0.5))] == ["left", "", ""]
    first, second = look(render(PAIR)[0], 2).things
    near = replace(first, x=second.x - 0.1, y=second.y)
    assert referee.relation_of(near, second) == "" and referee.relation_of(replace(near, y=0.1), second) == "above"


@pytest.mark.parametrize("size", [96, 160, 256])
def test_other_sizes(size):
    for scene in (RED_STAR, PAIR, replace(RED_STAR, light="dim", finish="gradient background")):
        verdict = judge(render(scene, size)[0], scene)
        assert verdict.right and all(verdict.held.values())


def test_components_are_those_of_a_flood_fill():
    def flood(mask, seed):
        piece, todo = np.zeros_like(mask), [seed]
        while todo:
            i, j = todo.pop()
            if 0 <= i < mask.shape[0] and 0 <= j < mask.shape[1] and mask[i, j] and not piece[i, j]:
                piece[i, j] = True
                todo += [(i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)]
        return piece

    for i in range(20):
        mask = np.random.default_rng(i).random((17, 23)) < 0.1 + 0.04 * i
        found = components(mask)
        assert {piece.tobytes() for piece in found} == {flood(mask, seed).tobytes() for seed in np.argwhere(mask)}
        assert np.array_equal(sum(found, np.zeros(mask.shape, int)), mask)


def test_it_reads_pixels_only_and_changes_none():
    pixels = render(PAIR)[0]
    before = pixels.copy()
    assert look(pixels, 2) == look(pixels, 2) and np.array_equal(pixels, before)
    nodes = list(ast.walk(ast.parse(inspect.getsource(referee))))
    imported = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    imported |= {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    ours = {name for name in imported if name.split(".")[0] in ("flux", "lora", "kernels", "vlm_client", "torch")}
    assert ours == {"flux.demo", "flux.demo.scene"} and "torch" not in inspect.getsource(referee.masks)


@pytest.mark.parametrize("ground", ["red", "blue", "purple", "green"])
def test_the_sides_of_a_large_square_are_not_stepped_over(ground):
    """A fit that looks at every third pixel may see nothing of a side that lies along the rows."""
    for x, y in ((0.5, 0.5), (0.507, 0.492), (0.512, 0.481)):
        scene = Scene((Thing("square", "black", "large", "centre", x, y, 0.2219),), ground, finish="glossy")
        assert judge(render(scene)[0], scene).right


def test_the_reader_knows_its_shapes_and_guesses_no_others():
    """As many renders in each style; sketches, whose colours are hard to tell, are not judged here."""
    rng, scenes = draws.rng("read"), []
    for style in ("", "stripes", "frost", "watercolour", "halftone"):
        scenes += [sample_scene(rng, True, 1, style=style) for _ in range(40)]
    pixels = np.stack([render(each)[0] for each in scenes])
    found = reader.read(pixels, SHAPES)
    asked = [sample_caption(each, rng, full=True).asked for each in scenes]
    assert {one.shape for one in found} <= set(SHAPES)
    assert np.mean([one.style == each.style for one, each in zip(found, scenes, strict=True)]) > 0.99
    told = np.mean([one.shows(each) for one, each in zip(found, asked, strict=True)])
    guessed = np.mean([one.shows(each) for one, each in zip(reader.read(pixels), asked, strict=True)])
    assert told > 0.97 and guessed < told

    new = [sample_scene(rng, True, 1, shapes=NEW_SHAPES) for _ in range(40)]
    pixels = np.stack([render(each)[0] for each in new])
    assert np.mean([one.shape == each.things[0].shape for one, each in zip(reader.read(pixels), new, strict=True)]) > 0.9


def test_outlines_are_bent_and_nothing_else():
    """By nothing: the picture. By two pixels: the same colours, mostly where they were; each picture its own way."""
    image = torch.from_numpy(render(RED_STAR)[0]).permute(2, 0, 1)[None].repeat(2, 1, 1, 1) / 127.5 - 1
    assert torch.allclose(bent(image, 0.0, draws.generator("bent")), image, atol=1e-4)
    moved = bent(image, 2.0, draws.generator("bent"))
    share = ((moved - image).abs().amax(1) > 0.2).float().mean((1, 2))
    assert (share > 0.005).all() and (share < 0.1).all() and not torch.equal(moved[0], moved[1])
    assert moved.amin() >= image.amin() - 1e-5 and moved.amax() <= image.amax() + 1e-5
