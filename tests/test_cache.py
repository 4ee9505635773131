"""P8: what is kept equals what is made afresh, bit for bit, whatever was edited in between."""

import os
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from flux import conditioning, data, weights
from flux.cache import Cache, content, digest, source
from flux.recipes import t2i

EDITS = 1000


def test_a_thousand_edits_are_never_stale(tmp_path):
    """One of the things that a feature is made from changes at a time, now and then back to what it was before."""
    rng = random.Random(0)
    encoder, picture = tmp_path / "encoder.bin", tmp_path / "picture.bin"
    state = {"caption": "a", "pixels": b"0", "crop": (0, 16), "weights": b"1", "dtype": "float32", "length": 4}
    choices = {"caption": lambda: rng.choice(["a", "b", "a ", "", "A"]) + str(rng.randrange(20)),
               "pixels": lambda: rng.randbytes(rng.randrange(1, 3)), "crop": lambda: (rng.randrange(4), rng.randrange(4)),
               "weights": lambda: bytes([rng.randrange(5)]), "dtype": lambda: rng.choice(["float32", "bfloat16"]),
               "length": lambda: rng.randrange(1, 6)}
    cache, made, hits = Cache(tmp_path / "cache"), 0, 0

    def make():
        nonlocal made
        made += 1
        parts = repr((state["caption"], picture.read_bytes(), state["crop"], encoder.read_bytes())).encode()
        generator = torch.Generator().manual_seed(int.from_bytes(parts, "little") % 2**62)
        return {"x": torch.randn(state["length"], 3, generator=generator).to(getattr(torch, state["dtype"]))}
    for _ in range(EDITS):
        edited = rng.choice(list(state))
        state[edited] = choices[edited]()
        encoder.write_bytes(state["weights"])
        picture.write_bytes(state["pixels"])
        name = state["caption"], content(picture), state["crop"], source(encoder), state["dtype"], state["length"]
        before = made
        kept = cache.get(name, make)
        hits += made == before
        assert digest(kept) == digest(make())
    assert hits > 20  # otherwise nothing was shown


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "page", "folder"])
def test_a_damaged_entry_is_made_again(damage, tmp_path):
    cache = Cache(tmp_path)
    first = cache.get(("a", 1), lambda: {"x": torch.arange(6.0)})
    (entry,) = tmp_path.glob("*/*.safetensors")
    good = entry.read_bytes()
    if damage == "folder":
        entry.unlink()
        entry.mkdir()
    else:
        entry.write_bytes({"cut": good[:-3], "empty": b"", "flipped": good[:-1] + bytes([good[-1] ^ 1]),
                           "page": b"<html></html>"}[damage])
    again = cache.get(("a", 1), lambda: {"x": torch.arange(6.0)})
    assert torch.equal(again["x"], first["x"])
    if damage != "folder":
        assert entry.read_bytes() == good


def test_workers_share_a_folder(tmp_path):
    """Eight at once, each for all: every answer is whole, and no half file is left."""
    caches = [Cache(tmp_path) for _ in range(8)]

    def work(cache):
        return [digest(cache.get((i,), lambda i=i: {"x": torch.full((50, 50), float(i))})) for i in range(30)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(work, caches))
    assert all(answer == answers[0] for answer in answers) and len(set(answers[0])) == 30
    entries = list(tmp_path.glob("*/*"))
    assert len(entries) == 30 and all(caches[0].read(entry) is not None for entry in entries)


def test_a_folder_that_cannot_be_written_costs_time_only(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    cache = Cache(tmp_path / "file" / "cache")
    for _ in range(3):
        assert cache.get(("a",), lambda: {"x": torch.ones(2)})["x"].sum() == 2
    assert capsys.readouterr().err.count("warning: nothing more is kept") == 1


def test_weights_are_told_apart(tmp_path):
    folder = tmp_path / "t5"
    folder.mkdir()
    (folder / "a.safetensors").write_bytes(b"one")
    (folder / "b.safetensors").write_bytes(b"two")
    before = source(folder)
    assert before == source(folder)
    (folder / "b.safetensors").write_bytes(b"twO")
    assert source(folder) != before
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(65 << 20)
    before = source(large)
    os.utime(large, ns=(1, 1))
    assert source(large) != before


def pictures(folder: Path, count: int) -> Path:
    folder.mkdir()
    for i in range(count):
        Image.radial_gradient("L").resize((128, 128 + 32 * (i % 2))).rotate(40 * i).convert("RGB").save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a {'red' if i % 2 else 'blue'} circle")
    return folder


def test_a_training_is_the_same_with_and_without(tmp_path):
    folder = pictures(tmp_path / "data", 5)
    tasks = {cache: t2i.FineTune(data=folder, out=tmp_path / "runs", batch=2, cache=cache).task() for cache in (True, False)}
    for visit in range(2):  # the second comes from the files
        for step in range(3):
            kept, fresh = (task.batch(step, 0) for task in tasks.values())
            for a, b in zip((*kept[:3], kept[3].txt, kept[3].vec), (*fresh[:3], fresh[3].txt, fresh[3].vec), strict=True):
                assert torch.equal(a, b), (visit, step)
    assert (tmp_path / "runs" / "cache").is_dir()


def test_all_is_made_before_the_first_step(tmp_path, monkeypatch):
    """A second training finds it all, and never reads the text encoders; what was lost since is made again."""
    folder = pictures(tmp_path / "data", 5)
    settings = t2i.FineTune(data=folder, out=tmp_path / "runs", batch=2, held_out=0.2)
    first = settings.task()
    assert len(first.items) == 4 and len(first.unseen) == 1 and first.encoders is None
    entries = sorted((tmp_path / "runs" / "cache").rglob("*.safetensors"))
    assert len(entries) == 5 + 3, "five pictures, two captions and the empty one"
    first.batch(0, 0), first.held_out()
    assert sorted((tmp_path / "runs" / "cache").rglob("*.safetensors")) == entries
    real = conditioning.TextEncoders
    monkeypatch.setattr(conditioning, "TextEncoders", None)
    second = settings.task()
    again = second.held_out()[0]
    monkeypatch.setattr(conditioning, "TextEncoders", real)
    for entry in entries:
        entry.unlink()
    for a, b in zip(second.held_out()[0][:3], again[:3], strict=True):
        assert torch.equal(a, b)


def test_another_bucket_is_another_entry(tmp_path):
    task = t2i.FineTune(data=pictures(tmp_path / "data", 1), out=tmp_path / "runs").task()
    latents = [task.latent(replace(task.items[0], size=size)) for size in ((128, 128), (96, 160), (160, 96))]
    assert [tuple(latent.shape) for latent in latents] == [(1, 16, 16, 16), (1, 16, 20, 12), (1, 16, 12, 20)]


def test_an_edited_picture_is_seen(tmp_path):
    folder = pictures(tmp_path / "data", 1)
    task = t2i.FineTune(data=folder, out=tmp_path / "runs").task()
    item = task.items[0]
    before = task.latent(item)
    Image.new("RGB", (128, 128), "red").save(item.path)
    after = task.latent(item)
    assert not torch.equal(before, after)
    assert torch.equal(after, weights.load_autoencoder(weights.find(task.preset), task.preset.autoencoder,
                                                       torch.float32).encode(data.images([item])))
