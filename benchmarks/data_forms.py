"""What an image costs to read out of files, a tar and Parquet written in several ways.

    python benchmarks/data_forms.py dataset_flickr8k.json --images photos

Everything is written to a temporary folder. Images are read one by one in the order of a cache,
which is that of their ids, on one thread.
"""

from __future__ import annotations

import argparse
import io
import tarfile
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from crosstill import data

SCHEMA = pa.schema(
    [
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("caption", pa.string()),
    ]
)
PARQUET = {  # name: compression, rows in a group
    "plain.parquet": ("none", 770),
    "snappy-100.parquet": ("snappy", 100),
    "snappy-770.parquet": ("snappy", 770),
}


def write_tar(path: Path, pairs: data.Pairs) -> None:
    """One shard of all pairs."""
    with tarfile.open(path, "w") as archive:
        for number, example in enumerate(pairs.examples):
            text = "\n".join(example.captions).encode()
            suffix = Path(example.path).suffix
            for end, content in ((suffix, pairs.read(example)), (".txt", text)):
                info = tarfile.TarInfo(f"{number:06d}{end}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def write_parquet(path: Path, pairs: data.Pairs, compression: str, rows: int) -> None:
    """One file of all pairs."""
    with pq.ParquetWriter(path, SCHEMA, compression=compression) as writer:
        for start in range(0, len(pairs), rows):
            cells = [
                {
                    "image": {"bytes": pairs.read(example), "path": example.path},
                    "caption": example.captions[0],
                }
                for example in pairs.examples[start : start + rows]
            ]
            writer.write_table(pa.Table.from_pylist(cells, SCHEMA), row_group_size=rows)


def measure(pairs: data.Pairs, seconds: float) -> float:
    """Milliseconds an image, over the first ones by id."""
    count, began = 0, time.perf_counter()
    for example in sorted(pairs.examples, key=lambda example: example.image_id):
        pairs.read(example)
        count += 1
        if time.perf_counter() - began > seconds:
            break
    return 1000 * (time.perf_counter() - began) / count


def main() -> None:
    """Print a row for each form."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--images")
    parser.add_argument("--seconds", type=float, default=5.0, help="of reading each form")
    given = parser.parse_args()
    pairs = data.open(given.data, images=given.images)
    with tempfile.TemporaryDirectory() as folder:
        write_tar(Path(folder, "shard.tar"), pairs)
        for name, (compression, rows) in PARQUET.items():
            write_parquet(Path(folder, name), pairs, compression, rows)
        print("| form | opening (s) | an image (ms) |\n|---|---|---|")
        for name in ("files", "shard.tar", *PARQUET):
            began = time.perf_counter()
            if name == "files":
                opened = data.open(given.data, images=given.images)
            else:
                opened = data.open(Path(folder, name))
            opening = time.perf_counter() - began
            print(f"| {name} | {opening:.1f} | {measure(opened, given.seconds):.2f} |", flush=True)


if __name__ == "__main__":
    main()
