"""Pairs on disk: found whole or named as what they lack; sheets there and back; the demo's edits."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flux import data, pairs, pictures
from flux.demo import edits as demo
from flux.demo import referee
from flux.errors import UserError


def picture(path, width=20, height=12, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path, quality=95)


@pytest.fixture
def folder(tmp_path):
    """Two pairs whose endings differ, with captions, in folders."""
    for i, (stem, ending) in enumerate((("a", "png"), ("b", "jpg"))):
        picture(tmp_path / "source" / f"{stem}.png", seed=i)
        picture(tmp_path / "target" / f"{stem}.{ending}", seed=i + 9)
        (tmp_path / "target" / f"{stem}.txt").write_text(f"edit {stem}\n")
    return tmp_path


def test_files_of_one_stem_belong_together(folder):
    one, other = pairs.find(folder)
    assert (one.path, one.source) == (folder / "target" / "a.png", folder / "source" / "a.png")
    assert one.caption == "edit a" and one.mask is None
    assert (other.path.name, other.source.name) == ("b.jpg", "b.png")
    for stem in "ab":
        picture(folder / "mask" / f"{stem}.png")
        (folder / "caption").mkdir(exist_ok=True)
        (folder / "caption" / f"{stem}.txt").write_text("better words")
    assert [(item.mask.name, item.caption) for item in pairs.find(folder)] == [("a.png", "better words"),
                                                                               ("b.png", "better words")]


def test_what_lacks_a_partner_is_named(folder):
    picture(folder / "target" / "c.webp")
    with pytest.raises(UserError, match=r"target/c.webp has no source \(1 have none\), expected c.png"):
        pairs.find(folder)
    (folder / "target" / "c.webp").unlink()
    picture(folder / "source" / "d.png")
    with pytest.raises(UserError, match="source/d.png has no target"):
        pairs.find(folder)
    (folder / "source" / "d.png").unlink()
    picture(folder / "mask" / "a.png")
    with pytest.raises(UserError, match="target/b.jpg has no mask"):
        pairs.find(folder)
    picture(folder / "mask" / "b.png")
    picture(folder / "mask" / "z.png")
    with pytest.raises(UserError, match="mask/z.png has no target"):
        pairs.find(folder)
    (folder / "mask" / "z.png").unlink()
    picture(folder / "source" / "a.bmp")
    with pytest.raises(UserError, match="source has a.bmp and a.png, expected one picture called a"):
        pairs.find(folder)


def test_lines_without_source_or_mask_are_named(folder):
    lines = [{"target": "target/a.png", "source": "source/a.png"}, {"target": "target/b.jpg"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(UserError, match=r"target/b.jpg has no source \(1 of 2 have none\)"):
        pairs.find(folder)
    lines[1] |= {"source": "source/b.png", "mask": "source/b.png"}
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(UserError, match=r"target/a.png has no mask and others have"):
        pairs.find(folder)


def test_sizes_that_differ_stop_the_run(folder):
    picture(folder / "source" / "b.png", width=21)
    with pytest.raises(UserError, match=r"1 of 2 pictures are broken .*b.png: 21x12; expected 20x12 like b.jpg"):
        pairs.load(folder, 16)
    picture(folder / "source" / "b.png")
    for stem in "ab":
        picture(folder / "mask" / f"{stem}.png", height=13)
    with pytest.raises(UserError, match=r"mask.*20x13; expected 20x12"):
        pairs.load(folder, 16)


def test_sheets_and_back_are_the_same_pixels(folder, capsys):
    picture(folder / "target" / "b.jpg", seed=3)
    assert data.main(["pairs", "join", str(folder / "source"), str(folder / "target"), str(folder / "sheets"),
                      "--size", "40x12"]) == 0
    assert data.main(["pairs", "split", str(folder / "sheets"), str(folder / "again")]) == 0
    before, after = pairs.find(folder), pairs.find(folder / "again")
    assert [item.caption for item in after] == ["edit a", "edit b"]
    for one, other in zip(before, after, strict=True):
        for a, b in ((one.path, other.path), (one.source, other.source)):
            assert np.array_equal(pictures.read(a), pictures.read(b))
    assert data.main(["pairs", "check", str(folder / "again"), "--edge", "16"]) == 0
    assert "2 pairs without masks; mean change " in capsys.readouterr().out


@pytest.mark.parametrize(("words", "message"), [
    (["join", "source", "mask", "out"], "TARGETS mask is no folder"),
    (["join", "source", "target", "out", "--size", "41x12"], "expected WIDTHxHEIGHT in pixels with an even width"),
    (["join", "source", "target", "out", "--size", "24x12"], "expected two of the shape of 12x12"),
    (["split", "none", "out"], "SHEETS none is no folder"),
    (["prompts", "none.json", "out"], "expected {"),
    (["prompts", "target/a.txt", "out"], "expected {"),
    (["check", "none"], "no data at none")])
def test_mistakes_get_one_line(folder, monkeypatch, capsys, words, message):
    monkeypatch.chdir(folder)
    assert data.main(["pairs", *words]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert message in said[-1] and not any("Traceback" in line for line in said)


@pytest.mark.parametrize("text", ['{"a.png": "one", "folder/b.jpg": "two "}',
                                  '{"source": "s/a.png", "target": "t/a.png", "prompt": "one"}\n'
                                  '{"source": "s/b.png", "target": "t/b.jpg", "prompt": "two"}',
                                  '[{"file": "a.png", "prompt": "one"}, {"file": "b.png", "prompt": "two"}]'])
def test_prompts_from_json(tmp_path, text):
    (tmp_path / "prompts.json").write_text(text)
    assert data.main(["pairs", "prompts", str(tmp_path / "prompts.json"), str(tmp_path / "caption")]) == 0
    assert [(tmp_path / "caption" / f"{stem}.txt").read_text() for stem in "ab"] == ["one\n", "two\n"]


def test_names_in_json_stay_inside(tmp_path):
    (tmp_path / "prompts.json").write_text('{"..": "one"}')
    assert pairs.prompts(tmp_path / "prompts.json", tmp_path) == 1 and (tmp_path / "...txt").exists()


# --- the demo's edits ---

@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("task", demo.TASKS)
def test_a_pair_is_what_it_says(task, held_out):
    for i in range(6):
        pair = demo.TASKS[task](np.random.default_rng(i), held_out)
        assert pair.asked.held_out == held_out
        assert referee.judge(pair.target, pair.asked).right and not referee.judge(pair.source, pair.asked).right
        if task == "circle":
            thing, = pair.asked.things
            assert pair.prompt == f"{thing.colour} circle with {pair.asked.background} background" and pair.mask is None
            assert (pair.source[0] == 0).all() and 0.01 < (pair.source > 128).mean() < 0.1
            continue
        changed = (pair.source != pair.target).any(-1)
        assert changed.any() and not changed[pair.mask == 0].any() and set(np.unique(pair.mask)) == {0, 255}


def test_the_outline_lies_on_the_circle():
    pair = demo.circle(np.random.default_rng(5), False)
    thing, = pair.asked.things
    rows, columns = np.nonzero(pair.source[..., 0] > 200)
    gaps = abs(np.hypot((columns + 0.5) / 128 - thing.x, (rows + 0.5) / 128 - thing.y) - thing.radius) * 128
    assert gaps.max() <= demo.OUTLINE + 0.5 and len(rows) > 2 * np.pi * thing.radius * 128


def test_a_folder_of_pairs_is_found_again(tmp_path):
    for task, masks in (("circle", False), ("remove", True)):
        assert demo.main([str(tmp_path / task), "--task", task, "--count", "3"]) == 0
        items = pairs.load(tmp_path / task, 128)
        assert len(items) == 3 and all(bool(item.mask) == masks for item in items)
        records = list(map(json.loads, Path(tmp_path / task / "metadata.jsonl").read_text().splitlines()))
        assert [demo.asked(record["asked"]) for record in records] == [
            demo.TASKS[task](demo.draws.rng("edit", task, 0, i, 0), False).asked for i in range(3)]
