"""Which pictures of a folder are worth training a restorer on: `python -m flux.data curate FOLDER`.

As LucidFlux chose 342,000 of 2.9 million (lucidflux.md section 10.1): neither blurred nor all noise, not flat, and of the
rest the best fifth by a judge of quality: CLIP-IQA, where --clip names its weights, else a stand-in that knows edges and
noise (`iqa.clarity`); the report says which.

    curation.jsonl  a line per picture with its figures, written as it goes: a second run measures what is new or changed
    kept.jsonl      what is kept, in the form that --data reads
    curation.md     how many each rule left, and the figures' distribution beside the thresholds
    .curation.png   some of what each rule left out, with the figure, and some of what is kept: to look at, before training
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from flux import checkpoint, data, iqa, pictures
from flux.errors import UserError

STAND_IN = "edges over noise in dB, a stand-in that knows nothing of what is shown (flux/iqa.py)"


@dataclass(frozen=True)
class Rules:
    """The published thresholds."""

    blur: tuple[float, float] = (150, 8000)  # variance of the Laplacian
    flat: float = 0.5  # share of flat patches
    keep: float = 0.2  # share of what the other rules leave


def measure(path: Path) -> dict:
    """The figures of one picture; for a broken one, what is wrong."""
    try:
        grey = iqa.gray(np.asarray(pictures.read(path)))
    except pictures.PictureError as error:
        return {"broken": str(error)}
    flat, patches = iqa.flatness(grey)
    return {"size": list(grey.shape[::-1]), "blur": round(iqa.blur(grey), 3), "flat": round(flat, 6), "patches": patches,
            "score": round(iqa.clarity(grey), 4)}


def mark(path: Path) -> list[int]:
    """By which a picture that has changed is known: bytes, and nanoseconds of its last change."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def measured(folder: Path, names: list[str], workers: int) -> dict[str, dict]:
    """Figures by name, from curation.jsonl where they stand there, else measured and added to it."""
    ledger = folder / "curation.jsonl"
    known = {row["file"]: row for row in _rows(ledger)}
    rows = {name: known[name] for name in names if name in known and known[name].get("mark") == mark(folder / name)}
    todo = [name for name in names if name not in rows]
    with ledger.open("a", encoding="utf-8") as file, tqdm(total=len(todo), desc="measuring", disable=None) as bar:
        for name, found in zip(todo, _each([folder / name for name in todo], workers), strict=True):
            rows[name] = {"file": name, "mark": mark(folder / name), **found}
            file.write(json.dumps(rows[name]) + "\n")
            file.flush()
            bar.update()
    return rows


