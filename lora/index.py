"""An index of a folder of LoRAs: one safetensors file with an embedding and a line of JSON for each, written whole.

Embeddings are unit vectors in float16. Beside them lies a coarse copy in 8 bits, a quarter of float32's bytes, in the order
in which a search (`retrieval.py`) reads it whole; everything is mapped from disk, so that an index opens at once however
long it is. What an embedding means is the encoder's affair: the file carries its fingerprint, and is of no use to another. A
second file, `.jsonl`, has the same lines for people; no command reads it.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from flux import checkpoint
from flux.checkpoint import refuse, shown
from flux.errors import UserError

HEADER = "lora_index"
LANES = 96  # LoRAs side by side in the coarse copy: their sums fill twelve of the sixteen registers of AVX2
DECODING = torch.tensor([1.0, -128.0]).view(torch.uint8)  # 8 bytes behind each row, by which torch reads byte b as b - 128
Embed = Callable[[Path], tuple[Tensor, dict]]  # a LoRA's file -> (d,), and what else its line should say


@dataclass(frozen=True)
class Calibration:
    """What a similarity is worth, found on validation queries (`retrieval.calibrate`)."""

    min_sim: float  # from here on answers are as often right as was asked for
    slope: float  # probability = sigmoid(slope * similarity + offset)
    offset: float


@dataclass
class Report:
    """What became of the files of a folder."""

    added: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    duplicates: dict[str, str] = field(default_factory=dict)  # file: the one of the same bytes that stands for both
    refused: dict[str, str] = field(default_factory=dict)  # file: why


class Index:
    """An index file, opened. Row i of every tensor is one LoRA; `row(i)` is its line."""

    def __init__(self, path: Path, encoder: str | None = None):
        """encoder: fingerprint of the one whose vectors will be compared with these."""
        self.path = Path(path)
        tensors = checkpoint.read(self.path)
        try:
            about = json.loads(checkpoint.read_header(checkpoint.locate(self.path)).metadata[HEADER])
            self.encoder, self.folder = str(about["encoder"]), self.path.parent / about["folder"]
            self.kinds, self.error = [str(kind) for kind in about["kinds"]], float(about["error"])
            self.calibration = Calibration(**about["calibration"]) if about["calibration"] else None
            self.vectors, self.coarse, self.scale, self.kind, self.keys, self.offsets, self.lines = (
                tensors[name] for name in ("vectors", "coarse", "scale", "kind", "keys", "offsets", "lines"))
        except (KeyError, TypeError, ValueError) as error:
            raise refuse(self.path, "is no index of LoRAs", "one that was built from a folder", "build it anew") from error
        self.check()
        if encoder is not None and encoder != self.encoder:
            raise refuse(self.path, f"was made by encoder {shown(self.encoder)}, this one is {encoder}", "an index of the "
                         "same encoder", "build it anew, or name the encoder it was made by")

    def check(self) -> None:
        """Shapes fit each other and no line begins outside: nothing later looks again."""
        n, d = self.vectors.shape if self.vectors.ndim == 2 else (-1, -1)
        blocks = (-(n // -LANES), d, LANES + len(DECODING))
        expected = {"vectors": (torch.float16, (n, d)), "coarse": (torch.uint8, blocks), "scale": (torch.float32, (n,)),
                    "kind": (torch.int16, (n,)), "keys": (torch.int64, (n, 2)), "offsets": (torch.int64, (n + 1,)),
                    "lines": (torch.uint8, (self.lines.numel(),))}
        wrong = [name for name, (dtype, shape) in expected.items()
                 if (getattr(self, name).dtype, tuple(getattr(self, name).shape)) != (dtype, shape)]
        if wrong or n and (self.offsets[0] != 0 or self.offsets[-1] != len(self.lines)
                           or (self.offsets.diff() <= 0).any()):
            raise refuse(self.path, f"is a broken index ({', '.join(wrong) or 'offsets'} do not fit)", "a whole one",
                         "build it anew")

    def __len__(self) -> int:
        return len(self.vectors)

    def row(self, i: int) -> dict:
        """What is known of LoRA i: id, file, sha256, kind and whatever its `embed` said."""
        text = self.lines[self.offsets[i]:self.offsets[i + 1]].numpy().tobytes()
        try:
            row = json.loads(text)
            inside = not Path(row["file"]).is_absolute() and ".." not in Path(row["file"]).parts
            assert inside and isinstance(row["id"], str)
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            raise refuse(self.path, f"has a broken line for LoRA {i}", "JSON with id and file", "build it anew") from error
        return row

    @cached_property
    def rows(self) -> list[dict]:
        return [self.row(i) for i in range(len(self))]


# --- building ---

def build(path: Path, folder: Path, embed: Embed, encoder: str, labels: Mapping[str, dict] | None = None,
          calibration: Calibration | None = None, fresh: bool = False) -> tuple[Index, Report]:
    """Make the index of a folder, or bring it up to date: only files that are new or changed are embedded.

    A file that is gone loses its row; of files with the same bytes the first by name has one, which names the others.
    Files that are no LoRAs for the encoder are refused one by one. labels: what else to say of a file, by name, such as
    its kind. fresh: forget the old index, which may be of another encoder.
    """
    folder, path = Path(folder), Path(path)
    if not folder.is_dir():
        raise UserError(f"{shown(folder)} is no folder; expected one with LoRAs; check the name")
    files = sorted(file for file in folder.rglob("*.safetensors")
                   if not file.name.startswith(".") and file.absolute() != path.absolute())
    if not files:
        raise UserError(f"{shown(folder)} has no safetensors file; expected LoRAs in it; name another folder")
    old = None if fresh or not path.exists() else Index(path, encoder)
    names = [file.relative_to(folder).as_posix() for file in files]
    return _update(path, folder, old, names, embed, encoder, calibration, labels or {}, {})


def add(path: Path, files: Iterable[Path], embed: Embed, labels: Mapping[str, dict] | None = None) -> tuple[Index, Report]:
    """A few files of the index's folder, without a look at the others."""
    old, names = Index(path), []
    for file in map(Path, files):
        inside = file.resolve().is_relative_to(old.folder.resolve())
        if not inside or not file.is_file():
            raise UserError(f"{shown(file)} is no file in {shown(old.folder)}; expected one in that folder; move it there")
        names.append(file.resolve().relative_to(old.folder.resolve()).as_posix())
    trusted = {name: row["sha256"] for row in old.rows for name in (row["file"], *row["also"]) if name not in names}
    return _update(Path(path), old.folder, old, sorted({*trusted, *names}), embed, old.encoder, None, labels or {}, trusted)


