"""Data sets: names stay inside the folder, broken files are counted, batches follow from the step number alone."""

import hashlib
import io
import itertools
import json
import math
import os
import random
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flux import cache, data, pictures
from flux.data import Item
from flux.errors import UserError

ROOT = Path(__file__).parents[1]


def picture(path, size=(64, 48), colour="red"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_folder_takes_pictures_with_their_captions_by_name(tmp_path):
    for name in ("b.PNG", "a.jpg", "c.webp", ".hidden.png", "below/d.png"):
        picture(tmp_path / name)
    (tmp_path / "a.txt").write_text("\ufeffa red wall, 日本\n", encoding="utf-8")
    (tmp_path / "c.txt").write_text("  \n")
    (tmp_path / "notes.md").write_text("no picture")
    assert data.find(tmp_path) == [Item(tmp_path / "a.jpg", "a red wall, 日本"), Item(tmp_path / "b.PNG"),
                                   Item(tmp_path / "c.webp")]


def test_jsonl_gives_pictures_and_pairs_in_its_order(tmp_path):
    index = lines(tmp_path / "metadata.jsonl", {"file": "z.png", "prompt": " a wall "}, {"file": "a.png", "width": 8},
                  {"source": "s/1.png", "target": "t/1.png", "mask": "m/1.png", "prompt": "make it blue"})
    index.write_bytes(b"\xef\xbb\xbf" + index.read_bytes() + b"\n")  # as Windows editors write it
    expected = [Item(tmp_path / "z.png", "a wall"), Item(tmp_path / "a.png"),
                Item(tmp_path / "t/1.png", "make it blue", tmp_path / "s/1.png", tmp_path / "m/1.png")]
    assert data.find(index) == data.find(tmp_path) == expected


@pytest.mark.parametrize("line, words", [
    ("{", "line 2"), ("[1]", "either `file` or `target`"), ('{"prompt": "x"}', "either `file` or `target`"),
    ('{"file": "a.png", "target": "a.png"}', "either"), ('{"file": 3}', "`file` is a int"),
    ('{"file": ""}', "is empty"),
    ('{"file": "a.png", "prompt": ["x"]}', "`prompt` is a list"), ("[" * 100_000, "line 2"), ('"\\xff"', "line 2")])
def test_a_broken_line_is_named(tmp_path, line, words):
    index = tmp_path / "metadata.jsonl"
    index.write_bytes(b'{"file": "a.png"}\n' + line.encode().replace(b"\\xff", b"\xff") + b"\n")
    with pytest.raises(UserError, match=words) as caught:
        data.find(index)
    assert "line 2" in str(caught.value)


HOSTILE = ["../out.png", "a/../../out.png", "/etc/passwd", "..", "..\\out.png", "a\\..\\..\\out.png", "C:\\out.png",
           "C:out", "\\\\host\\share\\x.png", "link/out.png", "link.png", "a\0.png", "\ud800.png"]


@pytest.mark.parametrize("key", ["file", "source", "mask"])
@pytest.mark.parametrize("name", HOSTILE)
def test_names_from_outside_stay_inside(tmp_path, name, key):
    root = tmp_path / "data"
    picture(tmp_path / "out.png")
    picture(root / "in.png")
    (root / "link").symlink_to(tmp_path)
    (root / "link.png").symlink_to(tmp_path / "out.png")
    with pytest.raises(UserError, match="line 1.*leads out of the data folder"):
        data.find(lines(root / "metadata.jsonl", {"file": "in.png", key: name}))


def hostile_names(count):
    """Variations of the above: other depths, endings, slashes, characters that are dots or slashes only to the eye."""
    rng = random.Random(0)
    parts = ["..", ".", "", "a", "..\\..", "....", "\u2024\u2024", "\uff0f", "%2e%2e", "~", "con", "\x00", "\x1b[2J",
             "x" * 300, "link", "/etc", "C:", "\ud800", "b.png\n../c"]
    for _ in range(count):
        start = rng.choice(["", "/", "\\", "//", "C:\\", "./"])
        yield start + "/".join(rng.choices(parts, k=rng.randint(1, 5))) + "/out.png"


def test_two_hundred_hostile_names(tmp_path):
    """P11: in a metadata.jsonl each is refused by name or is a place inside; in an archive none is a place at all."""
    root = tmp_path / "data"
    picture(tmp_path / "out.png", colour="blue")
    picture(root / "in.png")
    (root / "link").symlink_to(tmp_path)
    names, refused, before = list(hostile_names(200)), 0, sorted(tmp_path.rglob("*"))
    for name in names:
        try:
            item, = data.find(lines(root / "metadata.jsonl", {"file": name}))
        except UserError as error:
            refused += "leads out of the data folder" in str(error)
            continue
        assert Path(os.path.realpath(item.path)).is_relative_to(root), name
        assert len(data.survey([item], 64).broken) == 1, f"there is no such file inside: {name!r}"
    assert refused > 100
    (root / "metadata.jsonl").unlink()
    names = [name.replace("\ud800", "?").replace("\0", "?") for name in names]  # which no archive can hold
    items = data.find(tar(tmp_path / "hostile.tar", [(name, png("red")) for name in names]))
    assert len(items) == 200 and {pictures.read(item.path).getpixel((0, 0)) for item in items} == {(255, 0, 0)}
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "hostile.tar"])


