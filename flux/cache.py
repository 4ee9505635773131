"""Latents and text features that are made once and kept, under names that say all that they were made from.

Another caption, picture, crop, encoder, dtype or length is another name, so nothing kept can be stale, and there is
nothing to clear by hand but space. Every entry carries the hash of its numbers: one that was cut short or changed is made
again. Processes may share a folder: each writes beside the entry's place and renames, and both would write the same.
"""

import hashlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from flux import checkpoint
from flux.errors import UserError

FORMAT = 1  # of the entries; counted up when what is kept under the same name changes


class Cache:
    def __init__(self, folder: Path | None):
        """Without a folder nothing is kept: everything is made whenever it is asked for."""
        self.folder = folder

    def get(self, made_from: tuple, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors (on the CPU) that `make` gives; it is called if they are not kept yet, or not whole.

        made_from: numbers, strings, bytes, tuples of them; all that the result depends on.
        """
        if self.folder is None:
            return dict(make())
        path = self.place(made_from)
        kept = self.read(path)
        if kept is None:
            kept = {key: tensor.detach().cpu().contiguous() for key, tensor in make().items()}
            self.write(path, kept)
        return kept

    def has(self, made_from: tuple) -> bool:
        """Whether there is an entry; whether it is whole shows when it is read."""
        return self.folder is not None and self.place(made_from).exists()

    def place(self, made_from: tuple) -> Path:
        name = hashlib.sha256(repr((FORMAT, torch.__version__, made_from)).encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def read(self, path: Path) -> dict[str, Tensor] | None:
        """A whole entry, copied off the file, or None."""
        try:
            if not path.exists():
                return None
            kept = {key: tensor.clone() for key, tensor in checkpoint.read(path).items()}
            return kept if checkpoint.read_header(path).metadata.get("sha256") == digest(kept) else None
        except (UserError, OSError):
            return None

    def write(self, path: Path, tensors: dict[str, Tensor]) -> None:
        """A cache that cannot be written, on a full disk say, costs time and not the run."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            checkpoint.save(path, tensors, {"sha256": digest(tensors)})
        except (UserError, OSError) as error:
            print(f"warning: nothing more is kept in {self.folder} ({error})", file=sys.stderr)
            self.folder = None


def digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of names, dtypes, shapes and numbers."""
    total = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key].detach().contiguous()
        total.update(repr((key, str(tensor.dtype), tuple(tensor.shape))).encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def content(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def source(path: Path) -> str:
    """Tells one set of weights, or one tokenizer, from another: a file or all files of a folder.

    A large file is read in samples; its time of change stands for what lies between them.
    """
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    stated = [(file.name, checkpoint.fingerprint(file), file.stat().st_mtime_ns if file.stat().st_size > 64 << 20 else 0)
              for file in files]
    return hashlib.sha256(repr(stated).encode()).hexdigest()
