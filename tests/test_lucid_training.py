"""Training LucidFlux: what learns and what does not, that batches follow from their number, and pictures from a folder."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from flux import checkpoint, degradation, draws, lucidflux, niqe, quality, weights
from flux.config import DEMO, LUCID
from flux.demo import scene as world
from flux.errors import UserError
from flux.lucid_training import BranchesTask, Pairs, SwinirTask, TrainBranches, TrainSwinir
from flux.lucid_trial import Evaluate, per_degradation, verdict
from flux.swinir import Swinir

PARTS = ("condition_lq", "condition_ldr", "modulation_lq", "modulation_ldr", "connector")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    checkpoint.save(folder / "swinir.safetensors", Swinir(LUCID["demo"].swinir).state_dict())
    checkpoint.save(folder / "prompt.safetensors", {"txt": torch.randn(1, 24, 96), "vec": torch.randn(1, 96)})
    return {name: folder / f"{name}.safetensors" for name in ("swinir", "prompt")}


def task(files, **settings) -> BranchesTask:
    return TrainBranches(**{"batch": 2, "drop": 0.0, "gradient_checkpointing": False, **files, **settings}).task()


def test_all_five_groups_learn_and_nothing_else(files):
    """From the transformer's own blocks; and a few steps on the same eight pictures lower their loss."""
    made = task(files, batch=8, pairs=8)
    model = made.trainable()
    frozen = [p for network in (made.flux, made.autoencoder, made.swinir, made.siglip) for p in network.parameters()]
    before = [p.clone() for p in made.flux.parameters()]
    batch, losses = made.batch(0, 0), []
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.99))
    for _ in range(6):
        loss = made.loss(batch).mean()
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    for part in PARTS:
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in getattr(model, part).parameters()), part
        still = {name.split(".")[0] for name, p in getattr(model, part).named_parameters() if not p.requires_grad}
        assert still == ({"vector_in", "guidance_in"} if part.startswith("condition") else set())
    assert not any(p.requires_grad or p.grad is not None for p in frozen)
    assert all(torch.equal(a, b) for a, b in zip(before, made.flux.parameters(), strict=True))
    assert min(losses[-2:]) < 0.8 * losses[0], losses