def remove(path: Path, ids: Sequence[str]) -> Index:
    """Take LoRAs out of the index; their files stay, and the next `build` finds them again."""
    old = Index(path)
    if unknown := set(ids) - {row["id"] for row in old.rows}:
        raise UserError(f"{shown(path)} has no {checkpoint.listed(sorted(unknown))}; expected ids in it; check them")
    left = [i for i, row in enumerate(old.rows) if row["id"] not in ids]
    if not left:
        raise UserError(f"{shown(path)} would be empty; expected at least one LoRA to stay; delete the file instead")
    write(path, old.vectors[left], [old.rows[i] for i in left], old.encoder, old.folder, old.calibration)
    return Index(path)


def _update(path: Path, folder: Path, old: Index | None, names: list[str], embed: Embed, encoder: str,
            calibration: Calibration | None, labels: Mapping[str, dict], trusted: Mapping[str, str]) -> tuple[Index, Report]:
    """names: all files that shall be in the index. trusted: hashes of those that nobody needs to look at."""
    report = Report()
    known = {row["file"]: row for row in old.rows} if old else {}
    by_hash = {row["sha256"]: i for i, row in enumerate(old.rows)} if old else {}
    stamps, groups = {}, {}
    for name in names:
        try:
            sha256 = trusted.get(name) or _hash_if_changed(folder / name, known.get(name), stamps.setdefault(name, {}))
        except OSError as error:
            report.refused[name] = f"it cannot be read ({error.strerror})"
            continue
        groups.setdefault(sha256, []).append(name)
    rows, vectors = [], []
    for sha256, (name, *also) in groups.items():
        if sha256 in by_hash:
            row, vector = old.rows[by_hash[sha256]], old.vectors[by_hash[sha256]]
        else:
            try:
                vector, row = embed(folder / name)
                vector = unit(vector)
            except UserError as error:
                report.refused |= dict.fromkeys((name, *also), str(error))
                continue
        (report.kept if known.get(name, {}).get("sha256") == sha256 else report.added).append(name)
        report.duplicates |= dict.fromkeys(also, name)
        rows.append({**row, **labels.get(name, {}), "id": name.removesuffix(".safetensors"), "file": name, "sha256": sha256,
                     "also": also, **stamps.get(name, {})})
        vectors.append(vector.half())
    report.removed = sorted(known.keys() - {row["file"] for row in rows})
    if not rows:
        name, why = next(iter(report.refused.items()))
        raise UserError(f"none of the {len(names)} files in {shown(folder)} can be used, {name}: {why}")
    write(path, torch.stack(vectors), rows, encoder, folder, calibration or (old.calibration if old else None))
    return Index(path), report


