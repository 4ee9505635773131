"""Pairs of pictures, before and after an edit, on disk: how they are found; `python -m flux.data pairs` makes them.

A data set of pairs is a metadata.jsonl or a .tar (flux/data.py), or a folder with source/ and target/, perhaps mask/: files
of one stem belong together, whatever their endings. The caption is the .txt of that stem beside the target, or in caption/.
Nothing stands in for a picture that is missing.
"""

import argparse
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from flux import data, pictures
from flux.data import Item
from flux.errors import UserError

PARTS = ("source", "target", "mask")


def find(path: str | Path) -> list[Item]:
    """Items with a source each, and all or none with a mask. UserError names the first that lacks one."""
    path = Path(path)
    is_folder = path.is_dir() and not (path / "metadata.jsonl").exists() and (
        (path / "source").is_dir() or (path / "target").is_dir())
    items = folder(path) if is_folder else data.find(path)
    alone = [item for item in items if item.source is None]
    if alone:
        raise UserError(f"{alone[0].path} has no source ({len(alone)} of {len(items)} have none), expected pairs: `source` "
                        "in metadata.jsonl, or the folders source and target; add it")
    bare = [item for item in items if item.mask is None]
    if bare and len(bare) < len(items):
        raise UserError(f"{bare[0].path} has no mask and others have ({len(bare)} of {len(items)} have none), expected one "
                        "for each or none at all; add it, white where it changes")
    return items


def folder(root: Path) -> list[Item]:
    found = {part: by_stem(root / part) for part in PARTS if (root / part).is_dir()}
    for one, other in (("source", "target"), ("target", "source"), *([("target", "mask"), ("mask", "target")]
                                                                    if "mask" in found else [])):
        lost = sorted(found.get(one, {}).keys() - found.get(other, {}).keys())
        if lost:
            raise UserError(f"{found[one][lost[0]]} has no {other} ({len(lost)} have none), expected {lost[0]}.png or the "
                            f"like in {root / other}; add it or take the {one} away")
    captions = root / "caption" if (root / "caption").is_dir() else root / "target"
    return [Item(target, data.caption(data.inside(captions, f"{stem}.txt")), found["source"][stem],
                 found.get("mask", {}).get(stem)) for stem, target in sorted(found["target"].items())]


def by_stem(root: Path) -> dict[str, Path]:
    """The pictures directly in a folder. UserError for two of one stem: which is meant?"""
    found: dict[str, Path] = {}
    for name in sorted(os.listdir(root)):
        path = Path(name)
        if path.suffix.lower() in data.SUFFIXES and name[0] != ".":
            if path.stem in found:
                raise UserError(f"{root} has {found[path.stem].name} and {name}, expected one picture called {path.stem}; "
                                "rename or remove one")
            found[path.stem] = data.inside(root, name)
    return found


def load(path: str | Path, edge: int) -> list[Item]:
    """As `data.load`: each decoded once, sizes compared, buckets given; what was skipped is said on standard error."""
    return data.load(path, edge, find(path))


# --- python -m flux.data pairs ---

def join(sources: Path, targets: Path, out: Path, size: tuple[int, int]) -> int:
    """Sheets of source | target, each half of half the width (Lanczos), of pictures with one stem in two folders."""
    count, width, height = 0, size[0] // 2, size[1]
    for stem, source, target in tqdm(list(matched(sources, targets)), desc=str(out), disable=None):
        halves = [pictures.read(path) for path in (source, target)]
        own = halves[0].size
        if own != halves[1].size or abs(own[0] * height - own[1] * width) > max(own):
            raise UserError(f"{source} is {_edges(halves[0])} and {target} {_edges(halves[1])} pixels, expected two of the "
                            f"shape of {width}x{height}; crop them, or change --size")
        sheet = Image.new("RGB", size)
        for half, left in zip(halves, (0, width), strict=True):
            sheet.paste(half.resize((width, height), Image.Resampling.LANCZOS), (left, 0))
        pictures.write_png(out / f"{stem}.png", sheet, None)
        _copy_caption(target, out / f"{stem}.txt")
        count += 1
    return count


def split(sheets: Path, out: Path) -> int:
    """Sheets back into source/ and target/, to the pixel; captions go beside the targets."""
    found = by_stem(_folder(sheets, "SHEETS"))
    for part in ("source", "target"):
        (out / part).mkdir(parents=True, exist_ok=True)
    for stem, path in tqdm(found.items(), desc=str(out), disable=None):
        sheet = pictures.read(path)
        if sheet.width % 2:
            raise UserError(f"{path} is {_edges(sheet)} pixels, expected an even width: two halves; cut it")
        middle = sheet.width // 2
        for part, box in (("source", (0, 0, middle, sheet.height)), ("target", (middle, 0, sheet.width, sheet.height))):
            pictures.write_png(out / part / f"{stem}.png", sheet.crop(box), None)
        _copy_caption(path, out / "target" / f"{stem}.txt")
    return len(found)


