"""How many queries that name one thing, as "a red heart", find it first in the demo's index.

All pairs of a colour and a shape are asked. A photo is right if its scene holds that very thing,
whatever else it holds. Queries that no scene of the index can answer are counted apart.

    python -m benchmarks.short_queries demo
"""

from __future__ import annotations

import argparse
from pathlib import Path

from crosstill import data
from crosstill.data import scenes
from crosstill.search import Searcher


def measure(demo: Path) -> tuple[int, int, int]:
    """Ask the index of a folder that `crosstill demo` made; return right, answerable, all."""
    queries = [
        scenes.name_thing(scenes.Thing(shape, colour, "small", 0, 0, 1, 0))
        for colour in scenes.COLOURS
        for shape in scenes.OUTLINES
    ]
    said = {
        Path(example.path).name: example.captions
        for example in data.open(demo / "scenes/dataset.json").examples
    }
    known = {text for path in (demo / "photos").glob("*.png") for text in said[path.name]}
    searcher = Searcher.open(demo / "index")
    found = searcher.find(searcher.encode_texts(queries), 1)
    searcher.close()
    right = sum(query in said[hits[0].path] for query, hits in zip(queries, found, strict=True))
    return right, sum(query in known for query in queries), len(queries)


def main() -> None:
    """Print the figure of one demo's folder."""
    options = argparse.ArgumentParser(description="Short queries in the demo's index.")
    options.add_argument("demo", type=Path, help="folder that `crosstill demo` made")
    right, answerable, asked = measure(options.parse_args().demo)
    print(
        f"short queries: {right} of {answerable} have a right first photo "
        f"({right / answerable:.0%}); {asked - answerable} of {asked} have none in the index"
    )


if __name__ == "__main__":
    main()