def _hash_if_changed(file: Path, row: dict | None, stamp: dict) -> str:
    """The sha256 of a file, from its row if size and time are as they were; fills the stamp that tells."""
    stat = file.stat()
    stamp |= {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    if row and all(row.get(key) == value for key, value in stamp.items()):
        return row["sha256"]
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def unit(vector: Tensor) -> Tensor:
    vector = vector.detach().float().cpu()
    norm = vector.norm()
    if not torch.isfinite(norm) or norm == 0:
        raise UserError(f"its embedding has the norm {norm.item():g}; expected a finite vector; look at the file")
    return vector / norm


def key_of(text: str) -> int:
    """63 bits that stand for a name or a hash where a million are compared at once."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def quantised(vectors: Tensor) -> tuple[Tensor, Tensor, float]:
    """Vectors (N, d) -> their coarse copy, scales (N,), and the greatest distance between a vector and its coarse one.

    The copy is (ceil(N / LANES), d, LANES + 8) bytes: number j of LANES LoRAs, each scale * (byte - 128), and `DECODING`.
    """
    n, d = vectors.shape
    coarse = torch.full((-(n // -LANES), d, LANES + len(DECODING)), 128, dtype=torch.uint8)
    coarse[:, :, LANES:] = DECODING
    scales, worst = torch.empty(n), 0.0
    for i, block in enumerate(vectors.split(LANES)):
        block = block.float()
        scale = block.abs().amax(dim=1).clamp(min=1e-30) / 127
        rounded = (block / scale[:, None]).round_()
        worst = max(worst, (block - scale[:, None] * rounded).norm(dim=1).max().item())
        coarse[i, :, :len(block)] = (rounded + 128).T
        scales[i * LANES:][:len(block)] = scale
    return coarse, scales, worst


def write(path: Path, vectors: Tensor, rows: Sequence[dict], encoder: str, folder: Path,
          calibration: Calibration | None) -> None:
    """Unit vectors (N, d) in float16 and a line for each, as one file beside its place, then renamed."""
    path = Path(path)
    kinds = sorted({str(row.get("kind", "")) for row in rows})
    numbers = {kind: i for i, kind in enumerate(kinds)}
    lines = [(json.dumps(row, ensure_ascii=False) + "\n").encode() for row in rows]
    coarse, scale, error = quantised(vectors)
    about = {"encoder": encoder, "folder": os.path.relpath(folder, path.parent), "kinds": kinds, "error": error,
             "calibration": asdict(calibration) if calibration else None}
    checkpoint.save(path, {
        "vectors": vectors, "coarse": coarse, "scale": scale,
        "kind": torch.tensor([numbers[str(row.get("kind", ""))] for row in rows], dtype=torch.int16),
        "keys": torch.tensor([[key_of(row["id"]), key_of(row["sha256"])] for row in rows]),
        "offsets": torch.tensor([0, *map(len, lines)]).cumsum(0),
        "lines": torch.frombuffer(bytearray(b"".join(lines)), dtype=torch.uint8)}, {HEADER: json.dumps(about)})
    draft = path.with_name(f".{path.stem}.jsonl.part")
    draft.write_bytes(b"".join(lines))
    draft.replace(path.with_suffix(".jsonl"))
