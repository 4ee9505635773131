"""Pictures in tar archives, as WebDataset writes them: read where they lie, never unpacked, so no name in them matters.

Files that share their name up to the first dot are one sample: `00042.jpg`, `00042.txt` with its caption, or `00042.json`
with a `prompt`; for pairs also `00042.source.png` and `00042.mask.png`.
"""

import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from flux.errors import UserError


@dataclass(frozen=True)
class Member:
    """A file inside an archive: what is asked of the path of a picture."""

    archive: Path
    name: str
    start: int
    size: int

    def open(self, mode: str = "rb") -> BinaryIO:
        assert mode == "rb", mode
        with self.archive.open("rb") as file:
            file.seek(self.start)
            return io.BytesIO(file.read(self.size))

    def __str__(self) -> str:
        return f"{self.archive}:{self.name}"


def samples(archive: Path, limit: int) -> Iterator[dict[str, Member | str]]:
    """Each sample's files by what follows the first dot of their names, in lower case; `txt` and `json` as text, of at
    most `limit` bytes. UserError for what is no whole tar archive."""
    sample, key, end = {}, None, archive.stat().st_size
    try:
        with tarfile.open(archive, "r:") as tar:  # uncompressed: a member is found again by its place
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                stem, _, kind = name.partition(".")
                if not member.isfile() or member.issparse() or not stem or not kind:
                    continue
                if member.offset_data + member.size > end:
                    raise tarfile.ReadError(f"{member.name!r} ends after the archive does")
                if (folder, stem) != key and sample:
                    yield sample
                    sample = {}
                key, found = (folder, stem), Member(archive, member.name, member.offset_data, member.size)
                sample[kind.lower()] = text(found, limit) if kind.lower() in ("txt", "json") else found
    except (tarfile.TarError, OSError, ValueError) as error:
        raise UserError(f"{archive}: {error}; expected a whole, uncompressed tar archive: make it again") from error
    if sample:
        yield sample


def text(member: Member, limit: int) -> str:
    if member.size > limit:
        raise UserError(f"{member} has {member.size} bytes; expected a caption of at most {limit}: shorten it")
    try:
        return member.open().read().decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise UserError(f"{member}: {error}; expected a caption in UTF-8: save it as such") from error


def caption(sample: dict[str, Member | str], name: str) -> str:
    """From the .txt, else the .json."""
    if "txt" in sample or "json" not in sample:
        return sample.get("txt", "")
    try:
        record = json.loads(sample["json"])
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: its .json is none ({error}); expected an object with a `prompt`: mend it") from error
    prompt = record.get("prompt", "") if isinstance(record, dict) else None
    if not isinstance(prompt, str):
        raise UserError(f"{name}: its .json is {str(record)[:80]!r}; expected an object with a `prompt` in quotes: mend it")
    return prompt.strip()
