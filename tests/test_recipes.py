"""Every training stage runs: batches follow from the step alone, the loss falls, and what is saved can be loaded."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import train
from flux import checkpoint, cli, pictures, weights
from flux.config import DEMO
from flux.demo import flow_stage, pair_stage, scene
from flux.demo.autoencoder_stage import AutoencoderTask
from flux.errors import UserError
from flux.recipes import demo, t2i

SMALL = {"steps": 2, "batch": 2, "warmup": 1, "save_every": 1, "sample_every": 0, "log_every": 1}


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A copy of the demo's weights that stages may overwrite."""
    folder = tmp_path / "weights"
    shutil.copytree(weights.DEMO, folder)
    monkeypatch.setattr(weights, "DEMO", folder)
    monkeypatch.setattr(pair_stage, "train_tokenizers", lambda: None)  # seconds
    scenes = AutoencoderTask.scenes
    monkeypatch.setattr(AutoencoderTask, "scenes", lambda self, *key, count, **more: scenes(
        self, *key, count=min(count, 4), **more))
    for task in (flow_stage.FlowTask, flow_stage.GuidanceTask):
        monkeypatch.setattr(task, "held_out", two_of(task.held_out))
    return folder


def two_of(held_out):
    """Pictures of the first batch."""
    return lambda self: [tuple(part[:2] for part in held_out(self)[0])]


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, torch.Generator):
        return torch.equal(a.get_state(), b.get_state())
    return all(map(equal, a, b)) if isinstance(a, tuple) else a == b


@pytest.mark.parametrize(("stage", "files"), [("autoencoder", "ae"), ("pair", "clip siglip"), ("flow", "flux t5"),
                                              ("guidance", "flux")])
def test_a_stage_of_the_demo_trains_and_ships(stage, files, shipped, tmp_path):
    extra = {"flow": {"scenes": 8, "steps": 1}, "guidance": {"scenes": 8}}.get(stage, {})  # a step of Muon takes seconds
    settings = demo.TRAIN[stage](out=tmp_path / "runs", **SMALL | extra)
    before = {file: dict(checkpoint.read(shipped / f"{file}.safetensors")) for file in files.split()}
    task = settings.task()
    assert equal(task.batch(1, 0), settings.task().batch(1, 0)) and not equal(task.batch(1, 0), task.batch(2, 0))
    train.train(task, settings, tmp_path / "runs" / stage)
    for file in before:
        after = dict(checkpoint.read(shipped / f"{file}.safetensors"))
        assert before[file].keys() == after.keys()
        assert all(torch.isfinite(tensor.float()).all() for tensor in after.values())
        assert any(not torch.equal(before[file][name], after[name]) for name in after)


def test_the_flow_learns_one_batch(shipped, tmp_path):
    settings = demo.TrainFlow(out=tmp_path, scenes=4, **SMALL)
    task = settings.task()
    batch = task.batch(0, 0)
    optimiser = torch.optim.AdamW(task.trainable().parameters(), lr=2e-3)
    losses = []
    for _ in range(30):
        loss = task.loss(batch).mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_noise_that_settles_a_scene_is_still_gaussian():
    """Over scenes of all places and sizes, each number alone and pairs of them; the place is where the noise looks most like
    the object; what the caption says, and a scene of two, leave it alone."""
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    scenes = [scene.sample_scene(rng, things=1) for _ in range(2000)]
    plain, look = torch.randn(2000, 64, 64, generator=generator), torch.randn(64, generator=generator)
    tokens = torch.arange(64).view(8, 8)
    blocks = torch.stack([tokens[round(8 * y) - 1:round(8 * y) + 1, round(8 * x) - 1:round(8 * x) + 1].flatten()
                          for x, y in scene.PLACES.values()])  # (5, 4)
    names = list(scene.PLACES)
    x0 = torch.randn(64, generator=generator).expand(2000, 64, 64).clone()  # a background, and on it the object
    for picture, one in zip(x0, scenes, strict=True):
        picture[blocks[names.index(one.things[0].place)]] += look
    said = [scene.sample_caption(one, rng, full=True).asked for one in scenes]
    assert torch.equal(torch.stack(list(map(flow_stage.settle, plain, x0, scenes, said))), plain)
    assert torch.equal(flow_stage.settle(plain[0], x0[0], scene.sample_scene(rng, things=2), None), plain[0])
    noise = torch.stack([flow_stage.settle(*pair, one, None) for *pair, one in zip(plain, x0, scenes, strict=True)])
    assert abs(noise.mean()) < 2e-3 and abs(noise.var() - 1) < 2e-3
    assert abs(noise.var(0) - 1).max() < 0.18 and noise.mean(0).abs().max() < 0.12
    some = noise.flatten(1)[:, ::9]
    assert (some.T @ some / 2000 - torch.eye(some.shape[1])).abs().max() < 0.18
    likeness = noise @ look / look.norm()  # (2000, 64), each N(0, 1)
    at = likeness[:, blocks].sum(-1) / 2
    assert abs(at.mean()) < 0.03 and (at.std(0) - 1).abs().max() < 0.05
    assert [names[i] for i in at.argmax(1)] == [one.things[0].place for one in scenes]
    larger = [noise[[one.things[0].size == size for one in scenes]] @ look for size in scene.SIZES]
    assert larger[0].sum(1).mean() < larger[1].sum(1).mean() - 5 < larger[2].sum(1).mean() - 10


