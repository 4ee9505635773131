"""Data sets from disk: a folder of captioned pictures, a metadata.jsonl, tar shards; a step's batch follows from its number.

`load` looks at every picture once, before the first step, so that what is broken is known then. After that the batches
are a pure function of (items, batch size, seed, step): a resumed run continues with exactly the ones it would have had.
Read flux/pictures.py first. `python -m flux.data check DIR` reports on a data set without training.
"""

import argparse
import hashlib
import importlib
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from flux import pictures, shards
from flux.errors import UserError
from flux.shards import Member

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
STEP = 16  # pixels: 8 per latent cell, 2 cells per token
LONGEST = 4  # to 1: the aspect of the narrowest buckets
MAX_BROKEN = 0.05
MAX_TEXT_BYTES = 1 << 20  # of a caption file
OTHERS = {"pairs": "flux.pairs", "curate": "flux.curation"}  # commands that read folders by this file
LONG_CAPTION = 2000  # characters; about the 512 T5 tokens after which text is cut off


@dataclass(frozen=True)
class Item:
    """A picture to learn, and what it is learned from. `size`, known after `survey`, is its bucket (width, height)."""

    path: Path | Member
    caption: str = ""
    source: Path | Member | None = None  # of a pair: the picture before
    mask: Path | Member | None = None  # white where it is repainted
    size: tuple[int, int] | None = None


def find(path: str | Path) -> list[Item]:
    """A metadata.jsonl, a tar archive, or a folder with pictures or either -> its items, in a fixed order, unopened."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"no data at {path}; expected a folder of pictures, a metadata.jsonl or a .tar: check --data")
    index = inside(path, "metadata.jsonl") if path.is_dir() else path
    if index.suffix == ".tar":
        items = shard(index)
    elif index.is_file():
        items = jsonl(index)
    else:
        shards_here = sorted(name for name in os.listdir(path) if name.endswith(".tar") and name[0] != ".")
        items = [*folder(path), *(item for name in shards_here for item in shard(inside(path, name)))]
    if not items:
        raise UserError(f"no pictures in {path}; expected {', '.join(sorted(SUFFIXES))}, not in folders below it: "
                        "check --data")
    return items


def folder(path: str | Path) -> list[Item]:
    """Every picture directly in the folder, by name, with the caption in the .txt file of the same name."""
    root = Path(path)
    names = sorted(name for name in os.listdir(root) if Path(name).suffix.lower() in SUFFIXES and name[0] != ".")
    return [Item(inside(root, name), caption(inside(root, Path(name).with_suffix(".txt").name))) for name in names]


def shard(path: Path) -> list[Item]:
    """Every sample of a tar archive that has a picture."""
    items = []
    for sample in shards.samples(path, MAX_TEXT_BYTES):
        def picture(before="", sample=sample):
            return next((sample[before + suffix[1:]] for suffix in sorted(SUFFIXES) if before + suffix[1:] in sample), None)
        if target := picture():
            items.append(Item(target, shards.caption(sample, str(target)), picture("source."), picture("mask.")))
    return items


def jsonl(path: str | Path) -> list[Item]:
    """One JSON object a line: `file` (or `target`) and `prompt`, for pairs also `source` and `mask`; names are relative
    to its folder."""
    path, items, number = Path(path), [], 0
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    items.append(_item(path.parent, json.loads(line), f"{path}, line {number}"))
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}, line {number}: {error}; expected one JSON object a line, in UTF-8: mend it") from error
    return items


def _item(root: Path, record: object, where: str) -> Item:
    if not isinstance(record, dict) or ("file" in record) == ("target" in record):
        raise UserError(f"{where}: {str(record)[:80]!r}; expected an object with either `file` or `target`: mend it")
    texts = {key: record.get(key) for key in ("file", "target", "source", "mask", "prompt")}
    for key, text in texts.items():
        if not isinstance(text, str | None):
            raise UserError(f"{where}: `{key}` is a {type(text).__name__}; expected a string: put it in quotes")
    names = {key: inside(root, texts[key], where) for key in ("file", "target", "source", "mask") if texts[key]}
    if not (target := names.get("file") or names.get("target")):
        raise UserError(f"{where}: the name of the picture is empty; expected a file of the data folder: mend it")
    return Item(target, (texts["prompt"] or "").strip(), names.get("source"), names.get("mask"))


def inside(root: Path, name: str, where: str | Path | None = None) -> Path:
    """A name from outside -> a path below `root`, links followed; else UserError. Both kinds of slashes separate."""
    parts = PureWindowsPath(name)
    try:
        inside = not parts.anchor and ".." not in parts.parts and Path(os.path.realpath(root / name)).is_relative_to(
            os.path.realpath(root))
    except (OSError, ValueError):  # a NUL, half a surrogate pair, a name too long for the system
        inside = False
    if not inside:
        raise UserError(f"{where or root}: the name {name[:80]!r} leads out of the data folder or is no file name; "
                        "expected a file below it: copy the file there")
    return root / name


def caption(path: Path) -> str:
    try:
        with path.open("rb") as file:
            text = file.read(MAX_TEXT_BYTES + 1)
        if len(text) > MAX_TEXT_BYTES:
            raise ValueError("over 1 MB")
        return text.decode("utf-8-sig").strip()
    except FileNotFoundError:
        return ""
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}; expected a caption in UTF-8: save it as such") from error


@cache
def buckets(edge: int) -> tuple[tuple[int, int], ...]:
    """Every (width, height) in multiples of 16 pixels of about edge * edge pixels, up to four times as long as wide."""
    assert edge >= STEP, f"edge {edge} pixels, expected at least {STEP}"
    wide = [(w, STEP * max(1, round(edge * edge / w / STEP))) for w in range(STEP, LONGEST * edge, STEP)]
    both = {*wide, *((h, w) for w, h in wide)}
    return tuple(sorted((w, h) for w, h in both if max(w, h) <= LONGEST * min(w, h)))


def bucket(width: int, height: int, edge: int) -> tuple[int, int]:
    """The bucket whose aspect is nearest, and of those the one whose area is."""
    def distance(size):
        w, h = size
        return round(abs(math.log(w * height / (h * width))), 9), abs(w * h - edge * edge), w
    return min(buckets(edge), key=distance)


def fit(pil: Image.Image, size: tuple[int, int], resample=Image.Resampling.LANCZOS) -> Image.Image:
    """Scaled to cover the bucket, what juts out cut off evenly on both sides; Pillow's Lanczos is antialiased."""
    return ImageOps.fit(pil, size, resample)


