"""Curation: figures against their definitions, rules at their edges, what is kept, going on where it was stopped."""

import json
import time

import numpy as np
import pytest
import torch
from PIL import Image

from flux import checkpoint, clip_iqa, curation, data, degradation, draws, iqa, pictures
from flux.clip import PIXEL_MEAN, PIXEL_STD, Clip
from flux.config import ClipTextConfig, ClipVisionConfig
from flux.curation import Rules
from flux.demo import scene as world
from flux.errors import UserError
from golden import load


def noise(height, width, sigma=40, seed=0):
    grey = np.random.default_rng(seed).normal(128, sigma, (height, width, 1)).clip(0, 255)
    return grey.astype(np.uint8).repeat(3, axis=2)


def convolved(grey, kernel):
    """By the definition, in float64, borders reflected without their edge."""
    a = np.pad(grey.astype(np.float64), 1, mode="reflect")
    return sum(kernel[i][j] * a[i:i + grey.shape[0], j:j + grey.shape[1]] for i in range(3) for j in range(3))


def test_figures_are_their_definitions():
    picture = np.random.default_rng(1).integers(0, 256, (250, 490, 3), dtype=np.uint8)
    grey = iqa.gray(picture)
    expected = np.floor(picture @ np.array([0.299, 0.587, 0.114]) + 0.5)
    assert abs(grey - expected).max() <= 1 and (grey != expected).mean() < 1e-3  # a tie may fall either way
    assert iqa.blur(grey) == pytest.approx(convolved(grey, [[0, 1, 0], [1, -4, 1], [0, 1, 0]]).var(), rel=1e-12)
    smooth = grey.copy()
    smooth[:, :240] = np.linspace(90, 110, 240)
    shares = []
    for patch in (smooth[:240, :240], smooth[:240, 240:480]):
        gx = convolved(patch, [[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])
        gy = convolved(patch, [[-1, -2, -1], [0, 0, 0], [1, 2, 1]])
        shares.append(np.hypot(gx, gy).var() < 800)
    assert shares == [True, False] and iqa.flatness(smooth) == (0.5, 2)
    assert iqa.flatness(grey[:239]) == (0.0, 0)


def test_the_stand_in_prefers_clean_pictures():
    """To their degraded selves, on scenes: what the report says of it."""
    better = []
    for i in range(40):
        clean, _ = world.render(world.sample_scene(draws.rng("clarity", i)))
        steps = degradation.recipe(draws.rng("worse", i), degradation.PUBLISHED)
        worse = degradation.to_picture(degradation.apply(degradation.to_unit(Image.fromarray(clean)), steps))
        better.append(iqa.clarity(iqa.gray(clean)) > iqa.clarity(iqa.gray(np.asarray(worse))))
    assert np.mean(better) >= 0.85  # 90 % when it was written: no more than a stand-in


def row(name, **figures):
    return {"file": name, "blur": 500.0, "flat": 0.0, "patches": 4, "score": 10.0, **figures}


def test_rules_at_their_edges():
    rows = [row("a", blur=149.999), row("b", blur=150), row("c", blur=8000), row("d", blur=8000.001), row("e", flat=0.5),
            row("f", flat=0.51), {"file": "g", "broken": "x"}, row("h", score=12), row("i", score=11)]
    stages = curation.passing(rows, Rules())
    assert [[r["file"] for r in left] for _, left in stages] == [list("abcdefhi"), list("bcefhi"), list("bcehi")]
    assert [r["file"] for r in curation.best(stages[-1][1], Rules(keep=0.4))[1]] == ["h", "i"]
    assert [r["file"] for r in curation.best(rows[1:3], Rules(keep=0.5))[1]] == ["b"]
    assert [len(left) for _, left in curation.passing([], Rules())] == [0] * 3 and curation.best([], Rules())[1] == []


def written(folder):
    folder.mkdir()
    for i in range(6):
        Image.fromarray(noise(260, 300, sigma=20 + 4 * i, seed=i)).save(folder / f"p{i}.png")
    (folder / "p1.txt").write_text("a caption")
    Image.new("RGB", (300, 260), "red").save(folder / "flat.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff no picture")
    Image.new("RGB", (1, 1)).save(folder / "one.png")
    return folder


def test_a_folder_is_curated_and_trains(tmp_path, capsys):
    folder = written(tmp_path / "d")
    assert data.main(["curate", str(folder), "--keep", "0.5", "--blur", "1", "1e9", "--workers", "1"]) == 0
    kept = [json.loads(line)["file"] for line in (folder / "kept.jsonl").read_text().splitlines()]
    assert len(kept) == 3 and not {"broken.jpg", "flat.png", "one.png"} & set(kept)
    report = (folder / "curation.md").read_text()
    assert Image.open(folder / ".curation.png").width > 6 * 256  # hidden: it is no picture of the data set
    assert "| all | 9 |" in report and "broken.jpg" in report and "stand-in" in report
    items = data.find(folder / "kept.jsonl")
    assert [item.path.name for item in items] == kept
    assert {item.caption for item in items} <= {"", "a caption"}


def test_it_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    folder = written(tmp_path / "d")
    names = [item.path.name for item in data.folder(folder)]
    whole = curation.measured(folder, names, 1)
    ledger = folder / "curation.jsonl"
    lines = ledger.read_text().splitlines(keepends=True)
    ledger.write_text("".join(lines[:4]) + lines[4][:20])  # killed in the middle of a line
    seen, own = [], curation.measure
    monkeypatch.setattr(curation, "measure", lambda path: seen.append(path.name) or own(path))
    assert curation.measured(folder, names, 1) == whole
    assert len(seen) == len(names) - 4
    seen.clear()
    time.sleep(0.01)
    Image.fromarray(noise(260, 300, seed=9)).save(folder / "p2.png")
    again = curation.measured(folder, names, 1)
    assert seen == ["p2.png"] and again["p2.png"]["blur"] != whole["p2.png"]["blur"]
    seen.clear()
    curation.measured(folder, names, 1)
    assert seen == []


def test_processes_find_the_same(tmp_path):
    folder = written(tmp_path / "d")
    names = [item.path.name for item in data.folder(folder)]
    two = curation.measured(folder, names, 2)
    (folder / "curation.jsonl").unlink()
    assert curation.measured(folder, names, 1) == two


def test_clip_judges_where_its_weights_are_given(tmp_path, monkeypatch):
    """A tiny CLIP: softmax of the recorded reference's logits; the ledger keeps scores by the weights that gave them."""
    golden = load("clip_pair")

    def sized(kind, part):
        sizes = golden.config[part] | {"projection_dim": golden.config["projection_dim"]}
        return kind(**{name: value for name, value in sizes.items() if name in kind.__dataclass_fields__})
    vision = sized(ClipVisionConfig, "vision")
    clip = Clip(sized(ClipTextConfig, "text"), vision)
    clip.load_state_dict({k[5:]: v for k, v in golden.weights.items() if k.startswith("clip.")})
    edge = vision.image_size
    judge = clip_iqa.ClipIqa(clip.eval(), golden.inputs["ids"][:2], edge)
    pil = Image.fromarray(noise(edge, edge))
    mean, std = (torch.tensor(part)[:, None, None] for part in (PIXEL_MEAN, PIXEL_STD))
    pixels = (torch.from_numpy(np.array(pil)).permute(2, 0, 1) / 255 - mean) / std
    with torch.no_grad():
        a, b = clip(pixels[None], golden.inputs["ids"][:2])[0].tolist()
    assert judge(pil) == pytest.approx(1 / (1 + np.exp(b - a)), abs=1e-5)
    assert 0 <= judge(Image.new("RGB", (1, 300))) <= 1

    folder, made = written(tmp_path / "d"), []
    (tmp_path / "clip").mkdir()
    checkpoint.save(tmp_path / "clip" / "model.safetensors", {"logit_scale": torch.zeros(())})
    with pytest.raises(UserError, match="has no tower for pictures"):
        curation.curate(folder, Rules(), 1, tmp_path / "clip")
    monkeypatch.setattr(clip_iqa, "load", lambda path: lambda pil: made.append(pil.size) or float(np.asarray(pil).std()))
    for _ in range(2):
        text = curation.curate(folder, Rules((1, 1e9), keep=0.34), 1, tmp_path / "clip")
        assert "CLIP-IQA of clip" in text and len(made) == 6
    kept = [json.loads(line)["file"] for line in (folder / "kept.jsonl").read_text().splitlines()]
    assert kept == ["p4.png", "p5.png"]  # the strongest noise, for this judge


def test_mistakes_are_told(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for words in ([str(tmp_path / "none")], [str(tmp_path / "empty")]):
        assert data.main(["curate", *words]) == 2
    for words in (["--keep", "2"], ["--blur", "1"]):
        with pytest.raises(SystemExit):
            data.main(["curate", str(tmp_path / "empty"), *words])
    assert "Traceback" not in capsys.readouterr().err
    assert pictures.FORMATS