def prompts(file: Path, out: Path) -> int:
    """A JSON object {picture's name: prompt}, or lines of {"target" or "file": name, "prompt": text} as fill50k has, becomes
    a .txt for each in the folder `out`."""
    try:
        text = file.read_text(encoding="utf-8-sig")
        try:
            said = json.loads(text)
        except ValueError:
            said = [json.loads(line) for line in text.splitlines() if line.strip()]
        if isinstance(said, list) or "prompt" in said:
            records = said if isinstance(said, list) else [said]
            said = {record.get("target") or record["file"]: record["prompt"] for record in records}
        if not all(isinstance(prompt, str) for prompt in said.values()):
            raise ValueError("a prompt is no string")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file}: {error!r}; expected {{\"name.png\": \"prompt\", ...}} or a line of {{\"target\": ..., "
                        "\"prompt\": ...} for each; mend it") from error
    for name, prompt in said.items():
        path = data.inside(out, f"{Path(name).stem}.txt", file)
        pictures.publish(path, f"{prompt.strip()}\n".encode())
    return len(said)


def check(path: Path, edge: int) -> None:
    """What training would find, and how much of the pictures changes."""
    items = find(path)
    found = data.check(path, edge, items)
    looked = found.items[:200]
    changes = [_change(item) for item in looked]
    masks = "with a mask each" if items[0].mask else "without masks"
    print(f"{len(items)} pairs {masks}; mean change {sum(changes) / max(len(changes), 1):.1f} of 255"
          + (f" (of the first {len(looked)})" if len(found.items) > len(looked) else ""))
    same = [item.path for item, change in zip(looked, changes, strict=True) if change == 0]
    if same:
        print(f"{len(same)} targets equal to their sources:", *(f"  {path}" for path in same), sep="\n")


def _change(item: Item) -> float:
    import numpy as np

    before, after = (np.asarray(pictures.read(path), np.float32) for path in (item.source, item.path))
    return float(abs(before - after).mean())


def matched(sources: Path, targets: Path) -> Iterator[tuple[str, Path, Path]]:
    """(stem, source, target). UserError for a picture without its partner."""
    before, after = by_stem(_folder(sources, "SOURCES")), by_stem(_folder(targets, "TARGETS"))
    lost = sorted(before.keys() ^ after.keys())
    if lost or not before:
        which = f"{lost[0]} is in one of them alone ({len(lost)} are)" if lost else "they have none"
        raise UserError(f"{sources} and {targets}: {which}, expected pictures of equal names in both; add or remove it")
    yield from ((stem, before[stem], after[stem]) for stem in sorted(before))


def _folder(path: Path, name: str) -> Path:
    if not path.is_dir():
        raise UserError(f"{name} {path} is no folder, expected one with pictures; check the name")
    return path


def _edges(pil: Image.Image) -> str:
    return f"{pil.width}x{pil.height}"


def _copy_caption(picture: Path, to: Path) -> None:
    if caption := data.caption(picture.with_suffix(".txt")):
        pictures.publish(to, f"{caption}\n".encode())


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m flux.data pairs", description="Pairs of pictures, before and after.")
    commands = parser.add_subparsers(dest="command", required=True)
    joined = commands.add_parser("join", help="two folders into sheets, source | target")
    joined.add_argument("sources", type=Path)
    joined.add_argument("targets", type=Path)
    joined.add_argument("out", type=Path)
    joined.add_argument("--size", default="1024x512", help="of a sheet in pixels (1024x512)")
    cut = commands.add_parser("split", help="sheets into the folders source and target")
    cut.add_argument("sheets", type=Path)
    cut.add_argument("out", type=Path)
    said = commands.add_parser("prompts", help="a JSON file of prompts into caption files")
    said.add_argument("file", type=Path)
    said.add_argument("out", type=Path)
    seen = commands.add_parser("check", help="look at every pair as training would, and report")
    seen.add_argument("data", type=Path)
    seen.add_argument("--edge", type=int, default=1024, help="pixels; buckets have about edge * edge of them (1024)")
    options = parser.parse_args(argv)
    if options.command == "check":
        check(options.data, options.edge)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    if options.command == "join":
        words = options.size.split("x")
        if len(words) != 2 or not all(re.fullmatch("[1-9][0-9]{0,4}", word) for word in words) or int(words[0]) % 2:
            raise UserError(f"--size {options.size}: expected WIDTHxHEIGHT in pixels with an even width, such as 1024x512")
        count = join(options.sources, options.targets, options.out, (int(words[0]), int(words[1])))
    else:
        count = split(options.sheets, options.out) if options.command == "split" else prompts(options.file, options.out)
    print(f"{count} written to {options.out}")