@dataclass
class Survey:
    """What was found: items with their buckets, and all that a person should know before training on them."""

    items: list[Item] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    uncaptioned: list[str] = field(default_factory=list)
    long: list[str] = field(default_factory=list)
    enlarged: list[str] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)

    def refuse(self) -> None:
        total = len(self.items) + len(self.broken)
        if len(self.broken) > MAX_BROKEN * total:
            raise UserError(f"{len(self.broken)} of {total} pictures are broken ({self.broken[0]}); expected at most "
                            f"{MAX_BROKEN:.0%}: mend or remove them, python -m flux.data check DIR lists all")

    def lines(self, most: int | None = 10) -> Iterator[str]:
        yield f"{len(self.items)} pictures to use"
        if self.sizes:
            small, large = (pick(self.sizes, key=math.prod) for pick in (min, max))
            yield f"sizes from {small[0]}x{small[1]} to {large[0]}x{large[1]}"
        for names, what in ((self.broken, "broken, skipped"), (self.uncaptioned, "without a caption"),
                            (self.long, f"with a caption over {LONG_CAPTION} characters, of which the end is cut off"),
                            (self.enlarged, "smaller than their bucket, enlarged")):
            if names:
                yield f"{len(names)} {what}:"
                yield from (f"  {name}" for name in names[:most])
                if most is not None and len(names) > most:
                    yield f"  and {len(names) - most} more"


