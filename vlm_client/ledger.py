"""What was asked and answered, so that no answered request is asked twice.

A folder with `ledger.jsonl`, one line per try, and `pictures/`, whose names are the sha256 of the bytes that were sent.
An answer's line is written whole and synced before it is used; a line that a crash tore is no JSON, and is passed over.
"""

import hashlib
import json
import os
from pathlib import Path

from vlm_client import VlmError


class Ledger:
    def __init__(self, folder: Path):
        self.path, self.pictures = Path(folder) / "ledger.jsonl", Path(folder) / "pictures"
        self.answers: dict[str, dict] = {}
        self.torn = 0
        try:
            self.pictures.mkdir(parents=True, exist_ok=True)
            self.path.touch()
            lines = self.path.read_bytes().split(b"\n")
        except OSError as error:
            raise VlmError(f"{folder} cannot hold a ledger ({error.strerror}), expected a folder to write into; name "
                           "another") from error
        self.unfinished = bool(lines[-1])
        for line in filter(None, lines):
            try:
                row = json.loads(line)
                if "reply" in row:
                    self.answers[row["key"]] = row
            except (ValueError, KeyError, TypeError):
                self.torn += 1

    def keep_picture(self, data: bytes) -> str:
        """-> its sha256, under which it lies in the folder."""
        name = hashlib.sha256(data).hexdigest()
        path = self.pictures / f"{name}.png"
        if not path.exists():
            part = path.with_name(f".{name}.{os.getpid()}.part")
            part.write_bytes(data)
            os.replace(part, path)
        return name

    def write(self, row: dict) -> None:
        """One line, in one write; an answer is on the disk when this returns. Several processes may share a ledger."""
        line = json.dumps(row, ensure_ascii=True).encode() + b"\n"
        if self.unfinished:  # ends the line that a crash tore
            line, self.unfinished = b"\n" + line, False
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        try:
            while line:  # a full disk may take a part, and raises at the next
                line = line[os.write(handle, line):]
            if "reply" in row:
                os.fsync(handle)
        finally:
            os.close(handle)
        if "reply" in row:
            self.answers[row["key"]] = row


def key(request: dict) -> str:
    """The same question, word for word and pixel for pixel, has the same key."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