def _each(paths: list[Path], workers: int) -> Iterator[dict]:
    if workers == 1 or len(paths) < 2:
        yield from map(measure, paths)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(measure, paths, chunksize=max(1, min(16, len(paths) // (4 * workers))))


def _rows(ledger: Path) -> Iterator[dict]:
    """Whole lines; what a stopped run left half written is measured again."""
    if ledger.exists():
        text = ledger.read_bytes()
        if text and not text.endswith(b"\n"):
            with ledger.open("ab") as file:
                file.write(b"\n")
        for line in text.splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and isinstance(row.get("file"), str):
                yield row


def judged(rows: list[dict], folder: Path, clip: Path) -> None:
    """CLIP-IQA of these pictures, from curation.jsonl where it stands there by the same weights, else added to it."""
    from flux import clip_iqa  # brings torch, which only this needs

    judge, made_by = clip_iqa.load(clip), checkpoint.fingerprint(checkpoint.locate(clip))
    with (folder / "curation.jsonl").open("a", encoding="utf-8") as file:
        for row in tqdm(rows, desc="judging", disable=None):
            if row.get("judge") != made_by:
                row |= {"clip_iqa": round(judge(pictures.read(folder / row["file"])), 6), "judge": made_by}
                file.write(json.dumps(row) + "\n")
                file.flush()


def passing(rows: list[dict], rules: Rules) -> list[tuple[str, list[dict]]]:
    """[(rule, pictures that it leaves)] of the rules that need no judge."""
    left = [row for row in rows if "broken" not in row]
    stages = [("can be read", left)]
    low, high = rules.blur
    left = [row for row in left if low <= row["blur"] <= high]
    stages.append((f"sharp, not all noise: {low:g} <= variance of the Laplacian <= {high:g}", left))
    left = [row for row in left if row["flat"] <= rules.flat]
    stages.append((f"not flat: at most {rules.flat:.0%} of patches of 240 x 240", left))
    return stages


def best(left: list[dict], rules: Rules, judge: str = "score") -> tuple[str, list[dict]]:
    """The last rule; of equal pictures the first by name."""
    order = sorted(left, key=lambda row: (-row[judge], row["file"]))[:round(rules.keep * len(left))]
    kept = {row["file"] for row in order}
    return f"the best {rules.keep:.0%} by the judge", [row for row in left if row["file"] in kept]


def report(rows: list[dict], stages: list[tuple[str, list[dict]]], folder: Path, judge: str) -> str:
    broken = [row for row in rows if "broken" in row]
    lines = [f"# Curation of {folder.name}", "", "| rule | pictures left |", "|---|---|", f"| all | {len(rows)} |"]
    lines += [f"| {rule} | {len(left)} |" for rule, left in stages]
    lines += ["", f"Judge: {judge}.", "", "| figure | least | 5 % | 25 % | median | 75 % | 95 % | most |", "|---" * 8 + "|"]
    for name in ("blur", "flat", "score", "clip_iqa"):
        values = [row[name] for row in rows if name in row] or [float("nan")]
        points = np.percentile(values, (0, 5, 25, 50, 75, 95, 100))
        lines.append(f"| {name} | {' | '.join(f'{value:.4g}' for value in points)} |")
    lines += ["", f"{len(broken)} broken:" if broken else "None is broken."]
    lines += [f"- {row['file']}: {row['broken']}" for row in broken]
    return "\n".join(lines) + "\n"


def sheet(stages: list[tuple[str, list[dict]]], folder: Path, judge: str, most: int = 6) -> Image.Image | None:
    """A row for each rule, spread over what it left out; the last one over what is kept. None where nothing can be read."""
    rows = [[row for row in before if row not in after] for (_, before), (_, after) in pairwise(stages)] + [stages[-1][1]]
    pils, captions = [], []
    for name, members in zip(("blur", "flat", judge, "kept"), rows, strict=True):
        picked = [members[i * len(members) // most] for i in range(min(most, len(members)))]
        for row in picked:
            pil = pictures.read(folder / row["file"])
            pil.thumbnail((256, 256))
            pils.append(pil)
            captions.append(f"kept: {judge} {row[judge]:g}" if name == "kept" else f"out: {name} {row[name]:g}")
        pils += [Image.new("RGB", (256, 256), pictures.PAPER)] * (most - len(picked)) if picked else []
        captions += [""] * (most - len(picked)) if picked else []
    return pictures.contact_sheet(pils, most, captions) if pils else None


def curate(folder: Path, rules: Rules, workers: int, clip: Path | None = None) -> str:
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder, expected one of pictures; check the name")
    names = [item.path.name for item in data.folder(folder)]
    if not names:
        raise UserError(f"no pictures in {folder}; expected {', '.join(sorted(data.SUFFIXES))}, not in folders below it")
    try:
        rows = sorted(measured(folder, names, workers).values(), key=lambda row: row["file"])
        stages = passing(rows, rules)
        if clip:
            judged(stages[-1][1], folder, clip)
        judge = "clip_iqa" if clip else "score"
        stages.append(best(stages[-1][1], rules, judge))
        captions = {item.path.name: item.caption for item in data.folder(folder)}
        kept = [{"file": row["file"], **({"prompt": captions[row["file"]]} if captions[row["file"]] else {})}
                for row in stages[-1][1]]
        text = report(rows, stages, folder, f"CLIP-IQA of {clip.name}" if clip else STAND_IN)
        for name, content in (("kept.jsonl", "".join(json.dumps(row) + "\n" for row in kept)), ("curation.md", text)):
            draft = folder / f".{name}.part"
            draft.write_text(content, encoding="utf-8")
            os.replace(draft, folder / name)
        if seen := sheet(stages, folder, judge):
            pictures.write_png(folder / ".curation.png", seen, None)
    except PermissionError as error:
        raise UserError(f"{error.filename}: {error.strerror.lower()}; expected a folder that can be written to: copy it "
                        "elsewhere") from None
    return text


def main(argv: list[str] | None = None) -> int:
    rules = asdict(Rules())
    parser = argparse.ArgumentParser(prog="python -m flux.data curate", description="Chooses pictures to train on.")
    parser.add_argument("folder", type=Path)
    share, number = partial(_number, 0, 1), partial(_number, 0, 1e9)
    parser.add_argument("--blur", type=number, nargs=2, default=rules["blur"], metavar=("LOW", "HIGH"),
                        help="bounds of the Laplacian's variance (150 8000)")
    parser.add_argument("--flat", type=share, default=rules["flat"], help="largest share of flat patches (0.5)")
    parser.add_argument("--keep", type=share, default=rules["keep"], help="share of the rest that is kept (0.2)")
    parser.add_argument("--clip", type=Path, metavar="DIR", help="openai/clip-vit-large-patch14, to judge by CLIP-IQA")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (one per core)")
    flags, started = parser.parse_args(argv), time.perf_counter()
    try:
        rules = Rules(tuple(flags.blur), flags.flat, flags.keep)
        text = curate(flags.folder, rules, max(1, flags.workers), flags.clip)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{text}\n{time.perf_counter() - started:.1f} seconds; kept.jsonl, curation.md and .curation.png are in "
          f"{flags.folder}")
    return 0


def _number(low: float, high: float, word: str) -> float:
    value = float(word)
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"{word}: expected a number from {low:g} to {high:g}")
    return value
