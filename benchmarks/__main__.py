"""`make bench`: the ratios of the quick benchmarks, one line each; others run by name."""

from __future__ import annotations

from benchmarks import caching, decode, indexing, memory, recall, serving, step, vectors


def main() -> None:
    """Run all of them, the quick ones first."""
    for module in (decode, step, caching, recall, memory, vectors, indexing, serving):
        module.main()


if __name__ == "__main__":
    main()
