"""The demo's Fill model: what it is made of, what it is trained on, and that a command repaints with it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import train
from flux import adapters, checkpoint, config, draws, fill, latents, lora_names, pictures, weights
from flux.demo import fill_stage, fill_trial, referee
from flux.demo import scene as world
from flux.demo.autoencoder_stage import to_image
from lora import io
from lora.adapter import Adapter, LowRank, delta, delta_bias

DEMO, DEMO_FILL = config.DEMO, config.DEMO_FILL


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_it_is_the_base_plus_what_the_file_says():
    model = adapters.load_flux(weights.find(DEMO_FILL), DEMO_FILL, torch.float32)
    base = weights.load_flux(weights.find(DEMO), DEMO.flux, torch.float32)
    change = io.read(weights.DEMO / DEMO_FILL.adapter, lora_names.names(DEMO))[0]["flux"].layers
    assert model.config == DEMO_FILL.flux and len(change) == 39
    for name, layer in base.named_modules():
        if isinstance(layer, torch.nn.Linear):
            want = layer.weight
            if name in change:
                total = delta(change[name], tuple(layer.weight.shape), dtype=torch.float64)
                want = total + torch.nn.functional.pad(layer.weight, (0, total.shape[1] - layer.in_features)).double()
            assert (model.get_submodule(name).weight.double() - want).abs().max() < 1e-6, name
    bias = delta_bias(change["img_in"], 192)
    assert torch.allclose(model.img_in.bias, base.img_in.bias + bias, atol=1e-6) and model.img_in.in_features == 384
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_file_that_has_it_all_is_taken_alone(tmp_path):
    model = adapters.load_flux(weights.find(DEMO_FILL), DEMO_FILL, torch.float32)
    model.img_in.weight.data[:, 100:] += 1
    checkpoint.save(tmp_path / "wide.safetensors", model.state_dict())
    again = adapters.load_flux(weights.find(DEMO_FILL, None, {"flux": tmp_path / "wide.safetensors"}), DEMO_FILL)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_holes_hide_what_they_shall():
    rng, kinds = draws.rng("holes"), set()
    for i in range(60):
        scene = world.sample_scene(draws.rng(i))
        mask = fill_stage.hole(scene, rng)
        assert mask.shape == (128, 128) and set(np.unique(mask)) <= {0.0, 1.0} and mask.any()
        kinds.add(round(float(mask.mean()), 1))
        boxes = list(fill_stage.around(scene, rng))
        hidden = np.zeros((128, 128), bool)
        for box in boxes:
            hidden[box] = True
        left = [(objects > 0.5)[~hidden].sum() for objects in world.render_masks(scene)]
        assert 0 in left and len(boxes) in (1, 2)  # at least one is wholly hidden
    assert {0.1, 0.4, 1.0} <= kinds


def test_what_a_batch_holds():
    task = fill_stage.FillTask(fill_stage.TrainFill(scenes=4, batch=3, rank=2))
    x0, eps, t, weight, cond = task.batch(0, 0)
    assert x0.shape == eps.shape == (3, 64, 64) and t.shape == (3,) and cond.channels.shape == (3, 64, 320)
    assert set(cond.channels[..., 64:].unique().tolist()) <= {0.0, 1.0}
    again = task.batch(0, 0)
    assert torch.equal(eps, again[1]) and torch.equal(cond.channels, again[4].channels)
    rng = draws.rng(0, "fill", 0, 0)
    i = rng.choice(4, 3)[0]  # its first picture, made here as a user's would be
    image = to_image(world.render(task.scenes[i])[0][None])
    mask = task.masks[i][None].float()
    want = fill.tokens(task.autoencoder.encode(fill.masked(image, mask)), mask)
    assert torch.allclose(cond.channels[:1], want, atol=1e-4)
    assert torch.allclose(x0[:1], latents.pack(task.autoencoder.encode(image)), atol=1e-4)
    hidden = mask.view(16, 8, 16, 8).mean((1, 3))  # of each cell of 8 x 8 pixels, which is a number in 16 channels
    assert torch.allclose(latents.unpack(weight, 128, 128)[0], 0.2 + 0.8 * hidden.expand(16, 16, 16), atol=1e-6)
    loss = task.loss(task.batch(1, 0))
    loss.mean().backward()
    trained = {name for name, p in task.model.named_parameters() if p.grad is not None}
    assert loss.shape == (3,) and "img_in.weight" in trained and len(trained) == 2 + 2 * 38


def test_training_writes_what_is_read(monkeypatch):
    for name in ("flux", "ae", "clip", "t5"):
        Path("weights").mkdir(exist_ok=True)
        (Path("weights") / f"{name}.safetensors").symlink_to(weights.DEMO / f"{name}.safetensors")
    for name in ("tokenizer", "tokenizer_2"):
        (Path("weights") / name).symlink_to(weights.DEMO / name)
    monkeypatch.setattr(weights, "DEMO", Path("weights").absolute())
    monkeypatch.setattr(fill_stage, "DEMO", replace(DEMO, steps=2))  # of the preview
    held_out = fill_stage.FillTask.held_out
    monkeypatch.setattr(fill_stage.FillTask, "held_out", lambda task: held_out(task)[:1])
    train.main(["demo", "fill", "--steps", "2", "--scenes", "4", "--batch", "2", "--rank", "2", "--lr", "0.1", "--ema", "0",
                "--warmup", "0", "--threads", "1"])
    model = adapters.load_flux(weights.find(DEMO_FILL), DEMO_FILL, torch.float32)
    base = weights.load_flux(weights.find(DEMO), DEMO.flux, torch.float32)
    assert not torch.equal(model.img_in.weight[:, :64], base.img_in.weight)
    assert not torch.equal(model.single_blocks[5].linear1.weight, base.single_blocks[5].linear1.weight)


@pytest.mark.parametrize("words", [(), ("--lora", "style.safetensors:0.3"), ("--store", "fp8"), ("--strips",)])
def test_a_hidden_object_comes_back(words):
    """One easy scene; the measured share is in the README (`python train.py demo judge-fill`)."""
    style = Adapter({"img_in": (LowRank(torch.randn(2, 64), 0.02 * torch.randn(192, 2)),)})  # of the base's width
    io.write(Path("style.safetensors"), {"flux": style}, lora_names.names(DEMO))
    thing = world.Thing("circle", "red", "large", "left", 0.27, 0.5, 0.22)
    scene = world.Scene((thing,), "white")
    pixels, mask = world.render(scene)[0], np.zeros((128, 128), np.uint8)
    mask[26:102, 0:72] = 255
    Image.fromarray(pixels).save("image.png")
    Image.fromarray(mask).save("mask.png")
    sample.main([world.write_caption(scene), "--model", "demo-fill", "--image", "image.png", "--mask", "mask.png", "--keep",
                 "--device", "cpu", *words])
    drawn = np.asarray(pictures.read(Path("out/00001_seed0.png")))
    assert np.array_equal(drawn[mask == 0], pixels[mask == 0])
    made = pictures.read_metadata(Path("out/00001_seed0.png"))["files"]["adapter"]
    assert made == f"fill.safetensors {checkpoint.fingerprint(weights.DEMO / 'fill.safetensors')}"
    if not words or "--lora" not in words:
        assert referee.judge(drawn, scene).right


def test_the_trial_asks_for_another_object():
    rng = draws.rng("other")
    for i in range(20):
        scene = world.sample_scene(draws.rng(i), things=1)
        other = fill_trial.another(scene, rng)
        ours, theirs = scene.things[0], other.things[0]
        assert ours.shape != theirs.shape and ours.colour != theirs.colour != scene.background
        assert replace(theirs, shape=ours.shape, colour=ours.colour) == ours
