"""Pictures from outside, and the pictures we make: reading, pixels <-> tensors, PNG with its recipe inside, drawings.

A picture from outside may be anything, so it comes in by one door, `read`, which returns 8-bit RGB or raises
PictureError. A picture of ours goes out by one door, `write_png`: whole or not at all, and the same bytes each time.
"""

import errno
import io
import json
import math
import os
import re
import shutil
import stat
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from flux.errors import UserError
from flux.shards import Member

if TYPE_CHECKING:
    from torch import Tensor

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
MAX_PIXELS = 64_000_000
MAX_WEBP_PIXELS = 40_000_000  # its decoder keeps two more canvases: 17 bytes a pixel at the peak, of our 1 GB
MAX_BYTES = 256 << 20  # of the file: Pillow holds whole chunks, and whole WebP files, in memory
MAX_RECIPE_BYTES = 1 << 20

# What Pillow 13 lets out of a broken file. OSError, SyntaxError, ValueError, TypeError and DecompressionBombError came
# up among 260,000 mutated files; the others stand in the except clauses of Pillow's own readers. Warning is there for
# those who run Python with -W error.
BROKEN = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, ArithmeticError, MemoryError,
          struct.error, zlib.error, Image.DecompressionBombError, Warning)

ORIENTATION = 0x0112  # EXIF tag; what undoes its values 2 to 8
UPRIGHT = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
           5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
           8: Image.Transpose.ROTATE_90}

PAPER, INK, FAINT, RAW, STRONG, OTHER = "#fbfbf9", "#23262b", "#dcdedf", "#b9cde4", "#1f5fa8", "#c8642a"


class PictureError(UserError):
    """A file that is no picture we can use: names the file and what is wrong with it."""


def read(path: str | Path | Member) -> Image.Image:
    """A JPEG, PNG, WebP, BMP, GIF or TIFF file or archive member -> upright 8-bit RGB, its first frame, alpha over white.

    Size is judged by the header, before decoding. Colour profiles are not applied. PictureError for everything else.
    """
    _check_file(path)
    try:
        with Image.open(path.open() if isinstance(path, Member) else path, formats=FORMATS) as pil:
            width, height = pil.size
            limit = MAX_WEBP_PIXELS if pil.format == "WEBP" else MAX_PIXELS
            if width * height <= limit:
                pil.load()
                return _upright(_to_rgb(pil), _orientation(pil))  # a TIFF is upright after load, its tag gone
    except Image.DecompressionBombError as error:  # only for a header of more than 179 megapixels
        raise PictureError(f"{path}: {error}; at most {MAX_PIXELS // 10**6} megapixels are read: make it "
                           "smaller") from error
    except Image.UnidentifiedImageError as error:
        raise PictureError(f"{path}: no picture, or its header is broken; expected JPEG, PNG, WebP, BMP, GIF or TIFF: "
                           "replace it") from error
    except BROKEN as error:
        raise PictureError(f"{path}: broken picture ({type(error).__name__}: {error}); expected a whole one, 8 or 16 "
                           "bits: save it again as PNG or replace it") from error
    raise PictureError(f"{path}: {width}x{height} are {width * height:,} pixels; at most {limit // 10**6} megapixels "
                       f"are read{' from a WebP' if limit < MAX_PIXELS else ''}: make it smaller")


def _check_file(path: str | Path | Member) -> None:
    try:
        status = os.stat(path.archive if isinstance(path, Member) else path)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name, or half a surrogate pair
        reason = error.strerror if isinstance(error, OSError) else error
        raise PictureError(f"{str(path)!r} cannot be opened ({reason}); expected a picture: check the name") from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "no ordinary file"
        raise PictureError(f"{path} is {kind}; expected a picture: name one file")
    total = path.size if isinstance(path, Member) else status.st_size
    if not 0 < total <= MAX_BYTES:
        size = f"has {total >> 20} MB, at most {MAX_BYTES >> 20} are read" if total else "is empty"
        raise PictureError(f"{path} {size}; expected a picture: replace it")


def _to_rgb(pil: Image.Image) -> Image.Image:
    if pil.mode == "I" or pil.mode.startswith("I;16"):
        pil = _to_8_bit(pil)
    if pil.mode == "F":
        raise ValueError("floating-point pixels, for which there is no agreed white")
    if not pil.has_transparency_data:
        return pil.convert("RGB")
    pil = pil.convert("RGBA")
    white = Image.new("RGB", pil.size, "white")
    white.paste(pil, mask=pil)
    return white


