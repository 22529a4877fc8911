"""Recall and ranking against more than a caption's own image: ECCV Caption and CxC on COCO's test.

COCO's captions are true of more images than the one they were written for. ECCV Caption (Chun et
al., arXiv 2204.03359) and Crisscrossed Captions (Parekh et al., arXiv 2004.15020) had people judge
such pairs. With R true candidates of a query, R-precision is the share of them among its first R;
mAP@R also asks for their order: the mean over the first R places of the precision up to there, 0
where a place holds a wrong one. Tied candidates count by their expectation over random order.

    eccv_image_to_caption.json, eccv_caption_to_image.json    as the eccv_caption package has them;
    cxc_image_to_caption.json, cxc_caption_to_image.json      either of the two is enough to name
    sits_test.csv                                             as CxC was released

These files speak COCO's own ids. An image's id is the number that its file is named by, as in
COCO_val2014_000000391895.jpg. A caption's id stands beside its text in COCO's
`captions_val2014.json` (`annotations[].id`) and in Karpathy's `dataset_coco.json`
(`sentences[].sentid`, the same numbers).
"""

from __future__ import annotations

import csv
import io
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crosstill.data.listings import parse_json
from crosstill.data.pairs import read_text
from crosstill.errors import ConfigError, DataError
from crosstill.evaluate.recall import DEPTHS, Rivals, chance
from crosstill.formats import aligned
from crosstill.types import Example

TRUE = 3.0  # of 5: the mean rating from which CxC counts a pair as true
ROWS = 256  # queries that are looked at together
SIDES = ("image_to_caption", "caption_to_image")

Ids = Mapping[int, frozenset[int]]  # a query → all that is true of it
Scores = Callable[[Tensor], Tensor]  # rows of queries → their scores of all candidates
Captions = Mapping[int, Sequence[tuple[str, int]]]  # image id → its captions, text and id


@dataclass(frozen=True)
class Extended:
    """One ground truth, in COCO's ids.

    Attributes:
        name: of the file, without the direction.
        images: the captions that are true of an image.
        captions: the images that a caption is true of.
    """

    name: str
    images: Ids
    captions: Ids


class Queries(NamedTuple):
    """One direction of a ground truth in a split: Q queries with up to P true candidates."""

    rows: Tensor  # (Q,)
    items: Tensor  # (Q, P) rows of the true candidates that are in the split, then -1
    total: Tensor  # (Q,) all that is true, in the split or not


@dataclass(frozen=True)
class Placed:
    """A ground truth in the rows of a split."""

    name: str
    images: Queries
    captions: Queries
    notes: tuple[str, ...] = ()

    def of_features(self, image: Tensor, text: Tensor) -> Judged:
        """Judge features (I, D) and (T, D), by dot product."""
        return self._judge(lambda rows: image[rows] @ text.T, lambda rows: text[rows] @ image.T)

    def of_scores(self, scores: Tensor) -> Judged:
        """Judge a score matrix (I, T)."""
        return self._judge(lambda rows: scores[rows], lambda rows: scores.T[rows])

    def _judge(self, of_images: Scores, of_captions: Scores) -> Judged:
        ranked = rank(self.images, of_images), rank(self.captions, of_captions)
        return Judged(self.name, *ranked, len(self.images.rows), len(self.captions.rows))


class Ranked(NamedTuple):
    """The ranking measures of one direction, 0 to 100."""

    map_at_r: float
    rprecision: float
    r1: float
    r5: float
    r10: float


@dataclass(frozen=True)
class Judged:
    """A model's measures on one ground truth: image finding captions (i2t), and the reverse."""

    name: str
    i2t: Ranked
    t2i: Ranked
    images: int
    captions: int

    def to_json(self) -> dict[str, Any]:
        """Return both directions, and how many images and captions were queries."""
        directions = {"i2t": self.i2t._asdict(), "t2i": self.t2i._asdict()}
        return {**directions, "images": self.images, "captions": self.captions}


def read(path: Path) -> Extended:
    """Read a ground truth: a CxC table, or a pair of JSON files.

    Raises:
        DataError: a file is not there, cannot be read, or has another layout.
    """
    if path.suffix.lower() == ".csv":
        return _read_table(path)
    side = next((side for side in SIDES if side in path.name), None)
    if side is None:
        raise DataError(
            f"{path}: no ground truth; give CxC's sits_test.csv, or a JSON file whose name says "
            f"{' or '.join(SIDES)}"
        )
    images, captions = (_read_ids(path.with_name(path.name.replace(side, s))) for s in SIDES)
    return Extended(path.stem.replace(side, "").strip("_-") or path.stem, images, captions)


