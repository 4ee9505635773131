"""Rectified flow: recorded schedules and trajectories, the specified numbers, and what is exact by theory."""

import math

import pytest
import torch

from flux import conditioning, flow, latents
from flux.config import PRESETS, FluxConfig
from flux.errors import UserError
from flux.model import Flux
from flux.recipes import t2i
from golden import load

TEXT = ("denoise_dev", "denoise_schnell")
DENOISE = (*TEXT, "denoise_fill", "denoise_kontext")


# Schedule.

def test_schedules_equal_the_reference():
    golden = load("schedule")
    cases = {f"s{i}": case for i, case in enumerate(golden.config["cases"])}
    for i, (width, height, steps) in enumerate(golden.config["lucid"]):
        tokens = (width // 8) * (height // 8) // 256  # LucidFlux's own count, 64 times too few
        cases[f"lucid{i}"] = [steps, tokens, 0.5, 1.15, True]
    assert cases.keys() == golden.outputs.keys()
    for name, (steps, tokens, base_shift, max_shift, shift) in cases.items():
        times = torch.tensor(flow.schedule(steps, tokens, shift, base_shift, max_shift), dtype=torch.float64)
        assert times.shape == (steps + 1,) and times[0] == 1 and times[-1] == 0, name
        assert (times - golden.outputs[name]).abs().max() <= 1e-6, name
        assert (times.diff() < 0).all(), name


@pytest.mark.parametrize(("tokens", "mu", "factor"), [
    (256, 0.5, 1.64872), (1024, 0.63, 1.87761), (2304, 0.846667, 2.33186), (4096, 1.15, 3.15819), (3840, 1.106667, 3.02426),
    (16384, 3.23, 25.27966)])
def test_the_specified_shifts(tokens, mu, factor):
    assert flow.mu(tokens) == pytest.approx(mu, abs=1e-6)
    assert math.exp(flow.mu(tokens)) == pytest.approx(factor, abs=1e-5)


@pytest.mark.parametrize(("tokens", "times"), [(1024, (1, 0.849235, 0.652489, 0.384945, 0)),
                                               (4096, (1, 0.904531, 0.759511, 0.512844, 0))])
def test_the_specified_times(tokens, times):
    assert flow.schedule(4, tokens) == pytest.approx(times, abs=1e-6)
    assert flow.schedule(4, tokens, shift=False) == [1, 0.75, 0.5, 0.25, 0]


def test_shifts_keep_the_ends_and_compose():
    assert flow.shift_time(1.0, 1.15) == 1 and flow.shift_time(0.0, 1.15) == 0
    for t in (1e-9, 0.1, 0.5, 0.999):
        assert flow.shift_time(t, 0.0) == pytest.approx(t)
        assert flow.shift_time(flow.shift_time(t, 0.3), 0.4) == pytest.approx(flow.shift_time(t, 0.7))
        assert flow.shift_time(t, 0.3) > t


def diffusers_sigmas(steps, shift=None, mu=None):
    """FlowMatchEulerDiscreteScheduler as its pipelines call it, written out: a fixed `shift`, or a dynamic one by `mu`."""
    sigmas = [1 + i * (1 / steps - 1) / max(steps - 1, 1) for i in range(steps)]  # linspace(1, 1 / steps, steps)
    if mu is None:
        return [shift * sigma / (1 + (shift - 1) * sigma) for sigma in sigmas] + [0.0]
    return [math.exp(mu) / (math.exp(mu) + (1 / sigma - 1) ** 1.0) for sigma in sigmas] + [0.0]


@pytest.mark.parametrize("steps", (1, 4, 8, 25))
def test_the_schedules_that_flags_choose(steps):
    dev, schnell = PRESETS["dev"], PRESETS["schnell"]
    for shift in (1.0, 3.0, 0.5, 1.7):  # the same for a model that shifts by itself, and for any size
        expected = pytest.approx(diffusers_sigmas(steps, shift), abs=1e-12)
        assert t2i.TextToImage(steps=steps, shift=shift).schedule(dev, 4096) == expected
        assert t2i.TextToImage(steps=steps, shift=shift).schedule(schnell, 256) == expected
    assert t2i.TextToImage(steps=steps).schedule(dev, 4096) == pytest.approx(diffusers_sigmas(steps, mu=1.15), abs=1e-12)
    assert t2i.TextToImage(steps=steps).schedule(schnell, 4096) == pytest.approx(diffusers_sigmas(steps, 1.0), abs=1e-12)


def test_recorded_schedules_of_diffusers():
    """diffusers 0.42.1, shift 3 and 1.7, by hand."""
    times = t2i.TextToImage(steps=8, shift=3.0).schedule(PRESETS["dev"], 1024)
    assert times == pytest.approx([1, 0.9545454, 0.9, 0.8333333, 0.75, 0.6428571, 0.5, 0.3, 0], abs=1e-6)
    times = t2i.TextToImage(steps=5, shift=1.7).schedule(PRESETS["dev"], 1024)
    assert times == pytest.approx([1, 0.8717949, 0.7183098, 0.53125, 0.2982456, 0], abs=1e-6)


@pytest.mark.parametrize("text", ("1,0.75,0.5,0.25,0", " 1.0, .75 ,0.50,0.25,0.", "1,0"))
def test_given_times_are_taken_as_they_are(text):
    for model in (PRESETS["dev"], PRESETS["schnell"]):
        times = t2i.TextToImage(times=text).schedule(model, 1024)
        assert times == ([1, 0.75, 0.5, 0.25, 0] if "5" in text else [1, 0])


@pytest.mark.parametrize("text", ("", "1", "0", "1,0.5", "0.9,0", "1,0.5,0.5,0", "0,0.5,1", "1,x,0", "1,nan,0", "1,,0",
                                  "1 0", "1,-0.5,0", "1,1e-1,0", "1,inf,0", "2,1,0", "1,0.5,0,0"))
def test_given_times_that_are_none(text):
    with pytest.raises(UserError, match="--times .*: expected falling numbers from 1 to 0, such as"):
        t2i.TextToImage(times=text)


def test_flags_of_schedules_that_do_not_go_together():
    for wrong in ({"steps": 4}, {"shift": 3.0}):
        with pytest.raises(UserError, match="came with --times, expected one of them"):
            t2i.TextToImage(times="1,0", **wrong)
    for shift in (0.0, -1.0):
        with pytest.raises(UserError, match="expected a factor above 0"):
            t2i.TextToImage(shift=shift)


def test_what_is_left_of_a_schedule():
    times = flow.schedule(4, 1024)  # 1, 0.849, 0.652, 0.385, 0
    assert flow.remaining(times, 1.0) == times and flow.remaining(times, 0.0) == [0.0]
    assert flow.remaining(times, 0.93) == times and flow.remaining(times, 0.92) == times[1:]
    assert flow.remaining(times, 0.6) == times[2:] and flow.remaining(times, 0.19) == [0.0]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("steps", (1, 4, 7, 30))
def test_a_span_holds_its_steps(steps, dtype):
    times = flow.schedule(steps, 256)
    for start, end in ((0, 1), (0, 0.5), (0.25, 0.75), (0.5, 1), (0.1, 0.2)):
        first, last = round(start * steps), round(end * steps)
        held = conditioning.span(times, start, end)
        inside = [conditioning.within(torch.full((2,), t, dtype=dtype), held) for t in times[:-1]]
        assert inside == [first <= i < last for i in range(steps)]


# Training: the path, its loss, the times.

def test_the_path_runs_from_the_image_to_noise():
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 3, 5, 64, generator=g)
    assert torch.equal(flow.interpolate(x0, eps, torch.zeros(3)), x0)
    assert torch.equal(flow.interpolate(x0, eps, torch.ones(3)), eps)
    mixed = flow.interpolate(x0, eps, torch.tensor([0.0, 0.25, 1.0]))
    assert torch.equal(mixed[0], x0[0]) and torch.equal(mixed[2], eps[2])
    assert torch.equal(mixed[1], 0.75 * x0[1] + 0.25 * eps[1])
    image = torch.ones(3, 16, 4, 6)
    assert flow.interpolate(image, image, torch.rand(3)).shape == image.shape


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_the_loss_of_the_true_velocity_is_zero(dtype):
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 3, 5, 64, generator=g).to(dtype)
    t, seen = torch.tensor([0.0, 0.3, 1.0]), {}

    def true(img, t):
        seen.update(img=img, t=t)
        return eps - x0

    assert flow.loss(true, x0, eps, t).tolist() == [0, 0, 0]
    assert torch.equal(seen["img"], flow.interpolate(x0, eps, t).to(dtype)) and seen["img"].dtype == dtype
    assert torch.equal(seen["t"], t)