def _to_8_bit(pil: Image.Image) -> Image.Image:
    """16-bit grey -> its high byte, as Pillow does for 16-bit RGB, so that both give the same picture."""
    grey = np.asarray(pil)
    if grey.min() < 0 or grey.max() > 65535:
        raise ValueError(f"32-bit pixels from {grey.min()} to {grey.max()}, for which there is no agreed white")
    high = (grey >> 8).astype(np.uint8)
    if "transparency" in pil.info:
        high[grey == pil.info["transparency"]] = 255  # over white
    return Image.fromarray(high)


def _orientation(pil: Image.Image) -> int:
    try:
        return pil.getexif().get(ORIENTATION, 1)
    except BROKEN:
        return 1  # the pixels are whole; only what the camera wrote about them is not


def _upright(pil: Image.Image, orientation: int) -> Image.Image:
    return pil.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else pil


def to_tensor(pil: Image.Image) -> "Tensor":
    """RGB picture -> (1, 3, H, W) float32 in [-1, 1]; `to_pil` gives exactly the same bytes back."""
    import torch

    pixels = torch.from_numpy(np.array(pil.convert("RGB")))  # (H, W, 3)
    # v / 127.5 - 1 alone would come back one step darker for 63 of the 256 values, by the truncation of to_pil.
    image = (pixels.permute(2, 0, 1)[None].float() / 127.5 - (1 - 2**-24)).clamp(max=1)
    return image.contiguous()


def to_pil(image: "Tensor") -> list[Image.Image]:
    """(B, 3, H, W) in [-1, 1], clamped -> B pictures; bytes are truncated, not rounded, as in the original code."""
    import torch

    assert image.ndim == 4 and image.shape[1] == 3, f"image {tuple(image.shape)}, expected (B, 3, H, W)"
    image = image.detach().float().cpu()
    broken = (~torch.isfinite(image)).flatten(1).sum(1).tolist()
    if any(broken):
        raise FloatingPointError(f"image has NaN or infinite values ({broken} per picture): it is not written")
    pixels = (127.5 * (image.clamp(-1, 1) + 1)).byte().permute(0, 2, 3, 1)  # (B, H, W, 3)
    return [Image.fromarray(picture) for picture in pixels.numpy()]


def write_png(path: str | Path, pil: Image.Image, metadata: dict | None, sync: bool = True) -> None:
    """Writes a PNG, whole or not at all, over what was there; with `metadata` (JSON values), its recipe inside. Without
    `sync` a power cut may cost it: for pictures by the thousand that can be made again.

    Of the metadata, `prompt`, `seed`, `steps`, `guidance` and `config` (for the model) also make the `parameters` text.
    UserError when it cannot be written.
    """
    info = None
    if metadata is not None:
        info = PngImagePlugin.PngInfo()
        info.add_text("parameters", parameters(metadata, pil.size))
        info.add_text("minflux", json.dumps(metadata, sort_keys=True, allow_nan=False))
    data = io.BytesIO()
    pil.save(data, "PNG", pnginfo=info, compress_level=6)
    publish(Path(path), data.getbuffer(), sync)


def parameters(metadata: dict, size: tuple[int, int]) -> str:
    """The text other programs show: prompt, then one line of settings, in the form begun by A1111's web interface."""
    config = {**metadata.get("config", {}), **{key: metadata[key] for key in ("steps", "guidance") if key in metadata}}
    settings = {"Steps": config.get("steps"), "Sampler": "Euler", "CFG scale": config.get("guidance"),  # the distilled
                "Seed": metadata.get("seed"), "Size": f"{size[0]}x{size[1]}", "Model": config.get("model")}
    line = ", ".join(f"{key}: {_quoted(value)}" for key, value in settings.items() if value is not None)
    return f"{metadata.get('prompt', '')}\n{line}".encode("utf-8", "replace").decode()


def _quoted(value: object) -> str:
    return json.dumps(str(value), ensure_ascii=False) if re.search(r'[,:\n"]', str(value)) else str(value)


def read_metadata(path: str | Path) -> dict:
    """What `write_png` was given as metadata; UserError for a picture that carries none, or none of ours."""
    _check_file(path)
    try:
        with Image.open(path, formats=("PNG",)) as pil:  # the header and the texts; no pixels. Pillow bounds the texts.
            text = pil.info.get("minflux")
    except BROKEN as error:
        raise PictureError(f"{path}: no readable PNG ({type(error).__name__}: {error}); expected a picture made by "
                           "sample.py: name one") from error
    if not isinstance(text, str) or len(text) > MAX_RECIPE_BYTES:
        what = "no recipe" if text is None else "a recipe of over 1 MB"
        raise PictureError(f"{path} carries {what}; expected a picture made by sample.py: name one made without "
                           "--no-metadata")
    try:
        metadata = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PictureError(f"{path}: its recipe is broken JSON ({error}); expected what sample.py wrote: name "
                           "another") from error
    if not isinstance(metadata, dict):
        raise PictureError(f"{path}: its recipe is a {type(metadata).__name__}; expected a JSON object: name another")
    return metadata


