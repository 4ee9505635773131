"""P10 (pictures from outside do no harm), and what our own pictures promise: names, bytes, recipe, full disks."""

import errno
import io
import json
import os
import random
import resource
import struct
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageColor, ImageFont, PngImagePlugin

from flux import pictures
from flux.errors import UserError
from flux.pictures import PictureError

ROOT = Path(__file__).parents[1]
CORNERS = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], np.uint8)  # red green / blue white


def encoded(pil, kind, **options):
    data = io.BytesIO()
    pil.save(data, kind, **options)
    return data.getvalue()


def write(path, data):
    path.write_bytes(data)
    return path


def gradient(width=64, height=48):
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 4, y * 5, x * y, 255 - x * 3], -1).astype(np.uint8)  # (H, W, 4)


def png(width, height, depth, colour, pixels, *chunks):
    """A PNG written by hand: for headers that lie, and for 16-bit colours, which Pillow does not write."""
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def originals():
    rgba = Image.fromarray(gradient())
    rgb, exif = rgba.convert("RGB"), Image.Exif()
    exif[pictures.ORIENTATION], exif[0x011A], exif.get_ifd(0x8769)[0x9003] = 6, 72.5, "2020"
    two = {"save_all": True, "append_images": [rgb.rotate(180)]}
    yield from (encoded(rgb, "JPEG", exif=exif), encoded(rgb, "JPEG", progressive=True),
                encoded(rgb.convert("CMYK"), "JPEG"), encoded(rgb.convert("L"), "JPEG"))
    yield from (encoded(rgb, "PNG", exif=exif), encoded(rgba, "PNG"), encoded(rgb.quantize(16), "PNG", transparency=3),
                encoded(Image.fromarray(gradient()[..., 0].astype(np.uint16) * 257), "PNG"), encoded(rgb, "PNG", **two))
    yield from (encoded(rgb, "WEBP", exif=exif), encoded(rgba, "WEBP", lossless=True), encoded(rgb, "WEBP", **two))
    yield from (encoded(rgb, "BMP"), encoded(rgb, "GIF", **two), encoded(rgb, "TIFF", exif=exif),
                encoded(rgb, "TIFF", compression="tiff_lzw"), encoded(rgb, "TIFF", compression="jpeg"))


def mutated(data, dice):
    data = bytearray(data)
    exif = max(data.find(b"Exif"), data.find(b"eXIf"), 0)
    for _ in range(dice.choice((1, 1, 2, 4, 16))):
        at = dice.choice((dice.randrange(len(data)), dice.randrange(160), exif + dice.randrange(80))) % len(data)
        end = at + dice.randrange(1, 64)
        match dice.choice(("flip", "byte", "word", "cut", "copy", "truncate")):
            case "flip":
                data[at] ^= 1 << dice.randrange(8)
            case "byte":
                data[at] = dice.choice((0, 1, 127, 128, 255))
            case "word":
                word = dice.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\xff\xff", b"\0\x01"))
                data[at:at + len(word)] = word
            case "cut":
                del data[at:end]
            case "copy":
                data[at:at] = data[at // 2:at // 2 + end - at]
            case "truncate":
                del data[max(at, 1):]
        data = data or bytearray(1)
    return with_checksums(bytes(data)) if data.startswith(b"\x89PNG") and dice.random() < 0.8 else bytes(data)


def with_checksums(data):
    """The chunks of a PNG with their checksums made right, so that a mutation reaches the code behind them."""
    out, at = data[:8], 8
    while at + 12 <= len(data) and (end := at + 12 + int.from_bytes(data[at:at + 4], "big")) <= len(data):
        out += data[at:end - 4] + struct.pack(">I", zlib.crc32(data[at + 4:end - 4]))
        at = end
    return out + data[at:]


def peak_bytes():
    status = Path("/proc/self/status")  # on Linux ru_maxrss may still be that of the process we were started from
    if status.exists():
        return next(int(line.split()[1]) << 10 for line in status.read_text().splitlines() if "VmHWM" in line)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def read_mutated(count, folder):
    files, seen, escaped = list(originals()), Counter(), []
    for number in range(count):
        dice = random.Random(number)
        path = write(folder / "mutated", mutated(files[number % len(files)], dice))
        try:
            pil = pictures.read(path)
            assert pil.mode == "RGB" and pil.width * pil.height <= pictures.MAX_PIXELS
            seen["read"] += 1
        except PictureError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            seen["refused"] += 1
        except BaseException as error:  # whatever else comes is what this test is for
            escaped.append((number, repr(error)))
    return {"seen": seen, "escaped": escaped[:5], "peak": peak_bytes(), "torch": "torch" in sys.modules}


def test_mutated_pictures_give_a_picture_or_a_picture_error(hard, tmp_path):
    count = 50_000 if hard else 2_000
    done = subprocess.run([sys.executable, "-W", "ignore", __file__, str(count), str(tmp_path)], capture_output=True,
                          text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})  # its memory is only its own
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert result["escaped"] == []
    assert min(result["seen"].values()) > count / 10 and sum(result["seen"].values()) == count
    assert result["peak"] < 1e9
    assert not result["torch"]