def place(truth: Extended, known: Captions, examples: Sequence[Example]) -> Placed:
    """Find a ground truth in a split.

    Args:
        truth: as it was read.
        known: COCO's captions with their ids.
        examples: the images of the split, in the order of their rows.

    Raises:
        DataError: not one image or not one caption of the truth is there.
    """
    rows = locate(known, examples)
    images = _queries(truth.images, rows.images, rows.captions)
    captions = _queries(truth.captions, rows.captions, rows.images)
    texts = sum(len(example.captions) for example in examples)
    note = (
        f"{truth.name}: {len(images.rows):,} of {len(truth.images):,} images and "
        f"{len(captions.rows):,} of {len(truth.captions):,} captions are in this split"
    )
    if not len(images.rows) or not len(captions.rows):
        raise DataError(
            f"{note} ({len(rows.images):,} of {len(examples):,} images have a COCO id in their "
            f"names, {len(rows.captions):,} of {texts:,} captions one in --annotations); give "
            "COCO's test split"
        )
    absent = sum(int((q.total - (q.items >= 0).sum(1)).sum()) for q in (images, captions))
    lost = (f"{truth.name}: {absent:,} true candidates are not there and count as missed",)
    return Placed(truth.name, images, captions, (note, *(lost if absent else ())))


def opened(
    paths: Sequence[Path], annotations: Path | None
) -> Callable[[Sequence[Example]], tuple[Placed, ...]]:
    """Read ground truths, and the captions by whose text they are found; `place` for all of them.

    Raises:
        ConfigError: there are no annotations to find captions in.
        DataError: a file cannot be read or has another layout.
    """
    if not paths:
        return lambda examples: ()
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path}: no such file; check --truth")
    if annotations is None or annotations.suffix.lower() != ".json":
        raise ConfigError(
            "--truth speaks COCO's ids of captions; give --annotations captions_val2014.json "
            "(or dataset_coco.json)"
        )
    truths, known = [read(path) for path in paths], read_captions(annotations)
    return lambda examples: tuple(place(truth, known, examples) for truth in truths)


def rank(queries: Queries, scores: Scores) -> Ranked:
    """Mean over the queries of mAP@R, R-precision and recall at 1, 5 and 10, in percent."""
    chunks = map(Queries, *(part.split(ROWS) for part in queries))
    parts = [_rank(chunk, scores(chunk.rows).float()) for chunk in chunks]
    return Ranked(*(100 * torch.cat(parts).mean(0)).tolist())


def table(rows: Mapping[str, Sequence[Judged]]) -> str:
    """Format a Markdown table: one row a model and ground truth."""
    names = ("mAP@R", "R-precision", *(f"R@{depth}" for depth in DEPTHS))
    sides = [f"{side} {names[0]}" for side in ("image→text", "text→image")]
    heads = ["model", "truth", sides[0], *names[1:], sides[1], *names[1:]]
    body = [
        [model, judged.name, *(f"{number:.2f}" for number in (*judged.i2t, *judged.t2i))]
        for model, several in rows.items()
        for judged in several
    ]
    return aligned(heads, body)


def _rank(queries: Queries, scores: Tensor) -> Tensor:
    """Compute (Q, 5) in the order of `Ranked`, 0 to 1, in float64."""
    there = queries.items >= 0
    own = scores.gather(1, queries.items.clamp_min(0)).masked_fill(~there, -torch.inf)
    best = own.amax(1, keepdim=True)
    true = ((own == best) & there).sum(1)
    better, level = (scores > best).sum(1), (scores == best).sum(1) - true
    rivals = Rivals(better.double(), level.double(), true.double())
    recalls = [chance(rivals, depth) for depth in DEPTHS]
    return torch.stack([*_precisions(queries.total, own, there, scores), *recalls], dim=1)


