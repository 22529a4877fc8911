"""What an unfinished build has safely on disk.

A shard is written first and named in the journal second, each atomically: a kill at any moment
costs the shard in hand and nothing else.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from crosstill import artefacts, files
from crosstill.errors import CorruptError

log = logging.getLogger(__name__)

NAME = "building.json"


class Journal:
    """The shards of each kind, in order, as a list of records each.

    A record holds `file` (None for a shard without rows), `rows`, `sha256` and whatever else
    `commit` was given.
    """

    def __init__(
        self, folder: Path, key: Mapping[str, Any], version: int, kinds: Iterable[str]
    ) -> None:
        self._folder = folder
        self._head = {"format": version, "key": dict(key)}
        self.shards: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}

    @staticmethod
    def read(folder: Path, version: int) -> dict[str, Any] | None:
        """The journal of an earlier build; None if there is none or it is damaged."""
        if not (folder / NAME).is_file():
            return None
        try:
            return files.read_sealed(folder / NAME, {version})
        except CorruptError as error:
            log.warning("%s; starting this cache over", error)
            return None

    def adopt(self, earlier: Mapping[str, Any]) -> None:
        """Take over the leading shards of an earlier build whose bytes are as it recorded."""
        for kind, shards in self.shards.items():
            shards.extend(self._whole(earlier[kind]))

    def commit(
        self, kind: str, array: np.ndarray | None, name: str | None = None, **record: Any
    ) -> None:
        """Put one more shard on disk; `array` is None when it has no rows."""
        shards = self.shards[kind]
        entry: dict[str, Any] = {"file": None, "rows": 0, **record}
        if array is not None:
            path = self._folder / (name or f"{kind}-{len(shards):05d}.npy")
            files.write_atomic(path, partial(files.save_array, array=array), array.nbytes)
            entry |= {"file": path.name, "rows": len(array), "sha256": files.digest_file(path)}
        shards.append(entry)
        self.save()

    def save(self) -> None:
        """Put the journal itself on disk; its presence also says that the folder is a cache's."""
        files.write_json(self._folder / NAME, files.sealed({**self._head, **self.shards}))

    def stored(self, kind: str) -> list[dict[str, Any]]:
        """The shards that have rows: what the finished header names."""
        keep = ("file", "rows", "sha256")
        return [{k: shard[k] for k in keep} for shard in self.shards[kind] if shard["file"]]

    def close(self) -> None:
        (self._folder / NAME).unlink(missing_ok=True)

    def _whole(self, shards: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for position, shard in enumerate(shards):
            try:
                if shard["file"]:
                    artefacts.check_files(self._folder, {shard["file"]: shard["sha256"]})
            except CorruptError as error:
                log.warning("%s; computing it again", error)
                return shards[:position]
        return shards