@pytest.mark.parametrize("kind, edge", [("JPEG", 8000), ("PNG", 8000), ("TIFF", 8000), ("WEBP", 6324)])
def test_the_largest_pictures_fit_in_the_memory(hard, tmp_path, kind, edge):
    if not hard:
        pytest.skip("takes seconds and a gigabyte: pytest --hard")
    exif = Image.Exif()
    exif[pictures.ORIENTATION] = 6
    pixels = np.resize(gradient(), (edge, edge, 4))
    pil = Image.fromarray(pixels[..., :3].copy() if kind == "JPEG" else pixels)
    options = {"JPEG": {"progressive": True}, "PNG": {"compress_level": 1}, "TIFF": {"compression": "tiff_deflate"},
               "WEBP": {"method": 0}}
    path = write(tmp_path / "large", encoded(pil, kind, exif=exif, **options[kind]))
    code = ("import sys, test_pictures; size = test_pictures.pictures.read(sys.argv[1]).size; "
            "print(*size, test_pictures.peak_bytes())")
    out = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True,
                         env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}).stdout.split()
    assert out[:2] == [str(edge)] * 2 and int(out[2]) < 1e9


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(10))
def test_exif_orientation(tmp_path, kind, orientation):
    turn = {2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1], 8: np.rot90,
            5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a, -1),
            7: lambda a: np.rot90(a, 2).transpose(1, 0, 2)}
    stored = np.kron(CORNERS, np.ones((32, 48, 1), np.uint8))
    exif = Image.Exif()
    exif[pictures.ORIENTATION] = orientation
    options = {"exif": exif} | ({"quality": 95} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {})
    pil = pictures.read(write(tmp_path / "a", encoded(Image.fromarray(stored), kind, **options)))
    expected = turn.get(orientation, lambda a: a)(stored)
    height, width, _ = expected.shape
    assert pil.size == (width, height)
    centres = slice(height // 4, None, height // 2), slice(width // 4, None, width // 2)  # of the four quarters
    assert np.abs(np.asarray(pil)[centres].astype(int) - expected[centres]).max() < 4  # JPEG is not exact


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("exif", [b"MM\xff\xff\0\0\0\x08", b"MM\0\x2a\0\0\0\x08\xff\xff\1\x12", b"II\x2b\0", b"MM"])
def test_broken_exif_means_upright(tmp_path, exif):
    pil = pictures.read(write(tmp_path / "a.png", encoded(Image.fromarray(CORNERS), "PNG", exif=b"Exif\0\0" + exif)))
    assert np.array_equal(pil, CORNERS)


def test_alpha_goes_over_white(tmp_path):
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, 0], pixels[0, 1], pixels[1, 0] = (10, 20, 30, 255), (255, 0, 0, 128), (9, 9, 9, 0)
    expected = [[[10, 20, 30], [255, 127, 127]], [[255, 255, 255], [255, 255, 255]]]
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})):
        pil = pictures.read(write(tmp_path / "a", encoded(Image.fromarray(pixels), kind, **options)))
        assert np.array_equal(pil, expected), kind
    grey = Image.fromarray(np.array([[[40, 255], [40, 0]]], np.uint8), "LA")
    assert np.asarray(pictures.read(write(tmp_path / "a", encoded(grey, "PNG")))).tolist() == [[[40] * 3, [255] * 3]]