def test_the_loss_is_a_mean_square_per_sample():
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 3, 5, 64, generator=g)
    off = torch.tensor([1.0, 2.0, 0.0]).view(3, 1, 1)
    losses = flow.loss(lambda img, t: eps - x0 + off, x0, eps, torch.rand(3, generator=g))
    assert losses.dtype == torch.float32 and losses.tolist() == pytest.approx([1, 4, 0], rel=1e-5, abs=1e-9)
    assert flow.loss(lambda img, t: x0 - eps, x0, eps, torch.rand(3, generator=g)).min() > 1, "the sign counts"


def test_what_weighs_nothing_in_the_loss_may_be_wrong():
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 2, 4, 64, generator=g)
    off = torch.tensor([1.0, 5.0, 2.0, 5.0]).view(1, 4, 1)
    weight = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.5, 0.0, 0.0, 0.0]])[..., None].expand_as(x0)
    losses = flow.loss(lambda img, t: eps - x0 + off, x0, eps, torch.rand(2, generator=g), weight)
    assert losses.tolist() == pytest.approx([(1 + 4) / 2, 1], rel=1e-5), "each sample by its own weights"


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (flow.mu(4096), 1.0), (-0.5, 0.4)])
def test_times_are_logit_normal(mean, std):
    t = flow.draw_t(100_000, torch.Generator().manual_seed(0), mean, std)
    assert t.shape == (100_000,) and t.min() > 0 and t.max() < 1
    normal = torch.distributions.Normal(0.0, 1.0)
    at = torch.tensor([0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99])
    assert (t.quantile(at) - torch.sigmoid(mean + std * normal.icdf(at))).abs().max() < 0.01