def png(colour, size=(64, 48)):
    data = io.BytesIO()
    Image.new("RGB", size, colour).save(data, "png")
    return data.getvalue()


def tar(path, files, **how):
    with tarfile.open(path, **{"mode": "w", **how}) as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def test_shards_give_samples_as_a_folder_does(tmp_path):
    """Long names and other archives' extensions too; what belongs to no picture is passed over."""
    files = [("a/1.txt", b"a red wall"), ("a/1.png", png("red")), ("a/2.json", b'{"prompt": "blue", "x": 1}'),
             ("a/2.JPG", png("blue")), ("a/3.png", png("green")), ("notes.md", b"text"), ("4.source.png", png("black")),
             ("4.mask.png", png("white")), ("4.webp", png("white")), ("4.txt", b""), ("y" * 200 + ".png", png("white"))]
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        items = data.find(tar(tmp_path / "one.tar", files, format=form))
        assert [item.caption for item in items] == ["a red wall", "blue", "", "", ""]
        assert [pictures.read(item.path).getpixel((3, 3)) for item in items[:3]] == [(255, 0, 0), (0, 0, 255), (0, 128, 0)]
        pair = items[3]
        assert [pictures.read(part).getpixel((0, 0))[0] for part in (pair.source, pair.mask)] == [0, 255]
        assert all(item.source is None for item in items[:3])
    picture(tmp_path / "0.png", size=(48, 64))
    assert [Path(item.path.name).name for item in data.find(tmp_path)][:3] == ["0.png", "1.png", "2.JPG"]
    found = data.load(tmp_path, 64)
    batch = next(data.batches(found, 4, 0))
    assert data.images(batch).shape[0] == len(batch) and str(found[1].path).endswith("one.tar:a/1.png")
    assert cache.content(found[1].path) == hashlib.sha256(png("red")).hexdigest()


@pytest.mark.parametrize("harm, words", [("cut", "whole, uncompressed tar"), ("gz", "uncompressed tar"),
                                         ("text", "tar archive"), ("json", "its .json is none"),
                                         ("list", "expected an object with a `prompt`"),
                                         ("utf", "expected a caption in UTF-8"), ("long", "at most")])
def test_a_broken_shard_is_named(harm, words, tmp_path):
    path = tmp_path / "x.tar"
    extra = {"json": ("1.json", b"{"), "list": ("1.json", b"[1]"), "utf": ("1.txt", b"\xff"),
             "long": ("1.txt", b"x" * 2**21)}
    tar(path, [("1.png", png("red")), extra.get(harm, ("1.txt", b"red")), ("2.png", png("red", (640, 480)))])
    if harm == "cut":
        path.write_bytes(path.read_bytes()[:2600])
    elif harm == "gz":
        tar(path, [("1.png", png("red"))], mode="w:gz")
    elif harm == "text":
        path.write_text("no archive" * 200)
    with pytest.raises(UserError, match=words) as caught:
        data.find(path)
    assert str(path) in str(caught.value)


def test_a_broken_picture_in_a_shard_is_counted(tmp_path):
    path = tar(tmp_path / "x.tar", [("1.png", png("red")), ("2.png", b"no picture"), ("3.png", b"")])
    found = data.survey(data.find(path), 64)
    assert len(found.items) == 1
    assert all(f"x.tar:{i}.png" in words for i, words in zip((2, 3), found.broken, strict=True))


def test_what_is_held_out_stays_so_when_data_grow(tmp_path):
    items = [Item(tmp_path / f"{i}.png") for i in range(100)]
    train, apart = data.hold_out(items, 0.1)
    assert len(apart) == 10 and len(train) == 90 and not set(train) & set(apart)
    assert data.hold_out(items[:9], 0.1)[1] == [] and data.hold_out([], 0.5) == ([], [])
    grown = [*items, *(Item(tmp_path / f"new {i}.png") for i in range(10))]
    assert len(set(data.hold_out(grown, 0.1)[1]) & set(apart)) >= 8
    moved = [Item(tmp_path / "elsewhere" / item.path.name) for item in items]
    assert [item.path.name for item in data.hold_out(moved, 0.1)[1]] == [item.path.name for item in apart]


