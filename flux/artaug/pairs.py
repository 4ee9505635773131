"""Pairs: what the model draws, and what it draws from the same noise where a critic's advice is followed in its regions.

The unit of work is a part of `PART` prompts: pictures first, then latents, then the rows, each whole or not there at all. A
part that is not whole is made again in the same batches, so with the same bytes, and the critic's ledger answers again.
Parts are shared out over processes. Then one process decides over all of them: `manifest.jsonl` has a row per prompt with
everything, a rejection with its reasons. Read `flux/artaug/drawing.py` and `scorers.py` first.
"""

import csv
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from flux import cache, checkpoint, draws, parallel, pictures
from flux.artaug import drawing
from flux.artaug.drawing import Artist
from flux.errors import UserError
from flux.resume import _write
from vlm_client import measuring

PART = 24  # prompts


@dataclass
class Workshop:
    """All that making pairs needs, loaded once."""

    settings: object
    artist: Artist
    scorer: object
    critic: object
    base: object = None  # how the base's pictures of the checks were judged

    def fingerprint(self, worn: str) -> str:
        """Of what pictures depend on beside prompt and seed; `worn`: hash of the LoRA of the iterations before."""
        s, a = self.settings, self.artist
        return digest([sorted(a.files.items()), a.size, a.steps, a.guidance, s.region_scale, s.mode, s.batch, worn])


def digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


# --- making ---

def make(shop: Workshop, folder: Path, iteration: int, prompts: Sequence[str], worn: str) -> None:
    """This process's parts, those that are not there yet."""
    team, made_from = parallel.join(), shop.fingerprint(worn)
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    todo = [(k, rows) for k, rows in enumerate(drawing.chunks(len(prompts), PART)) if k % team.size == team.rank]
    with team.together(), tqdm(total=sum(len(rows) for _, rows in todo), desc=f"pairs {iteration}", disable=None) as bar:
        for k, rows in todo:
            path = folder / f"part-{k:04d}.json"
            key = digest([made_from, [prompts[i] for i in rows]])
            if not whole(path, key):
                part = make_part(shop, folder, iteration, rows, [prompts[i] for i in rows], made_from)
                _write(path, json.dumps({"key": key, "rows": part}))
            bar.update(len(rows))
    team.wait()


def whole(path: Path, key: str) -> bool:
    try:
        return json.loads(path.read_text())["key"] == key and path.with_suffix(".safetensors").exists()
    except (OSError, ValueError, KeyError):
        return False


def make_part(shop: Workshop, folder: Path, iteration: int, numbers: range, prompts: list[str], made_from: str
              ) -> list[dict]:
    settings, artist = shop.settings, shop.artist
    seeds = [draws.seed_of("artaug", settings.seed, iteration, i) % 2**31 for i in numbers]
    before = list(artist.draw(prompts, seeds))
    plans = drawing.ask(shop.critic, list(zip(before, prompts, strict=True)))
    areas = [drawing.areas(plan, settings.region_scale) for plan in plans]
    after = list(artist.draw(prompts, seeds, areas, settings.mode))
    (first, seen), (second, seen_after) = shop.scorer.of(before, prompts), shop.scorer.of(after, prompts)
    z, z_after = artist.encode(before), artist.encode(after)
    change = (z_after - z).abs().flatten(1).mean(1) / z.std()
    rows = []
    for i, number in enumerate(numbers):
        name = f"{number:05d}"
        paths = {side: f"pictures/{name}_{side}.png" for side in ("before", "after")}
        for side, pil in (("before", before[i]), ("after", after[i])):
            pictures.write_png(folder / paths[side], pil, {"prompt": prompts[i], "seed": seeds[i], "steps": artist.steps,
                                                           "guidance": artist.guidance, "recipe": "artaug", "side": side})
        rows.append({
            "id": f"{iteration}-{name}", "iteration": iteration, "prompt": prompts[i], "seed": seeds[i], "size": artist.size,
            "steps": artist.steps, "plan": plans[i].as_dict(), "paths": paths,
            "sha256": {side: cache.content(folder / path) for side, path in paths.items()},
            "scores": {"before": first[i], "after": second[i], "structure": float(seen[i] @ seen_after[i]),
                       "change": float(change[i]), "measured": [measured(before[i]), measured(after[i])]},
            "model": made_from})
    checkpoint.save(folder / f"part-{numbers.start // PART:04d}.safetensors",
                    {"before": z.half(), "after": z_after.half(), "seen": seen_after})
    return rows


def measured(pil) -> float:
    """Mean score of the measuring critic, 1 to 10. It is told with each pair; no decision reads it."""
    return float(np.mean(list(measuring.scores(pil).values())))


# --- deciding ---