@pytest.mark.parametrize("tokens", (256, 4096))
def test_shifting_a_draw_is_moving_its_mean(tokens):
    """sigmoid(n) shifted by the factor s is sigmoid(n + ln s): training at mean = mu sees the times that sampling uses."""
    plain = flow.draw_t(1000, torch.Generator().manual_seed(0))
    moved = flow.draw_t(1000, torch.Generator().manual_seed(0), mean=flow.mu(tokens))
    shifted = torch.tensor([flow.shift_time(t, flow.mu(tokens)) for t in plain.tolist()])
    assert (moved - shifted).abs().max() < 1e-6


# Sampling.

def test_euler_is_exact_on_a_straight_line():
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 2, 5, 64, generator=g)
    start = eps.clone()
    for times in (flow.schedule(1, 256), flow.schedule(7, 4096), flow.schedule(3, 256, shift=False)):
        assert (flow.euler(lambda img, t: eps - x0, eps, times) - x0).abs().max() < 1e-5
        states = list(flow.euler_steps(lambda img, t: eps - x0, eps, times))
        assert len(states) == len(times) - 1
        for state, t in zip(states, times[1:], strict=True):
            assert (state - flow.interpolate(x0, eps, torch.full((2,), t))).abs().max() < 1e-5
    assert torch.equal(eps, start), "the noise that came in stays as it was"


