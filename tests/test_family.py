"""Each member of the FLUX.1 family from the command to the file, on random weights of a toy transformer and the demo's
autoencoder and text encoders: identities, pictures remade from their metadata, and what mistakes are told.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from flux import (
    canny,
    checkpoint,
    conditioning,
    config,
    control,
    fill,
    flow,
    inputs,
    latents,
    lora_names,
    pictures,
    siglip,
    weights,
)
from flux.config import DEMO, SiglipConfig
from flux.errors import UserError
from flux.model import Flux
from flux.recipes import t2i
from lora import io
from lora.adapter import Adapter, LowRank

TOY = replace(config.TINY, vec_in_dim=96, context_in_dim=96)
EYES = SiglipConfig(hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32,
                    patch_size=16)
MODELS = {"demo-toy": (64, ""), "demo-toyfill": (384, "mask"), "demo-toycanny": (128, "control"),
          "demo-toykontext": (64, "reference")}
SIZE = ("--width", 48, "--height", 32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Weights of every toy; the demo's own for what they share with it."""
    folder = tmp_path_factory.mktemp("weights")
    for name in ("ae.safetensors", "clip.safetensors", "t5.safetensors", "tokenizer", "tokenizer_2"):
        (folder / name).symlink_to(weights.DEMO / name)
    torch.manual_seed(0)
    for name, (channels, _) in MODELS.items():
        model = Flux(replace(TOY, in_channels=channels))
        model.final_layer.linear.weight.data *= 5  # so that what the model is given shows in 8 bits
        checkpoint.save(folder / f"flux{name.removeprefix('demo')}.safetensors", model.state_dict())
    checkpoint.save(folder / "siglip.safetensors", siglip.SiglipVision(EYES).state_dict())
    redux = siglip.Redux(EYES.hidden_size, 96)
    redux.redux_down.weight.data *= 20
    checkpoint.save(folder / "redux.safetensors", redux.state_dict())
    for name, pixels in (("latents", False), ("pixels", True)):
        branch = control.ControlNet(replace(TOY, depth_single_blocks=0 if pixels else 1), pixels)
        checkpoint.save(folder / f"zero_{name}.safetensors", branch.state_dict())
        for parameter in branch.parameters():
            parameter.data.normal_(0, 0.2)
        checkpoint.save(folder / f"control_{name}.safetensors", branch.state_dict())
    return folder


@pytest.fixture(autouse=True)
def toys(folder, monkeypatch):
    for name, (channels, takes) in MODELS.items():
        toy = replace(DEMO, name=name, flux=replace(TOY, in_channels=channels), siglip=EYES, takes=takes, steps=2,
                      width=48, height=32)
        monkeypatch.setitem(config.PRESETS, name, toy)


@pytest.fixture
def draw(folder, tmp_path):
    def draw(model, *words):
        """-> (N, H, W, 3) bytes, and the files."""
        draw.count += 1
        out = tmp_path / f"out{draw.count}"
        model = ("--model", f"demo-{model}", "--weights", folder, "--device", "cpu") if model else ()
        sample.main([str(word) for word in (*model, *words, "--out", out)])
        paths = sorted(path for path in out.glob("*_seed*.png") if "sheet" not in path.name)
        return np.stack([np.asarray(Image.open(path)).astype(int) for path in paths]), paths
    draw.count = 0
    return draw


@pytest.fixture
def photo(tmp_path):
    def photo(name, width=48, height=32, seed=0, grey=False):
        """A smooth picture, or mask, as a file."""
        small = np.random.default_rng(seed).integers(0, 256, (4, 5) if grey else (4, 5, 3), dtype=np.uint8)
        path = tmp_path / name
        Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(path)
        return path
    return photo


