"""quarantine.jsonl: the files of the folder that are not in the index, and why."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from crosstill import files
from crosstill.pixels import quarantine_row
from crosstill.search import work
from crosstill.search.catalogue import damaged
from crosstill.search.walk import Scan
from crosstill.search.work import Work

NAME = "quarantine.jsonl"


def write(index: Path, scan: Scan, memory: Work) -> int:
    """List what was left out, a line each: `path`, `class`, `reason`, `bytes`; return how many.

    The memory learns the list's SHA-256 first, beside that of the one before, so that a damaged
    list is known from one that a kill left behind.
    """
    bad = [
        quarantine_row(path, why, scan.sizes.get(path, 0)) for path, why in scan.problems.items()
    ]
    for name, stamp in scan.photos.items():
        reason = memory.known[name].reason
        bad += [quarantine_row(name, reason, stamp.size)] if reason else []
    data = "".join(json.dumps(row) + "\n" for row in bad).encode()
    path = index / NAME
    held = path.read_bytes() if path.is_file() else b""
    digests = [hashlib.sha256(sheet).hexdigest() for sheet in (held, data)]
    if held != data or not path.is_file() or memory.get(work.SHEETS) != digests[1:]:
        memory.put(work.SHEETS, digests)
        files.write_bytes(path, data)
        memory.put(work.SHEETS, digests[1:])
    return len(bad)


def check(index: Path, digests: list[str]) -> None:
    """Compare the list with what the memory knows of it.

    Raises:
        CorruptError: it is damaged.
    """
    path = index / NAME
    if path.is_file() and digests and files.digest_file(path) not in digests:
        raise damaged(path, "its checksum is wrong")