@pytest.mark.parametrize("name", ["x" * 300 + ".png", ".", "loop.png", "missing.png"])
def test_names_that_are_no_picture_are_broken_items(tmp_path, name):
    (tmp_path / "loop.png").symlink_to("loop.png")
    item, = data.find(lines(tmp_path / "metadata.jsonl", {"file": name}))
    assert len(data.survey([item], 64).broken) == 1


def test_links_within_the_folder_are_welcome_and_out_of_it_are_not(tmp_path):
    root = tmp_path / "data"
    picture(root / "sub" / "a.png")
    (root / "b.png").symlink_to("sub/a.png")
    (tmp_path / "alias").symlink_to(root)
    assert [item.path.name for item in data.find(tmp_path / "alias")] == ["b.png"]
    (tmp_path / "secret.txt").write_text("secret")
    (root / "b.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(UserError, match=r"b\.txt.*leads out"):
        data.find(root)
    (root / "b.txt").unlink()
    (root / "metadata.jsonl").symlink_to(lines(tmp_path / "other.jsonl", {"file": "b.png"}))
    with pytest.raises(UserError, match="leads out"):
        data.find(root)


def test_where_there_is_no_data_it_says_so(tmp_path):
    with pytest.raises(UserError, match="no data at"):
        data.find(tmp_path / "missing")
    with pytest.raises(UserError, match="no pictures in"):
        data.find(tmp_path)
    picture(tmp_path / "a.png")
    for text in (b"\xff\xfe", b"x" * (1 << 21)):
        (tmp_path / "a.txt").write_bytes(text)
        with pytest.raises(UserError, match=r"a\.txt.*UTF-8"):
            data.find(tmp_path)


def dataset(tmp_path, good, broken):
    for i in range(good):
        picture(tmp_path / f"{i:03d}.png")
        (tmp_path / f"{i:03d}.txt").write_text("a wall")
    for i in range(broken):
        (tmp_path / f"broken{i}.png").write_bytes(b"<html>")
    return tmp_path


def test_broken_files_are_skipped_counted_and_listed(tmp_path, capsys):
    items = data.load(dataset(tmp_path, 19, 1), 64)  # exactly 5 %
    assert len(items) == 19 and {item.size for item in items} == {data.bucket(64, 48, 64)}
    text = capsys.readouterr().err
    assert "1 broken, skipped:" in text and "broken0.png: no picture" in text and "19 pictures to use" in text


def test_more_than_five_percent_broken_stops_the_run(tmp_path):
    with pytest.raises(UserError, match=r"2 of 21 pictures are broken \(.*broken0\.png"):
        data.load(dataset(tmp_path, 19, 2), 64)


def test_survey_names_missing_and_long_captions_small_pictures_and_unequal_pairs(tmp_path):
    for name, size in (("a.png", (256, 256)), ("b.png", (256, 256)), ("small.png", (32, 32)), ("s.png", (255, 256))):
        picture(tmp_path / name, size)
    found = data.survey([Item(tmp_path / "a.png", "x" * 2001), Item(tmp_path / "b.png"),
                         Item(tmp_path / "small.png", "x"), Item(tmp_path / "b.png", "x", source=tmp_path / "s.png"),
                         Item(tmp_path / "b.png", "x", mask=tmp_path / "a.png")], 64)
    assert found.long == [str(tmp_path / "a.png")] and found.uncaptioned == [str(tmp_path / "b.png")]
    assert found.enlarged == [str(tmp_path / "small.png")]
    assert len(found.broken) == 1 and "s.png: 255x256; expected 256x256 like b.png" in found.broken[0]
    assert [item.size for item in found.items] == [(64, 64)] * 4


@pytest.mark.parametrize("edge", [64, 128, 512, 1024])
def test_buckets_are_multiples_of_16_of_the_asked_area(edge):
    sizes = data.buckets(edge)
    assert (edge, edge) in sizes and all((h, w) in sizes for w, h in sizes)
    for w, h in sizes:
        assert w % 16 == h % 16 == 0 and max(w, h) <= 4 * min(w, h)
        assert abs(w * h / edge**2 - 1) <= 16 / edge + 1e-9


def test_a_picture_goes_to_the_bucket_of_its_aspect():
    cases = {(1000, 1000): (512, 512), (4000, 3000): (592, 448), (3000, 4000): (448, 592), (1920, 1080): (688, 384),
             (1, 20_000): (256, 1024), (20_000, 1): (1024, 256), (64, 64): (512, 512)}
    for size, expected in cases.items():
        w, h = data.bucket(*size, 512)
        assert (w, h) == expected, size
        if max(size) <= 4 * min(size):
            assert abs(math.log(w * size[1] / (h * size[0]))) < 0.03


def test_fit_scales_and_crops_the_centre():
    left_to_right = np.tile(np.arange(200, dtype=np.uint8), (100, 1))
    pil = Image.fromarray(left_to_right).convert("RGB")
    fitted = np.asarray(data.fit(pil, (48, 48)))[24, :, 0].astype(int)
    assert fitted.shape == (48,) and abs(fitted[0] - 50) <= 2 and abs(fitted[-1] - 149) <= 2
    checkers = Image.fromarray((np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)).convert("RGB")
    assert np.abs(np.asarray(data.fit(checkers, (32, 32))).astype(int) - 127).max() <= 3  # antialiased: grey, no moire
    assert data.fit(Image.new("RGB", (1, 20_000)), (16, 64)).size == (16, 64)


def items_of(counts):
    return [Item(Path(f"{w}x{h}_{i}"), size=(w, h)) for (w, h), count in counts.items() for i in range(count)]


ITEMS = items_of({(64, 64): 10, (80, 48): 7, (48, 80): 1})


def first(count, *arguments):
    return list(itertools.islice(data.batches(*arguments), count))


def test_an_epoch_has_every_item_once_and_one_bucket_per_batch():
    epoch = data.epoch(ITEMS, 4, seed=1, number=0)
    assert Counter(item for batch in epoch for item in batch) == Counter(ITEMS)
    assert all(len({item.size for item in batch}) == 1 for batch in epoch)
    assert sorted(len(batch) for batch in epoch) == [1, 2, 3, 4, 4, 4]


def test_order_depends_on_seed_and_epoch_and_on_nothing_else():
    whole = first(40, ITEMS, 4, 1)
    assert whole == first(40, ITEMS, 4, 1)
    assert whole[:6] != whole[6:12] != whole[12:18] and whole != first(40, ITEMS, 4, 2)
    assert data.epoch(ITEMS, 4, 1, 1) == whole[6:12]
    np.random.seed(0)
    assert whole == first(40, ITEMS, 4, 1)
    # recorded: were it to change with a release, a run could not be resumed across it
    assert [[item.path.name for item in batch] for batch in whole[:2]] == [["64x64_6", "64x64_3"], ["48x80_0"]]


def test_resuming_at_any_step_continues_with_the_same_batches():
    whole = first(40, ITEMS, 4, 1)
    for step in range(30):
        assert first(5, ITEMS, 4, 1, step) == whole[step:step + 5]


def test_the_fixed_order_of_the_folder_does_not_depend_on_the_file_system(tmp_path, monkeypatch):
    names = ["b.png", "a.png", "c.png"]
    for name in names:
        picture(tmp_path / name)
    monkeypatch.setattr(os, "listdir", lambda folder: names)
    assert [item.path.name for item in data.find(tmp_path)] == ["a.png", "b.png", "c.png"]


def test_tensors_of_a_batch(tmp_path):
    import torch

    picture(tmp_path / "t.png", (200, 200), "white")
    picture(tmp_path / "s.png", (200, 200), "black")
    items = data.survey([Item(tmp_path / "t.png", "x", tmp_path / "s.png")] * 2, 64).items
    shape = (2, 3, 64, 64)
    assert torch.equal(data.images(items), torch.ones(shape)) and (data.images(items, "source") + 1).abs().max() < 1e-6


def check(*arguments):
    done = subprocess.run([sys.executable, "-m", "flux.data", "check", *map(str, arguments)], capture_output=True,
                          text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    return done.returncode, done.stdout, done.stderr


def test_check_reports_and_exits(tmp_path):
    dataset(tmp_path / "a", 20, 1)
    picture(tmp_path / "a" / "tall.png", (48, 96))
    code, out, err = check(tmp_path / "a", "--edge", 64)
    assert code == 0, err
    for words in ("21 pictures to use", "sizes from 64x48 to 48x96", "1 broken, skipped:",
                  "broken0.png", "1 without a caption:", "tall.png", "buckets of about 64x64 pixels:", "48x96: 1"):
        assert words in out, words
    code, out, err = check(dataset(tmp_path / "b", 1, 1))
    assert code == 2 and "1 broken" in out and "1 of 2 pictures are broken" in err and "Traceback" not in err
    assert check(tmp_path / "missing")[0] == 2