def halves(path, width=48, height=32, soft=0):
    """A mask: the left half known, the right one repainted, and the last columns soft."""
    mask = np.zeros((height, width), np.uint8)
    mask[:, width // 2:] = 255
    mask[:, width - soft:] = 100
    Image.fromarray(mask).save(path)
    return path


def pixels(path):
    return np.asarray(pictures.read(path)).astype(int)


def load(folder, name, channels=64):
    found = weights.find(config.PRESETS[f"demo-{name}"], folder)
    return (weights.load_flux(found, replace(TOY, in_channels=channels), torch.float32),
            weights.load_autoencoder(found, DEMO.autoencoder, torch.float32))


# Image to image.

def test_strength_one_is_text_to_image(draw, photo):
    plain, _ = draw("toy", "a", "--num", 3, "--seed", 4)
    same, _ = draw("toy", "a", "--num", 3, "--seed", 4, "--image", photo("p.png"), "--strength", 1)
    other, _ = draw("toy", "a", "--num", 3, "--seed", 4, "--image", photo("p.png"), "--strength", 0.6)
    assert np.array_equal(plain, same) and not np.array_equal(plain, other)


@torch.inference_mode()
def test_strength_zero_is_the_picture_through_the_autoencoder(draw, photo, folder):
    out, _ = draw("toy", "a", "--image", photo("p.png"), "--strength", 0)
    _, autoencoder = load(folder, "toy")
    through = autoencoder.decode(autoencoder.encode(pictures.to_tensor(pictures.read(photo("p.png")))))
    assert np.array_equal(out[0], np.asarray(pictures.to_pil(through)[0]))


@torch.inference_mode()
def test_a_start_is_the_picture_on_its_way_to_noise():
    noise, start = torch.randn(2, 6, 64), torch.randn(1, 6, 64)
    fixed = inputs.Encoded(start, None, (), None)
    assert torch.equal(fixed.begin(noise, 0.75), flow.interpolate(start.repeat(2, 1, 1), noise, torch.full((2,), 0.75)))
    assert torch.equal(fixed.begin(noise, 1.0), noise)
    assert inputs.Encoded(None, None, (), None).begin(noise, 0.5) is noise


@pytest.mark.parametrize(("edges", "flags", "size"), [
    ((48, 32), (), (48, 32)), ((50, 35), (), (48, 32)), ((63, 33), (), (64, 32)), ((40, 24), ("--width", 80), (80, 48)),
    ((640, 480), (), (48, 32)), ((64, 64), ("--height", 32), (32, 32)), ((9, 9), (), (16, 16))])
def test_the_size_follows_the_picture(edges, flags, size, draw, photo):
    out, _ = draw("toy", "a", "--steps", 1, "--image", photo("p.png", *edges), *flags)
    assert out.shape == (1, *size[::-1], 3)


# Fill.

@torch.inference_mode()
def test_fill_by_hand(draw, photo, folder, tmp_path):
    """One step: noise plus the velocity of noise, masked latents and mask at t = 1."""
    mask, image = halves(tmp_path / "m.png", soft=9), photo("p.png")
    out, _ = draw("toyfill", "a", "--image", image, "--mask", mask, "--steps", 1, "--seed", 3, "--no-hold")
    model, autoencoder = load(folder, "toyfill", 384)
    share = torch.from_numpy(np.asarray(Image.open(mask)) / np.float32(255))[None, None]
    tokens = fill.tokens(autoencoder.encode(pictures.to_tensor(pictures.read(image)) * (1 - share)), share)
    noise = latents.pack(latents.noise(1, 32, 48, torch.Generator().manual_seed(3)))
    found = weights.find(config.PRESETS["demo-toyfill"], folder)
    txt, vec = conditioning.TextEncoders(found, config.PRESETS["demo-toyfill"], torch.float32, torch.device("cpu"))(["a"])
    v = model(torch.cat((noise, tokens), -1), latents.image_ids(4, 6), txt, latents.text_ids(txt.shape[1]), vec,
              torch.ones(1), torch.full((1,), 2.0))
    expected = pictures.to_pil(autoencoder.decode(latents.unpack(noise - v, 32, 48)))[0]
    assert np.array_equal(out[0], np.asarray(expected))


@pytest.mark.parametrize("edges", [(48, 32), (50, 35)])
def test_known_pixels_are_kept(edges, draw, photo, tmp_path):
    image, mask = photo("p.png", *edges), halves(tmp_path / "m.png", *edges)
    words = ("toyfill", "a", "--image", image, "--mask", mask, "--num", 3)
    plain, _ = draw(*words)
    kept, _ = draw(*words, "--keep")
    known = np.asarray(pictures.read(image).resize((48, 32), Image.Resampling.LANCZOS)).astype(int)
    assert len(kept) == 3 and (kept[:, :, :23] == known[:, :23]).all()
    assert np.array_equal(kept[:, :, 25:], plain[:, :, 25:]) and not (plain[:, :, :23] == known[:, :23]).all()


def test_what_is_known_ends_at_its_own_latents(draw, photo, folder, tmp_path):
    """Of cells of 8 pixels; the others are the model's, which sees them on their way. --no-hold leaves all to the model."""
    mask = np.zeros((32, 48), np.uint8)
    mask[:, 25:] = 255  # cuts a cell, which is then the model's
    Image.fromarray(mask).save(tmp_path / "m.png")
    words = ("--image", photo("p.png"), "--mask", tmp_path / "m.png")
    asked, model = t2i.TextToImage(image=photo("p.png"), mask=tmp_path / "m.png"), config.PRESETS["demo-toyfill"]
    _, autoencoder = load(folder, "toyfill", 384)
    with torch.inference_mode():
        fixed = inputs.encode(inputs.read(asked, model), autoencoder, model, None, hold=True)
        true = autoencoder.encode(pictures.to_tensor(pictures.read(photo("p.png"))))
        noise = torch.randn(2, 6, 64)
        img = flow.euler(fixed.held(lambda img, t: torch.full_like(img, 3.0)), noise, [1.0, 0.6, 0.3, 0.0])
    cells = latents.unpack(img, 32, 48)
    assert (cells[..., :3] - true[..., :3]).abs().max() < 1e-5
    assert (cells[..., 3:] - (latents.unpack(noise, 32, 48)[..., 3:] - 3)).abs().max() < 1e-5
    held, free = draw("toyfill", "a", *words)[0], draw("toyfill", "a", *words, "--no-hold")[0]
    assert not np.array_equal(held, free)


def test_a_mask_of_nothing_keeps_the_bytes(draw, photo, tmp_path):
    Image.new("L", (48, 32), 0).save(tmp_path / "m.png")
    kept, _ = draw("toyfill", "a", "--image", photo("p.png"), "--mask", tmp_path / "m.png", "--keep", "--dtype", "bf16")
    assert np.array_equal(kept[0], pixels(photo("p.png")))


def test_outpainting_is_fill_on_a_larger_canvas(draw, photo, tmp_path):
    image = photo("p.png", 32, 16)
    out, _ = draw("toyfill", "a", "--image", image, "--outpaint", "16,0,0,16", "--keep")
    assert out.shape == (1, 32, 48, 3) and np.array_equal(out[0, :16, 16:], pixels(image))
    canvas, area = fill.outpaint(pictures.read(image), Image.new("L", (32, 16), 0), 16, 0, 0, 16)
    canvas.save(tmp_path / "c.png")
    area.save(tmp_path / "a.png")
    same, _ = draw("toyfill", "a", "--image", tmp_path / "c.png", "--mask", tmp_path / "a.png", "--keep")
    assert np.array_equal(out, same)


# Kontext, Canny, Redux.

def test_references_change_the_picture(draw, photo):
    plain, _ = draw("toykontext", "a")
    one, _ = draw("toykontext", "a", "--reference", photo("r.png", 35, 20), *SIZE)
    two, _ = draw("toykontext", "a", "--reference", photo("r.png", 35, 20), "--reference", photo("s.png", 16, 48, 1), *SIZE)
    assert plain.shape == one.shape == two.shape
    assert not np.array_equal(plain, one) and not np.array_equal(one, two)
    sized, _ = draw("toykontext", "a", "--reference", photo("r.png", 35, 20))
    assert sized.shape == (1, 16, 32, 3), "without --width and --height as the reference"


@pytest.mark.parametrize(("edges", "size"), [((1000, 1000), (1024, 1024)), ((300, 200), (1248, 832)),
                                             ((50, 400), (672, 1568)), ((1568, 672), (1568, 672)),
                                             ((1360, 1024), (1184, 880))])
def test_references_have_kontexts_sizes(edges, size, photo):
    kontext = config.preset("kontext")
    assert len(kontext.reference_sizes) == 17 and {size[::-1] for size in kontext.reference_sizes} == set(
        kontext.reference_sizes) and all(edge % 16 == 0 for size in kontext.reference_sizes for edge in size)
    assert inputs.to_reference(Image.new("RGB", edges), kontext).size == size
    assert inputs.read(t2i.TextToImage(reference=(photo("r.png", *edges),)), kontext).size == size, "of what is drawn too"


def test_edges_are_given_or_found(draw, photo, tmp_path):
    plain = photo("p.png")
    Image.fromarray(canny.edges(np.asarray(pictures.read(plain)), 50, 200)).convert("RGB").save(tmp_path / "edges.png")
    given, _ = draw("toycanny", "a", "--control", tmp_path / "edges.png")
    found, _ = draw("toycanny", "a", "--control-from", plain)
    other, _ = draw("toycanny", "a", "--control", plain)
    assert np.array_equal(given, found) and not np.array_equal(given, other)


def test_redux_pictures_have_strengths(draw, photo, folder):
    a, b = photo("a.png"), photo("b.png", seed=1)
    plain, _ = draw("toy", "a")
    one, _ = draw("toy", "a", "--redux", a)
    same, _ = draw("toy", "a", "--redux", f"{a}:1")
    weak, _ = draw("toy", "a", "--redux", f"{a}:0.3")
    two, _ = draw("toy", "a", "--redux", a, "--redux", b)
    assert np.array_equal(one, same)
    assert len({x.tobytes() for x in (plain, one, weak, two)}) == 4
    model = config.PRESETS["demo-toy"]
    given = inputs.Inputs((48, 32), None, None, None, (), ((pictures.read(a), 0.5), (pictures.read(b), 1.0)), 1.0, {})
    found = weights.find(model, folder)
    with torch.inference_mode():
        tokens = inputs.image_tokens(given, found, model, torch.float32, torch.device("cpu"))
        tower, redux = weights.load_siglip(found, EYES), weights.load_redux(found, model)
        squashed = [pictures.to_tensor(pictures.read(x).resize((32, 32), Image.Resampling.BICUBIC)) for x in (a, b)]
        by_hand = torch.cat([0.5 * redux(tower(squashed[0])), redux(tower(squashed[1]))], dim=1)
    assert tokens.shape == (1, 2 * 4, 96) and torch.equal(tokens, by_hand)


@torch.inference_mode()
def test_pictures_are_encoded_as_they_are(photo, folder):
    """The control picture's and the references' packed latents, by the autoencoder's mean."""
    _, autoencoder = load(folder, "toy")
    control, reference = photo("c.png"), photo("r.png", 35, 20)
    given = inputs.read(t2i.TextToImage(control=control, model="demo-toycanny"), config.PRESETS["demo-toycanny"])
    fixed = inputs.encode(given, autoencoder, config.PRESETS["demo-toycanny"], None)
    assert torch.equal(fixed.channels, latents.pack(autoencoder.encode(pictures.to_tensor(pictures.read(control)))))
    assert fixed.start is None and fixed.references == ()
    given = inputs.read(t2i.TextToImage(reference=(reference,)), config.PRESETS["demo-toykontext"])
    fixed = inputs.encode(given, autoencoder, config.PRESETS["demo-toykontext"], None)
    near = pictures.read(reference).resize((32, 16), Image.Resampling.LANCZOS)
    assert given.size == (32, 16) and torch.equal(fixed.references[0], autoencoder.encode(pictures.to_tensor(near)))


# ControlNet and true guidance.

@torch.inference_mode()
@pytest.mark.parametrize("kind", ("latents", "pixels"))
def test_a_controlnet_is_shown_its_picture(kind, photo, folder):
    _, autoencoder = load(folder, "toy")
    model, path = config.PRESETS["demo-toy"], folder / f"control_{kind}.safetensors"
    asked = t2i.TextToImage(control=photo("p.png"), controlnet=path, control_scale=0.5, control_end=0.5)
    added = inputs.controlled(asked, inputs.read(asked, model), autoencoder, model, [1.0, 0.5, 0.0], torch.float32,
                              torch.device("cpu"))
    cond = conditioning.condition(torch.randn(2, 4, 96), torch.randn(2, 96), 48, 32, 2.0)
    img, branch = torch.randn(2, 6, 64), weights.load_control(path, model.flux)
    image = pictures.to_tensor(pictures.read(photo("p.png")))
    hint = branch.embed(image if kind == "pixels" else autoencoder.encode(image))
    t, guidance = torch.ones(2), torch.full((2,), 2.0)
    double, single = branch(img, cond.img_ids, cond.txt, cond.txt_ids, cond.vec, t, guidance, hint)
    expected = [0.5 * x for x in (*double, *single * 2)]  # the model has one double block and two single ones
    assert all(torch.equal(a, b) for a, b in zip(added(cond)(img, t), expected, strict=True))
    assert added(cond)(img, t / 2) is None, "its steps are over"


@pytest.mark.parametrize("kind", ("latents", "pixels"))
def test_a_controlnet_steers(kind, draw, photo, folder):
    words = ("toy", "a", "--control", photo("p.png"), "--controlnet")
    plain, _ = draw("toy", "a", *SIZE)
    steered, _ = draw(*words, folder / f"control_{kind}.safetensors")
    assert np.array_equal(draw(*words, folder / f"zero_{kind}.safetensors")[0], plain) and not np.array_equal(steered, plain)
    assert np.array_equal(draw(*words, folder / f"control_{kind}.safetensors", "--control-scale", 0)[0], plain)
    begun, _ = draw(*words, folder / f"control_{kind}.safetensors", "--control-end", 0.5)
    assert not np.array_equal(begun, plain) and not np.array_equal(begun, steered)


def test_scale_one_is_no_guidance(draw):
    words = ("toy", "a", "--num", 3, "--seed", 2)
    plain, _ = draw(*words)
    assert np.array_equal(draw(*words, "--cfg-scale", 1, "--negative", "b")[0], plain)
    assert abs(draw(*words, "--cfg-scale", 5, "--negative", "a")[0] - plain).max() <= 1, "away from itself"
    guided, _ = draw(*words, "--cfg-scale", 5, "--negative", "a red circle")
    late, _ = draw(*words, "--cfg-scale", 5, "--negative", "a red circle", "--cfg-start", 0.5)
    nothing, _ = draw(*words, "--cfg-scale", 5)
    assert len({x.tobytes() for x in (plain, guided, late, nothing)}) == 4


# All at once.

@pytest.mark.parametrize("dtype", ("fp32", "bf16"))
def test_they_compose_and_are_made_again(dtype, draw, photo, folder, tmp_path, capsys):
    width = TOY.hidden_size  # a LoRA for the base, whose img_in has 64 inputs, onto Fill
    pairs = {"img_in": (width, 64), "double_blocks.0.img_attn.proj": (width, width)}
    lora = Adapter({layer: (LowRank(torch.randn(2, columns), torch.randn(rows, 2)),)
                    for layer, (rows, columns) in pairs.items()})
    io.write(tmp_path / "style.safetensors", {"flux": lora}, lora_names.names(config.PRESETS["demo-toy"]))
    words = ("--lora", f"{tmp_path / 'style.safetensors'}:0.5", "--image", photo("p.png"), "--mask",
             halves(tmp_path / "m.png"), "--keep", "--strength", 0.9,
             "--redux", f"{photo('r.png', seed=1)}:0.7", "--controlnet", folder / "control_latents.safetensors",
             "--control-from", photo("c.png", seed=2), "--control-index", "repeat", "--negative", "b", "--cfg-scale", 2,
             "--dtype", dtype)
    out, paths = draw("toyfill", "a", "two words", *words, "--num", 2, "--batch", 3)
    assert len(out) == 4 and (out[:, :, :24] == pixels(photo("p.png"))[:, :24]).all()
    assert len({picture.tobytes() for picture in out}) == 4
    made = pictures.read_metadata(paths[2])
    assert made["prompt"] == "two words" and set(made["files"]) == {
        "flux", "ae", "clip", "t5", "siglip", "redux", "image", "mask", "control", "controlnet", "redux 1",
        "lora 1 style.safetensors"}
    assert made["files"]["mask"] == f"m.png {checkpoint.fingerprint(tmp_path / 'm.png')}"
    without, _ = draw("toyfill", "two words", *words[2:], "--seed", 2)
    assert abs(without[0] - out[2]).max() > 24
    again, _ = draw(None, "--from", paths[2])
    assert abs(again[0] - out[2]).max() <= (1 if dtype == "fp32" else 24)  # alone, sums are taken in another order
    assert "warning" not in capsys.readouterr().err
    photo("r.png", seed=5)
    twice, _ = draw(None, "--from", paths[2])
    told = capsys.readouterr().err
    assert not np.array_equal(again, twice) and "warning: redux 1 changed since" in told and told.count("\n") == 1


@pytest.mark.parametrize("words", [("--reference", "p.png"), ("--redux", "p.png"), ("--image", "p.png")])
def test_pictures_need_no_words(words, draw, photo, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    photo("p.png")
    _, paths = draw("toykontext", *words)
    assert pictures.read_metadata(paths[0])["prompt"] == "" and len(paths) == 1


# Mistakes.

@pytest.mark.parametrize(("words", "said"), [
    ("--mask m.png --image p.png", "--mask came with --model demo, .*expected fill or .*take --model fill"),
    ("--outpaint 16,0,0,0 --image p.png", "--outpaint came with --model demo,.*--model fill"),
    ("--reference p.png", "--reference came with --model demo,.*kontext.*--model kontext"),
    ("--control p.png", "--control came with --model demo,.*canny or depth.*--controlnet"),
    ("--control-from p.png", "--control came with --model demo,"),
    ("--model fill --reference p.png", "--reference came with --model fill"),
    ("--model fill", "--model fill came without --mask and --outpaint"),
    ("--model fill --mask m.png", "--mask came without --image"),
    ("--model fill --outpaint 16,0,0,0", "--outpaint came without --image"),
    ("--model fill --image p.png --mask small.png", "small.png is 20x20 pixels, expected 48x32 as --image p.png"),
    ("--model fill --image p.png --outpaint 16,0,0", "--outpaint '16,0,0': expected pixels left,top,right,bottom"),
    ("--model fill --image p.png --outpaint=-16,0,0,0", "--outpaint '-16,0,0,0': expected"),
    ("--model fill --image p.png --outpaint 9999,9999,9999,9999", "makes 20046x20030 pixels, expected at most 64 mega"),
    ("--model canny", "--model canny came without a picture to follow"),
    ("--model depth --control-from p.png", "--control-from came with --model depth"),
    ("--model canny --control p.png --control-from p.png", "--control came with --control-from"),
    ("--model canny --control p.png --width 512 --height 512", "p.png is 48x32 pixels, expected the shape of 512x512"),
    ("--image p.png --strength 1.5", "--strength 1.5: expected a share from 0 to 1"),
    ("--strength 0.5", "--strength came without --image"),
    ("--image p.png --keep", "--keep came without --mask and --outpaint"),
    ("--image p.png --width 256 --height 64", "--image p.png is 48x32 pixels, expected the shape of 256x64"),
    ("--image nowhere.png", "nowhere.png.* cannot be opened"),
    ("--image broken.png", "broken.png: no picture"),
    ("--redux p.png", "Redux embedder is missing .*expected one trained for this model.*--redux-weights"),
    ("--redux p.png:11", "--redux p.png:11: scale 11, expected a number from 0 to 10"),
    ("--redux p.png:x", "p.png:x' cannot be opened"),
    ("--negative b", "--negative came without --cfg-scale"),
    ("--cfg-scale -1", "--cfg-scale -1.0: expected 0 or more"),
    ("--cfg-start 0.5 --cfg-end 0.5", "--cfg-start 0.5 and --cfg-end 0.5: expected start before end"),
    ("--control-end 2", "--control-end 2.0: expected a share"),
    ("--controlnet x.safetensors", "--controlnet came without a picture to follow"),
    ("--controlnet x.safetensors --control p.png", "--controlnet x.safetensors is no file"),
    ("--controlnet broken.png --control p.png", "broken.png"),
    ("--model fill --image p.png --mask m.png", "a FLUX.1 transformer is missing"),
    ("--model kontext --reference p.png", "a FLUX.1 transformer is missing.*flux1-kontext-dev.safetensors"),
])
def test_mistakes_are_one_line(words, said, photo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("FLUX_WEIGHTS", "FLUX_MODEL", "FLUX_AE"):
        monkeypatch.delenv(name, raising=False)
    photo("p.png")
    photo("m.png", grey=True)
    photo("small.png", 20, 20, grey=True)
    (tmp_path / "broken.png").write_bytes(b"no picture at all")
    with pytest.raises(UserError, match=said) as caught:
        sample.main(["a", *words.split()])
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_identity_wants_as_many_blocks(draw, photo, folder):
    with pytest.raises(UserError, match="identity came with a ControlNet of 1 blocks, expected 2"):
        draw("toy", "a", "--control", photo("p.png"), "--controlnet", folder / "control_latents.safetensors",
             "--control-index", "identity")


def test_presets_are_the_published_ones():
    sizes = {name: (p.flux.in_channels, p.guidance, p.steps) for name, p in config.PRESETS.items()}
    assert [sizes[name] for name in ("fill", "kontext", "canny", "depth")] == [(384, 30, 50), (64, 2.5, 30), (128, 30, 50),
                                                                              (128, 10, 50)]
    assert {"fill", "kontext", "canny", "depth"} <= set(weights.RELEASES)