def test_euler_is_of_first_order():
    """dx/dt = x from 1 to 0 is x / e; twice the steps, half the error."""
    def error(steps):
        x = flow.euler(lambda img, t: img, torch.ones(1, 1, 1, dtype=torch.float64), flow.schedule(steps, 256, shift=False))
        return abs(x.item() - math.exp(-1))
    assert error(100) / error(200) == pytest.approx(2, rel=0.02)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_euler_gives_each_sample_its_time(dtype):
    seen = []

    def velocity(img, t):
        seen.append(t)
        return torch.zeros_like(img)

    out = flow.euler(velocity, torch.ones(3, 5, 64, dtype=dtype), [1.0, 0.5, 0.0])
    assert out.dtype == dtype and [t.tolist() for t in seen] == [[1.0] * 3, [0.5] * 3]
    assert all(t.dtype == dtype for t in seen)


def velocity(golden, model: Flux, dtype=torch.float32) -> flow.Velocity:
    """The golden's trajectory as a recipe closes over it: text alone, or with more channels, or with more tokens."""
    given = {name: x if name.endswith("ids") else x.to(dtype) for name, x in golden.inputs.items() if name != "schedule"}
    cond = conditioning.Condition(given["txt"], given["vec"], given["txt_ids"], given["img_ids"], golden.config["guidance"])
    if golden.config["mode"] == "fill":
        cond = conditioning.with_channels(cond, given["img_cond"])
    if golden.config["mode"] == "kontext":
        h, w = golden.config["cond_hw"]
        cond = conditioning.with_references(cond, [latents.unpack(given["img_cond_seq"], 16 * h, 16 * w)])
        assert torch.equal(cond.references, given["img_cond_seq"])
        assert torch.equal(cond.img_ids, torch.cat((given["img_ids"], given["img_cond_seq_ids"]), dim=1))
    return conditioning.velocity(model, cond)


def build(golden) -> Flux:
    model = Flux(FluxConfig(**golden.config["params"]))
    model.load_state_dict(golden.weights)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("name", DENOISE)
def test_trajectories_equal_the_reference(name):
    golden, seen = load(name), []
    config, plain = golden.config, velocity(golden, build(golden))

    def noted(img, t):
        seen.append(plain(img, t))
        return seen[-1]

    times = flow.schedule(config["steps"], config["h"] * config["w"], config["shift"])
    assert times == pytest.approx(golden.inputs["schedule"].tolist(), abs=1e-6)
    final = flow.euler(noted, golden.inputs["img"], times)
    assert len(seen) == config["steps"]
    for i, v in enumerate(seen):
        golden.close(v, f"step{i}")
    golden.close(final, "final")
    golden.close(latents.unpack(final, 16 * config["h"], 16 * config["w"]), "unpacked")


@pytest.mark.parametrize("name", DENOISE)
def test_trajectories_in_bfloat16(name):
    golden = load(name)
    plain = velocity(golden, build(golden).bfloat16(), torch.bfloat16)
    final = flow.euler(plain, golden.inputs["img"].bfloat16(), golden.inputs["schedule"].tolist())
    assert final.dtype == torch.bfloat16
    golden.close(final, "final_bf16", dtype=torch.bfloat16)


def late(plain, times):
    """The velocity at the end of the step instead of its beginning."""
    after = dict(zip(torch.tensor(times[:-1]).tolist(), times[1:], strict=True))
    return lambda img, t: plain(img, torch.tensor([after[s] for s in t.tolist()]))


WRONG = {
    "velocity of the step's end": lambda plain, times: (late(plain, times), times),
    "unshifted times": lambda plain, times: (plain, flow.schedule(len(times) - 1, 0, shift=False)),
    "times of another size": lambda plain, times: (plain, flow.schedule(len(times) - 1, 4096)),
    "times that stop early": lambda plain, times: (plain, [*times[:-1], 1e-3]),
    "the other sign": lambda plain, times: (lambda img, t: -plain(img, t), times),
    "time from 0 to 1000": lambda plain, times: (lambda img, t: plain(img, 1000 * t), times),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_trajectory_exceeds_the_tolerance(wrong):
    golden = load("denoise_dev")
    plain, times = WRONG[wrong](velocity(golden, build(golden)), golden.inputs["schedule"].tolist())
    final, expected = flow.euler(plain, golden.inputs["img"], times), golden.outputs["final"]
    assert (final - expected).abs().max() > golden.tol("final") * expected.abs().max()
