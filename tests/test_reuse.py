"""Steps that reuse the blocks of an earlier one: when they do, that nothing else changes, and for each picture alone."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import sample
from flux import conditioning, flow
from flux.config import TINY
from flux.control import ControlNet
from flux.errors import UserError
from flux.model import Flux
from flux.reuse import Reusing
from lora.adapter import Adapter, LowRank
from lora.inject import Loras

H, W, TEXT = 6, 10, 5  # latent cells, tokens
TIMES = flow.schedule(8, 15)
DTYPES = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(channels=64, dtype=torch.float32):
    """A transformer whose blocks all do something: no weight is small."""
    torch.manual_seed(0)
    return Flux(replace(TINY, in_channels=channels, depth=3)).to(dtype).eval().requires_grad_(False)


def given(batch=3, dtype=torch.float32, seed=0):
    txt, vec = random(batch, TEXT, TINY.context_in_dim, seed=seed), random(batch, TINY.vec_in_dim, seed=seed + 1)
    cond = conditioning.condition(txt.to(dtype), vec.to(dtype), 8 * W, 8 * H, 3.5)
    return random(batch, H * W // 4, 64, seed=seed + 2).to(dtype), cond


def kinds(dtype):
    """(model, noise, condition, residuals) of every way in which a model is told something."""
    img, cond = given(dtype=dtype)
    yield build(dtype=dtype), img, cond, None
    channels = random(1, H * W // 4, 320, seed=9).to(dtype)
    yield build(384, dtype), img, conditioning.with_channels(cond, channels), None
    yield build(dtype=dtype), img, conditioning.with_references(cond, [random(1, 16, 2, 4).to(dtype)]), None
    yield build(dtype=dtype), img, cond, steer(cond, dtype)
    widened = build(dtype=dtype)
    layers = {"img_in": (32, 64), "double_blocks.0.img_attn.qkv": (96, 32), "single_blocks.1.linear2": (32, 160)}
    Loras(widened).attach("a", Adapter({layer: (LowRank(random(2, columns), random(rows, 2)),)
                                        for layer, (rows, columns) in layers.items()}))
    yield widened, img, cond, None


def steer(cond, dtype=torch.float32, span=(1.0, 0.0)):
    torch.manual_seed(5)
    branch = ControlNet(replace(TINY, depth=1)).to(dtype).eval().requires_grad_(False)
    for layer in (*branch.controlnet_blocks, *branch.controlnet_single_blocks):
        layer.weight.normal_(0, 0.2)
    hint = random(1, H * W // 4, TINY.hidden_size, seed=6).to(dtype)
    return conditioning.control(branch, hint, cond, (3, 2), "interval", span=span)


@DTYPES
@torch.inference_mode()
def test_below_a_threshold_of_zero_nothing_is_reused(dtype):
    """Not a bit changes, though the blocks run apart from the first."""
    for model, img, cond, residuals in kinds(dtype):
        network = Reusing(model, 0.0)
        plain = flow.euler(conditioning.velocity(model, cond, residuals), img, TIMES)
        assert torch.equal(flow.euler(conditioning.velocity(network, cond, residuals), img, TIMES), plain)
        assert network.full == 3 * 8 and torch.isfinite(plain).all()


@DTYPES
@torch.inference_mode()
def test_below_a_huge_threshold_only_the_first_step_is_whole(dtype):
    for model, img, cond, residuals in kinds(dtype):
        calls, blocks = [], model.blocks
        model.blocks = lambda *args, blocks=blocks, calls=calls, **more: calls.append(len(args[0])) or blocks(*args, **more)
        network, one, half = Reusing(model, 1e9), torch.ones(3, dtype=dtype), torch.full((3,), 0.5, dtype=dtype)
        v, whole = conditioning.velocity(network, cond, residuals), conditioning.velocity(model, cond, residuals)
        first, later = v(img, one), v(img, half)
        assert calls == [3] and network.full == 3
        assert torch.equal(first, whole(img, one))
        assert not torch.equal(later, first), "the first block and the last layer see the new time"
        assert not torch.equal(later, whole(img, half)), "the others do not"


@torch.inference_mode()
def test_what_is_reused_is_what_the_other_blocks_added():
    model, (img, cond) = build(), given()
    v, whole = conditioning.velocity(Reusing(model, 0.5), cond), conditioning.velocity(model, cond)
    t = torch.full((3,), 0.7)
    expected = whole(img, t)
    v(img, t)
    assert (v(img, t) - expected).abs().max() <= 1e-5 * expected.abs().max(), "nothing changed: the same answer"
    assert torch.equal(v(-img, t), whole(-img, t)), "all changed: computed anew"
    near = -img + 1e-4 * random(*img.shape, seed=8)
    assert not torch.equal(v(near, t), whole(near, t)) and (v(near, t) - whole(near, t)).abs().max() < 1e-2
    broken = img.clone()
    broken[1, 0, 0] = torch.nan
    assert torch.equal(v(broken, t).isnan(), whole(broken, t).isnan()), "a change that is no number is no small one"


@pytest.mark.parametrize("steered", (False, True))
@torch.inference_mode()
def test_a_picture_decides_as_it_does_alone(steered):
    """Noises of different size make the pictures of a batch decide differently in the same step."""
    model, (img, cond) = build(), given()
    img = img * torch.tensor([0.2, 1.0, 4.0])[:, None, None]
    residuals, sizes, blocks = steer(cond) if steered else None, [], model.blocks
    model.blocks = lambda *args, **more: sizes.append(len(args[0])) or blocks(*args, **more)
    network = Reusing(model, 0.5)
    together = flow.euler(conditioning.velocity(network, cond, residuals), img, TIMES)
    assert {1, 2} & set(sizes) and network.full == sum(sizes) < 3 * 8, sizes
    counts, whole = [], network.full
    for i in range(3):
        network, own = Reusing(model, 0.5), cond[i:i + 1]
        alone = flow.euler(conditioning.velocity(network, own, steer(own) if steered else None), img[i:i + 1], TIMES)
        assert (alone - together[i]).abs().max() <= 1e-5 * together.abs().max()
        counts.append(network.full)
    assert sum(counts) == whole and len(set(counts)) > 1, counts


@torch.inference_mode()
def test_a_controlnet_that_comes_or_goes_makes_a_step_whole():
    model, (img, cond) = build(), given()
    span, whole = conditioning.span(TIMES, 0.25, 0.5), []
    network = Reusing(model, 1e9)
    for _ in flow.euler_steps(conditioning.velocity(network, cond, steer(cond, span=span)), img, TIMES):
        whole.append(network.full // 3)
    assert whole == [1, 1, 2, 2, 3, 3, 3, 3]


@torch.inference_mode()
def test_true_guidance_has_two_memories():
    model, (img, cond), (_, other) = build(), given(), given(seed=20)
    doubled = conditioning.condition(torch.cat((cond.txt, other.txt)), torch.cat((cond.vec, other.vec)), 8 * W, 8 * H, 3.5)
    for threshold, counts in ((0.0, (6 * 4, 3 * 4)), (1e9, (6, 3))):
        nets = Reusing(model, threshold), Reusing(model, threshold)
        span = conditioning.span(TIMES, 0.25, 0.75)
        v = conditioning.guided(*map(conditioning.velocity, nets, (doubled, cond)), 3.0, span)
        drawn = flow.euler(v, img, TIMES)
        assert (nets[0].full, nets[1].full) == counts
        if not threshold:
            plain = conditioning.guided(*(conditioning.velocity(model, c) for c in (doubled, cond)), 3.0, span)
            assert torch.equal(drawn, flow.euler(plain, img, TIMES))


@torch.inference_mode()
def test_reusing_whole_steps_is_taking_fewer():
    """Why there is no flag for it: two Euler steps with one velocity are one step over both."""
    model, (img, cond) = build(), given()
    v, kept = conditioning.velocity(model, cond), {}

    def every_other(img, t):
        if round(t[0].item(), 4) in {round(x, 4) for x in TIMES[::2]}:
            kept["v"] = v(img, t)
        return kept["v"]

    drawn, fewer = flow.euler(every_other, img, TIMES), flow.euler(v, img, TIMES[::2])
    assert (drawn - fewer).abs().max() <= 1e-5 * fewer.abs().max()


# The command.

def draw(folder: Path, *words) -> list[Image.Image]:
    sample.main(["a red circle", "--steps", "4", "--device", "cpu", "--out", str(folder), *map(str, words)])
    return [Image.open(path) for path in sorted(folder.glob("*_seed*.png")) if "sheet" not in path.name]


def test_the_flag(tmp_path):
    plain, = draw(tmp_path / "plain")
    none, = draw(tmp_path / "none", "--reuse", 0)
    first, second = draw(tmp_path / "two", "--reuse", 1e9, "--num", 2, "--batch", 1)
    alone, = draw(tmp_path / "one", "--reuse", 1e9, "--seed", 1)
    assert none.tobytes() == plain.tobytes() != first.tobytes()
    assert second.tobytes() == alone.tobytes(), "a new picture begins with a whole step"
    assert '"reuse": 1000000000.0' in second.text["minflux"]
    with pytest.raises(UserError, match="--reuse -1.0: expected 0 or more"):
        draw(tmp_path, "--reuse=-1")


def test_the_measured_table(capsys):
    from flux.recipes import demo

    demo.TRAIN["judge-reuse"](count=1, batch=2, steps=2, thresholds=(0.0, 9.0), fewer=(1,)).run()
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert head.startswith("| 2 captions, 1 threads | full steps |") or "2 captions" in head
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    assert [row[:2] for row in cells] == [["`2 steps`", "100%"], ["`--reuse 0`", "100%"], ["`--reuse 9`", "50%"],
                                          ["`--steps 1`", "50%"]]
    assert cells[0][3] == cells[1][3] == "0.000" < cells[2][3]
    with pytest.raises(UserError, match="expected 1 or more"):
        demo.TRAIN["judge-reuse"](count=0)