def test_palette_with_and_without_transparency(tmp_path):
    palette = Image.new("P", (3, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    palette.putdata([0, 1, 2])
    red, green, blue, white = [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]
    for options, expected in (({}, [red, green, blue]), ({"transparency": 1}, [red, white, blue]),
                              ({"transparency": b"\xff\xff\0"}, [red, green, white])):
        pil = pictures.read(write(tmp_path / "a", encoded(palette, "PNG", **options)))
        assert np.asarray(pil).tolist() == [expected], options
    pil = pictures.read(write(tmp_path / "a", encoded(palette, "GIF", transparency=0)))
    assert np.asarray(pil).tolist() == [[white, green, blue]]


def test_16_bits_are_scaled_and_grey_equals_colour(tmp_path):
    levels = np.array([0, 255, 256, 257, 32768, 65279, 65280, 65535], np.uint16)
    grey = Image.fromarray(levels[None])
    colour = png(8, 1, 16, 2, b"\0" + np.repeat(levels, 3).astype(">u2").tobytes())
    for data in (encoded(grey, "PNG"), encoded(grey, "TIFF"), colour):
        pil = pictures.read(write(tmp_path / "a", data))
        assert np.asarray(pil).tolist() == [[[level >> 8] * 3 for level in levels.tolist()]]
    keyed = png(3, 1, 16, 0, b"\0" + np.array([0, 1000, 1001], ">u2").tobytes(), (b"tRNS", struct.pack(">H", 1000)))
    assert np.asarray(pictures.read(write(tmp_path / "a", keyed)))[0, :, 0].tolist() == [0, 255, 3]
    for dtype, value in ((np.float32, 0.5), (np.int32, 70_000), (np.int32, -1)):
        data = encoded(Image.fromarray(np.full((2, 2), value, dtype)), "TIFF")
        with pytest.raises(PictureError, match="no agreed white"):
            pictures.read(write(tmp_path / "a", data))


def test_cmyk_is_converted(tmp_path):
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    for kind, options in (("JPEG", {"quality": 95}), ("TIFF", {})):
        pixels = np.asarray(pictures.read(write(tmp_path / "a", encoded(cmyk, kind, **options)))).astype(int)
        assert np.abs(pixels - [255, 0, 0]).max() < 6, kind


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animated_gives_the_first_frame(tmp_path, kind):
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(first, kind, save_all=True, append_images=[second], **options)
    assert np.array_equal(pictures.read(write(tmp_path / "a", data)), first)


@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (20_000, 1)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP"])
def test_odd_shapes(tmp_path, size, kind):
    pil = pictures.read(write(tmp_path / "a", encoded(Image.new("RGB", size, "white"), kind)))
    assert pil.size == size and pil.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("width, height", [(8000, 8001), (65_000, 1000), (50_000, 50_000)])
def test_too_many_pixels_are_refused_from_the_header(tmp_path, monkeypatch, width, height):
    path = write(tmp_path / "bomb.png", png(width, height, 8, 2, bytes(1000)))
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda pil: pytest.fail("decoded"))
    with pytest.raises(PictureError, match=r"bomb\.png.*64 megapixels"):
        pictures.read(path)


def test_64_megapixels_are_not_too_many(tmp_path):
    with pytest.raises(PictureError, match="broken"):  # past the header, into pixels that are not there
        pictures.read(write(tmp_path / "a.png", png(8000, 8000, 8, 2, bytes(1000))))


def test_webp_has_a_lower_limit_for_the_sake_of_memory(tmp_path):
    header = b"\x2f" + ((8000 - 1) | (5001 - 1) << 14).to_bytes(4, "little") + bytes(27)
    data = b"RIFF" + struct.pack("<I", 12 + len(header)) + b"WEBPVP8L" + struct.pack("<I", len(header)) + header
    with pytest.raises(PictureError, match="40,008,000 pixels; at most 40 megapixels are read from a WebP"):
        pictures.read(write(tmp_path / "a.webp", data))


def test_what_is_no_picture_is_named_for_what_it_is(tmp_path):
    whole = encoded(Image.fromarray(gradient()).convert("RGB"), "JPEG")
    cases = {"empty.png": (b"", "is empty"), "page.png": (b"<html>not found</html>", "no picture"),
             "half.jpg": (whole[:len(whole) // 2], "truncated"), "head.png": (b"\x89PNG\r\n\x1a\n", "no picture"),
             "drawing.ppm": (encoded(Image.new("RGB", (2, 2)), "PPM"), "no picture")}
    for name, (data, words) in cases.items():
        with pytest.raises(PictureError, match=words) as caught:
            pictures.read(write(tmp_path / name, data))
        assert name in str(caught.value)
    os.mkfifo(tmp_path / "pipe.png")
    os.truncate(write(tmp_path / "huge.png", whole), pictures.MAX_BYTES + 1)
    for name, words in (("missing.png", "No such file"), ("", "is a folder"), ("pipe.png", "no ordinary file"),
                        ("huge.png", "256 MB, at most 256"), ("x" * 300, "too long"), ("nul\0.png", "null")):
        with pytest.raises(PictureError, match=words):
            pictures.read(tmp_path / name)
    assert issubclass(PictureError, UserError)


def test_reading_leaves_pillow_as_it_was(tmp_path):
    before = Image.MAX_IMAGE_PIXELS
    pictures.read(write(tmp_path / "a.png", encoded(Image.new("RGB", (2, 2)), "PNG")))
    assert before == Image.MAX_IMAGE_PIXELS and not sys.modules["PIL.ImageFile"].LOAD_TRUNCATED_IMAGES


def test_every_byte_survives_the_tensor():
    import torch

    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    pil = Image.fromarray(np.stack([levels, levels.T, levels[::-1]], -1))
    image = pictures.to_tensor(pil)
    assert image.shape == (1, 3, 16, 16) and image.dtype == torch.float32
    assert image.min() >= -1 and image.max() == 1 and abs(image[0, 0, 7, 15] - (127 / 127.5 - 1)) < 2e-7
    assert np.array_equal(pictures.to_pil(image)[0], pil)


def test_to_pil_clamps_and_truncates_as_the_reference_does():
    import torch

    values = torch.tensor([-2, -1, -1 + 1.9 / 127.5, 0, 0.999, 1, 3]).expand(2, 3, 1, -1)
    pils = pictures.to_pil(values)
    assert len(pils) == 2 and np.asarray(pils[1])[0, :, 0].tolist() == [0, 0, 1, 127, 254, 255, 255]
    for bad in (float("nan"), float("inf")):
        image = torch.zeros(2, 3, 4, 4)
        image[1, 2, 3, 0] = bad
        with pytest.raises(FloatingPointError, match=r"\[0, 1\]"):
            pictures.to_pil(image)
    with pytest.raises(AssertionError):
        pictures.to_pil(torch.zeros(3, 2, 2))


RECIPE = {"recipe": "t2i", "seed": 42, "prompt": "a red circle,\n\"SALE\" 日本", "versions": {"minflux": "0.1.0"},
          "config": {"steps": 20, "guidance": 3.5, "model": "demo", "lora": [["a.safetensors", 0.5, "9f86d081"]]},
          "weights": {"flux": ["demo.safetensors", "2c26b46b"]}}


def test_recipe_goes_round_and_the_bytes_are_always_the_same(tmp_path):
    pil = Image.fromarray(gradient()).convert("RGB")
    for name in "ab":
        pictures.write_png(tmp_path / f"{name}.png", pil, dict(reversed(RECIPE.items())) if name == "b" else RECIPE)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert pictures.read_metadata(tmp_path / "a.png") == RECIPE
    assert np.array_equal(pictures.read(tmp_path / "a.png"), pil)
    with Image.open(tmp_path / "a.png") as file:
        assert file.text["parameters"] == ('a red circle,\n"SALE" 日本\nSteps: 20, Sampler: Euler, CFG scale: 3.5, '
                                           "Seed: 42, Size: 64x48, Model: demo")
        assert set(file.text) == {"parameters", "minflux"}


def test_parameters_quote_what_would_break_the_line_and_leave_out_what_is_unknown():
    text = pictures.parameters({"prompt": "a \udcff", "config": {"model": "my, model"}}, (8, 8))
    assert text == 'a ?\nSampler: Euler, Size: 8x8, Model: "my, model"'


def test_without_metadata_there_is_none(tmp_path):
    pictures.write_png(tmp_path / "a.png", Image.new("RGB", (8, 8)), None)
    with Image.open(tmp_path / "a.png") as file:
        assert not file.text
    with pytest.raises(UserError, match="carries no recipe"):
        pictures.read_metadata(tmp_path / "a.png")


@pytest.mark.parametrize("text, words", [("{", "broken JSON"), ("[" * 100_000, "broken JSON"), ("[1]", "is a list"),
                                         ('"' + "x" * (1 << 20) + '"', "over 1 MB"), ("9" * 5000, "broken JSON")])
def test_foreign_or_hostile_recipes_are_refused(tmp_path, text, words):
    info = PngImagePlugin.PngInfo()
    info.add_text("minflux", text)
    with pytest.raises(UserError, match=words):
        pictures.read_metadata(write(tmp_path / "a.png", encoded(Image.new("RGB", (8, 8)), "PNG", pnginfo=info)))


def test_recipes_are_only_read_from_whole_png_headers(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("minflux", " " * (2 << 20), zip=True)  # a small file, a large text
    bomb = encoded(Image.new("RGB", (8, 8)), "PNG", pnginfo=info)
    assert len(bomb) < 10_000
    for data in (bomb, b"", b"x", encoded(Image.new("RGB", (8, 8)), "JPEG")):
        with pytest.raises(PictureError, match=r"a\.png"):
            pictures.read_metadata(write(tmp_path / "a.png", data))
    with pytest.raises(PictureError, match="No such file"):
        pictures.read_metadata(tmp_path / "missing.png")


def test_names_go_on_where_the_folder_stands(tmp_path):
    folder = tmp_path / "new" / "out"
    pil = Image.new("RGB", (8, 8))
    for number, seed in ((1, 42), (2, 42), (3, 7)):
        path = pictures.next_path(folder, seed)
        assert path == folder / f"{number:05d}_seed{seed}.png"
        pictures.write_png(path, pil, None)
    write(folder / "00041_seed1.png", b"mine")
    write(folder / "holiday.png", b"mine")
    assert pictures.next_path(folder, 5).name == "00042_seed5.png"
    assert pictures.next_path(folder, 5).name == "00043_seed5.png"  # the reservation counts
    assert sorted(os.listdir(folder))[2:] == ["00001_seed42.png", "00002_seed42.png", "00003_seed7.png",
                                              "00041_seed1.png", "holiday.png"]
    with pytest.raises(UserError, match="--out"):
        pictures.next_path(folder / "holiday.png", 1)


def test_a_name_taken_at_the_last_moment_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "listdir", lambda folder: [])  # what we saw before the others wrote
    write(tmp_path / "00001_seed1.png", b"theirs")
    write(tmp_path / ".00002_seed1.png.part", b"")
    assert pictures.next_path(tmp_path, 1).name == "00003_seed1.png"
    assert not (tmp_path / ".00001_seed1.png.part").exists()


def test_racing_processes_never_overwrite(tmp_path):
    code = ("import sys; from PIL import Image; from flux import pictures\n"
            "for i in range(40): pictures.write_png(pictures.next_path(sys.argv[1], 1), "
            "Image.new('RGB', (1, 1), (int(sys.argv[2]), i, 0)), None)")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    racers = [subprocess.Popen([sys.executable, "-c", code, tmp_path, str(n)], env=env) for n in range(3)]
    assert [racer.wait() for racer in racers] == [0, 0, 0]
    pixels = [pictures.read(tmp_path / name).getpixel((0, 0)) for name in os.listdir(tmp_path)]
    assert len(pixels) == len(set(pixels)) == 120


@pytest.mark.parametrize("call", ["fsync", "write", "replace"])
def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch, call):
    path = tmp_path / "a.png"
    pictures.write_png(path, Image.new("RGB", (8, 8), "red"), None)
    before = path.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    if call == "write":
        original = Path.open
        patch = Path, "open", lambda path, mode: FullDisk(original(path, mode))
    else:
        patch = os, call, full
    with (monkeypatch.context() as patched,
          pytest.raises(UserError, match=r"disk full .*a\.png: \d+ bytes were needed, \d+ are free")):
        patched.setattr(*patch)
        pictures.write_png(path, Image.fromarray(gradient()).convert("RGB"), None)
    assert os.listdir(tmp_path) == ["a.png"] and path.read_bytes() == before


class FullDisk:
    """A file that takes ten bytes, then no more."""

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, data):
        self.file.write(data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")


def test_an_interrupted_write_leaves_nothing_and_other_faults_are_named(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="cannot write .*No such file"):
        pictures.write_png(tmp_path / "missing" / "a.png", Image.new("RGB", (8, 8)), None)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pictures.write_png(pictures.next_path(tmp_path, 1), Image.new("RGB", (8, 8)), None)
    assert os.listdir(tmp_path) == []


def dark(pil):
    return np.asarray(pil.convert("L")) < 128


def test_contact_sheet_places_pictures_in_order_and_captions_below():
    colours = ["#ff8080", "#80ff80", "#8080ff", "#ffff80", "#ff80ff"]
    pils = [Image.new("RGB", (128, 96), colour) for colour in colours]
    plain = np.asarray(pictures.contact_sheet(pils, 3))
    assert plain.shape == (2 * 96 + 3 * 10, 3 * 128 + 4 * 10, 3)
    for i, pil in enumerate(pils):
        top, left = 10 + i // 3 * 106, 10 + i % 3 * 138
        assert (plain[top:top + 96, left:left + 128] == np.asarray(pil)).all()
    sheet = pictures.contact_sheet(pils, 3, ["one", "two " * 12, "x" * 400, "", "five"])
    assert sheet.height > plain.shape[0] + 4 * 12 and dark(sheet).any(1).sum() >= 40
    columns = dark(sheet).any(0)
    assert not columns[:10].any() and not columns[-10:].any() and not columns[138:148].any()  # margins stay clear
    assert pictures.contact_sheet([Image.new("RGB", (2048, 1024))], 4).size == (512 + 50, 256 + 50)


def test_captions_wrap_within_their_width():
    font = ImageFont.load_default(12)
    lines = pictures._wrap("a red circle on a blue background and " + "w" * 60 + " the end", font, 120)
    assert len(lines) == 4 and lines[-1].endswith("...") and all(font.getlength(line) <= 120 for line in lines)
    assert pictures._wrap("a red circle", font, 120) == ["a red circle"] and pictures._wrap(" ", font, 120) == []


def near(pil, colour):
    """(row, column) of the pixels of nearly this colour inside the axes."""
    wanted = np.array(ImageColor.getrgb(colour))
    return np.argwhere((abs(np.asarray(pil).astype(int) - wanted) < 50).all(-1)[60:480, 90:920])


@pytest.mark.parametrize("log", [False, True])
def test_loss_plot_draws_what_it_is_given(log):
    steps = np.arange(1, 201)
    falling = 10.0 ** (-steps / 100)
    pil = pictures.loss_plot(steps, falling, falling, log=log)
    rows, columns = near(pil, pictures.STRONG).T
    assert pil.size == (960, 540) and columns.max() - columns.min() > 800
    middle = np.median(rows[abs(columns - 415) < 5]) / 420  # the loss halfway: 0.1, a tenth of the way up or half of it
    assert abs(middle - (0.5 if log else 0.87)) < 0.05
    rising = near(pictures.loss_plot(steps, falling[::-1], falling[::-1], log=log), pictures.STRONG)
    assert rising[rising[:, 1] < 100, 0].mean() > 300 > 150 > rising[rising[:, 1] > 780, 0].mean()


@pytest.mark.parametrize("values", [[], [0.5], [0.5, 0.5, 0.5], [1, float("nan"), 2], [float("inf")], [0.0, -1.0],
                                    [1e-9, 2e-9], [1e12, 1e-12, 3]])
@pytest.mark.parametrize("log", [False, True])
def test_loss_plot_takes_any_numbers(values, log):
    steps = range(len(values))
    assert pictures.loss_plot(steps, values, values, log=log).size == (960, 540)


if __name__ == "__main__":
    print(json.dumps(read_mutated(int(sys.argv[1]), Path(sys.argv[2]))))
