"""Which views of its images a teacher saw, kept beside its features: `views.parquet`.

A student's photos are made from what is kept, not drawn again, so that they stay what the teacher
saw whatever a later version draws.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, fields
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from crosstill import artefacts, files
from crosstill.cache import tables
from crosstill.images import View, draw_view
from crosstill.types import Example

NAME = "views.parquet"
_COLUMNS = {"image": "int64", "view": "int64"}
_OF_VIEW = {f.name: "bool" if f.name == "flip" else "double" for f in fields(View)}


def write(
    folder: Path, examples: Sequence[Example], views: int, seed: int, kinds: Collection[str]
) -> None:
    """Draw views 1, 2, … of every image and keep their parameters, one row a view."""
    rows = []
    for image, example in enumerate(examples):
        for number in range(1, views):
            seen = draw_view(example.image_id, number, seed, kinds)
            rows.append({"image": image, "view": number, **(asdict(seen) if seen else {})})
    files.write_atomic(folder / NAME, lambda path: pq.write_table(pa.Table.from_pylist(rows), path))


def read(folder: Path) -> dict[tuple[int, int], View]:
    """Row of the image and number of the view → its parameters."""
    with artefacts.readable(folder / NAME):
        rows = tables.read(folder / NAME, _COLUMNS, _OF_VIEW).to_pylist()
        return {(row.pop("image"), row.pop("view")): View(**row) for row in rows}