def test_guidance_learns_from_a_frozen_teacher(shipped, tmp_path):
    task = demo.TrainGuidance(out=tmp_path, scenes=4, **SMALL).task()
    trained = {name.split(".")[0] for name, p in task.trainable().named_parameters() if p.requires_grad}
    assert trained == {"flux"} and not any(p.requires_grad for p in task.teacher.parameters())
    x0, eps, t, captions, there, guidance = task.batch(0, 0)
    assert guidance.min() >= 1 and guidance.max() <= task.strongest
    plain = task.loss((x0, eps, t, captions, there, torch.ones_like(guidance))).max()
    assert plain < 1e-8  # guidance 1 is what the student begins with


def test_the_latents_are_made_again_for_another_autoencoder(shipped, tmp_path):
    settings = demo.TrainFlow(out=tmp_path, scenes=4, **SMALL)
    first = settings.task().tokens
    path = shipped / "ae.safetensors"
    state = {name: tensor.clone() for name, tensor in checkpoint.read(path).items()}
    assert torch.equal(settings.task().tokens, first)
    state["encoder.conv_out.weight"] *= 2
    checkpoint.save(path, state)
    assert not torch.equal(settings.task().tokens, first)


def test_training_never_sees_what_is_held_out(shipped, tmp_path):
    task = demo.TrainFlow(out=tmp_path, scenes=200, **SMALL)
    scenes = [scene.sample_scene(np.random.default_rng(i)) for i in range(task.scenes)]
    assert not any(one.held_out for one in scenes)


@pytest.fixture
def photographs(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(5):
        one = scene.sample_scene(rng)
        Image.fromarray(scene.render(one, 128)[0]).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(scene.sample_caption(one, rng).text)
    return folder


def test_the_transformer_is_tuned_on_a_folder(photographs, tmp_path, capsys):
    settings = t2i.FineTune(data=photographs, out=tmp_path / "runs", lr=1e-3, **SMALL | {"sample_every": 2})
    train.main(["t2i", "--data", str(photographs), "--out", str(tmp_path / "runs"), "--steps", "2", "--batch", "2",
                "--lr", "1e-3", "--sample-every", "2"])
    run = tmp_path / "runs" / "t2i"
    assert {"config.toml", "metrics.jsonl", "loss.png", "samples", "checkpoints", "final.safetensors"} <= {
        file.name for file in run.iterdir()}
    assert Image.open(run / "samples" / "step_000002.png").size[0] > 2 * DEMO.width
    tuned = weights.load_flux(weights.find(DEMO, overrides={"flux": run / "final.safetensors"}), DEMO.flux)
    shipped = weights.load_flux(weights.find(DEMO), DEMO.flux, torch.float32)
    assert not torch.equal(tuned.img_in.weight, shipped.img_in.weight)
    command = cli.describe(cli.recipes()["t2i"]).train[""]
    assert cli.parse(["--config", str(run / "config.toml")], command)["lr"] == settings.lr


def test_tuning_without_pictures_is_a_mistake(tmp_path):
    with pytest.raises(UserError, match="--data is missing"):
        t2i.FineTune().task()
    with pytest.raises(UserError, match="no data at"):
        t2i.FineTune(data=tmp_path / "nowhere").task()
    with pytest.raises(UserError, match="--model canny draws from a prompt and a control picture"):
        t2i.FineTune(data=tmp_path, model="canny").task()


def test_evaluation_writes_its_table(shipped, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    demo.Evaluate(count=3, steps=2).run()
    assert "| one object, 3 captions |" in capsys.readouterr().out
    assert json.loads((shipped / "table.json").read_text())["settings"]["count"] == 3
    assert pictures.read(tmp_path / "out" / "evaluate.png")
