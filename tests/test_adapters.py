"""--lora: what a user's LoRAs do to a picture, and what is said of wrong ones; `python train.py lora` end to end."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import train
from flux import checkpoint, conditioning, config, draws, flow, lora_names, pictures, weights
from flux.config import DEMO
from flux.demo import folder, pool
from flux.errors import UserError
from flux.lora_training import LoraTask, TrainLora
from flux.model import Flux
from lora import io
from lora.adapter import Adapter, LowRank


def draw(*words: str) -> np.ndarray:
    """The pixels of the last picture that this command makes."""
    sample.main([*words, "--steps", "2", "--device", "cpu"])
    return np.asarray(Image.open(sorted(Path("out").glob("*.png"))[-1]))


def lora(path: str, layers: dict[str, tuple[int, int]], rank: int = 2, dialect: str = "kohya", part: str = "flux") -> None:
    """Random, on layers of these shapes (out, in)."""
    torch.manual_seed(rank)
    adapter = Adapter({layer: (LowRank(torch.randn(rank, columns), 0.1 * torch.randn(rows, rank)),)
                       for layer, (rows, columns) in layers.items()})
    io.write(Path(path), {part: adapter}, lora_names.names(DEMO), dialect)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_loras_add_up_and_at_scale_zero_change_no_byte():
    lora("a.safetensors", {"single_blocks.0.linear2": (192, 960)})
    lora("b.safetensors", {"single_blocks.0.linear2": (192, 960), "img_in": (192, 64)}, 3, "diffusers")
    plain = draw("a red circle")
    assert np.array_equal(draw("a red circle", "--lora", "a.safetensors:0", "--lora", "b.safetensors:0"), plain)
    one, both = draw("a red circle", "--lora", "a.safetensors"), draw("a red circle", "--lora", "a.safetensors",
                                                                      "--lora", "b.safetensors:0.5")
    assert not np.array_equal(one, plain) and not np.array_equal(one, both)
    made = pictures.read_metadata(sorted(Path("out").glob("*.png"))[-1])
    assert made["config"]["lora"] == ["a.safetensors", "b.safetensors:0.5"]
    assert made["files"]["lora 2 b.safetensors"] == checkpoint.fingerprint(Path("b.safetensors"))
    sample.main(["--from", str(sorted(Path("out").glob("*.png"))[-1])])
    assert np.array_equal(np.asarray(Image.open(sorted(Path("out").glob("*.png"))[-1])), both)


def test_text_encoders_have_loras_too():
    lora("t.safetensors", {"text_model.encoder.layers.0.self_attn.q_proj": (96, 96)}, part="clip")
    lora("u.safetensors", {"encoder.block.0.layer.0.SelfAttention.v": (96, 96)}, part="t5")
    plain = draw("a red circle")
    for name in "tu":
        assert not np.array_equal(draw("a red circle", "--lora", f"{name}.safetensors"), plain)


def test_a_lora_that_widens_the_first_layer_makes_a_control_model():
    """As FLUX.1-Canny-dev-lora does: 128 inputs, a picture to follow, and not without one."""
    lora("control.safetensors", {"img_in": (192, 128)}, dialect="bfl")
    Image.new("RGB", (128, 128), (200, 10, 10)).save("red.png")
    Image.new("RGB", (128, 128), (10, 10, 200)).save("blue.png")
    red, blue = (draw("a ring", "--lora", "control.safetensors", "--control", f"{name}.png") for name in ("red", "blue"))
    assert not np.array_equal(red, blue)
    with pytest.raises(UserError, match="without a picture to follow"):
        draw("a ring", "--lora", "control.safetensors")


def test_a_lora_for_dev_goes_onto_fill():
    """Its 64 inputs are the first of Fill's 384."""
    fill = config.PRESETS["demo-fill"]
    lora("a.safetensors", {"img_in": (192, 64)})
    terms = io.read(Path("a.safetensors"), lora_names.names(fill))[0]["flux"].layers["img_in"]
    assert terms[0].shape == (192, 384) and not terms[0].A[:, 64:].any() and terms[0].A[:, :64].any()


@pytest.mark.parametrize(("word", "part"), [
    ("nowhere.safetensors", "is not there"), ("a.safetensors:11", "scale 11, expected a number from -10 to 10"),
    ("other.safetensors", "not understood.*SDXL"), ("wide.safetensors", "for 200 inputs"), ("notes.txt", "is a text"),
])
def test_wrong_files_are_told_before_any_weights_are_read(word, part, monkeypatch):
    monkeypatch.setattr(weights, "find", lambda *_: pytest.fail("weights were looked for"))
    lora("a.safetensors", {"img_in": (192, 64)})
    checkpoint.save(Path("other.safetensors"), {"lora_unet_input_blocks_1_1_proj_in.lora_down.weight": torch.zeros(2, 4)})
    checkpoint.save(Path("wide.safetensors"), {"lora_unet_txt_in.lora_down.weight": torch.zeros(2, 200),
                                               "lora_unet_txt_in.lora_up.weight": torch.zeros(192, 2)})
    Path("notes.txt").write_text("a list of LoRAs\n")
    with pytest.raises(UserError, match=part):
        draw("a ring", "--lora", word)


