"""Tensors of a .pth, .pt or .ckpt file, which are pickles: read by torch's `weights_only` reader, which runs no code.

Prefer safetensors (`flux/checkpoint.py`); this is for the files that are published in no other form.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from flux import checkpoint
from flux.checkpoint import refuse

DEEPEST = 4  # dicts within dicts; released files have two
# What torch's reader raises for broken files; its name for pickle's own error, as nothing here imports pickle.
BROKEN = (torch.serialization.pickle.UnpicklingError, RuntimeError, ValueError, TypeError, LookupError, EOFError, OSError,
          AttributeError, AssertionError, ArithmeticError, MemoryError, ImportError)


def read(path: Path) -> Mapping[str, Tensor]:
    """A safetensors file, index or folder as `checkpoint.read`; or a torch file, its dicts joined with dots:
    {"condition_lq": {"img_in.weight": x}} -> {"condition_lq.img_in.weight": x}."""
    path = Path(path)
    if not is_zip(path):
        return checkpoint.read(path)  # which says what it is, where it is none
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except BROKEN as error:
        reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:80]}"
        raise refuse(path, f"cannot be read as tensors alone ({checkpoint.shown(reason)})", "a torch file of nothing but "
                     "tensors", "download it again, or take the safetensors file") from None
    return dict(flat(found, path))


def is_zip(path: Path) -> bool:
    """As torch has written them since 1.6."""
    try:
        with path.open("rb") as file:
            return path.is_file() and file.read(4) == b"PK\x03\x04"
    except (OSError, ValueError):
        return False


def flat(found: object, path: Path, before: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """What is no tensor (a step number, a prompt) is left out; a list, or dicts without end, is refused."""
    if not isinstance(found, Mapping) or depth > DEEPEST:
        raise refuse(path, f"holds a {type(found).__name__}", "a dict of tensors", "name another file")
    for name, value in found.items():
        if isinstance(value, Tensor):
            yield f"{before}{name}", value
        elif isinstance(value, Mapping):
            yield from flat(value, path, f"{before}{name}.", depth + 1)
