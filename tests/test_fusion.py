"""--fuse in the demo, gates that are trained a few steps, and sample.py autolora: by the commands that a user types."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from flux import cli, fusion, pictures, weights
from flux.config import preset
from flux.demo import fusion_stage, fusion_trial
from flux.demo import scene as world
from flux.demo.pool import POOL
from flux.errors import UserError
from lora import gates

STYLE, OBJECT = (str(POOL / f"{name}.safetensors") for name in ("warm-stripes", "warm-arrow"))


def command(recipe: str, **values):
    path = cli.recipes()[recipe]
    return cli.build(path, cli.describe(path).sample, values)


def drawn(**values) -> tuple[np.ndarray, dict]:
    pil, metadata = next(iter(command("t2i", prompt=("a red arrow",), steps=2, **values).images()))
    return np.asarray(pil), metadata


@pytest.mark.parametrize(("settings", "why"), [
    ({"fuse": "product"}, "expected one of sum"), ({"fuse": "mean:x"}, "expected one of sum"),
    ({"fuse": "mean", "gate_report": True}, "expected --fuse gates"), ({"fuse": "gates", "model": "dev"}, "without a file"),
    ({"fuse": "switch", "compile": True}, "leave the other out"),
    ({"fuse": "composite", "reuse": 0.1}, "leave the other out"), ({"fuse": "gates:no/such.safetensors"}, "no/such")])
def test_what_fuse_refuses(settings, why):
    with pytest.raises(UserError, match=why):
        fusion.read(command("t2i", **settings))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    train.main(["autolora", "fusion", "--steps", "2", "--batch", "1", "--extra-every", "2", "--teacher", "0.5",
                "--threads", "1", "--out", str(out)])
    return out / "autolora-fusion" / "final.safetensors"


def test_gates_are_trained_and_drawn_with(trained):
    """They change what two LoRAs draw, nothing of what one draws, and say by block and step how much passed."""
    fuse = f"gates:{trained}"
    alone, _ = drawn(lora=(STYLE,), fuse=fuse)
    assert np.array_equal(alone, drawn(lora=(STYLE,))[0])
    both, metadata = drawn(lora=(STYLE, OBJECT), fuse=fuse, gate_report=True)
    assert not np.array_equal(both, drawn(lora=(STYLE, OBJECT))[0])
    table = metadata["gates"]
    assert table["blocks"] == [f"single_blocks.{i}" for i in range(1, 6)] and len(table["times"]) == 2
    names = ["1 warm-stripes.safetensors", "2 warm-arrow.safetensors"]
    assert [np.shape(table[name]) for name in names] == [(5, 2)] * 2 and 0.3 < np.mean(table[names[0]]) < 1.5
    assert fusion.heat_map(table).size[0] > 100
    assert "gates" in metadata["files"]
    (trained.parent / "final.encoder.safetensors").rename(trained.parent / "gone")
    try:
        with pytest.raises(UserError, match="not beside it"):
            drawn(lora=(STYLE, OBJECT), fuse=fuse)
    finally:
        (trained.parent / "gone").rename(trained.parent / "final.encoder.safetensors")


def test_static_looks_at_each_picture_alone(trained):
    """A picture is the same in a batch and alone."""
    settings = {"lora": (STYLE, OBJECT), "fuse": f"static:{trained}", "steps": 2}
    both = [np.asarray(pil) for pil, _ in command("t2i", prompt=("a red arrow", "a blue heart"), **settings).images()]
    second, _ = next(iter(command("t2i", prompt=("a blue heart",), **settings, seed=1).images()))
    assert np.array_equal(both[1], np.asarray(second))


def test_held_out_pairs_are_never_trained_on():
    settings = fusion_stage.TrainFusion()
    task = fusion_stage.FusionTask.__new__(fusion_stage.FusionTask)
    members = [one for one in fusion_stage.pool(POOL) if not one.held_out]
    task.settings = settings
    task.members = [one for one in members if not fusion_stage.held_out(*fusion_stage.taught(one))]
    task.styles = [one for one in task.members if fusion_stage.taught(one)[0] and not fusion_stage.taught(one)[1]]
    task.objects = [one for one in task.members if fusion_stage.taught(one)[1] and not fusion_stage.taught(one)[0]]
    shown = {(scene.style, scene.things[0].shape) for step in range(60) for scene in task.example(step).scenes}
    both = [pair for pair in shown if pair[0] and pair[1] in world.NEW_SHAPES]
    assert len(both) > 15 and not any(fusion_stage.held_out(*pair) for pair in both)
    asked = {(case.style, case.shape) for case in fusion_trial.cases(POOL, 40, 1, 2, 0)}
    assert len(asked) > 8 and all(fusion_stage.held_out(*pair) for pair in asked)
    assert all(len(case.members) == 4 for case in fusion_trial.cases(POOL, 4, 1, 2, 0))


def test_an_object_has_its_share_of_the_loss():
    mask = np.zeros((64, 48), np.float32)
    mask[20:40, 17:31] = 1  # touches two of the twelve tokens
    for focus, of_two in ((0.5, 0.5), (0.8, 0.8), (0.0, 2 / 12)):
        weights_ = fusion_stage.token_weights(mask, focus)
        assert weights_.mean().item() == pytest.approx(1) and len(weights_) == 12
        assert weights_[[4, 7]].sum().item() == pytest.approx(12 * of_two)
    assert torch.equal(fusion_stage.token_weights(mask * 0, 0.5), torch.ones(12))


def test_a_term_left_out(trained):
    read, _ = gates.load(trained, fusion.lora_layers.layers(preset("demo").flux), {})
    with torch.no_grad():
        for parameter in read.parameters():
            parameter += 0.1
    for term in ("weight_cross", "time", "gain", "mix"):
        for name, tensor in fusion_trial.without(read, term).state_dict().items():
            assert torch.equal(tensor, read.state_dict()[name]) != (name.split(".")[2:3] == [term]), name


def test_an_interval_by_hand():
    low, high = fusion_trial.interval(np.array([[1.0, 1.0], [0.0, 0.0]]))
    assert (low, high) == (0.0, 1.0)
    assert fusion_trial.interval(np.full((5, 2), 0.5)) == (0.5, 0.5)


# --- sample.py autolora ---

@pytest.fixture
def pool(tmp_path) -> Path:
    folder = tmp_path / "pool"
    folder.mkdir()
    for name in ("warm-stripes", "warm-arrow", "cold-frost"):
        shutil.copy(POOL / f"{name}.safetensors", folder)
    shutil.copy(POOL / "cold-frost.safetensors", folder / "copy.safetensors")
    (folder / "broken.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    (folder / "a\nb.safetensors").write_bytes(b"")
    rows = json.loads((POOL / "index.json").read_text())
    names = ("warm-stripes", "warm-arrow", "cold-frost")
    (folder / "index.json").write_text(json.dumps({name: rows[name] for name in names}))
    return folder


def test_auto_says_what_it_would_take(pool, capsys):
    assert list(command("autolora", prompt=("a warm arrow",), pool=pool, dry_run=True, min_sim=-1.0).images()) == []
    said = capsys.readouterr().out
    assert "3 LoRAs; 3 new, 0 gone, 1 copies, 2 refused" in said
    assert "refused: broken.safetensors" in said and "\nb" not in said
    assert said.count("similarity") == 3
    list(command("autolora", prompt=("a warm arrow",), pool=pool, dry_run=True, min_sim=-1.0, max_loras=2,
                 exclude=("warm-stripes",), budget_mb=0.06).images())
    said = capsys.readouterr().out
    assert said.count("similarity") == 1 and "warm-stripes" not in said.replace("pool", "")
    (pool / "cold-frost.safetensors").unlink()
    (pool / "copy.safetensors").unlink()
    list(command("autolora", prompt=("a warm arrow",), pool=pool, dry_run=True, min_sim=1.0).images())
    said = capsys.readouterr().out
    assert "1 gone" in said and "no LoRA is near enough" in said


def test_auto_draws_and_maps_its_gates(pool, trained, tmp_path, capsys):
    given = command("autolora", prompt=("a red arrow",), pool=pool, min_sim=-1.0, max_loras=1, always=(STYLE,), steps=1,
                    kind=("object",), out=tmp_path / "out", fuse=f"gates:{trained}")
    for pil, metadata in given.images():
        path = pictures.next_path(given.out, metadata["seed"])
        pictures.write_png(path, pil, None)
    assert [one["id"] for one in metadata["loras"]] == ["warm-arrow"]
    assert path.with_name(f"{path.stem}_gates.png").is_file() and "warm-stripes.safetensors" in capsys.readouterr().out


def test_an_empty_pool_means_plain_sampling(tmp_path, capsys):
    (tmp_path / "none").mkdir()
    pil, metadata = next(iter(command("autolora", prompt=("a red circle",), pool=tmp_path / "none", steps=1).images()))
    assert "has no LoRAs" in capsys.readouterr().out and metadata["loras"] == []
    assert np.array_equal(np.asarray(pil), np.asarray(next(iter(command(
        "t2i", prompt=("a red circle",), steps=1).images()))[0]))


def test_the_shipped_weights_are_small():
    assert (weights.DEMO / fusion.ENCODER).stat().st_size <= 2e6