def test_checkpointed_blocks_give_the_same_gradients(files):
    grads = []
    for again in (False, True):
        made = task(files, gradient_checkpointing=again, batch=1)
        made.model.modulation_lq.linear.weight.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
        made.loss(made.batch(0, 0)).mean().backward()
        grads.append({name: p.grad for name, p in made.model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 50
    assert all(torch.allclose(grads[0][name], grads[1][name], atol=1e-7) for name in grads[0])


def test_a_batch_follows_from_its_number(files):
    first, second = task(files, batch=1), task(files, batch=1, pairs=3)
    for made in (first, second):
        a, b = made.batch(3, 0), made.batch(3, 0)
        made.batch(4, 1)
        assert all(torch.equal(x, y) for x, y in zip(a[:-1], b[:-1], strict=True)) and a[-1] == b[-1]
        assert not torch.equal(a[0], made.batch(4, 0)[0])
    assert len(second.kept) <= 3
    fresh = task(files, batch=1).batch(3, 0)
    assert all(torch.equal(x, y) for x, y in zip(fresh[:-1], first.batch(3, 0)[:-1], strict=True))


def test_dropped_tokens_leave_the_connector_alone(files):
    made = task(files, drop=1.0, batch=1)
    made.model.modulation_lq.linear.weight.data.normal_(0, 0.1)
    made.loss(made.batch(0, 0)).mean().backward()
    assert not made.model.connector.redux_up.weight.grad.any()
    assert made.model.condition_lq.controlnet_blocks[0].weight.grad.abs().max() > 0


def test_what_is_learned_is_looked_at_and_measured(files, tmp_path, monkeypatch):
    """The preview of a run, its files, and the evaluation that reads them."""
    made = task(files)
    object.__setattr__(made, "config", replace(made.config, steps=1))
    assert made.preview().width > 8 * 128
    for name in ("flux", "ae", "siglip"):
        (tmp_path / f"{name}.safetensors").symlink_to(weights.DEMO / f"{name}.safetensors")
    for name, path in files.items():
        (tmp_path / f"{'prompt_embeddings' if name == 'prompt' else name}.safetensors").symlink_to(path)
    monkeypatch.setattr(weights, "DEMO", tmp_path)
    made.save(tmp_path)
    Evaluate(count=1, steps=1, out=tmp_path / "out", ablations=False).run()
    table = (tmp_path / "out" / "lucidflux.md").read_text()
    assert "| fidelity 0.25 |" in table and "| the autoencoder alone |" in table
    assert (tmp_path / "out" / "lucidflux.png").exists()

    (tmp_path / "photos").mkdir()
    for i in range(12):
        Image.effect_noise((200, 150), 40 + i).convert("RGB").save(tmp_path / "photos" / f"{i}.png")
    assert niqe.main([str(tmp_path / "photos"), "--out", str(tmp_path / "niqe.npz")]) == 0
    settings = {"count": 2, "steps": 1, "ablations": False, "out": tmp_path / "photographed"}
    Evaluate(data=tmp_path / "photos", niqe=tmp_path / "niqe.npz", **settings).run()
    table = (tmp_path / "photographed" / "lucidflux.md").read_text()
    assert table.startswith("| 2 pictures | PSNR | SSIM | NIQE |") and "right" not in table
    with pytest.raises(UserError, match="holds no pictures"):
        Evaluate(data=tmp_path / "nowhere", **settings).run()


def test_times_are_those_of_the_preset():
    """At 1024 x 1024: medians and tails as lucidflux.md section 9 has them."""
    means = {kind: lucidflux.logit_mean(4096, kind) for kind in ("flux_shift", "lucidflux_released")}
    assert means["flux_shift"] == pytest.approx(1.15) and means["lucidflux_released"] == pytest.approx(3.1582, abs=1e-4)

    def below(level, mean):
        return 0.5 * (1 + math.erf((math.log(level / (1 - level)) - mean) / math.sqrt(2)))
    assert below(0.5, means["flux_shift"]) == pytest.approx(0.125, abs=1e-3)
    assert below(0.75, means["lucidflux_released"]) == pytest.approx(0.020, abs=1e-3)
    assert 1 / (1 + math.exp(-means["lucidflux_released"])) == pytest.approx(0.959, abs=1e-3)


def test_early_times_reach_the_beginning():
    """The demo's 64 tokens: where a trajectory begins, logit-normal times hardly ever are."""
    drawn = {kind: lucidflux.draw_t(4000, draws.generator("times"), 64, kind)
             for kind in ("flux_shift", "lucidflux_released", "early")}
    above = {kind: [(t > level).float().mean().item() for level in (0.85, 0.98)] for kind, t in drawn.items()}
    assert above["early"] == pytest.approx([0.43, 0.081], abs=0.005)
    assert above["flux_shift"][1] < 0.002 and above["lucidflux_released"][1] < 0.02
    assert all(t.min() > 0 and t.max() <= 1 for t in drawn.values())


def test_swinir_learns(tmp_path, monkeypatch):
    made = TrainSwinir(batch=2, pairs=2).task()
    clean, lq = ((x + 1) / 2 for x in made.batch(0, 0))

    def errors():
        with torch.no_grad():
            return [(x - clean).square().mean().item() for x in (made.model.made(lq)[0], made.model(lq))]

    optimiser, before = torch.optim.AdamW(made.trainable().parameters(), lr=2e-3), errors()
    for _ in range(8):
        loss = made.loss(made.batch(0, 0)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert all(after < 0.7 * old for after, old in zip(errors(), before, strict=True)), "what is made, and what comes out"
    monkeypatch.setattr(weights, "DEMO", tmp_path)
    made.save(tmp_path)
    saved = tmp_path / "swinir.safetensors"
    assert checkpoint.read(saved)["conv_last.weight"].dtype == torch.bfloat16

    again = TrainSwinir(batch=2, pairs=2, swinir=saved).task()
    assert {name.partition(".")[0] for name, p in again.model.named_parameters() if p.requires_grad} == {"keep"}
    kept = again.model.state_dict()
    assert all(torch.equal(kept[name].bfloat16(), tensor) for name, tensor in checkpoint.read(saved).items()
               if not name.startswith("keep."))
    with pytest.raises(UserError, match="--swinir came with --model dev"):
        TrainSwinir(model="dev", data=tmp_path, swinir=saved).task()


def folder_of(path, sizes):
    path.mkdir()
    rng = np.random.default_rng(0)
    for i, (width, height) in enumerate(sizes):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path / f"{i}.png")
    return path


def test_pictures_of_a_folder(tmp_path):
    folder = folder_of(tmp_path / "d", [(100, 70), (64, 64), (30, 90)])
    settings = TrainSwinir(data=folder, edge=64, batch=2, sharpen=False)
    pairs = Pairs(settings, 128)
    assert pairs.size == 64 and len(pairs.items) == 3
    seen = [i for step in range(3) for i in pairs.drawn(step, 0)]
    assert sorted(seen[:3]) == sorted(seen[3:]) == [0, 1, 2]
    for clean, lq in map(pairs.pair, pairs.keys(0, 0) + pairs.keys(1, 0)):
        assert clean.shape == lq.shape == (3, 64, 64)
    whole = degradation.to_unit(Image.open(folder / "1.png"))
    crop = pairs.crop(pairs.items[1], draws.rng("x"))
    assert torch.equal(crop, whole) or torch.equal(crop, whole.flip(2))
    sharp = Pairs(replace(settings, sharpen=True), 128).crop(pairs.items[1], draws.rng("x"))
    assert torch.allclose(sharp, degradation.sharpened(crop))
    assert SwinirTask(settings).held_out() == [] and SwinirTask(settings).preview().size[0] > 100


def test_mistakes_are_told(files, tmp_path):
    with pytest.raises(UserError, match="--data is missing, expected a folder of pictures for dev"):
        TrainSwinir(model="dev").task()
    with pytest.raises(UserError, match="--model fill came with lucidflux"):
        TrainSwinir(model="fill").task()
    for wrong in ({"edge": 100}, {"scale": 0}, {"clean": 2.0}, {"pairs": -1}):
        with pytest.raises(UserError):
            TrainSwinir(**wrong)
    with pytest.raises(UserError, match="--swinir .*none is not there"):
        task({**files, "swinir": tmp_path / "none"})


def test_the_verdict_and_the_table():
    scene = world.sample_scene(draws.rng("a scene"), held_out=True)
    pixels = world.render(scene)[0]
    assert verdict(pixels, scene) and not verdict(255 - pixels, scene)
    recipes = [[{"op": "motion"}, {"op": "resize", "to": 0.05}], [{"op": "dim"}, {"op": "resize", "to": 1.0}]]
    names = ("input", "SwinIR", "fidelity 0", "fidelity 1")
    lines = per_degradation(recipes, {name: [20.0, 30.0] for name in names}, {name: [True, False] for name in names})
    assert [line.split(" | ")[:3] for line in lines[2:]] == [
        ["| motion", "1", "20.0 dB, 100%"], ["| low light", "1", "30.0 dB, 0%"],
        ["| an eighth of the size or less on the way", "1", "20.0 dB, 100%"]]
    assert quality.of_pixels(quality.psnr, pixels, pixels) == float("inf") and DEMO.name == "demo"