# --- training ---

SMALL = ("--rank", "2", "--batch", "2", "--steps", "4", "--save-every", "2", "--device", "cpu")


def test_a_lora_is_trained_saved_resumed_and_drawn_with(monkeypatch):
    monkeypatch.setitem(config.PRESETS, "demo", replace(DEMO, steps=2))  # of the preview
    folder.write(Path("data"), 6, style="stripes")
    folder.write(Path("kept"), 3)
    words = ["lora", "--data", "data", "--prior", "kept", "--plus", "4", *SMALL]
    train.main([*words, "--sample-every", "4", "--out", "whole"])
    train.main([*words, "--sample-every", "0", "--steps", "2", "--out", "halved"])
    train.main([*words, "--sample-every", "0", "--out", "halved"])
    whole, halved = (io.read(Path(f"{name}/lora/final.safetensors"), lora_names.names(DEMO))[0]["flux"]
                     for name in ("whole", "halved"))
    assert whole.layers.keys() == {name for name, layer in Flux(DEMO.flux).named_modules()
                                   if isinstance(layer, torch.nn.Linear) and "blocks" in name}
    for layer, terms in whole.layers.items():
        assert torch.equal(terms[0].B, halved.layers[layer][0].B) and terms[0].B.any() and terms[0].rank == 2
    assert whole.metadata["ss_network_dim"] == "2"
    assert '"parents": {"flux": "' in whole.metadata["minflux"]
    assert Path("whole/lora/samples/step_000004.png").exists()
    plain = draw("a red circle")
    assert not np.array_equal(draw("a red circle", "--lora", "whole/lora/final.safetensors:9"), plain)
    assert np.array_equal(draw("a red circle", "--lora", "whole/lora/final.safetensors:0"), plain)


def test_the_target_and_the_scale_are_chosen():
    folder.write(Path("data"), 2)
    settings = TrainLora(data=Path("data"), rank=4, alpha=8.0, stabilised=True, target="single.*linear1", out=Path("runs"))
    task = LoraTask(settings)
    assert {name for name, p in task.model.named_parameters() if p.requires_grad} == {
        f"single_blocks.{i}.linear1.trained.{factor}" for i in range(6) for factor in "AB"}
    assert {terms[0].scale for terms in task.adapter().layers.values()} == {8 / 4 ** 0.5}
    with pytest.raises(UserError, match="no linear layer is called like 'nothing'"):
        LoraTask(replace(settings, target="nothing"))
    with pytest.raises(UserError, match="--rank 0: expected 1 or more"):
        TrainLora(rank=0)


def test_a_lora_learns_at_strengths_that_change():
    """The loss at a strength is that of the same pairs scaled; a strength follows from the step's number."""
    folder.write(Path("data"), 2, things=1)
    settings = TrainLora(data=Path("data"), rank=2, batch=2, target="single.*linear1", weakest=0.5, strongest=1.5)
    task = LoraTask(settings)
    for pair in task.pairs.values():
        torch.nn.init.normal_(pair.B, std=0.1)
    strengths = [task.batch(step, 0)[2] for step in range(8)]
    assert len(set(strengths)) == 8 and all(0.5 <= x <= 1.5 for x in strengths)
    assert task.batch(3, 0)[2] == strengths[3] and LoraTask(replace(settings, weakest=1, strongest=1)).batch(3, 0)[2] == 1
    learned, kept, strength = task.batch(0, 0)
    task.loss((learned, kept, strength))
    task.preset = replace(task.preset, steps=2)
    task.preview()
    assert all(pair.strength == 1 for pair in task.pairs.values()), "pictures to look at are those of strength 1"
    with torch.no_grad():
        half, whole = (task.loss((learned, kept, strength)) for strength in (0.5, 1.0))
        for pair in task.pairs.values():
            pair.B.mul_(0.5)
        assert torch.allclose(task.loss((learned, kept, 1.0)), half, rtol=1e-5)
    assert not torch.allclose(half, whole, rtol=1e-3)
    for weakest, strongest in ((0.0, 1.0), (1.5, 0.5), (1.0, 0.9)):
        with pytest.raises(UserError, match="--weakest .* the weakest first"):
            TrainLora(weakest=weakest, strongest=strongest)


