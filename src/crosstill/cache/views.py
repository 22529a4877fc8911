"""Which views of its images a teacher saw, kept beside its features: `views.parquet`.

A student's photos are made from what is kept, not drawn again, so that they stay what the teacher
saw whatever a later version draws.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from crosstill import files
from crosstill.images import View, draw_view
from crosstill.types import Example

NAME = "views.parquet"


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
    rows = pq.read_table(folder / NAME).to_pylist()
    return {(row.pop("image"), row.pop("view")): View(**row) for row in rows}
