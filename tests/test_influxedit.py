"""Editing LoRAs from end to end on the demo's Fill: batches, what learns, resuming, drawing, judging, mistakes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import train
from flux import adapters, cli, conditioning, config, data, edits, fill, flow, latents, lora_names, pictures, weights
from flux.demo import edits as demo
from flux.demo import referee
from flux.demo import scene as world
from flux.edit_training import TrainEdit
from flux.edit_trial import CompareEdits, EvaluateEdits, Trial
from flux.edits import Layout
from flux.errors import UserError
from lora import io
from lora.adapter import Adapter, Bias, Dense, LowRank

SMALL = {"batch": 2, "rank": 2, "held_out": 0.0, "device": "cpu"}
SHORT = ["--batch", "2", "--rank", "2", "--validate-every", "0", "--held-out", "0", "--device", "cpu"]
CPU = ["--device", "cpu"]


@pytest.fixture(scope="module")
def circles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "circle"
    demo.write(folder, "circle", 3)
    return folder


@pytest.fixture(scope="module")
def removed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("more") / "remove"
    demo.write(folder, "remove", 2)
    return folder


@pytest.fixture(scope="module")
def learned(circles, tmp_path_factory):
    """A LoRA and a first layer that two steps have made far from nothing, by the command."""
    out = tmp_path_factory.mktemp("learned")
    train.main(["influxedit", "--data", str(circles), "--train-embedder", "--lr", "0.02", "--warmup", "0", "--out", str(out),
                "--sample-every", "2", "--prefix", "so: ", "--steps", "2", *SHORT])
    return out / "influxedit"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def tensors_of(folder, part):
    return torch.cat([pictures.to_tensor(pictures.read(path)) for path in sorted((folder / part).glob("*.png"))])


# --- batches ---

@pytest.mark.parametrize(("mode", "repaint", "quirks"), [("channels", None, "none"), ("channels", 0.5, "released"),
                                                         ("side-by-side", None, "none")])
def test_what_a_batch_shows(circles, mode, repaint, quirks):
    task = TrainEdit(data=circles, mode=mode, repaint=repaint, quirks=quirks, cache=False, **SMALL | {"batch": 3}).task()
    items = sorted(task.items, key=lambda item: item.path.name)
    x0, _, _, cond, weight = task.noised(items, [item.caption for item in items], torch.rand(3), torch.Generator())
    source, target = tensors_of(circles, "source"), tensors_of(circles, "target")
    wide = mode == "side-by-side"
    drawn = torch.cat((source, target), -1) if wide else target
    hidden = torch.cat((source, torch.zeros_like(source)), -1) if wide else source * (1 - (repaint or 0))
    white = torch.cat((torch.zeros(3, 1, 128, 128), torch.ones(3, 1, 128, 128)), -1) if wide else torch.ones(3, 1, 128, 128)
    with torch.no_grad():
        for found, picture in ((x0, drawn), (cond.channels[..., :64], hidden)):
            assert torch.allclose(found, latents.pack(task.autoencoder.encode(picture)), atol=2e-4)
    assert torch.equal(cond.channels[..., 64:], fill.pack_mask(white) * (quirks == "none"))
    assert cond.img_ids.shape[1] == x0.shape[1] == task.tokens(items[0]) == 64 * (1 + wide)
    assert torch.equal(weight, torch.ones_like(x0))


def test_masks_and_weights_of_the_loss(removed):
    settings = TrainEdit(data=removed, known_weight=0.25, changed_weight=3.0, cache=False, **SMALL)
    task = settings.task()
    items = sorted(task.items, key=lambda item: item.path.name)
    x0, eps, t, cond, weight = task.noised(items, ["", ""], torch.tensor([0.3, 0.8]), torch.Generator().manual_seed(0))
    for row, item in enumerate(items):
        mask, source, target = (np.asarray(pictures.read(path), float) for path in (item.mask, item.source, item.path))
        counts = latents.unpack(weight[row:row + 1], 128, 128)[0]
        for i in range(16):
            for j in range(16):
                cell, token = ((slice(i // n * n * 8, (i // n + 1) * n * 8), slice(j // n * n * 8, (j // n + 1) * n * 8))
                               for n in (1, 2))
                differs = abs(source[token] - target[token]).max() / 127.5 > 0.1
                want = 0.25 if not mask[cell].any() else 3.0 if differs else 1.0
                assert (counts[:, i, j] == want).all(), (row, i, j)
    loss = task.loss(((x0, eps, t, cond, weight), None, 1.0))
    with torch.no_grad():
        v = conditioning.velocity(task.model, cond)(flow.interpolate(x0, eps, t), t)
    error = (v - (eps - x0)).double().square()
    assert torch.allclose(loss.double(), (error * weight).sum((1, 2)) / weight.double().sum((1, 2)), rtol=1e-4)
    without = TrainEdit(data=removed, masks=False, cache=False, **SMALL).task()
    assert (without.batch(0, 0)[0][3].channels[..., 64:] == 1).all()


def test_either_side_may_be_the_edit(circles):
    task = TrainEdit(data=circles, mode="side-by-side", sides="both", **SMALL).task()
    found = set()
    for step in range(12):
        items = task.draw(step, 0)
        x0, _, _, cond, _ = task.batch(step, 0)[0]
        for row, item in enumerate(items):
            halves = latents.unpack(x0[row:row + 1], 128, 256)
            white = cond.channels[row, :, 64:].view(8, 16, 256)[0, 0].mean().item()  # of the first token
            with torch.no_grad():
                source = task.autoencoder.encode(data.images([item], "source"))
            inner = slice(4, 12)  # away from the seam
            gaps = [(halves[0, :, inner, 16 * side + 4:16 * side + 12] - source[0, :, inner, inner]).abs().mean().item()
                    for side in (0, 1)]
            assert (gaps[0] < gaps[1]) == (white == 0)
            found.add(white)
    assert found == {0.0, 1.0}


def test_nothing_has_changed_before_the_first_step(circles):
    task = TrainEdit(data=circles, train_embedder=True, cache=False, **SMALL).task()
    base = adapters.load_flux(weights.find(config.DEMO_FILL), config.DEMO_FILL, torch.float32)
    x0, eps, t, cond, _ = task.batch(0, 0)[0]
    ours, theirs = (conditioning.velocity(model, cond)(eps, t) for model in (task.model, base))  # as in training
    assert torch.equal(ours, theirs)
    with torch.no_grad():  # where layers without a LoRA have gelu in their product
        ours, theirs = (conditioning.velocity(model, cond)(eps, t) for model in (task.model, base))
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    wanted = {name for name, p in task.model.named_parameters() if p.requires_grad}
    assert len(wanted) == 2 * 38 + 2 and {"img_in.trained.weight", "img_in.trained.bias"} <= wanted


def test_the_first_layer_has_its_own_group(circles):
    settings = TrainEdit(data=circles, train_embedder=True, embedder_lr=1e-4, lr=1e-3, plus=16.0, cache=False, **SMALL)
    task = settings.task()
    built = train.optimisers.build(task.model, settings)
    assert {round(group["lr_scale"], 9): len(group["params"]) for group in built.param_groups} == {1.0: 38, 0.1: 2, 16.0: 38}


def test_any_optimiser_by_its_path_trains_both_groups(circles):
    settings = TrainEdit(data=circles, train_embedder=True, optimiser="torch.optim.NAdam", cache=False, **SMALL)
    task = settings.task()
    built = train.optimisers.build(task.model, settings)
    task.loss(task.batch(0, 0)).mean().backward()
    before = [p.detach().clone() for p in (task.embedder.weight, task.embedder.bias)]
    built.step()
    assert not any(map(torch.equal, before, (task.embedder.weight, task.embedder.bias)))


# --- what is made ---

def test_the_file_has_all_that_was_learned(learned):
    parts, report = io.read(learned / "final.safetensors", lora_names.names(config.DEMO_FILL))
    dense, bias = parts["flux"].layers["img_in"]
    assert isinstance(dense, Dense) and isinstance(bias, Bias) and dense.shape == (192, 384)
    assert dense.weight[:, 64:].any() and bias.value.any() and not report.dropped and not report.unused
    assert edits.from_metadata(parts["flux"].metadata, "a") == (Layout(repaint=0.0), "so: ")
    for part in ("config.toml", "metrics.jsonl", "samples/step_000002.png"):
        assert (learned / part).exists()
    assert Image.open(learned / "samples" / "step_000002.png").width > 3 * 128


@pytest.mark.parametrize("dialect", ["kohya", "comfy", "diffusers", "bfl", "diffsynth"])
def test_a_fill_loras_first_layer_goes_through_every_format(dialect):
    torch.manual_seed(0)
    names = lora_names.names(config.DEMO_FILL)
    layer = LowRank(torch.randn(3, 384), torch.randn(192, 3), 1.0),
    if dialect not in ("diffusers", "diffsynth"):
        layer = Dense(torch.randn(192, 384)), Bias(torch.randn(192))
    adapter = Adapter({"img_in": layer, "single_blocks.1.linear2": (LowRank(torch.ones(2, 960), torch.randn(192, 2), 0.5),)})
    io.write(Path("a.safetensors"), {"flux": adapter}, names, dialect)
    again = io.read(Path("a.safetensors"), names)[0]["flux"]
    x = torch.randn(1, 5, 384)
    models = []
    for value in (adapter, again):
        model = adapters.load_flux(weights.find(config.DEMO_FILL), config.DEMO_FILL, torch.float32)
        adapters.attach([adapters.Given("a", Path("a"), 1.0, {"flux": value})], "flux", model)
        models.append(model.img_in(x))
    assert torch.allclose(*models, atol=1e-5)


def test_a_cut_run_goes_on_with_the_same_bits(circles):
    for out, steps in (("whole", 3), ("cut", 1), ("cut", 3)):
        train.main(["influxedit", "--data", str(circles), "--train-embedder", "--steps", str(steps), "--out", out,
                    "--sample-every", "0", *SHORT])
    parts = [io.read(Path(out) / "influxedit" / "final.safetensors", lora_names.names(config.DEMO_FILL))[0]["flux"].layers
             for out in ("whole", "cut")]
    for name, terms in parts[0].items():
        for one, other in zip(terms, parts[1][name], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(vars(one).values(), vars(other).values(), strict=True)
                       if isinstance(a, torch.Tensor)), name


# --- drawing ---

def drawn(number=1, seed=0):
    return pictures.read(Path("out") / f"{number:05d}_seed{seed}.png")


def test_a_picture_is_edited_by_the_command(circles, learned, capsys):
    picture, lora = circles / "source" / "00000.png", learned / "final.safetensors"
    sample.main(["influxedit", str(picture), "red circle", "--lora", str(lora), "--seed", "7", "--steps", "3", *CPU])
    assert "warning" not in capsys.readouterr().err
    sheet = Image.open("out/00001_seed7_sheet.png")
    assert sheet.width > 2 * 128 and drawn(seed=7).size == (128, 128)

    preset = replace(config.DEMO_FILL, steps=3)
    found = weights.find(preset)
    model = adapters.load_flux(found, preset, torch.float32)
    adapters.attach(adapters.read((str(lora),), preset), "flux", model)
    with torch.no_grad():
        features = conditioning.TextEncoders(found, preset, torch.float32, torch.device("cpu"))(["so: red circle"])
        autoencoder = weights.load_autoencoder(found, preset.autoencoder, torch.float32)
        want = edits.draw(model, autoencoder, preset, Layout(repaint=0.0), pictures.to_tensor(pictures.read(picture)),
                          torch.ones(1, 1, 128, 128), features, [7])
    assert abs(np.asarray(pictures.to_pil(want)[0]).astype(int) - np.asarray(drawn(seed=7))).max() <= 1

    sample.main(["influxedit", "--from", "out/00001_seed7.png", "--device", "cpu"])
    assert np.array_equal(drawn(2, 7), drawn(1, 7))


def test_a_mask_keeps_the_rest_and_soft_edges_blend(removed, learned, capsys):
    picture, lora = removed / "source" / "00000.png", learned / "final.safetensors"
    pixels, mask = np.asarray(pictures.read(picture)), np.zeros((128, 128), np.uint8)
    mask[32:96, 32:96], mask[32:40, 32:96] = 255, 128
    Image.fromarray(mask).save("mask.png")
    words = ["influxedit", str(picture), "red circle", "--lora", str(lora), "--mask", "mask.png", "--steps", "2", *CPU]
    sample.main([*words, "--keep"])
    assert np.array_equal(np.asarray(drawn())[mask == 0], pixels[mask == 0])
    assert (np.asarray(drawn())[mask == 255] != pixels[mask == 255]).any()
    sample.main([*words, "--mode", "side-by-side", "--repaint", "0.5"])
    said = capsys.readouterr().err
    assert "was trained as channels, repaint scale 0, mask value 1, and is used as side-by-side, repaint scale 0.5" in said
    assert drawn(2).size == (128, 128)
    far = np.s_[:16]  # from the mask: held latents, so the autoencoder's own error, though the LoRA draws nonsense
    assert np.square(np.asarray(drawn(2))[far] / 255.0 - pixels[far] / 255.0).mean() < 10 ** -3.3


def test_what_did_not_change_is_kept_without_a_mask(removed, learned):
    picture = removed / "source" / "00001.png"
    words = ["influxedit", str(picture), "x", "--lora", str(learned / "final.safetensors"), "--steps", "2", *CPU]
    sample.main([*words, "--keep"])
    sample.main(words)
    before, kept, free = (np.asarray(pil).astype(int) for pil in (pictures.read(picture), drawn(1), drawn(2)))
    mask = np.asarray(edits.changed(*(Image.fromarray(pixels.astype(np.uint8)) for pixels in (before, free))))
    assert np.array_equal(kept[mask == 0], before[mask == 0]) and np.array_equal(kept[mask == 255], free[mask == 255])


@pytest.mark.parametrize("mode", edits.MODES)
def test_odd_sizes_are_edited(mode, learned):
    Image.new("RGB", (101, 70), "navy").save("odd.png")
    sample.main(["influxedit", "odd.png", "red circle", "blue circle", "--mode", mode, "--lora",
                 str(learned / "final.safetensors"), "--steps", "1", *CPU])
    assert drawn().size == drawn(2, 1).size == (96, 64)


def test_plain_painting_and_expanding(removed):
    picture, mask = removed / "source" / "00000.png", removed / "mask" / "00000.png"
    words = "--mask", str(mask), "--keep", "--steps", "2", *CPU
    sample.main(["fill", str(picture), "a red circle", *words])
    pixels, hidden = np.asarray(pictures.read(picture)), np.asarray(pictures.read(mask).convert("L"))
    assert np.array_equal(np.asarray(drawn())[hidden == 0], pixels[hidden == 0])
    sample.main(["a red circle", "--model", "demo-fill", "--image", str(picture), *words])
    assert np.array_equal(drawn(2), drawn(1))  # t2i's, to the bit
    sample.main(["fill", str(picture), "--expand", "left=64,top=16", "--expand", "right=32", "--keep", "--steps", "1", *CPU])
    assert drawn(3).size == (224, 144) and np.array_equal(np.asarray(drawn(3))[16:, 64:192], pixels)


# --- judging ---

def test_a_table_of_what_was_learned(removed, learned, capsys):
    train.main(["influxedit", "evaluate", "--data", str(removed), "--lora", str(learned / "final.safetensors"), *CPU])
    head, _, row = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[:5] == ["influxedit", "channels", "trained", "0", "1"] and len(cells) == head.count("|") - 1
    *_, differ, right = cells
    assert differ == "0" and right in ("0%", "50%", "100%") and all(cell.endswith("dB") for cell in (cells[5], *cells[7:10]))
    assert Path("out/edits_influxedit.png").exists()


def test_the_figures_are_their_definitions(removed, learned):
    """A trial whose model draws the target itself: infinitely near where the autoencoder gives back what it gets."""
    settings = EvaluateEdits(data=removed, lora=("x",), device="cpu")
    trial = Trial(settings)
    target = tensors_of(removed, "target")
    trial.encode([item.caption for item in trial.items])
    original, edits.draw = edits.draw, lambda *args: target
    try:
        rows, shown = trial.judge(None, Layout(repaint=0.0), "", trial.items)
    finally:
        edits.draw = original
    for row, item in zip(rows, trial.items, strict=True):
        before, after, mask = (np.asarray(pictures.read(path)).astype(float) for path in (item.source, item.path, item.mask))
        known = mask[..., 0] == 0
        assert row["psnr"] == row["inside"] == np.inf and row["ssim"] == pytest.approx(1) and row["right"] == 1
        error = np.square(before[known] - after[known]).mean() / 255**2
        assert row["outside"] == (np.inf if error == 0 else pytest.approx(-10 * np.log10(error), abs=0.1))
        assert row["kept"] == 0 and 30 < row["alone"] < 60
    assert len(shown) == 6


def test_the_comparison_is_of_like_trainings(circles, removed):
    settings = CompareEdits(data=circles, unseen=removed, steps=7, lr=3e-4)
    *variants, (last, judge) = settings.stages()
    assert last == "evaluate" and len(judge.lora) == len(variants) == 6 and judge.data == removed
    plain = TrainEdit(data=circles, steps=7, lr=3e-4, held_out=0.0)
    differ = {name: {key for key, value in vars(one).items() if value != getattr(plain, key)} for name, one in variants}
    assert differ == {"channels": set(), "embedder": {"train_embedder"}, "half": {"repaint"}, "hidden": {"repaint"},
                      "black-mask": {"quirks"}, "side-by-side": {"mode"}}


# --- mistakes ---

@pytest.mark.parametrize(("words", "message"), [
    ({"model": "demo"}, "expected one of fill, demo-fill; take --model demo-fill"),
    ({"model": "dev"}, "take --model fill"), ({"model": "canny"}, "takes no picture with a mask")])
def test_training_needs_a_fill_model(circles, words, message):
    with pytest.raises(UserError, match=message):
        TrainEdit(data=circles, **words).task()


@pytest.mark.parametrize(("flags", "message"), [
    ({"repaint": 1.5}, "numbers from 0 to 1"), ({"embedder_lr": 1e-4}, "and --train-embedder"),
    ({"embedder_lr": 0.1, "train_embedder": True, "optimiser": "prodigyopt.Prodigy"}, "of one rate for all"),
    ({"embedder_lr": 0.0, "train_embedder": True}, "above 0"), ({"known_weight": -1.0}, "--known-weight -1.0: expected a"),
    ({"quirks": "released", "train_embedder": True}, "trains no embedder"), ({"sides": "both"}, "expected side-by-side"),
    ({"target": "img_in|blocks", "train_embedder": True}, "img_in has a LoRA in training")])
def test_flags_that_do_not_go_together(circles, flags, message):
    with pytest.raises(UserError, match=message):
        TrainEdit(data=circles, cache=False, **SMALL | flags).task()


@pytest.mark.parametrize(("words", "message"), [
    (["influxedit"], "no picture came, expected a picture and then words"),
    (["influxedit", "a red circle"], "'a red circle' is no file"),
    (["influxedit", "IMAGE", "x", "--mask", "small.png"], "--mask small.png is 9x9 pixels, expected 128x128"),
    (["influxedit", "IMAGE", "x", "--mask", "none.png"], "none.png' cannot be opened"),
    (["influxedit", "IMAGE", "x", "--model", "demo"], "was not trained for it, expected fill or demo-fill"),
    (["influxedit", "IMAGE", "x", "--repaint", "2"], "numbers from 0 to 1"),
    (["fill", "IMAGE", "x"], "fill came without --mask and --expand"),
    (["fill", "IMAGE", "x", "--expand", "up=3"], "expected each of left, top, right, bottom"),
    (["fill", "IMAGE", "x", "--expand", "left=3,left=4"], "at most once"),
    (["fill", "IMAGE", "x", "--expand", "left=-3"], "write it as left=64"),
    (["fill", "IMAGE", "x", "--mask", "small.png"], "expected 128x128"),
    (["a circle", "--image", "IMAGE", "--beside"], "--beside came with --model demo, which was not trained for it"),
    (["a circle", "--model", "demo-fill", "--repaint", "0"], "--repaint came without --image")])
def test_drawing_says_what_is_wrong(circles, words, message):
    Image.new("L", (9, 9)).save("small.png")
    words = [str(circles / "source" / "00000.png") if word == "IMAGE" else word for word in words]
    with pytest.raises(UserError, match=message):
        sample.main(words)


def test_loras_of_two_layouts_are_refused(learned, circles):
    names = lora_names.names(config.DEMO_FILL)
    parts, _ = io.read(learned / "final.safetensors", names)
    io.write(Path("other.safetensors"), parts, names, metadata=edits.to_metadata(Layout("side-by-side", 1.0)))
    words = [str(circles / "source" / "00000.png"), "x", "--lora", str(learned / "final.safetensors"), "--lora",
             "other.safetensors"]
    with pytest.raises(UserError, match="trained as channels, .* and as side-by-side, .*, expected one layout"):
        sample.main(["influxedit", *words])
    io.write(Path("plain.safetensors"), {"flux": Adapter(parts["flux"].layers)}, names)
    with pytest.raises(UserError, match="plain.safetensors does not say how it was trained"):
        train.main(["influxedit", "evaluate", "--data", str(circles), "--lora", "plain.safetensors", "--device", "cpu"])


def test_commands_are_listed():
    for name in ("influxedit", "fill"):
        assert cli.describe(cli.recipes()[name]).sample.positional == "request"
    assert set(cli.describe(cli.recipes()["influxedit"]).train) == {"", "evaluate", "compare"}


def test_the_shipped_lora_fills_the_outline():
    """One held-out pair of colours; the measured share is in the README."""
    outline = Path(__file__).parents[1] / "docs" / "outline.png"
    lora = str(weights.DEMO / "circle.safetensors")
    sample.main(["influxedit", str(outline), "purple circle with yellow background", "--lora", lora, *CPU])
    line = np.asarray(pictures.read(outline))[..., 0] > 128
    rows, columns = np.nonzero(line)
    circle = world.Thing("circle", "purple", "", "", 0, 0, 0)
    verdict = referee.judge(np.asarray(drawn()), world.Scene((circle,), "yellow"))
    found, = verdict.seen.things
    assert verdict.right and abs(found.x * 128 - columns.mean()) < 4 and abs(found.y * 128 - rows.mean()) < 4
    assert abs(2 * found.radius * 128 - (columns.max() - columns.min())) < 8
