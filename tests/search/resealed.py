"""Artefacts that somebody has changed and then given right checksums, as a stranger can."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from crosstill import files

HEADERS = ("bundle.json", "vectors.json", "index.json", "cache.json", "student.json")


def change(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edit a sealed record and seal it again."""
    record = json.loads(path.read_text())
    edit(record)
    files.write_json(path, files.sealed(record))


def reseal(folder: Path) -> None:
    """Bring the checksums of a bundle, or of the vectors of an index, up to what lies there."""
    for name in HEADERS:
        for path in [*folder.glob(f"**/{name}")]:
            change(path, lambda record, path=path: _digest(record, path))


def _digest(record: dict[str, Any], path: Path) -> None:
    base = path.parent
    if path.name == "index.json":
        base = base / f"g-{record['generation']:06d}"
    digests = record["files"]
    for name in digests:
        if (base / name).is_file():
            digests[name] = files.digest_file(base / name)
    for shard in (s for shards in record.get("shards", {}).values() for s in shards):
        shard["sha256"] = files.digest_file(base / shard["file"])