def survey(items: list[Item], edge: int) -> Survey:
    """Decodes every picture once and sorts the items into buckets of about edge * edge pixels."""
    found = Survey()
    for item in tqdm(items, "looking at pictures", disable=None, delay=2):
        try:
            size = pictures.read(item.path).size
            for other in filter(None, (item.source, item.mask)):
                if (theirs := pictures.read(other).size) != size:
                    raise pictures.PictureError(f"{other}: {theirs[0]}x{theirs[1]}; expected {size[0]}x{size[1]} like "
                                                f"{item.path.name}: make them the same size")
        except pictures.PictureError as error:
            found.broken.append(str(error))
            continue
        target = bucket(*size, edge)
        found.items.append(replace(item, size=target))
        found.sizes.append(size)
        for names, applies in ((found.uncaptioned, not item.caption), (found.long, len(item.caption) > LONG_CAPTION),
                               (found.enlarged, size[0] < target[0] or size[1] < target[1])):
            if applies:
                names.append(str(item.path))
    return found


def load(path: str | Path, edge: int, items: list[Item] | None = None) -> list[Item]:
    """The items of a data set, ready for `batches`; says on standard error what was skipped or looks wrong."""
    found = survey(find(path) if items is None else items, edge)
    if os.environ.get("RANK", "0") == "0":  # one of several processes is enough
        print(f"data {path}:", *found.lines(), sep="\n", file=sys.stderr)
    found.refuse()
    return found.items


def hold_out(items: list[Item], share: float) -> tuple[list[Item], list[Item]]:
    """Those to train on and a share apart from them, chosen by name: a data set that grows keeps most of its choice."""
    def place(item):
        return hashlib.sha256(Path(item.path.name).name.encode(errors="replace")).hexdigest()
    apart = {id(item) for item in sorted(items, key=place)[:int(share * len(items))]}
    return [item for item in items if id(item) not in apart], [item for item in items if id(item) in apart]


def epoch(items: list[Item], batch: int, seed: int, number: int) -> list[list[Item]]:
    """All items once, shuffled by (seed, number) alone: one bucket per batch, a bucket's last batch may be shorter."""
    assert batch > 0 and seed >= 0, f"batch {batch}, seed {seed}"
    members = {}
    for item in items:
        assert item.size, f"{item.path} has no bucket: survey() gives it one"
        members.setdefault(item.size, []).append(item)
    rng = np.random.default_rng((seed, number))
    out = []
    for size in sorted(members):
        shuffled = [members[size][i] for i in rng.permutation(len(members[size]))]
        out += [shuffled[first:first + batch] for first in range(0, len(shuffled), batch)]
    return [out[i] for i in rng.permutation(len(out))]


def batches(items: list[Item], batch: int, seed: int, start_step: int = 0) -> Iterator[list[Item]]:
    """Epoch after epoch without end, from the batch of step `start_step` (counted from 0)."""
    assert items, "batches of an empty data set"
    per_epoch = sum(math.ceil(count / batch) for count in Counter(item.size for item in items).values())
    number, skip = divmod(start_step, per_epoch)
    while True:
        yield from epoch(items, batch, seed, number)[skip:]
        number, skip = number + 1, 0


def images(batch: list[Item], part: str = "path") -> "Tensor":
    """The pictures of one batch -> (B, 3, H, W) in [-1, 1]; with part="source" what they are learned from."""
    import torch

    return torch.cat([pictures.to_tensor(fit(pictures.read(getattr(item, part)), item.size)) for item in batch])


def check(path: str | Path, edge: int, items: list[Item] | None = None) -> Survey:
    found = survey(find(path) if items is None else items, edge)
    print(*found.lines(most=None), f"buckets of about {edge}x{edge} pixels:", sep="\n")
    for (width, height), count in Counter(item.size for item in found.items).most_common():
        print(f"  {width}x{height}: {count}")
    found.refuse()
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m flux.data", description="Looks at a data set, as training would.")
    parser.add_argument("command", choices=["check", *OTHERS], help="the others have a --help of their own")
    parser.add_argument("data", type=Path, help="a folder of pictures, a metadata.jsonl, or a .tar")
    parser.add_argument("--edge", type=int, default=1024, help="pixels; buckets have about edge * edge of them (1024)")
    words = sys.argv[1:] if argv is None else argv
    try:
        if words and words[0] in OTHERS:
            return importlib.import_module(OTHERS[words[0]]).main(words[1:]) or 0
        options = parser.parse_args(words)
        check(options.data, options.edge)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