def next_path(folder: str | Path, seed: int, suffix: str = ".png") -> Path:
    """The next free `00012_seed42.png`, reserved for us until `write_png` fills it; makes the folder.

    The reservation is the hidden file through which `write_png` writes, created exclusively: no two processes get the
    same name, and a crash leaves at most that hidden file, never an empty picture.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        taken = [re.match(r"\.?(\d{5,})_seed", name) for name in os.listdir(folder)]
        number = max((int(match[1]) for match in taken if match), default=0) + 1
        while True:
            path = folder / f"{number:05d}_seed{seed}{suffix}"
            number += 1
            try:
                _partial(path).open("xb").close()
            except FileExistsError:
                continue
            if not os.path.lexists(path):  # nobody can publish it any more: we hold its only way in
                return path
            _partial(path).unlink()
    except OSError as error:
        raise UserError(f"cannot write into {folder} ({error.strerror}); expected a folder for pictures: choose "
                        "another --out") from error


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def publish(path: Path, data: bytes | memoryview, sync: bool = True) -> None:
    """Beside its place, synced, then renamed."""
    partial = _partial(path)
    try:
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                if sync:
                    os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            if sync:
                os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(path.parent).free
            raise UserError(f"disk full while writing {path}: {len(data)} bytes were needed, {free} are free; free "
                            "some space or choose another --out") from error
        raise UserError(f"cannot write {path} ({error.strerror}); expected a folder we may write to: choose another "
                        "--out") from error


def contact_sheet(pils: Sequence[Image.Image], columns: int, captions: Sequence[str] | None = None) -> Image.Image:
    """Pictures in rows of `columns`, no edge above 512 pixels, captions below them in at most four lines."""
    assert pils and columns > 0 and (captions is None or len(captions) == len(pils))
    pils = [pil.convert("RGB") for pil in pils]
    for pil in pils:
        pil.thumbnail((512, 512), Image.Resampling.LANCZOS)  # ours: convert made a copy
    width = max(pil.width for pil in pils)
    gap = max(10, width // 20)
    font = ImageFont.load_default(min(18, max(12, width // 22)))
    leading = round(font.size * 1.3)
    texts = [_wrap(caption, font, width) for caption in captions] if captions else [[]] * len(pils)

    columns = min(columns, len(pils))
    rows = [range(first, min(first + columns, len(pils))) for first in range(0, len(pils), columns)]
    heights = [max(pils[i].height for i in row) for row in rows]
    lines = [max(len(texts[i]) for i in row) for row in rows]
    below = [count * leading + gap if count else 0 for count in lines]  # pixels under each row's pictures
    sheet = Image.new("RGB", (columns * (width + gap) + gap, sum(heights) + sum(below) + (len(rows) + 1) * gap), PAPER)
    draw = ImageDraw.Draw(sheet)
    bottom = 0
    for row, height, text in zip(rows, heights, below, strict=True):
        bottom += gap + height
        for column, i in enumerate(row):
            left = gap + column * (width + gap)
            sheet.paste(pils[i], (left + (width - pils[i].width) // 2, bottom - pils[i].height))
            for number, line in enumerate(texts[i]):
                draw.text((left, bottom + gap // 2 + number * leading), line, INK, font)
        bottom += text
    return sheet


def _wrap(caption: str, font: ImageFont.FreeTypeFont, width: int, most: int = 4) -> list[str]:
    """Lines no wider than `width` pixels; a wider word is cut, what exceeds `most` lines becomes an ellipsis."""
    lines = [""]
    for word in caption[:2000].split():
        if lines[-1] and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    lines = lines[1:]
    if len(lines) > most:
        last = lines[most - 1]
        while last and font.getlength(last + "...") > width:
            last = last[:-1]
        lines = [*lines[:most - 1], last.rstrip() + "..."]
    return lines


def loss_plot(steps: Sequence[float], raw: Sequence[float], smoothed: Sequence[float],
              held_out: Sequence[tuple[float, float]] = (), title: str = "loss", log: bool = False) -> Image.Image:
    """A 960x540 line chart: raw values light, smoothed ones strong, (step, value) of a held-out set as dots on a line. What
    is not finite (or, on a logarithmic axis, not positive) is left out; raw values outside the 1 % to 99 % range may leave
    the frame, and stop at its edge."""
    fine = 3  # drawn three times as large, then reduced: Pillow's lines have hard edges
    width, height = 960 * fine, 540 * fine
    left, top, right, bottom = 84 * fine, 56 * fine, width - 32 * fine, height - 52 * fine
    chart = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(chart)
    small, large = ImageFont.load_default(14 * fine), ImageFont.load_default(20 * fine)

    def shown(points):
        points = np.asarray(list(points), dtype=np.float64).reshape(-1, 2)
        points = points[np.isfinite(points).all(1) & ((points[:, 1] > 0) | (not log))]
        return np.c_[points[:, 0], np.log10(points[:, 1])] if log else points

    light, strong, dots = (shown(points) for points in (zip(steps, raw, strict=True), zip(steps, smoothed, strict=True),
                                                        held_out))
    levels = np.r_[np.percentile(light[:, 1], (1, 99)) if len(light) else [], strong[:, 1], dots[:, 1]]
    low, high = _range(levels, 0.05)
    first, last = _range(np.r_[light[:, 0], strong[:, 0]], 0)

    def place(points):
        x = left + (points[:, 0] - first) / (last - first) * (right - left)
        y = bottom - (points[:, 1].clip(low, high) - low) / (high - low) * (bottom - top)
        return list(zip(x.tolist(), y.tolist(), strict=True))

    for value, label in _log_ticks(low, high) if log else _ticks(low, high):
        y = place(np.array([[first, value]]))[0][1]
        draw.line((left, y, right, y), FAINT, fine)
        draw.text((left - 10 * fine, y), label, INK, small, anchor="rm")
    for value, label in _ticks(first, last, least=1):
        x = place(np.array([[value, low]]))[0][0]
        draw.line((x, bottom, x, bottom + 6 * fine), INK, fine)
        draw.text((x, bottom + 10 * fine), label, INK, small, anchor="mt")
    for points, colour, thick in ((light, RAW, 1.2), (strong, STRONG, 2.4), (dots, OTHER, 1.6)):
        if len(points) > 1:
            draw.line(place(points), colour, round(thick * fine), joint="curve")
        for x, y in place(points) if len(points) == 1 or points is dots else ():
            draw.circle((x, y), 4 * fine, colour)
    draw.line((left, top, left, bottom, right, bottom), INK, round(1.3 * fine))
    draw.text((left, 18 * fine), title, INK, large, anchor="lt")
    draw.text((right, height - 8 * fine), "step", INK, small, anchor="rb")
    x = right
    for label, colour in (("smoothed", STRONG), ("raw", RAW), *[("held out", OTHER)] * bool(len(dots))):
        x -= draw.textlength(label, small)
        draw.text((x, 28 * fine), label, INK, small, anchor="lm")
        draw.line((x - 34 * fine, 28 * fine, x - 8 * fine, 28 * fine), colour, 3 * fine)
        x -= 54 * fine
    return chart.reduce(fine)


def _range(values: np.ndarray, margin: float) -> tuple[float, float]:
    low, high = (values.min(), values.max()) if len(values) else (0.0, 1.0)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = low - (abs(low) / 2 or 1), high + (abs(high) / 2 or 1)
    return low - margin * (high - low), high + margin * (high - low)


def _ticks(low: float, high: float, least: float = 0) -> list[tuple[float, str]]:
    """About six round numbers, 1, 2 or 5 times a power of ten apart (and `least`), and how they are written."""
    rough = (high - low) / 6
    power = 10 ** math.floor(math.log10(rough))
    step = max(min((factor * power for factor in (1, 2, 5, 10)), key=lambda step: abs(math.log(step / rough))), least)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    values = [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
    plain = digits <= 4 and max(abs(low), abs(high)) < 1e7
    return [(value, f"{value:,.{digits}f}" if plain else f"{value:.3g}") for value in values]


def _log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """`low` and `high` are powers of ten; 1, 2 and 5 within a decade, or whole decades when there are many."""
    if high - low < 0.5:
        values = [value for value, _ in _ticks(10**low, 10**high)]
    else:
        factors, every = ((1, 2, 5) if high - low <= 3 else (1,)), max(1, round((high - low) / 8))
        values = [f * 10.0**d for d in range(math.floor(low), math.ceil(high) + 1, every) for f in factors]
    return [(math.log10(value), f"{value:g}") for value in values if value > 0 and low <= math.log10(value) <= high]