def _precisions(total: Tensor, own: Tensor, there: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """mAP@R and R-precision (Q,) of true candidates' scores (Q, P) among all scores (Q, N).

    At place r stands one of `level` candidates of one score, `tied` of them true, behind `above`
    better ones of which `hits` are true. In random order it is a true one with tied / level, and
    those of its group before it are then true with (tied - 1) / (level - 1) each.
    """
    top = scores.topk(min(int(total.max()), scores.shape[1]), dim=1).values
    place, last = torch.arange(1, top.shape[1] + 1), top[:, -1:]
    above = (top[:, None] > top[..., None]).sum(2)
    level = (top[:, None] == top[..., None]).sum(2)
    level = torch.where(top == last, (scores == last).sum(1, keepdim=True), level)
    hits = ((own[:, None] > top[..., None]) & there[:, None]).sum(2)
    tied = ((own[:, None] == top[..., None]) & there[:, None]).sum(2)
    true = tied.double() / level
    before = (place - above - 1) * (tied - 1) / (level - 1).clamp_min(1).double()
    inside = (place <= total[:, None]).double()
    precision = true * (hits + 1 + before) / place
    return (precision * inside).sum(1) / total, (true * inside).sum(1) / total


def _queries(truth: Ids, queries: Mapping[int, int], candidates: Mapping[int, int]) -> Queries:
    here = [(queries[number], items) for number, items in truth.items() if number in queries]
    rows = [sorted(candidates[item] for item in items if item in candidates) for _, items in here]
    width = max([1, *map(len, rows)])
    padded = [row + [-1] * (width - len(row)) for row in rows]
    return Queries(
        torch.tensor([row for row, _ in here], dtype=torch.int64),
        torch.tensor(padded, dtype=torch.int64).reshape(-1, width),
        torch.tensor([len(items) for _, items in here], dtype=torch.int64),
    )


def _read_ids(path: Path) -> Ids:
    value = parse_json(path)
    try:
        ids = {int(key): frozenset(map(int, items)) for key, items in value.items()}
    except (AttributeError, TypeError, ValueError):
        ids = {}
    if not ids or not all(ids.values()):
        raise DataError(f"{path}: not lists of ids by id, as ECCV Caption has them")
    return ids


def _read_table(path: Path) -> Extended:
    images, captions = defaultdict(set), defaultdict(set)
    lines = csv.DictReader(io.StringIO(read_text(path)))
    for number, line in enumerate(lines, start=2):
        try:
            caption, rating = int(line["caption"].split(":")[-1]), float(line["agg_score"])
            image = image_id(line["image"])
        except (KeyError, TypeError, ValueError, AttributeError):
            image = None
        if image is None:
            raise DataError(
                f"{path}, line {number}: not CxC's columns caption, image, agg_score; give "
                "sits_test.csv"
            )
        if rating >= TRUE:
            images[image].add(caption)
            captions[caption].add(image)
    if not images:
        raise DataError(f"{path}: no pair is rated {TRUE:g} or more; give CxC's sits_test.csv")
    return Extended(
        path.stem, *({k: frozenset(v) for k, v in d.items()} for d in (images, captions))
    )


class SplitRows(NamedTuple):
    """Rows of a split's images and captions by COCO's id."""

    images: dict[int, int]
    captions: dict[int, int]


def read_captions(path: Path) -> Captions:
    """Read the captions of a COCO or a Karpathy JSON.

    Raises:
        DataError: it cannot be read, or has neither layout.
    """
    value = parse_json(path)
    by_image: defaultdict[int, list[tuple[str, int]]] = defaultdict(list)
    try:
        for image, text, number in _numbered_captions(value):
            by_image[int(image)].append((text.strip(), int(number)))
        return by_image
    except (KeyError, TypeError, ValueError):
        raise DataError(
            f"{path}: no ids of COCO's captions in it; give captions_val2014.json or "
            "dataset_coco.json after --annotations"
        ) from None


def locate(known: Captions, examples: Sequence[Example]) -> SplitRows:
    """Find the ids of a split's images by file name and of its captions by text.

    Only letters and digits of a text are compared, so that cleaning does not matter.
    """
    rows, row = SplitRows({}, {}), 0
    for position, example in enumerate(examples):
        number = image_id(example.path)
        left = defaultdict(list)
        for text, caption in known.get(number, ()) if number is not None else ():
            left[_plain(text)].append(caption)
        if number is not None:
            rows.images[number] = position
        for text in example.captions:
            same = left[_plain(text)]
            if same:
                rows.captions[same.pop(0)] = row
            row += 1
    return rows


def image_id(name: str) -> int | None:
    """Read the number of twelve digits that ends a COCO file's name; None of any other file."""
    digits = re.search(r"(?<!\d)\d{12}$", PurePath(name).stem)
    return int(digits[0]) if digits else None


def _numbered_captions(value: Mapping[str, Any]) -> Iterable[tuple[int, str, int]]:
    """List image number, text and caption number of COCO's layout or Karpathy's."""
    if "annotations" in value:
        return [(a["image_id"], a["caption"], a["id"]) for a in value["annotations"]]
    return [
        (image["cocoid"], sentence["raw"], sentence["sentid"])
        for image in value["images"]
        for sentence in image["sentences"]
    ]


def _plain(text: str) -> str:
    return "".join(filter(str.isalnum, text.casefold()))
