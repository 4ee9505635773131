"""The road of a prompt, on the shipped demo weights: the same command gives the same bytes, and mistakes are one line."""

import errno
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from flux import conditioning, flow, latents, pictures, weights
from flux.config import DEMO, PRESETS
from flux.demo.scene import SHAPES
from flux.errors import UserError
from flux.recipes import t2i

PROMPT = "a red circle on a blue background"


@pytest.fixture(scope="module")
def demo():
    found = weights.find(DEMO)
    encoders = conditioning.TextEncoders(found, DEMO, torch.float32, torch.device("cpu"))
    return encoders, weights.load_flux(found, DEMO.flux, torch.float32), weights.load_autoencoder(found, DEMO.autoencoder)


def run(*words: object) -> None:
    sample.main([str(word) for word in words])


def drawn(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*_seed*.png") if "sheet" not in path.name)


def test_a_prompt_becomes_a_picture_that_says_how_it_was_made(tmp_path):
    run(PROMPT, "--seed", 3, "--steps", 2, "--out", tmp_path)
    path, = drawn(tmp_path)
    assert path.name == "00001_seed3.png" and Image.open(path).size == (DEMO.width, DEMO.height)
    made = pictures.read_metadata(path)
    assert (made["recipe"], made["prompt"], made["seed"], made["steps"]) == ("t2i", PROMPT, 3, 2)
    assert set(made["files"]) == {"flux", "ae", "clip", "t5"}
    assert Image.open(path).text["parameters"].startswith(f"{PROMPT}\nSteps: 2, Sampler: Euler")
    assert "out" not in made["config"] and str(tmp_path) not in json.dumps(made)
    assert [file.name for file in tmp_path.glob("*.toml")] == ["00001_seed3.toml"]


def test_the_same_command_gives_the_same_bytes(tmp_path):
    for folder in ("a", "b"):
        run(PROMPT, "--steps", 3, "--out", tmp_path / folder)
    run("--from", drawn(tmp_path / "a")[0], "--out", tmp_path / "c")
    run("--config", drawn(tmp_path / "a")[0].with_suffix(".toml"), "--out", tmp_path / "d")
    first = drawn(tmp_path / "a")[0].read_bytes()
    assert all(drawn(tmp_path / folder)[0].read_bytes() == first for folder in "bcd")


def test_given_times_are_remembered(tmp_path):
    run(PROMPT, "--times", "1,0.6,0", "--out", tmp_path / "a")
    path, = drawn(tmp_path / "a")
    made = pictures.read_metadata(path)
    assert made["steps"] == 2 and made["config"]["times"] == "1,0.6,0"
    run("--from", path, "--out", tmp_path / "b")
    assert drawn(tmp_path / "b")[0].read_bytes() == path.read_bytes()


def test_another_seed_or_prompt_gives_another_picture(tmp_path):
    run(PROMPT, "--steps", 3, "--out", tmp_path)
    run(PROMPT, "--steps", 3, "--seed", 1, "--out", tmp_path)
    run("a white star", "--steps", 3, "--out", tmp_path)
    assert len({Image.open(path).tobytes() for path in drawn(tmp_path)}) == 3


def test_a_picture_is_the_same_alone_or_among_others(demo):
    """To 1e-5 in float32: matrix products of other sizes sum in another order."""
    encoders, model, autoencoder = demo
    prompts = [PROMPT, "a white star", "two words"]
    times = flow.schedule(4, 64)

    @torch.inference_mode()
    def draw(rows: list[int]):
        features = [encoders([prompts[i]]) for i in rows]
        txt, vec = (torch.cat(part) for part in zip(*features, strict=True))
        noise = torch.cat([latents.noise(1, 128, 128, torch.Generator().manual_seed(7 + i)) for i in rows])
        cond = conditioning.condition(txt, vec, 128, 128, 3.0)
        return flow.euler(conditioning.velocity(model, cond), latents.pack(noise), times)

    together = draw([0, 1, 2])
    for i in range(3):
        alone = draw([i])[0]
        assert (alone - together[i]).abs().max() <= 1e-5 * alone.abs().max()


def test_num_counts_seeds_up_and_batches_do_not_matter(tmp_path):
    run(PROMPT, "--num", 3, "--batch", 2, "--seed", 5, "--steps", 2, "--out", tmp_path / "all")
    assert sorted(path.name for path in (tmp_path / "all").glob("*.png")) == [
        "00001_seed5.png", "00001_seed5_sheet.png", "00002_seed6.png", "00003_seed7.png"]
    for i, path in enumerate(drawn(tmp_path / "all")):
        run(PROMPT, "--seed", 5 + i, "--steps", 2, "--out", tmp_path / str(i))
        alone = np.asarray(Image.open(drawn(tmp_path / str(i))[0]), int)
        assert abs(alone - np.asarray(Image.open(path), int)).max() <= 1
        assert pictures.read_metadata(path)["config"]["seed"] == 5 + i and pictures.read_metadata(path)["config"]["num"] == 1


def test_prompts_come_from_a_file_too(tmp_path):
    (tmp_path / "prompts.txt").write_text("# all of them\na red ring\n\na star # a comment\n", encoding="utf-8")
    command = t2i.TextToImage(prompt=("first",), prompts=tmp_path / "prompts.txt")
    assert command.all_prompts() == ["first", "a red ring", "a star"]
    with pytest.raises(UserError, match="no such file"):
        t2i.TextToImage(prompts=tmp_path / "absent.txt").all_prompts()


def test_without_a_prompt_the_demo_shows_itself():
    prompts = t2i.TextToImage().all_prompts()
    assert len(prompts) == 16 and any(shape in prompt for prompt in prompts for shape in SHAPES)
    with pytest.raises(UserError, match="no prompt for dev"):
        t2i.TextToImage(model="dev").all_prompts()


def test_a_long_prompt_warns_once_and_says_what_was_dropped(capsys, demo):
    encoders = demo[0]
    encoders(["a red circle " * 30 + "at the end"] * 2)
    told = capsys.readouterr().err
    assert told.count("warning:") == 1 and "CLIP reads 77 of its" in told and "T5 reads 24 of its" in told
    assert told.count("\n") == 1 and "at the end" in told
    encoders([PROMPT])
    assert not capsys.readouterr().err


@pytest.mark.parametrize(("words", "said"), [
    (("--width", 100), "--width 100.*multiple of 16.*96"),
    (("--height", 0), "--height 0"),
    (("--steps", 0), "--steps 0.*1 or more"),
    (("--model", "flux9"), "model 'flux9'.*expected one of demo, dev"),
    (("--model", "dev", "a", "--weights", "nowhere"), "nowhere.*no folder"),
    (("--stepz", 4), "--stepz.*--steps"),
    (("--ae", "nowhere.safetensors"), "nowhere.safetensors"),
    (("--device", "cuda:99"), "--device cuda:99"),
    (("--from", "nowhere.png"), "nowhere.png"),
])
def test_mistakes_are_one_line(words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said) as caught:
        run(*words, "--out", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_weights_of_another_model_are_named(tmp_path):
    found = weights.find(DEMO)
    with pytest.raises(UserError, match="FLUX.1 transformer"):
        run(PROMPT, "--flux", found["ae"].path, "--out", tmp_path)
    with pytest.raises(UserError, match="does not fit FLUX.1 schnell, it looks like dev"):
        weights.load_flux(found, PRESETS["schnell"].flux)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(pictures.os, "fsync", full)
    with pytest.raises(UserError, match="disk full while writing.*bytes were needed"):
        run(PROMPT, "--steps", 1, "--out", tmp_path)
    assert not list(tmp_path.iterdir())


def test_every_preset_has_consistent_sizes():
    for preset in PRESETS.values():
        assert preset.flux.context_in_dim == preset.t5.d_model and preset.flux.vec_in_dim == preset.clip.hidden_size
        assert preset.flux.out_channels == 4 * preset.autoencoder.z_channels and preset.autoencoder.downsampling == 8
    with pytest.raises(UserError, match="must sum to"):
        replace(DEMO.flux, num_heads=5)