def test_a_lora_is_trained_at_the_guidance_it_is_drawn_with():
    """The target is the pictures' velocity and what guidance adds without the LoRA, which is not there at first."""
    folder.write(Path("data"), 2, things=1)
    settings = TrainLora(data=Path("data"), rank=2, batch=2, target="single.*linear1", weakest=0.5, guidance=2.0, guided=3.0)
    task = LoraTask(settings)
    batch = task.batch(0, 0)
    (x0, eps, t, cond), _, strength = batch
    with torch.no_grad():
        x = flow.interpolate(x0, eps, t)
        bare, told, hot = (conditioning.velocity(task.model, replace(cond, guidance=g))(x, t) for g in (1.0, 2.0, 3.0))
        first = (told - (eps - x0 + hot - bare)).square().flatten(1).mean(1)
        assert torch.allclose(task.loss(batch), first, rtol=1e-4)
        for pair in task.pairs.values():
            torch.nn.init.normal_(pair.B, std=0.1)
    losses = task.loss(batch)
    assert all(pair.strength == strength for pair in task.pairs.values())
    drawn = conditioning.velocity(task.model, cond)(x, t)
    expected = (drawn - (eps - x0 + hot - bare)).square().flatten(1).mean(1)
    assert torch.allclose(losses, expected, rtol=1e-4)
    gradients = [torch.autograd.grad(loss.mean(), list(task.pairs.parameters())) for loss in (losses, expected)]
    assert all(torch.allclose(one, other, rtol=1e-3, atol=1e-6) for one, other in zip(*gradients, strict=True))
    for wrong in (-1.0, math.inf, math.nan):
        with pytest.raises(UserError, match="--guided .*: expected a guidance"):
            replace(settings, guided=wrong)
    with pytest.raises(UserError, match="--guided 3 came without --guidance, .* add --guidance 3"):
        TrainLora(guided=3.0)
    with pytest.raises(UserError, match="schnell, which takes no guidance"):
        LoraTask(replace(settings, model="schnell"))


@pytest.mark.parametrize("words", [("--store", "fp8"), ("--store", "int8"), ("--strips",)])
def test_less_memory_nearly_the_same_picture_with_loras_too(words):
    lora("a.safetensors", {"single_blocks.0.linear2": (192, 960), "img_in": (192, 64)})
    for more in ((), ("--lora", "a.safetensors:0.5")):
        plain, less = draw("a red circle", *more).astype(float), draw("a red circle", *more, *words).astype(float)
        off = abs(plain - less)
        assert off.max() <= 1 if "--strips" in words else 0 < off.mean() < 3


def test_loras_on_a_streamed_transformer_give_the_same_picture(capsys):
    lora("a.safetensors", {"single_blocks.0.linear2": (192, 960), "img_in": (192, 64)})
    plain = draw("a red circle", "--lora", "a.safetensors:0.5")
    assert np.array_equal(draw("a red circle", "--lora", "a.safetensors:0.5", "--vram", "0.02"), plain)
    assert "plan: fp32, streamed;" in capsys.readouterr().out


def test_the_pool_trains_what_is_missing_and_says_what_it_has(monkeypatch, capsys):
    monkeypatch.setattr(pool, "POOL", Path("pool").absolute())
    words = ["demo", "pool", "--only", "candy-checks-house", "--steps", "2", "--batch", "2", "--pictures", "3"]
    train.main(words)
    (name, row), = json.loads(Path("pool/index.json").read_text()).items()
    assert (name, row["style"], row["shape"], row["kind"]) == ("candy-checks-house", "checks", "house", "style and object")
    found = io.read(Path(f"pool/{name}.safetensors"), lora_names.names(DEMO))[0]["flux"]
    assert len(found.layers) == 10 and Path(f"pool/{name}.safetensors").stat().st_size < 6e4
    assert Image.open(f"pool/{name}.png").size == (64, 64)
    before = Path(f"pool/{name}.safetensors").stat().st_mtime_ns
    train.main(words)
    assert Path(f"pool/{name}.safetensors").stat().st_mtime_ns == before
    assert len({entry.name for entry in pool.entries()}) == 96 and sum(entry.held_out for entry in pool.entries()) >= 20
    capsys.readouterr()
    train.main(["demo", "judge-pool", "--count", "2", "--steps", "1"])
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| style and object | 2 |")]
    assert len(told) == 1 and told[0].count("%") == 3, "only what is there is judged"


def test_scenes_of_a_member_are_of_its_kind():
    for entry in pool.entries()[::7]:
        rng, colours = draws.rng("kind", entry.name), pool.PALETTES[entry.palette]
        for scene in [entry.scene(rng) for _ in range(4)]:
            assert scene.style == entry.style and {scene.background, scene.things[0].colour} <= set(colours)
            assert entry.shape in ("", scene.things[0].shape)
    plain = pool.Entry("", "", "warm")
    assert all(plain.scene(draws.rng("plain", i)).held_out for i in range(8))