def read(folder: Path) -> tuple[list[dict], dict[str, Tensor]]:
    """All rows of an iteration, and the tensors of its parts, in the rows' order."""
    parts = sorted(folder.glob("part-*.json"))
    rows = [row for path in parts for row in json.loads(path.read_text())["rows"]]
    stored = [checkpoint.read(path.with_suffix(".safetensors")) for path in parts]
    return rows, {name: torch.cat([part[name].float() for part in stored]) for name in ("before", "after", "seen")}


def decide(shop: Workshop, folder: Path) -> list[dict]:
    """Fill in `decision` and `reasons` and write manifest.jsonl. A review.csv in the folder has the last word."""
    rows, tensors = read(folder)
    judge(rows, tensors["seen"], shop.settings)
    for row in rows:
        row["critic"], row["scorers"] = row["plan"]["critic"], shop.scorer.names
    review(rows, folder)
    _write(folder / "manifest.jsonl", "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))
    return rows


def judge(rows: list[dict], seen: Tensor, settings) -> None:
    """The rules of the filter, each with the words for what failed; then the best, spread over what they show."""
    gain_at, floor_at, true_at, (least, most) = settings.limits()
    def score(row, side, name):
        return row["scores"][side][name]
    gains = [score(row, "after", "aesthetic") - score(row, "before", "aesthetic") for row in rows]
    needed = max(settings.gain, float(np.percentile(gains, gain_at)))
    floor = float(np.percentile([score(row, "before", "aesthetic") for row in rows], floor_at))
    for row, gain in zip(rows, gains, strict=True):
        truth = score(row, "after", "fidelity") - score(row, "before", "fidelity")
        opinion = score(row, "after", "opinion") - score(row, "before", "opinion")
        after, similar, change = score(row, "after", "aesthetic"), row["scores"]["structure"], row["scores"]["change"]
        checks = {
            "plan: no valid edit": bool(row["plan"]["edits"]),
            f"aesthetic gain {gain:.3f} below {needed:.3f}": gain >= needed,
            f"aesthetic score {after:.3f} below {floor:.3f}": after >= floor,
            f"fidelity changed by {truth:.3f}, below {true_at:g}": truth >= true_at,
            f"structure {similar:.3f} not in {least:g} to {most:g}": least <= similar <= most,
            f"change {change:.3f} below {settings.change:g}": change >= settings.change,
            f"second opinion {opinion:.3f}, not above 0": opinion > 0}
        row["reasons"] = [words for words, held in checks.items() if not held]
        row["gains"] = {"aesthetic": gain, "fidelity": truth, "opinion": opinion}
    kept = [i for i, row in enumerate(rows) if not row["reasons"]]
    if len(kept) > settings.target:
        table = np.array([list(rows[i]["gains"].values()) for i in kept])
        merit = ((table - table.mean(0)) / (table.std(0) + 1e-9)).sum(1)
        best = [kept[i] for i in np.argsort(-merit)]
        spread = set(k_center(best, seen, settings.target))
        for i in kept:
            if i not in spread:
                rows[i]["reasons"] = [f"diversity: {settings.target} others stand for it"]
    for row in rows:
        row["decision"] = "rejected" if row["reasons"] else "accepted"


def k_center(best: Sequence[int], seen: Tensor, count: int) -> list[int]:
    """Greedily, from the best: always the one farthest from those chosen (Gonzalez 1985); of equals the better."""
    chosen, away = [best[0]], 1 - seen[list(best)] @ seen[best[0]]
    while len(chosen) < count:
        farthest = best[int(away.argmax())]
        chosen.append(farthest)
        away = torch.minimum(away, 1 - seen[list(best)] @ seen[farthest])
    return chosen


def review(rows: list[dict], folder: Path) -> None:
    """review.csv, columns id, decision, review: a word in `review`, accept or reject, overrules; it is written if absent."""
    path = folder / "review.csv"
    if path.exists():
        with path.open(newline="") as file:
            words = {row.get("id"): (row.get("review") or "").strip() for row in csv.DictReader(file)}
        wrong = sorted(set(words.values()) - {"", "accept", "reject"})
        if wrong:
            raise UserError(f"{path}: review says {wrong[0]!r}, expected accept, reject or nothing; mend it")
        for row in rows:
            if words.get(row["id"]):
                row["decision"] = words[row["id"]] + "ed"
                row["reasons"] = ["review"] if row["decision"] == "rejected" else []
        return
    _write(path, "id,decision,review\n" + "".join(f"{row['id']},{row['decision']},\n" for row in rows))


def accepted(folder: Path) -> tuple[list[dict], Tensor, Tensor]:
    """Rows of the manifest that count, with latents before and after (N, 16, h, w)."""
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    _, tensors = read(folder)
    kept = [i for i, row in enumerate(rows) if row["decision"] == "accepted"]
    return [rows[i] for i in kept], tensors["before"][kept], tensors["after"][kept]
