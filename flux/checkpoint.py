"""safetensors files that nobody vouches for: checked, mapped from disk, and written whole or not at all.

A file is 8 bytes with the header's length (little-endian), a JSON header {name: {dtype, shape, data_offsets}}, then the
tensors' bytes without gaps (github.com/huggingface/safetensors, section Format). We read it ourselves: every number in
it is compared with the size of the file before it is used, and no tensor is read before somebody touches it.
"""

import errno
import hashlib
import json
import math
import mmap
import os
import re
import reprlib
import shutil
import stat
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from flux import parallel
from flux.errors import UserError

HEADER_LIMIT = 4 * 2**20  # bytes; FLUX.1's is 90 kB, a LoRA with its tag statistics a few MB
TENSOR_LIMIT = 20_000  # names; the largest file we know has 2,736
BRACKET_LIMIT = 20 * TENSOR_LIMIT  # a tensor needs three, text in the metadata has some; each costs far more once parsed
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F16": torch.float16, "BF16": torch.bfloat16,
    "F32": torch.float32, "F64": torch.float64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEXES = tuple(f"{stem}.safetensors{index}" for stem in ("diffusion_pytorch_model", "model")
                for index in ("", ".index.json"))  # what diffusers and transformers call the weights in a folder

AGAIN, SAFE = "download it again", "take the safetensors file"
SIGNATURES = (  # first bytes, what such a file is, what to do about it
    (rb"version https://git-lfs", "a git-LFS pointer, not the file it points to", "run `git lfs pull` in its folder"),
    (rb"\s*<(!doctype html|html|head|!--|\?xml)", "an HTML or XML page", f"{AGAIN}, logged in if the site asks for it"),
    (rb"PK\x03\x04.{0,200}data\.pkl", "a torch .pt or .pth file (a zip with a pickle inside)", SAFE),
    (rb"PK\x03\x04", "a zip archive", "unpack it"),
    (rb"\x80[\x02-\x05][}\]\(c\x8a\x95]", "a Python pickle (.pt, .bin, .ckpt)", SAFE),
    (rb"GGUF", "a GGUF file", SAFE),
    (rb"\x1f\x8b|7z\xbc\xaf\x27\x1c|Rar!|BZh|\xfd7zXZ|.{257}ustar", "a packed archive", "unpack it"),
    (rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF", "a picture or a video", "name the checkpoint"),
    (rb"\x93NUMPY", "a NumPy array", SAFE),
    (rb"\x89HDF", "an HDF5 file", SAFE),
    (rb"\s*[{\[]\s*[\"\]}]", "a JSON text", "name the tensors' file, or the folder of an index"),
    (rb"\x00{9}", "zeros at its start, an unfinished download", AGAIN),
)


class CheckpointError(UserError):
    """A weights file that cannot be used: one line that names the file and what it really is."""


class _Flaw(Exception):
    """What is wrong inside a header, before it is known to which file that belongs."""


@dataclass(frozen=True)
class Entry:
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # bytes after the header
    end: int


@dataclass(frozen=True)
class Header:
    entries: dict[str, Entry]
    metadata: dict[str, str]
    offset: int  # bytes before the first tensor


class Mapped(Mapping):
    """Tensors of one file or several, by name. Each is a view of the file, made when asked for and read when touched."""

    def __init__(self, places: dict[str, tuple[mmap.mmap, int, Entry]]):
        self.places = places  # memory of the file, bytes before its first tensor, the tensor

    def __getitem__(self, name: str) -> Tensor:
        memory, offset, entry = self.places[name]
        count = entry.end - entry.start
        if not count:
            return torch.empty(entry.shape, dtype=entry.dtype)
        data = torch.frombuffer(memory, dtype=torch.uint8, offset=offset + entry.start, count=count)
        if data.data_ptr() % entry.dtype.itemsize:
            data = data.clone()  # torch views, and some processors, want numbers at multiples of their size
        return data.view(entry.dtype).view(entry.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def __contains__(self, name: object) -> bool:
        return name in self.places  # Mapping's own would make the tensor

    def layout(self) -> dict[str, Tensor]:
        return {name: torch.empty(entry.shape, dtype=entry.dtype, device="meta")
                for name, (_, _, entry) in self.places.items()}


def shown(name: object) -> str:
    """Something from outside, in one short printable line."""
    text = name if isinstance(name, str) else str(name) if isinstance(name, Path) else reprlib.repr(name)
    return text if text.isprintable() and len(text) <= 250 else ascii(text[:100] + ("..." if len(text) > 100 else ""))


def listed(names: list[str], most: int = 4) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(shown(name) for name in names[:most]) + rest


def refuse(path: Path, what: str, expected: str, remedy: str) -> CheckpointError:
    return CheckpointError(f"{shown(path)} {what}; expected {expected}: {remedy}")


def read(path: Path) -> Mapped:
    """A file, an `index.json` with its shards, or a folder with either -> tensors by name, mapped from disk.

    Pages are read when touched; writing into a tensor changes memory, never the file.
    """
    path = locate(path)
    if path.suffix == ".json":
        return _read_shards(path)
    shard = re.search(r"-(\d{5}-of-\d{5})\.safetensors$", path.name)
    if shard and shard[1] != "00001-of-00001":
        raise refuse(path, f"is one shard, {shard[1]}", "the whole", "name its folder or its index.json")
    return _map(path)


def read_header(path: Path) -> Header:
    with _opened(path) as (file, size):
        return _header(file, size, path)


def locate(path: Path) -> Path:
    """A folder as diffusers and transformers write it -> the file or index in it; anything else stays as it is."""
    path = Path(path)
    if not os.path.isdir(path):  # unlike Path.is_dir, False for names that no system accepts
        return path
    try:
        inside = sorted(os.listdir(path))
    except OSError as error:
        raise refuse(path, f"cannot be listed ({error.strerror})", "a folder", "check its permissions") from error
    for name in INDEXES:
        if name in inside:
            return path / name
    files = [name for name in inside if name.endswith(".safetensors")]
    if len(files) != 1:
        what = f"{len(files)} safetensors files and no index" if files else "no safetensors file"
        raise refuse(path, f"is a folder with {what}", "one file, or an index.json and its shards", "name the file")
    return path / files[0]


def shards(index: Path) -> dict[str, str]:
    """An `index.json` -> which file beside it holds each tensor. Names may not lead out of its folder."""
    with _opened(index) as (file, size):
        try:
            table = _parse(file.read(min(size, HEADER_LIMIT)))["weight_map"]
            names = sorted(set(table.values()))
        except (_Flaw, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise refuse(index, "is no index of shards", "JSON with a weight_map", AGAIN) from error
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"(?!\.)[^/\\\0:]+\.safetensors", name):
            raise refuse(index, f"points to {shown(name)}", "safetensors files beside it", "do not use this index")
    return table


def _read_shards(index: Path) -> Mapped:
    table = shards(index)
    names = sorted(set(table.values()))
    for name in names:
        if not os.path.exists(index.parent / name):
            raise refuse(index, f"needs {shown(name)}, which is missing beside it", f"all {len(names)} shards",
                         "download that one")
    parts = {name: _map(index.parent / name) for name in names}
    strays = [key for key, name in table.items() if key not in parts[name]]
    strays += [key for name, part in parts.items() for key in part if table.get(key) != name]
    if strays:
        raise refuse(index, f"places {listed(strays)} elsewhere than the shards do", "files of one download",
                     "download all of them again")
    return Mapped({key: parts[name].places[key] for key, name in table.items()})


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """A regular file and its size in bytes; whatever the system objects to is a CheckpointError."""
    path = Path(path)
    if "\0" in str(path):
        raise refuse(path, "has a NUL in its name", "a weights file", "check the name")
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):  # opening a pipe would wait for its writer
            what = "a folder" if stat.S_ISDIR(mode) else "a device or a pipe"
            raise refuse(path, f"is {what}", "a safetensors file", "name the file")
        with open(path, "rb") as file:
            yield file, os.fstat(file.fileno()).st_size
    except FileNotFoundError as error:
        what = "is a link to nothing" if path.is_symlink() else "is not there"
        raise refuse(path, what, "a weights file", "check the name") from error
    except OSError as error:
        raise refuse(path, f"cannot be read ({error.strerror})", "a weights file", "check name and rights") from error


def _parse(text: bytes):
    """JSON in which no name comes twice."""
    def unique(pairs):
        table = dict(pairs)
        if len(table) < len(pairs):
            seen = set()
            twice = next(name for name, _ in pairs if name in seen or seen.add(name))
            raise _Flaw(f"{shown(twice)} stands in it twice")
        return table
    if text.count(b"[") + text.count(b"{") > BRACKET_LIMIT:
        raise _Flaw("it has brackets without end")
    return json.loads(text.decode(), object_pairs_hook=unique)


def _header(file: BinaryIO, size: int, path: Path) -> Header:
    head = file.read(512)
    length = int.from_bytes(head[:8], "little")
    if head[8:9] != b"{" or length > HEADER_LIMIT:
        what, remedy = _what_it_is(head, size, length)
        raise refuse(path, f"is {what}", "a safetensors file", remedy)
    if 8 + length > size:
        raise refuse(path, f"is truncated, {size} bytes with a header of {length} alone", "all of it", AGAIN)
    file.seek(8)
    try:
        table = _parse(file.read(length))
        metadata = table.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise _Flaw("its __metadata__ is no table of strings")
        if len(table) > TENSOR_LIMIT:
            raise _Flaw(f"it names {len(table)} tensors, more than {TENSOR_LIMIT}")
        entries = {name: _entry(name, fields) for name, fields in table.items()}
        _check_layout(entries, size - 8 - length)
    except _Flaw as flaw:
        raise refuse(path, f"is a broken safetensors file, {flaw}", "a sound one", AGAIN) from flaw
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else shown(str(error))
        raise refuse(path, f"is a broken safetensors file, its header is no JSON ({reason})", "a sound one",
                     AGAIN) from error
    return Header(entries, metadata, 8 + length)


def _what_it_is(head: bytes, size: int, length: int) -> tuple[str, str]:
    if not size:
        return "empty (0 bytes)", AGAIN
    for pattern, what, remedy in SIGNATURES:
        if re.match(pattern, head, re.DOTALL | re.IGNORECASE):
            return what, remedy
    if re.fullmatch(rb"[\t\n\r -~]+", head):
        return f"a text that says {ascii(head[:60].decode().strip())}", AGAIN
    if head[8:9] == b"{":
        return f"a safetensors file whose header claims {length} bytes, more than {HEADER_LIMIT}", AGAIN
    return f"no safetensors file ({size} bytes that begin with {head[:8].hex(' ')})", "check what it is"


def _entry(name: str, fields: object) -> Entry:
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise _Flaw(f"{shown(name)} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _Flaw(f"{shown(name)} has the unknown dtype {shown(dtype)}")
    if not isinstance(shape, list) or len(shape) > 8 or not all(_natural(n) for n in shape):
        raise _Flaw(f"{shown(name)} has the impossible shape {shown(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_natural(n) for n in offsets):
        raise _Flaw(f"{shown(name)} has the impossible offsets {shown(offsets)}")
    start, end = offsets
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if end - start != needed or math.prod(max(n, 1) for n in shape) >= 2**48:
        raise _Flaw(f"{shown(name)}, {dtype} {shape}, needs {needed} bytes and has {end - start}")
    return Entry(DTYPES[dtype], tuple(shape), start, end)


def _natural(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**48  # more than any disk, and products of eight stay exact in Python


def _check_layout(entries: dict[str, Entry], available: int) -> None:
    """Tensors must follow each other without gap or overlap and fill the file."""
    order = sorted(entries.items(), key=lambda item: (item[1].start, item[1].end))
    if order and order[0][1].start:
        raise _Flaw(f"{shown(order[0][0])} leaves a gap after the header")
    for (before, first), (name, entry) in pairwise(order):
        if entry.start != first.end:
            how = "overlaps" if entry.start < first.end else "leaves a gap after"
            raise _Flaw(f"{shown(name)} {how} {shown(before)}")
    end = order[-1][1].end if order else 0
    if end > available:
        raise _Flaw(f"it is truncated, with {available} of {end} bytes of tensors")
    if end < available:
        raise _Flaw(f"{available - end} bytes follow its last tensor")


def _map(path: Path) -> Mapped:
    with _opened(path) as (file, size):
        header = _header(file, size, path)
        if sys.platform == "linux":
            # Private pages of a file larger than memory: the kernel would not promise room for copies of them all.
            flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000)
            memory = mmap.mmap(file.fileno(), size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        else:
            memory = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
    return Mapped({name: (memory, header.offset, entry) for name, entry in header.entries.items()})


def check_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Read every number once and refuse NaN and Inf, which would turn up as a black picture."""
    for name, tensor in tensors.items():
        for chunk in tensor.flatten().split(2**22) if tensor.is_floating_point() else ():
            if not torch.isfinite(chunk.float() if chunk.element_size() == 1 else chunk).all():
                raise refuse(path, f"has NaN or Inf in {shown(name)}", "finite numbers",
                             f"{AGAIN}, or use an earlier checkpoint")


def fingerprint(path: Path, whole: int = 64 << 20, samples: int = 256, sample: int = 64 << 10) -> str:
    """Twelve hex digits of the sha256 of a file; of its size and evenly spread samples when it has over 64 MiB.

    Every byte of 24 GB would take a minute at each start.
    """
    digest, size = hashlib.sha256(), path.stat().st_size
    with path.open("rb") as file:
        if size <= whole:
            digest.update(file.read())
        else:
            digest.update(str(size).encode())
            for i in range(samples):
                file.seek((size - sample) * i // (samples - 1))
                digest.update(file.read(sample))
    return digest.hexdigest()[:12]


def layout(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same names, shapes and dtypes on the meta device; a lazy mapping knows them without making its tensors."""
    if hasattr(tensors, "layout"):
        return tensors.layout()
    return {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in tensors.items()}


def save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write one safetensors file, tensor by tensor and in their dtypes, beside its place; sync; rename.

    Whatever happens, `path` holds the earlier file or the new one, and nothing else is left behind. A full disk is an
    OSError (ENOSPC) that says how many bytes were needed. Of split tensors every process must call this; one writes.
    """
    path, shapes = Path(path), layout(tensors)
    names, head, end = described(shapes, metadata)
    if not parallel.join().leads and any(map(parallel.is_split, tensors.values())):
        for name in names:
            parallel.whole(tensors[name])
        return
    part = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        with open(part, "wb") as file:
            file.write(head)
            for name in names:
                data = parallel.whole(tensors[name].detach()).cpu().contiguous()
                assert (data.shape, data.dtype) == (shapes[name].shape, shapes[name].dtype), name
                file.write(data.reshape(-1).view(torch.uint8).numpy())
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        sync_folder(path.parent)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise refuse(path, f"cannot be written ({error.strerror})", "a folder that takes it",
                         "check its name and permissions") from error
        part.unlink(missing_ok=True)
        needed, free = len(head) + end, shutil.disk_usage(path.parent).free
        raise OSError(errno.ENOSPC, f"no room: {needed} bytes needed, {free} free", str(path)) from error
    finally:
        with suppress(OSError):
            part.unlink()


def described(shapes: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> tuple[list[str], bytes, int]:
    """The order of tensors in a file, all that stands before the first one, and the bytes of them all."""
    names = sorted(shapes, key=lambda name: (-shapes[name].dtype.itemsize, name))  # keeps every tensor aligned
    header, end = {"__metadata__": {"format": "pt", **(metadata or {})}}, 0
    for name in names:
        start, end = end, end + shapes[name].nbytes
        header[name] = {"dtype": DTYPE_NAMES[shapes[name].dtype], "shape": list(shapes[name].shape),
                        "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return names, len(text).to_bytes(8, "little") + text, end


def sync_folder(folder: Path) -> None:
    """The rename itself must reach the disk too; only POSIX has a way to ask for it."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
