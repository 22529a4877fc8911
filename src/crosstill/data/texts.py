r"""Read loose texts: sentences without photos, a line each, from files of millions of lines.

A text counts once, and none that is a caption already. They are ordered by their SHA-256, so that
neither the order of the lines nor that of the files matters; the same hash draws the splits, as an
image's draws its own. Texts are held in Arrow, a few bytes more than they have, never as Python's
objects all at once.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from crosstill import formats
from crosstill.data.pairs import regular, unreadable
from crosstill.errors import DataError

LONGEST = 4_000  # characters of a line that are kept: no model reads that far
MOST_HELD_OUT = 5_000  # texts in val, and in test: a validation of millions would be slow
BLOCK = 1 << 16  # lines that are Python's objects at a time
_HASH = "S32"  # numpy's type of a SHA-256


@dataclass(frozen=True)
class LooseTexts:
    """Distinct texts without photos, in the order of their hashes.

    Attributes:
        digest: SHA-256 of the set of texts; neither order nor files count.
        splits: (N,) "train", "val" or "test" of each.
        note: for people: how many lines there were, and what became of them; "" of none.
    """

    digest: str
    splits: np.ndarray
    note: str
    _texts: pa.LargeStringArray  # in the order of the files, repeated ones and captions too
    _rows: np.ndarray  # (N,) the row of `_texts` of each

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, start: int, stop: int) -> list[str]:
        """Return the texts from row `start` to before `stop`, or to the end."""
        return self.table(start, stop).to_pylist()

    def blocks(self) -> Iterator[list[str]]:
        """Yield all texts, some thousands at a time."""
        for start in range(0, len(self), BLOCK):
            yield self.take(start, start + BLOCK)

    def table(self, start: int, stop: int) -> pa.StringArray:
        """Return the same as an Arrow array."""
        return self._texts.take(pa.array(self._rows[start:stop])).cast(pa.string())


class _Line(NamedTuple):
    text: str  # without its end
    cut: bool  # it was longer than `LONGEST`


def read_texts(sources: Iterable[str | Path], captions: Iterable[str] = ()) -> LooseTexts:
    """Read loose texts, once each, without those that are captions already.

    Args:
        sources: a `Path` is a UTF-8 file with a text a line, a `str` is a text.
        captions: of the dataset.

    Raises:
        DataError: a file cannot be read or is not UTF-8 (the message names the line), or holds no
            text, or its name is given as a `str`.
    """
    if isinstance(sources, str | Path):
        raise DataError(f"texts = {str(sources)[-60:]!r}: one text or file; give a list of them")
    counts: Counter[str] = Counter()
    hashes = bytearray()
    blocks = []
    texts = _clean(sources, counts)
    while block := list(islice(texts, BLOCK)):
        blocks.append(pa.array(block, pa.large_string()))
        hashes += b"".join(sha256(text.encode()).digest() for text in block)
    lines = pa.concat_arrays(blocks) if blocks else pa.array([], pa.large_string())
    del blocks
    of_lines = np.frombuffer(hashes, _HASH)
    distinct, rows = np.unique(of_lines, return_index=True)
    known = np.array([sha256(text.encode()).digest() for text in captions], _HASH)
    loose = np.ones(len(distinct), dtype=bool)
    if len(distinct):
        places = np.searchsorted(distinct, known).clip(max=len(distinct) - 1)
        loose[places[distinct[places] == known]] = False
    distinct, rows = distinct[loose], rows[loose]
    splits = _draw_splits(distinct)
    counts["repeated"] = len(lines) - len(loose)
    counts["captions already"] = int((~loose).sum())
    return LooseTexts(
        sha256(distinct.astype(_HASH).tobytes()).hexdigest(),
        splits,
        _note(counts, splits),
        lines,
        rows,
    )


def _clean(sources: Iterable[str | Path], counts: Counter[str]) -> Iterator[str]:
    """Yield all texts as captions are cleaned; count lines, and those that are left out or cut."""
    for source in sources:
        before = counts["lines"] - counts["empty"]
        for text, cut in _lines(source):
            counts["lines"] += 1
            counts[f"cut to {LONGEST:,} characters"] += cut
            text = formats.cleaned(text)
            counts["empty"] += not text
            if text:
                yield text
        if isinstance(source, Path) and counts["lines"] - counts["empty"] == before:
            raise DataError(f"{source}: no text in it; give a file with a sentence a line")


def _lines(source: str | Path) -> Iterator[_Line]:
    if isinstance(source, str):
        if source.lower().endswith(".txt") and Path(source).is_file():
            raise DataError(f"{source}: a file among texts; give Path({source!r}) to read it")
        yield _Line(source[:LONGEST], len(source) > LONGEST)
        return
    try:
        # what is no UTF-8 becomes surrogates, which cannot be encoded again
        with regular(source).open(encoding="utf-8-sig", errors="surrogateescape") as file:
            number = 0
            while line := file.readline(LONGEST + 1):
                number += 1
                text, rest = line.removesuffix("\n"), line
                while not rest.endswith("\n") and (rest := file.readline(LONGEST)):
                    pass
                if formats.encodable(text) != text:
                    raise DataError(
                        f"{source}, line {number}: not UTF-8 text; save the file as UTF-8"
                    )
                yield _Line(text[:LONGEST], len(text) > LONGEST)
    except OSError as error:
        raise DataError(
            f"{source}: {unreadable(error)}; give a file with a sentence a line"
        ) from None


def _draw_splits(hashes: np.ndarray) -> np.ndarray:
    """Draw train, val and test 80/10/10 by hash, as images are; train takes the surplus of both."""
    splits = np.full(len(hashes), "train", dtype="U5")
    last = np.frombuffer(hashes.tobytes(), np.uint8).reshape(-1, 32)[:, -4:].copy()
    tenth = last.view(">u4")[:, 0] % 10
    for name, number in (("val", 8), ("test", 9)):
        splits[np.flatnonzero(tenth == number)[:MOST_HELD_OUT]] = name
    return splits


def _note(counts: Counter[str], splits: np.ndarray) -> str:
    if not counts["lines"]:
        return ""
    names, each = np.unique(splits, return_counts=True)
    kept = [f"{name} {count:,}" for name, count in zip(names, each, strict=True)]
    left = [f"{count:,} {name}" for name, count in counts.items() if count and name != "lines"]
    held = f" ({', '.join(kept)})" if kept else ""
    return f"loose texts: {len(splits):,}{held}; lines: {counts['lines']:,}" + (
        f", of which {', '.join(left)}" if left else ""
    )
